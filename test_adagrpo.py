"""Checks against independent oracles: hand calculations, slow loops, brute force, numpy."""

import json
import math
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import adagrpo
from adagrpo import (
    Config,
    Policy,
    Shop,
    adagrpo_gate,
    adagrpo_loss,
    beam_search,
    group_advantages,
    grpo_loss,
    rollout,
)
from toy_data import CODEBOOK, gumbel_top_k, make_world

CPU = torch.device("cpu")
BOUNDS = {"min_difficulty": 0.5, "min_margin": 0.25}


@pytest.fixture(scope="module")
def world():
    return make_world(3, pretrain=400, posttrain=800, valid=60, test=600, feed=40_000)


@pytest.fixture(scope="module")
def ranker(world):
    torch.manual_seed(0)
    return adagrpo.train_ranker(world, Config(ranker_epochs=2), CPU).requires_grad_(True)


@pytest.fixture(scope="module")
def shop(world, ranker):
    return Shop(world, ranker, CPU)


def tiny_policy(vocab: int = 5) -> Policy:
    torch.manual_seed(1)
    policy = Policy(width=16, heads=4, layers=2, vocab=vocab)
    for parameter in policy.parameters():  # far from uniform, so that mistakes show
        torch.nn.init.normal_(parameter, std=0.4)
    return policy


# ------------------------------------------------------------------------------------- gate


def gate(own, rewards, hit=None, valid=None, **bounds):
    rewards = torch.tensor(rewards)
    hit = torch.zeros(rewards.shape, dtype=torch.bool) if hit is None else torch.tensor(hit).bool()
    valid = (
        torch.ones(rewards.shape, dtype=torch.bool) if valid is None else torch.tensor(valid).bool()
    )
    return adagrpo_gate(torch.tensor(own), rewards, hit, valid, **(BOUNDS | bounds))


def test_gate_truth_table():
    """Four groups of 4. Difficulty = misses / 4; negatives are the valid misses.

    hard, clear: 4 misses, 0.75 - mean(.25, .25, .5, .5) = 0.375       -> admitted
    hard, blind: 4 misses, 0.5 - 0.375 = 0.125                         -> refused
    easy, clear: 1 miss (0.25), 0.75 - 0.25 = 0.5                      -> refused
    invalid:     the hallucination's 0 must not count: 0.5 - 0.5 = 0   -> refused
    """
    group = [0.25, 0.25, 0.5, 0.5]
    result = gate(
        [0.75, 0.5, 0.75, 0.5],
        [group, group, [0.75, 0.75, 0.75, 0.25], [0.5, 0.5, 0.5, 0.0]],
        [[0] * 4, [0] * 4, [1, 1, 1, 0], [0] * 4],
        [[1] * 4, [1] * 4, [1] * 4, [1, 1, 1, 0]],
    )
    assert result.admit.tolist() == [True, False, False, False]
    assert result.difficulty.tolist() == [1, 1, 0.25, 1]
    assert result.discriminability.tolist() == [0.375, 0.125, 0.5, 0.0]


def test_gate_thresholds_are_inclusive():
    """Half of the rollouts miss, the margin is 0.5 - 0.25: exactly on both thresholds."""
    group = ([0.5], [[0.5, 0.25]], [[1, 0]])
    assert gate(*group).admit.item()
    assert not gate(*group, min_difficulty=0.51).admit.item()
    assert not gate(*group, min_margin=0.26).admit.item()
    for hits in range(10):  # the float nearest to misses / 10 is the difficulty, to the bit
        tenth = gate([0.5], [[0.25] * 10], [[1] * hits + [0] * (10 - hits)], min_difficulty=0)
        assert tenth.difficulty.item() == np.float32((10 - hits) / 10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gate_closes_on_non_finite_rewards(bad):
    result = gate([bad, 0.9, 0.9], [[0.1, 0.1], [bad, 0.1], [0.1, 0.1]])
    assert result.admit.tolist() == [False, False, True]
    assert result.discriminability.isnan().tolist() == [True, True, False]


def test_gate_without_a_valid_negative_and_without_gradient():
    assert not gate([0.9], [[0.9, 0.0]], [[1, 0]], [[1, 0]], min_difficulty=0).admit.item()
    rewards = torch.rand(3, 4, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    result = adagrpo_gate(torch.rand(3, requires_grad=True), rewards, mask, ~mask, **BOUNDS)
    assert not any(field.requires_grad for field in result)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("target_reward", {"target_reward": torch.rand(3)}, ValueError),
        ("hit", {"hit": torch.zeros(2, 3, dtype=torch.bool)}, ValueError),
        ("hit", {"hit": torch.zeros(2, 4)}, TypeError),
        ("valid", {"valid": torch.ones(2, 4, dtype=torch.long)}, TypeError),
        ("G >= 2", {"rollout_rewards": torch.rand(2, 1)}, ValueError),
        ("min_difficulty", {"min_difficulty": 1.5}, ValueError),
        ("min_margin", {"min_margin": math.nan}, ValueError),
    ],
)
def test_gate_names_the_bad_argument(name, change, error):
    mask = torch.zeros(2, 4, dtype=torch.bool)
    good = {"target_reward": torch.rand(2), "rollout_rewards": torch.rand(2, 4), "hit": mask}
    with pytest.raises(error, match=name):
        adagrpo_gate(**(good | {"valid": ~mask} | BOUNDS | change))


# ----------------------------------------------------------------------- advantages and losses


def test_advantages_against_numpy_and_flat_groups():
    rewards = torch.rand(7, 12, dtype=torch.float64)
    r = rewards.numpy()
    expected = (r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True)
    assert_close(group_advantages(rewards), torch.from_numpy(expected))
    for reward in (0.1, 0.3, 0.7):
        for size in (6, 8, 12, 16):
            assert group_advantages(torch.full((2, size), reward)).eq(0).all()
    assert group_advantages(torch.tensor([[0.1, math.nan, 0.3], [0.1, math.inf, 0.3]])).eq(0).all()
    for bad in (torch.rand(3, 1), torch.rand(4)):
        with pytest.raises(ValueError, match="G >= 2"):
            group_advantages(bad)


def losses(admit, weight=0.7, B=5, G=4):
    """Loss and gradient by the library's functions, and by a loop over samples and rollouts."""
    torch.manual_seed(2)
    nll, logp = torch.rand(B, requires_grad=True), torch.randn(B, G, requires_grad=True)
    old, advantages = logp.detach() + 0.3 * torch.randn(B, G), torch.randn(B, G)
    fast = adagrpo_loss(nll, grpo_loss(logp, old, advantages, 0.2), admit, weight)
    slow = 0.0
    for b in range(B):
        terms = []
        for g in range(G):
            ratio = math.e ** (logp[b, g] - old[b, g])
            clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
            terms.append(min(ratio * advantages[b, g], clipped * advantages[b, g]))
        slow = slow + (nll[b] - (weight * sum(terms) / G if admit[b] else 0)) / B
    gradients = [torch.autograd.grad(x, (nll, logp), materialize_grads=True) for x in (fast, slow)]
    return fast, slow, *gradients, nll


@pytest.mark.parametrize("admit", [[1, 0, 1, 0, 1], [0] * 5, [1] * 5])
def test_loss_and_gradient_against_a_slow_loop(admit):
    """All 0 is NLL alone, all 1 the fixed mixture: the loop has no other terms."""
    fast, slow, fast_gradient, slow_gradient, nll = losses(torch.tensor(admit).bool())
    assert_close(fast, slow)
    assert_close(fast_gradient, slow_gradient)
    if not any(admit):
        assert_close(fast, nll.mean())
        assert fast_gradient[1].eq(0).all()


def test_printed_grpo_loss_is_zero_but_its_gradient_is_not():
    """With ratio 1 the gradient in logp_i is -A_i / G."""
    logp = torch.randn(3, 8, requires_grad=True)
    advantages = group_advantages(torch.rand(3, 8))
    loss = grpo_loss(logp, logp.detach(), advantages, 0.2)
    assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)
    loss.sum().backward()
    assert_close(logp.grad, -advantages / 8)


def test_losses_name_bad_shapes():
    with pytest.raises(ValueError, match="old_logp"):
        grpo_loss(torch.rand(2, 3), torch.rand(2, 4), torch.rand(2, 3), 0.2)
    with pytest.raises(ValueError, match="admit"):
        adagrpo_loss(torch.rand(2), torch.rand(2), torch.ones(3).bool(), 1.0)
    with pytest.raises(ValueError, match="weight"):
        adagrpo_loss(torch.rand(2), torch.rand(2), torch.ones(2).bool(), -1.0)
    with pytest.raises(TypeError, match="admit"):
        adagrpo_loss(torch.rand(2), torch.rand(2), torch.ones(2), 1.0)


# ------------------------------------------------------------------------- policy and rollouts


def test_policy_is_causal():
    policy, tokens = tiny_policy(), torch.randint(5, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 5
    before, after = policy(tokens)[0], policy(changed)[0]
    assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("kind", ["sample", "beam"])
def test_rollout_against_unshared_full_forward(kind):
    """Every branch again, alone, with its prompt copied: same log-probs, same gradient."""
    policy, history, target = tiny_policy(), torch.randint(5, (3, 7)), torch.randint(5, (3, 3))
    found = rollout(policy, history, 6, kind, target)
    weights = torch.randn(3, 7)
    joint = torch.cat([found.logp, found.target_logp[:, None]], dim=1)
    gradient = torch.autograd.grad((weights * joint).sum(), policy.parameters(), allow_unused=True)
    branches = torch.cat([found.tokens, target[:, None]], dim=1)
    plain = torch.stack([policy.target_logp(history, branches[:, g]) for g in range(7)], dim=1)
    again = torch.autograd.grad((weights * plain).sum(), policy.parameters(), allow_unused=True)
    assert_close(joint, plain)
    assert_close(gradient, again, rtol=1e-3, atol=1e-4)


def test_samples_follow_the_policy():
    """20,000 draws of the first token against its probabilities; 5 sigma of a binomial < 0.018."""
    policy, history = tiny_policy(), torch.tensor([[0, 3, 1, 2]])
    found = rollout(policy, history.expand(1000, -1), 20, "sample")
    shares = torch.bincount(found.tokens[..., 0].flatten(), minlength=5) / 20_000
    assert_close(shares, policy(history)[0][0, -1].exp().detach(), atol=0.018, rtol=0)


def test_beam_search_against_brute_force():
    """Vocabulary 5: with 25 beams no prefix is ever dropped, so the top 25 of all 125 are exact."""
    policy, history = tiny_policy(), torch.randint(5, (2, 7))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)  # (125, 3)
    tokens, logp = beam_search(policy, history, 25)
    for b in range(2):
        scores = policy.target_logp(history[b].expand(125, -1), every).detach()
        best = scores.topk(25)
        assert_close(logp[b], best.values)
        assert tokens[b].tolist() == every[best.indices].tolist()
        assert len({tuple(beam) for beam in tokens[b].tolist()}) == 25


def test_no_gradient_reaches_the_ranker_and_nan_never_reaches_the_policy(shop, monkeypatch):
    policy = Policy(16)
    shop.ranker.zero_grad()
    history = torch.from_numpy(shop.world.test.history[:8])
    target = torch.from_numpy(shop.world.test.target[:8])
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(Shop, "rewards", lambda self, h, i: torch.full(i.shape, math.nan))
        found = rollout(policy, shop.prompt(history), 4, "beam", shop.tokens(target))
        _, rewards, gate = adagrpo.judge(shop, Config(), history, target, found.tokens)
        grpo = grpo_loss(found.logp, found.logp.detach(), group_advantages(rewards), 0.2)
        policy.zero_grad()
        adagrpo_loss(-found.target_logp, grpo, torch.ones(8).bool(), 1.0).backward()
        assert all(p.grad is None for p in shop.ranker.parameters())
        assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
        assert not (broken and gate.admit.any())


# --------------------------------------------------------------------------------- evaluation


def test_metrics_against_hand_calculation(shop, monkeypatch):
    """Ranks 1, 3, 15 and a miss: HR@1 1/4, HR@10 2/4, HR@20 3/4, NDCG@10 (1 + 1/log2(4)) / 4.

    Each top 10 holds two hallucinations: 0.2.
    """
    test = shop.world.test
    sample = adagrpo.Split(test.history[:4], test.target[:4], test.taste[:4])
    others = [[i for i in range(100, 140) if i != t][:20] for t in sample.target]
    beams = torch.tensor(others)
    for user, rank in ((0, 0), (1, 2), (2, 14)):
        beams[user, rank] = int(sample.target[user])
    tokens = shop.tokens(beams)
    tokens[:, 5:7] = 0  # sub-category and slot may not be category tokens: names no item
    monkeypatch.setattr(adagrpo, "beam_search", lambda *_: (tokens, None))
    found = {k: v.mean().item() for k, v in adagrpo.evaluate(None, shop, sample).items()}
    expected = {"hr@1": 0.25, "hr@5": 0.5, "hr@10": 0.5, "hr@20": 0.75, "hallucination": 0.2}
    expected |= {"ndcg@10": (1 + 1 / math.log2(4)) / 4}
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    clicks = []
    for user in range(4):
        for place in (0, 1, 2, 3, 4, 7, 8, 9):
            item = beams[user, place]
            appeal = shop.world.embedding[item] @ sample.taste[user] + shop.world.quality[item]
            clicks.append(1 / (1 + math.exp(-10 * (appeal - 0.9))))
    assert found["ctr"] == pytest.approx(sum(clicks) / 40, rel=1e-4)


def test_order_agreement_against_pairs():
    rewards, truth = torch.rand(1, 6), torch.rand(1, 6)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    same = [(rewards[0, i] > rewards[0, j]) == (truth[0, i] > truth[0, j]) for i, j in pairs]
    assert adagrpo.order_agreement(rewards, truth).item() == pytest.approx(np.mean(same))


# -------------------------------------------------------------------------------------- world


def test_ids_name_items_one_to_one(world, shop):
    assert len({tuple(code) for code in world.codes}) == len(world.codes) == 1000
    assert (world.item_of[tuple(world.codes.T)] == np.arange(1000)).all()
    assert (world.item_of >= 0).sum() == 1000
    assert (world.codes >= 0).all() and (world.codes < CODEBOOK).all()
    assert shop.items(shop.tokens(torch.arange(1000))).tolist() == list(range(1000))


def test_logs_are_in_range_and_users_in_one_split(world):
    splits = [world.pretrain, world.posttrain, world.valid, world.test]
    for split in splits:
        bought = np.column_stack([split.history, split.target])
        assert bought.min() >= 0 and bought.max() < 1000
        assert all(len(set(row)) == 9 for row in bought)  # nothing is bought twice
    tastes = np.concatenate([split.taste for split in splits])
    assert len(np.unique(tastes, axis=0)) == len(tastes)
    assert world.shown.shape == world.clicked.shape == (40_000, 10)
    assert world.exposure.sum() == world.shown.size and world.shown.max() < 1000
    assert not world.true_click_probability(world.test.taste[:1], np.array([[-1]])).any()


def test_gumbel_top_k_draws_from_the_softmax():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    drawn = gumbel_top_k(np.random.default_rng(0), np.tile(logits, (20_000, 1)), 2)
    assert np.bincount(drawn[:, 0]) / 20_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.018)
    assert (drawn[:, 0] != drawn[:, 1]).all()


def test_premise_and_its_negative_control(world, shop):
    """The ranker is near chance on what the feed hid; with bias 0 nothing is hidden, no slope."""
    auc, niche = adagrpo.ranker_auc(shop, world.test).numpy(), world.niche[world.test.target]
    assert world.exposure[world.niche].mean() < 0.01 * world.exposure[~world.niche].mean()
    assert auc[~niche].mean() > 0.85
    assert auc[niche].mean() < 0.65
    fair = make_world(3, bias=0, pretrain=400, posttrain=800, valid=60, test=600, feed=40_000)
    assert (fair.test.history == world.test.history).all()  # the bias touches impressions alone
    torch.manual_seed(0)
    ranker = adagrpo.train_ranker(fair, Config(ranker_epochs=2), CPU)
    auc = adagrpo.ranker_auc(Shop(fair, ranker, CPU), fair.test).numpy()
    assert abs(auc[niche].mean() - auc[~niche].mean()) < 0.04


# ------------------------------------------------------------------------- training, command


def test_training_is_deterministic_and_raises_the_reward(shop):
    """Fifty steps of a mixture raise the ranker's mean reward by more than a tenth."""
    torch.manual_seed(0)
    start = adagrpo.pretrain(shop, Config(pretrain_epochs=30))
    config = Config(steps=50, batch=16, group=8, checkpoints=5)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(adagrpo.train(start, shop, "mix-1", config))
    assert results[0]["log"] == results[1]["log"]
    assert_close(results[0]["final"], results[1]["final"], rtol=0, atol=0)
    rewards = [entry["reward"] for entry in results[0]["log"]]
    assert rewards[-1] > 1.1 * rewards[0]


def test_step_cost(shop):
    """B=64: G=16 costs at most 2.6 plain NLL steps, and doubling G less than doubles the cost."""
    torch.manual_seed(0)
    policy, seconds, rows = Policy(64), {}, slice(0, 64)
    update = adagrpo.Updates(policy, 1e-4, 100, "step")
    cases = {"nll": ("nll", 16), "16": ("adagrpo", 16), "32": ("adagrpo", 32)}
    for turn in range(60):  # in turn, so that a slow moment of the machine hits all of them
        for name, (arm, group) in cases.items():
            start = time.perf_counter()
            update(adagrpo.objective(policy, shop, arm, Config(group=group), rows)[0])
            seconds.setdefault(name, []).append(time.perf_counter() - start)
        nll, small, large = (min(seconds[name]) for name in cases)
        if turn > 8 and small < 2.6 * nll and large < 2 * small:
            break
    assert small < 2.6 * nll
    assert large < 2 * small


def test_every_arm_takes_its_own_samples():
    hard, clear = torch.tensor([1, 1, 0, 0] * 8).bool(), torch.tensor([1, 0, 1, 0] * 8).bool()
    both = hard & clear
    masks = {name: rule(both, hard, clear, clear) for name, rule in adagrpo.RULES.items()}
    share = {name: mask.float().mean().item() for name, mask in masks.items()}
    quarter = {"adagrpo", "random", "reweight", "easy+clear", "hard+blind", "easy+blind"}
    assert {name for name in share if share[name] == 0.25} == quarter
    assert share["nll"] == 0 and share["mix"] == share["grpo"] == 1 and share["inverted"] == 0.75
    assert sum(masks[c].int() for c in (*adagrpo.CELL_ARMS, "adagrpo")).eq(1).all()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--arms", "magic"], "unknown arm 'magic'"),
        (["--arms", "mix--1"], "unknown arm"),
        (["--device", "abacus"], "abacus"),
        (["--group", "1"], "group"),
        (["--min-margin", "2"], "min_margin"),
        (["--weight", "-1"], "weight must"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_settings_end_before_any_work(argv, words):
    with pytest.raises(SystemExit, match=re.escape(words)):
        adagrpo.main(argv)


def test_world_names_the_size_that_is_too_small():
    for name in ("test", "pretrain", "feed", "items"):
        with pytest.raises(ValueError, match=name):
            make_world(0, **{name: 0})


def test_an_interrupted_run_leaves_no_file_and_a_finished_one_is_not_redone(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adagrpo.keep(tmp_path / "arm.pt", interrupted)
    assert not list(tmp_path.iterdir())
    assert adagrpo.keep(tmp_path / "arm.pt", lambda: {"figure": 1}) == {"figure": 1}
    assert adagrpo.keep(tmp_path / "arm.pt", interrupted) == {"figure": 1}


def test_the_whole_path_resumes_and_prints_the_same(tmp_path, monkeypatch, capsys):
    sizes = {"pretrain": 150, "valid": 40, "test": 60, "feed": 2048}
    monkeypatch.setattr(adagrpo, "QUICK_WORLD", sizes)
    argv = [
        "--quick",
        "--study",
        "--steps",
        "2",
        "--checkpoints",
        "1",
        "--batch",
        "4",
        "--group",
        "4",
    ]
    argv += ["--out", str(tmp_path / "a"), "--pretrain-epochs", "1", "--ranker-epochs", "1"]
    adagrpo.main(argv)
    first = capsys.readouterr().out
    monkeypatch.setattr(adagrpo, "train", None)  # all is stored: nothing may be trained again
    adagrpo.main(argv)
    assert capsys.readouterr().out == first
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert len(results["runs"]) == len(adagrpo.STUDY) + 6 and len(results["claims"]) > 40
    assert not list(tmp_path.glob("*/*.draft"))
    with pytest.raises(SystemExit, match="other settings"):
        adagrpo.main([*argv, "--lr", "0.01"])


def test_readme_snippet_prints_what_the_readme_says():
    text = (Path(__file__).parent / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", text, re.DOTALL).groups()
    run = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    ran = run([sys.executable, "-c", code], check=True)
    assert ran.stdout == printed


def test_interval_against_hand_calculation():
    """Two seeds 1 and 3: mean 2, sd sqrt 2, t(1) = 12.71, so 12.71 * sqrt 2 / sqrt 2."""
    mean, half = adagrpo.estimate([torch.tensor([0.0, 2.0]), torch.tensor([3.0])])
    assert (mean, half) == pytest.approx((2.0, 12.71))
