"""The hot ops, each registered as `torch.ops.ast_fast.<name>`, with a choice of backend per call."""

from ..attention_mask import AttentionMask
from .add_layer_norm import add_layer_norm
from .attention import attention, attention_qkv
from .attention_biased import attention_biased
from .attention_masked import attention_masked
from .attention_varlen import attention_varlen
from .layer_norm import layer_norm
from .linear import linear
from .linear_fp8 import add_norm_linear_fp8, linear_fp8
from .log_mel import log_mel
from .mlp import mlp
from .mlp_fp8 import add_norm_mlp_fp8, mlp_fp8
from .patch_embed import patch_embed, patch_grid

__all__ = [
    "AttentionMask",
    "add_layer_norm",
    "add_norm_linear_fp8",
    "add_norm_mlp_fp8",
    "attention",
    "attention_biased",
    "attention_masked",
    "attention_qkv",
    "attention_varlen",
    "layer_norm",
    "linear",
    "linear_fp8",
    "log_mel",
    "mlp",
    "mlp_fp8",
    "patch_embed",
    "patch_grid",
]
