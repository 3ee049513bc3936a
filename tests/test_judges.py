"Judges: a function or a reward model by name, the right ids, and numbers that are checked."
import math

import pytest
import torch
from tiny_models import base, tokenizer # noqa: F401: fixtures

from vcb_nb.artifacts import InputError
from vcb_nb.judges import (checked_numbers, encode_rows, FunctionJudge, load_judge, reward_scores,
                           row_place)
from vcb_nb.loading import new_reward_model

PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[[9, 10, 0], [11] * 9], [[12, 0], [13, 14], [15] * 4], [[0], [3, 0, 0], [7, 8]]]


def alone(model, prompt, completion):
    "The score of one row, without a batch and without padding."
    with torch.no_grad(): return model(torch.tensor([prompt + completion])).logits.item()


def test_a_function_by_name_judges_rows():
    from vcb_nb.world import gold_reward
    rows = [{"prompt": "Tell us about the soup.", "completions": [" It was good.", " It was bad."]},
            {"prompt": "And the room?", "completions": [" Superb."]}]
    assert load_judge("vcb_nb.world:gold_reward")(rows) == [
        [gold_reward(row["prompt"], text) for text in row["completions"]] for row in rows]


def test_a_batched_function_gets_two_lists():
    def lengths(prompts, completions): return [len(p + c) for p, c in zip(prompts, completions)]
    lengths.batched = True
    rows = [{"prompt": "a", "completions": ["b", "cd"]}, {"prompt": "e", "completions": ["fgh"]}]
    assert FunctionJudge(lengths)(rows) == [[2, 3], [4]]


def test_a_batched_function_that_loses_one_is_told():
    def one_short(prompts, completions): return [0.] * (len(prompts) - 1)
    one_short.batched = True
    with pytest.raises(InputError, match="1 numbers for 2"):
        FunctionJudge(one_short)([{"prompt": "a", "completions": ["b", "c"]}])


def test_the_ending_is_part_of_what_is_scored(base, tokenizer):
    "Pitfall 21: nothing is appended or cut; a finished and a truncated response score differently."
    model = new_reward_model(base, tokenizer).double()
    (finished, cut), = reward_scores(model, [[5, 6]], [[[9, 10, 0], [9, 10]]])
    assert finished == pytest.approx(alone(model, [5, 6], [9, 10, 0]), abs=1e-12)
    assert cut == pytest.approx(alone(model, [5, 6], [9, 10]), abs=1e-12)
    assert abs(finished - cut) > 1e-3


def test_rows_that_cannot_be_scored_are_named(base, tokenizer):
    model = new_reward_model(base, tokenizer)
    for prompts, completions, says in (
            (PROMPTS, COMPLETIONS[:2], "3 prompts and 2 lists"),
            ([[5], [6]], [[[7]], [[8], []]], "Completion 1 of prompt 1 is empty"),
            ([[5], [6]], [[[7]], [[8], [9] * 1024]], "Completion 1 of prompt 1 has 1025 tokens"),
            ([[5], [6]], [[[7]], [[8], [99999]]], "Prompt 1 has token id 99999"),
            ([[5]], [[[7], [8, 1]]], "Completion 1 of prompt 0 ends with the padding id 1")):
        with pytest.raises(InputError, match=says): reward_scores(model, prompts, completions)
    assert reward_scores(model, [[5], [6]], [[], [[7]]])[0] == []


def test_a_cut_sample_without_text_can_be_scored(tiny_tokenizer):
    rows = [{"prompt": "We", "completions": ["", "", "ok"],
             "finish_reasons": ["length", "stop", "length"]}]
    _, ids = encode_rows(tiny_tokenizer, rows)
    assert ids == [[[0], [0], tiny_tokenizer.encode("ok")]]


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None, "3.5", torch.tensor(math.nan)])
def test_what_is_no_number_names_its_row(bad):
    "Pitfall 25: index, prompt and candidate."
    rows = [{"index": 7, "prompt": "How was the film? " * 9}]
    with pytest.raises(InputError, match=r"row 7 \('How was.*candidate 1: the log-prob is"):
        checked_numbers([[1., bad]], rows, "log-prob")
    assert len(row_place(rows[0])) < 70
