"""A tiny model with windows of a third of a second, and sounds to run it on."""

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import create_model
from ast_fast.config import LogMelConfig
from ast_fast.data.syllables import read_syllables

FRONT = LogMelConfig(num_mel_bins=32, num_frames=32)
NAMES = ("cat", "dog", "rain", "=sum")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Forked workers and processes of these tests share the machine."""


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 1, "input_fdim": 32, "input_tdim": 32}
    model = create_model(
        "ast_mini_p16_s10", num_classes=4, labels=NAMES, frontend_config=FRONT, **sizes
    )
    # scores that differ from clip to clip
    torch.nn.init.normal_(model.mlp_head[1].weight, std=1.0)
    return model.eval()


@pytest.fixture(scope="session")
def model_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def voice():
    """Half a minute of speech, [N] int16 at 16 kHz."""
    return torch.cat(read_syllables().waves[:120])[: 30 * 16000]


@pytest.fixture(scope="session")
def clips(voice, tmp_path_factory):
    """A folder of twelve files of different length and kind; two cannot be read."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for index, seconds in enumerate((0.01, 0.3, 0.5, 2.0, 5.0, 1.1, 0.33, 3.3, 0.2, 9.0)):
        start = int(rng.integers(0, 20 * 16000))
        wave = voice[start : start + int(seconds * 16000)].numpy()
        suffix = ("wav", "flac")[index % 2]
        sf.write(folder / f"{index:02}.{suffix}", wave, 16000, subtype="PCM_16")
    (folder / "05b.wav").write_bytes(b"no sound")
    (folder / "11.flac").write_bytes(b"")
    return folder
