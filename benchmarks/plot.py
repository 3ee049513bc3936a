"The figure of `benchmarks.scaling`: python -m benchmarks.plot scaling.jsonl scaling.png"
import json, sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

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
    panel.set_xticks(values, map(str, values), rotation=45)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def draw_line(panel, rows:list, way:str, tokens:str, xlabel:str):
    "Seconds against the tokens that a way should be paid by, and the straight line through them."
    points = np.array([(row[tokens], row["seconds"]) for row in rows
                       if row["way"] == way and row["axis"] != "vocab"])
    if len(set(points[:, 0])) < 2: return
    slope, intercept = np.polyfit(*points.T, 1)
    ends = np.array([0, points[:, 0].max()])
    panel.plot(*points.T, **{**LOOK[way], "linestyle": "none"})
    panel.plot(ends, intercept + slope * ends, color="#767676", linewidth=1)
    panel.set(xlabel=xlabel, ylabel=MEASURES["seconds"], xlim=(0, None), ylim=(0, None))
    panel.set_title(f"{1e3 * slope:.2f} ms a token", fontsize=10)


def figure(rows:list):
    """Time above, memory below, a column for each setting that was varied; then time against the
    tokens that are read."""
    use_style()
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    size = (3.4 * len(axes) + 3.4, 6.4)
    fig, panels = plt.subplots(2, len(axes) + 1, figsize=size, squeeze=False)
    for line, measure in zip(panels, MEASURES):
        for panel, axis in zip(line, axes): draw(panel, rows, axis, measure)
    draw_line(panels[0][-1], rows, "shared", "unique_tokens", "tokens read, P + nT")
    draw_line(panels[1][-1], rows, "rows", "row_tokens", "tokens read, n(P + T)")
    panels[0][0].legend()
    return fig


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit("python -m benchmarks.plot scaling.jsonl scaling.png")
    figure(read(sys.argv[1])).savefig(sys.argv[2])
