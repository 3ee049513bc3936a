"Judges: a function or a reward model by name, the right ids, and numbers that are checked."
import functools, math, operator, os, subprocess, sys, threading
from pathlib import Path

import pytest
import torch
from tiny_models import base, tokenizer # noqa: F401: fixtures

import reward_kinds
from vcb_nb.artifacts import InputError
from vcb_nb.judges import (Answers, checked_numbers, encode_rows, FunctionJudge, load_judge,
                           reward_scores, row_place)
from vcb_nb.loading import new_reward_model
from vcb_nb.settings import function_key

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


# ---- whatever Python can call

ROWS = [{"index": 0, "prompt": "a", "completions": ["b", "cd", "b"], "answer": "cd",
         "completion_ids": [[1], [2, 3], [1]]},
        {"index": 1, "prompt": "e", "completions": ["fgh"], "answer": "f", "completion_ids": [[4]]}]


@pytest.mark.parametrize("kind", reward_kinds.LENGTHS)
def test_any_kind_of_callable_is_a_reward(kind):
    "By name and as an object; ours and TRL's form; with one thread and several."
    found = functools.reduce(getattr, kind.split("."), reward_kinds)
    for source in (found, f"reward_kinds:{kind}", f"{reward_kinds.__file__}:{kind}"):
        for workers in (1, 3):
            assert load_judge(source, workers=workers)(ROWS) == [[1, 2, 1], [3]]
    assert function_key(f"reward_kinds:{kind}") == function_key(f"reward_kinds:{kind}")


def test_a_built_in_is_a_reward():
    rows = [{"prompt": "a", "completions": ["a", "b"]}]
    assert load_judge("operator:eq")(rows) == load_judge(operator.eq)(rows) == [[1, 0]]


def test_trl_gets_the_columns_of_the_row_by_name():
    assert load_judge("reward_kinds:answered")(ROWS) == [[0, 1, 0], [0]]
    seen = {}
    def look(prompts, completions, **columns): seen.update(columns) or seen.update(p=prompts)
    with pytest.raises(InputError, match=r"row 0 \('a'\), candidates 0 to 2: .*gave None"):
        FunctionJudge(look)(ROWS)
    assert (seen["p"], seen["answer"], seen["index"]) == (["a"] * 3, ["cd"] * 3, [0] * 3)
    assert seen["completion_ids"] == [[1], [2, 3], [1]] and seen["trainer_state"].global_step == 0


def test_a_column_that_is_not_there_is_named():
    rows = [{"prompt": "a", "completions": ["b"], "answers": "b"}]
    with pytest.raises(InputError, match="needs a column 'answer'.* Did you mean 'answers'"):
        FunctionJudge(reward_kinds.answered)(rows)


def keys_in_a_new_process(seed):
    "The fingerprint of every kind, by name and as an object, made elsewhere in memory."
    code = ("import functools, reward_kinds as r\nfrom vcb_nb.settings import function_key as key\n"
            "made = [r.Length(2.), functools.partial(r.scaled, scale=2.),"
            "        lambda p, c: {'x', 'y'}]\n"
            "padding = [object() for _ in range(id(r) % 1000)]\n"
            "print([key(f'reward_kinds:{k}') for k in r.LENGTHS], list(map(key, made)),"
            "[key(functools.reduce(getattr, k.split('.'), r)) for k in r.LENGTHS])")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), "."])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                          check=True).stdout


def test_a_fingerprint_never_depends_on_memory():
    assert keys_in_a_new_process("1") == keys_in_a_new_process("2")


def test_a_fingerprint_follows_code_and_what_is_held():
    def helper(): return 1.
    def outer(scale): return lambda prompt, completion: scale * helper()
    asked = reward_kinds.Length(1.)
    asked("a", "b")
    assert function_key(asked) == function_key(reward_kinds.Length(1.))
    assert function_key(outer(1.)) == function_key(outer(1.))
    pairs = [(reward_kinds.Length(1.), reward_kinds.Length(2.)), (outer(1.), outer(2.)),
             (functools.partial(helper), functools.partial(helper, 1)),
             (functools.partial(reward_kinds.scaled, scale=1.),
              functools.partial(reward_kinds.scaled, scale=2.)),
             (lambda p, c: 1., lambda p, c: 2.), (reward_kinds.function, reward_kinds.scaled)]
    for a, b in pairs: assert function_key(a) != function_key(b)


# ---- a slow judge

def test_several_workers_work_at_once_and_keep_the_order():
    "Four calls wait for one another: without four threads none would come back."
    together, rows = threading.Barrier(4, timeout=30), [
        {"prompt": str(i), "completions": [f"{i}{j}" for j in range(2)]} for i in range(4)]
    def meet(prompt, completion):
        together.wait()
        return int(completion)
    assert FunctionJudge(meet, workers=4)(rows) == [[0, 1], [10, 11], [20, 21], [30, 31]]


@pytest.mark.parametrize("workers", [1, 4])
def test_no_pair_is_asked_twice(workers):
    asked = []
    def judge(prompt, completion):
        asked.append((prompt, completion))
        return len(completion)
    rows = [{"prompt": "a", "completions": ["b", "cc", "b"]}, {"prompt": "e", "completions": ["b"]},
            {"prompt": "a", "completions": ["cc", "ddd"]}]
    found = FunctionJudge(judge, workers)
    assert found(rows) == found(rows) == [[1, 2, 1], [1], [2, 3]]
    assert sorted(asked) == [("a", "b"), ("a", "cc"), ("a", "ddd"), ("e", "b")]


def test_a_list_form_sees_a_row_whole_and_once():
    "It may compare the completions that it gets, so none is taken out."
    seen = []
    def judge(completions, **columns):
        seen.append(list(completions))
        return [float(completions.count(text)) for text in completions]
    found = FunctionJudge(judge)
    assert found(ROWS) == found(ROWS) == [[2, 1, 2], [1]] and seen == [["b", "cd", "b"], ["fgh"]]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_answered_before_a_failure_is_not_asked_again(tmp_path, workers):
    asked, broken = [], [True]
    def judge(prompt, completion):
        asked.append(completion)
        if completion == "5" and broken: raise ConnectionError("no\nanswer")
        return float(completion)
    rows = [{"index": 0, "prompt": "a", "completions": list("0123456789")}]
    with pytest.raises(InputError, match=r"row 0 \('a'\), candidate 5: .*ConnectionError: no an"):
        FunctionJudge(judge, workers, Answers(tmp_path, "judge"))(rows)
    file, = tmp_path.glob(".answers-*")
    file.write_text(file.read_text() + '\n["torn')
    before = set(asked) - {"5"}
    asked.clear()
    broken.clear()
    answers = Answers(tmp_path, "judge")
    assert FunctionJudge(judge, workers, answers)(rows) == [list(range(10))]
    assert before and set(asked) == set("0123456789") - before
    assert Answers(tmp_path, "judge").found.keys() == answers.found.keys()
    answers.discard()
    assert not list(tmp_path.iterdir())


def test_equal_samples_have_equal_rewards(base, tokenizer, tmp_path):
    "To the last bit, wherever they stand: rounding between them would count as a signal."
    from vcb_nb.losses import reward_sigma
    from vcb_nb.saving import save_model
    save_model(new_reward_model(base, tokenizer), tokenizer, tmp_path/"reward")
    texts = [" a warm soup", " a cold room with a view", " a warm soup", " a warm soup"]
    judge = load_judge(str(tmp_path/"reward"), device="cpu")
    (found,) = judge([{"prompt": "The soup was", "completions": texts}])
    assert found[0] == found[2] == found[3] != found[1]
    assert judge([{"prompt": "The soup was", "completions": texts[:2]}]) == [
        pytest.approx(found[:2], abs=1e-5)]
    same = judge([{"prompt": "The soup was", "completions": texts[:1] * 5}])
    assert not reward_sigma(torch.tensor(same, dtype=torch.float64))[1].any()


def test_a_reward_that_changes_what_it_gets_changes_no_row():
    rows = [{"prompt": "a", "completions": ["c", "b"], "completion_ids": [[2], [1]]}]
    def greedy(completions, completion_ids):
        completions.sort()
        for ids in completion_ids: ids.clear()
        return [float(len(text)) for text in completions]
    assert FunctionJudge(greedy)(rows) == [[1, 1]]
    assert rows == [{"prompt": "a", "completions": ["c", "b"], "completion_ids": [[2], [1]]}]


@pytest.mark.parametrize("source", [3, ["module:function"], {"a": 1}])
def test_a_judge_of_the_wrong_type_is_told(source):
    from vcb_nb.evaluate import EvaluateConfig
    from vcb_nb.score import ScoreConfig
    for make in (lambda: ScoreConfig("c", "out", reward=source),
                 lambda: EvaluateConfig(reference="r", prompts="p", gold=source)):
        with pytest.raises(InputError, match="or in Python a callable"): make()
