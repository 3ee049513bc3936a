"Tiny models and their tokenizer, for the tests of what makes, loads and saves them."
import pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vcb_nb.adapters import add_lora
from vcb_nb.loading import load_policy
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model

ARCHITECTURES = ["gpt_neox", "gpt2", "llama", "qwen2"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def make_tokenizer(*special, **roles):
    "A byte-level tokenizer whose EOS is id 0."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **roles)


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer("<|padding|>", pad_token="<|padding|>")


def tiny(tokenizer, architecture="gpt_neox", **kwargs):
    return new_policy(tokenizer, architecture,
                      **{"hidden_size": 32, "num_hidden_layers": 2, **kwargs})


def logits(model, ids=IDS): return model(ids).logits.detach()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return save_model(tiny(tokenizer), tokenizer, tmp_path_factory.mktemp("models")/"base")


@pytest.fixture
def sft_adapter(base, tokenizer, tmp_path):
    "A LoRA adapter that has moved the model, saved without its base."
    model = add_lora(load_policy(base), {"r": 4, "init_lora_weights": False})
    return save_model(model, tokenizer, tmp_path/"sft", merge=False), logits(model)


def plain_logp(model, prompt, own)->float:
    "The oracle: log π(own | prompt) by transformers alone, without padding or a cache."
    with torch.no_grad(): logits = model(torch.tensor([prompt + own])).logits[0].double()
    logps = logits[len(prompt) - 1:-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(own)[:, None]).sum().item()
