"""A plan knows what can be known: recipes that lack a section work from start to report, and
whatever would fail later is said before anything runs."""
import json, sys
from pathlib import Path

import pytest

from bad_inputs import PROMPTS, TRAINING, build_world
from vcb_nb.artifacts import InputError, read_json, read_manifest, write_jsonl
from vcb_nb.pipeline import plan, run_recipe
from vcb_nb.recipes import check_recipe

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
        "candidates only": (dict(model=policy, calibrate={"candidates": scored, **CALIBRATE},
                                 report={}), ["calibrate/vcb", "report"]),
        "candidates and a judge": (dict(
            calibrate={"candidates": scored, "model": policy, **CALIBRATE},
            evaluate={**judged(prompts), "gold": "bad_inputs:length"}, report={}),
            ["calibrate/vcb", "evaluate", "report"]),
        "candidates to score": (dict(
            model=policy, score={"candidates": str(world["policy_samples"]), **score},
            calibrate=CALIBRATE, report={}), ["score", "calibrate/vcb", "report"]),
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
    ("policy", "prompts", "scored", "policy_samples")), ""))


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
