"""A pretrained model, SmolLM2-135M-Instruct, with data that the project does not contain.

`make test-real` runs these and the page "Your model and your data": minutes, on two cores."""
import os
from pathlib import Path

import pytest
from tiny_models import plain_logp
from transformers import AutoModelForCausalLM

from vcb_nb.artifacts import write_jsonl
from vcb_nb.data import load_candidates
from vcb_nb.pipeline import run_recipe
from vcb_nb.recipes import check_recipe

MODEL = Path(__file__).parents[1]/"runs"/"smollm2"
if not os.environ.get("VCB_REAL"):
    pytest.skip("minutes with a real model: make test-real", allow_module_level=True)


def test_answers_that_were_scored_elsewhere(shared_data, tmp_path):
    "Rewards stay as they are, log-probs are those of transformers, and a step moves the model."
    rows = load_candidates(str(shared_data/"scored_alpacaeval_nc"/"dev.jsonl.gz")).select(range(4))
    few = [{"prompt": row["prompt"], "responses": row["completions"][:4],
            "rewards": row["rewards"][:4]} for row in rows]
    states = run_recipe(check_recipe({
        "name": "scored", "seed": 0, "output_dir": str(tmp_path/"run"), "model": str(MODEL),
        "score": {"candidates": str(write_jsonl(tmp_path/"few.jsonl", few)),
                  "max_completion_length": 48},
        "calibrate": {"methods": {"vcb": {}}, "max_steps": 2, "per_device_train_batch_size": 2,
                      "learning_rate": 2e-5, "eval_share": 0}, "report": {}}))
    assert list(states) == ["score", "calibrate/vcb", "report"]
    scored = load_candidates(str(tmp_path/"run"/"score"/"data"), ("rewards", "ref_logps"))
    assert scored["rewards"][:] == [row["rewards"] for row in few]
    model, trained = (AutoModelForCausalLM.from_pretrained(path).eval() for path in
                      (MODEL, tmp_path/"run"/"calibrate"/"vcb"/"model"))
    row = scored[0]
    for ids, logp in zip(row["completion_ids"], row["ref_logps"]):
        assert abs(plain_logp(model, row["prompt_ids"], ids) - logp) < 1e-2
        assert abs(plain_logp(trained, row["prompt_ids"], ids) - logp) > 1e-2
