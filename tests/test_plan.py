"""A plan knows what can be known: recipes that lack a section work from start to report, and
whatever would fail later is said before anything runs."""
import tempfile
from pathlib import Path

import pytest

from bad_inputs import PROMPTS, TRAINING, build_world
from vcb_nb.artifacts import InputError, read_json, read_manifest, write_jsonl
from vcb_nb.cli import main
from vcb_nb.loading import load_policy
from vcb_nb.pipeline import find_problems, plan, plan_states, run_recipe
from vcb_nb.recipes import check_recipe, save_recipe

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=96)
LENGTHS = dict(max_prompt_length=40, max_length=64)
SHORT = dict(n=3, max_prompt_length=40, max_new_tokens=4)
CALIBRATE = {**TRAINING, "methods": {"vcb": {}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer):
    return build_world(tmp_path_factory.mktemp("world"), tiny_tokenizer)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "Preference pairs with forty different prompts."
    rows = [dict(prompt=f"{i} {PROMPTS[i % 4]}", chosen=" good", rejected=" bad")
            for i in range(40)]
    return str(write_jsonl(tmp_path_factory.mktemp("pairs")/"pairs.jsonl", rows))


def recipe(folder, **sections):
    return check_recipe({"name": "t", "seed": 0, "output_dir": str(folder), **sections})


def judged(path): return dict(n_boot=20, prompts=str(path), **SHORT)


def partial_recipes(world, pairs):
    "Recipes that lack a section, each with the jobs that it makes."
    policy, prompts, scored = (str(world[name]) for name in ("policy", "prompts", "scored"))
    score = {"reward": "bad_inputs:length"}
    held_out = ["sample", "sample_validation", "score", "score_validation"]
    sizes = dict(demonstrations=20, pairs=20, pairs_test=4, prompts=4, validation=3, test=3, ood=0)
    evaluate = {k: v for k, v in judged("").items() if k != "prompts"}
    return {
        "no data": (dict(model=policy, sample={"prompts": prompts, **SHORT}, score=score,
                         calibrate=CALIBRATE, evaluate=judged(prompts), report={}),
                    [*held_out, "calibrate/vcb", "evaluate", "report"]),
        "candidates only": (dict(model=policy, score={"candidates": scored}, calibrate=CALIBRATE,
                                 report={}), ["score", "calibrate/vcb", "report"]),
        "candidates and a judge": (dict(
            calibrate={"candidates": scored, "model": policy, **CALIBRATE},
            evaluate={**judged(prompts), "gold": "bad_inputs:length"}, report={}),
            ["calibrate/vcb", "evaluate", "report"]),
        "no sft, no reward, no prompts of another domain": (dict(
            model=policy, data={"world": sizes}, sample=SHORT, score={}, calibrate=CALIBRATE,
            evaluate=evaluate, report={}),
            ["data", *held_out, "calibrate/vcb", "evaluate", "report"]),
        "pairs, and no prompts of another domain": (dict(
            data={"pairs": [pairs], "test_share": .3, "validation_share": .2},
            tokenizer={"vocab_size": 300}, sft={"model_config": TINY, **LENGTHS, **TRAINING},
            reward={**LENGTHS, **TRAINING}, sample=SHORT, score={}, calibrate=CALIBRATE,
            evaluate=evaluate, report={}),
            ["data", "tokenizer", "sft", "reward", *held_out, "calibrate/vcb", "evaluate",
             "report"])}


NAMES = list(partial_recipes(dict.fromkeys(
    ("policy", "prompts", "scored")), ""))


@pytest.mark.parametrize("name", NAMES)
def test_recipes_that_lack_a_section_run_to_the_report(name, world, pairs, tmp_path):
    sections, jobs = partial_recipes(world, pairs)[name]
    states = run_recipe(recipe(tmp_path, **sections))
    assert list(states) == jobs and set(states.values()) == {"new"}
    assert (tmp_path/"report"/"index.html").exists()
    if "evaluate" in jobs:
        found = read_json(tmp_path/"evaluate"/"summary.json")["policies"]["vcb"]
        assert set(found["splits"]) == {"test"}
        assert bool(found["calibration"]) == ("sample" in jobs)
    assert set(run_recipe(recipe(tmp_path, **sections)).values()) == {"done"}


def test_the_model_is_named_once(world, tmp_path):
    "At the top level it is the policy of every stage, and any stage may still name another."
    names = dict(sample={"prompts": "p.jsonl"}, score={"reward": "bad_inputs:length"},
                 reward={"pairs": "x.jsonl"}, calibrate={}, evaluate={"prompts": "p.jsonl"})
    keys = {"sample": "policy", "score": "reference", "reward": "model", "calibrate/vcb": "model",
            "evaluate": "reference"}
    def models(**top):
        jobs = {job.name: job for job in plan(recipe(tmp_path, **{**names, **top}))}
        return {getattr(jobs[name].config, key) for name, key in keys.items()}
    assert models(model="mine") == {"mine"}
    assert models(sample={"prompts": "p.jsonl", "policy": "mine"}) == {"mine"}
    assert models(model="mine", calibrate={"model": "other"}) == {"mine", "other"}
    assert models(model="mine", sft={"data": "d.jsonl"}) == {str(tmp_path/"sft"/"model")}
    sft, = plan(recipe(tmp_path, model="mine", sft={"data": "d.jsonl"}))
    assert sft.config.model == "mine"


def test_a_named_model_has_its_own_tokenizer(tmp_path):
    with pytest.raises(InputError, match="model is 'mine'.*section tokenizer.*Leave one"):
        recipe(tmp_path, model="mine", tokenizer={})


def test_no_model_is_picked_by_the_prompts_that_measure_it(world, pairs, tmp_path):
    "Without `data` there are no other prompts, so rows of the training are held out or none."
    sections = partial_recipes(world, pairs)["no data"][0]
    def trained(**settings):
        made = plan(recipe(tmp_path, **sections, **settings))
        return next(job for job in made if job.stage.name == "calibrate")
    assert trained().config.eval_candidates is None
    with_data = {**sections, "data": {"world": {"ood": 0}}, "model": sections["model"]}
    sections = {k: v for k, v in with_data.items() if k != "evaluate"}
    assert trained().config.eval_candidates == str(tmp_path/"score_validation"/"data")


# ---- what can be known is said before anything runs

def late_faults(world, pairs, folder):
    """Recipes whose first stages are right, with the job that could not start and what is said.
    Each of them is found today by a stage of its own only."""
    policy, prompts, scored = (str(world[name]) for name in ("policy", "prompts", "scored"))
    ids = write_jsonl(folder/"no_prompt.jsonl", [{"text": "a"}])
    empty = write_jsonl(folder/"empty.jsonl", [])
    chats = write_jsonl(folder/"chats.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    unscored = write_jsonl(folder/"n_best.jsonl", [{"prompt": "a", "completions": [" b", " c"]}])
    right = dict(model=policy, sample={"prompts": prompts, **SHORT},
                 score={"reward": "bad_inputs:length"}, calibrate=CALIBRATE,
                 evaluate=judged(prompts))
    def last(**settings): return {**right, "evaluate": {**right["evaluate"], **settings}}
    def calibrate(**settings): return {**right, "calibrate": {**CALIBRATE, **settings}}
    return {
        "missing prompts": (last(prompts="nowhere.jsonl"), "sample_validation", "nowhere.jsonl"),
        "strings for a tokenizer without a template": (
            {**right, "sample": {**right["sample"], "apply_chat_template": True}}, "sample",
            "the tokenizer has no chat template"),
        "messages for a tokenizer without a template": (
            {**right, "sample": {**right["sample"], "prompts": str(chats)}}, "sample",
            "the tokenizer has no chat template"),
        "empty prompts": (last(ood_prompts=str(empty)), "evaluate", "empty.jsonl: no rows"),
        "a column is missing": (last(ood_prompts=str(ids)), "evaluate", "no column 'prompt'"),
        "missing judge": (last(gold="nobody/judge/model"), "evaluate", "nobody/judge/model"),
        "missing policy": (last(policies={"x": "no/such/model"}), "evaluate", "no/such/model"),
        "held-out candidates without rewards": (calibrate(eval_candidates=str(unscored)),
                                                "calibrate/vcb", "no column 'rewards'"),
        "no reference log-probabilities": (
            dict(model=policy, score={"candidates": scored, "reference": None},
                 calibrate=CALIBRATE), "calibrate/vcb", "will have no column 'ref_logps'"),
        "longer than the model reads": (last(max_new_tokens=200), "evaluate",
                                        "max_new_tokens is 200, but the model reads at most 96"),
        "longer than the model to be trained reads": (
            dict(data={"pairs": [pairs], "test_share": .3, "validation_share": .2},
                 tokenizer={"vocab_size": 300},
                 sft={"model_config": TINY, **LENGTHS, **TRAINING},
                 sample={**SHORT, "max_new_tokens": 97}, score={"reward": "bad_inputs:length"}),
            "sample", "max_new_tokens is 97, but the model reads at most 96"),
        "an empty split": (dict(data={"pairs": [pairs], "test_share": 1e-9, "validation_share": .2},
                                tokenizer={}), "data", "'pairs_test' came out empty"),
        "an optimizer's package": (calibrate(optim="galore_adamw", optim_target_modules=["x"]),
                                   "calibrate/vcb", "galore"),
        "a reporter's package": (calibrate(report_to="comet_ml"), "calibrate/vcb", "comet"),
        "no policy": ({"sample": {"prompts": prompts}}, "sample", "Name the model at the top"),
        "no prompts": ({**right, "evaluate": SHORT}, "evaluate",
                       "Give evaluate.prompts, or the section data"),
        "no candidates": (dict(model=policy, calibrate=CALIBRATE), "calibrate/vcb",
                          "candidates is not set")}


FAULTS = list(late_faults(dict.fromkeys(("policy", "prompts", "scored")), "",
                          Path(tempfile.mkdtemp())))


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_fails_late(name, world, pairs, tmp_path):
    "No stage has run, the job that cannot start is named, and each sentence stands alone."
    sections, job, words = late_faults(world, pairs, tmp_path)[name]
    with pytest.raises(InputError) as error: run_recipe(recipe(tmp_path/"run", **sections))
    said = [line for line in error.value.problems if line.startswith(job)]
    assert any(words in line for line in said), error.value.problems
    assert not list((tmp_path/"run").rglob("pending.json"))
    assert not list((tmp_path/"run").rglob("manifest.json"))


def write_recipe(folder, **sections):
    return str(save_recipe({"output_dir": str(folder/"run"), **sections}, folder/"r.yaml"))


def test_all_problems_are_said_together(world, tmp_path, capsys):
    "One line each on standard error, status 2, a table that marks the jobs, and nothing written."
    path = write_recipe(tmp_path, model=str(world["policy"]), sample={
        "prompts": "nowhere.jsonl", **SHORT}, score={"reward": "no/judge/model"}, report={})
    for words in (["--plan"], []):
        status = main(["run", path, *words])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("vcb: ")]
        assert status == 2 and len(lines) == 2 and not list(tmp_path.rglob("manifest.json"))
        assert "vcb: sample: nowhere.jsonl" in lines[0] and "vcb: score: no/judge" in lines[1]
        table = {line.split()[0]: line for line in out.splitlines()}
        if words: assert [name for name in table if "cannot start" in table[name]] == [
            "sample", "score"]


def test_a_plan_without_problems_ends_with_0(world, tmp_path, capsys):
    path = write_recipe(tmp_path, model=str(world["policy"]), sample={
        "prompts": str(world["prompts"]), **SHORT})
    assert main(["run", path, "--plan"]) == 0
    assert capsys.readouterr().out.split() == ["sample", "new"]


def test_a_full_disk_is_foreseen(world, tmp_path, monkeypatch):
    "The estimate follows the model's size, and counts a model that is still to be trained."
    import vcb_nb.checks as checks
    sections = dict(model=str(world["policy"]), calibrate={
        "candidates": str(world["scored"]), **CALIBRATE})
    weights = sum(t.numel() for t in load_policy(world["policy"]).parameters())
    for free, enough in ((4 * 4 * weights, True), (4 * 4 * weights - 1, False)):
        monkeypatch.setattr(checks, "free_space", lambda folder: free)
        jobs = plan(recipe(tmp_path, **sections))
        found = find_problems(jobs, plan_states(jobs))
        assert found == {} if enough else "Free some space" in found["calibrate/vcb"][0]


def test_one_fault_of_many_jobs_is_said_once(tmp_path):
    "Every calibration has the same wrong setting: one sentence that counts them."
    methods = {"vcb": {"sweep": {"gamma": [1, 2, 3]}}, "dpo": {}}
    with pytest.raises(InputError) as error:
        plan(recipe(tmp_path, calibrate={"methods": methods, "optim": "adam_w"}))
    said, = error.value.problems
    assert said.startswith("calibrate/vcb-gamma1 and 3 more: optim is 'adam_w'.")


def test_what_is_done_is_not_looked_at(world, tmp_path):
    "A finished stage needs its input no more; a later fault leaves its result alone."
    write_jsonl(tmp_path/"prompts.jsonl", [{"prompt": "The soup"}])
    sections = dict(model=str(world["policy"]), sample={
        "prompts": str(tmp_path/"prompts.jsonl"), **SHORT})
    run_recipe(recipe(tmp_path/"run", **sections))
    before = read_manifest(tmp_path/"run"/"sample")
    with pytest.raises(InputError, match="score: no/judge") as error:
        run_recipe(recipe(tmp_path/"run", **sections, score={"reward": "no/judge/model"}))
    assert len(error.value.problems) == 1 and read_manifest(tmp_path/"run"/"sample") == before
