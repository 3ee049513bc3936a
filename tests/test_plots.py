"Names, fallbacks and completeness of the book's look; its notebook asserts that colours differ."
import re, shutil, subprocess
from pathlib import Path

import pytest
from matplotlib import colors as mcolors
from matplotlib import pyplot as plt

from vcb_nb.losses import LOSSES
from vcb_nb.online import ONLINE_LOSSES
from vcb_nb.plots import (METHOD_COLORS, METHOD_LABELS, METHOD_LINESTYLES, METHOD_MARKERS,
                          OTHER_COLOR, base_method, method_color, method_ink, method_label,
                          method_style, use_style)


def test_every_method_has_every_mark():
    known = {*LOSSES, *ONLINE_LOSSES, "vcb_online", "sft", "exact", "optimum"}
    assert known == METHOD_COLORS.keys()
    for marks in (METHOD_MARKERS, METHOD_LINESTYLES, METHOD_LABELS):
        assert marks.keys() == METHOD_COLORS.keys()
    for marks in (METHOD_COLORS, METHOD_MARKERS, METHOD_LINESTYLES):
        assert len(set(marks.values())) == len(marks) - 1   # only exact and optimum meet


@pytest.mark.parametrize("name, method", [
    ("vcb", "vcb"), ("vcb-gamma0.5", "vcb"), ("VCB (γ = 0.5)", "vcb"),
    ("vcb-lse_lam10", "vcb_lse"),
    ("rpo-sq", "rpo_sq"), ("distilled DPO", "distilled_dpo"), ("dpoplus", ""),
    ("online_vcb", ""), ("", "")])
def test_run_names_fall_back_on_their_method(name, method):
    assert base_method(name) == method
    assert method_color(name) == METHOD_COLORS.get(method, OTHER_COLOR)


def test_style_draws():
    use_style()
    fig, ax = plt.subplots()
    for name in (*METHOD_COLORS, "mine"): ax.plot([0, 1], [0, 1], **method_style(name))
    ax.plot([0, 1], **method_style("dpo", label="x", linestyle=":"))
    fig.canvas.draw()
    plt.close(fig)
    assert method_label("mine") == "mine"


PAGES = {"light": ("#ffffff", "#222222"), "dark": ("#111111", "#eeeeee")}


def luminance(rgb):
    linear = [c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4 for c in rgb]
    return sum(part * c for part, c in zip((.2126, .7152, .0722), linear))


def contrast(one, other):
    "WCAG's ratio of two sRGB colours."
    low, high = sorted(luminance(c) + .05 for c in (one, other))
    return high / low


@pytest.mark.parametrize("name", METHOD_COLORS)
def test_lines_and_letters_stand_out_on_white(name):
    "As they are in a picture: lines 3 : 1, letters 4.5 : 1, and a colour that suffices is kept."
    white, line, ink = (1., 1., 1.), *map(mcolors.to_rgb, (method_color(name), method_ink(name)))
    assert contrast(line, white) >= 3 and contrast(ink, white) >= 4.5
    if contrast(line, white) >= 4.6: assert ink == line
    hues = [mcolors.rgb_to_hsv(c) for c in (line, ink)]
    assert abs(hues[0][0] - hues[1][0]) < .01 and abs(hues[0][1] - hues[1][1]) < .02


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("mix, least", [("tint", 3), ("ink", 4.5)])
def test_figures_that_move_stand_out_on_both_grounds(mix, least, page):
    "core.js mixes a colour with the page's text colour; the result suffices on light and dark."
    binary = shutil.which("node") or pytest.skip("needs node on the PATH")
    core = (Path(__file__).parent.parent/"vcb_nb"/"js"/"core.js").read_text("utf-8")
    code = core + f"process.stdout.write(VCBX.ui.{mix}('#808080'))"
    said = subprocess.run([binary, "-"], input=code, text=True, capture_output=True, check=True)
    share = int(re.search(r"#808080 (\d+)%, currentColor", said.stdout)[1]) / 100
    ground, text = map(mcolors.to_rgb, PAGES[page])
    for name in METHOD_COLORS.keys() - {"exact", "optimum"}: # black is the text's own colour
        mixed = [share * c + (1 - share) * t
                 for c, t in zip(mcolors.to_rgb(method_color(name)), text)]
        assert contrast(mixed, ground) >= least, name
