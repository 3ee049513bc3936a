"The reward model: its loss, its endings, its held-out report, and what survives a kill."
import gzip, itertools, json, math, random

import numpy as np
import pytest, torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vcb_nb.artifacts import InputError
from vcb_nb.data import encode_completion, encode_prompt, load_pairs
from vcb_nb.judges import reward_scores
from vcb_nb.loading import load_reward_model, new_reward_model
from vcb_nb.models import new_policy
from vcb_nb.reward import (RewardConfig, bradley_terry_loss, collate_pairs, encode_pair,
                           reward_datasets, reward_trainer, split_scores, train_reward)
from vcb_nb.saving import save_model
from vcb_nb.loading import load_tokenizer
from vcb_nb.training import read_curve

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
NOUNS = ("soup", "room", "bed", "film", "story", "waiter", "harbour", "bread")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def toy_pairs(n, seed=0):
    "Good is better than dull, whatever the noun and however often it is said."
    rng = random.Random(seed)
    say = lambda w: " It was " + " and ".join([w] * rng.choice((1, 2, 3))) + "."
    return [dict(prompt=f"How was the {rng.choice(NOUNS)} {i}?",
                 chosen=say("good"), rejected=say("dull")) for i in range(n)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("reward")
    save_model(new_policy(tiny_tokenizer, seed=1, **TINY), tiny_tokenizer, folder/"sft")
    write_rows(folder/"pairs.jsonl", toy_pairs(64))
    return folder


def config(files, out, **changes):
    settings = dict(model=str(files/"sft"), pairs=str(files/"pairs.jsonl"), output_dir=str(out),
                    warmup_steps=0, max_prompt_length=48, max_length=100, learning_rate=3e-3,
                    logging_steps=1, max_steps=8, disable_tqdm=True,
                    per_device_train_batch_size=8, eval_share=.2)
    return RewardConfig(**{**settings, **changes})


def trainer_of(c):
    tokenizer = load_tokenizer(c.model)
    model = new_reward_model(c.model, tokenizer, seed=c.seed)
    return reward_trainer(c, model, tokenizer, *reward_datasets(c, tokenizer)[:2])


def oracle_scores(model, tokenizer, rows):
    "[pairs, 2] rewards, from `reward_scores`: the very function that scores candidates."
    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in rows]
    sides = [[encode_completion(tokenizer, r[s])[0] for s in ("chosen", "rejected")] for r in rows]
    return np.array(reward_scores(model, prompts, sides))


# The loss

def test_loss_is_the_bradley_terry_likelihood():
    "-log( e^{r_w} / (e^{r_w} + e^{r_l + m}) ), and its gradient -(1 - P), in float64."
    torch.manual_seed(0)
    w, l = torch.randn(2, 50, dtype=torch.float64).requires_grad_()
    w.retain_grad()
    for m in (0., .7):
        loss = bradley_terry_loss(w, l, m)
        p = w.exp() / (w.exp() + (l + m).exp())
        torch.testing.assert_close(loss, -p.log(), rtol=1e-12, atol=1e-12)
        grad, = torch.autograd.grad(loss.sum(), w, retain_graph=True)
        torch.testing.assert_close(grad, p - 1, rtol=1e-12, atol=1e-12)


def test_loss_is_finite_far_out_and_centering_is_a_square():
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    torch.testing.assert_close(bradley_terry_loss(far, torch.zeros(2)),
                               torch.tensor([1e4, 0.], dtype=torch.float64))
    w, l = torch.tensor([1., 2.]), torch.tensor([3., -2.])
    extra = bradley_terry_loss(w, l, center_coefficient=.1) - bradley_terry_loss(w, l)
    torch.testing.assert_close(extra, torch.tensor([1.6, 0.]))


def test_training_loss_equals_the_oracle(files, tmp_path):
    "With a margin column and centering, over all pairs, in one forward pass each."
    rows = [{**r, "margin": i % 3 / 2} for i, r in enumerate(toy_pairs(12))]
    c = config(files, tmp_path, pairs=write_rows(tmp_path/"p.jsonl", rows), eval_share=0,
               learning_rate=0., per_device_train_batch_size=4, gradient_accumulation_steps=3,
               max_steps=1, center_rewards_coefficient=.1)
    trainer = trainer_of(c)
    scores = oracle_scores(new_reward_model(c.model, trainer.processing_class, seed=c.seed),
                           trainer.processing_class, rows)
    gap = scores[:, 0] - scores[:, 1] - [r["margin"] for r in rows]
    trainer.train()
    expected = (np.log1p(np.exp(-gap)) + .1 * scores.sum(1) ** 2).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_margin_widens_the_gap_and_can_be_ignored(files, tmp_path):
    def gap(name, margin, **changes):
        rows = [{**r, "margin": margin} for r in toy_pairs(64)]
        pairs = write_rows(tmp_path/f"{name}.jsonl", rows)
        return train_reward(config(files, tmp_path/name, pairs=pairs, **changes))["margin"]
    long = dict(max_steps=40, learning_rate=1e-2)
    assert gap("wide", 6., **long) > gap("none", 0., **long) + 1
    assert gap("ignored", 6., max_steps=2, use_margin=False) == gap("short", 0., max_steps=2)


def test_accumulation_changes_nothing(files, tmp_path):
    "Pitfall 14: 1×8 and 8×1 give the same losses and gradient norms, a short last step included."
    logs = []
    for batch, steps in ((8, 1), (1, 8)):
        c = config(files, tmp_path/str(batch), pairs=write_rows(tmp_path/"p.jsonl", toy_pairs(21)),
                   eval_share=0, max_steps=3, per_device_train_batch_size=batch,
                   gradient_accumulation_steps=steps, max_grad_norm=1e9)
        train_reward(c)
        logs.append([read_curve(c.output_dir, key)[1] for key in ("loss", "grad_norm")])
    for a, b in zip(*logs):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [None, dict(r=4)])
def test_packed_pairs_are_trained_and_evaluated_as_rows(files, tmp_path, lora):
    "Losses of the steps, and every figure of the report."
    found = []
    for way in ("rows", "shared"):
        c = config(files, tmp_path/way, way=way, peft_config=lora, gradient_accumulation_steps=2,
                   per_device_train_batch_size=4, per_device_eval_batch_size=5, max_steps=4)
        report = train_reward(c)
        found.append([*read_curve(c.output_dir)[1], *(report[k] for k in (
            "accuracy", "log_loss", "margin", "reward_mean", "reward_std"))])
    assert found[1] == pytest.approx(found[0], rel=2e-4, abs=2e-5)


def test_rows_where_pairs_cannot_be_packed(files, tmp_path):
    "'shared' says why it cannot; 'auto' takes rows."
    ways = {way: dict(way=way, neftune_noise_alpha=5.) for way in ("auto", "shared")}
    trainer = trainer_of(config(files, tmp_path, **ways["auto"]))
    assert "attention_mask" in next(iter(trainer.get_train_dataloader()))
    with pytest.raises(InputError, match="way is 'shared', but NEFTune"):
        trainer_of(config(files, tmp_path, **ways["shared"]))


# Pairs and endings

def test_scores_are_read_at_the_last_token(files, tmp_path):
    """Pitfall 20: the batch of the trainer gives the scores of `reward_scores`,
    whatever the padding."""
    trainer = trainer_of(config(files, tmp_path))
    rows = [trainer.train_dataset[i] for i in range(12)]
    batch = collate_pairs(rows, trainer.model.config.pad_token_id)
    wide = {k: torch.nn.functional.pad(batch[k], (0, 9), value=v) for k, v in
            (("input_ids", trainer.model.config.pad_token_id), ("attention_mask", 0))}
    source = {r["prompt"]: r for r in load_pairs(files/"pairs.jsonl")}
    expected = oracle_scores(trainer.model, trainer.processing_class,
                             [source[r["prompt"]] for r in rows])
    for inputs in (batch, wide):
        with torch.no_grad():
            logits = trainer.model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits
        np.testing.assert_allclose(split_scores(logits).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_ending_says_whether_the_text_is_whole(tiny_tokenizer):
    "Pitfall 21: EOS behind a whole completion, none behind a cut one, as in the candidate files."
    eos = tiny_tokenizer.eos_token_id
    row = dict(prompt="How?", chosen=" good" * 50, rejected=" dull")
    pair = encode_pair(tiny_tokenizer, row, 20, 40)
    assert len(pair["chosen_ids"]) == 40 and eos not in pair["chosen_ids"] and pair["cut"]
    assert pair["rejected_ids"] == (encode_prompt(tiny_tokenizer, "How?")
                                    + encode_completion(tiny_tokenizer, " dull")[0])
    assert pair["rejected_ids"][-1] == eos and pair["length"] == 40


def test_useless_pairs_are_dropped_and_counted(files, tmp_path):
    "Pitfall 28: blank or equal sides, and sides that a cut makes equal, never reach the loss."
    rows = toy_pairs(10) + [dict(prompt="a", chosen="", rejected=" x"),
                            dict(prompt="b", chosen=" x", rejected=" x"),
                            dict(prompt="c", chosen=" good" * 80 + " a",
                                 rejected=" good" * 80 + " b")]
    summary = train_reward(config(files, tmp_path, pairs=write_rows(tmp_path/"p.jsonl", rows),
                                  eval_share=0, max_steps=1))
    assert summary["rows"] == 10
    assert summary["dropped"] == {"not a pair": 2, "same after the cut": 1}
    equal = write_rows(tmp_path/"q.jsonl", rows[-1:])
    with pytest.raises(InputError, match="equal after the cut"):
        train_reward(config(files, tmp_path/"q", pairs=equal, eval_share=0))


def test_completion_that_begins_the_other(tiny_tokenizer):
    """Pitfall 29: where one completion is a prefix of the other, EOS tells them apart;
    prompts stay equal."""
    row = dict(prompt="How?\n", chosen=" It was good", rejected=" It was good and warm")
    pair = encode_pair(tiny_tokenizer, row, 20, 40)
    n = len(encode_prompt(tiny_tokenizer, "How?\n"))
    assert pair["chosen_ids"][:n] == pair["rejected_ids"][:n] and not pair["same"]
    assert pair["chosen_ids"][:-1] == pair["rejected_ids"][:len(pair["chosen_ids"]) - 1]
    assert pair["chosen_ids"][-1] == tiny_tokenizer.eos_token_id


def test_a_limit_keeps_the_first_pairs(files, tmp_path):
    "And leaves the held-out file whole."
    rows = toy_pairs(30)
    c = config(files, tmp_path, pairs=write_rows(tmp_path/"p.jsonl", rows), limit=7,
               eval_pairs=write_rows(tmp_path/"e.jsonl", toy_pairs(40)[30:]))
    train, held, _ = reward_datasets(c, load_tokenizer(c.model))
    assert train["prompt"] == [r["prompt"] for r in rows[:7]] and len(held) == 10


def test_hh_pairs_are_read(files, tmp_path, shared_data):
    """Pitfall 29: real dialogues; every row is used, or counted as dropped;
    prompts stay on one side."""
    source = next((shared_data/"hh_harmless_base_test").rglob("*.jsonl*"))
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in itertools.islice(f, 300)]
    c = config(files, tmp_path, pairs=write_rows(tmp_path/"hh.jsonl", rows), eval_share=.1)
    train, held, dropped = reward_datasets(c, load_tokenizer(c.model))
    counted = len(train) + len(held) + sum(dropped.values())
    assert counted in (300, 299, 298)
    assert len(train) + len(held) > 250 # held-out drops are not listed
    assert max(train["length"]) <= 100 and not set(train["prompt"]) & set(held["prompt"])


# The stage

@pytest.mark.parametrize("lora", [None, dict(r=4)])
def test_learns_separable_pairs_and_saves_what_it_reports(files, tmp_path, lora):
    test = write_rows(tmp_path/"test.jsonl", toy_pairs(41, seed=9))
    c = config(files, tmp_path, eval_pairs=test, max_steps=60, peft_config=lora,
               learning_rate=3e-3 if lora is None else 2e-2)
    report = train_reward(c)
    losses = read_curve(tmp_path)[1]
    assert losses[0] == pytest.approx(math.log(2), abs=.25) and losses[-1] < .2 * losses[0]
    assert report["accuracy"] > .95
    assert report["accuracy_interval"][0] > .85
    assert report["pairs"] == 41
    model, tokenizer = load_reward_model(tmp_path/"model"), load_tokenizer(tmp_path/"model")
    scores = oracle_scores(model, tokenizer, toy_pairs(41, seed=9))
    assert (scores[:, 0] - scores[:, 1]).mean() == pytest.approx(report["margin"], rel=1e-3)
    assert scores.mean() == pytest.approx(report["reward_mean"], abs=1e-3)
    stored = json.loads((tmp_path/"evaluation.json").read_text())
    assert stored["reliability"] == report["reliability"] and not (tmp_path/"checkpoints").exists()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_evaluation_does_not_depend_on_the_batch(files, tmp_path, batch):
    "Pitfall 16: an uneven last batch counts by its pairs."
    trainer = trainer_of(config(files, tmp_path, per_device_eval_batch_size=batch, eval_share=.35))
    source = {r["prompt"]: r for r in load_pairs(files/"pairs.jsonl")}
    rows = [source[p] for p in trainer.eval_dataset["prompt"]]
    scores = oracle_scores(trainer.model, trainer.processing_class, rows)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        np.log1p(np.exp(scores[:, 1] - scores[:, 0])).mean(), rel=1e-5)
    assert metrics["eval_accuracy"] == (scores[:, 0] > scores[:, 1]).mean()


class Killed(Exception): "What stands for a kill."


class KillAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise Killed


@pytest.mark.parametrize("lora", [None, dict(r=4)])
def test_resumed_run_equals_an_undisturbed_one(files, tmp_path, monkeypatch, lora):
    import transformers.trainer as module
    settings = dict(max_steps=6, save_steps=2, peft_config=lora)
    whole = train_reward(config(files, tmp_path/"whole", **settings))
    c = config(files, tmp_path/"killed", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(module, "DEFAULT_CALLBACKS", [*module.DEFAULT_CALLBACKS, KillAt(5)])
        with pytest.raises(Killed): train_reward(c)
    assert train_reward(c) == whole
    a, b = (load_file(tmp_path/name/"model"/"model.safetensors") for name in ("whole", "killed"))
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("changes, message", [
    (dict(pairs=None), "pairs is not set"),
    (dict(model=None), "model is not set"),
    (dict(max_prompt_length=100), "leaves no room"),
    (dict(peft_config=dict(rank=4)), "LoRA has no setting"),
    (dict(eval_share=1.), "eval_share is 1")])
def test_bad_settings_are_named(files, tmp_path, changes, message):
    with pytest.raises(InputError, match=message): train_reward(config(files, tmp_path, **changes))
