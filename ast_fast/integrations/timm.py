"""AST among timm's models: `import ast_fast.integrations.timm`, then `timm.create_model("ast_base_p16_s10")`.

Every model of `ast_fast.list_models()` is registered under its name, with the methods that timm's training
script, optimisers and tools call. State dicts are those of `ast_fast.ASTModel`.
Dimensions: B clips, S frames, F mel bins, T tokens, C width, P prefix tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import hub
from .._optional import require_package
from ..config import LogMelConfig, ModelConfig
from ..models.ast import ASTModel
from ..models.registry import create_model, list_models

_timm = require_package("timm", "ast_fast.integrations.timm", "timm")

_HUB = "MIT/ast-finetuned-audioset-"
_HUB_IDS = {
    "ast_base_p16_s10": _HUB + "10-10-0.4593",
    "ast_base_p16_s12": _HUB + "12-12-0.447",
    "ast_base_p16_s14": _HUB + "14-14-0.443",
    "ast_base_p16_s16": _HUB + "16-16-0.442",
}
# what timm's tools give every model
_UNUSED = ("cache_dir", "scriptable", "exportable", "no_jit")
_ONLY = {"in_chans": 1, "drop_rate": 0.0, "drop_path_rate": 0.0, "global_pool": "token"}


class TimmAST(ASTModel):
    """An `ASTModel` with timm's methods: spectrograms [B, S, F] or [B, 1, S, F] to logits [B, num_classes].

    Attributes:
        num_classes: width of the head, 0 where there is none.
        num_features: C, width of the features before the head.
        pretrained_cfg: timm's description of the model; `default_cfg` is the same.
    """

    pretrained_cfg: dict[str, Any]

    @property
    def num_features(self) -> int:
        """C."""
        return self.config.embed_dim

    @property
    def head_hidden_size(self) -> int:
        """C: what `forward_head(pre_logits=True)` gives."""
        return self.config.embed_dim

    @property
    def embed_dim(self) -> int:
        """C."""
        return self.config.embed_dim

    @property
    def num_classes(self) -> int:
        """Width of the head, 0 where it was taken away."""
        head = self.get_classifier()
        return head.out_features if isinstance(head, nn.Linear) else 0

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What older timm calls `pretrained_cfg`."""
        return self.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of [B, S, F] or [B, 1, S, F]."""
        return super().forward(_spectrograms(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, T, C] after the final norm: class, distillation, then patches."""
        return super().forward_features(_spectrograms(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of tokens [B, T, C]; before the last layer [B, C] for `pre_logits`."""
        if not pre_logits:
            return self._head(x)
        pooled = x[:, : self.config.num_prefix_tokens].mean(1)
        return self.mlp_head[0](pooled)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.mlp_head[1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer with random weights.

        Args:
            num_classes: its width; 0 for none.
            global_pool: None or "token": an AST reads its prefix tokens.
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool={global_pool!r}: expected None or 'token'")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected 0 (no classifier) or more")
        if num_classes:
            weight = self.v.pos_embed
            head: nn.Module = nn.Linear(self.num_features, num_classes)
            head = head.to(device=weight.device, dtype=weight.dtype)
            # the config has no model without classes: it keeps what it was until there are some
            self.config = self.config.replace(label_dim=num_classes, labels=None, problem_type=None)
        else:
            head = nn.Identity()
        self.mlp_head[1] = head

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers should not decay, beside biases and norms."""
        return {"v.pos_embed", "v.cls_token", "v.dist_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameters belong to layers, for layer-wise rates."""
        blocks: Any = r"^v\.blocks\.(\d+)" if coarse else [(r"^v\.blocks\.(\d+)", None)]
        if not coarse:
            blocks.append((r"^v\.norm\.", (99999,)))
        stem = r"^v\.(?:cls_token|dist_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": blocks}


def _spectrograms(x: Tensor) -> Tensor:
    # timm's tools make images of `input_size`
    return x[:, 0] if x.dim() == 4 and x.shape[1] == 1 else x


def _description(name: str, config: ModelConfig, frontend: LogMelConfig) -> dict[str, Any]:
    hub_id = _HUB_IDS.get(name)
    return {
        "url": "",
        "hf_hub_id": hub_id,
        "architecture": name,
        "tag": "",
        "custom_load": False,
        "license": "bsd-3-clause",
        "input_size": (1, config.input_tdim, config.input_fdim),
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (frontend.mean,),
        "std": (2.0 * frontend.std,),
        "num_classes": config.label_dim,
        "pool_size": None,
        "first_conv": "v.patch_embed.proj",
        "classifier": "mlp_head.1",
    }


def _source(name: str, given: Mapping[str, Any]) -> Any:
    """Where pretrained weights of a model come from: a file or directory, else the hub."""
    source = given.get("file") or given.get("hf_hub_id") or _HUB_IDS.get(name)
    if source is None:
        raise hub.CheckpointError(
            f"there are no published weights of {name}: pass pretrained=False, "
            "pretrained_cfg_overlay={'file': PATH}, or take one of " + ", ".join(_HUB_IDS)
        )
    return source


def _plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The model's own settings of a call by timm."""
    for key in _UNUSED:
        settings.pop(key, None)
    for key, only in _ONLY.items():
        value = settings.pop(key, None)
        if value is not None and value != only:
            raise ValueError(f"{key}={value!r}: an AST takes {only!r} only")
    return settings


def _entry_point(name: str) -> Callable[..., TimmAST]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        **settings: Any,
    ) -> TimmAST:
        settings = _plain_settings(settings)
        if pretrained:
            given = {**_as_dict(pretrained_cfg), **(pretrained_cfg_overlay or {})}
            if num_classes:
                settings["label_dim"] = num_classes
            model = TimmAST.from_pretrained(_source(name, given), **settings)
        else:
            with torch.device("meta"):  # its sizes alone are of interest
                made: Any = create_model(name, num_classes or None, **settings)
            model = TimmAST.from_config(made.config, made.frontend_config)
        model.pretrained_cfg = _description(name, model.config, model.frontend_config)
        if num_classes == 0:
            model.reset_classifier(0)
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    return build


def _as_dict(description: Any) -> dict[str, Any]:
    if description is None or isinstance(description, str):
        return {}
    return dict(description if isinstance(description, Mapping) else description.to_dict())


def register() -> list[str]:
    """Make every model of `ast_fast.list_models()` known to timm; importing this module does it.

    Returns:
        Their names. One that timm knows already stays timm's.
    """
    module, names = sys.modules[__name__], []
    for name in list_models():
        if not _timm.is_model(name):
            setattr(module, name, _timm.models.register_model(_entry_point(name)))
            names.append(name)
    return names


__all__ = ["TimmAST", "register"]
register()
