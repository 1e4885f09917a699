"""What all settings share: frozen, checked, spelled as plain values, unknown keys refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


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
            ValueError: a key is unknown, or a value does not pass the checks.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(unknown)}: expected some of "
                f"{', '.join(fields)}"
            )
        arguments: dict[str, Any] = {}
        for name, value in values.items():
            default = fields[name].default
            if isinstance(default, Config) and isinstance(value, Mapping):
                value = type(default).from_dict(value)
            elif isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
            arguments[name] = value
        return cls(**arguments)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
