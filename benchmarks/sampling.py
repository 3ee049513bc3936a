"n samples of every prompt: `generate` in three ways, ours, and vLLM where it is installed."
import json, os, statistics, subprocess, sys
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vcb_nb.artifacts import InputError
from vcb_nb.batches import evaluating
from vcb_nb.decoding import quick_products
from vcb_nb.sample import sample_candidates

from .common import (COLUMNS, Settings, World, alternate, emit, make_world, option, peak_growth,
                     record, records, run)
from .scaling import axis_of, fit

WAYS = ("single", "naive", "generate", "shared")
BATCH = 4 # prompts of a batch of `generate`, as a user runs it


@dataclass(frozen=True)
class SamplingSettings(Settings):
    "What is sampled, and how it grows."
    points: list[str] | None = option(None,
        "Sizes to try one after the other, like n=2,4,8 or prompt=100,200,400, with fitted slopes.")
    vllm_python: str | None = option(None,
        "Python of an environment with vLLM: it draws the same number of samples, in fp32.")


# --- the ways -----------------------------------------------------------------------------------

def generated(model, world:World, n:int, times:int, batch:int=1)->int: # tokens made
    "`generate` with n samples of each prompt of a batch, `times` times."
    s, pad, made = world.settings, world.tokenizer.pad_token_id, 0
    for start in range(0, len(world.prompt_ids), batch):
        prompts = world.prompt_ids[start:start + batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=s.device)
        for _ in range(times):
            # As ours does: plain sampling, and the padding id is never drawn.
            out = model.generate(ids, attention_mask=(ids != pad).long(), do_sample=True,
                                 top_k=0, max_new_tokens=max(s.lengths()), pad_token_id=pad,
                                 suppress_tokens=[pad], num_return_sequences=n)
            made += int((out[:, width:] != pad).sum())
    return made


def sampled(model, world:World)->int: # tokens made
    "`sample_candidates`: each prompt is read once, and its keys and values are kept once."
    s = world.settings
    drawn = sample_candidates(model, world.tokenizer, world.prompt_ids, s.n,
                              max_new_tokens=max(s.lengths()))
    return sum(len(c) for cs in drawn.completion_ids for c in cs)


def sample_call(world:World, way:str, made:list):
    "A function that draws all samples and notes in `made` how many tokens they have."
    n, model = world.settings.n, world.twin()
    settings = dict(single=(1, n), naive=(n, 1), generate=(n, 1, BATCH))
    def call():
        with world.settings.autocast(), evaluating(model):
            if way == "shared": made.append(sampled(model, world))
            else: made.append(generated(model, world, *settings[way]))
    return call


# --- what its products allow ----------------------------------------------------------------------

def products(world:World, rows:int, head:bool):
    "A function that runs every linear layer once, on `rows` random rows, and the vocabulary head."
    top = world.model.get_output_embeddings()
    layers = [m for m in world.model.modules() if isinstance(m, (nn.Linear, Conv1D))
              and (head or m is not top)]
    width = lambda m: m.in_features if isinstance(m, nn.Linear) else m.weight.shape[0]
    inputs = {size: torch.randn(rows, size, device=world.settings.device)
              for size in set(map(width, layers))}
    def call():
        with world.settings.autocast(), torch.no_grad(), quick_products(world.model):
            for m in layers: m(inputs[width(m)])
    return call


def product_calls(world:World)->tuple: # two calls, and how many rows each has
    "The products of reading prompts, and of one token of every sample of a batch."
    s, batch = world.settings, 16 # of `sample_candidates`
    rows = dict(read=s.prompt * min(s.prompts, BATCH), step=s.n * min(s.prompts, batch))
    return {name: products(world, rows[name], name == "step") for name in rows}, rows


def needed_seconds(s, times:dict, rows:dict, made:int)->float:
    "The least that the products take: the tokens of each prompt, and all but one of a sample's."
    each = {name: statistics.median(times[name]) / rows[name] for name in rows}
    return each["read"] * s.prompts * s.prompt + each["step"] * (made - s.prompts * s.n)


# --- vLLM ---------------------------------------------------------------------------------------

VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    engine = LLM(model=job["folder"], dtype="float32", max_model_len=job["length"],
                 enforce_eager=True, enable_prefix_caching=True)
    params = SamplingParams(n=job["n"], max_tokens=job["new"], temperature=1., seed=0,
                            detokenize=False)
    def draw(prompts):
        start = time.perf_counter()
        answers = engine.generate([{"prompt_token_ids": p} for p in prompts], params,
                                  use_tqdm=False)
        made = sum(len(o.token_ids) for a in answers for o in a.outputs)
        return time.perf_counter() - start, made
    draw([job["warm_up"]])
    json.dump([draw(job["prompts"]) for _ in range(2)], open(sys.argv[2], "w"))
"""

def vllm_runs(world:World)->dict: # way -> (seconds, tokens made)
    "vLLM in a process of its own: its first run, then one whose prompts are in its prefix cache."
    s = world.settings
    with TemporaryDirectory() as folder:
        world.model.save_pretrained(f"{folder}/model")
        world.tokenizer.save_pretrained(f"{folder}/model")
        new = max(s.lengths())
        job = dict(folder=f"{folder}/model", length=s.prompt + new, n=s.n, new=new,
                   prompts=world.prompt_ids, warm_up=world.prompt_ids[0][::-1])
        for name, text in (("job.json", json.dumps(job)), ("run.py", VLLM)):
            with open(f"{folder}/{name}", "w", encoding="utf-8") as file: file.write(text)
        # One process, as the library runs it.
        threads = dict(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="2",
                       VLLM_ENABLE_V1_MULTIPROCESSING="0",
                       OMP_NUM_THREADS=str(torch.get_num_threads()))
        done = subprocess.run([s.vllm_python, f"{folder}/run.py", f"{folder}/job.json",
                               f"{folder}/out.json"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env={**threads, **os.environ})
        if done.returncode: raise InputError(f"vLLM failed: {done.stdout[-2000:]}")
        with open(f"{folder}/out.json", encoding="utf-8") as file: runs = json.load(file)
    return dict(zip(("vllm", "vllm_warm"), runs))


# --- lines --------------------------------------------------------------------------------------

def measure_ways(s)->list:
    "The records of one size."
    world, ways = make_world(s, references=False), s.chosen(WAYS)
    made = {way: [] for way in ways}
    calls = {way: sample_call(world, way, made[way]) for way in ways}
    shapes, rows = product_calls(world)
    times = alternate({**calls, **shapes}, s)
    lines = records("sampling", s, {way: times[way] for way in ways},
                    peaks={way: peak_growth(calls[way], s) for way in ways})
    for line in lines: # samples end where they end, so speed is tokens per second
        way = line["way"]
        rounds = list(zip(made[way][1:], times[way])) # the first was the warm-up
        line["tokens_per_second"] = statistics.median(count / taken for count, taken in rounds)
        line["share_of_products"] = statistics.median(
            needed_seconds(s, times, rows, count) / taken for count, taken in rounds)
    return with_ratios(lines + (vllm_records(world) if s.vllm_python else []))


def vllm_records(world:World)->list:
    "The records of vLLM; none where it fails, so that what has been measured is not lost."
    try: runs = vllm_runs(world)
    except InputError as e:
        print(e, file=sys.stderr)
        return []
    return [record("sampling", world.settings, way, [taken], tokens_per_second=count / taken)
            for way, (taken, count) in runs.items()]


def with_ratios(lines:list)->list:
    "The lines, with tokens per second compared."
    rate = {line["way"]: line["tokens_per_second"] for line in lines}
    for line in lines:
        for way in ("naive", "generate", "vllm"):
            ratio = rate[line["way"]] / rate[way] if way in rate else None
            if way == "naive" or ratio: line[f"speedup_vs_{way}"] = ratio
    return lines


def measure(s):
    more = ("speedup_vs_generate", "share_of_products", "tokens_per_second")
    columns = (*COLUMNS[:5], *more[:2], "peak_mb", more[2])
    if not s.points: return emit(measure_ways(s), s, columns)
    found = []
    for axis, values in map(axis_of, s.points):
        lines = [{**line, "axis": axis, "value": value} for value in values
                 for line in measure_ways(replace(s, **{axis: value}))]
        emit(lines, s, ("axis", "value", *columns[2:]))
        for way in s.chosen(WAYS):
            line = fit([line for line in lines if line["way"] == way], "value")
            if line: found.append(record("sampling_fit", s, way, [], axis=axis, **line))
    if found: emit(found, s, ("way", "axis", "slope", "intercept", "r2"))


if __name__ == "__main__": run("benchmarks.sampling", measure, SamplingSettings)
