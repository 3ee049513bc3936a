"Rewards of every kind that Python can call, found by name as a user's are, and their like."
import asyncio, functools, operator


def function(prompt, completion): return float(len(completion))

short = lambda prompt, completion: float(len(completion)) # noqa: E731
cached = functools.lru_cache(function)

def scaled(prompt, completion, *, scale): return len(completion) * scale

bound = functools.partial(scaled, scale=1.)


class Length:
    def __init__(self, scale): self.scale, self._asked = scale, 0

    def __call__(self, prompt, completion):
        self._asked += 1
        return len(completion) * self.scale

    def method(self, prompt, completion): return self(prompt, completion)


instance = Length(1.)
method = instance.method

async def coroutine(prompt, completion):
    await asyncio.sleep(0)
    return float(len(completion))


# ---- TRL's form

def trl(completions, **kwargs): return [float(len(text)) for text in completions]

def trl_ids(prompts, completions, completion_ids):
    return [float(len(text)) for text, _ in zip(completions, completion_ids, strict=True)]

def trl_state(prompts, completions, trainer_state, log_metric, **kwargs):
    log_metric("length", 1.)
    return [float(len(text) + trainer_state.global_step) for text in completions]

class TrlObject:
    def __call__(self, completions, *, answer=None, **kwargs): return trl(completions)


trl_object = TrlObject()
trl_partial = functools.partial(lambda completions, scale, **kwargs:
                                [len(text) * scale for text in completions], scale=1.)
trl_only_keywords = lambda **kwargs: trl(kwargs["completions"]) # noqa: E731

async def trl_coroutine(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return trl(completions)

def answered(completions, answer): return [float(c == a) for c, a in zip(completions, answer)]


LENGTHS = ("function", "short", "cached", "bound", "instance", "method", "instance.method",
           "coroutine", "trl", "trl_ids", "trl_state", "trl_object", "trl_partial",
           "trl_only_keywords", "trl_coroutine")
equal = operator.eq


# ---- what goes wrong

def divides(prompt, completion): return 1 / 0

def leaves(prompt, completion): raise SystemExit("enough")

def shouts(prompt, completion): raise ValueError("one line\nand another " * 50)

def huge(prompt, completion): return 10**400

def longer_than_python_prints(prompt, completion): return 10**5000

def array(prompt, completion): return [1., 2.]

def nothing(completions, **kwargs): return None

def one_word(completions, **kwargs): return "g" * len(completions)

def too_few(completions, **kwargs): return [0.] * (len(completions) - 1)

def none_for_the_second(completions, **kwargs): return [0., None] + [0.] * (len(completions) - 2)

def complex_number(prompt, completion): return 1j

class Unspeakable:
    def __repr__(self): raise RuntimeError("no words")

def unspeakable(prompt, completion): return Unspeakable()

def three(prompt, completion, reference): return 0.

def swapped(completion, prompt): return 0.

def beyond(prompt, completion): return 1.7e308

number = 3.
