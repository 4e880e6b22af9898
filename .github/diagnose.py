# SPDX-License-Identifier: MIT
"""Will it help me? Has your ranker anything to teach your policy, and for whom?

    python .github/diagnose.py scores.npz

Diagnose the policy that NLL has finished: what NLL teaches as well is no reason for
GRPO. scores.npz (numpy.savez) holds N samples with G rollouts each, of users whom
neither the policy nor the ranker was trained on; scores of others say yes to anything.

  rewards (N, G)      the ranker's scores of the rollouts, in any unit
  target_reward (N,)  its score of the true item
  hit (N, G)          the rollout is the true item (True or 1); compare token IDs
  valid (N, G)        the rollout names an item; left out: all do. Where it is False the
                      other arrays may hold padding, nan and -inf too
  logp (N, G)         the policy's log-probability, by which columns are sorted. Left
                      out: they come likeliest first, and no verdict is possible
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
    times_shown = np.bincount(shop.shown.ravel(), minlength=len(shop.tokens))
    np.savez(
        "scores.npz",
        rewards=scored.rewards,
        target_reward=scored.target_reward,
        hit=scored.hit,
        valid=scored.valid,
        logp=scored.logp,
        items=policy.items_of(scored.tokens),
        target_item=users.target,
        group_shown=times_shown[users.history].mean(1),  # of the history, not the target
    )

Difficulty: share of the group ahead of the target (of drawn groups: share of misses).
Discriminability: the target's reward minus the mean of the valid negatives. Under both
stands what is admitted if that quantile is the threshold. Then, in percent:

  HR@k        targets among the policy's first k rollouts. Here, in fused and in control
              invalid rollouts are put last: a shop shows items only
  AUC-policy  negatives of the group that stand behind the target; none if it is absent
  AUC-ranker  negatives that score below the target; ties count half
  clear       discriminability at its threshold or above
  admitted    clear, and difficulty at its threshold or above
  fused       change of HR@k by the order logp + w * reward, +- 1.96 standard errors. w
              is chosen on a random half of the users in this row and judged on the
              other, both ways, from 0 and 0.25 to 8 nats of logp for one standard
              deviation of rewards in a group
  control     the same where a reward is the item's mean over the other half of all
              users. Where that does as well, the ranker knows what is popular, and a
              table would do

The last line is the answer. X is --gain: the least that is worth your trouble.

  Yes:        fused is clearly above 0, and above control: over all, or in a group with
              the interval widened for the number of groups (Bonferroni)
  No:         a gain of X points of HR over all samples is excluded, over the policy or
              over control, whatever w is, and whether one listens to the ranker
              everywhere or in one group only
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
from adagrpo import adagrpo_gate

ARRAYS = {  # axes (1: N, 2: N and G), numpy's letters of the types, and their name
    "rewards": (2, "iuf", "numbers"),
    "target_reward": (1, "iuf", "numbers"),
    "hit": (2, "biuf", "True or False"),
    "valid": (2, "biuf", "True or False"),
    "logp": (2, "iuf", "numbers"),
    "items": (2, "iufU", "numbers or names"),
    "target_item": (1, "iufU", "numbers or names"),
    "user": (1, "iufU", "numbers or names"),
    "group_NAME": (1, "biufU", "numbers or names"),
}
NATS = (0, 0.25, 0.5, 1, 2, 4, 8)  # of logp, for one standard deviation of rewards
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
FEW = 6  # a number with more distinct values than this is cut in thirds
MIN_SIZE = 10  # users in a row of the table: fewer show nothing
MIN_SEEN = 0.9  # share of the rollouts whose item the control must have seen
LABEL = 25  # width of the names in the table
SEED = 0  # of the halves
CAVEAT = """\
A yes is necessary and not sufficient: what the ranker knows has to be expressible from
what the policy sees. It holds for groups that are known before the purchase, and for
the policy that NLL has finished."""

Arrays = dict[str, np.ndarray]


def load(path: Path) -> Arrays:
    """The arrays of an .npz file. ValueError names what cannot be read."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; numpy.savez adds .npz to a name")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a file of numpy.savez")
    scores = {}
    with np.load(path) as file:
        for name in file.files:
            try:
                scores[name] = np.asarray(file[name])
            except ValueError:  # Python objects, such as a column of pandas
                raise ValueError(
                    f"{name}: expected numbers or text, given Python objects; "
                    "save it with .astype(str) or .astype(float)"
                ) from None
    return scores


def check_types(scores: Arrays) -> None:
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
            raise ValueError(f"{name}: leave it out, or call it {', '.join(ARRAYS)}")
        axes, letters, words = ARRAYS[role]
        shape = N_G[:axes]
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, given {array.shape}")
        if array.dtype.kind not in letters:
            raise ValueError(f"{name}: expected {words}, given {array.dtype}")
        if words == "True or False" and not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name}: expected {words}, given other numbers")


def check_values(scores: Arrays) -> None:
    """The same of what the arrays hold."""
    hit = scores["hit"]
    valid = scores["valid"]
    if (hit & ~valid).any():
        raise ValueError("valid: expected True wherever hit is True, given False")
    if len(np.unique(scores["user"])) < MIN_SIZE:
        raise ValueError(f"user: expected {MIN_SIZE} users or more, given fewer")
    if not (valid & ~hit).any():
        raise ValueError("hit: expected a valid rollout that is no hit, given none")
    for name, array in scores.items():
        if array.ndim == 2:
            array = array[valid]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, given nan or inf")
    if "items" in scores and "target_item" in scores:
        is_target = scores["items"] == scores["target_item"][:, None]
        if (valid & (hit != is_target)).any():
            raise ValueError("hit: expected True just where items is target_item")


def prepare(scores: Arrays) -> Arrays:
    """Checked copies, with `valid` and `user`, and columns in the policy's order."""
    scores = {name: np.array(array, order="C") for name, array in scores.items()}
    check_types(scores)
    scores.setdefault("valid", np.ones(scores["hit"].shape))
    scores.setdefault("user", np.arange(len(scores["hit"])))
    for name in ("hit", "valid"):
        scores[name] = scores[name].astype(bool)
    check_values(scores)

    for name in ("rewards", "target_reward", "logp"):
        if name in scores:
            scores[name] = scores[name].astype(float)
    for name in ("user", "items"):  # numbered from 0
        if name in scores:
            _, number = np.unique(scores[name], return_inverse=True)
            scores[name] = number.reshape(scores[name].shape)
    if "logp" in scores:
        order = np.argsort(-scores["logp"], axis=1, kind="stable")
        for name, array in scores.items():
            if array.ndim == 2:
                scores[name] = np.take_along_axis(array, order, axis=1)
    return scores


# --------------------------------------------------- the fused order and its control


def spread(scores: Arrays) -> np.ndarray:
    """(N,) standard deviation of the valid rewards of each group."""
    rewards = np.ma.masked_array(scores["rewards"], ~scores["valid"])
    return rewards.std(axis=1).filled(0.0)


def found(scores: Arrays, sort_by: np.ndarray, k: int) -> np.ndarray:
    """(N,) bool: the target is among the first k by `sort_by` (N, G), invalid last."""
    sort_by = np.where(scores["valid"], sort_by, -np.inf)
    first = np.argsort(-sort_by, axis=1, kind="stable")[:, :k]  # ties keep their order
    return np.take_along_axis(scores["hit"], first, axis=1).any(1)


def found_by_weight(scores: Arrays, k: int) -> np.ndarray:
    """(W, N) of 0 and 1: `found` for each w of the grid; the first is the policy's."""
    unit = np.sqrt(np.mean(spread(scores) ** 2))
    if unit == 0:  # flat rewards change no order
        unit = 1.0
    rewards = np.where(scores["valid"], scores["rewards"], 0.0)
    results = []
    for nats in NATS:
        sort_by = scores["logp"] + nats / unit * rewards
        results.append(found(scores, sort_by, k))
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
    half = halves(scores["user"])
    items = scores["items"]
    control = scores["rewards"].copy()
    seen = 0
    for judged in (0, 1):
        mine = scores["valid"] & (half == judged)[:, None]
        other = scores["valid"] & (half != judged)[:, None]
        size = items.max() + 1
        count = np.bincount(items[other], minlength=size)
        total = np.bincount(items[other], scores["rewards"][other], minlength=size)
        mean = total / np.maximum(count, 1)
        known = mine & (count[items] > 0)
        control[known] = mean[items[known]]
        seen += known.sum()
    return control, seen / scores["valid"].sum()


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


def most(by_weight: np.ndarray, rivals: list, masks: Arrays, user: np.ndarray):
    """The most that any w may gain beyond each rival (W, N), and its error.

    In HR of all samples, if one listens to the ranker in one mask and nowhere else. To
    exclude a gain it is enough to exclude it beyond one rival at the same w.
    """
    ends = []
    for mask in masks.values():
        for weight in range(1, len(NATS)):
            uppers = []
            for rival in rivals:
                beyond = np.where(mask, by_weight[weight] - rival[weight], 0.0)
                mean, error = interval(beyond, user)
                uppers.append((mean + error, error))
            ends.append(min(uppers))
    upper, error = max(ends)
    return max(upper, 0.0), error


def verdict(
    by_weight: np.ndarray,  # (W, N)
    control: np.ndarray | None,  # (W, N) of the control
    masks: Arrays,
    user: np.ndarray,
    gain: float,  # a share, not in points
) -> str:
    """The last line."""
    rivals = [np.broadcast_to(by_weight[0], by_weight.shape)]
    over = "the policy"
    if control is not None:
        rivals.append(control)
        over = "the policy, or over a ranker without a user (control),"
    upper, upper_error = most(by_weight, rivals, masks, user)
    if upper < gain:
        points = f"{100 * upper:.2f} points"
        return f"No: a gain of more than {points} over {over} is excluded."

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
        if mean <= error:
            continue
        if control is not None:
            beyond = change - fused_change(control, user, mask)
            least, error = interval(beyond, user[mask], z)
            if least <= error:
                but = "it gains, but perhaps no more than the control; "
                continue
        places.append(f"{label} {100 * mean:+.1f}")
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


def measure(scores: Arrays, thresholds: dict, k: int, drawn: bool):
    """The gate, and figures for the table, (N,) each; HR@k only if there is an order."""
    hit = scores["hit"]
    gate = adagrpo_gate(
        target_reward=torch.from_numpy(scores["target_reward"]),
        rollout_rewards=torch.from_numpy(scores["rewards"]),
        hit=torch.from_numpy(hit),
        valid=torch.from_numpy(scores["valid"]),
        ranked=not drawn,
        **thresholds,
    )
    gate = {name: tensor.numpy() for name, tensor in gate._asdict().items()}

    figures = {}
    negative = scores["valid"] & ~hit
    negatives = np.where(negative.any(1), negative.sum(1), np.nan)
    if not drawn:
        is_behind = hit.cumsum(1) > 0
        figures[f"HR@{k}"] = found(scores, np.zeros(hit.shape), k)
        figures["AUC-policy"] = (negative & is_behind).sum(1) / negatives
    lead = scores["target_reward"][:, None] - scores["rewards"]  # (N, G)
    wins = (lead > 0) + 0.5 * (lead == 0)
    figures["AUC-ranker"] = (negative * wins).sum(1) / negatives
    figures["clear"] = gate["clear"]
    figures["admitted"] = gate["admit"]
    return gate, figures


def parts(name: str, values: np.ndarray) -> Arrays:
    """Masks (N,) of a group array by label: its names, or thirds of its numbers."""
    distinct = np.unique(values)
    if values.dtype.kind in "iuf" and len(distinct) > FEW:
        low, high = np.quantile(values, [1 / 3, 2 / 3])
        masks = {
            f"{name} low <= {low:.4g}": values <= low,
            f"{name} middle": (values > low) & (values <= high),
            f"{name} high > {high:.4g}": values > high,
        }
    else:
        masks = {f"{name} {value}": values == value for value in distinct}
    return {ascii(label)[1:-1]: mask for label, mask in masks.items()}


def quantiles(gate: Arrays) -> list[str]:
    """Lines with those of the two diagnostics, and what each of them admits."""
    rows = {"quantile": QUANTILES}
    for name, other in (("difficulty", "clear"), ("discriminability", "hard")):
        rows[name] = np.nanquantile(gate[name], QUANTILES)
        passes = gate[name] >= rows[name][:, None]  # (quantiles, N)
        rows[f"admitted from this {name}"] = (passes & gate[other]).mean(1)
    lines = []
    for label, values in rows.items():
        figures = "".join(f"{value:>10.3g}" for value in values)
        lines.append(f"{label:<36}{figures}")
    return lines


def cells(columns: Arrays, user: np.ndarray) -> dict[str, str]:
    """Title of the column -> figure of the samples in a row, in percent."""
    row = {"n": f"{len(user):>7}"}
    for title, values in columns.items():
        width = max(7, len(title) + 1)
        row[title] = f"{100 * np.nanmean(values):>{width}.1f}"
        if title == "fused":
            mean, error = interval(values, user)
            row[title] = f"{100 * mean:>+7.1f} +-{100 * error:<4.1f}"
    return row


def threshold_note(name: str, values: np.ndarray, passes: np.ndarray) -> list[str]:
    """If nobody or everybody reaches a threshold: a quantile that divides them."""
    if 0.01 < passes.mean() < 0.99:
        return []
    note = f"{100 * passes.mean():.0f}% reach min_{name}"
    for level in np.nanquantile(values, QUANTILES):
        reached = (values >= level).mean()
        if level > 0 and 0.01 < reached < 0.99:
            return [f"{note}; {100 * reached:.0f}% would reach {level:.3g}"]
    return [f"{note}, and no other threshold would divide them"]


def notes(scores: Arrays, gate: Arrays, drawn: bool) -> list[str]:
    """What looks wrong in the scores, a line each."""
    hit = scores["hit"]
    valid = scores["valid"]
    rewards = scores["rewards"]
    lines = threshold_note("difficulty", gate["difficulty"], gate["hard"])
    lines += threshold_note("discriminability", gate["discriminability"], gate["clear"])
    if hit.any(1).all():
        lines.append("no target is absent; were they put into the groups?")
    if (valid & (rewards < 0)).any() and (~valid & (rewards == 0)).any():
        lines.append(
            "rewards are negative, and invalid IDs at 0 above them; in GRPO give these "
            "the lowest valid reward less one standard deviation"
        )
    gap = np.abs(rewards - scores["target_reward"][:, None])
    if (hit & (gap > 0.1 * spread(scores).mean())).any():
        lines.append("target_reward is not the reward of the hit")
    if "items" in scores and not drawn:
        columns = np.arange(hit.shape[1])
        items = np.where(valid, scores["items"], -1 - columns)  # invalid: no repeats
        repeats = (np.diff(np.sort(items, axis=1)) == 0).any(1).mean()
        if repeats > 0:
            lines.append(
                f"{100 * repeats:.1f}% of the groups hold an item twice, so it takes "
                "two places; keep the likelier (are these draws? --drawn)"
            )
    return lines


def report(
    scores: Arrays,
    min_difficulty: float = 0.3,
    min_discriminability: float = 0.01,
    k: int = 10,
    gain: float = 0.5,
    drawn: bool = False,
) -> str:
    """The text, in ASCII. ValueError names a wrong array or option."""
    scores = prepare(scores)
    user = scores["user"]
    N, G = scores["hit"].shape
    if not drawn and not 1 <= k < G:
        raise ValueError(f"k: expected 1 to {G - 1}, less than the group, given {k}")
    if not gain > 0:
        raise ValueError(f"gain: expected more than 0 points, given {gain}")
    thresholds = {"min_difficulty": min_difficulty}
    thresholds["min_discriminability"] = min_discriminability
    gate, figures = measure(scores, thresholds, k, drawn)
    doubts = notes(scores, gate, drawn)

    masks = {"all": np.ones(N, dtype=bool)}
    for name, values in scores.items():
        if name.startswith("group_"):
            masks |= parts(name.removeprefix("group_"), values)
    for label, mask in list(masks.items()):
        if len(np.unique(user[mask])) < MIN_SIZE:
            del masks[label]

    # What the ranker finds, and what one without a user does.
    by_weight = None
    control = None
    if "logp" in scores and not drawn:
        by_weight = found_by_weight(scores, k)  # (W, N)
        share = 0.0
        if "items" in scores:
            rewards, share = without_user(scores)
        if share >= MIN_SEEN:
            control = found_by_weight(scores | {"rewards": rewards}, k)
        else:
            doubts.append(
                "without items that users share it cannot be told whether the ranker "
                "knows more than what is popular, nor whether items repeat"
            )

    lines = [f"{N} samples, groups of {G}", *quantiles(gate), ""]
    gains = []
    for label, mask in masks.items():
        columns = {title: values[mask] for title, values in figures.items()}
        if by_weight is not None:
            columns["fused"] = fused_change(by_weight, user, mask)
            gains.append(columns["fused"].mean())
        if control is not None:
            columns["control"] = fused_change(control, user, mask)
        row = cells(columns, user[mask])
        if label == "all":
            titles = [title.rjust(len(cell)) for title, cell in row.items()]
            lines.append(f"{'percent':<{LABEL}}{''.join(titles)}")
        if len(label) > LABEL:
            label = "..." + label[3 - LABEL :]  # the end tells apart
        lines.append(f"{label:<{LABEL}}{''.join(row.values())}")

    present = scores["hit"].any(1).mean()
    if present == 0:
        answer = (
            "Undecided: no verdict is possible, no rollout is a hit. "
            "Compare token IDs, not text."
        )
    elif by_weight is None:
        answer = "Undecided: no verdict is possible without logp, nor of drawn groups."
    else:
        answer = verdict(by_weight, control, masks, user, gain / 100)
        hr = by_weight[0].mean()
        if min(gains) > 0 and gains[0] > 0.8 * min(hr, present - hr):
            doubts.append(
                "a gain everywhere, and HR nearly doubled or nearly all it can be; rule "
                "out that the ranker's log holds these purchases"
            )
            answer += " First rule out a leak, see the note above."
    lines.append("")
    lines += [f"Note: {doubt}." for doubt in doubts]
    lines += [CAVEAT, answer]
    return "\n".join(lines)


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
