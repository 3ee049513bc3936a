"""Calibration: what reaches the loss, how it is averaged, what is refused; on real tiny models."""

import copy
import gzip
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2TokenizerFast

from vcb_nb import calibrate as stage, logprobs, packing
from vcb_nb.adapters import add_lora
from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer, calibrate
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import score_logps
from vcb_nb.losses import LOSSES, preference_loss
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model
from vcb_nb.tokenizers import separate_padding
from vcb_nb.training import read_curve

close = torch.testing.assert_close
PLAIN = dict(rtol=1e-4, atol=1e-5)  # float32, another order of summation


def tiny_model(tokenizer, seed=0):
    return new_policy(
        tokenizer,
        seed=seed,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )


def make_rows(model, prompts=8, n=4, seed=0, ragged=False):
    "Scored candidates: random ids and rewards, reference log-probs of `model`."
    rng = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=rng))

    def tokens(most):
        return [number(2, 250) for _ in range(number(1, most))]

    rows = []
    for p in range(prompts):
        count = n - (p % 3 if ragged else 0)
        rows.append(
            dict(
                prompt=f"prompt {p}",
                prompt_ids=tokens(6),
                completions=[f"c{i}" for i in range(count)],
                completion_ids=[tokens(7) + [0] for _ in range(count)],
                rewards=torch.randn(count, generator=rng).tolist(),
            )
        )
    logps = score_logps(model, [r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows])
    return [{**row, "ref_logps": ref} for row, ref in zip(rows, logps)]


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return tiny_model(tiny_tokenizer)


@pytest.fixture(scope="module")
def rows(model):
    return make_rows(model, ragged=True)


@pytest.fixture(scope="module")
def sft(tmp_path_factory, model, tiny_tokenizer):
    return save_model(model, tiny_tokenizer, tmp_path_factory.mktemp("sft") / "model")


@pytest.fixture
def trainer_of(tmp_path, model, tiny_tokenizer):
    "A trainer of a copy of the tiny model on given rows."

    def make(rows, policy=None, eval_rows=None, reference_model=None, callbacks=None, **settings):
        defaults = dict(
            max_steps=1,
            per_device_train_batch_size=len(rows),
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-3,
            max_grad_norm=1e9,
            use_cpu=True,
            disable_tqdm=True,
        )
        args = CalibrationConfig(str(tmp_path), **{**defaults, **settings})
        eval_rows = Dataset.from_list(eval_rows) if eval_rows else None
        return CalibrationTrainer(
            policy or copy.deepcopy(model),
            args,
            Dataset.from_list(rows),
            eval_rows,
            tiny_tokenizer,
            reference=reference_model,
            callbacks=callbacks,
        )

    return make


def history(trainer, key="loss"):
    trainer.train()
    return [row[key] for row in trainer.state.log_history if "loss" in row]


def without(row, *names):
    return {k: v for k, v in row.items() if k not in names}


# What reaches the loss ------------------------------------------------------------


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_step_zero_is_two(trainer_of, rows, reference):
    "Pitfall 7: with dropout off and the same reference, VCB starts at 2 and R² at 0, whatever γ."
    trainer = trainer_of(rows, eval_rows=rows, reference=reference, loss_params={"gamma": 0.3})
    before = trainer.evaluate()
    assert history(trainer) == pytest.approx([2.0], abs=1e-6)
    assert history(trainer_of(rows, reference=reference), "calibration/r2") == pytest.approx(
        [0.0], abs=1e-6
    )
    assert before["eval_loss"] == pytest.approx(2.0, abs=1e-6)
    if reference == "live":
        assert before["eval_calibration/r2"] == 0.0


def test_dropout_is_off(trainer_of, tiny_tokenizer, rows):
    "Pitfall 7: a model that comes with dropout still starts at log-ratio 0."
    policy = new_policy(tiny_tokenizer, "gpt2", n_embd=32, n_layer=2, n_head=2)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer = trainer_of(rows, policy, reference="live")
    assert history(trainer) == pytest.approx([2.0], abs=1e-6)


def test_perturbed_reference_moves_the_loss(trainer_of, rows):
    "Pitfall 9: the stored column is what is used."
    moved = copy.deepcopy(rows)
    for row in moved:
        row["ref_logps"][0] += 1.0
    assert abs(history(trainer_of(moved))[0] - history(trainer_of(rows))[0]) > 0.01


def test_stale_reference_is_noticed(trainer_of, rows, model, caplog):
    "Pitfall 11: stored log-probs of another model are reported once, those of the right one never."
    other = [{**row, "ref_logps": [v - 3.0 for v in row["ref_logps"]]} for row in rows]
    with caplog.at_level(logging.WARNING, "vcb_nb"):
        trainer_of(rows).train()
        assert "ref_logps" not in caplog.text
        trainer_of(other, max_steps=3, per_device_train_batch_size=2).train()
    assert caplog.text.count("The stored ref_logps differ") == 1


@pytest.mark.parametrize("missing", ["rewards", "ref_logps"])
def test_missing_column(trainer_of, rows, missing):
    with pytest.raises(InputError, match=f"no column '{missing}'.*(vcb score)"):
        trainer_of([without(row, missing) for row in rows])


def test_late_evaluation_never_computes_a_reference(trainer_of, rows):
    "Pitfall 10: rows without ref_logps are refused, not scored with the trained policy."
    trainer = trainer_of(rows)
    trainer.train()
    with pytest.raises(InputError, match="no column 'ref_logps'"):
        trainer.evaluate(Dataset.from_list([without(row, "ref_logps") for row in rows]))


def test_live_reference_of_a_trained_adapter_is_refused(trainer_of, rows, model):
    "Pitfall 10: a trained adapter, switched off, is not the policy that training starts from."
    policy = add_lora(copy.deepcopy(model), {"r": 2})
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(p, 0.1)
    with pytest.raises(InputError, match="already trained"):
        trainer_of(rows, policy, reference="live")


def test_live_reference_stays_frozen(trainer_of, rows, model):
    "Pitfall 10: after training, the live reference still gives the log-probs of the start."
    trainer = trainer_of(rows, eval_rows=rows, reference="live", max_steps=3)
    trainer.train()
    live = trainer.evaluate()
    stored = trainer_of(rows, policy=trainer.model, eval_rows=rows).evaluate()
    assert live["eval_logratios/std"] > 1e-3
    assert live["eval_loss"] == pytest.approx(stored["eval_loss"], rel=1e-4)


def test_reference_model_needs_live(trainer_of, rows, model):
    with pytest.raises(InputError, match="reference='live'"):
        trainer_of(rows, reference_model=copy.deepcopy(model))


def test_rewards_reach_the_loss(trainer_of, rows):
    "Pitfall 15: no column is dropped on its way; other rewards give other gradients."
    turned = [{**row, "rewards": [-r for r in row["rewards"]]} for row in rows]
    with pytest.raises(InputError, match="remove_unused_columns"):
        trainer_of(rows, remove_unused_columns=True)
    trainer = trainer_of(rows)
    first, second = history(trainer, "scores/mean"), history(trainer_of(turned), "scores/mean")
    assert first[0] == pytest.approx(-second[0]) and first[0] != 0
    assert not torch.equal(*(next(t.model.parameters()) for t in (trainer, trainer_of(turned))))


def test_no_pair_across_prompts(trainer_of, rows):
    "Pitfall 18: adding a constant to one prompt's rewards changes nothing."
    shifted = copy.deepcopy(rows)
    shifted[0]["rewards"] = [r + 100.0 for r in shifted[0]["rewards"]]
    runs = [
        history(trainer_of(r, max_steps=3, loss_params={"gamma": 0.5})) for r in (rows, shifted)
    ]
    close(*map(torch.tensor, runs), rtol=1e-3, atol=1e-4)


def test_every_loss_differs_and_trains(trainer_of, rows, model):
    "Pitfall 17: the loss's name reaches the loss, so no two methods leave the same weights."
    ends = {}
    for name in LOSSES:
        trainer = trainer_of(rows, loss=name, optim="sgd", learning_rate=1e-2)
        trainer.train()
        ends[name] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    moves = {name: end - start for name, end in ends.items()}
    for a in moves:
        assert moves[a].norm() > 1e-6, a
        for b in moves:
            if a < b:
                assert not torch.allclose(moves[a], moves[b], rtol=1e-3, atol=0), (a, b)


@pytest.mark.parametrize("loss, param", [(name, p) for name in LOSSES for p in LOSSES[name].params])
def test_every_parameter_reaches_its_loss(trainer_of, rows, model, loss, param):
    "Pitfall 17: a changed hyper-parameter changes the loss away from the reference."
    moved = [
        {**row, "ref_logps": [v + 0.7 * i for i, v in enumerate(row["ref_logps"])]} for row in rows
    ]
    default = LOSSES[loss].params[param]
    value = not default if isinstance(default, bool) else default + 0.5
    losses = [
        trainer_of(rows, eval_rows=moved, loss=loss, loss_params=p).evaluate()["eval_loss"]
        for p in ({}, {param: value})
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_eval_loss_is_the_registered_function(trainer_of, rows, model, tiny_tokenizer):
    "Oracle: ragged rows through the trainer ≡ the loss called prompt by prompt on `score_logps`."
    policy = tiny_model(tiny_tokenizer, seed=1)
    logps = score_logps(
        policy, [r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows]
    )
    for name in ("vcb", "vcb_lse", "rrhf", "dpo"):
        found = trainer_of(rows, policy, rows, loss=name, per_device_eval_batch_size=3).evaluate()
        want = [
            preference_loss(
                name,
                *(
                    torch.tensor([v], dtype=torch.float64)
                    for v in (lp, row["ref_logps"], row["rewards"])
                ),
                lengths=torch.tensor([[len(c) for c in row["completion_ids"]]]),
            ).item()
            for lp, row in zip(logps, rows)
        ]
        assert found["eval_loss"] == pytest.approx(sum(want) / len(want), rel=1e-4)


def test_scaled_rewards(trainer_of, rows, tiny_tokenizer):
    "Identity 11: RPO-sq with β=γ and rewards over σ is VCB."
    policy = tiny_model(tiny_tokenizer, seed=1)
    vcb = trainer_of(rows, policy, rows, loss_params={"gamma": 0.5}).evaluate()["eval_loss"]
    rpo = trainer_of(
        rows, policy, rows, loss="rpo_sq", loss_params={"beta": 0.5}, scale_rewards=True
    ).evaluate()["eval_loss"]
    raw = trainer_of(rows, policy, rows, loss="rpo_sq", loss_params={"beta": 0.5}).evaluate()[
        "eval_loss"
    ]
    assert vcb == pytest.approx(rpo, rel=1e-5) and vcb != pytest.approx(raw, rel=1e-2)


# Averages ------------------------------------------------------------


def test_accumulation_is_exact(trainer_of, rows):
    "Pitfall 14: one batch of 8 ≡ 8 of 1 ≡ 3, 3 and 2: loss, gradient norm, weights."

    def run(size, steps):
        trainer = trainer_of(
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            max_steps=-1,
            optim="sgd",
        )
        return history(trainer), history(trainer, "grad_norm")[:2], list(trainer.model.parameters())

    whole, single, uneven = run(8, 1), run(1, 8), run(3, 3)
    for other in (single, uneven):
        close(torch.tensor(other[0]), torch.tensor(whole[0]), **PLAIN)
        close(torch.tensor(other[1]), torch.tensor(whole[1]), rtol=1e-3, atol=1e-4)
        close(other[2], whole[2], **PLAIN)
    assert len(whole[0]) == 2 and whole[0][1] != whole[0][0]


def test_metrics_do_not_depend_on_batches(trainer_of, rows, tiny_tokenizer):
    "One log over three steps ≡ one evaluation; batches of 1, 3 and 8 give the same figures."
    policy = tiny_model(tiny_tokenizer, seed=1)

    def evaluated(size):
        found = trainer_of(rows, policy, rows, per_device_eval_batch_size=size).evaluate()
        return {k: v for k, v in found.items() if "/" in k or k == "eval_loss"}

    whole = evaluated(8)
    for size in (1, 3):
        assert evaluated(size) == pytest.approx(whole, rel=1e-4, abs=1e-5)
    trainer = trainer_of(
        rows,
        policy,
        per_device_train_batch_size=3,
        num_train_epochs=1,
        max_steps=-1,
        logging_steps=3,
        logging_first_step=False,
        learning_rate=0.0,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {
        f"eval_{k}": logged[k] for k in ("loss", "calibration/r2", "rewards/margins", "scores/std")
    } == pytest.approx(
        {
            k: whole[k]
            for k in ("eval_loss", "eval_calibration/r2", "eval_rewards/margins", "eval_scores/std")
        },
        rel=1e-4,
    )


def test_metrics_mean_what_they_say(trainer_of, rows, tiny_tokenizer):
    "Oracle: every metric from plain loops over the rows."
    policy = tiny_model(tiny_tokenizer, seed=1)
    found = trainer_of(rows, policy, rows, loss_params={"gamma": 0.5}).evaluate()
    logps = score_logps(
        policy, [r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows]
    )
    ratios = [[a - b for a, b in zip(lp, r["ref_logps"])] for lp, r in zip(logps, rows)]
    right, gap, target, sigmas = [], [], [], []
    for ell, row in zip(ratios, rows):
        r = row["rewards"]
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if r[i] > r[j]]
        sigma = torch.tensor(r, dtype=torch.float64).std().item()
        right.append(sum(ell[i] > ell[j] for i, j in pairs) / len(pairs))
        gap.append(sum(ell[i] - ell[j] for i, j in pairs) / len(pairs))
        target.append(sum(r[i] - r[j] for i, j in pairs) / len(pairs) / (0.5 * sigma))
        sigmas.append(sigma)
    flat = torch.tensor(sum(ratios, []), dtype=torch.float64)
    mean = lambda values: sum(values) / len(values)
    want = {
        "rewards/accuracies": mean(right),
        "rewards/margins": mean(gap),
        "target/margins": mean(target),
        "scores/std": mean(sigmas),
        "logratios/mean": flat.mean().item(),
        "logratios/std": flat.std().item(),
        "calibration/r2": 1 - found["eval_loss"] / 2,
        "logps/mean": torch.tensor(sum(logps, [])).mean().item(),
    }
    assert {k: found[f"eval_{k}"] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-4)


WORKER = """
import json, os, sys, torch
torch.set_num_threads(1)
from datasets import Dataset
from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer
from vcb_nb.loading import load_policy, load_tokenizer
from vcb_nb.shards import leave_group
sft, folder, size, accumulate, reference = sys.argv[1:]
rows = [json.loads(line) for line in open(os.path.join(folder, "rows.jsonl"))]
args = CalibrationConfig(
    folder, num_train_epochs=2, per_device_train_batch_size=int(size), optim="sgd", logging_steps=1,
    per_device_eval_batch_size=int(size), gradient_accumulation_steps=int(accumulate), use_cpu=True,
    learning_rate=1e-3, max_grad_norm=1e9, save_strategy="no", disable_tqdm=True,
    eval_strategy="epoch", reference=reference)
trainer = CalibrationTrainer(load_policy(sft), args, Dataset.from_list(rows),
                             Dataset.from_list(rows[:5]), load_tokenizer(sft))
trainer.train()
if trainer.is_world_process_zero():
    weights = sum(p.double().square().sum().item() for p in trainer.model.parameters())
    print("RESULT" + json.dumps([trainer.state.log_history, weights]))
del trainer
leave_group()
"""


def run_worker(folder, processes, *args):
    script = folder / "worker.py"
    script.write_text(WORKER)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    env = {**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(script), *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, sft, rows):
    "Pitfall 16: two gloo processes with an uneven last batch ≡ one: weights and every metric."
    rows = rows[
        :7
    ]  # the second step has 3 prompts: 2 on one process, 1 and a repeat on the other
    write_jsonl(tmp_path / "rows.jsonl", rows)
    one, two = (
        run_worker(tmp_path, p, sft, tmp_path, size, 1, "live") for p, size in ((1, 4), (2, 2))
    )

    def metrics(log):
        return [
            {
                k: v
                for k, v in row.items()
                if "/" in k or k in ("loss", "eval_loss", "grad_norm", "step")
            }
            for row in log[:-1]
        ]

    assert len(one[0]) == len(two[0]) == 7  # 4 steps, 2 evaluations, the end
    for a, b in zip(metrics(one[0]), metrics(two[0])):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-5)
    assert one[1] == pytest.approx(two[1], rel=1e-6)


# LoRA ------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_starts_at_two_and_trains(trainer_of, rows, checkpointing):
    "Pitfalls 12, 13: adapter off is the SFT model; every lora_B gets a gradient."
    trainer = trainer_of(
        rows,
        reference="live",
        peft_config={"r": 4},
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True} if checkpointing else None,
        max_steps=3,
        learning_rate=1e-2,
    )
    losses = history(trainer)
    assert losses[0] == pytest.approx(2.0, abs=1e-6) and losses[-1] < 2
    lora = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert lora and all("lora_" in n for n in lora)
    assert all(p.abs().sum() > 0 for n, p in lora.items() if "lora_B" in n)


def test_lora_on_top_of_an_sft_adapter(trainer_of, rows, model):
    "Pitfall 12: an SFT adapter is merged first, so the new one switched off gives the SFT model."
    policy = add_lora(copy.deepcopy(model), {"r": 2})
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    trainer = trainer_of(rows, policy, eval_rows=rows, reference="live", peft_config={"r": 4})
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(2.0, abs=1e-6) and found["eval_logratios/std"] == 0
    base = score_logps(model, [rows[0]["prompt_ids"]], [rows[0]["completion_ids"]])[0]
    kept = score_logps(trainer.model, [rows[0]["prompt_ids"]], [rows[0]["completion_ids"]])[0]
    assert max(abs(a - b) for a, b in zip(base, kept)) > 0.1


# Rows ------------------------------------------------------------


def prepared(rows, **settings):
    return stage.prepare_candidates(
        Dataset.from_list(rows), CalibrationConfig("unused", use_cpu=True, **settings)
    )


def test_prompts_without_signal_are_dropped_and_counted(rows, tiny_tokenizer):
    "Pitfall 22, identity 9: equal rewards, also with a float residue, are dropped and counted."
    equal = {**rows[0], "rewards": [0.1 + 0.2, 0.3, 0.3, 0.3][: len(rows[0]["rewards"])]}
    single = {
        k: v[:1] if isinstance(v, list) and k != "prompt_ids" else v for k, v in rows[1].items()
    }
    kept, info = prepared([*rows, equal, single])
    assert len(kept) == len(rows) == info["prompts"]
    assert info["dropped"] == {"single candidate": 1, "no signal": 1}
    with pytest.raises(InputError, match="No prompt of the train candidates"):
        stage.prepare_dataset(
            Dataset.from_list([equal]),
            "train",
            CalibrationConfig("unused", use_cpu=True),
            tiny_tokenizer,
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("column", ["rewards", "ref_logps"])
def test_a_value_that_is_not_finite_names_its_row(rows, bad, column):
    "Pitfall 25: the row is named and nothing trains."
    broken = copy.deepcopy(rows)
    broken[3][column][1] = bad
    with pytest.raises(InputError, match=rf"Row 3: {column}\[1\]"):
        prepared(broken)


def test_lengths_must_agree(rows):
    broken = copy.deepcopy(rows)
    broken[2]["rewards"].pop()
    with pytest.raises(InputError, match="Row 2 has .* rewards for"):
        prepared(broken)


def test_empty_completion_is_never_picked(rows):
    "Pitfall 28: a completion without tokens has no log-probability."
    broken = copy.deepcopy(rows)
    broken[0]["completion_ids"][1] = []
    kept, _ = prepared(broken)
    assert 1 not in kept[0]["picked"] and len(kept[0]["picked"]) == len(rows[0]["rewards"]) - 1


def test_the_picked_candidates_are_those_of_the_batch(rows):
    "Numbers and tokens are those of the picks, not of the row's first candidates."
    kept = prepared(rows)[0].to_list()
    for row in kept: row["picked"] = row["picked"][1:]
    cut = [row | {k: row[k][1:] for k in ("completion_ids", "rewards", "ref_logps")}
           | {"picked": list(range(len(row["picked"])))} for row in kept]
    ours, theirs = (stage.CandidateCollator(0)(batch) for batch in (kept, cut))
    assert torch.equal(ours["batch"].input_ids, theirs["batch"].input_ids)
    for name in ("rewards", "ref_logps", "mask"): assert torch.equal(ours[name], theirs[name])


def test_a_high_level_of_rewards_trains_as_a_low_one(rows):
    "Fractions of a reward at a million reach the loss whole, and their order the metrics."
    low = [{k: v for k, v in row.items() if k != "reward_std"} for row in rows]
    high = [row | {"rewards": [1e6 + r for r in row["rewards"]]} for row in low]
    low, up = (stage.CandidateCollator(0)(prepared(r)[0].to_list()) for r in (low, high))
    level = 1e6 * low["mask"]
    torch.testing.assert_close(low["rewards"] + level, up["rewards"], atol=1e-9, rtol=0)
    torch.testing.assert_close(low["sigma"], up["sigma"], atol=1e-6, rtol=0)
    ratios = torch.tensor([[1., 0.]])
    at = torch.tensor([[1e6 + .85, 1e6 + .1]], dtype=torch.float64)
    for rewards, accuracy in ((at, 1), (at.flip(1), 0)):
        found = stage.pair_metrics(ratios, rewards, torch.ones(1, 2, dtype=torch.bool))
        assert found[0] == accuracy


def test_sigma_is_estimated_before_subsampling(model):
    "Identity 7: 'stored' uses all scored candidates, 'candidates' the picked, 'dataset' a pool."
    rows = make_rows(model, prompts=5, n=6)
    full = [torch.tensor(r["rewards"], dtype=torch.float64).std().item() for r in rows]
    stored, _ = prepared(rows, n_candidates=3)
    assert all(len(p) == 3 for p in stored["picked"])
    assert list(stored["sigma"]) == pytest.approx(full)
    own, _ = prepared(rows, n_candidates=3, sigma="candidates")
    chosen = [[r["rewards"][i] for i in p] for r, p in zip(rows, own["picked"])]
    assert list(own["sigma"]) == pytest.approx(
        [torch.tensor(c, dtype=torch.float64).std().item() for c in chosen]
    )
    pooled, info = prepared(rows, n_candidates=3, sigma="dataset")
    assert list(pooled["sigma"]) == pytest.approx([math.sqrt(sum(s * s for s in full) / 5)] * 5)
    column, _ = prepared([{**r, "reward_std": 7.0} for r in rows])
    assert list(column["sigma"]) == [7.0] * 5
    assert (
        stored["picked"]
        == prepared(rows, n_candidates=3)[0]["picked"]
        != prepared(rows, n_candidates=3, seed=1)[0]["picked"]
    )


def test_evaluation_uses_the_pooled_sigma_of_training(trainer_of, model):
    train, other = (
        make_rows(model),
        [{**r, "rewards": [9 * v for v in r["rewards"]]} for r in make_rows(model, seed=1)],
    )
    trainer = trainer_of(train, eval_rows=other, sigma="dataset")
    assert set(trainer.eval_dataset["sigma"]) == set(trainer.train_dataset["sigma"])


def test_two_candidates_warn(trainer_of, model, caplog):
    "Pitfall 24: n=2 with its own σ loses the values and says so; a σ of more rewards does not."

    def said(n, **settings):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vcb_nb"):
            trainer_of(make_rows(model, n=n), **settings)
        return "±√2" in caplog.text

    assert said(2) and said(2, sigma="candidates") and said(6, n_candidates=2, sigma="candidates")
    assert not any(
        (said(2, sigma="dataset"), said(3), said(6, n_candidates=2), said(2, loss="dpo"))
    )


@pytest.mark.parametrize(
    "prompt, said",
    [
        ([5] * 130, "reads 128"),
        ([], "Prompt 0 is empty"),
        ([5, 9999], "Prompt 0 has token id 9999"),
    ],
)
def test_what_the_model_cannot_read_is_named_before_the_first_step(trainer_of, rows, prompt, said):
    "Of the rows to evaluate on too, and of rows that come after construction."
    bad = [{**rows[0], "prompt_ids": prompt}]
    with pytest.raises(InputError, match=said):
        trainer_of(bad)
    with pytest.raises(InputError, match=said):
        trainer_of(rows, eval_rows=bad)
    with pytest.raises(InputError, match=said):
        trainer_of(rows).evaluate(Dataset.from_list(bad))


def test_a_live_reference_with_fewer_tokens_is_named(trainer_of, rows, model):
    few = copy.deepcopy(model)
    few.resize_token_embeddings(8)
    with pytest.raises(InputError, match="the model knows 0 to 7"):
        trainer_of(rows, reference_model=few, reference="live")


def test_no_step_looks_at_the_ids(trainer_of, rows, monkeypatch):
    "On a GPU that would wait for the device, step after step; construction has checked them."
    trainer = trainer_of(rows, max_steps=2, eval_rows=rows, eval_strategy="steps", eval_steps=1)

    def refused(*_, **__):
        raise AssertionError("checked again")

    for module in (stage, logprobs, packing):
        for name in ("check_candidates", "check_vocabulary", "check_batch_ids", "check_context"):
            monkeypatch.setattr(module, name, refused, raising=False)
    trainer.train()


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(loss="vbc"), "Did you mean 'vcb'"),
        (dict(loss_params={"gama": 1.0}), "Did you mean 'gamma'"),
        (dict(loss="dpo", loss_params={"gamma": 1.0}), "beta"),
        (dict(loss_params={"gamma": -1.0}), "must be positive"),
        (dict(loss_params={"gamma": "high"}), "Give a number"),
        (dict(sigma="pooled"), "sigma"),
        (dict(reference="lvie"), "Did you mean 'live'"),
        (dict(loss="dpo", metric_for_best_model="calibration/r2", eval_strategy="steps",
              load_best_model_at_end=True), "metric_for_best_model is 'calibration/r2'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, said):
    with pytest.raises(InputError, match=said):
        CalibrationConfig("unused", use_cpu=True, **settings)


# The stage ------------------------------------------------------------


@pytest.fixture
def config_of(tmp_path, sft, rows, tiny_tokenizer):
    "Settings of the stage on the tiny rows, written as a candidate file with their texts."
    texts = [[tiny_tokenizer.decode(ids) for ids in row["completion_ids"]] for row in rows]
    rows = [{**row, "completions": said} for row, said in zip(rows, texts)]
    file = write_jsonl(tmp_path / "candidates.jsonl", rows)

    def make(name="out", **settings):
        defaults = dict(
            model=str(sft),
            candidates=str(file),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=3,
            learning_rate=1e-3,
            use_cpu=True,
            disable_tqdm=True,
        )
        return CalibrationConfig(str(tmp_path / name), **{**defaults, **settings})

    return make


def weights(folder):
    return load_policy(folder).state_dict()


def test_stage_leaves_model_log_and_summary(config_of, tmp_path):
    summary = calibrate(config_of(eval_share=0.25))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (
        summary["steps"] == 6
        and summary["data"]["train"]["prompts"] == 6
        and summary["data"]["eval"]["prompts"] == 2
    )
    assert {"loss", "calibration/r2", "calibration/slope", "rewards/accuracies"} <= set(
        summary["train"]
    )
    assert summary["eval"]["eval_calibration/r2"] == pytest.approx(
        1 - summary["eval"]["eval_loss"] / 2, abs=1e-6
    )
    assert read_curve(tmp_path / "out", "calibration/r2")[0] == (1, 2, 3, 4, 5, 6)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", "training_log.jsonl"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_resume_is_exact(config_of, tmp_path, monkeypatch, lora):
    "A run killed after step 4 continues from checkpoint 3 and ends as an undisturbed run does."
    calibrate(config_of("whole", peft_config=lora, save_adapter=bool(lora)))
    step = CalibrationTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CalibrationTrainer, "training_step", killed)
    with pytest.raises(Killed):
        calibrate(config_of("cut", peft_config=lora))
    monkeypatch.setattr(CalibrationTrainer, "training_step", step)
    summary = calibrate(config_of("cut", peft_config=lora))
    assert summary["steps"] == 8 and (tmp_path / "whole" / "adapter").exists() == bool(lora)
    close(
        weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"), rtol=0, atol=0
    )
    assert read_curve(tmp_path / "cut")[1][3:] == read_curve(tmp_path / "whole")[1][3:]


def test_reference_model_folder(config_of, tmp_path, tiny_tokenizer):
    "reference='live' with its own folder: the start is measured against that model."
    other = save_model(tiny_model(tiny_tokenizer, seed=1), tiny_tokenizer, tmp_path / "other")
    calibrate(config_of(reference="live", reference_model=str(other), max_steps=1))
    assert read_curve(tmp_path / "out")[1][0] != pytest.approx(2.0, abs=0.01)


def test_tensorboard_gets_the_metrics(config_of, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    calibrate(config_of(report_to="tensorboard", eval_share=0.25, max_steps=2))
    events = (tmp_path / "board").rglob("events.out*")
    found = {
        name for event in events for name in EventAccumulator(str(event)).Reload().Tags()["scalars"]
    }
    assert {
        "train/loss",
        "train/calibration/r2",
        "train/calibration/slope",
        "train/rewards/margins",
        "eval/loss",
        "eval/calibration/r2",
    } <= found


@pytest.mark.slow
def test_overfit_reaches_the_optimum(trainer_of, tiny_tokenizer):
    "Identity 5 through a network: on 4 prompts × 4 candidates R² > .99 and the slope is 1/γ."
    policy = tiny_model(tiny_tokenizer)
    rows = make_rows(policy, prompts=4, n=4, seed=3)
    trainer = trainer_of(
        rows,
        policy,
        rows,
        max_steps=250,
        learning_rate=3e-3,
        loss_params={"gamma": 0.5},
        lr_scheduler_type="cosine",
        logging_steps=250,
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_calibration/r2"] > 0.99 and found["eval_loss"] < 0.02
    assert found["eval_calibration/slope"] == pytest.approx(1 / 0.5, rel=0.02)
    assert found["eval_rewards/margins"] == pytest.approx(found["eval_target/margins"], rel=0.02)


def test_n_best_list_of_texts(shared_data, config_of, tmp_path):
    "Real answers with real rewards and no ids: tokenised, cut, trained on a live reference."
    with gzip.open(
        shared_data / "scored_alpacaeval_nc" / "dev.jsonl.gz", "rt", encoding="utf-8"
    ) as f:
        few = [json.loads(next(f)) for _ in range(4)]
    tokenizer = separate_padding(
        GPT2TokenizerFast.from_pretrained(shared_data / "tokenizers" / "gpt2")
    )
    start = save_model(
        new_policy(
            tokenizer,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
        tokenizer,
        tmp_path / "start",
    )
    config = config_of(
        model=str(start),
        candidates=str(write_jsonl(tmp_path / "few.jsonl", few)),
        reference="live",
        max_prompt_length=24,
        max_completion_length=24,
        n_candidates=6,
    )
    summary = calibrate(config)
    assert summary["data"]["train"]["prompts"] == 4 and summary["data"]["train"]["candidates"] == 24
    # σ is that of all 16 rewards, only 6 are trained on: the loss starts near 2, R² at exactly 0.
    assert read_curve(tmp_path / "out", "calibration/r2")[1][0] == 0.0


def test_equal_ids_have_one_reward(tiny_tokenizer, caplog):
    "Fault 20: a cut makes two texts equal; a judge gives one text two rewards. The target is one."
    texts = [" good and long", " good and short", " bad", " bad"]
    rows = Dataset.from_list([{"prompt": "p", "completions": texts, "rewards": [4., 2., 1., -1.]},
                              {"prompt": "q", "completions": [" a", " a"], "rewards": [1., 2.]}])
    args = CalibrationConfig("runs/none", reference="live", max_completion_length=len(
        tiny_tokenizer(" good and").input_ids))
    kept, info = stage.prepare_dataset(rows, "train", args, tiny_tokenizer)
    assert kept["rewards"][:] == [[3., 3., 0., 0.]] and info["merged"] == 6
    assert info["dropped"]["no signal"] == 1 and "same tokens" in caplog.text
    same = rows.select([0]).map(lambda row: {"rewards": [3., 3., 0., 0.]})
    kept, info = stage.prepare_dataset(same, "train", args, tiny_tokenizer)
    assert info["merged"] == 0 and kept["rewards"][:] == [[3., 3., 0., 0.]]
