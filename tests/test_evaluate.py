"""Evaluation: statistics against oracles, KL against exact enumeration,
and the whole stage on tiny models."""
import itertools, json, math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from vcb_nb import figures
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError, read_json, write_jsonl
from vcb_nb.data import load_rows, train_tokenizer
from vcb_nb.evaluate import (DiagnoseConfig, EvaluateConfig, bootstrap_interval, calibration,
                             calibration_gaps, calibration_sums, check_same_tokenizer, compare,
                             diagnose, distinct_n, distinct_share, estimate, evaluate, frontier,
                             kl_estimates, padded, ranks, sigmas, slope, source_mark,
                             win_tie_lose)
from vcb_nb.loading import load_policy, new_reward_model
from vcb_nb.logprobs import score_logps
from vcb_nb.losses import calibration_metrics
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model
from vcb_nb.worlds import enumerate_strings

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


# ---- statistics

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


def test_tolerance_decides_ties():
    assert win_tie_lose([[1.0]], [[1.0 + 1e-7]]).tolist() == [[0, 1, 0]]
    assert win_tie_lose([[1.0]], [[1.25]], .25).tolist() == [[0, 1, 0]]
    assert win_tie_lose([[1.0]], [[1.25]], .2).tolist() == [[0, 0, 1]]


def test_common_random_numbers_do_not_inflate_wins():
    """Same-numbered samples share random numbers; with them in,
    a hair's breadth looks like a victory."""
    r = np.random.default_rng(0).normal(size=(400, 4))
    better, fair = r + 1e-3, .5
    assert abs(win_tie_lose(better, r, coupled=True)[:, 0].mean() - fair) < .01
    assert win_tie_lose(better, r)[:, 0].mean() > fair + .1


def test_compare_is_antisymmetric():
    rng = np.random.default_rng(0)
    games = compare({k: rng.normal(size=(20, 3)) for k in "abc"}, n_boot=100)
    assert games["a"]["b"]["margin"]["value"] == pytest.approx(-games["b"]["a"]["margin"]["value"])
    shares = [[g[k] for k in ("win", "tie", "lose")] for row in games.values()
              for g in row.values()]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1)
    assert "a" not in games["a"]


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
                           attention_dropout=0, **TINY)
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


# ---- calibration

@pytest.fixture
def rewards():
    return (np.random.default_rng(0).normal(size=(30, 6))
            *np.random.default_rng(1).lognormal(size=(30, 1)))


def test_calibration_at_the_start_and_at_the_optimum(rewards):
    "At π = π_sft slope and R² are 0; at ℓ = r/(γσ) + c(x) the slope is 1/γ and R² is 1."
    start = calibration(np.zeros_like(rewards), rewards, n_boot=50)
    assert start["slope"]["value"] == start["r2"]["value"] == start["spearman"]["value"] == 0
    assert start["implied_gamma"] == dict(value=None, low=None, high=None)
    c = np.random.default_rng(2).normal(size=(30, 1))*10
    optimum = calibration(rewards/(.25*rewards.std(1, ddof=1, keepdims=True)) + c, rewards,
                          n_boot=50)
    for name, value in dict(slope=4, r2=1, pearson=1, spearman=1, implied_gamma=.25).items():
        assert optimum[name]["value"] == pytest.approx(value)
        assert optimum[name]["low"] == pytest.approx(value) == optimum[name]["high"]


def test_calibration_agrees_with_the_losses_metrics(rewards):
    "Pitfall 17: slope and R² are those that training logs, on ragged rows too."
    ratios = np.random.default_rng(3).normal(size=rewards.shape) + rewards
    counts = [2 + i % 5 for i in range(30)]
    r, l = ([list(row[:n]) for row, n in zip(v, counts)] for v in (rewards, ratios))
    (values, mask), (gaps, _) = padded(r), padded(l)
    for rows in (dict(logratios=l, rewards=r), dict(logratios=ratios, rewards=rewards)):
        x, m = padded(rows["rewards"])
        expected = calibration_metrics(padded(rows["logratios"])[0], x, mask=m)
        found = calibration(**rows, n_boot=10)
        for name in ("slope", "r2"):
            assert found[name]["value"] == pytest.approx(float(expected[name]), rel=1e-9)


def test_spearman_sees_order_and_r2_spacing(rewards):
    z = rewards/rewards.std(1, ddof=1, keepdims=True)
    found = calibration(np.exp(2*z), rewards, n_boot=10)
    assert found["spearman"]["value"] == pytest.approx(1) and found["r2"]["value"] < .9


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
    with pytest.raises(InputError, match="'batch'. Valid: dataset"): sigmas(r, "batch")


def test_two_candidates_lose_the_values():
    "Pitfall 24: with n = 2 every gap is ±√2 by the prompt's σ; the pooled σ keeps the values."
    r = np.random.default_rng(0).normal(size=(50, 2))
    gaps = np.array(calibration(r, r, n_boot=10)["points"])
    np.testing.assert_allclose(np.abs(gaps[:, 0]), 2**.5, atol=1e-4)
    pooled = calibration(r, r, sigma="dataset", n_boot=10)
    assert (pooled["r2"]["value"] == pytest.approx(1)
            and calibration(r, r, n_boot=10)["r2"]["value"] < .9)


def test_frontier_is_in_order_of_strength():
    def policy(method, value):
        return dict(method=method, strength="g", value=value, splits=dict(test={}))
    lines = frontier({"a": policy("m", 2.), "b": policy("m", .5), "c": policy("n", None),
                      "d": policy("m", 1.)})
    assert ([p["policy"] for p in lines["m"]] == ["b", "d", "a"]
            and [p["policy"] for p in lines["n"]] == ["c"])


# ---- the stage, on tiny models

def gold(prompt, completion):
    "A judge for the tests: vowels, less half the length."
    return sum(c in "aeiou" for c in completion) - .5*len(completion)


def broken(prompt, completion): return math.nan


def tilted(model, by):
    "The model with weights moved a little: another policy."
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters(): p.add_(by*torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer):
    "An SFT model, a policy near it, a reward model, prompts and scored candidates, all tiny."
    root = tmp_path_factory.mktemp("world")
    sft = new_policy(tiny_tokenizer, seed=0, **TINY)
    save_model(sft, tiny_tokenizer, root/"sft")
    save_model(tilted(sft, .02), tiny_tokenizer, root/"policy")
    save_model(new_reward_model(str(root/"sft"), tiny_tokenizer), tiny_tokenizer, root/"reward")
    write_jsonl(root/"prompts.jsonl", [dict(prompt=f"Topic {i}: ") for i in range(6)])
    write_jsonl(root/"ood.jsonl", [dict(prompt=f"Elsewhere {i}? ") for i in range(3)])
    texts = ["good soup", "the bread was very good", "slow", "quite moving in the end",
             "a hard bed"]
    def rewards(i): return [gold("", t) + i*j for j, t in enumerate(texts)]
    write_jsonl(root/"candidates.jsonl",
                [dict(prompt=f"P{i} ", completions=texts, rewards=rewards(i)) for i in range(4)])
    return root


def config_of(world, out, **changes):
    settings = dict(policies={"vcb-gamma0.5": str(world/"policy")}, reference=str(world/"sft"),
                    methods={"vcb-gamma0.5": dict(method="vcb", strength="gamma", value=.5)},
                    prompts=str(world/"prompts.jsonl"), ood_prompts=str(world/"ood.jsonl"),
                    reward=str(world/"reward"), gold="test_evaluate:gold",
                    candidates=str(world/"candidates.jsonl"), output_dir=str(out), n=3,
                    max_new_tokens=6, n_boot=50, device="cpu")
    return EvaluateConfig(**{**settings, **changes})


@pytest.fixture(scope="module", autouse=True)
def judges_importable():
    "`test_evaluate:gold` is a module in this folder."
    import sys
    sys.path.append(str(Path(__file__).parent))
    yield
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    return out, evaluate(config_of(world, out))


def stamps(folder):
    "When each JSON file below a folder was written."
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns
            for p in Path(folder).rglob("*.json*")}


def test_summary_is_complete(evaluated):
    out, summary = evaluated
    assert read_json(out/"summary.json") == json.loads(json.dumps(summary))
    assert list(summary["policies"]) == ["sft", "vcb-gamma0.5"]
    for p in summary["policies"].values():
        assert (out/p["samples"]["test"]/"data").is_dir()
        for split, prompts in (("test", 6), ("ood", 3)):
            found = p["splits"][split]
            assert (found["prompts"] == prompts and found["samples"] == 3*prompts
                    and found["on_policy"])
            for name in ("gold", "reward", "gold_gain", "reward_gain", "kl", "kl_k3", "length",
                         "finished", "distinct_1", "distinct_2", "distinct_3", "distinct_share"):
                assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert summary["policies"]["vcb-gamma0.5"]["method"] == "vcb"
    assert (set(summary["comparisons"]) == {"test", "ood"}
            and set(summary["comparisons"]["test"]) == {"gold", "reward"})


def test_reference_is_at_zero(evaluated):
    """Pitfall 7: the SFT model against itself has log-ratios of exactly 0,
    on samples and on candidates."""
    sft, policy = evaluated[1]["policies"].values()
    assert sft["splits"]["test"]["kl"]["value"] == sft["splits"]["test"]["kl_k3"]["value"] == 0
    assert sft["calibration"]["slope"]["value"] == sft["calibration"]["r2"]["value"] == 0
    assert policy["splits"]["test"]["kl_k3"]["value"] > 0 != policy["calibration"]["slope"]["value"]


def test_gain_is_paired(evaluated):
    """SFT gains exactly nothing; a policy gains the difference of the means,
    known better than either mean."""
    sft, policy = (p["splits"]["test"] for p in evaluated[1]["policies"].values())
    assert sft["gold_gain"] == dict(value=0, low=0, high=0, prompts=6)
    assert policy["gold_gain"]["value"] == pytest.approx(
        policy["gold"]["value"] - sft["gold"]["value"])


def test_numbers_come_from_the_sampled_ids(world, evaluated):
    """Pitfall 27: rewards and log-probabilities are of the ids that were drawn,
    never of re-tokenised text."""
    out, summary = evaluated
    policy = summary["policies"]["vcb-gamma0.5"]
    rows = list(load_rows(str(out/policy["samples"]["test"]/"data")))
    ids = [[r[k] for r in rows] for k in ("prompt_ids", "completion_ids")]
    logps, ref = (score_logps(load_policy(str(world/m)), *ids) for m in ("policy", "sft"))
    k1 = np.mean([np.subtract(a, b).mean() for a, b in zip(logps, ref)])
    assert policy["splits"]["test"]["kl"]["value"] == pytest.approx(k1, abs=1e-5)
    expected = np.mean([[gold(r["prompt"], c) for c in r["completions"]] for r in rows])
    assert policy["splits"]["test"]["gold"]["value"] == pytest.approx(expected)


def test_second_call_computes_nothing(world, evaluated, monkeypatch):
    out, summary = evaluated
    before = stamps(out/"samples")
    monkeypatch.setattr("vcb_nb.evaluate.load_policy", None) # any use would raise
    monkeypatch.setattr("vcb_nb.evaluate.load_judge", None)
    assert evaluate(config_of(world, out)) == summary
    assert stamps(out/"samples") == before


@pytest.mark.parametrize("harm", [
    lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-9]),
    lambda p: p.write_text(json.dumps(json.loads(p.read_text())[1:]))],
    ids=["deleted", "cut", "a row missing"])
def test_killed_call_is_continued(world, evaluated, tmp_path, harm):
    "What is gone or harmed is made again, and only that: the numbers come out the same."
    import shutil
    out, summary = evaluated
    shutil.copytree(out, tmp_path/"again")
    column = next((tmp_path/"again"/"samples").glob("vcb*-test-*/gold-*.json"))
    harm(column)
    (tmp_path/"again"/"summary.json").unlink()
    before = stamps(tmp_path/"again"/"samples")
    again = evaluate(config_of(world, tmp_path/"again"))
    assert again["policies"] == summary["policies"]
    after = stamps(tmp_path/"again"/"samples")
    assert ({k for k in after if after[k] != before.get(k)}
            == {column.relative_to(tmp_path/"again"/"samples").as_posix()})


def test_a_changed_judge_has_another_mark(tmp_path, monkeypatch):
    "Pitfall 11: columns of rewards are stored under the source of their function, not its name."
    monkeypatch.chdir(tmp_path)
    marks, module = [], tmp_path/"changing_judge.py"
    for value in (1., 2., 1.):
        module.write_text(f"def f(prompt, completion): return {value}\n")
        marks.append(source_mark("changing_judge:f"))
    assert marks[0] == marks[2] != marks[1]


def test_changed_policy_is_evaluated_anew(world, evaluated, tmp_path, tiny_tokenizer):
    """Pitfall 11: a folder whose weights changed meets none of its old numbers;
    other policies keep theirs."""
    import shutil
    out, summary = evaluated
    shutil.copytree(out, tmp_path/"out")
    shutil.copytree(world/"policy", tmp_path/"policy")
    save_model(tilted(load_policy(str(world/"policy")), .05), tiny_tokenizer, tmp_path/"policy")
    found = evaluate(config_of(world, tmp_path/"out",
                               policies={"vcb-gamma0.5": str(tmp_path/"policy")}))
    new, old = (s["policies"]["vcb-gamma0.5"]["splits"]["test"] for s in (found, summary))
    assert (new["kl"] != old["kl"]
            and found["policies"]["sft"]["splits"] == summary["policies"]["sft"]["splits"])


def test_no_kl_off_policy(world, tmp_path, caplog):
    "Pitfall 30: KL from samples at another temperature is refused, not reported as if it were one."
    found = evaluate(config_of(world, tmp_path, temperature=.7, ood_prompts=None, reward=None,
                               candidates=None))
    test = found["policies"]["sft"]["splits"]["test"]
    assert test["kl"] is None and test["kl_k3"] is None and not test["on_policy"]
    assert test["gold"]["value"] is not None
    assert "no KL" in caplog.text and found["policies"]["sft"]["calibration"] is None


def test_nan_reward_names_the_row_and_keeps_the_samples(world, tmp_path):
    "Pitfall 25: a reward that is not finite names its prompt; the samples are not lost."
    config = config_of(world, tmp_path, gold="test_evaluate:broken", ood_prompts=None)
    with pytest.raises(InputError, match="candidate 0"): evaluate(config)
    before = {k: v for k, v in stamps(tmp_path).items() if "/data/" in k}
    assert before and evaluate(replace(config, gold="test_evaluate:gold"))
    assert before.items() <= stamps(tmp_path).items()


@pytest.mark.parametrize("changes, said", [
    (dict(reference=""), "reference is not set"), (dict(prompts=""), "prompts is not set"),
    (dict(methods={"vbc-gamma0.5": {}}), "Did you mean 'vcb-gamma0.5'"),
    (dict(policies={"sft": "elsewhere"}, methods={}), "stands for the reference")])
def test_bad_settings_are_named(world, tmp_path, changes, said):
    "Pitfall 10: among them, another model under the reference's name."
    with pytest.raises(InputError, match=said): evaluate(config_of(world, tmp_path, **changes))


def test_other_tokenizer_is_refused(world, tmp_path):
    "Two models that read different ids have no log-ratio."
    other = train_tokenizer(["zzz yyy xxx"]*3, vocab_size=262)
    save_model(new_policy(other, **TINY), other, tmp_path/"other")
    with pytest.raises(InputError, match="different tokenizers"):
        check_same_tokenizer(str(tmp_path/"other"), str(world/"sft"))
    with pytest.raises(InputError, match="different tokenizers"):
        diagnosis(tmp_path/"other", world/"sft", world/"candidates.jsonl", tmp_path/"out")


# ---- diagnose

def diagnosis(policy, reference, candidates, out, **changes):
    places = dict(policy=policy, reference=reference, candidates=candidates, output_dir=out)
    settings = {"n_boot": 50, "device": "cpu", **{k: str(v) for k, v in places.items()}, **changes}
    return diagnose(DiagnoseConfig(**settings))


def test_diagnose_a_model_against_itself(world, tmp_path):
    found = diagnosis(world/"sft", world/"sft", world/"candidates.jsonl", tmp_path)
    assert (found["slope"]["value"] == found["r2"]["value"] == 0
            and found["implied_gamma"]["value"] is None)
    assert (tmp_path/"calibration.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(tmp_path/"diagnose.json") == json.loads(json.dumps(found))
    page = (tmp_path/"diagnose.md").read_text("utf-8")
    assert "| implied γ = 1/slope | – [–, –] |" in page and "calibration.png" in page


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_diagnose_recovers_a_planted_slope(tmp_path, tiny_tokenizer, architecture):
    """Rewards that are the two models' own log-ratios: the line fits exactly,
    and its slope is the pooled σ."""
    model = new_policy(tiny_tokenizer, architecture, seed=0)
    save_model(model, tiny_tokenizer, tmp_path/"sft")
    save_model(tilted(model, .05), tiny_tokenizer, tmp_path/"policy")
    texts = ["good soup", "bad", "the bread was warm", "so"]
    rows = [dict(prompt=f"Topic {i}: ", responses=texts, rewards=[0., 1., 2., 3.])
            for i in range(5)]
    write_jsonl(tmp_path/"flat.jsonl", rows)
    diagnosis(tmp_path/"policy", tmp_path/"sft", tmp_path/"flat.jsonl", tmp_path/"first")
    columns = sorted((tmp_path/"first").glob("candidates-*/logps-*.json"))
    a, b = map(read_json, columns)
    for sign in (1, -1):
        ratios = sign*np.subtract(a, b)
        write_jsonl(tmp_path/"own.jsonl",
                    [{**row, "rewards": r.tolist()} for row, r in zip(rows, ratios)])
        found = diagnosis(tmp_path/"policy", tmp_path/"sft", tmp_path/"own.jsonl",
                          tmp_path/f"second{sign}", sigma="dataset")
        assert found["r2"]["value"] == pytest.approx(1) == abs(found["pearson"]["value"])
        assert abs(found["slope"]["value"]) == pytest.approx(found["sigma"][0], rel=1e-5)


def test_diagnose_an_adapter_folder(world, tmp_path):
    "A LoRA adapter as PEFT saves it, without a tokenizer: it is merged into its base."
    model = add_lora(load_policy(str(world/"sft")),
                     dict(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path/"adapter")
    found = diagnosis(tmp_path/"adapter", world/"sft", world/"candidates.jsonl", tmp_path/"out")
    assert found["slope"]["value"] != 0 and found["candidates"] == 20


def test_diagnose_scores_with_a_judge(world, tmp_path):
    "Candidates without rewards need a judge, and say so."
    write_jsonl(tmp_path/"bare.jsonl", [dict(prompt="P ", completions=["aa", "bbb", "aeb"])])
    places = world/"policy", world/"sft", tmp_path/"bare.jsonl", tmp_path/"out"
    with pytest.raises(InputError, match="no column 'rewards'"): diagnosis(*places)
    found = diagnosis(*places, reward="test_evaluate:gold")
    assert found["sigma"] == [pytest.approx(np.std([1., -1.5, .5], ddof=1))]


def test_diagnose_warns_of_two_candidates(world, tmp_path, caplog):
    "Pitfall 24: two candidates a prompt keep no reward value, unless σ is the data set's."
    rows = [dict(prompt=f"P{i} ", completions=["good", "bad"], rewards=[1., float(i)])
            for i in range(2, 6)]
    write_jsonl(tmp_path/"pairs.jsonl", rows)
    diagnosis(world/"policy", world/"sft", tmp_path/"pairs.jsonl", tmp_path/"a")
    assert "±√2" in caplog.text
    caplog.clear()
    diagnosis(world/"policy", world/"sft", tmp_path/"pairs.jsonl", tmp_path/"b", sigma="dataset")
    assert "±√2" not in caplog.text


def test_foreign_ids_are_made_anew(world, tmp_path, caplog):
    """Pitfall 27: stored ids are used where they are this tokenizer's, and where they are not,
    that is said."""
    rows = [dict(prompt="P ", prompt_ids=[2, 3], completions=["good", "bad soup", "so"],
                 completion_ids=[[9], [8, 7], [6]], finish_reasons=["stop"]*3,
                 rewards=[1., 2., 4.])]
    write_jsonl(tmp_path/"foreign.jsonl", rows)
    plain = [{k: rows[0][k] for k in ("prompt", "completions", "rewards")}]
    write_jsonl(tmp_path/"plain.jsonl", plain)
    found, expected = (diagnosis(world/"policy", world/"sft", tmp_path/f"{name}.jsonl",
                                 tmp_path/name)
                       for name in ("foreign", "plain"))
    assert found["slope"] == expected["slope"] and "tokenised anew" in caplog.text


def test_diagnose_real_candidates(world, shared_data, tmp_path):
    "Summaries with expert scores: ragged rows, real text, rewards on their own scale."
    found = diagnosis(world/"policy", world/"sft", shared_data/"scored_summeval"/"dev.jsonl.gz",
                      tmp_path, limit=4, max_prompt_length=48, max_new_tokens=48)
    assert (found["slope"]["prompts"] == 4 and found["candidates"] > 40
            and 0 <= found["r2"]["value"] <= 1)


# ---- figures

def drawn(fig):
    "Every visible panel of a figure has both axes named; then it becomes a PNG."
    for ax in fig.axes:
        if ax.get_visible() and ax.get_label() != "<colorbar>":
            assert ax.get_xlabel() or ax.get_yticklabels()
    assert figures.figure_bytes(fig).startswith(b"\x89PNG")


def test_every_figure_draws_a_real_summary(evaluated):
    summary = evaluated[1]
    for split, judge in (("test", "gold"), ("ood", "reward")):
        drawn(figures.plot_frontier(summary, split, judge, sigma=1.))
        drawn(figures.plot_margins(summary, "sft", judge, split))
        drawn(figures.plot_win_matrix(summary, judge, split))
    for plot in (figures.plot_calibration, figures.plot_rewards, figures.plot_samples):
        drawn(plot(summary))
    assert not plt.get_fignums(), "figures that were turned into bytes are closed"


def test_calibration_panel_names_slope_and_target(evaluated):
    fig = figures.plot_calibration(evaluated[1], ["vcb-gamma0.5"])
    ax = fig.axes[0]
    slope = evaluated[1]["policies"]["vcb-gamma0.5"]["calibration"]["slope"]["value"]
    assert ax.get_title(loc="left").startswith(f"VCB γ=0.5\nslope {slope:.2f}, R²")
    fit, target = ax.get_lines()
    assert np.ptp(target.get_ydata())/np.ptp(target.get_xdata()) == pytest.approx(2)
    plt.close(fig)


def test_training_curves_skip_what_is_absent():
    logs = {"vcb": [dict(step=1, loss=2.), dict(step=2, loss=1.), dict(train_loss=1.5, step=2)],
            "dpo": [dict(step=1, loss=.7)]}
    fig = figures.plot_training_curves(logs)
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss"]
    plt.close(fig)
