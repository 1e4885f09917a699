"""What all settings share: frozen, checked, spelled as plain values, unknown keys refused."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from .._text import named, shown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Base of all settings: conversion to and from plain dicts, unknown keys refused."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON or TOML; nested settings become nested dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dict.

        Raises:
            ValueError: a key is unknown, or a value is of another kind or does not pass the checks.
        """
        return cls(**cls.read_values(values))

    @classmethod
    def read_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Some settings by name, as `replace` takes them: what is not said is not in it.

        A section with settings of its own keeps those of its default that it does not name.

        Raises:
            ValueError: a key is unknown, or a value is of another kind.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields), key=str)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(map(named, unknown))}: expected some of "
                f"{', '.join(fields)}"
            )
        arguments: dict[str, Any] = {}
        kinds = get_type_hints(cls)
        for name, value in values.items():
            default = fields[name].default
            if isinstance(default, Config) and isinstance(value, Mapping):
                value = default.replace(**default.read_values(value))
            elif isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
            if kinds[name] is int and isinstance(value, float) and value.is_integer():
                value = int(value)  # 1e3 is a whole number, too
            if not _is_of(value, kinds[name]):
                raise ValueError(f"{name}={shown(value)}: expected {_in_words(kinds[name])}")
            arguments[name] = value
        return arguments

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type; which text is meant is for the settings to check."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if origin is Literal:
        return isinstance(value, tuple({type(one) for one in get_args(kind)}))
    if origin is tuple:
        inner = get_args(kind)
        if not isinstance(value, tuple):
            return False
        inner = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        return len(inner) == len(value) and all(map(_is_of, value, inner))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _in_words(kind: Any) -> str:
    """What a person has to write for a declared type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in inner if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a list, each {_in_words(inner[0])}"
        return f"a list of {len(inner)}, each {_in_words(inner[0])}"
    if isinstance(kind, type) and issubclass(kind, Config):
        return "a section with settings of its own"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind))


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
