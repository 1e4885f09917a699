"""What FP8 costs in accuracy: the demo's model trained alike in several precisions, curves beside each other.

    python -m benchmarks.fp8_curve --out fp8_curve                     float32, bfloat16 and fp8, seed 0
    python -m benchmarks.fp8_curve --epochs 40 --seeds 0 1 2 --out DIR

Same clips, weights, order and masks for every precision of a seed. FP8 is the hardware's where there is
a GPU that has it, and emulated with the same roundings on a CPU. Writes `fp8_curve.json` (every logged
loss, the evaluation after each epoch, final accuracies) and `fp8_curve.png` to the folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ast_fast import plots
from ast_fast.config import MonitorConfig
from ast_fast.demo import TRAIN, train_tones
from ast_fast.training.logs import read_log

from .environment import collect

PRECISIONS = ("float32", "bfloat16", "fp8")


def train_once(precision: str, seed: int, epochs: int, check_every: int) -> dict[str, Any]:
    """One run: its curves, its final figures and the checks against the reference on its way."""
    config = TRAIN.replace(
        precision=precision, epochs=epochs, monitor=MonitorConfig(check_every=check_every)
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        _, evaluation = train_tones(Path(folder), seed, config, progress=False)
        log = read_log(Path(folder) / "log.jsonl")
    steps = [row for row in log if row["kind"] == "step"]
    return {
        "precision": precision,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "step": [row["step"] for row in steps],
        "loss": [row["loss"] for row in steps],
        "grad_norm": [row["grad_norm"] for row in steps],
        "evaluations": [
            {"step": row["step"], "accuracy": row["accuracy"], "loss": row["loss"]}
            for row in log
            if row["kind"] == "eval"
        ],
        "checks": [
            {name: row[name] for name in ("step", "logits", "logits_budget", "gradient", "ok")}
            for row in log
            if row["kind"] == "check"
        ],
        "accuracy": evaluation.figures["accuracy"],
        "eval_loss": evaluation.figures["loss"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean final figures of each precision over the seeds."""
    found = {}
    for precision in dict.fromkeys(run["precision"] for run in runs):
        mine = [run for run in runs if run["precision"] == precision]
        tails = [run["loss"][-10:] for run in mine]
        found[precision] = {
            "accuracy": sum(run["accuracy"] for run in mine) / len(mine),
            "eval_loss": sum(run["eval_loss"] for run in mine) / len(mine),
            "train_loss": sum(sum(tail) / len(tail) for tail in tails) / len(mine),
        }
    return found


def main() -> None:
    """Train, write, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_curve")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the PNG")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--check-every", type=int, default=0, help="steps between checks")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        for precision in options.precisions:
            run = train_once(precision, seed, options.epochs, options.check_every)
            print(
                f"{precision:9} seed {seed}: accuracy {run['accuracy']:.4f}, "
                f"loss {run['eval_loss']:.4f}, {run['seconds']:.0f} s",
                flush=True,
            )
            runs.append(run)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": collect("cuda" if torch.cuda.is_available() else "cpu"),
        "model": "ast_mini_p16_s10 on the tones of Mandarin syllables",
        "epochs": options.epochs,
        "summary": summary(runs),
        "runs": runs,
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    (options.out / "fp8_curve.json").write_text(text + "\n", encoding="utf-8")
    (options.out / "fp8_curve.png").write_bytes(plots.precision_curves(runs))
    for precision, figures in content["summary"].items():
        print(precision, "".join(f"  {name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
