"""The prompt computed once against rows: float64, values and every parameter's gradient."""
import copy, importlib, logging
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
                          AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config,
                          GPTNeoXConfig, LlamaConfig)

from vcb_nb import logprobs, packing
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.judges import reward_scores, row_scores
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import (candidate_logps, checked_logps, collate_candidates, score_logps,
                             sequence_logps)
from vcb_nb.models import disable_dropout, new_policy
from vcb_nb.packing import (PACKABLE, PACKED_ATTENTION, enable_packing, pack_candidates,
                            packed_batches, packed_sequences, packed_token_logps,
                            supports_packing)
from vcb_nb.reward import collate_packed_pairs, collate_pairs, side_scores
from vcb_nb.saving import save_model
from vcb_nb.sft import collate_rows

ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "qwen2", "qwen3"]
# Beside them: experts, a capped score, a sink, scaled and capped logits, values of another size.
KINDS = [*ARCHITECTURES, "cohere", "deepseek_v3", "gemma2", "gpt_oss", "mixtral"]
REWARDED = [name for name in PACKABLE # those of which transformers has a reward model
            if CONFIG_MAPPING[name] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
# The others get grouped-query attention.
FULL_HEADS = {"bloom", "gpt2", "gpt_neox", "opt", "phi"}
# Two experts per token, values of another size, caps and scales that bite, both kinds of layers.
SHAPES = {"deepseek_v3": dict(num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1,
                              q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, head_dim=8,
                              qk_nope_head_dim=8, v_head_dim=16, moe_intermediate_size=32,
                              first_k_dense_replace=1, num_experts_per_tok=2),
          "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"],
                              final_logit_softcapping=5.),
          "gemma2": dict(final_logit_softcapping=5., attn_logit_softcapping=2.),
          "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2),
          "granite": dict(logits_scaling=6.),
          "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
          "olmoe": dict(num_experts=4, num_experts_per_tok=2),
          "opt": dict(word_embed_proj_dim=32),
          "qwen3_moe": dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)}
EOS = 0
# Ragged n, ragged lengths, one-token responses, a prompt of one token, equal candidates.
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4]]
COMPLETIONS = [[[9, 10, EOS], [11] * 9], [[12, EOS], [13, 14], [15] * 4, [EOS]],
               [[EOS], [3, EOS], [16, 17, 18], [EOS]], [[7] * 20 + [EOS]]]
ONE_BYTE = 1 # a budget that chunks the head into single positions
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.}

packed_logps = partial(candidate_logps, way="shared")


@pytest.fixture(autouse=True, params=["pieces", "stacks"])
def attention(request, monkeypatch):
    "Everything holds for an attention call per piece, and for pieces that are stacked."
    monkeypatch.setattr(packing, "SHORT", {"pieces": 0, "stacks": 200}[request.param])
    return request.param

only_pieces = pytest.mark.parametrize("attention", ["pieces"], indirect=True)
only_stacks = pytest.mark.parametrize("attention", ["stacks"], indirect=True)


def attention_calls(monkeypatch)->list:
    "Notes the queries and keys of each call of SDPA, and whether it is plainly causal."
    sdpa, seen = packing.sdpa_attention_forward, []
    def spy(module, query, key, value, mask, **kwargs):
        seen.append((query.shape[2], key.shape[2], mask is None))
        return sdpa(module, query, key, value, mask, **kwargs)
    monkeypatch.setattr(packing, "sdpa_attention_forward", spy)
    return seen


def tiny(tokenizer, architecture="gpt_neox", **kwargs):
    "A tiny model in float64; grouped-query attention where the architecture has it."
    return in_float64(fresh(tokenizer, architecture, **kwargs).double())


def fresh(tokenizer, architecture="gpt_neox", **kwargs):
    shape = {"hidden_size": 32, "num_hidden_layers": 2}
    if architecture not in FULL_HEADS: shape["num_key_value_heads"] = 2
    if architecture == "opt" and "initializer_range" in kwargs:
        kwargs["init_std"] = kwargs.pop("initializer_range")
    return new_policy(tokenizer, architecture,
                      **{**shape, **SHAPES.get(architecture, {}), **kwargs})


def in_float64(model):
    """transformers rounds norms, routers and the softmax of eager attention to fp32 also in a
    float64 model, which limits any comparison of gradients to 1e-6: the same without rounding."""
    if hasattr(model.config, "num_experts_per_tok"): model.set_experts_implementation("eager")
    for module in model.modules():
        if any(word in type(module).__name__ for word in ("Norm", "outer", "Attention")):
            module.forward = unrounded(module.forward)
    return model


def unrounded(forward):
    "The same forward, in which a float64 tensor stays one."
    def stays(name):
        plain = getattr(torch.Tensor, name)
        return lambda x, *args, **kwargs: x if (
            x.dtype == torch.float64 and args in [(), (torch.float32,)] and not kwargs
            ) else plain(x, *args, **kwargs)
    softmax = F.softmax
    def run(*args, **kwargs):
        with mock.patch.multiple(torch.Tensor, **{n: stays(n) for n in ("float", "to", "type")}), \
                mock.patch.object(F, "softmax", lambda x, dim, dtype=None: softmax(
                    x, dim, dtype=None if x.dtype == torch.float64 else dtype)):
            return forward(*args, **kwargs)
    return run


def trained(model): return [p for p in model.parameters() if p.requires_grad]


def with_gradient(model, logps, mask):
    "Values, and the gradient of a weighted sum for every trained parameter."
    weights = torch.randn(mask.shape, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(0))
    for p in model.parameters(): p.grad = None
    (logps * weights).sum().backward()
    return logps.detach(), [p.grad for p in trained(model)]


def rows(model, reduce="sum"):
    batch = collate_candidates(PROMPTS, COMPLETIONS)
    return with_gradient(model, sequence_logps(model, batch, reduce), batch.mask)


def packed(model, **kwargs):
    logps = packed_logps(model, PROMPTS, COMPLETIONS, **kwargs)
    return with_gradient(model, logps, pack_candidates(PROMPTS, COMPLETIONS).mask)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert all(g is not None for g in ours[1])


# ---------------------------------------------------------------- packed ≡ rows

@pytest.mark.parametrize("head_bytes", [packing.HEAD_BYTES, ONE_BYTE])
@pytest.mark.parametrize("architecture", PACKABLE)
def test_values_and_gradients_are_those_of_rows(tiny_tokenizer, architecture, head_bytes):
    "Pitfall 6: packed ≡ padded in float64, with plain logits and with the recomputing head."
    model = tiny(tiny_tokenizer, architecture, initializer_range=.2)
    expected = rows(model)
    assert_same(packed(model, head_bytes=head_bytes), expected)
    assert_same(rows(model), expected)


SLIDES = {"use_sliding_window": True}
# Those whose config has a window, and what sets it in one layer of two, or in both.
WINDOWED = {**{name: {} for name in PACKABLE if hasattr(CONFIG_MAPPING[name], "sliding_window")},
            "qwen2": {**SLIDES, "max_window_layers": 1}, "qwen3_moe": SLIDES,
            "qwen3": {**SLIDES, "max_window_layers": 1},
            "smollm3": {**SLIDES, "no_rope_layers": [1, 0]}}


@pytest.mark.parametrize("window", [1, 4, 21])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_sliding_windows(tiny_tokenizer, architecture, window):
    "Shorter than a response, than a prompt with it, and by one token: in all layers or in some."
    kwargs = dict(initializer_range=.2, **WINDOWED[architecture])
    model = tiny(tiny_tokenizer, architecture, sliding_window=window, **kwargs)
    expected, wide = rows(model), tiny(tiny_tokenizer, architecture, sliding_window=99, **kwargs)
    assert not torch.allclose(rows(wide)[0], expected[0], atol=1e-6)
    assert_same(packed(model), expected)
    assert supports_packing(model) == (True, "")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_as_they_are(tiny_tokenizer, architecture):
    "RMSNorm untouched: values equal all the same, gradients to the fp32 that it rounds to."
    model = fresh(tiny_tokenizer, architecture, initializer_range=.2).double()
    (ours, gradients), (theirs, expected) = packed(model), rows(model)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(gradients, expected): assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12


def test_the_named_architectures_are_packable(): assert set(ARCHITECTURES) <= set(PACKABLE)


def test_one_prompt_a_step_and_the_mean(tiny_tokenizer):
    model = tiny(tiny_tokenizer)
    together = packed_logps(model, PROMPTS, COMPLETIONS)
    for i, (prompt, completions) in enumerate(zip(PROMPTS, COMPLETIONS)):
        alone = packed_logps(model, [prompt], [completions])[0]
        torch.testing.assert_close(alone, together[i, :len(completions)], atol=1e-12, rtol=0)
    assert_same(packed(model, reduce="mean"), rows(model, "mean"))
    assert (together[~pack_candidates(PROMPTS, COMPLETIONS).mask] == 0).all()


@pytest.mark.parametrize("head_bytes", [packing.HEAD_BYTES, ONE_BYTE, 20_000])
@pytest.mark.parametrize("architecture", KINDS)
def test_lora(tiny_tokenizer, architecture, head_bytes):
    "A frozen head forms the hidden states' gradient in the forward, whatever its chunk."
    model = add_lora(tiny(tiny_tokenizer, architecture, initializer_range=.2), LORA).double()
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.1)
    expected, ours = rows(model), packed(model, head_bytes=head_bytes)
    assert_same(ours, expected)
    assert all(g.any() for g in ours[1])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", KINDS)
def test_gradient_checkpointing(tiny_tokenizer, architecture, reentrant, lora):
    "Pitfall 13: the backward's second forward gets the layout too; both kinds of checkpointing."
    model = tiny(tiny_tokenizer, architecture, initializer_range=.2)
    if lora: model = add_lora(model, LORA).double()
    expected = rows(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_same(packed(model), expected)
    assert_same(packed(model, head_bytes=ONE_BYTE), expected)


def test_a_head_with_a_bias(tiny_tokenizer):
    model = tiny(tiny_tokenizer, "phi")
    torch.nn.init.normal_(model.lm_head.bias)
    assert_same(packed(model, head_bytes=ONE_BYTE), rows(model))
    model.lm_head.requires_grad_(False)
    assert_same(packed(model), rows(model))


@pytest.mark.parametrize("architecture", KINDS)
def test_fp32_and_bf16_within_their_precision(tiny_tokenizer, architecture):
    "Pitfall 5: log-softmax and sums are in fp32, also under autocast."
    model = fresh(tiny_tokenizer, architecture)
    expected = sequence_logps(in_float64(copy.deepcopy(model).double()),
                              collate_candidates(PROMPTS, COMPLETIONS))
    for head_bytes in (packing.HEAD_BYTES, ONE_BYTE):
        ours = packed_logps(model, PROMPTS, COMPLETIONS, head_bytes=head_bytes)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            ours = packed_logps(model, PROMPTS, COMPLETIONS, head_bytes=head_bytes)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, atol=.3, rtol=0)
        ours.sum().backward()
        assert all(p.grad.isfinite().all() for p in trained(model))


def test_the_heads_products_follow_autocast(tiny_tokenizer):
    "The three heads agree under bf16 autocast, which an fp32 head would not: values, gradients."
    model, found = fresh(tiny_tokenizer, hidden_size=64), []
    for head_bytes in (packing.HEAD_BYTES, ONE_BYTE, 2 * packing.HEAD_BYTES):
        head = model.lm_head
        if found[1:]: head.forward = lambda x: F.linear(x, head.weight) # then: cross_entropy
        with torch.autocast("cpu", torch.bfloat16):
            logps = packed_logps(model, PROMPTS, COMPLETIONS, head_bytes=head_bytes)
        found.append((logps.detach(), torch.autograd.grad(logps.sum(), model.lm_head.weight)[0]))
    for logps, gradient in found[:2]:
        torch.testing.assert_close(logps, found[2][0], atol=1e-5, rtol=0)
        assert (gradient - found[2][1]).norm() < .01 * found[2][1].norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
@pytest.mark.parametrize("size", [5, 300, 50304])
def test_softmax_may_overwrite_its_input(size, device):
    "The head relies on it: the same bits as into new memory."
    logits = torch.randn(7, size, device=device) * 20
    expected = logits.softmax(-1)
    assert torch.equal(torch.softmax(logits, -1, out=logits), expected)


# ---------------------------------------------------------------- nothing leaks

@pytest.mark.parametrize("architecture", KINDS)
def test_a_candidates_tokens_do_not_reach_the_others(tiny_tokenizer, architecture):
    "Pitfall 6: other tokens in one candidate leave every other log-prob bit-identical."
    model = fresh(tiny_tokenizer, architecture, initializer_range=.2)
    before = packed_logps(model, PROMPTS, COMPLETIONS)
    for i, completions in enumerate(COMPLETIONS):
        for j in range(len(completions)):
            changed = copy.deepcopy(COMPLETIONS)
            changed[i][j] = [token + 30 for token in changed[i][j]]
            same = packed_logps(model, PROMPTS, changed) == before
            assert not same[i, j] and same.sum() == same.numel() - 1


# The bugs that the tests above are for, each put in and seen.

def bug_positions(layout): return layout.__class__(
    **{**vars(layout), "position_ids": torch.arange(layout.input_ids.shape[1])[None]})


def bug_one_causal_row(layout): return layout.__class__(
    **{**vars(layout), "groups": ((layout.input_ids.shape[1],),)})


@pytest.mark.parametrize("bug", [bug_positions, bug_one_causal_row])
def test_these_bugs_would_be_seen(tiny_tokenizer, bug):
    "Pitfall 6: positions that run on, and responses that see one another, move the log-probs."
    model = tiny(tiny_tokenizer, initializer_range=.2)
    right = packed_logps(model, PROMPTS, COMPLETIONS)
    wrong = sequence_logps(model, bug(pack_candidates(PROMPTS, COMPLETIONS)))
    assert (right - wrong).abs().max() > 1e-3


def test_eager_with_a_bool_mask_is_why_the_attention_is_checked(tiny_tokenizer):
    "Eager attention adds its 4D mask: a bool one is silently wrong, so eager is refused."
    model = tiny(tiny_tokenizer, initializer_range=.2)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    right = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    assert (model(ids, attention_mask=mask).logits - right).abs().max() > 1e-3
    assert "eager" in supports_packing(model)[1]


def test_a_layer_that_the_layout_does_not_reach_raises(tiny_tokenizer, monkeypatch):
    "StableLM's attention takes no keyword of ours: put on the list by mistake it raises."
    model = fresh(tiny_tokenizer, "stablelm")
    monkeypatch.setattr(packing, "PACKABLE", ("stablelm",))
    monkeypatch.setattr(packing, "_UNPACKABLE", {})
    with pytest.raises(InputError, match="not handed the layout"):
        packed_logps(model, PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("architecture", [*packing._UNPACKABLE, *PACKABLE])
def test_whose_attention_is_code_of_its_own(architecture):
    "It never asks transformers for a registered function, which all that are packed do."
    home = importlib.import_module(AutoModelForCausalLM._model_mapping[
        CONFIG_MAPPING[architecture]].__module__)
    own = packing._UNPACKABLE.get(architecture) == packing._OWN_CODE
    assert ("ALL_ATTENTION_FUNCTIONS" in vars(home)) != own


# ---------------------------------------------------------------- sequences that share nothing

# Ragged lengths, marks in several stretches, nothing marked, one token, all but the first.
SEQUENCES = [[5, 6, 7, 8, 9, EOS], [10, 11, 12, 13, 14, 15, 16], [17], [18, 19, EOS], [20, 21, 22]]
COUNTED = [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1, 0], [0], [0, 1, 1], [0, 0, 0]]


def padded_losses(model, ids=SEQUENCES, counted=COUNTED):
    "Per row, the summed log-probs of what counts, from padded rows and all logits."
    rows = [dict(input_ids=row, prompt_length=1, loss_mask=marks)
            for row, marks in zip(ids, counted)]
    batch = collate_rows(rows, pad_id=EOS)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return logps.mul(batch["labels"][:, 1:] != -100).sum(1, keepdim=True)


def packed_losses(model, ids=SEQUENCES, counted=COUNTED, **options):
    layout = packed_sequences(ids, counted)
    return checked_logps(enable_packing(model, shares=False), layout, **options)


EVERY_ROW = torch.ones(len(SEQUENCES), 1, dtype=torch.bool)


@pytest.mark.parametrize("head_bytes", [packing.HEAD_BYTES, ONE_BYTE])
@pytest.mark.parametrize("architecture", PACKABLE)
def test_sequences_are_those_of_padded_rows(tiny_tokenizer, architecture, head_bytes):
    "Pitfall 6: fine-tuning and pretraining, packed ≡ padded in float64, values and gradients."
    model = tiny(tiny_tokenizer, architecture, initializer_range=.2)
    expected = with_gradient(model, padded_losses(model), EVERY_ROW)
    assert_same(with_gradient(model, packed_losses(model, head_bytes=head_bytes), EVERY_ROW),
                expected)
    assert expected[0][2] == expected[0][4] == 0 and (expected[0][[0, 1, 3]] < 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequences_tokens_do_not_reach_the_others(tiny_tokenizer, architecture):
    "Pitfall 6: other tokens in one row leave every other row's loss bit-identical."
    model = fresh(tiny_tokenizer, architecture, initializer_range=.2)
    before = packed_losses(model)
    for i in (0, 1, 3):
        changed = copy.deepcopy(SEQUENCES)
        changed[i] = [token + 30 for token in changed[i]]
        same = packed_losses(model, changed) == before
        assert not same[i] and same.sum() == same.numel() - 1


def test_what_follows_the_last_mark_is_not_read():
    "A cut, a user's last turn: nothing behind it changes a loss. Something of each row is read."
    layout = packed_sequences(SEQUENCES, COUNTED)
    assert layout.groups == ((5,), (5,), (1,), (2,), (1,))
    assert layout.input_ids.tolist() == [sum((row[:n] for row, (n,) in zip(
        SEQUENCES, layout.groups)), [])]
    assert layout.targets.tolist() == [8, 9, EOS, 11, 12, 15, 19, EOS]
    assert layout.position_ids.tolist() == [[*range(5), *range(5), 0, 0, 1, 0]]


def test_a_batch_without_any_mark_has_a_gradient_of_zeros(tiny_tokenizer):
    "Another process may have marks in its batch, and waits for these gradients."
    model = tiny(tiny_tokenizer)
    losses = packed_losses(model, [[5, 6, 7]], [[0, 0, 0]])
    found = with_gradient(model, losses, torch.ones(1, 1, dtype=torch.bool))
    assert found[0].tolist() == [[0.]] and all(g is not None and not g.any() for g in found[1])


def test_dropout_is_no_reason_against_whole_sequences(tiny_tokenizer):
    "Each row draws its own, as in padded rows; where a prompt is shared it is one."
    model = add_lora(tiny(tiny_tokenizer), {**LORA, "lora_dropout": .1}).train()
    assert supports_packing(model, shares=False)[0] and not supports_packing(model)[0]
    with pytest.raises(InputError, match="dropout"): enable_packing(model)
    assert logprobs.choose_way(model, shares=False) == "shared"


@only_pieces
def test_a_prompt_with_one_response_is_one_causal_piece(tiny_tokenizer, monkeypatch):
    "No mask, no joined keys, one call of SDPA per layer and sequence; also in a mixed row."
    model, seen = tiny(tiny_tokenizer), attention_calls(monkeypatch)
    packed_logps(model, PROMPTS, COMPLETIONS)
    assert seen[-1] == (22, 22, True) # the last prompt's only response has 21 tokens
    assert len(seen) == 2 * (3 + 4 + 3 + 1) # responses of one token have no place of their own
    seen.clear()
    packed_losses(model)
    assert seen == [(n, n, True) for n in (5, 5, 1, 2, 1)] * 2


@only_stacks
def test_short_pieces_are_two_calls_a_layer(tiny_tokenizer, monkeypatch):
    "One for the prompts, plainly causal, one for the responses; sequences are prompts."
    model, seen = tiny(tiny_tokenizer), attention_calls(monkeypatch)
    packed_logps(model, PROMPTS, COMPLETIONS)
    assert seen == [(22, 22, True), (8, 11, False)] * 2
    seen.clear()
    packed_losses(model)
    assert seen == [(5, 5, True)] * 2


@only_stacks
@pytest.mark.parametrize("more", [0, 1])
def test_from_some_length_on_a_piece_is_a_call(tiny_tokenizer, monkeypatch, more):
    "What counts is the longest prompt and response together."
    model, seen = tiny(tiny_tokenizer), attention_calls(monkeypatch)
    layout = pack_candidates([[5], [6] * 9], [[[7] * 3] * 4, [[8] * (3 + more), [9]]])
    monkeypatch.setattr(packing, "SHORT", 12)
    packed_token_logps(enable_packing(model), layout)
    assert len(seen) == 2 * (7 if more else 2)


@only_stacks
@pytest.mark.parametrize("window", [None, 1, 4])
def test_every_query_of_a_stack_sees_a_key(window):
    "Also one that is padding: torch's kernels need not take care of a row of -inf."
    stacks, _ = packing._stacks(pack_candidates(PROMPTS, COMPLETIONS), window)
    assert stacks[-1].seen.any(-1).all()


@only_stacks
def test_stacks_are_made_anew_on_another_device(tiny_tokenizer):
    layout = pack_candidates(PROMPTS, COMPLETIONS)
    packed_token_logps(enable_packing(tiny(tiny_tokenizer)), layout)
    assert list(layout.made) == [None] and layout.to("meta").made == {}


# ---------------------------------------------------------------- pairs

# A common beginning that goes past the prompt, one side that begins the other, nothing in common.
PAIRS = [([5, 6, 7, 8, 9, EOS], [5, 6, 7, 8, 10, 11, EOS]), ([12, 13, 14], [12, 13, 14, 15, EOS]),
         ([16, 17, EOS], [18, 19, 20, EOS]), ([21], [21, 22]), ([23, 24], [23])]
EVERY_SIDE = torch.ones(2 * len(PAIRS), 1, dtype=torch.bool)


def reward_of(tokenizer, architecture, **kwargs):
    "A tiny reward model in float64."
    config = tiny(tokenizer, architecture, initializer_range=.2, **kwargs).config
    config.num_labels, config.pad_token_id = 1, 300
    return in_float64(AutoModelForSequenceClassification.from_config(config).double())


def pair_rows(pairs=PAIRS):
    return [dict(chosen_ids=a, rejected_ids=b, margin=0.) for a, b in pairs]


def padded_sides(model):
    batch = collate_pairs(pair_rows(), 300)
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def packed_sides(model, pairs=PAIRS):
    return side_scores(enable_packing(model), collate_packed_pairs(pair_rows(pairs))["batch"])


@pytest.mark.parametrize("architecture", REWARDED)
def test_pairs_are_those_of_padded_rows(tiny_tokenizer, architecture):
    "Reward training, a pair's beginning once ≡ two padded rows in float64: scores and gradients."
    model = reward_of(tiny_tokenizer, architecture)
    expected = with_gradient(model, padded_sides(model), EVERY_SIDE)
    assert_same(with_gradient(model, packed_sides(model), EVERY_SIDE), expected)
    assert len(set(expected[0].flatten().tolist())) == 2 * len(PAIRS)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_pairs_under_checkpointing_with_an_adapter_and_wrapped(tiny_tokenizer, reentrant, lora,
                                                               process_group):
    "A score head that peft has put a module around is called through DDP all the same."
    model = reward_of(tiny_tokenizer, "gpt_neox")
    if lora:
        model = add_lora(model, LORA).double()
        for name, p in model.named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(p, std=.1)
    expected = with_gradient(model, padded_sides(model), EVERY_SIDE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert_same(with_gradient(model, packed_sides(wrapped), EVERY_SIDE), expected)
    assert all(g.any() for g in expected[1])


def test_a_sides_tokens_do_not_reach_the_others(tiny_tokenizer):
    "Pitfall 6: other tokens behind the common beginning move that side's score only."
    model = reward_of(tiny_tokenizer, "llama")
    before = packed_sides(model)
    changed = copy.deepcopy(PAIRS)
    changed[0][1][5] += 30
    same = packed_sides(model, changed) == before
    assert not same[len(PAIRS)] and same.sum() == same.numel() - 1


def test_a_pairs_beginning_stands_in_the_row_once():
    batch = collate_packed_pairs(pair_rows())
    assert batch["batch"].groups == ((4, 2, 3), (2, 1, 3), (3,), (4,), (1,), (2,), (2,), (1,))
    assert batch["input_ids"].shape == (1, sum(map(sum, batch["batch"].groups)))


def test_a_failed_forward_leaves_the_score_head_alone(tiny_tokenizer):
    model = reward_of(tiny_tokenizer, "gpt_neox")
    expected = padded_sides(model)
    with pytest.raises(InputError, match="no such layout"), packing._reading(
            model.score, torch.tensor([0]), 1): raise InputError("no such layout")
    torch.testing.assert_close(padded_sides(model), expected, rtol=0, atol=0)


# ---------------------------------------------------------------- everything else is unchanged

@pytest.mark.parametrize("architecture", KINDS)
def test_generate_and_forward_are_unchanged(tiny_tokenizer, architecture, tmp_path):
    "Bit-identical before and after: padded forward, unpadded forward, greedy and sampled decoding."
    model = fresh(tiny_tokenizer, architecture, initializer_range=.2).eval()
    def behaviour(model):
        ids = torch.tensor([[5, 6, 7, 8], [9, 10, 1, 1]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        torch.manual_seed(0)
        kwargs = dict(max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
        with torch.no_grad():
            flipped = dict(input_ids=ids.flip(1), attention_mask=mask.flip(1))
            outs = [model.generate(**flipped, do_sample=d, **kwargs) for d in (False, True)]
            return [model(ids, attention_mask=mask).logits, model(ids).logits,
                    *(x for out in outs for x in (out.sequences, *out.logits))]
    before = behaviour(model)
    packed_logps(model, PROMPTS, COMPLETIONS, head_bytes=ONE_BYTE).sum().backward()
    assert model.config._attn_implementation.startswith(PACKED_ATTENTION)
    assert all(torch.equal(a, b) for a, b in zip(before, behaviour(model), strict=True))
    assert "forward" not in vars(model.get_output_embeddings())
    save_model(model, tiny_tokenizer, tmp_path/"model")
    assert PACKED_ATTENTION not in (tmp_path/"model"/"config.json").read_text()
    plain = "eager" if architecture in ("gemma2", "gpt_oss") else "sdpa"
    assert load_policy(tmp_path/"model").config._attn_implementation == plain


@pytest.mark.parametrize("architecture", ["cohere", "gemma2", "gpt_neox", "granite"])
def test_a_failed_forward_leaves_the_head_alone(tiny_tokenizer, architecture):
    "And what the model does behind it."
    model = enable_packing(tiny(tiny_tokenizer, architecture))
    settings = model.config.to_dict() | {"logit_scale": getattr(model, "logit_scale", None)}
    layout = pack_candidates(PROMPTS, COMPLETIONS)
    def fail(*_): raise ArithmeticError
    model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(ArithmeticError): packed_token_logps(model, layout, ONE_BYTE)
    assert settings == model.config.to_dict() | {
        "logit_scale": getattr(model, "logit_scale", None)}
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_wrapped_model_is_called_through_its_wrapper(tiny_tokenizer, process_group):
    "DDP's hooks live in the wrapper's forward; a trained head's gradient arrives through it."
    model = tiny(tiny_tokenizer)
    expected = packed(model, head_bytes=ONE_BYTE)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert_same(packed(wrapped, head_bytes=ONE_BYTE), expected)


# ---------------------------------------------------------------- refusals

REFUSED = {
    "has no sliding window": ("llama", dict(sliding_window=8)),
    "not among those tested": ("cohere2", {}),
    "do not pass the layout on": ("stablelm", {}), "code of its own": ("bloom", {}),
    "carry a state": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "both directions": ("gemma3_text", dict(use_bidirectional_attention=True)),
    "output_router_logits": ("mixtral", dict(output_router_logits=True)),
    "final_logit_softcapping": ("gemma", dict(final_logit_softcapping=30.)),
    "logit_scale": ("llama", dict(logit_scale=.5)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_by_architecture_or_setting(tiny_tokenizer, words):
    architecture, settings = REFUSED[words]
    model = fresh(tiny_tokenizer, architecture)
    for name, value in settings.items(): setattr(model.config, name, value)
    supported, reason = supports_packing(model)
    assert not supported and words in reason
    with pytest.raises(InputError, match=words): packed_logps(model, PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_frequencies_are_those_of_short_sequences(tiny_tokenizer, kind):
    "Phi-3's long contexts: while all sequences are short, the longest of a batch is no matter."
    rope = {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": 1.}
    if kind == "dynamic":
        model = tiny(tiny_tokenizer, "llama", rope_parameters=rope | {"factor": 2.},
                     max_position_embeddings=24, initializer_range=.2)
    else:
        rope |= dict(short_factor=[1.5] * 4, long_factor=[9.] * 4)
        model = tiny(tiny_tokenizer, "phi3", rope_parameters=rope, initializer_range=.2,
                     original_max_position_embeddings=24, max_position_embeddings=96)
    assert supports_packing(model, 23)[0] and kind in supports_packing(model, 24)[1]
    assert not supports_packing(model)[0]
    assert_same(packed(model), rows(model)) # 23 tokens at most


def test_dropout_is_refused_in_training_only(tiny_tokenizer):
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                 intermediate_size=64, bos_token_id=0, eos_token_id=0)
    for config in (GPTNeoXConfig(**shape, attention_dropout=.1), LlamaConfig(
            **shape, attention_dropout=.1), GPTNeoXConfig(**shape, hidden_dropout=.1),
            GPT2Config(n_embd=32, n_layer=1, n_head=4, attn_pdrop=.1, bos_token_id=0,
                       eos_token_id=0, embd_pdrop=0., resid_pdrop=0.)):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        assert "dropout" in supports_packing(model.train())[1]
        assert supports_packing(model.eval())[0]
        assert supports_packing(disable_dropout(model).train())[0]
    noisy = tiny(tiny_tokenizer, "mixtral", router_jitter_noise=.1)
    assert "router's noise" in supports_packing(noisy.train())[1]
    assert supports_packing(noisy, shares=False)[0] and supports_packing(noisy.eval())[0]
    model = add_lora(tiny(tiny_tokenizer), {**LORA, "lora_dropout": .1})
    assert "dropout" in supports_packing(model.train())[1] and supports_packing(model.eval())[0]


def test_adapters_that_are_refused(tiny_tokenizer):
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny(tiny_tokenizer), prompt)
    assert "prompt-tuning" in supports_packing(model)[1]
    for where in ({"target_modules": ["lm_head", "dense"]},
                  {"modules_to_save": ["lm_head"]}):
        assert "head" in supports_packing(add_lora(tiny(tiny_tokenizer), {**LORA, **where}))[1]


def test_a_refused_model_takes_rows_and_says_so_once(tiny_tokenizer, caplog):
    model = fresh(tiny_tokenizer, "stablelm").double()
    logprobs.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="vcb_nb.logprobs"):
        ours = [candidate_logps(model, PROMPTS, COMPLETIONS) for _ in range(2)]
    expected = sequence_logps(model, collate_candidates(PROMPTS, COMPLETIONS))
    assert torch.equal(ours[0], expected) and torch.equal(ours[1], expected)
    assert len(caplog.records) == 1 and "do not pass the layout on" in caplog.text
    model = tiny(tiny_tokenizer)
    torch.testing.assert_close(candidate_logps(model, PROMPTS, COMPLETIONS), rows(model)[0],
                               atol=1e-12, rtol=0)


def test_bad_inputs_are_named(tiny_tokenizer):
    model = tiny(tiny_tokenizer, max_position_embeddings=16)
    with pytest.raises(InputError, match="Prompt 0 is empty"): packed_logps(model, [[]], [[[3]]])
    with pytest.raises(InputError, match="Completion 1 of prompt 0 is empty"):
        packed_logps(model, [[3]], [[[3], []]])
    with pytest.raises(InputError, match="without completions"): packed_logps(model, [[3]], [[]])
    with pytest.raises(InputError, match="Completion 0 of prompt 1 has 17 tokens"):
        packed_logps(model, [[3], [4]], [[[3]], [[5] * 16]])
    with pytest.raises(ValueError, match="reduce"):
        packed_logps(model, [[3]], [[[3]]], reduce="max")


# ---------------------------------------------------------------- the layout

def test_every_prompt_stands_in_the_row_once():
    layout = pack_candidates(PROMPTS, COMPLETIONS)
    fed = sum(len(c) - 1 for cs in COMPLETIONS for c in cs)
    assert layout.input_ids.shape == (1, sum(map(len, PROMPTS)) + fed)
    assert layout.position_ids.max() == max(
        len(p) + len(c) - 2 for p, cs in zip(PROMPTS, COMPLETIONS) for c in cs)
    assert layout.targets.tolist() == [t for cs in COMPLETIONS for c in cs for t in c]


def test_a_prompt_without_candidates_costs_nothing(tiny_tokenizer):
    model = tiny(tiny_tokenizer)
    ours = packed_logps(model, [[3, 4], [5], [6]], [[[7]], [], [[8, 9]]])
    torch.testing.assert_close(ours, sequence_logps(
        model, collate_candidates([[3, 4], [5], [6]], [[[7]], [], [[8, 9]]])), atol=1e-12, rtol=0)
    assert pack_candidates([[3, 4], [5], [6]], [[[7]], [], [[8, 9]]]).input_ids.shape == (1, 4)


def test_no_logits_of_the_whole_row_are_formed(tiny_tokenizer):
    "The head sees response positions only, and in chunks where the budget says so."
    model, seen = enable_packing(tiny(tiny_tokenizer)), []
    layout = pack_candidates([[5] * 50], [[[6, 7], [8, 9, 10]]])
    handle = model.lm_head.register_forward_hook(
        lambda head, args, out: seen.append((args[0].shape[1], out.shape[-1])))
    packed_token_logps(model, layout)
    packed_token_logps(model, layout, ONE_BYTE)
    handle.remove()
    assert seen == [(5, 1), (5, 1)]


@only_pieces
@pytest.mark.parametrize("lean", [True, False])
def test_keys_joined_for_a_response_are_joined_again(tiny_tokenizer, monkeypatch, lean):
    "Autograd keeps no copy of the prompt's keys for a response; gradients keep every bit."
    model, kept, cat = tiny(tiny_tokenizer), [], torch.cat
    expected = packed(model)
    if not lean: monkeypatch.setattr(packing, "_joined_again", lambda *_: nullcontext())
    def spy(tensors, dim=0):
        out = cat(tensors, dim)
        if dim == 2: kept.append(StorageWeakRef(out.untyped_storage()))
        return out
    monkeypatch.setattr(torch, "cat", spy)
    logps = packed_logps(model, PROMPTS, COMPLETIONS)
    assert kept and {ref.expired() for ref in kept} == {lean}
    ours = with_gradient(model, logps, pack_candidates(PROMPTS, COMPLETIONS).mask)
    assert all(map(torch.equal, ours[1], expected[1]))


@pytest.mark.parametrize("arch, fused", [("gpt_neox", "query_key_value"), ("phi3", "qkv_proj")])
def test_a_fused_projection_is_not_kept_for_its_values(tiny_tokenizer, arch, fused):
    "Rotated keys leave it; values that stayed would keep all three parts of it."
    model, outputs = enable_packing(tiny(tiny_tokenizer, arch)), []
    for name, module in model.named_modules():
        if name.endswith(fused): module.register_forward_hook(
            lambda _, args, out: outputs.append(StorageWeakRef(out.untyped_storage())))
    logps = packed_logps(model, PROMPTS, COMPLETIONS)
    assert logps.requires_grad and [ref.expired() for ref in outputs] == [True, True]


def test_values_are_copied_only_out_of_a_fused_projection():
    "Not where the projection is their own, and not where keys keep it anyway."
    key, value, fused = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 9)
    assert packing._out_of_fused(value, key) is value
    _, key_part, value_part = fused.split(3, 1)
    assert packing._out_of_fused(value_part, key_part) is value_part
    assert packing._out_of_fused(value_part, key).untyped_storage().nbytes() == value.nbytes


def test_a_second_backward_computes_the_blocks_again(tiny_tokenizer):
    "The first one's gradient took the place of what was kept, and stays as it was."
    model = enable_packing(tiny(tiny_tokenizer))
    logps = packed_logps(model, PROMPTS, COMPLETIONS)
    first, *again = (torch.autograd.grad(scale * logps.sum(), trained(model), retain_graph=True)
                     for scale in (1, 1, 3))
    for scale, grads in zip((1, 3), again):
        expected = [scale * grad for grad in first]
        torch.testing.assert_close(list(grads), expected, atol=1e-14, rtol=1e-12)


def test_the_gradient_of_the_head_asks_for_no_memory_of_its_own(tiny_tokenizer, monkeypatch):
    "It is written where blocks lay, and holds one block more than its own size."
    model, pieces = enable_packing(tiny(tiny_tokenizer)), []
    monkeypatch.setattr(packing, "HEAD_BLOCK", 1)
    monkeypatch.setattr(packing, "HEAD_COLUMNS", 64)
    take = packing._Rooms.take
    def note(rooms, block):
        room = take(rooms, block)
        pieces.append(room.untyped_storage().data_ptr())
        return room
    monkeypatch.setattr(packing._Rooms, "take", note)
    logps, weight = packed_logps(model, PROMPTS, COMPLETIONS), model.lm_head.weight
    grad, = torch.autograd.grad(logps.sum(), weight)
    assert len(pieces) > 2 and grad.untyped_storage().data_ptr() == pieces[0]
    assert grad.untyped_storage().nbytes() == 8 * (weight.numel() + 64 * weight.shape[1])


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox", "granite"])
def test_a_head_with_a_forward_of_its_own_is_left_alone(tiny_tokenizer, architecture):
    "Offloading replaces `forward`: then the logits of response positions, and cross_entropy."
    model = tiny(tiny_tokenizer, architecture)
    expected, original = rows(model), model.lm_head.forward
    model.lm_head.forward = lambda hidden: original(hidden)
    assert_same(packed(model, head_bytes=ONE_BYTE), expected)
    assert "forward" in vars(model.lm_head)
    del model.lm_head.forward
    model.lm_head.__class__ = type("Quantised", (torch.nn.Linear,),
                                   {"forward": lambda self, x: F.linear(x, self.weight * 1)})
    assert_same(packed(model, head_bytes=ONE_BYTE), expected)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("columns, keep", [(7, True), (7, False), (400, True)])
@pytest.mark.parametrize("cap", [None, 2., 30., 2000.])
def test_capped_logits(cap, columns, keep, frozen):
    "Every probability from 1 down to 0, where a block has lost the logit: no NaN, exact slopes."
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden, weight = 40 * draw(9, 8), 4 * draw(300, 8)
    targets, by = torch.arange(9), draw(9)
    def slopes(logps):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        values = logps(h, w)
        return values.detach(), torch.autograd.grad(values @ by, [h] if frozen else [h, w])
    def plain(h, w):
        logits = h @ w.T if cap is None else cap * torch.tanh(h @ w.T / cap)
        return -F.cross_entropy(logits, targets, reduction="none")
    def blocks(h, w):
        return packing._HeadLogps.apply(h, w, None, targets, columns, keep, False, cap)[0]
    torch.testing.assert_close(slopes(blocks), slopes(plain), atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("head_bytes", [packing.HEAD_BYTES, ONE_BYTE])
def test_without_gradients(tiny_tokenizer, head_bytes):
    model = tiny(tiny_tokenizer)
    with torch.no_grad(): logps = packed_logps(model, PROMPTS, COMPLETIONS, head_bytes=head_bytes)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, rows(model)[0], atol=1e-12, rtol=0)


# ---------------------------------------------------------------- tokens, entropies, the choice

@pytest.mark.parametrize("head_bytes", [packing.HEAD_BYTES, ONE_BYTE])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ["cohere", "gemma2", "gpt_neox", "granite"])
def test_tokens_and_entropies_of_both_ways(tiny_tokenizer, architecture, lora, head_bytes):
    "Against float64 log-softmax over all logits, one candidate at a time; entropy has no gradient."
    model = tiny(tiny_tokenizer, architecture, initializer_range=.2)
    if lora: model = add_lora(model, LORA).double()
    for way in ("rows", "shared"):
        ask = partial(candidate_logps, model, PROMPTS, COMPLETIONS, way, head_bytes=head_bytes)
        logps, spread = ask(reduce="token", entropy=True)
        for i, (prompt, completions) in enumerate(zip(PROMPTS, COMPLETIONS)):
            for j, c in enumerate(completions):
                logits = model(torch.tensor([prompt + c])).logits[0, len(prompt) - 1:-1]
                law = torch.distributions.Categorical(logits=logits)
                torch.testing.assert_close(logps[i, j, :len(c)], law.log_prob(torch.tensor(c)),
                                           atol=1e-12, rtol=0)
                torch.testing.assert_close(spread[i, j, :len(c)], law.entropy().detach(),
                                           atol=1e-12, rtol=0)
                assert not logps[i, j, len(c):].any() and not spread[i, j, len(c):].any()
        assert logps.requires_grad and not spread.requires_grad
        for reduce in ("sum", "mean"):
            values, spreads = ask(reduce=reduce, entropy=True)
            torch.testing.assert_close(values, ask(reduce=reduce), atol=0, rtol=0)
            lengths = torch.tensor([[len(c) for c in cs] + [1] * (4 - len(cs))
                                    for cs in COMPLETIONS]) if reduce == "mean" else 1
            torch.testing.assert_close(values, logps.sum(-1) / lengths, atol=1e-12, rtol=0)
            torch.testing.assert_close(spreads, spread.sum(-1) / lengths, atol=1e-12, rtol=0)


def test_the_choice_is_said_once(tiny_tokenizer, caplog):
    model = fresh(tiny_tokenizer)
    logprobs.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="vcb_nb.logprobs"):
        assert [logprobs.choose_way(model) for _ in range(3)] == ["shared"] * 3
    assert [r.message for r in caplog.records] == [
        "Sequences are packed into one row, each prompt once."]
    assert logprobs.choose_way(model, "rows") == "rows" and len(caplog.records) == 1
    with pytest.raises(InputError, match="way is 'share'. Did you mean 'shared'"):
        logprobs.choose_way(model, "share")


# ---------------------------------------------------------------- scoring

@pytest.mark.parametrize("architecture", REWARDED)
def test_rewards_are_those_of_rows(tiny_tokenizer, architecture):
    "The trunk once over a prompt: the score at each response's last token, in float64."
    config = tiny(tiny_tokenizer, architecture, initializer_range=.2).config
    config.num_labels, config.pad_token_id = 1, 300
    model = in_float64(AutoModelForSequenceClassification.from_config(config).double().eval())
    expected = row_scores(model, PROMPTS, COMPLETIONS).tolist()
    for budget in (10, 40, 10_000):
        found = reward_scores(model, PROMPTS, COMPLETIONS, budget, way="shared")
        torch.testing.assert_close(sum(found, []), expected, atol=1e-12, rtol=0)
    assert supports_packing(model)[0] and len(set(expected)) > 5


@pytest.mark.parametrize("way", ["rows", "shared"])
def test_rewards_of_unknown_tokens_are_refused(tiny_tokenizer, way):
    "Before a batch is made of them."
    config = tiny(tiny_tokenizer, vocab_size=600).config
    config.num_labels, config.pad_token_id = 1, 300
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(InputError, match="Prompt 1 has token id 600.* 0 to 599"):
        reward_scores(model, [[5], [6]], [[[7]], [[8], [9, 600]]], way=way)


def test_rewards_without_a_prompt_and_of_other_models_are_rows(tiny_tokenizer):
    config = tiny(tiny_tokenizer, "stablelm").config
    config.num_labels, config.pad_token_id = 1, 300
    for config in (config, copy.deepcopy(config)):
        model = AutoModelForSequenceClassification.from_config(config).double().eval()
        found = reward_scores(model, [[], [5]], [[[6, 7]], [[8], [9, 10]]])
        expected = row_scores(model, [[], [5]], [[[6, 7]], [[8], [9, 10]]]).tolist()
        torch.testing.assert_close(sum(found, []), expected, atol=1e-12, rtol=0)
    assert not supports_packing(model)[0]


@pytest.mark.parametrize("way", ["rows", "shared"])
@pytest.mark.parametrize("batch_tokens", [1, 12, 30, 1000])
def test_scoring_in_batches(tiny_tokenizer, way, batch_tokens):
    "Whatever the batches, and in the order of the input."
    model = tiny(tiny_tokenizer, initializer_range=.2)
    found = score_logps(model, PROMPTS, COMPLETIONS, batch_tokens=batch_tokens, way=way)
    assert [len(row) for row in found] == [len(cs) for cs in COMPLETIONS]
    expected = rows(model)[0][pack_candidates(PROMPTS, COMPLETIONS).mask]
    torch.testing.assert_close(sum(found, []), expected.tolist(), atol=1e-12, rtol=0)


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=6)), max_size=8),
       st.integers(1, 40))
def test_packed_batches_partition_the_candidates(sizes, budget):
    "Every candidate once, in order; full batches only where one candidate alone is too long."
    prompts, completions = [[5] * p for p, _ in sizes], [[[6] * c for c in cs] for _, cs in sizes]
    batches = packed_batches(prompts, completions, budget)
    assert [(i, j) for batch in batches for i, js in batch for j in js] == [
        (i, j) for i, cs in enumerate(completions) for j in range(len(cs))]
    for batch in batches:
        tokens = sum(len(prompts[i]) + sum(len(completions[i][j]) for j in js) for i, js in batch)
        assert tokens <= budget or (len(batch) == 1 and len(batch[0][1]) == 1)
    whole = [i for i, cs in enumerate(completions)
             if cs and len(prompts[i]) + sum(map(len, cs)) <= budget]
    assert all(sum(i == k for batch in batches for k, _ in batch) == 1 for i in whole)
