"The tables of the README and of the lesson, from benchmarks/results: python -m benchmarks.tables"
import json
from pathlib import Path

RESULTS = Path(__file__).parent/"results"
MACHINES = ("epyc", "xeon") # folders; a cell has a figure of each, in this order
NAMES = {"trl": "TRL 1.16 `DPOTrainer`, n/2 pairs", "naive": "n padded rows, all logits",
         "rows": "ours, `way=\"rows\"`", "shared": "**ours, each prompt once** (default)"}
HEADLINE = dict(arch="gpt_neox", layers=6, n=8, dtype="float32", checkpointing=False)
PYTHIA = dict(arch="pythia-160m", malloc="default")
SMALL = {**HEADLINE, "malloc": "default"}
OTHERS = {"log-probs and gradient alone": ("step", {**SMALL, "bench": "logps"}),
          "a training step in bf16": ("step", {**SMALL, "bench": "step", "dtype": "bfloat16"}),
          "a training step, checkpointed": (
              "step", {**SMALL, "bench": "step", "checkpointing": True}),
          "a training step, n = 4": ("step", {**SMALL, "bench": "step", "n": 4}),
          "its log-probs and gradient alone": ("step", {**SMALL, "bench": "logps", "n": 4}),
          "a training step of Pythia-160M's shape": ("step", dict(bench="step", **PYTHIA)),
          "log-probs and gradient of that shape": ("step", dict(bench="logps", **PYTHIA)),
          "log-probs of the reference": ("scoring", dict(bench="reference")),
          "rewards": ("scoring", dict(bench="reward")),
          "sampling, 4 prompts": ("sampling", dict(bench="sampling", arch="gpt_neox"))}
# The stages around the calibration: what a table says of each, its prompts, and its ways.
PEERS = {"sft": ("fine-tuning, a step of {} rows", 8, {
              "trl": "TRL's `SFTTrainer`", "trl_padding_free": "the same, `padding_free`",
              "trl_packing": "the same, `packing`", "rows": "ours, padded rows",
              "shared": "**ours, packed** (default)"}),
         "reward": ("reward model, a step of {} pairs", 4, {
              "trl": "TRL's `RewardTrainer`", "rows": "ours, padded rows",
              "shared": "**ours, each prompt once** (default)"}),
         "sampling": ("sampling, {} prompts × 8", 16, {
              "generate": "`generate`, four prompts per batch", "vllm": "vLLM, its first run",
              "vllm_warm": "vLLM, the prompts in its cache",
              "shared": "**ours, each prompt once** (default)"})}
TOKENS = {"unique_tokens": "P + nT", "row_tokens": "n(P + T)"}


def read(machine:str, name:str)->list:
    "The records of one file of results; none if that was not measured there."
    path = RESULTS/machine/f"{name}.jsonl"
    return list(map(json.loads, path.read_text("utf-8").splitlines())) if path.is_file() else []


def found(name:str, **values)->list: # for each machine a record, empty where none was measured
    "The first record of each machine that has these values."
    return [next((row for row in read(machine, name) if values.items() <= row.items()), {})
            for machine in MACHINES]


def cell(rows:list, key:str, pattern:str="{:.3g}", scale:float=1)->str:
    "The machines' figures, or a dash where nothing was measured."
    values = [row.get(key) for row in rows]
    if not any(value is not None for value in values): return "–"
    return "\u00a0/\u00a0".join("–" if v is None else pattern.format(scale * v) for v in values)


def table(head:str, lines:list)->str:
    "A table in Markdown."
    ruler = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([head, ruler, *("| " + " | ".join(line) + " |" for line in lines)])


def headline()->str:
    "A step of every way, with both allocators, and its memory in a process of its own."
    lines = []
    for way, name in NAMES.items():
        default, tuned = (found("step", bench="step", way=way, malloc=malloc, **HEADLINE)
                          for malloc in ("default", "tuned"))
        memory = found("memory", bench="memory", way=way, **HEADLINE)
        lines.append([name, cell(default, "seconds"), cell(default, "speedup_vs_trl", "{:.1f}×"),
                      cell(tuned, "speedup_vs_trl", "{:.1f}×"), cell(memory, "peak_mb", "{:.0f}")])
    return table("| a training step | seconds | speed against TRL | the same, malloc tuned "
                 "| peak MB |", lines)


def others()->str:
    "What else was measured, of the default way."
    lines = []
    for name, (file, values) in OTHERS.items():
        rows = found(file, way="shared", **values)
        lines.append([name, cell(rows, "seconds"), cell(rows, "speedup_vs_trl", "{:.1f}×"),
                      cell(rows, "speedup_vs_naive", "{:.1f}×"),
                      cell(rows, "share_of_peak", "{:.2f}"), cell(rows, "peak_mb", "{:.0f}")])
    return table("| each prompt once | seconds | speed against TRL | against naive "
                 "| share of the product rate | peak MB |", lines)


def stages(machine:str="xeon")->str:
    "Fine-tuning, reward training and sampling in SmolLM2-135M's shape, beside peers."
    lines = []
    for name, (what, prompts, ways) in PEERS.items():
        what, shape = what.format(prompts), dict(arch="smollm2-135m", prompts=prompts)
        rows = {row["way"]: row for row in read(machine, name) if shape.items() <= row.items()}
        ratio = "speedup_vs_generate" if name == "sampling" else "speedup_vs_trl"
        for way, said in ways.items():
            row = [rows.get(way, {})]
            lines.append([what, said, cell(row, "seconds"), cell(row, ratio, "{:.1f}×"),
                          cell(row, "share_of_products", "{:.2f}"), cell(row, "peak_mb", "{:.0f}")])
            what = ""
    return table("| SmolLM2-135M's shape | | seconds | speed against the peer "
                 "| share of needed products | peak MB |", lines)


def growth()->str:
    "The straight lines through the sizes of n, P and T."
    lines = []
    for way in ("rows", "shared"):
        for tokens, name in TOKENS.items():
            fits = found("scaling", bench="scaling_fit", way=way, tokens=tokens)
            lines.append([f"`{way}`", name, cell(fits, "slope", "{:.3f}", 1e3),
                          cell(fits, "intercept", "{:.0f}", 1e3), cell(fits, "r2", "{:.3f}")])
    return table("| way | tokens counted | ms per token | at no token (ms) | R² |", lines)


def sampling(machine:str="xeon")->str:
    "Tokens per second in SmolLM2-135M's shape, with more prompts and with fewer."
    ways, lines = PEERS["sampling"][2], []
    for way, said in ways.items():
        line = [said]
        for prompts in (8, 16):
            shape = dict(arch="smollm2-135m", prompts=prompts, way=way)
            rows = [row for row in read(machine, "sampling") if shape.items() <= row.items()]
            line.append(f"{cell(rows, 'tokens_per_second', '{:.0f}')} "
                        f"({cell(rows, 'speedup_vs_generate', '{:.1f}×')})")
        lines.append(line)
    return table("| tokens per second (against `generate`) | 8 prompts, 64 rows at a time "
                 "| 16 prompts, 128 rows |", lines)


def sampling_growth(machine:str="xeon")->str:
    "The straight lines of sampling, through n and through P."
    fits = [row for row in read(machine, "sampling") if row["bench"] == "sampling_fit"]
    names = {"generate": "`generate`", "shared": "ours, each prompt once"}
    lines = [[names[row["way"]], {"n": "a sample more of each prompt",
                                  "prompt": "a token more in each prompt"}[row["axis"]],
              cell([row], "slope", "{:.1f}", 1e3), cell([row], "intercept", "{:.0f}", 1e3),
              cell([row], "r2", "{:.3f}")] for row in fits]
    return table("| way | what grows | slope (ms) | intercept (ms) | R² |", lines)


if __name__ == "__main__":
    print(headline(), others(), stages(), growth(), sampling(), sampling_growth(), sep="\n\n")
