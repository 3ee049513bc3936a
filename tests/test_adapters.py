"Adapters: LoRA starts at the reference, trains under checkpointing, and its mistakes are named."
import json, os, shutil

import pytest, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_models import ARCHITECTURES, IDS, base, logits, sft_adapter, tiny, tokenizer
from transformers import AutoModelForCausalLM

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import score_logps
from vcb_nb.reward import RewardConfig, train_reward
from vcb_nb.saving import save_model
from vcb_nb.sft import SFTConfig, train_sft


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


def test_lora_mistakes_are_named(base, tokenizer, tmp_path):
    model = load_policy(base)
    assert add_lora(model, None) is model
    with pytest.raises(InputError, match="lora_alpha"): add_lora(model, {"lora_alfa": 16})
    homeless = add_lora(tiny(tokenizer), {"r": 2})
    with pytest.raises(InputError, match="merged"): add_lora(homeless, {"r": 2})
    with pytest.raises(InputError, match="merge=True"):
        save_model(homeless, None, tmp_path/"m", merge=False)


PROMPTS, COMPLETIONS = [[5, 6, 7], [8, 9]], [[[9, 10, 0], [11, 12]], [[13], [14, 15, 0]]]


def table(model): return torch.tensor(sum(score_logps(model, PROMPTS, COMPLETIONS), []))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tied(request, tokenizer, tmp_path_factory):
    "A model that reads one matrix twice: its folder, the names of its embedding and its head."
    model = tiny(tokenizer, request.param, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    embedding = {"llama": "embed_tokens", "gpt2": "wte"}[request.param]
    folder = tmp_path_factory.mktemp("tied")/request.param
    return save_model(model, tokenizer, folder), embedding, "lm_head"


TIED = {"head": lambda emb, head: dict(target_modules=[head]),
        "embedding": lambda emb, head: dict(target_modules=[emb]),
        "both": lambda emb, head: dict(target_modules=[emb, head]),
        "DoRA on the head": lambda emb, head: dict(target_modules=[head], use_dora=True),
        "head in full": lambda emb, head: dict(modules_to_save=[head]),
        "embedding in full": lambda emb, head: dict(modules_to_save=[emb]),
        "one of each": lambda emb, head: dict(target_modules=[head], modules_to_save=[emb]),
        "two tokens": lambda emb, head: dict(trainable_token_indices=[5, 6])}


@pytest.mark.parametrize("how", TIED)
def test_an_adapter_on_a_tied_matrix_is_saved_as_it_was_trained(tied, tokenizer, tmp_path, how):
    """Merged or not, here and in transformers and peft, also where somebody else's adapter is
    loaded, and where a second one is put on top."""
    folder, *names = tied
    model = add_lora(load_policy(folder), {"r": 4, **TIED[how](*names)})
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad: p.data += .3 * torch.randn(p.shape, generator=generator)
    expected, wanted = logits(model.eval()), table(model)
    assert not torch.allclose(expected, logits(load_policy(folder)), atol=.5)
    merged = save_model(model, tokenizer, tmp_path/"merged")
    adapter = save_model(model, tokenizer, tmp_path/"adapter", merge=False)
    torch.testing.assert_close(logits(model), expected)
    plain = AutoModelForCausalLM.from_pretrained
    second = add_lora(load_policy(adapter), {"r": 2})
    for back in (load_policy(merged), plain(merged), load_policy(adapter), second,
                 PeftModel.from_pretrained(plain(folder), adapter)):
        torch.testing.assert_close(logits(back.eval()), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(table(load_policy(merged)), wanted, atol=1e-4, rtol=1e-4)


def test_untied_is_only_what_an_adapter_changes(tied, tokenizer, tmp_path):
    folder, *_ = tied
    model = add_lora(load_policy(folder), {"r": 2, "init_lora_weights": False})
    back = load_policy(save_model(model, tokenizer, tmp_path/"m"))
    assert back.lm_head.weight is back.get_input_embeddings().weight
    assert back.config.tie_word_embeddings


def test_tied_adapters_are_refused_before_training(tokenizer):
    "peft makes one adapter of the other's transpose, and that cannot be copied or merged."
    model = tiny(tokenizer, "llama", tie_word_embeddings=True)
    settings = dict(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(InputError, match="ensure_weight_tying"): add_lora(model, settings)


def test_an_adapter_finds_its_base_from_everywhere(base, tokenizer, tmp_path, monkeypatch):
    "Its base was given by a relative path: here and in peft, from another folder, after a move."
    shutil.copytree(base, tmp_path/"run"/"sft"/"model")
    monkeypatch.chdir(tmp_path)
    model = add_lora(load_policy("run/sft/model"), {"r": 2, "init_lora_weights": False})
    adapter = save_model(model, tokenizer, tmp_path/"run"/"vcb"/"adapter", merge=False)
    expected = logits(model.eval())
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    for back in (load_policy(adapter), AutoPeftModelForCausalLM.from_pretrained(adapter)):
        torch.testing.assert_close(logits(back.eval()), expected, atol=1e-5, rtol=1e-5)
    moved = (tmp_path/"run").rename(tmp_path/"moved")
    back = load_policy(moved/"vcb"/"adapter")
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-5)
    shutil.rmtree(moved/"sft")
    with pytest.raises(InputError, match="adapter: its base is .* no such model folder"):
        load_policy(moved/"vcb"/"adapter")


def test_sft_and_reward_keep_their_adapter(base, tmp_path):
    "Beside the merged model, where it is asked for; the two are the same policy."
    rows = [{"prompt": f"{i} soups", "completion": " are", "chosen": " are", "rejected": " is"}
            for i in range(4)]
    (tmp_path/"d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = dict(model=str(base), max_length=64, max_prompt_length=32, peft_config={"r": 2},
                  save_adapter=True, use_cpu=True, max_steps=2, disable_tqdm=True, eval_share=0,
                  learning_rate=.1, warmup_steps=0, save_strategy="no")
    data = str(tmp_path/"d.jsonl")
    train_sft(SFTConfig(data=data, output_dir=str(tmp_path/"sft"), **shared))
    merged, adapter = (load_policy(tmp_path/"sft"/name) for name in ("model", "adapter"))
    torch.testing.assert_close(logits(merged), logits(adapter), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(merged), logits(load_policy(base)), atol=1e-3)
    train_reward(RewardConfig(pairs=data, output_dir=str(tmp_path/"rm"), **shared))
    assert (tmp_path/"rm"/"adapter"/"adapter_model.safetensors").exists()
    with pytest.raises(InputError, match="save_adapter is set, and model is not"):
        SFTConfig(data="d", tokenizer="t", save_adapter=True)
