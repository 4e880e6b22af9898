# SPDX-License-Identifier: MIT
"""Checks against independent oracles: hand calculation, slow loop, brute force, numpy.

From the top: the method that people copy (gate, advantages, losses), the policy and its
rollouts, the groups, the trainings, the metrics, the toy shop and the premise of its
story, the command, README.

    python -m pytest -q
"""

import math
import re
import runpy
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import adagrpo
import toy_data
from adagrpo import (
    FUSION_WEIGHTS,
    Config,
    Gate,
    Policy,
    Ranker,
    Scored,
    adagrpo_gate,
    adagrpo_loss,
    group_advantages,
    grpo_loss,
)
from toy_data import Shop, Split, make_shop

torch.set_num_threads(1)

HERE = Path(__file__).parent
NAN = math.nan
INF = math.inf
TREND, SERIES, NICHE = range(3)


# -------------------------------------------------------------------------- the gate


def gate(target_reward, rewards, hit=None, valid=None, **changed) -> Gate:
    """The gate of some lists. By default all are valid and none is the target."""
    rewards = torch.as_tensor(rewards)
    if hit is None:
        hit = torch.zeros(rewards.shape)
    if valid is None:
        valid = torch.ones(rewards.shape)
    settings = {"min_difficulty": 0.5, "min_discriminability": 0.25, "ranked": True}
    return adagrpo_gate(
        target_reward=torch.as_tensor(target_reward),
        rollout_rewards=rewards,
        hit=torch.as_tensor(hit).bool(),
        valid=torch.as_tensor(valid).bool(),
        **(settings | changed),
    )


def test_the_gate_by_hand():
    """Five samples; m is r(y) minus the mean of r over the negatives.

    0: nothing hits, d = 1;  m = 0.75 - (0.25 + 0.25 + 0.5 + 0.5) / 4 = 0.375
    1: nothing hits, d = 1;  m = 0.5 - 0.375 = 0.125
    2: one of four is ahead of the hit, d = 0.25; the hit is no negative itself,
       m = 0.75 - (0.25 + 0.25 + 0.25) / 3 = 0.5
    3: the hit comes first, d = 0;  m = 0.25 - (0.25 + 0.5 + 0.75) / 3 = -0.25
    4: nothing hits, d = 1; the last one is a hallucination and no negative,
       m = 0.5 - (0.5 + 0.5 + 0.5) / 3 = 0 (with its reward 0 it would be 0.125)
    """
    result = gate(
        [0.75, 0.5, 0.75, 0.25, 0.5],
        [
            [0.25, 0.25, 0.5, 0.5],
            [0.25, 0.25, 0.5, 0.5],
            [0.25, 0.75, 0.25, 0.25],
            [0.25, 0.25, 0.5, 0.75],
            [0.5, 0.5, 0.5, 0.0],
        ],
        hit=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        valid=[[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]],
    )
    assert result.difficulty.tolist() == [1, 1, 0.25, 0, 1]
    assert result.discriminability.tolist() == [0.375, 0.125, 0.5, -0.25, 0]
    assert result.hard.tolist() == [True, True, False, False, True]
    assert result.clear.tolist() == [True, False, True, False, False]
    assert result.admit.tolist() == [True, False, False, False, False]


def slow_diagnostics(target_reward, rewards, hit, valid, ranked) -> tuple[float, float]:
    """Difficulty and discriminability of one sample, from plain lists."""
    difficulty = hit.count(False) / len(hit)
    if ranked:
        difficulty = 1.0
        if True in hit:
            difficulty = hit.index(True) / len(hit)

    negatives = [r for r, h, v in zip(rewards, hit, valid, strict=True) if v and not h]
    if not negatives:
        return difficulty, NAN
    return difficulty, target_reward - sum(negatives) / len(negatives)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("group", [1, 2, 10, 32])
def test_the_gate_against_a_slow_loop(group, ranked):
    """100 random groups, without a hit, with several, of nonsense alone."""
    torch.manual_seed(group)
    target_reward = torch.rand(100)
    rewards = torch.rand(100, group)
    valid = torch.rand(100, group) < torch.rand(100, 1)
    hit = valid & (torch.rand(100, group) < 0.2)
    sample = (target_reward, rewards, hit, valid)
    thresholds = {"min_difficulty": 0.3, "min_discriminability": 0.01}
    result = gate(*sample, **thresholds, ranked=ranked)
    for b in range(100):
        difficulty, m = slow_diagnostics(*[x[b].tolist() for x in sample], ranked)
        hard = np.float32(difficulty) >= np.float32(0.3)
        clear = m >= 0.01  # False for nan
        assert result.difficulty[b].item() == np.float32(difficulty)
        found = result.discriminability[b].item()
        assert found == pytest.approx(m, abs=1e-6, nan_ok=True)
        assert result.hard[b].item() == hard
        assert result.clear[b].item() == clear
        assert result.admit[b].item() == (hard and clear)


def test_thresholds_are_inclusive_and_sums_in_float32():
    """A hit in place 13 of 40 is a difficulty of 0.3. Rewards may be logits of half
    precision: m = -3500 - (-3000) = -500, though 39 * -3000 is beyond float16.
    """
    hit = torch.arange(40)[None] == 12
    rewards = torch.full((1, 40), -3000.0, dtype=torch.float16)
    target_reward = torch.tensor([-3500.0], dtype=torch.float16)
    for d, m, admitted in ((0.3, -500, True), (0.31, -500, False), (0.3, -499, False)):
        thresholds = {"min_difficulty": d, "min_discriminability": m}
        result = gate(target_reward, rewards, hit, **thresholds)
        assert result.discriminability.item() == -500
        assert result.admit.item() is admitted


@pytest.mark.parametrize("name", ["target_reward", "rollout_rewards", "hit", "valid"])
def test_the_gate_refuses_a_bad_argument_and_says_what_was_given(name):
    no, yes = torch.tensor([False, True])[:, None, None].expand(2, 2, 4)
    good = {"rollout_rewards": torch.zeros(2, 4), "hit": no, "valid": yes}
    good |= {"target_reward": torch.zeros(2), "ranked": True}
    good |= {"min_difficulty": 0.3, "min_discriminability": 0.01}
    for bad in (good[name][:1], good[name][None], good[name][..., None]):
        with pytest.raises(ValueError, match="target_reward") as error:
            adagrpo_gate(**(good | {name: bad}))
        assert str(tuple(bad.shape)) in str(error.value)
    if name in ("hit", "valid"):
        with pytest.raises(TypeError, match=f"{name}.*float32"):
            adagrpo_gate(**(good | {name: good[name].float()}))


# ------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    """Mean 2 and deviations -1, 1, 0, 0: std = sqrt(2 / 4), A = -sqrt 2, sqrt 2."""
    advantages = group_advantages(torch.tensor([[1.0, 3.0, 2.0, 2.0]]))
    root = math.sqrt(2)
    assert advantages[0].tolist() == pytest.approx([-root, root, 0, 0])


def advantages_by_numpy(rewards: torch.Tensor) -> torch.Tensor:
    """In float64, from the numbers that the tensor really holds."""
    rewards = rewards.double().numpy()
    centred = rewards - rewards.mean(1, keepdims=True)
    return torch.from_numpy(centred / rewards.std(1, keepdims=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_advantages_against_numpy_in_any_unit(dtype, unit):
    torch.manual_seed(0)
    for group in (2, 3, 33):
        rewards = (unit * torch.rand(7, group)).to(dtype)
        expected = advantages_by_numpy(rewards)
        assert_close(group_advantages(rewards).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 1e-7, 0.1, -0.7, 10.1, 1000.1, 6e4])
def test_a_flat_group_gets_exactly_zero_at_any_level(level, dtype):
    """Up to rounding: the next float32 is 1.2e-7 of the level away, or less."""
    for group in range(2, 34):
        rewards = torch.full((3, group), level, dtype=dtype)
        assert group_advantages(rewards).eq(0).all(), group

    rounded = torch.full((3, 8), level)
    rounded[:, ::3] = torch.nextafter(rounded, torch.tensor(INF))[:, ::3]
    assert group_advantages(rounded).eq(0).all()


def test_a_tiny_but_real_spread_counts():
    """Rewards of 1, 3, 2, 9 steps above a level that is far higher."""
    steps = torch.tensor([[1, 3, 2, 9]])
    half = (1000 + 0.5 * steps).half()
    for rewards in (0.5 + 2**-18 * steps, -1000 + 2**-7 * steps, 1e-9 * steps, half):
        expected = advantages_by_numpy(rewards).float()
        assert_close(group_advantages(rewards), expected, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------- the losses


def test_the_clipped_surrogate_by_hand():
    """Clip 0.2. Ratio 1.5: A = 2 is clipped to 1.2 * 2, A = -2 stays -3, the worse.

    Ratio 0.5: A = 2 stays 1, the worse; A = -2 is clipped to 0.8 * -2.
    """
    logp = torch.tensor([[1.5], [1.5], [0.5], [0.5]]).log()
    advantages = torch.tensor([[2.0], [-2.0], [2.0], [-2.0]])
    loss = grpo_loss(logp, torch.zeros(4, 1), advantages)
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6])


def test_loss_and_gradient_against_a_slow_loop():
    torch.manual_seed(2)
    nll = torch.rand(5, requires_grad=True)
    logp = torch.randn(5, 4, requires_grad=True)
    old_logp = logp.detach() + 0.3 * torch.randn(5, 4)
    advantages = torch.randn(5, 4)
    admit = torch.tensor([True, False, True, False, True])
    grpo = grpo_loss(logp, old_logp, advantages, clip=0.1)
    fast = adagrpo_loss(nll, grpo, admit, weight=0.7)

    slow = torch.zeros(())
    for b in range(5):
        slow = slow + nll[b] / 5
        for i in range(4):
            ratio = math.e ** (logp[b, i] - old_logp[b, i])
            clipped = min(max(ratio, torch.tensor(0.9)), torch.tensor(1.1))
            gain = min(ratio * advantages[b, i], clipped * advantages[b, i])
            if admit[b]:
                slow = slow - 0.7 * gain / 4 / 5

    assert_close(fast, slow)
    inputs = (nll, logp)
    gradients = torch.autograd.grad(fast, inputs)
    assert_close(gradients, torch.autograd.grad(slow, inputs))
    assert gradients[1][~admit].eq(0).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["target", "negative", "hit", "hallucination"])
def test_a_reward_that_is_not_finite_never_reaches_a_gradient(bad, place):
    """Of the target or a negative it closes the gate; of others m stays 0.9 - 0.1."""
    reward = {"target": 0.9, "negative": 0.1, "hit": 0.2, "hallucination": 0.0}
    reward[place] = bad
    target_reward, *rewards = reward.values()
    hit = [[0, 1, 0]]
    result = gate([target_reward], [rewards], hit, [[1, 1, 0]], min_difficulty=0.3)
    assert result.admit.item() == (place in ("hit", "hallucination"))
    if result.admit:
        assert result.discriminability.item() == pytest.approx(0.8)
    if place != "target":
        assert group_advantages(torch.tensor([rewards])).tolist() == [[0, 0, 0]]


def test_gate_and_advantages_send_back_no_gradient():
    rewards = torch.rand(3, 4, requires_grad=True)
    tensors = [*gate(rewards[:, 0], rewards), group_advantages(rewards)]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize(("logp", "old_logp"), [(-INF, -INF), (-1.0, -200.0)])
def test_a_refused_sample_gets_a_gradient_of_exactly_zero(logp, old_logp):
    """Also where its rollouts are padding, or the ratio is beyond float32. In value and
    in gradient: 0 * inf is nan, so what is masked too late comes back as nan.

    The last two samples are admitted, and get -weight * A / G / B for each rollout; the
    third has such a rollout, too, and gets nothing for it.
    """
    logp = torch.tensor([[logp, -2], [-3, -2], [logp, -2]], requires_grad=True)
    old_logp = torch.tensor([[old_logp, -2], [-3, -2], [old_logp, -2]])
    grpo = grpo_loss(logp, old_logp, torch.tensor([[-1.0, 1.0]]).expand(3, -1))
    loss = adagrpo_loss(torch.ones(3), grpo, torch.tensor([False, True, True]), 3.0)
    loss.backward()
    assert loss.item() == 1
    assert logp.grad.tolist() == [[0, 0], [0.5, -0.5], [0, -0.5]]


# --------------------------------------------------------------- policy and rollouts


def tiny_policy(levels: int = 3) -> Policy:
    """A vocabulary of 5, and weights far from uniform, so that mistakes show."""
    torch.manual_seed(1)
    item_tokens = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 3, 3, 4]])[:, -levels:]
    policy = Policy(item_tokens, history_length=3, width=16)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return policy


def prompts_of(policy: Policy, samples: int) -> torch.Tensor:
    """Histories of 3 items of random tokens: (samples, 3 * L)."""
    return torch.randint(5, (samples, 3 * policy.item_tokens.shape[1]))


def slow_log_prob(policy, prompt, item) -> torch.Tensor:
    """Each token by a forward of its own over all that stands before it: (B,)."""
    total = torch.zeros(len(item))
    for level in range(item.shape[1]):
        before = torch.cat([prompt, item[:, :level]], dim=1)
        next_logp = policy(before)[0][:, -1]  # (B, V)
        total = total + next_logp.gather(1, item[:, level : level + 1]).squeeze(1)
    return total


def test_a_text_read_in_two_parts_is_read_as_one():
    """With a cache, and without a mask. And the places of equal tokens count."""
    policy = tiny_policy()
    prompt = prompts_of(policy, 3)
    whole, _ = policy(prompt)
    first, cache = policy(prompt[:, :4])
    second, _ = policy(prompt[:, 4:], cache=cache)
    assert_close(torch.cat([first, second], dim=1), whole)
    next_logp, _ = policy(torch.tensor([[1, 1, 1]]))
    assert not torch.allclose(next_logp[0, 0], next_logp[0, 2])


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_rollouts_match_plain_forwards(levels):
    """Every rollout again, alone after its prompt: same log-prob (also by `log_prob`),
    same gradient.
    """
    policy = tiny_policy(levels)
    prompt = prompts_of(policy, 3)
    tokens, logp = adagrpo.rollout(policy, prompt, 5)
    assert tokens.shape == (3, 5, levels)
    assert (logp[:, :-1] >= logp[:, 1:]).all(), "not likeliest first"

    plain = [slow_log_prob(policy, prompt, tokens[:, i]) for i in range(5)]
    plain = torch.stack(plain, dim=1)
    assert_close(logp, plain)
    assert_close(adagrpo.log_prob(policy, prompt, tokens[:, 2]), plain[:, 2])

    weights = torch.randn(3, 5)
    inputs = list(policy.parameters())
    gradients = torch.autograd.grad((weights * logp).sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad((weights * plain).sum(), inputs, allow_unused=True)
    assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


def test_beams_are_exact_where_no_prefix_is_dropped():
    """25 beams keep every prefix of two tokens, so they are the best 25 of all 125."""
    policy = tiny_policy()
    prompt = prompts_of(policy, 4)
    every_id = torch.cartesian_prod(*[torch.arange(5)] * 3)
    tokens, logp = adagrpo.rollout(policy, prompt, 25)
    for b in range(4):
        best = slow_log_prob(policy, prompt[b].expand(125, -1), every_id).topk(25)
        assert_close(logp[b], best.values)
        assert tokens[b].tolist() == every_id[best.indices].tolist()


def test_a_catalogue_where_two_items_have_one_id_is_refused():
    with pytest.raises(ValueError, match="item_tokens.* same ID"):
        Policy(torch.tensor([[0, 1], [1, 0], [0, 1]]), history_length=2)


def test_a_saved_policy_refuses_another_catalogue():
    """As many items and tokens, so that the weights alone would fit."""
    state = tiny_policy().state_dict()
    tiny_policy().load_state_dict(state)
    other = Policy(tiny_policy().item_tokens.flip(0), history_length=3, width=16)
    with pytest.raises(ValueError, match="another catalogue"):
        other.load_state_dict(state)


# ------------------------------------------------------------------------- the groups


def tiny_shop() -> Shop:
    """Made by hand: 12 items of two codes, 3 purchases in a history, slates of 4."""
    rng = np.random.default_rng(0)

    def split(users: int) -> Split:
        bought = rng.permuted(np.tile(np.arange(12), (users, 1)), axis=1)
        return Split(bought[:, :3], bought[:, 3], rng.integers(2, size=users))

    return Shop(
        tokens=np.column_stack(np.divmod(np.arange(12), 4)),
        kinds=("head", "tail"),
        pretrain=split(40),
        posttrain=split(12),
        validation=split(20),
        test=split(25),
        feed_history=rng.integers(12, size=(50, 3)),
        shown=rng.integers(12, size=(50, 4)),
        clicked=rng.random((50, 4)) < 0.4,
    )


def tiny_models(std: float = 0.3) -> tuple[Policy, Ranker]:
    """Untrained, and far enough from 0 for different items to score differently."""
    torch.manual_seed(0)
    policy = Policy(torch.as_tensor(tiny_shop().tokens), history_length=3, width=16)
    ranker = Ranker(items=12)
    for parameter in [*policy.parameters(), *ranker.parameters()]:
        torch.nn.init.normal_(parameter, std=std)
    return policy, ranker


@pytest.mark.parametrize("group", [2, 6, 14])
@pytest.mark.parametrize("bought", [1, 3, 5])
def test_a_group_is_the_likeliest_ids_that_have_not_been_bought(group, bought):
    """All 16 IDs by slow forwards, sorted, and what was bought crossed out.

    The policy reads 3 items and sees fewer of a short history; of a longer one the
    older are bought all the same. 14 cannot be found if 3 or 5 of 16 may have gone.
    Four IDs name no item, so some rollouts are hallucinations with reward 0.
    """
    policy, ranker = tiny_models()
    rng = np.random.default_rng(bought)
    users = rng.permuted(np.tile(np.arange(12), (20, 1)), axis=1)[:, : bought + 1]
    history, target = torch.from_numpy(users).tensor_split([bought], dim=1)
    target = target.squeeze(1)
    scored = adagrpo.roll_out_and_score(policy, ranker, history, target, group)

    every_id = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    known = policy.item_tokens.tolist()
    score = ranker(history, torch.arange(12).expand(20, -1)).sigmoid().tolist()
    for b in range(20):
        prompt = policy.item_tokens[history[b, -3:]].flatten().expand(16, -1)
        logp = slow_log_prob(policy, prompt, every_id)
        expected = []
        for place in logp.argsort(descending=True).tolist():
            ID = every_id[place].tolist()
            item = -1
            if ID in known:
                item = known.index(ID)
            if item not in history[b].tolist():
                expected.append((ID, item, logp[place].item()))
        IDs, items, logps = zip(*expected[: min(group, 16 - bought)], strict=True)
        assert scored.tokens[b].tolist() == list(IDs)
        assert scored.logp[b].tolist() == pytest.approx(logps)
        assert scored.valid[b].tolist() == [item >= 0 for item in items]
        assert scored.hit[b].tolist() == [item == target[b].item() for item in items]
        rewards = [score[b][item] * (item >= 0) for item in items]
        assert scored.rewards[b].tolist() == pytest.approx(rewards)
        assert scored.target_reward[b].item() == pytest.approx(score[b][target[b]])
    assert scored.hit.any()
    assert not scored.valid.all()
    assert scored.logp.requires_grad
    assert not scored.rewards.requires_grad


def test_a_group_of_fewer_than_two_is_an_error():
    """16 IDs; with 14 purchases two are left, with 15 one."""
    policy, ranker = tiny_models()
    target = torch.zeros(1, dtype=torch.long)
    history = torch.arange(15)[None] % 12
    scored = adagrpo.roll_out_and_score(policy, ranker, history[:, :14], target, 5)
    assert scored.rewards.shape == (1, 2)
    with pytest.raises(ValueError, match="group"):
        adagrpo.roll_out_and_score(policy, ranker, history, target, 5)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_score_that_is_not_finite_is_an_error_that_names_the_ranker(bad):
    """Of the likeliest item, in the group of two, or of the target outside it."""
    policy, ranker = tiny_models()
    history = torch.tensor([[0, 1, 2]])
    tokens, _ = adagrpo.rollout(policy, policy.prompt(history), 16)
    items = policy.items_of(tokens)
    first, *_, last = items[items > 2]
    for broken in (first, last):
        table = torch.full((12,), 0.5)
        table[broken] = bad
        ranker.click_probability = lambda history, items, table=table: table[items]
        with pytest.raises(ValueError, match="ranker"):
            adagrpo.roll_out_and_score(policy, ranker, history, last[None], 2)


# ----------------------------------------------------------------------- the trainings


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def clipped(gradient: torch.Tensor) -> torch.Tensor:
    """To length 1, if it is longer."""
    return gradient / max(1, gradient.norm().item())


@pytest.mark.parametrize("std", [0.01, 0.3])  # a gradient that is not clipped, and one
@pytest.mark.parametrize("arm", ["nll", "mix-1", "adagrpo"])
def test_one_step_of_an_arm_by_hand(arm, std):
    """The gradient of (7) with ratios of 1, rollout by rollout: each sample's NLL / B,
    and for each rollout of an admitted sample -weight * A_i * log p(o_i) / G / B.

    All 12 users are one batch, so the gradient that the only step leaves behind is that
    of the weights at the start.
    """
    weight = {"nll": 0, "mix-1": 1, "adagrpo": 5}[arm]
    config = Config(batch=12, epochs=1, group=6, min_discriminability=0.0)
    rule, its_weight = adagrpo.make_arms(config)[arm]
    policy, ranker = tiny_models(std)
    users = tiny_shop().posttrain
    dose = adagrpo.post_train(policy, ranker, users, rule, its_weight, config)
    assert all(parameter.grad is None for parameter in ranker.parameters())

    start, _ = tiny_models(std)
    history = torch.as_tensor(users.history)
    target = torch.as_tensor(users.target)
    scored = adagrpo.roll_out_and_score(start, ranker, history, target, 6)
    prompt = start.item_tokens[history].flatten(1)
    nll = -slow_log_prob(start, prompt, start.item_tokens[target]).sum() / 12
    grpo = torch.zeros(())
    admitted = 0
    for b in range(12):
        sample = (scored.target_reward, scored.rewards, scored.hit, scored.valid)
        sample = [x[b].tolist() for x in sample]
        difficulty, m = slow_diagnostics(*sample, ranked=True)
        if arm == "adagrpo" and not (difficulty >= 0.3 and m >= 0):
            continue
        admitted += 1
        rewards = np.array(sample[1])
        for i, advantage in enumerate((rewards - rewards.mean()) / rewards.std()):
            logp = slow_log_prob(start, prompt[b : b + 1], scored.tokens[b, i : i + 1])
            grpo = grpo - advantage * logp.sum() / 6 / 12

    (nll + weight * grpo).backward()
    expected = gradient_of(start)
    assert (expected.norm() > 1) == (std == 0.3)
    assert_close(gradient_of(policy), clipped(expected), rtol=1e-3, atol=1e-5)
    assert dose == pytest.approx(weight * admitted / 12)
    assert arm != "adagrpo" or 0 < admitted < 12


@pytest.mark.parametrize("arm", ["nll", "adagrpo"])
def test_a_gradient_that_is_not_finite_ends_the_training(arm):
    """The weights stay as they are."""
    policy, ranker = tiny_models()
    torch.nn.init.constant_(policy.norm.weight, NAN)
    start = weights_of(policy)
    config = Config(group=6)
    rule, weight = adagrpo.make_arms(config)[arm]
    users = tiny_shop().posttrain
    with pytest.raises(RuntimeError, match="non-finite"):
        adagrpo.post_train(policy, ranker, users, rule, weight, config)
    assert_close(weights_of(policy), start, equal_nan=True, rtol=0, atol=0)


def test_pre_training_by_hand():
    """The mean NLL of every token after the first, of whole sequences: one step."""
    shop = tiny_shop()
    config = Config(seed=5, pretrain_batch=40, pretrain_epochs=1)
    policy = adagrpo.pretrain(shop, config)
    torch.manual_seed(5)
    tokens = torch.as_tensor(shop.tokens)
    start = Policy(tokens, history_length=3)
    bought = torch.as_tensor(purchases_of(shop.pretrain))
    sequence = tokens[bought].flatten(1)  # (40, 8)
    loss = torch.zeros(())
    for place in range(1, 8):
        next_logp = start(sequence[:, :place])[0][:, -1]
        loss = loss - next_logp.gather(1, sequence[:, place : place + 1]).mean() / 7
    loss.backward()
    expected = clipped(gradient_of(start))
    assert_close(gradient_of(policy), expected, rtol=1e-3, atol=1e-5)


def test_every_pass_takes_each_sample_once_and_in_an_order_of_its_own():
    torch.manual_seed(0)
    batches = adagrpo.shuffled_batches(samples=10, batch=4, epochs=3)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 4, 4, 2]
    passes = torch.cat(batches).split(10)
    assert [sorted(rows.tolist()) for rows in passes] == [list(range(10))] * 3
    assert passes[0].tolist() != passes[1].tolist() != list(range(10))


def test_the_learning_rate_warms_up_over_20_steps_and_decays_to_zero():
    """Of 100 steps: 1/20, 2/20, ..., then the line from 1 to 0, 0.80 at step 20.
    Adam's first step is the rate times the sign of the gradient, and AdamW takes 1% of
    the weights off: with a rate of 2 / 20 a weight of 1 falls by 0.1 + 0.001.
    """
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = adagrpo.Optimizer(model, lr=2.0, steps=100)
    rates = []
    for step in range(100):
        rates.append(optimizer.adamw.param_groups[0]["lr"] / 2.0)
        optimizer.step(3 * model.weight.sum())
        assert model.weight.grad.item() == pytest.approx(1)  # 3, clipped
        if step == 0:
            assert model.weight.item() == pytest.approx(0.899)
    assert rates[:3] == pytest.approx([0.05, 0.10, 0.15])
    assert rates[19:22] == pytest.approx([0.81, 0.80, 0.79])
    assert rates[-1] == pytest.approx(0.01)


# ------------------------------------------------------------------------- the metrics


def known_scored(rewards, target_reward=(0.5,) * 5) -> Scored:
    """Five users' beams, with targets of rank 1, 3, 10, 11 and none. Ranks 6 and 7 and
    the last ten are hallucinations.
    """
    hit = torch.zeros(5, 32, dtype=torch.bool)
    hit[torch.arange(4), torch.tensor([0, 2, 9, 10])] = True
    valid = torch.ones(5, 32, dtype=torch.bool)
    valid[:, 5:7] = False
    valid[:, 22:] = False
    logp = (-0.2 * torch.arange(32.0)).expand(5, -1)
    rewards = torch.where(valid, rewards, 0.0)
    return Scored(None, logp, hit, valid, rewards, torch.tensor(target_reward))


def test_metrics_by_hand():
    """NDCG is 1 / log2(1 + rank); hard: the target is not in the first ten. All rewards
    are 0.25, so that m is 0.25 or, for targets of score 0.25 and 0.2, 0 and -0.05.
    """
    scored = known_scored(torch.full((5, 32), 0.25), (0.5, 0.25, 0.5, 0.5, 0.2))
    metrics = adagrpo.metrics_of(scored, Config())
    assert metrics["hr@10, w=0"].tolist() == [1, 1, 1, 0, 0]
    assert metrics["ndcg@10"].tolist() == pytest.approx([1, 0.5, 0.289065, 0, 0])
    assert metrics["hallucination"].tolist() == pytest.approx([0.2] * 5)
    assert metrics["hard"].tolist() == [False, False, False, True, True]
    assert metrics["clear"].tolist() == [True, False, True, True, False]
    assert metrics["admit"].tolist() == [False, False, False, True, False]


def test_the_fused_order_against_a_slow_loop():
    """Lists sorted by log-probability + w * reward, 0 for hallucinations."""
    torch.manual_seed(3)
    scored = known_scored(torch.rand(5, 32))
    metrics = adagrpo.metrics_of(scored, Config())
    rows = set()
    for weight in FUSION_WEIGHTS:
        expected = []
        for user in range(5):
            logp = scored.logp[user].tolist()
            reward = scored.rewards[user].tolist()
            score = [p + weight * r for p, r in zip(logp, reward, strict=True)]
            order = sorted(range(32), key=lambda place: -score[place])
            hit = scored.hit[user].tolist()
            expected.append(True in [hit[place] for place in order[:10]])
        assert metrics[f"hr@10, w={weight}"].tolist() == expected
        rows.add(tuple(expected))
    assert FUSION_WEIGHTS[0] == 0
    assert len(rows) > 2, "weights do not matter"


def test_the_fusion_weight_is_the_best_one_the_lowest_of_equals():
    validation = {f"hr@10, w={w}": torch.tensor([0.0, 0.0]) for w in FUSION_WEIGHTS}
    validation["hr@10, w=1"] = torch.tensor([1.0, 0.0])
    validation["hr@10, w=2"] = torch.tensor([0.0, 1.0])
    assert adagrpo.best_weight(validation) == 1


def test_evaluation_is_the_metrics_of_all_users():
    """300 users, who come in three batches, against one batch of all."""
    policy, ranker = tiny_models()
    rng = np.random.default_rng(0)
    bought = rng.permuted(np.tile(np.arange(12), (300, 1)), axis=1)
    users = Split(bought[:, :3], bought[:, 3], np.zeros(300))
    metrics = adagrpo.evaluate(policy, ranker, users, Config())
    sample = (torch.as_tensor(users.history), torch.as_tensor(users.target))
    scored = adagrpo.roll_out_and_score(policy, ranker, *sample, 32)
    assert_close(metrics, adagrpo.metrics_of(scored, Config()))
    assert scored.tokens.shape == (300, 13, 2)  # of 16 IDs 3 may have been bought


def test_a_catalogue_of_six_items_of_one_token_goes_through_evaluation():
    """Of six IDs two have been bought: the target is always among the four others."""
    torch.manual_seed(0)
    policy = Policy(torch.arange(6)[:, None], history_length=2, width=8)
    users = Split(np.array([[0, 1], [4, 5]]), np.array([2, 0]), np.zeros(2))
    metrics = adagrpo.evaluate(policy, Ranker(6), users, Config())
    for weight in FUSION_WEIGHTS:
        assert metrics[f"hr@10, w={weight}"].tolist() == [1, 1]
    assert metrics["ndcg@10"].min() >= 1 / math.log2(5)
    assert metrics["hallucination"].tolist() == [0, 0]


# ----------------------------------------------------------------------- the toy's data


@pytest.mark.parametrize("name", ["history", "target"])
def test_a_split_refuses_numbers_below_0(name):
    arrays = {"history": np.zeros((2, 3), int), "target": np.zeros(2, int)}
    arrays[name][1] = -1
    with pytest.raises(ValueError, match=f"{name}.*0 or more"):
        Split(**arrays, kind=np.zeros(2))


SMALL = {"posttrain": 1200, "validation": 99, "test": 1200, "feed": 60_000}
SPLITS = ("pretrain", "posttrain", "validation", "test")


@pytest.fixture(scope="module")
def shop() -> Shop:
    return make_shop(0, bias=1.0, sizes=SMALL)


@pytest.fixture(scope="module")
def fair_shop() -> Shop:
    """The feed shows items by taste alone."""
    return make_shop(0, bias=0.0, sizes=SMALL)


def purchases_of(split: Split) -> np.ndarray:
    """Item numbers in the order of buying, the target last."""
    return np.column_stack([split.history, split.target])


def users_of(*purchases: np.ndarray) -> set[tuple]:
    return {tuple(row) for rows in purchases for row in rows}


def test_nothing_comes_twice(shop):
    """No ID, no token in two levels, no item in a user's purchases (so no target in its
    own history) or in a slate, and no user in two splits.
    """
    assert len({tuple(item) for item in shop.tokens}) == toy_data.ITEMS
    assert (shop.tokens.max(0)[:2] < shop.tokens.min(0)[1:]).all()
    bought = [purchases_of(getattr(shop, name)) for name in SPLITS]
    for rows in (*bought, shop.shown):
        assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()
    histories = [shop.validation.history, shop.test.history, bought[0]]
    assert len(users_of(*histories)) == 99 + 1200 + 6000 + 1200


def test_the_policy_is_trained_on_every_purchase_in_a_log(shop):
    """On all that viewers and post-training users bought last season in pre-training,
    which leaves the targets of post-training. Validation and test have other users.
    """
    assert len(users_of(shop.feed_history)) > 5900  # of 6,000 viewers
    in_logs = users_of(shop.feed_history, shop.posttrain.history)
    assert in_logs <= users_of(purchases_of(shop.pretrain))


def test_the_feed_never_shows_what_the_viewer_has_bought(shop, fair_shop):
    """And its bias touches what it shows, and nothing else."""
    for one in (shop, fair_shop):
        assert not (one.shown[:, :, None] == one.feed_history[:, None, :]).any()
    for name in SPLITS:
        expected = purchases_of(getattr(fair_shop, name))
        assert np.array_equal(purchases_of(getattr(shop, name)), expected), name
    assert np.array_equal(shop.feed_history, fair_shop.feed_history)
    assert not np.array_equal(shop.shown, fair_shop.shown)


def test_only_targets_and_clicks_are_of_this_season(shop):
    """last - this / 2 is what only last season likes of a trend item, this - last / 2
    what only this season does: of what has been picked by one quality, the mean of its
    own share is well above 0, and of the other share it is not.
    """
    rng = np.random.default_rng(0).spawn(6)[0]  # the shop's stream for its catalogue
    catalogue = toy_data.make_catalogue(rng)
    assert np.array_equal(catalogue.tokens, shop.tokens)
    last, this = toy_data.make_qualities(rng, catalogue)

    def seasons(items: np.ndarray) -> list[bool]:
        items = items[catalogue.kind[items] == "trend"]
        assert len(items) > 30
        return [x[items].mean() > 0.08 for x in (last - this / 2, this - last / 2)]

    for name in SPLITS:
        split = getattr(shop, name)
        assert seasons(split.history) == [True, False], name
        assert seasons(split.target) == [name == "pretrain", name != "pretrain"], name
    assert seasons(shop.shown[shop.clicked]) == [False, True]


# ------------------------------------------------------------- the premise of the story

SHORT = Config(pretrain_epochs=2, pretrain_batch=64, ranker_epochs=2, ranker_batch=256)


@pytest.fixture(scope="module")
def policy(shop) -> Policy:
    return adagrpo.pretrain(shop, SHORT)


@pytest.fixture(scope="module")
def ranker(shop) -> Ranker:
    return adagrpo.train_ranker(shop, SHORT)


@pytest.fixture(scope="module")
def before(shop, policy, ranker) -> adagrpo.Metrics:
    return adagrpo.evaluate(policy, ranker, shop.test, SHORT)


def by_kind(shop: Shop, metric: torch.Tensor) -> list[float]:
    """Percent of trend, series and niche test users."""
    metric = metric.float().numpy()
    return [100 * metric[shop.test.kind == kind].mean() for kind in range(3)]


def auc_of_all_items(shop: Shop, ranker: Ranker) -> list[float]:
    """Percent of all items that score below a test user's target, by kind."""
    history = torch.as_tensor(shop.test.history)
    every = torch.arange(toy_data.ITEMS).expand(len(history), -1)
    with torch.no_grad():
        score = ranker.click_probability(history, every)
    own = score.gather(1, torch.as_tensor(shop.test.target)[:, None])
    return by_kind(shop, (score < own).float().mean(1))


def test_the_gate_admits_mostly_trend_users_who_are_hard_and_clear(shop, before):
    hard = by_kind(shop, before["hard"])
    clear = by_kind(shop, before["clear"])
    assert hard[TREND] > 75
    assert hard[SERIES] < 35
    assert clear[TREND] > 60
    assert clear[NICHE] < 30
    admitted = by_kind(shop, before["admit"])
    assert admitted[TREND] > 3 * max(admitted[SERIES], admitted[NICHE])


def test_the_ranker_helps_with_trend_users_and_not_with_the_others(shop, before):
    alone = by_kind(shop, before["hr@10, w=0"])
    fused = by_kind(shop, before["hr@10, w=32"])
    assert fused[TREND] > alone[TREND] + 4
    assert fused[SERIES] < alone[SERIES] + 1
    assert fused[NICHE] < alone[NICHE] + 1


def test_without_bias_the_niche_is_ranked_well(shop, fair_shop, policy, ranker, before):
    auc = auc_of_all_items(shop, ranker)
    assert auc[TREND] > 85
    assert auc[NICHE] < 50
    fair_ranker = adagrpo.train_ranker(fair_shop, SHORT)
    assert min(auc_of_all_items(fair_shop, fair_ranker)) > 80
    fair = adagrpo.evaluate(policy, fair_ranker, fair_shop.test, SHORT)
    clear = by_kind(shop, before["clear"])
    assert by_kind(fair_shop, fair["clear"])[NICHE] > clear[NICHE] + 15


# ------------------------------------------------------------------------- the command


def test_every_setting_has_an_option_and_a_default(capsys):
    config, options = adagrpo.command_line([])
    assert config == Config()
    assert (options.device, options.save) == ("cpu", None)
    with pytest.raises(SystemExit):
        adagrpo.command_line(["--help"])
    said = capsys.readouterr().out
    least = {"seed": 0, "bias": 0, "weight": 0, "group": 2}  # allowed
    for field in fields(Config):
        option = f"--{field.name}"
        assert re.search(rf" {option} .*\s*\({field.default}\)\n", said), option
        other = field.type(least.get(field.name, 2 * field.default + 1))
        changed, _ = adagrpo.command_line([option, str(other)])
        assert changed == replace(Config(), **{field.name: other})


@pytest.mark.parametrize(
    "option",
    [
        *("--epochs many", "--epochs 0", "--batch 0", "--users 0", "--group 1"),
        *("--seed -1", "--random_items 0", "--pretrain_batch -2", "--weight nan"),
        *("--weight -5", "--lr inf", "--lr nan", "--bias nan", "--ranker_lr -1"),
        *("--min_difficulty nan", "--min_discriminability -0.1"),
        "--save FILE/folder",
    ],
)
def test_a_bad_option_ends_with_one_line_and_no_work(option, capsys, tmp_path):
    """A training would print to the other stream, and take minutes."""
    name, value = option.split()
    (tmp_path / "a file").touch()
    value = value.replace("FILE", str(tmp_path / "a file"))
    with pytest.raises(SystemExit) as end:
        adagrpo.main([f"{name}={value}"])
    out, err = capsys.readouterr()
    said = err.splitlines()[-1]
    assert end.value.code == 2
    assert out == ""
    assert f"argument {name}:" in said
    assert value in said


@pytest.fixture
def small(monkeypatch, tmp_path) -> None:
    """A shop of few users, for whole programs; in a folder of its own."""
    sizes = {"feed": 600, "viewers": 300, "posttrain": 20, "validation": 40}
    monkeypatch.setattr(toy_data, "SIZES", sizes | {"test": 90})
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_default_device(None)


COMMAND = ["--users=16", "--epochs=1", "--group=8", "--pretrain_epochs=3"]


def test_two_runs_print_the_same_ascii_of_at_most_100_columns(small, capsys):
    adagrpo.main(COMMAND)
    one = capsys.readouterr().out
    adagrpo.main(COMMAND)
    assert one == capsys.readouterr().out
    assert one.isascii()
    assert max(len(line) for line in one.splitlines()) <= 100
    for arm in ("nll", "mix-1", "adagrpo"):
        assert f"\n{arm:<8} step    2  nll" in one
        assert f"\n{arm:<10} " in one


def test_saved_policies_load_and_write_the_same_beams(small):
    """Every arm starts from the same policy, and trains as it would alone."""
    adagrpo.main([*COMMAND, "--save=new/folder"])
    config, _ = adagrpo.command_line(COMMAND)
    toy = make_shop(0, sizes={"posttrain": 16})
    ranker = adagrpo.train_ranker(toy, config)
    for arm, (rule, weight) in adagrpo.make_arms(config).items():
        policy = adagrpo.pretrain(toy, config)
        adagrpo.post_train(policy, ranker, toy.posttrain, rule, weight, config)
        loaded = Policy(torch.as_tensor(toy.tokens), toy_data.HISTORY - 1)
        loaded.load_state_dict(torch.load(f"new/folder/{arm}.pt"))
        prompt = policy.prompt(torch.as_tensor(toy.test.history[:20]))
        expected = adagrpo.rollout(policy, prompt, 10)
        assert_close(adagrpo.rollout(loaded, prompt, 10), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_command_runs_on_a_gpu(small, capsys):
    adagrpo.main([*COMMAND, "--device=cuda"])
    assert "\nadagrpo " in capsys.readouterr().out


def test_an_import_prints_and_does_nothing():
    code = """
import torch
state = torch.get_rng_state()
threads = torch.get_num_threads()
import adagrpo, toy_data
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_num_threads() == threads
"""
    command = [sys.executable, "-W", "error", "-c", code]
    end = subprocess.run(command, cwd=HERE, capture_output=True, check=False)
    assert (end.returncode, end.stdout, end.stderr) == (0, b"", b"")


# ------------------------------------------------------------------------------ README

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_readmes_idea_is_the_loss_of_the_training_loop(tmp_path):
    """One batch of the tiny shop: the README's lines, against a first step by hand."""
    policy, ranker = tiny_models()
    users = tiny_shop().posttrain
    names = vars(adagrpo) | {"policy": policy, "ranker": ranker, "config": Config()}
    names["history"] = torch.as_tensor(users.history)
    names["target"] = torch.as_tensor(users.target)
    program = tmp_path / "idea.py"
    program.write_text(BLOCKS[0].replace("group=32", "group=6"), encoding="utf-8")
    names = runpy.run_path(str(program), names)
    assert names["gate"].admit.any() and not names["gate"].admit.all()
    names["loss"].backward()
    by_readme = [parameter.grad.clone() for parameter in policy.parameters()]

    policy.zero_grad()
    scored = adagrpo.roll_out_and_score(
        policy, ranker, names["history"], names["target"], 6
    )
    taught = names["gate"].admit[:, None] * adagrpo.group_advantages(scored.rewards)
    prompt = policy.prompt(names["history"])
    bought = policy.item_tokens[names["target"]]
    logp = adagrpo.log_prob(policy, prompt, bought)
    (-logp.mean() - 5.0 * (taught * scored.logp).mean()).backward()
    for parameter, grad in zip(policy.parameters(), by_readme, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_the_readmes_gate_prints_what_the_readme_says(capsys, tmp_path):
    (block,) = [block for block in BLOCKS if "import" in block]
    program = tmp_path / "gate.py"
    program.write_text(block, encoding="utf-8")
    runpy.run_path(str(program))
    assert re.search(r"# (\[.*?\])", block).group(1) in capsys.readouterr().out


def test_the_readme_is_a_page():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1100
