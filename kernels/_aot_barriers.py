"""A barrier between every wgmma wait and the next asynchronous copy: read from a kernel's PTX.

A wgmma wait holds one warpgroup of 4 warps until its own products are done. With more warps a faster
warpgroup may go on to the copy that overwrites a buffer in shared memory while a slower one's product still
reads it, unless all warps of the block meet in between (triton issues 11047 and 11056). `races` walks
over the control flow of a kernel, back-edges of loops included, and names every copy that some path
reaches from a wait without such a meeting.

What counts as one: `bar.sync`, `bar.red` and their `barrier` forms over all threads of the block, and a
cluster barrier whose arrival comes after the wait. What does not: a barrier over some of the threads or
under a predicate, `bar.arrive`, and waiting for an mbarrier, which tells that a copy has landed and nothing of
the other warpgroup. Stores by the threads themselves are left to Triton's own analysis: they go to
scratch that outlives no product, and telling their addresses apart takes more than PTX shows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WARPS_OF_A_GROUP = 4

# What a path has met, from harmless to harmful; where paths meet the worst holds.
_SYNCED, _ARRIVED, _WAITED = range(3)

_COPY = re.compile(r"cp\.async\.(?:c[ag]|bulk(?:\.tensor\.\dd)?)\.shared")
_BLOCK_BARRIER = re.compile(r"bar(?:rier)?(?:\.cta)?\.(?:sync|red)\b")
_ENDS = re.compile(r"(?:ret|exit|trap)\b")


class Race(NamedTuple):
    """A copy that may overwrite what a product still reads."""

    wait_line: int  # of a wait that reaches it, 1 is the first line of the PTX
    copy_line: int
    copy: str


class _Statement(NamedTuple):
    line: int
    text: str  # without its predicate
    predicated: bool
    scope: tuple[int, ...]  # the blocks in braces that it stands in


def races(ptx: str, num_warps: int) -> list[Race]:
    """Copies into shared memory that a wait reaches without a barrier; one warpgroup has none.

    Raises:
        ValueError: a branch leads to where no label is, or is one whose targets are computed.
    """
    if num_warps <= WARPS_OF_A_GROUP or "wgmma" not in ptx:
        return []
    statements, labels = _parse(ptx)
    # state and the wait it comes from, on entry to each statement
    before: list[tuple[int, int]] = [(-1, 0)] * len(statements)
    found: dict[int, Race] = {}
    waiting = [0] if statements else []
    if waiting:
        before[0] = (_SYNCED, 0)
    while waiting:
        place = waiting.pop()
        statement = statements[place]
        state, wait_line = before[place]
        if state != _SYNCED and _COPY.match(statement.text):
            found[place] = Race(wait_line, statement.line, statement.text[:80])
        after = _after(statement, state, wait_line, num_warps * 32)
        for follower in _followers(statements, labels, place):
            if after[0] > before[follower][0]:
                before[follower] = after
                waiting.append(follower)
    return [found[place] for place in sorted(found)]


def _after(statement: _Statement, state: int, wait_line: int, threads: int) -> tuple[int, int]:
    text = statement.text
    if text.startswith("wgmma.wait_group"):
        return _WAITED, statement.line
    # not all warps need be at a barrier that a predicate guards
    if not statement.predicated:
        if _BLOCK_BARRIER.match(text) and _threads_of(text) in (None, threads):
            return _SYNCED, 0
        if text.startswith("barrier.cluster.arrive") and state == _WAITED:
            return _ARRIVED, wait_line
        if text.startswith("barrier.cluster.wait") and state == _ARRIVED:
            return _SYNCED, 0
    return state, wait_line


def _threads_of(barrier: str) -> int | None:
    """How many threads meet at a barrier; None is all of the block, 0 is not known."""
    operands = [word.strip() for word in barrier.partition(" ")[2].split(",")]
    if re.match(r"bar(?:rier)?(?:\.cta)?\.red", barrier):
        # result, barrier, [threads,] predicate
        operands = operands[1:-1]
    if len(operands) < 2:
        return None
    return int(operands[1]) if operands[1].isdigit() else 0


def _followers(
    statements: list[_Statement], labels: dict[tuple[tuple[int, ...], str], int], place: int
) -> list[int]:
    """Statements that may come after the one at `place`."""
    statement = statements[place]
    following = [place + 1] if place + 1 < len(statements) else []
    if statement.text.startswith("brx"):
        raise ValueError(f"line {statement.line}: computed branches are not followed")
    if re.match(r"bra\b", statement.text):
        name = statement.text.split()[-1]
        target = _target(labels, statement, name)
        # a label at the very end has no statement after it
        targets = [target] if target < len(statements) else []
        return targets + (following if statement.predicated else [])
    if _ENDS.match(statement.text) and not statement.predicated:
        return []
    return following


def _target(
    labels: dict[tuple[tuple[int, ...], str], int], statement: _Statement, name: str
) -> int:
    """A label is looked for in the block of its branch, then in those around it."""
    scope = statement.scope
    while (scope, name) not in labels:
        if not scope:
            raise ValueError(f"line {statement.line}: no label {name}")
        scope = scope[:-1]
    return labels[scope, name]


def _parse(ptx: str) -> tuple[list[_Statement], dict[tuple[tuple[int, ...], str], int]]:
    """Statements of the kernel's body, and where each label stands."""
    # positions of lines end without a semicolon, unlike everything else
    ptx = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*$", "", ptx, flags=re.MULTILINE)
    # the parameters stand in parentheses before the body, so the first brace is the body's
    body = ptx.index("{", ptx.index(".entry"))
    line = ptx.count("\n", 0, body) + 1
    statements: list[_Statement] = []
    labels: dict[tuple[tuple[int, ...], str], int] = {}
    scope: tuple[int, ...] = ()
    blocks, text = 0, ""
    for token in re.findall(r"\n|[{};]|[^{};\n]+", ptx[body + 1 :]):
        line += token == "\n"
        while label := re.match(r"\s*([$\w]+):(?!:)", text):
            labels[scope, label.group(1)] = len(statements)
            text = text[label.end() :]
        # operands may stand in braces, but always within a statement
        outside = not text.strip()
        if token == ";":
            if not outside:
                statements.append(_statement(text, line, scope))
            text = ""
        elif token == "{" and outside:
            blocks += 1
            scope = (*scope, blocks)
        elif token == "}" and outside:
            if not scope:
                break
            scope = scope[:-1]
        else:
            text += " " if token == "\n" else token
    return statements, labels


def _statement(text: str, line: int, scope: tuple[int, ...]) -> _Statement:
    words = " ".join(text.split())
    predicate = re.match(r"@!?[%$\w]+ ", words)
    return _Statement(
        line, words[predicate.end() :] if predicate else words, bool(predicate), scope
    )
