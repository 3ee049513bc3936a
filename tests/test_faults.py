"""Faults: kills, signals, a full disk, a forbidden folder, two runs at once, files harmed behind
the run's back.

Everything goes through the real command, see faults.py; `make test-faults` kills each stage twenty
times instead of once."""
import errno, json, os, shlex, shutil, signal

import pytest

from faults import (RECIPE, Machine, artefacts, differences, leftovers, run_args, show, tally,
                    undisturbed)
from vcb_nb.artifacts import disk_refusal, read_json, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine():
    with Machine() as machine: yield machine


@pytest.fixture(scope="module")
def whole(machine, tmp_path_factory):
    "An undisturbed run, and the seconds that each of its jobs took."
    folder = tmp_path_factory.mktemp("whole")/"run"
    return folder, undisturbed(machine, folder)


@pytest.fixture
def run(whole, tmp_path):
    "A copy of the undisturbed run, to be harmed."
    shutil.copytree(whole[0], tmp_path/"run")
    return tmp_path/"run"


def cut_off(run, *jobs):
    "Make of finished jobs ones that were stopped before their end."
    for job in jobs:
        manifest = read_json(run/job/"manifest.json")
        write_json(run/job/"pending.json", {k: manifest[k] for k in ("key", "settings", "inputs")})
        (run/job/"manifest.json").unlink()


def sentence(said):
    "The one line of output that is neither progress nor log."
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("vcb: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def test_every_stage_survives_a_kill(machine, whole, tmp_path):
    """SIGKILL at a random moment of each job: the run goes on, ends with the same bytes, draws no
    sample twice and loses none, and at no time shows half a file."""
    found = tally(machine, tmp_path, *whole, kills=1)
    print(show(found))
    for counts in found.values():
        assert counts["killed"] == counts["resumed"] == counts["identical"]
    assert sum(c["killed"] for c in found.values()) >= len(found) / 2


def test_a_kill_after_the_manifest_leaves_nothing(machine, run):
    "A job writes its manifest, then removes its pending one; a kill may come between the two."
    shutil.copy(run/"sft"/"manifest.json", run/"sft"/"pending.json")
    status, said = machine.vcb(*run_args(run))
    assert status == 0 and not leftovers(run), said


def test_each_prompt_is_sampled_once(whole):
    "The oracle for the comparison above: the reference itself has lost nothing."
    rows = [json.loads(line) for part in sorted((whole[0]/"sample"/"data").glob("part-*"))
            for line in part.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(24))
    assert all(len(row["completion_ids"]) == 4 for row in rows) and not leftovers(whole[0])


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_the_command_that_goes_on(machine, whole, tmp_path, signum,
                                                           status):
    run = tmp_path/"a run" # a space: the command must be quoted
    call = machine.start(*run_args(run, "--upto", "sft"))
    assert call.wait_for_file(run, "sft/checkpoints/checkpoint-10")
    assert call.kill(signum) == status
    said = sentence(call.said())
    assert said.startswith(f"vcb: stopped by {signal.Signals(signum).name} in sft. To resume")
    program, *words = shlex.split(said.partition("To resume: ")[2])
    assert program == "vcb" and machine.vcb(*words)[0] == 0
    assert not differences(run, whole[0], artefacts(whole[0], "sft")) and not leftovers(run)


def sample_alone(whole, folder):
    return ("sample", "--policy", whole/"sft"/"model", "--n", 4, "--shard_size", 3,
            "--prompts", whole/"data"/"files"/"prompts.jsonl", "--max_new_tokens", 32,
            "--output_dir", folder)


def test_a_signal_ends_a_stage_alone(machine, whole, tmp_path):
    call = machine.start(*sample_alone(whole[0], tmp_path/"s"))
    assert call.wait_for_file(tmp_path/"s", "data/part-*")
    assert call.kill(signal.SIGTERM) == 143
    said = sentence(call.said())
    assert "SIGTERM in s. To resume" in said and said.endswith(f"--output_dir {tmp_path}/s")
    assert machine.vcb(*sample_alone(whole[0], tmp_path/"s"))[0] == 0
    assert machine.vcb(*sample_alone(whole[0], tmp_path/"other"))[0] == 0
    names = artefacts(tmp_path/"other") - {"manifest.json"} # it names the stage by its folder
    assert len(names) == 9 and not differences(tmp_path/"s", tmp_path/"other", names)


# ---- the disk refuses

@pytest.mark.parametrize("job, file, share", [
    ("data", "files/demonstrations.jsonl", .5), ("sft", "model/model.safetensors", .5),
    ("sft", "model/model.safetensors", 1.5), ("sample", "data/part-00000-of-00004.jsonl", .5),
    ("evaluate", "summary.json", .9)],
    ids=["data", "weights", "optimizer", "sample", "summary"])
def test_a_full_disk(machine, whole, run, job, file, share):
    """A file may grow to a limit only, as on a disk that fills up: one sentence, nothing half is
    left, and with room again the same command completes."""
    later = list(whole[1])[list(whole[1]).index(job):]
    for name in later: shutil.rmtree(run/name)
    limit = int(share * (whole[0]/job/file).stat().st_size)
    status, said = machine.vcb(*run_args(run, "--upto", job), file_limit=limit)
    assert status == 1 and "Free some space. To resume: vcb" in sentence(said), said
    assert not differences(run, whole[0], artefacts(run, job))
    status, said = machine.vcb(*run_args(run, "--upto", job))
    assert status == 0, said
    assert not differences(run, whole[0], artefacts(whole[0], job)) and not leftovers(run/job)


@pytest.mark.parametrize("error, want", [
    (OSError(errno.ENOSPC, "No space left on device", "a/b"),
     "a/b: No space left on device. Free some space"),
    (Exception("I/O error: No space left on device (os error 28)"), # safetensors, tokenizers
     "I/O error: No space left on device (os error 28). Free some space"),
    (ZeroDivisionError("division by zero"), None),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), None)])
def test_only_a_disk_that_refuses_is_blamed_on_the_disk(error, want):
    "An error of our own must keep its traceback."
    assert disk_refusal(error) == want


def test_a_folder_that_cannot_be(machine, tmp_path):
    (tmp_path/"file").write_text("precious")
    for folder in (tmp_path/"file", tmp_path/"file"/"run"):
        status, said = machine.vcb(*run_args(folder))
        assert status == 1 and "Choose a folder that can be written to." in sentence(said)
        assert str(tmp_path/"file") in sentence(said)
    assert (tmp_path/"file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(machine, tmp_path):
    tmp_path.chmod(0o500)
    status, said = machine.vcb(*run_args(tmp_path/"run"))
    tmp_path.chmod(0o700)
    assert status == 1 and "Permission denied. Choose a folder" in sentence(said)


# ---- behind the run's back

@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_a_lost_line(machine, whole, run, finished):
    "A part that is still valid JSON lines, only shorter, is found out, and it alone is made again."
    part = run/"sample"/"data"/"part-00001-of-00004.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:-1]))
    kept = (run/"sample"/"data"/"part-00000-of-00004.jsonl").stat().st_mtime_ns
    if not finished: cut_off(run, "sample")
    status, said = machine.vcb(*run_args(run))
    found = f"{part.name} is missing" if finished else f"{part.name} was cut"
    assert status == 0 and found in said
    assert not differences(run, whole[0], artefacts(whole[0]))
    assert (run/"sample"/"data"/"part-00000-of-00004.jsonl").stat().st_mtime_ns == kept
    assert said.count(" done: ") == len(whole[1]) - 1


def test_a_reader_alone_refuses_a_part_that_lost_a_line(machine, run, tmp_path):
    part = run/"score"/"data"/"part-00001-of-00004.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:-1]))
    status, said = machine.vcb("calibrate", "--model", run/"sft"/"model", "--candidates",
                               run/"score", "--output_dir", tmp_path/"c")
    assert status == 2 and f"{part} was cut or changed" in sentence(said)


# ---- two at once

def test_two_at_once(machine, whole, tmp_path):
    "While one run works, another run, a stage of the recipe and a stage alone are refused."
    run = tmp_path/"run"
    call = machine.start(*run_args(run, "--upto", "sft"))
    assert call.wait_for("sft")
    os.killpg(call.pid, signal.SIGSTOP)
    alone = ("--data", run/"data"/"files"/"demonstrations.jsonl",
             "--tokenizer", run/"tokenizer"/"model")
    others = [run_args(run), ("sft", RECIPE, "--output_dir", run),
              ("sft", *alone, "--output_dir", run/"sft")]
    for other in others:
        status, said = machine.vcb(*other)
        assert status == 2 and f"is in use by process {call.pid}" in sentence(said)
    os.killpg(call.pid, signal.SIGCONT)
    assert call.wait() == 0, call.said()
    assert not differences(run, whole[0], artefacts(whole[0], "sft"))
