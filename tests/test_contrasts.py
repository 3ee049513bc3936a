"""Contrasts: closed forms for the frontier, coverage of the intervals where the truth is known,
Student's and Holm's numbers by hand, and no answer where there is none."""
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from vcb_nb.artifacts import InputError
from vcb_nb.contrasts import (chosen_by_other_seeds, contrast, decide, frontier_area, gain_at_kl,
                              hierarchical_bootstrap, holm, mean_text, student_cdf,
                              student_quantile, t_interval)


def first(means): return means[:, 0]
def difference(means): return means[:, 1] - means[:, 0]


# ---- the frontier

def test_a_frontier_in_root_kl_is_exact():
    "Any line a√k: interpolated without error, in any order of the points, and for many at once."
    kl = np.array([[4., .3, 1.2], [.2, 9., 2.5]])
    gain = np.array([[1.7], [-.4]])*np.sqrt(kl)
    for at in (.01, .25, 1, 2, 4):
        assert np.allclose(gain_at_kl(kl, gain, at), np.array([1.7, -.4])*at**.5)
        assert np.allclose(frontier_area(kl, gain, at), np.array([1.7, -.4])*2/3*at**1.5)


def test_between_two_points_by_hand():
    "√KL is .5 and 1.5; at 1 nat it is half-way between them."
    assert gain_at_kl([.25, 2.25], [.4, 1.], 1) == pytest.approx(.7)
    assert gain_at_kl([2.25], [.9], 1) == pytest.approx(.6) # two thirds of the way from SFT
    assert gain_at_kl([1.], [.3], 1) == pytest.approx(.3) # a point itself
    assert gain_at_kl([4., .25, 2.25], [9., .4, 1.], 1) == pytest.approx(.7) # in any order


KL = st.lists(st.floats(.01, 9), min_size=1, max_size=5, unique=True)


@given(KL, st.lists(st.floats(-3, 3), min_size=5, max_size=5), st.floats(.05, 9))
def test_the_area_is_the_integral_of_the_gain(kl, gain, upto):
    "By a fine sum over KL; both are missing where the frontier ends before."
    gain = gain[:len(kl)]
    area = frontier_area(kl, gain, upto)
    assert np.isnan(area) == np.isnan(gain_at_kl(kl, gain, upto)) == (max(kl) < upto)
    if np.isnan(area): return
    grid = (np.arange(4000) + .5)/4000*math.sqrt(upto)
    root, order = np.sqrt(kl), np.argsort(kl)
    heights = np.interp(grid, [0, *root[order]], [0, *np.array(gain)[order]])
    assert area == pytest.approx((heights*2*grid).sum()*math.sqrt(upto)/4000, abs=2e-3)


def test_a_frontier_is_never_extrapolated():
    assert np.isnan(gain_at_kl([.5, .999], [.1, .2], 1)) and np.isnan(frontier_area([.5], [.1], 1))
    assert not np.isnan(gain_at_kl([.5, 1.001], [.1, .2], 1))


def test_an_estimate_of_kl_below_zero_counts_as_zero():
    "k1 is unbiased and may be negative; the square root of a KL is not asked for one."
    assert gain_at_kl([-.01, 1], [0., .5], .25) == pytest.approx(.25)


@pytest.mark.parametrize("at", [0, -1, math.inf, math.nan])
def test_a_kl_that_is_none_is_refused(at):
    for function in (gain_at_kl, frontier_area):
        with pytest.raises(InputError, match="above 0"): function([1.], [1.], at)


# ---- Student

TABLE = { # degrees of freedom → quantiles of .95, .975, .995, of any textbook
    1: (6.314, 12.706, 63.657), 2: (2.920, 4.303, 9.925), 3: (2.353, 3.182, 5.841),
    4: (2.132, 2.776, 4.604), 9: (1.833, 2.262, 3.250), 19: (1.729, 2.093, 2.861),
    30: (1.697, 2.042, 2.750), 120: (1.658, 1.980, 2.617)}


@pytest.mark.parametrize("df", TABLE)
def test_students_quantiles(df):
    found = [student_quantile(share, df) for share in (.95, .975, .995)]
    assert np.allclose(found, TABLE[df], atol=6e-4)
    for t in found: assert student_cdf(-t, df) == pytest.approx(1 - student_cdf(t, df))
    assert student_cdf(0, df) == .5


# ---- seeds and prompts

def experiment(rng, seeds, prompts, tau, omega, crossed=0.):
    "Values of truth 0: an effect per seed, one per prompt that all seeds share, and noise."
    shared = rng.normal(0, crossed, (prompts, 1)) if crossed else 0
    return [rng.normal(0, tau) + shared + rng.normal(0, omega, (prompts, 1))
            for _ in range(seeds)]


@pytest.mark.parametrize("seeds, tau, omega, crossed", [
    (3, .3, .3, 0), (3, 0., 1., 0), (5, .3, 1.3, 0), (20, .2, .9, 0), (10, .3, .3, 1.),
    (20, .2, .3, .3)])
def test_intervals_cover_the_truth(seeds, tau, omega, crossed):
    """95 % intervals hold the truth in 92 to 98 % of 400 experiments; one standard error is 1.1 %.
    With shared prompts they may be wider, never narrower."""
    rng, hits = np.random.default_rng(7), 0
    for i in range(400):
        units = experiment(rng, seeds, 20, tau, omega, crossed)
        found = contrast(units, first, prompts="shared" if crossed else "kept", n_boot=300, seed=i)
        hits += found["low"] <= 0 <= found["high"]
    assert .92 <= hits/400 <= (1 if crossed else .98), hits/400


def test_false_findings_are_as_rare_as_stated():
    "Under no difference p < .05 in at most 6 % of 500 experiments, one standard error above 5 %."
    rng = np.random.default_rng(3)
    p = [contrast(experiment(rng, 5, 15, .3, .5), first, n_boot=300, seed=i)["p"]
         for i in range(500)]
    assert .025 <= np.mean(np.array(p) < .05) <= .06


def test_a_difference_at_the_margin_is_seldom_called_equivalent():
    "The truth is the margin itself: TOST says 'equivalent' in at most 5 %, and often at truth 0."
    rng = np.random.default_rng(4)
    def share(truth):
        runs = [[rows + truth for rows in experiment(rng, 8, 20, .1, .3)] for _ in range(300)]
        return np.mean([contrast(u, first, .2, n_boot=200)["p_equivalent"] < .05 for u in runs])
    assert share(.2) <= .06 and share(0.) > .8


def test_the_resamples_have_the_variance_of_the_theory():
    "(S−1)/S of the variance between seed means; prompts that are drawn add their own once more."
    rng = np.random.default_rng(0)
    units = experiment(rng, 6, 50, .5, 2.)
    means = np.array([rows.mean() for rows in units])
    inside = np.mean([rows.var() for rows in units])
    for prompts, once_more in (("kept", 0), ("drawn", inside/50/6)):
        draws = hierarchical_bootstrap(units, first, 40_000, prompts)
        assert draws.var() == pytest.approx(means.var()/6 + once_more, rel=.03)
        assert draws.mean() == pytest.approx(means.mean(), abs=.01)


def test_shared_prompts_are_drawn_for_all_seeds_at_once():
    "Only the prompts differ, and all seeds have them: their variance does not shrink with seeds."
    rows = np.random.default_rng(0).normal(size=(30, 1))
    units = [rows]*10
    shared, drawn, kept = (hierarchical_bootstrap(units, first, 20_000, how).var()
                           for how in ("shared", "drawn", "kept"))
    assert shared == pytest.approx(rows.var()/30, rel=.04) and kept < 1e-20
    assert drawn == pytest.approx(rows.var()/300, rel=.04)
    with pytest.raises(InputError, match="Did you mean 'shared'"):
        hierarchical_bootstrap(units, first, prompts="share")


def test_kept_prompts_give_students_interval():
    "The textbook's: mean ± t · sd/√S of the seeds' means, within the noise of the resamples."
    units = experiment(np.random.default_rng(5), 7, 12, .5, 1.)
    means = np.array([rows.mean() for rows in units])
    half = student_quantile(.975, 6)*means.std(ddof=1)/7**.5
    found = contrast(units, first, n_boot=40_000)
    assert found["low"] == pytest.approx(means.mean() - half, rel=.03)
    assert found["high"] == pytest.approx(means.mean() + half, rel=.03)


def test_pairing_removes_what_seeds_and_prompts_share():
    rng, units = np.random.default_rng(1), []
    for _ in range(8):
        both = rng.normal(0, 2) + rng.normal(0, 3, (25, 1)) + np.zeros((1, 2))
        units.append(both + rng.normal(0, .1, (25, 2)) + [0, .5])
    paired, alone = contrast(units, difference), contrast(units, first)
    assert paired["value"] == pytest.approx(.5, abs=.05) and paired["se"] < .05 < .5 < alone["se"]


def test_the_interval_by_hand():
    "Two seeds without scatter inside: sd of resamples is half the gap / √2, times √2, times t."
    units = [np.zeros((4, 1)), np.ones((4, 1))]
    found = contrast(units, first, margin=9., n_boot=40_000)
    assert found["value"] == .5 and found["se"] == pytest.approx(.5, rel=.02) # .3536·√2
    assert found["high"] - .5 == pytest.approx(12.706*found["se"], rel=1e-3)
    assert found["bound"] == pytest.approx(.5 + 6.314*found["se"], rel=1e-3)
    assert found["p"] == pytest.approx(2*(1 - student_cdf(.5/found["se"], 1)))
    assert found["p_equivalent"] == pytest.approx(1 - student_cdf(8.5/found["se"], 1))


def test_the_interval_of_a_mean_over_seeds():
    """Two numbers by hand (t = 12.7), and what `contrast` says of kept prompts; without a second
    seed there is no interval, without a first no mean."""
    mean, half = t_interval([1., np.nan, 3.])
    assert mean == 2 and half == pytest.approx(12.706, rel=1e-4)
    assert t_interval([1., 3.], .9)[1] == pytest.approx(6.314, rel=1e-3)
    values = np.random.default_rng(0).normal(0, 1, 12)
    found = contrast([np.full((4, 1), v) for v in values], first, n_boot=40_000)
    assert t_interval(values) == pytest.approx((found["value"], found["high"] - found["value"]),
                                               rel=.02)
    assert t_interval([2., np.nan])[0] == 2 and math.isnan(t_interval([2.])[1])
    assert np.isnan(t_interval([np.nan])).all()
    assert mean_text([1., np.nan, 3.], "+.1f") == "+2.0 ± 12.7" and mean_text([2.]) == "2.00 ± nan"


@pytest.mark.parametrize("units, why", [
    ([np.ones((5, 1))], "one seed"), ([np.ones((1, 1))]*3, "one prompt"), ([], "no seed")])
def test_no_interval_without_two_seeds_and_two_prompts(units, why):
    found = contrast(units, first, margin=1.)
    assert why in found["why"] and "interval" in found["why"] or not units
    assert [found[k] for k in ("low", "high", "se", "p", "p_equivalent", "bound")] == [None]*6
    verdict, = decide([found])
    assert verdict["verdict"].startswith("undecided") and why in verdict["verdict"]
    assert found["value"] == (1. if units else None)


def test_a_seed_that_does_not_reach_the_kl_is_missing_and_counted():
    reach = np.tile([1.5, .6], (6, 1)) + np.random.default_rng(0).normal(0, .01, (6, 2))
    short = np.tile([.5, .4], (6, 1))
    def statistic(means): return gain_at_kl(means[:, :1], means[:, 1:], 1)
    found = contrast([reach, short, reach + .01], statistic)
    assert (found["seeds"], found["missing"]) == (2, 1) and .4 < found["value"] < .55
    none = contrast([short, short], statistic)
    assert none["value"] is None and none["missing"] == 2 and none["why"] == "no seed has a value"


def test_seeds_without_any_scatter_are_certain():
    "Standard error 0: p is 0 or 1, never a division by zero."
    same = contrast([np.zeros((3, 1))]*3, first, margin=.1)
    off = contrast([np.ones((3, 1))]*3, first, margin=.1)
    assert (same["p"], same["p_equivalent"]) == (1, 0) and (off["p"], off["p_equivalent"]) == (0, 1)


def test_the_same_seed_gives_the_same_interval():
    units = experiment(np.random.default_rng(0), 4, 10, 1, 1)
    assert contrast(units, first) == contrast(units, first) != contrast(units, first, seed=1)


# ---- several comparisons

def test_holm_by_hand():
    "Times 4, 3, 2, 1 in rising order; none below the one before; none above 1."
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert holm([.5, .6]) == [1., 1.] and holm([.03]) == [.03] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_its_definition(p):
    "Adjusted p ≤ α exactly where the step-down procedure rejects."
    adjusted = holm(p)
    for alpha in (.01, .05, .3):
        rejected, order = set(), sorted(range(len(p)), key=p.__getitem__)
        for rank, i in enumerate(order):
            if (len(p) - rank)*p[i] > alpha: break
            rejected.add(i)
        assert {i for i, a in enumerate(adjusted) if a <= alpha} == rejected


def made(value, p, p_equivalent=None, why=None):
    return dict(value=value, p=p, p_equivalent=p_equivalent, why=why)


def test_verdicts():
    family = [made(.3, .001, .9), made(-.3, .01, .9), made(.02, .6, .001), made(.1, .04, .5),
              made(.04, .002, .002), made(.1, None, None, "one seed: no interval")]
    assert [c["verdict"] for c in decide(family)] == [
        "greater", "less", "equivalent", "undecided", # .04 is not below .05 after Holm
        "greater, by less than the margin", "undecided (one seed: no interval)"]
    assert decide(family[3:4])[0]["verdict"] == "greater" # a family of one


# ---- tuned alike

def test_a_setting_is_chosen_by_the_other_seeds():
    "Seed 0 is best at setting 1, and all others at setting 0: each is measured at the others'."
    scores = [[0., 9.], [1., 0.], [1., 0.], [1., .9]]
    assert chosen_by_other_seeds(scores).tolist() == [0, 1, 1, 1]
    assert chosen_by_other_seeds([[1., 2.]]).tolist() == [0]
    assert chosen_by_other_seeds([[np.nan, 1.], [2., 1.], [2., np.nan]]).tolist() == [0, 0, 1]


def test_a_setting_that_few_seeds_reach_is_not_chosen():
    "Its mean is that of other seeds. One in ten may be missing; of settings with few, most count."
    always = np.full(20, .5)
    def chosen(missing, *others):
        rare = np.where(np.arange(20) < missing, np.nan, .9)
        return set(chosen_by_other_seeds(np.stack([always, rare, *others], 1)[:, bool(others):]))
    assert chosen(0) == chosen(1) == {1} and chosen(3) == chosen(19) == chosen(20) == {0}
    rarer = np.where(np.arange(20) < 12, np.nan, 5.)
    assert chosen(10, rarer) == {0} and chosen(14, rarer) == {1}


def test_the_choice_has_no_winners_curse():
    "Settings that are equal in truth: the reported mean is 0 within four standard errors."
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, 6, 5))
    own = np.array([s[range(6), chosen_by_other_seeds(s)].mean() for s in scores])
    best = scores.mean(1).max(1)
    assert abs(own.mean()) < 4*own.std()/2000**.5 and best.mean() > .4
