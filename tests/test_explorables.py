"The figures' JavaScript computes what the library computes, and their HTML stands on its own."
import json, re, shutil, subprocess
from html.parser import HTMLParser

import pytest, torch

from javascript import JS, close
from vcb_nb import explorables, worlds
from vcb_nb.explorables import EXPLORABLES, Explorable, order_value, tilted_policy
from vcb_nb.losses import LOSSES, preference_loss, reward_sigma

RUN = ("const V = require(process.argv[1]); let s = '';"
       "process.stdin.on('data', d => s += d).on('end', () => "
       "console.log(JSON.stringify(JSON.parse(s).map(([path, ...args]) => "
       "path.split('.').reduce((o, k) => o[k], V)(...args)))));")


def node(calls):
    "The values of `[['losses.vcb', ...arguments], ...]`, computed by node from core.js."
    binary = shutil.which("node") or pytest.skip("needs node on the PATH")
    done = subprocess.run([binary, "-e", RUN, str(JS/"core.js")], input=json.dumps(calls),
                          text=True, capture_output=True, check=True)
    return json.loads(done.stdout)


def prompts(count=40, seed=0):
    "Log-probs, reference, rewards of 2 to 6 candidates, with ties and equal rewards among them."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=generator, dtype=torch.float64)
    for k in range(count):
        n = 2 + k % 5
        rewards = draw(n) * 10 ** (k % 3 - 1)
        if k % 7 == 3: rewards[1] = rewards[0]
        if k % 13 == 5: rewards = torch.full((n,), .3, dtype=torch.float64)
        yield (3 * draw(n) - 20).tolist(), (draw(n) - 20).tolist(), rewards.tolist()


SETTINGS = {
    "vcb": [{}, {"gamma": .2}, {"gamma": 2., "lam": .7}, {"lam": 50.}, {"gamma": .5, "sigma": .3}],
    "vcb_lse": [{}, {"lam": 1e-6}, {"lam": 300., "gamma": .1}, {"lam": 0.}],
    "dpo": [{}, {"beta": 2.}], "ipo": [{}, {"tau": .7}],
    "slic": [{}, {"delta": .3, "lam_reg": 1.}, {"lam_reg": 0.}],
    "rrhf": [{}, {"rank_weight": 3.}, {"lengths": True}],
    "rpo_sq": [{}, {"beta": .3, "eta": 2.}, {"sigma": .3}],
    "rpo_bwd": [{}, {"beta": .3, "eta": 2.}, {"sigma": .3}],
    "infonca": [{}, {"beta": 1.5, "alpha": .4}, {"sigma": .3}],
    "dro": [{}, {"tau": .3}, {"sigma": .3}],
}
GRID = [(name, params) for name, all_of in SETTINGS.items() for params in all_of]


def arguments(name, params, n):
    "The parameters for JavaScript, and the same for `preference_loss`."
    for_js, for_torch = dict(params), dict(params)
    lengths = [3. + 2 * i for i in range(n)] if params.get("lengths") else [1.] * n
    if "lengths" in params: for_js["lengths"] = lengths
    for_torch["lengths"] = torch.tensor([lengths], dtype=torch.float64)
    if "sigma" in params: for_torch["sigma"] = torch.tensor([params["sigma"]], dtype=torch.float64)
    return for_js, for_torch


@pytest.mark.filterwarnings("ignore:With two candidates")
@pytest.mark.parametrize("name,params", GRID, ids=lambda x: str(x))
def test_loss_and_gradient_equal_torch(name, params):
    "Values to 1e-9 and gradients to 1e-9 of the torch loss, over 40 prompts of 2 to 6 candidates."
    calls, values, gradients = [], [], []
    for logps, ref, rewards in prompts():
        for_js, for_torch = arguments(name, params, len(logps))
        calls += [[f"{kind}.{name}", logps, ref, rewards, for_js]
                  for kind in ("losses", "gradients")]
        x = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
        loss = preference_loss(name, x, torch.tensor([ref], dtype=torch.float64),
                               torch.tensor([rewards], dtype=torch.float64), **for_torch)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss.sum(), x)[0][0].tolist())
    found = node(calls)
    close(found[::2], values)
    for got, wanted in zip(found[1::2], gradients): close(got, wanted)


def test_defaults_equal_the_losses_defaults():
    "A hyper-parameter left out and one given at the library's default make the same number."
    logps, ref, rewards = [-1., -4., -2.], [-2., -2.5, -3.], [.1, .85, .9]
    for name in SETTINGS:
        stated = {k: v for k, v in LOSSES[name].params.items() if not isinstance(v, bool)}
        calls = [[f"losses.{name}", logps, ref, rewards, p] for p in ({}, stated)]
        assert len(set(node(calls))) == 1


@pytest.mark.parametrize("gamma", [.1, .5, 1., 10.])
def test_closed_forms_equal_the_exact_world(gamma):
    "Optimum, Z, KL, expected reward, sigma: as in `worlds`, to 1e-9."
    world = worlds.random_world(6, 12, seed=3)
    optimum, z = worlds.optimal_policy(world, gamma), worlds.log_partition(world, gamma)
    for k, (ref, rewards) in enumerate(zip(world.ref_logps.tolist(), world.rewards.tolist())):
        found = node([["math.optimum", ref, rewards, gamma],
                      ["math.logPartition", ref, rewards, gamma],
                      ["math.kl", optimum[k].tolist(), ref],
                      ["math.expected", optimum[k].tolist(), rewards],
                      ["math.rewardStd", ref, rewards], ["math.frontier", ref, rewards, [gamma]]])
        kl, reward = (worlds.kl_divergence(optimum, world.ref_logps)[k],
                      worlds.expected(optimum, world.rewards)[k])
        for got, wanted in zip(found[:5], (optimum[k], z[k], kl, reward, world.reward_std[k])):
            close(got, wanted)
        close([found[5][0]["kl"], found[5][0]["reward"]], torch.stack([kl, reward]))
        close(found[5][0]["reward"],
              worlds.frontier_reward(world, worlds.kl_divergence(optimum, world.ref_logps))[k])


@pytest.mark.parametrize("name,params", [
    ("vcb", {"gamma": .5}), ("ipo", {"tau": .25}), ("dpo", {"beta": .5}), ("slic", {"delta": 1.}),
    ("rrhf", {"rank_weight": 1.})])
def test_descent_equals_torch_sgd(name, params):
    "100 steps in JavaScript are 100 steps of torch's SGD on the same loss."
    world = worlds.table_world([.5, .3, .2], [.1, .85, .9])
    sigma = {"sigma": reward_sigma(world.rewards)[0]} if name == "vcb" else {}
    fit = worlds.fit_table(world, name, steps=100, lr=.2, optimizer=torch.optim.SGD, **sigma,
                           **params)
    [path] = node([["math.descend", name, world.ref_logps[0].tolist(), world.rewards[0].tolist(),
                    params, {"steps": 100, "lr": .2}]])
    close(path, fit.logps[:, 0], 1e-8)


def test_the_limits_stated_in_words():
    "VCB reaches its gaps, IPO 1/(3 tau) between neighbours; DPO, SLiC and RRHF are still moving."
    ref, rewards, steps = [-1.0986] * 3, [.1, .85, .9], 4000
    options = {"steps": steps, "lr": .2}
    settings = {"vcb": {"gamma": .5}, "ipo": {"tau": .25}, "dpo": {"beta": .5}, "slic": {},
                "rrhf": {}}
    paths = node([["math.descend", name, ref, rewards, params, options]
                  for name, params in settings.items()])
    paths = {name: torch.tensor(path, dtype=torch.float64) for name, path in zip(settings, paths)}
    gaps = {name: path.diff(dim=1) for name, path in paths.items()}
    sigma = torch.tensor(rewards, dtype=torch.float64).std()
    close(gaps["vcb"][-1] * .5 * sigma, [.75, .05])
    close(gaps["ipo"][-1], [4 / 3, 4 / 3])
    for name in ("dpo", "slic", "rrhf"):
        best = paths[name][:, 2]
        assert best[-1] > best[steps // 2] > best[steps // 8], name
    assert gaps["rrhf"][-1, 0].abs() < 1e-9  # the order of the two others is all it asks


@pytest.mark.parametrize("low,high", [(0., .2), (0., 1.), (-1.3, 2.), (0., 17.), (-.001, .001)])
def test_ticks_are_round_and_inside(low, high):
    [found] = node([["ui.ticks", low, high, 5]])
    assert 3 <= len(found) <= 12 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)


class Parts(HTMLParser):
    "The nesting, the attributes and the text of a piece of HTML."
    VOID = {"input", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data


@pytest.mark.parametrize("name", EXPLORABLES)
def test_html_is_well_formed_and_needs_no_network(name):
    figure = EXPLORABLES[name]()
    text = figure._repr_html_()
    parts = Parts(text)
    assert (not parts.open
            and [t for t, _ in parts.tags] == ["div", "p", "noscript", "style", "script"])
    root = parts.tags[0][1]
    assert json.loads(root["data-config"]) == json.loads(json.dumps(figure.config))
    assert (root["data-vcbx"] == name == figure.name and root["role"] == "group"
            and root["aria-label"])
    assert (figure.alt in parts.text["p"] and "needs JavaScript" in parts.text["noscript"]
            and repr(figure) == figure.alt)
    assert set(re.findall(r"\w+://[\w./-]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(import|fetch|XMLHttpRequest|WebSocket|eval|Function|localStorage|"
                         r"innerHTML)\s*[(=.]", text)
    assert text == EXPLORABLES[name]()._repr_html_() and len(text) < 80_000


def test_figures_have_names_of_their_own():
    "A screen reader's list of the groups on a page tells the figures apart, and says what each is."
    names = [Parts(make()._repr_html_()).tags[0][1]["aria-label"] for make in EXPLORABLES.values()]
    assert len(set(names)) == len(names) and all(len(name.split()) > 5 for name in names)
    own = Explorable("mine", {}, "In words.", "0")._repr_html_()
    assert 'aria-label="Interactive figure: mine"' in own


@pytest.mark.parametrize("name", EXPLORABLES)
def test_a_sanitiser_leaves_the_text(name):
    "Where script, style and noscript are dropped whole, as on GitHub, the text in words is left."
    figure = EXPLORABLES[name]()
    text = Parts(figure._repr_html_()).text
    left = "".join(v for tag, v in text.items() if tag not in ("script", "style", "noscript"))
    assert left.strip() == figure.alt


def test_config_cannot_end_the_element():
    "Quotes and tags in the text stay text."
    figure = Explorable("order_value",
                        order_value().config | {"note": "'\"></div><script>x</script>"}, "<b>'\"&")
    parts = Parts(figure._repr_html_())
    assert [t for t, _ in parts.tags] == ["div", "p", "noscript", "style", "script"]
    assert json.loads(parts.tags[0][1]["data-config"])["note"].startswith("'\"></div>")


@pytest.mark.parametrize("call,word", [
    (lambda: order_value((1, 2)), "rewards"), (lambda: order_value((1, 1, 1)), "equal"),
    (lambda: order_value((1, 2, float("nan"))), "finite"),
    (lambda: order_value(probs=(1, 1)), "probs"),
    (lambda: order_value(probs=(1, 0, 1)), "positive"), (lambda: order_value(gamma=0), "gamma"),
    (lambda: order_value(tau=9), "tau"), (lambda: order_value(training=301), "training"),
    (lambda: tilted_policy(gamma=float("nan")), "gamma"),
    (lambda: tilted_policy((1., 2.)), "probs"),
])
def test_bad_inputs_are_named(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_scripts_are_short_plain_and_load_twice():
    """No line over 100 columns; a figure's file declares nothing at the top,
    so that it may run again."""
    for path in JS.glob("*"):
        assert max(map(len, path.read_text("utf-8").splitlines())) <= 100, path.name
    binary = shutil.which("node") or pytest.skip("needs node on the PATH")
    both = "".join((JS/f"{name}.js").read_text("utf-8") for name in ["core", *EXPLORABLES])
    check = both + both + "if (Object.keys(VCBX.figures).length !== %d) throw 1;" % len(EXPLORABLES)
    subprocess.run([binary, "-"], input=check, text=True, check=True)
