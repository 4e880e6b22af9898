# SPDX-License-Identifier: MIT
"""Tests of .github/movielens.py, on made-up ratings.

Run: python -m pytest -q .github/test_movielens.py
"""

import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import movielens

import adagrpo
from adagrpo import Config, Scored

ITEMS = 60
USERS = 36
HELD_OUT = ("posttrain", "validation", "test")
SMALL = Config(epochs=1, pretrain_epochs=15, ranker_epochs=10, ranker_batch=32)


def log_of(rows: list[tuple]) -> movielens.Log:
    user, item, rating, time = zip(*rows, strict=True)
    texts = [np.array([str(name) for name in names]) for names in (user, item)]
    return movielens.Log(*texts, np.array(rating, float), np.array(time, float))


def made_up(users: int = USERS, seed: int = 0) -> list[tuple]:
    """User, item, rating, time. A user likes one half of the catalogue, in circles.

    After item i mostly comes i + 1; every fourth rating is a dislike of the other half.
    User u starts at time 1000 * u.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        half = user % 2 * ITEMS // 2
        start = rng.integers(ITEMS // 2)
        for n in range(24):
            time = 1000 * user + n
            item = half + (start + n) % (ITEMS // 2)
            rows.append((user + 7, item + 100, 5, time))
            if n % 4 == 0:
                disliked = ITEMS // 2 - half + rng.integers(ITEMS // 2)
                rows.append((user + 7, disliked + 100, 2, time))
    return rows


def write(path: Path, rows: list[tuple], separator: str = "\t") -> Path:
    lines = [separator.join(str(value) for value in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shop():
    return movielens.make_shop(log_of(made_up()), seed=0)


@pytest.fixture(scope="module")
def policy(shop):
    return adagrpo.pretrain(shop, SMALL)


@pytest.fixture(scope="module")
def ranker(shop):
    return movielens.Ranker(shop, SMALL)


# ----------------------------------------------------------------------------- the file

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.mark.parametrize("name, separator", [("u.data", "\t"), ("ratings.dat", "::")])
def test_formats_say_the_same(tmp_path, name, separator):
    rows = made_up(3)
    path = write(tmp_path / name, rows, separator)
    plain = movielens.read_ratings(path)
    assert plain.user.tolist() == [str(row[0]) for row in rows]
    assert plain.item.tolist() == [str(row[1]) for row in rows]
    assert plain.rating.tolist() == [row[2] for row in rows]
    assert plain.time.tolist() == [row[3] for row in rows]

    # A header, a byte order mark, Windows' line ends and blank lines change nothing.
    path.write_text("\ufeff" + HEADER + path.read_text().replace("\n", "\r\n\n"))
    for one, other in zip(plain, movielens.read_ratings(path), strict=True):
        assert (one == other).all()


def test_columns_are_found_by_name(tmp_path):
    path = tmp_path / "log"
    path.write_text("timestamp\textra\trating\titem_id\tuserId\n9\tx\t4\t2\t1\n")
    log = movielens.read_ratings(path)
    assert [column.tolist() for column in log] == [["1"], ["2"], [4.0], [9.0]]


def test_long_user_numbers_stay_apart(tmp_path):
    rows = [(2**60 + user, item, 5, item) for user in range(30) for item in range(20)]
    log = movielens.read_ratings(write(tmp_path / "log", rows))
    assert len(np.unique(log.user)) == 30
    logs, _ = movielens.make_logs(log)
    assert len(np.unique(logs["test"][:, 0])) == 30


GOOD = "1\t2\t3\t4\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("", "no ratings"),
        (HEADER, "no ratings"),
        (HEADER.replace("item", "thing") + GOOD, "the header must name"),
        (GOOD + "1\t2\tx\t4\n", "could not convert"),
        (GOOD + "1\t2\t3\n", "a line must hold userid, itemid, rating, timestamp"),
        ("1\t2\tnan\t4\n", "ratings must be 0 to 5"),
        ("1\t2\t881250949\t4\n", "ratings must be 0 to 5"),  # another order
        ("1\t2\t3\tinf\n", "times numbers"),
        (GOOD, "no user has 14 likes"),
    ],
)
def test_a_bad_file_ends_with_one_line(tmp_path, content, message):
    path = tmp_path / "u.data"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        movielens.main([str(path), "--out", str(tmp_path / "out.jsonl")])
    text = str(error.value)
    assert text.startswith(f"movielens.py: {path}: ")
    assert message in text and "\n" not in text


# ----------------------------------------------------------------------------- the logs


def by_hand() -> list[tuple]:
    """Users 20 and 30 with 15 likes each, 1 to 15 in order.

    User 20 dislikes 40 before its third like, 50 after its tenth, and in the end 3.
    User 10 has 13 likes and is too small.
    """
    rows = []
    for user, start in ((20, 2000), (30, 1000)):
        rows += [(user, like, 4, start + 10 * like) for like in range(1, 16)]
    rows += [(10, like, 5, like) for like in range(1, 14)]
    return rows + [(20, 40, 3, 2025), (20, 50, 1, 2105), (20, 3, 1, 2999)]


def test_logs_by_hand():
    logs, P = movielens.make_logs(log_of(by_hand()))
    # Items are numbered in the order of their names: "1", "10", ..., "15", "2", ...
    names = sorted(str(item) for item in [*range(1, 16), 40, 50])
    assert P == 17

    def rows_of(name: str, user: int) -> list[list]:
        """Rows with the file's item numbers, and 0 for PAD; the user is left out."""
        rows = logs[name][logs[name][:, 0] == user, 1:]
        item_of = dict(enumerate([int(item) for item in names] + [0]))
        return [[item_of[item] for item in row] for row in rows.tolist()]

    # Users 10, 20 and 30 are 0, 1 and 2. User 10 has no test.
    assert {name: set(logs[name][:, 0]) for name in HELD_OUT} == {
        name: {1, 2} for name in HELD_OUT
    }
    assert [row[0] for row in rows_of("rated", 0)] == list(range(1, 14))
    pretrain = rows_of("pretrain", 0)
    assert len(pretrain) == 12  # nothing stands before the first like
    assert pretrain[0] == [0, 0, 0, 0, 0, 0, 0, 1, 2]
    assert pretrain[-1] == [5, 6, 7, 8, 9, 10, 11, 12, 13]

    # Of user 20 likes 4 to 15 are held out: 3 + 3 + 6.
    assert rows_of("rated", 1) == [[1], [2], [40], [3]]
    assert [row[-1] for row in rows_of("pretrain", 1)] == [2, 3]
    targets = {name: [row[-1] for row in rows_of(name, 1)] for name in HELD_OUT}
    assert targets["posttrain"] == [4, 5, 6]
    assert targets["validation"] == [7, 8, 9]
    assert targets["test"] == [10, 11, 12, 13, 14, 15]

    # Every film rated before is in the history; the last eight likes are its end.
    history = rows_of("test", 1)[-1][:-1]
    assert len(history) == movielens.MAX_RATED
    assert history[-8:] == [7, 8, 9, 10, 11, 12, 13, 14]
    assert sorted(history[:-8])[-8:] == [1, 2, 3, 4, 5, 6, 40, 50]
    assert sum(history[:-16]) == 0

    # What the ranker learns from: likes before, the film, and whether it was liked.
    feed = logs["feed"][logs["feed"][:, 0] == 1]
    assert feed[:, -1].tolist() == [1, 1, 0, 1]
    of_dislike = [names.index(name) for name in ("1", "2", "40")]
    assert feed[2, 1:-1].tolist() == [P] * 6 + of_dislike


def test_who_rated_more_films_trains_and_is_not_tested():
    most = movielens.MAX_RATED
    rows = [(1, item, 4, item) for item in range(most)]
    rows += [(2, item, 4, item) for item in range(most + 1)]
    logs, _ = movielens.make_logs(log_of(rows))
    for name in HELD_OUT:
        assert set(logs[name][:, 0]) == {0}
    assert (logs["rated"][:, 0] == 1).sum() == most + 1


def test_equal_times_keep_the_order_of_the_file():
    rows = [(1, item, 4, 0) for item in range(10, 30)]
    logs, _ = movielens.make_logs(log_of(rows))
    assert logs["test"][:, -1].tolist() == [14, 15, 16, 17, 18, 19]
    logs, _ = movielens.make_logs(log_of(rows[::-1]))
    assert logs["test"][:, -1].tolist() == [5, 4, 3, 2, 1, 0]


def test_only_the_first_rating_of_a_film_counts():
    again = [(27, 100, 1, 10**6), (27, 100, 5, 10**7)]
    logs, _ = movielens.make_logs(log_of(made_up() + again[:1]))
    both, _ = movielens.make_logs(log_of(made_up() + again))
    assert all((logs[name] == both[name]).all() for name in logs)


# ---------------------------------------------------------------------- the semantic IDs


def test_ids_are_unique_and_levels_share_no_token(shop):
    tokens = shop.tokens
    assert tokens.shape == (ITEMS + 1, 3)
    assert len(np.unique(tokens, axis=0)) == len(tokens)
    levels = [set(tokens[:, level]) for level in range(3)]
    assert not levels[0] & levels[1] and not levels[1] & levels[2]
    assert not (tokens[:-1] == tokens[-1]).any()  # PAD is like nothing else
    for name in ("pretrain", *HELD_OUT):
        assert (getattr(shop, name).target < ITEMS).all()

    again = movielens.make_shop(log_of(made_up()), seed=0)
    assert (again.tokens == tokens).all()


def test_k_means_finds_what_is_apart():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 5, dtype=np.float32)
    truth = np.arange(60) % 3
    noise = 0.01 * rng.normal(size=(60, 5)).astype(np.float32)
    points = centres[truth] + noise
    found = [
        movielens.k_means(points, 3, np.random.default_rng(seed)) for seed in range(20)
    ]
    best = max(found, key=lambda cluster: len(np.unique(cluster)))
    pairs = {(int(a), int(b)) for a, b in zip(truth, best, strict=True)}
    assert len(pairs) == 3
    assert len(np.unique(movielens.k_means(points[:2], 8, rng))) <= 2


# ---------------------------------------------------------------------------- the leaks


def test_no_held_out_target_is_in_an_earlier_log():
    logs, _ = movielens.make_logs(log_of(made_up()))
    known = set(map(tuple, logs["rated"].tolist()))
    for user, *items, _ in logs["feed"].tolist():
        known |= {(user, item) for item in items}
    for user, *items in logs["pretrain"].tolist():
        known |= {(user, item) for item in items}
    for name in HELD_OUT:
        mine = {(row[0], row[-1]) for row in logs[name].tolist()}
        assert len(mine) == len(logs[name])
        assert not mine & known
        known |= mine
        for row in logs[name].tolist():
            assert row[-1] not in row[1:-1]  # nor in its own history
    movielens.check_leaks(logs)


@pytest.mark.parametrize("place", ["rated", "feed", "pretrain", "history"])
@pytest.mark.parametrize("name", HELD_OUT)
def test_a_planted_leak_is_found(name, place):
    logs, pad = movielens.make_logs(log_of(made_up()))
    user, *_, target = logs[name][5].tolist()
    row = [user, *[pad] * 8, target]
    if place == "history":
        row = [user, target, *[pad] * 8]
        place = "pretrain"
    if place == "rated":
        row = [user, target]
    if place == "feed":
        row = [*row, 0]
    logs[place] = np.append(logs[place], [row], axis=0)
    with pytest.raises(ValueError, match=f"leak: a target of {name}"):
        movielens.check_leaks(logs)


def test_a_test_row_among_the_post_training_rows_is_found():
    logs, pad = movielens.make_logs(log_of(made_up()))
    user, *history, target = logs["test"][0].tolist()
    row = [user, *[pad] * len(history), target]
    logs["posttrain"] = np.append(logs["posttrain"], [row], axis=0)
    with pytest.raises(ValueError, match="leak: a target of test"):
        movielens.check_leaks(logs)


def test_what_is_held_out_shapes_nothing_before_it(shop):
    """The held-out likes of the last user in another order."""
    rows = made_up()
    likes = [n for n, row in enumerate(rows) if row[0] == USERS + 6 and row[2] == 5][
        -12:
    ]
    other = list(rows)
    for n, m in zip(likes, likes[::-1], strict=True):
        other[n] = (USERS + 6, rows[m][1], 5, rows[n][3])
    two = movielens.make_shop(log_of(other), seed=0)
    for name in ("tokens", "feed_history", "shown", "clicked"):
        assert (getattr(shop, name) == getattr(two, name)).all()
    assert (shop.pretrain.target == two.pretrain.target).all()
    assert (shop.test.target != two.test.target).any()


# --------------------------------------------------------------- groups, ranker and arms


def scored_of(policy, ranker, split, rows: slice) -> Scored:
    history = torch.as_tensor(split.history[rows])
    target = torch.as_tensor(split.target[rows])
    return adagrpo.roll_out_and_score(policy, ranker, history, target, 32)


def test_no_rated_film_is_in_a_group(shop, policy, ranker):
    with torch.no_grad():
        scored = scored_of(policy, ranker, shop.test, slice(0, 40))
    items = policy.items_of(scored.tokens).numpy()
    assert items.shape == (40, 32)
    for group, history in zip(items, shop.test.history[:40], strict=True):
        assert not set(group) & set(history)
        assert ITEMS not in group  # PAD


@torch.no_grad()
def test_ranker_learns_what_is_liked_and_reads_the_last_likes(shop, ranker):
    history = torch.as_tensor(shop.test.history)
    everything = torch.arange(ITEMS).expand(len(history), -1)
    scores = ranker.click_probability(history, everything)
    assert scores.shape == (len(history), ITEMS)
    assert (scores > 0).all() and (scores < 1).all()
    upper = torch.as_tensor(shop.test.target >= ITEMS // 2)
    own = torch.where(upper, scores[:, 30:].mean(1), scores[:, :30].mean(1))
    other = torch.where(upper, scores[:, :30].mean(1), scores[:, 30:].mean(1))
    assert (own > other).float().mean() > 0.9

    changed = history.clone()
    changed[:, :-8] = ITEMS
    again = ranker.click_probability(changed, everything)
    torch.testing.assert_close(again, scores, rtol=0, atol=0)


def test_the_other_loop_is_the_cores_loop(shop, policy, ranker):
    """With a threshold that all scores reach, level is the core's loop with `hard`."""
    one = copy.deepcopy(policy)
    two = copy.deepcopy(policy)
    split = shop.posttrain
    dose = adagrpo.post_train(one, ranker, split, lambda gate: gate.hard, 2.0, SMALL)
    term = partial(movielens.level, threshold=0.0, weight=2.0)
    movielens.post_train_by(two, ranker, split, term, SMALL)
    assert dose > 0
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(one.head.weight, policy.head.weight)


def by_hand_scored() -> Scored:
    """Two groups of two: probabilities of 0.2 and 0.1 (0.3 and 0.3)."""
    probability = torch.tensor([[0.2, 0.1], [0.3, 0.3]])
    return Scored(
        tokens=torch.zeros(2, 2, 3, dtype=torch.long),
        logp=probability.log().requires_grad_(),
        hit=torch.tensor([[False, True], [True, False]]),
        valid=torch.ones(2, 2, dtype=torch.bool),
        rewards=torch.tensor([[0.5, 1.0], [0.2, 0.2]]),
        target_reward=torch.tensor([1.0, 0.2]),
    )


def test_distil_by_hand():
    scored = by_hand_scored()
    # Alone 2/3 and 1/3; times exp(2 * 0.5) and exp(2 * 1): 2 e to e^2, or 2 to e.
    p = np.array([2, 1]) / 3
    q = np.array([2, np.e]) / (2 + np.e)
    loss = movielens.distil(scored, SMALL, w=2.0, weight=3.0)
    expected = [-3 * (q * np.log(p)).sum(), -3 * np.log(0.5)]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-6)

    # The gradient of cross-entropy: p - q; nothing where all scores are equal.
    loss.sum().backward()
    np.testing.assert_allclose(scored.logp.grad, [3 * (p - q), [0, 0]], atol=1e-6)


def test_level_by_hand():
    scored = by_hand_scored()
    # Group 1 is hard (half of it stands ahead) and scores 1; its advantages are -1, 1.
    # Group 2 hits at once.
    for threshold, gradient in ((1.0, [[1, -1], [0, 0]]), (1.1, [[0, 0], [0, 0]])):
        scored.logp.grad = None
        loss = movielens.level(scored, SMALL, threshold, weight=2.0)
        loss.sum().backward()
        np.testing.assert_allclose(scored.logp.grad, gradient, atol=1e-6)


def test_random_gate_admits_as_many_but_others():
    admit = torch.arange(64) < 16
    gate = adagrpo.Gate(admit, admit, admit, admit, admit)
    rule, weight = movielens.RULES["random"]
    torch.manual_seed(0)
    admitted = rule(gate)
    assert admitted.sum() == 16 and (admitted != admit).any()
    assert weight == movielens.RULES["adagrpo"][1]  # the same dose


def test_diagnosis_gets_every_user_and_what_is_known_before(shop, policy, ranker):
    text = movielens.diagnose(policy, ranker, shop, SMALL)
    assert f"{3 * USERS} samples" in text
    assert "rated" in text and "confidence" in text


# ----------------------------------------------------------------------- the intervals


def slow_variance(gains: np.ndarray) -> float:
    """Of the crossed bootstrap's mean, by its formula over all pairs of cells.

    A draw of n from n takes one twice with probability 1 / n, else independently.
    """
    seeds, users = gains.shape
    second = 0.0
    for same_seed, p in ((True, 1 / seeds), (False, 1 - 1 / seeds)):
        for same_user, q in ((True, 1 / users), (False, 1 - 1 / users)):
            x = gains
            if not same_seed:
                x = x.mean(0, keepdims=True)
            if not same_user:
                x = x.mean(1, keepdims=True)
            second += p * q * (x**2).mean()
    return second - gains.mean() ** 2


@pytest.mark.parametrize("seed_spread, user_spread", [(1, 0), (0, 1), (1, 5), (0.2, 9)])
def test_interval_has_both_variations(seed_spread, user_spread):
    rng = np.random.default_rng(1)
    gains = 3 + rng.normal(size=(8, 60))
    gains += seed_spread * rng.normal(size=(8, 1))
    gains += user_spread * rng.normal(size=(1, 60))
    low, high = movielens.interval(gains)
    half = 1.96 * slow_variance(gains) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(gains.mean(), abs=0.1 * half)


def test_hits_are_averaged_by_user():
    record = {"fused": "100000" + "011010" + "111111"}
    np.testing.assert_allclose(
        movielens.hits_of(record, "fused"), [100 / 6, 50, 100], rtol=1e-12
    )


def test_compare_takes_the_seeds_that_both_have():
    base = {1: {"alone": "000000111111"}, 2: {"alone": "0" * 12}}
    arm = {
        2: {"alone": "111111000000"},
        1: {"alone": "000111111111"},
        3: {"alone": "1" * 12},
    }
    # mean of 50, 75 and 100; gains of 50 and 25
    cell = movielens.compare(arm, base, "alone")
    assert cell.split()[:2] == ["75.00", "+37.50"]
    assert movielens.compare(base, base, "alone").split() == ["25.00"]
    assert movielens.compare({9: arm[3]}, base, "alone").split() == ["100.00"]


# -------------------------------------------------------------------------- the command


def test_command_runs_and_resumes(tmp_path, capsys, monkeypatch):
    tiny = replace(SMALL, pretrain_epochs=10, ranker_epochs=1)
    monkeypatch.setattr(movielens, "SETTINGS", tiny)
    ratings = write(tmp_path / "u.data", made_up())
    out = tmp_path / "runs" / "movielens.jsonl"
    arms = ["before", "nll", "adagrpo", "distil"]
    argv = [str(ratings), "--seeds", "3", "--out", str(out)]
    argv += ["--arms", *arms]
    movielens.main(argv)
    printed = capsys.readouterr().out
    assert f"{3 * USERS} samples" in printed  # the diagnosis
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["arm"] for record in records] == arms
    for record in records:
        assert record["seed"] == 3
        assert len(record["alone"]) == len(record["fused"]) == 6 * USERS
        assert set(record["alone"] + record["fused"]) <= {"0", "1"}
    assert records[1]["dose"] == 0 and records[2]["dose"] > 0
    rows = [line.split() for line in printed.splitlines() if line.startswith("nll")]
    hits = 100 * records[1]["alone"].count("1") / (6 * USERS)
    assert rows[0][:3] == ["nll", "1", f"{hits:.2f}"]

    # A lost record is made again, and is the same: no arm goes on from another.
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:3]) + "\n")
    movielens.main(argv)
    assert out.read_text().splitlines() == lines

    # Then nothing is left to run, and the table is shown all the same.
    capsys.readouterr()
    movielens.main(argv)
    assert out.read_text().splitlines() == lines
    assert "\nadagrpo   1 " in capsys.readouterr().out


@pytest.mark.parametrize("content", ["no json", '{"seed": 1}', "[1]"])
def test_a_bad_results_file_ends_with_one_line(tmp_path, content):
    ratings = write(tmp_path / "u.data", made_up())
    out = tmp_path / "out.jsonl"
    out.write_text(content + "\n")
    with pytest.raises(SystemExit) as error:
        movielens.main([str(ratings), "--out", str(out)])
    text = str(error.value)
    assert text.startswith(f"movielens.py: {out}: ") and "\n" not in text
    assert out.read_text() == content + "\n"
