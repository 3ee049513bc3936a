"""The table of bad inputs: what is wrong, in which stage, and the words that the one message holds.

A value in `changes` is a setting, a `File` that is written for the case, or a function that makes
a folder `(world, own) -> path`; `{name}` in a text is a path of `build_world`.
"""
import gzip, json, shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vcb_nb.artifacts import write_json, write_jsonl
from vcb_nb.data import train_tokenizer
from vcb_nb.loading import new_reward_model
from vcb_nb.models import new_policy
from vcb_nb.sample import SampleConfig, sample
from vcb_nb.saving import save_model
from vcb_nb.score import ScoreConfig, score

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
             max_position_embeddings=96)
PROMPTS = ["The soup", "A small room with a view;", "He said that", "How was the film?"]


@dataclass
class File:
    "A file of a case: text, bytes, or rows of JSON."
    name: str
    content: object

    def write(self, folder:Path)->Path:
        path, content = folder/self.name, self.content
        if isinstance(content, list): content = "".join(json.dumps(row) + "\n" for row in content)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path


@dataclass
class Case:
    "One bad input: a stage's settings, of which `changes` are wrong, and what the message holds."
    name: str
    stage: str
    changes: dict
    says: tuple
    env: dict = field(default_factory=dict)


def length(prompt, completion): return float(len(completion))
def nan_for_films(prompt, completion): return float("nan") if "film" in prompt else 1.
def text(prompt, completion): return "good"
def one_too_few(prompts, completions): return [1.] * (len(prompts) - 1)
one_too_few.batched = True


# ---- what is right

def build_world(folder:Path, tokenizer)->dict: # name → path
    "The smallest models and files that every stage accepts."
    other = train_tokenizer(["Quite another text, in words of its own."] * 3, 300)
    for name, own, seed in (("policy", tokenizer, 0), ("stranger", other, 1)):
        save_model(new_policy(own, seed=seed, **SIZES), own, folder/name)
    save_model(new_reward_model(folder/"policy", tokenizer), tokenizer, folder/"judge")
    write_jsonl(folder/"prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    write_jsonl(folder/"demos.jsonl", [{"prompt": p, "completion": " fine."} for p in PROMPTS])
    write_jsonl(folder/"pairs.jsonl", [{"prompt": p, "chosen": " good", "rejected": " bad"}
                                       for p in PROMPTS * 5])
    for name in ("policy", "stranger"):
        sample(SampleConfig(str(folder/name), str(folder/"prompts.jsonl"),
                            str(folder/f"{name}_samples"), n=3, max_new_tokens=16, device="cpu"))
    score(ScoreConfig(str(folder/"policy_samples"), str(folder/"scored"), device="cpu",
                      reward="bad_inputs:length", reference=str(folder/"policy")))
    names = ("policy", "stranger", "judge", "policy_samples", "stranger_samples", "scored")
    files = {name: folder/f"{name}.jsonl" for name in ("prompts", "demos", "pairs")}
    return {**{name: folder/name for name in names}, **files}


TRAINING = dict(use_cpu=True, max_steps=1, per_device_train_batch_size=2, report_to="none",
                disable_tqdm=True)
RIGHT = {
    "data": dict(pairs=["{pairs}"], test_share=.3, validation_share=.3),
    "sft": dict(model="{policy}", data="{demos}", max_length=64, max_prompt_length=32, **TRAINING),
    "pretrain": dict(model="{policy}", data="{demos}", objective="text", max_length=32, **TRAINING),
    "reward": dict(model="{policy}", pairs="{pairs}", max_length=64, max_prompt_length=32,
                   **TRAINING),
    "sample": dict(policy="{policy}", prompts="{prompts}", n=3, max_new_tokens=4),
    "score": dict(candidates="{policy_samples}", reward="bad_inputs:length", reference="{policy}"),
    "calibrate": dict(model="{policy}", candidates="{scored}", **TRAINING),
    "online": dict(model="{policy}", prompts="{prompts}", reward="bad_inputs:length", n=3,
                   max_new_tokens=4, **TRAINING),
    "evaluate": dict(reference="{policy}", policies={"again": "{policy}"}, prompts="{prompts}", n=2,
                     reward="bad_inputs:length", n_boot=20, max_new_tokens=4),
    "diagnose": dict(policy="{policy}", reference="{policy}", candidates="{scored}", n_boot=20),
    "report": dict(run="{scored}"),
}


# ---- model folders that are none

def changed_copy(name, change):
    "A function that copies a model of the world and spoils the copy."
    def make(world, own):
        shutil.copytree(world[name], own/"model")
        change(own/"model")
        return own/"model"
    return make


def without(*names):
    def change(folder):
        for name in names:
            for path in folder.glob(name): path.unlink()
    return change


def rewrite(name, content): return lambda folder: (folder/name).write_text(content)


def setting(name, **values):
    "Change keys of a JSON file; None takes the key out."
    def change(folder):
        content = {**json.loads((folder/name).read_text()), **values}
        write_json(folder/name, {k: v for k, v in content.items() if v is not None})
    return change


def without_tensor(name):
    def change(folder):
        tensors = load_file(folder/"model.safetensors")
        del tensors[name]
        save_file(tensors, folder/"model.safetensors", {"format": "pt"})
    return change


def two_labels(folder):
    tensors = load_file(folder/"model.safetensors")
    tensors["score.weight"] = torch.cat([tensors["score.weight"]] * 2)
    save_file(tensors, folder/"model.safetensors", {"format": "pt"})
    setting("config.json", id2label={"0": "bad", "1": "good"}, num_labels=2,
            label2id={"bad": 0, "good": 1})(folder)


def pickled(folder):
    torch.save(load_file(folder/"model.safetensors"), folder/"pytorch_model.bin")
    (folder/"model.safetensors").unlink()


def truncated(folder):
    path = folder/"model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def raw_tokenizer(folder):
    "A tokenizer's older form, in an architecture for which transformers has no rule of splitting."
    vocabulary = json.loads((folder/"tokenizer.json").read_text())["model"]["vocab"]
    without("tokenizer*")(folder)
    write_json(folder/"vocab.json", vocabulary)
    (folder/"merges.txt").write_text("")
    setting("config.json", model_type="llama", architectures=["LlamaForCausalLM"])(folder)


def only_merges(folder):
    raw_tokenizer(folder)
    (folder/"vocab.json").rename(folder/"tokenizer_config.json").write_text("{}")


def an_empty_folder(world, own):
    (own/"empty").mkdir()
    return own/"empty"


def a_folder_of(**files):
    def make(world, own):
        (own/"folder").mkdir()
        for name, content in files.items(): File(name + ".jsonl", content).write(own/"folder")
        return own/"folder"
    return make


# ---- what is wrong

PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
GOOD = json.dumps(PAIR) + "\n"
LIST = {"prompt": "a", "completions": [" b", " c", " d"], "rewards": [1., 2., 3.]}


def pairs(name, content, *says, file="p.jsonl"):
    return Case(name, "reward", {"pairs": File(file, content)}, (file, *says))


def candidates(name, rows, *says, stage="calibrate", **changes):
    return Case(name, stage, {"candidates": File("c.jsonl", rows), **changes}, says)


def ids(completion_ids, **changes):
    "A file of one row with token ids; its texts are empty, so that they contradict none."
    return json.dumps({**LIST, "completions": [""] * 3, "prompt_ids": [4],
                       "completion_ids": completion_ids, **changes})


def second(**changes): return [LIST, {**LIST, **changes}]


FILES = [
    pairs("missing column", [{"prompt": "a", "chosen": "b"}], "no column 'rejected'", "add the"),
    pairs("misspelt column", [{"prompt": "a", "choosen": "b", "rejected": "c"}],
          "no column 'chosen'", "Did you mean 'choosen'?"),
    pairs("column missing in a later row", [PAIR, {"prompt": "a", "chosen": "b"}],
          "p.jsonl:2", "'rejected'"),
    pairs("number for a text", [PAIR, {**PAIR, "chosen": 3}], "p.jsonl:2", "chosen must be a str"),
    pairs("null for a text", [PAIR, {**PAIR, "chosen": None}], "p.jsonl:2", "not null"),
    pairs("messages without a template",
          [{**PAIR, "prompt": [{"role": "user", "content": text}]} for text in "ab"],
          "p.jsonl: ", "no chat template"),
    pairs("messages in a later row", [PAIR, {**PAIR, "prompt": [{"role": "user", "content": "a"}]}],
          "p.jsonl:2", "a list of messages"),
    pairs("text for a margin", [{**PAIR, "margin": "big"}], "p.jsonl:1", "margin must be a number"),
    pairs("infinite margin", [{**PAIR, "margin": 1.}, {**PAIR, "margin": float("inf")}],
          "p.jsonl:2", "margin is inf"),
    pairs("empty file", "", "no rows"),
    pairs("blank lines only", "\n \n\n", "no rows"),
    pairs("empty gzip", "", "no rows", file="p.jsonl.gz"),
    pairs("broken line", GOOD * 2 + '{"prompt": \n', "p.jsonl:3", "not JSON",
          "complete JSON object"),
    pairs("broken line in gzip", GOOD * 2 + '{"prompt": \n', "p.jsonl.gz:3", "not JSON",
          file="p.jsonl.gz"),
    pairs("line without an object", GOOD + "[1, 2]\n", "p.jsonl:2", "named columns"),
    pairs("line nested too deep", GOOD + "[" * 100_000 + "\n", "p.jsonl:2", "nested"),
    pairs("number of 5000 digits", GOOD + '{"prompt": ' + "7" * 5000 + "}\n", "p.jsonl:2"),
    pairs("half a surrogate pair", GOOD[:-2] + ', "note": "\\ud800"}\n', "p.jsonl:1", "surrogate"),
    pairs("array with a broken row", "[" + GOOD + ", 3]", "p.json, row 1", file="p.json"),
    pairs("broken array", "[" + GOOD, "p.json:", "not JSON", file="p.json"),
    pairs("not UTF-8", GOOD.encode() + b'{"prompt": "caf\xe9"}\n', "p.jsonl:2", "0xe9", "UTF-8"),
    pairs("UTF-16", GOOD.encode("utf-16"), "p.jsonl:1", "not UTF-8", "Save the file as UTF-8"),
    pairs("rows without a preference", [{**PAIR, "rejected": " b"}] * 2,
          "no usable row", "chosen equals rejected: 2"),
    Case("gzip that is none", "reward", {"pairs": lambda world, own: shutil.copy(
        world["pairs"], own/"p.jsonl.gz")}, ("p.jsonl.gz", "broken gzip", "Download")),
    Case("Parquet that is none", "reward", {"pairs": lambda world, own: shutil.copy(
        world["pairs"], own/"p.parquet")}, ("p.parquet", "cannot be read", "Download or write")),
    Case("saved data set without its files", "reward",
         {"pairs": lambda world, own: File("state.json", "{}").write(own).parent},
         ("cannot be read", "own")),
    Case("missing file", "reward", {"pairs": "{pairs}.gz"}, ("pairs.jsonl.gz does not exist",
                                                              "Did you mean 'pairs.jsonl'?")),
    Case("no file and no name on the hub", "reward", {"pairs": "nobody/nothing"},
         ("'nobody/nothing'", "from the Hub", "Correct the name")),
    Case("unknown kind of file", "reward", {"pairs": File("p.xlsx", "a,b")},
         ("p.xlsx", "unknown kind", ".jsonl")),
    Case("folder without data", "reward", {"pairs": an_empty_folder}, ("empty", "no .jsonl")),
    Case("folder of several splits", "reward", {"pairs": a_folder_of(train=[PAIR], test=[PAIR])},
         ("several splits", "#test")),
    Case("misspelt demonstrations", "sft",
         {"data": File("d.jsonl", [{"prompt": "a", "compl": "b"}])},
         ("d.jsonl", "no column 'completion'", "Did you mean 'compl'?")),
    Case("demonstrations that say nothing", "sft",
         {"data": File("d.jsonl", [{"prompt": "a", "completion": " "}] * 3)},
         ("d.jsonl", "no usable row", "empty completion: 3")),
    Case("texts that say nothing", "pretrain", {"data": File("t.jsonl", [{"text": ""}] * 3)},
         ("t.jsonl", "no text")),
    Case("a single demonstration to split", "sft", {"data": File("d.jsonl", [
        {"prompt": "a", "completion": " b"}])}, ("single prompt cannot be split", "eval_share: 0")),
    Case("prompts without prompts", "sample", {"prompts": File("x.jsonl", [{"promt": "a"}])},
         ("x.jsonl", "Did you mean 'promt'?")),
    Case("one empty prompt among thousands", "sample",
         {"prompts": File("x.jsonl", [{"prompt": f"p {i}"} for i in range(1500)]
                          + [{"prompt": ""}] + [{"prompt": f"q {i}"} for i in range(500)])},
         ("x.jsonl", "prompt 1500", "no tokens", "Remove it")),
    Case("one long prompt among thousands", "sample",
         {"prompts": File("x.jsonl", [{"prompt": f"p {i}"} for i in range(1500)]
                          + [{"prompt": "word " * 200}])},
         ("x.jsonl", "prompt 1500", "context of 96", "Lower max_prompt_length")),
]

CANDIDATES = [
    candidates("candidates without rewards", [{"prompt": "a", "completions": [" b"]}],
               "c.jsonl:1", "no column 'rewards'"),
    candidates("misspelt rewards", [{"prompt": "a", "completions": [" b"], "reward": [1]}],
               "c.jsonl:1", "no column 'rewards'", "Did you mean 'reward'?"),
    candidates("NaN reward", second(rewards=[1., float("nan"), 2.]), "c.jsonl:2",
               "rewards[1] is nan"),
    candidates("infinite reward", second(rewards=[1., 2., float("-inf")]), "c.jsonl:2",
               "rewards[2] is -inf"),
    candidates("reward as text", second(rewards=["1.0", 2., 3.]), "c.jsonl:2", 'not "1.0"'),
    candidates("reward null", second(rewards=[1., None, 3.]), "c.jsonl:2", "rewards[1]",
               "not null"),
    candidates("reward true", second(rewards=[True, 1., 2.]), "c.jsonl:2", "not true"),
    candidates("one reward for all", second(rewards=1.), "c.jsonl:2", "must be a list"),
    candidates("too few rewards", second(rewards=[1.]), "c.jsonl:2", "1 rewards for 3 completions"),
    candidates("no completions in a row", second(completions=[], rewards=[]), "c.jsonl:2",
               "no completions", "Remove the row"),
    candidates("completion that is no text", second(completions=[" b", 3, " d"]), "c.jsonl:2",
               "completions[1]"),
    candidates("n = 1", [{**LIST, "completions": [" b"], "rewards": [1.]}] * 3,
               "two completions", "'single candidate': 3", reference="live"),
    candidates("all rewards equal",
               [{**LIST, "rewards": [.1 + .2, .3, .3]}] * 3,
               "different rewards", "'no signal': 3", "check the reward", reference="live"),
    candidates("empty completions only",
               [{**LIST, "completions": [""] * 3, "finish_reasons": ["length"] * 3}],
               "'no completion left': 1",
               reference="live"),
    candidates("empty prompts only",
               [{**LIST, "prompt": ""}],
               "'empty prompt': 1", reference="live"),
    candidates("no reference log-probabilities", [LIST], "'ref_logps'", "reference='live'"),
    candidates("completion beyond the context", second(completions=[" b", " c" * 200, " d"]),
               "prompt 1", "reads 96", reference="live"),
    candidates("column of two types", [{**LIST, "note": 1}, {**LIST, "note": "two"}], "c.jsonl",
               "one type", reference="live"),
    candidates("an empty list of ids", ids([[5], [], [6]]), "c.jsonl:1",
               "completion_ids[1] is empty", stage="score"),
    candidates("ids as texts", ids([["5"], [7], [6]]), "c.jsonl:1", "whole number", stage="score"),
    candidates("a negative id", ids([[5], [-7], [6]]), "c.jsonl:1", "token id -7 is negative",
               stage="score"),
    candidates("an id that no token has", ids([[5], [9999], [6]]), "c.jsonl", "token id 9999",
               "model that the candidates come from", stage="score"),
    candidates("an id that the policy has not", ids([[5], [9999], [6]], ref_logps=[-1.] * 3),
               "token id 9999", "model that the candidates come from"),
    Case("parts that are missing", "score", {"candidates": lambda world, own: without_part(
        world["policy_samples"], own)}, ("parts", "missing", "it resumes")),
    Case("no rewards and no judge", "score", {"reward": None},
         ("policy_samples", "no rewards", "module:function")),
    Case("rewards of another length", "score", {"reward": "bad_inputs:one_too_few"},
         ("11 numbers for 12", "one for each")),
    Case("NaN from the judge", "score", {"reward": "bad_inputs:nan_for_films"},
         ("Prompt row 3", "candidate 0", "nan")),
    Case("text from the judge", "score", {"reward": "bad_inputs:text"},
         ("Prompt row 0", "'good'", "finite")),
    Case("judge in no module", "score", {"reward": "bad_input:length"}, ("no module 'bad_input'",)),
    Case("misspelt judge", "score", {"reward": "bad_inputs:lenght"},
         ("no function 'lenght'", "Did you mean 'length'?")),
]


def without_part(source, own):
    shutil.copytree(source, own/"samples")
    part, = (own/"samples"/"data").glob("part-*")
    part.rename(part.with_name("part-00001-of-00002.jsonl"))
    return own/"samples"


def unfinished(*below):
    "The folder that a killed stage has left, or something in it that it had not written yet."
    def make(world, own):
        (own/"killed").mkdir()
        write_json(own/"killed"/"pending.json", {"key": "1"})
        write_json(own/"killed"/"settings.json", {"n": 3})
        return (own/"killed").joinpath(*below)
    return make


KILLED = ("killed did not finish", "Run that stage again", "it resumes")
UNFINISHED = [
    Case("folder of a killed score", "calibrate", {"candidates": unfinished()}, KILLED),
    Case("folder of a killed sample", "score", {"candidates": unfinished()}, KILLED),
    Case("data of a killed stage", "score", {"candidates": unfinished("data")}, KILLED),
    Case("file of a killed stage", "sample", {"prompts": unfinished("files", "p.jsonl")}, KILLED),
    Case("model of a killed training", "sample", {"policy": unfinished("model")}, KILLED),
    Case("judge of a killed training", "score", {"reward": unfinished("model")}, KILLED),
]


def policy(name, change, *says, stage="sample", key="policy"):
    return Case(name, stage, {key: changed_copy("policy", change)}, ("model", *says))


def judge(name, change, *says):
    return Case(name, "score", {"reward": changed_copy("judge", change)}, ("model", *says))


MODELS = [
    Case("no such model folder", "sample", {"policy": "{policy}/nope/model"},
         ("nope", "no such model folder", "correct the path")),
    Case("a file for a model folder", "sample", {"policy": "{prompts}"},
         ("prompts.jsonl", "folder")),
    Case("a folder without a model", "score", {"reward": an_empty_folder},
         ("empty", "config.json")),
    Case("a model name that nobody has", "sample", {"policy": "nobody/nothing"},
         ("nobody/nothing", "Hub", "Correct the name")),
    Case("attention of no kind", "sample", {"attn_implementation": "spda"},
         ("attn_implementation is 'spda'", "Did you mean 'sdpa'?")),
    Case("revision of a folder", "score", {"revision": "main"},
         ("revision is 'main'", "policy is a folder", "Leave revision out")),
    policy("no weights", without("*.safetensors"), "no safetensors"),
    policy("pickled weights only", pickled, "pickle", "safetensors"),
    policy("truncated weights", truncated, "weights cannot be loaded"),
    policy("a tensor is missing", without_tensor("gpt_neox.final_layer_norm.weight"),
           "final_layer_norm", "random"),
    policy("config that is not JSON", rewrite("config.json", "{"), "config.json"),
    policy("config that is a list", rewrite("config.json", "[]"), "must be a mapping"),
    policy("config of no architecture", rewrite("config.json", '{"model_type": "nothing"}'),
           "config.json"),
    policy("generation settings that cannot be", rewrite("generation_config.json",
           '{"max_new_tokens": -1}'), "generation_config.json cannot be used", "max_new_tokens"),
    policy("more rows than the config says", setting("config.json", vocab_size=200),
           "config.json and the weights disagree", "vocab_size 200", "Correct config.json"),
    policy("another width than the config says", setting("config.json", hidden_size=32),
           "config.json and the weights disagree", "hidden_size 32"),
    policy("vocabulary and merges alone", raw_tokenizer, "merges.txt", "GPT2Tokenizer"),
    policy("merges without a vocabulary", only_merges, "merges.txt and no tokenizer.json"),
    policy("no tokenizer", without("tokenizer*"), "no tokenizer"),
    policy("broken tokenizer", rewrite("tokenizer.json", "{"), "tokenizer cannot be read"),
    policy("tokenizer of nothing", rewrite("tokenizer.json", "{}"), "tokenizer cannot be read"),
    policy("no EOS", lambda f: (setting("tokenizer_config.json", eos_token=None)(f),
                                renamed_eos(f)), "end-of-text", "eos_token"),
    policy("adapter without a base", rewrite("adapter_config.json", "[]"), "adapter"),
    Case("reward model for a policy", "sample", {"policy": "{judge}"},
         ("judge", "not a causal language model")),
    Case("policy for a reward model", "score", {"reward": "{policy}"}, ("policy", "no score head")),
    judge("two labels", two_labels, "2 numbers", "num_labels 1"),
    judge("no head weights", without_tensor("score.weight"), "score.weight", "random"),
    judge("pickled reward model", pickled, "pickle"),
    Case("candidates of another tokenizer", "score", {"candidates": "{stranger_samples}"},
         ("stranger_samples", "not come from the tokenizer of", "policy")),
    Case("live reference of another tokenizer", "calibrate",
         {"reference": "live", "reference_model": "{stranger}"},
         ("policy", "stranger", "different tokenizers")),
    Case("policy of another tokenizer", "calibrate", {"model": "{stranger}"},
         ("scored", "not come from the tokenizer of", "stranger", "Give the policy")),
    Case("evaluated policy of another tokenizer", "evaluate", {"policies": {"other": "{stranger}"}},
         ("stranger", "policy", "different tokenizers")),
    Case("diagnosed policy of another tokenizer", "diagnose", {"policy": "{stranger}"},
         ("stranger", "different tokenizers")),
    Case("longer than the model reads", "sft", {"max_length": 512},
         ("max_length is 512", "reads at most 96", "Set max_length: 96")),
]


def renamed_eos(folder):
    path = folder/"tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|nothing|>"))


def reward(name, *says, stage="score"):
    return Case(f"{stage}: reward {name}", stage, {"reward": f"reward_kinds:{name}"}, says)


REWARDS = [
    reward("divides", "Prompt row 0", "candidate 0", "ZeroDivisionError: division by zero",
           "(reward_kinds.py:", "is kept"),
    reward("divides", "Prompt row 0", "candidate 0", "ZeroDivisionError", stage="evaluate"),
    reward("divides", "Prompt row 0", "candidate 0", "ZeroDivisionError", stage="diagnose"),
    reward("leaves", "Prompt row 0", "SystemExit: enough"),
    reward("shouts", "ValueError: one line and another one line"),
    reward("huge", "Prompt row 0", "candidate 0", "is 1000000", "not a finite number"),
    reward("longer_than_python_prints", "a value of type int", "not a finite number"),
    reward("array", "candidate 0", "is [1.0, 2.0], not a finite"),
    reward("complex_number", "candidate 0", "is 1j, not a finite"),
    reward("unspeakable", "a value of type Unspeakable"),
    reward("nothing", "Prompt row 0", "candidates 0 to 2", "gave None, not a list"),
    reward("one_word", "gave 'ggg', not a list"),
    reward("too_few", "Prompt row 0", "2 numbers for 3 completions"),
    reward("none_for_the_second", "Prompt row 0", "candidate 1: the reward is None"),
    reward("answered", "needs a column 'answer'", "do not have"),
    reward("three", "missing a required argument: 'reference'", "(prompt, completion) -> float"),
    reward("three", "missing a required argument", stage="evaluate"),
    reward("number", "number is 3.0, which cannot be called"),
    reward("Length", "Name an instance of the class"),
    reward("instance.metod", "no function 'instance.metod'"),
    Case("built-in of another form", "score", {"reward": "builtins:len"},
         ("builtins:len", "cannot be called with a prompt and a completion")),
    Case("judge in no file", "score", {"reward": "nowhere/judge.py:length"},
         ("there is no file nowhere/judge.py",)),
    Case("judge's file that fails", "score", {"reward": lambda world, own: str(
        File("judge.py", "import math\nmath.sqrt(-1)\n").write(own)) + ":f"},
         ("cannot be imported", "ValueError", "(judge.py:2)")),
    Case("judge's file with a slip", "evaluate", {"reward": lambda world, own: str(
        File("judge.py", "def f(:\n").write(own)) + ":f"}, ("cannot be imported", "SyntaxError")),
    reward("swapped", "takes the completion first", "swap the two"),
    Case("judge that is a module", "score", {"reward": "reward_kinds.py"},
         ("reward_kinds.py", "'file.py:function'")),
    Case("judge with a space", "score", {"reward": "bad_inputs: length"},
         ("bad_inputs: length", "'module:function'")),
    Case("judge with two colons", "evaluate", {"reward": "bad_inputs::length"},
         ("reward is", "'module:function'")),
    Case("judge with brackets", "diagnose", {"reward": "bad_inputs:length()"},
         ("length()", "'module:function'")),
    Case("second judge of a relative module", "evaluate", {"gold": ".bad_inputs:length"},
         ("gold is", "'module:function'")),
    Case("rewards beyond every scale", "score", {"reward": "reward_kinds:beyond"},
         ("Prompt row 0", "to 1.7e+308", "smaller scale")),
    candidates("given rewards beyond every scale", [{**LIST, "rewards": [1e200, -1e200, 0.]}],
               "Prompt row 0", "smaller scale", stage="score", reward=None),
    candidates("held-out candidates of equal rewards", [{**LIST, "rewards": [1., 1., 1.]}] * 2,
               "c.jsonl", "two candidates with different rewards", stage="evaluate"),
    candidates("held-out candidates without rewards", [{"prompt": "a", "completions": [" b"]}],
               "c.jsonl", "no column 'rewards'", stage="evaluate"),
    candidates("diagnosis of equal rewards", [{**LIST, "rewards": [.1 + .2, .3, .3]}],
               "c.jsonl", "two candidates with different rewards", stage="diagnose"),
    Case("policy without a name", "evaluate", {"policies": {" ": "{policy}"}},
         ("policies", "a name")),
    Case("policy without a folder", "evaluate", {"policies": {"a": ""}}, ("policies", "'a'")),
    Case("misspelt key of a method", "evaluate", {"methods": {"again": {"metod": "vcb"}}},
         ("methods.again", "Did you mean 'method'?")),
    Case("strength that is no number", "evaluate",
         {"methods": {"again": {"method": "vcb", "value": "big"}}}, ("methods.again", "'big'")),
    Case("no workers", "score", {"workers": 0}, ("workers", "1 or more")),
]


def value(stage, key, wrong, *says):
    return Case(f"{stage}.{key} = {wrong}", stage, {key: wrong}, says)


VALUES = [
    value("sample", "temperature", 0, "n=3", "Set n to 1"),
    value("sample", "temperature", -1., "0 or more"),
    value("sample", "temperature", float("nan"), "number"),
    value("sample", "top_p", 0., "above 0"),
    value("sample", "top_k", -1, "0 or more"),
    value("sample", "n", 0, "1 or more"),
    value("sample", "n", "many", "'many'", "number"),
    value("sample", "device", "cuda:7", "CUDA", "cpu"),
    value("sample", "device", "gpu", "no device 'gpu'", "cpu"),
    value("sample", "dtype", "bf17", "Choose one of float32, fp32, bfloat16, bf16"),
    value("score", "device", "cuda", "CUDA"),
    value("score", "dtype", "half", "no dtype 'half'"),
    value("score", "batch_tokens", 0, "1 or more"),
    value("calibrate", "loss", "vbc", "Did you mean 'vcb'?"),
    value("calibrate", "loss_params", {"gamma": 0}, "gamma", "positive"),
    value("calibrate", "loss_params", {"gamma": -1.}, "gamma", "positive"),
    value("calibrate", "loss_params", {"gamma": "big"}, "gamma"),
    value("calibrate", "loss_params", {"gama": 1.}, "Did you mean 'gamma'?"),
    Case("λ < 0", "calibrate", {"loss": "vcb_lse", "loss_params": {"lam": -.1}},
         ("loss_params", "lam", ">= 0")),
    value("calibrate", "sigma", "dataste", "Did you mean 'dataset'?"),
    value("calibrate", "reference", "alive", "Did you mean 'live'?"),
    value("calibrate", "n_candidates", 1, "at least 2"),
    value("calibrate", "eval_share", 1.5, "below 1"),
    value("calibrate", "learning_rate", -1e-5, "0 or more"),
    value("calibrate", "learning_rate", float("nan"), "number"),
    value("calibrate", "per_device_train_batch_size", 0, "1 or more"),
    Case("no epoch", "calibrate", {"num_train_epochs": 0, "max_steps": -1},
         ("num_train_epochs", "above 0")),
    value("calibrate", "gradient_accumulation_steps", 0, "1 or more"),
    value("calibrate", "lr_scheduler_type", "cosin", "Did you mean 'cosine'?"),
    value("calibrate", "peft_config", {"rank": 8}, "'rank'", "rank_pattern"),
    value("calibrate", "peft_config", {"r": 0}, "r"),
    value("calibrate", "peft_config", {"target_modules": ["nowhere"]}, "nowhere"),
    value("calibrate", "max_completion_length", 0, "1 or more"),
    value("sft", "objective", "complete", "Did you mean 'completion'?"),
    value("sft", "max_prompt_length", 64, "leaves no room", "below max_length"),
    value("sft", "dtype", "float31", "Choose one of float32, fp32, bfloat16, bf16"),
    value("sft", "report_to", "tensorbord", "Did you mean 'tensorboard'?"),
    value("sft", "optim", "adamw_troch", "Did you mean 'adamw_torch'?"),
    value("sft", "eval_strategy", "stepps", "Did you mean 'steps'?"),
    Case("misspelt size of a new model", "sft", {"model": None, "tokenizer": "{policy}",
         "model_config": {"hiden_size": 8}}, ("hiden_size", "Did you mean 'hidden_size'?")),
    Case("architecture that nobody knows", "sft", {"model": None, "tokenizer": "{policy}",
         "architecture": "gpt_neo_x"}, ("gpt_neo_x", "Did you mean 'gpt_neox'?")),
    Case("no model and no tokenizer", "sft", {"model": None}, ("Neither model nor tokenizer",)),
    value("reward", "model", "", "not set"),
    value("reward", "n_bins", 0, "1 or more"),
    value("evaluate", "level", 95., "between 0 and 1"),
    value("evaluate", "n_boot", 0, "1 or more"),
    value("evaluate", "limit", 0, "1 or more"),
    value("evaluate", "n", 0, "1 or more"),
    value("evaluate", "prompts", "", "not set"),
    value("evaluate", "device", "cuda", "CUDA"),
    value("evaluate", "methods", {"agian": {"method": "vcb"}}, "'agian'", "Did you mean 'again'?"),
    value("diagnose", "sigma", "data", "dataset"),
    value("diagnose", "gamma", 0., "above 0"),
    value("diagnose", "policy", "", "not set"),
    value("report", "run", "nowhere", "no run folder nowhere", "vcb run"),
    value("data", "test_share", 1.5, "below 1"),
    value("data", "pairs", [], "'world'", "'pairs'"),
    Case("misspelt size of the world", "data", {"pairs": [], "world": {"piars": 10}},
         ("world", "'piars'", "Did you mean 'pairs'?")),
    value("data", "test_share", 0., "'pairs_test'", "empty"),
    Case("RANK that is no number", "sample", {}, ("RANK=first",), env={"RANK": "first"}),
    Case("RANK beyond WORLD_SIZE", "sample", {}, ("RANK=4", "WORLD_SIZE=2"),
         env={"RANK": "4", "WORLD_SIZE": "2"}),
]

CASES = [*FILES, *CANDIDATES, *UNFINISHED, *MODELS, *REWARDS, *VALUES]


# ---- recipes: text of the file, words of the message

RECIPES = {
    "unknown section": ("sampel: {n: 8}", "'sampel'", "Did you mean 'sample'?"),
    "unknown key": ("sample: {temprature: 1}", "sample.temprature", "Did you mean 'temperature'?"),
    "unknown method": ("calibrate: {methods: {vbc: {}}}", "vbc", "Did you mean 'vcb'?"),
    "unknown parameter of a loss": (
        "calibrate: {methods: {vcb: {loss_params: {gama: 1}}}}", "gama", "Did you mean 'gamma'?"),
    "unknown parameter of a sweep": (
        "calibrate: {methods: {vcb: {sweep: {gama: [1]}}}}", "gama", "Did you mean 'gamma'?"),
    "unknown size of the world": ("data: {world: {piars: 3}}", "piars", "Did you mean 'pairs'?"),
    "unknown LoRA setting": ("calibrate: {peft_config: {lora_alfa: 3}}", "lora_alfa",
                             "Did you mean 'lora_alpha'?"),
    "unknown size of a model": (
        "sft: {data: d, model: null, tokenizer: t, model_config: {hiden_size: 3}}", "hiden_size",
        "Did you mean 'hidden_size'?"),
    "γ = 0 in a sweep": ("calibrate: {methods: {vcb: {sweep: {gamma: [1, 0]}}}}", "gamma",
                         "positive"),
    "greedy samples": ("model: m\nsample: {prompts: p, temperature: 0, n: 4}", "temperature 0",
                       "Set n to 1"),
    "methods as a list": ("calibrate: {methods: [vcb]}", "methods", "map a name"),
    "method as a number": ("calibrate: {methods: {vcb: 3}}", "vcb", "mapping"),
    "method named by a number": ("calibrate: {methods: {3: {}}}", "3"),
    "calibrate as a list": ("calibrate: [vcb]", "calibrate", "mapping"),
    "loss_params as a text": ("calibrate: {loss_params: gamma}", "loss_params", "mapping"),
    "sweep of a text": ("calibrate: {methods: {vcb: {sweep: {gamma: [big]}}}}", "gamma", "number"),
    "empty sweep": ("calibrate: {methods: {vcb: {sweep: {gamma: []}}}}", "sweep"),
    "policies that are numbers": ("evaluate: {policies: {a: 1}}", "policies", "string"),
    "NaN": ("sft: {learning_rate: .nan}", "sft.learning_rate", "nan"),
    "number without end": ("sample: {n: 1" + "0" * 400 + "}", "sample.n"),
    "nested too deep": ("a: " + "[" * 1000, "my.yaml"),
    "nothing to do": ("name: idle", "no stage"),
    "not UTF-8": (b"name: caf\xe9", "UTF-8"),
    "control character": (b"name: a\x00b", "YAML"),
    "tab": ("sample:\n\tn: 3", "YAML", "line 2"),
    "two documents": ("name: a\n---\nname: b", "YAML"),
    "key given twice": ("sample: {n: 3}\nscore: {}\nsample: {n: 4}", "sample", "twice"),
    "model as a number": ("model: 3\nreport: {}", "model is 3", "string"),
    "model as a list": ("model: [a]\nreport: {}", "model is ['a']", "string"),
    "empty model": ("model: ''\nsample: {prompts: p}", "policy is not set", "at the top"),
    "model and tokenizer": ("model: m\ntokenizer: {}", "model is 'm'", "Leave one of them out"),
    "model given twice": ("model: m\nmodel: n\nreport: {}", "'model' is given twice"),
    "stage without inputs": ("model: m\nsample:", "prompts is not set", "the section data"),
    "candidates from nowhere": ("model: m\nscore: {reward: 'bad_inputs:length'}",
                                "candidates is not set", "the section sample or score"),
    "prompts as a list": ("model: m\nsample: {prompts: [a]}", "sample.prompts", "string"),
    "pairs as a text": ("data: {pairs: p.jsonl}", "data.pairs", "list"),
    "policies as a list": ("model: m\nevaluate: {prompts: p, policies: [a]}", "policies",
                           "mapping"),
    "world as a list": ("data: {world: [1]}", "data.world", "mapping"),
    "seed of the world as a text": ("data: {world: {seed: x}}", "world.seed", "whole number"),
    "half a prompt": ("data: {world: {ood: 3.5}}", "world.ood", "whole number"),
    "label noise as a text": ("data: {world: {label_noise: much}}", "world.label_noise", "number"),
    "more noise than chance": ("data: {world: {label_noise: 0.7}}", "label_noise", "between 0"),
    "method without a name": ("calibrate: {methods: {'': {}}}", "the method ''", "folder's name"),
    "loss as a number": ("calibrate: {methods: {a: {loss: 3}}}", "loss is 3", "string"),
    "γ beside loss_params": ("calibrate: {gamma: .5}", "calibrate.gamma",
                             "loss_params: {gamma: …}"),
    "LoRA's rank beside peft_config": ("sft: {lora_alpha: 8}", "--peft_config.lora_alpha"),
    "LoRA's rank in words": ("sft: {peft_config: {r: four}}", "peft_config.r", "whole number"),
    "LoRA as a list": ("sft: {peft_config: []}", "peft_config", "mapping"),
    "reporter that is no": ("model: m\nsft: {data: d, report_to: no}", "report_to is 'no'",
                            "Did you mean 'none'?"),
    "list within itself": ("data: &x [*x]", "my.yaml", "Circular"),
    "alias of nothing": ("sample: *nothing", "YAML", "undefined alias"),
    "merge of a number": ("<<: 3\nreport: {}", "YAML", "merging"),
    "another version of YAML": ("%YAML 9.9\n---\na: 1", "YAML", "version"),
    "a set": ("!!set {a, b}", "holds no settings"),
    "Python object": ("name: !!python/object:os.system x", "YAML"),
}

# ---- command lines: words, what is said

COMMAND_LINES = {
    "no such command": (["smaple"], "'smaple'", "Did you mean 'sample'?"),
    "no such recipe": (["run", "dmo"], "Did you mean 'demo'?"),
    "no such stage": (["run", "demo", "--upto", "calibrat"], "'calibrat'",
                      "Did you mean 'calibrate'?"),
    "no such section": (["run", "demo", "--smaple.n", "3"], "'smaple'", "Did you mean 'sample'?"),
    "override that is not YAML": (["run", "demo", "--sample.n", "["], "--sample.n", "YAML"),
    "option that is not YAML": (["sample", "--n", "["], "--n", "YAML"),
    "option that nobody knows": (["sample", "--temprature", "1"], "Did you mean 'temperature'?"),
    "no policy": (["sample", "--prompts", "{prompts}", "--output_dir", "{own}/o"], "policy",
                  "not set"),
    "no candidates": (["score", "--output_dir", "{own}/o"], "candidates", "not set"),
    "no output folder": (["score", "--candidates", "{scored}"], "output_dir"),
    "calibrate without anything": (["calibrate", "--output_dir", "{own}/o"], "model is not set"),
    "file that is not there": (["data", "inspect", "{own}/rows.jsonl"], "does not exist"),
    "layout that nobody knows": (["data", "convert", "{pairs}", "{own}/o.jsonl", "--to", "pears"],
                                 "Unknown layout 'pears'", "Did you mean 'pairs'?"),
    "file to write that is there": (["data", "convert", "{pairs}", "{demos}", "--to", "chat"],
                                    "is there already", "--redo"),
    "report without a run": (["report", "--output_dir", "{own}/o"], "run is not set"),
    "tool of data, mistyped": (["data", "inspct", "{pairs}"], "Did you mean 'inspect'?"),
    "rows that are none": (["data", "inspect", "{pairs}#[3:2]"], "#[3:2]' names no rows",
                           "'#[1000:1200]'"),
    "rows behind the last": (["data", "inspect", "{prompts}#[9999:]"], "prompts", "no rows"),
    "two recipes": (["run", "demo", "lesson"], "takes one recipe"),
    "recipe without a name": (["run", ""], "no recipe file ''"),
    "folder for a recipe": (["run", "{own}"], "no recipe file"),
    "no output folder by an empty text": (["run", "demo", "--output_dir", ""],
                                          "--output_dir is empty"),
    "nothing to stop at": (["run", "demo", "--upto", ""], "--upto is empty"),
    "option with one dash": (["run", "demo", "-x"], "'-x' is no option"),
    "option without a name": (["run", "demo", "--=3"], "'--' is no option"),
    "option given twice": (["sample", "--n", "3", "--n=4"], "--n is given twice"),
    "value that a flag has not": (["run", "demo", "--plan=perhaps"], "'perhaps' is not yes or no"),
    "losses that there are": (["calibrate", "--loss", "simpo", "--output_dir", "{own}/o"],
                              "The losses are", "rrhf"),
    "sizes that do not go together": (
        ["run", "demo", "--plan", "--sft.model_config.hidden_size", "97", "--output_dir",
         "{own}/o"], "sft: gpt_neox cannot be built", "divisible"),
    "schedule of a text": (
        ["run", "demo", "--plan", "--reward.lr_scheduler_type", "cosine_with_restarts",
         "--reward.lr_scheduler_kwargs.num_cycles", "x", "--output_dir", "{own}/o"],
        "reward: lr_scheduler_kwargs cannot be used", "change the setting"),
    "field of a field": (["run", "demo", "--sample.n.m", "3"], "n", "no fields"),
}
