"""The command `ast-fast`: demo, train, eval, ensemble, average, report, compare, tag, embed, listen, prepare,
verify, bench, convert, export, doctor.

Only the arguments live here, so that `--help` answers without loading PyTorch; the work is in
`commands`. A mistake of the user is one line on standard error and exit status 2; `--debug` shows
where it was found.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from . import __version__
from ._optional import MissingPackageError
from ._text import printable

try:
    import tyro
    from tyro.conf import Positional, UseAppendAction
except ImportError as error:
    raise MissingPackageError(
        f"the command ast-fast needs tyro ({error}): pip install 'ast-fast[cli]'"
    ) from error
from .cli_options import AS_FOUND, NO_FACTS, NO_TAG_FACTS, Facts, How, TagFacts


def demo(
    run: Path = Path("runs/demo"),
    seed: int = 0,
    epochs: int | None = None,
    resume: bool = False,
    compare_training: bool = False,
) -> int:
    """Train a small AST on real speech, evaluate, tag, compare speed, and write a report.

    Args:
        run: folder for the results; an earlier demo there is replaced.
        seed: of the split, the weights and the order.
        epochs: fewer for a quick look (default: 15).
        resume: go on after an interruption.
        compare_training: train plain PyTorch alike too and report its accuracy.
    """
    from . import commands

    return commands.demo(run, seed, epochs, resume, compare_training)


def train(
    recipe: Positional[str | None] = None,
    data: Path | None = None,
    run: Path = Path("runs/train"),
    eval_data: Path | None = None,
    holdout: float = 0.1,
    root: Path | None = None,
    labels: Path | None = None,
    set_: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")] = (),
    resume: bool = False,
    seeds: tuple[int, ...] = (),
    folds: tuple[int, ...] = (),
    holdout_seed: int | None = None,
    keep: Literal["best", "last"] | None = None,
    how: How = AS_FOUND,
) -> int:
    """Train on a manifest, a folder per class, tar shards, or a data set as it is distributed.

    Args:
        recipe: audioset, audioset-balanced, esc50, speechcommands, music-emotion, or a TOML file with
            model, [frontend], [audio], [train], [train.augment]...; default: a small model from scratch,
            whose length, masks and epochs follow from the clips.
        data: what to train on: manifest (.csv, .jsonl, .json), AudioSet's list, folder, shards, Hugging
            Face dataset, or the folder of ESC-50, Speech Commands or DEAM. Parts of a set, where it
            has some, are trained and evaluated on as they say.
        run: folder for checkpoints, log and the trained model.
        eval_data: what to evaluate on after each epoch, of the same kinds.
        holdout: share of the clips to evaluate on, where neither eval_data nor the parts of the set say
            which; 0 for none.
        root: folder that the paths of manifests start from (default: the manifest's folder).
        labels: class_labels_indices.csv or a list of names, in the order of the classes.
        set_: one setting, as train.epochs=3; may be repeated, and wins over the recipe.
        resume: go on with the run in the run folder; data and settings are those it began with.
        seeds: train once with each, and give the mean and its confidence interval.
        folds: train once with each held out, and the same.
        holdout_seed: of the draw of what is held out, and of the clips that statistics are measured of;
            default: train.seed, and one draw for all of seeds.
        keep: the epoch whose model is saved: best on the clips held out (the default, but for recipes that say
            otherwise), or last.
        how: what the data are, where that does not follow from what lies there.
    """
    from . import train_command

    return train_command.train(
        *(data, run, eval_data, holdout, root, labels, recipe, tuple(set_), resume, how),
        *(seeds, folds, holdout_seed, keep),
    )


def evaluate(
    data: Path,
    model: str,
    root: Path | None = None,
    labels: Path | None = None,
    multi_label: bool = False,
    batch_size: int = 32,
    check: bool = True,
    json: Path | None = None,
    per_class: Path | None = None,
    precision: Literal["exact", "bf16", "int8"] = "exact",
    how: How = AS_FOUND,
    facts: Facts = NO_FACTS,
) -> int:
    """Evaluate a model on a data set of any kind that train takes.

    Args:
        data: manifest, folder, shards or another layout; all of its parts, or that of --split.
        model: pretrained directory, file or hub id.
        root: folder that the paths of a manifest start from.
        labels: class_labels_indices.csv or a list of names; default: the model's own.
        multi_label: clips have several labels: mean average precision rather than accuracy.
        batch_size: clips a batch.
        check: compare the first batch with the float64 reference.
        json: write all figures here.
        per_class: write one line a class here (CSV).
        precision: on a CPU, of the blocks' matrix products: exact keeps the model's.
        how: what the data are, where that does not follow from what lies there.
        facts: what a file of bare weights does not tell of its model.
    """
    from . import commands

    return commands.evaluate(
        *(data, model, root, labels, multi_label, batch_size, check, json, per_class, precision),
        how,
        facts,
    )


def ensemble(
    models: Positional[tuple[str, ...]],
    data: Path | None = None,
    root: Path | None = None,
    labels: Path | None = None,
    multi_label: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    json: Path | None = None,
    how: How = AS_FOUND,
) -> int:
    """Evaluate several models, and the mean of what they predict (the paper's Ensemble-S and -M).

    Args:
        models: run folders, pretrained directories, files or hub ids, of the same classes.
        data: a data set of any kind that train takes; all of its parts, or that of --split or --fold;
            default: what the models, runs, all held out.
        root: folder that the paths of a manifest start from.
        labels: class_labels_indices.csv or a list of names; default: the first model's own.
        multi_label: clips have several labels, also if the first model does not say so.
        batch_size: clips a batch.
        num_workers: processes that read files.
        json: write all figures here.
        how: what the data are, where that does not follow from what lies there.
    """
    from . import ensemble_command

    return ensemble_command.ensemble(
        models, data, root, labels, multi_label, batch_size, num_workers, json, how
    )


def average(models: Positional[tuple[str, ...]], out: Path) -> int:
    """Write the plain mean of the weights of several models of one architecture.

    Args:
        models: run folders, checkpoints' model folders, or pretrained directories.
        out: folder to write.
    """
    from . import ensemble_command

    return ensemble_command.average(models, out)


def report(
    run: Positional[Path],
    eval_data: Path | None = None,
    root: Path | None = None,
    checkpoint: Literal["final", "best"] = "final",
    out: Path | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> int:
    """Write a page on a training run: curves, classes, confusion, calibration, worst clips, settings.

    Args:
        run: folder of the run.
        eval_data: what to evaluate on: manifest, folder per class or shards (default: what the run did).
        root: folder that the paths of a manifest start from.
        checkpoint: the model after the last step, or that of the best evaluation.
        out: the page (default: report.html in the run's folder).
        batch_size: clips a batch.
        num_workers: processes that read files.
    """
    from . import report_command

    return report_command.report(run, eval_data, root, checkpoint, out, batch_size, num_workers)


def compare(
    runs: Positional[tuple[Path, ...]],
    out: Path = Path("compare.html"),
) -> int:
    """Put training runs side by side: a table here, and a page with their curves.

    Runs that differ in seed or fold alone count as one setting, with a confidence interval.

    Args:
        runs: folders of two runs or more.
        out: the page.
    """
    from . import compare_command

    return compare_command.compare(runs, out)


def tag(
    paths: Positional[tuple[Path, ...]],
    model: str,
    out: Path | None = None,
    top_k: int = 5,
    all_: Annotated[bool, tyro.conf.arg(name="all")] = False,
    windows: bool = False,
    frames: bool = False,
    hop: float | None = None,
    pooling: Literal["mean", "max"] = "mean",
    labels: Path | None = None,
    activation: Literal["auto", "softmax", "sigmoid"] = "auto",
    root: Path | None = None,
    keep_truncated: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    json: bool = False,
    precision: Literal["exact", "bf16", "int8"] = "exact",
    resume: bool = False,
    retry_failed: bool = False,
    facts: TagFacts = NO_TAG_FACTS,
) -> int:
    """Label clips of any length: files, folders, manifests, lists of paths (.txt), tar shards.

    Without --out the labels are printed; with it they go to a file, which appears when it is whole. A job
    that was stopped, or killed, goes on with the same command and --resume. Several processes share the
    work under torchrun. Bad files are reported and skipped; the exit status is then 1.

    Args:
        paths: files, folders, manifests (.csv, .jsonl, .json), lists (.txt) and shards (.tar).
        model: pretrained directory, file or hub id.
        out: write the results here: .jsonl, .csv or .parquet; files that fail go to OUT.errors.jsonl.
        top_k: labels a clip.
        all_: all labels rather than the top ones.
        windows: labels of each window of a clip, too.
        frames: scores over time, too, of the labels given.
        hop: seconds from one window to the next (default: they follow one another).
        pooling: how the scores of a clip's windows become the clip's.
        labels: class_labels_indices.csv or a list of names; default: the model's own.
        activation: sigmoid for several labels a clip, softmax for one; auto takes what the model was
            trained for, else sigmoid for 527 classes.
        root: folder that the paths of manifests and lists start from (default: theirs).
        keep_truncated: use what there is of truncated files.
        batch_size: windows run at a time.
        num_workers: processes that read files.
        json: print one JSON object a file instead of text.
        precision: on a CPU, of the blocks' matrix products: exact keeps the model's.
        resume: go on with an unfinished --out.
        retry_failed: the same, and read again the files that could not be read, also of a finished --out.
        facts: what a file of bare weights does not tell of its model.
    """
    from . import infer_command

    return infer_command.tag(
        *(paths, model, out, top_k, all_, windows, frames, hop, pooling, labels, activation, root),
        *(keep_truncated, batch_size, num_workers, json, precision, resume, retry_failed, facts),
    )


def embed(
    paths: Positional[tuple[Path, ...]],
    model: str,
    out: Path,
    windows: bool = False,
    hop: float | None = None,
    root: Path | None = None,
    keep_truncated: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    precision: Literal["exact", "bf16", "int8"] = "exact",
    resume: bool = False,
    retry_failed: bool = False,
    facts: Facts = NO_FACTS,
) -> int:
    """Write clips of any length as vectors: the mean of the prefix tokens after the final norm.

    Sources, resuming, torchrun and bad files are as for `ast-fast tag`.

    Args:
        paths: files, folders, manifests (.csv, .jsonl, .json), lists (.txt) and shards (.tar).
        model: pretrained directory, file or hub id.
        out: write the vectors here: .npy (with OUT.index.csv), .parquet, .jsonl or .csv.
        windows: a vector for each window rather than their mean for each clip.
        hop: seconds from one window to the next (default: they follow one another).
        root: folder that the paths of manifests and lists start from (default: theirs).
        keep_truncated: use what there is of truncated files.
        batch_size: windows run at a time.
        num_workers: processes that read files.
        precision: on a CPU, of the blocks' matrix products: exact keeps the model's.
        resume: go on with an unfinished --out.
        retry_failed: the same, and read again the files that could not be read, also of a finished --out.
        facts: what a file of bare weights does not tell of its model.
    """
    from . import infer_command

    return infer_command.embed(
        *(paths, model, out, windows, hop, root, keep_truncated, batch_size, num_workers),
        *(precision, resume, retry_failed, facts),
    )


def listen(
    model: str,
    rate: int = 16000,
    hop: float = 1.0,
    window: float | None = None,
    top_k: Annotated[int, tyro.conf.arg(aliases=("--top",))] = 5,
    labels: Path | None = None,
    activation: Literal["auto", "softmax", "sigmoid"] = "auto",
    smoothing: float = 0.0,
    json: bool = False,
    facts: Facts = NO_FACTS,
) -> int:
    """Print the most probable labels of a live stream, a line a hop.

    Reads raw 16-bit little-endian mono samples from standard input until it ends:
    arecord -t raw -f S16_LE -r 16000 | ast-fast listen --model DIR

    Args:
        model: pretrained directory, file or hub id.
        rate: sample rate of the stream in Hz; resampled if it is not the model's.
        hop: seconds from one line to the next.
        window: seconds of audio behind each line (default: all that the model takes).
        top_k: labels a line.
        labels: class_labels_indices.csv or a list of names; default: the model's own.
        activation: sigmoid for several labels at a time, softmax for one; auto takes what the model was
            trained for, else sigmoid for 527 classes.
        smoothing: weight of the scores before in each line, 0 to below 1.
        json: print one JSON object a line instead of text.
        facts: what a file of bare weights does not tell of its model.
    """
    from . import listen_command

    return listen_command.listen(
        model, rate, hop, window, top_k, labels, activation, smoothing, json, facts
    )


def prepare(
    data: Path,
    out: Path,
    root: Path | None = None,
    labels: Path | None = None,
    to: Literal["shards", "files", "manifest"] = "shards",
    encoding: Literal["s16", "flac"] = "s16",
    sample_rate_hz: int = 16000,
    shard_mb: int = 512,
    workers: int = 0,
    drop: tuple[Literal["silent", "duplicates"], ...] = (),
    keep_truncated: bool = False,
    zero_non_finite: bool = False,
    frames: int = 1024,
    resume: bool = False,
    how: How = AS_FOUND,
) -> int:
    """Check every clip of a data set, store what is good, and report the rest and the statistics.

    Shards of raw samples are read several times faster than FLAC. `report.txt` and `report.json` list
    what is missing, undecodable, truncated, NaN, silent, clipped, of another rate or there twice, the
    classes, the lengths, and mean and std of the log-mel energies.

    Args:
        data: a data set of any kind that train takes; all of its parts, or that of --split.
        out: folder for what is written.
        root: folder that the paths of a list start from.
        labels: class_labels_indices.csv or a list of names, in the order of the classes.
        to: tar shards; FLAC files with a manifest; or a manifest of the good files where they are.
        encoding: of shards: s16 for raw samples, flac for about half the size and more work to read.
        sample_rate_hz: rate of the stored samples: the model's.
        shard_mb: size of a shard in megabytes.
        workers: processes that read and check; 0 for this one alone. The result is the same.
        drop: leave out silent clips, or all but the first of those with the same samples.
        keep_truncated: use what there is of truncated files.
        zero_non_finite: set NaN and Inf in float files to 0 rather than leave the file out.
        frames: length that the statistics with padding are of: the model's input.
        resume: go on after an interruption.
        how: what the data are, where that does not follow from what lies there.
    """
    from . import prepare_command

    return prepare_command.prepare(
        *(data, out, root, labels, to, encoding, sample_rate_hz, shard_mb, workers, drop),
        *(keep_truncated, zero_non_finite, frames, resume, how),
    )


def verify(
    device: str | None = None,
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = (),
    backend: Literal["auto", "triton", "cpp", "reference"] = "auto",
    full: bool = False,
    json: Path | None = None,
) -> int:
    """Compare every op and the whole model with the float64 reference on this machine.

    The exit status is 1 if an error is over its budget.

    Args:
        device: cpu, cuda, cuda:1 (default: the GPU if there is one).
        dtypes: default: those the device is fast in.
        backend: which implementation to check.
        full: full-size shapes and depth.
        json: write the report here.
    """
    from . import commands

    return commands.verify(device, dtypes, backend, full, json)


def convert(
    source: Positional[str],
    out: Positional[Path],
    to: Literal["ast_fast", "transformers"] = "ast_fast",
    labels: Path | None = None,
    facts: Facts = NO_FACTS,
) -> int:
    """Convert weights of the original, timm, transformers or ours.

    Pickled files (.pth) are read as plain tensors only; code in them never runs.

    Args:
        source: file, directory or hub id.
        out: directory to write.
        to: form to write.
        labels: class_labels_indices.csv or a list of names to keep with the model.
        facts: what a file of bare weights does not tell of its model.
    """
    from . import commands

    return commands.convert(source, out, to, labels, facts)


def export(
    model: Positional[str],
    out: Positional[Path],
    format: Literal["torch", "onnx", "aoti"] = "torch",
    input: Literal["features", "waveform"] = "features",
    device: str | None = None,
    check: bool = True,
    facts: Facts = NO_FACTS,
) -> int:
    """Write a model as one file for serving, that needs nothing of ast_fast to run.

    The file is loaded again and compared with the float64 reference on several batch sizes before it gets
    its name. A .json beside it says what goes in and comes out.

    Args:
        model: pretrained directory, file or hub id.
        out: file to write; .pt2 or .onnx is added if it has no suffix.
        format: torch for torch.export.load, onnx for ONNX Runtime and the like, aoti for compiled code.
        input: features takes normalised log-mel; waveform takes samples and lengths, front end included.
        device: for aoti, what to compile for: cpu (default) or cuda.
        check: compare with the reference; --no-check writes at once.
        facts: what a file of bare weights does not tell of its model.
    """
    from . import export_command

    return export_command.export(model, out, format, input, device, check, facts)


def doctor() -> int:
    """Print what is installed, which devices there are, and which backend each op takes and why."""
    from . import commands

    return commands.doctor()


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "ensemble": ensemble,
    "average": average,
    "report": report,
    "compare": compare,
    "tag": tag,
    "embed": embed,
    "listen": listen,
    "prepare": prepare,
    "verify": verify,
    "convert": convert,
    "export": export,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    is_program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--"]:
        # torchrun takes --run for an option of its own unless a "--" stands before it, and passes that on
        arguments = arguments[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    # threads that wait for each other by spinning make a shared machine many times slower; this must
    # be set before PyTorch loads OpenMP
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s")
    try:
        if arguments == ["--version"]:
            print(f"ast_fast {__version__}")
            return 0
        if arguments[:1] == ["bench"]:
            # the benchmarks have a command line of their own
            return bench(arguments[1:])
        return int(
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {"bench": _bench_help},
                prog="ast-fast",
                description="Audio Spectrogram Transformers, fast, with the same numbers. "
                "Any command takes --debug; "
                "--version tells the version.",
                args=arguments,
                sort_subcommands=False,
            )
        )
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        if is_program:
            # on the way out: another Ctrl-C has nothing left to stop but Python's own end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"ast-fast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe went away: no complaint, and none when Python closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        # names from files may hold what a terminal would obey
        print(printable(f"ast-fast: error: {error}"), file=sys.stderr)
        return 2


def is_user_error(error: Exception) -> bool:
    """Whether a message says it all: bad input, missing files and packages, stopped runs."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    # these need PyTorch, which has been loaded if one of them was raised
    from .backend import BackendUnavailableError
    from .data import LoaderError
    from .equivalence import EquivalenceError
    from .integrations.export import ExportError
    from .throughput import DisagreementError
    from .training import TrainingError

    kinds = (EquivalenceError, DisagreementError, ExportError, TrainingError, LoaderError)
    return isinstance(error, (BackendUnavailableError, *kinds))


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmarks of a checkout with their own arguments; without any, whole passes of AST."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise ValueError(
            "the benchmarks are not part of an installed package: run this in a checkout of ast_fast"
        )
    sys.path.insert(0, str(checkout))
    from benchmarks import run  # type: ignore[import-untyped,unused-ignore]

    return int(run.main(list(arguments) or ["--suite", "headline"]))


def _bench_help() -> int:
    """Measure speed beside other implementations (see ast-fast bench --help)."""
    return bench([])


if __name__ == "__main__":
    sys.exit(main())
