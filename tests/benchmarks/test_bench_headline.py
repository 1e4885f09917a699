"""The headline suite: its titles exist, it runs, and its summary says who is faster than whom."""

from __future__ import annotations

import pytest

from benchmarks import suites, table
from benchmarks.case import Settings
from benchmarks.record import Row
from benchmarks.run import default_backend, main
from benchmarks.suites import headline


@pytest.mark.parametrize(
    ("device", "dtypes"), [("cpu", ("f32", "bf16")), ("cuda", ("f32", "bf16"))]
)
def test_every_title_is_a_case_of_its_suite(device, dtypes):
    backend = "triton" if device == "cuda" else "cpp"
    settings = Settings(device=device, backend=backend, dtypes=dtypes)
    found = {
        case.title
        for name in ("inference", "training", "tokens")
        for case in suites.load(name, settings)
    }
    assert sorted(set(headline.TITLES[device]) - found) == []
    assert len(list(headline.cases(settings))) == len(headline.TITLES[device])


def test_it_is_no_part_of_all():
    assert "headline" not in suites.names("all") and suites.names("headline") == ("headline",)


def row(provider, p50, ratio=None, status="ok"):
    spread = dict.fromkeys(("p20", "p50", "p80"), p50) if status == "ok" else None
    return Row(
        suite="headline",
        case="base_features",
        mode="forward",
        shape={"B": 1, "S": 128},
        dtype="f32",
        provider=provider,
        status=status,
        ms=spread,
        ratio=None if ratio is None else dict.fromkeys(("p20", "p50", "p80"), ratio),
    )


def test_the_summary_has_a_line_for_each_peer_that_ran():
    rows = [
        row("ast_fast[cpp]", 2.0),
        row("transformers", 5.0, 2.5),
        row("openvino", 0.0, status="failed"),
    ]
    lines = table.summary(rows).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == [
        *("base_features", "B=1", "S=128", "f32", "2", "ms", "transformers", "2.50x"),
        "(2.50-2.50)",
    ]
    assert table.summary([row("ast_fast[cpp]", 2.0)]).splitlines() == [
        "what  ours  than  ours is faster by"
    ]


def test_the_command_measures_whole_passes(capsys):
    arguments = ["--suite", "headline", "--quick", "--dtype", "f32", "--seconds", "0.1"]
    status = main(
        [*arguments, "--device", "cpu", "--peers", "none", "--backend", default_backend("cpu")]
    )
    said = capsys.readouterr().out
    assert status == 0 and "headline/tiny_features" in said
    assert said.rstrip().splitlines()[-1].startswith(("what", "tiny", "small"))
