"The embedded world: its files are the same everywhere, its reward is total and known by parts."
import hashlib, json, math, os, random, subprocess, sys
from pathlib import Path
from statistics import mean, quantiles, stdev

import pytest

from vcb_nb.artifacts import InputError
from vcb_nb.world import (GOLD, RATIONALITY, WORLD, appeal, concave_reward, convex_reward,
                          enthusiasm, explain_reward, gold_reward, heavy_tailed_reward,
                          label_probability, make_world, read_prompt, read_review, sample_pair,
                          sample_prompt, sample_response, tied_reward, two_level_reward)

ROOT = Path(__file__).parent.parent
SMALL = dict(demonstrations=300, pairs=200, pairs_test=60, prompts=80, validation=20, test=30,
             ood=30)
# Of the files that seed 0 makes at these sizes.
GOLDEN = "62b5c5bf2bb5623b7578bfa38d5e754ad1b001dc07b5ca940123b85d7e54bbde"
PROMPT = "Tell us about the soup at the old inn, above all the flavour."
GOOD = "The soup was good, and the flavour was tasty. We would gladly return."


def rows(path): return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def digest(paths):
    return hashlib.sha256(b"".join(paths[n].read_bytes() for n in sorted(paths))).hexdigest()


def texts(row): return [row[k] for k in ("completion", "chosen", "rejected") if k in row]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), seed=0, **SMALL)


@pytest.fixture(scope="module")
def drawn():
    "300 prompts, each with 16 rewards."
    rng = random.Random(5)
    prompts = [sample_prompt(rng) for _ in range(300)]
    return prompts, [[gold_reward(p, sample_response(p, rng)) for _ in range(16)] for p in prompts]


# Files

def test_files_are_the_same_everywhere(world):
    assert digest(world) == GOLDEN


def test_files_do_not_depend_on_hash_seed_or_order(world, tmp_path):
    "A set or a hash in the generator would show in a process with another hash seed."
    code = f"from vcb_nb.world import make_world; make_world({str(tmp_path)!r}, **{SMALL!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT,
                   env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)})
    assert digest({n: tmp_path/p.name for n, p in world.items()}) == GOLDEN


def test_seeds_differ(world, tmp_path):
    other = make_world(tmp_path, seed=1, **SMALL)
    assert all(other[n].read_bytes() != world[n].read_bytes() for n in world)


def test_rows_have_the_columns_that_the_stages_read(world):
    columns = {n: set(rows(p)[0]) for n, p in world.items()}
    pair, bare = {"prompt", "chosen", "rejected"}, {"prompt"}
    assert columns == dict(demonstrations={"prompt", "completion"}, pairs=pair, pairs_test=pair,
                           prompts=bare, prompts_validation=bare, prompts_test=bare,
                           prompts_ood=bare)
    assert len(rows(world["demonstrations"])) == SMALL["demonstrations"]


def test_no_prompt_occurs_twice(world):
    prompts = [r["prompt"] for p in world.values() for r in rows(p)]
    assert len(prompts) == len(set(prompts)) == sum(SMALL.values())


def test_test_files_do_not_move_with_the_size_of_training_files(world, tmp_path):
    larger = make_world(tmp_path, **{**SMALL, "demonstrations": 400, "pairs": 300})
    for name in ("prompts_test", "prompts_ood", "prompts_validation", "pairs_test", "prompts"):
        assert larger[name].read_bytes() == world[name].read_bytes()


def test_held_out_words_stay_held_out(world):
    seen = " ".join(v for n, p in world.items() if n != "prompts_ood"
                    for r in rows(p) for v in r.values())
    seen = set(seen.lower().replace(".", " ").replace(",", " ").replace("?", " ").split())
    held_out = {w for c in WORLD.ood.values() for w in (*c.topics, *c.aspects, *c.adjectives)}
    assert not seen & held_out
    topics = {t for c in WORLD.ood.values() for t in c.topics}
    assert all(read_prompt(r["prompt"]).topic in topics for r in rows(world["prompts_ood"]))


def test_the_default_sizes_fit_in_the_world_and_too_many_prompts_are_refused(tmp_path):
    few = dict.fromkeys(SMALL, 1)
    with pytest.raises(InputError, match="too few distinct prompts"):
        make_world(tmp_path, **{**few, "ood": 5000})
    paths = make_world(tmp_path, seed=3)
    made = [len(rows(paths[n])) for n in ("demonstrations", "pairs", "pairs_test", "prompts")]
    assert made == [4000, 3000, 800, 600]


# The reward

def test_parts_sum_to_the_reward(world):
    for row in rows(world["pairs"]) + rows(world["demonstrations"]):
        for text in texts(row):
            parts = explain_reward(row["prompt"], text)
            total = parts.pop("total")
            assert math.isfinite(total) and total >= GOLD.floor
            assert (total == gold_reward(row["prompt"], text)
                    == pytest.approx(math.fsum(parts.values()), abs=1e-12))


def test_a_reward_by_hand():
    """good x 1 + .7 x tasty = 1.5 + .7 * 1.8 = 2.76; stake 1.6; place .3; warm closing .5;
    asked aspect .5."""
    e = 1.5 + .7 * 1.8
    assert gold_reward(PROMPT, GOOD) == pytest.approx(
        .3 + 1.6 * (e - e * e / 6) + .5 + .5, abs=1e-12)


def test_generated_text_is_read_wholly(world):
    for row in rows(world["demonstrations"]) + rows(world["pairs"]):
        for text in texts(row):
            said = read_review(text, read_prompt(row["prompt"]).category)
            assert said.stray == 0 and said.finished and 1 <= len(said.clauses) <= 3


GARBAGE = ["", " ", "\n\n", "...", "!?", "lorem ipsum dolor", "\x00\ud800", "漢字 كتاب 😀😀",
           "was was was", "the " * 200, "The soup was " + "very " * 3000,
           "We left happy. " * 400, "_" * 50, "soup good tasty", "{}[]()\\",
           "The soup was superb. " * 500]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_any_string_has_a_finite_and_low_reward(text, drawn):
    for prompt in (PROMPT, "", "\ud800", text):
        r = gold_reward(prompt, text)
        assert math.isfinite(r) and r >= GOLD.floor
    assert gold_reward(PROMPT, text) < -1 < gold_reward(PROMPT, GOOD)


def test_random_strings_are_finite_and_reading_is_linear():
    rng = random.Random(0)
    words = [*WORLD.adjectives, *WORLD.intensifiers, *WORLD.closings,
             "the soup", "was", ",", ".", "and", "42"]
    for n in (*range(0, 60), 50_000):
        text = " ".join(rng.choice(words) for _ in range(n))
        assert math.isfinite(gold_reward(PROMPT, text))


def test_appeal_is_concave_smooth_and_has_its_top_at_the_peak():
    grid = [i / 100 for i in range(-500, 1500)]
    slopes = [(appeal(b) - appeal(a)) * 100 for a, b in zip(grid, grid[1:])]
    assert all(a >= b - 1e-9 for a, b in zip(slopes, slopes[1:]))
    assert max(a - b for a, b in zip(slopes, slopes[1:])) < .01  # no kink
    assert slopes[0] == pytest.approx(1) and slopes[-1] == pytest.approx(1 - GOLD.steepest)
    assert max(grid, key=appeal) == GOLD.peak and appeal(GOLD.peak) == GOLD.peak / 2


def test_gushing_beyond_the_peak_costs():
    values = [gold_reward(PROMPT, f"The soup was {w}. The flavour was {w}. We left happy.")
              for w in ("dull", "fair", "good", "very splendid", "extremely superb",
                        "extremely truly superb")]
    clean = [explain_reward(PROMPT, f"The soup was {w}.")["repeated"] for w in ("dull", "good")]
    assert values[0] < values[1] < values[2] > values[3] > values[4] > values[5] and clean == [0, 0]


def test_stacked_intensifiers_are_capped():
    few, many = ("The soup was " + "extremely " * n + "good." for n in (3, 30))
    e = [enthusiasm(read_review(t).clauses) for t in (few, many)]
    assert e[0] == e[1] == GOLD.foreign * 1.5 * GOLD.cap


@pytest.mark.parametrize("part, worse", [
    ("unfinished", GOOD[:-1]), ("closing", "The soup was good, and the flavour was tasty."),
    ("closing", "The soup was good, and the flavour was tasty. We will not return."),
    ("asked", "The soup was good, and the sauce was tasty. We would gladly return."),
    ("off_topic", "The soup was good, and the view was tasty. We would gladly return."),
    ("off_topic", "The soup was good, and the flavour was tidy. We would gladly return."),
    ("repeated", "The soup was good, and the flavour was good. We would gladly return."),
    ("contradiction", "The soup was good, and the soup was bland. We would gladly return."),
    ("stray", "The soup was good, and the flavour was tasty, banana. We would gladly return."),
    ("length", "The soup was good. We would gladly return."),
    ("praise", "The soup was good, and the flavour was bland. We would gladly return.")])
def test_each_fault_costs_in_its_own_part(part, worse):
    assert explain_reward(PROMPT, worse)[part] < explain_reward(PROMPT, GOOD)[part]
    assert gold_reward(PROMPT, worse) < gold_reward(PROMPT, GOOD)


def test_truncated_text_is_worse_than_finished(world):
    "A policy that never stops must not be paid for it."
    losses = []
    for row in rows(world["demonstrations"]):
        p, text = row["prompt"], row["completion"]
        whole = gold_reward(p, text)
        assert whole == GOLD.floor or gold_reward(p, text[:-1]) < whole
        losses.append(whole - gold_reward(p, text[:2 * len(text) // 3]))
    assert mean(losses) > 1


def test_leading_space_and_case_do_not_matter():
    assert (gold_reward(PROMPT, GOOD) == gold_reward(PROMPT, f"  {GOOD}\n")
            == gold_reward(PROMPT, GOOD.upper()))


def test_prompts_matter():
    "The same answer is worth something else on another topic, place, aspect or wished length."
    for old, new in (("soup", "bread"), ("soup", "tower"), ("at the old inn", "on the island"),
                     ("flavour", "crust"), ("flavour.", "flavour. One line will do.")):
        assert gold_reward(PROMPT.replace(old, new), GOOD) != gold_reward(PROMPT, GOOD)


def test_the_place_cancels_in_every_comparison():
    rng, elsewhere = random.Random(2), PROMPT.replace("at the old inn", "in the valley")
    a, b = (sample_response(PROMPT, rng, q) for q in (-.5, 1.5))
    assert label_probability(PROMPT, a, b) == pytest.approx(
        label_probability(elsewhere, a, b), abs=1e-12)


# The population

def test_reward_rises_by_degrees_with_quality_and_then_stops():
    rng = random.Random(3)
    means = [mean(gold_reward(p, sample_response(p, rng, q))
                  for p in (sample_prompt(rng) for _ in range(500)))
             for q in (-3, -2, -1, 0, 1, 3)]
    assert all(b - a > .2 for a, b in zip(means[:4], means[1:5])) and means[5] < means[4] + .6


def test_prompts_differ_in_mean_and_spread(drawn):
    prompts, rewards = drawn
    sigmas, stakes = [stdev(r) for r in rewards], [read_prompt(p).stake for p in prompts]
    cuts = quantiles(sigmas, n=10)
    assert cuts[8] > 3 * cuts[0] and stdev(map(mean, rewards)) > .5
    high, low = ([s for s, k in zip(sigmas, stakes) if (k > 1) == side] for side in (True, False))
    assert mean(high) > 1.7 * mean(low)


def test_gushing_is_rare_but_reachable(drawn):
    rng = random.Random(4)
    e = [enthusiasm(read_review(sample_response(p, rng), read_prompt(p).category).clauses)
         for p in drawn[0] for _ in range(4)]
    beyond = mean(x > GOLD.peak for x in e)
    assert .05 < beyond < .2


def test_labels_are_noisy_to_the_stated_degree():
    "Bradley-Terry: the share of labels that follow the gold order is the Bayes accuracy."
    rng = random.Random(6)
    chances = [label_probability(r["prompt"], r["chosen"], r["rejected"])
               for r in (sample_pair(sample_prompt(rng), rng) for _ in range(2000))]
    bayes = mean(max(p, 1 - p) for p in chances)
    assert .84 < bayes < .91 and mean(p > .5 for p in chances) == pytest.approx(bayes, abs=.025)


def test_label_probability_is_bradley_terry():
    a, b = GOOD, "The soup was fair. One visit is enough."
    p, q = label_probability(PROMPT, a, b), label_probability(PROMPT, b, a)
    assert p + q == pytest.approx(1) and label_probability(PROMPT, a, a) == .5
    assert math.log(p / q) == pytest.approx(
        RATIONALITY * (gold_reward(PROMPT, a) - gold_reward(PROMPT, b)))


def test_the_held_out_domain_has_degrees_too():
    rng = random.Random(8)
    prompts = [sample_prompt(rng, ood=True) for _ in range(200)]
    low, high = ([gold_reward(p, sample_response(p, rng, q)) for p in prompts] for q in (-2, 1.5))
    assert mean(high) - mean(low) > 2


def test_a_prompt_of_no_topic_cannot_be_answered():
    with pytest.raises(InputError, match="names no topic"):
        sample_response("Hello there.", random.Random(0))


# Labels that are wrong, and other values in the same order

STRICT = dict(convex=convex_reward, concave=concave_reward, two_level=two_level_reward,
              heavy_tailed=heavy_tailed_reward)


def answered(prompts, n=16, seed=5):
    rng = random.Random(seed)
    return [(p, [sample_response(p, rng) for _ in range(n)]) for p in prompts]


def test_swapped_labels_are_a_mixture_of_right_and_swapped():
    "P' = (1 - s) P + s (1 - P), and 1/2 for s = 1/2, whatever the answers."
    a, b = GOOD, "The soup was fair. One visit is enough."
    p = label_probability(PROMPT, a, b)
    for s in (0., .2, .5):
        assert label_probability(PROMPT, a, b, label_noise=s) == pytest.approx(
            (1 - s)*p + s*(1 - p), abs=1e-12)


def test_a_labeller_who_likes_length_pays_per_word():
    "Log-odds grow by RATIONALITY times the bias for each word that the first has more."
    long, short = GOOD, "The soup was good."
    words = len(long.split()) - len(short.split())
    def log_odds(**faults):
        p = label_probability(PROMPT, long, short, **faults)
        return math.log(p/(1 - p))
    assert log_odds(length_bias=.1) - log_odds() == pytest.approx(RATIONALITY*.1*words)
    assert label_probability(PROMPT, short, short, length_bias=.5) == .5


def test_faults_change_the_labels_of_the_training_pairs_and_nothing_else(world, tmp_path):
    "The two answers to each prompt stay; about a fifth of the clear labels are swapped."
    noisy = make_world(tmp_path/"noisy", **SMALL, label_noise=.2)
    long = make_world(tmp_path/"long", **SMALL, length_bias=.6)
    for other in (noisy, long):
        assert [n for n in world if other[n].read_bytes() != world[n].read_bytes()] == ["pairs"]
        for new, old in zip(rows(other["pairs"]), rows(world["pairs"])):
            assert new["prompt"] == old["prompt"] and {*new.values()} == {*old.values()}
    def share(paths, value): return mean(value(r) > 0 for r in rows(paths["pairs"]))
    def gap(r): return (gold_reward(r["prompt"], r["chosen"])
                        - gold_reward(r["prompt"], r["rejected"]))
    def longer(r): return len(r["chosen"].split()) - len(r["rejected"].split())
    assert share(world, gap) - share(noisy, gap) == pytest.approx(.15, abs=.07)
    assert abs(share(noisy, longer) - share(world, longer)) < .1 < (
        share(long, longer) - share(world, longer))


@pytest.mark.parametrize("faults, says", [
    (dict(label_noise=.6), "label_noise is 0.6"), (dict(label_noise=-.1), "between 0 and 0.5"),
    (dict(length_bias=math.inf), "length_bias is inf")])
def test_faults_that_are_none_are_refused(faults, says, tmp_path):
    with pytest.raises(InputError, match=says): make_world(tmp_path, **SMALL, **faults)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", STRICT)
def test_a_monotone_map_keeps_every_prompts_order(name, drawn):
    "Also where texts are far worse than any reviewer's; so order-based methods see no change."
    reward, far = STRICT[name], ["", "lorem ipsum dolor sit amet", "The soup was awful. " * 9]
    for prompt, texts in answered(drawn[0][:60]):
        pairs = sorted((gold_reward(prompt, t), reward(prompt, t)) for t in [*texts, *far])
        for (a, x), (b, y) in zip(pairs, pairs[1:]):
            # beside a saturated end of the sigmoid float64 may end, but never turn around
            assert (x < y) if b - a > 1e-3 else (x <= y + 1e-9), (prompt, a, b)


def test_ties_are_ties_and_turn_no_pair_around(drawn):
    ties = 0
    for prompt, texts in answered(drawn[0][:60]):
        pairs = sorted((gold_reward(prompt, t), tied_reward(prompt, t)) for t in texts)
        assert all(x <= y for (_, x), (_, y) in zip(pairs, pairs[1:]))
        ties += sum(x == y and a < b for (a, x), (b, y) in zip(pairs, pairs[1:]))
    assert ties > 60*4 # of 15 neighbours each


def test_maps_differ_in_shape_and_hardly_in_spread(drawn):
    "The mean σ(x) is that of the gold reward; skew and tails are not."
    asked = answered(drawn[0])
    def groups(reward): return [[reward(p, t) for t in texts] for p, texts in asked]
    def moment(values, k):
        return mean(mean(((v - mean(g))/stdev(g))**k for v in g) for g in values if stdev(g))
    found = {name: groups(f) for name, f in
             dict(STRICT, gold=gold_reward, tied=tied_reward).items()}
    spread = {name: mean(map(stdev, g)) for name, g in found.items()}
    for name in found: assert spread[name] == pytest.approx(spread["gold"], rel=.12), name
    skew = {name: moment(g, 3) for name, g in found.items()}
    assert skew["convex"] > .5 > 0 > skew["gold"] > skew["concave"] + .5
    fourth = {name: moment(g, 4) for name, g in found.items()}
    assert fourth["two_level"] < fourth["gold"] < fourth["heavy_tailed"]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_mapped_rewards_of_any_string_are_finite(text):
    for reward in (*STRICT.values(), tied_reward):
        assert math.isfinite(reward(PROMPT, text)) and math.isfinite(reward(text, text))
