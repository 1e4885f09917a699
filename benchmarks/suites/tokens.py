"""Fewer tokens: a training step with patchout and a forward with token merging, beside all tokens.

Both sides of a ratio are ours; on a CPU the forward of all tokens has packed weights, as it is meant to be run, and
the one that merges has not, because merging does not use them. What is checked, for each of them, is the result with fewer tokens and the
one with all, against float64 on the same tokens: the patches that the draw keeps, and the merges that our
forward chose. Operations are those of the fewer tokens, for every row of a case: what is compared is time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..case import Candidate, Case, Inputs, Run, Settings
from ..models import LABELS, SIZES, gradients, num_tokens, ours, weights
from ..peers import need
from .inference import depth_of, gate_depth, on, packed, spectrograms

PATCHOUT = (40, 4)  # PaSST's setting for AudioSet: time columns, frequency rows
MERGED = (8, 16, 32)  # tokens a block
MERGED_SHORT = (2, 4, 8)  # where there are few


def flops(size: str, counts: Sequence[tuple[int, int]], patches: int) -> float:
    """Operations of one clip's forward, two a multiply-add.

    Args:
        size: of the model.
        counts: tokens in the attention and in the MLP of each block.
        patches: projected.
    """
    width = SIZES[size][0]
    blocks = sum(4 * a * width**2 + 2 * a**2 * width + 8 * m * width**2 for a, m in counts)
    return 2.0 * (blocks + patches * width * 256 + width * LABELS)


def _patchout(frames: int) -> tuple[int, int]:
    """Columns and rows left out: PaSST's share of the columns where there are fewer."""
    columns = (frames - 16) // 10 + 1
    return (min(PATCHOUT[0], columns * PATCHOUT[0] // 99), PATCHOUT[1])


def _model(settings: Settings, size: str, frames: int, depth: int, dtype: str) -> Any:
    return on(ours(size, frames, depth, weights(size, frames, depth)), settings, dtype)


def _twin(settings: Settings, size: str, frames: int, dtype: str) -> Any:
    # the weights as this dtype rounds them: what is measured is arithmetic, not storage
    model = _model(settings, size, frames, gate_depth(settings), dtype)
    return need("ast_fast.reference").ASTModel.from_model(model)


def _plain(settings: Settings, model: Any, inputs: Inputs, dtype: str, **tokens: Any) -> Tensor:
    """Logits of plain PyTorch with the parameters of our model, on the same tokens."""
    plain, config = need("ast_fast.equivalence.plain"), model.config
    with _scope(settings, dtype):
        logits: Tensor = plain.ast_logits(
            dict(model.named_parameters()),
            inputs["x"],
            num_heads=config.num_heads,
            strides=(config.fstride, config.tstride),
            **tokens,
        )
    return logits


def _scope(settings: Settings, dtype: str) -> contextlib.AbstractContextManager[object]:
    amp = dtype == "bf16-amp"
    return torch.autocast(settings.device, torch.bfloat16) if amp else contextlib.nullcontext()


def _loss(logits: Tensor, inputs: Inputs) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), inputs["y"])


def _flat(model: nn.Module) -> Tensor:
    found = gradients(model)
    return torch.cat([found[name].flatten().double() for name in sorted(found)])


def _results(model: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), _flat(model)


def _step(settings: Settings, size: str, frames: int, clips: int, dtype: str) -> Case:
    dropped = _patchout(frames)

    def kept() -> Tensor:
        model = _model(settings, size, frames, 1, dtype)
        model.set_patchout(*dropped)
        patches: Tensor = model.patchout.kept()
        return patches

    def prepare(name: str, fewer: bool) -> Candidate:
        def timed(inputs: list[Inputs]) -> Run:
            model = _model(settings, size, frames, depth_of(settings), dtype).train()
            if fewer:
                model.set_patchout(*dropped)
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

            def run(index: int) -> tuple[Tensor]:
                given = inputs[index % len(inputs)]
                optimiser.zero_grad(set_to_none=True)
                with _scope(settings, dtype):
                    logits = model(given["x"])
                loss = _loss(logits, given)
                loss.backward()
                optimiser.step()
                return (loss.detach(),)

            return run

        def gate(inputs: Inputs) -> Run:
            model = _model(settings, size, frames, gate_depth(settings), dtype).train()

            def logits(patches: Tensor | None) -> Tensor:
                if name == "torch":
                    return _plain(settings, model, inputs, dtype, kept=patches)
                model.set_patchout(*(dropped if patches is not None else (0, 0)))
                with _scope(settings, dtype):
                    given: Tensor = model(inputs["x"])
                return given

            def run(_: int) -> tuple[Tensor, ...]:
                parts = (_loss(logits(patches), inputs) for patches in (kept(), None))
                return tuple(each for loss in parts for each in _results(model, loss))

            return run

        return Candidate(name, timed, name == "torch", gate, timed=name != "torch")

    def expected(inputs: Inputs) -> tuple[Tensor, ...]:
        twin = _twin(settings, size, frames, dtype)
        found: list[Tensor] = []
        for patches in (kept(), None):
            twin.kept_patches = patches
            logits = twin(inputs["x"].double())
            loss = F.binary_cross_entropy_with_logits(logits, inputs["y"].double())
            found += _results(twin, loss)
        return tuple(found)

    patches = ((128 - 16) // 10 + 1 - dropped[1]) * ((frames - 16) // 10 + 1 - dropped[0])
    counts = [(patches + 2, patches + 2)] * depth_of(settings)
    return Case(
        suite="tokens",
        name=f"{size}_patchout",
        mode="step",
        shape={"B": clips, "S": frames, "T": patches + 2},
        dtype=dtype,
        outputs=("loss", "gradient", "loss of all tokens", "gradient of all tokens"),
        make_inputs=spectrograms(settings, frames, clips, dtype, True),
        make_gate_inputs=spectrograms(settings, frames, 1, dtype, True),
        oracle=expected,
        candidates=(
            prepare(settings.ours, True),
            prepare("torch", False),
            prepare("all-tokens", False),
        ),
        kinds=("logits", "whole gradient") * 2,
        clips=clips,
        # every patch is projected, those left out too; that is a third of a percent of the work
        flops=3.0 * clips * flops(size, counts, num_tokens(frames) - 2),
    )


def _forward(settings: Settings, size: str, frames: int, clips: int, dtype: str, r: int) -> Case:
    def merges(inputs: Inputs) -> tuple[Any, Any]:
        model = _model(settings, size, frames, gate_depth(settings), dtype).eval()
        model.set_token_merging(r)
        with torch.no_grad():
            return model, model.merged_tokens(inputs["x"]).plans

    def all_tokens(depth: int) -> nn.Module:
        build = packed(settings, dtype)
        return build(size, frames, depth, weights(size, frames, depth)).eval()

    def prepare(name: str, fewer: bool) -> Candidate:
        def timed(inputs: list[Inputs]) -> Run:
            if fewer:
                model = _model(settings, size, frames, depth_of(settings), dtype).eval()
                model.set_token_merging(r)
            else:
                model = all_tokens(depth_of(settings))

            def run(index: int) -> tuple[Tensor]:
                with torch.no_grad():
                    return (model(inputs[index % len(inputs)]["x"]),)

            return run

        def gate(inputs: Inputs) -> Run:
            model, plans = merges(inputs)
            every = all_tokens(gate_depth(settings)) if name == "all-tokens" else model

            def run(_: int) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    if name == "torch":
                        fewer = _plain(settings, model, inputs, dtype, plans=plans)
                        return fewer, _plain(settings, model, inputs, dtype)
                    model.set_token_merging(r)
                    fewer = model(inputs["x"])
                    model.set_token_merging(0)
                    return fewer, every(inputs["x"])

            return run

        return Candidate(name, timed, name == "torch", gate, timed=name != "torch")

    def expected(inputs: Inputs) -> tuple[Tensor, Tensor]:
        model, plans = merges(inputs)
        twin = _twin(settings, size, frames, dtype)
        with torch.no_grad():
            every = twin(inputs["x"].double())
            twin.merging, twin.merge_plans = model.v.merging, plans
            return twin(inputs["x"].double()), every

    after = need("ast_fast.token_merging").token_counts(
        [r] * (depth_of(settings) - 1) + [0], num_tokens(frames), 2
    )
    before = [num_tokens(frames), *after[:-1]]
    return Case(
        suite="tokens",
        name=f"{size}_merging_{r}",
        mode="forward",
        shape={"B": clips, "S": frames, "T": after[-1]},
        dtype=dtype,
        outputs=("logits", "logits of all tokens"),
        make_inputs=spectrograms(settings, frames, clips, dtype, True),
        make_gate_inputs=spectrograms(settings, frames, 1, dtype, True),
        oracle=expected,
        candidates=(
            prepare(settings.ours, True),
            prepare("torch", False),
            prepare("all-tokens", False),
        ),
        kinds=("logits", "logits"),
        clips=clips,
        flops=clips * flops(size, list(zip(before, after, strict=True)), num_tokens(frames) - 2),
        graph=clips == 1,
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Patchout steps, then merging forwards, in each precision."""
    steps, forwards = _shapes(settings)
    dtypes = [dtype for dtype in settings.dtypes if dtype != "f16"]
    for dtype in dtypes:
        training = "bf16-amp" if dtype == "bf16" else dtype
        for size, frames, clips in steps:
            yield _step(settings, size, frames, clips, training)
        for size, frames, clips in forwards:
            several = MERGED if frames > 512 else MERGED_SHORT
            for r in several[:1] if settings.quick or settings.tiny else several:
                yield _forward(settings, size, frames, clips, dtype, r)


Shape = tuple[str, int, int]


def _shapes(settings: Settings) -> tuple[list[Shape], list[Shape]]:
    """Size, frames and clips of training steps and of forwards; PaSST's 998 frames make 474 tokens."""
    if settings.tiny:
        return [("tiny", 96, 1)], [("tiny", 96, 1)]
    if settings.cuda:
        steps = [("base", 998, 64), ("base", 1024, 64)]
        return (steps[:1] if settings.quick else steps), [("base", 1024, 64), ("base", 1024, 1)]
    if settings.quick:
        return [("small", 128, 1)], [("small", 128, 1)]
    return [("base", 512, 1), ("small", 998, 1), ("small", 128, 4)], [
        *(("base", 1024, 1), ("base", 128, 1), ("small", 1024, 1), ("small", 128, 4)),
    ]
