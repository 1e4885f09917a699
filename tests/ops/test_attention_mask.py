"""AttentionMask: the pairs it shows, its rectangles, and the op's arguments; numbers are checked with every op's."""

import pytest
import torch

from ast_fast import backend, ops, use_backend
from ast_fast.attention_mask import AttentionMask, Rectangles, dense_pairs


def factorised(f_dim, t_dim, prefix):
    """The definition, pair by pair."""
    tokens = prefix + f_dim * t_dim
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        for k in range(tokens):
            a, b = q - prefix, k - prefix
            same = a // t_dim == b // t_dim or a % t_dim == b % t_dim
            seen[q, k] = a < 0 or b < 0 or same
    return seen


def window(f_dim, t_dim, radius, prefix):
    """The definition, pair by pair."""
    tokens = prefix + f_dim * t_dim
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        for k in range(tokens):
            a, b = q - prefix, k - prefix
            seen[q, k] = a < 0 or b < 0 or abs(a % t_dim - b % t_dim) <= radius
    return seen


def covered(side, rows, columns):
    """How many rectangles of one side show each pair."""
    count = torch.zeros(rows, columns, dtype=torch.int64)
    for first, num, column, num_columns, offset, _ in side.table.tolist():
        tile = side.rows[first : first + num].long()
        other = side.columns[column : column + num_columns].long()
        seen = torch.ones(num, num_columns, dtype=torch.int64)
        if offset >= 0:
            seen = side.seen[offset : offset + seen.numel()].view(seen.shape).long()
        count[tile[:, None], other] += seen
    return count


GRIDS = [(3, 5, 2), (1, 7, 2), (6, 1, 1), (1, 1, 0), (2, 4, 0), (12, 12, 2)]


@pytest.mark.parametrize("f_dim, t_dim, prefix", GRIDS)
def test_factorised_is_rows_and_columns_and_the_prefix(f_dim, t_dim, prefix):
    mask = AttentionMask.factorised(f_dim, t_dim, prefix)
    assert torch.equal(mask.dense(), factorised(f_dim, t_dim, prefix))
    assert mask.pairs == int(mask.dense().sum())


@pytest.mark.parametrize("radius", [0, 1, 3, 100])
@pytest.mark.parametrize("f_dim, t_dim, prefix", GRIDS)
def test_a_window_is_the_columns_nearby_and_the_prefix(f_dim, t_dim, prefix, radius):
    mask = AttentionMask.time_window(f_dim, t_dim, radius, prefix)
    assert torch.equal(mask.dense(), window(f_dim, t_dim, radius, prefix))


@pytest.mark.parametrize("queries, keys", [(7, 7), (130, 65), (1, 200), (200, 1)])
def test_any_mask_comes_back_from_its_rectangles(queries, keys):
    seen = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.2
    seen[queries // 2] = False
    seen[:, keys // 3] = False
    mask = AttentionMask.from_dense(seen)
    assert torch.equal(mask.dense(), seen)
    assert torch.equal(dense_pairs(mask.by_query, queries, keys), seen)
    assert torch.equal(dense_pairs(mask.by_key, keys, queries), seen.T)


def test_every_pair_is_in_one_rectangle_of_each_side():
    for mask in (
        AttentionMask.factorised(12, 101),
        AttentionMask.time_window(12, 20, 4),
        AttentionMask.from_dense(torch.rand(90, 150) < 0.5),
    ):
        seen = mask.dense().long()
        assert torch.equal(covered(mask.by_query, mask.queries, mask.keys), seen)
        assert torch.equal(covered(mask.by_key, mask.keys, mask.queries), seen.T)


def test_rectangles_of_a_pass_share_no_token():
    for side in (AttentionMask.factorised(12, 101).by_query, AttentionMask.factorised(4, 3).by_key):
        for number in side.table[:, 5].unique():
            rows = [
                side.rows[first : first + num]
                for first, num, *_, index in side.table.tolist()
                if index == number
            ]
            assert len(torch.cat(rows).unique()) == sum(map(len, rows))


def test_the_work_falls_with_the_mask():
    mask = AttentionMask.factorised(12, 101)
    assert abs(mask.pairs / 1214**2 - 0.0954) < 1e-4
    table = mask.by_query.table
    work = int((table[:, 1] * table[:, 3]).sum())
    assert (
        work < 1.01 * mask.pairs + 101 * 12
    )  # the diagonals of the columns are computed and hidden
    # patterns are kept once: 101 columns share theirs
    assert mask.by_query.seen.numel() == 12 * 12


def test_masks_of_one_size_are_made_once():
    assert AttentionMask.factorised(5, 6) is AttentionMask.factorised(5, 6)
    assert AttentionMask.time_window(5, 6, 2) is not AttentionMask.time_window(5, 6, 3)


def test_wrong_tiles_are_refused():
    seen = torch.ones(4, 4, dtype=torch.bool).numpy()
    tokens = torch.arange(4, dtype=torch.int32).numpy()
    with pytest.raises(ValueError, match="query_tiles: a visible pair is in no rectangle"):
        AttentionMask(seen, query_tiles=([tokens[:3]],))
    with pytest.raises(ValueError, match="key_tiles: a token is twice in pass 0"):
        AttentionMask(seen, key_tiles=([tokens, tokens[:1]],))
    with pytest.raises(ValueError, match="in more than one"):
        AttentionMask(seen, query_tiles=([tokens], [tokens]))
    with pytest.raises(ValueError, match=r"seen has 3 dimensions"):
        AttentionMask(seen[None])
    with pytest.raises(ValueError, match="radius is -1"):
        AttentionMask.time_window(2, 2, -1)
    with pytest.raises(ValueError, match="f_dim 0"):
        AttentionMask.factorised(0, 3)


def test_the_op_says_what_does_not_fit():
    mask = AttentionMask.factorised(2, 3)
    q = torch.randn(1, 8, 2, 32)
    with pytest.raises(ValueError, match="mask is for 8 queries x 8 keys, q has 9 tokens"):
        ops.attention_masked(torch.randn(1, 9, 2, 32), q, q, mask)
    with pytest.raises(ValueError, match="differ in clips"):
        ops.attention_masked(q, q[:, :, :1], q[:, :, :1], mask)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        ops.attention_masked(q, q.double(), q.double(), mask)


def test_a_full_mask_is_plain_attention():
    q, k, v = (torch.randn(2, 40, 2, 32, dtype=torch.float64) for _ in range(3))
    mask = AttentionMask.from_dense(torch.ones(40, 40, dtype=torch.bool))
    with use_backend("reference"):
        o, lse = ops.attention_masked(q, k, v, mask, return_lse=True)
        expected, expected_lse = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_nothing_leaks_from_tokens_that_nobody_sees(name):
    if name == "cpp" and backend.why_not("cpp", "cpu", torch.float32):
        pytest.skip("the extension was not built")
    seen = torch.rand(33, 47, generator=torch.Generator().manual_seed(2)) < 0.4
    seen[:, [3, 40]] = False
    seen[[0, 17]] = False
    mask = AttentionMask.from_dense(seen)
    draw = torch.Generator().manual_seed(3)
    q, do = (torch.randn(2, 33, 2, 32, generator=draw) for _ in range(2))
    k, v = (torch.randn(2, 47, 2, 32, generator=draw) for _ in range(2))
    results = []
    for poison in (False, True):
        leaves = [x.clone() for x in (q, k, v)]
        if poison:
            leaves[0][:, [0, 17]] = torch.nan
            leaves[1][:, [3, 40]] = torch.inf
            leaves[2][:, [3, 40]] = torch.nan
        for leaf in leaves:
            leaf.requires_grad_()
        with use_backend(name):
            o, lse = ops.attention_masked(*leaves, mask, return_lse=True)
            grads = torch.autograd.grad(o, leaves, do)
        assert torch.all(o[:, [0, 17]] == 0)
        assert torch.all(lse[:, :, [0, 17]] == torch.inf)
        assert torch.all(grads[0][:, [0, 17]] == 0)
        assert torch.all(grads[1][:, [3, 40]] == 0)
        assert torch.all(grads[2][:, [3, 40]] == 0)
        results.append((o, *grads))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_it_compiles_and_exports_whole():
    mask = AttentionMask.factorised(3, 5)
    q, k, v = (torch.randn(2, 17, 2, 32) for _ in range(3))

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.attention_masked(q, k, v, mask)

    expected = Module()(q, k, v)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected)
    exported = torch.export.export(Module(), (q, k, v))
    assert torch.equal(exported.module()(q, k, v), expected)


def test_the_list_of_tensors_names_both_sides():
    mask = AttentionMask.time_window(2, 5, 1)
    assert len(mask.rectangles) == 8
    assert all(a is b for a, b in zip(Rectangles(*mask.rectangles[4:]), mask.by_key, strict=True))
