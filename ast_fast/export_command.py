"""What `ast-fast export` does: a model to one file for serving, checked, with a report."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import ModelFacts
from .inference import load_model
from .integrations.export import CHECKED, SUFFIX, Format, Input, description_path, export_model
from .training.logs import say


def export(
    model: str,
    out: Path,
    format: Format,
    input: Input,
    device: str | None,
    check: bool,
    facts: ModelFacts,
) -> int:
    """See `cli.export`."""
    if not out.suffix:
        out = out.with_name(out.name + SUFFIX[format])
    if device is not None and format != "aoti":
        raise ValueError(
            f"--device {device} with --format {format}: only aoti compiles for a device; leave it out"
        )
    network = load_model(model, facts)
    try:
        network = network.to(device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if format == "aoti":
        # generated code runs on as many threads as there were when it was made
        say(
            f"compiling for {device or 'cpu'} with {torch.get_num_threads()} threads; a minute or more"
        )
    elif check:
        say("exporting, then comparing with the float64 reference")
    report = export_model(network, out, format, input, check=check)
    say(report.table())
    if check:
        sizes = ", ".join(map(str, CHECKED))
        say(f"checked against the float64 reference on batches of {sizes}: within budget")
    say(f"inputs, labels and front end: {description_path(report.path)}")
    return 0
