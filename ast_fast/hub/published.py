"""The checkpoints that the original's authors published, which carry no settings, by their names.

Source: README of the original repository. Strides are in the names (`audioset_12_12_0.4467.pth`);
length, classes and normalisation are those of the recipe that made the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import NORMALISATION


class Published(NamedTuple):
    """What a name says.

    Attributes:
        model: settings of `ModelConfig`.
        mean, std: of the log-mel energies it was trained on.
    """

    model: dict[str, Any]
    mean: float
    std: float


_FIGURES = {
    "audioset": "10_10_0.4593 10_10_0.4495 10_10_0.4483 10_10_0.4475 12_12_0.4467 14_14_0.4431 16_16_0.4422",
    "audioset_bal": "10_10_0.3499",
    "speechcommands": "10_10_0.9812",
}
_RECIPES = {  # classes, frames, task, statistics
    "audioset": (527, 1024, "multi_label_classification", "audioset"),
    "audioset_bal": (527, 1024, "multi_label_classification", "audioset"),
    "speechcommands": (35, 128, "single_label_classification", "speechcommands"),
}


def _table() -> dict[str, Published]:
    found = {}
    for recipe, names in _FIGURES.items():
        classes, frames, task, statistics = _RECIPES[recipe]
        for name in names.split():
            fstride, tstride, _ = name.split("_")
            model: dict[str, Any] = {
                **{"label_dim": classes, "input_fdim": 128, "input_tdim": frames},
                **{"fstride": int(fstride), "tstride": int(tstride), "num_heads": 12},
                "problem_type": task,
            }
            found[f"{recipe}_{name}"] = Published(model, *NORMALISATION[statistics])
    # as the original's own code names its download
    found["audioset_0.4593"] = found["audioset_10_10_0.4593"]
    return found


PUBLISHED = _table()
# a browser's second download is called "audioset_10_10_0.4593 (1).pth"
_STEM = re.compile(r"([a-z_]+(?:\d+_\d+_)?0\.\d{4})(?: ?\(\d+\))?\.(?:pth|pt|bin|safetensors)")
_BASE_WIDTH, _BASE_DEPTH = 768, 12


def published(file: str | Path, state: Mapping[str, Tensor]) -> Published | None:
    """What is known of a published file; None if it is not named like one, or holds something else.

    Args:
        file: its name counts.
        state: our keys.
    """
    match = _STEM.fullmatch(Path(file).name)
    found = PUBLISHED.get(match[1]) if match else None
    if found is None:
        return None
    model = found.model
    f, t = (
        (model[size] - 16) // model[stride] + 1
        for size, stride in (("input_fdim", "fstride"), ("input_tdim", "tstride"))
    )
    expected = {
        "v.pos_embed": (1, 2 + f * t, _BASE_WIDTH),
        "v.patch_embed.proj.weight": (_BASE_WIDTH, 1, 16, 16),
        "mlp_head.1.weight": (model["label_dim"], _BASE_WIDTH),
        f"v.blocks.{_BASE_DEPTH - 1}.norm1.weight": (_BASE_WIDTH,),
    }
    fits = all(key in state and state[key].shape == shape for key, shape in expected.items())
    return found if fits and f"v.blocks.{_BASE_DEPTH}.norm1.weight" not in state else None
