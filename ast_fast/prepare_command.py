"""What `ast-fast prepare` does: any data set to shards, copies or a verified manifest, and a report."""

from __future__ import annotations

import errno
import functools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .config import AudioConfig, DataConfig, LogMelConfig
from .data import Manifest, dataset_of, read_data, reading_notes
from .data.file_store import FileStore, ManifestStore
from .data.prepare import Drop, Store, prepare_clips, read_lines, replace
from .data.prepare_report import as_text, audio_report, summarise
from .data.prepared_figures import REPORT, prepared_front
from .data.shard_writer import Encoding, ShardStore
from .frontend import log_mel_features
from .labels import read_labels
from .training.logs import Progress, say

Form = Literal["shards", "files", "manifest"]
REPORT_TEXT = "report.txt"


def prepare(
    data: Path,
    out: Path,
    root: Path | None,
    labels: Path | None,
    to: Form,
    encoding: Encoding,
    sample_rate_hz: int,
    shard_mb: int,
    workers: int,
    drop: Sequence[Drop],
    keep_truncated: bool,
    zero_non_finite: bool,
    frames: int,
    resume: bool,
    how: DataConfig,
) -> int:
    """See `cli.prepare`."""
    how = how.one_part()
    table = read_labels(labels) if labels else None
    clips = read_data(data, root, None, table, how, leave_out_missing=True)
    audio = AudioConfig(
        sample_rate_hz=sample_rate_hz,
        truncated="keep" if keep_truncated else "error",
        non_finite="zero" if zero_non_finite else "error",
    )
    dataset = dataset_of(clips, audio)
    store: Store
    if to == "shards":
        store = ShardStore(dataset, encoding, shard_mb * 10**6)
    else:
        store = FileStore(dataset) if to == "files" else ManifestStore(dataset)
    front = prepared_front(sample_rate_hz)
    bar = Progress(len(dataset), title=to)
    try:
        lines = prepare_clips(
            dataset,
            out,
            store,
            workers=workers,
            resume=resume,
            drop=drop,
            energies=functools.partial(_energies, front=front),
            frames=frames,
            on_clip=bar.step,
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{out}: cannot be written: {error.strerror}; what is done is kept: make room, and go on "
            "with --resume"
        ) from error
    finally:
        bar.close()
    report = summarise(
        read_lines(lines),
        dataset,
        frames=frames,
        num_mel_bins=front.num_mel_bins,
        frontend=front.to_dict(),
        missing=getattr(clips, "missing", ()),
        notes=getattr(clips, "notes", ()),
    )
    replace(out / REPORT, json.dumps(report, indent=1, allow_nan=False).encode())
    replace(out / REPORT_TEXT, as_text(report).encode("utf-8", "backslashreplace"))
    summary = audio_report(read_lines(lines))
    for note in reading_notes(clips):
        say(f"  {note}")
    say(f"files: {summary.summary()}")
    for note in summary.notes:
        say(f"  {note}")
    statistics = report["statistics"]
    if statistics is None:
        raise ValueError(
            f"no clip of {str(data)!r} could be stored: see {str(out / REPORT_TEXT)!r}"
        )
    double = report["duplicates"]["count"]
    hours = report["seconds"]["total"] / 3600
    say(
        f"{report['stored']} clips, {hours:.2f} h, {double} with the samples of an earlier one; "
        f"mean {statistics['mean']:.4f}, std {statistics['std']:.4f} of the log-mel energies "
        f"({front.num_mel_bins} bins)"
    )
    say(f"report: {out / REPORT_TEXT}")
    where = f"--data {shlex.quote(str(out))}"
    if to == "manifest" and isinstance(clips, Manifest):
        where += f" --root {shlex.quote(str(clips.root))}"
    say(f"{to}: {out}; train on it with: ast-fast train {where}")
    return 0


def _energies(wave: Tensor, front: LogMelConfig) -> Tensor:
    with torch.no_grad():
        return log_mel_features(wave, front)
