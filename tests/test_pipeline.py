"""The pipeline's books: what is done is skipped, what is cut off goes on, what is stale or altered
is said.

The cheap stages (data, tokenizer) stand for all of them; the last tests run every stage at a tiny
size."""
import os, subprocess, sys
from pathlib import Path

import pytest

from vcb_nb.artifacts import InputError, fingerprint, read_json, read_manifest, run_lock
from vcb_nb.pipeline import job_state, plan, plan_states, run_recipe
from vcb_nb.recipes import check_recipe, load_recipe

ROOT = Path(__file__).parent.parent


def small(folder, **changes):
    world = dict(demonstrations=40, pairs=30, prompts=20, validation=10, test=10, ood=10)
    sections = {"data": {"world": world}, "tokenizer": {"vocab_size": 300}, **changes}
    return check_recipe({"name": "t", "seed": 0, "output_dir": str(folder), **sections})


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*")
            if p.is_file() and p.name != "recipe.yaml" and not p.name.startswith(".lock")}


def test_second_call_does_nothing(tmp_path):
    assert run_recipe(small(tmp_path)) == {"data": "new", "tokenizer": "new"}
    before = stamps(tmp_path)
    assert run_recipe(small(tmp_path)) == {"data": "done", "tokenizer": "done"}
    assert stamps(tmp_path) == before


def test_manifest_says_what_made_it(tmp_path):
    run_recipe(small(tmp_path))
    manifest = read_manifest(tmp_path/"tokenizer")
    assert manifest["settings"] == {"vocab_size": 300}
    assert manifest["versions"]["torch"]
    assert manifest["seconds"] >= 0
    assert manifest["inputs"] == {"data": fingerprint(tmp_path/"data"/"files"/"texts.jsonl")}


def test_changed_recipe_is_refused_and_named(tmp_path):
    run_recipe(small(tmp_path))
    with pytest.raises(InputError, match=r"tokenizer.*vocab_size: 300 → 320.*--redo"):
        run_recipe(small(tmp_path, tokenizer={"vocab_size": 320}))
    assert read_manifest(tmp_path/"tokenizer")["settings"]["vocab_size"] == 300
    changed = small(tmp_path, tokenizer={"vocab_size": 320})
    assert run_recipe(changed, redo=True)["tokenizer"] == "stale"
    assert read_manifest(tmp_path/"tokenizer")["settings"]["vocab_size"] == 320


def test_changed_recipe_is_refused_before_any_work(tmp_path):
    """Not after hours of a stage before the changed one;
    and the recipe beside the results stays theirs."""
    run_recipe(small(tmp_path))
    (tmp_path/"data"/"files"/"pairs.jsonl").unlink()
    before, recipe = stamps(tmp_path), (tmp_path/"recipe.yaml").read_text()
    with pytest.raises(InputError, match="vocab_size: 300 → 320"):
        run_recipe(small(tmp_path, tokenizer={"vocab_size": 320}))
    assert stamps(tmp_path) == before and (tmp_path/"recipe.yaml").read_text() == recipe


def test_changed_input_makes_what_follows_stale(tmp_path):
    run_recipe(small(tmp_path))
    world = dict(demonstrations=41, pairs=30, prompts=20, validation=10, test=10, ood=10)
    other = small(tmp_path, data={"world": world})
    run_recipe(other, upto="data", redo=True)
    assert job_state(plan(other)[1]) == ("stale", "different data")


def test_a_plan_follows_what_is_stale(tmp_path):
    """The tokenizer is as it was left, but its text will be another: a plan that calls it done
    is wrong."""
    run_recipe(small(tmp_path))
    world = dict(demonstrations=41, pairs=30, prompts=20, validation=10, test=10, ood=10)
    other = small(tmp_path, data={"world": world}, sft={"model_config": {}}, report={})
    assert plan_states(plan(small(tmp_path)))["tokenizer"][0] == "done"
    assert plan_states(plan(other)) == {
        "data": ("stale", f"world: {small(tmp_path)['data']['world']} → {world}"),
        "tokenizer": ("stale", "data will be made again"), "sft": ("new", ""),
        "report": ("new", "")}


def test_cosmetic_change_is_no_reason(tmp_path):
    recipe = load_recipe("demo", {"output_dir": str(tmp_path)})
    keys = {j.name: j.key() for j in plan(recipe)}
    recipe["sft"]["logging_steps"] = 1
    assert {j.name: j.key() for j in plan(recipe)} == keys


@pytest.mark.parametrize("harm", [
    lambda p: p.unlink(),
    lambda p: p.write_bytes(p.read_bytes()[:100])], ids=["deleted", "truncated"])
def test_file_harmed_behind_the_runs_back_is_made_again(tmp_path, harm):
    run_recipe(small(tmp_path))
    whole = (tmp_path/"data"/"files"/"pairs.jsonl").read_text()
    harm(tmp_path/"data"/"files"/"pairs.jsonl")
    state, remark = job_state(plan(small(tmp_path))[0])
    assert state == "altered" and "pairs.jsonl" in remark
    run_recipe(small(tmp_path))
    assert (tmp_path/"data"/"files"/"pairs.jsonl").read_text() == whole


def test_kill_while_an_altered_stage_is_cleared(tmp_path, monkeypatch):
    "At no moment is the folder without books, which would make its files those of a stranger."
    run_recipe(small(tmp_path))
    (tmp_path/"data"/"files"/"pairs.jsonl").unlink()
    unlink = Path.unlink

    def killed(path, **kwargs):
        if path.name != "manifest.json": return unlink(path, **kwargs)
        unlink(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt): run_recipe(small(tmp_path))
    monkeypatch.undo()
    assert run_recipe(small(tmp_path)) == {"data": "cut off", "tokenizer": "done"}


def test_what_a_killed_writer_left_is_removed(tmp_path):
    run_recipe(small(tmp_path))
    (tmp_path/"data"/"files"/"pairs.jsonl").unlink()
    left = [tmp_path/".recipe.yaml.7.partial", tmp_path/"data"/".files.7.old"]
    for path in left: path.write_text("half")
    run_recipe(small(tmp_path))
    assert not any(map(Path.exists, left))


def test_unknown_files_are_not_overwritten(tmp_path):
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"mine.txt").write_text("precious")
    with pytest.raises(InputError, match="unknown origin"): run_recipe(small(tmp_path))
    assert (tmp_path/"data"/"mine.txt").read_text() == "precious"


def test_two_runs_in_one_folder_at_once(tmp_path):
    with run_lock(tmp_path), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        run_recipe(small(tmp_path))
    with run_lock(tmp_path/"data"), pytest.raises(InputError, match="data is in use by process"):
        run_recipe(small(tmp_path))


def test_upto_names_what_there_is(tmp_path):
    with pytest.raises(InputError, match="no stage 'sft'. Valid: data, tokenizer"):
        run_recipe(small(tmp_path), upto="sft")


def test_world_or_pairs(tmp_path):
    with pytest.raises(InputError, match="either 'world'"): run_recipe(small(tmp_path, data={}))


def vcb(*words, **kwargs):
    return subprocess.Popen([sys.executable, "-m", "vcb_nb.cli", *map(str, words)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed run of every stage at a tiny size."
    folder = tmp_path_factory.mktemp("whole")
    process = vcb("run", ROOT/"tests"/"tiny.yaml", "--output_dir", folder)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return folder


@pytest.mark.slow
def test_every_stage_runs_and_reports(whole):
    assert (whole/"report"/"index.html").stat().st_size > 20_000
    assert (whole/"report"/"report.md").exists()
    summary = read_json(whole/"evaluate"/"summary.json")
    recipe = load_recipe(str(ROOT/"tests"/"tiny.yaml"))
    methods = {p["method"] for p in summary["policies"].values()}
    assert methods == {"sft", *recipe["calibrate"]["methods"]}
    for policy in summary["policies"].values():
        estimate = policy["splits"]["test"]["gold"]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]


@pytest.mark.slow
def test_second_run_does_nothing(whole):
    before = stamps(whole)
    out, _ = vcb("run", ROOT/"tests"/"tiny.yaml", "--output_dir", whole).communicate()
    assert "Everything is up to date" in out and stamps(whole) == before
