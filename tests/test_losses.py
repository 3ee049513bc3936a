"What holds each loss to its formula: identities, oracles, pitfalls. float64 unless fp32 matters."
import itertools, math, warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vcb_nb import losses
from vcb_nb.losses import (LOSSES, calibration_metrics, dpo_loss, dro_loss,
                           ipo_loss, preference_loss, reward_sigma, rpo_bwd_loss,
                           rpo_sq_loss, rrhf_loss, slic_loss, target_gamma, vcb_loss, vcb_lse_loss)

close = torch.testing.assert_close
NAN = float("nan")
few = settings(max_examples=25, deadline=None)


def batch(seed=0, prompts=4, n=5, dtype=torch.float64):
    "logps, ref_logps, rewards, lengths of a made-up batch; no ties."
    g = torch.Generator().manual_seed(seed)
    draw = lambda scale: scale * torch.randn(prompts, n, generator=g, dtype=torch.float64)
    lengths = torch.randint(3, 12, (prompts, n), generator=g)
    ref = -20 + draw(4.)
    return [x.to(dtype) for x in (ref + draw(1.5), ref, draw(2.))] + [lengths]


def ragged(seed=0, prompts=5, n=6):
    "The same with 2 to n candidates a prompt, in shuffled places; garbage where the mask is False."
    logps, ref, rewards, lengths = batch(seed, prompts, n)
    g = torch.Generator().manual_seed(seed + 1000)
    mask = torch.zeros(prompts, n, dtype=torch.bool)
    for p in range(prompts):
        mask[p, torch.randperm(n, generator=g)[:2 + p % (n - 1)]] = True
    spoil = lambda x, bad: x.masked_fill(~mask, bad)
    return (spoil(logps, NAN), spoil(ref, NAN), spoil(rewards, math.inf), spoil(lengths, 0), mask)


def value(name, data, **params):
    "The loss of a (logps, ref_logps, rewards, lengths) batch."
    logps, ref, rewards, lengths = data
    return preference_loss(name, logps, ref, rewards, lengths=lengths, **params)


def brute(name, l, lp, r, lengths, s, g=.7):
    "Each loss of one prompt by the formula, in plain Python loops. Parameters as in `PARAMS`."
    n = len(r)
    order = [(i, j) for i in range(n) for j in range(n) if r[i] > r[j]]
    every = list(itertools.combinations(range(n), 2))
    mean = lambda xs: sum(xs) / len(xs)
    sig = lambda x: 1 / (1 + math.exp(-x))
    e = [g * a - b / s for a, b in zip(l, r)]
    soft = lambda xs: [math.exp(x) / sum(math.exp(y) for y in xs) for x in xs]
    best = lp[r.index(max(r))]
    if name == "vcb": return mean([(e[i] - e[j])**2 for i, j in every])
    if name == "vcb_lse":
        return math.log(mean([math.exp(.3 * (e[i] - e[j])**2) for i, j in every])) / .3
    if name == "dpo": return mean([-math.log(sig(.2 * (l[w] - l[m]))) for w, m in order])
    if name == "ipo": return mean([(l[w] - l[m] - 1 / .6)**2 for w, m in order])
    if name == "slic": return mean([max(0, 1.5 - lp[w] + lp[m]) for w, m in order]) - .2 * best
    if name == "rrhf":
        p = [a / b for a, b in zip(lp, lengths)]
        return sum(max(0, p[i] - p[j]) for j, i in order) - best
    if name == "rpo_sq":
        return mean([(.4 * (l[i] - l[j]) - .9 * (r[i] - r[j]))**2 for i, j in every])
    if name == "distilled_dpo":
        return mean([(r[i] - r[j] - .3 * (l[i] - l[j]))**2 for i, j in every])
    if name == "rpo_bwd":
        kl = lambda a, b: a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
        return mean([kl(sig(.9 * (r[i] - r[j])), sig(.4 * (l[i] - l[j]))) for i, j in every])
    if name == "infonca":
        target, model = soft([x / 1.3 for x in r]), soft([.4 * x for x in l])
        return -sum(t * math.log(q) for t, q in zip(target, model))
    if name == "dro":
        v = mean([a - .6 * b for a, b in zip(r, l)])
        return mean([(a - v - .6 * b)**2 for a, b in zip(r, l)])


PARAMS = {"vcb": dict(gamma=.7), "vcb_lse": dict(gamma=.7, lam=.3), "dpo": dict(beta=.2),
          "ipo": dict(tau=.3), "slic": dict(delta=1.5, lam_reg=.2), "rrhf": {},
          "rpo_sq": dict(beta=.4, eta=.9), "rpo_bwd": dict(beta=.4, eta=.9),
          "distilled_dpo": dict(beta=.3), "infonca": dict(beta=.4, alpha=1.3), "dro": dict(tau=.6)}
pytestmark = pytest.mark.filterwarnings("ignore:With two candidates")
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def _fresh_warning():
    losses._warn_two_candidates.cache_clear()


# --- formulas, one by one -------------------------------------------------------------------

@every_loss
def test_formula_by_brute_force(name):
    "Pitfall 4: sums and means where the formula has them, against loops over the definition."
    data = batch(3)
    logps, ref, rewards, lengths = data
    sigma = rewards.std(1)
    columns = (logps - ref, logps, rewards, lengths)
    want = [brute(name, *(x[p].tolist() for x in columns), sigma[p].item())
            for p in range(len(rewards))]
    close(value(name, data, **PARAMS[name]), torch.tensor(want, dtype=torch.float64))


def test_golden_values_by_hand():
    "Pitfall 4: two tokens and four tokens, the numbers worked out on paper."
    logps, ref = torch.tensor([[-4., -8.]]), torch.tensor([[-6., -8.]])      # ratios 2, 0
    rewards, lengths = torch.tensor([[1., 0.]]), torch.tensor([[2, 4]])      # per token -2, -2
    close(dpo_loss(logps, ref, rewards, beta=1.), torch.tensor([math.log(1 + math.exp(-2))]))
    close(ipo_loss(logps, ref, rewards, tau=.5), torch.tensor([1.]))
    per_token = ipo_loss(logps, ref, rewards, tau=.5, length_normalize=True, lengths=lengths)
    close(per_token, torch.tensor([0.]))
    close(rrhf_loss(logps, ref, rewards, lengths=lengths), torch.tensor([4.]))
    reverse = rrhf_loss(logps, ref, 1 - rewards, lengths=torch.tensor([[4, 4]]))
    close(reverse, torch.tensor([1. + 8.]))
    close(slic_loss(logps, ref, rewards, delta=5., lam_reg=.5), torch.tensor([1. + 2.]))


def test_rrhf_sft_term_is_over_real_tokens():
    "Pitfall 19: RRHF's last term is log pi(y_best), whatever the padding, i.e. the other lengths."
    logps, rewards = torch.tensor([[-3., -9.]]), torch.tensor([[1., 0.]])
    for padded in (3, 300):
        close(rrhf_loss(logps, None, rewards, lengths=torch.tensor([[3, padded]]))
              - torch.relu(torch.tensor([-9 / padded + 1.])), torch.tensor([3.]))


def test_every_method_differs_from_every_other():
    "Pitfall 17: no name leads to another's function, at one point, with two sets of parameters."
    data = batch(7, prompts=1)
    for params in (PARAMS, {n: {} for n in LOSSES if n != "distilled_dpo"}):
        values = [value(n, data, **params[n]).item() for n in params]
        assert min(abs(a - b) for a, b in itertools.combinations(values, 2)) > 1e-3


def test_distilled_dpo_is_rpo_sq_with_eta_one():
    "Two names for one formula, as the page says; everywhere else eta tells them apart."
    data = batch(1)
    distilled = value("distilled_dpo", data, beta=.2)
    close(distilled, value("rpo_sq", data, beta=.2, eta=1.))
    assert not torch.allclose(distilled, value("rpo_sq", data, beta=.2, eta=.9))


@every_loss
def test_strength_and_params_reach_the_loss(name):
    "Pitfall 17: every registered hyper-parameter changes the value."
    data, loss = batch(2), LOSSES[name]
    assert loss.strength in loss.params
    for param, default in loss.params.items():
        other = (not default) if isinstance(default, bool) else default * 1.5 + .1
        assert not torch.allclose(value(name, data), value(name, data, **{param: other})), param


# --- identities 1 to 6 ----------------------------------------------------------------------

@few
@given(st.integers(0, 999), st.floats(.1, 50), st.floats(-100, 100), st.floats(-50, 50),
       st.sampled_from([0., .5]))
def test_identity_1_invariances(seed, a, b, c, lam):
    "r -> a r + b, l -> l + c and permutations leave VCB unchanged; M(l, -r) = M(-l, r)."
    logps, ref, rewards, _ = batch(seed)
    f = lambda lp, r: vcb_loss(lp, ref, r, gamma=.6, lam=lam)
    base = f(logps, rewards)
    close(f(logps, a * rewards + b), base, rtol=1e-6, atol=1e-8)
    close(f(logps + c, rewards), base, rtol=1e-6, atol=1e-8)
    close(f(2 * ref - logps, rewards), f(logps, -rewards))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    close(vcb_loss(logps[:, order], ref[:, order], rewards[:, order], gamma=.6, lam=lam), base)


@few
@given(st.integers(0, 999), st.integers(2, 9))
def test_identity_2_pairs_are_a_variance(seed, n):
    e = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = sum((a - b)**2 for a, b in itertools.combinations(e, 2))
    close(pairs, n * (e - e.mean()).square().sum())


@few
@given(st.integers(0, 999), st.integers(3, 9), st.floats(.01, 20))
def test_identity_3_starts_at_two(seed, n, gamma):
    "Pitfall 7: M is 2 at the SFT model (2n/(n-1) with ddof=0), and 1 - M/2 is R squared 0."
    _, ref, rewards, _ = batch(seed, n=n)
    close(vcb_loss(ref, ref, rewards, gamma=gamma), torch.full((4,), 2., dtype=torch.float64))
    biased, _ = reward_sigma(rewards, ddof=0)
    close(vcb_loss(ref, ref, rewards, gamma=gamma, sigma=biased),
          torch.full((4,), 2 * n / (n - 1), dtype=torch.float64))


def test_starts_at_two_in_float32_with_huge_rewards():
    "Pitfall 7: no digits are lost to a large common offset of the rewards or to bf16 log-probs."
    rewards = 1e4 + batch(1)[2]
    for dtype in (torch.float32, torch.bfloat16):
        ref = batch(1)[1].to(dtype)
        loss = vcb_loss(ref, ref, rewards)
        assert loss.dtype is torch.float32
        close(loss, torch.full((4,), 2.))


def test_identity_4_gradient_is_the_group_advantage():
    _, ref, rewards, _ = batch(4)
    logps, gamma, n = ref.clone().requires_grad_(), .3, 5
    vcb_loss(logps, ref, rewards, gamma=gamma).sum().backward()
    advantage = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    close(logps.grad, -4 * gamma / (n - 1) * advantage)


@pytest.mark.parametrize("lam", [0., 1e-6, 1., 1e3])
def test_identity_5_zero_at_the_optimum(lam):
    _, ref, rewards, _ = batch(5)
    best = ref + rewards / (.4 * rewards.std(1, keepdim=True)) + 3.
    close(vcb_loss(best, ref, rewards, gamma=.4, lam=lam), torch.zeros(4, dtype=torch.float64))
    close(calibration_metrics(best - ref, rewards, gamma=.4)["r2"].item(), 1.)


def test_identity_6_hessian():
    "Convex quadratic: Hessian 4 gamma^2/(n-1) (I - 11'/n), null on constants only."
    logps, ref, rewards, _ = batch(6, prompts=1)
    f = lambda l: vcb_loss(l[None], ref, rewards, gamma=.5).sum()
    hessian = torch.autograd.functional.hessian(f, logps[0])
    close(hessian, 4 * .25 / 4 * (torch.eye(5) - 1 / 5).double())
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert abs(eigenvalues[0]) < 1e-12 and eigenvalues[1] > 0


# --- LogSumExp ------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lse_limits(dtype):
    "lam -> 0 is the mean, lam -> infinity the hardest pair, without overflow or cancellation."
    logps, ref, rewards, _ = batch(8, dtype=dtype)
    mean = vcb_loss(logps, ref, rewards)
    close(vcb_lse_loss(logps, ref, rewards, lam=1e-8), mean, rtol=1e-5, atol=1e-6)
    close(vcb_lse_loss(logps, ref, rewards, lam=0.), mean)
    e = (logps - ref) - rewards / rewards.std(1, keepdim=True)
    hardest = (e.amax(1) - e.amin(1))**2
    close(vcb_lse_loss(logps, ref, rewards, lam=1e7), hardest, rtol=1e-4, atol=1e-4)
    far = logps + 1e4 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert vcb_lse_loss(far, ref, rewards, lam=100.).isfinite().all()


def test_lse_grows_with_lam_between_mean_and_max():
    data = batch(9)
    values = torch.stack([value("vcb_lse", data, lam=lam) for lam in (1e-3, .1, 1., 10., 100.)])
    assert (values[1:] > values[:-1]).all()


def test_lse_with_absent_candidates_far_from_the_present_ones():
    """Log-ratios that drifted together, as training does: the pairs with an absent candidate are
    huge, and their exponential reaches neither value nor gradient."""
    logps, ref, rewards, _ = batch(8, dtype=torch.float32)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 3:] = False
    logps = (logps - 200).requires_grad_()
    vcb_lse_loss(logps, ref, rewards, mask=mask).sum().backward()
    grad = logps.grad
    assert grad.isfinite().all() and (grad[:, 3:] == 0).all() and (grad[:, :3] != 0).any()


# --- identities 7 to 13 ---------------------------------------------------------------------

def test_identity_7_two_candidates_are_ipo():
    "Pitfall 24: with n = 2 VCB is gamma^2 IPO at tau = gamma/(2 sqrt 2): the values are lost."
    logps, ref, rewards, _ = batch(10, n=2)
    gamma = .3
    with pytest.warns(UserWarning, match="whole data set"):
        vcb = vcb_loss(logps, ref, rewards, gamma=gamma)
    close(vcb, gamma**2 * ipo_loss(logps, ref, rewards, tau=gamma / (2 * 2**.5)))


def test_two_candidates_warn_once_and_never_with_a_sigma():
    "Pitfall 24: one warning, with its remedy; none with the data set's sigma."
    logps, ref, rewards, _ = batch(10, n=2)
    sigma = torch.full((4,), rewards.std())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vcb_loss(logps, ref, rewards, sigma=sigma)
        assert not caught
        for _ in range(3): a = vcb_loss(logps, ref, rewards)
    assert len(caught) == 1 and "sigma" in str(caught[0].message)
    close(vcb_loss(logps, ref, rewards * 2), a)
    assert not torch.allclose(vcb_loss(logps, ref, rewards, sigma=sigma),
                              vcb_loss(logps, ref, rewards * 2, sigma=sigma))


@few
@given(st.integers(0, 999), st.integers(2, 12))
def test_identity_8_gap_bounds(seed, n):
    rewards = batch(seed, prompts=3, n=n)[2]
    gap = (rewards.amax(1) - rewards.amin(1)) / reward_sigma(rewards)[0]
    assert (gap <= math.sqrt(2 * (n - 1)) + 1e-9).all()
    assert (gap >= 2 * math.sqrt((n - 1) / n) - 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0., .1, .7, -1e5, 1e-7])
def test_identity_9_equal_rewards_carry_no_signal(level, dtype):
    "Pitfall 22: a float residue of equal rewards does not pass the guard; loss and gradient are 0."
    rewards = torch.full((1, 7), level, dtype=dtype)
    residue = rewards.clone()
    residue[0, ::2] = torch.nextafter(residue[0, 0], torch.tensor(math.inf, dtype=dtype))
    for r in (rewards, residue if abs(level) > 0 else rewards):
        sigma, signal = reward_sigma(r)
        assert sigma.tolist() == [0.] and not signal.any()
        for name in LOSSES:
            data = batch(1, prompts=1, n=7)
            logps = data[0].requires_grad_()
            loss = value(name, (logps, data[1], r, data[3]))
            loss.sum().backward()
            assert loss.item() == 0 and (logps.grad == 0).all(), name
    assert residue.std() > 0 or level == 0


def test_small_but_real_reward_spread_is_kept():
    "Pitfall 22: the floor is relative, so a reward model on a small scale keeps its signal."
    sigma, signal = reward_sigma(1e-12 * torch.tensor([[1., 2., 4.]]))
    assert signal.all() and sigma.dtype is torch.float64
    close(sigma, 1e-12 * torch.tensor([[1., 2., 4.]]).double().std(1), rtol=1e-5, atol=0.)


@pytest.mark.parametrize("level", [0., 1e6, -1e6, 1e12])
@pytest.mark.parametrize("gaps", [[.1, .85], [1., 2., 2.], [0., .5, .25]])
def test_a_high_level_hides_no_difference(level, gaps):
    "What counts is the spread: a level is only limited by where float64 ends."
    rewards = torch.tensor([gaps], dtype=torch.float64)
    sigma, signal = reward_sigma(rewards + level)
    assert signal.all()
    close(sigma, reward_sigma(rewards)[0], rtol=4 * abs(level) * 2**-52 + 1e-12, atol=0.)
    for name in LOSSES:
        logps, ref = batch(1, prompts=1, n=len(gaps))[:2]
        lengths = torch.ones_like(logps)
        if "value" not in name:
            close(value(name, (logps, ref, rewards + level, lengths)),
                  value(name, (logps, ref, rewards, lengths)), rtol=1e-3, atol=1e-6)


def test_ties_are_relative_to_the_spread():
    order = losses._pair_order(torch.tensor([[0., 1e-8, 1.], [0., 1e-8, 2e-8]]).double(), None,
                               torch.zeros(1).double())
    assert order.tolist() == [[0, -1, -1], [-1, -1, -1]]


def test_identity_10_duplicates_leave_no_residual():
    logps, ref, rewards, _ = batch(11)
    double = [torch.cat([x, x], 1) for x in (logps, ref, rewards)]
    pairs = losses._pair_differences((double[0] - double[1]) - double[2])
    i, j = torch.triu_indices(10, 10, 1)
    assert (pairs[:, j - i == 5] == 0).all()
    best = ref + rewards / reward_sigma(double[2])[0][:, None]
    zero = vcb_loss(torch.cat([best, best], 1), double[1], double[2])
    close(zero, torch.zeros(4, dtype=torch.float64))


def test_identity_11_relatives_coincide():
    "VCB mean = RPO-sq (beta = gamma, eta = 1/sigma) = DRO with V profiled out = GVPO's gradient."
    logps, ref, rewards, _ = batch(12)
    logps.requires_grad_()
    gamma, n, sigma = .35, 5, rewards.std(1)
    vcb = vcb_loss(logps, ref, rewards, gamma=gamma)
    close(rpo_sq_loss(logps, ref, rewards, beta=gamma, sigma=sigma), vcb)
    for p in range(4):
        one = [x[p:p + 1] for x in (logps, ref, rewards)]
        s = sigma[p].item()
        close(rpo_sq_loss(*one, beta=gamma, eta=1 / s), vcb[p:p + 1])
        close(dro_loss(*one, tau=gamma * s) * 2 * n / (s**2 * (n - 1)), vcb[p:p + 1])
    vcb.sum().backward()
    centre = lambda x: x - x.mean(1, keepdim=True)
    tau = gamma * sigma[:, None]
    gvpo = -(centre(rewards) - tau * centre((logps - ref).detach()))   # weight of each log pi
    ratio = logps.grad / gvpo
    close(ratio, ratio[:, :1].expand_as(ratio))
    assert (ratio > 0).all()


def test_identity_12_rpo_bwd_is_an_eighth_of_the_square():
    logps, ref, rewards, _ = batch(13)
    for scale in (1e-2, 1e-3):
        small = (ref + scale * (logps - ref), ref, scale * rewards)
        close(rpo_bwd_loss(*small), rpo_sq_loss(*small) / 8, rtol=10 * scale, atol=0.)
    best = (ref + rewards, ref, rewards)
    close(rpo_bwd_loss(*best), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0.)


@pytest.mark.parametrize("name", ["rpo_bwd", "infonca", "dro", "rpo_sq", "distilled_dpo"])
def test_identity_12_same_optimum(name):
    "At l = r/(gamma sigma) every gradient is zero (InfoNCA: alpha beta = gamma sigma)."
    _, ref, rewards, _ = batch(14)
    sigma, gamma = rewards.std(1), .5
    params = {"rpo_bwd": dict(beta=gamma), "rpo_sq": dict(beta=gamma), "dro": dict(tau=gamma),
              "distilled_dpo": dict(beta=gamma), "infonca": dict(alpha=2., beta=gamma / 2)}[name]
    logps = (ref + rewards / (gamma * sigma[:, None])).requires_grad_()
    preference_loss(name, logps, ref, rewards, sigma=sigma, **params).sum().backward()
    close(logps.grad, torch.zeros_like(logps), atol=1e-12, rtol=0.)


def table_world(name, steps, lr, aim=.5, **params):
    "Descent of a table of 6 responses: log-ratios, KL(pi || pi*), the optimal log-ratios."
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(1, 6, generator=g, dtype=torch.float64).log_softmax(1)
    rewards = torch.randn(1, 6, generator=g, dtype=torch.float64)
    mean = (ref.exp() * rewards).sum(1, keepdim=True)
    sigma = (ref.exp() * (rewards - mean)**2).sum(1).sqrt()        # exact, under pi_sft
    best = (ref + rewards / (aim * sigma)).log_softmax(1)
    theta = ref.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        logps = theta.log_softmax(1)
        preference_loss(name, logps, ref, rewards, sigma=sigma, **params).sum().backward()
        optimizer.step()
    logps = theta.detach().log_softmax(1)
    return (logps - ref)[0], (logps.exp() * (logps - best)).sum().item(), (best - ref)[0]


@pytest.mark.parametrize("name, steps, lr, params", [
    ("vcb", 60, 3., {}), ("vcb_lse", 500, .8, dict(lam=.2))])
def test_identity_13_vcb_reaches_the_optimal_policy(name, steps, lr, params):
    "Z(x) is computed nowhere in the loss, and yet the softmax policy ends at pi*."
    assert table_world(name, steps, lr, aim=.5, gamma=.5, **params)[1] < 1e-8


def test_identity_13_hard_label_dpo_diverges():
    "DPO's log-ratios pass every bound: gap and KL grow with each decade of steps."
    runs = [table_world("dpo", steps, 3., beta=.5) for steps in (10, 100, 1000)]
    gap = lambda l, best: (l[best.argmax()] - l[best.argmin()]).item()
    gaps, asked = [gap(l, best) for l, _, best in runs], gap(runs[0][2], runs[0][2])
    assert gaps[1] > gaps[0] + 2 and gaps[2] > gaps[1] + 2 and gaps[2] > 1.5 * asked
    assert runs[2][1] > runs[1][1] > 1e-2


def test_identity_13_ipo_reaches_equal_gaps():
    "IPO's optimum spaces the ranks evenly, 1/(tau n) nats a rank, whatever the rewards."
    ratios, kl, best = table_world("ipo", 200, 1., tau=.25)
    steps = ratios[best.argsort()].diff()
    close(steps, torch.full_like(steps, 1 / (.25 * 6)), rtol=1e-6, atol=1e-6)
    assert kl > 1e-3


# --- masks, shapes, gradients ---------------------------------------------------------------

@every_loss
@few
@given(seed=st.integers(0, 999))
def test_ragged_equals_one_by_one(name, seed):
    "Pitfalls 18 and 23: each prompt alone, without its absent candidates, gives the same."
    logps, ref, rewards, lengths, mask = ragged(seed)
    sigma = torch.rand(5, generator=torch.Generator().manual_seed(seed)).double() + .5
    for s in (None, sigma):
        together = preference_loss(name, logps, ref, rewards, mask, lengths, s, **PARAMS[name])
        cut = lambda x, p: x[p:p + 1, mask[p]]
        alone = [preference_loss(name, *(cut(x, p) for x in (logps, ref, rewards)),
                                 lengths=cut(lengths, p), sigma=s if s is None else s[p:p + 1],
                                 **PARAMS[name]) for p in range(5)]
        close(together, torch.cat(alone))


@every_loss
@few
@given(seed=st.integers(0, 999))
def test_permutation_of_candidates(name, seed):
    logps, ref, rewards, lengths, mask = ragged(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    args = [logps, ref, rewards, mask, lengths]
    close(preference_loss(name, *[x[:, order] for x in args]), preference_loss(name, *args))


@every_loss
def test_no_cross_prompt_pairs(name):
    "Pitfall 18: one prompt's loss has no gradient on another's candidates, no use for its rewards."
    logps, ref, rewards, lengths = batch(15)
    logps.requires_grad_()
    loss = value(name, (logps, ref, rewards, lengths))
    loss[0].backward()
    assert (logps.grad[1:] == 0).all() and (logps.grad[0] != 0).any()
    other = torch.cat([rewards[:1], 100 * rewards[1:].flip(0)])
    close(value(name, (logps, ref, other, lengths))[0], loss[0])


@every_loss
def test_masked_candidates_give_exactly_nothing(name):
    "Pitfall 8: no constant is left by a masked pair, in value or gradient, not even from a NaN."
    logps, ref, rewards, lengths, mask = ragged(2)
    mask = mask.clone()
    mask[0], mask[1] = False, torch.tensor([True] + [False] * 5)       # none; one candidate
    fill = lambda x, v: torch.where(mask & ~x.isfinite(), v, x)
    logps = fill(logps, -20.).requires_grad_()
    loss = preference_loss(name, logps, fill(ref, -21.), fill(rewards, 1.), mask,
                           lengths.clamp(min=1) * mask)
    loss.sum().backward()
    assert (loss[:2] == 0).all() and loss.isfinite().all()
    grad = logps.grad
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and (grad[:2] == 0).all()
    assert (grad[2:][mask[2:]] != 0).any()


@every_loss
@pytest.mark.parametrize("params", ["ours", "large lam, ties, the start"])
def test_gradients_are_exact(name, params):
    "gradcheck in float64, with absent candidates; at the start and with ties no NaN from a kink."
    logps, ref, rewards, lengths, mask = ragged(4, prompts=3, n=4)
    logps, ref = logps.nan_to_num(-20.), ref.nan_to_num(-20.)
    kwargs = dict(PARAMS[name])
    if params != "ours":
        rewards = torch.where(mask, rewards.round(), rewards)
        if name == "vcb_lse": kwargs["lam"] = 50.
        elif LOSSES[name].uses_reference: logps = ref.clone()
    sigma = torch.tensor([1., 2., 3.])
    f = lambda lp: preference_loss(name, lp, ref, rewards, mask, lengths, sigma, **kwargs)
    assert torch.autograd.gradcheck(f, logps.requires_grad_(), atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(name, dtype):
    "Pitfall 5: the arithmetic is fp32 or better, whatever the inputs' type."
    logps, ref, rewards, lengths = batch(16)
    logps, ref = logps.to(dtype), ref.to(dtype)
    got = value(name, (logps, ref, rewards.float(), lengths))
    assert got.dtype is torch.float32
    want = value(name, (logps.double(), ref.double(), rewards, lengths)).float()
    close(got, want, rtol=1e-4, atol=1e-4)


def test_rewards_and_reference_get_no_gradient():
    logps, ref, rewards, _ = [x.requires_grad_(x.is_floating_point()) for x in batch(1)]
    for name in ("vcb", "vcb_lse", "dro"):
        preference_loss(name, logps, ref, rewards).sum().backward()
    assert rewards.grad is None and ref.grad is None and logps.grad is not None


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].order_based])
def test_order_based_losses_see_only_the_order(name):
    logps, ref, rewards, lengths = batch(17)
    close(value(name, (logps, ref, rewards.exp(), lengths)),
          value(name, (logps, ref, rewards, lengths)))


@pytest.mark.parametrize("name", [n for n in LOSSES if not LOSSES[n].order_based])
def test_value_based_losses_see_the_values(name):
    logps, ref, rewards, lengths = batch(17)
    assert not torch.allclose(value(name, (logps, ref, rewards.exp(), lengths)),
                              value(name, (logps, ref, rewards, lengths)))


def test_ties_are_dropped_by_order_based_losses():
    "A tie is no pair: rewards 1, 1, 0 leave two pairs, not three, and no order at random."
    logps, ref, _, lengths = batch(18, prompts=1, n=3)
    rewards = torch.tensor([[1., 1., 0.]]).double()
    data = (logps, ref, rewards)
    pair = lambda name, i: preference_loss(name, *(x[:, [i, 2]] for x in data))
    for name in ("dpo", "ipo"):
        close(preference_loss(name, logps, ref, rewards), (pair(name, 0) + pair(name, 1)) / 2)
    near = rewards * 3
    near[0, 1] = torch.nextafter(near[0, 1], near[0, 1] + 1)  # a float residue orders nothing
    for name in ("dpo", "ipo", "slic"):
        close(preference_loss(name, logps, ref, near), preference_loss(name, logps, ref, rewards))
    hinge = torch.relu(logps[:, 2:] - logps[:, :2]).mean(1)
    close(slic_loss(logps, None, rewards, delta=1e-9, lam_reg=1.), hinge - logps[:, :2].mean(1),
          atol=1e-6, rtol=0.)


# --- faults ---------------------------------------------------------------------------------

@every_loss
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_bad_reward_is_named(name, bad):
    "Pitfall 25: a present candidate's NaN or infinite reward is named; an absent one's is ignored."
    logps, ref, rewards, lengths = batch(19)
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match=r"rewards\[2, 1\]"):
        value(name, (logps, ref, rewards, lengths))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 1] = False
    assert preference_loss(name, logps, ref, rewards, mask, lengths).isfinite().all()


def test_errors_say_what_to_do():
    logps, ref, rewards, lengths = batch(20)
    calls = {
        "Did you mean 'vcb_lse'": lambda: preference_loss("vcb_les", logps, ref, rewards),
        "Did you mean 'gamma'": lambda: preference_loss("vcb", logps, ref, rewards, gama=1.),
        "hyper-parameter of dpo 'tau'": lambda: preference_loss("dpo", logps, ref, rewards, tau=1.),
        "RRHF needs lengths": lambda: rrhf_loss(logps, None, rewards),
        "IPO, normalised, needs": lambda: ipo_loss(logps, ref, rewards, length_normalize=True),
        "needs ref_logps": lambda: dpo_loss(logps, None, rewards),
        r"rewards\[None\]": lambda: vcb_loss(logps[0], ref[0], rewards[0]),
        "logps has shape": lambda: vcb_loss(logps[:, :3], ref, rewards),
        "mask has shape": lambda: vcb_loss(logps, ref, rewards, mask=torch.ones(4, 4)),
        "one per prompt": lambda: vcb_loss(logps, ref, rewards, sigma=torch.ones(3)),
        "sigma must be finite": lambda: vcb_loss(logps, ref, rewards, sigma=torch.full((4,), NAN)),
        "gamma is 0": lambda: vcb_loss(logps, ref, rewards, gamma=0),
        "lam is -1": lambda: vcb_loss(logps, ref, rewards, lam=-1),
        "lengths must be positive": lambda: rrhf_loss(logps, None, rewards, lengths=0 * lengths),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message): call()


# --- values of DRO, metrics -----------------------------------------------------------------

def test_dro_value_may_be_given_and_learned():
    "The profiled V is the best V; with a V of one's own equal rewards and single candidates count."
    logps, ref, rewards, _ = batch(21)
    best = (rewards - .8 * (logps - ref)).mean(1).requires_grad_()
    given_v = dro_loss(logps, ref, rewards, tau=.8, value=best)
    close(given_v, dro_loss(logps, ref, rewards, tau=.8))
    given_v.sum().backward()
    close(best.grad, torch.zeros(4, dtype=torch.float64))
    single = dro_loss(logps[:, :1], ref[:, :1], rewards[:, :1], tau=.8, value=.5)
    close(single, (rewards[:, 0] - .5 - .8 * (logps - ref)[:, 0])**2)


def test_sigma_divides_the_rewards_of_the_relatives():
    logps, ref, rewards, _ = batch(22)
    sigma = torch.tensor([.5, 1., 2., 4.]).double()
    for name in ("rpo_sq", "rpo_bwd", "distilled_dpo", "infonca", "dro"):
        close(preference_loss(name, logps, ref, rewards, sigma=sigma),
              preference_loss(name, logps, ref, rewards / sigma[:, None]))


def test_calibration_metrics():
    "Slope 1/gamma, R squared and correlation 1 at the optimum; 0 at the start. R² is 1 - M/2."
    logps, ref, rewards, _ = batch(23)
    sigma, zero = rewards.std(1, keepdim=True), torch.zeros(4, 5).double()
    at_best = calibration_metrics(rewards / (.25 * sigma) + 7, rewards, gamma=.25)
    close([at_best[k].item() for k in ("slope", "r2", "correlation")], [4., 1., 1.])
    assert {k: v.item() for k, v in calibration_metrics(zero, rewards, gamma=.3).items()} == {
        "slope": 0., "correlation": 0., "r2": 0.}
    got = calibration_metrics(logps - ref, rewards, gamma=.3)["r2"]
    close(got, 1 - vcb_loss(logps, ref, rewards, gamma=.3).mean() / 2)
    free = calibration_metrics(logps - ref, rewards)
    assert got <= free["correlation"]**2 <= 1 and "r2" not in free
    z, l = (x - x.mean(1, keepdim=True) for x in (rewards / sigma, logps - ref))
    close(free["correlation"], torch.corrcoef(torch.stack([z.flatten(), l.flatten()]))[0, 1])
    backwards = calibration_metrics(-5 * rewards, rewards, gamma=1.)
    assert backwards["r2"] < 0 and backwards["correlation"] < 0


def test_only_vcb_aims_at_a_slope():
    "By its own gamma or the default; other losses, and no loss at all, name none."
    assert [n for n in LOSSES if target_gamma(n)] == ["vcb", "vcb_lse"]
    assert target_gamma("vcb", {"gamma": .25}) == .25 and target_gamma("vcb", {}) == 1
    assert target_gamma("", None) is None and target_gamma("dpo", {"beta": .1}) is None


def test_calibration_metrics_pool_within_prompts_and_skip_what_carries_none():
    logps, ref, rewards, _, mask = ragged(24)
    base = calibration_metrics(logps - ref, rewards, mask)
    shifted = calibration_metrics(logps - ref + 100 * torch.arange(5.)[:, None], rewards, mask)
    close(shifted, base, rtol=1e-6, atol=1e-8)
    extra = [torch.cat([x, y[None]]) for x, y in ((logps - ref, torch.arange(6.).double()),
             (rewards, torch.full((6,), .1).double()), (mask, torch.ones(6, dtype=torch.bool)))]
    close(calibration_metrics(*extra), base)
    nothing = calibration_metrics(torch.zeros(1, 3), torch.ones(1, 3), gamma=1.)
    assert nothing["r2"] == 0 and nothing["slope"] == 0


# --- TRL as a peer --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trl_case(tmp_path_factory):
    "A real DPOTrainer over a tiny policy and another reference, by loss type and beta."
    trl = pytest.importorskip("trl", reason="TRL is only a peer of the tests")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    words = {w: i for i, w in enumerate("<eos> <pad> a b c d e f".split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>",
                                        pad_token="<pad>")
    config = dict(vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=64, max_position_embeddings=32, hidden_dropout=0.,
                  attention_dropout=0.)
    make = lambda seed: (torch.manual_seed(seed), GPTNeoXForCausalLM(GPTNeoXConfig(**config)))[1]
    data = Dataset.from_dict({"prompt": ["a b", "c"], "chosen": [" c d e", " f"],
                              "rejected": [" b", " a d"]})

    def trainer(loss_type, beta):
        args = trl.DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), loss_type=loss_type,
                             beta=beta, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                             bf16=False, gradient_checkpointing=False, disable_dropout=True)
        policy, ref = make(0), make(1)
        with torch.no_grad():
            for p in policy.parameters(): p.mul_(3)     # far enough from the reference to tell
        return trl.DPOTrainer(policy, ref_model=ref, args=args, train_dataset=data,
                              processing_class=tokenizer)
    return trainer


def plain_logps(model, inputs):
    "Summed completion log-probs `[2, rows]` (chosen, rejected) by a plain forward."
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1).view(2, -1)


@pytest.mark.parametrize("loss_type, beta, ours", [
    ("sigmoid", .3, lambda lp, ref, r, n: dpo_loss(lp, ref, r, beta=.3)),
    ("ipo", .2, lambda lp, ref, r, n: ipo_loss(lp, ref, r, tau=.2, lengths=n,
                                               length_normalize=True)),
    # TRL's hinge is SLiC on log-ratios, divided by delta: no regulariser, delta = 1/beta.
    ("hinge", .1, lambda lp, ref, r, n: .1 * slic_loss(lp - ref, None, r, delta=10., lam_reg=0.)),
])
def test_agrees_with_trl(trl_case, loss_type, beta, ours):
    "Pitfall 4: value and gradient of a real DPOTrainer. Its IPO is per token, ours a sum."
    trainer = trl_case(loss_type, beta)
    inputs = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    theirs = trainer.compute_loss(model, dict(inputs))
    theirs.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    lp = plain_logps(model, inputs).T
    with torch.no_grad(): ref = plain_logps(trainer.ref_model, inputs).T
    lengths = inputs["completion_mask"].sum(1).view(2, -1).T
    loss = ours(lp, ref, torch.tensor([[1., 0.]]).expand(2, 2), lengths).mean()
    loss.backward()
    close(loss, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(model.parameters(), grads):
        close(mine.grad, other, rtol=1e-3, atol=1e-5)
    if loss_type == "ipo":
        assert abs(ipo_loss(lp, ref, torch.tensor([[1., 0.]] * 2), tau=beta).mean() - loss) > 1e-3
