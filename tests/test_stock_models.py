"""Models as they are published go through every stage: no padding token, or padding = EOS, and no
spare row. What is saved is the same model in plain transformers."""
import json

import pytest, torch
from tiny_models import make_tokenizer, plain_logp, tiny
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig)

from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.evaluate import EvaluateConfig, evaluate
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import score_logps
from vcb_nb.reward import RewardConfig, train_reward
from vcb_nb.sample import SampleConfig, sample, sample_candidates
from vcb_nb.saving import save_model
from vcb_nb.score import ScoreConfig, score
from vcb_nb.sft import SFTConfig, train_sft
from vcb_nb.shards import read_parts

PROMPTS = ["The soup", "A room with a view", "He said that", "We"]
KINDS = {"llama, padding is the end": ("llama", {"pad_token": "<|endoftext|>"}),
         "gpt2, no padding": ("gpt2", {}),
         "qwen2, padding beyond the rows": ("qwen2", {})}
STEP = dict(max_steps=1, per_device_train_batch_size=2, report_to="none", logging_steps=1,
            use_cpu=True, save_strategy="no", gradient_accumulation_steps=1)


@pytest.fixture(scope="module", params=KINDS)
def stock(request, tmp_path_factory):
    "A policy's folder with as many rows as tokens, and its rows."
    architecture, roles = KINDS[request.param]
    tokenizer, folder = make_tokenizer(**roles), tmp_path_factory.mktemp("stock")
    model = tiny(tokenizer, architecture)
    if "beyond" in request.param: tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    save_model(model, tokenizer, folder/"policy")
    rows = [{"prompt": p, "completion": f" was {w}.", "chosen": " was good.",
             "rejected": f" was {w}."} for p in PROMPTS for w in ("warm", "dull")]
    (folder/"rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def length(prompt, completion): return len(completion) / 10


@pytest.fixture(scope="module")
def scored(stock):
    sample(SampleConfig(str(stock/"policy"), str(stock/"rows.jsonl"), str(stock/"samples"),
                        n=3, max_new_tokens=6, device="cpu"))
    score(ScoreConfig(str(stock/"samples"), str(stock/"scored"), device="cpu",
                      reward="test_stock_models:length", reference=str(stock/"policy")))
    return read_parts(stock/"scored")


def plain_logps(folder, rows):
    "The oracle: transformers alone, a candidate at a time, no padding."
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [[plain_logp(model, row["prompt_ids"], ids) for ids in row["completion_ids"]]
            for row in rows]


def assert_plain(folder, rows):
    "Saved, it gives here what it gives in plain transformers."
    ids = [[row[k] for row in rows] for k in ("prompt_ids", "completion_ids")]
    ours = torch.tensor(score_logps(load_policy(folder), *ids))
    torch.testing.assert_close(ours, torch.tensor(plain_logps(folder, rows)), atol=1e-4, rtol=0)


def test_samples_and_reference_of_a_stock_model(stock, scored):
    assert len(scored) == len(PROMPTS)
    stored = torch.tensor([row["ref_logps"] for row in scored])
    want = torch.tensor(plain_logps(stock/"policy", scored))
    torch.testing.assert_close(stored, want, atol=1e-4, rtol=0)
    drawn = torch.tensor([row["sample_logps"] for row in scored])
    torch.testing.assert_close(drawn, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("peft", [None, {"r": 2}])
def test_a_calibrated_stock_model_is_the_same_elsewhere(stock, scored, tmp_path, peft):
    calibrate(CalibrationConfig(str(tmp_path), model=str(stock/"policy"), peft_config=peft,
                                candidates=str(stock/"scored"), learning_rate=1e-2, **STEP))
    assert_plain(tmp_path/"model", scored)
    rows = load_policy(tmp_path/"model").get_input_embeddings().num_embeddings
    assert rows == load_policy(stock/"policy").get_input_embeddings().num_embeddings


def test_sft_of_a_stock_model(stock, scored, tmp_path):
    "Nothing is resized, but for a token that the tokenizer has and the model lacks: to 64s."
    train_sft(SFTConfig(str(tmp_path), model=str(stock/"policy"), data=str(stock/"rows.jsonl"),
                        max_prompt_length=20, max_length=40, eval_share=0, **STEP))
    assert_plain(tmp_path/"model", scored)
    tokens = len(AutoTokenizer.from_pretrained(tmp_path/"model"))
    rows = load_policy(tmp_path/"model").get_input_embeddings().num_embeddings
    assert (tokens, rows) in ((257, 257), (258, 320))


def test_reward_model_of_a_stock_model(stock, scored, tmp_path):
    """It has a padding token that ends no text, in tokenizer, config and embedding: transformers'
    own batches, padded by the saved tokenizer, give the scores of single rows, and ours."""
    train_reward(RewardConfig(str(tmp_path), model=str(stock/"policy"), eval_share=0,
                              pairs=str(stock/"rows.jsonl"), max_prompt_length=20, max_length=40,
                              **STEP))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path/"model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path/"model")
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    rows = [row["prompt_ids"] + ids for row in scored for ids in row["completion_ids"]]
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        single = torch.cat([model(torch.tensor([ids])).logits for ids in rows])
        torch.testing.assert_close(model(**padded).logits, single, atol=1e-5, rtol=0)
    score(ScoreConfig(str(stock/"samples"), str(tmp_path/"scored"), device="cpu",
                      reward=str(tmp_path/"model"), reference=str(stock/"policy")))
    ours = [r for row in read_parts(tmp_path/"scored") for r in row["rewards"]]
    torch.testing.assert_close(torch.tensor(ours), single[:, 0], atol=1e-5, rtol=0)


def test_evaluation_of_a_stock_model(stock, tmp_path):
    config = EvaluateConfig(reference=str(stock/"policy"), prompts=str(stock/"rows.jsonl"), n=2,
                            reward="test_stock_models:length", output_dir=str(tmp_path),
                            max_new_tokens=6, device="cpu")
    (found,) = evaluate(config)["policies"]["sft"]["splits"].values()
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-4)
