"The page for users of TRL: names that exist on both sides, and DPO that is the same DPO."
import dataclasses, inspect, re
from pathlib import Path

import pytest

from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer
from vcb_nb.data import pairs_to_candidates
from vcb_nb.judges import load_judge
from vcb_nb.losses import LOSSES
from vcb_nb.models import new_policy
from vcb_nb.settings import load_function

trl = pytest.importorskip("trl", reason="TRL is a peer of the tests only")
PAGE = (Path(__file__).parent.parent/"nbs"/"from_trl.qmd").read_text("utf-8")
PAIRS = [{"prompt": "How was the film?", "chosen": " Very good.", "rejected": " It was slow."},
         {"prompt": "And the bread?", "chosen": " Quite good", "rejected": " Hard, I am afraid."}]


CAPTIONS = {"names": "Arguments and settings", "losses": "Losses", "metrics": "Metrics",
            "stages": "Stages and commands"}


def rows(label):
    "The cells of the table with this caption."
    end = re.search(rf"\*Table \d\.\* {CAPTIONS[label]}\.", PAGE).start()
    table = PAGE[:end].rpartition("\n\n| TRL")[2]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:] if line[:1] == "|"]


def known(trainer, config):
    "Arguments of a trainer, fields of its config, and the two names themselves."
    fields = {field.name for field in dataclasses.fields(config)}
    return {*inspect.signature(trainer).parameters, *fields, trainer.__name__, config.__name__}


def test_names_are_those_of_trl_and_ours():
    theirs = known(trl.DPOTrainer, trl.DPOConfig)
    ours = known(CalibrationTrainer, CalibrationConfig)
    for left, right, *_ in rows("names"):
        assert set(re.findall(r"`(\w+)", left)) <= theirs
        right = left if right == "the same" else right
        assert set(re.findall(r"`(\w+)", right)) <= ours
    assert len(rows("names")) > 8
    for _, right in rows("losses")[:2]: assert re.match(r"`(\w+)`", right)[1] in LOSSES


def trained(trainer):
    "The logs of its steps."
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.slow
def test_dpo_is_the_same_dpo(tmp_path, tiny_tokenizer):
    "Five steps of both trainers: loss, accuracy, and margins, which TRL multiplies by beta."
    from datasets import Dataset
    shared = dict(max_steps=5, learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True,
                  save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True)
    model = lambda: new_policy(tiny_tokenizer, "gpt_neox", hidden_size=32, num_hidden_layers=1)
    pairs, policy = Dataset.from_list(PAIRS), model()
    policies = [model() for _ in range(3)]
    for twin in policies: twin.load_state_dict(policy.state_dict())
    theirs = trl.DPOTrainer(policies[0], policies[2], train_dataset=pairs,
                            processing_class=tiny_tokenizer,
                            args=trl.DPOConfig(tmp_path/"a", beta=.3, bf16=False,
                                               gradient_checkpointing=False, **shared))
    ours = CalibrationTrainer(policies[1], train_dataset=pairs_to_candidates(pairs),
                              processing_class=tiny_tokenizer,
                              args=CalibrationConfig(str(tmp_path/"b"), loss="dpo",
                                                     loss_params={"beta": .3}, reference="live",
                                                     **shared))
    logs = list(zip(trained(theirs), trained(ours), strict=True))
    for one, other in logs:
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-4)
        assert .3 * other["rewards/margins"] == pytest.approx(one["rewards/margins"], abs=1e-3)
    accuracies = [(one["rewards/accuracies"], other["rewards/accuracies"]) for one, other in logs]
    assert accuracies[0] == (0, .5) # all gaps are 0: a tie counts nothing there and half here
    assert all(one == other for one, other in accuracies[1:]) and logs[-1][0]["loss"] < .5


def test_reward_functions_of_the_page_score_as_in_trl(tmp_path):
    "The page's file of rewards, called by name here and directly as a GRPO trainer calls it."
    part = PAGE[PAGE.index("## Reward functions"):]
    (tmp_path/"rewards.py").write_text(re.search(r"```python\n(.*?)```", part, re.S)[1])
    texts = ["4", "five", "<think>\nhm\n</think>\n4"]
    row = {"prompt": "2 + 2?", "completions": texts, "answer": "4",
           "completion_ids": [[1, 2, 3, 4], [5] * 6, [1, 2]]}
    theirs = dict(prompts=[row["prompt"]] * 3, completions=texts, answer=["4"] * 3,
                  completion_ids=row["completion_ids"], trainer_state=None)
    for name in ("repetition", "right", "thinks", "both"):
        source = f"{tmp_path}/rewards.py:{name}"
        assert load_judge(source)([row]) == [load_function(source)(**theirs)]
    assert load_judge(f"{tmp_path}/rewards.py:thinks")([row]) == [[0, 0, 1]]
    assert load_judge(f"{tmp_path}/rewards.py:both")([row]) == [[1, -.75, 0]]
