"""The recipe of a run that names none: a few numbers of the set in, every setting that differs from its default out."""

from __future__ import annotations

from typing import Any

from ..config import check

PATCH, STRIDE = 16, 10  # frames of a patch of the default model, and from one to the next
MOST_FRAMES = 1016  # ten seconds
_BATCH = 32
_STEPS = 800  # of a few hundred clips
_FEWEST_EPOCHS, _MOST_EPOCHS = 15, 150


def frames_for(wanted: int) -> int:
    """The shortest length of a model that holds so many frames, all of them in patches.

    >>> frames_for(98), frames_for(3), frames_for(10**6)
    (106, 16, 1016)
    """
    check(wanted >= 0, f"wanted={wanted}: expected 0 frames or more")
    steps = -(-max(0, wanted - PATCH) // STRIDE)
    return min(PATCH + STRIDE * steps, MOST_FRAMES)


def default_recipe(
    num_clips: int,
    num_classes: int,
    num_frames: int,
    *,
    num_mel_bins: int = 64,
    loss: str = "cross_entropy",
) -> dict[str, Any]:
    """Settings for training from scratch, as a recipe file would hold them.

    Chosen on small sets (see `benchmarks/small_data.py`): what matters there is many passes with masks, at a rate
    that a small model bears.

    Args:
        num_clips: to train on.
        num_classes: of their labels.
        num_frames: length of the model.
        num_mel_bins: of its front end.
        loss: of the run; labels are smoothed where it is cross-entropy.

    Raises:
        ValueError: a number is below 1.
    """
    numbers = {"num_clips": num_clips, "num_classes": num_classes}
    numbers |= {"num_frames": num_frames, "num_mel_bins": num_mel_bins}
    for name, value in numbers.items():
        check(value >= 1, f"{name}={value}: expected at least 1")
    steps_an_epoch = -(-num_clips // _BATCH)
    epochs = min(max(round(_STEPS / steps_an_epoch), _FEWEST_EPOCHS), _MOST_EPOCHS)
    return {
        "statistics": "measure",
        "train": {
            "epochs": epochs,
            "batch_size": _BATCH,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "warmup_steps": 50,
            "label_smoothing": 0.1 if loss == "cross_entropy" else 0.0,
            "augment": {
                "freq_mask_bins": num_mel_bins // 4,
                "time_mask_frames": num_frames // 4,
                "gain_db": 6.0,
                "roll_frames": max(1, num_frames // 20),
            },
        },
    }
