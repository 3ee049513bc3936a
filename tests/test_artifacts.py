"Files that are whole or absent, fingerprints of content, manifests that notice, one run a folder."
import json, os, signal, subprocess, sys, time

import pytest

from vcb_nb.artifacts import (InputError, atomic_dir, atomic_write, changed_outputs, did_you_mean,
                              finished_stages, fingerprint, read_json, read_manifest, run_lock,
                              write_json, write_jsonl, write_manifest)

WRITER = """
import sys
from vcb_nb.artifacts import atomic_write
for i in range(10**6): atomic_write(sys.argv[1], str(i % 10) * 200_000)
"""


def test_killed_writer_leaves_a_whole_file(tmp_path):
    "SIGKILL while the same file is written over and over: what is there is one whole version."
    path = tmp_path/"f.txt"
    for delay in (.05, .12, .2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        while not path.exists(): time.sleep(.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    write_json(tmp_path/"a.json", {"x": 1})
    with pytest.raises(ValueError): write_json(tmp_path/"a.json", {"x": float("inf")})
    with pytest.raises(ZeroDivisionError):
        write_jsonl(tmp_path/"b.jsonl", ({"x": 1/i} for i in (1, 0)))
    assert read_json(tmp_path/"a.json") == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


def test_failed_folder_keeps_the_old_one(tmp_path):
    with atomic_dir(tmp_path/"m") as folder: (folder/"w").write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_dir(tmp_path/"m") as folder:
            (folder/"w").write_text("half")
            raise RuntimeError
    assert (tmp_path/"m"/"w").read_text() == "old" and os.listdir(tmp_path) == ["m"]


def test_fingerprint_is_of_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path/name).mkdir()
        atomic_write(tmp_path/name/"x", "same")
    assert fingerprint(tmp_path/"a") == fingerprint(tmp_path/"b")
    (tmp_path/"b"/"x").rename(tmp_path/"b"/"y")
    assert fingerprint(tmp_path/"a") != fingerprint(tmp_path/"b")
    with pytest.raises(InputError, match="does not exist"): fingerprint(tmp_path/"none")


def test_manifest_notices(tmp_path):
    stage = tmp_path/"sft"
    for name in ("kept", "gone", "changed"): atomic_write(stage/name, name)
    write_manifest(stage, stage="sft", key="k")
    assert changed_outputs(stage, read_manifest(stage)) == []
    assert finished_stages(tmp_path) == ["sft"]
    (stage/"gone").unlink()
    (stage/"changed").write_text("CHANGED")
    assert changed_outputs(stage, read_manifest(stage)) == ["changed", "gone"]


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path/"m.json").write_text('{"a": 1,\n"b": }')
    with pytest.raises(InputError, match=r"m\.json, line 2: not JSON"): read_json(tmp_path/"m.json")


def test_lock_is_freed_by_a_kill(tmp_path):
    code = ("import sys, time; from vcb_nb.artifacts import run_lock\n"
            "with run_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {process.pid}"):
        with run_lock(tmp_path): pass
    process.kill()
    process.wait()
    with run_lock(tmp_path): pass


@pytest.mark.parametrize("name, valid, want", [
    ("gama", ["gamma", "lam"], "Did you mean 'gamma'?"),
    ("q", ["gamma"], "Valid: gamma."),
    ("q", [], "None is valid here.")])
def test_did_you_mean(name, valid, want): assert did_you_mean(name, valid) == want
