"""The recipes for 2.8B by their hub names, end to end: repositories in the layout of the real ones
(files, splits, columns, commits), with real rows and the real tokenizer, and a toy model of the
same architecture, served by a hub on this machine (hub.py) to the real clients."""
import gzip, json, subprocess, sys, time
from importlib.util import find_spec

import pytest, torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE as PIECE

import hub
from vcb_nb.artifacts import read_json
from vcb_nb.recipes import load_recipe, shipped_recipes

pytestmark = pytest.mark.slow
RECIPES = [name for name in shipped_recipes() if "2.8b" in name]
COMMITS = {"EleutherAI/pythia-2.8b": "2a259cdd96a4beb1cdf467512e3904197345f6a9",
           "Anthropic/hh-rlhf": "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
           "trl-lib/tldr": "21233da376667088e6eb1ce4ce19ed832c2935d3",
           "abisee/cnn_dailymail": "96df5e686bee6baa90b8bee7c28b81fa3fa6223d"}
CONFIG = "- config_name: {}\n  data_files:\n"
SPLIT = "  - split: {}\n    path: {}{}-*\n"


# --- repositories as they are on the Hub ------------------------------------------------------

def rows_of(data, name, n):
    "The first rows of a real data set."
    with gzip.open(data/name/"dev.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(n))]


def write_gzip(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def parquet_set(folder, configs):
    "A set in Parquet: its card names the configs, their splits and the pattern of the shards."
    card = "---\nconfigs:\n"
    for config, (place, splits) in configs.items():
        card += CONFIG.format(config) + "".join(SPLIT.format(s, place, s) for s in splits)
        for split, (rows, shards) in splits.items():
            for k in range(shards):
                file = folder/f"{place}{split}-{k:05}-of-{shards:05}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                Dataset.from_list(rows[k::shards]).to_parquet(file)
    (folder/"README.md").write_text(card + "---\n")


def hh_rlhf(folder, data):
    "Whole dialogues, gzipped, in a folder for each set; the card names no configs."
    for name in ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"):
        rows = rows_of(data, f"hh_{name.replace('-', '_')}_test", 24)
        whole = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
        write_gzip(folder/name/"train.jsonl.gz", whole[:20])
        write_gzip(folder/name/"test.jsonl.gz", whole[20:])
    write_gzip(folder/"red-team-attempts"/"red_team_attempts.jsonl.gz", [{"transcript": "…"}])
    (folder/"README.md").write_text("---\nlicense: mit\ntags:\n- human-feedback\n---\n")


def summaries(datasets, data):
    "TL;DR's posts and comparisons in TRL's form, and CNN/DailyMail with its three versions."
    posts = [{"prompt": row["post"], "completion": " " + row["summary"].strip()}
             for row in rows_of(data, "tldr_sft", 60)]
    parts = dict(train=(posts[:50], 1), validation=(posts[50:55], 1), test=(posts[55:], 1))
    parquet_set(datasets/"trl-lib"/"tldr", {"default": ("data/", parts)})
    pairs = [{k: row[k] for k in ("prompt", "chosen", "rejected")}
             for row in rows_of(data, "tldr_pref_gpt4judge", 60)]
    parts = dict(train=(pairs[:50], 1), validation=(pairs[50:], 1))
    parquet_set(datasets/"trl-lib"/"tldr-preference", {"default": ("data/", parts)})
    news = [{k: row[k] for k in ("article", "highlights", "id")}
            for row in rows_of(data, "cnndm", 12)]
    parts = dict(train=(news[:6], 3), validation=(news[6:9], 1), test=(news[9:], 1))
    parquet_set(datasets/"abisee"/"cnn_dailymail", {v: (f"{v}/", parts)
                                                    for v in ("1.0.0", "2.0.0", "3.0.0")})


def pythia(folder, data, hidden):
    "A toy of the architecture in fp16, with Pythia's tokenizer and vocabulary, and a pickle."
    sizes = dict(hidden_size=hidden, intermediate_size=64, num_hidden_layers=1,
                 num_attention_heads=2)
    config = AutoConfig.for_model("gpt_neox", vocab_size=50304, bos_token_id=0, eos_token_id=0,
                                  rotary_pct=.25, use_parallel_residual=True, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    file = data/"tokenizers"/"pythia_neox20b"/"tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(file), **special).save_pretrained(folder)
    (folder/"pytorch_model.bin").write_bytes(b"a pickle")


@pytest.fixture(scope="module")
def server(tmp_path_factory, shared_data):
    root = tmp_path_factory.mktemp("hub")
    hh_rlhf(root/"datasets"/"Anthropic"/"hh-rlhf", shared_data)
    summaries(root/"datasets", shared_data)
    pythia(root/"models"/"EleutherAI"/"pythia-2.8b", shared_data, 16)
    pythia(root/"models"/"EleutherAI"/"pythia-160m", shared_data, 128) # more than a piece of 10 MB
    with hub.hub(root, COMMITS) as server: yield server


# --- running a recipe -------------------------------------------------------------------------

SMALL = {"data.test_share": .2, "data.validation_share": .2, "data.max_prompts": 6,
         "data.max_eval_prompts": 2, "evaluate.n_boot": 20, "evaluate.n": 1, "sample.n": 3,
         **{f"{stage}.max_new_tokens": 3 for stage in ("sample", "evaluate")},
         **{f"{stage}.max_prompt_length": 24 for stage in ("sft", "reward", "sample", "evaluate")},
         **{f"{stage}.max_length": 32 for stage in ("sft", "reward")},
         **{f"{stage}.max_steps": 2 for stage in ("sft", "reward", "calibrate")},
         **{f"{stage}.gradient_accumulation_steps": 2 for stage in ("sft", "reward", "calibrate")}}


@pytest.fixture
def vcb(server, tmp_path):
    "A function that starts `vcb` with this hub and a cache of its own."
    env = hub.online(server, tmp_path/"cache")
    server.asked.clear(), server.ranges.clear()
    def start(*words, **settings):
        options = [f"--{name}={value}" for name, value in settings.items()]
        module = [] if words[0] == "-c" else ["-m", "vcb_nb"]
        return subprocess.Popen([sys.executable, *module, *words, *options], env=env,
                                cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
    return start


def finish(process):
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said


@pytest.mark.parametrize("name", ["hh_2.8b", "tldr_2.8b"])
def test_a_recipe_runs_from_its_names_to_the_report(vcb, server, tmp_path, name):
    finish(vcb("run", name, **SMALL))
    run = tmp_path/"runs"/name
    assert (run/"report"/"index.html").exists()
    found = read_json(run/"evaluate"/"summary.json")
    assert set(found["policies"]) == {"sft", "vcb", "vcb_lse", "dpo", "ipo", "slic", "rrhf"}
    assert "ood" in found["comparisons"] if name == "tldr_2.8b" else True
    read = {file.rpartition("/")[2] for file in server.asked}
    assert "model.safetensors" in read and "pytorch_model.bin" not in read
    # Each set is asked for by what the recipe names: no other split, folder or version.
    assert not {file for file in server.asked if "red_team" in file or file[:3] in ("1.0", "2.0")}


PLAN = """
import sys
from vcb_nb.cli import main
for name in sys.argv[1:]:
    print("==", name)
    main(["run", name, "--plan", "--budget", "--device=h100", "--price=2"])
"""

def test_every_variant_plans_and_has_a_budget(vcb):
    "Two of them need bitsandbytes, which is not everywhere."
    names = [name for name in RECIPES if "t4" not in name or find_spec("bitsandbytes")]
    parts = finish(vcb("-c", PLAN, *names)).split("== ")[1:]
    assert [part.split()[0] for part in parts] == names
    for part in parts:
        jobs, _, budget = part.partition("\n\n")
        assert "cannot start" not in jobs and "evaluate" in jobs
        rows = [line.split()[0] for line in budget.splitlines()[1:] if line]
        assert {"sft", "reward", "sample", "score", "calibrate/vcb", "evaluate", "all"} <= set(rows)
        assert "does not fit" not in budget # one GPU of 80 GB is enough for each


def test_a_smaller_size_is_one_option(vcb, server):
    said = finish(vcb("run", "hh_2.8b", "--plan", model="EleutherAI/pythia-160m"))
    assert "cannot start" not in said and "config.json" in server.asked


def half_received(cache, process):
    "Wait until a process has a piece of the weights, and no more is sent."
    def there(): return any(p.stat().st_size >= PIECE for p in cache.rglob("*.incomplete"))
    while not there() and process.poll() is None: time.sleep(.1)
    assert there()


def test_a_broken_download_goes_on_where_it_broke(vcb, server, tmp_path):
    "The connection is lost amid the weights: the rest is asked for, by the byte where it begins."
    server.stall = "model.safetensors"
    running = vcb("sample", policy="EleutherAI/pythia-160m", output_dir="s", n=2, max_new_tokens=1,
                  prompts="Anthropic/hh-rlhf/helpful-base#train[:2]")
    half_received(tmp_path/"cache", running)
    server.stall = None
    finish(running)
    assert ("model.safetensors", PIECE) in server.ranges


def test_a_killed_run_downloads_only_what_is_missing(vcb, server, tmp_path):
    "Killed amid the weights: the next call takes up the run, and no whole file is read again."
    again = {"model": "EleutherAI/pythia-160m", "upto": "sft", **SMALL}
    server.stall = "model.safetensors"
    first = vcb("run", "hh_2.8b", **again)
    half_received(tmp_path/"cache", first)
    first.kill()
    first.communicate()
    server.stall = None
    assert "helpful-base/train.jsonl.gz" in server.asked
    server.asked.clear()
    finish(vcb("run", "hh_2.8b", **again))
    assert set(server.asked) == {"model.safetensors"}
    assert (tmp_path/"runs"/"hh_2.8b"/"sft"/"model"/"model.safetensors").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_commits(name):
    "Whoever runs it later gets the same files; the one set without a commit says so."
    recipe = load_recipe(name)
    sources = [recipe["model"], *(s for key in ("pairs", "demonstrations", "prompts", "ood_prompts")
                                  for s in recipe["data"].get(key) or ())]
    loose = {source for source in sources if not any(c in source for c in COMMITS.values())}
    assert loose <= {"trl-lib/tldr-preference#train"}
    assert recipe["name"] == name.replace("/", "_") and recipe["sample"]["n"] == 8
