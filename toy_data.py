# SPDX-License-Identifier: MIT
"""A toy shop whose truth is known: who likes what, what the old feed showed, what was clicked.

Two logs come out, as in a real shop: purchases, from which the policy learns, and impressions with
clicks, which only the ranker sees. Nobody adds noise to a score: the bias is in what impressions do
NOT hold. Shoppers are of three kinds, recognisable from their history (all definitions are ours):

  trend   Quality follows fashion. The policy was pre-trained on LAST season's purchases, the
          impressions are this season's: the policy is unsure, the ranker knows. Listen to it.
  series  Bought in order, like volumes or refills. The policy reads the order, the ranker sees a
          bag of items. The policy finds these shoppers easy: leave them alone.
  niche   The feed all but hides their items: the ranker is blind. Do not listen.
"""

from dataclasses import dataclass

import numpy as np

KINDS = ("trend", "series", "niche")
KIND_OF_CATEGORY = np.repeat([2, 1, 0], [3, 2, 11])  # 3 niche, 2 series, 11 trend
HISTORY, SLATE = 8, 10  # items in a purchase history; items in one impression slate
CODEBOOK = (16, 8, 64)  # semantic ID = (category, sub-category, slot): 8192 IDs, 1000 of them real
L, VOCAB = len(CODEBOOK), sum(CODEBOOK)  # every level has tokens of its own
ITEMS, DIM = 1000, 8  # tastes and items are unit vectors of length DIM
SHARPNESS = 12.0  # purchases ~ softmax(SHARPNESS * appeal) over ALL items, shown or not
AFFINITY = 5.0  # the feed's own weight on taste, next to popularity
SIZES = {"test": 12000, "validation": 3000, "posttrain": 9600, "pretrain": 18000, "feed": 200000}
QUICK = {"test": 300, "validation": 100, "pretrain": 4000, "feed": 20000}
NICHE_OFFSET = 10.0  # what the feed subtracts from niche items at bias 1


@dataclass
class Split:
    """N users with one purchase sequence each; `taste` and `kind` are the truth."""

    history: np.ndarray  # (N, 8) items, in the order they were bought, all different
    target: np.ndarray  # (N,) the item bought next, not among the history
    taste: np.ndarray  # (N, DIM) unit vectors
    kind: np.ndarray  # (N,) of the shopper, index into KINDS

    def batches(self, size: int) -> list[tuple[np.ndarray, ...]]:
        """(history, target, kind) of `size` users at a time."""
        starts, columns = range(0, len(self.target), size), (self.history, self.target, self.kind)
        return [tuple(column[i : i + size] for column in columns) for i in starts]


@dataclass
class World:
    """Catalogue, truth, purchases split by user, and the feed's impression log (see module)."""

    tokens: np.ndarray  # (ITEMS, 3) semantic ID of every item
    embedding: np.ndarray  # (ITEMS, DIM) truth
    quality: np.ndarray  # (ITEMS,) truth, this season's
    test: Split
    validation: Split
    posttrain: Split  # this season's purchases, like test and validation
    pretrain: Split  # last season's
    feed: Split  # this season's, but the ranker sees only the history
    shown: np.ndarray  # (feed users, 10) impressions, from the top of the slate to its bottom
    clicked: np.ndarray  # (feed users, 10) bool

    def true_clicks_and_dwell(self, taste: np.ndarray, items: np.ndarray):
        """P(click | looked at) in [0, 1] and expected seconds, (N, K) each. Hidden from training.

        taste (N, DIM), items (N, K), -1 for a hallucination, which is never clicked. A click is
        worth 60 s times the appeal, taste . item + quality.
        """
        appeal = np.einsum("nkd,nd->nk", self.embedding[items], taste) + self.quality[items]
        clicks = np.where(items < 0, 0.0, 1 / (1 + np.exp(-10 * (appeal - 0.9))))
        return clicks, clicks * 60 * np.maximum(appeal, 0)


def gumbel_top_k(rng: np.random.Generator, users: int, logits_of, k: int) -> np.ndarray:
    """k different items for each user, in order, without replacement from a softmax: (N, k).

    `logits_of` maps a slice of users to logits (n, I). Gumbel-top-k trick (Kool et al., 2019).
    """
    parts = []
    for start in range(0, users, 4096):  # bounds the (users, items) matrix at 16 MB
        logits = logits_of(slice(start, min(start + 4096, users)))
        clock = rng.standard_exponential(logits.shape, dtype=np.float32) * np.exp(-logits)
        first = np.argpartition(clock, k, axis=1)[:, :k]
        order = np.take_along_axis(clock, first, axis=1).argsort(axis=1)
        parts.append(np.take_along_axis(first, order, axis=1))
    return np.concatenate(parts)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def catalogue(rng: np.random.Generator):
    """Tokens (ITEMS, 3) in ascending order, embeddings (ITEMS, DIM), category centres (16, DIM)."""
    categories, subs, slots = CODEBOOK
    centre = rng.normal(size=(categories, DIM))
    centre[:, 0] = np.where(KIND_OF_CATEGORY == 2, 2.5, -2.5)  # niche tastes lie apart
    centre = unit(centre)
    sub_centre = unit(np.repeat(centre, subs, 0) + 0.3 * rng.normal(size=(categories * subs, DIM)))
    sub = np.sort(np.arange(ITEMS) % len(sub_centre))  # 7 or 8 items in each sub-category
    place = np.arange(ITEMS) - np.searchsorted(sub, sub)  # of an item in its sub-category
    free = rng.permuted(np.tile(np.arange(slots), (len(sub_centre), 1)), axis=1)
    codes = np.stack([sub // subs, sub % subs, free[sub, place]], axis=1)
    tokens = codes[np.lexsort(codes.T[::-1])] + np.cumsum((0, *CODEBOOK[:-1]))
    return tokens, unit(sub_centre[sub] + 0.2 * rng.normal(size=(ITEMS, DIM))), centre


def shoppers(rng, users: int, tokens, embedding, centre, quality) -> Split:
    """Users with a home category, a taste near its centre, and 9 purchases."""
    home = rng.integers(len(centre), size=users)
    taste = unit(centre[home] + rng.normal(0, 0.2, (users, DIM)))
    kind = KIND_OF_CATEGORY[home]

    def logits(rows: slice) -> np.ndarray:
        at_home = (home[rows, None] == tokens[:, 0]) & (kind[rows, None] == 1)  # series only
        return SHARPNESS * (taste[rows] @ embedding.T + quality + at_home)

    bought = gumbel_top_k(rng, users, logits, HISTORY + 1)
    bought = np.where(kind[:, None] == 1, np.sort(bought, axis=1), bought)  # by number: IDs ascend
    return Split(bought[:, :HISTORY], bought[:, HISTORY], taste, kind)


def make_world(seed: int, bias: float = 1.0, quick: bool = False, **sizes: int) -> World:
    """Simulate the shop; `sizes` are numbers of users in place of SIZES, each in one split only.

    `bias` >= 0 scales how much popularity and niche count in the feed: 0 shows items by taste
    alone, 1 all but hides the niche. Every split has a random stream of its own: neither `bias` nor
    the size of another split changes it. ValueError names what is out of range.
    """
    sizes = SIZES | (QUICK if quick else {}) | sizes
    if sizes.keys() != SIZES.keys() or min(sizes.values()) < 1 or not 0 <= bias < np.inf:
        raise ValueError(f"need sizes >= 1 of {', '.join(SIZES)}, bias >= 0, got {sizes}, {bias=}")
    rng, clicks, *streams = np.random.default_rng(seed).spawn(2 + len(sizes))
    tokens, embedding, centre = catalogue(rng)
    kind = KIND_OF_CATEGORY[tokens[:, 0]]
    last_season, news = np.where(kind == 0, 0.19, 0.15) * rng.normal(size=(2, ITEMS))
    quality = np.where(kind == 0, 0.5 * last_season + 0.75**0.5 * news, last_season)
    splits = {}
    for (name, size), stream in zip(sizes.items(), streams, strict=True):
        season = last_season if name == "pretrain" else quality
        splits[name] = shoppers(stream, size, tokens, embedding, centre, season.astype(np.float32))
    taste = splits["feed"].taste
    popularity = bias * (clicks.normal(0, 0.5, ITEMS) - NICHE_OFFSET * (kind == 2))
    liking, popularity = AFFINITY * embedding.T, popularity.astype(np.float32)
    shown = gumbel_top_k(clicks, len(taste), lambda rows: taste[rows] @ liking + popularity, SLATE)
    world = World(tokens, embedding, quality, **splits, shown=shown, clicked=shown)
    looks = np.arange(1, SLATE + 1) ** -0.5  # fewer people look further down the slate
    likes, _ = world.true_clicks_and_dwell(taste, shown)
    world.clicked = clicks.random(shown.shape) < looks * likes
    return world
