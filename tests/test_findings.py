"The sentences of a report are true: each is held against numbers planted or computed anew."
import re

import numpy as np
import pytest
from report_runs import BOOT, SWEEP, evaluation, numbers_of, policy_of, summary_of

from vcb_nb.findings import (SEED_SENTENCE, at_equal_kl, common_kl, common_reach, compare_methods,
                             contrast_pair, decimals, findings, judge_sentence, nats_text,
                             number_text, rounded, ties_of, told_apart)
from vcb_nb.measures import estimate

TIED = "these prompts cannot tell the two apart"


def world(sweep=SWEEP, about=None, **given):
    "(summary, per_prompt) of planted gains."
    numbers = numbers_of(sweep, **given)
    return summary_of(numbers, **(about or {})), {"test": {"policies": numbers}}


def said(sweep=SWEEP, about=None, **given): return findings(*world(sweep, about, **given))


def test_the_best_method_is_named_with_its_gain_at_the_common_kl():
    summary, per_prompt = world()
    at = common_kl(summary)
    first, second, *_ = findings(summary, per_prompt)
    low, high = (float(np.interp(at**.5, [0, .5**.5, 2**.5], [0, *line]))
                 for line in ((.3, .6), (.5, 1.)))
    assert first.startswith(f"At {at:g} nats from SFT, the largest KL that every method reaches, "
                            f"VCB gains most: {high:.2f} [")
    assert first.endswith("gold reward over SFT.")
    assert f"The next is DPO with {low:.2f} [" in second and TIED not in second
    assert f"the difference is {high - low:.2f} [" in second
    assert "and its interval leaves out 0." in second


@pytest.mark.parametrize("seed", range(12))
def test_any_world_is_told_as_numpy_computes_it(seed):
    "An oracle: interpolation in √KL by numpy, of gains and KLs averaged over the prompts."
    rng = np.random.default_rng(seed)
    sweep = {m: dict(zip(np.sort(rng.uniform(.1, 4, 3)).tolist(), rng.normal(.5, .3, 3).tolist()))
             for m in ("vcb", "dpo", "ipo", "grpo")[:rng.integers(2, 5)]}
    summary, per_prompt = world(sweep, noise=.5)
    at, found = common_kl(summary), compare_methods(summary, per_prompt)
    assert 0 < at <= common_reach(summary) <= min(map(max, sweep.values()))
    want = {m: float(np.interp(at**.5, np.sqrt([0, *line]), [0, *line.values()]))
            for m, line in sweep.items()}
    order = sorted(want, key=lambda m: -want[m])
    assert list(found["gains"]) == order
    for m in order:
        assert found["gains"][m]["value"] == pytest.approx(want[m])
        if m != order[0]:
            assert found["behind"][m]["value"] == pytest.approx(want[order[0]] - want[m])
    tied = [m for m, e in found["behind"].items() if e["low"] <= 0 <= e["high"]]
    assert ties_of(found) == tied
    assert (TIED in findings(summary, per_prompt)[1]) == (order[1] in tied)


def test_a_tie_is_called_one_and_all_that_are_tied_are_named():
    gains = dict(vcb=1., dpo=.99, ipo=.98, slic=.1)
    text = said({method: {2.: gain} for method, gain in gains.items()}, noise=1.)[1]
    assert "The next is DPO" in text and TIED in text
    assert text.endswith("nor can they tell VCB from IPO.")


def test_what_all_prompts_share_does_not_hide_a_difference():
    "Single intervals overlap, the paired one leaves out 0: easy prompts are easy for both."
    sweep = {"vcb": {2.: 1.}, "dpo": {2.: .9}}
    numbers = numbers_of(sweep, noise=.01)
    for name in ("vcb-2", "dpo-2"):
        numbers[name]["gold"] = np.add(numbers[name]["gold"], np.linspace(-3, 3, 40)).tolist()
    found = compare_methods(summary_of(numbers), {"test": {"policies": numbers}})
    assert found["gains"]["dpo"]["high"] > found["gains"]["vcb"]["low"] and ties_of(found) == []


def test_equal_methods_are_rarely_told_apart():
    "The planted difference is 0: the rate of false findings is that of a 95 % interval."
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(200):
        sweep = {"vcb": {2.: 1.}, "dpo": {2.: 1.}}
        numbers = {n: dict(gold=rng.normal(g, 1, 60), kl=np.full(60, 2.*(n != "sft")))
                   for n, g in (("sft", 0), ("vcb-2", 1), ("dpo-2", 1))}
        summary = dict(settings=BOOT, policies={n: dict(method=n.partition("-")[0], splits={
            "test": {"kl": estimate(v["kl"])}}) for n, v in numbers.items()})
        found = compare_methods(summary, {"test": {"policies": numbers}})
        wrong += len(ties_of(found)) == 0
        assert set(found["gains"]) == set(sweep)
    assert 0 < wrong < 25


def test_one_method_is_not_the_most_of_anything():
    first, second, *rest = said({"vcb": {2.: 1.}}, kl_noise=0)
    assert "every method" not in first and "VCB gains 1.00" in first and "most" not in first
    assert second == "The interval leaves out 0." and rest[-1] == SEED_SENTENCE
    assert said({"vcb": {2.: .001}}, noise=2.)[1].startswith("The interval includes 0")
    assert not any("largest gain at any" in s for s in said({"vcb": {2.: 1.}}))


def test_the_largest_gain_at_any_distance():
    text = said({"vcb": {.5: .5, 2.: 1.}, "dpo": {.5: .3, 8.: 1.4}})[2]
    assert text.startswith("The largest gain at any distance is that of DPO β=0.125: 1.40 [")
    assert "at 8" in text and text.endswith("nats.")


def test_without_methods():
    only = said({})
    assert only == ["Only SFT was evaluated: there is no method to compare with it.", *only[1:]]
    assert SEED_SENTENCE not in only


def test_without_an_evaluation():
    assert findings(None) == ["The stage evaluate has not run, so no policy was compared with "
                              "another."]
    assert "80.0%" in findings(None, reward=evaluation())[0]


def test_without_a_judge_and_with_the_reward_model_only():
    none = said(judges=())
    assert none[0] == "No reward judged the samples, so gains are not known."
    model = said(judges=("reward",))
    assert "model reward over SFT" in model[0]
    assert any("No gold reward is known" in s for s in model)
    assert not any("No gold reward is known" in s for s in said())


def test_samples_that_are_not_the_policys_own_have_no_kl():
    text = said(about=dict(on_policy=False))
    assert text[0].startswith("Each at its own distance from SFT")
    assert "VCB gains most: 1.0" in text[0]
    assert not any(" nats." in s for s in text[:3])


def test_a_method_that_never_left_sft():
    "No KL above 0 is common to all: the methods are compared where they are."
    text = said({"vcb": {2.: 1.}, "dpo": {1e-9: .0}})
    assert text[0].startswith("Each at its own distance")


def test_one_prompt():
    text = said(prompts=1)
    assert text[1] == "With one prompt there are no intervals." and "[–]" in text[0]
    assert not any("apart" in s for s in text)


def test_without_rows_per_prompt_nothing_is_compared_in_pairs():
    text = findings(world()[0])
    assert text[0].startswith("The largest gain") and "per_prompt.json is missing" in text[1]


def test_calibration_is_said_of_vcb_beside_dpo():
    summary, per_prompt = world()
    (text,) = [s for s in findings(summary, per_prompt) if s.startswith("Log-ratio gaps")]
    fit = summary["policies"]["vcb-2"]["calibration"]
    assert contrast_pair(summary) == ["vcb-2", "dpo-2"]
    assert (f"VCB γ=0.5 has correlation {rounded(fit['pearson'])} and slope "
            f"{rounded(fit['slope'])}") in text
    assert "(its target is 1/γ = 2)" in text and text.count("target") == 1
    assert not any("Log-ratio gaps" in s for s in said(about=dict(fit=False)))


@pytest.mark.parametrize("methods, pair", [
    (["ipo", "dpo", "vcb"], ["vcb", "dpo"]), (["dpo", "vcb_online"], ["vcb_online", "dpo"]),
    (["dpo", "ipo"], ["dpo", "ipo"]), (["grpo", "vcb_lse", "ipo"], ["vcb_lse", "grpo"]),
    (["slic"], ["slic"]), ([], [])])
def test_which_two_are_set_side_by_side(methods, pair):
    numbers = numbers_of({m: {1.: .5} for m in methods})
    assert contrast_pair(summary_of(numbers)) == [f"{m}-1" for m in pair]


def judged(*margins):
    rows = [dict(policy=p, against="sft", margin=m and estimate(m, **BOOT)) for p, m in margins]
    return dict(model="judge-1", comparisons=rows, agreement=dict(value=.875))


def test_the_judge():
    summary = world()[0]
    found = judged(("vcb-2", [1, 0, 1, 1]), ("dpo-2", [1, -1, 0, 0]), ("dpo-0.5", None))
    assert judge_sentence(found, summary) == [
        "Against SFT the judge (judge-1) favours VCB γ=0.5 most: win − lose 0.8 [0.2, 1.0]; its "
        "two orders agree in 88% of the pairs."]
    assert judge_sentence(None, summary) == []


@pytest.mark.parametrize("margins", [[("vcb-2", None)], [("vcb-2", [1]), ("dpo-2", None)]])
def test_a_judge_that_gave_hardly_a_verdict_favours_nobody(margins):
    "One verdict has no interval: it is not called a preference."
    found = judged(*margins) | dict(pairs=24, no_verdict=23)
    assert judge_sentence(found, world()[0]) == [
        "The judge (judge-1) gave a verdict on 1 of 24 pairs: too few to compare policies."]
    told = judged(*margins, ("ipo-1", [1, 0, 1, 1]))
    assert "favours" in judge_sentence(told, world()[0])[0]


def test_methods_have_their_printed_names():
    text = " ".join(said({"vcb_online": {1.: .6}, "grpo": {1.: .2}, "vcb_lse": {1.: .3}}))
    for name in ("VCB on-policy", "GRPO", "VCB (LSE)"): assert name in text
    assert not re.search(r"vcb_|grpo|\bsft\b", text)


def test_the_common_kl_is_what_every_method_surely_reaches():
    "The weakest of the methods' strongest policies decides, at the lower end of its interval."
    summary = world(kl_noise=.5)[0]
    ends = [summary["policies"][f"{m}-2"]["splits"]["test"]["kl"]["low"] for m in ("vcb", "dpo")]
    assert common_reach(summary) == min(ends) < 2
    assert min(ends) - .1 <= common_kl(summary) <= min(ends)
    assert at_equal_kl(summary) == {"sft": "sft", "vcb": "vcb-2", "dpo": "dpo-2"}
    assert common_kl({"policies": {"sft": policy_of("sft", numbers_of({}))}}) is None


@pytest.mark.parametrize("reach", [.0123, .1, .95, 1., 1.99, 12.3, 99.9, 123., .3, .7])
def test_rounding_down_never_goes_beyond(reach):
    kl = dict(value=reach, low=reach, high=reach)
    summary = {"policies": {"a": dict(method="a", splits={"test": {"kl": kl}})}}
    at = common_kl(summary)
    assert .9*reach <= at <= reach*(1 + 1e-12) and float(f"{at:.2g}") == at


@pytest.mark.parametrize("value, digits, text", [
    (0., None, "0"), (-.0004, 2, "0.00"), (-1.5, None, "−1.5"), (1234.5, None, "1,234"),
    (.0333333, None, "0.0333"), (1.2345678, None, "1.23"), (None, None, "–"), (-12., 0, "−12"),
    (-.05, 2, "−0.05"), (1e-5, None, "1e-05")])
def test_numbers_have_the_digits_that_mean_something(value, digits, text):
    assert number_text(value, digits).replace("e−", "e-") == text


@pytest.mark.parametrize("value, digits, text", [
    (1., None, "1 nat"), (.51, None, "0.51 nats"), (0, None, "0 nats"), (11., None, "11 nats"),
    (1.0004, 2, "1.00 nats"), (None, None, "– nats")])
def test_one_nat_is_singular(value, digits, text):
    assert nats_text(value, digits) == text


@pytest.mark.parametrize("low, high, shown", [
    (.46239, .94734, "0.70 [0.46, 0.95]"), (-91.3, -52.2, "−72 [−91, −52]"),
    (.6498, .7361, "0.69 [0.65, 0.74]"), (1., 1., "1 [1, 1]"),
    (.9, .9 + 2e-16, "0.9 [0.9, 0.9]"), (1200., 3400., "2300 [1200, 3400]"),
    (-.0012, .0008, "−0.0002 [−0.0012, 0.0008]")])
def test_an_interval_decides_the_digits(low, high, shown):
    assert rounded(dict(value=(low + high)/2, low=low, high=high)) == shown


def test_a_column_has_one_number_of_decimals():
    rows = [dict(value=1, low=0., high=w) for w in (.5, .4, 6.)] + [None]
    assert decimals(rows) == 2 and decimals([None]) is decimals([]) is None


def test_told_apart_needs_an_interval():
    assert not told_apart(dict(value=1., low=None, high=None))
    assert told_apart(dict(value=1., low=.1, high=2.))
    assert told_apart(dict(value=-1, low=-2, high=-.1))
    assert not told_apart(dict(value=1., low=-.1, high=2.))


def test_no_method_is_called_best_where_none_has_moved():
    "As after a few steps at a small learning rate: the samples of all policies are the same."
    numbers = numbers_of({"vcb": {1.: .5}, "dpo": {1.: .5}}, judges=("gold",))
    still = {name: numbers["sft"] for name in numbers}
    said = findings(summary_of(still), {"test": {"policies": still}})
    assert "all methods gain the same: 0" in said[0] and not any("most" in s or "largest gain" in s
                                                                 for s in said)
