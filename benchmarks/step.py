"A training step: TRL's `DPOTrainer`, padded rows in plain PyTorch, and ours."
import torch
from datasets import Dataset, disable_progress_bars

from vcb_nb.artifacts import InputError
from vcb_nb.batches import candidate_rows, pad_rows
from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer
from vcb_nb.logprobs import candidate_logps
from vcb_nb.losses import preference_loss
from vcb_nb.loading import as_dtype

from .common import (EOS, World, alternate, best_rate, emit, make_world, matmul_calls,
                     peak_growth, records, run)
from .flops import expected_memory, needed_flops

WAYS = ("trl", "naive", "rows", "shared")


# --- the naive way ----------------------------------------------------------------------------

def naive_logps(model, prompt_ids:list, completion_ids:list)->torch.Tensor: # [prompts, n]
    "What one writes first: every row in full, all logits, log_softmax, gather, a mask."
    pairs = candidate_rows(prompt_ids, completion_ids)
    device = next(model.parameters()).device
    ids, attention = (x.to(device) for x in pad_rows([[*p, *c] for p, c in pairs]))
    logps = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, ids[:, 1:, None])[..., 0]
    start = torch.tensor([[len(p)] for p, _ in pairs], device=device)
    place = torch.arange(1, ids.shape[1], device=device)
    totals = (picked * ((place >= start) & (attention[:, 1:] == 1))).sum(1)
    return totals.view(len(prompt_ids), -1)


def naive_step(world:World):
    "Forward, VCB's loss, backward."
    model, device = world.twin(), world.settings.device
    rewards, ref = (torch.tensor(x, device=device) for x in (world.rewards, world.ref_logps))
    def step():
        with world.settings.autocast():
            logps = naive_logps(model, world.prompt_ids, world.completion_ids)
        loss = preference_loss("vcb", logps.float(), ref, rewards, sigma=rewards.std(1)).mean()
        loss.backward()
        return loss.item()
    return step


# --- trainers -----------------------------------------------------------------------------------

def trainer_options(world:World, batch:int)->dict:
    "What both trainers are given; the rest are their own defaults."
    s = world.settings
    return dict(output_dir=world.folder.name, per_device_train_batch_size=batch,
                bf16=as_dtype(s.dtype) is torch.bfloat16, use_cpu=s.device == "cpu",
                gradient_checkpointing=s.checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                report_to="none", disable_tqdm=True)


def trainer_step(trainer):
    "One whole `training_step` on the batch that the trainer's own loader and collator make."
    model = trainer.accelerator.prepare_model(trainer.model)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1 # `train` sets it
    return lambda: trainer.training_step(model, dict(inputs)).item()


def our_trainer(world:World, way:str):
    "A `CalibrationTrainer` with VCB on the scored candidates."
    ids = dict(prompt_ids=world.prompt_ids, completion_ids=world.completion_ids)
    data = Dataset.from_dict({**ids, "rewards": world.rewards, "ref_logps": world.ref_logps})
    args = CalibrationConfig(**trainer_options(world, len(data)), way=way)
    return CalibrationTrainer(world.twin(), args, data, processing_class=world.tokenizer)


def pairs_of_texts(world:World)->Dataset:
    "The responses of each prompt as n/2 pairs, the better one first; TRL adds the EOS."
    if world.settings.n % 2:
        raise InputError(f"n is {world.settings.n}, and TRL takes pairs. Give an even n, or leave "
                         "trl out of the ways.")
    text = lambda ids: " ".join(f"t{i}" for i in ids if i)
    rows = []
    for prompt, responses, rewards in zip(world.prompt_ids, world.completion_ids, world.rewards):
        for i in range(0, len(responses), 2):
            best, other = (i, i + 1) if rewards[i] >= rewards[i + 1] else (i + 1, i)
            rows.append({"prompt": text(prompt), "chosen": " " + text(responses[best]) + EOS,
                         "rejected": " " + text(responses[other]) + EOS})
    return Dataset.from_list(rows)


def trl_trainer(world:World):
    "TRL's `DPOTrainer`, which computes its reference log-probs before the first step."
    import trl
    disable_progress_bars()
    data = pairs_of_texts(world)
    args = trl.DPOConfig(**trainer_options(world, len(data)), precompute_ref_log_probs=True,
                         max_length=None)
    return trl.DPOTrainer(world.twin(), args=args, train_dataset=data,
                          processing_class=world.tokenizer)


def step_call(world:World, way:str):
    "A function that runs one step; it leaves the gradients."
    if way == "naive": return naive_step(world)
    return trainer_step(trl_trainer(world) if way == "trl" else our_trainer(world, way))


# --- log-probs alone ------------------------------------------------------------------------------

def logps_call(world:World, way:str):
    "Forward and backward of the log-probs, without trainer and loss."
    model, ids = world.twin(), (world.prompt_ids, world.completion_ids)
    def call():
        with world.settings.autocast():
            if way == "naive": logps = naive_logps(model, *ids)
            else: logps = candidate_logps(model, *ids, way=way)
        logps.sum().backward()
    return call


def measure_calls(bench:str, world:World, calls:dict)->list:
    "Time calls and matrix products in one rotation, then the memory of each call."
    s = world.settings
    tokens = s.prompts * (s.prompt + sum(s.lengths()) - s.n)
    products, flops = matmul_calls(s, tokens)
    times = alternate({**calls, **products}, s, world.free)
    peaks = {}
    for way, call in calls.items():
        peaks[way] = peak_growth(call, s)
        world.free()
    needed = needed_flops(world.model, world.prompt_ids, world.completion_ids)
    expected = expected_memory(world.model, tokens, s.checkpointing) / 1e6
    return records(bench, s, {way: times[way] for way in calls}, flops=needed,
                   rate=best_rate(times, flops), peaks=peaks,
                   **({"expected_mb": expected} if s.device.startswith("cuda") else {}))


def measure(s):
    world, ways = make_world(s), s.chosen(WAYS)
    emit(measure_calls("step", world, {way: step_call(world, way) for way in ways}), s)
    ways = [way for way in ways if way != "trl"]
    if ways: emit(measure_calls("logps", world, {way: logps_call(world, way) for way in ways}), s)


if __name__ == "__main__": run("benchmarks.step", measure)
