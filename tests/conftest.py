"""Fixtures for all tests. Nothing is fetched: the hub is switched off before any library looks."""
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest
import torch
from matplotlib import rc_context

torch.set_num_threads(1)  # sums in one order: the same figures on every machine

SENTENCES = (
    "The soup was warm, and the bread was very good.",
    "A small room with a view of the old harbour; the bed was rather hard.",
    "He said that the story is slow at first but quite moving in the end.",
    "We would gladly come again, although the waiter forgot our water.",
    "Human: How was the film? Assistant: It was extremely dull, I am afraid.",
)


@pytest.fixture(autouse=True)
def own_style():
    "A test that sets the book's look leaves the next one's figures alone."
    with rc_context(): yield


@pytest.fixture(scope="session")
def shared_data():
    "The folder of real data sets (`VCB_DATA`, or `../shared/data` beside the repository)."
    folder = Path(os.environ.get("VCB_DATA", Path(__file__).parents[1]/"../shared/data")).resolve()
    if not folder.is_dir(): pytest.skip(f"no real data at {folder}: set VCB_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    "A byte-level BPE tokenizer of about 300 entries; `<|endoftext|>` is 0, `<|padding|>` is 1."
    from vcb_nb.data import train_tokenizer
    return train_tokenizer(SENTENCES * 4, vocab_size=320)


@pytest.fixture
def process_group():
    "A process group of one. What a test wraps with it dies first, as the test's frame is gone."
    from torch.distributed import HashStore, init_process_group

    from vcb_nb.shards import leave_group
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    leave_group()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "A page of headless Chromium, see browser.py; skipped where there is none."
    from browser import chromium
    with chromium(tmp_path_factory.mktemp("chromium")) as page: yield page


def pytest_terminal_summary(terminalreporter):
    "The count on a line of its own; an error in a fixture counts as a failure."
    count = {kind: len(terminalreporter.stats.get(kind, []))
             for kind in ("passed", "failed", "error", "skipped")}
    failed = count["failed"] + count["error"]
    terminalreporter.write_line(
        f"{count['passed']} passed, {failed} failed, {count['skipped']} skipped")
