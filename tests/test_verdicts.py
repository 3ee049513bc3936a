"""What a judge's answers are worth: the order is seen, length is taken out, and no answer is never
a tie."""
import itertools, random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from judge_server import parts
from vcb_nb.artifacts import InputError
from vcb_nb.settings import PACKAGE
from vcb_nb.verdicts import (POINTS, RIDGE, agreement_with, both_orders, compare_pairs, fill,
                             find_template, fit_length, length_controlled, order_effects,
                             pair_verdict, read_choice, read_score)

SHIPPED = sorted((PACKAGE/"judge_templates").glob("*.txt"))
CHOICES = ["A", "B", "tie"]


# --- the question

@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_template_shows_each_thing_where_it_belongs(path):
    "Both orders hold the same texts, each once, in the tags of its place."
    kind, _, name = path.stem.partition("_")
    assert find_template(kind, name) == path
    if kind == "judge":
        texts = [q[0]["content"] for q in both_orders(path.read_text("utf-8"), "P?", "one", "two")]
        assert list(map(parts, texts)) == [dict(a="one", b="two"), dict(a="two", b="one")]
        assert read_choice(texts[0])[1] == "strict" # it shows the form that it asks for
    else:
        (message,) = fill(path.read_text("utf-8"), prompt="P?", response="one")
        assert parts(message["content"]) == dict(response="one")
        assert read_score(message["content"])[1] == "strict"


def test_there_are_four_templates():
    assert [p.stem for p in SHIPPED] == ["judge_dialogue", "judge_summary", "score_dialogue",
                                         "score_summary"]


def test_a_response_cannot_become_a_place():
    (message,) = fill("{prompt}|{first}|{second}", prompt="{second}", first="{prompt}", second="x")
    assert message["content"] == "{second}|{prompt}|x"


def test_a_chat_is_shown_as_its_turns():
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Bye."}]
    (message,), _ = both_orders("{prompt}{first}{second}", chat, "", "")
    assert message["content"] == "user: Hi.\n\nassistant: Yes?\n\nuser: Bye."


@pytest.mark.parametrize("name, text, says", [
    ("summmary", None, "Did you mean 'summary'"), ("mine.txt", None, "no template 'mine.txt'"),
    ("mine.txt", "{prompt} {first}", "no place {second}")])
def test_a_template_that_cannot_be_used_is_told(name, text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text: (tmp_path/name).write_text(text)
    with pytest.raises(InputError, match=says): find_template("judge", name)


# --- the answer

@pytest.mark.parametrize("text, choice, how", [
    ('{"choice": "A"}', "A", "strict"), ('{"choice":"b"}', "B", "strict"),
    ('{"choice": "Tie"}', "tie", "strict"), ('```json\n{"choice": "B"}\n```', "B", "strict"),
    ('The form is {"choice": "A"}.\nMine: {"choice": "B"}', "B", "strict"),
    ('{"why": "clear", "choice": "A"}', "A", "strict"),
    ("My choice is **B**.", "B", "lenient"), ("A", "A", "lenient"), ("(b) no: (B)", "B", "lenient"),
    ("tie", "tie", "lenient"), ("Plan B is what I would call it", None, "unreadable"),
    ("A good answer", None, "unreadable"), ("I like b", None, "unreadable"),
    ('{"choice": "C"}', None, "unreadable"), ('{"choice": null}', None, "unreadable"),
    ('{"choice": ["A"]}', None, "unreadable"), ("", None, "unreadable"),
    ("a necktie", None, "unreadable"), ("ABBA", None, "unreadable")])
def test_a_choice_is_read_or_there_is_none(text, choice, how):
    assert read_choice(text) == (choice, how)


@pytest.mark.parametrize("finish", ["refusal", "content_filter", "rejected", "tool_calls"])
def test_an_answer_that_is_none_has_no_choice(finish):
    assert read_choice('{"choice": "A"}', finish) == (None, finish)
    assert read_score('{"score": 3}', finish) == (None, finish)


def test_a_cut_answer_is_read_only_where_it_is_whole():
    assert read_choice('{"choice": "A"} and', "length") == ("A", "strict")
    assert read_choice("I would say A", "length") == (None, "cut off")
    assert read_score('{"score": 1', "length") == (None, "cut off") # of 10, perhaps


@pytest.mark.parametrize("text, score", [
    ('{"score": 7}', 7), ('{"score": "7"}', 7), ('{"score": 7.5}', 7.5), ('{"score": 1}', 1),
    ('{"score": 10}', 10), ('{"score": 0}', None), ('{"score": 11}', None), ("7", None),
    ('{"score": true}', None), ('{"score": NaN}', None), ('{"score": Infinity}', None),
    ('{"score": [7]}', None)])
def test_a_grade_is_on_the_scale_or_there_is_none(text, score): assert read_score(text)[0] == score


# --- both orders

def test_a_win_needs_both_orders():
    "All nine pairs of choices, and what exchanging the policies makes of each."
    verdicts = {pair: pair_verdict(*pair) for pair in itertools.product(CHOICES, repeat=2)}
    assert {v for v in verdicts.values()} == {"win", "tie", "undecided", "lose"}
    assert [p for p, v in verdicts.items() if v == "win"] == [("A", "B")]
    assert [p for p, v in verdicts.items() if v == "tie"] == [("tie", "tie")]
    other = {"win": "lose", "lose": "win"}
    for (forward, backward), verdict in verdicts.items():
        assert verdicts[backward, forward] == other.get(verdict, verdict)


@given(st.sampled_from([*CHOICES, None]), st.sampled_from([*CHOICES, None]))
def test_without_an_answer_there_is_no_verdict(forward, backward):
    assert (pair_verdict(forward, backward) is None) == (None in (forward, backward))


@pytest.mark.parametrize("bias", [-.5, -.2, 0, .3, .5])
def test_position_bias_is_found(bias):
    "A judge that takes the first place with probability ½ + bias, and looks at nothing."
    draw = random.Random(1)
    pick = lambda: "A" if draw.random() < .5 + bias else "B"
    found = order_effects([(pick(), pick()) for _ in range(4000)])["position_bias"]
    assert found["low"] <= bias + 1e-12 and bias - 1e-12 <= found["high"]
    assert found["high"] - found["low"] < .04


def test_content_is_no_position_bias():
    "Whatever a judge prefers, each preference is shown once in each place."
    found = order_effects([("A", "B")] * 30 + [("B", "A")] * 5 + [("tie", "tie")] * 9)
    assert found["position_bias"]["value"] == 0 and found["agreement"]["value"] == 1
    assert found["position_bias"]["n"] == 35 and found["agreement"]["n"] == 44


def test_what_was_not_answered_does_not_count():
    pairs = [("A", "A"), ("A", None), (None, None), ("tie", "A")]
    found = order_effects(pairs)
    assert (found["position_bias"]["n"], found["agreement"]["n"]) == (1, 2)
    assert order_effects([(None, "A")])["agreement"]["value"] is None


# --- length

def by_lbfgs(won, gaps):
    "The same fit by another road: torch's L-BFGS on the penalised likelihood, in float64."
    won, gaps = torch.tensor(won).double(), torch.tensor(gaps).double()
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                               line_search_fn="strong_wolfe")
    def loss():
        solver.zero_grad()
        z = theta[0] + theta[1] * gaps
        value = (torch.nn.functional.binary_cross_entropy_with_logits(z, won, reduction="sum")
                 + RIDGE / 2 * theta.square().sum())
        value.backward()
        return value
    solver.step(loss)
    return theta.detach().numpy()


@pytest.mark.parametrize("case", ["noise", "ties", "separated", "all won", "equal lengths"])
def test_the_fit_is_the_maximum(case):
    rng = np.random.default_rng(3)
    gaps = np.tanh(rng.normal(.4, 1, 80))
    won = {"noise": rng.random(80) < .6, "ties": rng.integers(0, 3, 80) / 2, "separated": gaps > 0,
           "all won": np.ones(80), "equal lengths": rng.random(80) < .3}[case].astype(float)
    if case == "equal lengths": gaps = 0 * gaps
    (found,) = fit_length(won, gaps, np.ones((1, 80)))
    assert found == pytest.approx(by_lbfgs(won, gaps), abs=1e-5)


def test_weights_are_repetitions():
    rng = np.random.default_rng(4)
    gaps, won, times = rng.normal(size=12), rng.integers(0, 2, 12) * 1., rng.integers(0, 4, 12)
    repeated = fit_length(np.repeat(won, times), np.repeat(gaps, times), np.ones((1, times.sum())))
    assert fit_length(won, gaps, times[None] * 1.)[0] == pytest.approx(repeated[0], abs=1e-9)


@pytest.mark.parametrize("alpha, effect", [(.5, 0.), (0., 2.), (-.7, 1.5), (.4, -2.)])
def test_the_rate_at_equal_length_is_recovered(alpha, effect):
    rng = np.random.default_rng(5)
    gaps = rng.normal(60, 80, 4000)
    z = alpha + effect * np.tanh(gaps / np.sqrt((gaps**2).mean()))
    found = length_controlled(rng.random(4000) < 1 / (1 + np.exp(-z)), gaps, n_boot=200)
    assert found["low"] < 1 / (1 + np.exp(-alpha)) < found["high"]
    assert found["effect"] == pytest.approx(effect, abs=.25)


def test_exchanging_the_policies_exchanges_the_rates():
    rng = np.random.default_rng(6)
    gaps, won, groups = rng.normal(5, 9, 60), rng.integers(0, 3, 60) / 2, np.arange(60) // 2
    a = length_controlled(won, gaps, groups, n_boot=300)
    b = length_controlled(1 - won, -gaps, groups, n_boot=300)
    assert a["value"] == pytest.approx(1 - b["value"], abs=1e-8)
    assert (a["low"], a["high"]) == pytest.approx((1 - b["high"], 1 - b["low"]), abs=1e-8)
    assert a["effect"] == pytest.approx(b["effect"], abs=1e-8)


def test_where_one_side_is_always_longer_nothing_is_claimed():
    assert length_controlled([1, 0, 1], [5, 9, 1]) is None
    assert length_controlled([1, 0, 1], [5, 0, 1]) is not None
    assert length_controlled([1.], [0])["low"] is None # one prompt has no interval


# --- a comparison

def game(prompt, forward, backward, lengths=(1, 1), **rewards):
    return dict(prompt=prompt, choices=(forward, backward), lengths=lengths, identical=False,
                verdict=pair_verdict(forward, backward), rewards=rewards)


def test_a_comparison_by_hand():
    games = [game(0, "A", "B"), game(0, "A", "A"), game(1, "B", "A"), game(2, "tie", "tie"),
             game(3, "A", "B"), game(4, None, "A"), game(5, None, None)]
    found = compare_pairs(games, n_boot=50)
    counts = {k: found[k] for k in ("pairs", "win", "tie", "undecided", "lose", "no_verdict")}
    assert counts == dict(pairs=7, win=2, tie=1, undecided=1, lose=1, no_verdict=2)
    assert found["margin"]["value"] == pytest.approx(1/5) and found["margin"]["prompts"] == 4
    assert found["win_rate"]["value"] == pytest.approx(3/5)


def test_no_answers_are_no_ties():
    "An outage of half the pairs changes no rate; of all pairs, it leaves none."
    games = [game(i, *pair) for i, pair in enumerate([("A", "B"), ("B", "A"), ("A", "B")] * 9)]
    silent = [game(100 + i, None, None) for i in range(27)]
    whole, half = compare_pairs(games, n_boot=50), compare_pairs(games + silent, n_boot=50)
    for name in ("margin", "win_rate", "length_controlled"): assert whole[name] == half[name]
    none = compare_pairs(silent)
    assert none["no_verdict"] == 27 and none["margin"] is none["win_rate"] is None
    assert none["tie"] == none["undecided"] == 0


def test_the_interval_is_over_prompts():
    "Every pair eight times under its own prompt: nothing more is known."
    games = [game(i, *pair) for i, pair in enumerate([("A", "B"), ("B", "A"), ("A", "A")] * 8)]
    once, often = compare_pairs(games, n_boot=200), compare_pairs(games * 8, n_boot=200)
    assert once["margin"] == pytest.approx(often["margin"])
    rates = once["length_controlled"], often["length_controlled"]
    assert rates[0]["high"] - rates[0]["low"] == pytest.approx(rates[1]["high"] - rates[1]["low"],
                                                               rel=.01)


def test_agreement_with_gold_counts_what_both_decide():
    games = [game(0, "A", "B", gold=(2., 1.)), game(1, "B", "A", gold=(2., 1.)),
             game(2, "A", "A", gold=(2., 1.)), game(3, "A", "B", gold=(1., 1.)),
             game(4, "B", "A", gold=(0., 1.)), game(5, "A", "B"), game(6, None, "B", gold=(2., 1.))]
    assert agreement_with(games, "gold")["value"] == pytest.approx(2/3)
    assert agreement_with(games, "gold")["n"] == 3
    assert agreement_with(games, "gold", tolerance=1.)["n"] == 0
    assert agreement_with([], "gold")["value"] is None
    assert POINTS["A"] == -POINTS["B"] == 1
