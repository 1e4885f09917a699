"""The HEAR 2021 interface: embeddings of whole sounds and of moments, for audio of any length.

    from ast_fast.integrations import hear
    model = hear.load_model("checkpoint")
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)

Features are made once for the whole sound and cut into the model's lengths where its patches end, so that
moments follow one another evenly: one a step of patches, 100 ms for most models.
Dimensions: B sounds, N samples, S frames, T tokens, C width, t patches along time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import LogMelConfig
from ..frontend import log_mel_features
from ..models.ast import ASTModel
from ..reference.mel import MelSizes, mel_sizes

_WINDOWS = 16  # run at a time: what is held does not grow with the sound


class HearModel(nn.Module):
    """An AST with the attributes that HEAR asks for.

    Args:
        ast: the model.

    Attributes:
        sample_rate: of the audio it takes, in Hz.
        scene_embedding_size: C.
        timestamp_embedding_size: C.
    """

    def __init__(self, ast: ASTModel) -> None:
        super().__init__()
        self.ast = ast
        self.sample_rate = ast.frontend_config.sample_rate_hz
        self.scene_embedding_size = self.timestamp_embedding_size = ast.config.embed_dim

    def forward(self, audio: Tensor) -> Tensor:
        """Scene embeddings [B, C] of sounds [B, N]."""
        return get_scene_embeddings(audio, self)


def load_model(model_file_path: Any = "") -> HearModel:
    """A model to embed with, in evaluation mode.

    Args:
        model_file_path: directory, file or hub id, as `ASTModel.from_pretrained` takes (a file of bare weights
            that is no published one: convert it first); or an `ASTModel`.

    Raises:
        CheckpointError: it cannot be loaded.
        ValueError: nothing was given.
    """
    if isinstance(model_file_path, ASTModel):
        return HearModel(model_file_path).eval()
    if not str(model_file_path):
        raise ValueError(
            "model_file_path is empty: expected a directory, a file or a hub id such as "
            "MIT/ast-finetuned-audioset-10-10-0.4593"
        )
    return HearModel(ASTModel.from_pretrained(model_file_path)).eval()


def get_timestamp_embeddings(
    audio: Tensor,  # [B, N]
    model: HearModel,
) -> tuple[Tensor, Tensor]:  # [B, t, C], [B, t]
    """Embeddings of moments, and their centres in milliseconds.

    A moment is a column of patches, averaged over frequency. A sound shorter than one has a single one.

    Args:
        audio: [B, N] mono, float32 in [-1, 1], at `model.sample_rate`.
        model: from `load_model`.

    Raises:
        ValueError: the shape, dtype or length of the audio does not fit; says how.
    """
    pieces = _Pieces(audio, model.ast)
    parts = []
    for tokens in pieces.tokens():
        patches = tokens[:, model.ast.config.num_prefix_tokens :]
        parts.append(patches.unflatten(1, model.ast.config.grid).mean(1))
    columns = torch.cat(parts).unflatten(0, (-1, len(audio))).transpose(0, 1).flatten(1, 2)
    count = pieces.columns
    centres = pieces.centres_ms(count).to(columns.device)
    return columns[:, :count].contiguous(), centres.expand(len(audio), -1).contiguous()


def get_scene_embeddings(
    audio: Tensor,  # [B, N]
    model: HearModel,
) -> Tensor:  # [B, C]
    """One embedding a sound: the mean of the prefix tokens, and over the pieces of a long one by their length.

    Args:
        audio: [B, N] mono, float32 in [-1, 1], at `model.sample_rate`.
        model: from `load_model`.

    Raises:
        ValueError: the shape, dtype or length of the audio does not fit; says how.
    """
    pieces = _Pieces(audio, model.ast)
    prefix = model.ast.config.num_prefix_tokens
    pooled = torch.cat([tokens[:, :prefix].mean(1) for tokens in pieces.tokens()])
    pooled = pooled.unflatten(0, (-1, len(audio)))  # [pieces, B, C]
    weights = pieces.shares().to(pooled)
    return (pooled * weights[:, None, None]).sum(0)


class _Pieces:
    """Sounds cut into the lengths that the model takes, every one beginning where the patches before end.

    Args:
        audio: [B, N].
        ast: the model.
    """

    def __init__(self, audio: Tensor, ast: ASTModel) -> None:
        config, front = ast.config, ast.frontend_config
        sizes = mel_sizes(**front.framing)
        _check(audio, sizes, front)
        self.ast, self._sizes = ast, sizes
        self.step = config.grid[1] * config.tstride
        self.frames = sizes.num_frames(audio.shape[1])
        # a last patch that would need frames beyond the end is left to the padding
        self.columns = max(1, (self.frames - config.patch_tdim) // config.tstride + 1)
        self.count = -(-self.columns // config.grid[1])
        weight = ast.v.pos_embed
        whole = front.replace(num_frames=(self.count - 1) * self.step + config.input_tdim)
        with torch.no_grad():
            features = log_mel_features(audio.to(weight.device), whole)
        self.features = features.to(weight.dtype)

    def tokens(self) -> list[Tensor]:
        """Tokens after the final norm of some pieces at a time, [pieces * B, T, C], sounds inside pieces."""
        length = self.ast.config.input_tdim
        clips = len(self.features)
        at_once = max(1, _WINDOWS // max(clips, 1))
        made = []
        for first in range(0, self.count, at_once):
            starts = [i * self.step for i in range(first, min(first + at_once, self.count))]
            batch = torch.cat([self.features[:, s : s + length] for s in starts])
            with torch.no_grad():
                made.append(self.ast.forward_features(batch))
        return made

    def centres_ms(self, count: int) -> Tensor:
        """Centres of the first columns in milliseconds from the beginning [count]."""
        config, rate = self.ast.config, self.ast.frontend_config.sample_rate_hz
        hop, window = self._sizes.hop_samples, self._sizes.window_samples
        first = torch.arange(count, dtype=torch.float64) * (config.tstride * hop)
        middle = first + ((config.patch_tdim - 1) * hop + window) / 2
        return (middle * (1000.0 / rate)).float()

    def shares(self) -> Tensor:
        """How much of the sound each piece holds; their sum is 1."""
        begin = torch.arange(self.count, dtype=torch.float64) * self.step
        held = (self.frames - begin).clamp(1, self.step)
        return held / held.sum()


def _check(audio: Any, sizes: MelSizes, front: LogMelConfig) -> None:
    if not isinstance(audio, Tensor) or audio.dim() != 2:
        shape = tuple(audio.shape) if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"audio is {shape}: expected a tensor [sounds, samples], mono")
    if not audio.is_floating_point():
        raise ValueError(
            f"audio is {audio.dtype}: expected floats in [-1, 1]; divide 16-bit samples by 32768"
        )
    if not len(audio):
        raise ValueError("audio has no sounds: expected [sounds, samples] with at least one")
    if sizes.num_frames(audio.shape[1]) < 1:
        raise ValueError(
            f"audio has {audio.shape[1]} samples a sound: expected at least {sizes.window_samples}, one "
            f"window at {front.sample_rate_hz} Hz"
        )
