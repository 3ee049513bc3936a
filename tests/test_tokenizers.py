"Tokenizers: the end is not the padding, every token has its row, and mistakes are named."
import pytest, torch
from tiny_models import base, logits, make_tokenizer, sft_adapter, tiny, tokenizer
from transformers import GPT2Tokenizer

from vcb_nb.artifacts import InputError
from vcb_nb.loading import load_tokenizer
from vcb_nb.tokenizers import match_tokenizer, separate_padding


def test_padding_is_never_the_end(tokenizer, tmp_path):
    assert separate_padding(make_tokenizer(pad_token="<|endoftext|>")).pad_token == "<|padding|>"
    assert separate_padding(make_tokenizer("<|pad|>")).pad_token == "<|pad|>"
    assert separate_padding(tokenizer).pad_token_id == 1
    make_tokenizer(pad_token="<|endoftext|>").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == len(loaded) - 1 != loaded.eos_token_id


@pytest.mark.parametrize("name, pad_id, eos_id", [("gpt2", 50257, 50256), ("pythia_neox20b", 1, 0)])
def test_real_tokenizers(shared_data, tmp_path, name, pad_id, eos_id):
    files = shared_data/"tokenizers"/name
    if name == "gpt2":
        GPT2Tokenizer.from_pretrained(files).save_pretrained(tmp_path)
        files = tmp_path
    tokenizer = load_tokenizer(files)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (pad_id, eos_id)


def test_a_policy_gets_a_row_for_every_token(tokenizer):
    bare = make_tokenizer()
    model = tiny(bare)
    before = logits(model)
    match_tokenizer(model, separate_padding(bare))
    assert model.get_input_embeddings().num_embeddings == len(bare) == model.config.vocab_size
    assert torch.equal(logits(model)[..., :-1], before)
    assert model.generation_config.pad_token_id == bare.pad_token_id


def test_tokenizer_mistakes_are_named(base, tmp_path, sft_adapter):
    with pytest.raises(InputError, match="neither a config.json nor a tokenizer"):
        load_tokenizer(tmp_path)
    folder, _ = sft_adapter
    for file in folder.glob("tokenizer*"): file.unlink()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()
    (tmp_path/"tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"): load_tokenizer(tmp_path)
