"""The stages: one record each, and every setting keeps to what it declares."""
import dataclasses, sys, typing
from dataclasses import dataclass

import pytest

from vcb_nb import stages
from vcb_nb.artifacts import InputError, fingerprint, read_json, write_json, write_manifest
from vcb_nb.cli import main
from vcb_nb.pipeline import Job, job_state, plan, plan_states, run_recipe
from vcb_nb.recipes import check_recipe
from vcb_nb.settings import deciding, decides, option
from vcb_nb.stages import STAGES, Stage, find_stage
from vcb_nb.training import REPORTERS


@dataclass
class ToyConfig:
    output_dir: str = option(None, "Folder of the greeting.", decides=False)
    text: str = option("hello", "What to say.")
    times: int = option(1, "How often to say it.")


def toy(config):
    write_json(f"{config.output_dir}/toy.json", [config.text] * config.times)
    return {"said": config.times}


@pytest.fixture
def with_toy(monkeypatch):
    "A new stage is one entry."
    entry = Stage("toy", f"{__name__}:toy", f"{__name__}:ToyConfig", "Say something.")
    monkeypatch.setattr(stages, "STAGES", (*STAGES[:-1], entry, STAGES[-1]))


def test_a_new_stage_is_one_entry(with_toy, tmp_path, capsys):
    "Recipe, command, plan, resuming and report know it at once."
    run = tmp_path/"run"
    def recipe(**toy): return check_recipe({"name": "t", "seed": 0, "output_dir": str(run),
                                            "toy": toy, "report": {}})
    with pytest.raises(InputError, match="toy.txt is not a setting. Did you mean 'text'?"):
        recipe(txt="hi")
    assert plan_states(plan(recipe(text="hi")))["toy"] == ("new", "")
    assert run_recipe(recipe(text="hi")) == {"toy": "new", "report": "new"}
    assert run_recipe(recipe(text="hi")) == {"toy": "done", "report": "done"}
    assert plan_states(plan(recipe(text="ho")))["report"] == ("stale", "toy will be made again")
    (run/"toy"/"toy.json").unlink()
    assert run_recipe(recipe(text="hi"))["toy"] == "altered"
    assert read_json(run/"toy"/"toy.json") == ["hi"]
    assert "said 1" in (run/"report"/"report.md").read_text()
    assert main(["toy", "--times", "2", "--output_dir", str(tmp_path/"alone")]) == 0
    assert read_json(tmp_path/"alone"/"toy.json") == ["hello", "hello"]
    assert main(["toy", "--help"]) == 0 and "--times <int>" in capsys.readouterr().out


# Settings that a stage cannot do without.
GIVEN = {
    "data": {"world": {"pairs": 10}}, "tokenizer": {"data": "a.txt"},
    "pretrain": {"data": "a.txt", "tokenizer": "a.txt", "objective": "text"},
    "sft": {"data": "a.txt", "tokenizer": "a.txt"}, "reward": {"model": "a.txt", "pairs": "a.txt"},
    "sample": {"policy": "a.txt", "prompts": "a.txt"}, "score": {"candidates": "a.txt"},
    "calibrate": {"model": "a.txt", "candidates": "a.txt"},
    "online": {"model": "a.txt", "prompts": "a.txt", "reward": "a.txt"},
    "evaluate": {"reference": "a.txt", "prompts": "a.txt", "policies": {"vcb": "a.txt"}},
    "judge": {"evaluation": "a.txt", "base_url": "http://127.0.0.1/v1", "model": "m"},
    "diagnose": {"policy": "a.txt", "reference": "a.txt", "candidates": "a.txt"},
    "report": {"run": ".", "parts": ["a.txt"]}}
# Another value, where the type alone does not give one that the config takes.
OTHER = {
    "base_url": "http://127.0.0.1:2/v1", "template": "summary",
    "world": {"pairs": 11}, "data.pairs": ["b.txt"], "reward.pairs": "b.txt",
    "model": "b.txt", "architecture": "llama",
    "model_config": {"hidden_size": 64}, "dtype": "bfloat16", "device": "cpu",
    "attn_implementation": "eager", "quantization": "4bit", "policy": "b.txt",
    "policies": {"vcb": "b.txt"}, "methods": {"sft": {"method": "sft"}}, "backend": "vllm",
    "part": "1/2",
    "calibrate.reference": "live", "online.sigma": "stored", "pretrain.objective": "completion",
    "objective": "text", "split_by": "prompt",
    "loss": "dpo", "loss_params": {"gamma": .5}, "way": "rows", "reference_model": "b.txt",
    "peft_config": {"r": 2}, "temperature": .7, "top_p": .9, "level": .9, "eval_share": .2,
    "test_share": .2, "validation_share": .2, "max_length": 700, "run": "..",
    "lr_scheduler_type": "constant", "optim": "sgd", "report_to": "tensorboard",
    "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch",
    "hub_strategy": "end", "log_level": "error", "log_level_replica": "error",
    "train_sampling_strategy": "sequential", "debug": "underflow_overflow",
    "lr_scheduler_kwargs": {"num_cycles": 2}, "label_names": ["x"], "warmup_steps": 3,
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "ddp_backend": "gloo",
    "accelerator_config": {"split_batches": True}, "include_for_metrics": ["inputs"],
    "adam_beta1": .8, "adam_beta2": .9, "label_smoothing_factor": .1, "max_steps": 5,
    "metric_for_best_model": "loss",
    "loss_type": "x", "save_steps": 7, "logging_steps": 7, "eval_steps": 7, "sigma": "dataset",
    "resume_from_checkpoint": "b.txt", "title": "A run", "max_prompts": 9, "eval_delay": 2}
# What some need beside them.
BESIDE = {"early_stopping_patience": {"eval_strategy": "epoch"},
          "load_best_model_at_end": {"eval_strategy": "epoch", "save_strategy": "epoch"},
          "sft.save_adapter": {"model": "a.txt"}, "pretrain.save_adapter": {"model": "a.txt"},
          "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
          "data.pairs": {"world": None}, "responses": {"evaluation": None},
          "max_cost": {"price_in": 1.}}
# Needs a GPU, a package, a process group or the Hub: the declaration is compared with the key
# alone.
CANNOT = {"tf32", "fsdp", "deepspeed", "ddp_backend", "revision", "quantization"}


def of_setting(table, stage, name, default):
    return table.get(f"{stage.name}.{name}", table.get(name, default))


def other_value(stage, name, hint, value):
    "A value of the setting that differs from `value`."
    if found := of_setting(OTHER, stage, name, None): return found
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
    if bool in kinds: return not value
    if int in kinds or float in kinds: return (value or 2) + 1
    if kinds and typing.get_origin(kinds[0]) is list: return ["b.txt"]
    if dict in kinds or typing.get_origin(hint) is dict: return {"b": "b.txt"}
    return "b.txt" if value != "b.txt" else "a.txt"


def settings_of(stage):
    return [f.name for f in dataclasses.fields(stage.config_class)
            if f.init and f.name != "output_dir"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"): (tmp_path/name).write_text(name)


@pytest.mark.parametrize("stage, name", [
    pytest.param(stage, name, id=f"{stage.name}-{name}")
    for stage in STAGES for name in settings_of(stage)])
def test_each_setting_keeps_to_its_declaration(stage, name, files, tmp_path):
    """A finished job whose setting is changed is stale if the setting decides its result, and done
    if it does not."""
    given, folder = GIVEN[stage.name], tmp_path/"job"
    job = Job(stage.name, stage, folder, given)
    (folder).mkdir()
    write_manifest(folder, key=fingerprint(job.key()), **job.key(), seconds=0)
    assert job_state(job)[0] == "done"
    field = {f.name: f for f in dataclasses.fields(stage.config_class)}[name]
    hint = typing.get_type_hints(stage.config_class)[name]
    changed = {**given, **of_setting(BESIDE, stage, name, {}),
               name: other_value(stage, name, hint, getattr(job.config, name))}
    counts = decides(field) or field.metadata.get("source", False)
    try: other = Job(stage.name, stage, folder, changed)
    except InputError:
        assert (name in deciding(stage.config_class, changed)) == decides(field)
        assert name in CANNOT, f"{stage.name}.{name} has no other value in this test"
        return
    assert job_state(other)[0] == ("stale" if counts else "done")
