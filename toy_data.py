"""A toy shop whose truth is known: who likes what, what the old feed showed, what was clicked.

Every definition here is ours; the paper's logs are not public. Two logs come out, the two that a
real shop has, and the bias sits in what the second one does NOT show:

1. purchases    what users went on to buy                          -> the policy learns from these
2. impressions  what an old feed showed, where, and what was clicked -> only the ranker sees these

Nobody adds noise to a score. The feed just hardly ever shows items of *niche* categories, so the
impressions are silent about them, and a ranker trained on impressions has to guess there. Niche
shoppers are recognisable from their history (their tastes lie on the far side of one axis), so
being wrong about niche items need not make anyone wrong about the others.

Why is there anything for reinforcement learning to gain? Quality follows fashion, except in the
niche: the policy was pre-trained on LAST season's purchases, the impressions are this season's.
Where the feed looked the ranker knows more than the policy, where it did not the policy does.
"""

from dataclasses import dataclass

import numpy as np

HISTORY, SLATE = 8, 10  # items in a purchase history; items in one impression slate
CODEBOOK = (16, 8, 64)  # semantic ID = (category, sub-category, slot): 8192 IDs, 1000 of them real
DIM = 8  # tastes and items are unit vectors of this length
NICHE_CATEGORIES = 4  # of the 16
SHARPNESS = 12.0  # purchases ~ softmax(SHARPNESS * appeal) over ALL items, shown or not
AFFINITY = 5.0  # the feed's own weight on taste, next to popularity
NICHE_OFFSET = 10.0  # what the feed subtracts from niche items at bias 1
CHUNK = 4096  # users simulated at a time: bounds the (users, items) score matrix at 16 MB


@dataclass
class Split:
    """N users with one purchase sequence each; `taste` is the truth, for evaluation only."""

    history: np.ndarray  # (N, 8) items, in the order they were bought, all different
    target: np.ndarray  # (N,) the item bought next, not among the history
    taste: np.ndarray  # (N, DIM) unit vectors


@dataclass
class World:
    """Catalogue, purchases split by user, the feed's impression log, and the truth (see module)."""

    codes: np.ndarray  # (I, 3) semantic ID of every item
    item_of: np.ndarray  # CODEBOOK-shaped; the item that an ID names, -1 where it names none
    niche: np.ndarray  # (I,) bool: belongs to a niche category
    embedding: np.ndarray  # (I, DIM) truth
    quality: np.ndarray  # (I,) truth, this season's
    pretrain: Split  # last season's purchases
    posttrain: Split  # this season's, like the two below: fresh windows, each used once
    valid: Split
    test: Split
    feed_history: np.ndarray  # (U, 8) what each feed user had bought
    shown: np.ndarray  # (U, 10) impressions, from the top of the slate to its bottom
    clicked: np.ndarray  # (U, 10) bool
    exposure: np.ndarray  # (I,) how often the feed showed the item

    def true_click_probability(self, taste: np.ndarray, items: np.ndarray) -> np.ndarray:
        """P(click | looked at) of `items` (N, K) for users of `taste` (N, DIM): (N, K) in [0, 1].

        An item of -1, a hallucination, is never clicked. For evaluation, never for training.
        """
        return np.where(items < 0, 0.0, click_probability(self._appeal(taste, items)))

    def true_dwell_seconds(self, taste: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Expected seconds spent on `items` (N, K): a click, then 60 s times the appeal (N, K)."""
        minutes = np.maximum(self._appeal(taste, items), 0.0)
        return 60.0 * minutes * self.true_click_probability(taste, items)

    def _appeal(self, taste, items):
        return np.einsum("nkd,nd->nk", self.embedding[items], taste) + self.quality[items]


def click_probability(appeal: np.ndarray) -> np.ndarray:
    """How likely a user who looks at an item clicks it; `appeal` is taste . item + quality."""
    return 1.0 / (1.0 + np.exp(-10.0 * (appeal - 0.9)))


def gumbel_top_k(rng: np.random.Generator, logits: np.ndarray, k: int) -> np.ndarray:
    """Draw k different columns per row, in order, without replacement from softmax(logits).

    logits (N, I) -> (N, k). Exponential clocks of rate exp(logit): the first k to ring. This is
    the Gumbel-top-k trick (Kool et al., 2019); purchases and slates both come from it.
    """
    clock = rng.standard_exponential(logits.shape, dtype=np.float32) * np.exp(-logits)
    first = np.argpartition(clock, k, axis=1)[:, :k]
    order = np.take_along_axis(clock, first, axis=1).argsort(axis=1)
    return np.take_along_axis(first, order, axis=1)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_world(
    seed: int = 0,
    *,
    bias: float = 1.0,
    items: int = 1000,
    pretrain: int = 6_000,
    posttrain: int = 19_200,
    valid: int = 2_000,
    test: int = 6_000,
    feed: int = 200_000,
) -> World:
    """Simulate the shop; `pretrain` ... `feed` are numbers of users, each in one split only.

    `bias` >= 0 scales how much popularity and category count in the feed: 0 shows items by taste
    alone, 1 all but hides the niche. It changes the impressions only; purchases of the same seed
    stay the same to the bit. Raises ValueError naming the argument that is out of range.
    """
    sizes = (pretrain, posttrain, valid, test, feed)
    for name, size in zip(("pretrain", "posttrain", "valid", "test", "feed"), sizes, strict=True):
        if size < 1:
            raise ValueError(f"{name} must leave at least one user, got {size}")
    subs = CODEBOOK[0] * CODEBOOK[1]
    if not SLATE + 1 < items <= subs * CODEBOOK[2]:
        raise ValueError(f"items must be in [{SLATE + 2}, {subs * CODEBOOK[2]}], got {items}")
    if not (np.isfinite(bias) and bias >= 0):
        raise ValueError(f"bias must be a finite number >= 0, got {bias}")
    rng = np.random.default_rng(seed)

    centre = rng.normal(size=(CODEBOOK[0], DIM))
    centre[:, 0] = np.where(np.arange(CODEBOOK[0]) < NICHE_CATEGORIES, 2.5, -2.5)  # niche apart
    centre = unit(centre)
    sub_centre = unit(np.repeat(centre, CODEBOOK[1], 0) + 0.3 * rng.normal(size=(subs, DIM)))
    sub = np.arange(items) % subs
    slot = np.array([rng.permutation(CODEBOOK[2]) for _ in range(subs)])
    codes = np.stack(
        [sub // CODEBOOK[1], sub % CODEBOOK[1], slot[sub, np.arange(items) // subs]], 1
    )
    item_of = np.full(CODEBOOK, -1)
    item_of[tuple(codes.T)] = np.arange(items)
    niche = codes[:, 0] < NICHE_CATEGORIES
    embedding = unit(sub_centre[sub] + 0.2 * rng.normal(size=(items, DIM)))
    last_season = rng.normal(0, 0.15, items)
    fashion = 0.5 * last_season + 0.75**0.5 * rng.normal(0, 0.15, items)  # of the same spread
    quality = np.where(niche, last_season, fashion)

    def shoppers(users, quality, bought):
        taste = unit(
            centre[rng.integers(CODEBOOK[0], size=users)] + rng.normal(0, 0.2, (users, DIM))
        )
        pull = quality.astype(np.float32)
        return taste, in_chunks(
            lambda t: gumbel_top_k(rng, SHARPNESS * (t @ embedding.T + pull), bought), taste
        )

    def split(users, quality):
        taste, bought = shoppers(users, quality, HISTORY + 1)
        return Split(bought[:, :-1], bought[:, -1], taste)

    splits = [split(pretrain, last_season), *(split(n, quality) for n in (posttrain, valid, test))]
    taste, feed_history = shoppers(feed, quality, HISTORY)
    popularity = bias * (rng.normal(0, 0.5, items) - NICHE_OFFSET * niche).astype(np.float32)
    shown = in_chunks(
        lambda t: gumbel_top_k(rng, AFFINITY * (t @ embedding.T) + popularity, SLATE), taste
    )
    world = World(
        codes, item_of, niche, embedding, quality, *splits, feed_history, shown, shown, shown
    )
    likes = world.true_click_probability(taste, shown)
    looks = np.arange(1, SLATE + 1) ** -0.5  # fewer people look further down the slate
    world.clicked = rng.random(shown.shape) < looks * likes
    world.exposure = np.bincount(shown.ravel(), minlength=items)
    return world


def in_chunks(function, rows):
    return np.concatenate([function(rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)])
