"Names, fallbacks and completeness of the book's look; its notebook asserts that colours differ."
import pytest
from matplotlib import pyplot as plt

from vcb_nb.losses import LOSSES
from vcb_nb.online import ONLINE_LOSSES
from vcb_nb.plots import (METHOD_COLORS, METHOD_LABELS, METHOD_LINESTYLES, METHOD_MARKERS,
                          OTHER_COLOR, base_method, method_color, method_label, method_style,
                          use_style)


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
