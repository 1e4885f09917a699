"""What training runs promise, measured on real processes: the same bits after kill -9, two processes as one, no waiting.

    python -m benchmarks.runs                       all of it (about ten minutes), to a result file
    python -m benchmarks.runs --only resume --kills 12

Real speech laid out as AudioSet is distributed, the recipe `audioset-balanced` on models small enough to wait for. Every
run is a command line as a user gives it, in a process of its own, one thread each.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import record
from .environment import collect
from .record import Row
from .run_process import Run, differing, prepare, sample_set, worst_apart

_BUDGET_LOSS = 1e-3  # what rounding in another order comes to over a run
_BUDGET_END_S = 60.0
_BUDGET_WAIT = 0.05
_PATIENCE_S = 240.0

# a step of a good tenth of a second
KILLED = (
    *("frontend.num_frames=192", "train.epochs=4", "train.batch_size=8"),
    *("train.checkpoint_every=5", "train.warmup_steps=4", "train.warmup=linear"),
)
_MEAN = ("train.average.first_epoch=2", "train.average.last_epoch=4")
_NONE = ("train.average.first_epoch=0", "train.average.last_epoch=0")
_EMA = (*_NONE, "train.average.ema=0.99")
TOGETHER = (
    *("frontend.num_frames=192", "train.epochs=3", "train.batch_size=12"),
    *("train.warmup_steps=4", "train.warmup=linear", "train.precision=float32"),
    *_NONE,
    *(
        "train.augment.mixup=0",
        "train.augment.freq_mask_bins=0",
        "train.augment.time_mask_frames=0",
    ),
)
ENDLESS = (*(s for s in TOGETHER if not s.startswith("train.epochs=")), "train.epochs=2000")


def _row(case: str, shape: dict[str, int], found: float, budget: float, what: str, **more: object) -> Row:  # fmt: skip
    ok = found <= budget
    facts = {
        "dtype": "f32",
        "provider": "ast_fast",
        **more,
        "status": "ok" if ok else "wrong",
        "reason": "" if ok else f"{what}: {found:g}, allowed {budget:g}",
    }
    if not ok:
        facts |= {"ms": None, "ratio": None}
    return Row(
        suite="runs",
        case=case,
        mode="check",
        shape=shape,
        error=float(found),
        budget=budget,
        worst=what,
        **facts,  # type: ignore[arg-type]
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = torch.tensor(values).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def resume(folder: Path, kills: int) -> Iterator[Row]:
    """Killed by SIGKILL at random moments, over and over, and resumed: every tensor as if nothing had been."""
    data = sample_set(folder / "data", clips=96, seconds=2.0)
    variants = (
        ("ddp", 1, 0, "float32", _MEAN),
        ("ddp", 1, 2, "bfloat16", _EMA),
        ("ddp", 2, 0, "float32", _MEAN),
        ("fsdp2", 2, 0, "float32", _EMA),
    )
    for strategy, processes, workers, dtype, average in variants:
        settings = (*KILLED, *average, f"train.num_workers={workers}", f"train.precision={dtype}")
        settings += (f"train.strategy={strategy}",)
        name = f"{strategy}-{processes}-{workers}-{dtype}"
        whole = Run(folder / f"whole-{name}", data, settings, processes)
        whole.finish(_PATIENCE_S)
        taken = Run(folder / f"killed-{name}", data, settings, processes)
        draw, until_step, lost = random.Random(name), [], 0
        step_s = whole.seconds_per_step()
        for _ in range(kills):
            started = time.monotonic()
            before = taken.last_step()
            taken.start()
            if not taken.wait_for_step(before, _PATIENCE_S):
                break  # it had but to end
            until_step.append(1000 * (time.monotonic() - started))
            # anywhere within the steps of two checkpoints
            time.sleep(draw.uniform(0.0, 10 * step_s))
            if not taken.kill():
                break
            lost += taken.last_step() - taken.last_checkpoint()
        taken.finish(_PATIENCE_S)
        yield _row(
            "resume after kill -9" + (", FSDP2" if strategy == "fsdp2" else ""),
            {"kills": len(until_step), "lost": lost, "processes": processes, "workers": workers},
            float(differing(whole, taken)),
            0.0,
            "tensors of the last checkpoint, figures and losses that differ",
            dtype={"float32": "f32", "bfloat16": "bf16"}[dtype],
            ms=_spread(until_step),
            clock="host",
            rounds=len(until_step),
        )


def processes(folder: Path, kills: int) -> Iterator[Row]:
    """Two processes of half the batch are one of the whole; and when one dies, all end."""
    data = sample_set(folder / "data", clips=48, seconds=2.0)
    kinds = {"one": (1, "ddp"), "DDP": (2, "ddp"), "FSDP2": (2, "fsdp2")}
    rounds = []
    for number in range(3):  # in turn, for the sake of the speeds
        runs = {}
        for name, (count, strategy) in kinds.items():
            settings = (*TOGETHER, f"train.strategy={strategy}")
            runs[name] = Run(folder / f"{name}-{number}", data, settings, count, "ast_tiny_p16_s10")
            runs[name].finish(_PATIENCE_S)
        rounds.append(runs)
    one, shape = rounds[0]["one"], {"processes": 2, "B": 12}
    for name in ("DDP", "FSDP2"):
        two = rounds[0][name]
        speeds = [r[name].clips_per_second() / r["one"].clips_per_second() for r in rounds]
        yield _row(
            f"two processes as one, {name}", shape, worst_apart(one.losses(), two.losses()),
            _BUDGET_LOSS, "relative difference of a step's loss",
            ratio=_spread(speeds), clock="host", rounds=len(speeds),
        )  # fmt: skip
        yield _row(
            f"two processes as one, {name}", shape, worst_apart(one.figures(), two.figures()),
            _BUDGET_LOSS, "relative difference of an evaluation's figure",
        )  # fmt: skip
    ends = []
    for number in range(kills):
        run = Run(folder / f"dying-{number}", data, ENDLESS, 2)
        run.start()
        if not run.wait_for_step(0, _PATIENCE_S):
            raise RuntimeError(f"the run that was to be killed ended by itself: {run.said()}")
        ends.append(run.kill_one_process(number % 2, _PATIENCE_S))
    yield _row(
        "a process dies", {"processes": 2, "kills": kills}, max(ends), _BUDGET_END_S,
        "seconds until all had ended", ms=_spread([1000 * s for s in ends]), clock="host", rounds=kills,
    )  # fmt: skip


def loader(folder: Path, kills: int) -> Iterator[Row]:
    """The share of a run's time that steps wait for data, ten-second clips, partners from the whole set."""
    del kills
    files = sample_set(folder / "data", clips=97, seconds=10.0)
    shards = prepare(files, folder / "shards")
    for name, data in (("files", files), ("shards", shards)):
        for model, workers in (("ast_mini_p16_s10", 0), ("ast_mini_p16_s10", 1), ("ast_tiny_p16_s10", 1)):  # fmt: skip
            settings = (
                *("frontend.num_frames=1024", "frontend.num_mel_bins=128", "train.batch_size=12"),
                *_NONE,
                *("train.epochs=2", f"train.num_workers={workers}", "train.precision=float32"),
            )
            run = Run(folder / f"{name}-{model}-{workers}", data, settings, 1, model)
            run.finish(_PATIENCE_S)
            yield _row(
                f"waiting for {name}, {model}",
                {"B": 12, "S": 1024, "workers": workers},
                run.wait_share(),
                # without workers the front end's decoding takes turns with the steps
                _BUDGET_WAIT if workers else 1.0,
                "share of the last epoch spent waiting for data",
                clips_per_second=statistics.median(run.epoch_rates()[1:]),
            )


PARTS: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    "resume": resume,
    "processes": processes,
    "loader": loader,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; exit status 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=tuple(PARTS), help="one part (default: all)")
    parser.add_argument("--kills", type=int, default=8, help="kills of each run (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = collect("cpu")
    content = record.ResultFile(
        suite="runs", environment=environment, settings={"kills": options.kills}
    )
    path = options.json or record.RESULTS / record.file_name(environment, "runs")
    for name in [options.only] if options.only else list(PARTS):
        with tempfile.TemporaryDirectory(prefix=f"runs-{name}-") as folder:
            for row in PARTS[name](Path(folder), options.kills):
                content.rows.append(row)
                content.write(path)
                shape = " ".join(f"{key}={value}" for key, value in row.shape.items())
                print(f"{row.case} [{shape}] {row.worst}: {row.error:g} {row.status}", flush=True)
    print(path)
    return int(any(row.status != "ok" for row in content.rows))


if __name__ == "__main__":
    sys.exit(main())
