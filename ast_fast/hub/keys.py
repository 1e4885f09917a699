"""Names of parameters in the dialects of AST checkpoints, and how one becomes another.

Ours are the original's, without the `module.` that DataParallel puts in front. timm's lack the
`v.`; transformers splits q, k and v, and has two styles: that of version 4, which is also what any
version writes to disk, and that of version 5 in memory.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._text import named
from .errors import CheckpointError

_log = logging.getLogger("ast_fast.hub")

State = dict[str, Tensor]

# names that wrappers put between those of modules, at any depth: torch.compile, FSDP, recomputing
_INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# where the names of an AST begin: the original's, transformers' (with or without a head), timm's
_START = r"((?:.*?\.)??)(?:v\.|(?:audio_spectrogram_transformer\.)?embeddings\.)?"
_STARTS = tuple(
    re.compile(_START + tail) for tail in ("cls_token", "pos_embed", "position_embeddings")
)
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
_BASE = "audio_spectrogram_transformer."

# transformers' names outside blocks, without the base prefix
_TOP = {
    "embeddings.cls_token": "v.cls_token",
    "embeddings.distillation_token": "v.dist_token",
    "embeddings.position_embeddings": "v.pos_embed",
    "embeddings.patch_embeddings.projection.weight": "v.patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "v.patch_embed.proj.bias",
    "layernorm.weight": "v.norm.weight",
    "layernorm.bias": "v.norm.bias",
    "classifier.layernorm.weight": "mlp_head.0.weight",
    "classifier.layernorm.bias": "mlp_head.0.bias",
    "classifier.dense.weight": "mlp_head.1.weight",
    "classifier.dense.bias": "mlp_head.1.bias",
}
# parts of a block: ours, version 4, version 5
_PARTS = (
    ("norm1", "layernorm_before", "layernorm_before"),
    ("attn.q", "attention.attention.query", "attention.q_proj"),
    ("attn.k", "attention.attention.key", "attention.k_proj"),
    ("attn.v", "attention.attention.value", "attention.v_proj"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    ("norm2", "layernorm_after", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
)
_OURS_OF = {theirs: ours for ours, *names in _PARTS for theirs in names}
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_OUR_BLOCK = re.compile(r"v\.blocks\.(\d+)\.(.+)\.(weight|bias)")


def _plain_name(key: str) -> str:
    parts = key.split(".")
    return ".".join(part for part in parts if part not in _INSERTED)


def prefixes_of(keys: Iterable[str]) -> list[str]:
    """What stands before the names of an AST, such as "module." or "net.": one entry for each AST."""
    names = list(keys)
    for start in _STARTS:
        found = dict.fromkeys(match[1] for match in map(start.fullmatch, names) if match)
        if found:
            return list(found)
    return []


def is_ast(values: Mapping[Any, Any]) -> bool:
    """Whether these are the tensors of an AST, or of an image model, under names of any wrapper."""
    keys = [
        key for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)
    ]
    return bool(prefixes_of(map(_plain_name, keys)))


def strip_wrappers(state: Mapping[str, Tensor]) -> State:
    """The state without what wrappers put before and between its names.

    DataParallel, torch.compile, AveragedModel, LightningModule and modules that hold a model as one of their
    parts all do. Tensors beside the model (of a loss, of metrics) are left out, and that is said.

    Raises:
        CheckpointError: several models are in it, or two names become one.
    """
    plain: State = {}
    for key, value in state.items():
        name = _plain_name(key)
        if name in plain:
            raise CheckpointError(f"two tensors are called {name!r} without the names of wrappers")
        plain[name] = value
    prefixes = prefixes_of(plain)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"it holds several models ({', '.join(map(repr, prefixes[:5]))}): save the state dict of the one "
            "that is meant alone"
        )
    plain = {k: v for k, v in plain.items() if k.rpartition(".")[2] not in _COUNTERS}
    if not prefixes or not prefixes[0]:
        return plain
    prefix = prefixes[0]
    beside = [key for key in plain if not key.startswith(prefix)]
    if beside:
        _log.warning(
            "tensors beside the model (%s) are left out: %s",
            prefix.rstrip("."),
            ", ".join(map(named, beside[:5])) + (" ..." if len(beside) > 5 else ""),
        )
    return {
        key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)
    }


def dialect_of(state: Mapping[str, Tensor]) -> str:
    """Which of "original", "timm" and "transformers" it is, by the names alone.

    Raises:
        CheckpointError: none of them.
    """
    keys = list(strip_wrappers(state))
    if any(key in ("v.cls_token", "v.pos_embed") for key in keys):
        return "original"
    if any(key.removeprefix(_BASE) in _TOP for key in keys):
        return "transformers"
    if any(key in ("cls_token", "pos_embed") for key in keys):
        return "timm"
    shown = ", ".join(map(repr, keys[:5])) or "nothing"
    raise CheckpointError(
        f"the keys ({shown} ...) are of no known AST: expected the original's (v.cls_token ...), "
        "timm's (cls_token ...) or transformers' (audio_spectrogram_transformer. ...)"
    )


def to_ours(state: Mapping[str, Tensor]) -> State:
    """The state under our names, in our order of blocks; unknown keys keep their own names.

    Raises:
        CheckpointError: the keys are of no known dialect, or q, k and v are incomplete.
    """
    dialect = dialect_of(state)
    plain = strip_wrappers(state)
    if dialect == "original":
        return plain
    if dialect == "timm":
        return {
            key if key.startswith("mlp_head.") else f"v.{key}": value
            for key, value in plain.items()
        }
    return _from_transformers(plain)


def _from_transformers(state: State) -> State:
    ours: State = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = key.removeprefix(_BASE)
        block = _BLOCK.fullmatch(name)
        if name in _TOP:
            ours[_TOP[name]] = value
        elif block and block[2] in _OURS_OF:
            part = _OURS_OF[block[2]]
            stem = f"v.blocks.{block[1]}."
            if part in ("attn.q", "attn.k", "attn.v"):
                fused.setdefault(f"{stem}attn.qkv.{block[3]}", {})[part[-1]] = value
            else:
                ours[f"{stem}{part}.{block[3]}"] = value
        else:
            ours[key] = value
    for key, parts in fused.items():
        absent = [name for name in "qkv" if name not in parts]
        if absent:
            raise CheckpointError(f"{key} cannot be put together: {', '.join(absent)} is missing")
        ours[key] = torch.cat([parts[name] for name in "qkv"])
    return ours


def to_transformers(state: Mapping[str, Tensor], version: int = 4) -> State:
    """Our state under transformers' names.

    Args:
        state: ours; the dead image heads are dropped, as transformers has none.
        version: 4 for what transformers writes to disk in any version, 5 for its names in memory.

    Raises:
        ValueError: a key has no counterpart there.
    """
    top = {ours: theirs for theirs, ours in _TOP.items()}
    theirs_of = {ours: names[0 if version == 4 else 1] for ours, *names in _PARTS}
    layer = "encoder.layer" if version == 4 else "layers"
    theirs: State = {}
    for key, value in state.items():
        if key.startswith(("v.head.", "v.head_dist.")):
            continue
        block = _OUR_BLOCK.fullmatch(key)
        if key in top:
            name = top[key]
            theirs[name if name.startswith("classifier.") else _BASE + name] = value
        elif block and block[2] == "attn.qkv":
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                theirs[f"{_BASE}{layer}.{block[1]}.{theirs_of['attn.' + part]}.{block[3]}"] = chunk
        elif block and block[2] in theirs_of:
            theirs[f"{_BASE}{layer}.{block[1]}.{theirs_of[block[2]]}.{block[3]}"] = value
        else:
            raise ValueError(f"{key} has no counterpart in transformers' AST")
    return theirs
