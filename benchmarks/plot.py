"The figure of `benchmarks.scaling`: python -m benchmarks.plot scaling.jsonl scaling.png"
import json, sys
from pathlib import Path

from matplotlib import pyplot as plt

from vcb_nb.plots import use_style

AXES = {"n": "responses to a prompt, n", "prompt": "tokens of the prompt, P",
        "response": "tokens of a response, T", "vocab": "entries of the vocabulary, V"}
MEASURES = {"seconds": "seconds, forward and backward", "peak_mb": "peak memory, MB"}
LOOK = {"naive": dict(color="#949494", marker="s", linestyle="--", label="naive rows"),
        "rows": dict(color="#ca7025", marker="^", linestyle="-.", label="rows"),
        "shared": dict(color="#3f1f9e", marker="o", linestyle="-", label="prompt once")}


def read(path)->list:
    "The scaling records of a file of JSON lines."
    rows = map(json.loads, Path(path).read_text("utf-8").splitlines())
    return [row for row in rows if row["bench"] == "scaling"]


def draw(panel, rows:list, axis:str, measure:str):
    "One panel: a line for each way."
    for way, look in LOOK.items():
        points = sorted((row["value"], row[measure]) for row in rows
                        if (row["axis"], row["way"]) == (axis, way) and row[measure] is not None)
        if points: panel.plot(*zip(*points), **look)
    panel.set(xlabel=AXES[axis], ylabel=MEASURES[measure], xscale="log", yscale="log")
    values = sorted({row["value"] for row in rows if row["axis"] == axis})
    panel.set_xticks(values, map(str, values))
    panel.minorticks_off()


def figure(rows:list):
    "Time above, memory below; a column for each setting that was varied."
    use_style()
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    fig, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 6), squeeze=False)
    for line, measure in zip(panels, MEASURES):
        for panel, axis in zip(line, axes): draw(panel, rows, axis, measure)
    panels[0][0].legend()
    return fig


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit("python -m benchmarks.plot scaling.jsonl scaling.png")
    figure(read(sys.argv[1])).savefig(sys.argv[2])
