"""Small sets of real recordings with natural groups, from Debian packages: what a newcomer's folder looks like.

Packages are downloaded and unpacked, never installed; nothing of them is shipped. Every set is a few hundred
clips whose label and group (speaker, kit, syllable) follow from the name of the file, so that folds can be made
by group: what is tested on is of groups that training never heard.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ast_fast.audio import AudioError, load
from ast_fast.data.syllables import read_syllables

RATE_HZ = 16000
MOST_CLIPS = 500
FEWEST = 8  # clips of a class that counts

Named = Iterator[tuple[Path, str, str]]  # file, label, group


@dataclasses.dataclass(frozen=True, slots=True)
class SmallSet:
    """Clips in memory: waveforms [N] int16 at 16 kHz, names of their classes, names of their groups."""

    name: str
    waves: list[Tensor]
    labels: list[str]
    groups: list[str]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(set(self.labels))


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a set comes from: packages, how files are named, and what it is, for the table."""

    packages: tuple[str, ...]
    read: Callable[[Path], Named]
    what: str
    groups: str
    seconds: float = 1.0  # of each clip from its start; the rest is cut, for all methods alike


def unpacked(packages: tuple[str, ...], cache: Path) -> Path:
    """A folder with the files of some Debian packages.

    Raises:
        RuntimeError: they cannot be had here.
    """
    place = cache / "unpacked"
    for package in packages:
        if (place / package).is_dir():
            continue
        fetched = cache / "fetched" / package
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=fetched, check=True, capture_output=True)  # fmt: skip
            (file,) = fetched.glob("*.deb")
            subprocess.run(["dpkg", "-x", file, fetched / "out"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise RuntimeError(
                f"the Debian package {package} cannot be had here ({error}): run apt-get update, or choose "
                "other --sets"
            ) from error
        for archive in sorted((fetched / "out").rglob("*.pk3")):
            with zipfile.ZipFile(archive) as content:
                content.extractall(archive.with_suffix(".unpacked"))
        place.mkdir(parents=True, exist_ok=True)
        (fetched / "out").rename(place / package)
    return place


def _files(folder: Path, *suffixes: str) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _vowels(place: Path) -> Named:
    """Syllables of one consonant and one vowel, of three speakers; the group is the consonant."""
    for language in ("es", "it", "pt_BR"):
        for path in _files(
            place / "klettres-data/usr/share/klettres" / language / "syllab", ".ogg"
        ):
            found = re.fullmatch(r"([b-df-hj-np-tv-z]{1,2})([aeiou])", path.stem)
            if found:
                yield path, found.group(2), found.group(1)


def _malayalam(place: Path) -> Named:
    """Syllables of one speaker: the vowel is the label, the consonant the group."""
    for path in _files(place / "klettres-data/usr/share/klettres/ml/syllab", ".ogg"):
        found = re.fullmatch(r"([b-df-hj-np-tv-z][b-df-hj-np-tv-z]*?)(aha|ai|aa|am|au|eae|i|o|u|ii|oo|uu|e)", path.stem)  # fmt: skip
        if found:
            yield path, found.group(2), found.group(1)


_DRUMS = {
    "kick": r"kick|bass ?drum|^bd|_bd_|^pearlkick",
    "snare": r"snare(?!.*(side|rim))|^sd|^sn\d?_",
    "tom": r"tom|^ft_|^t\d_|^tm",
    "hihat": r"hi-?hat|hat|^hh|chh|ohh",
    "cymbal": r"crash|ride|splash|china|cymbal|^rc_|^rd|^cr",
    "percussion": r"clap|conga|bongo|cowbell|agogo|clave|djembe|kenkeni|dunun|sangban|maraca|tambourine|wood|cajon|glass|snap|triangle",
}


def _drums(place: Path) -> Named:
    """Single hits of drum kits: the kit is the group."""
    for package in ("hydrogen-drumkits", "hydrogen-data"):
        kits = place / package / "usr/share/hydrogen/data/drumkits"
        for path in _files(kits, ".wav", ".flac", ".aiff"):
            name = path.stem.lower().removeprefix("ee_").removeprefix("808_")
            for label, pattern in _DRUMS.items():
                if re.search(pattern, name):
                    yield path, label, path.parent.name
                    break


def _cries(place: Path) -> Named:
    """What the characters of a game shout when they jump, fall, drown, gasp, are hurt, die or taunt."""
    events = {"death": "death", "drown": "drown", "fall": "fall", "gasp": "gasp", "jump": "jump", "pain": "pain", "taunt": "taunt"}  # fmt: skip
    for package in ("openarena-data", "openarena-081-players"):
        for path in _files(place / package, ".wav", ".ogg"):
            if path.parent.parent.name == "player":
                for start, label in events.items():
                    if path.stem.lower().startswith(start):
                        yield path, label, path.parent.name


def _packs(place: Path) -> Named:
    """Fifteen voices of a game saying the same phrases: the phrase is the group."""
    for path in _files(place / "hedgewars-data/usr/share/games/hedgewars/Data/Sounds/voices", ".ogg"):  # fmt: skip
        yield path, path.parent.name, re.sub(r"\d+$", "", path.stem)


def _fish(place: Path) -> Named:
    """Two fish in two languages, four voices; the level of the game is the group."""
    for language in ("cs", "nl"):
        folder = place / f"fillets-ng-data-{language}/usr/share/games/fillets-ng/sound"
        for path in _files(folder, ".ogg"):
            found = re.search(r"(^|-)([mv])-", path.stem)
            if found:
                yield path, f"{language}-{found.group(2)}", path.parent.parent.name


def _letters(place: Path) -> Named:
    """Vowels named in the alphabets of many languages; the language is the group."""
    for path in _files(place / "klettres-data/usr/share/klettres", ".ogg"):
        if path.parent.name == "alpha":
            found = re.fullmatch(r"([a-z])(-?\d)?", path.stem)
            if found:
                yield path, found.group(1), path.parent.parent.name


SOURCES = {
    "vowels": Source(("klettres-data",), _vowels, "5 vowels in syllables, 3 speakers", "consonant"),
    "malayalam": Source(
        ("klettres-data",), _malayalam, "vowels in Malayalam syllables, 1 speaker", "consonant", 2.5
    ),
    "drums": Source(
        ("hydrogen-drumkits", "hydrogen-data"), _drums, "hits of drum kits, 6 kinds", "kit"
    ),
    "cries": Source(
        ("openarena-data", "openarena-081-players"), _cries, "7 events in a game", "character"
    ),
    "packs": Source(("hedgewars-data",), _packs, "voices of a game", "phrase"),
    "fish": Source(
        ("fillets-ng-data-cs", "fillets-ng-data-nl"), _fish, "4 voices of a game", "level"
    ),
    "letters": Source(("klettres-data",), _letters, "letters of the alphabet", "language"),
}


def _initials() -> tuple[list[Tensor], list[str], list[str]]:
    """The shipped syllables by how they begin; the group is how they go on."""
    everything = read_syllables()
    starts = "".join(map(chr, range(0x3105, 0x311A)))  # bopomofo
    labels = [each[0] if each[0] in starts else "none" for each in everything.syllables]
    groups = [each.lstrip(starts) or each for each in everything.syllables]
    return everything.waves, labels, groups


def read_set(name: str, cache: Path) -> SmallSet:
    """A set by name, decoded once and kept in the cache.

    Clips are cut to a second (to two and a half where they begin with silence), and there are at most 500, drawn with a fixed seed; classes of fewer than
    eight are left out.
    """
    file = cache / "decoded" / f"{name}.npz"
    if not file.is_file():
        if name == "initials":
            waves, labels, groups = _initials()
        else:
            source = SOURCES[name]
            waves, labels, groups = _decoded(source.read(unpacked(source.packages, cache)))
        chosen = _chosen(labels)
        file.parent.mkdir(parents=True, exist_ok=True)
        longest = round(RATE_HZ * (SOURCES[name].seconds if name in SOURCES else 1.0))
        cut = [waves[i][:longest].numpy() for i in chosen]
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            samples=np.concatenate(cut),
            lengths=np.array([len(each) for each in cut]),
            labels=np.array([labels[i] for i in chosen]),
            groups=np.array([groups[i] for i in chosen]),
        )
        partial.replace(file)
    with np.load(file) as found:
        ends = np.cumsum(found["lengths"])[:-1]
        waves = [torch.from_numpy(each.copy()) for each in np.split(found["samples"], ends)]
        return SmallSet(name, waves, found["labels"].tolist(), found["groups"].tolist())


def _decoded(named: Named) -> tuple[list[Tensor], list[str], list[str]]:
    waves, labels, groups = [], [], []
    for path, label, group in named:
        try:
            wave = load(path, sample_rate_hz=RATE_HZ, dtype="int16", truncated="keep").wave
        except AudioError:  # the packages have some that are empty
            continue
        if len(wave) >= RATE_HZ // 20 and bool(wave.any()):
            waves.append(wave)
            labels.append(label)
            groups.append(group)
    return waves, labels, groups


def _chosen(labels: list[str]) -> list[int]:
    counts = Counter(labels)
    places = [i for i, label in enumerate(labels) if counts[label] >= FEWEST]
    return sorted(random.Random(0).sample(places, min(MOST_CLIPS, len(places))))


def folds_by_group(groups: list[str], labels: list[str], count: int, seed: int) -> list[int]:
    """The fold of each clip, whole groups in one: the largest first, each where its labels are fewest."""
    rng = random.Random(seed)
    names = sorted(set(groups))
    rng.shuffle(names)
    inside = {name: Counter() for name in names}
    for group, label in zip(groups, labels, strict=True):
        inside[group][label] += 1
    names.sort(key=lambda name: -inside[name].total())
    held = [Counter() for _ in range(count)]
    fold_of = {}
    for name in names:

        def crowded(fold: int, name: str = name) -> tuple[float, int]:
            alike = sum(held[fold][label] * n for label, n in inside[name].items())
            return alike / inside[name].total(), held[fold].total()

        fold_of[name] = min(range(count), key=crowded)
        held[fold_of[name]].update(inside[name])
    return [fold_of[group] for group in groups]
