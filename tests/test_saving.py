"Saving: what comes back is what was saved, whole or not at all."
import json, logging, shutil

import pytest, torch
from tiny_models import ARCHITECTURES, base, logits, tiny, tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.loading import load_policy, load_tokenizer
from vcb_nb.saving import rehearse_saving, save_model
from vcb_nb.sft import SFTConfig, train_sft

TRAINING = dict(use_cpu=True, max_steps=1, per_device_train_batch_size=2, disable_tqdm=True,
                eval_share=0, save_strategy="no")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path, architecture):
    model = tiny(tokenizer, architecture)
    model.config.use_cache = model.generation_config.use_cache = False
    save_model(model, tokenizer, tmp_path/"m")
    back = load_policy(tmp_path/"m", device="cpu")
    assert torch.equal(logits(model), logits(back))
    assert load_tokenizer(tmp_path/"m").get_vocab() == tokenizer.get_vocab()
    assert {f.suffix for f in (tmp_path/"m").iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert back.config.use_cache and back.generation_config.use_cache is not False
    assert load_policy(tmp_path/"m", dtype="bf16").dtype == torch.bfloat16


def test_a_failed_save_leaves_the_old_model(tokenizer, tmp_path):
    model = tiny(tokenizer)
    save_model(model, tokenizer, tmp_path/"m")
    class Broken:
        def save_pretrained(self, folder): raise OSError("disk full")
    with pytest.raises(OSError): save_model(tiny(tokenizer, seed=1), Broken(), tmp_path/"m")
    assert torch.equal(logits(load_policy(tmp_path/"m")), logits(model))
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_merged_save_leaves_the_model_training(base, tokenizer, tmp_path):
    model = add_lora(load_policy(base), {"r": 4, "init_lora_weights": False})
    before = logits(model)
    save_model(model, tokenizer, tmp_path/"merged")
    assert torch.equal(logits(model), before) and "lora_A" in str(model)
    torch.testing.assert_close(logits(load_policy(tmp_path/"merged")), before, atol=1e-5, rtol=1e-5)
    assert not (tmp_path/"merged"/"adapter_config.json").exists()


def with_generation(base, folder, **settings):
    "A copy of a model whose generation_config.json has these settings."
    shutil.copytree(base, folder)
    (folder/"generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


DEMOS = [{"prompt": f"{i} soups", "completion": " are fine"} for i in range(4)]
CANDIDATES = [{"prompt": f"{i} soups", "completions": [" are", " were", " fine"],
               "rewards": [0., 1., 2.]} for i in range(4)]


@pytest.mark.parametrize("settings, kept", [
    (dict(do_sample=False, temperature=.6), dict(do_sample=False)),
    (dict(do_sample=True, temperature=.6), dict(do_sample=True, temperature=.6)),
    (dict(num_beams=1, early_stopping=True, length_penalty=.5), dict(num_beams=1)),
    (dict(top_p=.9, do_sample=False, top_k=7, max_length=50), dict(do_sample=False, max_length=50)),
    (dict(num_return_sequences=1, output_scores=True, eos_token_id=[0, 5]),
     dict(num_return_sequences=1))])
def test_a_generation_config_that_contradicts_itself(base, tmp_path, caplog, settings, kept):
    """Both trainings finish and their models load; what has no effect is left out, once said, and
    the rest is kept."""
    start = with_generation(base, tmp_path/"start", **settings)
    train_sft(SFTConfig(model=start, data=rows_file(tmp_path/"d.jsonl", DEMOS), max_length=64,
                        max_prompt_length=32, output_dir=str(tmp_path/"sft"), **TRAINING))
    calibrate(CalibrationConfig(model=start, candidates=rows_file(tmp_path/"c.jsonl", CANDIDATES),
                                reference="live", output_dir=str(tmp_path/"vcb"), **TRAINING))
    for stage in ("sft", "vcb"):
        folder = tmp_path/stage/"model"
        saved = GenerationConfig.from_pretrained(folder)
        saved.validate(strict=True)
        assert {name: getattr(saved, name) for name in settings if name in kept} == kept
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(load_policy(folder)), logits(plain.eval()))
    told = [r for r in caplog.records if "contradicts itself" in r.getMessage()]
    assert len(told) == (0 if settings == kept else 2) # one per training


def test_a_generation_config_that_cannot_be_used(base, tmp_path):
    for settings in (dict(max_new_tokens=-1), dict(early_stopping="perhaps")):
        shutil.rmtree(tmp_path/"m", ignore_errors=True)
        with pytest.raises(InputError, match="generation_config.json cannot be used"):
            load_policy(with_generation(base, tmp_path/"m", **settings))


def test_what_a_save_refuses_is_found_before_the_first_step(tokenizer):
    """Whatever it is: here a setting of the config that JSON has no form for, and a tokenizer
    that cannot be written."""
    model = tiny(tokenizer)
    rehearse_saving(model, tokenizer)
    class Unsaved:
        def save_pretrained(self, folder): raise NotImplementedError("no vocabulary")
    with pytest.raises(InputError, match="Unsaved is refused .*no vocabulary"):
        rehearse_saving(add_lora(model, {"r": 2}), Unsaved())
    model.config.odd = {1, 2}
    with pytest.raises(InputError, match="GPTNeoXConfig is refused"):
        rehearse_saving(model, tokenizer)
