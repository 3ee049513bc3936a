"""Recipes: every key and type is checked before work begins, with one sentence that names the
remedy."""
import pytest, yaml

from vcb_nb.artifacts import InputError
from vcb_nb.recipes import apply_override, find_recipe, load_recipe, save_recipe
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
