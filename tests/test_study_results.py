"What is kept of a study says what the study said; its curves are read as its decisions are."
import math

import numpy as np, pytest

from vcb_nb.artifacts import InputError, fingerprint, write_json, write_jsonl
from vcb_nb.contrasts import gain_at_kl, student_quantile
from vcb_nb.study import Question, all_decisions, load_study, shipped_studies
from vcb_nb.study_results import (join_results, keep_results, kept_results, plot_decisions,
                                  seed_gains, study_curves, study_opening, tuned_policies)

STORED = sorted(path.stem for study in {p.parent for p in shipped_studies().values()}
                for path in (study/"results").glob("*.json"))
ASKED = Question(measure="gold_at_1_nat", baseline="vcb")


def policy(seed, method, kl, gain, **factors):
    return dict(seed=seed, method=method, factors=factors, policy=f"{method}-{kl}", prompts="test",
                kl=kl, gold_gain=gain, reward_gain=-gain)


def frontier(seed, method, points, **factors):
    return [policy(seed, method, kl, gain, **factors) for kl, gain in points]


def test_a_curve_is_the_mean_of_the_seeds_frontiers():
    "Each seed's own frontier at the same KL, their mean, and a t interval over seeds."
    points = {0: [(.5, .3), (2, .6)], 1: [(.4, .1), (1.5, .7)], 2: [(1, .2), (3, .5)]}
    rows = [row for seed, own in points.items() for row in frontier(seed, "vcb", own)]
    (key, (mean, half)), = study_curves(rows, ASKED, [.5, 1.2]).items()
    assert key == ((), "vcb")
    for at, kl in enumerate((.5, 1.2)):
        each = np.array([gain_at_kl(*zip(*own), kl) for own in points.values()])
        assert mean[at] == pytest.approx(each.mean())
        assert half[at] == pytest.approx(student_quantile(.975, 2)*each.std(ddof=1)/math.sqrt(3))
    (_, (mean, _)), = study_curves(rows, ASKED, [.5], "reward_gain").items()
    assert mean[0] < 0


def test_gains_of_all_levels_stand_in_the_same_seeds():
    "A seed that a level lacks, or whose frontier ends before, is NaN in its place."
    rows = [*frontier(0, "vcb", [(1, .2)]), *frontier(1, "vcb", [(1, .4)]),
            *frontier(2, "vcb", [(.5, 9)]), *frontier(1, "dpo", [(1, .3)])]
    gains = {level: found[:, 0] for (_, level), found in seed_gains(rows, ASKED, [1.]).items()}
    np.testing.assert_allclose(gains["vcb"], [.2, .4, np.nan])
    np.testing.assert_allclose(gains["dpo"], [np.nan, .3, np.nan])


def test_a_curve_ends_where_over_a_tenth_of_the_seeds_do():
    "One frontier of ten may be short, and counts where it is; two may not."
    rows = [row for seed in range(10)
            for row in frontier(seed, "vcb", [(1 if seed < 1 else 2 if seed < 2 else 3, seed)])]
    mean, half = study_curves(rows, ASKED, [1., 2., 3.])[(), "vcb"]
    assert np.isnan(mean).tolist() == np.isnan(half).tolist() == [False, False, True]
    assert mean[1] == pytest.approx(np.mean([1, *(gain_at_kl([3], [s], 2.) for s in range(2, 10))]))


def test_one_seed_has_a_curve_and_no_interval():
    mean, half = study_curves(frontier(0, "vcb", [(1, .5)]), ASKED, [1.])[(), "vcb"]
    assert mean[0] == .5 and np.isnan(half[0])


def test_settings_stand_apart_and_a_tuned_one_is_chosen_by_the_other_seeds():
    "Seed 0 gets the high rate, which seeds 1 and 2 prefer; each of them the low one, by its .9."
    rows = []
    for seed, low, high in ((0, .9, .1), (1, .2, .6), (2, .2, .6)):
        rows += frontier(seed, "vcb", [(1, low)], rate="low", size="s")
        rows += frontier(seed, "vcb", [(1, high)], rate="high", size="s")
        rows += frontier(seed, "vcb", [(1, 5)], rate="low", size="m")
    asked = Question(measure="gold_at_1_nat", baseline="vcb", tuned=["rate"])
    curves = study_curves(rows, asked, [1.])
    assert set(curves) == {((("size", "s"),), "vcb"), ((("size", "m"),), "vcb")}
    assert curves[(("size", "s"),), "vcb"][0, 0] == pytest.approx(np.mean([.1, .2, .2]))
    assert curves[(("size", "m"),), "vcb"][0, 0] == 5
    found = tuned_policies(rows, asked)[(("size", "s"),), "vcb"]
    assert all(row in rows for own in found.values() for row in own) # as in the table
    rates = {seed: row["factors"]["rate"] for seed, (row,) in found.items()}
    assert rates == {0: "high", 1: "low", 2: "low"}


def test_what_is_kept_comes_back(tmp_path):
    "Four digits of every number, no folder of any cell, and the decisions as they were."
    rows = [dict(policy(0, "vcb", 1.23456, .5), cell="/home/me/cell", study="own", gold=1)]
    write_jsonl(tmp_path/"own"/"results.jsonl", rows)
    write_json(tmp_path/"own"/"decisions.json", {"cells": 1, "decisions": []})
    keep_results(tmp_path/"own", tmp_path/"kept")
    (row,), about = kept_results("own", tmp_path/"kept")
    assert row["kl"] == 1.235 and "cell" not in row and about["cells"] == 1
    packed = (tmp_path/"kept"/"own.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4) # no date (RFC 1952): the same rows are the same file
    with pytest.raises(InputError, match="no decisions.json. Run the study first"):
        keep_results(tmp_path, tmp_path/"kept")
    with pytest.raises(InputError, match="no results of a study 'owl'.*Did you mean 'own'"):
        kept_results("owl", tmp_path/"kept")


@pytest.mark.parametrize("name", STORED)
def test_stored_rows_say_what_the_stored_decisions_say(name):
    """Every decision of a study that comes with the package, whose measure is a gain at a KL, is
    the difference of two curves of its stored rows; and the study file still asks that question."""
    study = load_study(name)
    rows, about = kept_results(name)
    assert about["file"] == fingerprint(study.path) # the very file that asked
    seeds = {row["seed"] for row in rows}
    assert about["done"] == about["cells"] and len(seeds) >= 20
    checked = 0
    for c in about["decisions"]:
        if "_at_" not in c["measure"] or c["missing"]: continue # on the seeds that both have
        gain, at = c["measure"].split("_at_")
        asked = Question(**{**study.primary, "prompts": c["prompts"], "measure": c["measure"]})
        curves = study_curves(rows, asked, [float(at.split("_")[0])], f"{gain}_gain")
        setting = tuple(c["at"].items())
        found = [curves[setting, c[side]][0, 0] for side in ("level", "baseline")]
        assert found[0] - found[1] == pytest.approx(c["value"], abs=2e-3), c
        checked += 1
    assert checked
    primary = [c for c in about["decisions"] if c["family"] == "primary"]
    assert {c["measure"] for c in primary} == {study.question.measure}
    assert {c["baseline"] for c in primary} == {study.question.baseline}


def test_the_opening_of_a_study_file_fits_a_page(tmp_path):
    "The comment at its top, paragraph by paragraph; comments further down are not of it."
    words = "Which settings matter " * 12
    (tmp_path/"own.yaml").write_text(f"# {words}\n#\n# Predicted:\n# none.\n{ONE}# an aside\n")
    first, second = study_opening(load_study(str(tmp_path/"own.yaml"))).split("\n\n")
    assert first.replace("\n", " ") == words.strip() and max(map(len, first.splitlines())) <= 92
    assert second == "Predicted: none."
    said = study_opening(load_study("sensitivity")).replace("\n", " ")
    assert "Predicted: the number of prompts matters most" in said


def test_every_decision_has_its_line_and_a_name():
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    c = dict(between="method", level="dpo", baseline="vcb", at={"rewards": "gold"}, value=.1,
             low=0., high=.2, verdict="undecided")
    missing = dict(c, at={}, value=None, low=None, high=None, verdict="undecided (no seed)")
    plot_decisions(ax, [c, missing], .1)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["DPO − VCB", "gold"]
    assert [t.get_text() for t in ax.texts] == ["undecided (no seed)", "undecided"]
    ax = Figure().subplots()
    plot_decisions(ax, [c, dict(c, level="ipo")])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["gold, IPO − VCB", "gold, DPO − VCB"]


# ---- one study in several parts

ONE = """base: demo
seeds: [1, 2, 3, 4]
primary: {measure: gold_at_1_nat, baseline: vcb, margin: .1}
secondary: [gold_at_2_nats]
"""


def measured(study, folder, seeds, shared=False):
    "A study's folder after it ran some of its seeds, and its rows with a number per prompt."
    numbers = []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        level = draw.normal(0, .3)
        for method, gain in (("vcb", .5), ("dpo", .4), ("ipo", .2)):
            for kl in (.5, 1.5, 3.):
                own = {"kl": draw.gamma(9, kl/9, 7).tolist(),
                       "gold_gain": draw.normal(gain*kl**.5 + level, .4, 7).tolist()}
                numbers.append({**policy(seed, method, kl, 0), "n_prompts": 7, **own,
                                "prompt_set": "all" if shared else f"set {seed}"})
    means = [{k: float(np.mean(v)) if isinstance(v, list) else v for k, v in row.items()}
             for row in numbers]
    write_jsonl(folder/study.name/"results.jsonl", means)
    write_json(folder/study.name/"decisions.json", dict(
        named_on=f"2026-01-0{seeds[0]}", file=fingerprint(study.path), changed=[], cells=4,
        done=len(seeds), machine="one" if seeds[0] < 3 else "two", job_hours=len(seeds)/2,
        decisions=all_decisions(study, numbers)))
    return numbers


@pytest.fixture
def study(tmp_path):
    (tmp_path/"apart.yaml").write_text(ONE)
    return load_study(str(tmp_path/"apart.yaml"))


def kept(study, folder, seeds, **how):
    "Where the results of such a run are kept."
    measured(study, folder/"run", seeds, **how)
    keep_results(folder/"run"/study.name, folder/"kept")
    return folder/"kept"


def test_parts_decide_as_the_whole_does(study, tmp_path):
    "Two machines with two seeds each: the decisions of one machine with four, to the digits kept."
    whole = all_decisions(study, measured(study, tmp_path/"whole", [1, 2, 3, 4]))
    parts = [kept(study, tmp_path/name, seeds) for name, seeds in (("b", [3, 4]), ("a", [1, 2]))]
    join_results(study, parts, tmp_path/"joined")
    rows, about = kept_results("apart", tmp_path/"joined")
    assert len(rows) == 36 and (about["done"], about["job_hours"]) == (4, 2.)
    assert about["machine"] == "two; one" and about["named_on"] == "2026-01-01"
    assert len(about["decisions"]) == len(whole) == 4
    for found, want in zip(about["decisions"], whole):
        assert {k: v for k, v in found.items() if not isinstance(v, float)} == {
            k: v for k, v in want.items() if not isinstance(v, float)}
        for key in ("value", "low", "high", "se", "p_holm", "bound"):
            assert found[key] == pytest.approx(want[key], abs=2e-3), key
    alone = kept_results("apart", parts[0])[1]["decisions"][0]
    assert whole[0]["low"] != pytest.approx(alone["low"], abs=2e-3)


def test_a_seed_that_a_part_has_only_begun_comes_from_the_part_that_has_it(study, tmp_path):
    "A stopped run leaves one cell of two of seed 3; the next machine ran both."
    def part(name, cells):
        rows = [dict(policy(seed, method, kl, seed + at, rate=rate), n_prompts=7,
                     prompt_set=f"set {seed}") for seed, rate in cells
                for at, method in enumerate(("vcb", "dpo")) for kl in (.5, 1.5)]
        write_jsonl(tmp_path/name/"apart"/"results.jsonl", [dict(r, slope=len(name)) for r in rows])
        write_json(tmp_path/name/"apart"/"decisions.json", dict(
            named_on="2026", file=fingerprint(study.path), changed=[], cells=8, done=len(cells),
            machine=name, job_hours=1., decisions=[]))
        keep_results(tmp_path/name/"apart", tmp_path/name)
        return tmp_path/name
    parts = [part("first", [(1, "low"), (1, "high"), (3, "low")]),
             part("other one", [(3, "low"), (3, "high"), (2, "low"), (2, "high")])]
    for order in (parts, parts[::-1]):
        join_results(study, order, tmp_path/"joined")
        rows, about = kept_results("apart", tmp_path/"joined")
        assert {(r["seed"], r["slope"]) for r in rows} == {(1, 5), (2, 9), (3, 9)}
        assert len(rows) == 6*4 and about["done"] == 6


def test_parts_that_do_not_fit_are_named(study, tmp_path):
    a = kept(study, tmp_path/"a", [1, 2])
    def refused(says, *parts):
        with pytest.raises(InputError, match=says): join_results(study, parts, tmp_path/"joined")
        assert not (tmp_path/"joined").exists()
    refused("Seed 2 is in .*a.kept and in .*b.kept, as much", a, kept(study, tmp_path/"b", [2, 3]))
    refused("measured on the same prompts", kept(study, tmp_path/"c", [3, 4], shared=True), a)
    study.path.write_text(ONE + "name: apart\n")
    refused("was made by another apart.yaml", a)
