"""The house rules that a reader relies on: imports run one way, files stay small, nothing unsafe."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ast_fast"

# floors from the ground up; a module may import its own floor and those below
GROUND = (
    "kernels",
    "cpp",
    "finite",
    "reference",
    "backend",
    "positions",
    "config",
    "audio",
    "audio_memory",
    "audio_report",
    "audio_spans",
    "attention_mask",
    "_optional",
    "_files",
    "_text",
    "_containers",
    "_chunks",
    "_flac_frames",
    "_mpeg",
    "_ogg",
    "_pieces",
    "_streams",
    "names",
    "_C",
    "labels",
    "sample_rows",
    "seeding",
)
FLOORS = (
    GROUND,
    ("ops", "data", "activations"),
    (
        "layers",
        "layers_fp8",
        "patchout",
        "token_merging",
        "optimized",
        "cuda_graphs",
        "graphs",
        "augment",
        "frontend",
        "resample",
        "hub",
    ),
    ("models",),
    ("equivalence",),
    ("testing", "testing_calls", "sample_sets"),
    ("training", "recipes", "inference", "streaming", "integrations"),
    (
        *("report", "plots", "saliency", "throughput", "demo", "calibration"),
        *("run_folder", "run_plots", "run_numbers", "run_report", "run_compare"),
        "run_data",
        "run_settings",
    ),
    (
        *("cli", "cli_options", "commands", "train_command", "ensemble_command", "infer_command"),
        *("export_command", "listen_command", "prepare_command", "report_command"),
        "compare_command",
        "__main__",
    ),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
SOURCES = [*MODULES, *KERNELS, *sorted((ROOT / "benchmarks").rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, relative ones made absolute, type-only ones left out."""
    tree = ast.parse(path.read_text())
    package = ["ast_fast", *path.relative_to(PACKAGE).parts[:-1]] if PACKAGE in path.parents else []
    type_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            type_only.update(child for child in ast.walk(node))
    names = set()
    for node in ast.walk(tree):
        if node in type_only:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


def first_part(name: str) -> str | None:
    """`ops` for `ast_fast.ops.attention`; None for what is not ours or is the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ast_fast" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in FLOOR_OF, f"{own} stands on no floor: give it one here and in CONTRIBUTING.md"
    for name in imported_modules(path):
        other = first_part(name)
        if other in FLOOR_OF and other != own:
            assert FLOOR_OF[other] <= FLOOR_OF[own], f"{path.name} imports {name}, a floor above it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=lambda p: p.name)
def test_the_reference_imports_nothing_of_ours(path: Path) -> None:
    others = {first_part(name) for name in imported_modules(path)} - {None, "reference"}
    assert not others


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    allowed = set(__import__("sys").stdlib_module_names) | {"torch", "triton", ""}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names), path.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] in allowed, f"{path.name}: {node.module}"


def test_nothing_imports_a_global_package_called_kernels() -> None:
    pattern = re.compile(r"^\s*(import kernels|from kernels)\b", re.MULTILINE)
    files = [
        p
        for folder in ("ast_fast", "kernels", "benchmarks", "tests")
        for p in (ROOT / folder).rglob("*.py")
    ]
    assert not [str(p) for p in files if pattern.search(p.read_text())]
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_and_ascii(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 600, "one idea a file: split it"
    assert text.isascii(), "ASCII only in source"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_unsafe_call(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            pair = (node.arg, node.value.value)
            assert pair not in {
                ("shell", True),
                ("weights_only", False),
                ("trust_remote_code", True),
            }
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: a bare except hides errors"


def test_every_setting_default_lives_in_config() -> None:
    from ast_fast import config

    for name in ("LogMelConfig", "ModelConfig", "TrainConfig", "MonitorConfig", "AugmentConfig"):
        settings = getattr(config, name)()
        assert type(settings).from_dict(settings.to_dict()) == settings
        with pytest.raises(ValueError, match="has no setting"):
            type(settings).from_dict({"no_such_setting": 1})


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_json_is_written_without_nan(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            home = node.func.value
            if node.func.attr in ("dump", "dumps") and getattr(home, "id", "").startswith("json"):
                given = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert given.get("allow_nan") == "False", f"{path.name}, line {node.lineno}"


def test_profiles_alone_say_how_many_cases_are_drawn():
    # 25 in a quick run, 200 in `make test-slow`: see tests/conftest.py
    rooms = ("fuzz", "kernels", "ops", "cpp", "streaming")
    files = [path for room in rooms for path in (ROOT / "tests" / room).rglob("*.py")]
    assert not [path.name for path in files if "max_examples" in path.read_text()]
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    assert re.search(r'"quick", max_examples=25\b', conftest)
    assert re.search(r'"ci", max_examples=200\b', conftest)
    makefile = (ROOT / "Makefile").read_text()
    assert "test-slow: export AST_FAST_HYPOTHESIS := ci" in makefile
    slow = makefile[makefile.index("\ntest-slow: setup") :].split("\n\n")[0]
    assert slow.count("slow or hypothesis") == slow.count("$(PYTEST)") == 2
