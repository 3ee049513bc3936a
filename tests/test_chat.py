"Conversations: ids are the template's own, whichever template, and every stage reads them."
import json, logging
from functools import partial

import pytest
from chat_templates import TEMPLATES, chat_tokenizer
from datasets import Dataset
from tiny_models import make_tokenizer, tiny

from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.chat import (chat_completion, chat_prompt_ids, chat_response_ids, check_chat,
                         clean_messages, context, end_of_turn, extract_prompt, first_answer,
                         is_messages, turn_tail)
from vcb_nb.data import (attach_ids, encode_prompt, load_candidates, load_demonstrations,
                         load_pairs, load_prompts, load_rows, load_texts,
                         train_tokenizer)
from vcb_nb.evaluate import EvaluateConfig, evaluate
from vcb_nb.judges import RewardJudge, reads_end_of_turn, reward_scores
from vcb_nb.loading import load_reward_model, new_reward_model
from vcb_nb.online import OnlineConfig, online
from vcb_nb.reward import RewardConfig, encode_pair, reward_datasets, train_reward
from vcb_nb.sample import SampleConfig, sample
from vcb_nb.saving import save_model
from vcb_nb.score import ScoreConfig, score
from vcb_nb.sft import SFTConfig, collate_rows, encode_conversation, sft_datasets, train_sft
from vcb_nb.shards import read_parts


def user(text): return {"role": "user", "content": text}
def said(text): return {"role": "assistant", "content": text}
ASKED = [user("Is it far?")]
TALK = [*ASKED, said("An hour."), user("By bus?"), said("Ten minutes.")]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "route", "arguments": {"to": "harbour"}}}
TOOLS = [{"type": "function", "function": {"name": "route", "description": "Find a way.",
          "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}}]
EVERY = pytest.mark.parametrize("name", TEMPLATES)
STRICT = pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("thinking", "opening")])


def whole_ids(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)


# Recognition

@pytest.mark.parametrize("row", [
    {"prompt": ASKED}, {"prompt": "Is it far?"}, {"messages": TALK}, {"chosen": TALK},
    {"completion": [said("No.")]}, {"text": TALK}, {"prompt": ["Is it far?"]},
    {"rejected": [{"from": "human", "value": "Is it far?"}]}], ids=str)
def test_conversations_are_recognised_as_by_trl(row):
    data_utils = pytest.importorskip("trl.data_utils")
    columns = ("prompt", "completion", "chosen", "rejected", "messages")
    ours = any(is_messages(row.get(column)) for column in columns)
    assert ours == data_utils.is_conversational(row)


@pytest.mark.parametrize("chosen, rejected", [
    (TALK, [*TALK[:3], said("An hour.")]), (TALK, [*ASKED, said("Yes.")]),
    ([said("a")], [said("b")]), ([SYSTEM, *TALK], [SYSTEM, *ASKED, said("Yes.")])])
def test_the_shared_prompt_is_trls(chosen, rejected):
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert extract_prompt(chosen, rejected) == tuple(theirs.values())


# Ids

@EVERY
@pytest.mark.parametrize("prompt", [ASKED, TALK[:3]], ids=("one turn", "two turns"))
def test_ids_are_those_of_the_template(name, prompt):
    "The prompt's with the generation prompt; the whole conversation's up to the end of its turn."
    tokenizer = chat_tokenizer(name)
    ids = chat_prompt_ids(tokenizer, prompt)
    assert ids == whole_ids(tokenizer, prompt, add_generation_prompt=True)
    response = chat_response_ids(tokenizer, prompt, "Ten minutes.")
    assert response[-1] == end_of_turn(tokenizer) and response.count(response[-1]) == 1
    whole = whole_ids(tokenizer, [*prompt, said("Ten minutes.")])
    if name != "opening": assert ids + response + turn_tail(tokenizer) == whole
    else: # the prompt stays as it is when the model answers: with an open thought
        assert tokenizer.decode(ids).endswith("<think>\n")
        assert tokenizer.decode(response) == "Ten minutes.<|eos|>"
    assert tokenizer.bos_token_id is None or (ids + response).count(tokenizer.bos_token_id) == 1


def test_a_cut_prompt_keeps_its_only_bos():
    tokenizer = chat_tokenizer("llama3")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id # the tokenizer adds one as well
    whole, cut = (encode_prompt(tokenizer, ASKED, n) for n in (None, 12))
    assert cut == whole[:1] + whole[-11:]


@STRICT
def test_prompt_and_completion_are_trls(name):
    "Its two texts, ours decoded; beyond the end of the turn it has what no sample has."
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer, completion = chat_tokenizer(name), [said("Ten minutes.")]
    for prompt in (ASKED, TALK[:3]):
        row = {"prompt": prompt, "completion": completion}
        theirs = data_utils.maybe_apply_chat_template(row, tokenizer)
        ids, tail = chat_response_ids(tokenizer, prompt, completion), turn_tail(tokenizer)
        assert tokenizer.decode(chat_prompt_ids(tokenizer, prompt)) == theirs["prompt"]
        assert tokenizer.decode(ids + tail) == theirs["completion"]


def test_a_merge_across_the_boundary_does_not_eat_the_prompt():
    "The answer begins with line breaks, and two of them are one token: ids stay a prefix."
    tokenizer = train_tokenizer(["\n\n\nb"] * 9, 259)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}")
    prompt = chat_prompt_ids(tokenizer, ASKED)
    assert whole_ids(tokenizer, [*ASKED, said("\n\nNo.")])[:len(prompt)] != prompt
    ids = prompt + chat_response_ids(tokenizer, ASKED, "\n\nNo.")
    assert tokenizer.decode(ids).endswith("assistant:\n\n\nNo.<|endoftext|>")


def test_tools_and_calls_survive_a_file(tmp_path):
    "Rows whose tools and arguments have other keys, as JSON lines: ids are those of the original."
    tokenizer = chat_tokenizer("llama3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    rows = [{"prompt": [*ASKED, {"role": "assistant", "tool_calls": [c]},
                        {"role": "tool", "name": "route", "content": "12 km"}], "tools": tools}
            for c, tools in ((CALL, TOOLS), (call, [{**CALL, "function": {"name": "b"}}]))]
    read = load_prompts(write_jsonl(tmp_path/"p.jsonl", rows))
    assert len(read) == len(load_rows(tmp_path/"p.jsonl")) == 2
    for row, original in zip(read, rows):
        oracle = whole_ids(tokenizer, original["prompt"], tools=original["tools"],
                           add_generation_prompt=True)
        assert encode_prompt(tokenizer, row["prompt"], None, row["tools"]) == oracle


# Templates that rewrite the past, or refuse

def test_thoughts_of_earlier_turns_are_gone_and_the_last_ones_stay():
    tokenizer = chat_tokenizer("thinking")
    prompt = [*ASKED, said("<think>\nFar?\n</think>\n\nAn hour."), user("Sure?")]
    assert "Far?" not in tokenizer.decode(chat_prompt_ids(tokenizer, prompt))
    response = chat_response_ids(tokenizer, prompt, "<think>\nHm.\n</think>\n\nYes.")
    assert tokenizer.decode(response) == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"


@pytest.mark.parametrize("name, completion, words", [
    ("opening", "<think>Hm.</think>Yes.", "leaves out part of the response"),
    ("gemma", "Yes.", "System role not supported")])
def test_what_a_template_cannot_write_is_said(name, completion, words):
    with pytest.raises(InputError, match=words):
        chat_response_ids(chat_tokenizer(name), [SYSTEM, *ASKED], completion)


def test_a_template_that_changes_the_prompt_is_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(InputError, match="does not change the past"):
        chat_response_ids(tokenizer, ASKED, "No.")


# Masks

def labels_of(tokenizer, row, **kwargs):
    "Labels of one row as a batch has them."
    coded = encode_conversation(tokenizer, row, 200, 300, **kwargs)
    return coded["input_ids"], collate_rows([coded], 0)["labels"][0].tolist()


@pytest.mark.parametrize("row", [{"messages": [SYSTEM, *TALK]}, {"messages": TALK[:2]},
                                 {"prompt": TALK[:3], "completion": TALK[3:]}], ids=str)
def test_labels_are_trls_where_the_template_marks_them(row, tmp_path):
    trl, tokenizer = pytest.importorskip("trl"), chat_tokenizer("marked")
    args = trl.SFTConfig(tmp_path/"trl", assistant_only_loss=True, max_length=None,
                         report_to="none", use_cpu=True, bf16=False)
    theirs = trl.SFTTrainer(tiny(tokenizer), args, train_dataset=Dataset.from_list([row]),
                            processing_class=tokenizer).train_dataset[0]
    ours = load_demonstrations(Dataset.from_list([row]))[0]
    ids, labels = labels_of(tokenizer, ours)
    assert ids + turn_tail(tokenizer) == theirs["input_ids"]
    assert labels + [-100] * len(turn_tail(tokenizer)) == theirs["labels"]


@pytest.mark.parametrize("name, end", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"),
                                       ("gemma", "<end_of_turn>")])
def test_every_turn_or_the_last_one_carries_the_loss(name, end):
    "By hand: what the assistant says, each with its end, or the last alone."
    tokenizer, row = chat_tokenizer(name), dict(zip(("prompt", "completion"), first_answer(TALK)))
    texts = [(f"An hour.{end}Ten minutes.{end}", True), (f"Ten minutes.{end}", False)]
    for text, every_turn in texts:
        ids, labels = labels_of(tokenizer, row, every_turn=every_turn)
        assert tokenizer.decode([i for i in labels if i != -100]) == text
        assert ids + turn_tail(tokenizer) == whole_ids(tokenizer, TALK)


def test_a_template_that_rewrites_the_past_has_no_mask_for_it():
    tokenizer = chat_tokenizer("thinking")
    with pytest.raises(InputError, match="assistant_only_loss: false"):
        chat_completion(tokenizer, *first_answer(TALK))
    _, ids, mask = chat_completion(tokenizer, *first_answer(TALK), every_turn=False)
    assert tokenizer.decode(ids).endswith("Ten minutes.<|im_end|>") and all(mask)


def test_a_cut_conversation_keeps_prompt_and_mask_in_step():
    tokenizer, row = chat_tokenizer("llama3"), {"prompt": ASKED, "completion": TALK[1:]}
    whole = encode_conversation(tokenizer, row, 200, 300)
    cut = encode_conversation(tokenizer, row, 10, 18)
    assert cut["input_ids"] == (whole["input_ids"][:1] + whole["input_ids"][
        whole["prompt_length"] - 9:whole["prompt_length"] + 8])
    assert cut["loss_mask"] == [0] * 10 + [1] * 8 and not cut["finished"]


# Files

def test_files_of_messages_are_read(tmp_path):
    "Pairs in four shapes, demonstrations, prompts and n-best lists, from JSON lines or a data set."
    pair = {"prompt": ASKED, "chosen": [said("No.")], "rejected": [said("Yes.")]}
    shapes = [pair, {**pair, "chosen": "No.", "rejected": "Yes."},
              {"chosen": ASKED + pair["chosen"], "rejected": ASKED + pair["rejected"]},
              {"prompt": "Is it far?", "chosen": ASKED + pair["chosen"],
               "rejected": ASKED + pair["rejected"]}]
    for i, shape in enumerate(shapes):
        for source in (write_jsonl(tmp_path/f"{i}.jsonl", [shape]), Dataset.from_list([shape])):
            assert load_pairs(source).to_list() == [pair]
            assert load_prompts(source).to_list() == [{"prompt": ASKED}]
            assert load_demonstrations(source)[0]["completion"] == pair["chosen"]
    talk = write_jsonl(tmp_path/"talk.jsonl", [{"messages": TALK}])
    assert load_prompts(talk)[0]["prompt"] == context(TALK) == TALK[:3]
    assert "assistant: An hour." in load_texts(talk)[0]["text"]
    nbest = {"prompt": ASKED, "completions": [[said("No.")], [said("Yes.")]], "rewards": [1., 0.]}
    for source in (write_jsonl(tmp_path/"n.jsonl", [nbest]), Dataset.from_list([nbest])):
        assert load_candidates(source)[0]["completions"] == ["No.", "Yes."]


@pytest.mark.parametrize("row, words", [
    ({"prompt": "Is it far?", "completion": "No."}, "first row"),
    ({"prompt": [{"role": "user", "content": 3}], "completion": "No."}, "must be a string"),
    ({"prompt": [{**ASKED[0], "content": [{"type": "image"}]}], "completion": "No."}, "not text")])
def test_a_wrong_row_of_messages_is_named(tmp_path, row, words):
    rows = [{"prompt": ASKED, "completion": "No."}, row]
    with pytest.raises(InputError, match=f"d.jsonl:2.*{words}"):
        load_demonstrations(write_jsonl(tmp_path/"d.jsonl", rows))


# Stages

def length(prompt, completion):
    assert prompt == clean_messages(prompt) # the messages, not their text
    return float(len(completion))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("chat"), chat_tokenizer("chatml")
    save_model(tiny(tokenizer, max_position_embeddings=256), tokenizer, folder/"policy")
    write_jsonl(folder/"talks.jsonl", [{"messages": [user(f"Is {w} far?"), said(f"{w}? No."),
                                                     *TALK[2:]]} for w in "ABCD"])
    write_jsonl(folder/"strings.jsonl", [{"prompt": "Is it far?", "completion": " No."}] * 2)
    write_jsonl(folder/"pairs.jsonl", [
        {"chosen": [user(f"Is {w} far?"), said("No.")],
         "rejected": [user(f"Is {w} far?"), said("Yes!")]} for w in "ABCD"])
    return folder


def test_messages_go_through_every_stage(files, tmp_path):
    "SFT, sampling, scoring by a function, calibration, online; rows keep messages and ids."
    quiet = dict(max_steps=1, per_device_train_batch_size=2, disable_tqdm=True)
    train_sft(SFTConfig(str(tmp_path/"sft"), model=str(files/"policy"), eval_share=0,
                        data=str(files/"talks.jsonl"), max_prompt_length=96, max_length=200,
                        **quiet))
    policy = str(tmp_path/"sft"/"model")
    sample(SampleConfig(policy=policy, prompts=str(files/"talks.jsonl"), n=3, max_new_tokens=8,
                        output_dir=str(tmp_path/"samples")))
    score(ScoreConfig(candidates=str(tmp_path/"samples"/"data"), reward=f"{__name__}:length",
                      reference=policy, output_dir=str(tmp_path/"scored")))
    rows, tokenizer = read_parts(tmp_path/"scored"), chat_tokenizer("chatml")
    talks = [json.loads(line)["messages"] for line in open(files/"talks.jsonl")]
    for row, talk in zip(rows, talks, strict=True):
        assert row["prompt"] == talk[:3]
        assert row["prompt_ids"] == whole_ids(tokenizer, talk[:3], add_generation_prompt=True)
    summary = calibrate(CalibrationConfig(str(tmp_path/"vcb"), model=policy, eval_share=.5,
                                          candidates=str(tmp_path/"scored"/"data"), **quiet))
    assert summary["steps"] == 1
    summary = online(OnlineConfig(str(tmp_path/"online"), model=policy, n=3, max_new_tokens=8,
                                  prompts=str(files/"talks.jsonl"), reward=f"{__name__}:length",
                                  sigma="stored", candidates=str(tmp_path/"scored"/"data"),
                                  **quiet))
    assert summary["steps"] == 1 and summary["samples"] == 6
    measured = evaluate(EvaluateConfig(
        policies={"vcb": str(tmp_path/"vcb"/"model")}, reference=policy, n=2, max_new_tokens=4,
        prompts=str(files/"talks.jsonl"), candidates=str(tmp_path/"scored"/"data"), n_boot=20,
        reward=f"{__name__}:length", output_dir=str(tmp_path/"evaluate")))
    assert measured["policies"]["vcb"]["splits"]["test"]["prompts"] == 4


def test_text_candidates_get_the_ids_of_their_conversation():
    tokenizer = chat_tokenizer("gemma")
    rows = Dataset.from_list([{"prompt": ASKED, "completions": ["No.", "An ho", " "],
                               "finish_reasons": ["stop", "length", "stop"]}])
    row = attach_ids(rows, tokenizer)[0][0]
    whole = whole_ids(tokenizer, [*ASKED, said("No.")])
    assert row["prompt_ids"] + row["completion_ids"][0] == whole[:-1] # it ends in a line break
    assert tokenizer.decode(row["completion_ids"][1]) == "An ho" and len(row["completions"]) == 2


def test_pairs_end_as_samples_do(files, tmp_path):
    "A reward model of ours says so in its config; its judge takes the stored ids as they are."
    tokenizer = chat_tokenizer("chatml")
    row = load_pairs(str(files/"pairs.jsonl"))[0]
    coded = encode_pair(tokenizer, row, 99, 99)
    oracle = whole_ids(tokenizer, row["prompt"] + row["rejected"])
    assert coded["rejected_ids"] + turn_tail(tokenizer) == oracle
    train_reward(RewardConfig(str(tmp_path), model=str(files/"policy"), eval_share=.5, max_steps=1,
                              pairs=str(files/"pairs.jsonl"), disable_tqdm=True))
    assert reads_end_of_turn(load_reward_model(tmp_path/"model"))
    judge = RewardJudge(tmp_path/"model", tokenizer, device="cpu")
    prompt, ids = chat_prompt_ids(tokenizer, ASKED), chat_response_ids(tokenizer, ASKED, "No.")
    found = judge([{"prompt": ASKED, "completions": ["No."], "prompt_ids": prompt,
                    "completion_ids": [ids], "finish_reasons": ["stop"]}])
    assert found == reward_scores(judge.model, [prompt], [[ids]])


@pytest.mark.parametrize("theirs", ["llama3", "gemma", "chatml"])
def test_a_reward_model_from_elsewhere_reads_its_own_template(theirs, files, tmp_path):
    "The whole rendered conversation, whichever template the policy has; a cut response has no end."
    policy, own = chat_tokenizer("chatml"), chat_tokenizer(theirs)
    trunk = save_model(tiny(own), own, tmp_path/"trunk")
    save_model(new_reward_model(trunk, own), own, tmp_path/"reward")
    judge = RewardJudge(tmp_path/"reward", policy, device="cpu")
    texts = ["No.", "An ho"]
    rows, _ = attach_ids(Dataset.from_list([{"prompt": ASKED, "completions": texts,
                                             "finish_reasons": ["stop", "length"]}]), policy)
    prompt = whole_ids(own, ASKED, add_generation_prompt=True)
    whole = [whole_ids(own, [*ASKED, said(text)])[len(prompt):] for text in texts]
    whole[1] = whole[1][:len("An ho")] # bytes are tokens
    found = judge(rows.to_list())[0]
    assert found == pytest.approx(reward_scores(judge.model, [prompt], [whole])[0], abs=1e-6)


# Strings for chat models

@pytest.mark.parametrize("load, config, sides", [
    (sft_datasets, partial(SFTConfig, model="x"), {"completion": "No."}),
    (reward_datasets, partial(RewardConfig, model="x"), {"chosen": "No.", "rejected": "Yes."})])
def test_strings_for_a_chat_model_are_told_of_once_per_file(load, config, sides, tmp_path, caplog):
    "What was split off a file is not told of again; another file is, by its own name."
    tokenizer, told = chat_tokenizer("chatml"), "apply_chat_template: true"
    key = "data" if "completion" in sides else "pairs"
    for name in ("train", "held"):
        write_jsonl(tmp_path/f"{name}.jsonl",
                    [{"prompt": f"Is {name} {i} far?", **sides} for i in range(8)])
    asked = partial(config, output_dir=str(tmp_path/"out"), **{key: str(tmp_path/"train.jsonl")})
    load(asked(eval_share=.5), tokenizer)
    assert caplog.text.count(told) == 1 and "train.jsonl" in caplog.text
    caplog.clear()
    load(asked(**{f"eval_{key}": str(tmp_path/"held.jsonl")}), tokenizer)
    assert caplog.text.count(told) == 2 and "held.jsonl" in caplog.text
    turns = {k: [said(v)] for k, v in sides.items()}
    write_jsonl(tmp_path/"held.jsonl", [{"prompt": ASKED, **turns}])
    with pytest.raises(InputError, match="held.jsonl: the prompts are lists .* no chat template"):
        load(asked(**{f"eval_{key}": str(tmp_path/"held.jsonl")}), make_tokenizer())


def test_a_chat_model_is_not_warned_of_what_it_knows(caplog):
    for prompt, tokenizer in [(ASKED, "chatml"), ("<|im_start|>user\nHm?<|im_end|>", "chatml")]:
        check_chat(chat_tokenizer(tokenizer), [prompt], "a.jsonl")
    check_chat(make_tokenizer(), ["Is it far?"], "a.jsonl")
    assert not caplog.records


def test_strings_become_turns_where_that_is_asked_for(files, tmp_path, caplog):
    tokenizer, apply = chat_tokenizer("chatml"), dict(apply_chat_template=True)
    config = SFTConfig(model=str(files/"policy"), data=str(files/"strings.jsonl"), eval_share=0,
                       **apply)
    row = sft_datasets(config, tokenizer)[0][0]
    assert row["input_ids"] + turn_tail(tokenizer) == whole_ids(tokenizer, [*ASKED, said("No.")])
    sample(SampleConfig(policy=str(files/"policy"), prompts=str(files/"strings.jsonl"), n=2,
                        max_new_tokens=4, output_dir=str(tmp_path), **apply))
    assert [row["prompt"] for row in read_parts(tmp_path)] == [ASKED]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "plain" in r.message]
