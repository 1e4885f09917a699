"""What a run can be asked for beside the usual: parts, scales, averages, teachers, other tasks."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics

from ast_fast import ASTModel
from ast_fast.config import (
    AugmentConfig,
    AverageConfig,
    DistillConfig,
    TrainConfig,
    TuneConfig,
)
from ast_fast.hub import CheckpointError
from ast_fast.training import DivergedError, Trainer, TrainingError, evaluate
from ast_fast.training.averaging import PredictionMean, WeightAverage, swapped
from ast_fast.training.distillation import DistillationLoss, with_teacher
from ast_fast.training.divergence import WINDOW, Divergence
from ast_fast.training.logs import read_log
from ast_fast.training.losses import task_loss, truncated_cross_entropy
from ast_fast.training.metrics import Metrics
from ast_fast.training.optimizers import depth_for_rates, freeze, make_optimizer, rate_of
from ast_fast.training.scaling import FIRST, LossScaler
from ast_fast.training.step import TrainingStep

spec = importlib.util.spec_from_file_location(
    "loop_of_options", Path(__file__).with_name("test_loop.py")
)
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
trainer, model, tones, same, weights = (
    loop.trainer, loop.model, loop.tones, loop.same, loop.weights
)  # fmt: skip
CONFIG = loop.CONFIG.replace(augment=AugmentConfig())

pytestmark = pytest.mark.usefixtures("one_thread")


def step_of(network, parts=1, scaler=None, optimizer="adamw", **options):
    config = TrainConfig(optimizer=optimizer, lr=1e-3)
    named = dict(network.named_parameters())
    made = make_optimizer(named, config, network.config.depth, False)
    step = TrainingStep(network, F.cross_entropy, made, parts=parts, scaler=scaler, **options)
    step.set_lr(1e-3)
    return step


def interrupt(run, at):
    """Run until the step `at` is about to begin."""
    inner = run._train_step

    def stopping(fed, log):
        if run.step == at:
            raise KeyboardInterrupt
        return inner(fed, log)

    run._train_step = stopping
    with pytest.raises(KeyboardInterrupt):
        run.fit()


def batch(rows=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 32, 32, generator=draw), torch.arange(rows) % 2


@pytest.mark.parametrize("parts", [2, 3, 7, 9])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts):
    whole, split = model(), model()
    wanted = step_of(whole)(*batch())
    found = step_of(split, parts)(*batch())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        if a.grad is not None:
            assert float((a.grad - b.grad).norm()) <= 1e-6 * float(a.grad.norm()) + 1e-9


def test_adam_decays_by_l2_and_adamw_apart_as_pytorch_does_one_by_one():
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        config = TrainConfig(optimizer=name, weight_decay=0.1, lr=1e-2, betas=(0.95, 0.999))
        ours, theirs = model(), model()
        made = make_optimizer(dict(ours.named_parameters()), config, 1, False)
        plain = [p for p in theirs.parameters() if name == "adam" or p.dim() in (2, 4)]
        rest = [p for p in theirs.parameters() if not (name == "adam" or p.dim() in (2, 4))]
        groups = [{"params": plain, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        expected = kind([g for g in groups if g["params"]], lr=1e-2, betas=(0.95, 0.999))
        for seed in range(3):
            # gradients that are noise around zero would be divided by their own size
            draw = torch.Generator().manual_seed(seed)
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.grad = torch.randn(a.shape, generator=draw)
                b.grad = a.grad.clone()
            made.step()
            expected.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_layers_nearer_the_input_learn_slower_and_the_head_faster():
    tune = TuneConfig(layer_decay=0.5, head_rate=10.0)
    rates = {
        "v.cls_token": 0.5**4,
        "v.pos_embed": 0.5**4,
        "v.patch_embed.proj.weight": 0.5**4,
        "v.blocks.0.norm1.weight": 0.5**3,
        "v.blocks.2.mlp.fc1.bias": 0.5,
        "v.norm.weight": 1.0,
        "mlp_head.0.weight": 10.0,
        "mlp_head.1.bias": 10.0,
    }
    assert {name: rate_of(name, 3, tune) for name in rates} == rates
    network = model(depth=3)
    named = dict(network.named_parameters())
    made = make_optimizer(named, TrainConfig(tune=tune), 3, False)
    TrainingStep(network, F.cross_entropy, made).set_lr(0.5)
    found = {id(p): float(g["lr"]) for g in made.param_groups for p in g["params"]}
    assert len(found) == len(named)
    for name, parameter in named.items():
        assert found[id(parameter)] == pytest.approx(0.5 * rate_of(name, 3, tune))


def test_layer_decay_is_never_growth():
    tune = TuneConfig(layer_decay=0.7)
    names = [name for name, _ in model(depth=3).named_parameters()]
    # a model that does not say its depth: its names do
    depth = depth_for_rates(names, None, tune)
    assert depth == 3
    assert max(rate_of(name, depth, tune) for name in names) == 1.0
    with pytest.raises(ValueError, match=r"depth=0: v\.blocks\.2\..* of block 3"):
        rate_of("v.blocks.2.norm1.weight", 0, tune)
    for known in (0, 2):
        with pytest.raises(ValueError, match="layers of this model are not known"):
            depth_for_rates(names, known, tune)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (TuneConfig(layer_decay=0.7), r"layer_decay=0\.7: no parameter .* mlp_head\.\*"),
        (TuneConfig(head_rate=3.0), r"head_rate=3: no parameter .* mlp_head\.\*"),
    ],
)
def test_rates_of_layers_that_a_model_does_not_name_are_refused(tune, message):
    names = ["conv.weight", "classifier.weight"]
    with pytest.raises(ValueError, match=message):
        depth_for_rates(names, None, tune)
    with pytest.raises(ValueError, match=r"no parameter is called \*blocks\.N\.\*"):
        depth_for_rates(["conv.weight", "mlp_head.0.weight"], None, TuneConfig(layer_decay=0.7))
    assert depth_for_rates(names, None, TuneConfig()) == 0


def test_a_trainer_counts_the_layers_of_a_model_that_does_not_say_how_many():
    network = model(depth=3)
    silent = torch.nn.Module()  # the same parts, without a config
    silent.v, silent.mlp_head = network.v, network.mlp_head
    config = TrainConfig(tune=TuneConfig(layer_decay=0.5))
    stand_in = SimpleNamespace(model=silent, config=config, _mode="eager")
    made = Trainer._make_optimizer(stand_in, dict(silent.named_parameters()))
    assert sorted({group["rate"] for group in made.param_groups}) == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_a_linear_probe_trains_the_head_alone(tmp_path):
    before = model().state_dict()
    run = trainer(tmp_path, CONFIG.replace(tune=TuneConfig(freeze=("v.*",)), epochs=1))
    run.fit()
    changed = {n for n, v in weights(run).items() if not torch.equal(v, before[n])}
    assert changed == {f"mlp_head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"freeze: 'vv\.\*' matches no parameter"):
        freeze(model(), ("vv.*",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(model(), ("*",))


def test_the_loss_scale_moves_as_pytorchs_own():
    mine = LossScaler(torch.device("cpu"), interval=3)
    scale, tracker = torch.tensor(FIRST), torch.zeros((), dtype=torch.int32)
    for bad in (0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0):
        overflow = torch.tensor(float(bad))
        torch._amp_update_scale_(scale, tracker, overflow, 2.0, 0.5, 3)
        mine.update(overflow)
        assert float(mine.scale) == float(scale) and int(mine.good_steps) == int(tracker)


def test_a_scaled_step_is_the_unscaled_one_and_an_overflow_changes_no_weight():
    plain, scaled = model(), model()
    scaler = LossScaler(torch.device("cpu"))
    wanted = step_of(plain, max_norm=0.1)(*batch())
    step = step_of(scaled, scaler=scaler, max_norm=0.1)
    torch.testing.assert_close(step(*batch()), wanted)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    before = {n: v.clone() for n, v in scaled.state_dict().items()}
    scaler.scale.fill_(2.0**120)
    loss, norm = step(*batch()).tolist()
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert same(before, scaled.state_dict()) and float(scaler.scale) == 2.0**119


def test_a_float16_run_gets_over_overflows_and_resumes_to_the_bit(tmp_path):
    config = CONFIG.replace(precision="float16", epochs=2)
    whole = trainer(tmp_path / "whole", config)
    whole.scaler.scale.fill_(2.0**40)  # far too much for float16
    whole.fit()
    rows = [r for r in read_log(tmp_path / "whole/log.jsonl") if r["kind"] == "step"]
    assert [r for r in rows if "grad_norm" not in r], "no step overflowed"
    assert all(math.isfinite(r["loss"]) for r in rows) and float(whole.scaler.scale) < 2.0**40
    part = trainer(tmp_path / "part", config.replace(checkpoint_every=5))
    part.scaler.scale.fill_(2.0**40)
    interrupt(part, 8)
    rest = trainer(tmp_path / "part", config.replace(checkpoint_every=5), resume=True)
    assert rest.step == 6  # the end of the first epoch
    rest.fit()
    assert same(weights(whole), weights(rest))
    assert float(rest.scaler.scale) == float(whole.scaler.scale)


def test_the_plain_mean_is_that_of_the_epochs_asked_for(tmp_path):
    config = CONFIG.replace(epochs=4, keep_checkpoints=9, average=AverageConfig(first_epoch=2))
    run = trainer(tmp_path, config, eval_set=tones(12, 1))
    result = run.fit()
    run.save_model(tmp_path / "model")
    saved = [
        ASTModel.from_pretrained(folder / "model").state_dict()
        for folder in sorted((tmp_path / "checkpoints").glob("step-*"))
    ]
    assert len(saved) == 4
    found = ASTModel.from_pretrained(tmp_path / "model").state_dict()
    for name, value in found.items():
        mean = torch.stack([each[name].double() for each in saved[1:]]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
    rows = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "average"]
    assert len(rows) == 1 and rows[0]["epochs"] == 3
    trainer(tmp_path, config, network=model(9), eval_set=tones(12, 1), resume=True).fit()
    assert rows == [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "average"]
    assert rows[0]["accuracy"] == result.figures["accuracy"]


def test_an_exponential_mean_follows_its_formula_and_is_what_is_evaluated(tmp_path):
    seen = []
    average = WeightAverage(AverageConfig(ema=0.9))
    expected = None
    for index in range(40):
        value = torch.full((3,), float(index), dtype=torch.float64)
        average.after_step({"w": value})
        decay = min(0.9, (1 + index) / (10 + index))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        seen.append(float(average.weights()["w"][0]))
    assert seen[-1] == pytest.approx(float(expected[0]), rel=1e-5)
    run = trainer(tmp_path, CONFIG.replace(average=AverageConfig(ema=0.99)), eval_set=tones(12, 1))
    figures = run.fit().figures
    run.save_model(tmp_path / "model")
    saved = ASTModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(saved.state_dict(), run.average.weights())
    assert not same(saved.state_dict(), weights(run))
    assert evaluate(saved, tones(12, 1)).figures["loss"] == pytest.approx(figures["loss"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16-master"])
def test_averages_and_predictions_survive_an_interruption_to_the_bit(precision, tmp_path):
    config = CONFIG.replace(
        precision=precision, checkpoint_every=2, average=AverageConfig(ema=0.9, cumulative=True)
    )
    whole = trainer(tmp_path / "whole", config, eval_set=tones(12, 1))
    whole.fit()
    part = trainer(tmp_path / "part", config, eval_set=tones(12, 1))
    interrupt(part, 11)
    rest = trainer(tmp_path / "part", config, network=model(9), eval_set=tones(12, 1), resume=True)
    rest.fit()
    assert same(whole.average.weights(), rest.average.weights())
    assert whole.cumulative.count == rest.cumulative.count == 3

    def evals(name):
        return [r for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "eval"]

    assert evals("whole") == evals("part")
    with pytest.raises(CheckpointError, match="other settings: average="):
        trainer(tmp_path / "part", CONFIG.replace(precision=precision), resume=True)


def test_a_checkpoint_from_before_a_setting_existed_counts_as_its_default(tmp_path):
    trainer(tmp_path, CONFIG.replace(epochs=1)).fit()
    for state in (tmp_path / "checkpoints").glob("step-*/state.json"):
        meta = json.loads(state.read_text())
        for name in ("average", "tune", "distill", "divergence", "optimizer"):
            del meta["state"]["train"][name]
        del meta["state"]["train"]["augment"]["patchout_time"]
        state.write_text(json.dumps(meta))
    again = trainer(tmp_path, CONFIG.replace(epochs=1), resume=True)
    assert again.step == 6
    again.fit()
    with pytest.raises(CheckpointError, match="other settings: optimizer='adamw'"):
        trainer(tmp_path, CONFIG.replace(epochs=1, optimizer="adam"), resume=True)


def test_the_cumulative_ensemble_is_the_mean_of_the_epochs_predictions(tmp_path):
    config = CONFIG.replace(average=AverageConfig(cumulative=True))
    run = trainer(tmp_path, config, eval_set=tones(14, 1))
    predictions, inner = [], run._evaluate

    def keeping(given):
        result = inner(given)
        predictions.append(result.metrics.scores().double().numpy())
        return result

    run._evaluate = keeping
    figures = run.fit().figures
    truth = np.array([label for (label,) in tones(14, 1).labels])
    mean = np.mean(predictions, axis=0)
    assert figures["cumulative_accuracy"] == pytest.approx(np.mean(mean.argmax(1) == truth))
    areas = [sklearn_metrics.roc_auc_score(truth == c, mean[:, c]) for c in (0, 1)]
    assert figures["cumulative_auc"] == pytest.approx(np.mean(areas), abs=1e-6)
    whole = PredictionMean()
    whole.add(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="4 clips were evaluated, 3 in the epochs before"):
        whole.add(torch.zeros(4, 2))


def test_swapped_weights_come_back_to_the_bit_even_after_an_error():
    network = model().bfloat16()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    places = [p.data_ptr() for p in network.parameters()]
    others = {name: torch.randn(value.shape) for name, value in before.items()}
    with pytest.raises(RuntimeError, match="inside"), swapped(network, others):
        torch.testing.assert_close(
            network.state_dict(), {n: v.bfloat16() for n, v in others.items()}
        )
        raise RuntimeError("inside")
    assert same(before, network.state_dict())
    assert places == [p.data_ptr() for p in network.parameters()]


def test_a_teacher_is_weighed_against_the_labels():
    draw = torch.Generator().manual_seed(0)
    logits, said = (torch.randn(5, 3, generator=draw) for _ in range(2))
    labels = torch.tensor([0, 2, 1, 1, 0])
    config = DistillConfig(teacher="t", weight=0.3, temperature=2.0)
    loss = DistillationLoss(F.cross_entropy, "single_label", config)
    found = loss(logits, with_teacher(labels, said))
    p, q = (said / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * 4.0 * divergence
    torch.testing.assert_close(found, expected)
    several = DistillationLoss(F.binary_cross_entropy_with_logits, "multi_label", config)
    targets = (torch.rand(5, 3, generator=draw) < 0.5).float()
    soft = F.binary_cross_entropy_with_logits(logits / 2, (said / 2).sigmoid())
    own = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(
        several(logits, with_teacher(targets, said)), 0.7 * own + 0.3 * 4.0 * soft
    )


def test_a_student_learns_from_a_teacher_alone(tmp_path):
    teacher_run = trainer(tmp_path / "teacher", CONFIG.replace(epochs=12), data=tones(120))
    teacher_run.fit()
    teacher_run.save_model(tmp_path / "teacher" / "model")
    data = tones(120)
    wrong = type(data)(data.waves, [(1 - label,) for (label,) in data.labels], data.classes)
    config = CONFIG.replace(
        epochs=12, distill=DistillConfig(teacher=str(tmp_path / "teacher/model"), weight=1.0)
    )
    run = trainer(tmp_path / "student", config, data=wrong, eval_set=tones(40, 1))
    assert run.fit().figures["accuracy"] >= 0.9  # although every label it saw was wrong
    with pytest.raises(
        ValueError, match=r"distill\.teacher has 2 classes: expected the student's 3"
    ):
        three = type(data)(data.waves, data.labels, ("a", "b", "c"))
        torch.manual_seed(0)
        network = loop.create_model("ast_mini_p16_s10", num_classes=3, **loop.TINY)
        trainer(tmp_path / "three", config, network=network, data=three)


def test_a_run_whose_loss_grows_stops_and_keeps_the_batch(tmp_path):
    watch = Divergence(4.0)
    said = [watch.add(1.0) for _ in range(WINDOW)] + [watch.add(3.9) for _ in range(200)]
    assert not any(said)
    assert any(watch.add(9.0) for _ in range(WINDOW))
    assert Divergence(0.0).add(math.inf) is None
    run = trainer(tmp_path, CONFIG.replace(divergence=2.0))
    run.divergence.load_state({"first": [1e-6] * WINDOW, "recent": [1e-6] * (WINDOW - 1)})
    with pytest.raises(DivergedError, match=r"more than divergence=2 times; the batch is in") as e:
        run.fit()
    assert isinstance(e.value, TrainingError)
    assert list((tmp_path / "bad-batch").glob("step-*.safetensors"))


def test_the_originals_faults_can_be_had():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    mixed = torch.tensor([[0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
    faulty = task_loss(TrainConfig(reproduce=("truncated_labels",)))
    assert faulty is truncated_cross_entropy
    # the mixed clip counts as the first class, the other as what it is
    torch.testing.assert_close(faulty(logits, mixed), F.cross_entropy(logits, torch.tensor([0, 2])))
    torch.testing.assert_close(
        task_loss(TrainConfig())(logits, mixed), F.cross_entropy(logits, mixed)
    )
    found = Metrics(3, "multi_label", on_sigmoids=True)
    truth = (mixed > 0.5).float()
    found.update(logits, truth)
    expected = F.binary_cross_entropy_with_logits(logits.sigmoid(), truth)
    assert found.compute()["loss"] == pytest.approx(float(expected))
    single = Metrics(3, on_sigmoids=True)
    single.update(logits, torch.tensor([1, 2]))
    expected = F.cross_entropy(logits.sigmoid(), torch.tensor([1, 2]))
    assert single.compute()["loss"] == pytest.approx(float(expected))


def test_words_learnt_by_yes_or_no_are_measured_by_accuracy(tmp_path):
    config = CONFIG.replace(
        loss="binary_cross_entropy",
        task="single_label",
        epochs=12,
        augment=AugmentConfig(mixup=0.5),
    )
    run = trainer(tmp_path, config, data=tones(120), eval_set=tones(40, 1))
    result = run.fit()
    assert result.figures["accuracy"] >= 0.95 and result.confusion is not None
    logits, targets = result.metrics.gathered()
    vectors = targets if targets.dim() == 2 else F.one_hot(targets, 2).float()
    expected = F.binary_cross_entropy_with_logits(logits, vectors)
    assert result.figures["loss"] == pytest.approx(float(expected))


def test_d_prime_is_that_of_the_mean_area():
    from scipy.stats import norm

    draw = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(60, 4, generator=draw), torch.rand(60, 4, generator=draw) < 0.3
    found = Metrics(4, "multi_label")
    found.update(logits, truth.float())
    areas = sklearn_metrics.roc_auc_score(truth.numpy(), logits.sigmoid().numpy(), average=None)
    assert found.compute()["dprime"] == pytest.approx(
        math.sqrt(2) * norm.ppf(np.mean(areas)), abs=1e-5
    )


def test_regression_is_measured_as_scikit_learn_does():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 2, generator=draw)
    values = truth + 0.3 * torch.randn(50, 2, generator=draw)
    found = Metrics(2, "regression")
    found.update(values, truth)
    figures, a, b = found.compute(), truth.double().numpy(), values.double().numpy()
    assert figures["r2"] == pytest.approx(sklearn_metrics.r2_score(a, b), abs=1e-12)
    rmse = sklearn_metrics.root_mean_squared_error(a, b)
    assert figures["rmse"] == pytest.approx(rmse, abs=1e-12)
    mae = sklearn_metrics.mean_absolute_error(a, b)
    assert figures["mae"] == pytest.approx(mae, abs=1e-12)
    each = sklearn_metrics.r2_score(a, b, multioutput="raw_values")
    assert found.per_class() == pytest.approx(list(each), abs=1e-12)
    constant = Metrics(1, "regression")
    constant.update(torch.zeros(3, 1), torch.ones(3, 1))
    assert "r2" not in constant.compute()


def test_events_for_tensorboard_hold_what_the_log_holds(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    trainer(tmp_path, CONFIG.replace(tensorboard=True), eval_set=tones(12, 1)).fit()
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "step"]
    found = events.Scalars("step/loss")
    assert [e.step for e in found] == [r["step"] for r in rows]
    assert [e.value for e in found] == pytest.approx([r["loss"] for r in rows])
    assert len(events.Scalars("eval/accuracy")) == 3


def test_smoothed_labels_are_spread_over_all_classes():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 3, 1, 1, 2])
    soft = 0.8 * F.one_hot(targets, 4) + 0.2 / 4
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    loss = task_loss(TrainConfig(label_smoothing=0.2))
    torch.testing.assert_close(loss(logits, targets), expected)
    # labels that mixup has mixed are smoothed alike
    torch.testing.assert_close(loss(logits, F.one_hot(targets, 4).double()), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "expected 0 .off. to below 1"),
        ({"label_smoothing": 0.1, "loss": "binary_cross_entropy"}, "cross_entropy' alone"),
        ({"label_smoothing": 0.1, "reproduce": ("truncated_labels",)}, "cross_entropy' alone"),
    ],
)
def test_label_smoothing_that_would_do_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
