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

from ..audio_memory import check_batch
from ..config import LogMelConfig
from ..finite import check_results
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
        audio: [B, N] mono at `model.sample_rate`, floats in [-1, 1] or int16; a tensor, or an array.
        model: from `load_model`.

    Raises:
        ValueError: the shape, dtype or length of the audio does not fit, or samples are NaN; says how.
        NotFiniteError: the model gives NaN; says which weights are to blame.
    """
    pieces = _Pieces(audio, model.ast)
    parts = []
    for tokens in pieces.tokens():
        patches = tokens[:, model.ast.config.num_prefix_tokens :]
        parts.append(patches.unflatten(1, model.ast.config.grid).mean(1))
    columns = torch.cat(parts).unflatten(0, (-1, len(audio))).transpose(0, 1).flatten(1, 2)
    check_results(columns, "embeddings", model.ast)
    count = pieces.columns
    centres = pieces.centres_ms(count).to(columns.device)
    return columns[:, :count].contiguous(), centres.expand(len(audio), -1).contiguous()


def get_scene_embeddings(
    audio: Tensor,  # [B, N]
    model: HearModel,
) -> Tensor:  # [B, C]
    """One embedding a sound: the mean of the prefix tokens, and over the pieces of a long one by their length.

    Args:
        audio: [B, N] mono at `model.sample_rate`, floats in [-1, 1] or int16; a tensor, or an array.
        model: from `load_model`.

    Raises:
        ValueError: the shape, dtype or length of the audio does not fit, or samples are NaN; says how.
        NotFiniteError: the model gives NaN; says which weights are to blame.
    """
    pieces = _Pieces(audio, model.ast)
    prefix = model.ast.config.num_prefix_tokens
    pooled = torch.cat([tokens[:, :prefix].mean(1) for tokens in pieces.tokens()])
    pooled = pooled.unflatten(0, (-1, len(audio)))  # [pieces, B, C]
    weights = pieces.shares().to(pooled)
    scenes = (pooled * weights[:, None, None]).sum(0)
    check_results(scenes, "embeddings", model.ast)
    return scenes


class _Pieces:
    """Sounds cut into the lengths that the model takes, every one beginning where the patches before end.

    Args:
        audio: [B, N].
        ast: the model.
    """

    def __init__(self, audio: Any, ast: ASTModel) -> None:
        config, front = ast.config, ast.frontend_config
        sizes = mel_sizes(**front.framing)
        audio = _checked(audio, sizes, front)
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


def _checked(audio: Any, sizes: MelSizes, front: LogMelConfig) -> Tensor:
    """[B, N], held to what files are held to."""
    wave = check_batch(audio)
    if sizes.num_frames(wave.shape[1]) < 1:
        raise ValueError(
            f"audio has {wave.shape[1]} samples a sound: expected at least {sizes.window_samples}, one "
            f"window at {front.sample_rate_hz} Hz"
        )
    return wave
