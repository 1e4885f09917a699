"""The hot ops, each registered as `torch.ops.ast_fast.<name>`, with a choice of backend per call."""

from ..attention_mask import AttentionMask
from .add_layer_norm import add_layer_norm
from .attention import attention, attention_qkv
from .attention_biased import attention_biased
from .attention_masked import attention_masked
from .attention_varlen import attention_varlen
from .layer_norm import layer_norm
from .linear import linear
from .log_mel import log_mel
from .mlp import mlp
from .patch_embed import patch_embed, patch_grid

__all__ = [
    "AttentionMask",
    "add_layer_norm",
    "attention",
    "attention_biased",
    "attention_masked",
    "attention_qkv",
    "attention_varlen",
    "layer_norm",
    "linear",
    "log_mel",
    "mlp",
    "patch_embed",
    "patch_grid",
]
