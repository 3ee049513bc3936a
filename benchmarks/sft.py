"A step of fine-tuning: TRL's `SFTTrainer`, without padding as well, padded rows, and packed rows."
from datasets import Dataset, disable_progress_bars

from vcb_nb.sft import SFTConfig, sft_trainer

from .common import World, run
from .step import trainer_options, trainer_step
from .training import TrainingSettings, ended, make_rows, measure_step, show, text

TRL = {"trl": {}, "trl_padding_free": dict(padding_free=True),
       "trl_packing": dict(packing=True)}
WAYS = (*TRL, "rows", "shared")


def our_trainer(world:World, way:str):
    "The trainer of `train_sft` on rows of ids."
    rows = [dict(input_ids=p + c, prompt_length=len(p), length=len(p + c), finished=True)
            for p, cs in zip(world.prompt_ids, world.completion_ids) for c in cs]
    args = SFTConfig(**trainer_options(world, len(rows)), model="-", data="-", way=way)
    return sft_trainer(args, world.twin(), world.tokenizer, Dataset.from_list(rows))


def trl_trainer(world:World, **options):
    "TRL's `SFTTrainer` on texts whose tokens are ours; packing fills one row, as ours does."
    import trl
    disable_progress_bars()
    data = Dataset.from_list([dict(prompt=text(p), completion=ended(c)) for p, cs in
                              zip(world.prompt_ids, world.completion_ids) for c in cs])
    tokens = sum(len(p) + len(c) for p, cs in zip(world.prompt_ids, world.completion_ids)
                 for c in cs)
    length = tokens if options.get("packing") else None
    args = trl.SFTConfig(**trainer_options(world, len(data)), max_length=length, **options)
    return trl.SFTTrainer(world.twin(), args=args, train_dataset=data,
                          processing_class=world.tokenizer)


def step_call(world:World, way:str):
    "A function that runs one step; it leaves the gradients."
    return trainer_step(trl_trainer(world, **TRL[way]) if way in TRL else our_trainer(world, way))


def measure(s):
    world = make_rows(s)
    calls = {way: step_call(world, way) for way in s.chosen(WAYS)}
    targets = sum(len(c) for cs in world.completion_ids for c in cs)
    tokens = sum(map(len, world.prompt_ids)) + targets - s.prompts
    show(measure_step("sft", world, calls, tokens, targets, whole=False), s)


if __name__ == "__main__": run("benchmarks.sft", measure, TrainingSettings)
