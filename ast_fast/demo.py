"""The demo: from recordings to a trained, checked, measured model and a report, in one command.

A small AST learns the four tones of Mandarin from waveforms of one voice, and is tested on
syllables it never heard. While it trains, the reference in float64 runs beside it.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__, backend, plots
from .config import AugmentConfig, LogMelConfig, MonitorConfig, TrainConfig
from .data.dataset import Collate, WaveformDataset
from .data.syllables import SAMPLE_RATE_HZ, tone_datasets
from .frontend import LogMel
from .inference import Failure, Prediction, tag
from .models.registry import create_model
from .report import HtmlReport
from .saliency import attention_picture
from .throughput import compare_throughput
from .training import Trainer
from .training.evaluation import Evaluation
from .training.logs import read_log

TARGET_ACCURACY = 0.975  # mean of three seeds on unseen syllables
FRONT = LogMelConfig(num_mel_bins=64, num_frames=64, sample_rate_hz=SAMPLE_RATE_HZ)
TRAIN = TrainConfig(
    epochs=15,
    batch_size=48,
    lr=5e-4,
    log_every=3,
    augment=AugmentConfig(freq_mask_bins=12, time_mask_frames=12),
    monitor=MonitorConfig(check_every=15),
)
Say = Callable[[str], None]


def measured_front(train: WaveformDataset) -> LogMelConfig:
    """The front end with mean and standard deviation of the training clips' own energies."""
    raw = LogMel(FRONT, num_frames=None, mean=0.0, std=0.5)
    frames = torch.cat([raw(wave[None])[0] for wave in train.waves])
    return FRONT.replace(mean=float(frames.mean()), std=float(frames.std()))


def train_tones(
    run_dir: Path,
    seed: int = 0,
    config: TrainConfig = TRAIN,
    *,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Any, Evaluation]:
    """Train the demo's model on one split and evaluate it on the unseen syllables.

    Args:
        run_dir: for checkpoints and log.
        seed: of the split, the weights, the order and the masks.
        config: the run.
        resume: go on from the newest checkpoint.
        progress: a bar on a terminal, lines elsewhere.

    Returns:
        The model and its evaluation.
    """
    train, test, _ = tone_datasets(seed)
    torch.manual_seed(seed)
    model = create_model(
        "ast_mini_p16_s10",
        num_classes=len(train.classes),
        labels=train.classes,
        frontend_config=measured_front(train),
    )
    trainer = Trainer(
        model,
        train,
        config.replace(seed=seed),
        run_dir,
        eval_set=test,
        resume=resume,
        progress=progress,
    )
    evaluation = trainer.fit()
    assert evaluation is not None
    return trainer.model, evaluation


def run_demo(
    run_dir: Path,
    *,
    seed: int = 0,
    config: TrainConfig = TRAIN,
    resume: bool = False,
    compare_training: bool = False,
    say: Say = print,
    progress: bool = True,
) -> dict[str, Any]:
    """The whole demo; writes `report.html`, `results.json`, `model/` and `plots/` to the run folder.

    Args:
        run_dir: results; an earlier demo there is replaced unless resumed.
        seed: of the split, the weights and the order.
        config: the training run.
        resume: go on after an interruption.
        compare_training: train plain PyTorch alike too, and report its accuracy.
        say: gets one line at a time.
        progress: show progress of the training.

    Returns:
        What results.json holds.
    """
    started = time.perf_counter()
    if not resume:
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    train, test, everything = tone_datasets(seed)
    say(
        f"[1/5] {len(everything.waves)} recordings of spoken Mandarin syllables decoded: "
        f"{len(train)} clips to train on, {len(test)} of syllables that training never hears"
    )
    say(f"[2/5] training an AST from waveforms: {_backends()}")
    model, evaluation = train_tones(run_dir, seed, config, resume=resume, progress=progress)
    trained_in = time.perf_counter() - started
    accuracy = evaluation.figures["accuracy"]
    chance = max(test.labels.count((tone,)) for tone in range(4)) / len(test)
    say(
        f"[3/5] accuracy on unseen syllables: {accuracy:.4f} (most frequent tone: {chance:.2f}), "
        f"{trained_in:.0f} s so far"
    )
    model.save_pretrained(run_dir / "model")
    tagged = _tag_one(run_dir, test, say)
    log = read_log(run_dir / "log.jsonl")
    results: dict[str, Any] = {
        "accuracy": accuracy,
        "chance": chance,
        "seed": seed,
        "evaluation": evaluation.to_dict(),
        "tagged": {"file": tagged.path, "labels": [list(pair) for pair in tagged.labels]},
        "checks": [row for row in log if row["kind"] == "check"],
        "backends": {row["op"]: row["backend"] for row in backend.status()},
        "machine": _machine(),
    }
    say("[5/5] the same work in plain PyTorch, in turns with ours")
    results["throughput"] = _throughput(model, train)
    for row in results["throughput"]:
        ratio = row["ours"]["p50"] / row["plain"]["p50"]
        say(
            f"      {row['what']}: {row['ours']['p50']:.0f} clips/s, plain PyTorch "
            f"{row['plain']['p50']:.0f} ({ratio:.2f}x)"
        )
    if compare_training:
        say("      training plain PyTorch alike")
        shutil.rmtree(run_dir / "plain", ignore_errors=True)
        with backend.use_backend("reference"):
            _, plain = train_tones(
                run_dir / "plain", seed, config.replace(monitor=MonitorConfig()), progress=progress
            )
        results["plain_accuracy"] = plain.figures["accuracy"]
        say(f"      accuracy of plain PyTorch trained alike: {results['plain_accuracy']:.4f}")
    results["seconds"] = time.perf_counter() - started
    (run_dir / "results.json").write_text(
        json.dumps(results, indent=1, allow_nan=False), encoding="utf-8"
    )
    report = _write_report(run_dir, results, log, model, evaluation, test)
    say(f"done in {results['seconds']:.0f} s. Report: {report}")
    return results


def _backends() -> str:
    used = sorted({row["backend"] for row in backend.status()})
    names = {
        "cpp": "C++ kernels",
        "triton": "Triton kernels",
        "sdpa": "PyTorch's fused attention",
        "reference": "plain PyTorch",
    }
    return (
        f"{' and '.join(names[name] for name in used)}, {torch.get_num_threads()} CPU threads; "
        f"the float64 reference checks it every {TRAIN.monitor.check_every} steps"
    )


def _machine() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ast_fast": __version__,
    }


def _tag_one(run_dir: Path, test: WaveformDataset, say: Say) -> Prediction:
    """Write one unseen clip as a file, load the saved model, and label the file."""
    import wave as wave_module

    path = run_dir / "unseen_syllable.wav"
    with wave_module.open(str(path), "wb") as writer:
        writer.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", "not compressed"))
        writer.writeframes(test.waves[0].numpy().astype("<i2").tobytes())
    (result,) = tag([path], run_dir / "model", top_k=3)
    if isinstance(result, Failure):
        raise result.error
    truth = test.classes[test.labels[0][0]]
    say(f"[4/5] tagging {path} (it is {truth}):")
    for name, score in result.labels:
        say(f"      {score:7.2%}  {name}")
    return result


def _throughput(model: Any, train: WaveformDataset) -> list[dict[str, Any]]:
    batch = Collate(len(train.classes))([train[index] for index in range(48)])
    batch = batch.to(next(model.parameters()).device)
    return compare_throughput(model, batch.wave, batch.lengths, batch.targets)


def _pictures_of_attention(model: Any, test: WaveformDataset) -> bytes:
    """One unseen clip of each tone: spectrogram, and where the model looked."""
    chosen = [test.labels.index((tone,)) for tone in range(len(test.classes))]
    batch = Collate(len(test.classes))([test[index] for index in chosen])
    batch = batch.to(next(model.parameters()).device)
    titles = [test.classes[test.labels[index][0]].replace(" (", "\n(") for index in chosen]
    return attention_picture(model, batch.wave, batch.lengths, titles)


def _write_report(
    run_dir: Path,
    results: dict[str, Any],
    log: list[dict[str, Any]],
    model: Any,
    evaluation: Evaluation,
    test: WaveformDataset,
) -> Path:
    speed = {row["what"]: row["ours"]["p50"] / row["plain"]["p50"] for row in results["throughput"]}
    report = HtmlReport(
        "ast_fast: the four tones of Mandarin",
        "A small Audio Spectrogram Transformer, trained from scratch on waveforms of one voice and "
        "tested on syllables it never heard in any tone. The recordings are by ChionMeilin with the "
        "vocal source from Chu Lo (CC-BY-3.0).",
    )
    report.cards(
        [
            (f"{results['accuracy']:.1%}", f"accuracy on {len(test)} unseen clips"),
            (f"{results['chance']:.0%}", "by always naming the most frequent tone"),
            (f"{results['seconds']:.0f} s", "from recordings to this page"),
            (f"{speed['Inference']:.2f}x", "inference against plain PyTorch"),
            (f"{speed['Training step']:.2f}x", "training against plain PyTorch"),
        ]
    )
    report.section("Learning")
    report.picture(
        "training",
        plots.training_curves(log, results["chance"]),
        "Loss and accuracy while training.",
    )
    report.section("What it confuses")
    assert evaluation.confusion is not None
    report.picture(
        "confusion",
        plots.confusion_matrix(evaluation.confusion, test.classes),
        "Clips of unseen syllables: truth in rows, prediction in columns.",
    )
    report.section(
        "Where it looks",
        "One unseen clip of each tone. Attention of the class and distillation tokens, rolled out over "
        "the blocks. The tone is in the pitch contour, which shows in the harmonics at low frequencies.",
    )
    report.picture(
        "attention",
        _pictures_of_attention(model, test),
        "Log-mel spectrograms, and the attention over them.",
    )
    report.section("One file, tagged", f"{results['tagged']['file']}")
    report.table(
        ("label", "probability"),
        [(name, f"{score:.2%}") for name, score in results["tagged"]["labels"]],
    )
    report.section(
        "Is the fast path right?",
        "During training the reference ran in float64 on the same clips and weights. Errors must stay "
        "under their budgets, or the run stops.",
    )
    checks = results["checks"]
    report.picture(
        "checks", plots.check_curves(checks), "Error of the fast path and its budget, by step."
    )
    report.table(
        (
            "step",
            "clips",
            "logits",
            "budget",
            "loss",
            "budget",
            "gradient",
            "budget",
            "seconds",
            "ok",
        ),
        [_check_cells(row) for row in checks],
    )
    report.section(
        "Speed",
        "Batches of 48 clips from waveform to logits, and whole training steps. Plain PyTorch is "
        "torch.fft log-mel, conv2d, scaled_dot_product_attention and linear layers with the same "
        "weights and threads; both run in turns in one process. Bars are medians, whiskers the 20th to "
        "80th percentile.",
    )
    report.picture(
        "throughput",
        plots.throughput_bars(results["throughput"]),
        "Clips a second; more is better.",
    )
    report.section("Machine")
    rows = [(name, value) for name, value in results["machine"].items()]
    rows += [(f"backend of {op}", name) for op, name in results["backends"].items()]
    if "plain_accuracy" in results:
        rows.append(("accuracy of plain PyTorch trained alike", f"{results['plain_accuracy']:.4f}"))
    report.table(("what", "value"), rows)
    return report.write(run_dir / "report.html")


def _check_cells(row: dict[str, Any]) -> tuple[str, ...]:
    cells = [str(row["step"]), str(row["clips"])]
    for error, budget in (
        (row["logits"][1], row["logits_budget"][1]),
        (row["loss_error"], row["loss_budget"]),
        (row["gradient"][1], row["gradient_budget"][1]),
    ):
        cells += [f"{error:.1e}", f"{budget:.1e}"]
    return (*cells, f"{row['seconds']:.2f}", "yes" if row["ok"] else "NO")
