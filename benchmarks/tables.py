"""README tables, made from committed result files alone.

    python -m benchmarks.tables --write README.md    put the tables between their markers
    python -m benchmarks.tables --check README.md    exit status 1 if they are out of step

A table stands between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end NAME -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import record
from .environment import HELD_TO
from .table import duration

Content = dict[str, Any]

_MEASURED = ("frontend", "path", "attention", "patch_embed", "block", "inference", "training")
_FRONT_ENDS = ("torchaudio", "kaldi-native-fbank", "transformers")
_MODELS = (
    *("transformers", "transformers-compile", "transformers-compile-frozen", "timm"),
    *("torch-int8", "unpacked"),
    *("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "openvino-int8"),
)
# of each suite, the peers in a summary
_PEERS = {
    "frontend": (*_FRONT_ENDS, "one thread"),
    "path": ("soundfile", "soundfile+torchaudio", "torchaudio"),
    "attention": ("sdpa", "sdpa-padded", "varlen"),
    "block": ("torch",),
    "patch_embed": ("torch",),
    "inference": _MODELS,
    "training": _MODELS,
}
# suites whose cases are different things: a line each in a summary
_DIVERSE = ("frontend", "path", "attention", "block")
# name of a table -> device type, suites, and the peers worth a line in a README
TABLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "cpu-frontend": ("cpu", ("frontend",), (*_FRONT_ENDS, "one thread")),
    "cpu-frontend-avx2": ("cpu", ("frontend",), _FRONT_ENDS),
    "cpu-frontend-baseline": ("cpu", ("frontend",), _FRONT_ENDS),
    "cpu-path": (
        "cpu",
        ("path",),
        ("soundfile", "soundfile+torchaudio", "torchaudio", "without_partners"),
    ),
    "cpu-models": ("cpu", ("inference", "training"), _MODELS),
    "cpu-headline": (
        "cpu",
        ("headline",),
        (*_MODELS, "transformers-amp", "torch", "all-tokens"),
    ),
    "cpu-tokens": ("cpu", ("tokens",), ("all-tokens",)),
    "gpu-tokens": ("cuda", ("tokens",), ("all-tokens",)),
    "cpu-components": ("cpu", ("components",), ()),
    "cpu-runs": ("cpu", ("runs",), ()),
    "cpu-accelerated": ("cpu", ("accelerated",), ("transformers", "native")),
    "gpu-accelerated": ("cuda", ("accelerated",), ("transformers", "native")),
    "gpu-components": ("cuda", ("components",), ()),
    "cpu-attention": (
        "cpu",
        ("attention",),
        ("sdpa", "sdpa-padded", "loop", "unmasked", "sdpa-mask", "flex"),
    ),
    "cpu-block": ("cpu", ("block", "patch_embed"), ("torch", "torch-compile")),
    "cpu-decisions": ("cpu", ("decisions",), ("torch", "rows", "residual by oneDNN", "bytes")),
    "cpu-summary": ("cpu", _MEASURED, ()),
    "gpu-checks": ("cuda", ("smoke", "checks", "tuned", "proofs"), ()),
    "gpu-decisions": ("cuda", ("decisions",), ("torch",)),
    "gpu-attention": (
        "cuda",
        ("attention",),
        ("sdpa", "sdpa-flash", "sdpa-padded", "varlen", "unmasked", "flex"),
    ),
    "gpu-headline": (
        "cuda",
        ("headline",),
        (*_MODELS, "transformers-amp", "torch", "all-tokens", "graph", "fp8", "original"),
    ),
    "gpu-models": ("cuda", ("inference", "training"), ("transformers", "torch", "torch-compile")),
    "gpu-frontend": ("cuda", ("frontend",), ("torch", "torchaudio")),
    "gpu-block": ("cuda", ("block", "patch_embed"), ("torch", "torch-compile")),
    "gpu-summary": ("cuda", _MEASURED, ()),
}
# tables of our kernels held to an instruction set below what the CPU has
_HELD = {"cpu-frontend-avx2": "avx2", "cpu-frontend-baseline": "baseline"}
OWED = "Not measured yet: needs a GPU (`python -m benchmarks.gpu`)."
_NOT_HERE = "Not measured yet (`python -m benchmarks.run`)."


def load(folder: Path = record.RESULTS) -> list[Content]:
    """All result files, oldest first.

    Raises:
        ValueError: a file breaks the schema.
    """
    contents = [record.read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(contents, key=lambda content: content["environment"]["date"])


def newest(
    contents: Sequence[Content], device: str, suites: Sequence[str], held_to: str = ""
) -> list[Content]:
    """The newest file of each suite on a device type, all of one device: the one measured last."""
    wanted = [
        content
        for content in contents
        if content["environment"]["device"] == device
        and content["suite"] in suites
        and content["environment"]["device_name"].partition(HELD_TO)[2] == held_to
    ]
    if not wanted:
        return []
    name = wanted[-1]["environment"]["device_name"]
    latest = {c["suite"]: c for c in wanted if c["environment"]["device_name"] == name}
    return [latest[suite] for suite in suites if suite in latest]


def table(name: str, contents: Sequence[Content]) -> str:
    """One table as markdown, or the sentence that says what is owed."""
    device, suites, peers = TABLES[name]
    files = newest(contents, device, suites, _HELD.get(name, ""))
    if not files:
        return OWED if device == "cuda" else _NOT_HERE
    if name.endswith("summary"):
        return _summary(files)
    if name.endswith("components"):
        return _components(files[0])
    if name.endswith("runs"):
        return _promises(files[0])
    return "\n\n".join(_counts(file) if not peers else _ratios(file, peers) for file in files)


def _head(file: Content) -> str:
    facts = file["environment"]
    threads = f", {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    driver = f", driver {facts['driver']}" if facts.get("driver") else ""
    where = facts["device_name"] + (threads if facts["device"] == "cpu" else driver)
    return (
        f"{file['suite'].capitalize()} on {where}; torch {facts['torch']}, commit "
        f"{facts['commit'][:10]}, {facts['date'][:10]}."
    )


def _counts(file: Content) -> str:
    states = [row["status"] for row in file["rows"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in record.STATUSES if s in states)
    bad = [row for row in file["rows"] if row["status"] in ("wrong", "failed")]
    lines = [f"- {row['case']} {row['dtype']}: {row['status']}, {row['reason']}" for row in bad]
    return "\n".join([f"{_head(file)} {counts}.", *lines])


def _ratios(file: Content, peers: Sequence[str]) -> str:
    lines = [
        _head(file),
        "",
        "| what | shape | dtype | ours | peer | its time | ours is faster by (p20 - p80) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in file["rows"]:
        if row["provider"].startswith("ast_fast"):
            ours = row
        elif row["provider"] in peers and row["status"] in ("ok", "wrong"):
            lines.append(_line(ours, row))
    return "\n".join(lines)


def _components(file: Content) -> str:
    """Where the time of each whole pass goes, largest part first, beside what the machine's ceilings predict."""
    lines = [
        _head(file),
        "",
        "| what | shape | dtype | part | time | of the whole | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    passes: dict[tuple[str, ...], list[Content]] = {}
    for row in file["rows"]:
        if row["ms"] is not None:
            shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
            passes.setdefault((row["case"], shape, row["dtype"]), []).append(row)
    for (case, shape, dtype), rows in passes.items():
        whole = next(row["ms"]["p50"] for row in rows if row["provider"] == "whole")
        for row in sorted(rows, key=lambda row: -row["ms"]["p50"]):
            part, spent = row["provider"], row["ms"]["p50"]
            predicted = duration(spent * row["share"]) if row["share"] else ""
            lines.append(
                f"| {case} | {shape} | {dtype} | {part} | {duration(spent)} | {spent / whole:.0%} "
                f"| {predicted} |"
            )
    return "\n".join(lines)


def _promises(file: Content) -> str:
    """What runs of training promise, what was found, and the time or speed that goes with it."""
    lines = [
        _head(file),
        "",
        "| what | run | dtype | figure | found | allowed | p50 (p20 - p80) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in file["rows"]:
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        spread = ""
        if row["ratio"]:
            low, middle, high = (row["ratio"][name] for name in ("p20", "p50", "p80"))
            spread = f"{middle:.2f}x the speed of one process ({low:.2f} - {high:.2f})"
        elif row["ms"]:
            low, middle, high = (duration(row["ms"][name]) for name in ("p20", "p50", "p80"))
            spread = f"{middle} ({low} - {high})"
        elif row["clips_per_second"]:
            spread = f"{row['clips_per_second']:.3g} clips/s"
        lines.append(
            f"| {row['case']} | {shape} | {row['dtype']} | {row['worst']} | {row['error']:.3g} | "
            f"{row['budget']:.3g} | {spread} |"
        )
    return "\n".join(lines)


def _summary(files: Sequence[Content]) -> str:
    """One line a suite (or op), direction and peer: the range of the medians in each dtype."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for file in files:
        for row in file["rows"]:
            wanted = row["provider"] in _PEERS[row["suite"]]
            if not wanted or row["ratio"] is None or row["clock"] == "graph":
                continue
            name = row["case"] if row["suite"] in _DIVERSE else row["suite"]
            what = name + {"forward": "", "step": ""}.get(row["mode"], f" {row['mode']}")
            by_dtype = ratios.setdefault((what, row["provider"]), {})
            by_dtype.setdefault(row["dtype"], []).append(row["ratio"]["p50"])
    dtypes = list(dict.fromkeys(dtype for found in ratios.values() for dtype in found))
    lines = [
        _heads(files),
        "",
        f"| ours is faster | than | {' | '.join(dtypes)} |",
        "|---" * (2 + len(dtypes)) + "|",
    ]
    for (what, peer), found in ratios.items():
        spans = " | ".join(_span(found.get(dtype, [])) for dtype in dtypes)
        lines.append(f"| {what} | {peer} | {spans} |")
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    """Smallest and largest of several medians, and of how many cases."""
    if len(values) < 2:
        return f"{values[0]:.2f}x" if values else ""
    return f"{min(values):.2f}x to {max(values):.2f}x ({len(values)})"


def _heads(files: Sequence[Content]) -> str:
    """Where all of it was measured; the files' own heads say the commits."""
    facts = files[-1]["environment"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}, "
    dates = sorted({file["environment"]["date"][:10] for file in files})
    return (
        f"On {facts['device_name']}; {threads if facts['device'] == 'cpu' else ''}"
        f"torch {facts['torch']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def _line(ours: Content, peer: Content) -> str:
    what = ours["case"] + {"forward": "", "step": ""}.get(ours["mode"], f" {ours['mode']}")
    what += " (graph)" if ours["clock"] == "graph" else ""
    shape = " ".join(f"{key}={value}" for key, value in ours["shape"].items())
    if ours["status"] != "ok" or peer["status"] != "ok" or peer["ratio"] is None:
        bad = ours if ours["status"] != "ok" else peer
        return (
            f"| {what} | {shape} | {ours['dtype']} | - | {peer['provider']} | - | {bad['status']} |"
        )
    ratio = peer["ratio"]
    return (
        f"| {what} | {shape} | {ours['dtype']} | {duration(ours['ms']['p50'])} | "
        f"{peer['provider']} | {duration(peer['ms']['p50'])} | "
        f"{ratio['p50']:.2f}x ({ratio['p20']:.2f} - {ratio['p80']:.2f}) |"
    )


_BLOCK = re.compile(
    r"(<!-- benchmarks:begin (?P<name>[\w-]+) -->\n).*?(<!-- benchmarks:end (?P=name) -->)",
    re.DOTALL,
)


def rewrite(text: str, contents: Sequence[Content]) -> str:
    """`text` with every table between markers made anew.

    Raises:
        ValueError: a marker names an unknown table, or has no partner.
    """
    begun = re.findall(r"<!-- benchmarks:begin ([\w-]+) -->", text)
    ended = re.findall(r"<!-- benchmarks:end ([\w-]+) -->", text)
    unknown = sorted(set(begun) - set(TABLES))
    if unknown or begun != ended:
        raise ValueError(
            f"markers begin {', '.join(begun) or 'nothing'} and end {', '.join(ended) or 'nothing'}: "
            f"expected pairs of {', '.join(TABLES)}"
        )
    return _BLOCK.sub(lambda match: f"{match[1]}{table(match['name'], contents)}\n{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; exit status 1 if out of step."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", type=Path, metavar="FILE")
    group.add_argument("--check", type=Path, metavar="FILE")
    group.add_argument("--print", choices=tuple(TABLES), help="one table on standard output")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    contents = load(options.results)
    if options.print:
        print(table(options.print, contents))
        return 0
    path = options.write or options.check
    text = path.read_text(encoding="utf-8")
    made = rewrite(text, contents)
    if options.write:
        path.write_text(made, encoding="utf-8")
        return 0
    if made == text:
        print(f"{path.name}: tables agree with {options.results.name}/")
        return 0
    print(f"{path.name}: tables are out of step: python -m benchmarks.tables --write {path.name}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
