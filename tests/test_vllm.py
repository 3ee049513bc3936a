"""The real vLLM: `make test-vllm` runs this in an environment of its own, on a CPU."""
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from tiny_models import make_tokenizer
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.data import load_candidates
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import score_logps
from vcb_nb.models import new_policy
from vcb_nb.sample import SampleConfig, load_vllm, sample, sample_candidates, vllm_candidates
from vcb_nb.saving import save_model

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
PROMPTS = ["Where?", "When was it, and who saw it?", "Why?"]


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer("<|padding|>", pad_token="<|padding|>")


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    "A small Llama whose distribution is uneven."
    torch.manual_seed(0)
    model = new_policy(tokenizer, "llama", hidden_size=128, intermediate_size=128,
                       num_hidden_layers=2, num_attention_heads=2, initializer_range=.15,
                       tie_word_embeddings=False)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("vllm")/"policy")


@pytest.fixture(scope="module")
def ids(tokenizer): return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine(policy): return load_vllm(policy, length=64)


def test_samples_end_where_the_model_ends(engine, tokenizer, ids):
    "Ids as drawn, an end told by the last id, no padding; the same again from the same seeds."
    draw = lambda: vllm_candidates(engine, tokenizer, ids, 40, max_new_tokens=12, temperature=1.)
    drawn, eos = draw(), tokenizer.eos_token_id
    assert drawn.completion_ids == draw().completion_ids
    for completions, reasons in zip(drawn.completion_ids, drawn.finish_reasons):
        for own, reason in zip(completions, reasons):
            assert tokenizer.pad_token_id not in own and eos not in own[:-1]
            assert (reason == "stop") == (own[-1] == eos) and (reason == "stop" or len(own) == 12)


@pytest.mark.parametrize("sampling", [dict(temperature=1.), dict(temperature=.6, top_p=.9),
                                      dict(temperature=1.5, top_k=20)])
def test_log_probs_are_ours(engine, policy, tokenizer, ids, sampling):
    "Those of the model itself, at temperature 1, whatever the samples were drawn by."
    drawn = vllm_candidates(engine, tokenizer, ids, 8, max_new_tokens=12, **sampling)
    again = score_logps(load_policy(policy, device="cpu"), ids, drawn.completion_ids)
    torch.testing.assert_close(torch.tensor(drawn.sample_logps), torch.tensor(again), atol=2e-3,
                               rtol=0)


def test_greedy_samples_are_ours(engine, policy, tokenizer, ids):
    options = dict(max_new_tokens=16, temperature=0.)
    theirs = vllm_candidates(engine, tokenizer, ids, 1, **options)
    ours = sample_candidates(load_policy(policy, device="cpu"), tokenizer, ids, 1, **options)
    assert theirs.completion_ids == ours.completion_ids


def test_the_distribution_is_ours(engine, policy, tokenizer, ids):
    "Chi-square of first tokens against the model's probabilities: at most 4 σ above its mean."
    n = 3000
    drawn = vllm_candidates(engine, tokenizer, ids[:1], n, max_new_tokens=1, temperature=1.)
    model = load_policy(policy, device="cpu").eval()
    with torch.no_grad(): logits = model(torch.tensor(ids[:1])).logits[0, -1].double()
    logits[tokenizer.pad_token_id] = -torch.inf
    expected = n * logits.softmax(-1)
    counts = torch.bincount(torch.tensor(drawn.completion_ids[0])[:, 0], minlength=len(expected))
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    chi2, degrees = ((observed - wanted)**2 / wanted).sum(), len(wanted) - 1
    assert degrees > 10 and chi2 < degrees + 4 * (2 * degrees)**.5


# ---- the stage

@pytest.fixture
def config(policy, tmp_path):
    prompts = write_jsonl(tmp_path/"p.jsonl", [{"prompt": p} for p in PROMPTS])
    return SampleConfig(policy=str(policy), prompts=str(prompts), n=3, max_new_tokens=8,
                        shard_size=2, backend="vllm", output_dir=str(tmp_path/"out"))


def test_the_command(config):
    done = subprocess.run([sys.executable, "-m", "vcb_nb", "sample", "--backend", "vllm",
                           "--policy", config.policy, "--prompts", config.prompts, "--n", "3",
                           "--max_new_tokens", "8", "--output_dir", config.output_dir],
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_candidates(config.output_dir)["prompt"][:] == PROMPTS


def test_a_run_resumes_and_two_processes_give_the_same(config, tmp_path, monkeypatch):
    "Pitfall 26: a run that was cut off, or two ranks, leave what one run leaves."
    sample(config)
    rows = load_candidates(config.output_dir).to_list()
    (tmp_path/"out"/"data"/"part-00001-of-00002.jsonl").unlink()
    sample(config)
    assert load_candidates(config.output_dir).to_list() == rows
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        sample(replace(config, output_dir=str(tmp_path/"two")))
    assert load_candidates(tmp_path/"two").to_list() == rows


def test_a_lora_policy_is_merged_or_refused(config, policy, tokenizer, tmp_path):
    "A folder with merged weights is sampled; an adapter alone is refused before vLLM starts."
    model = add_lora(load_policy(policy, device="cpu"), {"r": 2, "init_lora_weights": False})
    adapter = save_model(model, tokenizer, tmp_path/"adapter", merge=False)
    with pytest.raises(InputError, match="adapter"): sample(replace(config, policy=str(adapter)))
    merged = save_model(model, tokenizer, tmp_path/"merged")
    assert sample(replace(config, policy=str(merged)))["samples"] == 3 * len(PROMPTS)
