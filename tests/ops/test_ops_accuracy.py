"""Every op, forward and every gradient, against float64, on every backend that runs here."""

import pytest
import torch

from ast_fast.equivalence import cases
from ast_fast.equivalence.run_log_mel import log_mel_cases, run_log_mel_case, run_log_mel_gradient
from ast_fast.equivalence.run_ops import run_op_case
from ast_fast.testing import available_backends

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# one below, on and above the kernels' block of 128 tokens; widths of AST and one that is no multiple
TOKENS = (1, 2, 127, 128, 129)
WIDTHS = (192, 384, 768, 1023)
CASES = {
    **{
        f"layer_norm {r}x{w}": cases.layer_norm(r, w)
        for r, w in zip((1, 2, 65, 130), WIDTHS, strict=True)
    },
    **{
        f"add_layer_norm {r}x{w}": cases.add_layer_norm(r, w)
        for r, w in zip((1, 2, 65, 130), WIDTHS, strict=True)
    },
    "layer_norm few columns": cases.layer_norm(5, 17),
    **{f"mlp {r}x{w}": cases.mlp(r, w) for r, w in ((1, 48), (65, 192), (33, 95))},
    "patch_embed 16x16": cases.patch_embed(2, 100, 96),
    "patch_embed 16x16 stride 16": cases.patch_embed(2, 96, 33, (16, 16), (16, 16)),
    "patch_embed 128x2": cases.patch_embed(2, 31, 48, (128, 2), (128, 1)),
    "patch_embed 32x32": cases.patch_embed(1, 67, 48, (32, 32), (32, 17)),
    "patch_embed one patch": cases.patch_embed(3, 16, 48, (128, 16), (1, 1)),
    **{f"attention T{t}": cases.attention(2, t, 2) for t in TOKENS},
    **{f"attention D{d}": cases.attention(1, 70, 2, d) for d in (32, 96, 128)},
    "attention lengths": cases.attention(4, 133, 1, 64, [133, 128, 1, 0]),
    **{f"attention_qkv T{t}": cases.attention_qkv(2, t, 3) for t in TOKENS},
    "attention_varlen": cases.attention_varlen([129, 1, 0, 128, 17], 2),
    "attention_varlen one clip": cases.attention_varlen([31], 1, 32),
}
LARGE = {
    "layer_norm": cases.layer_norm(4856, 768),
    "add_layer_norm": cases.add_layer_norm(4856, 768),
    "mlp": cases.mlp(1214, 768),
    "patch_embed": cases.patch_embed(2, 1024, 768),
    "attention_qkv": cases.attention_qkv(1, 1214, 3),
    "attention_qkv 600": cases.attention_qkv(2, 600, 2),
    "attention": cases.attention(2, 1214, 1, 64, [1214, 600]),
    "attention_varlen": cases.attention_varlen([1214, 600, 129], 1),
}


def check(case, dtype, backend):
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("the C++ extension takes float32 and bfloat16")
    rows = run_op_case(case, CPU, dtype, backend)
    assert len(rows) == len(case.kinds)
    failed = [row for row in rows if not row.ok]
    assert not failed, "\n".join(f"{r.what}: {r.error}, budget {r.budget}" for r in failed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_keep_their_budgets(name, backend, dtype):
    check(CASES[name], DTYPES[dtype], backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("name", LARGE)
def test_recipe_sizes_keep_their_budgets(name, backend, dtype):
    check(LARGE[name], DTYPES[dtype], backend)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize(
    "case", list(log_mel_cases()), ids=lambda c: f"{c.signal.__name__} {c.rate} {c.out_dtype}"
)
def test_log_mel_is_no_further_from_float64_than_torchaudio_allows(case, backend):
    pytest.importorskip("torchaudio")
    (row,) = run_log_mel_case(case, CPU, 1.0, backend)
    assert row.ok, (row.error, row.budget)


@pytest.mark.parametrize("backend", available_backends())
def test_waveform_gradient_is_no_further_from_float64_than_torchaudio_allows(backend):
    pytest.importorskip("torchaudio")
    (row,) = run_log_mel_gradient(CPU, 1.0, backend)
    assert row.ok, (row.error, row.budget)
