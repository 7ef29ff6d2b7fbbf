"""Intervals and tests against cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from esper import keys as k
from esper.compare import statistics
from esper.compare.statistics import difference, interval, rank_correlation

KEY = k.root(1)


def test_an_interval_is_that_of_the_normal_law_for_many_values() -> None:
    values = 50.0 + 3.0 * k.normal(k.root(5), 400, dtype=torch.float64)
    found = interval(values, KEY)
    error = float(values.std(correction=0)) / math.sqrt(400)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_two_values_spans_them() -> None:
    assert interval(torch.tensor([1.0, 3.0]), KEY) == (2.0, 1.0, 3.0)
    assert interval(torch.tensor([4.0, 4.0, 4.0]), KEY) == (4.0, 4.0, 4.0)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        values = k.normal(k.fold(k.root(9), trial), 16, dtype=torch.float64)
        low, high = interval(values, k.fold(KEY, trial))[1:]
        covered += low <= 0.0 <= high
    assert 175 <= covered <= 195  # percentile intervals of 16 values are a little narrow


def test_the_same_key_gives_the_same_numbers() -> None:
    values, other = k.uniform(k.root(2), 20), k.uniform(k.root(3), 20)
    assert interval(values, KEY) == interval(values, k.root(1))
    assert interval(values, KEY) != interval(values, k.root(4))
    assert difference(values, other, KEY) == difference(values, other, k.root(1))


def test_p_is_exact_for_few_seeds() -> None:
    """All of n differences on one side: of the 2^n assignments only two are as extreme."""
    for n in (2, 5, 10):
        gaps = torch.arange(1.0, n + 1)
        assert difference(gaps, torch.zeros(n), KEY).p == 2 / 2**n
        assert difference(torch.zeros(n), gaps, KEY).p == 2 / 2**n
    assert difference(torch.tensor([1.0, -1.0]), torch.zeros(2), KEY).p == 1.0
    # |1 + 2 - 3| = 0: every assignment is at least as large. |3 - 2 + ...| by hand: sums of 3, 1 with signs.
    assert difference(torch.tensor([3.0, -1.0]), torch.zeros(2), KEY).p == 1.0
    assert difference(torch.tensor([3.0, 1.0, -1.0]), torch.zeros(3), KEY).p == 0.75


def test_drawn_signs_agree_with_all_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = k.normal(k.root(8), 12, dtype=torch.float64) + 0.4
    exact = difference(ours, torch.zeros(12), KEY).p
    monkeypatch.setattr(statistics, "_EXACT", 0)
    assert difference(ours, torch.zeros(12), KEY).p == pytest.approx(exact, abs=0.02)
    assert difference(torch.ones(40), torch.zeros(40), KEY).p == 1 / 10_001


def test_a_difference_is_of_pairs() -> None:
    """A constant gain between seeds that differ a lot is certain; the same values unpaired would not be."""
    base = torch.tensor([10.0, 50.0, 90.0, 30.0, 70.0, 20.0])
    found = difference(base + 1.0, base, KEY)
    assert (found.mean, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 2 / 2**6)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        interval(torch.tensor([1.0]), KEY)
    with pytest.raises(ValueError, match="finite"):
        interval(torch.tensor([1.0, math.nan]), KEY)
    with pytest.raises(ValueError, match="pairs"):
        difference(torch.ones(2), torch.ones(3), KEY)


def test_rank_correlation_is_that_of_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (50,), generator=g).float()
    y = x + torch.randn(50, generator=g).round()
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert rank_correlation(x, torch.exp(3 * x)) == pytest.approx(1.0)
    assert rank_correlation(x, torch.ones(50)) is None
    assert rank_correlation(x[:0], y[:0]) is None
