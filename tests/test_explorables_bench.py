"""The figures of the playground: what they train and compute in JavaScript is what torch does."""
import json, shutil, subprocess
from functools import partial
from pathlib import Path

import pytest, torch

from vcb_nb import explorables, worlds
from vcb_nb.explorables import two_methods
from vcb_nb.losses import LOSSES
from vcb_nb.widgets import alike

JS = Path(explorables.__file__).parent/"js"
FIGURES = ("two_methods",)
BENCH = two_methods().config["strengths"]
REWARDS, PROBS = [.1, .55, .85, .9, .3, .7], [4., 3., 2., 1., 3., 2.]


def node(expression, **values):
    "The value of a JavaScript expression over `VCBX` and `values`, with the figures loaded."
    binary = shutil.which("node") or pytest.skip("needs node on the PATH")
    code = "".join((JS/f"{name}.js").read_text("utf-8") for name in ("core", *FIGURES))
    code += "".join(f"const {k} = {json.dumps(v)};" for k, v in values.items())
    code += f"process.stdout.write(JSON.stringify({expression}));"
    return json.loads(subprocess.run([binary, "-"], input=code, text=True, capture_output=True,
                                     check=True).stdout)


def close(got, wanted, tolerance=1e-9):
    "Both as float64."
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


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
