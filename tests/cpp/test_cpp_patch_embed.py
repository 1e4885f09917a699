"""Patch embedding of the C++ backend against a float64 convolution."""

import pytest
import torch
import torch.nn.functional as F

from ast_fast.cpp import patch_embed

F32, BF16 = torch.float32, torch.bfloat16
# clips, frames, bins, patch (frequency, time), strides (frequency, time), prefix tokens, width
CASES = {
    "the model's patches": (2, 100, 128, (16, 16), (10, 10), 2, 48),
    "no overlap, odd sizes": (3, 67, 37, (16, 16), (16, 16), 1, 7),
    "tall patches": (1, 21, 128, (128, 2), (128, 1), 2, 24),
    "wide patches, stride beyond the patch": (2, 90, 70, (32, 32), (33, 40), 0, 16),
    "one patch": (1, 3, 5, (5, 3), (1, 1), 2, 4),
    "tokens past one block, a patch past one pass": (2, 120, 100, (32, 20), (7, 5), 2, 96),
    "a run of bins that straddles two passes": (2, 40, 50, (24, 16), (9, 6), 1, 32),
    "stride one": (2, 9, 8, (3, 4), (1, 1), 1, 5),
}


def plain(x, weight, bias, pos, prefix, strides):
    tokens = F.conv2d(x.transpose(1, 2)[:, None], weight, bias, stride=strides).flatten(2).mT
    return torch.cat((prefix.expand(x.shape[0], -1, -1), tokens), 1) + pos


def inputs(case, dtype):
    clips, frames, bins, patch, strides, prefix, width = CASES[case]
    f = (bins - patch[0]) // strides[0] + 1
    t = (frames - patch[1]) // strides[1] + 1
    shapes = (
        (clips, frames, bins),
        (width, 1, *patch),
        (width,),
        (prefix + f * t, width),
        (prefix, width),
    )
    return [(torch.randn(shape) * 0.5).to(dtype) for shape in shapes], strides, prefix


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_patch_embed_matches_a_convolution_in_fp64(case, dtype, within):
    tensors, strides, num_prefix = inputs(case, dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    y64, y_torch = plain(*exact, strides), plain(*theirs, strides)
    dy = torch.randn(y64.shape).to(dtype)
    y64.backward(dy.double())
    y_torch.backward(dy)
    floor = 2e-6 if dtype == F32 else 8e-3
    y = patch_embed.forward(*tensors, *strides)
    assert y.dtype == dtype and y.is_contiguous()
    within(y, y_torch.detach(), y64.detach(), floor, "y")
    dweight, dbias, dpos, dprefix, dx = patch_embed.backward(
        dy, tensors[0], tensors[1], *strides, num_prefix, True
    )
    for name, ours, index in (
        ("dx", dx, 0),
        ("dweight", dweight, 1),
        ("dbias", dbias, 2),
        ("dpos", dpos, 3),
        ("dprefix", dprefix, 4),
    ):
        if ours.numel():
            within(ours, theirs[index].grad, exact[index].grad, floor, name)
    assert patch_embed.backward(dy, tensors[0], tensors[1], *strides, num_prefix, False)[4] is None


@pytest.mark.parametrize(
    "case",
    [
        "the model's patches",
        "tokens past one block, a patch past one pass",
        "a run of bins that straddles two passes",
    ],
)
def test_the_kernels_own_multiplication_agrees_with_pytorchs(case, monkeypatch, within):
    (x, weight, bias, pos, prefix), strides, num_prefix = inputs(case, F32)
    weight, bias = weight.repeat(2, 1, 1, 1)[:32], bias.repeat(2)[:32]
    pos, prefix = pos[:, :32].contiguous(), prefix[:, :32].contiguous()
    wide = [t.double().requires_grad_() for t in (x, weight, bias, pos, prefix)]
    exact = plain(*wide, strides)
    dy = torch.randn(exact.shape)
    exact.backward(dy.double())
    own_results = []
    for own in {False, patch_embed._OWN_GEMM}:
        monkeypatch.setattr(patch_embed, "_OWN_GEMM", own)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = patch_embed.forward(x, weight, bias, pos, prefix, *strides)
            within(y, None, exact.detach(), 1e-6, f"own GEMM: {own}")
            for needs_dx in (False, True):
                dweight, *_, dx = patch_embed.backward(
                    dy, x, weight, *strides, num_prefix, needs_dx
                )
                within(dweight, None, wide[1].grad, 1e-6, f"dweight, own GEMM: {own}")
                if needs_dx:
                    within(dx, None, wide[0].grad, 1e-6, f"dx, own GEMM: {own}")
                if own:
                    own_results.append(dweight)
    assert all(torch.equal(result, own_results[0]) for result in own_results)


def test_views_of_a_larger_batch_cost_no_change_in_the_result():
    (x, weight, bias, pos, prefix), strides, num_prefix = inputs("the model's patches", F32)
    big = torch.randn(4, 150, 140)
    big[1:3, 20:120, 6:134] = x
    view = big[1:3, 20:120, 6:134]
    assert torch.equal(
        patch_embed.forward(view, weight, bias, pos, prefix, *strides),
        patch_embed.forward(x, weight, bias, pos, prefix, *strides),
    )
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    dy = torch.randn(2, pos.shape[0], 48)
    for a, b in zip(
        patch_embed.backward(dy, transposed, weight, *strides, num_prefix, True),
        patch_embed.backward(dy, x, weight, *strides, num_prefix, True),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_blocks_of_clips_join_without_a_seam(monkeypatch, within):
    (x, weight, bias, pos, prefix), strides, num_prefix = inputs("the model's patches", F32)
    x = torch.randn(7, *x.shape[1:])
    whole = patch_embed.forward(x, weight, bias, pos, prefix, *strides)
    dy = torch.randn(whole.shape)
    grads = patch_embed.backward(dy, x, weight, *strides, num_prefix, True)
    monkeypatch.setattr(patch_embed, "_SCRATCH_BYTES", 3 * pos.shape[0] * 256 * 4)
    assert torch.allclose(
        patch_embed.forward(x, weight, bias, pos, prefix, *strides), whole, atol=1e-5
    )
    for ours, oracle in zip(
        patch_embed.backward(dy, x, weight, *strides, num_prefix, True), grads, strict=True
    ):
        within(ours, None, oracle.double(), 2e-6)


def test_an_empty_batch_and_a_nan_in_one_clip():
    (x, weight, bias, pos, prefix), strides, num_prefix = inputs("the model's patches", F32)
    y = patch_embed.forward(x[:0], weight, bias, pos, prefix, *strides)
    assert y.shape == (0, pos.shape[0], 48)
    grads = patch_embed.backward(y, x[:0], weight, *strides, num_prefix, True)
    assert [tuple(g.shape) for g in grads[:4]] == [
        weight.shape,
        bias.shape,
        pos.shape,
        prefix.shape,
    ]
    assert not any(g.any() for g in grads[:4]) and grads[4].shape == (0, 100, 128)
    x[0, 50, 60] = float("nan")
    y = patch_embed.forward(x, weight, bias, pos, prefix, *strides)
    assert y[0].isnan().any() and y[0, :2].isfinite().all() and y[1].isfinite().all()
