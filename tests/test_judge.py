"""The stage judge: oracles with a known truth, a recipe with it, and grades as rewards of `score`.
Without the client nothing here can ask, so all of it is skipped."""
import json, os
from pathlib import Path

import numpy as np
import pytest

from bad_inputs import build_world
from judge_server import always_first, by_length, coin, judge_server, longer
from vcb_nb.artifacts import InputError, read_json, write_jsonl
from vcb_nb.cli import main
from vcb_nb.data import load_candidates
from vcb_nb.judge import JudgeConfig, PointwiseJudge, judge, opponents, pairs_of, read_policies
from vcb_nb.pipeline import find_problems, plan, plan_states, run_recipe
from vcb_nb.recipes import check_recipe
from vcb_nb.score import ScoreConfig, score
from vcb_nb.settings import function_key
from vcb_nb.verdicts import pair_verdict

SHORT = dict(n=3, max_prompt_length=40, max_new_tokens=6)
QUICK = dict(n_boot=50, timeout=20., retries=2, backoff=.01, model="m")


@pytest.fixture(autouse=True)
def client(monkeypatch):
    pytest.importorskip("openai", reason="needs the client: pip install vcb-nb[judge]")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def candidates(folder, name, lengths, prompts=None, rewards=None):
    "One file of one policy: responses of so many letters; {name} makes texts differ."
    rows = [dict(prompt=f"Question {i}?" if prompts is None else prompts[i],
                 completions=[name + "x" * (n - 1)]) for i, n in enumerate(lengths)]
    for row, value in zip(rows, rewards or ()): row["rewards"] = [value]
    return str(write_jsonl(folder/f"{name}.jsonl", rows))


@pytest.fixture
def two(tmp_path):
    "Two policies whose lengths differ at random: 40 prompts."
    rng = np.random.default_rng(0)
    return {name: candidates(tmp_path, name, rng.integers(1, 30, 40)) for name in "ab"}


def config(server, folder, responses, **settings):
    return JudgeConfig(**{**QUICK, "base_url": server.url, "responses": responses,
                          "output_dir": str(folder/"judge"), **settings})


def games_of(folder): return [json.loads(line) for line in
                              (folder/"judge"/"games.jsonl").read_text("utf-8").splitlines()]


# --- truths

def test_a_judge_of_length_is_seen_through(two, tmp_path):
    "Its verdicts are the sign of the difference of lengths, in both orders; at equal length, ½."
    with judge_server(longer) as server: found = judge(config(server, tmp_path, two))
    result, games = found["comparisons"][0], games_of(tmp_path)
    lengths = [[len(row["completions"][0]) for row in load_candidates(two[p])] for p in "ba"]
    signs = [int(np.sign(b - a)) for b, a in zip(*lengths)]
    assert [{"win": 1, "tie": 0, "lose": -1}[g["verdict"]] for g in games] == signs
    assert (result["policy"], result["against"]) == ("b", "a")
    assert result["margin"]["value"] == pytest.approx(np.mean(signs))
    assert found["position_bias"]["value"] == 0 and found["agreement"]["value"] == 1
    assert result["length_controlled"]["low"] < .5 < result["length_controlled"]["high"]
    assert len(server.asked) == 80 == found["read"]["strict"] and found["no_verdict"] == 0


def test_a_judge_of_the_first_place_gives_no_win(two, tmp_path):
    with judge_server(always_first) as server: found = judge(config(server, tmp_path, two))
    (result,) = found["comparisons"]
    assert result["undecided"] == 40 and result["win"] == result["lose"] == result["tie"] == 0
    assert result["margin"]["value"] == 0 and found["position_bias"]["value"] == .5
    assert found["agreement"]["value"] == 0


def test_a_judge_without_reason_agrees_with_itself_by_chance(two, tmp_path):
    "Each verdict is what its two coins say; they agree in ½, within four standard errors."
    rule = coin(7)
    with judge_server(rule) as server: found = judge(config(server, tmp_path, two))
    def tossed(a, b): return json.loads(rule(a, b))["choice"]
    for game in games_of(tmp_path):
        a, b = game["texts"]
        assert game["verdict"] == pair_verdict(tossed(a, b), tossed(b, a))
    assert abs(found["agreement"]["value"] - .5) < 4 * .5 / 40**.5
    assert abs(found["position_bias"]["value"]) < 4 * .5 / 80**.5


def test_gold_and_judge_are_compared(tmp_path):
    "Given rewards stand for gold: a judge of length agrees exactly where the longer has more."
    responses = {"a": candidates(tmp_path, "a", [5] * 10, rewards=[0.] * 10),
                 "b": candidates(tmp_path, "b", [9] * 6 + [2] * 4, rewards=[1.] * 3 + [-1.] * 7)}
    with judge_server(longer) as server: found = judge(config(server, tmp_path, responses))
    assert found["agrees_with"]["gold"]["value"] == .7 and found["agrees_with"]["gold"]["n"] == 10


def test_refusals_are_counted_and_are_no_ties(two, tmp_path):
    "Every fourth answer is none, in one way or another: the rest is judged as before."
    ways = ["refusal", "filter", "length", "prose", "400"]
    def fault(number, before): return ways[number // 4 % 5] if number % 4 == 0 else None
    with judge_server(longer, fault) as server: found = judge(config(server, tmp_path, two))
    (result,) = found["comparisons"]
    assert found["read"] == dict(strict=60, refusal=4, content_filter=4, unreadable=4, rejected=4,
                                 **{"cut off": 4})
    assert result["no_verdict"] == sum(None in g["choices"] for g in games_of(tmp_path)) > 0
    with judge_server(longer) as server: whole = judge(config(server, tmp_path/"w", two))
    truth = {g["prompt"]: g["verdict"] for g in games_of(tmp_path/"w")}
    judged = {g["prompt"]: g["verdict"] for g in games_of(tmp_path) if g["verdict"]}
    assert judged.items() <= truth.items() and len(judged) == 40 - result["no_verdict"]
    assert result["tie"] <= whole["comparisons"][0]["tie"]


@pytest.mark.parametrize("rule, how", [(lambda **_: "Hm.", "unreadable"),
                                       (lambda **_: '{"choice": "neither"}', "unreadable")])
def test_a_judge_that_never_answers_gives_no_summary(rule, how, two, tmp_path):
    with judge_server(rule) as server, pytest.raises(InputError, match=f"no verdict.*{how}"):
        judge(config(server, tmp_path, two))
    assert not (tmp_path/"judge"/"summary.json").exists()


def test_an_outage_leaves_no_summary_and_the_rest_is_asked_later(two, tmp_path):
    with judge_server(longer, lambda number, before: "503" if number > 31 else None) as server:
        settings = config(server, tmp_path, two, workers=1)
        with pytest.raises(InputError, match="31 of 80 questions were answered"): judge(settings)
        assert not (tmp_path/"judge"/"summary.json").exists()
        begun, server.fault = len(server.asked), lambda number, before: None
        found = judge(settings)
        assert len(server.asked) - begun == 80 - 31 and found["no_verdict"] == 0


def test_equal_texts_are_a_tie_that_nobody_is_asked_about(tmp_path):
    rows = [dict(prompt="Q?", completions=["same"]), dict(prompt="R?", completions=["other"])]
    a, b = (str(write_jsonl(tmp_path/f"{n}.jsonl", rows)) for n in "ab")
    write_jsonl(tmp_path/"b.jsonl", [rows[0], dict(rows[1], completions=["another"])])
    with judge_server(longer) as server: found = judge(config(server, tmp_path, {"a": a, "b": b}))
    (result,) = found["comparisons"]
    assert (result["identical"], result["tie"], result["win"]) == (1, 1, 1)
    assert len(server.asked) == 2 and found["agreement"]["n"] == 1


# --- who meets whom

def policies(**samples):
    return {name: [dict(prompt="Q?", completions=list(texts), rewards={})]
            for name, texts in samples.items()}


def meetings(names, *against):
    settings = JudgeConfig(base_url="http://h/v1", model="m", responses={"x": "y"},
                           against=list(against))
    return opponents(settings, dict.fromkeys(names))


def test_every_policy_meets_each_opponent_once():
    assert meetings(["a", "sft", "b"]) == [("a", "sft"), ("b", "sft")]
    assert meetings(["a", "b", "c"]) == [("b", "a"), ("c", "a")]
    assert sorted(map(sorted, meetings("abc", *"abc"))) == [["a", "b"], ["a", "c"], ["b", "c"]]
    with pytest.raises(InputError, match="Did you mean 'sft'"): meetings(["a", "sft"], "stf")


def test_samples_of_one_number_are_not_paired():
    "They were drawn with the same random numbers."
    found = pairs_of(policies(a="pqr", b="xyz"), "a", "b", games=9)
    assert [g["texts"] for g in found] == [["p", "y"], ["q", "z"], ["r", "x"]]
    (alone,) = pairs_of(policies(a="p", b="x"), "a", "b", games=1)
    assert alone["texts"] == ["p", "x"]


def test_other_prompts_are_refused(tmp_path):
    responses = {"a": candidates(tmp_path, "a", [3, 4]),
                 "b": candidates(tmp_path, "b", [3, 4], prompts=["Question 0?", "Mine?"])}
    base = dict(base_url="http://h/v1", model="m")
    with pytest.raises(InputError, match="Row 1: 'b' answers 'Mine"):
        read_policies(JudgeConfig(**base, responses=responses))
    responses["b"] = candidates(tmp_path, "b", [3])
    with pytest.raises(InputError, match="'b' has 1 rows, 'a' 2"):
        read_policies(JudgeConfig(**base, responses=responses))
    for given in ({}, dict(responses=responses, evaluation="x")):
        with pytest.raises(InputError, match="evaluation and responses are"):
            JudgeConfig(**base, **given)
    with pytest.raises(InputError, match="no summary.json"):
        read_policies(JudgeConfig(**base, evaluation=str(tmp_path)))


# --- in a recipe

@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer):
    return build_world(tmp_path_factory.mktemp("world"), tiny_tokenizer)


def recipe(world, folder, server, **judging):
    policy, prompts = str(world["policy"]), str(world["prompts"])
    settings = {**QUICK, "base_url": server.url, "games": 2, **judging}
    return check_recipe({"name": "t", "seed": 0, "output_dir": str(folder), "model": policy,
                         "evaluate": {"n_boot": 20, "prompts": prompts, "gold": "bad_inputs:length",
                                      "policies": {"again": policy}, **SHORT},
                         "judge": settings, "report": {}})


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    "A recipe with a judge that prefers what gold prefers, run to its report."
    pytest.importorskip("openai", reason="needs the client: pip install vcb-nb[judge]")
    folder = tmp_path_factory.mktemp("judged")
    with judge_server(longer) as server:
        states = run_recipe(recipe(world, folder, server))
        yield folder, server, states


def test_a_recipe_judges_what_it_has_evaluated(judged):
    "Gold is length here, and so is the judge's rule: they agree wherever both decide."
    folder, server, states = judged
    assert list(states) == ["evaluate", "judge", "report"]
    found, asked = read_json(folder/"judge"/"summary.json"), len(server.asked)
    (result,) = found["comparisons"]
    assert (result["policy"], result["against"], result["pairs"]) == ("again", "sft", 8)
    gold = found["agrees_with"]["gold"]
    assert gold["value"] == 1 and gold["n"] == result["win"] + result["lose"] > 0
    assert asked == 2 * (8 - result["identical"]) and (folder/"answers"/"answers.jsonl").exists()
    for game in games_of(folder):
        assert game["rewards"]["gold"] == [float(n) for n in game["lengths"]]
        if not game["identical"]: assert game["verdict"] == pair_verdict(*game["choices"])


def test_the_report_shows_the_judge_and_its_faults(judged):
    folder, _, _ = judged
    page = (folder/"report"/"report.md").read_text("utf-8")
    assert "## Judge" in page and "| again | SFT | 8 |" in page
    assert "Position bias 0%" in page and "what the gold reward prefers in 100%" in page


def test_a_changed_interval_costs_nothing(judged, world):
    "The stage is made again, from the answers: they lie beside it. A changed address is no change."
    folder, server, _ = judged
    asked = len(server.asked)
    moved = recipe(world, folder, server, base_url="http://localhost:1/v1", workers=1, retries=0)
    assert plan_states(plan(moved))["judge"][0] == "done"
    again = recipe(world, folder, server, n_boot=60)
    with pytest.raises(InputError, match="n_boot: 50 → 60"): run_recipe(again)
    assert run_recipe(again, redo=True)["judge"] == "stale" and len(server.asked) == asked


def test_another_template_is_another_result(judged, world, tmp_path):
    folder, server, _ = judged
    mine = tmp_path/"mine.txt"
    for text, state in (("{prompt}{first}{second}", "stale"), ("{prompt}{second}{first}", "stale")):
        mine.write_text(text)
        jobs = plan(recipe(world, folder, server, template=str(mine)))
        assert plan_states(jobs)["judge"][0] == state
    keys = [plan(recipe(world, folder, server, template=name))[1].key()["inputs"]["template"]
            for name in ("dialogue", "summary")]
    assert keys[0] != keys[1]


def test_from_the_command_line(judged, tmp_path, capsys):
    folder, server, _ = judged
    options = {"evaluation": folder/"evaluate", "base_url": server.url, "model": "m", "n_boot": 20,
               "output_dir": tmp_path/"j", "template": "summary", "against": "again"}
    command = ["judge", *(str(w) for k, v in options.items() for w in (f"--{k}", v))]
    assert main(command) == 0
    found = read_json(tmp_path/"j"/"summary.json")
    assert found["comparisons"][0]["against"] == "again" and found["template"] == "judge_summary"
    assert main(["judge", "--help"]) == 0 and "--max_cost" in capsys.readouterr().out


# --- before it begins

def problems(recipe):
    jobs = plan(recipe)
    return " ".join(find_problems(jobs, plan_states(jobs)).get("judge", []))


def test_what_is_wrong_is_known_before(judged, world, tmp_path, monkeypatch):
    folder, server, _ = judged
    def found(run=folder, **settings):
        return problems(recipe(world, run, server, model="other", **settings))
    assert found() == ""
    elsewhere = dict(base_url="https://example.com/v1")
    assert "no OPENAI_API_KEY" in found(**elsewhere) and "no OPENAI_API_KEY" in found(
        tmp_path, **elsewhere)
    assert "may take the bill to" in found(price_in=1., price_out=1., max_cost=1e-9)
    assert "against names 'stf'" in found(against=["stf"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install vcb-nb[judge]" in found(tmp_path)


def test_whether_anybody_answers_is_asked_when_it_is_the_next(judged, world, tmp_path):
    "Before the evaluation, the server may not have been started yet."
    folder, _, _ = judged
    with judge_server() as gone: pass
    assert "does not answer" in problems(recipe(world, folder, gone, model="other"))
    assert problems(recipe(world, tmp_path, gone)) == ""
    with judge_server(lists_models=False) as server: # not every endpoint has that page
        assert problems(recipe(world, folder, server, model="other")) == ""


# --- grades

GRADER = '''
from vcb_nb.judge import PointwiseJudge
grade = PointwiseJudge("{url}", "grader", cache="{cache}", workers=2)
'''


def test_grades_are_the_rewards_of_score(tmp_path, monkeypatch):
    "Through the command line, with a judge in a file; an interrupted run resumes from its answers."
    rows = [dict(prompt=f"Q{i}?", completions=["x" * k for k in (i + 1, i + 3)]) for i in range(4)]
    write_jsonl(tmp_path/"candidates.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    with judge_server(by_length, lambda n, before: "401" if n > 3 else None) as server:
        Path("grader.py").write_text(GRADER.format(url=server.url, cache="kept"))
        command = ["score", "--candidates", "candidates.jsonl", "--reward", "grader.py:grade",
                   "--output_dir", "scored"]
        assert main(command) != 0
        begun, server.fault = len(server.asked), lambda n, before: None
        assert main(command) == 0
        texts = {t for row in rows for t in [(row["prompt"], c) for c in row["completions"]]}
        assert len(server.asked) - begun <= len(texts) - 3
    scored = load_candidates("scored")
    assert scored["rewards"][:] == [[1. + len(c) % 10 for c in row["completions"]] for row in rows]


def test_a_response_without_a_grade_stops_the_stage(tmp_path):
    "No number is made up for it."
    source = write_jsonl(tmp_path/"c.jsonl", [dict(prompt="Q?", completions=["a", "b"])])
    with judge_server(lambda **_: "seven") as server:
        grade = PointwiseJudge(server.url, "m", cache=None)
        with pytest.raises(InputError, match="gave no grade for a response to 'Q\\?'"):
            score(ScoreConfig(str(source), str(tmp_path/"s"), reward=grade))
    assert not list((tmp_path/"s"/"data").glob("*"))


def test_a_judge_is_known_by_what_decides_its_grades(tmp_path):
    mine = tmp_path/"mine.txt"
    mine.write_text("{prompt} {response}")
    def key(**settings):
        base = {"base_url": "http://a/v1", "model": "m", "cache": None}
        return function_key(PointwiseJudge(**{**base, **settings}))
    assert key() == key(base_url="http://b/v1", workers=7, cache=str(tmp_path))
    keys = [key(), key(model="n"), key(template="summary"), key(temperature=1.),
            key(template=str(mine))]
    mine.write_text("{prompt}\n{response}")
    assert len({*keys, key(template=str(mine))}) == 6


def test_the_file_of_a_template_counts_where_a_judge_has_a_name(tmp_path, monkeypatch):
    "A judge in a file reads its template from another: an edit of either is noticed."
    monkeypatch.chdir(tmp_path)
    source = GRADER.format(url="http://a/v1", cache="kept")
    keys = []
    for folder, text in (("one", "{prompt} {response}"), ("two", "{prompt}\n{response}"),
                         ("three", "{prompt}\n{response}")):
        (tmp_path/"mine.txt").write_text(text)
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"g.py").write_text(source.replace("workers=2", "template='mine.txt'"))
        keys.append(function_key(f"{folder}/g.py:grade"))
    assert keys[0] != keys[1] == keys[2]


# --- a real server

REAL = os.environ.get("VCB_JUDGE_URL")


@pytest.mark.skipif(not REAL, reason="set VCB_JUDGE_URL (and VCB_JUDGE_MODEL) to a running "
                                     "`vllm serve` or `transformers serve`")
def test_a_real_server(two, tmp_path):
    "The plumbing: every pair is asked in both orders, tokens are counted, nothing is asked twice."
    settings = dict(QUICK, model=os.environ.get("VCB_JUDGE_MODEL", "m"), base_url=REAL, limit=4,
                    responses=two, output_dir=str(tmp_path/"judge"), max_tokens=16, timeout=300.)
    found = judge(JudgeConfig(**settings))
    assert found["pairs"] == 4 and sum(found["read"].values()) == 8 and found["failures"] == {}
    assert found["tokens"]["sent"] > 8 * 150 and 0 < found["tokens"]["received"] <= 8 * 16
    assert found["estimated"] == 0
    assert judge(JudgeConfig(**dict(settings, base_url="http://127.0.0.1:1/v1"))) == found
