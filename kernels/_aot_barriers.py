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
    source: tuple[str, int, int]  # file, line and column of what it was compiled from


def races(
    ptx: str, num_warps: int, harmless: frozenset[tuple[str, int, int]] = frozenset()
) -> list[Race]:
    """Copies into shared memory that a wait reaches without a barrier; one warpgroup has none.

    Args:
        ptx: of one kernel.
        num_warps: of a block.
        harmless: file, line and column of copies into buffers that no product reads. They are left out
            where copy and wait share a loop: over a loop Triton keeps its buffers apart.

    Raises:
        ValueError: a branch leads to where no label is, or is one whose targets are computed.
    """
    if num_warps <= WARPS_OF_A_GROUP or "wgmma" not in ptx:
        return []
    statements, labels = _parse(ptx)
    following = [_followers(statements, labels, place) for place in range(len(statements))]
    waits = _open_waits(statements, following, num_warps * 32)
    found = []
    for place, statement in enumerate(statements):
        if not _COPY.match(statement.text):
            continue
        reaching = {wait for wait, _ in waits[place]}
        if statement.source in harmless:
            reaching -= _reachable(following, place)
        if reaching:
            lines = max(statements[wait].line for wait in reaching)
            found.append(Race(lines, statement.line, statement.text[:80]))
    return found


def _open_waits(
    statements: list[_Statement], following: list[list[int]], threads: int
) -> list[set[tuple[int, bool]]]:
    """Waits on some path to each statement with no barrier since, and whether the cluster has arrived."""
    before: list[set[tuple[int, bool]]] = [set() for _ in statements]
    pending = list(range(len(statements)))
    while pending:
        place = pending.pop()
        after = _after(statements[place], place, before[place], threads)
        for follower in following[place]:
            if not after <= before[follower]:
                before[follower] |= after
                pending.append(follower)
    return before


def _after(
    statement: _Statement, place: int, waits: set[tuple[int, bool]], threads: int
) -> set[tuple[int, bool]]:
    text = statement.text
    if text.startswith("wgmma.wait_group"):
        return waits | {(place, False)}
    # not all warps need be at a barrier that a predicate guards
    if not statement.predicated:
        if _BLOCK_BARRIER.match(text) and _threads_of(text) in (None, threads):
            return set()
        if text.startswith("barrier.cluster.arrive"):
            return {(wait, True) for wait, _ in waits}
        if text.startswith("barrier.cluster.wait"):
            return {(wait, arrived) for wait, arrived in waits if not arrived}
    return waits


def _reachable(following: list[list[int]], place: int) -> set[int]:
    """Statements that may come after the one at `place`."""
    found: set[int] = set()
    pending = list(following[place])
    while pending:
        if (follower := pending.pop()) not in found:
            found.add(follower)
            pending += following[follower]
    return found


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
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', ptx, re.MULTILINE))
    # positions in the source end without a semicolon, unlike everything else
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+).*$", r"\t.loc \1 \2 \3;", ptx, flags=re.M)
    # the parameters stand in parentheses before the body, so the first brace is the body's
    body = ptx.index("{", ptx.index(".entry"))
    line = ptx.count("\n", 0, body) + 1
    statements: list[_Statement] = []
    labels: dict[tuple[tuple[int, ...], str], int] = {}
    scope: tuple[int, ...] = ()
    blocks, text = 0, ""
    source = ("", 0, 0)
    for token in re.findall(r"\n|[{};]|[^{};\n]+", ptx[body + 1 :]):
        line += token == "\n"
        while label := re.match(r"\s*([$\w]+):(?!:)", text):
            labels[scope, label.group(1)] = len(statements)
            text = text[label.end() :]
        # operands may stand in braces, but always within a statement
        outside = not text.strip()
        if token == ";":
            if text.strip().startswith(".loc "):
                file, row, column = text.split()[1:4]
                source = (files.get(file, ""), int(row), int(column))
            elif not outside:
                statements.append(_statement(text, line, scope, source))
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


def _statement(
    text: str, line: int, scope: tuple[int, ...], source: tuple[str, int, int]
) -> _Statement:
    words = " ".join(text.split())
    predicate = re.match(r"@!?[%$\w]+ ", words)
    bare = words[predicate.end() :] if predicate else words
    return _Statement(line, bare, bool(predicate), scope, source)
