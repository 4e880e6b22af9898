# SPDX-License-Identifier: MIT
"""The study: many seeds and arms of adagrpo.py, side by side, into one file of results.

    python .github/study.py --seeds 0 1 --arms nll adagrpo --out runs/study.json

It calls the functions of adagrpo.py and copies none. Every setting of adagrpo.py is an
option here too and becomes part of the record's settings (--decode sample, --bias 0).
An arm is RULE, RULE-WEIGHT, RULE@PASSES or RULE-WEIGHT@PASSES. The rules:

  nll, mix, difficulty, discriminability, adagrpo   as in adagrpo.py
  before    no post-training at all; also holds what can be known before it
  random    as many samples of a batch as the gate admits, but others
  spread    hard, and the group's rewards have a standard deviation of at least 0.1
  level     hard, and the ranker gives the target at least 0.1
  oracle    trend users, by the truth
  centred   no gate, advantages without the division by std (Dr. GRPO, arXiv 2503.20783)
  clicks    NLL on the feed's clicks first, then as nll
  histories one pass of NLL on what the feed's users had bought, no post-training
  gradients trains nothing: cosines of the GRPO gradient of beams, and of draws, with
            that of 600 draws, before post-training

The file is a list of records {seed, arm, settings, figures}; figures are {group of test
users: {metric: value}}, in percent (dwell in seconds). Each record is saved when its
arm ends, under a lock, so several runs can share a file. A run that was stopped goes on
where it was; after a change of the code take a new file. Needs Linux or macOS.
"""

import argparse
import contextlib
import copy
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adagrpo
import toy_data
from adagrpo import Config, Gate, Metrics, Policy, Ranker, Result, Rule, Scored
from toy_data import Shop, Split

MIN_SPREAD = 0.1  # by validation, on development seeds 0 and 2
MIN_LEVEL = 0.1  # on development seeds 0-3
CLICK_STEPS = 1600  # of `clicks`, in batches of the pre-training's size
CLICK_LR = 3e-4  # both by validation, on development seeds 0 and 1
TEST_USERS = 12_000

GATES = ("nll", "mix", "difficulty", "discriminability", "adagrpo")
CONTROLS = ("random", "spread", "level", "oracle", "centred", "clicks")
NO_TRAINING = ("before", "histories", "gradients")
RULES = (*GATES, *CONTROLS, *NO_TRAINING)

# ----------------------------------------------------------------------------- the arms


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[torch.Tensor, Scored]]]:
    """A list that fills with the histories (B, H) and rollouts of every batch."""
    batches = []
    original = adagrpo.roll_out_and_score

    def roll_out_and_score(policy, ranker, history, target, config) -> Scored:
        scored = original(policy, ranker, history, target, config)
        batches.append((history, scored))
        return scored

    with mock.patch.object(adagrpo, "roll_out_and_score", roll_out_and_score):
        yield batches


def rule_of(name: str, shop: Shop, batches: list) -> Rule | None:
    """Which samples of the last of the batches get the GRPO term; None for plain NLL."""
    trend = shop.kinds.index("trend")
    kind_of = {}  # no two users have the same history
    for history, kind in zip(shop.posttrain.history, shop.posttrain.kind, strict=True):
        kind_of[tuple(history.tolist())] = kind

    def everybody(gate: Gate) -> torch.Tensor:
        return torch.ones_like(gate.admit)

    def random(gate: Gate) -> torch.Tensor:
        return gate.admit[torch.randperm(len(gate.admit))]

    def spread(gate: Gate) -> torch.Tensor:
        _, scored = batches[-1]
        return gate.hard & (scored.rewards.std(1, correction=0) >= MIN_SPREAD)

    def level(gate: Gate) -> torch.Tensor:
        _, scored = batches[-1]
        return gate.hard & (scored.target_reward >= MIN_LEVEL)

    def oracle(gate: Gate) -> torch.Tensor:
        history, _ = batches[-1]
        return torch.tensor([kind_of[tuple(row)] == trend for row in history.tolist()])

    rules = {
        "nll": None,
        "clicks": None,
        "mix": everybody,
        "centred": everybody,
        "difficulty": lambda gate: gate.hard,
        "discriminability": lambda gate: gate.clear,
        "adagrpo": lambda gate: gate.admit,
        "random": random,
        "spread": spread,
        "level": level,
        "oracle": oracle,
    }
    return rules[name]


def centre(rewards: torch.Tensor) -> torch.Tensor:
    return rewards - rewards.mean(1, keepdim=True)


def parse_arm(arm: str, config: Config) -> tuple[str, float, int]:
    """RULE[-WEIGHT][@PASSES] -> rule, weight, passes. ValueError if it is none."""
    arm, at, passes = arm.partition("@")
    rule, dash, weight = arm.partition("-")
    if not dash:
        weight = config.weight
    if not at:
        passes = config.epochs
    weight = float(weight)
    passes = int(passes)
    if rule not in RULES or not 0 <= weight < np.inf or passes < 1:
        raise ValueError(arm)
    return rule, weight, passes


class Tally:
    """A rule that also counts what it saw, for the record."""

    def __init__(self, rule: Rule, batches: list):
        self.rule = rule
        self.batches = batches
        self.samples = 0
        self.admitted = 0
        self.absent = 0  # admitted samples whose group lacks the target
        self.outscored = 0  # admitted samples where a negative outscores the target

    def __call__(self, gate: Gate) -> torch.Tensor:
        admit = self.rule(gate)
        _, scored = self.batches.pop()  # which frees the memory of its gradient
        absent = admit & ~scored.hit.any(1)
        is_higher = scored.rewards > scored.target_reward[:, None]
        outscored = admit & is_higher.any(1)
        self.samples += len(admit)
        self.admitted += int(admit.sum())
        self.absent += int(absent.sum())
        self.outscored += int(outscored.sum())
        return admit

    def figures(self) -> dict[str, float]:
        admitted = max(self.admitted, 1)
        return {
            "admitted": 100 * self.admitted / max(self.samples, 1),
            "absent": 100 * self.absent / admitted,
            "outscored": 100 * self.outscored / admitted,
        }


def learn_clicks(policy: Policy, ranker: Ranker, shop: Shop, config: Config) -> None:
    """Plain NLL on what was clicked in the feed, given what the user had bought."""
    slate, place = np.nonzero(shop.clicked)
    rng = np.random.default_rng(config.seed)
    picked = rng.permutation(len(slate))[: CLICK_STEPS * config.pretrain_batch]
    slate = slate[picked]
    target = shop.shown[slate, place[picked]]
    clicks = Split(shop.feed_history[slate], target, np.zeros_like(target))
    settings = replace(config, batch=config.pretrain_batch, epochs=1, lr=CLICK_LR)
    adagrpo.post_train(policy, ranker, clicks, None, 0.0, settings)


def learn_histories(policy: Policy, shop: Shop, config: Config) -> None:
    """Next-token NLL on what the users of the feed had bought, in one pass."""
    torch.manual_seed(config.seed)
    sequences = policy.prompt(torch.as_tensor(shop.feed_history))  # (M, T)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        sequence = sequences[rows]
        next_logp, _ = policy(sequence[:, :-1])
        return F.nll_loss(next_logp.flatten(0, 1), sequence[:, 1:].flatten())

    batches = adagrpo.shuffled_batches(len(sequences), config.pretrain_batch, epochs=1)
    adagrpo.fit(policy, config.pretrain_lr, batches, loss_of, config, "histories")


def post_trained(
    arm: str, shop: Shop, start: Policy, ranker: Ranker, config: Config
) -> tuple[Policy, dict[str, float]]:
    """A copy of the policy, post-trained by the arm, and what the arm's rule saw."""
    name, weight, passes = parse_arm(arm, config)
    policy = copy.deepcopy(start)
    if name == "before":
        return policy, {}
    if name == "histories":
        learn_histories(policy, shop, config)
        return policy, {}
    if name == "clicks":
        learn_clicks(policy, ranker, shop, config)

    advantages_of = adagrpo.group_advantages
    if name == "centred":
        advantages_of = centre
    with (
        recorded() as batches,
        mock.patch.object(adagrpo, "group_advantages", advantages_of),
    ):
        rule = rule_of(name, shop, batches)
        if rule is not None:
            rule = Tally(rule, batches)
        settings = replace(config, epochs=passes)
        adagrpo.post_train(policy, ranker, shop.posttrain, rule, weight, settings)
    if rule is None:
        return policy, {}
    return policy, rule.figures() | {"weight": weight}


# ----------------------------------------------------------------------------- one seed


def prepare(config: Config, world: dict) -> tuple[Shop, Policy, Ranker]:
    """A seed's shop, pre-trained policy and ranker."""
    sizes = {"posttrain": config.users, "test": TEST_USERS, "feed": world["slates"]}
    correlation = world["season_correlation"]
    with mock.patch.object(toy_data, "SEASON_CORRELATION", correlation):
        shop = toy_data.make_shop(config.seed, config.bias, sizes)
    policy = adagrpo.pretrain(shop, config)
    if not world["noise_ranker"]:
        return shop, policy, adagrpo.train_ranker(shop, config)

    # A ranker of noise: never trained, its embeddings wide so that scores differ.
    torch.manual_seed(config.seed)
    ranker = Ranker(len(shop.tokens))
    torch.nn.init.normal_(ranker.bought.weight, std=1.0)
    torch.nn.init.normal_(ranker.offered.weight, std=1.0)
    return shop, policy, ranker


def evaluate(policy: Policy, ranker: Ranker, split: Split, config: Config) -> Metrics:
    """Metrics of adagrpo.py, and for the study: the 32 items of each user (N, 32), -1
    for a hallucination, and the log-probability of the likeliest, its confidence (N,).
    """
    with recorded() as batches:
        metrics = adagrpo.evaluate(policy, ranker, split, config)
    items = torch.cat([scored.items for _, scored in batches])
    confidence = torch.cat([scored.logp[:, 0] for _, scored in batches])
    metrics["items"] = items.cpu().numpy()
    metrics["confidence"] = confidence.cpu().numpy()
    return metrics


def third_of(values: np.ndarray) -> np.ndarray:
    """(N,) -> 0 for the lowest third of the values, 1 for the middle one, 2 above."""
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)


def groups_of(shop: Shop, before: Metrics) -> dict[str, np.ndarray]:
    """Masks (N,) over the test users: kinds, strata and verdicts.

    The strata do not ask the ranker. Before post-training, was the policy unsure,
    middling or sure of its likeliest item? How often did the feed show the target?
    (Thirds.) A verdict is what the gate says before post-training.
    """
    masks = adagrpo.by_kind(shop)
    confidence = third_of(before["confidence"])
    times_shown = np.bincount(shop.shown.ravel(), minlength=len(shop.tokens))
    exposure = third_of(times_shown[shop.test.target])
    for i, sure in enumerate(("unsure", "middle", "sure")):
        for j, often in enumerate(("seldom", "middle", "often")):
            masks[f"{sure}, {often}"] = (confidence == i) & (exposure == j)

    hard = before["hard"]
    clear = before["clear"]
    masks["hard+clear"] = hard & clear
    masks["hard+unclear"] = hard & ~clear
    masks["easy+clear"] = ~hard & clear
    masks["easy+unclear"] = ~hard & ~clear
    return masks


def simulated_clicks(config: Config, world: dict, items: np.ndarray) -> Metrics:
    """What test users would do with their lists, by the truth: a simulated A/B test.

    items (N, 10), -1 for a hallucination, which nobody clicks. Returns the mean
    probability of a click and the mean seconds of dwell, (N,) each: a click is worth
    60 s times the appeal.
    """
    rng = toy_data.random_streams(config.seed)
    catalogue = toy_data.make_catalogue(rng["catalogue"])
    correlation = world["season_correlation"]
    with mock.patch.object(toy_data, "SEASON_CORRELATION", correlation):
        _, quality = toy_data.make_qualities(rng["catalogue"], catalogue)
    _, taste = toy_data.make_users(rng["test"], len(items), catalogue, quality)

    liking = np.einsum("nkd,nd->nk", catalogue.embedding[items], taste)
    appeal = liking + quality[items]
    clicks = np.where(items < 0, 0.0, toy_data.click_probability(appeal))
    dwell = clicks * 60 * np.maximum(appeal, 0)
    return {"ctr": clicks.mean(1), "dwell": dwell.mean(1)}


def figures_of(
    config: Config, world: dict, shop: Shop, result: Result, masks: Metrics
) -> dict[str, dict[str, float]]:
    """Means over groups of test users; what the validation users say."""
    test = result.test
    hit = test["items"] == shop.test.target[:, None]
    metrics = {name: test[name] for name in ("hr@10", "ndcg@10", "hallucination")}
    metrics["hr@5"] = hit[:, :5].any(1)
    metrics["hr@20"] = hit[:, :20].any(1)
    metrics["recall@32"] = hit.any(1)
    metrics["hr@10 fused"] = result.fused()
    metrics |= simulated_clicks(config, world, test["items"][:, :10])
    for name in ("auc in group", "hard", "clear", "admit"):
        metrics[name] = test[name]

    figures = {}
    for group, mask in masks.items():
        row = {name: adagrpo.percent(m[mask]) for name, m in metrics.items()}
        row["dwell"] /= 100  # seconds
        row["share"] = adagrpo.percent(mask)
        figures[group] = row
    figures["validation"] = {
        "hr@10": adagrpo.percent(result.validation["hr@10"]),
        "w": adagrpo.FUSION_WEIGHTS[result.best_fusion()],
    }
    return figures


def run_seed(config: Config, world: dict, arms: list[str], out: Path) -> None:
    """Run the arms of one seed and save a record after each."""
    shop, start, ranker = prepare(config, world)
    before = evaluate(start, ranker, shop.test, config)
    masks = groups_of(shop, before)

    for arm in arms:
        if arm == "gradients":
            figures = {"cosine": compare_gradients(config, shop, start, ranker)}
            summary = str(figures["cosine"])
        else:
            policy, training = post_trained(arm, shop, start, ranker, config)
            validation = adagrpo.evaluate(policy, ranker, shop.validation, config)
            test = evaluate(policy, ranker, shop.test, config)
            result = Result(validation, test, dose=0.0)
            figures = figures_of(config, world, shop, result, masks)
            if training:
                figures["training"] = training
            summary = f"HR@10 {figures['all']['hr@10']:.2f}"
        record = {
            "seed": config.seed,
            "arm": arm,
            "settings": settings_of(config, world),
            "figures": figures,
        }
        save(out, record)
        print(f"seed {config.seed}  {arm:<22} {summary}", flush=True)


# --------------------------------------------------------------------- the results file


def settings_of(config: Config, world: dict) -> dict:
    """What figures depend on besides seed and arm."""
    settings = vars(config) | world
    del settings["seed"]
    return dict(sorted(settings.items()))


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process at a time reads and replaces the file."""
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def load(path: Path) -> list[dict]:
    """The records of a results file, [] without one. ValueError if it is no such."""
    if not path.exists():
        return []
    records = json.loads(path.read_text())
    is_ours = isinstance(records, list) and all(
        isinstance(record, dict) and {"seed", "arm", "settings"} <= record.keys()
        for record in records
    )
    if not is_ours:
        raise ValueError("it is no results file of this program")
    return records


def save(path: Path, record: dict) -> None:
    """Add a record. The file is replaced whole or not at all."""
    with lock(path):
        records = [*load(path), record]
        draft = path.with_name(path.name + ".draft")
        draft.write_text(json.dumps(records, indent=1))
        draft.replace(path)


# ---------------------------------------------------------------------------- gradients


def compare_gradients(
    config: Config, shop: Shop, start: Policy, ranker: Ranker, users: int = 256
) -> dict[str, float]:
    """Cosines of the GRPO gradient of beams, and of draws, with that of 600 draws."""
    torch.manual_seed(config.seed)
    policy = copy.deepcopy(start)
    users = min(users, len(shop.posttrain.target))

    def gradient(group: int, decode: str) -> torch.Tensor:
        settings = replace(config, group=group, decode=decode)
        policy.zero_grad()
        for first in range(0, users, 8):
            history = torch.as_tensor(shop.posttrain.history[first : first + 8])
            target = torch.as_tensor(shop.posttrain.target[first : first + 8])
            scored = adagrpo.roll_out_and_score(
                policy, ranker, history, target, settings
            )
            advantages = adagrpo.group_advantages(scored.rewards)
            old_logp = scored.logp.detach()
            adagrpo.grpo_loss(scored.logp, old_logp, advantages).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    many_draws = gradient(600, "sample")
    cosines = {}
    for decode in ("beam", "sample"):
        other = gradient(config.group, decode)
        cosines[decode] = torch.cosine_similarity(many_draws, other, dim=0).item()
    return cosines


# ------------------------------------------------------------------------------ command


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config, dict]:
    """Our own options, the settings of adagrpo.py, and those of the world."""
    parser = argparse.ArgumentParser(
        description="Many seeds and arms of adagrpo.py, into one file.",
        epilog="All other options are those of adagrpo.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", required=True)
    add("--arms", nargs="+", default=["before", "nll", "mix-1", "adagrpo"])
    add("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes")
    add("--out", type=Path, required=True, help="JSON file of results, to resume")
    add("--noise-ranker", action="store_true", help="a ranker that was never trained")
    correlation = toy_data.SEASON_CORRELATION
    add("--season-correlation", type=float, default=correlation, help="1: no change")
    add("--slates", type=int, default=toy_data.SIZES["feed"], help="of the feed")
    ours, rest = parser.parse_known_args(argv)
    config, options = adagrpo.command_line(rest)
    ours.device = options.device

    for arm in ours.arms:
        try:
            parse_arm(arm, config)
        except ValueError:
            rules = ", ".join(RULES)
            parser.error(
                f"argument --arms: {arm} is no RULE[-WEIGHT][@PASSES]: {rules}"
            )
    if ours.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {ours.jobs}")
    try:
        ours.out = ours.out.resolve()  # a link stays one
        ours.out.parent.mkdir(parents=True, exist_ok=True)
        load(ours.out)
        with lock(ours.out):  # may we write there?
            pass
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {ours.out}: {error}")

    world = {
        "noise_ranker": ours.noise_ranker,
        "season_correlation": ours.season_correlation,
        "slates": ours.slates,
    }
    return ours, config, world


def missing_work(ours: argparse.Namespace, config: Config, world: dict) -> list[tuple]:
    """One task for each seed: the arms that the file lacks."""
    done = set()
    for record in load(ours.out):
        if record["settings"] == settings_of(config, world):
            done.add((record["seed"], record["arm"]))

    tasks = []
    for seed in ours.seeds:
        arms = [arm for arm in ours.arms if (seed, arm) not in done]
        if arms:
            tasks.append((replace(config, seed=seed), world, arms, ours.out))
    return tasks


def start_process(device: str) -> None:
    """Set up a worker: one thread, the device, and an end with its parent.

    Without that a worker would train on as an orphan.
    """
    torch.set_num_threads(1)
    torch.set_default_device(device)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    """Run what the file lacks. Returns the exit status."""
    ours, config, world = parse(argv)
    tasks = missing_work(ours, config, world)
    errors = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ours.jobs, spawn, start_process, (ours.device,)) as pool:
        try:
            futures = {pool.submit(run_seed, *task): task for task in tasks}
            for future in as_completed(futures):
                error = future.exception()
                if error is not None:
                    seed = futures[future][0].seed
                    errors.append(f"seed {seed}: {type(error).__name__}: {error}")
        except BaseException:  # do not wait for what is under way
            for process in multiprocessing.active_children():
                process.terminate()
            raise

    for error in errors:
        print(f"study.py: {error}", file=sys.stderr)
    if errors:
        print(f"study.py: finished arms are kept in {ours.out}", file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
