"""What a GPU computes, against the CPU. Skipped without one; `VCB_DEVICE=cpu` tries the tests
themselves, with the CPU in the GPU's place."""
import copy, os

import pytest, torch

from tiny_models import make_tokenizer, tiny
from vcb_nb.artifacts import write_jsonl
from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.judges import reward_scores
from vcb_nb.loading import load_policy, new_reward_model
from vcb_nb.logprobs import candidate_logps, score_logps
from vcb_nb.sample import sample_candidates
from vcb_nb.saving import save_model

DEVICE = os.environ.get("VCB_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="needs a GPU")
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
COMPLETIONS = [[[20, 21, 0], [30], [40, 41, 42, 43, 44, 0]], [[50, 51], [60, 0], [70, 71, 72]]]
REWARDS = [[0., 1., 2.], [1., -1., .5]]


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer("<|padding|>", pad_token="<|padding|>")


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "qwen2"])
def folder(request, tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    model = tiny(tokenizer, request.param, initializer_range=.2)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("gpu")/request.param)


def logps_and_gradients(model, **options):
    logps = candidate_logps(model, PROMPTS, COMPLETIONS, **options)
    weights = [p for p in model.parameters() if p.requires_grad]
    return logps.detach(), torch.autograd.grad(logps.square().sum(), weights)


@pytest.mark.parametrize("way", ["shared", "rows"])
def test_log_probs_and_gradients(folder, way):
    "In fp32 as on the CPU in float64, to rounding."
    expected, wanted = logps_and_gradients(load_policy(folder, device="cpu").double(), way="rows")
    found, gradients = logps_and_gradients(load_policy(folder, device=DEVICE), way=way)
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-4, rtol=1e-5)
    for gradient, want in zip(gradients, wanted):
        assert (gradient.double().cpu() - want).norm() <= 1e-4 * want.norm() + 1e-6


def test_log_probs_under_autocast(folder):
    "In bf16 a token's log-prob keeps about two digits, and both ways lose alike."
    exact = torch.tensor(score_logps(load_policy(folder, device="cpu").double(), PROMPTS,
                                     COMPLETIONS))
    model = load_policy(folder, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for way in ("shared", "rows"):
            found = torch.tensor(score_logps(model, PROMPTS, COMPLETIONS, way=way))
            assert ((found - exact).abs() < .02 * exact.abs() + .02).all()


def test_rewards(folder, tokenizer):
    models = [new_reward_model(folder, tokenizer, device=device, seed=0)
              for device in ("cpu", DEVICE)]
    scores = [torch.tensor(reward_scores(model, PROMPTS, COMPLETIONS)) for model in models]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n, temperature", [(1, 0.), (4, 1.)])
def test_samples(folder, tokenizer, n, temperature):
    "The same numbers draw the same tokens, and their log-probs are the model's."
    drawn = [sample_candidates(load_policy(folder, device=device), tokenizer, PROMPTS, n,
                               max_new_tokens=12, temperature=temperature)
             for device in ("cpu", DEVICE)]
    assert drawn[0].completion_ids == drawn[1].completion_ids
    again = score_logps(load_policy(folder, device=DEVICE), PROMPTS, drawn[1].completion_ids)
    torch.testing.assert_close(torch.tensor(drawn[1].sample_logps), torch.tensor(again),
                               atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("peft", [None, {"r": 4}], ids=["full", "LoRA"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_calibration(folder, tokenizer, tmp_path, peft, checkpointing):
    "Two steps of the stage itself move the weights as on the CPU."
    rows = [dict(prompt=tokenizer.decode(prompt), completions=tokenizer.batch_decode(ids),
                 prompt_ids=prompt, completion_ids=ids, rewards=rewards, ref_logps=logps)
            for prompt, ids, rewards, logps in zip(PROMPTS, COMPLETIONS, REWARDS, score_logps(
                load_policy(folder, device="cpu"), PROMPTS, COMPLETIONS))]
    write_jsonl(tmp_path/"rows.jsonl", rows)
    found = []
    for cpu in {True, DEVICE == "cpu"}:
        out = tmp_path/f"cpu-{cpu}"
        calibrate(CalibrationConfig(
            model=str(folder), candidates=str(tmp_path/"rows.jsonl"), output_dir=str(out),
            max_steps=2, learning_rate=.1, optim="sgd", use_cpu=cpu, report_to="none",
            gradient_checkpointing=checkpointing, peft_config=copy.deepcopy(peft)))
        found.append(load_policy(out/"model", device="cpu"))
    start = load_policy(folder, device="cpu")
    for name, weight in start.named_parameters():
        moved = [dict(model.named_parameters())[name] - weight for model in found]
        torch.testing.assert_close(moved[0], moved[-1], atol=1e-4, rtol=1e-3)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[0].parameters(),
                                                          start.parameters()))
