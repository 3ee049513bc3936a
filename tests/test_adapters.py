"Adapters: LoRA starts at the reference, trains under checkpointing, and its mistakes are named."
import pytest, torch
from tiny_models import ARCHITECTURES, IDS, base, logits, sft_adapter, tiny, tokenizer

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.loading import load_policy
from vcb_nb.saving import save_model


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
