# SPDX-License-Identifier: MIT
"""A real log for adagrpo.py: python .github/movielens.py RATINGS --out ml.npz

RATINGS is a file of MovieLens: `u.data` (100k), `ratings.dat` (1M), `ratings.csv`
(later releases), or RecBole's copy of the first, `ml-100k.inter`. A line holds user,
item, rating and time. Rated means that the feed showed the item, a rating of at least 4
(a like) that it was clicked. What the policy learns to write is the user's next like.

Each user's ratings are put in order of time, and in the file's order where two bear the
same second, as half of ml-100k do. They are cut once, at the user's fifth last like:

  before the cut    likes    -> pre-training: every like but the first is a target
                    ratings  -> the ranker's log: slates of ten in a row, with clicks
                    ratings  -> semantic IDs; likes -> which items are popular
  from the cut on   likes    -> three post-training targets, then validation, then test
                    ratings below 4 are used for nothing

A history holds what the user liked before. So no pair of user and item that is a target
after the cut has reached the ranker, as shown or in a history, and none has shaped an
ID. The cut is each user's own: by the calendar, what one user rates before it may be
later than what another is tested on. One date for all would not do, since half the
users of ml-100k rate everything within an hour. Users with fewer than seven likes are
left out; an item that a user rates again counts the first time only.

The arrays, with N rows in a split and M slates; items are numbered from 0:

  tokens (items, 3)        semantic IDs: two levels of k-means on co-ratings, and a slot
  {split}_history (N, 8)   pretrain, posttrain, validation, test: likes, oldest first
  {split}_target (N,)      the next like
  {split}_kind (N,)        index into `kinds`: is the target head, middle or tail?
  kinds (3,)               their names; each holds a third of the likes before the cut
  feed_history (M, 8), shown (M, 10), clicked (M, 10) bool

The last item is PAD: it fills short histories from the left and is never a target.
"""

import argparse
import math
import os
import re
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

LIKE = 4.0  # the lowest rating that counts as a click
HISTORY = 8  # likes in a history, as in toy_data.py
SLATE = 10  # ratings in a row that make up one slate, as in toy_data.py
STRIDE = 2  # a slate starts at every second rating, so that each is seen in five slates
HELD_OUT = 5  # last likes of a user: three for post-training, validation, test
MIN_LIKES = HELD_OUT + 2  # before those, a target for pre-training and its history
CLUSTERS = (16, 8)  # of the catalogue, and inside each of these
ROUNDS = 30  # of k-means; on ml-100k nothing moves after 20
KINDS = ("head", "middle", "tail")


def read_ratings(path: Path) -> np.ndarray:
    """Lines as (R, 4) floats: user, item, rating, time. Raises ValueError."""
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            header = number == 1 and line.startswith("user")
            if header or not line:
                continue

            try:
                user, item, rating, time = re.split("::|\t|,", line)
                row = (int(user), int(item), float(rating), float(time))
            except ValueError:
                row = (0, 0, math.nan, 0)
            if not (0 <= row[2] <= 5 and math.isfinite(row[3])):
                message = "is no rating (user, item, rating from 0 to 5, time)"
                raise ValueError(f"line {number} {message}: {line[:60]!a}")
            rows.append(row)
    return np.array(rows, dtype=float).reshape(-1, 4)


def in_order(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and likes (bool), (R,) each: user by user, in order of time.

    Users and items are numbered from 0. Second ratings of an item and users with fewer
    than MIN_LIKES likes are gone. Raises ValueError if that leaves nobody.
    """
    ratings = ratings[np.lexsort((ratings[:, 3], ratings[:, 0]))]
    _, first = np.unique(ratings[:, :2], axis=0, return_index=True)
    ratings = ratings[np.sort(first)]

    _, user = np.unique(ratings[:, 0], return_inverse=True)
    liked = ratings[:, 2] >= LIKE
    likes = np.bincount(user, weights=liked)
    keep = likes[user] >= MIN_LIKES
    if not keep.any():
        raise ValueError(
            f"too few ratings: none of {len(likes)} users has {MIN_LIKES} likes "
            f"(ratings of {LIKE:g} or more)"
        )

    _, user = np.unique(user[keep], return_inverse=True)
    _, item = np.unique(ratings[keep, 1], return_inverse=True)
    return user, item, liked[keep]


def k_means(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Cluster (N,) of each of N unit vectors (N, D), by cosine; at most k clusters.

    A vector may be zero, as that of an item that nobody rated: any cluster will do.
    """
    k = min(k, len(points))
    centres = points[rng.choice(len(points), k, replace=False)]
    for _ in range(ROUNDS):
        nearest = (points @ centres.T).argmax(axis=1)
        for cluster in range(k):
            members = points[nearest == cluster]
            if len(members):  # an empty cluster stays where it is
                centre = members.sum(axis=0)
                centres[cluster] = centre / np.linalg.norm(centre).clip(1e-9)
    return nearest


def semantic_ids(
    user: np.ndarray, item: np.ndarray, items: int, rng: np.random.Generator
) -> np.ndarray:
    """IDs (items + 1, 3) from ratings, users (R,) and items (R,); PAD's is last.

    Two items are alike if whoever rated them also rated the same other items. Every
    level has tokens of its own.
    """
    rated = np.zeros((items, user.max() + 1), dtype=np.float32)
    rated[item, user] = 1
    count = rated.sum(axis=1)

    # (items, items): the cosine of an item with every other one, as a unit vector
    together = rated @ rated.T
    np.fill_diagonal(together, 0)
    profile = together / np.sqrt(np.outer(count, count).clip(1))
    profile /= np.linalg.norm(profile, axis=1, keepdims=True).clip(1e-9)

    codes = np.zeros((items + 1, 3), dtype=np.int64)
    codes[:items, 0] = k_means(profile, CLUSTERS[0], rng)
    for cluster in range(CLUSTERS[0]):
        members = np.flatnonzero(codes[:items, 0] == cluster)
        if len(members):
            codes[members, 1] = k_means(profile[members], CLUSTERS[1], rng)

    filled = np.zeros(CLUSTERS, dtype=np.int64)
    for number in range(items):
        leaf = tuple(codes[number, :2])
        codes[number, 2] = filled[leaf]
        filled[leaf] += 1

    codes[items] = (CLUSTERS[0], CLUSTERS[1], filled.max())  # PAD: nobody else's codes
    sizes = codes.max(axis=0) + 1
    return codes + np.array([0, sizes[0], sizes[0] + sizes[1]])


def kind_of_item(likes: np.ndarray, items: int) -> np.ndarray:
    """Index into KINDS (items,), from the liked items (R,): thirds of the likes."""
    count = np.bincount(likes, minlength=items)
    order = np.argsort(-count, kind="stable")
    likes_of_better_known = count[order].cumsum() - count[order]
    third = likes_of_better_known * len(KINDS) // len(likes)
    kind = np.empty(items, dtype=np.int64)
    kind[order] = third.clip(max=len(KINDS) - 1)  # never liked: tail
    return kind


def split_users(
    user: np.ndarray, item: np.ndarray, liked: np.ndarray, pad: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Cut every user's ratings, as the module's docstring says; all three are (R,).

    Returns the windows (N, 9) of each split, which are a history and its target; the
    ranker's log; and which ratings are before the cut (R,), bool.
    """
    windows = {"pretrain": [], "posttrain": [], "validation": [], "test": []}
    feed = {"feed_history": [], "shown": [], "clicked": []}
    before_cut = np.zeros(len(user), dtype=bool)

    first_ratings = np.flatnonzero(np.diff(user)) + 1
    for mine in np.split(np.arange(len(user)), first_ratings):
        likes = mine[liked[mine]]
        cut = likes[-HELD_OUT]
        before_cut[mine[0] : cut] = True

        # histories[n]: the last eight of the user's first n likes, PAD to their left
        padded = np.concatenate([np.full(HISTORY, pad), item[likes]])
        histories = sliding_window_view(padded, HISTORY)

        # the first like has nothing before it, so it is no target
        rows = np.column_stack([histories[:-1], item[likes]])
        windows["pretrain"].append(rows[1:-HELD_OUT])
        windows["posttrain"].append(rows[-HELD_OUT:-2])
        windows["validation"].append(rows[-2:-1])
        windows["test"].append(rows[-1:])

        # a slate ends before the cut, and comes after at least one like
        starts = np.arange(mine[0], cut - SLATE + 1, STRIDE)
        starts = starts[starts > likes[0]]
        likes_before = np.searchsorted(likes, starts)
        slates = starts[:, None] + np.arange(SLATE)
        feed["feed_history"].append(histories[likes_before])
        feed["shown"].append(item[slates])
        feed["clicked"].append(liked[slates])

    windows = {split: np.concatenate(parts) for split, parts in windows.items()}
    feed = {name: np.concatenate(parts) for name, parts in feed.items()}
    return windows, feed, before_cut


def make_log(ratings: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The arrays of the module's docstring, by name.

    ratings (R, 4): user, item, rating, time. seed: of where k-means starts. Raises
    ValueError on too few ratings.
    """
    user, item, liked = in_order(ratings)
    items = item.max() + 1
    windows, feed, before_cut = split_users(user, item, liked, pad=items)
    if not len(feed["shown"]):
        raise ValueError(
            f"too few ratings: no user has {SLATE} between the first like "
            "and the fifth last"
        )

    rng = np.random.default_rng(seed)
    tokens = semantic_ids(user[before_cut], item[before_cut], items, rng)
    kind = kind_of_item(item[before_cut & liked], items)

    log = {"tokens": tokens, "kinds": np.array(KINDS)} | feed
    for split, rows in windows.items():
        log[f"{split}_history"] = rows[:, :HISTORY]
        log[f"{split}_target"] = rows[:, HISTORY]
        log[f"{split}_kind"] = kind[rows[:, HISTORY]]
    return log


def save(path: Path, log: dict[str, np.ndarray]) -> None:
    """Write the arrays whole or not at all: a draft beside the file takes its place."""
    path = path.resolve()  # through a link, to the file itself
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("xb") as file:
            np.savez_compressed(file, **log)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Convert, write, and say what is in the file. A bad file ends with one line."""
    parser = argparse.ArgumentParser(
        description="MovieLens ratings -> .npz for adagrpo.py"
    )
    parser.add_argument("ratings", type=Path, help="u.data, ratings.dat or the like")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--seed", type=int, default=0, help="of the k-means starts")
    config = parser.parse_args(argv)
    if config.out.suffix != ".npz":  # above all, never write over the ratings
        raise SystemExit(f"movielens.py: --out {config.out}: must end in .npz")

    try:
        log = make_log(read_ratings(config.ratings), config.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"movielens.py: {config.ratings}: {error}") from None
    try:
        save(config.out, log)
    except (OSError, ValueError) as error:
        raise SystemExit(f"movielens.py: --out {config.out}: {error}") from None

    items, levels = log["tokens"].shape
    lines = [f"items      {items - 1:>8}, and PAD; {levels} codes each"]
    for split in ("pretrain", "posttrain", "validation", "test"):
        counts = np.bincount(log[f"{split}_kind"], minlength=len(KINDS))
        head, middle, tail = counts
        by_kind = f"{head} head, {middle} middle, {tail} tail"
        lines.append(f"{split:<11}{counts.sum():>8} targets: {by_kind}")
    slates, width = log["shown"].shape
    clicks = log["clicked"].mean()
    lines.append(f"feed       {slates:>8} slates of {width}, {clicks:.0%} clicked")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
