"""What `ast-fast tag` and `ast-fast embed` do: a few clips on the terminal, or millions into a file."""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ._text import one_line
from .audio import AudioReport
from .config import AudioConfig, ModelFacts
from .inference import (
    Activation,
    Engine,
    Failure,
    Pooling,
    Wanted,
    class_names,
    load_for_inference,
    resolve_activation,
)
from .inference.job import Summary, run_job
from .inference.ranks import Ranks
from .inference.rows import TagRows, encode_embedding
from .inference.sources import Unit, units_of
from .inference.writers import embedding_writer, tag_writer
from .labels import read_labels
from .optimized import Precision
from .training.logs import say


def tag(
    paths: Sequence[Path],
    model: str,
    out: Path | None,
    top_k: int,
    everything: bool,
    windows: bool,
    frames: bool,
    hop_s: float | None,
    pooling: Pooling,
    labels: Path | None,
    activation: Activation,
    root: Path | None,
    keep_truncated: bool,
    batch_size: int,
    num_workers: int,
    as_json: bool,
    precision: Precision,
    resume: bool,
    retry_failed: bool,
    facts: ModelFacts,
) -> int:
    """See `cli.tag`."""
    ranks = _start(paths, out, resume or retry_failed)
    if top_k < 1:
        raise ValueError(f"--top-k {top_k}: expected at least 1")
    if frames and out is None and not as_json:
        raise ValueError("--frames gives many numbers: add --json, or --out FILE")
    network = load_for_inference(model, precision, ranks.device, facts)
    names = class_names(
        network, read_labels(labels, network.config.label_dim).names if labels else None
    )
    rows = TagRows(names, None if everything else top_k)
    engine = Engine(
        network,
        resolve_activation(activation, network),
        Wanted(scores=True, windows=windows, frames=frames),
        hop_s=hop_s,
        pooling=pooling,
        audio=_audio(keep_truncated),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    if out is None:
        return _print(engine, units_of(paths, root), rows, as_json)
    settings = {
        **{"command": "tag", "weights": _weights(network), "precision": precision},
        **{"top_k": rows.top_k, "windows": windows, "frames": frames, "hop": hop_s},
        **{"pooling": pooling, "activation": activation, "keep_truncated": keep_truncated},
        "labels": hashlib.sha256("\0".join(names).encode()).hexdigest()[:16],
    }
    make_writer = tag_writer(out, rows)
    again = (resume, retry_failed)
    return _run(out, paths, root, engine, rows.encode, make_writer, settings, again, ranks)


def embed(
    paths: Sequence[Path],
    model: str,
    out: Path,
    windows: bool,
    hop_s: float | None,
    root: Path | None,
    keep_truncated: bool,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    resume: bool,
    retry_failed: bool,
    facts: ModelFacts,
) -> int:
    """See `cli.embed`."""
    ranks = _start(paths, out, resume or retry_failed)
    network = load_for_inference(model, precision, ranks.device, facts)
    engine = Engine(
        network,
        "sigmoid",
        Wanted(embedding=True, windows=windows),
        hop_s=hop_s,
        audio=_audio(keep_truncated),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    settings = {
        **{"command": "embed", "weights": _weights(network), "precision": precision},
        **{"windows": windows, "hop": hop_s, "keep_truncated": keep_truncated},
    }
    make_writer = embedding_writer(out, network.config.embed_dim)
    again = (resume, retry_failed)
    return _run(out, paths, root, engine, encode_embedding, make_writer, settings, again, ranks)


def _start(paths: Sequence[Path], out: Path | None, resume: bool) -> Ranks:
    if not paths:
        raise ValueError("no files were named: expected audio files, folders, manifests or shards")
    ranks = Ranks.from_environment()
    if out is None and resume:
        raise ValueError(
            "--resume and --retry-failed go on with a file of results: give --out FILE"
        )
    if out is None and ranks.world_size > 1:
        raise ValueError(
            f"WORLD_SIZE={ranks.world_size}: several processes cannot share a terminal; give --out FILE"
        )
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    return ranks


def _audio(keep_truncated: bool) -> AudioConfig:
    return AudioConfig(truncated="keep" if keep_truncated else "error")


def _weights(model: torch.nn.Module) -> str:
    """What a model's weights and settings are known by, wherever it lies.

    The same weights under another grid or normalisation give other results: a job does not go on with them.
    """
    settings: Any = model
    known = (settings.config.replace(labels=None), settings.frontend_config)
    found = zlib.crc32(repr(known).encode())
    for name, tensor in model.state_dict().items():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(content.numpy().data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _run(
    out: Path,
    paths: Sequence[Path],
    root: Path | None,
    engine: Engine,
    encode: Callable[[Any], Any],
    make_writer: Callable[[Path], Any],
    settings: dict[str, Any],
    again: tuple[bool, bool],  # resume, retry what failed
    ranks: Ranks,
) -> int:
    summary = run_job(
        out,
        list(units_of(paths, root)),
        engine,
        encode,
        make_writer,
        settings,
        resume=again[0],
        retry_failed=again[1],
        ranks=ranks,
    )
    if ranks.rank:
        return 0  # else torchrun would end the others before the files are whole
    _say_summary(out, summary, ranks.world_size == 1)
    return 1 if summary.failed else 0


def _say_summary(out: Path, summary: Summary, alone: bool) -> None:
    done = summary.clips - summary.before
    pace = ""
    if done and summary.seconds:
        pace = f" in {summary.seconds:.1f} s: {done / summary.seconds:.1f} clips a second"
        if alone:
            pace += f", {summary.audio_s / summary.seconds:.0f} s of audio a second"
    say(f"{out}: {summary.clips - summary.failed} clips, {summary.before} done before{pace}")
    if summary.failed:
        say(
            f"{summary.failed} clips could not be read: {summary.errors} (when they are mended: the same "
            "command with --retry-failed)"
        )


def _print(engine: Engine, units: Iterator[Unit], rows: TagRows, as_json: bool) -> int:
    """One line of JSON, or a few lines of text, for each clip as it is done."""
    report, tagged = AudioReport(), 0
    for output in engine.run(units):
        if isinstance(output, Failure):
            report.skip(output.error)
            print(f"ast-fast: skipped {output.error}", file=sys.stderr, flush=True)
            if as_json:
                print(
                    json.dumps({"file": output.path, "error": output.error.reason}, allow_nan=False)
                )
            continue
        tagged += 1
        report.merge(output.report)
        row = rows.row(rows.encode(output))
        if as_json:
            print(json.dumps(row, allow_nan=False))
            continue
        print(
            one_line(output.source) + (f" ({row['windows']} windows)" if row["windows"] > 1 else "")
        )
        _print_labels(row["labels"])
        for part in row.get("parts", ()):
            print(f"  {part['start_s']:.2f} to {part['end_s']:.2f} s")
            _print_labels(part["labels"], "  ")
        for note in row["notes"]:
            print(f"  note: {note}")
    if not tagged and not report.num_skipped:
        raise ValueError("no audio files were found in the folders named")
    if report.changes():
        print(f"files: {report.summary()}", file=sys.stderr)
    return 1 if report.num_skipped else 0


def _print_labels(found: Sequence[dict[str, Any]], indent: str = "") -> None:
    for label in found:
        print(f"{indent}  {label['score']:8.4f}  {one_line(label['label'])}")
