"The tables of the README and of the lesson, from benchmarks/results: python -m benchmarks.tables"
import json
from pathlib import Path

RESULTS = Path(__file__).parent/"results"
NAMES = {"trl": "TRL 1.16 `DPOTrainer`, n/2 pairs", "naive": "n padded rows, all logits",
         "rows": "ours, `way=\"rows\"`", "shared": "**ours, each prompt once** (default)"}
PYTHIA = dict(arch="pythia-160m", malloc="default")
SMALL = dict(arch="gpt_neox", malloc="default")
OTHERS = {"log-probs and gradient alone": ("step", dict(bench="logps", n=8, **SMALL)),
          "a training step, n = 4": ("step", dict(bench="step", n=4, **SMALL)),
          "a training step of Pythia-160M's shape": ("step", dict(bench="step", **PYTHIA)),
          "its log-probs and gradient alone": ("step", dict(bench="logps", **PYTHIA)),
          "log-probs of the reference": ("scoring", dict(bench="reference")),
          "rewards": ("scoring", dict(bench="reward")),
          "sampling, 4 prompts": ("sampling", dict(bench="sampling"))}


def read(name:str)->list:
    "The records of one file of results."
    return list(map(json.loads, (RESULTS/f"{name}.jsonl").read_text("utf-8").splitlines()))


def chosen(rows:list, **values)->dict: # way -> record
    "The records with these values, by way."
    return {row["way"]: row for row in rows if all(row[k] == v for k, v in values.items())}


def number(value, pattern:str="{:.3g}")->str:
    return "–" if value is None else pattern.format(value)


def headline()->str:
    "A step of every way, with both allocators, and its memory in a process of its own."
    head = dict(arch="gpt_neox", layers=6, n=8)
    steps = {malloc: chosen(read("step"), bench="step", malloc=malloc, **head)
             for malloc in ("default", "tuned")}
    memory = chosen(read("memory"), bench="memory", **head)
    lines = ["| a training step | seconds | speed against TRL | the same, malloc tuned | peak MB |",
             "|---|---|---|---|---|"]
    for way, name in NAMES.items():
        row, tuned = steps["default"][way], steps["tuned"][way]
        cells = (name, number(row["seconds"]), number(row["speedup_vs_trl"], "{:.1f}×"),
                 number(tuned["speedup_vs_trl"], "{:.1f}×"),
                 number(memory[way]["peak_mb"], "{:.0f}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def others()->str:
    "What else was measured, of the default way."
    lines = ["| each prompt once | seconds | speed against TRL | against naive "
             "| share of the product rate | peak MB |", "|---|---|---|---|---|---|"]
    for name, (file, values) in OTHERS.items():
        row = chosen(read(file), **values)["shared"]
        cells = (name, number(row["seconds"]), number(row["speedup_vs_trl"], "{:.1f}×"),
                 number(row["speedup_vs_naive"], "{:.1f}×"),
                 number(row["share_of_peak"], "{:.2f}"), number(row["peak_mb"], "{:.0f}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth()->str:
    "The straight lines through the sizes of n, P and T."
    lines = ["| way | tokens counted | ms a token | at no token (ms) | R² |",
             "|---|---|---|---|---|"]
    counts = {"unique_tokens": "P + nT", "row_tokens": "n(P + T)"}
    for row in read("scaling"):
        if row["bench"] != "scaling_fit": continue
        lines.append(f"| `{row['way']}` | {counts[row['tokens']]} | {1e3 * row['slope']:.3f} | "
                     f"{1e3 * row['intercept']:.0f} | {row['r2']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__": print(headline(), others(), growth(), sep="\n\n")
