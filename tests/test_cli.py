"The command line: every command helps, every bad input gives one sentence and exit status 2."
import dataclasses, os, subprocess, sys
from pathlib import Path

import pytest

from tiny_models import make_tokenizer
from vcb_nb import __version__
from vcb_nb.artifacts import read_manifest
from vcb_nb.cli import join_options, main
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model
from vcb_nb.stages import STAGES

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


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_help_is_complete(capsys, stage):
    """Every stage has a command. Its help shows its own settings on two screens at most, each with
    its sentence; those of TrainingArguments wait behind --help-all."""
    status, own, _ = said(capsys, stage.name, "--help")
    assert status == 0 and own.startswith(f"usage: vcb {stage.name}") and own.count("\n") <= 100
    inherits = "--help_all" in own
    everything = said(capsys, stage.name, "--help-all")[1] if inherits else own
    for field in dataclasses.fields(stage.config_class):
        ours = "decides" in field.metadata
        assert not field.init or f"--{field.name} " in everything
        assert (f"--{field.name} " in own) == ours and (not ours or field.metadata["help"])


def test_help_of_run(capsys):
    status, out, _ = said(capsys, "run", "--help")
    assert status == 0 and all(f"--{name}" in out for name in ("upto", "redo", "plan"))


def test_flags_say_yes_or_no(capsys, tmp_path):
    """`--redo=false` is no, `--redo demo` does not swallow the recipe's name, and what is neither
    yes nor no is refused."""
    recipe = ["demo", "--output_dir", tmp_path, "--upto", "smaple"]
    for words in (["--redo=false", *recipe], ["--redo", *recipe], ["--plan", "no", *recipe]):
        status, _, err = said(capsys, "run", *words)
        assert status == 2 and "The recipe has no stage 'smaple'" in err
    status, _, err = said(capsys, "run", "demo", "--redo=perhaps")
    assert status == 2 and "'perhaps' is not yes or no" in err and err.count("\n") == 1
    status, out, _ = said(capsys, "run", "--plan", "demo", "--output_dir", tmp_path)
    assert status == 0 and out.splitlines()[0].split() == ["data", "new"]


def test_redo_is_what_its_value_says(capsys, tmp_path):
    words = ["tokenizer", "--data", tmp_path/"a.txt", "--output_dir", tmp_path/"t"]
    (tmp_path/"a.txt").write_text("a few words " * 50)
    assert said(capsys, *words, "--vocab_size", 260)[0] == 0
    status, _, err = said(capsys, *words, "--vocab_size", 261, "--redo=false")
    assert status == 2 and "vocab_size: 260 → 261" in err
    assert said(capsys, *words, "--vocab_size", 261, "--redo=true")[0] == 0


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


@pytest.mark.parametrize("words, want", [
    (["--gamma", ".5"], "calibrate.gamma is not a setting of its own. It stands in loss_params"),
    (["--lora_alpha", "8"], "--peft_config.lora_alpha on the command line"),
    (["--loss", "simpo"], "The losses are vcb, "),
    (["--model", "a", "--model=b"], "--model is given twice. Give it once"),
    (["--loss_params.gama", "1"], "Did you mean 'gamma'?")])
def test_the_place_of_a_setting_is_named(capsys, tmp_path, words, want):
    status, _, err = said(capsys, "calibrate", *words, "--output_dir", tmp_path/"o")
    assert status == 2 and want in err and err.count("\n") == 1


def test_the_dotted_form_is_taken_everywhere(capsys, tmp_path):
    "Inside a mapping, and with the stage's name before the setting; a folder's name is literal."
    (tmp_path/"a.txt").write_text("a few words " * 50)
    out = tmp_path/"run #2"
    assert said(capsys, "tokenizer", "--tokenizer.data", tmp_path/"a.txt", "--vocab_size", "260",
                "--output_dir", out)[0] == 0 and (out/"manifest.json").exists()
    status, _, err = said(capsys, "calibrate", "--loss_params.gamma", "0", "--output_dir", out)
    assert status == 2 and "gamma" in err and "positive" in err
    status, _, err = said(capsys, "sft", "--model_config.hiden_size", "8", "--data", "d",
                          "--tokenizer", "t", "--output_dir", out)
    assert status == 2 and "Did you mean 'hidden_size'?" in err


def test_torchrun_starts_the_command(tmp_path):
    "Two processes share the parts of a stage; after `--`, `--n` is no option of torchrun's."
    tokenizer = make_tokenizer("<|padding|>", pad_token="<|padding|>")
    model = new_policy(tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    policy = save_model(model, tokenizer, tmp_path/"policy")
    (tmp_path/"p.jsonl").write_text('{"prompt": "The soup"}\n{"prompt": "A room"}\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--", "-m",
               "vcb_nb", "sample", "--n", "2", "--policy", policy, "--prompts", tmp_path/"p.jsonl",
               "--max_new_tokens", "2", "--shard_size", "1", "--output_dir", tmp_path/"s"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path/"s")["summary"]["samples"] == 4
    assert len(list((tmp_path/"s"/"data").glob("part-*-of-00002.jsonl"))) == 2


THREADS = """
import sys
from pathlib import Path
from vcb_nb.cli import main
status = main(sys.argv[1:])
names = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
print(f"status {status}, gloo: {any('gloo' in name for name in names)}")
"""

@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are read from /proc")
@pytest.mark.parametrize("end", [
    "", "import torch; torch.distributed.destroy_process_group = list"], ids=["left", "kept"])
def test_no_thread_of_the_group_outlives_the_command(tmp_path, end):
    """A thread of torch's group that lets go of a tensor while Python ends aborts the process.
    That the threads would be seen is shown by a command that cannot leave its group."""
    tokenizer = make_tokenizer("<|padding|>", pad_token="<|padding|>")
    model = new_policy(tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    save_model(model, tokenizer, tmp_path/"model")
    rows = [f'{{"prompt": "Soup {i}", "completion": " was hot"}}\n' for i in range(8)]
    (tmp_path/"d.jsonl").write_text("".join(rows))
    (tmp_path/"worker.py").write_text(end + THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "--", tmp_path/"worker.py", "sft", "--model", tmp_path/"model", "--data",
               tmp_path/"d.jsonl", "--max_steps", "2", "--use_cpu", "--output_dir", tmp_path/"sft"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.stdout.count(f"status 0, gloo: {bool(end)}") == 2, done.stderr


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
    lines = err.splitlines() # the second names the model, which is none
    assert status == 2 and "scored.jsonl:2: reward" in lines[0] and len(lines) == 2
    assert all(line.startswith("vcb: ") for line in lines)


def test_options():
    assert join_options("r.yaml --a.b 1 --flag x --c=x=y --d-e -1 --f".split(), {"flag"}) == \
        ["r.yaml", "--a.b=1", "--flag=true", "x", "--c=x=y", "--d_e=-1", "--f=true"]


def test_a_value_with_spaces_stays_one_value(capsys):
    status, _, err = said(capsys, "run", "demo", "--sample.n", "a few", "--plan")
    assert status == 2 and "sample.n is 'a few', but a whole number is needed." in err


def test_a_reader_that_stops_early_is_no_error():
    "`vcb sft --help | head -1` ends quietly."
    command = f"{sys.executable} -m vcb_nb.cli sft --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: vcb sft") and not done.stderr
