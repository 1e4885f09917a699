"""Log-mel filterbank energies, Kaldi's or torchaudio's, padded, cut and normalised in one pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from ..reference.mel import (
    LOG_FLOOR,
    MEL_NORMS,
    MEL_SCALES,
    WINDOWS,
    MelSizes,
    MelTables,
    mel_sizes,
    mel_tables,
)
from ._checks import Checks
from ._common import call, no_second_gradient, register, require, without_autocast
from ._dispatch import Plan, dispatch, why_not_named


def _load(name: str) -> ModuleType:
    if name == "triton":
        from ..kernels import log_mel as implementation
    else:
        from ..cpp import log_mel as implementation
    return implementation


def log_mel(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None = None,  # [B]
    *,
    sample_rate_hz: int = 16000,
    num_mel_bins: int = 128,
    num_frames: int | None = None,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    low_freq_hz: float = 20.0,
    high_freq_hz: float = 0.0,
    preemphasis: float = 0.97,
    remove_dc: bool = True,
    log_floor: float = LOG_FLOOR,
    mean: float = 0.0,
    std: float = 0.5,
    out_dtype: torch.dtype | None = None,
    n_fft: int | None = None,
    window_samples: int | None = None,
    hop_samples: int | None = None,
    window: str = "hann",
    mel_scale: str = "kaldi",
    mel_norm: str = "none",
    power: int = 2,
    padding: str = "none",
    output: str = "log",
    log_offset: float = 0.0,
    top_db: float | None = None,
) -> Tensor:  # [B, S, F]
    """Log-mel energies as `torchaudio.compliance.kaldi.fbank` computes them for AST, or other ones.

    With `padding`, `mel_scale="htk"`, no pre-emphasis and no DC removal they are those of
    `torchaudio.transforms.MelSpectrogram` and `AmplitudeToDB`: `LogMelConfig.mel_spectrogram`.

    Args:
        wave: [B, N] mono waveforms, float32 in [-1, 1] or int16 (scaled by 1/32768).
        lengths: [B] valid samples per clip; the rest of a row is ignored.
        sample_rate_hz: rate of the waveform.
        num_mel_bins: F.
        num_frames: S; shorter clips are padded with raw 0 before normalisation, longer ones cut.
            By default the whole frames of N samples.
        window_ms: frame length in milliseconds.
        hop_ms: frame shift in milliseconds.
        low_freq_hz: lower edge of the lowest filter.
        high_freq_hz: upper edge of the highest; 0 is Nyquist.
        preemphasis: coefficient of the pre-emphasis within a frame.
        remove_dc: subtract each frame's mean.
        log_floor: energies below it are raised to it; its logarithm is -15.942385.
        mean: subtracted from the energies.
        std: the result is divided by 2 std; the default of 0.5 with mean 0 leaves raw energies.
        out_dtype: dtype of the result: float32 by default (float64 for a float64 waveform). Never
            changed by autocast.
        n_fft: FFT length, even; by default the power of two at or above the window.
        window_samples: frame length in samples, instead of `window_ms`.
        hop_samples: frame shift in samples, instead of `hop_ms`.
        window: "hann", "povey", "hamming", "blackman", "rectangular" as Kaldi defines them, or
            "hann_periodic", which is `torch.hann_window`.
        mel_scale: "kaldi", or "htk" or "slaney" with triangles drawn on the Hz axis (torchaudio).
        mel_norm: "slaney" gives filters of equal area; not for "kaldi".
        power: filters weigh |spectrum| to this power, 1 or 2.
        padding: "none" for whole frames only; "reflect" or "zeros" for frames centred on every
            hop's first sample, as `torch.stft(center=True)`: 1 + length // hop frames.
        output: "log" for natural logarithms, "db" for decibels (20 log10 of a magnitude).
        log_offset: added to the energies before floor and logarithm.
        top_db: decibels below a clip's loudest value are raised to that much below it; the loudest
            of all its frames, whatever `num_frames` keeps. NaN in one frame is then NaN in all.

    Returns:
        [B, S, F], natural-log energies or decibels, normalised.

    Raises:
        ValueError: shapes or settings do not fit.
        TypeError: wave is neither int16 nor floating.

    >>> log_mel(torch.zeros(1, 16000)).shape
    torch.Size([1, 98, 128])
    """
    require(wave.dim() == 2, f"wave has shape {tuple(wave.shape)}: expected [B, N], mono")
    if wave.dtype != torch.int16 and not wave.is_floating_point():
        raise TypeError(f"wave is {wave.dtype}: expected float32 in [-1, 1] or int16")
    require(std > 0.0, f"std={std:g}: expected a positive value (0.5 leaves energies as they are)")
    if lengths is not None:
        require(
            lengths.shape == wave.shape[:1] and not lengths.is_floating_point(),
            f"lengths has shape {tuple(lengths.shape)} and {lengths.dtype}: expected "
            f"({wave.shape[0]},) integers, valid samples a clip",
        )
        lengths = lengths.to(device=wave.device, dtype=torch.int64).clamp(0, wave.shape[1])
    # checked and turned into numbers once, outside of graphs; tracing would not see a cache
    resolve = _resolve if torch.compiler.is_compiling() else _resolved
    sizes, scale, setting = resolve(
        sample_rate_hz, num_mel_bins, window_ms, hop_ms, low_freq_hz, high_freq_hz, preemphasis,
        remove_dc, log_floor, n_fft, window_samples, hop_samples, window, mel_scale, mel_norm, power,
        log_offset, padding, output, top_db,
    )  # fmt: skip
    if wave.dtype in (torch.float16, torch.bfloat16):
        wave = wave.float()
    if out_dtype is None:
        out_dtype = torch.float64 if wave.dtype == torch.float64 else torch.float32
    whole = sizes.num_frames(wave.shape[1])
    wanted = whole if num_frames is None else num_frames
    clip_lengths = lengths
    if padding != "none":
        wave, lengths = pad_clips(wave, lengths, sizes)
    chosen = backend.choose("log_mel", _load, wave, lengths, sizes)
    limited = top_db is not None
    kept = max(whole, wanted) if limited else wanted
    # the limit is taken before the result is rounded to 16 bits
    wide = torch.promote_types(out_dtype, torch.float32) if limited else out_dtype
    arguments = (kept, mean / scale, std / scale, wide)
    if chosen == "reference":
        tables = _tables(setting)
        y = without_autocast(reference.ops.log_mel, wave, lengths, tables, *arguments)
    else:
        y = call(log_mel_op, wave, lengths, setting, *arguments, chosen)
    if top_db is None:
        return y
    y = _limit_range(y, clip_lengths, sizes, whole, top_db / (2.0 * std))
    return y[:, :wanted].to(out_dtype)


def pad_clips(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    sizes: MelSizes,
) -> tuple[Tensor, Tensor | None]:  # [B, N + window_samples], [B]
    """Waveforms with what their centred windows reach beyond both ends; each clip's own end.

    A window of w samples lies in the middle of the transform, so that frame s starts w / 2 samples
    before sample s * hop. Clips without frames (see `MelSizes.num_frames`) get length 0.
    """
    window, n_fft = sizes.window_samples, sizes.n_fft
    left = n_fft // 2 - (n_fft - window) // 2
    right = window - left
    b, n = wave.shape
    if n == 0 or not sizes.num_frames(n):
        return wave[:, :0], None if lengths is None else torch.zeros_like(lengths)
    if sizes.padding == "zeros":
        if lengths is not None:
            inside = torch.arange(n, device=wave.device) < lengths[:, None]
            wave = torch.where(inside, wave, torch.zeros_like(wave))
        padded = torch.nn.functional.pad(wave, (left, right))
    elif lengths is None:
        end = wave[:, n - 1 - right : n - 1].flip(1)
        return torch.cat((wave[:, 1 : left + 1].flip(1), wave, end), dim=1), None
    else:
        steps = torch.arange(right, device=wave.device)
        mirrored = wave.gather(1, (lengths[:, None] - 2 - steps).clamp(min=0))
        padded = torch.cat((wave[:, 1 : left + 1].flip(1), wave, wave.new_zeros(b, right)), dim=1)
        padded = padded.scatter(1, left + lengths[:, None] + steps, mirrored)
    if lengths is not None:
        has_frames = sizes.frames_of(lengths) > 0
        lengths = torch.where(has_frames, lengths + window, torch.zeros_like(lengths))
    return padded, lengths


def _limit_range(
    features: Tensor,  # [B, S, F]
    lengths: Tensor | None,  # [B] samples before padding
    sizes: MelSizes,
    whole: int,
    span: float,
) -> Tensor:  # [B, S, F]
    """Raise what lies more than `span` below a clip's largest value; frames of padding stay."""
    b, frames, _ = features.shape
    if not whole or not b:
        return features
    if lengths is None:
        count = torch.full((b,), whole, device=features.device)
    else:
        count = sizes.frames_of(lengths)
    inside = (torch.arange(frames, device=features.device) < count[:, None])[:, :, None]
    heard = features.masked_fill(~inside, -math.inf)
    limit = heard.amax((1, 2), keepdim=True) - span
    return torch.where(inside, torch.maximum(features, limit), features)


def _name_of(names: tuple[str, ...]) -> Callable[[float], str]:
    return lambda index: names[int(index)]


# what each number of an op's `setting` is to `mel_tables`; names travel as their index, and numbers
# may be left out at the end for the defaults
_FORMS: tuple[Callable[[float], Any], ...] = (
    *(int, int, float, float, float, float, float, bool, float),
    *(int, int, int, _name_of(WINDOWS), _name_of(MEL_SCALES), _name_of(MEL_NORMS), int, float),
)


# the defaults of the last eight
_KALDI = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0)


@functools.lru_cache(maxsize=64)
def _tables(setting: tuple[float, ...]) -> MelTables:
    return mel_tables(*(form(value) for form, value in zip(_FORMS, setting, strict=False)))


def _resolve(
    sample_rate_hz: int,
    num_mel_bins: int,
    window_ms: float,
    hop_ms: float,
    low_freq_hz: float,
    high_freq_hz: float,
    preemphasis: float,
    remove_dc: bool,
    log_floor: float,
    n_fft: int | None,
    window_samples: int | None,
    hop_samples: int | None,
    window: str,
    mel_scale: str,
    mel_norm: str,
    power: int,
    log_offset: float,
    padding: str,
    output: str,
    top_db: float | None,
) -> tuple[MelSizes, float, tuple[float, ...]]:
    """Checked settings: sizes, units of the output in a nat, and the op's `setting`."""
    require(output in ("log", "db"), f"output={output!r}: expected 'log' or 'db'")
    require(
        top_db is None or (output == "db" and top_db >= 0),
        f"top_db={top_db} with output={output!r}: expected 0 or more, and output='db'",
    )
    for name, value, known in (
        ("window", window, WINDOWS),
        ("mel_scale", mel_scale, MEL_SCALES),
        ("mel_norm", mel_norm, MEL_NORMS),
    ):
        require(value in known, f"{name}={value!r}: expected one of {', '.join(known)}")
    require(power in (1, 2), f"power={power}: expected 1 (magnitude) or 2 (power)")
    sizes = mel_sizes(
        *(sample_rate_hz, num_mel_bins, float(window_ms), float(hop_ms)),
        *(n_fft, window_samples, hop_samples, padding),
    )
    # decibels are an affine function of the logarithm, which the backends compute anyway
    scale = 1.0 if output == "log" else (20.0 if power == 1 else 10.0) / math.log(10.0)
    kaldi = (sample_rate_hz, num_mel_bins, window_ms, hop_ms, low_freq_hz, high_freq_hz)
    setting = (*map(float, kaldi), float(preemphasis), float(bool(remove_dc)), float(log_floor))
    beyond = (
        *map(float, (n_fft or 0, window_samples or 0, hop_samples or 0, WINDOWS.index(window))),
        *map(float, (MEL_SCALES.index(mel_scale), MEL_NORMS.index(mel_norm), power, log_offset)),
    )
    return sizes, scale, setting if beyond == _KALDI else setting + beyond


_resolved = functools.lru_cache(maxsize=64)(_resolve)


def _plan(setting: Sequence[float]) -> Plan:
    return Plan((f"{int(setting[1])} bins of {setting[0]:g} Hz", hash(tuple(setting))))


@functools.lru_cache(maxsize=64)
def _check_setting(setting: tuple[float, ...]) -> None:
    """Raise ValueError unless the numbers say a setting."""
    least, most = len(_FORMS) - len(_KALDI), len(_FORMS)
    require(
        len(setting) in (least, most) and all(map(math.isfinite, setting)),
        f"setting is {list(setting)}: expected {least} or {most} finite numbers, the arguments of mel_tables",
    )
    for place, names in zip(
        range(least + 3, least + 6), (WINDOWS, MEL_SCALES, MEL_NORMS), strict=True
    ):
        require(
            len(setting) == least or setting[place] in range(len(names)),
            f"setting[{place}] is {setting[place:][:1]}: expected an index below {len(names)}",
        )
    numbers = [
        int(value) if form is int else value for form, value in zip(_FORMS, setting, strict=False)
    ]
    require(
        numbers[:2] == list(setting[:2]) and numbers[least:][:3] == list(setting[least:][:3]),
        f"setting is {list(setting)}: expected whole numbers for rate, bins and samples",
    )
    # sizes first: they bound what the tables take
    rate, bins, window_ms, hop_ms = numbers[:4]
    n_fft, window, hop = ([int(value) for value in numbers[least:][:3]] + [0, 0, 0])[:3]
    mel_sizes(int(rate), int(bins), window_ms, hop_ms, n_fft or None, window or None, hop or None)


def _check_frames(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    setting = tuple(arguments["setting"])
    _check_setting(setting)
    require(arguments["std"] > 0.0, f"std={arguments['std']}: expected a positive value")
    if "F" in sizes:
        require(
            sizes["F"] == int(setting[1]),
            f"dy has {sizes['F']} mel bins: expected {int(setting[1])} as in setting",
        )


def _why_not(a: dict[str, Any]) -> str | None:
    sizes = _tables(tuple(a["setting"]))
    return why_not_named("log_mel", a["backend"], a["wave"], _load, a["lengths"], sizes)


@register(
    "log_mel",
    Checks(
        {"wave": "B N wave", "lengths": "B integer"},
        finite=("mean", "std"),
        at_least={"num_frames": 0},
        floats=("out_dtype",),
        also=_check_frames,
        backend=_why_not,
    ),
)
def log_mel_op(
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Registered op; `setting` holds the arguments of `mel_tables` in order: see `_FORMS`."""
    arguments = (lengths, _tables(tuple(setting)), num_frames, mean, std, out_dtype)

    def run(name: str) -> Tensor:
        function = reference.ops.log_mel if name == "reference" else _load(name).forward
        made: Tensor = without_autocast(function, wave, *arguments)
        return made

    return dispatch("log_mel", "forward", backend, wave, run, lambda: _plan(setting))


@log_mel_op.register_fake
def _(
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return wave.new_empty((wave.shape[0], num_frames, int(setting[1])), dtype=out_dtype)


@register(
    "log_mel_backward",
    Checks(
        {"wave": "B N float", "dy": "B S F float", "lengths": "B integer"},
        finite=("mean", "std"),
        also=_check_frames,
        backend=_why_not,
    ),
)
def log_mel_backward_op(
    dy: Tensor,
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    mean: float,
    std: float,
    backend: str,
) -> Tensor:
    """Registered op: the gradient of the waveform."""
    tables = _tables(tuple(setting))

    def run(name: str) -> Tensor:
        if name == "reference":
            return reference_backward.log_mel(dy, wave, lengths, tables, std)
        made: Tensor = _load(name).backward(dy, wave, lengths, tables, mean, std)
        return made

    return dispatch("log_mel", "backward", backend, wave, run, lambda: _plan(setting))


@log_mel_backward_op.register_fake
def _(
    dy: Tensor,
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    mean: float,
    std: float,
    backend: str,
) -> Tensor:
    return wave.new_empty(wave.shape)


no_second_gradient(log_mel_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    wave, lengths, ctx.setting, _, ctx.mean, ctx.std, _, ctx.backend = inputs
    ctx.save_for_backward(wave, lengths)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    wave, lengths = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 8
    dwave = log_mel_backward_op(dy, wave, lengths, ctx.setting, ctx.mean, ctx.std, ctx.backend)
    return (dwave,) + (None,) * 7


log_mel_op.register_autograd(_backward, setup_context=_setup)
