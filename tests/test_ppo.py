"PPO's pieces against their definitions, and its gradient against the exact one, in float64."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vcb_nb.loading import load_policy
from vcb_nb.logprobs import choose_way, lay_out
from vcb_nb.loading import new_reward_model
from vcb_nb.models import new_policy
from vcb_nb.ppo import (PPOSettings, ValueModel, adapted_beta, clipped_surrogate,
                        clipped_value_loss, generalised_advantages, last_token, load_value_model,
                        moments, token_rewards, whiten)
from vcb_nb.saving import save_model
from vcb_nb.worlds import StringLM, enumerate_strings

close = torch.testing.assert_close


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(lengths, width): return torch.arange(width) < torch.tensor(lengths)[:, None]


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(LENGTHS, st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_advantages_are_the_double_sum(lengths, seed, discount, lam):
    "Also where there is rubbish behind the end: no token of padding reaches an advantage."
    mask, width = masked(lengths, 7), 7
    rewards, values = draw(2, len(lengths), width, seed=seed).masked_fill(~mask, math.nan)
    found = generalised_advantages(rewards, values, mask, discount, lam)
    assert (found[~mask] == 0).all()
    for i, length in enumerate(lengths):
        r, v = rewards[i, :length].tolist(), [*values[i, :length].tolist(), 0.]
        delta = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
        want = [sum((discount * lam)**(k - t) * delta[k] for k in range(t, length))
                for t in range(length)]
        close(found[i, :length], torch.tensor(want, dtype=torch.float64))


@given(LENGTHS, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_token_rewards_add_up_to_the_objective(lengths, seed):
    "The score stands at the last token, the KL at every one, nothing behind the end."
    mask, scores = masked(lengths, 7), draw(len(lengths), seed=seed)
    logratios = draw(len(lengths), 7, seed=seed + 1).masked_fill(~mask, math.nan)
    found = token_rewards(scores, logratios, mask, beta=.3)
    kl = logratios.masked_fill(~mask, 0.).sum(1)
    close(found.sum(1), scores - .3 * kl)
    assert (found[~mask] == 0).all()
    free = token_rewards(scores, torch.zeros_like(logratios), mask, beta=.3)
    assert [row.nonzero().flatten().tolist() for row in free] == [[n - 1] for n in lengths]
    assert last_token(mask).sum(1).tolist() == [1] * len(lengths)


def test_whitening_sees_tokens_only():
    "Twice the padding changes nothing; the mean stays where it is to stay."
    mask = masked([4, 2, 1], 4)
    values = 3 + 2 * draw(3, 4)
    white = whiten(values, mask)
    mean, variance = moments(white[mask])
    close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
    close(variance, torch.ones_like(variance), atol=1e-7, rtol=0)
    wide = torch.cat([values, torch.full((3, 4), 1e6, dtype=torch.float64)], 1)
    close(whiten(wide, masked([4, 2, 1], 8))[:, :4], white)
    kept = whiten(values, mask, shift_mean=False)
    close(kept[mask].mean(), values[mask].mean())
    close(kept[mask] - kept[mask].mean(), white[mask])


def test_equal_numbers_do_not_explode():
    mask = masked([3], 3)
    assert whiten(torch.full((1, 3), 5.), mask).abs().max() == 0


def test_the_surrogate_by_hand():
    "Which of the two counts, for both signs of the advantage, and that the old policy is fixed."
    old = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    logps = torch.tensor([.1, .5, .5, -.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1., 1., -1., -1.], dtype=torch.float64)
    loss, clipped = clipped_surrogate(logps, old, advantages, .2)
    close(loss, -torch.tensor([math.exp(.1), 1.2, -math.exp(.5), -.8], dtype=torch.float64))
    assert clipped.tolist() == [False, True, False, True]
    loss.sum().backward()
    assert old.grad is None
    close(logps.grad, -torch.tensor([math.exp(.1), 0, -math.exp(.5), 0], dtype=torch.float64))


def test_the_value_loss_by_hand():
    "A value that has moved too far, towards its return or away from it."
    values, old = torch.tensor([.1, .5, -.5]), torch.zeros(3)
    loss, held = clipped_value_loss(values, old, torch.ones(3), .2)
    close(loss, .5 * torch.tensor([.9**2, .8**2, 1.5**2]))
    assert held.tolist() == [False, True, False]


def test_beta_follows_the_kl():
    assert adapted_beta(1., kl=3., target=2., samples=100, horizon=1000) == pytest.approx(1.02)
    assert adapted_beta(1., kl=1., target=2., samples=100, horizon=1000) == pytest.approx(.98)
    assert adapted_beta(1., kl=2.2, target=2., samples=100, horizon=1000) == pytest.approx(1.01)
    assert adapted_beta(1., kl=2., target=2., samples=100, horizon=1000) == 1


def exact_world():
    "A policy, its reference, all strings of three tokens, and a reward of each."
    strings = enumerate_strings(3, 3)
    rewards = draw(len(strings.ids), seed=5)
    return StringLM(3, 8, seed=0), StringLM(3, 8, seed=1), strings, rewards


def strings_token_logps(model, strings):
    "log π of each token of each string, after the prompt 1: `[K, T]`, and where the tokens are."
    start = torch.ones(len(strings.ids), 1, dtype=torch.long)
    logits = model(torch.cat([start, strings.ids], 1)[:, :-1])
    logps = logits.log_softmax(-1).gather(2, strings.ids[..., None])[..., 0]
    mask = torch.arange(strings.ids.shape[1]) < strings.lengths[:, None]
    return logps.masked_fill(~mask, 0.), mask


@pytest.mark.parametrize("beta", [0., .3])
def test_the_expected_gradient_is_that_of_the_objective(beta):
    """Σ_y π(y) ∇(surrogate of y) = −∇(E r − β KL), summed over all strings, for λ = 1 and for
    any value that depends on what came before. The KL's sign, the place of the score and the
    masks are all in it."""
    policy, reference, strings, rewards = exact_world()
    logps, mask = strings_token_logps(policy, strings)
    ref = strings_token_logps(reference, strings)[0].detach()
    total = logps.sum(1)
    objective = (total.exp() * (rewards - beta * (total - ref.sum(1)))).sum()
    want = torch.autograd.grad(objective, policy.parameters())
    # A value for each prefix: what the tokens before t were.
    places = torch.arange(3)
    prefix = [(strings.ids * (places < t) * 3**places).sum(1) for t in range(3)]
    values = torch.stack([draw(200, seed=t)[p] for t, p in enumerate(prefix)], 1)
    logps, mask = strings_token_logps(policy, strings)
    old = logps.detach()
    found = token_rewards(rewards, old - ref, mask, beta)
    advantages = generalised_advantages(found, values, mask, lam=1.)
    loss, _ = clipped_surrogate(logps, old, advantages)
    mean = (old.sum(1).exp() * loss.masked_fill(~mask, 0.).sum(1)).sum()
    for ours, theirs in zip(torch.autograd.grad(mean, policy.parameters()), want):
        close(ours, -theirs, atol=1e-12, rtol=1e-9)


def test_ppo_reaches_the_optimum_of_its_beta():
    """A table of eight responses: fresh samples, four passes in two parts, whitened advantages,
    a learned value, a rate that falls to 0. Whitening blows up what noise is left, so the end is
    near the optimum, not at it."""
    torch.manual_seed(0)
    reference, rewards, beta = torch.log_softmax(draw(8, seed=2), 0), draw(8, seed=3), .5
    optimum = torch.log_softmax(reference + rewards / beta, 0)
    logits = reference.clone().requires_grad_()
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits, value], lr=.02, eps=1e-5)
    mask, kl = torch.ones(256, 1, dtype=torch.bool), lambda: (
        logits.log_softmax(0).exp() * (logits.log_softmax(0) - optimum)).sum().item()
    begin, steps = kl(), 120
    for step in range(steps):
        adam.param_groups[0]["lr"] = .02 * (1 - step / steps)
        policy = logits.detach().log_softmax(0)
        drawn = torch.multinomial(policy.exp(), 256, replacement=True)
        old, values = policy[drawn][:, None], value.detach().expand(256, 1)
        found = token_rewards(rewards[drawn], old - reference[drawn][:, None], mask, beta)
        advantages = generalised_advantages(found, values, mask)
        returns, advantages = advantages + values, whiten(advantages, mask)
        for _ in range(4):
            for part in torch.randperm(256).split(128):
                logps = logits.log_softmax(0)[drawn[part]][:, None]
                push, _ = clipped_surrogate(logps, old[part], advantages[part])
                error, _ = clipped_value_loss(value.expand(128, 1), values[part], returns[part])
                adam.zero_grad()
                (push + .1 * error).mean().backward()
                adam.step()
    assert begin > .4 and kl() < .01, kl()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    policy = new_policy(tiny_tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    place = tmp_path_factory.mktemp("models")
    save_model(policy, tiny_tokenizer, place/"policy")
    judge = new_reward_model(place/"policy", tiny_tokenizer, seed=3)
    save_model(judge, tiny_tokenizer, place/"judge")
    return place


IDS = [[5, 6], [7]], [[[8, 9, 0], [9]], [[5, 5, 0], [6, 0]]]


def test_values_are_scores_of_prefixes(folder, tiny_tokenizer):
    "The value before a token is what the reward model says of all before it; packed or in rows."
    value = load_value_model(folder/"judge", folder/"policy", tiny_tokenizer, dtype="float64")
    rows = value(lay_out(*IDS, "rows"))
    with torch.no_grad():
        for row, (prompt, own) in zip(rows, [(p, c) for p, cs in zip(*IDS) for c in cs]):
            for t in range(3):
                ids = torch.tensor([[*prompt, *own[:t]]])
                score = value.model(ids).logits[0, 0] if t < len(own) else torch.zeros(()).double()
                close(row[t].detach(), score, atol=1e-6, rtol=1e-6)
    choose_way(value.model, "shared")
    close(value(lay_out(*IDS, "shared")), rows, atol=1e-9, rtol=1e-9)


def test_a_new_value_head_starts_at_zero(folder, tiny_tokenizer):
    value = load_value_model(None, folder/"policy", tiny_tokenizer)
    assert isinstance(value, ValueModel) and (value(lay_out(*IDS, "rows")) == 0).all()
    trunk = load_policy(folder/"policy").base_model.state_dict()
    for name, weight in value.model.base_model.state_dict().items(): close(weight, trunk[name])


@pytest.mark.parametrize("name, value", [
    ("beta", -.1), ("lam", 1.1), ("discount", -1), ("epsilon", 0.), ("horizon", 0.),
    ("target_kl", -1.), ("value_epsilon", math.inf), ("beta", math.nan)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "): PPOSettings(**{name: value})
