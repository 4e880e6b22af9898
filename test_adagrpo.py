# SPDX-License-Identifier: MIT
"""Checks against independent oracles: hand calculation, slow loop, brute force, numpy.

From the top: the functions that people copy, the policy and its rollouts, the training
loop, the metrics, devices, the toy shop and the premise of its story, own data, printed
tables and options, whole programs as processes, the study, evidence, MovieLens, README.

    python -m pytest -q

Tests that stop programs look into /proc and are skipped where there is none.
"""

import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / ".github"))
import evidence
import movielens
import study

import adagrpo
import toy_data
from adagrpo import (
    Config,
    Gate,
    Policy,
    Ranker,
    Scored,
    adagrpo_gate,
    adagrpo_loss,
    group_advantages,
    grpo_loss,
    with_floor,
)
from toy_data import KINDS, Shop, Split, Truth, load_shop, make_shop

torch.set_num_threads(1)

NAN = math.nan
INF = math.inf
NOT_FINITE = (NAN, INF, -INF)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TREND, SERIES, NICHE = range(3)


# -------------------------------------------------------------------------- the gate


def gate(
    target_reward,
    rewards,
    hit=None,
    valid=None,
    min_difficulty=0.5,
    min_discriminability=0.25,
) -> Gate:
    """The gate of some lists. By default all are valid and none is the target."""
    rewards = torch.as_tensor(rewards)
    if hit is None:
        hit = torch.zeros(rewards.shape)
    if valid is None:
        valid = torch.ones(rewards.shape)
    return adagrpo_gate(
        torch.as_tensor(target_reward),
        rewards,
        torch.as_tensor(hit).bool(),
        torch.as_tensor(valid).bool(),
        min_difficulty,
        min_discriminability,
    )


@pytest.mark.parametrize(
    ("target_reward", "rewards", "hit", "valid", "expected"),
    [
        pytest.param(
            # m = 0.75 - (0.25 + 0.25 + 0.5 + 0.5) / 4
            0.75,
            [0.25, 0.25, 0.5, 0.5],
            [0, 0, 0, 0],
            [1, 1, 1, 1],
            Gate(True, True, True, 1.0, 0.375),
            id="hard and clear",
        ),
        pytest.param(
            # m = 0.5 - 0.375
            0.5,
            [0.25, 0.25, 0.5, 0.5],
            [0, 0, 0, 0],
            [1, 1, 1, 1],
            Gate(False, True, False, 1.0, 0.125),
            id="hard and not clear",
        ),
        pytest.param(
            # One rollout of four stands ahead of the hit, which is no negative itself.
            0.75,
            [0.25, 0.75, 0.25, 0.25],
            [0, 1, 0, 0],
            [1, 1, 1, 1],
            Gate(False, False, True, 0.25, 0.5),
            id="easy and clear",
        ),
        pytest.param(
            # m = 0.25 - (0.25 + 0.5 + 0.75) / 3
            0.25,
            [0.25, 0.25, 0.5, 0.75],
            [1, 0, 0, 0],
            [1, 1, 1, 1],
            Gate(False, False, False, 0.0, -0.25),
            id="easy and not clear",
        ),
        pytest.param(
            # With the hallucination's 0 as a negative, m would be 0.125.
            0.5,
            [0.5, 0.5, 0.5, 0.0],
            [0, 0, 0, 0],
            [1, 1, 1, 0],
            Gate(False, True, False, 1.0, 0.0),
            id="hallucinations are no negatives",
        ),
    ],
)
def test_the_gate_by_hand(target_reward, rewards, hit, valid, expected):
    result = gate([target_reward], [rewards], [hit], [valid])
    assert [field.item() for field in result] == list(expected)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0], 0.0),
        ([3], 0.3),
        ([9], 0.9),
        ([], 1.0),
        ([3, 5], 0.3),  # drawn twice: only the first counts
    ],
)
def test_difficulty_is_the_share_of_the_group_ahead_of_the_target(places, expected):
    hit = torch.zeros(1, 10)
    hit[0, places] = 1
    result = gate([0.5], torch.zeros(1, 10), hit)
    assert result.difficulty.item() == np.float32(expected)


@pytest.mark.parametrize(
    ("min_difficulty", "min_discriminability", "admitted"),
    [(0.3, 0.25, True), (0.31, 0.25, False), (0.3, 0.26, False)],
)
def test_thresholds_are_inclusive(min_difficulty, min_discriminability, admitted):
    """A hit in place 3 of 10 is a difficulty of 0.3; 0.5 - 0.25 is 0.25 exactly."""
    hit = torch.zeros(1, 10)
    hit[0, 3] = 1
    rewards = torch.full((1, 10), 0.25)
    result = gate([0.5], rewards, hit, None, min_difficulty, min_discriminability)
    assert result.admit.item() is admitted


@pytest.mark.parametrize(
    ("threshold", "admitted"), [(2.0, True), (2.5, True), (2.6, False), (-7.0, True)]
)
def test_scores_and_thresholds_may_be_logits(threshold, admitted):
    """m = 1 - (-3 - 2 + 0.5) / 3 = 2.5"""
    result = gate([1.0], [[-3.0, -2.0, 0.5]], min_discriminability=threshold)
    assert result.discriminability.item() == 2.5
    assert result.admit.item() is admitted


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gate_knows_all_floating_types(dtype):
    result = gate(
        torch.tensor([0.75, 0.5], dtype=dtype),
        torch.tensor([[0.25, 0.25, 0.5, 0.5]] * 2, dtype=dtype),
    )
    assert result.discriminability.tolist() == [0.375, 0.125]
    assert result.admit.tolist() == [True, False]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [2, 8, 32, 1000])
def test_an_overflow_never_admits(dtype, group):
    """The target scores below its negatives, whose sum is beyond the type's numbers.

    A sum of -inf would make m = +inf.
    """
    lowest = torch.finfo(dtype).min
    rewards = torch.full((1, group), 0.9 * lowest, dtype=dtype)
    target_reward = torch.tensor([lowest], dtype=dtype)
    assert not gate(target_reward, rewards, min_discriminability=0.0).admit.item()


def test_half_precision_is_summed_without_overflow():
    """-3500 - (-3000) = -500, though 32 * -3000 is beyond float16."""
    rewards = torch.full((1, 32), -3000.0, dtype=torch.float16)
    result = gate(torch.tensor([-3500.0], dtype=torch.float16), rewards)
    assert result.discriminability.item() == -500
    assert not result.clear.item()


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("place", ["target", "negative"])
def test_a_needed_score_that_is_not_finite_closes_the_gate(bad, place):
    target_reward = torch.tensor([0.9, 0.9])
    rewards = torch.tensor([[0.1, 0.1], [0.1, 0.1]])
    if place == "target":
        target_reward[0] = bad
    else:
        rewards[0, 1] = bad
    result = gate(target_reward, rewards)
    assert result.admit.tolist() == [False, True]
    assert result.clear.tolist() == [False, True]
    assert result.discriminability.isnan().tolist() == [True, False]


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("place", ["hallucination", "target in the group"])
def test_a_score_that_nobody_needs_is_not_looked_at(bad, place):
    """m = 0.75 - (0.25 + 0.5) / 2 = 0.375 with anything in the last place."""
    valid = [[1, 1, 1]]
    hit = [[0, 0, 0]]
    if place == "hallucination":
        valid = [[1, 1, 0]]
    else:
        hit = [[0, 0, 1]]
    result = gate([0.75], [[0.25, 0.5, bad]], hit, valid)
    assert result.discriminability.item() == 0.375
    assert result.admit.item()


@pytest.mark.parametrize(
    ("hit", "valid"),
    [([0, 0], [0, 0]), ([1, 0], [1, 0]), ([1, 1], [1, 1])],
    ids=["all hallucinations", "target and hallucination", "nothing but the target"],
)
def test_the_gate_closes_without_anything_to_compare(hit, valid):
    result = gate([0.9], [[0.9, 0.0]], [hit], [valid], 0.0, -1.0)
    assert not result.admit.item()
    assert result.discriminability.isnan().item()


def test_the_gate_has_no_gradient():
    rewards = torch.rand(3, 4, requires_grad=True)
    result = gate(rewards[:, 0], rewards)
    assert not any(field.requires_grad for field in result)


@pytest.mark.parametrize("convert", [np.asarray, list], ids=["arrays", "lists"])
@pytest.mark.parametrize("number", [float, int, bool])
def test_the_gate_takes_arrays_and_lists_of_any_real_type(convert, number):
    """Scores 1 and 0 in any type: m = 1 - 1/3 and 0 - 2/3."""
    rewards = [[number(1), number(0), number(0)], [number(1), number(1), number(0)]]
    result = adagrpo_gate(
        convert([number(1), number(0)]),
        convert(rewards),
        convert([[False, False, False], [False, False, False]]),
        convert([[True, True, True], [True, True, True]]),
        0.3,
        0.01,
    )
    assert result.admit.tolist() == [True, False]
    assert_close(
        result.discriminability.double(), torch.tensor([2 / 3, -2 / 3]).double()
    )


GOOD_GATE = {
    "target_reward": torch.zeros(2),
    "rollout_rewards": torch.zeros(2, 4),
    "hit": torch.zeros(2, 4, dtype=torch.bool),
    "valid": torch.ones(2, 4, dtype=torch.bool),
    "min_difficulty": 0.3,
    "min_discriminability": 0.01,
}


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("target_reward", torch.zeros(2, 4), "(2, 4)"),
        ("target_reward", torch.zeros(3), "(3,)"),
        ("target_reward", torch.zeros(2, dtype=torch.complex64), "complex64"),
        ("target_reward", "score", "str"),
        ("target_reward", None, "NoneType"),
        ("rollout_rewards", torch.zeros(2, 1), "(2, 1)"),
        ("rollout_rewards", torch.zeros(8), "(8,)"),
        ("rollout_rewards", [[0.1, 0.2], [0.3]], "list"),
        ("rollout_rewards", np.array([[None, 1.0]]), "ndarray"),
        ("hit", torch.zeros(2, 3, dtype=torch.bool), "(2, 3)"),
        ("hit", torch.zeros(2, 4), "float32"),
        ("hit", np.zeros((2, 4), dtype=int), "int64"),
        ("valid", torch.ones(2, 4, dtype=torch.long), "int64"),
        ("valid", [[1, 1, 1, 1], [1, 1, 1, 1]], "int64"),
        ("valid", torch.ones(2, dtype=torch.bool), "(2,)"),
        ("min_difficulty", 1.5, "1.5"),
        ("min_difficulty", NAN, "nan"),
        ("min_discriminability", NAN, "nan"),
        ("min_discriminability", INF, "inf"),
    ],
)
def test_the_gate_names_a_bad_argument_and_what_was_given(name, value, given):
    with pytest.raises((TypeError, ValueError)) as error:
        adagrpo_gate(**(GOOD_GATE | {name: value}))
    assert str(error.value).startswith(name)
    assert given in str(error.value)


# -------------------------------------------------------------- rewards and advantages


def test_a_hallucination_gets_the_floor_and_nothing_scores_below_it():
    """Scores that are logits: with 0 for a hallucination, the third is the best."""
    scores = torch.tensor([[-5.0, -3.0, NAN, -1.0]])
    valid = torch.tensor([[True, True, False, True]])
    rewards = with_floor(scores, valid, floor=-4.0)
    assert rewards.tolist() == [[-4, -3, -4, -1]]


def test_the_floor_of_probabilities_is_zero():
    scores = torch.tensor([[0.7, 0.0, 0.9]])
    valid = torch.tensor([[True, True, False]])
    assert with_floor(scores, valid).tolist() == [[np.float32(0.7), 0, 0]]


def advantages_by_numpy(rewards: torch.Tensor) -> torch.Tensor:
    """In float64, from the numbers that the tensor really holds."""
    rewards = rewards.double().numpy()
    centred = rewards - rewards.mean(1, keepdims=True)
    return torch.from_numpy(centred / rewards.std(1, keepdims=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [2, 3, 8, 33])
def test_advantages_against_numpy(dtype, group):
    torch.manual_seed(0)
    rewards = torch.rand(7, group).to(dtype)
    expected = advantages_by_numpy(rewards)
    assert_close(group_advantages(rewards).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("level", [0.0, 1e-7, 0.1, -0.7, 10.1, 1000.1, 6e4, 1e7])
def test_a_flat_group_gets_exactly_zero(level, dtype):
    for group in range(2, 34):
        rewards = torch.full((3, group), level).to(dtype)
        assert group_advantages(rewards).eq(0).all(), group


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [1e-7, 0.3, -1000.1, 1e7])
def test_a_group_is_flat_up_to_rounding(level, dtype):
    """Three numbers in a row differ by at most 2 * eps relative to their size."""
    first = torch.tensor(level, dtype=dtype)
    second = torch.nextafter(first, torch.tensor(INF, dtype=dtype))
    third = torch.nextafter(second, torch.tensor(INF, dtype=dtype))
    rewards = torch.stack([first, second, third, first])[None]
    assert group_advantages(rewards).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-30, 1e-7, 1e-3, 1.0, 1e7, 1e30])
def test_advantages_do_not_depend_on_the_unit(unit, dtype):
    rewards = unit * torch.tensor([[1, 3, 2, 9]], dtype=dtype)
    expected = advantages_by_numpy(torch.tensor([[1, 3, 2, 9]]))
    assert_close(group_advantages(rewards).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("level", "step", "dtype"),
    [
        (1e7, 1, torch.float32),
        (-1e7, 1, torch.float32),
        (0.5, 2**-20, torch.float32),
        (1e7, 2**-10, torch.float64),
        (1000, 0.5, torch.float16),
        (1, 2**-7, torch.bfloat16),
    ],
)
def test_a_tiny_but_real_spread_counts(level, step, dtype):
    """Rewards of 1, 3, 2, 9 steps above a level that is far higher."""
    steps = torch.tensor([[1, 3, 2, 9]], dtype=torch.float64)
    rewards = (level + step * steps).to(dtype)
    expected = advantages_by_numpy(rewards)
    assert_close(group_advantages(rewards).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([[1, 0, 0, 1]]),
        torch.tensor([[1, 0, 0, 1]], dtype=torch.uint8),
        torch.tensor([[True, False, False, True]]),
        np.array([[1, 0, 0, 1]]),
        [[True, False, False, True]],
    ],
    ids=["int64", "uint8", "bool", "array", "list"],
)
def test_rewards_may_be_whole_numbers_booleans_arrays_or_lists(rewards):
    assert group_advantages(rewards).tolist() == [[1, -1, -1, 1]]


@pytest.mark.parametrize("is_flat", [True, False])
def test_no_gradient_flows_through_advantages(is_flat):
    rewards = torch.rand(2, 4)
    if is_flat:
        rewards = torch.full((2, 4), 0.3)
    rewards.requires_grad_()
    assert not group_advantages(rewards).requires_grad


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_group_with_a_reward_that_is_not_finite_gets_zero_and_no_other(bad):
    rewards = torch.tensor([[0.1, bad, 0.3], [1.0, 3.0, 2.0]])
    advantages = group_advantages(rewards)
    assert advantages[0].eq(0).all()
    assert_close(advantages[1:].double(), advantages_by_numpy(rewards[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_advantages_are_finite_for_all_rewards_that_are(dtype):
    """The difference of the two is beyond the type's numbers."""
    limits = torch.finfo(dtype)
    rewards = torch.tensor([[limits.max, limits.min, 0.0]], dtype=dtype)
    assert group_advantages(rewards).isfinite().all()


@pytest.mark.parametrize(
    ("rewards", "given"),
    [
        (torch.rand(2, 1), "(2, 1)"),
        (torch.rand(8), "(8,)"),
        (torch.rand(2, 4, 3), "(2, 4, 3)"),
        (torch.zeros(2, 4, dtype=torch.complex64), "complex64"),
        ("rewards", "str"),
    ],
)
def test_advantages_name_a_bad_argument(rewards, given):
    with pytest.raises((TypeError, ValueError)) as error:
        group_advantages(rewards)
    assert str(error.value).startswith("rewards")
    assert given in str(error.value)


# -------------------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    "admit",
    [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    ids=["some", "none: NLL alone", "all: a fixed mixture"],
)
def test_loss_and_gradient_against_a_slow_loop(admit):
    torch.manual_seed(2)
    nll = torch.rand(5, requires_grad=True)
    logp = torch.randn(5, 4, requires_grad=True)
    old_logp = logp.detach() + 0.3 * torch.randn(5, 4)
    advantages = torch.randn(5, 4)
    admit = torch.tensor(admit).bool()
    fast = adagrpo_loss(nll, grpo_loss(logp, old_logp, advantages), admit, weight=0.7)

    slow = torch.zeros(())
    for b in range(5):
        slow = slow + nll[b] / 5
        for i in range(4):
            ratio = math.e ** (logp[b, i] - old_logp[b, i])
            clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
            gain = min(ratio * advantages[b, i], clipped * advantages[b, i])
            if admit[b]:
                slow = slow - 0.7 * gain / 4 / 5

    assert_close(fast, slow)
    inputs = (nll, logp)
    fast_gradients = torch.autograd.grad(fast, inputs, materialize_grads=True)
    slow_gradients = torch.autograd.grad(slow, inputs, materialize_grads=True)
    assert_close(fast_gradients, slow_gradients)
    assert fast_gradients[1][~admit].eq(0).all()


def test_with_one_update_per_rollout_the_loss_is_zero_and_its_gradient_is_not():
    """Every ratio is 1, so the loss is -mean(A) = 0, and its gradient -A_i / G."""
    torch.manual_seed(0)
    logp = torch.randn(5, 4, requires_grad=True)
    advantages = group_advantages(torch.rand(5, 4))
    loss = grpo_loss(logp, logp.detach(), advantages)
    assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert_close(gradient, -advantages / 4)


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("place", ["logp", "old_logp", "advantages", "both"])
def test_a_refused_sample_adds_nothing_not_even_a_nan(bad, place):
    """The loss is that of the first sample; the second's rollouts get no gradient."""
    logp = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    old_logp = logp.clone()
    advantages = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    if place in ("logp", "both"):
        logp[1, 0] = bad
    if place in ("old_logp", "both"):
        old_logp[1, 0] = bad
    if place == "advantages":
        advantages[1, 0] = bad
    logp.requires_grad_()
    nll = torch.tensor([3.0, 5.0], requires_grad=True)

    grpo = grpo_loss(logp, old_logp, advantages)
    loss = adagrpo_loss(nll, grpo, torch.tensor([True, False]), weight=2.0)
    loss.backward()
    assert loss.item() == 4.0
    assert nll.grad.tolist() == [0.5, 0.5]
    # weight * -A_i / G / B
    assert logp.grad.tolist() == [[-0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_an_unusable_log_probability_shows_in_the_loss_and_sends_back_no_nan(bad):
    logp = torch.tensor([[-1.0, bad], [-1.0, -2.0]], requires_grad=True)
    old_logp = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    loss = grpo_loss(logp, old_logp, torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert logp.grad.isfinite().all()
    assert logp.grad[0, 1] == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_ratios_are_computed_in_float32_or_better(dtype):
    """-12.0625 and -12 exist in all types. The ratio is exp(-1/16) = 0.939413.

    With advantages 1 and -1 the loss is -(0.939413 - 1) / 2. In bfloat16 the ratio
    would be 0.9375 or 0.9414.
    """
    logp = torch.tensor([[-12.0625, -12.0]], dtype=dtype)
    old_logp = torch.tensor([[-12.0, -12.0]], dtype=dtype)
    advantages = torch.tensor([[1.0, -1.0]], dtype=dtype)
    loss = grpo_loss(logp, old_logp, advantages)
    assert loss.item() == pytest.approx((1 - math.exp(-1 / 16)) / 2, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_no_samples_are_no_error_and_the_loss_is_zero():
    empty = torch.zeros(0, 4)
    mask = torch.zeros(0, 4, dtype=torch.bool)
    nll = torch.zeros(0, requires_grad=True)
    admit = gate(torch.zeros(0), empty, mask, mask).admit
    grpo = grpo_loss(empty, empty, group_advantages(empty))
    loss = adagrpo_loss(nll, grpo, admit, weight=5.0)
    loss.backward()
    assert admit.shape == grpo.shape == (0,)
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ([(12, 3), (12, 3), (3, 4)], "advantages"),  # log-probabilities of tokens
        ([(12,), (12,), (12,)], "logp"),
        ([(3, 4), (3, 3), (3, 4)], "old_logp"),
        ([(3, 4), (3, 4), (3,)], "advantages"),
        ([(3, 4), (12,), (3, 4)], "old_logp"),
    ],
)
def test_grpo_loss_refuses_other_shapes_by_name(shapes, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        grpo_loss(*[torch.zeros(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("nll", torch.zeros(2, 3), ValueError),
        ("nll", torch.tensor(1.0), ValueError),
        ("nll", "nll", TypeError),
        ("grpo", torch.zeros(2, 4), ValueError),
        ("admit", torch.ones(2), TypeError),
        ("admit", torch.ones(1, dtype=torch.bool), ValueError),
        ("admit", [1, 0], TypeError),
    ],
)
def test_adagrpo_loss_refuses_others_by_name(name, value, error):
    good = {"nll": torch.zeros(2), "grpo": torch.zeros(2), "admit": [True, False]}
    with pytest.raises(error, match=f"^{name} must"):
        adagrpo_loss(**(good | {name: value}), weight=1.0)


def all_of_the_method(target_reward, rewards, hit, valid, nll, logp) -> tuple:
    """Gate, advantages, and both losses."""
    result = adagrpo_gate(target_reward, rewards, hit, valid, 0.3, 0.01)
    advantages = group_advantages(rewards)
    grpo = grpo_loss(logp, logp.detach() - 0.1, advantages)
    loss = adagrpo_loss(nll, grpo, result.admit, 5.0)
    return (*result, advantages, grpo, loss)


def inputs_of_the_method(*batch: int) -> tuple:
    torch.manual_seed(0)
    return (
        torch.rand(*batch),
        torch.rand(*batch, 4),
        torch.rand(*batch, 4) < 0.2,
        torch.rand(*batch, 4) < 0.9,
        torch.rand(*batch),
        torch.randn(*batch, 4),
    )


def test_vmap_over_batches_gives_what_each_batch_gives():
    inputs = inputs_of_the_method(3, 5)
    together = torch.vmap(all_of_the_method)(*inputs)
    for batch in range(3):
        alone = all_of_the_method(*[tensor[batch] for tensor in inputs])
        for a, b in zip(together, alone, strict=True):
            assert_close(a[batch], b, equal_nan=True)


def test_inference_mode_gives_the_same():
    inputs = inputs_of_the_method(5)
    with torch.inference_mode():
        inside = all_of_the_method(*inputs)
    assert_close(inside, all_of_the_method(*inputs), equal_nan=True)


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
    levels = policy.item_tokens.shape[1]
    return torch.randint(5, (samples, 3 * levels))


def slow_log_prob(policy, prompt, item) -> torch.Tensor:
    """Each token by a forward of its own over all that stands before it: (B,)."""
    total = torch.zeros(len(item))
    for level in range(item.shape[1]):
        before = torch.cat([prompt, item[:, :level]], dim=1)
        next_logp = policy(before)[:, -1]  # (B, V)
        total = total + next_logp.gather(1, item[:, level : level + 1]).squeeze(1)
    return total


def test_attention_against_a_slow_loop():
    """Each head by itself: softmax of q . k / sqrt(width) over what stands before."""
    torch.manual_seed(0)
    attention = adagrpo.Attention(width=8, heads=2)
    x = torch.randn(1, 5, 8)
    q, k, v = attention.qkv(x)[0].split(8, dim=1)  # (5, 8) each
    rows = []
    for place in range(5):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = [q[place, head] @ k[i, head] / 2 for i in range(place + 1)]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * v[i, head] for i, w in enumerate(weights)))
        rows.append(attention.out(torch.cat(heads)))
    assert_close(attention(x)[0][0], torch.stack(rows))


def test_the_policy_is_causal():
    policy = tiny_policy()
    prompt = prompts_of(policy, 3)
    changed = prompt.clone()
    changed[:, 6] = (prompt[:, 6] + 1) % 5
    assert_close(policy(prompt)[:, :6], policy(changed)[:, :6])
    assert not torch.allclose(policy(prompt)[:, 6:], policy(changed)[:, 6:])


def test_the_policy_gives_probabilities():
    policy = tiny_policy()
    total = policy(prompts_of(policy, 3)).exp().sum(-1)
    assert_close(total, torch.ones(3, 9))


@pytest.mark.parametrize("levels", [1, 3, 4])
def test_log_prob_sums_over_the_tokens_of_an_item(levels):
    policy = tiny_policy(levels)
    prompt = prompts_of(policy, 6)
    item = torch.randint(5, (6, levels))
    expected = slow_log_prob(policy, prompt, item)
    assert_close(adagrpo.log_prob(policy, prompt, item), expected)


@pytest.mark.parametrize("decode", ["beam", "sample"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_rollouts_match_plain_forwards(decode, levels):
    """Every rollout again, alone after its prompt: same log-prob and gradient."""
    policy = tiny_policy(levels)
    prompt = prompts_of(policy, 3)
    tokens, logp = adagrpo.rollout(policy, prompt, 5, decode)
    assert tokens.shape == (3, 5, levels)
    assert (logp[:, :-1] >= logp[:, 1:]).all(), "not likeliest first"

    plain = [slow_log_prob(policy, prompt, tokens[:, i]) for i in range(5)]
    plain = torch.stack(plain, dim=1)
    assert_close(logp, plain)

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


@pytest.mark.parametrize("has_own_tokens", [False, True])
def test_four_codes_of_256_are_no_problem(has_own_tokens):
    """2^32 or 2^40 possible IDs: a table of them all could not exist."""
    rng = np.random.default_rng(0)
    item_tokens = rng.integers(256, size=(3000, 4))
    item_tokens[0] = 255
    item_tokens[1] = 0
    if has_own_tokens:
        item_tokens += 256 * np.arange(4)
    policy = Policy(item_tokens, history_length=2, width=8)
    assert policy.items_of(policy.item_tokens).tolist() == list(range(3000))

    known = {tuple(item) for item in item_tokens.tolist()}
    others = policy.item_tokens.clone()
    others[:, 3] = others[:, 3] - others[:, 3] % 256 + torch.randint(256, (3000,))
    is_known = [tuple(item) in known for item in others.tolist()]
    assert (policy.items_of(others) >= 0).tolist() == is_known


def test_an_id_of_two_items_is_refused():
    with pytest.raises(ValueError, match="same semantic ID"):
        Policy(np.array([[0, 1], [1, 0], [0, 1]]), history_length=2)


def test_the_policys_ids_move_with_it():
    """What is no parameter is a buffer: `to` leaves no tensor behind."""
    policy = tiny_policy().to("meta")
    assert "item_tokens" in dict(policy.named_buffers())
    for module in policy.modules():
        plain = [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
        assert plain == []
    tensors = [*policy.parameters(), *policy.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# ------------------------------------------------------------------- the training loop


def tiny_shop() -> Shop:
    """12 items with IDs of two codes, 3 purchases in a history, and slates of 4."""
    rng = np.random.default_rng(0)

    def split(users: int) -> Split:
        history = rng.integers(12, size=(users, 3))
        return Split(history, rng.integers(12, size=users), rng.integers(2, size=users))

    return Shop(
        tokens=np.column_stack(np.divmod(np.arange(12), 4)),
        kinds=("head", "tail"),
        pretrain=split(40),
        posttrain=split(30),
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


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mix", [1, 1, 1, 1]),
        ("difficulty", [1, 1, 0, 0]),
        ("discriminability", [1, 0, 1, 0]),
        ("adagrpo", [1, 0, 0, 0]),
    ],
)
def test_every_rule_takes_its_own_samples(rule, expected):
    hard = torch.tensor([True, True, False, False])
    clear = torch.tensor([True, False, True, False])
    known = Gate(hard & clear, hard, clear, hard.float(), clear.float())
    scored = SimpleNamespace(gate=known)
    assert adagrpo.RULES[rule](scored).tolist() == [bool(taken) for taken in expected]


@pytest.mark.parametrize("decode", ["beam", "sample"])
@pytest.mark.parametrize("rule", ["mix", "difficulty", "discriminability", "adagrpo"])
def test_one_step_of_the_training_loop_by_hand(monkeypatch, rule, decode):
    """With plain SGD at rate 1 a step is minus the gradient, clipped to norm 1.

    The gradient of (7) with ratios of 1, by one backward for each sample and rollout.
    """
    shop = tiny_shop()
    policy, ranker = tiny_models()
    before = weights_of(policy)
    config = Config(batch=30, epochs=1, group=6, decode=decode)

    seen = []
    original = adagrpo.roll_out_and_score

    def spy(*arguments) -> Scored:
        seen.append((*arguments[2:4], original(*arguments)))
        return seen[-1][-1]

    def sgd(model, lr, steps):
        return torch.optim.SGD(model.parameters(), lr=1.0), SimpleNamespace(step=int)

    monkeypatch.setattr(adagrpo, "roll_out_and_score", spy)
    monkeypatch.setattr(adagrpo, "make_optimizer", sgd)
    rule = adagrpo.RULES[rule]
    adagrpo.post_train(policy, ranker, shop.posttrain, rule, 3.0, config)
    step = weights_of(policy) - before

    history, target, scored = seen[0]
    assert sorted(target.tolist()) == sorted(shop.posttrain.target.tolist())
    policy, _ = tiny_models()
    prompt = policy.item_tokens[history].flatten(1)
    loss = torch.zeros(())
    for b in range(30):
        own = slow_log_prob(
            policy, prompt[b : b + 1], policy.item_tokens[target[b], None]
        )
        loss = loss - own.sum() / 30
        rewards = scored.rewards[b].double()
        if rule(scored)[b] and rewards.std() > 1e-9:
            advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
            for i in range(scored.rewards.shape[1]):
                item = scored.tokens[b, i : i + 1]
                logp = slow_log_prob(policy, prompt[b : b + 1], item)
                loss = loss - 3.0 * advantages[i].float() * logp.sum() / 6 / 30
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    expected = -gradient / gradient.norm().clamp(min=1)
    assert_close(step, expected, rtol=1e-3, atol=1e-5)


def test_nll_alone_rolls_nothing_out_and_asks_no_ranker(monkeypatch):
    monkeypatch.setattr(adagrpo, "rollout", None)  # a call would fail
    policy, _ = tiny_models()
    before = weights_of(policy)
    config = Config(epochs=1, group=6)
    adagrpo.post_train(policy, None, tiny_shop().posttrain, None, 1.0, config)
    assert not torch.equal(weights_of(policy), before)


def test_a_mixture_of_weight_zero_is_nll_alone():
    config = Config(epochs=2, group=6)
    trained = []
    for rule in (None, adagrpo.RULES["mix"]):
        policy, ranker = tiny_models()
        adagrpo.post_train(policy, ranker, tiny_shop().posttrain, rule, 0.0, config)
        trained.append(weights_of(policy))
    assert_close(*trained)


@pytest.mark.parametrize("is_nan", [False, True])
def test_no_gradient_reaches_the_ranker_and_no_nan_the_policy(monkeypatch, is_nan):
    policy, ranker = tiny_models()
    split = tiny_shop().posttrain
    if is_nan:
        monkeypatch.setattr(
            Ranker, "forward", lambda self, history, items: 0.0 * items + NAN
        )
    mix = adagrpo.RULES["mix"]
    adagrpo.post_train(policy, ranker, split, mix, 5.0, Config(epochs=1, group=6))
    assert all(parameter.grad is None for parameter in ranker.parameters())
    assert weights_of(policy).isfinite().all()


def test_a_ranker_of_nan_admits_nobody(monkeypatch):
    policy, ranker = tiny_models()
    monkeypatch.setattr(
        Ranker, "forward", lambda self, history, items: 0.0 * items + NAN
    )
    metrics = adagrpo.evaluate(policy, ranker, tiny_shop().test, Config(group=6))
    assert not metrics["admit"].any()


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


def test_a_line_is_printed_every_100_steps_and_at_the_end(capsys):
    policy, ranker = tiny_models()
    config = Config(batch=1, epochs=5)
    adagrpo.post_train(policy, ranker, tiny_shop().posttrain, None, 1.0, config, "nll")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["nll", "100"], ["nll", "150"]]
    assert lines[0].split()[3:7] == ["-"] * 4  # it asked no ranker
    policy, ranker = tiny_models()
    adagrpo.post_train(policy, ranker, tiny_shop().posttrain, None, 1.0, config)
    assert capsys.readouterr().out == ""


def test_the_printed_figures_by_hand():
    """Two of four samples are hard, one of these is clear; an arm admitted three."""
    hard = torch.tensor([True, True, False, False])
    clear = torch.tensor([True, False, True, False])
    known = Gate(hard & clear, hard, clear, None, None)
    rewards = torch.tensor([[0.1, 0.3]] * 4)
    figures = adagrpo.training_figures(
        torch.tensor([1.0, 2.0, 3.0, 6.0]),
        SimpleNamespace(gate=known, rewards=rewards),
        torch.tensor([True, True, True, False]),
    )
    figures = {name: figure.item() for name, figure in figures.items()}
    expected = {"nll": 3, "reward": 0.2, "easy": 0.5, "unclear": 0.25, "admitted": 0.75}
    assert figures == pytest.approx(expected)


# ------------------------------------------------------------------------- the metrics


class Table(Ranker):
    """A ranker that gives item i the score table[i], whatever the history."""

    def __init__(self, table: list[float]):
        super().__init__(items=len(table))
        self.table = torch.tensor(table)

    def click_probability(self, history, items):
        return self.table[items]


HALLUCINATION = [7, 7]  # of 8 * 8 IDs, the first 60 name an item
TARGETS = [10, 20, 30, 40]


@pytest.fixture
def known_lists(monkeypatch) -> list[list[int]]:
    """Four users' groups of 32, likeliest first; -1 names no item.

    The targets stand at ranks 1, 3 and 15; the last is missing. Ranks 6 and 7 and the
    last ten of every group are hallucinations.
    """
    fillers = [*range(41, 60), *range(10), 11, 12, 13]
    lists = []
    for target, rank in zip(TARGETS, (1, 3, 15, None), strict=True):
        items = fillers.copy()
        items[5:7] = [-1] * 2
        items[22:] = [-1] * 10
        if rank is not None:
            items[rank - 1] = target
        lists.append(items)

    ids = [[i // 8, i % 8] for i in range(60)] + [HALLUCINATION]
    tokens = torch.tensor([[ids[item] for item in items] for items in lists])

    def known_rollout(policy, prompt, group, decode):
        return tokens, torch.zeros(tokens.shape[:2])

    monkeypatch.setattr(adagrpo, "rollout", known_rollout)
    return lists


def four_users() -> tuple[Policy, Split]:
    item_tokens = np.column_stack(np.divmod(np.arange(60), 8))
    policy = Policy(item_tokens, history_length=3, width=8)
    history = np.arange(12).reshape(4, 3)
    return policy, Split(history, np.array(TARGETS), np.array([0, 0, 1, 1]))


def test_metrics_by_hand(known_lists):
    """Ranks 1, 3, 15 and none, two hallucinations in each ten.

    NDCG is 1 / log2(1 + rank), which is 1 and 1 / 2. The ranker scores by item number,
    so the negatives below a target can be counted.
    """
    policy, users = four_users()
    ranker = Table([i / 100 for i in range(60)])
    metrics = adagrpo.evaluate(policy, ranker, users, Config(group=32))
    assert metrics["hr@5"].tolist() == [1, 1, 0, 0]
    assert metrics["hr@10"].tolist() == [1, 1, 0, 0]
    assert metrics["hr@20"].tolist() == [1, 1, 1, 0]
    assert metrics["ndcg@10"] == pytest.approx([1, 1 / math.log2(4), 0, 0])
    assert metrics["hallucination"] == pytest.approx([0.2] * 4)
    assert metrics["top 10"].tolist() == [items[:10] for items in known_lists]

    differences = []
    shares_below = []
    for target, items in zip(TARGETS, known_lists, strict=True):
        negatives = [item for item in items if item not in (-1, target)]
        differences.append((target - sum(negatives) / len(negatives)) / 100)
        below = [item for item in negatives if item < target]
        shares_below.append(len(below) / len(negatives))
    assert metrics["discriminability"] == pytest.approx(differences, abs=1e-6)
    assert metrics["auc in group"] == pytest.approx(shares_below)
    assert metrics["difficulty"] == pytest.approx([0, 2 / 32, 14 / 32, 1])


def test_auc_is_the_share_of_random_items_that_score_below_the_target():
    """Target 45 of 60 items: 0.75, within 5 standard errors of 20,000 draws."""
    tokens = np.column_stack(np.divmod(np.arange(60), 8))
    policy = Policy(tokens, history_length=3, width=8)
    users = Split(np.zeros((200, 3), dtype=int), np.full(200, 45), np.zeros(200))
    ranker = Table([i / 100 for i in range(60)])
    metrics = adagrpo.evaluate(policy, ranker, users, Config(group=6))
    error = math.sqrt(0.75 * 0.25 / 20_000)
    assert metrics["auc"].mean() == pytest.approx(0.75, abs=5 * error)


@pytest.mark.parametrize("group", [2, 6, 12])
def test_metrics_of_groups_smaller_than_their_lists(group):
    policy, ranker = tiny_models()
    metrics = adagrpo.evaluate(policy, ranker, tiny_shop().test, Config(group=group))
    assert len(metrics["hr@10"]) == 25
    assert (metrics["hr@20"] >= metrics["hr@10"]).all()
    assert (metrics["hr@10"] >= metrics["hr@5"]).all()


def test_reranking_by_hand(known_lists):
    """The targets' ranks by the policy are 1, 3, 15, none.

    The ranker puts all that are in the list first. The twelve hallucinations, which it
    scores as item 0, would fill its first ten places if they were items.
    """
    policy, users = four_users()
    table = [0.5] * 60
    table[0] = 0.9  # what a hallucination would get without a floor
    for target in TARGETS:
        table[target] = 0.8
    orders = adagrpo.rerank(policy, Table(table), users)
    assert orders["hr@10"].tolist() == [1, 1, 0, 0]
    assert orders["reranked"].tolist() == [1, 1, 1, 0]


def test_masks_by_kind_and_by_verdict():
    split = Split(None, np.zeros(4), np.array([0, 1, 1, 0]))
    masks = adagrpo.by_kind(split, ("head", "tail"))
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "all": [True] * 4,
        "head": [True, False, False, True],
        "tail": [False, True, True, False],
    }
    hard = np.array([True, True, False, False])
    clear = np.array([True, False, True, False])
    cells = adagrpo.by_verdict({"hard": hard, "clear": clear})
    assert [np.flatnonzero(mask).tolist() for mask in cells.values()] == [
        [0],
        [1],
        [2],
        [3],
    ]
    assert list(cells) == ["hard+clear", "hard+unclear", "easy+clear", "easy+unclear"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "mask", "expected"),
    [
        ([1, 0, 0, 1], [1, 1, 1, 1], 50),
        ([1, 0, 0, 1], [1, 1, 0, 1], 200 / 3),
        ([NAN, 0, 1, 1], [1, 1, 1, 0], 50),
        ([NAN, 0, 1, 1], [1, 0, 0, 0], NAN),
        ([1, 1, 1, 1], [0, 0, 0, 0], NAN),
    ],
)
def test_a_mean_in_percent_passes_over_what_is_undefined(values, mask, expected):
    mean = adagrpo.mean_percent(np.array(values), np.array(mask).astype(bool))
    assert mean == pytest.approx(expected, nan_ok=True)


def test_simulated_clicks_and_dwell_by_hand():
    """Appeals 1 - 0.1, 0.5 + 0.4 and -1 + 0.4.

    P(click) = 1 / (1 + exp(-10 (appeal - 0.9))); a click is worth 60 s times appeal.
    """
    truth = Truth(
        embedding=np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
        quality=np.array([-0.1, 0.4, 0.4]),
        test_taste=np.array([[1.0, 0.5]]),
    )
    items = np.array([[0, 1, 2, -1]])
    clicks, dwell = toy_data.simulated_clicks_and_dwell(truth, items)
    rare = 1 / (1 + math.exp(15))
    assert clicks == pytest.approx(np.array([[0.5, 0.5, rare, 0]]))
    assert dwell == pytest.approx(np.array([[0.5 * 60 * 0.9, 0.5 * 60 * 0.9, 0, 0]]))


# ------------------------------------------------------------------------------ devices


class OnlyMeta(TorchDispatchMode):
    """Fails at the first operation that has a tensor on the CPU and one on meta.

    Some operations of the meta device take indices from the CPU without a word; a GPU
    would not. Copies are the way from one device to another, and plain numbers (tensors
    without a dimension) may come from anywhere.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        ]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim > 0}
        is_copy = "copy" in str(function)
        assert is_copy or "meta" not in devices or devices == {"meta"}, str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_meta(monkeypatch):
    """Everything on the meta device, which has shapes and no numbers.

    The metrics that leave it as numpy arrays are zeros.
    """

    def cpu(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    torch.set_default_device("meta")
    try:
        with OnlyMeta():
            yield
    finally:
        torch.set_default_device(None)


def on_device(model: torch.nn.Module) -> set[str]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.device.type for tensor in tensors}


def optimizer_knows_meta() -> bool:
    """AdamW of old releases (2.4) asks for the number of its step, which meta lacks."""
    parameter = torch.nn.Parameter(torch.ones(1, device="meta"))
    parameter.grad = torch.ones(1, device="meta")
    torch.set_default_device("meta")
    try:
        torch.optim.AdamW([parameter], foreach=True).step()
    except RuntimeError:
        return False
    finally:
        torch.set_default_device(None)
    return True


trains_on_meta = pytest.mark.skipif(
    not optimizer_knows_meta(), reason="this torch cannot train on the meta device"
)


@trains_on_meta
def test_pre_training_leaves_nothing_on_the_cpu(on_meta):
    policy = adagrpo.pretrain(tiny_shop(), Config(pretrain_epochs=1))
    assert on_device(policy) == {"meta"}


@trains_on_meta
def test_the_rankers_training_leaves_nothing_on_the_cpu(on_meta):
    ranker = adagrpo.train_ranker(tiny_shop(), Config(ranker_epochs=1))
    assert on_device(ranker) == {"meta"}


@trains_on_meta
@pytest.mark.parametrize("decode", ["beam", "sample"])
@pytest.mark.parametrize("rule", list(adagrpo.RULES))
def test_post_training_leaves_nothing_on_the_cpu(on_meta, rule, decode):
    policy, ranker = tiny_models()
    config = Config(batch=15, epochs=1, group=6, decode=decode)
    rule = adagrpo.RULES[rule]
    adagrpo.post_train(policy, ranker, tiny_shop().posttrain, rule, 5.0, config)
    assert {p.grad.device.type for p in policy.parameters()} == {"meta"}


@pytest.mark.parametrize("decode", ["beam", "sample"])
def test_evaluation_leaves_nothing_on_the_cpu(on_meta, decode):
    policy, ranker = tiny_models()
    config = Config(group=6, decode=decode)
    metrics = adagrpo.evaluate(policy, ranker, tiny_shop().test, config)
    orders = adagrpo.rerank(policy, ranker, tiny_shop().test)
    assert len(metrics["hr@10"]) == len(orders["reranked"]) == 25


def test_a_tensor_left_on_the_cpu_fails_these_tests(on_meta):
    index = torch.zeros(2, dtype=torch.long, device="cpu")
    with pytest.raises(AssertionError, match="index"):
        torch.ones(3)[index]


def test_the_method_answers_on_the_device_of_its_inputs():
    """Also where another one is torch's default: a second GPU, say."""
    inputs = inputs_of_the_method(5)
    expected = all_of_the_method(*inputs)
    torch.set_default_device("meta")
    try:
        answers = all_of_the_method(*inputs)
    finally:
        torch.set_default_device(None)
    assert_close(answers, expected, equal_nan=True)


# ----------------------------------------------------------------------- the toy's data

SMALL = {
    "pretrain": 9_000,
    "posttrain": 200,
    "validation": 100,
    "test": 800,
    "feed": 40_000,
}


@pytest.fixture(scope="module")
def shop() -> Shop:
    return make_shop(0, bias=1.0, sizes=SMALL)


@pytest.fixture(scope="module")
def fair_shop() -> Shop:
    """The feed shows items by taste alone."""
    return make_shop(0, bias=0.0, sizes=SMALL)


def splits_of(shop: Shop) -> dict[str, Split]:
    return {
        "pretrain": shop.pretrain,
        "posttrain": shop.posttrain,
        "validation": shop.validation,
        "test": shop.test,
    }


def purchases_of(split: Split) -> np.ndarray:
    """(N, 9) item numbers in the order of buying."""
    return np.column_stack([split.history, split.target])


def is_niche_item(shop: Shop) -> np.ndarray:
    kinds = np.array(toy_data.CATEGORY_KIND)
    return kinds[shop.tokens[:, 0]] == "niche"


def test_ids_are_unique_and_every_level_has_tokens_of_its_own(shop):
    assert len({tuple(item) for item in shop.tokens}) == toy_data.ITEMS
    assert (shop.tokens.min(0) >= [0, 16, 24]).all()
    assert (shop.tokens.max(0) < [16, 24, 88]).all()


def test_nobody_buys_the_same_item_twice(shop):
    for split in splits_of(shop).values():
        for row in purchases_of(split):
            assert len(set(row)) == toy_data.HISTORY + 1


def test_no_slate_shows_the_same_item_twice(shop):
    in_order = np.sort(shop.shown, axis=1)
    assert (np.diff(in_order, axis=1) > 0).all()


def test_nobody_is_in_two_splits(shop):
    rows = [tuple(row) for s in splits_of(shop).values() for row in purchases_of(s)]
    rows += [tuple(row) for row in shop.feed_history]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("changed", list(SMALL))
def test_a_split_does_not_depend_on_the_sizes_of_others(changed):
    sizes = dict.fromkeys(SMALL, 20)
    one = make_shop(3, sizes=sizes)
    other = make_shop(3, sizes=sizes | {changed: 30})
    for name, split in splits_of(one).items():
        if name != changed:
            expected = purchases_of(splits_of(other)[name])
            assert np.array_equal(purchases_of(split), expected), name
    if changed != "feed":
        assert np.array_equal(one.shown, other.shown)
        assert np.array_equal(one.clicked, other.clicked)


def test_the_bias_touches_what_the_feed_shows_and_nothing_else(shop, fair_shop):
    for name, split in splits_of(shop).items():
        expected = purchases_of(splits_of(fair_shop)[name])
        assert np.array_equal(purchases_of(split), expected), name
    assert np.array_equal(shop.feed_history, fair_shop.feed_history)
    assert not np.array_equal(shop.shown, fair_shop.shown)


def test_the_seed_decides_everything():
    sizes = dict.fromkeys(SMALL, 20)
    one, same, other = [make_shop(seed, sizes=sizes) for seed in (3, 3, 4)]
    assert np.array_equal(one.clicked, same.clicked)
    assert np.array_equal(purchases_of(one.test), purchases_of(same.test))
    assert not np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": {"feed": 0}}, "feed"),
        ({"sizes": {"tests": 5}}, "tests"),
        ({"bias": -0.1}, "bias"),
        ({"bias": NAN}, "bias"),
        ({"bias": INF}, "bias"),
    ],
)
def test_a_shop_that_cannot_be_made_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_shop(0, **arguments)


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
    """Of 40,000 slates, at every place: within 5 standard errors of a binomial."""
    rng = np.random.default_rng(0)
    catalogue = toy_data.make_catalogue(rng)
    quality, _ = toy_data.make_qualities(rng, catalogue)
    taste = toy_data.to_length_one(rng.normal(size=(40_000, toy_data.TASTE_DIM)))
    shown, clicked = toy_data.show_feed(rng, 1.0, taste, catalogue, quality)
    for place in range(toy_data.SLATE):
        items = shown[:, place]
        appeal = (taste * catalogue.embedding[items]).sum(1) + quality[items]
        p = 1 / (1 + np.exp(-10 * (appeal - 0.9))) / math.sqrt(place + 1)
        error = math.sqrt((p * (1 - p)).sum()) / 40_000
        assert clicked[:, place].mean() == pytest.approx(p.mean(), abs=5 * error)


def test_only_trend_items_change_with_the_season():
    """Correlation 0.5 and the same spread, within 5 standard errors over many draws."""
    rng = np.random.default_rng(0)
    catalogue = toy_data.make_catalogue(rng)
    draws = [toy_data.make_qualities(rng, catalogue) for _ in range(20)]
    old = np.stack([last for last, _ in draws])
    new = np.stack([this for _, this in draws])
    is_trend = catalogue.kind == "trend"
    assert (old[:, ~is_trend] == new[:, ~is_trend]).all()

    old = old[:, is_trend].ravel()
    new = new[:, is_trend].ravel()
    assert np.corrcoef(old, new)[0, 1] == pytest.approx(
        0.5, abs=5 / math.sqrt(len(old))
    )
    assert new.std() == pytest.approx(0.19, rel=5 / math.sqrt(2 * len(old)))
    assert old.std() == pytest.approx(0.19, rel=5 / math.sqrt(2 * len(old)))


def share_in_order(purchases: np.ndarray) -> float:
    """Share of pairs of purchases of which the later one has the higher item number."""
    pairs = itertools.combinations(range(purchases.shape[1]), 2)
    return np.mean([(purchases[:, i] < purchases[:, j]).mean() for i, j in pairs])


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [(TREND, 0.4, 0.6), (SERIES, 0.7, 0.95), (NICHE, 0.4, 0.6)],
)
def test_only_series_shoppers_buy_in_order_and_they_almost(shop, kind, low, high):
    is_kind = shop.pretrain.kind == kind
    assert low < share_in_order(purchases_of(shop.pretrain)[is_kind]) < high


def test_without_order_noise_the_series_is_strictly_in_order(monkeypatch):
    monkeypatch.setattr(toy_data, "ORDER_NOISE", 0.0)
    strict = make_shop(0, sizes=dict.fromkeys(SMALL, 300))
    is_series = strict.test.kind == SERIES
    assert share_in_order(purchases_of(strict.test)[is_series]) == 1


def test_the_feed_shows_a_tenth_of_the_niche(shop, fair_shop):
    """Of 192 items: a tenth within 3.5 standard errors. Without bias, all of them."""
    shown = np.bincount(shop.shown.ravel(), minlength=toy_data.ITEMS)
    fairly = np.bincount(fair_shop.shown.ravel(), minlength=toy_data.ITEMS)
    niche = is_niche_item(shop)
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


def percent_by_kind(metrics: dict, name: str, split: Split) -> list[float]:
    """Of trend, series and niche shoppers."""
    return [
        adagrpo.mean_percent(metrics[name], split.kind == kind) for kind in range(3)
    ]


@pytest.fixture(scope="module")
def premise(shop, policy, ranker) -> dict[str, list[float]]:
    metrics = adagrpo.evaluate(policy, ranker, shop.test, Config())
    return {name: percent_by_kind(metrics, name, shop.test) for name in metrics}


@pytest.fixture(scope="module")
def fair_premise(fair_shop, policy) -> dict[str, list[float]]:
    """The same policy with a ranker that learned from an unbiased feed."""
    fair_ranker = adagrpo.train_ranker(fair_shop, Config())
    metrics = adagrpo.evaluate(policy, fair_ranker, fair_shop.test, Config())
    return {name: percent_by_kind(metrics, name, fair_shop.test) for name in metrics}


def test_trend_shoppers_are_hard_and_clear(premise):
    assert premise["hard"][TREND] > 80
    assert premise["clear"][TREND] > 45
    assert premise["auc in group"][TREND] > 54


def test_series_shoppers_are_easy(premise):
    assert premise["hard"][SERIES] < 35


def test_niche_shoppers_are_not_clear(premise):
    assert premise["clear"][NICHE] < 25
    assert premise["auc"][NICHE] < 45
    assert abs(premise["auc in group"][NICHE] - 50) < 10  # no better than a guess


def test_the_gate_admits_mostly_trend_shoppers(premise):
    assert premise["admit"][TREND] > 3 * premise["admit"][SERIES]
    assert premise["admit"][TREND] > 3 * premise["admit"][NICHE]


def test_without_bias_the_niche_is_ranked_as_well_as_trend(premise, fair_premise):
    assert premise["auc"][TREND] - premise["auc"][NICHE] > 40
    assert abs(fair_premise["auc"][TREND] - fair_premise["auc"][NICHE]) < 10
    assert fair_premise["clear"][NICHE] > premise["clear"][NICHE] + 12


def test_without_order_the_series_is_no_longer_easy(shop, premise):
    """A policy for series shoppers alone, with twice the passes: the same purchases in
    another order stay hard for it.
    """
    rng = np.random.default_rng(0)

    def shuffled_series(split: Split) -> Split:
        is_series = split.kind == SERIES
        bought = rng.permuted(purchases_of(split)[is_series], axis=1)
        return Split(bought[:, :-1], bought[:, -1], split.kind[is_series])

    mixed = replace(
        shop,
        pretrain=shuffled_series(shop.pretrain),
        test=shuffled_series(shop.test),
    )
    config = Config(pretrain_epochs=2 * Config().pretrain_epochs)
    policy = adagrpo.pretrain(mixed, config)
    metrics = adagrpo.evaluate(policy, Ranker(toy_data.ITEMS), mixed.test, config)
    assert 100 * metrics["hard"].mean() > premise["hard"][SERIES] + 15


def test_the_ranker_pushes_the_few_niche_items_that_the_feed_shows(shop, ranker):
    """To niche shoppers, over the hidden ones, though they buy mostly these."""
    niche = is_niche_item(shop)
    shown = np.bincount(shop.shown.ravel(), minlength=toy_data.ITEMS) >= 20
    is_niche_user = shop.test.kind == NICHE
    history = torch.as_tensor(shop.test.history[is_niche_user])
    every = torch.arange(toy_data.ITEMS).expand(len(history), -1)
    with torch.no_grad():
        score = ranker.click_probability(history, every).mean(0).numpy()
    assert score[niche & shown].mean() > 10 * score[niche & ~shown].mean()

    targets = shop.test.target[is_niche_user]
    targets = targets[niche[targets]]
    assert shown[targets].mean() < 0.25


# ---------------------------------------------------------------------------- own data


def arrays_of(shop: Shop) -> dict[str, np.ndarray]:
    """As load_shop wants them."""
    arrays = {
        "tokens": shop.tokens,
        "kinds": np.array(shop.kinds),
        "feed_history": shop.feed_history,
        "shown": shop.shown,
        "clicked": shop.clicked,
    }
    for name, split in splits_of(shop).items():
        arrays[f"{name}_history"] = split.history
        arrays[f"{name}_target"] = split.target
        arrays[f"{name}_kind"] = split.kind
    return arrays


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def assert_same_shop(one: Shop, other: Shop) -> None:
    assert one.kinds == other.kinds
    for name in ("tokens", "feed_history", "shown", "clicked"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name, split in splits_of(one).items():
        twin = splits_of(other)[name]
        assert np.array_equal(purchases_of(split), purchases_of(twin)), name
        assert np.array_equal(split.kind, twin.kind), name


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_own_data_is_read_as_it_was_written(tmp_path, dtype):
    arrays = arrays_of(tiny_shop())
    for name in arrays.keys() - {"kinds"}:  # also `clicked`, as 0 and 1
        arrays[name] = arrays[name].astype(dtype)
    read = load_shop(save_arrays(tmp_path / "log.npz", arrays))
    assert_same_shop(read, tiny_shop())
    assert read.clicked.dtype == bool
    assert read.truth is None


def test_kinds_are_optional(tmp_path):
    arrays = arrays_of(tiny_shop())
    arrays = {name: a for name, a in arrays.items() if "kind" not in name}
    shop = load_shop(save_arrays(tmp_path / "log.npz", arrays))
    assert shop.kinds == ()
    assert list(adagrpo.by_kind(shop.test, shop.kinds)) == ["all"]


def bad_arrays() -> list:
    """Name of an array, what stands in its place (None: nothing), and what is said."""
    good = arrays_of(tiny_shop())
    required = [name for name in good if "kind" not in name]
    cases = [(name, None, "missing") for name in required]
    for name in [*required, "test_kind"]:
        wrong = good[name][..., None]
        cases.append((name, wrong, "axes"))
        cases.append((name, good[name][:0], "empty"))
        cases.append((name, good[name].astype(str), "whole numbers"))
        cases.append((name, good[name] + 0.5, "whole numbers"))
        cases.append((name, np.full(good[name].shape, NAN), "NaN"))
        negative = good[name].astype(int)
        negative.flat[-1] = -1
        cases.append((name, negative, "-1"))
        if name != "tokens":
            too_high = good[name].astype(int)
            too_high.flat[0] = 12
            cases.append((name, too_high, "12"))
    # Shorter or narrower than the array that it belongs to.
    cases.append(("posttrain_target", good["posttrain_target"][1:], "_history"))
    cases.append(("test_kind", good["test_kind"][1:], "test_target"))
    cases.append(("feed_history", good["feed_history"][1:], "shown"))
    cases.append(("clicked", good["clicked"][1:], "shown"))
    cases.append(("clicked", good["clicked"][:, 1:], "shown"))
    cases.append(("validation_history", good["validation_history"][:, 1:], "pretrain"))
    cases.append(("tokens", np.concatenate([good["tokens"][:11]] * 2)[:12], "same"))
    cases.append(("tokens", good["tokens"] + 2**40, "too long"))
    return cases


@pytest.mark.parametrize(("name", "array", "said"), bad_arrays())
def test_a_bad_array_is_refused_by_name(tmp_path, name, array, said):
    arrays = arrays_of(tiny_shop())
    del arrays[name]
    if array is not None:
        arrays[name] = array
    path = save_arrays(tmp_path / "log.npz", arrays)
    with pytest.raises(ValueError) as error:
        load_shop(path)
    assert name in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def bytes_of(save, *arguments, **arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arguments, **arrays)
    return buffer.getvalue()


def damaged_file() -> bytes:
    """An .npz with some bytes in the middle of its first array turned over."""
    content = bytearray(bytes_of(np.savez_compressed, **arrays_of(tiny_shop())))
    for place in range(64, 96):
        content[place] ^= 0xFF
    return bytes(content)


BAD_FILES = {
    "empty": b"",
    "text": b"user,item,rating\n1,2,3\n",
    "one array": bytes_of(np.save, np.arange(4)),
    "truncated": bytes_of(np.savez, **arrays_of(tiny_shop()))[:2000],
    "damaged": damaged_file(),
    "pickled": pickle.dumps([1, 2, 3]),
    "with objects": bytes_of(np.savez, tokens=np.array([None, "a"], dtype=object)),
    "another npz": bytes_of(np.savez, a=np.arange(3)),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_no_npz_ends_the_program_with_one_line(tmp_path, content):
    path = tmp_path / "log.npz"
    path.write_bytes(content)
    assert_ends_with_one_line(path)


def test_a_folder_or_a_missing_file_ends_the_program_with_one_line(tmp_path):
    assert_ends_with_one_line(tmp_path)
    assert_ends_with_one_line(tmp_path / "nothing.npz")


def test_a_bad_array_ends_the_program_with_one_line(tmp_path):
    arrays = arrays_of(tiny_shop())
    del arrays["shown"]
    said = assert_ends_with_one_line(save_arrays(tmp_path / "log.npz", arrays))
    assert "shown" in said


def assert_ends_with_one_line(path: Path) -> str:
    """A text as exit code is printed to stderr, and the status is 1."""
    with pytest.raises(SystemExit) as end:
        adagrpo.main(["--data", str(path), "--jobs", "1"])
    assert isinstance(end.value.code, str)
    assert "--data" in end.value.code
    assert "\n" not in end.value.code
    return end.value.code


def test_own_data_goes_through_the_whole_program(tmp_path, capsys):
    path = save_arrays(tmp_path / "log.npz", arrays_of(tiny_shop()))
    adagrpo.main(
        [
            "--data",
            str(path),
            "--jobs",
            "1",
            "--epochs",
            "1",
            "--arms",
            "nll",
            "adagrpo",
        ]
    )
    printed = capsys.readouterr().out
    assert "head" in printed and "tail" in printed
    assert "trend" not in printed
    assert "25 test users" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100


# ------------------------------------------------------------------- tables and options


def shares(ones: int, size: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [ones, size - ones])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # 3 * sqrt(0.24 / 1000 + 0.25 / 1000) = 0.066
        (shares(600, 1000), shares(500, 1000), True),
        (shares(560, 1000), shares(500, 1000), False),
        (shares(500, 1000), shares(600, 1000), False),
        # 0.0067 for 100,000 users: what decides is the least difference that matters
        (shares(55_000, 100_000), shares(50_000, 100_000), True),
        (shares(51_500, 100_000), shares(50_000, 100_000), False),
        # 3 * sqrt(0.25 / 20 + 0.25 / 20) = 0.47
        (shares(14, 20), shares(10, 20), False),
        (shares(20, 20), shares(10, 20), True),
    ],
)
def test_clearly_higher_by_hand(a, b, expected):
    assert adagrpo.is_clearly_higher(a, b) is expected


def known_metrics(auc: np.ndarray) -> dict[str, np.ndarray]:
    """Of 200 users; quantiles of 0, 1, ..., 199 are easy to say."""
    yes = np.ones(200, dtype=bool)
    ramp = np.arange(200.0)
    metrics = {"auc": auc, "auc in group": auc, "hard": yes, "clear": yes, "admit": yes}
    return metrics | {"difficulty": ramp / 199, "discriminability": ramp / 199 - 0.5}


@pytest.mark.parametrize(("trained", "warns"), [(190, True), (110, False)])
def test_a_leak_is_said_aloud(monkeypatch, capsys, trained, warns):
    """AUC 0.95 or 0.55 on post-training users, 0.5 on validation users."""
    users = Split(np.zeros((200, 3), int), np.zeros(200, int), np.zeros(200, int))
    shop = replace(tiny_shop(), posttrain=users, validation=replace(users))

    def known(policy, ranker, split, *rest, **named):
        ones = 100
        if len(seen) == 1:
            ones = trained
        seen.append(split)
        return known_metrics(shares(ones, 200))

    seen = []
    monkeypatch.setattr(adagrpo, "evaluate", known)
    orders = {"hr@10": np.zeros(200), "reranked": np.ones(200)}
    monkeypatch.setattr(adagrpo, "rerank", lambda *rest, **named: orders)
    adagrpo.print_premise(shop, None, None, Config())
    printed = capsys.readouterr().out
    assert ("WARNING" in printed) is warns
    assert f"{trained / 2:.1f}" in printed


def test_quantiles_are_printed(capsys):
    metrics = known_metrics(shares(100, 200))
    metrics["discriminability"][:100] = NAN
    adagrpo.print_quantiles(metrics)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["10%"] == ["25%", "50%", "75%", "90%"]
    assert rows["difficulty"] == ["0.100", "0.250", "0.500", "0.750", "0.900"]
    # From 100 / 199 - 0.5 = 0.0025 up to 0.5
    assert rows["discriminability"] == ["0.052", "0.127", "0.251", "0.376", "0.450"]


@pytest.mark.filterwarnings("error")
def test_quantiles_of_nothing_are_no_error(capsys):
    nothing = np.full(3, NAN)
    adagrpo.print_quantiles({"difficulty": nothing, "discriminability": nothing})


def test_results_are_levels_and_points_against_the_first_arm(capsys):
    """HR@10 of 25 users: 20% for nll, 40% for adagrpo."""
    shop = tiny_shop()
    yes = np.ones(25, dtype=bool)
    before = {"hard": yes, "clear": ~yes}
    names = ["hr@10", "hr@5", "hr@20", "ndcg@10", "hallucination", "validation hr@10"]
    results = {
        "nll": dict.fromkeys(names, shares(5, 25)),
        "adagrpo": dict.fromkeys(names, shares(10, 25)),
    }
    before |= dict.fromkeys(names, shares(0, 25))
    adagrpo.print_results(shop, before, results)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("nll", "adagrpo"))]
    assert rows[0] == ["nll", *["20.00"] * 6]
    assert rows[1] == ["adagrpo", *["40.00"] * 6]
    # Everybody, two kinds, four cells: all users are hard and not clear.
    assert rows[2][:2] == ["nll", "20.0"]
    assert rows[2][4:] == ["nan", "20.0", "nan", "nan"]
    assert rows[3][:2] == ["adagrpo", "+20.0"]
    assert rows[3][4:] == ["+nan", "+20.0", "+nan", "+nan"]


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("nll", ("nll", 5.0)),
        ("mix-0.3", ("mix", 0.3)),
        ("adagrpo-15", ("adagrpo", 15.0)),
    ],
)
def test_an_arm_is_a_rule_and_a_weight(arm, expected):
    assert adagrpo.parse_arm(arm, Config(weight=5.0)) == expected


BAD_SETTINGS = [
    ("--arms", "magic"),
    ("--arms", "mix-"),
    ("--arms", "mix--1"),
    ("--arms", "mix-nan"),
    ("--arms", "mix-much"),
    ("--seed", "-1"),
    ("--jobs", "0"),
    ("--device", "abacus"),
    ("--bias", "nan"),
    ("--negatives", "-1"),
    ("--pretrain-epochs", "0"),
    ("--ranker-epochs", "1.5"),
    ("--epochs", "0"),
    ("--users", "0"),
    ("--batch", "0"),
    ("--group", "1"),
    ("--decode", "greedy"),
    ("--weight", "inf"),
    ("--lr", "-0.001"),
    ("--lr", "nan"),
    ("--min-difficulty", "1.1"),
    ("--min-discriminability", "nan"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
@pytest.mark.parametrize("program", [adagrpo, study], ids=["adagrpo", "study"])
def test_a_bad_setting_ends_before_any_work(
    monkeypatch, capsys, tmp_path, program, name, value
):
    monkeypatch.setattr(program, "make_shop", None)  # work would fail
    monkeypatch.setattr(program, "ProcessPoolExecutor", None)
    command = [name, value]
    if program is study:
        command += ["--seeds", "0", "--out", str(tmp_path / "runs.json")]
    with pytest.raises(SystemExit) as end:
        program.main(command)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert f"argument {name}:" in said
    assert value in said


def test_a_quick_toy_shop_and_own_data_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        adagrpo.main(["--quick", "--data", "log.npz"])
    assert "argument --quick:" in capsys.readouterr().err


def test_every_setting_has_an_option():
    config, _ = adagrpo.command_line([])
    assert config == Config()
    changed, options = adagrpo.command_line(
        ["--arms", "nll", "--jobs", "1", "--device", "cpu"]
        + ["--data", "log.npz", "--seed", "1", "--bias", "0.5", "--negatives", "3"]
        + ["--ranker-epochs", "5", "--pretrain-epochs", "6", "--users", "7"]
        + ["--epochs", "8", "--batch", "9", "--lr", "0.1", "--group", "11"]
        + ["--decode", "sample", "--weight", "12", "--min-difficulty", "0.13"]
        + ["--min-discriminability", "0.14"]
    )
    for name, value in vars(config).items():
        assert vars(changed)[name] != value, name
    assert options.arms == ["nll"]
    assert options.jobs == 1
    assert options.data == "log.npz"


# ---------------------------------------------------------------- programs as processes

STUDY = ".github/study.py"
SHORT = ["--quick", "--pretrain-epochs", "1", "--ranker-epochs", "1", "--epochs", "1"]


def start(*command, **environment: str) -> subprocess.Popen:
    """Start Python in a process group of its own, with output as in a fresh shell."""
    inherited = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("PYTHONUNBUFFERED", "PYTHONIOENCODING"):
        inherited.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """Whatever a test started ends with it, also if the test fails."""
    yield
    for process in STARTED:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it is gone, as it should be
            pass
        process.wait()
    STARTED.clear()


def output_of(process: subprocess.Popen, code: int = 0) -> str:
    """What it printed. It must end with this status, and quietly if that is 0."""
    printed, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    if code == 0:
        assert said == ""
    else:
        assert "Traceback" not in said
    return printed + said


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What a short run prints in one process, under all that is strict, and in two."""
    command = ["adagrpo.py", *SHORT, "--pretrain-epochs", "2"]
    command += ["--arms", "nll", "adagrpo"]
    strict = ["-OO", "-bb", "-W", "error"]
    one = start(*strict, *command, "--jobs", "1", PYTHONIOENCODING="ascii")
    two = start(*command, "--jobs", "2")
    return {"one": output_of(one), "two": output_of(two)}


def figures_in(text: str) -> list[str]:
    """All lines; those of the training sorted, and without their speed."""
    head, training, tail = re.split(
        r"^(?=arm +step)|^(?=Results)", text, flags=re.MULTILINE
    )
    lines = [line.rsplit(maxsplit=1)[0] for line in training.splitlines() if line]
    return [head, *sorted(lines), tail]


def test_one_and_two_processes_print_the_same_figures(printed):
    assert figures_in(printed["one"]) == figures_in(printed["two"])


def test_every_arm_trains_and_is_listed(printed):
    for arm in ("nll", "adagrpo"):
        lines = [line for line in printed["one"].splitlines() if line.startswith(arm)]
        assert len(lines) == 3  # in training and in both tables


@pytest.mark.parametrize("jobs", ["one", "two"])
def test_the_output_is_ascii_of_at_most_100_columns(printed, jobs):
    assert printed[jobs].isascii()
    assert max(len(line) for line in printed[jobs].splitlines()) <= 100


def test_a_quick_run_says_that_its_figures_mean_nothing(printed):
    assert "mean nothing" in printed["one"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_reader_who_has_seen_enough_is_no_error(tmp_path, jobs):
    """As in `python adagrpo.py | head -3`, with a small file for the sake of speed."""
    file = save_arrays(tmp_path / "log.npz", arrays_of(tiny_shop()))
    process = start("adagrpo.py", "--data", file, "--jobs", jobs)
    lines = [process.stdout.readline() for _ in range(3)]
    process.stdout.close()
    assert any(lines)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_training_lines_come_as_they_are_printed(tmp_path):
    """Also into a pipe: the first is there long before the training ends."""
    file = save_arrays(tmp_path / "log.npz", arrays_of(tiny_shop()))
    command = ["adagrpo.py", "--data", file, "--epochs", "1000", "--arms", "nll"]
    process = start(*command, "--jobs", "1")
    line = "-"
    while line and not line.startswith("nll"):
        line = process.stdout.readline()
    process.kill()
    assert line.split()[:2] == ["nll", "100"]
    assert "Results" not in process.stdout.read()


@pytest.mark.parametrize("name", ["study", "evidence", "movielens"])
def test_programs_need_no_docstrings(name):
    """python -OO takes them away."""
    assert "usage:" in output_of(start("-OO", f".github/{name}.py", "--help"))


class Process(SimpleNamespace):
    """A process that lives: its number `pid`, and the CPU seconds that it `used`."""


def living(group: int) -> list[Process]:
    """The processes of a process group, by /proc. Those that only wait to be buried
    (zombies) are dead.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
        except OSError:  # it has just ended
            continue
        fields = status.rpartition(")")[2].split()
        if int(fields[2]) == group and fields[0] not in "ZX":
            ticks = int(fields[11]) + int(fields[12])
            used = ticks / os.sysconf("SC_CLK_TCK")
            found.append(Process(pid=int(folder.name), used=used))
    return found


def two_workers(process: subprocess.Popen) -> list[Process]:
    """Those of its processes that have worked most."""
    others = [p for p in living(process.pid) if p.pid != process.pid]
    return sorted(others, key=lambda p: p.used)[-2:]


def wait_until_busy(process: subprocess.Popen) -> None:
    """Until two workers are past their imports.

    They have used more CPU than their parent then, which only waits.
    """
    for _ in range(600):
        parent = [p.used for p in living(process.pid) if p.pid == process.pid]
        workers = [p.used for p in two_workers(process)]
        if parent and len(workers) == 2 and min(workers) > 1.2 * parent[0] + 0.2:
            return
        time.sleep(0.1)
    raise TimeoutError(process.args)


def seconds_until_all_are_gone(process: subprocess.Popen) -> float:
    """At least 20 if something is still there."""
    started = time.monotonic()
    while living(process.pid) and time.monotonic() - started < 20:
        time.sleep(0.02)
    seconds = time.monotonic() - started
    process.poll()  # for its status
    return seconds


def record(seed: int, arm: str, level: float, hallucination=0.0, **settings) -> dict:
    """As the study saves it."""
    figures = {"all": {"hr@10": level, "hallucination": hallucination}}
    figures["validation"] = {"hr@10": level}
    settings = evidence.DEFAULTS | settings
    return {"seed": seed, "arm": arm, "settings": settings, "figures": figures}


def write_records(path: Path, *records: dict) -> Path:
    path.write_text(json.dumps(records))
    return path


has_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks into /proc"
)


@pytest.fixture
def program(request, tmp_path) -> tuple[subprocess.Popen, Path]:
    """A program that would work for minutes in two processes, and a results file.

    Both are busy with pre-training; "post-training" is adagrpo, with arms to come.
    """
    file = write_records(tmp_path / "runs.json", record(0, "nll", 30))
    long = ["--quick", "--pretrain-epochs", "1000", "--ranker-epochs", "1000"]
    if request.param == "post-training":
        data = save_arrays(tmp_path / "log.npz", arrays_of(tiny_shop()))
        process = start("adagrpo.py", "--data", data, "--epochs", "1000", "--jobs", "2")
        while not process.stdout.readline().startswith("nll"):
            assert process.poll() is None
    elif request.param == "adagrpo":
        process = start("adagrpo.py", *long, "--jobs", "2")
        wait_until_busy(process)
    else:
        command = [STUDY, *long, "--jobs", "2", "--seeds", "1", "2", "3", "--out", file]
        process = start(*command)
        wait_until_busy(process)
    return process, file


@has_proc
@pytest.mark.parametrize(
    ("program", "stop", "status"),
    [
        ("adagrpo", "Ctrl-C", 130),
        ("post-training", "interrupt", 130),
        ("adagrpo", "kill", -signal.SIGTERM),
        ("study", "Ctrl-C", 130),
        ("study", "interrupt", 130),
        ("study", "kill", -signal.SIGTERM),
    ],
    indirect=["program"],
)
def test_a_stopped_program_ends_with_all_its_processes(program, stop, status):
    """Ctrl-C in a terminal goes to the whole process group, the others to the parent.

    The limit leaves room for a busy machine; a worker that is left behind would stay
    for minutes.
    """
    process, file = program
    kept = file.read_bytes()
    if stop == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif stop == "interrupt":
        os.kill(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    assert seconds_until_all_are_gone(process) < 5
    assert process.returncode == status
    assert "Traceback" not in process.stderr.read()
    assert file.read_bytes() == kept


@has_proc
@pytest.mark.parametrize("program", ["adagrpo", "study"], indirect=True)
def test_a_killed_worker_ends_the_program_with_a_line(program):
    """As by a system that has no memory left."""
    process, file = program
    kept = file.read_bytes()
    first = min(two_workers(process), key=lambda worker: worker.pid)
    os.kill(first.pid, signal.SIGKILL)
    assert seconds_until_all_are_gone(process) < 10
    assert process.returncode == 1
    said = process.stderr.read()
    assert "Traceback" not in said
    assert "process" in said
    assert file.read_bytes() == kept


# ---------------------------------------------------------------------------- the study


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("spread", [True, False, False, False]),
        ("level", [True, False, True, False]),
        ("oracle", [True, False, True, False]),
        ("centred", [True, True, True, True]),
        ("adagrpo", [True, False, False, False]),
    ],
)
def test_rules_of_the_study_by_hand(rule, expected):
    """Four samples: hard, hard and flat, hard and flat, easy. Rewards 0 and 1 spread by
    0.5; r(y) is 0.5, 0.05, 0.5, 0.5; the first and the third are trend shoppers.
    """
    shop = tiny_shop()
    history = np.arange(12).reshape(4, 3)
    users = Split(history, np.zeros(4, int), np.array([TREND, NICHE, TREND, SERIES]))
    shop = replace(shop, kinds=KINDS, posttrain=users)
    hard = torch.tensor([True, True, True, False])
    admit = torch.tensor([True, False, False, False])
    scored = SimpleNamespace(
        history=torch.as_tensor(history),
        rewards=torch.tensor([[0.0, 1.0], [0.2, 0.2], [0.3, 0.39], [0.0, 1.0]]),
        target_reward=torch.tensor([0.5, 0.05, 0.5, 0.5]),
        gate=Gate(admit, hard, admit, None, None),
    )
    assert study.rule_of(rule, shop)(scored).tolist() == expected


def test_the_random_rule_takes_as_many_as_the_gate_and_others():
    admit = torch.arange(1000) < 300
    scored = SimpleNamespace(gate=Gate(admit, admit, admit, None, None))
    shop = replace(tiny_shop(), kinds=KINDS)
    torch.manual_seed(0)
    taken = study.rule_of("random", shop)(scored)
    assert taken.sum() == 300
    # A third of them by chance: 90 of 300, within 5 standard deviations of 7.
    assert 55 < (taken & admit).sum() < 125


def test_a_tally_counts_by_hand():
    """Of four samples three are admitted; one group lacks its target, in two a negative
    outscores it.
    """
    admit = torch.tensor([True, True, True, False])
    scored = SimpleNamespace(
        hit=torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]]).bool(),
        rewards=torch.tensor([[0.5, 0.6], [0.1, 0.5], [0.6, 0.1], [0.9, 0.9]]),
        target_reward=torch.tensor([0.5, 0.5, 0.5, 0.5]),
    )
    tally = study.Tally(lambda scored: admit)
    assert torch.equal(tally(scored), admit)
    expected = {"admitted": 75, "absent": 100 / 3, "outscored": 200 / 3}
    assert tally.figures() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("nll", ("nll", 5.0, 3)),
        ("nll@6", ("nll", 5.0, 6)),
        ("spread-2.3", ("spread", 2.3, 3)),
        ("mix-1@2", ("mix", 1.0, 2)),
    ],
)
def test_an_arm_of_the_study_also_has_passes(arm, expected):
    assert study.parse_arm(arm, Config(weight=5.0, epochs=3)) == expected


@pytest.fixture(scope="module")
def real_study(tmp_path_factory) -> tuple[list, Path]:
    """Three arms of one seed, run for real."""
    file = tmp_path_factory.mktemp("study") / "new" / "runs.json"
    command = [STUDY, *SHORT, "--seeds", "0", "--jobs", "1", "--out", file]
    command += ["--arms", "before", "nll", "adagrpo"]
    output_of(start(*command))
    return command, file


def test_a_record_holds_figures_by_kind_and_cell(real_study):
    _, file = real_study
    records = json.loads(file.read_text())
    assert [r["arm"] for r in records] == ["before", "nll", "adagrpo"]
    before, _, ours = records
    everywhere = {"all", *KINDS, "validation"}
    assert everywhere | {"training"} < ours["figures"].keys()
    assert {"premise all", "premise niche"} < before["figures"].keys()
    assert before["settings"]["epochs"] == 1
    assert "seed" not in before["settings"]
    assert not list(file.parent.glob("*.draft"))


def test_finished_arms_are_not_run_again(real_study):
    """A changed figure would not survive a second training of its arm."""
    command, file = real_study
    records = json.loads(file.read_text())
    records[1]["figures"]["all"]["hr@10"] = -1.0
    file.write_text(json.dumps(records))
    assert output_of(start(*command)) == ""
    assert json.loads(file.read_text()) == records


@pytest.fixture
def fake_study(monkeypatch):
    """The study in this process. Its runs take no time; returns what was to be run."""
    ran = []

    def run_seed(config, is_quick, arms, out):
        for arm in arms:
            ran.append((config.seed, arm))
            settings = study.settings_of(config, is_quick)
            study.save(out, record(config.seed, arm, 1.0) | {"settings": settings})

    monkeypatch.setattr(study, "run_seed", run_seed)
    monkeypatch.setattr(study, "ProcessPoolExecutor", ThreadPoolExecutor)
    return ran


def study_main(file: Path, *options: str) -> int:
    return study.main(["--jobs", "1", "--out", str(file), *options])


def test_the_study_runs_what_is_missing(fake_study, tmp_path):
    file = tmp_path / "runs.json"
    assert study_main(file, "--seeds", "1", "--arms", "nll", "mix-1") == 0
    fake_study.clear()
    study_main(file, "--seeds", "1", "2", "--arms", "nll", "mix-1", "adagrpo")
    assert fake_study == [(1, "adagrpo"), (2, "nll"), (2, "mix-1"), (2, "adagrpo")]


@pytest.mark.parametrize(
    "other",
    [["--weight", "4"], ["--quick"], ["--decode", "sample"], ["--epochs", "2"]],
    ids=" ".join,
)
def test_other_settings_are_other_runs_and_keep_the_first(fake_study, tmp_path, other):
    file = tmp_path / "runs.json"
    study_main(file, "--seeds", "1", "--arms", "nll")
    first = json.loads(file.read_text())
    study_main(file, "--seeds", "1", "--arms", "nll", *other)
    assert fake_study == [(1, "nll"), (1, "nll")]
    records = json.loads(file.read_text())
    assert records[:1] == first
    assert records[1]["settings"] != records[0]["settings"]


def test_the_study_writes_through_a_link(fake_study, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    study_main(link, "--seeds", "1", "--arms", "nll")
    assert link.is_symlink()
    assert len(json.loads((tmp_path / "real.json").read_text())) == 1


@pytest.mark.parametrize(
    "content",
    ['[{"seed": 1, "arm"', "{}", '[{"a": 1}]', "[1, 2]", "step,loss\n1,2\n", "\xff"],
)
def test_a_file_that_is_not_the_studys_is_refused_unchanged(
    fake_study, tmp_path, capsys, content
):
    file = tmp_path / "runs.json"
    file.write_text(content, encoding="latin-1")
    before = file.read_bytes()
    assert_out_is_refused(file, capsys)
    assert file.read_bytes() == before
    assert fake_study == []


@pytest.mark.parametrize("path", ["folder", "/dev/null", "file/runs.json"])
def test_what_can_hold_no_results_is_refused(
    fake_study, monkeypatch, tmp_path, capsys, path
):
    monkeypatch.setattr(study, "save", None)  # it could replace the device
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert_out_is_refused(tmp_path / path, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def assert_out_is_refused(path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        study_main(path, "--seeds", "1")
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "argument --out:" in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "--data", "log.npz"], "--data"),
        (["--seeds", "1", "--arms", "mix-1@0"], "--arms"),
        (["--seeds", "1", "--jobs", "-2"], "--jobs"),
    ],
)
def test_options_of_the_study_are_refused_by_name(
    fake_study, tmp_path, capsys, options, name
):
    with pytest.raises(SystemExit):
        study.main(["--out", str(tmp_path / "runs.json"), *options])
    assert f"argument {name}:" in capsys.readouterr().err
    assert fake_study == []


DRIVER = """
import sys, time
sys.path.insert(0, {folder!r})
import study

def run_seed(config, is_quick, arms, out):
    out.with_name(f"started-{{config.seed}}").touch()
    while len(list(out.parent.glob("started-*"))) < 2:
        time.sleep(0.01)
    for arm in arms:
        if (config.seed, arm) == (1, "mix-1"):
            raise MemoryError("of this machine")
        study.save(out, {{"seed": config.seed, "arm": arm, "settings": {{}}}})

if __name__ == "__main__":
    study.run_seed = run_seed
    sys.exit(study.main())
"""


@pytest.fixture
def driver(tmp_path) -> Path:
    """The study with runs that take no time.

    They begin when two seeds have started. The second arm of seed 1 fails.
    """
    path = tmp_path / "driver.py"
    path.write_text(DRIVER.format(folder=str(HERE / ".github")))
    return path


def test_an_arm_that_fails_is_named_and_the_others_are_kept(driver, tmp_path):
    file = tmp_path / "runs.json"
    command = [driver, "--seeds", "1", "2", "--arms", "nll", "mix-1", "--out", file]
    said = output_of(start(*command, "--jobs", "2"), code=1)
    assert "seed 1" in said
    assert "MemoryError: of this machine" in said
    assert "seed 2" not in said
    kept = {(r["seed"], r["arm"]) for r in json.loads(file.read_text())}
    assert kept == {(1, "nll"), (2, "nll"), (2, "mix-1")}


def test_two_studies_at_once_lose_nothing(driver, tmp_path):
    """Twice 60 records, saved one by one."""
    file = tmp_path / "runs.json"
    weights = [f"mix-{weight}" for weight in range(2, 62)]
    command = [driver, "--arms", *weights, "--out", file, "--jobs", "1", "--seeds"]
    both = [start(*command, seed) for seed in ("3", "4")]
    for process in both:
        output_of(process)
    saved = {(r["seed"], r["arm"]) for r in json.loads(file.read_text())}
    assert saved == {(seed, arm) for seed in (3, 4) for arm in weights}


# ------------------------------------------------------------------------- the evidence


def test_a_gain_is_paired_by_seed_before_its_interval_is_taken(tmp_path):
    """Gains of 1 and 3: mean 2, deviation sqrt 2, error 1, t(1) = 12.71.

    Seed 3 has no partner and does not count.
    """
    file = write_records(
        tmp_path / "runs.json",
        record(1, "nll", 10),
        record(2, "nll", 50),
        record(1, "adagrpo", 11),
        record(2, "adagrpo", 53),
        record(3, "adagrpo", 90),
    )
    main_study, variations = evidence.read([file])
    gains = main_study.gain("adagrpo")
    assert variations == []
    assert gains == [1, 3]
    assert evidence.interval(gains) == pytest.approx((2, 12.71))
    assert evidence.brackets(*evidence.interval(gains)) == "+2.00 [-10.71, +14.71]"


@pytest.mark.parametrize(
    ("test", "bound", "mean", "half", "word"),
    [
        (">", 0, 1.0, 0.5, "holds"),
        (">", 0, 0.0, 0.0, "fails"),
        (">=", 0, 0.0, 0.0, "holds"),
        (">=", 8, 7.0, 0.5, "fails"),
        (">=", 8, 8.2, 0.5, "undecided"),
        ("<", 0.22, 0.1, 0.05, "holds"),
        ("<=", 0.5, 0.8, 0.2, "fails"),
        ("tie", 0.5, 0.1, 0.2, "tie"),
        ("tie", 0.5, 0.3, 0.4, "undecided"),
        ("tie", 0.5, -0.3, 0.2, "behind"),
        ("sign", 0, -4.0, 1.0, "negative"),
        ("sign", 0, 4.0, INF, "one seed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(test, bound, mean, half, word):
    assert evidence.verdict(test, bound, mean, half) == word


def test_a_comparison_that_fails_decides_over_a_wider_one_that_does_not():
    wide = {"wide": [-9, 11], "good": [5, 5]}
    row = evidence.decide("", ">", 0, wide)
    assert (row.weakest, row.verdict) == ("wide", "undecided")
    row = evidence.decide("", ">", 0, wide | {"bad": [-1, -1.01]})
    assert (row.weakest, row.verdict) == ("bad", "fails")


def test_validation_picks_an_arm_for_every_seed(tmp_path):
    records = [record(seed, "adagrpo", 40) for seed in (1, 2)]
    records += [record(seed, "nll", 30) for seed in (1, 2)]
    records += [record(1, "mix-1", 35), record(2, "mix-1", 20)]
    main_study, _ = evidence.read([write_records(tmp_path / "runs.json", *records)])
    assert main_study.picked(("nll", "mix-1")) == {1: "mix-1", 2: "nll"}


def test_missing_arms_are_not_run_and_one_seed_is_said(tmp_path, monkeypatch, capsys):
    records = [record(1, "nll", 30), record(1, "adagrpo", 33)]
    file = write_records(tmp_path / "runs.json", *records)
    results = tmp_path / "RESULTS.md"
    command = ["evidence.py", file, "--results", results, "--pictures", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    evidence.main()
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert printed.isascii()
    assert max(len(line) for line in lines) <= 100
    assert any("over every mixture" in line and "not run" in line for line in lines)
    assert any(line.startswith("over nll, %") and "one seed" in line for line in lines)
    assert "not run" in results.read_text()
    for name in ("kinds.svg", "cells.svg", "frontier.svg"):
        assert (tmp_path / name).read_text().startswith("<svg")


def test_the_evidence_reads_what_the_study_wrote(real_study):
    _, file = real_study
    main_study, variations = evidence.read([file])
    assert main_study.arms() == ["before", "nll", "adagrpo"]
    assert variations == []
    assert len(main_study.levels("before", "reranked", "premise trend")) == 1
    assert len(main_study.levels("adagrpo", "admitted", "training")) == 1


# ------------------------------------------------------------------------- MovieLens


def made_up_ratings() -> np.ndarray:
    """(606, 4): 20 users rate 30 of 60 items each, two at a time, in a shuffled file.

    User 21 has six likes, one too few.
    """
    rng = np.random.default_rng(5)
    rows = []
    for user in range(1, 21):
        items = rng.permutation(np.arange(101, 161))[:30]
        for place, item in enumerate(items):
            rows.append((user, item, rng.integers(1, 6), 1000 + place // 2))
    rows += [(21, item, 5, 1000) for item in range(101, 107)]
    return rng.permutation(np.array(rows))


def write_ratings(path: Path, ratings: np.ndarray, separator: str, header: str = ""):
    lines = [separator.join(str(value) for value in row) for row in ratings]
    path.write_text(header + "\n".join(lines) + "\n")


def likes_in_order(ratings: np.ndarray, user: int) -> list[int]:
    """A user's liked items by the plainest means: a stable sort by time."""
    mine = [row for row in ratings.tolist() if row[0] == user]
    mine.sort(key=lambda row: row[3])
    return [item for _, item, rating, _ in mine if rating >= 4]


def test_movielens_file_is_what_data_reads(tmp_path):
    """Three formats of the same ratings give the same bytes, and --data reads them."""
    ratings = made_up_ratings()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write_ratings(tmp_path / "u.data", ratings, "\t")
    write_ratings(tmp_path / "ratings.dat", ratings, "::")
    write_ratings(tmp_path / "ml.inter", ratings, "\t", header)

    written = []
    for name in ("u.data", "u.data", "ratings.dat", "ml.inter"):
        out = tmp_path / "ml.npz"
        movielens.main([str(tmp_path / name), "--out", str(out)])
        written.append(out.read_bytes())
    assert len(set(written)) == 1
    assert len(list(tmp_path.iterdir())) == 4, "a draft is left behind"

    shop = load_shop(out)  # it checks shapes, ranges and that IDs differ
    pad = 60
    assert shop.tokens.shape == (pad + 1, 3)
    levels = [set(column) for column in shop.tokens.T]
    assert not (levels[0] & levels[1] or levels[1] & levels[2] or levels[0] & levels[2])
    assert shop.kinds == ("head", "middle", "tail")
    assert shop.shown.shape == shop.clicked.shape == (len(shop.feed_history), 10)
    assert (shop.shown != pad).all()

    # Targets and histories of a user are the likes in order of time, PAD on the left.
    expected = {"pretrain": [], "posttrain": [], "validation": [], "test": []}
    for user in range(1, 22):
        likes = [item - 101 for item in likes_in_order(ratings, user)]
        if len(likes) < 7:
            continue
        for place in range(1, len(likes)):
            split = "pretrain"
            if place >= len(likes) - 5:
                split = "posttrain"
            if place == len(likes) - 2:
                split = "validation"
            if place == len(likes) - 1:
                split = "test"
            history = [pad] * 8 + likes[:place]
            expected[split].append([*history[-8:], likes[place]])
    for name, rows in expected.items():
        split = getattr(shop, name)
        assert np.column_stack([split.history, split.target]).tolist() == rows
        assert split.kind.max() <= 2


def test_movielens_hides_the_targets_from_ranker_pretraining_and_ids():
    """With other items in every user's held-out part, nothing else may change."""
    ratings = made_up_ratings()
    swapped = ratings.copy()
    for user in range(1, 21):
        mine = np.flatnonzero(ratings[:, 0] == user)
        mine = mine[np.argsort(ratings[mine, 3], kind="stable")]
        liked = np.flatnonzero(ratings[mine, 2] >= 4)
        held_out = mine[liked[-5:][0] :]
        unrated = np.setdiff1d(np.arange(101, 161), ratings[mine, 1])
        swapped[held_out, 1] = unrated[: len(held_out)]

    log = movielens.make_log(ratings, seed=0)
    other = movielens.make_log(swapped, seed=0)
    for split in ("posttrain", "validation", "test"):
        assert (log[f"{split}_target"] != other[f"{split}_target"]).all()
    for name in ("tokens", "pretrain_history", "pretrain_target", "pretrain_kind"):
        assert np.array_equal(log[name], other[name]), name
    for name in ("feed_history", "shown", "clicked"):
        assert np.array_equal(log[name], other[name]), name


def test_movielens_slates_are_a_users_ratings_before_the_cut():
    """Items that nobody else rates: the item tells the pair of user and item."""
    ratings = made_up_ratings()
    ratings = ratings[ratings[:, 0] <= 20]
    ratings[:, 1] += 1000 * ratings[:, 0]
    log = movielens.make_log(ratings, seed=0)
    numbers = np.unique(ratings[:, 1])
    rating_of = {item: rating for _, item, rating, _ in ratings.tolist()}

    held_out = [log[f"{split}_target"] for split in ("posttrain", "validation", "test")]
    held_out = np.concatenate(held_out)
    assert not np.isin(held_out, log["shown"]).any()
    assert not np.isin(held_out, log["feed_history"]).any()
    assert not np.isin(held_out, log["pretrain_target"]).any()

    for history, shown, clicked in zip(
        log["feed_history"], log["shown"], log["clicked"], strict=True
    ):
        items = numbers[shown]
        assert [rating_of[item] >= 4 for item in items] == clicked.tolist()
        likes = likes_in_order(ratings, items[0] // 1000)
        before = numbers[history[history < len(numbers)]].tolist()
        assert len(before) > 0
        assert likes[likes.index(before[0]) :][: len(before)] == before
        assert not set(before) & set(items)


def test_movielens_counts_the_first_of_two_ratings():
    ratings = [(1, item, 4, item) for item in range(10, 17)]
    again = [(1, 12, 2, 99), (1, 9, 2, 1), (1, 9, 5, 98)]
    user, item, liked = movielens.in_order(np.array(again + ratings, dtype=float))
    assert user.tolist() == [0] * 8
    assert item.tolist() == list(range(8))  # item 9 first, then 10 to 16
    assert liked.tolist() == [False] + [True] * 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\t2\t4\t100\n1\t3\tgood\t101\n", "line 2 is no rating"),
        ("1::2::4\n", "line 1 is no rating"),
        ("1\t2\t881250949\t4\n", "line 1 is no rating"),  # columns in another order
        ("1\t2\tnan\t100\n", "line 1 is no rating"),
        ("", "too few ratings"),
        ("1\t2\t4\t100\n", "too few ratings"),
        ("".join(f"1\t{i}\t4\t{i}\n" for i in range(9)), "too few ratings"),
        (None, "No such file"),
    ],
)
def test_movielens_ends_with_one_line(tmp_path, content, message):
    source = tmp_path / "u.data"
    if content is not None:
        source.write_text(content)
    with pytest.raises(SystemExit) as error:
        movielens.main([str(source), "--out", str(tmp_path / "ml.npz")])
    text = str(error.value)  # a text as exit code: printed, and the status is 1
    assert text.startswith(f"movielens.py: {source}: ")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "ml.npz").exists()


def test_movielens_writes_through_a_link_and_over_nothing_else(tmp_path):
    source = tmp_path / "u.data"
    write_ratings(source, made_up_ratings(), "\t")
    ratings = source.read_bytes()
    link = tmp_path / "link.npz"
    link.symlink_to(tmp_path / "real.npz")
    movielens.main([str(source), "--out", str(link)])
    assert link.is_symlink()
    assert (tmp_path / "real.npz").is_file()

    folder = tmp_path / "folder.npz"
    folder.mkdir()
    for out in (source, folder, tmp_path / "missing" / "ml.npz"):
        with pytest.raises(SystemExit, match="movielens.py: --out"):
            movielens.main([str(source), "--out", str(out)])
    assert source.read_bytes() == ratings


# ---------------------------------------------------------------------------- README


def test_the_readmes_first_snippet_prints_what_the_readme_says():
    blocks = re.compile(r"```python\n(.*?)```.*?```text\n(.*?)```", re.DOTALL)
    code, expected = blocks.search((HERE / "README.md").read_text()).groups()
    assert output_of(start("-c", code)) == expected
