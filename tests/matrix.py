"""Architectures as they are published, tiny and with random weights, taken through the stages.

`python tests/matrix.py` writes the table of nbs/models.qmd again."""
import json, logging, re, tempfile
from pathlib import Path

import torch
from tiny_models import make_tokenizer, plain_logp
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from vcb_nb.artifacts import InputError
from vcb_nb.calibrate import CalibrationConfig, calibrate
from vcb_nb.decoding import refuse_sharing
from vcb_nb.diagnosis import DiagnoseConfig, diagnose
from vcb_nb.judges import reward_scores
from vcb_nb.loading import load_policy, load_reward_model, new_reward_model
from vcb_nb.logprobs import score_logps
from vcb_nb.measures import calibration_gaps
from vcb_nb.models import new_config
from vcb_nb.packing import supports_packing
from vcb_nb.sample import sample_candidates
from vcb_nb.saving import save_model

PAGE = Path(__file__).parent.parent/"nbs"/"models.qmd"
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# As tiny as they are, models would not reach the caps and the window of their kind.
CAPS = dict(attn_logit_softcapping=.5, final_logit_softcapping=1., sliding_window=4,
            initializer_range=.1)

# Name on the page: (model_type, settings). A setting that is None leaves the class's default.
MODELS = {
    "Llama": ("llama", {}), "Llama 3 (several ends)": ("llama", dict(eos_token_id=[0, 5])),
    "Qwen3-Next": ("qwen3_next", dict(num_experts=4, num_experts_per_tok=2, num_hidden_layers=4)),
    "DeepSeek-V3": ("deepseek_v3", dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                                        topk_group=1, q_lora_rank=16, kv_lora_rank=16,
                                        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=24,
                                        head_dim=8)),
    "Qwen2": ("qwen2", {}), "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", MOE), "Mistral": ("mistral", dict(sliding_window=4)),
    "Mixtral": ("mixtral", dict(num_local_experts=4)),
    "Gemma": ("gemma", {}), "Gemma 2": ("gemma2", CAPS), "Gemma 3": ("gemma3_text", {}),
    "Phi": ("phi", {}), "Phi-3": ("phi3", {}), "OLMo 2": ("olmo2", {}),
    "OLMoE": ("olmoe", dict(num_experts=4, num_experts_per_tok=2)),
    "GPT-2": ("gpt2", dict(intermediate_size=None)),
    "GPT-J": ("gptj", dict(intermediate_size=None, rotary_dim=8)),
    "GPT-Neo": ("gpt_neo", dict(attention_types=[[["global", "local"], 1]])),
    "GPT-NeoX": ("gpt_neox", {}), "GPT-OSS": ("gpt_oss", dict(num_local_experts=4)),
    "Falcon": ("falcon", dict(intermediate_size=None)),
    "Bloom": ("bloom", dict(intermediate_size=None)),
    "OPT": ("opt", dict(intermediate_size=None, ffn_dim=64, word_embed_proj_dim=32)),
    "Granite": ("granite", dict(logits_scaling=6.)), "Cohere": ("cohere", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {}), "SmolLM3": ("smollm3", {}),
    "LFM2": ("lfm2", dict(full_attn_idxs=[1])),
    "Jamba": ("jamba", dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1,
                            expert_layer_period=2)),
    "Falcon-H1": ("falcon_h1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                                    mamba_d_state=8)),
    "Mamba": ("mamba", dict(num_attention_heads=None, intermediate_size=None)),
    "Mamba 2": ("mamba2", dict(num_attention_heads=None, intermediate_size=None, num_heads=4,
                               head_dim=16, state_size=8, n_groups=1)),
    "RecurrentGemma": ("recurrent_gemma", dict(lru_width=32, num_hidden_layers=3,
                                               attention_window_size=8)),
    "MiniMax": ("minimax", {}), "OLMo Hybrid": ("olmo_hybrid", {}),
}
QUICK = ["Llama", "Gemma 2", "GPT-2", "Mixtral", "Bloom", "OPT", "Jamba", "LFM2", "Falcon", "Phi-3"]
STAGES = ("sample", "log-probs", "reward", "calibrate", "LoRA", "diagnose")
PROMPTS, REWARDS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [0., 1., 2.]


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
    return torch.tensor([[plain_logp(model, p, own) for own in owns]
                         for p, owns in zip(PROMPTS, ids)])


def close(ours, want):
    torch.testing.assert_close(torch.as_tensor(ours), want, atol=1e-4, rtol=0, check_dtype=False)


def way_of(model)->str: return "packed" if supports_packing(model, 16)[0] else "rows"


def candidate_file(path, tokenizer, ids, logps):
    "The samples as scored candidates."
    rows = [{"prompt": tokenizer.decode(p), "completions": tokenizer.batch_decode(own),
             "prompt_ids": p, "completion_ids": own,
             "finish_reasons": ["length"] * 3, "rewards": REWARDS, "ref_logps": refs}
            for p, own, refs in zip(PROMPTS, ids, logps)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Trial:
    "One stock model through the stages: each method gives 'packed' or 'rows', or raises."
    def __init__(self, name, folder):
        self.folder = Path(folder)
        self.saved, self.tokenizer = build(name, self.folder/"model")

    def sample(self):
        self.model = load_policy(self.saved).eval()
        self.ids, _, logps = sample_candidates(self.model, self.tokenizer, PROMPTS, 3,
                                               max_new_tokens=5)
        close(logps, plain(self.saved, self.ids))
        self.file = candidate_file(self.folder/"candidates.jsonl", self.tokenizer, self.ids,
                                   logps)
        return "rows" if refuse_sharing(self.model) else "packed"

    def log_probs(self):
        close(score_logps(self.model, PROMPTS, self.ids), plain(self.saved, self.ids))
        return way_of(self.model)

    def reward(self):
        "A reward model on the same trunk, saved and loaded: a row has one score."
        fresh = new_reward_model(str(self.saved), make_tokenizer())
        path = save_model(fresh, make_tokenizer(), self.folder/"reward")
        other = AutoModelForSequenceClassification.from_pretrained(path).eval()
        def score(ids):
            with torch.no_grad(): return other(torch.tensor([ids])).logits.item()
        want = [[score(p + own) for own in owns] for p, owns in zip(PROMPTS, self.ids)]
        ours = load_reward_model(path)
        close(reward_scores(ours, PROMPTS, self.ids), torch.tensor(want))
        return way_of(ours)

    def calibrate(self, name="full", peft=None):
        "A step, saved, and compared with plain transformers."
        out = self.folder/name
        calibrate(CalibrationConfig(
            str(out), model=str(self.saved), candidates=str(self.file), eval_share=0,
            peft_config=peft, max_steps=1, learning_rate=1e-3, use_cpu=True, report_to="none",
            per_device_train_batch_size=3, save_strategy="no", gradient_accumulation_steps=1))
        close(score_logps(load_policy(out/"model"), PROMPTS, self.ids),
              plain(out/"model", self.ids))
        return way_of(self.model)

    def lora(self): return self.calibrate("lora", {"r": 2, "target_modules": "all-linear"})

    def diagnose(self):
        "Gaps of log-ratios as plain transformers gives them."
        trained = self.folder/"full"/"model"
        found = diagnose(DiagnoseConfig(policy=str(trained), reference=str(self.saved),
                                        candidates=str(self.file), n_boot=20, device="cpu",
                                        output_dir=str(self.folder/"diagnose")))
        ratios = plain(trained, self.ids) - plain(self.saved, self.ids)
        units = [torch.tensor(REWARDS).numpy()] * len(PROMPTS) # σ of 0, 1, 2 is 1
        close(found["points"], torch.tensor(calibration_gaps(units, ratios.numpy())))
        return way_of(self.model)


def cells(name, folder=None):
    "The outcome of each stage: 'packed', 'rows', or 'refused: ' and why. No other error passes."
    folder, found = Path(folder or tempfile.mkdtemp()), dict.fromkeys(STAGES, "–")
    trial = Trial(name, folder)
    for stage, method in zip(STAGES, (trial.sample, trial.log_probs, trial.reward,
                                      trial.calibrate, trial.lora, trial.diagnose)):
        try: found[stage] = method()
        except InputError as e:
            found[stage] = "refused: " + refusal(e, folder/"model", MODELS[name][0])
            if stage == "sample": break # nothing to go on with
    return found


def refusal(error, folder, architecture)->str:
    "What an error says, without what differs from model to model."
    said = str(error).replace(str(folder), "MODEL").replace(architecture, "ARCHITECTURE")
    return re.sub(r" Incompatible modules: {.*?}\.", "", said)


def line(name, found):
    "A row of the page's table."
    words = (found[stage].partition(":")[0] for stage in STAGES)
    return " | ".join([f"| {name}", f"`{MODELS[name][0]}`", *words]) + " |"


def refusals(found)->list:
    "What the page lists below the table."
    said = (cell.removeprefix("refused: ") for cell in found.values() if ":" in cell)
    return [f"- {text}" for text in dict.fromkeys(said)]


def write(path=PAGE):
    "Make the page's table again."
    head, _, _ = path.read_text("utf-8").partition("| model |")
    columns = ["model", "type", *STAGES]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    found = {name: cells(name) for name in MODELS}
    lines += [line(name, one) for name, one in found.items()]
    said = dict.fromkeys(text for one in found.values() for text in refusals(one))
    lines += ["", "The refusals say, with the names in the places of the capitals:", "", *said]
    path.write_text(head + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    logging.disable()
    write()
