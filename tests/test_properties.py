"Truths that hold whatever the numbers: losses, packed candidates, recipes."
import copy, math, tempfile
from pathlib import Path

import pytest, torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from vcb_nb import packing
from vcb_nb.artifacts import InputError
from vcb_nb.logprobs import candidate_logps, collate_candidates, sequence_logps
from vcb_nb.losses import LOSSES, preference_loss
from vcb_nb.models import new_policy
from vcb_nb.packing import pack_candidates
from vcb_nb.recipes import load_recipe, save_recipe

close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:With two candidates")
every_loss = pytest.mark.parametrize("name", LOSSES)
# Those of which only differences of log-ratios count; the others weigh the best response's log π.
RELATIVE = [name for name in LOSSES if LOSSES[name].uses_reference]


def some(examples):
    return settings(max_examples=examples, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- losses ---------------------------------------------------------------------------------

@st.composite
def batches(draw, largest=20., lowest=-40., width=6):
    "logps, ref_logps, rewards, mask, lengths of 1 to 4 prompts with 2 to 6 candidates, float64."
    prompts, n = draw(st.integers(1, 4)), draw(st.integers(2, width))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(prompts, n, generator=g, dtype=torch.float64)
    level = draw(st.floats(-largest, largest))
    rewards = level + draw(st.floats(.01, largest)) * (uniform() - .5)
    logps, ref = lowest * uniform(), lowest * uniform()
    mask = uniform() > draw(st.sampled_from([0., .3, .7]))
    return logps, ref, rewards, mask, torch.randint(1, 30, (prompts, n), generator=g)


def loss_of(name, logps, ref, rewards, mask=None, lengths=None, **kwargs):
    return preference_loss(name, logps, ref, rewards, mask, lengths, **kwargs)


def shifts(mask):
    "A constant for each prompt."
    return torch.arange(1., len(mask) + 1, dtype=torch.float64)[:, None]


@every_loss
@some(15)
@given(batches())
def test_a_constant_in_the_rewards_changes_nothing(name, batch):
    "Any loss that reads the rewards' level would pay for what Z(x) hides."
    logps, ref, rewards, mask, lengths = batch
    close(loss_of(name, logps, ref, rewards + shifts(mask), mask, lengths),
          loss_of(name, *batch), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RELATIVE)
@some(15)
@given(batches())
def test_a_constant_in_the_log_ratios_changes_nothing(name, batch):
    "What a prompt's candidates share cancels: log Z(x), and a reference off by a constant."
    logps, ref, rewards, mask, lengths = batch
    close(loss_of(name, logps, ref - shifts(mask), rewards, mask, lengths),
          loss_of(name, *batch), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RELATIVE)
@some(15)
@given(batches())
def test_a_prompts_gradients_sum_to_zero(name, batch):
    "What one candidate gains the others lose: no pull on all responses of a prompt at once."
    logps = batch[0].clone().requires_grad_()
    loss_of(name, logps, *batch[1:]).sum().backward()
    scale = logps.grad.abs().sum(1) + 1
    assert (logps.grad.sum(1).abs() <= 1e-10 * scale).all()


@every_loss
@some(15)
@given(batches(), st.integers(1, 4), st.sampled_from([math.nan, math.inf, -math.inf, 0., 7.]))
def test_absent_candidates_change_nothing(name, batch, extra, garbage):
    "A batch padded to a greater n, whatever stands there, gives the same, to the last bit or so."
    longer = [torch.cat([x, torch.full((len(x), extra), garbage).to(x.dtype)], 1)
              for x in batch[:3]]
    lengths = torch.cat([batch[4], torch.zeros(len(batch[4]), extra, dtype=torch.long)], 1)
    mask = torch.cat([batch[3], torch.zeros(len(batch[3]), extra, dtype=torch.bool)], 1)
    close(loss_of(name, *longer, mask, lengths), loss_of(name, *batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in LOSSES if not LOSSES[n].order_based])
@some(15)
@given(batches(), st.floats(1e-3, 1e3))
def test_the_unit_of_the_rewards_does_not_matter(name, batch, unit):
    "Rewards and σ in another unit are the same rewards."
    logps, ref, rewards, mask, lengths = batch
    sigma = shifts(mask)[:, 0]
    close(loss_of(name, logps, ref, unit * rewards, mask, lengths, sigma=unit * sigma),
          loss_of(name, *batch, sigma=sigma), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].order_based])
@some(15)
@given(batches(), st.floats(1e-3, 1e3))
def test_order_based_losses_do_not_see_the_unit(name, batch, unit):
    logps, ref, rewards, mask, lengths = batch
    assert torch.equal(loss_of(name, logps, ref, unit * rewards, mask, lengths),
                       loss_of(name, *batch))


@every_loss
@some(15)
@given(batches())
def test_no_loss_is_negative(name, batch):
    "Squares, hinges, divergences, and -log π: none goes below 0 but by rounding."
    assert (loss_of(name, *batch) >= -1e-12).all()


@every_loss
@some(15)
@given(batches(largest=1e6, lowest=-1e4), st.sampled_from([torch.float32, torch.float64]))
def test_extreme_numbers_give_finite_ones(name, batch, dtype):
    "Rewards to a million, log-probs to -10 000: no overflow in the value, no NaN in the gradient."
    logps, ref, rewards = (x.to(dtype) for x in batch[:3])
    logps.requires_grad_()
    loss = loss_of(name, logps, ref, rewards, *batch[3:])
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()


@every_loss
@some(15)
@given(batches(lowest=-300.))
def test_float32_is_float64_rounded(name, batch):
    "The same float32 numbers: what differs is the arithmetic alone."
    low = [x.float() for x in batch[:3]]
    got = loss_of(name, *low, *batch[3:])
    want = loss_of(name, *(x.double() for x in low), *batch[3:])
    assert got.dtype is torch.float32
    close(got.double(), want, rtol=1e-4, atol=1e-4)


# --- packing --------------------------------------------------------------------------------

tokens = lambda least, most: st.lists(st.integers(2, 60), min_size=least, max_size=most)


@st.composite
def groups(draw):
    "Prompts and their ragged candidates; one-token responses, duplicates, prompts without any."
    prompts = draw(st.lists(tokens(1, 6), min_size=1, max_size=4))
    completions = [draw(st.lists(st.one_of(st.just([0]), tokens(1, 7)), max_size=4))
                   for _ in prompts]
    assume(any(completions))
    if draw(st.booleans()):
        completions = [cs + cs[:1] for cs in completions]
    return prompts, completions


@pytest.fixture(scope="module")
def neox(tiny_tokenizer):
    return new_policy(tiny_tokenizer, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                      initializer_range=.3).double()


def with_gradient(model, logps):
    "Values, and the gradient of a weighted sum for every parameter."
    weights = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64).view_as(logps)
    model.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), [p.grad.clone() for p in model.parameters()]


@some(25)
@given(batch=groups(), columns=st.integers(1, 9), keep=st.booleans())
def test_packed_is_rows(neox, batch, columns, keep):
    """Pitfall 6: any shape of batch gives the log-probs and gradients of rows, in any blocks of
    the head, kept or computed again."""
    model = copy.deepcopy(neox)
    expected = with_gradient(model, sequence_logps(model, collate_candidates(*batch)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "HEAD_BLOCK", 1)
        patch.setattr(packing, "HEAD_COLUMNS", columns)
        logps = candidate_logps(model, *batch, "shared", head_bytes=2**30 if keep else 1)
        ours = with_gradient(model, logps)
    close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_target_beyond_the_vocabulary_gets_no_log_prob(neox, monkeypatch):
    "It is never embedded, being the last, and here the vocabulary ends with a block of the head."
    monkeypatch.setattr(packing, "HEAD_BLOCK", 1)
    monkeypatch.setattr(packing, "HEAD_COLUMNS", 1)
    beyond = neox.config.vocab_size
    said = f"token id {beyond}, and the model knows 0 to {beyond - 1}"
    with pytest.raises(InputError, match=said):
        sequence_logps(neox, pack_candidates([[3, 4]], [[[5, beyond], [6]]]))


@some(50)
@given(groups(), st.booleans())
def test_the_layout_holds_everything_once(batch, whole):
    "Every prompt once, then each response, with its last token or not, at its place after it."
    layout = pack_candidates(*batch, whole)
    ids, positions = layout.input_ids[0].tolist(), layout.position_ids[0].tolist()
    predict, targets, start, token = layout.predict.tolist(), layout.targets.tolist(), 0, 0
    for prompt, completions in zip(*batch):
        if not completions: continue
        assert ids[start:start + len(prompt)] == prompt
        last, at = start + len(prompt) - 1, start + len(prompt)
        for completion in completions:
            places = [last, *range(at, at + len(completion) - 1)]
            assert predict[token:token + len(completion)] == places
            assert targets[token:token + len(completion)] == completion
            assert [ids[p] for p in places[1:]] == completion[:-1]
            ends = range(len(prompt) - 1, len(prompt) - 1 + len(completion))
            assert [positions[p] for p in places] == list(ends)
            if whole: assert ids[places[-1] + 1 if len(completion) > 1 else at] == completion[-1]
            token, at = token + len(completion), at + len(completion) - 1 + whole
        start = at
    assert start == len(ids) == sum(sum(group) for group in layout.groups)
    assert token == len(targets) and layout.mask.sum(1).tolist() == [len(cs) for cs in batch[1]]


# --- recipes --------------------------------------------------------------------------------

numbers = st.floats(1e-6, 1e6, allow_nan=False)
names = st.from_regex(r"[A-Za-zé][A-Za-z0-9é_.+= -]{0,8}", fullmatch=True)
FIELDS = {"sample": {"n": st.integers(1, 99), "temperature": numbers, "limit": st.none(),
                     "policy": names, "dtype": st.one_of(st.none(), st.just("bfloat16"))},
          "sft": {"learning_rate": numbers, "max_steps": st.integers(1, 10**6),
                  "bf16": st.booleans(), "model_config": st.dictionaries(names, numbers),
                  "report_to": st.lists(names, max_size=2)},
          "data": {"pairs": st.lists(names, max_size=3), "test_share": numbers}}
sections = {name: st.fixed_dictionaries({}, optional=fields) for name, fields in FIELDS.items()}
methods = st.dictionaries(names, st.fixed_dictionaries({"loss": st.sampled_from(sorted(LOSSES))},
                          optional={"learning_rate": numbers, "seed": st.integers(0, 99)}))
recipes = st.fixed_dictionaries(
    {"name": names, "seed": st.integers(0, 2**31)},
    optional={**sections, "output_dir": names, "calibrate": st.builds(dict, methods=methods)})


def loaded(recipe, overrides=None):
    "A recipe written to a file and read."
    with tempfile.TemporaryDirectory() as folder:
        return load_recipe(str(save_recipe(recipe, Path(folder)/"r.yaml")), overrides)


@some(20)
@given(recipes)
def test_a_recipe_survives_its_file(recipe):
    "load → dump → load is the identity, types included; and what was written is what is read."
    once = loaded(recipe)
    assert loaded(once) == once
    assert repr(loaded(once)) == repr(once)
    assert once | recipe == once


def leaves(tree, at=()):
    "Dotted path → value of every leaf."
    if not isinstance(tree, dict) or not tree: return {at: tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, (*at, key)).items()}


@some(40)
@given(recipes, st.sampled_from([("sample.n", 7), ("sft.learning_rate", 1e-3), ("seed", 5),
                                 ("sft.bf16", True), ("data.pairs", ["x", "y"]),
                                 ("calibrate.methods.own.loss", "dpo"), ("sft.dtype", "bfloat16")]))
def test_an_override_changes_its_key_alone(recipe, override):
    "All other fields stay as they were, whatever the recipe."
    key, value = override
    before, after = leaves(loaded(recipe)), leaves(loaded(recipe, {key: value}))
    path = tuple(key.split("."))
    assert after.pop(path) == value
    before = {p: v for p, v in before.items() if p != path}
    # An empty section that gets its first field is no leaf any more.
    before = {p: v for p, v in before.items() if path[:len(p)] != p}
    assert after == before


@some(40)
@given(recipes, numbers)
def test_an_override_is_read_as_yaml(recipe, value):
    "A number given as text, also as 1e-05, arrives as that number."
    got = loaded(recipe, {"sft.learning_rate": repr(value)})["sft"]["learning_rate"]
    assert type(got) is float and got == value
