"""Architectures as published go through the stages, and the page of models says how."""
import os

import pytest
from matrix import MODELS, PAGE, QUICK, cells, line, refusals

NAMES = list(MODELS) if os.environ.get("VCB_MATRIX") == "all" else QUICK


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_happens(name, tmp_path):
    "Log-probs, before and after training and saving, are those of plain transformers; see `cells`."
    found = cells(name, tmp_path)
    assert {line(name, found), *refusals(found)} <= {*PAGE.read_text("utf-8").splitlines()}


def test_the_page_lists_every_model():
    text = PAGE.read_text("utf-8")
    assert len(MODELS) >= 30 and all(f"| {name} |" in text for name in MODELS)
