"""The clips of a training run: drawn when it begins, and found again by what it wrote down then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import DataConfig
from .data import Data, missing_classes, read_data, read_parts, reading_notes
from .data.contents import UNREADABLE, clip_names, content_marks
from .data.split_file import SPLIT, Clips, Split, SplitError, examples, match, read_head, take
from .labels import LabelSet, read_labels
from .training.logs import say
from .training.processes import is_first

_OLD = (
    "this run has no split.jsonl (it was begun by an older version): what it holds out is drawn again from "
    "the data as they are now, which is the same only if no clip was added, removed or renamed since"
)


class RunClips(NamedTuple):
    """What a run is trained and evaluated on, and that as it is written down (by one process)."""

    data: Data
    held: Data | None
    split: Split | None


def run_clips(
    plan: dict[str, Any],
    stored: Path | None = None,
    same: Path | None = None,
    of: Path | None = None,
) -> RunClips:
    """The clips of a run that begins, or goes on.

    Args:
        plan: its run.json.
        stored: its own split file, for one that goes on.
        same: split file of an earlier run with the same split, which is used again.
        of: split file of an earlier run that is to have the same clips, perhaps on other sides.

    Raises:
        SplitError: clips are not what they were.
    """
    if stored is not None and stored.is_file():
        return _found(plan, stored, "begin another run")
    if stored is None and same is not None and plan.get("draw", 1) > 1:
        return _found(plan, same, "begin all of the runs again")
    if stored is not None:
        say(f"  {_OLD}")
    data, held = drawn(plan)
    split = None
    if stored is None and _writes():
        split = Split.of(data, held, _facts(plan, data, held))
        _tell_shared(split)
        if of is not None:
            _check_same(split, Split.read(of), of)
    return RunClips(data, held, split)


def held_clips(plan: dict[str, Any], file: Path) -> Data | None:
    """What a run holds out, as it was when the run began; None if it holds nothing out.

    Args:
        plan: its run.json.
        file: its split file.

    Raises:
        SplitError: clips are not what they were.
    """
    if not file.is_file():
        say(f"  {_OLD}")
        return drawn(plan)[1]
    split = Split.read(file)
    if split.held is None:
        return None
    data = _everything(plan, plan["eval_data"], split.classes)
    also = None if plan["eval_data"] else split.train
    advice = "or give --eval-data for other clips"
    return _taken(split, [split.held], data, file, advice, also)[0]


def drawn(plan: dict[str, Any]) -> tuple[Data, Data | None]:
    """The clips of a run as they are read and drawn now: to train on, and to evaluate on."""
    root, table, how = _reading(plan)
    path = Path(plan["data"])
    if plan["eval_data"] and how.fold is not None:
        raise ValueError(
            f"fold={how.fold} and --eval-data both say what to evaluate on: leave one out"
        )
    if not plan["eval_data"]:
        # runs of several seeds are measured on the same clips
        seed = plan.get("holdout_seed", plan["settings"]["train"]["seed"])
        data, held = read_parts(
            *(path, root, table, how), holdout=plan["holdout"], seed=seed, draw=plan.get("draw", 1)
        )
    else:
        data = read_data(path, root, None, table, how)
        # the part that is trained on is no part of another set
        how = how.replace(layout="auto", split=None)
        held = read_data(Path(plan["eval_data"]), root, data.classes, table, how)
    parts = (data,) if held is None else (data, held)
    for note in dict.fromkeys(note for part in parts for note in reading_notes(part)):
        say(f"  {note}")
    for purpose, part in zip(("train", "evaluate"), parts, strict=False):
        if part.splits is not None:
            say(f"  parts to {purpose} on: {', '.join(sorted(set(part.splits)))}")
    for note in missing_classes(data, held):
        say(f"  {note}")
    return data, held


def _reading(plan: dict[str, Any]) -> tuple[Path | None, LabelSet | None, DataConfig]:
    table = read_labels(plan["labels"]) if plan["labels"] else None
    return plan["root"] and Path(plan["root"]), table, DataConfig.from_dict(plan.get("how", {}))


def _everything(plan: dict[str, Any], apart: str | None, classes: Sequence[str]) -> Data:
    """All clips of a run's set, or of the one that it is evaluated on, with the classes found there."""
    root, table, how = _reading(plan)
    how = how.replace(fold=None, split=how.split or "all")
    if apart:
        how = how.replace(layout="auto", split=None)
    return read_data(Path(apart or plan["data"]), root, None, table, how)


def _found(plan: dict[str, Any], file: Path, advice: str) -> RunClips:
    split = Split.read(file)
    if plan["eval_data"] and split.held is not None:
        sources = (None, plan["eval_data"])
        data, held = (
            _taken(split, [part], _everything(plan, apart, split.classes), file, advice)[0]
            for apart, part in zip(sources, (split.train, split.held), strict=True)
        )
        return RunClips(data, held, split)
    parts = [split.train] if split.held is None else [split.train, split.held]
    found = _taken(split, parts, _everything(plan, None, split.classes), file, advice)
    return RunClips(found[0], found[1] if len(found) > 1 else None, split)


def _taken(
    split: Split,
    parts: Sequence[Clips],
    data: Data,
    file: Path,
    advice: str,
    also: Clips | None = None,
) -> list[Data]:
    """The clips of some parts of a split, found in the set."""
    wanted = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    if tuple(data.classes) != split.classes and data.values is not None:
        raise SplitError(
            f"{file}: the numbers to predict are {', '.join(data.classes)}: expected "
            f"{', '.join(split.classes)}, as when the run began"
        )
    found = match(
        wanted,
        split.classes,
        data,
        also=also,
        parts=split.facts.get("parts"),
        verify=_writes(),
    )
    problems = found.problems()
    if problems:
        raise SplitError(
            f"{file}: the clips are not what they were when the run began: {'; '.join(problems)}; put "
            f"them back, {advice}"
        )
    for note in found.notes():
        say(f"  {note}")
    taken, begin = [], 0
    for part in parts:
        places = found.places[begin : begin + len(part)]
        taken.append(take(data, places, part, split.classes))
        begin += len(part)
    return taken


def _writes() -> bool:
    """Whether this process reads the bytes of all clips: one of a run's does."""
    return is_first() and os.environ.get("LOCAL_RANK", "0") == "0"


def _facts(plan: dict[str, Any], data: Data, held: Data | None) -> dict[str, Any]:
    """What is written at the head of a split, for people, and which parts of the set were used."""
    named = [part.splits for part in (data, held) if part is not None and part.splits is not None]
    names = ("data", "eval_data", "holdout", "holdout_seed", "draw")
    return {
        **{name: plan.get(name) for name in names},
        "parts": sorted({name for splits in named for name in set(splits)}) or None,
    }


def _tell_shared(split: Split) -> None:
    shared = split.shared()
    if shared:
        say(
            f"  {len(shared)} of {len(split.held or ())} clips to evaluate on have the same bytes as a "
            f"clip to train on: {examples(list(map(repr, shared)))}"
        )


def _check_same(split: Split, earlier: Split, file: Path) -> None:
    """Several runs (folds) are to be of one set of clips."""
    now, then = ({*zip(s.all.names, s.all.marks, strict=True)} for s in (split, earlier))
    if now != then or split.classes != earlier.classes:
        odd = sorted({name for name, _ in now ^ then}) or ["the classes"]
        raise SplitError(
            f"{file}: the clips are not what they were when the first of these runs began: "
            f"{len(odd)} differ: {examples(list(map(repr, odd)))}; put them back, or begin all of the runs "
            "again"
        )


def split_of(model: str | Path) -> Path | None:
    """The split file of the run that a model lies in; None if it lies in none that has one."""
    place = Path(model).resolve()
    if not place.exists():
        return None
    # run/model, run/checkpoints/step-*/model
    for folder in (place, *list(place.parents)[:3]):
        if (folder / SPLIT).is_file():
            return folder / SPLIT
    return None


def trained_on(model: str | Path, data: Data) -> list[str]:
    """What is to be said of clips that a model is evaluated on and was trained on, a line or none."""
    file = split_of(model)
    if file is None:
        return []
    known = set(Split.read(file).train.marks) - {UNREADABLE}
    marks = content_marks(data, range(len(data)))
    places = [place for place, mark in enumerate(marks) if mark in known]
    if not places:
        return []
    names = clip_names(data.select(places[:4]))
    return [
        f"{len(places)} of {len(data)} clips are ones that {str(model)!r} was trained on "
        f"({examples(list(map(repr, names)))}): figures on them say nothing of others; what it held out is "
        f"in {file}"
    ]


def evaluated_alike(models: Sequence[str | Path]) -> bool | None:
    """Whether the runs of some models hold out the same clips; None if one does not say."""
    files = [split_of(model) for model in models]
    if any(file is None for file in files):
        return None
    return len({read_head(file).get("evaluated") for file in files if file is not None}) == 1
