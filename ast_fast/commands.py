"""What the commands of `ast-fast` do, once their arguments are read."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from . import __version__, backend, hub
from .config import DataConfig, ModelConfig, ModelFacts, MonitorConfig
from .data import ClipSet, Collate, class_counts, dataset_of, read_data, reading_notes
from .data.dataset import read_for
from .frontend import log_mel_features
from .inference import class_names, load_for_inference, load_model
from .labels import read_labels
from .models.ast import ASTModel
from .names import safe_cell
from .optimized import Precision
from .run_data import trained_on
from .training import TrainingInterrupted
from .training import evaluate as run_evaluation
from .training.logs import Progress, check_writable, say, say_figures
from .training.tasks import task_of


def demo(run: Path, seed: int, epochs: int | None, resume: bool, compare_training: bool) -> int:
    """See `cli.demo`."""
    from .demo import TRAIN, run_demo

    config = TRAIN if epochs is None else TRAIN.replace(epochs=epochs)
    try:
        run_demo(
            run,
            seed=seed,
            config=config,
            resume=resume,
            compare_training=compare_training,
            say=say,
        )
    except TrainingInterrupted as interrupt:
        options = "".join(
            f" --{name} {value}"
            for name, value, usual in (
                ("run", run, Path("runs/demo")),
                ("seed", seed, 0),
                ("epochs", epochs, None),
            )
            if value != usual
        )
        raise KeyboardInterrupt(
            f"{interrupt}; go on with: ast-fast demo{options} --resume"
        ) from None
    return 0


_PER_CLASS = {"multi_label": "average_precision", "single_label": "accuracy", "regression": "r2"}


def evaluate(
    data: Path,
    model: str,
    root: Path | None,
    labels: Path | None,
    multi_label: bool,
    batch_size: int,
    check: bool,
    json_path: Path | None,
    per_class: Path | None,
    precision: Precision,
    how: DataConfig,
    facts: ModelFacts,
) -> int:
    """See `cli.evaluate`."""
    check_writable("--json", json_path)
    check_writable("--per-class", per_class)
    network = load_for_inference(model, precision, facts=facts)
    table = read_labels(labels, network.config.label_dim) if labels else None
    names = class_names(network, table.names if table else None)
    if table is None and network.labels is None:
        raise ValueError(f"model {model!r} has no class names: give --labels")
    how = how.one_part()
    clips = read_data(data, root, names, table, how)
    for note in (*reading_notes(clips), *trained_on(model, clips)):
        say(f"  {note}")
    dataset = dataset_of(clips, read_for(network.frontend_config))
    row = _check(network, dataset) if check else None
    result = run_evaluation(
        network,
        dataset,
        batch_size=batch_size,
        task=task_of(network, multi_label),
        progress=True,
    )
    say_figures(result.figures)
    say(f"files: {result.report.summary()}")
    for note in result.report.notes:
        say(f"  {note}")
    if json_path is not None:
        content = {**result.to_dict(), "check": row, "model": model, "data": str(data)}
        json_path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    if per_class is not None:
        with per_class.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            kind = _PER_CLASS[task_of(network, multi_label)]
            writer.writerow(("class", kind, "clips"))
            counts = class_counts(dataset.labels, len(names))
            for name, value, count in zip(names, result.per_class, counts, strict=True):
                writer.writerow((safe_cell(name), f"{value:.6f}", count))
    return 0


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check(model: ASTModel, dataset: ClipSet) -> dict[str, Any] | None:
    """The monitor on the first clips that can be read; raises if the fast path is over budget."""
    from .equivalence import EquivalenceMonitor

    settings = MonitorConfig()
    items = [dataset[index] for index in range(min(len(dataset), 2 * settings.max_clips))]
    batch = Collate(len(dataset.classes), multi_label=True)(items).to(_device())
    if not len(batch):
        return None
    features = log_mel_features(batch.wave, model.frontend_config, batch.lengths)
    row = EquivalenceMonitor(model, settings).step(features, gradients=False)
    say(
        f"checked against the float64 reference on {row.clips} clips: logits differ by "
        f"{row.logits[1]:.1e} (budget {row.logits_budget[1]:.1e})"
    )
    return row.to_dict()


def verify(
    device: str | None, dtypes: Sequence[str], backend_name: str, full: bool, json_path: Path | None
) -> int:
    """See `cli.verify`."""
    from .equivalence import run_verify

    check_writable("--json", json_path)
    if device is not None:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r}: expected cpu, cuda or cuda:1") from error

    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch sees no GPU here; leave --device out")
    bar: Progress | None = None

    def progress(done: int, total: int, what: str) -> None:
        nonlocal bar
        bar = bar or Progress(total, title="verify")
        while bar.done < done:
            bar.step(next=what)

    report = run_verify(
        device=device,
        dtypes=list(dtypes) or None,
        full=full,
        progress=progress,
        backend=backend_name,
    )
    if bar is not None:
        bar.close()
    print(report.table(), flush=True)
    if json_path is not None:
        report.to_json(json_path)
    return 0 if report.ok else 1


def convert(
    source: str,
    out: Path,
    to: Literal["ast_fast", "transformers"],
    labels: Path | None,
    facts: ModelFacts,
) -> int:
    """See `cli.convert`."""
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} holds something already: choose another folder")
    model = load_model(source, facts)
    if labels is not None:
        names = read_labels(labels, model.config.label_dim).names
        model.config = model.config.replace(labels=names)
    config: ModelConfig = model.config
    if to == "ast_fast":
        model.save_pretrained(out)
    else:
        hub.write_transformers(
            out, model.state_dict(), config.to_dict(), model.frontend_config.to_dict()
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{out}: {parameters / 1e6:.1f} M parameters, {config.label_dim} classes, input "
        f"{config.input_tdim} frames of {config.input_fdim} mel bins, patches every "
        f"{config.fstride} x {config.tstride}, {config.num_heads} heads, log-mel of mean "
        f"{model.frontend_config.mean:g} and std {model.frontend_config.std:g}, written for {to}"
    )
    return 0


def doctor() -> int:
    """See `cli.doctor`."""
    from . import cpp

    say(f"ast_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    say("\npackages")
    for name, needed in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        say(f"  {name:<20}{version:<12}{needed}")
    say("\ndevices")
    say(
        f"  CPU: {os.cpu_count()} processors, {torch.get_num_threads()} threads in use, C++ kernels: "
        f"{cpp.isa() if cpp.available() else 'absent: ' + str(cpp.why_unavailable())}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            place = torch.cuda.get_device_properties(index)
            say(
                f"  GPU {index}: {place.name}, {place.total_memory / 2**30:.0f} GiB, compute "
                f"capability {place.major}.{place.minor}"
            )
    else:
        built = torch.version.cuda
        why = (
            f"none visible to PyTorch (built for CUDA {built})" if built else "PyTorch is CPU-only"
        )
        say(f"  GPU: {why}")
    say("\nops (float32)")
    for line in backend.explain().splitlines():
        say(f"  {line}")
    return 0


_PACKAGES = (
    ("torch", "needed"),
    ("numpy", "needed"),
    ("safetensors", "needed"),
    ("triton", "GPU kernels"),
    ("soundfile", "reading audio"),
    ("soxr", "resampling"),
    ("torchcodec", "m4a and video (optional)"),
    ("lightning-fabric", "training"),
    ("matplotlib", "reports"),
    ("tqdm", "progress bars"),
    ("tyro", "this command"),
    ("timm", "weights from image models"),
    ("transformers", "reading and speeding up its AST"),
    ("onnxruntime", "checking exports (with onnx and onnxscript)"),
    ("torchaudio", "comparison only"),
)
