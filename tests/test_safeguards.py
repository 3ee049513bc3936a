"""What a training run must not do: keep numbers that are not finite, lose its work to a signal, or
take a setting that does nothing."""
import json, os, signal

import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from bad_inputs import RIGHT, build_world
from vcb_nb.artifacts import InputError
from vcb_nb.cli import main
from vcb_nb.loading import load_policy, load_reward_model
from vcb_nb.settings import load_object
from vcb_nb.stages import find_stage
from vcb_nb.training import WatchedTrainer, is_complete, last_checkpoint

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
    words = [w for k, v in given.items() for w in (f"--{k}", json.dumps(v))]
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
