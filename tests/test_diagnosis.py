"Diagnose: any two models, any scored candidates, with the slope that they must have."
import json

import numpy as np
import pytest
from test_evaluate import TINY, gold, tilted, world # noqa: F401: a fixture, and a judge by name

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError, read_json, write_jsonl
from vcb_nb.data import train_tokenizer
from vcb_nb.diagnosis import DiagnoseConfig, diagnose
from vcb_nb.loading import load_policy
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model
from vcb_nb.loading import check_same_tokenizer


def diagnosis(policy, reference, candidates, out, **changes):
    places = dict(policy=policy, reference=reference, candidates=candidates, output_dir=out)
    settings = {"n_boot": 50, "device": "cpu", **{k: str(v) for k, v in places.items()}, **changes}
    return diagnose(DiagnoseConfig(**settings))


def test_diagnose_a_model_against_itself(world, tmp_path):
    found = diagnosis(world/"sft", world/"sft", world/"candidates.jsonl", tmp_path)
    assert (found["slope"]["value"] == found["pearson"]["value"] == 0
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
        assert found["pearson"]["value"] == pytest.approx(sign)
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
    found = diagnosis(*places, reward="test_diagnosis:gold")
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
    assert found["slope"] == expected["slope"] and "tokenised again" in caplog.text


def test_diagnose_real_candidates(world, shared_data, tmp_path):
    "Summaries with expert scores: ragged rows, real text, rewards on their own scale."
    found = diagnosis(world/"policy", world/"sft", shared_data/"scored_summeval"/"dev.jsonl.gz",
                      tmp_path, limit=4, max_prompt_length=48, max_new_tokens=48)
    assert (found["slope"]["prompts"] == 4 and found["candidates"] > 40
            and -1 <= found["pearson"]["value"] <= 1)


def test_other_tokenizer_is_refused(world, tmp_path):
    "Two models that read different ids have no log-ratio."
    other = train_tokenizer(["zzz yyy xxx"]*3, vocab_size=262)
    save_model(new_policy(other, **TINY), other, tmp_path/"other")
    with pytest.raises(InputError, match="different tokenizers"):
        check_same_tokenizer(str(tmp_path/"other"), str(world/"sft"))
    with pytest.raises(InputError, match="different tokenizers"):
        diagnosis(tmp_path/"other", world/"sft", world/"candidates.jsonl", tmp_path/"out")
