#!/bin/sh
# Measures everything that a CPU can and makes tables and pictures from it; about 15 minutes on a quiet
# machine. Run it from the root of a checkout with the extension built, and with nothing else running:
# PYTHON=.venv/bin/python benchmarks/cpu.sh
set -eu
python=${PYTHON:-python3}
"$python" -m benchmarks.run --suite all --device cpu --threads 1 --seconds "${SECONDS_A_CASE:-3}" "$@"
"$python" -m benchmarks.plot
"$python" -m benchmarks.tables --write benchmarks/README.md
if grep -q "benchmarks:begin" README.md; then
    "$python" -m benchmarks.tables --write README.md
fi
