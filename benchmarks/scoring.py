"Reference log-probs and rewards of scored candidates, without gradients."
from vcb_nb.judges import reward_scores, row_scores
from vcb_nb.loading import new_reward_model
from vcb_nb.logprobs import score_logps
from vcb_nb.batches import evaluating
from vcb_nb.saving import save_model

from .common import (World, alternate, best_rate, emit, make_world, matmul_calls, peak_growth,
                     records, run)
from .flops import needed_flops
from .step import naive_logps

WAYS = ("naive", "rows", "shared")


def reference_call(world:World, way:str):
    "log π(y|x) of every candidate."
    model, ids = world.twin(), (world.prompt_ids, world.completion_ids)
    def call():
        with world.settings.autocast():
            if way != "naive": return score_logps(model, *ids, way=way)
            with evaluating(model): return naive_logps(model, *ids).tolist()
    return call


def reward_model(world:World):
    "A reward model on the policy's trunk."
    path = save_model(world.model, world.tokenizer, world.folder.name + "/policy")
    return new_reward_model(path, world.tokenizer, device=world.settings.device)


def reward_call(world:World, model, way:str):
    "The reward of every candidate; the naive way is one batch of padded rows."
    ids = world.prompt_ids, world.completion_ids
    def call():
        with world.settings.autocast():
            if way != "naive": return reward_scores(model, *ids, way=way)
            with evaluating(model): return row_scores(model, *ids).tolist()
    return call


def measure_task(bench:str, world:World, calls:dict, needed:int)->list:
    "Time, share of the machine's rate, and memory."
    s = world.settings
    products, flops = matmul_calls(s, s.prompts * (s.prompt + sum(s.lengths())))
    times = alternate({**calls, **products}, s)
    peaks = {way: peak_growth(call, s) for way, call in calls.items()}
    return records(bench, s, {way: times[way] for way in calls}, flops=needed,
                   rate=best_rate(times, flops), peaks=peaks)


def measure(s):
    world, ways = make_world(s, references=False), s.chosen(WAYS)
    ids, judge = (world.prompt_ids, world.completion_ids), reward_model(world)
    calls = {way: reference_call(world, way) for way in ways}
    rows = measure_task("reference", world, calls, needed_flops(world.model, *ids, backward=False))
    needed = needed_flops(judge, *ids, backward=False, whole=True)
    calls = {way: reward_call(world, judge, way) for way in ways}
    emit(rows + measure_task("reward", world, calls, needed), s)


if __name__ == "__main__": run("benchmarks.scoring", measure)
