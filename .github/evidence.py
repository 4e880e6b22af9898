# SPDX-License-Identifier: MIT
"""From finished runs to the README's claims and pictures: python .github/evidence.py DIR [DIR ...]

Each DIR holds the results.json of one study (python adagrpo.py --seeds N --out DIR); its settings
tell which. A claim holds if the whole 95% interval over seeds (Student, paired by seed) is on the
right side of its bound, fails if all of it is on the wrong side, and is undecided in between. A
claim about several comparisons shows its weakest one. Needs numpy alone.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student, 1 to 9 degrees of freedom
OURS, MIXES, HALVES = (
    "adagrpo",
    ("mix-0.1", "mix-0.3", "mix-1", "mix-3"),
    ("difficulty", "discriminability"),
)
WEIGHTS = ("adagrpo-0.3", "adagrpo-1", "adagrpo", "adagrpo-15")
EQUAL_DOSE = ("difficulty-1.8", "discriminability-2.7")  # weight = adagrpo's dose / own admission
OWN_BEST = ("difficulty-1", "discriminability-2.7")  # by validation of development seeds 0 and 1
CONTROLS, ORACLE = ("random", "inverted", "reweight", "centred-3"), "oracle-1.8"
KINDS = ("trend", "series", "niche", "all")
COLOURS = ("#8da0cb", "#66a61e", "#e6ab02", "#a6761d", "#d95f02")


class Study:
    """The runs of one folder."""

    def __init__(self, folder: Path):
        results = json.loads((folder / "results.json").read_text())
        self.runs = {(r["seed"], r["arm"], r["checkpoint"]): r for r in results["runs"]}
        self.settings, self.versions = results["runs"][0]["settings"], results["versions"]
        self.codes = {run["code"] for run in results["runs"]}
        self.seeds = sorted({seed for seed, _, _ in self.runs})

    def level(self, arm, metric="hr@10", group="all", which="final", relative=False) -> dict:
        """Seed -> the arm's figure; of all seeds that have it."""
        runs = {s: self.runs[s, arm, which] for s in self.seeds if (s, arm, which) in self.runs}
        if group != "all":
            return {seed: run["groups"][group][metric] for seed, run in runs.items()}
        return {seed: run["metrics"][metric] for seed, run in runs.items()}

    def gain(self, arm, base="nll", relative=False, **where) -> list[float]:
        """Per seed that has both: the arm's figure less the base's, or in percent of the base's."""
        ours, theirs = self.level(arm, **where), self.level(base, **where)
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        return [100 * (a / b - 1) if relative else a - b for a, b in pairs]

    def over_picked(self, arm, others) -> list[float]:
        """Per seed: the arm's HR@10 less that of the one of `others` that is best on validation."""
        ours, levels = self.level(arm), {other: self.level(other) for other in others}
        gains = []
        for seed in [s for s in ours if all(s in level for level in levels.values())]:
            picks = {o: self.runs[seed, o, "final"]["validation"]["hr@10"] for o in others}
            gains.append(ours[seed] - levels[max(picks, key=picks.get)][seed])
        return gains


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95% interval."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    factor = T95[min(len(values) - 2, 8)] / len(values) ** 0.5
    return float(np.mean(values)), float(factor * np.std(values, ddof=1))


def claims(s: Study) -> list[tuple[str, float, int, dict[str, list[float]]]]:
    """(claim, bound, +1 for at least or -1 for at most, comparison -> figure per seed)."""

    def over(arms):
        return {f"over {arm}": s.gain(OURS, arm) for arm in arms}

    def nll(arms, **where):
        return {arm: s.gain(arm, **where) for arm in arms}

    final, best = ({w: s.gain(OURS, relative=True, which=w)} for w in ("final", "best"))
    invalid = {w: s.gain(OURS, metric="hallucination", which=w) for w in ("final", "best")}
    return [
        ("1 over nll, final checkpoint, %", 5, 1, final),
        ("1 over nll, best checkpoint, %", 5, 1, best),
        ("1 hallucination not above nll's", 0, -1, invalid),
        ("2 over every fixed mixture", 0, 1, over(MIXES)),
        ("2 over the mixture picked on validation", 0, 1, {"": s.over_picked(OURS, MIXES)}),
        ("3 over each half at equal weight", 0, 1, over(HALVES)),
        ("3 over each half at equal dose", 0, 1, over(EQUAL_DOSE)),
        ("3 over each half at its own best weight", 0, 1, over(OWN_BEST)),
        ("4 trend gains", 0, 1, nll([OURS], group="trend")),
        (
            "4 series, niche lose at most 0.5",
            -0.5,
            1,
            {k: s.gain(OURS, group=k) for k in KINDS[1:3]},
        ),
        ("4 niche: these lose", 0, -1, nll((*MIXES[1:], "difficulty"), group="niche")),
        ("4 series: discriminability loses", 0, -1, nll(["discriminability"], group="series")),
        ("5 at weights 0.3, 1, 5, 15 not below nll", 0, 1, nll(WEIGHTS)),
        ("6 over random, inverted, reweight, centred", 0, 1, over(CONTROLS)),
        ("8 simulated A/B over nll", 0, 1, {m: s.gain(OURS, metric=m) for m in ("ctr", "dwell")}),
    ]


def print_claims(study: Study) -> None:
    print(f"{'claim about adagrpo (HR@10 points if no unit)':<46}{'bound':>7}  mean [95% interval]")
    for claim, bound, sign, comparisons in claims(study):
        if not all(comparisons.values()):
            print(f"{claim:<46}{bound:>7g}  not run")
            continue
        slack = {
            c: sign * (interval(v)[0] - bound) - interval(v)[1] for c, v in comparisons.items()
        }
        weakest = min(slack, key=slack.get)
        mean, half = interval(comparisons[weakest])
        verdict = "holds" if slack[weakest] >= 0 else "undecided"
        if sign * (mean - bound) + half < 0:
            verdict = "fails"
        figures = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        print(f"{claim:<46}{bound:>7g}  {figures:<24}{verdict:<10}{weakest}")


def print_reported(studies: list[Study]) -> None:
    rows = []
    for study in studies:
        s = study.settings
        world = f"bias {s['bias']:g}, negatives {s['negatives']}, {s['decode']}"
        rows += [(f"{world}: {arm}", study.gain(arm)) for arm in ("mix-0.3", "mix-1", OURS)]
    first = studies[0]
    rows += [(f"adagrpo, {m}", first.gain(OURS, metric=m)) for m in ("hr@5", "hr@20", "ndcg@10")]
    rows += [("mix-1000: GRPO without NLL", first.gain("mix-1000"))]
    rows += [("adagrpo over the oracle at equal dose", first.gain(OURS, ORACLE))]
    print(
        f"\n{'reported, not decided (against nll if no other)':<46}{'seeds':>7}  mean [95% interval]"
    )
    for text, values in rows:
        if values:
            mean, half = interval(values)
            print(
                f"{text:<46}{len(values):>7}  {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
            )


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def draw(file: Path, parts: list[str]) -> None:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" font-size="13" '
    head += 'font-family="sans-serif"><rect width="720" height="400" fill="white"/>'
    file.write_text("\n".join([head, *parts, "</svg>\n"]))
    print(f"wrote {file}")


def bars(study: Study, file: Path) -> None:
    """HR@10 against nll by kind of shopper, with 95% intervals."""
    arms = [arm for arm in ("mix-0.3", "mix-1", *HALVES, OURS) if study.gain(arm)]
    gains = {(k, a): interval(study.gain(a, group=k)) for k in KINDS for a in arms}
    if not arms or math.inf in [half for _, half in gains.values()]:
        return
    low = min(mean - half for mean, half in gains.values())
    high = max(mean + half for mean, half in gains.values())
    place = lambda value: 40 + 300 * (high - value) / (high - low)  # noqa: E731
    parts = [text(360, 22, "HR@10 points against nll by kind of shopper, 95% intervals")]
    for tick in range(5 * math.ceil(low / 5), math.floor(high) + 1, 5):
        line = f'<path d="M50 {place(tick):.0f}H700" stroke="#ccc"/>'
        parts += [line, text(44, place(tick) + 4, f"{tick:+d}", "end")]
    for i, kind in enumerate(KINDS):
        parts.append(text(135 + 160 * i, 362, kind))
        for j, arm in enumerate(arms):
            (mean, half), x = gains[kind, arm], 70 + 160 * i + 26 * j
            top, tall = place(max(mean, 0)), abs(place(mean) - place(0))
            box = (
                f'<rect x="{x}" y="{top:.1f}" width="22" height="{tall:.1f}" fill="{COLOURS[j]}"/>'
            )
            ends = f"M{x + 11} {place(mean - half):.1f}V{place(mean + half):.1f}"
            parts += [box, f'<path d="{ends}" stroke="black"/>']
    for j, arm in enumerate(arms):
        x = 60 + 132 * j
        parts.append(f'<rect x="{x}" y="376" width="12" height="12" fill="{COLOURS[j]}"/>')
        parts.append(text(x + 16, 387, arm, "start"))
    draw(file, parts)


def frontier(study: Study, file: Path) -> None:
    """HR@10 against hallucination; lines join the weights of mixtures and of adagrpo."""
    arms = ("nll", *MIXES, *WEIGHTS, *HALVES, *EQUAL_DOSE, "random")
    levels = {arm: (study.level(arm, "hallucination"), study.level(arm)) for arm in arms}
    at = {a: [np.mean(list(x.values())) for x in xy] for a, xy in levels.items() if xy[0]}
    (x0, y0), (x1, y1) = np.min(list(at.values()), axis=0), np.max(list(at.values()), axis=0)
    place = {
        a: (60 + 500 * (x - x0) / ((x1 - x0) or 1), 350 - 290 * (y - y0) / ((y1 - y0) or 1))
        for a, (x, y) in at.items()
    }
    parts = [text(360, 22, "HR@10, % (up) against hallucination in the top 10, % (left is better)")]
    parts += ['<path d="M50 40V360H700" fill="none" stroke="#888"/>']
    parts += [text(60, 378, f"{x0:.2f}"), text(560, 378, f"{x1:.2f}")]
    parts += [text(46, 354, f"{y0:.1f}", "end"), text(46, 64, f"{y1:.1f}", "end")]
    for line, colour in ((("nll", *MIXES), COLOURS[1]), (("nll", *WEIGHTS), COLOURS[4])):
        points = " ".join(f"{place[a][0]:.0f},{place[a][1]:.0f}" for a in line if a in place)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    for arm, (x, y) in place.items():
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4"/>', text(x + 7, y + 4, arm, "start")]
    draw(file, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--pictures", type=Path, default=Path(__file__).parent, help="where to draw"
    )
    args = parser.parse_args()
    try:
        studies = [Study(folder) for folder in args.folders]
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"evidence.py: {error}")
    codes = sorted(set().union(*(study.codes for study in studies)))
    print(f"seeds {studies[0].seeds}, {studies[0].versions}, code {', '.join(codes)}")
    if len(codes) > 1:
        print("MIXED CODE: these figures were not all made by one program")
    print_claims(studies[0])
    print_reported(studies)
    bars(studies[0], args.pictures / "kinds.svg")
    frontier(studies[0], args.pictures / "frontier.svg")


if __name__ == "__main__":
    main()
