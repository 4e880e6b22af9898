# SPDX-License-Identifier: MIT
"""Tests of study.py: its rules and figures by hand, a tiny study for real, its file."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evidence
import study
from study import Config, Gate, Lists, Policy, Scored, Split, adagrpo, toy_data

torch.set_num_threads(1)

# Of 60 test users a stratum may have none; its figures are nan.
pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty", "ignore:invalid value")

TINY = {"users": 16, "epochs": 1, "group": 8, "min_discriminability": 0.0}
TINY |= {"lr": 0.01}  # there are two steps, and the rate warms up for twenty
TINY |= {"pretrain_batch": 16, "pretrain_lr": 0.01, "pretrain_epochs": 4}
TINY |= {"ranker_batch": 64}
CONFIG = Config(seed=7, **TINY)
WORLD = {"slates": 500, "viewers": 300, "ranker": "clicks"}
WORLD |= {"season_correlation": 0.5, "max_grad_norm": 1.0}


@pytest.fixture(scope="module", autouse=True)
def few_users():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "TEST_USERS", 60)
        patch.setattr(study, "VALIDATION_USERS", 40)
        patch.setattr(adagrpo, "MAX_GRAD_NORM", 1.0)  # put back, whoever sets it
        yield


@pytest.fixture(scope="module")
def prepared(few_users):
    """A shop, the policy at the start, a ranker."""
    return study.prepare(CONFIG, WORLD)


def spy(monkeypatch, module, name: str) -> list:
    """What a function returns from now on."""
    returned = []
    original = getattr(module, name)

    def function(*arguments, **keywords):
        returned.append(original(*arguments, **keywords))
        return returned[-1]

    monkeypatch.setattr(module, name, function)
    return returned


# -------------------------------------------------------------------------------- arms


def test_an_arm_is_a_rule_a_weight_and_settings():
    config = Config(weight=5.0)
    assert study.parse_arm("nll", config) == ("nll", 5.0, config, study.EXTRA)
    assert study.parse_arm("mix-0.3", config)[:2] == ("mix", 0.3)
    assert study.parse_arm("gated-distil", config)[:2] == ("gated-distil", 5.0)

    arm = study.parse_arm("gated-distil-10,w=4,epochs=6,lr=1e-3,draws=8", config)
    assert (arm.rule, arm.weight) == ("gated-distil", 10.0)
    assert arm.config == replace(config, epochs=6, lr=1e-3)
    assert arm.extra == study.EXTRA | {"w": 4.0, "draws": 8}
    assert type(arm.config.epochs) is type(arm.extra["draws"]) is int
    assert config == Config(weight=5.0)
    assert study.EXTRA["w"] == 8.0


@pytest.mark.parametrize(
    "text", ["adagrpo,bias=0", "nll,seed=9", "mix-nan", "mix--1", "nll,epochs=0", "x"]
)
def test_what_an_arm_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match=f"{text.split(',')[0][:3]}|weight|epochs"):
        study.parse_arm(text, CONFIG)


def test_every_arm_of_the_evidence_parses():
    arms = [study.parse_arm(text, CONFIG) for text in evidence.ARMS]
    assert {"before", "nll", "mix", "distil", "random"} < {arm.rule for arm in arms}


def test_there_is_a_rule_for_every_name(prepared):
    shop, _, _ = prepared
    assert tuple(sorted(study.make_rules(shop, []))) == tuple(sorted(study.RULES))


# ------------------------------------------------------------------------------- rules


def test_rules_by_hand():
    """Four samples: hard, hard and flat, hard and flat, easy. Rewards 0 and 1 spread by
    0.5; r(y) is 0.5, 0.05, 0.1, 0.5; the first and the third are trend users.
    """
    users = Split(np.arange(12).reshape(4, 3), np.zeros(4), np.array([0, 2, 0, 1]))
    shop = SimpleNamespace(kinds=toy_data.KINDS, posttrain=users)
    hard = torch.tensor([True, True, True, False])
    clear = torch.tensor([True, False, False, True])
    gate = Gate(hard & clear, hard, clear, None, None)
    scored = SimpleNamespace(
        rewards=torch.tensor([[0.0, 1.0], [0.2, 0.2], [0.3, 0.39], [0.0, 1.0]]),
        target_reward=torch.tensor([0.5, 0.05, 0.1, 0.5]),
    )
    expected = {"mix": [0, 1, 2, 3], "distil": [0, 1, 2, 3]}
    expected |= {"difficulty": [0, 1, 2], "discriminability": [0, 3]}
    expected |= {"adagrpo": [0], "gated-distil": [0]}
    expected |= {"spread": [0], "level": [0, 2], "oracle": [0, 2]}

    rules = study.make_rules(shop, [(torch.as_tensor(users.history), scored)])
    for name, samples in expected.items():
        taken = rules[name](gate)
        assert taken.dtype == torch.bool
        assert taken.nonzero().flatten().tolist() == samples, name
    for name in ("nll", "clicks", "whole", "diagnosis", "before"):
        assert rules[name] is None


def test_the_random_rule_takes_as_many_as_the_gate_and_others(prepared):
    """A third of them by chance: 90 of 300, within 5 standard deviations of 7."""
    shop, _, _ = prepared
    admit = torch.arange(1000) < 300
    gate = Gate(admit, admit, admit, None, None)
    torch.manual_seed(0)
    taken = study.make_rules(shop, [])["random"](gate)
    assert taken.sum() == 300
    assert 55 < (taken & admit).sum() < 125


def test_a_tally_counts_by_hand():
    """Of four samples three are admitted; one of these groups lacks its target, in two
    a negative outscores it.
    """
    admit = torch.tensor([True, True, True, False])
    scored = SimpleNamespace(
        hit=torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]]).bool(),
        rewards=torch.tensor([[0.5, 0.6], [0.1, 0.5], [0.6, 0.1], [0.9, 0.9]]),
        target_reward=torch.tensor([0.5, 0.5, 0.5, 0.5]),
    )
    tally = study.Tally(lambda gate: admit, [(None, scored)])
    assert torch.equal(tally(None), admit)
    expected = {"admitted": 75, "absent": 100 / 3, "outscored": 200 / 3}
    assert tally.figures() == pytest.approx(expected)


def test_misses_count_hits_wherever_they_stand():
    """Four draws: one hit, standing first; two hits; none. In an order 0, 1/4, 1."""
    hit = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    rewards = torch.full((3, 4), 0.25)
    valid = torch.ones(3, 4, dtype=torch.bool)
    scored = Scored(None, None, hit, valid, rewards, torch.full((3,), 0.5))
    gate = study.misses(scored, replace(CONFIG, min_difficulty=0.75))
    assert gate.difficulty.tolist() == [0.75, 0.5, 1.0]
    assert gate.admit.tolist() == [True, False, True]
    assert gate.discriminability.tolist() == [0.25, 0.25, 0.25]
    gate = study.misses(scored, replace(CONFIG, min_discriminability=0.3))
    assert not gate.admit.any()


def test_distil_loss_by_hand():
    """p is 2/3, 1/3 within the group; exp(w r) doubles the second: both 1/2."""
    logp = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
    loss = study.distil_loss(logp, torch.tensor([[0.0, 0.5]]), w=2 * math.log(2))
    assert loss.item() == pytest.approx(-0.5 * math.log(2 / 3) - 0.5 * math.log(1 / 3))
    loss.sum().backward()
    assert_close(logp.grad, torch.tensor([[1 / 6, -1 / 6]]))


@pytest.mark.parametrize(("w", "scale"), [(0.0, 1.0), (8.0, 0.0)])
def test_distilling_teaches_nothing_without_rewards_that_differ(w, scale):
    torch.manual_seed(0)
    logp = torch.randn(3, 5, requires_grad=True)
    rewards = 0.5 + scale * torch.rand(3, 5)
    study.distil_loss(logp, rewards, w).sum().backward()
    assert_close(logp.grad, torch.zeros(3, 5), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------- draws

ALL_IDS = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)


@pytest.fixture
def four_tokens() -> Policy:
    """A policy of 4 tokens, far from uniform, and a catalogue of 6 of the 64 IDs."""
    torch.manual_seed(0)
    IDs = [[0, 1, 2], [0, 2, 2], [1, 0, 2], [2, 2, 2], [3, 2, 2], [3, 2, 1]]
    policy = Policy(torch.tensor(IDs), history_length=2, width=16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.4)
    return policy


def exact(policy: Policy, history: Tensor) -> np.ndarray:
    """The probabilities (64,) of all IDs for the one history (K,)."""
    prompt = policy.prompt(history[None]).expand(64, -1)
    return adagrpo.log_prob(policy, prompt, ALL_IDS).exp().detach().numpy()


def assert_drawn_from(tokens: Tensor, probability: np.ndarray) -> None:
    """Chi-square, at 5 standard deviations; IDs that are expected rarely are one."""
    number = tokens.reshape(-1, 3) @ torch.tensor([16, 4, 1])
    count = np.bincount(number.numpy(), minlength=64)
    assert count[probability == 0].sum() == 0
    expected = len(number) * probability
    rare = expected < 5
    count = np.append(count[~rare], count[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1))
    chi_square = ((count - expected) ** 2 / expected).sum()
    cells = len(expected)
    assert cells > 15
    assert chi_square < cells + 5 * math.sqrt(2 * cells)


@torch.no_grad()
def test_draws_follow_the_policy(four_tokens):
    """4000 draws for each of two users."""
    history = torch.tensor([[0, 3], [4, 2]]).repeat(20, 1)
    prompt = four_tokens.prompt(history)
    tokens, logp = study.draw(four_tokens, prompt, 200)
    assert tokens.shape == (40, 200, 3)
    for user in (0, 1):
        assert_drawn_from(tokens[user::2], exact(four_tokens, history[user]))
    separate = adagrpo.log_prob(
        four_tokens, prompt.repeat_interleave(200, dim=0), tokens.flatten(0, 1)
    )
    assert_close(logp.flatten(), separate)


def test_drawn_groups_follow_what_the_user_has_not_bought(four_tokens, monkeypatch):
    """3 draws for each of 1200 users of one history; most IDs name no item."""
    pieces = spy(monkeypatch, study, "draw")
    history = torch.tensor([[1, 3, 4]]).expand(1200, -1)
    target = torch.tensor([0, 1, 2, 5]).repeat(300)  # 1 has been bought: never a hit
    table = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    scored = study.draw_and_score(
        four_tokens, study.Table(table), history, target, group=3
    )
    assert scored.tokens.shape == (1200, 3, 3)
    assert len(pieces) > 1, "nothing had to be drawn again"

    probability = exact(four_tokens, history[0])
    for item in history[0]:
        probability[(ALL_IDS == four_tokens.item_tokens[item]).all(1)] = 0
    assert probability.sum() < 0.97, "hardly anything was bought"
    assert_drawn_from(scored.tokens, probability / probability.sum())

    prompt = four_tokens.prompt(history)
    for place in range(3):
        logp = adagrpo.log_prob(four_tokens, prompt, scored.tokens[:, place])
        assert_close(scored.logp[:, place], logp)
    assert scored.logp.requires_grad
    assert scored.hit.any()
    for user in range(1200):
        assert scored.target_reward[user].item() == pytest.approx(table[target[user]])
        for place, ID in enumerate(scored.tokens[user].tolist()):
            item = four_tokens.item_of.get(tuple(ID), -1)
            reward = table[item] if item >= 0 else 0.0
            assert scored.valid[user, place] == (item >= 0)
            assert scored.hit[user, place] == (item == target[user])
            assert scored.rewards[user, place].item() == pytest.approx(reward)


# ---------------------------------------------------------------------- what arms train


def trained(text: str, prepared, config: Config = CONFIG) -> tuple[Policy, dict]:
    shop, start, ranker = prepared
    return study.post_trained(study.parse_arm(text, config), shop, start, ranker)


def distance(one: Policy, other: Policy) -> float:
    """The largest difference of a weight."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_arms_of_adagrpo_are_trained_as_there(prepared):
    shop, start, ranker = prepared
    kept = torch.cat([weights.flatten().clone() for weights in start.parameters()])
    for name, (rule, weight) in adagrpo.make_arms(CONFIG).items():
        policy, training = trained(name, prepared)
        theirs, _ = trained("before", prepared)
        assert distance(theirs, start) == 0
        dose = adagrpo.post_train(theirs, ranker, shop.posttrain, rule, weight, CONFIG)
        assert distance(policy, start) > 1e-4
        assert distance(policy, theirs) == 0, name
        if training:
            assert training["weight"] * training["admitted"] / 100 == pytest.approx(
                dose
            )
    same = torch.cat([weights.flatten() for weights in start.parameters()])
    assert torch.equal(same, kept)


def test_weight_settings_and_w_reach_the_training(prepared):
    """Without weight nothing is added to NLL; and nothing stays patched."""
    names = ("grpo_loss", "gate_of", "roll_out_and_score")
    before = [getattr(adagrpo, name) for name in names]
    nll, _ = trained("nll", prepared)
    for text in ("mix-0", "distil-0"):
        assert distance(trained(text, prepared)[0], nll) < 1e-5, text
    others = [nll]
    for text in ("mix-1", "mix-3", "distil-3", "distil-3,w=2", "nll,lr=1e-3", "whole"):
        policy, _ = trained(text, prepared)
        assert min(distance(policy, other) for other in others) > 1e-5, text
        others.append(policy)
    assert [getattr(adagrpo, name) for name in names] == before


def test_drawn_groups_reach_the_training(prepared, monkeypatch):
    """The target is what the policy would write, so that draws hit it. One hit of 12 is
    hard, 11 / 12 >= 0.9, wherever it stands.
    """
    shop, start, ranker = prepared
    history = torch.as_tensor(shop.posttrain.history)
    target = torch.as_tensor(shop.posttrain.target)
    with torch.no_grad():
        beams = adagrpo.roll_out_and_score(start, ranker, history, target, 32)
    first = beams.valid.int().argmax(1)  # the likeliest that names an item
    target = start.items_of(beams.tokens)[torch.arange(len(first)), first]
    users = Split(shop.posttrain.history, target.numpy(), shop.posttrain.kind)

    groups = spy(monkeypatch, study, "draw_and_score")
    arm = study.parse_arm("adagrpo-2,draws=12,min_difficulty=0.9", CONFIG)
    _, training = study.post_trained(arm, replace(shop, posttrain=users), start, ranker)
    admitted = with_one_hit = 0
    for scored in groups:
        assert scored.hit.shape == (CONFIG.batch, 12)
        for user in range(CONFIG.batch):
            negative = scored.valid[user] & ~scored.hit[user]
            mean = scored.rewards[user, negative].mean()
            if scored.hit[user].sum() <= 1 and scored.target_reward[user] >= mean:
                admitted += 1
                with_one_hit += int(scored.hit[user].sum())
    assert with_one_hit > 0
    assert training["admitted"] == 100 * admitted / CONFIG.users
    assert training["weight"] == 2


def test_clicks_are_learned_and_nothing_else_of_the_feed(prepared, monkeypatch):
    shop, start, _ = prepared
    calls = []
    monkeypatch.setattr(adagrpo, "post_train", lambda *call: calls.append(call))
    arm = study.parse_arm("clicks,steps=3,click_lr=0.5,passes=2", CONFIG)
    study.learn_clicks(start, shop, arm)
    ((policy, _, split, rule, _, config),) = calls
    assert policy is start
    assert rule is None
    assert (config.lr, config.epochs, config.batch) == (0.5, 2, CONFIG.pretrain_batch)

    clicked = []
    for user, items, clicks in zip(
        shop.feed_history.tolist(), shop.shown, shop.clicked, strict=True
    ):
        clicked += [(*user, item) for item in items[clicks].tolist()]
    learned = np.column_stack([split.history, split.target]).tolist()
    assert len(learned) == 3 * CONFIG.pretrain_batch < len(clicked)
    for row in learned:
        clicked.remove(tuple(row))  # ValueError: not clicked, or learned twice


@pytest.mark.parametrize(
    ("name", "times"), [("adagrpo-2,clicks=1", 1), ("clicks", 1), ("adagrpo", 0)]
)
def test_any_arm_can_learn_the_clicks_first(prepared, monkeypatch, name, times):
    shop, start, ranker = prepared
    order = []
    monkeypatch.setattr(study, "learn_clicks", lambda *_: order.append("clicks"))
    monkeypatch.setattr(adagrpo, "post_train", lambda *_: order.append("post"))
    study.post_trained(study.parse_arm(name, CONFIG), shop, start, ranker)
    assert order == ["clicks"] * times + ["post"]


def test_whole_sequences_are_learned(prepared):
    """The likelihood of every purchase that the policy can read rises, not only of the
    last.
    """
    shop, start, _ = prepared
    split = shop.posttrain
    purchases = torch.as_tensor(np.column_stack([split.history, split.target]))
    purchases = purchases[:, -start.history_length - 1 :]

    def likelihood(policy: Policy, place: int) -> float:
        prompt = policy.prompt(purchases[:, :place])
        item = policy.item_tokens[purchases[:, place]]
        return adagrpo.log_prob(policy, prompt, item).mean().item()

    policy, _ = trained("before", prepared)
    study.learn_whole(policy, shop, replace(CONFIG, epochs=5, lr=1e-3))
    for place in (1, 4, 8):
        assert likelihood(policy, place) > likelihood(start, place) + 0.1


# --------------------------------------------------------------------------- the world


def test_a_table_is_a_ranker_without_users():
    table = study.Table(np.array([0.5, 0.25, 0.125]))
    items = torch.tensor([[2, 0], [1, 1]])
    scores = table.click_probability(torch.zeros(2, 8), items)
    assert scores.tolist() == [[0.125, 0.5], [0.25, 0.25]]


def test_shown_and_clicked_are_counted_by_hand():
    """Item 1 was shown three times and clicked twice: 3 / 23; item 3 never: 1 / 20."""
    shop = SimpleNamespace(
        tokens=np.zeros((4, 3)),
        shown=np.array([[0, 1], [1, 2], [2, 1]]),
        clicked=np.array([[False, True], [True, False], [True, False]]),
    )
    assert study.times_shown(shop).tolist() == [1, 3, 2, 0]
    assert study.click_rates(shop) == pytest.approx([1 / 21, 3 / 23, 2 / 22, 1 / 20])


def test_a_world_of_its_own(monkeypatch):
    """With correlation 1 no quality changes; a ranker of noise is not trained, and its
    scores differ; one of exposure counts, and one of rates divides.
    """
    monkeypatch.setattr(adagrpo, "train_ranker", None)  # a call would fail
    monkeypatch.setattr(adagrpo, "pretrain", lambda shop, config: None)
    qualities = spy(monkeypatch, toy_data, "make_qualities")
    world = WORLD | {"slates": 123, "viewers": 77, "season_correlation": 1.0}
    shop, _, ranker = study.prepare(CONFIG, world | {"ranker": "noise"})
    assert len(shop.shown) == len(shop.feed_history) == 123
    splits = (shop.pretrain, shop.posttrain, shop.validation, shop.test)
    assert [len(split.target) for split in splits] == [77 + 16, 16, 40, 60]
    assert np.allclose(*qualities[0])
    history = torch.as_tensor(shop.test.history)
    assert ranker.click_probability(history, history).std(1).min() > 0.01

    shop, _, ranker = study.prepare(CONFIG, WORLD | {"ranker": "exposure"})
    assert not np.allclose(*qualities[1])
    rarely, often = np.argsort(study.times_shown(shop))[[0, -1]]
    scores = ranker.click_probability(None, torch.tensor([[rarely, often]]))
    assert 0 <= scores[0, 0] < scores[0, 1] == 1

    shop, _, ranker = study.prepare(CONFIG, WORLD | {"ranker": "rates"})
    scores = ranker.click_probability(None, torch.tensor([[rarely, often]]))[0]
    assert scores.numpy() == pytest.approx(study.click_rates(shop)[[rarely, often]])


def test_everybodys_histories_are_pre_trained_on(monkeypatch):
    """Nine purchases of each user as 8 + 1, and nobody's target."""
    monkeypatch.setattr(adagrpo, "train_ranker", lambda shop, config: None)
    monkeypatch.setattr(adagrpo, "pretrain", lambda shop, config: shop)
    fair, _, _ = study.prepare(CONFIG, WORLD)
    shop, given, _ = study.prepare(CONFIG, WORLD | {"everybody": True})
    assert given is shop
    rows = np.column_stack([shop.pretrain.history, shop.pretrain.target])
    old = np.column_stack([fair.pretrain.history, fair.pretrain.target])
    new = np.concatenate([shop.validation.history, shop.test.history])
    assert np.array_equal(rows, np.concatenate([old, new]))
    assert len(shop.pretrain.kind) == len(rows)


@pytest.mark.parametrize("correlation", [0.5, 0.0])
def test_simulated_clicks_by_the_truth_of_the_test_users(monkeypatch, correlation):
    """The same tastes and qualities as in the shop, and the formulas user by user."""
    world = WORLD | {"season_correlation": correlation}
    monkeypatch.setattr(adagrpo, "pretrain", lambda shop, config: None)
    qualities = spy(monkeypatch, toy_data, "make_qualities")
    catalogues = spy(monkeypatch, toy_data, "make_catalogue")
    users = spy(monkeypatch, toy_data, "make_users")
    shop, _, _ = study.prepare(CONFIG, world | {"ranker": "noise"})
    items = np.random.default_rng(0).integers(-1, 1000, size=(60, 10))
    items[:, 3] = -1
    figures = study.simulated_clicks(CONFIG, world, items)

    split, taste = users[-1]
    assert np.array_equal(split.history, shop.test.history)
    assert np.array_equal(split.target, shop.test.target)
    _, quality = qualities[0]
    for user in range(60):
        clicks = dwell = 0.0
        for item in items[user]:
            if item >= 0:
                liking = (taste[user] * catalogues[0].embedding[item]).sum()
                appeal = liking + quality[item]
                click = 1 / (1 + math.exp(-10 * (appeal - 0.9)))
                clicks += click / 10
                dwell += click * 60 * max(appeal, 0) / 10
        assert figures["ctr"][user] == pytest.approx(clicks, rel=1e-4)
        assert figures["dwell"][user] == pytest.approx(dwell, rel=1e-4, abs=1e-9)


# ----------------------------------------------------------------------------- figures


def made_up_lists(users: int = 30, items: int = 50, places: int = 14) -> Lists:
    rng = np.random.default_rng(1)
    lists = rng.permuted(np.tile(np.arange(items), (users, 1)), axis=1)[:, :places]
    lists[rng.random(lists.shape) < 0.2] = -1
    hit = (lists >= 0) & (lists == lists.max(1, keepdims=True))
    logp = -np.sort(rng.exponential(size=lists.shape), axis=1)
    return Lists({}, lists, hit, logp, rng.random(lists.shape))


def test_a_table_at_serving_against_a_slow_loop():
    """A hallucination scores 0, not what stands last in the table."""
    lists = made_up_lists()
    table = np.append(np.random.default_rng(2).random(49), 100.0)
    expected = []
    for items, hit, logp in zip(lists.items, lists.hit, lists.logp, strict=True):
        scores = [table[item] if item >= 0 else 0 for item in items]
        order = sorted(range(14), key=lambda i: -(logp[i] + 3 * scores[i]))
        expected.append(any(hit[i] for i in order[:10]))
    assert 0 < sum(expected) < 30
    assert study.hr_by_table(lists, table, 3).tolist() == expected
    alone = study.hr_by_table(lists, table, 0).tolist()
    assert alone == lists.hit[:, :10].any(1).tolist() != expected


def test_lists_without_hallucinations_against_a_slow_loop():
    lists = made_up_lists()
    expected = []
    for items, hit in zip(lists.items, lists.hit, strict=True):
        kept = [is_hit for item, is_hit in zip(items, hit, strict=True) if item >= 0]
        expected.append(any(kept[:10]))
    assert study.hr_of_items(lists).tolist() == expected
    assert lists.hit[:, :10].any(1).tolist() != expected


def test_lists_are_the_beams_of_each_user(prepared):
    """More users than evaluate takes at once; fused as in adagrpo.py."""
    shop, policy, ranker = prepared
    users = Split(*[np.tile(x.T, 3).T for x in vars(shop.test).values()])  # 180 users
    lists = study.lists_of(policy, ranker, users, CONFIG)
    assert lists.items.shape == lists.rewards.shape == (180, 32)
    for user in (0, 127, 128, 179):
        one = torch.arange(user, user + 1)
        history = torch.as_tensor(users.history)[one]
        target = torch.as_tensor(users.target)[one]
        with torch.no_grad():
            scored = adagrpo.roll_out_and_score(policy, ranker, history, target, 32)
        assert lists.items[user].tolist() == policy.items_of(scored.tokens)[0].tolist()
        assert lists.logp[user] == pytest.approx(scored.logp[0].numpy(), abs=1e-4)
        assert lists.rewards[user] == pytest.approx(scored.rewards[0].numpy(), abs=1e-4)
    for w in adagrpo.FUSION_WEIGHTS:
        order = study.order_by(lists, lists.rewards, w)
        hit = np.take_along_axis(lists.hit, order, axis=1)[:, :10].any(1)
        assert lists.metrics[f"hr@10, w={w}"].bool().tolist() == hit.tolist()


def test_groups_are_of_the_users_side_by_hand():
    """Nine users, ever surer. The feed showed item i i times, so their histories were
    shown seldom, middling, often; middling, middling, often; seldom, seldom, often.
    """
    seen = np.array([0, 4, 8, 3, 5, 7, 1, 2, 6])
    shop = SimpleNamespace(
        kinds=("even", "odd"),
        tokens=np.zeros((9, 3)),
        shown=np.repeat(np.arange(9), np.arange(9)).reshape(9, 4),
        test=Split(np.stack([seen, seen], axis=1), seen, np.arange(9) % 2),
    )
    logp = np.stack([np.linspace(-9, -1, 9), np.zeros(9)], axis=1)
    before = Lists({}, None, None, logp, None)
    masks = study.groups_of(shop, before)
    groups = [set() for _ in range(9)]
    for name, mask in masks.items():
        for user in np.flatnonzero(mask):
            groups[user].add(name)
    assert groups[0] == {"all", "even", "unsure, seldom"}
    assert groups[2] == {"all", "even", "unsure, often"}
    assert groups[4] == {"all", "even", "middle, middle"}
    assert groups[5] == {"all", "odd", "middle, often"}
    assert groups[6] == {"all", "even", "sure, seldom"}
    assert groups[8] == {"all", "even", "sure, often"}

    shop.test.target = shop.test.target[::-1].copy()  # other purchases, same groups
    for name, mask in study.groups_of(shop, before).items():
        assert np.array_equal(mask, masks[name])


def test_figures_take_their_weights_from_validation():
    """Validation: w = 4 is best, and a table hurts. Test: w = 4 is worst, a table helps.
    Item 0 is clicked always, others never; 12 places, the target stands first or last.
    """
    target, clicked = 5, 0
    shop = SimpleNamespace(
        tokens=np.zeros((1000, 3)),
        shown=np.full((1, 10), clicked),
        clicked=np.ones((1, 10), dtype=bool),
        test=Split(np.full((2, 8), 999), np.array([target, clicked]), np.zeros(2)),
    )
    metrics = {f"hr@10, w={w}": torch.ones(2) for w in adagrpo.FUSION_WEIGHTS}
    for name in ("ndcg@10", "hallucination", "hard", "clear", "admit"):
        metrics[name] = torch.tensor([0.0, 1.0])
    items = np.array([[5, *range(10, 20), 0], [*range(10, 21), 0]])
    logp = np.tile(np.linspace(-1, -1.1, 12), (2, 1))
    rewards = np.array([[*[0.0] * 11, 1.0]] * 2)  # fused, the last comes first
    test = Lists(metrics, items, items == [[5], [0]], logp, rewards)
    test = test._replace(metrics=metrics | {"hr@10, w=4": torch.tensor([0.0, 1.0])})
    worse = {name: torch.zeros(2) for name in metrics} | {"hr@10, w=4": torch.ones(2)}
    # In the lists of validation the target is pushed from place 10 by the table.
    items = np.array([[*range(10, 19), 5, 20, 0]] * 2)
    validation = Lists(worse, items, items == 5, logp, rewards)

    masks = {"all": np.array([True, True]), "second": np.array([False, True])}
    figures = study.figures_of(CONFIG, WORLD, shop, validation, test, masks)
    everybody = figures["all"]
    assert everybody["hr@10"] == 100
    assert everybody["hr@10 fused"] == 50
    assert everybody["hr@10 table"] == 50  # 100 with the weight that is best for test
    assert everybody["recall@32"] == 100
    assert everybody["bought"] == 0
    assert (everybody["share"], figures["second"]["share"]) == (100, 50)
    assert figures["second"]["ndcg@10"] == 100
    truth = study.simulated_clicks(CONFIG, WORLD, test.items[:, :10])
    assert everybody["ctr"] == pytest.approx(100 * truth["ctr"].mean(), abs=1e-4)
    assert everybody["dwell"] == pytest.approx(truth["dwell"].mean(), abs=1e-4)
    assert figures["second"]["dwell"] == pytest.approx(truth["dwell"][1], abs=1e-4)
    fused = np.column_stack([test.items[:, 11], test.items[:, :9]])
    truth = study.simulated_clicks(CONFIG, WORLD, fused)
    assert everybody["ctr fused"] == pytest.approx(100 * truth["ctr"].mean(), abs=1e-4)


# ------------------------------------------------------------------- a study for real

ARMS = ["before", *evidence.FIRST, "mix-1", "clicks,steps=2", "oracle-2", "diagnosis"]
ARMS += ["adagrpo-2,draws=8"]


def command(file: Path, *options: str) -> list[str]:
    """A tiny study's, of seed 7 unless said; later options win."""
    tiny = {name: value for name, value in WORLD.items()} | TINY
    pairs = [(f"--{name}", str(value)) for name, value in tiny.items()]
    defaults = [word for pair in pairs for word in pair]
    return [*defaults, "--seeds", "7", "--out", str(file), *options]


def lines_of(file: Path) -> list[dict]:
    """The records; every line is whole."""
    text = file.read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The file of a tiny study of all these arms, in two commands."""
    file = tmp_path_factory.mktemp("study") / "new" / "a.jsonl"
    study.main(command(file, "--arms", "nll", "before", "nll", "--seeds", "7", "7"))
    first = file.read_bytes()
    study.main(command(file, "--arms", *ARMS))
    assert file.read_bytes().startswith(first)  # nothing is written again
    return file


def test_a_study_goes_on_and_runs_nothing_twice(run):
    records = lines_of(run)
    arms = [record["arm"] for record in records]
    assert arms == ["nll", *[arm for arm in ARMS if arm != "nll"]]
    for record in records:
        assert record["seed"] == 7
        assert {"seed": 7} | record["world"] == vars(CONFIG) | WORLD
    before = run.read_bytes()
    study.main(command(run, "--arms", *ARMS))
    assert run.read_bytes() == before


def test_the_same_command_gives_the_same_figures_in_any_order(run, tmp_path):
    """Nothing that an arm draws or patches reaches the next one."""
    file = tmp_path / "b.jsonl"
    arms = ["adagrpo-2,draws=8", "random", "clicks,steps=2", "mix-1", "nll"]
    study.main(command(file, "--arms", *arms))
    first = {record["arm"]: json.dumps(record["figures"]) for record in lines_of(run)}
    assert len(set(first.values())) == len(ARMS)
    for record in lines_of(file):
        assert json.dumps(record["figures"]) == first[record["arm"]], record["arm"]


def test_the_figures_of_groups_make_up_those_of_all(run):
    by_arm = {record["arm"]: record["figures"] for record in lines_of(run)}
    assert {"all", *toy_data.KINDS, *evidence.STRATA} < by_arm["before"].keys()
    assert "training" not in by_arm["before"]
    assert by_arm["adagrpo"]["training"]["weight"] == 5
    answer = by_arm["diagnosis"]["diagnosis"]
    assert answer.split()[0].strip(".:,") in ("Yes", "No", "Undecided")

    sizes = {"posttrain": 16, "feed": 1, "viewers": 1}
    kind = toy_data.make_shop(7, CONFIG.bias, sizes).posttrain.kind
    trend = 100 * np.mean(kind == toy_data.KINDS.index("trend"))
    assert by_arm["oracle-2"]["training"]["admitted"] == trend
    assert by_arm["mix-1"]["training"]["admitted"] == 100
    same = (by_arm[arm]["training"]["admitted"] for arm in ("random", "adagrpo"))
    assert math.isclose(*same, abs_tol=20)  # the same gate while policies are alike

    everybody = by_arm["nll"]["all"]
    assert 0 < everybody["hr@10"] <= everybody["recall@32"] < everybody["share"] == 100
    for groups in (toy_data.KINDS, evidence.STRATA):
        for name in ("hr@10", "ctr", "dwell", "hallucination"):
            parts = [by_arm["nll"][group] for group in groups]
            parts = [part for part in parts if part["share"] > 0]
            mean = sum(part["share"] * part[name] for part in parts) / 100
            assert everybody[name] == pytest.approx(mean, abs=1e-3), name


def test_records_of_validation_users_only(run, tmp_path, monkeypatch):
    """The same figures of the same users, and the test users are not looked at."""
    monkeypatch.setattr(study, "groups_of", None)  # a call would fail
    monkeypatch.setattr(study, "figures_of", None)
    file = tmp_path / "v.jsonl"
    study.main(command(file, "--validation", "--arms", "nll", "adagrpo"))
    full = {record["arm"]: record["figures"] for record in lines_of(run)}
    nll, adagrpo_ = [record["figures"] for record in lines_of(file)]
    assert nll.keys() == {"validation"}
    assert adagrpo_.keys() == {"validation", "training"}
    assert nll["validation"].keys() == {str(w) for w in adagrpo.FUSION_WEIGHTS}
    assert full["nll"]["validation"] == nll["validation"] | {
        "w": full["nll"]["validation"]["w"]
    }
    w = full["nll"]["validation"]["w"]
    assert nll["validation"][str(w)] == max(nll["validation"].values())


def test_the_evidence_finds_all_it_asks_for(run, monkeypatch):
    """Both programs agree on the names of arms, groups and metrics."""
    monkeypatch.setattr(evidence, "DEFAULTS", lines_of(run)[0]["world"])
    main, variations, _ = evidence.read([run])
    tables = evidence.tables_of(main, variations, [])
    for name in ("first", "arms", "kinds", "leads", "training", "clicks"):
        assert "(one seed)" in tables[name]
        for line in tables[name].splitlines()[2:]:
            # Clicks of a table's lists are not counted, nor AdaGRPO less itself.
            if "table of click rates" not in line and "| adagrpo |" not in line:
                assert "| - |" not in line, f"{name}: {line}"
            assert "nan" not in line, f"{name}: {line}"
    for arm in evidence.FIRST:
        assert f"| {arm} |" in tables["first"]


# ----------------------------------------------------------------------------- command


@pytest.fixture
def ran(monkeypatch) -> list[tuple]:
    """What was to be run; it takes no time, and figures are empty."""
    ran = []

    def run_seed(config, world, arms, out, only_validation):
        with out.open("a") as file:
            for arm in arms:
                ran.append((config.seed, arm))
                record = {"seed": config.seed, "arm": arm, "world": world}
                figures = {"validation": {}}
                if not only_validation:
                    figures["all"] = {}
                file.write(json.dumps(record | {"figures": figures}) + "\n")

    monkeypatch.setattr(study, "run_seed", run_seed)
    return ran


def study_main(file: Path, *options: str) -> None:
    study.main(["--out", str(file), *options])


def test_the_study_runs_what_is_missing(ran, tmp_path):
    file = tmp_path / "new" / "runs.jsonl"
    study_main(file, "--seeds", "1", "1", "--arms", "nll", "mix-1", "nll")
    assert ran == [(1, "nll"), (1, "mix-1")]
    ran.clear()
    study_main(file, "--seeds", "2", "1", "2", "--arms", "mix-1", "adagrpo")
    assert ran == [(2, "mix-1"), (2, "adagrpo"), (1, "adagrpo")]

    # What was run for validation only has no test users yet.
    ran.clear()
    study_main(file, "--validation", "--seeds", "3", "--arms", "nll")
    study_main(file, "--validation", "--seeds", "3", "--arms", "nll")
    study_main(file, "--seeds", "3", "--arms", "nll")
    assert ran == [(3, "nll"), (3, "nll")]


def test_the_defaults_are_those_of_the_evidence(ran, tmp_path):
    study_main(tmp_path / "runs.jsonl", "--seeds", "1")
    records = lines_of(tmp_path / "runs.jsonl")
    assert [record["arm"] for record in records] == [
        "before",
        "nll",
        "mix-1",
        "adagrpo",
    ]
    study_main(tmp_path / "runs.jsonl", "--seeds", "1", "--everybody")
    everybody = lines_of(tmp_path / "runs.jsonl")[-1]["world"]
    assert records[0]["world"] | {"everybody": False} == evidence.DEFAULTS
    assert everybody == records[0]["world"] | {"everybody": True}


@pytest.mark.parametrize(
    "other",
    ["weight 4", "ranker noise", "season_correlation 1", "slates 9", "max_grad_norm 5"],
)
def test_other_settings_are_other_runs_and_keep_the_first(ran, tmp_path, other):
    file = tmp_path / "runs.jsonl"
    name, value = other.split()
    study_main(file, "--seeds", "1", "--arms", "nll")
    study_main(file, "--seeds", "1", "--arms", "nll", f"--{name}", value)
    assert ran == [(1, "nll"), (1, "nll")]
    first, second = [record["world"] for record in lines_of(file)]
    assert {key for key in first if first[key] != second[key]} == {name}


BAD = ["--arms magic", "--arms nll mix-much", "--arms mix-", "--arms adagrpo,magic=1"]
BAD += ["--arms nll,epochs=two", "--arms nll,w", "--slates many", "--ranker magic"]
BAD += ["--save x", "--device cuda", "--seed 3", "--seeds one"]


@pytest.mark.parametrize("bad", BAD)
def test_bad_options_are_refused_in_one_line(ran, tmp_path, capsys, bad):
    file = tmp_path / "new" / "runs.jsonl"
    with pytest.raises(SystemExit) as end:
        study_main(file, "--seeds", "1", *bad.split())
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert ran == []
    assert not file.parent.exists()


def test_a_file_that_cannot_be_read_is_refused_unchanged(ran, tmp_path, capsys):
    """A line that is cut, and places where no file can be."""
    file = tmp_path / "runs.jsonl"
    file.write_text('{"seed": 1, "arm"')
    for path in (file, file / "below.jsonl", tmp_path):
        with pytest.raises(SystemExit) as end:
            study_main(path, "--seeds", "1")
        assert end.value.code == 2
        assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert file.read_text() == '{"seed": 1, "arm"'
    assert ran == []
