# SPDX-License-Identifier: MIT
"""A toy shop whose truth is known.

A user has a taste, an item has a place in the same space, and both meet in one number:

    appeal = taste . embedding of the item + quality of the item

People buy items of high appeal, no item twice: nine last season, the tenth this season.
6,000 of them, the viewers, have bought nothing yet this season, but a feed has shown
them 200,000 slates (lists of ten items), and they click items of high appeal there.

The policy learns from everything that was bought: last season's purchases of all whom
the shop knows, in pre-training, and the tenth purchase of 1,200 others, the target of
post-training. The ranker learns from what the viewers clicked AND from what they did
not. This is all that it has beyond the policy: this season's clicks and non-clicks.
Validation and test are of people whom the shop did not know before.

No noise is added to a score: the ranker errs because of what the feed does NOT show,
and because clicks have no order (and people look less far down a slate). Users are of
three kinds, recognisable from their history:

  trend   The feed shows their items, and the policy is unsure: it has seen too few
          purchases of this season to know which of many items are good now. The
          ranker knows: listen to it.
  series  They buy roughly in the order of the item numbers, like volumes: neighbours
          often swap, but the last one bought, the target, is likely to have a high
          number. Purchases hold this order, so the policy knows it and finds these
          users easy; clicks have none, so the ranker does not. Leave them alone.
  niche   The feed hides nine tenths of their items. The ranker meets a hidden item only
          where it is drawn as a random "not clicked" one, and learns that nobody clicks
          it. The other tenth gets all the clicks, so that the ranker puts these few
          above what niche users really buy. Do not listen.

The shop is our own. It was redesigned several times while this project grew, on
development seeds, until both conditions of the gate had something to do.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

ITEMS = 1000
HISTORY = 9  # purchases of last season; the target comes after them
SLATE = 10  # items that the feed shows at once
SIZES = {
    "feed": 200_000,  # slates; all others are numbers of users
    "viewers": 6_000,
    "posttrain": 1_200,
    "validation": 2_000,
    "test": 4_000,
}

# A semantic ID is (category, sub-category, slot): 8192 IDs, of which 1000 name an item.
CATEGORIES = 16
SUBCATEGORIES = 8  # in each category
SLOTS = 64  # in each sub-category
KINDS = ("trend", "series", "niche")
NEVER = -60.0  # the logit of what a user has; others are some -20 to 30
CATEGORY_KIND = ["niche"] * 3 + ["series"] * 3 + ["trend"] * 10  # 10 of 16 are trend


@dataclass
class Split:
    """N users. Fill short histories from the left with an item that is no target."""

    history: np.ndarray  # (N, K) item numbers, oldest first
    target: np.ndarray  # (N,) the item that was bought next
    kind: np.ndarray  # (N,) index into Shop.kinds; used for tables only, never to train

    def __post_init__(self):
        self.history = self.history.astype(np.int64, order="C")  # always a copy
        self.target = self.target.astype(np.int64)
        if self.history.min() < 0 or self.target.min() < 0:
            raise ValueError("history and target must be item numbers, 0 or more")


@dataclass
class Shop:
    """All that training and evaluation need; the arrays may be your own."""

    tokens: np.ndarray  # (items, L) semantic ID of every item
    kinds: tuple[str, ...]  # names of the kinds of user
    pretrain: Split  # (N, H) and the next, all of last season; the policy reads H items
    posttrain: Split  # here and below only the target is of this season
    validation: Split
    test: Split
    feed_history: np.ndarray  # (M, K) what the viewer of each slate had bought
    shown: np.ndarray  # (M, S) the items on it
    clicked: np.ndarray  # (M, S) bool


@dataclass
class Catalogue:
    """All items, numbered by ascending ID: a category has its numbers in a row."""

    tokens: np.ndarray  # (ITEMS, 3) semantic IDs
    embedding: np.ndarray  # (ITEMS, TASTE_DIM)
    kind: np.ndarray  # (ITEMS,) name of the kind of user that the item is for
    centre: np.ndarray  # (CATEGORIES, TASTE_DIM)


def draw_without_replacement(rng: Generator, logits: np.ndarray, k: int) -> np.ndarray:
    """Draw k different items per row from softmax(logits), in the order of the draws.

    logits (N, items) -> item numbers (N, k), by the Gumbel top-k trick (Kool et al.,
    2019): the k smallest of exponential noise / exp(logit).
    """
    noisy = rng.standard_exponential(logits.shape, dtype=np.float32)
    noisy *= np.exp(-logits)
    top = np.argpartition(noisy, k, axis=1)[:, :k]  # the k smallest, in any order
    order = np.take_along_axis(noisy, top, axis=1).argsort(axis=1)
    return np.take_along_axis(top, order, axis=1)


TASTE_DIM = 8  # tastes and items are vectors of length 1 in this many dimensions
NICHE_DISTANCE = 2.5  # niche categories lie apart from all others, in one dimension
SUBCATEGORY_SPREAD = 0.3  # of sub-categories around their category's centre
ITEM_SPREAD = 0.2  # of items around the middle of their sub-category

# Standard deviations of the quality; trend items get a new one every season.
QUALITY_SPREAD = {"trend": 0.19, "series": 0.15, "niche": 0.15}
SEASON_CORRELATION = 0.5  # between last season's quality of a trend item and this one's


def to_length_one(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / length).astype(np.float32)


def make_catalogue(rng: Generator) -> Catalogue:
    """Sub-categories lie around a category's centre, and items around those."""
    centre = rng.normal(size=(CATEGORIES, TASTE_DIM))
    is_niche = np.array(CATEGORY_KIND) == "niche"
    centre[:, 0] = np.where(is_niche, NICHE_DISTANCE, -NICHE_DISTANCE)
    centre = to_length_one(centre)

    tokens = []
    embedding = []
    for category in range(CATEGORIES):
        for subcategory in range(SUBCATEGORIES):
            size = 7
            if category < 13:
                size = 8  # 13 * 8 * 8 + 3 * 8 * 7 = 1000
            middle = centre[category] + SUBCATEGORY_SPREAD * rng.normal(size=TASTE_DIM)
            middle = to_length_one(middle)
            slots = np.sort(rng.choice(SLOTS, size=size, replace=False))
            for slot in slots:
                # Every level of the ID has tokens of its own.
                subcategory_token = CATEGORIES + subcategory
                slot_token = CATEGORIES + SUBCATEGORIES + slot
                tokens.append((category, subcategory_token, slot_token))
                embedding.append(middle + ITEM_SPREAD * rng.normal(size=TASTE_DIM))

    tokens = np.array(tokens)
    embedding = to_length_one(np.array(embedding))
    kind = np.array(CATEGORY_KIND)[tokens[:, 0]]
    return Catalogue(tokens, embedding, kind, centre)


def make_qualities(
    rng: Generator, catalogue: Catalogue
) -> tuple[np.ndarray, np.ndarray]:
    """How good each item is in either season (ITEMS,); only trend items change."""
    spread = np.array([QUALITY_SPREAD[kind] for kind in catalogue.kind])
    last_season = spread * rng.normal(size=ITEMS)
    fresh = spread * rng.normal(size=ITEMS)
    kept = SEASON_CORRELATION * last_season
    changed = kept + np.sqrt(1 - SEASON_CORRELATION**2) * fresh
    this_season = np.where(catalogue.kind == "trend", changed, last_season)
    return last_season, this_season


TASTE_SPREAD = 0.2  # of tastes around the centre of the home category
SHARPNESS = 12.0  # purchases ~ softmax(SHARPNESS * appeal), whatever the feed shows
HOME_BONUS = 1.0  # series users buy (but do not click) more in their home category
# Series purchases are sorted by item number plus noise; a category has some 62 numbers.
ORDER_NOISE = 15.0


def make_users(
    rng: Generator,
    users: int,
    catalogue: Catalogue,
    last_season: np.ndarray,  # quality, (ITEMS,)
    this_season: np.ndarray,
) -> tuple[Split, np.ndarray]:
    """Users with a home category: what they bought, and their tastes (users, D)."""
    home = rng.integers(CATEGORIES, size=users)
    noise = rng.normal(0, TASTE_SPREAD, size=(users, TASTE_DIM))
    taste = to_length_one(catalogue.centre[home] + noise)
    kind = np.array(CATEGORY_KIND)[home]
    is_series = kind == "series"

    liking = taste @ catalogue.embedding.T  # (users, ITEMS)
    is_at_home = home[:, None] == catalogue.tokens[:, 0]
    liking[is_series[:, None] & is_at_home] += HOME_BONUS
    logits = SHARPNESS * (liking + last_season)
    history = draw_without_replacement(rng, logits, HISTORY)

    # One more purchase, this season, of what is left.
    logits = SHARPNESS * (liking + this_season)
    np.put_along_axis(logits, history, NEVER, axis=1)
    target = draw_without_replacement(rng, logits, 1)
    bought = np.concatenate([history, target], axis=1)

    # Series users buy roughly in the order of the item numbers, whatever the season.
    position = bought + rng.normal(0, ORDER_NOISE, size=bought.shape)
    in_order = np.take_along_axis(bought, position.argsort(axis=1), axis=1)
    bought = np.where(is_series[:, None], in_order, bought)

    kind_number = np.array([KINDS.index(name) for name in kind])
    return Split(bought[:, :HISTORY], bought[:, HISTORY], kind_number), taste


# The feed shows ~ softmax(FEED_TASTE * taste . embedding + bias * popularity).
FEED_TASTE = 5.0
POPULARITY_SPREAD = 0.5  # what the feed favours for no reason: standard deviation
HIDING = 10.0  # subtracted from the popularity of hidden niche items, at bias 1
SHOWN_NICHE = 0.1  # share of niche items that the feed does not hide


def click_probability(appeal: np.ndarray) -> np.ndarray:
    """P(click | looked at) in [0, 1] for appeal = taste . item + quality, any shape."""
    return 1 / (1 + np.exp(-10.0 * (appeal - 0.9)))


def show_feed(
    rng: Generator,
    slates: int,
    bias: float,
    viewers: Split,
    taste: np.ndarray,  # of the viewers, (users, D)
    catalogue: Catalogue,
    quality: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns who saw each slate (M,), its items and its clicks (M, S each)."""
    popularity = POPULARITY_SPREAD * rng.normal(size=ITEMS)
    is_niche = catalogue.kind == "niche"
    is_hidden = is_niche & (rng.random(ITEMS) >= SHOWN_NICHE)
    popularity = bias * (popularity - HIDING * is_hidden)

    # Fewer people look further down the slate. The ranker does not know.
    p_look = 1 / np.sqrt(np.arange(1, SLATE + 1))

    viewer = rng.integers(len(taste), size=slates)
    shown = []
    clicked = []
    for start in range(0, slates, 4096):
        row = viewer[start : start + 4096]
        liking = taste[row] @ catalogue.embedding.T
        logits = FEED_TASTE * liking + popularity.astype(np.float32)
        np.put_along_axis(logits, viewers.history[row], NEVER, axis=1)
        slate = draw_without_replacement(rng, logits, SLATE)
        appeal = np.take_along_axis(liking, slate, axis=1) + quality[slate]
        shown.append(slate)
        clicked.append(rng.random(slate.shape) < p_look * click_probability(appeal))
    return viewer, np.concatenate(shown), np.concatenate(clicked)


def make_shop(seed: int, bias: float = 1.0, sizes: dict | None = None) -> Shop:
    """Simulate the shop; nobody is in two splits. `sizes` replaces numbers in SIZES.

    `bias` >= 0 scales popularity and hiding: at 0 the feed shows items by taste alone.
    """
    sizes = SIZES | (sizes or {})
    # Each part has a random stream, so that another size leaves the others as they are.
    names = ["catalogue", *SIZES]
    streams = np.random.default_rng(seed).spawn(len(names))
    rng = dict(zip(names, streams, strict=True))

    catalogue = make_catalogue(rng["catalogue"])
    last_season, this_season = make_qualities(rng["catalogue"], catalogue)
    splits = {}
    taste = {}
    for name in ("viewers", "posttrain", "validation", "test"):
        splits[name], taste[name] = make_users(
            rng[name], sizes[name], catalogue, last_season, this_season
        )

    viewers = splits.pop("viewers")
    tastes = taste["viewers"]
    viewer, shown, clicked = show_feed(
        rng["feed"], sizes["feed"], bias, viewers, tastes, catalogue, this_season
    )

    # The policy is pre-trained on all that the shop knows of last season.
    old = np.concatenate([viewers.history, splits["posttrain"].history])
    kind = np.concatenate([viewers.kind, splits["posttrain"].kind])
    return Shop(
        tokens=catalogue.tokens,
        kinds=KINDS,
        pretrain=Split(old[:, :-1], old[:, -1], kind),
        **splits,
        feed_history=viewers.history[viewer],
        shown=shown,
        clicked=clicked,
    )
