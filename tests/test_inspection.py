"""What is said of a file before training: what it is read as, what a training sees of a row, and
what is odd; and the same rows in another layout."""
import json, re

import pytest
from chat_templates import chat_tokenizer
from datasets import Dataset
from hypothesis import given, settings, strategies as st

from layout_rows import BAD, CHAT, GOOD, LAYOUT_ROWS, LIST, PAIR, QUESTION, said, turn
from tiny_models import tiny
from vcb_nb.artifacts import InputError, read_json, write_jsonl
from vcb_nb.calibrate import CalibrationConfig, prepare_dataset
from vcb_nb.chat import as_turns
from vcb_nb.cli import main
from vcb_nb.data import (load_candidates, load_demonstrations, load_pairs, load_rows, other_splits,
                         recognise)
from vcb_nb.inspection import CHECKS, Span, convert, inspect_data, paint, plain
from vcb_nb.reward import encode_pair
from vcb_nb.saving import save_model
from vcb_nb.sft import SFTConfig, collate_rows, sft_datasets

IDS = sorted(LAYOUT_ROWS)
LONG = {"max_prompt_length": 400, "max_length": 900}
TALK = [turn("Be brief.", "system"), turn(QUESTION), turn(GOOD, "assistant"), turn("By bus?"),
        turn("Ten minutes.", "assistant")]


@pytest.fixture(scope="module")
def tokenizer(): return chat_tokenizer("chatml")


def complaint(function, *args, **kwargs):
    with pytest.raises(InputError) as error: function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def tokens(example):
    "(label, ids, 1 for each id that carries a loss) of each response."
    return [(label, [i for span in spans for i in span.ids],
             [int(span.role == "loss") for span in spans for _ in span.ids])
            for label, spans in example]


# What a file is

@pytest.mark.parametrize("name", IDS)
def test_every_layout_is_named_and_shown(name, tmp_path, tokenizer):
    "From a file and from Arrow; with and without a tokenizer; with every answer of the row in it."
    rows, kind, expected = LAYOUT_ROWS[name]
    path = write_jsonl(tmp_path/"rows.jsonl", rows)
    for source in (path, Dataset.from_list(rows)):
        found = inspect_data(source)
        assert (found.source.kind, found.source.layout) == (kind, name)
        assert found.source.rows == len(rows) and found.usable == len(expected)
    texts = "".join(span.text for _, spans in found.example for span in spans)
    written = inspect_data(path, tokenizer, apply_chat_template=True)
    decoded = "".join(span.text for _, spans in written.example for span in spans)
    answers = {"pairs": ("chosen", "rejected"), "demonstrations": ("completion", "messages"),
               "candidates": ("completions",)}[kind]
    for column in set(answers) & set(expected[0]):
        value = expected[0][column]
        for answer in value if column == "completions" else [value]:
            answer = answer if isinstance(answer, str) else answer[-1]["content"]
            assert answer in texts and answer.strip() in decoded


OWN = [([PAIR], "pairs"), ([{"chosen": "\n\nHuman: a\n\nAssistant: b",
                             "rejected": "\n\nHuman: a\n\nAssistant: c"}], "pairs"),
       ([LIST | {"rewards": [2, 1]}], "candidates"), ([LIST], "candidates"),
       ([{"prompt": "p", "completion": "c"}], "demonstrations"), ([{"messages": TALK}],
                                                                  "demonstrations"),
       ([{"post": "p", "summary": "s"}], "demonstrations"),
       ([{"prompt": "p", "label": "s"}], "demonstrations"),
       ([{"article": "p", "highlights": "s"}], "demonstrations"),
       ([{"prompt": "p"}], "prompts"), ([{"prompt": [turn("p")]}], "prompts"),
       ([{"article": "p", "id": 1}], "prompts"), ([{"text": "p"}], "texts")]


@pytest.mark.parametrize("rows, kind", OWN, ids=lambda v: v if isinstance(v, str) else
                         ",".join(v[0]))
def test_our_own_columns_are_known(rows, kind):
    "What is said to be readable as a kind is read as that kind."
    found = inspect_data(Dataset.from_list(rows))
    assert found.source.kind == kind and found.usable == 1 and not found.dropped


def test_the_facts_are_those_of_the_file(tmp_path):
    rows = [PAIR | {"margin": 2.}, PAIR | {"margin": .5}, PAIR | {"rejected": GOOD, "margin": 1.}]
    found = inspect_data(write_jsonl(tmp_path/"pairs.jsonl", rows))
    assert (found.usable, found.prompts, found.rewards) == (2, 1, [2., .5])
    assert found.dropped == {"chosen equals rejected": 1}
    text = str(found)
    for words in ("rows        3; dropped: chosen equals rejected: 1", "pairs, 2 usable",
                  "prompt (text)", "margins     0.5 to 2", f"⟦{GOOD}⟧"): assert words in text
    lists = [LIST | {"rewards": [2, 1]}, LIST | {"completions": list("abc"), "rewards": [3, 2, 9]}]
    found = inspect_data(Dataset.from_list(lists))
    assert found.candidates == [2, 3] and "1 to 9" in found.facts()["rewards"]


def test_a_kind_may_be_asked_for():
    kto = LAYOUT_ROWS["KTO"][0]
    assert inspect_data(Dataset.from_list(kto)).source.kind == "demonstrations"
    found = inspect_data(Dataset.from_list(kto), kind="candidates")
    assert found.source.kind == "candidates" and found.rewards == [1., 0.]
    assert inspect_data(Dataset.from_list(kto), kind="prompts").source.kind == "prompts"
    assert "Did you mean 'pairs'?" in complaint(inspect_data, Dataset.from_list(kto), kind="pair")


def test_unknown_columns_are_listed_with_the_nearest_layout(tmp_path):
    path = write_jsonl(tmp_path/"odd.jsonl", [{"history": "a", "human_ref_A": "b", "labels": 1}])
    words = complaint(inspect_data, path)
    assert "history (text)" in words and "SHP is the nearest" in words and "odd.jsonl" in words


def test_the_row_is_chosen_and_must_be_there():
    rows = Dataset.from_list([PAIR, PAIR | {"chosen": "Another."}])
    assert any(span.text == "Another." for span in inspect_data(rows, row=1).example[0][1])
    for row in (2, -1): assert f"row is {row}" in complaint(inspect_data, rows, row=row)


# What a training sees

@pytest.mark.parametrize("name, rows", [
    *((name, [{"messages": TALK[1:]}, {"messages": TALK}]) for name in ("chatml", "marked",
                                                                        "llama3")),
    ("gemma", [{"messages": TALK[1:]}]), # which has no system turn
    ("gemma", [{"prompt": QUESTION, "completion": " " + GOOD}])])
def test_a_demonstration_is_what_sft_learns(name, rows, tmp_path):
    "Ids and labels are those of the batch that `sft` makes of the same file."
    tokenizer, path = chat_tokenizer(name), write_jsonl(tmp_path/"rows.jsonl", rows)
    config = SFTConfig(str(tmp_path/"o"), model="m", data=str(path), eval_share=0, **LONG)
    made = sft_datasets(config, tokenizer)[0].to_list()
    for i in range(len(rows)):
        batch = collate_rows([made[i]], pad_id=0)
        (_, ids, mask), = tokens(inspect_data(path, tokenizer, row=i).example)
        assert ids == batch["input_ids"][0].tolist()
        assert mask == (batch["labels"][0] != -100).int().tolist() and sum(mask)


def test_a_prompt_without_a_token_leaves_the_first_one_unlearned(tmp_path, tokenizer):
    path = write_jsonl(tmp_path/"rows.jsonl", [{"prompt": "", "completion": "So."}])
    config = SFTConfig(str(tmp_path/"o"), model="m", data=str(path), eval_share=0, **LONG)
    labels = collate_rows(sft_datasets(config, tokenizer)[0].to_list(), pad_id=0)["labels"][0]
    (_, _, mask), = tokens(inspect_data(path, tokenizer).example)
    assert mask == (labels != -100).int().tolist() and mask[:2] == [0, 1]


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("row", [PAIR, CHAT], ids=["strings", "messages"])
def test_a_pair_is_what_the_reward_model_reads(row, apply, tokenizer):
    rows = Dataset.from_list([row])
    pair = load_pairs(rows)[0]
    made = encode_pair(tokenizer, as_turns(pair) if apply else pair, *LONG.values())
    shown = tokens(inspect_data(rows, tokenizer, apply_chat_template=apply).example)
    assert [ids for _, ids, _ in shown] == [made["chosen_ids"], made["rejected_ids"]]
    assert all(mask[-1] == 1 and mask[0] == 0 for _, _, mask in shown)


@pytest.mark.parametrize("stored", [False, True], ids=["texts", "ids"])
def test_candidates_are_what_calibration_reads(stored, tokenizer):
    "Stored ids are shown as they are, also where the texts would give others."
    row = LIST | {"rewards": [2., 1.], "ref_logps": [-1., -2.]}
    if stored: row |= {"prompt_ids": [40, 41], "finish_reasons": ["length", "length"],
                       "completion_ids": [tokenizer(text).input_ids[:3] for text in (GOOD, BAD)]}
    rows = Dataset.from_list([row])
    args = CalibrationConfig(output_dir="o", model="m", candidates="c")
    want = prepare_dataset(load_candidates(rows), "train", args, tokenizer)[0][0]
    shown = tokens(inspect_data(rows, tokenizer).example)
    for (_, ids, mask), completion in zip(shown, want["completion_ids"], strict=True):
        assert ids == want["prompt_ids"] + completion
        assert mask == [0] * len(want["prompt_ids"]) + [1] * len(completion)


def test_a_character_of_several_tokens_is_whole(tokenizer):
    "Stretches are decoded with what precedes them; together they are the whole text."
    row = {"prompt": "¿Qué? 你好", "completion": "港は遠い?"}
    (_, spans), = inspect_data(Dataset.from_list([row]), tokenizer).example
    assert "".join(span.text for span in spans) == "¿Qué? 你好港は遠い?<|im_end|>"
    assert [span.special for span in spans] == [False, False, True]


def test_lengths_and_the_context_are_counted(tmp_path, tokenizer):
    model = save_model(tiny(tokenizer, max_position_embeddings=24), tokenizer, tmp_path/"model")
    rows = Dataset.from_list([{"prompt": "a" * n, "completion": "b" * 4} for n in (4, 8, 30)])
    found = inspect_data(rows, model)
    assert found.lengths == {"prompt": [4, 8, 30], "with answer": [9, 13, 35]}
    assert (found.context, found.beyond, found.measured) == (24, 1, 3)
    assert "min 9, median 13, 95 % 33, max 35 tokens" in str(found)
    assert any("longer than the model's context of 24 tokens: 1 of 3" in w for w in found.warnings)
    assert not inspect_data(rows.select([0, 1]), model).warnings[1:] # but that it is a chat model


# What is odd

END = "<|im_end|>" # tokens stand for their ids
ENDED = {"prompt": "?", "completions": ["ab", "cd"], "rewards": [2., 1.], "prompt_ids": [40],
         "completion_ids": [["a", "b"], ["c", "d"]]}
HALF = ENDED | {"completion_ids": [["a", "b", END], ["c", "d"]]}
THREE = {"prompt": QUESTION, "completions": [GOOD, BAD, "No."], "rewards": [3., 2., 1.]}
WARNINGS = { # words → (rows with the fault, rows without it)
    "whose last id is no end token: 2 of 2": (
        [ENDED], [HALF]),
    "whose last id is no end token: 1 of 2": (
        [HALF | {"finish_reasons": ["stop", "stop"]}],
        [HALF | {"finish_reasons": ["stop", "length"]}]),
    "cut off at the length limit": ([THREE | {"finish_reasons": ["length"] * 3}],
                                    [THREE | {"finish_reasons": ["length", "stop", "length"]}]),
    "stored token ids do not come from the tokenizer of the model": (
        [ENDED | {"completions": ["no", "yes"]}], [ENDED]),
    "Rows that cannot be used: 1 (empty response: 1)": ([PAIR, PAIR | {"chosen": " "}], [PAIR]),
    "Empty candidates: 1 of 3": ([THREE | {"completions": [GOOD, "\u200b", "No."]}], [THREE]),
    "Prompts in several rows: 1 of 2, one of them in 3 rows": (
        [PAIR, PAIR, PAIR, PAIR | {"prompt": "Why?"}], [PAIR, PAIR | {"prompt": "Why?"}]),
    "Texts in several rows: 1 of 1": ([{"text": "a"}] * 2, [{"text": "a"}, {"text": "b"}]),
    "all have the same reward: 1 of 2": (
        [THREE, THREE | {"prompt": "Why?", "rewards": [1e6 + 2, 1e6 + 2, 1e6 + 2]}],
        [THREE, THREE | {"prompt": "Why?", "rewards": [1e6 + .1, 1e6 + .2, 1e6 + .3]}]),
    "Every reward is 1": ([THREE | {"rewards": [1, 1, 1]}], [THREE]),
    "No prompt has more than two candidates": ([LIST | {"rewards": [2, 1]}],
                                               [THREE, LIST | {"rewards": [2, 1]}]),
    "plain strings, and the tokenizer is a chat model's": ([PAIR], [CHAT]),
    "special token, such as <|im_end|>: 1 of 2": (
        [CHAT, CHAT | {"chosen": said("So.<|im_end|>")}], [CHAT]),
    "special token, such as <|endoftext|>: 1 of 1": (
        [THREE | {"completions": ["<|endoftext|>", "b", "c"]}], [THREE]),
    "no chat template": ([CHAT], [PAIR]),
}


@pytest.mark.parametrize("words", WARNINGS)
def test_a_warning_is_given_where_it_is_due_and_only_there(words, tokenizer, tiny_tokenizer):
    def with_ids(row):
        ids = list(map(tokenizer.convert_tokens_to_ids, row.get("completion_ids", ())))
        return row | ({"completion_ids": ids} if ids else {})
    def read(rows):
        return inspect_data(Dataset.from_list(list(map(with_ids, rows))),
                            tiny_tokenizer if "no chat" in words else tokenizer)
    (faulty, right) = map(read, WARNINGS[words])
    assert sum(words in said for said in faulty.warnings) == 1, faulty.warnings
    assert not any(words in said for said in right.warnings), right.warnings
    assert faulty.example and words in str(faulty) and all("\n" not in w for w in faulty.warnings)


def test_every_check_has_an_instance():
    "Of those that need no second file."
    names = {check.__name__ for check in CHECKS} - {"shared", "too_long"}
    assert names == {"unusable", "blank", "repeated", "tied", "endless", "special_text"}


def test_prompts_of_another_file_and_of_the_other_splits(tmp_path):
    "Whatever kind the other file is; a split is found where its folder says it is."
    folder = tmp_path/"hub"
    train = write_jsonl(folder/"train.jsonl", [PAIR, PAIR | {"prompt": "Why?"}])
    write_jsonl(folder/"test.jsonl", [{"prompt": "Why?", "chosen": "c", "rejected": "d"}])
    write_jsonl(folder/"validation.jsonl", [PAIR | {"prompt": "When?"}])
    found = inspect_data(f"{folder}#train").warnings
    assert len(found) == 1 and f"{folder}#test as well: 1 of 2" in found[0]
    assert not inspect_data(train).warnings and not inspect_data(f"{folder}#validation").warnings
    other = write_jsonl(tmp_path/"list.jsonl", [THREE])
    assert f"{other} as well: 1 of 2" in inspect_data(train, against=other).warnings[0]
    other = write_jsonl(tmp_path/"list.jsonl", [THREE | {"prompt": "Where?"}])
    assert not inspect_data(train, against=other).warnings


def test_splits_of_configs_and_of_saved_datasets(tmp_path):
    for name in ("one/train", "one/test", "two/train"):
        write_jsonl(tmp_path/"hub"/f"{name}.jsonl", [PAIR])
    configs = "\n".join(f"- config_name: {c}\n  data_files:\n"
                        + "".join(f"  - split: {s}\n    path: {c}/{s}.jsonl\n" for s in splits)
                        for c, splits in {"one": ("train", "test"), "two": ("train",)}.items())
    (tmp_path/"hub"/"README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (other,) = other_splits(f"{tmp_path}/hub#one/train")
    assert other.endswith("#one/test") and recognise(other).rows == 1
    assert other_splits(f"{tmp_path}/hub#two/train") == []
    from datasets import DatasetDict
    saved = DatasetDict(train=Dataset.from_list([PAIR]), test=Dataset.from_list([PAIR]))
    saved.save_to_disk(tmp_path/"saved")
    assert other_splits(f"{tmp_path}/saved#train") == [f"{tmp_path}/saved#test"]


# How it looks

def test_colours_a_page_and_plain_text_say_the_same(tokenizer):
    found = inspect_data(Dataset.from_list([{"messages": TALK}]), tokenizer)
    bare = re.sub(r"\033\[\d+m", "", found.text(color=True))
    assert "\033[32m" in found.text(color=True) and "\033" not in str(found)
    assert bare == re.sub(r"⟦|⟧|\n  ⟦…⟧: what carries the loss", "", str(found))
    bs4 = pytest.importorskip("bs4")
    page = bs4.BeautifulSoup(found._repr_html_(), "html.parser")
    assert page.text == bare and len(page.select('span[style*="background"]')) == 2


def test_a_text_cannot_reach_the_terminal_or_the_page():
    "Control characters and markup of the data are shown, not obeyed."
    rows = Dataset.from_list([{"prompt": "\033]0;x\007\r", "completion": "<script>1</script>"}])
    found = inspect_data(rows)
    assert "\033" not in str(found) and r"\x1b]0;x\x07\r" in str(found)
    assert "<script>" not in found._repr_html_() and "&lt;script&gt;" in found._repr_html_()


def test_long_stretches_lose_their_middle(tokenizer):
    rows = Dataset.from_list([{"prompt": "a" * 9000, "completion": "b" * 9000}])
    for found in (inspect_data(rows), inspect_data(rows, tokenizer)):
        assert len(str(found)) < 4000 and "(8600 characters)" in str(found)


# Other layouts

REWARDS = st.floats(-1e6, 1e6)
ANSWERS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
LISTS = st.lists(st.tuples(ANSWERS, REWARDS), min_size=2, max_size=4)


@given(st.lists(st.tuples(ANSWERS, LISTS), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_candidates_survive_the_layout_of_ultrafeedback(tmp_path_factory, lists):
    folder = tmp_path_factory.mktemp("c")
    rows = [{"prompt": prompt, "completions": [a for a, _ in answers],
             "rewards": [r for _, r in answers]} for prompt, answers in lists]
    path = write_jsonl(folder/"rows.jsonl", rows)
    convert(path, folder/"ultra.jsonl", "ultrafeedback")
    assert recognise(folder/"ultra.jsonl").layout == "UltraFeedback"
    convert(folder/"ultra.jsonl", folder/"back.jsonl", "candidates")
    assert load_rows(folder/"back.jsonl").to_list() == rows


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", [PAIR, CHAT, CHAT | {"prompt": TALK[:4]}],
                         ids=["strings", "messages", "turns"])
def test_pairs_survive_the_way_to_candidates(row, ending, tmp_path):
    rows = [row | {"margin": margin} for margin in (2.5, 1e-3)]
    rows[1] = rows[1] | {"prompt": [turn("Why?")] if row is not PAIR else "Why?"}
    path = write_jsonl(tmp_path/"pairs.jsonl", rows)
    assert convert(path, tmp_path/f"list.{ending}", "candidates") == 2
    assert load_candidates(tmp_path/f"list.{ending}")["rewards"][:] == [[2.5, 0.], [1e-3, 0.]]
    convert(tmp_path/f"list.{ending}", tmp_path/f"back.{ending}", "pairs")
    assert load_pairs(tmp_path/f"back.{ending}").to_list() == load_pairs(path).to_list()


@pytest.mark.parametrize("name", IDS)
def test_every_layout_becomes_what_it_can(name, tmp_path):
    """Pairs and candidates are those of the loaders, a chat ends in the answer of the loader of
    demonstrations, and what has no rewards is refused."""
    rows, kind, _ = LAYOUT_ROWS[name]
    path = write_jsonl(tmp_path/"rows.jsonl", rows)
    best = [as_turns(row) for row in load_demonstrations(path)]
    if kind != "demonstrations" or name == "KTO":
        if name != "KTO": # its three rows have one answer each with another label
            convert(path, tmp_path/"pairs.jsonl", "pairs")
            chosen = load_pairs(path)
            assert len(load_pairs(tmp_path/"pairs.jsonl")) == len(chosen)
        convert(path, tmp_path/"lists.jsonl", "candidates")
        assert min(map(len, load_candidates(tmp_path/"lists.jsonl")["rewards"])) > 1
    else: assert "no rewards" in complaint(convert, path, tmp_path/"pairs.jsonl", "pairs")
    assert convert(path, tmp_path/"chat.jsonl", "chat") == len(best)
    written = [json.loads(line)["messages"] for line in (tmp_path/"chat.jsonl").open()]
    assert [(m[0]["role"], m[-1]["content"]) for m in written] == [
        (row["prompt"][0]["role"], row["completion"][-1]["content"].strip()) for row in best]


def test_a_chat_keeps_system_turns_tools_and_calls(tmp_path):
    call = {"type": "function", "function": {"name": "bus", "arguments": {"line": 7}}}
    tools = [{"type": "function", "function": {"name": "bus", "parameters": {"type": "object"}}}]
    messages = [*TALK[:2], {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "12:30"}, *said("At half past twelve.")]
    path = write_jsonl(tmp_path/"rows.jsonl", [{"messages": messages, "tools": tools}])
    for ending in ("jsonl", "parquet"): convert(path, tmp_path/f"chat.{ending}", "chat")
    assert read_json(tmp_path/"chat.jsonl") == {"messages": messages, "tools": tools}
    both = [load_demonstrations(tmp_path/f"chat.{e}").to_list() for e in ("jsonl", "parquet")]
    assert both[0] == both[1] == load_demonstrations(path).to_list()


def test_pairs_keep_their_tools_on_the_way_to_candidates_and_back(tmp_path):
    "The template needs them for every row; sides of a conversation are messages again."
    row = {"prompt": [turn(QUESTION)], "chosen": said(GOOD), "rejected": said(BAD), "margin": 2.}
    rows = [{**row, "tools": [{"type": "function", "function": {"name": "bus"}}]}]
    path = write_jsonl(tmp_path/"pairs.jsonl", rows)
    convert(path, tmp_path/"lists.jsonl", "candidates")
    convert(tmp_path/"lists.jsonl", tmp_path/"back.jsonl", "pairs")
    assert read_json(tmp_path/"back.jsonl") == rows[0]


def test_a_dialogue_of_hh_becomes_turns(tmp_path):
    start = "\n\nHuman: Is it far?\n\nAssistant: An hour.\n\nHuman: On foot?\n\nAssistant:"
    rows = [{"chosen": start + " Yes.", "rejected": start + " No."}]
    convert(write_jsonl(tmp_path/"hh.jsonl", rows), tmp_path/"chat.jsonl", "chat")
    assert read_json(tmp_path/"chat.jsonl")["messages"] == [
        turn("Is it far?"), *said("An hour."), turn("On foot?"), *said("Yes.")]


def test_trl_reads_the_pairs(tmp_path):
    "As preferences, conversational where ours are, with the same prompt."
    trl = pytest.importorskip("trl.data_utils")
    chat = [{"prompt": [turn(QUESTION)], "completions": [GOOD, BAD], "rewards": [2., 1.]}]
    for rows, talks in (([THREE], False), (chat, True)):
        path = write_jsonl(tmp_path/"list.jsonl", rows)
        convert(path, tmp_path/"pairs.jsonl", "pairs", redo=True)
        for row in map(json.loads, (tmp_path/"pairs.jsonl").open()):
            assert set(row) == {"prompt", "chosen", "rejected", "margin"} and row["margin"] > 0
            assert trl.is_conversational(row) == talks
            assert trl.maybe_extract_prompt(row) == row
    whole = {side: chat[0]["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert trl.maybe_extract_prompt(whole) == {k: row[k] for k in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("mode, count", [("all", 3), ("best_worst", 1), ("best_of_rest", 2)])
def test_modes_of_pairs(mode, count, tmp_path):
    rows = write_jsonl(tmp_path/"list.jsonl", [THREE])
    assert convert(rows, tmp_path/"pairs.jsonl", "pairs", mode) == count


@pytest.mark.parametrize("rows, to, words", [
    ([{"text": "a"}], "pairs", "contains texts, which have no rewards"),
    ([{"prompt": "a"}], "chat", "contains prompts, which have no answer"),
    ([{"messages": TALK}], "ultrafeedback", "contains demonstrations, which have no rewards"),
    ([LIST], "pairs", "no column 'rewards'"),
    ([CHAT], "ultrafeedback", "the prompt is a list of messages"),
    ([PAIR | {"margin": -1.}], "candidates", "pair 0: the margin is -1"),
    ([CHAT | {"chosen": [*said(GOOD), turn("?"), *said(BAD)]}], "candidates",
     "pair 0: an answer is more than one message"),
    ([PAIR], "pears", "Did you mean 'pairs'?"),
])
def test_what_cannot_be_is_said(rows, to, words, tmp_path):
    "Nothing is written then."
    path = write_jsonl(tmp_path/"rows.jsonl", rows)
    assert words in complaint(convert, path, tmp_path/"out.jsonl", to)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


# The command line

def run(capsys, *words):
    status = main(["data", *map(str, words)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_inspect_on_the_command_line(capsys, tmp_path, tokenizer, monkeypatch):
    "Plain where nobody looks, in colour where that is asked for; nothing else is printed."
    tokenizer.save_pretrained(tmp_path/"model")
    path = write_jsonl(tmp_path/"rows.jsonl", [{"messages": TALK}, {"messages": TALK[1:]}])
    assert run(capsys, "inspect", path) == (0, f"{inspect_data(path)}\n", "")
    words = ["inspect", path, "--model", tmp_path/"model", "--row", 1]
    want = inspect_data(path, tmp_path/"model", row=1)
    assert run(capsys, *words, "--color", "no") == (0, f"{want}\n", "")
    assert run(capsys, *words, "--color=yes")[1] == want.text(color=True) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(capsys, *words)[1] == want.text(color=True) + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, *words)[1] == f"{want}\n"


def test_convert_on_the_command_line(capsys, tmp_path):
    "A file is replaced only where that is asked for."
    path, out = write_jsonl(tmp_path/"list.jsonl", [THREE]), tmp_path/"pairs.jsonl"
    words = ["convert", path, out, "--to", "pairs"]
    assert run(capsys, *words) == (0, f"{out}: 3 rows\n", "")
    status, _, err = run(capsys, *words, "--mode", "best_worst")
    assert status == 2 and "is there already" in err and len(load_rows(out)) == 3
    assert run(capsys, *words, "--mode", "best_worst", "--redo") == (0, f"{out}: 1 row\n", "")


def test_help_names_the_two(capsys):
    assert all(f"vcb data {name}" in run(capsys, "--help")[1] for name in ("inspect", "convert"))
    for name, option in (("inspect", "--against"), ("convert", "--mode")):
        status, out, _ = run(capsys, name, "--help")
        assert status == 0 and out.startswith(f"usage: vcb data {name}") and option in out
    assert "inspect" in run(capsys, "./inspect")[2] # a recipe of that name


@pytest.mark.parametrize("words, want", [
    (["inspect"], "takes one file"), (["inspect", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["inspect", "{own}", "--modle", "m"], "Did you mean 'model'?"),
    (["inspect", "{own}", "--row", "x"], "--row"), (["inspect", "{own}", "--row", "7"], "row is 7"),
    (["inspect", "{own}", "--color", "x"], "'x' is not yes or no"),
    (["inspect", "{own}", "--kind", "pears"], "Did you mean 'pairs'?"),
    (["inspect", "{own}", "--against", ""], "--against is empty"),
    (["inspect", "{own}", "--model", "./none"], "no such model folder"),
    (["convert", "{own}"], "a source and a file"),
    (["convert", "{own}", "o.jsonl"], "needs --to"),
    (["convert", "{own}", "o.csv", "--to", "pairs"], ".jsonl or .parquet"),
    (["convert", "{own}", "o.jsonl", "--to", "pairs", "--mode", "some"], "Unknown mode 'some'"),
])
def test_bad_words_give_one_sentence(capsys, tmp_path, words, want):
    path = write_jsonl(tmp_path/"rows.jsonl", [PAIR])
    status, out, err = run(capsys, *(word.replace("{own}", str(path)) for word in words))
    assert status == 2 and want in err and err.count("\n") == 1 and not out


def test_a_plain_brush_marks_the_loss():
    assert paint([Span("prompt", "a\n"), Span("loss", "b"), Span("loss", "<e>", special=True)],
                 plain) == "a↵\n⟦b<e>⟧"
