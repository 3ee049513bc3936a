"Peak memory of a training step, each way in a process of its own."
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .common import Settings, alternate, emit, make_world, peak_growth, records, run
from .step import WAYS, step_call


def measure_way(s:Settings, way:str)->tuple: # seconds of each round, MB
    "In a fresh process: one warm-up step, the timed ones, then as many whose peaks are read."
    world = make_world(s)
    call, peaks = step_call(world, way), []
    times = alternate({way: call}, s, world.free)[way]
    for _ in range(s.rounds):
        peaks.append(peak_growth(call, s))
        world.free()
    return times, None if None in peaks else statistics.median(peaks)


def measure(s):
    times, peaks = {}, {}
    for way in s.chosen(WAYS):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            times[way], peaks[way] = pool.submit(measure_way, s, way).result()
    emit(records("memory", s, times, peaks=peaks), s)


if __name__ == "__main__": run("benchmarks.memory", measure)
