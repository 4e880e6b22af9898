# SPDX-License-Identifier: MIT
"""A toy shop whose truth is known: who likes what, what the feed showed, what was
clicked.

A shopper has a taste, an item has a place in the same space, and both meet in one
number:

    appeal = taste . embedding of the item + quality of the item

People buy items of high appeal, and click them where the feed shows them. So two logs
come out, as in a real shop. Purchases: the policy learns from them. Slates of the feed
with their clicks: only the ranker sees them. No noise is added to a score: the ranker
errs because of what the feed does NOT show (and because people look less far down a
slate). Shoppers are of three kinds, recognisable from their history:

  trend   The quality of their items changes with the season. The policy was pre-trained
          on LAST season's purchases, the slates are from this season. The policy is
          unsure and the ranker knows: listen to it.
  series  They buy roughly in the order of the item numbers, like volumes: neighbours
          often swap, but the last one bought, the target, is likely to have a high
          number. Purchases hold this order, so the policy knows it and finds these
          shoppers easy; clicks have none, so the ranker does not. Leave them alone.
  niche   The feed hides nine tenths of their items. The ranker meets a hidden item only
          where it is drawn as a random "not clicked" one, and learns that nobody clicks
          it. The other tenth is shown and gets all the clicks, so that the ranker puts
          these few popular distractors above what niche shoppers really buy. Do not
          listen.

Purchases of this season are scarce and slates are plentiful: 1,200 shoppers to
post-train on, 200,000 slates. Three passes over the 1,200 exhaust them: plain NLL gains
nothing from a fourth. All definitions are ours.

`make_shop` simulates the shop; `load_shop`, at the end, reads your own data in its
place.
"""

from dataclasses import dataclass
from pathlib import Path

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
# First number of a category's centre before its length is made 1: plus this for niche,
# minus this for the others, so that niche lies far from the rest.
NICHE_DISTANCE = 2.5
SUBCATEGORY_SPREAD = 0.3  # of sub-categories around their category's centre
ITEM_SPREAD = 0.2  # of items around the middle of their sub-category
TASTE_SPREAD = 0.2  # of tastes around the centre of the home category

# Standard deviations of the quality; trend items get a new one every season.
QUALITY_SPREAD = {"trend": 0.19, "series": 0.15, "niche": 0.15}
SEASON_CORRELATION = 0.5  # between last season's quality of a trend item and this one's

SHARPNESS = 12.0  # purchases ~ softmax(SHARPNESS * appeal), over shown and hidden items
HOME_BONUS = 1.0  # for series shoppers, on the appeal of their home category's items
# Series purchases are sorted by item number plus noise of this standard deviation; a
# category has about 62 numbers.
ORDER_NOISE = 15.0

# The feed shows ~ softmax(FEED_TASTE * taste . embedding + popularity).
FEED_TASTE = 5.0
POPULARITY_SPREAD = 0.5  # what the feed favours for no reason: standard deviation
HIDING = 10.0  # subtracted from the popularity of hidden niche items, at bias 1
SHOWN_NICHE = 0.1  # share of niche items that the feed does not hide

CLICK_SLOPE = 10.0  # P(click) = sigmoid(CLICK_SLOPE * (appeal - CLICK_CENTRE))
CLICK_CENTRE = 0.9

SIZES = {
    "pretrain": 18_000,
    "posttrain": 1_200,
    "validation": 3_000,
    "test": 6_000,
    "feed": 200_000,
}
QUICK_SIZES = {
    "pretrain": 4_000,
    "posttrain": 160,
    "validation": 200,
    "test": 300,
    "feed": 20_000,
}


# -------------------------------------------------------------- what a shop consists of


@dataclass
class Split:
    """N users (shoppers) with one sequence of purchases each."""

    history: np.ndarray  # (N, H) item numbers, oldest first
    target: np.ndarray  # (N,) the item that was bought next
    kind: np.ndarray  # (N,) index into Shop.kinds; used for tables only, never to train


@dataclass
class Truth:
    """What only a simulator knows: no training sees it, it judges what was learned."""

    embedding: np.ndarray  # (ITEMS, TASTE_DIM)
    quality: np.ndarray  # (ITEMS,) in this season
    test_taste: np.ndarray  # (N, TASTE_DIM) of the shoppers in the test split


@dataclass
class Shop:
    """The arrays that training needs, and the truth, which it must not see."""

    tokens: np.ndarray  # (items, L) semantic ID of every item
    kinds: tuple[str, ...]  # names of the kinds of shopper
    pretrain: Split  # last season's purchases
    posttrain: Split  # this season's, and so are the next two
    validation: Split
    test: Split
    feed_history: np.ndarray  # (M, H) purchases of those who saw the feed
    shown: np.ndarray  # (M, S) the items that each of them was shown
    clicked: np.ndarray  # (M, S) bool
    truth: Truth | None = None  # None for real data


@dataclass
class Catalogue:
    """All items, numbered by ascending ID: a category has its numbers in a row."""

    tokens: np.ndarray  # (ITEMS, 3) semantic IDs
    embedding: np.ndarray  # (ITEMS, TASTE_DIM)
    category: np.ndarray  # (ITEMS,)
    kind: np.ndarray  # (ITEMS,) name of the kind of shopper that the item is for
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

    Every item has an alarm clock that rings at a random time, after exp(-logit) on
    average. The first k to ring are the draw: the Gumbel-top-k trick (Kool et al.,
    2019) without its logarithm. logits (N, items) -> item numbers (N, k).
    """
    rings_at = rng.standard_exponential(logits.shape, dtype=np.float32)
    rings_at *= np.exp(-logits)
    first = np.argpartition(rings_at, k, axis=1)[:, :k]  # the k earliest, in any order
    order = np.take_along_axis(rings_at, first, axis=1).argsort(axis=1)
    return np.take_along_axis(first, order, axis=1)


def make_catalogue(rng: np.random.Generator) -> Catalogue:
    """Sub-categories lie around a category's centre, and items around those."""
    centre = rng.normal(size=(CATEGORIES, TASTE_DIM))
    for category in range(CATEGORIES):
        centre[category, 0] = -NICHE_DISTANCE
        if CATEGORY_KIND[category] == "niche":
            centre[category, 0] = NICHE_DISTANCE
    centre = to_length_one(centre)

    # 1000 items do not divide by 128 sub-categories: the first ones get one more.
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


def make_shoppers(
    rng: np.random.Generator, users: int, catalogue: Catalogue, quality: np.ndarray
) -> tuple[Split, np.ndarray]:
    """Shoppers with a home category and HISTORY + 1 purchases; tastes (users, D)."""
    home = rng.integers(CATEGORIES, size=users)
    taste = catalogue.centre[home] + rng.normal(
        0, TASTE_SPREAD, size=(users, TASTE_DIM)
    )
    taste = to_length_one(taste)
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

    # Series shoppers buy roughly in the order of the item numbers, so that the target,
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
    """The feed: slates for shoppers with these tastes (M, D), and what they clicked."""
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


def make_shop(
    seed: int, bias: float = 1.0, sizes: dict[str, int] | None = None
) -> Shop:
    """Simulate the shop.

    `bias` >= 0 scales how much popularity and hiding count in the feed: 0 shows items
    by taste alone. `sizes` replaces numbers of shoppers in SIZES; nobody is in two
    splits. Every split has a random stream of its own, so neither `bias` nor the size
    of another split changes it. ValueError names what is out of range.
    """
    sizes = SIZES | (sizes or {})
    if sizes.keys() != SIZES.keys():
        raise ValueError(f"sizes must be of {', '.join(SIZES)}, got {', '.join(sizes)}")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"sizes: {name} must be at least 1, got {size}")
    if not 0 <= bias < np.inf:
        raise ValueError(f"bias must be a finite number >= 0, got {bias}")

    # "feed" draws the feed's shoppers, "feed_slates" what they see and click.
    names = ["catalogue", "feed_slates", *SIZES]
    streams = np.random.default_rng(seed).spawn(len(names))
    rng = dict(zip(names, streams, strict=True))

    catalogue = make_catalogue(rng["catalogue"])
    last_season, this_season = make_qualities(rng["catalogue"], catalogue)

    splits = {}
    tastes = {}
    for name, size in sizes.items():
        quality = this_season
        if name == "pretrain":
            quality = last_season
        split, taste = make_shoppers(rng[name], size, catalogue, quality)
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
        truth=Truth(catalogue.embedding, this_season, tastes["test"]),
    )


def simulated_clicks_and_dwell(
    truth: Truth, items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What test users would do with lists of items, by the truth: a simulated A/B test.

    Only the study in .github uses it. items (N, K), -1 for a hallucination, which
    nobody clicks. Returns the probability of a click and the expected seconds (N, K): a
    click is worth 60 s times the appeal.
    """
    liking = np.einsum("nkd,nd->nk", truth.embedding[items], truth.test_taste)
    appeal = liking + truth.quality[items]
    # A hallucination, -1, has been looked up as the last item.
    clicks = np.where(items < 0, 0.0, click_probability(appeal))
    dwell = clicks * 60 * np.maximum(appeal, 0)
    return clicks, dwell


# ------------------------------------------------------------------------ your own data


def load_shop(path: str | Path) -> Shop:
    """A shop from an .npz file of your own. All numbers are whole and start at 0.

    tokens (items, L)        the semantic ID of every item, all different
    NAME_history (N, H)      item numbers; NAME is pretrain, posttrain, validation, test
    NAME_target (N,)         item numbers
    NAME_kind (N,), kinds    optional, for the tables: index into kinds, (K,) names
    feed_history (M, H)      item numbers, for the ranker
    shown (M, S)             item numbers; not the purchases that are post-trained on
    clicked (M, S)           bool, or 0 and 1

    To fill short histories, add a dummy item to `tokens` that is never a target.
    ValueError names the array that is missing or wrong, before any work is done.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # numpy and zipfile raise many kinds
        raise ValueError(f"{path} is no .npz file of plain arrays") from error

    def take(name: str, dimensions: int, below: int | None = None) -> np.ndarray:
        """The array of this name, if it has so many axes and whole numbers in range."""
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        array = arrays[name]
        if array.dtype == bool:
            array = array.astype(np.int64)
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ValueError(f"{name} holds NaN; whole numbers are needed")
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold whole numbers, got {array.dtype}")
        if array.ndim != dimensions:
            raise ValueError(f"{name} must have {dimensions} axes, got {array.shape}")
        if array.size == 0:
            raise ValueError(f"{name} is empty, its shape is {array.shape}")
        array = array.astype(np.int64)
        if array.min() < 0:
            raise ValueError(f"{name} holds {array.min()}; numbers start at 0")
        if below is not None and array.max() >= below:
            raise ValueError(f"{name} holds {array.max()}, but must stay below {below}")
        return array

    def require_same(name: str, size: int, other: str, other_size: int) -> None:
        if size != other_size:
            raise ValueError(f"{name} has size {size}, but {other} has {other_size}")

    tokens = take("tokens", 2)
    items, codes = tokens.shape
    if len(np.unique(tokens, axis=0)) < items:
        raise ValueError("tokens: two items have the same semantic ID")
    # Policy.items_of reads an ID as one number of 64 bits, in base max + 1.
    if (int(tokens.max()) + 1) ** codes >= 2**63:
        raise ValueError(f"tokens: {codes} codes up to {tokens.max()} are too long")

    if items < 10:
        raise ValueError(f"tokens: at least 10 items are needed, got {items}")

    kinds = ()
    if "kinds" in arrays:
        if arrays["kinds"].dtype.kind != "U" or arrays["kinds"].ndim != 1:
            raise ValueError("kinds must be an array of names, (K,)")
        for name in arrays["kinds"]:
            printable = str(name).encode("ascii", "replace").decode()
            kinds = (*kinds, printable)

    splits = {}
    for name in ("pretrain", "posttrain", "validation", "test"):
        history = take(f"{name}_history", 2, below=items)
        target = take(f"{name}_target", 1, below=items)
        require_same(f"{name}_target", len(target), f"{name}_history", len(history))
        kind = np.zeros(len(target), dtype=np.int64)
        if f"{name}_kind" in arrays and not kinds:
            raise ValueError(f"{name}_kind needs the names of the kinds, in kinds")
        if kinds:
            kind = take(f"{name}_kind", 1, below=len(kinds))
            require_same(f"{name}_kind", len(kind), f"{name}_target", len(target))
        splits[name] = Split(history, target, kind)

    history_length = splits["pretrain"].history.shape[1]
    for name, split in splits.items():
        given = split.history.shape[1]
        array = f"axis 1 of {name}_history"
        require_same(array, given, "pretrain_history", history_length)

    feed_history = take("feed_history", 2, below=items)
    shown = take("shown", 2, below=items)
    clicked = take("clicked", 2, below=2)
    require_same("feed_history", len(feed_history), "shown", len(shown))
    if clicked.shape != shown.shape:
        raise ValueError(f"clicked is {clicked.shape}, but shown is {shown.shape}")
    return Shop(
        tokens=tokens,
        kinds=kinds,
        **splits,
        feed_history=feed_history,
        shown=shown,
        clicked=clicked.astype(bool),
    )
