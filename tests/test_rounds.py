"""Calibration in rounds: jobs of the ordinary stages, the right model, reference, candidates and σ
in each of them; one round is the pipeline without rounds; a kill changes no byte."""
import json, math, os, shutil
from pathlib import Path

import pytest
from datasets import Dataset

from faults import Machine
from vcb_nb.artifacts import InputError, fingerprint, read_manifest, write_jsonl
from vcb_nb.calibrate import CalibrationConfig, _rows_of, load_split, sigma_of_others
from vcb_nb.data import in_part, load_candidates, load_prompts
from vcb_nb.judges import PolicyJudge
from vcb_nb.pipeline import plan, plan_states, run_recipe, up_to
from vcb_nb.plots import method_label, method_marker
from vcb_nb.recipes import check_recipe, load_recipe
from vcb_nb.report import round_blocks
from vcb_nb.sample import SampleConfig
from vcb_nb.stages import round_seed

TINY = Path(__file__).parent/"tiny.yaml"
LORA = {"r": 4, "lora_alpha": 8}
METHODS = {
    "vcb": {}, "once": {"loss": "vcb", "rounds": 1},
    "twice": {"loss": "vcb", "rounds": 3},
    "anew": {"loss": "vcb", "rounds": {"count": 2, "start": "sft"}},
    "parts": {"loss": "vcb", "sigma": "candidates", "rounds": {"count": 2, "prompts": "split"}},
    "lora": {"loss": "vcb", "peft_config": LORA, "rounds": 2},
    "live": {"loss": "vcb", "reference": "live", "peft_config": LORA, "rounds": 2}}


def recipe_of(folder, methods=METHODS):
    recipe = load_recipe(str(TINY), {"output_dir": str(folder)})
    recipe["calibrate"]["methods"] = methods
    return check_recipe(recipe)


def jobs_of(recipe): return {job.name: job for job in plan(recipe)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of all these methods, up to their calibrations."
    folder = tmp_path_factory.mktemp("rounds")/"run"
    run_recipe(recipe_of(folder), upto="calibrate")
    return folder


@pytest.fixture(scope="module")
def jobs(run): return jobs_of(recipe_of(run))


def candidates(run, name): return load_candidates(str(run/name/"data"))


def weights(run, name): return fingerprint(run/"calibrate"/name/"model"/"model.safetensors")


def gap(logps, others): return max(abs(a - b) for xs, ys in zip(logps, others)
                                   for a, b in zip(xs, ys))


def judged(model, rows): return PolicyJudge(str(model), device="cpu")(rows.to_list())


# ---- one round

def test_one_round_is_the_pipeline_without_rounds(run, jobs):
    "The same job, and so the same weights; and so is the first of several rounds."
    assert jobs["calibrate/once"].key() == jobs["calibrate/vcb"].key()
    assert jobs["calibrate/twice-round1"].key() == jobs["calibrate/vcb"].key()
    assert weights(run, "once") == weights(run, "vcb") == weights(run, "twice-round1")
    assert not any("vcb-" in name or "once-" in name for name in jobs)


def test_a_number_is_the_count(tmp_path):
    one, other = (jobs_of(recipe_of(tmp_path, {"vcb": {"rounds": rounds}}))
                  for rounds in (3, {"count": 3}))
    assert {n: j.settings for n, j in one.items()} == {n: j.settings for n, j in other.items()}
    assert [n for n in one if "round" in n] == [
        "calibrate/vcb-round1", "sample_vcb-round2", "score_vcb-round2", "calibrate/vcb-round2",
        "sample_vcb-round3", "score_vcb-round3"]


def test_what_each_job_reads(tmp_path):
    "Round k samples the policy of round k − 1; reference and σ are SFT's in all of them."
    jobs, sft = jobs_of(recipe_of(tmp_path)), str(tmp_path/"sft"/"model")
    def made(job, what="model"): return str(tmp_path/job/what)
    first = jobs["calibrate/twice-round1"].config
    assert (first.model, first.candidates) == (sft, made("score", "data"))
    assert first.reference_model is first.sigma_candidates is None
    for number, before, name in ((2, "twice-round1", "twice-round2"), (3, "twice-round2", "twice")):
        drawn = jobs[f"sample_twice-round{number}"].config
        scored = jobs[f"score_twice-round{number}"].config
        trained = jobs[f"calibrate/{name}"].config
        assert drawn.policy == scored.sampled_by == trained.model == made(f"calibrate/{before}")
        assert scored.reference == trained.reference_model == sft
        assert scored.candidates == made(f"sample_twice-round{number}", "data")
        assert trained.candidates == made(f"score_twice-round{number}", "data")
        assert trained.sigma_candidates == made("score", "data")
    assert jobs["calibrate/anew"].config.model == sft
    assert jobs["calibrate/parts-round1"].config.part == "1/2"
    assert jobs["sample_parts-round2"].config.part == "2/2"
    assert jobs["calibrate/parts"].config.sigma_candidates is None


@pytest.mark.parametrize("start, last", [("previous", None), ("sft", "v1")])
def test_a_revision_is_that_of_sft(tmp_path, start, last):
    "The reference keeps it in all rounds; a policy of an earlier round is a folder without one."
    jobs = {job.name: job.settings for job in bad(
        tmp_path, sample={"prompts": "p.jsonl", "revision": "v1"},
        score={"reward": "vcb_nb.world:gold_reward"},
        calibrate={"revision": "v1", "rounds": {"count": 2, "start": start}})}
    assert jobs["calibrate/vcb"]["reference_model"] == "my/model@v1"
    assert jobs["score_vcb-round2"]["reference"] == "my/model@v1"
    assert jobs["calibrate/vcb-round1"]["revision"] == "v1"
    assert jobs["calibrate/vcb"].get("revision") == last
    assert "revision" not in jobs["sample_vcb-round2"]


def test_rounds_of_the_section_hold_for_every_method(tmp_path):
    recipe = load_recipe(str(TINY), {"output_dir": str(tmp_path), "calibrate.rounds": "2",
                                     "calibrate.methods.dpo.rounds": "1"})
    names = jobs_of(recipe)
    assert "calibrate/ipo-round1" in names and "calibrate/dpo-round1" not in names


# ---- two rounds: who samples, who is the reference

@pytest.mark.parametrize("name", ["twice", "lora"])
def test_candidates_come_from_the_round_before(run, name):
    """Their stored log-probs are those of round 1's policy, not those of SFT; ref_logps are SFT's,
    computed anew."""
    rows = candidates(run, f"score_{name}-round2")
    own = judged(run/"calibrate"/f"{name}-round1"/"model", rows)
    sft = judged(run/"sft"/"model", rows)
    assert gap(rows["sample_logps"], own) < 1e-3
    assert gap(rows["ref_logps"], sft) < 1e-4
    assert gap(own, sft) > .01


def test_a_later_round_follows_the_last(run):
    rows = candidates(run, "score_twice-round3")
    own, first = (judged(run/"calibrate"/f"twice-round{k}"/"model", rows) for k in (2, 1))
    assert gap(rows["sample_logps"], own) < 1e-3 < gap(own, first)
    assert gap(rows["ref_logps"], judged(run/"sft"/"model", rows)) < 1e-4


def first_log(run, name):
    "What the training says before its first update."
    return json.loads((run/"calibrate"/name/"training_log.jsonl").read_text().split("\n")[0])


def test_a_round_starts_from_the_round_before_or_from_sft(run, jobs):
    "At SFT all log-ratios are 0; elsewhere they are not."
    assert first_log(run, "anew")["logratios/std"] < 1e-4
    assert first_log(run, "twice")["logratios/std"] > .01
    assert jobs["calibrate/anew"].config.model == str(run/"sft"/"model")
    assert jobs["calibrate/twice"].config.model == str(run/"calibrate"/"twice-round2"/"model")


def test_the_live_reference_is_sft_too(run):
    """With its adapter off, the policy is what the round began with. A live reference that were
    that would give log-ratios of 0 at first; they are those of the stored log-probs."""
    stored, live = first_log(run, "lora"), first_log(run, "live")
    assert stored["logratios/std"] > .003
    assert math.isclose(stored["logratios/std"], live["logratios/std"], rel_tol=.01)
    assert not (run/"calibrate"/"lora"/"model"/"adapter_config.json").exists()


def test_every_round_draws_by_its_own_seed(tmp_path):
    "By the seed of round 1, a policy that has hardly moved would say the same again."
    jobs = jobs_of(recipe_of(tmp_path))
    seeds = [round_seed(seed, number) for seed in range(20) for number in range(1, 9)]
    assert len({*seeds}) == len(seeds) and max(seeds) < 2**31 and round_seed(7, 1) == 7
    assert [jobs[f"sample_twice-round{k}"].config.seed for k in (2, 3)] == [
        round_seed(0, 2), round_seed(0, 3)]
    assert jobs["calibrate/twice"].config.seed == round_seed(0, 3)


def test_nothing_is_called_a_mistake(tmp_path, caplog):
    "Neither samples of another policy than the reference nor a start elsewhere are one here."
    run_recipe(recipe_of(tmp_path, {"vcb": {"learning_rate": 1e-2, "rounds": 2}}), "calibrate")
    assert not [r.message for r in caplog.records
                if "reference" in r.message or "ref_logps" in r.message]
    assert read_manifest(tmp_path/"score_vcb-round2")["summary"]["kl"] > .05


# ---- σ

def test_stored_sigma_is_that_of_the_sft_samples(run, jobs):
    "In every round; a method that asks for it has that of the round's own candidates."
    first, later = candidates(run, "score"), candidates(run, "score_twice-round3")
    rows, _ = load_split(jobs["calibrate/twice"].config)
    known = dict(zip(first["prompt"], first["reward_std"]))
    assert rows["reward_std"] == [known[p] for p in rows["prompt"]] != later["reward_std"]
    assert rows["rewards"] == later["rewards"]
    rows, _ = load_split(jobs["calibrate/parts"].config)
    assert rows["reward_std"] == candidates(run, "score_parts-round2")["reward_std"]


def scored(path, prompts, rewards):
    write_jsonl(path, [{"prompt": p, "completions": ["a", "b", "c"], "rewards": r}
                       for p, r in zip(prompts, rewards)])
    return str(path)


def test_prompts_without_sft_samples(tmp_path, caplog):
    "σ is matched by prompt, not by row; a prompt that has none is left out, and told."
    source = scored(tmp_path/"sft.jsonl", ["x", "y"], [[0., 1., 2.], [0., 0., 3.]])
    rows = Dataset.from_list([{"prompt": p, "reward_std": 9.} for p in ("y", "new", "x")])
    assert sigma_of_others(rows, source)["reward_std"] == pytest.approx([math.sqrt(3), 0., 1.])
    assert "1 of 3 prompts are not there" in caplog.text
    with pytest.raises(InputError, match="has none of the prompts"):
        sigma_of_others(rows.select([1]), source)


# ---- parts

def test_parts_together_are_one_round_of_all(run):
    "No prompt twice, none left out: as many samples and rewards as one round without parts."
    used = [read_manifest(run/"calibrate"/name)["summary"]["data"]["train"]
            for name in ("parts-round1", "parts", "vcb")]
    counts = [u["prompts"] + sum(u["dropped"].values()) for u in used]
    assert counts[0] + counts[1] == counts[2] == 24
    first = in_part("1/2", range(24), "")
    prompts = load_prompts(str(run/"data"/"files"/"prompts.jsonl"))["prompt"]
    later = candidates(run, "score_parts-round2")
    assert sorted([prompts[i] for i in first] + list(later["prompt"])) == sorted(prompts)
    assert sum(map(len, later["completions"])) == 48


@pytest.mark.parametrize("rows", [1, 7, 24])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_disjoint_even_and_whole(rows, parts):
    found = [in_part(f"{k + 1}/{parts}", range(rows), "a") for k in range(min(parts, rows))]
    assert sorted(sum(found, [])) == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    if parts > rows:
        with pytest.raises(InputError, match="has no prompt. Give more prompts"):
            in_part(f"{parts}/{parts}", range(rows), "a.jsonl")


def test_a_part_goes_by_the_number_that_sampling_gave(tmp_path):
    "Scoring may have dropped rows; the others stay in their parts."
    config = CalibrationConfig(str(tmp_path), part="2/3")
    rows = Dataset.from_list([{"prompt": str(i), "index": i} for i in (0, 2, 4, 5, 7)])
    assert _rows_of(config, rows)["prompt"] == ["4", "7"]
    assert _rows_of(config, rows.remove_columns("index"))["prompt"] == ["2", "7"]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none(part):
    with pytest.raises(InputError, match="Give a number and how many parts there are"):
        SampleConfig("policy", "prompts", "out", part=part)


# ---- the run around them

def test_states_and_stops(run):
    "All are done; a change in round 2 makes what follows stale, and nothing before it."
    recipe = recipe_of(run)
    states = plan_states(up_to(plan(recipe), "calibrate"))
    assert {state for state, _ in states.values()} == {"done"}
    assert up_to(plan(recipe), "score")[-1].name == "score_validation"
    assert up_to(plan(recipe), "score_twice-round2")[-1].name == "score_twice-round2"
    recipe["calibrate"]["methods"] = {"twice": {"loss": "vcb", "rounds": {
        "count": 3, "sample": {"temperature": .9}}}}
    states = plan_states(up_to(plan(check_recipe(recipe)), "calibrate"))
    assert [n for n, (state, _) in states.items() if state == "stale"] == [
        "sample_twice-round2", "score_twice-round2", "calibrate/twice-round2",
        "sample_twice-round3", "score_twice-round3", "calibrate/twice"]


def test_the_last_round_is_the_policy_of_the_run(run, jobs):
    config = jobs["evaluate"].config
    assert [*config.policies] == [*METHODS]
    assert config.policies["twice"] == str(run/"calibrate"/"twice"/"model")
    assert config.methods["twice"] == {"method": "vcb_rounds3", "strength": "gamma", "value": 1.}
    assert config.methods["once"]["method"] == "vcb"
    assert method_label("vcb_rounds3") == "VCB, 3 rounds" and method_marker("vcb_rounds3") == "$3$"


def test_the_report_shows_every_round(run, jobs):
    "Rewards of what each policy says, and how far it is from SFT."
    rows = {(name, k): row for name, k, *row in round_blocks(run, [*jobs])[0].blocks[-1].rows}
    assert [key for key in rows if key[0] in ("twice", "parts", "once")] == [
        ("twice", "1"), ("twice", "2"), ("twice", "3"), ("parts", "1"), ("parts", "2")]
    later = candidates(run, "score_twice-round2")
    gaps = [a - b for xs, ys in zip(later["sample_logps"], later["ref_logps"])
            for a, b in zip(xs, ys)]
    mean = sum(map(sum, later["rewards"])) / sum(map(len, later["rewards"]))
    assert rows["twice", "2"][1::2] == [f"{mean:.3f}", f"{sum(gaps) / len(gaps):.2f}"]
    assert rows["parts", "2"][0].endswith(" responses to 12 prompts")
    assert round_blocks(run, ["calibrate/vcb", "score"]) == []


REWARD = "def length(prompt, completion): return float(len(completion))\n"


def own_recipe(run, folder, **rounds):
    """A recipe without data, sample and SFT: the user's candidates, model and reward function."""
    prompts = load_prompts(str(run/"data"/"files"/"prompts.jsonl"))["prompt"][:8]
    write_jsonl(folder/"own.jsonl", [
        {"prompt": p, "completions": [" good.", " not so very good.", " it is what it is."]}
        for p in prompts])
    (folder/"mine.py").write_text(REWARD)
    score = {"candidates": str(folder/"own.jsonl"), "reward": f"{folder/'mine.py'}:length"}
    training = {"per_device_train_batch_size": 4, "learning_rate": 1e-3,
                "methods": {"vcb": {"rounds": {"count": 2, **rounds}}}}
    return check_recipe({"name": "own", "output_dir": str(folder/"run"), "seed": 0,
                         "model": str(run/"sft"/"model"), "score": score,
                         "calibrate": training}), prompts


def test_own_candidates_and_a_reward_function(run, tmp_path):
    "Later rounds sample the prompts of the user's file, and score by the user's function."
    recipe, prompts = own_recipe(run, tmp_path, sample={"n": 3, "max_new_tokens": 12})
    states = run_recipe(recipe)
    assert [*states] == ["score", "calibrate/vcb-round1", "sample_vcb-round2", "score_vcb-round2",
                         "calibrate/vcb"]
    rows = candidates(tmp_path/"run", "score_vcb-round2")
    assert rows["prompt"] == prompts and {len(c) for c in rows["completions"]} == {3}
    assert rows["rewards"] == [list(map(float, map(len, cs))) for cs in rows["completions"]]
    assert gap(rows["ref_logps"], judged(run/"sft"/"model", rows)) < 1e-4


KILLS = [("calibrate/vcb", "checkpoints/checkpoint-*")]
if os.environ.get("VCB_STUDY"): # twenty seconds: make test-study
    KILLS += [("sample_vcb-round2", "data/part-*"), ("score_vcb-round2", "pending.json")]


@pytest.mark.slow
@pytest.mark.parametrize("job, file", KILLS, ids=[job for job, _ in KILLS])
def test_a_kill_in_round_2_changes_no_byte(run, tmp_path, job, file):
    "SIGKILL while that job works; the same command resumes there and ends with the same files."
    shutil.copytree(run, tmp_path/"run")
    for path in (tmp_path/"run"/"calibrate").iterdir(): shutil.rmtree(path)
    for path in (tmp_path/"run").glob("s*_*-round*"): shutil.rmtree(path)
    whole, killed = tmp_path/"run", tmp_path/"killed"
    shutil.copytree(whole, killed)
    methods = ("--calibrate.methods", "{vcb: {rounds: 2}}", "--upto", "calibrate")
    with Machine() as machine:
        run_recipe(recipe_of(whole, {"vcb": {"rounds": 2}}), "calibrate")
        call = machine.start("run", TINY, "--output_dir", killed, *methods)
        assert call.wait_for_file(killed/job, file), call.said()
        assert call.kill() == -9
        status, said = machine.vcb("run", TINY, "--output_dir", killed, *methods)
    assert status == 0 and "resumes" in said, said
    for name in ("sample_vcb-round2/data", "score_vcb-round2/data", "calibrate/vcb-round1/model",
                 "calibrate/vcb/model"):
        assert fingerprint(whole/name) == fingerprint(killed/name)


# ---- what cannot work is refused before the first job

def bad(tmp_path, **changes):
    recipe = {"output_dir": str(tmp_path), "model": "my/model", "sample": {"prompts": "p.jsonl"},
              "score": {"reward": "my.py:reward"}, **changes}
    return plan(check_recipe({k: v for k, v in recipe.items() if v is not None}))


SPLIT = {"count": 2, "prompts": "split"}
REFUSED = {
    "none": (dict(rounds=0), "calibrate.rounds: count is 0. Set it to a number of 1 or more."),
    "a fraction": (dict(rounds=1.5), "calibrate.rounds is 1.5, but a whole number is needed."),
    "a word": (dict(rounds="many"), "calibrate.rounds is 'many', but a whole number is needed."),
    "a misspelt key": (dict(rounds={"cuont": 2}), "rounds.cuont is not a setting. Did you mean "
                       "'count'?"),
    "misspelt prompts": (dict(rounds={"count": 2, "prompts": "spilt"}), "Did you mean 'split'?"),
    "misspelt start": (dict(rounds={"count": 2, "start": "sfd"}), "Did you mean 'sft'?"),
    "a bad setting of sampling": (dict(rounds={"count": 2, "sample": {"m": 3}}),
                                  "sample.m is not a setting"),
    "a policy of its own": (dict(rounds={"count": 2, "sample": {"policy": "x"}}),
                            "policy is what the rounds set. Leave it out."),
    "stored σ of other prompts": (dict(rounds=SPLIT), "Set sigma to candidates or dataset."),
    "a name twice": (dict(methods={"vcb": {"rounds": 2}, "vcb-round1": {"loss": "vcb"}}),
                     "'calibrate/vcb-round1' would be made twice")}


@pytest.mark.parametrize("calibrate, said", REFUSED.values(), ids=REFUSED.keys())
def test_bad_rounds(tmp_path, calibrate, said):
    with pytest.raises(InputError) as error: bad(tmp_path, calibrate=calibrate)
    assert said in str(error.value) and "\n" not in str(error.value)


LACKING = {
    "no reward": (dict(score={"candidates": "own.jsonl"}, calibrate={"rounds": 2}),
                  "Set rounds.score.reward"),
    "no prompts": (dict(sample=None, score=None, calibrate={"rounds": {
        "count": 2, "score": {"reward": "my.py:reward"}}}), "Set rounds.sample.prompts to a file."),
    "own candidates in parts": (dict(
        score={"candidates": "own.jsonl", "reward": "my.py:reward"},
        calibrate={"sigma": "dataset", "rounds": SPLIT}), "leave your own candidates out."),
    "a part of a part": (dict(sample={"prompts": "p.jsonl", "part": "1/2"},
                              calibrate={"sigma": "dataset", "rounds": SPLIT}),
                         "Leave sample.part out."),
    "online": (dict(calibrate=None, online={"methods": {"grpo": {"rounds": 2}}}),
               "online.rounds is not a setting")}


@pytest.mark.parametrize("changes, said", LACKING.values(), ids=LACKING.keys())
def test_rounds_that_could_not_end(tmp_path, changes, said):
    with pytest.raises(InputError) as error: bad(tmp_path, **changes)
    assert said in str(error.value)


def test_order_based_methods_may_split_without_sigma(tmp_path):
    "DPO has no σ(x), so nothing has to be said of it."
    jobs = bad(tmp_path, score={"reward": "vcb_nb.world:gold_reward"},
               calibrate={"methods": {"dpo": {"rounds": SPLIT}}})
    names = [job.name for job in jobs]
    assert names[-1] == "calibrate/dpo" and "sample_dpo-round2" in names
