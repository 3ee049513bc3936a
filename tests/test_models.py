"Models: what is made, loaded and saved is what the log-ratios and the scores assume."
import json
from pathlib import Path

import pytest, torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, GPT2Tokenizer, PreTrainedTokenizerFast

from vcb_nb.artifacts import InputError
from vcb_nb.models import (add_lora, as_dtype, disable_dropout, load_policy, load_reward_model,
                           load_tokenizer, match_tokenizer, new_policy, new_reward_model, pad_rows,
                           pick_device, save_model, separate_padding, token_batches)
from vcb_nb.score import reward_scores

ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "qwen2"]
PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[[9, 10, 0], [11] * 9], [[12, 0], [13, 14], [15] * 4], [[0], [3, 0, 0], [7, 8]]]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def make_tokenizer(*special, **roles):
    "A byte-level tokenizer whose EOS is id 0."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **roles)


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer("<|padding|>", pad_token="<|padding|>")


def tiny(tokenizer, architecture="gpt_neox", **kwargs):
    return new_policy(tokenizer, architecture,
                      **{"hidden_size": 32, "num_hidden_layers": 2, **kwargs})


def logits(model, ids=IDS): return model(ids).logits.detach()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return save_model(tiny(tokenizer), tokenizer, tmp_path_factory.mktemp("models")/"base")


@pytest.fixture
def sft_adapter(base, tokenizer, tmp_path):
    "A LoRA adapter that has moved the model, saved without its base."
    model = add_lora(load_policy(base), {"r": 4, "init_lora_weights": False})
    return save_model(model, tokenizer, tmp_path/"sft", merge=False), logits(model)


# ---------------------------------------------------------------- making

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
    ("gpt_neox", {"hidden_size": "wide"}, "cannot be built"), ("bloom", {}, "attention")])
def test_a_bad_setting_is_named(tokenizer, architecture, settings, says):
    with pytest.raises(InputError, match=says): new_policy(tokenizer, architecture, **settings)


def test_device_and_dtype_names():
    assert as_dtype("torch.bfloat16") is as_dtype("bf16") is torch.bfloat16
    assert as_dtype(None) is torch.float32
    assert pick_device("cpu") == torch.device("cpu") and isinstance(pick_device(), torch.device)
    with pytest.raises(InputError, match="float32"): as_dtype("flaot32")
    with pytest.raises(InputError, match="cuda"): pick_device("cuba")


# ---------------------------------------------------------------- loading and saving

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


def break_folder(folder, how):
    weights = folder/"model.safetensors"
    if how == "no config": (folder/"config.json").unlink()
    if how == "broken config": (folder/"config.json").write_text("{")
    if how == "unknown type": (folder/"config.json").write_text('{"model_type": "nonesuch"}')
    if how == "no weights": weights.unlink()
    if how == "pickle": weights.rename(folder/"pytorch_model.bin")
    if how == "cut off": weights.write_bytes(weights.read_bytes()[:-1000])
    if how == "a tensor less":
        tensors = load_file(weights)
        tensors.pop("gpt_neox.layers.1.attention.dense.weight")
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("how, says", [
    ("no config", "config.json"), ("broken config", "config.json"), ("unknown type", "config.json"),
    ("no weights", "no safetensors"), ("pickle", "pickle"), ("cut off", "cannot be loaded"),
    ("a tensor less", "layers.1.attention.dense.weight")])
def test_a_broken_folder_is_named(tokenizer, tmp_path, how, says):
    folder = save_model(tiny(tokenizer), tokenizer, tmp_path/"m")
    break_folder(folder, how)
    with pytest.raises(InputError, match=says) as e: load_policy(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_a_missing_folder_and_a_name_that_the_hub_lacks(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such model folder"): load_policy(tmp_path/"none")
    with pytest.raises(InputError, match="no such model folder"): load_policy("./none")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(InputError, match="no such model folder"): load_policy("runs/sft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="neither a folder nor"):
        load_policy("nobody/no-such-model")


def test_a_reward_model_is_no_policy_and_the_reverse(base, tokenizer, tmp_path):
    reward = save_model(new_reward_model(base, tokenizer), tokenizer, tmp_path/"rm")
    with pytest.raises(InputError, match="not a causal language model"): load_policy(reward)
    with pytest.raises(InputError, match="no score head"): load_reward_model(base)


# ---------------------------------------------------------------- LoRA

def test_an_adapter_folder_is_loaded_merged(sft_adapter, base):
    folder, expected = sft_adapter
    assert not (folder/"model.safetensors").exists()
    model = load_policy(folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(load_policy(base)), expected, atol=1e-2)


def test_lora_on_top_of_an_sft_adapter(sft_adapter, tokenizer, tmp_path):
    """Pitfall 12: the reference behind a second adapter is the SFT model, not the base;
    log-ratio 0 at step 0."""
    folder, _ = sft_adapter
    sft = load_policy(folder)
    policy = add_lora(load_policy(folder), {"r": 2})
    assert torch.equal(logits(policy), logits(sft))
    for name, p in policy.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p)
    assert not torch.allclose(logits(policy), logits(sft), atol=1e-2)
    with policy.disable_adapter(): assert torch.equal(logits(policy), logits(sft))
    again = load_policy(save_model(policy, tokenizer, tmp_path/"vcb", merge=False))
    torch.testing.assert_close(logits(again), logits(policy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_with_gradient_checkpointing(tokenizer, architecture, reentrant):
    "Pitfall 13: every lora_B gets a gradient, and the same one as without checkpointing."
    grads = []
    for checkpointing in (False, True):
        model = add_lora(tiny(tokenizer, architecture),
                         {"r": 2, "init_lora_weights": "gaussian"}).train()
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_A" in name:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
        if checkpointing: model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    plain, checkpointed = grads
    assert len(plain) >= 8
    for name, grad in checkpointed.items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(grad, plain[name])


def test_without_input_gradients_reentrant_checkpointing_gives_none(tokenizer):
    """Pitfall 13, the bug itself: take away what `add_lora` switches on,
    and no adapter gets a gradient."""
    model = add_lora(tiny(tokenizer), {"r": 2}).train()
    assert model.get_input_embeddings()(IDS).requires_grad
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_input_embeddings()._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(IDS, labels=IDS).loss.backward()


def test_merged_save_leaves_the_model_training(base, tokenizer, tmp_path):
    model = add_lora(load_policy(base), {"r": 4, "init_lora_weights": False})
    before = logits(model)
    save_model(model, tokenizer, tmp_path/"merged")
    assert torch.equal(logits(model), before) and "lora_A" in str(model)
    torch.testing.assert_close(logits(load_policy(tmp_path/"merged")), before, atol=1e-5, rtol=1e-5)
    assert not (tmp_path/"merged"/"adapter_config.json").exists()


def test_lora_mistakes_are_named(base, tokenizer, tmp_path):
    model = load_policy(base)
    assert add_lora(model, None) is model
    with pytest.raises(InputError, match="lora_alpha"): add_lora(model, {"lora_alfa": 16})
    homeless = add_lora(tiny(tokenizer), {"r": 2})
    with pytest.raises(InputError, match="merged"): add_lora(homeless, {"r": 2})
    with pytest.raises(InputError, match="merge=True"):
        save_model(homeless, None, tmp_path/"m", merge=False)


def test_an_adapter_without_its_base_is_named(sft_adapter):
    folder, _ = sft_adapter
    settings = json.loads((folder/"adapter_config.json").read_text())
    for base, says in ((None, "no base model"), ("/nowhere/base", "no such model folder")):
        (folder/"adapter_config.json").write_text(
            json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises(InputError, match=says): load_policy(folder)


# ---------------------------------------------------------------- tokenizers

def test_padding_is_never_the_end(tokenizer, tmp_path):
    assert separate_padding(make_tokenizer(pad_token="<|endoftext|>")).pad_token == "<|padding|>"
    assert separate_padding(make_tokenizer("<|pad|>")).pad_token == "<|pad|>"
    assert separate_padding(tokenizer).pad_token_id == 1
    make_tokenizer(pad_token="<|endoftext|>").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == len(loaded) - 1 != loaded.eos_token_id


@pytest.mark.parametrize("name, pad_id, eos_id", [("gpt2", 50257, 50256), ("pythia_neox20b", 1, 0)])
def test_real_tokenizers(shared_data, tmp_path, name, pad_id, eos_id):
    files = shared_data/"tokenizers"/name
    if name == "gpt2":
        GPT2Tokenizer.from_pretrained(files).save_pretrained(tmp_path)
        files = tmp_path
    tokenizer = load_tokenizer(files)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (pad_id, eos_id)


def test_a_policy_gets_a_row_for_every_token(tokenizer):
    bare = make_tokenizer()
    model = tiny(bare)
    before = logits(model)
    match_tokenizer(model, separate_padding(bare))
    assert model.get_input_embeddings().num_embeddings == len(bare) == model.config.vocab_size
    assert torch.equal(logits(model)[..., :-1], before)
    assert model.generation_config.pad_token_id == bare.pad_token_id


def test_tokenizer_mistakes_are_named(base, tmp_path, sft_adapter):
    with pytest.raises(InputError, match="no tokenizer"): load_tokenizer(tmp_path)
    folder, _ = sft_adapter
    for file in folder.glob("tokenizer*"): file.unlink()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()
    (tmp_path/"tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"): load_tokenizer(tmp_path)


# ---------------------------------------------------------------- the reward model

def oracle(model, prompt, completion):
    "One row without padding: the score head at the hidden state of the last token."
    ids = torch.tensor([[*prompt, *completion]])
    return model.score(model.base_model(ids).last_hidden_state[0, -1]).item()


def assert_oracle(model, **kwargs):
    expected = [[oracle(model, p, c) for c in cs] for p, cs in zip(PROMPTS, COMPLETIONS)]
    for way in ("rows", "shared"):
        scores = reward_scores(model, PROMPTS, COMPLETIONS, way=way, **kwargs)
        for a, b in zip(scores, expected): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["own pad", "pad is eos", "no pad"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_score_is_read_at_the_last_token(tmp_path, architecture, kind):
    """Pitfall 20: scores equal the unpadded float64 oracle, in any batch,
    also where the tokenizer's pad is its EOS."""
    tokenizer = {"own pad": make_tokenizer("<|padding|>", pad_token="<|padding|>"),
                 "pad is eos": make_tokenizer(pad_token="<|endoftext|>"),
                 "no pad": make_tokenizer()}[kind]
    save_model(tiny(tokenizer, architecture), tokenizer, tmp_path/"sft")
    model = new_reward_model(tmp_path/"sft", tokenizer)
    assert model.config.pad_token_id not in (None, 0)
    for budget in (1, 13, 10_000): assert_oracle(model.double(), batch_tokens=budget)
    save_model(model.float(), tokenizer, tmp_path/"rm")
    assert_oracle(load_reward_model(tmp_path/"rm", dtype="float64"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_score_depends_neither_on_side_nor_on_amount_of_padding(
        base, tokenizer, tmp_path, architecture):
    "Pitfall 20: the model's own pooling agrees, for any padding on either side."
    save_model(tiny(tokenizer, architecture), tokenizer, tmp_path/"sft")
    model = new_reward_model(tmp_path/"sft", tokenizer).double()
    row, pad_id = [*PROMPTS[0], *COMPLETIONS[0][0]], model.config.pad_token_id
    for left, right in ((0, 0), (0, 1), (0, 9), (1, 0), (9, 0), (4, 5)):
        ids = torch.tensor([[pad_id] * left + row + [pad_id] * right])
        mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        score = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.item()
        assert score == pytest.approx(oracle(model, PROMPTS[0], COMPLETIONS[0][0]), abs=1e-12)


def test_a_foreign_reward_model_with_pad_equal_to_eos(base, tmp_path):
    """Pitfall 20: loading gives it a padding id of its own, from its tokenizer, a free row,
    or one row more."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = model.config.eos_token_id = 0
    shared = {"pad_token": "<|endoftext|>"}
    for name, saved in (("no tokenizer", None),
                        ("a pad token", make_tokenizer("<|pad|>", **shared)),
                        ("a free row", make_tokenizer(**shared))):
        save_model(model, saved, tmp_path/name)
        loaded = load_reward_model(tmp_path/name, dtype="float64")
        assert loaded.config.pad_token_id not in (None, 0)
        assert_oracle(loaded)
    assert loaded.get_input_embeddings().num_embeddings == 258


def test_the_ending_is_part_of_what_is_scored(base, tokenizer):
    "Pitfall 21: nothing is appended or cut; a finished and a truncated response score differently."
    model = new_reward_model(base, tokenizer).double()
    (finished, cut), = reward_scores(model, [[5, 6]], [[[9, 10, 0], [9, 10]]])
    assert finished == pytest.approx(oracle(model, [5, 6], [9, 10, 0]), abs=1e-12)
    assert cut == pytest.approx(oracle(model, [5, 6], [9, 10]), abs=1e-12)
    assert abs(finished - cut) > 1e-3


def test_reward_model_is_the_policys_trunk(sft_adapter, tokenizer):
    folder, _ = sft_adapter
    a, b, c = (new_reward_model(folder, tokenizer, seed=s) for s in (0, 0, 1))
    trunk = load_policy(folder).base_model.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in a.base_model.state_dict().items())
    assert a.score.weight.shape == (1, 32) and torch.equal(a.score.weight, b.score.weight)
    assert not torch.equal(a.score.weight, c.score.weight)


def test_reward_model_with_lora(base, tokenizer, tmp_path):
    "The adapter sits in every layer, the head is trained in full, and merging keeps both."
    model = add_lora(new_reward_model(base, tokenizer), {"r": 2, "init_lora_weights": False})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("score" in n and "lora" not in n for n in trained)
    assert sum("lora_A" in n for n in trained) == 8
    model.base_model.model.score.modules_to_save["default"].weight.data.fill_(.5)
    expected = reward_scores(model, PROMPTS, COMPLETIONS)
    back = load_reward_model(save_model(model, tokenizer, tmp_path/"rm"))
    scores = reward_scores(back, PROMPTS, COMPLETIONS)
    for a, b in zip(scores, expected): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_is_no_reward_model_is_refused(base, tokenizer, tmp_path):
    two = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with pytest.raises(InputError, match="2 numbers"):
        load_reward_model(save_model(two, None, tmp_path/"two"))
    folder = save_model(new_reward_model(base, tokenizer), tokenizer, tmp_path/"rm")
    tensors = load_file(folder/"model.safetensors")
    tensors.pop("score.weight")
    save_file(tensors, folder/"model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="score.weight"): load_reward_model(folder)
    (folder/"model.safetensors").rename(folder/"pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"): load_reward_model(folder)


def test_rows_that_cannot_be_scored_are_named(base, tokenizer):
    model = new_reward_model(base, tokenizer)
    for prompts, completions, says in (
            (PROMPTS, COMPLETIONS[:2], "3 prompts and 2 lists"),
            ([[5], [6]], [[[7]], [[8], []]], "Completion 1 of prompt 1 is empty"),
            ([[5], [6]], [[[7]], [[8], [9] * 1024]], "Completion 1 of prompt 1 has 1025 tokens"),
            ([[5], [6]], [[[7]], [[8], [99999]]], "Prompt 1 has token id 99999"),
            ([[5]], [[[7], [8, 1]]], "Completion 1 of prompt 0 ends with the padding id 1")):
        with pytest.raises(InputError, match=says): reward_scores(model, prompts, completions)
    assert reward_scores(model, [[5], [6]], [[], [[7]]])[0] == []


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_token_batches_partition_the_rows(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


def test_pad_rows_masks_by_length_not_by_id():
    ids, mask = pad_rows([[1, 0], [0, 0, 0], [2]], pad_id=0)
    assert ids.tolist() == [[1, 0, 0], [0, 0, 0], [2, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
