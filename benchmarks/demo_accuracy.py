"""What cheaper inference costs in accuracy: the demo's model, trained once, evaluated in every way there is.

    python -m benchmarks.demo_accuracy --out docs/demo_accuracy.json

The model learns the tones of the shipped syllables (15 epochs); its accuracy and loss on unseen syllables are then
measured with packed weights in each precision and with tokens merged. A small model of 27 tokens: it shows that
nothing is broken, and no more than hints at AudioSet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ast_fast import optimize_for_inference
from ast_fast.data.syllables import tone_datasets
from ast_fast.demo import TRAIN, train_tones
from ast_fast.optimized import why_not
from ast_fast.training import evaluate

from .environment import collect

MERGED = (0, 1, 2, 4, 6, 12)  # tokens a block


def ways(model: Any) -> dict[str, Any]:
    """Name to a function that sets the model up; the first leaves it as it was trained."""
    found: dict[str, Any] = {"as trained": lambda: None}
    for precision in ("exact", "bf16", "int8"):
        if why_not(precision) is None:
            found[f"packed {precision}"] = lambda p=precision: optimize_for_inference(model, p)
    for count in MERGED:

        def merge(count: int = count) -> None:
            model.v.runner = None
            model.set_token_merging(count)

        found[f"{count} tokens merged a block"] = merge
    return found


def measured(seed: int, epochs: int) -> list[dict[str, Any]]:
    """One training run, then a row for each way."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train_tones(Path(folder), seed, TRAIN.replace(epochs=epochs), progress=False)
    _, test, _ = tone_datasets(seed)
    rows = []
    for name, set_up in ways(model).items():
        set_up()
        figures = evaluate(model, test, batch_size=64).figures
        tokens = model.token_counts() if "merged" in name else None
        rows.append({"way": name, "seed": seed, "tokens": tokens, **figures})
    return rows


def main() -> None:
    """Train, evaluate, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_accuracy")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    options = parser.parse_args()
    rows = [row for seed in options.seeds for row in measured(seed, options.epochs)]
    for row in rows:
        print(f"{row['way']:26} seed {row['seed']}: {row['accuracy']:.4f}, loss {row['loss']:.4f}")
    content = {"environment": collect("cpu"), "epochs": options.epochs, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
