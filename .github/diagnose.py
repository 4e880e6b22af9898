# SPDX-License-Identifier: MIT
"""Will it help me? Has your ranker anything to teach your policy, and for whom?

    python .github/diagnose.py scores.npz

Diagnose the policy that NLL has finished: what NLL teaches as well is no reason for
GRPO. scores.npz (numpy.savez) holds N samples with G rollouts each, of which neither
the policy nor the ranker has learned: later purchases, or other users. Scores of what
they have learned say yes to anything. Some thousand samples decide; see Undecided.

  rewards (N, G)      the ranker's scores of the rollouts, in any unit
  target_reward (N,)  its score of the true item
  hit (N, G)          the rollout is the true item (True or 1); compare token IDs
  logp (N, G)         the policy's log-probability, by which columns are sorted
  valid (N, G)        the rollout names an item; left out: all do. Where it is False the
                      others may hold padding, nan and -inf too
  items (N, G)        which item it names: finds repeats, and gives the control
  target_item (N,)    the true item, which checks hit against items
  user (N,)           whose sample it is; left out: every sample is another user's
  group_NAME (N,)     any number of them: names, or numbers, to be cut in thirds. Of the
                      user's side, known BEFORE the purchase: groups by the true item
                      sort the samples by the answer, and say yes to mere popularity

The toy's scores.npz (to be run in the folder of adagrpo.py):

    import numpy as np
    import torch
    from adagrpo import Config, post_train, pretrain, roll_out_and_score, train_ranker
    from toy_data import make_shop

    config = Config()
    shop = make_shop(config.seed)
    policy = pretrain(shop, config)
    ranker = train_ranker(shop, config)
    post_train(policy, ranker, shop.posttrain, None, 0.0, config)  # NLL finishes it

    users = shop.validation
    history = torch.as_tensor(users.history)
    target = torch.as_tensor(users.target)
    with torch.no_grad():
        scored = roll_out_and_score(policy, ranker, history, target, 32)
    scores = scored._asdict()
    scores["items"] = policy.items_of(scores.pop("tokens"))
    scores["target_item"] = users.target
    times_shown = np.bincount(shop.shown.ravel(), minlength=len(shop.tokens))
    scores["group_shown"] = times_shown[users.history].mean(1)  # not of the target
    np.savez("scores.npz", **scores)

The table is in percent; clear and admitted are what the gate in adagrpo.py says.

  HR@k        targets among the first k rollouts, invalid ones put last
  AUC-policy  negatives that stand behind the target, AUC-ranker: that score below it
  fused, +-   change of HR@k by the order logp + w * reward, and 1.96 standard errors. w
              is chosen on half of the users and judged on the other half, both ways
  control     fused with an item's mean reward over the other half. Where that does as
              well, the ranker knows what is popular, and a table would do

The last line is the answer. X is --gain: the least that is worth your trouble.

  Yes:        fused is clearly above 0, and above control: over all, or in a group with
              the interval widened for the number of groups (Bonferroni)
  No:         a gain of X points over all samples is excluded, whatever w is
  Undecided:  neither; how small a gain would not show, and how many samples would do
"""

import argparse
import sys
import zipfile
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adagrpo import Gate, adagrpo_gate

MATRICES = ("rewards", "hit", "logp", "valid", "items")  # (N, G)
VECTORS = ("target_reward", "target_item", "user", "group_NAME")  # (N,)
NATS = (0, 0.25, 0.5, 1, 2, 4, 8)  # of logp, for one standard deviation of rewards
FEW = 6  # a number with more distinct values than this is cut in thirds
MIN_USERS = 10  # in a group: fewer show nothing
MIN_SEEN = 0.9  # share of the rollouts whose item the control must have seen
LABEL = 25  # width of the names in the table
SEED = 0  # of the halves
CAVEAT = "A yes is necessary, not sufficient; groups must be known before the purchase."

Arrays = dict[str, np.ndarray]


def load(path: Path) -> Arrays:
    """The arrays of an .npz file, or a ValueError."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: no file of numpy.savez (which adds .npz to a name)")
    try:
        with np.load(path) as file:
            return dict(file)
    except ValueError:  # Python objects, such as a column of pandas
        message = "expected numbers or text: save columns with .astype(float) or (str)"
        raise ValueError(f"{path}: {message}") from None


def prepare(scores: Arrays) -> Arrays:
    """Copies, with `valid` and `user`, and columns in the policy's order.

    ValueError names the array that is wrong, what it should be, and what it is.
    """
    for name in ("rewards", "target_reward", "hit", "logp"):
        if name not in scores:
            raise ValueError(f"{name}: expected an array of this name, given none")
    N_G = scores["rewards"].shape
    if len(N_G) != 2 or min(N_G) < 2:
        raise ValueError(f"rewards: expected (N, G), (2, 2) or more, given {N_G}")
    scores = {"valid": np.ones(N_G), "user": np.arange(N_G[0])} | scores

    for name, array in scores.items():
        shape = N_G
        if name in VECTORS or name.startswith("group_"):
            shape = N_G[:1]
        elif name not in MATRICES:
            names = ", ".join(MATRICES + VECTORS)
            raise ValueError(f"{name}: leave it out, or call it {names}")
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, given {array.shape}")
    for name in ("hit", "valid"):
        if not np.isin(scores[name], (0, 1)).all():
            raise ValueError(f"{name}: expected True or False, given other values")
        scores[name] = scores[name].astype(bool)
    for name in ("rewards", "target_reward", "logp"):
        scores[name] = scores[name].astype(float)

    scores["valid"] |= scores["hit"]
    for name, array in scores.items():
        if array.ndim == 2:
            array = array[scores["valid"]]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, given nan or inf")
    if "items" in scores and "target_item" in scores:
        is_target = scores["items"] == scores["target_item"][:, None]
        if (scores["valid"] & (scores["hit"] != is_target)).any():
            raise ValueError("hit: expected True just where items is target_item")

    for name in ("user", "items"):  # numbered from 0
        if name in scores:
            _, number = np.unique(scores[name], return_inverse=True)
            scores[name] = number.reshape(scores[name].shape)
    order = np.argsort(-scores["logp"], axis=1, kind="stable")
    for name, array in scores.items():
        if array.ndim == 2:
            scores[name] = np.take_along_axis(array, order, axis=1)
    return scores


# --------------------------------------------------- the fused order and its control


def found_by_weight(scores: Arrays, k: int) -> np.ndarray:
    """(W, N) of 0 and 1: the target is among the first k, for each w of the grid."""
    rewards = np.ma.masked_array(scores["rewards"], ~scores["valid"])
    unit = np.sqrt(rewards.var(axis=1).filled(0).mean())
    unit = max(unit, 1e-12)  # flat rewards change no order, whatever it is
    results = []
    for nats in NATS:  # the first is the policy's order
        sort_by = scores["logp"] + nats / unit * rewards.filled(0)
        sort_by = np.where(scores["valid"], sort_by, -np.inf)
        first = np.argsort(-sort_by, axis=1, kind="stable")[:, :k]
        results.append(np.take_along_axis(scores["hit"], first, axis=1).any(1))
    return np.array(results, dtype=float)


def halves(user: np.ndarray) -> np.ndarray:
    """(N,) 0 or 1: a random half of the users, with all their samples."""
    side = np.random.default_rng(SEED).permutation(user.max() + 1) % 2
    return side[user]


def fused_change(by_weight: np.ndarray, user: np.ndarray, mask: np.ndarray):
    """What the fused order changes for the samples in a mask (N,): -1, 0 or 1 each.

    With the w that is best for the other half of the users in the mask.
    """
    half = halves(user)
    change = np.zeros(len(mask))
    for judged in (0, 1):
        mine = mask & (half == judged)
        other = mask & (half != judged)
        best = by_weight[:, other].sum(1).argmax()  # of equally good w the smallest
        change[mine] = by_weight[best, mine] - by_weight[0, mine]
    return change[mask]


def without_user(scores: Arrays) -> tuple[np.ndarray, float]:
    """The control's rewards (N, G), and the share of the rollouts that it knows.

    An item's reward is its mean over the other half. An item that is not there keeps
    its reward, so that it does not speak for the ranker and against the control.
    """
    half = halves(scores["user"])[:, None]
    valid = scores["valid"]
    items = scores["items"]
    size = items.max() + 1
    control = scores["rewards"].copy()
    seen = 0
    for judged in (0, 1):
        other = valid & (half != judged)
        count = np.bincount(items[other], minlength=size)
        total = np.bincount(items[other], scores["rewards"][other], minlength=size)
        known = valid & (half == judged) & (count[items] > 0)
        control[known] = total[items[known]] / count[items[known]]
        seen += known.sum()
    return control, seen / valid.sum()


# ------------------------------------------------------------------------ the answer


def interval(change: np.ndarray, user: np.ndarray, z: float = 1.96):
    """Mean, and z standard errors; samples of one user vary together.

    As if two users more had gained and two had lost (after Agresti and Min): a handful
    of changes proves nothing, and no change at all excludes only gains above 3.9 / N.
    """
    mean = change.mean()
    users = np.count_nonzero(np.bincount(user))
    deviation = np.bincount(user, change - mean)  # summed over each user
    four_users = 4 * (len(change) / users) ** 2
    error = np.sqrt((deviation**2).sum() + four_users) / len(change)
    return mean, z * error


def most(gains: list, masks: Arrays, user: np.ndarray):
    """The most that any w may gain, and its error; gains beyond each rival (W, N).

    In HR of all samples, if one listens to the ranker in one mask and nowhere else. To
    exclude a gain it is enough to exclude it beyond one rival at the same w.
    """
    ends = []
    for mask in masks.values():
        for weight in range(1, len(NATS)):
            uppers = []
            for beyond in gains:
                mean, error = interval(np.where(mask, beyond[weight], 0.0), user)
                uppers.append((mean + error, error))
            ends.append(min(uppers))
    upper, error = max(ends)
    return max(upper, 0.0), error


def verdict(by_weight, control, masks: Arrays, user: np.ndarray, gain: float) -> str:
    """The last line. by_weight and control are (W, N), the gain is a share."""
    gains = [by_weight - by_weight[0]]
    if control is not None:
        gains.append(by_weight - control)
    upper, upper_error = most(gains, masks, user)
    if upper < gain:
        points = f"{100 * upper:.2f} points"
        return f"No: a gain of more than {points} over policy or control is excluded."

    # Where is the gain clear, and clearly more than the control's?
    places = []
    but = ""
    for label, mask in masks.items():
        level = 0.05
        if label != "all":
            level = 0.05 / (len(masks) - 1)  # Bonferroni
        z = NormalDist().inv_cdf(1 - level / 2)
        change = fused_change(by_weight, user, mask)
        mean, error = interval(change, user[mask], z)
        beyond = change
        if control is not None:
            beyond = change - fused_change(control, user, mask)
        least, beyond_error = interval(beyond, user[mask], z)
        if mean > error and least > beyond_error:
            places.append(f"{label} {100 * mean:+.1f}")
        elif mean > error:
            but = "it gains, but perhaps no more than the control; "
    if places:
        return f"Yes: points gained in {', '.join(places)}."

    # An interval that is narrower than the gain cannot hold both it and 0.
    needed = len(user) * max(2, (2 * upper_error / gain) ** 2)
    return (
        f"Undecided: {but}with {len(user):,} samples a gain below "
        f"{100 * upper_error:.1f} points would not show; about "
        f"{float(f'{needed:.2g}'):,.0f} would do for {100 * gain:g}."
    )


# ------------------------------------------------------------------------ the report


def auc(scores: Arrays, wins: np.ndarray) -> np.ndarray:
    """(N,) share of the negatives that the target beats (N, G); nan without any."""
    negative = scores["valid"] & ~scores["hit"]
    count = np.where(negative.any(1), negative.sum(1), np.nan)
    return (negative * wins).sum(1) / count


def groups(scores: Arrays) -> Arrays:
    """Masks (N,) by label: all, and of each group array its names, or thirds."""
    user = scores["user"]
    masks = {"all": np.ones(len(user), dtype=bool)}
    for name, values in scores.items():
        if not name.startswith("group_"):
            continue
        parts = list(np.unique(values))
        if values.dtype.kind in "iuf" and len(parts) > FEW:
            low, high = np.quantile(values, [1 / 3, 2 / 3])
            parts = [f"low <= {low:.4g}", "middle", f"high > {high:.4g}"]
            values = np.array(parts)[np.searchsorted([low, high], values)]
        for part in parts:
            mask = values == part
            if len(np.unique(user[mask])) >= MIN_USERS:
                masks[f"{name.removeprefix('group_')} {part}"] = mask
    return masks


def notes(scores: Arrays, gate: Gate, drawn: bool) -> list[str]:
    """What looks wrong in the scores, a line each."""
    lines = []
    for name, passes in (("difficulty", gate.hard), ("discriminability", gate.clear)):
        values = getattr(gate, name)
        level = np.nanquantile(values, 0.75)
        share = f"{100 * passes.mean():.0f}% reach min_{name}"
        proposal = f"{100 * (values >= level).mean():.0f}% would reach {level:.3g}"
        if not 0.01 < passes.mean() < 0.99:
            lines.append(f"{share}; {proposal}")

    valid = scores["valid"]
    rewards = scores["rewards"]
    if (valid & (rewards < 0)).any() and (~valid & (rewards == 0)).any():
        lines.append("rewards are negative, invalid IDs at 0 above them; lower these")
    if "items" in scores and not drawn:
        # Invalid rollouts get numbers of their own: they are no repeats.
        items = np.where(valid, scores["items"], -1 - np.arange(valid.shape[1]))
        repeats = (np.diff(np.sort(items, axis=1)) == 0).any(1).mean()
        if repeats > 0:
            share = f"{100 * repeats:.1f}% of the groups"
            lines.append(f"{share} hold an item twice; keep the likelier (or --drawn)")
    return lines


def report(
    scores: Arrays,
    min_difficulty: float = 0.3,
    min_discriminability: float = 0.01,
    k: int = 10,
    gain: float = 0.5,
    drawn: bool = False,
) -> str:
    """The text. ValueError names a wrong array or option."""
    scores = prepare(scores)
    hit = scores["hit"]
    user = scores["user"]
    N, G = hit.shape
    if not drawn and not 1 <= k < G:
        raise ValueError(f"k: expected 1 to {G - 1}, less than the group, given {k}")
    gate = adagrpo_gate(
        target_reward=torch.from_numpy(scores["target_reward"]),
        rollout_rewards=torch.from_numpy(scores["rewards"]),
        hit=torch.from_numpy(hit),
        valid=torch.from_numpy(scores["valid"]),
        min_difficulty=min_difficulty,
        min_discriminability=min_discriminability,
        ranked=not drawn,
    )
    gate = Gate(*[tensor.numpy() for tensor in gate])
    doubts = notes(scores, gate, drawn)

    # The columns of the table, (N,) each.
    lead = scores["target_reward"][:, None] - scores["rewards"]  # (N, G)
    columns = {"AUC-ranker": auc(scores, (lead > 0) + 0.5 * (lead == 0))}
    columns |= {"clear": gate.clear, "admitted": gate.admit}

    # What the ranker finds, and what one without a user does.
    control = None
    if not drawn:
        by_weight = found_by_weight(scores, k)  # (W, N)
        auc_policy = auc(scores, hit.cumsum(1) > 0)
        columns = {f"HR@{k}": by_weight[0], "AUC-policy": auc_policy} | columns
        share = 0.0
        if "items" in scores:
            rewards, share = without_user(scores)
        if share >= MIN_SEEN:
            control = found_by_weight(scores | {"rewards": rewards}, k)
        else:
            doubts.append("without items that users share a yes may be mere popularity")

    masks = groups(scores)
    gains = []
    lines = []
    for label, mask in masks.items():
        row = {title: np.nanmean(values[mask]) for title, values in columns.items()}
        if not drawn:
            change = fused_change(by_weight, user, mask)
            row["fused"], row["+-"] = interval(change, user[mask])
            gains.append(row["fused"])
        if control is not None:
            row["control"] = fused_change(control, user, mask).mean()
        width = {title: max(7, len(title) + 1) for title in row}
        cells = [f"{100 * row[title]:>{width[title]}.1f}" for title in row]
        if len(label) > LABEL:
            label = "..." + label[3 - LABEL :]  # the end tells apart
        lines.append(f"{label:<{LABEL}}{mask.sum():>7}{''.join(cells)}")
    titles = [f"{title:>{width[title]}}" for title in row]
    lines.insert(0, f"{'percent':<{LABEL}}      n{''.join(titles)}")

    # The last line.
    present = hit.any(1).mean()
    if present == 0:
        answer = "Undecided: no rollout is a hit. Compare token IDs, not text."
    elif drawn:
        answer = "Undecided: drawn groups have no order to be changed."
    else:
        answer = verdict(by_weight, control, masks, user, gain / 100)
        hr = by_weight[0].mean()
        if min(gains) > 0 and gains[0] > 0.8 * min(hr, present - hr):
            doubts.append("a gain everywhere, and HR nearly doubled or all it can be")
            answer += " First rule out that the ranker's log holds these purchases."

    title = f"{N} samples, groups of {G}"
    doubts = [f"Note: {doubt}." for doubt in doubts]
    return "\n".join([title, "", *lines, "", *doubts, CAVEAT, answer])


def main(argv: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("path", type=Path, metavar="scores.npz")
    add("--min-difficulty", type=float, default=0.3, help="in 0..1; 0.3")
    add("--min-discriminability", type=float, default=0.01, help="of rewards; 0.01")
    add("--k", type=int, default=10, help="of HR@k; 10")
    add("--gain", type=float, default=0.5, help="X, in points; 0.5")
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
