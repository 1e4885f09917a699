"""What `ast-fast compare` does, without loading what only training and models need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .run_compare import (
    compare_runs,
    figure_table,
    seed_table,
    setting_table,
    table_text,
    write_comparison,
)
from .training.logs import say


def compare(folders: Sequence[Path], out: Path) -> int:
    """See `cli.compare`."""
    comparison = compare_runs(folders)
    say(table_text(figure_table(comparison)))
    if comparison.other_clips:
        say(f"  {comparison.other_clips}")
    seeds = seed_table(comparison)
    if seeds is not None:
        say("\nover seeds: mean +- half of the 95 % confidence interval")
        say(table_text(seeds))
    if comparison.different:
        say("\nsettings that differ")
        say(table_text(setting_table(comparison)))
    else:
        say("\nno setting differs but seed and fold")
    say(f"\nreport: {write_comparison(comparison, out)}")
    return 0
