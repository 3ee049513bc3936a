"""What a training run must not do: keep numbers that are not finite, lose its work to a signal, or
take a setting that does nothing."""
import json, os, signal

import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from bad_inputs import RIGHT, build_world
from vcb_nb.artifacts import InputError
from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer
from vcb_nb.cli import main
from vcb_nb.data import load_candidates
from vcb_nb.loading import load_policy, load_reward_model
from vcb_nb.settings import load_object
from vcb_nb.stages import find_stage
from vcb_nb.training import (WatchedTrainer, check_training, is_complete, last_checkpoint,
                             read_curve)

TRAINED = ("sft", "reward", "calibrate")
SMALL = dict(max_steps=6, logging_steps=4, save_steps=100, learning_rate=1e-3, seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from conftest import SENTENCES
    from vcb_nb.data import train_tokenizer
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=320)
    return build_world(tmp_path_factory.mktemp("world"), tokenizer)


def settings_of(stage, world, **changes):
    fill = lambda v: v.format(**world) if isinstance(v, str) and "{" in v else v
    return {k: fill(v) for k, v in {**RIGHT[stage], **SMALL, **changes}.items()}


def run(stage, world, folder, **changes):
    stage, settings = find_stage(stage), settings_of(stage, world, **changes)
    return load_object(stage.run)(stage.config_class(**settings, output_dir=str(folder)))


def finite(folder):
    tensors = [t for file in folder.rglob("*.safetensors") for t in load_file(file).values()]
    return all(t.isfinite().all() for t in tensors)


# ---- not finite

@pytest.mark.parametrize("stage", TRAINED)
def test_a_run_that_diverges_ends_with_a_sentence_and_keeps_nothing_broken(stage, world, tmp_path,
                                                                         capsys):
    "The instance: a learning rate of 1e19 once ended with exit 0 and a model of NaN."
    given = settings_of(stage, world, max_steps=9, learning_rate=1e19, save_steps=1)
    words = [w for k, v in given.items() for w in (f"--{k}", str(v))]
    assert main([stage, *words, "--output_dir", str(tmp_path/"out")]) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("vcb: ")]
    last = last_checkpoint(tmp_path/"out"/"checkpoints")
    assert len(said) == 1 and f"The last finite checkpoint is {last}." in said[0], said
    assert "at step" in said[0] or "after step" in said[0]
    assert finite(tmp_path/"out") and not (tmp_path/"out"/"model").exists()


class Spoil(TrainerCallback):
    "Puts a value into a weight at the end of a step."
    def __init__(self, at, value): self.at, self.value = at, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at:
            next(p for p in model.parameters() if p.requires_grad).data.flatten()[0] = self.value


def with_callback(monkeypatch, callback):
    "Every trainer that is built from here on has this callback too."
    built = WatchedTrainer.__init__

    def init(self, *args, **kwargs):
        built(self, *args, **kwargs)
        self.add_callback(callback)

    monkeypatch.setattr(WatchedTrainer, "__init__", init)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_breaks_in_the_last_step_is_not_saved(world, tmp_path, monkeypatch, value):
    "No later loss can tell: the weights are looked at before they are saved."
    with_callback(monkeypatch, Spoil(6, value))
    with pytest.raises(InputError, match="weight .* not finite after step 6.*no checkpoint"):
        run("reward", world, tmp_path/"out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_gradient_that_is_not_finite_stops_before_the_step(world, tmp_path, monkeypatch):
    "The loss is finite still, and so are the weights: the optimizer has not moved them."
    seen, step = {}, WatchedTrainer.training_step

    def spoilt(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = float("inf")
            seen["before"] = [p.detach().clone() for p in self.model.parameters()]
            seen["model"] = self.model
        return loss

    monkeypatch.setattr(WatchedTrainer, "training_step", spoilt)
    with pytest.raises(InputError, match="gradient's norm is (inf|nan) at step 3"):
        run("sft", world, tmp_path/"out")
    for a, b in zip(seen["before"], seen["model"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def broken(world, tmp_path):
    "A copy of a model with one weight of NaN."
    def make(name):
        load = load_reward_model if name == "judge" else load_policy
        load(world[name]).save_pretrained(tmp_path/name)
        for file in world[name].glob("token*"):
            (tmp_path/name/file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path/name/"model.safetensors")
        sorted(tensors.items())[3][1].flatten()[0] = float("nan")
        save_file(tensors, tmp_path/name/"model.safetensors", {"format": "pt"})
        return str(tmp_path/name)
    return make


@pytest.mark.parametrize("stage, name, setting", [
    ("sft", "policy", "model"), ("reward", "policy", "model"), ("calibrate", "policy", "model"),
    ("sample", "policy", "policy"), ("score", "judge", "reward"),
    ("score", "policy", "reference")])
def test_a_broken_model_is_refused_where_it_is_read(stage, name, setting, world, tmp_path, broken):
    fill = lambda v: v.format(**world) if isinstance(v, str) and "{" in v else v
    given = {k: fill(v) for k, v in RIGHT[stage].items()} | {setting: broken(name)}
    kind = find_stage(stage)
    with pytest.raises(InputError, match="the weight .* holds NaN or infinity"):
        load_object(kind.run)(kind.config_class(**given, output_dir=str(tmp_path/"out")))


# ---- signals

class Signal(TrainerCallback):
    "Sends a signal to this process in the middle of a step."
    def __init__(self, at, signum): self.at, self.signum = at, signum

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at: os.kill(os.getpid(), self.signum)


@pytest.fixture
def heard(monkeypatch):
    "Both signals raise KeyboardInterrupt, as the command line has it."
    def stop(signum, frame): raise KeyboardInterrupt(signum)
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, old in before.items(): signal.signal(signum, old)


@pytest.mark.parametrize("stage, signum, more", [
    ("sft", signal.SIGTERM, {}), ("reward", signal.SIGINT, {}),
    ("calibrate", signal.SIGTERM, {"gradient_accumulation_steps": 2, "peft_config": {"r": 2}}),
    ("sft", signal.SIGINT, {"eval_share": .5, "eval_strategy": "steps", "eval_steps": 2,
                            "save_strategy": "steps", "save_steps": 2,
                            "load_best_model_at_end": True})])
def test_a_signal_leaves_a_checkpoint_that_loses_nothing(stage, signum, more, world, tmp_path,
                                                         monkeypatch, heard):
    """Between two checkpoints and two lines of the log: the step is finished and saved, and the
    resumed run ends as one that nobody touched, to the bit, log included."""
    run(stage, world, tmp_path/"whole", **more)
    with monkeypatch.context() as patch:
        with_callback(patch, Signal(3, signum))
        with pytest.raises(KeyboardInterrupt) as stopped: run(stage, world, tmp_path/"cut", **more)
    assert stopped.value.args == (signum,)
    found = last_checkpoint(tmp_path/"cut"/"checkpoints")
    assert found.name == "checkpoint-3" and is_complete(found)
    run(stage, world, tmp_path/"cut", **more)
    whole, cut = (load_file(tmp_path/n/"model"/"model.safetensors") for n in ("whole", "cut"))
    for name in whole: torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=0)
    a, b = ((tmp_path/n/"training_log.jsonl").read_text() for n in ("whole", "cut"))
    drop = lambda text: [{k: v for k, v in json.loads(line).items()
                          if not k.endswith(("runtime", "per_second"))}
                         for line in text.splitlines()]
    assert drop(a) == drop(b)


def test_a_second_signal_does_not_wait(world, tmp_path, monkeypatch, heard):
    with_callback(monkeypatch, Signal(3, signal.SIGINT))
    with_callback(monkeypatch, Signal(3, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt): run("sft", world, tmp_path/"out")
    assert last_checkpoint(tmp_path/"out"/"checkpoints") is None


def test_a_handler_that_does_nothing_does_not_finish_a_run(world, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, lambda *call: None)
    try:
        with_callback(monkeypatch, Signal(2, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt): run("sft", world, tmp_path/"out")
    finally: signal.signal(signal.SIGTERM, before)
    assert last_checkpoint(tmp_path/"out"/"checkpoints").name == "checkpoint-2"
    assert not (tmp_path/"out"/"model").exists()


# ---- early stopping, and the best model

EARLY = dict(eval_share=.5, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=9)
STILL = dict(EARLY, learning_rate=0., early_stopping_patience=2)


def test_early_stopping_ends_a_run_that_gains_nothing(world, tmp_path):
    "The first evaluation is the best, and two without a gain follow."
    assert run("sft", world, tmp_path/"still", **STILL)["steps"] == 3
    assert run("sft", world, tmp_path/"moving", **STILL | {"learning_rate": 1e-3})["steps"] == 9
    more = {"learning_rate": 1e-3, "early_stopping_threshold": 1e9}
    assert run("sft", world, tmp_path/"far", **STILL | more)["steps"] == 3


def test_a_run_that_stopped_early_is_not_trained_on(world, tmp_path):
    "A kill between the last checkpoint and the model costs no step and adds none."
    run("sft", world, tmp_path/"out", **STILL, keep_checkpoints=True)
    (tmp_path/"out"/"model").rename(tmp_path/"before")
    assert run("sft", world, tmp_path/"out", **STILL)["steps"] == 3
    a, b = (load_file(p/"model.safetensors") for p in (tmp_path/"before", tmp_path/"out"/"model"))
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_a_resumed_run_remembers_how_long_it_has_waited(world, tmp_path, monkeypatch, heard):
    with monkeypatch.context() as patch:
        with_callback(patch, Signal(2, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt): run("sft", world, tmp_path/"out", **STILL)
    assert last_checkpoint(tmp_path/"out"/"checkpoints").name == "checkpoint-2"
    assert run("sft", world, tmp_path/"out", **STILL)["steps"] == 3


@pytest.mark.parametrize("stage, metric, best", [
    ("sft", None, min), ("reward", "accuracy", max), ("calibrate", "calibration/r2", max)])
def test_the_best_model_is_the_one_that_is_kept(stage, metric, best, world, tmp_path):
    "At a learning rate that overshoots, it is not the last; the metric's own direction decides."
    given = dict(EARLY, learning_rate=.3, load_best_model_at_end=True, keep_checkpoints=True)
    given |= {"metric_for_best_model": metric} if metric else {}
    run(stage, world, tmp_path/"out", **given)
    steps, values = read_curve(tmp_path/"out", f"eval_{metric or 'loss'}")
    step = dict(zip(reversed(values), reversed(steps)))[best(values)] # the first of equals
    kept = load_file(tmp_path/"out"/"model"/"model.safetensors")
    there = load_file(tmp_path/"out"/"checkpoints"/f"checkpoint-{step}"/"model.safetensors")
    for name in there: torch.testing.assert_close(kept[name], there[name], rtol=0, atol=0)


@pytest.fixture
def trainer(world, tmp_path):
    "A trainer of candidates, without the stage around it."
    rows = load_candidates(str(world["scored"]), need=("rewards",))

    def make(name="out", model=str(world["policy"]), train=rows, held_out=rows, **settings):
        given = dict(SMALL, save_steps=3, use_cpu=True, disable_tqdm=True, report_to="none")
        return CalibrationTrainer(model, CalibrationConfig(str(tmp_path/name), **given | settings),
                                  train(rows) if callable(train) else train, held_out)
    return make


def assert_same(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_trainer_alone_resumes_with_the_head(trainer, tmp_path):
    """GPT-NeoX's head has another name in the file than in memory: transformers' own trainer warns
    and goes on with the initial one."""
    whole, again = trainer("whole"), trainer("whole")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path/"whole"/"checkpoint-3"))
    assert_same(whole.model, again.model)
    with pytest.raises(InputError, match="'nowhere'.*checkpoint-3, checkpoint-6"):
        trainer("whole").train(resume_from_checkpoint="nowhere")
    with pytest.raises(InputError, match="has none"):
        trainer("new").train(resume_from_checkpoint=True)


def test_a_trainer_alone_keeps_the_head_of_the_best_model(trainer):
    best = trainer(learning_rate=.3, eval_strategy="steps", eval_steps=1, save_steps=1,
                   load_best_model_at_end=True, metric_for_best_model="logps/mean")
    best.train()
    assert best.state.best_global_step < 6
    assert_same(best.model, load_policy(best.state.best_model_checkpoint))


# ---- other devices

def test_resuming_on_other_devices_is_refused(world, tmp_path, monkeypatch, heard):
    "Rows would be trained twice, and the schedule would be another; the numbers are named."
    with monkeypatch.context() as patch:
        with_callback(patch, Signal(2, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt): run("sft", world, tmp_path/"out")
    settings = tmp_path/"out"/"checkpoints"/"settings.json"
    known = json.loads(settings.read_text())
    settings.write_text(json.dumps({**known, "devices": 2}))
    with pytest.raises(InputError, match="made on 2 devices, and this run has 1.*on 2 again"):
        run("sft", world, tmp_path/"out")
    settings.write_text(json.dumps(known))
    for change in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(InputError, match=f"different settings.*{next(iter(change))}"):
            run("sft", world, tmp_path/"out", **change)
    assert run("sft", world, tmp_path/"out")["steps"] == 6


# ---- what a reporter leaves

def test_tensorboard_files_stay_beside_the_model(world, tmp_path, monkeypatch, heard):
    "One folder, also for a run that was cut off; nothing in it changes once the stage is done."
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    given = dict(report_to="tensorboard", logging_steps=1, eval_share=.5)
    with monkeypatch.context() as patch:
        with_callback(patch, Signal(3, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt): run("sft", world, tmp_path/"out", **given)
    run("sft", world, tmp_path/"out", **given)
    words = [w for k, v in settings_of("sft", world, **given).items() for w in (f"--{k}", str(v))]
    found = EventAccumulator(str(tmp_path/"out"/"runs")).Reload().Scalars("train/loss")
    assert [e.step for e in found] == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in (tmp_path/"out").iterdir()} == {"model", "runs", "training_log.jsonl"}
    for _ in range(2): assert main(["sft", *words, "--output_dir", str(tmp_path/"job")]) == 0


def test_a_file_of_another_reporter_stays_too(world, tmp_path, monkeypatch):
    "Some write into the trainer's own folder, which goes when the stage is done."
    class Reporter(TrainerCallback):
        def on_train_begin(self, args, *_, **__):
            os.makedirs(args.output_dir, exist_ok=True)
            with open(f"{args.output_dir}/emissions.csv", "w") as f: f.write("1 kg")
    with_callback(monkeypatch, Reporter())
    run("sft", world, tmp_path/"out")
    assert (tmp_path/"out"/"emissions.csv").read_text() == "1 kg"
    assert not (tmp_path/"out"/"checkpoints").exists()


# ---- settings act, or are refused, before anything has trained

@pytest.mark.parametrize("stage", TRAINED)
def test_defaults_pass(stage, world, tmp_path):
    kind = find_stage(stage)
    check_training(kind.config_class(**settings_of(stage, world), output_dir=str(tmp_path)))


BAD = {
    "no rows": (dict(train=None), "no rows to train on"),
    "a list of rows": (dict(train=list), "is a list. Give a datasets.Dataset"),
    "a list of held-out rows": (dict(held_out=[{"prompt": "a"}]), "is a list"),
    "a batch that is never full": (dict(per_device_train_batch_size=64, max_steps=-1,
                                        dataloader_drop_last=True), "do not fill one batch"),
    "reporter": (dict(report_to="wandb"), "report_to cannot be used.*wandb"),
    "optimizer": (dict(optim="galore_adamw"), "optim.*galore_torch"),
    "optimizer of 8 bit": (dict(optim="adamw_bnb_8bit"), "optim.*bitsandbytes"),
    "options of an optimizer": (dict(optim="sgd", optim_args="momentum=big"), "optim.*'big'"),
    "options of a schedule": (dict(lr_scheduler_kwargs={"cycles": 2}), "schedule.*'cycles'"),
    "a schedule without its options": (dict(lr_scheduler_type="warmup_stable_decay"),
                                       "schedule.*num_decay_steps"),
    "workers that stay, and none": (dict(dataloader_persistent_workers=True), "num_workers > 0"),
    "liger": (dict(use_liger_kernel=True), "liger-kernel is not installed"),
    "one process": (dict(fsdp="full_shard"), "fsdp.*torchrun"),
    "the Hub": (dict(push_to_hub=True), "push_to_hub.*hf upload"),
    "nothing to evaluate": (dict(held_out=None, eval_strategy="steps"), "no held-out rows"),
    "nothing to evaluate at the start": (dict(held_out=None, eval_on_start=True), "no held-out"),
    "folder": (dict(name="/proc/x"), "/proc/x cannot be written to"),
    "seed": (dict(seed=4294967296), "seed is 4294967296. Set it to a number below"),
    "seed of the data": (dict(data_seed=-1), "data_seed is -1"),
    "no step": (dict(max_steps=0), "max_steps is 0"),
    "steps between saves": (dict(save_steps=0), "save_steps is 0"),
    "steps between logs": (dict(logging_steps=-1), "logging_steps is -1"),
    "norm": (dict(max_grad_norm=float("nan")), "max_grad_norm is nan"),
    "beta": (dict(adam_beta2=1.), "adam_beta2 is 1"),
    "checkpoints kept": (dict(save_total_limit=0), "save_total_limit is 0"),
    "metric": (dict(metric_for_best_model="calibration/r3", eval_strategy="steps"),
               "Did you mean 'calibration/r2'"),
    "patience without evaluations": (dict(early_stopping_patience=2), "eval_strategy to 'steps'"),
    "patience of none": (dict(early_stopping_patience=0, eval_strategy="steps"), "1 or more"),
    "metrics batch by batch": (dict(batch_eval_metrics=True), "batch_eval_metrics.*Leave"),
    "smoothing of no labels": (dict(label_smoothing_factor=.1), "label_smoothing_factor.*Leave")}


@pytest.mark.parametrize("case", BAD)
def test_a_trainer_says_it_in_a_sentence(case, trainer, monkeypatch):
    "Not after the first step, and not with a traceback of a library."
    settings, said = BAD[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(WatchedTrainer, "training_step", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(InputError, match=said): trainer(**settings).train()


def test_arguments_of_transformers_are_refused_by_name(world, tmp_path):
    with pytest.raises(InputError, match="args is a TrainingArguments. Give a CalibrationConfig"):
        CalibrationTrainer(str(world["policy"]), TrainingArguments(str(tmp_path)))


def test_a_folder_is_enough_for_a_trainer(trainer):
    "No `config.model` is needed where the model is a folder."
    trained = trainer(max_steps=1)
    assert trained.args.model is None and trained.train().global_step == 1


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("name, value", [
    ("do_predict", True), ("push_to_hub", True), ("hub_model_id", "me/mine"),
    ("enable_jit_checkpoint", True), ("save_only_model", True), ("label_names", ["x"]),
    ("remove_unused_columns", True), ("include_for_metrics", ["inputs"]),
    ("eval_do_concat_batches", False), ("logging_nan_inf_filter", True), ("eval_steps", 3),
    ("eval_delay", 2), ("metric_for_best_model", "loss"), ("early_stopping_threshold", .1),
    ("activation_checkpointing_kwargs", {"use_reentrant": False}), ("eval_strategy", "epoch"),
    ("resume_from_checkpoint", "nowhere")])
def test_a_stage_takes_no_setting_that_does_nothing(stage, name, value, world, tmp_path):
    more = {"eval_share": 0.} if name == "eval_strategy" else {}
    given = settings_of(stage, world, **more, **{name: value})
    config = find_stage(stage).config_class(**given, output_dir=str(tmp_path/"out"))
    said = "no held-out rows" if name == "eval_strategy" else f"{name} is "
    with pytest.raises(InputError, match=said): check_training(config)
    with pytest.raises(InputError, match=said): load_object(find_stage(stage).run)(config)
    assert not (tmp_path/"out").exists()


def test_a_run_resumes_from_the_checkpoint_that_is_named(world, tmp_path):
    given = dict(save_steps=2, keep_checkpoints=True, save_total_limit=None)
    run("sft", world, tmp_path/"out", **given)
    before = load_file(tmp_path/"out"/"model"/"model.safetensors")
    fourth = tmp_path/"out"/"checkpoints"/"checkpoint-4"
    for name in ("checkpoint-4", str(fourth)):
        stamp = (fourth.parent/"checkpoint-6"/"model.safetensors").stat().st_mtime_ns
        run("sft", world, tmp_path/"out", **given, resume_from_checkpoint=name)
        assert (fourth.parent/"checkpoint-6"/"model.safetensors").stat().st_mtime_ns > stamp
        after = load_file(tmp_path/"out"/"model"/"model.safetensors")
        for key in before: torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


def test_dropping_the_last_batch_drops_no_held_out_row(world, tmp_path):
    summary = run("reward", world, tmp_path/"out", dataloader_drop_last=True, eval_share=.5,
                  per_device_eval_batch_size=4)
    assert summary["pairs"] == 10
