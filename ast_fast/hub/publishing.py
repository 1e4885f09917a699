"""A model on the Hugging Face hub: its card, and the upload of a directory at one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._optional import require_package
from .errors import CheckpointError
from .reading import HUB_ID
from .settings import as_json
from .writing import replace_text

CARD = "README.md"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SHOWN_LABELS = 1000  # AudioSet's 527 fit


def model_card(
    settings: Mapping[str, Any],
    *,
    licence: str,
    name: str = "Audio Spectrogram Transformer",
    figures: Mapping[str, float] | None = None,
    datasets: tuple[str, ...] = (),
    text: str = "",
    library: str = "ast_fast",
) -> str:
    """README.md of a model: what the hub reads at the top, then sizes, front end, figures and labels.

    Args:
        settings: {"model": `ModelConfig` as a dict, "frontend": `LogMelConfig` as a dict}.
        licence: identifier of the weights' licence, as the hub spells it: "bsd-3-clause", "mit", "other".
        name: heading.
        figures: results by name, such as {"mAP": 0.459}.
        datasets: hub ids of what it was trained on.
        text: a paragraph about it.
        library: "ast_fast" or "transformers": what loads it.

    Raises:
        ValueError: the licence is no identifier.
    """
    if not _LICENCE.fullmatch(licence):
        raise ValueError(
            f"licence={licence!r}: expected an identifier such as 'bsd-3-clause', 'mit' or 'other'"
        )
    model, front = settings["model"], settings["frontend"]
    head = [
        "---",
        f"license: {licence}",
        f"library_name: {'transformers' if library == 'transformers' else 'ast-fast'}",
        "pipeline_tag: audio-classification",
        "tags:",
        "- audio-spectrogram-transformer",
        "- audio-classification",
    ]
    if datasets:
        head += ["datasets:", *(f"- {_yaml(each)}" for each in datasets)]
    head += ["---", "", f"# {_line(name)}", ""]
    if text:
        head += [text.strip(), ""]
    body = [*_usage(library), *_sizes(model, front), *_figures(figures or {})]
    return "\n".join([*head, *body, *_labels(model.get("labels"))]).rstrip() + "\n"


def _yaml(value: str) -> str:
    # JSON's strings are YAML's
    return as_json({"v": value}).split(":", 1)[1].rsplit("}", 1)[0].strip()


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _usage(library: str) -> list[str]:
    if library == "transformers":
        lines = [
            "from transformers import pipeline",
            "",
            'classify = pipeline("audio-classification", "OWNER/NAME")',
        ]
    else:
        lines = [
            "from ast_fast import ASTModel",
            "",
            'model = ASTModel.from_pretrained("OWNER/NAME")',
            "logits = model.forward_waveform(wave)  # [B, samples]",
        ]
    return ["```python", *lines, "```", ""]


def _sizes(model: Mapping[str, Any], front: Mapping[str, Any]) -> list[str]:
    rows = {
        "classes": model["label_dim"],
        "width, blocks, heads": f"{model['embed_dim']}, {model['depth']}, {model['num_heads']}",
        "patches": f"{model['patch_fdim']} x {model['patch_tdim']}, every {model['fstride']} mel bins and "
        f"{model['tstride']} frames",
        "input": f"{model['input_tdim']} frames of {model['input_fdim']} mel bins",
        "audio": f"{front['sample_rate_hz']} Hz, mono",
        "normalisation": f"(x - {front['mean']:g}) / (2 * {front['std']:g})",
    }
    if model.get("problem_type"):
        rows["task"] = model["problem_type"].replace("_", " ")
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]


def _figures(figures: Mapping[str, float]) -> list[str]:
    if not figures:
        return []
    rows = (f"| {_cell(name)} | {value:.4g} |" for name, value in figures.items())
    return ["## Results", "", "| figure | value |", "|---|---|", *rows, ""]


def _labels(labels: Any) -> list[str]:
    if not labels:
        return []
    rows = [f"{index}. {_cell(name)}" for index, name in enumerate(labels[:_SHOWN_LABELS])]
    if len(labels) > _SHOWN_LABELS:
        rows.append(f"and {len(labels) - _SHOWN_LABELS} more: see config.json")
    return ["## Labels", "", *rows, ""]


def write_card(directory: str | os.PathLike[str], card: str) -> Path:
    """Write README.md into a directory, whole or not at all."""
    return replace_text(Path(directory) / CARD, card)


def upload(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a directory to the hub as one commit; returns the commit's hash.

    Args:
        directory: what `write_pretrained` or `write_transformers` wrote, and a card.
        repo_id: "owner/name"; made if it does not exist.
        private: whether a new repository is private; the account's default if None.
        revision: branch to commit to, made if absent; the main one if None.
        message: of the commit.
        token: of the hub; the one that was logged in with if None.
        create_pr: open a pull request instead of committing.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        ValueError: the id is none.
        CheckpointError: the hub is out of reach or refuses; the cause is chained.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: expected owner/name")
    hub = require_package("huggingface_hub", "push_to_hub", "hf")
    try:
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(directory),
            revision=revision,
            commit_message=message or "Upload of an Audio Spectrogram Transformer",
            create_pr=create_pr,
        )
    except Exception as error:
        raise CheckpointError(
            f"{repo_id!r} could not be uploaded ({type(error).__name__}: {error}): log in with "
            "`hf auth login` or pass token=, and look whether the hub can be reached"
        ) from error
    return str(commit.oid)
