"The playground: what the controls say is what is trained, and what is trained is what is drawn."
import io, json, subprocess, sys
from pathlib import Path

import ipywidgets, matplotlib, pytest, torch
from matplotlib.image import imread

from vcb_nb import widgets
from vcb_nb.losses import LOSSES, check_loss
from vcb_nb.plots import STYLE
from vcb_nb.widgets import (HIGH, LOW, RESPONSES, BenchFigure, alike, bench_world, compute,
                            exact_frontier, outcome, playground, train)
from vcb_nb.worlds import (draw_candidates, expected, fit_table, frontier_reward, kl_divergence,
                           optimal_policy)

ROOT = Path(__file__).parent.parent
close = torch.testing.assert_close
NOTEBOOK = ROOT/"nbs"/"theory"/"10_playground.ipynb"


def drawn(artist, axis="y"):
    return torch.as_tensor(artist.get_xdata() if axis == "x" else artist.get_ydata()).double()


def pixels(png):
    return torch.tensor(imread(io.BytesIO(png))[..., :3].tolist())


@pytest.fixture(scope="module")
def bench():
    return playground("vcb", "dpo")


@pytest.mark.parametrize("seed", range(20))
def test_world_is_standard_and_fits_the_axes(seed):
    world = bench_world(seed)
    close(expected(world.ref_logps, world.rewards), torch.zeros(1).double(), atol=1e-12, rtol=0)
    close(world.reward_std, torch.ones(1).double())
    assert (world.rewards.diff() > 0).all() and world.rewards.shape == (1, RESPONSES)
    left, right = BenchFigure().artists.plane.get_xlim()
    assert (-world.ref_logps[0, -1] < right
            and world.rewards.max() < 3 and world.rewards.min() > -3.2)


def test_strength_is_the_gap_of_one_sigma():
    """IPO's target 1/(2 tau) and SLiC's margin are VCB's gap for one sigma;
    the relatives share gamma."""
    for gamma in (.25, 1., 4.):
        assert alike("vcb", gamma) == {"gamma": gamma}
        assert 1 / (2 * alike("ipo", gamma)["tau"]) == alike("slic", gamma)["delta"] == 1 / gamma
        assert set(alike("dro", gamma).values()) == {gamma}
    for name, loss in LOSSES.items(): assert list(alike(name, .5)) == [loss.strength]


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if not loss.order_based])
@pytest.mark.parametrize("gamma", [.25, 1., 4.])
def test_value_methods_arrive_at_the_optimum(name, gamma):
    world = bench_world(4)
    close(train(world, name, gamma).policy.exp(), optimal_policy(world, gamma).exp(), rtol=0,
          atol=.03)


@pytest.mark.parametrize("name", ["vcb", "ipo", "infonca"])
def test_quick_training_ends_where_adam_does(name):
    world = bench_world(2)
    slow = fit_table(world, name, steps=400, lr=.1, sigma=world.reward_std, **alike(name, .5))
    close(train(world, name, .5).policy.exp(), slow.policy.exp(), rtol=0, atol=.02)


def test_training_is_fit_table():
    "Candidates, sigma and strength of the bench are handed on as they are."
    world = bench_world(7)
    found = train(world, "ipo", .5, candidates=6, seed=3)
    fit = fit_table(world, "ipo", tau=.25, candidates=draw_candidates(world, 6, 3),
                    steps=widgets.STEPS, lr=widgets.FIRST_STEP, optimizer=widgets._rprop,
                    optimum=optimal_policy(world, .5))
    close(found.logps, fit.logps)
    close(found.kl_to_optimum, fit.kl_to_optimum)


def test_frontier_is_exact():
    world = bench_world(1)
    kl, reward = exact_frontier(world)
    for i in (5, 30, 50): close(reward[i], frontier_reward(world, kl[i])[0], rtol=1e-6, atol=1e-6)
    assert (kl.diff() > 0).all() and (reward.diff() > 0).all()


def test_outcome_agrees_with_the_fits():
    comparison = compute(("vcb", "slic", "dro"), .7, 4, 2)
    for row, name, fit in zip(outcome(comparison), comparison.methods, comparison.fits):
        assert row["method"] == name and row["efficiency"] <= 1 + 1e-9
        close(row["KL to SFT"], fit.kl[-1, 0].item())
        close(row["KL to optimum"], fit.kl_to_optimum[-1, 0].item())
        close(row["reward"], fit.reward[-1, 0].item())


@pytest.mark.parametrize("name", ["vbc", "ppo", "", None])
def test_wrong_names_are_refused(name):
    for call in (check_loss, lambda n: alike(n, 1.), lambda n: train(bench_world(), n),
                 lambda n: compute((n, "dpo")), playground, lambda n: playground("vcb", n)):
        with pytest.raises(ValueError, match="Unknown loss .*Valid: vcb, vcb_lse, dpo"):
            call(name)
    with pytest.raises(ValueError, match="Did you mean 'vcb'"): check_loss("vbc")


def test_picture_takes_two_methods():
    with pytest.raises(ValueError, match="two"): BenchFigure().draw(compute(("vcb",)))


def assert_drawn(bench, methods, gamma, candidates, seed):
    "Every moving artist shows a fit made apart from the bench's own memory."
    world, view = bench_world(seed), bench.view.artists
    optimum = optimal_policy(world, gamma)
    close(drawn(view.optimum_bars), optimum[0].exp())
    close(drawn(view.line), (optimum - world.ref_logps)[0])
    close(drawn(view.star, "x"), kl_divergence(optimum, world.ref_logps))
    close(drawn(view.edge), exact_frontier(world)[1])
    for k, name in enumerate(methods):
        fit = train(world, name, gamma, candidates, seed)
        heights = torch.tensor([bar.get_height() for bar in view.heights[k]]).double()
        close(heights, fit.policy[0].exp(), rtol=1e-6, atol=1e-6)
        ratios = (fit.policy - world.ref_logps)[0].clamp(LOW, HIGH)
        close(drawn(view.points[k]), ratios)
        close(drawn(view.paths[k], "x"), fit.kl[:, 0])
        close(drawn(view.paths[k]), fit.reward[:, 0])
        close(drawn(view.ends[k], "x"), fit.kl[-1])


def test_moving_a_control_changes_what_is_drawn(bench):
    "Each control in turn: the picture, the table and the drawn data follow its value."
    state = dict(first="vcb", second="dpo", gamma=1., candidates=0, seed=0)
    for change in (dict(gamma=.5), dict(second="ipo"), dict(candidates=4), dict(seed=3),
                   dict(first="slic")):
        before = bench.picture.value, bench.table.value
        (name, value), = change.items()
        bench.controls[name].value = value
        state |= change
        assert before[0] != bench.picture.value and before[1] != bench.table.value
        assert_drawn(bench, (state["first"], state["second"]), state["gamma"], state["candidates"],
                     state["seed"])
        for row in outcome(bench.comparison): assert f"{row['reward']:.3f}" in bench.table.value


def test_every_pair_of_methods_can_be_shown(bench):
    for name in LOSSES:
        bench.controls["first"].value = bench.controls["second"].value = name
        assert bench.comparison.methods == (name, name)


@pytest.mark.parametrize("style", [{}, STYLE], ids=["matplotlib's style", "the book's"])
def test_fast_picture_is_the_slow_one(style):
    "Pixels drawn over kept pixels equal a full drawing, but for where a line crosses an axis."
    matplotlib.rcParams.update(style)
    view = BenchFigure()
    for setting in ((("vcb", "dpo"), .5), (("ipo", "slic"), 1.)):
        fast = pixels(view.draw(compute(*setting)).png())
        file = io.BytesIO()
        view.figure.savefig(file, format="png", dpi=view.figure.dpi)
        different = ((fast - pixels(file.getvalue())).abs() > .1).any(-1)
        assert different.double().mean() < .004
    assert (pixels(view.draw(compute(("vcb", "dpo"), .5)).png()) < .5).any()


def test_controls_are_labelled_and_continuous(bench):
    for name, control in bench.controls.items():
        assert control.description
        if "Slider" in type(control).__name__: assert control.continuous_update
    assert isinstance(bench, ipywidgets.VBox)
    assert "<th scope" in bench.table.value


def test_needs_no_browser_and_no_transformers():
    code = ("import sys, vcb_nb.widgets as w; b = w.playground(); b.controls['gamma'].value = .5\n"
            "sys.exit('transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_notebook_stores_a_picture_and_no_widget():
    "The bench itself is live only; beside it stands a static figure."
    text = NOTEBOOK.read_text("utf-8")
    notebook = json.loads(text)
    assert "widget-view" not in text and "widgets" not in notebook["metadata"]
    cells = notebook["cells"]
    at = next(i for i, c in enumerate(cells) if "".join(c["source"]).startswith("playground("))
    beside = "".join(cells[at + 1]["outputs"][0]["data"]["text/html"])
    assert not cells[at]["outputs"] and beside.startswith("<img ")
