"""`python -m ast_fast.equivalence`: verify this machine with nothing but torch installed."""

import sys

from .run import main

sys.exit(main())
