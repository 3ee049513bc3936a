"""Studies: shared work is done once, what is killed resumes to the same table, a cell that fails
is named, the question stands before the results, and decisions are those of the plain rows."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import yaml

from vcb_nb.artifacts import InputError, read_json, read_manifest, run_lock
from vcb_nb.cli import main
from vcb_nb.contrasts import contrast, decide, gain_at_kl
from vcb_nb.recipes import load_recipe
from vcb_nb.study import (Question, cells_of, decisions_of, decisions_text, expected_seconds,
                          in_seeds, load_study, record_study, seeds_named, shipped_studies,
                          study_plan)

ROOT = Path(__file__).parent.parent
long_study = pytest.mark.skipif(not os.environ.get("VCB_STUDY"),
                                reason="minutes of killed studies: make test-study")
TOY = {"base": str(ROOT/"tests"/"tiny.yaml"), "seeds": 2,
       "recipe": {"data.world": dict(demonstrations=120, pairs=60, pairs_test=20, prompts=12,
                                     validation=6, test=8, ood=4),
                  "sft.num_train_epochs": 1, "evaluate.n_boot": 20, "calibrate.save_steps": 1,
                  "calibrate.methods": {"vcb": {"sweep": {"gamma": [1, .3]}},
                                        "dpo": {"sweep": {"beta": [1, .3]}}}},
       "factors": {"calibrate.learning_rate": [1e-3, 5e-3]},
       "primary": {"measure": "gold_at_0.001_nats", "baseline": "vcb", "margin": 1,
                   "tuned": ["calibrate.learning_rate"]}}


# What is really run: one seed, so that both cells share all but the calibrations.
RUN = {"seeds": 1, "recipe": {**TOY["recipe"], "calibrate.methods": {
    "vcb": {"sweep": {"gamma": [1, .3]}}, "dpo": {}}}}


def write(folder, **changes):
    "A study file; a value of None leaves the key out."
    folder.mkdir(parents=True, exist_ok=True)
    values = {k: v for k, v in {**TOY, "output_dir": str(folder/"out"), **changes}.items()
              if v is not None}
    (folder/"toy.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder/"toy.yaml"


def load(folder, **changes): return load_study(str(write(folder, **changes)))


def cells(folder, **changes): return cells_of(load(folder, **changes))


def homes(folder, **changes):
    return {(cell.name, job): home.name for cell in cells(folder, **changes)
            for job, home in cell.homes.items()}


# ---- cells and what they share

def test_a_cell_per_seed_and_level(tmp_path):
    found = cells(tmp_path, factors={**TOY["factors"], "size": {
        "small": {}, "large": {"sft.model_config.hidden_size": 64, "sample.n": 6}}})
    assert [c.name for c in found][:3] == [
        "learning_rate=0.001,size=small,seed=0", "learning_rate=0.001,size=small,seed=1",
        "learning_rate=0.001,size=large,seed=0"]
    assert len({c.name for c in found}) == 8
    last = found[-1].recipe
    assert (last["seed"], last["calibrate"]["learning_rate"]) == (1, 5e-3)
    assert (last["sft"]["model_config"]["hidden_size"], last["sample"]["n"]) == (64, 6)
    assert found[0].recipe["sft"]["model_config"]["hidden_size"] == 32
    assert found[0].recipe["data"]["world"]["test"] == 8


def test_cells_run_seed_by_seed_as_many_as_there_are_processes(tmp_path):
    "A study that is stopped has whole seeds; two cells of one seed do not wait for each other."
    study = load(tmp_path, seeds=[5, 3, 8])
    def order(processes):
        return [(c.seed, *c.factors.values()) for c in in_seeds(study, cells_of(study), processes)]
    assert order(1) == [(s, rate) for s in (5, 3, 8) for rate in ("0.001", "0.005")]
    assert order(2) == [*[(s, rate) for rate in ("0.001", "0.005") for s in (5, 3)],
                        (8, "0.001"), (8, "0.005")]
    assert order(3) == [(s, rate) for rate in ("0.001", "0.005") for s in (5, 3, 8)]


def test_some_of_the_seeds(tmp_path, capsys):
    "Only these are planned; the study still has all of its seeds."
    study = load(tmp_path, seeds=[5, 3, 8, 9])
    assert seeds_named(study, "3, 8-9") == [3, 8, 9] and study.seeds == [5, 3, 8, 9]
    path = str(study.path)
    assert main(["study", path, "--plan", "--seeds", "8-9"]) == 0
    assert "4 cells, 0 of them done" in capsys.readouterr().out


def test_a_level_may_set_a_field_inside_what_all_cells_change(tmp_path):
    "Each level starts from the study file's own value: no cell keeps what another one set."
    found = cells(tmp_path, seeds=1, primary={**TOY["primary"], "tuned": []}, factors={"labels": {
        "noisy": {"data.world.label_noise": .2}, "long": {"data.world.length_bias": .5},
        "clean": {}}})
    worlds = [cell.recipe["data"]["world"] for cell in found]
    assert worlds == [{**TOY["recipe"]["data.world"], **more} for more in (
        {"label_noise": .2}, {"length_bias": .5}, {})]
    given = {"data.world": {"test": 8}, "data.world.ood": 4}
    load_recipe("lesson", given)
    assert given == {"data.world": {"test": 8}, "data.world.ood": 4}


def test_equal_work_has_one_folder(tmp_path):
    "Everything before the factor is shared by its levels; nothing is shared by seeds."
    found = homes(tmp_path)
    a, b, c = (f"learning_rate={rate},seed={seed}" for rate, seed in
               ((.001, 0), (.005, 0), (.001, 1)))
    jobs = [job for name, job in found if name == a]
    shared = {job for job in jobs if found[a, job] == found[b, job]}
    assert shared == {"data", "tokenizer", "sft", "reward", "sample", "sample_validation", "score",
                      "score_validation"}
    assert not {job for job in jobs if found[a, job] == found[c, job]} and len(jobs) == 13


def test_a_seed_can_be_that_of_one_stage(tmp_path):
    "Seeds of the calibration alone: all cells stand on one reward model, and one set of prompts."
    found = homes(tmp_path, seeded=["calibrate.seed"], factors=None,
                  primary={**TOY["primary"], "tuned": []})
    assert len({home for (_, job), home in found.items() if job == "score"}) == 1
    assert len({home for (_, job), home in found.items() if job == "evaluate"}) == 2


def test_a_change_reaches_all_that_follows_and_nothing_else(tmp_path):
    def changed(field, value):
        a, b = homes(tmp_path), homes(tmp_path, recipe={**TOY["recipe"], field: value})
        return {job for name, job in a if a[name, job] != b[name, job]}
    after_reward = {"reward", "score", "score_validation", "calibrate/vcb-gamma1",
                    "calibrate/vcb-gamma0.3", "calibrate/dpo-beta1", "calibrate/dpo-beta0.3",
                    "evaluate"}
    assert changed("reward.learning_rate", 5e-3) == after_reward
    assert changed("sample.n", 5) == after_reward - {"reward"} | {"sample", "sample_validation"}
    assert changed("sample.batch_size", 3) == changed("sft.logging_steps", 7) == set()


def test_content_of_a_file_decides_not_its_name(tmp_path):
    "A prompts file from outside: another content is another job, a copy of it is the same."
    def home(name, text):
        (tmp_path/name).write_text(text)
        recipe = {**TOY["recipe"], "evaluate.prompts": str(tmp_path/name)}
        found = homes(tmp_path, recipe=recipe)
        return found["learning_rate=0.001,seed=0", "evaluate"]
    row = json.dumps({"prompt": "How is the soup?"}) + "\n"
    assert home("a.jsonl", row) == home("b.jsonl", row) != home("a.jsonl", row*2)


def test_the_plan_counts_jobs(tmp_path, capsys):
    "4 cells of 13 jobs: 2 × 8 shared, 4 × 5 own. Each kind has its seconds, from the budget."
    path = write(tmp_path)
    assert main(["study", str(path), "--plan", "--processes", "2"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()
             if line.strip()}
    assert lines["all"][:4] == ["36", "16", "20", "0"]
    assert lines["sample"][:4] == ["4", "4", "0", "0"]
    assert lines["calibrate"][:4] == ["16", "0", "16", "0"] and float(lines["calibrate"][4]) >= 0
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_valid(name):
    """Checked with one seed of each combination: every setting is one, all methods have as many
    strengths, and levels share the SFT model where they do not change it or its data."""
    study = load_study(name)
    seeds, study.seeds = len(study.seeds), study.seeds[:1]
    cells = cells_of(study)
    assert study.name == name and study.question.margin and (seeds >= 20 or name == "lesson")
    for cell in cells:
        methods = [about["method"] for about in cell.jobs[-1].config.methods.values()]
        assert len({*map(methods.count, methods)}) == 1, cell.name
    made = {"scale": 3, "reward_accuracy": 3}.get(name, 1) # sizes; labels of the data
    assert len({cell.homes["sft"] for cell in cells}) == made < len(cells)


def test_a_plan_has_seconds_for_methods_that_the_first_cell_lacks(tmp_path):
    "Another level trains another method: it is expected to take what its stage takes."
    levels = {"a": {}, "b": {"calibrate.methods": {"ipo": {"sweep": {"tau": [.1, .2]}}}}}
    study = load(tmp_path, factors={"setting": levels}, seeds=1, recipe={
        **TOY["recipe"], "calibrate.methods": {"vcb": {"sweep": {"gamma": [1, .3]}}}},
        primary={**TOY["primary"], "baseline": "a", "between": "setting", "tuned": []})
    seconds, _ = expected_seconds(cells_of(study))
    assert None not in [v for home, v in seconds.items() if "calibrate" in str(home)]


# ---- what is refused

BAD = {
    "no primary measure": (dict(primary=None), "primary is not set"),
    "no baseline": (dict(primary={"measure": "gold"}), "baseline is not set"),
    "a measure that is none": (dict(primary={"measure": "gold_at_1_nat_", "baseline": "vcb"}),
                               "Did you mean 'gold_at_1_nat'?"),
    "a measure at 0 nats": (dict(primary={"measure": "gold_at_0_nats", "baseline": "vcb"}),
                            "above 0"),
    "a baseline that is none": (dict(primary={**TOY["primary"], "baseline": "vbc"}),
                                "Did you mean 'vcb'?"),
    "a misspelt key": (dict(primary={**TOY["primary"], "margins": 1}), "Did you mean 'margin'?"),
    "no margin": (dict(primary={**TOY["primary"], "margin": 0}), "above 0"),
    "one number of many policies": (dict(primary={**TOY["primary"], "measure": "gold_gain"}),
                                    "several policies of vcb"),
    "tuned over what is no factor": (dict(primary={**TOY["primary"], "tuned": ["sample.n"]}),
                                     "primary.tuned"),
    "between what is no factor": (dict(primary={**TOY["primary"], "between": "sample.n"}),
                                  "primary.between"),
    "a secondary measure that is none": (dict(secondary=["golden"]), "Did you mean"),
    "a secondary measure on no prompts": (dict(secondary=["gold_at_1_nat on odd"]),
                                          "Did you mean 'ood'?"),
    "a secondary measure where nothing is held out": (
        dict(recipe={**TOY["recipe"], "data.world": {"ood": 0}},
             secondary=["gold_at_1_nat on ood"]), "no prompts out of distribution"),
    "no seeds": (dict(seeds=None), "seeds is not set"),
    "fewer seeds than one": (dict(seeds=-1), "seeds is below 1"),
    "no gold reward": (dict(recipe={**TOY["recipe"], "evaluate.gold": None}), "no gold reward"),
    "no KL": (dict(recipe={**TOY["recipe"], "evaluate.temperature": .7}), "needs a KL"),
    "no prompts out of distribution": (
        dict(recipe={**TOY["recipe"], "data.world": {"ood": 0}},
             primary={**TOY["primary"], "prompts": "ood"}), "no prompts out of distribution"),
    "seeds as a text": (dict(seeds="many"), "seeds"),
    "a seed twice": (dict(seeds=[1, 2, 1]), "one seed twice"),
    "no base": (dict(base="dmo"), "Did you mean 'demo'?"),
    "a field that is none": (dict(factors={"calibrate.learning_rat": [1]}),
                             "Did you mean 'learning_rate'?"),
    "a value that is none": (dict(recipe={"sample.n": "many"}), "sample.n"),
    "a factor without levels": (dict(factors={"sample.n": []}), "Give a list of values"),
    "a level twice": (dict(factors={"sample.n": [4, 4]}), "one value twice"),
    "a level with a structure": (dict(factors={"data.world": [{"test": 8}]}), "Name the levels"),
    "a level without fields": (dict(factors={"size": {"small": 3}}), "must map fields"),
    "a field set twice": (dict(factors={"sample.n": [4], "x": {"a": {"sample.n": 6}}}),
                          "set sample.n"),
    "a factor of the seed": (dict(factors={"seed": [4]}), "set seed"),
    "nothing to measure": (dict(upto="score"), "no stage 'evaluate'"),
    "a stage that is none": (dict(upto="evaluat"), "Did you mean 'evaluate'?"),
    "a folder outside": (dict(output_dir="../elsewhere"), "leads out"),
    "a name that leads out": (dict(name="../x"), "folder's name"),
    "code of others": (dict(recipe={"sft.trust_remote_code": True}), "trust_remote_code"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_study_is_one_sentence(name, tmp_path, capsys):
    changes, says = BAD[name]
    if "factors" in changes: # the question speaks of a factor that is not there
        changes = {"primary": {**TOY["primary"], "tuned": []}, **changes}
    assert main(["study", str(write(tmp_path, **changes)), "--plan"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and "Traceback" not in said, said


@pytest.mark.parametrize("words, says", [
    (["study"], "takes one study"), (["study", "lesso"], "Did you mean 'lesson'?"),
    (["study", "lesson", "--proceses", "2"], "Did you mean 'processes'?"),
    (["study", "lesson", "--processes", "0"], "below 1"),
    (["study", "lesson", "--processes", "two"], "whole number"),
    (["study", "lesson", "--cell", "6"], "--cell"),
    (["study", "lesson", "--cell", ""], "--cell is empty"),
    (["study", "lesson", "--seeds", "1", "--cell", "0"], "Leave --seeds out"),
    (["study", "lesson", "--seeds", "0-2,7"], "lesson.yaml has the seeds 0, 1, 2. Choose among"),
    (["study", "lesson", "--seeds", "2-1"], "Choose among"),
    (["study", "lesson", "--seeds", "first"], "such as 1-10 or 1,2,5")])
def test_a_bad_command_is_one_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_study_is_not_started_by_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", str(write(tmp_path))]) == 2
    assert "without torchrun" in capsys.readouterr().err


# ---- the question

def test_another_question_is_refused_once_results_were_seen(tmp_path, caplog):
    record = record_study(load(tmp_path))
    assert record["history"][0]["evaluated"] == 0 and record["history"][0]["file"]
    other = {**TOY["primary"], "margin": 2}
    record_study(load(tmp_path, primary=other)) # nothing was seen yet
    assert "margin" in caplog.text and "1" in caplog.text
    (tmp_path/"out"/"jobs"/"evaluate-1").mkdir(parents=True)
    (tmp_path/"out"/"jobs"/"evaluate-1"/"manifest.json").write_text("{}")
    with pytest.raises(InputError, match="primary was .*'margin': 2.*and is .*'margin': 1"):
        record_study(load(tmp_path))
    record_study(load(tmp_path, primary=other, seeds=3)) # more seeds: said, and allowed
    history = read_json(tmp_path/"out"/"study.json")["history"]
    assert "seeds: [0, 1] → [0, 1, 2]" in history[-1]["changed"] and history[-1]["evaluated"] == 1
    assert len(history) == 3 and len({entry["file"] for entry in history}) == 3


# ---- decisions, from plain rows

def row(seed, method, value, kl, gain, factors={}, prompt_set="p", **more):
    return dict(cell="c", seed=seed, factors=factors, policy=f"{method}{value}", method=method,
                strength="s", value=value, prompts="test", prompt_set=prompt_set,
                kl=kl, gold_gain=gain, **more)


def rows_of(seeds=4, prompts=6, own_prompts=True, factors=({},), shift=.3):
    "Two methods at two strengths: b gains `shift` more than a at each."
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        both = rng.normal(0, .5) + rng.normal(0, .3, prompts)
        for level in factors:
            for method, value in (("a", 1), ("a", 2), ("b", 1), ("b", 2)):
                gain = both + value + shift*(method == "b") + rng.normal(0, .05, prompts)
                kl = value**2*.5 + rng.normal(0, .02, prompts)
                rows.append(row(seed, method, value, kl.tolist(), gain.tolist(), level,
                                f"p{seed}" if own_prompts else "p"))
    return rows


ASKED = dict(measure="gold_at_1_nat", baseline="a", margin=1.)


def test_a_decision_is_the_contrast_of_the_rows():
    rows = rows_of()
    found, = decisions_of(rows, Question(**ASKED))
    by = {(r["seed"], r["policy"]): r for r in rows}
    def matrix(seed): # a's KLs, b's KLs, a's gains, b's gains
        return np.array([by[seed, f"{m}{v}"][c] for c in ("kl", "gold_gain")
                         for m in "ab" for v in (1, 2)]).T
    def statistic(m): return gain_at_kl(m[:, 2:4], m[:, 6:], 1) - gain_at_kl(m[:, :2], m[:, 4:6], 1)
    want = contrast([matrix(seed) for seed in range(4)], statistic, 1.)
    assert {k: found[k] for k in want} == pytest.approx(want)
    assert found["value"] == pytest.approx(.3, abs=.1)
    assert (found["level"], found["at"]) == ("b", {})


def test_seeds_with_one_set_of_prompts_are_crossed():
    "The interval is that of shared draws."
    nested, crossed = (decisions_of(rows_of(own_prompts=own), Question(**ASKED))[0]
                       for own in (True, False))
    assert nested["value"] == crossed["value"] and nested["se"] != crossed["se"]


def test_rows_of_different_prompts_are_not_paired():
    rows = rows_of()
    rows[2]["prompt_set"] = "others"
    with pytest.raises(InputError, match="different prompts"): decisions_of(rows, Question(**ASKED))


def test_a_level_that_another_seed_lacks_is_compared_on_those_that_both_have():
    rows = [r for r in rows_of() if not (r["seed"] == 3 and r["method"] == "b")]
    found, = decisions_of(rows, Question(**ASKED))
    assert found["seeds"] == 3


def test_other_factors_are_not_mixed():
    "A contrast per level of what is not compared; `sft` is no level."
    rows = rows_of(factors=({"n": "2"}, {"n": "4"})) + [row(0, "sft", None, [0.]*6, [0.]*6)]
    found = decisions_of(rows, Question(**ASKED))
    assert [(c["level"], c["at"]) for c in found] == [("b", {"n": "2"}), ("b", {"n": "4"})]
    found = decisions_of(rows[:-1], Question(measure="gold_at_1_nat", baseline=2, between="n"))
    assert [(c["level"], c["at"]["method"]) for c in found] == [("4", "a"), ("4", "b")]


def test_a_factor_that_is_the_method_is_compared_across_methods():
    "`calibrate.loss: [a, b]`: each level has a method of its own, and they still meet."
    rows = [{**r, "factors": {"loss": r["method"]}} for r in rows_of()]
    found, = decisions_of(rows, Question(measure="gold_at_1_nat", baseline="a", between="loss"))
    assert found["value"] == pytest.approx(.3, abs=.1)


def test_tuned_settings_are_those_of_the_other_seeds():
    "Setting 2 adds 1 to b in all seeds: b is measured there, a wherever the others were best."
    rows = rows_of(factors=({"lr": "1"}, {"lr": "2"}))
    for r in rows:
        if r["method"] == "b" and r["factors"]["lr"] == "2":
            r["gold_gain"] = [g + 1 for g in r["gold_gain"]]
    found, = decisions_of(rows, Question(**ASKED, tuned=["lr"]))
    assert found["value"] == pytest.approx(1.3, abs=.15) and found["tuned_over"] == [2, 2]


def test_an_unequal_effort_is_said():
    "Two strengths of one method and one of the other."
    rows = [r for r in rows_of() if r["policy"] != "b1"]
    found = decide(decisions_of(rows, Question(**ASKED)))
    assert found[0]["strengths"] == [1, 2]
    said = decisions_text([dict(c, family="primary", family_size=1) for c in found])
    assert "unequal: 1 and 2 strengths" in said and "b − a" in said and "4 seeds" in said


def test_a_secondary_measure_may_be_on_the_other_prompts():
    "Rows out of distribution shift b by 1: only the measure `on ood` sees them."
    ood = [{**r, "prompts": "ood", "prompt_set": "o" + r["prompt_set"],
            "gold_gain": [g + (r["method"] == "b") for g in r["gold_gain"]]} for r in rows_of()]
    rows, asked = rows_of() + ood, Question(**ASKED)
    here, = decisions_of(rows, asked, "gold_at_1_nat")
    there, = decisions_of(rows, asked, "gold_at_1_nat on ood")
    assert here["value"] == pytest.approx(.3, abs=.1)
    assert there["value"] == pytest.approx(1.3, abs=.1)
    assert (here["prompts"], there["prompts"], there["measure"]) == ("test", "ood", "gold_at_1_nat")
    assert here["p_equivalent"] is not None and there["p_equivalent"] is None


def test_columns_that_are_not_there_are_named():
    rows = rows_of()
    for r in rows: r["kl"] = None
    with pytest.raises(InputError, match="no column kl"): decisions_of(rows, Question(**ASKED))


# ---- real runs

def vcb(*words):
    "Start `vcb` in a session of its own; a SIGINT is not ignored below a shell's `&`."
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "vcb_nb", *map(str, words)],
                            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def ended(process, status=0):
    out, _ = process.communicate()
    assert process.returncode == status, out
    return out


def tables(folder):
    return [(folder/name).read_text("utf-8") for name in ("results.jsonl", "per_prompt.jsonl")]


def decided(folder):
    return read_json(folder/"decisions.json")["decisions"]


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in (folder/"jobs").rglob("*") if p.is_file()
            and not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed study of two cells."
    folder = tmp_path_factory.mktemp("whole")
    said = ended(vcb("study", write(folder, **RUN), "--processes", 2))
    return folder, said


@pytest.fixture
def copy(whole, tmp_path):
    "A copy of the finished study; its links are relative, so it may be moved."
    shutil.copytree(whole[0]/"out", tmp_path/"out", symlinks=True)
    return tmp_path


@pytest.mark.slow
def test_the_table_has_a_row_per_cell_policy_and_prompts(whole):
    out = whole[0]/"out"
    rows = list(map(json.loads, tables(out)[0].splitlines()))
    assert len(rows) == 2*4*2 == len({(r["cell"], r["policy"], r["prompts"]) for r in rows})
    for r in rows:
        summary = read_json(out/"cells"/r["cell"]/"evaluate"/"summary.json")
        own = summary["policies"][r["policy"]]["splits"][r["prompts"]]
        for name in ("gold", "gold_gain", "reward", "kl", "length"):
            assert r[name] == own[name]["value"]
        assert r["n_prompts"] == {"test": 8, "ood": 4}[r["prompts"]]
        of = {job: read_manifest(out/"cells"/r["cell"]/job)["summary"]
              for job in ("sft", "reward", "score")}
        assert r["reward_accuracy"] == of["reward"]["accuracy"]
        assert r["sft_loss"] == of["sft"]["eval_loss"] > 0
        assert r["reward_std"] == of["score"]["reward_std"] > 0
        if r["policy"] == "sft": continue
        assert r["win"] + r["tie"] + r["lose"] == pytest.approx(1)
        assert r["judge"] == "gold" and r["gold_win"] == r["win"]
        games = summary["comparisons"][r["prompts"]]["reward"]
        assert r["reward_win"] == games[r["policy"]]["sft"]["win"]
    assert {r["factors"]["calibrate.learning_rate"] for r in rows} == {"0.001", "0.005"}
    assert {r["value"] for r in rows if r["method"] == "vcb"} == {1, .3}


@pytest.mark.slow
def test_numbers_per_prompt_are_those_of_the_means(whole):
    pairs = zip(*(map(json.loads, text.splitlines()) for text in tables(whole[0]/"out")))
    for means, own in pairs:
        assert (means["cell"], means["policy"], means["prompts"]) == (
            own["cell"], own["policy"], own["prompts"])
        for name in ("gold", "gold_gain", "reward_gain", "kl", "length"):
            assert np.mean(own[name]) == pytest.approx(means[name], abs=1e-5)


@pytest.mark.slow
def test_shared_work_is_done_once(whole):
    "As many jobs as the plan says, each made by one process; cells hold links."
    out, study = whole[0]/"out", load_study(str(whole[0]/"toy.yaml"))
    assert len(list((out/"jobs").rglob("manifest.json"))) == 16
    took = 0
    for cell in cells_of(study):
        assert cell.done and (cell.folder/"sft").is_symlink()
        took += (cell.folder/"log.txt").read_text().count(" took ")
    lines = study_plan(study, cells_of(study), 2).splitlines()
    assert took == 16
    assert next(l for l in lines if l.startswith("all")).split()[1:] == ["16", "8", "8", "16", "0"]


@pytest.mark.slow
def test_the_decision_is_recorded_with_when_it_was_named(whole):
    found = read_json(whole[0]/"out"/"decisions.json")
    record = read_json(whole[0]/"out"/"study.json")["history"][0]
    assert (found["named_on"], found["file"]) == (record["at"], record["file"])
    assert found["changed"] == []
    decision, = found["decisions"]
    assert decision["level"] == "dpo" and decision["family_size"] == 1
    assert decision["verdict"].startswith("undecided (") and record["evaluated"] == 0
    assert decision["verdict"] in whole[1]


def wait_for(found, process):
    while not found():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(.02)


def children(process):
    "The cells that a study runs now."
    listed = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for path in listed for pid in path.read_text().split()]


@long_study
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_killed_cells_and_a_killed_study_resume_to_the_same_table(whole, tmp_path):
    """SIGKILL of a cell in SFT, which the other cell waits for and takes over; of the study in a
    calibration; and a start while its cells are still at work: the table is the undisturbed one."""
    path, out = write(tmp_path, **RUN), tmp_path/"out"
    study = vcb("study", path, "--processes", 2)
    wait_for(lambda: list(out.glob("jobs/sft-*/checkpoints/checkpoint-*")), study)
    os.kill(children(study)[0], signal.SIGKILL)
    said = ended(study, 2)
    assert said.count("it was killed by SIGKILL") == 1 and "Traceback" not in said
    assert len(tables(out)[0].splitlines()) == 8 # the other cell came to its end
    for home in [*out.glob("jobs/calibrate/*"), *out.glob("jobs/evaluate-*")]: shutil.rmtree(home)
    study = vcb("study", path, "--processes", 2)
    wait_for(lambda: list(out.glob("jobs/calibrate/*/checkpoints/checkpoint-*")), study)
    orphans = children(study)
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    assert orphans and all(Path(f"/proc/{pid}").exists() for pid in orphans)
    ended(vcb("study", path, "--processes", 2))
    assert tables(out) == tables(whole[0]/"out") and decided(out) == decided(whole[0]/"out")
    assert not list(out.rglob("pending.json")) and not list(out.rglob("*.partial"))


@long_study
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_stopped_study_ends_its_cells_and_is_finished_piece_by_piece(whole, copy):
    """SIGTERM: every cell ends, the status is 143, the command that resumes is said, and the table
    has what has finished: nothing. Then one cell alone, as an array job on a cluster; a model that
    somebody deleted; and the rest: the same table. A further start changes nothing."""
    path, out, study = write(copy, **RUN), copy/"out", load(copy, **RUN)
    for home in out.glob("jobs/evaluate-*"): shutil.rmtree(home)
    process = vcb("study", path, "--processes", 2)
    wait_for(lambda: list(out.glob("jobs/evaluate-*/pending.json")), process)
    running = children(process)
    os.kill(process.pid, signal.SIGTERM)
    said = ended(process, 143)
    assert "stopped by SIGTERM in the cells of the study. To resume: " in said
    assert running and not any(Path(f"/proc/{pid}").exists() for pid in running)
    first, second = cells_of(study)
    assert read_json(out/"decisions.json")["done"] == 0 and tables(out) == ["", ""]
    ended(vcb("study", path, "--cell", 1))
    assert second.done and not first.done and read_manifest(second.homes["evaluate"])
    model = second.homes["calibrate/dpo"]/"model"/"model.safetensors"
    content = model.read_bytes()
    model.unlink()
    assert not second.done
    ended(vcb("study", path, "--processes", 2))
    assert model.read_bytes() == content and tables(out) == tables(whole[0]/"out")
    before = stamps(out), decided(out)
    ended(vcb("study", path, "--processes", 2))
    assert (stamps(out), decided(out)) == before and first.done and second.done


@long_study
def test_other_seeds_are_left_alone(whole, copy):
    "A study of which seed 0 is done gets a second seed, and is told to run seed 0."
    path = write(copy, **RUN | {"seeds": [0, 1]})
    ended(vcb("study", path, "--seeds", "0"))
    assert not list(copy.glob("out/cells/*seed=1/log.txt"))
    assert tables(copy/"out") == tables(whole[0]/"out")


@long_study
def test_a_cell_that_fails_is_named_and_the_others_go_on(copy):
    "A learning rate that ends in NaN: its cell fails in one sentence, the others are kept."
    factors = {"calibrate.learning_rate": [1e-3, 5e-3, 1e30]}
    said = ended(vcb("study", write(copy, **RUN, factors=factors), "--processes", 2), 2)
    failed, = [line for line in said.splitlines() if line.startswith("vcb: ")]
    assert failed.startswith("vcb: learning_rate=1e+30,seed=0: ") and "Traceback" not in said
    assert len(tables(copy/"out")[0].splitlines()) == 16
    assert "factors: " in read_json(copy/"out"/"study.json")["history"][-1]["changed"]


def test_a_run_waits_for_a_folder_that_is_in_use(tmp_path):
    "With `--wait`; without it the second run is refused."
    text = tmp_path/"a.txt"
    text.write_text("a few words " * 50)
    recipe = tmp_path/"r.yaml"
    recipe.write_text(f"tokenizer: {{data: {text}, vocab_size: 300}}")
    words = "run", recipe, "--output_dir", tmp_path/"out"
    with run_lock(tmp_path/"out"):
        assert "is in use by process" in ended(vcb(*words), 2)
        waiting = vcb(*words, "--wait")
        said = waiting.stdout.readline() # comes while the folder is still locked
        assert f"out is in use by process {os.getpid()}: waiting" in said
        assert waiting.poll() is None and not (tmp_path/"out"/"tokenizer").exists()
    ended(waiting)
    assert read_manifest(tmp_path/"out"/"tokenizer")


def test_a_folder_that_is_no_link_is_refused(tmp_path):
    study = load(tmp_path)
    from vcb_nb.study import link_jobs
    cell = cells_of(study)[0]
    (cell.folder/"sft").mkdir(parents=True)
    with pytest.raises(InputError, match="not part of this study"): link_jobs(cell)


def test_problems_are_said_before_any_cell_runs(tmp_path, capsys):
    "A reward function that is not there, found for each combination once."
    path = write(tmp_path, recipe={**TOY["recipe"], "score.reward": "no_such_module:reward"})
    assert main(["study", str(path)]) == 2
    said = capsys.readouterr().err
    assert "learning_rate=0.001,seed=0: score" in said and "no_such_module" in said
    assert not list((tmp_path/"out").rglob("manifest.json"))


def test_a_job_takes_over_what_another_process_finished(tmp_path):
    "Two runs with one shared folder: the second waits inside the job, and finds it done."
    import threading

    from vcb_nb.pipeline import plan, run_job
    from vcb_nb.recipes import check_recipe
    (tmp_path/"a.txt").write_text("a few words " * 50)
    job, = plan(check_recipe({"seed": 0, "output_dir": str(tmp_path/"out"), "tokenizer": {
        "data": str(tmp_path/"a.txt"), "vocab_size": 300}}))
    found = []
    with run_lock(job.folder):
        with pytest.raises(InputError, match="in use by process"): run_job(job)
        thread = threading.Thread(target=lambda: found.append(run_job(job, wait=True)))
        thread.start()
        time.sleep(1)
        assert not found and thread.is_alive()
    thread.join()
    assert found == ["new"] and run_job(job, wait=True) == "done"


def test_a_job_whose_file_is_lost_is_not_done(tmp_path):
    from vcb_nb.artifacts import write_manifest
    from vcb_nb.study import is_done
    assert not is_done(tmp_path)
    (tmp_path/"model").write_text("weights")
    write_manifest(tmp_path, stage="sft")
    assert is_done(tmp_path)
    (tmp_path/"model").unlink()
    assert not is_done(tmp_path)
