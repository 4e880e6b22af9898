# SPDX-License-Identifier: MIT
"""AdaGRPO in one file: reinforcement learning for generative recommendation with a biased ranker.

A policy writes the semantic ID of the next item; a ranker scores what it wrote. The ranker is right
about some samples and wrong about others, because its log shows only what an old feed exposed.
AdaGRPO trains EVERY sample with supervised NLL and lets the GRPO term in only where the policy
finds the sample hard AND the ranker can tell the true item from the group's negatives.

Paper: Xu et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative Recommendation",
arXiv 2606.08480 (2026). Only its abstract was available: the idea is theirs, every definition below
is ours unless a source is named. GRPO itself: Shao et al., DeepSeekMath, arXiv 2402.03300.

  (1) rollouts          o_1..o_G from policy(. | x): beams or samples, likeliest first
  (2) difficulty        d = share of the group ahead of the target y; 1 if y is not in the group
  (3) discriminability  m = r(y) - mean r(o_i) over the negatives: valid o_i other than y
  (4) gate              g = [d >= min_difficulty and m >= min_margin], 0 or 1, no gradient
  (5) advantage         A_i = (r(o_i) - mean r) / std r within the group; exactly 0 if r is flat
  (6) GRPO              -mean_i min(ratio_i A_i, clip(ratio_i) A_i), ratio on the whole item
  (7) loss              mean over the batch of NLL + weight * g * GRPO

x is a history; r is the ranker's click probability, 0 where an ID names no item (a hallucination).
Shapes: B samples, G rollouts each, T prompt tokens, V tokens in all, L = 3 tokens per item.
Start at `training_step`, the seven equations on one screen, or read from the top. Left out on
purpose: KL to a reference policy (NLL is the anchor), several updates per rollout (so the ratio is
1), constrained decoding (it would hide hallucinations), distributed training.
"""

import argparse
import ast
import copy
import hashlib
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import CODEBOOK, HISTORY, ITEMS, KINDS, Split, World, make_world

L = len(CODEBOOK)  # tokens per item
VOCAB = sum(CODEBOOK)  # every level of the semantic ID has tokens of its own
OFFSET = (0, CODEBOOK[0], CODEBOOK[0] + CODEBOOK[1])  # the first token of each level


# ------------------------------------------------------------------------------ policy and ranker
class Block(nn.Module):
    """Pre-norm transformer block that can attend to the keys and values of an earlier call."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple | None, sees: Tensor | None):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), (k, v)


class Policy(nn.Module):
    """A small GPT over semantic-ID tokens; decoding is free, so it may name no item.

    forward(tokens (B, N)) -> log-probabilities of what follows each token (B, N, V), and a cache of
    keys and values. With `cache`, the N tokens are the next tokens of N branches of the cached
    prompt, all at position `start`, and `sees` (B, 1, N, keys) says what each may attend to.
    """

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, vocab: int = VOCAB):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(L * (HISTORY + 1), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: list | None = None, start: int = 0, sees=None):
        where = torch.arange(tokens.shape[1]) if cache is None else torch.tensor(start)
        x, new = self.token(tokens) + self.position(where), []
        for i, block in enumerate(self.blocks):
            x, keys = block(x, cache and cache[i], sees)
            new.append(keys)
        return self.head(self.norm(x)).log_softmax(-1), new


class Ranker(nn.Module):
    """Click model: an MLP on [user, item, 10 * user * item]; user = mean embedding of the history.

    forward(history (B, 8), items (B, K)), both item numbers -> click logits (B, K). The mean is a
    bag: the ranker cannot see in which order things were bought.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.past, self.item = nn.Embedding(ITEMS, width), nn.Embedding(ITEMS, width)
        nn.init.normal_(self.past.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        layers = nn.Linear(3 * width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        self.mlp = nn.Sequential(*layers, nn.Linear(64, 1))

    def forward(self, history: Tensor, items: Tensor) -> Tensor:
        item = self.item(items)  # (B, K, width)
        user = self.past(history).mean(1, keepdim=True).expand_as(item)
        return self.mlp(torch.cat([user, item, 10 * user * item], dim=-1)).squeeze(-1)

    @torch.no_grad()
    def rewards(self, history: Tensor, items: Tensor) -> Tensor:
        """Click probabilities (B, K); 0, below every item's, for a hallucination (-1)."""
        return torch.where(items < 0, 0.0, self(history, items.clamp(min=0)).sigmoid())


def fit(model: nn.Module, lr: float, batches: list, loss_of: Callable, label: str, after=None):
    """One AdamW update per batch: warm-up, linear decay towards 0, gradient norm at most 1."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    worker = multiprocessing.current_process().name  # SpawnProcess-2: its bar is line 2
    line = int("".join(filter(str.isdigit, worker)) or 0)
    for step, batch in enumerate(tqdm(batches, label, leave=False, disable=None, position=line)):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - step / len(batches))
        optimizer.zero_grad()
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after:
            after(step + 1)
    return model


def shuffled(rows: int, size: int, epochs: int) -> list[Tensor]:
    return [batch for _ in range(epochs) for batch in torch.randperm(rows).split(size)]


def train_ranker(world: World, negatives: int) -> Ranker:
    """BCE on clicks, plus random catalogue items per slate labelled "no click".

    As in production, what the feed never showed is learned from those random negatives only.
    """
    ranker, shown = Ranker(), torch.as_tensor(world.shown)
    history, clicked = torch.as_tensor(world.feed.history), torch.as_tensor(world.clicked).float()

    def loss_of(rows: Tensor) -> Tensor:
        items = torch.cat([shown[rows], torch.randint(ITEMS, (len(rows), negatives))], dim=1)
        labels = F.pad(clicked[rows], (0, negatives))  # (B, 10 + negatives)
        return F.binary_cross_entropy_with_logits(ranker(history[rows], items), labels)

    return fit(ranker, 6e-3, shuffled(len(shown), 512, 3), loss_of, "ranker")


class Shop:
    """What all arms of a seed share: the world as tensors, and its ranker."""

    def __init__(self, world: World, ranker: Ranker):
        self.world, self.ranker = world, ranker
        self.tokens = torch.as_tensor(world.codes + np.array(OFFSET))  # (ITEMS, 3)
        self.item_of = torch.full((VOCAB,) * L, -1)  # tokens -> item; -1: a hallucination
        self.item_of[self.tokens.unbind(1)] = torch.arange(ITEMS)

    def batches(self, split: Split, size: int) -> list[tuple[Tensor, ...]]:
        """history (B, 8), target (B,), kind (B,) and taste (B, DIM) of `size` users at a time."""
        columns = (split.history, split.target, split.kind, split.taste)
        return list(zip(*(torch.as_tensor(c).split(size) for c in columns), strict=True))

    def prompt(self, history: Tensor) -> Tensor:
        return self.tokens[history].flatten(1)  # (B, 8) item numbers -> (B, T) tokens

    def judge(self, history: Tensor, target: Tensor, tokens: Tensor, config):
        """Of rollouts (B, G, 3): their rewards (B, G), the target's reward (B,), and the gate."""
        items, y = self.item_of[tokens.unbind(-1)], target[:, None]  # (B, G), (B, 1)
        rewards, own = self.ranker.rewards(history, items), self.ranker.rewards(history, y)[:, 0]
        bounds = {"min_difficulty": config.min_difficulty, "min_margin": config.min_margin}
        return rewards, own, adagrpo_gate(own, rewards, items == y, items >= 0, **bounds)


def pretrain(shop: Shop) -> Policy:
    """Next-token NLL on every position of last season's purchase sequences."""
    policy, split = Policy(), shop.world.pretrain
    bought = np.column_stack([split.history, split.target])
    tokens = shop.prompt(torch.as_tensor(bought))  # (N, 27)

    def loss_of(rows: Tensor) -> Tensor:
        logp, _ = policy(tokens[rows, :-1])
        return F.nll_loss(logp.flatten(0, 1), tokens[rows, 1:].flatten())

    return fit(policy, 1e-3, shuffled(len(tokens), 128, 4), loss_of, "pre-training")


# -------------------------------------------------------------------------------------- rollouts
def continuations(total: Tensor, logp: Tensor, group: int, decode: str) -> tuple[Tensor, Tensor]:
    """Which branch goes on with which token, (B, G) each; total (B, Q), logp (B, Q, V)."""
    B, Q, V = logp.shape
    if decode == "beam":  # the best of all Q * V continuations
        best = (total[..., None] + logp).flatten(1).topk(min(group, Q * V)).indices
        return best // V, best % V
    parent = torch.arange(group) * Q // group  # G draws from the root, then one from every branch
    token = torch.multinomial(logp[:, parent].exp().flatten(0, 1), 1).view(B, group)
    return parent.expand(B, -1), token


def rollout(policy: Policy, prompt: Tensor, target: Tensor, group: int, decode: str):
    """Eq. (1): rollouts (B, G, 3), their log-probabilities (B, G), and the target's (B,).

    prompt (B, T) is encoded once; each branch attends to it and to its own tokens (mask `sees`), so
    G costs little. The target (B, 3) is one more branch whose tokens are given: NLL needs no second
    forward. `decode`: "beam" keeps the `group` likeliest prefixes, "sample" draws from the policy;
    both from all V tokens. Likeliest first, whichever way they were found. The scheme is ours.
    """
    if decode not in ("beam", "sample") or group < 2:
        raise ValueError(f"decode must be beam or sample and group >= 2, got {decode!r}, {group}")
    (B, T), row = prompt.shape, torch.arange(len(prompt))[:, None]
    logp, cache = policy(prompt)
    logp, tokens = logp[:, -1:], prompt[:, :0].view(B, 1, 0)  # one branch so far, the root
    total, sees = torch.zeros(B, 1), torch.ones(B, 1, T, dtype=torch.bool)
    for level in range(L):
        free = slice(-1) if level else slice(None)  # all branches but the target's
        with torch.no_grad():  # which branches exist carries no gradient
            parent, token = continuations(total[:, free], logp[:, free], group, decode)
        parent = F.pad(parent, (0, 1), value=logp.shape[1] - 1)  # the target's goes on with itself
        token = torch.cat([token, target[:, level, None]], dim=1)  # (B, G + 1)
        total = total.gather(1, parent) + logp.flatten(1).gather(1, parent * logp.shape[2] + token)
        tokens = torch.cat([tokens[row, parent], token[..., None]], dim=2)
        if level < L - 1:  # a branch sees what its parent saw, and itself
            itself = torch.eye(token.shape[1], dtype=torch.bool).expand(B, -1, -1)
            sees = torch.cat([sees[row, parent], itself], dim=2)  # (B, G + 1, keys)
            logp, cache = policy(token, cache, T + level, sees[:, None])
    order = total[:, :-1].argsort(dim=1, descending=True)
    return tokens[row, order], total[row, order], total[:, -1]


# ---------------------------------------------------------- the method: gate, advantages, losses
class Gate(NamedTuple):
    admit: Tensor  # (B,) bool: hard and clear
    hard: Tensor  # (B,) bool: difficulty reaches its threshold
    clear: Tensor  # (B,) bool: discriminability reaches its threshold
    difficulty: Tensor  # (B,) in 0..1
    discriminability: Tensor  # (B,) in -1..1, nan where undefined


@torch.no_grad()
def adagrpo_gate(
    target_reward: Tensor,  # (B,) the ranker's click probability of the true item
    rollout_rewards: Tensor,  # (B, G) and of the rollouts, likeliest first
    hit: Tensor,  # (B, G) bool: the rollout is the true item
    valid: Tensor,  # (B, G) bool: the rollout names an item
    *,
    min_difficulty: float,  # in 0..1
    min_margin: float,  # in -1..1
) -> Gate:
    """Eq. (2)-(4): admit GRPO per sample where the policy finds it hard and the ranker is clear.

    Needs torch alone: copy it. The G columns stand in the policy's order, likeliest first. A margin
    and not a rank: where the ranker is blind its scores are all but equal, and a rank cannot see
    that. Thresholds are inclusive. A sample without a valid negative or with a non-finite reward
    stays out (its discriminability is nan). Raises ValueError or TypeError naming the argument.
    Source: the two diagnostics and the binary clip are the paper's; their formulas are ours.
    """
    shape = tuple(rollout_rewards.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"rollout_rewards must be (B, G) with G >= 2, got {shape}")
    if target_reward.shape != shape[:1]:
        raise ValueError(f"target_reward must be {shape[:1]}, got {tuple(target_reward.shape)}")
    for name, mask in (("hit", hit), ("valid", valid)):
        if mask.shape != shape or mask.dtype != torch.bool:
            error = TypeError if mask.dtype != torch.bool else ValueError
            raise error(f"{name} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
    if not (0 <= min_difficulty <= 1 and -1 <= min_margin <= 1):
        got = f"{min_difficulty}, {min_margin}"
        raise ValueError(f"min_difficulty must be in [0, 1], min_margin in [-1, 1], got {got}")
    difficulty = (hit.cumsum(1) == 0).sum(1) / shape[1]  # (B,)  eq. (2)
    negative = valid & ~hit  # (B, G)
    mean = torch.where(negative, rollout_rewards, 0.0).sum(1) / negative.sum(1)  # (B,)
    known = rollout_rewards.isfinite().all(1) & target_reward.isfinite() & negative.any(1)
    discriminability = torch.where(known, target_reward - mean, torch.nan)  # (B,)  eq. (3)
    hard, clear = difficulty >= min_difficulty, discriminability >= min_margin
    return Gate(hard & clear, hard, clear, difficulty, discriminability)  # eq. (4)


def group_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """Eq. (5): rewards (B, G) standardised within each group -> (B, G), population std.

    A flat group (std at most 1e-6) gets exactly 0, not rounding error over rounding error; so does
    a group with a non-finite reward. normalize=False only centres, as Dr. GRPO does (arXiv
    2503.20783). Raises ValueError where rewards is not (B, G) with G >= 2. Source: GRPO.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G >= 2, got {tuple(rewards.shape)}")
    std = rewards.std(1, correction=0, keepdim=True)  # (B, 1), nan where a reward is not finite
    centred = rewards - rewards.mean(1, keepdim=True)  # (B, G)
    return torch.where(std > 1e-6, centred / std if normalize else centred, 0.0)


def grpo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Eq. (6): the clipped surrogate per sample; three (B, G) tensors -> (B,).

    With one update per rollout old_logp is logp.detach(): every ratio is 1 and the printed loss is
    -mean(A) = 0. Its gradient, -mean(A_i * grad logp_i), is not. Raises ValueError on unequal
    shapes. Source: GRPO without KL; the ratio is per item, not per token.
    """
    if not logp.shape == old_logp.shape == advantages.shape:
        shapes = [tuple(t.shape) for t in (logp, old_logp, advantages)]
        raise ValueError(f"logp, old_logp and advantages must be one (B, G), got {shapes}")
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean(1)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): three (B,) tensors -> scalar. Ours but for the gate.

    The denominator is B, not the number admitted: the dose of RL is weight * admission rate.
    Raises ValueError on unequal shapes or a negative weight, TypeError where admit is not bool.
    """
    if not nll.shape == grpo.shape == admit.shape or not weight >= 0:
        shapes = [tuple(t.shape) for t in (nll, grpo, admit)]
        raise ValueError(f"nll, grpo, admit must be (B,), weight >= 0, got {shapes}, {weight}")
    if admit.dtype != torch.bool:
        raise TypeError(f"admit must be a bool tensor, got {admit.dtype}")
    return (nll + weight * torch.where(admit, grpo, 0.0)).mean()


# ---------------------------------------------------------------------------- training, by arms

# An arm is RULE or RULE-WEIGHT, as in mix-0.3: which samples the GRPO term sees, and how strongly.
# Nothing else differs. `kind` is the world's truth, for the oracle alone.
RULES: dict[str, Callable[[Gate, Tensor], Tensor]] = {
    "nll": lambda gate, kind: torch.zeros_like(gate.admit),
    "mix": lambda gate, kind: torch.ones_like(gate.admit),  # no gate; mix-1000 is GRPO alone
    "adagrpo": lambda gate, kind: gate.admit,
    "difficulty": lambda gate, kind: gate.hard,
    "discriminability": lambda gate, kind: gate.clear,
    "random": lambda gate, kind: gate.admit[torch.randperm(len(kind))],  # at the same rate
    "inverted": lambda gate, kind: ~gate.admit,
    "oracle": lambda gate, kind: kind == KINDS.index("trend"),
    "centred": lambda gate, kind: torch.ones_like(gate.admit),  # a mixture without "/ std"
    "reweight": lambda gate, kind: gate.admit,  # more NLL in place of GRPO
}


def training_step(policy: Policy, shop: Shop, arm: str, config, batch: tuple):
    """The method on one screen: a batch of one arm -> its loss, and who was admitted (B,)."""
    history, target, kind, _ = batch
    rule, _, weight = arm.partition("-")
    prompt, y = shop.prompt(history), shop.tokens[target]  # (B, T), (B, 3)
    tokens, logp, target_logp = rollout(policy, prompt, y, config.group, config.decode)  # eq. (1)
    rewards, _, gate = shop.judge(history, target, tokens, config)  # eq. (2), (3), (4)
    admit = RULES[rule](gate, kind)  # (B,)
    advantages = group_advantages(rewards, normalize=rule != "centred")  # eq. (5)
    grpo = grpo_loss(logp, logp.detach(), advantages)  # eq. (6)
    nll = -target_logp
    extra = nll if rule == "reweight" else grpo
    return adagrpo_loss(nll, extra, admit, float(weight or config.weight)), admit  # eq. (7)


def train(policy: Policy, shop: Shop, arm: str, groups: dict[str, Tensor], config) -> list[dict]:
    """Post-train `policy` by one arm: test figures of its best (on validation) and final state."""
    admitted, checkpoints, records = [], [], []

    def loss_of(batch: tuple) -> Tensor:
        loss, admit = training_step(policy, shop, arm, config, batch)
        admitted.append(100 * admit.float().mean().item())
        return loss

    def validate(step: int) -> None:
        if step * 3 % config.steps < 3:  # three times, the last after the last step
            hr = evaluate(policy, shop, shop.world.validation)["hr@10"].mean().item()
            checkpoints.append((hr, copy.deepcopy(policy)))

    fit(policy, 1e-3, shop.batches(shop.world.posttrain, config.batch), loss_of, arm, validate)
    best, final = max(checkpoints, key=lambda checkpoint: checkpoint[0]), checkpoints[-1]
    for name, (hr, model) in {"best": best, "final": final}.items():
        if not records or best is not final:  # no model is tested twice
            figures = summary(evaluate(model, shop, shop.world.test), groups)
        record = {"arm": arm, "checkpoint": name, "admitted": float(np.mean(admitted))}
        record |= {"metrics": {metric: figures["all"][metric] for metric in METRICS}}
        records.append(record | {"validation": {"hr@10": hr}, "groups": figures})
    return records


# ------------------------------------------------------------------------------------ evaluation

METRICS = ("hr@5", "hr@10", "hr@20", "ndcg@10", "hallucination", "ctr", "dwell")


@torch.no_grad()
def evaluate(policy: Policy, shop: Shop, split: Split) -> dict[str, Tensor]:
    """Beam-search all V^3 IDs for every user, no candidate list; a figure per user, (N,) each.

    hr@K and ndcg@10: where the target stands among the beams. hallucination: share of the top 10
    that names no item. ctr, dwell: of the top 10, by the world's truth (simulated). All in percent,
    dwell in seconds.
    """
    parts, discount = [], torch.arange(2, 12).log2()
    for history, target, _, taste in shop.batches(split, 100):
        beams, _, _ = rollout(policy, shop.prompt(history), shop.tokens[target], 20, "beam")
        items = shop.item_of[beams.unbind(-1)]  # (B, 20)
        found, top = (items == target[:, None]).float(), items[:, :10]
        truth = shop.world.true_clicks_and_dwell(taste.cpu().numpy(), top.cpu().numpy())
        clicks, dwell = (torch.as_tensor(x.mean(1, dtype=np.float32)) for x in truth)
        shares = [found[:, :5].sum(1), found[:, :10].sum(1), found.sum(1)]
        shares += [(found[:, :10] / discount).sum(1), (top < 0).float().mean(1), clicks]
        parts.append(torch.stack([*(100 * share for share in shares), dwell]).cpu())
    return dict(zip(METRICS, torch.cat(parts, dim=1), strict=True))


@torch.no_grad()
def survey(policy: Policy, shop: Shop, config) -> tuple[dict[str, Tensor], list[str]]:
    """What the gate sees of test users: figures (N,) in percent, and three groups as text.

    auc: the ranker's, the target against 100 random items. hard, clear: the gate's two tests. The
    text shows the first shopper of each kind who meets the fate that the gate has for the kind.
    """
    parts, text = [], {}
    fates = (("trend", True, True), ("series", False, True), ("niche", True, False))
    for history, target, kind, _ in shop.batches(shop.world.test, 100):
        prompt, y = shop.prompt(history), shop.tokens[target]
        tokens, logp, _ = rollout(policy, prompt, y, config.group, config.decode)
        rewards, own, gate = shop.judge(history, target, tokens, config)
        others = shop.ranker.rewards(history, torch.randint(ITEMS, (len(target), 100)))
        auc = (others < own[:, None]).float().mean(1)
        parts.append(100 * torch.stack([auc, gate.hard, gate.clear]).cpu())
        for name, hard, clear in fates:
            fits = (kind == KINDS.index(name)) & (gate.hard == hard) & (gate.clear == clear)
            if name not in text and fits.any():
                columns = (prompt, y, own, tokens, logp, rewards, *gate)
                text[name] = example(name, *(column[fits][0] for column in columns))
    figures = dict(zip(("auc", "hard", "clear"), torch.cat(parts, dim=1), strict=True))
    return figures, [line for lines in text.values() for line in lines]


def example(kind, prompt, y, own, tokens, logp, rewards, admit, hard, clear, difficulty, margin):
    """One group as lines of text: end of the history, target, the five likeliest rollouts, gate."""

    def name(item: Tensor) -> str:
        return "-".join(str(code) for code in (item - torch.tensor(OFFSET)).tolist())

    past = "  ".join(name(item) for item in prompt.view(-1, L)[-3:])
    lines = [f"{kind} shopper: {'admitted' if admit else 'refused'}", f"  history ...  {past}"]
    lines.append(f"  target  {name(y):<24}reward {own:.3f}")
    advantages = group_advantages(rewards[None])[0]
    for i in range(min(5, len(tokens))):
        figures = f"policy {logp[i].exp():.3f}  reward {rewards[i]:.3f}  "
        figures += f"advantage {advantages[i]:+.2f}{'  <- target' * tokens[i].equal(y)}"
        lines.append(f"  rollout {name(tokens[i]):<10}{figures}")
    tests = f"{'hard' if hard else 'easy'}, {'clear' if clear else 'not clear'}"
    return [*lines, f"  difficulty {difficulty:.2f}, discriminability {margin:+.3f}: {tests}"]


def summary(figures: dict[str, Tensor], groups: dict[str, Tensor]) -> dict[str, dict]:
    """The mean of each figure (N,) over each group of users, None where a group is empty."""
    means = {}
    for group, users in groups.items():
        means[group] = {"users": int(users.sum())}
        for name, values in figures.items():
            means[group][name] = values[users].mean().item() if users.any() else None
    return means


# -------------------------------------------------------------------- experiment: seeds and arms
def code_hash() -> str:
    """Of this program without comments and docstrings: which code made a figure."""
    files = [Path(__file__).with_name(name) for name in ("toy_data.py", "adagrpo.py")]
    code = [re.sub(r'"""[\s\S]*?"""', '""', file.read_text()) for file in files]
    return hashlib.sha256(ast.dump(ast.parse("".join(code))).encode()).hexdigest()[:12]


def write(file: Path, content) -> None:
    """JSON, whole or not at all."""
    draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(file)


def collect(config) -> list[dict]:
    """All records in config.out, gathered in its results.json; ValueError naming a bad file."""
    records = []
    for file in sorted(config.out.glob("seed*.json")):
        try:
            records += json.loads(file.read_text())
            foreign = config.settings.items() - records[-1]["settings"].items()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged, delete it") from error
        if foreign:
            raise ValueError(f"{file} was not made with {dict(foreign)}, choose another folder")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = np.__version__
    write(config.out / "results.json", {"versions": versions, "runs": records})
    return records


def work(config, seed: int, arms: list[str]) -> None:
    """One process's share: train those of a seed's arms that config.out does not hold yet."""
    files = {arm: config.out / f"seed{seed}-{arm}.json" for arm in arms}
    if all(file.exists() for file in files.values()):
        return
    torch.set_num_threads(1)  # tensors are tiny: processes side by side use the cores better
    if config.device != "cpu":  # on a CPU it would only cost time
        torch.set_default_device(config.device)
    sizes = {"posttrain": config.steps * config.batch} | (QUICK if config.quick else {})
    world = make_world(seed, bias=config.bias, **sizes)
    torch.manual_seed(seed)
    shop = Shop(world, train_ranker(world, config.negatives))
    torch.manual_seed(seed)  # the same start, whatever the ranker's training drew
    start = pretrain(shop)
    seen, text = survey(start, shop, config)
    hard, clear = seen["hard"] > 0, seen["clear"] > 0
    groups = {"all": hard | ~hard}
    groups |= {name: torch.from_numpy(world.test.kind == k) for k, name in enumerate(KINDS)}
    groups |= {"hard+clear": hard & clear, "hard+unclear": hard & ~clear}
    groups |= {"easy+clear": ~hard & clear, "easy+unclear": ~hard & ~clear}
    head = {"settings": config.settings, "code": config.code, "seed": seed}
    head |= {"before": summary(seen | evaluate(start, shop, world.test), groups), "saw": text}
    for arm, file in files.items():
        if not file.exists():
            torch.manual_seed(seed)
            records = train(copy.deepcopy(start), shop, arm, groups, config)
            write(file, [head | record for record in records])


# ---------------------------------------------------------------------------------------- report

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student, 1 to 9 degrees of freedom


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95% interval (0 for one seed, which has none)."""
    if len(values) < 2:
        return values[0], 0.0
    factor = T95[min(len(values) - 2, 8)] / len(values) ** 0.5
    return float(np.mean(values)), float(factor * np.std(values, ddof=1))


def report(config, records: list[dict]) -> None:
    """The premise, what the gate saw, arms by metric, arms by group of users."""
    seeds, base = range(config.seed, config.seed + config.seeds), config.arms[0]
    runs = {(r["seed"], r["arm"], r["checkpoint"]): r for r in records}
    first = runs[config.seed, base, "final"]

    def row(name: str, cells: Iterable[str]) -> None:
        print(f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells))

    def cell(arm: str, checkpoint: str, *keys: str) -> str:
        values = [reduce(getitem, keys, runs[seed, arm, checkpoint]) for seed in seeds]
        if None in values:  # a group without users
            return "-"
        if arm != base:  # paired by seed
            nll = [reduce(getitem, keys, runs[seed, base, checkpoint]) for seed in seeds]
            values = [value - level for value, level in zip(values, nll, strict=True)]
        mean, half = interval(values)
        return f"{mean:{'+' * (arm != base)}.2f}" + f" ±{half:.2f}" * (len(seeds) > 1)

    row("Before post-training", KINDS)
    row("  users", [str(first["before"][kind]["users"]) for kind in KINDS])
    for name in ("hr@10", "auc", "hard", "clear"):
        row(f"  {name}", [cell(base, "final", "before", kind, name) for kind in KINDS])
    print(f"\nWhat the gate saw, seed {config.seed}", *first["saw"], sep="\n  ")
    print(f"\nDifferences to {base}; ±: 95% over seeds (one seed is a look, try --seeds 5)")
    row("arm", METRICS)
    for arm in config.arms:
        row(arm, [cell(arm, "final", "metrics", metric) for metric in METRICS])
        if any(runs[s, arm, "best"]["metrics"] != runs[s, arm, "final"]["metrics"] for s in seeds):
            row(f"{arm}, best", [cell(arm, "best", "metrics", metric) for metric in METRICS])
    row("\nhr@10 by group", first["groups"])
    for arm in config.arms:
        row(arm, [cell(arm, "final", "groups", group, "hr@10") for group in first["groups"]])


# --------------------------------------------------------------------------------------- command

ARMS = ["nll", "mix-0.3", "mix-1", "difficulty", "discriminability", "adagrpo"]
QUICK = {"test": 300, "validation": 100, "pretrain": 4_000, "feed": 20_000}
NUMBERS = {  # default, smallest, largest, meaning
    "seed": (0, 0, 2**31, "first seed: world, initial weights, rollouts"),
    "seeds": (1, 1, 1000, "how many; from 2 on the tables hold intervals over seeds"),
    "jobs": (0, 0, 1000, "processes side by side; 0: one a core, or one on a GPU"),
    "bias": (1.0, 0.0, 10.0, "exposure bias of the feed, 0 = none"),
    "negatives": (2, 0, 100, "random negatives per slate in the ranker's training"),
    "steps": (1200, 4, 10**6, "post-training steps, each on fresh users"),
    "batch": (8, 1, 10**5, "users per step (B)"),
    "group": (32, 2, 1000, "rollouts per user (G)"),
    "weight": (5.0, 0.0, 1e6, "of the GRPO term where the arm names none"),
    "min_difficulty": (0.3, 0.0, 1.0, "gate: share of the group ahead of the target"),
    "min_margin": (0.01, -1.0, 1.0, "gate: target's reward over its negatives' mean"),
}


def settings(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a bad setting ends with exit status 2 and a line that names it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--arms", nargs="+", default=ARMS, help=f"RULE or RULE-WEIGHT; rules: {', '.join(RULES)}")
    for name, (default, _, _, text) in NUMBERS.items():
        text = f"{text} (default {default})"
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    add("--decode", choices=("beam", "sample"), default="beam", help="how rollouts are made")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--out", type=Path, help="folder that keeps finished arms and results.json; resumes there")
    add("--quick", action="store_true", help="tiny world, 40 steps: a look, not a result")
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(steps=40, group=16)
    config = parser.parse_args(argv)
    for name, (_, low, high, _) in NUMBERS.items():
        if not low <= vars(config)[name] <= high:
            parser.error(f"--{name} must be in [{low}, {high}], got {vars(config)[name]}")
    for arm in config.arms:
        if not re.fullmatch(rf"({'|'.join(RULES)})(-\d*\.?\d+)?", arm):
            parser.error(f"--arms: unknown arm {arm!r}; RULE or RULE-WEIGHT of {', '.join(RULES)}")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [device for device in here if here[device]] + ["cpu"]
    config.device = here[0] if config.device == "auto" else config.device
    if config.device not in here:
        parser.error(f"--device: {config.device} is not here, only {', '.join(here)}")
    config.jobs = config.jobs or (os.cpu_count() if config.device == "cpu" else 1)
    return config


def main(argv: list[str] | None = None) -> None:
    """Train what config.out lacks, in config.jobs processes, and report."""
    config = settings(argv)
    identity = ("arms", "seed", "seeds", "jobs", "out")  # they do not change a run's figures
    config.settings = {name: v for name, v in vars(config).items() if name not in identity}
    config.code = code_hash()
    parts = -(-config.jobs // config.seeds)  # processes that share a seed
    seeds = range(config.seed, config.seed + config.seeds)
    shares = [(config, seed, config.arms[k::parts]) for seed in seeds for k in range(parts)]
    with tempfile.TemporaryDirectory() as folder:
        config.out = config.out or Path(folder)
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            collect(config)  # complains before hours of work
        except (OSError, ValueError) as error:
            sys.exit(f"adagrpo.py: --out: {error}")
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        with ProcessPoolExecutor(config.jobs, spawn) as pool:
            list(pool.map(work, *zip(*shares, strict=True)))
        report(config, collect(config))


if __name__ == "__main__":
    main()
