"""AdaGRPO in one file: reinforcement learning for generative recommendation with a biased ranker.

A policy writes the semantic ID of the next item; a ranker scores what it wrote. The ranker is right
about some samples and wrong about others, because its log shows only what an old feed exposed.
AdaGRPO trains EVERY sample with supervised NLL and lets the GRPO term in only where the policy
finds the sample hard AND the ranker can tell the true item from the group's negatives.

Reference: Xu et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative Recommendation",
arXiv 2606.08480 (2026). Only its abstract was available: the idea is theirs, every definition below
is ours unless a source is named. GRPO itself: Shao et al., DeepSeekMath, arXiv 2402.03300.

  (1) rollouts          o_1..o_G from policy(. | x), by sampling or as the top-G beams
  (2) difficulty        d = share of the o_i that are not the target y
  (3) discriminability  m = r(y) - mean of r(o_i) over the negatives: valid o_i other than y
  (4) gate              g = [d >= min_difficulty and m >= min_margin], 0 or 1, no gradient
  (5) advantage         A_i = (r(o_i) - mean r) / std r within the group; exactly 0 if r is flat
  (6) GRPO              -mean_i min(ratio_i A_i, clip(ratio_i) A_i), ratio on the whole item
  (7) loss              mean over the B samples of NLL + weight * g * GRPO

  name in the code   symbol  shape      meaning
  history            x       (B, T)     tokens of the prompt: start token, then 3 per past item
  target             y       (B, 3)     tokens of the item that was really bought next
  tokens             o       (B, G, 3)  rollouts: G branches of the same prompt
  rewards            r       (B, G)     ranker's click probability; 0 where the ID names no item
  logp               log pi  (B, G)     log-probability of a whole rollout, with gradient
  hit, valid                 (B, G)     the rollout is the target; it names an item at all
  admit              g       (B,)       the gate

Left out on purpose: KL to a reference policy (NLL is the anchor), several updates per rollout (so
the ratio is 1), constrained decoding (it would hide hallucinations), distributed training.

  pip install -r requirements.txt && python adagrpo.py      # all of it, minutes on a laptop's CPU
  python adagrpo.py --quick                                 # the same path in seconds
  python adagrpo.py --help                                  # every setting
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import CODEBOOK, HISTORY, Split, World, make_world

L = len(CODEBOOK)  # tokens per item
VOCAB = sum(CODEBOOK) + 1  # every level has tokens of its own; the last token starts a sequence
OFFSET = (0, CODEBOOK[0], CODEBOOK[0] + CODEBOOK[1])  # first token of each level


def tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(array, device=device)


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting there is; the command line is generated from these lines."""

    arms: tuple = option(
        ("nll", "mix-0.1", "mix-0.3", "mix-1", "adagrpo"),
        "RULE or RULE-WEIGHT; rules: nll mix grpo adagrpo random inverted difficulty"
        " discriminability oracle reweight easy+clear hard+blind easy+blind",
    )
    seed: int = option(0, "first seed; a seed fixes world, initial weights and rollouts")
    seeds: int = option(1, "how many seeds; from 2 on, intervals are over seeds")
    device: str = option("auto", "auto, cpu, cuda or mps")
    out: str = option("", "directory for results.json, weights and finished arms (resumes there)")
    quick: bool = option(False, "the whole path on a tiny world: a first look, not a result")
    study: bool = option(False, "train every arm that the paper's claims need; print the verdicts")
    bias: float = option(1.0, "exposure bias of the feed, 0 = none")
    width: int = option(64, "width of the policy; 2 layers of 4 heads")
    pretrain_epochs: int = option(8, "passes over last season's purchases")
    ranker_epochs: int = option(3, "passes over the impressions")
    steps: int = option(600, "post-training steps, each on a fresh batch")
    batch: int = option(16, "samples per post-training step (B)")
    group: int = option(32, "rollouts per sample (G)")
    kind: str = option("beam", "rollouts: beam (top-G beams) or sample (on-policy sampling)")
    lr: float = option(1e-3, "peak learning rate, decayed linearly to zero")
    weight: float = option(5.0, "weight of the GRPO term where an arm's name gives none")
    min_difficulty: float = option(1.0, "gate: at least this share of rollouts misses, 0..1")
    min_margin: float = option(0.01, "gate: target's click probability over the negatives', -1..1")
    clip: float = option(0.2, "ratio clip of GRPO")
    checkpoints: int = option(5, "evaluations during post-training, evenly spaced")


# ------------------------------------------------------------------------------------- policy


class Block(nn.Module):
    """Pre-norm transformer block that can attend to the keys and values of an earlier call."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: tuple | None, sees: Tensor | None, last: bool = False):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if last:  # keys and values of all N tokens, but only the last one goes on
            x, q = x[:, -1:], q[:, :, -1:]
        causal = sees is None and not last
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x)), (k, v)


class Policy(nn.Module):
    """GPT-style model of item sequences; one token per level of the semantic ID, decoding free.

    forward(tokens (B, N)) -> log-probabilities of the next token (B, N, V), and a cache of keys
    and values. With `cache`, the N tokens are the next tokens of N parallel branches at position
    `start`, and `sees` (B, N, keys) says which keys each branch may attend to. `last` asks for the
    last token's output alone (B, 1, V): all that decoding needs of a prompt.
    """

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, vocab: int = VOCAB):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(1 + L * (HISTORY + 1), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, tokens: Tensor, cache: list | None = None, start: int = 0, sees=None, last=False
    ):
        where = torch.arange(tokens.shape[1], device=tokens.device) * (cache is None) + start
        x, new = self.token(tokens) + self.position(where), []
        for i, block in enumerate(self.blocks):
            mask, top = None if sees is None else sees[:, None], last and block is self.blocks[-1]
            x, keys = block(x, cache and cache[i], mask, top)
            new.append(keys)
        return F.log_softmax(self.head(self.norm(x)), dim=-1), new

    def target_logp(self, history: Tensor, target: Tensor) -> Tensor:
        """log pi(y | x) of targets (B, 3) after histories (B, T), by one plain forward (B,)."""
        logp, _ = self(torch.cat([history, target[:, :-1]], dim=1))  # (B, T + 2, V)
        return logp[:, -L:].gather(2, target[..., None]).sum((1, 2))


# ------------------------------------------------------------------------------------- ranker


class Ranker(nn.Module):
    """MLP click model on [user, item, 10 * user * item]; user = mean embedding of the history.

    forward(history (B, 8), items (B, K)) of item numbers -> click logits (B, K).
    """

    def __init__(self, items: int, width: int = 32):
        super().__init__()
        self.past, self.item = nn.Embedding(items, width), nn.Embedding(items, width)
        nn.init.normal_(self.past.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        self.mlp = nn.Sequential(
            *(nn.Linear(3 * width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()),
            nn.Linear(64, 1),
        )

    def forward(self, history: Tensor, items: Tensor) -> Tensor:
        item = self.item(items)  # (B, K, width)
        user = self.past(history).mean(1, keepdim=True).expand_as(item)
        return self.mlp(torch.cat([user, item, 10 * user * item], dim=-1)).squeeze(-1)


def train_ranker(world: World, config: Config, device: torch.device) -> Ranker:
    """Fit the ranker to the impressions alone, as production rankers are: BCE on clicks.

    Two random catalogue items per slate serve as further negatives. Where the feed showed nothing,
    nothing is learned; the position of an impression is not corrected for.
    """
    ranker, batch = Ranker(len(world.codes)).to(device), 512
    history, shown = tensor(world.feed_history, device), tensor(world.shown, device)
    clicked, steps = tensor(world.clicked, device).float(), len(world.shown) // batch
    update = Updates(ranker, 6e-3, config.ranker_epochs * steps, "ranker")
    for _ in range(config.ranker_epochs):
        for rows in torch.randperm(len(shown), device=device)[: steps * batch].split(batch):
            random = torch.randint(len(world.codes), (batch, 2), device=device)
            logits = ranker(history[rows], torch.cat([shown[rows], random], dim=1))
            labels = F.pad(clicked[rows], (0, 2))  # (512, 12)
            update(F.binary_cross_entropy_with_logits(logits, labels))
    return ranker.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------ rollouts


class Rollout(NamedTuple):
    tokens: Tensor  # (B, G, 3)
    logp: Tensor  # (B, G), with gradient where the caller allows it
    target_logp: Tensor | None  # (B,)


def rollout(
    policy: Policy, history: Tensor, group: int, kind: str, target: Tensor | None = None
) -> Rollout:
    """Eq. (1): G rollouts per history, their log-probabilities, and the target's, in ONE pass.

    The prompt is encoded once; every branch attends to the shared prompt keys and its own few
    (mask `sees`), so G costs little. The target rides along as one more branch: NLL needs no second
    forward. history (B, T), target (B, 3) or None. `kind`: "sample" draws from the policy, "beam"
    keeps the `group` most likely prefixes, best first, all different. Both decode all V tokens.
    Raises ValueError on another kind or group < 1. The scheme is ours.
    """
    if kind not in ("sample", "beam") or group < 1:
        raise ValueError(f"kind must be sample or beam and group >= 1, got {kind!r}, {group}")
    (B, T), riders = history.shape, 0 if target is None else 1
    logp, cache = policy(history, last=True)
    logp = logp.expand(B, 1 + riders, -1)  # (B, branches, V), the target's branch last
    total = logp.new_zeros(B, 1 + riders)
    tokens = history.new_zeros(B, 1 + riders, 0)
    sees = torch.ones(B, 1 + riders, T, dtype=torch.bool, device=history.device)
    for level in range(L):
        free, V = logp.shape[1] - riders, logp.shape[2]
        choices = logp[:, :free].detach()  # which branches exist carries no gradient
        if kind == "beam":
            scores = (total[:, :free, None].detach() + choices).flatten(1)  # (B, free * V)
            best = scores.topk(min(group, free * V), dim=1).indices
            parent, token = best // V, best % V  # (B, G)
        else:
            draws = torch.multinomial(choices.flatten(0, 1).exp(), group // free, replacement=True)
            token = draws.view(B, group)
            parent = torch.arange(group, device=history.device).expand(B, group) // (group // free)
        if target is not None:
            parent = F.pad(parent, (0, 1), value=free)
            token = torch.cat([token, target[:, level, None]], dim=1)
        Q = token.shape[1]
        rows = torch.arange(B, device=history.device)[:, None]  # (B, 1), pairs with parent (B, Q)
        total = total.gather(1, parent) + logp.flatten(1).gather(1, parent * V + token)
        tokens = torch.cat([tokens[rows, parent], token[..., None]], dim=2)
        if level < L - 1:  # a branch sees what its parent saw, and itself
            own = torch.eye(Q, dtype=torch.bool, device=history.device).expand(B, Q, Q)
            sees = torch.cat([sees[rows, parent], own], dim=2)
            logp, cache = policy(token, cache, T + level, sees)
    if target is None:
        return Rollout(tokens, total, None)
    return Rollout(tokens[:, :-1], total[:, :-1], total[:, -1])


@torch.no_grad()
def beam_search(policy: Policy, history: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` most likely items after history (B, T), best first: (tokens, logp)."""
    found = rollout(policy, history, width, "beam")
    return found.tokens, found.logp


# ------------------------------------------------------- the method: gate, advantages, losses


class Gate(NamedTuple):
    admit: Tensor  # (B,) bool
    difficulty: Tensor  # (B,) in 0..1
    discriminability: Tensor  # (B,) in -1..1, nan where undefined


@torch.no_grad()
def adagrpo_gate(
    target_reward: Tensor,
    rollout_rewards: Tensor,
    hit: Tensor,
    valid: Tensor,
    *,
    min_difficulty: float,
    min_margin: float,
) -> Gate:
    """Admit GRPO per sample, 0 or 1: hard for the policy AND discriminated by the ranker.

    target_reward (B,): click probability of the true item. rollout_rewards (B, G): of the rollouts.
    hit, valid (B, G) bool: the rollout is the true item; it names an item. Needs torch alone, so
    copy it. A sample without a valid negative or with a non-finite reward is never admitted: its
    discriminability is nan, and nan >= min_margin is false. A margin, not a rank: where the ranker
    is blind its scores are all but equal, and a rank cannot see that. Thresholds are inclusive.
    Raises ValueError or TypeError naming the argument. Source: the two diagnostics and the binary
    clip are the paper's; their formulas are ours.
    """
    if rollout_rewards.ndim != 2 or rollout_rewards.shape[1] < 2:
        shape = tuple(rollout_rewards.shape)
        raise ValueError(f"rollout_rewards must be (B, G) with G >= 2, got {shape}")
    for name, given, shape in (
        ("target_reward", target_reward, rollout_rewards.shape[:1]),
        ("hit", hit, rollout_rewards.shape),
        ("valid", valid, rollout_rewards.shape),
    ):
        if given.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(given.shape)}")
    for name, mask in (("hit", hit), ("valid", valid)):
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}")
    if not 0 <= min_difficulty <= 1:
        raise ValueError(f"min_difficulty must be in [0, 1], got {min_difficulty}")
    if not -1 <= min_margin <= 1:
        raise ValueError(f"min_margin must be in [-1, 1], got {min_margin}")
    negative = valid & ~hit  # (B, G)
    difficulty = (~hit).sum(1) / hit.shape[1]  # (B,)  eq. (2)
    known = rollout_rewards.isfinite().all(1) & target_reward.isfinite() & negative.any(1)
    mean = (rollout_rewards * negative).sum(1) / negative.sum(1)  # (B,)
    discriminability = torch.where(known, target_reward - mean, torch.nan)  # (B,)  eq. (3)
    admit = (difficulty >= min_difficulty) & (discriminability >= min_margin)  # (B,)  eq. (4)
    return Gate(admit, difficulty, discriminability)


def group_advantages(rewards: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Eq. (5): rewards (B, G) standardised within each group -> (B, G), population std.

    A group whose rewards differ by no more than `tolerance` has advantages of exactly 0: nothing is
    ever divided by a rounding error. So has a group with a non-finite reward. Raises ValueError
    where rewards is not (B, G) with G >= 2 or tolerance < 0. Source: GRPO, arXiv 2402.03300.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G >= 2, got {tuple(rewards.shape)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)  # (B, 1)
    alive = (spread > tolerance) & rewards.isfinite().all(1, keepdim=True)
    safe = torch.where(alive, rewards, 0.0)
    centred = safe - safe.mean(1, keepdim=True)
    return centred / torch.where(alive, safe.std(1, correction=0, keepdim=True), 1.0)


def grpo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Eq. (6): the clipped surrogate per sample; three (B, G) tensors -> (B,).

    With one update per rollout old_logp is logp.detach(), every ratio is 1 and the printed loss is
    -mean(A) = 0. Its gradient, -mean(A_i * grad logp_i), is not. Raises ValueError on unequal
    shapes or clip <= 0. Source: GRPO, arXiv 2402.03300, without KL; ratio per item, not per token.
    """
    if not logp.shape == old_logp.shape == advantages.shape or logp.ndim != 2:
        shapes = [tuple(t.shape) for t in (logp, old_logp, advantages)]
        raise ValueError(f"logp, old_logp and advantages must be one (B, G), got {shapes}")
    if not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    ratio = (logp - old_logp).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate.mean(1)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): three (B,) tensors -> scalar. Ours but for the gate.

    The denominator is B, not the number admitted: the effective weight of the RL term is
    weight * admission rate. Raises ValueError on unequal shapes or a negative weight, TypeError
    where admit is not bool.
    """
    if not nll.shape == grpo.shape == admit.shape or nll.ndim != 1:
        shapes = [tuple(t.shape) for t in (nll, grpo, admit)]
        raise ValueError(f"nll, grpo and admit must be one (B,), got {shapes}")
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, got {weight}")
    if admit.dtype != torch.bool:
        raise TypeError(f"admit must be a bool tensor, got {admit.dtype}")
    return (nll + weight * torch.where(admit, grpo, 0.0)).mean()


# ----------------------------------------------------- the shop on a device, and its evaluation


class Shop:
    """A world and its ranker on one device: everything that a training step asks of them."""

    def __init__(self, world: World, ranker: Ranker, device: torch.device):
        self.world, self.ranker, self.device = world, ranker, device
        self.codes, self.item_of = tensor(world.codes, device), tensor(world.item_of, device)
        self.offset = torch.tensor(OFFSET, device=device)
        self.sizes = torch.tensor(CODEBOOK, device=device)

    def tokens(self, items: Tensor) -> Tensor:
        """Item numbers (...) -> tokens (..., 3)."""
        return self.codes[items] + self.offset

    def prompt(self, history: Tensor) -> Tensor:
        """Item numbers (B, 8) -> the policy's input (B, 25), start token first."""
        return F.pad(self.tokens(history).flatten(1), (1, 0), value=VOCAB - 1)

    def items(self, tokens: Tensor) -> Tensor:
        """Tokens (..., 3) -> item numbers (...), -1 for a hallucination."""
        code = tokens - self.offset
        inside = ((code >= 0) & (code < self.sizes)).all(-1)
        a, b, c = code.clamp(min=0).minimum(self.sizes - 1).unbind(-1)
        return torch.where(inside, self.item_of[a, b, c], -1)

    @torch.no_grad()
    def rewards(self, history: Tensor, items: Tensor) -> Tensor:
        """Click probability by the ranker (B, K); 0, below every item's, for a hallucination."""
        return torch.where(items < 0, 0.0, self.ranker(history, items.clamp(min=0)).sigmoid())

    def truth(self, measure: Callable, taste: np.ndarray, items: Tensor) -> Tensor:
        return tensor(measure(taste, items.cpu().numpy()).astype(np.float32), self.device)


@torch.no_grad()
def evaluate(policy: Policy, shop: Shop, split: Split, width: int = 20) -> dict[str, Tensor]:
    """Beam-search every user of `split` over all V^3 IDs; one figure per user and metric, (N,).

    hr@K and ndcg@10: the target's rank among the beams. hallucination: share of the top 10 that
    names no item. ctr, dwell (seconds): mean over the top-10 slate, by the world's truth. coverage:
    share of the catalogue in anyone's top 10 (one number, repeated).
    """
    parts, recommended = [], set()
    for start in range(0, len(split.target), 500):
        rows = slice(start, start + 500)
        prompt = shop.prompt(tensor(split.history[rows], shop.device))
        items = shop.items(beam_search(policy, prompt, width)[0])  # (B, width)
        found = items == tensor(split.target[rows], shop.device)[:, None]
        rank = torch.where(found.any(1), found.int().argmax(1), width).float()  # 0 is the top
        top, world = items[:, :10], shop.world
        recommended.update(top.unique().tolist())
        figures = {f"hr@{k}": (rank < k).float() for k in (1, 5, 10, 20)}
        figures["ndcg@10"] = torch.where(rank < 10, 1 / (rank + 2).log2(), 0.0)
        figures["hallucination"] = (top < 0).float().mean(1)
        for name, truth in (
            ("ctr", world.true_click_probability),
            ("dwell", world.true_dwell_seconds),
        ):
            figures[name] = shop.truth(truth, split.taste[rows], top).mean(1)
        parts.append(figures)
    result = {name: torch.cat([p[name] for p in parts]).cpu() for name in parts[0]}
    coverage = len(recommended - {-1}) / len(shop.codes)
    return result | {"coverage": torch.full_like(result["ctr"], coverage)}


@torch.no_grad()
def ranker_auc(shop: Shop, split: Split) -> Tensor:
    """Per user, the share of the catalogue that the ranker puts below the target (N,)."""
    parts = []
    for start in range(0, len(split.target), 250):
        history = tensor(split.history[start : start + 250], shop.device)
        target = tensor(split.target[start : start + 250], shop.device)[:, None]
        scores = shop.ranker(
            history, torch.arange(len(shop.codes), device=shop.device).expand(len(history), -1)
        )
        own = scores.gather(1, target)
        parts.append(((scores < own).float() + 0.5 * (scores == own)).mean(1))
    return torch.cat(parts).cpu()


def order_agreement(rewards: Tensor, truth: Tensor) -> Tensor:
    """Share of a group's pairs that the ranker orders as the truth does, (B, G) twice -> (B,)."""
    same = (rewards[:, :, None] - rewards[:, None]) * (truth[:, :, None] - truth[:, None])
    differ = truth[:, :, None] != truth[:, None]
    return ((same > 0) & differ).sum((1, 2)) / differ.sum((1, 2)).clamp(min=1)


# ------------------------------------------------------------------------------ arms, training

# An arm is a gate rule and a weight; nothing else differs. Each rule maps four masks (B,) to one:
# the method's gate, its two halves, and (oracle alone) whether the ranker orders the group rightly.
RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "nll": lambda gate, hard, clear, right: torch.zeros_like(gate),
    "mix": lambda gate, hard, clear, right: torch.ones_like(gate),  # a fixed mixture
    "grpo": lambda gate, hard, clear, right: torch.ones_like(gate),  # the same without its NLL
    "adagrpo": lambda gate, hard, clear, right: gate,
    "random": lambda gate, *_: gate[torch.randperm(len(gate), device=gate.device)],  # same rate
    "inverted": lambda gate, hard, clear, right: ~gate,
    "difficulty": lambda gate, hard, clear, right: hard,
    "discriminability": lambda gate, hard, clear, right: clear,
    "oracle": lambda gate, hard, clear, right: right,
    "reweight": lambda gate, hard, clear, right: gate,  # more NLL in place of GRPO
    "easy+clear": lambda gate, hard, clear, right: ~hard & clear,
    "hard+blind": lambda gate, hard, clear, right: hard & ~clear,
    "easy+blind": lambda gate, hard, clear, right: ~hard & ~clear,
}


def parse_arm(name: str, default_weight: float) -> tuple[str, float]:
    """ "mix-0.3" -> ("mix", 0.3); without a number the weight is the default, for nll 0."""
    rule, _, number = name.partition("-")
    try:
        weight = float(number) if number else default_weight * (rule != "nll")
    except ValueError:
        weight = -1.0
    if rule not in RULES or not 0 <= weight < float("inf"):
        raise ValueError(
            f"arms: unknown arm {name!r}; RULE or RULE-WEIGHT, rules: {', '.join(RULES)}"
        )
    return rule, weight


class Updates:
    """AdamW, linear warm-up and decay, gradient norm clipped at 1: one call is one update."""

    def __init__(self, model: nn.Module, lr: float, steps: int, label: str):
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / 20, 1 - step / (steps + 1))
        )
        self.bar = tqdm(total=steps, desc=label, leave=False, disable=None)  # quiet without a tty

    def __call__(self, loss: Tensor, **figures: float) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        self.optimizer.step()
        self.schedule.step()
        self.bar.set_postfix(figures or {"loss": loss.item()}, refresh=False)
        self.bar.update()
        return norm


def pretrain(shop: Shop, config: Config) -> Policy:
    """Next-token NLL on every position of last season's purchase sequences."""
    policy, split, batch = Policy(config.width).to(shop.device), shop.world.pretrain, 128
    bought = tensor(np.column_stack([split.history, split.target]), shop.device)  # (N, 9)
    steps = -(-len(bought) // batch)
    update = Updates(policy, 1e-3, config.pretrain_epochs * steps, "pre-training")
    for _ in range(config.pretrain_epochs):
        for rows in torch.randperm(len(bought), device=shop.device).split(batch):
            tokens = shop.prompt(bought[rows])  # (128, 28)
            logp, _ = policy(tokens[:, :-1])
            update(F.nll_loss(logp.flatten(0, 1), tokens[:, 1:].flatten()))
    return policy


def judge(shop: Shop, config: Config, history: Tensor, target: Tensor, tokens: Tensor):
    """What the ranker makes of rollouts (B, G, 3): items (B, G), rewards (B, G) and the gate."""
    items = shop.items(tokens)
    rewards = shop.rewards(history, items)
    own = shop.rewards(history, target[:, None]).squeeze(1)  # (B,)
    hit, bounds = items == target[:, None], (config.min_difficulty, config.min_margin)
    gate = adagrpo_gate(
        own, rewards, hit, items >= 0, min_difficulty=bounds[0], min_margin=bounds[1]
    )
    return items, rewards, gate


def objective(policy: Policy, shop: Shop, arm: str, config: Config, rows: slice):
    """One batch of one arm: the loss of eq. (7), and per-sample figures for the log."""
    rule, weight = parse_arm(arm, config.weight)
    split = shop.world.posttrain
    history, target = (tensor(a[rows], shop.device) for a in (split.history, split.target))
    x, y = shop.prompt(history), shop.tokens(target)  # (B, T), (B, 3)
    if weight == 0:  # the gate stays shut whatever the group says: save the rollouts
        nll = -policy.target_logp(x, y)
        return nll.mean(), {"nll": nll}
    rolled = rollout(policy, x, config.group, config.kind, y)  # eq. (1)
    items, rewards, gate = judge(shop, config, history, target, rolled.tokens)  # eq. (2)-(4)
    hard = gate.difficulty >= config.min_difficulty
    clear = gate.discriminability >= config.min_margin
    truth = shop.truth(shop.world.true_click_probability, split.taste[rows], items)
    agree = order_agreement(rewards, truth)  # for the log, and for the oracle arm alone
    admit = RULES[rule](gate.admit, hard, clear, agree >= 0.6)  # 0.5 is chance
    advantages = group_advantages(rewards)  # eq. (5)
    grpo = grpo_loss(rolled.logp, rolled.logp.detach(), advantages, config.clip)  # eq. (6)
    nll = -rolled.target_logp
    term = nll if rule == "reweight" else grpo
    loss = adagrpo_loss(nll * (rule != "grpo"), term, admit, weight)  # eq. (7)
    seen = {"nll": nll, "grpo": grpo, "reward": rewards, "spread": rewards.std(1)}
    seen |= {"admitted": admit, "easy": ~hard, "not_discriminating": hard & ~clear}
    seen |= {"agree_admitted": agree[gate.admit], "agree_refused": agree[~gate.admit]}
    return loss, seen | {"invalid": items < 0}


def train(start: Policy, shop: Shop, arm: str, config: Config) -> dict:
    """Post-train a copy of `start` by one arm on fresh batches, the same ones for every arm.

    Returns per-user test figures of the checkpoint that is best on validation ("best") and of the
    last one ("final"), the figures of every checkpoint on validation with the training figures
    averaged since the one before ("log"), and both checkpoints' weights.
    """
    policy = copy.deepcopy(start)
    update = Updates(policy, config.lr, config.steps, arm)
    marks = {config.steps * k // config.checkpoints for k in range(1, config.checkpoints + 1)}
    log, since, best, weights = [], [], -1.0, {}
    for step in range(1, config.steps + 1):
        rows = slice((step - 1) * config.batch, step * config.batch)
        loss, seen = objective(policy, shop, arm, config, rows)
        seen = {name: value.float().mean().item() for name, value in seen.items()}
        bar = {name: seen[name] for name in ("nll", "reward", "admitted") if name in seen}
        since.append(seen | {"grad_norm": update(loss, **bar)})
        if step not in marks:
            continue
        columns = {name: np.array([s[name] for s in since]) for name in since[0]}
        means = {k: float(np.nanmean(v)) for k, v in columns.items() if not np.isnan(v).all()}
        valid = {k: v.mean().item() for k, v in evaluate(policy, shop, shop.world.valid).items()}
        log.append({"step": step} | means | {f"valid {k}": v for k, v in valid.items()})
        weights["final"], since = copy.deepcopy(policy.state_dict()), []
        if valid["hr@10"] > best:
            best, weights["best"] = valid["hr@10"], weights["final"]
    final = picked = evaluate(policy, shop, shop.world.test)
    if weights["best"] is not weights["final"]:
        policy.load_state_dict(weights["best"])
        picked = evaluate(policy, shop, shop.world.test)
    return {"best": picked, "final": final, "log": log, "weights": weights}


# ------------------------------------------------------------------------- experiment, tables

BINS = ((0, 20), (20, 200), (200, 1000), (1000, 10**9))  # impressions of the target
CELLS = ("easy, blind", "easy, clear", "hard, blind", "hard, clear")
METRICS = {"hr@10": 100, "ndcg@10": 100, "hallucination": 100, "ctr": 100, "dwell": 1}  # scale
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student, 1 to 9 degrees of freedom
MIXES = ("mix-0.03", "mix-0.1", "mix-0.3", "mix-1", "mix-3", "mix-10")
SWEEP = ("adagrpo-0.3", "adagrpo-1", "adagrpo-3", "adagrpo", "adagrpo-10", "adagrpo-30")
CONTROLS = ("grpo", "random", "inverted", "reweight", "difficulty", "discriminability", "oracle")
CELL_ARMS = ("easy+blind", "easy+clear", "hard+blind")  # hard+clear is adagrpo itself
STUDY = ("nll", *MIXES, *SWEEP, *CONTROLS, *CELL_ARMS)
DOSES, DOSED = (0.0, 0.5), ("mix-0.3", "mix-1", "adagrpo")  # the default bias is in STUDY
QUICK_WORLD = {"pretrain": 2000, "valid": 200, "test": 600, "feed": 20_000}
QUICK = {"steps": 40, "pretrain_epochs": 10, "ranker_epochs": 2, "group": 16, "checkpoints": 2}


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write beside `path`, then rename: whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        save(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def keep(path: Path | None, make: Callable[[], dict]) -> dict:
    """What an earlier run stored at `path`, or make() stored there; without a path just make()."""
    if path is None:
        return make()
    if not path.exists():
        write(path, partial(torch.save, make()))
    return torch.load(path, map_location="cpu", weights_only=True)


@torch.no_grad()
def strata(policy: Policy, shop: Shop, config: Config) -> Tensor:
    """Cell of every test user (N,), an index of CELLS, by the gate's two tests before training."""
    cells, test = [], shop.world.test
    for start in range(0, len(test.target), 500):
        rows = slice(start, start + 500)
        history, target = (tensor(a[rows], shop.device) for a in (test.history, test.target))
        tokens = rollout(policy, shop.prompt(history), config.group, config.kind).tokens
        gate = judge(shop, config, history, target, tokens)[2]
        hard = gate.difficulty >= config.min_difficulty
        cells.append(2 * hard + (gate.discriminability >= config.min_margin))
    return torch.cat(cells).cpu()


def experiment(config: Config, device: torch.device, out: Path | None) -> tuple[dict, dict]:
    """Train every (seed, bias, arm) that is asked for; in `out`, each is kept when it is done.

    Returns what arms share, bases[seed, bias], and what they reached, runs[seed, bias, arm].
    """
    seeds = range(config.seed, config.seed + config.seeds)
    jobs = [(s, config.bias, a) for s in seeds for a in (STUDY if config.study else config.arms)]
    jobs += [(s, b, a) for s in seeds for b in DOSES for a in DOSED if config.study]
    bases, runs, started, trained = {}, {}, time.time(), 0

    @lru_cache(maxsize=1)  # the world of one seed and bias at a time
    def shop_of(seed: int, bias: float) -> Shop:
        sizes = QUICK_WORLD if config.quick else {}
        world = make_world(seed, bias=bias, posttrain=config.steps * config.batch, **sizes)
        torch.manual_seed(seed)
        ranker = Ranker(len(world.codes)).to(device)
        if (seed, bias) in bases:
            ranker.load_state_dict(bases[seed, bias]["ranker"])
        else:
            ranker = train_ranker(world, config, device)
        return Shop(world, ranker.eval().requires_grad_(False), device)

    def policy_of(seed: int, bias: float) -> Policy:
        policy = Policy(config.width).to(device)
        policy.load_state_dict(bases[seed, bias]["policy"])
        return policy

    def base(seed: int, bias: float) -> dict:
        shop, twin = shop_of(seed, bias), (seed, config.bias) in bases
        policy = policy_of(seed, config.bias) if twin else pretrain(shop, config)  # bias-free
        test = shop.world.test
        result = {"policy": policy.state_dict(), "ranker": shop.ranker.state_dict()}
        result |= {"auc": ranker_auc(shop, test), "cell": strata(policy, shop, config)}
        return result | {"exposure": torch.from_numpy(shop.world.exposure[test.target])}

    def run(seed: int, bias: float, arm: str) -> dict:
        policy, shop = policy_of(seed, bias), shop_of(seed, bias)
        torch.manual_seed(seed)
        return train(policy, shop, arm, config)

    for number, job in enumerate(sorted(jobs, key=lambda job: job[0]), 1):  # seed by seed
        seed, bias, arm = job
        place = f"seed{seed}-bias{bias:g}-"
        if (seed, bias) not in bases:
            bases[seed, bias] = keep(out and out / f"{place}base.pt", partial(base, seed, bias))
        file = out and out / f"{place}{arm}.pt"
        trained += not (file and file.exists())
        runs[job] = keep(file, partial(run, *job))
        left = (time.time() - started) / max(trained, 1) * (len(jobs) - number) / 60
        note = f"[{number}/{len(jobs)}] seed {seed} bias {bias:g} {arm}: about {left:.0f} min left"
        print(note, file=sys.stderr, flush=True)
    return bases, runs


def estimate(samples: list[Tensor]) -> tuple[float, float]:
    """Mean and 95% half-width: over users if there is one seed, else over the seeds' means."""
    values, factor = samples[0].double(), 1.96
    if len(samples) > 1:
        values = torch.stack([sample.double().mean() for sample in samples])
        factor = T95[min(len(samples) - 1, len(T95)) - 1]
    if len(values) < 2:
        return values.mean().item(), float("nan")
    return values.mean().item(), factor * (values.std() / len(values) ** 0.5).item()


def report(config: Config, bases: dict, runs: dict) -> None:
    """Print the tables: premise, arms, gains by exposure and by stratum, simulated A/B."""
    seeds = range(config.seed, config.seed + config.seeds)
    arms = [arm for seed, bias, arm in runs if (seed, bias) == (config.seed, config.bias)]
    base = [bases[seed, config.bias] for seed in seeds]
    shown = [[(b["exposure"] >= low) & (b["exposure"] < high) for b in base] for low, high in BINS]

    def users(arm: str, metric: str, which: str) -> list[Tensor]:
        scale = METRICS[metric]
        return [scale * runs[seed, config.bias, arm][which][metric] for seed in seeds]

    def gain(arm: str, metric: str, which: str = "final", masks: list | None = None) -> str:
        pairs = zip(users(arm, metric, which), users("nll", metric, which), strict=True)
        change = [a - b for a, b in pairs]
        if masks:
            change = [c[mask] for c, mask in zip(change, masks, strict=True)]
        if min(map(len, change)) < 2:
            return "-"
        return "{:+.2f} ±{:.2f}".format(*estimate(change))

    def breakdown(title: str, names: list[str], groups: list[list[Tensor]]) -> None:
        print(f"\nHR@10 points against nll, final checkpoint, by {title}")
        print(f"{'':<18}" + "".join(f"{name:>17}" for name in names))
        shares = [np.mean([mask.float().mean() for mask in masks]) for masks in groups]
        print(f"{'share of users':<18}" + "".join(f"{share:>17.1%}" for share in shares))
        for arm in others:
            cells = "".join(f"{gain(arm, 'hr@10', masks=masks):>17}" for masks in groups)
            print(f"{arm:<18}{cells}")

    print("Premise: the ranker's AUC, target against catalogue, by impressions of the target")
    names = ["below 20", "20 to 199", "200 to 999", "1000 and more"]
    for name, masks in zip(names, shown, strict=True):
        inside = [b["auc"][mask] for b, mask in zip(base, masks, strict=True)]
        if min(map(len, inside)) > 1:
            print(f"  {name:<16}" + "{:.3f} ±{:.3f}".format(*estimate(inside)))
    others = [arm for arm in arms if arm != "nll"] if "nll" in arms else []
    print("\nTest users. In brackets: difference to nll and its 95% interval, paired")
    print(f"{'arm':<17}{'':<6}" + "".join(f"{name:<23}" for name in METRICS) + "admitted")
    for arm in arms:
        logs = [entry for seed in seeds for entry in runs[seed, config.bias, arm]["log"]]
        admitted = np.mean([entry.get("admitted", 0.0) for entry in logs])
        for which in ("best", "final"):
            row = f"{arm:<17}{which:<6}"
            for metric in METRICS:
                change = f" ({gain(arm, metric, which)})" if arm in others else ""
                row += f"{estimate(users(arm, metric, which))[0]:.2f}{change}".ljust(23)
            print(f"{row}{admitted:.1%}")
    if others:
        cells = [[b["cell"] == cell for b in base] for cell in range(len(CELLS))]
        breakdown("impressions of the target", names, shown)
        breakdown("stratum before post-training", CELLS, cells)
        print("\nSimulated A/B against nll: top-10 slates judged by the world's truth, paired")
        for arm in others:
            print(f"  {arm:<17}clicks {gain(arm, 'ctr')} points, dwell {gain(arm, 'dwell')} s")


def verdicts(config: Config, bases: dict, runs: dict) -> list[dict]:
    """Print the study's claims: a figure per seed, its 95% interval, and the bound it must meet.

    "holds" if the whole interval is on the right side, "mean only" if just the mean is.
    """
    full, ours = config.bias, "adagrpo"

    def hr(s, arm, metric="hr@10", which="final", bias=full, cell=None):
        values = METRICS[metric] * runs[s, bias, arm][which][metric]
        return (values if cell is None else values[bases[s, bias]["cell"] == cell]).mean().item()

    def over(arm, other="nll", **where):
        return lambda s: hr(s, arm, **where) - hr(s, other, **where)

    def percent(metric, which="final"):
        def figure(s):
            plain = hr(s, "nll", metric, which)
            return 100 * (hr(s, ours, metric, which) / plain - 1) if plain else float("nan")

        return figure

    def invalid(which):
        return lambda s: hr(s, ours, "hallucination", which)

    def auc(low, high):
        def figure(s):
            shown = bases[s, full]["exposure"]
            return bases[s, full]["auc"][(shown >= low) & (shown < high)].mean().item()

        return figure

    def picked(s, arms):  # on validation, never on test
        return hr(s, max(arms, key=lambda arm: runs[s, full, arm]["log"][-1]["valid hr@10"]))

    def picks(s):
        return picked(s, SWEEP) - picked(s, MIXES)

    def frontier(s):  # mixtures that no setting of ours dominates, to 0.05 points of validity
        at = {a: (hr(s, a), hr(s, a, "hallucination")) for a in (*MIXES, *SWEEP)}
        beats = {
            m: [at[a][0] >= at[m][0] and at[a][1] <= at[m][1] + 0.05 for a in SWEEP] for m in MIXES
        }
        return float(sum(not any(beats[m]) for m in MIXES))

    def agreement(s):
        log = runs[s, full, ours]["log"]
        gaps = [e.get("agree_admitted", np.nan) - e.get("agree_refused", np.nan) for e in log]
        return 100 * float(np.nanmean(gaps))

    def fall(mix):
        return lambda s: hr(s, mix, bias=0.0) - hr(s, mix)

    def lead(bias):  # the better mixture is picked on test: in its favour
        return lambda s: hr(s, ours, bias=bias) - max(hr(s, m, bias=bias) for m in DOSED[:2])

    def growth(other, start, end):
        lead = over(ours, other, bias=end), over(ours, other, bias=start)
        return lambda s: lead[0](s) - lead[1](s)

    claims = [
        ("1 premise: AUC, target shown 1000 times or more", ">=", 0.9, auc(1000, 1e9)),
        ("1 premise: AUC, target shown less than 20 times", "<=", 0.6, auc(0, 20)),
    ]
    for cell, name in enumerate(CELLS):
        bound = (">=", 0.0) if cell == 3 else ("<=", 0.5)
        for mix in ("mix-0.3", "mix-1"):
            claims.append((f"2 strata: {mix}, {name} users", *bound, over(mix, cell=cell)))
        only = (*CELL_ARMS, ours)[cell]
        claims.append((f"2 strata: GRPO only where {name}, all users", *bound, over(only)))
    claims += [
        ("3 best checkpoint: HR@10 against nll, %", ">=", 10.6, percent("hr@10", "best")),
        ("3 best checkpoint: hallucination, %", "<=", 0.22, invalid("best")),
        ("4 final checkpoint: HR@10 against nll, %", ">=", 5.6, percent("hr@10")),
        ("4 final checkpoint: hallucination, %", "<=", 0.27, invalid("final")),
    ]
    claims += [(f"5 frontier: adagrpo over {mix}", ">=", 0.0, over(ours, mix)) for mix in MIXES]
    claims += [
        ("5 frontier: both picked on validation", ">=", 0.0, picks),
        ("5 frontier: mixtures that our sweep does not dominate", "<=", 0.0, frontier),
    ]
    for weight in ("0.3", "1", "3", "10"):
        claims.append((f"6 adagrpo-{weight} over nll", ">=", 0.0, over(f"adagrpo-{weight}")))
        claims.append((f"6 mix-{weight} below nll", "<=", 0.0, over(f"mix-{weight}")))
    for control in CONTROLS[:-1]:
        claims.append((f"7 controls: adagrpo over {control}", ">=", 0.0, over(ours, control)))
    claims += [
        ("7 controls: oracle gate over adagrpo", ">=", 0.0, over("oracle", ours)),
        ("7 gate precision: pairs in order, admitted - refused", ">=", 0.0, agreement),
    ]
    for mix in DOSED[:2]:
        claims.append((f"8 dose: {mix} at bias 0 over bias {full:g}", ">=", 0.0, fall(mix)))
        claims.append((f"8 dose: lead over {mix} at bias 0", "<=", 0.5, over(ours, mix, bias=0.0)))
        for start, end in ((0.0, 0.5), (0.5, full)):
            text = f"8 dose: lead over {mix} grows from {start:g} to {end:g}"
            claims.append((text, ">=", 0.0, growth(mix, start, end)))
    for dose in (*DOSES, full):
        bound = ("<=", 0.5) if dose == 0 else (">=", 0.0)
        claims.append(
            (f"8 dose: lead over the better of both at bias {dose:g}", *bound, lead(dose))
        )
    claims += [
        ("9 simulated A/B: clicks against nll, %", ">=", 0.0, percent("ctr")),
        ("9 simulated A/B: dwell time against nll, %", ">=", 0.0, percent("dwell")),
    ]
    head = "claim (HR@10 points unless it says otherwise)"
    print(f"\n{head:<55}{'bound':>9}{'mean':>9}  95% interval")
    rows = []
    for text, sign, bound, figure in claims:
        per_seed = [figure(s) for s in range(config.seed, config.seed + config.seeds)]
        mean, half = estimate([torch.tensor([value]) for value in per_seed])
        slack = mean - bound if sign == ">=" else bound - mean
        verdict = "holds" if slack >= half else "mean only" if slack >= 0 else "does not hold"
        rows.append({"claim": text, "bound": f"{sign} {bound:g}", "per_seed": per_seed})
        rows[-1] |= {"mean": mean, "interval": half, "verdict": verdict}
        interval = f"{mean - half:+.2f} to {mean + half:+.2f}"
        print(f"{text:<55}{sign:>4} {bound:<4g}{mean:>9.2f}  {interval:<18}{verdict}")
    return rows


# ----------------------------------------------------------------------------------- command

LIMITS = {  # smallest and largest value of every setting that is a number
    "seed": (0, 2**31),
    "seeds": (1, 1000),
    "bias": (0.0, 5.0),
    "width": (4, 4096),
    "pretrain_epochs": (1, 1000),
    "ranker_epochs": (1, 1000),
    "steps": (1, 10**6),
    "batch": (1, 10**5),
    "group": (2, 1000),
    "lr": (1e-9, 1.0),
    "weight": (0.0, 1e6),
    "min_difficulty": (0.0, 1.0),
    "min_margin": (-1.0, 1.0),
    "clip": (1e-9, 1.0),
    "checkpoints": (1, 1000),
}


def parse(argv: list[str] | None) -> Config:
    """The command line: one option for every field of Config; --quick only changes defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for setting in fields(Config):
        kind = {"type": type(setting.default)}
        if isinstance(setting.default, bool):
            kind = {"action": "store_true"}
        elif isinstance(setting.default, tuple):
            kind = {"nargs": "+"}
        kind |= {"default": setting.default, "help": setting.metadata["help"]}
        parser.add_argument("--" + setting.name.replace("_", "-"), **kind)
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**QUICK)
    return Config(**vars(parser.parse_args(argv)))


def prepare(config: Config) -> tuple[torch.device, Path | None]:
    """Check every setting before any work. Raises ValueError naming the one that is wrong."""
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {getattr(config, name)}")
    for arm in config.arms:
        parse_arm(arm, config.weight)
    if config.kind not in ("beam", "sample"):
        raise ValueError(f"kind must be beam or sample, got {config.kind!r}")
    if config.width % 4 or config.checkpoints > config.steps:
        raise ValueError("width must be a multiple of 4, and checkpoints at most steps")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [name for name in here if here[name]] + ["cpu"]
    device = here[0] if config.device == "auto" else config.device
    if device not in here:
        raise ValueError(f"device must be auto or one of {here}, got {config.device!r}")
    if not config.out:
        return torch.device(device), None
    out, label = Path(config.out), ("arms", "seed", "seeds", "out", "study")
    settings = {k: v for k, v in asdict(config).items() if k not in label}
    stored = out / "config.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        same = not stored.exists() or json.loads(stored.read_text()) == settings
        if same:
            write(stored, lambda file: file.write_text(json.dumps(settings, indent=1)))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"out: cannot use {out}: {error}") from error
    if not same:
        raise ValueError(f"out: {out} holds runs of other settings, choose another directory")
    return torch.device(device), out


def plain(value):
    """For JSON, which has no nan: None instead."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main(argv: list[str] | None = None) -> None:
    """Train and report; ends with exit status 1 and one line on a bad setting."""
    config = parse(argv)
    try:
        device, out = prepare(config)
    except ValueError as error:
        sys.exit(f"adagrpo.py: {error}")
    bases, runs = experiment(config, device, out)
    report(config, bases, runs)
    claims = verdicts(config, bases, runs) if config.study else []
    if out:
        rows = []
        for (seed, bias, arm), run in runs.items():
            means = {w: {k: v.mean().item() for k, v in run[w].items()} for w in ("best", "final")}
            rows.append({"seed": seed, "bias": bias, "arm": arm, "checkpoints": run["log"]} | means)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        versions["numpy"] = np.__version__
        results = {"config": asdict(config), "versions": versions, "runs": rows, "claims": claims}
        write(
            out / "results.json", lambda file: file.write_text(json.dumps(plain(results), indent=1))
        )
        print(f"\nwrote {out}/results.json; the weights of every arm are in {out}/*.pt")


if __name__ == "__main__":
    main()
