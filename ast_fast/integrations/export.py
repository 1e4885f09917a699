"""A trained AST for serving: `torch.export`, ONNX and AOTInductor, checked before the file gets its name.

What is exported is plain PyTorch (`equivalence.plain`), so that a file needs nothing of ours to run; the batch
is dynamic, and the waveform's front end may be inside.
Dimensions: B clips, N samples, S frames, F mel bins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import backend, reference
from .._optional import require_package
from ..config import ACTIVATION_OF
from ..equivalence import plain
from ..equivalence.budgets import Budget, budget
from ..equivalence.measures import Errors, measure
from ..equivalence.whole import oracle_features
from ..finite import weights_not_finite
from ..frontend import log_mel_features
from ..models.ast import ASTModel
from ..reference.mel import mel_sizes

Format = Literal["torch", "onnx", "aoti"]
Input = Literal["features", "waveform"]
Arguments = tuple[Tensor, ...]
Run = Callable[[Arguments], Tensor]

SUFFIX: dict[str, str] = {"torch": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
CHECKED = (1, 2, 5)  # batch sizes; the graph is traced at another
_CLIPS = 2  # different ones in the checked batches: float64 is slow
_TRACED = 3
_OPSET = 20  # the first with a DFT that takes its axis as an input


class ExportError(RuntimeError):
    """A model could not be exported, or the exported one gave other numbers; says which."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedBatch:
    """The exported model on one batch size beside the float64 reference."""

    batch_size: int
    errors: Errors
    allowed: Budget

    @property
    def ok(self) -> bool:
        """Whether the errors are within the budget."""
        return self.allowed.admits(self.errors)


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how far it is from the float64 reference.

    Attributes:
        path: the file; `<path>.json` beside it says what goes in and comes out.
        format: torch, onnx or aoti.
        input: features or waveform.
        megabytes: size of the file.
        batches: what was checked; empty if nothing was.
    """

    path: Path
    format: Format
    input: Input
    megabytes: float
    batches: tuple[CheckedBatch, ...]

    def table(self) -> str:
        """The report as text."""
        head = f"{self.path}: {self.format} from {self.input}, {self.megabytes:.1f} MB"
        if not self.batches:
            return f"{head}, not checked"
        lines = [head, f"{'batch':>7}{'worst':>11}{'budget':>11}{'rel. L2':>11}{'budget':>11}"]
        for row in self.batches:
            numbers = (row.errors.worst, row.allowed.worst, row.errors.rel_l2, row.allowed.rel_l2)
            lines.append(f"{row.batch_size:>7}" + "".join(f"{n:>11.1e}" for n in numbers))
        return "\n".join(lines)


class Portable(nn.Module):
    """An AST in operators of PyTorch alone: features [B, S, F], or waveforms [B, N] and lengths [B], to logits.

    Args:
        model: shares its weights; the image heads that nothing reads are left out.
        input: what it takes.
    """

    def __init__(self, model: ASTModel, input: Input) -> None:
        super().__init__()
        config = model.config.replace(dead_heads=False)
        with torch.device("meta"):
            self.network = ASTModel.from_config(config, model.frontend_config)
        names = set(self.network.state_dict())
        kept = {name: value for name, value in model.state_dict().items() if name in names}
        self.network.load_state_dict(kept, assign=True)
        self.network.requires_grad_(False)
        self.input = input
        self.eval()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, label_dim]."""
        config = self.network.config
        if self.input == "waveform":
            with backend.use_backend("reference"):
                x = log_mel_features(x, self.network.frontend_config, lengths)
        return plain.ast_logits(
            dict(self.network.named_parameters()),
            x,
            num_heads=config.num_heads,
            strides=(config.fstride, config.tstride),
            eps=config.eps,
            head_eps=config.head_eps,
        )

    @property
    def samples(self) -> int:
        """N: what the frames of the model's input reach."""
        sizes = mel_sizes(**self.network.frontend_config.framing)
        frames = self.network.config.input_tdim
        if sizes.padding != "none":
            return (frames - 1) * sizes.hop_samples
        return sizes.window_samples + (frames - 1) * sizes.hop_samples

    def example(self, batch_size: int, seed: int = 0) -> Arguments:
        """Inputs of its kind, random but always the same, on its device."""
        device, config = self.network.v.pos_embed.device, self.network.config
        draw = torch.Generator().manual_seed(seed + batch_size)
        if self.input == "features":
            x = torch.randn(batch_size, config.input_tdim, config.input_fdim, generator=draw)
            return (x.to(device),)
        wave = torch.randn(batch_size, self.samples, generator=draw) * 0.1
        # clips of all lengths, the first one whole
        lengths = torch.randint(self.samples // 4, self.samples + 1, (batch_size,), generator=draw)
        lengths[0] = self.samples
        return wave.to(device), lengths.to(device)

    @property
    def names(self) -> tuple[str, ...]:
        """What the inputs are called in an ONNX file."""
        return ("features",) if self.input == "features" else ("waveform", "lengths")

    def dynamic_shapes(self) -> dict[str, Any]:
        """The batch, as `torch.export` wants it said."""
        batch = torch.export.Dim("batch", min=1)
        shapes: dict[str, Any] = {"x": {0: batch}}
        return shapes if self.input == "features" else {**shapes, "lengths": {0: batch}}

    def description(self) -> dict[str, Any]:
        """What a server must know, ready for JSON."""
        model = self.network
        config, front = model.config, model.frontend_config
        entry: dict[str, Any] = {
            "features": ["batch", config.input_tdim, config.input_fdim],
            "waveform": ["batch", self.samples],
            "lengths": ["batch"],
        }
        return {
            "inputs": {name: entry[name] for name in self.names},
            "outputs": {"logits": ["batch", config.label_dim]},
            "activation": None
            if config.problem_type is None
            else ACTIVATION_OF[config.problem_type],
            "labels": None if config.labels is None else list(config.labels),
            "frontend": front.to_dict(),
        }


def export_model(
    model: ASTModel,
    path: str | os.PathLike[str],
    format: Format = "torch",
    input: Input = "features",
    *,
    check: bool = True,
) -> ExportReport:
    """Write a model for serving; the file gets its name once it has been loaded again and given the same logits.

    Args:
        model: float32, on the device that it will be served on (for aoti; the others run anywhere).
        path: file to write: .pt2 for torch and aoti, .onnx for onnx.
        format: "torch" is a graph for `torch.export.load`, "onnx" for ONNX Runtime and the like, "aoti" compiled
            code for `torch._inductor.aoti_load_package`.
        input: "features" takes normalised log-mel [B, S, F]; "waveform" takes float32 samples [B, N] and how many
            are valid [B] (int64), and has the front end inside.
        check: run it on several batch sizes and compare with the float64 reference.

    Raises:
        ValueError: an argument does not fit.
        ExportError: the exporter failed, or the file gives other numbers.
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
    """
    target = Path(path)
    portable = _portable(model, target, format, input)
    if format == "onnx":
        for name in ("onnx", "onnxscript", *(("onnxruntime",) if check else ())):
            require_package(name, "exporting to ONNX", "export")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=target.parent) as folder:
        made = Path(folder) / f"model{SUFFIX[format]}"
        try:
            with _quiet():
                _WRITERS[format](portable, made)
        except Exception as error:
            raise ExportError(
                f"the model could not be exported ({format} from {input}): {type(error).__name__}: "
                f"{_first_line(error)}"
            ) from error
        report = ExportReport(
            target,
            format,
            input,
            made.stat().st_size / 1e6,
            _checked(portable, made, format, check),
        )
        failed = [str(row.batch_size) for row in report.batches if not row.ok]
        if failed:
            raise ExportError(
                f"the exported model is over its budget at batch size {', '.join(failed)} and was not "
                f"kept\n{report.table()}"
            )
        side = made.with_suffix(".json")
        side.write_text(
            json.dumps(portable.description(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        side.replace(description_path(target))
        made.replace(target)
    return report


def description_path(path: Path) -> Path:
    """The JSON beside an exported file."""
    return path.with_name(path.name + ".json")


def _portable(model: Any, target: Path, format: str, input: str) -> Portable:
    if not isinstance(model, ASTModel):
        raise ValueError(
            f"model is a {type(model).__name__}: expected an ast_fast.ASTModel "
            "(ASTModel.from_pretrained loads transformers' too)"
        )
    if format not in SUFFIX:
        raise ValueError(f"format={format!r}: expected {', '.join(SUFFIX)}")
    if input not in ("features", "waveform"):
        raise ValueError(f"input={input!r}: expected features or waveform")
    if target.suffix != SUFFIX[format]:
        raise ValueError(
            f"{str(target)!r} ends in {target.suffix!r}: expected {SUFFIX[format]} for {format}"
        )
    if target.is_dir():
        raise ValueError(f"{str(target)!r} is a folder: expected a file to write")
    dtype = model.v.pos_embed.dtype
    if dtype != torch.float32:
        raise ValueError(f"the model is {dtype}: expected float32; call model.float()")
    if model.precision != "exact":
        raise ValueError("the model computes in FP8: call model.set_precision('exact') first")
    if model.v.merging is not None:
        raise ValueError(
            "the model merges tokens, which an export does not: call model.set_token_merging(0) first"
        )
    found = weights_not_finite(model)
    if found is not None:
        raise ValueError(
            f"the model's weights are NaN or infinite: {found}; take a checkpoint from before they became so"
        )
    if format == "aoti" and shutil.which(os.environ.get("CXX", "c++")) is None:
        raise ValueError("format='aoti' compiles: expected a C++ compiler (c++, or CXX names one)")
    return Portable(model, input)  # type: ignore[arg-type]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # exporters print steps and warn of their own deprecations
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _program(portable: Portable) -> torch.export.ExportedProgram:
    with torch.no_grad():
        # the front end's tables are made once and kept: they must be real tensors, not the tracer's
        portable(*portable.example(1))
        return torch.export.export(
            portable, portable.example(_TRACED), dynamic_shapes=portable.dynamic_shapes()
        )


def _write_torch(portable: Portable, path: Path) -> None:
    extra = {"ast_fast.json": json.dumps(portable.description(), allow_nan=False)}
    torch.export.save(_program(portable), path, extra_files=extra)


def _write_onnx(portable: Portable, path: Path) -> None:
    made = torch.onnx.export(
        _program(portable),
        dynamo=True,
        verbose=False,
        opset_version=_OPSET,
        input_names=list(portable.names),
        output_names=["logits"],
    )
    assert made is not None
    made.model.metadata_props["ast_fast"] = json.dumps(portable.description(), allow_nan=False)
    made.save(path, external_data=False)


def _write_aoti(portable: Portable, path: Path) -> None:
    inductor: Any = torch._inductor
    inductor.aoti_compile_and_package(_program(portable), package_path=str(path))


_WRITERS: dict[str, Callable[[Portable, Path], None]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
    "aoti": _write_aoti,
}


def _loaded(portable: Portable, path: Path, format: Format) -> Run:
    if format == "onnx":
        runtime = require_package("onnxruntime", "checking an ONNX file", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(arguments: Arguments) -> Tensor:
            given = {n: a.cpu().numpy() for n, a in zip(portable.names, arguments, strict=True)}
            return torch.from_numpy(session.run(["logits"], given)[0])

        return run
    module: Any
    if format == "torch":
        module = torch.export.load(path).module()
    else:
        inductor: Any = torch._inductor
        module = inductor.aoti_load_package(str(path))
    return lambda arguments: module(*arguments)


def _checked(
    portable: Portable, path: Path, format: Format, check: bool
) -> tuple[CheckedBatch, ...]:
    if not check:
        return ()
    network = portable.network
    oracle = reference.ASTModel.from_model(network, torch.float64)
    rows = []
    try:
        with torch.no_grad(), _quiet():
            run = _loaded(portable, path, format)
            clips = portable.example(_CLIPS, seed=1)
            plain_logits, exact = portable(*clips), []
            for index in range(_CLIPS):
                clip, *length = (each[index : index + 1] for each in clips)
                valid = length[0] if length else None
                exact.append(oracle(oracle_features(network, clip, valid, torch.float64)))
            want = torch.cat(exact)
            for batch_size in CHECKED:
                turns = torch.arange(batch_size, device=want.device) % _CLIPS
                got = run(tuple(each[turns] for each in clips)).to(want.device)
                errors = measure(got, want[turns])
                allowed = budget("logits", "float32", measure(plain_logits[turns], want[turns]))
                rows.append(CheckedBatch(batch_size, errors, allowed))
    except Exception as error:  # every runtime has errors of its own
        raise ExportError(
            f"the exported model does not run ({format}): {type(error).__name__}: {_first_line(error)}"
        ) from error
    return tuple(rows)
