"""Bad input gives one message that names the row or file, what is wrong and the remedy; nothing
that was there is changed, and the exit status is 2. The cases are in `bad_inputs.py`."""
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

import bad_inputs
from bad_inputs import (CASES, COMMAND_LINES, RECIPES, RIGHT, File, build_world)
from vcb_nb.artifacts import InputError, fingerprint
from vcb_nb.cli import COMMANDS, main
from vcb_nb.pipeline import STAGES, plan
from vcb_nb.recipes import config_class, load_object, load_recipe, save_recipe

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
        config = config_class(case.stage)(**settings, output_dir=str(tmp_path/"out"))
        load_object(STAGES[case.stage])(config)
    assert_says(str(error.value), case.says)


def command_line(case, settings, folder):
    "The command that a user would type: a stage alone, or a recipe of that stage."
    if case.stage not in COMMANDS:
        recipe = save_recipe({case.stage: settings}, folder/"r.yaml")
        return ["run", str(recipe), "--output_dir", str(folder/"out")]
    words = [w for k, v in settings.items() for w in (f"--{k}", json.dumps(v))]
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
