"""The budgets: what they admit and refuse, and that NUMERICS.md says the same."""

import math
from pathlib import Path

import pytest
import torch

from ast_fast.equivalence import budgets
from ast_fast.equivalence.measures import Errors, measure, measure_all

ROOT = Path(__file__).resolve().parents[2]


def errors(worst, rel_l2):
    return Errors(worst, rel_l2, 0.0, 0.0)


def test_numerics_holds_the_table_of_the_code():
    text = (ROOT / "NUMERICS.md").read_text()
    start, end = text.index("<!-- floors:"), text.index("<!-- end of floors -->")
    assert text[start:end].split("\n", 1)[1].strip() == budgets.table()


def test_twice_the_error_of_torch_passes_and_a_little_more_does_not():
    allowed = budgets.budget("attention", "bfloat16", errors(4e-2, 5e-3))
    assert allowed == (8e-2, 1e-2)
    assert allowed.admits(errors(8e-2, 1e-2))
    assert not allowed.admits(errors(8.1e-2, 1e-2))
    assert not allowed.admits(errors(8e-2, 1.1e-2))


def test_a_poor_torch_widens_nothing_beyond_the_ceiling():
    floor = budgets.FLOORS["attention"]["float32"]
    allowed = budgets.budget("attention", "float32", errors(1.0, 1.0))
    assert allowed == tuple(c * value for c, value in zip(budgets.CEILING, floor, strict=True))


def test_a_torch_that_gives_nan_widens_nothing():
    floor = budgets.FLOORS["attention"]["float32"]
    assert budgets.budget("attention", "float32", errors(math.inf, math.nan)) == floor


def test_sums_over_rows_never_look_at_torch():
    floor = budgets.FLOORS["row sum"]["bfloat16"]
    assert budgets.budget("row sum", "bfloat16", errors(0.05, 0.05)) == floor


def test_nan_is_over_every_budget():
    assert not budgets.Budget(1.0, 1.0).admits(errors(math.nan, 0.0))
    assert not budgets.Budget(1.0, 1.0).admits(errors(0.0, math.nan))


def test_float64_has_no_budget():
    with pytest.raises(ValueError, match="float64"):
        budgets.precision_of(torch.float64)


def test_measures_of_a_known_difference():
    found = measure(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert found.max_abs == 0.5
    assert found.rel_l2 == pytest.approx(0.1)
    assert found.worst == pytest.approx(0.125)
    assert found.mean_abs == 0.25


def test_small_entries_count_relative_to_the_scale_of_the_tensor():
    oracle = torch.tensor([1.0] * 99 + [0.0])
    assert measure(oracle + 1e-3, oracle).worst == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_values_that_are_not_finite_must_stand_where_the_oracle_has_them(bad):
    oracle = torch.tensor([1.0, bad, 2.0])
    assert measure(oracle.clone(), oracle).worst == 0.0
    assert measure(torch.tensor([1.0, 1.0, 2.0]), oracle).worst == math.inf
    assert measure(torch.tensor([bad, bad, 2.0]), oracle).worst == math.inf
    assert measure(oracle, torch.tensor([1.0, 1.0, 2.0])).worst == math.inf


def test_infinities_of_the_other_sign_differ():
    assert measure(torch.tensor([-math.inf]), torch.tensor([math.inf])).worst == math.inf


def test_gradients_as_one_vector():
    found, sine = measure_all(
        [torch.tensor([1.0]), torch.tensor([0.0])], [torch.tensor([0.0]), torch.tensor([1.0])]
    )
    assert sine == pytest.approx(1.0)
    assert found.rel_l2 == pytest.approx(math.sqrt(2.0))


def test_narrow_log_mel_adds_its_own_rounding():
    plain = Errors(0.0, 0.0, 1e-4, 1e-6)
    wide = budgets.log_mel_budget(plain, 10.0, 1.0, torch.float32)
    assert wide == (2e-4, 1e-6)
    narrow = budgets.log_mel_budget(plain, 10.0, 1.0, torch.bfloat16)
    assert narrow[0] - wide[0] == pytest.approx(10.0 * 2.0**-8)
