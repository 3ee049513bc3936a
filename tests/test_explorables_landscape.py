"""The loss landscape and the hard pairs: their JavaScript against torch, and in a real browser."""
import itertools, math, re
from functools import partial

import pytest
import torch

import javascript
from javascript import close
from vcb_nb.explorables import hard_pairs, loss_landscape
from vcb_nb.losses import preference_loss

REWARDS = [.9, .85, .1]
METHODS = {"vcb": {"gamma": .7}, "vcb_lse": {"gamma": 1.3, "lam": 2.5}, "dpo": {"beta": .5},
           "ipo": {"tau": .25}, "slic": {"delta": 1.2, "lam_reg": .3}, "rrhf": {"rank_weight": 2.}}
# No point lies on a hinge's corner, where the slope is a matter of convention.
POINTS = [(-2 + 8 * i / 20 + .013, -2 + 8 * j / 20 + .017) for i in range(21) for j in range(21)]
RESIDUALS = [[.9, -.3, 1.6, .2, -1.1, -.6], [0., 0., 0., 1.], [2., -2., 2., -2., 2., -2.],
             [.3, .3, .3]]
node = partial(javascript.node, figures=("loss_landscape", "hard_pairs"))
LANDSCAPE = "VCBX.landscape.landscape(method, params, rewards)"


def torch_loss(method, gaps, rewards, **params):
    "The loss over three responses and a uniform SFT policy, from the gaps `[points, 2]`."
    x, y = gaps.unbind(1)
    logps = torch.stack([x + y, y, torch.zeros_like(x)], 1).log_softmax(1)
    repeat = lambda row: torch.tensor(row, dtype=torch.float64).expand(len(gaps), 3)
    return preference_loss(method, logps, repeat([math.log(1 / 3)] * 3), repeat(rewards),
                           lengths=repeat([1.] * 3), **params)


@pytest.mark.parametrize("rewards", [REWARDS, [2., -1., -1.5]], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_landscape_is_the_torch_loss(method, rewards):
    "Value and gradient of the map equal torch's in float64 at 441 points, to 1e-9."
    expression = ("(map => points.map(([x, y]) => [map.value(x, y), ...map.gradient(x, y)]))"
                  f"({LANDSCAPE})")
    found = node(expression, points=POINTS, method=method, params=METHODS[method], rewards=rewards)
    gaps = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    loss = torch_loss(method, gaps, rewards, **METHODS[method])
    close(found, torch.cat([loss.detach()[:, None], torch.autograd.grad(loss.sum(), gaps)[0]], 1))


def test_default_hyper_parameters_are_the_librarys():
    for method in METHODS:
        found = node(f"{LANDSCAPE}.value(.7, -1.1)", method=method, params={}, rewards=REWARDS)
        close(found, torch_loss(method, torch.tensor([[.7, -1.1]], dtype=torch.float64),
                                REWARDS)[0])


@pytest.mark.parametrize("method,params", [
    ("vcb", {"gamma": .7}), ("vcb_lse", {"gamma": .5, "lam": 3.}), ("ipo", {"tau": .15})], ids=str)
def test_the_star_is_the_lowest_point(method, params):
    "Torch's gradient is 0 at the marked minimum and the loss is higher all around it."
    star = node(f"{LANDSCAPE}.minimum", method=method, params=params, rewards=REWARDS)
    gaps = torch.tensor([star], dtype=torch.float64, requires_grad=True)
    loss = torch_loss(method, gaps, REWARDS, **params)
    close(torch.autograd.grad(loss.sum(), gaps)[0], [[0., 0.]])
    around = torch.tensor([[math.cos(a), math.sin(a)] for a in range(7)], dtype=torch.float64) * .1
    assert (torch_loss(method, gaps.detach() + around, REWARDS, **params) > loss.detach()).all()


def test_star_values():
    "VCB: reward gaps over gamma sigma. IPO: 1/(3 tau) twice. The others have no lowest point."
    star = lambda method: node(f"{LANDSCAPE}.minimum", method=method, params=METHODS[method],
                               rewards=REWARDS)
    scale = .7 * torch.tensor(REWARDS, dtype=torch.float64).std()
    close(star("vcb"), [.05 / scale, .75 / scale])
    close(star("ipo"), [4 / 3, 4 / 3])
    assert star("dpo") is star("slic") is star("rrhf") is None


@pytest.mark.parametrize("method", METHODS)
def test_descent_in_gaps_is_descent_on_logits(method):
    "The map's trail equals the gaps of the shared descent on three logits, step by step."
    expression = ("(map => [VCBX.landscape.descend(map, [0, 0], 300), "
                  "VCBX.math.descend(method, [0, 0, 0].map(() =>"
                  f"-Math.log(3)), rewards, params, {{steps: 300, lr: map.step}})])({LANDSCAPE})")
    trail, path = node(expression, method=method, params=METHODS[method], rewards=REWARDS)
    close(-torch.tensor(path, dtype=torch.float64).diff(dim=1), trail)


@pytest.mark.parametrize("start", [(0, 0), (6, 6), (-2, 5), (5, -2)], ids=str)
def test_where_each_descent_ends(start):
    "VCB and IPO at their lowest points from every start; DPO, SLiC and RRHF are still going up."
    def ends(method, **params):
        "The gaps 500 steps before the end, and at the end."
        trail = node(f"(t => [t.at(-501), t.at(-1)])(VCBX.landscape.descend({LANDSCAPE}, start))",
                     method=method, params=params, rewards=REWARDS, start=start)
        return torch.tensor(trail, dtype=torch.float64)
    star = lambda method, **params: node(f"{LANDSCAPE}.minimum", method=method, params=params,
                                         rewards=REWARDS)
    for gamma in (.35, 1., 3.):
        close(ends("vcb", gamma=gamma)[-1], star("vcb", gamma=gamma), 1e-4)
        close(ends("vcb_lse", gamma=gamma, lam=1.)[-1], star("vcb", gamma=gamma), 1e-4)
    close(ends("ipo", tau=.25)[-1], [4 / 3, 4 / 3], 1e-4)
    dpo = ends("dpo", beta=.5)
    assert (dpo[1] > dpo[0]).all() and dpo[1].min() > 4
    assert (ends("slic", delta=1.)[-1] > .95).all()  # its margins hold
    best = lambda gaps: -torch.log1p((-gaps[0]).exp() + (-gaps.sum()).exp())
    for method in ("slic", "rrhf"):
        early, late = ends(method)
        if start == (0, 0): assert best(late) > best(early)  # the best response still gains
    if start == (0, 0): assert late[1].abs() < 1e-9  # nothing parts RRHF's second from its third


def test_contours_lie_at_their_heights():
    "Every end of a contour's piece has a height of k/levels, and every level that occurs is drawn."
    expression = ("(() => { const {grid} = "
                  f"VCBX.landscape.heights({LANDSCAPE}.value, [-2, 6], 33), ends = [];"
                  "VCBX.landscape.contours(grid, 33, 10, (...ends4) => ends.push(ends4));"
                  "return {grid: [...grid], ends}; })()")
    found = node(expression, method="vcb", params={}, rewards=REWARDS)
    grid = torch.tensor(found["grid"], dtype=torch.float64).view(33, 33)
    assert grid.min() == 0 and grid.max() == 1
    ends = torch.tensor(found["ends"], dtype=torch.float64).view(-1, 2)
    low = ends.floor().long().clamp(max=31)
    (x, y), (i, j) = (ends - low).T, low.T
    height = (grid[j, i] * (1 - x) * (1 - y) + grid[j, i + 1] * x * (1 - y)
              + grid[j + 1, i] * (1 - x) * y + grid[j + 1, i + 1] * x * y)
    level = (10 * height).round()
    close(10 * height, level)
    assert set(level.tolist()) >= set(range(1, 10))


@pytest.mark.parametrize("lam", [1e-3, .3, 4., 50.])
@pytest.mark.parametrize("residuals", RESIDUALS, ids=str)
def test_pair_weights_are_the_gradient(residuals, lam):
    "Weights equal d LSE / d L_ij of autograd, and the loss the library's LogSumExp, to 1e-9."
    found = node("VCBX.hardPairs.weigh(residuals, lam)", residuals=residuals, lam=lam)
    pairs = list(itertools.combinations(range(len(residuals)), 2))
    e = torch.tensor(residuals, dtype=torch.float64)
    losses = torch.stack([(e[i] - e[j]).square() for i, j in pairs]).requires_grad_()
    lse = (torch.logsumexp(lam * losses, 0) - math.log(len(pairs))) / lam
    weights = dict(zip(pairs, torch.autograd.grad(lse, losses)[0].tolist()))
    close(found["lse"], lse.item())
    rows = {(row["i"], row["j"]): row for row in found["rows"]}
    assert (set(rows) == set(pairs)
            and [r["loss"] for r in found["rows"]] == sorted(losses.tolist())[::-1])
    close([rows[p]["weight"] for p in pairs], [weights[p] for p in pairs])
    assert found["mean"] - 1e-12 <= found["lse"] <= found["most"] + 1e-12


@pytest.mark.parametrize("lam", [0., .3, 4.])
def test_pair_loss_is_vcb(lam):
    "With residuals of a real prompt the loss is `vcb_loss` with this lambda; at 0 the plain mean."
    logps, rewards = [-1., -4., -2., -3.3], [.1, .85, .9, -.4]
    t = lambda x: torch.tensor([x], dtype=torch.float64)
    wanted = preference_loss("vcb", t(logps), t([-2.] * 4), t(rewards), gamma=.8, lam=lam)
    found = node("VCBX.hardPairs.weigh("
                 "VCBX.math.residuals(logps.map(l => l + 2), rewards, {gamma: .8}), lam)",
                 logps=logps, rewards=rewards, lam=lam)
    close(found["lse"], wanted[0].item())
    if lam == 0: close([row["weight"] for row in found["rows"]], [1 / 6] * 6)


def test_other_residuals_are_seeded_and_fit():
    draws = node("[1, 2, 1, 77].map(seed => VCBX.hardPairs.draw(seed, 6, 2))")
    assert draws[0] == draws[2] != draws[1] and all(abs(e) <= 1.8 for row in draws for e in row)
    assert all(len(set(row)) > 4 for row in draws)


@pytest.mark.parametrize("call,word", [
    (lambda: loss_landscape((1, 2)), "rewards"), (lambda: loss_landscape((1, 1, 2)), "different"),
    (lambda: loss_landscape((1, 2, float("nan"))), "finite"),
    (lambda: loss_landscape(method="ppo"), "vcb_lse"),
    (lambda: loss_landscape(gamma=.1), "gamma"), (lambda: loss_landscape(lam=0), "lam"),
    (lambda: loss_landscape(rank_weight=11), "rank_weight"), (lambda: hard_pairs((1, 2)), "3 to 8"),
    (lambda: hard_pairs((1, 2, 3)), re.escape("residuals[2]")), (lambda: hard_pairs(lam=-1), "lam"),
    (lambda: hard_pairs((0, 1, float("nan"))), re.escape("residuals[2]")),
])
def test_bad_inputs_are_named(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_rewards_may_come_in_any_order():
    assert loss_landscape((.1, .9, .85)).config == loss_landscape().config


# ---- in a browser

SAID = "document.querySelector('.vcbx-result').textContent"


@pytest.fixture
def show(browser, tmp_path):
    "A function: a figure -> the browser with a page of it; `still` asks for reduced motion."
    def show(figure, still=True):
        path = tmp_path/"page.html"
        path.write_text('<!doctype html><link rel="icon" href="data:,"><meta charset="utf-8">'
                        f'<body style="color:#222">{figure._repr_html_()}</body>', "utf-8")
        browser.viewport(1000)
        motion = {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}
        browser.send("Emulation.setEmulatedMedia", features=[motion])
        browser.open(path.as_uri())
        browser.settle()
        return browser
    yield show
    assert browser.errors == []


def press(page, label):
    page.evaluate("[...document.querySelectorAll('button')]"
                  f".find(b => b.textContent === {label!r}).click()")
    page.settle()


@pytest.mark.parametrize("method,words", [
    ("vcb", "VCB stops at gaps of 0.11 and 1.67 nats, "
            "in proportion to the reward gaps of 0.05 and 0.75"),
    ("vcb_lse", "VCB (LSE) stops at gaps of 0.11 and 1.67 nats"),
    ("ipo", "IPO stops at 1.33 and 1.33 nats: equal gaps, "
            "though the reward gaps are 0.05 and 0.75"),
    ("dpo", "nats, off the map, and still growing"), ("slic", "each reaches the margin of 1.00"),
    ("rrhf", "and 0.00 nats: its ranking term asks for the order alone")])
def test_descent_says_where_it_ended(method, words, show):
    "With reduced motion the whole trail stands at once, and the sentence says where it led."
    page = show(loss_landscape(method=method))
    press(page, "Descend")
    assert words in page.evaluate(SAID)
    drawn = page.evaluate("[...document.querySelectorAll('svg polyline')]"
                          ".map(n => n.getAttribute('points'))"
                          ".filter(p => p.split(' ').length > 20).length")
    assert drawn == 2  # the trail and its casing


def test_a_trail_that_leaves_ends_in_an_arrow_at_the_border(show):
    page = show(loss_landscape(method="dpo"))
    press(page, "Descend")
    boxes = page.evaluate("[...document.querySelectorAll('svg path[transform*=rotate], canvas')]"
                          ".map(n => "
                          "(b => [b.left, b.top, b.right, b.bottom])(n.getBoundingClientRect()))")
    (left, top, right, bottom), arrow = boxes  # the canvas stands before the drawing
    x, y = (arrow[0] + arrow[2]) / 2, (arrow[1] + arrow[3]) / 2
    assert left < x < right + 9 and top - 9 < y < bottom
    assert min(right - x, y - top) < 12


def test_descent_is_animated(show):
    "Without reduced motion the trail grows over several frames, then the sentence comes."
    page = show(loss_landscape(), still=False)
    press(page, "Descend")
    length = "document.querySelector('svg polyline').getAttribute('points').split(' ').length"
    lengths = [page.evaluate(length)]
    assert "descends" in page.evaluate(SAID)
    page.wait(f"{SAID}.includes('stops')")
    assert lengths[0] < page.evaluate(length)


def test_start_follows_keys_and_click(show):
    page = show(loss_landscape())
    start = "document.querySelector('svg [role=slider]').getAttribute('aria-valuetext')"
    page.evaluate("document.querySelector('svg [role=slider]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"): page.key(key)
    page.key("ArrowUp", modifiers=8)
    page.settle()
    assert page.evaluate(start) == "gaps 0.20 and 0.90 nats"
    left, top, size = page.evaluate("(b => [b.left, b.top, b.width])"
                                    "(document.querySelector('canvas').getBoundingClientRect())")
    page.click(left + size * 5 / 8, top + size * 1 / 8)  # 3 and 5 nats on a map from -2 to 6
    page.settle()
    found = [float(x) for x in re.findall(r"[\d.]+", page.evaluate(start))]
    close(found, [3., 5.], .03)


def test_the_middle_reward_moves_vcb_and_not_ipo(show):
    "The point of the figure: VCB's lowest point follows the second reward, IPO's does not."
    stars = {}
    for method in ("vcb", "ipo"):
        page = show(loss_landscape(method=method))
        star = "document.querySelector('canvas').toDataURL()"
        before = page.evaluate(star)
        page.evaluate("(r => { r.value = .5; r.dispatchEvent(new Event('input')) })"
                      "([...document.querySelectorAll('input[type=range]')].at(-1))")
        page.settle()
        stars[method] = page.evaluate(star) != before
    assert stars == {"vcb": True, "ipo": False}


def test_map_follows_the_theme(show):
    "A page that turns dark while it is open repaints the map in the new tint."
    page = show(loss_landscape())
    before = page.evaluate("document.querySelector('canvas').toDataURL()")
    page.evaluate("void (document.body.style.cssText = 'background:#111;color:#eee')")
    page.wait(f"document.querySelector('canvas').toDataURL() !== {before!r}", 5)


def test_lambda_moves_the_weight_to_the_hardest_pair(show):
    page = show(hard_pairs())
    assert "plain mean, 2.00. Each of the 15 pairs has the weight 1/15" in page.evaluate(SAID)
    slide = ("(r => {{ r.value = {}; r.dispatchEvent(new Event('input')) }})"
             "(document.querySelector('input[type=range]'))")
    page.evaluate(slide.format(1))
    page.settle()
    assert "The hardest pair, 3 and 5, has 100% of the weight" in page.evaluate(SAID)
    page = show(hard_pairs((1., 1., 1.), lam=1.))
    assert "All residuals are equal" in page.evaluate(SAID)
