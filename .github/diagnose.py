# SPDX-License-Identifier: MIT
"""Will it help me? Has your ranker anything to teach your policy, and for whom?

    python .github/diagnose.py SCORES.npz

SCORES.npz (numpy.savez) holds N samples with G rollouts each, of users whom neither the
policy nor the ranker was trained on; scores of others say "yes" to anything.

  rewards (N, G)          the ranker's scores of the rollouts, in any unit
  target_reward (N,)      its score of the true item
  hit (N, G) bool         the rollout is the true item; compare token IDs, not text
  valid (N, G) bool       the rollout names an item; left out: all do
  logp (N, G)             the policy's log-probability of it, which sorts the columns.
                          Left out: they come likeliest first; no fused, no verdict
  group_NAME (N,)         any number of them: names, or numbers, to be cut in thirds

Difficulty: share of the group ahead of the target (of drawn groups: share of misses).
Discriminability: the target's reward minus the mean of the valid negatives. Under both
stands what is admitted if that quantile is the threshold. Then, in percent:

  HR@k      targets among the policy's first k rollouts. Here and in the next three,
            invalid rollouts are put last: a shop shows items only
  ranker    the same by the rewards alone; ties stay in the policy's order
  fused     change of HR@k by the order logp + w * reward, +- 1.96 standard errors; w is
            chosen on a random half of all samples and judged on the other, both ways.
            Its grid: nats of logp for one standard deviation of rewards in a group
  shuffled  the same with the rewards shuffled within each group: a ranker of noise,
            whose other figures stand in the row "all, shuffled"
  AUC       negatives of the group that score below the target; ties count half
  clear     discriminability at its threshold or above
  admitted  clear, and difficulty at its threshold or above

"Yes" means: fused is clearly above 0 over all, or in a group with the interval widened
for the number of groups (Bonferroni); groups of fewer than ten samples are left out. It
is necessary and not sufficient: what the ranker knows has to be expressible from what
the policy sees.
"""

import argparse
import sys
import zipfile
from pathlib import Path
from statistics import NormalDist
from textwrap import shorten

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adagrpo import adagrpo_gate

ARRAYS = {  # axes (1: N, 2: N and G), numpy's letters of the types, and their name
    "rewards": (2, "iuf", "numbers"),
    "target_reward": (1, "iuf", "numbers"),
    "hit": (2, "b", "bool"),
    "valid": (2, "b", "bool"),
    "logp": (2, "iuf", "numbers"),
    "group_NAME": (1, "iufbU", "numbers or names"),
}
NATS = (0, 0.25, 0.5, 1, 2, 4, 8)  # the grid of w; 0 is the policy's own order
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
FEW = 6  # a number with more distinct values than this is cut in thirds
MIN_SIZE = 10  # samples in a row, and changed ones in a yes: fewer show nothing
SEED = 0  # of the halves and of the shuffling
CAVEAT = """\
A yes is necessary and not sufficient: what the ranker knows has to be expressible from
what the policy sees."""

Arrays = dict[str, np.ndarray]


def load(path: Path) -> Arrays:
    """The arrays of an .npz file. ValueError names what cannot be read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a file of numpy.savez, given none")
    scores = {}
    with np.load(path) as file:
        for name in file.files:
            try:
                scores[name] = file[name]
            except ValueError as error:  # Python objects
                raise ValueError(
                    f"{name}: expected plain types, given: {error}"
                ) from None
    return scores


def check(scores: Arrays) -> None:
    """ValueError names the array that is wrong, what it should be, and what it is."""
    for name in ("rewards", "target_reward", "hit"):
        if name not in scores:
            raise ValueError(f"{name}: expected an array of this name, given none")
    N_G = scores["rewards"].shape
    if len(N_G) != 2 or N_G[0] < MIN_SIZE or N_G[1] < 2:
        least = (MIN_SIZE, 2)
        raise ValueError(f"rewards: expected (N, G), {least} or more, given {N_G}")

    for name, array in scores.items():
        role = name
        if name.startswith("group_"):
            role = "group_NAME"
        if role not in ARRAYS:
            raise ValueError(f"{name}: expected one of {', '.join(ARRAYS)}")
        axes, letters, words = ARRAYS[role]
        shape = N_G[:axes]
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, given {array.shape}")
        if array.dtype.kind not in letters:
            raise ValueError(f"{name}: expected {words}, given {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, given nan or inf")


def prepare(scores: Arrays) -> Arrays:
    """Checked copies in float64, with `valid`, and columns in the policy's order."""
    scores = {name: np.array(array, order="C") for name, array in scores.items()}
    check(scores)
    scores.setdefault("valid", np.ones_like(scores["hit"]))
    if (scores["hit"] & ~scores["valid"]).any():
        raise ValueError("valid: expected True wherever hit is True, given False")
    if not (scores["valid"] & ~scores["hit"]).any():
        raise ValueError("hit: expected False for some valid rollout, given True")

    for name in ("rewards", "target_reward", "logp"):
        if name in scores:
            scores[name] = scores[name].astype(float)
    if "logp" in scores:
        order = np.argsort(-scores["logp"], axis=1, kind="stable")
        for name in ("rewards", "hit", "valid", "logp"):
            scores[name] = np.take_along_axis(scores[name], order, axis=1)
    return scores


def shuffle(scores: Arrays) -> Arrays:
    """A ranker of noise: the valid rewards of each group in a random order.

    The target's reward moves with its rollout; an absent target gets some rollout's.
    """
    random = np.random.default_rng(SEED)
    rewards = scores["rewards"].copy()
    target_reward = scores["target_reward"].copy()
    for row, hit in enumerate(scores["hit"]):
        places = np.flatnonzero(scores["valid"][row])
        rewards[row, places] = random.permutation(rewards[row, places])
        if hit.any():
            target_reward[row] = rewards[row, hit.argmax()]
        elif len(places) > 0:
            target_reward[row] = rewards[row, random.choice(places)]
    return scores | {"rewards": rewards, "target_reward": target_reward}


def spread(scores: Arrays) -> np.ndarray:
    """(N,) standard deviation of the valid rewards of each group."""
    rewards = np.ma.masked_array(scores["rewards"], ~scores["valid"])
    return rewards.std(axis=1).filled(0.0)


def found(scores: Arrays, sort_by: np.ndarray, k: int) -> np.ndarray:
    """(N,) bool: the target is among the first k by `sort_by` (N, G), invalid last."""
    sort_by = np.where(scores["valid"], sort_by, -np.inf)
    first = np.argsort(-sort_by, axis=1, kind="stable")[:, :k]  # ties keep their order
    return np.take_along_axis(scores["hit"], first, axis=1).any(1)


def fused_change(scores: Arrays, k: int) -> np.ndarray:
    """(N,) of -1, 0, 1: what the fused order changes, with w from the other half."""
    change = np.zeros(len(scores["hit"]))
    unit = np.sqrt(np.mean(spread(scores) ** 2))
    if unit == 0:  # flat rewards change no order
        return change

    results = []
    for nats in NATS:
        sort_by = scores["logp"] + nats / unit * scores["rewards"]
        results.append(found(scores, sort_by, k))
    results = np.array(results, dtype=float)  # (W, N)

    # Of equally good w, argmax takes the smallest.
    half = np.random.default_rng(SEED).permutation(len(change)) % 2
    for judged in (0, 1):
        mine = half == judged
        best = results[:, ~mine].mean(1).argmax()
        change[mine] = results[best, mine] - results[0, mine]
    return change


def measure(scores: Arrays, thresholds: dict, k: int, drawn: bool) -> Arrays:
    """Figures of each sample, (N,) each; those that need an order if there is one."""
    gate = adagrpo_gate(
        target_reward=torch.from_numpy(scores["target_reward"]),
        rollout_rewards=torch.from_numpy(scores["rewards"]),
        hit=torch.from_numpy(scores["hit"]),
        valid=torch.from_numpy(scores["valid"]),
        ranked=not drawn,
        **thresholds,
    )
    figures = {name: tensor.numpy() for name, tensor in gate._asdict().items()}

    negative = scores["valid"] & ~scores["hit"]
    lead = scores["target_reward"][:, None] - scores["rewards"]  # (N, G)
    wins = (lead > 0) + 0.5 * (lead == 0)
    with np.errstate(invalid="ignore"):  # 0 / 0 without a negative: nan
        figures["auc"] = (negative * wins).sum(1) / negative.sum(1)

    if not drawn:
        figures["policy"] = found(scores, np.zeros_like(lead), k)
        figures["ranker"] = found(scores, scores["rewards"], k)
    if "logp" in scores and not drawn:
        figures["fused"] = fused_change(scores, k)
    return figures


def parts(name: str, values: np.ndarray) -> Arrays:
    """Masks (N,) of a group array by label: its names, or thirds of its numbers."""
    distinct = np.unique(values)
    if values.dtype.kind in "iuf" and len(distinct) > FEW:
        low, high = np.quantile(values, [1 / 3, 2 / 3])
        return {
            f"{name} low <= {low:.4g}": values <= low,
            f"{name} middle": (values > low) & (values <= high),
            f"{name} high > {high:.4g}": values > high,
        }
    return {f"{name} {value}": values == value for value in distinct}


def interval(change: np.ndarray, z: float) -> tuple[float, float]:
    """Mean, and z standard errors."""
    return change.mean(), z * change.std(ddof=1) / np.sqrt(len(change))


def cells(mask: np.ndarray, real: Arrays, noise: Arrays, k: int) -> dict[str, str]:
    """Title of the column -> figure of the samples in a mask (N,)."""
    row = {"n": f"{mask.sum():>7}"}
    columns = {f"HR@{k}": "policy", "ranker": "ranker"}
    columns |= {"fused": "fused", "shuffled": "fused"}
    columns |= {"AUC": "auc", "clear": "clear", "admitted": "admit"}
    for title, name in columns.items():
        figures = real
        if title == "shuffled":
            figures = noise
        if name not in figures:
            continue
        values = 100 * figures[name][mask]
        if name == "fused":
            mean, error = interval(values, 1.96)
            row[title] = f"{mean:>+6.1f} +-{error:<4.1f}"
        else:
            width = max(7, len(title) + 2)
            row[title] = f"{np.nanmean(values):>{width}.1f}"
    return row


def quantiles(real: Arrays, noise: Arrays) -> list[str]:
    """Lines with those of the two diagnostics, and what each of them admits."""
    rows = {"quantile": QUANTILES}
    others = {"difficulty": real["clear"], "discriminability": real["hard"]}
    for name, other in others.items():
        rows[name] = np.nanquantile(real[name], QUANTILES)
        passes = real[name] >= rows[name][:, None]  # (quantiles, N)
        rows[f"admitted from this {name}"] = (passes & other).mean(1)
    noisy = np.nanquantile(noise["discriminability"], QUANTILES)
    rows["discriminability, shuffled"] = noisy

    lines = []
    for label, values in rows.items():
        figures = "".join(f"{value:>10.3g}" for value in values)
        lines.append(f"{label:<36}{figures}")
    return lines


def notes(scores: Arrays, auc: np.ndarray, drawn: bool) -> list[str]:
    """A line for each thing that looks wrong."""
    rewards = scores["rewards"]
    hit = scores["hit"]
    width = spread(scores)
    is_flat = width <= 1e-6 * np.abs(rewards).max(1)
    is_negative = scores["valid"] & (rewards < 0)
    is_at_zero = ~scores["valid"] & (rewards == 0)
    gap = np.abs(rewards - scores["target_reward"][:, None])
    differs = hit & (gap > 0.1 * width.mean())
    is_beaten = is_negative.any() and is_at_zero.any()
    repeats = not drawn and (hit.sum(1) > 1).any()

    doubts = [
        (not hit.any(), "no rollout is a hit; compare token IDs, not text"),
        (hit.any(1).all(), "no target is absent; were they put into the groups?"),
        (is_flat.mean() > 0.5, "the rewards are flat in most groups"),
        (np.nanmean(auc) < 0.55, "AUC is near chance, or below it"),
        (is_beaten, "rewards are negative and invalid IDs are at 0, above them"),
        (differs.any(), "target_reward is not the reward of the hit"),
        (repeats, "targets are hit more than once; are these draws (--drawn)?"),
        (len(hit) < 200, "fewer than 200 samples"),
    ]
    return [f"Note: {text}." for is_so, text in doubts if is_so]


def verdict(change: np.ndarray, masks: Arrays) -> str:
    """The last line."""
    places = []
    for label, mask in masks.items():
        level = 0.05
        if label != "all":
            level = 0.05 / (len(masks) - 1)  # Bonferroni
        mean, error = interval(change[mask], NormalDist().inv_cdf(1 - level / 2))
        if mean > error and np.count_nonzero(change[mask]) >= MIN_SIZE:
            places.append(label)

    if not places:
        return "Over all and in each group, nothing to teach is shown."
    where = shorten(", ".join(places), 60, placeholder=" ...")
    return f"In {where}: the ranker has something to teach."


def report(
    scores: Arrays,
    min_difficulty: float = 0.3,
    min_discriminability: float = 0.01,
    k: int = 10,
    drawn: bool = False,
) -> str:
    """The text, 100 columns of ASCII. ValueError names a wrong array or option."""
    scores = prepare(scores)
    N, G = scores["hit"].shape
    if not drawn and not 1 <= k < G:
        raise ValueError(f"k: expected 1 to {G - 1}, less than the group, given {k}")
    thresholds = {"min_difficulty": min_difficulty}
    thresholds["min_discriminability"] = min_discriminability
    real = measure(scores, thresholds, k, drawn)
    noise = measure(shuffle(scores), thresholds, k, drawn)
    lines = [f"{N} samples, groups of {G}", *quantiles(real, noise), ""]

    # The table.
    masks = {"all": np.ones(N, dtype=bool)}
    for name, values in scores.items():
        if name.startswith("group_"):
            masks |= parts(name.removeprefix("group_"), values)
    masks = {label: mask for label, mask in masks.items() if mask.sum() >= MIN_SIZE}
    rows = {label: cells(mask, real, noise, k) for label, mask in masks.items()}
    rows["all, shuffled"] = cells(masks["all"], noise, noise, k)
    titles = [title.rjust(len(cell)) for title, cell in rows["all"].items()]
    lines.append(f"{'percent':<26}{''.join(titles)}")
    for label, row in rows.items():
        lines.append(f"{label[:26]:<26}{''.join(row.values())}")

    # What to make of it.
    lines += ["", *notes(scores, real["auc"], drawn)]
    if drawn:
        lines.append("No HR@k and no fused order: repeats would fill several places.")
    if "fused" in real:
        lines += [CAVEAT, verdict(real["fused"], masks)]
    else:
        lines.append("No verdict: it needs logp, and groups with an order (beams).")
    return "\n".join(lines).encode("ascii", "replace").decode()


def main(argv: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("path", type=Path, metavar="SCORES.npz")
    add("--min-difficulty", type=float, default=0.3, help="in 0..1; 0.3")
    add("--min-discriminability", type=float, default=0.01, help="of rewards; 0.01")
    add("--k", type=int, default=10, help="of HR@k; 10")
    add("--drawn", action="store_true", help="the groups have no order")
    options = vars(parser.parse_args(argv))
    path = options.pop("path")
    try:
        print(report(load(path), **options))
    except ValueError as error:
        print(f"diagnose.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
