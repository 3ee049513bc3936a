"""Fine-tuning: which tokens carry the loss, how it is averaged, what is learned, what survives
a kill."""
import json, random, shutil

import pytest, torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vcb_nb import logprobs
from vcb_nb.artifacts import InputError
from vcb_nb.data import encode_completion, encode_prompt
from vcb_nb.loading import load_policy
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model
from vcb_nb.sft import (SFTConfig, _make_model, collate_rows, encode_demonstration, pack_texts,
                        packed_losses, sft_datasets, sft_trainer, train_sft)
from vcb_nb.loading import load_tokenizer
from vcb_nb.training import last_checkpoint, read_curve

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
WORDS = ("soup", "room", "bed", "film", "story", "waiter", "harbour", "bread")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    "A tokenizer folder, demonstrations of many lengths, and a saved random model."
    folder, rng = tmp_path_factory.mktemp("sft"), random.Random(0)
    tiny_tokenizer.save_pretrained(folder/"tokenizer")
    rows = [dict(prompt=f"Say {i} {w}: ", completion=f" the {w}" * rng.choice((1, 1, 2, 6)))
            for i in range(6) for w in WORDS]
    write_rows(folder/"rows.jsonl", rows)
    save_model(new_policy(tiny_tokenizer, seed=1, **TINY), tiny_tokenizer, folder/"model")
    return folder


def config(files, out, **changes):
    settings = dict(tokenizer=str(files/"tokenizer"), model_config=TINY,
                    data=str(files/"rows.jsonl"), output_dir=str(out), max_prompt_length=32,
                    max_length=64, learning_rate=1e-2, warmup_steps=0, logging_steps=1,
                    max_steps=8, disable_tqdm=True, per_device_train_batch_size=8)
    return SFTConfig(**{**settings, **changes})


def trainer_of(c):
    model, tokenizer = _make_model(c)
    return sft_trainer(c, model, tokenizer, *sft_datasets(c, tokenizer))


def weights(folder): return load_file(folder/"model"/"model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def oracle_loss(model, tokenizer, rows):
    """Mean over completion tokens of -log p(token | all before), row by row,
    without padding or labels."""
    nll = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        ids = prompt + encode_completion(tokenizer, row["completion"])[0]
        with torch.no_grad(): logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll += [-logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
    return sum(nll) / len(nll)


@pytest.mark.parametrize("batch", [1, 5, 48])
def test_evaluation_is_cross_entropy_over_completion_tokens_only(files, tmp_path, batch):
    c = config(files, tmp_path, model=str(files/"model"), eval_data=str(files/"rows.jsonl"),
               per_device_eval_batch_size=batch)
    trainer = trainer_of(c)
    rows = [json.loads(line) for line in open(files/"rows.jsonl")]
    expected = oracle_loss(load_policy(files/"model"), trainer.processing_class, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_training_loss_is_the_same_quantity(files, tmp_path):
    rows = [json.loads(line) for line in open(files/"rows.jsonl")]
    c = config(files, tmp_path, model=str(files/"model"), eval_share=0, learning_rate=0.,
               max_steps=1, per_device_train_batch_size=16, gradient_accumulation_steps=3)
    trainer = trainer_of(c)
    trainer.train()
    expected = oracle_loss(load_policy(files/"model"), trainer.processing_class, rows)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prompt, completion", [
    ("Say: ", " the bread"), ("Say:\n", "the bread"), ("", "the bread"),
    ("The soup w", "as warm.")])
def test_prompt_and_completion_are_encoded_apart(tiny_tokenizer, prompt, completion):
    "Pitfall 1: no token grows across the boundary, whatever stands there."
    row = encode_demonstration(tiny_tokenizer, prompt, completion, 64, 128)
    n = row["prompt_length"]
    assert row["input_ids"][:n] == encode_prompt(tiny_tokenizer, prompt)
    assert row["input_ids"][n:] == encode_completion(tiny_tokenizer, completion)[0]
    assert tiny_tokenizer.decode(row["input_ids"][n:-1]) == completion
    assert row["input_ids"][-1] == tiny_tokenizer.eos_token_id and row["finished"]


def test_labels_with_padding_that_is_eos(tiny_tokenizer):
    "Pitfall 2: the mask comes from lengths; EOS carries a loss even where it pads as well."
    rows = [encode_demonstration(tiny_tokenizer, "Say: ", text, 64, 128)
            for text in (" a", " the soup was warm")]
    eos = tiny_tokenizer.eos_token_id
    batch = collate_rows(rows, pad_id=eos)
    for row, ids, labels, mask in zip(
            rows, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        n, p = row["length"], row["prompt_length"]
        assert labels[:p].eq(-100).all() and labels[n:].eq(-100).all()
        assert labels[p:n].tolist() == row["input_ids"][p:] and labels[n - 1] == eos
        assert mask.sum() == n


def test_accumulation_changes_nothing(files, tmp_path):
    "Pitfall 14: 1×8 and 8×1 give the same losses and gradient norms on rows of different lengths."
    logs = []
    for batch, steps in ((8, 1), (1, 8)):
        c = config(files, tmp_path/str(batch), per_device_train_batch_size=batch, max_steps=4,
                   gradient_accumulation_steps=steps, max_grad_norm=1e9)
        train_sft(c)
        logs.append([read_curve(c.output_dir, key)[1] for key in ("loss", "grad_norm")])
    for a, b in zip(*logs):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-4, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_with_checkpointing_trains_every_adapter(files, tmp_path, reentrant):
    "Pitfall 13: every lora_B leaves zero after one step under gradient checkpointing."
    c = config(files, tmp_path, model=str(files/"model"), max_steps=1, peft_config=dict(r=4),
               gradient_checkpointing=True,
               gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    trainer = trainer_of(c)
    trainer.train()
    found = {n: p.detach().abs().max().item() for n, p in trainer.model.named_parameters()
             if "lora_B" in n}
    assert len(found) == 8 and min(found.values()) > 0


@pytest.mark.parametrize("changes, reason", [
    (dict(label_smoothing_factor=.1), "label smoothing"),
    (dict(neftune_noise_alpha=5.), "NEFTune"), (dict(torch_compile=True), "torch.compile"),
    (dict(architecture="stablelm"), "do not pass the layout on")])
def test_rows_where_packing_would_change_the_loss(files, tmp_path, changes, reason, caplog):
    "'auto' takes padded rows and says why; 'shared' says that it cannot."
    logprobs.say_once.cache_clear()
    if "architecture" in changes: changes["model_config"] = {**TINY, "intermediate_size": 64}
    with caplog.at_level("INFO", logger="vcb_nb.logprobs"):
        trainer = trainer_of(config(files, tmp_path, **changes))
    batch = next(iter(trainer.get_train_dataloader()))
    assert "batch" not in batch and "attention_mask" in batch and reason in caplog.text
    with pytest.raises(InputError, match=reason):
        trainer_of(config(files, tmp_path, way="shared", **changes))


def test_label_smoothing_is_the_trainers_own(files, tmp_path):
    "It reaches the loss: rows are taken, and the loss is not that of the labels alone."
    losses = [train_sft(config(files, tmp_path/str(s), max_steps=1, label_smoothing_factor=s))
              ["train_loss"] for s in (0., .3)]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("lora", [None, dict(r=4, lora_dropout=.3)])
def test_packed_losses_are_logged_and_evaluated_as_rows(files, tmp_path, lora):
    "Fault: the mean over rows, or over the batches, in the place of the mean over tokens."
    found = []
    for way in ("rows", "shared"):
        c = config(files, tmp_path/way, way=way, peft_config=lora, model=str(files/"model"),
                   eval_data=str(files/"rows.jsonl"), per_device_eval_batch_size=5, max_steps=3,
                   gradient_accumulation_steps=2, per_device_train_batch_size=4)
        trainer = trainer_of(c)
        found.append([trainer.evaluate()["eval_loss"]])
        if lora is None: # with dropout the two ways draw differently
            trainer.train()
            found[-1] += [row["loss"] for row in trainer.state.log_history if "loss" in row]
            found[-1] += [trainer.evaluate()["eval_loss"]]
        assert ("batch" in next(iter(trainer.get_train_dataloader()))) == (way == "shared")
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_repeated_row_adds_nothing(files, tmp_path):
    "Pitfall 16: its labels are blanked after the layout was made; its log-probs do not count."
    trainer = trainer_of(config(files, tmp_path, per_device_train_batch_size=3))
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    values = trainer.read(model, batch["batch"])
    whole = packed_losses(values, batch["labels"])
    batch["labels"][1] = -100
    blanked = packed_losses(values, batch["labels"])
    assert blanked[1].tolist() == [0., 0.] and torch.equal(blanked[::2], whole[::2])
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    assert loss.item() == pytest.approx(blanked[:, 0].sum().item() / 7)


def test_batches_reach_the_loss_whole(files, tmp_path):
    "Pitfall 15: prompt_length survives the Trainer, or no prompt would be masked."
    found = {}
    for way in ("rows", "shared"):
        trainer = trainer_of(config(files, tmp_path, way=way))
        batch = found[way] = next(iter(trainer.get_train_dataloader()))
        assert (batch["labels"] != -100).any(1).all()
    masked = (found["rows"]["labels"] == -100) & (found["rows"]["attention_mask"] == 1)
    assert masked.any(1).all() and torch.equal(found["rows"]["labels"], found["shared"]["labels"])
    assert sum(found["shared"]["batch"].completion_lengths) == (batch["labels"] != -100).sum()


def test_cut_and_blank_completions(files, tmp_path, tiny_tokenizer):
    "Pitfall 28: blank completions are dropped and counted; a cut one has tokens left, and no EOS."
    rows = [dict(prompt="Say: " * 50, completion=" the soup" * 40),
            dict(prompt="a", completion="  "),
            dict(prompt="b", completion=" bread"), dict(prompt="c", completion=" bed")]
    c = config(files, tmp_path, data=write_rows(tmp_path/"rows.jsonl", rows), max_steps=1,
               eval_share=.2, max_prompt_length=63)
    summary = train_sft(c)
    assert summary["dropped"] == 1 and summary["rows"] + summary["eval_rows"] == 3
    row = encode_demonstration(tiny_tokenizer, **rows[0], max_prompt_length=63, max_length=64)
    assert row["length"] == 64
    assert not row["finished"]
    assert row["input_ids"][-1] != tiny_tokenizer.eos_token_id


def test_learns_the_completion_and_where_it_ends(files, tmp_path):
    rows = [dict(prompt=f"Say {w}:", completion=f" the {w}") for w in WORDS]
    c = config(files, tmp_path, data=write_rows(tmp_path/"rows.jsonl", rows), max_steps=100,
               eval_share=0)
    train_sft(c)
    losses = read_curve(tmp_path)[1]
    assert losses[-1] < .05 < 2 < losses[0]
    model, tokenizer = load_policy(tmp_path/"model"), load_tokenizer(tmp_path/"model")
    for w in WORDS:
        ids = torch.tensor([encode_prompt(tokenizer, f"Say {w}:")])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                             max_new_tokens=20, do_sample=False)
        assert out[0, ids.shape[1]:].tolist() == encode_completion(tokenizer, f" the {w}")[0]


class Killed(Exception): "What stands for a kill."


class KillAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise Killed


def killed(function, c, step, monkeypatch):
    "Run a stage and stop it after a step, as a kill would; leave a half-written checkpoint behind."
    import transformers.trainer as module
    with monkeypatch.context() as patch:
        patch.setattr(module, "DEFAULT_CALLBACKS", [*module.DEFAULT_CALLBACKS, KillAt(step)])
        with pytest.raises(Killed): function(c)


@pytest.mark.parametrize("lora", [None, dict(r=4)])
def test_resumed_run_equals_an_undisturbed_one(files, tmp_path, monkeypatch, lora):
    settings = dict(model=str(files/"model"), peft_config=lora, max_steps=9, save_steps=3,
                    gradient_accumulation_steps=2, per_device_train_batch_size=4)
    whole = train_sft(config(files, tmp_path/"whole", **settings))
    c = config(files, tmp_path/"killed", **settings)
    killed(train_sft, c, 7, monkeypatch)
    folder = tmp_path/"killed"/"checkpoints"
    assert not (tmp_path/"killed"/"model").exists()
    assert last_checkpoint(folder).name == "checkpoint-6"
    shutil.copytree(folder/"checkpoint-6", folder/"checkpoint-7")
    (folder/"checkpoint-7"/"trainer_state.json").unlink()
    again = train_sft(c)
    assert_same_weights(tmp_path/"whole", tmp_path/"killed")
    assert again == whole and not folder.exists()
    steps, losses = read_curve(tmp_path/"killed")
    assert steps == tuple(range(1, 10)) and losses == read_curve(tmp_path/"whole")[1]


def test_kill_after_the_last_step_costs_no_training(files, tmp_path, monkeypatch):
    c = config(files, tmp_path, max_steps=4)
    whole = train_sft(config(files, tmp_path/"whole", max_steps=4))
    import vcb_nb.training as module
    with monkeypatch.context() as patch:
        def die(*args): raise Killed
        patch.setattr(module, "save_model", die)
        with pytest.raises(Killed): train_sft(c)
    assert last_checkpoint(tmp_path/"checkpoints").name == "checkpoint-4"
    assert train_sft(c) == whole
    assert_same_weights(tmp_path, tmp_path/"whole")


def test_best_model_is_loaded_whole(files, tmp_path):
    """The Trainer's own reload of the best checkpoint leaves the head of the last step in place.

    The "best" model here is that with the highest loss, so that it is not the last one."""
    c = config(files, tmp_path, load_best_model_at_end=True, greater_is_better=True, max_steps=6,
               eval_data=str(files/"rows.jsonl"), eval_strategy="steps", eval_steps=1, save_steps=1)
    summary, rows = train_sft(c), [json.loads(line) for line in open(files/"rows.jsonl")]
    losses = read_curve(tmp_path, "eval_loss")[1][:6]
    assert summary["eval_loss"] == pytest.approx(max(losses), rel=1e-6)
    assert losses[5] < .9 * max(losses)
    saved = oracle_loss(load_policy(tmp_path/"model"), load_tokenizer(tmp_path/"model"), rows)
    assert saved == pytest.approx(max(losses), rel=1e-5)


def test_same_seed_same_weights_and_other_seed_other(files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_sft(config(files, tmp_path/name, max_steps=2, seed=seed))
    assert_same_weights(tmp_path/"a", tmp_path/"b")
    with pytest.raises(AssertionError): assert_same_weights(tmp_path/"a", tmp_path/"c")


def test_checkpoints_are_kept_on_request(files, tmp_path):
    train_sft(config(files, tmp_path, max_steps=2, keep_checkpoints=True))
    assert last_checkpoint(tmp_path/"checkpoints").name == "checkpoint-2"


def test_saved_model_generates_with_its_cache(files, tmp_path):
    "The Trainer switches the cache off for training; a saved model must not keep that."
    train_sft(config(files, tmp_path, max_steps=1))
    assert load_policy(tmp_path/"model").config.use_cache is True


def test_length_groups_see_every_row(files, tmp_path):
    c = config(files, tmp_path, train_sampling_strategy="group_by_length", max_steps=-1,
               num_train_epochs=1, eval_share=0, way="rows")
    trainer = trainer_of(c)
    lengths = [b["attention_mask"].sum(1).tolist() for b in trainer.get_train_dataloader()]
    assert sorted(sum(lengths, [])) == sorted(trainer.train_dataset["length"])


def test_packing_keeps_the_stream(tiny_tokenizer):
    texts = ["The soup was warm.", "", "A small room.", "The bed " * 30]
    blocks = pack_texts(tiny_tokenizer, texts, 16)
    stream = sum((encode_completion(tiny_tokenizer, t)[0] for t in texts if t), [])
    assert [i for b in blocks for i in b.tolist()] == stream
    assert {len(b) for b in blocks[:-1]} == {16}
    assert stream.count(tiny_tokenizer.eos_token_id) == 3


@pytest.mark.parametrize("documents", [1, 5])
def test_text_objective(files, tmp_path, documents):
    texts = [dict(text=f"The {w} was warm and good. " * 20) for w in WORDS[:documents]]
    c = config(files, tmp_path, data=write_rows(tmp_path/"t.jsonl", texts), objective="text",
               max_steps=20)
    summary = train_sft(c)
    losses = read_curve(tmp_path)[1]
    assert losses[-1] < .7 * losses[0] and summary["eval_rows"] >= 1
    trainer = trainer_of(config(files, tmp_path, data=c.data, objective="text", way="rows"))
    batch = next(iter(trainer.get_train_dataloader()))
    padding, first = batch["attention_mask"] == 0, torch.arange(batch["labels"].shape[1]) == 0
    assert torch.equal(batch["labels"] == -100, padding | first)


@pytest.mark.parametrize("changes, message", [
    (dict(objective="completions"), "Did you mean 'completion'"),
    (dict(data=None), "data is not set"),
    (dict(tokenizer=None), "Name a tokenizer"),
    (dict(max_prompt_length=64), "leaves no room"),
    (dict(max_length=500), "max_length: 128"),
    (dict(peft_config=dict(rank=4)), "LoRA has no setting 'rank'"),
    (dict(model_config=dict(hidden=4)), "has no setting 'hidden'")])
def test_bad_settings_are_named(files, tmp_path, changes, message):
    with pytest.raises(InputError, match=message): train_sft(config(files, tmp_path, **changes))


def test_divergence_is_named(files, tmp_path):
    with pytest.raises(InputError, match="learning_rate"):
        train_sft(config(files, tmp_path, learning_rate=1e30, max_grad_norm=0, max_steps=20))
