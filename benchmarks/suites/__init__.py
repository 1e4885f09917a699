"""The suites: what is measured, one file each. `load(name)` gives the cases of one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from ..case import Case, Settings

# most important first: the order in which a limited run takes them
SUITES = (
    "attention",
    "training",
    "inference",
    "block",
    "frontend",
    "path",
    "patch_embed",
    "decisions",
    "tokens",
    "accelerated",
)


# made of cases of the others, so no part of all
EXTRA = ("headline",)


def names(text: str) -> tuple[str, ...]:
    """Suites of a comma-separated list; `all` stands for every one but `headline`.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(wanted) - {*SUITES, *EXTRA, "all"})
    if unknown or not wanted:
        raise ValueError(
            f"--suite {text!r}: unknown suite {', '.join(unknown) or '(none given)'}; "
            f"expected some of all, {', '.join((*SUITES, *EXTRA))}"
        )
    known = (*SUITES, *EXTRA)
    return SUITES if "all" in wanted else tuple(name for name in known if name in wanted)


def load(name: str, settings: Settings) -> Iterator[Case]:
    """The cases of one suite on these settings."""
    return importlib.import_module(f"{__name__}.{name}").cases(settings)
