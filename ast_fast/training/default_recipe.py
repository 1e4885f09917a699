"""The recipe of a run that names none: a few numbers of the set in, every setting that differs from its default out."""

from __future__ import annotations

from typing import Any

from ..config import check

PATCH, STRIDE = 16, 10  # frames of a patch of the default model, and from one to the next
MOST_FRAMES = 1024  # ten seconds
_OVERLAPPING = (
    416  # frames up to which patches overlap: twice as many of longer clips would take too long
)
_SMALL_SET = 2000  # clips up to which the smaller model is the better one
_BATCH = 32
# mel bins from one patch to the next: of 64 bins every one is in a patch, with 10 the highest eight are in none
_ROW_STRIDE = 6
_STEPS = 2400  # of a few hundred clips
_FEWEST_EPOCHS, _MOST_EPOCHS = 15, 480


def stride_for(num_frames: int) -> int:
    """Frames from one patch to the next."""
    return STRIDE if num_frames <= _OVERLAPPING else PATCH


def frames_for(wanted: int, patch: int = PATCH, stride: int = STRIDE) -> int:
    """The shortest length of a model that holds so many frames, all of them in patches.

    Args:
        wanted: frames to hear; of more than ten seconds the start.
        patch: frames of a patch.
        stride: frames from one patch to the next.

    >>> frames_for(98), frames_for(3), frames_for(10**6), frames_for(10**6, 16, 16)
    (106, 16, 1016, 1024)
    """
    for name, value, least in (("wanted", wanted, 0), ("patch", patch, 1), ("stride", stride, 1)):
        check(value >= least, f"{name}={value}: expected at least {least}")
    steps = -(-max(0, wanted - patch) // stride)
    return patch + stride * min(steps, max(0, (MOST_FRAMES - patch) // stride))


def default_recipe(
    num_clips: int,
    num_classes: int,
    num_frames: int,
    *,
    num_mel_bins: int = 64,
    loss: str = "cross_entropy",
) -> dict[str, Any]:
    """Settings for training from scratch, as a recipe file would hold them.

    Chosen on two sets of a few hundred clips (see `benchmarks/small_data.py`): many passes with masks, shifts and
    gain, of a model that is small and learns fast.

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
    sizes: dict[str, int] = {}
    if num_clips <= _SMALL_SET:
        sizes |= {"embed_dim": 96, "depth": 3, "num_heads": 3}
    stride = stride_for(num_frames)
    if stride == STRIDE:
        sizes |= {"fstride": _ROW_STRIDE}
    else:
        sizes |= {"tstride": stride, "fstride": stride}
    return {
        "sizes": sizes,
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
                "roll_frames": max(1, num_frames // 20),
                "gain_db": 6.0,
            },
        },
    }
