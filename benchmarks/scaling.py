"How time and memory of the log-probs and their gradient grow with n, P, T and the vocabulary."
from dataclasses import dataclass, replace

import numpy as np

from vcb_nb.artifacts import InputError, did_you_mean
from vcb_nb.settings import option

from .common import COLUMNS, Settings, emit, make_world, record, run
from .step import logps_call, measure_calls

WAYS = ("naive", "rows", "shared")
POINTS = {"n": (2, 4, 8, 16, 32), "prompt": (64, 128, 256, 512, 1024, 2048),
          "response": (32, 64, 128, 256, 512), "vocab": (2048, 8192, 32768, 50304)}


@dataclass(frozen=True)
class ScalingSettings(Settings):
    "A smaller model, so that one size after another can be tried."
    layers: int = option(2, "Layers.")
    vocab: int = option(8192, "Size of the vocabulary.")
    response: str = option("96", "Tokens of a response: '96', or '64-128' for uneven ones.")
    rounds: int = option(3, "Rounds; in each, every way runs once.")
    points: list[str] | None = option(None,
        "Sizes to try, like n=2,8,32 or vocab=2048,50304; a standard grid if not given.")

    def grid(self)->dict: # setting -> values
        "The sizes that are tried, one setting at a time around the others."
        return POINTS if self.points is None else dict(map(axis_of, self.points))


def axis_of(text:str)->tuple:
    "'n=2,8' as ('n', (2, 8))."
    name, _, values = text.partition("=")
    if name not in POINTS: raise InputError(f"points has {text!r}. {did_you_mean(name, POINTS)}")
    try: return name, tuple(map(int, values.split(",")))
    except ValueError:
        raise InputError(f"points has {text!r}. Give whole numbers, as in {name}=64,128.") from None


def measure_point(s:Settings, axis:str, value:int, ways:list)->list:
    "The records of one size."
    s = replace(s, **{axis: str(value) if axis == "response" else value})
    world = make_world(s, references=False)
    rows = measure_calls("scaling", world, {way: logps_call(world, way) for way in ways})
    unique = s.prompts * (s.prompt + sum(s.lengths()))
    repeated = s.prompts * (s.n * s.prompt + sum(s.lengths()))
    return [{**row, "axis": axis, "value": value, "unique_tokens": unique,
             "row_tokens": repeated} for row in rows]


def fit(rows:list, tokens:str)->"dict | None": # slope and intercept in seconds, R²
    "Least squares of seconds on a count of tokens; None for fewer than three sizes."
    x, y = (np.array([row[name] for row in rows], dtype=float) for name in (tokens, "seconds"))
    if len(set(x)) < 3: return None
    slope, intercept = np.polyfit(x, y, 1)
    left = ((y - slope * x - intercept)**2).sum() / ((y - y.mean())**2).sum()
    return {"tokens": tokens, "slope": slope, "intercept": intercept, "r2": 1 - left}


def fits(rows:list, s:Settings, ways:list)->list:
    "For each way, seconds against P + nT and against n(P + T), where the vocabulary is one."
    found = []
    for way in ways:
        same = [row for row in rows if row["way"] == way and row["axis"] != "vocab"]
        for tokens in ("unique_tokens", "row_tokens"):
            line = fit(same, tokens)
            if line: found.append(record("scaling_fit", s, way, [], **line))
    return found


def measure(s):
    ways, rows = s.chosen(WAYS), []
    for axis, values in s.grid().items():
        for value in values:
            new = measure_point(s, axis, value, ways)
            emit(new, s, ("axis", "value", *COLUMNS[2:]))
            rows += new
    found = fits(rows, s, ways)
    if found: emit(found, s, ("way", "tokens", "slope", "intercept", "r2"))


if __name__ == "__main__": run("benchmarks.scaling", measure, ScalingSettings)
