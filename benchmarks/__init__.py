"""Measurements of ast_fast beside its peers: correct first, interleaved, with the spread.

Not installed with the package: run from the root of a checkout (`python -m benchmarks.run --help`).
"""

import time

# of this process, before anything slow is imported: its time limit counts from here
BEGAN = time.monotonic()
