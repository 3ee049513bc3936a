"""Scoring: the right ids to the right model, finite numbers only, nothing lost when one is not."""
import json, math, os, random, statistics, subprocess, sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset

from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.data import candidates_to_pairs, load_candidates, train_tokenizer
from vcb_nb.judges import (FunctionJudge, PolicyJudge, load_judge, reward_scores,
                           wrote_ids)
from vcb_nb.loading import load_reward_model, new_reward_model
from vcb_nb.losses import reward_sigma
from vcb_nb.models import new_policy
from vcb_nb.sample import SampleConfig, sample
from vcb_nb.saving import save_model
from vcb_nb.score import ScoreConfig, reward_statistics, score, score_rows
from vcb_nb.shards import list_parts
from vcb_nb.loading import load_tokenizer
from vcb_nb.tokenizers import same_tokenizer

ROOT = Path(__file__).parents[1]
PROMPTS = ["The soup", "A small room with a view;", "He said that", "We", "How was the film?",
           "The bread was very good", "again,"]
calls = 0


# ---- reward functions, found by name as a user's are

def length(prompt, completion): return len(completion) / 7 + len(prompt)

def both_lengths(prompts, completions):
    global calls
    calls += 1
    return torch.tensor([length(*pair) for pair in zip(prompts, completions)], dtype=torch.float64)
both_lengths.batched = True

def same(prompt, completion): return .1 + .2

def broken(prompt, completion):
    bad = os.environ["BAD_REWARD"]
    value = {"nan": math.nan, "inf": math.inf, "none": None, "text": "3.5"}[bad]
    return value if prompt.startswith("How") else 1.

def one_too_few(prompts, completions): return [1.] * (len(prompts) - 1)
one_too_few.batched = True


class Length:
    def __init__(self, scale, broken=False):
        self.scale, self._broken, self._asked = scale, broken, []

    def __call__(self, prompt, completion):
        if prompt.startswith("How") and self._broken: raise TimeoutError("try later")
        self._asked.append((prompt, completion))
        return self.scale * len(completion)


def tiny(tokenizer, **sizes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}
    return new_policy(tokenizer, **sizes).eval()


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    "A policy, two reward models (one with another tokenizer), and sampled candidates."
    folder = tmp_path_factory.mktemp("scored")
    other = train_tokenizer(["An altogether different text, with words of its own."] * 3, 290)
    save_model(tiny(tiny_tokenizer), tiny_tokenizer, folder/"policy")
    save_model(tiny(other, seed=4), other, folder/"other_policy")
    for name, tokenizer in (("", tiny_tokenizer), ("other_", other)):
        reward = new_reward_model(folder/f"{name}policy", tokenizer)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad(): reward.score.weight.normal_(generator=generator)
        save_model(reward, tokenizer, folder/f"{name}reward")
    prompts = folder/"prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    sample(SampleConfig(str(folder/"policy"), str(prompts), str(folder/"candidates"), n=5,
                        top_p=.98, max_new_tokens=40, temperature=.7, shard_size=2, device="cpu"))
    return folder, other


@pytest.fixture
def config(folders, tmp_path):
    folder, _ = folders
    return ScoreConfig(str(folder/"candidates"), str(tmp_path/"out"), reward="test_score:length",
                       reference=str(folder/"policy"), device="cpu")


@pytest.fixture(autouse=True)
def importable(monkeypatch): monkeypatch.chdir(Path(__file__).parent)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*.json*")}


# ---- what is stored

def test_rewards_statistics_and_reference(config, folders, tiny_tokenizer):
    "Every number against a plain recomputation: row by row, float64 log-softmax."
    score(config)
    model, rows = tiny(tiny_tokenizer), list(load_candidates(config.output_dir))
    for row, before in zip(rows, load_candidates(config.candidates), strict=True):
        assert {k: row[k] for k in before} == before
        assert row["rewards"] == [length(row["prompt"], text) for text in row["completions"]]
        assert math.isclose(row["reward_mean"], statistics.fmean(row["rewards"]))
        assert math.isclose(row["reward_std"], statistics.stdev(row["rewards"]))
        want = [reference_logp(model, row["prompt_ids"], ids) for ids in row["completion_ids"]]
        assert row["ref_logps"] == pytest.approx(want, abs=1e-3)


def reference_logp(model, prompt, completion):
    "log π(y|x) at temperature 1, whatever the candidates were drawn at (theory, identity 10)."
    ids = torch.tensor([prompt + completion])
    with torch.no_grad(): logps = model(ids).logits[0].double().log_softmax(-1)
    at = torch.arange(len(prompt), ids.shape[1])
    return logps[at - 1, ids[0, at]].sum().item()


def test_summary(config):
    summary, rows = score(config), list(load_candidates(config.output_dir))
    logps = [v for row in rows for v in row["ref_logps"]]
    assert summary["prompts"] == 7 and summary["candidates"] == 35 and summary["no_signal"] == 0
    assert math.isclose(summary["ref_logp_mean"], statistics.fmean(logps))
    assert math.isclose(summary["reward_std"], statistics.fmean(row["reward_std"] for row in rows))
    json.dumps(summary, allow_nan=False)


def test_a_reference_that_did_not_sample_is_told(config, folders, tiny_tokenizer, tmp_path, caplog):
    "Other weights behind the same tokenizer are legal, and said; bf16 rounding is not."
    said = "not the policy that sampled"
    assert score(config)["candidates"] == 35 and said not in caplog.text
    score(replace(config, output_dir=str(tmp_path/"bf16"), dtype="bfloat16"))
    assert said not in caplog.text
    other = tiny(tiny_tokenizer)
    with torch.no_grad(): other.get_output_embeddings().weight.mul_(6)  # no longer near uniform
    save_model(other, tiny_tokenizer, tmp_path/"other")
    score(replace(config, output_dir=str(tmp_path/"out2"), reference=str(tmp_path/"other")))
    assert caplog.text.count(said) == 1


def test_equal_rewards_are_counted(config):
    "Pitfall 22: .1 + .2 has a float residue; the stored σ is exactly 0, the prompts are counted."
    summary = score(replace(config, reward="test_score:same"))
    assert summary["no_signal"] == 7
    assert {row["reward_std"] for row in load_candidates(config.output_dir)} == {0.}


def by_length(prompt, text): return len(text) * 1e100


def test_how_far_rewards_follow_length(config, tmp_path):
    """Within prompts: that one prompt has longer and better answers than another says nothing.
    Neither does a prompt of equal rewards, and rewards of any size can be told."""
    rows = [dict(prompt=f"{base}", completions=["a" * (base + i) for i in (1, 2, 3)],
                 rewards=[base + sign * scale * i for i in (1, 2, 3)])
            for base, sign, scale in ((1, 1, 1), (1000, -1, 2), (5, 1, 1e-3), (7, -1, 1e6))]
    flat = dict(prompt="flat", completions=["a", "aa" * 50, "aaa"], rewards=[.1 + .2, .3, .3])
    def told(rows):
        write_jsonl(tmp_path/"given.jsonl", rows)
        given = replace(config, candidates=str(tmp_path/"given.jsonl"), reward=None,
                        reference=None, output_dir=str(tmp_path/str(len(rows))))
        return score(given)["length_correlation"]
    assert told(rows) == pytest.approx(0)                       # two prompts each way
    assert told([rows[0], flat, rows[2]]) == pytest.approx(1)
    assert told([flat]) is None
    huge = replace(config, reward="test_score:by_length", output_dir=str(tmp_path/"huge"))
    assert .5 < score(huge)["length_correlation"] <= 1


@pytest.mark.parametrize("rewards", [[1.], [1., 1.], [1e8, 1e8 + 1, 1e8 + 3], [.1 + .2, .3],
                                     [-1e-9, 1e-9, 0.]])
def test_sigma_is_the_losses_own(rewards):
    "Pitfall 22: what is stored is what the loss would compute."
    stored = reward_statistics(rewards)
    sigma, signal = reward_sigma(torch.tensor([rewards], dtype=torch.float64))
    assert stored["reward_std"] == sigma.item() and (stored["reward_std"] > 0) == signal.item()


# ---- judges

def test_a_batched_function_is_called_once_a_part(config):
    global calls
    score(config)
    import test_score  # the module as the library sees it
    test_score.calls = 0
    batched = replace(config, reward="test_score:both_lengths", output_dir=config.output_dir + "2")
    score(batched)
    assert test_score.calls == 4
    rewards = [load_candidates(c.output_dir)["rewards"][:] for c in (config, batched)]
    assert rewards[0] == rewards[1]


def test_gold_reward_by_name(config):
    from vcb_nb.world import gold_reward
    score(replace(config, reward="vcb_nb.world:gold_reward"))
    for row in load_candidates(config.output_dir):
        assert row["rewards"] == [gold_reward(row["prompt"], text) for text in row["completions"]]


def test_reward_model_with_the_policys_tokenizer_reads_the_sampled_ids(config, folders):
    "Pitfall 27: the ids that were drawn are scored; those of the text would give other rewards."
    folder, _ = folders
    score(replace(config, reward=str(folder/"reward")))
    rows, model = list(load_candidates(config.output_dir)), load_reward_model(folder/"reward")
    ids = [[row[k] for row in rows] for k in ("prompt_ids", "completion_ids")]
    stored = torch.tensor([row["rewards"] for row in rows])
    want = torch.tensor(reward_scores(model, *ids))
    torch.testing.assert_close(stored, want, atol=1e-5, rtol=1e-5)
    read = load_judge(str(folder/"reward"), device="cpu")(rows)
    assert (stored - torch.tensor(read)).abs().max() > 1e-3


def test_without_a_reference_the_sampled_ids_are_read_too(config, folders):
    "The ids are the reward model's own where its tokenizer reads the stored texts from them."
    folder, other = folders
    config = replace(config, reward=str(folder/"reward"))
    score(config)
    alone = replace(config, reference=None, output_dir=config.output_dir + "-alone")
    score(alone)
    want, rows = (list(load_candidates(c.output_dir)) for c in (config, alone))
    assert [row["rewards"] for row in rows] == [
        pytest.approx(row["rewards"], abs=1e-6) for row in want]
    assert wrote_ids(load_tokenizer(folder/"reward"), rows) and not wrote_ids(other, rows)
    assert not wrote_ids(other, [{k: row[k] for k in ("prompt", "completions")} for row in rows])


def test_reward_model_with_another_tokenizer_reads_the_text(config, folders):
    "Pitfall 21: read with the reward model's own tokenizer, EOS exactly where it finished."
    folder, other = folders
    score(replace(config, reward=str(folder/"other_reward")))
    rows, model = list(load_candidates(config.output_dir)), load_reward_model(folder/"other_reward")
    assert {r for row in rows for r in row["finish_reasons"]} == {"stop", "length"}
    prompts = [other.encode(row["prompt"]) for row in rows]
    completions = [[other.encode(text) + [other.eos_token_id] * (reason == "stop")
                    for text, reason in zip(row["completions"], row["finish_reasons"])]
                   for row in rows]
    want = torch.tensor(reward_scores(model, prompts, completions))
    stored = torch.tensor([row["rewards"] for row in rows])
    torch.testing.assert_close(stored, want, atol=1e-5, rtol=1e-5)


def test_same_tokenizer(tiny_tokenizer, folders, tmp_path):
    from copy import deepcopy
    folder, other = folders
    assert same_tokenizer(tiny_tokenizer, load_tokenizer(folder/"reward"))
    assert not same_tokenizer(tiny_tokenizer, other)
    ends_elsewhere, bos = deepcopy(tiny_tokenizer), deepcopy(tiny_tokenizer)
    ends_elsewhere.eos_token, bos.bos_token = ".", "<|endoftext|>"
    assert not any(same_tokenizer(tiny_tokenizer, t) for t in (ends_elsewhere, bos))


# ---- rewards that are no numbers

@pytest.mark.parametrize("bad, said", [("nan", "nan"), ("inf", "inf"), ("none", "None"),
                                       ("text", "'3.5'")])
def test_a_bad_reward_is_named_and_nothing_done_is_lost(config, monkeypatch, bad, said):
    "Pitfall 25: the message names row and candidate; finished parts stay; the next call goes on."
    monkeypatch.setenv("BAD_REWARD", bad)
    config = replace(config, reward="test_score:broken")
    with pytest.raises(InputError, match=rf"row 4 \('How was.*candidate 0: the reward is {said}"):
        score(config)
    kept = contents(config.output_dir)
    parts = list_parts(config.output_dir, complete=False)
    assert [p.name[5:10] for p in parts] == ["00000", "00001"]
    monkeypatch.setattr("test_score.broken.__code__", same.__code__)
    assert score(config)["prompts"] == 7
    assert {k: v for k, v in contents(config.output_dir).items() if k in kept} == kept


def test_one_number_per_completion(config):
    with pytest.raises(InputError, match="9 numbers for 10"):
        score(replace(config, reward="test_score:one_too_few"))


@pytest.mark.parametrize("value", [True, 3, torch.tensor(2.5), torch.tensor([1.5])])
def test_what_counts_as_a_number(value):
    rows = [{"prompt": "p", "completions": ["c"]}]
    judge = FunctionJudge(lambda prompt, completion: value)
    assert score_rows(rows, judge)[0]["rewards"] == [float(value)]


def test_nan_weights_are_named(folders, tiny_tokenizer):
    "Pitfall 25: a reference that gives NaN is found here, not in training."
    model, rows = tiny(tiny_tokenizer), load_candidates(str(folders[0]/"candidates")).to_list()
    with torch.no_grad(): next(model.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="Prompt row 0 .*the log-probability is nan"):
        score_rows(rows, FunctionJudge(lambda prompt, completion: 1.), PolicyJudge(model))


# ---- other sources

def test_n_best_lists_of_others_keep_their_rewards(config, tiny_tokenizer, tmp_path):
    "Text only, ragged n, rewards given: tokenised with the reference's tokenizer."
    texts, source = ["good", "bad and long", "so so", ""], tmp_path/"nbest.jsonl"
    rows = [{"prompt": f"{p} {i}", "completions": texts[:2 + i % 3],
             "rewards": [1., -.5, .25, 9.][:2 + i % 3]} for i, p in enumerate(PROMPTS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = score(replace(config, candidates=str(source), reward=None, shard_size=3))
    scored = list(load_candidates(config.output_dir))
    assert len(list_parts(config.output_dir)) == 3
    assert [row["index"] for row in scored] == list(range(7))
    for row, before in zip(scored, rows, strict=True):
        ids = [tiny_tokenizer.encode(text) + [0] for text in before["completions"]]
        assert row["completion_ids"] == ids and row["rewards"] == before["rewards"]
        assert len(row["ref_logps"]) == len(row["rewards"])
    assert summary["candidates"] == sum(len(row["rewards"]) for row in rows)


def test_real_n_best_lists(shared_data, config, tmp_path):
    "Scored summaries of CNN/DailyMail: rewards kept, ids made, a reference added."
    source = next((shared_data/"scored_summeval").glob("*.jsonl*"))
    rows = load_candidates(str(source)).select(range(3))
    rows.to_json(tmp_path/"few.jsonl")
    summary = score(replace(config, candidates=str(tmp_path/"few.jsonl"), reward=None,
                            max_prompt_length=60, max_completion_length=50))
    scored = list(load_candidates(config.output_dir, ("ref_logps",)))
    assert [row["rewards"] for row in scored] == [row["rewards"] for row in rows]
    assert summary["prompts"] == 3
    for row in scored:
        assert len(row["prompt_ids"]) <= 60 and max(map(len, row["completion_ids"])) <= 50
        ends = [("stop" if ids[-1] == 0 else "length") for ids in row["completion_ids"]]
        assert ends == row["finish_reasons"]


def test_scoring_again_with_another_judge(config):
    score(config)
    again = replace(config, candidates=config.output_dir + "/data", reference=None,
                    output_dir=config.output_dir + "2", reward="vcb_nb.world:gold_reward")
    score(again)
    first, second = (load_candidates(c.output_dir) for c in (config, again))
    assert second["ref_logps"][:] == first["ref_logps"][:]
    assert second["rewards"][:] != first["rewards"][:]


@pytest.mark.parametrize("change, said", [
    (dict(reward=None), "has no rewards"), (dict(batch_tokens=0), "batch_tokens"),
    (dict(reward="test_score:lenght"), "Did you mean 'length'"),
    (dict(reward="no_such_module:f"), "no module 'no_such_module'"),
    (dict(reward="/nowhere/model"), "nowhere"), (dict(candidates="/nowhere"), "nowhere"),
    (dict(reference="/nowhere"), "nowhere")])
def test_bad_settings_are_named(config, change, said):
    with pytest.raises(InputError, match=said): score(replace(config, **change))


def test_candidates_of_another_policy_are_refused(config, folders):
    "Ids that another tokenizer made are told by the texts beside them."
    folder, _ = folders
    with pytest.raises(InputError, match="not come from the tokenizer of .*other_policy"):
        score(replace(config, reference=str(folder/"other_policy")))


def test_unfinished_candidates_are_refused(config, folders, tmp_path):
    import shutil
    shutil.copytree(folders[0]/"candidates", tmp_path/"cut")
    list_parts(tmp_path/"cut")[1].unlink()
    with pytest.raises(InputError, match="3 of 4 shards"):
        score(replace(config, candidates=str(tmp_path/"cut")))


# ---- resumption and readers

def test_other_settings_are_refused(config, folders):
    "Pitfall 11: rewards of another judge are never mixed in."
    score(config)
    part = folders[0]/"candidates"/"data"/"part-00001-of-00004.jsonl"
    changes = dict(reward="test_score:same", reference=None, dtype="bfloat16", candidates=str(part))
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"{name}: "):
            score(replace(config, **{name: value}))


def test_a_changed_reward_function_is_noticed(config, tmp_path, monkeypatch):
    "Pitfall 11: the key covers the source of a reward function."
    monkeypatch.chdir(tmp_path)
    module = tmp_path/"changing_reward.py"
    module.write_text("def f(prompt, completion): return 1.\n")
    config = replace(config, reward="changing_reward:f")
    score(config)
    module.write_text("def f(prompt, completion): return 2.\n")
    with pytest.raises(InputError, match="reward: different content"): score(config)


def test_two_processes_leave_what_one_leaves(config, tmp_path):
    score(config)
    shared = replace(config, output_dir=str(tmp_path/"shared"))
    code = ("import sys, json, torch; torch.set_num_threads(1)\n"
            "from vcb_nb.score import ScoreConfig, score\n"
            "score(ScoreConfig(**json.loads(sys.argv[1])))")
    env = {**os.environ, "WORLD_SIZE": "2",
           "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(asdict(shared))]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(r)}) for r in (0, 1)]
    assert [rank.wait(600) for rank in ranks] == [0, 0]
    assert contents(shared.output_dir) == contents(config.output_dir)


def test_a_second_call_does_nothing_and_a_lost_part_is_made_again(config):
    first, before = score(config), contents(config.output_dir)
    assert score(config) == first and contents(config.output_dir) == before
    list_parts(config.output_dir)[3].unlink()
    assert score(config) == first and contents(config.output_dir) == before


def test_load_dataset_reads_files_and_folder(config, tmp_path):
    score(config)
    want = list(load_candidates(config.output_dir))
    parts = [str(p) for p in list_parts(config.output_dir)]
    files = load_dataset("json", data_files=parts, split="train", cache_dir=str(tmp_path/"a"))
    folder = load_dataset(config.output_dir + "/data", split="train", cache_dir=str(tmp_path/"b"))
    assert list(files) == list(folder) == want


def test_pairs_for_trl(config):
    score(config)
    pairs = candidates_to_pairs(load_candidates(config.output_dir))
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names) and len(pairs) > 7
    pair = random.Random(0).choice(list(pairs))
    assert length(pair["prompt"], pair["chosen"]) > length(pair["prompt"], pair["rejected"])


def test_every_setting_has_help():
    assert all(f.metadata.get("help") for f in fields(ScoreConfig))


# ---- rewards from Python, and costly ones

def test_a_callable_is_a_setting_in_python(config):
    "What it holds is part of the settings: resuming with another one is refused."
    scoring = replace(config, reward=Length(2.), reference=None)
    assert score(scoring) == score(replace(scoring, reward=Length(2.)))
    for row in load_candidates(scoring.output_dir):
        assert row["rewards"] == [2. * len(text) for text in row["completions"]]
    with pytest.raises(InputError, match="reward: different content"):
        score(replace(scoring, reward=Length(3.)))


def test_a_costly_judge_is_asked_only_for_the_rest(config):
    "A failure within a part loses no answer; other workers give the same files."
    judge = Length(1., broken=True)
    costly = replace(config, reward=judge, reference=None, shard_size=7, workers=3)
    with pytest.raises(InputError, match="TimeoutError: try later"): score(costly)
    judge._broken = False
    score(replace(costly, workers=1))
    rows = load_candidates(costly.output_dir)
    pairs = {(row["prompt"], text) for row in rows for text in row["completions"]}
    assert sorted(judge._asked) == sorted(pairs)
    assert not list(Path(costly.output_dir).glob(".answers*"))
