"Evaluation: the whole stage on tiny models, and its figures."
import json, math, re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from vcb_nb import figures
from vcb_nb.artifacts import InputError, read_json, write_jsonl
from vcb_nb.data import load_rows
from vcb_nb.evaluate import EvaluateConfig, compare, evaluate, frontier, source_mark
from vcb_nb.loading import load_policy, new_reward_model
from vcb_nb.logprobs import score_logps
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def test_compare_is_antisymmetric():
    rng = np.random.default_rng(0)
    games = compare({k: rng.normal(size=(20, 3)) for k in "abc"}, n_boot=100)
    assert games["a"]["b"]["margin"]["value"] == pytest.approx(-games["b"]["a"]["margin"]["value"])
    shares = [[g[k] for k in ("win", "tie", "lose")] for row in games.values()
              for g in row.values()]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1)
    assert "a" not in games["a"]


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
    assert sft["calibration"]["slope"]["value"] == sft["calibration"]["pearson"]["value"] == 0
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
    monkeypatch.setattr("vcb_nb.evaluate.PolicyJudge", None) # any use would raise
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


def test_a_callable_is_a_judge(world, evaluated, tmp_path):
    "The same numbers as by its name, which the summary records; each text is asked for once."
    _, summary = evaluated
    asked = []
    def counted(prompt, completion):
        asked.append((prompt, completion))
        return gold(prompt, completion)
    found = evaluate(replace(config_of(world, tmp_path/"out"), gold=counted, workers=4))
    assert found["comparisons"]["test"]["gold"] == summary["comparisons"]["test"]["gold"]
    assert found["settings"]["gold"].endswith("counted") and len(asked) == len({*asked})


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


def test_prompts_that_are_cut_are_told_of_once_per_file(world, tmp_path, caplog):
    "Not once more for each policy."
    found = evaluate(config_of(world, tmp_path, max_prompt_length=2, reward=None, candidates=None))
    assert len(found["policies"]) == 2
    said = [r.getMessage() for r in caplog.records if "lose their start" in r.getMessage()]
    assert len(said) == 2 and "prompts.jsonl: 6 of 6 prompts" in said[0] and "ood.jsonl" in said[1]


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


# ---- figures

def drawn(fig):
    "Every visible panel of a figure has both axes named; then it becomes a PNG."
    for ax in fig.axes:
        if ax.get_visible() and ax.get_label() != "<colorbar>":
            assert ax.get_xlabel() or ax.get_yticklabels()
    assert figures.figure_bytes(fig).startswith(b"\x89PNG")


def test_every_figure_draws_a_real_summary(evaluated):
    summary, open_before = evaluated[1], plt.get_fignums()
    for split, judge in (("test", "gold"), ("ood", "reward")):
        drawn(figures.plot_frontier(summary, split, judge, sigma=1.))
        drawn(figures.plot_margins(summary, "sft", judge, split))
        drawn(figures.plot_win_matrix(summary, judge, split))
    for plot in (figures.plot_calibration, figures.plot_rewards, figures.plot_samples):
        drawn(plot(summary))
    drawn(figures.plot_gaps(summary, list(summary["policies"])))
    assert plt.get_fignums() == open_before, "figures that were turned into bytes are closed"


def test_one_prompt_has_no_interval(world, tmp_path):
    "Null in the summary, a dash in the report's tables, no bar in its figures."
    from vcb_nb.report import methods_table, policies_table, policy_blocks, render_html
    summary = evaluate(config_of(world, tmp_path/"evaluate", limit=1))
    policy = summary["policies"]["vcb-gamma0.5"]
    for found in (policy["splits"]["test"]["gold"], policy["splits"]["test"]["kl"],
                  policy["calibration"]["slope"],
                  summary["comparisons"]["test"]["gold"]["sft"]["vcb-gamma0.5"]["margin"]):
        assert found["low"] is None and found["high"] is None and math.isfinite(found["value"])
    assert "[–]" in str(policies_table(summary).rows)
    both = [methods_table(summary), *policy_blocks(summary)]
    assert "nan" not in re.sub("data:[^\"]*", "", render_html("t", both)).lower()
    test_every_figure_draws_a_real_summary((None, summary))


def test_calibration_panel_names_slope_and_target(evaluated):
    fig = figures.plot_calibration(evaluated[1], ["vcb-gamma0.5"])
    ax = fig.axes[0]
    slope = evaluated[1]["policies"]["vcb-gamma0.5"]["calibration"]["slope"]["value"]
    assert ax.get_title(loc="left").startswith(f"VCB γ=0.5\nslope {slope:.2f}, correlation")
    fit, target = ax.get_lines()
    assert np.ptp(target.get_ydata())/np.ptp(target.get_xdata()) == pytest.approx(2)
    plt.close(fig)


def test_training_curves_skip_what_is_absent():
    logs = {"vcb": [dict(step=1, loss=2.), dict(step=2, loss=1.), dict(train_loss=1.5, step=2)],
            "dpo": [dict(step=1, loss=.7)]}
    fig = figures.plot_training_curves(logs)
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss"]
    plt.close(fig)
