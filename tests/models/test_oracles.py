"""Other people's models with the same weights must give the same logits and gradients.

Oracle: transformers' or timm's model in float64. Budget: twice what the same model does in float32,
or the floor, as everywhere. The grid has two blocks: errors grow with depth alike for both sides,
and the full depth runs for the three recipes' shapes (slow).

As a replacement, the model is held to what a user compares: the original's constructor at full depth,
every size, stride and length of the original's scripts and other numbers of mel bins, logits in float32
beside theirs in float32, and a state dict that comes back from either to the bit.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import ast_fast
from ast_fast import hub
from ast_fast.config import ModelConfig
from ast_fast.equivalence.budgets import budget
from ast_fast.equivalence.measures import measure

SIZES = {
    "tiny224": {"embed_dim": 192, "num_heads": 3},
    "small224": {"embed_dim": 384, "num_heads": 6},
    "base224": {"embed_dim": 768, "num_heads": 12},
    "base384": {"embed_dim": 768, "num_heads": 12},
}
# size, stride, frames, mel bins: each size, stride, length and bin count occurs with several others;
# long inputs go with narrow models to keep the run short
GRID = [
    ("tiny224", 10, 1024, 128),
    ("tiny224", 12, 2048, 128),
    ("tiny224", 14, 998, 97),
    ("tiny224", 16, 100, 64),
    ("tiny224", 10, 100, 80),
    ("small224", 10, 256, 128),
    ("small224", 12, 1000, 80),
    ("small224", 14, 128, 33),
    ("small224", 16, 1024, 128),
    ("base224", 10, 128, 128),
    ("base224", 12, 512, 97),
    ("base224", 14, 256, 128),
    ("base224", 16, 100, 17),
    ("base384", 10, 300, 128),
    ("base384", 12, 128, 64),
    ("base384", 14, 512, 128),
    ("base384", 16, 1212, 128),
]
# of the original's scripts and README
LENGTHS = (100, 128, 256, 512, 998, 1024)
# sizes with 128 mel bins, of which stride 10 makes 12 rows of patches and 16 makes 8; then other bins
DROP_IN = [(size, s, n, 128) for size in SIZES for s in (10, 16) for n in LENGTHS] + [
    ("tiny224", 10, 256, 64),
    ("tiny224", 16, 998, 97),
    ("small224", 10, 128, 80),
    ("small224", 16, 512, 33),
    ("base224", 10, 100, 40),
    ("base224", 16, 256, 200),
    ("base384", 10, 128, 64),
    ("base384", 16, 1024, 17),
]
# of logits in float32, at full depth; either side alone is 6e-7 from float64
DROP_IN_BUDGET = 2e-6
RECIPES = [("base384", 10, 1024, 128), ("base384", 10, 512, 128), ("base384", 10, 128, 128)]
# a gradient of one tensor in float32 is a sum over tokens and blocks, then cancelled in part
TENSOR_FLOOR = 5e-6

Result = tuple[Tensor, dict[str, Tensor]]


@dataclasses.dataclass
class Case:
    model: ast_fast.ASTModel
    x: Tensor
    upstream: Tensor


def make_case(
    size: str, stride: int, frames: int, bins: int, depth: int, **changes: object
) -> Case:
    config = ModelConfig(
        label_dim=31, fstride=stride, tstride=stride, input_tdim=frames, input_fdim=bins, depth=depth,
        **SIZES[size], **changes,
    )  # fmt: skip
    torch.manual_seed(frames + bins + stride)
    model = ast_fast.ASTModel.from_config(config)
    with torch.no_grad():
        # biases of 0 and norms of 1 would hide a parameter that is not used
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return Case(model, torch.randn(1, frames, bins), torch.randn(1, 31))


def run(
    forward: nn.Module, parameters: dict[str, Tensor], case: Case, dtype: torch.dtype
) -> Result:
    logits = forward(case.x.to(dtype))
    grads = torch.autograd.grad(logits, list(parameters.values()), case.upstream.to(dtype))
    return logits.detach(), dict(zip(parameters, grads, strict=True))


def run_ours(case: Case) -> Result:
    live = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    return run(case.model, live, case, torch.float32)


def transformers_model(c: ModelConfig, attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
        intermediate_size=4 * c.embed_dim, layer_norm_eps=c.eps, frequency_stride=c.fstride,
        time_stride=c.tstride, max_length=c.input_tdim, num_mel_bins=c.input_fdim,
        num_labels=c.label_dim, attn_implementation=attention,
    )  # fmt: skip
    return transformers.ASTForAudioClassification(config).eval()


def run_transformers(case: Case, dtype: torch.dtype, attention: str = "sdpa") -> Result:
    theirs = transformers_model(case.model.config, attention).to(dtype)
    theirs.load_state_dict(hub.to_transformers(case.model.state_dict(), version=5))
    logits, grads = run(lambda x: theirs(x).logits, dict(theirs.named_parameters()), case, dtype)
    return logits, hub.to_ours(grads)


class TimmAST(nn.Module):
    """The original's recipe: a timm DeiT with a projection and positions of its own, and a head."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        name = {192: "tiny", 384: "small", 768: "base"}[c.embed_dim]
        self.v = timm.create_model(f"deit_{name}_distilled_patch16_224", depth=c.depth)
        self.v.patch_embed.proj = nn.Conv2d(1, c.embed_dim, 16, (c.fstride, c.tstride))
        self.v.pos_embed = nn.Parameter(torch.zeros(1, c.num_tokens, c.embed_dim))
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(c.embed_dim), nn.Linear(c.embed_dim, c.label_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        v = self.v
        x = v.patch_embed.proj(x.unsqueeze(1).transpose(2, 3)).flatten(2).transpose(1, 2)
        prefix = torch.cat((v.cls_token, v.dist_token), dim=1).expand(x.shape[0], -1, -1)
        x = torch.cat((prefix, x), dim=1) + v.pos_embed
        x = v.norm(v.blocks(x))
        return self.mlp_head((x[:, 0] + x[:, 1]) / 2)


def run_timm(case: Case, dtype: torch.dtype) -> Result:
    theirs = TimmAST(case.model.config).to(dtype).eval()
    theirs.load_state_dict(case.model.state_dict())
    dead = ("v.head.", "v.head_dist.")
    live = {name: p for name, p in theirs.named_parameters() if not name.startswith(dead)}
    return run(theirs, live, case, dtype)


def require_close(ours: Result, plain: Result, oracle: Result) -> None:
    (logits, grads), (plain_logits, plain_grads), (want_logits, want_grads) = ours, plain, oracle
    allowed = budget("logits", "float32", measure(plain_logits, want_logits))
    got = measure(logits, want_logits)
    assert allowed.admits(got), f"logits: {got}, allowed {allowed}"
    assert grads.keys() == want_grads.keys()

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].double().flatten() for name in want_grads])

    whole = measure(flat(grads), flat(want_grads)).rel_l2
    plain_whole = measure(flat(plain_grads), flat(want_grads)).rel_l2
    assert whole <= max(2 * plain_whole, 3e-6), f"all gradients: {whole}, plain {plain_whole}"
    for name, want in want_grads.items():
        error = measure(grads[name], want).rel_l2
        allowed_error = max(2 * measure(plain_grads[name], want).rel_l2, TENSOR_FLOOR)
        assert error <= allowed_error, f"gradient of {name}: {error}, allowed {allowed_error}"


@pytest.mark.parametrize(("size", "stride", "frames", "bins"), GRID)
def test_transformers_gives_the_same_logits_and_gradients(size, stride, frames, bins):
    case = make_case(size, stride, frames, bins, depth=2, eps=1e-12, head_eps=1e-12)
    oracle = run_transformers(case, torch.float64)
    require_close(run_ours(case), run_transformers(case, torch.float32), oracle)


@pytest.mark.parametrize(("size", "stride", "frames", "bins"), GRID[::4])
def test_eager_attention_of_transformers_gives_the_same(size, stride, frames, bins):
    case = make_case(size, stride, frames, bins, depth=2, eps=1e-12, head_eps=1e-12)
    # its softmax is float32 in any dtype: the oracle stays the other implementation
    oracle = run_transformers(case, torch.float64)
    require_close(run_ours(case), run_transformers(case, torch.float32, "eager"), oracle)


@pytest.mark.parametrize(("size", "stride", "frames", "bins"), GRID[::2])
def test_timm_deit_gives_the_same_logits_and_gradients(size, stride, frames, bins):
    case = make_case(size, stride, frames, bins, depth=2)
    require_close(run_ours(case), run_timm(case, torch.float32), run_timm(case, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stride", "frames", "bins"), RECIPES)
def test_both_agree_at_full_depth_for_the_recipes(size, stride, frames, bins):
    case = make_case(size, stride, frames, bins, depth=12)
    case.x, case.upstream = case.x[:1], case.upstream[:1]
    ours = run_ours(case)
    require_close(ours, run_timm(case, torch.float32), run_timm(case, torch.float64))
    del ours
    case = make_case(size, stride, frames, bins, depth=12, eps=1e-12, head_eps=1e-12)
    case.x, case.upstream = case.x[:1], case.upstream[:1]
    oracle = run_transformers(case, torch.float64)
    require_close(run_ours(case), run_transformers(case, torch.float32), oracle)


def drop_in_case(case: tuple[str, int, int, int]):
    size, _, frames, _ = case
    quick = size == "tiny224" or (size == "small224" and frames < 256)
    return pytest.param(*case, marks=() if quick else pytest.mark.slow)


def without_heads(state):
    return {name: value for name, value in state.items() if not name.startswith("v.head")}


@pytest.mark.parametrize(
    ("size", "stride", "frames", "bins"), [drop_in_case(case) for case in DROP_IN]
)
def test_the_originals_constructor_gives_a_replacement(size, stride, frames, bins):
    torch.manual_seed(frames + bins + stride)
    ours = ast_fast.ASTModel(
        label_dim=31, fstride=stride, tstride=stride, input_fdim=bins, input_tdim=frames,
        imagenet_pretrain=False, model_size=size, verbose=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ours.eval()
    state, x = ours.state_dict(), torch.randn(1, frames, bins)

    deit = TimmAST(ours.config).eval()
    deit.load_state_dict(state)
    with torch.no_grad():
        want = deit(x)
        assert measure(ours(x), want.double()).rel_l2 <= DROP_IN_BUDGET
    back = deit.state_dict()
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    del deit, back

    same = ast_fast.ASTModel.from_config(ours.config.replace(eps=1e-12, head_eps=1e-12)).eval()
    same.load_state_dict(state)
    theirs = transformers_model(same.config)
    theirs.load_state_dict(hub.to_transformers(state, version=5))
    with torch.no_grad():
        want = theirs(x).logits
        assert measure(same(x), want.double()).rel_l2 <= DROP_IN_BUDGET
    back, kept = hub.to_ours(theirs.state_dict()), without_heads(state)
    assert set(back) == set(kept) and all(torch.equal(back[name], kept[name]) for name in kept)
