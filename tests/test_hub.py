"""Models and data by their names on the Hub, through the real clients and a server on this machine
that has the Hub's layout (hub.py)."""
import json, subprocess, sys

import pytest, torch

import hub
from tiny_models import make_tokenizer, tiny
from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.data import load_demonstrations, load_rows, other_splits, recognise, source_files
from vcb_nb.saving import save_model

pytestmark = pytest.mark.slow
CARD = """---
configs:
- {config_name: a, data_files: [{split: train, path: a.jsonl}]}
- {config_name: b, data_files: [{split: test, path: b.jsonl}]}
---
"""
LOAD = """
import json, sys
from vcb_nb.artifacts import InputError
from vcb_nb.data import load_prompts
for source in sys.argv[1:]:
    try: print(json.dumps(load_prompts(source)["prompt"][:]))
    except InputError as e: print(json.dumps(str(e)))
"""


def prompts(numbers): return [{"prompt": f"Question {i}?", "completion": " Yes."} for i in numbers]
def names(numbers): return [row["prompt"] for row in prompts(numbers)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A hub with a set of four shards, and a model with a pickle beside its weights."
    root = tmp_path_factory.mktemp("hub")
    for k in range(4):
        shard = root/"datasets"/"ann"/"questions"/"data"/f"train-{k:05}-of-00004.jsonl"
        write_jsonl(shard, prompts(range(10*k, 10*k + 10)))
    few = root/"datasets"/"ann"/"few"
    for name, numbers in {"a": (1,), "b": (2, 3)}.items():
        write_jsonl(few/f"{name}.jsonl", prompts(numbers))
    (few/"README.md").write_text(CARD)
    tokenizer = make_tokenizer("<|padding|>", pad_token="<|padding|>")
    torch.manual_seed(0)
    folder = root/"models"/"ann"/"tiny"
    save_model(tiny(tokenizer), tokenizer, folder)
    (folder/"pytorch_model.bin").write_bytes(b"a pickle")
    with hub.hub(root) as server: yield server


@pytest.fixture
def online(server, tmp_path):
    "A function that runs Python with this hub and no cache: what it printed, and the files read."
    env = hub.online(server, tmp_path/"cache")
    def call(*args):
        server.asked.clear()
        done = subprocess.run([sys.executable, *map(str, args)], env=env, text=True,
                              capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, {name.rpartition("/")[2] for name in server.asked}
    return call


def test_a_set_and_its_parts(online):
    "Whole, at a revision, a folder of it, and the rows that a slice names."
    wanted = {"ann/questions": range(40), "ann/questions@v1": range(40),
              "ann/questions/data@v1": range(40), "ann/questions#train[8:12]": range(8, 12),
              "ann/questions@v1#[:3]": range(3), "ann/few:a": (1,), "ann/few:b#test": (2, 3),
              "ann/few#b/test": (2, 3), "ann/few@main:b#test[1:]": (3,)}
    said, _ = online("-c", LOAD, *wanted)
    assert [json.loads(line) for line in said.splitlines()] == list(map(names, wanted.values()))


def test_a_part_is_streamed(online):
    "The shards of the rows and the next one are read, not the whole set."
    said, read = online("-c", LOAD, "ann/questions#train[:5]")
    assert json.loads(said) == names(range(5))
    assert read and not {f"train-{k:05}-of-00004.jsonl" for k in (2, 3)} & read


@pytest.mark.parametrize("source, words", [
    ("ann/questions@v9", "Revision 'v9' doesn't exist"), ("ann/question", "doesn't exist"),
    ("ann/questions#test[:3]", "Available splits: ['train']"),
    ("ann/questions#train[40:]", "no rows")])
def test_what_the_hub_lacks(online, source, words):
    said = json.loads(online("-c", LOAD, source)[0])
    assert isinstance(said, str) and source.partition("#")[0] in said and words in said


def test_a_stage_by_names_alone(online, tmp_path):
    "`vcb sample` with a model and a set on the Hub: as from their folders; no pickle is fetched."
    def sample(policy, source, out):
        return online("-m", "vcb_nb", "sample", "--policy", policy, "--prompts", source,
                      "--n", 2, "--max_new_tokens", 4, "--output_dir", out)[1]
    read = sample("ann/tiny@v1", "ann/questions#[2:5]", "named")
    assert "model.safetensors" in read and "pytorch_model.bin" not in read
    root = next(tmp_path.glob("cache/hub/models--ann--tiny/snapshots/*"))
    write_jsonl(tmp_path/"questions.jsonl", prompts(range(40)))
    assert not sample(root, "questions.jsonl#[2:5]", "local")
    rows = [load_rows(tmp_path/out).to_list() for out in ("named", "local")]
    assert rows[0] == rows[1] and [row["prompt"] for row in rows[0]] == names(range(2, 5))


# ---- parts of sources that are here

@pytest.fixture(params=["file", "folder", "parquet", "streamed", "saved"])
def source(request, tmp_path, monkeypatch):
    "Ten rows, in each way that a source here can be kept."
    rows = load_rows(write_jsonl(tmp_path/"rows.jsonl", prompts(range(10))))
    if request.param == "file": return tmp_path/"rows.jsonl"
    if request.param == "saved": rows.save_to_disk(tmp_path/"saved")
    if request.param == "folder":
        for name in ("train", "test"): rows.to_json(tmp_path/"folder"/f"{name}.jsonl")
        return f"{tmp_path}/folder#train"
    if request.param in ("parquet", "streamed"): rows.to_parquet(tmp_path/"rows.parquet")
    if request.param == "streamed": monkeypatch.setattr("vcb_nb.data.IN_MEMORY", 0)
    return tmp_path/{"saved": "saved"}.get(request.param, "rows.parquet")


@pytest.mark.parametrize("part, numbers", [("[2:5]", range(2, 5)), ("[:3]", range(3)),
                                           ("[8:]", range(8, 10)), ("[5:50]", range(5, 10)),
                                           ("[:]", range(10))])
def test_parts(source, part, numbers):
    named = f"{source}{part}" if "#" in str(source) else f"{source}#{part}"
    assert load_rows(named)["prompt"][:] == names(numbers)
    assert load_demonstrations(named)["completion"][:] == [" Yes."] * len(numbers)
    assert recognise(named).rows == len(numbers)
    assert source_files(named) == source_files(source)
    assert other_splits(named) == other_splits(source)


def test_a_part_is_read_no_further(tmp_path):
    "A broken line behind the part does no harm; within it, it is named."
    path = tmp_path/"rows.jsonl"
    write_jsonl(path, prompts(range(3)))
    with path.open("a") as file: file.write('{"prompt": "Que')
    assert load_rows(f"{path}#[:3]")["prompt"][:] == names(range(3))
    with pytest.raises(InputError, match=":4"): load_rows(f"{path}#[:4]")


@pytest.mark.parametrize("part", ["[5:2]", "[3:3]", "[:10%]", "[-3:]", "[3]", "[a:b]", "[", "[:3"])
def test_a_part_that_names_no_rows(tmp_path, part):
    write_jsonl(tmp_path/"rows.jsonl", prompts(range(3)))
    with pytest.raises(InputError, match="by their numbers"):
        load_rows(f"{tmp_path}/rows.jsonl#{part}")
