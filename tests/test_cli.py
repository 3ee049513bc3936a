"The command line: every command helps, every bad input gives one sentence and exit status 2."
import subprocess, sys
from pathlib import Path

import pytest

from vcb_nb import __version__
from vcb_nb.cli import COMMANDS, main, parse_options

ROOT = Path(__file__).parent.parent


def said(capsys, *words):
    status = main(list(map(str, words)))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_version(capsys): assert said(capsys, "--version") == (0, f"vcb {__version__}\n", "")


def test_version_is_quick():
    "No heavy import before it is needed."
    code = ("import sys; from vcb_nb.cli import main; main(['--version']); main([]); "
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(capsys, command):
    status, out, _ = said(capsys, command, "--help")
    assert status == 0 and f"vcb {command}" in out
    if command in ("run",): return
    import dataclasses
    from vcb_nb.recipes import config_class
    for field in dataclasses.fields(config_class(command)):
        assert not field.init or field.name in out


@pytest.mark.parametrize("stage", [
    "sft", "reward", "sample", "score", "calibrate", "evaluate", "diagnose", "report"])
def test_own_fields_have_help(stage):
    import dataclasses
    from transformers import TrainingArguments
    from vcb_nb.recipes import config_class
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(config_class(stage)):
        has_help = field.name in theirs or field.metadata.get("help")
        assert has_help, f"{stage}.{field.name} has no help"


@pytest.mark.parametrize("words, want", [
    (["smaple"], "There is no command 'smaple'. Did you mean 'sample'?"),
    (["run"], "takes one recipe"),
    (["run", "dmo"], "Did you mean 'demo'?"),
    (["run", "demo", "--smaple.n", "3"], "'smaple' is not a section. Did you mean 'sample'?"),
    (["run", "demo", "--sample.n", "many"], "sample.n is 'many', but a whole number is needed."),
    (["sample", "--temprature", "1"],
     "sample.temprature is not a setting. Did you mean 'temperature'?"),
    (["sample", "--n", "4"], "needs --output_dir"),
    (["report", "--run", "nowhere", "--output_dir", "{tmp}/r"], "There is no run folder nowhere"),
])
def test_bad_input(capsys, tmp_path, words, want):
    status, _, err = said(capsys, *(w.replace("{tmp}", str(tmp_path)) for w in words))
    assert status == 2 and want in err and err.startswith("vcb: ") and err.count("\n") == 1


PAIR = '{"prompt": "a", "chosen": " b", "rejected": " c"}\n'
FILES = {"missing column": ('{"prompt": "a", "choosen": " b", "rejected": " c"}\n', "chosen"),
         "empty file": ("", "empty"),
         "broken line": (PAIR + '{"prompt": \n', "jsonl:2:"),
         "missing file": (None, "pairs.jsonl")}


@pytest.mark.parametrize("content, want", FILES.values(), ids=FILES.keys())
def test_bad_pairs_file(capsys, tmp_path, content, want):
    path = tmp_path/"pairs.jsonl"
    if content is not None: path.write_text(content)
    recipe = tmp_path/"r.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run\ndata: {{pairs: ['{path}']}}\n")
    status, _, err = said(capsys, "run", recipe)
    assert status == 2 and want in err and "pairs.jsonl" in err and err.count("\n") == 1


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"good"'])
def test_bad_reward_in_candidates(capsys, tmp_path, value):
    path = tmp_path/"scored.jsonl"
    row = '{"prompt": "a", "completions": [" b", " c", " d"], "rewards": [1, 2, %s]}\n'
    path.write_text(row % 3 + row % value)
    status, _, err = said(capsys, "calibrate", "--candidates", path, "--model", tmp_path,
                          "--output_dir", tmp_path/"out")
    assert status == 2 and "reward" in err and "scored.jsonl:2:" in err and err.count("\n") == 1


def test_options():
    assert parse_options("r.yaml --a.b 1 --flag --c=x=y --d-e f".split()) == \
        (["r.yaml"], {"a.b": "1", "flag": "true", "c": "x=y", "d_e": "f"})


def test_a_reader_that_stops_early_is_no_error():
    "`vcb sft --help | head -1` ends quietly."
    command = f"{sys.executable} -m vcb_nb.cli sft --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("vcb sft") and not done.stderr
