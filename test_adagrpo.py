# SPDX-License-Identifier: MIT
"""Checks against independent oracles: hand calculations, slow loops, brute force, numpy."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import adagrpo
from adagrpo import (
    Gate,
    Policy,
    Ranker,
    adagrpo_gate,
    adagrpo_loss,
    group_advantages,
    grpo_loss,
)
from toy_data import ITEMS, KINDS, Split, World, gumbel_top_k, make_world

torch.set_num_threads(1)
HERE = Path(__file__).parent
BOUNDS = {"min_difficulty": 0.5, "min_margin": 0.25}
SIZES = {
    "test": 800,
    "validation": 60,
    "posttrain": 400,
    "pretrain": 9_000,
    "feed": 40_000,
}


def make(bias: float) -> tuple[World, Ranker]:
    torch.manual_seed(0)
    world = make_world(3, bias, **SIZES)
    return world, adagrpo.train_ranker(world, negatives=2)


@pytest.fixture(scope="module")
def shop() -> tuple[World, Ranker]:
    return make(bias=1.0)


def tiny_policy() -> Policy:
    """A vocabulary of 5, and weights far from uniform, so that mistakes show."""
    torch.manual_seed(1)
    policy = Policy(torch.tensor([[0, 1, 2]]), width=16, vocab=5)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return policy


def gate(own, rewards, hit=None, valid=None, **bounds) -> Gate:
    rewards = torch.tensor(rewards)
    hit = torch.zeros(rewards.shape) if hit is None else torch.tensor(hit)
    valid = torch.ones(rewards.shape) if valid is None else torch.tensor(valid)
    return adagrpo_gate(
        torch.tensor(own), rewards, hit.bool(), valid.bool(), **(BOUNDS | bounds)
    )


def test_gate_truth_table():
    """Four groups of 4, likeliest first. Negatives are the valid misses: an invalid 0 is none."""
    group, no, yes = (
        [0.25, 0.25, 0.5, 0.5],
        [0] * 4,
        [1] * 4,
    )  # mean of the group: 0.375
    *groups, admit, hard, clear, difficulty, margin = zip(
        (0.75, group, no, yes, True, True, True, 1, 0.375),  # hard, clear: 0.75 - 0.375
        (0.5, group, no, yes, False, True, False, 1, 0.125),  # hard, blind: 0.5 - 0.375
        (
            0.75,
            [0.25, 0.75, 0.25, 0.25],
            [0, 1, 0, 0],
            yes,
            False,
            False,
            True,
            0.25,
            0.5,
        ),  # easy
        (
            0.5,
            [0.5, 0.5, 0.5, 0.0],
            no,
            [1, 1, 1, 0],
            False,
            True,
            False,
            1,
            0,
        ),  # 0.5 - 0.5
    )
    assert [tuple(f.tolist()) for f in gate(*groups)] == [
        admit,
        hard,
        clear,
        difficulty,
        margin,
    ]


def test_difficulty_is_the_share_ahead_and_thresholds_are_inclusive():
    """First hit at place 0, 3, 9 of 10, or nowhere; later hits (samples repeat) change nothing."""
    hit = torch.zeros(5, 10)
    hit[0, 0] = hit[1, 3] = hit[2, 9] = hit[4, 3] = hit[4, 5] = 1
    group = (
        [0.5] * 5,
        [[0.25] * 10] * 5,
        hit.tolist(),
    )  # the margin is on its threshold, 0.25
    result = gate(*group, min_difficulty=0.3)
    assert result.difficulty.tolist() == [
        np.float32(d) for d in (0.0, 0.3, 0.9, 1.0, 0.3)
    ]
    assert (
        result.admit.tolist() == result.hard.tolist() == [False, True, True, True, True]
    )
    assert not gate(*group, min_margin=0.26).admit.any()


def test_gate_closes_without_a_reward_to_compare_and_has_no_gradient():
    for bad in (math.nan, math.inf, -math.inf):
        result = gate([bad, 0.9, 0.9], [[0.1, 0.1], [bad, 0.1], [0.1, 0.1]])
        assert result.admit.tolist() == result.clear.tolist() == [False, False, True]
        assert result.discriminability.isnan().tolist() == [True, True, False]
    assert not gate(
        [0.9], [[0.9, 0.0]], [[1, 0]], [[1, 0]], min_difficulty=0
    ).admit.item()
    rewards, mask = torch.rand(3, 4, requires_grad=True), torch.zeros(3, 4).bool()
    result = adagrpo_gate(rewards[:, 0], rewards, mask, mask, **BOUNDS)
    assert not any(field.requires_grad for field in result)


def test_bad_arguments_are_named():
    mask, pair, group = torch.zeros(2, 4).bool(), torch.rand(2), torch.rand(2, 4)
    good = {
        "target_reward": pair,
        "rollout_rewards": group,
        "hit": mask,
        "valid": ~mask,
    } | BOUNDS
    bad = {
        "target_reward": group,
        "hit": mask[:, :3],
        "valid": mask.long(),
        "min_difficulty": 1.5,
    }
    bad |= {"rollout_rewards": group[:, :1], "min_margin": math.nan}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            adagrpo_gate(**(good | {name: value}))
    with pytest.raises(ValueError, match="old_logp"):
        grpo_loss(group, group[:, 1:], group)
    for admit in (mask[:1, 0], pair):
        with pytest.raises(ValueError, match="admit"):
            adagrpo_loss(pair, pair, admit, 1.0)
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(group[:, :1])


def test_advantages_against_numpy_and_flat_groups():
    rewards = np.random.default_rng(0).random((7, 12))
    centred = rewards - rewards.mean(1, keepdims=True)
    for divisor, normalize in ((rewards.std(1, keepdims=True), True), (1.0, False)):
        advantages = group_advantages(torch.from_numpy(rewards), normalize)
        assert_close(advantages, torch.from_numpy(centred / divisor))
    flat = torch.tensor(
        [[0.1, 0.1], [0.7, 0.7], [0.3, 0.3 + 1e-7]]
    )  # the last up to rounding
    assert all(
        group_advantages(flat.repeat(1, half)).eq(0).all() for half in (3, 4, 6, 8)
    )
    assert (
        group_advantages(torch.tensor([[0.1, math.nan, 0.3], [0.1, math.inf, 0.3]]))
        .eq(0)
        .all()
    )


def test_loss_and_gradient_against_a_slow_loop():
    """All 0 is NLL alone, all 1 the fixed mixture: the loop has no other terms."""
    torch.manual_seed(2)
    nll, logp = torch.rand(5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    old, advantages = logp.detach() + 0.3 * torch.randn(5, 4), torch.randn(5, 4)
    for admit in torch.tensor([[1, 0, 1, 0, 1], [0] * 5, [1] * 5]).bool():
        fast, slow = (
            adagrpo_loss(nll, grpo_loss(logp, old, advantages), admit, 0.7),
            0.0,
        )
        for b in range(5):
            slow = slow + nll[b] / 5
            for g in range(4 if admit[b] else 0):
                ratio = math.e ** (logp[b, g] - old[b, g])
                clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
                slow = (
                    slow
                    - 0.7
                    * min(ratio * advantages[b, g], clipped * advantages[b, g])
                    / 20
                )
        assert_close(fast, slow)
        grads = [
            torch.autograd.grad(x, (nll, logp), materialize_grads=True)
            for x in (fast, slow)
        ]
        assert_close(*grads)
        assert grads[0][1][~admit].eq(0).all()
    advantages = group_advantages(
        torch.rand(5, 4)
    )  # one update per rollout: every ratio is 1,
    loss = grpo_loss(
        logp, logp.detach(), advantages
    )  # the printed loss 0, its gradient -A_i / G
    assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    assert_close(torch.autograd.grad(loss.sum(), logp)[0], -advantages / 4)


def plain_logp(
    policy: Policy, prompt: torch.Tensor, items: torch.Tensor
) -> torch.Tensor:
    """log pi of items (B, 3) after prompts (B, T) by one forward without a cache: (B,)."""
    logp, _ = policy(torch.cat([prompt, items[:, :-1]], dim=1))
    return logp[:, -3:].gather(2, items[..., None]).sum((1, 2))


def test_policy_is_causal_and_rollouts_match_plain_forwards():
    """Every branch again, alone, with its prompt copied: same log-probs, gradient, and order."""
    policy, prompt, target = (
        tiny_policy(),
        torch.randint(5, (3, 7)),
        torch.randint(5, (3, 3)),
    )
    changed = torch.cat([prompt[:, :6], (prompt[:, 6:] + 1) % 5], dim=1)
    assert_close(policy(prompt)[0][:, :6], policy(changed)[0][:, :6])
    assert not torch.allclose(policy(prompt)[0][:, 6], policy(changed)[0][:, 6])
    for decode in ("sample", "beam"):
        tokens, logp, target_logp = adagrpo.rollout(policy, prompt, target, 6, decode)
        assert (logp[:, :-1] >= logp[:, 1:]).all()
        joint = torch.cat([logp, target_logp[:, None]], dim=1)
        branches = torch.cat([tokens, target[:, None]], dim=1)
        plain = torch.stack(
            [plain_logp(policy, prompt, branches[:, g]) for g in range(7)], dim=1
        )
        assert_close(joint, plain)
        weights, inputs = torch.randn(3, 7), list(policy.parameters())
        gradients = [
            torch.autograd.grad((weights * x).sum(), inputs) for x in (joint, plain)
        ]
        assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_samples_follow_the_policy_and_beams_are_exact():
    """25 beams over a vocabulary of 5 never drop a prefix: they are the top 25 of all 125 items."""
    policy, prompt = tiny_policy(), torch.randint(5, (2, 7))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (125, 3)
    tokens, logp, _ = adagrpo.rollout(policy, prompt, every[:2], 25, "beam")
    for b in range(2):
        scores = plain_logp(policy, prompt[b].expand(125, -1), every).detach()
        assert_close(logp[b].detach(), scores.topk(25).values)
        assert tokens[b].tolist() == every[scores.topk(25).indices].tolist()
        many = prompt[b].expand(1000, -1)
        drawn, _, _ = adagrpo.rollout(
            policy, many, every[:1].expand(1000, -1), 20, "sample"
        )
        number = (drawn.flatten(0, 1) * torch.tensor([25, 5, 1])).sum(1)
        shares = torch.bincount(number, minlength=125) / 20_000
        assert_close(shares, scores.exp(), atol=0.018, rtol=0)  # 5 sigma of a binomial


def test_no_gradient_reaches_the_ranker_and_nan_never_reaches_the_policy(
    shop, monkeypatch
):
    world, ranker, config = shop[0], Ranker(), adagrpo.settings(["--group", "8"])
    policy, batch = (
        Policy(torch.as_tensor(world.tokens), 16),
        world.posttrain.batches(8)[0],
    )
    nan = lambda self, history, items: torch.full(items.shape, math.nan)
    for forward in (Ranker.forward, nan):
        monkeypatch.setattr(Ranker, "forward", forward)
        policy.zero_grad()
        adagrpo.training_step(policy, ranker, "mix-1", config, batch)[0].backward()
        assert all(p.grad is None for p in ranker.parameters())
        assert all(
            p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None
        )
        _, seen = adagrpo.training_step(policy, ranker, "adagrpo", config, batch)
        assert not (forward is nan and seen["admit"].any())


def test_every_rule_takes_its_own_samples():
    """All eight combinations of hard, clear and trend, twice; random takes as many as adagrpo."""
    hard, clear, trend = (
        torch.cartesian_prod(*[torch.tensor([True, False])] * 3).repeat(2, 1).T
    )
    both, none = hard & clear, torch.zeros(16, dtype=torch.bool)
    kind = torch.where(trend, KINDS.index("trend"), KINDS.index("niche"))
    known = Gate(both, hard, clear, hard.float(), clear.float())
    masks = {name: rule(known, kind) for name, rule in adagrpo.RULES.items()}
    assert masks.pop("random").sum() == both.sum() == 4
    expected = {
        "nll": none,
        "mix": ~none,
        "centred": ~none,
        "adagrpo": both,
        "reweight": both,
    }
    expected |= {
        "inverted": ~both,
        "difficulty": hard,
        "discriminability": clear,
        "oracle": trend,
    }
    assert {k: m.tolist() for k, m in masks.items()} == {
        k: m.tolist() for k, m in expected.items()
    }


def test_metrics_against_hand_calculation(shop, monkeypatch):
    """Ranks 1, 3, 15 and a miss: HR@5 and HR@10 2/4, HR@20 3/4, NDCG@10 (1 + 1/log2(4)) / 4."""
    world, ranker = shop
    policy = Policy(torch.as_tensor(world.tokens))
    users = Split(*(column[:4] for column in vars(world.test).values()))
    beams = torch.tensor(
        [[i for i in range(100, 150) if i != t][:32] for t in users.target]
    )
    beams[[0, 1, 2], [0, 2, 14]] = torch.as_tensor(users.target[:3])
    tokens = policy.tokens[beams]
    tokens[:, 5:7] = (
        0  # two hallucinations: sub-category and slot may not be category tokens
    )
    monkeypatch.setattr(
        adagrpo, "rollout", lambda *_: (tokens, torch.rand(4, 32), torch.rand(4))
    )
    figures, seen = adagrpo.evaluate(policy, ranker, world, users, adagrpo.settings([]))
    negatives = (seen["items"] >= 0) & (seen["items"] != users.target[:, None])
    margins = seen["own"] - np.average(seen["reward"], axis=1, weights=negatives)
    assert seen["discriminability"] == pytest.approx(margins, abs=1e-6)
    clicks, dwell = [], []
    for user in range(4):
        for place in (0, 1, 2, 3, 4, 7, 8, 9):
            item = beams[user, place]
            appeal = world.embedding[item] @ users.taste[user] + world.quality[item]
            clicks.append(1 / (1 + math.exp(-10 * (appeal - 0.9))))
            dwell.append(60 * clicks[-1] * max(appeal, 0))
    expected = [
        50,
        50,
        75,
        25 * (1 + 1 / math.log2(4)),
        20,
        2.5 * sum(clicks),
        sum(dwell) / 40,
    ]
    assert figures.mean(1)[:7].tolist() == pytest.approx(expected, rel=1e-4)


def test_interval_and_pairing_against_hand_calculation(capsys):
    """Gains of 1 and 3 on levels of 10 and 50: mean 2, sd sqrt 2, t(1) = 12.71, half 12.71."""
    runs, groups = {}, len(adagrpo.GROUPS)
    for seed, arm, hr in (
        (0, "nll", 10),
        (1, "nll", 50),
        (0, "mix", 11),
        (1, "mix", 53),
    ):
        figures = np.full((len(adagrpo.FIGURES), groups), hr)
        runs[seed, arm] = {
            "before": figures,
            "final": figures,
            "best": figures,
            "saw": [],
        }
    adagrpo.report(adagrpo.settings(["--seeds", "2", "--arms", "nll", "mix"]), runs)
    assert (
        capsys.readouterr().out.count("+2.00 ±12.71") == len(adagrpo.METRICS) + groups
    )


def test_world_is_sound(shop):
    """IDs name items one to one, nothing is bought twice, users and splits do not overlap."""
    world, _ = shop
    policy = Policy(torch.as_tensor(world.tokens))
    assert (
        len({tuple(item) for item in world.tokens})
        == ITEMS
        == (policy.item_of >= 0).sum()
    )
    assert (world.tokens >= [0, 16, 24]).all() and (world.tokens < [16, 24, 88]).all()
    assert policy.item_of[policy.tokens.unbind(1)].tolist() == list(range(ITEMS))
    splits = [world.pretrain, world.posttrain, world.validation, world.test]
    for split in splits:
        bought = np.column_stack([split.history, split.target])
        assert all(
            len(set(row) & set(range(ITEMS))) == 9 for row in bought
        )  # nine items
        assert (
            np.diff(bought[split.kind == KINDS.index("series")], axis=1) > 0
        ).all()  # in order
        history, target, kind = map(np.concatenate, zip(*split.batches(7), strict=True))
        assert (np.column_stack([history, target]) == bought).all() and (
            kind == split.kind
        ).all()
    tastes = np.concatenate([split.taste for split in splits])
    assert len(np.unique(tastes, axis=0)) == len(tastes)
    other = make_world(3, **(SIZES | {"posttrain": 8, "pretrain": 9, "feed": 9}))
    assert (other.test.target == world.test.target).all()
    with pytest.raises(ValueError, match="feed"):
        make_world(0, feed=0)
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    rng = np.random.default_rng(0)  # purchases and slates are draws from a softmax
    drawn = gumbel_top_k(
        rng, 20_000, lambda rows: np.tile(logits, (rows.stop - rows.start, 1)), 2
    )
    assert np.bincount(drawn[:, 0]) / 20_000 == pytest.approx(
        [0.1, 0.2, 0.3, 0.4], abs=0.018
    )
    assert (drawn[:, 0] != drawn[:, 1]).all()


def premise(policy: Policy, world: World, ranker: Ranker) -> np.ndarray:
    """The ranker's AUC, shares of hard and of clear samples, each by kind of shopper: (3, 3)."""
    figures, _ = adagrpo.evaluate(
        policy, ranker, world, world.test, adagrpo.settings([])
    )
    return np.stack(
        [figures[7:, world.test.kind == k].mean(1) for k in range(3)], axis=1
    )


def test_premise_and_its_negative_controls(shop):
    """Each half of the gate has its own kind to refuse; without the cause it has not."""
    world, ranker = shop
    start, (trend, series, niche) = adagrpo.pretrain(world), range(3)
    auc, hard, clear = premise(start, world, ranker)
    assert (
        hard[trend] > 75
        and clear[trend] > 60
        and hard[series] < 45
        and clear[niche] < 15
    )
    fair, fair_ranker = make(bias=0.0)
    assert (
        fair.test.history == world.test.history
    ).all()  # bias touches the feed alone
    fair_auc, _, fair_clear = premise(start, fair, fair_ranker)
    assert auc[niche] < 65 and abs(fair_auc[niche] - fair_auc[trend]) < 10
    assert fair_clear[niche] > clear[niche] + 20
    rng = np.random.default_rng(0)
    for split in (world.pretrain, world.test):  # the same purchases in another order
        bought = rng.permuted(np.column_stack([split.history, split.target]), axis=1)
        split.history, split.target = bought[:, :8], bought[:, 8]
    _, mixed, _ = premise(adagrpo.pretrain(world), world, ranker)
    assert mixed[series] > hard[series] + 20


def test_bad_settings_end_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(adagrpo, "get_context", None)  # work would fail
    for setting in (
        "arms magic",
        "arms mix--1",
        "device abacus",
        "group 1",
        "out /dev/null/x",
    ):
        name, value = setting.split()
        with pytest.raises(SystemExit) as stop:
            adagrpo.main([f"--{name}", value])
        said = f"{stop.value} {capsys.readouterr().err}"
        assert f"--{name}" in said and value in said


def run(*command, code=0) -> str:
    command = (sys.executable, *command)
    done = subprocess.run(
        command, check=False, cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_two_processes_resume_repeat_and_feed_the_evidence(tmp_path):
    """A tiny study; again; by one process, with runs of other settings in the file; damaged."""
    file = tmp_path / "new" / "runs.json"
    argv = [
        "adagrpo.py",
        "--quick",
        "--steps",
        "8",
        "--arms",
        "nll",
        "adagrpo",
        "--out",
        str(file),
    ]
    first = run(*argv, "--jobs", "2")
    records = json.loads(file.read_text())
    records[0]["validation"] = -1.0  # is lost if this arm is trained again
    file.write_text(json.dumps(records))
    assert run(*argv) == first and json.loads(file.read_text()) == records
    file.write_text(file.read_text().replace('"weight": 5.0', '"weight": 4.0'))
    assert run(*argv, "--jobs", "1") == first and not list(file.parent.glob("*.draft"))
    assert [r["settings"]["weight"] for r in json.loads(file.read_text())] == [
        4.0,
        4.0,
        5.0,
        5.0,
    ]
    assert "not run" in run(
        ".github/evidence.py", str(file), "--pictures", str(tmp_path)
    )
    assert (tmp_path / "kinds.svg").exists() and (tmp_path / "frontier.svg").exists()
    file.write_text("{")
    assert "runs.json" in run(*argv, code=1)


def test_readme_snippet_prints_what_the_readme_says():
    blocks = re.compile(r"```python\n(.*?)```.*?```text\n(.*?)```", re.DOTALL)
    code, printed = blocks.search((HERE / "README.md").read_text()).groups()
    assert run("-c", code) == printed
