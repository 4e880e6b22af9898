# SPDX-License-Identifier: MIT
"""A toy shop whose truth is known.

A user has a taste, an item has a place in the same space, and both meet in one number:

    appeal = taste . embedding of the item + quality of the item

People buy items of high appeal, and click them where the feed shows them. So two logs
come out, as in a real shop. Purchases: the policy learns from them. Slates of the feed
with their clicks: only the ranker sees them. No noise is added to a score: the ranker
errs because of what the feed does NOT show, and because clicks have no order (and
people look less far down a slate).

What the ranker has and the policy has not is ten times as many users: 200,000 slates,
with what each user had bought before, against 18,000 sequences of purchases for
pre-training and 1,200 for post-training. (They are fresher, too: the policy was
pre-trained on last season's purchases, and the slates are this season's.) We keep the
feed's users from the policy on purpose: trained on what they bought it would hardly
need a ranker. Users are of three kinds, recognisable from their history:

  trend   The feed shows their items, and the policy is unsure: it has seen too few
          purchases, most of them of last season, to know which of many items are good.
          The ranker knows: listen to it.
  series  They buy roughly in the order of the item numbers, like volumes: neighbours
          often swap, but the last one bought, the target, is likely to have a high
          number. Purchases hold this order, so the policy knows it and finds these
          users easy; clicks have none, so the ranker does not. Leave them alone.
  niche   The feed hides nine tenths of their items. The ranker meets a hidden item only
          where it is drawn as a random "not clicked" one, and learns that nobody clicks
          it. The other tenth is shown and gets all the clicks, so that the ranker puts
          these few popular distractors above what niche users really buy. Do not
          listen.

All definitions are ours. The shop was redesigned three times while this project grew,
on development seeds, until both conditions of the gate had something to do.
"""

from dataclasses import dataclass

import numpy as np

# ------------------------------------------------------------------------ the constants

ITEMS = 1000
HISTORY = 8  # purchases before the target
SLATE = 10  # items that the feed shows at once

# A semantic ID is (category, sub-category, slot): 8192 IDs, of which 1000 name an item.
CATEGORIES = 16
SUBCATEGORIES = 8  # in each category
SLOTS = 64  # in each sub-category
KINDS = ("trend", "series", "niche")
CATEGORY_KIND = ["niche"] * 3 + ["series"] * 3 + ["trend"] * 10  # 10 of 16 are trend

TASTE_DIM = 8  # tastes and items are vectors of length 1 in this many dimensions
# The first coordinate of a category's centre, before its length is made 1, is +this for
# niche and -this for all others, which keeps the two apart.
NICHE_DISTANCE = 2.5
SUBCATEGORY_SPREAD = 0.3  # of sub-categories around their category's centre
ITEM_SPREAD = 0.2  # of items around the middle of their sub-category
TASTE_SPREAD = 0.2  # of tastes around the centre of the home category

# Standard deviations of the quality; trend items get a new one every season.
QUALITY_SPREAD = {"trend": 0.19, "series": 0.15, "niche": 0.15}
SEASON_CORRELATION = 0.5  # between last season's quality of a trend item and this one's

SHARPNESS = 12.0  # purchases ~ softmax(SHARPNESS * appeal), over shown and hidden items
HOME_BONUS = 1.0  # series users, purchases only: on the appeal of home category's items
# Series purchases are sorted by item number plus noise of this standard deviation; a
# category has about 62 numbers.
ORDER_NOISE = 15.0

# The feed shows ~ softmax(FEED_TASTE * taste . embedding + bias * popularity).
FEED_TASTE = 5.0
POPULARITY_SPREAD = 0.5  # what the feed favours for no reason: standard deviation
HIDING = 10.0  # subtracted from the popularity of hidden niche items, at bias 1
SHOWN_NICHE = 0.1  # share of niche items that the feed does not hide

CLICK_SLOPE = 10.0  # P(click) = sigmoid(CLICK_SLOPE * (appeal - CLICK_CENTRE))
CLICK_CENTRE = 0.9

SIZES = {
    "pretrain": 18_000,
    "posttrain": 1_200,  # few: three passes over them exhaust what NLL can learn
    "validation": 3_000,
    "test": 6_000,
    "feed": 200_000,
}


# -------------------------------------------------------------- what a shop consists of


@dataclass
class Split:
    """N users with one sequence of purchases each."""

    history: np.ndarray  # (N, H) item numbers, oldest first
    target: np.ndarray  # (N,) the item that was bought next
    kind: np.ndarray  # (N,) index into Shop.kinds; used for tables only, never to train


@dataclass
class Shop:
    """All that training and evaluation need; the arrays may be your own."""

    tokens: np.ndarray  # (items, L) semantic ID of every item
    kinds: tuple[str, ...]  # names of the kinds of user
    pretrain: Split  # last season's purchases
    posttrain: Split  # this season's, and so are the next two
    validation: Split
    test: Split
    feed_history: np.ndarray  # (M, H) purchases of those who saw the feed
    shown: np.ndarray  # (M, S) the items that each of them was shown
    clicked: np.ndarray  # (M, S) bool


@dataclass
class Catalogue:
    """All items, numbered by ascending ID: a category has its numbers in a row."""

    tokens: np.ndarray  # (ITEMS, 3) semantic IDs
    embedding: np.ndarray  # (ITEMS, TASTE_DIM)
    category: np.ndarray  # (ITEMS,)
    kind: np.ndarray  # (ITEMS,) name of the kind of user that the item is for
    centre: np.ndarray  # (CATEGORIES, TASTE_DIM)


# ----------------------------------------------------------------------- the simulation


def to_length_one(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors (..., D) to length 1."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / length).astype(np.float32)


def draw_without_replacement(
    rng: np.random.Generator, logits: np.ndarray, k: int
) -> np.ndarray:
    """Draw k different items per row from softmax(logits), in the order of the draws.

    The Gumbel top-k trick (Kool et al., 2019), with exponential in place of Gumbel
    noise, which is faster: -log of an exponential is Gumbel, so the k largest of logit
    + Gumbel are the k smallest of exponential / exp(logit).
    logits (N, items) -> item numbers (N, k).
    """
    noisy = rng.standard_exponential(logits.shape, dtype=np.float32)
    noisy *= np.exp(-logits)
    top = np.argpartition(noisy, k, axis=1)[:, :k]  # the k smallest, in any order
    order = np.take_along_axis(noisy, top, axis=1).argsort(axis=1)
    return np.take_along_axis(top, order, axis=1)


def make_catalogue(rng: np.random.Generator) -> Catalogue:
    """Sub-categories lie around a category's centre, and items around those."""
    centre = rng.normal(size=(CATEGORIES, TASTE_DIM))
    for category in range(CATEGORIES):
        centre[category, 0] = -NICHE_DISTANCE
        if CATEGORY_KIND[category] == "niche":
            centre[category, 0] = NICHE_DISTANCE
    centre = to_length_one(centre)

    # Of 128 sub-categories the first 104 have 8 items, the others 7.
    per_subcategory, remainder = divmod(ITEMS, CATEGORIES * SUBCATEGORIES)
    tokens = []
    embedding = []
    for category in range(CATEGORIES):
        for subcategory in range(SUBCATEGORIES):
            is_early = category * SUBCATEGORIES + subcategory < remainder
            size = per_subcategory + int(is_early)
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
    category = tokens[:, 0]
    kind = np.array(CATEGORY_KIND)[category]
    return Catalogue(tokens, to_length_one(np.array(embedding)), category, kind, centre)


def make_qualities(
    rng: np.random.Generator, catalogue: Catalogue
) -> tuple[np.ndarray, np.ndarray]:
    """How good each item is: last season and this season, (ITEMS,) each.

    Only trend items change. Their new quality has correlation SEASON_CORRELATION with
    the old one and the same variance.
    """
    spread = np.array([QUALITY_SPREAD[kind] for kind in catalogue.kind])
    last_season = spread * rng.normal(size=ITEMS)
    fresh = spread * rng.normal(size=ITEMS)
    kept = SEASON_CORRELATION * last_season
    changed = kept + np.sqrt(1 - SEASON_CORRELATION**2) * fresh
    this_season = np.where(catalogue.kind == "trend", changed, last_season)
    return last_season, this_season


def make_users(
    rng: np.random.Generator, users: int, catalogue: Catalogue, quality: np.ndarray
) -> tuple[Split, np.ndarray]:
    """Users with a home category and HISTORY + 1 purchases; tastes (users, D)."""
    home = rng.integers(CATEGORIES, size=users)
    noise = rng.normal(0, TASTE_SPREAD, size=(users, TASTE_DIM))
    taste = to_length_one(catalogue.centre[home] + noise)
    kind = np.array(CATEGORY_KIND)[home]
    is_series = kind == "series"

    bought = []
    for start in range(0, users, 4096):  # keeps the (users, items) matrix at 16 MB
        rows = slice(start, start + 4096)
        appeal = taste[rows] @ catalogue.embedding.T + quality.astype(np.float32)
        at_home = home[rows, None] == catalogue.category
        appeal += HOME_BONUS * (at_home & is_series[rows, None])
        chosen = draw_without_replacement(rng, SHARPNESS * appeal, HISTORY + 1)
        bought.append(chosen)
    bought = np.concatenate(bought)

    # Series users buy roughly in the order of the item numbers, so that the target,
    # bought last, is likely to be one of the highest. The others keep the order of the
    # draws.
    noise = rng.normal(0, ORDER_NOISE, size=bought.shape)
    position = bought + noise
    in_order = np.take_along_axis(bought, position.argsort(axis=1), axis=1)
    bought = np.where(is_series[:, None], in_order, bought)

    kind_number = np.array([KINDS.index(name) for name in kind])
    split = Split(bought[:, :HISTORY], bought[:, HISTORY], kind_number)
    return split, taste


def click_probability(appeal: np.ndarray) -> np.ndarray:
    """P(click | looked at) in [0, 1] for appeal = taste . item + quality, any shape."""
    return 1 / (1 + np.exp(-CLICK_SLOPE * (appeal - CLICK_CENTRE)))


def show_feed(
    rng: np.random.Generator,
    bias: float,
    taste: np.ndarray,
    catalogue: Catalogue,
    quality: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The feed: slates for users with these tastes (M, D), and what they clicked."""
    popularity = POPULARITY_SPREAD * rng.normal(size=ITEMS)
    is_niche = catalogue.kind == "niche"
    is_hidden = is_niche & (rng.random(ITEMS) >= SHOWN_NICHE)
    popularity = bias * (popularity - HIDING * is_hidden)

    # Fewer people look further down the slate. The ranker does not know.
    p_look = 1 / np.sqrt(np.arange(1, SLATE + 1))

    shown = []
    clicked = []
    for start in range(0, len(taste), 4096):
        liking = taste[start : start + 4096] @ catalogue.embedding.T
        logits = FEED_TASTE * liking + popularity.astype(np.float32)
        slate = draw_without_replacement(rng, logits, SLATE)
        appeal = np.take_along_axis(liking, slate, axis=1) + quality[slate]
        clicks = rng.random(slate.shape) < p_look * click_probability(appeal)
        shown.append(slate)
        clicked.append(clicks)
    return np.concatenate(shown), np.concatenate(clicked)


def random_streams(seed: int) -> dict[str, np.random.Generator]:
    """A random stream for every part of the shop.

    So another bias, or another size of a split, leaves all other splits as they are.
    "feed" draws the feed's users, "feed_slates" what they see and click.
    """
    names = ["catalogue", "feed_slates", *SIZES]
    streams = np.random.default_rng(seed).spawn(len(names))
    return dict(zip(names, streams, strict=True))


def make_shop(
    seed: int, bias: float = 1.0, sizes: dict[str, int] | None = None
) -> Shop:
    """Simulate the shop.

    `bias` >= 0 scales how much popularity and hiding count in the feed: 0 shows items
    by taste alone. `sizes` replaces numbers of users in SIZES; nobody is in two splits.
    """
    sizes = SIZES | (sizes or {})
    rng = random_streams(seed)
    catalogue = make_catalogue(rng["catalogue"])
    last_season, this_season = make_qualities(rng["catalogue"], catalogue)

    splits = {}
    tastes = {}
    for name, size in sizes.items():
        quality = this_season
        if name == "pretrain":
            quality = last_season
        split, taste = make_users(rng[name], size, catalogue, quality)
        splits[name] = split
        tastes[name] = taste

    feed_rng = rng["feed_slates"]
    shown, clicked = show_feed(feed_rng, bias, tastes["feed"], catalogue, this_season)
    return Shop(
        tokens=catalogue.tokens,
        kinds=KINDS,
        pretrain=splits["pretrain"],
        posttrain=splits["posttrain"],
        validation=splits["validation"],
        test=splits["test"],
        feed_history=splits["feed"].history,
        shown=shown,
        clicked=clicked,
    )
