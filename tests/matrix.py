"""Architectures as they are published, tiny and with random weights, taken through the stages.

`python tests/matrix.py` writes the table of nbs/models.qmd again."""
import json, logging, tempfile
from pathlib import Path

import torch
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM

from vcb_nb.artifacts import InputError
from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.loading import load_policy
from vcb_nb.logprobs import score_logps
from vcb_nb.models import new_config
from vcb_nb.packing import supports_packing
from vcb_nb.sample import _refuse_sharing, sample_candidates
from vcb_nb.saving import save_model

PAGE = Path(__file__).parent.parent/"nbs"/"models.qmd"
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

# Name on the page: (model_type, settings). A setting that is None leaves the class's default.
MODELS = {
    "Llama": ("llama", {}), "Llama 3 (several ends)": ("llama", dict(eos_token_id=[0, 5])),
    "Qwen3-Next": ("qwen3_next", dict(num_experts=4, num_experts_per_tok=2, num_hidden_layers=4)),
    "DeepSeek-V3": ("deepseek_v3", dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                                        topk_group=1, q_lora_rank=16, kv_lora_rank=16,
                                        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
                                        head_dim=8)),
    "Qwen2": ("qwen2", {}), "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", MOE), "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", dict(num_local_experts=4)),
    "Gemma": ("gemma", {}), "Gemma 2": ("gemma2", {}), "Gemma 3": ("gemma3_text", {}),
    "Phi": ("phi", {}), "Phi-3": ("phi3", {}), "OLMo 2": ("olmo2", {}),
    "OLMoE": ("olmoe", dict(num_experts=4, num_experts_per_tok=2)),
    "GPT-2": ("gpt2", dict(intermediate_size=None)),
    "GPT-J": ("gptj", dict(intermediate_size=None, rotary_dim=8)),
    "GPT-Neo": ("gpt_neo", dict(attention_types=[[["global", "local"], 1]])),
    "GPT-NeoX": ("gpt_neox", {}), "GPT-OSS": ("gpt_oss", dict(num_local_experts=4)),
    "Falcon": ("falcon", dict(intermediate_size=None)),
    "Bloom": ("bloom", dict(intermediate_size=None)),
    "OPT": ("opt", dict(intermediate_size=None, ffn_dim=64, word_embed_proj_dim=32)),
    "Granite": ("granite", {}), "Cohere": ("cohere", {}), "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {}), "SmolLM3": ("smollm3", {}),
    "LFM2": ("lfm2", dict(full_attn_idxs=[1])),
    "Jamba": ("jamba", dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1,
                            expert_layer_period=2)),
    "Falcon-H1": ("falcon_h1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                                    mamba_d_state=8)),
    "Mamba": ("mamba", dict(num_attention_heads=None, intermediate_size=None)),
    "MiniMax": ("minimax", {}), "OLMo Hybrid": ("olmo_hybrid", {}),
}
QUICK = ["Llama", "Gemma 2", "GPT-2", "Mixtral", "Bloom", "OPT", "Jamba", "LFM2", "Falcon", "Phi-3"]
STAGES = ("sample", "log-probs", "calibrate", "LoRA")
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def build(name, folder):
    "The stock model of a name, saved: as many rows as tokens, no padding."
    (architecture, settings), tokenizer = MODELS[name], make_tokenizer()
    sizes = {k: v for k, v in {**SIZES, **settings}.items() if v is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(new_config(tokenizer, architecture, **sizes))
    return save_model(model, tokenizer, folder), tokenizer


def plain(folder, ids):
    "log π(y|x) by transformers alone, a candidate at a time."
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    def logp(prompt, own):
        with torch.no_grad(): logits = model(torch.tensor([prompt + own])).logits[0]
        logps = logits[len(prompt) - 1:-1].double().log_softmax(-1)
        return logps.gather(1, torch.tensor(own)[:, None]).sum().item()
    return torch.tensor([[logp(p, own) for own in owns] for p, owns in zip(PROMPTS, ids)])


def close(ours, want):
    torch.testing.assert_close(torch.as_tensor(ours), want, atol=1e-4, rtol=0, check_dtype=False)


def trained(folder, out, ids, logps, peft):
    "Calibrate a step, save, and compare with plain transformers; 'packed' or 'rows'."
    rows = [{"prompt": "x", "prompt_ids": p, "completions": [""] * 3, "completion_ids": own,
             "finish_reasons": ["length"] * 3, "rewards": [0., 1., 2.], "ref_logps": refs}
            for p, own, refs in zip(PROMPTS, ids, logps)]
    file = Path(str(out) + ".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibrate(CalibrationConfig(str(out), model=str(folder), candidates=str(file), eval_share=0,
                                peft_config=peft, max_steps=1, learning_rate=1e-3, use_cpu=True,
                                per_device_train_batch_size=3, report_to="none",
                                save_strategy="no", gradient_accumulation_steps=1))
    close(score_logps(load_policy(out/"model"), PROMPTS, ids), plain(out/"model", ids))


def cells(name, folder=None):
    "The outcome of each stage: 'packed', 'rows', or 'refused: ' and why. Nothing else is raised."
    folder, found = Path(folder or tempfile.mkdtemp()), {}
    try:
        saved, tokenizer = build(name, folder/"model")
        model = load_policy(saved).eval()
        way = "packed" if supports_packing(model, 16)[0] else "rows"
        drawn = sample_candidates(model, tokenizer, PROMPTS, 3, max_new_tokens=5)
        ids, _, logps = drawn
        close(logps, plain(saved, ids))
        found["sample"] = "rows" if _refuse_sharing(model) else "packed"
        close(score_logps(model, PROMPTS, ids), plain(saved, ids))
        found["log-probs"] = way
        trained(saved, folder/"full", ids, logps, None)
        found["calibrate"] = way
        trained(saved, folder/"lora", ids, logps, {"r": 2, "target_modules": "all-linear"})
        found["LoRA"] = way
    except InputError as e:
        stage = next(s for s in STAGES if s not in found)
        said = str(e).replace(str(folder/"model"), "the folder").replace("|", "/")
        found[stage] = "refused: " + said.partition(". ")[0] + "."
    return {stage: found.get(stage, "–") for stage in STAGES}


def line(name, found):
    "A row of the page's table."
    return " | ".join([f"| {name}", f"`{MODELS[name][0]}`", *(found[s] for s in STAGES)]) + " |"


def write(path=PAGE):
    "Make the page's table again."
    head, _, _ = path.read_text("utf-8").partition("| model |")
    columns = ["model", "type", *STAGES]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += [line(name, cells(name)) for name in MODELS]
    path.write_text(head + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    logging.disable()
    write()
