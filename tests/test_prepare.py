"""From sources to a run's files: openings never cross the split, and the split depends on nothing
but the row."""
import random

import pytest

from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.data import load_rows
from vcb_nb.prepare import (PrepareConfig, TokenizerConfig, make_tokenizer, opening, prepare,
                            split_side)


def pairs(n):
    "Dialogues of one and of two turns on n openings."
    first = [f"\n\nHuman: Why is {i} odd?\n\nAssistant:" for i in range(n)]
    longer = [p + " Look.\n\nHuman: I did!\n\nAssistant:" for p in first]
    return [{"prompt": p, "chosen": f" yes {k}", "rejected": f" no {k}"}
            for k, p in enumerate(first + longer)]


def read(folder, name): return list(load_rows(str(folder/"files"/f"{name}.jsonl")))


def test_openings_do_not_cross_the_split(tmp_path):
    write_jsonl(tmp_path/"p.jsonl", pairs(200))
    prepare(PrepareConfig(output_dir=str(tmp_path/"out"), pairs=[str(tmp_path/"p.jsonl")],
                          test_share=.2, validation_share=.1))
    train = {opening(r["prompt"]) for name in ("pairs", "demonstrations", "prompts")
             for r in read(tmp_path/"out", name)}
    held = {opening(r["prompt"]) for name in ("pairs_test", "prompts_test", "prompts_validation")
            for r in read(tmp_path/"out", name)}
    assert train and held and not train & held


def test_split_does_not_depend_on_order_or_company(tmp_path):
    "Half of the rows, in another order, fall where they fell among all of them."
    rows = pairs(200)
    fewer = rows[::2]
    random.Random(0).shuffle(fewer)
    for name, part in (("all", rows), ("few", fewer)):
        write_jsonl(tmp_path/f"{name}.jsonl", part)
        prepare(PrepareConfig(output_dir=str(tmp_path/name), pairs=[str(tmp_path/f"{name}.jsonl")]))
    for name in ("pairs", "pairs_test"):
        chosen = {kind: {r["chosen"] for r in read(tmp_path/kind, name)} for kind in ("all", "few")}
        assert chosen["few"] == chosen["all"] & {r["chosen"] for r in fewer}


def test_shares_are_met():
    sides = [split_side(r["prompt"], .25, .25) for r in pairs(2000)]
    assert abs(sides.count("test")/4000 - .25) < .04
    assert abs(sides.count("validation")/4000 - .25) < .04


def test_shares_and_seed():
    prompts = [r["prompt"] for r in pairs(300)]
    assert {split_side(p, 0, 0) for p in prompts} == {"train"}
    assert {split_side(p, 1, 0) for p in prompts} == {"test"}
    assert ([split_side(p, .5, seed=0) for p in prompts]
            != [split_side(p, .5, seed=1) for p in prompts])


def test_empty_split_is_said(tmp_path):
    write_jsonl(tmp_path/"p.jsonl", pairs(3))
    with pytest.raises(InputError, match="split 'pairs_test' came out empty"):
        prepare(PrepareConfig(output_dir=str(tmp_path/"out"), pairs=[str(tmp_path/"p.jsonl")],
                              test_share=0.))
    assert not (tmp_path/"out"/"files").exists()


def test_real_hh_and_the_hubs_own_columns_give_the_same_split(tmp_path, shared_data):
    own = shared_data/"hh_harmless_base_test"/"dev.jsonl.gz"
    hub = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]}
           for r in load_rows(str(own))]
    write_jsonl(tmp_path/"hub.jsonl", hub)
    for name, source in (("a", own), ("b", tmp_path/"hub.jsonl")):
        prepare(PrepareConfig(output_dir=str(tmp_path/name), pairs=[str(source)]))
    for name in ("pairs", "pairs_test", "prompts_test"):
        assert read(tmp_path/"a", name) == read(tmp_path/"b", name)


def test_tokenizer_stage(tmp_path):
    write_jsonl(tmp_path/"t.jsonl", [{"text": "a small river ran by the old mill"}]*5)
    made = make_tokenizer(TokenizerConfig(output_dir=str(tmp_path/"tok"),
                                          data=str(tmp_path/"t.jsonl"), vocab_size=280))
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path/"tok"/"model")
    assert len(tokenizer) == made["vocab_size"] and tokenizer.eos_token_id != tokenizer.pad_token_id


PREAMBLE = "You are a careful assistant. Answer in one sentence. " * 8


@pytest.mark.parametrize("as_messages", (False, True), ids=("text", "messages"))
def test_a_shared_preamble_does_not_decide_the_side(as_messages):
    "A system prompt of more than 200 letters before each question: all shares are met."
    def prompt(i):
        if as_messages: return [{"role": "system", "content": PREAMBLE},
                                {"role": "user", "content": f"question {i}"}]
        return f"\n\nHuman: {PREAMBLE} question {i}\n\nAssistant:"
    sides = [split_side(prompt(i), .25, .25) for i in range(2000)]
    assert abs(sides.count("test")/2000 - .25) < .04
    longer = [*prompt(3), {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}] \
        if as_messages else prompt(3) + " a\n\nHuman: b\n\nAssistant:"
    assert opening(longer) == opening(prompt(3)) and opening(longer, "prompt") != opening(prompt(3))


def test_a_shared_first_turn_has_a_remedy(tmp_path):
    "Every dialogue begins with the same turns: one sentence names the setting, and it helps."
    start = "\n\nHuman: Hello.\n\nAssistant: Hello! How can I help?\n\nHuman: "
    write_jsonl(tmp_path/"p.jsonl", [
        {"prompt": f"{start}question {i}\n\nAssistant:", "chosen": " a", "rejected": " b"}
        for i in range(200)])
    given = dict(output_dir=str(tmp_path/"out"), pairs=[str(tmp_path/"p.jsonl")])
    with pytest.raises(InputError, match="same opening. Set split_by: prompt"):
        prepare(PrepareConfig(**given))
    made = prepare(PrepareConfig(**given, split_by="prompt"))
    assert made["pairs"] > 100 and made["pairs_test"] and made["prompts_validation"]


def test_a_column_of_one_source_only_is_refused_in_either_order(tmp_path):
    rows = pairs(40)
    write_jsonl(tmp_path/"with.jsonl", [row | {"margin": 1.} for row in rows])
    write_jsonl(tmp_path/"without.jsonl", rows)
    for order in (("with", "without"), ("without", "with")):
        with pytest.raises(InputError, match="without.jsonl has no 'margin', which .*with.jsonl"):
            prepare(PrepareConfig(output_dir=str(tmp_path/"out"),
                                  pairs=[str(tmp_path/f"{name}.jsonl") for name in order]))


def test_what_an_adapter_drops_is_in_the_summary(tmp_path):
    "Rows that a layout multiplies or joins are counted by what was dropped, not by difference."
    steer = [{"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "response": f" {j}", "helpfulness": j}
             for i in range(100) for j in range(3)]
    write_jsonl(tmp_path/"p.jsonl", [*steer, {**steer[0], "prompt": "alone"}])
    made = prepare(PrepareConfig(output_dir=str(tmp_path/"out"), pairs=[str(tmp_path/"p.jsonl")]))
    assert made["dropped"] == {"not a pair": 1} and made["pairs"] + made["pairs_test"] > 250
