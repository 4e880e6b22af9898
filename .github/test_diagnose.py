# SPDX-License-Identifier: MIT
"""Tests of diagnose.py: made-up shops whose answer is known, slow loops, bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import diagnose

ITEMS = 150
SPREAD = 0.7  # of each part of the appeal
NLL = {"taste": 1, "popular": 1, "season": 1}  # what a finished policy knows
ALL = NLL | {"clicks": 1}
STRANGER = {"popular": 1, "season": 1}  # a policy that learned nothing of the user


def shop(policy=NLL, ranker=ALL, N=6000, seed=0, G=24):
    """Scores in a shop whose truth is known.

    Users buy by the sum of four parts: their taste, what is popular, what is in season
    (both the same for all users), and what only clicks tell of this user. `policy` and
    `ranker` say how much each knows of a part: a number, or one for each user (N,).
    """
    random = np.random.default_rng(seed)
    parts = {
        "taste": random.normal(0, SPREAD, (N, ITEMS)),
        "popular": np.tile(random.normal(0, SPREAD, ITEMS), (N, 1)),
        "season": np.tile(random.normal(0, SPREAD, ITEMS), (N, 1)),
        "clicks": random.normal(0, SPREAD, (N, ITEMS)),
    }
    appeal = sum(parts.values())
    target = (appeal + random.gumbel(size=appeal.shape)).argmax(1)

    # What a ranker may know beside it.
    parts["noise"] = random.normal(0, SPREAD, (N, ITEMS))
    parts["exposure"] = np.tile(random.normal(0, SPREAD, ITEMS), (N, 1))
    parts["leak"] = np.arange(ITEMS) == target[:, None]

    def known(knows):
        total = np.zeros((N, ITEMS))
        for name, share in knows.items():
            total += np.broadcast_to(share, N)[:, None] * parts[name]
        return total

    logits = torch.from_numpy(known(policy))
    logp, items = torch.log_softmax(logits, dim=1).topk(G)
    items = items.numpy()
    score = torch.from_numpy(known(ranker) - 2).sigmoid().numpy()
    rewards = np.take_along_axis(score, items, axis=1)
    hit = items == target[:, None]
    valid = hit | (random.random((N, G)) < 0.95)
    rewards[~valid] = 0.0
    seen = items[:, -1]  # of the user's side: some item that looks like this user
    return {
        "rewards": rewards,
        "target_reward": score[np.arange(N), target],
        "hit": hit,
        "valid": valid,
        "logp": logp.numpy(),
        "items": np.where(valid, items, -1),
        "target_item": target,
        "group_home": random.choice(["north", "south"], N),
        "group_shown": parts["exposure"][0, seen],
    }


def without(scores, *names):
    return {name: array for name, array in scores.items() if name not in names}


def last_line(text):
    return text.splitlines()[-1]


def answer(text):
    return last_line(text).split(":")[0]


def notes(text):
    return [line for line in text.splitlines() if line.startswith("Note: ")]


def cell(text, label, title):
    """A figure of the table."""
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("percent"))
    row = next(line for line in lines if line.startswith(f"{label}  "))
    figures = row[len(label) :].split()
    return float(figures[head.split()[1:].index(title)])


# ------------------------------------------------- what has gone wrong before, by case

BEFORE = {"taste": 1, "popular": 1}  # a policy without NLL on this season
SEASON = {"taste": 0.7, "season": 0.7}  # a ranker of this season, trained on little
EXPOSURE = {"popular": 0.7, "exposure": 1}  # how often the feed shows an item

# policy, ranker, the answer at 300 and at 6,000 samples
CASES = {
    "real knowledge": (NLL, ALL, "Undecided", "Yes"),
    "much knowledge": (STRANGER, ALL, "Yes", "Yes"),
    "little knowledge": (NLL, ALL | {"noise": 3.5}, "Undecided", "Yes"),
    "noise": (NLL, {"noise": 1}, "Undecided", "No"),
    "exposure counts": (NLL, EXPOSURE, "Undecided", "No"),
    "popularity, known to both": (NLL, {"popular": 1}, "Undecided", "No"),
    "popularity, new to the policy": ({"taste": 1}, {"popular": 1}, "Undecided", "No"),
    "season, before NLL": (BEFORE, SEASON, "Undecided", "Undecided"),
    "season, after NLL": (NLL, SEASON, "Undecided", "No"),
    "all that the policy knows": (NLL, NLL, "Undecided", "No"),
    "misleading": (NLL, {"clicks": -1}, "Undecided", "No"),
}


@pytest.mark.parametrize("N", [300, 6000])
@pytest.mark.parametrize("case", CASES)
def test_answer(case, N):
    policy, ranker, at_300, at_6000 = CASES[case]
    expected = {300: at_300, 6000: at_6000}
    text = diagnose.report(shop(policy, ranker, N))
    assert answer(text) == expected[N]
    assert notes(text) == []


@pytest.mark.parametrize("N", [300, 6000])
def test_exposure_counts_teach_no_group_of_the_users_side_even_without_items(N):
    scores = without(shop(NLL, EXPOSURE, N), "items", "target_item")
    text = diagnose.report(scores)
    assert answer(text) == {300: "Undecided", 6000: "No"}[N]
    assert "without items that users share" in notes(text)[0]


@pytest.mark.parametrize("N", [300, 6000])
@pytest.mark.parametrize("ranker", [EXPOSURE, {"popular": 1}])
def test_groups_by_the_target_fool_it_without_items_and_not_with_them(N, ranker):
    scores = shop(NLL, ranker, N)
    scores["group_target"] = scores["target_reward"]  # an item's, the same for all
    assert answer(diagnose.report(scores)) != "Yes"
    if N == 6000:  # why the text asks for groups that are known before the purchase
        text = diagnose.report(without(scores, "items", "target_item"))
        assert "Yes: points gained in target high" in last_line(text)
        assert "groups must be known before the purchase" in text


@pytest.mark.parametrize("N", [300, 6000])
@pytest.mark.parametrize("ranker", [ALL, {"noise": 1}])
def test_a_leak_is_named(N, ranker):
    scores = shop(NLL, ranker | {"leak": 9}, N)
    text = diagnose.report(scores)
    assert answer(text) == "Yes"
    assert "First rule out that the ranker's log holds these" in last_line(text)
    assert "a gain everywhere, and HR nearly doubled" in notes(text)[-1]

    # Not where one group gains nothing.
    is_south = scores["group_home"] == "south"
    scores["rewards"][is_south] = 0.5
    scores["target_reward"][is_south] = 0.5
    text = diagnose.report(scores)
    assert answer(text) == "Yes"
    assert "these purchases" not in text


def test_no_hit_is_no_verdict():
    scores = without(shop(N=300), "target_item")
    scores["hit"][:] = False
    line = last_line(diagnose.report(scores))
    assert line == "Undecided: no rollout is a hit. Compare token IDs, not text."


@pytest.mark.parametrize("N", [300, 6000])
def test_a_blind_segment_leaves_the_yes_to_the_others(N):
    sees = np.arange(N) % 2
    ranker = {"clicks": sees, "taste": sees, "noise": 2 * (1 - sees)}
    scores = shop(STRANGER, ranker, N)
    scores["group_feed"] = np.where(sees, "shown", "hidden")
    text = diagnose.report(scores)
    assert notes(text) == []
    assert "Yes: " in text and "feed shown +" in last_line(text)
    assert "feed hidden" not in last_line(text)


@pytest.mark.parametrize("scale", [1 / 1024, 1024.0])
def test_scores_of_another_scale_get_a_threshold_of_theirs(scale):
    scores = shop(STRANGER, ALL, 900)
    table = diagnose.report(scores, min_discriminability=0.1)
    scores["rewards"] *= scale
    scores["target_reward"] *= scale
    assert diagnose.report(scores, min_discriminability=0.1 * scale) == table
    text = diagnose.report(scores, min_discriminability=0.1)
    assert last_line(text) == last_line(table)
    if scale > 1:
        assert notes(text) == []  # a low threshold divides all the same
        return
    assert cell(text, "all", "clear") == cell(text, "all", "admitted") == 0.0
    pattern = r"0% reach min_discriminability; (\d+)% would reach ([0-9.e+-]+)\."
    reached, level = re.search(pattern, notes(text)[0]).groups()
    text = diagnose.report(scores, min_discriminability=float(level))
    assert notes(text) == []
    assert abs(cell(text, "all", "clear") - float(reached)) < 1.1
    assert cell(text, "all", "admitted") > 5


def test_repeats_of_any_item_are_named():
    scores = shop(N=900)
    places = np.arange(900) % 10 == 0
    missed = places & ~scores["hit"][:, [0, 5]].any(1)
    for name in ("items", "valid", "rewards"):
        scores[name][missed, 5] = scores[name][missed, 0]
    repeats = 100 * (missed & scores["valid"][:, 0]).mean()
    (note,) = notes(diagnose.report(scores))
    assert f"{repeats:.1f}% of the groups hold an item twice" in note
    assert "twice" not in diagnose.report(scores, drawn=True)  # draws repeat


KINDS = {
    "noise": (NLL, {"noise": 1}),
    "popularity": (NLL, {"popular": 1}),
    "finished": (NLL, SEASON),
}


@pytest.mark.parametrize("kind", KINDS)
def test_of_200_sets_at_most_one_in_twenty_says_yes(kind):
    policy, ranker = KINDS[kind]
    answers = []
    for seed in range(200):
        scores = shop(policy, ranker, N=500, seed=seed, G=12)
        scores = without(scores, "items", "target_item")  # harder: no control
        answers.append(answer(diagnose.report(scores, k=5)))
    assert answers.count("Yes") <= 10


# ------------------------------------------------------------- intervals and answers


def test_interval_by_hand():
    # Deviations 0.75, -0.25 three times: squares 0.75, and 4 for four users more.
    change = np.array([1.0, 0.0, 0.0, 0.0])
    mean, error = diagnose.interval(change, np.arange(4), 2.0)
    assert mean == 0.25
    assert error == pytest.approx(2 * np.sqrt(4.75) / 4)

    # Two users with three samples each: sums of deviations 1.5 and -1.5.
    change = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    mean, error = diagnose.interval(change, np.array([7, 7, 7, 2, 2, 2]), 1.0)
    assert mean == 0.5
    assert error == pytest.approx(np.sqrt(2 * 1.5**2 + 4 * 3**2) / 6)


def test_the_interval_holds_the_truth_of_rare_changes():
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        change = random.choice([1.0, 0.0, -1.0], 300, p=[0.03, 0.96, 0.01])
        mean, error = diagnose.interval(change, np.arange(300))
        missed += abs(mean - 0.02) > error
    assert missed <= 0.05 * 2000


def test_a_group_needs_more_than_all_samples_do():
    # Every w gains 24 and loses 10 of the first 1,000 samples, half of them in each
    # half: 14 / sqrt(34 + 4) = 2.27 standard errors, enough alone and not among twenty.
    user = np.arange(2000)
    half = diagnose.halves(user)
    by_weight = np.zeros((len(diagnose.NATS), 2000))
    for side in (0, 1):
        rows = np.flatnonzero(half[:1000] == side)
        by_weight[1:, rows[:12]] = 1
        by_weight[0, rows[12:17]] = 1
    first = user < 1000
    masks = {"all": np.ones(2000, dtype=bool), "first": first}
    answers = diagnose.verdict(by_weight, None, masks, user, 0.005)
    assert answers == "Yes: points gained in all +0.7, first +1.4."
    masks |= {f"last {number}": ~first for number in range(19)}
    answers = diagnose.verdict(by_weight, None, masks, user, 0.005)
    assert answers == "Yes: points gained in all +0.7."


def test_a_gain_must_be_clear_beyond_the_control_too():
    user = np.arange(2000)
    masks = {"all": np.ones(2000, dtype=bool)}
    by_weight = np.zeros((len(diagnose.NATS), 2000))
    by_weight[1:, :200] = 1
    for known, expected in ((0, "Yes"), (100, "Yes"), (198, "No"), (194, "Undecided")):
        control = np.zeros((len(diagnose.NATS), 2000))
        control[1:, :known] = 1
        assert answer(diagnose.verdict(by_weight, None, masks, user, 0.005)) == "Yes"
        line = diagnose.verdict(by_weight, control, masks, user, 0.005)
        assert answer(line) == expected
        assert ("perhaps no more than the control" in line) == (known == 194)


def slow_most(gains, masks, user):
    best = (-np.inf, 0)
    for mask in masks.values():
        for weight in range(1, len(diagnose.NATS)):
            lowest = (np.inf, 0)
            for gain in gains:
                change = [gain[weight][row] * mask[row] for row in range(len(mask))]
                mean, error = diagnose.interval(np.array(change), user)
                lowest = min(lowest, (mean + error, error))
            best = max(best, lowest)
    return best


def test_the_most_that_may_be_gained_against_a_slow_loop():
    random = np.random.default_rng(0)
    shape = (2, len(diagnose.NATS), 60)
    policy, control = random.integers(-1, 2, shape).astype(float)
    user = random.integers(40, size=60)
    masks = {"all": np.ones(60, dtype=bool), "few": np.arange(60) < 20}
    for gains in ([policy], [policy, control]):
        assert diagnose.most(gains, masks, user) == slow_most(gains, masks, user)

    # What only loses leaves no gain at all.
    assert diagnose.most([0 * policy - 1], masks, user)[0] == 0.0


def test_a_no_keeps_to_the_gain_that_was_asked_for():
    scores = shop(NLL, {"noise": 1})
    upper = float(re.search(r"more than ([0-9.]+) points", diagnose.report(scores))[1])
    assert 0 < upper < 0.5
    assert answer(diagnose.report(scores, gain=upper + 0.01)) == "No"
    assert answer(diagnose.report(scores, gain=upper - 0.01)) == "Undecided"
    scores = shop(NLL, ALL | {"noise": 3.5})  # gains 1.1: for some not worth while
    assert answer(diagnose.report(scores, gain=0.5)) == "Yes"
    assert answer(diagnose.report(scores, gain=3)) == "No"


def test_a_gain_in_one_group_forbids_a_no():
    # Half of the users gain a point over all, and the others lose much.
    sees = np.arange(6000) % 2
    scores = shop(NLL, {"clicks": 0.5 * sees - (1 - sees)})
    assert answer(diagnose.report(scores)) == "No"
    scores["group_feed"] = np.where(sees, "shown", "hidden")
    text = diagnose.report(scores)
    assert last_line(text).startswith("Yes: points gained in feed shown +")


def test_so_many_samples_as_it_says_decide():
    scores = shop(NLL, {"noise": 1}, N=900)
    scores = without(scores, "items", "target_item", "group_home", "group_shown")
    line = last_line(diagnose.report(scores))
    pattern = r"Undecided: with 900 samples a gain below ([0-9.]+) points would not "
    pattern += r"show; about ([0-9,]+) would do for 0.5\."
    below, needed = re.fullmatch(pattern, line).groups()
    assert 0.5 < float(below) < 5
    times = int(needed.replace(",", "")) // 900 + 1
    for factor, expected in ((times, {"Yes", "No"}), (2, {"Undecided"})):
        more = {name: np.concatenate([a] * factor) for name, a in scores.items()}
        assert answer(diagnose.report(more)) in expected


def test_samples_of_one_user_count_as_one():
    scores = shop(NLL, {"clicks": 3}, N=60)
    copies = {name: np.concatenate([array] * 20) for name, array in scores.items()}
    assert answer(diagnose.report(copies)) == "Yes"
    copies["user"] = np.tile([f"user {number}" for number in range(60)], 20)
    assert answer(diagnose.report(copies)) == "Undecided"


# ------------------------------------------------------------------------ fused order


@pytest.mark.parametrize("level", [0.0, -3.0, 1e6, "by group"])
def test_a_constant_ranker_changes_exactly_nothing(level):
    scores = shop(N=500)
    if level == "by group":
        level = np.random.default_rng(0).random((500, 1))
    scores["rewards"] = np.broadcast_to(level, (500, 24)).copy()
    scores["rewards"][~scores["valid"]] = 0.0  # the floor is not what a ranker knows
    scores["logp"] = np.round(scores["logp"], 1)  # ties
    scores = diagnose.prepare(scores)
    by_weight = diagnose.found_by_weight(scores, 10)
    assert 0.1 < by_weight[0].mean() < 0.9
    assert (by_weight == by_weight[0]).all()


def test_invalid_rollouts_stand_last_whatever_is_in_them():
    scores = shop(NLL, {"noise": 1}, N=900)
    scores["valid"] = scores["hit"] | (np.random.default_rng(1).random((900, 24)) < 0.5)
    reports = []
    for floor in (0.0, 100.0, -np.inf, np.nan):
        scores["rewards"][~scores["valid"]] = floor
        reports.append(diagnose.report(scores))
    assert set(reports) == {reports[0]}


def test_padding_counts_for_nothing():
    scores = shop(N=900)
    text = diagnose.report(scores)
    padding = {"rewards": np.nan, "logp": -np.inf, "hit": 0, "valid": 0, "items": -9}
    for name, value in padding.items():
        column = np.full((900, 1), value)
        scores[name] = np.concatenate([scores[name], column], axis=1)
    other = diagnose.report(scores)
    for title in ("HR@10", "fused", "control", "AUC-policy", "AUC-ranker", "clear"):
        assert cell(other, "all", title) == cell(text, "all", title)
    assert last_line(other) == last_line(text)


def slow_found(scores, sort_by, k):
    found = []
    for hit, valid, row in zip(scores["hit"], scores["valid"], sort_by):
        places = sorted(np.flatnonzero(valid), key=lambda place: -row[place])  # stable
        found.append(hit[places[:k]].any())
    return np.array(found)


def slow_fused(scores, k, mask):
    """With the halves of diagnose.py, one sample after the other."""
    variances = []
    for rewards, valid in zip(scores["rewards"], scores["valid"]):
        variances.append(np.var(rewards[valid]))
    unit = np.mean(variances) ** 0.5
    found = {}
    for nats in diagnose.NATS:
        order = scores["logp"] + nats / unit * scores["rewards"]
        found[nats] = slow_found(scores, order, k)

    half = diagnose.halves(scores["user"])
    best = {}
    for side in (0, 1):
        levels = {nats: found[nats][mask & (half == side)].sum() for nats in found}
        best[side] = max(levels, key=levels.get)
    change = []
    for row in np.flatnonzero(mask):
        nats = best[1 - half[row]]  # of the other half
        change.append(float(found[nats][row]) - float(found[0][row]))
    return np.array(change), best


@pytest.mark.parametrize("k", [1, 5])
def test_fused_change_against_a_slow_loop(k):
    chosen = []
    for seed in range(8):
        scores = shop(NLL, {"clicks": 1, "noise": 1}, N=120, seed=seed)
        scores["rewards"] = np.round(scores["rewards"], 1)  # ties
        scores = diagnose.prepare(scores)
        by_weight = diagnose.found_by_weight(scores, k)
        alone = slow_found(scores, scores["logp"], k)
        np.testing.assert_array_equal(by_weight[0], alone)
        for mask in (np.ones(120, dtype=bool), np.arange(120) % 3 > 0):
            expected, best = slow_fused(scores, k, mask)
            change = diagnose.fused_change(by_weight, scores["user"], mask)
            np.testing.assert_array_equal(change, expected)
            chosen.append(best[0] != best[1])
    assert sum(chosen) > 3  # or the halves could be confused


def test_halves_are_of_users():
    user = np.random.default_rng(0).integers(300, size=900)
    half = diagnose.halves(user)
    sides = [set(user[half == side]) for side in (0, 1)]
    assert sides[0].isdisjoint(sides[1])
    assert abs(len(sides[0]) - len(sides[1])) < 30


def test_the_control_against_a_slow_loop():
    scores = shop(N=90, G=8)
    scores["items"] = scores["items"] * 3  # numbers with gaps
    scores["user"] = np.arange(90) // 2
    scores = diagnose.prepare(without(scores, "target_item"))
    half = diagnose.halves(scores["user"])
    control, share = diagnose.without_user(scores)
    known = []
    for row, column in np.argwhere(scores["valid"]):
        same = scores["items"] == scores["items"][row, column]
        others = same & scores["valid"] & (half != half[row])[:, None]
        known.append(others.any())
        expected = scores["rewards"][row, column]
        if others.any():
            expected = scores["rewards"][others].mean()
        assert control[row, column] == pytest.approx(expected)
    assert share == pytest.approx(np.mean(known))
    assert 0.5 < share < 1


def test_items_that_users_do_not_share_give_no_control():
    scores = shop(NLL, {"clicks": 3}, N=900)
    scores["items"] = np.arange(900 * 24).reshape(900, 24)
    text = diagnose.report(without(scores, "target_item"))
    assert "without items that users share" in notes(text)[0]
    assert "control  " not in text


def test_columns_are_sorted_by_logp():
    scores = shop(N=900)
    mixed = dict(scores)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(24), (900, 1)), axis=1)
    for name in ("rewards", "hit", "valid", "logp", "items"):
        mixed[name] = np.take_along_axis(scores[name], order, axis=1)
    assert diagnose.report(mixed) == diagnose.report(scores)


# ------------------------------------------------------------------------- AUC, gate


def test_auc_of_ranker_and_policy_against_a_slow_loop():
    scores = shop(N=200)
    scores["rewards"] = np.round(scores["rewards"], 1)
    scores["target_reward"] = np.round(scores["target_reward"], 1)
    hits = np.flatnonzero(scores["hit"].any(1))
    scores["valid"][hits[0]] = scores["hit"][hits[0]]  # no negative
    text = diagnose.report(scores)
    ranker = []
    policy = []
    for row in range(200):
        negative = np.flatnonzero(scores["valid"][row] & ~scores["hit"][row])
        if len(negative) == 0:
            continue
        rewards = scores["rewards"][row, negative]
        target_reward = scores["target_reward"][row]
        wins = (rewards < target_reward) + 0.5 * (rewards == target_reward)
        ranker.append(100 * wins.mean())
        place = 24
        if scores["hit"][row].any():
            place = scores["hit"][row].argmax()
        policy.append(100 * (negative > place).mean())
    assert len(ranker) == 199
    for title, values in (("AUC-ranker", ranker), ("AUC-policy", policy)):
        assert cell(text, "all", title) == pytest.approx(np.mean(values), abs=0.051)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_gate_by_hand(drawn):
    scores = shop(N=400)
    ahead = np.argmax(scores["hit"], axis=1) / 24
    ahead[~scores["hit"].any(1)] = 1
    if drawn:
        ahead = 1 - scores["hit"].mean(1)
    negative = scores["valid"] & ~scores["hit"]
    means = [scores["rewards"][row, negative[row]].mean() for row in range(400)]
    lead = scores["target_reward"] - np.array(means)
    text = diagnose.report(scores, 0.5, 0.05, drawn=drawn)
    clear = 100 * (lead >= 0.05).mean()
    admitted = 100 * ((ahead >= 0.5) & (lead >= 0.05)).mean()
    assert cell(text, "all", "clear") == pytest.approx(clear, abs=0.051)
    assert cell(text, "all", "admitted") == pytest.approx(admitted, abs=0.051)


# ------------------------------------------------------------------------------ groups


def test_numbers_are_cut_in_thirds_and_names_are_names():
    scores = shop(N=900)
    row = np.arange(900)
    scores["group_age"] = np.random.default_rng(0).permutation(900) + 1
    scores["group_stars"] = row % 5 + 1
    scores["group_new"] = row < 300
    scores["group_kind"] = np.where(row < 10, "tiny", "large")
    scores["group_capped"] = np.minimum(row, 599)
    scores["group_zeros"] = np.maximum(row - 700, 0)
    text = diagnose.report(scores)
    sizes = {
        "age low <= 300.7": 300,
        "age middle": 300,
        "age high > 600.3": 300,
        "capped middle": 600,  # 599, the upper edge, is in it
        "stars 1": 180,
        "stars 5": 180,
        "new True": 300,
        "new False": 600,
        "kind tiny": 10,
        "zeros low <= 0": 701,
        "zeros high > 0": 199,
    }
    for label, size in sizes.items():
        assert cell(text, label, "n") == size
    assert "zeros middle" not in text  # nobody is there

    # A row holds the figures of its own samples.
    alone = {name: array[:300] for name, array in scores.items()}
    other = diagnose.report(alone)
    for title in ("HR@10", "AUC-policy", "AUC-ranker", "clear", "admitted"):
        assert cell(text, "new True", title) == cell(other, "all", title)

    # Ten samples of nine users show nothing.
    scores["user"] = np.maximum(row, 1)
    assert "kind tiny" not in diagnose.report(scores)


def test_long_names_keep_their_ends_and_the_last_line_all():
    scores = shop(NLL, {"clicks": 3}, N=3000)
    names = ["b" * 90 + "one", "b" * 90 + "two"]
    scores["group_long"] = np.random.default_rng(0).choice(names, 3000)
    lines = diagnose.report(scores).splitlines()
    assert max(map(len, lines[:-1])) <= 100
    for name in names:
        assert any(line.startswith("..." + name[-22:] + "  ") for line in lines)
        assert f"long {name} +" in lines[-1]


# -------------------------------------------------------------------- what looks wrong


@pytest.mark.parametrize(
    "note, options",
    [
        ("0% reach min_difficulty; ", {"min_difficulty": 1.01}),
        ("100% reach min_difficulty; ", {"min_difficulty": 0}),
        ("100% reach min_discriminability; ", {"min_discriminability": -1}),
    ],
)
def test_thresholds_that_divide_nobody_are_named(note, options):
    text = diagnose.report(shop(N=900), **options)
    assert len(notes(text)) == 1
    assert notes(text)[0].startswith(f"Note: {note}")


def test_negative_rewards_beside_invalid_ones_at_0_are_named():
    scores = shop(N=900)
    scores["rewards"][scores["valid"]] -= 2
    scores["target_reward"] -= 2
    (note,) = notes(diagnose.report(scores))
    assert "rewards are negative, invalid IDs at 0 above them" in note
    scores["rewards"][~scores["valid"]] = -9
    assert notes(diagnose.report(scores)) == []


# ------------------------------------------------------------------ what may be absent


def test_without_valid_every_rollout_is_an_item():
    scores = shop(N=900)
    scores["valid"][:] = True
    scores["items"] = np.where(scores["items"] < 0, 999, scores["items"])
    assert diagnose.report(without(scores, "valid")) == diagnose.report(scores)


def test_drawn_groups_have_no_order():
    scores = shop(N=900)
    text = diagnose.report(scores, drawn=True)
    assert last_line(text).startswith("Undecided: drawn groups have no order")
    assert "HR@10 " not in text and "AUC-policy" not in text
    back = {name: array[:, ::-1] for name, array in scores.items() if array.ndim == 2}
    other = diagnose.report(scores | back, drawn=True)
    for title in ("AUC-ranker", "clear", "admitted"):
        assert cell(other, "all", title) == cell(text, "all", title)


def test_other_types_do_and_nothing_given_is_changed():
    scores = shop(NLL, {"clicks": 3}, N=900)
    scores["rewards"] = np.round(64 * scores["rewards"])
    scores["target_reward"] = np.round(64 * scores["target_reward"])
    scores["logp"] = scores["logp"].astype(np.float16)
    text = diagnose.report(scores)
    types = {"rewards": np.uint8, "target_reward": np.int16, "logp": np.float64}
    types |= {"hit": np.uint8, "valid": float, "items": str, "target_item": str}
    for name, kind in types.items():
        scores[name] = scores[name].astype(kind)
    copies = {name: array.copy() for name, array in scores.items()}
    assert diagnose.report(scores) == text
    for name, array in copies.items():
        np.testing.assert_array_equal(scores[name], array)


# ----------------------------------------------------------------------------- command


def small():
    scores = shop(N=20)
    scores["valid"][:] = True
    return scores


def with_nan(name):
    array = small()[name].astype(float)
    array.flat[3] = np.nan
    return array


MASK = np.zeros((20, 24), dtype=bool)
BAD_ARRAYS = [
    ("rewards", None, "expected an array of this name, given none"),
    ("logp", None, "expected an array of this name, given none"),
    ("rewards", np.zeros(20), "expected (N, G), (2, 2) or more, given (20,)"),
    ("rewards", np.zeros((20, 1)), "expected (N, G), (2, 2) or more, given (20, 1)"),
    ("rewards", with_nan("rewards"), "expected finite numbers, given nan or inf"),
    ("target_reward", np.zeros((20, 1)), "expected shape (20,), given (20, 1)"),
    ("target_reward", with_nan("target_reward"), "expected finite numbers, given nan"),
    ("hit", np.full((20, 24), "a"), "expected True or False, given other values"),
    ("hit", np.full((20, 24), 255, np.uint8), "expected True or False, given other"),
    ("hit", MASK[:, 1:], "expected shape (20, 24), given (20, 23)"),
    ("hit", MASK, "expected True just where items is target_item"),
    ("valid", np.full((20, 24), -1), "expected True or False, given other values"),
    ("logp", np.zeros((24, 20)), "expected shape (20, 24), given (24, 20)"),
    ("logp", with_nan("logp"), "expected finite numbers, given nan or inf"),
    ("user", np.zeros((20, 24)), "expected shape (20,), given (20, 24)"),
    ("group_kind", np.zeros((20, 24)), "expected shape (20,), given (20, 24)"),
    ("group_kind", np.full(20, np.inf), "expected finite numbers, given nan or inf"),
    ("log_p", np.zeros((20, 24)), "leave it out, or call it rewards, hit, "),
]


def refused(path, capsys):
    """What is printed about a file: one line."""
    with pytest.raises(SystemExit) as end:
        diagnose.main([str(path)])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("name, array, message", BAD_ARRAYS)
def test_a_wrong_array_is_named_in_one_line(name, array, message, tmp_path, capsys):
    scores = without(small(), name)
    if array is not None:
        scores[name] = array
    np.savez(tmp_path / "scores.npz", **scores)
    line = refused(tmp_path / "scores.npz", capsys)
    assert line.startswith(f"diagnose.py: {name}: {message}")


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x93NUMPY"])
def test_a_file_of_another_kind_is_named_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "scores.npz"
    if content is not None:
        path.write_bytes(content)
    line = refused(path, capsys)
    assert line.startswith(f"diagnose.py: {path}: no file of numpy.savez")


def test_a_column_of_pandas_gets_a_remedy(tmp_path, capsys):
    path = tmp_path / "scores.npz"
    np.savez(path, **small(), group_kind=np.array(["a", None] * 10))
    line = refused(path, capsys)
    assert "save columns with .astype(float) or (str)" in line


@pytest.mark.parametrize("k", [0, 24, 100])
def test_k_must_be_less_than_the_group(k):
    with pytest.raises(ValueError, match="k: expected 1 to 23"):
        diagnose.report(small(), k=k)
    assert answer(diagnose.report(small(), k=k, drawn=True)) == "Undecided"


@pytest.mark.parametrize("options", [[], ["--drawn"]])
def test_the_command_prints_the_report_of_its_options(options, tmp_path, capsys):
    scores = shop(N=300)
    np.savez(tmp_path / "scores.npz", **scores)
    argv = [str(tmp_path / "scores.npz"), "--min-difficulty", "0.5", "--k", "5"]
    diagnose.main([*argv, "--min-discriminability", "0.1", "--gain", "2", *options])
    text = diagnose.report(scores, 0.5, 0.1, 5, 2, drawn="--drawn" in options)
    assert capsys.readouterr().out == text + "\n"


# --------------------------------------------------------------------------- the toy's


def test_the_example_of_the_docstring_runs_as_it_stands(tmp_path, capsys):
    lines = diagnose.__doc__.splitlines()
    start = lines.index("    import numpy as np")
    end = lines.index('    np.savez("scores.npz", **scores)')
    example = dedent("\n".join(lines[start : end + 1]))

    # A smaller shop and a shorter training, for speed.
    sizes = "{'feed': 2000, 'pretrain': 2000, 'posttrain': 40, 'validation': 60}"
    for old, new in (
        ("make_shop(config.seed)", f"make_shop(config.seed, sizes={sizes})"),
        ("Config()", "Config(pretrain_epochs=3, ranker_epochs=1)"),
    ):
        assert old in example
        example = example.replace(old, new)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    root = str(Path(diagnose.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "example.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    diagnose.main([str(tmp_path / "scores.npz")])
    text = capsys.readouterr().out
    assert text.startswith("60 samples, groups of 32\n")
    assert answer(text) in ("Yes", "No", "Undecided")
    assert "shown low" in text and "control" in text
