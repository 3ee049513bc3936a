"""A row or more in the column layout of each public dataset, with invented texts.

`LAYOUT_ROWS`: layout → (rows, kind, what the loader of that kind makes of them)."""
QUESTION, GOOD, BAD = "Is the harbour far?", "An hour on foot.", "Yes."


def turn(text, role="user"): return {"role": role, "content": text}


def said(text): return [turn(text, "assistant")]


def record(text, overall, fine):
    "A completion of UltraFeedback."
    return {"annotations": {"helpfulness": {"Rating": "5", "Rationale": "Clear."}}, "critique": "-",
            "custom_system_prompt": "", "fine-grained_score": fine, "model": "m",
            "overall_score": overall, "principle": "helpfulness", "response": text}


def steer(text, score):
    return {"prompt": QUESTION, "response": text, "helpfulness": score, "correctness": 1,
            "coherence": 4, "complexity": 1, "verbosity": 1}


def message(number, parent, text, role, rank=None):
    "A row of oasst1."
    return {"message_id": number, "parent_id": parent, "user_id": "u", "text": text, "role": role,
            "lang": "en", "rank": rank, "message_tree_id": "1", "tree_state": "ready_for_export"}


def node(number, text, role, *replies, rank=None):
    "A message of an oasst1 tree."
    return {"message_id": number, "text": text, "role": role, "rank": rank,
            "replies": list(replies)}


PAIR = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}
CHAT = {"prompt": [turn(QUESTION)], "chosen": said(GOOD), "rejected": said(BAD)}
WHOLE = {side: [turn(QUESTION), turn(text, "assistant")]
         for side, text in (("chosen", GOOD), ("rejected", BAD))}
LIST = {"prompt": QUESTION, "completions": [GOOD, BAD]}
POST = "SUBREDDIT: r/travel\n\nTITLE: Walk\n\nPOST: It was far.\n\nTL;DR:"
SUMMARIES = [{"text": " Far.", "policy": "sup", "note": ""},
             {"text": " A long walk.", "policy": "ref", "note": ""}]
SHP = {"post_id": "1", "domain": "askbaking_train", "upvote_ratio": .9, "history": QUESTION,
       "c_root_id_A": "a", "c_root_id_B": "b", "score_A": 3, "score_B": 9, "human_ref_A": BAD,
       "human_ref_B": GOOD, "labels": 0, "seconds_difference": 60., "score_ratio": 3.}
SAFE = {"prompt": QUESTION, "response_0": BAD, "response_1": GOOD, "prompt_source": "s",
        "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 1,
        "safer_response_id": 0}
INFO = {"id": "t3", "post": "It was far.", "title": "Walk", "subreddit": "travel", "site": None,
        "article": None}
SHAREGPT = {"id": "1", "conversations": [{"from": "system", "value": "Be brief."},
                                         {"from": "human", "value": QUESTION},
                                         {"from": "gpt", "value": GOOD}]}

LAYOUT_ROWS = {
    "UltraFeedback binarized": (
        [{"prompt": QUESTION, "prompt_id": "0", **WHOLE, "messages": WHOLE["chosen"],
          "score_chosen": 8.5, "score_rejected": 6.}], "pairs", [CHAT | {"margin": 2.5}]),
    "UltraFeedback by rating": (
        [{"source": "s", "instruction": QUESTION, "chosen_response": GOOD, "rejected_response": BAD,
          "chosen_avg_rating": 4.75, "rejected_avg_rating": 4.5, "chosen_model": "m"}],
        "pairs", [PAIR | {"margin": .25}]),
    "scored pairs": ([PAIR | {"chosen_score": 3, "rejected_score": 1}], "pairs",
                     [PAIR | {"margin": 2.}]),
    "orca_dpo_pairs": (
        [{"system": "Be brief.", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
         {"system": "", "question": QUESTION, "chosen": GOOD, "rejected": BAD}], "pairs",
        [CHAT | {"prompt": [turn("Be brief.", "system"), turn(QUESTION)]}, CHAT]),
    "ShareGPT pairs": (
        [{"conversations": [{"from": "human", "value": QUESTION}],
          "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}}],
        "pairs", [CHAT]),
    "PKU-SafeRLHF": ([SAFE], "pairs", [PAIR]),
    "SHP": ([SHP, SHP | {"labels": 1, "human_ref_A": GOOD, "human_ref_B": BAD}], "pairs",
            [PAIR, PAIR]),
    "stack-exchange-paired": (
        [{"qid": 1, "question": QUESTION, "date": "2020/01/01", "metadata": ["u"],
          "response_j": GOOD, "response_k": BAD}], "pairs", [PAIR]),
    "summarize_from_feedback": (
        [{"info": INFO, "summaries": SUMMARIES, "choice": 1, "worker": "w", "batch": "b",
          "split": "train", "extra": {"confidence": 8}},
         {"info": {**dict.fromkeys(INFO), "id": "c", "article": "Rain fell."},
          "summaries": SUMMARIES, "choice": 0, "worker": "w", "batch": "cnndm0", "split": "valid2",
          "extra": {"confidence": None}}], "pairs",
        [{"prompt": POST, "chosen": " A long walk.", "rejected": " Far."},
         {"prompt": "Rain fell.\n\nTL;DR:", "chosen": " Far.", "rejected": " A long walk."}]),
    "RewardBench 2": (
        [{"id": "1", "prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD, "No."],
          "num_correct": 1, "num_incorrect": 2, "total_completions": 3, "models": ["a", "b"],
          "subset": "Focus", "additional_metadata": None}], "candidates",
        [{"prompt": QUESTION, "completions": [GOOD, BAD, "No."], "rewards": [1., 0., 0.]}]),
    "UltraFeedback": (
        [{"source": "s", "instruction": QUESTION, "models": ["a", "b"],
          "completions": [record(GOOD, 7.5, 4.5), record(BAD, 10., 2.)],
          "correct_answers": ["None"], "incorrect_answers": ["None"]}], "candidates",
        [LIST | {"rewards": [4.5, 2.]}]),
    "Nectar": (
        [{"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant: ", "turns": 1, "num_responses": 2,
          "source": ["s"], "good_natured": True,
          "answers": [{"answer": GOOD, "model": "a", "rank": 1.},
                      {"answer": BAD, "model": "b", "rank": 2.}]}], "candidates",
        [{"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:",
          "completions": [" " + GOOD, " " + BAD], "rewards": [-1., -2.]}]),
    "KTO": ([{"prompt": QUESTION, "completion": GOOD, "label": True},
             {"prompt": "Why?", "completion": "So.", "label": False},
             {"prompt": QUESTION, "completion": BAD, "label": False}], "demonstrations",
            [{"prompt": QUESTION, "completion": GOOD}]),
    "HelpSteer2": ([steer(GOOD, 4), steer(BAD, 1)], "candidates", [LIST | {"rewards": [4., 1.]}]),
    "oasst trees": (
        [{"message_tree_id": "1", "tree_state": "ready_for_export",
          "prompt": node("1", QUESTION, "prompter", node("2", GOOD, "assistant", rank=0),
                         node("3", BAD, "assistant", rank=1))}],
        "candidates", [LIST | {"prompt": [turn(QUESTION)], "rewards": [0., -1.]}]),
    "oasst messages": (
        [message("1", None, QUESTION, "prompter"), message("2", "1", GOOD, "assistant", 0),
         message("3", "1", BAD, "assistant", 1)],
        "candidates", [LIST | {"prompt": [turn(QUESTION)], "rewards": [0., -1.]}]),
    "n-best list of messages": ([{"prompt": [turn(QUESTION)], "rewards": [2, 1],
                                  "completions": [said(GOOD), said(BAD)]}],
                                "candidates", [LIST | {"prompt": [turn(QUESTION)],
                                                       "rewards": [2., 1.]}]),
    "n-best list": ([{"prompt": QUESTION, "responses": [GOOD, BAD], "rewards": [2, 1]}],
                    "candidates", [LIST | {"rewards": [2., 1.]}]),
    "n-best list with scores": ([LIST | {"scores": [2, 1]}], "candidates",
                                [LIST | {"rewards": [2., 1.]}]),
    "ShareGPT": ([SHAREGPT], "demonstrations", [
        {"messages": [turn("Be brief.", "system"), turn(QUESTION), turn(GOOD, "assistant")]}]),
    "Alpaca": ([{"instruction": "Translate.", "input": "Brot", "output": "bread", "text": "…"},
                {"instruction": QUESTION, "input": "", "output": GOOD, "text": "…"}],
               "demonstrations", [{"prompt": "Translate.\n\nBrot", "completion": "bread"},
                                  {"prompt": QUESTION, "completion": GOOD}]),
}
