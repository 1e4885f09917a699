"""Mutation check: one-character mistakes in the reference and its gradients must not survive.

Each mutant rewrites one expression of the source, runs the cheap checks in a fresh module and must be
caught. A mutant that survives means a hole in the tests, not in the code.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ast_fast import reference
from ast_fast.equivalence import plain
from ast_fast.testing import measure, random_tensor

FOLDER = Path(reference.__file__).parent
MUTANTS = {
    "ops.py": (
        ("square().mean(-1, keepdim=True) + eps", "square().mean(-1, keepdim=True) - eps"),
        ("y = centred * rstd", "y = wide * rstd"),
        ("bias.to(stats)\n    return y", "bias.to(stats) * 0\n    return y"),
        ("(x + residual)", "(x - residual)"),
        ("index < key_lengths", "index <= key_lengths"),
        ("k.to(stats)) * scale", "k.to(stats))"),
        ("erfc(-safe", "erfc(safe"),
        ("0.7071067811865476", "0.7978845608028654"),
        ("unfold(1, weight.shape[2], fstride)", "unfold(1, weight.shape[2], tstride)"),
        ("x.transpose(1, 2).unfold", "x.unfold"),
        (
            "torch.cat((prefix.expand(b, -1, -1), tokens)",
            "torch.cat((tokens, prefix.expand(b, -1, -1))",
        ),
        ("frames - tables.preemphasis * previous", "frames + tables.preemphasis * previous"),
        ("frames - frames.mean(-1, keepdim=True)", "frames"),
        ("(features - mean) / (2.0 * std)", "(features - mean) / std"),
        ("ends <= lengths", "ends < lengths"),
        ("spectrum.real.square() + spectrum.imag.square()", "spectrum.abs()"),
    ),
    "backward.py": (
        ("- normal * inner", "+ normal * inner"),
        ("(dy_wide * normal).sum(0)", "(dy_wide * x.to(stats)).sum(0)"),
        ("dsum = dsum + dtotal", "dsum = dsum - dtotal"),
        ("ds = p * (dp - (p * dp)", "ds = p * (dp + (p * dp)"),
        ("keepdim=True)) * scale", "keepdim=True))"),
        ('torch.einsum("bhqk,bqhd->bkhd", ds, qw)', 'torch.einsum("bhqk,bqhd->bkhd", p, qw)'),
        ("0.5 * torch.special.erfc", "torch.special.erfc"),
        ("dy.T @ gelu(h)", "dy.T @ h"),
        ("dpos[num_prefix:].sum(0)", "dpos.sum(0)"),
        ("tables.preemphasis * shifted", "tables.preemphasis * dframes"),
    ),
}
ALL = [(file, old, new) for file, pairs in MUTANTS.items() for old, new in pairs]


def load(file, old, new):
    """The reference as a package of its own, with one expression replaced."""
    name = "mutated_reference"
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    for stem in ("mel", "ops", "backward"):
        path = FOLDER / f"{stem}.py"
        text = path.read_text()
        if path.name == file:
            assert text.count(old) >= 1, f"{old!r} is not in {file} any more: rewrite the mutant"
            text = text.replace(old, new, 1)
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_file_location(f"{name}.{stem}", path)
        )
        sys.modules[f"{name}.{stem}"] = module
        exec(compile(text, str(path), "exec"), module.__dict__)
        setattr(package, stem, module)
    return package


def near(result, oracle, bound=1e-9):
    return measure(result, oracle).rel_l2 < bound


def rand(*shape, seed=0):
    return random_tensor(*shape, seed=seed, dtype=torch.float64)


def forward_is_right(ops, mel):
    """Outputs against plain PyTorch in float64, and the front end against the unmutated one."""
    x, r, w, b = rand(5, 16) * 1e-2, rand(5, 16, seed=1), rand(16, seed=2), rand(16, seed=3)
    want = F.layer_norm(x, (16,), w, b, 1e-4)
    good = near(ops.layer_norm(x, w, b, 1e-4)[0], want)
    y, total, _, _ = ops.add_layer_norm(x, r, w, b, 1e-4)
    good &= near(total, x + r) and near(y, F.layer_norm(x + r, (16,), w, b, 1e-4))
    good &= near(ops.gelu(r), F.gelu(r))
    q, k, v = (rand(2, 7, 2, 8, seed=s) for s in range(3))
    lengths = torch.tensor([7, 3])
    good &= near(ops.attention(q, k, v, 8**-0.5, lengths)[0], plain.attention(q, k, v, lengths))
    image, weight = rand(2, 11, 9), rand(4, 1, 3, 2, seed=1)
    pos, prefix = rand(2 + 3 * 10, 4, seed=2), rand(2, 4, seed=3)
    args = (image, weight, rand(4, seed=4), pos, prefix, 3, 1)
    good &= near(ops.patch_embed(*args), plain.patch_embed(*args))
    wave, tables = rand(2, 1200) * 0.1 + 0.05, mel.mel_tables(num_mel_bins=16)
    lengths = torch.tensor([1200, 400])
    args = (wave, lengths, tables, 8, -4.0, 2.0)
    return bool(good & near(ops.log_mel(*args), reference.ops.log_mel(*args)))


def backward_is_right(package):
    """Written-out gradients against autograd of the mutated package's own ops."""
    ops, backward = package.ops, package.backward
    x, w, b, dy = (
        rand(*s, seed=i).requires_grad_() for i, s in enumerate(((5, 8), (8,), (8,), (5, 8)))
    )
    y, total, mean, rstd = ops.add_layer_norm(x, x.detach() * 0.5, w, b, 1e-4)
    want = torch.autograd.grad((y, total), (x, w, b), (dy, dy * 2))
    args = (dy.detach(), dy.detach() * 2, total.detach(), w.detach(), mean.detach(), rstd.detach())
    good = all(near(a, b) for a, b in zip(backward.add_layer_norm(*args), want, strict=True))
    q, k, v, do = (rand(1, 5, 2, 4, seed=s).requires_grad_() for s in range(4))
    o, lse = ops.attention(q, k, v, 0.3)
    want = torch.autograd.grad(o, (q, k, v), do)
    got = backward.attention(*(t.detach() for t in (do, q, k, v, lse)), 0.3, None)
    good &= all(near(a, b) for a, b in zip(got, want, strict=True))
    shapes = ((4, 3), (6, 3), (6,), (3, 6), (3,), (4, 3))
    *leaves, dy = (rand(*s, seed=i).requires_grad_() for i, s in enumerate(shapes))
    want = torch.autograd.grad(ops.mlp(*leaves), leaves, dy)
    x, w1, b1, w2, _ = (t.detach() for t in leaves)
    got = backward.mlp(dy.detach(), x, F.linear(x, w1, b1), w1, w2)
    good &= all(near(a, b) for a, b in zip(got, want, strict=True))
    shapes = ((2, 7, 6), (4, 1, 3, 2), (4,), (2 + 4 * 6, 4), (2, 4))
    leaves = [rand(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    y = ops.patch_embed(*leaves, 1, 1)
    dy = rand(*y.shape, seed=9)
    dx, *others = torch.autograd.grad(y, leaves, dy)
    got = backward.patch_embed(dy, leaves[0].detach(), leaves[1].detach(), 1, 1, 2, True)
    good &= all(near(a, b) for a, b in zip(got, (*others, dx), strict=True))
    wave, tables = (rand(1, 900) * 0.1).requires_grad_(), package.mel.mel_tables(num_mel_bins=16)
    y = ops.log_mel(wave, None, tables, 4, 0.0, 0.5)
    dy = rand(*y.shape, seed=3)
    (want,) = torch.autograd.grad(y, wave, dy)
    return bool(good & near(backward.log_mel(dy, wave.detach(), None, tables, 0.5), want, 1e-7))


def test_the_checks_pass_on_the_code_as_it_is():
    package = load("none", "", "")
    assert forward_is_right(package.ops, package.mel)
    assert backward_is_right(package)


@pytest.mark.parametrize(
    ("file", "old", "new"), ALL, ids=[f"{old} -> {new}"[:60] for _, old, new in ALL]
)
def test_a_mutant_is_caught(file, old, new):
    package = load(file, old, new)
    try:
        survived = forward_is_right(package.ops, package.mel) and backward_is_right(package)
    except (RuntimeError, ValueError):
        return
    assert not survived
