"""Loading, saving and publishing of a model: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from .. import hub
from ..config import LogMelConfig, ModelConfig, ModelFacts
from . import pretrained


class HubMixin(nn.Module):
    """What an AST does with directories and the Hugging Face hub."""

    config: ModelConfig
    frontend_config: LogMelConfig

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        strides: tuple[int, int] | None = None,
        frames: int | None = None,
        mel_bins: int | None = None,
        heads: int | None = None,
        mean: float | None = None,
        std: float | None = None,
        **overrides: Any,
    ) -> Self:
        """Load a model from a directory, a file or a Hugging Face hub id.

        A file without settings (the original's .pth) does not tell its patch grid, its heads or its
        normalisation. Published files are known by name; of others say strides, frames, mel_bins, heads, mean
        and std. What is not said is guessed where one recipe alone fits, and a warning says what; else refused.

        Args:
            source: directory (ours or transformers'), file (.pth, .bin, .safetensors) or hub id.
            revision: branch, tag or commit hash of a hub id; a hash pins the weights for good.
            strides: (frequency, time) between the patches of the file.
            frames: length of the input of the file's model.
            mel_bins: of the file's model.
            heads: of attention in the file's model.
            mean: of the log-mel energies it was trained on; counts above what the file says.
            std: likewise.
            overrides: sizes to change: label_dim (a new head), input_tdim, input_fdim, fstride,
                tstride (positions are adapted), labels, position_rule.

        Raises:
            CheckpointError: the file is missing, broken or does not fit, or tells other sizes than were said;
                says what to do.
            ValueError: what is said is impossible.
        """
        facts = ModelFacts(
            strides=strides, frames=frames, mel_bins=mel_bins, heads=heads, mean=mean, std=std
        )
        model: Any = pretrained.load_model(cls, source, overrides, revision, facts.settings)  # type: ignore[type-var]
        return model

    def save_pretrained(
        self, directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
    ) -> Path:
        """Write weights and settings to a directory, so that a crash leaves the old ones loadable.

        Args:
            directory: made if absent.
            state_dict: weights to write in place of the model's own, such as wider ones.
        """
        return hub.write_pretrained(directory, state_dict or self.state_dict(), self._settings())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str,
        figures: Mapping[str, float] | None = None,
        datasets: tuple[str, ...] = (),
        text: str = "",
        to: Literal["ast_fast", "transformers"] = "ast_fast",
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload weights, settings and a model card to the Hugging Face hub as one commit.

        Args:
            repo_id: "owner/name"; made if it does not exist.
            licence: of the weights, as the hub spells it: "bsd-3-clause", "mit", "other".
            figures: results for the card, such as {"mAP": 0.459}.
            datasets: hub ids of what it was trained on, for the card.
            text: a paragraph for the card.
            to: "transformers" writes what `ASTForAudioClassification.from_pretrained` reads.
            private: whether a new repository is private; the account's default if None.
            revision: branch to commit to; the main one if None.
            message: of the commit.
            token: of the hub; the one that was logged in with if None.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit's hash: what `from_pretrained(repo_id, revision=...)` pins.

        Raises:
            CheckpointError: the hub is out of reach or refuses.
            ValueError: the id or the licence is none, or transformers' AST cannot express the model.
        """
        settings = self._settings()
        name = repo_id.rpartition("/")[2]
        card = hub.model_card(
            settings,
            licence=licence,
            name=name,
            figures=figures,
            datasets=datasets,
            text=text,
            library=to,
        )
        with tempfile.TemporaryDirectory() as folder:
            if to == "transformers":
                hub.write_transformers(folder, self.state_dict(), **settings)
            elif to == "ast_fast":
                self.save_pretrained(folder)
            else:
                raise ValueError(f"to={to!r}: expected ast_fast or transformers")
            hub.write_card(folder, card.replace("OWNER/NAME", repo_id))
            return hub.upload(
                folder,
                repo_id,
                private=private,
                revision=revision,
                message=message,
                token=token,
                create_pr=create_pr,
            )

    def _settings(self) -> dict[str, Any]:
        return {"model": self.config.to_dict(), "frontend": self.frontend_config.to_dict()}
