"""The result of an equivalence run: rows with errors and budgets, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import torch

from .budgets import Budget
from .measures import Errors


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One tensor of one case.

    Attributes:
        what: op or model, and the output or gradient.
        shape: the case, as text.
        dtype: dtype of the fast path.
        backend: backend that ran.
        error: our largest scaled error (or one minus the cosine) and relative L2 error.
        torch_error: plain PyTorch's, in the same dtype on the same device.
        budget: what ours may be.
        ok: whether it is.
        note: anything a reader must know, such as a stand-in for an absent package.
    """

    what: str
    shape: str
    dtype: str
    backend: str
    error: tuple[float, float]
    torch_error: tuple[float, float]
    budget: tuple[float, float]
    ok: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite errors become the text "inf", which JSON lacks."""
        values = dataclasses.asdict(self)
        for name in ("error", "torch_error", "budget"):
            values[name] = [v if math.isfinite(v) else str(v) for v in values[name]]
        return values


def make_row(
    what: str,
    shape: str,
    dtype: str,
    backend: str,
    ours: Errors,
    plain: Errors,
    allowed: Budget,
    note: str = "",
) -> Row:
    """Row of a tensor measured by its worst entry and relative L2."""
    return Row(
        what=what,
        shape=shape,
        dtype=dtype,
        backend=backend,
        error=(ours.worst, ours.rel_l2),
        torch_error=(plain.worst, plain.rel_l2),
        budget=(allowed.worst, allowed.rel_l2),
        ok=allowed.admits(ours),
        note=note,
    )


@dataclasses.dataclass(slots=True)
class Report:
    """All rows of a run and where they were measured."""

    rows: list[Row]
    device: str
    seconds: float = 0.0
    commit: str | None = None
    date: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @property
    def ok(self) -> bool:
        """Whether there are rows and every one is within its budget."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        """Rows over their budget."""
        return [row for row in self.rows if not row.ok]

    def table(self) -> str:
        """Rows as fixed-width text, failures marked, and one line that sums up.

        Each pair is the worst entry (largest error over max(|entry|, rms); one minus the cosine for
        whole gradients; the largest error for log-mel) and the relative L2 error (the mean error for
        log-mel).
        """
        head = ("what", "shape", "dtype", "backend", "ours", "torch", "budget", "ok")
        cells = [head, *map(_cells, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        lines += [f"note: {note}" for note in dict.fromkeys(r.note for r in self.rows if r.note)]
        lines.append(self.summary())
        return "\n".join(line.rstrip() for line in lines)

    def summary(self) -> str:
        """One line: how many rows passed, where, in what time."""
        passed = sum(row.ok for row in self.rows)
        return (
            f"{passed} of {len(self.rows)} within budget on {self.device} in {self.seconds:.1f} s "
            f"(torch {torch.__version__})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "ok": self.ok,
            "date": self.date,
            "commit": self.commit,
            "device": self.device,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "threads": torch.get_num_threads(),
            "seconds": round(self.seconds, 1),
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text; also written to a file if a path is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text


def _cells(row: Row) -> tuple[str, ...]:
    pairs = (f"{a:.1e} {b:.1e}" for a, b in (row.error, row.torch_error, row.budget))
    return (row.what, row.shape, row.dtype, row.backend, *pairs, "ok" if row.ok else "FAILED")


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _triton_version() -> str | None:
    # from the package's metadata: importing Triton is not needed to name it
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def current_commit() -> str | None:
    """Commit of the checkout the package runs from; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
