"""The budget of a recipe is held to what is counted and measured: operations to those of the
benchmarks, memory to the allocator's own record, rows and lengths to what stages really read."""
import gc, json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from benchmarks import budget
from benchmarks.budget import allocated_peak, expected_growth
from benchmarks.common import Settings, make_world
from benchmarks.flops import needed_flops, trunk_weights
from benchmarks.step import step_call
from vcb_nb.adapters import add_lora
import vcb_nb.budget
from vcb_nb.artifacts import InputError
from vcb_nb.budget import (DEVICES, Lengths, Peek, WORK, Work, budget_text, changes,
                           find_device, job_flops, model_shape, recipe_budget,
                           remedy, token_lengths, work_memory, work_seconds)
from vcb_nb.cli import main
from vcb_nb.models import new_policy
from vcb_nb.pipeline import plan, run_recipe
from vcb_nb.recipes import load_recipe

TINY = Path(__file__).parent/"tiny.yaml"
ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "qwen2", "qwen3"]
PYTHIA = AutoConfig.for_model("gpt_neox", hidden_size=2560, num_hidden_layers=32,
                              num_attention_heads=32, intermediate_size=10240, vocab_size=50304)
ONE = Work("train", 1, prompt=512, n=8, response=256, longest=(512, 256), autocast="bfloat16")


# --- operations -------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_are_those_that_the_benchmarks_count(tiny_tokenizer, architecture, lora):
    model = new_policy(tiny_tokenizer, architecture, hidden_size=32, num_hidden_layers=2)
    shape = model_shape(model.config, lora)
    model = add_lora(model, lora)
    assert shape.trunk == trunk_weights(model)
    assert shape.weights == sum(p.numel() for p in model.parameters())
    for n, kind in ((1, "train"), (2, "read"), (8, "train")):
        work = Work(kind, 3, 7, n, 5, (7, 5), lora=json.dumps(lora))
        exact = needed_flops(model, [[1] * 7] * 3, [[[1] * 5] * n] * 3, kind == "train")
        assert sum(job_flops(shape, work).values()) == exact


def test_rows_repeat_the_prompt():
    "One response alone costs the same either way; eight cost their prompts seven times more."
    shape = model_shape(PYTHIA)
    def ratio(n):
        work = Work("read", 1, 512, n, 256, (512, 256))
        ours, rows = (sum(job_flops(shape, work, shared).values()) for shared in (True, False))
        return rows / ours
    assert ratio(1) == 1 and 2.2 < ratio(8) < 2.5


# --- memory -----------------------------------------------------------------------------------

SMALL = dict(layers=4, hidden=256, vocab=8192, prompt=128, n=8, response="64")
STEPS = {"plain": {}, "checkpointing": dict(checkpointing=True), "LoRA": dict(lora=8),
         "bf16": dict(dtype="bfloat16"), "llama": dict(arch="llama"),
         "four prompts": dict(arch="gpt2", n=2, prompts=4),
         "more gradients than activations": dict(n=2, response="16", hidden=512, vocab=2048)}

@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_memory_is_what_a_step_asks_for(name):
    "Within 15 % of the most that PyTorch's allocator gave out at one time."
    world = make_world(Settings(**{**SMALL, **STEPS[name]}))
    step = step_call(world, "shared")
    step() # what is made once is there
    world.free()
    assert abs(expected_growth(world) / allocated_peak(step) - 1) < .15


def test_garbage_of_an_earlier_call_is_not_counted():
    "The profiler knows it, and would take it off whichever call it is collected in."
    cycle, kept = [], []
    allocated_peak(lambda: cycle.extend([torch.empty(2_000_000), cycle]))
    gc.collect() # it is old now, so that only a full collection looks at it
    del cycle
    def call(): gc.collect(), kept.append(torch.empty(1_000_000))
    assert allocated_peak(call) == pytest.approx(4)


@pytest.mark.slow
def test_the_benchmark_writes_what_was_expected_beside_what_was_found(tmp_path):
    "One line, with its setting."
    out = tmp_path/"lines.jsonl"
    budget.measure(Settings(layers=2, hidden=32, vocab=320, prompt=8, n=2, response="4", rounds=1,
                            out=str(out)))
    row, = map(json.loads, out.read_text().splitlines())
    assert row["bench"] == "budget" and row["layers"] == 2
    for name in ("expected_mb", "allocated_mb", "expected_seconds", "seconds"): assert row[name] > 0


def test_the_cache_holds_a_prompt_once():
    per_token = 2 * 32 * 2560 * 2 # keys and values, layers, width, bytes
    def cache(n):
        work = Work("sample", 1, 500, n, 100, (500, 100), batch=3, dtype="bfloat16")
        return work_memory(PYTHIA, work)["cache"]
    assert cache(1) == 3 * 600 * per_token and cache(8) - cache(1) == 3 * 700 * per_token


def test_sharding_divides_what_stays():
    one, eight = (work_memory(PYTHIA, ONE, count) for count in (1, 8))
    for name in ("weights", "optimizer", "gradients"): assert eight[name] == one[name] / 8
    assert one["optimizer"] == 8 * model_shape(PYTHIA).weights


# --- what fits --------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 16])
def test_the_change_that_is_named_makes_it_fit_and_no_smaller_one_does(device, batch):
    from dataclasses import replace
    work, there = replace(ONE, batch=batch), find_device(device)
    said = remedy(PYTHIA, work, there)
    tried = {}
    for words, changed in changes(work, "bfloat16" if "bf16" in there.flops else "float16"):
        tried.setdefault(words, work_memory(PYTHIA, changed)["peak"] <= there.usable)
    if not said: assert work_memory(PYTHIA, work)["peak"] <= there.usable
    else: assert said == next(words for words, fits in tried.items() if fits)


def test_a_smaller_batch_leaves_the_step_as_it_is():
    from dataclasses import replace
    for words, changed in changes(replace(ONE, batch=8, accumulation=2)):
        assert changed.batch * changed.accumulation == 16, words


@pytest.mark.parametrize("name, said", [("h10", "Did you mean 'h100'"), ("0xh100", "8xh100"),
                                        ("2xcpu", "There is no device"), ("x", "no device")])
def test_a_device_that_is_not_there(name, said):
    with pytest.raises(InputError, match=said): find_device(name)


def test_time_is_of_products_and_of_the_memory():
    "Reading scales with devices; decoding one row is limited by reading the weights."
    shape = model_shape(PYTHIA)
    read = Work("read", 100, 512, 8, 256, (512, 256), dtype="bfloat16")
    one, eight = (work_seconds(shape, read, find_device(name)) for name in ("h100", "8xh100"))
    assert one == pytest.approx(8 * eight)
    drawn = Work("sample", 1, 512, 1, 256, (512, 256), dtype="bfloat16")
    assert work_seconds(shape, drawn, find_device("h100")) > 256 * 2 * shape.weights / 3350e9


# --- measured here ----------------------------------------------------------------------------

def test_a_slow_product_is_measured_by_fewer_rows(monkeypatch):
    """bf16 on a processor without it: ten seconds must not become ten minutes, and the rate is that
    of the product. The clock is the test's: a row takes ten milliseconds, all of them a minute."""
    clock, multiply, sizes = [0.], torch.mm, []
    def slow(left, right, out):
        clock[0] += .01 * len(left)
        sizes.append(len(left))
        return multiply(left, right, out=out)
    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(vcb_nb.budget, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rate = vcb_nb.budget._product_rate(6000, 8, 4, torch.float32, 2.5)
    assert rate == pytest.approx(2 * 8 * 4 / .01) and clock[0] < 6
    sizes.clear()
    vcb_nb.budget._product_rate(40, 8, 4, torch.float32, 2.5)
    assert sizes[-1] == 40 # small enough as it is


# --- recipes ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_budget_before_the_run_foresees_what_the_stages_read(tmp_path):
    "Rows and lengths are those that training really has; afterwards the samples are known too."
    recipe = load_recipe(str(TINY), {"output_dir": str(tmp_path/"run"), "seed": 3})
    jobs = {job.name: job for job in plan(recipe)}
    before = Peek(list(jobs.values()), tmp_path/"peek")
    foreseen = {name: WORK[name](jobs[name].config, before)[0] for name in ("sft", "reward")}
    sampled = WORK["calibrate"](jobs["calibrate/vcb"].config, before)[0][1]
    run_recipe(recipe, "score")
    assert not (tmp_path/"run"/"peek").exists()
    from vcb_nb.artifacts import read_manifest
    for name, (config, work) in foreseen.items():
        summary = read_manifest(tmp_path/"run"/name)["summary"]
        assert work.groups == pytest.approx(summary["rows"], abs=1 + .02 * summary["rows"])
        made = AutoConfig.from_pretrained(tmp_path/"run"/name/"model")
        assert (config.vocab_size, config.hidden_size) == (made.vocab_size, made.hidden_size)
    after = Peek(list(jobs.values()), tmp_path/"again")
    assert after.moved == {} # all is there
    known = WORK["calibrate"](jobs["calibrate/vcb"].config, after)[0][1]
    assert (known.groups, known.n) == (sampled.groups, sampled.n) == (24, 4)
    assert known.longest[1] <= sampled.longest[1] == 32


def test_online_counts_samples_and_updates(tmp_path):
    """Blocks of prompts are drawn once and trained on as often as the method says; reference and
    reward model are in memory beside what trains, and samples leave nothing on the disk."""
    jobs = plan(load_recipe("demo_online", {"output_dir": str(tmp_path/"run")}))
    peek = Peek(jobs, tmp_path/"peek")
    configs = {job.name: job.config for job in jobs}
    work = {name: WORK["online"](configs[f"online/{name}"], peek)
            for name in ("grpo-beta0.1", "ppo-beta0.1")}
    kinds = {name: [(w.kind, w.head, w.groups, w.passes) for _, w in found]
             for name, found in work.items()}
    assert kinds["grpo-beta0.1"] == [("sample", True, 320, 1), ("read", True, 320, 2),
                                     ("read", False, 320, 1), ("train", True, 320, 1)]
    assert kinds["ppo-beta0.1"][3:] == [("train", True, 320, 4), ("train", False, 320, 4)]
    lines, _ = recipe_budget(jobs, "h100")
    found = {line.name: line for line in lines}
    calibrated, grpo, ppo = (found[name] for name in (
        "calibrate/vcb-gamma1", "online/grpo-beta0.1", "online/ppo-beta0.1"))
    assert grpo.disk == ppo.disk == calibrated.disk
    assert calibrated.memory["peak"] < grpo.memory["peak"] < ppo.memory["peak"]


def test_lengths_are_cut_as_the_stages_cut_them(tiny_tokenizer):
    from datasets import Dataset
    rows = Dataset.from_list([{"prompt": "a" * 50, "completion": "b" * 9}] * 3)
    class config: apply_chat_template, max_prompt_length = False, 20
    found = token_lengths(tiny_tokenizer, rows, ("completion",), config, 24)
    assert found == Lengths(20, 4, (20, 4))


@pytest.mark.slow
def test_the_command_line_shows_it(tmp_path, capsys):
    words = ["run", str(TINY), "--plan", "--budget", "--output_dir", str(tmp_path/"run")]
    assert main([*words, "--device", "2xt4", "--price", "0.5"]) == 0
    said = capsys.readouterr().out
    for name in ("sft", "calibrate/rrhf", "evaluate", "all"): assert f"\n{name} " in said
    assert "2xt4: 14.4 GB to use" in said and not (tmp_path/"run").exists()
    assert main([*words, "--device", "gtx"]) == 2
    assert "There is no device 'gtx'" in capsys.readouterr().err
    assert main([*words, "--device", "t4", "--sample.dtype", "bfloat16", "--upto", "sample"]) == 0
    said = capsys.readouterr().out
    assert "sample asks for bf16, which t4 does not have" in said and "reward asks" not in said


def test_the_table_says_what_does_not_fit():
    from vcb_nb.budget import Line
    line = Line("sft", 10**9, 2e6, 3e15, 4e15, {"peak": 30e9}, 4e9, 7200, "dtype: bfloat16")
    said = budget_text([line], find_device("2xrtx4090"), 1.5)
    assert "30 GB!" in said and "2.0 h" in said and "6.00 $" in said
    assert "sft does not fit: 30 GB. Smallest change that makes it fit: dtype: bfloat16." in said
