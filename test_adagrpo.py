# SPDX-License-Identifier: MIT
"""Checks against independent oracles: hand calculation, slow loop, brute force, numpy.

From the top: the method that people copy (gate, advantages, losses), the policy and its
rollouts, the trainings, the metrics, the tables, devices, the toy shop and the premise
of its story, the command, README.

    python -m pytest -q
"""

import inspect
import itertools
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adagrpo
import toy_data
from adagrpo import (
    FUSION_WEIGHTS,
    Config,
    Gate,
    Policy,
    Ranker,
    Result,
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


def test_the_order_of_the_columns_matters_only_where_there_is_one():
    torch.manual_seed(0)
    rewards = torch.rand(50, 8)
    hit = torch.rand(50, 8) < 0.2
    for ranked in (True, False):
        one = gate(rewards[:, 0], rewards, hit, ranked=ranked).difficulty
        other = gate(rewards[:, 0], rewards, hit.flip(1), ranked=ranked).difficulty
        assert torch.equal(one, other) is not ranked


def test_thresholds_are_inclusive():
    """A hit in place 3 of 10 is a difficulty of 0.3; 0.5 - 0.25 is 0.25 exactly."""
    hit = torch.arange(10)[None] == 3
    rewards = torch.full((1, 10), 0.25)
    for d, m, admitted in ((0.3, 0.25, True), (0.31, 0.25, False), (0.3, 0.26, False)):
        result = gate([0.5], rewards, hit, min_difficulty=d, min_discriminability=m)
        assert result.admit.item() is admitted


def test_scores_and_thresholds_may_be_logits():
    """m = 1 - (-3 - 2 + 0.5) / 3 = 2.5"""
    for threshold in (-7.0, 2.5, 2.6):
        result = gate([1.0], [[-3.0, -2.0, 0.5]], min_discriminability=threshold)
        assert result.discriminability.item() == 2.5
        assert result.admit.item() == (threshold <= 2.5)


def test_half_precision_is_summed_in_float32():
    """m = -3500 - (-3000) = -500, though 32 * -3000 is beyond float16."""
    rewards = torch.full((1, 32), -3000.0, dtype=torch.float16)
    result = gate(torch.tensor([-3500.0], dtype=torch.float16), rewards)
    assert result.discriminability.item() == -500
    assert not result.clear.item()


GOOD_GATE = {
    "target_reward": torch.zeros(2),
    "rollout_rewards": torch.zeros(2, 4),
    "hit": torch.zeros(2, 4, dtype=torch.bool),
    "valid": torch.ones(2, 4, dtype=torch.bool),
    "min_difficulty": 0.3,
    "min_discriminability": 0.01,
    "ranked": True,
}


def test_the_gates_arguments_have_names_and_no_defaults():
    """hit and valid look alike, and only the caller knows whether there is an order."""
    parameters = inspect.signature(adagrpo_gate).parameters
    assert list(parameters) == list(GOOD_GATE)
    for parameter in parameters.values():
        assert parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is inspect.Parameter.empty


@pytest.mark.parametrize("name", ["target_reward", "rollout_rewards", "hit", "valid"])
def test_the_gate_names_a_bad_argument_and_what_was_given(name):
    good = GOOD_GATE[name]
    for bad in (good[:1], good[None], good[..., None]):
        with pytest.raises(ValueError, match=name) as error:
            adagrpo_gate(**(GOOD_GATE | {name: bad}))
        assert str(tuple(bad.shape)) in str(error.value)
    if good.dtype == torch.bool:
        with pytest.raises(TypeError, match=f"{name}.*float32"):
            adagrpo_gate(**(GOOD_GATE | {name: good.float()}))


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


def test_with_one_update_per_rollout_the_loss_is_zero_and_its_gradient_is_not():
    """Every ratio is 1, so the loss is -mean(A) = 0, and its gradient -A_i / G."""
    torch.manual_seed(0)
    logp = torch.randn(5, 4, requires_grad=True)
    advantages = group_advantages(torch.rand(5, 4))
    loss = grpo_loss(logp, logp.detach(), advantages)
    assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert_close(gradient, -advantages / 4)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["target", "negative", "hit", "hallucination"])
def test_a_reward_that_is_not_finite_never_reaches_a_gradient(bad, place):
    """The whole method on two samples. In the first a target or a negative that is not
    finite closes the gate, and nobody asks for the others; its advantages are 0.

    The rewards 0, 0, 1 of the second have mean 1/3 and std sqrt(2) / 3, so A = -1/root,
    -1/root, root with root = sqrt(2); the gradient of the loss is -weight * A / G / B.
    """
    target_reward = torch.tensor([0.9, 0.9])
    rewards = torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.0, 1.0]])
    hit = torch.tensor([[False, True, False], [False, False, False]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    if place == "target":
        target_reward[0] = bad
    else:
        rewards[0, ["negative", "hit", "hallucination"].index(place)] = bad
    logp = torch.full((2, 3), -2.0, requires_grad=True)

    admit = gate(target_reward, rewards, hit, valid, min_difficulty=0.3).admit
    grpo = grpo_loss(logp, logp.detach(), group_advantages(rewards))
    loss = adagrpo_loss(torch.ones(2), grpo, admit, weight=3.0)
    loss.backward()
    assert admit.tolist() == [place in ("hit", "hallucination"), True]
    assert loss.item() == pytest.approx(1, abs=1e-6)
    root = math.sqrt(2)
    expected = [-3 * a / 3 / 2 for a in (-1 / root, -1 / root, root)]
    assert logp.grad.tolist() == [[0, 0, 0], pytest.approx(expected)]


def test_gate_and_advantages_send_back_no_gradient():
    rewards = torch.rand(3, 4, requires_grad=True)
    tensors = [*gate(rewards[:, 0], rewards), group_advantages(rewards)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_refused_sample_does_not_count_whatever_its_grpo_is():
    """Mean over both samples: (3 + 2 * 1 + 5) / 2."""
    grpo = torch.tensor([1.0, NAN])
    admit = torch.tensor([True, False])
    assert adagrpo_loss(torch.tensor([3.0, 5.0]), grpo, admit, weight=2.0) == 5


# ------------------------------------------------------------------ policy and rollouts


def tiny_policy(levels: int = 3) -> Policy:
    """A vocabulary of 5, and weights far from uniform, so that mistakes show."""
    torch.manual_seed(1)
    item_tokens = np.array([[0, 1, 2, 3], [4, 0, 1, 2], [3, 3, 3, 4]])[:, -levels:]
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


def test_attention_against_a_slow_loop():
    """Each head by itself: softmax of q . k / sqrt(width) over the tokens it sees."""
    torch.manual_seed(0)
    block = adagrpo.Block(width=8, heads=2)
    x = torch.randn(1, 5, 8)
    sees = torch.eye(5).bool() | (torch.rand(5, 5) < 0.5)
    q, k, v = block.qkv(x)[0].split(8, dim=1)  # (5, 8) each
    rows = []
    for place in range(5):
        seen = sees[place].nonzero().flatten()
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = torch.stack([q[place, head] @ k[i, head] / 2 for i in seen])
            heads.append(scores.softmax(0) @ v[seen, head])
        rows.append(block.out(torch.cat(heads)))
    y, _ = block.attend(x, sees[None], None)
    assert_close(y[0], torch.stack(rows))


def test_the_policy_is_causal_and_gives_probabilities():
    policy = tiny_policy()
    prompt = prompts_of(policy, 3)
    changed = prompt.clone()
    changed[:, 6] = (prompt[:, 6] + 1) % 5
    one, _ = policy(prompt)
    other, _ = policy(changed)
    assert_close(one[:, :6], other[:, :6])
    assert not torch.allclose(one[:, 6:], other[:, 6:])
    assert_close(one.exp().sum(-1), torch.ones(3, 9))


def test_the_policy_knows_where_a_token_stands():
    """Without positions three equal tokens would all be answered alike."""
    next_logp, _ = tiny_policy()(torch.tensor([[1, 1, 1]]))
    assert not torch.allclose(next_logp[0, 0], next_logp[0, 2])


@pytest.mark.parametrize("decode", ["beam", "sample"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_rollouts_match_plain_forwards(decode, levels):
    """Every rollout again, alone after its prompt: same log-prob (also by `log_prob`),
    same gradient.
    """
    policy = tiny_policy(levels)
    prompt = prompts_of(policy, 3)
    tokens, logp = adagrpo.rollout(policy, prompt, 5, decode)
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


def every_item() -> torch.Tensor:
    """All 125 items of three tokens over a vocabulary of 5."""
    return torch.cartesian_prod(*[torch.arange(5)] * 3)


def test_beams_are_exact_where_no_prefix_is_dropped():
    """25 beams keep every prefix of two tokens, so they are the best 25 of all 125."""
    policy = tiny_policy()
    prompt = prompts_of(policy, 4)
    tokens, logp = adagrpo.rollout(policy, prompt, 25, "beam")
    for b in range(4):
        scores = slow_log_prob(policy, prompt[b].expand(125, -1), every_item())
        best = scores.topk(25)
        assert_close(logp[b], best.values)
        assert tokens[b].tolist() == every_item()[best.indices].tolist()


def test_more_beams_than_items_are_all_items():
    policy = tiny_policy()
    tokens, logp = adagrpo.rollout(policy, prompts_of(policy, 2), 1000, "beam")
    for b in range(2):
        assert sorted(tokens[b].tolist()) == every_item().tolist()
        assert logp[b].exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_follow_the_policy():
    """20,000 draws: all 125 shares lie within 5 standard errors of a binomial."""
    policy = tiny_policy()
    prompt = prompts_of(policy, 1)
    with torch.no_grad():
        share = slow_log_prob(policy, prompt.expand(125, -1), every_item()).exp()
        tokens, _ = adagrpo.rollout(policy, prompt.expand(1000, -1), 20, "sample")
    number = (tokens.flatten(0, 1) * torch.tensor([25, 5, 1])).sum(1)
    drawn = torch.bincount(number, minlength=125) / 20_000
    error = (share * (1 - share) / 20_000).sqrt()
    assert ((drawn - share).abs() <= 5 * error + 1e-4).all()


def test_items_of_finds_every_item_and_nothing_else():
    policy = tiny_policy()
    expected = {tuple(item): i for i, item in enumerate(policy.item_tokens.tolist())}
    found = policy.items_of(every_item()).tolist()
    assert found == [expected.get(tuple(item), -1) for item in every_item().tolist()]


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_four_codes_of_256_are_no_problem(dtype):
    """2^40 possible IDs, with tokens of its own for each level, and int32 tokens."""
    rng = np.random.default_rng(0)
    item_tokens = rng.integers(256, size=(3000, 4)) + 256 * np.arange(4)
    item_tokens[0] = [255, 511, 767, 1023]
    policy = Policy(item_tokens.astype(dtype), history_length=2, width=8)
    assert policy.items_of(policy.item_tokens).tolist() == list(range(3000))
    assert policy.item_tokens.dtype == torch.long

    known = {tuple(item) for item in item_tokens.tolist()}
    others = policy.item_tokens.clone()
    others[:, 3] = 768 + torch.randint(256, (3000,))
    is_known = [tuple(item) in known for item in others.tolist()]
    assert (policy.items_of(others) >= 0).tolist() == is_known


def test_ids_that_overflow_64_bits_or_name_two_items_are_refused():
    """8 codes of 2048 are 2^88 possible IDs."""
    with pytest.raises(ValueError, match="item_tokens.* 64 bits"):
        Policy(np.array([[2047] * 8, [0] * 8]), history_length=2, width=8)
    with pytest.raises(ValueError, match="item_tokens.* same ID"):
        Policy(np.array([[0, 1], [1, 0], [0, 1]]), history_length=2, width=8)


def test_the_policys_ids_move_with_it():
    """What is no parameter is a buffer: `to` leaves no tensor behind."""
    policy = tiny_policy().to("meta")
    for module in policy.modules():
        plain = [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
        assert plain == []
    assert is_on_meta(policy.item_tokens, *policy.parameters(), *policy.buffers())


# ----------------------------------------------------------------------- the trainings


def tiny_shop() -> Shop:
    """Made by hand: 12 items of two codes, 3 purchases in a history, slates of 4."""
    rng = np.random.default_rng(0)

    def split(users: int) -> Split:
        history = rng.integers(12, size=(users, 3))
        return Split(history, rng.integers(12, size=users), rng.integers(2, size=users))

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


def tiny_models() -> tuple[Policy, Ranker]:
    """Untrained, and far enough from 0 for different items to score differently."""
    torch.manual_seed(0)
    policy = Policy(tiny_shop().tokens, history_length=3, width=16)
    ranker = Ranker(items=12)
    for parameter in [*policy.parameters(), *ranker.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    return policy, ranker


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_ranker_by_hand():
    """An MLP on the mean user, the item and 10 times their product; its sigmoid."""
    _, ranker = tiny_models()
    score = ranker.click_probability(torch.tensor([[0, 1, 1]]), torch.tensor([[5, 6]]))
    user = (ranker.bought.weight[0] + 2 * ranker.bought.weight[1]) / 3
    for place, item in enumerate(ranker.offered.weight[5:7]):
        logit = ranker.mlp(torch.cat([user, item, 10 * user * item])).item()
        assert score[0, place].item() == pytest.approx(1 / (1 + math.exp(-logit)))


def test_the_ranker_learns_clicks_and_to_doubt_what_was_never_shown():
    """Items 0-3 are always clicked and 4-7 never; 8-11 come only as random items."""
    shop = tiny_shop()
    shop.shown = shop.shown % 8
    shop.clicked = shop.shown < 4
    ranker = adagrpo.train_ranker(shop, Config(ranker_epochs=40, ranker_batch=10))
    with torch.no_grad():
        every = torch.arange(12).expand(50, -1)
        score = ranker.click_probability(torch.as_tensor(shop.feed_history), every)
    clicked, ignored, never_shown = score.mean(0).split(4)
    assert clicked.min() > 0.6
    assert max(ignored.max(), never_shown.max()) < 0.25


ARMS = {  # weight, and whether a sample that is hard, or clear, or both, is admitted
    "nll": (0.0, lambda hard, clear: False),
    "mix-0.3": (0.3, lambda hard, clear: True),
    "mix-1": (1.0, lambda hard, clear: True),
    "difficulty": (2.1, lambda hard, clear: hard),
    "discriminability": (2.6, lambda hard, clear: clear),
    "adagrpo": (5.0, lambda hard, clear: hard and clear),
}


@pytest.mark.parametrize(
    ("arm", "decode"), [*[(arm, "beam") for arm in ARMS], ("adagrpo", "sample")]
)
def test_one_step_of_an_arm_by_hand(monkeypatch, arm, decode):
    """The gradient of (7) with ratios of 1, rollout by rollout: each sample's NLL / B,
    and for each rollout of an admitted sample -weight * A_i * log p(o_i) / G / B.

    With SGD at rate 1 the step is minus the gradient, which is cut to norm 0.5.
    """
    assert list(adagrpo.make_arms(Config())) == list(ARMS)
    groups = []
    original = adagrpo.roll_out_and_score

    def spy(policy, ranker, history, *others) -> Scored:
        groups.append((history, original(policy, ranker, history, *others)))
        return groups[0][1]

    def sgd(model, lr, steps):
        return torch.optim.SGD(model.parameters(), lr=1.0), SimpleNamespace(step=int)

    monkeypatch.setattr(adagrpo, "roll_out_and_score", spy)
    monkeypatch.setattr(adagrpo, "make_optimizer", sgd)
    users = tiny_shop().posttrain
    policy, ranker = tiny_models()
    config = Config(batch=12, epochs=1, group=6, decode=decode, max_grad_norm=0.5)
    rule, weight = adagrpo.make_arms(config)[arm]
    dose = adagrpo.post_train(policy, ranker, users, rule, weight, config)

    start, _ = tiny_models()
    prompt = start.item_tokens[torch.as_tensor(users.history)].flatten(1)
    own = slow_log_prob(start, prompt, start.item_tokens[torch.as_tensor(users.target)])
    loss = -own.sum() / 12
    expected_weight, admits = ARMS[arm]
    admitted = 0
    for history, scored in groups:
        prompt = start.item_tokens[history].flatten(1)
        for b in range(12):
            sample = (scored.target_reward, scored.rewards, scored.hit, scored.valid)
            sample = [x[b].tolist() for x in sample]
            difficulty, m = slow_diagnostics(*sample, ranked=True)
            if not admits(difficulty >= 0.3, m >= 0.01):
                continue
            admitted += 1
            rewards = np.array(sample[1])
            for i, advantage in enumerate((rewards - rewards.mean()) / rewards.std()):
                item = scored.tokens[b, i : i + 1]
                logp = slow_log_prob(start, prompt[b : b + 1], item)
                loss = loss - expected_weight * advantage * logp.sum() / 6 / 12

    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in start.parameters()])
    assert gradient.norm() > 0.5
    step = weights_of(policy) - weights_of(start)
    assert_close(step, -gradient * 0.5 / gradient.norm(), rtol=1e-3, atol=1e-5)
    assert dose == pytest.approx(expected_weight * admitted / 12)
    assert arm != "adagrpo" or 0 < admitted < 12


def test_a_group_holds_what_the_policy_wrote_and_what_the_ranker_says():
    """Rollout by rollout; 12 of 16 IDs are items, so some are hallucinations."""
    policy, ranker = tiny_models()
    history = torch.as_tensor(tiny_shop().test.history)
    own = tiny_shop().test.target.tolist()
    config = Config(group=10)
    scored = adagrpo.roll_out_and_score(
        policy, ranker, history, torch.tensor(own), config
    )
    every = torch.arange(12).expand(25, -1)
    score = ranker(history, every).sigmoid().tolist()
    items = policy.item_tokens.tolist()
    for b, i in itertools.product(range(25), range(10)):
        found = (scored.items, scored.valid, scored.hit, scored.rewards)
        expected = [-1, False, False, 0.0]
        if scored.tokens[b, i].tolist() in items:
            item = items.index(scored.tokens[b, i].tolist())
            expected = [item, True, item == own[b], score[b][item]]
        assert [x[b, i].item() for x in found] == pytest.approx(expected)
    expected = [row[item] for row, item in zip(score, own, strict=True)]
    assert scored.target_reward.tolist() == pytest.approx(expected, abs=1e-6)
    assert not scored.valid.all() and scored.hit.any()
    assert scored.logp.requires_grad and not scored.rewards.requires_grad


def train(policy, ranker, arm="adagrpo", label=None, weight=None, **settings) -> float:
    """Post-train on the tiny shop's 12 users; returns the dose."""
    config = replace(Config(epochs=1, group=6), **settings)
    rule, usual_weight = adagrpo.make_arms(config)[arm]
    if weight is None:
        weight = usual_weight
    users = tiny_shop().posttrain
    return adagrpo.post_train(policy, ranker, users, rule, weight, config, label)


def test_no_gradient_reaches_the_ranker():
    policy, ranker = tiny_models()
    train(policy, ranker, "mix-1")
    assert all(parameter.grad is None for parameter in ranker.parameters())


def test_nll_alone_is_what_weight_zero_or_a_ranker_of_nan_leave(monkeypatch):
    """The arm nll asks no ranker, and rolls nothing out."""
    alone, _ = tiny_models()
    start = weights_of(alone)
    with monkeypatch.context() as patch:
        patch.setattr(adagrpo, "rollout", None)  # a call would fail
        assert train(alone, None, "nll", epochs=2) == 0
    assert not torch.equal(weights_of(alone), start)
    for ranker, weight in ((Table([0.1, 0.9] * 6), 0.0), (Table([NAN] * 12), 1.0)):
        other, _ = tiny_models()
        torch.manual_seed(7)  # the batches are the same all the same
        train(other, ranker, "mix-1", weight=weight, epochs=2)
        assert_close(weights_of(other), weights_of(alone))


@pytest.mark.parametrize("arm", ["nll", "adagrpo"])
def test_a_loss_that_is_not_finite_ends_the_training(arm):
    policy, ranker = tiny_models()
    torch.nn.init.constant_(policy.norm.weight, NAN)
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        train(policy, ranker, arm)


def test_every_pass_takes_each_sample_once_and_in_an_order_of_its_own():
    torch.manual_seed(0)
    batches = adagrpo.shuffled_batches(samples=10, batch=4, epochs=3)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 4, 4, 2]
    passes = torch.cat(batches).split(10)
    assert [sorted(rows.tolist()) for rows in passes] == [list(range(10))] * 3
    assert passes[0].tolist() != passes[1].tolist() != list(range(10))


def test_the_learning_rate_warms_up_over_20_steps_and_decays_to_zero():
    """Of 100 steps: 1/20, 2/20, ..., then the line from 1 to 0, in 0.80 at step 20."""
    model = torch.nn.Linear(1, 1)
    optimizer, scheduler = adagrpo.make_optimizer(model, lr=2.0, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.05, 0.10, 0.15])
    assert rates[19:22] == pytest.approx([0.81, 0.80, 0.79])
    assert rates[-1] == pytest.approx(0.01)


def test_a_line_comes_every_100_steps_and_at_the_end_if_it_has_a_label(monkeypatch):
    lines = []
    monkeypatch.setattr(adagrpo, "print_training", lambda *line: lines.append(line))
    for label in ("a name", None):
        train(tiny_models()[0], None, "nll", label, batch=1, epochs=10)
    assert [line[:2] for line in lines] == [("a name", 100), ("a name", 120)]
    assert [len(log) for _, _, log in lines] == [100, 100]


def test_a_training_line_by_hand(monkeypatch, capsys):
    """The mean of two steps. NLL of six samples 1, 2, 3, 4, 5, 6; half of them hard,
    a third clear, one admitted; the policy's only items have rewards 0.2 and 0.4.
    """
    six = torch.arange(6)
    known = Gate(six == 0, six < 3, six < 2, None, None)
    monkeypatch.setattr(adagrpo, "gate_of", lambda scored, config: known)
    nll = torch.arange(1.0, 7.0, requires_grad=True)
    monkeypatch.setattr(adagrpo, "log_prob", lambda *arguments: -nll)
    policy, _ = tiny_models()
    first = policy.item_tokens[:2].expand(6, -1, -1)
    logp = torch.zeros(6, 2, requires_grad=True)
    monkeypatch.setattr(adagrpo, "rollout", lambda *arguments: (first, logp))
    train(policy, Table([0.2, 0.4] * 6), label="adagrpo", batch=6)
    line = "nll 3.500  reward 0.300  hard 0.500  clear 0.333  admitted 0.167"
    assert capsys.readouterr().out == f"adagrpo           step    2  {line}\n"


# ------------------------------------------------------------------------- the metrics


class Table(Ranker):
    """A ranker that gives item i the score table[i], whatever the history."""

    def __init__(self, table):
        super().__init__(items=len(table))
        self.table = torch.tensor(table)

    def click_probability(self, history, items):
        return self.table[items]


RANKS = {10: 1, 20: 3, 30: 10, 40: 11, 15: None}  # of each user's target
KNOWN_LOGP = [-0.2 * place for place in range(32)]


@pytest.fixture
def known_lists(monkeypatch) -> list[list[int]]:
    """Five users' rollouts, likeliest first; -1 names no item. Of 8 * 8 IDs, the first
    60 name an item. Ranks 6 and 7 and the last ten are hallucinations.
    """
    fillers = [*range(41, 60), *range(10), 11, 12, 13]
    lists = []
    for target, rank in RANKS.items():
        items = fillers.copy()
        items[5:7] = [-1] * 2
        items[22:] = [-1] * 10
        if rank is not None:
            items[rank - 1] = target
        lists.append(items)

    ids = [[i // 8, i % 8] for i in range(60)] + [[7, 7]]
    tokens = torch.tensor([[ids[item] for item in items] for items in lists])

    def known_rollout(policy, prompt, group, decode):
        assert (group, decode) == (32, "beam")
        return tokens, torch.tensor([KNOWN_LOGP] * 5)

    monkeypatch.setattr(adagrpo, "rollout", known_rollout)
    return lists


def judge(table, targets=RANKS) -> dict[str, np.ndarray]:
    """The metrics of five users of a shop with 60 items; the ranker has this table."""
    item_tokens = np.column_stack(np.divmod(np.arange(60), 8))
    policy = Policy(item_tokens, history_length=3, width=8)
    users = Split(np.zeros((5, 3), dtype=int), np.array([*targets]), None)
    config = Config(group=6, decode="sample")  # of the training, and not of evaluation
    return adagrpo.evaluate(policy, Table(table), users, config)


def test_metrics_by_hand(known_lists):
    """Ranks 1, 3, 10, 11 and none, two hallucinations in each ten.

    NDCG is 1 / log2(1 + rank). The ranker scores by item number, two items with one
    score, so the negatives below a target can be counted. The difficulty is the rank
    less 1, over 32: by default a sample is hard if its target is not in the first ten.
    """
    table = [i // 2 / 50 for i in range(60)]
    metrics = judge(table)
    assert metrics["hr@10"].tolist() == [1, 1, 1, 0, 0]
    assert metrics["ndcg@10"] == pytest.approx([1, 0.5, 1 / math.log2(11), 0, 0])
    assert metrics["hallucination"] == pytest.approx([0.2] * 5)
    assert metrics["hard"].tolist() == [False, False, False, True, True]
    assert metrics["admit"].tolist() == (metrics["hard"] & metrics["clear"]).tolist()

    for user, target in enumerate(RANKS):
        scores = [table[i] for i in known_lists[user] if i not in (-1, target)]
        below = [score for score in scores if score < table[target]]
        assert metrics["auc in group"][user] == pytest.approx(len(below) / len(scores))
        m = table[target] - sum(scores) / len(scores)
        assert metrics["clear"][user] == (m >= 0.01)


def test_without_a_negative_the_auc_is_undefined_and_the_gate_closed(monkeypatch):
    nothing = torch.full((5, 32, 2), 7), torch.zeros(5, 32)
    monkeypatch.setattr(adagrpo, "rollout", lambda *arguments: nothing)
    metrics = judge([0.5] * 60)
    assert np.isnan(metrics["auc in group"]).all()
    assert metrics["hallucination"].tolist() == [1] * 5
    assert not metrics["admit"].any()


def test_the_fused_order_against_a_slow_loop(known_lists):
    """Lists sorted by log-probability + w * reward, 0 for hallucinations."""
    table = np.random.default_rng(3).random(60).astype(np.float32)
    metrics = judge(table)
    expected = []
    for target, items in zip(RANKS, known_lists, strict=True):
        reward = [item >= 0 and float(table[item]) for item in items]
        row = []
        for weight in FUSION_WEIGHTS:
            score = [p + weight * r for p, r in zip(KNOWN_LOGP, reward, strict=True)]
            order = sorted(range(32), key=lambda place: -score[place])
            row.append(target in [items[place] for place in order[:10]])
        expected.append(row)
    assert metrics["hr@10 fused"].tolist() == expected
    assert FUSION_WEIGHTS[0] == 0
    assert metrics["hr@10 fused"][:, 0].tolist() == metrics["hr@10"].tolist()
    assert len(set(map(tuple, np.transpose(expected)))) > 2, "weights do not matter"


def test_a_constant_ranker_changes_nothing_in_the_fused_order(monkeypatch):
    """Not even where the policy has ties: 32 items of one log-probability."""
    first = torch.tensor([[i // 8, i % 8] for i in range(32)]).expand(5, -1, -1)
    known = first, torch.zeros(5, 32)
    monkeypatch.setattr(adagrpo, "rollout", lambda *arguments: known)
    metrics = judge([0.3] * 60, targets=[0, 9, 10, 20, 40])
    for fused in metrics["hr@10 fused"].T:
        assert fused.tolist() == metrics["hr@10"].tolist() == [1, 1, 0, 0, 0]


def test_the_fusion_weight_is_picked_on_validation_users_and_not_on_the_test():
    """On validation users the means are 0, 1/2 and 1/2, on the test's 1, 0 and 1."""
    validation = {"hr@10 fused": np.array([[0, 1, 0], [0, 0, 1]])}
    result = Result(validation, {"hr@10 fused": np.array([[1, 0, 1]])}, dose=0.0)
    assert result.best_fusion() == 1  # the lower of two that are as good
    assert result.fused().tolist() == [0]


def test_evaluation_draws_nothing_and_trains_nothing():
    policy, ranker = tiny_models()
    before = weights_of(policy)
    state = torch.get_rng_state()
    adagrpo.evaluate(policy, ranker, tiny_shop().test, Config(decode="sample"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights_of(policy), before)


def test_users_are_judged_one_by_one():
    """300 users, who come in three batches, as the same users in another order."""
    policy, ranker = tiny_models()
    rng = np.random.default_rng(0)
    users = Split(rng.integers(12, size=(300, 3)), rng.integers(12, size=300), None)
    upside_down = Split(users.history[::-1].copy(), users.target[::-1].copy(), None)
    metrics = adagrpo.evaluate(policy, ranker, users, Config())
    for name, metric in adagrpo.evaluate(policy, ranker, upside_down, Config()).items():
        assert_close(metric[::-1].copy(), metrics[name], equal_nan=True)


# -------------------------------------------------------------------------- the tables


def shares(ones: int) -> np.ndarray:
    """Of 25 users, the first ones."""
    return np.repeat([1.0, 0.0], [ones, 25 - ones])


def known_result(ones: int, dose: float) -> Result:
    """HR@10 of ones / 25. The third fusion weight is the best on validation users, and
    gives two users more of the test.
    """
    test = {"auc in group": shares(15), "hard": shares(14), "clear": shares(13)}
    test |= {"admit": shares(12), "hallucination": shares(1)}
    test |= {"hr@10": shares(ones), "ndcg@10": shares(ones - 1)}
    test["hr@10 fused"] = np.stack([shares(1)] * 2 + [shares(ones + 2)] * 5, axis=1)
    fused = np.stack([shares(3), shares(5), shares(20), *[shares(4)] * 4], axis=1)
    return Result({"hr@10": shares(ones + 3), "hr@10 fused": fused}, test, dose)


def test_the_tables_by_hand(capsys):
    """25 users, 8 hits before, 10 with nll and 12 with adagrpo; the first 12 users are
    of kind "head". FUSION_WEIGHTS[2] is 2. In the last table the first arm is the base
    and the others are differences: of the head 10 and 2 of 12 are 83.3% and 16.7%.
    """
    shop = tiny_shop()
    shop.test.kind[:] = np.arange(25) >= 12
    before = known_result(8, 0.0)
    results = {"nll": known_result(10, 0.0), "adagrpo": known_result(12, 1.25)}
    adagrpo.print_premise(shop, before)
    adagrpo.print_results(shop, before, results)
    lines = capsys.readouterr().out.splitlines()
    cells = [re.split(r" {2,}", line) for line in lines]  # of the tables' rows
    for row in (
        ["", "users", "hr@10", "fused", "auc in group", "hard", "clear", "admit"],
        ["all", "25", "32.0", "40.0", "60.0", "56.0", "52.0", "48.0"],
        ["head", "12", "66.7", "83.3", "100.0", "100.0", "100.0", "100.0"],
        ["before", "32.00", "40.00", "2", "28.00", "4.00", "0.00", "44.00"],
        ["nll", "40.00", "48.00", "2", "36.00", "4.00", "0.00", "52.00"],
        ["adagrpo", "48.00", "56.00", "2", "44.00", "4.00", "1.25", "60.00"],
        ["", "users", "nll", "adagrpo"],
        ["all", "25", "40.0", "8.0"],
        ["head", "12", "83.3", "16.7"],
        ["tail", "13", "0.0", "0.0"],
    ):
        assert row in cells, row


# ------------------------------------------------------------------------------ devices


class OnlyMeta(TorchDispatchMode):
    """Fails at the first operation that has a tensor on the CPU and one on meta.

    Some operations of the meta device take indices from the CPU without a word; a GPU
    would not. Copies are the way from one device to another, and plain numbers (tensors
    without a dimension) may come from anywhere.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim > 0}
        is_copy = "copy" in str(function)
        assert is_copy or "meta" not in devices or devices == {"meta"}, str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_meta(monkeypatch):
    """Two models, and everything else, on the meta device: shapes without numbers.

    The metrics that leave it as numpy arrays are zeros.
    """
    models = [model.to("meta") for model in tiny_models()]

    def cpu(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    torch.set_default_device("meta")
    try:
        with OnlyMeta():
            yield models
    finally:
        torch.set_default_device(None)


def is_on_meta(*tensors: torch.Tensor) -> bool:
    return {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_tensor_left_on_the_cpu_fails_these_tests(on_meta):
    index = torch.zeros(2, dtype=torch.long, device="cpu")
    with pytest.raises(AssertionError, match="index"):
        torch.ones(3)[index]


def test_the_method_leaves_nothing_on_the_cpu(on_meta):
    rewards = torch.rand(5, 4)
    hit = rewards > 0.9
    for ranked in (True, False):
        result = gate(rewards[:, 0], rewards, hit, ~hit, ranked=ranked)
        grpo = grpo_loss(rewards, rewards, group_advantages(rewards))
        loss = adagrpo_loss(rewards[:, 0], grpo, result.admit, 5.0)
        assert is_on_meta(*result, loss)


@pytest.mark.parametrize("decode", ["beam", "sample"])
def test_policy_rollouts_and_rewards_leave_nothing_on_the_cpu(on_meta, decode):
    policy, _ = on_meta
    history = torch.zeros(5, 3, dtype=torch.long)
    config = Config(group=6, decode=decode)
    scored = adagrpo.roll_out_and_score(*on_meta, history, history[:, 0], config)
    item = scored.tokens[:, 0]
    logp = adagrpo.log_prob(policy, policy.prompt(history), item)
    assert is_on_meta(*scored, *adagrpo.gate_of(scored, config), logp)


def test_evaluation_leaves_nothing_on_the_cpu(on_meta):
    metrics = adagrpo.evaluate(*on_meta, tiny_shop().test, Config())
    assert len(metrics["hr@10"]) == 25


def test_trainings_leave_nothing_on_the_cpu(on_meta, monkeypatch):
    """Without the optimizer's step, which old releases of torch lack on meta."""
    policy, _ = on_meta
    monkeypatch.setattr(adagrpo, "Policy", lambda *arguments, **named: policy)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    trained = adagrpo.pretrain(tiny_shop(), Config(pretrain_epochs=1))
    ranker = adagrpo.train_ranker(tiny_shop(), Config(ranker_epochs=1))
    for parameter in [*trained.parameters(), *ranker.parameters()]:
        assert is_on_meta(parameter, parameter.grad)


# ----------------------------------------------------------------------- the toy's data

SMALL = {"pretrain": 8000, "posttrain": 200, "validation": 99, "test": 800}
SMALL["feed"] = 40_000


@pytest.fixture(scope="module")
def shop() -> Shop:
    return make_shop(0, bias=1.0, sizes=SMALL)


@pytest.fixture(scope="module")
def fair_shop() -> Shop:
    """The feed shows items by taste alone."""
    return make_shop(0, bias=0.0, sizes=SMALL)


def splits_of(shop: Shop) -> dict[str, Split]:
    names = ("pretrain", "posttrain", "validation", "test")
    return {name: getattr(shop, name) for name in names}


def purchases_of(split: Split) -> np.ndarray:
    """(N, 9) item numbers in the order of buying."""
    return np.column_stack([split.history, split.target])


def test_nothing_comes_twice(shop):
    """No ID, no token in two levels, no item in a user's purchases or in a slate, and
    no user in two splits.
    """
    assert len({tuple(item) for item in shop.tokens}) == toy_data.ITEMS
    assert (shop.tokens.max(0)[:2] < shop.tokens.min(0)[1:]).all()
    bought = [purchases_of(split) for split in splits_of(shop).values()]
    for rows in (*bought, shop.shown):
        assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()
    users = [tuple(row) for rows in bought for row in rows]
    users += [tuple(row) for row in shop.feed_history]
    assert len(set(users)) == len(users)


def assert_same_users(one: Shop, other: Shop, but: str = "") -> None:
    for name, split in splits_of(one).items():
        if name != but:
            expected = purchases_of(splits_of(other)[name])
            assert np.array_equal(purchases_of(split), expected), name


@pytest.mark.parametrize("changed", list(SMALL))
def test_a_split_does_not_depend_on_the_sizes_of_others(changed):
    sizes = dict.fromkeys(SMALL, 20)
    one = make_shop(3, sizes=sizes)
    other = make_shop(3, sizes=sizes | {changed: 30})
    assert_same_users(one, other, but=changed)
    if changed != "feed":
        assert np.array_equal(one.shown, other.shown)
        assert np.array_equal(one.clicked, other.clicked)


def test_the_bias_touches_what_the_feed_shows_and_nothing_else(shop, fair_shop):
    assert_same_users(shop, fair_shop)
    assert np.array_equal(shop.feed_history, fair_shop.feed_history)
    assert not np.array_equal(shop.shown, fair_shop.shown)


def test_purchases_are_draws_from_a_softmax():
    """First draws with shares p; after item i, item j with share p_j / (1 - p_i)."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    logits = np.tile(np.log(p).astype(np.float32), (40_000, 1))
    rng = np.random.default_rng(0)
    first, second = toy_data.draw_without_replacement(rng, logits, 2).T
    assert np.bincount(first) / 40_000 == pytest.approx(p, abs=0.013)
    for i in range(4):
        after = second[first == i]
        share = np.bincount(after, minlength=4) / len(after)
        expected = p / (1 - p[i])
        expected[i] = 0
        error = 5 * np.sqrt(0.25 / len(after))
        assert share == pytest.approx(expected, abs=error)


def test_clicks_are_looks_times_the_click_probability():
    """Of 20,000 slates, at every place: within 5 standard errors of a binomial."""
    rng = np.random.default_rng(0)
    catalogue = toy_data.make_catalogue(rng)
    quality, _ = toy_data.make_qualities(rng, catalogue)
    taste = toy_data.to_length_one(rng.normal(size=(20_000, toy_data.TASTE_DIM)))
    shown, clicked = toy_data.show_feed(rng, 1.0, taste, catalogue, quality)
    for place in range(toy_data.SLATE):
        items = shown[:, place]
        appeal = (taste * catalogue.embedding[items]).sum(1) + quality[items]
        p = 1 / (1 + np.exp(-10 * (appeal - 0.9))) / math.sqrt(place + 1)
        error = math.sqrt((p * (1 - p)).sum()) / 20_000
        assert clicked[:, place].mean() == pytest.approx(p.mean(), abs=5 * error)


def test_only_trend_items_change_with_the_season():
    """Correlation 0.5 and the same spread, within 5 standard errors over many draws."""
    rng = np.random.default_rng(0)
    catalogue = toy_data.make_catalogue(rng)
    draws = [toy_data.make_qualities(rng, catalogue) for _ in range(20)]
    is_trend = catalogue.kind == "trend"
    for last, this in draws:
        assert (last[~is_trend] == this[~is_trend]).all()
    last, this = np.stack(draws, axis=1)[:, :, is_trend].reshape(2, -1)
    assert np.corrcoef(last, this)[0, 1] == pytest.approx(0.5, abs=0.05)
    assert [last.std(), this.std()] == pytest.approx([0.19, 0.19], rel=0.03)


def test_the_feed_shows_a_tenth_of_the_niche(shop, fair_shop):
    """Of 192 items: a tenth within 3.5 standard errors. Without bias, all of them."""
    shown = np.bincount(shop.shown.ravel(), minlength=toy_data.ITEMS)
    fairly = np.bincount(fair_shop.shown.ravel(), minlength=toy_data.ITEMS)
    niche = np.array(toy_data.CATEGORY_KIND)[shop.tokens[:, 0]] == "niche"
    error = math.sqrt(0.1 * 0.9 / niche.sum())
    assert (shown[niche] >= 20).mean() == pytest.approx(0.1, abs=3.5 * error)
    assert (shown[~niche] >= 1).mean() > 0.99
    assert (fairly[niche] >= 20).mean() > 0.99


# ------------------------------------------------------------- the premise of the story


@pytest.fixture(scope="module")
def policy(shop) -> Policy:
    return adagrpo.pretrain(shop, Config())


@pytest.fixture(scope="module")
def ranker(shop) -> Ranker:
    return adagrpo.train_ranker(shop, Config())


@pytest.fixture(scope="module")
def before(shop, policy, ranker) -> dict[str, np.ndarray]:
    return adagrpo.evaluate(policy, ranker, shop.test, Config())


def by_kind(shop: Shop, metric: np.ndarray) -> list[float]:
    """Percent of trend, series and niche test users."""
    return [adagrpo.percent(metric[shop.test.kind == kind]) for kind in range(3)]


def auc_of_all_items(shop: Shop, ranker: Ranker) -> list[float]:
    """Percent of all items that score below a test user's target, by kind."""
    history = torch.as_tensor(shop.test.history)
    every = torch.arange(toy_data.ITEMS).expand(len(history), -1)
    with torch.no_grad():
        score = ranker.click_probability(history, every)
    own = score.gather(1, torch.as_tensor(shop.test.target)[:, None])
    return by_kind(shop, (score < own).float().mean(1).numpy())


def test_trend_users_are_hard_series_easy_and_niche_not_clear(shop, ranker, before):
    hard = by_kind(shop, before["hard"])
    clear = by_kind(shop, before["clear"])
    assert hard[TREND] > 80
    assert hard[SERIES] < 40
    assert clear[TREND] > 45
    assert clear[NICHE] < 25
    assert auc_of_all_items(shop, ranker)[NICHE] < 45


def test_the_gate_admits_mostly_trend_users(shop, before):
    admitted = by_kind(shop, before["admit"])
    assert admitted[TREND] > 3 * max(admitted[SERIES], admitted[NICHE])


def test_without_bias_the_niche_is_ranked_as_well_as_trend(
    shop, fair_shop, policy, ranker, before
):
    auc = auc_of_all_items(shop, ranker)
    assert auc[TREND] - auc[NICHE] > 40
    fair_ranker = adagrpo.train_ranker(fair_shop, Config())
    fair_auc = auc_of_all_items(fair_shop, fair_ranker)
    assert abs(fair_auc[TREND] - fair_auc[NICHE]) < 10
    fair = adagrpo.evaluate(policy, fair_ranker, fair_shop.test, Config())
    clear = by_kind(shop, before["clear"])
    assert by_kind(fair_shop, fair["clear"])[NICHE] > clear[NICHE] + 12


def test_without_order_the_series_is_no_longer_easy(shop, before):
    """A policy for series users alone, with twice the passes: the same purchases in
    another order stay hard for it.
    """
    rng = np.random.default_rng(0)

    def shuffled_series(split: Split) -> Split:
        bought = rng.permuted(purchases_of(split)[split.kind == SERIES], axis=1)
        return Split(bought[:, :-1], bought[:, -1], None)

    mixed = replace(shop, pretrain=shuffled_series(shop.pretrain))
    policy = adagrpo.pretrain(mixed, Config(pretrain_epochs=8))
    users = shuffled_series(shop.test)
    metrics = adagrpo.evaluate(policy, Ranker(toy_data.ITEMS), users, Config())
    assert 100 * metrics["hard"].mean() > by_kind(shop, before["hard"])[SERIES] + 15


def test_the_printed_groups_are_of_users_like_most_of_their_kind(
    shop, policy, ranker, before, capsys
):
    adagrpo.print_examples(shop, policy, ranker, before, Config())
    _, *groups = capsys.readouterr().out.split("; last bought ")
    for number, group in enumerate(groups):
        usual = bool(before["admit"][shop.test.kind == number].mean() > 0.5)
        is_usual = (before["admit"] == usual) & (shop.test.kind == number)
        user = [is_usual.argmax()]
        target = torch.as_tensor(shop.test.target[user])
        history = torch.as_tensor(shop.test.history[user])
        scored = adagrpo.roll_out_and_score(policy, ranker, history, target, Config())
        assert f"target {'-'.join(map(str, shop.tokens[target.item()]))} " in group
        assert f"admitted: {usual}" in group
        assert f"reward {scored.rewards.max():.3f}" in group


# ------------------------------------------------------------------------- the command


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_a_shop_of_ones_own_goes_through_everything(dtype, capsys):
    own = tiny_shop()
    for part in (own, *splits_of(own).values()):
        for name, array in vars(part).items():
            if isinstance(array, np.ndarray):  # also `clicked`, as 0 and 1
                setattr(part, name, array.astype(dtype))
    config = Config(group=6, epochs=1)
    policy = adagrpo.pretrain(own, config)
    ranker = adagrpo.train_ranker(own, config)
    rule, weight = adagrpo.make_arms(config)["adagrpo"]
    results = []
    for _ in ("before", "after"):
        validation = adagrpo.evaluate(policy, ranker, own.validation, config)
        test = adagrpo.evaluate(policy, ranker, own.test, config)
        results.append(Result(validation, test, 0.0))
        adagrpo.post_train(policy, ranker, own.posttrain, rule, weight, config)
    adagrpo.print_premise(own, results[0])
    adagrpo.print_results(own, results[0], {"adagrpo": results[1]})
    assert "tail" in capsys.readouterr().out


def test_every_setting_has_an_option_and_a_default(capsys):
    config, options = adagrpo.command_line([])
    assert config == Config()
    assert options.arms == ["nll", "mix-1", "adagrpo"]
    with pytest.raises(SystemExit):
        adagrpo.command_line(["--help"])
    said = capsys.readouterr().out
    for field in fields(Config):
        option = "--" + field.name.replace("_", "-")
        assert re.search(rf" {option} .*\s*\({field.default}\)\n", said), option
        other = "sample"
        if field.type is not str:
            other = field.type(2 * field.default + 1)
        changed, _ = adagrpo.command_line([option, str(other)])
        assert changed == replace(Config(), **{field.name: other})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--arms", "magic"),
        ("--decode", "greedy"),
        ("--device", "abacus"),
        ("--group", "1"),
        ("--epochs", "many"),
    ],
)
def test_a_bad_option_ends_with_a_line_and_no_work(monkeypatch, capsys, name, value):
    monkeypatch.setattr(adagrpo, "make_shop", None)  # work would fail
    with pytest.raises(SystemExit) as end:
        adagrpo.main([name, value])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert f"argument {name}:" in said
    assert value in said


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """The whole command on a tiny toy shop, in a folder of its own; it returns what was
    printed.
    """
    monkeypatch.chdir(tmp_path)
    tiny = {"pretrain": 300, "validation": 40, "test": 90, "feed": 600}
    monkeypatch.setattr(toy_data, "SIZES", toy_data.SIZES | tiny)

    def run(*options) -> str:
        short = ["--users", "16", "--epochs", "1", "--group", "8"]
        short += ["--pretrain-batch", "16", "--pretrain-lr", "0.01"]
        adagrpo.main([*short, *map(str, options)])
        return capsys.readouterr().out

    yield run
    torch.set_default_device(None)


def test_two_runs_print_the_same_ascii_of_at_most_100_columns(command):
    one = command()
    two = command()
    assert one == two
    assert one.isascii()
    assert max(len(line) for line in one.splitlines()) <= 100
    for arm in ("nll", "mix-1", "adagrpo"):
        assert f"\n{arm:<17} step    2  nll" in one


def test_saved_policies_load_and_write_the_same(command, monkeypatch):
    trained = {}
    original = adagrpo.post_train

    def spy(policy, *arguments):
        trained[arguments[-1]] = policy  # by label
        return original(policy, *arguments)

    monkeypatch.setattr(adagrpo, "post_train", spy)
    command("--arms", "mix-1", "nll", "--save", "new/folder")
    assert list(trained) == ["mix-1", "nll"]
    assert not torch.equal(weights_of(trained["nll"]), weights_of(trained["mix-1"]))
    toy = make_shop(0)
    for arm, policy in trained.items():
        loaded = Policy(toy.tokens, history_length=toy_data.HISTORY)
        loaded.load_state_dict(torch.load(f"new/folder/{arm}.pt"))
        prompt = policy.prompt(torch.as_tensor(toy.test.history[:20]))
        expected = adagrpo.rollout(policy, prompt, 10, "beam")
        assert_close(adagrpo.rollout(loaded, prompt, 10, "beam"), expected)


def output_of(*command: str) -> str:
    """What Python prints, as in a fresh shell. It must end well and say no more."""
    process = subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout


def test_an_import_prints_and_does_nothing():
    code = """
import torch
state = torch.get_rng_state()
threads = torch.get_num_threads()
import adagrpo, toy_data
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_num_threads() == threads
"""
    assert output_of("-W", "error", "-c", code) == ""


# ------------------------------------------------------------------------------ README


def blocks_of_readme() -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    readme = (HERE / "README.md").read_text()
    return re.findall(r"^```(\w+)\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)


def test_the_readmes_gate_prints_what_the_readme_says():
    """Its last line is a comment with what it prints."""
    (code,) = [code for _, code in blocks_of_readme() if "adagrpo_gate(" in code]
    *_, expected = code.splitlines()
    assert output_of("-c", code) == f"{expected.removeprefix('# ')}\n"


def test_the_readmes_lines_save_scores_of_your_own(monkeypatch, tmp_path):
    """On a tiny shop: what the ranker says of the targets, and where hits are."""
    monkeypatch.chdir(tmp_path)
    tiny = {"pretrain": 300, "validation": 40, "posttrain": 20, "test": 20, "feed": 600}
    monkeypatch.setattr(toy_data, "SIZES", toy_data.SIZES | tiny)
    (code,) = [code for _, code in blocks_of_readme() if "np.savez" in code]
    Path("snippet.py").write_text(code)
    names = runpy.run_path("snippet.py")
    users = names["users"]
    with np.load("scores.npz") as scores:
        assert scores["hit"].shape == scores["logp"].shape == (40, 32)
        history = torch.as_tensor(users.history)
        target = torch.as_tensor(users.target)
        reward = names["ranker"].click_probability(history, target[:, None])
        assert_close(torch.tensor(scores["target_reward"]), reward[:, 0].detach())
        hits = torch.tensor(scores["hit"])
        is_target = names["scored"].items == target[:, None]
        assert torch.equal(hits, is_target)
