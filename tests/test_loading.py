"""Loading: broken folders are named, adapters are merged, and a reward model's score is read at the
last token."""
import json
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, base, logits, make_tokenizer, sft_adapter, tiny, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.judges import reward_scores
from vcb_nb.loading import (load_policy, load_reward_model, load_tokenizer, new_reward_model,
                            read_context)
from vcb_nb.sample import SampleConfig, sample
from vcb_nb.settings import check_values, source_key
from vcb_nb.sft import SFTConfig
from vcb_nb.saving import save_model

PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[[9, 10, 0], [11] * 9], [[12, 0], [13, 14], [15] * 4], [[0], [3, 0, 0], [7, 8]]]


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


def test_an_adapter_folder_is_loaded_merged(sft_adapter, base):
    folder, expected = sft_adapter
    assert not (folder/"model.safetensors").exists()
    model = load_policy(folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(load_policy(base)), expected, atol=1e-2)


def test_an_adapter_without_its_base_is_named(sft_adapter):
    folder, _ = sft_adapter
    settings = json.loads((folder/"adapter_config.json").read_text())
    for base, says in ((None, "no base model"), ("/nowhere/base", "no such model folder")):
        (folder/"adapter_config.json").write_text(
            json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises(InputError, match=says): load_policy(folder)


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


SIZES = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
WITHOUT_SDPA = {
    "gemma2": dict(num_key_value_heads=2, head_dim=8, intermediate_size=64), "bloom": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]), "mamba": {}, "mpt": {},
    "gpt_oss": dict(num_key_value_heads=2, head_dim=8, intermediate_size=64, num_local_experts=2,
                    num_experts_per_tok=1)}


def stock(architecture, auto_class=AutoModelForCausalLM, **sizes):
    "A model as transformers builds it."
    config = AutoConfig.for_model(architecture, **{**SIZES, **sizes})
    torch.manual_seed(0)
    return auto_class.from_config(config).eval()


@pytest.mark.parametrize("architecture", WITHOUT_SDPA)
def test_attention_is_what_the_class_supports(tokenizer, tmp_path, architecture):
    """Policies without a fused attention load, score as transformers computes it, and become reward
    models where transformers has a head; asking for sdpa gets the reason."""
    model = stock(architecture, **WITHOUT_SDPA[architecture])
    folder = save_model(model, tokenizer, tmp_path/"m")
    back = load_policy(folder)
    assert back.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(back), logits(model), atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="does not support attn_implementation 'sdpa'"):
        load_policy(folder, attn_implementation="sdpa")
    if architecture == "mamba":
        with pytest.raises(InputError, match="no reward model of the architecture mamba"):
            new_reward_model(folder, tokenizer)
    else: assert new_reward_model(folder, tokenizer).config._attn_implementation == "eager"


def test_both_kinds_of_attention_agree_where_there_are_two(base):
    default, eager = load_policy(base), load_policy(base, attn_implementation="eager")
    assert default.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(default), logits(eager), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="Did you mean 'eager'"):
        load_policy(base, attn_implementation="eeger")


def test_a_reward_model_without_sdpa(tokenizer, tmp_path):
    model = stock("deberta-v2", AutoModelForSequenceClassification, num_labels=1,
                  intermediate_size=64, pad_token_id=1)
    folder = save_model(model, tokenizer, tmp_path/"rm")
    scores = reward_scores(load_reward_model(folder), PROMPTS, COMPLETIONS)
    for p, cs, found in zip(PROMPTS, COMPLETIONS, scores):
        wanted = [model(torch.tensor([[*p, *c]])).logits.item() for c in cs]
        assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(InputError, match="DebertaV2ForSequenceClassification does not support"):
        load_reward_model(folder, attn_implementation="sdpa")


NAME = "some/model"


@pytest.fixture
def hub(tokenizer, tmp_path, monkeypatch):
    """Two revisions of a model as the Hub's cache keeps them, and no network: {revision: the logits
    of transformers}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    root, found = tmp_path/"hub"/"models--some--model", {}
    (root/"refs").mkdir(parents=True)
    for seed, revision in enumerate(("main", "step-1")):
        commit = f"{seed + 1:040x}"
        save_model(tiny(tokenizer, seed=seed, max_position_embeddings=128 * (seed + 1)), tokenizer,
                   root/"snapshots"/commit)
        (root/"refs"/revision).write_text(commit)
        plain = AutoModelForCausalLM.from_pretrained(NAME, revision=revision,
                                                     cache_dir=tmp_path/"hub")
        found[revision] = found[commit] = logits(plain.eval())
    return found


def test_each_revision_of_a_name(hub):
    "Branch or commit, as transformers reads them; without one it is main."
    assert not torch.equal(hub["main"], hub["step-1"])
    assert torch.equal(logits(load_policy(NAME)), hub["main"])
    for revision, wanted in hub.items():
        assert torch.equal(logits(load_policy(f"{NAME}@{revision}")), wanted)
    assert load_tokenizer(f"{NAME}@step-1").eos_token_id == 0
    assert (read_context(NAME), read_context(f"{NAME}@step-1")) == (128, 256)
    assert source_key(NAME) != source_key(f"{NAME}@step-1")
    with pytest.raises(InputError, match="Correct the name or the revision"):
        load_policy(f"{NAME}@step-2")


def test_an_adapter_remembers_the_revision_of_its_base(hub, tokenizer, tmp_path):
    model = add_lora(load_policy(f"{NAME}@step-1"), {"r": 2, "init_lora_weights": False})
    folder = save_model(model, tokenizer, tmp_path/"adapter", merge=False)
    stored = json.loads((folder/"adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == (NAME, "step-1")
    torch.testing.assert_close(logits(load_policy(folder)), logits(model), atol=1e-5, rtol=1e-5)


def test_a_stage_takes_a_revision(hub, tmp_path):
    "The setting and the notation are the same, and both are found in the key of the result."
    (tmp_path/"p.jsonl").write_text('{"prompt": "The soup"}')
    drawn = {}
    for name, policy, more in (("setting", NAME, {"revision": "step-1"}),
                               ("notation", f"{NAME}@step-1", {}), ("main", NAME, {})):
        sample(SampleConfig(policy, "p.jsonl", str(tmp_path/name), n=2, max_new_tokens=4,
                            device="cpu", **more))
        part, = (tmp_path/name/"data").glob("part-*.jsonl")
        drawn[name] = json.loads(part.read_text())["sample_logps"]
    assert drawn["setting"] == drawn["notation"] != drawn["main"]


def test_where_a_revision_makes_no_sense(base):
    with pytest.raises(InputError, match="is a folder.* Leave revision out"):
        SampleConfig(str(base), "p", "o", revision="main")
    with pytest.raises(InputError, match="differ. Leave one out"):
        SampleConfig("a/b@main", "p", "o", revision="step-1")
    with pytest.raises(InputError, match="revision is set, and model is not"):
        SFTConfig(data="d", tokenizer="t", revision="main")
    with pytest.raises(InputError, match="Did you mean 'revision'"):
        check_values(SFTConfig, {"model_revision": "main"}, "my.yaml: sft")
