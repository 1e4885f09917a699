"""What can be tuned: the places of the tables that hold a configuration, and what each of them is measured by.

A slot is an op and the keys of kernels/tuned/<op>.json from the family down: to a list that launches
choose from (attention: dkv/16bit/64), to one place of a list (layer_norm: backward/2), or to a
configuration (gemm: gelu). Plain values and the committed tables only: no GPU is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Entry = dict[str, Any]

# most valuable first; every table of kernels/tuned has its op here (a test holds it)
OPS = (
    "attention",
    "gemm",
    "layer_norm",
    "add_layer_norm",
    "mlp",
    "log_mel",
    "patch_embed",
    "attention_masked",
    "fp8",
)
# What is measured first: by share of a training step times how much a better choice may gain. A slot
# that is not named comes after the others of its op.
_VALUE = (
    ("attention", "dkv"),
    ("attention", "forward"),
    ("attention", "dq"),
    ("attention", "one_pass"),
    ("gemm", "gelu"),
    ("gemm", "gelu_backward"),
    ("gemm", "residual"),
    ("layer_norm", "backward"),
    ("add_layer_norm", "forward"),
    ("mlp", "gelu_backward"),
    ("log_mel", "power"),
    ("patch_embed", "forward"),
    ("gemm", "linear"),
    ("add_layer_norm", "backward"),
    ("layer_norm", "forward"),
    ("mlp", "gelu_forward"),
    ("attention_masked", "dkv"),
    ("attention_masked", "forward"),
    ("attention_masked", "dq"),
    ("fp8", "quantise"),
    ("fp8", "norm"),
    ("patch_embed", "weight_gradient"),
)
_FORWARD = {
    "attention": ("forward",),
    "attention_masked": ("forward",),
    "gemm": ("linear", "residual", "gelu"),
    "layer_norm": ("forward",),
    "add_layer_norm": ("forward",),
    "mlp": ("gelu_forward",),
    "log_mel": ("power", "mel"),
    "patch_embed": ("forward",),
    "fp8": ("facts", "quantise", "gelu", "norm"),
}
# kinds of arithmetic in paths, and the dtypes of the inputs that take them
_ARITHMETIC = {
    "16bit": ("bf16", "f16"),
    "f16": ("bf16", "f16"),
    "f32": ("f32",),
    "ieee": ("f32",),
    "tf32": (),
}
# of the lists by width of row: the widths of AST tiny, small and base
ROW_WIDTHS = {256: 192, 512: 384, 1024: 768}
# what a library offers in place of ours, by the candidates' names in the suites
LIBRARIES = {
    "attention": ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient"),
    "attention_masked": ("sdpa-mask",),
    "gemm": ("torch",),
    "layer_norm": ("torch",),
    "add_layer_norm": ("torch",),
    "mlp": ("torch",),
    "log_mel": ("torch",),
    "patch_embed": ("torch", "torch-unfold"),
    "fp8": (),
}
# matrix products that end in each epilogue, by the suite's names; a choice for one kind serves all of them
PRODUCTS = {
    "linear": ("qkv", "fc2"),
    "residual": ("fc2", "proj"),
    "gelu": ("fc1", "fc1 saved"),  # the pre-activation is stored too where a backward will come
    "gelu_backward": ("fc2",),
}
# clips that fill the GPU; of ops that only move memory enough that a launch costs less than the kernel
CLIPS = {"layer_norm": 128, "add_layer_norm": 128, "attention": 32, "attention_masked": 32}
_CLIPS = 64


class Slot(NamedTuple):
    """One place for a configuration."""

    op: str
    path: tuple[str, ...]

    @property
    def label(self) -> str:
        """`attention dkv/16bit/64`."""
        return f"{self.op} {'/'.join(self.path)}"

    @property
    def direction(self) -> str:
        """Which run of the op it is part of."""
        if self.op == "attention" and self.path[0] == "one_pass":
            return "backward_any_order"
        return "forward" if self.path[0] in _FORWARD[self.op] else "backward"

    @property
    def value(self) -> int:
        """Place in the order of what is worth measuring; 0 is the first."""
        head = (self.op, self.path[0])
        known = _VALUE.index(head) if head in _VALUE else len(_VALUE) + OPS.index(self.op)
        # the widths of smaller models come after everything that the largest one has
        return known + (0 if self._serves_base else 100)

    @property
    def _serves_base(self) -> bool:
        if self.op in ("layer_norm", "add_layer_norm") or (self.op, self.path[0]) == (
            "fp8",
            "norm",
        ):
            return self.path[-1] == "2"
        return "64" in self.path if self.op.startswith("attention") else True

    @property
    def case_key(self) -> str:
        """What tells its measurement from those of other slots of the same op and direction."""
        widths = self.op in ("layer_norm", "add_layer_norm")
        return self.path[-1] if widths else self.path[0] if self.op == "gemm" else ""

    @property
    def is_list(self) -> bool:
        """Whether a launch chooses from a list here."""
        return self.op == "attention"

    def dtype(self, asked: str) -> str:
        """The dtype that it is measured in."""
        return "f32" if self.op == "log_mel" else asked


def slot(op: str, path: Sequence[str]) -> Slot:
    """The slot of a candidate; under a mask it is the first of the list that a candidate replaces."""
    keys = tuple(path)
    if op == "attention_masked" and len(keys) == 3:
        keys = (*keys, "0")
    return Slot(op, keys)


def family(op: str, capability: int) -> dict[str, Any]:
    """The table of a GPU's family; empty where it has none."""
    from ast_fast.kernels import _tuned

    if op == "fp8" and _tuned.INTERPRETED:
        capability = max(capability, 89)  # the interpreter runs what a newer GPU would
    return _tuned.configs(op, capability) if _tuned.family(op, capability) else {}


def committed(place: Slot, capability: int) -> list[Entry]:
    """The entries of a slot, the one that large grids take first; empty where there are none."""
    node: Any = family(place.op, capability)
    for key in place.path:
        if isinstance(node, list):
            node = node[int(key)] if int(key) < len(node) else {}
        else:
            node = node.get(key, {})
    return list(node) if isinstance(node, list) else [node] if node else []


def slots(op: str, capability: int, dtype: str, widths: Sequence[int] = (64,)) -> list[Slot]:
    """Every slot of an op that a GPU of this capability (90 for 9.0) uses for one dtype."""
    return [
        place
        for place in _walk(op, family(op, capability), ())
        if serves(place, capability, dtype, widths)
    ]


def serves(place: Slot, capability: int, dtype: str, widths: Sequence[int]) -> bool:
    """Whether inputs of this dtype and these head widths take the slot."""
    if place.op.startswith("attention") and int(place.path[2]) not in widths:
        return False
    if place.op == "gemm" and dtype == "f32" and not _interpreted():
        return False
    entries = committed(place, capability)
    if not entries or entries[0].get("max_width", 1024) not in ROW_WIDTHS:
        return False
    kinds = [key for key in place.path if key in _ARITHMETIC]
    return all(dtype in _ARITHMETIC[kind] for kind in kinds)


def _interpreted() -> bool:
    from ast_fast.kernels import _tuned

    return _tuned.INTERPRETED


def _walk(op: str, node: Any, path: tuple[str, ...]) -> Iterator[Slot]:
    if not isinstance(node, dict):
        return  # a number for the whole family
    for key, item in node.items():
        below = (*path, key)
        if key == "use":
            continue
        if isinstance(item, list):
            places = range(1 if op == "attention_masked" else len(item))
            yield from (
                [Slot(op, below)]
                if op == "attention"
                else [Slot(op, (*below, str(place))) for place in places]
            )
        elif isinstance(item, dict) and not any(isinstance(x, dict | list) for x in item.values()):
            yield Slot(op, below)
        else:
            yield from _walk(op, item, below)


def clips(op: str, size: str) -> int:
    """Clips of 10 s in a measurement: enough to fill the GPU, or one."""
    return 1 if size == "small" else CLIPS.get(op, _CLIPS)
