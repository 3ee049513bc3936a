"Saving: what comes back is what was saved, whole or not at all."
import pytest, torch
from tiny_models import ARCHITECTURES, base, logits, tiny, tokenizer

from vcb_nb.adapters import add_lora
from vcb_nb.loading import load_policy
from vcb_nb.saving import save_model
from vcb_nb.loading import load_tokenizer


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
