"""What backward keeps of a block: counted, held to a budget, and the same gradients with less."""

import gc

import pytest
import torch
from torch import nn

from ast_fast import create_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"embed_dim": 192, "num_heads": 3, "input_tdim": 64}
MODES = ("fast", "less", "least")


def model(mode, dtype=torch.bfloat16, depth=2, **sizes):
    torch.manual_seed(0)
    made = create_model("ast_tiny_p16_s10", num_classes=7, depth=depth, **{**SIZES, **sizes})
    made.set_activation_memory(mode)
    return made.to(dtype)


def kept_bytes(network, x, autocast=False):
    """Bytes of distinct storages [B, ...] that autograd keeps, each counted once."""
    clips, kept = len(x), {}

    def pack(tensor):
        # a matrix product keeps [B * T, C]; no side of a weight is a multiple of five
        if tensor.dim() > 1 and tensor.shape[0] % clips == 0:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    amp = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), amp:
        network(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def block_units(mode, autocast=False, **sizes):
    """Kept bytes a block and clip, in units of one bfloat16 tensor [T, C]."""
    dtype, clips = torch.float32 if autocast else torch.bfloat16, 5
    kept = []
    for depth in (2, 4):
        network = model(mode, dtype, depth, **sizes)
        x = torch.randn(clips, network.config.input_tdim, 128, dtype=dtype)
        kept.append(kept_bytes(network, x, autocast))
    config = network.config
    return (kept[1] - kept[0]) / 2 / clips / (config.num_tokens * config.embed_dim * 2)


@pytest.mark.parametrize(
    ("mode", "autocast", "most"),
    [
        # log-sum-exp takes the rest: one float32 a head, and tokens up to a multiple of 128
        ("fast", False, 12.15),
        ("less", False, 10.15),
        ("least", False, 1.01),
        # the residual stream is float32: twice as wide
        ("fast", True, 14.15),
        ("less", True, 12.15),
        ("least", True, 2.01),
    ],
)
def test_a_block_keeps_no_more_than_its_budget(mode, autocast, most):
    units = block_units(mode, autocast)
    assert most - 0.6 < units <= most, units


@pytest.mark.slow
def test_base_at_ten_seconds_keeps_less_than_240_mb_a_clip():
    sizes = {"embed_dim": 768, "num_heads": 12, "input_tdim": 1024}
    tensor = 1214 * 768 * 2
    assert 12 * block_units("less", **sizes) * tensor < 240e6
    assert 12 * block_units("fast", **sizes) * tensor > 240e6


def gradients(network, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["less", "least"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_gradients_are_the_same_with_less(mode, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x = torch.randn(2, 64, 128, dtype=dtype)
    found = [gradients(model(each, dtype), x, kind == "autocast") for each in ("fast", mode)]
    assert len(found[0]) == len(found[1]) > 20
    for ours, theirs in zip(*found, strict=True):
        if mode == "less":  # the last block of "least" computes all tokens, not the prefix alone
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-3)


def test_adapters_and_hooks_on_the_readers_work_with_less():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(192, 4, bias=False)
            self.up = nn.Linear(4, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    x, found = torch.randn(2, 64, 128), []
    for mode in ("fast", "less"):
        network = model(mode, torch.float32)
        torch.manual_seed(1)
        network.v.blocks[0].attn.qkv = Adapted(network.v.blocks[0].attn.qkv)
        network.v.blocks[1].mlp.register_forward_hook(lambda *_: None)
        found.append(gradients(network, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_offloading_around_the_model_still_sees_the_rest():
    network, x = model("less", torch.float32), torch.randn(2, 64, 128)
    expected = gradients(model("fast", torch.float32), x)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(network, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_checkpoint_around_the_model_keeps_its_input_alone():
    network = model("less", torch.float32)
    x = torch.randn(2, 64, 128, requires_grad=True)
    expected = gradients(network, x)
    network.zero_grad()
    y = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)
    y.float().square().mean().backward()
    found = [y.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_norms_changed_before_backward_are_an_error_not_a_wrong_gradient():
    network = model("less", torch.float32)
    y = network(torch.randn(2, 64, 128)).sum()
    with torch.no_grad():
        network.v.blocks[1].norm2.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        y.backward()


def test_nothing_is_left_behind_after_backward():
    network, x = model("less"), torch.randn(2, 64, 128, dtype=torch.bfloat16)

    def big():
        gc.collect()
        return sum(
            1
            for each in gc.get_objects()
            if isinstance(each, torch.Tensor) and each.dim() == 3 and each.shape[0] == 2
        )

    gradients(network, x)
    before = big()
    gradients(network, x)
    assert big() == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_exported_in_every_mode(mode, dtype):
    torch._dynamo.reset()
    network, x = model(mode, dtype), torch.randn(2, 64, 128, dtype=dtype)
    expected = gradients(network, x)
    network.zero_grad()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-4)
    network.eval()
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), expected[0], rtol=2e-2, atol=2e-4)


def test_an_unknown_mode_is_an_error_and_checkpointing_stays():
    network = model("fast")
    with pytest.raises(ValueError, match="mode='lots': expected fast, less or least"):
        network.set_activation_memory("lots")
    network.set_grad_checkpointing(True)
    assert network.v.grad_checkpointing
    network.set_activation_memory("fast")
    assert not network.v.grad_checkpointing
