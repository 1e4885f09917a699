"""The package without any installation, and what its packaging files promise."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# an editable install finds the checkout's modules from anywhere: here only the folder under test counts
NOT_EDITABLE = (
    "import sys; sys.meta_path[:] = "
    "[f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
)


def run_python(code, cwd, **environment):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", NOT_EDITABLE + code],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(folder):
    """A checkout without build products."""
    for name in ("ast_fast", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    readme = ROOT / "README.md"
    if readme.exists():
        shutil.copy(readme, folder)
    else:
        (folder / "README.md").write_text("ast_fast\n")
    return folder


def test_a_bare_checkout_runs_without_the_extension_and_says_so_once(tmp_path):
    copy_checkout(tmp_path)
    output = run_python(
        "import logging, torch; logging.basicConfig(format='%(message)s')\n"
        "import ast_fast, ast_fast.ops as ops\n"
        "import sys; sys.stderr = sys.stdout\n"
        "logging.getLogger().handlers[0].setStream(sys.stdout)\n"
        "x = torch.randn(4, 8)\n"
        "for _ in range(3):\n"
        "    y = ops.layer_norm(x, torch.ones(8), torch.zeros(8))\n"
        "assert torch.allclose(y, torch.nn.functional.layer_norm(x, (8,), eps=1e-6), atol=1e-5)\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('ast_fast.kernels._tuned') is not None\n"
        "assert 'reference' in ast_fast.backend.explain()\n",
        tmp_path,
    )
    assert output.count("plain PyTorch") == 1 and "extension" in output


def test_another_package_called_kernels_is_not_shadowed_in_a_checkout(tmp_path):
    (tmp_path / "checkout").mkdir()
    checkout = copy_checkout(tmp_path / "checkout")
    assert not (checkout / "kernels" / "__init__.py").exists()
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("def get_kernel():\n    return 'the hub package'\n")
    output = run_python(
        "import sys; sys.path.append(sys.argv[1] if len(sys.argv) > 1 else r'%s')\n"
        "import ast_fast, ast_fast.ops\nfrom kernels import get_kernel\nprint(get_kernel())\n"
        % (tmp_path / "site"),
        checkout,
    )
    assert "the hub package" in output


def test_the_package_version_is_the_one_in_the_metadata():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    import ast_fast

    assert metadata["project"]["version"] == ast_fast.__version__


def test_every_pinned_dependency_satisfies_its_lower_bound():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "ast-fast":
            continue
        assert requirement.name in pins, f"{requirement.name} has no line in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), text


def test_all_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    everything = extras.pop("all")[0]
    assert set(everything.removeprefix("ast-fast[").removesuffix("]").split(",")) == set(extras)
