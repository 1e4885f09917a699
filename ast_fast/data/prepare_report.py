"""The report of a prepared set: what is bad, odd or double in it, and the statistics of its energies.

Made in one pass over the lines of `clips.jsonl`, in the order of the set: the same numbers however often
the run was interrupted, and by however many workers it was made.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .._text import one_line
from ..audio import AudioReport
from .dataset import ClipSet
from .examine import SILENT_PEAK, Moments
from .reading import clip_name

_EXAMPLES = 20
_NORM_BATCH = 1000  # clips whose figures the original's script averages

# what is said of a clip that could not be read, by class of error
_PROBLEMS = {
    "AudioNotFoundError": "missing",
    "AudioEmptyError": "empty",
    "AudioTruncatedError": "truncated",
    "AudioNonFiniteError": "NaN or Inf",
    "AudioTooLargeError": "too large",
    "AudioFormatError": "wrong rate or channels",
    "AudioCrashError": "ended the decoder",
}
_CHANGES = {
    "resampled": "of another rate, resampled",
    "downmixed": "of several channels, mixed to mono",
    "padded": "shorter than one window, padded",
    "truncated": "truncated, kept",
    "restated": "of another length than they state, or joined, read by what they hold",
    "zeroed_clips": "with NaN or Inf, zeroed",
    "clipped": "clipped (over 1 % of samples at full scale)",
    "over_scale": "float files with a peak above 1",
}


def audio_report(lines: Iterable[dict[str, Any]]) -> AudioReport:
    """What reading the clips changed and skipped."""
    report = AudioReport()
    for line in lines:
        if "error" in line:
            report.skipped[line["error"]] = report.skipped.get(line["error"], 0) + 1
            report.note(line["reason"])
            continue
        notes = line.get("notes", [])
        report.merge(AudioReport(clips=1, notes=notes, **line.get("changes", {})))
    return report


class _Found:
    """Clips of a kind: how many, and the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "examples": self.examples}


class _Statistics:
    """Mean and standard deviation of the energies, exact and as the original's script has them."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self._all, self._batch = Moments(), Moments()
        self._in_batch = 0
        self._means: list[float] = []
        self._stds: list[float] = []

    def add(self, line: dict[str, Any], bins: int) -> None:
        exact = Moments(*line["mel"])
        self._all = self._all.merged(exact)
        cut = Moments(*line["cut"]) if "cut" in line else exact
        padding = Moments(max(self._frames * bins - cut.n, 0))
        self._batch = self._batch.merged(cut).merged(padding)
        self._in_batch += 1
        if self._in_batch == _NORM_BATCH:
            self._end_batch()

    def _end_batch(self) -> None:
        self._means.append(self._batch.mean)
        self._stds.append(self._batch.std(less=1))
        self._batch, self._in_batch = Moments(), 0

    def to_dict(self) -> dict[str, Any] | None:
        if not self._all.n:
            return None
        if self._in_batch:
            self._end_batch()
        return {
            "mean": self._all.mean,
            "std": self._all.std(),
            "values": self._all.n,
            "as_get_norm_stats": {
                "mean": float(np.mean(self._means)),
                "std": float(np.mean(self._stds)),
                "frames": self._frames,
                "batches": len(self._means),
            },
        }


def summarise(
    lines: Iterable[dict[str, Any]],
    dataset: ClipSet,
    *,
    frames: int,
    num_mel_bins: int,
    frontend: dict[str, Any] | None = None,
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The report as plain values.

    Args:
        lines: of `clips.jsonl`, in order.
        dataset: whose clips they are.
        frames: that statistics with padding are of.
        num_mel_bins: values a frame.
        frontend: settings that the energies were made with.
        missing: clips that the source lists and that are not there.
        notes: what reading the source had to say.
    """
    problems = {"missing": _Found()}
    for name in missing:
        problems["missing"].add(repr(name))
    found: dict[str, _Found] = {}
    firsts: dict[bytes, int] = {}  # hash to clip: all that is kept of millions
    double, crossing, disagreeing = _Found(), 0, 0
    seconds = array.array("d")
    counts = [0] * len(dataset.classes)
    splits: dict[str, int] = {}
    statistics = _Statistics(frames)
    values, parts = getattr(dataset, "values", None), getattr(dataset, "splits", None)
    total = dropped = 0
    for line in lines:
        total += 1
        name = line["name"]
        if "error" in line:
            kind = _PROBLEMS.get(line["error"], "undecodable")
            problems.setdefault(kind, _Found()).add(line["reason"])
            continue
        for change in line.get("changes", {}):
            if change in _CHANGES:
                found.setdefault(_CHANGES[change], _Found()).add(name)
        if line["peak"] < SILENT_PEAK:
            found.setdefault("silent (peak below -60 dB)", _Found()).add(name)
        if line.get("limited"):
            found.setdefault("beyond full scale, clipped where stored", _Found()).add(name)
        clip = line["clip"]
        first = firsts.setdefault(bytes.fromhex(line["hash"]), clip)
        if first != clip:
            double.add(f"{name} = {clip_name(dataset, first)}")
            crossing += parts is not None and parts[first] != parts[clip]
            told = dataset.labels if values is None else values
            disagreeing += not np.array_equal(told[first], told[clip])
        if "dropped" in line:
            dropped += 1
            continue
        seconds.append(line["samples"] / dataset.sample_rate_hz)
        for label in line.get("labels", ()):
            counts[label] += 1
        if line.get("split"):
            splits[line["split"]] = splits.get(line["split"], 0) + 1
        if "mel" in line:
            statistics.add(line, num_mel_bins)
    figures = statistics.to_dict()
    if figures is not None and frontend is not None:
        figures["frontend"] = frontend
    report: dict[str, Any] = {
        "listed": total + len(missing),
        "stored": len(seconds),
        "dropped": dropped,
        "sample_rate_hz": dataset.sample_rate_hz,
        "notes": list(notes),
        "problems": {kind: entry.to_dict() for kind, entry in problems.items() if entry.count},
        "findings": {kind: entry.to_dict() for kind, entry in found.items()},
        "duplicates": {
            **double.to_dict(),
            "in_several_parts": crossing,
            "with_other_labels": disagreeing,
        },
        "seconds": _lengths(seconds),
        "splits": splits,
        "statistics": figures,
    }
    if values is None:
        report["classes"] = dict(zip(dataset.classes, counts, strict=True))
    return report


def _lengths(seconds: array.array[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.frombuffer(seconds, np.float64)
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
    return {
        "total": float(values.sum()),
        "shortest": float(values.min()),
        "p05": low,
        "median": middle,
        "p95": high,
        "longest": float(values.max()),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['listed']} clips listed, {report['stored']} stored at "
        f"{report['sample_rate_hz']} Hz"
        + (f", {report['dropped']} dropped as asked" if report["dropped"] else "")
    ]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += ["", "not usable:" if report["problems"] else "not usable: none"]
    lines += _section(report["problems"])
    lines += ["", "worth a look:" if report["findings"] else "worth a look: none"]
    lines += _section(report["findings"])
    double = report["duplicates"]
    lines += ["", f"same samples as an earlier clip: {double['count']}"]
    if double["count"]:
        lines += [
            f"  {double['in_several_parts']} of them in another part of the set, "
            f"{double['with_other_labels']} with other labels"
        ]
        lines += [f"  {text}" for text in double["examples"]]
    if report["seconds"]:
        length = report["seconds"]
        lines += [
            "",
            f"length: {length['total'] / 3600:.2f} h; shortest {length['shortest']:.2f} s, 5 % below "
            f"{length['p05']:.2f}, median {length['median']:.2f}, 5 % above {length['p95']:.2f}, "
            f"longest {length['longest']:.2f}",
        ]
    if report["splits"]:
        parts = ", ".join(f"{name} {count}" for name, count in sorted(report["splits"].items()))
        lines += [f"parts: {parts}"]
    lines += _classes(report.get("classes"))
    lines += _figures(report["statistics"])
    return "\n".join(lines) + "\n"


def _section(entries: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for kind, entry in entries.items():
        lines.append(f"  {kind}: {entry['count']}")
        lines += [f"    {text}" for text in entry["examples"]]
        if entry["count"] > len(entry["examples"]):
            lines.append(f"    ... and {entry['count'] - len(entry['examples'])} more")
    return lines


def _classes(classes: dict[str, int] | None) -> list[str]:
    if not classes:
        return []
    lines = ["", f"clips of each of {len(classes)} classes:"]
    return lines + [f"  {count:>8}  {one_line(name)}" for name, count in classes.items()]


def _figures(statistics: dict[str, Any] | None) -> list[str]:
    if statistics is None:
        return []
    padded = statistics["as_get_norm_stats"]
    return [
        "",
        f"log-mel energies: mean {statistics['mean']:.7f}, std {statistics['std']:.7f}",
        "  of every value of every clip that is stored, padding left out, in float64",
        f"  as the original's get_norm_stats has them: mean {padded['mean']:.7f}, "
        f"std {padded['std']:.7f}",
        f"    (clips padded or cut to {padded['frames']} frames, figures of {_NORM_BATCH} clips at a "
        "time averaged;",
        "    without the random masks and mixup that its script leaves on)",
    ]
