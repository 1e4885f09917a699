"""The front end: waveform to log-mel energies, alone and with the padding and normalisation of AST.

The error is the largest absolute one in nats against float64, and the budget is twice torchaudio's own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..case import (
    Candidate,
    Case,
    Inputs,
    Run,
    Settings,
    Skipped,
    candidate,
    forward_run,
    generator,
    oracle,
)
from ..peers import compiled, feature_extractor, kaldi_native_fbank, need, torchaudio_fbank

RATE = 16000
_TURNS = 32
SECONDS = 10.0


def waves(batch: int, seconds: float, device: str, dtype: torch.dtype) -> Callable[[int], Inputs]:
    """Noise under a few drifting tones: neither silent nor flat, so that no filter sits on the floor."""

    def make(seed: int) -> Inputs:
        draw = generator(seed, "cpu")
        n = int(seconds * RATE)
        time = torch.arange(n) / RATE
        tones = torch.rand(batch, 3, 1, generator=draw) * 3000 + 100
        sweep = torch.sin(6.28318 * (tones * time + 40 * time.square())).sum(1)
        wave = 0.2 * sweep / 3 + 0.05 * torch.randn(batch, n, generator=draw)
        if dtype == torch.int16:
            return {"wave": (wave * 32768).clamp(-32768, 32767).to(torch.int16).to(device)}
        return {"wave": wave.to(device)}

    return make


def _oracle(frames: int | None, normalise: bool):  # type: ignore[no-untyped-def]
    def compute(inputs: Inputs) -> tuple[Tensor]:
        wave = inputs["wave"][:2].cpu()
        wave = wave.double() / (32768.0 if wave.dtype == torch.int16 else 1.0)
        return (reference_features(wave, frames, normalise),)

    return compute


def reference_features(wave: Tensor, frames: int | None, normalise: bool) -> Tensor:
    """The plain twin of [B, N] in its own dtype: to `frames` if given, normalised for AudioSet if asked."""
    mel = need("ast_fast.reference.mel")
    tables = mel.mel_tables()
    mean, std = _statistics(normalise)
    count = tables.num_frames(wave.shape[1]) if frames is None else frames
    return need("ast_fast.reference.ops").log_mel(wave, None, tables, count, mean, std)


def _statistics(normalise: bool) -> tuple[float, float]:
    return need("ast_fast.config").NORMALISATION["audioset"] if normalise else (0.0, 0.5)


def _ours(frames: int | None, normalise: bool):  # type: ignore[no-untyped-def]
    def run(wave: Tensor) -> tuple[Tensor]:
        mean, std = _statistics(normalise)
        return (need("ast_fast.ops").log_mel(wave, num_frames=frames, mean=mean, std=std),)

    return run


def _finished(fbank: Callable[[Tensor], Tensor], frames: int | None, normalise: bool):  # type: ignore[no-untyped-def]
    """A peer's raw energies, then the padding and normalisation that AST wants."""

    def run(wave: Tensor) -> tuple[Tensor]:
        features = fbank(wave)
        if frames is not None:
            features = torch.nn.functional.pad(features, (0, 0, 0, frames - features.shape[1]))
        if normalise:
            mean, std = _statistics(True)
            features = (features - mean) / (2 * std)
        return (features,)

    return run


def _host_only(
    build: Callable[[], Callable[[Tensor], Tensor]], frames: int | None, normalise: bool
):  # type: ignore[no-untyped-def]
    def prepare(inputs: list[Inputs]) -> Run:
        if inputs[0]["wave"].is_cuda:
            raise Skipped("runs on the CPU only")
        if inputs[0]["wave"].dtype == torch.int16:
            raise Skipped("takes float32 waveforms only")
        return forward_run(_finished(build(), frames, normalise), inputs)

    return prepare


def _torchaudio(frames: int | None, normalise: bool):  # type: ignore[no-untyped-def]
    def prepare(inputs: list[Inputs]) -> Run:
        fbank = torchaudio_fbank()

        def scaled(wave: Tensor) -> Tensor:
            return fbank(wave.float() / 32768.0 if wave.dtype == torch.int16 else wave)

        return forward_run(_finished(scaled, frames, normalise), inputs)

    return prepare


def _extractor(inputs: list[Inputs]) -> Run:
    extract = feature_extractor()
    return forward_run(lambda wave: (extract(wave),), inputs)


def _compiled(frames: int | None, normalise: bool):  # type: ignore[no-untyped-def]
    def prepare(inputs: list[Inputs]) -> Run:
        def plain(wave: Tensor) -> tuple[Tensor]:
            return (reference_features(wave, frames, normalise),)

        return forward_run(compiled(plain), inputs)

    return prepare


def cases(settings: Settings) -> Iterator[Case]:
    """Raw energies first; then what the model is fed, padded to 10.24 s and normalised."""
    seconds = 0.2 if settings.tiny else SECONDS
    batches = [2] if settings.tiny else [64, 1, 512] if settings.cuda else [1, 16]
    batches = batches[:1] if settings.quick else batches
    kinds = [
        ("log_mel", torch.float32, None, False),
        ("features", torch.float32, 1024, True),
        ("log_mel_int16", torch.int16, None, False),
    ]
    for name, dtype, frames, normalise in kinds:
        for batch in batches:
            yield _case(settings, name, batch, seconds, dtype, frames, normalise)
    if not settings.cuda and (os.cpu_count() or 1) >= 2:
        yield _two_threads(settings, batches[-1], seconds)


def _two_threads(settings: Settings, batch: int, seconds: float) -> Case:
    """Ours on two threads, against itself on one, for long enough that each has found a core."""

    def on(threads: int) -> Callable[[list[Inputs]], Run]:
        def prepare(inputs: list[Inputs]) -> Run:
            run = forward_run(_ours(None, False), inputs)

            def limited(index: int) -> Sequence[Tensor]:
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    for turn in reversed(range(_TURNS)):
                        outputs = run(index + turn)
                    return outputs
                finally:
                    torch.set_num_threads(before)

            return limited

        return prepare

    case = _case(settings, "log_mel_two_threads", batch, seconds, torch.float32, None, False)
    yardstick = dataclasses.replace(case.candidates[1], timed=False)
    ours, one = Candidate(settings.ours, on(2)), Candidate("one thread", on(1))
    return dataclasses.replace(
        case,
        candidates=(ours, one, yardstick),
        clips=_TURNS * batch,
        bytes=_TURNS * (case.bytes or 0.0),
    )


def _case(
    settings: Settings,
    name: str,
    batch: int,
    seconds: float,
    dtype: torch.dtype,
    frames: int | None,
    normalise: bool,
) -> Case:
    samples = int(seconds * RATE)
    written = frames or 1 + (samples - 400) // 160

    def batched(wave: Tensor) -> tuple[Tensor]:
        return (reference_features(wave, frames, normalise),)

    candidates = [
        Candidate(settings.ours, lambda inputs: forward_run(_ours(frames, normalise), inputs)),
        # both are yardsticks: where torchaudio is absent the batched twin stands in
        Candidate("torchaudio", _torchaudio(frames, normalise), yardstick=True),
        Candidate("kaldi-native-fbank", _host_only(kaldi_native_fbank, frames, normalise)),
        Candidate("torch", lambda inputs: forward_run(batched, inputs), yardstick=True),
    ]
    if normalise and dtype == torch.float32:
        candidates.append(Candidate("transformers", _extractor))
    if settings.cuda:
        candidates.append(Candidate("torch-compile", _compiled(frames, normalise)))
    return Case(
        suite="frontend",
        name=name,
        mode="forward",
        shape={"B": batch, "N": samples},
        dtype="int16" if dtype == torch.int16 else "f32",
        outputs=("features",),
        make_inputs=waves(batch, seconds, settings.device, dtype),
        oracle=_oracle(frames, normalise),
        candidates=tuple(candidates),
        kinds=("log mel",),
        measure="max_abs",
        clips=batch,
        bytes=float(batch * (samples * dtype.itemsize + written * 128 * 4)),
        bound="copy",
        graph=batch == 1,
    )


def mel_case(settings: Settings, batch: int, seconds: float, bins: int, mode: str) -> Case:
    """Raw energies of any number of mel bins, or the gradient of the waveform, against the twin."""
    samples = int(seconds * RATE)
    frames = 1 + (samples - 400) // 160

    def make(seed: int) -> Inputs:
        given = waves(batch, seconds, settings.device, torch.float32)(seed)
        dy = torch.randn(batch, frames, bins, generator=generator(seed, "cpu"))
        return given | {"dy": dy.to(settings.device)}

    def ours(wave: Tensor) -> tuple[Tensor]:
        return (need("ast_fast.ops").log_mel(wave, num_mel_bins=bins),)

    def plain(wave: Tensor) -> tuple[Tensor]:
        tables = need("ast_fast.reference.mel").mel_tables(num_mel_bins=bins)
        return (need("ast_fast.reference.ops").log_mel(wave, None, tables, frames, 0.0, 0.5),)

    backward = mode == "backward"
    return Case(
        suite="frontend",
        name="log_mel",
        mode=mode,
        shape={"B": batch, "N": samples, "F": bins},
        dtype="f32",
        outputs=("dwave",) if backward else ("features",),
        make_inputs=make,
        oracle=oracle(plain, mode, ("wave",), ("dy",)),
        candidates=(
            candidate(settings.ours, ours, mode, ("wave",), ("dy",)),
            candidate("torch", plain, mode, ("wave",), ("dy",), yardstick=True),
        ),
        kinds=("waveform gradient" if backward else "log mel",),
        measure="rel_l2" if backward else "max_abs",
        clips=batch,
        bytes=float(batch * (samples + frames * bins) * 4),
        bound="copy",
    )
