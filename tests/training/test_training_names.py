"""A step of one's own needs PyTorch alone, and every public name is there."""

import subprocess
import sys

from ast_fast import training

BARE = """
import sys
for name in ("lightning_fabric", "safetensors", "torchmetrics", "soundfile"):
    sys.modules[name] = None
from ast_fast.training import GraphedStep, MasterWeights, TrainingStep
from ast_fast.graphs import CudaGraphs, GraphedForward
"""


def test_a_step_of_one_s_own_imports_no_package_of_the_loop():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_what_it_says_in_any_order():
    for name in sorted(training.__all__, reverse=True):
        assert callable(getattr(training, name)), name
        assert getattr(training, name).__module__.startswith("ast_fast.training")
