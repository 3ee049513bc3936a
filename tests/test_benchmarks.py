"The benchmarks compare like with like: the same tokens, the same loss, a count that is right."
import json, os, statistics, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (attention, common, memory, pipeline, plot, reward, sampling, scaling,
                        scoring, sft, step, tables, training)
from benchmarks.flops import needed_flops, trunk_weights
from vcb_nb import packing
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError, write_json
from vcb_nb.logprobs import candidate_logps
from vcb_nb.models import new_policy

TINY = dict(layers=2, hidden=32, vocab=320, prompt=8, n=2, response="4", rounds=1)
KEYS = {"way", "seconds", "speedup_vs_naive", "speedup_vs_trl", "share_of_peak", "peak_mb",
        "bench", "arch", "layers", "hidden", "vocab", "n", "prompt", "response", "dtype", "device",
        "threads", "malloc", "torch", "transformers", "trl", "date", "machine"}


ROWS = dict(TINY, arch="llama", prompts=3, prompt_span="4-9", response="2-5")


def lines(module, tmp_path, kind=common.Settings, **settings):
    "What a benchmark writes for a tiny shape."
    out = tmp_path/"results"/"lines.jsonl"
    module.measure(kind(**{**TINY, "out": str(out), **settings}))
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def world():
    "Two prompts, four responses of uneven length to each."
    return common.make_world(common.Settings(**{**TINY, "n": 4, "prompts": 2, "response": "3-6"}))


def gradients(world):
    found = [p.grad.clone() for p in world.model.parameters()]
    world.free()
    return found


# --- the lines --------------------------------------------------------------------------------

CASES = [(step, ["step"] * 4 + ["logps"] * 3, [*step.WAYS, *step.WAYS[1:]], {}),
         (scoring, ["reference"] * 3 + ["reward"] * 3, scoring.WAYS * 2, {}),
         (sampling, ["sampling"] * 4, sampling.WAYS, dict(kind=sampling.SamplingSettings)),
         (memory, ["memory"], ["shared"], dict(ways=["shared"])),
         (sft, ["sft"] * 5, sft.WAYS, dict(kind=training.TrainingSettings, **{**ROWS, "n": 1})),
         (reward, ["reward"] * 3, reward.WAYS, dict(kind=reward.PairSettings, **ROWS))]
if not os.environ.get("VCB_MATRIX"): CASES = CASES[:4] # the peers' trainings: make test-matrix


@pytest.mark.slow
@pytest.mark.parametrize("module, benches, ways, settings", CASES, ids=lambda v: getattr(
    v, "__name__", None))
def test_lines_are_whole(module, benches, ways, settings, tmp_path):
    "Keeps out a figure without its setting, and a way that is silently left out."
    rows = lines(module, tmp_path, **settings)
    assert [row["bench"] for row in rows] == benches
    assert [row["way"] for row in rows] == list(ways)
    for row in rows:
        assert KEYS <= set(row)
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["peak_mb"] is None or row["peak_mb"] >= 0
        assert row["share_of_peak"] is None or 0 < row["share_of_peak"] < 1
        if row["way"] == "naive": assert row["speedup_vs_naive"] == pytest.approx(1)
        if row["way"] == "trl": assert row["speedup_vs_trl"] == 1


@pytest.mark.slow
def test_sampling_tries_every_size(tmp_path):
    "Keeps out a slope fitted to one way's seconds and another one's sizes."
    rows = lines(sampling, tmp_path, sampling.SamplingSettings, ways=["generate", "shared"],
                 points=["n=1,2,3", "prompt=4,8"])
    points = [row for row in rows if row["bench"] == "sampling"]
    assert [(row["axis"], row["value"], row["way"]) for row in points] == [
        (axis, value, way) for axis, value in [("n", 1), ("n", 2), ("n", 3), ("prompt", 4),
                                               ("prompt", 8)] for way in ("generate", "shared")]
    assert all(row[row["axis"]] == row["value"] for row in points)
    assert all(0 < row["share_of_products"] < 1 for row in points)
    for row, other in zip(points[::2], points[1::2]):
        assert row["speedup_vs_generate"] == 1
        assert other["speedup_vs_generate"] == pytest.approx(
            other["tokens_per_second"] / row["tokens_per_second"])
    fits = [row for row in rows if row["bench"] == "sampling_fit"]
    assert [(row["axis"], row["way"]) for row in fits] == [("n", "generate"), ("n", "shared")]


@pytest.mark.slow
def test_scaling_tries_every_size(tmp_path):
    "Keeps out a size measured with another one's model or data, and a figure without it."
    rows = lines(scaling, tmp_path, scaling.ScalingSettings,
                 points=["n=1,2,3", "prompt=8", "response=5", "vocab=330"])
    points = [row for row in rows if row["bench"] == "scaling"]
    assert [row[row["axis"]] for row in points] == [
        str(row["value"]) if row["axis"] == "response" else row["value"] for row in points]
    assert len(points) == 6 * 3 and all(KEYS <= set(row) for row in rows)
    assert all(row["unique_tokens"] == row["prompt"] + row["n"] * int(row["response"])
               for row in points)
    assert [row["way"] for row in rows if row["bench"] == "scaling_fit"] == [
        way for way in scaling.WAYS for _ in range(2)]
    fig = plot.figure(plot.read(tmp_path/"results"/"lines.jsonl"))
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes) and len(fig.axes) == 10
    assert all(len(ax.lines) == 3 for ax in fig.axes[:4]) and len(fig.axes[4].lines) == 2


# --- like with like -----------------------------------------------------------------------------

def test_trl_gets_the_same_tokens_and_log_probs(world):
    "Keeps out a peer that is fast because it reads other, fewer or truncated tokens."
    trainer = step.trl_trainer(world)
    loss = step.trainer_step(trainer)()
    world.free()
    assert loss == pytest.approx(torch.tensor(2.).log().item(), abs=1e-6)
    data = trainer.train_dataset
    fed = [(row["prompt_ids"], row[name]) for row in data
           for name in ("chosen_ids", "rejected_ids")]
    ours = [(p, c) for p, cs in zip(world.prompt_ids, world.completion_ids) for c in cs]
    assert sorted(fed) == sorted(ours)
    with torch.no_grad():
        logps = candidate_logps(world.model, world.prompt_ids, world.completion_ids, way="rows")
    pairs = torch.stack([logps, torch.tensor(world.rewards)]).view(2, -1, 2)
    best = pairs[1].argmax(1, keepdim=True)
    for name, place in (("chosen", best), ("rejected", 1 - best)):
        theirs, = trainer._metrics["train"][f"logps/{name}"]
        assert theirs == pytest.approx(pairs[0].gather(1, place).mean().item(), abs=1e-4)


def test_every_way_takes_the_same_step(world):
    "Keeps out a way that computes another loss, another gradient, or none."
    losses, grads = zip(*((step.step_call(world, way)(), gradients(world))
                          for way in ("naive", "rows", "shared")))
    assert losses[0] == pytest.approx(2, abs=1e-4) and max(losses) - min(losses) < 1e-4
    assert max(g.abs().max() for g in grads[0]) > 1e-2
    for other in grads[1:]: torch.testing.assert_close(other, grads[0], rtol=1e-3, atol=1e-4)


def test_twins_share_weights_and_nothing_else(world):
    "Keeps out TRL's changes to a model from the others, and a second copy of the weights."
    a, b = world.twin(), world.twin()
    a.forward = a.config.note = None
    assert "forward" not in vars(b) and not hasattr(b.config, "note")
    assert all(x is y for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_the_needed_operations_are_those_of_a_profile(arch, lora, tiny_tokenizer, monkeypatch):
    """Oracle: torch counts exactly what the formula says, where hidden pairs are counted too, but
    not what fills a stack of short pieces."""
    monkeypatch.setattr(packing, "SHORT", 0)
    model = new_policy(tiny_tokenizer, arch, hidden_size=64, num_hidden_layers=2)
    model.enable_input_require_grads() # else LoRA's first layer saves a product
    model = add_lora(model, lora).train()
    prompts, responses = [[5, 6, 7, 8], [9] * 6], [[[4, 5, 0], [7, 0]], [[3] * 5, [6, 6, 0]]]
    in_place = {torch.ops.aten.addmm_: # torch leaves it out
                lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):
        candidate_logps(model, prompts, responses, way="shared").sum().backward()
    needed = needed_flops(model, prompts, responses, dense=True)
    assert counter.get_total_flops() == needed
    assert needed_flops(model, prompts, responses) < needed


# --- a whole run ----------------------------------------------------------------------------------

def test_the_time_of_a_stage_is_that_of_all_its_jobs(tmp_path, capsys):
    for job, stage, taken in (("sft", "sft", 2.),
                              ("calibrate/vcb", "calibrate/vcb", 3.),
                              ("calibrate/dpo", "calibrate/dpo", 4.),
                              ("tokenizer", "tokenizer", 1.),
                              ("sample_validation", "sample_validation", .5)):
        write_json(tmp_path/"demo"/job/"manifest.json", {"stage": stage, "seconds": taken})
    pipeline.main([str(tmp_path/"demo"), "--label", "before"])
    row = json.loads(capsys.readouterr().out)
    assert list(row["seconds"].items()) == [("tokenizer", 1.), ("sft", 2.), ("sample", .5),
                                            ("calibrate", 7.)]
    assert (row["run"], row["label"], row["total"]) == ("demo", "before", 10.5)
    bars = pipeline.figure([row, {**row, "label": "after"}]).axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(21.)


# --- attention alone ------------------------------------------------------------------------------

@pytest.fixture
def packed():
    "A layout of two prompts with uneven responses, and its query, key and value in float64."
    s = common.Settings(**{**TINY, "n": 4, "prompts": 2, "response": "1-5", "dtype": "float64"})
    layout = attention.make_layout(s)
    return layout, [x.detach() for x in attention.make_inputs(s, layout.input_ids.shape[1])]


def test_flex_attention_is_the_librarys(packed):
    layout, inputs = packed
    found, wanted = attention.flex(layout)(*inputs), attention.pieces(layout, *inputs)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_sequences_of_flash_attention_are_the_librarys(packed):
    "Flash attention needs a GPU; here each sequence goes through SDPA, aligned at its end."
    layout, (query, key, value) = packed
    (places, *ends), found = attention.sequences(layout), []
    for (q, q_end), (k, k_end) in zip(*(zip(end, end[1:]) for end in ends)):
        keys, values = (x[:, :, places[k:k_end]] for x in (key, value))
        sees = torch.ones(q_end - q, k_end - k, dtype=torch.bool).tril(k_end - k - q_end + q)
        found.append(F.scaled_dot_product_attention(query[:, :, q:q_end], keys, values, sees))
    wanted = attention.pieces(layout, query, key, value).transpose(1, 2)
    torch.testing.assert_close(torch.cat(found, 2), wanted, atol=1e-12, rtol=0)


def test_the_script_for_gpus_runs(tmp_path):
    "At toy sizes on this machine: every part succeeds and leaves its lines."
    root = Path(common.__file__).parent.parent
    env = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "PARTS": "attention",
           "PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "benchmarks/gpu.sh", tmp_path], cwd=root, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "0 of the parts failed" in done.stdout, done.stdout
    assert json.loads((tmp_path/"attention.jsonl").read_text().splitlines()[0])["way"] == "pieces"


# --- SFT and rewards ------------------------------------------------------------------------------

def test_trl_fine_tunes_the_same_rows():
    "Keeps out a peer that reads other tokens: one loss and one gradient for every way."
    world = training.make_rows(training.TrainingSettings(**{**ROWS, "n": 1}))
    ours = [p + c for p, cs in zip(world.prompt_ids, world.completion_ids) for c in cs]
    data = sft.trl_trainer(world).train_dataset
    assert sorted(data["input_ids"]) == sorted(ours)
    assert sum(x != -100 for row in data["labels"] for x in row) == sum(
        len(c) for cs in world.completion_ids for c in cs)
    losses, grads = zip(*((sft.step_call(world, way)(), gradients(world)) for way in sft.WAYS))
    assert max(losses) - min(losses) < 1e-5
    for other in grads[1:]: torch.testing.assert_close(other, grads[0], rtol=1e-3, atol=1e-5)


def test_trl_trains_rewards_on_the_same_pairs():
    world = training.make_rows(reward.PairSettings(**ROWS))
    world.model = scoring.reward_model(world).train()
    losses, grads = zip(*((reward.step_call(world, way)(), gradients(world))
                          for way in reward.WAYS))
    assert max(losses) - min(losses) < 1e-5
    for other in grads[1:]: torch.testing.assert_close(other, grads[0], rtol=1e-3, atol=1e-5)


def test_the_products_of_a_step_are_those_of_the_count():
    "Oracle: the formula that a profile has confirmed, but for its exact triangles of attention."
    world = training.make_rows(training.TrainingSettings(**{**ROWS, "n": 1, "response": "4"}))
    targets = sum(len(c) for cs in world.completion_ids for c in cs)
    tokens = sum(map(len, world.prompt_ids)) + targets - 3
    shapes = training.needed_products(world, tokens, targets)
    one = next(shape for shape in shapes if shape[0] > 1)
    linear = sum(6 * b * m * k * n * count for (b, m, k, n), count in shapes.items() if b == 1)
    needed = step.needed_flops(world.model, world.prompt_ids, world.completion_ids)
    squares = 6 * one[0] * one[1]**2 * one[2] * shapes[one]
    assert linear < needed and needed - linear == pytest.approx(squares, rel=.25)


# --- sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_products_are_those_of_the_model(arch):
    "Oracle: torch's own count of a forward pass without attention, on as many rows."
    s = sampling.SamplingSettings(**{**TINY, "arch": arch, "prompts": 3, "prompt": 5})
    world = common.make_world(s, references=False)
    calls, rows = sampling.product_calls(world)
    assert rows == dict(read=15, step=6)
    head = world.model.get_output_embeddings().weight.numel()
    for name, call in calls.items():
        with FlopCounterMode(display=False, custom_mapping={
                torch.ops.mkldnn._linear_pointwise: # torch leaves it out
                lambda x, weight, *_, **__: 2 * x[0] * weight[0] * weight[1]}) as counter: call()
        want = 2 * rows[name] * (trunk_weights(world.model) + head * (name == "step"))
        assert counter.get_total_flops() == want


def test_the_shape_of_smollm2():
    "Its 134,515,008 weights."
    s = common.Settings(**{**TINY, "arch": "smollm2-135m"})
    model = common.make_model(s, common.word_tokenizer(s.vocab))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.num_key_value_heads == 3 and s.heads == 9


# --- clock and memory -----------------------------------------------------------------------------

def test_rounds_alternate():
    "Keeps out blocks of one way, which drift would favour, and a first run that is timed."
    order, freed = [], []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = common.alternate(calls, common.Settings(**{**TINY, "rounds": 3}),
                             lambda: freed.append(1))
    assert {name: len(taken) for name, taken in times.items()} == dict(a=3, b=3, c=3)
    assert "".join(order)[3:] == "abcbcacab" and len(freed) == 12


def test_peak_counts_what_is_given_back_before_the_end():
    "Keeps out a peak read after the fact, and one that memory kept by the allocator hides."
    s, pins = common.Settings(**TINY), []
    def call(): # 64 MB of small blocks; what is pinned on top keeps the heap from shrinking
        blocks = [torch.ones(16_000) for _ in range(1000)]
        pins.append(torch.ones(10))
        blocks.clear()
    if common.peak_growth(call, s) is None: pytest.skip("this system has no resettable peak")
    for _ in range(2): assert 63 < common.peak_growth(call, s) < 80


def test_malloc_settings_reach_the_allocator(tmp_path, monkeypatch):
    "Keeps out a 'tuned' that changes nothing: a large block is not fetched from the system again."
    if not common.platform.libc_ver()[0] == "glibc": pytest.skip("the settings are glibc's")
    (tmp_path/"probe.py").write_text(
        "import ctypes, os, resource\n"
        "c, size = ctypes.CDLL(None), ctypes.c_size_t(80 << 20)\n"
        "c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(2):\n"
        "    before, block = faults(), c.malloc(size)\n"
        "    c.memset(block, 1, size); c.free(block)\n"
        "open('faults', 'a').write(f'{faults() - before}\\n')\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in common.TUNED: monkeypatch.delenv(name, raising=False)
    common.run("probe", None, args=["--malloc", "both"])
    default, tuned = map(int, (tmp_path/"faults").read_text("utf-8").split())
    assert default > 10 * (tuned + 1)


def test_a_straight_line_is_found():
    "Oracle: 2 + 3x, with R² 1; two sizes only are no fit."
    rows = [{"unique_tokens": x, "seconds": 2 + 3 * x} for x in (1, 2, 5)]
    found = scaling.fit(rows, "unique_tokens")
    assert [found[k] for k in ("slope", "intercept", "r2")] == pytest.approx([3, 2, 1])
    assert scaling.fit(rows[:2], "unique_tokens") is None


@pytest.mark.parametrize("settings, message", [
    (dict(response="9-3"), "response is '9-3'. Give a length"), (dict(n=0), "n is 0. Set it to 1"),
    (dict(response="long"), "response is 'long'. Give a length")])
def test_a_shape_that_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message): common.Settings(**{**TINY, **settings})


def test_wrong_words_on_the_command_line(capsys):
    "Keeps out a way that is misspelt and so not measured."
    with pytest.raises(SystemExit, match="ways has 'shard'. .*shared"):
        common.run("benchmarks.step", lambda s: s.chosen(step.WAYS), args=["--ways", "shard"])
    odd = common.Settings(**{**TINY, "n": 3})
    with pytest.raises(InputError, match="n is 3, and TRL takes pairs"):
        step.pairs_of_texts(common.World(odd, *[None] * 7))


def test_uneven_lengths_have_the_mean_of_their_span():
    s = common.Settings(arch="pythia-160m", response="64-128")
    assert (s.layers, s.hidden, s.heads, s.vocab) == (12, 768, 12, 50304)
    assert (min(s.lengths()), max(s.lengths()), statistics.fmean(s.lengths())) == (64, 128, 96)


def test_the_pages_show_the_stored_results():
    "README and lesson say what was measured, to the digit."
    pages = {page: "".join("".join(cell["source"]) for cell in json.loads(
        (tables.RESULTS.parents[1]/"nbs"/page).read_text("utf-8"))["cells"])
        for page in ("index.ipynb", "foundations/14_packing.ipynb",
                     "foundations/16_decoding.ipynb")}
    readme, packing, decoding = pages.values()
    for text in (readme, packing):
        assert tables.headline() in text and tables.stages() in text
    for table in (tables.others(), tables.growth()): assert table in packing
    for table in (tables.sampling(), tables.sampling_growth()): assert table in decoding


def test_a_failure_of_vllm_loses_nothing(capsys):
    "What has been measured is told, and why vLLM is missing."
    s = sampling.SamplingSettings(layers=1, hidden=16, vocab=40, prompt=4, response="3", n=2,
                                  rounds=1, ways=["shared"], vllm_python=sys.executable)
    assert [line["way"] for line in sampling.measure_ways(s)] == ["shared"]
    assert "No module named 'vllm'" in capsys.readouterr().err
