"""The budget beside what a step takes: memory by the allocator and by the system, and time."""
import gc, json, statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from torch.profiler import ProfilerActivity, profile

from vcb_nb.budget import CPU_BLOCK, Work, measure_here, work_memory, work_seconds, work_shape

from .common import Settings, alternate, emit, make_world, peak_growth, record, run
from .step import step_call

COLUMNS = ("arch", "layers", "hidden", "vocab", "n", "prompt", "response", "expected_mb",
           "allocated_mb", "peak_mb", "expected_seconds", "seconds")


def step_work(s:Settings)->Work:
    "What a step of these settings computes."
    lengths = s.lengths()
    lora = {"r": s.lora, "lora_alpha": 2 * s.lora} if s.lora else None
    return Work("train", s.prompts, s.prompt, s.n, statistics.mean(lengths),
                (s.prompt, statistics.mean(lengths)), batch=s.prompts, lora=json.dumps(lora),
                checkpointing=s.checkpointing,
                autocast="bfloat16" if s.dtype == "bfloat16" else None)


def allocated_peak(call)->float: # MB
    "The most that PyTorch has asked for at one time during a call, by its profiler."
    gc.collect() # garbage of an earlier call would count as given back in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e6


def base_config(world):
    "The config of the model without its adapter."
    return getattr(world.model, "get_base_model", lambda: world.model)().config


def expected_growth(world)->float: # MB
    "What the budget gives for the step, without weights and optimizer, which are there before it."
    work = step_work(world.settings)
    found = work_memory(base_config(world), work, block=CPU_BLOCK)
    return (found["peak"] - found["weights"] - found["optimizer"]) / 1e6


def measure_step(s:Settings)->dict:
    "In a fresh process: a warm-up, the timed steps between two measurements, and their peaks."
    world = make_world(s)
    call, work = step_call(world, "shared"), step_work(s)
    shape, peaks = work_shape(base_config(world), work), []
    def foreseen(): return work_seconds(shape, work, measure_here(shape, work, 5))
    before = foreseen()
    times = alternate({"shared": call}, s, world.free)["shared"]
    after = foreseen() # another user of the machine may have come or gone
    for _ in range(s.rounds):
        peaks.append(peak_growth(call, s))
        world.free()
    return dict(times=times, peak=None if None in peaks else statistics.median(peaks),
                allocated_mb=allocated_peak(call), expected_mb=expected_growth(world),
                expected_seconds=(before + after) / 2)


def measure(s):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(measure_step, s).result()
    times, peak = found.pop("times"), found.pop("peak")
    emit([record("budget", s, "shared", times, peak=peak, **found)], s, COLUMNS)


if __name__ == "__main__": run("benchmarks.budget", measure)
