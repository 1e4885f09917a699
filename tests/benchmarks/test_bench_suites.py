"""The suites on tiny shapes: every case's candidates agree with its oracle, and the command line works."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import harness, models, peers, record, run, steps, suites, timing
from benchmarks.case import Settings
from benchmarks.suites import packed_products, training

NO_PEERS = ("torch", "torch-unfold", "sdpa*", "loop")


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_case_of_a_suite_passes_its_gate(name):
    settings = Settings(
        tiny=True, dtypes=("f32", "bf16"), backend=run.default_backend("cpu"), peers=NO_PEERS
    )
    seen = 0
    for case in suites.load(name, settings):
        rows, _, _ = harness.check(case, settings)
        seen += 1
        for row in rows.values():
            assert row.status == "ok", f"{case.title}: {row.provider}: {row.reason}"
    assert seen >= 2


def test_every_way_to_train_agrees_with_the_oracle_and_learns(monkeypatch):
    for package in ("transformers", "torchaudio"):
        pytest.importorskip(package)
    monkeypatch.setattr(steps, "_LR", 1e-3)
    settings = Settings(tiny=True, dtypes=("bf16",), backend=run.default_backend("cpu"))
    # compiled ways take a minute, and graphs a GPU
    ways = ("one pass", "transformers", "transformers-amp", "original")
    for case in (
        training._way_case(settings, "tiny", 36, 2, "waveform_step", ways),
        training._mode_case(settings, "tiny", 36, 2),
    ):
        left_out = ("graph", "regional")
        kept = [candidate for candidate in case.candidates if candidate.name not in left_out]
        rows, runs, _ = harness.check(dataclasses.replace(case, candidates=tuple(kept)), settings)
        for row in rows.values():
            assert row.status == "ok", f"{case.title}: {row.provider}: {row.reason}"
        for name, step in runs.items():
            losses = [float(step(0)[0]) for _ in range(3)]
            assert losses[0] > losses[1] > losses[2], f"{name}: the weights are not updated"


def test_what_a_recorded_step_keeps_counts_as_its_memory():
    def step(_):
        return ()

    step.memory_mib = 17.5
    assert timing.peak_mib(step, "cpu") == 17.5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_titles_are_unique_in_a_suite(device):
    settings = Settings(device=device, dtypes=("f32", "bf16"), backend="reference")
    for name in suites.SUITES:
        titles = [case.title for case in suites.load(name, settings)]
        assert len(titles) == len(set(titles))


@pytest.mark.parametrize(
    "build", [models.with_transformers("sdpa"), models.with_transformers("eager"), models.with_timm]
)
def test_peer_models_carry_the_same_weights(build):
    library = "timm" if build is models.with_timm else "transformers"
    pytest.importorskip(library)
    state = models.weights("tiny", 36, 2)
    x = torch.randn(2, 36, 128, generator=torch.Generator().manual_seed(1)) * 0.5
    plain = models.plain("tiny", 36, 2, state)
    peer = build("tiny", 36, 2, state).eval()
    torch.testing.assert_close(peer(x), plain(x), rtol=1e-4, atol=1e-5)
    for model in (plain, peer):
        model(x).square().sum().backward()
    ours, theirs = models.gradients(plain), models.gradients(peer)
    assert set(ours) == set(theirs) == set(state)
    for key in state:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=1e-3)


def test_flops_of_the_model_agree_with_the_known_count():
    # 130.5 G multiply-adds a 10 s clip for AST-base
    assert models.forward_flops("base", 1024) == pytest.approx(261.03e9, rel=1e-3)
    assert models.num_tokens(1024) == 1214


def test_the_command_line_measures_and_writes_a_file(tmp_path, capsys):
    target = tmp_path / "result.json"
    arguments = ["--suite", "patch_embed", "--device", "cpu", "--quick", "--dtype", "f32"]
    status = run.main([*arguments, "--only", "forward", "--peers", "torch", "--json", str(target)])
    content = record.read(target)
    assert status == 0
    assert [row["provider"] for row in content["rows"]][1:] == ["torch"]
    assert content["settings"]["quick"] is True
    assert "ours is faster by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite", "everything"], "unknown suite everything"),
        (["--peers", "jax"], "unknown peer jax"),
        (["--dtype", "int4"], "unknown int4"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert complaint in capsys.readouterr().err


def test_peer_patterns():
    assert peers.names("all") is None and peers.names(None) is None
    assert peers.names("sdpa*,timm") == ("sdpa*", "timm")
    settings = Settings(peers=("sdpa*",))
    assert settings.wants("sdpa-math") and settings.wants("sdpa") and not settings.wants("torch")


def test_all_tokens_on_a_cpu_are_timed_with_packed_weights(monkeypatch):
    optimized = pytest.importorskip("ast_fast.optimized")
    if run.default_backend("cpu") != "cpp" or optimized.why_not("exact") is not None:
        pytest.skip("this machine packs no weights")
    settings = Settings(tiny=True, dtypes=("f32",), backend="cpp", peers=("all-tokens",))
    case = next(c for c in suites.load("tokens", settings) if c.mode == "forward")
    rows, runs, _ = harness.check(case, settings)
    assert {row.status for row in rows.values()} == {"ok"}
    made = []
    call = optimized.PackedRunner.__call__

    def watched(self, *args):
        made.append(call(self, *args))
        return made[-1]

    monkeypatch.setattr(optimized.PackedRunner, "__call__", watched)
    runs[settings.ours](0)
    assert not made
    runs["all-tokens"](0)
    assert len(made) == 1 and made[0] is not None


def test_freezing_packs_the_weights_of_its_own_candidate_alone():
    config = pytest.importorskip("torch._inductor.config")
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    first, second = (torch.nn.Sequential(torch.nn.Linear(64, 64)).eval() for _ in range(2))

    with torch.no_grad():
        plain, frozen = peers.compiled(first), peers.compiled_frozen(second)
        for _ in range(2):
            torch.testing.assert_close(plain(x), first(x))
            torch.testing.assert_close(frozen(x), second(x))
            assert not config.freezing
        other = peers.compiled(second)
        torch.testing.assert_close(other(x), second(x))
        # a weight that changes is seen by all but the frozen one, which holds it as a constant
        was = second(x)
        second[0].weight.data = torch.zeros_like(second[0].weight)
        assert float((other(x) - second(x)).abs().max()) == 0.0
        torch.testing.assert_close(frozen(x), was)


def test_the_product_of_bytes_multiplies_the_input_that_is_its_turn(monkeypatch):
    module = pytest.importorskip("ast_fast.cpp.packed")
    if run.default_backend("cpu") != "cpp" or module.int8_unsupported() is not None:
        pytest.skip("this machine multiplies no bytes")
    settings = Settings(tiny=True, dtypes=("bf16",), backend="cpp")
    case = next(packed_products.cases(settings))
    inputs = [case.make_inputs(seed) for seed in range(2)]
    product = next(c for c in case.candidates if c.name == "bytes").prepare(inputs)
    multiplied = []
    call = module.Int8Linear.__call__

    def watched(self, levels, zero):
        multiplied.append(levels)
        return call(self, levels, zero)

    monkeypatch.setattr(module.Int8Linear, "__call__", watched)
    for index, given in enumerate(inputs):
        (made,) = product(index)
        assert torch.equal(multiplied[index], module.int8_rows(given["x"])[0])
        exact = torch.nn.functional.linear(given["x"], inputs[0]["w"], inputs[0]["b"])
        assert float((made - exact).norm() / exact.norm()) < 0.05
