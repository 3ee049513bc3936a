"What the benchmarks of SFT and of reward training share: rows, and what their products allow."
import random, statistics
from collections import Counter
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from torch import nn

from vcb_nb.loading import as_dtype

from .common import (COLUMNS, EOS, Settings, World, alternate, best_rate, emit, make_model,
                     matmul_calls, option, peak_growth, records, spread, word_tokenizer)
from .flops import needed_flops

PRODUCTS = "products"


@dataclass(frozen=True)
class TrainingSettings(Settings):
    "A step of rows, or of pairs."
    n: int = option(1, "Responses to each prompt; 2 makes pairs.")
    prompts: int = option(8, "Rows, or pairs, in a step.")
    prompt_span: str = option("150-400", "Tokens of a prompt, spread evenly over the span.")
    response: str = option("10-60", "Tokens of a response, spread evenly over the span.")
    arch: str = option("smollm2-135m", Settings.__dataclass_fields__["arch"].metadata["help"])
    rounds: int = option(3, "Rounds; in each, every way runs once.")

    def __post_init__(self):
        longest = spread(self.prompt_span, self.prompts, "prompt_span")[-1]
        object.__setattr__(self, "prompt", longest)
        super().__post_init__()


def make_rows(s:TrainingSettings)->World:
    "Prompts and responses of many lengths in a random order; the same settings give the same."
    rng, tokenizer = random.Random(0), word_tokenizer(s.vocab)
    def ids(length): return [rng.randrange(2, s.vocab) for _ in range(length)]
    lengths = spread(s.response, s.prompts * s.n, "response")
    rng.shuffle(lengths)
    prompts = [ids(p) for p in spread(s.prompt_span, s.prompts, "prompt_span")]
    rng.shuffle(prompts)
    completions = [[ids(t - 1) + [0] for t in lengths[i::s.prompts]] for i in range(s.prompts)]
    model = make_model(s, tokenizer)
    return World(s, tokenizer, model, prompts, completions, [], None, TemporaryDirectory())


def text(ids:list)->str: return " ".join(f"t{i}" for i in ids if i)

def ended(ids:list)->str: return " " + text(ids) + EOS


# --- what its own products allow ----------------------------------------------------------------

def linear_shapes(model, tokens:int)->Counter: # (rows, inner, columns) -> how many
    "The products of the trunk's linear layers, of a forward."
    head = model.get_output_embeddings()
    return Counter((tokens, m.in_features, m.out_features) for m in model.modules()
                   if isinstance(m, nn.Linear) and m is not head and m.out_features > 1)


def needed_products(world:World, tokens:int, targets:int)->dict: # (batch, rows, inner, columns)
    """All products of a step, as forwards; a backward has two of the same size for each.

    Attention is counted as a dense square per sequence, of the mean length, and half of it.
    """
    s, model, config = world.settings, world.model, world.model.config
    found = {(1, *shape): count for shape, count in linear_shapes(model, tokens).items()}
    if model.get_output_embeddings() is not None:
        found[1, targets, config.hidden_size, config.vocab_size] = 1
    rows = sum(map(len, world.completion_ids))
    length = round(sum(len(p) + len(c) for p, cs in zip(world.prompt_ids, world.completion_ids)
                       for c in cs) / rows)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    once = world.settings.prompts # a prompt's square is computed once
    found[heads, length, size, length] = config.num_hidden_layers * once # scores and values, halved
    return found


def product_call(s, shape:tuple)->tuple: # a call, how often it computes its three products
    "A product and the two of its backward, repeated until there is something to time."
    batch, rows, inner, columns = shape
    kind = dict(dtype=as_dtype(s.dtype), device=s.device)
    left, right, grad = (torch.randn(batch, a, b, **kind) for a, b in (
        (rows, inner), (inner, columns), (rows, columns)))
    out = [torch.empty(batch, a, b, **kind) for a, b in (
        (rows, columns), (rows, inner), (inner, columns))]
    times = 1 + int(1e10 / (6 * batch * rows * inner * columns))
    def call():
        with torch.no_grad():
            for _ in range(times):
                torch.bmm(left, right, out=out[0])
                torch.bmm(grad, right.mT, out=out[1])
                torch.bmm(left.mT, grad, out=out[2])
    return call, times


def measure_step(bench:str, world:World, calls:dict, tokens:int, targets:int, whole:bool)->list:
    "Time every way and every product in one rotation, then the memory of each way."
    s, shapes = world.settings, needed_products(world, tokens, targets)
    products = {shape: product_call(s, shape) for shape in shapes}
    squares, flops = matmul_calls(s, tokens)
    times = alternate({**calls, **{k: call for k, (call, _) in products.items()}, **squares}, s,
                      world.free)
    bound = sum(count * statistics.median(times[shape]) / products[shape][1]
                for shape, count in shapes.items())
    peaks = {}
    for way, call in calls.items():
        peaks[way] = peak_growth(call, s)
        world.free()
    needed = needed_flops(world.model, world.prompt_ids, world.completion_ids, whole=whole)
    rows = records(bench, s, {way: times[way] for way in calls}, flops=needed,
                   rate=best_rate(times, flops), peaks=peaks, products_seconds=bound,
                   tokens=tokens, targets=targets, prompt_span=s.prompt_span)
    for row in rows: row["share_of_products"] = bound / row["seconds"]
    return rows


def show(rows:list, s)->None: emit(rows, s, (*COLUMNS, "share_of_products"))
