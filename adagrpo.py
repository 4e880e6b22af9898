# SPDX-License-Identifier: MIT
"""AdaGRPO in one file: reinforcement learning from a ranker that is not always right.

A policy, a small GPT, writes the semantic ID of the item that a user buys next: L
tokens, from the coarse category to the single item. A ranker, a click model, scores
what it wrote. The ranker is right about some users and wrong about others, because it
learned only from what a feed chose to show. AdaGRPO trains on EVERY sample with
supervised NLL and admits the GRPO term sample by sample: only where the policy finds
the sample hard AND the ranker puts the true item above the average of what the policy
wrote instead.

A sample is one user: a history x, and a target y, the true item, which was bought next.
An ID that names no item is a hallucination. r is the reward of an ID: the ranker's
score of the item, or 0 for a hallucination. The idea is the paper's (below); of it only
the abstract could be read, so the formulas of the gate are ours.

  (1) rollouts          a group of G IDs o_1 .. o_G that the policy writes for x,
                        likeliest first; some may be hallucinations
  (2) difficulty        d = share of the group that stands ahead of y; 1 if y is absent
  (3) discriminability  m = r(y) - mean r over the negatives, the IDs in the group that
                        name an item other than y; if there are none, g = 0
  (4) gate              g = 1 if d >= min_difficulty and m >= min_discriminability,
                        else 0
  (5) advantages        A_i = (r(o_i) - mean r) / std r over the whole group; exactly 0
                        if all r are equal
  (6) GRPO              -mean over i of min(ratio_i A_i, clip(ratio_i) A_i); ratio_i is
                        policy(o_i | x) over its value at the time of the rollout
  (7) loss              mean over samples of NLL + weight * g * GRPO, where
                        NLL = -log policy(y | x)

A hallucination counts in (5), so that GRPO pushes it down; (3) leaves it out, because
its 0 would lower the mean and so raise m.

The program pre-trains a policy on purchases and a ranker on the feed's clicks. Then it
post-trains copies of the policy by several rules, the arms (NLL alone, a fixed mixture,
AdaGRPO), and compares them, alone and with the ranker's help.

By default the group is not drawn at random: it holds the G likeliest IDs, found by beam
search. The GRPO term then compares these IDs with each other; it is not an unbiased
estimate of the policy gradient. `--decode sample` draws the group instead and sorts it,
likeliest first.

Left out: a KL term (the NLL is the anchor), several updates per rollout (with one,
every ratio is 1, see `grpo_loss`), and constrained decoding (it would hide
hallucinations). Not meant for production: the folder .github has a diagnosis for your
own models, a run on a real log, the gate in an existing trainer, and the study.

Shapes: B samples, G rollouts in each group, L tokens per item, V tokens in the
vocabulary, T = H * L tokens in the prompt (a history of H items). No tensor names its
device: torch's default device is set when the program starts.

Paper: Xu, Qi, Zou et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative
Recommendation", arXiv 2606.08480 (2026). GRPO: Shao et al., DeepSeekMath, arXiv
2402.03300.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import Shop, Split, make_shop


@dataclass
class Config:
    """The settings; each has a command-line option of the same name."""

    seed: int = 0  # of the shop, the initial weights, and all random draws
    users: int = 1200  # to post-train on
    bias: float = 1.0  # how strongly the feed hides and favours items
    max_grad_norm: float = 1.0  # in every training, a longer gradient is cut to this

    # the policy's pre-training
    pretrain_epochs: int = 4
    pretrain_batch: int = 128
    pretrain_lr: float = 1e-3

    # the ranker's training
    ranker_epochs: int = 3
    ranker_batch: int = 512
    ranker_lr: float = 6e-3
    negatives: int = 2  # random items per slate (not the negatives of eq. 3)

    # post-training
    epochs: int = 3
    batch: int = 8  # samples per step (B)
    lr: float = 3e-4
    group: int = 32  # rollouts per sample (G)
    decode: str = "beam"  # how they are made: "beam" or "sample"
    weight: float = 5.0  # of GRPO in the arm adagrpo; the NLL has weight 1
    min_difficulty: float = 0.3  # with 32 beams: the target is not among the first ten
    min_discriminability: float = 0.01  # in the unit of the reward, a click probability


# ------------------------------------------------------------------------------- policy


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

    def forward(self, x: Tensor, sees: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        attended, keys_and_values = self.attend(self.norm1(x), sees, past)
        x = x + attended
        x = x + self.mlp(self.norm2(x))
        return x, keys_and_values

    def attend(self, x: Tensor, sees: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """Multi-head attention of N new tokens to the past ones and to each other."""
        B, N, width = x.shape  # sees is (B or 1, N, keys)
        qkv = self.qkv(x).view(B, N, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, width / heads) each
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)

        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None])
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)  # (B, N, width)


class Policy(nn.Module):
    """A small GPT over the tokens of semantic IDs.

    Nothing stops it from writing an ID that names no item. `item_tokens` (items, L) are
    the IDs of the catalogue; `history_length` is H. Raises ValueError if two items have
    the same ID, or if IDs are too long to be numbered in 64 bits.
    """

    def __init__(self, item_tokens: np.ndarray, history_length: int, width: int = 64):
        super().__init__()
        item_tokens = torch.as_tensor(item_tokens).long()
        L = item_tokens.shape[1]
        self.vocabulary = int(item_tokens.max()) + 1
        if self.vocabulary**L >= 2**63:
            raise ValueError(f"item_tokens: IDs of {L} tokens overflow 64 bits")

        self.embedding = nn.Embedding(self.vocabulary, width)
        self.position = nn.Embedding(L * (history_length + 1), width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

        # The catalogue, and its IDs as sorted numbers to look an item up.
        id_numbers, item_of_id = self.number_of(item_tokens).sort()
        if len(id_numbers.unique()) < len(id_numbers):
            raise ValueError("item_tokens: two items have the same ID")
        self.register_buffer("item_tokens", item_tokens, persistent=False)
        self.register_buffer("id_numbers", id_numbers, persistent=False)
        self.register_buffer("item_of_id", item_of_id, persistent=False)

    def forward(
        self,
        tokens: Tensor,  # (B, N)
        sees: Tensor | None = None,  # (B, N, cached + N) bool: what each token sees
        cache: list | None = None,  # a KV for each block: the tokens read so far
    ) -> tuple[Tensor, list]:
        """Log-probabilities of what follows each token (B, N, V), and the next cache.

        By default each token sees itself and what stands before it.
        """
        N = tokens.shape[1]
        if sees is None:
            sees = torch.ones(1, N, N, dtype=torch.bool).tril()
        if cache is None:
            cache = [None] * len(self.blocks)

        # A token's place is the number of others that it sees: see `rollout`.
        position = sees.sum(-1) - 1
        x = self.embedding(tokens) + self.position(position)  # (B, N, width)
        new_cache = []
        for block, past in zip(self.blocks, cache, strict=True):
            x, keys_and_values = block(x, sees, past)
            new_cache.append(keys_and_values)

        logits = self.head(self.norm(x))
        return logits.log_softmax(-1), new_cache

    def prompt(self, history: Tensor) -> Tensor:
        """Item numbers (B, H) -> their tokens in a row (B, T)."""
        return self.item_tokens[history].flatten(1)

    def number_of(self, tokens: Tensor) -> Tensor:
        """Semantic IDs (..., L) read as numbers in base V (...)."""
        number = torch.zeros_like(tokens[..., 0])
        for token in tokens.unbind(-1):
            number = number * self.vocabulary + token
        return number

    def items_of(self, tokens: Tensor) -> Tensor:
        """Semantic IDs (..., L) -> item numbers (...), -1 for a hallucination."""
        number = self.number_of(tokens)
        place = torch.searchsorted(self.id_numbers, number)
        place = place.clamp(max=len(self.id_numbers) - 1)
        is_item = self.id_numbers[place] == number
        return torch.where(is_item, self.item_of_id[place], -1)


# ---------------------------------------------------------------- supervised training


def shuffled_batches(samples: int, batch: int, epochs: int) -> tuple[Tensor, ...]:
    """Row numbers of each batch; each pass has a new order, a batch may span two."""
    passes = [torch.randperm(samples) for _ in range(epochs)]
    return torch.cat(passes).split(batch)


def make_optimizer(model: nn.Module, lr: float, steps: int) -> tuple:
    """AdamW, and a schedule with a warm-up of 20 steps and a linear decay to 0."""
    # foreach: the same arithmetic in fewer calls
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / steps)
    )
    return optimizer, scheduler


def fit(
    model: nn.Module,
    lr: float,
    batches: tuple[Tensor, ...],
    loss_of: Callable[[Tensor], Tensor],  # row numbers of a batch -> loss
    config: Config,
    label: str,  # of the progress bar
) -> None:
    """Plain supervised training, for the policy's pre-training and for the ranker."""
    optimizer, scheduler = make_optimizer(model, lr, len(batches))
    for rows in tqdm(batches, label, leave=False, disable=None):  # None: terminals only
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()


def pretrain(shop: Shop, config: Config) -> Policy:
    """A policy trained by next-token NLL on last season's sequences of purchases."""
    torch.manual_seed(config.seed)
    split = shop.pretrain  # history (N, H) and target (N,), item numbers
    policy = Policy(shop.tokens, history_length=split.history.shape[1])

    purchases = np.column_stack([split.history, split.target])
    sequences = policy.prompt(torch.as_tensor(purchases))  # (N, T + L)

    def loss_of(rows: Tensor) -> Tensor:
        sequence = sequences[rows]
        next_logp, _ = policy(sequence[:, :-1])  # (B, T + L - 1, V)
        return F.nll_loss(next_logp.flatten(0, 1), sequence[:, 1:].flatten())

    N = len(sequences)
    batches = shuffled_batches(N, config.pretrain_batch, config.pretrain_epochs)
    fit(policy, config.pretrain_lr, batches, loss_of, config, "pre-training")
    return policy


# ------------------------------------------------------------------------------- ranker


class Ranker(nn.Module):
    """A click model: an MLP on the embeddings of user and item and on their product.

    The user is the mean embedding of the history, which has no order.
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

        # The product starts far smaller than its factors: times 10.
        product = 10 * user * item
        features = torch.cat([user, item, product], dim=-1)
        return self.mlp(features).squeeze(-1)

    def click_probability(self, history: Tensor, items: Tensor) -> Tensor:
        """The score: P(click) in 0..1 (B, K)."""
        return self(history, items).sigmoid()


def train_ranker(shop: Shop, config: Config) -> Ranker:
    """A ranker trained by binary cross-entropy on the feed's slates and their clicks.

    A slate is what one user was shown, S items. A few random items join it as "not
    clicked": all that the ranker learns about items that the feed hides.
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

    batches = shuffled_batches(len(shown), config.ranker_batch, config.ranker_epochs)
    fit(ranker, config.ranker_lr, batches, loss_of, config, "ranker")
    return ranker


# ------------------------------------------------------------------------------ rollout


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


def rollout(
    policy: Policy, prompt: Tensor, group: int, decode: str
) -> tuple[Tensor, Tensor]:
    """Eq. (1): a group of IDs for each prompt, likeliest first.

    prompt (B, T), decode "beam" or "sample" -> tokens (B, G, L) and log-probabilities
    (B, G) with their gradient, so that no second pass over the rollouts is needed.
    Nothing constrains the tokens.

    Each rollout is a branch that grows by one token per level. The prompt is encoded
    once, all branches go through the policy side by side, and a mask keeps them apart:
    a branch sees the prompt and its own tokens. (A copy of the cache for each branch
    is two to three times slower.) With 3 branches, at the second level:

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

    # Q branches, all of them empty: one to search from, or G to draw.
    Q = 1
    if decode == "sample":
        Q = group
    next_logp, cache = policy(prompt)
    next_logp = next_logp[:, -1:].expand(-1, Q, -1)  # (B, Q, V): what may follow each
    total = torch.zeros(B, Q)  # log-probability of what each branch has written
    tokens = torch.zeros(B, Q, 0, dtype=torch.long)  # (B, Q, tokens so far)
    sees = torch.ones(B, Q, T, dtype=torch.bool)  # (B, Q, tokens in the cache)

    for level in range(L):
        # Choose which branches grow and by which token, (B, G) both, without gradient.
        with torch.no_grad():
            if decode == "beam":
                parent, token = beam(total, next_logp, group)
            else:  # one random token for each branch
                parent = torch.arange(group).expand(B, group)
                probability = next_logp.exp().flatten(0, 1)  # (B * G, V)
                token = torch.multinomial(probability, 1).view(B, group)

        # A new branch is its parent and one more token.
        total = total[row, parent] + next_logp[row, parent, token]  # (B, G)
        tokens = torch.cat([tokens[row, parent], token[..., None]], dim=2)

        # If the IDs are not complete, the policy reads the new tokens. Each sees what
        # its parent saw, and itself.
        if level < L - 1:
            Q = token.shape[1]
            itself = torch.eye(Q, dtype=torch.bool).expand(B, -1, -1)
            sees = torch.cat([sees[row, parent], itself], dim=2)
            next_logp, cache = policy(token, sees, cache)

    # topk has sorted the beams; draws have still to be sorted.
    if decode == "sample":
        order = total.argsort(dim=1, descending=True)
        tokens = tokens[row, order]
        total = total[row, order]
    return tokens, total


def beam(total: Tensor, next_logp: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The G likeliest continuations of all branches: total (B, Q), next_logp (B, Q, V).

    Returns the branch that each one continues and its next token, (B, G) both; while
    there are fewer continuations than G, all of them.
    """
    Q, V = next_logp.shape[1:]
    continuations = total[..., None] + next_logp  # (B, Q, V)
    best = continuations.flatten(1).topk(min(group, Q * V)).indices  # (B, G)
    return best // V, best % V


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

    A row is the group of one prompt. If its columns have no order (ranked=False), the
    difficulty is the share of misses: choose its threshold anew. Scores may be
    probabilities or logits. An ID that was drawn twice counts twice. A group without
    negatives closes the gate, and so does a score of target or negative that is nan or
    infinite.

    Raises ValueError for shapes that do not fit, TypeError for masks that are not bool.
    Source: diagnostics and 0/1 gate are the paper's (abstract), these formulas ours.
    """
    shape = rollout_rewards.shape  # (B, G)
    fits = len(shape) == 2 and hit.shape == valid.shape == shape
    if not fits or target_reward.shape != shape[:1]:
        raise ValueError(
            "target_reward must be (B,), and rollout_rewards, hit, valid (B, G), got "
            f"{[tuple(x.shape) for x in (target_reward, rollout_rewards, hit, valid)]}"
        )
    if hit.dtype != torch.bool or valid.dtype != torch.bool:
        raise TypeError(f"hit, valid must be bool, got {hit.dtype}, {valid.dtype}")

    # hit 0 0 1 0 -> cumsum 0 0 1 1. While it is 0, rollouts stand ahead of y: 2 of 4.
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
    return Gate(  # eq. (4)
        admit=hard & clear,
        hard=hard,
        clear=clear,
        difficulty=difficulty,
        discriminability=discriminability,
    )


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. (5): rewards (B, G) -> standardised in each group (B, G), without gradient.

    A group that is flat up to rounding (its spread is below a millionth of its largest
    reward) gets exactly 0, and so does one with a reward that is not finite. If rewards
    are logits, give hallucinations less than all of them, not 0. Source: GRPO, with the
    population standard deviation; the care for flat groups is ours.
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
    per rollout old_logp is logp.detach(). Every ratio is then 1 and the loss is
    -mean(A) = 0; its gradient, -mean(A_i * grad logp_i), is not. Source: GRPO without
    its KL term, and with one ratio per item.
    """
    ratio = (logp - old_logp).exp()  # (B, G)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(1)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): nll (B,), grpo (B,), admit (B,) bool -> a scalar.

    The mean is over all B samples and not over those admitted, so GRPO counts with
    weight * admission rate, its dose. The NLL is a SUM over the item's L tokens, like
    the log-probabilities in GRPO; if it alone is a mean over tokens, divide the weight
    by L. Source: NLL for all and gated GRPO are the paper's (abstract), weight and
    denominator are ours.
    """
    return (nll + weight * torch.where(admit, grpo, 0.0)).mean()


# ------------------------------------------------------------------------ training loop


class Scored(NamedTuple):
    """The groups that the policy wrote for some samples, and the ranker's scores."""

    tokens: Tensor  # (B, G, L) the rollouts, likeliest first
    logp: Tensor  # (B, G) their log-probabilities, with gradient
    items: Tensor  # (B, G) the items that they name, -1 for a hallucination
    hit: Tensor  # (B, G) bool: it is the target
    valid: Tensor  # (B, G) bool: it is an item
    rewards: Tensor  # (B, G) 0 for a hallucination
    target_reward: Tensor  # (B,)


def roll_out_and_score(
    policy: Policy, ranker: Ranker, history: Tensor, target: Tensor, config: Config
) -> Scored:
    """Eq. (1) and its rewards: history (B, H) and target (B,) are item numbers."""
    prompt = policy.prompt(history)  # (B, T)
    tokens, logp = rollout(policy, prompt, config.group, config.decode)
    items = policy.items_of(tokens)  # (B, G)
    hit = items == target[:, None]
    valid = items >= 0

    with torch.no_grad():  # the ranker learns nothing here
        scores = ranker.click_probability(history, items.clamp(min=0))
        rewards = torch.where(valid, scores, 0.0)
        target_reward = ranker.click_probability(history, target[:, None]).squeeze(1)
    return Scored(tokens, logp, items, hit, valid, rewards, target_reward)


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


# A rule says which samples of a batch get the GRPO term, (B,) bool.
Rule = Callable[[Gate], Tensor]


def make_arms(config: Config) -> dict[str, tuple[Rule | None, float]]:
    """The arms by name: a rule, and the weight of GRPO where the rule admits it.

    Compare arms by their dose, weight times the share of samples that get GRPO.
    """
    return {
        "nll": (None, 0.0),  # no GRPO, so nothing has to be rolled out
        # no gate: a fixed mixture of NLL and GRPO
        "mix-0.3": (lambda gate: torch.ones_like(gate.admit), 0.3),
        "mix-1": (lambda gate: torch.ones_like(gate.admit), 1.0),
        # one half of the gate alone; with the default settings at adagrpo's dose, about
        "difficulty": (lambda gate: gate.hard, 2.1),
        "discriminability": (lambda gate: gate.clear, 2.6),
        # the gate
        "adagrpo": (lambda gate: gate.admit, config.weight),
    }


def post_train(
    policy: Policy,
    ranker: Ranker,
    split: Split,
    rule: Rule | None,
    weight: float,
    config: Config,
    label: str | None = None,  # of the printed lines; None: print nothing
) -> float:
    """The training loop. It changes `policy`, and returns the dose of GRPO.

    Raises FloatingPointError if the loss is not finite.
    """
    torch.manual_seed(config.seed)  # every arm sees the same batches
    all_histories = torch.as_tensor(split.history)
    all_targets = torch.as_tensor(split.target)
    batches = shuffled_batches(len(all_targets), config.batch, config.epochs)
    optimizer, scheduler = make_optimizer(policy, config.lr, len(batches))

    log = []  # what to watch: a dict of figures for each step
    for step, rows in enumerate(batches, start=1):
        history = all_histories[rows]  # (B, H)
        target = all_targets[rows]  # (B,)

        # Every sample is supervised.
        prompt = policy.prompt(history)  # (B, T)
        nll = -log_prob(policy, prompt, policy.item_tokens[target])  # (B,)
        figures = {"nll": nll}

        if rule is None:
            loss = nll.mean()
        else:
            # GRPO joins where the rule admits it.
            scored = roll_out_and_score(policy, ranker, history, target, config)
            gate = gate_of(scored, config)
            admitted = rule(gate)  # (B,)
            advantages = group_advantages(scored.rewards)  # (B, G)  eq. (5)
            old_logp = scored.logp.detach()  # one update per rollout
            grpo = grpo_loss(scored.logp, old_logp, advantages)  # (B,)  eq. (6)
            loss = adagrpo_loss(nll, grpo, admitted, weight)  # eq. (7)
            figures["reward"] = scored.rewards
            figures["hard"] = gate.hard
            figures["clear"] = gate.clear
            figures["admitted"] = admitted

        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()

        log.append({name: f.float().mean().item() for name, f in figures.items()})
        if label is not None and (step % 100 == 0 or step == len(batches)):
            print_training(label, step, log[-100:])

    if rule is None:
        return 0.0
    return weight * float(np.mean([means["admitted"] for means in log]))


def print_training(label: str, step: int, log: list[dict[str, float]]) -> None:
    """A line with the means over the last steps."""
    line = f"{label:<17} step {step:>4}"
    for name in log[0]:
        mean = np.mean([figures[name] for figures in log])
        line += f"  {name} {mean:.3f}"
    print(line, flush=True)


# --------------------------------------------------------------------------- evaluation

BEAMS = 32  # in every evaluation, whatever the groups of the training

# The baseline that needs no RL is to ask the ranker at every request and to sort the
# policy's beams by log-probability + w * reward, the fused order. The w to choose from:
FUSION_WEIGHTS = (0, 1, 2, 4, 8, 16, 32)

Metrics = dict[str, np.ndarray]  # by name; a row for each user


@torch.no_grad()
def evaluate(policy: Policy, ranker: Ranker, split: Split, config: Config) -> Metrics:
    """Metrics of the N users of a split, each (N,) unless said; shares are in 0..1.

    hr@10              1 if the target is among the 10 likeliest rollouts, else 0
    ndcg@10            1 / log2(1 + rank of the target); 0 if it is not in the first 10
    hallucination      share of the 10 likeliest rollouts that name no item
    hr@10 fused        (N, W) hr@10 of the fused order, for each of FUSION_WEIGHTS
    auc in group       share of the group's negatives that the ranker puts below the
                       target; nan without a negative
    hard, clear, admit bool, of the gate, on these 32 beams
    """
    beams = replace(config, group=BEAMS, decode="beam")
    batches = []
    for start in tqdm(range(0, len(split.target), 128), leave=False, disable=None):
        history = torch.as_tensor(split.history[start : start + 128])
        target = torch.as_tensor(split.target[start : start + 128])
        batches.append(roll_out_and_score(policy, ranker, history, target, beams))
    columns = zip(*batches, strict=True)  # for each field of Scored, all its batches
    scored = Scored(*[torch.cat(column) for column in columns])

    hit = scored.hit.float()  # (N, 32)
    discount = 1 / torch.log2(1 + torch.arange(1, 11))  # of NDCG
    fused = []
    for weight in FUSION_WEIGHTS:
        score = scored.logp + weight * scored.rewards
        order = score.argsort(dim=1, descending=True, stable=True)
        fused.append(hit.gather(1, order)[:, :10].amax(1))

    negative = scored.valid & ~scored.hit
    is_beaten = negative & (scored.rewards < scored.target_reward[:, None])
    gate = gate_of(scored, config)
    metrics = {
        "hr@10": hit[:, :10].amax(1),
        "ndcg@10": (hit[:, :10] * discount).amax(1),
        "hallucination": (~scored.valid[:, :10]).float().mean(1),
        "hr@10 fused": torch.stack(fused, dim=1),
        "auc in group": is_beaten.sum(1) / negative.sum(1),
        "hard": gate.hard,
        "clear": gate.clear,
        "admit": gate.admit,
    }
    return {name: metric.cpu().numpy() for name, metric in metrics.items()}


class Result(NamedTuple):
    """What became of an arm."""

    validation: Metrics
    test: Metrics
    dose: float

    def best_fusion(self) -> int:
        """Which of FUSION_WEIGHTS is best on validation users: its place."""
        return int(self.validation["hr@10 fused"].mean(0).argmax())

    def fused(self) -> np.ndarray:
        """HR@10 (N,) of the test users in the fused order with that weight."""
        return self.test["hr@10 fused"][:, self.best_fusion()]


# ----------------------------------------------------------------------------- printing
# From here on there are tables, and then the command line.


def by_kind(shop: Shop) -> dict[str, np.ndarray]:
    """Masks (N,) over the test users: all of them, and each kind."""
    masks = {"all": np.ones(len(shop.test.target), dtype=bool)}
    for number, name in enumerate(shop.kinds):
        masks[name] = shop.test.kind == number
    return masks


def percent(metric: np.ndarray) -> float:
    return 100 * float(np.nanmean(metric))


def print_table(rows: dict[str, dict[str, str]]) -> None:
    """rows: name of the row -> {title of the column: cell}."""
    titles = list(next(iter(rows.values())))
    width = {title: max(8, len(title) + 2) for title in titles}
    print(f"\n{'':<17}" + "".join(f"{title:>{width[title]}}" for title in titles))
    for name, cells in rows.items():
        line = "".join(f"{cells[title]:>{width[title]}}" for title in titles)
        print(f"{name:<17}{line}")


def print_by_kind(shop: Shop, columns: dict[str, np.ndarray]) -> None:
    """The mean of each column (N,), in percent, over kinds of test users."""
    rows = {}
    for kind, mask in by_kind(shop).items():
        rows[kind] = {"users": f"{mask.sum()}"}
        for name, column in columns.items():
            rows[kind][name] = f"{percent(column[mask]):.1f}"
    print_table(rows)


def print_premise(shop: Shop, before: Result) -> None:
    """Before any post-training: does the ranker know what the policy does not?"""
    print("\nBefore post-training, percent of test users. fused: hr@10 if the ranker")
    print("helps to sort the 32 likeliest IDs, by log-probability + w * reward. If it")
    print("is not above hr@10, the ranker has little to teach.")
    columns = {"hr@10": before.test["hr@10"], "fused": before.fused()}
    for name in ("auc in group", "hard", "clear", "admit"):
        columns[name] = before.test[name]
    print_by_kind(shop, columns)


@torch.no_grad()
def print_examples(
    shop: Shop, policy: Policy, ranker: Ranker, before: Metrics, config: Config
) -> None:
    """What the gate sees: the group of one test user of each kind."""
    print("\nWhat the gate sees: 32 beams (the likeliest and the best-scored), for the")
    print("first test user of each kind whom it treats like most of that kind.")
    beams = replace(config, group=BEAMS, decode="beam")
    for number, kind in enumerate(shop.kinds):
        mask = shop.test.kind == number
        most = before["admit"][mask].mean() > 0.5  # are most of them admitted?
        user = int((mask & (before["admit"] == most)).argmax())  # the first of those
        history = torch.as_tensor(shop.test.history[user : user + 1])  # (1, H)
        target = torch.as_tensor(shop.test.target[user : user + 1])  # (1,)
        scored = roll_out_and_score(policy, ranker, history, target, beams)
        gate = gate_of(scored, config)
        advantages = group_advantages(scored.rewards)  # (1, G)
        best = int(scored.rewards[0].argmax())

        last_bought = [name_of(item) for item in policy.item_tokens[history[0, -3:]]]
        print(f"\n{kind}; last bought {', '.join(last_bought)}")
        for place in sorted({0, 1, 2, 3, 4, best}):
            print(f"  {place + 1:>2}. {name_of(scored.tokens[0, place]):<8}", end="")
            print(f"  policy {scored.logp[0, place].exp():.3f}", end="")
            print(f"  reward {scored.rewards[0, place]:.3f}", end="")
            print(f"  advantage {advantages[0, place]:+.2f}")
        print(f"  target {name_of(policy.item_tokens[target[0]])}", end="")
        print(f"  reward {scored.target_reward[0]:.3f}", end="")
        print(f"  difficulty {gate.difficulty[0]:.2f}", end="")
        print(f"  discriminability {gate.discriminability[0]:+.3f}", end="")
        print(f"  admitted: {bool(gate.admit[0])}")


def name_of(tokens: Tensor) -> str:
    return "-".join(str(token) for token in tokens.tolist())


def print_results(shop: Shop, before: Result, results: dict[str, Result]) -> None:
    """Two tables of test users: the arms by metric, and their gains by kind of user."""
    print("\nResults on test users, percent. fused: with the ranker at every request")
    print("and this w. Compare adagrpo alone with nll fused. dose: weight * share of")
    print("samples that got GRPO. Tune by the last column.")
    rows = {}
    for arm, result in {"before": before, **results}.items():
        rows[arm] = {
            "hr@10": f"{percent(result.test['hr@10']):.2f}",
            "fused": f"{percent(result.fused()):.2f}",
            "w": f"{FUSION_WEIGHTS[result.best_fusion()]}",
            "ndcg@10": f"{percent(result.test['ndcg@10']):.2f}",
            "hallucination": f"{percent(result.test['hallucination']):.2f}",
            "dose": f"{result.dose:.2f}",
            "validation hr@10": f"{percent(result.validation['hr@10']):.2f}",
        }
    print_table(rows)

    base = next(iter(results))  # the first arm is what the others are compared with
    print(f"\nhr@10 of {base} by kind of user, and points more or less than {base}.")
    columns = {base: results[base].test["hr@10"]}
    for arm, result in results.items():
        if arm != base:
            columns[arm] = result.test["hr@10"] - columns[base]
    print_by_kind(shop, columns)


# ------------------------------------------------------------------------------ command


def command_line(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The settings, and the other options: arms, device, save."""
    parser = argparse.ArgumentParser(
        description="AdaGRPO: GRPO from a biased ranker, gated sample by sample.",
        epilog="Class Config says what the settings mean.",
    )
    add = parser.add_argument
    names = list(make_arms(Config()))
    arms = ["nll", "mix-1", "adagrpo"]
    add("--arms", nargs="+", choices=names, default=arms, help="the first is the base")
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--save", type=Path, metavar="FOLDER", help="where the policies are saved")
    for field in fields(Config):
        option = "--" + field.name.replace("_", "-")
        add(option, type=field.type, default=field.default, help=f"({field.default})")
    options = parser.parse_args(argv)

    config = Config(**{f.name: getattr(options, f.name) for f in fields(Config)})
    if config.decode not in ("beam", "sample"):
        parser.error(f"argument --decode: must be beam or sample, got {config.decode}")
    if config.group < 2:
        parser.error(f"argument --group: must be at least 2, got {config.group}")
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        parser.error(f"argument --device: {error}")
    return config, options


def main(argv: list[str] | None = None) -> None:
    """The whole experiment."""
    config, options = command_line(argv)
    torch.set_num_threads(1)  # the tensors are tiny
    torch.set_default_device(options.device)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)

    shop = make_shop(config.seed, config.bias, {"posttrain": config.users})
    pretrained = pretrain(shop, config)
    ranker = train_ranker(shop, config)

    def judge(policy: Policy, dose: float) -> Result:
        validation = evaluate(policy, ranker, shop.validation, config)
        test = evaluate(policy, ranker, shop.test, config)
        return Result(validation, test, dose)

    before = judge(pretrained, dose=0.0)
    print_premise(shop, before)
    print_examples(shop, pretrained, ranker, before.test, config)

    print("\nPost-training")
    results = {}
    for name in options.arms:
        rule, weight = make_arms(config)[name]
        policy = copy.deepcopy(pretrained)
        dose = post_train(policy, ranker, shop.posttrain, rule, weight, config, name)
        results[name] = judge(policy, dose)
        if options.save:
            torch.save(policy.state_dict(), options.save / f"{name}.pt")
    print_results(shop, before, results)
    print("\nThis is one seed, a first look. Ten seeds are in .github/RESULTS.md.")


if __name__ == "__main__":
    main()
