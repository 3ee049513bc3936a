"Data: every format is read as it is, every bad row is named, and ids are made once and kept apart."
import gzip, json, logging, os, subprocess, sys
from copy import deepcopy
from itertools import product

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from vcb_nb import data
from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.data import (
    PAIR_MODES, attach_ids, candidates_to_pairs, encode_completion, encode_prompt,
    load_candidates, load_demonstrations, load_pairs, load_prompts, load_rows, load_texts,
    pairs_to_candidates, split_dialogue, train_tokenizer)

HH = ("hh_harmless_base_test", "hh_helpful_base_test", "hh_helpful_online_test",
      "hh_helpful_rejection_sampled_test")
REAL = [
    *((name, load_pairs, rows) for name, rows in zip(HH, (1824, 1825, 908, 2165))),
    ("tldr_pref_gpt4judge", load_pairs, 803), ("tldr_sft", load_demonstrations, 1552),
    ("cnndm", load_demonstrations, 235), ("cnndm_qags", load_prompts, 180),
    ("scored_summeval", load_candidates, 81), ("scored_realsumm", load_candidates, 80),
    ("scored_alpacaeval_nc", load_candidates, 653), ("text_eltec_eng", load_texts, 51),
]
QUESTION = "\n\nHuman: Is the harbour far?\n\nAssistant:"
COMPLETIONS = ("I was", " I was", "\nI was", "s", " ", "Yes", " Yes, an hour.")
PAIR = {"prompt": QUESTION, "chosen": " Yes, an hour.", "rejected": " Yes"}


def write(path, *rows):
    "Rows (dicts, or raw lines) as a JSONL file, gzipped if its name says so."
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def message(function, *args, **kwargs):
    "What the `InputError` says."
    with pytest.raises(InputError) as error: function(*args, **kwargs)
    return str(error.value)


def nbest(rewards, **columns):
    "A candidate row with these rewards."
    texts = [f" answer {i}" for i in range(len(rewards))]
    return {"prompt": "p", "completions": texts, "rewards": rewards} | columns


# --- Formats

@pytest.mark.parametrize("name,load,rows", REAL, ids=[name for name, *_ in REAL])
def test_reads_real_data(shared_data, name, load, rows):
    "Each published format is read directly, with the number of rows that its description states."
    assert len(load(shared_data/name)) == rows


@pytest.mark.parametrize("name", ("text_tinyshakespeare", "text_wikitext2_valid_test"))
def test_text_file_is_kept_whole(shared_data, name):
    "The rows of a plain text, joined, are the text: no line end is lost."
    path = shared_data/name/"dev.txt.gz"
    assert "".join(load_texts(path)["text"]) == gzip.open(path, "rb").read().decode()


def test_long_text_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i}\r\n" for i in range(300))
    (tmp_path/"a.txt").write_bytes(text.encode())
    rows = [row["text"] for _, row in data._text_rows(tmp_path/"a.txt", size=100)]
    assert "".join(rows) == text and len(rows) > 10 and all(r.endswith("\n") for r in rows)


def test_containers_agree(tmp_path):
    "JSONL (plain, gzipped, BOM, CRLF, empty lines), a JSON array, Parquet, Arrow: the same rows."
    rows = [PAIR, PAIR | {"rejected": " No — naïve 🦉"}]
    expected = Dataset.from_list(rows)
    write(tmp_path/"a.jsonl", *rows), write(tmp_path/"b.jsonl.gz", *rows)
    crlf = "\ufeff" + "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path/"c.jsonl").write_bytes(crlf.encode())
    (tmp_path/"d.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path/"e.json", *rows)
    expected.to_parquet(tmp_path/"f.parquet"), expected.save_to_disk(tmp_path/"g")
    write(tmp_path/"h"/"one.jsonl", rows[0]), write(tmp_path/"h"/"two.jsonl", rows[1])
    sources = ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.json", "e.json", "f.parquet", "g", "h")
    for source in (*(tmp_path/s for s in sources), expected):
        assert load_pairs(source).to_list() == rows, source


def test_splits(tmp_path):
    "`source#split` chooses; without it, several splits are refused and named."
    train, test = [Dataset.from_list([{"prompt": name}]) for name in ("a", "b")]
    DatasetDict(train=train, test=test).save_to_disk(tmp_path/"arrow")
    write(tmp_path/"files"/"train.jsonl.gz", {"prompt": "a"})
    write(tmp_path/"files"/"test.jsonl.gz", {"prompt": "b"})
    for folder in (tmp_path/"arrow", tmp_path/"files"):
        assert load_prompts(f"{folder}#test")["prompt"][:] == ["b"]
        assert "#te" in message(load_prompts, folder) or "#train" in message(load_prompts, folder)
    assert "dev" in message(load_prompts, f"{tmp_path/'files'}#dev")


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path):
    write(tmp_path/"pairs.jsonl", PAIR)
    assert "Did you mean 'pairs.jsonl'?" in message(load_rows, tmp_path/"pair.jsonl")


def test_hub_out_of_reach():
    "Offline, an unknown name gives one sentence, not a stack of the client's exceptions."
    assert "not a file or folder here" in message(load_rows, "nobody/nothing")


def test_formats_of_demonstrations(tmp_path):
    same = {"prompt": "p", "completion": " c"}
    forms = [same, {"post": "p", "summary": " c"}, {"prompt": "p", "label": " c", "other": 1},
             {"prompt": "p", "chosen": " c", "rejected": " d"},
             {"chosen": QUESTION + " c", "rejected": QUESTION + " d"},
             {"article": "p", "highlights": "c"}]
    prompts = ["p"] * 4 + [QUESTION, "p\n\nTL;DR:"]
    for row, prompt in zip(forms, prompts):
        path = write(tmp_path/"rows.jsonl", row)
        assert load_demonstrations(path).to_list() == [{"prompt": prompt, "completion": " c"}]
        assert load_prompts(path).to_list() == [{"prompt": prompt}]
        assert load_texts(path).to_list() == [{"text": prompt + " c"}]


def test_prompts_are_distinct_and_in_order(tmp_path):
    path = write(tmp_path/"p.jsonl", *({"prompt": p, "n": i} for i, p in enumerate("cabcab")))
    assert load_prompts(path)["prompt"][:] == ["c", "a", "b"]


@pytest.mark.parametrize("name", HH)
def test_hub_columns_of_hh(shared_data, tmp_path, name):
    "Pitfall 29: whole HH dialogues are split as the published prompt, chosen and rejected."
    pairs = load_pairs(shared_data/name)
    hub = pairs.map(lambda r: {c: r["prompt"] + r[c] for c in ("chosen", "rejected")})
    hub = hub.remove_columns("prompt")
    assert load_pairs(hub).to_list() == pairs.to_list()


def test_completion_that_begins_with_the_other():
    "Pitfall 29: the prompt ends at the turn, not where the two answers begin to differ."
    long, short = " Yes, an hour.", " Yes"
    assert split_dialogue(QUESTION + long, QUESTION + short) == (QUESTION, long, short)


def test_unusable_pairs_are_counted(tmp_path, caplog):
    other = "\n\nHuman: And back?\n\nAssistant:"
    answers = [(" Yes", " No"), (" Yes", " Yes"), (" Yes", " "), (other + " a", " No"),
               (" a" + data.HUMAN + "b", " c")]
    rows = [{"chosen": QUESTION + a, "rejected": QUESTION + b} for a, b in answers]
    rows.append({"chosen": "a", "rejected": "b"})
    with caplog.at_level(logging.WARNING): pairs = load_pairs(write(tmp_path/"p.jsonl", *rows))
    assert pairs.to_list() == [{"prompt": QUESTION, "chosen": " Yes", "rejected": " No"}]
    for reason in ("5 of 6", "empty response: 1", "chosen equals rejected: 1", "no common prompt",
                   "further turn", "no Assistant turn"):
        assert reason in caplog.text
    assert "no usable row" in message(load_pairs, write(tmp_path/"q.jsonl", *rows[1:]))


# --- Errors that name the row

BAD_LINES = {
    "broken": ('{"prompt": "a', "not JSON"), "array": ("[1]", "named columns"),
    "absent": ('{"promt": "a"}', "Did you mean 'promt'?"),
    "number": ('{"prompt": 3}', "must be a string"),
    "null": ('{"prompt": null}', "must be a string"),
    "surrogate": ('{"prompt": "\\ud83d"}', "surrogate"),
    "chat": ('{"prompt": [{"role": "user", "content": "a"}]}', "a list of messages"),
}


@pytest.mark.parametrize("line,part", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("in_memory", (1 << 20, 0), ids=("small", "large"))
@pytest.mark.parametrize("end", (".jsonl", ".jsonl.gz"))
def test_bad_line_is_named(tmp_path, monkeypatch, line, part, in_memory, end):
    "File, line and remedy, whether the file goes through memory or through the Arrow cache."
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache")
    path = write(tmp_path/f"a{end}", {"prompt": "🦉"}, "", line)
    said = message(load_rows, path, ("prompt",))
    assert f"{path}:3" in said and part in said


def test_bad_bytes_are_named(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "a.jsonl:2: byte 0xe9 at position 16" in message(load_rows, tmp_path/"a.jsonl")
    whole = write(tmp_path/"b.jsonl.gz", *[{"prompt": str(i)} for i in range(99)]).read_bytes()
    (tmp_path/"b.jsonl.gz").write_bytes(whole[:-30])
    assert "broken gzip" in message(load_rows, tmp_path/"b.jsonl.gz")
    (tmp_path/"c.jsonl.gz").write_bytes(b"plain")
    assert "broken gzip" in message(load_rows, tmp_path/"c.jsonl.gz")


def test_other_bad_sources(tmp_path):
    nothing = {"a.jsonl": "", "b.jsonl": "\n \n", "c.json": "[]", "d.txt": "", "e.json": ""}
    for name, content in nothing.items():
        (tmp_path/name).write_text(content)
        assert "no rows" in message(load_texts, tmp_path/name)
    (tmp_path/"x.xlsx").write_text("a,b")
    assert "unknown kind" in message(load_rows, tmp_path/"x.xlsx")
    (tmp_path/"folder").mkdir()
    assert "no .jsonl" in message(load_rows, tmp_path/"folder")
    mixed = write(tmp_path/"mixed.jsonl", {"prompt": "a", "x": 1}, {"prompt": "a", "x": {"y": "b"}})
    assert "changes its type" in message(load_rows, mixed)
    assert load_prompts(mixed)["prompt"][:] == ["a"]  # columns that are not asked for do no harm


def test_arrow_rows_are_checked_too():
    rows = Dataset.from_dict({"prompt": ["a", None]})
    assert "row 1: prompt must be a string" in message(load_rows, rows, ("prompt",))
    assert "Did you mean 'prompt'?" in message(load_rows, rows, ("promt",))


def test_incomplete_shards_are_refused(tmp_path):
    "A folder that a killed stage left behind does not pass for whole."
    for i in (0, 1, 3): write(tmp_path/"data"/f"part-{i:05}-of-00004.jsonl", {"prompt": str(i)})
    (tmp_path/"manifest.json").write_text("{}")
    assert "3 of 4 shards" in message(load_prompts, tmp_path)
    write(tmp_path/"data"/"part-00002-of-00004.jsonl", {"prompt": "2"})
    assert load_prompts(tmp_path)["prompt"][:] == list("0123")


def test_large_files_go_through_arrow(tmp_path, monkeypatch):
    "The same rows, memory-mapped; and a file that changed under its name is read anew."
    rows = [nbest([i, i + .5]) for i in range(5)]
    path = write(tmp_path/"a.jsonl", *rows)
    small = load_candidates(path)
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path/"cache")
    large = load_candidates(path)
    assert large.to_list() == small.to_list() and large.cache_files and not small.cache_files
    write(path, *rows[:2])
    assert len(load_candidates(path)) == 2


# --- Candidates

def test_candidates_from_published_lists(shared_data):
    "A published n-best list is a candidate row: `responses` renamed, ragged, other columns kept."
    rows = load_candidates(shared_data/"scored_alpacaeval_nc", need=("rewards",))
    assert {"completions", "rewards", "win_probs", "systems"} <= set(rows.column_names)
    assert {len(r) for r in rows["rewards"]} == {15, 16}
    sizes = {len(r) for name in ("scored_summeval", "scored_realsumm")
             for r in load_candidates(shared_data/name)["completions"]}
    assert min(sizes) >= 13 and max(sizes) == 24


BAD_REWARDS = {
    "nan": ([1, float("nan")], "rewards[1] is nan"),
    "inf": ([float("-inf"), 1], "rewards[0] is -inf"),
    "huge": ([1, 10**400], "rewards[1]"),
    "string": ([1, "0.5"], 'rewards[1] must be a number, not "0.5"'),
    "bool": ([True, 1], "rewards[0]"), "null": ([1, None], "rewards[1]"),
    "scalar": (1., "must be a list"), "short": ([1.], "1 rewards for 2 completions"),
}


@pytest.mark.parametrize("rewards,part", BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_bad_rewards_are_named(tmp_path, rewards, part):
    "Pitfall 25: row and index of a reward that is not a finite number."
    path = write(tmp_path/"a.jsonl", nbest([1, 2]), nbest([1, 2]) | {"rewards": rewards})
    said = message(load_candidates, path)
    assert "a.jsonl:2" in said and part in said


def test_bad_rewards_of_arrow_rows():
    "Pitfall 25: the same for rows that come as Arrow."
    rows = Dataset.from_list([nbest([1., 2.]), nbest([1., float("nan")])])
    for same in (rows, rows.rename_column("completions", "responses")):
        assert "row 1: rewards[1] is nan" in message(load_candidates, same)


def test_lists_of_a_row_agree(tmp_path):
    bad = {"no completions": nbest([], completions=[]),
           "1 finish_reasons for 2": nbest([1, 2], finish_reasons=["stop"]),
           "completions must be a list": nbest([1], completions="text"),
           "completion_ids[1] is empty": nbest([1, 2], completion_ids=[[1], []]),
           "completion_ids[1][0]": nbest([1, 2], completion_ids=[[1], ["a"]])}
    for part, row in bad.items():
        assert part in message(load_candidates, write(tmp_path/"a.jsonl", row))
    unscored = write(tmp_path/"a.jsonl", {"prompt": "", "completions": [""]})
    assert "no column 'rewards'" in message(load_candidates, unscored, ("rewards",))


def test_whole_numbers_become_floats(tmp_path):
    rows = load_candidates(write(tmp_path/"a.jsonl", nbest([1, 2]), nbest([.5, 2])))
    assert rows["rewards"][:] == [[1., 2.], [.5, 2.]]
    assert rows.features["rewards"].feature.dtype == "float64"


# --- Tokenizers

def gpt2(folder):
    from transformers import GPT2TokenizerFast
    return GPT2TokenizerFast.from_pretrained(folder/"tokenizers"/"gpt2")


def pythia(folder):
    from transformers import PreTrainedTokenizerFast
    path = folder/"tokenizers"/"pythia_neox20b"/"tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>",
                                   bos_token="<|endoftext|>")


def with_bos(texts):
    "A tokenizer that opens every text with BOS, as Llama's does."
    from tokenizers.processors import TemplateProcessing
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture(params=("tiny", "gpt2", "pythia", "bos"))
def tokenizer(request, tiny_tokenizer):
    "Tokenizers trained here, and the real ones where their files are."
    if request.param == "tiny": return tiny_tokenizer
    if request.param == "bos": return with_bos([QUESTION + c for c in COMPLETIONS])
    return {"gpt2": gpt2, "pythia": pythia}[request.param](request.getfixturevalue("shared_data"))


def test_prompt_and_completion_stay_apart(tokenizer):
    "Pitfall 1: no token spans the seam, whatever white space is there; the texts come back."
    prompts = [QUESTION + end for end in ("", " ", "\n", "  ", "\n\n")]
    merged = 0
    for prompt, completion in product(prompts, COMPLETIONS):
        prompt_ids = encode_prompt(tokenizer, prompt)
        ids, _ = encode_completion(tokenizer, completion)
        assert tokenizer.decode(ids[:-1]) == completion
        assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == prompt
        assert ids[:-1] == tokenizer(completion, add_special_tokens=False).input_ids
        merged += encode_prompt(tokenizer, prompt + completion) != prompt_ids + ids[:-1]
    assert merged  # the seam does matter for these texts


def test_eos_is_part_of_the_completion(tokenizer):
    "Pitfall 2: EOS is there once and counted, also where padding is the same id."
    eos = tokenizer.eos_token_id
    for text in (" Yes", " Yes" + tokenizer.eos_token):
        ids, finished = encode_completion(tokenizer, text)
        assert ids.count(eos) == 1 and ids[-1] == eos and finished
    assert encode_completion(tokenizer, " Yes", finished=False) == (ids[:-1], False)
    assert encode_completion(tokenizer, " Yes", max_length=len(ids)) == (ids, True)
    assert encode_completion(tokenizer, " Yes", max_length=len(ids) - 1) == (ids[:-1], False)
    assert encode_completion(tokenizer, "") == ([eos], True)


def test_padding_id_equal_to_eos_changes_nothing(tiny_tokenizer):
    "Pitfall 2: the ids do not depend on which id pads."
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert encode_completion(tokenizer, " Yes") == encode_completion(tiny_tokenizer, " Yes")


def test_one_bos_at_most():
    "Pitfall 29: one BOS before the prompt, also when a template wrote it; none in the completion."
    tokenizer = with_bos([QUESTION] * 3)
    bos = tokenizer.bos_token_id
    ids = encode_prompt(tokenizer, QUESTION)
    assert ids[0] == bos and ids.count(bos) == 1
    assert encode_prompt(tokenizer, "<s>" + QUESTION) == ids
    assert bos not in encode_completion(tokenizer, " Yes")[0]
    assert encode_prompt(tokenizer, QUESTION, max_length=4) == [bos, *ids[-3:]]
    assert encode_prompt(tokenizer, QUESTION, max_length=1) == [bos]


def test_no_bos_where_the_tokenizer_uses_none(tokenizer):
    "Pitfall 29: a tokenizer that has a BOS but does not open texts with it (GPT-2) gets none."
    opens = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    assert (encode_prompt(tokenizer, "a")[:1] == [tokenizer.bos_token_id]) == opens


def test_prompts_lose_their_beginning(tiny_tokenizer):
    ids = encode_prompt(tiny_tokenizer, QUESTION)
    assert encode_prompt(tiny_tokenizer, QUESTION, max_length=5) == ids[-5:]
    assert encode_prompt(tiny_tokenizer, QUESTION, max_length=len(ids)) == ids


def test_no_eos_is_refused(tiny_tokenizer):
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    assert "no EOS" in message(encode_completion, tokenizer, " a")


@pytest.mark.parametrize("make", (gpt2, pythia))
def test_hh_fixtures(shared_data, make):
    "Pitfall 29: HH pairs keep prompt, answers and one EOS each, exactly, with the real tokenizers."
    tokenizer = make(shared_data)
    for pair in load_pairs(shared_data/HH[1]).select(range(200)):
        prompt_ids = encode_prompt(tokenizer, pair["prompt"])
        for column in ("chosen", "rejected"):
            ids, _ = encode_completion(tokenizer, pair[column])
            assert tokenizer.decode(prompt_ids + ids[:-1]) == pair["prompt"] + pair[column]
            assert ids.count(tokenizer.eos_token_id) == 1


def test_trained_tokenizer_reloads(tmp_path, tiny_tokenizer):
    from transformers import AutoTokenizer
    from conftest import SENTENCES
    saved = train_tokenizer(iter(SENTENCES * 4), 320, out=tmp_path/"t")
    again = AutoTokenizer.from_pretrained(tmp_path/"t")
    for t in (saved, again, tiny_tokenizer):
        assert (t.eos_token_id, t.pad_token_id, t.bos_token, t.unk_token) == (0, 1, None, None)
        assert t("The soup: 🦉").input_ids == tiny_tokenizer("The soup: 🦉").input_ids
        assert len(t) == len(tiny_tokenizer) > 258
    assert "258" in message(train_tokenizer, SENTENCES, 257)


def test_tokenizer_is_the_same_in_every_process(tmp_path):
    "Also with another hash seed and number of threads."
    texts = [f"the {a} of the {b}" for a in ("room", "soup", "host") for b in ("inn", "moor")]
    train_tokenizer(texts, 300, out=tmp_path/"here")
    code = ("import sys; from vcb_nb.data import train_tokenizer;"
            "train_tokenizer(sys.argv[2:], 300, out=sys.argv[1])")
    env = dict(PYTHONHASHSEED="7", RAYON_NUM_THREADS="2", TOKENIZERS_PARALLELISM="true",
               PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", code, tmp_path/"there", *texts]
    subprocess.run(command, env=os.environ | env, check=True)
    here, there = [(tmp_path/name/"tokenizer.json").read_bytes() for name in ("here", "there")]
    assert here == there


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_any_text_round_trips(tiny_tokenizer, text):
    "No text is unknown: decoding the ids gives it back."
    assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text


# --- Ids of n-best lists

def test_ids_are_those_of_the_single_functions(tokenizer):
    texts, reasons = [" Yes, an hour.", " No"], ["stop", "length"]
    row = nbest([1., 2.], prompt=QUESTION, completions=texts, finish_reasons=reasons)
    rows, counts = attach_ids(Dataset.from_list([row]), tokenizer, 6, 3)
    coded = [encode_completion(tokenizer, text, r == "stop", 3) for text, r in zip(texts, reasons)]
    assert rows[0]["prompt_ids"] == encode_prompt(tokenizer, QUESTION, 6)
    assert rows[0]["completion_ids"] == [ids for ids, _ in coded]
    assert rows[0]["finish_reasons"] == ["stop" if f else "length" for _, f in coded]
    assert not any(counts.values())


def test_sampled_ids_are_never_made_anew(tiny_tokenizer):
    "Pitfall 27: ids that no encoder would give stay as they were sampled."
    letters = [tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "The"]
    odd = [[*letters, tiny_tokenizer.eos_token_id], letters[:1]]
    assert tiny_tokenizer(tiny_tokenizer.decode(letters)).input_ids != letters
    row = nbest([1., 0.], completions=["The", "T"], completion_ids=odd)
    rows, _ = attach_ids(Dataset.from_list([row]), tiny_tokenizer, max_completion_length=1)
    assert rows[0]["completion_ids"] == odd and rows[0]["finish_reasons"] == ["stop", "length"]
    assert rows[0]["prompt_ids"] == encode_prompt(tiny_tokenizer, "p")
    again, _ = attach_ids(rows, tiny_tokenizer)
    assert again.to_list() == rows.to_list()


def test_emptied_completions_are_dropped_and_counted(tiny_tokenizer):
    "Pitfall 28: a completion without a token leaves with its reward; the counts say so."
    rewards, systems = [1., 2., 3.], ["x", "y", "z"]
    one, all_ = ["stop", "length", "stop"], ["length"] * 3
    rows = Dataset.from_list([
        nbest(rewards, completions=[" a", "", " c"], finish_reasons=one, systems=systems),
        nbest(rewards, completions=["", "", ""], finish_reasons=all_, systems=systems),
        nbest(rewards, prompt="", finish_reasons=one, systems=systems)])
    kept, counts = attach_ids(rows, tiny_tokenizer)
    assert counts == {"empty completion": 4, "no completion left": 1, "empty prompt": 1}
    assert len(kept) == 1 and kept[0]["completions"] == [" a", " c"]
    assert kept[0]["rewards"] == [1., 3.] and kept[0]["systems"] == ["x", "z"]
    assert all(kept[0]["completion_ids"])
    none, counts = attach_ids(rows, tiny_tokenizer, max_completion_length=0)
    assert len(none) == 0 and counts["no completion left"] == 3


# --- Pairs and candidates

@given(st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=6), st.sampled_from(PAIR_MODES))
@settings(deadline=None)
def test_pairs_are_those_of_the_definition(rewards, mode):
    "Against a plain double loop: ties make no pair, and margins are differences of rewards."
    n, best, worst = len(rewards), max(rewards), min(rewards)
    every = {(i, j) for i in range(n) for j in range(n) if rewards[i] > rewards[j]}
    found = data._winner_loser(rewards, mode)
    assert len(found) == len(set(found)) and set(found) <= every
    if mode == "all": assert set(found) == every
    if mode == "best_worst":
        assert [(rewards[i], rewards[j]) for i, j in found] == [(best, worst)] * (best > worst)
    if mode == "best_of_rest":
        assert sorted(j for _, j in found) == [j for j in range(n) if rewards[j] < best]


def test_pairs_stay_within_their_prompt():
    other = nbest([5., 9.], prompt="q", completions=[" u", " v"])
    rows = Dataset.from_list([nbest([1., 0., 1.]), other])
    pairs = candidates_to_pairs(rows).to_list()
    assert [(p["prompt"], p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [
        ("p", " answer 0", " answer 1", 1.), ("p", " answer 2", " answer 1", 1.),
        ("q", " v", " u", 4.)]
    assert "Did you mean 'best_worst'?" in message(candidates_to_pairs, rows, "best_wors")
    assert "differ in reward" in message(candidates_to_pairs, Dataset.from_list([nbest([1., 1.])]))
    same = Dataset.from_list([nbest([1., 0.], completions=[" a", " a"])])
    assert "differ" in message(candidates_to_pairs, same)


def test_pairs_and_candidates_are_inverse():
    pairs = candidates_to_pairs(Dataset.from_list([nbest([1., 0., 3.])]))
    rows = load_candidates(pairs_to_candidates(pairs), need=("rewards",))
    assert candidates_to_pairs(rows).to_list() == pairs.to_list()
    tools = rows.add_column("tools", ["[]"] * len(rows)) # the template needs them for every pair
    assert candidates_to_pairs(tools)["tools"][:] == ["[]"] * len(pairs)
    back = pairs_to_candidates(candidates_to_pairs(tools))
    assert candidates_to_pairs(back).to_list() == candidates_to_pairs(tools).to_list()
    assert pairs_to_candidates(Dataset.from_list([PAIR]))[0]["rewards"] == [1., 0.]


@pytest.mark.slow
def test_trl_trains_on_the_pairs(tmp_path, tiny_tokenizer):
    "TRL's DPOTrainer takes the pairs, sees our ids, and makes a step."
    trl = pytest.importorskip("trl", reason="TRL is a peer of the tests only")
    from transformers import AutoConfig, AutoModelForCausalLM
    row = nbest([3., 1., 2.], prompt=QUESTION, completions=[" Yes, an hour.", " Yes", " By bus"])
    pairs = candidates_to_pairs(Dataset.from_list([row]))
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=128)
    args = trl.DPOConfig(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
                         bf16=False)
    model, reference = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    reference.load_state_dict(model.state_dict())
    trainer = trl.DPOTrainer(model, reference, args=args, train_dataset=pairs,
                             processing_class=tiny_tokenizer)
    for ours, theirs in zip(pairs, trainer.train_dataset):
        assert theirs["prompt_ids"] == encode_prompt(tiny_tokenizer, ours["prompt"])
        for column in ("chosen", "rejected"):
            assert theirs[f"{column}_ids"] == encode_completion(tiny_tokenizer, ours[column])[0]
    assert abs(trainer.train().training_loss - 0.6931) < 1e-3


@pytest.mark.parametrize("level, scale", [(0, 1), (1e6, 1), (1e12, 1e3), (0, 1e-9)])
def test_pairs_follow_the_spread_of_the_rewards(level, scale):
    "Residues of rounding are ties; a gap at a high level or of a small scale is none."
    rewards = [level + scale * r for r in (.1, .85, .85)]
    rows = Dataset.from_list([dict(prompt="a", completions=[" b", " c", " d"], rewards=rewards),
                              dict(prompt="e", completions=[" f", " g"], rewards=[.1 + .2, .3])])
    found = [(row["chosen"], row["rejected"]) for row in candidates_to_pairs(rows)]
    assert sorted(found) == [(" c", " b"), (" d", " b")]


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff \u2060", "\u00ad\n", "\u3164", "\x00\t"])
def test_an_answer_that_shows_nothing_is_empty(tmp_path, blank, caplog):
    path = write_jsonl(tmp_path/"p.jsonl", [dict(prompt="a", chosen=" b", rejected=blank),
                                            dict(prompt="a", chosen=" b", rejected="\u200bc")])
    assert len(load_pairs(path)) == 1 and "empty response: 1" in caplog.text
    path = write_jsonl(tmp_path/"d.jsonl", [dict(prompt="a", completion=blank),
                                            dict(prompt="a", completion=" b")])
    assert len(load_demonstrations(path)) == 1 and "empty completion: 1" in caplog.text


def test_held_out_rows_that_are_trained_on_are_counted(caplog):
    train = Dataset.from_list([dict(prompt=p, chosen=" b", rejected=" c") for p in "abc"])
    held = Dataset.from_list([dict(prompt=p, chosen=" b", rejected=r) for p, r in
                              (("a", " c"), ("a", " d"), ("z", " c"))])
    assert data.warn_shared(train, held, "held.jsonl") == (1, 2)
    assert "held.jsonl: 1 of 3 held-out rows are training rows too, and 2 share" in caplog.text
    caplog.clear()
    assert data.warn_shared(train, held.select([2]), "held.jsonl") == (0, 0) and not caplog.text
