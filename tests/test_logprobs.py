"""Log-probabilities against an oracle: one unpadded row at a time, all logits,
log_softmax in float64."""
import copy, math
from types import SimpleNamespace

import pytest, torch
from transformers import GPTNeoXConfig

from vcb_nb import batches, logprobs, packing
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.logprobs import (_response_logits, candidate_logps, choose_way, collate_candidates,
                             lay_out, score_logps, sequence_logps, token_logps)
from vcb_nb.losses import preference_loss
from vcb_nb.models import new_policy

ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "qwen2"]
EOS, PAD = 0, 1
# Prompts and responses of unlike lengths, finished and cut off, two to four candidates.
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4]]
COMPLETIONS = [[[9, 10, EOS], [11] * 9], [[12, EOS], [13, 14], [15] * 4, [EOS]],
               [[EOS], [3, EOS], [16, 17, 18]], [[7] * 20 + [EOS], [21, 22]]]


def tiny(tokenizer, architecture="gpt_neox", **kwargs):
    return new_policy(tokenizer, architecture,
                      **{"hidden_size": 32, "num_hidden_layers": 2, **kwargs})


def oracle_tokens(model, prompt, completion):
    "[T] log-probabilities of a response's tokens, differentiable."
    logps = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return torch.stack([logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


def oracle(model):
    return [[oracle_tokens(model, p, c).sum() for c in cs] for p, cs in zip(PROMPTS, COMPLETIONS)]


def present(matrix, batch): return matrix[batch.mask]


# ---------------------------------------------------------------- against the oracle

@pytest.mark.parametrize("pad_id", [EOS, PAD, 77])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_oracle(tiny_tokenizer, architecture, pad_id):
    "Pitfall 2: padded rows equal unpadded ones in float64, and EOS counts also where pad == eos."
    model = tiny(tiny_tokenizer, architecture).double()
    batch = collate_candidates(PROMPTS, COMPLETIONS, pad_id)
    got, expected = sequence_logps(model, batch), oracle(model)
    torch.testing.assert_close(present(got, batch), torch.stack(sum(expected, [])), atol=1e-12,
                               rtol=0)
    assert batch.mask.sum(1).tolist() == [2, 4, 3, 2] and (got[~batch.mask] == 0).all()


def padded_logps(model, prompt, completion, left, right, **kwargs):
    "A single row with padding on either side, read from all logits."
    row = torch.tensor([[PAD] * left + prompt + completion + [PAD] * right])
    mask = torch.tensor([[0] * left + [1] * len(prompt + completion) + [0] * right])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"position_ids": positions} if kwargs.get("position_ids", True) else {}
    logps = model(input_ids=row, attention_mask=mask, **given).logits[0].log_softmax(-1)
    first = left + len(prompt) - 1
    return sum(logps[first + t, token].item() for t, token in enumerate(completion))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_right_and_unpadded_are_the_same(tiny_tokenizer, architecture):
    "Pitfall 2: the side and the amount of padding do not matter, per sequence, in float64."
    model = tiny(tiny_tokenizer, architecture).double()
    scores = score_logps(model, PROMPTS, COMPLETIONS)
    for prompt, completions, row in zip(PROMPTS, COMPLETIONS, scores):
        for completion, score in zip(completions, row):
            for left, right in ((0, 0), (0, 6), (6, 0), (3, 2)):
                assert (padded_logps(model, prompt, completion, left, right)
                        == pytest.approx(score, abs=1e-12))


def test_left_padding_without_positions_is_wrong(tiny_tokenizer):
    """Pitfall 3: on GPT-2 left padding without position_ids moves the log-prob;
    rows here pad on the right."""
    model = tiny(tiny_tokenizer, "gpt2", initializer_range=.2).double()
    prompt, completion = PROMPTS[0], COMPLETIONS[0][1]
    right, = score_logps(model, [prompt], [[completion]])[0]
    assert abs(padded_logps(model, prompt, completion, 6, 0, position_ids=False) - right) > .1
    batch = collate_candidates([prompt, [2] * 12], [[completion], [[3]]])
    assert sequence_logps(model, batch)[0, 0].item() == pytest.approx(right, abs=1e-12)
    assert batch.attention_mask[:, 0].all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_equals_the_oracles(tiny_tokenizer, architecture):
    model = tiny(tiny_tokenizer, architecture).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = collate_candidates(PROMPTS, COMPLETIONS)
    weights = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((present(sequence_logps(model, batch), batch) * weights).sum(),
                               parameters)
    theirs = torch.autograd.grad((torch.stack(sum(oracle(model), [])) * weights).sum(), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


def test_the_eos_is_one_of_the_summed_tokens(tiny_tokenizer):
    "Pitfall 2: log π of a finished response is that of the cut one plus its EOS's."
    model = tiny(tiny_tokenizer).double()
    (finished, cut), = score_logps(model, [[5, 6]], [[[9, 10, EOS], [9, 10]]], pad_id=EOS)
    assert finished - cut == pytest.approx(
        oracle_tokens(model, [5, 6], [9, 10, EOS])[-1].item(), abs=1e-12)


def test_token_logps_agree_with_the_oracle_and_with_trl(tiny_tokenizer):
    trl = pytest.importorskip("trl.trainer.utils")
    model, batch = tiny(tiny_tokenizer), collate_candidates(PROMPTS, COMPLETIONS)
    logps, mask = token_logps(model, batch)
    rows = [(p, c) for p, cs in zip(PROMPTS, COMPLETIONS) for c in cs]
    full = trl.selective_log_softmax(model(batch.input_ids).logits[:, :-1], batch.input_ids[:, 1:])
    for r, (p, c) in enumerate(rows):
        assert mask[r].sum() == len(c) and (logps[r, len(c):] == 0).all()
        torch.testing.assert_close(logps[r, :len(c)].double(), oracle_tokens(model, p, c),
                                   atol=1e-5, rtol=0)
        torch.testing.assert_close(logps[r, :len(c)], full[r, len(p) - 1:len(p) - 1 + len(c)])


# ---------------------------------------------------------------- golden values, precision

class Unigram(torch.nn.Module):
    "The simplest language model: every token has a fixed probability, whatever came before."
    config = GPTNeoXConfig(max_position_embeddings=64)

    def __init__(self, probs):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probs).log())

    def get_input_embeddings(self): return torch.nn.Embedding(len(self.logits), 1)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_sum_and_mean_by_hand():
    "Pitfall 4: sums and means of ln ½, ln ¼, ln ⅛; also the way of a model without logits_to_keep."
    model = Unigram([.5, .25, .125, .125])
    batch = collate_candidates([[3], [3, 3]], [[[1, 2, 0], [0]], [[2, 2]]])
    ln2 = math.log(2)
    expected = torch.tensor([[-6 * ln2, -ln2], [-6 * ln2, 0]])
    torch.testing.assert_close(sequence_logps(model, batch), expected)
    torch.testing.assert_close(sequence_logps(model, batch, "mean"),
                               expected / torch.tensor([[3, 1], [2, 1]]))
    with pytest.raises(ValueError, match="Valid: mean, sum, token"):
        sequence_logps(model, batch, "avg")


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
@pytest.mark.parametrize("rows, tokens", [(1, 4), (2, 33), (8, 128)])
def test_log_softmax_is_in_fp32_for_a_bf16_model(tiny_tokenizer, architecture, rows, tokens):
    """Pitfall 5: from the same bf16 logits, fp32 errs 1e-6 a token where bf16 errs thousands of
    times that."""
    model = tiny(tiny_tokenizer, architecture, initializer_range=.5).bfloat16()
    prompts = [[5 + r] * (1 + r) for r in range(rows)]
    batch = collate_candidates(prompts,
                               [[[(7 * r + t) % 200 for t in range(tokens)]] for r in range(rows)])
    got, mask = token_logps(model, batch)
    logits, first = _response_logits(model, batch)
    index = batch.prompt_lengths[:, None] + torch.arange(tokens) - 1
    logits, wanted = (logits[torch.arange(rows)[:, None], index - first],
                      batch.input_ids.gather(1, index + 1))
    exact, naive = (x.log_softmax(-1).gather(2, wanted[..., None])[..., 0].double()
                    for x in (logits.double(), logits))
    assert logits.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-5 and (naive - exact).abs().max() > 1e-3
    assert (got.sum(1) - exact.sum(1)).abs().max() < 1e-5 * tokens


def test_dtypes_in_and_out(tiny_tokenizer):
    model, batch = tiny(tiny_tokenizer), collate_candidates(PROMPTS, COMPLETIONS)
    assert sequence_logps(model, batch).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence_logps(model, batch).dtype == torch.float32
    assert sequence_logps(copy.deepcopy(model).double(), batch).dtype == torch.float64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_copies_have_log_ratio_zero(tiny_tokenizer, architecture):
    """Pitfall 7: at step 0 the log-ratio is exactly 0, in training mode too,
    and VCB's loss is exactly 2."""
    policy, batch = (tiny(tiny_tokenizer, architecture).train(),
                     collate_candidates(PROMPTS, COMPLETIONS))
    reference = copy.deepcopy(policy).eval()
    logps, ref_logps = sequence_logps(policy, batch), sequence_logps(reference, batch)
    assert torch.equal(logps, ref_logps)
    rewards = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    loss = preference_loss("vcb", logps, ref_logps, rewards, mask=batch.mask)
    torch.testing.assert_close(loss.double(), torch.full((4,), 2., dtype=torch.float64), atol=1e-6,
                               rtol=0)


def test_disabled_adapter_is_the_reference(tiny_tokenizer):
    "Pitfall 7, with LoRA: the adapter's switch gives the reference exactly."
    model, batch = tiny(tiny_tokenizer), collate_candidates(PROMPTS, COMPLETIONS)
    before = sequence_logps(model, batch).detach()
    model = add_lora(model, {"r": 2, "init_lora_weights": False})
    assert not torch.allclose(sequence_logps(model, batch), before, atol=1e-2)
    with model.disable_adapter(): assert torch.equal(sequence_logps(model, batch), before)


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("budget", [1, 20, 60, 10_000])
def test_score_logps_restores_the_order(tiny_tokenizer, budget):
    model = tiny(tiny_tokenizer).double().train()
    got = score_logps(model, PROMPTS, COMPLETIONS, batch_tokens=budget)
    assert [len(row) for row in got] == [2, 4, 3, 2] and model.training
    for a, b in zip(got, oracle(model)): assert a == pytest.approx([x.item() for x in b], abs=1e-12)
    assert score_logps(model, [[5], [6]], [[], [[7]]])[0] == []


def test_a_candidates_log_prob_does_not_depend_on_its_neighbours(tiny_tokenizer):
    "Rows do not leak into each other: change the tokens of one, and the others stay bit for bit."
    model, batch = tiny(tiny_tokenizer), collate_candidates(PROMPTS, COMPLETIONS)
    other = copy.deepcopy(COMPLETIONS)
    other[1][2] = [60, 61, 62, 63]
    a, b = sequence_logps(model, batch), sequence_logps(model, collate_candidates(PROMPTS, other))
    changed = (a != b).nonzero().tolist()
    assert changed == [[1, 2]]


def test_through_ddp(tiny_tokenizer, process_group):
    """A wrapped model is called, not its inside: DDP's hooks see the forward and the gradients are
    the same."""
    model, batch = tiny(tiny_tokenizer), collate_candidates(PROMPTS, COMPLETIONS)
    plain = torch.autograd.grad(sequence_logps(model, batch).sum(), list(model.parameters()))
    wrapped, calls = torch.nn.parallel.DistributedDataParallel(model), []
    wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    sequence_logps(wrapped, batch).sum().backward()
    assert calls == [1]
    torch.testing.assert_close([p.grad for p in model.parameters()], list(plain))


def test_batch_layout():
    batch = collate_candidates([[5, 6], [7]], [[[8, EOS], [9]], [[10, 11, 12]]], pad_id=EOS)
    assert batch.input_ids.tolist() == [[5, 6, 8, 0], [5, 6, 9, 0], [7, 10, 11, 12]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert (batch.prompt_lengths.tolist() == [2, 2, 1]
            and batch.completion_lengths.tolist() == [2, 1, 3])
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.to("meta").input_ids.device.type == batch.to("meta").mask.device.type == "meta"


@pytest.mark.parametrize("prompts, completions, says", [
    ([[5], []], [[[7]], [[8]]], "Prompt 1 is empty"),
    ([[5], [6]], [[[7]], [[8], []]], "Completion 1 of prompt 1 is empty"),
    ([[5]], [[[7]], [[8]]], "1 prompts and 2 lists"),
    ([[5], [6]], [[[7]], [[8], [9] * 64]], "Completion 1 of prompt 1 has 65 tokens")])
def test_bad_rows_are_named(tiny_tokenizer, prompts, completions, says):
    model = tiny(tiny_tokenizer, max_position_embeddings=64)
    with pytest.raises(InputError, match=says): score_logps(model, prompts, completions)
    with pytest.raises(InputError, match=says):
        sequence_logps(model, collate_candidates(prompts, completions))


@pytest.mark.parametrize("way", ("rows", "shared"))
@pytest.mark.parametrize("prompt, completion, token", [
    ([5, 600], [7], 600), ([5], [600, 7], 600), ([5], [7, 600], 600), ([5], [-100, 7], -100)])
def test_an_unknown_token_is_named(tiny_tokenizer, way, prompt, completion, token):
    "Not torch's IndexError, nor, for a last token that is never embedded, some number."
    model = tiny(tiny_tokenizer, vocab_size=600)
    prompts, completions = [[5], prompt], [[[6]], [[8], completion]]
    for compute in (candidate_logps, score_logps):
        with pytest.raises(InputError, match=f"Prompt 1 has token id {token}.* 0 to 599"):
            compute(model, prompts, completions, way=way)
    choose_way(model, way)
    with pytest.raises(InputError, match=f"A batch has token id {token}.* 0 to 599"):
        sequence_logps(model, lay_out(prompts, completions, way))
    model.resize_token_embeddings(601)
    if token > 0: score_logps(model, prompts, completions, way=way)


@pytest.mark.parametrize("way", ("rows", "shared"))
def test_ids_are_checked_once_at_the_door(tiny_tokenizer, monkeypatch, way):
    """However many batches follow: looking at the ids of each would wait for the GPU. A batch laid
    out by hand is checked where it is given."""
    model, seen = tiny(tiny_tokenizer), []
    choose_way(model, way)
    for module, name in ((batches, "check_candidates"), (batches, "check_vocabulary"),
                         (batches, "check_context"), (logprobs, "check_candidates"),
                         (logprobs, "check_batch_ids"), (packing, "check_candidates")):
        def spy(*args, check=getattr(module, name), name=name, **kwargs):
            seen.append(name)
            return check(*args, **kwargs)
        monkeypatch.setattr(module, name, spy)
    door = ["check_candidates", "check_vocabulary", "check_context"]
    for compute, options in ((candidate_logps, {}), (score_logps, {"batch_tokens": 8})):
        compute(model, PROMPTS, COMPLETIONS, way=way, **options)
        assert seen == door
        seen.clear()
    sequence_logps(model, lay_out(PROMPTS, COMPLETIONS, way))
    assert seen == ["check_batch_ids"]


def test_a_batch_needs_a_candidate():
    with pytest.raises(InputError, match="at least one"): collate_candidates([[5]], [[]])
