"""What result files of tuning runs say the tables should be, in words and, if asked, written into kernels/tuned.

The machine that measured need not be the one that writes: only its result files come back.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import environment, record, tune_table
from .tune_case import TOKENS, label
from .tune_pick import Evidence, changes, same, uses
from .tune_slots import clips, committed


class Report:
    """Picks of result files.

    Raises:
        ValueError: a file is none of a GPU, of a dry run, or they are of different GPUs.
    """

    def __init__(self, files: Sequence[Path], ops: Sequence[str], *, dry_run: bool = False) -> None:
        contents = [(path, _read(path, dry_run)) for path in files]
        rows = [row for _, content in contents for row in content["rows"]]
        about = [(content["environment"], path.name) for path, content in contents]
        names = {facts["device_name"] for facts, _ in about}
        wanted = [row for row in rows if row.get("tune") and row["tune"]["op"] in ops]
        self.found = Evidence(wanted)
        capabilities = self.found.capabilities
        if len(names) > 1 or len(capabilities) > 1:
            raise ValueError(
                f"the files are of different GPUs ({', '.join(sorted(names))}): give those of one"
            )
        self.capability = min(capabilities, default=0)
        self.notes = _notes(wanted, about)
        facts = about[0][0]
        self._multiprocessors = int(facts.get("multiprocessors") or 1)
        date = max(facts["date"] for facts, _ in about)[:10]
        self.origin = f"{names.pop()} on {date}: {', '.join(name for _, name in about)}"
        known = {place: committed(place, self.capability) for place in self.found.places()}
        self.stale = [
            place
            for place, entries in known.items()
            if not same(entries[:1], [self.found.committed[place]])
        ]
        self.changes = changes(self.found, known)
        decided = uses(self.found, self.changes, self._grid)
        # our time is over that of a configuration that the table no longer has
        gone = {place.op for place in self.stale}
        self.uses = [use for use in decided if use.key[0] not in gone]
        self._tables = {place.op: tune_table.read(place.op) for place in self.found.places()}

    def _grid(self, size: str, width: int) -> str:
        from ast_fast.kernels import _use

        pairs = clips("attention", size) * (768 // width)
        return _use.grid(TOKENS, pairs, self._multiprocessors)

    def text(self) -> str:
        """What was found, a line each."""
        lines = list(self.notes)
        for place in self.stale:
            lines.append(f"{place.label}: the table has changed since it was measured; left alone")
        picked = {change.place: change for change in self.changes}
        for place in self.found.places():
            change = picked.get(place)
            if change is None:
                tried = max(0, len(self.found.ours(place, "large")) - 1)
                lines.append(f"{place.label}: stays ({tried} others measured)")
            elif change.entries is None:
                lines.append(f"{place.label}: goes; {change.why}")
            else:
                entries = "; ".join(map(label, change.entries))
                lines.append(f"{place.label}: {entries} ({change.why})")
        for use in self.uses:
            before = tune_table.current_use(self._tables[use.key[0]], self.capability, use)
            what = " ".join((*use.key, use.size or "")).strip()
            said = "stays" if before == use.name else f"from {before} to"
            lines.append(f"use {what}: {said} {use.name} ({use.why})")
        if not self.found.places():
            lines.append("no committed configuration was measured: nothing can be picked")
        return "\n".join(lines)

    def write(self) -> str:
        """Put the picks into the tables; what was written, a line each."""
        lines = []
        for op, table in self._tables.items():
            made, chosen = tune_table.named(op, self.changes, self.uses)
            chosen = [
                use
                for use in chosen
                if tune_table.current_use(table, self.capability, use) != use.name
            ]
            if not made and not chosen:
                continue
            changed = tune_table.with_changes(table, self.capability, made, chosen, self.origin)
            path = tune_table.path_of(op)
            before = path.read_text(encoding="utf-8")
            path.write_text(tune_table.text(changed, before), encoding="utf-8")
            lines.append(f"written: {path.parent.name}/{path.name}")
        if not lines:
            return "nothing to write: the tables say it already"
        return "\n".join([*lines, "run the tests of tests/aot on them"])


def _read(path: Path, dry_run: bool) -> dict[str, Any]:
    content = record.read(path)
    if dry_run:
        return content
    if content["settings"].get("dry_run"):
        raise ValueError(f"{path.name} is of a dry run: its times say nothing")
    if content["environment"]["device"] != "cuda":
        raise ValueError(f"{path.name} was measured on a CPU: tables are of GPUs")
    return content


def _notes(
    rows: Sequence[dict[str, Any]], about: Sequence[tuple[dict[str, Any], str]]
) -> list[str]:
    """What a reader must know before believing the picks."""
    notes = []
    here, changed = environment.commit()
    for facts, name in about:
        if facts["commit"] != here or changed or facts.get("uncommitted_changes"):
            state = " with changes" if facts.get("uncommitted_changes") else ""
            now = f"{here} with changes" if changed else here
            notes.append(
                f"note: {name} was measured on commit {facts['commit']}{state}, this is {now}"
            )
    states = collections.Counter(row["status"] for row in rows if row["status"] != "ok")
    if states:
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        notes.append(f"note: rows that do not count: {counts}")
    return notes
