"What all benchmarks share: settings, a model and its data, a fair clock, peak memory, records."
import copy, ctypes, datetime, gc, json, os, platform, random, statistics, subprocess, sys, time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from vcb_nb.artifacts import InputError, did_you_mean
from vcb_nb.logprobs import score_logps
from vcb_nb.loading import as_dtype
from vcb_nb.models import new_policy

# layers, hidden size and heads; their vocabulary has 50304 entries
PYTHIA = {"pythia-160m": (12, 768, 12), "pythia-410m": (24, 1024, 16),
          "pythia-1b": (16, 2048, 8), "pythia-2.8b": (32, 2560, 32)}
# SmolLM2-135M: a Llama with three key-value heads and a tied vocabulary head
SMOLLM2 = dict(layers=30, hidden=576, heads=9, vocab=49152)
SMOLLM2_CONFIG = dict(num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True)
EOS, PAD = "<eos>", "<pad>"
# glibc reads these when a process starts: freed memory stays with the process.
TUNED = {"MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_MMAP_THRESHOLD_": str(2**36)}


# --- settings -------------------------------------------------------------------------------

def option(default, help:str):
    "A setting, with the sentence that HfArgumentParser shows."
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    "One shape, and how it is measured."
    n: int = option(8, "Responses to each prompt.")
    prompts: int = option(1, "Prompts in a step.")
    prompt: int = option(256, "Tokens of a prompt.")
    response: str = option("64-128", "Tokens of a response: '96', or '64-128' for uneven ones.")
    arch: Literal["gpt_neox", "gpt2", "llama", "qwen2", "qwen3", "smollm2-135m", "pythia-160m",
                  "pythia-410m", "pythia-1b", "pythia-2.8b"] = option(
        "gpt_neox", "Architecture; a Pythia or SmolLM2 also sets layers, hidden and vocab.")
    layers: int = option(6, "Layers.")
    hidden: int = option(384, "Width of the hidden states.")
    heads: int = option(0, "Attention heads; 0: one for each 64 of the width.")
    vocab: int = option(50304, "Size of the vocabulary.")
    dtype: str = option("float32", "Precision; bfloat16 is autocast over fp32 weights.")
    device: str = option("cpu", "'cpu' or 'cuda'.")
    checkpointing: bool = option(False, "Gradient checkpointing, for every way.")
    rounds: int = option(7, "Rounds; in each, every way runs once.")
    ways: list[str] | None = option(None, "Which ways to measure; all if not given.")
    malloc: Literal["default", "tuned", "both"] = option(
        "default", "glibc's allocator as it is, or keeping what is freed ('tuned').")
    out: str | None = option(None, "File to append the JSON lines to; stdout if not given.")

    def __post_init__(self):
        sizes = SMOLLM2 if self.arch == "smollm2-135m" else {}
        if self.arch in PYTHIA:
            sizes = dict(zip(("layers", "hidden", "heads"), PYTHIA[self.arch]), vocab=50304)
        for name, value in sizes.items(): object.__setattr__(self, name, value)
        if not self.heads: object.__setattr__(self, "heads", max(2, self.hidden // 64))
        least = dict(n=1, prompts=1, prompt=1, layers=1, hidden=1, vocab=3, rounds=1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} is {getattr(self, name)}. Set it to {bound} or more.")
        self.lengths()

    def lengths(self)->list: # n numbers
        "Tokens of each response, spread evenly over the span."
        try: low, high = [int(x) for x in self.response.split("-") * 2][:2]
        except ValueError: low = high = 0
        if not 1 <= low <= high:
            raise InputError(f"response is {self.response!r}. Give a length, or a span: 64-128.")
        return [round(low + (high - low) * i / max(self.n - 1, 1)) for i in range(self.n)]

    def chosen(self, ways:tuple)->list:
        "The ways to measure, in a benchmark's own order."
        for way in self.ways or ():
            if way not in ways: raise InputError(f"ways has {way!r}. {did_you_mean(way, ways)}")
        return [way for way in ways if way in (self.ways or ways)]

    def autocast(self):
        "The precision of a forward pass."
        if as_dtype(self.dtype) is not torch.bfloat16: return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


# --- a model and its data -------------------------------------------------------------------

def word_tokenizer(vocab:int):
    "A word for each token, so that TRL, which takes texts, gets exactly the ids that we get."
    words = {EOS: 0, PAD: 1, **{f"t{i}": i for i in range(2, vocab)}}
    inner = Tokenizer(models.WordLevel(words, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=PAD)


@dataclass
class World:
    "A random model, prompts, responses with EOS, rewards, and log-probs of the start."
    settings: Settings
    tokenizer: object
    model: object
    prompt_ids: list # [prompts] token ids
    completion_ids: list # [prompts][n] token ids
    rewards: list # [prompts][n]
    ref_logps: list # [prompts][n]
    folder: TemporaryDirectory # where trainers may write

    def twin(self):
        "The model again, with the same weights in memory: TRL changes the forward of its own."
        shared = {id(tensor): tensor for tensor in self.model.parameters()}
        return copy.deepcopy(self.model, shared)

    def free(self):
        "Give the gradients back, as the end of a step does."
        self.model.zero_grad(set_to_none=True)


def make_model(s:Settings, tokenizer):
    "A causal LM with random weights, dropout off, in training mode."
    smollm2 = s.arch == "smollm2-135m"
    arch = "gpt_neox" if s.arch in PYTHIA else "llama" if smollm2 else s.arch
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    sizes = dict(zip(names, (s.layers, s.hidden, s.heads)))
    sizes["max_position_embeddings"] = max(1024, s.prompt + max(s.lengths()))
    if smollm2: sizes.update(SMOLLM2_CONFIG)
    model = new_policy(tokenizer, arch, vocab_size=s.vocab, **sizes).to(s.device).train()
    if as_dtype(s.dtype) is not torch.bfloat16: model.to(as_dtype(s.dtype))
    if s.checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_world(s:Settings, references:bool=True)->World:
    "The same settings give the same weights and tokens."
    rng, tokenizer = random.Random(0), word_tokenizer(s.vocab)
    def ids(length): return [rng.randrange(2, s.vocab) for _ in range(length)]
    prompts = [ids(s.prompt) for _ in range(s.prompts)]
    completions = [[ids(length - 1) + [0] for length in rng.sample(s.lengths(), s.n)]
                   for _ in prompts]
    rewards = [[rng.gauss(0, 1) for _ in cs] for cs in completions]
    model = make_model(s, tokenizer)
    with s.autocast():
        ref = score_logps(model, prompts, completions, way="rows") if references else None
    return World(s, tokenizer, model, prompts, completions, rewards, ref, TemporaryDirectory())


# --- time -----------------------------------------------------------------------------------

def seconds(call, s:Settings)->float:
    "How long a call takes, to its end on the device."
    wait = torch.cuda.synchronize if s.device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def alternate(calls:dict, s:Settings, free=lambda: None)->dict: # name -> seconds of each round
    "Each round runs every call once, and each begins with another: drift meets all alike."
    found, names = {name: [] for name in calls}, list(calls)
    for i in range(-1, s.rounds): # the first is a warm-up
        for name in names[i % len(names):] + names[:i % len(names)]:
            taken = seconds(calls[name], s)
            free()
            if i >= 0: found[name].append(taken)
    return found


def matmul_calls(s:Settings, tokens:int)->tuple: # calls by (rows, inner, columns), their FLOPs
    "Matrix products of the model's shapes and a large square one: the machine's own rate."
    cuda = s.device.startswith("cuda")
    square = 8192 if cuda else 1024
    shapes = {(tokens, s.hidden, 4 * s.hidden), (tokens, 4 * s.hidden, s.hidden),
              (tokens, s.hidden, s.vocab), (square, square, square)}
    calls, flops = {}, {}
    for shape in shapes:
        rows, inner, columns = shape
        kind = dict(dtype=as_dtype(s.dtype), device=s.device)
        left, right = torch.randn(rows, inner, **kind), torch.randn(inner, columns, **kind)
        once = 2 * rows * inner * columns
        # Enough work to time: some ms on a CPU, on a GPU more than a launch.
        times = min(20, 1 + int((2e12 if cuda else 2e9) / once))
        out = torch.empty(rows, columns, **kind)
        def product(left=left, right=right, out=out, times=times):
            with torch.no_grad():
                for _ in range(times): torch.mm(left, right, out=out)
        calls[shape], flops[shape] = product, once * times
    return calls, flops


def best_rate(times:dict, flops:dict)->float: # FLOP/s
    "The fastest shape's rate, each by the median of its rounds."
    return max(flops[shape] / statistics.median(times[shape]) for shape in flops)


# --- memory ---------------------------------------------------------------------------------

def _resident(field:str)->int: # bytes
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _give_back():
    "Free memory goes back to the system, so that a step has to ask for all it uses."
    gc.collect()
    try: ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError): pass # not glibc


def peak_growth(call, s:Settings)->"float | None": # MB; None where the system has no such count
    "How far memory grows during a call above what there was before it."
    _give_back()
    if s.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(call, s)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try: Path("/proc/self/clear_refs").write_text("5") # VmHWM begins anew
    except OSError: return None
    before = _resident("VmRSS:")
    call()
    return (_resident("VmHWM:") - before) / 1e6


# --- records --------------------------------------------------------------------------------

def machine(s:Settings)->str:
    "The GPU, or the CPU's model and its cores."
    if s.device.startswith("cuda"): return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration): name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def setting(bench:str, s:Settings)->dict:
    "What a figure was measured with."
    names = ("arch", "layers", "hidden", "vocab", "n", "prompts", "prompt", "response", "dtype",
             "device", "checkpointing", "rounds")
    found = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"bench": bench, **{name: getattr(s, name) for name in names},
            "threads": torch.get_num_threads(), "malloc": current_malloc(), **found,
            "date": datetime.date.today().isoformat(), "machine": machine(s)}


def record(bench:str, s:Settings, way:str, times:list, *, naive:list=(), trl:list=(),
           share:"float | None"=None, peak:"float | None"=None, **more)->dict:
    "One line of results; `naive` and `trl` are those ways' seconds, round by round."
    middle = statistics.median(times) if times else None
    ratio = lambda other: statistics.median(other) / middle if len(other) and times else None
    spread = dict(seconds_min=min(times, default=None), seconds_max=max(times, default=None))
    return {"way": way, "seconds": middle, "speedup_vs_naive": ratio(naive),
            "speedup_vs_trl": ratio(trl), "share_of_peak": share, "peak_mb": peak,
            **more, **spread, **setting(bench, s)}


def records(bench:str, s:Settings, times:dict, *, flops:float=0, rate:float=0, peaks:dict={},
            **more)->list:
    "A line for each way that was measured side by side; `flops`: the least that the task needs."
    share = lambda way: flops / statistics.median(times[way]) / rate if flops and rate else None
    others = dict(naive=times.get("naive", ()), trl=times.get("trl", ()))
    extra = {**more, **({"matmul_gflops": rate / 1e9} if rate else {})}
    return [record(bench, s, way, times[way], share=share(way), peak=peaks.get(way), **others,
                   **extra) for way in times]


COLUMNS = ("bench", "malloc", "way", "seconds", "speedup_vs_naive", "speedup_vs_trl",
           "share_of_peak", "peak_mb")

def table(rows:list, columns:tuple=COLUMNS)->str:
    "Records for people: numbers with three figures, a dash where nothing was measured."
    def cell(value):
        if value is None: return "-"
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e3 else (
            f"{value:.0f}" if isinstance(value, float) else str(value))
    cells = [columns] + [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in cells)


def emit(rows:list, s:Settings, columns:tuple=COLUMNS)->None:
    "JSON lines to the file or stdout, the table to stderr."
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if s.out:
        Path(s.out).parent.mkdir(parents=True, exist_ok=True)
        with open(s.out, "a", encoding="utf-8") as file: file.write(lines)
    else: print(lines, end="", flush=True)
    print(table(rows, columns), file=sys.stderr)


# --- the command ----------------------------------------------------------------------------

def current_malloc()->str:
    "Which allocator settings this process was started with."
    return "tuned" if all(name in os.environ for name in TUNED) else "default"


def run(module:str, measure, kind=Settings, args:"list | None"=None)->None:
    "Read the options; measure here, or in a process of each allocator setting that is wanted."
    args = sys.argv[1:] if args is None else args
    os.environ["TQDM_DISABLE"] = "1" # TRL's bars
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning) # of transformers, about its own names
    try:
        s, = HfArgumentParser(kind, prog=f"python -m {module}").parse_args_into_dataclasses(args)
        wanted = ["default", "tuned"] if s.malloc == "both" else [s.malloc]
        if wanted == [current_malloc()]: return measure(s)
    except InputError as e: sys.exit(f"{module}: {e}")
    for malloc in wanted: _start(module, args, malloc)


def _start(module:str, args:list, malloc:str)->None:
    "The same command in a process whose allocator is set so."
    env = {k: v for k, v in os.environ.items() if k not in TUNED}
    if malloc == "tuned": env.update(TUNED)
    done = subprocess.run([sys.executable, "-m", module, *args, "--malloc", malloc], env=env)
    if done.returncode: sys.exit(done.returncode)
