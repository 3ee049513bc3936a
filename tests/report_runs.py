"Runs as the stages leave them, with planted numbers, so that a report's words have a truth."
import numpy as np

from vcb_nb.artifacts import write_json, write_jsonl
from vcb_nb.evaluate import compare, frontier
from vcb_nb.measures import calibration, estimate

BOOT = dict(n_boot=200, level=.95, seed=0)
SWEEP = {"vcb": {.5: .5, 2.: 1.}, "dpo": {.5: .3, 2.: .6}} # method → KL → gain of reward
STRENGTHS = {"vcb": "gamma", "vcb_lse": "gamma", "vcb_online": "gamma", "dpo": "beta"}
TEXTS = ("the soup was good", "the soup was cold", "it was a warm bread", "we left happy")


def spread(prompts, size, seed):
    "Noise with mean exactly 0 over the prompts."
    draws = np.random.default_rng(seed).normal(size=prompts)
    return size*(draws - draws.mean()) if prompts > 1 else np.zeros(1)


def numbers_of(sweep, prompts=40, noise=.2, common=1., kl_noise=.02, judges=("gold", "reward")):
    "Rows as in per_prompt.json; `common` is noise of the prompts that all policies share."
    level, found = spread(prompts, common, 1), {}
    points = {"sft": (0., 0.)} | {f"{m}-{kl:g}": (kl, g) for m, line in sweep.items()
                                  for kl, g in line.items()}
    for i, (name, (kl, gain)) in enumerate(points.items()):
        own = spread(prompts, noise*(name != "sft"), 10 + i)
        found[name] = {j: (level + gain + own).tolist() for j in judges}
        found[name]["kl"] = (kl + spread(prompts, kl_noise*(name != "sft"), 100 + i)).tolist()
    return found


def policy_of(name, numbers, on_policy=True, fit=True):
    "One entry of the summary's policies."
    rows, start, (method, _, kl) = numbers[name], numbers["sft"], name.partition("-")
    split = {k: estimate(v, **BOOT) for k, v in rows.items() if on_policy or k != "kl"}
    if not on_policy: split["kl"] = None
    split |= {f"{j}_gain": estimate(np.subtract(rows[j], start[j]), **BOOT)
              for j in ("gold", "reward") if j in rows}
    flat = estimate([.9]*len(rows["kl"]), **BOOT)
    split |= dict.fromkeys(("length", "finished", "distinct_2", "distinct_share"), flat)
    split |= dict(kl_k3=split["kl"], prompts=len(rows["kl"]), samples=len(rows["kl"]))
    split = {**dict.fromkeys(("gold", "reward")), **split}
    rewards = np.random.default_rng(0).normal(size=(12, 4))
    slope = float(kl or 0)
    found = calibration(slope*rewards + (slope > 0)*np.random.default_rng(1).normal(
        size=rewards.shape), rewards, **BOOT) if fit else None
    strength = STRENGTHS.get(method) if kl else None
    return dict(method=method, strength=strength, value=1/float(kl) if strength else None,
                splits={"test": split}, calibration=found, samples={"test": f"samples/{name}"})


def summary_of(numbers, ood=None, **about):
    "A summary as `evaluate` writes it, from rows per prompt."
    policies = {name: policy_of(name, numbers, **about) for name in numbers}
    for name in ood or ():
        policies[name]["splits"]["ood"] = policy_of(name, ood, **about)["splits"]["test"]
    splits = {"test": numbers, **({"ood": ood} if ood else {})}
    judges = [j for j in ("gold", "reward") if j in numbers["sft"]]
    def games_of(rows, judge):
        return compare({n: [[v] for v in r[judge]] for n, r in rows.items()}, coupled=False, **BOOT)
    games = {s: {j: games_of(rows, j) for j in judges} for s, rows in splits.items()}
    return dict(settings=BOOT, policies=policies, comparisons=games,
                frontier={s: frontier(policies, s) for s in splits})


def evaluation(accuracy=.8):
    "What the reward stage writes."
    bins = [dict(confidence=.7, accuracy=.7, low=.6, high=.8, pairs=90),
            dict(confidence=.9, accuracy=.95, low=.9, high=1., pairs=110)]
    return dict(pairs=200, accuracy=accuracy, accuracy_interval=[accuracy - .05, accuracy + .05],
                ece=.0333333, brier=.1388888, log_loss=.4232323, reliability=bins)


def write_run(folder, sweep=SWEEP, prompts=40, ood=True, reward=True, samples=True, **about):
    "A run folder with the files that a report reads; what is switched off is missing."
    judges = about.pop("judges", ("gold", "reward"))
    numbers = numbers_of(sweep, prompts, judges=judges)
    far = numbers_of(sweep, prompts, judges=judges, noise=.4) if ood else None
    summary = summary_of(numbers, far, **about)
    write_json(folder/"evaluate"/"summary.json", summary)
    splits = {"test": numbers, **({"ood": far} if ood else {})}
    write_json(folder/"evaluate"/"per_prompt.json",
               {s: {"prompts": "x", "policies": rows} for s, rows in splits.items()})
    for k, name in enumerate(numbers if samples else ()):
        rows = [dict(prompt=f"Topic {i}: ", completions=[TEXTS[(i*k) % len(TEXTS)]])
                for i in range(prompts)]
        write_jsonl(folder/"evaluate"/"samples"/name/"data"/"part.jsonl", rows)
    if reward: write_json(folder/"reward"/"evaluation.json", evaluation())
    for name in numbers:
        if name == "sft": continue
        log = [dict(step=i, loss=2 - i/40, **{"calibration/correlation": i/40,
                                              "calibration/slope": i/20}) for i in range(30)]
        write_jsonl(folder/"calibrate"/name/"training_log.jsonl", log)
        write_json(folder/"calibrate"/name/"manifest.json", dict(
            stage=f"calibrate/{name}", seconds=4.2, versions={"torch": "2"},
            summary=dict(loss=name.partition("-")[0], steps=30, seconds=4.1234567)))
    return summary
