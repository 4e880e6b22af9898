"""AdaGRPO in one file: reinforcement learning for generative recommendation with a biased ranker.

A policy writes the semantic ID of the next item; a ranker scores what it wrote. The ranker is right
about some samples and wrong about others, because its log shows only what an old feed exposed.
AdaGRPO trains EVERY sample with supervised NLL and lets the GRPO term in only where the policy finds
the sample hard AND the ranker can tell the true item from the group's negatives.

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
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
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

    arms: tuple = option(("nll", "mix-0.1", "mix-0.3", "mix-1", "adagrpo"), "arms to train: RULES")
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

    def forward(self, x: Tensor, past: tuple | None, sees: Tensor | None):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, D))
        return x + self.mlp(self.norm2(x)), (k, v)


class Policy(nn.Module):
    """GPT-style model of item sequences; one token per level of the semantic ID, decoding free.

    forward(tokens (B, N)) -> log-probabilities of the next token (B, N, V), and a cache of keys
    and values. With `cache`, the N tokens are the next tokens of N parallel branches at position
    `start`, and `sees` (B, N, keys) says which keys each branch may attend to.
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

    def forward(self, tokens: Tensor, cache: list | None = None, start: int = 0, sees=None):
        where = torch.arange(tokens.shape[1], device=tokens.device) * (cache is None) + start
        x, new = self.token(tokens) + self.position(where), []
        for i, block in enumerate(self.blocks):
            x, keys = block(x, cache and cache[i], None if sees is None else sees[:, None])
            new.append(keys)
        return F.log_softmax(self.head(self.norm(x)), dim=-1), new

    def target_logp(self, history: Tensor, target: Tensor) -> Tensor:
        """log pi(y | x) of targets (B, 3) after histories (B, T), by one plain forward (B,)."""
        logp, _ = self(torch.cat([history, target[:, :-1]], dim=1))  # (B, T + 2, V)
        return logp[:, -L:].gather(2, target[..., None]).sum((1, 2))


# ------------------------------------------------------------------------------------- ranker


class Ranker(nn.Module):
    """MLP click model on [user, item, user * item]; user = mean embedding of the history.

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

    The prompt is encoded once; every branch attends to the shared prompt keys and to its own few
    (mask `sees`), so G costs little. The target rides along as one more branch: NLL needs no second
    forward. history (B, T), target (B, 3) or None. `kind`: "sample" draws from the policy, "beam"
    keeps the `group` most likely prefixes, best first, all different. Both decode all V tokens.
    Raises ValueError on another kind or group < 1. The scheme is ours.
    """
    if kind not in ("sample", "beam") or group < 1:
        raise ValueError(f"kind must be sample or beam and group >= 1, got {kind!r}, {group}")
    (B, T), riders = history.shape, 0 if target is None else 1
    logp, cache = policy(history)
    logp = logp[:, -1:].expand(B, 1 + riders, -1)  # (B, branches, V), the target's branch last
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
        total = total[rows, parent] + logp[rows, parent, token]
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
    """The `width` most likely items after history (B, T), best first: tokens (B, width, 3), logp."""
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
    is blind its scores are all but equal, and a rank cannot see that. Both thresholds are inclusive.
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
    difficulty = 1 - hit.double().mean(1)  # (B,)  eq. (2); double: exact for any G
    known = rollout_rewards.isfinite().all(1) & target_reward.isfinite() & negative.any(1)
    mean = (rollout_rewards * negative).sum(1) / negative.sum(1)  # (B,)
    discriminability = torch.where(known, target_reward - mean, torch.nan)  # (B,)  eq. (3)
    admit = (difficulty >= min_difficulty) & (discriminability >= min_margin)  # (B,)  eq. (4)
    return Gate(admit, difficulty.to(rollout_rewards.dtype), discriminability)


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
    weight * admission rate. Raises ValueError on unequal shapes or a negative weight.
    """
    if not nll.shape == grpo.shape == admit.shape or nll.ndim != 1:
        shapes = [tuple(t.shape) for t in (nll, grpo, admit)]
        raise ValueError(f"nll, grpo and admit must be one (B,), got {shapes}")
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, got {weight}")
    return (nll + weight * torch.where(admit.bool(), grpo, 0.0)).mean()


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
        return tensor(measure(taste, items.cpu().numpy()), self.device).float()


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
        for name, truth in (("ctr", world.true_click_probability), ("dwell", world.true_dwell_seconds)):
            figures[name] = shop.truth(truth, split.taste[rows], top).mean(1)
        parts.append(figures)
    result = {name: torch.cat([p[name] for p in parts]).cpu() for name in parts[0]}
    coverage = len(recommended - {-1}) / len(shop.codes)
    return result | {"coverage": torch.full_like(result["ctr"], coverage)}


@torch.no_grad()
def ranker_auc(shop: Shop, split: Split) -> Tensor:
    """Per user, the share of the catalogue that the ranker puts below the target (N,); ties half."""
    parts = []
    for start in range(0, len(split.target), 250):
        history = tensor(split.history[start : start + 250], shop.device)
        target = tensor(split.target[start : start + 250], shop.device)[:, None]
        scores = shop.ranker(history, torch.arange(len(shop.codes), device=shop.device).expand(len(history), -1))
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
    "reweight": lambda gate, hard, clear, right: gate,  # NLL once more in place of GRPO
    "easy+clear": lambda gate, hard, clear, right: ~hard & clear,
    "hard+blind": lambda gate, hard, clear, right: hard & ~clear,
    "easy+blind": lambda gate, hard, clear, right: ~hard & ~clear,
}


def parse_arm(name: str, default_weight: float) -> tuple[str, float]:
    """"mix-0.3" -> ("mix", 0.3); without a number the weight is the default, for nll 0."""
    rule, _, number = name.partition("-")
    try:
        weight = float(number) if number else default_weight * (rule != "nll")
    except ValueError:
        weight = -1.0
    if rule not in RULES or not 0 <= weight < float("inf"):
        raise ValueError(f"arms: unknown arm {name!r}; RULE or RULE-WEIGHT, rules: {', '.join(RULES)}")
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


def train(start: Policy, shop: Shop, arm: str, config: Config) -> dict:
    """Post-train a copy of `start` by one arm on fresh batches, the same ones for every arm.

    Returns per-user test figures of the checkpoint that is best on validation ("best") and of the
    last one ("final"), the figures of every checkpoint on validation with the training figures
    averaged since the one before ("log"), and both checkpoints' weights.
    """
    rule, weight = parse_arm(arm, config.weight)
    policy, split = copy.deepcopy(start), shop.world.posttrain
    history, target = tensor(split.history, shop.device), tensor(split.target, shop.device)
    update = Updates(policy, config.lr, config.steps, arm)
    log, since, best, weights = [], [], -1.0, {}
    for step in range(1, config.steps + 1):
        rows = slice((step - 1) * config.batch, step * config.batch)
        x, y = shop.prompt(history[rows]), shop.tokens(target[rows])
        if weight == 0:  # the gate stays shut whatever the group says: save the rollouts
            nll = -policy.target_logp(x, y)
            loss, seen = nll.mean(), {}
        else:
            rolled = rollout(policy, x, config.group, config.kind, y)  # eq. (1)
            items, rewards, gate = judge(shop, config, history[rows], target[rows], rolled.tokens)
            hard = gate.difficulty >= config.min_difficulty
            clear = gate.discriminability >= config.min_margin
            truth = shop.truth(shop.world.true_click_probability, split.taste[rows], items)
            agree = order_agreement(rewards, truth)  # for the log, and for the oracle arm alone
            admit = RULES[rule](gate.admit, hard, clear, agree >= 0.6)
            ratio_of = rolled.logp, rolled.logp.detach()  # on-policy: ratio 1, gradient not 0
            grpo = grpo_loss(*ratio_of, group_advantages(rewards), config.clip)
            nll = -rolled.target_logp
            term = nll if rule == "reweight" else grpo
            loss = adagrpo_loss(nll * (rule != "grpo"), term, admit, weight)
            seen = {"admitted": admit, "easy": ~hard, "not_discriminating": hard & ~clear}
            seen |= {"grpo": grpo, "reward": rewards, "spread": rewards.std(1), "invalid": items < 0}
            seen |= {"agree_admitted": agree[gate.admit], "agree_refused": agree[~gate.admit]}
        seen = {name: value.float().mean().item() for name, value in ({"nll": nll} | seen).items()}
        show = {name: f"{seen[name]:.2f}" for name in ("nll", "reward", "admitted") if name in seen}
        since.append(seen | {"grad_norm": update(loss, **show)})
        if step * config.checkpoints // config.steps > (step - 1) * config.checkpoints // config.steps:
            found = {k: v.mean().item() for k, v in evaluate(policy, shop, shop.world.valid).items()}
            means = {name: np.array([s[name] for s in since]) for name in since[0]}
            means = {name: float(np.nanmean(v)) for name, v in means.items() if not np.isnan(v).all()}
            log.append({"step": step} | means | {f"valid {k}": v for k, v in found.items()})
            weights["final"], since = copy.deepcopy(policy.state_dict()), []
            if found["hr@10"] > best:
                best, weights["best"] = found["hr@10"], weights["final"]
    final = evaluate(policy, shop, shop.world.test)
    policy.load_state_dict(weights["best"])
    same = weights["best"] is weights["final"]
    picked = final if same else evaluate(policy, shop, shop.world.test)
    return {"best": picked, "final": final, "log": log, "weights": weights}


# ------------------------------------------------------------------------ experiment, reports

BINS = ((0, 20), (20, 200), (200, 1000), (1000, 10**9))  # impressions of the target
CELLS = ("easy, blind", "easy, clear", "hard, blind", "hard, clear")
METRICS = {"hr@10": 100, "ndcg@10": 100, "hallucination": 100, "ctr": 100, "dwell": 1}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student, 1 to 9 degrees of freedom
MIXES = ("mix-0.03", "mix-0.1", "mix-0.3", "mix-1", "mix-3", "mix-10")
SWEEP = ("adagrpo-0.3", "adagrpo-1", "adagrpo-3", "adagrpo", "adagrpo-10", "adagrpo-30")
CONTROLS = ("grpo", "random", "inverted", "reweight", "difficulty", "discriminability", "oracle")
CELL_ARMS = ("easy+blind", "easy+clear", "hard+blind")  # hard+clear is adagrpo itself
DOSES, DOSED = (0.0, 0.5), ("mix-0.3", "mix-1", "adagrpo")  # bias 1 is in the arms above


def keep(path: Path | None, make: Callable[[], dict]) -> dict:
    """The dict stored at `path`, or make() stored there whole or not at all (path None: no file)."""
    if path is None:
        return make()
    if not path.exists():
        write(path, lambda partial: torch.save(make(), partial))
    return torch.load(path, map_location="cpu", weights_only=True)


def write(path: Path, save: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def strata(policy: Policy, shop: Shop, config: Config) -> Tensor:
    """Cell of every test user by the gate's own two tests, before post-training (N,): CELLS."""
    cells, test = [], shop.world.test
    for start in range(0, len(test.target), 500):
        history, target = (tensor(a[start : start + 500], shop.device) for a in (test.history, test.target))
        with torch.no_grad():
            tokens = rollout(policy, shop.prompt(history), config.group, config.kind).tokens
        _, _, gate = judge(shop, config, history, target, tokens)
        hard = gate.difficulty >= config.min_difficulty
        cells.append(2 * hard + (gate.discriminability >= config.min_margin))
    return torch.cat(cells).cpu()


def experiment(config: Config, device: torch.device, out: Path | None) -> tuple[dict, dict]:
    """Every (seed, bias, arm) that the config asks for, each kept in `out` when it is finished."""
    arms = list(config.arms)
    if config.study:
        arms = ["nll", *MIXES, *SWEEP, *CONTROLS, *CELL_ARMS]
    seeds = range(config.seed, config.seed + config.seeds)
    jobs = [(s, config.bias, a) for s in seeds for a in arms]
    jobs += [(s, b, a) for s in seeds for b in DOSES for a in DOSED if config.study]
    jobs.sort(key=lambda job: job[0])  # seed by seed, so that what is finished is complete
    sizes = {"pretrain": 1500, "valid": 200, "test": 400, "feed": 20_000} if config.quick else {}
    bases, runs, bench, started, trained = {}, {}, {}, time.time(), 0
    for number, (seed, bias, arm) in enumerate(jobs):

        def file(name):
            return out and out / f"seed{seed}-bias{bias:g}-{name}.pt"

        def shop(stored: dict | None = None) -> Shop:
            if (seed, bias) not in bench:
                bench.clear()  # one world in memory at a time
                world = make_world(seed, bias=bias, posttrain=config.steps * config.batch, **sizes)
                torch.manual_seed(seed)
                ranker = Ranker(len(world.codes)).to(device)
                if stored is None:
                    ranker = train_ranker(world, config, device)
                else:
                    ranker.load_state_dict(stored["ranker"])
                bench[seed, bias] = Shop(world, ranker.eval().requires_grad_(False), device)
            return bench[seed, bias]

        def base() -> dict:
            torch.manual_seed(seed)
            twin = bases.get((seed, config.bias))  # purchases do not depend on the bias
            policy = Policy(config.width).to(device)
            if twin is None:
                policy = pretrain(shop(), config)
            else:
                policy.load_state_dict(twin["policy"])
            exposure = torch.from_numpy(shop().world.exposure[shop().world.test.target])
            result = {"auc": ranker_auc(shop(), shop().world.test), "exposure": exposure}
            result |= {"cell": strata(policy, shop(), config), "policy": policy.state_dict()}
            return result | {"ranker": shop().ranker.state_dict()}

        if (seed, bias) not in bases:
            bases[seed, bias] = keep(file("base"), base)

        def run() -> dict:
            policy = Policy(config.width).to(device)
            policy.load_state_dict(bases[seed, bias]["policy"])
            torch.manual_seed(seed)
            return train(policy, shop(bases[seed, bias]), arm, config)

        before, fresh = time.time(), out is None or not file(arm).exists()
        runs[seed, bias, arm] = keep(file(arm), run)
        trained += fresh
        left = (time.time() - started) / max(trained, 1) * (len(jobs) - number - 1) / 60
        took = f"{time.time() - before:.0f} s" if fresh else "found"
        print(f"[{number + 1}/{len(jobs)}] seed {seed} bias {bias:g} {arm}: {took}, "
              f"at most {left:.0f} min left", file=sys.stderr, flush=True)  # fmt: skip
    return bases, runs


def estimate(samples: list[Tensor]) -> tuple[float, float]:
    """Mean and 95% half-width: over users if there is one seed, else over the seeds' means."""
    if len(samples) == 1:
        values, factor = samples[0].double(), 1.96
    else:
        values = torch.stack([sample.double().mean() for sample in samples])
        factor = T95[min(len(samples) - 1, len(T95)) - 1]
    if len(values) < 2:
        return values.mean().item(), float("nan")
    return values.mean().item(), factor * (values.std() / len(values) ** 0.5).item()


def report(config: Config, bases: dict, runs: dict) -> None:
    """Print the tables: premise, arms, exposure, strata, simulated A/B. Same figures, any arms."""
    seeds = range(config.seed, config.seed + config.seeds)
    arms = [arm for seed, bias, arm in runs if seed == config.seed and bias == config.bias]
    base = [bases[seed, config.bias] for seed in seeds]

    def users(arm: str, metric: str, which: str = "final") -> list[Tensor]:
        return [runs[seed, config.bias, arm][which][metric] for seed in seeds]

    def gain(arm, metric, scale=100, which="final", masks=None) -> str:
        pairs = zip(users(arm, metric, which), users("nll", metric, which), strict=True)
        change = [scale * (a - b) for a, b in pairs]
        change = change if masks is None else [c[m] for c, m in zip(change, masks, strict=True)]
        return "{:+6.2f} ±{:5.2f}".format(*estimate(change))

    print("\nPremise: the ranker's AUC (target against the catalogue) by impressions of the target")
    for low, high in BINS:
        inside = [b["auc"][(b["exposure"] >= low) & (b["exposure"] < high)] for b in base]
        if min(map(len, inside)) > 1:
            share = np.mean([len(i) / len(b["auc"]) for i, b in zip(inside, base, strict=True)])
            figures = "{:.3f} ±{:.3f}".format(*estimate(inside))
            print(f"  {low:>5} to {high if high < 10**9 else '...':<5} {share:5.0%} of users  {figures}")
    compare = "nll" in arms
    print("\nTest users; in brackets the difference to nll and its 95% interval, paired")
    print(f"{'arm':<18}{'':<6}" + "".join(f"{m:<26}" for m in METRICS) + "admitted")
    for arm in arms:
        log = [entry for seed in seeds for entry in runs[seed, config.bias, arm]["log"]]
        admitted = np.mean([entry.get("admitted", 0.0) for entry in log])
        for which in ("best", "final"):
            row = f"{arm:<18}{which:<6}"
            for metric, scale in METRICS.items():
                value = scale * estimate(users(arm, metric, which))[0]
                change = f" ({gain(arm, metric, scale, which)})" if compare and arm != "nll" else ""
                row += f"{value:6.2f}{change}".ljust(26)
            print(row + f"{admitted:7.1%}")
    if not compare:
        return
    others = [arm for arm in arms if arm != "nll"]
    print("\nHR@10 points against nll, final checkpoint, by impressions of the target")
    print(f"{'arm':<18}" + "".join(f"{low:>10}+{'':<8}" for low, _ in BINS))
    for arm in others:
        row = f"{arm:<18}"
        for low, high in BINS:
            masks = [(b["exposure"] >= low) & (b["exposure"] < high) for b in base]
            row += gain(arm, "hr@10", masks=masks).rjust(18) + " " if all(m.sum() > 1 for m in masks) else "-".rjust(18) + " "
        print(row)
    print("\nHR@10 points against nll, final checkpoint, by stratum before post-training")
    print(f"{'arm':<18}" + "".join(f"{name:>19}" for name in CELLS))
    shares = [np.mean([(b["cell"] == c).float().mean() for b in base]) for c in range(4)]
    print(f"{'share of users':<18}" + "".join(f"{share:>19.1%}" for share in shares))
    for arm in others:
        row = f"{arm:<18}"
        for cell in range(4):
            masks = [b["cell"] == cell for b in base]
            row += gain(arm, "hr@10", masks=masks).rjust(19) if all(m.sum() > 1 for m in masks) else "-".rjust(19)
        print(row)
    print("\nSimulated A/B against nll: the top-10 slate by the world's truth, the same users twice")
    for arm in others:
        print(f"  {arm:<18} clicks {gain(arm, 'ctr')} points, dwell {gain(arm, 'dwell', 1)} s")


def verdicts(config: Config, bases: dict, runs: dict) -> list[dict]:
    """The study's claims, each a figure per seed and a bound. Thresholds: the paper's, or 0."""
    bias = config.bias

    def hr(arm, seed, metric="hr@10", which="final", at=bias, cell=None):
        values = 100 * runs[seed, at, arm][which][metric]
        return (values if cell is None else values[bases[seed, at]["cell"] == cell]).mean().item()

    def over(arm, other="nll", **k):
        return lambda s: hr(arm, s, **k) - hr(other, s, **k)

    def relative(which, metric="hr@10"):
        return lambda s: 100 * (hr("adagrpo", s, metric, which) / hr("nll", s, metric, which) - 1)

    def auc(s, low, high):
        exposure = bases[s, bias]["exposure"]
        return bases[s, bias]["auc"][(exposure >= low) & (exposure < high)].mean().item()

    def valid(arm, s):
        return runs[s, bias, arm]["log"][-1]["valid hr@10"]

    def best(arms, s):
        return max(arms, key=lambda arm: valid(arm, s))

    def frontier(s):
        point = {arm: (hr(arm, s), hr(arm, s, "hallucination")) for arm in (*MIXES, *SWEEP)}
        return min(max(point[a][0] - point[m][0] for a in SWEEP if point[a][1] <= point[m][1] + 0.05)
                   for m in MIXES)  # fmt: skip

    def agreement(s):
        log = runs[s, bias, "adagrpo"]["log"]
        return 100 * np.mean([e["agree_admitted"] - e["agree_refused"] for e in log])

    def lead(other, s, at):
        return hr("adagrpo", s, at=at) - hr(other, s, at=at)

    wide = ("0.3", "1", "3", "10")
    claims = [
        ("1 premise: AUC where the feed showed the target 1000+ times", ">=", 0.9, lambda s: auc(s, 1000, 1e9)),
        ("1 premise: AUC where it showed it fewer than 20 times", "<=", 0.6, lambda s: auc(s, 0, 20)),
    ]
    for cell, name in enumerate(CELLS):
        bound = (">=", 0) if cell == 3 else ("<=", 0.5)
        only = CELL_ARMS[cell] if cell < 3 else "adagrpo"
        claims += [
            (f"2 strata: mix-0.3 on {name} samples, points", *bound, over("mix-0.3", cell=cell)),
            (f"2 strata: mix-1 on {name} samples, points", *bound, over("mix-1", cell=cell)),
            (f"2 strata: GRPO only in {name}, whole test set, points", *bound, over(only)),
        ]
    claims += [
        ("3 best checkpoint: HR@10 over nll, relative %", ">=", 10.6, relative("best")),
        ("3 best checkpoint: hallucination, %", "<=", 0.22, lambda s: hr("adagrpo", s, "hallucination", "best")),
        ("4 final checkpoint: HR@10 over nll, relative %", ">=", 5.6, relative("final")),
        ("4 final checkpoint: hallucination, %", "<=", 0.27, lambda s: hr("adagrpo", s, "hallucination")),
        *((f"5 frontier: adagrpo over {m}, points", ">=", 0, over("adagrpo", m)) for m in MIXES),
        ("5 frontier: adagrpo over the mixture best on validation", ">=", 0, lambda s: hr("adagrpo", s) - hr(best(MIXES, s), s)),
        ("5 frontier: both picked on validation", ">=", 0, lambda s: hr(best(SWEEP, s), s) - hr(best(MIXES, s), s)),
        ("5 frontier: adagrpo's sweep above every mixture, worst gap", ">=", 0, frontier),
        *((f"6 robustness: adagrpo at weight {w} over nll", ">=", 0, over(f"adagrpo-{w}")) for w in wide),
        *((f"6 robustness: mix-{w} falls below nll", "<=", 0, over(f"mix-{w}")) for w in wide),
        *((f"7 controls: adagrpo over {c}, points", ">=", 0, over("adagrpo", c)) for c in CONTROLS if c != "oracle"),
        ("7 controls: left to gain, oracle gate over adagrpo", ">=", 0, over("oracle", "adagrpo")),
        ("7 gate precision: order agreement, admitted - refused, points", ">=", 0, agreement),
        *((f"8 dose: {m} falls from bias 0 to {bias:g}", ">=", 0, lambda s, m=m: hr(m, s, at=0.0) - hr(m, s)) for m in DOSED[:2]),
        *((f"8 dose: adagrpo's lead over {m} grows from bias 0 to {bias:g}", ">=", 0, lambda s, m=m: lead(m, s, bias) - lead(m, s, 0.0)) for m in DOSED[:2]),
        *((f"8 dose: adagrpo's lead over {m} at bias {b:g}", "<=" if b == 0 else ">=", 0.5 if b == 0 else 0, lambda s, m=m, b=b: lead(m, s, b)) for b in (*DOSES, bias) for m in DOSED[:2]),
        ("9 simulated A/B: clicks over nll, relative %", ">=", 0, relative("final", "ctr")),
        ("9 simulated A/B: dwell over nll, relative %", ">=", 0, relative("final", "dwell")),
    ]
    rows = []
    print(f"\n{'claim':<64}{'bound':>8}{'figure':>9}{'95% interval':>20}  verdict")
    for text, sign, bound, figure in claims:
        per_seed = [figure(s) for s in range(config.seed, config.seed + config.seeds)]
        mean, half = estimate([torch.tensor([v]) for v in per_seed])
        side = 1 if sign == ">=" else -1
        met, surely = side * (mean - bound) >= 0, side * (mean - bound) >= half
        verdict = "holds" if surely else "mean only" if met else "does not hold"
        rows.append({"claim": text, "bound": f"{sign} {bound}", "per_seed": per_seed, "verdict": verdict})
        print(f"{text:<64}{sign:>3}{bound:>5g}{mean:9.3f}{f'[{mean - half:.3f}, {mean + half:.3f}]':>20}  {verdict}")
    return rows


# ------------------------------------------------------------------------------------ command


def parse(argv: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Config):
        flag, shape = "--" + f.name.replace("_", "-"), {"type": type(f.default)}
        if isinstance(f.default, bool):
            shape = {"action": "store_true"}
        elif isinstance(f.default, tuple):
            shape = {"nargs": "+", "type": str}
        parser.add_argument(flag, default=f.default, help=f.metadata["help"], **shape)
    config = Config(**vars(parser.parse_args(argv)))
    if config.quick:
        config = replace(config, steps=40, checkpoints=2, pretrain_epochs=2, ranker_epochs=2, group=16)
    return config


def prepare(config: Config) -> tuple[torch.device, Path | None]:
    """Check every setting before hours of work; ValueError or OSError names what is wrong."""
    for arm in config.arms:
        parse_arm(arm, config.weight)
    floors = {"seeds": 1, "steps": 1, "batch": 1, "group": 2, "width": 4, "checkpoints": 1}
    floors |= {"pretrain_epochs": 1, "ranker_epochs": 1, "seed": 0}
    for name, floor in floors.items():
        if getattr(config, name) < floor:
            raise ValueError(f"{name} must be at least {floor}, got {getattr(config, name)}")
    if config.width % 4 or config.checkpoints > config.steps:
        raise ValueError("width must be a multiple of 4 (heads) and checkpoints at most steps")
    if config.kind not in ("beam", "sample"):
        raise ValueError(f"kind must be beam or sample, got {config.kind!r}")
    if not (0 <= config.min_difficulty <= 1 and -1 <= config.min_margin <= 1):
        raise ValueError("min_difficulty must be in [0, 1] and min_margin in [-1, 1]")
    if not (config.lr > 0 and config.weight >= 0 and config.clip > 0 and 0 <= config.bias < 1e9):
        raise ValueError("lr and clip must be positive, weight and bias not negative, all finite")
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = config.device
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if found[d])
    if not found.get(name):
        raise ValueError(f"device {config.device!r} is not available; here: {[d for d in found if found[d]]}")
    out = Path(config.out) if config.out else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
        ours = {k: v for k, v in asdict(config).items() if k not in ("arms", "seed", "seeds", "out", "study")}
        stored = out / "config.json"
        if not stored.exists():
            write(stored, lambda partial: partial.write_text(json.dumps(ours, indent=1)))
        elif json.loads(stored.read_text()) != ours:
            raise ValueError(f"out: {out} holds results of other settings; choose another directory")
        write(out / "writable", lambda partial: partial.write_text(""))
        (out / "writable").unlink()
    return torch.device(name), out


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    try:
        device, out = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit(f"adagrpo.py: {error}")
    bases, runs = experiment(config, device, out)
    report(config, bases, runs)
    claims = verdicts(config, bases, runs) if config.study else []
    if out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        means = lambda figures: {name: value.mean().item() for name, value in figures.items()}
        rows = [
            {"seed": seed, "bias": bias, "arm": arm, "log": run["log"], "best": means(run["best"]),
             "final": means(run["final"])} for (seed, bias, arm), run in runs.items()
        ]  # fmt: skip
        results = {"config": asdict(config), "versions": versions, "runs": rows, "claims": claims}
        write(out / "results.json", lambda partial: partial.write_text(json.dumps(results, indent=1)))
        print(f"\nwrote {out / 'results.json'}; weights of both checkpoints of each arm are beside it")


if __name__ == "__main__":
    main()
