# SPDX-License-Identifier: MIT
"""Tests of .github/movielens.py, on made-up ratings.

Run: python -m pytest -q .github/test_movielens.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import movielens

from adagrpo import Config

ITEMS = 60
PARTS = ("posttrain", "validation", "test")


def made_up(users: int = 20, seed: int = 0) -> np.ndarray:
    """Ratings (R, 4). A user likes the items of one half of the catalogue, in circles.

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
    return np.array(rows, dtype=float)


def write(path: Path, ratings: np.ndarray, separator: str = "\t") -> Path:
    lines = [separator.join(f"{value:.0f}" for value in row) for row in ratings]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny(monkeypatch):
    """Small settings for what trains."""
    monkeypatch.setattr(movielens, "POLICY_PASSES", 30)
    monkeypatch.setattr(movielens, "RANKER_PASSES", 10)
    monkeypatch.setattr(movielens, "RESAMPLES", 50)


# ----------------------------------------------------------------------------- the data


def by_hand() -> np.ndarray:
    """Three users with 15 likes each, 1 to 15 in order; user 30 comes first.

    User 20 dislikes 40 before its third like, 50 after its tenth, and in the end 3.
    User 10 has 13 likes and is too small.
    """
    rows = []
    for user, start in ((20, 2000), (30, 1000), (40, 3000)):
        rows += [(user, like, 4, start + 10 * like) for like in range(1, 16)]
    rows += [(10, like, 5, like) for like in range(1, 14)]
    rows += [(20, 40, 3, 2025), (20, 50, 1, 2105), (20, 3, 1, 2999)]
    return np.array(rows, dtype=float)


def test_logs_by_hand():
    logs, pad = movielens.make_logs(by_hand())
    number = {like: like - 1 for like in range(1, 16)} | {40: 15, 50: 16}
    assert pad == 17

    # Of three users one is early: user 30, who becomes 0. All its likes are known.
    P = pad
    first = [0, P, P, P, P, P, P, P, 0, 1]  # like 2 after like 1
    last = [0, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert logs["pretrain"].shape == (14, 10)
    assert logs["pretrain"][0].tolist() == first
    assert logs["pretrain"][-1].tolist() == last

    # Users 20 and 40 become 1 and 2. Likes 4 to 15 are held out, so likes 2 and 3 are
    # the ranker's.
    ranker = logs["ranker"]
    assert ranker[:14].tolist() == logs["pretrain"].tolist()
    assert ranker[14:, 0].tolist() == [1, 1, 2, 2]
    assert ranker[14:, -1].tolist() == [1, 2, 1, 2]

    targets = {name: logs[name][logs[name][:, 0] == 1, -1] for name in PARTS}
    assert targets["posttrain"].tolist() == [3, 4, 5, 6, 7, 8]
    assert targets["validation"].tolist() == [9, 10]
    assert targets["test"].tolist() == [11, 12, 13, 14]
    assert logs["test"][-1].tolist() == [2, 6, 7, 8, 9, 10, 11, 12, 13, 14]

    # IDs know dislikes too, but of user 20 only the one before the cut.
    rated = logs["rated"]
    mine = rated[rated[:, 0] == 1, 1].tolist()
    assert mine == [number[1], number[2], number[40], number[3]]
    assert sorted(rated[rated[:, 0] == 0, 1]) == list(range(15))


def test_equal_times_keep_the_order_of_the_file():
    ratings = by_hand()
    ratings[:, 3] = ratings[:, 3] // 1000
    logs, _ = movielens.make_logs(ratings)
    assert logs["test"][-4:, -1].tolist() == [11, 12, 13, 14]
    reverse, _ = movielens.make_logs(ratings[::-1])
    assert reverse["test"][-4:, -1].tolist() == [3, 2, 1, 0]


def test_kinds_are_thirds_of_the_rankers_log():
    shop = movielens.make_shop(made_up(40), seed=0)
    liked = np.bincount(shop.ranker.target, minlength=ITEMS)
    for kind in (0, 1):
        better = shop.ranker.target[shop.ranker.kind == kind]
        worse = shop.ranker.target[shop.ranker.kind == kind + 1]
        assert liked[better].min() > liked[worse].max()
    shares = np.bincount(shop.ranker.kind) / len(shop.ranker.kind)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.12)
    kind_of = dict(zip(shop.ranker.target, shop.ranker.kind, strict=True))
    for item, kind in zip(shop.test.target, shop.test.kind, strict=True):
        assert kind == kind_of.get(item, 2)


def test_ids_are_unique_and_tell_the_halves_apart():
    shop = movielens.make_shop(made_up(40), seed=1)
    tokens = shop.tokens
    assert tokens.shape == (ITEMS + 1, 3)
    assert len(np.unique(tokens, axis=0)) == len(tokens)

    # A token belongs to one level, and PAD shares none.
    levels = [set(tokens[:, level]) for level in range(3)]
    assert not levels[0] & levels[1] and not levels[1] & levels[2]
    assert not (tokens[:-1] == tokens[-1]).any()
    for split in (shop.pretrain, shop.ranker, shop.test):
        assert (split.target < ITEMS).all()

    again = movielens.make_shop(made_up(40), seed=1)
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


def test_no_target_from_the_cut_on_is_in_a_training_log():
    ratings = made_up(30)
    logs, _ = movielens.make_logs(ratings)
    known = set(map(tuple, logs["rated"].tolist()))
    for name in ("ranker", "pretrain"):
        for user, *items in logs[name].tolist():
            known |= {(user, item) for item in items}
    for name in PARTS:
        mine = {(row[0], row[-1]) for row in logs[name].tolist()}
        assert len(mine) == len(logs[name])
        assert not mine & known
        known |= mine
    movielens.check_leaks(logs)


@pytest.mark.parametrize("place", ["rated", "ranker", "pretrain", "history"])
@pytest.mark.parametrize("name", PARTS)
def test_a_planted_leak_is_found(name, place):
    logs, pad = movielens.make_logs(made_up(30))
    user, *_, target = logs[name][5]
    row = [user, *[pad] * 8, target]
    if place == "history":
        row = [user, target, *[pad] * 8]
        place = "ranker"
    if place == "rated":
        row = [user, target]
    logs[place] = np.append(logs[place], [row], axis=0)
    with pytest.raises(ValueError, match=f"leak: a target of {name}"):
        movielens.check_leaks(logs)


def test_a_test_row_among_the_post_training_rows_is_found():
    logs, pad = movielens.make_logs(made_up(30))
    user, *_, target = logs["test"][0]
    row = [user, *[pad] * 8, target]
    logs["posttrain"] = np.append(logs["posttrain"], [row], axis=0)
    with pytest.raises(ValueError, match="leak: a target of test"):
        movielens.check_leaks(logs)


def test_make_shop_looks_for_leaks(monkeypatch):
    logs, pad = movielens.make_logs(made_up())
    logs["ranker"] = np.append(logs["ranker"], logs["posttrain"][:1], axis=0)
    monkeypatch.setattr(movielens, "make_logs", lambda ratings: (logs, pad))
    with pytest.raises(ValueError, match="leak"):
        movielens.make_shop(made_up(), seed=0)


def test_what_is_held_out_shapes_neither_ids_nor_logs():
    """The held-out likes of a late user in another order: nothing before changes."""
    ratings = made_up(30)
    mine = np.flatnonzero((ratings[:, 0] == 36) & (ratings[:, 2] == 5))[-12:]
    other = ratings.copy()
    other[mine, 1] = ratings[mine[::-1], 1]
    one = movielens.make_shop(ratings, seed=3)
    two = movielens.make_shop(other, seed=3)
    assert (one.tokens == two.tokens).all()
    assert (one.ranker.target == two.ranker.target).all()
    assert (one.ranker.kind == two.ranker.kind).all()
    assert (one.test.target != two.test.target).any()


# --------------------------------------------------------------------------- the ranker


def test_ranker_scores_and_learns(tiny):
    shop = movielens.make_shop(made_up(40), seed=0)
    ranker = movielens.Ranker(shop, Config(seed=0))
    history = torch.as_tensor(shop.test.history)
    target = torch.as_tensor(shop.test.target)
    everything = torch.arange(ITEMS).expand(len(target), -1)
    with torch.no_grad():
        scores = ranker.click_probability(history, everything)  # (N, items)
        some = ranker.click_probability(history, everything[:, 10:13])
    assert scores.shape == (len(target), ITEMS)
    assert (scores > 0).all() and (scores < 1).all()
    torch.testing.assert_close(some, scores[:, 10:13])

    own = scores.gather(1, target[:, None])
    auc = (scores < own).float().mean()
    assert auc > 0.7

    # The same histories, last like first: the order is seen.
    with torch.no_grad():
        backwards = ranker.click_probability(history.flip(1), everything)
    assert not torch.allclose(backwards, scores)


def test_score_is_the_shifted_probability(tiny):
    shop = movielens.make_shop(made_up(), seed=0)
    ranker = movielens.Ranker(shop, Config(seed=0))
    history = torch.as_tensor(shop.test.history[:2])
    everything = torch.arange(ITEMS + 1).expand(2, -1)
    with torch.no_grad():
        scores = ranker.click_probability(history, everything)
    probability = (scores.logit() - 5).exp()
    torch.testing.assert_close(probability.sum(1), torch.ones(2), rtol=1e-3, atol=0)


# ------------------------------------------------------------------------ the intervals


def test_over_seeds_by_hand():
    gains = np.array([[1.0, 3.0], [3.0, 5.0], [6.0, 6.0]])  # seed means 2, 4, 6
    # standard deviation 2, three seeds, t 4.30
    assert movielens.over_seeds(gains) == pytest.approx(4.30 * 2 / np.sqrt(3))
    assert movielens.over_seeds(np.tile(gains, (8, 1))) == pytest.approx(
        2.26 * np.std(np.tile([2, 4, 6], 8), ddof=1) / np.sqrt(24)
    )
    assert np.isnan(movielens.over_seeds(gains[:1]))


def test_over_users_by_hand():
    """Users vary, seeds do not: mean 0.5 of 400 coins, standard error 0.025."""
    user = np.arange(400) % 2 * 1.0
    low, high = movielens.over_users(np.array([user, user]))
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)

    # Only the mean over seeds counts for a user.
    low, high = movielens.over_users(np.array([user, 1 - user]))
    assert low == high == 0.5


def test_hits_are_averaged_by_user():
    record = {"fused": "1000" + "0110" + "1111"}
    assert movielens.hits_of(record, "fused").tolist() == [25, 50, 100]


def test_compare_takes_the_seeds_that_both_have():
    base = {1: {"hr@10": "00001111"}, 2: {"hr@10": "00000000"}}
    arm = {2: {"hr@10": "11110000"}, 1: {"hr@10": "00011111"}, 3: {"hr@10": "1" * 8}}
    # mean of 50, 62.5 and 100; gains of 50 and 12.5
    cell = movielens.compare(arm, base, "hr@10")
    assert cell.split()[:2] == ["70.83", "+31.25"]
    assert cell.split()[2] == f"+-{12.71 * 18.75 * 2**0.5 / 2**0.5:.2f}"
    assert movielens.compare(base, base, "hr@10").split() == ["25.00"]
    assert movielens.compare({9: arm[3]}, base, "hr@10").split() == ["100.00"]


# -------------------------------------------------------------------------- the command


def test_command_runs_and_resumes(tiny, tmp_path, capsys, monkeypatch):
    ratings = write(tmp_path / "u.data", made_up())
    out = tmp_path / "runs" / "movielens.jsonl"
    argv = [str(ratings), "--seeds", "3", "--epochs", "1", "--out", str(out)]
    movielens.main([*argv, "--arms", "before", "nll", "adagrpo-5"])
    printed = capsys.readouterr().out
    assert "to teach" in printed  # the diagnosis
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["arm"] for record in records] == ["before", "nll", "adagrpo-5"]
    for record in records:
        assert record["seed"] == 3 and record["lr"] == 3e-4 and record["epochs"] == 1
        assert len(record["hr@10"]) == len(record["fused"]) == 4 * 14
        assert set(record["hr@10"] + record["fused"]) <= {"0", "1"}
    assert records[1]["dose"] == 0 and records[2]["dose"] > 0
    assert records[0]["hr@10"] != records[1]["hr@10"]
    rows = [line.split() for line in printed.splitlines() if line.startswith("nll")]
    hits = 100 * records[1]["hr@10"].count("1") / (4 * 14)
    assert rows[0][:3] == ["nll", "1", f"{hits:.2f}"]

    # A lost record is made again, and is the same: no arm goes on from another.
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:2]) + "\n")
    movielens.main([*argv, "--arms", "nll", "adagrpo-5"])
    assert out.read_text().splitlines() == lines

    # Then nothing is left to run, and the table is shown all the same.
    capsys.readouterr()
    monkeypatch.setattr(movielens, "run_seed", None)
    movielens.main([*argv, "--arms", "nll", "adagrpo-5"])
    assert out.read_text().splitlines() == lines
    assert "\nadagrpo-5          1 " in capsys.readouterr().out


def test_random_gate_admits_as_many_but_others():
    rule, weight = movielens.ARMS["random"]
    gate_rule, gate_weight = movielens.ARMS["adagrpo-5"]
    admit = torch.arange(64) < 16
    gate = type("Gate", (), {"admit": admit})
    torch.manual_seed(0)
    admitted = rule(gate)
    assert admitted.sum() == 16 and (admitted != admit).any()
    assert (gate_rule(gate) == admit).all()
    assert weight == gate_weight == 5


@pytest.mark.parametrize("name, separator", [("u.data", "\t"), ("ratings.dat", "::")])
def test_formats_say_the_same(tmp_path, name, separator):
    ratings = made_up(3)
    path = write(tmp_path / name, ratings, separator)
    assert (movielens.read_ratings(path) == ratings).all()
    path.write_text("user_id:token\titem_id:token\trating\ttime\n" + path.read_text())
    assert (movielens.read_ratings(path) == ratings).all()


GOOD = "1\t2\t3\t4\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("", "no ratings"),
        (GOOD + "1\tx\t3\t4\n", "could not convert"),
        (GOOD + "1\t2\t3\n", "columns"),
        ("1\t2\t3\n", "a line must be user"),
        ("1\t2\tnan\t4\n", "a line must be user"),
        (GOOD, "0 users have 14 likes"),
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
