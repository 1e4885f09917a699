"""Rows as text on a terminal: who, how long, how many times slower than ours, how far off."""

from __future__ import annotations

from collections.abc import Sequence

from .record import Row

HEAD = ("provider", "p50", "p20-p80", "ours is faster by", "error", "rate", "of top", "peak")


def text(rows: Sequence[Row]) -> str:
    """The rows of one case, aligned."""
    lines = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    shown = []
    for line, row in zip(lines, [None, *rows], strict=True):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        note = f"  {row.status}: {row.reason}" if row is not None and row.status != "ok" else ""
        shown.append("  " + "  ".join(cells).rstrip() + note)
    return "\n".join(shown)


def summary(rows: Sequence[Row]) -> str:
    """One line a case and peer: what, our time, and how many times faster ours is."""
    lines = []
    ours: Row | None = None
    for row in rows:
        shape = " ".join(f"{key}={value}" for key, value in row.shape.items())
        what = f"{row.case} {shape} {row.dtype}" + (" (graph)" if row.clock == "graph" else "")
        if row.provider.startswith("ast_fast"):
            ours = row
        elif ours is not None and ours.ms is not None and row.ratio is not None:
            ratio = f"{row.ratio['p50']:.2f}x ({row.ratio['p20']:.2f}-{row.ratio['p80']:.2f})"
            lines.append((what, duration(ours.ms["p50"]), row.provider, ratio))
    head = ("what", "ours", "than", "ours is faster by")
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    )


def duration(ms: float) -> str:
    """Three digits and a unit."""
    if ms >= 1000:
        return f"{ms / 1000:.3g} s"
    return f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1000:.3g} us"


def _cells(row: Row) -> tuple[str, ...]:
    name = row.provider + (" (graph)" if row.clock == "graph" else "")
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.ms is None:
        return (name, "", "", "", error, "", "", "")
    rate = ""
    if row.ceiling == "copy" and row.gbps:
        rate = f"{row.gbps:.3g} GB/s"
    elif row.tflops:
        rate = f"{row.tflops:.3g} TFLOP/s"
    elif row.clips_per_second:
        rate = f"{row.clips_per_second:.3g} clips/s"
    ratio = ""
    if row.ratio is not None:
        ratio = f"{row.ratio['p50']:.2f}x ({row.ratio['p20']:.2f}-{row.ratio['p80']:.2f})"
    return (
        name,
        duration(row.ms["p50"]),
        f"{duration(row.ms['p20'])} - {duration(row.ms['p80'])}",
        ratio,
        error,
        rate,
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB",
    )
