# SPDX-License-Identifier: MIT
"""AdaGRPO in one file: reinforcement learning from a ranker that is not right everywhere.

A policy, a small GPT, writes the semantic ID of the item that a shopper buys next. A ranker,
a click model, scores what it wrote. The ranker is right about some samples and wrong about
others, because it learned only from what an old feed showed. AdaGRPO trains EVERY sample with
supervised NLL and admits the GRPO term sample by sample: only where the policy finds the
sample hard AND the ranker puts the true item above what the policy wrote instead.

  x is a history, y its target (the item that was bought next), r the ranker's score.

  (1) rollouts          a group o_1 .. o_G from policy(. | x), likeliest first
  (2) difficulty        d = share of the group that stands ahead of y; 1 if y is not in it
  (3) discriminability  m = r(y) - mean of r(o_i) over the negatives: valid o_i other than y
  (4) gate              g = 1 if d >= min_difficulty and m >= min_discriminability, else 0
  (5) advantages        A_i = (r(o_i) - mean r) / std r in the group; exactly 0 if r is flat
  (6) GRPO              -mean over i of min(ratio_i A_i, clip(ratio_i) A_i)
  (7) loss              mean over samples of NLL + weight * g * GRPO; NLL = -log policy(y | x)

Shapes: B samples, G rollouts in each group, L tokens per item, V tokens in the vocabulary,
T = H * L tokens in the prompt (a history of H items).

What is left out, and why:
  - a KL term: the NLL is the anchor;
  - several updates per rollout: so the ratio in (6) is 1, and its clipping never acts;
  - constrained decoding: it would hide hallucinations (IDs that name no item);
  - distributed training: the models are tiny.

The default group is not drawn at random: it holds the G likeliest items, found by beam
search. The GRPO term is then a listwise contrast between these and no unbiased policy
gradient; `--decode sample` draws the group instead.

Paper: Xu, Qi, Zou et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative
Recommendation", arXiv 2606.08480 (2026). Only its abstract was available: the idea is
theirs, the formulas are ours unless a source is named.
GRPO: Shao et al., DeepSeekMath, arXiv 2402.03300.
"""

import argparse
import copy
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import QUICK_SIZES, Shop, Split, load_shop, make_shop

# ------------------------------------------------------------------------------- policy


class Attention(nn.Module):
    """Multi-head self-attention that can also look at keys and values of earlier calls."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        return x.view(B, N, self.heads, D // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, past: tuple | None, mask: Tensor | None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        q = self.split_heads(q)  # (B, heads, N, D / heads)
        k = self.split_heads(k)
        v = self.split_heads(v)
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)

        # Without a mask the tokens are a sequence: each sees itself and those before it.
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

    def forward(self, x: Tensor, past: tuple | None, mask: Tensor | None):
        attended, keys_and_values = self.attention(self.norm1(x), past, mask)
        x = x + attended
        x = x + self.mlp(self.norm2(x))
        return x, keys_and_values


class Policy(nn.Module):
    """A small GPT over the tokens of semantic IDs. It is free to write IDs of no item.

    tokens (items, L) are the IDs of the catalogue, `history_length` is H. Vocabulary,
    positions and L follow from these. ValueError if two items share an ID.
    """

    def __init__(self, tokens: Tensor, history_length: int, width: int = 64):
        super().__init__()
        L = tokens.shape[1]
        vocabulary = int(tokens.max()) + 1

        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(L * (history_length + 1), width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

        # An ID read as a number in base V is its key. Sorted keys find the item of an ID.
        place_values = vocabulary ** torch.arange(L - 1, -1, -1)  # (L,)
        keys, order = (tokens * place_values).sum(-1).sort()
        self.register_buffer("tokens", tokens)
        self.register_buffer("place_values", place_values)
        self.register_buffer("sorted_keys", keys)
        self.register_buffer("item_of_key", order)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> log-probabilities of the token after each of them (B, N, V)."""
        position = torch.arange(tokens.shape[1])
        logp, _ = self.forward_with_cache(tokens, position)
        return logp

    def forward_with_cache(
        self,
        tokens: Tensor,
        position: Tensor,
        cache: list | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list]:
        """The same for tokens at any position, which also see the tokens in `cache`.

        With a mask (B, N, keys) the tokens are no sequence: it says what each one sees.
        Returns log-probabilities (B, N, V) and the cache for the next call.
        """
        if mask is not None:
            mask = mask[:, None]  # (B, 1, N, keys): the same for all heads

        x = self.embedding(tokens) + self.position(position)
        new_cache = []
        for layer, block in enumerate(self.blocks):
            past = None if cache is None else cache[layer]
            x, keys_and_values = block(x, past, mask)
            new_cache.append(keys_and_values)
        logits = self.head(self.norm(x))
        return logits.log_softmax(-1), new_cache

    def prompt(self, history: Tensor) -> Tensor:
        """Item numbers (B, H) -> their tokens in a row (B, T)."""
        return self.tokens[history].flatten(1)

    def items_of(self, tokens: Tensor) -> Tensor:
        """Semantic IDs (..., L) -> item numbers (...), -1 for a hallucination."""
        key = (tokens * self.place_values).sum(-1)
        place = torch.searchsorted(self.sorted_keys, key)
        place = place.clamp(max=len(self.sorted_keys) - 1)
        exists = self.sorted_keys[place] == key
        return torch.where(exists, self.item_of_key[place], -1)


def pretrain(shop: Shop, config: argparse.Namespace) -> Policy:
    """A policy trained by next-token NLL on last season's sequences of purchases."""
    torch.manual_seed(config.seed)
    split = shop.pretrain
    history_length = split.history.shape[1]
    policy = Policy(torch.as_tensor(shop.tokens), history_length)

    purchases = np.column_stack([split.history, split.target])
    sequences = policy.prompt(torch.as_tensor(purchases))  # (N, (H + 1) * L)

    def loss_of(rows: Tensor) -> Tensor:
        sequence = sequences[rows]
        logp = policy(sequence[:, :-1])  # (B, N, V)
        return F.nll_loss(logp.transpose(1, 2), sequence[:, 1:])

    batches = shuffled_batches(len(sequences), 128, config.pretrain_epochs)
    fit(policy, 1e-3, batches, loss_of, "policy, pre-training")
    return policy


# ------------------------------------------------------------------------------- ranker


class Ranker(nn.Module):
    """A click model: an MLP on the embeddings of user and item and on their product.

    The user is the mean embedding of the history: a bag. This ranker cannot see in which
    order things were bought.
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
        """history (B, H), items (B, K), both item numbers -> logits of a click (B, K)."""
        item = self.offered(items)  # (B, K, width)
        user = self.bought(history).mean(1, keepdim=True)  # (B, 1, width)
        user = user.expand_as(item)
        product = 10 * user * item  # numbers around 0.1: times 10, to be of equal size
        features = torch.cat([user, item, product], dim=-1)
        return self.mlp(features).squeeze(-1)

    def click_probability(self, history: Tensor, items: Tensor) -> Tensor:
        """The reward: P(click) in 0..1 (B, K)."""
        return self(history, items).sigmoid()


def train_ranker(shop: Shop, config: argparse.Namespace) -> Ranker:
    """A ranker trained by binary cross-entropy on what the feed showed and what was clicked.

    For every slate a few items are drawn from the catalogue and labelled "no click". Of
    what the feed never shows, the ranker learns from those alone, as in production.
    """
    torch.manual_seed(config.seed)
    items = len(shop.tokens)
    ranker = Ranker(items)
    history = torch.as_tensor(shop.feed_history)
    shown = torch.as_tensor(shop.shown)
    clicked = torch.as_tensor(shop.clicked).float()

    def loss_of(rows: Tensor) -> Tensor:
        random_items = torch.randint(items, (len(rows), config.negatives))
        offered = torch.cat([shown[rows], random_items], dim=1)  # (B, S + negatives)
        no_click = torch.zeros(random_items.shape)
        labels = torch.cat([clicked[rows], no_click], dim=1)
        logits = ranker(history[rows], offered)
        return F.binary_cross_entropy_with_logits(logits, labels)

    batches = shuffled_batches(len(shown), 512, config.ranker_epochs)
    fit(ranker, 6e-3, batches, loss_of, "ranker")
    return ranker


# ------------------------------------------------------ what all three trainings share


def shuffled_batches(samples: int, batch: int, epochs: int) -> tuple[Tensor, ...]:
    """Row numbers of every batch, for several passes in different orders."""
    passes = [torch.randperm(samples) for _ in range(epochs)]
    return torch.cat(passes).split(batch)


def make_optimizer(model: nn.Module, lr: float, steps: int):
    """AdamW with a warm-up of 20 steps and a linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / steps)
    )
    return optimizer, scheduler


def fit(
    model: nn.Module,
    lr: float,
    batches: tuple[Tensor, ...],
    loss_of: Callable[[Tensor], Tensor],
    label: str,
) -> None:
    """Plain supervised training, for the ranker and for pre-training."""
    optimizer, scheduler = make_optimizer(model, lr, len(batches))
    for rows in tqdm(batches, label, leave=False, disable=None):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()


# ------------------------------------------------------------------------------ rollout


def log_prob(policy: Policy, prompt: Tensor, item: Tensor) -> Tensor:
    """log policy(item | prompt): prompt (B, T), tokens of an item (B, L) -> (B,).

    It is the SUM over the item's tokens, here and everywhere in this file.
    """
    L = item.shape[1]
    sequence = torch.cat([prompt, item], dim=1)
    logp = policy(sequence[:, :-1])[
        :, -L:
    ]  # (B, L, V), one row for each token of the item
    return -F.nll_loss(logp.transpose(1, 2), item, reduction="none").sum(1)


def rollout(
    policy: Policy, prompt: Tensor, group: int, decode: str
) -> tuple[Tensor, Tensor]:
    """Eq. (1): a group of items for each prompt, likeliest first.

    prompt (B, T), decode "beam" or "sample" -> tokens (B, G, L), log-probabilities (B, G),
    with gradient. Nothing constrains the tokens: an ID may name no item.

    The prompt is encoded once. Each rollout is a branch that grows by one token per level
    and sees the prompt and its own tokens. All branches of a level go through the policy
    side by side, and a mask keeps them apart. With 3 branches, at the second level:

                        sees:  prompt   level 1   level 2
                               x x x     a b c     d e f
        d, which continues a   1 1 1     1 0 0     1 0 0
        e, which continues a   1 1 1     1 0 0     0 1 0
        f, which continues c   1 1 1     0 0 1     0 0 1
    """
    B, T = prompt.shape
    L = policy.tokens.shape[1]
    row = torch.arange(B)[:, None]

    # At first there is one branch, the root: it has written nothing and sees the prompt.
    logp, cache = policy.forward_with_cache(prompt, torch.arange(T))
    logp = logp[:, -1:]  # (B, 1, V): what may follow each branch
    total = torch.zeros(B, 1)  # log-probability of what each branch has written
    tokens = torch.zeros(B, 1, 0, dtype=torch.long)
    mask = torch.ones(B, 1, T, dtype=torch.bool)

    for level in range(L):
        # Which branches grow, and by which token. The choice has no gradient.
        with torch.no_grad():
            if decode == "beam":
                parent, token = beam(total, logp, group)  # (B, G) each
            else:
                parent, token = draw(logp, group)

        # Each chosen branch is its parent's tokens and one more.
        from_parent = parent[..., None].expand(-1, -1, logp.shape[2])
        step_logp = logp.gather(1, from_parent).gather(2, token[..., None])  # (B, G, 1)
        total = total.gather(1, parent) + step_logp.squeeze(2)  # (B, G)
        tokens = torch.cat([tokens[row, parent], token[..., None]], dim=2)

        # A branch sees what its parent saw, and itself.
        if level < L - 1:
            branches = token.shape[1]
            itself = torch.eye(branches, dtype=torch.bool).expand(B, -1, -1)
            mask = torch.cat([mask[row, parent], itself], dim=2)
            position = torch.tensor(T + level)
            logp, cache = policy.forward_with_cache(token, position, cache, mask)

    order = total.argsort(dim=1, descending=True)
    return tokens[row, order], total.gather(1, order)


def beam(total: Tensor, logp: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The likeliest continuations of all branches: total (B, Q), logp (B, Q, V).

    Returns the branch that each one continues and its next token, (B, G) both; fewer than G
    where there are not so many yet.
    """
    Q, V = logp.shape[1:]
    continuations = total[..., None] + logp  # (B, Q, V)
    best = continuations.flatten(1).topk(min(group, Q * V)).indices  # (B, G)
    return best // V, best % V


def draw(logp: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """G random tokens from the root, later one from every branch: as `beam`."""
    B, Q = logp.shape[:2]
    probability = logp.exp()
    if Q == 1:
        token = torch.multinomial(probability[:, 0], group, replacement=True)
        parent = torch.zeros_like(token)
    else:
        token = torch.multinomial(probability.flatten(0, 1), 1).view(B, Q)
        parent = torch.arange(Q).expand(B, -1)
    return parent, token


# ------------------------------------------- the method: gate, advantages, losses


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
    rollout_rewards: Tensor,  # (B, G) and of the rollouts, likeliest first
    hit: Tensor,  # (B, G) bool: the rollout is the true item
    valid: Tensor,  # (B, G) bool: the rollout names an item
    min_difficulty: float,  # in 0..1
    min_discriminability: float,  # in the unit of the rewards
) -> Gate:
    """Eq. (2)-(4): admit GRPO where the policy finds it hard and the ranker is clear.

    To copy it, take `Gate`, this function, `to_reals` and `to_mask`; they need torch alone.
    Scores may be probabilities or logits, in tensors, arrays or lists. The G columns stand
    in the policy's order; random draws that have none can put the misses first.

    Thresholds are inclusive, up to rounding. A sample stays out, with discriminability nan,
    if it has no valid negative, if the score of its target or of a valid negative is not
    finite, or if their mean overflows. Other scores are not looked at. There is no gradient.

    Raises TypeError or ValueError that names the argument. Source: the two diagnostics and
    the 0/1 gate are from the paper's abstract; the formulas are ours.
    """
    target_reward = to_reals("target_reward", target_reward)
    rollout_rewards = to_reals("rollout_rewards", rollout_rewards)
    hit = to_mask("hit", hit)
    valid = to_mask("valid", valid)

    shape = tuple(rollout_rewards.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"rollout_rewards must be (B, G) with G >= 2, got {shape}")
    if target_reward.shape != shape[:1]:
        given = tuple(target_reward.shape)
        raise ValueError(f"target_reward must be (B,) = {shape[:1]}, got {given}")
    if hit.shape != shape:
        raise ValueError(f"hit must be (B, G) = {shape}, got {tuple(hit.shape)}")
    if valid.shape != shape:
        raise ValueError(f"valid must be (B, G) = {shape}, got {tuple(valid.shape)}")
    if not 0 <= min_difficulty <= 1:
        raise ValueError(f"min_difficulty must be in 0..1, got {min_difficulty}")
    if not abs(min_discriminability) < float("inf"):
        raise ValueError(f"min_discriminability must be finite: {min_discriminability}")

    # eq. (2)   hit 0 0 1 0 -> cumsum 0 0 1 1 -> zeros, the rollouts ahead: 2 of 4
    ahead = hit.cumsum(1) == 0  # (B, G)
    difficulty = ahead.sum(1) / shape[1]  # (B,)

    # eq. (3)   no negative makes this 0 / 0, and what is not finite becomes nan
    negative = valid & ~hit  # (B, G)
    negative_sum = torch.where(negative, rollout_rewards, 0.0).sum(1)  # (B,)
    difference = target_reward - negative_sum / negative.sum(1)  # (B,)
    discriminability = torch.where(difference.isfinite(), difference, torch.nan)

    # eq. (4)   nan >= threshold is False
    hard = difficulty >= min_difficulty
    clear = discriminability >= min_discriminability
    return Gate(hard & clear, hard, clear, difficulty, discriminability)


def to_reals(name: str, value: Tensor) -> Tensor:
    """Numbers of any real type -> tensor of float32, or of float64 if they are that."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        given = type(value).__name__
        raise TypeError(f"{name} must be a tensor of numbers, got {given}") from error
    if tensor.is_complex():
        raise TypeError(f"{name} must be real numbers, got {tensor.dtype}")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def to_mask(name: str, value: Tensor) -> Tensor:
    """Booleans -> bool tensor. Numbers are refused: they may be something else by mistake."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        given = type(value).__name__
        raise TypeError(f"{name} must be a tensor of bool, got {given}") from error
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {tensor.dtype}")
    return tensor


def with_floor(scores: Tensor, valid: Tensor, floor: float = 0.0) -> Tensor:
    """Rewards (B, G): the score, but `floor` for a hallucination, and never less than it.

    0 is the floor of probabilities. Scores that can be negative, such as logits, need a
    floor of their own: an invalid ID must not get a better reward than a bad item.
    """
    return torch.where(valid, scores.clamp(min=floor), floor)


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. (5): rewards (B, G) of any real type -> standardised in each group (B, G).

    A flat group gets exactly 0: all rewards equal, at any level, up to rounding (4 units in
    the last place of the largest). So does a group with a reward that is not finite. A
    small spread counts like a large one: the advantages do not depend on the rewards' unit.
    No gradient flows. Computed in float32 or better. Raises TypeError or ValueError.
    Source: GRPO, with the population standard deviation; the care for flat groups is ours.
    """
    rewards = to_reals("rewards", rewards).detach()
    shape = tuple(rewards.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G >= 2, got {shape}")

    lowest = rewards.amin(1, keepdim=True)  # (B, 1), nan if there is a nan
    highest = rewards.amax(1, keepdim=True)
    spread = highest - lowest

    # Rewards on a scale of their own, 0..1, cannot overflow or drown in rounding.
    scaled = (rewards - lowest) / spread  # (B, G)
    centred = scaled - scaled.mean(1, keepdim=True)
    advantages = centred / scaled.std(1, correction=0, keepdim=True)

    largest = torch.maximum(lowest.abs(), highest.abs())
    rounding = 4 * torch.finfo(rewards.dtype).eps * largest
    is_spread = (spread > rounding) & spread.isfinite()  # False if there is a nan
    return torch.where(is_spread, advantages, 0.0)


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2
) -> Tensor:
    """Eq. (6): the clipped surrogate of each sample; three tensors (B, G) -> (B,).

    logp and old_logp are log-probabilities of whole items: SUMS over an item's tokens. With
    token log-probabilities (B * G, L) sum over L and reshape to (B, G) first.

    With one update per rollout old_logp is logp.detach(). Every ratio is then 1 and the
    loss is -mean(A) = 0; its gradient, -mean(A_i * grad logp_i), is not.

    The loss of a sample with a log-probability that is not finite is nan, and its gradient
    is 0, so that `adagrpo_loss` can drop it. Computed in float32 or better. Raises TypeError
    or ValueError. Source: GRPO, without its KL term, and with one ratio per item.
    """
    logp = to_reals("logp", logp)
    old_logp = to_reals("old_logp", old_logp)
    advantages = to_reals("advantages", advantages)
    shape = tuple(logp.shape)
    if len(shape) != 2:
        raise ValueError(f"logp must be (B, G), one sum for each item, got {shape}")
    if old_logp.shape != shape:
        given = tuple(old_logp.shape)
        raise ValueError(f"old_logp must be (B, G) = {shape} like logp, got {given}")
    if advantages.shape != shape:
        given = tuple(advantages.shape)
        raise ValueError(f"advantages must be (B, G) = {shape} like logp, got {given}")

    log_ratio = logp - old_logp  # (B, G)
    is_usable = log_ratio.detach().exp().isfinite()
    ratio = torch.where(is_usable, log_ratio, 0.0).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    return -torch.where(is_usable, surrogate, torch.nan).mean(1)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): NLL of every sample, GRPO of the admitted ones; three (B,) -> a scalar.

    The sum is divided by B and not by the number admitted: the dose of GRPO is weight *
    admission rate. NLL is the SUM over the item's L tokens. In a trainer that averages over
    tokens, the same weight is L times as strong.

    A sample that is not admitted adds nothing of its GRPO term, not even a nan. No samples:
    0. Raises TypeError or ValueError. Source: the form is the paper's (abstract), the
    weight and the denominator are ours.
    """
    nll = to_reals("nll", nll)
    grpo = to_reals("grpo", grpo)
    admit = to_mask("admit", admit)
    shape = tuple(nll.shape)
    if len(shape) != 1:
        raise ValueError(f"nll must be (B,), got {shape}")
    if grpo.shape != shape:
        raise ValueError(f"grpo must be (B,) = {shape}, got {tuple(grpo.shape)}")
    if admit.shape != shape:
        raise ValueError(f"admit must be (B,) = {shape}, got {tuple(admit.shape)}")

    gated = torch.where(admit, grpo, 0.0)
    return (nll + weight * gated).sum() / max(len(nll), 1)


# ------------------------------------------------------- one look, and the training loop


class Look(NamedTuple):
    """What the policy wrote for B samples, and what the ranker and the gate say of it."""

    tokens: Tensor  # (B, G, L) the group, likeliest first
    logp: Tensor  # (B, G) its log-probabilities, with gradient
    items: Tensor  # (B, G) item numbers, -1 for a hallucination
    rewards: Tensor  # (B, G)
    target_reward: Tensor  # (B,)
    gate: Gate


def look(
    policy: Policy,
    ranker: Ranker,
    history: Tensor,  # (B, H) item numbers
    target: Tensor,  # (B,) item numbers
    config: argparse.Namespace,
) -> Look:
    """Eq. (1)-(4): roll out, score, and ask the gate."""
    prompt = policy.prompt(history)
    tokens, logp = rollout(policy, prompt, config.group, config.decode)  # eq. (1)
    items = policy.items_of(tokens)  # (B, G)
    valid = items >= 0
    hit = items == target[:, None]

    with torch.no_grad():  # the ranker is not trained here
        scores = ranker.click_probability(history, items.clamp(min=0))
        rewards = with_floor(scores, valid)  # (B, G)
        target_reward = ranker.click_probability(history, target[:, None]).squeeze(1)

    gate = adagrpo_gate(  # eq. (2)-(4)
        target_reward,
        rewards,
        hit,
        valid,
        min_difficulty=config.min_difficulty,
        min_discriminability=config.min_discriminability,
    )
    return Look(tokens, logp, items, rewards, target_reward, gate)


# A rule says which samples of a batch get the GRPO term: (B,) bool. It is given the look and
# the samples' row numbers in the post-training split. "nll" has none: it never rolls out.
RULES = {
    "nll": None,
    "mix": lambda seen, rows: torch.ones_like(
        seen.gate.admit
    ),  # no gate: fixed mixture
    "difficulty": lambda seen, rows: seen.gate.hard,  # half of the gate
    "discriminability": lambda seen, rows: seen.gate.clear,  # the other half
    "adagrpo": lambda seen, rows: seen.gate.admit,
}


def post_train(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    rule: Callable[[Look, Tensor], Tensor] | None,  # see RULES
    weight: float,
    config: argparse.Namespace,
    label: str = "",
    report: Callable[[str], None] = print,
    advantages_of: Callable[[Tensor], Tensor] = group_advantages,
) -> None:
    """The training loop. It changes `policy`, and reports a line every 100 steps."""
    torch.manual_seed(config.seed)
    all_histories = torch.as_tensor(split.history)
    all_targets = torch.as_tensor(split.target)
    batches = shuffled_batches(len(all_targets), config.batch, config.epochs)
    optimizer, scheduler = make_optimizer(policy, config.lr, len(batches))

    recent = []  # figures of the steps since the last report
    started = time.perf_counter()
    for step, rows in enumerate(batches, start=1):
        history = all_histories[rows]  # (B, H)
        target = all_targets[rows]  # (B,)

        # Every sample is supervised.
        nll = -log_prob(policy, policy.prompt(history), policy.tokens[target])  # (B,)

        if rule is None:
            loss = nll.mean()
            recent.append(nll.mean().detach()[None])
        else:
            # The GRPO term joins where the rule admits it.
            seen = look(policy, ranker, history, target, config)  # eq. (1)-(4)
            admit = rule(seen, rows)  # (B,)
            advantages = advantages_of(seen.rewards)  # (B, G)  eq. (5)
            grpo = grpo_loss(seen.logp, seen.logp.detach(), advantages)  # (B,)  eq. (6)
            loss = adagrpo_loss(nll, grpo, admit, weight)  # eq. (7)

            is_easy = ~seen.gate.hard
            is_unclear = seen.gate.hard & ~seen.gate.clear
            shares = torch.stack([is_easy, is_unclear, admit]).float().mean(1)
            means = torch.stack([nll.detach().mean(), seen.rewards.mean()])
            recent.append(torch.cat([means, shares]))

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()

        if step % 100 == 0 or step == len(batches):
            figures = torch.stack(recent).mean(0).tolist()
            speed = len(recent) / (time.perf_counter() - started)
            report(training_line(label, step, figures, speed))
            recent = []
            started = time.perf_counter()


TRAINING_HEADER = (
    f"{'arm':<20}{'step':>6}{'nll':>8}{'reward':>9}"
    f"{'easy %':>9}{'unclear %':>11}{'admitted %':>12}{'steps/s':>9}"
)


def training_line(label: str, step: int, figures: list[float], speed: float) -> str:
    """Means over the last 100 steps; `reward` is the mean over all rollouts."""
    line = f"{label:<20}{step:>6}{figures[0]:>8.2f}"
    if len(figures) > 1:
        _, reward, easy, unclear, admitted = figures
        line += f"{reward:>9.3f}{100 * easy:>9.0f}{100 * unclear:>11.0f}"
        line += f"{100 * admitted:>12.0f}"
    else:
        line += " " * 41  # NLL alone never asks the ranker
    return line + f"{speed:>9.0f}"


# --------------------------------------------------------------------------- evaluation

BEAMS = 32  # of every final list, whatever the group in training was
RERANKED = 64  # likeliest items that the ranker may reorder, see `rerank`


@torch.no_grad()
def evaluate(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    config: argparse.Namespace,
    group: int = BEAMS,
    decode: str = "beam",
    label: str | None = None,  # of a progress bar
) -> dict[str, np.ndarray]:
    """Figures of every shopper in a split, (N,) each; the shares are in 0..1.

    hr@k              1 if the target is among the k likeliest beams, else 0
    ndcg@10           1 / log2(1 + rank of the target), 0 below rank 10
    hallucination     share of the 10 likeliest beams that name no item
    difficulty, discriminability, hard, clear, admit     the gate's fields
    auc               share of 100 random items that the ranker scores below the target
    auc in group      share of the group's valid negatives that it scores below the target
    list              (N, 10) items of the 10 likeliest beams, -1 for a hallucination
    """
    torch.manual_seed(config.seed)  # the same random items for every policy
    settings = argparse.Namespace(**{**vars(config), "group": group, "decode": decode})
    discount = 1 / torch.log2(torch.arange(2, 12))  # (10,) of ranks 1 to 10
    parts = []
    starts = range(0, len(split.target), 128)
    for start in tqdm(starts, label, leave=False, disable=quiet_unless(label)):
        history = torch.as_tensor(split.history[start : start + 128])
        target = torch.as_tensor(split.target[start : start + 128])
        seen = look(policy, ranker, history, target, settings)
        top = seen.items[:, :10]
        hit = (seen.items == target[:, None]).float()  # (B, G)

        random_items = torch.randint(len(policy.tokens), (len(target), 100))
        others = ranker.click_probability(history, random_items)
        is_below = others < seen.target_reward[:, None]  # (B, 100)

        negative = (seen.items >= 0) & (seen.items != target[:, None])
        beaten = negative & (seen.rewards < seen.target_reward[:, None])  # (B, G)

        part = {
            "hr@10": hit[:, :10].amax(1),
            "hr@5": hit[:, :5].amax(1),
            "hr@20": hit[:, :20].amax(1),
            "ndcg@10": (hit[:, :10] * discount[: hit.shape[1]]).amax(1),
            "hallucination": (top < 0).float().mean(1),
            "auc": is_below.float().mean(1),
            "auc in group": beaten.sum(1) / negative.sum(1),
            "list": top,
            **seen.gate._asdict(),
        }
        parts.append(part)
    return join(parts)


@torch.no_grad()
def rerank(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    label: str | None = None,
) -> dict[str, np.ndarray]:
    """Has the ranker anything to teach? The policy's 64 likeliest items, in both orders.

    Returns (N,) of 0 and 1: "hr@10" by the policy's order and "reranked" by the ranker's.
    """
    parts = []
    starts = range(0, len(split.target), 128)
    for start in tqdm(starts, label, leave=False, disable=quiet_unless(label)):
        history = torch.as_tensor(split.history[start : start + 128])
        target = torch.as_tensor(split.target[start : start + 128])
        tokens, _ = rollout(policy, policy.prompt(history), RERANKED, "beam")
        items = policy.items_of(tokens)  # (B, 64)
        scores = ranker.click_probability(history, items.clamp(min=0))
        rewards = with_floor(scores, items >= 0)

        best = rewards.topk(10).indices  # (B, 10)
        reranked = items.gather(1, best)
        part = {
            "hr@10": (items[:, :10] == target[:, None]).any(1).float(),
            "reranked": (reranked == target[:, None]).any(1).float(),
        }
        parts.append(part)
    return join(parts)


def quiet_unless(label: str | None) -> bool | None:
    """For tqdm's `disable`: no bar without a label, and none where nobody watches (None)."""
    if label is None:
        return True
    return None


def join(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Batches of figures -> one array for each figure."""
    joined = {}
    for name in parts[0]:
        column = [part[name] for part in parts]
        joined[name] = torch.cat(column).cpu().numpy()
    return joined


# ------------------------------------------------------------------------------ printing


def by_kind(split: Split, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Masks (N,) over the shoppers of a split: all of them, and each kind."""
    masks = {"all": np.ones(len(split.target), dtype=bool)}
    for number, name in enumerate(kinds):
        masks[name] = split.kind == number
    return masks


def by_cell(before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks (N,): the four cells of hard / easy and clear / unclear."""
    hard = before["hard"]
    clear = before["clear"]
    return {
        "hard+clear": hard & clear,
        "hard+unclear": hard & ~clear,
        "easy+clear": ~hard & clear,
        "easy+unclear": ~hard & ~clear,
    }


def mean_percent(figures: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the figures under the mask in percent; nan where there are none."""
    if not mask.any():
        return float("nan")
    return 100 * float(np.nanmean(figures[mask]))


def first_of(split: Split, most: int) -> Split:
    """At most so many shoppers, evenly spaced over the split."""
    size = len(split.target)
    rows = np.linspace(0, size - 1, min(size, most)).astype(int)
    return Split(split.history[rows], split.target[rows], split.kind[rows])


def print_premise(
    shop: Shop, policy: Policy, ranker: Ranker, config: argparse.Namespace
) -> None:
    """What can be known before any post-training: could the ranker teach, and whom?"""
    validation = first_of(shop.validation, 3000)
    gate_settings = {"group": config.group, "decode": config.decode}
    saw = evaluate(policy, ranker, validation, config, **gate_settings, label="premise")
    orders = rerank(policy, ranker, validation, label="re-ranking")

    print("\nBefore post-training, percent (validation users). re-ranked: HR@10 of the")
    print(
        f"policy's {RERANKED} likeliest items in the ranker's order. No rise, no gain."
    )
    print(
        f"{'':<16}{'share':>7}{'HR@10':>8}{'re-ranked':>11}{'AUC':>7}"
        f"{'AUC in group':>14}{'hard':>7}{'clear':>7}{'admitted':>10}"
    )
    for name, mask in by_kind(validation, shop.kinds).items():
        print(
            f"{name:<16}"
            f"{100 * mask.mean():>7.1f}"
            f"{mean_percent(orders['hr@10'], mask):>8.1f}"
            f"{mean_percent(orders['reranked'], mask):>11.1f}"
            f"{mean_percent(saw['auc'], mask):>7.1f}"
            f"{mean_percent(saw['auc in group'], mask):>14.1f}"
            f"{mean_percent(saw['hard'], mask):>7.1f}"
            f"{mean_percent(saw['clear'], mask):>7.1f}"
            f"{mean_percent(saw['admit'], mask):>10.1f}"
        )

    # The ranker's log must not hold the post-training targets: that would be a leak.
    posttrain = first_of(shop.posttrain, 3000)
    trained = evaluate(
        policy, ranker, posttrain, config, **gate_settings, label="premise"
    )
    print("\nThe ranker on post-training users and on validation users, percent")
    for name in ("auc", "clear"):
        a = 100 * trained[name].mean()
        b = 100 * saw[name].mean()
        print(f"{name:<16}{a:>7.1f}{b:>8.1f}")
        if is_clearly_higher(trained[name], saw[name]):
            print(
                f"WARNING: {name} is higher on post-training users. Does the log that"
            )
            print(
                "the ranker learned from hold their targets? That is a leak: remove them."
            )

    print("\nQuantiles over validation users, to choose thresholds from")
    shares = (0.1, 0.25, 0.5, 0.75, 0.9)
    print(f"{'':<18}" + "".join(f"{share:>9.0%}" for share in shares))
    for name in ("difficulty", "discriminability"):
        quantiles = np.nanquantile(saw[name], shares)
        print(f"{name:<18}" + "".join(f"{value:>9.3f}" for value in quantiles))


def is_clearly_higher(a: np.ndarray, b: np.ndarray) -> bool:
    """Is the mean share in `a` above that in `b` by 2 points and by 3 standard errors?"""
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    return bool(a.mean() - b.mean() > max(0.02, 3 * error))


def print_examples(
    shop: Shop,
    policy: Policy,
    ranker: Ranker,
    before: dict[str, np.ndarray],
    config: argparse.Namespace,
) -> None:
    """What the gate saw: a test user whom it admits, an easy one, and an unclear one."""
    fates = {
        "admitted": before["admit"],
        "refused, easy": ~before["hard"],
        "refused, not clear": before["hard"] & ~before["clear"],
    }
    print("\nWhat the gate saw: the five likeliest of the group, three test users")
    for fate, is_fate in fates.items():
        # The kind of shopper to whom this happens most, and the first one of it.
        masks = by_kind(shop.test, shop.kinds)
        kind = max(
            masks, key=lambda name: np.nan_to_num(mean_percent(is_fate, masks[name]))
        )
        users = np.flatnonzero(is_fate & masks[kind])
        if len(users) > 0:
            print(f"{kind} shopper: {fate}")
            print_group(shop.test, users[0], policy, ranker, config)


@torch.no_grad()
def print_group(
    split: Split,
    user: int,
    policy: Policy,
    ranker: Ranker,
    config: argparse.Namespace,
) -> None:
    history = torch.as_tensor(split.history[user : user + 1])
    target = torch.as_tensor(split.target[user : user + 1])
    settings = argparse.Namespace(**{**vars(config), "group": BEAMS, "decode": "beam"})
    seen = look(policy, ranker, history, target, settings)
    advantages = group_advantages(seen.rewards)

    bought = policy.tokens[history[0, -3:]]
    print(row_of("  last bought", [name_of(item) for item in bought]))
    print(row_of("  rollouts o_i", [name_of(item) for item in seen.tokens[0, :5]]))
    print(row_of("    policy", [f"{p:.3f}" for p in seen.logp[0, :5].exp()]))
    print(row_of("    reward", [f"{r:.3f}" for r in seen.rewards[0, :5]]))
    print(row_of("    advantage", [f"{a:+.2f}" for a in advantages[0, :5]]))
    print(
        f"  target y = {name_of(policy.tokens[target[0]])}:"
        f" r(y) {seen.target_reward[0]:.3f}, difficulty {seen.gate.difficulty[0]:.2f},"
        f" discriminability {seen.gate.discriminability[0]:+.3f}"
    )


def name_of(tokens: Tensor) -> str:
    return "-".join(str(token) for token in tokens.tolist())


def row_of(name: str, cells: list[str]) -> str:
    return f"{name:<18}" + "".join(f"{cell:>13}" for cell in cells)


def print_results(
    shop: Shop,
    before: dict[str, np.ndarray],
    results: dict[str, dict[str, np.ndarray]],
) -> None:
    """Two tables: the arms by metric, and by kind of shopper and cell."""
    metrics = ("hr@10", "hr@5", "hr@20", "ndcg@10", "hallucination")
    rows = {"before post-training": before, **results}
    everybody = np.ones(len(shop.test.target), dtype=bool)
    print(f"\nResults, percent ({len(everybody)} test users)")
    print(f"{'arm':<22}" + "".join(f"{name:>15}" for name in metrics))
    for name, figures in rows.items():
        levels = [mean_percent(figures[metric], everybody) for metric in metrics]
        print(f"{name:<22}" + "".join(f"{level:>15.2f}" for level in levels))

    base = next(iter(results))
    masks = {**by_kind(shop.test, shop.kinds), **by_cell(before)}
    print(f"\nHR@10: level of {base}, points against {base}; cells by the gate before")
    print(f"{'arm':<18}" + "".join(f"{name:>{width_of(name)}}" for name in masks))
    for arm, figures in results.items():
        line = f"{arm:<18}"
        for name, mask in masks.items():
            value = mean_percent(figures["hr@10"], mask)
            if arm == base:
                line += f"{value:>{width_of(name)}.1f}"
            else:
                value -= mean_percent(results[base]["hr@10"], mask)
                line += f"{value:>+{width_of(name)}.1f}"
        print(line)


def width_of(name: str) -> int:
    return max(7, len(name) + 1)


# ------------------------------------------------------------------------------- command

ARMS = ["nll", "mix-0.3", "mix-1", "difficulty", "discriminability", "adagrpo"]


def parse_arm(arm: str, config: argparse.Namespace) -> tuple[str, float]:
    """RULE or RULE-WEIGHT -> rule and weight. ValueError if it is neither."""
    rule, dash, number = arm.partition("-")
    weight = float(number) if dash else config.weight
    if rule not in RULES or not 0 <= weight < float("inf"):
        raise ValueError(f"no such arm: {arm}")
    return rule, weight


def number(kind: type, lowest: float, highest: float) -> Callable[[str], float]:
    """A type for argparse: a number in a range."""

    def parse(text: str) -> float:
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"must be from {lowest} to {highest}, got {text}"
            )
        return value

    return parse


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. A bad setting ends it with a line that names the setting."""
    parser = argparse.ArgumentParser(
        description="AdaGRPO: GRPO from a biased ranker, gated sample by sample.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    several = number(int, 1, 10**6)

    add("--arms", nargs="+", default=ARMS, help="RULE or RULE-WEIGHT, as in mix-0.3")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of shop, weights, draws")
    add(
        "--jobs", type=several, help="processes side by side; 1 needs no process at all"
    )
    add(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where"
    )
    add("--quick", action="store_true", help="a tiny shop: its figures mean nothing")
    add("--data", help="an .npz file of your own in place of the toy shop")

    add(
        "--bias",
        type=number(float, 0, 5),
        default=1.0,
        help="exposure bias of the feed",
    )
    add(
        "--negatives", type=number(int, 0, 100), default=2, help="random ones per slate"
    )
    add("--pretrain-epochs", type=several, default=4, help="passes in pre-training")
    add(
        "--ranker-epochs",
        type=several,
        default=3,
        help="passes of the ranker's training",
    )

    add("--epochs", type=several, default=4, help="passes in post-training")
    add(
        "--users",
        type=several,
        default=1600,
        help="post-training users of the toy shop",
    )
    add("--batch", type=several, default=8, help="users per step (B)")
    add("--group", type=number(int, 2, 1000), default=32, help="rollouts per user (G)")
    add("--decode", choices=("beam", "sample"), default="beam", help="how to roll out")
    add("--weight", type=number(float, 0, 1e6), default=5.0, help="of GRPO beside NLL")
    add("--lr", type=number(float, 0, 1), default=1e-3, help="learning rate")
    add(
        "--min-difficulty",
        type=number(float, 0, 1),
        default=0.3,
        help="gate: share of the group ahead of the target",
    )
    add(
        "--min-discriminability",
        type=number(float, -1, 1),
        default=0.01,
        help="gate: reward of the target over its negatives' mean",
    )
    config = parser.parse_args(argv)
    for arm in config.arms:
        try:
            parse_arm(arm, config)
        except ValueError:
            rules = ", ".join(RULES)
            parser.error(
                f"argument --arms: {arm} is no RULE or RULE-WEIGHT of: {rules}"
            )

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if config.device == "auto":
        config.device = available[0]
    if config.device not in available:
        parser.error(f"argument --device: {config.device} is not available here")

    if config.jobs is None:
        # Processes share a CPU well, and a GPU badly.
        cores = multiprocessing.cpu_count()
        config.jobs = min(cores, len(config.arms)) if config.device == "cpu" else 1
    config.jobs = min(config.jobs, 61)  # the most that Windows allows
    return config


def start_process(device: str) -> None:
    """What every process does first."""
    torch.set_num_threads(1)  # the tensors are tiny: processes use the cores better
    if device != "cpu":
        torch.set_default_device(device)

    # A worker ends at Ctrl-C, and when the process that started it is gone.
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def call(task: tuple) -> object:
    """(function, argument, argument, ...) -> its result."""
    function, *arguments = task
    return function(*arguments)


def run_arm(
    arm: str,
    shop: Shop,
    start: Policy,
    ranker: Ranker,
    config: argparse.Namespace,
) -> dict[str, np.ndarray]:
    """Post-train a copy of the policy by one arm -> its figures on the test users."""
    rule, weight = parse_arm(arm, config)
    policy = copy.deepcopy(start)

    def report(line: str) -> None:
        print(line, flush=True)

    post_train(policy, ranker, shop.posttrain, RULES[rule], weight, config, arm, report)
    return evaluate(policy, ranker, shop.test, config)


def run(config: argparse.Namespace, side_by_side: Callable[..., Iterable]) -> None:
    """The whole experiment. `side_by_side` is `map`, or that of a pool of processes."""
    if config.data:
        shop = load_shop(config.data)
    else:
        sizes = dict(QUICK_SIZES) if config.quick else {"posttrain": config.users}
        shop = make_shop(config.seed, config.bias, sizes)

    start, ranker = side_by_side(
        call, [(pretrain, shop, config), (train_ranker, shop, config)]
    )
    print_premise(shop, start, ranker, config)
    before = evaluate(start, ranker, shop.test, config, label="before post-training")
    print_examples(shop, start, ranker, before, config)

    print(f"\nPost-training\n{TRAINING_HEADER}", flush=True)
    tasks = [(run_arm, arm, shop, start, ranker, config) for arm in config.arms]
    results = dict(zip(config.arms, side_by_side(call, tasks), strict=True))
    print_results(shop, before, results)

    if config.quick:
        print(
            "\n--quick: a tiny shop and a short training. These figures mean nothing."
        )
    elif config.data:
        print("\nThis is one seed, a first look: repeat it with --seed 1, 2, 3, ...")
    else:
        print(
            "\nThis is one seed, a first look. Ten seeds, with intervals and every claim"
        )
        print("decided, are in .github/RESULTS.md.")


def main(argv: list[str] | None = None) -> None:
    """The command `python adagrpo.py`. In a notebook: `main(["--jobs", "1"])`."""
    config = settings(argv)
    start_process(config.device)
    if config.jobs == 1:
        run(config, map)
        return

    context = multiprocessing.get_context("spawn")  # a GPU does not survive a fork
    pool = ProcessPoolExecutor(
        config.jobs, context, initializer=start_process, initargs=(config.device,)
    )
    with pool:
        try:
            run(config, pool.map)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenProcessPool:
        sys.exit("adagrpo.py: a process has ended, for lack of memory? Try --jobs 1.")
