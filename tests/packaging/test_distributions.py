"""Wheels, sdists and installs, each built offline from a copy of the checkout."""

import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# an editable install finds the checkout's modules from anywhere: here only the folder under test counts
NOT_EDITABLE = (
    "import sys; sys.meta_path[:] = "
    "[f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
)
NO_NETWORK = [
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--disable-pip-version-check",
    "-q",
]
SUFFIX = ".so"


def pip(*arguments, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What git would give: the tracked files, plus untracked ones that are not ignored."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text("ast_fast\n")
    return folder


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory):
    """A wheel built with a compiler that always fails: no C++, everything else."""
    folder = tmp_path_factory.mktemp("pure")
    output = pip(
        "wheel",
        ".",
        "-w",
        str(folder),
        "-v",
        *NO_NETWORK[:-1],
        cwd=checkout,
        CC="false",
        CXX="false",
    )
    assert output.count("the C++ kernels were not built") == 1
    (wheel,) = folder.glob("ast_fast-*.whl")
    return wheel


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def imports_from(folder, code):
    """Run code with only `folder` added to the path, from a folder of its own."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", NOT_EDITABLE + code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_contents(names):
    outside = [n for n in names if not n.startswith(("ast_fast/", "ast_fast-"))]
    assert not outside, f"installs outside ast_fast/: {outside[:5]}"
    tuned = {p.name for p in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert {n.rpartition("/")[2] for n in names if n.startswith("ast_fast/kernels/tuned/")} == tuned
    for source in (ROOT / "kernels").glob("*.py"):
        assert f"ast_fast/kernels/{source.name}" in names
    assets = ROOT / "ast_fast" / "assets"
    for asset in assets.rglob("*"):
        if asset.is_file() and "__pycache__" not in asset.parts:
            assert f"ast_fast/assets/{asset.relative_to(assets).as_posix()}" in names
    assert {"ast_fast/py.typed", "ast_fast/_C.pyi"} <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not any("__pycache__" in n or n.startswith("ast_fast/csrc") for n in names)


def test_without_a_compiler_the_wheel_is_complete_but_for_the_extension(pure_wheel, tmp_path):
    names = names_in(pure_wheel)
    check_contents(names)
    assert not any(n.endswith(SUFFIX) for n in names)
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    output = imports_from(
        tmp_path,
        "import ast_fast.cpp, ast_fast.kernels._tuned, importlib.util\n"
        "assert not ast_fast.cpp.available()\n"
        "assert importlib.util.find_spec('kernels') is None or 'ast_fast' not in str("
        "importlib.util.find_spec('kernels').origin)\n"
        "print(ast_fast.cpp.why_unavailable())\n",
    )
    assert "compiler" in output


def test_the_command_line_entry_point_is_declared(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "ast-fast = ast_fast.cli:main" in archive.read(name).decode()


@pytest.mark.slow
def test_a_wheel_builds_in_a_minute_and_brings_every_instruction_set(checkout, tmp_path):
    start = time.monotonic()
    pip("wheel", ".", "-w", str(tmp_path), *NO_NETWORK, cwd=checkout)
    seconds = time.monotonic() - start
    # a minute on two idle cores; shared machines get slack
    assert seconds < 180, f"the build took {seconds:.0f} s"
    (wheel,) = tmp_path.glob("ast_fast-*.whl")
    names = names_in(wheel)
    check_contents(names)
    (extension,) = (n for n in names if n.endswith(SUFFIX))
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    output = imports_from(
        unpacked,
        "import torch, ast_fast._C as C, ast_fast.cpp\nassert ast_fast.cpp.available()\n"
        "from ast_fast.ops import layer_norm\nimport ast_fast\n"
        "with ast_fast.use_backend('cpp'):\n"
        "    layer_norm(torch.randn(3, 8), torch.ones(8), torch.zeros(8))\n"
        "print(C.isas())\n",
    )
    assert "baseline" in output
    needed = subprocess.run(
        ["readelf", "-d", str(unpacked / extension)], capture_output=True, text=True, check=True
    ).stdout
    # the plain name: the runtime that torch brings, not a copy under a hashed name
    assert "libgomp.so.1" in needed and "torch" not in needed and "RPATH" not in needed


@pytest.mark.slow
def test_an_sdist_holds_the_sources_and_installs(checkout, tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    subprocess.run(
        [sys.executable, "-c", NOT_EDITABLE + code], cwd=checkout, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("ast_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.partition("/")[2] for n in tar.getnames()}
    for folder in ("csrc", "kernels", "ast_fast"):
        for source in (ROOT / folder).rglob("*"):
            if (
                source.suffix in {".cpp", ".h", ".py", ".json"}
                and "__pycache__" not in source.parts
            ):
                assert source.relative_to(ROOT).as_posix() in names, source
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= names
    target = tmp_path / "installed"
    pip("install", str(archive), "--target", str(target), *NO_NETWORK, cwd=tmp_path)
    assert "True" in imports_from(target, "import ast_fast.cpp as c; print(c.available())")
    tuned = {p.name for p in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert {p.name for p in (target / "ast_fast" / "kernels" / "tuned").glob("*.json")} == tuned


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_an_editable_install_finds_kernels_and_extension(checkout, tmp_path, mode):
    environment = tmp_path / "venv"
    # without pip: its bundled setuptools would be older than ours, which the path below lends
    command = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
    subprocess.run(command, check=True)
    python = environment / "bin" / "python"
    site = next(p for p in sys.path if p.endswith("site-packages"))
    (target,) = environment.glob("lib/python*/site-packages")
    (target / "lent.pth").write_text(site + "\n")
    config = [] if mode == "lenient" else ["--config-settings", f"editable_mode={mode}"]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-e", str(checkout), *config, *NO_NETWORK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    code = "import ast_fast.cpp, ast_fast.kernels._tuned; assert ast_fast.cpp.available(); print('fine')"
    for cwd in (tmp_path, checkout):
        done = subprocess.run(
            [str(python), "-c", code], cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "fine", (str(cwd), done.stderr[-2000:])
