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
from adagrpo import Gate, Policy, Shop, adagrpo_gate, adagrpo_loss, group_advantages, grpo_loss
from toy_data import CODEBOOK, ITEMS, KINDS, Split, gumbel_top_k, make_world

torch.set_num_threads(1)
HERE = Path(__file__).parent
BOUNDS = {"min_difficulty": 0.5, "min_margin": 0.25}
SIZES = {"test": 800, "validation": 60, "posttrain": 400, "pretrain": 12_000, "feed": 40_000}


def make_shop(**world) -> Shop:
    torch.manual_seed(0)
    world = make_world(3, **(SIZES | world))
    return Shop(world, adagrpo.train_ranker(world, negatives=2))


@pytest.fixture(scope="module")
def shop() -> Shop:
    return make_shop()


def tiny_policy() -> Policy:
    """A vocabulary of 5, and weights far from uniform, so that mistakes show."""
    torch.manual_seed(1)
    policy = Policy(width=16, vocab=5)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return policy


def gate(own, rewards, hit=None, valid=None, **bounds) -> Gate:
    rewards = torch.tensor(rewards)
    hit = torch.zeros(rewards.shape) if hit is None else torch.tensor(hit)
    valid = torch.ones(rewards.shape) if valid is None else torch.tensor(valid)
    bounds = BOUNDS | bounds
    return adagrpo_gate(torch.tensor(own), rewards, hit.bool(), valid.bool(), **bounds)


def test_gate_truth_table():
    """Four groups of 4, likeliest first. Negatives are the valid misses.

    hard, clear: no hit: 1; 0.75 - mean(.25, .25, .5, .5) = 0.375            -> admitted
    hard, blind: no hit: 1; 0.5 - 0.375 = 0.125                             -> refused
    easy, clear: one miss ahead: 1/4; 0.75 - mean(.25, .25, .25) = 0.5       -> refused
    invalid:     the hallucination's 0 must not count: 0.5 - 0.5 = 0         -> refused
    """
    group = [0.25, 0.25, 0.5, 0.5]
    result = gate(
        [0.75, 0.5, 0.75, 0.5],
        [group, group, [0.25, 0.75, 0.25, 0.25], [0.5, 0.5, 0.5, 0.0]],
        [[0] * 4, [0] * 4, [0, 1, 0, 0], [0] * 4],
        [[1] * 4, [1] * 4, [1] * 4, [1, 1, 1, 0]],
    )
    assert result.admit.tolist() == [True, False, False, False]
    assert result.hard.tolist() == [True, True, False, True]
    assert result.clear.tolist() == [True, False, True, False]
    assert result.difficulty.tolist() == [1, 1, 0.25, 1]
    assert result.discriminability.tolist() == [0.375, 0.125, 0.5, 0.0]


def test_difficulty_is_the_share_ahead_and_thresholds_are_inclusive():
    """First hit at place 0, 3, 9 of 10, or nowhere; later hits (samples repeat) change nothing.

    The margin is 0.5 - 0.25, exactly on its threshold, and so is 0.3 of the group.
    """
    hit = torch.zeros(5, 10)
    hit[0, 0] = hit[1, 3] = hit[2, 9] = hit[4, 3] = hit[4, 5] = 1
    group = ([0.5] * 5, [[0.25] * 10] * 5, hit.tolist())
    result = gate(*group, min_difficulty=0.3)
    assert result.difficulty.tolist() == [np.float32(d) for d in (0.0, 0.3, 0.9, 1.0, 0.3)]
    assert result.admit.tolist() == result.hard.tolist() == [False, True, True, True, True]
    assert not gate(*group, min_margin=0.26).admit.any()


def test_gate_closes_without_a_reward_to_compare_and_has_no_gradient():
    for bad in (math.nan, math.inf, -math.inf):
        result = gate([bad, 0.9, 0.9], [[0.1, 0.1], [bad, 0.1], [0.1, 0.1]])
        assert result.admit.tolist() == result.clear.tolist() == [False, False, True]
        assert result.discriminability.isnan().tolist() == [True, True, False]
    assert not gate([0.9], [[0.9, 0.0]], [[1, 0]], [[1, 0]], min_difficulty=0).admit.item()
    rewards, mask = torch.rand(3, 4, requires_grad=True), torch.zeros(3, 4, dtype=torch.bool)
    result = adagrpo_gate(torch.rand(3, requires_grad=True), rewards, mask, ~mask, **BOUNDS)
    assert not any(field.requires_grad for field in result)


def test_gate_names_the_bad_argument():
    mask = torch.zeros(2, 4, dtype=torch.bool)
    good = {"target_reward": torch.rand(2), "rollout_rewards": torch.rand(2, 4), "hit": mask}
    good |= {"valid": ~mask} | BOUNDS
    adagrpo_gate(**good)
    for name, bad in (
        ("target_reward", torch.rand(3)),
        ("hit", mask[:, :3]),
        ("valid", mask.long()),
        ("rollout_rewards", torch.rand(2, 1)),
        ("min_difficulty", 1.5),
        ("min_margin", math.nan),
    ):
        with pytest.raises(TypeError if name == "valid" else ValueError, match=name):
            adagrpo_gate(**(good | {name: bad}))


def test_advantages_against_numpy_and_flat_groups():
    rewards = torch.rand(7, 12, dtype=torch.float64)
    centred = rewards.numpy() - rewards.numpy().mean(1, keepdims=True)
    expected = torch.from_numpy(centred / rewards.numpy().std(1, keepdims=True))
    assert_close(group_advantages(rewards), expected)
    assert_close(group_advantages(rewards, normalize=False), torch.from_numpy(centred))
    for reward in (0.1, 0.3, 0.7):
        for size in (6, 8, 12, 16):
            assert group_advantages(torch.full((2, size), reward)).eq(0).all()
    assert group_advantages(torch.tensor([[0.1, math.nan, 0.3], [0.1, math.inf, 0.3]])).eq(0).all()
    for bad in (torch.rand(3, 1), torch.rand(4)):
        with pytest.raises(ValueError, match="G >= 2"):
            group_advantages(bad)


@pytest.mark.parametrize("admit", [[1, 0, 1, 0, 1], [0] * 5, [1] * 5])
def test_loss_and_gradient_against_a_slow_loop(admit):
    """All 0 is NLL alone, all 1 the fixed mixture: the loop has no other terms."""
    torch.manual_seed(2)
    nll, logp = torch.rand(5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    old, advantages = logp.detach() + 0.3 * torch.randn(5, 4), torch.randn(5, 4)
    admit = torch.tensor(admit).bool()
    fast, slow = adagrpo_loss(nll, grpo_loss(logp, old, advantages), admit, 0.7), 0.0
    for b in range(5):
        terms = []
        for g in range(4):
            ratio = math.e ** (logp[b, g] - old[b, g])
            clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
            terms.append(min(ratio * advantages[b, g], clipped * advantages[b, g]))
        slow = slow + (nll[b] - (0.7 * sum(terms) / 4 if admit[b] else 0)) / 5
    assert_close(fast, slow)
    gradients = [torch.autograd.grad(x, (nll, logp), materialize_grads=True) for x in (fast, slow)]
    assert_close(*gradients)
    assert gradients[0][1][~admit].eq(0).all()


def test_printed_grpo_loss_is_zero_but_its_gradient_is_not():
    """With ratio 1 the gradient in logp_i is -A_i / G."""
    logp = torch.randn(3, 8, requires_grad=True)
    advantages = group_advantages(torch.rand(3, 8))
    loss = grpo_loss(logp, logp.detach(), advantages)
    assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)
    loss.sum().backward()
    assert_close(logp.grad, -advantages / 8)


def test_losses_name_bad_arguments():
    with pytest.raises(ValueError, match="old_logp"):
        grpo_loss(torch.rand(2, 3), torch.rand(2, 4), torch.rand(2, 3))
    pair, yes = torch.rand(2), torch.ones(2).bool()
    for admit, weight, error in (
        (yes[:1], 1, ValueError),
        (pair, 1, TypeError),
        (yes, -1, ValueError),
    ):
        with pytest.raises(error, match="admit"):
            adagrpo_loss(pair, pair, admit, weight)


def plain_logp(policy: Policy, prompt: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """log pi of items (B, 3) after prompts (B, T) by one forward without a cache: (B,)."""
    logp, _ = policy(torch.cat([prompt, items[:, :-1]], dim=1))
    return logp[:, -3:].gather(2, items[..., None]).sum((1, 2))


def test_policy_is_causal():
    policy, tokens = tiny_policy(), torch.randint(5, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 5
    before, after = policy(tokens)[0], policy(changed)[0]
    assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("decode", ["sample", "beam"])
def test_rollout_against_plain_forwards(decode):
    """Every branch again, alone, with its prompt copied: same log-probs, gradient, and order."""
    policy, prompt, target = tiny_policy(), torch.randint(5, (3, 7)), torch.randint(5, (3, 3))
    tokens, logp, target_logp = adagrpo.rollout(policy, prompt, target, 6, decode)
    assert (logp[:, :-1] >= logp[:, 1:]).all()
    joint = torch.cat([logp, target_logp[:, None]], dim=1)
    branches = torch.cat([tokens, target[:, None]], dim=1)
    plain = torch.stack([plain_logp(policy, prompt, branches[:, g]) for g in range(7)], dim=1)
    assert_close(joint, plain)
    weights, inputs = torch.randn(3, 7), list(policy.parameters())
    gradients = [torch.autograd.grad((weights * x).sum(), inputs) for x in (joint, plain)]
    assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_samples_follow_the_policy_and_beams_are_exact():
    """20,000 draws against the 125 probabilities: 5 sigma of a binomial < 0.018. Beams: with 25 of
    them over a vocabulary of 5 no prefix is ever dropped, so they are the top 25 of all 125."""
    policy, prompt = tiny_policy(), torch.randint(5, (2, 7))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (125, 3)
    tokens, logp, _ = adagrpo.rollout(policy, prompt, every[:2], 25, "beam")
    for b in range(2):
        scores = plain_logp(policy, prompt[b].expand(125, -1), every).detach()
        assert_close(logp[b].detach(), scores.topk(25).values)
        assert tokens[b].tolist() == every[scores.topk(25).indices].tolist()
        many = prompt[b].expand(1000, -1)
        drawn, _, _ = adagrpo.rollout(policy, many, every[:1].expand(1000, -1), 20, "sample")
        number = (drawn.flatten(0, 1) * torch.tensor([25, 5, 1])).sum(1)
        shares = torch.bincount(number, minlength=125) / 20_000
        assert_close(shares, scores.exp(), atol=0.018, rtol=0)
    with pytest.raises(ValueError, match="decode"):
        adagrpo.rollout(policy, prompt, every[:2], 4, "greedy")


def test_no_gradient_reaches_the_ranker_and_nan_never_reaches_the_policy(shop, monkeypatch):
    policy, batch = Policy(16), shop.batches(shop.world.posttrain, 8)[0]
    config = adagrpo.settings(["--group", "8"])
    shop.ranker.zero_grad()
    for broken in (False, True):
        if broken:
            nan = lambda self, history, items: torch.full(items.shape, math.nan)
            monkeypatch.setattr(adagrpo.Ranker, "rewards", nan)
        policy.zero_grad()
        adagrpo.training_step(policy, shop, "mix-1", config, batch)[0].backward()
        assert all(p.grad is None for p in shop.ranker.parameters())
        assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
        _, admit = adagrpo.training_step(policy, shop, "adagrpo", config, batch)
        assert not (broken and admit.any())


def test_every_rule_takes_its_own_samples():
    """All eight combinations of hard, clear and trend, twice; random takes as many as adagrpo."""
    hard, clear, trend = torch.cartesian_prod(*[torch.tensor([True, False])] * 3).repeat(2, 1).T
    both, none = hard & clear, torch.zeros(16, dtype=torch.bool)
    kind = torch.where(trend, KINDS.index("trend"), KINDS.index("niche"))
    known = Gate(both, hard, clear, hard.float(), clear.float())
    masks = {name: rule(known, kind) for name, rule in adagrpo.RULES.items()}
    assert masks.pop("random").sum() == both.sum() == 4
    expected = {"nll": none, "mix": ~none, "centred": ~none, "adagrpo": both, "reweight": both}
    expected |= {"inverted": ~both, "difficulty": hard, "discriminability": clear, "oracle": trend}
    assert {k: m.tolist() for k, m in masks.items()} == {k: m.tolist() for k, m in expected.items()}


def test_metrics_against_hand_calculation(shop, monkeypatch):
    """Ranks 1, 3, 15 and a miss: HR@5 and HR@10 2/4, HR@20 3/4, NDCG@10 (1 + 1/log2(4)) / 4.

    Each top 10 holds two hallucinations: 20%.
    """
    test = shop.world.test
    users = Split(test.history[:4], test.target[:4], test.taste[:4], test.kind[:4])
    beams = torch.tensor([[i for i in range(100, 140) if i != t][:20] for t in users.target])
    for user, rank in ((0, 0), (1, 2), (2, 14)):
        beams[user, rank] = int(users.target[user])
    tokens = shop.tokens[beams]
    tokens[:, 5:7] = 0  # sub-category and slot may not be category tokens: names no item
    monkeypatch.setattr(adagrpo, "rollout", lambda *_: (tokens, None, None))
    found = {k: v.mean().item() for k, v in adagrpo.evaluate(None, shop, users).items()}
    clicks, dwell = [], []
    for user in range(4):
        for place in (0, 1, 2, 3, 4, 7, 8, 9):
            item = beams[user, place]
            appeal = shop.world.embedding[item] @ users.taste[user] + shop.world.quality[item]
            clicks.append(1 / (1 + math.exp(-10 * (appeal - 0.9))))
            dwell.append(60 * clicks[-1] * max(appeal, 0))
    expected = {"hr@5": 50, "hr@10": 50, "hr@20": 75, "hallucination": 20}
    expected |= {"ndcg@10": 25 * (1 + 1 / math.log2(4))}
    expected |= {"ctr": 100 * sum(clicks) / 40, "dwell": sum(dwell) / 40}
    assert found == pytest.approx(expected, rel=1e-4)


def test_interval_and_pairing_against_hand_calculation(capsys):
    """Gains of 1 and 3 on levels of 10 and 50: mean 2, sd sqrt 2, t(1) = 12.71, half 12.71."""
    records = []
    for seed, arm, hr in ((0, "nll", 10), (1, "nll", 50), (0, "mix", 11), (1, "mix", 53)):
        kinds = {k: {"users": 1, "hr@10": hr, "auc": 0, "hard": 0, "clear": 0} for k in KINDS}
        record = {"seed": seed, "arm": arm, "before": kinds, "groups": kinds, "saw": []}
        record |= {"metrics": dict.fromkeys(adagrpo.METRICS, hr)}
        records += [record | {"checkpoint": "best"}, record | {"checkpoint": "final"}]
    adagrpo.report(adagrpo.settings(["--seeds", "2", "--arms", "nll", "mix"]), records)
    assert capsys.readouterr().out.count("+2.00 ±12.71") == len(adagrpo.METRICS) + len(KINDS)


def test_world_is_sound(shop):
    """IDs name items one to one, nothing is bought twice, users and splits do not overlap."""
    world = shop.world
    assert len({tuple(code) for code in world.codes}) == ITEMS == (shop.item_of >= 0).sum()
    assert (world.codes >= 0).all() and (world.codes < CODEBOOK).all()
    assert shop.item_of[shop.tokens.unbind(1)].tolist() == list(range(ITEMS))
    splits = [world.pretrain, world.posttrain, world.validation, world.test]
    for split in splits:
        bought = np.column_stack([split.history, split.target])
        assert bought.min() >= 0 and bought.max() < ITEMS
        assert all(len(set(row)) == 9 for row in bought)
        assert (np.diff(bought[split.kind == KINDS.index("series")], axis=1) > 0).all()  # in order
    tastes = np.concatenate([split.taste for split in splits])
    assert len(np.unique(tastes, axis=0)) == len(tastes)
    other = make_world(3, **(SIZES | {"posttrain": 8, "pretrain": 9, "feed": 9}))
    assert (other.test.target == world.test.target).all()
    for name in ("test", "feed"):
        with pytest.raises(ValueError, match=name):
            make_world(0, **{name: 0})
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    rng = np.random.default_rng(0)  # purchases and slates are draws from a softmax
    drawn = gumbel_top_k(rng, 20_000, lambda rows: np.tile(logits, (rows.stop - rows.start, 1)), 2)
    assert np.bincount(drawn[:, 0]) / 20_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.018)
    assert (drawn[:, 0] != drawn[:, 1]).all()


def premise(policy: Policy, shop: Shop) -> dict[str, dict[str, float]]:
    """By kind of shopper: share of hard and of clear samples, the ranker's AUC."""
    figures, _ = adagrpo.survey(policy, shop, adagrpo.settings([]))
    groups = {k: torch.from_numpy(shop.world.test.kind == i) for i, k in enumerate(KINDS)}
    return adagrpo.summary(figures, groups)


def test_premise_and_its_negative_controls(shop):
    """Each half of the gate has its own kind to refuse; without the cause it has not."""
    start = adagrpo.pretrain(shop)
    kinds = premise(start, shop)
    assert kinds["trend"]["hard"] > 75 and kinds["trend"]["clear"] > 60
    assert kinds["series"]["hard"] < 45 and kinds["niche"]["clear"] < 15
    fair = make_shop(bias=0.0)
    assert (fair.world.test.history == shop.world.test.history).all()  # bias touches the feed alone
    shown = premise(start, fair)
    assert kinds["niche"]["auc"] < 65 and abs(shown["niche"]["auc"] - shown["trend"]["auc"]) < 10
    assert shown["niche"]["clear"] > kinds["niche"]["clear"] + 20
    rng = np.random.default_rng(0)
    for split in (shop.world.pretrain, shop.world.test):  # the same purchases in another order
        bought = rng.permuted(np.column_stack([split.history, split.target]), axis=1)
        split.history, split.target = bought[:, :8], bought[:, 8]
    assert premise(adagrpo.pretrain(shop), shop)["series"]["hard"] > kinds["series"]["hard"] + 20


def test_bad_settings_end_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(adagrpo.multiprocessing, "get_context", None)  # work would fail
    for setting in ("arms magic", "arms mix--1", "device abacus", "group 1", "out /dev/null/x"):
        name, value = setting.split()
        with pytest.raises(SystemExit) as stop:
            adagrpo.main([f"--{name}", value])
        said = f"{stop.value} {capsys.readouterr().err}"
        assert f"--{name}" in said and value in said


def run(*command, code=0) -> str:
    command = (sys.executable, *command)
    done = subprocess.run(command, check=False, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_two_processes_resume_repeat_and_feed_the_evidence(tmp_path):
    """A tiny study; again, elsewhere by one process, with another setting, with a damaged file."""
    argv = ["adagrpo.py", "--quick", "--steps", "8", "--arms", "nll", "adagrpo", "--seeds", "2"]
    a, b = tmp_path / "a", tmp_path / "b"
    first = run(*argv, "--jobs", "2", "--out", str(a))
    stamps = {file: file.stat().st_mtime_ns for file in a.glob("seed*.json")}
    assert run(*argv, "--jobs", "2", "--out", str(a)) == first  # nothing is trained again
    assert stamps == {file: file.stat().st_mtime_ns for file in a.glob("seed*.json")}
    assert run(*argv, "--jobs", "1", "--out", str(b)) == first  # the same figures
    results = json.loads((a / "results.json").read_text())["runs"]
    assert len(stamps) == 4 and len(results) == 8 and not list(a.glob("*.draft"))
    assert "not run" in run(".github/evidence.py", str(a), "--pictures", str(tmp_path))
    assert (tmp_path / "kinds.svg").exists() and (tmp_path / "frontier.svg").exists()
    assert "min_margin" in run(*argv, "--min-margin", "0.5", "--out", str(a), code=1)
    (a / "seed1-nll.json").write_text("{")
    assert "seed1-nll.json" in run(*argv, "--out", str(a), code=1)


def test_readme_snippet_prints_what_the_readme_says():
    text = (HERE / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", text, re.DOTALL).groups()
    assert run("-c", code) == printed
