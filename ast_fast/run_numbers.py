"""How well a run predicts numbers: figures of each target, predicted against true values, residuals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._optional import require_package
from .plots import ACCENT, GREY, OURS, _figure, _png

MOST_SHOWN = 6  # targets in the picture
_DENSE = 3000  # clips from which on a point each would be a blot
_BINS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """One target over an evaluation set.

    Attributes:
        name: of the target.
        r2: share of the spread that is explained; NaN where the true values are all the same.
        rmse: root of the mean squared error.
        mae: mean absolute error.
        bias: mean of predicted minus true.
        spread: standard deviation of the true values: the error of always saying their mean.
    """

    name: str
    r2: float
    rmse: float
    mae: float
    bias: float
    spread: float


def fits(
    names: Sequence[str],
    predicted: Tensor,  # [N, K]
    true: Tensor,  # [N, K]
) -> list[Fit]:
    """The figures of each target."""
    found = []
    for name, said, truth in zip(names, predicted.double().t(), true.double().t(), strict=True):
        residuals = said - truth
        squares, total = residuals.square(), (truth - truth.mean()).square()
        r2 = 1.0 - float(squares.sum() / total.sum()) if float(total.sum()) > 0 else math.nan
        found.append(
            Fit(
                name,
                r2,
                math.sqrt(float(squares.mean())),
                float(residuals.abs().mean()),
                float(residuals.mean()),
                math.sqrt(float(total.mean())),
            )
        )
    return found


def scatter(
    names: Sequence[str],
    predicted: Tensor,  # [N, K]
    true: Tensor,  # [N, K]
) -> bytes:
    """Predicted against true values of each target, above what is left over (predicted minus true)."""
    shown = list(enumerate(fits(names, predicted, true)))[:MOST_SHOWN]
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    groups = -(-len(shown) // columns)
    figure, axes = _figure(2 * groups, columns, 1.2 + 3.6 * columns, 6.4 * groups)
    for axis in axes.flat:
        axis.set_visible(False)
    for place, fit in shown:
        group, column = divmod(place, columns)
        top, bottom = axes[2 * group][column], axes[2 * group + 1][column]
        top.set_visible(True)
        bottom.set_visible(True)
        said, truth = predicted[:, place].double(), true[:, place].double()
        low, high = float(min(said.min(), truth.min())), float(max(said.max(), truth.max()))
        margin = 0.04 * (high - low) or 1.0
        _points(top, truth, said)
        top.plot([low, high], [low, high], color=GREY, ls="--", lw=1)
        top.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
        r2 = "none" if math.isnan(fit.r2) else f"{fit.r2:.3f}"
        said_of = f"{fit.name[:32]}\nR2 {r2}, RMSE {fit.rmse:.3g}, MAE {fit.mae:.3g}"
        top.set(title=said_of, xlabel="true", ylabel="predicted")
        residuals = said - truth
        _points(bottom, truth, residuals)
        bottom.axhline(0.0, color=GREY, ls="--", lw=1)
        at, means = _binned(truth, residuals)
        bottom.plot(at, means, color=ACCENT, marker="o", ms=4, lw=1.4, label="mean")
        bottom.set(xlim=top.get_xlim(), xlabel="true", ylabel="predicted - true")
        most = 1.08 * float(residuals.abs().max()) or 1.0
        bottom.set_ylim(-most, most)
        bottom.legend(loc="lower left")
    return _png(figure)


def _points(axis: Any, across: Tensor, up: Tensor) -> None:
    """A point a clip, or how many lie where."""
    if len(across) > _DENSE:
        colours = require_package("matplotlib.colors", "plots", "train")
        shades = colours.LinearSegmentedColormap.from_list("density", ("#bcd9e6", OURS, "#04293a"))
        axis.hexbin(across.tolist(), up.tolist(), gridsize=44, mincnt=1, bins="log", cmap=shades)
        return
    alpha = 0.75 if len(across) < 200 else 0.35
    axis.scatter(across.tolist(), up.tolist(), s=14, color=OURS, alpha=alpha, linewidths=0)


def _binned(true: Tensor, residuals: Tensor) -> tuple[list[float], list[float]]:
    """Mean residual of clips with like true values, an eighth of all at a time."""
    order = true.argsort(stable=True)
    parts = [part for part in order.chunk(min(_BINS, max(1, len(order) // 3))) if len(part)]
    return (
        [float(true[part].mean()) for part in parts],
        [float(residuals[part].mean()) for part in parts],
    )
