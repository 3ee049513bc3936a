"""Decoding with the prompt's keys and values kept once, against `generate` and whole passes: every
architecture that can be packed, any batch, rows that end and prompts that take their place."""
from functools import partial
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from test_packing import fresh, in_float64

from vcb_nb import decoding
from vcb_nb.adapters import add_lora
from vcb_nb.decoding import SampleCache, decode, draw_tokens, sampling_probs, uniform_draws
from vcb_nb.packing import PACKABLE, attends_plainly, supports_packing
from vcb_nb.sample import sample_candidates

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4], [15] * 11, [16, 17, 18],
           [20 + i for i in range(150)]] # the last is longer than two blocks of queries
LAYERS, HEADS, SIZE = 2, 2, 8 # of the keys and values of a tiny llama
LAST = 12 # most tokens of a sample
MKL_IS_SLOW = decoding.is_mkl_slow


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    "oneDNN's products for tiny models too, and on any processor."
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(decoding, "is_mkl_slow", lambda: True)


def tiny(tokenizer, architecture="llama", scale=10, **kwargs):
    "A model in float64 whose samples end early, late or not at all."
    model = in_float64(fresh(tokenizer, architecture, **kwargs).double()).eval()
    with torch.no_grad(): # peaked distributions that depend on what was read
        for p in model.parameters():
            if p.ndim > 1: p.mul_(scale)
        model.get_output_embeddings().weight[0].mul_(5)
    return model


def drawn(model, tokenizer, n=3, prompts=PROMPTS, **kwargs):
    return sample_candidates(model, tokenizer, prompts, n, **{**dict(
        max_new_tokens=LAST, batch_size=2, seed=3), **kwargs})


def alone(model, prompt, ids):
    "The oracle: logits of each token of one unpadded row, without cache or layout."
    with torch.no_grad(): return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]


def close(ours, theirs, bound):
    ours, theirs = (torch.tensor(x, dtype=torch.float64) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


def forwards(model):
    "Notes the layout of every forward pass."
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["packing"]), with_kwargs=True)
    return seen


# ---- the same as transformers

@pytest.mark.parametrize("architecture", PACKABLE)
def test_greedy_samples_are_those_of_generate(tiny_tokenizer, architecture):
    model = tiny(tiny_tokenizer, architecture)
    ids, reasons, _ = drawn(model, tiny_tokenizer, n=2, temperature=0)
    for prompt, ours in zip(PROMPTS, ids):
        inputs = torch.tensor([prompt])
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False,
                             max_new_tokens=LAST, suppress_tokens=[1], eos_token_id=0,
                             pad_token_id=1)
        assert ours == [out[0, len(prompt):].tolist()] * 2


@pytest.mark.parametrize("sampling", [dict(), dict(temperature=.7, top_p=.8), dict(top_k=3)])
@pytest.mark.parametrize("architecture", PACKABLE)
def test_samples_and_logps_are_those_of_whole_passes(tiny_tokenizer, architecture, sampling):
    "Each token is what its number draws from the logits of a plain pass over prompt and sample."
    model = tiny(tiny_tokenizer, architecture)
    ids, reasons, logps = drawn(model, tiny_tokenizer, **sampling)
    assert len({len(c) for cs in ids for c in cs}) > 1 or sampling
    for i, prompt in enumerate(PROMPTS):
        for j, u in enumerate(uniform_draws(3, i, 3, LAST)):
            logits, tokens = alone(model, prompt, ids[i][j]), torch.tensor(ids[i][j])
            want = logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item()
            assert logps[i][j] == pytest.approx(want, abs=1e-10)
            logits[:, 1] = -torch.inf
            assert draw_tokens(logits, u[:len(tokens)], **sampling).tolist() == ids[i][j]


@pytest.mark.parametrize("architecture, settings", [
    ("mistral", dict(sliding_window=6)), ("gemma2", {}), ("gpt_oss", {})])
def test_attention_that_decoding_does_not_know(tiny_tokenizer, architecture, settings):
    "A window, capped scores, sinks: such models can be packed, and are decoded from plain caches."
    model = tiny(tiny_tokenizer, architecture, **settings)
    length = max(map(len, PROMPTS)) + LAST
    assert supports_packing(model, length)[0] and not attends_plainly(model, length)
    ids, _, logps = drawn(model, tiny_tokenizer)
    for prompt, own, found in zip(PROMPTS, ids, logps):
        wanted = [alone(model, prompt, c).log_softmax(-1).gather(1, torch.tensor(c)[:, None]).sum()
                  for c in own]
        close(found, wanted, 1e-8)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_all_ways_draw_the_same(tiny_tokenizer, architecture, monkeypatch):
    """Pitfall 3: prompts kept once; caches repeated, padded on the left, their positions counted
    from each prompt's first token; `generate` with a prompt per sample."""
    model = tiny(tiny_tokenizer, architecture)
    want, seen = drawn(model, tiny_tokenizer), forwards(model)
    monkeypatch.setattr(decoding, "supports_packing", lambda *_: (False, "a test"))
    model._forward_pre_hooks.clear()
    repeated = drawn(model, tiny_tokenizer)
    monkeypatch.setattr(decoding, "refuse_sharing", lambda model: "a test")
    for other, bound in ((repeated, 1e-10), (drawn(model, tiny_tokenizer), 1e-4)):
        assert other[:2] == want[:2]
        close(other[2], want[2], bound)
    assert not seen


def test_an_adapter_is_part_of_the_policy(tiny_tokenizer):
    model = add_lora(tiny(tiny_tokenizer), {"r": 2, "init_lora_weights": False}).double().eval()
    ids, _, logps = drawn(model, tiny_tokenizer)
    want = [[alone(model, p, c).log_softmax(-1)[range(len(c)), c].sum() for c in cs]
            for p, cs in zip(PROMPTS, ids)]
    close(logps, want, 1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_low_precision(tiny_tokenizer, architecture):
    "bf16 weights, and bf16 autocast over fp32: log-probs as near to fp32's as a plain pass's."
    model = tiny(tiny_tokenizer, architecture, scale=2).float()
    for low, context in ((model, torch.autocast("cpu", torch.bfloat16)),
                         (model.bfloat16(), torch.no_grad())):
        with context:
            ids, _, logps = drawn(low, tiny_tokenizer)
            plain = [[alone(low, p, c).float().log_softmax(-1)[range(len(c)), c].sum().item()
                      for c in cs] for p, cs in zip(PROMPTS, ids)]
        close(logps, plain, .1)


# ---- the company of a sample

@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_company_changes_nothing(tiny_tokenizer, batch_size):
    "Prompts that take the place of ended samples, or are read with others, or alone."
    model = tiny(tiny_tokenizer)
    want = drawn(model, tiny_tokenizer)
    ours = drawn(model, tiny_tokenizer, batch_size=batch_size)
    assert ours[:2] == want[:2]
    close(ours[2], want[2], 1e-10)


def test_prompts_are_read_once_and_samples_token_by_token(tiny_tokenizer, monkeypatch):
    "What the model is given: every prompt's tokens once, every sample's but the last once."
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 10) # a longer prompt is read alone
    model = tiny(tiny_tokenizer)
    seen = forwards(model)
    ids, *_ = drawn(model, tiny_tokenizer)
    reads = [x for x in seen if isinstance(x, decoding._NewPrompts)]
    assert sorted(i for x in reads for i in x.numbers) == list(range(len(PROMPTS)))
    assert all(x.input_ids.numel() <= 10 or len(x.numbers) == 1 for x in reads)
    assert len(reads) < len(PROMPTS) # some are read together
    assert sum(x.input_ids.numel() for x in reads) == sum(map(len, PROMPTS))
    steps = [x for x in seen if isinstance(x, decoding._NextTokens)]
    assert sum(x.input_ids.numel() for x in steps) == sum(len(c) - 1 for cs in ids for c in cs)


def test_the_batch_stays_full(tiny_tokenizer):
    "While a prompt waits, a step never has room for its samples; no step has more rows than slots."
    model, n, batch_size = tiny(tiny_tokenizer), 3, 2
    seen = forwards(model)
    ids, *_ = drawn(model, tiny_tokenizer, n=n, batch_size=batch_size)
    assert len({len(c) for cs in ids for c in cs}) > 3 # else nothing makes room
    waiting, uneven = len(PROMPTS), 0
    for layout in seen:
        if isinstance(layout, decoding._NewPrompts): waiting -= len(layout.numbers)
        else:
            rows = layout.input_ids.numel()
            assert rows <= n * batch_size and (not waiting or rows > n * (batch_size - 1))
            uneven += len(layout.places.unique()) > 1
    assert waiting == 0 and uneven # samples of different ages stand side by side


def test_samples_are_told_of_as_they_end(tiny_tokenizer):
    model, told = tiny(tiny_tokenizer), []
    ids, *_ = drawn(model, tiny_tokenizer, on_batch=lambda *counts: told.append(counts))
    flat = [c for cs in ids for c in cs]
    assert len(told) > 3 and [sum(x) for x in zip(*told)] == [len(flat), sum(map(len, flat))]


def test_no_prompts_no_samples(tiny_tokenizer):
    assert tuple(drawn(tiny(tiny_tokenizer), tiny_tokenizer, prompts=[])) == ([], [], [])


# ---- products

def test_quick_products_are_the_same_products(tiny_tokenizer):
    "fp32 to rounding, with a bias, on any shape and layout; afterwards every layer is as it was."
    layers = torch.nn.ModuleList([torch.nn.Linear(24, 40), torch.nn.Linear(24, 7, bias=False)])
    rows = [torch.randn(24), torch.randn(5, 24), torch.randn(1, 9, 24), torch.randn(24, 6).T]
    want = [layer(x) for layer in layers for x in rows]
    with torch.no_grad(), decoding.quick_products(layers):
        assert all("forward" in vars(layer) for layer in layers)
        ours = [layer(x) for layer in layers for x in rows]
        with torch.autocast("cpu", torch.bfloat16):
            assert layers[0](rows[1]).dtype == torch.bfloat16
    for a, b in zip(ours, want): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(KeyError), decoding.quick_products(layers): raise KeyError
    assert not any("forward" in vars(layer) for layer in layers)
    assert layers[0](rows[1]).requires_grad


@pytest.mark.parametrize("name, value", [("LARGE", 24*40 + 1), ("is_mkl_slow", lambda: False)])
def test_where_mkl_is_quick_layers_keep_it(monkeypatch, name, value):
    "On a processor of MKL's maker, and where a product is small."
    monkeypatch.setattr(decoding, name, value)
    layer = torch.nn.Linear(24, 40)
    with decoding.quick_products(layer): assert "forward" not in vars(layer)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the maker stands in /proc/cpuinfo")
def test_the_makers_name_decides(monkeypatch):
    read = Path.read_text
    for maker, slow in [("GenuineIntel", False), ("AuthenticAMD", True)]:
        monkeypatch.setattr(Path, "read_text", lambda path, *args: f"vendor_id : {maker}\n"
                            if str(path) == "/proc/cpuinfo" else read(path, *args))
        assert MKL_IS_SLOW.__wrapped__() is (slow and torch.backends.mkl.is_available())


class Sharded(torch.nn.Linear):
    "A layer with a forward of its own."

def test_other_layers_keep_their_products(tiny_tokenizer):
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4).bfloat16(),
                                 Sharded(4, 4), torch.nn.Linear(4, 4)])
    offloaded = model[3].forward = lambda x: x
    with decoding.quick_products(model):
        assert not any("forward" in vars(layer) for layer in model[:3])
        assert model[3].forward is offloaded
    assert model[3].forward is offloaded


@pytest.mark.parametrize("architecture", PACKABLE)
def test_logps_in_fp32(tiny_tokenizer, architecture):
    "Against whole passes in float64; biases are not zero, as they are in a new model."
    model = tiny(tiny_tokenizer, architecture, scale=4)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p.add_(torch.linspace(-.2, .2, len(p)))
    ids, _, logps = drawn(model.float(), tiny_tokenizer)
    model.double()
    close(logps, [[alone(model, p, c).log_softmax(-1)[range(len(c)), c].sum().item() for c in cs]
                  for p, cs in zip(PROMPTS, ids)], 2e-4)


# ---- memory

class Watched(SampleCache):
    "A cache whose size is noted when a step has written into all of its layers."
    def __init__(self, *args):
        super().__init__(*args)
        self.sizes, Watched.last = [], self

    def write(self, layer, *args):
        found = super().write(layer, *args)
        if layer == LAYERS - 1: self.sizes.append(self.size())
        return found


TOKEN = 2 * LAYERS * HEADS * SIZE * 8 # bytes of keys and values of a token, in float64

def test_the_cache_holds_each_prompt_once(tiny_tokenizer, monkeypatch):
    "P + n(T - 1) tokens per prompt, with nothing for padding; at the end all prompts are gone."
    monkeypatch.setattr(decoding, "SampleCache", Watched)
    model, n = tiny(tiny_tokenizer), 3
    drawn(model, tiny_tokenizer, n=n, batch_size=len(PROMPTS))
    assert Watched.last.sizes[0] == TOKEN * sum(len(p) + n * (LAST - 1) for p in PROMPTS)
    assert not Watched.last.prompts
    drawn(model, tiny_tokenizer, n=n, batch_size=2)
    longest = sum(sorted(map(len, PROMPTS))[-2 * n:]) # as many prompts as there are slots
    assert max(Watched.last.sizes) <= TOKEN * (longest + 2 * n * (LAST - 1))


def test_the_cache_shrinks_as_the_last_samples_end(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(decoding, "SampleCache", Watched)
    model, n = tiny(tiny_tokenizer), 8
    seen = forwards(model)
    ids, *_ = drawn(model, tiny_tokenizer, n=n, batch_size=len(PROMPTS))
    steps = [x for x in seen if isinstance(x, decoding._NextTokens)]
    lengths, slots = sorted(map(len, PROMPTS)), []
    for layout, size in zip(steps, Watched.last.sizes, strict=True):
        prompts = sum(lengths[number] for number, _ in layout.groups)
        slots.append((size / TOKEN - prompts) / (LAST - 1))
        assert layout.input_ids.numel() <= slots[-1] < 2 * layout.input_ids.numel()
    assert slots[-1] < slots[0] == n * len(PROMPTS)


# ---- drawing

SAMPLING = [dict(), dict(temperature=.6), dict(temperature=1.7, top_p=.7), dict(top_k=5),
            dict(top_k=20, top_p=.8)]

@settings(max_examples=150, deadline=None, derandomize=True)
@given(size=st.sampled_from([1, 2, 255, 256, 257, 512, 700, 1025]), seed=st.integers(0, 10**6),
       spread=st.floats(0, 12), sampling=st.sampled_from(SAMPLING))
def test_a_number_draws_what_the_plain_sum_says(size, seed, spread, sampling):
    "Against the cumulative sum of every probability in float64, outside rounding of its steps."
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, size, generator=rng) * spread
    u = torch.rand(20, dtype=torch.float64, generator=rng)
    u[:2] = torch.tensor([0., 1 - 2**-53])
    cdf = sampling_probs(logits, **sampling).double().cumsum(-1)
    cdf /= cdf[:, -1:].clone()
    token = draw_tokens(logits, u, **sampling)[:, None]
    low = torch.where(token > 0, cdf.gather(1, (token - 1).clamp(min=0)), 0.)[:, 0]
    high = cdf.gather(1, token)[:, 0]
    assert (high > low).all() # the token has a probability
    assert ((low - 1e-6 <= u) & (u <= high + 1e-6)).all()
    plain = torch.searchsorted(cdf, u[:, None], right=True)
    clear = ((cdf - u[:, None]).abs() > 1e-6).all(1)
    assert torch.equal(token[clear], plain[clear]) and (clear.sum() > 5 or sampling or size == 1)


def test_the_ban_is_lifted_for_the_logps(tiny_tokenizer):
    "A token that is a million times likelier and never drawn: the others' odds stay exact."
    logits = torch.tensor([[1., 40., 0., -1.]]).repeat(4000, 1)
    drawing = decoding._Drawing(uniform_draws(0, 0, 4000, 1), 1, {})
    want = logits[0].double().log_softmax(-1)
    drawing.draw(logits.clone(), torch.arange(4000))
    tokens = drawing.ids[:, 0]
    torch.testing.assert_close(drawing.logps, want[tokens], atol=1e-5, rtol=0)
    q = torch.tensor([1., -torch.inf, 0., -1.]).double().softmax(-1)
    share = tokens.bincount(minlength=4) / 4000
    assert share[1] == 0 and ((share - q).abs() <= 4 * (q * (1 - q) / 4000).sqrt()).all()
