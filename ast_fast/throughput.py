"""Ours beside plain PyTorch on the same work, interleaved, after the outputs were found to agree."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .backend import use_backend
from .equivalence.plain import ast_logits
from .frontend import log_mel_features

_AGREE = 1e-4  # relative L2 of float32 logits


class DisagreementError(RuntimeError):
    """The two sides compute different things, so their speeds are not compared."""


def compare_throughput(
    model: Any, wave: Tensor, lengths: Tensor, targets: Tensor, rounds: int = 7
) -> list[dict[str, Any]]:
    """Clips a second of waveform-to-logits and of a whole training step, ours and plain PyTorch's.

    Plain PyTorch is batched `torch.fft` log-mel, `conv2d`, `scaled_dot_product_attention`,
    `layer_norm`, `gelu` and `linear`, with the same weights, optimiser and threads.

    Args:
        model: an `ASTModel`; it is copied, not changed.
        wave: [B, N] on the model's device.
        lengths: [B].
        targets: [B] class indices.
        rounds: measurements of each, taken in turns.

    Returns:
        Rows {"what", "ours", "plain"}, each side {"p20", "p50", "p80"} in clips a second.

    Raises:
        DisagreementError: the logits differ.
    """
    fast = copy.deepcopy(model).train()
    # the same weights, of their own, by name
    weights = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in model.state_dict().items()
    }
    config, front = model.config, model.frontend_config

    def ours() -> Tensor:
        with torch.no_grad():
            features = log_mel_features(wave, front, lengths)
        logits: Tensor = fast(features)
        return logits

    def plain() -> Tensor:
        with torch.no_grad(), use_backend("reference"):
            features = log_mel_features(wave, front, lengths)
        return ast_logits(
            weights,
            features,
            num_heads=config.num_heads,
            strides=(config.fstride, config.tstride),
            eps=config.eps,
            head_eps=config.head_eps,
        )

    with torch.no_grad():
        a, b = ours().double(), plain().double()
    error = float((a - b).norm() / b.norm())
    if not error <= _AGREE:
        raise DisagreementError(
            f"logits of ast_fast and of plain PyTorch differ by {error:.1e} (relative L2; at most "
            f"{_AGREE:g} is rounding): run `ast-fast verify`"
        )
    used = [value for name, value in weights.items() if not name.startswith("v.head")]
    trained = [value for value in fast.parameters() if value.requires_grad]
    steps = {
        "ours": _training_step(ours, trained, targets),
        "plain": _training_step(plain, used, targets),
    }
    inference = {"ours": torch.no_grad()(ours), "plain": torch.no_grad()(plain)}
    clips = len(wave)
    return [
        {"what": "Inference", **_measure(inference, clips, rounds, wave.device)},
        {"what": "Training step", **_measure(steps, clips, rounds, wave.device)},
    ]


def _training_step(
    forward: Callable[[], Tensor], parameters: list[Tensor], targets: Tensor
) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(), targets)
        loss.backward()
        optimizer.step()

    return step


def _measure(
    sides: Mapping[str, Callable[[], object]], clips: int, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if turn:  # the first turn warms up
                rates[name].append(clips / (time.perf_counter() - started))
    return {name: _spread(values) for name, values in rates.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return dict(zip(("p20", "p50", "p80"), found.tolist(), strict=True))
