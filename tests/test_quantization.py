"Weights in 4 and 8 bits: close to the whole ones, trained through an adapter, saved as trained."
import importlib.util, json

import pytest, torch
from tiny_models import IDS, logits, make_tokenizer, tiny
from transformers import AutoModelForCausalLM

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.loading import (QUANTIZATION, load_policy, load_reward_model, new_reward_model)
from vcb_nb.sample import SampleConfig, sample
from vcb_nb.saving import save_model
from vcb_nb.score import ScoreConfig, score
from vcb_nb.sft import SFTConfig, train_sft

ABSENT = importlib.util.find_spec("bitsandbytes") is None
needs_package = pytest.mark.skipif(
    ABSENT, reason="needs bitsandbytes (pip install vcb-nb[quantization])")
TRAINING = dict(use_cpu=True, max_steps=3, per_device_train_batch_size=2, disable_tqdm=True,
                eval_share=0, save_strategy="no", learning_rate=.05, warmup_steps=0,
                peft_config={"r": 4})


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer("<|padding|>", pad_token="<|padding|>")


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    model = tiny(tokenizer, "llama", hidden_size=64, max_position_embeddings=128)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("quantised")/"m")


@pytest.mark.skipif(not ABSENT, reason="bitsandbytes is here")
def test_without_the_package_the_settings_are_refused():
    with pytest.raises(InputError, match=r"pip install vcb-nb\[quantization\]"):
        SampleConfig("m", "p", "o", quantization="4bit")


def test_what_is_no_quantization_is_named():
    with pytest.raises(InputError, match="quantization is '4-bit'. Did you mean '4bit'?"):
        SampleConfig("m", "p", "o", quantization="4-bit")


@needs_package
@pytest.mark.parametrize("kind", QUANTIZATION)
def test_quantised_models_are_near_the_whole_ones(whole, tokenizer, tmp_path, kind):
    "The trunk is quantised, the heads are not."
    wanted, model = logits(load_policy(whole)), load_policy(whole, quantization=kind)
    inside = {type(m).__name__ for m in model.modules()}
    assert inside & {"Linear4bit", "Linear8bitLt"} and type(model.lm_head) is torch.nn.Linear
    error = (logits(model) - wanted).std() / wanted.std()
    assert 0 < error < {"4bit": .2, "8bit": .03}[kind]
    folder = save_model(new_reward_model(whole, tokenizer), tokenizer, tmp_path/"rm")
    judge = load_reward_model(folder, quantization=kind)
    assert type(judge.score) is torch.nn.Linear and judge.is_quantized


@needs_package
@pytest.mark.parametrize("kind", QUANTIZATION)
def test_what_is_saved_is_what_was_trained(whole, tokenizer, tmp_path, kind):
    "The merged model has the quantised weights' values, whole; transformers reads it alike."
    model = add_lora(load_policy(whole, quantization=kind), {"r": 4, "init_lora_weights": False})
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    expected = logits(model.eval())
    folder = save_model(model, tokenizer, tmp_path/"merged")
    assert torch.equal(logits(model), expected) # the model itself is left as it was
    assert "quantization_config" not in json.loads((folder/"config.json").read_text())
    tolerance = {"4bit": 1e-4, "8bit": .05}[kind] # 8bit rounds the activations too
    for back in (load_policy(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert (logits(back) - expected).abs().max() < tolerance * expected.abs().max()
    adapter = save_model(model, tokenizer, tmp_path/"adapter", merge=False)
    with pytest.raises(InputError, match="Save the merged model"):
        load_policy(adapter, quantization=kind)


@needs_package
def test_every_stage_on_quantised_weights(whole, tmp_path):
    "SFT, samples, scores and calibration; policy and reference agree before the first step."
    def rows(name, content):
        (tmp_path/name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path/name)
    four = dict(quantization="4bit")
    demos = rows("d.jsonl", [{"prompt": f"{i} soups", "completion": " are"} for i in range(4)])
    train_sft(SFTConfig(model=str(whole), data=demos, max_length=64, max_prompt_length=32,
                        output_dir=str(tmp_path/"sft"), **four, **TRAINING))
    sft = str(tmp_path/"sft"/"model")
    prompts = rows("p.jsonl", [{"prompt": f"{i} soups"} for i in range(4)])
    sample(SampleConfig(sft, prompts, str(tmp_path/"samples"), n=3, max_new_tokens=6, device="cpu",
                        **four))
    found = score(ScoreConfig(str(tmp_path/"samples"), str(tmp_path/"scored"), device="cpu",
                              reward="bad_inputs:length", reference=sft, **four))
    assert found["candidates"] == 12
    done = calibrate(CalibrationConfig(model=sft, candidates=str(tmp_path/"scored"),
                                       reference="stored", output_dir=str(tmp_path/"vcb"),
                                       logging_steps=1, **four, **TRAINING))
    assert done["steps"] == 3 and load_policy(tmp_path/"vcb"/"model").dtype == torch.float32
    log = [json.loads(line) for line in (tmp_path/"vcb"/"training_log.jsonl").open()]
    assert abs(log[0]["rewards/margins"]) < 1e-4, log[0]


@needs_package
def test_quantised_weights_are_not_trained_in_full():
    with pytest.raises(InputError, match="cannot be trained. Set peft_config"):
        CalibrationConfig(model="m", candidates="c", quantization="8bit")
    with pytest.raises(InputError, match="quantization is set, and model is not"):
        SFTConfig(data="d", tokenizer="t", quantization="4bit", peft_config={"r": 2})
    with pytest.raises(InputError, match="for the backend transformers"):
        SampleConfig("m", "p", "o", quantization="4bit", backend="vllm")
