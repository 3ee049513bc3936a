"""The attention of a packed row alone, forward and backward: SDPA piece by piece, as the library
does it, FlexAttention with one mask, and flash attention over sequences of unequal length."""
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vcb_nb.loading import as_dtype
from vcb_nb.packing import pack_candidates, packed_attention

from .common import Settings, alternate, emit, peak_growth, records, run
from .flops import attended

WAYS = ("pieces", "flex", "varlen")


def make_layout(s:Settings):
    "The packed row of the settings: its ids are never read."
    responses = [[1] * length for length in s.lengths()]
    return pack_candidates([[1] * s.prompt] * s.prompts, [responses] * s.prompts).to(s.device)


def make_inputs(s:Settings, length:int)->list: # query, key, value [1, heads, length, head size]
    "Random numbers with gradients."
    kind = dict(dtype=as_dtype(s.dtype), device=s.device, requires_grad=True)
    return [torch.randn(1, s.heads, length, s.hidden // s.heads, **kind) for _ in range(3)]


# --- three ways to the same outputs ----------------------------------------------------------

def pieces(layout, query, key, value)->torch.Tensor: # [1, length, heads, head size]
    "The library's own: a causal piece for each prompt, a piece for each response."
    module = torch.nn.Module()
    module.is_causal, module.training = True, True
    return packed_attention(module, query, key, value, None, packing=layout)[0]


def owners(layout)->tuple: # group, response (0: the prompt) of each place, [length]
    "Whose each place of the row is."
    groups = [(g, i) for g, sizes in enumerate(layout.groups) for i, size in enumerate(sizes)
              for _ in range(size)]
    return torch.tensor(groups, device=layout.input_ids.device).unbind(1)


def flex(layout):
    "A function of query, key and value: one call, compiled on a GPU, with a mask of blocks."
    group, response = owners(layout)
    def sees(batch, head, q, k):
        own = (response[k] == 0) | (response[k] == response[q])
        return (group[q] == group[k]) & own & (k <= q)
    length, device = len(group), str(group.device)
    mask = create_block_mask(sees, None, None, length, length, device=device)
    call = torch.compile(flex_attention, dynamic=True) if group.is_cuda else flex_attention
    return lambda *inputs: call(*inputs, block_mask=mask).transpose(1, 2)


def sequences(layout)->tuple: # places of all keys; cumulated lengths of queries and of keys
    "Each prompt and each response as a sequence of its own, behind its prompt."
    places, queries, keys, start = [], [0], [0], 0
    for prompt, *owns in layout.groups:
        head, first = range(start, start + prompt), start + prompt
        for own in (0, *filter(None, owns)): # 0: the prompt itself
            places += [*head, *range(first, first + own)]
            queries.append(queries[-1] + (own or prompt))
            keys.append(len(places))
            first += own
        start = first
    return places, queries, keys


def varlen(layout):
    "A function of query, key and value: flash attention over unequal sequences, keys copied."
    from torch.nn.attention.varlen import varlen_attn
    places, *ends = sequences(layout)
    device = layout.input_ids.device
    places = torch.tensor(places, device=device)
    sizes = [max(b - a for a, b in zip(end, end[1:])) for end in ends]
    ends = [torch.tensor(end, dtype=torch.int32, device=device) for end in ends]
    def call(query, key, value):
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return varlen_attn(query, key[places], value[places], *ends, *sizes,
                           window_size=(-1, 0))[None]
    return call


MAKERS = {"pieces": lambda layout: lambda *inputs: pieces(layout, *inputs), "flex": flex,
          "varlen": varlen}


def attention_call(s:Settings, layout, inputs:list, way:str):
    "Forward and backward of one layer's attention."
    attend = MAKERS[way](layout)
    def call():
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return call


def runs(way:str, call)->bool:
    "Does it run on this device? If not, say why."
    try: call()
    except (RuntimeError, NotImplementedError, ImportError, ValueError) as e:
        print(f"{way} does not run here: {str(e).strip().partition('. ')[0]}.", file=sys.stderr)
        return False
    return True


def measure(s):
    layout = make_layout(s)
    inputs = make_inputs(s, layout.input_ids.shape[1])
    calls = {way: attention_call(s, layout, inputs, way) for way in s.chosen(WAYS)}
    calls = {way: call for way, call in calls.items() if runs(way, call)}
    times = alternate(calls, s)
    pairs = s.prompts * attended(s.prompt, [length - 1 for length in s.lengths()])
    rows = records("attention", s, times, peaks={way: peak_growth(calls[way], s) for way in calls},
                   needed_gflop=12 * s.hidden * pairs / 1e9)
    emit(rows, s)


if __name__ == "__main__": run("benchmarks.attention", measure)
