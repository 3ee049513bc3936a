"""Training on fresh samples: every method's gradient against the exact one, the loop against a run
in another shape, and what a kill leaves. Real tiny models in float64 over strings that can be
enumerated."""
import itertools, math, os, subprocess, sys, time
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tiny_models import make_tokenizer, tiny
from vcb_nb import online as stage
from vcb_nb.artifacts import InputError, write_jsonl
from vcb_nb.loading import load_policy, load_tokenizer, new_reward_model
from vcb_nb.losses import reward_sigma
from vcb_nb.models import new_policy
from vcb_nb.online import (BlockSampler, OnlineConfig, OnlineTrainer, PPOTrainer, Rollout,
                           group_advantages, mini_batch, online, online_losses, read_rollout)
from vcb_nb.pipeline import plan
from vcb_nb.recipes import check_recipe, load_recipe
from vcb_nb.saving import save_model
from vcb_nb.shards import leave_group
from vcb_nb.training import checkpoint_args, read_curve, run_training
from vcb_nb.worlds import (TableWorld, enumerate_strings, kl_divergence, optimal_policy,
                           random_world, string_logps)

close = torch.testing.assert_close
PROMPTS = ["a", "b", "a b", "b a", "a a", "b b", "a b a", "b b a"]
LENGTH = 3 # most tokens of a response: 15 of them
STRINGS = enumerate_strings(3, LENGTH)
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=.2,
             max_position_embeddings=32)
QUIET = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", dtype="float64",
             max_new_tokens=LENGTH, max_prompt_length=8)


def letters():
    "A tokenizer of three tokens, the end among them, without padding."
    made = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "b": 2}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")


def reward(completion_ids, **columns):
    "A number for every string that has no pattern."
    return [math.sin(3. + sum((t + 2) * (k + 1)**1.7 for t, k in enumerate(ids)))
            for ids in completion_ids]


def shortest(prompt, completion): return -float(len(completion))


JUDGE = f"{__name__}:reward" if __name__ != "__main__" else f"{__file__}:reward"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("online")
    tokenizer = letters()
    save_model(new_policy(tokenizer, seed=1, **SIZES), tokenizer, place/"model")
    judge = new_reward_model(place/"model", letters(), seed=2)
    torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(2))
    save_model(judge, letters(), place/"judge")
    write_jsonl(place/"prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return place


def config_of(folder, out, **options):
    given = {"n": 3, "per_device_train_batch_size": 4, "reward": str(folder/"judge")
             if options.get("loss") == "ppo" else JUDGE, **QUIET, **options}
    return OnlineConfig(str(out), model=str(folder/"model"),
                        prompts=str(folder/"prompts.jsonl"), **given)


def trainer_of(folder, out, callbacks=None, **options):
    config = config_of(folder, out, **options)
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    kind = PPOTrainer if config.loss == "ppo" else OnlineTrainer
    return config, kind(config.model, checkpoint_args(config), rows, callbacks=callbacks)


# ---- losses

def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes(name, logps, old, ref, rewards, **params):
    "Gradient of a loss by the log-probabilities of tokens `[prompts, n, T]`."
    logps = logps.clone().requires_grad_()
    mask, sigma = torch.ones_like(logps, dtype=torch.bool), reward_sigma(rewards)[0]
    online_losses(name, logps, old, ref, rewards, mask, sigma, **params).sum().backward()
    return logps.grad


def test_vcbs_first_gradient_is_grpos_advantage():
    "Identity 4: both push every token of a response by the advantage of the response."
    logps, rewards, gamma, n = draw(3, 5, 2), draw(3, 5, seed=1), .7, 5
    vcb = slopes("vcb", logps, logps, logps, rewards, gamma=gamma)
    grpo = slopes("grpo", logps, logps, logps, rewards, beta=0.)
    advantages = group_advantages(rewards)[..., None]
    close(vcb, -4 * gamma / (n - 1) * advantages.expand_as(vcb))
    close(grpo, -advantages.expand_as(grpo) / n)


def test_later_vcb_is_grpo_with_a_penalty_inside_the_group():
    "−4γ/(n−1) (A − γ(ℓ − mean ℓ)): at log-ratios of r/(γσ) nothing is left."
    logps, ref, rewards, gamma = draw(3, 5, 2), draw(3, 5, 2, seed=2), draw(3, 5, seed=1), .7
    ratios = (logps - ref).sum(-1)
    inside = group_advantages(rewards) - gamma * (ratios - ratios.mean(1, keepdim=True))
    found = slopes("vcb", logps, logps, ref, rewards, gamma=gamma)
    close(found, (-gamma * inside[..., None]).expand_as(found))


def test_equal_rewards_push_nothing():
    "Identity 9: also where a float residue would pass for a signal."
    logps, rewards = draw(1, 4, 2), torch.tensor([[.1 + .2, .3, .3, .3]]).double()
    assert (group_advantages(rewards) == 0).all()
    for name in ("vcb", "grpo"):
        assert (slopes(name, logps, logps, logps, rewards) == 0).all()


@pytest.mark.parametrize("name", ["vcb", "dpo", "grpo", "rloo", "rebel"])
def test_padding_reaches_no_loss(name):
    "Whatever stands behind the end of a response, values and gradients are those without it."
    logps, old, ref = (draw(2, 3, 4, seed=s) for s in range(3))
    lengths = torch.tensor([[4, 2, 1], [3, 3, 2]])
    rewards, mask = draw(2, 3, seed=4), torch.arange(4) < lengths[..., None]
    def found(*given):
        given = [x.clone() for x in given]
        given[0].requires_grad_()
        loss = online_losses(name, *given, rewards, mask, reward_sigma(rewards)[0])
        loss.sum().backward()
        return loss.detach(), given[0].grad.masked_fill(~mask, 0.)
    rubbish = [torch.where(mask, x, 7 * draw(2, 3, 4, seed=9 + i))
               for i, x in enumerate((logps, old, ref))]
    for ours, theirs in zip(found(logps, old, ref), found(*rubbish)): close(ours, theirs)


def expected_gradient(name, logits, reference, rewards, n, **params):
    "Mean gradient of a method over all groups of n one-token responses, by the table's logits."
    logits = logits.clone().requires_grad_()
    groups = torch.tensor(list(itertools.product(range(len(logits)), repeat=n)))
    logps = logits.log_softmax(0)
    shares = logps.detach()[groups].sum(1).exp()
    some = [x[groups][..., None] for x in (logps, logps.detach(), reference)]
    mask = torch.ones_like(some[0], dtype=torch.bool)
    losses = online_losses(name, *some, rewards[groups], mask, reward_sigma(rewards[groups])[0],
                           **params)
    return torch.autograd.grad((shares * losses).sum(), logits)[0]


TABLE = [draw(4, seed=1), draw(4, seed=2).log_softmax(0), draw(4, seed=3)] # policy, SFT, rewards


def gradient_of(objective):
    logits = TABLE[0].clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(0)), logits)[0]


@pytest.mark.parametrize("name, scale, params", [("rloo", -1, {}), ("rebel", -4 * .6, {"eta": .6})])
def test_rloo_and_rebel_follow_the_objective(name, scale, params):
    "The mean gradient over all groups of three is exactly that of E r − β KL, times a constant."
    _, reference, rewards = TABLE
    want = gradient_of(lambda p: (p.exp() * (rewards - .3 * (p - reference))).sum())
    close(expected_gradient(name, *TABLE, 3, beta=.3, **params), scale * want)


def test_grpos_k3_pulls_along_the_other_kl():
    "With nothing to gain, the mean gradient of k3 is that of β KL(SFT ‖ π), not of KL(π ‖ SFT)."
    logits, reference, _ = TABLE
    found = expected_gradient("grpo", logits, reference, torch.ones(4).double(), 3, beta=.3)
    forward, reverse = (gradient_of(f) for f in (
        lambda p: .3 * (reference.exp() * (reference - p)).sum(),
        lambda p: .3 * (p.exp() * (p - reference)).sum()))
    close(found, forward)
    assert not torch.allclose(found, reverse, rtol=.1)


def test_grpo_without_kl_is_the_mean_of_its_advantages():
    "Against a plain loop over all groups."
    logits, reference, rewards = TABLE
    policy = logits.log_softmax(0)
    want = torch.zeros(4, dtype=torch.float64)
    for group in map(list, itertools.product(range(4), repeat=3)):
        r = rewards[group]
        if len(set(group)) == 1: continue
        advantage = (r - r.mean()) / r.std()
        for i, a in zip(group, advantage):
            score = torch.nn.functional.one_hot(torch.tensor(i), 4) - policy.exp()
            want -= policy[group].sum().exp() * a * score / 3
    close(expected_gradient("grpo", logits, reference, rewards, 3, beta=0.), want)


def test_on_policy_vcb_ends_at_the_optimum():
    """Fresh candidates and the SFT model's σ: KL below 1e-6. The same number of candidates drawn
    once miss responses and stop far away; σ of the fresh ones aims elsewhere."""
    world, gamma = random_world(prompts=3, responses=8, seed=1, spread=.5), 1.
    optimum = optimal_policy(world, gamma)
    def end(fresh, sigma, steps=1500):
        logits = world.ref_logps.clone().requires_grad_()
        adam, drawing = torch.optim.Adam([logits], .05), torch.Generator().manual_seed(0)
        index = None
        for step in range(steps):
            adam.param_groups[0]["lr"] = .05 * (1 - step / steps)
            logps = logits.log_softmax(1)
            if fresh or index is None:
                index = torch.multinomial(logps.detach().exp(), 4, True, generator=drawing)
            some = [x.gather(1, index) for x in (logps, world.ref_logps, world.rewards)]
            tokens = some[0][..., None], some[0].detach()[..., None], some[1][..., None]
            mask = torch.ones_like(tokens[0], dtype=torch.bool)
            own = reward_sigma(some[2])[0] if sigma is None else sigma
            adam.zero_grad()
            online_losses("vcb", *tokens, some[2], mask, own, gamma=gamma).sum().backward()
            adam.step()
        return kl_divergence(logits.detach().log_softmax(1), optimum).max().item()
    assert end(True, world.reward_std) < 1e-6
    assert end(False, world.reward_std) > .1 and end(True, None) > .01


# ---- the loop against the exact gradient

def exact_gradient(name, model, reference, prompt, n, sigma=None, **params):
    "Mean gradient over all groups of n strings: enumerated, in rows, without the loop."
    ids, lengths = STRINGS
    def tokens(model):
        start = torch.tensor([prompt]).expand(len(ids), -1)
        logits = model(torch.cat([start, ids], 1)[:, :-1]).logits[:, len(prompt) - 1:]
        return logits.double().log_softmax(-1).gather(2, ids[..., None])[..., 0]
    mask, logps = torch.arange(LENGTH) < lengths[:, None], tokens(model)
    with torch.no_grad(): ref = tokens(reference)
    groups = torch.tensor(list(itertools.product(range(len(ids)), repeat=n)))
    shares = logps.detach().masked_fill(~mask, 0.).sum(1)[groups].sum(1).exp()
    close(shares.sum(), torch.ones(()).double())
    rewards = torch.tensor(reward(STRINGS.tokens())).double()[groups]
    losses = online_losses(name, logps[groups], logps.detach()[groups], ref[groups], rewards,
                           mask[groups], reward_sigma(rewards)[0], **params)
    return (shares * losses).sum()


def flat(gradients): return torch.cat([g.flatten() for g in gradients])


def sampled_gradients(trainer, rounds):
    "The gradient of the loop's loss in each of some rounds `[rounds, parameters]`."
    found, model = [], trainer.model.train()
    index = [{"index": torch.arange(trainer.args.per_device_train_batch_size)}]
    for number in range(rounds):
        trainer.rollouts = trainer.roll_out(index, number)
        part = trainer._part(0, number, 0)
        model.zero_grad()
        trainer.compute_loss(model, {"rollout": part, "batch": trainer.layout(part)},
                             num_items_in_batch=trainer.count_items(part)).backward()
        found.append(flat(p.grad for p in model.parameters()))
    return torch.stack(found)


def away_from_start(folder, out, **options):
    "A trainer whose policy is no longer its reference."
    _, trainer = trainer_of(folder, out, **options)
    generator = torch.Generator().manual_seed(7)
    for p in trainer.model.parameters():
        p.data += .1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return trainer


METHODS = [("vcb", {"gamma": .6}), ("grpo", {"beta": .2}), ("rloo", {"beta": .2}),
           ("rebel", {"beta": .2, "eta": .5}), ("dpo", {"beta": .5})]


@pytest.mark.parametrize("name, params", METHODS, ids=[m[0] for m in METHODS])
def test_sampled_gradients_are_exact_on_average(folder, tmp_path, name, params):
    """The whole way (sampler, judge, packed log-probs, frozen reference, loss) over 100 rounds
    of four prompts, against all groups enumerated: within four standard errors in twenty random
    directions, and in the exact one."""
    trainer = away_from_start(folder, tmp_path, loss=name, loss_params=params, n=2, seed=3)
    model, ids = trainer.model, trainer.train_dataset["prompt_ids"]
    exact = sum(exact_gradient(name, model, trainer.reference, ids[i], 2, **params)
                for i in range(4)) / 4
    want = flat(torch.autograd.grad(exact, model.parameters()))
    found = sampled_gradients(trainer, 100)
    ways = torch.cat([want[None] / want.norm(), draw(20, len(want), seed=1)])
    values, target = found @ ways.T, ways @ want
    z = (values.mean(0) - target) / (values.std(0) / len(values)**.5)
    assert z.abs().max() < 4, z
    assert values[:, 0].mean() > 4 * values[:, 0].std() / len(values)**.5 # and it is not nothing


def test_ppos_sampled_gradient_points_along_the_objective(folder, tmp_path):
    """Whitening sets its length, so only the direction can be exact: nothing is left across the
    gradient of E r − β KL, for λ = 1 and whatever the value model says."""
    params = {"lam": 1., "beta": .2, "value_weight": 0.}
    trainer = away_from_start(folder, tmp_path, loss="ppo", loss_params=params, n=32, seed=3,
                              reward=JUDGE, value_model=str(folder/"judge"))
    model, ids = trainer.model, trainer.train_dataset["prompt_ids"]
    rewards, goal = torch.tensor(reward(STRINGS.tokens())).double(), 0.
    for i in range(4):
        logps = string_logps(model, STRINGS, ids[i])
        with torch.no_grad(): ref = string_logps(trainer.reference, STRINGS, ids[i])
        goal = goal + (logps.exp() * (rewards - .2 * (logps - ref))).sum() / 4
    want = -flat(torch.autograd.grad(goal, model.parameters()))
    along = want / want.norm()
    found = sampled_gradients(trainer, 60)
    across = draw(20, len(want), seed=1)
    across -= (across @ along)[:, None] * along
    for ways, low, high in ((across, -4, 4), (along[None], 8, math.inf)):
        values = found @ ways.T
        z = values.mean(0) / (values.std(0) / len(values)**.5)
        assert low < z.min() and z.max() < high, z


def test_a_sample_is_what_the_sampler_draws(folder, tmp_path):
    "Ids and ends are kept, rewards belong to them, and the log-probs are those of the model."
    _, trainer = trainer_of(folder, tmp_path, seed=5)
    rollout, = trainer.roll_out([{"index": torch.tensor([2, 0, 7, 5])}], 3)
    texts = [trainer.train_dataset[i]["prompt_ids"] for i in (2, 0, 7, 5)]
    assert rollout.prompt_ids == texts
    known = STRINGS.tokens()
    for i, prompt in enumerate(texts):
        logps = string_logps(trainer.model, STRINGS, prompt)
        for j, ids in enumerate(rollout.completion_ids[i]):
            close(rollout.numbers["old_logps"][i, j].sum(), logps[known.index(ids)].detach())
            close(rollout.numbers["rewards"][i, j].item(), reward([ids])[0])
    close(rollout.numbers["old_logps"], rollout.numbers["ref_logps"])


def test_samples_depend_on_seed_block_and_place(folder, tmp_path):
    "Not on the batch, nor on what was drawn before."
    def ids(number, rows, seed=5):
        _, trainer = trainer_of(folder, tmp_path, seed=seed, per_device_train_batch_size=len(rows))
        return trainer.roll_out([{"index": torch.tensor(rows)}], number)[0].completion_ids
    whole = ids(2, [2, 0, 7, 5])
    assert ids(2, [2, 0]) == whole[:2] and ids(3, [2, 0, 7, 5]) != whole
    assert ids(2, [2, 0, 7, 5], seed=6) != whole


def test_a_missing_end_costs(folder, tmp_path):
    "The EOS trick: samples that were cut off pay, whether or not the judge minds."
    def rewards(**options):
        _, trainer = trainer_of(folder, tmp_path, seed=5, **options)
        rollout, = trainer.roll_out([{"index": torch.arange(4)}], 0)
        return rollout.numbers["rewards"], torch.tensor(
            [[c[-1] != 0 for c in cs] for cs in rollout.completion_ids])
    plain, cut = rewards()
    paid, _ = rewards(missing_eos_penalty=2.)
    assert cut.any() and not cut.all()
    close(plain - paid, 2. * cut.double())


# ---- the loop itself

def test_blocks_are_repeated_and_shuffled():
    sampler = BlockSampler(rows=10, block=4, updates=3, seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 24
    assert first[:4] == first[4:8] == first[8:12] and len(set(first)) == 8
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_mini_batches_share_out_every_pass():
    "Each prompt once per pass, in other company each time; a process's share is that of the whole."
    def passes(prompts, first):
        return [[mini_batch(prompts, first, 3, 3 * p + part, "s") for part in range(3)]
                for p in range(4)]
    whole, half = passes(12, 0), passes(6, 6)
    for parts in whole: assert sorted(sum(parts, [])) == list(range(12))
    assert len({str(parts) for parts in whole}) == 4
    for parts, own in zip(whole, half):
        assert [[i + 6 for i in part] for part in own] == [[i for i in p if i >= 6] for p in parts]


def test_a_rollout_survives_a_file():
    made = Rollout([[5], [6, 7]], [[[1, 0], [2]], [[3], [4]]],
                   {"rewards": draw(2, 2), "old_logps": draw(2, 2, 2), "sigma": draw(2)})
    again = read_rollout({**made.tensors("0"), **made.tensors("1")}, "1")
    assert (again.prompt_ids, again.completion_ids) == (made.prompt_ids, made.completion_ids)
    for name, values in made.numbers.items(): close(again.numbers[name], values)
    second = made.take([1])
    assert second.completion_ids == [[[3], [4]]]
    close(second.numbers["old_logps"], made.numbers["old_logps"][1:, :, :1])


RUNS = {"vcb": dict(loss="vcb", loss_params={"gamma": .5}),
        "grpo": dict(loss="grpo", num_iterations=2, num_mini_batches=2),
        "ppo": dict(loss="ppo", num_iterations=2, num_mini_batches=2,
                    loss_params={"target_kl": .1, "horizon": 100., "whiten_rewards": True})}
STEPS = 14
SETTINGS = dict(max_steps=STEPS, learning_rate=3e-3, logging_steps=1, warmup_steps=0, seed=4)


def train(folder, out, callbacks=None, **options):
    config, trainer = trainer_of(folder, out, callbacks, **{**SETTINGS, **options})
    run_training(trainer, config, "online")
    return trainer


def trajectory(folder, out):
    "What a run left: curves, and the log-probs of all strings under its policy."
    names = ("loss", "grad_norm", "objective/kl", "objective/scores", "policy/approxkl_avg")
    found = {name: torch.tensor(read_curve(out, name)[1], dtype=torch.float64) for name in names}
    model = load_policy(out/"model", "float64")
    with torch.no_grad(): found["end"] = string_logps(model, STRINGS, [1, 2])
    return found


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    @cache
    def run(name):
        out = tmp_path_factory.mktemp("base")
        train(folder, out, **RUNS[name])
        return trajectory(folder, out)
    return run


def assert_same(ours, theirs, rtol=1e-6, atol=1e-7):
    assert len(ours["loss"]) == len(theirs["loss"]) == STEPS
    for key in theirs:
        exact = dict(rtol=1e-9, atol=1e-9) if key == "end" else dict(rtol=rtol, atol=atol)
        close(ours[key], theirs[key], **exact, msg=lambda text, key=key: f"{key}: {text}")


def test_it_learns(base, folder):
    "The KL leaves 0, and the expected reward, a sum over all strings, rises; PPO's: see below."
    scores = torch.tensor(reward(STRINGS.tokens())).double()
    with torch.no_grad():
        start = string_logps(load_policy(folder/"model", "float64"), STRINGS, [1, 2])
    for name in RUNS:
        kl = base(name)["objective/kl"]
        assert kl[0].abs() < 1e-9 and kl[-1] > 1e-3
        if name != "ppo": assert base(name)["end"].exp() @ scores > start.exp() @ scores, name


@pytest.mark.parametrize("name", ["vcb", "ppo"])
def test_a_stock_model_without_padding(tmp_path, name):
    "Trained on somebody's n-best list: the tokenizer gains no token that the policy lacks."
    tokenizer = make_tokenizer()
    save_model(tiny(tokenizer), tokenizer, tmp_path/"model")
    answers = [{"response": " a", "overall_score": 1.}, {"response": " b", "overall_score": 2.}]
    write_jsonl(tmp_path/"list.jsonl", [{"instruction": f"Why {i}?", "completions": answers}
                                        for i in range(4)])
    stage.online(OnlineConfig(
        str(tmp_path/"out"), model=str(tmp_path/"model"), prompts=str(tmp_path/"list.jsonl"),
        reward=JUDGE.replace(":reward", ":shortest"), loss=name, n=3, max_steps=1,
        per_device_train_batch_size=2, **QUIET))
    left = load_tokenizer(tmp_path/"out"/"model")
    assert tokenizer.pad_token is None and len(left) == len(tokenizer)
    assert len(left) <= load_policy(tmp_path/"out"/"model").config.vocab_size


class Killed(Exception): "What stands for a kill."


class KillAt(TrainerCallback):
    def __init__(self, step): self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise Killed


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("every, killed", [(5, 7), (3, 13)])
def test_resumed(base, folder, tmp_path, name, every, killed):
    """Killed between two checkpoints, of which the last lies within the updates of a block, in the
    first or a later epoch: the rest repeats every bit, β and the value model included."""
    saved = dict(RUNS[name], save_strategy="steps", save_steps=every)
    with pytest.raises(Killed): train(folder, tmp_path, [KillAt(killed)], **saved)
    assert not (tmp_path/"model").exists()
    train(folder, tmp_path, **saved)
    ours, theirs = trajectory(folder, tmp_path), base(name)
    for key in theirs: close(ours[key], theirs[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_accumulated(base, folder, tmp_path, name):
    "Two micro-batches of two are a batch of four: samples, advantages and steps are the same."
    train(folder, tmp_path, **{**RUNS[name], "per_device_train_batch_size": 2,
                               "gradient_accumulation_steps": 2})
    assert_same(trajectory(folder, tmp_path), base(name))


def test_checkpointing(base, folder, tmp_path):
    "A backward that runs the forward again sees the same samples."
    train(folder, tmp_path, gradient_checkpointing=True, **RUNS["grpo"])
    assert_same(trajectory(folder, tmp_path), base("grpo"))


def test_rows(base, folder, tmp_path):
    "Packed or in padded rows."
    trainer = train(folder, tmp_path, way="rows", **RUNS["ppo"])
    assert trainer.way == "rows"
    assert_same(trajectory(folder, tmp_path), base("ppo"), rtol=1e-4, atol=1e-5)


def worker(folder, out):
    "What each of two processes does."
    torch.set_num_threads(1)
    for name, options in RUNS.items():
        train(folder, out/name, **{**options, "per_device_train_batch_size": 2})
    leave_group()
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.slow
def test_two_processes(base, folder, tmp_path):
    "Two gloo processes of two prompts each make the run of one process of four."
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, __file__, str(folder), str(tmp_path)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in RUNS: assert_same(trajectory(folder, tmp_path/name), base(name))


def solo(folder, out):
    "One process that saves at every step."
    torch.set_num_threads(1)
    train(folder, out, **RUNS["ppo"], save_strategy="steps", save_steps=1)


@pytest.mark.slow
def test_killed_for_real(base, folder, tmp_path):
    "SIGKILL as soon as a checkpoint's folder appears, whole or half: twice; then to the end."
    command = [sys.executable, __file__, "solo", str(folder), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for step in (3, 8):
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        while not (tmp_path/"checkpoints"/f"checkpoint-{step}").exists():
            assert process.poll() is None
            time.sleep(.01)
        process.kill()
        process.wait()
        assert not (tmp_path/"model").exists()
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    ours, theirs = trajectory(folder, tmp_path), base("ppo")
    for key in theirs: close(ours[key], theirs[key], rtol=0, atol=0, msg=key)


LORA = {"r": 4, "lora_dropout": 0., "init_lora_weights": True}


@pytest.mark.parametrize("name", ["vcb", "ppo"])
def test_lora(folder, tmp_path, name):
    "The adapter's reference is the policy with it off; a killed run resumes with it."
    saved = dict(RUNS[name], save_strategy="steps", save_steps=5, peft_config=LORA)
    whole = train(folder, tmp_path/"whole", **saved)
    assert whole.reference is None
    with pytest.raises(Killed): train(folder, tmp_path/"cut", [KillAt(7)], **saved)
    train(folder, tmp_path/"cut", **saved)
    ours, theirs = (trajectory(folder, tmp_path/k) for k in ("cut", "whole"))
    assert theirs["objective/kl"][0].abs() < 1e-9 < theirs["objective/kl"][-1].abs()
    for key in theirs: close(ours[key], theirs[key], rtol=0, atol=0, msg=key)


def test_metrics_have_the_fields_own_names(folder, tmp_path):
    trainer = train(folder, tmp_path, **RUNS["ppo"])
    row = trainer.state.log_history[0]
    assert {"objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward",
            "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg",
            "loss/policy_avg", "loss/value_avg", "val/ratio", "val/clipfrac_avg",
            "val/num_eos_tokens", "completions/mean_length", "completions/clipped_ratio",
            "completions/distinct_share", "frac_reward_zero_std", "objective/beta"} <= row.keys()
    assert row["val/ratio"] == pytest.approx(1) and row["policy/approxkl_avg"] < 1e-12
    assert row["val/num_eos_tokens"] == pytest.approx(12 * (1 - row["completions/clipped_ratio"]))
    assert row["objective/rlhf_reward"] == pytest.approx(
        row["objective/scores"] + row["objective/non_score_reward"])
    late = trainer.state.log_history[STEPS - 2]
    assert late["objective/beta"] != row["objective/beta"]


@pytest.mark.slow
@pytest.mark.parametrize("name, strength, steps, rate, n", [
    ("vcb", 1., 300, 1e-2, 8), ("rloo", .5, 300, 1e-2, 8), ("ppo", .5, 400, 3e-2, 32)])
def test_the_loop_ends_near_the_optimum(folder, tmp_path, name, strength, steps, rate, n):
    """The whole loop on two prompts, against π* over all 15 strings: VCB's of its γ with the SFT
    model's own σ(x), RLOO's and PPO's of their β. From more than .6 nats to less than .1."""
    model, tokenizer = load_policy(folder/"model", "float64"), load_tokenizer(folder/"model")
    prompts = ["a", "b a"]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    def policy(model):
        with torch.no_grad(): return torch.stack([string_logps(model, STRINGS, p) for p in ids])
    rewards = torch.tensor(reward(STRINGS.tokens())).double().expand(2, -1)
    world = TableWorld(policy(model), rewards)
    scored = [dict(prompt=p, completions=["a", "b"], rewards=[0., 1.], reward_std=s)
              for p, s in zip(prompts, world.reward_std.tolist())]
    options = dict(loss_params={"beta": strength}) if name != "vcb" else dict(
        loss_params={"gamma": strength}, sigma="stored",
        candidates=str(write_jsonl(tmp_path/"scored.jsonl", scored)))
    config = config_of(folder, tmp_path/"out", loss=name, n=n, learning_rate=rate,
                       per_device_train_batch_size=2, max_steps=steps, **options, reward=JUDGE)
    trainer = {"ppo": PPOTrainer}.get(name, OnlineTrainer)(
        config.model, checkpoint_args(config), Dataset.from_list([{"prompt": p} for p in prompts]))
    trainer.train()
    optimum = optimal_policy(world, strength, None if name == "vcb" else 1.)
    far, near = (kl_divergence(policy(m), optimum) for m in (model, trainer.model))
    assert far.min() > .6 and near.max() < .1, near


# ---- the stage

def test_the_stage_is_run_from_files(folder, tmp_path):
    "A model that loads again, a log, no checkpoints left; the value model starts from the judge."
    config = config_of(folder, tmp_path, **{**SETTINGS, **RUNS["ppo"], "max_steps": 4})
    summary = online(config)
    assert summary["steps"] == 4 and summary["samples"] == 12
    assert summary["data"]["prompts"] == len(PROMPTS)
    assert load_policy(tmp_path/"model") and not (tmp_path/"checkpoints").exists()


def test_a_collapse_is_said(folder, tmp_path):
    "A reward for the empty answer alone, and no KL: one text is left, and the summary says so."
    config = config_of(folder, tmp_path, **{
        **SETTINGS, "max_steps": 120, "learning_rate": 2e-2}, loss="rloo", n=8,
        loss_params={"beta": 0.}, reward=JUDGE.replace(":reward", ":shortest"))
    assert "entropy" in online(config)["collapsed"]


def test_sigma_of_sft_samples(folder, tmp_path):
    "σ(x) is looked up by the prompt. Without candidates one is named, without a signal left out."
    rows = [{"prompt": p, "completions": ["a", "b", "a b"], "rewards": [0., 1., 5. + i]}
            for i, p in enumerate(PROMPTS)]
    rows[3]["rewards"] = [2., 2., 2.]
    file = write_jsonl(tmp_path/"scored.jsonl", rows[::-1])
    config = config_of(folder, tmp_path/"out", sigma="stored", candidates=str(file), limit=8)
    trainer = OnlineTrainer(config.model, config, Dataset.from_list(
        [{"prompt": p} for p in PROMPTS]))
    want = [torch.tensor(row["rewards"]).std().item() for row in rows if len({*row["rewards"]}) > 1]
    assert trainer.train_dataset["sigma"] == pytest.approx(want)
    rollout, = trainer.roll_out([{"index": torch.tensor([2, 5])}], 0)
    close(rollout.numbers["sigma"], torch.tensor([want[2], want[5]]).double(), rtol=1e-6, atol=0)
    few = config_of(folder, tmp_path/"out", sigma="stored",
                    candidates=str(write_jsonl(tmp_path/"few.jsonl", rows[:2])))
    with pytest.raises(InputError, match="prompt 2: .*has no candidates for it"): online(few)


@pytest.mark.parametrize("options, said", [
    (dict(loss="gpro"), "Did you mean 'grpo'"), (dict(loss_params={"gama": 1.}), "'gamma'"),
    (dict(loss="grpo", loss_params={"beta": "x"}), "beta is 'x'. Give a number"),
    (dict(loss="rloo", loss_params={"beta": -1.}), "beta is -1"),
    (dict(loss="ppo", loss_params={"lam": 2.}), "lam is 2"),
    (dict(n=1), "n is 1, and vcb compares"), (dict(temperature=.5, loss="ppo"), "temperature"),
    (dict(temperature=0.), "temperature 0"), (dict(sigma="stord"), "'stored'"),
    (dict(loss="grpo", sigma="stored"), "grpo has no σ"),
    (dict(num_mini_batches=3), "does not divide"), (dict(num_iterations=0), "num_iterations is 0"),
    (dict(missing_eos_penalty=-1.), "missing_eos_penalty is -1"),
    (dict(peft_config={"rank": 3}), "'rank'")])
def test_settings_that_cannot_be_are_named(folder, tmp_path, options, said):
    with pytest.raises(InputError, match=said): config_of(folder, tmp_path, **options)


@pytest.mark.parametrize("options, said", [
    (dict(sigma="stored"), "candidates is not set"), (dict(reward=None), "reward is not set"),
    (dict(per_device_train_batch_size=16), "There are 8 prompts, and a step takes 16"),
    (dict(eval_strategy="epoch"), "eval_strategy"), (dict(max_new_tokens=40), "context of 32")])
def test_what_a_run_would_stumble_on_is_said_first(folder, tmp_path, options, said):
    with pytest.raises(InputError, match=said): online(config_of(folder, tmp_path, **options))


def test_a_trained_adapter_has_no_reference(folder, tmp_path):
    from vcb_nb.adapters import add_lora
    model = add_lora(load_policy(folder/"model"), {"r": 2, "init_lora_weights": False})
    config, rows = config_of(folder, tmp_path), Dataset.from_list([{"prompt": p} for p in PROMPTS])
    with pytest.raises(InputError, match="already trained"): OnlineTrainer(
        model, config, rows, load_tokenizer(config.model))


# ---- recipes

def recipe(folder, **sections):
    return check_recipe({"name": "t", "seed": 0, "output_dir": str(folder/"run"),
                         "model": str(folder/"model"), **sections})


ONLINE = dict(reward=JUDGE, n=3, max_new_tokens=3, per_device_train_batch_size=4)


def test_methods_become_jobs_and_policies(folder):
    "Each method its own folder; evaluation gets them all, with their place on the frontier."
    prompts = str(folder/"prompts.jsonl")
    jobs = {job.name: job for job in plan(recipe(
        folder, online={**ONLINE, "prompts": prompts, "methods": {
            "ppo": {"sweep": {"beta": [.1, .2]}}, "fresh": {"loss": "vcb", "n": 4}}},
        evaluate={"prompts": prompts, "gold": JUDGE}))}
    assert list(jobs) == ["online/ppo-beta0.1", "online/ppo-beta0.2", "online/fresh", "evaluate"]
    assert jobs["online/fresh"].config.n == 4 and jobs["online/ppo-beta0.1"].config.iterations == 4
    found = jobs["evaluate"].config
    assert found.policies["fresh"].endswith("online/fresh/model")
    assert found.methods == {
        "ppo-beta0.1": {"method": "ppo", "strength": "beta", "value": .1},
        "ppo-beta0.2": {"method": "ppo", "strength": "beta", "value": .2},
        "fresh": {"method": "vcb_online", "strength": "gamma", "value": 1.}}


def test_one_name_stands_for_one_policy(folder):
    with pytest.raises(InputError, match="'vcb' is a method of calibrate and of online"):
        recipe(folder, calibrate={}, online={**ONLINE, "methods": {"vcb": {}}})


def test_stored_sigma_comes_from_the_runs_own_candidates(folder):
    sections = dict(sample={"prompts": str(folder/"prompts.jsonl")}, score={"reward": JUDGE})
    def candidates(**options):
        jobs = plan(recipe(folder, **sections, online={
            **ONLINE, "prompts": str(folder/"prompts.jsonl"), **options}))
        return jobs[-1].config.candidates
    assert candidates() is None
    assert candidates(sigma="stored") == str(folder/"run"/"score"/"data")


def test_demo_online_is_planned():
    names = [job.name for job in plan(load_recipe("demo_online"))]
    assert {"online/ppo", "online/vcb_online", "online/grpo", "calibrate/vcb",
            "calibrate/dpo"} <= {name.partition("-")[0] for name in names}


if __name__ == "__main__":
    if sys.argv[1] == "solo": solo(*map(Path, sys.argv[2:]))
    else: worker(*map(Path, sys.argv[1:]))
