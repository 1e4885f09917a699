"""The tests of the integration again under an old and a new transformers, installed beside the one in use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# what each needs in other versions than those in use; everything else is shared
PACKAGES = {
    "4.57": (
        "transformers==4.57.6", "huggingface-hub<1", "tokenizers<=0.23", "datasets<4.5", "requests",
        "urllib3", "idna", "certifi", "charset-normalizer", "httpx<1", "httpcore<2", "anyio", "h11",
    ),
    # the newest: since 5.23 what a model records is found through its class
    "5.24": ("transformers==5.24.*", "huggingface-hub>=1.31,<3", "tokenizers>=0.23.1,<0.24"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("release", PACKAGES)
def test_everything_holds_under_another_version(tmp_path, release):
    """AST_FAST_TRANSFORMERS_4 (or _5) may name a folder that holds the packages already."""
    folder = os.environ.get(f"AST_FAST_TRANSFORMERS_{release[0]}", "")
    if not folder:
        folder = str(tmp_path / "packages")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        done = subprocess.run(
            [*install, *PACKAGES[release]], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"transformers {release} cannot be had here: {done.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True, env=environment, timeout=120)
    assert found.stdout.startswith(release), found.stderr
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
