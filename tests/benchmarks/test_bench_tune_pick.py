"""From result files to tables: which rows count, what is picked, what a library is taken for, and what is written."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import record

pytest.importorskip("triton")

from ast_fast.kernels import _tuned, _use, attention_problem
from benchmarks import tune, tune_case, tune_report, tune_slots, tune_table, tuned
from benchmarks.tune_pick import Evidence, Timing, changes, pick
from benchmarks.tune_slots import OPS, Slot

ROOT = Path(__file__).resolve().parents[2]
FORWARD = Slot("attention", ("forward", "16bit", "64"))
DKV = Slot("attention", ("dkv", "16bit", "64"))
DQ = Slot("attention", ("dq", "16bit", "64"))
ONE = Slot("attention", ("one_pass", "16bit", "64"))
SIZES = ("large", "small")


def entry(block_m, block_n, tma=False):
    made = {"block_m": block_m, "block_n": block_n, "num_warps": 4, "num_stages": 2}
    return made | {"tma": True} if tma else made


def row(place, role, time, size="large", *, given=None, provider="", status="ok", **changed):
    """A row as a worker makes it; `time` is over the committed configuration's."""
    about = {"op": place.op, "path": list(place.path), "direction": place.direction, "size": size}
    about |= {"variant": "", "capability": 90, "role": role, "entry": given} | changed
    right = status == "ok"
    spread = {"p20": time * 0.995, "p50": time, "p80": time * 1.005}
    made = record.Row(
        suite="tune",
        case=place.label,
        mode="forward" if place.direction == "forward" else "backward",
        shape={},
        dtype="bf16",
        provider=provider or (tune_case.label(given) if given else role),
        status=status,
        reason="" if right else "a test",
        ms=spread if right else None,
        ratio=spread if right and role != "committed" else None,
        error=0.0,
        budget=1.0,
        tune=about,
    )
    return vars(made)


def measured(place, times, libraries=(), sizes=SIZES, capability=90):
    """Rows of one slot: committed, then pairs of entry and time, then pairs of library and time."""
    rows = []
    lead = tune_slots.committed(place, capability)[0]
    for variant in tune_case.variants(place):
        for size in sizes:
            options = {"size": size, "variant": variant, "capability": capability}
            rows.append(row(place, "committed", 1.0, given=lead, **options))
            rows += [row(place, "candidate", t, given=g, **options) for g, t in times]
            rows += [row(place, "library", t, provider=n, **options) for n, t in libraries]
    return rows


def rest_of(place):
    """The committed entries after the first, as slow as it: a slot is measured whole."""
    return [(given, 1.0) for given in tune_slots.committed(place, 90)[1:]]


def result_file(tmp_path, rows, name="h200-tune-2026-12-01.json", **changed):
    facts = {"device": "cuda", "device_name": "NVIDIA H200", "torch": "2.11.0", "threads": 1}
    facts |= {"commit": "0" * 12, "date": "2026-12-01T00:00:00Z", "packages": {}}
    facts |= {"multiprocessors": 132, "uncommitted_changes": False}
    settings = {"dry_run": changed.pop("dry_run", False)}
    path = tmp_path / name
    made = record.ResultFile(
        suite="tune",
        environment=facts | changed,
        settings=settings,
        rows=[record.Row(**each) for each in rows],
    )
    made.write(path)
    record.read(path)
    return path


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Copies of the tables, which launchers read too."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    for op in OPS:
        (folder / f"{op}.json").write_text(tune_table.path_of(op).read_text())
    monkeypatch.setattr(tune_table, "TABLES", folder)
    monkeypatch.setattr(_tuned, "table", lambda op: json.loads((folder / f"{op}.json").read_text()))
    forget()
    yield folder
    monkeypatch.undo()
    forget()


def forget():
    for cached in (_tuned.family, _tuned.configs, attention_problem.table_configs, tuned.variants):
        cached.cache_clear()
    _use.forget()


def test_the_fastest_large_tile_leads_and_a_smaller_one_must_earn_its_place():
    timings = [
        Timing(entry(128, 64, tma=True), 0.9, 1.0),
        Timing(entry(128, 128, tma=True), 1.0, 1.1),
        Timing(entry(64, 64, tma=True), 1.2, 0.8),
        Timing(entry(128, 64), 1.1, 1.0),
        Timing(entry(64, 64), 1.3, 0.99),
    ]
    assert pick(timings, "block_m") == [
        entry(128, 64, tma=True),
        entry(64, 64, tma=True),
        entry(128, 64),
    ]
    # over keys the tiles are as large as each other: nothing smaller follows
    assert pick(timings, "block_n")[:2] == [entry(128, 64, tma=True), entry(128, 64)]


def test_a_list_without_pointers_is_refused_or_keeps_the_committed_ones():
    only = [Timing(entry(64, 64, tma=True), 1.0, 1.0)]
    with pytest.raises(ValueError, match="without descriptors"):
        pick(only, "block_m")
    known = [entry(128, 64, tma=True), entry(128, 64)]
    assert pick(only, "block_m", known) == [entry(64, 64, tma=True), entry(128, 64)]


def found_changes(rows):
    found = Evidence(rows)
    return changes(found, {place: tune_slots.committed(place, 90) for place in found.places()})


def test_a_faster_candidate_changes_its_place_and_a_slower_one_does_not():
    better, worse = entry(32, 64, tma=True), entry(16, 64, tma=True)
    rest = rest_of(DKV)
    (change,) = found_changes(measured(DKV, [*rest, (better, 0.9), (worse, 1.1)]))
    assert change.entries[0] == better and worse not in change.entries
    # operands that no tensor map can describe keep what they had
    assert any(not each.get("tma") for each in change.entries)
    assert not found_changes(measured(DKV, [*rest, (worse, 1.1)]))
    assert not found_changes(measured(DKV, [*rest, (better, 0.995)])), "noise is no gain"
    unsteady = measured(DKV, [*rest, (better, 0.9)])
    for each in unsteady:
        if each["tune"]["entry"] == better:
            each["ratio"] = {"p20": 0.7, "p50": 0.9, "p80": 1.1}
    assert not found_changes(unsteady), "nor is what one round in five does not show"


def test_a_place_that_changed_since_it_was_measured_is_left_alone():
    better = entry(32, 64, tma=True)
    found = Evidence(measured(DKV, [*rest_of(DKV), (better, 0.5)]))
    known = tune_slots.committed(DKV, 90)
    assert changes(found, {DKV: known})
    assert not changes(found, {DKV: [entry(64, 128, tma=True), *known[1:]]})
    assert not changes(found, {})


@pytest.mark.parametrize("status", ["late", "failed", "wrong", "skipped"])
def test_rows_that_are_not_right_never_change_a_table(status):
    better = entry(32, 64, tma=True)
    rows = measured(DKV, rest_of(DKV))
    wrong = [row(DKV, "candidate", 0.5, size, given=better) for size in SIZES]
    assert found_changes([*rows, *wrong])
    for each in wrong:
        each["status"] = status  # it has a speed, which no result file may say
    assert not found_changes([*rows, *wrong])
    # nor does a right one beside a committed configuration that was not
    rows = [
        row(DKV, "committed", 1.0, size, given=tune_slots.committed(DKV, 90)[0], status=status)
        for size in SIZES
    ]
    rows += [row(DKV, "candidate", 0.5, size, given=better) for size in SIZES]
    assert not found_changes(rows)


def test_a_list_needs_both_sizes_of_grid():
    better = entry(32, 64, tma=True)
    assert not found_changes(measured(DKV, [*rest_of(DKV), (better, 0.5)], sizes=("large",)))


def test_an_entry_that_is_slow_at_one_clip_is_not_taken():
    place = Slot("log_mel", ("power",))
    lead = tune_slots.committed(place, 90)[0]
    other = lead | {"warps": 4}
    rows = measured(place, [(other, 0.8)], sizes=("large",))
    assert found_changes(rows)[0].entries == [other]
    rows += [row(place, "candidate", 1.2, "small", given=other)]
    assert not found_changes(rows)


def test_a_kind_of_product_is_judged_over_all_its_products():
    place = Slot("gemm", ("linear",))
    other = tune_slots.committed(place, 90)[0] | {"stages": 2}
    rows = measured(place, [(other, 0.8)])
    assert found_changes(rows)[0].entries == [other]
    # measured on one of them only
    partly = [r for r in rows if r["tune"]["role"] != "candidate" or r["tune"]["variant"] == "qkv"]
    partly += measured(place, [], [("torch", 1.0)])
    assert not found_changes(partly)


def test_one_pass_goes_where_two_passes_are_faster():
    rows = measured(ONE, rest_of(ONE))
    rows.append(row(ONE, "two passes", 0.9))
    (change,) = found_changes(rows)
    assert change.place == ONE and change.entries is None
    rows[-1] = row(ONE, "two passes", 0.99)
    assert not found_changes(rows)


def report(files, ops=OPS):
    return tune_report.Report(list(files), ops)


def test_use_is_decided_for_each_size_of_grid(tmp_path, tables):
    rows = measured(FORWARD, rest_of(FORWARD), [("sdpa-cudnn", 0.8)], sizes=("large",))
    rows += measured(FORWARD, rest_of(FORWARD), [("sdpa-cudnn", 1.2)], sizes=("small",))
    rows += measured(DKV, rest_of(DKV), [("sdpa-cudnn", 0.5)])
    made = report([result_file(tmp_path, rows)])
    assert {(use.key[1], use.size): use.name for use in made.uses} == {
        ("forward", "full"): "sdpa-cudnn",
        ("forward", "small"): "triton",
    }
    made.write()
    family = json.loads((tables / "attention.json").read_text())["families"]["sm_90"]
    choice = family["use"]["attention"]["forward"]
    assert _use.look_up(choice, "16bit", 64, "full") == "sdpa-cudnn"
    assert _use.look_up(choice, "16bit", 64, "small") == "triton"
    assert _use.look_up(choice, "16bit", 128, "full") == "triton"
    assert _use.problems(family["use"]) == []
    assert "backward" not in family["use"]["attention"]


def test_ours_comes_back_where_it_has_become_faster(tmp_path, tables):
    place = Slot("layer_norm", ("forward", "2"))
    slow = result_file(tmp_path, measured(place, [], [("torch", 0.8)]), "a-tune-1.json")
    report([slow]).write()
    forget()
    assert "torch" in (tables / "layer_norm.json").read_text()
    fast = result_file(tmp_path, measured(place, [], [("torch", 1.3)]), "a-tune-2.json")
    again = report([fast])
    assert "use layer_norm forward: from torch to triton" in again.text()
    again.write()
    family = json.loads((tables / "layer_norm.json").read_text())["families"]["sm_90"]
    assert family["use"]["layer_norm"]["forward"] == "triton"


def test_a_product_is_used_where_it_beats_the_library_everywhere(tmp_path, tables):
    place = Slot("gemm", ("gelu",))
    rows = measured(place, [], [("torch", 1.2)])
    report([result_file(tmp_path, rows)]).write()
    family = json.loads((tables / "gemm.json").read_text())["families"]["hopper"]
    assert family["gelu"]["use"] is True and family["linear"]["use"] is False
    forget()
    for each in rows:
        if each["tune"]["role"] == "library" and each["tune"]["variant"] == "fc1 saved":
            each["ratio"] = {"p20": 0.9, "p50": 0.9, "p80": 0.9}
    report([result_file(tmp_path, rows)]).write()
    family = json.loads((tables / "gemm.json").read_text())["families"]["hopper"]
    assert family["gelu"]["use"] is False


def faster_entry(place):
    """Another configuration of a slot."""
    lead = tune_slots.committed(place, 90)[0]
    name = next(name for name in ("num_stages", "warps") if name in lead)
    return lead | {name: lead[name] * 2}


@pytest.mark.parametrize("op", OPS)
def test_a_result_file_becomes_a_table_that_launches_read(op, tmp_path, tables):
    dtype = "f32" if op == "log_mel" else "bf16"
    places = tune_slots.slots(op, 90, dtype)
    before = json.loads((tables / f"{op}.json").read_text())
    picks = {place: faster_entry(place) for place in places}
    rows = []
    for place in places:
        rest = rest_of(place) if place.is_list else []
        rows += measured(place, [*rest, (picks[place], 0.8)])
    made = report([result_file(tmp_path, rows)])
    written = made.write()
    assert written.splitlines()[0] == f"written: tuned/{op}.json"
    forget()
    after = json.loads((tables / f"{op}.json").read_text())
    for place in places:
        assert tune_slots.committed(place, 90)[0] == picks[place], place.label
    for arch in (75, 80, 86, 89, 100, 103, 120):
        if arch >= min(map(int, before["architectures"])):
            old = before["families"][tune_table.family_of(before, arch)]
            assert after["families"][tune_table.family_of(after, arch)] == old, arch
    name = tune_table.family_of(after, 90)
    assert "NVIDIA H200 on 2026-12-01: h200-tune-2026-12-01.json" in after["measured"][name]
    assert after["origin"].endswith(before["origin"]) and "measured" in after["origin"]
    if op in tuned.OPS:
        shown = [v.entry for v in tuned.variants(90) if v.op == op]
        assert all(entry in shown for entry in picks.values())
    # once written there is nothing left to write, and the file says so
    again = report([result_file(tmp_path, rows)])
    assert again.write().startswith("nothing to write")
    assert "the table has changed since it was measured" in again.text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dry_run": True}, "is of a dry run"),
        ({"device": "cpu"}, "was measured on a CPU"),
    ],
)
def test_files_that_say_nothing_of_a_gpu_are_refused(changed, message, tmp_path, tables, capsys):
    path = result_file(tmp_path, measured(DKV, [(entry(32, 64), 0.5)]), **changed)
    before = {each.name: each.read_text() for each in tables.iterdir()}
    assert tune.main(["--from", str(path), "--write"]) == 2
    assert message in capsys.readouterr().err
    assert {each.name: each.read_text() for each in tables.iterdir()} == before


def test_files_of_two_gpus_are_refused(tmp_path, tables, capsys):
    rows = measured(DKV, rest_of(DKV))
    one = result_file(tmp_path, rows, "a.json")
    two = result_file(tmp_path, rows, "b.json", device_name="NVIDIA B200")
    assert tune.main(["--from", str(one), str(two)]) == 2
    assert "different GPUs (NVIDIA B200, NVIDIA H200)" in capsys.readouterr().err


def test_a_file_of_another_commit_is_said(tmp_path, tables, capsys):
    path = result_file(tmp_path, measured(DKV, [*rest_of(DKV), (entry(32, 64, tma=True), 0.9)]))
    assert tune.main(["attention", "--from", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"note: {path.name} was measured on commit 000000000000" in said
    assert "attention dkv/16bit/64: block_m=32 block_n=64" in said
    assert tune.main(["gemm", "--from", str(path)]) == 1, "nothing of the op asked for"


def test_a_file_without_evidence_changes_nothing(tmp_path, tables, capsys):
    rows = [row(DKV, "candidate", 0.5, given=entry(32, 64), status="late")]
    path = result_file(tmp_path, rows)
    assert tune.main(["--from", str(path), "--write"]) == 1
    assert "rows that do not count: 1 late" in capsys.readouterr().out


def test_other_result_files_stay_as_they_were():
    """Only rows of tuning runs say what they are evidence for."""
    made = record.Row(
        suite="block", case="x", mode="forward", shape={}, dtype="f32", provider="y", status="ok"
    )
    (values,) = record.ResultFile(suite="s", environment={}, settings={}, rows=[made]).to_dict()[
        "rows"
    ]
    assert "tune" not in values


def test_gains_of_kernels_that_run_one_after_the_other_add_up(tmp_path, tables):
    place = Slot("log_mel", ("power",))
    beside = Slot("log_mel", ("mel",))
    rows = measured(place, [(faster_entry(place), 0.9)], [("torch", 0.83)])
    rows += measured(beside, [(faster_entry(beside), 0.9)])
    (use,) = report([result_file(tmp_path, rows)]).uses
    # with both picks ours takes 0.8 of the time
    assert use.key == ("log_mel", "forward") and use.name == "triton"
    assert copy.copy(use).why.startswith("1.03")
