# SPDX-License-Identifier: MIT
"""AdaGRPO in one file: reinforcement learning for generative recommendation with a biased ranker.

A policy writes the semantic ID of the next item; a ranker scores what it wrote. The ranker is right
about some samples and wrong about others, because its log shows only what an old feed exposed.
AdaGRPO trains EVERY sample with supervised NLL and lets the GRPO term in only where the policy
finds the sample hard AND the ranker can tell the true item from the group's negatives.

  (1) rollouts          o_1..o_G from policy(. | x): beams or random draws, likeliest first
  (2) difficulty        d = share of the group ahead of the target y; 1 if y is not in the group
  (3) discriminability  m = r(y) - mean r(o_i) over the negatives: valid o_i other than y
  (4) gate              g = [d >= min_difficulty and m >= min_margin], 0 or 1, no gradient
  (5) advantage         A_i = (r(o_i) - mean r) / std r within the group; exactly 0 if r is flat
  (6) GRPO              -mean_i min(ratio_i A_i, clip(ratio_i) A_i), ratio on the whole item
  (7) loss              mean over the batch of (NLL + weight * g * GRPO); NLL = -log policy(y | x)

x is a history; r is the ranker's click probability, 0 where an ID names no item (a hallucination).
Shapes: B samples, G rollouts each, T prompt tokens, V tokens in all, L = 3 tokens per item.
Start at `training_step`, the seven equations on one screen, or read from the top. Left out: KL (NLL
is the anchor), several updates per rollout (so the ratio is 1), constrained decoding (it would hide
hallucinations), distributed training.
Paper: Xu et al., "Adaptive Loss Balancing for Noise-Robust GRPO in Generative Recommendation",
arXiv 2606.08480 (2026). Only its abstract was available: the idea is theirs, the formulas are ours
unless a source is named. GRPO: Shao et al., DeepSeekMath, arXiv 2402.03300.
"""

import copy
import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import cpu_count, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy_data import HISTORY, ITEMS, KINDS, VOCAB, L, Split, World, make_world


# ------------------------------------------------------- policy and ranker, training, rollouts
class Block(nn.Module):
    """Pre-norm transformer block that can attend to the keys and values of an earlier call."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple | None, sees: Tensor | None):
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, 4, D // 4).permute(2, 0, 3, 1, 4)  # 4 heads
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), (k, v)


class Policy(nn.Module):
    """A small GPT over semantic-ID tokens; decoding is free, so it may name no item.

    forward(tokens (B, N)) -> log-probabilities of what follows each (B, N, V), and keys and values.
    With those of a prompt as `cache`, the tokens are no sequence but the next of N branches, all at
    position `start`, and `sees` (B, 1, N, keys) says what each may attend to.
    """

    def __init__(self, tokens: Tensor, width: int = 64, vocab: int = VOCAB):
        super().__init__()
        self.tokens = tokens  # (ITEMS, 3) the ID of every item
        self.item_of = torch.full((vocab,) * L, -1)  # tokens -> item; -1: a hallucination
        self.item_of[tokens.unbind(1)] = torch.arange(len(tokens))
        self.embedding = nn.Embedding(vocab, width)
        self.position = nn.Embedding(L * (HISTORY + 1), width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for matrix in (parameter for parameter in self.parameters() if parameter.ndim == 2):
            nn.init.normal_(matrix, std=0.02)

    def forward(self, tokens: Tensor, cache=(None, None), start: int | None = None, sees=None):
        where = torch.arange(tokens.shape[1]) if start is None else torch.tensor(start)
        x, new = self.embedding(tokens) + self.position(where), []
        for block, past in zip(self.blocks, cache, strict=True):
            x, keys = block(x, past, sees)
            new.append(keys)
        return self.head(self.norm(x)).log_softmax(-1), new


class Ranker(nn.Module):
    """Click model: an MLP on [user, item, 10 * user * item]; user = mean embedding of the history.

    forward(history (B, 8), items (B, K)), both item numbers -> click probabilities (B, K), 0 for a
    hallucination (-1). The mean is a bag: the ranker cannot see in which order things were bought.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.past, self.item = nn.Embedding(ITEMS, width), nn.Embedding(ITEMS, width)
        nn.init.normal_(self.past.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        hidden = nn.Linear(3 * width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        self.mlp = nn.Sequential(*hidden, nn.Linear(64, 1), nn.Sigmoid(), nn.Flatten())

    def forward(self, history: Tensor, items: Tensor) -> Tensor:
        item = self.item(items.clamp(min=0))  # (B, K, width)
        user = self.past(history).mean(1, keepdim=True).expand_as(item)
        clicks = self.mlp(torch.cat([user, item, 10 * user * item], dim=-1))
        return torch.where(items < 0, 0.0, clicks)


def fit(model: nn.Module, lr: float, batches: Sequence, loss_of: Callable, label: str):
    """One AdamW update per batch: warm-up, linear decay towards 0, gradient norm at most 1."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for step, batch in enumerate(tqdm(batches, label, leave=False, disable=None)):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - step / len(batches))
        optimizer.zero_grad()
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def train_ranker(world: World, negatives: int) -> Ranker:
    """BCE on clicks, plus random catalogue items per slate labelled "no click": as in production,
    what the feed never showed is learned from those alone."""
    ranker, history = Ranker(), torch.as_tensor(world.feed.history)
    shown, clicked = torch.as_tensor(world.shown), torch.as_tensor(world.clicked).float()

    def loss_of(rows: Tensor) -> Tensor:
        items = torch.cat([shown[rows], torch.randint(ITEMS, (len(rows), negatives))], dim=1)
        labels = F.pad(clicked[rows], (0, negatives))  # (B, 10 + negatives)
        return F.binary_cross_entropy(ranker(history[rows], items), labels)

    return fit(ranker, 6e-3, torch.randperm(len(shown)).repeat(3).split(512), loss_of, "ranker")


def pretrain(world: World) -> Policy:
    """Next-token NLL on every position of last season's purchase sequences."""
    policy, split = Policy(torch.as_tensor(world.tokens)), world.pretrain
    bought = policy.tokens[np.column_stack([split.history, split.target])].flatten(1)  # (N, 27)

    def loss_of(rows: Tensor) -> Tensor:
        logp, _ = policy(bought[rows, :-1])
        return F.nll_loss(logp.mT, bought[rows, 1:])

    return fit(policy, 1e-3, torch.randperm(len(bought)).repeat(4).split(128), loss_of, "pretrain")


def rollout(policy: Policy, prompt: Tensor, target: Tensor, group: int, decode: str):
    """Eq. (1): rollouts (B, G, 3), their log-probabilities (B, G), and the target's (B,).

    prompt (B, T) is encoded once; each branch attends to it and to its own tokens (mask `sees`), so
    G costs little. The target (B, 3) is one more branch whose tokens are given: NLL needs no second
    forward. `decode` is "beam" or "sample", from all V tokens; likeliest first either way.
    """
    (B, T), row = prompt.shape, torch.arange(len(prompt))[:, None]
    logp, cache = policy(prompt)
    logp = logp[:, -1:].expand(-1, 2, -1)  # two branches so far: the group's root, the target's
    total, tokens = torch.zeros(B, 2), torch.zeros(B, 2, 0, dtype=torch.long)  # nothing written yet
    sees = torch.ones(B, 2, T, dtype=torch.bool)  # the whole prompt
    for level in range(L):
        Q, V = logp.shape[1] - 1, logp.shape[2]  # Q branches of the group, then the target's
        with torch.no_grad():  # which branches exist carries no gradient
            if decode == "beam":  # the likeliest of all Q * V continuations
                best = (total[..., None] + logp)[:, :-1].flatten(1).topk(min(group, Q * V)).indices
                parent, token = best // V, best % V  # (B, G) each
            else:  # G draws from the root, then one from every branch, by inverse transform
                parent = (torch.arange(group) * Q // group).expand(B, -1)
                cdf = logp[..., :-1].exp().cumsum(-1)  # a draw is the number of these below it
                token = (cdf[row, parent] < torch.rand(B, group, 1)).sum(-1)
        parent = F.pad(parent, (0, 1), value=Q)  # the target's branch goes on with itself
        token = torch.cat([token, target[:, level, None]], dim=1)  # (B, G + 1)
        total = total.gather(1, parent) + logp.flatten(1).gather(1, parent * V + token)
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
    min_difficulty: float,  # in 0..1
    min_margin: float,  # in -1..1
) -> Gate:
    """Eq. (2)-(4): admit GRPO per sample where the policy finds it hard and the ranker is clear.

    Copy it with `Gate`: they need torch alone. The G columns stand in the policy's order, likeliest
    first. A margin and not a rank: where the ranker is blind its scores are all but equal, and a
    rank cannot see that. Thresholds are inclusive. A sample without a valid negative or with a
    non-finite reward stays out, its discriminability is nan. ValueError names a bad argument.
    """
    shape = tuple(rollout_rewards.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"rollout_rewards must be (B, G) with G >= 2, got {shape}")
    if target_reward.shape != shape[:1]:
        raise ValueError(f"target_reward must be {shape[:1]}, got {tuple(target_reward.shape)}")
    for name, mask in {"hit": hit, "valid": valid}.items():
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
    if not (0 <= min_difficulty <= 1 and -1 <= min_margin <= 1):
        raise ValueError(f"{min_difficulty=} must be in [0, 1], {min_margin=} in [-1, 1]")
    difficulty = (hit.cumsum(1) == 0).sum(1) / shape[1]  # (B,)  eq. (2): columns before a hit
    negative = valid & ~hit  # (B, G)
    mean = torch.where(negative, rollout_rewards, 0.0).sum(1) / negative.sum(1)  # (B,)
    known = rollout_rewards.isfinite().all(1) & target_reward.isfinite() & negative.any(1)
    discriminability = torch.where(known, target_reward - mean, torch.nan)  # (B,)  eq. (3)
    hard, clear = difficulty >= min_difficulty, discriminability >= min_margin
    return Gate(hard & clear, hard, clear, difficulty, discriminability)  # eq. (4)


def group_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """Eq. (5): rewards (B, G), else ValueError -> standardised within each group (B, G), as GRPO.

    A flat group (std at most 1e-6) gets exactly 0, not rounding error over rounding error; so does
    a group with a non-finite reward. normalize=False only centres: Dr. GRPO, arXiv 2503.20783.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G >= 2, got {tuple(rewards.shape)}")
    std = rewards.std(1, correction=0, keepdim=True)  # (B, 1), nan where a reward is not finite
    centred = rewards - rewards.mean(1, keepdim=True)  # (B, G)
    return torch.where(std > 1e-6, centred / std if normalize else centred, 0.0)


def grpo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Eq. (6): the clipped surrogate per sample; three (B, G) tensors, else ValueError -> (B,).

    With one update per rollout old_logp is logp.detach(): every ratio is 1 and the loss is
    -mean(A) = 0. Its gradient, -mean(A_i * grad logp_i), is not. GRPO without KL, ratio per item.
    """
    if logp.ndim != 2 or not logp.shape == old_logp.shape == advantages.shape:
        raise ValueError(f"must be (B, G): {logp.shape=}, {old_logp.shape=}, {advantages.shape=}")
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean(1)


def adagrpo_loss(nll: Tensor, grpo: Tensor, admit: Tensor, weight: float) -> Tensor:
    """Eq. (7): three (B,) tensors, admit bool, else ValueError -> scalar. Divided by B, not by the
    number admitted: the dose of RL is weight * admission rate. Ours but for the gate."""
    if nll.ndim != 1 or not nll.shape == grpo.shape == admit.shape or admit.dtype != torch.bool:
        raise ValueError(f"must be (B,): {nll.shape=}, {grpo.shape=}, bool {admit.shape=}")
    return (nll + weight * torch.where(admit, grpo, 0.0)).mean()


# ---------------------------------------------------------------------------- training, by arms
# An arm is RULE or RULE-WEIGHT, as in mix-0.3: which samples the GRPO term sees, and how strongly.
# All else is equal, but for the last two rules. `kind` is the world's truth, for the oracle alone.
RULES: dict[str, Callable[[Gate, Tensor], Tensor]] = {
    "nll": lambda gate, kind: torch.zeros_like(gate.admit),
    "mix": lambda gate, kind: torch.ones_like(gate.admit),  # no gate; mix-1000 all but drops NLL
    "adagrpo": lambda gate, kind: gate.admit,
    "difficulty": lambda gate, kind: gate.hard,
    "discriminability": lambda gate, kind: gate.clear,
    "random": lambda gate, kind: gate.admit[torch.randperm(len(kind))],  # at the same rate
    "inverted": lambda gate, kind: ~gate.admit,
    "oracle": lambda gate, kind: kind == KINDS.index("trend"),
    "centred": lambda gate, kind: torch.ones_like(gate.admit),  # a mixture without "/ std"
    "reweight": lambda gate, kind: gate.admit,  # more NLL in place of GRPO
}


def training_step(policy: Policy, ranker: Ranker, arm: str, config: Namespace, batch: tuple):
    """The method on one screen: a batch of one arm -> its loss, and what was seen on the way."""
    history, target, kind = map(torch.as_tensor, batch)  # (B, 8), (B,), (B,)
    rule, _, weight = arm.partition("-")
    prompt, y = policy.tokens[history].flatten(1), policy.tokens[target]  # (B, T), (B, 3)
    tokens, logp, target_logp = rollout(policy, prompt, y, config.group, config.decode)  # eq. (1)
    items, nll = policy.item_of[tokens.unbind(-1)], -target_logp  # (B, G), (B,)
    rewards, own = ranker(history, items).detach(), ranker(history, target[:, None])[:, 0]
    bounds = config.min_difficulty, config.min_margin
    gate = adagrpo_gate(own, rewards, items == target[:, None], items >= 0, *bounds)  # eq. (2)-(4)
    admit = RULES[rule](gate, kind)  # (B,)
    advantages = group_advantages(rewards, normalize=rule != "centred")  # eq. (5)
    grpo = nll if rule == "reweight" else grpo_loss(logp, logp.detach(), advantages)  # eq. (6)
    loss = adagrpo_loss(nll, grpo, admit, float(weight or config.weight))  # eq. (7)
    seen = {"rollouts": tokens, "items": items, "policy": logp.exp(), "reward": rewards, "own": own}
    return loss, seen | {"advantage": advantages, **gate._asdict(), "admit": admit}


def train(policy: Policy, ranker: Ranker, world: World, arm: str, groups, config) -> dict:
    """Post-train by one arm: test figures of the final state and of the best of 3 on validation."""
    torch.manual_seed(torch.initial_seed())  # the same draws, whichever arms came before
    admitted, states = [], [policy]

    def loss_of(batch: tuple) -> Tensor:
        if len(admitted) in (config.steps // 3, config.steps * 2 // 3):
            states.append(copy.deepcopy(policy))
        loss, seen = training_step(policy, ranker, arm, config, batch)
        admitted.append(100 * seen["admit"].float().mean().item())
        return loss

    fit(policy, 1e-3, world.posttrain.batches(config.batch), loss_of, arm)
    hits = [evaluate(m, ranker, world, world.validation, config)[0][0].mean() for m in states]
    top = int(np.argmax(hits))  # the best state; 0, the final one, where they tie
    test = {i: evaluate(states[i], ranker, world, world.test, config)[0] @ groups for i in {0, top}}
    record = {"arm": arm, "admitted": np.mean(admitted), "validation": hits[0]}
    return record | {"final": test[0].tolist(), "best": test[top].tolist()}


# -------------------------------------------------------------------------- evaluation, experiment
METRICS = ("hr@10", "hr@5", "hr@20", "ndcg@10", "hallucination", "ctr", "dwell")
FIGURES = (*METRICS, "auc", "hard", "clear", "share")
GROUPS = ("all", *KINDS, "hard+clear", "hard+unclear", "easy+clear", "easy+unclear")
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 degrees


@torch.no_grad()
def evaluate(policy: Policy, ranker: Ranker, world: World, split: Split, config: Namespace):
    """32 beams over all V^3 IDs, no candidates -> FIGURES but share (10, N); what the gate sees.

    hallucination: share of the top 10 that names no item. ctr, dwell: of the top 10, by the world's
    truth (simulated). auc: the ranker's, target against 100 random items. Percent; dwell seconds.
    """
    parts, config = [], Namespace(**vars(config) | {"decode": "beam", "group": 32})
    for batch in tqdm(split.batches(100), "evaluation", leave=False, disable=None):
        _, seen = training_step(policy, ranker, "adagrpo", config, batch)
        others = ranker(torch.as_tensor(batch[0]), torch.randint(ITEMS, (len(batch[0]), 100)))
        parts.append(seen | {"auc": (others < seen["own"][:, None]).float().mean(1)})
    seen = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    found, top = seen["items"] == split.target[:, None], seen["items"][:, :10]
    ndcg = (found[:, :10] / np.log2(np.arange(2, 12))).sum(1)
    clicks, dwell = world.true_clicks_and_dwell(split.taste, top)  # (N, 10) each
    shares = [*(found[:, :k].sum(1) for k in (10, 5, 20)), ndcg, (top < 0).mean(1), clicks.mean(1)]
    shares += [dwell.mean(1) / 100, seen["auc"], seen["hard"], seen["clear"]]  # dwell: no share
    return 100 * np.stack(shares), seen


def example(world: World, seen: dict[str, np.ndarray], user: int) -> list[tuple[str, list[str]]]:
    """A test user's group as rows of a table: its five likeliest rollouts, the verdict."""
    bought = [*world.test.history[user, -3:], world.test.target[user]]
    ids = ["-".join(map(str, i)) for i in (*world.tokens[bought], *seen["rollouts"][user, :5])]
    rows = [("  last bought, target y", ids[:4]), ("  rollouts o_i", ids[4:])]
    for name in ("policy", "reward", "advantage"):
        rows.append((f"    {name}", [f"{value:.3f}" for value in seen[name][user, :5]]))
    gate = [f"{seen[name][user]:.3f}" for name in ("own", "difficulty", "discriminability")]
    verdict = "admitted" if seen["admit"][user] else "not clear" if seen["hard"][user] else "easy"
    return [*rows, ("  r(y), d, m, verdict", [*gate, verdict])]


def work(config: Namespace, seed: int, arms: list[str]) -> list[dict]:
    """One process: a seed's world, ranker and pre-trained policy, and a record for each arm."""
    torch.set_num_threads(1)  # tensors are tiny: processes side by side use the cores better
    if config.device != "cpu":  # on a CPU it would only cost time
        torch.set_default_device(config.device)
    torch.manual_seed(seed)
    world = make_world(seed, config.bias, config.quick, posttrain=config.steps * config.batch)
    start, ranker = pretrain(world), train_ranker(world, config.negatives)
    figures, seen = evaluate(start, ranker, world, world.test, config)
    kinds, cell = [world.test.kind == k for k in range(3)], 2 * seen["hard"] + seen["clear"]
    users = np.stack([cell >= 0, *kinds, *(cell == c for c in (3, 2, 1, 0))])  # by start's gate
    groups = users.T / users.sum(1).clip(1)  # figures @ groups: means by group, (FIGURES, GROUPS)
    before = np.vstack([figures @ groups, 100 * users.mean(1)]).tolist()
    head = {"settings": config.settings, "seed": seed, "before": before}
    head["saw"] = [(f"\nWhat the gate saw, seed {seed}", [])]
    for kind, of_kind, fate in zip(KINDS, kinds, (3, 1, 2), strict=True):  # admitted, easy, unclear
        for user in np.flatnonzero(of_kind & (cell == fate))[:1]:
            head["saw"] += [(f"{kind} shopper", []), *example(world, seen, user)]
    return [head | train(copy.deepcopy(start), ranker, world, arm, groups, config) for arm in arms]


def report(config: Namespace, runs: dict[tuple[int, str], dict]) -> None:
    """The premise, what the gate saw, arms by metric, arms by group of users."""
    seeds, base = range(config.seed, config.seed + config.seeds), config.arms[0]

    def row(name: str, cells: Sequence[str]) -> None:
        print(f"{name:<24}" + "".join(f"{cell:>15}" for cell in cells))

    def cells(arm: str, part: str, at: tuple) -> list[str]:
        values, levels = (np.array([runs[s, a][part] for s in seeds])[at] for a in (arm, base))
        values, sign = (values, "") if arm == base else (values - levels, "+")  # paired by seed
        half = T95[min(len(seeds) - 2, 8)] * values.std(0) / max(len(seeds) - 1, 1) ** 0.5
        form = f"{{:{sign}.2f}}" + " ±{:.2f}" * (len(seeds) > 1)
        return [form.format(*pair) for pair in zip(values.mean(0), half, strict=True)]

    row("Before post-training", GROUPS)
    for name in ("share", "hr@10", "auc", "hard", "clear"):
        row(f"  {name}", cells(base, "before", np.s_[:, FIGURES.index(name)]))
    for name, values in runs[config.seed, base]["saw"]:
        row(name, values)
    for title, names, at in (("Overall", METRICS, np.s_[:, :7, 0]), ("HR@10", GROUPS, np.s_[:, 0])):
        print(f"\n{title}, differences to {base}; ±: 95% over seeds (one is a look, try --seeds 5)")
        row("arm", names)
        for arm in config.arms:
            row(arm, cells(arm, "final", at))


# --------------------------------------------------------------------------------------- command
ARMS = ["nll", "mix-0.3", "mix-1", "difficulty", "discriminability", "adagrpo"]
NUMBERS = {  # default, smallest, largest, meaning
    "seed": (0, 0, 2**31, "first seed: world, initial weights, rollouts"),
    "seeds": (1, 1, 1000, "how many; from 2 on the tables hold intervals over seeds"),
    "jobs": (cpu_count(), 1, 1000, "processes side by side"),
    "bias": (1.0, 0.0, 5.0, "exposure bias of the feed, 0 = none"),
    "negatives": (2, 0, 100, "random negatives per slate in the ranker's training"),
    "steps": (1200, 4, 10**6, "post-training steps, each on fresh users"),
    "batch": (8, 1, 10**5, "users per step (B)"),
    "group": (32, 2, 1000, "rollouts per user (G)"),
    "weight": (5.0, 0.0, 1e6, "of the GRPO term where the arm names none"),
    "min-difficulty": (0.3, 0.0, 1.0, "gate: share of the group ahead of the target"),
    "min-margin": (0.01, -1.0, 1.0, "gate: target's reward over its negatives' mean"),
}


def settings(argv: list[str] | None = None) -> Namespace:
    """The command line; a bad setting ends with exit status 2 and a line that names it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    for name, (value, low, high, text) in NUMBERS.items():
        add(f"--{name}", type=type(value), default=value, help=f"{text} ({value}; {low} to {high})")
    add("--arms", nargs="+", default=ARMS, help=f"RULE or RULE-WEIGHT; rules: {', '.join(RULES)}")
    add("--decode", choices=("beam", "sample"), default="beam", help="how rollouts are made")
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    add("--device", choices=("auto", *here, "cpu"), default="auto", help="auto: a GPU if any")
    add("--out", type=Path, help="JSON file of finished runs, to resume; new code: new file")
    add("--quick", action="store_true", help="tiny world, at most 40 steps and G 16: a look")
    config = parser.parse_args(argv)
    if config.quick:
        config.steps, config.group = min(config.steps, 40), min(config.group, 16)
    for name, (_, low, high, _) in NUMBERS.items():
        value = vars(config)[name.replace("-", "_")]
        if not low <= value <= high:
            parser.error(f"argument --{name}: must be in [{low}, {high}], got {value}")
    for arm in config.arms:
        if not re.fullmatch(rf"({'|'.join(RULES)})(-\d*\.?\d+)?", arm):
            parser.error(f"argument --arms: unknown arm {arm!r}, see --help")
    config.device = (*here, "cpu")[0] if config.device == "auto" else config.device
    same = vars(config).keys() - {"arms", "seed", "seeds", "jobs", "out"}  # what figures depend on
    config.settings = {name: vars(config)[name] for name in sorted(same)}
    return config


def main(argv: list[str] | None = None) -> None:
    """Train what config.out lacks, in config.jobs processes, and report."""
    config, records = settings(argv), []
    try:  # complain before hours of work
        if config.out:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.touch()
            records += json.loads(config.out.read_text() or "[]")
        runs = {(r["seed"], r["arm"]): r for r in records if r["settings"] == config.settings}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"adagrpo.py: --out {config.out}: {error!r}") from error
    parts, shares = -(-config.jobs // config.seeds), []  # processes that share a seed
    for seed in range(config.seed, config.seed + config.seeds):
        arms = [arm for arm in dict.fromkeys(config.arms) if (seed, arm) not in runs]
        shares += [(config, seed, arms[k::parts]) for k in range(min(parts, len(arms)))]
    with ProcessPoolExecutor(config.jobs, get_context("spawn")) as pool:  # CUDA dislikes forks
        for share in as_completed([pool.submit(work, *share) for share in shares]):
            records += share.result()
            runs |= {(record["seed"], record["arm"]): record for record in share.result()}
            if config.out:  # the file is replaced whole or not at all
                draft = config.out.with_suffix(".draft")
                draft.write_text(json.dumps(records))
                draft.replace(config.out)
    report(config, runs)


if __name__ == "__main__":
    main()
