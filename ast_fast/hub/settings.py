"""Settings of transformers' AST (config.json, preprocessor_config.json) as ours, and back."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import LogMelConfig, ProblemType
from .errors import CheckpointError

# ours: theirs, with the defaults transformers leaves out of its files
_SIZES = {
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "fstride": ("frequency_stride", 10),
    "tstride": ("time_stride", 10),
    "input_tdim": ("max_length", 1024),
    "input_fdim": ("num_mel_bins", 128),
}
_FRONTEND = {
    "sample_rate_hz": ("sampling_rate", 16000),
    "num_mel_bins": ("num_mel_bins", 128),
    "num_frames": ("max_length", 1024),
    "mean": ("mean", -4.2677393),
    "std": ("std", 4.5689974),
}
_LARGEST = 10**9  # of any number in these files
# what our model does not do: the only values that are right
_FIXED = {"hidden_act": "gelu", "qkv_bias": True}
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def settings_of_transformers(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for a transformers directory: {"model": ..., "frontend": ...}.

    Raises:
        CheckpointError: config.json is absent, of another architecture, or asks for what AST lacks.
    """
    from .reading import read_json

    file = directory / "config.json"
    if not config:
        raise CheckpointError(
            f"{str(file)!r} does not exist: expected the settings beside the weights"
        )
    if config.get("model_type") != "audio-spectrogram-transformer":
        raise CheckpointError(
            f"{str(file)!r} is of model_type {config.get('model_type')!r}: expected "
            "'audio-spectrogram-transformer'"
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{str(file)!r} has {name}={config[name]!r}: only {value!r} is supported"
            )
    for name in _DROPOUT:
        if config.get(name, 0):
            raise CheckpointError(
                f"{str(file)!r} has {name}={config[name]!r}: the fast model has no dropout; set it to 0"
            )
    model: dict[str, Any] = {
        ours: _number(file, config, theirs, default) for ours, (theirs, default) in _SIZES.items()
    }
    patch = config.get("patch_size", 16)
    sides = patch if isinstance(patch, list) and len(patch) == 2 else [patch, patch]
    for name, side in zip(("patch_fdim", "patch_tdim"), sides, strict=True):
        model[name] = _number(file, {"patch_size": side}, "patch_size", 16)
    hidden = _number(file, config, "intermediate_size", 3072)
    model["mlp_ratio"] = hidden / max(model["embed_dim"], 1)
    model["eps"] = model["head_eps"] = _number(file, config, "layer_norm_eps", 1e-12)
    model["num_prefix_tokens"], model["dead_heads"] = 2, False
    labels = _labels(file, config.get("id2label"))
    if labels is not None:
        model["label_dim"], model["labels"] = len(labels), labels
    else:
        model["label_dim"] = _number(file, config, "num_labels", 2)  # transformers' own default
    if config.get("problem_type") in typing.get_args(ProblemType):
        model["problem_type"] = config["problem_type"]
    # without an extractor's settings nothing tells the normalisation
    frontend = {"num_mel_bins": model["input_fdim"], "num_frames": model["input_tdim"]}
    extractor = directory / "preprocessor_config.json"
    if extractor.is_file():
        values = read_json(extractor)
        frontend = {
            ours: _number(extractor, values, theirs, default)
            for ours, (theirs, default) in _FRONTEND.items()
        }
        if not values.get("do_normalize", True):
            frontend["mean"], frontend["std"] = 0.0, 0.5
        for ours, size in (("num_frames", "input_tdim"), ("num_mel_bins", "input_fdim")):
            if frontend[ours] != model[size]:
                raise CheckpointError(
                    f"{str(extractor)!r} gives {ours}={frontend[ours]} and {str(file)!r} {model[size]}: "
                    "make them equal"
                )
    return {"model": model, "frontend": frontend}


def _number(file: Path, values: Mapping[str, Any], name: str, default: float) -> Any:
    """A number of the kind of the default: sizes are whole and positive."""
    value = values.get(name, default)
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise CheckpointError(
            f"{str(file)!r} has {name}={value!r:.60}: expected a {'whole ' if whole else ''}number"
        )
    if not abs(value) <= _LARGEST:  # NaN, too
        raise CheckpointError(f"{str(file)!r} has {name}={value!r:.60}: no model has such a size")
    if whole and value < 1:
        raise CheckpointError(f"{str(file)!r} has {name}={value}: expected at least 1")
    return value


def _labels(file: Path, id2label: Any) -> tuple[str, ...] | None:
    if not id2label:
        return None
    try:
        by_index = {int(index): str(name) for index, name in id2label.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(file)!r} has an unreadable id2label: expected index to name"
        ) from error
    unnamed = [index for index, name in id2label.items() if not isinstance(name, (str, int))]
    if unnamed:
        raise CheckpointError(f"{str(file)!r} has no name for class {unnamed[0]} in its id2label")
    if sorted(by_index) != list(range(len(by_index))):
        raise CheckpointError(
            f"{str(file)!r} has an id2label with gaps: expected 0 to {len(by_index) - 1}"
        )
    return tuple(by_index[index] for index in range(len(by_index)))


def settings_for_transformers(
    model: Mapping[str, Any], frontend: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Contents of config.json and preprocessor_config.json for our settings.

    Raises:
        ValueError: transformers' AST cannot express the model or its front end.
    """
    if model["num_prefix_tokens"] != 2:
        raise ValueError("num_prefix_tokens=1: transformers' AST always has a distillation token")
    if model["patch_fdim"] != model["patch_tdim"]:
        raise ValueError(
            f"patches of {model['patch_fdim']} x {model['patch_tdim']}: transformers' AST has square ones"
        )
    for name, default in LogMelConfig().to_dict().items():
        if name not in _FRONTEND and frontend.get(name, default) != default:
            raise ValueError(
                f"{name}={frontend[name]!r}: transformers' AST extractor has {default!r}, always"
            )
    names = model["labels"] or tuple(f"LABEL_{index}" for index in range(model["label_dim"]))
    config = {theirs: model[ours] for ours, (theirs, _) in _SIZES.items()}
    config.update(
        architectures=["ASTForAudioClassification"],
        model_type="audio-spectrogram-transformer",
        patch_size=model["patch_fdim"],
        intermediate_size=int(model["embed_dim"] * model["mlp_ratio"]),
        layer_norm_eps=model["eps"],
        id2label={str(index): name for index, name in enumerate(names)},
        label2id={name: index for index, name in enumerate(names)},
        **_FIXED,
        **dict.fromkeys(_DROPOUT, 0.0),
    )
    if model.get("problem_type") is not None:
        config["problem_type"] = model["problem_type"]
    extractor = {theirs: frontend[ours] for ours, (theirs, _) in _FRONTEND.items()}
    extractor.update(
        feature_extractor_type="ASTFeatureExtractor",
        feature_size=1,
        do_normalize=True,
        padding_side="right",
        padding_value=0.0,
        return_attention_mask=False,
    )
    return {"config.json": config, "preprocessor_config.json": extractor}


def as_json(values: Mapping[str, Any]) -> str:
    """Readable JSON with a final newline.

    Raises:
        CheckpointError: a number is NaN or infinite, which JSON lacks.
    """
    try:
        return json.dumps(values, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise CheckpointError(
            f"what is to be written holds NaN or infinity, which JSON lacks ({error}): {values!r:.300}"
        ) from error
