"""Small sets of real speech laid out exactly as public data sets are distributed.

Nobody may ship ESC-50, Speech Commands, AudioSet or DEAM; these have their folders, tables and names, and
the syllables that ship with the package for sound. What a clip is labelled with can be heard in it: the
tone of its syllables. They are for trying readers and recipes, not for figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._optional import require_package
from .data.syllables import SAMPLE_RATE_HZ, Syllables, read_syllables

# mids and names of AudioSet's table, for four of its classes
AUDIOSET_CLASSES = (
    ("/m/09x0r", "Speech"),
    ("/m/05zppz", "Male speech, man speaking"),
    ("/m/02zsn", "Female speech, woman speaking"),
    ("/m/0ytgt", "Child speech, kid speaking"),
)
WORDS = ("backward", "bed", "bird", "cat")
CATEGORIES = ("dog", "rooster", "pig", "cow")


class _Voice:
    """Clips of a given length in one of the four tones."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._all: Syllables = read_syllables()
        self._of_tone = [
            [i for i, tone in enumerate(self._all.tones) if tone == wanted]
            for wanted in (1, 2, 3, 4)
        ]

    def clip(self, tone: int, seconds: float, rate_hz: int) -> np.ndarray:
        """[N] int16: syllables of a tone (0 to 3) one after another."""
        wanted, found, parts = round(seconds * SAMPLE_RATE_HZ), 0, []
        while found < wanted:
            wave = self._all.waves[self._rng.choice(self._of_tone[tone])].numpy()
            parts.append(wave)
            found += wave.size
        samples = np.concatenate(parts)[:wanted]
        if rate_hz == SAMPLE_RATE_HZ:
            return samples
        soxr = require_package("soxr", "resampling", "audio")
        resampled: np.ndarray = soxr.resample(samples, SAMPLE_RATE_HZ, rate_hz)
        return resampled


def _write(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    soundfile = require_package("soundfile", "writing audio files", "audio")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz)


def make_esc50(
    folder: Path, clips: int = 2, classes: Sequence[str] = CATEGORIES, seed: int = 0
) -> Path:
    """ESC-50: `meta/esc50.csv`, and `audio/` with 5 s at 44.1 kHz.

    Args:
        folder: made if it is missing.
        clips: of each class in each of the five folds.
        classes: at most four.
        seed: of the choice of syllables.
    """
    voice = _Voice(seed)
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, category in enumerate(classes):
            for take in range(clips):
                source = 100000 + 100 * target + 10 * fold + take
                name = f"{fold}-{source}-{'ABCDEFGH'[take % 8]}-{target}.wav"
                _write(folder / "audio" / name, voice.clip(target, 5.0, 44100), 44100)
                rows.append(f"{name},{fold},{target},{category},False,{source},{name[9]}")
    (folder / "meta").mkdir(exist_ok=True)
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return folder


def make_speech_commands(
    folder: Path, clips: int = 5, words: Sequence[str] = WORDS, seed: int = 0
) -> Path:
    """Speech Commands v2: a folder a word with 1 s at 16 kHz, two lists, and background noise.

    Args:
        folder: made if it is missing.
        clips: of each word; one in five is for validation, one for testing.
        words: at most four.
        seed: of the choice of syllables.
    """
    voice = _Voice(seed)
    lists: dict[str, list[str]] = {"validation_list.txt": [], "testing_list.txt": []}
    for tone, word in enumerate(words):
        for number in range(clips):
            name = f"{word}/{0x0A7C2A8D + 7919 * number:08x}_nohash_{tone % 2}.wav"
            _write(folder / name, voice.clip(tone, 1.0, 16000), 16000)
            for place, held in zip((3, 4), lists.values(), strict=True):
                if number % 5 == place:
                    held.append(name)
    noise = np.random.default_rng(seed).integers(-300, 300, 32000).astype(np.int16)
    _write(folder / "_background_noise_" / "white_noise.wav", noise, 16000)
    (folder / "_background_noise_" / "README.md").write_text("Noise.\n")
    for name, held in lists.items():
        (folder / name).write_text("".join(f"{path}\n" for path in held))
    return folder


def make_audioset(
    folder: Path,
    clips: int = 8,
    naming: Callable[[str, float, float], str] = lambda video, start, end: f"{video}.flac",
    absent: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
) -> Path:
    """AudioSet: a list of segments, the table of classes, and files in `audio/`.

    Args:
        folder: made if it is missing.
        clips: lines of the list.
        naming: of a file: id, start and end in seconds to a name.
        absent: how many of them have no file.
        seconds: length of a clip.
        seed: of the choice of syllables.

    Returns:
        The list, `balanced_train_segments.csv`.
    """
    voice = _Voice(seed)
    rows = [
        "# Segments csv created Sun Mar  5 10:54:31 2017",
        f"# num_ytids={clips}, num_segs={clips}, num_unique_labels=4, num_positive_labels={2 * clips}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    for number in range(clips):
        video, tone = f"--Pv{number:03d}_x-Y", number % 4
        start = 30.0 * (number % 3)
        labels = ",".join(dict.fromkeys((AUDIOSET_CLASSES[0][0], AUDIOSET_CLASSES[tone][0])))
        rows.append(f'{video}, {start:.3f}, {start + 10:.3f}, "{labels}"')
        if number >= absent:
            name = naming(video, start, start + 10.0)
            _write(folder / "audio" / name, voice.clip(tone, seconds, 16000), 16000)
    table = ["index,mid,display_name"]
    table += [f'{index},{mid},"{name}"' for index, (mid, name) in enumerate(AUDIOSET_CLASSES)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_labels_indices.csv").write_text("\n".join(table) + "\n")
    path = folder / "balanced_train_segments.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def make_original(folder: Path, clips: int = 8, seconds: float = 1.0, seed: int = 0) -> Path:
    """The original AST's form: JSON that lists absolute paths and mids, and the table of classes.

    Args:
        folder: made if it is missing.
        clips: how many.
        seconds: length of a clip.
        seed: of the choice of syllables.

    Returns:
        The list, `train.json`; the classes are in `class_labels_indices.csv`.
    """
    voice, data = _Voice(seed), []
    for number in range(clips):
        path = folder / "audio_16k" / f"{number:04d}.wav"
        _write(path, voice.clip(number % 4, seconds, 16000), 16000)
        data.append({"wav": str(path.absolute()), "labels": f"/m/07rwj{number % 4:02d}"})
    table = ["index,mid,display_name"]
    table += [f"{index},/m/07rwj{index:02d},{name}" for index, name in enumerate(CATEGORIES)]
    (folder / "class_labels_indices.csv").write_text("\n".join(table) + "\n")
    (folder / "train.json").write_text(json.dumps({"data": data}, indent=1, allow_nan=False))
    return folder / "train.json"


def make_deam(folder: Path, songs: int = 8, seconds: float = 3.0, seed: int = 0) -> Path:
    """DEAM: averages of valence and arousal per song, and the songs as MP3.

    Valence follows the tone of the syllables, arousal their loudness.

    Args:
        folder: made if it is missing.
        songs: how many.
        seconds: length of a song (DEAM's are of 45 s).
        seed: of the choice of syllables.
    """
    voice, rng = _Voice(seed), np.random.default_rng(seed + 1)
    tables = folder / "DEAM_Annotations" / "annotations" / "annotations averaged per song"
    tables = tables / "song_level"
    tables.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"1_2000": [], "2000_2058": []}
    for place in range(songs):
        number = 2 + 3 * place if place < songs - 1 else 2001
        loudness = rng.uniform(0.1, 1.0)
        samples = voice.clip(place % 4, seconds, 44100) * loudness
        _write(folder / "DEAM_audio" / "MEMD_audio" / f"{number}.mp3", samples / 32768.0, 44100)
        valence, arousal = 2.0 + 2.0 * (place % 4), 1.0 + 8.0 * loudness
        part = "1_2000" if number <= 2000 else "2000_2058"
        rows[part].append(f"{number}, {valence:.1f}, 0.9, {arousal:.2f}, 1.1")
    for part, lines in rows.items():
        head = "song_id, valence_mean, valence_std, arousal_mean, arousal_std"
        table = tables / f"static_annotations_averaged_songs_{part}.csv"
        table.write_text("\n".join([head, *lines]) + "\n")
    return folder


def make_huggingface(clips: int = 8, seconds: float = 1.0, seed: int = 0) -> Any:
    """A Hugging Face DatasetDict with the parts train and test, sound as FLAC, and class labels.

    Args:
        clips: of both parts; every fourth is for testing.
        seconds: length of a clip.
        seed: of the choice of syllables.
    """
    from .data.examine import flac_bytes

    library = require_package("datasets", "making a Hugging Face dataset", "datasets")
    voice = _Voice(seed)
    features = library.Features(
        # as sound is stored: making it from an Audio feature would need torchcodec
        audio={"bytes": library.Value("binary"), "path": library.Value("string")},
        label=library.ClassLabel(names=list(CATEGORIES)),
    )
    rows: dict[str, dict[str, list[Any]]] = {
        part: {"audio": [], "label": []} for part in ("train", "test")
    }
    for number in range(clips):
        tone = number // 2 % 4
        content = flac_bytes(voice.clip(tone, seconds, 16000), 16000)
        part = rows["test" if number % 4 == 3 else "train"]
        part["audio"].append({"bytes": content, "path": f"{number}.flac"})
        part["label"].append(tone)
    made = library.DatasetDict(
        {part: library.Dataset.from_dict(columns, features) for part, columns in rows.items()}
    )
    return made.cast_column("audio", library.Audio(sampling_rate=16000, decode=False))
