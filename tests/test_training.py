"""What every trained stage shares: which checkpoint is trusted, what may change on resuming, the
split."""
import json, shutil

import pytest, torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState

from vcb_nb.artifacts import InputError
from vcb_nb.training import (MetricsProgress, TrainingDefaults, check_settings,
                             final_loss, held_out_split, is_complete, last_checkpoint, read_curve,
                             remove_checkpoints, remove_incomplete, write_log)


def checkpoint(folder, step, weights="model.safetensors"):
    "The files of a Trainer checkpoint that decide whether it is whole."
    path = folder/f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.arange(100.)}, path/weights)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(100.)}, path/name)
    (path/"trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(file): file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


FAULTS = {
    "no state": lambda c: (c/"trainer_state.json").unlink(),
    "half a state": lambda c: cut(c/"trainer_state.json"),
    "empty state": lambda c: (c/"trainer_state.json").write_text("null"),
    "state of another step": lambda c: (c/"trainer_state.json").write_text('{"global_step": 3}'),
    "no weights": lambda c: (c/"model.safetensors").unlink(),
    "half the weights": lambda c: cut(c/"model.safetensors"),
    "no optimizer": lambda c: (c/"optimizer.pt").unlink(),
    "half an optimizer": lambda c: cut(c/"optimizer.pt"),
    "no schedule": lambda c: (c/"scheduler.pt").unlink(),
    "no random state": lambda c: (c/"rng_state.pth").unlink(),
    "half a random state": lambda c: cut(c/"rng_state.pth"),
    "a shard missing": lambda c: (c/"model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_half_written_checkpoint_is_passed_over(tmp_path, fault):
    whole, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == broken # numeric order, not that of names
    FAULTS[fault](broken)
    assert not is_complete(broken) and last_checkpoint(tmp_path) == whole
    assert remove_incomplete(tmp_path) == ["checkpoint-10"]
    assert not broken.exists() and is_complete(whole)


def test_kill_while_checkpoints_are_deleted(tmp_path, monkeypatch):
    "What remains of them must not be continued: they go in one move, and then file by file."
    config = TrainingDefaults(output_dir=str(tmp_path))
    checkpoint(tmp_path/"checkpoints", 9)

    def killed(*args, **kwargs): raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt): remove_checkpoints(config)
    assert last_checkpoint(tmp_path/"checkpoints") is None


def test_the_log_of_a_resumed_run_has_no_figures_of_its_last_process(tmp_path):
    "The Trainer's closing row sums the loss since the last start only."
    closing = {"step": 1, "train_loss": .1, "train_runtime": 1}
    write_log(tmp_path, [{"step": 1, "loss": 2.}, closing])
    assert (tmp_path/"training_log.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path/"absent") is None
    (tmp_path/"checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None and remove_incomplete(tmp_path) == []


def test_adapter_checkpoint_is_complete(tmp_path):
    assert is_complete(checkpoint(tmp_path, 5, weights="adapter_model.safetensors"))


def test_resuming_with_other_settings_is_refused(tmp_path):
    def check(rows=range(4), folder=tmp_path, **changes):
        config = TrainingDefaults(output_dir=str(folder), **changes)
        check_settings(tmp_path, config, Dataset.from_dict({"x": list(rows)}))

    check()
    checkpoint(tmp_path, 5)
    check(folder="elsewhere", save_steps=7, eval_strategy="epoch", logging_steps=1)
    with pytest.raises(InputError, match="learning_rate: 5e-05 → 0.1"): check(learning_rate=.1)
    with pytest.raises(InputError, match="rows: 4 → 5"): check(range(5))
    with pytest.raises(InputError, match="sample of the rows"): check(range(1, 5))
    shutil.rmtree(tmp_path/"checkpoint-5")
    check(learning_rate=.1) # nothing to resume: anything goes


def test_defaults():
    """Pitfall 15: the Trainer drops no column by default.
    Mixed precision does not need a GPU to be tried."""
    config = TrainingDefaults(output_dir="x", bf16=True)
    assert not config.remove_unused_columns and config.report_to == []
    assert config.use_cpu is not torch.cuda.is_available()
    assert not TrainingDefaults(output_dir="x").logging_nan_inf_filter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_the_run(value):
    state, bar = TrainerState(global_step=12), MetricsProgress(disable=True)
    bar.on_log(None, state, TrainerControl(), logs={"loss": 1.})
    with pytest.raises(InputError, match="step 12.*learning_rate"):
        bar.on_log(None, state, TrainerControl(), logs={"loss": value})


@pytest.mark.parametrize("share", [.001, .1, .5, .99])
def test_split_keeps_prompts_together(share):
    rows = Dataset.from_dict({"prompt": [f"p{i % 37}" for i in range(100)], "i": list(range(100))})
    train, held = held_out_split(rows, share, seed=3)
    assert not set(train["prompt"]) & set(held["prompt"])
    kept, left = list(train["i"]), list(held["i"])
    assert sorted(kept + left) == list(range(100)) and kept and left and kept == sorted(kept)
    assert list(held_out_split(rows, share, seed=3)[1]["i"]) == left


def test_split_edges():
    rows = Dataset.from_dict({"prompt": ["a", "a"]})
    assert held_out_split(rows, 0)[1] is None
    with pytest.raises(InputError, match="eval_share: 0"): held_out_split(rows, .5)
    with pytest.raises(InputError, match="eval_share is 1"): held_out_split(rows, 1.)
    assert len(held_out_split(rows, .5, group=None)[1]) == 1


def test_log_survives_nan_and_gives_curves(tmp_path):
    history = [{"step": s, "loss": 10. - s, "grad_norm": float("nan")} for s in range(1, 11)]
    write_log(tmp_path, [*history, {"step": 10, "eval_loss": .5}])
    assert read_curve(tmp_path) == (tuple(range(1, 11)), tuple(10. - s for s in range(1, 11)))
    assert read_curve(tmp_path, "eval_loss") == ((10,), (.5,))
    assert read_curve(tmp_path, "grad_norm") == ((), ())
    assert final_loss(history) == 0.
    assert final_loss(history, share=.5) == 2.
    assert final_loss([]) is None
