"""The tests of the integration again under transformers 4.57, installed beside the one in use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# what 4.57 needs in other versions than those in use; everything else is shared
PACKAGES = (
    "transformers==4.57.6", "huggingface-hub<1", "tokenizers<=0.23", "datasets<4.5", "requests",
    "urllib3", "idna", "certifi", "charset-normalizer", "httpx<1", "httpcore<2", "anyio", "h11",
)  # fmt: skip


@pytest.mark.slow
def test_everything_holds_under_version_4(tmp_path):
    """AST_FAST_TRANSFORMERS_4 may name a folder that holds the packages already."""
    folder = os.environ.get("AST_FAST_TRANSFORMERS_4", "")
    if not folder:
        folder = str(tmp_path / "packages")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"transformers 4.57 cannot be had here: {done.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True, env=environment, timeout=120)
    assert found.stdout.startswith("4.57"), found.stderr
    files = [*sorted(HERE.glob("test_transformers_a*.py")), HERE / "test_feature_extractor.py"]
    assert len(files) == 3
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *map(str, files),
    ]
    root = HERE.parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "passed" in ran.stdout
