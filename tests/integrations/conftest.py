"""Small models of transformers with weights that use every parameter."""

import pytest
import torch

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_length": 96,
    "num_mel_bins": 64,
    "num_labels": 7,
}


@pytest.fixture
def make_ast():
    """Builds `ASTForAudioClassification`, or another class, with weights away from zeros and ones."""

    transformers = pytest.importorskip("transformers")

    def make(kind="ASTForAudioClassification", attention="sdpa", **changes):
        torch.manual_seed(3)
        config = transformers.ASTConfig(**{**SIZES, **changes})
        config._attn_implementation = attention
        model = getattr(transformers, kind)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval()

    return make


@pytest.fixture
def batch():
    """Three spectrograms [3, 96, 64] and their classes."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 96, 64, generator=generator), torch.tensor([1, 0, 6])
