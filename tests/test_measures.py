"Measures: statistics against oracles, KL against enumeration, calibration at its fixed points."
import itertools, json, math

import numpy as np
import pytest
import torch

from vcb_nb.artifacts import InputError
from vcb_nb.logprobs import score_logps
from vcb_nb.losses import calibration_metrics
from vcb_nb.measures import (bootstrap_interval, calibration, calibration_gaps, calibration_sums,
                             distinct_n, distinct_share, estimate, estimate_text, grouped,
                             grouped_mean, kl_estimates, pad_ragged, ranks, reliability_table,
                             reward_metrics, sigmas, slope, wilson_interval, win_tie_lose)
from vcb_nb.worlds import enumerate_strings

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


# ---- intervals

def test_interval_covers_the_truth():
    "A 95 % interval of 60 prompts holds the true mean in about 95 of 100 worlds."
    rng, held = np.random.default_rng(0), []
    for world in range(300):
        prompts = rng.normal(size=(60, 1)) + .5*rng.normal(size=(60, 4))
        low, high = bootstrap_interval(prompts.mean(1), n_boot=300, seed=world)
        held.append(low <= 0 <= high)
    assert .91 <= np.mean(held) <= .98


def test_interval_of_a_slope_covers_the_truth():
    "Statistics of mean rows (here a ratio) are covered as well as means are."
    rng, held = np.random.default_rng(1), []
    for world in range(150):
        r = rng.normal(size=(50, 4))
        y = 2*r/sigmas(r)[0][:, None] + rng.normal(size=(50, 4))
        sums = calibration_sums(r/sigmas(r)[0][:, None], y)
        low, high = bootstrap_interval(sums, slope, n_boot=200, seed=world)
        held.append(low <= 2 <= high)
    assert .89 <= np.mean(held) <= .99


def test_prompts_are_the_unit():
    "Samples of one prompt are no independent draws: repeating them narrows no interval."
    means = np.random.default_rng(0).normal(size=50)
    once, often = ([np.mean([m]*n) for m in means] for n in (1, 16))
    assert estimate(once) == estimate(often)
    expected = 1.96*means.std(ddof=1)/50**.5
    found = estimate(means, n_boot=20_000)
    assert found["high"] - found["value"] == pytest.approx(expected, rel=.12)


def test_interval_does_not_depend_on_the_chunks_it_is_computed_in():
    few, many = np.random.default_rng(0).normal(size=(2, 30))
    assert bootstrap_interval(few, n_boot=50) == bootstrap_interval(few, n_boot=50)
    large = np.random.default_rng(0).normal(size=60_000) # more resamples than one chunk holds
    low, high = bootstrap_interval(large, n_boot=150)
    assert low < large.mean() < high and high - low == pytest.approx(2*1.96/60_000**.5, rel=.3)


def test_no_prompts_is_an_error():
    with pytest.raises(InputError, match="no prompt"): estimate([])


def test_an_estimate_as_text():
    "The report and the diagnosis print it alike, each in its own format."
    found = {"value": .5, "low": .25, "high": 1234.5}
    assert estimate_text(found, ".2f") == "0.50 [0.25, 1234.50]"
    assert estimate_text(found) == "0.5 [0.25, 1.23e+03]"
    assert estimate_text({**found, "low": None}) == "0.5 [–, 1.23e+03]"
    assert estimate_text(None) == "–"


# ---- wins and diversity

def test_win_tie_lose_is_brute_force():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 4, size=(6, n)).astype(float) for n in (3, 5))
    for row, x, y in zip(win_tie_lose(a, b, .5), a, b):
        pairs = list(itertools.product(x, y))
        gaps = [p - q for p, q in pairs]
        expected = [sum(g > .5 for g in gaps), sum(abs(g) <= .5 for g in gaps),
                    sum(g < -.5 for g in gaps)]
        np.testing.assert_allclose(row, np.array(expected)/15)
    np.testing.assert_allclose(win_tie_lose(a, b), win_tie_lose(b, a)[:, ::-1])


@pytest.mark.parametrize("coupled", [False, True])
def test_wins_of_rows_of_any_lengths(coupled):
    "Prompt by prompt as if it were alone; a prompt's only pair counts even if it is coupled."
    rng = np.random.default_rng(0)
    sizes = [(3, 3), (1, 1), (4, 2), (2, 5), (1, 3), (3, 1)]
    a, b = ([rng.integers(0, 4, size=size).astype(float) for size in own] for own in zip(*sizes))
    expected = []
    for x, y in zip(a, b):
        pairs = [(p, q) for (i, p), (j, q) in itertools.product(enumerate(x), enumerate(y))
                 if i != j or not coupled or len(x)*len(y) == 1]
        expected.append([sum(s(p, q) for p, q in pairs)/len(pairs)
                         for s in (float.__gt__, float.__eq__, float.__lt__)])
    assert win_tie_lose(a, b, coupled=coupled).tolist() == expected
    assert win_tie_lose([], []).shape == (0, 3)
    with pytest.raises(ValueError, match="6 prompts meet 1"): win_tie_lose(a, b[:1])


def test_tolerance_decides_ties():
    assert win_tie_lose([[1.0], [2.0]], [[1.0 + 1e-7], [2.0]]).tolist() == [[0, 1, 0]] * 2
    for level, scale in ((0, 1), (1e6, 1), (0, 1e-9)): # relative to the spread, at any level
        a, b = ([[level + scale*r] for r in rewards] for rewards in ([.1, .3], [.85, .3]))
        assert win_tie_lose(a, b).tolist() == [[0, 0, 1], [0, 1, 0]]
    assert win_tie_lose([[.1 + .2]], [[.3]]).tolist() == [[0, 1, 0]]
    assert win_tie_lose([[1.0]], [[1.25]], .25).tolist() == [[0, 1, 0]]
    assert win_tie_lose([[1.0]], [[1.25]], .2).tolist() == [[0, 0, 1]]


def test_common_random_numbers_do_not_inflate_wins():
    """Same-numbered samples share random numbers; with them in,
    a hair's breadth looks like a victory."""
    r = np.random.default_rng(0).normal(size=(400, 4))
    better, fair = r + 1e-3, .5
    assert abs(win_tie_lose(better, r, coupled=True)[:, 0].mean() - fair) < .01
    assert win_tie_lose(better, r)[:, 0].mean() > fair + .1


def test_distinct_n():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3/4 and distinct_n([[1, 2], [3]], 1) == 1
    assert distinct_n([[1], [2]], 2) == 0 == distinct_n([[], []], 1)
    assert distinct_share([[1], [1], [2], [1]]) == 1/2


# ---- KL in a world that can be enumerated

@pytest.fixture(scope="module")
def enumerable():
    """Two GPT-NeoX over 5 tokens (0 ends), at most 3 tokens a response: all 85 responses,
    both log-probabilities."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    config = GPTNeoXConfig(vocab_size=5, max_position_embeddings=8, hidden_dropout=0,
                           attention_dropout=0, eos_token_id=0, **TINY)
    torch.manual_seed(0)
    models = [GPTNeoXForCausalLM(config).eval() for _ in range(2)]
    for model in models:
        with torch.no_grad(): model.get_output_embeddings().weight.mul_(5)
    responses = enumerate_strings(5, 3).tokens()
    logps = [np.array(score_logps(m, [[1, 2]], [responses])[0]) for m in models]
    return models, responses, logps


def test_responses_are_all_there_are(enumerable):
    for logps in enumerable[2]: assert np.exp(logps).sum() == pytest.approx(1, abs=1e-5)


def test_kl_estimates_agree_with_exact_kl(enumerable):
    """Pitfall 30: on the policy's own samples, k1 and k3 both estimate the exact KL within their
    standard error."""
    _, _, (p, q) = enumerable
    exact = float((np.exp(p)*(p - q)).sum())
    drawn = np.random.default_rng(0).choice(len(p), size=(2000, 4), p=np.exp(p)/np.exp(p).sum())
    assert exact > .5
    for k in kl_estimates(p[drawn], q[drawn]):
        assert abs(k.mean() - exact) < 4*k.std(ddof=1)/len(k)**.5
    assert (kl_estimates(p[drawn], q[drawn])[1] >= 0).all()


def test_kl_of_samples_drawn_by_the_library(enumerable):
    """The same with `sample_candidates`: cut responses (no EOS) count as the responses that they
    are."""
    from types import SimpleNamespace
    from vcb_nb.sample import sample_candidates
    models, responses, (p, q) = enumerable
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
    ids, *_ = sample_candidates(models[0], tokenizer, [[1, 2]]*250, n=4, max_new_tokens=3,
                               batch_size=50)
    place = {tuple(r): i for i, r in enumerate(responses)}
    drawn = np.array([[place[tuple(c)] for c in group] for group in ids])
    exact = float((np.exp(p)*(p - q)).sum())
    for k in kl_estimates(p[drawn], q[drawn]):
        assert abs(k.mean() - exact) < 4*k.std(ddof=1)/len(k)**.5


def test_kl_off_policy_is_another_number(enumerable):
    "Pitfall 30: at temperature .5 the mean log-ratio is not the KL, by many standard errors."
    _, _, (p, q) = enumerable
    exact, sharp = float((np.exp(p)*(p - q)).sum()), np.exp(2*p)/np.exp(2*p).sum()
    k1, _ = kl_estimates(*(v[np.random.default_rng(0).choice(len(p), size=(2000, 4), p=sharp)]
                           for v in (p, q)))
    assert abs(k1.mean() - exact) > 8*k1.std()/len(k1)**.5


def test_k3_of_an_absurd_sample_is_finite():
    k1, k3 = kl_estimates([[-5000.]], [[0.]])
    assert k1[0] == -5000 and math.isfinite(k3[0])


# ---- the reliability of a reward model

def test_metrics_by_hand():
    chosen, rejected = [2., 0., 1., 5.], [0., 1., 1., 0.]
    m = reward_metrics(chosen, rejected, n_bins=2)
    p = [1 / (1 + math.exp(-g)) for g in (2, -1, 0, 5)]
    assert m["accuracy"] == (1 + 0 + .5 + 1) / 4 and m["margin"] == 1.5 and m["pairs"] == 4
    assert m["brier"] == pytest.approx(sum((1 - q) ** 2 for q in p) / 4)
    assert m["log_loss"] == pytest.approx(-sum(map(math.log, p)) / 4)
    low, high = m["reliability"]
    assert (low["pairs"], high["pairs"]) == (2, 2) # confidences ½ and .73 · .88 and .99
    assert low["accuracy"] == .25 and high["accuracy"] == 1.
    assert low["confidence"] == pytest.approx((.5 + 1 - p[1]) / 2)
    assert m["ece"] == pytest.approx(.5 * abs(.25 - low["confidence"])
                                     + .5 * abs(1 - high["confidence"]))


def test_one_order_has_all_that_both_orders_have():
    "ECE over both orders of every pair, in bins over [0, 1], equals ours: the mirror adds nothing."
    rng = np.random.default_rng(0)
    gaps = rng.normal(.5, 2, 4000)
    p, label = 1 / (1 + np.exp(-np.concatenate([gaps, -gaps]))), np.repeat([1., 0.], 4000)
    bins = np.minimum((p * 20).astype(int), 19)
    both = sum(abs(label[bins == b].mean() - p[bins == b].mean()) * (bins == b).mean()
               for b in np.unique(bins))
    ours = sum(r["pairs"] * abs(r["accuracy"] - r["confidence"])
               for r in reliability_table(gaps)) / 4000
    assert ours == pytest.approx(both, rel=1e-9)


def test_true_probabilities_are_calibrated_and_doubled_ones_are_not():
    rng = np.random.default_rng(1)
    size = np.abs(rng.normal(0, 2, 20000))
    gaps = np.where(rng.random(20000) < 1 / (1 + np.exp(-size)), size, -size)
    honest, boastful = (reward_metrics(k * gaps, 0 * gaps) for k in (1, 2))
    assert honest["ece"] < .015 < .05 < boastful["ece"]
    assert honest["accuracy"] == boastful["accuracy"]
    assert honest["brier"] < boastful["brier"] and honest["log_loss"] < boastful["log_loss"]
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in honest["reliability"])
    inside = [r["low"] <= r["confidence"] <= r["high"] for r in honest["reliability"]]
    assert sum(inside) >= 8


def test_a_grouped_mean_weighs_values_alike():
    "Three values here and one there: the ratio of mean rows is the mean of all four."
    rows = grouped([1., 0., 1., 1.], ["a", "a", "a", "b"])
    assert rows.tolist() == [[2, 3], [1, 1]]
    assert estimate(rows, grouped_mean)["value"] == .75


def test_bootstrap_covers_the_truth_and_widens_for_shared_prompts():
    rng = np.random.default_rng(2)
    hits = 0
    for i in range(60):
        low, high = bootstrap_interval(rng.random(200) < .7, n_boot=300, seed=i)
        hits += low <= .7 <= high
    assert hits >= 51 # of 60: 95 % less four standard errors
    values, groups = np.repeat(rng.random(100) < .7, 9), np.repeat(np.arange(100), 9)
    def width(*groups):
        low, high = bootstrap_interval(grouped(values, *groups), grouped_mean)
        return high - low
    assert width(groups) > 2 * width()


@pytest.mark.parametrize("prompts, n_boot", [(50, 400), (3000, 1500)], ids=["kept", "in blocks"])
def test_an_interval_is_that_of_its_resamples(prompts, n_boot):
    "Each mean is that of prompts drawn with replacement, the first time and every other time."
    units = np.random.default_rng(3).normal(size=(prompts, 2))
    rng, even = np.random.default_rng(5), np.full(prompts, 1/prompts)
    means = np.array([rng.multinomial(prompts, even) @ units/prompts for _ in range(n_boot)])
    expected = np.quantile(means[:, 0] - means[:, 1], [.025, .975])
    for sign in (1, -1, 1):
        found = bootstrap_interval(sign*units, lambda m: m[:, 0] - m[:, 1], n_boot, seed=5)
        np.testing.assert_allclose(sorted(sign*np.array(found)), expected, rtol=1e-12)


def test_wilson_interval_is_the_root_of_its_equation():
    for k, n in ((0, 5), (3, 7), (7, 7), (500, 1000)):
        for edge in wilson_interval(k, n):
            assert (k / n - edge) ** 2 == pytest.approx(
                1.96 ** 2 * edge * (1 - edge) / n, abs=1e-12)


def test_extreme_gaps_give_finite_numbers():
    m = reward_metrics([1e4, -1e4], [0., 0.])
    json.dumps(m, allow_nan=False)
    assert m["brier"] == .5 and m["log_loss"] == 5000.


# ---- calibration

def test_ragged_rows_are_padded():
    "Lists, arrays and tensors; a row without numbers; no row at all."
    values, mask = pad_ragged([[1, 2.5], np.array([3.]), torch.tensor([4, 5, 6]), []])
    assert values.dtype == torch.float64 and mask.dtype == torch.bool
    assert values.tolist() == [[1, 2.5, 0], [3, 0, 0], [4, 5, 6], [0, 0, 0]]
    assert mask.sum(1).tolist() == [2, 1, 3, 0] and not values[~mask].any()
    assert [tuple(t.shape) for t in pad_ragged([])] == [(0, 1), (0, 1)]


@pytest.fixture
def rewards():
    return (np.random.default_rng(0).normal(size=(30, 6))
            *np.random.default_rng(1).lognormal(size=(30, 1)))


def test_calibration_at_the_start_and_at_the_optimum(rewards):
    "At π = π_sft slope and correlation are 0; at ℓ = r/(γσ) + c(x) they are 1/γ and 1."
    start = calibration(np.zeros_like(rewards), rewards, n_boot=50)
    assert start["slope"]["value"] == start["pearson"]["value"] == start["spearman"]["value"] == 0
    assert start["implied_gamma"] == dict(value=None, low=None, high=None)
    c = np.random.default_rng(2).normal(size=(30, 1))*10
    optimum = calibration(rewards/(.25*rewards.std(1, ddof=1, keepdims=True)) + c, rewards,
                          n_boot=50)
    for name, value in dict(slope=4, pearson=1, spearman=1, implied_gamma=.25).items():
        assert optimum[name]["value"] == pytest.approx(value)
        assert optimum[name]["low"] == pytest.approx(value) == optimum[name]["high"]


def test_calibration_agrees_with_the_losses_metrics(rewards):
    "Pitfall 17: slope and correlation are those that training logs, on ragged rows too."
    ratios = np.random.default_rng(3).normal(size=rewards.shape) + rewards
    counts = [2 + i % 5 for i in range(30)]
    r, l = ([list(row[:n]) for row, n in zip(v, counts)] for v in (rewards, ratios))
    (values, mask), (gaps, _) = pad_ragged(r), pad_ragged(l)
    for rows in (dict(logratios=l, rewards=r), dict(logratios=ratios, rewards=rewards)):
        x, m = pad_ragged(rows["rewards"])
        expected = calibration_metrics(pad_ragged(rows["logratios"])[0], x, mask=m)
        found = calibration(**rows, n_boot=10)
        for name, logged in (("slope", "slope"), ("pearson", "correlation")):
            assert found[name]["value"] == pytest.approx(float(expected[logged]), rel=1e-9)


def test_spearman_sees_order_and_pearson_spacing(rewards):
    z = rewards/rewards.std(1, ddof=1, keepdims=True)
    found = calibration(np.exp(2*z), rewards, n_boot=10)
    assert found["spearman"]["value"] == pytest.approx(1) and found["pearson"]["value"] < .9


def test_ranks_share_ties():
    assert ranks([3., 1., 3., 2.]).tolist() == [3, .5, 3, 1.5]
    v = np.random.default_rng(0).integers(0, 5, 12).tolist()
    places = {x: np.mean([i for i, y in enumerate(sorted(v)) if y == x]) for x in v}
    np.testing.assert_allclose(ranks(v), [places[x] + .5 for x in v])


def test_gaps_stay_within_a_prompt():
    "Pitfall 18: candidates of different prompts are never compared, whatever their level."
    x = [[0., 1.], [1000., 1001.], [-1000., -999.]]
    points = np.array(calibration_gaps(x, x, limit=100))
    assert len(points) == 3 and (np.abs(points) <= 1).all()
    assert len(calibration_gaps(x, x, limit=2)) == 2


def test_equal_rewards_carry_no_signal():
    """Pitfall 22: a float residue among equal rewards is no reward gap;
    the prompt is dropped and counted."""
    residue = [.1 + .2, .3, .3 + 1e-17]
    found = calibration([[5., -5., 0.], [1., 0., -1.]], [residue, [1., 0., -1.]], n_boot=10)
    assert found["dropped_prompts"] == 1 and found["slope"]["value"] == pytest.approx(1)
    with pytest.raises(InputError, match="different rewards"):
        calibration([[5., -5., 0.]], [residue])


def test_sigma_is_the_prompts_own():
    """Pitfall 23: σ(x) belongs to the prompt; one pooled σ is another thing,
    and has to be asked for."""
    r = [[0., 1., 2.], [0., 10., 20.]]
    assert sigmas(r)[0].tolist() == [1, 10]
    assert sigmas(r, "dataset")[0] == pytest.approx([((1 + 100)/2)**.5]*2)
    uneven = [*r, [3.], [1., 1., 1., 1.]] # a single candidate weighs nothing, four weigh three
    assert sigmas(uneven, "dataset")[0] == pytest.approx([((2*1 + 2*100)/7)**.5]*4)
    with pytest.raises(InputError, match="'batch'. Valid: dataset"): sigmas(r, "batch")


def test_two_candidates_lose_the_values():
    "Pitfall 24: with n = 2 every gap is ±√2 by the prompt's σ; the pooled σ keeps the values."
    r = np.random.default_rng(0).normal(size=(50, 2))
    gaps = np.array(calibration(r, r, n_boot=10)["points"])
    np.testing.assert_allclose(np.abs(gaps[:, 0]), 2**.5, atol=1e-4)
    pooled = calibration(r, r, sigma="dataset", n_boot=10)
    assert (pooled["pearson"]["value"] == pytest.approx(1)
            and calibration(r, r, n_boot=10)["pearson"]["value"] < .95)


def test_ranks_share_what_is_a_tie():
    assert ranks([.1 + .2, .3, 1e6]).tolist() == [1, 1, 2.5]
    assert ranks([1e6 + .1, 1e6 + .85]).tolist() == [.5, 1.5]


def test_one_prompt_has_no_interval():
    "Width 0 would say that all is known; null says that nothing is. Two prompts have one."
    one = [bootstrap_interval([3.]), bootstrap_interval([[3., 4.]], lambda m: m[:, 1]),
           wilson_interval(0, 0)]
    assert one == [(None, None)] * 3
    assert estimate([3.]) == dict(value=3., low=None, high=None, prompts=1)
    assert estimate([3., 3.])["low"] == 3 and None not in wilson_interval(1, 1)
    several = reward_metrics([1., 2.], [0., 3.], ["same", "same"])
    assert several["accuracy"] == .5 and several["accuracy_interval"] == [None, None]
    found = calibration([[0., 1., 2.]], [[0., 1., 2.]])
    for name in ("slope", "pearson", "spearman", "implied_gamma"):
        assert found[name]["value"] == pytest.approx(1) and found[name]["high"] is None
    assert estimate_text(found["slope"]) == "1 [–]"
