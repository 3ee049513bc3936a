"n samples of every prompt: `generate` one at a time, `generate` on n rows, and ours."
import statistics

import torch

from vcb_nb.batches import evaluating
from vcb_nb.sample import sample_candidates

from .common import COLUMNS, World, alternate, emit, make_world, peak_growth, records, run

WAYS = ("single", "naive", "shared")


def generated(model, world:World, rows:int, times:int)->int: # tokens made
    "`generate` with `rows` samples at once, `times` times for every prompt."
    s, pad = world.settings, world.tokenizer.pad_token_id
    made = 0
    for prompt in world.prompt_ids:
        ids = torch.tensor([prompt], device=s.device)
        for _ in range(times):
            # As ours does: plain sampling, and the padding id is never drawn.
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                                 top_k=0, max_new_tokens=max(s.lengths()), pad_token_id=pad,
                                 suppress_tokens=[pad], num_return_sequences=rows)
            made += int((out[:, len(prompt):] != pad).sum())
    return made


def sampled(model, world:World)->int: # tokens made
    "`sample_candidates`: each prompt is read once, and its cache repeated."
    s = world.settings
    drawn = sample_candidates(model, world.tokenizer, world.prompt_ids, s.n,
                              max_new_tokens=max(s.lengths()))
    return sum(len(c) for cs in drawn.completion_ids for c in cs)


def sample_call(world:World, way:str, made:list):
    "A function that draws all samples and notes in `made` how many tokens they have."
    n, model = world.settings.n, world.twin()
    def call():
        with world.settings.autocast(), evaluating(model):
            if way == "shared": made.append(sampled(model, world))
            else: made.append(generated(model, world, *((1, n) if way == "single" else (n, 1))))
    return call


def measure(s):
    world, ways = make_world(s, references=False), s.chosen(WAYS)
    made = {way: [] for way in ways}
    calls = {way: sample_call(world, way, made[way]) for way in ways}
    times = alternate(calls, s)
    rows = records("sampling", s, times, peaks={way: peak_growth(calls[way], s) for way in ways})
    for row in rows: # samples end where they end, so speed is tokens a second
        rounds = zip(made[row["way"]][1:], times[row["way"]]) # the first was the warm-up
        row["tokens_per_second"] = statistics.median(count / taken for count, taken in rounds)
    rate = {row["way"]: row["tokens_per_second"] for row in rows}
    for row in rows:
        if "naive" in rate: row["speedup_vs_naive"] = rate[row["way"]] / rate["naive"]
    emit(rows, s, (*COLUMNS, "tokens_per_second"))


if __name__ == "__main__": run("benchmarks.sampling", measure)
