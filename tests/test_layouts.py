"Layouts of public datasets: each is recognised by its columns, whatever file it is in."
import gzip, json, logging
from itertools import permutations
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from pyarrow import feather

from layout_rows import BAD, GOOD, LAYOUT_ROWS, LIST, PAIR, QUESTION
from vcb_nb import data
from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.data import (counting_dropped, load_candidates, load_demonstrations, load_pairs,
                         load_prompts, load_rows)
from vcb_nb.layouts import LAYOUTS, find_layout, layout_table

PAGE = Path(__file__).parents[1]/"nbs"/"layouts.qmd"

LOADERS = {"pairs": load_pairs, "candidates": load_candidates,
           "demonstrations": load_demonstrations}
IDS = sorted(LAYOUT_ROWS)


def message(function, *args, **kwargs):
    "What the `InputError` says."
    with pytest.raises(InputError) as error: function(*args, **kwargs)
    return str(error.value)


def made(source, kind):
    "What the adapter makes of a source, before any other check."
    place = data._adapted(data._locate(source), kind)
    return [row for _, row in place[1]]


def is_chat(rows): return any(isinstance(v, list) and isinstance(v[0], dict)
                              for v in rows[0].values())


def test_the_page_has_the_table(): assert f"\n\n{layout_table()}\n\n" in PAGE.read_text("utf-8")


def test_every_layout_has_rows(): assert {one.name for one in LAYOUTS} == set(LAYOUT_ROWS)


@pytest.mark.parametrize("name", IDS)
def test_a_layout_is_recognised_and_turned(name, tmp_path):
    "In a file and as Arrow; what is plain text then comes out of the loader the same."
    rows, kind, expected = LAYOUT_ROWS[name]
    path = write_jsonl(tmp_path/"rows.jsonl", rows)
    for source in (path, Dataset.from_list(rows)):
        assert find_layout(data._columns(data._locate(source))[1]).name == name
        assert made(source, kind) == expected
        if is_chat(expected): continue
        columns = list(expected[0])
        assert LOADERS[kind](source).select_columns(columns).to_list() == expected


def test_pairs_demonstrations_and_prompts_of_any_layout(tmp_path):
    "What a layout does not give directly: pairs of lists, the best answer, the prompts."
    steer = write_jsonl(tmp_path/"steer.jsonl", LAYOUT_ROWS["HelpSteer2"][0])
    assert load_pairs(steer).to_list() == [PAIR | {"margin": 3.}]
    assert load_demonstrations(steer).to_list() == [{"prompt": QUESTION, "completion": GOOD}]
    assert load_prompts(steer).to_list() == [{"prompt": QUESTION}]
    safe = Dataset.from_list(LAYOUT_ROWS["PKU-SafeRLHF"][0])
    assert load_demonstrations(safe).to_list() == [{"prompt": QUESTION, "completion": GOOD}]


@pytest.mark.parametrize("good,bad", [(True, False), (1, 0), (1, -1)], ids=str)
def test_a_bad_answer_is_no_demonstration(good, bad, caplog):
    "KTO's labels, as truth values or as numbers; a file of bad answers only is refused."
    rows = [{"prompt": p, "completion": c, "label": label}
            for p, c, label in (("p", " a", good), ("p", " b", bad), ("q", " c", bad))]
    with counting_dropped() as dropped, caplog.at_level(logging.WARNING):
        found = load_demonstrations(Dataset.from_list(rows))
    assert found.to_list() == [{"prompt": "p", "completion": " a"}]
    assert dropped == {"label is false": 2} and "2 of 3 rows dropped" in caplog.text
    assert load_pairs(Dataset.from_list(rows))["rejected"][:] == [" b"]
    assert load_prompts(Dataset.from_list(rows))["prompt"][:] == ["p", "q"] # also where one label
    assert "label is false: 2" in message(load_demonstrations, Dataset.from_list(rows[1:]))
    texts = Dataset.from_list([{"prompt": "p", "label": " a summary"}]) # TRL's TL;DR
    assert load_demonstrations(texts)["completion"][:] == [" a summary"]


@pytest.mark.parametrize("name", IDS)
def test_the_order_of_rows_and_files_does_not_matter(name, tmp_path):
    rows, kind, expected = LAYOUT_ROWS[name]
    if len(rows) > 1 and len(expected) > 1:
        (tmp_path/"rows").mkdir()
        for i, row in enumerate(reversed(rows)): write_jsonl(tmp_path/"rows"/f"{i}.jsonl", [row])
        assert made(tmp_path/"rows", kind) == expected[::-1]
    wider = [row | {"note": i} if i else row for i, row in enumerate(rows)]
    assert made(write_jsonl(tmp_path/"wider.jsonl", wider), kind)[0].keys() >= expected[0].keys()


def test_scores_that_contradict_a_pair_are_counted(tmp_path):
    rows = [PAIR | {"score_chosen": c, "score_rejected": r} for c, r in ((2, 1), (1, 1), (1, 2))]
    with counting_dropped() as dropped: pairs = load_pairs(write_jsonl(tmp_path/"p.jsonl", rows))
    assert pairs["margin"][:] == [1.]
    assert dropped == {"equal scores": 1, "the rejected answer scores higher": 1}


def test_a_row_of_another_layout_is_named(tmp_path):
    rows = [*LAYOUT_ROWS["SHP"][0], {"history": "Why?", "human_ref_A": "So."}]
    said = message(load_pairs, write_jsonl(tmp_path/"p.jsonl", rows))
    assert "p.jsonl:3" in said and "human_ref_B" in said
    empty = [*LAYOUT_ROWS["HelpSteer2"][0], {"prompt": None, "response": "So.", "helpfulness": 1}]
    with counting_dropped() as dropped: load_candidates(write_jsonl(tmp_path/"q.jsonl", empty))
    assert dropped == {"no prompt": 1}


def test_an_unknown_layout_shows_its_columns_and_the_nearest(tmp_path):
    row = {"history": "Why?", "human_ref_A": "So.", "labels": 1, "votes": 3}
    said = message(load_pairs, write_jsonl(tmp_path/"p.jsonl", [row]))
    for words in ("no column 'chosen'", "history, human_ref_A, labels, votes", "SHP is the nearest",
                  "it also has 'human_ref_B' (text)"): assert words in said
    row = {"prompt": "Why?", "answers": ["So."]} # not records with ranks
    assert "Nectar is the nearest" in message(load_candidates, Dataset.from_list([row]))


# --- Files

def as_file(path, rows):
    "Rows in the format of the file's name."
    table = pa.Table.from_pylist(rows)
    ending = path.name.partition(".")[2]
    if ending == "parquet": pa.parquet.write_table(table, path)
    elif ending == "feather": feather.write_feather(table, path)
    elif ending == "arrow":
        with pa.ipc.new_stream(path, table.schema) as out: out.write_table(table)
    elif ending == "file.arrow":
        with pa.ipc.new_file(path, table.schema) as out: out.write_table(table)
    elif ending in ("csv", "tsv"):
        separator, quoted = ("," if ending == "csv" else "\t"), '"{}"'.format
        cell = lambda v: quoted(str(v).replace('"', '""')) if v is not None else ""
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("".join(separator.join(map(cell, line)) + "\r\n" for line in lines))
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packed = path.suffix[1:]
        if packed == "zst":
            with pa.CompressedOutputStream(str(path), "zstd") as out: out.write(content)
        elif packed in ("gz", "misnamed"): path.write_bytes(gzip.compress(content))
        else: path.write_bytes(content)
    return path


FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "tsv", "parquet", "arrow", "file.arrow",
           "feather")


@pytest.mark.parametrize("ending", FORMATS)
def test_every_kind_of_file_gives_the_same(ending, tmp_path):
    "Numbers, quotes, line ends and an empty cell survive."
    rows = [PAIR | {"chosen": 'He said: "1,\n2"', "margin": 2.5}, PAIR | {"margin": 1.}]
    assert load_pairs(as_file(tmp_path/f"a.{ending}", rows)).to_list() == rows
    labelled = [{"prompt": "1984", "completion": "5", "label": True},
                {"prompt": "p", "completion": " b", "label": False}]
    path = as_file(tmp_path/f"b.{ending}", labelled)
    assert load_demonstrations(path).to_list() == [{"prompt": "1984", "completion": "5"}]


def test_tables_hold_lists_and_name_their_lines(tmp_path):
    path = tmp_path/"a.csv"
    path.write_text('prompt,completions,rewards\n"two\nlines","[""a"", ""b""]","[2, 1.5]"\n')
    assert load_candidates(path)["rewards"][:] == [[2., 1.5]]
    bad = {"prompt,completion\na\n": ":2: 1 cells for 2", "a,a\n1,2\n": ":1: the first line",
           'prompt,completion\n"a"b,c\n': ":2: not a table", "prompt\n": "no rows"}
    for text, part in bad.items():
        path.write_text(text)
        assert "a.csv" + part in message(load_rows, path) or part == "no rows"


def test_the_first_bytes_say_what_a_file_is(tmp_path):
    "Fault 19: gzip named .jsonl is read; what is no text says what it is."
    content = (json.dumps(PAIR) + "\n").encode()
    (tmp_path/"a.jsonl").write_bytes(gzip.compress(content))
    assert load_pairs(tmp_path/"a.jsonl").to_list() == [PAIR]
    as_file(tmp_path/"b.parquet", [PAIR]).rename(tmp_path/"b.jsonl")
    assert "Name it .parquet" in message(load_pairs, tmp_path/"b.jsonl")
    (tmp_path/"c.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in message(load_pairs, tmp_path/"c.jsonl")
    (tmp_path/"d.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd nothing")
    assert "broken" in message(load_pairs, tmp_path/"d.jsonl.zst")


# --- Splits of a Hub repository's copy

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train_prefs, path: data/train_prefs-*}
  - {split: test_prefs, path: data/test_prefs-*}
  - {split: train_sft, path: data/train_sft-*}
- config_name: small
  data_files:
  - {split: train_prefs, path: small/*.jsonl}
---
"""


@pytest.fixture
def copy(tmp_path):
    "A repository with two shards of one split, three splits, and two configurations."
    folder = tmp_path/"ultra"
    (folder/"data").mkdir(parents=True)
    (folder/"README.md").write_text(CARD)
    shards = {"train_prefs-00000-of-00002": "ab", "train_prefs-00001-of-00002": "c",
              "test_prefs-00000-of-00001": "de", "train_sft-00000-of-00001": "f"}
    for name, prompts in shards.items():
        rows = [{"prompt": p, "completion": p} for p in prompts]
        as_file(folder/"data"/f"{name}.parquet", rows)
    write_jsonl(folder/"small"/"x.jsonl", [{"prompt": "g", "completion": "g"}])
    return folder


SPLITS = {"train_prefs": "abc", "test_prefs": "de", "train_sft": "f", "default/train_sft": "f",
          "small/train_prefs": "g", "small": "g"}


@pytest.mark.parametrize("card", (True, False), ids=("card", "no card"))
def test_splits_are_those_of_load_dataset(copy, tmp_path, monkeypatch, card):
    "Fault 15: each split alone, with a card or by the names of the files."
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache")
    if not card: (copy/"README.md").unlink()
    theirs = datasets.load_dataset(str(copy), *["default"] * card)
    for name, rows in theirs.items():
        assert load_prompts(f"{copy}#{name}")["prompt"][:] == rows["prompt"][:]
    if card: assert set(theirs) == {"train_prefs", "test_prefs", "train_sft"}
    for name, prompts in SPLITS.items() if card else ():
        assert load_prompts(f"{copy}#{name}")["prompt"][:] == list(prompts)


def test_an_unclear_split_is_listed(copy):
    "Nothing named, a beginning of a name, or a split that is not there: one sentence."
    for name in ("", "#train", "#nope", "#small/test_prefs"):
        said = message(load_prompts, f"{copy}{name}")
        assert "train_prefs" in said and ("#" in said or "no split" in said), said
    said = message(load_prompts, copy)
    assert "train_prefs, test_prefs, train_sft" in said and "Choose one" in said


def test_a_folder_of_one_split_needs_no_name(tmp_path):
    for split in ("train", "validation", "data"):
        write_jsonl(tmp_path/split/f"{split}-00000-of-00001.jsonl", [{"prompt": split}])
        assert load_prompts(tmp_path/split)["prompt"][:] == [split]


# --- Columns that some rows lack

TEXTS = [PAIR | {"prompt": p, "note": 1} for p in "ab"]
LAST = PAIR | {"prompt": "c", "margin": 1.5, "note": 2.5, "late": [1]}


@pytest.mark.parametrize("in_memory", (1 << 20, 0), ids=("small", "large"))
@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
def test_a_column_that_some_rows_lack(order, in_memory, tmp_path, monkeypatch):
    "Fault 17: small or large, in any order, in one file or three: the same rows, the same refusal."
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache")
    rows = [[*TEXTS, LAST][i] for i in order]
    columns = ("prompt", "chosen", "rejected", "margin", "note", "late")
    expected = [{c: row.get(c) for c in columns} for row in rows]
    one = write_jsonl(tmp_path/"one.jsonl", rows)
    for i, row in enumerate(rows): write_jsonl(tmp_path/"many"/f"{i}.jsonl", [row])
    for source in (one, tmp_path/"many"):
        assert load_rows(source).select_columns(columns).to_list() == expected
        assert "no 'margin', which other rows have" in message(load_pairs, source)
        assert len(load_demonstrations(source)) == 3 # nothing there depends on the margin
    tables = tmp_path/"tables"
    tables.mkdir()
    for i, row in enumerate(rows): as_file(tables/f"{i}.parquet", [row])
    assert load_rows(tables).select_columns(columns).to_list() == expected
    assert "margin" in message(load_pairs, tables)


@pytest.mark.parametrize("column,value", [("rewards", [1., 2.]), ("ref_logps", [-1., -2.]),
                                          ("reward_std", 1.), ("finish_reasons", ["stop"] * 2)])
def test_the_same_rule_holds_for_candidates(column, value, tmp_path):
    rows = [LIST, LIST | {column: value}]
    for ordered in (rows, rows[::-1]):
        said = message(load_candidates, write_jsonl(tmp_path/"c.jsonl", ordered))
        assert column in said and f"c.jsonl:{1 + ordered.index(LIST)}" in said
    empty = Dataset.from_list([LIST | {column: value}]).map(lambda row: {column: None})
    assert len(load_candidates(empty)) == 1 # a column that no row fills is none


def test_a_late_fraction_makes_a_column_of_numbers(tmp_path, monkeypatch):
    "Whole numbers in the first thousand rows, fractions and gaps later; large files as small ones."
    rows = [{"prompt": str(i), "n": i} for i in range(1200)] + [{"prompt": "x", "n": .5},
                                                                {"prompt": "y"}]
    path = write_jsonl(tmp_path/"p.jsonl", rows)
    small = load_rows(path).to_list()
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache")
    assert load_rows(path).to_list() == small and small[-2:] == [
        {"prompt": "x", "n": .5}, {"prompt": "y", "n": None}]


def test_large_files_of_other_layouts(tmp_path, monkeypatch):
    rows, _, expected = LAYOUT_ROWS["HelpSteer2"]
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache")
    path = write_jsonl(tmp_path/"p.jsonl", rows)
    assert load_candidates(path).to_list() == expected
    write_jsonl(path, [row | {"helpfulness": 9 - row["helpfulness"]} for row in rows])
    assert load_candidates(path)["rewards"][:] == [[5., 8.]] # not what the cache had


@pytest.mark.parametrize("ending", ("jsonl", "parquet"))
def test_a_cache_that_cannot_be_written_is_named(ending, tmp_path, monkeypatch):
    "Fault 19: small files need no cache; large ones say which folder it is and how to choose one."
    (tmp_path/"cache").write_text("a file")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache"/"inside")
    path = as_file(tmp_path/f"a.{ending}", [PAIR])
    assert load_pairs(path).to_list() == [PAIR]
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    said = message(load_pairs, path)
    assert "cannot be written" in said and "HF_DATASETS_CACHE" in said and "inside" in said
