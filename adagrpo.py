# SPDX-License-Identifier: MIT
"""AdaGRPO in one file: reinforcement learning from a ranker that is not always right.

A policy, a small GPT, writes the semantic ID of the item that a shopper buys next: L
tokens, from the coarse category to the single item. A ranker, a click model, scores
what it wrote. The ranker is right about some samples and wrong about others, because it
learned only from what a feed chose to show. AdaGRPO trains EVERY sample with supervised
NLL and admits the GRPO term sample by sample: only where the policy finds the sample
hard AND the ranker puts the true item above the average of what the policy wrote
instead.

A sample is one shopper (a user): a history x, and a target y, the true item, which was
bought next. An ID that names no item is a hallucination. r is the reward of an ID: the
ranker's score of the item, or 0 for a hallucination.

  (1) rollouts          a group of G IDs o_1 .. o_G that the policy writes for x,
                        likeliest first; some may be hallucinations
  (2) difficulty        d = share of the group that stands ahead of y; 1 if y is absent
  (3) discriminability  m = r(y) - mean r over the negatives, the IDs in the group that
                        name an item other than y; undefined (then g = 0) without any
  (4) gate              g = 1 if d >= min_difficulty and m >= min_discriminability,
                        else 0
  (5) advantages        A_i = (r(o_i) - mean r) / std r over the whole group; exactly 0
                        if all r are equal
  (6) GRPO              -mean over i of min(ratio_i A_i, clip(ratio_i) A_i); ratio_i is
                        policy(o_i | x) over its value at the time of the rollout
  (7) loss              mean over samples of NLL + weight * g * GRPO, where
                        NLL = -log policy(y | x)

The program pre-trains a policy on last season's purchases and a ranker on the feed's
clicks. Then it post-trains copies of the policy by several rules, the arms (NLL alone,
fixed mixtures, half a gate, AdaGRPO), and compares them. The file reads from the top:
policy, ranker, rollout, the method (gate, advantages, losses), the training loop,
evaluation. All that follows prints tables and starts the program.

By default the group is not drawn at random: it holds the G likeliest items, found by
beam search. The GRPO term then compares these items with each other; it is not an
unbiased estimate of the policy gradient. `--decode sample` draws the group instead.

What is left out, and why:
  - a KL term: the NLL is the anchor;
  - several updates per rollout: with a single one every ratio is 1 and clipping never
    acts; the gradient of the ratio is not 0, and that is all that GRPO needs;
  - constrained decoding: it would hide hallucinations;
  - distributed training: the models are tiny.

Shapes: B samples, G rollouts in each group, L tokens per item, V tokens in the
vocabulary, T = H * L tokens in the prompt (a history of H items). No tensor names its
device: torch's default device is set when the program starts.

Paper: Xu, Qi, Zou et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative
Recommendation", arXiv 2606.08480 (2026). Only its abstract was available: the idea is
theirs, the formulas are ours unless a source is named.
GRPO: Shao et al., DeepSeekMath, arXiv 2402.03300.
"""

import argparse
import copy
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import QUICK_SIZES, Shop, Split, load_shop, make_shop


@dataclass
class Config:
    """The settings; each has a command-line option of the same name."""

    seed: int = 0  # of the shop, the initial weights, and all random draws

    # the ranker's training and the policy's pre-training; their learning rates and
    # batch sizes are in `train_ranker` and `pretrain`
    bias: float = 1.0  # how strongly the toy shop's feed hides and favours items
    negatives: int = 2  # random items for the ranker (not the negatives of eq. 3)
    ranker_epochs: int = 3
    pretrain_epochs: int = 4

    # post-training
    users: int = 1200  # shoppers of the toy shop to post-train on
    epochs: int = 3  # passes over them; plain NLL gains nothing from a fourth
    batch: int = 8  # samples per step (B)
    lr: float = 1e-3
    group: int = 32  # rollouts per sample (G)
    decode: str = "beam"  # how they are made: "beam" or "sample"
    weight: float = 5.0  # of GRPO where it is admitted; the NLL has weight 1
    min_difficulty: float = 0.3  # of 32 beams: the target is not among the first ten
    min_discriminability: float = 0.01  # in the unit of the reward, a click probability


# ------------------------------------------------------------------------------- policy


class Attention(nn.Module):
    """Multi-head self-attention, also to keys and values of earlier calls."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        return x.view(B, N, self.heads, D // self.heads).transpose(1, 2)

    def forward(
        self,
        x: Tensor,  # (B, N, D): N tokens
        past: tuple[Tensor, Tensor] | None = None,  # keys and values of earlier calls
        mask: Tensor | None = None,  # (B, 1, N, keys); None: a causal sequence
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        q = self.split_heads(q)  # (B, heads, N, D / heads)
        k = self.split_heads(k)
        v = self.split_heads(v)
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)

        # No mask means no past either: each token sees itself and those before it.
        is_sequence = mask is None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_sequence
        )
        y = y.transpose(1, 2).flatten(2)  # (B, N, D)
        return self.out(y), (k, v)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to its input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, keys_and_values = self.attention(self.norm1(x), past, mask)
        x = x + attended
        x = x + self.mlp(self.norm2(x))
        return x, keys_and_values


class Policy(nn.Module):
    """A small GPT over the tokens of semantic IDs.

    Nothing stops it from writing an ID that names no item. `item_tokens` (items, L) are
    the IDs of the catalogue, `history_length` is H; the sizes follow from these. One
    vocabulary serves all L levels of an ID; in the toy shop each level has tokens of
    its own. ValueError if two items have the same ID.
    """

    def __init__(self, item_tokens: np.ndarray, history_length: int, width: int = 64):
        super().__init__()
        item_tokens = np.asarray(item_tokens)
        L = item_tokens.shape[1]
        V = int(item_tokens.max()) + 1
        if len(np.unique(item_tokens, axis=0)) < len(item_tokens):
            raise ValueError("item_tokens: two items have the same semantic ID")

        self.embedding = nn.Embedding(V, width)
        self.position = nn.Embedding(L * (history_length + 1), width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, V, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

        # To find the item of an ID: read the ID as a number in base V, and look the
        # number up in the sorted numbers of the catalogue.
        item_tokens = torch.as_tensor(item_tokens)
        digit_weights = V ** torch.arange(L - 1, -1, -1)  # (L,)
        numbers, items = (item_tokens * digit_weights).sum(-1).sort()
        self.register_buffer("item_tokens", item_tokens)
        self.register_buffer("digit_weights", digit_weights)
        self.register_buffer("sorted_numbers", numbers)
        self.register_buffer("sorted_items", items)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> log-probabilities of what follows each of them (B, N, V)."""
        position = torch.arange(tokens.shape[1])
        next_logp, _ = self.forward_with_cache(tokens, position)
        return next_logp

    def forward_with_cache(
        self,
        tokens: Tensor,  # (B, N)
        position: Tensor,  # (N,), or one number if all N tokens are for the same place
        cache: list | None = None,  # of an earlier call
        mask: Tensor | None = None,  # (B, N, keys) bool, needed with a cache
    ) -> tuple[Tensor, list]:
        """As `forward`, but the tokens also see those of an earlier call.

        Without a mask the tokens are a causal sequence. With one, the mask alone says
        what each token sees. Returns log-probabilities (B, N, V) and the cache for the
        next call.
        """
        if mask is not None:
            mask = mask[:, None]  # (B, 1, N, keys): the same for all heads

        x = self.embedding(tokens) + self.position(position)  # (B, N, width)
        new_cache = []
        for layer, block in enumerate(self.blocks):
            past = None
            if cache is not None:
                past = cache[layer]
            x, keys_and_values = block(x, past, mask)
            new_cache.append(keys_and_values)

        logits = self.head(self.norm(x))
        return logits.log_softmax(-1), new_cache

    def prompt(self, history: Tensor) -> Tensor:
        """Item numbers (B, H) -> their tokens in a row (B, T)."""
        return self.item_tokens[history].flatten(1)

    def items_of(self, tokens: Tensor) -> Tensor:
        """Semantic IDs (..., L) -> item numbers (...), -1 for a hallucination."""
        number = (tokens * self.digit_weights).sum(-1)
        index = torch.searchsorted(self.sorted_numbers, number)

        # Past the last number there is no item: the comparison says so.
        index = index.clamp(max=len(self.sorted_numbers) - 1)
        exists = self.sorted_numbers[index] == number
        return torch.where(exists, self.sorted_items[index], -1)


# ---------------------------------------------------------------- supervised training


def shuffled_batches(samples: int, batch: int, epochs: int) -> tuple[Tensor, ...]:
    """Row numbers of each batch; every pass has an order of its own."""
    passes = [torch.randperm(samples) for _ in range(epochs)]
    return torch.cat(passes).split(batch)


def make_optimizer(
    model: nn.Module, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a warm-up of 20 steps and a linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / steps)
    )
    return optimizer, scheduler


def progress(steps: Sequence, label: str | None) -> Iterable:
    """The steps, under a progress bar if it has a label and there is a terminal."""
    # In a pool the ranker is trained beside the policy, which has the one bar.
    is_beside = label == "ranker" and multiprocessing.parent_process() is not None
    if label is None or is_beside:
        return steps
    return tqdm(steps, label, leave=False, disable=None)


def fit(
    model: nn.Module,
    lr: float,
    batches: tuple[Tensor, ...],
    loss_of: Callable[[Tensor], Tensor],  # row numbers of a batch -> loss
    label: str | None,  # of a progress bar
) -> None:
    """Plain supervised training, for the policy's pre-training and for the ranker."""
    optimizer, scheduler = make_optimizer(model, lr, len(batches))
    for rows in progress(batches, label):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()


def pretrain(shop: Shop, config: Config) -> Policy:
    """A policy trained by next-token NLL on last season's sequences of purchases."""
    torch.manual_seed(config.seed)
    split = shop.pretrain  # history (N, H) and target (N,), item numbers
    history_length = split.history.shape[1]
    policy = Policy(shop.tokens, history_length)

    purchases = np.column_stack([split.history, split.target])
    sequences = policy.prompt(torch.as_tensor(purchases))  # (shoppers, T + L)

    def loss_of(rows: Tensor) -> Tensor:
        sequence = sequences[rows]
        next_logp = policy(sequence[:, :-1])  # (B, T + L - 1, V)
        return F.nll_loss(next_logp.transpose(1, 2), sequence[:, 1:])

    batches = shuffled_batches(len(sequences), 128, config.pretrain_epochs)
    fit(policy, 1e-3, batches, loss_of, "pre-training")
    return policy


# ------------------------------------------------------------------------------- ranker


class Ranker(nn.Module):
    """A click model: an MLP on the embeddings of user and item and on their product.

    The user is the mean embedding of the history: a bag. This ranker cannot see in
    which order things were bought.
    """

    def __init__(self, items: int, width: int = 32):
        super().__init__()
        self.bought = nn.Embedding(items, width)
        self.offered = nn.Embedding(items, width)
        nn.init.normal_(self.bought.weight, std=0.1)
        nn.init.normal_(self.offered.weight, std=0.1)
        self.mlp = nn.Sequential(
            nn.Linear(3 * width, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 1),
        )

    def forward(self, history: Tensor, items: Tensor) -> Tensor:
        """Item numbers: history (B, H), items (B, K) -> logits of a click (B, K)."""
        item = self.offered(items)  # (B, K, width)
        user = self.bought(history).mean(1, keepdim=True)  # (B, 1, width)
        user = user.expand_as(item)

        # Embeddings start small, their product is smaller: times 10 makes up for it.
        product = 10 * user * item
        features = torch.cat([user, item, product], dim=-1)
        return self.mlp(features).squeeze(-1)

    def click_probability(self, history: Tensor, items: Tensor) -> Tensor:
        """The score: P(click) in 0..1 (B, K)."""
        return self(history, items).sigmoid()


def train_ranker(shop: Shop, config: Config) -> Ranker:
    """A ranker trained by binary cross-entropy on the feed: what it showed, what was
    clicked.

    A slate is what one shopper was shown, S items. A few random items of the catalogue
    join it as "not clicked": they are all that the ranker learns about items that the
    feed hides.
    """
    torch.manual_seed(config.seed)
    items = len(shop.tokens)
    ranker = Ranker(items)
    history = torch.as_tensor(shop.feed_history)  # (M, H)
    shown = torch.as_tensor(shop.shown)  # (M, S)
    clicked = torch.as_tensor(shop.clicked).float()  # (M, S)

    def loss_of(rows: Tensor) -> Tensor:
        # A random item may be one that was clicked: rarely, and it does not matter.
        random_items = torch.randint(items, (len(rows), config.negatives))
        offered = torch.cat([shown[rows], random_items], dim=1)  # (B, S + negatives)
        not_clicked = torch.zeros(random_items.shape)
        labels = torch.cat([clicked[rows], not_clicked], dim=1)

        logits = ranker(history[rows], offered)
        return F.binary_cross_entropy_with_logits(logits, labels)

    batches = shuffled_batches(len(shown), 512, config.ranker_epochs)
    fit(ranker, 6e-3, batches, loss_of, "ranker")
    return ranker


# ------------------------------------------------------------------------------ rollout


def log_prob(policy: Policy, prompt: Tensor, item_tokens: Tensor) -> Tensor:
    """log policy(item | prompt): prompt (B, T), the item's tokens (B, L) -> (B,).

    It is the SUM over the item's tokens, here and in every loss of post-training.
    """
    L = item_tokens.shape[1]
    sequence = torch.cat([prompt, item_tokens], dim=1)
    next_logp = policy(sequence[:, :-1])  # (B, T + L - 1, V)
    next_logp = next_logp[:, -L:]  # (B, L, V): those that predict the item
    token_nll = F.nll_loss(next_logp.transpose(1, 2), item_tokens, reduction="none")
    return -token_nll.sum(1)


def rollout(
    policy: Policy, prompt: Tensor, group: int, decode: str
) -> tuple[Tensor, Tensor]:
    """Eq. (1): a group of items for each prompt, likeliest first.

    prompt (B, T), decode "beam" or "sample" -> tokens (B, G, L) and log-probabilities
    (B, G), which carry the gradient. Nothing constrains the tokens.

    The prompt is encoded once. Each rollout is a branch that grows by one token per
    level and sees the prompt and its own tokens. All branches of a level go through the
    policy side by side; a mask keeps them apart. With 3 branches, at the second level:

                        sees:  prompt   level 1   level 2
                               x x x     a b c     d e f
        d, which continues a   1 1 1     1 0 0     1 0 0
        e, which continues a   1 1 1     1 0 0     0 1 0
        f, which continues c   1 1 1     0 0 1     0 0 1

    Nothing continues b: it stays in the cache, and nobody sees it.
    """
    B, T = prompt.shape
    L = policy.item_tokens.shape[1]
    row = torch.arange(B)[:, None]  # x[row, parent] picks branches of each sample

    # At first there is one branch, the root: it has written nothing and sees the
    # prompt. Q, the number of branches, is 1 now, and G (or fewer, early in a beam)
    # later.
    next_logp, cache = policy.forward_with_cache(prompt, torch.arange(T))
    next_logp = next_logp[:, -1:]  # (B, Q, V): what may follow each branch
    total = torch.zeros(B, 1)  # (B, Q): log-probability of what each has written
    tokens = torch.zeros(B, 1, 0, dtype=torch.long)  # (B, Q, tokens so far)
    mask = torch.ones(B, 1, T, dtype=torch.bool)  # (B, Q, tokens in the cache)

    for level in range(L):
        # Which branches grow, and by which token, (B, G) both. The choice has no
        # gradient.
        with torch.no_grad():
            if decode == "beam":
                parent, token = beam(total, next_logp, group)
            else:
                parent, token = draw(next_logp, group)

        # A new branch is its parent and one more token.
        total = total[row, parent] + next_logp[row, parent, token]  # (B, G)
        tokens = torch.cat([tokens[row, parent], token[..., None]], dim=2)

        # If the items are not complete, the policy reads the new tokens. Each sees what
        # its parent saw, and itself.
        if level < L - 1:
            branches = token.shape[1]
            itself = torch.eye(branches, dtype=torch.bool).expand(B, -1, -1)
            mask = torch.cat([mask[row, parent], itself], dim=2)
            position = torch.tensor(T + level)  # the same for all branches
            next_logp, cache = policy.forward_with_cache(token, position, cache, mask)

    order = total.argsort(dim=1, descending=True)  # draws come in no order, and repeat
    return tokens[row, order], total[row, order]


def beam(total: Tensor, next_logp: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The G likeliest continuations of all branches: total (B, Q), next_logp (B, Q, V).

    Returns the branch that each one continues and its next token, (B, G) both; while
    there are fewer continuations than G, all of them.
    """
    Q, V = next_logp.shape[1:]
    continuations = total[..., None] + next_logp  # (B, Q, V)
    best = continuations.flatten(1).topk(min(group, Q * V)).indices  # (B, G)
    return best // V, best % V


def draw(next_logp: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Random continuations: G from the root, later one from each branch.

    Returns the same two tensors as `beam`.
    """
    B, Q = next_logp.shape[:2]
    probability = next_logp.exp()
    if Q == 1:  # only at the root, because G >= 2
        token = torch.multinomial(probability[:, 0], group, replacement=True)
        parent = torch.zeros_like(token)
    else:
        token = torch.multinomial(probability.flatten(0, 1), 1).view(B, Q)
        parent = torch.arange(Q).expand(B, -1)
    return parent, token


# ---------------------------------------------- the method: gate, advantages, losses


class Gate(NamedTuple):
    """What `adagrpo_gate` says of each sample; (B,) each."""

    admit: Tensor  # bool: hard and clear
    hard: Tensor  # bool: the difficulty reaches its threshold
    clear: Tensor  # bool: the discriminability reaches its threshold
    difficulty: Tensor  # in 0..1
    discriminability: Tensor  # in the unit of the rewards; nan where it is undefined


@torch.no_grad()
def adagrpo_gate(
    target_reward: Tensor,  # (B,) the ranker's score of the true item
    rollout_rewards: Tensor,  # (B, G) the ranker's scores of the rollouts
    hit: Tensor,  # (B, G) bool: the rollout is the true item
    valid: Tensor,  # (B, G) bool: the rollout names an item
    min_difficulty: float,  # in 0..1
    min_discriminability: float,  # in the unit of the rewards
) -> Gate:
    """Eq. (2)-(4): admit GRPO where the policy finds it hard and the ranker is clear.

    The G columns are sorted, likeliest first: the difficulty counts those before the
    first hit. A sample is not admitted if its discriminability is undefined: it has no
    valid negative, or the reward of the target or of a negative is not finite, or their
    sum overflows. Thresholds are compared with >=, without a tolerance for rounding.
    There is no gradient.

    To copy the gate, take `Gate`, this function, and from the end of this section
    `to_tensor`, `to_reals`, `to_mask` and `check_group`; they need torch and math.
    Scores may be probabilities or logits, in tensors, arrays or lists. If your columns
    have no order, put the rollouts that are no hit first: the difficulty is then their
    share. Raises TypeError or ValueError that names the argument.

    Source: the two diagnostics and the 0/1 gate are the paper's (abstract), these
    formulas are ours.
    """
    rollout_rewards = to_reals("rollout_rewards", rollout_rewards)
    B, G = check_group("rollout_rewards", rollout_rewards)
    target_reward = to_reals("target_reward", target_reward, (B,))
    hit = to_mask("hit", hit, (B, G))
    valid = to_mask("valid", valid, (B, G))
    if not 0 <= min_difficulty <= 1:
        raise ValueError(f"min_difficulty must be in 0..1, got {min_difficulty}")
    if not math.isfinite(min_discriminability):
        raise ValueError(f"min_discriminability must be finite: {min_discriminability}")

    # hit 0 0 1 0 -> cumsum 0 0 1 1. While it is 0, rollouts stand ahead of y: 2 of 4.
    is_ahead = hit.cumsum(1) == 0  # (B, G)
    difficulty = is_ahead.sum(1) / G  # (B,)  eq. (2)

    negative = valid & ~hit  # (B, G)
    negative_sum = torch.where(negative, rollout_rewards, 0.0).sum(1)  # (B,)
    negative_mean = negative_sum / negative.sum(1)  # nan (0 / 0) without a negative
    difference = target_reward - negative_mean
    is_defined = difference.isfinite()
    discriminability = torch.where(is_defined, difference, torch.nan)  # (B,)  eq. (3)

    hard = difficulty >= min_difficulty
    clear = discriminability >= min_discriminability  # False for nan
    admit = hard & clear  # (B,)  eq. (4)
    return Gate(admit, hard, clear, difficulty, discriminability)


def with_floor(scores: Tensor, valid: Tensor, floor: float = 0.0) -> Tensor:
    """Rewards (B, G): the ranker's score, or `floor` for a hallucination.

    No reward is lower than the floor, so that a hallucination is never better than an
    item. 0 is right for probabilities; scores that can be negative (logits) need
    another. Source: ours.
    """
    scores = to_reals("scores", scores)
    valid = to_mask("valid", valid, tuple(scores.shape))
    return torch.where(valid, scores.clamp(min=floor), floor)


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. (5): rewards (B, G) of any real type -> standardised in each group (B, G).

    A flat group (all rewards equal, up to rounding) gets exactly 0, and so does one
    with a reward that is not finite. The unit and the level of the rewards make no
    difference: a small spread counts like a large one. No gradient flows. Computed in
    float32 or better.

    Raises TypeError or ValueError. Source: GRPO, with the population standard
    deviation; the care for flat groups is ours.
    """
    rewards = to_reals("rewards", rewards).detach()
    B, _ = check_group("rewards", rewards)
    if B == 0:  # std() would warn
        return rewards

    lowest = rewards.amin(1, keepdim=True)  # (B, 1), nan if there is a nan
    highest = rewards.amax(1, keepdim=True)
    spread = highest - lowest

    # Flat up to rounding: within four units in the last place of the largest reward.
    largest = torch.maximum(lowest.abs(), highest.abs())
    rounding = 4 * torch.finfo(rewards.dtype).eps * largest
    has_spread = (spread > rounding) & spread.isfinite()  # False for nan

    # Not (r - mean) / (std + eps): in a flat group that would turn rounding into
    # advantages. Shift and scale do not change eq. (5), and between 0 and 1 no sum
    # overflows. A flat group is 0 / 0 here, and set to 0 at the end.
    scaled = (rewards - lowest) / spread  # (B, G)
    centred = scaled - scaled.mean(1, keepdim=True)
    advantages = centred / scaled.std(1, correction=0, keepdim=True)  # eq. (5)
    return torch.where(has_spread, advantages, 0.0)


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2
) -> Tensor:
    """Eq. (6): the clipped surrogate of each sample; three tensors (B, G) -> (B,).

    logp and old_logp are log-probabilities of whole items: SUMS over an item's tokens.
    If yours are of tokens, (B * G, L), sum over L and reshape to (B, G) first.

    With one update per rollout old_logp is logp.detach(). Every ratio is then 1 and the
    loss is -mean(A) = 0; its gradient, -mean(A_i * grad logp_i), is not.

    The inputs of a refused sample may be broken (a log-probability of -inf, say). A
    ratio or advantage that is not finite makes the loss of its sample nan, so that
    nobody overlooks it, but sends back gradient 0, so that `adagrpo_loss` can drop the
    sample.

    Computed in float32 or better. Raises TypeError or ValueError. Source: GRPO without
    its KL term, and with one ratio per item.
    """
    logp = to_reals("logp", logp)
    B, G = check_group("logp", logp)
    old_logp = to_reals("old_logp", old_logp, (B, G))
    advantages = to_reals("advantages", advantages, (B, G))

    log_ratio = logp - old_logp  # (B, G)
    is_usable = log_ratio.detach().exp().isfinite() & advantages.isfinite()
    # Replaced BEFORE exp(): a where() behind it would send back 0 * nan, a nan.
    ratio = torch.where(is_usable, log_ratio, 0.0).exp()
    advantages = torch.where(is_usable, advantages, 0.0)

    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    surrogate = torch.minimum(unclipped, clipped)

    # Only now it becomes nan, in the value and not in the gradient.
    surrogate = torch.where(is_usable, surrogate, torch.nan)
    return -surrogate.mean(1)  # (B,)  eq. (6)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): nll (B,), grpo (B,), admit (B,) bool -> a scalar.

    The sum is divided by B and not by the number admitted, so GRPO counts with weight *
    admission rate, its dose. NLL is a SUM over the item's L tokens; if yours is a mean
    over tokens, divide the weight by L.

    A sample that is not admitted adds nothing of its GRPO term, not even a nan. Without
    samples the loss is 0. Raises TypeError or ValueError. Source: NLL for all and gated
    GRPO are the paper's (abstract), weight and denominator are ours.
    """
    nll = to_reals("nll", nll)
    if nll.ndim != 1:
        raise ValueError(f"nll must have shape (B,), got {tuple(nll.shape)}")
    B = len(nll)
    grpo = to_reals("grpo", grpo, (B,))
    admit = to_mask("admit", admit, (B,))

    gated = torch.where(admit, grpo, 0.0)
    return (nll + weight * gated).sum() / max(B, 1)  # eq. (7)


# How the functions above check their tensors: an error names the argument.


def to_tensor(name: str, value: object, shape: tuple | None) -> Tensor:
    """A tensor, array or list -> tensor, of this shape if one is given."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            given = type(value).__name__
            message = f"{name} must be a tensor or array, got {given}: {error}"
            raise TypeError(message) from error
    if shape is not None and value.shape != shape:
        given = tuple(value.shape)
        raise ValueError(f"{name} must have shape {shape}, got {given}")
    return value


def to_reals(name: str, value: object, shape: tuple | None = None) -> Tensor:
    """Numbers of any real type: float64 stays float64, all else becomes float32."""
    tensor = to_tensor(name, value, shape)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def to_mask(name: str, value: object, shape: tuple) -> Tensor:
    """A mask. 0 and 1 are refused: they could be indices or scores by mistake."""
    tensor = to_tensor(name, value, shape)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool of shape {shape}, got {tensor.dtype}")
    return tensor


def check_group(name: str, tensor: Tensor) -> tuple[int, int]:
    """The shape of a tensor that has to be (B, G)."""
    shape = tuple(tensor.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"{name} must have shape (B, G) with G >= 2, got {shape}")
    return shape


# ------------------------------------------------------------------------ training loop


class Scored(NamedTuple):
    """The group that the policy wrote, and what ranker and gate say of it."""

    history: Tensor  # (B, H) item numbers
    tokens: Tensor  # (B, G, L) the rollouts, likeliest first
    logp: Tensor  # (B, G) their log-probabilities, with gradient
    items: Tensor  # (B, G) their item numbers, -1 for a hallucination
    hit: Tensor  # (B, G) bool: it is the target
    valid: Tensor  # (B, G) bool: it is an item
    rewards: Tensor  # (B, G) 0 for a hallucination
    target_reward: Tensor  # (B,)
    gate: Gate


def roll_out_and_score(
    policy: Policy,
    ranker: Ranker,
    history: Tensor,  # (B, H) item numbers
    target: Tensor,  # (B,) item numbers
    config: Config,
) -> Scored:
    """Eq. (1)-(4) for a batch: in training, evaluation and the printed examples."""
    prompt = policy.prompt(history)  # (B, T)
    tokens, logp = rollout(policy, prompt, config.group, config.decode)  # eq. (1)
    items = policy.items_of(tokens)  # (B, G)
    hit = items == target[:, None]
    valid = items >= 0

    with torch.no_grad():  # the ranker learns nothing here
        # Hallucinations (-1) are scored as item 0, which `with_floor` then overrides.
        scores = ranker.click_probability(history, items.clamp(min=0))
        rewards = with_floor(scores, valid)  # (B, G)
        target_reward = ranker.click_probability(history, target[:, None]).squeeze(1)

    gate = adagrpo_gate(  # eq. (2)-(4)
        target_reward,
        rewards,
        hit,
        valid,
        config.min_difficulty,
        config.min_discriminability,
    )
    return Scored(
        history, tokens, logp, items, hit, valid, rewards, target_reward, gate
    )


# An arm is a rule and a weight of the GRPO term. The rule says which samples of a batch
# get that term, (B,) bool. NLL alone has no rule: it needs no rollouts.
Rule = Callable[[Scored], Tensor]
RULES: dict[str, Rule | None] = {
    "nll": None,
    # no gate: a fixed mixture of NLL and GRPO
    "mix": lambda scored: torch.ones_like(scored.gate.admit),
    # the two halves of the gate
    "difficulty": lambda scored: scored.gate.hard,
    "discriminability": lambda scored: scored.gate.clear,
    # the gate
    "adagrpo": lambda scored: scored.gate.admit,
}


# Arms are compared by their dose: weight times the share of samples that get the GRPO
# term. adagrpo admits about a quarter of the training samples (fewer and fewer, as it
# learns), so that its weight of 5 is a dose of 1.3. The halves of the gate have that
# dose, too.
ARMS = ["nll", "mix-0.3", "mix-1", "difficulty-2.1", "discriminability-2.6", "adagrpo"]


def post_train(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    rule: Rule | None,
    weight: float,
    config: Config,
    label: str | None = None,  # of the printed lines; None: print nothing
) -> None:
    """The training loop. It changes `policy` and prints a line every 100 steps."""
    torch.manual_seed(config.seed)  # every arm sees the same batches
    all_histories = torch.as_tensor(split.history)
    all_targets = torch.as_tensor(split.target)
    batches = shuffled_batches(len(all_targets), config.batch, config.epochs)
    optimizer, scheduler = make_optimizer(policy, config.lr, len(batches))

    recent = []  # figures of the steps since the last printed line
    started = time.perf_counter()
    for step, rows in enumerate(batches, start=1):
        history = all_histories[rows]  # (B, H)
        target = all_targets[rows]  # (B,)

        # Every sample is supervised.
        prompt = policy.prompt(history)  # (B, T)
        nll = -log_prob(policy, prompt, policy.item_tokens[target])  # (B,)

        if rule is None:
            loss = nll.mean()
            recent.append({"nll": loss.detach()})
        else:
            # GRPO joins where the rule admits it.
            scored = roll_out_and_score(policy, ranker, history, target, config)
            admitted = rule(scored)  # (B,)
            advantages = group_advantages(scored.rewards)  # (B, G)  eq. (5)
            old_logp = scored.logp.detach()  # one update per rollout
            grpo = grpo_loss(scored.logp, old_logp, advantages)  # (B,)  eq. (6)
            loss = adagrpo_loss(nll, grpo, admitted, weight)  # eq. (7)
            recent.append(training_figures(nll, scored, admitted))

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()

        is_last = step == len(batches)
        if label is not None and (step % 100 == 0 or is_last):
            speed = len(recent) / (time.perf_counter() - started)
            print(training_line(label, step, recent, speed), flush=True)
            recent = []
            started = time.perf_counter()


def training_figures(
    nll: Tensor, scored: Scored, admitted: Tensor
) -> dict[str, Tensor]:
    """What to watch in training; the shares add up to 1 for the rule adagrpo."""
    is_easy = ~scored.gate.hard
    is_unclear = scored.gate.hard & ~scored.gate.clear
    return {
        "nll": nll.detach().mean(),
        "reward": scored.rewards.mean(),  # over all rollouts
        "easy": is_easy.float().mean(),
        "unclear": is_unclear.float().mean(),  # hard, but not clear
        "admitted": admitted.float().mean(),  # by the arm's rule
    }


TRAINING_COLUMNS = ("nll", "reward", "easy", "unclear", "admitted")


def training_header() -> str:
    columns = "".join(f"{name:>10}" for name in TRAINING_COLUMNS)
    return f"{'arm':<22}{'step':>6}{columns}{'steps/s':>10}"


def training_line(label: str, step: int, recent: list[dict], speed: float) -> str:
    """Means over the recent steps."""
    line = f"{label:<22}{step:>6}"
    for name in TRAINING_COLUMNS:
        if name in recent[0]:
            mean = torch.stack([figures[name] for figures in recent]).mean().item()
            line += f"{mean:>10.3f}"
        else:
            line += f"{'-':>10}"
    return line + f"{speed:>10.0f}"


# --------------------------------------------------------------------------- evaluation

BEAMS = 32  # group size when arms are compared, whatever it was in training
RERANKED = 64  # likeliest items that `rerank` puts into the ranker's order


def user_batches(split: Split, label: str | None) -> Iterator[tuple[Tensor, Tensor]]:
    """History (B, H) and target (B,) of all users, under a bar if it has a label."""
    starts = range(0, len(split.target), 128)
    for start in progress(starts, label):
        rows = slice(start, start + 128)
        yield torch.as_tensor(split.history[rows]), torch.as_tensor(split.target[rows])


def joined(batches: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """One array for each metric."""
    arrays = {}
    for name in batches[0]:
        column = [metrics[name] for metrics in batches]
        arrays[name] = torch.cat(column).cpu().numpy()
    return arrays


@torch.no_grad()
def evaluate(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    config: Config,
    label: str | None = None,  # of a progress bar
) -> dict[str, np.ndarray]:
    """Metrics of every user of a split, (N,) each; shares are in 0..1.

    hr@k                1 if the target is among the k likeliest rollouts, else 0
    ndcg@10             1 / log2(1 + rank of the target); 0 if it is not in the first 10
    hallucination       share of the 10 likeliest rollouts that name no item
    auc                 share of 100 random items that the ranker puts below the target
    auc in group        share of the group's negatives that it puts below the target
    top 10              (N, 10) items, -1 for a hallucination
    the fields of Gate  at the thresholds in `config`

    The group is rolled out as `config` says. To compare arms, give it BEAMS beams.
    """
    torch.manual_seed(config.seed)  # the same random items for every policy
    places = min(config.group, 10)  # a group may be smaller
    ranks = torch.arange(1, places + 1)
    discount = 1 / torch.log2(1 + ranks)  # of NDCG
    batches = []
    for history, target in user_batches(split, label):
        scored = roll_out_and_score(policy, ranker, history, target, config)
        hit = scored.hit.float()  # (B, G)
        top = scored.items[:, :10]
        target_reward = scored.target_reward[:, None]  # (B, 1)

        random_items = torch.randint(len(policy.item_tokens), (len(target), 100))
        random_scores = ranker.click_probability(history, random_items)
        is_below = random_scores < target_reward  # (B, 100)

        negative = scored.valid & ~scored.hit
        is_beaten = negative & (scored.rewards < target_reward)  # (B, G)
        auc_in_group = is_beaten.sum(1) / negative.sum(1)  # nan without a negative

        metrics = {
            "hr@5": hit[:, :5].amax(1),
            "hr@10": hit[:, :10].amax(1),
            "hr@20": hit[:, :20].amax(1),
            "ndcg@10": (hit[:, :10] * discount).amax(1),
            "hallucination": (top < 0).float().mean(1),
            "auc": is_below.float().mean(1),
            "auc in group": auc_in_group,
            "top 10": top,
        }
        batches.append(metrics | scored.gate._asdict())
    return joined(batches)


@torch.no_grad()
def rerank(
    policy: Policy, ranker: Ranker, split: Split, label: str | None = None
) -> dict[str, np.ndarray]:
    """Has the ranker anything to teach?

    The policy's RERANKED likeliest items are put into the ranker's order. Returns HR@10
    of both orders, (N,) of 0 and 1: "hr@10" (the policy's) and "reranked" (the
    ranker's).
    """
    batches = []
    for history, target in user_batches(split, label):
        tokens, _ = rollout(policy, policy.prompt(history), RERANKED, "beam")
        items = policy.items_of(tokens)  # (B, RERANKED)
        scores = ranker.click_probability(history, items.clamp(min=0))
        rewards = with_floor(scores, items >= 0)

        best = rewards.topk(10).indices  # (B, 10)
        reranked = items.gather(1, best)
        metrics = {
            "hr@10": (items[:, :10] == target[:, None]).any(1).float(),
            "reranked": (reranked == target[:, None]).any(1).float(),
        }
        batches.append(metrics)
    return joined(batches)


# ----------------------------------------------------------------------------- printing
# From here on there are tables, and then the command line.


def by_kind(split: Split, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Masks (N,) over the users of a split: all of them, and each kind."""
    masks = {"all": np.ones(len(split.target), dtype=bool)}
    for number, name in enumerate(kinds):
        masks[name] = split.kind == number
    return masks


def by_verdict(before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks (N,): what the gate says of each user before post-training."""
    hard = before["hard"]
    clear = before["clear"]
    return {
        "hard+clear": hard & clear,
        "hard+unclear": hard & ~clear,
        "easy+clear": ~hard & clear,
        "easy+unclear": ~hard & ~clear,
    }


def mean_percent(metric: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the metric over the users in the mask, in percent; nan if none."""
    values = metric[mask]
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan")
    return 100 * float(values.mean())


def thinned(split: Split, most: int) -> Split:
    """At most so many users, evenly spaced over the split."""
    size = len(split.target)
    rows = np.linspace(0, size - 1, min(size, most)).astype(int)
    return Split(split.history[rows], split.target[rows], split.kind[rows])


def column_width(title: str) -> int:
    return max(8, len(title) + 1)


def print_premise(shop: Shop, policy: Policy, ranker: Ranker, config: Config) -> None:
    """What can be known before any post-training: could the ranker teach, and whom?

    The premise of the method is that the ranker knows something that the policy does
    not.
    """
    # The group is that of training: thresholds are chosen from what the gate will see.
    validation = thinned(shop.validation, 3000)
    metrics = evaluate(policy, ranker, validation, config, label="premise")
    orders = rerank(policy, ranker, validation, label="re-ranking")
    print_premise_by_kind(validation, shop.kinds, metrics, orders)

    posttrain = thinned(shop.posttrain, 3000)
    posttrain_metrics = evaluate(policy, ranker, posttrain, config, label="leak check")
    print_leak_check(posttrain_metrics, metrics)
    print_quantiles(metrics)


def print_premise_by_kind(
    split: Split,
    kinds: tuple[str, ...],
    metrics: dict[str, np.ndarray],
    orders: dict[str, np.ndarray],
) -> None:
    print(f"\nBefore post-training, percent of {len(split.target)} validation users.")
    print(
        f"re-ranked: HR@10 after the ranker has ordered the {RERANKED} likeliest items."
    )
    print("Where that is not higher than HR@10, the ranker has little to teach.")
    columns = {
        "HR@10": orders["hr@10"],
        "re-ranked": orders["reranked"],
        "AUC": metrics["auc"],
        "AUC in group": metrics["auc in group"],
        "hard": metrics["hard"],
        "clear": metrics["clear"],
        "admitted": metrics["admit"],
    }
    header = f"{'':<14}{'share':>8}"
    for title in columns:
        header += f"{title:>{column_width(title)}}"
    print(header)
    for kind, mask in by_kind(split, kinds).items():
        line = f"{kind:<14}{100 * mask.mean():>8.1f}"
        for title, metric in columns.items():
            line += f"{mean_percent(metric, mask):>{column_width(title)}.1f}"
        print(line)


LEAK_WARNING = """\
  WARNING: a leak? The feed that the ranker learned from may hold the post-training
  targets. The gate would trust what the ranker has memorised."""


def print_leak_check(
    posttrain_metrics: dict[str, np.ndarray], metrics: dict[str, np.ndarray]
) -> None:
    """Had the feed held the post-training targets, they would score better."""
    print("\nThe ranker (percent)  post-training users  validation users")
    for name in ("auc", "clear"):
        trained = posttrain_metrics[name]
        unseen = metrics[name]
        line = f"  {name:<20}{100 * trained.mean():>19.1f}"
        print(line + f"{100 * unseen.mean():>18.1f}")
        if is_clearly_higher(trained, unseen):
            print(LEAK_WARNING)


def is_clearly_higher(a: np.ndarray, b: np.ndarray) -> bool:
    """Is the mean share in `a` above that in `b` by 4 points and 3 standard errors?"""
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    return bool(a.mean() - b.mean() > max(0.04, 3 * error))


def print_quantiles(metrics: dict[str, np.ndarray]) -> None:
    print("\nQuantiles over validation users, to choose thresholds from")
    shares = (0.1, 0.25, 0.5, 0.75, 0.9)
    print(f"{'':<18}" + "".join(f"{share:>9.0%}" for share in shares))
    for name in ("difficulty", "discriminability"):
        values = metrics[name][~np.isnan(metrics[name])]
        if len(values) > 0:
            quantiles = np.quantile(values, shares)
            print(f"{name:<18}" + "".join(f"{value:>9.3f}" for value in quantiles))


def print_examples(
    shop: Shop,
    policy: Policy,
    ranker: Ranker,
    before: dict[str, np.ndarray],
    config: Config,
) -> None:
    """What the gate sees: a test user whom it admits, an easy and an unclear one."""
    verdicts = {
        "admitted": before["admit"],
        "refused, easy": ~before["hard"],
        "refused, not clear": before["hard"] & ~before["clear"],
    }
    print("\nWhat the gate sees: the five likeliest of the group, for three test users")
    kinds = by_kind(shop.test, shop.kinds)
    for verdict, has_verdict in verdicts.items():
        # The first user with this verdict, of the kind that gets it most often; of all
        # users if there are no kinds.
        shares = {}
        for kind, mask in kinds.items():
            if mask.any():
                shares[kind] = has_verdict[mask].mean()
        kind = max(shares, key=shares.get)
        users = np.flatnonzero(has_verdict & kinds[kind])
        if len(users) > 0:
            print(f"{verdict} (a user of kind: {kind})")
            print_group(shop.test, users[0], policy, ranker, config)


@torch.no_grad()
def print_group(
    split: Split, user: int, policy: Policy, ranker: Ranker, config: Config
) -> None:
    """The group of one user, as the gate sees it."""
    history = torch.as_tensor(split.history[user : user + 1])
    target = torch.as_tensor(split.target[user : user + 1])
    scored = roll_out_and_score(policy, ranker, history, target, config)
    advantages = group_advantages(scored.rewards)

    bought = policy.item_tokens[history[0, -3:]]
    print_row("  last bought", [name_of(tokens) for tokens in bought])
    print_row("  rollouts", [name_of(tokens) for tokens in scored.tokens[0, :5]])
    print_row("    policy", [f"{p:.3f}" for p in scored.logp[0, :5].exp()])
    print_row("    reward", [f"{r:.3f}" for r in scored.rewards[0, :5]])
    print_row("    advantage", [f"{a:+.2f}" for a in advantages[0, :5]])
    best = scored.rewards[0].argmax()
    print(
        f"  highest reward of the group: {name_of(scored.tokens[0, best])},"
        f" reward {scored.rewards[0, best]:.3f}, advantage {advantages[0, best]:+.2f}"
    )
    print(
        f"  target {name_of(policy.item_tokens[target[0]])}:"
        f" reward {scored.target_reward[0]:.3f},"
        f" difficulty {scored.gate.difficulty[0]:.2f},"
        f" discriminability {scored.gate.discriminability[0]:+.3f}"
    )


def name_of(tokens: Tensor) -> str:
    return "-".join(str(token) for token in tokens.tolist())


def print_row(name: str, cells: list[str]) -> None:
    print(f"{name:<18}" + "".join(f"{cell:>13}" for cell in cells))


def print_results(
    shop: Shop,
    before: dict[str, np.ndarray],
    results: dict[str, dict[str, np.ndarray]],  # by arm
) -> None:
    """Two tables: the arms by metric, and by kind of shopper and verdict."""
    titles = ("hr@10", "hr@5", "hr@20", "ndcg@10", "hallucination", "validation hr@10")
    users = len(shop.test.target)
    print(f"\nResults on {users} test users, percent. Last column: what to tune by.")
    header = f"{'arm':<22}"
    for title in titles:
        header += f"{title:>{column_width(title)}}"
    print(header)
    for arm, metrics in {"before post-training": before, **results}.items():
        line = f"{arm:<22}"
        for title in titles:
            line += f"{100 * metrics[title].mean():>{column_width(title)}.2f}"
        print(line)

    base = next(iter(results))  # the first arm is what the others are compared with
    print("\nHR@10 by kind of shopper, and by the gate's verdict before post-training.")
    print(f"First line: {base}, percent. Other lines: points more or less than {base}.")
    masks = by_kind(shop.test, shop.kinds) | by_verdict(before)
    header = f"{'arm':<20}"
    for title in masks:
        header += f"{title:>{column_width(title)}}"
    print(header)
    for arm, metrics in results.items():
        line = f"{arm:<20}"
        for title, mask in masks.items():
            width = column_width(title)
            level = mean_percent(metrics["hr@10"], mask)
            base_level = mean_percent(results[base]["hr@10"], mask)
            if arm == base:
                line += f"{level:>{width}.1f}"
            else:
                line += f"{level - base_level:>+{width}.1f}"
        print(line)


# ------------------------------------------------------------------------------ command
# Nothing from here on concerns the method.


def parse_arm(arm: str, config: Config) -> tuple[str, float]:
    """RULE or RULE-WEIGHT -> name of the rule, weight. ValueError if it is neither."""
    rule_name, dash, text = arm.partition("-")
    weight = config.weight
    if dash:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan  # refused below
    if rule_name not in RULES or not 0 <= weight < math.inf:
        raise ValueError(f"{arm} is no RULE or RULE-WEIGHT of {', '.join(RULES)}")
    return rule_name, weight


def within(lowest: float, highest: float) -> Callable[[str], float]:
    """A type for argparse: a number in a range, an int if the bounds are."""
    int_or_float = type(lowest)

    def parse(text: str) -> float:
        value = int_or_float(text)
        if not lowest <= value <= highest:
            message = f"must be from {lowest} to {highest}, got {text}"
            raise argparse.ArgumentTypeError(message)
        return value

    parse.__name__ = "number"  # argparse says "invalid number value"
    return parse


def command_line(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The settings, and how to run: arms, jobs, device, quick, data.

    A bad option ends the program with a line that names it.
    """
    parser = argparse.ArgumentParser(
        description="AdaGRPO: GRPO from a biased ranker, gated sample by sample.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--arms", nargs="+", default=ARMS, help="RULE or RULE-WEIGHT; first: the base")
    add("--jobs", type=within(1, 1000), help="processes; without it, by the cores")
    devices = ("auto", "cpu", "cuda", "mps")
    add("--device", choices=devices, default="auto", help="auto: a GPU if there is one")
    add("--quick", action="store_true", help="a tiny shop; its figures mean nothing")
    add("--data", help="an .npz file of your own in place of the toy shop")

    # The settings: class Config holds the defaults and says more.
    add("--seed", type=within(0, 2**31), help="seed of everything random")
    add("--bias", type=within(0.0, 5.0), help="exposure bias of the toy shop's feed")
    add(
        "--negatives",
        type=within(0, 100),
        help="random items for the ranker, per slate",
    )
    add("--ranker-epochs", type=within(1, 1000), help="passes over the feed")
    add("--pretrain-epochs", type=within(1, 1000), help="passes in pre-training")
    add("--users", type=within(1, 10**6), help="users in the toy's post-training")
    add("--epochs", type=within(1, 1000), help="passes in post-training")
    add("--batch", type=within(1, 10**5), help="users per step (B)")
    add("--lr", type=within(0.0, 1.0), help="learning rate of post-training")
    add("--group", type=within(2, 1000), help="rollouts per user (G)")
    add("--decode", choices=("beam", "sample"), help="how groups are made")
    add("--weight", type=within(0.0, 1e6), help="weight of GRPO if the arm names none")
    add("--min-difficulty", type=within(0.0, 1.0), help="threshold of the gate")
    add("--min-discriminability", type=within(-1.0, 1.0), help="threshold of the gate")
    parser.set_defaults(**vars(Config()))

    options = parser.parse_args(argv)
    config = Config(**{name: vars(options)[name] for name in vars(Config())})
    for arm in options.arms:
        try:
            parse_arm(arm, config)
        except ValueError as error:
            parser.error(f"argument --arms: {error}")
    if options.quick and options.data:
        parser.error("argument --quick: it is a toy shop, which --data replaces")

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if options.device == "auto":
        options.device = available[0]
    if options.device not in available:
        parser.error(f"argument --device: {options.device} is not available here")

    if options.jobs is None:
        options.jobs = 1  # processes share a GPU badly, but a CPU well
        if options.device == "cpu":
            options.jobs = min(multiprocessing.cpu_count(), len(options.arms))
    options.jobs = min(options.jobs, 61)  # the most that Windows allows
    return config, options


def open_shop(config: Config, options: argparse.Namespace) -> Shop:
    """The toy shop, or the file of --data; a bad file ends the program with a line."""
    if options.data:
        try:
            return load_shop(options.data)
        except ValueError as error:
            sys.exit(f"adagrpo.py: argument --data: {error}")
    sizes = {"posttrain": config.users}
    if options.quick:
        sizes = QUICK_SIZES  # of everything, users too
    return make_shop(config.seed, config.bias, sizes)


def for_comparison(config: Config) -> Config:
    """The settings by which arms are compared: BEAMS beams, whatever the group was."""
    return replace(config, group=BEAMS, decode="beam")


def test_and_validate(
    policy: Policy, ranker: Ranker, shop: Shop, config: Config, label: str | None = None
) -> dict[str, np.ndarray]:
    """The metrics of the test users, and "validation hr@10" of the validation users."""
    beams = for_comparison(config)
    validation = evaluate(policy, ranker, shop.validation, beams, label)
    metrics = evaluate(policy, ranker, shop.test, beams, label)
    return metrics | {"validation hr@10": validation["hr@10"]}


def run_arm(
    shop: Shop, pretrained: Policy, ranker: Ranker, arm: str, config: Config
) -> dict[str, np.ndarray]:
    """Post-train a copy of the policy by one arm -> its metrics."""
    rule_name, weight = parse_arm(arm, config)
    rule = RULES[rule_name]
    policy = copy.deepcopy(pretrained)
    post_train(policy, ranker, shop.posttrain, rule, weight, config, label=arm)
    return test_and_validate(policy, ranker, shop, config)


QUICK_NOTICE = "--quick: a tiny shop and a short training. The figures mean nothing."
ONE_SEED = "This is one seed, a first look. Repeat it with --seed 1, 2, 3, ..."
ONE_TOY_SEED = """This is one seed, a first look: it says little. Ten seeds, with an
interval and a verdict for every claim, are in .github/RESULTS.md."""


def run(config: Config, options: argparse.Namespace, shop: Shop) -> None:
    """The whole experiment."""
    if options.quick:
        print(QUICK_NOTICE)

    tasks = [(pretrain, config), (train_ranker, config)]
    pretrained, ranker = side_by_side(options, [shop], tasks)
    print_premise(shop, pretrained, ranker, config)
    before = test_and_validate(pretrained, ranker, shop, config, "before post-training")
    print_examples(shop, pretrained, ranker, before, for_comparison(config))

    print(f"\nPost-training\n{training_header()}", flush=True)
    tasks = [(run_arm, arm, config) for arm in options.arms]
    metrics = side_by_side(options, [shop, pretrained, ranker], tasks)
    print_results(shop, before, dict(zip(options.arms, metrics, strict=True)))

    closing = ONE_TOY_SEED
    if options.data:
        closing = ONE_SEED
    if options.quick:
        closing = QUICK_NOTICE
    print(f"\n{closing}")


def side_by_side(options: argparse.Namespace, common: list, tasks: list[tuple]) -> list:
    """The results of tasks (function, argument, ...), in processes if there are
    several.

    Every function gets the `common` arguments first. A process is given these when it
    starts, so that tasks are small: one that is half sent when somebody presses Ctrl-C
    would block the exit.
    """
    if options.jobs == 1:
        return [function(*common, *arguments) for function, *arguments in tasks]

    spawn = multiprocessing.get_context("spawn")  # torch does not like to be forked
    setup = (options.device, *common)
    with ProcessPoolExecutor(options.jobs, spawn, start_process, setup) as pool:
        try:
            futures = [pool.submit(call, task) for task in tasks]
            # A pool notices the death of those workers that ran at its last submit. An
            # idle task more, and the last worker is among them.
            pool.submit(os.getpid)
            return [pickle.loads(future.result()) for future in futures]
        except BaseException:  # leaving `with` would wait for what is under way
            for process in multiprocessing.active_children():
                process.terminate()
            raise


common_of_process = []  # what all tasks of this process have in common


def call(task: tuple) -> bytes:
    """The result of a task, in bytes: torch would send handles to its own memory."""
    function, *arguments = task
    return pickle.dumps(function(*common_of_process, *arguments))


def start_process(device: str, *common) -> None:
    """Set up a process, main or worker: one thread (the tensors are tiny), the device.

    A worker also has to end at Ctrl-C, and when the process that started it is gone:
    else it would train on as an orphan.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is stopped
    if device != "cpu":
        torch.set_default_device(device)
    common_of_process[:] = common

    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def main(argv: list[str] | None = None) -> None:
    """The command `python adagrpo.py`. In a notebook: main(["--jobs", "1"])."""
    config, options = command_line(argv)
    start_process(options.device)
    run(config, options, open_shop(config, options))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        # The reader of our output has gone, as in `... | head`. Python will flush it
        # once more at the end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenProcessPool:
        sys.exit("adagrpo.py: a process died or could not start. Try --jobs 1.")
