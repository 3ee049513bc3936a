"""Recipes: every key and type is checked before work begins, with one sentence that names the
remedy."""
from pathlib import Path

import pytest, yaml

from vcb_nb.artifacts import InputError
from vcb_nb.recipes import apply_override, find_recipe, load_recipe, read_core, save_recipe
from vcb_nb.stages import expand_methods, find_stage

BAD = {"unknown section": ("sampel: {n: 8}", "'sampel' is not a section. Did you mean 'sample'?"),
       "unknown key": ("sample: {temprature: 1}",
                       "sample.temprature is not a setting. Did you mean 'temperature'?"),
       "unknown training key": (
           "sft: {learning_rte: 1}",
           "sft.learning_rte is not a setting. Did you mean 'learning_rate'?"),
       "text for a number": ("sample: {n: many}",
                             "sample.n is 'many', but a whole number is needed."),
       "fraction for a whole number": ("sample: {n: 2.5}",
                                       "sample.n is 2.5, but a whole number is needed."),
       "truth value for a number": ("sample: {n: true}",
                                    "sample.n is True, but a whole number is needed."),
       "list for a section": ("sample: [1]", "sample must be a mapping"),
       "no mapping": ("- 1", "holds no settings"),
       "empty": ("", "holds no settings"),
       "broken YAML": ("sample: [", "not YAML"),
       "unknown method key": ("calibrate: {methods: {vcb: {gama: 1}}}",
                              "calibrate.gama is not a setting."),
       "sweep of two": ("calibrate: {methods: {vcb: {sweep: {gamma: [1], lam: [1]}}}}",
                        "must map one loss parameter"),
       "methods as list": ("calibrate: {methods: [vcb]}", "must map a name to settings")}


@pytest.mark.parametrize("text, said", BAD.values(), ids=BAD.keys())
def test_bad_recipe(tmp_path, text, said):
    (tmp_path/"my.yaml").write_text(text)
    with pytest.raises(InputError) as error: load_recipe(str(tmp_path/"my.yaml"))
    assert said in str(error.value)
    assert "my.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_recipe_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'demo'"): find_recipe("dmo")


def test_scientific_notation_is_a_number():
    "YAML 1.1 reads 1e-3 as a text: a trap for every learning rate."
    assert yaml.safe_load("1e-3") == "1e-3"
    assert find_stage("sft").check({"learning_rate": "1e-3"}) == {"learning_rate": 1e-3}


MEANT = {"1e-6": 1e-6, "-.5": -.5, "1e3": 1e3, "3": 3, "010": 10, "0o17": 15, "0xff": 255,
         ".inf": float("inf"), "true": True, "False": False, "null": None, "~": None, "": None,
         "no": "no", "yes": "yes", "on": "on", "1_000": "1_000", "2024-05-01": "2024-05-01",
         "1:30": "1:30", "0b11": "0b11", "1e": "1e", "<<": "<<", "=": "="}


@pytest.mark.parametrize("text, value", MEANT.items())
def test_yaml_is_read_as_1_2(text, value, tmp_path):
    """At any depth, free mappings included; and what is written, as numbers or as strings, is read
    as it was, by us and by the readers of YAML 1.1."""
    if text != "<<": # the one key that YAML 1.2 knows
        found = read_core(f"a: {{b: [{text or '~'}]}}")["a"]["b"][0]
        assert found == value and type(found) is type(value)
    for kept in (text, value):
        path = save_recipe({"a": {"b": kept}}, tmp_path/"r.yaml")
        for read in (read_core, yaml.safe_load):
            again = read(path.read_text())["a"]["b"]
            assert again == kept and type(again) is type(kept)


@pytest.mark.parametrize("value", ["no", "steps", "epoch"])
def test_words_reach_their_setting(value, tmp_path):
    "`save_strategy: no` is the word that transformers wants, and yes is still true for a switch."
    (tmp_path/"r.yaml").write_text(f"sft: {{save_strategy: {value}, use_cpu: yes, bf16: off, "
                                   "peft_config: {r: 4, lora_dropout: 1e-1}}")
    sft = load_recipe(str(tmp_path/"r.yaml"))["sft"]
    assert sft["save_strategy"] == value and (sft["use_cpu"], sft["bf16"]) == (True, False)
    assert sft["peft_config"]["lora_dropout"] == .1


@pytest.mark.parametrize("key, text, value", [
    ("sample.policy", "c/run #2", "c/run #2"), ("output_dir", "2024-05-01", "2024-05-01"),
    ("sample.prompts", "[a].jsonl", "[a].jsonl"), ("name", "3", "3"),
    ("sample.dtype", "null", None),
    ("sample.policy", '"quoted"', '"quoted"'), ("sft.data", "{x}: y", "{x}: y"),
    ("data.pairs", "[a].jsonl", ["[a].jsonl"]), ("data.pairs", "a #1.jsonl", ["a #1.jsonl"]),
    ("data.pairs", "[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
    ("evaluate.policies.a", "m: #1", "m: #1"), ("calibrate.methods.v.candidates", "[x]", "[x]"),
    ("sft.report_to", "[tensorboard, wandb]", ["tensorboard", "wandb"]),
    ("sft.lr_scheduler_kwargs", "{min_lr: 1e-6}", {"min_lr": 1e-6}),
    ("calibrate.methods.v.loss_params.gamma", ".5", .5), ("sample.n", "16", 16)])
def test_texts_of_the_command_line_are_literal(key, text, value):
    "Strings are taken as they are typed, by the type of their setting; the rest is read as YAML."
    found = apply_override({}, key, text)
    for part in key.split("."): found = found[part]
    assert found == value and type(found) is type(value)


def test_every_training_argument_is_a_key():
    assert find_stage("calibrate").check(
        {"warmup_steps": 10, "report_to": ["tensorboard"], "bf16": True})


def test_sweep_makes_one_run_a_value():
    runs = expand_methods({
        "seed": 3,
        "methods": {"dpo": {"sweep": {"beta": [.1, 1]}, "seed": 4}, "rrhf": None}})
    assert list(runs) == ["dpo-beta0.1", "dpo-beta1", "rrhf"]
    assert runs["dpo-beta0.1"] == {"seed": 4, "loss": "dpo", "loss_params": {"beta": .1}}
    assert runs["rrhf"]["seed"] == 3


def test_override_and_round_trip(tmp_path):
    save_recipe({"sample": {"n": 4}}, tmp_path/"a.yaml")
    recipe = load_recipe(
        str(tmp_path/"a.yaml"),
        {"sample.n": "16", "calibrate.methods.vcb.loss_params.gamma": ".5"})
    assert recipe["sample"]["n"] == 16
    assert recipe["calibrate"]["methods"]["vcb"]["loss_params"] == {"gamma": .5}
    save_recipe(recipe, tmp_path/"b.yaml")
    assert load_recipe(str(tmp_path/"b.yaml")) == recipe
    with pytest.raises(InputError, match="has no fields"):
        apply_override({"sample": 3}, "sample.n", "1")


@pytest.mark.parametrize("name", ["demo", "lesson"])
def test_shipped_recipes_are_valid(name): assert load_recipe(name)["name"] == name


def test_a_variant_changes_its_base(tmp_path):
    "Merged key by key at every depth; the base keeps its name and its folder for itself."
    save_recipe({"name": "large", "output_dir": "runs/l", "seed": 4, "sample": {"n": 8, "top_k": 5},
                 "calibrate": {"methods": {"vcb": {"loss_params": {"gamma": 1}}, "dpo": {}}}},
                tmp_path/"large.yaml")
    (tmp_path/"small.yaml").write_text(
        "base: large.yaml\nsample: {top_k: 0}\ncalibrate: {methods: {vcb: {loss_params: "
        "{gamma: .5}}}}\n")
    found = load_recipe(str(tmp_path/"small.yaml"), {"sample.n": 3})
    assert found["sample"] == {"n": 3, "top_k": 0} and found["seed"] == 4
    assert found["calibrate"]["methods"] == {"vcb": {"loss_params": {"gamma": .5}}, "dpo": {}}
    assert (found["name"], found["output_dir"]) == ("small", "runs/small")
    (tmp_path/"mine.yaml").write_text("base: lesson\nseed: 9\n")
    assert load_recipe(str(tmp_path/"mine.yaml"))["sample"] == load_recipe("lesson")["sample"]


@pytest.mark.parametrize("base, said", [
    ("a.yaml", "leads back to it"), ("b.yaml", "leads back"), ("../c.yaml", "another folder"),
    ("/tmp/c.yaml", "another folder"), ("demmo", "Did you mean 'demo'"), ("3.5", "a string is"),
    ("[a]", "a string is needed")])
def test_a_base_that_cannot_be_used(tmp_path, base, said):
    (tmp_path/"a.yaml").write_text(f"base: {base}\n")
    (tmp_path/"b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(InputError, match=said): load_recipe(str(tmp_path/"a.yaml"))


@pytest.mark.parametrize("name, kind", [("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_the_configs_beside_the_recipes(name, kind):
    "By its own reader, which refuses a key that it does not know."
    from accelerate.commands.config.config_args import load_config_from_file
    folder = Path(__file__).parents[1]/"recipes"/"accelerate"
    config = load_config_from_file(str(folder/f"{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "bf16"
