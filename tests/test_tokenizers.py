"Tokenizers: the end is not the padding, every token has its row, and mistakes are named."
from itertools import product
from types import SimpleNamespace

import pytest, torch
from tiny_models import base, logits, make_tokenizer, sft_adapter, tiny, tokenizer
from transformers import GPT2Tokenizer

from vcb_nb.artifacts import InputError
from vcb_nb.loading import load_tokenizer
from vcb_nb.tokenizers import end_ids, match_tokenizer, same_tokenizer, separate_padding


def test_a_reward_models_padding_is_never_the_end(tokenizer):
    assert separate_padding(make_tokenizer(pad_token="<|endoftext|>")).pad_token == "<|padding|>"
    assert separate_padding(make_tokenizer("<|pad|>")).pad_token == "<|pad|>"
    assert separate_padding(tokenizer).pad_token_id == 1


@pytest.mark.parametrize("roles", [{}, {"pad_token": "<|endoftext|>"}])
def test_loading_adds_no_token(tmp_path, roles):
    "A stock tokenizer stays as it was published: its model has no row for a padding token."
    stock = make_tokenizer(**roles)
    stock.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(stock) and loaded.pad_token == stock.pad_token


def test_padding_does_not_make_another_tokenizer():
    "Whether a tokenizer has padding, and which token it is, changes no text's ids."
    kinds = [make_tokenizer(), make_tokenizer(pad_token="<|endoftext|>"),
             separate_padding(make_tokenizer()), make_tokenizer()]
    kinds[-1].add_special_tokens({"pad_token": "[PAD]"})
    assert all(same_tokenizer(a, b) for a, b in product(kinds, kinds))
    others = [make_tokenizer("<|user|>"), make_tokenizer("<|user|>", "<pad>", pad_token="<pad>")]
    assert not any(same_tokenizer(a, b) for a, b in product(kinds, others))


def named(eos, *more):
    "A model whose config, and generation config where there is one, name these ends."
    configs = [SimpleNamespace(eos_token_id=ids) for ids in (eos, *more)]
    return SimpleNamespace(**dict(zip(("config", "generation_config"), configs)))


def test_end_ids_are_those_of_generate_and_the_tokenizers():
    ends = SimpleNamespace(eos_token_id=3)
    assert end_ids(named(2, [1, 107]), ends) == {1, 3, 107}
    assert end_ids(named(2, None), ends) == end_ids(named(2), ends) == {2, 3}
    assert end_ids(named([7, 8]), None) == {7, 8} and end_ids(named(None), None) == set()


@pytest.mark.parametrize("name, pad_id, eos_id", [("gpt2", 50257, 50256), ("pythia_neox20b", 1, 0)])
def test_real_tokenizers(shared_data, tmp_path, name, pad_id, eos_id):
    "As published, neither pads; a reward model's takes the token meant for it, or adds one."
    files = shared_data/"tokenizers"/name
    if name == "gpt2":
        GPT2Tokenizer.from_pretrained(files).save_pretrained(tmp_path)
        files = tmp_path
    tokenizer = load_tokenizer(files)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (None, eos_id)
    assert separate_padding(tokenizer).pad_token_id == pad_id


def test_a_policy_gets_a_row_for_every_token(tokenizer):
    bare = make_tokenizer()
    model = tiny(bare)
    before = logits(model)
    match_tokenizer(model, separate_padding(bare))
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 320
    assert torch.equal(logits(model)[..., :before.shape[-1]], before)
    assert model.generation_config.pad_token_id == bare.pad_token_id


def test_tokenizer_mistakes_are_named(base, tmp_path, sft_adapter):
    with pytest.raises(InputError, match="neither a config.json nor a tokenizer"):
        load_tokenizer(tmp_path)
    folder, _ = sft_adapter
    for file in folder.glob("tokenizer*"): file.unlink()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()
    (tmp_path/"tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"): load_tokenizer(tmp_path)
