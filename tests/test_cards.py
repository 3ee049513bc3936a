"""Model cards say what the manifests say, load by the code that they show, and go to the Hub: a
server on this machine that has its layout (hub.py), with the Hub's own client."""
import json, re, subprocess, sys

import pytest, torch
import yaml
from transformers import AutoModelForCausalLM

import hub
from faults import Machine
from tiny_models import make_tokenizer, tiny
from vcb_nb.artifacts import InputError, read_json, read_manifest, write_jsonl
from vcb_nb.cards import RESULTS, model_card, origins, push_to_hub
from vcb_nb.cli import main
from vcb_nb.hub import find_commit
from vcb_nb.measures import estimate_text
from vcb_nb.saving import save_model

pytestmark = pytest.mark.slow
RECIPE = """
name: own
model: ann/tiny
sample: {prompts: "ann/questions#train", n: 3, max_new_tokens: 4}
score: {reward: "rewards.py:sevens"}
calibrate:
  methods: {vcb: {}, dpo: {}}
  peft_config: {r: 2}
  save_adapter: true
  max_steps: 2
  per_device_train_batch_size: 2
  learning_rate: 0.01
online:
  prompts: "ann/questions#train"
  methods: {grpo: {}}
  n: 3
  max_new_tokens: 4
  max_steps: 1
  per_device_train_batch_size: 2
evaluate: {prompts: test.jsonl, reward: "rewards.py:sevens", n: 2, max_new_tokens: 4, n_boot: 50}
report: {}
"""
REWARD = "def sevens(prompt, completion): return sum(map(ord, completion)) % 7 / 2"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_jsonl(root/"datasets"/"ann"/"questions"/"train.jsonl",
                [{"prompt": f"Question {i}?"} for i in range(8)])
    tokenizer = make_tokenizer("<|padding|>", pad_token="<|padding|>")
    torch.manual_seed(0)
    save_model(tiny(tokenizer), tokenizer, root/"models"/"ann"/"tiny")
    with hub.hub(root) as server: yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("work")


def online(server, folder):
    return {**hub.online(server, folder/"cache"), "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def vcb(server, folder):
    "A function that calls `vcb` in the folder, with this hub: its exit status and output."
    with Machine(online(server, folder)) as machine:
        def call(*words, token="write"):
            return machine.vcb(*words, cwd=str(folder), env={"HF_TOKEN": token})
        yield call


@pytest.fixture(scope="module")
def work(vcb, folder):
    "A folder in which the recipe has run from the names on the Hub."
    (folder/"own.yaml").write_text(RECIPE)
    (folder/"rewards.py").write_text(REWARD)
    write_jsonl(folder/"test.jsonl", [{"prompt": f"What is {i}?"} for i in range(4)])
    status, said = vcb("run", "own.yaml")
    assert not status, said
    return folder


def python(server, work, *words, **env):
    "A process of its own, for what is read when a library is imported."
    return subprocess.run([sys.executable, *map(str, words)], env={**online(server, work), **env},
                          cwd=work, text=True, capture_output=True)


def calibrated(work, kind="model", name="vcb"): return work/"runs"/"own"/"calibrate"/name/kind


def test_a_manifest_names_its_sources_and_their_commits(work):
    run = work/"runs"/"own"
    assert read_manifest(run/"sample")["sources"] == {"policy": "ann/tiny",
                                                      "prompts": "ann/questions#train"}
    assert set(read_manifest(run/"sample")["commits"].values()) == {hub.COMMIT}
    assert read_manifest(run/"calibrate"/"vcb")["sources"]["candidates"] == "../../score/data"
    found = {(s.name, s.on_hub, s.commit) for s in origins(run/"calibrate"/"vcb")}
    assert found == {("ann/tiny", True, hub.COMMIT), ("ann/questions#train", True, hub.COMMIT),
                     ("rewards.py:sevens", False, None)}


def test_a_run_that_was_moved_keeps_its_origins(work, tmp_path):
    (work/"runs"/"own").rename(tmp_path/"elsewhere")
    moved = origins(tmp_path/"elsewhere"/"calibrate"/"vcb")
    (tmp_path/"elsewhere").rename(work/"runs"/"own")
    assert {s.name for s in moved} == {"ann/tiny", "ann/questions#train", "rewards.py:sevens"}


def test_a_job_that_lies_elsewhere_keeps_its_origins(work, tmp_path):
    "A study's cells are links to folders that they share."
    cell, job = tmp_path/"cell", work/"runs"/"own"/"calibrate"/"vcb"
    cell.mkdir()
    for path in (work/"runs"/"own").iterdir():
        if path.name != "calibrate": (cell/path.name).symlink_to(path)
    (cell/"calibrate").mkdir()
    (cell/"calibrate"/"vcb").symlink_to(job)
    assert origins(cell/"calibrate"/"vcb") == origins(job)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_card_says_what_the_run_has_measured(work, kind):
    text = str(model_card(calibrated(work, kind)))
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "ann/tiny" and head["datasets"] == ["ann/questions"]
    assert head["base_model_relation"] == {"model": "finetune", "adapter": "adapter"}[kind]
    assert head["library_name"] == {"model": "transformers", "adapter": "peft"}[kind]
    found = read_json(work/"runs"/"own"/"evaluate"/"summary.json")["policies"]
    for measure, label in RESULTS.items():
        before, after = (estimate_text(found[name]["splits"]["test"].get(measure), ".2f")
                         for name in ("sft", "vcb"))
        assert measure == "gold" or f"| {label} | {before} | {after} |" in text
    assert "the function `rewards.py:sevens`" in text and f"`ann/tiny` at `{hub.COMMIT}`" in text
    train = read_manifest(calibrated(work).parent)["summary"]["data"]["train"]
    assert "{candidates} responses to {prompts} prompts".format(**train) in text
    assert "arXiv 2402.16030" in text


def test_a_card_tells_order_from_value(work):
    assert "from the values of the rewards" in str(model_card(calibrated(work)))
    assert "their values have no effect" in str(model_card(calibrated(work, name="dpo")))


def test_a_card_tells_stored_from_fresh_samples(work):
    text = str(model_card(work/"runs"/"own"/"online"/"grpo"/"model"))
    assert "trained on samples of its own with GRPO" in text and "| fresh samples | 6 |" in text
    assert "the function `rewards.py:sevens`" in text and "`ann/questions#train`" in text
    assert "fresh samples" not in str(model_card(calibrated(work)))


def test_the_report_leaves_a_card_for_every_model(work):
    cards = work/"runs"/"own"/"report"/"cards"
    assert {p.stem for p in cards.iterdir()} == {
        f"calibrate-{name}{kind}" for name in ("vcb", "dpo") for kind in ("", "-adapter")} | {
        "online-grpo"}
    assert not any(str(work) in p.read_text() for p in cards.iterdir())


def test_a_card_names_no_path_of_this_machine(work, tmp_path):
    "A run that began with a folder: its last name stays, and nobody's home."
    base, out = tmp_path/"home"/"ann"/"base", tmp_path/"out"
    base.parent.mkdir(parents=True)
    tokenizer = make_tokenizer("<|padding|>", pad_token="<|padding|>")
    save_model(tiny(tokenizer), tokenizer, base)
    write_jsonl(tmp_path/"home"/"rated.jsonl", [
        {"prompt": "Why?", "completions": [" a", " bb", " ccc"], "rewards": [1., 2., 4.]}] * 3)
    settings = dict(model=base, candidates=tmp_path/"home"/"rated.jsonl", output_dir=out,
                    reference="live",
                    max_steps=1, per_device_train_batch_size=1, peft_config="{r: 2}",
                    save_adapter="true")
    assert not main(["calibrate", *(f"--{k}={v}" for k, v in settings.items())])
    text = str(model_card(out/"model"))
    assert "home" not in text and "`base` (local)" in text and "`rated.jsonl` (local)" in text
    assert "base_model" not in text and "This model has not been evaluated." in text
    named = model_card(out/"model", base_model="ann/base", license="mit")
    assert named.data.base_model == "ann/base" and named.data.license == "mit"
    with pytest.raises(InputError, match="Push the base first and name it with base_model"):
        push_to_hub(out/"adapter", "me/x")


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_what_is_pushed_loads_by_its_card(work, server, vcb, kind):
    "One commit to a private repository; the code in its card gives the same logits."
    repo = f"me/{kind}"
    status, said = vcb("push", calibrated(work, kind), repo)
    assert not status and said.strip().endswith(hub.COMMIT), said
    assert server.private[repo] is True
    branch, title, files = server.committed[-1]
    assert branch == "main" and title == "VCB γ=1, by vcb-nb"
    sent = server.root/"models"/"me"/kind
    for path in calibrated(work, kind).iterdir():
        if path.name not in ("README.md", "adapter_config.json"):
            assert (sent/path.name).read_bytes() == path.read_bytes()
    assert set(files) == {p.name for p in calibrated(work, kind).iterdir()} | {"README.md"}
    code = re.search(r"```python\n(.*?)```", (sent/"README.md").read_text(), re.S)[1]
    (work/"load.py").write_text(code + "import torch\n"
                                "print(model(torch.arange(5)[None]).logits.flatten().tolist())")
    loaded = python(server, work, "load.py", HF_TOKEN="read")
    assert not loaded.returncode, loaded.stderr
    with torch.no_grad():
        local = AutoModelForCausalLM.from_pretrained(calibrated(work))(torch.arange(5)[None]).logits
    torch.testing.assert_close(torch.tensor(json.loads(loaded.stdout)), local.flatten(),
                               rtol=1e-4, atol=1e-5)


def test_a_repository_is_private_by_default(work, server):
    code = "import sys; from vcb_nb.cards import push_to_hub; push_to_hub(*sys.argv[1:])"
    done = python(server, work, "-c", code, calibrated(work), "me/default", HF_TOKEN="write")
    assert not done.returncode and server.private["me/default"] is True, done.stderr


def test_a_second_push_is_another_commit(work, server, vcb):
    assert not vcb("push", calibrated(work), "me/again", "--public")[0]
    assert server.private["me/again"] is False
    assert not vcb("push", calibrated(work), "me/again", "--revision", "half")[0]
    assert server.committed[-1][0] == "half"


@pytest.mark.parametrize("token, said", [("", "Log in with hf auth login"),
                                         ("read", "the token may not write there")])
def test_the_hub_refuses(work, server, vcb, token, said):
    status, answer = vcb("push", calibrated(work), "me/refused", token=token)
    assert status == 2 and said in answer and "Traceback" not in answer
    assert not (server.root/"models"/"me"/"refused").exists()


def test_no_network(work, server):
    done = python(server, work, "-m", "vcb_nb", "push", calibrated(work), "me/x",
                  HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="write")
    assert done.returncode == 2 and "the Hub could not be reached" in done.stderr


@pytest.mark.parametrize("words, said", [
    (["runs/own/score/data", "me/x"], "has no config.json"),
    (["runs/own/calibrate/vcb/model", "me/a b"], "'me/a b' cannot name a repository"),
    (["runs/own/calibrate/vcb/model"], "takes the folder of a model and a name"),
    (["runs/own/calibrate/vcb/model", "me/x", "--privat"], "--privat is no option")])
def test_a_push_that_cannot_be(work, monkeypatch, capsys, words, said):
    monkeypatch.chdir(work)
    assert main(["push", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_model_of_unknown_origin(server):
    with pytest.raises(InputError, match="nothing is known of how it was made"):
        model_card(server.root/"models"/"ann"/"tiny")


def test_a_pinned_name_is_not_looked_up(server):
    "This one does not exist, here or there."
    assert find_commit(f"ann/gone@{'2' * 40}#train", "dataset") == "2" * 40
    assert find_commit("ann/gone@main") is None


def test_a_plan_says_what_a_name_stands_for(work, server, vcb):
    said = vcb("run", "own.yaml", "--plan", "--output_dir", "new",
               f"--sample.prompts=ann/questions@{hub.COMMIT}#train")[1]
    lines = said.partition("On the Hub:\n")[2].splitlines()
    assert f"  ann/tiny: now {hub.COMMIT[:12]}; write ann/tiny@{hub.COMMIT} to pin it" in lines
    assert f"  ann/questions@{hub.COMMIT}#train: {hub.COMMIT[:12]}" in lines
    offline = python(server, work, "-m", "vcb_nb", "run", "own.yaml", "--plan", HF_HUB_OFFLINE="1",
                     HF_DATASETS_OFFLINE="1")
    assert f"ann/tiny: now {hub.COMMIT[:12]}" in offline.stdout # as the cache has it
