"""The path from files to features: FLAC files and tar shards through the feeder, as training reads them.

The clips are recorded speech, since noise takes a FLAC decoder longer. Files lie in the page cache. The
peer `soundfile` decodes and does nothing else: a ratio of 1 would mean that log-mel, padding and
batches cost nothing. Where there are workers, it decodes in as many threads. What the loader is held to:
0.83 of soundfile's speed on FLAC with features made, and 1500 clips of 10 s a second on one core from raw
shards (`tests/benchmarks/test_bench_loader.py` reads the committed file). `s16_shards_mixup` reads a
partner from anywhere in the shards for half of the clips, too; its peer does not.
"""

from __future__ import annotations

import concurrent.futures
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Candidate, Case, Inputs, Run, Settings, forward_run, generator
from ..peers import need, torchaudio_fbank
from .frontend import RATE, SECONDS, reference_features, waves

FRAMES = 1024
BATCH = 16


def cases(settings: Settings) -> Iterator[Case]:
    """Files first; shards on the device, too, where that is a GPU."""
    for workers in (0, 2):
        if not settings.cuda:
            yield _case(settings, "flac_files", workers)
        yield _case(settings, "s16_shards", workers)
        if not settings.cuda:
            yield _case(settings, "s16_shards_mixup", workers)
        if settings.quick:
            return


def _speech(clips: int, samples: int) -> Callable[[int], Inputs]:
    """Recorded syllables one after another, in a random order, as int16 [clips, samples]."""

    def make(seed: int) -> Inputs:
        recorded = need("ast_fast.data.syllables").read_syllables().waves
        draw = generator(seed, "cpu")
        parts: list[Tensor] = []
        while sum(len(part) for part in parts) < clips * samples:
            parts += [recorded[i] for i in torch.randperm(len(recorded), generator=draw).tolist()]
        return {"wave": torch.cat(parts)[: clips * samples].view(clips, samples)}

    return make


def _oracle(inputs: Inputs) -> tuple[Tensor]:
    return (reference_features(inputs["wave"][:2].double() / 32768.0, FRAMES, True),)


class _Stored:
    """The clips of a case on disk, written when a candidate first asks, gone with the case."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def dataset(self, inputs: Inputs) -> Any:
        """What the feeder reads."""
        data = need("ast_fast.data")
        folder = self.folder(inputs)
        if self._kind != "flac_files":
            return data.ShardSet(folder)
        audio = need("ast_fast.config").AudioConfig(dtype="auto")
        return data.AudioDataset(data.read_folder(folder), audio)

    def files(self, inputs: Inputs) -> list[str]:
        """The FLAC files in order."""
        return sorted(map(str, self.folder(inputs).rglob("*.flac")))

    def folder(self, inputs: Inputs) -> Path:
        """Where they lie."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ast_fast-path-")
            write = self._write_files if self._kind == "flac_files" else self._write_shards
            write(inputs["wave"], Path(self._folder.name))
        return Path(self._folder.name)

    @staticmethod
    def _write_files(waves: Tensor, folder: Path) -> None:
        soundfile = need("soundfile")
        (folder / "speech").mkdir()
        for number, wave in enumerate(waves):
            file = folder / "speech" / f"{number:06d}.flac"
            soundfile.write(file, wave.numpy(), RATE, subtype="PCM_16")

    @staticmethod
    def _write_shards(waves: Tensor, folder: Path) -> None:
        data = need("ast_fast.data")
        clips = data.WaveformDataset(list(waves), [(0,)] * len(waves), ("speech",), RATE)
        data.write_shards(clips, folder)


def _ours(
    stored: _Stored, settings: Settings, workers: int, keep: bool, partners: bool = False
) -> Callable[[Inputs], Run]:
    """Features of every clip through the feeder; kept for the check, dropped where it is timed.

    With partners, those of half of the clips are read beside them and left alone.
    """

    def prepare(inputs: Inputs) -> Run:
        data = need("ast_fast.data")
        front = need("ast_fast.config").LogMelConfig(num_frames=FRAMES)
        features = need("ast_fast.frontend").log_mel_features
        dataset = stored.dataset(inputs)
        feeder = data.Feeder(
            dataset,
            data.sampler_for(dataset, BATCH, shuffle=False),
            device=settings.device,
            transform=lambda batch: features(batch.wave, front, batch.lengths),
            mixup=data.WholeSetMixup(0, 0.5, len(dataset)) if partners else None,
            num_workers=workers,
        )

        def run(_: int) -> tuple[Tensor, ...]:
            kept = [fed.features if keep else None for fed in feeder]
            return (torch.cat(kept),) if keep else ()

        return run

    return prepare


def _decoded(stored: _Stored, workers: int, finish: Callable[[Tensor], Tensor] | None):  # type: ignore[no-untyped-def]
    """Every file through soundfile, and what `finish` makes of each clip [1, N], if anything."""

    def prepare(inputs: Inputs) -> Run:
        soundfile = need("soundfile")
        files = stored.files(inputs)
        pool = concurrent.futures.ThreadPoolExecutor(workers) if workers else None

        def one(file: str) -> Tensor | None:
            samples, _ = soundfile.read(file, dtype="int16")
            return None if finish is None else finish(torch.from_numpy(samples)[None])

        def run(_: int) -> tuple[Tensor, ...]:
            made = list(pool.map(one, files) if pool is not None else map(one, files))
            return () if finish is None else (torch.cat(made),)

        return run

    return prepare


def _usual(wave: Tensor) -> Tensor:
    """Normalised features of a clip by torchaudio, as scripts for AST make them."""
    energies = torchaudio_fbank()(wave.float() / 32768.0)
    energies = torch.nn.functional.pad(energies, (0, 0, 0, FRAMES - energies.shape[1]))
    mean, std = need("ast_fast.config").NORMALISATION["audioset"]
    return (energies - mean) / (2 * std)


def _plain(wave: Tensor) -> Tensor:
    return reference_features(wave.float() / 32768.0, FRAMES, True)


def _case(settings: Settings, kind: str, workers: int) -> Case:
    samples = int((0.2 if settings.tiny else SECONDS) * RATE)
    clips = 4 if settings.tiny else 64
    stored, partners = _Stored(kind), kind == "s16_shards_mixup"
    # a GPU machine may lack what decodes the recordings, and raw samples read alike whatever they hold
    noise = settings.cuda or settings.tiny
    make = waves(clips, samples / RATE, "cpu", torch.int16) if noise else _speech(clips, samples)

    def first(prepare: Callable[[Inputs], Run]) -> Callable[[list[Inputs]], Run]:
        return lambda inputs: prepare(inputs[0])

    def in_memory(function: Callable[[Tensor], Tensor]) -> Callable[[list[Inputs]], Run]:
        def all_of(wave: Tensor) -> tuple[Tensor]:
            return (torch.cat([function(clip[None]) for clip in wave]),)

        return lambda inputs: forward_run(all_of, inputs)

    peers = [Candidate("torch", in_memory(_plain), yardstick=True, timed=False)]
    if kind == "flac_files":
        decode, usual = _decoded(stored, workers, None), _decoded(stored, workers, _usual)
        # what it decoded is checked by way of plain features
        check = _decoded(stored, workers, _plain)
        peers.insert(0, Candidate("soundfile", first(decode), prepare_gate=check))
        peers.insert(1, Candidate("soundfile+torchaudio", first(usual), yardstick=True))
    elif kind == "s16_shards_mixup":
        alone = _ours(stored, settings, workers, keep=False)
        check = _ours(stored, settings, workers, keep=True)
        peers.insert(0, Candidate("without_partners", first(alone), prepare_gate=check))
    elif not settings.cuda:
        # reads nothing: its waveforms lie in memory
        peers.insert(0, Candidate("torchaudio", in_memory(_usual), yardstick=True))
    return Case(
        suite="path",
        name=kind,
        mode="forward",
        shape={"B": clips, "N": samples, "workers": workers},
        dtype="int16",
        outputs=("features",),
        make_inputs=make,
        oracle=_oracle,
        candidates=(
            Candidate(
                settings.ours,
                first(_ours(stored, settings, workers, keep=False, partners=partners)),
                prepare_gate=_ours(stored, settings, workers, keep=True, partners=partners),
            ),
            *peers,
        ),
        kinds=("log mel",),
        measure="max_abs",
        clips=clips,
    )
