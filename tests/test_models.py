"Models: a new policy is what its seed and its settings say, and dropout is off."
import pytest, torch
from tiny_models import ARCHITECTURES, logits, tiny, tokenizer

from vcb_nb.artifacts import InputError
from vcb_nb.loading import load_policy
from vcb_nb.loading import as_dtype, pick_device
from vcb_nb.models import disable_dropout, new_policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_policy_is_the_seeds(tokenizer, architecture):
    state = torch.random.get_rng_state()
    a, b, c = (tiny(tokenizer, architecture, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(logits(a), logits(b)) and not torch.equal(logits(a), logits(c))
    assert a.dtype == torch.float32 and a.config._attn_implementation == "sdpa"
    assert a.config.vocab_size == len(tokenizer)
    assert (a.config.eos_token_id, a.config.pad_token_id) == (0, 1)
    assert a.generation_config.eos_token_id == 0 and a.generation_config.use_cache is not False


def test_aliases_and_canonical_names_are_the_same_setting(tokenizer):
    assert new_policy(tokenizer, "gpt2", n_embd=16, n_layer=1).config.hidden_size == 16
    assert new_policy(tokenizer, "gpt2", hidden_size=16, n_layer=1).config.n_embd == 16


@pytest.mark.parametrize("architecture, settings, says", [
    ("gpt_neox", {"hiden_size": 8}, "hidden_size"),
    ("gptneox", {}, "gpt_neox"), ("t5", {}, "causal LM"),
    ("gpt_neox", {"vocab_size": 8}, "tokenizer"), ("gpt_neox", {"hidden_size": 33}, "hidden size"),
    ("gpt_neox", {"hidden_size": "wide"}, "cannot be built"), ("gpt_neo", {}, "attention_layers")])
def test_a_bad_setting_is_named(tokenizer, architecture, settings, says):
    with pytest.raises(InputError, match=says): new_policy(tokenizer, architecture, **settings)


def test_device_and_dtype_names():
    assert as_dtype("torch.bfloat16") is as_dtype("bf16") is torch.bfloat16
    assert as_dtype(None) is torch.float32
    assert pick_device("cpu") == torch.device("cpu") and isinstance(pick_device(), torch.device)
    with pytest.raises(InputError, match="float32"): as_dtype("flaot32")
    with pytest.raises(InputError, match="cuda"): pick_device("cuba")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_dropout_is_off_even_in_training(tokenizer, tmp_path, architecture):
    "Pitfall 7: with dropout on, a policy's log-ratio to itself is not 0 at step 0."
    names = {"gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"], "llama": ["attention_dropout"],
             "gpt_neox": ["hidden_dropout", "attention_dropout"]}[architecture]
    wet = tiny(tokenizer, architecture)
    for name in names: setattr(wet.config, name, .5)
    wet = type(wet)(wet.config).train()
    assert not torch.equal(logits(wet), logits(wet))
    wet.save_pretrained(tmp_path/"wet")
    for model in (load_policy(tmp_path/"wet").train(), disable_dropout(wet)):
        assert torch.equal(logits(model), logits(model))
    assert all(getattr(wet.config, name) == 0 for name in names)
