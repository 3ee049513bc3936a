"""Settings: one declaration of what a result depends on, and values checked as soon as they are
known."""
import json
from dataclasses import dataclass, fields

import pytest
from transformers import TrainingArguments

from vcb_nb.artifacts import InputError
from vcb_nb.settings import (REQUIRED, UNDECIDING, check_least, check_required, check_values,
                             coerce, config_key, deciding, decides, differences, is_function,
                             load_function, option, source_key)
from vcb_nb.stages import STAGES


@dataclass
class CookConfig:
    pot: str = option(REQUIRED, "What to cook in.", source=True)
    salt: float = option(1., "Pinches.")
    herbs: list[str] = option([], "Names.")
    hob: str = option("left", "Where it stands.", decides=False)

    def __post_init__(self):
        check_required(self)
        check_least(self, salt=0)


@pytest.mark.parametrize("hint, value, want", [
    (int | None, None, None), (float, 1, 1.), (int, 2., 2), (list[str], ["a"], ["a"]),
    (str | list[str] | None, ["a"], ["a"]), (dict | str | None, {"a": 1}, {"a": 1})])
def test_coerce(hint, value, want):
    got = coerce(value, hint, "k")
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize("values, said", [
    ({"pott": "a"}, "cook.pott is not a setting. Did you mean 'pot'?"),
    ({"salt": "a lot"}, "cook.salt is 'a lot', but a number is needed."),
    (["pot"], "cook must be a mapping")])
def test_values_are_checked_against_the_class(values, said):
    with pytest.raises(InputError) as error: check_values(CookConfig, values, "cook")
    assert said in str(error.value)


def test_a_required_setting_is_named_with_its_meaning():
    with pytest.raises(InputError, match="pot is not set. What to cook in."): CookConfig()
    with pytest.raises(InputError, match="salt is -1"): CookConfig("a.txt", salt=-1)


def test_two_configs_do_not_share_a_list():
    CookConfig("a").herbs.append("thyme")
    assert CookConfig("a").herbs == []


def test_a_key_is_of_content_and_of_what_decides(tmp_path):
    (tmp_path/"a").write_text("soup")
    (tmp_path/"b").write_text("soup")
    key = config_key(CookConfig(str(tmp_path/"a")))
    assert config_key(CookConfig(str(tmp_path/"b"), hob="right", salt=1)) == key
    assert config_key(CookConfig(str(tmp_path/"a"), salt=2)) != key
    assert config_key(CookConfig(str(tmp_path/"a"), herbs=["thyme"])) != key
    (tmp_path/"a").write_text("stew")
    assert config_key(CookConfig(str(tmp_path/"a"))) != key


def test_a_default_that_is_written_out_changes_nothing():
    assert deciding(CookConfig, {"salt": 1., "herbs": []}) == {}
    assert differences(CookConfig, {}, {"salt": 2.}) == "salt: 1.0 → 2.0"
    assert differences(CookConfig, {"salt": 2.}, json.loads('{"salt": 2.0}')) == ""


@pytest.mark.parametrize("split", ["", "#train"])
def test_the_split_of_a_file_is_part_of_its_key(tmp_path, split):
    (tmp_path/"rows.jsonl").write_text("{}")
    whole, other = (source_key(f"{tmp_path/'rows.jsonl'}{s}") for s in (split, "#test"))
    assert whole != other and whole.endswith(split)


def test_a_function_stands_for_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"judge_of_settings.py").write_text("def judge(prompt, completion): return 1.")
    before = source_key("judge_of_settings:judge")
    (tmp_path/"judge_of_settings.py").write_text("def judge(prompt, completion): return 2.")
    assert source_key("judge_of_settings:judge") != before


def test_the_inherited_list_names_what_there_is():
    assert UNDECIDING <= {f.name for f in fields(TrainingArguments)}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_setting_of_ours_says_what_it_is(stage):
    theirs = {f.name for f in fields(TrainingArguments)}
    for field in fields(stage.config_class):
        assert field.name in theirs or {"help", "decides", "source"} <= field.metadata.keys()
        if field.name in ("output_dir", "device", "batch_size", "batch_tokens"):
            assert not decides(field), f"{stage.name}.{field.name}"


def test_function_or_folder(tmp_path):
    assert is_function("package.module:name") and not is_function("runs/reward/model")
    assert not is_function("owner/model") and not is_function("C:\\models\\reward")


def test_an_error_inside_a_users_module_is_told(tmp_path, monkeypatch):
    "Which module, and what it raised; the traceback stays behind the message."
    monkeypatch.chdir(tmp_path)
    for i, (code, said) in enumerate({
            "import no_such_dependency": "No module named 'no_such_dependency' (my_reward0.py:1)",
            "\n1/0": "ZeroDivisionError: division by zero (my_reward1.py:2)",
            "def f(:": "SyntaxError", "raise SystemExit(3)": "SystemExit: 3"}.items()):
        (tmp_path/f"my_reward{i}.py").write_text(code + "\n")
        for source in (f"my_reward{i}:f", f"{tmp_path}/my_reward{i}.py:f"):
            with pytest.raises(InputError, match="cannot be imported. It raised") as error:
                load_function(source)
            assert said in str(error.value) and "\n" not in str(error.value)
            assert error.value.__cause__ is not None
