"""Where starting weights come from: image models through timm, the AudioSet checkpoint, files.

The network is touched only when weights were asked for, and only through timm and the Hugging Face
hub client. Files are looked for first in AST_FAST_HOME, then in ../../pretrained_models (where the
original keeps them) and in PyTorch's own cache of downloads.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import hub
from .._optional import optional_import
from ..config import LogMelConfig, ModelConfig
from ..hub import CheckpointError
from ..positions import adapt_positions

if TYPE_CHECKING:
    from .ast import ASTModel

Model = TypeVar("Model", bound="ASTModel")

_log = logging.getLogger("ast_fast.models")
_STATISTICS = ("mean", "std")


class ImageSource(NamedTuple):
    """An image model to start from."""

    name: str  # timm's
    file: str  # name of the file its authors published
    embed_dim: int
    depth: int
    num_heads: int
    image_grid: int  # patches a side
    num_prefix_tokens: int = 2
    patch: int = 16


_DEIT_URL = "https://dl.fbaipublicfiles.com/deit/"
_SOURCES = {
    source.name: source
    for source in (
        ImageSource("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224-b40b3cf7.pth", 192, 12, 3, 14),
        ImageSource("deit_small_distilled_patch16_224", "deit_small_distilled_patch16_224-649709d9.pth", 384, 12, 6, 14),
        ImageSource("deit_base_distilled_patch16_224", "deit_base_distilled_patch16_224-df68dfff.pth", 768, 12, 12, 14),
        ImageSource("deit_base_distilled_patch16_384", "deit_base_distilled_patch16_384-d0272ac0.pth", 768, 12, 12, 24),
        ImageSource("deit_base_patch16_384", "deit_base_patch16_384-8de9b5d1.pth", 768, 12, 12, 24, 1),
        ImageSource("vit_base_patch16_224", "", 768, 12, 12, 14, 1),
        ImageSource("vit_base_patch16_384", "", 768, 12, 12, 24, 1),
        ImageSource("vit_base_patch32_384", "", 768, 12, 12, 12, 1, 32),
        ImageSource("vit_large_patch16_224", "", 1024, 24, 16, 14, 1),
        ImageSource("vit_large_patch16_384", "", 1024, 24, 16, 24, 1),
    )
}  # fmt: skip
_SIZES = {
    "tiny224": "deit_tiny_distilled_patch16_224",
    "small224": "deit_small_distilled_patch16_224",
    "base224": "deit_base_distilled_patch16_224",
    "base384": "deit_base_distilled_patch16_384",
}
_AUDIOSET_FILE = "audioset_10_10_0.4593.pth"
_AUDIOSET_URL = "https://www.dropbox.com/s/cv4knew8mvbrnvq/audioset_0.4593.pth?dl=1"
_AUDIOSET_HUB = "MIT/ast-finetuned-audioset-10-10-0.4593"


def image_source(
    model_size: str, init_source: str | None, imagenet_pretrain: bool, audioset_pretrain: bool
) -> ImageSource:
    """The image model behind the constructor's arguments, with the original's errors."""
    if audioset_pretrain:
        if not imagenet_pretrain:
            raise ValueError(
                "currently model pretrained on only audioset is not supported, please set "
                "imagenet_pretrain = True to use audioset pretrained model."
            )
        if model_size != "base384" or init_source is not None:
            raise ValueError("currently only has base384 AudioSet pretrained model.")
    if init_source is not None:
        if init_source not in _SOURCES:
            raise ValueError(
                f"init_source={init_source!r} is unknown: expected one of {', '.join(_SOURCES)}"
            )
        return _SOURCES[init_source]
    if model_size not in _SIZES:
        raise Exception("Model size must be one of tiny224, small224, base224, base384.")
    return _SOURCES[_SIZES[model_size]]


def _folders() -> list[Path]:
    home = os.environ.get("AST_FAST_HOME")
    folders = [Path(home).expanduser()] if home else []
    return [*folders, Path("../../pretrained_models"), Path(torch.hub.get_dir()) / "checkpoints"]


def _find(*names: str) -> Path | None:
    for folder in _folders():
        for name in names:
            if name and (folder / name).is_file():
                return folder / name
    return None


def _advice(file: str, url: str) -> str:
    places = " or ".join(repr(str(folder)) for folder in _folders())
    return (
        f"download {url} on a machine with network, name it {file!r} and put it into {places} "
        "(AST_FAST_HOME names the first place to look); or pass imagenet_pretrain=False"
    )


def load_image(source: ImageSource) -> dict[str, Tensor]:
    """Weights of an image model under our names.

    Raises:
        CheckpointError: neither a local file nor timm could give them; says what to download.
    """
    local = _find(source.file, f"{source.name}.safetensors", f"{source.name}.pth")
    if local is not None:
        return hub.read_weights(local)[0]
    file = source.file or f"{source.name}.safetensors"
    url = (
        _DEIT_URL + source.file
        if source.file
        else f"https://huggingface.co/timm (model {source.name}, model.safetensors)"
    )
    timm = optional_import("timm")
    if timm is None:
        raise CheckpointError(
            f"weights of {source.name} were asked for and need timm: pip install 'ast-fast[timm]'; "
            f"or {_advice(file, url)}"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # timm's own random weights must not move the seed
            image_model = timm.create_model(source.name, pretrained=True)
    except Exception as error:
        raise CheckpointError(
            f"weights of {source.name} were asked for and could not be downloaded "
            f"({type(error).__name__}: {error}): {_advice(file, url)}"
        ) from error
    return hub.to_ours(image_model.state_dict())


def load_audioset() -> dict[str, Tensor]:
    """Weights of the AudioSet checkpoint, head included, under our names.

    Raises:
        CheckpointError: no local file, and the hub is out of reach; says what to download.
    """
    local = _find(_AUDIOSET_FILE, "audioset_0.4593.pth")
    if local is not None:
        return hub.read_weights(local, fstride=10, tstride=10)[0]
    try:
        return hub.read_weights(hub.locate(_AUDIOSET_HUB))[0]
    except CheckpointError as error:
        raise CheckpointError(
            f"the AudioSet checkpoint was asked for and could not be had ({error}); "
            + _advice(_AUDIOSET_FILE, _AUDIOSET_URL)
        ) from error


def start_from(model: ASTModel, state: Mapping[str, Tensor], rule: str) -> None:
    """Copy weights of an image model or of an AST into a new model, positions adapted.

    A projection with three input channels is summed over them. Another patch size cannot take over
    the projection: it then keeps its random weights, and that is said.
    """
    config = model.config
    state = dict(state)
    proj = state.pop("v.patch_embed.proj.weight").sum(dim=1, keepdim=True)
    bias = state.pop("v.patch_embed.proj.bias")
    if proj.shape == model.v.patch_embed.proj.weight.shape:
        state["v.patch_embed.proj.weight"], state["v.patch_embed.proj.bias"] = proj, bias
    else:
        _log.warning(
            "the starting weights have patches of %d x %d, the model of %d x %d: the projection "
            "keeps its random weights",
            *proj.shape[2:],
            config.patch_fdim,
            config.patch_tdim,
        )
    pos = state["v.pos_embed"]
    patches = pos.shape[1] - config.num_prefix_tokens
    side = round(patches**0.5)
    # an AudioSet table has 12 x 101 patches, an image's is square
    grid = (side, side) if side * side == patches else (12, patches // 12)
    state["v.pos_embed"] = adapt_positions(pos, grid, config.grid, config.num_prefix_tokens, rule)
    own = model.state_dict()
    if state.get("mlp_head.1.weight", pos).shape != own["mlp_head.1.weight"].shape:
        for key in [key for key in state if key.startswith("mlp_head.")]:
            del state[key]
    dead = ("v.head.", "v.head_dist.")
    for key in [key for key in state if key.startswith(dead)]:
        if key not in own or own[key].shape != state[key].shape:
            del state[key]
    kept = {
        key: value
        for key, value in own.items()
        if key not in state and key.startswith((*dead, "mlp_head.", "v.patch_embed."))
    }
    hub.require_match(own, {**state, **kept}, "the starting weights")
    model.load_state_dict({**state, **kept})


def start_from_weights(model: ASTModel, kind: str, rule: str = "bilinear") -> None:
    """Start a new model from published weights: of the image model of its width, or of AudioSet.

    Args:
        model: as `create_model` makes it.
        kind: "random" leaves it as it is; "imagenet"; "audioset", for base models alone.
        rule: how positions are adapted.

    Raises:
        ValueError: there are no such weights for this model.
        CheckpointError: they could not be had; says what to download.
    """
    if kind == "random":
        return
    width, depth = model.config.embed_dim, model.config.depth
    if kind == "audioset":
        fitting, weights = (width, depth) == (768, 12), load_audioset
    else:
        sizes = {192: "tiny224", 384: "small224", 768: "base384"}
        source = _SOURCES[_SIZES[sizes.get(width, "base384")]]
        fitting = (source.embed_dim, source.depth) == (width, depth)
        weights = functools.partial(load_image, source)
    if not fitting or model.config.num_prefix_tokens != 2:
        raise ValueError(
            f"weights={kind!r}: there are none of width {width} and depth {depth}; expected a tiny, "
            "small or base model (for AudioSet base), or weights='random'"
        )
    start_from(model, weights(), rule)


def load_model(
    cls: type[Model],
    source: str | os.PathLike[str],
    overrides: Mapping[str, Any],
    revision: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Model:
    """A model from a directory, file or hub id; see `ASTModel.from_pretrained`.

    Args:
        cls: its class.
        source: where it lies.
        overrides: settings of `ModelConfig` that shall be others than the file's.
        revision: of a hub id.
        facts: what the file does not tell: see `config.ModelFacts`.
    """
    changes, facts = dict(overrides), dict(facts or {})
    rule = changes.pop("position_rule", "bilinear")
    said = {name: value for name, value in facts.items() if name not in _STATISTICS}
    statistics = {name: value for name, value in facts.items() if name in _STATISTICS}
    path = hub.locate(source, revision)
    state, info = hub.read_weights(path, changes, **said)
    if not info["model"]:
        raise CheckpointError(
            f"{str(path)!r} holds an image model, not an AST: build ASTModel(..., init_source=...) "
            "and put the file where it looks (AST_FAST_HOME)"
        )
    try:
        found = ModelConfig.from_dict(info["model"])
        wanted = ModelConfig.from_dict(_with_changes(found, changes))
        frontend = LogMelConfig.from_dict(
            {
                **(info["frontend"] or {}),
                **statistics,
                "num_frames": wanted.input_tdim,
                "num_mel_bins": wanted.input_fdim,
            }
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{str(path)!r} cannot become a model: {error}") from error
    _check_sizes(cls, found, state, path)
    _say_guesses(path, info, frontend, statistics)
    if found.grid != wanted.grid and "v.pos_embed" in state:
        state["v.pos_embed"] = adapt_positions(
            state["v.pos_embed"], found.grid, wanted.grid, wanted.num_prefix_tokens, rule
        )
    if found.label_dim != wanted.label_dim:
        head = nn.Linear(wanted.embed_dim, wanted.label_dim)
        state["mlp_head.1.weight"], state["mlp_head.1.bias"] = (
            head.weight.detach(),
            head.bias.detach(),
        )
    with torch.device("meta"):  # no time for random weights that are replaced at once
        model = cls.from_config(wanted, frontend)
    hub.require_match(model.state_dict(), state, path)
    dtype = torch.get_default_dtype()
    model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    return model.eval()


def _check_sizes(
    cls: type[ASTModel], config: ModelConfig, state: Mapping[str, Tensor], path: Path
) -> None:
    """Whether settings are those of the weights, before a model of the settings' size is built."""
    depth = len(hub.blocks_of(state))
    if config.depth != depth:
        raise CheckpointError(
            f"{str(path)!r} does not fit the model: it says depth={config.depth} and holds {depth} blocks"
        )
    width = config.embed_dim
    expected = {
        "v.pos_embed": (1, config.num_tokens, width),
        "v.patch_embed.proj.weight": (width, 1, config.patch_fdim, config.patch_tdim),
        "v.blocks.0.mlp.fc1.weight": (int(width * config.mlp_ratio), width),
        "mlp_head.1.weight": (config.label_dim, width),
    }
    if any(key in state and state[key].shape != shape for key, shape in expected.items()):
        with torch.device("meta"):
            hub.require_match(cls.from_config(config).state_dict(), state, path)


def _say_guesses(
    path: Path, info: Mapping[str, Any], frontend: LogMelConfig, statistics: Mapping[str, Any]
) -> None:
    """Say what of a model nothing but habit speaks for, and how to say otherwise."""
    guesses = list(info["guesses"])
    if not info["statistics"] and len(statistics) < len(_STATISTICS):
        unsaid = " and ".join(name for name in _STATISTICS if name not in statistics)
        given = " and ".join(f"{getattr(frontend, name):g}" for name in _STATISTICS)
        guesses.append(f"AudioSet's {unsaid} of log-mel energies ({given} in all)")
    if guesses:
        _log.warning(
            "%r does not tell all of how it was trained. Guessed: %s. If that is wrong, so are the results: say "
            "strides=, frames=, mel_bins=, heads=, mean= or std= (--strides, --input-frames, --mel-bins, "
            "--heads, --mean, --std on the command line)",
            str(path),
            "; ".join(guesses),
        )


def _with_changes(found: ModelConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = {**found.to_dict(), **changes}
    if settings["label_dim"] != found.label_dim and "problem_type" not in changes:
        settings["problem_type"] = None
    if settings["label_dim"] != found.label_dim and "labels" not in changes:
        settings["labels"] = None
    elif "labels" in changes and "label_dim" not in changes and changes["labels"] is not None:
        settings["label_dim"] = len(changes["labels"])
    return settings
