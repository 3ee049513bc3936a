"""Where the time of a whole run goes, stage by stage:

    python -m benchmarks.pipeline runs/demo --label before --out stages.jsonl
    python -m benchmarks.pipeline --figure stages.jsonl stages.png"""
import argparse, datetime, json, re
from pathlib import Path

from matplotlib import pyplot as plt

from vcb_nb.plots import use_style
from vcb_nb.stages import STAGES

from .common import Settings, machine

# From the first to the last, in the colours of the figure; all others are drawn as one.
SHOWN = {"sft": "#5b8a72", "reward": "#ca7025", "sample": "#3f1f9e", "score": "#8a6fd1",
         "calibrate": "#b03a5b", "evaluate": "#4a7fb5"}
OTHERS = "#a0a0a0"


NAMES = [stage.name for stage in STAGES]


def stage_of(job:str)->str:
    "The stage of a job, which may be one of several: calibrate/vcb, sample_validation."
    return next(name for name in NAMES if re.fullmatch(rf"{name}([/_].*)?", job))


def stage_seconds(run)->dict: # stage -> seconds
    "The time of each stage in a finished run, over its jobs."
    found = {}
    for path in sorted(Path(run).rglob("manifest.json")):
        made = json.loads(path.read_text("utf-8"))
        stage = stage_of(made["stage"])
        found[stage] = found.get(stage, 0.) + made["seconds"]
    return {name: found[name] for name in sorted(found, key=NAMES.index)}


def record(run, label:str)->dict:
    "One line of results."
    seconds = stage_seconds(run)
    return dict(bench="pipeline", run=Path(run).name, label=label, total=sum(seconds.values()),
                seconds=seconds, machine=machine(Settings()),
                date=datetime.date.today().isoformat())


def draw_bar(panel, place:int, seconds:dict)->None:
    "A run as a bar: the stages in their order, and a number where it fits."
    left, total = 0., sum(seconds.values())
    shown = {**{name: seconds.get(name, 0.) for name in SHOWN},
             "others": sum(s for name, s in seconds.items() if name not in SHOWN)}
    for name, taken in shown.items():
        color = SHOWN.get(name, OTHERS)
        panel.barh(place, taken, left=left, color=color, edgecolor="white", height=.62, label=name)
        if taken > .05 * panel.longest:
            panel.text(left + taken/2, place, f"{taken:.0f}", ha="center", va="center",
                       color="white", fontsize=9)
        left += taken
    panel.text(left + .01 * panel.longest, place, f"{total:.0f} s", va="center", fontsize=10)


def figure(rows:list):
    "A panel for each run; a bar for each label, the first one above."
    use_style()
    runs = list(dict.fromkeys(row["run"] for row in rows))
    fig, panels = plt.subplots(len(runs), 1, figsize=(8.4, 1.7 * len(runs) + .6), squeeze=False,
                               layout="tight")
    for panel, run in zip(panels[:, 0], runs):
        here = [row for row in rows if row["run"] == run]
        panel.longest = max(row["total"] for row in here)
        for place, row in enumerate(here): draw_bar(panel, place, row["seconds"])
        panel.set_yticks(range(len(here)), [row["label"] for row in here])
        panel.set(xlim=(0, 1.1 * panel.longest), xlabel="seconds")
        panel.set_title(run, loc="left", fontsize=11)
        panel.invert_yaxis()
        panel.grid(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    fig.legend(unique.values(), unique, ncols=len(unique), loc="lower center", frameon=False,
               fontsize=9, columnspacing=1., handlelength=1.)
    fig.get_layout_engine().set(rect=(0, .07, 1, 1))
    return fig


def main(args=None)->None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="folder of a finished run")
    parser.add_argument("--label", default="now", help="what the run is called in the figure")
    parser.add_argument("--out", help="file to append the line to; stdout if not given")
    parser.add_argument("--figure", nargs=2, metavar=("LINES", "PICTURE"))
    own = parser.parse_args(args)
    if own.figure:
        lines = Path(own.figure[0]).read_text("utf-8").splitlines()
        return figure(list(map(json.loads, lines))).savefig(own.figure[1])
    if not own.run: parser.error("name the folder of a run")
    line = json.dumps(record(own.run, own.label))
    if not own.out: return print(line)
    with open(own.out, "a", encoding="utf-8") as file: file.write(line + "\n")


if __name__ == "__main__": main()
