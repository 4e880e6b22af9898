# SPDX-License-Identifier: MIT
"""AdaGRPO in one file: reinforcement learning from a ranker that is not always right.

A policy, a small GPT, writes the semantic ID of the item that a user buys next: L
tokens, from the coarse category to the single item. A ranker, a model of clicks, scores
what it wrote. The ranker is right about some users and wrong about others, because it
learned from clicks on a feed, where the shop decides what is shown. AdaGRPO trains on
EVERY sample with supervised NLL and admits the GRPO term sample by sample: only where
the policy finds the sample hard AND the ranker puts the true item above the average of
what the policy wrote instead.

A sample is one user: a history x, and a target y, the true item, which was bought next.
An ID that names no item is a hallucination. r is the reward of an ID: the ranker's
score of the item, or 0 for a hallucination. The idea is the paper's; we could read only
its abstract, so the formulas of the gate are ours.

  (1) rollouts          the group: the G likeliest IDs o_1 .. o_G that beam search finds
                        for x, except what the user has already bought
  (2) difficulty        d = share of the group that is likelier than y; 1 if y is absent
  (3) discriminability  m = r(y) - mean r over the negatives, the IDs in the group that
                        name an item other than y
  (4) gate              g = 1 if d >= min_difficulty and m >= min_discriminability,
                        else 0; 0 if there are no negatives
  (5) advantages        A_i = (r(o_i) - mean r) / std r over the whole group; exactly 0
                        if all r are equal
  (6) GRPO              -mean over i of min(ratio_i A_i, clip(ratio_i) A_i); ratio_i is
                        policy(o_i | x) over its value at the rollout, clip to 1 +- 0.2
  (7) loss              mean over samples of NLL + weight * g * GRPO, where
                        NLL = -log policy(y | x)

The group is not drawn: GRPO compares these IDs with each other, and its term is no
unbiased estimate of the policy gradient. A hallucination counts in (2) and (5), so that
GRPO pushes it down; (3) leaves it out, because its 0 would lower the mean and raise m.
Left out of this file: a KL term (the NLL is the anchor), several updates per rollout,
and constrained decoding (it would hide hallucinations).

Shapes: B samples, G rollouts in each group, L tokens per item, V tokens in the
vocabulary; K items in a history, the policy reads the last H: a prompt of T = H * L.

Paper: Xu, Qi, Zou et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative
Recommendation", arXiv 2606.08480 (2026). GRPO: DeepSeekMath, arXiv 2402.03300.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import Shop, Split, make_shop

# ------------------------------------------------ the method: gate, advantages, losses


class Gate(NamedTuple):
    """What `adagrpo_gate` says of each sample; (B,) each."""

    admit: Tensor  # bool: hard and clear, that is:
    hard: Tensor  # bool: the difficulty reaches its threshold
    clear: Tensor  # bool: the discriminability reaches its threshold
    difficulty: Tensor  # in 0..1
    discriminability: Tensor  # in the unit of the rewards; nan where it is undefined


@torch.no_grad()
def adagrpo_gate(
    *,
    target_reward: Tensor,  # (B,) the ranker's score of the true item
    rollout_rewards: Tensor,  # (B, G) the ranker's scores of the rollouts
    hit: Tensor,  # (B, G) bool: the rollout is the true item
    valid: Tensor,  # (B, G) bool: the rollout names an item
    min_difficulty: float,  # in 0..1
    min_discriminability: float,  # in the unit of the rewards
    ranked: bool,  # the columns are sorted, likeliest first
) -> Gate:
    """Eq. (2)-(4): admit GRPO where the policy finds it hard and the ranker is clear.

    How to choose the thresholds: min_difficulty = k / G means "not among the first k";
    min_discriminability is about a tenth of the scores' std in a group. Draws have no
    order: with ranked=False the difficulty is the share of misses, so that for 8 draws
    0.9 means "no hit". A score of target or negative that is nan or infinite closes the
    gate. Source: the paper's two diagnostics and 0/1 gate; the formulas are ours.
    """
    shapes = [tuple(x.shape) for x in (target_reward, rollout_rewards, hit, valid)]
    group = shapes[1]  # (B, G)
    if len(group) != 2 or shapes != [group[:1], group, group, group]:
        raise ValueError(f"expected target_reward (B,), the others (B, G): {shapes}")
    if hit.dtype != torch.bool or valid.dtype != torch.bool:
        raise TypeError(f"hit, valid must be bool, got {hit.dtype}, {valid.dtype}")

    # hit 0 0 1 0 -> cumsum 0 0 1 1. While it is 0, rollouts stand ahead of y: 2 of 4.
    # Without an order all misses count: 3 of 4.
    is_ahead = ~hit  # (B, G)
    if ranked:
        is_ahead = hit.cumsum(1) == 0
    difficulty = is_ahead.float().mean(1)  # (B,)  eq. (2)

    negative = valid & ~hit  # (B, G)
    negative_sum = torch.where(negative, rollout_rewards.float(), 0.0).sum(1)  # (B,)
    negative_mean = negative_sum / negative.sum(1)  # nan (0 / 0) without a negative
    discriminability = target_reward.float() - negative_mean  # (B,)  eq. (3)

    hard = difficulty >= min_difficulty
    clear = (discriminability >= min_discriminability) & discriminability.isfinite()
    admit = hard & clear  # (B,)  eq. (4)
    return Gate(admit, hard, clear, difficulty, discriminability)


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. (5): rewards (B, G) -> standardised in each group (B, G), without gradient.

    A group that is flat up to rounding gets exactly 0, and so does one with a reward
    that is not finite. If scores can be negative, a hallucination has to score below
    every item: by one std of the scores, say. Source: GRPO; flat groups are ours.
    """
    rewards = rewards.detach().float()
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, correction=0, keepdim=True)
    # Not centred / (std + eps): in a flat group that turns rounding into advantages.
    has_spread = std > 1e-6 * rewards.abs().amax(1, keepdim=True)  # False for nan
    return torch.where(has_spread, centred / std, 0.0)


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2
) -> Tensor:
    """Eq. (6): the clipped surrogate of each sample; three tensors (B, G) -> (B,).

    logp are log-probabilities of whole items, SUMS over their tokens. With one update
    per rollout old_logp is logp.detach(). Every ratio is then 1, nothing is clipped and
    the loss is -mean(A) = 0; its gradient, -mean(A_i * grad logp_i), is not. Source:
    GRPO without its KL term, and with one ratio per item.
    """
    log_ratio = logp - old_logp  # (B, G)
    # If your beams are padded (-inf - -inf) or a ratio is beyond e^20: no gradient.
    log_ratio = torch.where(log_ratio.abs() < 20, log_ratio, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(1)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): nll (B,), grpo (B,), admit (B,) bool -> a scalar.

    GRPO teaches the RANKER'S order of the group. The true item, which need not be in
    it, only decides whether to listen. The mean is over all samples, so GRPO counts
    with weight * admission rate, its dose. The NLL is a SUM over the item's L tokens,
    like logp. Source: the paper's idea; weight and denominator ours.
    """
    return (nll + weight * torch.where(admit, grpo, 0.0)).mean()


# That was the method; you may stop here. What follows makes it run.
# ----------------------------------------------------------------------------- settings


@dataclass
class Config:
    """The settings; each has a command-line option of the same name."""

    seed: int = 0  # makes the shop, the initial weights and all random draws
    users: int = 1200  # number of users in post-training
    bias: float = 1.0  # how strongly the feed favours some items and hides others

    # the policy's pre-training
    pretrain_epochs: int = 12
    pretrain_batch: int = 128
    pretrain_lr: float = 5e-3

    # the ranker's training
    ranker_epochs: int = 3
    ranker_batch: int = 512
    ranker_lr: float = 6e-3
    random_items: int = 2  # drawn for each list that was shown, as "not clicked"

    # post-training (no prefix)
    epochs: int = 3
    batch: int = 8  # samples per step (B)
    lr: float = 2e-4
    group: int = 32  # rollouts per sample (G)
    weight: float = 5.0  # of GRPO in the arm adagrpo; the NLL has weight 1
    min_difficulty: float = 0.3  # with 32 beams: the target is not among the first ten
    min_discriminability: float = 0.01  # in the unit of the reward, a click probability


# ------------------------------------------------------------------------------- policy
# An ordinary GPT.

KV = tuple[Tensor, Tensor]  # keys and values of the tokens that a block has read


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to its input."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """N new tokens read the past ones and each other; mask is (B or 1, N, keys)."""
        B, N, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, width / heads) each
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)

        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, N, width)
        x = x + self.mlp(self.norm2(x))
        return x, (k, v)


class Policy(nn.Module):
    """A small GPT over the tokens of semantic IDs.

    `item_tokens` (items, L) are the IDs of the catalogue, and `history_length` is H.
    Nothing stops the policy from writing an ID that names no item.
    """

    def __init__(self, item_tokens: Tensor, history_length: int, width: int = 64):
        super().__init__()
        L = item_tokens.shape[1]
        self.history_length = history_length
        self.vocabulary = int(item_tokens.max()) + 1
        self.embedding = nn.Embedding(self.vocabulary, width)
        self.position = nn.Embedding(L * (history_length + 1), width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

        # The catalogue, in both directions.
        self.register_buffer("item_tokens", item_tokens, persistent=False)
        self.item_of = {tuple(ID): item for item, ID in enumerate(item_tokens.tolist())}
        if len(self.item_of) < len(item_tokens):
            raise ValueError("item_tokens: two items have the same ID")

    def forward(
        self,
        tokens: Tensor,  # (B, N)
        mask: Tensor | None = None,  # (B, N, cached + N) bool: what each token sees
        cache: list[KV] | None = None,  # of each block: the tokens read so far
    ) -> tuple[Tensor, list[KV]]:
        """Log-probabilities of the next token (B, N, V), and the next cache."""
        N = tokens.shape[1]
        cached = 0
        if cache is None:
            cache = [None] * len(self.blocks)
        else:
            keys, _ = cache[0]
            cached = keys.shape[2]
        if mask is None:  # each token sees itself and all that stands before it
            mask = torch.ones(1, N, cached + N, dtype=torch.bool).tril(cached)

        # A token's place is the number of others that it sees: see `rollout`.
        position = mask.sum(-1) - 1
        x = self.embedding(tokens) + self.position(position)  # (B, N, width)
        new_cache = []
        for block, past in zip(self.blocks, cache, strict=True):
            x, keys_and_values = block(x, mask, past)
            new_cache.append(keys_and_values)

        logits = self.head(self.norm(x))
        return logits.log_softmax(-1), new_cache

    def prompt(self, history: Tensor) -> Tensor:
        """The tokens (B, T) of the last H items of histories (B, H or more)."""
        return self.item_tokens[history[:, -self.history_length :]].flatten(1)

    def items_of(self, tokens: Tensor) -> Tensor:
        """Semantic IDs (B, G, L) -> item numbers (B, G), -1 for a hallucination."""
        IDs = tokens.flatten(0, 1).tolist()
        items = [self.item_of.get(tuple(ID), -1) for ID in IDs]
        return torch.tensor(items).view(tokens.shape[:2])

    # A saved policy holds its catalogue, and is not loaded with another one.

    def get_extra_state(self) -> Tensor:
        return self.item_tokens

    def set_extra_state(self, saved: Tensor) -> None:
        if not torch.equal(saved.to(self.item_tokens.device), self.item_tokens):
            raise ValueError("the policy was saved with another catalogue")


def log_prob(policy: Policy, prompt: Tensor, item_tokens: Tensor) -> Tensor:
    """log policy(item | prompt): prompt (B, T), the item's tokens (B, L) -> (B,).

    It is the SUM over the item's tokens, here and in every loss of post-training.
    """
    L = item_tokens.shape[1]
    sequence = torch.cat([prompt, item_tokens], dim=1)
    next_logp, _ = policy(sequence[:, :-1])  # (B, T + L - 1, V)
    next_logp = next_logp[:, -L:]  # (B, L, V): those that predict the item
    token_logp = next_logp.gather(2, item_tokens[..., None]).squeeze(2)  # (B, L)
    return token_logp.sum(1)


def rollout(policy: Policy, prompt: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Beam search: the likeliest IDs for each prompt, likeliest first.

    prompt (B, T) -> tokens (B, G, L) and log-probabilities (B, G) with their gradient,
    so that no second pass over the rollouts is needed. Nothing constrains the tokens.

    Each rollout is a branch that grows by one token per level. The prompt is encoded
    once, all branches go through the policy side by side, and a mask keeps them apart:
    a branch sees the prompt and its own tokens. With 3 branches, at the second level:

                        sees:  prompt   level 1   level 2
                               p q r     a b c     d e f
        d, which continues a   1 1 1     1 0 0     1 0 0
        e, which continues a   1 1 1     1 0 0     0 1 0
        f, which continues c   1 1 1     0 0 1     0 0 1

    Nothing continues b: it stays in the cache, and nobody sees it.
    """
    B, T = prompt.shape
    L = policy.item_tokens.shape[1]
    V = policy.vocabulary
    row = torch.arange(B)[:, None]  # x[row, parent] picks branches of each sample

    # At first there is one branch, and it is empty. Q is the number of branches.
    next_logp, cache = policy(prompt)
    next_logp = next_logp[:, -1:]  # (B, Q, V): what may follow each
    total = torch.zeros(B, 1)  # (B, Q): log-probability of what each has written
    tokens = torch.zeros(B, 1, 0, dtype=torch.long)  # (B, Q, tokens so far)
    mask = torch.ones(B, 1, T, dtype=torch.bool)  # (B, Q, tokens in the cache)

    for level in range(L):
        # Keep the likeliest continuations: a branch (the parent) and one more token.
        # Early there may be fewer than the group needs.
        continuations = (total[..., None] + next_logp).flatten(1)  # (B, Q * V)
        Q = min(group, continuations.shape[1])
        total, best = continuations.topk(Q)  # (B, Q)
        parent = best // V
        token = best % V
        tokens = torch.cat([tokens[row, parent], token[..., None]], dim=2)

        # If the IDs are not complete, the policy reads the new tokens. Each sees what
        # its parent saw, and itself.
        if level < L - 1:
            itself = torch.eye(Q, dtype=torch.bool).expand(B, -1, -1)
            mask = torch.cat([mask[row, parent], itself], dim=2)
            next_logp, cache = policy(token, mask, cache)
    return tokens, total


# ------------------------------------------------------------------ supervised training

MAX_GRAD_NORM = 1.0  # a longer gradient is cut to this


class Optimizer:
    """AdamW; the learning rate warms up for 20 steps and then falls to 0."""

    def __init__(self, model: nn.Module, lr: float, steps: int):
        self.params = list(model.parameters())
        # foreach: the same arithmetic in fewer calls.
        self.adamw = torch.optim.AdamW(self.params, lr=lr, foreach=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min((step + 1) / 20, 1 - step / steps)
        )

    def step(self, loss: Tensor) -> None:
        """One update. RuntimeError if the gradient is not finite."""
        self.adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM, error_if_nonfinite=True)
        self.adamw.step()
        self.schedule.step()


def shuffled_batches(samples: int, batch: int, epochs: int) -> tuple[Tensor, ...]:
    """Row numbers of each batch; each pass has its own order, a batch may span two."""
    passes = [torch.randperm(samples) for _ in range(epochs)]
    return torch.cat(passes).split(batch)


def pretrain(shop: Shop, config: Config) -> Policy:
    """A policy trained by next-token NLL on last season's sequences of purchases."""
    torch.manual_seed(config.seed)
    N, H = shop.pretrain.history.shape  # H items: all that the policy can read
    policy = Policy(torch.as_tensor(shop.tokens), history_length=H)

    purchases = np.column_stack([shop.pretrain.history, shop.pretrain.target])
    sequences = policy.item_tokens[purchases].flatten(1)  # (N, T + L)
    batches = shuffled_batches(N, config.pretrain_batch, config.pretrain_epochs)
    optimizer = Optimizer(policy, config.pretrain_lr, len(batches))
    for rows in tqdm(batches, "pre-training", leave=False, disable=None):
        sequence = sequences[rows]
        next_logp, _ = policy(sequence[:, :-1])  # (B, T + L - 1, V)
        loss = F.nll_loss(next_logp.flatten(0, 1), sequence[:, 1:].flatten())
        optimizer.step(loss)
    return policy


class Ranker(nn.Module):
    """A click model: an MLP on the embeddings of user and item and on their product.

    The user is the mean embedding of the history, in which the order is lost.
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
        """Item numbers: history (B, K), items (B, C) -> logits of a click (B, C)."""
        item = self.offered(items)  # (B, C, width)
        user = self.bought(history).mean(1, keepdim=True).expand_as(item)

        # The product starts far smaller than its factors: times 10.
        product = 10 * user * item
        features = torch.cat([user, item, product], dim=-1)  # (B, C, 3 * width)
        return self.mlp(features).squeeze(-1)

    def click_probability(self, history: Tensor, items: Tensor) -> Tensor:
        """The score: P(click) in 0..1 (B, C)."""
        return self(history, items).sigmoid()


def train_ranker(shop: Shop, config: Config) -> Ranker:
    """A ranker trained by binary cross-entropy on the feed's slates and their clicks.

    A slate is what one user was shown, S items. A few random items join it as "not
    clicked": all that the ranker learns about items that the feed hides.
    """
    torch.manual_seed(config.seed)
    items = len(shop.tokens)
    history = torch.as_tensor(shop.feed_history)  # (M, K)
    shown = torch.as_tensor(shop.shown)  # (M, S)
    clicked = torch.as_tensor(shop.clicked).float()  # (M, S)
    ranker = Ranker(items)

    batches = shuffled_batches(len(shown), config.ranker_batch, config.ranker_epochs)
    optimizer = Optimizer(ranker, config.ranker_lr, len(batches))
    for rows in tqdm(batches, "ranker", leave=False, disable=None):
        # A random item may be one that was clicked: rarely, and it does not matter.
        extra = torch.randint(items, (len(rows), config.random_items))
        offered = torch.cat([shown[rows], extra], dim=1)  # (B, S + random items)
        labels = torch.cat([clicked[rows], torch.zeros(extra.shape)], dim=1)
        logits = ranker(history[rows], offered)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        optimizer.step(loss)
    return ranker


# ------------------------------------------------------------------------ post-training


class Scored(NamedTuple):
    """The groups that the policy wrote for some samples, and the ranker's scores."""

    tokens: Tensor  # (B, G, L) the rollouts, likeliest first
    logp: Tensor  # (B, G) their log-probabilities, with gradient
    hit: Tensor  # (B, G) bool: it is the target
    valid: Tensor  # (B, G) bool: it is an item
    rewards: Tensor  # (B, G) 0 for a hallucination
    target_reward: Tensor  # (B,)


def roll_out_and_score(
    policy: Policy, ranker: Ranker, history: Tensor, target: Tensor, group: int
) -> Scored:
    """Eq. (1) and its rewards: history (B, K) and target (B,) are item numbers.

    Nobody buys an item twice, so what was bought is not recommended. A history holds K
    items: of G + K beams at least G are left, and the likeliest G are the group.
    """
    B, K = history.shape
    tokens, logp = rollout(policy, policy.prompt(history), group + K)
    items = policy.items_of(tokens)  # (B, G + K), fewer if there are no more IDs
    group = min(group, items.shape[1] - K)
    if group < 2:
        raise ValueError("group: fewer than 2 IDs are left to recommend")

    # A stable sort puts what was bought last, and keeps the order of the others.
    is_bought = (items[:, :, None] == history[:, None, :]).any(2)
    kept = is_bought.int().argsort(dim=1, stable=True)[:, :group]
    row = torch.arange(B)[:, None]
    tokens = tokens[row, kept]
    logp = logp[row, kept]
    items = items[row, kept]  # (B, G)  eq. (1)

    valid = items >= 0
    hit = items == target[:, None]
    with torch.no_grad():  # the ranker learns nothing here
        scores = ranker.click_probability(history, items.clamp(min=0))
        rewards = torch.where(valid, scores, 0.0)
        target_reward = ranker.click_probability(history, target[:, None]).squeeze(1)
    if not (rewards.isfinite().all() and target_reward.isfinite().all()):
        raise ValueError("the ranker's scores must be finite")
    return Scored(tokens, logp, hit, valid, rewards, target_reward)


def gate_of(scored: Scored, config: Config) -> Gate:
    """Eq. (2)-(4) with the thresholds in `config`."""
    return adagrpo_gate(
        target_reward=scored.target_reward,
        rollout_rewards=scored.rewards,
        hit=scored.hit,
        valid=scored.valid,
        min_difficulty=config.min_difficulty,
        min_discriminability=config.min_discriminability,
        ranked=True,
    )


def make_arms(config: Config) -> dict[str, tuple]:
    """The arms that are compared: whom GRPO joins (a rule), and with what weight."""
    return {
        "nll": (None, 0.0),  # no GRPO, so nothing has to be rolled out
        "mix-1": (lambda gate: torch.ones_like(gate.admit), 1.0),  # a fixed mixture
        # Weight 5 for the fifth that is admitted: about as much GRPO as mix-1 gives.
        "adagrpo": (lambda gate: gate.admit, config.weight),
    }


def post_train(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    rule: Callable[[Gate], Tensor] | None,  # (B,) bool: who gets GRPO; None: nobody
    weight: float,  # of GRPO in this arm
    config: Config,
    label: str | None = None,  # of the printed lines; None: print nothing
) -> float:
    """The training loop. It changes `policy`, and returns the dose of GRPO."""
    torch.manual_seed(config.seed)  # every arm sees the same batches
    all_histories = torch.as_tensor(split.history)  # (N, K)
    all_targets = torch.as_tensor(split.target)  # (N,)
    batches = shuffled_batches(len(all_targets), config.batch, config.epochs)
    optimizer = Optimizer(policy, config.lr, len(batches))

    log = []  # what to watch: figures of each sample, a dict for each step
    for step, rows in enumerate(batches, start=1):
        history = all_histories[rows]  # (B, K)
        target = all_targets[rows]  # (B,)

        # Every sample is supervised.
        prompt = policy.prompt(history)  # (B, T)
        nll = -log_prob(policy, prompt, policy.item_tokens[target])  # (B,)
        figures = {"nll": nll}
        loss = nll.mean()  # all there is without GRPO

        # GRPO joins where the rule admits it.
        if rule is not None:
            scored = roll_out_and_score(policy, ranker, history, target, config.group)
            gate = gate_of(scored, config)
            admitted = rule(gate)  # (B,); in the arm adagrpo it is gate.admit
            advantages = group_advantages(scored.rewards)  # (B, G)  eq. (5)
            old_logp = scored.logp.detach()  # one update per rollout
            grpo = grpo_loss(scored.logp, old_logp, advantages)  # (B,)  eq. (6)
            loss = adagrpo_loss(nll, grpo, admitted, weight)  # eq. (7)
            figures["reward"] = scored.rewards.mean(1)
            figures["hard"] = gate.hard
            figures["clear"] = gate.clear
            figures["admitted"] = admitted

        optimizer.step(loss)
        log.append({name: figure.detach() for name, figure in figures.items()})
        if label is not None and (step % 100 == 0 or step == len(batches)):
            means = [f"{name} {mean_of(log[-100:], name):.3f}" for name in figures]
            print(f"{label:<8} step {step:>4}  {'  '.join(means)}", flush=True)

    if rule is None:
        return 0.0
    return weight * mean_of(log, "admitted")


def mean_of(log: list[dict[str, Tensor]], name: str) -> float:
    """The mean of a figure over all samples of some steps."""
    return torch.cat([figures[name] for figures in log]).float().mean().item()


# --------------------------------------------------------------------------- evaluation

BEAMS = 32  # in every evaluation, whatever the groups of the training

# Fused: the ranker is asked at every request, and the beams are sorted by
# log-probability + w * reward. With w = 0 it is the policy alone.
FUSION_WEIGHTS = (0, 1, 2, 4, 8, 16, 32)

Metrics = dict[str, Tensor]  # such as "hr@10, w=4": (N,), a figure of each user


def metrics_of(scored: Scored, config: Config) -> Metrics:
    """Metrics of some users from their 32 beams, and what the gate says of them."""
    metrics = {}
    hit = scored.hit.float()  # (N, 32)

    # hr@10: is the target among the first ten?
    for w in FUSION_WEIGHTS:
        score = scored.logp + w * scored.rewards
        order = score.argsort(dim=1, descending=True, stable=True)
        sorted_hit = hit.gather(1, order)
        metrics[f"hr@10, w={w}"] = sorted_hit[:, :10].amax(1)

    # ndcg@10: 1 / log2(1 + the target's rank), or 0. hallucination: share of the ten.
    first = hit[:, :10]
    rank = torch.arange(1, first.shape[1] + 1)
    metrics["ndcg@10"] = (first / torch.log2(1 + rank)).amax(1)
    metrics["hallucination"] = (~scored.valid[:, :10]).float().mean(1)

    gate = gate_of(scored, config)
    return metrics | {"hard": gate.hard, "clear": gate.clear, "admit": gate.admit}


@torch.no_grad()
def evaluate(policy: Policy, ranker: Ranker, split: Split, config: Config) -> Metrics:
    """Metrics of all users of a split, on 32 beams each."""
    all_histories = torch.as_tensor(split.history)  # (N, K)
    all_targets = torch.as_tensor(split.target)  # (N,)
    batches = torch.arange(len(all_targets)).split(128)
    parts = []
    for rows in tqdm(batches, "evaluation", leave=False, disable=None):
        history = all_histories[rows]
        target = all_targets[rows]
        scored = roll_out_and_score(policy, ranker, history, target, BEAMS)
        parts.append(metrics_of(scored, config))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def percent(metric: Tensor) -> float:
    return 100 * metric.float().mean().item()


def best_weight(validation: Metrics) -> int:
    """Which of FUSION_WEIGHTS is best on validation users."""
    hr = {w: percent(validation[f"hr@10, w={w}"]) for w in FUSION_WEIGHTS}
    return max(hr, key=hr.get)


# ------------------------------------------------------------------------------ command


def command_line(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The settings, and the other options: device, save."""
    parser = argparse.ArgumentParser(epilog="Settings: see Config in adagrpo.py.")
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--save", type=Path, metavar="FOLDER", help="where the policies are saved")
    defaults = vars(Config())
    for name, default in defaults.items():
        add(f"--{name}", type=type(default), default=default, help=f"({default})")
    options = parser.parse_args(argv)

    config = Config(**{name: getattr(options, name) for name in defaults})
    for name, value in vars(config).items():
        least = 0
        if isinstance(value, int) and name != "seed":
            least = 1  # it is a count
        if name == "group":
            least = 2  # one rollout has nothing to be compared with
        if not least <= value < math.inf:  # nan fails, too
            parser.error(f"argument --{name}: must be at least {least}, got {value}")

    if options.save:
        try:
            options.save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --save: {error}")
    return config, options


def main(argv: list[str] | None = None) -> None:
    """The whole experiment. In a notebook say main([])."""
    config, options = command_line(argv)
    torch.set_num_threads(1)  # the tensors are tiny
    torch.set_default_device(options.device)  # no tensor names its device

    shop = make_shop(config.seed, config.bias, {"posttrain": config.users})
    pretrained = pretrain(shop, config)
    ranker = train_ranker(shop, config)

    validation = evaluate(pretrained, ranker, shop.validation, config)
    test = evaluate(pretrained, ranker, shop.test, config)
    print_premise(shop, validation, test)
    user = int(test["admit"].int().argmax())  # the first who is admitted
    print_group(pretrained, ranker, shop.test, user, config)

    print("\nPost-training")
    results = {"before": (validation, test, 0.0)}
    for arm, (rule, weight) in make_arms(config).items():
        policy = copy.deepcopy(pretrained)
        dose = post_train(policy, ranker, shop.posttrain, rule, weight, config, arm)
        if options.save:
            torch.save(policy.state_dict(), options.save / f"{arm}.pt")
        validation = evaluate(policy, ranker, shop.validation, config)
        test = evaluate(policy, ranker, shop.test, config)
        results[arm] = (validation, test, dose)
    print_results(shop, results)


# ----------------------------------------------------------------------------- printing


def print_row(name: str, cells: Iterable, form: str = "") -> None:
    print(f"{name:<10}" + "".join(f"{cell:>8{form}}" for cell in cells))


def by_kind(shop: Shop, metric: Tensor) -> list[float]:
    """The mean of a metric (N,) over all test users and over each kind, in percent."""
    kind = torch.as_tensor(shop.test.kind)
    kinds = [percent(metric[kind == number]) for number in range(len(shop.kinds))]
    return [percent(metric), *kinds]


def print_premise(shop: Shop, validation: Metrics, test: Metrics) -> None:
    """Before any post-training: does the ranker know what the policy does not?

    Three kinds of users: trend users buy what is in fashion, which clicks show; series
    users buy in an order that clicks do not show; niche users buy what the feed hides.
    """
    print("\nBefore post-training, percent of test users. fused: hr@10 if the ranker")
    print("helps to sort. hard, clear, admit: so many, says the gate.\n")
    print_row("", ["all", *shop.kinds])
    print_row("hr@10", by_kind(shop, test["hr@10, w=0"]), ".1f")
    best_w = best_weight(validation)
    print_row("fused", by_kind(shop, test[f"hr@10, w={best_w}"]), ".1f")
    for name in ("hard", "clear", "admit"):
        print_row(name, by_kind(shop, test[name]), ".1f")


def print_group(
    policy: Policy, ranker: Ranker, split: Split, user: int, config: Config
) -> None:
    """What the gate sees: the group of one user."""
    history = torch.as_tensor(split.history[user : user + 1])  # (1, K)
    target = torch.as_tensor(split.target[user : user + 1])  # (1,)
    scored = roll_out_and_score(policy, ranker, history, target, BEAMS)
    gate = gate_of(scored, config)
    advantages = group_advantages(scored.rewards)  # (1, 32)

    print("\nA user whom the gate admits: the ten likeliest IDs, and the target.\n")
    print_row("", ["policy", "reward", "advant."])
    for place, ID in enumerate(scored.tokens[0, :10].tolist()):
        name = "-".join(str(token) for token in ID)
        probability = scored.logp[0, place].exp()
        cells = [probability, scored.rewards[0, place], advantages[0, place]]
        print_row(name, cells, ".3f")
    figures = {"reward": scored.target_reward} | gate._asdict()
    print("target: " + ", ".join(f"{n} {v.item():.3g}" for n, v in figures.items()))


def print_results(shop: Shop, results: dict[str, tuple]) -> None:
    """results: arm -> metrics of validation users, of test users, and the dose."""
    print("\nTest users, percent. hr@10: the policy alone. fused: with the ranker at")
    print("every request. dose: weight * share admitted. tune: validation hr@10.\n")
    titles = ["fused", "ndcg@10", "halluc.", "dose", "tune"]
    print_row("", ["hr@10", *shop.kinds, *titles])
    for arm, (validation, test, dose) in results.items():
        best_w = best_weight(validation)
        cells = [
            *by_kind(shop, test["hr@10, w=0"]),
            percent(test[f"hr@10, w={best_w}"]),
            percent(test["ndcg@10"]),
            percent(test["hallucination"]),
            dose,
            percent(validation["hr@10, w=0"]),
        ]
        print_row(arm, cells, ".2f")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
