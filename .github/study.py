# SPDX-License-Identifier: MIT
"""The study: many seeds and arms of adagrpo.py, side by side, into one file of results.

    python .github/study.py --seeds 40 41 --arms nll adagrpo --jobs 2 --out
    runs/study.json

It calls the functions of adagrpo.py and copies none. Every option of adagrpo.py works
here too and becomes part of the record's settings (--decode sample, --bias 0, ...). An
arm is RULE, RULE-WEIGHT, RULE@PASSES or RULE-WEIGHT@PASSES, with the rules of
adagrpo.py and:

  before    no post-training at all; also holds the premise, by kind of shopper
  random    as many samples of a batch as the gate admits, but others
  spread    hard, and the group's rewards have a standard deviation of at least 0.1
  level     hard, and the ranker gives the target at least 0.1
  oracle    trend shoppers, by the truth
  centred   no gate, advantages without the division by std (Dr. GRPO, arXiv 2503.20783)
  gradients trains nothing: cosines of the GRPO gradient of beams, and of draws, with
            that of 600 draws, before post-training

The file is a list of records {seed, arm, settings, figures}; figures are {group:
{metric: value}}, in percent (dwell in seconds). Each record is saved when its arm ends,
under a lock, so several runs can share a file. A run that was stopped goes on where it
was; after a change of the code take a new file. Needs Linux or macOS.
"""

import argparse
import contextlib
import copy
import fcntl
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adagrpo
from adagrpo import Config, Policy, Ranker, Rule, Scored, Shop
from toy_data import QUICK_SIZES, make_shop, simulated_clicks_and_dwell

MIN_SPREAD = 0.1  # by validation, on development seeds 0 and 2
MIN_LEVEL = 0.1  # on development seeds 0-3
TEST_USERS = 12_000
METRICS = ("hr@10", "hr@5", "hr@20", "ndcg@10", "hallucination")
CONTROLS = ("random", "spread", "level", "oracle", "centred")
NO_TRAINING = ("before", "gradients")

# ----------------------------------------------------------------------------- the arms


def rule_of(name: str, shop: Shop) -> Rule | None:
    """As in adagrpo.RULES: which samples of a batch get the GRPO term, (B,) bool."""
    trend = shop.kinds.index("trend")
    kind_of = {}  # a rule sees histories; no two users have the same
    for history, kind in zip(shop.posttrain.history, shop.posttrain.kind, strict=True):
        kind_of[tuple(history.tolist())] = kind

    def random(scored: Scored) -> torch.Tensor:
        admit = scored.gate.admit
        return admit[torch.randperm(len(admit))]

    def spread(scored: Scored) -> torch.Tensor:
        return scored.gate.hard & (scored.rewards.std(1, correction=0) >= MIN_SPREAD)

    def level(scored: Scored) -> torch.Tensor:
        return scored.gate.hard & (scored.target_reward >= MIN_LEVEL)

    def oracle(scored: Scored) -> torch.Tensor:
        histories = scored.history.tolist()
        return torch.tensor([kind_of[tuple(history)] == trend for history in histories])

    controls = {
        "random": random,
        "spread": spread,
        "level": level,
        "oracle": oracle,
        "centred": adagrpo.RULES["mix"],
    }
    return (adagrpo.RULES | controls)[name]


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
    known = (*adagrpo.RULES, *CONTROLS, *NO_TRAINING)
    if rule not in known or not 0 <= weight < np.inf or passes < 1:
        raise ValueError(arm)
    return rule, weight, passes


class Tally:
    """A rule that also counts what it saw, for the record."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.samples = 0
        self.admitted = 0
        self.absent = 0  # admitted samples whose group lacks the target
        self.outscored = 0  # admitted samples where a negative outscores the target

    def __call__(self, scored: Scored) -> torch.Tensor:
        admit = self.rule(scored)
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


# ----------------------------------------------------------------------------- one seed


def figures_of(
    shop: Shop, result: dict[str, np.ndarray], masks: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Means over groups of test users, with the simulated A/B."""
    clicks, dwell = simulated_clicks_and_dwell(shop.truth, result["top 10"])
    figures = {}
    for name, mask in masks.items():
        row = {metric: adagrpo.mean_percent(result[metric], mask) for metric in METRICS}
        row["ctr"] = adagrpo.mean_percent(clicks.mean(1), mask)
        row["dwell"] = adagrpo.mean_percent(dwell.mean(1), mask) / 100
        row["share"] = 100 * mask.mean()
        figures[name] = row
    return figures


def premise_of(
    shop: Shop, start: Policy, ranker: Ranker, config: Config
) -> dict[str, dict[str, float]]:
    """The table that adagrpo.py prints before post-training (validation users)."""
    saw = adagrpo.evaluate(start, ranker, shop.validation, config)
    orders = adagrpo.rerank(start, ranker, shop.validation)
    columns = {
        "hr@10": orders["hr@10"],
        "reranked": orders["reranked"],
        "auc": saw["auc"],
        "auc in group": saw["auc in group"],
        "hard": saw["hard"],
        "clear": saw["clear"],
        "admitted": saw["admit"],
    }
    premise = {}
    for name, mask in adagrpo.by_kind(shop.validation, shop.kinds).items():
        row = {title: adagrpo.mean_percent(c, mask) for title, c in columns.items()}
        row["share"] = 100 * mask.mean()
        premise[f"premise {name}"] = row
    return premise


def prepare(config: Config, is_quick: bool) -> tuple[Shop, Policy, Ranker]:
    """A seed's shop, pre-trained policy and ranker."""
    sizes = {"posttrain": config.users, "test": TEST_USERS}
    if is_quick:
        sizes = QUICK_SIZES
    shop = make_shop(config.seed, config.bias, sizes)
    return shop, adagrpo.pretrain(shop, config), adagrpo.train_ranker(shop, config)


def post_trained(
    arm: str, shop: Shop, start: Policy, ranker: Ranker, config: Config
) -> tuple[Policy, dict[str, float]]:
    """A copy of the policy, post-trained by the arm, and what the arm's rule saw."""
    name, weight, passes = parse_arm(arm, config)
    policy = copy.deepcopy(start)
    if name == "before":
        return policy, {}

    rule = rule_of(name, shop)
    if rule is not None:
        rule = Tally(rule)
    advantages_of = adagrpo.group_advantages
    if name == "centred":
        advantages_of = centre
    with mock.patch.object(adagrpo, "group_advantages", advantages_of):
        settings = replace(config, epochs=passes)
        adagrpo.post_train(policy, ranker, shop.posttrain, rule, weight, settings)
    if rule is None:
        return policy, {}
    return policy, rule.figures()


def run_seed(config: Config, is_quick: bool, arms: list[str], out: Path) -> None:
    """Run the arms of one seed and save a record after each."""
    shop, start, ranker = prepare(config, is_quick)
    beams = adagrpo.for_comparison(config)
    before = adagrpo.evaluate(start, ranker, shop.test, beams)
    masks = adagrpo.by_kind(shop.test, shop.kinds) | adagrpo.by_verdict(before)

    for arm in arms:
        if arm == "gradients":
            figures = {"cosine": compare_gradients(config, shop, start, ranker)}
            summary = str(figures["cosine"])
        else:
            policy, training = post_trained(arm, shop, start, ranker, config)
            test = adagrpo.evaluate(policy, ranker, shop.test, beams)
            validation = adagrpo.evaluate(policy, ranker, shop.validation, beams)
            figures = figures_of(shop, test, masks)
            figures["validation"] = {"hr@10": 100 * float(validation["hr@10"].mean())}
            if training:
                figures["training"] = training
            if arm == "before":
                figures |= premise_of(shop, start, ranker, config)
            summary = f"HR@10 {figures['all']['hr@10']:.2f}"
        record = {
            "seed": config.seed,
            "arm": arm,
            "settings": settings_of(config, is_quick),
            "figures": figures,
        }
        save(out, record)
        print(f"seed {config.seed}  {arm:<22} {summary}", flush=True)


# --------------------------------------------------------------------- the results file


def settings_of(config: Config, is_quick: bool) -> dict:
    """What figures depend on besides seed and arm."""
    settings = vars(config) | {"quick": is_quick}
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
    if not path.is_file():
        raise ValueError("it is no regular file")
    text = path.read_text()
    if not text.strip():
        return []
    records = json.loads(text)
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


def parse(
    argv: list[str] | None,
) -> tuple[argparse.Namespace, Config, argparse.Namespace]:
    """Our own options, and the settings and options of adagrpo.py."""
    parser = argparse.ArgumentParser(
        description="Many seeds and arms of adagrpo.py, into one file.",
        epilog="All other options are those of adagrpo.py.",
        allow_abbrev=False,
    )
    cores = multiprocessing.cpu_count()
    default_arms = ["before", *adagrpo.ARMS]
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", default=default_arms)
    parser.add_argument("--jobs", type=int, default=cores, help="processes")
    parser.add_argument("--out", type=Path, help="JSON file of results, to resume")
    ours, rest = parser.parse_known_args(argv)
    config, options = adagrpo.command_line(rest)

    for seed in ours.seeds:
        if not 0 <= seed <= 2**31:
            parser.error(f"argument --seeds: must be from 0 to 2**31, got {seed}")
    for arm in ours.arms:
        try:
            parse_arm(arm, config)
        except ValueError:
            rules = ", ".join((*adagrpo.RULES, *CONTROLS, *NO_TRAINING))
            parser.error(
                f"argument --arms: {arm} is no RULE[-WEIGHT][@PASSES]: {rules}"
            )
    if ours.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {ours.jobs}")
    ours.jobs = min(ours.jobs, 61)  # the most that Windows allows
    if options.data:
        parser.error("argument --data: the study is for the toy shop")
    if ours.out is None:
        parser.error("argument --out: a file is needed")
    ours.out = ours.out.resolve()  # a link stays one
    try:
        ours.out.parent.mkdir(parents=True, exist_ok=True)
        load(ours.out)
        with lock(ours.out):  # may we write there?
            pass
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {ours.out}: {error}")
    return ours, config, options


def missing_work(
    ours: argparse.Namespace, config: Config, is_quick: bool
) -> list[tuple[Config, bool, list[str], Path]]:
    """One task for each seed: the arms that the file lacks."""
    done = set()
    for record in load(ours.out):
        if record["settings"] == settings_of(config, is_quick):
            done.add((record["seed"], record["arm"]))

    tasks = []
    for seed in ours.seeds:
        arms = [arm for arm in ours.arms if (seed, arm) not in done]
        if arms:
            tasks.append((replace(config, seed=seed), is_quick, arms, ours.out))
    return tasks


def main(argv: list[str] | None = None) -> int:
    """Run what the file lacks. Returns the exit status."""
    ours, config, options = parse(argv)
    tasks = missing_work(ours, config, options.quick)
    errors = []
    spawn = multiprocessing.get_context("spawn")
    device = (options.device,)
    with ProcessPoolExecutor(ours.jobs, spawn, adagrpo.start_process, device) as pool:
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
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
