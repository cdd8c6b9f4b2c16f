"""The study's fits on synthetic laws with known answers: what they find, and what they refuse to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from tinyexperts.statistics.compute_multiplier import compute_multiplier
from tinyexperts.statistics.isoflop_fit import fit_isoflop
from tinyexperts.statistics.power_law_fit import SIZE_AND_TOKENS, WITH_GRANULARITY, Term, fit_power_law
from tinyexperts.statistics.seed_interval import SeedInterval, paired_difference


def test_the_interval_is_students():
    values = (0.1, -0.3, 0.25, 0.05)
    low, high = SeedInterval(values=values).bounds
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert (low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ((-0.10, -0.11, -0.09), "lower"),
        ((0.10, 0.11, 0.09), "higher"),
        ((-0.10, -0.30, 0.05), "undecided"),
        ((-0.10, -0.11), "lower"),
        ((-0.02, -0.11), "undecided"),  # equal signs are not enough
        ((-0.10,), "undecided"),
        ((-0.10, math.nan, -0.11), "undecided"),
        ((-0.10, -math.inf, -0.11), "undecided"),
    ],
)
def test_a_difference_inside_its_interval_is_no_win(values, outcome):
    assert SeedInterval(values=values).outcome == outcome


def test_differences_are_paired_by_seed():
    found = paired_difference({0: 3.0, 1: 2.0, 5: 9.0}, {1: 2.5, 0: 3.25, 7: 1.0})
    assert found.values == (-0.25, -0.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def parabola(sizes, optimum, curvature=0.08, floor=3.0):
    return floor + curvature * np.log(np.asarray(sizes) / optimum) ** 2


def test_an_exact_parabola_gives_its_optimum():
    sizes = [1e5, 2e5, 4e5, 8e5]
    fit = fit_isoflop(sizes, parabola(sizes, 3e5))
    assert fit.refusal is None
    assert fit.optimum == pytest.approx(3e5)
    assert fit.loss_at_optimum == pytest.approx(3.0)
    assert fit.loss_at(8e5) == pytest.approx(parabola([8e5], 3e5)[0])
    assert np.abs(fit.residuals).max() < 1e-12
    assert fit.optimum_interval == pytest.approx((3e5, 3e5))
    three = fit_isoflop(sizes[:3], parabola(sizes[:3], 3e5))
    assert three.optimum is None
    assert three.refusal == "a parabola through three runs leaves nothing to judge it by"
    assert three.has_curve


def test_the_interval_of_the_optimum_covers_the_truth():
    sizes, generator = np.repeat([1e5, 2e5, 4e5, 8e5, 16e5], 3), np.random.default_rng(1)
    covered, widths = [], []
    for trial in range(100):
        losses = parabola(sizes, 3.7e5) + generator.normal(0, 0.02, len(sizes))
        low, high = fit_isoflop(sizes, losses, seed=trial).optimum_interval
        covered.append(low <= 3.7e5 <= high)
        widths.append(math.log(high / low))
    assert 0.86 <= np.mean(covered) <= 1.0
    assert max(widths) < 1, "an interval that covers everything says nothing"


@pytest.mark.parametrize(("optimum", "side"), [(5e4, "smaller"), (9.9e4, "smaller"), (3e6, "larger")])
def test_a_minimum_that_is_not_interior_is_not_named(optimum, side):
    sizes = [1e5, 2e5, 4e5, 8e5]
    fit = fit_isoflop(sizes, parabola(sizes, optimum))
    assert fit.optimum is None
    assert f"run {side} ones" in fit.refusal
    assert "100,000 to 800,000" in fit.refusal


def test_losses_that_curve_downwards_have_no_minimum():
    sizes = [1e5, 2e5, 4e5, 8e5]
    assert "do not rise" in fit_isoflop(sizes, parabola(sizes, 3e5, curvature=-0.1)).refusal


def test_two_sizes_are_no_parabola():
    assert fit_isoflop([1e5, 1e5, 2e5], [3.0, 3.1, 2.9]).refusal == "a parabola needs three sizes, got 2"


def test_a_minimum_near_the_edge_has_an_open_interval():
    sizes, generator = np.repeat([1e5, 2e5, 4e5], 3), np.random.default_rng(0)
    losses = parabola(sizes, 3.6e5, curvature=0.02) + generator.normal(0, 0.01, len(sizes))
    fit = fit_isoflop(sizes, losses)
    assert fit.optimum is None
    assert fit.optimum_interval[1] == math.inf
    assert fit.refusal == "the interval of the minimum leaves the sizes that were run"


@pytest.mark.parametrize("bad", [([1e5, -1.0, 3e5], [3, 3, 3]), ([1e5, 2e5, 3e5], [3, math.nan, 3])])
def test_broken_points_are_refused(bad):
    with pytest.raises(ValueError, match="positive and losses finite"):
        fit_isoflop(*bad)


def grid_of_runs(seed=0, num=40):
    generator = np.random.default_rng(seed)
    return {
        "P": 10 ** generator.uniform(5, 8, num),
        "D": 10 ** generator.uniform(6, 10, num),
        "G": 2.0 ** generator.integers(0, 7, num),
    }


def test_known_exponents_of_size_and_tokens_are_found():
    v = grid_of_runs()
    fit = fit_power_law(SIZE_AND_TOKENS, v, 1.7 + 400 / v["P"] ** 0.34 + 410 / v["D"] ** 0.28)
    assert fit.exponents == pytest.approx({"alpha": 0.34, "beta": 0.28}, rel=1e-3)
    assert fit.coefficients == pytest.approx({"a": 400, "b": 410}, rel=1e-2)
    assert fit.constant == pytest.approx(1.7, rel=1e-3)
    assert np.abs(fit.residuals).max() < 1e-5
    assert fit.undetermined == ()
    assert fit.loss(P=1e6, D=1e8) == pytest.approx(1.7 + 400 / 1e6**0.34 + 410 / 1e8**0.28, rel=1e-4)


def test_known_exponents_with_granularity_are_found():
    v = grid_of_runs(num=80)
    losses = 0.47 + (2.1 / v["G"] ** 0.58 + 18.1) / v["P"] ** 0.115 + 30.8 / v["D"] ** 0.147
    fit = fit_power_law(WITH_GRANULARITY, v, losses)
    assert fit.exponents == pytest.approx({"gamma": 0.58, "alpha": 0.115, "beta": 0.147}, rel=0.05)
    assert np.abs(fit.residuals).max() < 1e-3


def test_intervals_are_those_of_least_squares_where_noise_is_small():
    # With residuals below Huber's delta, and so small that the law is nearly linear within the interval.
    v = grid_of_runs()
    losses = 1.7 + 400 / v["P"] ** 0.34 + 410 / v["D"] ** 0.28 + np.random.default_rng(3).normal(0, 0.003, 40)
    fit = fit_power_law(SIZE_AND_TOKENS, v, losses)

    def law(sizes, c, log_a, alpha, log_b, beta):
        return c + np.exp(log_a - alpha * np.log(sizes[0])) + np.exp(log_b - beta * np.log(sizes[1]))

    start = (1.7, np.log(400), 0.34, np.log(410), 0.28)
    values, covariance = optimize.curve_fit(law, (v["P"], v["D"]), losses, p0=start)
    half = special.stdtrit(40 - 5, 0.975) * np.sqrt(np.diag(covariance))
    for name, place in (("c", 0), ("alpha", 2), ("beta", 4)):
        expected = values[place] - half[place], values[place] + half[place]
        assert fit.intervals[name] == pytest.approx(expected, abs=0.1 * half[place])
        assert fit.open_ends[name] == (False, False)


def test_as_many_runs_as_parameters_determine_nothing():
    size = {"P": [1e5, 1e6, 1e7]}
    fit = fit_power_law((Term(coefficient="a", exponents={"P": "alpha"}),), size, [4.0, 3.5, 3.3])
    assert fit.open_ends == {"alpha": (True, True), "c": (True, True)}


def test_a_run_that_went_astray_pulls_little():
    v = grid_of_runs()
    losses = 1.7 + 400 / v["P"] ** 0.34 + 410 / v["D"] ** 0.28
    losses[7] += 2.0
    fit = fit_power_law(SIZE_AND_TOKENS, v, losses)
    assert fit.exponents == pytest.approx({"alpha": 0.34, "beta": 0.28}, rel=0.02)
    assert fit.residuals[7] == pytest.approx(2.0, abs=0.05)


def test_an_exponent_that_the_runs_do_not_determine_is_reported():
    fit = fit_power_law((Term(coefficient="a", exponents={"P": "alpha"}),), {"P": [1e5, 2e5, 4e5, 8e5]}, [4, 3, 3, 3])
    assert fit.undetermined[0] == "alpha"


def test_a_term_without_an_effect_and_a_constant_that_is_not_needed_are_reported():
    v = grid_of_runs(num=60)
    fit = fit_power_law(WITH_GRANULARITY, v, 3 + 400 / v["P"] ** 0.34 + 410 / v["D"] ** 0.28 + 1e-3 * np.log(v["G"]))
    assert fit.coefficients["g"] == 0, "the loss rises with G"
    assert fit.undetermined == ("gamma",)
    noise = np.random.default_rng(2).normal(0, 0.01, 60)
    narrow = {"P": 1e6 * 1.2 ** (np.arange(60) % 5), "D": 1e8 * 1.1 ** (np.arange(60) // 5)}
    fit = fit_power_law(SIZE_AND_TOKENS, narrow, 20 / narrow["P"] ** 0.1 + 20 / narrow["D"] ** 0.1 + noise)
    assert "c" in fit.undetermined


def test_seeds_of_one_size_are_one_run_of_a_law():
    sizes = {"P": np.repeat([1e5, 2e5, 4e5, 8e5], 3), "D": np.repeat([8e6, 4e6, 2e6, 1e6], 3)}
    with pytest.raises(ValueError, match="5 parameters, and there are 4 different runs"):
        fit_power_law(SIZE_AND_TOKENS, sizes, np.linspace(4, 3, 12))


@pytest.mark.parametrize(
    ("variables", "losses", "message"),
    [
        ({"P": [1.0, 2.0]}, [3.0, 2.0], "wants positive D, P"),
        ({"P": [1.0, 0.0], "D": [1.0, 1.0]}, [3.0, 2.0], "wants positive D, P"),
        ({"P": [1.0, 2.0], "D": [1.0, 3.0]}, [3.0, 2.0], "5 parameters, and there are 2 different runs"),
    ],
)
def test_a_law_refuses_what_it_cannot_be_fitted_to(variables, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(SIZE_AND_TOKENS, variables, losses)


def test_the_compute_multiplier_of_a_known_law():
    budgets = [1e12, 1e13, 1e14]

    def loss(flops):
        return 5 - 0.2 * math.log10(flops)

    baseline = {seed: {b: loss(b) + 0.01 * seed for b in budgets} for seed in range(3)}
    factors = (1.9, 2.0, 2.1)
    method = {seed: loss(1e13 * factor) + 0.01 * seed for seed, factor in enumerate(factors)}
    found = compute_multiplier(baseline, method, 1e13)
    assert found.value == pytest.approx((1.9 * 2.0 * 2.1) ** (1 / 3))
    low, high = SeedInterval(values=tuple(map(math.log, factors))).bounds
    assert found.interval == pytest.approx((math.exp(low), math.exp(high)))


def test_one_seed_beyond_the_budgets_makes_no_bound_of_the_multiplier():
    baseline = {seed: {1e12: 3.0, 1e13: 2.8} for seed in range(3)}
    found = compute_multiplier(baseline, {0: 2.9, 1: 2.7, 2: 3.1}, 1e12)
    assert (found.value, found.interval) == (None, None)
    assert found.refusal == "can't tell; seeds beyond the largest budget 1 of 3, before the least 1 of 3"
    found = compute_multiplier(baseline, {0: 2.7, 1: 2.75, 2: 2.6}, 1e12)
    assert found.refusal == "can't tell; seeds beyond the largest budget 3 of 3", "equal signs are not enough"
    found = compute_multiplier(baseline, {0: 2.7, 1: 2.71, 2: 2.69}, 1e12)
    assert found.refusal == "more than 10.00: the baseline's largest budget does not reach the loss"
    found = compute_multiplier(baseline, {0: 3.2, 1: 3.21, 2: 3.19}, 1e12)
    assert found.refusal == "less than 1.00: the baseline's least budget is better already"


@pytest.mark.parametrize(
    ("losses", "reached", "reason"),
    [
        ((3.0, 2.8), 2.5, "can't tell; seeds beyond the largest budget 1 of 1"),
        ((3.0, 2.8), 3.5, "can't tell; seeds before the least 1 of 1"),
        ((3.0, 3.1), 2.9, "does not fall from budget to budget for seed 0"),
    ],
)
def test_no_multiplier_is_made_up_beyond_the_budgets(losses, reached, reason):
    found = compute_multiplier({0: dict(zip((1e12, 1e13), losses, strict=True))}, {0: reached}, 1e12)
    assert found.value is None
    assert reason in found.refusal


def test_one_seed_gives_a_multiplier_without_an_interval():
    found = compute_multiplier({0: {1e12: 3.0, 1e13: 2.0}}, {0: 2.5}, 1e12)
    assert found.value == pytest.approx(math.sqrt(10))
    assert found.interval is None


@pytest.mark.parametrize("values", [(math.nan, math.nan), (1.0, math.inf), (1.0,)])
def test_values_that_are_not_finite_decide_nothing(values):
    interval = SeedInterval(values=values)
    assert interval.standard_deviation is None
    assert interval.bounds == (-math.inf, math.inf)
    assert interval.outcome == "undecided"
