"The floating-point operations and the memory that a calibration step cannot do without."
from torch import nn
from transformers.pytorch_utils import Conv1D

from vcb_nb.batches import unwrap


def trunk_weights(model, trained:bool=False, # only those that get a gradient
                 )->int:
    "Weights that multiply every token: all linear layers but the vocabulary head."
    head = unwrap(model).get_output_embeddings()
    weights = [m.weight for m in model.modules()
               if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    return sum(w.numel() for w in weights if w.requires_grad or not trained)


def attended(prompt:int, # tokens
             fed:list, # tokens of each response that are fed
             dense:bool=False, # count what a mask hides as well
            )->int:
    "Pairs (query, key): a prompt sees itself, a response its prompt and itself."
    if dense: return prompt**2 + sum(own * (prompt + own) for own in fed)
    return prompt * (prompt + 1) // 2 + sum(own * prompt + own * (own + 1) // 2 for own in fed)


def needed_flops(model, prompt_ids:list, completion_ids:list,
                 backward:bool=True, # two products for each one of the forward
                 whole:bool=False, # the last token of a response is fed too: reward models
                 dense:bool=False, # attention without causal savings
                )->int:
    """The least for the log-probs of n responses to each prompt, each token computed once.

    With W trunk weights, U = Σ (P + Σ_i (T_i - 1)) fed tokens, A pairs (query, key), L layers,
    attention width a, N = Σ T_i response tokens, d the hidden size and V the vocabulary:

        forward = 2·W·U + 4·L·a·A + 2·N·V·d       (forward + backward = 3 · forward)

    so 6·W·U for the trunk, 12·L·a·A for attention (2 products forward, 4 backward) and three
    products of the head. A frozen weight (LoRA) has no gradient of its own: two products instead
    of three. Embedding look-ups, norms, softmax and recomputation count nothing.
    """
    config, head = unwrap(model).config, unwrap(model).get_output_embeddings()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or
                                          config.hidden_size // config.num_attention_heads)
    fed = [[len(c) - (not whole) for c in cs] for cs in completion_ids]
    tokens = sum(map(len, prompt_ids)) + sum(map(sum, fed))
    pairs = sum(attended(len(p), own, dense) for p, own in zip(prompt_ids, fed))
    trunk = 2 * trunk_weights(model) * tokens
    attention = 4 * config.num_hidden_layers * width * pairs
    answers = sum(len(c) for cs in completion_ids for c in cs)
    last = 0 if head is None else 2 * answers * head.weight.numel()
    if not backward: return trunk + attention + last
    own = 2 * trunk_weights(model, trained=True) * tokens # the weights' gradients
    if head is not None and head.weight.requires_grad: own += last
    return 2 * trunk + 3 * attention + 2 * last + own


def expected_memory(model, tokens:int, # fed in a step
                    checkpointing:bool=False)->int: # bytes
    """What a step in bf16 over fp32 weights takes on a GPU, on paper: the gradients, and 36 bytes
    for each token, layer and hidden unit, or 2 where checkpoints keep a layer's input only."""
    config, trained = unwrap(model).config, [p for p in model.parameters() if p.requires_grad]
    units = tokens * config.num_hidden_layers * config.hidden_size
    return 4 * sum(p.numel() for p in trained) + (2 if checkpointing else 36) * units
