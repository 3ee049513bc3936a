"""Sampling equals plain `generate` token for token and in distribution, and leaves the same bytes
however the work is split."""
import json, os, signal, subprocess, sys, time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError
from vcb_nb.data import load_candidates
from vcb_nb.decoding import decode, draw_tokens, sampling_probs, uniform_draws
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import collate_candidates, say_once, sequence_logps
from vcb_nb.models import new_policy
from vcb_nb.sample import SampleConfig, folder_ends, sample, sample_candidates, sample_seed
from vcb_nb.saving import save_model
from vcb_nb.shards import list_parts

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "qwen2", "mistral"]
PROMPTS = ["The soup", "A small room with a view of the old harbour;", "He said that", "We",
           "Human: How was the film? Assistant:", "The bread was very good", "again,"]


def tiny(tokenizer, architecture="gpt_neox", **overrides):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 max_position_embeddings=64)
    model = new_policy(tokenizer, architecture, **{**sizes, **overrides}).eval()
    # Larger weights make peaked distributions that depend on the prompt; untrained, all is uniform.
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.mul_(6)
    return model


@pytest.fixture(scope="module")
def policy(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")/"model"
    return str(save_model(tiny(tiny_tokenizer), tiny_tokenizer, folder))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")/"prompts.jsonl"
    rows = [{"prompt": f"{text} {i}"} for i in range(3) for text in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(policy, prompt_file, tmp_path):
    return SampleConfig(policy=policy, prompts=prompt_file, output_dir=str(tmp_path/"out"), n=4,
                        max_new_tokens=12, batch_size=3, shard_size=4, device="cpu")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*.json*")}


# ---- equal to plain generate

def generate_greedily(model, tokenizer, ids, length):
    "The oracle: transformers' own loop, one prompt at a time, without padding."
    ids = torch.tensor([ids])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=length, suppress_tokens=[tokenizer.pad_token_id],
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return out[0, ids.shape[1]:].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate(tiny_tokenizer, architecture):
    "Pitfall 3: prompts are padded on the left; positions count from each prompt's first token."
    extra = dict(sliding_window=8) if architecture == "mistral" else {}
    model = tiny(tiny_tokenizer, architecture, **extra)
    prompts = [tiny_tokenizer.encode(p) for p in PROMPTS]
    assert len({len(p) for p in prompts}) > 3
    ours, *_ = sample_candidates(model, tiny_tokenizer, prompts, 1, temperature=0,
                                 max_new_tokens=16)
    want = [[generate_greedily(model, tiny_tokenizer, p, 16)] for p in prompts]
    assert ours == want


@pytest.mark.parametrize("sampling", [dict(top_k=1), dict(temperature=1e-4), dict(top_p=1e-6)])
def test_the_limits_of_sampling_are_greedy(tiny_tokenizer, sampling):
    model, prompts = tiny(tiny_tokenizer), [tiny_tokenizer.encode(p) for p in PROMPTS]
    draw = partial(sample_candidates, model, tiny_tokenizer, prompts, max_new_tokens=12)
    greedy, *_ = draw(1, temperature=0)
    ours, *_ = draw(3, **sampling)
    assert ours == [c * 3 for c in greedy]


def test_finished_rows_leave_and_the_rest_go_on(tiny_tokenizer):
    "Rows that end at different steps: each is what the same draws give without cache and batch."
    model, prompts = tiny(tiny_tokenizer), [tiny_tokenizer.encode(p) for p in PROMPTS]
    model = ending(model)
    ids, reasons, _ = sample_candidates(model, tiny_tokenizer, prompts, 4, max_new_tokens=16,
                                        seed=3)
    lengths = {len(c) for cs in ids for c in cs}
    assert len(lengths) > 4 and {r for rs in reasons for r in rs} == {"stop", "length"}
    draws = torch.cat([uniform_draws(3, i, 4, 16) for i in range(len(prompts))])
    for row, u in enumerate(draws):
        assert replay(model, tiny_tokenizer, prompts[row // 4], u) == ids[row // 4][row % 4]


def replay(model, tokenizer, ids, draws):
    "The oracle: whole forward passes over one unpadded row, no cache."
    out = []
    for u in draws:
        with torch.no_grad(): logits = model(torch.tensor([ids + out])).logits[:, -1]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        out.append(draw_tokens(logits, u[None]).item())
        if out[-1] == tokenizer.eos_token_id: break
    return out


def generated_probs(model, tokenizer, ids, sampling):
    "The oracle: what `generate` draws the next token from, after its own processors and warpers."
    ids = torch.tensor(ids)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1,
                         suppress_tokens=[tokenizer.pad_token_id], output_scores=True,
                         return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
                         **sampling)
    return out.scores[0].double().softmax(-1)


def chi_square(counts, probs)->float:
    "p-value of counts under probabilities; cells that expect fewer than five are one cell."
    if counts[probs == 0].any(): return 0.
    expected = probs * counts.sum()
    small = expected < 5
    pool = lambda x: torch.cat([x[~small], x[small].sum()[None]])
    expected, counts = pool(expected), pool(counts)
    kept = expected >= 5
    statistic = ((counts - expected)[kept]**2 / expected[kept]).sum()
    assert kept.sum() > 2 # else there is nothing to test
    return torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2).item()


@pytest.mark.parametrize("sampling", [dict(top_k=9), dict(top_k=9, temperature=.8),
                                      dict(top_k=9, temperature=1.5, top_p=.8)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "lfm2"])
def test_samples_follow_the_distribution_of_generate(tiny_tokenizer, architecture, sampling):
    "Pairs of first and second tokens of nine each, the prompt computed once or for every sample."
    extra = dict(full_attn_idxs=[1]) if architecture == "lfm2" else {}
    model, prompt = tiny(tiny_tokenizer, architecture, **extra), tiny_tokenizer.encode(PROMPTS[1])
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(3) # odds that differ
    n, size = 2000, model.config.vocab_size
    first = generated_probs(model, tiny_tokenizer, [prompt], sampling)[0]
    second = generated_probs(model, tiny_tokenizer, [[*prompt, v] for v in range(size)], sampling)
    second[tiny_tokenizer.eos_token_id] = torch.eye(size)[0] # after the end comes nothing
    (ids,), *_ = sample_candidates(model, tiny_tokenizer, [prompt], n, max_new_tokens=2, seed=1,
                                   **sampling)
    drawn = torch.tensor([[*y, 0][:2] for y in ids])
    counts = torch.zeros(size, size).double()
    counts.index_put_(tuple(drawn.T), torch.ones(n).double(), accumulate=True)
    probs = first[:, None] * second
    assert chi_square(counts.flatten(), probs.flatten()) > 1e-3
    other = probs**1.5 / (probs**1.5).sum()
    assert chi_square(counts.flatten(), other.flatten()) < 1e-4 # what a wrong temperature gives


# ---- log-probabilities

def whole_pass(model, prompts, ids):
    "The oracle: log π(y|x) by one forward pass over prompt and samples, without a cache."
    with torch.no_grad(): return sequence_logps(model, collate_candidates(prompts, ids))


@pytest.mark.parametrize("sampling", [dict(), dict(temperature=.7, top_p=.9), dict(temperature=0)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logps_are_those_of_a_whole_pass(tiny_tokenizer, sampling, dtype, bound):
    """The model's own probability of what was drawn, EOS included, in any batch: not that of the
    tempered, cut or renormalised distribution that it was drawn from."""
    model, prompts = ending(tiny(tiny_tokenizer)), [tiny_tokenizer.encode(p) for p in PROMPTS]
    for batch_size in (1, 3, 7):
        ids, reasons, logps = sample_candidates(
            model.to(dtype), tiny_tokenizer, prompts, 3, max_new_tokens=16, batch_size=batch_size,
            **sampling)
        assert "stop" in sum(reasons, []) or sampling == dict(temperature=0)
        want = whole_pass(model, prompts, ids)
        torch.testing.assert_close(torch.tensor(logps, dtype=dtype), want, atol=bound, rtol=0)


def ending(model):
    "The model, saying EOS more often."
    with torch.no_grad(): model.get_output_embeddings().weight[0].mul_(2)
    return model


def test_the_ban_on_padding_is_not_in_the_logps(tiny_tokenizer):
    "Where the model would say padding, what is drawn instead is as unlikely as the model has it."
    model, pad = tiny(tiny_tokenizer), tiny_tokenizer.pad_token_id
    model.register_forward_hook(lambda m, args, out: (out.logits[..., pad].add_(1e2), out)[1])
    ids, _, logps = sample_candidates(model, tiny_tokenizer, [[5, 6]], 4, max_new_tokens=6)
    assert not any(pad in c for c in ids[0]) and max(logps[0]) < -50
    torch.testing.assert_close(torch.tensor(logps), whole_pass(model, [[5, 6]], ids), atol=1e-3,
                               rtol=0)


def test_logps_of_a_bfloat16_model_are_not_rounded_to_bfloat16(tiny_tokenizer):
    "Pitfall 5: log-softmax of bf16 logits, and the sum over 40 tokens, in fp32 or better."
    model, seen = tiny(tiny_tokenizer).bfloat16(), []
    model.register_forward_hook(lambda m, args, out: seen.append(out.logits[0, -1].double()))
    (ids, logp), = decode(model, tiny_tokenizer, [[5, 6]], 1, uniform_draws(1, 0, 1, 40))
    want = sum(z.log_softmax(-1)[i].item() for z, i in zip(seen, ids))
    assert len(ids) == 40 and logp == pytest.approx(want, abs=1e-4)


# ---- bookkeeping

@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_prompts_samples_are_its_own(tiny_tokenizer, data):
    "Whatever the shape of the run, prompt i gets what a run with prompt i alone gives."
    # float64: two logits within a rounding error of each other would part the two runs.
    model = ending(tiny(tiny_tokenizer)).double()
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5), "prompt lengths")
    n, batch_size, longest = (data.draw(st.integers(1, m), name) for m, name in
                              ((4, "n"), (6, "batch_size"), (12, "max_new_tokens")))
    token = st.integers(2, len(tiny_tokenizer) - 1)
    prompts = [data.draw(st.lists(token, min_size=k, max_size=k)) for k in lengths]
    draw = partial(sample_candidates, model, tiny_tokenizer, max_new_tokens=longest, seed=9)
    drawn = draw(prompts, n, batch_size=batch_size)
    eos = tiny_tokenizer.eos_token_id
    for i, (ids, reasons, logps) in enumerate(zip(*drawn, strict=True)):
        assert ids == draw([prompts[i]], n, rows=[i]).completion_ids[0]
        assert len(ids) == len(reasons) == len(logps) == n and max(logps) < 0
        for c, reason in zip(ids, reasons):
            assert 1 <= len(c) <= longest and c.count(eos) == (c[-1] == eos)
            assert reason == ("stop" if c[-1] == eos else "length")
            assert reason == "stop" or len(c) == longest


# ---- the distribution

def oracle(logits, temperature=1., top_p=1., top_k=0):
    "q(v) by its definition, token by token, in float64."
    q = (logits.double() / temperature).softmax(-1)
    order, kept, mass = q.argsort(descending=True), [], 0.
    for v in order[:top_k or None]: kept.append(v.item())
    total = q[kept].sum()
    for i, v in enumerate(kept):
        mass += (q[v] / total).item()
        if mass >= top_p: kept = kept[:i + 1]; break
    out = torch.zeros_like(q)
    out[kept] = q[kept] / q[kept].sum()
    return out


SAMPLING = [dict(), dict(temperature=1.7), dict(temperature=.6), dict(top_k=5), dict(top_p=.7),
            dict(temperature=1.3, top_k=20, top_p=.8)]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_probabilities_match_the_definition(sampling):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * 3
    ours = sampling_probs(logits, **sampling).double()
    want = torch.stack([oracle(row, **sampling) for row in logits])
    torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_first_tokens_follow_the_distribution(tiny_tokenizer, sampling):
    "Frequencies of 4000 samples of a left-padded prompt, within 4 standard errors of the oracle."
    model, n = tiny(tiny_tokenizer), 4000
    prompts = [tiny_tokenizer.encode(p) for p in PROMPTS[:2]]
    with torch.no_grad(): logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    logits[tiny_tokenizer.pad_token_id] = -torch.inf
    ids, *_ = sample_candidates(model, tiny_tokenizer, prompts, n, max_new_tokens=1, **sampling)
    share = torch.tensor([c[0] for c in ids[0]]).bincount(minlength=len(logits)) / n
    q = oracle(logits, **sampling)
    # Tokens expected less than five times are pooled: the normal bound needs a count.
    common = q * n >= 5
    share, q = (torch.cat([x[common], x[~common].sum()[None]]) for x in (share.double(), q))
    assert ((share - q).abs() <= 4 * (q * (1 - q) / n).sqrt() + 1e-9).all()
    assert len(q) > 2


def test_a_rare_token_is_drawn_as_often_as_it_should():
    "A float32 cumulative sum over a large vocabulary would lose or double its last tokens."
    logits = torch.zeros(20, 50_000)
    logits[:, -1] = -6.
    q = logits[0].double().softmax(-1)[-1]
    # q / 10 apart: ten fall to the last token, ten to the one before.
    u = 1 - q * (torch.arange(20, dtype=torch.float64) + .5) / 10
    assert draw_tokens(logits, u).tolist() == [49_999] * 10 + [49_998] * 10


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((6, 9), -torch.inf)
    logits[:, 3], logits[:, 5] = 0., 1.
    u = torch.tensor([0., 1e-300, .2689, .26895, .5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, u).tolist() == [3, 3, 3, 5, 5, 5]


# ---- how a sample ends

def test_ends_are_kept_as_sampled(tiny_tokenizer):
    "Pitfall 21: EOS is there exactly where the sample finished; a cut text gets none."
    model, prompts = tiny(tiny_tokenizer), [tiny_tokenizer.encode(p) for p in PROMPTS]
    eos, pad = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    ids, reasons, _ = sample_candidates(model, tiny_tokenizer, prompts, 40, max_new_tokens=10,
                                        temperature=3.)
    flat = [(c, r) for cs, rs in zip(ids, reasons) for c, r in zip(cs, rs)]
    assert all(1 <= len(c) <= 10 and (c.count(eos) == (r == "stop")) for c, r in flat)
    assert all((c[-1] == eos) if r == "stop" else len(c) == 10 for c, r in flat)
    assert not any(pad in c for c, _ in flat)


def test_an_immediate_eos_is_a_legal_answer(tiny_tokenizer):
    model = tiny(tiny_tokenizer)
    eos = tiny_tokenizer.eos_token_id
    model.register_forward_hook(lambda m, args, out: (out.logits[..., eos].add_(1e4), out)[1])
    ids, reasons, _ = sample_candidates(model, tiny_tokenizer, [[5, 6], [7]], 3)
    assert ids == [[[eos]] * 3] * 2 and reasons == [["stop"] * 3] * 2


def with_ends(model, tokenizer, prompts, at=3):
    "The model, ending where the first greedy sample is at step `at` too; and its ends."
    free, *_ = sample_candidates(model, tokenizer, prompts, 1, temperature=0, max_new_tokens=12)
    ends = [tokenizer.eos_token_id, free[0][0][at], free[1][0][at]]
    model.generation_config.eos_token_id = ends
    return ends


def generate_to_an_end(model, tokenizer, ids, length):
    "The oracle: `generate`, which takes the ends from the model's own generation config."
    ids = torch.tensor([ids])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=length, suppress_tokens=[tokenizer.pad_token_id])
    return out[0, ids.shape[1]:].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "lfm2"])
def test_any_of_the_models_ends_ends_a_sample(tiny_tokenizer, architecture):
    "Chat models list several: the one drawn is kept, it counts as 'stop', and no token follows."
    extra = dict(full_attn_idxs=[1]) if architecture == "lfm2" else {}
    model = tiny(tiny_tokenizer, architecture, **extra)
    prompts = [tiny_tokenizer.encode(p) for p in PROMPTS]
    ends = with_ends(model, tiny_tokenizer, prompts)
    draw = partial(sample_candidates, model, tiny_tokenizer, prompts, max_new_tokens=12)
    greedy, reasons, _ = draw(1, temperature=0)
    assert greedy == [[generate_to_an_end(model, tiny_tokenizer, p, 12)] for p in prompts]
    assert reasons[0] == reasons[1] == ["stop"] and len(greedy[0][0]) <= 4
    ids, reasons, _ = draw(20, temperature=2.)
    flat = [(c, r) for cs, rs in zip(ids, reasons) for c, r in zip(cs, rs)]
    assert {c[-1] for c, r in flat if r == "stop"} > {ends[1]} and {r for _, r in flat} > {"length"}
    assert all((c[-1] in ends) == (r == "stop") and not {*c[:-1]} & {*ends} for c, r in flat)


def test_the_ends_of_a_folder(tiny_tokenizer, config, tmp_path):
    "The stage reads them from `generation_config.json`, and vLLM is told of them."
    model = tiny(tiny_tokenizer)
    model.generation_config.eos_token_id = [0, 5, 7]
    folder = save_model(model, tiny_tokenizer, tmp_path/"several")
    assert folder_ends(folder, tiny_tokenizer) == {0, 5, 7}
    sample(replace(config, policy=str(folder), temperature=3., n=20))
    rows = list(load_candidates(config.output_dir))
    ends = {c[-1] for row in rows for c, r in zip(row["completion_ids"], row["finish_reasons"])
            if r == "stop"}
    assert ends == {0, 5, 7}
    (folder/"generation_config.json").unlink()
    assert folder_ends(folder, tiny_tokenizer) == {0}


def test_padding_that_is_an_end_may_be_drawn(tiny_tokenizer):
    model = tiny(tiny_tokenizer)
    model.generation_config.eos_token_id = [0, tiny_tokenizer.pad_token_id]
    ids, reasons, _ = sample_candidates(model, tiny_tokenizer, [[5, 6]], 200, max_new_tokens=8,
                                        temperature=3.)
    assert any(c[-1] == 1 and r == "stop" for c, r in zip(ids[0], reasons[0]))


# ---- caches that cannot be repeated

STATES = {"lfm2": dict(full_attn_idxs=[1]),
          "jamba": dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1,
                        expert_layer_period=2),
          "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
          "minimax": {}}


@pytest.mark.parametrize("architecture", STATES)
def test_a_cache_that_cannot_be_repeated(tiny_tokenizer, architecture, caplog):
    "`generate` runs the loop with our numbers: prompts of any length, each row its own draws."
    model = ending(tiny(tiny_tokenizer, architecture, **STATES[architecture]))
    prompts = [tiny_tokenizer.encode(p) for p in PROMPTS[:4]]
    say_once.cache_clear()
    ids, reasons, logps = sample_candidates(model, tiny_tokenizer, prompts, 2, max_new_tokens=10,
                                            seed=3)
    assert caplog.text.count("reads its prompt again") == 1
    for i, prompt in enumerate(prompts):
        want = [replay(model, tiny_tokenizer, prompt, u) for u in uniform_draws(3, i, 2, 10)]
        assert ids[i] == want
    torch.testing.assert_close(torch.tensor(logps), whole_pass(model, prompts, ids), atol=1e-4,
                               rtol=0)


@pytest.mark.parametrize("sampling", [dict(), dict(temperature=.7, top_p=.9), dict(temperature=0)])
def test_both_ways_draw_the_same(tiny_tokenizer, monkeypatch, sampling):
    "Whatever the model's own generation config adds, such as a penalty, is left out."
    model, prompts = ending(tiny(tiny_tokenizer)), [tiny_tokenizer.encode(p) for p in PROMPTS]
    # In float32, rounding decides whether a token is the nucleus' last.
    draw = partial(sample_candidates, model.double(), tiny_tokenizer, prompts, 4,
                   max_new_tokens=12, **sampling)
    want = draw()
    model.generation_config.repetition_penalty = 1.8
    monkeypatch.setattr("vcb_nb.decoding.supports_packing", lambda *_: (False, "it is a test"))
    monkeypatch.setattr("vcb_nb.decoding.refuse_sharing", lambda model: "it is a test")
    ids, reasons, logps = draw()
    assert (ids, reasons) == want[:2] and model.generation_config.repetition_penalty == 1.8
    torch.testing.assert_close(torch.tensor(logps), torch.tensor(want[2]), atol=1e-5, rtol=0)


def test_cache_switched_off_in_the_config_changes_nothing(tiny_tokenizer):
    "A model saved from training with gradient checkpointing says use_cache=False."
    model, prompts = tiny(tiny_tokenizer), [tiny_tokenizer.encode(p) for p in PROMPTS]
    want = sample_candidates(model, tiny_tokenizer, prompts, 2, max_new_tokens=8)
    model.config.use_cache = False
    assert sample_candidates(model, tiny_tokenizer, prompts, 2, max_new_tokens=8) == want


def test_dropout_is_off_while_sampling_and_the_mode_is_restored(tiny_tokenizer):
    model, prompts = tiny(tiny_tokenizer), [tiny_tokenizer.encode(p) for p in PROMPTS]
    want = sample_candidates(model, tiny_tokenizer, prompts, 2, max_new_tokens=8)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout): module.p = .5
    assert sample_candidates(model.train(), tiny_tokenizer, prompts, 2, max_new_tokens=8) == want
    assert model.training


# ---- randomness

def test_samples_are_distinct(config):
    "Pitfall 26: ranks, prompts and samples have streams of their own."
    summary = sample(config)
    assert summary["distinct_share"] == 1
    rows = load_candidates(config.output_dir)
    firsts = {tuple(row["completion_ids"][j]) for row in rows for j in range(config.n)}
    assert len(firsts) == 21 * 4
    streams = torch.cat([uniform_draws(seed, row, 8, 4) for seed in range(3) for row in range(50)])
    assert len(streams.unique(dim=0)) == 3 * 50 * 8


def test_batches_order_and_n_do_not_matter(tiny_tokenizer):
    model, prompts = tiny(tiny_tokenizer), [tiny_tokenizer.encode(p) for p in PROMPTS]
    def draw(order, n=3, **kw):
        chosen = [prompts[i] for i in order]
        ids, *_ = sample_candidates(model, tiny_tokenizer, chosen, n, rows=order, max_new_tokens=8,
                                    **kw)
        return {i: c for i, c in zip(order, ids)}
    want = draw(list(range(7)))
    assert draw([6, 2, 0, 5, 1, 4, 3], batch_size=2) == want
    assert {i: c[:3] for i, c in draw(list(range(7)), n=5, batch_size=1).items()} == want
    assert draw(list(range(7)), seed=1) != want


RANK_CODE = """
import json, sys, torch
from vcb_nb.sample import SampleConfig, sample
torch.set_num_threads(1)
config, world = SampleConfig(**json.loads(sys.argv[1])), int(sys.argv[3])
if world > 1:
    where = f"file://{sys.argv[2]}/group"
    torch.distributed.init_process_group("gloo", where, rank=int(sys.argv[4]), world_size=world)
print(json.dumps(sample(config)))
"""

def run_rank(config, rank, world):
    "One process of a group, as torchrun starts it."
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    folder = str(Path(config.output_dir).parent)
    arguments = [json.dumps(asdict(config)), folder, str(world), str(rank)]
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK_CODE, *arguments], cwd=ROOT,
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_leave_what_one_leaves(config, tmp_path):
    "Pitfall 26: the split of the work changes no byte; each process waits, and sums up all parts."
    summary = {**sample(config), "tokens_per_second": None}
    shared = replace(config, output_dir=str(tmp_path/"shared"))
    ranks = [run_rank(shared, rank, 2) for rank in (0, 1)]
    for out, err in [rank.communicate(timeout=600) for rank in ranks]:
        assert out, err
        assert {**json.loads(out), "tokens_per_second": None} == summary
    assert contents(shared.output_dir) == contents(config.output_dir)
    assert len(list_parts(config.output_dir)) == 6


def test_killed_midway_then_completed(config, tmp_path):
    "SIGKILL while sampling: what is there is whole, the next call makes the rest, no byte differs."
    config = replace(config, max_new_tokens=30, shard_size=1)
    sample(config)
    cut = replace(config, output_dir=str(tmp_path/"cut"))
    process, deadline = run_rank(cut, 0, 1), time.time() + 600
    while len(list_parts(cut.output_dir, complete=False)) < 3 and time.time() < deadline:
        time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {p.name: p.stat().st_mtime_ns for p in list_parts(cut.output_dir, complete=False)}
    assert 3 <= len(left) < 21
    with pytest.raises(InputError, match="of 21 parts"): list_parts(cut.output_dir)
    sample(cut)
    assert contents(cut.output_dir) == contents(config.output_dir)
    parts = {p.name: p.stat().st_mtime_ns for p in list_parts(cut.output_dir)}
    assert {name: parts[name] for name in left} == left


# ---- vLLM

@dataclass
class Params:
    "The fields of vLLM 0.11's SamplingParams that we set; any other name is an error."
    seed: int
    temperature: float = 1.
    top_p: float = 1.
    top_k: int = 0
    max_tokens: int = 16
    logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list | None = None
    logit_bias: dict | None = None
    detokenize: bool = True


class Engine:
    "Answers as vLLM 0.11's LLM does, with draws of our own decoding from the real weights."
    made = []
    def __init__(self, model, dtype, **options):
        # Otherwise the scheduler runs beside us, and batches depend on the clock.
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.model, self.options, self.requests = load_policy(model, dtype).eval(), options, []
        Engine.made.append(self)

    def generate(self, prompts, params, use_tqdm=True):
        self.requests += zip(prompts, params, strict=True)
        return [SimpleNamespace(outputs=[self.answer(*pair)]) for pair in zip(prompts, params)]

    def answer(self, prompt, p):
        assert p.ignore_eos and p.logprobs == 0
        ends = SimpleNamespace(eos_token_id=p.stop_token_ids[0], pad_token_id=min(p.logit_bias))
        draws = uniform_draws(p.seed, 0, 1, p.max_tokens)
        (ids, logp), = decode(self.model, ends, [prompt["prompt_token_ids"]], 1, draws,
                              temperature=p.temperature, top_p=p.top_p, top_k=p.top_k)
        # The length is looked at first: an EOS as last allowed token counts as 'length'.
        reason = "length" if len(ids) == p.max_tokens else "stop"
        return SimpleNamespace(token_ids=tuple(ids), finish_reason=reason, cumulative_logprob=logp)


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, Params
    monkeypatch.setitem(sys.modules, "vllm", module)
    # Set, then unset: what the library sets is undone after the test.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    monkeypatch.setattr(Engine, "made", [])
    return Engine


@pytest.fixture
def through_vllm(config, vllm):
    return replace(config, backend="vllm", device="auto", temperature=.9, top_p=.95, top_k=200)


def test_vllm_rows_are_whole(through_vllm, vllm, tiny_tokenizer, tmp_path):
    "What is stored is what the engine drew: ids, an end told by the last id, log π(y|x)."
    policy = save_model(ending(tiny(tiny_tokenizer)), tiny_tokenizer, tmp_path/"policy")
    summary = sample(replace(through_vllm, policy=str(policy), max_new_tokens=3, n=12, limit=7))
    rows, (engine,) = list(load_candidates(through_vllm.output_dir)), vllm.made
    ids, eos = [row["completion_ids"] for row in rows], tiny_tokenizer.eos_token_id
    assert summary["samples"] == 7 * 12 and 0 < summary["finished_share"] < 1
    assert any(len(c) == 3 and c[-1] == eos for cs in ids for c in cs)
    assert [row["finish_reasons"] for row in rows] == [
        ["stop" if c[-1] == eos else "length" for c in cs] for cs in ids]
    want = whole_pass(engine.model, [row["prompt_ids"] for row in rows], ids)
    torch.testing.assert_close(torch.tensor([row["sample_logps"] for row in rows]), want, atol=1e-4,
                               rtol=0)
    for row in rows: assert row["prompt_ids"] == tiny_tokenizer.encode(row["prompt"])


def test_vllm_is_asked_for_what_the_settings_say(through_vllm, vllm, tiny_tokenizer):
    "One request per sample, prompt by prompt, each with the seed of its place in the whole run."
    sample(through_vllm)
    (engine,), longest = vllm.made, max(len(tiny_tokenizer.encode(f"{p} 0")) for p in PROMPTS)
    assert engine.options == dict(max_model_len=longest + 12, enable_prefix_caching=True,
                                  logprobs_mode="raw_logprobs",
                                  enforce_eager=not torch.cuda.is_available())
    want = Params(0, .9, .95, 200, 12, 0, True, [tiny_tokenizer.eos_token_id],
                  {tiny_tokenizer.pad_token_id: -100.}, False)
    rows = load_candidates(through_vllm.output_dir)["prompt_ids"][:]
    assert engine.requests == [({"prompt_token_ids": ids}, replace(want, seed=sample_seed(0, i, j)))
                               for i, ids in enumerate(rows) for j in range(4)]


def test_vllm_parts_do_not_depend_on_who_makes_them(through_vllm, vllm, tmp_path, monkeypatch):
    "Pitfall 26: two ranks, or a run that was cut off, leave the bytes that one run leaves."
    sample(through_vllm)
    other = replace(through_vllm, output_dir=str(tmp_path/"other"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10": monkeypatch.setenv("RANK", rank), sample(other)
    assert contents(other.output_dir) == contents(through_vllm.output_dir)
    ids = load_candidates(other.output_dir)["completion_ids"]
    assert len({tuple(c) for cs in ids for c in cs}) == 84


def test_seeds_of_samples_differ():
    seeds = {sample_seed(*place) for place in product(range(3), range(60), range(8))}
    assert len(seeds) == 3 * 60 * 8 and 0 <= min(seeds) and max(seeds) < 2**63
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3) != sample_seed(3, 2, 1)


def test_a_sample_that_vllm_broke_off_is_not_stored(through_vllm, vllm, monkeypatch):
    "An aborted request has neither an EOS nor its full length."
    whole = vllm.answer
    def broken(self, prompt, p):
        out = whole(self, prompt, p)
        if len(self.requests) > 40: out.token_ids, out.finish_reason = (9, 9), "abort"
        return out
    monkeypatch.setattr(vllm, "answer", broken)
    with pytest.raises(InputError, match="stopped a sample after 2 tokens, before its end .*abort"):
        sample(through_vllm)
    assert len(list_parts(through_vllm.output_dir, complete=False)) == 2


def test_without_vllm_the_extra_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(InputError, match=r"pip install vcb-nb\[vllm\]"):
        sample(replace(config, backend="vllm", device="auto"))


def test_vllm_refuses_an_adapter_and_a_long_prompt_before_it_starts(through_vllm, vllm, tmp_path,
                                                                    tiny_tokenizer):
    adapter = save_model(add_lora(load_policy(through_vllm.policy), {"r": 2}), tiny_tokenizer,
                         tmp_path/"adapter", merge=False)
    for change, said in ((dict(policy=str(adapter)), "LoRA adapter"),
                         (dict(max_new_tokens=54), "prompt 1 .* context of 64")):
        with pytest.raises(InputError, match=said): sample(replace(through_vllm, **change))
    assert not vllm.made


# ---- the stage

def test_rows_and_summary(config, tiny_tokenizer):
    summary, rows = sample(config), list(load_candidates(config.output_dir))
    ids = [c for row in rows for c in row["completion_ids"]]
    assert [row["index"] for row in rows] == list(range(21)) and summary["prompts"] == 21
    assert summary["samples"] == len(ids) == 84 and summary["tokens"] == sum(map(len, ids))
    assert summary["mean_length"] == summary["tokens"] / 84 and summary["truncated_prompts"] == 0
    assert summary["finished_share"] == sum(c[-1] == 0 for c in ids) / 84
    for row in rows:
        assert row["prompt_ids"] == tiny_tokenizer.encode(row["prompt"])
        texts = tiny_tokenizer.batch_decode(row["completion_ids"], skip_special_tokens=True)
        assert row["completions"] == texts
    json.dumps(summary, allow_nan=False)


def test_ids_are_kept_where_text_would_drift(config, tiny_tokenizer):
    "Pitfall 27: tokenising the text gives other ids; the stored ones are those that were drawn."
    sample(config)
    rows = list(load_candidates(config.output_dir))
    again = [tiny_tokenizer.encode(text) for row in rows for text in row["completions"]]
    eos = tiny_tokenizer.eos_token_id
    kept = [[i for i in c if i != eos] for row in rows for c in row["completion_ids"]]
    assert sum(a != b for a, b in zip(again, kept)) > len(kept) / 2


def test_a_second_call_does_nothing(config):
    first, before = sample(config), contents(config.output_dir)
    stamps = [p.stat().st_mtime_ns for p in list_parts(config.output_dir)]
    second = sample(config)
    assert contents(config.output_dir) == before and second["tokens_per_second"] is None
    assert stamps == [p.stat().st_mtime_ns for p in list_parts(config.output_dir)]
    assert {**first, "tokens_per_second": None} == second


OTHER = dict(n=5, seed=1, temperature=.9, top_p=.9, top_k=3, max_new_tokens=9, max_prompt_length=9,
             limit=9, shard_size=2, dtype="bfloat16", backend="vllm")

@pytest.mark.parametrize("change", [{k: v} for k, v in OTHER.items()], ids=list(OTHER))
def test_other_settings_are_refused(config, change):
    "Pitfall 11: a folder with parts of other settings is never gone on with."
    sample(replace(config, limit=4))
    with pytest.raises(InputError, match=next(iter(change))):
        sample(replace(config, **{"limit": 4, "device": "auto", **change}))


def test_other_weights_or_prompts_are_refused(config, tiny_tokenizer, tmp_path):
    "Pitfall 11: the key covers the weights and the rows, not their path."
    sample(replace(config, limit=4))
    other = save_model(tiny(tiny_tokenizer, seed=5), tiny_tokenizer, tmp_path/"other")
    with pytest.raises(InputError, match="policy: different content"):
        sample(replace(config, limit=4, policy=str(other)))
    copy = tmp_path/"copy.jsonl"
    copy.write_bytes(Path(config.prompts).read_bytes())
    sample(replace(config, limit=4, prompts=str(copy), batch_size=1))


def test_long_prompts_lose_their_beginning(config, tiny_tokenizer):
    "Pitfall 28: truncation is counted, and keeps the end, which holds the question."
    summary = sample(replace(config, max_prompt_length=5))
    rows = list(load_candidates(config.output_dir))
    whole = [tiny_tokenizer.encode(row["prompt"]) for row in rows]
    assert summary["truncated_prompts"] == sum(len(p) > 5 for p in whole) > 0
    assert all(row["prompt_ids"] == p[-5:] for row, p in zip(rows, whole))


@pytest.mark.parametrize("change, said", [
    (dict(temperature=0), "temperature 0"), (dict(temperature=-1.), "temperature is -1"),
    (dict(temperature=float("nan")), "temperature is nan"), (dict(n=0), "n is 0"),
    (dict(top_p=0.), "top_p"), (dict(top_p=1.1), "top_p"), (dict(top_k=-1), "top_k"),
    (dict(backend="vlm"), "Did you mean 'vllm'"), (dict(backend="vllm"), "device is cpu"),
    (dict(limit=0), "limit"), (dict(shard_size=0), "shard_size"),
    (dict(max_new_tokens=54), r"prompts\.jsonl, prompt 1 \('A small room.* context of 64"),
    (dict(policy="/nowhere/model"), "nowhere"), (dict(prompts="/nowhere/p.jsonl"), "p.jsonl")])
def test_bad_settings_are_named_before_any_work(config, change, said):
    with pytest.raises(InputError, match=said): sample(replace(config, **change))
    assert not list_parts(config.output_dir, complete=False)


def test_a_part_that_is_gone_is_made_again(config):
    sample(config)
    before, part = contents(config.output_dir), list_parts(config.output_dir)[2]
    part.unlink()
    sample(config)
    assert contents(config.output_dir) == before


def test_load_dataset_reads_the_parts(config, tmp_path):
    from datasets import load_dataset
    sample(config)
    files = [str(p) for p in list_parts(config.output_dir)]
    rows = load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path))
    assert rows["completion_ids"][:] == load_candidates(config.output_dir)["completion_ids"][:]


def test_a_rank_without_parts_is_no_error(config, monkeypatch):
    monkeypatch.setenv("RANK", "9"), monkeypatch.setenv("WORLD_SIZE", "10")
    assert sample(config)["samples"] == 0
    monkeypatch.setenv("RANK", "10")
    with pytest.raises(InputError, match="RANK=10"): sample(config)


def test_settings_may_change_while_nothing_is_done(config):
    with pytest.raises(InputError, match="context"): sample(replace(config, max_new_tokens=60))
    assert sample(replace(config, limit=2))["samples"] == 8


def test_every_setting_has_help():
    assert all(f.metadata.get("help") for f in fields(SampleConfig))
