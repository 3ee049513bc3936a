"""The figures of the playground: what they train and compute in JavaScript is what torch does."""
from functools import partial

import pytest, torch

import javascript
from javascript import close
from vcb_nb import worlds
from vcb_nb.explorables import on_off_policy, reward_errors, scale_shape, two_methods
from vcb_nb.losses import LOSSES, preference_loss
from vcb_nb.widgets import alike

node = partial(javascript.node, figures=("two_methods", "scale_shape", "on_off_policy",
                                         "reward_errors"))
BENCH = two_methods().config["strengths"]
REWARDS, PROBS = [.1, .55, .85, .9, .3, .7], [4., 3., 2., 1., 3., 2.]


def test_the_bench_offers_every_loss_but_the_one_that_is_another():
    "Distilled DPO is RPO-sq with eta = 1; all others are there, with their own strength."
    assert set(BENCH) == set(LOSSES) - {"distilled_dpo"}
    assert all(found["param"] == LOSSES[name].strength for name, found in BENCH.items())


@pytest.mark.parametrize("gamma", [.2, .5, 4.])
@pytest.mark.parametrize("name", BENCH)
def test_strengths_are_alike(name, gamma):
    "A method's own hyper-parameter at a common strength is that of the bench in Python."
    param = BENCH[name]["param"]
    found = node("VCBX.twoMethods.alike(name, param, gamma)", name=name, param=param, gamma=gamma)
    assert {param: found} == pytest.approx(alike(name, gamma))


@pytest.mark.parametrize("n, gamma", [(3, .3), (6, 1.)])
@pytest.mark.parametrize("name", BENCH)
def test_training_is_torchs_adam(name, n, gamma):
    "150 steps of the figure equal Adam on the torch loss, the policy after each to 1e-6."
    world = worlds.table_world(PROBS[:n], REWARDS[:n])
    wanted = worlds.fit_table(world, name, steps=150, lr=.1, sigma=world.reward_std,
                              optimizer=partial(torch.optim.Adam, eps=.01), **alike(name, gamma))
    path, goal, measured = node(
        """(path => [path, VCBX.twoMethods.target(gamma, ref, rewards), path.map(p =>
           VCBX.twoMethods.measure(p, VCBX.twoMethods.target(gamma, ref, rewards), ref, rewards))])
           (VCBX.twoMethods.train(name, param, gamma, ref, rewards, {steps: 150, lr: .1}))""",
        name=name, param=BENCH[name]["param"], gamma=gamma, ref=world.ref_logps[0].tolist(),
        rewards=world.rewards[0].tolist())
    optimum = worlds.optimal_policy(world, gamma)
    close(torch.tensor(path).exp(), wanted.logps[:, 0].exp(), 1e-6)
    close(goal, optimum[0])
    close([m["kl"] for m in measured], wanted.kl[:, 0], 1e-6)
    close([m["reward"] for m in measured], wanted.reward[:, 0], 1e-6)
    off = worlds.kl_divergence(wanted.logps[:, 0], optimum.expand(151, -1))
    close([m["off"] for m in measured], off, 1e-6)


@pytest.mark.parametrize("name", [n for n in BENCH if not LOSSES[n].order_based])
def test_methods_that_see_values_meet_the_line(name):
    "Their log-ratio gaps are the reward gaps over gamma sigma; the better response comes first."
    ref = worlds.table_world(PROBS, REWARDS).ref_logps[0].tolist()
    found = node("""VCBX.twoMethods.gaps(VCBX.twoMethods.train(name, param, .5, ref, rewards,
                    {steps: 2000, lr: .05}).at(-1), ref, rewards)""",
                 name=name, param=BENCH[name]["param"], ref=ref, rewards=REWARDS)
    assert len(found) == 15 and all(gap["asked"] > 0 for gap in found)
    close([gap["got"] for gap in found], [gap["asked"] / .5 for gap in found], 2e-3)


def test_the_order_alone_moves_dpo_ipo_slic_and_rrhf():
    "Rewards that keep their order keep these methods' whole path; the values move VCB."
    ref = worlds.table_world(PROBS, REWARDS).ref_logps[0].tolist()
    expression = ("[one, other].map(r => VCBX.math.train(name, ref, r, {},"
                  " {steps: 50, lr: .1}).at(-1))")
    for name, loss in LOSSES.items():
        if name not in BENCH: continue
        one, other = node(expression, name=name, ref=ref, one=REWARDS, other=[
            r ** 2 for r in REWARDS])
        assert (one == other) == loss.order_based, name


def test_equal_rewards_leave_every_policy_alone():
    ref = worlds.table_world(PROBS, REWARDS).ref_logps[0].tolist()
    for name, found in BENCH.items():
        end, goal = node("""[VCBX.twoMethods.train(name, param, .5, ref, rewards,
                             {steps: 20, lr: .1}).at(-1),
                            VCBX.twoMethods.target(.5, ref, rewards)]""",
                         name=name, param=found["param"], ref=ref, rewards=[.4] * 6)
        close(end, ref)
        close(goal, ref)


@pytest.mark.parametrize("call,word", [
    (lambda: two_methods("vbc"), "vbc"), (lambda: two_methods("vcb", "distilled_dpo"), "distilled"),
    (lambda: two_methods(rewards=(.1, .2, .3)), "rewards"),
    (lambda: two_methods(rewards=(.1, .2, .3, .4, .5, 1.5)), r"rewards\[5\]"),
    (lambda: two_methods(n=7), "n is 7"), (lambda: two_methods(gamma=0), "gamma"),
    (lambda: two_methods(training=301), "training")])
def test_bad_inputs_are_named(call, word):
    with pytest.raises(ValueError, match=word): call()


# Scale and shape

def gamma_world(skew, size=40_001):
    "Standardised rewards of this skewness on a fine grid, by torch's own gamma density."
    if not skew: z = torch.linspace(-12, 12, size, dtype=torch.float64)
    else:
        shape, end = 4 / skew ** 2, 4 / skew ** 2 + 60 * 2 / abs(skew) + 60
        y = (torch.arange(size, dtype=torch.float64) + .5) * end / size
        z = (y - shape) / shape ** .5 * (1 if skew > 0 else -1)
    log_density = (-z.square() / 2 if not skew else
                   torch.distributions.Gamma(torch.tensor(shape, dtype=torch.float64), 1.)
                   .log_prob(y))
    return worlds.TableWorld(log_density.log_softmax(0)[None], z[None])


@pytest.mark.parametrize("gamma", [1.3, 2., 4.])
@pytest.mark.parametrize("skew", [-2., -.7, 0., .05, 1., 1.5, 2.])
def test_cost_of_a_shape_is_that_of_a_fine_table(skew, gamma):
    "KL and gain of the closed form equal sums over 40 000 responses, to 1e-4 relative."
    if skew == 2. and gamma < 2: gamma = 1.8
    world = gamma_world(skew)
    optimum = worlds.optimal_policy(world, gamma, sigma=1.)
    found = node("VCBX.scaleShape.tilt(skew, 1 / gamma)", skew=skew, gamma=gamma)
    close([found["kl"]], worlds.kl_divergence(optimum, world.ref_logps), 1e-4)
    close([found["gain"]], worlds.expected(optimum, world.rewards), 1e-4)


@pytest.mark.parametrize("skew", [-1.5, -.4, .4, 1.5])
def test_the_series_names_the_third_cumulant(skew):
    "What is left after the terms up to the fourth shrinks as fast as 1/gamma^5."
    left = []
    for gamma in (20., 40.):
        exact, terms = node("[VCBX.scaleShape.spent(skew, gamma),"
                            " VCBX.scaleShape.terms(skew, gamma)]", skew=skew, gamma=gamma)
        left.append(abs(exact - sum(terms.values())))
        assert (exact > terms["gaussian"]) == (skew > 0)
    assert left[1] < left[0] / 2 ** 4.5


def test_exponential_rewards_have_no_optimum_at_gamma_one():
    assert node("[VCBX.scaleShape.spent(2, 1) === Infinity, VCBX.scaleShape.spent(2, 2)]") == [
        True, pytest.approx(1 - torch.tensor(2., dtype=torch.float64).log().item())]


@pytest.mark.parametrize("skew,t", [(0., .5), (1.2, 0.), (1.2, .8), (-1.2, .8), (.1, 1.), (2., .4)])
def test_densities_are_tilted_and_sum_to_one(skew, t):
    "Density of the optimum = density under SFT times exp(t z - k(t)); its area is 1."
    z = torch.linspace(-8, 30, 7601, dtype=torch.float64).tolist()
    tilted, plain = node("[t, 0].map(s => z.map(v => VCBX.scaleShape.logDensity(skew, s, v))"
                         ".map(v => v > -1e9 ? v : -1e9))", skew=skew, t=t, z=z)
    area = .005 * torch.tensor(tilted, dtype=torch.float64).exp().sum()
    assert abs(area - 1) < .02 if skew == 2. else abs(area - 1) < 1e-4
    ratio = [a - b - t * v for a, b, v in zip(tilted, plain, z) if b > -50]
    close(ratio, [ratio[0]] * len(ratio), 1e-7)


# On policy and off policy

WORLD = worlds.table_world(on_off_policy().config["probs"], on_off_policy().config["rewards"])
TRAIN = ("VCBX.onOffPolicy.train(ref, rewards, {fresh, n, gamma, seed, steps: 500, lr: .1})")


def on_off(fresh, n, gamma, seed=0):
    "Path of policies and the candidates of every step."
    return node(TRAIN, ref=WORLD.ref_logps[0].tolist(), rewards=WORLD.rewards[0].tolist(),
                fresh=fresh, n=n, gamma=gamma, seed=seed)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("n, gamma", [(2, 1.), (4, .5), (8, 3.)])
def test_on_and_off_policy_train_as_torch_does(fresh, n, gamma):
    "120 steps on the figure's own draws: Adam on the torch loss makes the same policies, to 1e-6."
    found = on_off(fresh, n, gamma)
    logits = WORLD.ref_logps.clone().requires_grad_()
    adam = torch.optim.Adam([logits], eps=.01)
    for step, pick in enumerate(found["picks"][:120]):
        index = torch.tensor([pick])
        adam.param_groups[0]["lr"] = .1 * (1 - step / 500)
        some = [x.gather(1, index) for x in (logits.log_softmax(1), WORLD.ref_logps, WORLD.rewards)]
        adam.zero_grad()
        preference_loss("vcb", *some, sigma=WORLD.reward_std, gamma=gamma).sum().backward()
        adam.step()
        close(torch.tensor(found["path"][step + 1], dtype=torch.float64).exp(),
              logits.detach().softmax(1)[0], 1e-6)


def test_fresh_candidates_arrive_and_missed_ones_stay():
    """At n = 4 and gamma = 1, ten seeds: fresh candidates end within 1e-3 nats of the optimum.
    Responses that were never drawn keep the SFT model's odds among themselves."""
    optimum = worlds.optimal_policy(WORLD, 1.)
    for seed in range(10):
        fixed, fresh = (on_off(kind, 4, 1., seed) for kind in (False, True))
        ends = [torch.tensor(x["path"][-1:], dtype=torch.float64) for x in (fixed, fresh)]
        off = [worlds.kl_divergence(end, optimum).item() for end in ends]
        assert off[1] < 1e-3 and off[0] > 10 * off[1]
        assert all(pick == fixed["picks"][0] for pick in fixed["picks"])
        missed = [i for i in range(8) if i not in fixed["picks"][0]]
        ratios = (ends[0] - WORLD.ref_logps)[0, missed]
        close(ratios, ratios[:1].expand(len(missed)), 1e-9)


def test_candidates_are_drawn_from_the_policy():
    "20 000 draws: each share is within four standard errors of its probability."
    probs = WORLD.ref_logps[0].exp()
    index = node("VCBX.onOffPolicy.drawn(ref, 20000, VCBX.onOffPolicy.random(3))",
                 ref=WORLD.ref_logps[0].tolist())
    share = torch.bincount(torch.tensor(index), minlength=8) / 20_000
    assert ((share - probs).abs() < 4 * (probs * (1 - probs) / 20_000).sqrt()).all()


ERRING = dict(accuracy=.7, share=.4, prompts=32, bend=.6)


def fitted(world, prompts=32, worlds=400, candidates=8):
    """Least squares of seen rewards on six normal features, in many simulated worlds: θ, and new
    candidates with their seen and true rewards."""
    generator = torch.Generator().manual_seed(0)
    def candidates_of(m):
        normal = lambda *more: torch.randn(worlds, m, candidates, *more, generator=generator,
                                           dtype=torch.float64)
        f, noise = normal(6), normal()
        seen = f[..., 0] + world["bias"] * f[..., 1] + world["noise"]**.5 * noise
        return f, seen, f[..., 0] - world["bend"] / 2 * f[..., 1].square()
    f, seen, _ = candidates_of(prompts)
    x, y = (v - v.mean(2, keepdim=True) for v in (f, seen))
    theta = torch.linalg.lstsq(x.flatten(1, 2), y.flatten(1)[..., None]).solution[..., 0]
    return theta, candidates_of(64)


def test_a_fit_to_erring_rewards_has_the_errors_that_the_figure_counts():
    "Norm, gains at 1.5 nats, KL at γ and both correlations, against 400 fits of each kind."
    world = node("VCBX.rewardErrors.world(asked)", asked=ERRING)
    theta, (f, seen, true) = fitted(world)
    assert theta.square().sum(1).mean().item() == pytest.approx(world["norm"]**2, rel=.02)
    unit = theta / theta.norm(dim=1, keepdim=True)
    found, spent, plots = node("[VCBX.rewardErrors.gains(world, 1.5), VCBX.rewardErrors.spent("
                               "world, .5), VCBX.rewardErrors.plots(world)]", world=world)
    t = 3**.5 # the tilt that costs 1.5 nats moves normal features by t along θ
    truth = t * unit[:, 0] - world["bend"] / 2 * (t * unit[:, 1]).square()
    assert truth.mean().item() == pytest.approx(found["truth"], rel=.03)
    assert found["best"] == pytest.approx(t)
    said = t * (unit[:, 0] + world["bias"] * unit[:, 1]).mean().item() / seen.std().item()
    assert said == pytest.approx(found["seen"], rel=.02)
    ratios = (f @ theta[:, None, :, None])[..., 0]
    for name, rewards in (("seen", seen), ("truth", true)):
        r = torch.corrcoef(torch.stack([ratios.flatten(), rewards.flatten()]))[0, 1].item()
        assert r == pytest.approx(plots[name], abs=.02)
    nats = 2 * theta.square().sum(1).mean().item() / seen.var().item()
    assert spent == pytest.approx(nats, rel=.03)


def test_the_seen_reward_orders_as_many_pairs_as_the_slider_says():
    "Without bend, as the accuracy is defined."
    world = node("VCBX.rewardErrors.world(asked)", asked={**ERRING, "bend": 0})
    _, (_, seen, true) = fitted(world)
    order = lambda r: r[..., :4] > r[..., 4:]
    assert (order(seen) == order(true)).double().mean().item() == pytest.approx(.7, abs=.005)


def test_the_true_reward_turns_where_the_figure_says():
    "The largest true gain on a fine grid of KL; without bias or bend there is none."
    asked = {**ERRING, "share": 1., "bend": 1.}
    kls = torch.linspace(.01, 12, 1200, dtype=torch.float64)
    turn, gain = node("(w => [VCBX.rewardErrors.turn(w), kls.map(k => VCBX.rewardErrors.gains(w, k)"
                      ".truth)])(VCBX.rewardErrors.world(asked))", asked=asked, kls=kls.tolist())
    assert kls[torch.tensor(gain).argmax()].item() == pytest.approx(turn, abs=.011)
    for harmless in (dict(share=0.), dict(bend=0.)):
        assert node("VCBX.rewardErrors.turn(VCBX.rewardErrors.world(asked)) === Infinity",
                    asked={**asked, **harmless})


@pytest.mark.parametrize("call,word", [
    (lambda: reward_errors(accuracy=.5), "accuracy"), (lambda: reward_errors(share=2), "share"),
    (lambda: reward_errors(prompts=1), "prompts"), (lambda: reward_errors(bend=-1), "bend"),
    (lambda: scale_shape(skew=3), "skew"), (lambda: scale_shape(scale=0), "scale"),
    (lambda: scale_shape(gamma=.1), "gamma"), (lambda: on_off_policy(n=1), "n is 1"),
    (lambda: on_off_policy(seed=20), "seed"), (lambda: on_off_policy(training=501), "training"),
    (lambda: on_off_policy((1., 1.), (1, 1)), "equal")])
def test_bad_inputs_of_the_others_are_named(call, word):
    with pytest.raises(ValueError, match=word): call()
