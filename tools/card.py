"""Draw the card that a link to the site shows: `python tools/card.py`, 1200 × 630 pixels.

Three rewards, and where VCB and DPO put their responses after training on all three pairs."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from matplotlib import pyplot as plt

from vcb_nb.plots import method_color, method_label, use_style
from vcb_nb.worlds import fit_table, table_world

REWARDS = [.1, .85, .9]


def places():
    "Log-ratios above the worst response's, in units of the widest gap, for rewards, VCB and DPO."
    world = table_world([.5, .3, .2], REWARDS)
    found = {"rewards": world.rewards[0]}
    for name in ("vcb", "dpo"):
        found[name] = (fit_table(world, name, steps=200).policy - world.ref_logps)[0]
    return {name: (x - x[0]) / (x[2] - x[0]) for name, x in found.items()}


def draw(path):
    use_style()
    fig, ax = plt.subplots(figsize=(12, 6.3))
    found = places()
    for height, (name, x) in zip((2, 1, 0), found.items()):
        color = "black" if name == "rewards" else method_color(name)
        ax.plot(x, torch.full((3,), float(height)), "o-", color=color, ms=26, lw=5)
        ax.text(-.07, height, method_label(name), color=color, ha="right", va="center", size=30)
    for x, reward, side in zip(found["rewards"], REWARDS, ("center", "right", "left")):
        ax.text(x, 2.28, f"{reward:g}", ha=side, size=24)
    ax.text(-.37, 3.05, "Value-based Calibration", size=44, weight="bold")
    ax.text(-.37, 2.72, "Align a model to its rewards' values, not only to their order", size=23)
    ax.set(xlim=(-.4, 1.1), ylim=(-.4, 3.5))
    ax.axis("off")
    fig.savefig(path, dpi=100)


if __name__ == "__main__": draw(ROOT/"nbs"/"images"/"card.png")
