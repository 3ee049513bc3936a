"A step of reward training: TRL's `RewardTrainer`, padded rows, and each pair's prompt once."
from dataclasses import dataclass

from datasets import Dataset, disable_progress_bars

from vcb_nb.reward import RewardConfig, reward_trainer

from .common import World, option, run
from .scoring import reward_model
from .step import trainer_options, trainer_step
from .training import TrainingSettings, ended, make_rows, measure_step, show, text

WAYS = ("trl", "rows", "shared")


@dataclass(frozen=True)
class PairSettings(TrainingSettings):
    "A step of pairs."
    n: int = option(2, "Responses to each prompt: a pair.")
    prompts: int = option(4, "Pairs in a step.")


def our_trainer(world:World, way:str):
    "The trainer of `train_reward` on pairs of ids."
    rows = [dict(chosen_ids=p + a, rejected_ids=p + b, length=len(p) + max(len(a), len(b)),
                 margin=0.) for p, (a, b) in zip(world.prompt_ids, world.completion_ids)]
    args = RewardConfig(**trainer_options(world, len(rows)), model="-", pairs="-", way=way)
    return reward_trainer(args, world.twin(), world.tokenizer, Dataset.from_list(rows))


def trl_trainer(world:World):
    "TRL's `RewardTrainer` on texts whose tokens are ours."
    import trl
    disable_progress_bars()
    data = Dataset.from_list([dict(prompt=text(p), chosen=ended(a), rejected=ended(b)) for p, (a, b)
                              in zip(world.prompt_ids, world.completion_ids)])
    args = trl.RewardConfig(**trainer_options(world, len(data)), max_length=None)
    return trl.RewardTrainer(world.twin(), args=args, train_dataset=data,
                             processing_class=world.tokenizer)


def step_call(world:World, way:str):
    "A function that runs one step; it leaves the gradients."
    return trainer_step(trl_trainer(world) if way == "trl" else our_trainer(world, way))


def measure(s):
    world = make_rows(s)
    world.model = reward_model(world).train()
    calls = {way: step_call(world, way) for way in s.chosen(WAYS)}
    responses = sum(len(c) for cs in world.completion_ids for c in cs)
    tokens = sum(map(len, world.prompt_ids)) + responses
    show(measure_step("reward", world, calls, tokens, 0, whole=True), s)


if __name__ == "__main__": run("benchmarks.reward", measure, PairSettings)
