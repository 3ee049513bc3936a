"""Nothing that comes from outside is run: weights, model code, recipes, what models write. What is
promised in SECURITY.md."""
import ast, json, pickle
from html.parser import HTMLParser
from pathlib import Path

import pytest, torch, yaml

from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError, write_json, write_jsonl
from vcb_nb.cli import main
from vcb_nb.loading import trusting_remote_code
from vcb_nb.loading import load_policy, load_reward_model, new_reward_model
from vcb_nb.models import new_policy
from vcb_nb.pipeline import plan
from vcb_nb.recipes import load_recipe, shipped_recipes
from vcb_nb.report import (Figure, Heading, ReportConfig, pipeline_blocks, report, sample_blocks,
                           write_report)
from vcb_nb.saving import save_model
from vcb_nb.loading import load_tokenizer

ROOT = Path(__file__).parent.parent
FOLDERS = ("vcb_nb", "tools", "benchmarks")
SOURCES = sorted(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/*.py"))

# --- the sources ----------------------------------------------------------------------------

CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("torch", "load"), ("subprocess", "getoutput"),
              ("subprocess", "getstatusoutput")}
# A subclass of SafeLoader makes plain data only; what is dumped is not run.
SAFE_YAML = {"compose", "safe_load", "safe_dump", "YAMLError", "SafeLoader", "SafeDumper",
             "dump_all"}
SWITCHES = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False,
            "use_safetensors": False}


def is_unsafe(node):
    "Is this node of a syntax tree a way to run text or bytes as code?"
    if isinstance(node, ast.Import): return any(a.name.split(".")[0] in MODULES for a in node.names)
    if isinstance(node, ast.ImportFrom):
        found = {(node.module, a.name) for a in node.names}
        return (node.module or "").split(".")[0] in MODULES or bool(found & ATTRIBUTES) or any(
            module == "yaml" and name not in SAFE_YAML for module, name in found)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name): return node.func.id in CALLS
    if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
        return node.arg in SWITCHES and node.value.value is SWITCHES[node.arg]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        where = node.value.id, node.attr
        return where in ATTRIBUTES or (where[0] == "yaml" and where[1] not in SAFE_YAML)
    return False


def unsafe(text):
    "Lines that could run text or bytes as code."
    return [node.lineno for node in ast.walk(ast.parse(text)) if is_unsafe(node)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_runs_text_as_code(path):
    "No pickle, eval, shell or unsafe YAML; trust_remote_code is never switched on by us."
    assert not unsafe(path.read_text("utf-8"))


@pytest.mark.parametrize("code", [
    "eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "import pickle",
    "import os, pickle", "from pickle import loads", "yaml.load(x)", "yaml.unsafe_load(x)",
    "from yaml import load", "os.system(x)", "from os import system", "run(x, shell=True)",
    "torch.load(x)", "f(x, weights_only=False)", "np.load(x, allow_pickle=True)",
    "f(trust_remote_code=True)", "f(use_safetensors=False)"])
def test_the_scan_sees(code):
    "Each of these, put into a module, is found; an empty list above is not for want of looking."
    assert unsafe(f"def f(x):\n    return g(x)\n{code}\n") == [3]


# --- weights and model code -----------------------------------------------------------------

class Bomb:
    "Unpickled, it leaves a file behind."
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return Path.touch, (self.marker,)


@pytest.fixture
def policy(tiny_tokenizer, tmp_path):
    model = new_policy(tiny_tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return save_model(model, tiny_tokenizer, tmp_path/"policy")


def arm(folder, marker):
    "Put pickles that explode beside the weights."
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt"):
        (folder/name).write_bytes(pickle.dumps(Bomb(marker)))
        torch.save(Bomb(marker), folder/f"zip_{name}")


def test_the_bomb_explodes(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path/"marker")))
    assert (tmp_path/"marker").exists()


def test_no_pickle_is_opened(policy, tiny_tokenizer, tmp_path):
    "Beside safetensors pickles are ignored, alone they are refused: policy, adapter, reward model."
    marker = tmp_path/"marker"
    lora = add_lora(load_policy(policy), {"r": 2})
    adapter = save_model(lora, tiny_tokenizer, tmp_path/"adapter", merge=False)
    reward = save_model(new_reward_model(policy, tiny_tokenizer), tiny_tokenizer, tmp_path/"rm")
    folders = ((load_policy, adapter), (load_policy, policy), (load_reward_model, reward))
    for load, folder in folders:
        arm(folder, marker)
        load(folder)
        for weights in folder.glob("*.safetensors"): weights.unlink()
        with pytest.raises(InputError, match="pickle"): load(folder)
    assert not marker.exists()


@pytest.fixture
def custom(policy, tmp_path, monkeypatch):
    "A model folder that brings its own code, and the file that the code would leave behind."
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path/"hf"))
    marker = tmp_path/"marker"
    (policy/"configuration_own.py").write_text(
        "from pathlib import Path\nfrom transformers import GPTNeoXConfig\n"
        f"Path({str(marker)!r}).touch()\nclass OwnConfig(GPTNeoXConfig): model_type = 'own'\n")
    config = json.loads((policy/"config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (policy/"config.json").write_text(json.dumps(config))
    prompts = write_jsonl(tmp_path/"prompts.jsonl", [{"prompt": "The soup"}])
    words = f"sample --policy {policy} --prompts {prompts} --output_dir {tmp_path}/out"
    return words.split(), policy, marker


def test_model_code_needs_the_flag(custom, capsys):
    "`vcb` runs code that comes with a model after --trust_remote_code, and never before."
    words, folder, marker = custom
    assert main(words) == 2 and "trust" in capsys.readouterr().err
    with pytest.raises(InputError): load_policy(folder)
    assert not marker.exists()
    main([*words, "--trust_remote_code"])
    assert marker.exists()


def test_the_flag_ends_with_its_command(custom):
    "The next load in the same process is as careful as the first; a tokenizer needs no code here."
    words, folder, marker = custom
    with trusting_remote_code(): pass
    with pytest.raises(InputError): load_policy(folder)
    load_tokenizer(folder)
    assert not marker.exists()


def test_the_flag_swallows_nothing(capsys):
    "It is yes or no, and a recipe's name behind it stays the recipe's name."
    assert main(["run", "--trust_remote_code", "demo", "--upto", "smaple"]) == 2
    assert "no stage 'smaple'" in capsys.readouterr().err
    assert main(["run", "demo", "--trust_remote_code=perhaps"]) == 2
    assert "'perhaps' is not yes or no" in capsys.readouterr().err


# --- recipes --------------------------------------------------------------------------------

CODE = ["trust_remote_code: true", "sft: {trust_remote_code: true}",
        "calibrate: {trust_remote_code: true}", "sft: {model_config: {trust_remote_code: false}}",
        "calibrate: {methods: {vcb: {trust_remote_code: true}}}"]
OUT = {"name: ../x": "name '../x' cannot be", "name: a/b": "name 'a/b' cannot be",
       "output_dir: ../../x": "leads out of", "output_dir: runs/../../x": "leads out of",
       "sft: {output_dir: /x}": "sft has an output_dir",
       "calibrate: {output_dir: x}": "calibrate has an output_dir",
       "calibrate: {methods: {vcb: {output_dir: x}}}": "calibrate has an output_dir",
       "calibrate: {methods: {../vcb: {loss: vcb}}}": "method '../vcb' cannot be",
       "calibrate: {methods: {/x: {loss: vcb}}}": "method '/x' cannot be",
       "calibrate: {methods: {..: {loss: vcb}}}": "method '..' cannot be",
       "calibrate: {methods: {.x: {loss: vcb}}}": "method '.x' cannot be",
       "calibrate: {methods: {'a\\b': {loss: vcb}}}": "cannot be",
       "calibrate: {methods: {vcb: {sweep: {/../x: [1]}}}}": "cannot be",
       "calibrate: {loss: ../vcb}": "method '../vcb' cannot be"}


def refusal(tmp_path, text, overrides=None):
    (tmp_path/"my.yaml").write_text(text)
    with pytest.raises(InputError) as error: load_recipe(str(tmp_path/"my.yaml"), overrides)
    assert "my.yaml" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text", CODE)
def test_no_recipe_trusts_model_code(tmp_path, text):
    "Wherever it stands; also an override is part of the recipe, not of the command."
    assert "--trust_remote_code on the command line" in refusal(tmp_path, text)
    said = refusal(tmp_path, "seed: 1", {"sft.trust_remote_code": "true"})
    assert "--trust_remote_code on the command line" in said


@pytest.mark.parametrize("text, said", OUT.items())
def test_no_recipe_writes_elsewhere(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


def test_the_command_line_may_say_where(tmp_path):
    "Who starts the run chooses its folder, wherever it is; in a recipe an absolute path is plain."
    (tmp_path/"my.yaml").write_text(f"output_dir: {tmp_path}/run")
    assert load_recipe(str(tmp_path/"my.yaml"))["output_dir"] == f"{tmp_path}/run"
    assert load_recipe(str(tmp_path/"my.yaml"), {"output_dir": "../x"})["output_dir"] == "../x"


@pytest.mark.parametrize("name", ["my recipe (2)", "Ω-größe_1.5+x", "vcb=γ"])
def test_ordinary_names_are_allowed(tmp_path, name):
    (tmp_path/f"{name}.yaml").write_text("calibrate: {methods: {'%s': {loss: vcb}}}" % name)
    assert load_recipe(str(tmp_path/f"{name}.yaml"))["name"] == name


def unquantised(settings):
    "Without what needs a package that may be absent."
    return {k: unquantised(v) if isinstance(v, dict) else v for k, v in settings.items()
            if k != "quantization"}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_job_writes_below_the_run(name):
    recipe = unquantised(load_recipe(name))
    run = Path(recipe["output_dir"]).resolve()
    assert all(run in job.folder.resolve().parents for job in plan(recipe))


def test_yaml_makes_no_objects(tmp_path):
    marker = tmp_path/"marker"
    text = yaml.dump(Bomb(marker)) + f"\n? !!python/object/apply:pathlib.Path.touch [{marker}]\n"
    assert "not YAML" in refusal(tmp_path, text) and not marker.exists()


# --- reports --------------------------------------------------------------------------------

HOSTILE = ("<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
           "<svg/onload=document.title='owned'></td></table><iframe srcdoc='<script>1</script>'>"
           "\"' onmouseover=alert(1) x=\"<a href=javascript:alert(1)>x</a><base href=//e.vil>"
           "</title></style><style>*{display:none}</style><!-- <meta http-equiv=refresh>")
MARKS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "p", "div",
         "table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "main",
         "details", "summary", "ul", "li", "strong", "mark"}


class Marks(HTMLParser):
    "Every element and attribute of a page, and its text."
    def __init__(self, page):
        super().__init__()
        self.marks, self.text = [], ""
        self.feed(page)
    def handle_starttag(self, tag, attributes): self.marks.append((tag, dict(attributes)))
    def handle_data(self, data): self.text += data


def hostile_run(folder):
    "A report whose every text is hostile: names, summaries, prompts and responses."
    kl = {"splits": {"test": {"kl": {"value": 0.}}}}
    summary = {"policies": {name: {"method": name, "strength": None, "value": None, **kl}
                            for name in ("sft", HOSTILE)}}
    rows = [{"prompt": HOSTILE, "completions": [HOSTILE]}]
    write_json(folder/"sft"/"manifest.json", {"stage": HOSTILE, "seconds": 1, "versions":
               {HOSTILE: HOSTILE}, "summary": {HOSTILE: HOSTILE}})
    blocks = [*pipeline_blocks(folder, ["sft"]), *sample_blocks(summary, dict.fromkeys(
              summary["policies"], rows), 1), Heading(HOSTILE), Figure("f", b"png", HOSTILE)]
    write_report(HOSTILE, blocks, folder/"report")
    return folder/"report"/"index.html"


def check_marks(page):
    found = Marks(page)
    assert {tag for tag, _ in found.marks} <= MARKS
    for tag, attributes in found.marks:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/png").startswith("data:image/png")
        assert attributes.get("http-equiv") in (None, "Content-Security-Policy")
    return found


def test_a_report_of_hostile_texts_has_no_script(tmp_path):
    "No script, handler, frame or foreign address; each hostile text is there in full, as text."
    page = check_marks(hostile_run(tmp_path).read_text("utf-8"))
    assert page.text.count(HOSTILE) >= 9
    assert "style" not in {tag for tag, _ in page.marks[-5:]}


def test_the_stage_itself_escapes(tmp_path):
    hostile_run(tmp_path)
    made = report(ReportConfig(run=str(tmp_path), output_dir=str(tmp_path/"b"), title=HOSTILE))
    assert HOSTILE in check_marks(Path(made["html"]).read_text("utf-8")).text


def test_a_browser_runs_nothing_of_it(browser, tmp_path):
    "In Chromium, with and without the page's own content security policy: the title stays."
    path = hostile_run(tmp_path)
    page = path.read_text("utf-8")
    bare = tmp_path/"bare.html"
    start = page.index('<meta http-equiv="Content-Security-Policy"')
    bare.write_text(page[:start] + page[page.index(">", start) + 1:], "utf-8")
    for file in (path, bare):
        browser.open(file.as_uri())
        browser.settle()
        assert browser.evaluate("document.title").startswith("<script>")
        assert browser.evaluate("document.scripts.length + document.images.length") == 1
        assert browser.evaluate("document.body.innerText").count("onmouseover") >= 8
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
