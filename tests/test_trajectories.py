"""Thirty optimizer steps taken in two ways that must agree at every step: losses, gradient norms,
and the log-probs (or scores) of the model that is left.

The weights are float64, so that a way that is the same up to the order of its sums stays within
rounding for the whole run, and no bug hides in a tolerance.
"""
import json, os, random, subprocess, sys
from functools import cache
from pathlib import Path

import pytest, torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from vcb_nb import reward, sft
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import write_jsonl
from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer
from vcb_nb.data import encode_completion, encode_prompt
from vcb_nb.judges import reward_scores
from vcb_nb.loading import load_policy, load_reward_model, new_reward_model
from vcb_nb.logprobs import candidate_logps, score_logps
from vcb_nb.models import new_policy
from vcb_nb.packing import HEAD_BYTES, PackedCandidates
from vcb_nb.reward import RewardConfig
from vcb_nb.saving import save_model
from vcb_nb.sft import SFTConfig
from vcb_nb.shards import leave_group
from vcb_nb.loading import load_tokenizer
from vcb_nb.training import checkpoint_args, read_curve, run_training

STEPS, SIZE, ROWS = 30, 8, 21 # 21 = 8 + 8 + 5: every third step is short
WORDS = ("soup", "room", "bed", "film", "story", "waiter", "harbour", "bread")
LORA = {"r": 4, "lora_dropout": 0.}
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
            initializer_range=.2)
SETTINGS = dict(max_steps=STEPS, per_device_train_batch_size=SIZE, learning_rate=1e-3,
                logging_steps=1, warmup_steps=0, save_strategy="no", use_cpu=True,
                disable_tqdm=True, keep_checkpoints=True)

# The Trainer adds up the loss of a step in fp32: eight roundings of 2^-24 are 5e-7.
LOSS = dict(rtol=1e-6, atol=1e-7)
# The rest is float64. Another order of a sum rounds by 1e-16; after 30 steps of Adam, which divides
# by small gradients, up to 5e-14 was seen in the policies and 5e-12 in the rewards.
EXACT = dict(rtol=1e-10, atol=1e-10)
# transformers rounds the logits of padded rows to fp32, also those of a float64 model.
ROUNDED = {"sft": dict(rtol=1e-6, atol=1e-5)}


# ---------------------------------------------------------------- a run

def text_rows():
    "Prompts and completions of many lengths; the better of two says good."
    rng, rows = random.Random(0), []
    for i in range(ROWS):
        prompt = f"How was the {rng.choice(WORDS)} " + "and so on " * rng.choice((0, 1, 3)) + "?"
        say = lambda word: " It was " + " and ".join([word] * rng.choice((1, 1, 2, 4))) + "."
        rows.append(dict(prompt=f"{i}. {prompt}", completion=say(rng.choice(WORDS)),
                         chosen=say("good"), rejected=say("dull")))
    return rows


def candidate_rows(model):
    "Scored candidates: 2 to 4 a prompt, 1 to 7 tokens each, rewards drawn, log-probs of `model`."
    rng = random.Random(1)
    tokens = lambda low, high: [rng.randrange(2, 250) for _ in range(rng.randint(low, high))]
    prompts = [tokens(1, 12) for _ in range(ROWS)]
    completions = [[tokens(0, 6) + [0] for _ in range(rng.randint(2, 4))] for _ in range(ROWS)]
    rewards = [[rng.gauss(0, 1) for _ in cs] for cs in completions]
    columns = zip(prompts, completions, rewards, score_logps(model, prompts, completions))
    return [dict(zip(("prompt_ids", "completion_ids", "rewards", "ref_logps"), row))
            for row in columns]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    "A random model, and the data of the three stages."
    folder = tmp_path_factory.mktemp("trajectories")
    model = new_policy(tiny_tokenizer, seed=1, **TINY)
    save_model(model, tiny_tokenizer, folder/"model")
    write_jsonl(folder/"texts.jsonl", text_rows())
    write_jsonl(folder/"candidates.jsonl", candidate_rows(model.double()))
    return folder


def read_rows(file): return [json.loads(line) for line in open(file, encoding="utf-8")]


def calibration_trainer(files, out, dtype, callbacks, n=ROWS, **options):
    config = CalibrationConfig(str(out), loss_params={"gamma": .5}, **options)
    rows = Dataset.from_list(read_rows(files/"candidates.jsonl")[:n])
    return config, CalibrationTrainer(
        load_policy(files/"model", dtype), checkpoint_args(config), rows,
        processing_class=load_tokenizer(files/"model"), callbacks=callbacks)


def sft_trainer(files, out, dtype, callbacks, **options):
    config = SFTConfig(output_dir=str(out), model=str(files/"model"), eval_share=0, max_length=128,
                       max_prompt_length=64, data=str(files/"texts.jsonl"), dtype=dtype, **options)
    model, tokenizer = sft._make_model(config)
    rows, _ = sft.sft_datasets(config, tokenizer)
    return config, sft.sft_trainer(config, model, tokenizer, rows, callbacks=callbacks)


def reward_trainer(files, out, dtype, callbacks, **options):
    config = RewardConfig(output_dir=str(out), model=str(files/"model"), eval_share=0, dtype=dtype,
                          max_prompt_length=64, max_length=128, pairs=str(files/"texts.jsonl"),
                          **options)
    tokenizer = load_tokenizer(config.model)
    model = new_reward_model(config.model, tokenizer, seed=config.seed) # the same head in any dtype
    rows, _, _ = reward.reward_datasets(config, tokenizer)
    model = add_lora(model, config.peft_config)
    return config, reward.reward_trainer(config, model, tokenizer, rows, callbacks=callbacks)


STAGES = {"calibrate": calibration_trainer, "sft": sft_trainer, "reward": reward_trainer}


def train(stage, files, out, dtype="float64", callbacks=None, **options):
    "Run a stage on its rows; the trainer is returned."
    config, trainer = STAGES[stage](files, out, dtype, callbacks, **{**SETTINGS, **options})
    trainer.model.to(getattr(torch, dtype)) # adapters too
    run_training(trainer, config, stage)
    return trainer


def ids_of(rows): return [[row[key] for row in rows] for key in ("prompt_ids", "completion_ids")]


def judged(stage, files, model):
    "The sequence log-probs of the candidates, or the rewards of both sides of each pair."
    if stage != "reward":
        rows = read_rows(files/"candidates.jsonl")
        found = score_logps(model, *ids_of(rows))
    else:
        rows, tokenizer = read_rows(files/"texts.jsonl"), load_tokenizer(files/"model")
        sides = [[encode_completion(tokenizer, r[k])[0] for k in ("chosen", "rejected")]
                 for r in rows]
        found = reward_scores(model, [encode_prompt(tokenizer, r["prompt"]) for r in rows], sides)
    return torch.tensor(sum(found, []), dtype=torch.float64)


def trajectory(stage, files, out, dtype="float64"):
    "What a run left in its folder: losses and gradient norms of its steps, values at its end."
    load = load_reward_model if stage == "reward" else load_policy
    curve = lambda key: torch.tensor(read_curve(out, key)[1], dtype=torch.float64)
    return dict(loss=curve("loss"), grad_norm=curve("grad_norm"),
                end=judged(stage, files, load(out/"model", dtype)))


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    "One trajectory per stage, in float64, one batch a step and one process."
    @cache
    def run(stage):
        out = tmp_path_factory.mktemp("base")
        train(stage, files, out)
        return trajectory(stage, files, out)
    return run


def assert_same(ours, theirs, exact=EXACT):
    assert len(ours["loss"]) == len(ours["grad_norm"]) == STEPS
    for key, tolerance in (("loss", LOSS), ("grad_norm", exact), ("end", exact)):
        torch.testing.assert_close(ours[key], theirs[key], **tolerance,
                                   msg=lambda text, key=key: f"{key}: {text}")


# ---------------------------------------------------------------- the same run in other ways

@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation(base, files, tmp_path, stage):
    "Pitfall 14: eight prompts at once or one at a time, and five in the short steps."
    train(stage, files, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=SIZE)
    assert_same(trajectory(stage, files, tmp_path), base(stage))


@pytest.mark.parametrize("stage, reentrant", [(stage, False) for stage in STAGES]
                         + [("calibrate", True)])
def test_checkpointing(base, files, tmp_path, stage, reentrant):
    "Pitfall 13: a backward that runs the forward again sees the same layout, labels and weights."
    train(stage, files, tmp_path, gradient_checkpointing=True,
          gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(trajectory(stage, files, tmp_path), base(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_rows(base, files, tmp_path, stage):
    "Pitfall 6: packed rows, prompts computed once, and padded rows train the same model."
    batch = next(iter(train(stage, files, tmp_path, way="rows").get_train_dataloader()))
    assert not isinstance(batch.get("batch"), PackedCandidates)
    assert_same(trajectory(stage, files, tmp_path), base(stage), ROUNDED.get(stage, EXACT))


class Killed(Exception): "What stands for a kill."


class KillAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 14: raise Killed


@pytest.mark.parametrize("stage", STAGES)
def test_resumed(base, files, tmp_path, stage):
    """A run killed at step 14 goes on from step 10, within an epoch, and repeats every bit:
    weights, optimizer, schedule, order of the rows, log."""
    saved = dict(save_strategy="steps", save_steps=10)
    with pytest.raises(Killed): train(stage, files, tmp_path, callbacks=[KillAt()], **saved)
    assert not (tmp_path/"model").exists()
    train(stage, files, tmp_path, **saved)
    ours, theirs = trajectory(stage, files, tmp_path), base(stage)
    for key in ours: torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=key)


# The largest deviations seen, times five: of a loss, a gradient norm, a value at the end.
FP32 = {"calibrate": (7e-6, 1.6e-4, 5e-5), "sft": (5e-6, 1.5e-6, 4e-5),
        "reward": (1e-6, 4e-5, 1.2e-5)}


@pytest.mark.parametrize("stage", STAGES)
def test_fp32(base, files, tmp_path, stage):
    "Training in fp32 follows float64: no sum over tokens, candidates or steps loses its digits."
    train(stage, files, tmp_path, dtype="float32")
    ours, theirs = dict(trajectory(stage, files, tmp_path, "float32")), dict(base(stage))
    if stage == "reward":
        # The loss sees gaps of rewards alone. The gradient of their common level is nothing but
        # rounding, and Adam makes steps of the learning rate of it, other ones on every processor.
        for run in (ours, theirs): run["end"] = run["end"] - run["end"].mean()
    for key, bound in zip(ours, FP32[stage]):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=bound, msg=key)


# ---------------------------------------------------------------- LoRA

@pytest.fixture(scope="module")
def lora(files, tmp_path_factory):
    "Per stage, the trainer of a LoRA run in one batch, and its trajectory."
    @cache
    def run(stage):
        out = tmp_path_factory.mktemp("lora")
        trainer = train(stage, files, out, peft_config=LORA)
        return trainer, trajectory(stage, files, out)
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_merged(lora, files, stage):
    "The folder that a LoRA run leaves, merged, judges as the live adapter does."
    trainer, merged = lora(stage)
    assert any("lora_B" in name for name, _ in trainer.model.named_parameters())
    torch.testing.assert_close(judged(stage, files, trainer.model), merged["end"], **EXACT)


@pytest.mark.parametrize("options", [
    dict(way="rows"), dict(per_device_train_batch_size=1, gradient_accumulation_steps=SIZE),
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})],
    ids=["rows", "accumulation", "checkpointing"])
def test_lora(lora, files, tmp_path, options):
    "Pitfall 13: a frozen head and frozen embeddings change neither the layout nor the sums."
    train("calibrate", files, tmp_path, peft_config=LORA, **options)
    assert_same(trajectory("calibrate", files, tmp_path), lora("calibrate")[1])


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_lora_in_rows(lora, files, tmp_path, stage):
    "The same; a score head, which is trained in full, has a module of peft's around it."
    train(stage, files, tmp_path, peft_config=LORA, way="rows")
    assert_same(trajectory(stage, files, tmp_path), lora(stage)[1], ROUNDED.get(stage, EXACT))


# ---------------------------------------------------------------- more of calibration

@pytest.mark.slow
def test_compiled(base, files, tmp_path):
    "A compiled model takes rows, which have no layout to compile for, and its first step agrees."
    trainer = train("calibrate", files, tmp_path, torch_compile=True, max_steps=1,
                    torch_compile_backend="eager")
    assert trainer.way == "rows"
    ours, theirs = trajectory("calibrate", files, tmp_path), base("calibrate")
    for key, tolerance in (("loss", LOSS), ("grad_norm", EXACT)):
        torch.testing.assert_close(ours[key], theirs[key][:1], **tolerance)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(n=st.integers(2, 9), size=st.integers(1, 4), accumulate=st.integers(2, 4))
def test_any_split_into_micro_batches(files, tmp_path_factory, n, size, accumulate):
    "Pitfall 14: prompts count alike however many they are, and however a step is cut."
    out = tmp_path_factory.mktemp("split")
    few = dict(n=n, max_steps=3)
    train("calibrate", files, out/"whole", per_device_train_batch_size=size * accumulate, **few)
    train("calibrate", files, out/"split", per_device_train_batch_size=size,
          gradient_accumulation_steps=accumulate, **few)
    whole, split = (trajectory("calibrate", files, out/name) for name in ("whole", "split"))
    for key, tolerance in (("loss", LOSS), ("grad_norm", EXACT), ("end", EXACT)):
        torch.testing.assert_close(split[key], whole[key], **tolerance)


# ---------------------------------------------------------------- two processes

TWO = {"calibrate": dict(per_device_train_batch_size=4),
       "calibrate, accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
       "sft": dict(per_device_train_batch_size=4), "reward": dict(per_device_train_batch_size=4)}


SHARDED = [(checkpointing, head_bytes) for checkpointing in (None, False, True)
           for head_bytes in (HEAD_BYTES, 1)] # checkpointing: none, or its use_reentrant


def values_and_gradients(model, rows, way, head_bytes=HEAD_BYTES):
    "Log-probs of the candidates, and the gradient of a weighted sum of them, whole."
    logps = candidate_logps(model.train(), *ids_of(rows), way, head_bytes=head_bytes)
    weights = torch.randn(logps.shape, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(0))
    (logps * weights).sum().backward()
    whole = lambda grad: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {"logps": logps.detach()} | {n: whole(p.grad) for n, p in model.named_parameters()}


def sharded(files, checkpointing, head_bytes):
    "The same from a model whose layers, and the rest, lie in shards on two processes."
    model = load_policy(files/"model", "float64")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.gpt_neox.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    rows = read_rows(files/"candidates.jsonl")[:4]
    return values_and_gradients(model, rows, "shared", head_bytes)


def worker(files, out):
    "What each of two processes does, one start for all: every stage, then FSDP."
    torch.set_num_threads(1)
    for name, options in TWO.items():
        train(name.partition(",")[0], files, out/name, **options)
    found = [sharded(files, *case) for case in SHARDED]
    if not torch.distributed.get_rank(): torch.save(found, out/"sharded.pt")
    leave_group()
    sys.stdout.flush()
    os._exit(0) # FSDP's mesh keeps its groups: their threads would outlive the interpreter


@pytest.fixture(scope="module")
def two(files, tmp_path_factory):
    "The folder of the runs of two gloo processes."
    out = tmp_path_factory.mktemp("two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(sft.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, __file__, str(files), str(out)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_processes(base, files, two, name):
    """Pitfall 16: each takes half of a step; in the short ones accelerate repeats rows to make the
    halves even, and a repeated row must not count."""
    stage = name.partition(",")[0]
    assert_same(trajectory(stage, files, two/name), base(stage))


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(SHARDED)), ids=map(str, SHARDED))
def test_fsdp(files, two, case):
    """The head is called inside the root's forward, where its weight is whole; both processes see
    the same rows, so the mean of their gradients is that of the unsharded model."""
    model = load_policy(files/"model", "float64")
    want = values_and_gradients(model, read_rows(files/"candidates.jsonl")[:4], "rows")
    found = torch.load(two/"sharded.pt")[case]
    assert found.keys() == want.keys()
    for name in want: torch.testing.assert_close(found[name], want[name], **EXACT, msg=name)


if __name__ == "__main__": worker(*map(Path, sys.argv[1:]))
