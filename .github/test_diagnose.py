# SPDX-License-Identifier: MIT
"""Tests of diagnose.py: made-up scores whose answer is known, slow loops, bad input."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import diagnose

import adagrpo
from toy_data import make_shop

YES = "the ranker has something to teach."
NO = "nothing to teach is shown."


def made_up(strength=0.3, N=900, G=24, seed=0):
    """Scores of a ranker that adds `strength` (a number or (N,)) to the true item."""
    random = np.random.default_rng(seed)
    strength = np.broadcast_to(strength, N)
    place = (2 * G * random.random(N) ** 1.5).astype(int)  # a third is absent
    hit = np.arange(G) == place[:, None]
    valid = hit | (random.random((N, G)) < 0.95)
    logp = -np.sort(3 * random.random((N, G)), axis=1)
    rewards = 0.5 * random.random((N, G)) + hit * strength[:, None]
    target_reward = 0.5 * random.random(N) + strength
    target_reward[hit.any(1)] = rewards[hit]
    rewards[~valid] = 0.0
    return {
        "rewards": rewards,
        "target_reward": target_reward,
        "hit": hit,
        "valid": valid,
        "logp": logp,
    }


def last_line(text):
    return text.splitlines()[-1]


def cell(text, label, title):
    """A figure of the table; changes come without their interval."""
    lines = text.replace(" +-", "+-").splitlines()
    head = next(line for line in lines if line.startswith("percent"))
    row = next(line for line in lines if line.startswith(f"{label}  "))
    titles = head.split()[1:]
    figures = row[len(label) :].split()
    return float(figures[titles.index(title)].split("+-")[0])


# ----------------------------------------------------------------------------- answers


def test_a_ranker_that_knows_has_something_to_teach():
    text = diagnose.report(made_up())
    assert last_line(text) == f"In all: {YES}"
    assert "necessary and not sufficient: what the ranker knows has to be exp" in text
    assert "Note" not in text
    assert cell(text, "all", "fused") > 10
    assert abs(cell(text, "all", "shuffled")) < 3
    assert cell(text, "all", "AUC") > 85
    assert abs(cell(text, "all, shuffled", "AUC") - 50) < 2
    for title in ("clear", "admitted"):
        assert cell(text, "all", title) > cell(text, "all, shuffled", title) + 25


def test_noise_has_nothing_to_teach():
    text = diagnose.report(made_up(0.0, seed=1))
    assert last_line(text).endswith(NO)
    assert "necessary and not sufficient" in text
    assert "Note: AUC is near chance" in text


def test_noise_of_many_seeds_is_seldom_taken_for_knowledge():
    # By the intervals, in at most one of twenty; groups or not.
    answers = []
    for seed in range(60):
        scores = diagnose.prepare(made_up(0.0, N=400, G=12, seed=seed))
        masks = {"all": np.ones(400, dtype=bool)}
        masks |= diagnose.parts("name", np.arange(400) % 5)
        change = diagnose.fused_change(scores, 4)
        answers.append(diagnose.verdict(change, masks).endswith(NO))
    assert sum(answers) >= 57


def test_a_ranker_that_misleads_has_nothing_to_teach():
    assert last_line(diagnose.report(made_up(-0.3))).endswith(NO)


def test_what_only_one_group_can_learn_names_the_group():
    # 90 of 3,000 are too few to show over all.
    strength = np.zeros(3000)
    strength[:90] = 0.5
    scores = made_up(strength, N=3000)
    scores["group_feed"] = np.where(np.arange(3000) < 90, "shown", "hidden")
    assert last_line(diagnose.report(scores)) == f"In feed shown: {YES}"


def test_the_interval_of_a_group_is_widened_for_the_number_of_groups():
    change = np.zeros(1000)
    change[:20] = 1
    change[20:26] = -1
    masks = {"all": np.ones(1000, dtype=bool), "g a": np.arange(1000) < 500}
    assert diagnose.verdict(change, masks) == f"In all, g a: {YES}"

    # 14 / sqrt(26) = 2.7 standard errors suffice for all, and not for one of 20 groups.
    masks |= {f"g {number}": np.arange(1000) >= 500 for number in range(19)}
    assert diagnose.verdict(change, masks) == f"In all: {YES}"


def test_a_handful_of_changes_is_no_yes():
    change = np.zeros(1000)
    masks = {"all": np.ones(1000, dtype=bool)}
    change[:9] = 1
    assert diagnose.verdict(change, masks).endswith(NO)
    change[:10] = 1
    assert diagnose.verdict(change, masks).endswith(YES)


def test_the_interval_over_all_is_of_95_percent():
    masks = {"all": np.ones(1000, dtype=bool)}
    for gains, answer in ((16, NO), (17, YES)):  # 1.9 and 2.04 standard errors
        change = np.zeros(1000)
        change[:gains] = 1
        change[gains : gains + 7] = -1
        assert diagnose.verdict(change, masks).endswith(answer)
    mean, error = diagnose.interval(np.array([0.0, 2.0]), 1.0)
    assert (mean, error) == pytest.approx((1.0, 1.0))


def test_the_printed_interval_is_1_96_standard_errors():
    scores = diagnose.prepare(made_up())
    change = 100 * diagnose.fused_change(scores, 10)
    error = 1.96 * change.std(ddof=1) / np.sqrt(900)
    assert f" {change.mean():+.1f} +-{error:.1f} " in diagnose.report(made_up())


# -------------------------------------------------------------------------- fused order


@pytest.mark.parametrize("level", [0.0, 0.1, -3.0, 1e6, "by group"])
def test_a_constant_ranker_changes_exactly_nothing(level):
    scores = made_up(G=64)
    shape = scores["hit"].shape
    if level == "by group":
        level = np.random.default_rng(0).random((shape[0], 1))
    scores["rewards"] = np.broadcast_to(level, shape).copy()
    scores["rewards"][~scores["valid"]] = 0.0  # the floor is not what a ranker knows
    scores["logp"] = np.round(scores["logp"], 1)  # ties
    scores = diagnose.prepare(scores)
    assert not diagnose.fused_change(scores, 10).any()
    policy = diagnose.found(scores, scores["logp"], 10)
    assert 0.1 < policy.mean() < 0.9
    np.testing.assert_array_equal(diagnose.found(scores, scores["rewards"], 10), policy)


def test_invalid_rollouts_stand_last_whatever_their_reward():
    scores = made_up(0.0)
    scores["valid"] = scores["hit"] | (np.random.default_rng(1).random((900, 24)) < 0.5)
    reports = []
    for floor in (0.0, 100.0):
        scores["rewards"][~scores["valid"]] = floor
        text = diagnose.report(scores)
        assert last_line(text).endswith(NO)
        reports.append(text)
    assert reports[0] == reports[1]


def slow_found(scores, sort_by, k):
    found = []
    for hit, valid, row in zip(scores["hit"], scores["valid"], sort_by):
        places = [place for place in range(len(hit)) if valid[place]]
        places.sort(key=lambda place: -row[place])  # Python's sort is stable
        found.append(any(hit[place] for place in places[:k]))
    return np.array(found)


def slow_fused(scores, k):
    """With the halves of diagnose.py, one sample after the other."""
    variances = []
    for rewards, valid in zip(scores["rewards"], scores["valid"]):
        variances.append(np.var(rewards[valid]))
    unit = np.mean(variances) ** 0.5
    orders = {}
    for nats in diagnose.NATS:
        orders[nats] = scores["logp"] + nats / unit * scores["rewards"]
    found = {nats: slow_found(scores, orders[nats], k) for nats in orders}

    N = len(scores["hit"])
    half = np.random.default_rng(diagnose.SEED).permutation(N) % 2
    best = {}
    for side in (0, 1):
        levels = {nats: found[nats][half == side].sum() for nats in found}
        best[side] = max(levels, key=levels.get)
    change = []
    for row in range(N):
        nats = best[1 - half[row]]
        change.append(float(found[nats][row]) - float(found[0][row]))
    return np.array(change), best


@pytest.mark.parametrize("strength", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("k", [1, 5])
def test_orders_against_a_slow_loop(strength, k):
    scores = made_up(strength, N=201, seed=k)
    scores["rewards"] = np.round(scores["rewards"], 1)  # ties
    scores = diagnose.prepare(scores)
    expected, _ = slow_fused(scores, k)
    np.testing.assert_array_equal(diagnose.fused_change(scores, k), expected)
    thresholds = {"min_difficulty": 0.3, "min_discriminability": 0.01}
    figures = diagnose.measure(scores, thresholds, k, drawn=False)
    for name, sort_by in (("policy", "logp"), ("ranker", "rewards")):
        expected = slow_found(scores, scores[sort_by], k)
        np.testing.assert_array_equal(figures[name], expected)


def test_each_half_is_judged_with_the_weight_of_the_other():
    # Seeds where the halves choose differently, or the test above could not tell.
    chosen = []
    for seed in range(10):
        scores = diagnose.prepare(made_up(0.05, N=120, seed=seed))
        expected, best = slow_fused(scores, 5)
        np.testing.assert_array_equal(diagnose.fused_change(scores, 5), expected)
        chosen.append(best[0] != best[1])
    assert sum(chosen) > 3


def test_neither_the_unit_nor_the_level_of_the_rewards_matters_to_the_orders():
    scores = made_up()
    text = diagnose.report(scores)
    scores["rewards"] = 1024 * scores["rewards"]
    scores["target_reward"] = 1024 * scores["target_reward"]
    other = diagnose.report(scores, min_discriminability=10.24)
    table = text.index("percent")
    assert text[table:] == other[other.index("percent") :]


def test_columns_are_sorted_by_logp():
    scores = made_up()
    text = diagnose.report(scores)
    mixed = dict(scores)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(24), (900, 1)), axis=1)
    for name in ("rewards", "hit", "valid", "logp"):
        mixed[name] = np.take_along_axis(scores[name], order, axis=1)
    assert diagnose.report(mixed) == text


# ------------------------------------------------------------------- AUC, gate, control


def test_auc_against_a_slow_loop():
    scores = made_up(0.1, N=200)
    scores["rewards"] = np.round(scores["rewards"], 1)
    scores["target_reward"] = np.round(scores["target_reward"], 1)
    scores["valid"][3] = scores["hit"][3]  # no negative
    scores = diagnose.prepare(scores)
    thresholds = {"min_difficulty": 0.3, "min_discriminability": 0.01}
    auc = diagnose.measure(scores, thresholds, 10, drawn=False)["auc"]
    for row in range(200):
        wins = []
        for column in range(24):
            if scores["valid"][row, column] and not scores["hit"][row, column]:
                reward = scores["rewards"][row, column]
                target_reward = scores["target_reward"][row]
                wins.append(
                    float(reward < target_reward) + 0.5 * (reward == target_reward)
                )
        if wins:
            assert auc[row] == pytest.approx(np.mean(wins))
        else:
            assert row == 3 and np.isnan(auc[row])
    text = diagnose.report(scores)
    assert cell(text, "all", "AUC") == pytest.approx(100 * np.nanmean(auc), abs=0.051)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_gate_and_its_quantiles_by_hand(drawn):
    scores = made_up(0.1, N=400)
    ahead = np.argmax(scores["hit"], axis=1) / 24
    ahead[~scores["hit"].any(1)] = 1
    if drawn:
        ahead = 1 - scores["hit"].mean(1)
    lead = []
    for row in range(400):
        negative = scores["valid"][row] & ~scores["hit"][row]
        mean = scores["rewards"][row, negative].mean()
        lead.append(scores["target_reward"][row] - mean)
    lead = np.array(lead)
    text = diagnose.report(scores, 0.5, 0.05, drawn=drawn)
    assert cell(text, "all", "clear") == pytest.approx(
        100 * (lead >= 0.05).mean(), abs=0.051
    )
    admitted = (ahead >= 0.5) & (lead >= 0.05)
    assert cell(text, "all", "admitted") == pytest.approx(
        100 * admitted.mean(), abs=0.051
    )

    # Quantiles, and what each admits beside the other threshold.
    lines = text.splitlines()
    figures = {line[:36].strip(): line[36:].split() for line in lines[1:7]}
    at = {"difficulty": ahead, "discriminability": lead}
    other = {"difficulty": lead >= 0.05, "discriminability": ahead >= 0.5}
    for name, values in at.items():
        for place, level in enumerate((0.1, 0.25, 0.5, 0.75, 0.9)):
            quantile = np.quantile(values, level)
            assert float(figures[name][place]) == pytest.approx(quantile, rel=0.01)
            share = np.mean((values >= quantile) & other[name])
            printed = float(figures[f"admitted from this {name}"][place])
            assert printed == pytest.approx(share, abs=0.004)
    noisy = float(figures["discriminability, shuffled"][2])
    assert abs(noisy) < 0.05 < np.median(lead)


def test_shuffled_rewards_stay_in_their_group_and_the_target_goes_along():
    scores = made_up()
    scores["valid"][0] = False  # nothing to shuffle
    scores["hit"][0] = False
    scores["rewards"] += np.arange(900)[:, None]  # each group has rewards of its own
    scores["target_reward"] += np.arange(900)
    noise = diagnose.shuffle(scores)
    for row in range(900):
        valid = scores["valid"][row]
        before = scores["rewards"][row]
        after = noise["rewards"][row]
        np.testing.assert_array_equal(before[~valid], after[~valid])
        np.testing.assert_array_equal(np.sort(before[valid]), np.sort(after[valid]))
        if scores["hit"][row].any():
            assert noise["target_reward"][row] == after[scores["hit"][row]]
        elif valid.any():
            assert noise["target_reward"][row] in before[valid]
    assert noise["target_reward"][0] == scores["target_reward"][0]
    moved = noise["rewards"] != scores["rewards"]
    assert moved[scores["valid"]].mean() > 0.9


# ------------------------------------------------------------------------------- groups


def test_numbers_are_cut_in_thirds_and_names_are_names():
    scores = made_up()
    scores["group_age"] = np.random.default_rng(0).permutation(900) + 1
    scores["group_stars"] = np.arange(900) % 5 + 1
    scores["group_new"] = np.arange(900) < 300
    scores["group_kind"] = np.where(np.arange(900) < 5, "tiny", "large")
    scores["group_capped"] = np.minimum(np.arange(900), 599)
    scores["group_zeros"] = np.maximum(np.arange(900) - 700, 0)
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
        "kind large": 895,
        "zeros low <= 0": 701,
        "zeros high > 0": 199,
    }
    for label, size in sizes.items():
        assert cell(text, label, "n") == size
    assert "tiny" not in text  # five samples show nothing
    assert "zeros middle" not in text  # nobody is there

    # A row holds the figures of its own samples.
    is_new = scores["group_new"]
    alone = {name: array[is_new] for name, array in scores.items()}
    for title in ("HR@10", "ranker", "AUC", "clear", "admitted"):
        assert cell(text, "new True", title) == cell(
            diagnose.report(alone), "all", title
        )
    change = diagnose.fused_change(diagnose.prepare(scores), 10)
    mean = 100 * change[is_new].mean()
    assert cell(text, "new True", "fused") == pytest.approx(mean, abs=0.051)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_text_is_ascii_of_100_columns(drawn):
    scores = made_up(0.5, N=3000, G=11)
    random = np.random.default_rng(0)
    scores["group_" + "long" * 30] = random.choice(["é" * 90, "b" * 120], 3000)
    scores["group_länge"] = random.random(3000) * 1e9
    text = diagnose.report(scores, drawn=drawn)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    assert drawn or YES in last_line(text)


# -------------------------------------------------------------------------------- notes


def change_scores(name, scores):
    if name == "no rollout is a hit":
        scores["hit"][:] = False
    if name == "no target is absent":
        scores["hit"][~scores["hit"].any(1), 0] = True
        scores["valid"] |= scores["hit"]
        scores["target_reward"] = scores["rewards"][scores["hit"]]
    if name == "the rewards are flat":
        scores["rewards"][:500] = 0.3
        scores["target_reward"][:500] = 0.3
    if name == "AUC is near chance":
        scores["target_reward"] -= 0.3
        scores["rewards"][scores["hit"]] -= 0.3
    if name == "rewards are negative and invalid IDs are at 0":
        scores["rewards"][scores["valid"]] -= 2
        scores["target_reward"] -= 2
    if name == "target_reward is not the reward of the hit":
        scores["target_reward"] = scores["target_reward"] * 1.5
    if name == "targets are hit more than once":
        scores["hit"][:9, :2] = True
        scores["valid"][:9, :2] = True
        scores["rewards"][:9, :2] = scores["target_reward"][:9, None]
    if name == "fewer than 200 samples":
        scores = {key: array[:199] for key, array in scores.items()}
    return scores


@pytest.mark.parametrize(
    "name",
    [
        "no rollout is a hit",
        "no target is absent",
        "the rewards are flat",
        "AUC is near chance",
        "rewards are negative and invalid IDs are at 0",
        "target_reward is not the reward of the hit",
        "targets are hit more than once",
        "fewer than 200 samples",
    ],
)
def test_notes(name):
    text = diagnose.report(change_scores(name, made_up()))
    found = [line for line in text.splitlines() if line.startswith("Note: ")]
    assert [line for line in found if name in line] != []
    assert len(found) == 1, found


def test_negative_rewards_are_fine_where_invalid_rollouts_are_lower():
    scores = change_scores("rewards are negative and invalid IDs are at 0", made_up())
    scores["rewards"][~scores["valid"]] = -9
    assert "Note" not in diagnose.report(scores)


# ------------------------------------------------------------------- what may be absent


def test_without_valid_every_rollout_is_an_item():
    scores = made_up()
    scores["valid"][:] = True
    text = diagnose.report(scores)
    del scores["valid"]
    assert diagnose.report(scores) == text


def test_without_logp_columns_are_taken_as_they_come():
    scores = made_up()
    text = diagnose.report(scores)
    del scores["logp"]
    other = diagnose.report(scores)
    for title in ("HR@10", "ranker", "AUC", "clear", "admitted"):
        assert cell(other, "all", title) == cell(text, "all", title)
    assert "fused  " not in other
    assert last_line(other).startswith("No verdict: it needs logp")


def test_drawn_groups_have_no_order():
    scores = made_up()
    text = diagnose.report(scores, drawn=True)
    assert "No HR@k and no fused order" in text
    assert "No verdict" in last_line(text)
    assert "HR@10 " not in text
    back = {name: array[:, ::-1] for name, array in scores.items() if array.ndim == 2}
    other = diagnose.report(scores | back, drawn=True)
    for title in ("AUC", "clear", "admitted"):
        assert cell(other, "all", title) == cell(text, "all", title)
    assert "Note: targets" not in diagnose.report(
        change_scores("targets are hit more than once", scores), drawn=True
    )


def test_other_types_of_numbers_do_and_nothing_given_is_changed():
    scores = made_up()
    scores["rewards"] = np.round(64 * scores["rewards"]).astype(np.uint8)
    scores["target_reward"] = np.round(64 * scores["target_reward"]).astype(np.int16)
    scores["logp"] = np.random.default_rng(0).permuted(scores["logp"], axis=1)
    scores["logp"] = scores["logp"].astype(np.float16)
    copies = {name: array.copy() for name, array in scores.items()}
    text = diagnose.report(scores)
    assert last_line(text) == f"In all: {YES}"
    for name, array in copies.items():
        np.testing.assert_array_equal(scores[name], array)
    as_floats = dict(scores)
    for name in ("rewards", "target_reward", "logp"):
        as_floats[name] = scores[name].astype(np.float64)
    assert diagnose.report(as_floats) == text


# ------------------------------------------------------------------------------ command


def with_nan(name):
    array = made_up(N=20)[name]
    array.flat[3] = np.nan
    return array


BAD_ARRAYS = [
    ("rewards", None, "expected an array of this name, given none"),
    ("target_reward", None, "expected an array of this name, given none"),
    ("hit", None, "expected an array of this name, given none"),
    ("rewards", np.zeros(20), "expected (N, G), (10, 2) or more, given (20,)"),
    ("rewards", np.zeros((9, 24)), "expected (N, G), (10, 2) or more, given (9, 24)"),
    ("rewards", np.zeros((20, 1)), "expected (N, G), (10, 2) or more, given (20, 1)"),
    (
        "rewards",
        np.zeros((20, 24), dtype=complex),
        "expected numbers, given complex128",
    ),
    ("rewards", with_nan("rewards"), "expected finite numbers, given nan or inf"),
    ("target_reward", np.zeros((20, 1)), "expected shape (20,), given (20, 1)"),
    ("target_reward", with_nan("target_reward"), "expected finite numbers, given nan"),
    ("hit", np.zeros((20, 24)), "expected bool, given float64"),
    ("hit", np.zeros((20, 23), dtype=bool), "expected shape (20, 24), given (20, 23)"),
    ("hit", np.ones((20, 24), dtype=bool), "expected False for some valid rollout"),
    ("valid", np.ones((20, 24), dtype=int), "expected bool, given int64"),
    ("valid", np.zeros((20, 24), dtype=bool), "expected True wherever hit is True"),
    ("logp", np.zeros((24, 20)), "expected shape (20, 24), given (24, 20)"),
    ("logp", np.full((20, 24), "a"), "expected numbers, given <U1"),
    ("logp", with_nan("logp"), "expected finite numbers, given nan or inf"),
    ("group_kind", np.zeros((20, 24)), "expected shape (20,), given (20, 24)"),
    ("group_kind", np.zeros(20, "M8[s]"), "expected numbers or names, given datetime"),
    ("group_kind", np.array(["a", None] * 10), "expected plain types, given: Object"),
    ("group_kind", np.full(20, np.inf), "expected finite numbers, given nan or inf"),
    ("log_p", np.zeros((20, 24)), "expected one of rewards, target_reward, hit, valid"),
]


@pytest.mark.parametrize("name, array, message", BAD_ARRAYS)
def test_a_wrong_array_is_named_in_one_line(name, array, message, tmp_path, capsys):
    scores = made_up(N=20)
    scores["valid"][:] = True
    scores[name] = array
    if array is None:
        del scores[name]
    np.savez(tmp_path / "scores.npz", **scores)
    with pytest.raises(SystemExit) as end:
        diagnose.main([str(tmp_path / "scores.npz")])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith(f"diagnose.py: {name}: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x93NUMPY"])
def test_a_file_of_another_kind_is_named_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "scores.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        diagnose.main([str(path)])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"diagnose.py: {path}: expected a file of numpy.savez")
    assert error.count("\n") == 1


@pytest.mark.parametrize("k", [0, 24, 100])
def test_k_must_be_less_than_the_group(k):
    with pytest.raises(ValueError, match="k: expected 1 to 23"):
        diagnose.report(made_up(N=20), k=k)
    assert "No verdict" in diagnose.report(made_up(N=20), k=k, drawn=True)


def test_the_command_prints_the_report_of_its_options(tmp_path):
    scores = made_up(N=300)
    np.savez(tmp_path / "scores.npz", **scores)
    options = ["--min-difficulty", "0.5", "--min-discriminability", "0.1", "--k", "5"]
    command = [
        sys.executable,
        diagnose.__file__,
        str(tmp_path / "scores.npz"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == diagnose.report(scores, 0.5, 0.1, 5) + "\n"
    assert done.stdout != diagnose.report(scores) + "\n"


def test_the_command_takes_drawn_groups(tmp_path, capsys):
    scores = made_up(N=300)
    np.savez(tmp_path / "scores.npz", **scores)
    diagnose.main([str(tmp_path / "scores.npz"), "--drawn"])
    assert capsys.readouterr().out == diagnose.report(scores, drawn=True) + "\n"


def test_help_explains_every_array_and_column(capsys):
    with pytest.raises(SystemExit):
        diagnose.main(["--help"])
    text = capsys.readouterr().out
    for name in diagnose.ARRAYS:
        assert f"\n  {name} " in text
    for title in ("HR@k", "ranker", "fused", "shuffled", "AUC", "clear", "admitted"):
        assert f"\n  {title} " in text


# ------------------------------------------------------------------- the toy's own scores


@pytest.fixture(scope="module")
def toy_scores() -> dict[str, np.ndarray]:
    """Of the toy's validation users, before post-training; a smaller feed, for speed."""
    config = replace(adagrpo.Config(), pretrain_epochs=2)
    sizes = {"posttrain": 1, "test": 1, "validation": 2000, "feed": 60_000}
    shop = make_shop(0, sizes=sizes)
    torch.set_num_threads(1)
    policy = adagrpo.pretrain(shop, config)
    ranker = adagrpo.train_ranker(shop, config)
    history = torch.as_tensor(shop.validation.history)
    target = torch.as_tensor(shop.validation.target)
    with torch.no_grad():
        scored = adagrpo.roll_out_and_score(policy, ranker, history, target, config)

    names = ("rewards", "target_reward", "hit", "valid", "logp")
    scores = {name: getattr(scored, name).numpy() for name in names}
    times_shown = np.bincount(shop.shown.ravel(), minlength=len(shop.tokens))
    return scores | {"group_shown": times_shown[shop.validation.target]}


def test_the_toys_ranker_has_something_to_teach_where_the_feed_has_shown(toy_scores):
    text = diagnose.report(toy_scores)
    assert text.splitlines()[-1].endswith("the ranker has something to teach.")

    scores = diagnose.prepare(toy_scores)
    change = diagnose.fused_change(scores, 10)
    shown = scores["group_shown"]
    low, high = np.quantile(shown, [1 / 3, 2 / 3])
    seldom, seldom_error = diagnose.interval(change[shown <= low], 1.96)
    often, often_error = diagnose.interval(change[shown > high], 1.96)
    assert seldom - seldom_error < 0  # nothing is shown there
    assert often - often_error > seldom + seldom_error


def test_the_toys_rewards_shuffled_teach_nothing(toy_scores):
    noise = diagnose.shuffle(diagnose.prepare(toy_scores))
    last_line = diagnose.report(noise).splitlines()[-1]
    assert last_line == "Over all and in each group, nothing to teach is shown."
