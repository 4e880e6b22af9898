# SPDX-License-Identifier: MIT
"""Claims and pictures of the README from finished runs: python .github/evidence.py FILE [FILE ...]

A FILE is an --out of adagrpo.py. Runs with equal settings make a study, the first study decides. A
claim holds if all of its 95% interval over seeds (Student, paired) is on the right side of the
bound, fails if all is on the wrong side, else is undecided. The weakest comparison is shown.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adagrpo import FIGURES, GROUPS, T95

OURS, ORACLE, HALVES = "adagrpo", "oracle-1.8", ("difficulty", "discriminability")
MIXES = ("mix-0.1", "mix-0.3", "mix-1", "mix-3")
WEIGHTS = ("adagrpo-0.3", "adagrpo-1", "adagrpo", "adagrpo-15")
EQUAL_DOSE = ("difficulty-1.8", "discriminability-2.7")  # weight = adagrpo's dose / own admission
OWN_BEST = ("difficulty-1", "discriminability-2.7")  # by validation on development seeds
CONTROLS = ("random", "inverted", "reweight", "centred-10")
KINDS = ("trend", "series", "niche", "all")
COLOURS = ("#8da0cb", "#66a61e", "#e6ab02", "#a6761d", "#d95f02")


class Study:
    def __init__(self, records: list[dict]):
        self.runs = {(record["seed"], record["arm"]): record for record in records}
        self.settings, self.seeds = records[0]["settings"], sorted({seed for seed, _ in self.runs})

    def level(self, arm, metric="hr@10", group="all", which="final") -> dict[int, float]:
        """The arm's figure for every seed that has it."""
        row, column = FIGURES.index(metric), GROUPS.index(group)
        runs = {s: self.runs[s, arm] for s in self.seeds if (s, arm) in self.runs}
        return {seed: run[which][row][column] for seed, run in runs.items()}

    def gain(self, arm, base="nll", relative=False, **where) -> list[float]:
        """Per seed that has both: the arm's figure less the base's, or in percent of the base's."""
        ours, theirs = self.level(arm, **where), self.level(base, **where)
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        return [100 * (a / b - 1) if relative else a - b for a, b in pairs]

    def over_picked(self, arm, others) -> list[float]:
        """Per seed: the arm's HR@10 less that of the one of `others` that is best on validation."""
        gains = []
        for seed, level in self.level(arm).items():
            runs = [self.runs[seed, a] for a in others if (seed, a) in self.runs]
            if len(runs) == len(others):
                picked = max(runs, key=lambda run: run["validation"])
                gains.append(level - self.level(picked["arm"])[seed])
        return gains


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95% interval."""
    if len(values) < 2:
        return values[0], math.inf
    factor = T95[min(len(values) - 2, 8)] / len(values) ** 0.5
    return float(np.mean(values)), float(factor * np.std(values, ddof=1))


def brackets(mean: float, half: float) -> str:
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def claims(s: Study) -> list[tuple[str, float, int, dict[str, list[float]]]]:
    """(claim, bound, +1 for at least or -1 for at most, comparison -> figure per seed)."""

    def over(arms):
        return {f"over {arm}": s.gain(OURS, arm) for arm in arms}

    def nll(*arms, group="all"):
        return {arm: s.gain(arm, group=group) for arm in arms}

    final, best = ({w: s.gain(OURS, relative=True, which=w)} for w in ("final", "best"))
    invalid = {w: s.gain(OURS, metric="hallucination", which=w) for w in ("final", "best")}
    others = {kind: s.gain(OURS, group=kind) for kind in ("series", "niche")}
    niche = nll(*MIXES[1:], "difficulty", group="niche")
    return [
        ("1 over nll, final checkpoint, %", 5, 1, final),
        ("1 over nll, best checkpoint, %", 5, 1, best),
        ("1 hallucination not above nll's", 0, -1, invalid),
        ("2 over every fixed mixture", 0, 1, over(MIXES)),
        ("2 over the mixture picked on validation", 0, 1, {"": s.over_picked(OURS, MIXES)}),
        ("3 over each half at equal weight", 0, 1, over(HALVES)),
        ("3 over each half at equal dose", 0, 1, over(EQUAL_DOSE)),
        ("3 over each half at its own best weight", 0, 1, over(OWN_BEST)),
        ("4 trend gains", 0, 1, nll(OURS, group="trend")),
        ("4 series, niche lose at most 0.5", -0.5, 1, others),
        ("4 niche: mix from 0.3, difficulty lose", 0, -1, niche),
        ("4 series: discriminability loses", 0, -1, nll("discriminability", group="series")),
        ("5 at weights 0.3, 1, 5, 15 not below nll", 0, 1, nll(*WEIGHTS)),
        ("6 over random, inverted, reweight, centred", 0, 1, over(CONTROLS)),
        ("8 simulated A/B over nll", 0, 1, {m: s.gain(OURS, metric=m) for m in ("ctr", "dwell")}),
    ]


def print_claims(study: Study) -> None:
    print(f"{'claim about adagrpo (HR@10 points if no unit)':<46}{'bound':>7}  mean [95% interval]")
    for claim, bound, sign, comparisons in claims(study):
        if not all(comparisons.values()):
            print(f"{claim:<46}{bound:>7g}  not run")
            continue
        rows = [(*interval(values), name) for name, values in comparisons.items()]
        mean, half, weakest = min(rows, key=lambda row: sign * (row[0] - bound) - row[1])
        slack = sign * (mean - bound) - half
        verdict = "holds" if slack >= 0 else "fails" if slack + 2 * half < 0 else "undecided"
        print(f"{claim:<46}{bound:>7g}  {brackets(mean, half):<24}{verdict:<10}{weakest}")


def print_reported(studies: list[Study]) -> None:
    first, rows = studies[0], []  # not decided: other worlds, groups and cuts, the oracle
    for study in studies:
        s = study.settings
        world = f"bias {s['bias']:g}, negatives {s['negatives']}, {s['decode']}"
        rows += [(f"{world}: {arm}", study.gain(arm)) for arm in ("mix-0.3", "mix-1", OURS)]
    rows += [(f"adagrpo, {m}", first.gain(OURS, metric=m)) for m in ("hr@5", "hr@20", "ndcg@10")]
    rows += [("mix-1000: NLL all but drowned", first.gain("mix-1000"))]
    rows += [("adagrpo over the oracle at equal dose", first.gain(OURS, ORACLE))]
    print(f"\n{'reported, against nll if no other':<46}{'seeds':>7}  mean [95% interval]")
    for words, values in rows:
        if values:
            print(f"{words:<46}{len(values):>7}  {brackets(*interval(values))}")


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def bar(x: float, y1: float, y2: float, width: float, colour: str) -> str:
    return f'<path d="M{x:.1f} {y1:.1f}V{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def draw(file: Path, parts: list[str]) -> None:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" font-size="13" '
    head += 'font-family="sans-serif"><rect width="720" height="400" fill="white"/>'
    file.write_text("\n".join([head, *parts, "</svg>\n"]))


def bars(study: Study, file: Path) -> None:
    """HR@10 against nll by kind of shopper, with 95% intervals."""
    arms = [arm for arm in ("mix-0.3", "mix-1", *HALVES, OURS) if len(study.gain(arm)) > 1]
    gains = {(k, a): interval(study.gain(a, group=k)) for k in KINDS for a in arms}
    ends = [mean + side * half for mean, half in gains.values() for side in (-1, 1)]
    low, high = min(ends, default=0), max(ends, default=1)
    y = partial(np.interp, xp=(low, high), fp=(340, 40))
    parts = [text(360, 22, "HR@10 points against nll by kind of shopper, 95% intervals")]
    ticks = range(5 * math.ceil(low / 5), math.floor(high) + 1, 5)
    parts += [text(44, y(tick) + 4, f"{tick:+d}", "end") for tick in ticks]
    for (kind, arm), (mean, half) in gains.items():
        x, colour = 80 + 160 * KINDS.index(kind) + 26 * arms.index(arm), COLOURS[arms.index(arm)]
        whisker = bar(x, y(mean - half), y(mean + half), 1, "black")
        parts += [bar(x, y(0), y(mean), 22, colour), whisker]
    parts += [text(135 + 160 * i, 362, kind) for i, kind in enumerate(KINDS)]
    for x, arm, colour in zip(range(60, 720, 132), arms, COLOURS, strict=False):
        parts += [bar(x, 376, 388, 12, colour), text(x + 10, 387, arm, "start")]
    draw(file, parts)


def frontier(study: Study, file: Path) -> None:
    """HR@10 against hallucination; lines join the weights of mixtures and of adagrpo."""
    arms = [a for a in ("nll", *MIXES, *WEIGHTS, *EQUAL_DOSE, ORACLE) if study.level(a)]
    x = np.array([np.mean(list(study.level(arm, "hallucination").values())) for arm in arms])
    y = np.array([np.mean(list(study.level(arm).values())) for arm in arms])
    parts = [text(360, 22, "HR@10, % (up) against hallucination in the top 10, %")]
    parts += [text(60, 378, f"{x.min():.2f}"), text(560, 378, f"{x.max():.2f}")]
    parts += [text(46, 354, f"{y.min():.1f}", "end"), text(46, 64, f"{y.max():.1f}", "end")]
    x, y = np.interp(x, (x.min(), x.max()), (60, 560)), np.interp(y, (y.min(), y.max()), (350, 60))
    at = {arm: f"{left:.0f},{top:.0f}" for arm, left, top in zip(arms, x, y, strict=True)}
    for line, colour in ((("nll", *MIXES), COLOURS[1]), (("nll", *WEIGHTS), COLOURS[4])):
        points = " ".join(at[arm] for arm in line if arm in at)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    for arm, left, top in zip(arms, x, y, strict=True):
        parts += [bar(left, top - 3, top + 3, 6, "black"), text(left + 7, top + 4, arm, "start")]
    draw(file, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent)
    args, studies = parser.parse_args(), {}
    for file in args.files:
        for record in json.loads(file.read_text()):
            studies.setdefault(str(record["settings"]), []).append(record)
    studies = [Study(records) for records in studies.values()]
    print(f"seeds {studies[0].seeds}, {studies[0].settings}")
    print_claims(studies[0])
    print_reported(studies)
    bars(studies[0], args.pictures / "kinds.svg")
    frontier(studies[0], args.pictures / "frontier.svg")


if __name__ == "__main__":
    main()
