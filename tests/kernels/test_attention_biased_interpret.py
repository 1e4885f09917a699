"""The attention kernel with a bias a key in the Triton interpreter, against float64."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is chosen when kernels are decorated: set TRITON_INTERPRET=1 and run these "
        "tests in a process of their own",
        allow_module_level=True,
    )

from ast_fast.kernels import attention, attention_biased
from ast_fast.kernels.attention_launch import Config
from ast_fast.reference import ops as reference

pytestmark = pytest.mark.interpret

FLOORS = {torch.float32: 2e-6, torch.float16: 1e-3}
CONFIGS = [
    Config(64, 32, 4, 2),
    Config(64, 32, 4, 2, tma=True),
    Config(32, 32, 4, 1, chunk=16),
]


def tensors(clips, queries, keys, heads, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(clips, queries, heads, width, generator=generator).to(dtype)
    k, v = (torch.randn(clips, keys, heads, width, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, torch.randint(1, 40, (clips, keys), generator=generator).float().log()


def oracle(q, k, v, bias, scale):
    wide = (each.double() for each in (q, k, v))
    return reference.attention(*wide, scale, None, bias.double())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 97])
def test_output_and_log_sum_exp(keys, dtype, config):
    q, k, v, bias = tensors(2, 35, keys, 2, 32, dtype)
    o, lse = attention_biased.forward(q, k, v, bias, 0.2, config=config)
    want, want_lse = oracle(q, k, v, bias, 0.2)
    assert float((o.double() - want).norm() / want.norm()) < FLOORS[dtype]
    torch.testing.assert_close(lse[:, :, :35].double(), want_lse[:, :, :35], rtol=1e-5, atol=1e-5)
    assert lse[:, :, 35:].isposinf().all()


@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("scale", [0.125, -0.3, 0.0])
def test_every_width_and_scale(width, scale):
    q, k, v, bias = tensors(1, 17, 45, 2, width)
    o, _ = attention_biased.forward(q, k, v, bias, scale)
    want, _ = oracle(q, k, v, bias, scale)
    assert float((o.double() - want).norm() / want.norm()) < FLOORS[torch.float32]


def test_strided_bias_and_no_bias():
    q, k, v, bias = tensors(3, 17, 45, 2, 64)
    spread = torch.stack((bias, bias), dim=2)[:, :, 0]
    assert torch.equal(
        attention_biased.forward(q, k, v, spread, 0.125)[0],
        attention_biased.forward(q, k, v, bias, 0.125)[0],
    )
    plain = attention.forward(q, k, v, 0.125, None)[0]
    zero = attention_biased.forward(q, k, v, torch.zeros_like(bias), 0.125)[0]
    torch.testing.assert_close(zero, plain, rtol=1e-5, atol=1e-6)


def test_the_bias_of_a_clip_is_its_own():
    q, k, v, bias = tensors(3, 17, 33, 2, 32)
    bias[1, 32] += 80.0
    o, _ = attention_biased.forward(q, k, v, bias, 0.125)
    torch.testing.assert_close(o[1], v[1, 32].expand_as(o[1]))
    want, _ = oracle(q, k, v, bias, 0.125)
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(2, 32), "expected float32"),
        (torch.zeros(2, 33, dtype=torch.float64), "float64"),
    ],
)
def test_what_it_cannot_take(bias, message):
    q, k, v, _ = tensors(2, 5, 33, 2, 32)
    assert message in attention_biased.unsupported(q, k, v, bias)
