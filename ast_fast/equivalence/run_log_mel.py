"""The front end against float64, with torchaudio's own error as the yardstick.

No fixed tolerance can hold for a logarithm of energies: the empty bins of a clean tone are the rounding
noise of whichever transform computed them. So ours may be at most twice as far off as torchaudio where
both are worst, and no further off in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from . import plain
from .budgets import budget, log_mel_budget, precision_of
from .cases import Tensors
from .measures import Errors, measure
from .report import Row, make_row
from .run_ops import SEED, draw_upstream, evaluate, evaluate_ours, place

MEAN, STD = -4.2677393, 4.5689974  # AudioSet
STAND_IN = "torchaudio is not installed: the reference in float32 stands in for it (log_mel)"


def noise(generator: torch.Generator, n: int, rate: int) -> Tensor:
    """White noise."""
    return 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)


def chirp(generator: torch.Generator, n: int, rate: int) -> Tensor:
    """A clean sweep up to Nyquist in 16-bit samples, as files hold it: most bins are nearly empty.

    In a sweep of unrounded samples those bins hold the rounding noise of the transform alone, and the
    worst of them is a lottery between any two correct programs.
    """
    time = torch.arange(n, dtype=torch.float64) / rate
    sweep = 0.5 * torch.sin(math.pi * (0.5 * rate / time[-1]) * time.square())
    return (sweep * 32768.0).round() / 32768.0


def voice(generator: torch.Generator, n: int, rate: int) -> Tensor:
    """Harmonics of a gliding pitch in bursts, over faint noise: like speech in a room."""
    time = torch.arange(n, dtype=torch.float64) / rate
    phase = 2 * math.pi * (120.0 * time + 10.0 * torch.sin(3.0 * time))
    tones = sum(torch.sin(k * phase) / k for k in range(1, 20))
    burst = torch.clamp(torch.sin(2 * math.pi * 2.0 * time), min=0.0)
    return 0.1 * tones * burst + 1e-3 * noise(generator, n, rate)


def clicks_and_silence(generator: torch.Generator, n: int, rate: int) -> Tensor:
    """Digital silence, on the log floor, with single full-scale samples."""
    wave = torch.zeros(n, dtype=torch.float64)
    wave[:: rate // 3] = 1.0
    return wave


def clicks_in_noise(generator: torch.Generator, n: int, rate: int) -> Tensor:
    """A loud click in the middle of every window's length, over faint noise: no bin is nearly empty.

    In noise alone some bin nearly is, its gradient is the largest, and how far off that is depends on the
    rounding of one sum: a lottery between any two correct programs.
    """
    wave = 1e-3 * torch.randn(n, generator=generator, dtype=torch.float64)
    spacing = rate // 40  # 25 ms
    places = wave[spacing // 10 :: spacing]
    places += 0.5 + 0.5 * torch.rand(places.shape, generator=generator, dtype=torch.float64)
    return wave


class LogMelCase(NamedTuple):
    """A signal, a rate and a form of the call."""

    signal: Callable[[torch.Generator, int, int], Tensor]
    rate: int = 16000
    mels: int = 128
    out_dtype: torch.dtype = torch.float32
    int16: bool = False
    normalised: bool = False


def log_mel_cases() -> Iterator[LogMelCase]:
    """Signals of every kind at AST's setting, then other rates, integers and narrow outputs."""
    for signal in (noise, chirp, voice, clicks_and_silence):
        yield LogMelCase(signal)
    yield LogMelCase(voice, rate=22050, mels=64)
    yield LogMelCase(noise, rate=48000)
    yield LogMelCase(voice, int16=True, normalised=True)
    yield LogMelCase(voice, out_dtype=torch.bfloat16, normalised=True)
    yield LogMelCase(voice, out_dtype=torch.float16, normalised=True)


def _wave(case: LogMelCase, seconds: float, clips: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    n = int(seconds * case.rate)
    wave = torch.stack([case.signal(generator, n, case.rate) for _ in range(clips)])
    if case.int16:
        return (wave * 32767).round().clamp(-32768, 32767).to(torch.int16)
    return wave.float()


def run_log_mel_case(
    case: LogMelCase,
    device: torch.device,
    seconds: float,
    backend: str = "auto",
    keep: Tensors | None = None,
) -> list[Row]:
    """Row of the features of one signal; our results also go into `keep`."""
    mean, std = (MEAN, STD) if case.normalised else (0.0, 0.5)
    settings: dict[str, Any] = {"sample_rate_hz": case.rate, "num_mel_bins": case.mels}
    wave = _wave(case, seconds).to(device)
    narrow = wave / 32768.0 if case.int16 else wave
    tables = reference.mel.mel_tables(case.rate, case.mels)
    frames = tables.num_frames(wave.shape[1])
    oracle = reference.ops.log_mel(narrow.double(), None, tables, frames, 0.0, 0.5)
    simple, note = plain.kaldi_fbank(narrow, **settings), ""
    if simple is None:
        simple = reference.ops.log_mel(narrow, None, tables, frames, 0.0, 0.5)
        note = STAND_IN

    def ours(t: Tensors) -> Tensors:
        y = ops.log_mel(t["wave"], mean=mean, std=std, out_dtype=case.out_dtype, **settings)
        return {"y": y}

    results, ran, reason = evaluate_ours("log_mel", ours, {"wave": wave}, None, backend)
    if keep is not None:
        keep.update(results)
    target = (oracle - mean) / (2.0 * std)
    errors = measure(results["y"], target)
    plain_errors = measure(simple, oracle)
    scale = 1.0 / (2.0 * std)
    worst, average = log_mel_budget(plain_errors, float(target.abs().max()), scale, case.out_dtype)
    kind = "int16" if case.int16 else str(case.out_dtype).removeprefix("torch.")
    return [
        Row(
            what="log_mel y (worst, mean)",
            shape=f"{case.signal.__name__} {case.rate} Hz F{case.mels}"
            + (" normalised" if case.normalised else ""),
            dtype=kind,
            backend=ran,
            error=(errors.max_abs, errors.mean_abs),
            torch_error=(plain_errors.max_abs * scale, plain_errors.mean_abs * scale),
            budget=(worst, average),
            ok=errors.max_abs <= worst and errors.mean_abs <= average,
            note="; ".join(filter(None, (note, reason))),
        )
    ]


def run_log_mel_gradient(
    device: torch.device, seconds: float, backend: str = "auto", keep: Tensors | None = None
) -> list[Row]:
    """Row of the waveform's gradient, on a signal whose energies are far from 0 and from the floor."""
    generator = torch.Generator().manual_seed(SEED)
    wave = {"wave": _wave(LogMelCase(clicks_in_noise), seconds, 8).to(device)}
    wide = place(wave, device, torch.float64)
    tables = reference.mel.mel_tables()
    frames = tables.num_frames(wave["wave"].shape[1])

    def oracle(t: Tensors) -> Tensors:
        return {"y": reference.ops.log_mel(t["wave"], None, tables, frames, MEAN, STD)}

    def simple(t: Tensors) -> Tensors:
        y = plain.kaldi_fbank(t["wave"])
        return oracle(t) if y is None else {"y": (y - MEAN) / (2.0 * STD)}

    def ours(t: Tensors) -> Tensors:
        return {"y": ops.log_mel(t["wave"], mean=MEAN, std=STD)}

    note = STAND_IN if plain.kaldi_fbank(wave["wave"][:1, :800]) is None else ""
    upstream = draw_upstream(evaluate(oracle, wide), generator, torch.float32)
    want = evaluate(oracle, wide, upstream)["dwave"]
    got, ran, reason = evaluate_ours("log_mel", ours, wave, upstream, backend)
    if keep is not None:
        keep.update(got)
    errors: Errors = measure(got["dwave"], want)
    plain_errors = measure(evaluate(simple, wave, upstream)["dwave"], want)
    allowed = budget("waveform gradient", precision_of(torch.float32), plain_errors)
    shape = f"clicks in noise {wave['wave'].shape[0]}x{wave['wave'].shape[1]}"
    notes = "; ".join(filter(None, (note, reason)))
    return [make_row("log_mel dwave", shape, "float32", ran, errors, plain_errors, allowed, notes)]
