# SPDX-License-Identifier: MIT
"""A real log, end to end: the example to copy for your own.

    python .github/movielens.py RATINGS --seeds 0 1 2 --out runs/movielens.jsonl

RATINGS is MovieLens: `u.data` (100k), `ratings.dat` (1M), or RecBole's `ml-100k.inter`;
a line holds user, item, rating and time. The policy learns to write the item that a
user likes next (a rating of 4 or more), from the last eight likes.

Purchases are scarce and logs plentiful: the 30% of the users whose first rating is the
earliest pre-train the policy. Of every other user the last twelve likes are held out,
six to post-train on, two for validation, four for the test. The ranker learns from all
users' likes before that cut, and all ratings before it make the semantic IDs. The cut
is each user's own: by the calendar, one user's past may be later than another's test.

For your own log, replace from top to bottom:
  the data    `read_ratings` and `make_shop`: whatever makes Splits, and IDs of items. A
              history shorter than 8 is filled from the left by PAD, an item with an ID
              of its own that is never a target. Keep `check_leaks`.
  the ranker  `Ranker`: any object with click_probability(history (B, H), items (B, K))
              -> (B, K) in 0..1
  the run     ARMS. Read the diagnosis first: nothing to teach, nothing to run.

A seed takes 10 minutes of one core. Seeds differ in IDs, policy and ranker, the users
are the same: so the points over nll have two 95% intervals, Student's over seeds (+-)
and a bootstrap over test users, in brackets. --out gets a line per seed and arm. What
stands there is not run again, several processes may add to it, and all of it is shown.
"""

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diagnose import report

import adagrpo
from adagrpo import Config, Policy
from toy_data import Split

# ----------------------------------------------------------------------------- the data

LIKE = 4  # the lowest rating that is a like
HISTORY = 8  # likes in a history, as in toy_data.py
EARLY = 0.3  # share of the users who pre-train the policy
HELD_OUT = {"posttrain": 6, "validation": 2, "test": 4}  # last likes of the others
MIN_LIKES = sum(HELD_OUT.values()) + 2  # before those a target, and a like before it
CLUSTERS = (16, 8)  # of the catalogue, and inside each of these
ROUNDS = 30  # of k-means; on ml-100k nothing moves after 20
KINDS = ("head", "middle", "tail")  # of targets: each has a third of the ranker's log


def read_ratings(path: Path) -> np.ndarray:
    """Lines as (R, 4): user, item, rating, time. Raises ValueError."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.replace("::", "\t").splitlines()
    if lines and lines[0].startswith("user"):
        del lines[0]
    if not lines:
        raise ValueError("it holds no ratings")
    ratings = np.loadtxt(lines, delimiter="\t", ndmin=2)
    if ratings.shape[1] != 4 or not np.isfinite(ratings).all():
        raise ValueError("a line must be user, item, rating and time")
    return ratings


def make_shop(ratings: np.ndarray, seed: int) -> SimpleNamespace:
    """Cut the ratings (R, 4) as the docstring above says. seed: of the k-means."""
    logs, pad = make_logs(ratings)
    check_leaks(logs)
    tokens = semantic_ids(logs["rated"], pad, np.random.default_rng(seed))

    # Thirds of the ranker's log by how often an item is liked in it.
    ranker = logs["ranker"]
    times_liked = np.bincount(ranker[:, -1], minlength=pad)
    low, high = np.quantile(times_liked[ranker[:, -1]], [1 / 3, 2 / 3])
    kind = (times_liked <= high).astype(int) + (times_liked <= low)

    splits = {}
    for name in ("ranker", "pretrain", *HELD_OUT):
        target = logs[name][:, -1]
        splits[name] = Split(logs[name][:, 1:-1], target, kind[target])
    return SimpleNamespace(tokens=tokens, **splits)


def make_logs(ratings: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Logs by name, rows of a user and items, the last one the target; PAD's number."""
    _, item_of = np.unique(ratings[:, 1], return_inverse=True)
    pad = item_of.max() + 1

    # Of every user {item: is it liked?}; users and items come in order of time. Equal
    # times keep the file's order: in ml-100k half bear the time of their neighbour.
    users = {}
    for row in ratings[:, 3].argsort(kind="stable"):
        rated = users.setdefault(ratings[row, 0], {})
        rated.setdefault(item_of[row], ratings[row, 2] >= LIKE)
    users = [rated for rated in users.values() if sum(rated.values()) >= MIN_LIKES]
    if len(users) < 2:
        raise ValueError(f"{len(users)} users have {MIN_LIKES} likes, 2 are needed")

    logs = {name: [] for name in ("rated", "ranker", "pretrain", *HELD_OUT)}
    for user, rated in enumerate(users):
        items = list(rated)
        likes = [item for item in items if rated[item]]
        padded = [pad] * HISTORY + likes
        rows = [[user, *padded[n : n + HISTORY + 1]] for n in range(len(likes))]

        cut = len(likes)
        if user < np.ceil(EARLY * len(users)):
            logs["pretrain"] += rows[1:]  # nothing stands before the first like
        else:
            cut -= sum(HELD_OUT.values())
            del items[items.index(likes[cut]) :]
        logs["rated"] += [[user, item] for item in items]
        logs["ranker"] += rows[1:cut]
        for name, size in HELD_OUT.items():
            logs[name] += rows[cut : cut + size]
            cut += size
    return {name: np.array(rows) for name, rows in logs.items()}, pad


def check_leaks(logs: dict[str, np.ndarray]) -> None:
    """ValueError if a target that was held out stands in a log before its own."""
    seen = np.array([], dtype=int)
    for name, rows in logs.items():
        pairs = rows[:, :1] * 2**32 + rows[:, 1:]  # of a user and an item, as numbers
        if name in HELD_OUT and np.isin(pairs[:, -1], seen).any():
            raise ValueError(f"leak: a target of {name} stands in an earlier log")
        seen = np.append(seen, pairs)


def semantic_ids(rated: np.ndarray, pad: int, rng: np.random.Generator) -> np.ndarray:
    """IDs (items + PAD, 3) from who rated what (R, 2): two clusters and a slot.

    Two items are alike if they were rated together with the same others.
    """
    matrix = np.zeros((rated[:, 0].max() + 1, pad), dtype=np.float32)
    matrix[rated[:, 0], rated[:, 1]] = 1
    together = matrix.T @ matrix  # (items, items): how many users rated both
    count = together.diagonal().clip(1)
    np.fill_diagonal(together, 0)
    profile = together / np.sqrt(count)
    profile /= np.linalg.norm(profile, axis=1, keepdims=True).clip(1e-9)

    codes = np.zeros((pad + 1, 3), dtype=int)
    codes[:pad, 0] = k_means(profile, CLUSTERS[0], rng)
    for cluster in np.unique(codes[:pad, 0]):
        members = np.flatnonzero(codes[:pad, 0] == cluster)
        codes[members, 1] = k_means(profile[members], CLUSTERS[1], rng)
    for item in range(pad):
        is_alike = (codes[:item, :2] == codes[item, :2]).all(axis=1)
        codes[item, 2] = is_alike.sum()  # the next free slot

    # PAD has nobody else's codes, and every level has its own tokens.
    codes[pad] = codes.max(axis=0) + 1
    sizes = codes[pad] + 1
    return codes + np.array([0, sizes[0], sizes[0] + sizes[1]])


def k_means(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Cluster (N,) of unit vectors (N, D), by cosine; some of the k may stay empty."""
    centres = points[rng.permutation(len(points))[:k]]
    for _ in range(ROUNDS):
        cluster = (points @ centres.T).argmax(axis=1)
        centres = np.eye(len(centres), dtype=np.float32)[cluster].T @ points
        centres /= np.linalg.norm(centres, axis=1, keepdims=True).clip(1e-9)
    return cluster


# --------------------------------------------------------------------------- the ranker


class Ranker:
    """What is liked next? A GPT like the policy, but a token is an item; more data."""

    def __init__(self, shop: SimpleNamespace, config: Config):
        items = np.arange(len(shop.tokens))[:, None]  # IDs of one token
        large = SimpleNamespace(tokens=items, pretrain=shop.ranker)
        config = replace(config, pretrain_epochs=RANKER_PASSES)
        self.gpt = adagrpo.pretrain(large, config)

    def click_probability(self, history: Tensor, items: Tensor) -> Tensor:
        """The score of items (B, K) after histories (B, H): in 0..1, (B, K)."""
        logp, _ = self.gpt(history)  # (B, H, items)
        # + 5: a half for an item with a chance of 1 in 150 to be the next
        return (logp[:, -1].gather(1, items) + 5).sigmoid()


# ------------------------------------------------------------------------------ the run

POLICY_PASSES = 10
RANKER_PASSES = 2
RESAMPLES = 4000  # of the test users, for the bootstrap
KEY = ("ratings", "lr", "epochs", "seed", "arm")  # what tells records apart

# Quantiles of Student's t for 95%, 1 to 9 degrees of freedom; 9's value serves beyond.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

# Who gets the GRPO term, and its weight. A random gate admits as many of a batch as the
# gate, but others. The halves of the gate have the dose of adagrpo-5 (seed 1).
ARMS = {
    "nll": (None, 0.0),
    "adagrpo-5": (lambda gate: gate.admit, 5.0),
    "mix-0.3": (lambda gate: torch.ones_like(gate.admit), 0.3),
    "mix-1": (lambda gate: torch.ones_like(gate.admit), 1.0),
    "random": (lambda gate: gate.admit[torch.randperm(len(gate.admit))], 5.0),
    "adagrpo-1": (lambda gate: gate.admit, 1.0),
    "discriminability": (lambda gate: gate.clear, 3.0),
    "difficulty": (lambda gate: gate.hard, 1.1),
}


@torch.no_grad()
def diagnose(policy: Policy, ranker: Ranker, split: Split, config: Config) -> str:
    """Has the ranker anything to teach, and where?"""
    history = torch.as_tensor(split.history)
    target = torch.as_tensor(split.target)
    scored = adagrpo.roll_out_and_score(policy, ranker, history, target, config)
    scores = {}
    for name in ("rewards", "target_reward", "hit", "valid", "logp"):
        scores[name] = getattr(scored, name).numpy()
    scores["group_confidence"] = scores["logp"][:, 0]  # of the likeliest rollout
    scores["group_target"] = np.array(KINDS)[split.kind]
    return report(scores, config.min_difficulty, config.min_discriminability)


def run_seed(shop: SimpleNamespace, config: Config, keys: list, out: Path) -> None:
    """Train policy and ranker, diagnose them, and append a record for every key."""
    start = adagrpo.pretrain(shop, config)
    ranker = Ranker(shop, config)
    print(diagnose(start, ranker, shop.validation, config), flush=True)

    for key in keys:
        record = dict(zip(KEY, key, strict=True))
        policy = copy.deepcopy(start)
        dose = 0.0
        if record["arm"] != "before":
            arm = ARMS[record["arm"]]
            dose = adagrpo.post_train(policy, ranker, shop.posttrain, *arm, config)
        validation = adagrpo.evaluate(policy, ranker, shop.validation, config)
        test = adagrpo.evaluate(policy, ranker, shop.test, config)
        result = adagrpo.Result(validation, test, dose)

        # Every hit is kept, for the bootstrap.
        record["hr@10"] = "".join(f"{hit:.0f}" for hit in test["hr@10"])
        record["fused"] = "".join(f"{hit:.0f}" for hit in result.fused())
        record["ndcg@10"] = adagrpo.percent(test["ndcg@10"])
        record["hallucination"] = adagrpo.percent(test["hallucination"])
        record["validation"] = adagrpo.percent(validation["hr@10"])
        record["dose"] = dose
        with out.open("ab", buffering=0) as file:  # one write: lines stay whole
            file.write(json.dumps(record).encode() + b"\n")
        print(*key, f"HR@10 {adagrpo.percent(test['hr@10']):.2f}", flush=True)


def read_records(path: Path) -> dict[tuple, dict]:
    """The records of a results file, by what tells them apart."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {tuple(record[name] for name in KEY): record for record in records}


def hits_of(record: dict, metric: str) -> np.ndarray:
    """Percent of each user's test targets that were hit (users,); they stand in a row."""
    hits = np.array(list(record[metric]), dtype=float)
    return 100 * hits.reshape(-1, HELD_OUT["test"]).mean(1)


def over_seeds(gains: np.ndarray) -> float:
    """Half the 95% interval of the mean of (seeds, users), by Student."""
    seeds = len(gains)
    if seeds < 2:
        return np.nan
    spread = gains.mean(1).std(ddof=1)
    return T95[min(seeds - 2, len(T95) - 1)] * spread / np.sqrt(seeds)


def over_users(gains: np.ndarray) -> np.ndarray:
    """Ends of the 95% interval of the mean of (seeds, users), by bootstrap."""
    gain = gains.mean(0)
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(RESAMPLES)]
    return np.quantile(means, [0.025, 0.975])


def compare(runs: dict[int, dict], base: dict[int, dict], metric: str) -> str:
    """Of records by seed: their mean, and the points over base where both have it."""
    hits = {seed: hits_of(record, metric) for seed, record in runs.items()}
    cell = f"{np.mean(list(hits.values())):>6.2f}"
    both = [seed for seed in hits if seed in base]
    if runs is not base and both:
        gains = [hits[seed] - hits_of(base[seed], metric) for seed in both]
        gains = np.array(gains)  # (seeds, users)
        low, high = over_users(gains)
        cell += f" {gains.mean():+.2f} +-{over_seeds(gains):.2f}"
        cell += f" [{low:+.2f}, {high:+.2f}]"
    return f"{cell:<34}"


def print_tables(records: dict[tuple, dict]) -> None:
    """All that a file holds, in percent of test targets."""
    tables = {}
    for (*setting, seed, arm), record in records.items():
        arms = tables.setdefault(tuple(setting), {})
        arms.setdefault(arm, {})[seed] = record

    for (ratings, lr, epochs), arms in tables.items():
        print(f"\n{ratings}, lr {lr:g}, {epochs} passes: HR@10, and points over nll")
        print(f"{'':<17}{'n':>3}{'alone':>7}{'fused':>34}{'dose':>34}{'valid.':>7}")
        for arm, runs in arms.items():
            line = f"{arm:<17}{len(runs):>3} "
            for metric in ("hr@10", "fused"):
                line += compare(runs, arms.get("nll", {}), metric)
            for name in ("dose", "validation"):
                line += f"{np.mean([record[name] for record in runs.values()]):>7.2f}"
            print(line)


def main(argv: list[str] | None = None) -> None:
    """Run what the file lacks, and print the tables."""
    parser = argparse.ArgumentParser(description="A real log for adagrpo.py.")
    add = parser.add_argument
    add("ratings", type=Path, help="u.data, ratings.dat or ml-100k.inter")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--arms", nargs="+", choices=["before", *ARMS], default=["before", *ARMS])
    add("--lr", type=float, default=Config.lr, help="of post-training")
    add("--epochs", type=int, default=Config.epochs, help="passes of post-training")
    add("--out", type=Path, default=Path("runs/movielens.jsonl"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are tiny

    path = options.ratings
    try:
        ratings = read_ratings(path)
        make_shop(ratings, seed=0)
        path = options.out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        read_records(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{type(error).__name__}: {error}"
        raise SystemExit(f"movielens.py: {path}: {message}") from None

    config = Config(lr=options.lr, epochs=options.epochs, pretrain_epochs=POLICY_PASSES)
    setting = (options.ratings.name, options.lr, options.epochs)
    for seed in options.seeds:
        done = read_records(options.out)
        keys = [(*setting, seed, arm) for arm in options.arms]
        missing = [key for key in keys if key not in done]
        if missing:
            shop = make_shop(ratings, seed)
            run_seed(shop, replace(config, seed=seed), missing, options.out)
    print_tables(read_records(options.out))


if __name__ == "__main__":
    main()
