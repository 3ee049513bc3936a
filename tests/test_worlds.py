"""Exact worlds: the optimum, the frontier and the end point of each method,
and the library's sequence functions against sums over every string."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.testing import assert_close

from vcb_nb.losses import LOSSES, preference_loss
from vcb_nb.worlds import (StringLM, TableWorld, draw_candidates, entropy, enumerate_strings,
                           expected, fit_table, frontier_efficiency, frontier_reward,
                           kl_divergence, log_partition, optimal_policy, policy_at_kl, random_world,
                           string_logps, string_world, table_world)

FEW = settings(max_examples=20, deadline=None)


@st.composite
def worlds(draw, most=8):
    """One or two prompts with 2 to `most` responses, rewards up to 10 and at least .1 apart
    somewhere."""
    prompts, k = draw(st.integers(1, 2)), draw(st.integers(2, most))
    table = lambda bound: draw(st.lists(st.lists(st.floats(-bound, bound), min_size=k, max_size=k),
                                        min_size=prompts, max_size=prompts))
    logits, rewards = torch.tensor(table(4.), dtype=torch.float64), table(10.)
    assume(all(max(r) - min(r) >= .1 for r in rewards))
    return table_world(logits.exp(), rewards)


GAMMAS = st.floats(.1, 10)


def f64(*values): return torch.tensor(values, dtype=torch.float64)


def newton(world, **kwargs):
    """Settings of the gradient step that is a Newton step of VCB.

    In the logits VCB is 2 Var(gamma l - r/sigma), a quadratic whose Hessian
    (4 gamma^2/(K-1)) (I - 11'/K) is one number on all directions that change the policy: a step by
    its inverse ends at the minimum."""
    gamma, k = kwargs["gamma"], world.rewards.shape[1]
    return dict(optimizer=torch.optim.SGD, lr=(k - 1)/(4*gamma**2)) | kwargs


def log_ratios(world, logps):
    ratios = logps - world.ref_logps
    return ratios - ratios.mean(-1, keepdim=True)


# ---- Z, the optimum, entropies and divergences

@FEW
@given(worlds(), GAMMAS)
def test_partition_and_optimum_by_brute_force(world, gamma):
    """Z is the sum that it says, the optimum is a distribution,
    and its log-ratios are r/(gamma sigma) - log Z."""
    for x, (ref, r) in enumerate(zip(world.ref_logps.tolist(), world.rewards.tolist())):
        p = [math.exp(v) for v in ref]
        mean = sum(a*b for a, b in zip(p, r))
        sigma = sum(a*(b - mean)**2 for a, b in zip(p, r))**.5
        top = max(r)
        z = sum(a*math.exp((b - top)/(gamma*sigma)) for a, b in zip(p, r))
        found = log_partition(world, gamma)[x]
        assert found.item() == pytest.approx(math.log(z) + top/(gamma*sigma), rel=1e-9, abs=1e-9)
        want = torch.tensor([v + b/(gamma*sigma) for v, b in zip(ref, r)],
                            dtype=torch.float64) - found
        assert_close(optimal_policy(world, gamma)[x], want, rtol=1e-9, atol=1e-7)
    assert_close(optimal_policy(world, gamma).exp().sum(1), torch.ones(len(world.rewards)).double())


def test_a_given_sigma_is_used():
    "sigma 1 and gamma = beta give DPO's and IPO's common objective; a number and a tensor agree."
    world = random_world(3, 5)
    want = torch.log_softmax(world.ref_logps + world.rewards/.5, 1)
    assert_close(optimal_policy(world, .5, 1.), want)
    assert_close(optimal_policy(world, .5, torch.ones(3)), want)
    assert_close(optimal_policy(world, .25, 2.), want)
    fit = fit_table(world, "vcb", sigma=torch.ones(3), steps=1, **newton(world, gamma=.5))
    assert fit.kl_to_optimum[-1].max() < 1e-12, "the optimum to measure against has the same sigma"


@FEW
@given(worlds(), GAMMAS, st.integers(0, 1000))
def test_the_optimum_maximises_the_objective(world, gamma, seed):
    """E[r] - gamma sigma KL is gamma sigma log Z at the optimum,
    and lower by gamma sigma KL(pi||pi*) elsewhere."""
    def objective(logps):
        return (expected(logps, world.rewards)/(gamma*world.reward_std)
                - kl_divergence(logps, world.ref_logps))
    best, log_z = optimal_policy(world, gamma), log_partition(world, gamma)
    noise = torch.randn(world.rewards.shape, generator=torch.Generator().manual_seed(seed)).double()
    other = (best + noise).log_softmax(1)
    assert_close(objective(best), log_z, rtol=1e-9, atol=1e-8)
    assert_close(log_z - objective(other), kl_divergence(other, best), rtol=1e-6, atol=1e-8)


def test_entropy_and_divergence_by_definition():
    p, q = (torch.randn(50, 7, generator=torch.Generator().manual_seed(i)).double().log_softmax(1)
            for i in (0, 1))
    assert_close(entropy(p), -(p.exp()*p).sum(1))
    assert_close(kl_divergence(p, q), (p.exp()*(p - q)).sum(1))
    uniform = torch.full((1, 8), -math.log(8.)).double()
    assert_close(entropy(uniform), f64(math.log(8.)))


def test_divergence_at_its_extremes():
    """Neither overflow where a policy all but excludes a response,
    nor cancellation between near equals."""
    uniform = torch.full((1, 3), -math.log(3.)).double()
    for low in (-800., -1e6, -torch.inf):
        sure = f64([0., low, low])
        assert_close(kl_divergence(sure, uniform), f64(math.log(3.)))
        assert_close(entropy(sure), torch.zeros(1).double())
        assert kl_divergence(uniform, sure).item() == (math.inf if low == -math.inf
                                                       else pytest.approx(-math.log(3.) - 2*low/3))
        assert kl_divergence(sure, sure).item() == 0
    step = f64([1e-7, 0., -1e-7])
    found = kl_divergence((uniform + step).log_softmax(1), uniform).item()
    assert found == pytest.approx(1e-14/3, rel=1e-6), "half the variance of the step"
    logits = f64([0., -900., 3.]).requires_grad_()
    kl_divergence(logits.log_softmax(1), uniform).sum().backward()
    assert logits.grad.isfinite().all()


@FEW
@given(worlds(), st.integers(0, 1000), st.floats(1e-6, 300))
def test_divergence_is_never_negative(world, seed, scale):
    noise = torch.randn(world.rewards.shape, generator=torch.Generator().manual_seed(seed)).double()
    other = (world.ref_logps + scale*noise).log_softmax(1)
    for a, b in ((other, world.ref_logps), (world.ref_logps, other)):
        assert (kl_divergence(a, b) >= 0).all()
        assert_close(kl_divergence(a, b), (a.exp()*(a - b)).sum(1), rtol=1e-9, atol=1e-12)


# ---- the frontier

@FEW
@given(worlds(), GAMMAS)
def test_the_optimum_is_on_the_frontier(world, gamma):
    "For every gamma the exact optimum gains all that its KL can buy."
    assert_close(frontier_efficiency(world, optimal_policy(world, gamma)),
                 torch.ones(len(world.rewards)).double(), rtol=0, atol=1e-9)


@FEW
@given(worlds(), st.integers(0, 1000), st.floats(.01, 30))
def test_no_policy_beats_the_frontier(world, seed, scale):
    ref, rewards = world.ref_logps[0], world.rewards[0]
    noise = torch.randn(64, len(ref), generator=torch.Generator().manual_seed(seed)).double()
    tilt = rewards*torch.linspace(0, 20, 64).double()[:, None]/world.reward_std[0]
    policies = torch.cat([scale*noise, ref + scale*noise, ref + tilt + .3*noise]).log_softmax(1)
    many = TableWorld(ref.expand_as(policies), rewards.expand_as(policies))
    assert (frontier_efficiency(many, policies) <= 1 + 1e-9).all()


def test_frontier_against_a_search_over_the_simplex():
    "Three responses: the best of 180,000 policies on a grid comes up to the frontier from below."
    world = table_world([.6, .3, .1], [0., 1., 1.7])
    a = torch.linspace(0, 1, 601).double()
    p = torch.stack(torch.meshgrid(a, a, indexing="ij"), -1).reshape(-1, 2)
    p = p[p.sum(1) <= 1]
    p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1).clamp(min=0)
    kl, reward = kl_divergence(p.log(), world.ref_logps), p @ world.rewards[0]
    for budget in (.01, .1, .5, 1., 2., 2.3):
        found = reward[kl <= budget].max().item()
        assert 0 <= frontier_reward(world, budget).item() - found < .006


@FEW
@given(worlds())
def test_the_frontier_rises_and_is_concave(world):
    "Along KL from 0 to past the largest that pays: from the SFT reward up to the largest reward."
    top = world.ref_logps.masked_fill(world.rewards < world.rewards.amax(1, keepdim=True),
                                      -torch.inf)
    most = -top.logsumexp(1)
    shares = torch.linspace(0, 1.5, 31).double().repeat_interleave(len(most))
    many = TableWorld(*(t.repeat(31, 1) for t in (world.ref_logps, world.rewards)))
    line = frontier_reward(many, most.repeat(31)*shares).reshape(31, -1)
    size = world.rewards.abs().amax(1)
    assert ((line[1:] - line[:-1]) >= -1e-9*size).all()
    assert ((line[2:] - 2*line[1:-1] + line[:-2]) <= 1e-9*size).all()
    assert_close(line[0], expected(world.ref_logps, world.rewards), rtol=1e-12, atol=1e-12)
    assert_close(line[-1], world.rewards.amax(1), rtol=1e-12, atol=1e-12)


def test_the_sft_policy_and_the_best_response_end_the_frontier():
    world = random_world(5, 6)
    start = expected(world.ref_logps, world.rewards)
    assert_close(frontier_reward(world, 0.), start)
    assert (kl_divergence(world.ref_logps, world.ref_logps) == 0).all()
    assert (frontier_efficiency(world, world.ref_logps) == 0).all()
    best = world.rewards.argmax(1, keepdim=True)
    greedy = torch.full_like(world.rewards, -torch.inf).scatter(1, best, 0.)
    assert_close(kl_divergence(greedy, world.ref_logps), -world.ref_logps.gather(1, best)[:, 0])
    assert_close(frontier_efficiency(world, greedy), torch.ones(5).double())
    assert_close(frontier_reward(world, torch.inf), world.rewards.amax(1))
    worst = torch.full_like(world.rewards, -torch.inf).scatter(
        1, world.rewards.argmin(1, keepdim=True), 0.)
    assert (frontier_efficiency(world, worst) < 0).all()


@FEW
@given(worlds())
def test_a_tilt_spends_what_is_asked(world):
    """Along any direction: that KL, log-ratios on a line with it, and the same policy for the
    direction in other units."""
    draw = torch.Generator().manual_seed(1)
    direction = torch.randn(world.rewards.shape, generator=draw).double()
    best = direction.argmax(1, keepdim=True)
    kl = .4 * -world.ref_logps.gather(1, best)[:, 0]      # less than the best response's own
    policy = policy_at_kl(world, kl, direction)
    assert_close(kl_divergence(policy, world.ref_logps), kl, rtol=1e-6, atol=1e-9)
    ratios, line = (t - t.mean(1, keepdim=True) for t in (policy - world.ref_logps, direction))
    tilt = (ratios * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True)
    assert (tilt > 0).all()
    assert_close(ratios, tilt * line, rtol=1e-6, atol=1e-8)
    assert_close(policy_at_kl(world, kl, 7 * direction - 3), policy, rtol=1e-6, atol=1e-6)


def test_two_best_responses_that_differ_by_a_hair_are_told_apart():
    "The tilt is strong enough for a gap of a millionth of the range."
    world = table_world([.5, .25, .25], [-1e3, 1., 1.001])
    assert_close(frontier_reward(world, math.log(4.)), f64(1.001), rtol=1e-9, atol=0)
    tied = table_world([.5, .25, .25], [0., 1., 1.])
    assert_close(frontier_reward(tied, math.log(2.)), torch.ones(1).double())


def test_gaussian_rewards_cost_half_gamma_to_the_minus_two():
    "The meaning of gamma: sigma/gamma of reward for 1/(2 gamma^2) nats, whatever sigma is."
    z = torch.linspace(-16, 16, 3201).double()
    for sigma in (.1, 7.):
        world = table_world((-z.square()/2).exp(), sigma*z + 3)
        for gamma in (4., 1., .5, .2):
            best = optimal_policy(world, gamma)
            assert expected(best, world.rewards).item() - 3 == pytest.approx(sigma/gamma, rel=1e-6)
            assert (kl_divergence(best, world.ref_logps).item()
                    == pytest.approx(.5/gamma**2, rel=1e-6))
    saturated = kl_divergence(optimal_policy(random_world(), .05), random_world().ref_logps)
    assert (saturated < 20).all(), "a finite world saturates far below 200 nats"


# ---- degenerate worlds

@pytest.mark.parametrize("level", [[.3, .3, .3], [.1 + .2, .3, .3 + 1e-17], [0., 0., 0.],
                                   [1e9, 1e9, 1e9 + 1e-7]])
def test_equal_rewards(level):
    """Pitfall 22: with nothing to gain, or a float residue, there is an error or a plain value,
    never a NaN."""
    world = table_world([[.5, .3, .2]]*2, [[0., 1., 2.], level])
    assert world.reward_std[1] == 0 < world.reward_std[0]
    for wrong in (optimal_policy, log_partition, fit_table):
        with pytest.raises(ValueError, match="prompt 1 .* rewards are equal"): wrong(world)
    assert_close(frontier_reward(world, 1.)[1], world.rewards[1].max())
    greedy = torch.tensor([[-torch.inf, -torch.inf, 0.]]*2).double()
    assert frontier_efficiency(world, greedy).tolist() == [pytest.approx(1), 0]
    assert_close(optimal_policy(world, sigma=1.)[1], world.ref_logps[1], rtol=0, atol=1e-6)
    fit = fit_table(world, "dpo", steps=3, sigma=torch.ones(2))
    assert_close(fit.policy[1], world.ref_logps[1])
    assert fit.kl[-1, 0] > 0


def test_wrong_input_is_named():
    world = random_world(2, 3)
    cases = [(lambda: table_world([.5, .5], [1., 2., 3.]), "shape"),
             (lambda: table_world([1.], [1.]), "at least 2"),
             (lambda: table_world(torch.ones(2, 2, 2), torch.ones(2, 2, 2)), "shape"),
             (lambda: table_world([.5, 0.], [1., 2.]), "positive"),
             (lambda: table_world([.5, .5], [1., math.nan]), "finite"),
             (lambda: optimal_policy(world, 0.), "gamma"),
             (lambda: optimal_policy(world, math.nan), "gamma"),
             (lambda: optimal_policy(world, sigma=torch.ones(3)), r"shape \(3,\)"),
             (lambda: optimal_policy(world, sigma=torch.tensor([1., 0.])), "prompt 1 .*positive"),
             (lambda: frontier_reward(world, -1e-3), "nats"),
             (lambda: frontier_reward(world, math.nan), "nats"),
             (lambda: fit_table(world, steps=0), "steps"),
             (lambda: fit_table(world, candidates=torch.tensor([0, 1])), "candidates"),
             (lambda: fit_table(world, "vbc"), "Did you mean 'vcb'"),
             (lambda: enumerate_strings(3, 0), "max_length"),
             (lambda: enumerate_strings(3, 2, eos=3), "end token"),
             (lambda: enumerate_strings(50, 8), "smaller"),
             (lambda: string_logps(StringLM(), enumerate_strings(4, 2), []), "prompt")]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message): wrong()


# ---- where each method ends

@FEW
@given(worlds(), GAMMAS)
def test_vcb_reaches_the_optimum(world, gamma):
    "Identity 13: gradient descent over all responses ends at pi*, here in one step (see `newton`)."
    fit = fit_table(world, "vcb", steps=1, **newton(world, gamma=gamma))
    assert fit.kl_to_optimum[-1].max() < 1e-8


@FEW
@given(worlds(), GAMMAS, st.floats(.2, 1.8))
def test_vcb_converges_with_any_smaller_step(world, gamma, share):
    """A share s of the Newton step leaves |1 - s| of the error of every log-ratio:
    a rate that no world changes."""
    settings_ = newton(world, gamma=gamma)
    fit = fit_table(world, "vcb", steps=5, **settings_ | dict(lr=settings_["lr"]*share))
    aim = log_ratios(world, optimal_policy(world, gamma))
    size = aim.abs().max()
    for step, logps in enumerate(fit.logps):
        assert_close(log_ratios(world, logps), aim*(1 - (1 - share)**step), rtol=0, atol=1e-8*size)


@pytest.mark.parametrize("name, params", [
    ("vcb", dict(gamma=.5)), ("vcb_lse", dict(gamma=.5, lam=.1)), ("rpo_sq", dict(beta=.5)),
    ("rpo_bwd", dict(beta=.5)), ("distilled_dpo", dict(beta=.5)), ("infonca", dict(beta=.5)),
    ("dro", dict(tau=.5))])
def test_value_based_methods_share_the_optimum(name, params):
    "Divided by the same sigma, all that fit values end where VCB does (identities 11 and 12)."
    world = random_world(3, 5, seed=1)
    fit = fit_table(world, name, steps=400, lr=.1, sigma=world.reward_std,
                    optimum=optimal_policy(world, .5), **params)
    assert fit.kl_to_optimum[-1].max() < 1e-5 and not LOSSES[name].order_based
    assert (frontier_efficiency(world, fit.policy) > .999).all()


def test_dpo_gap_of_a_pair_follows_its_recursion():
    """Hard labels: g <- g + 2 lr beta sigmoid(-beta g),
    which grows by log(10)/beta whenever steps grow tenfold."""
    world, beta, lr = table_world([.5, .5], [1., 0.]), .7, 3.
    fit = fit_table(world, "dpo", steps=200, lr=lr, optimizer=torch.optim.SGD, beta=beta)
    gaps, g = (fit.logps - world.ref_logps)[:, 0].diff(dim=1)[:, 0].neg(), 0.
    at = {}
    for step in range(100_001):
        if step <= 200: assert gaps[step].item() == pytest.approx(g, rel=1e-9, abs=1e-12)
        if step in (100, 1000, 10_000, 100_000): at[step] = g
        g += 2*lr*beta/(1 + math.exp(beta*g))
    rises = np.diff(list(at.values()))
    np.testing.assert_allclose(rises, math.log(10)/beta, rtol=.01)


@pytest.mark.parametrize("beta", [.3, 3.])
def test_dpo_never_settles(beta):
    """Every step widens the gap of best above worst, in every prompt,
    as much from 30 to 300 as from 3 to 30."""
    world = random_world(6, 4, seed=2)
    fit = fit_table(world, "dpo", steps=300, lr=2., optimizer=torch.optim.SGD, beta=beta)
    order = world.rewards.argsort(1)
    best, worst = (order[:, i].expand(301, -1)[..., None] for i in (-1, 0))
    ratios = fit.logps - world.ref_logps
    gaps = (ratios.gather(2, best) - ratios.gather(2, worst))[..., 0]
    assert (gaps[1:] > gaps[:-1]).all()
    assert ((gaps[300] - gaps[30]) > .9*(gaps[30] - gaps[3])).all()


@FEW
@given(worlds(), st.floats(.05, 5))
def test_ipo_ends_at_equal_gaps(world, tau):
    """IPO sees ranks: neighbours end 1/(tau K) nats apart, whatever their rewards.

    Every pair asks for l_i - l_j = c with c = 1/(2 tau), i the better. The normal equations are
    K (l_i - mean) = c (wins - losses) = c (K + 1 - 2 rank): neighbours 2c/K apart. For K = 2 that
    is 1/(2 tau) itself; for more it is the best compromise, as gaps of c and of 2c cannot both
    hold. Of P pairs the Hessian is (2K/P) (I - 11'/K), so that lr = P/(2K) = (K-1)/4 is a Newton
    step."""
    sorted_rewards, order = world.rewards.sort(1)
    k = world.rewards.shape[1]
    assume((sorted_rewards.diff(dim=1) > 1e-4).all()) # no ties
    fit = fit_table(world, "ipo", steps=1, lr=(k - 1)/4, optimizer=torch.optim.SGD, tau=tau)
    gaps = (fit.policy - world.ref_logps).gather(1, order).diff(dim=1)
    assert_close(gaps, torch.full_like(gaps, 1/(tau*k)), rtol=1e-9, atol=1e-9)


def test_prompts_train_as_if_alone():
    world = random_world(3, 5)
    together = fit_table(world, "ipo", steps=5, tau=.5).policy
    for i in range(3):
        alone = TableWorld(world.ref_logps[i:i + 1], world.rewards[i:i + 1])
        assert_close(fit_table(alone, "ipo", steps=5, tau=.5).policy, together[i:i + 1])


@pytest.mark.parametrize("gamma, seed", [(.2, 0), (1., 1), (5., 2)])
def test_sampled_candidates_get_their_exact_gaps(gamma, seed):
    """VCB on draws sets the gaps within the draws exactly and leaves the unseen among themselves as
    they were."""
    world = random_world(4, 8, seed)
    drawn = draw_candidates(world, 6, seed)
    assert drawn.shape == (4, 6) and drawn.max() < 8
    fit = fit_table(world, "vcb", steps=150, candidates=drawn, gamma=gamma, lr=5/(4*gamma**2)/3,
                    optimizer=torch.optim.SGD)
    found, aim = (p - world.ref_logps for p in (fit.policy, optimal_policy(world, gamma)))
    for l, a, row in zip(found, aim, drawn):
        seen = torch.zeros(8, dtype=torch.bool).scatter(0, row, True)
        assert 1 < seen.sum() < 8
        assert_close(l[seen] - l[row[0]], a[seen] - a[row[0]], rtol=0, atol=1e-6/gamma)
        assert_close(l[~seen], l[~seen][:1].expand_as(l[~seen]))


@pytest.mark.parametrize("gamma, seed", [(.5, 0), (1., 1)])
def test_rounds_end_at_the_optimum_one_round_does_not(gamma, seed):
    """A round of VCB, trained to its end, gives the responses it drew the mean of their errors
    l - l*, and leaves all others. Draws from the policy of the round before make the errors of all
    equal; those of SFT, drawn once, miss responses, and their errors stay as they were."""
    world, drawing = random_world(3, 8, seed, spread=.5), torch.Generator().manual_seed(seed)
    optimum = optimal_policy(world, gamma)
    aim, logits, ends = log_ratios(world, optimum), world.ref_logps.clone(), []
    for number in range(300):
        policy = logits.log_softmax(1)
        index = torch.multinomial(policy.exp(), 6, True, generator=drawing)
        seen = torch.zeros(3, 8, dtype=torch.bool).scatter(1, index, True)
        error = logits - world.ref_logps - aim
        mean = (error*seen).sum(1, keepdim=True)/seen.sum(1, keepdim=True)
        logits = torch.where(seen, world.ref_logps + aim + mean, logits).requires_grad_()
        some = [x.gather(1, index) for x in (logits.log_softmax(1), world.ref_logps, world.rewards)]
        loss = preference_loss("vcb", *some, sigma=world.reward_std, gamma=gamma).sum()
        slope, = torch.autograd.grad(loss, logits) # 0: this is where the round ends
        assert slope.abs().max() < 1e-9 and abs(loss) < 1e-9
        logits = logits.detach()
        if number == 0: # and gradient descent from SFT ends there too
            fit = fit_table(world, "vcb", candidates=index, steps=200, gamma=gamma,
                            lr=5/(12*gamma**2), optimizer=torch.optim.SGD)
            assert_close(fit.policy, logits.log_softmax(1), rtol=0, atol=1e-6)
        ends.append(kl_divergence(logits.log_softmax(1), optimum).max().item())
    assert ends[0] > .05 and ends[-1] < 1e-6


def test_draws_follow_the_sft_policy():
    world = random_world(2, 6, seed=3)
    share = torch.stack([row.bincount(minlength=6)
                         for row in draw_candidates(world, 20_000, 1)])/20_000
    p = world.ref_logps.exp()
    assert ((share - p).abs() < 4*(p*(1 - p)/20_000).sqrt()).all()
    assert torch.equal(draw_candidates(world, 9, 5), draw_candidates(world, 9, 5))
    assert not torch.equal(draw_candidates(world, 9, 5), draw_candidates(world, 9, 6))


# ---- strings

@pytest.mark.parametrize("vocab, length, eos",
                         [(2, 1, 0), (2, 4, 1), (4, 1, 2), (5, 3, 0), (3, 5, 2)])
def test_every_string_once(vocab, length, eos):
    strings = enumerate_strings(vocab, length, eos)
    tokens, going = strings.tokens(), vocab - 1
    assert len(tokens) == sum(going**k for k in range(length)) + going**length
    assert len({tuple(t) for t in tokens}) == len(tokens)
    for t in tokens:
        assert 1 <= len(t) <= length and eos not in t[:-1]
        assert t[-1] == eos or len(t) == length
    assert sum(t[-1] != eos for t in tokens) == going**length, "cut off"
    assert (strings.ids >= 0).all() and (strings.ids < vocab).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 99), st.floats(.1, 8), st.floats(.3, 3))
def test_probabilities_of_all_strings_sum_to_one(vocab, length, seed, spread, temperature):
    "To 1e-12, at every temperature; the gradient of the sum is 0 (the score function has mean 0)."
    model = StringLM(vocab, hidden=5, seed=seed, spread=spread)
    strings = enumerate_strings(vocab, length, eos=seed % vocab)
    total = string_logps(model, strings, [0, 1], temperature).exp().sum()
    assert abs(total.item() - 1) < 1e-12
    total.backward()
    for p in model.parameters(): assert p.grad.abs().max() < 1e-9


def test_string_logps_by_hand():
    "A model that ignores its input: each token costs its own log-probability, the end token too."
    p = f64(.5, .2, .3)
    model = lambda ids: p.log().expand(*ids.shape, 3)
    strings = enumerate_strings(3, 2)
    found = dict(zip(map(tuple, strings.tokens()),
                     string_logps(model, strings, [1]).exp().tolist()))
    assert found == pytest.approx({(0,): .5, (1, 0): .1, (2, 0): .15, (1, 1): .04, (1, 2): .06,
                                   (2, 1): .06, (2, 2): .09})
    wrapped = lambda ids: SimpleNamespace(logits=model(ids))
    assert torch.equal(string_logps(wrapped, strings, [1]), string_logps(model, strings, [1]))


def test_string_model_is_seeded_and_reads_its_prefix():
    strings = enumerate_strings(4, 3)
    state = torch.random.get_rng_state()
    a, b, c = (string_logps(StringLM(seed=s), strings, [0]) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(a, string_logps(StringLM(seed=0), strings, [0, 2]))


def test_string_world_has_rewards_and_lengths():
    "Rewards and lengths stand beside their strings; RRHF reads the lengths."
    strings, model = enumerate_strings(3, 3), StringLM(3, hidden=16, seed=1, spread=2.)
    world = string_world(model, lambda prompt, ids: ids.count(1) - .5*len(ids) + prompt[0], strings,
                         [[0], [1]])
    assert world.lengths.tolist() == [strings.lengths.tolist()]*2
    row = strings.tokens().index([1, 1, 0])
    assert world.rewards[:, row].tolist() == [.5, 1.5]
    rrhf = fit_table(world, "rrhf", steps=2)
    given_lengths = fit_table(world, "rrhf", steps=2, lengths=world.lengths)
    other = fit_table(world, "rrhf", steps=2, lengths=torch.ones_like(world.lengths))
    assert (torch.equal(rrhf.policy, given_lengths.policy)
            and not torch.equal(rrhf.policy, other.policy))


# ---- the library against the truth: a GPT-NeoX of which every response is known

@pytest.fixture(scope="module")
def neox():
    """GPT-NeoX over 5 tokens (0 ends), float64, with peaked distributions;
    all responses of up to 3 tokens."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    config = GPTNeoXConfig(vocab_size=5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=16, hidden_dropout=0,
                           attention_dropout=0, eos_token_id=0)
    torch.manual_seed(1)
    models = [GPTNeoXForCausalLM(config).eval().double() for _ in range(2)]
    for model in models:
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1: p.mul_(5)
            model.get_output_embeddings().weight.mul_(4)
    return models, enumerate_strings(5, 3)


PROMPTS = [[1], [2, 3, 4, 1], [4, 4]]


def test_logps_of_the_library_are_the_truth(neox):
    """Padded batches of all responses to prompts of different lengths: every value,
    and a total of 1."""
    from vcb_nb.logprobs import collate_candidates, score_logps, sequence_logps
    (model, _), strings = neox
    completions = [strings.tokens()]*len(PROMPTS)
    with torch.no_grad():
        want = torch.stack([string_logps(model, strings, p) for p in PROMPTS])
        found = sequence_logps(model, collate_candidates(PROMPTS, completions))
    assert_close(found, want, rtol=0, atol=1e-10)
    scored = torch.tensor(score_logps(model, PROMPTS, completions, batch_tokens=100),
                          dtype=torch.float64)
    assert_close(scored, want, rtol=0, atol=1e-10)
    assert_close(want.exp().sum(1), torch.ones(3).double(), rtol=0, atol=1e-12)


def test_total_probability_has_no_gradient(neox):
    """1 for any weights: the library's gradients of all responses, weighted by their probability,
    cancel."""
    from vcb_nb.logprobs import collate_candidates, sequence_logps
    (model, _), strings = neox
    batch = collate_candidates(PROMPTS[1:2], [strings.tokens()])
    logps = sequence_logps(model, batch)
    one, = torch.autograd.grad(logps[0, 3], model.get_output_embeddings().weight, retain_graph=True)
    total, = torch.autograd.grad(logps.exp().sum(), model.get_output_embeddings().weight)
    assert one.abs().max() > .1 and total.abs().max() < 1e-12


def chi_square(counts, p):
    """Deviation of Pearson's statistic from its mean in standard deviations;
    rare strings are pooled."""
    want = p*counts.sum()
    common = want >= 5
    counts, want = (torch.cat([v[common], v[~common].sum()[None]]) for v in (counts.double(), want))
    counts, want = counts[want > 0], want[want > 0]
    degrees = len(want) - 1
    return (((counts - want).square()/want).sum().item() - degrees)/(2*degrees)**.5


@pytest.mark.parametrize("temperature", [1., .6, 1.7])
def test_sampler_draws_whole_strings_as_often_as_it_should(neox, temperature):
    """Of 3 x 6000 samples, prompts padded on the left,
    each string comes as often as its probability says."""
    from vcb_nb.sample import sample_candidates as draw
    (model, _), strings = neox
    tokenizer, place = (SimpleNamespace(eos_token_id=0, pad_token_id=0),
                        {tuple(t): i for i, t in enumerate(strings.tokens())})
    ids, *_ = draw(model, tokenizer, PROMPTS, 6000, max_new_tokens=3, temperature=temperature,
                  batch_size=3)
    for prompt, group in zip(PROMPTS, ids):
        counts = torch.tensor([place[tuple(c)] for c in group]).bincount(minlength=len(place))
        with torch.no_grad():
            p, other = (string_logps(model, strings, prompt, t).exp()
                        for t in (temperature, temperature*1.3))
        assert abs(chi_square(counts, p)) < 4 < chi_square(counts, other)


def test_kl_estimators_have_the_exact_kl_as_mean(neox):
    """Pitfall 30: averaged over all responses by probability, k1 and k3 are the KL itself;
    off policy they are not."""
    from vcb_nb.measures import kl_estimates
    models, strings = neox
    for prompt in PROMPTS:
        with torch.no_grad(): p, q = (string_logps(m, strings, prompt) for m in models)
        exact = kl_divergence(p, q).item()
        k1, k3 = (torch.from_numpy(k) for k in kl_estimates(p[:, None].numpy(), q[:, None].numpy()))
        assert (p.exp()*k1).sum().item() == pytest.approx(exact, rel=1e-10)
        assert (p.exp()*k3).sum().item() == pytest.approx(exact, rel=1e-10)
        assert exact > .3 and abs((q.exp()*k1).sum().item() - exact) > .3
