"""Bad input gives one message that names the row or file, what is wrong and the remedy; nothing
that was there is changed, and the exit status is 2. The cases are in `bad_inputs.py`."""
import copy, json, math, re, subprocess, sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from bad_inputs import CASES, COMMAND_LINES, RECIPES, RIGHT, File, build_world
from vcb_nb.artifacts import InputError, fingerprint, read_manifest, write_jsonl
from vcb_nb.cli import main
from vcb_nb.data import (load_candidates, load_demonstrations, load_pairs, load_prompts, load_rows,
                         load_texts)
from vcb_nb.pipeline import plan
from vcb_nb.recipes import load_recipe, save_recipe, shipped_recipes
from vcb_nb.sample import SampleConfig, sample
from vcb_nb.score import ScoreConfig, score
from vcb_nb.settings import load_object
from vcb_nb.stages import STAGES, find_stage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_tokenizer):
    return build_world(tmp_path_factory.mktemp("world"), tiny_tokenizer)


@pytest.fixture
def own(tmp_path):
    (tmp_path/"own").mkdir()
    return tmp_path/"own"


def filled(value, world, own):
    "A setting with its files written and its paths put in."
    if isinstance(value, File): return str(value.write(own))
    if callable(value): return str(value(world, own))
    if isinstance(value, str): return value.format(**world, own=own) if "{" in value else value
    if isinstance(value, list): return [filled(v, world, own) for v in value]
    if isinstance(value, dict): return {k: filled(v, world, own) for k, v in value.items()}
    return value


def settings_of(case, world, own):
    return filled({**RIGHT[case.stage], **case.changes}, world, own)


def assert_says(message, says):
    "One line of a few sentences that holds all the words."
    assert "\n" not in message and len(message) < 500, message
    for words in says: assert words in message, message


@pytest.fixture
def untouched(world, own):
    "Whatever the test does, the world stays as it was, and so do the case's own files."
    root, before = world["policy"].parent, {}
    before[root] = fingerprint(root)
    yield lambda: before.update({p: fingerprint(p) for p in own.iterdir()})
    assert {p: fingerprint(p) for p in before} == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_library(case, world, own, tmp_path, untouched, monkeypatch):
    "The stage's function, called from Python, raises `InputError` and nothing else."
    settings = settings_of(case, world, own)
    untouched()
    for name, value in case.env.items(): monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        stage = find_stage(case.stage)
        config = stage.config_class(**settings, output_dir=str(tmp_path/"out"))
        load_object(stage.run)(config)
    assert_says(str(error.value), case.says)


def typed(value):
    "A value as a user types it: strings are literal."
    return value if isinstance(value, str) else json.dumps(value)


def command_line(case, settings, folder):
    "The command that a user would type: a stage alone, or a recipe of that stage."
    words = [w for k, v in settings.items() for w in (f"--{k}", typed(v))]
    return [case.stage, *words, "--output_dir", str(folder/"out")]


def said(capsys, words):
    "The exit status, and what stands on standard error beside progress bars and the log."
    status = main([str(word) for word in words])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return status, [line for line in re.split("[\n\r]", err) if line.startswith("vcb: ")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_command(case, world, own, tmp_path, untouched, monkeypatch, capsys):
    "`vcb STAGE` says the same in one line, and leaves with status 2."
    settings = settings_of(case, world, own)
    words = command_line(case, settings, tmp_path)
    untouched()
    for name, value in case.env.items(): monkeypatch.setenv(name, value)
    status, lines = said(capsys, words)
    assert status == 2 and len(lines) == 1, lines
    assert_says(lines[0], case.says)
    assert not list((tmp_path/"out").rglob("manifest.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, tmp_path, capsys):
    "A recipe is refused before any work begins, by the library and by the command."
    text, *says = RECIPES[name]
    path = tmp_path/"my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error: plan(load_recipe(str(path)))
    assert_says(str(error.value), says)
    for option in ([], ["--plan"]):
        status, lines = said(capsys, ["run", path, "--output_dir", tmp_path/"run", *option])
        assert status == 2 and len(lines) == 1
        assert_says(lines[0], says)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_command_line(name, world, own, capsys):
    words, *says = COMMAND_LINES[name]
    status, lines = said(capsys, [filled(word, world, own) for word in words])
    assert status == 2 and len(lines) == 1, lines
    assert_says(lines[0], says)


@pytest.mark.parametrize("words, says", [
    (["smaple"], "Did you mean 'sample'?"), (["run", "{own}/my.yaml"], "Did you mean 'sample'?"),
    (["run", "demo", "--sample.n", "["], "--sample.n: not YAML"),
    pytest.param(["reward", "--pairs", "{own}/p.jsonl.gz", "--model", "{policy}", "--output_dir",
                  "{own}/out"], "p.jsonl.gz:2: not JSON", marks=pytest.mark.slow)],
    ids=["command", "recipe", "option", "stage"])
def test_process(words, says, world, own):
    "The same from a shell: status 2, no traceback, the sentence as the last line."
    (own/"my.yaml").write_text("sampel: {n: 8}")
    File("p.jsonl.gz", '{"prompt": "a", "chosen": " b", "rejected": " c"}\n{').write(own)
    command = [sys.executable, "-m", "vcb_nb.cli", *filled(words, world, own)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert_says(done.stderr.splitlines()[-1], ("vcb: ", says))


# ---- nothing is lost

def options(stage, world, **changes):
    settings = filled({**RIGHT[stage], **changes}, world, None)
    return [w for k, v in settings.items() for w in (f"--{k}", typed(v))]


def test_redo_with_a_bad_value_keeps_the_old_work(world, tmp_path, capsys):
    "The settings are checked before the folder is cleared."
    out = ["--output_dir", tmp_path/"out"]
    assert main(list(map(str, ["sample", *options("sample", world), *out]))) == 0
    before = fingerprint(tmp_path/"out")
    for wrong in ({"temperature": 0}, {"device": "cuda:9"}, {"n": 0}):
        status, _ = said(capsys, ["sample", *options("sample", world, **wrong), *out, "--redo"])
        assert status == 2 and fingerprint(tmp_path/"out") == before


def test_a_corrected_command_needs_no_redo(world, tmp_path, capsys):
    "What was refused before it began leaves nothing that the next call would trip over."
    out, ends = ["--output_dir", tmp_path/"out"], []
    for prompt in ("word " * 200, "word"):
        write_jsonl(tmp_path/"prompts.jsonl", [{"prompt": prompt}])
        words = options("sample", world, prompts=str(tmp_path/"prompts.jsonl"))
        ends.append(said(capsys, ["sample", *words, *out])[0])
    assert ends == [2, 0]


def test_more_processes_than_rows(world, tmp_path, monkeypatch):
    "Processes without a prompt end well, and the parts of the others make the whole."
    config = SampleConfig(str(world["policy"]), str(world["prompts"]), str(tmp_path/"s"), n=2,
                          max_new_tokens=3, shard_size=1, device="cpu")
    scoring = ScoreConfig(str(tmp_path/"s"), str(tmp_path/"c"), reward="bad_inputs:length")
    monkeypatch.setenv("WORLD_SIZE", "6")
    for stage, settings in ((sample, config), (score, scoring)):
        for rank in range(6):
            monkeypatch.setenv("RANK", str(rank))
            summary = stage(settings)
        assert summary["prompts"] == 4
    assert len(load_candidates(str(tmp_path/"c"))) == 4


# ---- what is skipped is counted

LISTS = [("a", [" b", " c c", " d d d"], [1., 2., 3.]), ("two", [" b", " c"], [0., 1.]),
         ("one", [" b"], [1.]), ("equal", [" b", " c"], [.1 + .2, .3]),
         ("", [" b", " c"], [1., 2.]), ("empty", ["", " c", " d"], [1., 2., 4.]),
         ("again", [" b", " b", " c"], [1., 1., 2.])]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    "A run on files with rows that cannot be used."
    folder = tmp_path_factory.mktemp("skips")
    pairs = [{"prompt": f"p{i}", "chosen": " b", "rejected": " c"} for i in range(6)]
    write_jsonl(folder/"pairs.jsonl", [*pairs, {**pairs[0], "rejected": " b"}])
    write_jsonl(folder/"lists.jsonl", [dict(prompt=p, completions=c, rewards=r, finish_reasons=[
        "stop" if text else "length" for text in c]) for p, c, r in LISTS])
    stages = {"reward": {"pairs": str(folder/"pairs.jsonl"), "eval_share": 0.},
              "score": {"candidates": str(folder/"lists.jsonl"), "reward": None},
              "calibrate": {"candidates": str(folder/"run"/"score"/"data"), "num_train_epochs": 1,
                            "max_steps": -1},
              "evaluate": {"candidates": str(folder/"lists.jsonl")}}
    recipe = {s: filled({**RIGHT[s], **changes}, world, folder) for s, changes in stages.items()}
    save_recipe({"output_dir": str(folder/"run"), **recipe, "report": {}}, folder/"r.yaml")
    return folder


def test_what_is_skipped_is_counted(run, caplog):
    "In the log, in the manifest and in the report; what is left is used, ragged as it is."
    caplog.set_level("INFO", "vcb_nb")
    assert main(["run", str(run/"r.yaml")]) == 0
    summary = {stage: read_manifest(run/"run"/stage)["summary"]
               for stage in ("reward", "score", "calibrate/vcb", "evaluate")}
    report = (run/"run"/"report"/"index.html").read_text()
    assert summary["reward"]["dropped"] == {"not a pair": 1, "same after the cut": 0}
    assert summary["score"]["dropped"] == {"empty completion": 1, "no completion left": 0,
                                           "empty prompt": 1}
    assert (summary["score"]["no_signal"], summary["score"]["repeated"]) == (2, 1)
    train = summary["calibrate/vcb"]["data"]["train"]
    assert train["dropped"] == {"single candidate": 1, "no signal": 1}
    assert (train["prompts"], train["candidates"]) == (4, 10)
    calibration = summary["evaluate"]["policies"]["again"]["calibration"]
    assert calibration["dropped_prompts"] == 2 and calibration["dropped_rows"]["empty prompt"] == 1
    for words in ("chosen equals rejected: 1", "'empty completion': 1", "'single candidate': 1",
                  "2 of 6 prompts have equal rewards"):
        assert words in caplog.text, words
    for words in ("dropped 1 (not a pair)", "dropped 1 (empty prompt)", "dropped 1 (no signal)",
                  "repeated 1", "dropped 1 (single candidate)"):
        assert words in report, words


def test_two_candidates_are_warned_of(world, tmp_path, caplog):
    "With n = 2 VCB trains on ±√2 whatever the rewards are: said, not hidden."
    rows = [dict(prompt=p, completions=[" b", " c"], rewards=[0., 1.]) for p in "abcd"]
    write_jsonl(tmp_path/"c.jsonl", rows)
    words = options("calibrate", world, candidates=str(tmp_path/"c.jsonl"), reference="live")
    assert main(["calibrate", *words, "--output_dir", str(tmp_path/"out")]) == 0
    assert "±√2" in caplog.text and "'dataset'" in caplog.text


# ---- unknown keys at any depth

DEEP = {"data": {"world": {"pairs": 10}}, "tokenizer": {"vocab_size": 300},
        "sft": {"architecture": "llama", "model_config": {"hidden_size": 8},
                "peft_config": {"lora_alpha": 3}, "learning_rate": 1e-3},
        "reward": {"peft_config": {"target_modules": "all-linear"}}, "sample": {"top_p": .9},
        "score": {"shard_size": 3},
        "calibrate": {"peft_config": {"lora_dropout": 0.}, "loss_params": {"gamma": 1.},
                      "methods": {"vcb": {"loss_params": {"gamma": 1.}, "scale_rewards": True},
                                  "vcb_lse": {"sweep": {"gamma": [1., 2.]}}}},
        "evaluate": {"temperature": 1.}, "report": {"samples": 2}}


def keys_of(tree, *path):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict): yield from keys_of(value, *path, key)


def test_the_recipe_itself_is_right(tmp_path):
    assert len(plan(load_recipe(str(save_recipe(DEEP, tmp_path/"r.yaml"))))) == 13


@pytest.mark.parametrize("path", keys_of(DEEP), ids=".".join)
def test_misspelt_key_at_any_depth(path, tmp_path):
    "Every key of a recipe, misspelt, is named with its right spelling before any work begins."
    recipe = copy.deepcopy(DEEP)
    *above, last = path
    inner = recipe
    for key in above: inner = inner[key]
    inner[last + last[-1]] = inner.pop(last)
    with pytest.raises(InputError) as error:
        plan(load_recipe(str(save_recipe(recipe, tmp_path/"r.yaml"))))
    assert_says(str(error.value), (last + last[-1], f"Did you mean '{last}'?"))


# ---- whatever is in a file

SOME = settings(max_examples=80, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALAR = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
          | st.sampled_from([10**400, -7, 1e308, "1e-3", "a", "\ud800", "module:function", "..."]))
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=4), inner, max_size=3), max_leaves=6)
COLUMN = st.sampled_from(["prompt", "chosen", "rejected", "completions", "responses", "rewards",
                           "completion_ids", "prompt_ids", "text", "margin", "post", "summary",
                           "finish_reasons", "ref_logps", "label", "", "x"])
PLAUSIBLE = (st.text(max_size=4) | st.lists(st.text(max_size=3), max_size=3)
             | st.lists(st.floats() | st.integers(-3, 9), max_size=3)
             | st.lists(st.lists(st.integers(-1, 5), max_size=2), max_size=3))
ROW = st.dictionaries(COLUMN, PLAUSIBLE | VALUE, max_size=6).map(json.dumps)
JSONL = (st.binary(max_size=80) | st.lists(ROW, max_size=4).map("\n".join)
         | st.lists(ROW | VALUE.map(json.dumps) | st.text(max_size=20), max_size=4).map("\n".join)
         | st.lists(ROW, max_size=3).map(lambda rows: f"[{','.join(rows)}]"))
LOADERS = (load_rows, load_pairs, load_demonstrations, load_prompts, load_texts, load_candidates)


@SOME
@given(JSONL, st.sampled_from(LOADERS), st.sampled_from(["x.jsonl", "x.json", "x.txt",
                                                         "x.jsonl.gz", "raw.jsonl.gz"]))
def test_any_file_is_read_or_refused(tmp_path, content, load, name):
    "Rows, or one line that names the file; never another exception."
    content = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    if name.startswith("raw"): (tmp_path/name).write_bytes(content)
    else: File(name, content).write(tmp_path)
    try: assert len(load(str(tmp_path/name)))
    except InputError as e: assert_says(str(e), (name,))


FIELDS = {stage.name: sorted(stage.config_class.__dataclass_fields__) for stage in STAGES}
SECTION = st.sampled_from(sorted(FIELDS)).flatmap(lambda section: st.tuples(
    st.just(section), st.dictionaries(st.sampled_from(FIELDS[section]), VALUE, max_size=2) | VALUE))
METHODS = st.fixed_dictionaries({"methods": st.dictionaries(
    st.sampled_from(["vcb", "dpo"]) | st.text(max_size=3), VALUE | st.fixed_dictionaries(
        {}, optional={"sweep": VALUE, "loss_params": VALUE}), max_size=2)})
RECIPE = (st.lists(SECTION, max_size=2).map(dict) | METHODS.map(lambda m: {"calibrate": m})
          | st.dictionaries(SCALAR.filter(lambda v: v == v), VALUE, max_size=2))


@SOME
@given(RECIPE)
def test_any_recipe_is_planned_or_refused(tmp_path, recipe):
    "Whatever a recipe holds: jobs, or one line; never another exception."
    (tmp_path/"x.yaml").write_bytes(json.dumps(recipe, skipkeys=True).encode())
    try: assert plan(load_recipe(str(tmp_path/"x.yaml")))
    except InputError as e: assert_says(str(e), ())


@SOME
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda t: t.encode(errors="replace")))
def test_any_text_is_a_recipe_or_refused(tmp_path, content):
    (tmp_path/"x.yaml").write_bytes(content)
    try: assert plan(load_recipe(str(tmp_path/"x.yaml")))
    except InputError as e: assert_says(str(e), ())


@SOME
@given(st.sampled_from(sorted(shipped_recipes())), st.sampled_from(
    [f"{s}.{f}" for s in FIELDS for f in FIELDS[s]]), st.text(max_size=12))
def test_any_override_is_planned_or_refused(name, key, value):
    try: assert plan(load_recipe(name, {key: value}))
    except InputError as e:
        for line in getattr(e, "problems", [str(e)]): assert_says(line, ())


def floats(stage):
    return [f.name for f in fields(stage.config_class) if f.init and "float" in str(f.type)]


NEEDED = {"data": {"pairs": ["-"]}, "pretrain": {"model": "-"}, "sft": {"model": "-"},
          "judge": {"base_url": "http://127.0.0.1:1/v1", "evaluation": "-"}}


@pytest.mark.parametrize("stage", filter(floats, STAGES), ids=lambda stage: stage.name)
def test_no_setting_is_infinite(stage, tmp_path):
    "`.inf` and `.nan` are floats to YAML, and int(inf) raises OverflowError."
    made = stage.config_class
    given = {f.name: "-" for f in fields(made) if f.metadata.get("required")}
    given |= {**NEEDED.get(stage.name, {}), "output_dir": str(tmp_path)}
    made(**given)
    for name in floats(stage):
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(InputError, match=f"^{name} is -?(inf|nan)"):
                made(**{**given, name: value})
