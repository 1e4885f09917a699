"""Everything that decides a training run, as one value that TOML and the command line can spell."""

from __future__ import annotations

import copy
import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from ..config import AudioConfig, Config, LogMelConfig, ModelConfig, TrainConfig, check
from ..models.registry import list_models

_NO_SIZES = {"label_dim", "labels", "problem_type", "input_fdim", "input_tdim"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """A run: model, front end, how files are read, and the training itself.

    Attributes:
        model: a name of `ast_fast.list_models()`, or a pretrained directory or file to start from.
        sizes: of a model named by its architecture: settings that differ from it, as `ModelConfig` has them
            (embed_dim, depth, num_heads, patches, strides); the input's are the front end's.
        weights: what a model named by its architecture starts from: "random"; "imagenet", the image
            model of its width; "audioset", the original's AudioSet model, without its head.
        frontend: log-mel settings by name, whose sizes become the model's input sizes; what is not
            named is as the model comes with it. A `LogMelConfig` names all of them.
        statistics: "given" takes the front end's mean and std, "measure" those of training clips.
        keep: the epoch whose weights become the run's model, where clips are held out: "best" on them, or
            "last". Weights averaged over epochs (`train.average.first_epoch`) are the model either way.
        audio: how files are read; its sample rate is set to the front end's.
        train: optimisation, logging, checkpoints.
    """

    model: str = "ast_mini_p16_s10"
    sizes: Mapping[str, Any] | None = None
    weights: Literal["random", "imagenet", "audioset"] = "random"
    frontend: Mapping[str, Any] | LogMelConfig | None = None
    statistics: Literal["given", "measure"] = "given"
    keep: Literal["best", "last"] = "best"
    audio: AudioConfig = AudioConfig()  # noqa: RUF009 - frozen
    train: TrainConfig = TrainConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        _check_model(self.model)
        check(
            self.weights in ("random", "imagenet", "audioset"),
            f"weights={self.weights!r}: expected random, imagenet or audioset",
        )
        check(
            self.statistics in ("given", "measure"),
            f"statistics={self.statistics!r}: expected given or measure",
        )
        check(self.keep in ("best", "last"), f"keep={self.keep!r}: expected best or last")
        check(
            not self.sizes or (self.is_architecture and self.weights == "random"),
            f"sizes={self.sizes!r} with model={self.model!r}, weights={self.weights!r}: they are of a model named "
            "by its architecture that starts from random weights; leave them out",
        )
        check(
            self.front_changes.get("num_frames", 1) is not None,
            "frontend.num_frames is not set: expected the model's input length in frames",
        )
        # the model's own front end is not known yet: each value alone, under the freest of the others
        LogMelConfig(output="db", mel_scale="htk").replace(**self.front_changes)

    @property
    def is_architecture(self) -> bool:
        """Whether the model is a name of `list_models()` rather than a pretrained one."""
        return self.model in list_models()

    @property
    def front_changes(self) -> dict[str, Any]:
        """What the run says of the front end, for `LogMelConfig.replace`."""
        given = self.frontend
        return dict(given.to_dict() if isinstance(given, LogMelConfig) else given or {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from nested dicts; see `Config.from_dict`."""
        _check_model(values.get("model", ""))
        sizes = values.get("sizes")
        if isinstance(sizes, Mapping):
            values = {**values, "sizes": _read_sizes(sizes)}
        elif sizes is not None:
            raise ValueError(f"sizes={sizes!r}: expected a section")
        frontend = values.get("frontend")
        if isinstance(frontend, Mapping):
            values = {**values, "frontend": LogMelConfig.read_values(frontend)}
        elif frontend is not None:
            check(isinstance(frontend, LogMelConfig), f"frontend={frontend!r}: expected a section")
        # zero-argument super() does not work in a class that slots=True rebuilds
        return super(RunConfig, cls).from_dict(values)


def _read_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes by name; those that follow from the data and the front end are no settings."""
    found = ModelConfig.read_values(values)
    fixed = sorted(set(found) & _NO_SIZES)
    check(
        not fixed,
        f"sizes.{', sizes.'.join(fixed)}: follows from the data or the front end; leave it out, or set "
        "frontend.num_frames or frontend.num_mel_bins",
    )
    return found


def _check_model(name: Any) -> None:
    check(
        isinstance(name, str),
        f"model={name!r}: expected the name of a model or a pretrained directory",
    )


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package.

    >>> list_recipes()
    ['audioset', 'audioset-balanced', 'esc50', 'music-emotion', 'speechcommands']
    """
    return sorted(_packaged())


def _packaged() -> dict[str, Any]:
    folder = resources.files("ast_fast.recipes")
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {entry.name.removesuffix(".toml"): entry for entry in found}


def _read(recipe: str) -> dict[str, Any]:
    """The settings of a recipe by name, or of a file."""
    file = _packaged().get(recipe, Path(recipe))
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{recipe!r} is neither a file nor a recipe: expected a TOML file, or one of "
            f"{', '.join(list_recipes())}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe}: is not TOML: {error}") from error


def read_config(
    recipe: str | None,
    overrides: Sequence[str] = (),
    under: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A run from a recipe and `section.name=value` overrides, which win.

    Values are TOML too: numbers, true, "text"; a bare word is taken as text.

    Args:
        recipe: one of `list_recipes()`, or a TOML file; None for the defaults.
        overrides: single settings.
        under: nested settings that hold where neither says otherwise.

    Raises:
        ValueError: a key is unknown or a value does not fit; names the file or the override.
        FileNotFoundError: there is no such recipe.
    """
    values = copy.deepcopy(dict(under or {}))
    if recipe is not None:
        values = merged(values, _read(recipe))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {text!r}: expected section.name=value, as train.epochs=3")
        place = values
        *sections, last = name.strip().split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {text!r}: {section!r} is a value, not a section")
        place[last] = _value(value.strip())
    try:
        return RunConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{recipe or 'settings'}: {error}") from error


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, of which the second win.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    found = dict(values)
    for name, value in over.items():
        mine = found.get(name)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            value = merged(mine, value)
        found[name] = value
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return tomllib.loads(f"value = {json.dumps(text, allow_nan=False)}")["value"]
