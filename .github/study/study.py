# SPDX-License-Identifier: MIT
"""The study: many seeds and arms of adagrpo.py, one line a record into a file.

    python .github/study/study.py --seeds 0 1 --arms nll adagrpo --out runs/a.jsonl

It calls the functions of adagrpo.py and copies none. An arm is RULE, RULE-WEIGHT, and
any settings of adagrpo.py behind commas: adagrpo-5,epochs=6,lr=1e-3. The rules:

  nll, mix, adagrpo             as in adagrpo.py; mix takes any weight
  difficulty, discriminability  one half of the gate
  random    as many samples of a batch as the gate admits, but others
  level     hard, and the ranker gives the target at least LEVEL
  spread    hard, and the group's rewards have a standard deviation of at least SPREAD
  oracle    trend users, by the truth
  distil    no RL: cross-entropy of the policy's 32 beams to p exp(w r), in the place of
            GRPO; distil-1,w=8. gated-distil-3,w=8: behind the gate
  clicks    NLL on the feed's clicks first, then as nll; 1,600 steps of 128 are all of
            them. clicks,steps=400,passes=2,click_lr=3e-4
  whole     next-token NLL on the post-training users' whole sequences, then as nll
  before    no post-training; it also holds what can be known before it
  diagnosis nll, and what .github/diagnose.py says of its validation users

With draws=N a group is N draws in any order in place of 32 beams (draws of what the
user has are drawn again), and the difficulty is the share of misses:
adagrpo-2,draws=8,min_difficulty=0.9. With clicks=1 any arm learns the clicks first.

The options --bias, --pretrain_epochs, --ranker_epochs, --group, ... are the settings of
adagrpo.py; --slates, --viewers, --ranker, --season_correlation, --max_grad_norm
change the world. With --everybody the histories of validation and test users, too, are
pre-trained on.
--validation skips the test users: to tune. A record is {seed, arm, world, figures};
figures are {group of test users: {metric: value}} in percent (dwell in seconds). It is
saved when its arm ends. What the file holds is not run again, so a run that was stopped
goes on, and several processes may share a file; after a change of the code take a new
one.
"""

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adagrpo
import toy_data
from adagrpo import Config, Gate, Policy, Ranker, Scored
from toy_data import Shop, Split

Rule = Callable[[Gate], Tensor]

LEVEL = 0.1  # in the unit of the ranker's scores
SPREAD = 0.1
TEST_USERS = 12_000
VALIDATION_USERS = 3_000
RANKERS = ("clicks", "rates", "exposure", "noise")

# Settings of adagrpo.py that an arm can change, and settings of its own.
SETTINGS = {"epochs": int, "batch": int, "lr": float, "group": int}
SETTINGS |= {"min_difficulty": float, "min_discriminability": float}
EXTRA = {"w": 8.0, "draws": 0, "clicks": 0}
EXTRA |= {"steps": 1600, "passes": 1, "click_lr": 3e-4}  # of learning the clicks


class Arm(NamedTuple):
    """RULE[-WEIGHT][,SETTING=VALUE ...]"""

    rule: str
    weight: float
    config: Config
    extra: dict


def parse_arm(text: str, config: Config) -> Arm:
    """ValueError if it is none."""
    name, *changes = text.split(",")
    rule, _, weight = name.rpartition("-")
    if rule not in RULES:
        rule = name
        weight = config.weight
    if rule not in RULES:
        raise ValueError(f"{text}: no rule of this name; there are {', '.join(RULES)}")

    extra = dict(EXTRA)
    for change in changes:
        key, _, value = change.partition("=")
        if key in SETTINGS:
            config = replace(config, **{key: SETTINGS[key](value)})
        elif key in EXTRA:
            extra[key] = type(EXTRA[key])(value)
        else:
            raise ValueError(f"{text}: no setting {key} of an arm")
    weight = float(weight)
    check(vars(config) | extra | {"weight": weight})
    return Arm(rule, weight, config, extra)


def check(numbers: dict) -> None:
    """ValueError names what is negative or not finite, or a count of 0."""
    for name, value in numbers.items():
        is_count = isinstance(value, int) and name not in ("seed", "clicks", "draws")
        if not isinstance(value, str) and not is_count <= value < math.inf:
            raise ValueError(f"{name}: {value}")


# ----------------------------------------------------------------------------- the arms


@contextlib.contextmanager
def recorded(draws: int = 0, keep: bool = False) -> Iterator[list]:
    """A list with the histories (B, K) and groups of the last batch, or of all of them.

    draws > 0: the groups are drawn.
    """
    batches = []
    original = adagrpo.roll_out_and_score

    def roll_out_and_score(policy, ranker, history, target, group) -> Scored:
        if draws > 0:
            scored = draw_and_score(policy, ranker, history, target, draws)
        else:
            scored = original(policy, ranker, history, target, group)
        if not keep:
            batches.clear()
        batches.append((history, scored))
        return scored

    with mock.patch.object(adagrpo, "roll_out_and_score", roll_out_and_score):
        yield batches


def draw(policy: Policy, prompt: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draws from the policy: prompt (B, T) -> tokens (B, draws, L), logp (B, draws).

    As in `rollout`, branches stand side by side and a mask keeps them apart.
    """
    B, T = prompt.shape
    L = policy.item_tokens.shape[1]
    next_logp, cache = policy(prompt)
    next_logp = next_logp[:, -1:].expand(-1, draws, -1)  # (B, draws, V)
    total = torch.zeros(B, draws)
    tokens = torch.zeros(B, draws, 0, dtype=torch.long)
    mask = torch.ones(B, draws, T, dtype=torch.bool)
    itself = torch.eye(draws, dtype=torch.bool).expand(B, -1, -1)
    for level in range(L):
        probability = next_logp.detach().exp().flatten(0, 1)
        token = torch.multinomial(probability, 1).view(B, draws)
        total = total + next_logp.gather(2, token[..., None]).squeeze(2)
        tokens = torch.cat([tokens, token[..., None]], dim=2)
        if level < L - 1:
            mask = torch.cat([mask, itself], dim=2)
            next_logp, cache = policy(token, mask, cache)
    return tokens, total


def draw_and_score(
    policy: Policy, ranker: Ranker, history: Tensor, target: Tensor, group: int
) -> Scored:
    """As `roll_out_and_score`, but drawn: the first draws that were not bought."""
    prompt = policy.prompt(history)
    tokens, logp = draw(policy, prompt, 2 * group)
    is_bought = bought(policy, history, tokens)
    while ((~is_bought).sum(1) < group).any():
        more_tokens, more_logp = draw(policy, prompt, 2 * group)
        tokens = torch.cat([tokens, more_tokens], dim=1)
        logp = torch.cat([logp, more_logp], dim=1)
        is_bought = bought(policy, history, tokens)

    kept = is_bought.int().argsort(dim=1, stable=True)[:, :group]
    row = torch.arange(len(history))[:, None]
    tokens = tokens[row, kept]
    items = policy.items_of(tokens)
    valid = items >= 0
    with torch.no_grad():
        scores = ranker.click_probability(history, items.clamp(min=0))
        target_reward = ranker.click_probability(history, target[:, None]).squeeze(1)
    rewards = torch.where(valid, scores, 0.0)
    hit = items == target[:, None]
    return Scored(tokens, logp[row, kept], hit, valid, rewards, target_reward)


def bought(policy: Policy, history: Tensor, tokens: Tensor) -> Tensor:
    """Is it in the history? (B, G) bool"""
    items = policy.items_of(tokens)
    return (items[:, :, None] == history[:, None, :]).any(2)


def misses(scored: Scored, config: Config) -> Gate:
    """The gate for drawn groups: difficulty is the share of misses."""
    return adagrpo.adagrpo_gate(
        target_reward=scored.target_reward,
        rollout_rewards=scored.rewards,
        hit=scored.hit,
        valid=scored.valid,
        min_difficulty=config.min_difficulty,
        min_discriminability=config.min_discriminability,
        ranked=False,
    )


def make_rules(shop: Shop, batches: list) -> dict[str, Rule | None]:
    """Which samples of the last batch get the GRPO term; None for plain NLL."""
    trend = shop.kinds.index("trend")
    kind_of = {}  # no two users have the same history
    for history, kind in zip(shop.posttrain.history, shop.posttrain.kind, strict=True):
        kind_of[tuple(history.tolist())] = kind

    def everybody(gate: Gate) -> Tensor:
        return torch.ones_like(gate.admit)

    def random(gate: Gate) -> Tensor:
        return gate.admit[torch.randperm(len(gate.admit))]

    def spread(gate: Gate) -> Tensor:
        _, scored = batches[-1]
        return gate.hard & (scored.rewards.std(1, correction=0) >= SPREAD)

    def level(gate: Gate) -> Tensor:
        _, scored = batches[-1]
        return gate.hard & (scored.target_reward >= LEVEL)

    def oracle(gate: Gate) -> Tensor:
        history, _ = batches[-1]
        return torch.tensor([kind_of[tuple(row)] == trend for row in history.tolist()])

    return {
        "nll": None,
        "clicks": None,
        "whole": None,
        "diagnosis": None,
        "before": None,
        "mix": everybody,
        "distil": everybody,
        "difficulty": lambda gate: gate.hard,
        "discriminability": lambda gate: gate.clear,
        "adagrpo": lambda gate: gate.admit,
        "gated-distil": lambda gate: gate.admit,
        "random": random,
        "spread": spread,
        "level": level,
        "oracle": oracle,
    }


RULES = ("nll", "clicks", "whole", "diagnosis", "before", "mix", "distil")
RULES += ("difficulty", "discriminability", "adagrpo", "gated-distil", "random")
RULES += ("spread", "level", "oracle")


def distil_loss(logp: Tensor, rewards: Tensor, w: float) -> Tensor:
    """Cross-entropy of the group's probabilities (B, G) to p exp(w r): (B,)."""
    teacher = (logp.detach() + w * rewards).softmax(1)
    return -(teacher * logp.log_softmax(1)).sum(1)


class Tally:
    """A rule that also counts what it saw, for the record."""

    def __init__(self, rule: Rule, batches: list):
        self.rule = rule
        self.batches = batches
        self.samples = 0
        self.admitted = 0
        self.absent = 0  # admitted samples whose group lacks the target
        self.outscored = 0  # admitted samples where a negative outscores the target

    def __call__(self, gate: Gate) -> Tensor:
        admit = self.rule(gate)
        _, scored = self.batches[-1]
        is_higher = scored.rewards > scored.target_reward[:, None]
        self.samples += len(admit)
        self.admitted += int(admit.sum())
        self.absent += int((admit & ~scored.hit.any(1)).sum())
        self.outscored += int((admit & is_higher.any(1)).sum())
        return admit

    def figures(self) -> dict[str, float]:
        admitted = max(self.admitted, 1)
        return {
            "admitted": 100 * self.admitted / max(self.samples, 1),
            "absent": 100 * self.absent / admitted,
            "outscored": 100 * self.outscored / admitted,
        }


def learn_clicks(policy: Policy, shop: Shop, arm: Arm) -> None:
    """Plain NLL on what was clicked in the feed, given what the user had bought."""
    slate, place = np.nonzero(shop.clicked)
    rng = np.random.default_rng(arm.config.seed)
    batch = arm.config.pretrain_batch
    picked = rng.permutation(len(slate))[: arm.extra["steps"] * batch]
    slate = slate[picked]
    target = shop.shown[slate, place[picked]]
    clicks = Split(shop.feed_history[slate], target, np.zeros_like(target))
    passes = arm.extra["passes"]
    config = replace(arm.config, batch=batch, epochs=passes, lr=arm.extra["click_lr"])
    adagrpo.post_train(policy, None, clicks, None, 0.0, config)


def learn_whole(policy: Policy, shop: Shop, config: Config) -> None:
    """Next-token NLL on the post-training users' histories and targets."""
    torch.manual_seed(config.seed)
    split = shop.posttrain
    purchases = np.column_stack([split.history, split.target])
    purchases = purchases[:, -policy.history_length - 1 :]  # what the policy can read
    sequences = policy.item_tokens[purchases].flatten(1)
    batches = adagrpo.shuffled_batches(len(sequences), config.batch, config.epochs)
    optimizer = adagrpo.Optimizer(policy, config.lr, len(batches))
    for rows in batches:
        sequence = sequences[rows]
        next_logp, _ = policy(sequence[:, :-1])
        loss = torch.nn.functional.nll_loss(
            next_logp.flatten(0, 1), sequence[:, 1:].flatten()
        )
        optimizer.step(loss)


def post_trained(
    arm: Arm, shop: Shop, start: Policy, ranker: Ranker
) -> tuple[Policy, dict[str, float]]:
    """A copy of the policy, post-trained by the arm, and what the arm's rule saw."""
    policy = copy.deepcopy(start)
    if arm.rule == "before":
        return policy, {}
    if arm.rule == "clicks" or arm.extra["clicks"]:
        learn_clicks(policy, shop, arm)
    if arm.rule == "whole":
        learn_whole(policy, shop, arm.config)

    with contextlib.ExitStack() as patches:
        batches = patches.enter_context(recorded(arm.extra["draws"]))
        if arm.extra["draws"]:
            patches.enter_context(mock.patch.object(adagrpo, "gate_of", misses))
        if arm.rule.endswith("distil"):

            def distil(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
                _, scored = batches[-1]
                return distil_loss(logp, scored.rewards, arm.extra["w"])

            patches.enter_context(mock.patch.object(adagrpo, "grpo_loss", distil))
        rule = make_rules(shop, batches)[arm.rule]
        if rule is not None:
            rule = Tally(rule, batches)
        split = shop.posttrain
        adagrpo.post_train(policy, ranker, split, rule, arm.weight, arm.config)
    if rule is None:
        return policy, {}
    return policy, rule.figures() | {"weight": arm.weight}


# ---------------------------------------------------------------------------- the world


class Table:
    """A ranker that is a table of one score for each item: it knows no user."""

    def __init__(self, scores: np.ndarray):
        self.scores = torch.as_tensor(scores).float()

    def click_probability(self, history: Tensor, items: Tensor) -> Tensor:
        return self.scores[items]


def times_shown(shop: Shop) -> np.ndarray:
    return np.bincount(shop.shown.ravel(), minlength=len(shop.tokens))


def click_rates(shop: Shop) -> np.ndarray:
    """Clicks of each item per impression, with a prior of one click in twenty."""
    clicks = np.bincount(shop.shown[shop.clicked], minlength=len(shop.tokens))
    return (clicks + 1) / (times_shown(shop) + 20)


def histories_of_everybody(shop: Shop) -> Split:
    """What is pre-trained on, with the histories of those who are tested."""
    users = [shop.validation, shop.test]
    old = [split.history[:, :-1] for split in users]
    last = [split.history[:, -1] for split in users]
    return Split(
        np.concatenate([shop.pretrain.history, *old]),
        np.concatenate([shop.pretrain.target, *last]),
        np.concatenate([shop.pretrain.kind, *[split.kind for split in users]]),
    )


def prepare(config: Config, world: dict) -> tuple[Shop, Policy, Ranker]:
    """A seed's shop, pre-trained policy and ranker."""
    sizes = {"posttrain": config.users, "feed": world["slates"]}
    sizes |= {"test": TEST_USERS, "validation": VALIDATION_USERS}
    sizes |= {"viewers": world["viewers"]}
    correlation = world["season_correlation"]
    with mock.patch.object(toy_data, "SEASON_CORRELATION", correlation):
        shop = toy_data.make_shop(config.seed, config.bias, sizes)
    if "everybody" in world:
        shop = replace(shop, pretrain=histories_of_everybody(shop))
    policy = adagrpo.pretrain(shop, config)
    if world["ranker"] == "rates":
        return shop, policy, Table(click_rates(shop))
    if world["ranker"] == "exposure":
        return shop, policy, Table(times_shown(shop) / times_shown(shop).max())
    if world["ranker"] == "clicks":
        return shop, policy, adagrpo.train_ranker(shop, config)

    # A ranker of noise: never trained, its embeddings wide so that scores differ.
    torch.manual_seed(config.seed)
    ranker = Ranker(len(shop.tokens))
    torch.nn.init.normal_(ranker.bought.weight, std=1.0)
    torch.nn.init.normal_(ranker.offered.weight, std=1.0)
    return shop, policy, ranker


def simulated_clicks(
    config: Config, world: dict, items: np.ndarray
) -> dict[str, np.ndarray]:
    """What test users would do with their lists, by the truth: a simulated A/B test.

    items (N, 10), -1 for a hallucination, which nobody clicks. Returns the mean
    probability of a click and the mean seconds of dwell, (N,) each: a click is worth
    60 s times the appeal.
    """
    names = ["catalogue", *toy_data.SIZES]
    streams = np.random.default_rng(config.seed).spawn(len(names))
    rng = dict(zip(names, streams, strict=True))
    catalogue = toy_data.make_catalogue(rng["catalogue"])
    correlation = world["season_correlation"]
    with mock.patch.object(toy_data, "SEASON_CORRELATION", correlation):
        last, this = toy_data.make_qualities(rng["catalogue"], catalogue)
    _, taste = toy_data.make_users(rng["test"], len(items), catalogue, last, this)

    liking = np.einsum("nkd,nd->nk", catalogue.embedding[items], taste)
    appeal = liking + this[items]
    clicks = np.where(items < 0, 0.0, toy_data.click_probability(appeal))
    dwell = clicks * 60 * np.maximum(appeal, 0)
    return {"ctr": clicks.mean(1), "dwell": dwell.mean(1)}


# ------------------------------------------------------------------------------ figures


class Lists(NamedTuple):
    """The beams of all users of a split; (N, 32) unless said."""

    metrics: dict[str, Tensor]  # those of adagrpo.py, (N,) each
    items: np.ndarray  # -1 for a hallucination
    hit: np.ndarray
    logp: np.ndarray
    rewards: np.ndarray


def lists_of(policy: Policy, ranker: Ranker, split: Split, config: Config) -> Lists:
    with recorded(keep=True) as batches:
        metrics = adagrpo.evaluate(policy, ranker, split, config)
    groups = [scored for _, scored in batches]
    return Lists(
        metrics,
        torch.cat([policy.items_of(scored.tokens) for scored in groups]).numpy(),
        torch.cat([scored.hit for scored in groups]).numpy(),
        torch.cat([scored.logp for scored in groups]).numpy(),
        torch.cat([scored.rewards for scored in groups]).numpy(),
    )


def order_by(lists: Lists, scores: np.ndarray, w: float) -> np.ndarray:
    """(N, 32) the order of the beams by logp + w * scores."""
    return np.argsort(-(lists.logp + w * scores), axis=1, kind="stable")


def hr_by_table(lists: Lists, table: np.ndarray, w: float) -> np.ndarray:
    """HR@10 (N,) where a table of item scores joins the policy at serving."""
    scores = np.where(lists.items < 0, 0.0, table[lists.items])
    order = order_by(lists, scores, w)
    return np.take_along_axis(lists.hit, order, axis=1)[:, :10].any(1)


def hr_of_items(lists: Lists) -> np.ndarray:
    """HR@10 (N,) if IDs that name no item are dropped from the lists."""
    order = np.argsort(lists.items < 0, axis=1, kind="stable")
    return np.take_along_axis(lists.hit, order, axis=1)[:, :10].any(1)


def third_of(values: np.ndarray) -> np.ndarray:
    """(N,) -> 0 for the lowest third of the values, 1 for the middle one, 2 above."""
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)


def groups_of(shop: Shop, before: Lists) -> dict[str, np.ndarray]:
    """Masks (N,) over the test users: all, the kinds, and strata by the USER's side.

    Before post-training, was the policy unsure, middling or sure of its likeliest item?
    How often does the feed show what the user has bought? (Thirds.) Both are known
    before the purchase.
    """
    masks = {"all": np.ones(len(shop.test.target), dtype=bool)}
    for number, kind in enumerate(shop.kinds):
        masks[kind] = shop.test.kind == number
    confidence = third_of(before.logp[:, 0])
    exposure = third_of(times_shown(shop)[shop.test.history].mean(1))
    for i, sure in enumerate(("unsure", "middle", "sure")):
        for j, often in enumerate(("seldom", "middle", "often")):
            masks[f"{sure}, {often}"] = (confidence == i) & (exposure == j)
    return masks


def figures_of(
    config: Config, world: dict, shop: Shop, validation: Lists, test: Lists, masks: dict
) -> dict[str, dict[str, float]]:
    """Means over groups of test users."""
    w = adagrpo.best_weight(validation.metrics)
    table = click_rates(shop)
    hr_table = {}
    for weight in adagrpo.FUSION_WEIGHTS:
        hr_table[weight] = hr_by_table(validation, table, weight).mean()
    table_w = max(hr_table, key=hr_table.get)

    metrics = {
        "hr@10": test.metrics["hr@10, w=0"],
        "hr@10 fused": test.metrics[f"hr@10, w={w}"],
        "hr@10 table": hr_by_table(test, table, table_w),
        "hr@10 valid": hr_of_items(test),
        "recall@32": test.hit.any(1),
    }
    for name in ("ndcg@10", "hallucination", "hard", "clear", "admit"):
        metrics[name] = test.metrics[name]
    metrics |= simulated_clicks(config, world, test.items[:, :10])
    fused = np.take_along_axis(test.items, order_by(test, test.rewards, w), axis=1)
    for name, values in simulated_clicks(config, world, fused[:, :10]).items():
        metrics[f"{name} fused"] = values
    repeats = (test.items[:, :10, None] == shop.test.history[:, None, :]).any(2)
    metrics["bought"] = repeats.mean(1)

    figures = {}
    for group, mask in masks.items():
        row = {}
        for name, values in metrics.items():
            row[name] = round(100 * float(np.mean(np.asarray(values)[mask])), 4)
        row["dwell"] /= 100  # seconds
        row["dwell fused"] /= 100
        row["share"] = round(100 * float(mask.mean()), 4)
        figures[group] = row
    return figures


def diagnosis_of(policy: Policy, ranker: Ranker, shop: Shop, config: Config) -> str:
    """The last line of diagnose.py on the validation users, the policy as it is."""
    from diagnose import report

    split = shop.validation
    history = torch.as_tensor(split.history)
    target = torch.as_tensor(split.target)
    with torch.no_grad():
        scored = adagrpo.roll_out_and_score(policy, ranker, history, target, 32)
    scores = {"items": policy.items_of(scored.tokens).numpy()}
    for name in ("rewards", "logp", "hit", "valid", "target_reward"):
        scores[name] = getattr(scored, name).numpy()
    scores["target_item"] = split.target
    scores["group_shown"] = times_shown(shop)[split.history].mean(1)
    text = report(scores, config.min_difficulty, config.min_discriminability)
    return text.strip().splitlines()[-1]


def run_seed(
    config: Config, world: dict, arms: list[str], out: Path, only_validation: bool
) -> None:
    """Run the arms of one seed and save a record after each."""
    shop, start, ranker = prepare(config, world)
    if not only_validation:
        before = lists_of(start, ranker, shop.test, config)
        masks = groups_of(shop, before)

    for text in arms:
        started = time.process_time()
        arm = parse_arm(text, config)
        policy, training = post_trained(arm, shop, start, ranker)
        trained = time.process_time()
        validation = lists_of(policy, ranker, shop.validation, arm.config)
        hr = {}
        for w in adagrpo.FUSION_WEIGHTS:
            hr[str(w)] = round(adagrpo.percent(validation.metrics[f"hr@10, w={w}"]), 4)
        figures = {"validation": hr}
        if arm.rule == "diagnosis":
            figures["diagnosis"] = diagnosis_of(policy, ranker, shop, arm.config)
        if not only_validation:
            test = lists_of(policy, ranker, shop.test, arm.config)
            figures |= figures_of(config, world, shop, validation, test, masks)
            figures["validation"]["w"] = adagrpo.best_weight(validation.metrics)
        if training:
            figures["training"] = training
        record = {"seed": config.seed, "arm": text, "world": world}
        record |= {"figures": figures, "seconds": round(trained - started, 1)}
        with out.open("ab", buffering=0) as file:  # one write: lines stay whole
            file.write(json.dumps(record).encode() + b"\n")
        print(f"seed {config.seed}  {text:<40} validation {hr['0']:.2f}", flush=True)


# ------------------------------------------------------------------------------ command


def read(path: Path) -> list[dict]:
    """The records of a results file; [] if there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Many seeds and arms of adagrpo.py, into one file.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", required=True)
    add("--arms", nargs="+", default=["before", "nll", "mix-1", "adagrpo"])
    add("--out", type=Path, required=True, help="file of results, to resume")
    add("--validation", action="store_true", help="no test users")
    add("--slates", type=int, default=toy_data.SIZES["feed"], help="of the feed")
    add("--viewers", type=int, default=toy_data.SIZES["viewers"])
    add("--ranker", choices=RANKERS, default=RANKERS[0])
    add("--everybody", action="store_true", help="pre-train on tested users, too")
    add("--season_correlation", type=float, default=toy_data.SEASON_CORRELATION)
    add("--max_grad_norm", type=float, default=adagrpo.MAX_GRAD_NORM)
    for field in fields(Config):
        if field.name != "seed":
            add(f"--{field.name}", type=field.type, default=field.default)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    adagrpo.MAX_GRAD_NORM = options.max_grad_norm

    world = {}
    for name, value in vars(options).items():
        if name not in ("seeds", "arms", "out", "validation", "everybody"):
            world[name] = value
    if options.everybody:
        world["everybody"] = True
    settings = {name: world[name] for name in vars(Config()) if name != "seed"}
    config = Config(**settings)
    arms = list(dict.fromkeys(options.arms))
    try:
        check(world)
        for arm in arms:
            parse_arm(arm, config)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        read(options.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    for seed in dict.fromkeys(options.seeds):
        done = set()
        for record in read(options.out):
            is_whole = options.validation or "all" in record["figures"]
            if is_whole and record["seed"] == seed and record["world"] == world:
                done.add(record["arm"])
        missing = [arm for arm in arms if arm not in done]
        if missing:
            seed_config = replace(config, seed=seed)
            run_seed(seed_config, world, missing, options.out, options.validation)


if __name__ == "__main__":
    main()
