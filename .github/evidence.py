# SPDX-License-Identifier: MIT
"""From finished runs to the README's claims and pictures: python .github/evidence.py DIR [DIR ...]

Each DIR holds the results.json of one study (`python adagrpo.py --seeds N --out DIR`); its settings
tell which study it is. A claim holds if the whole 95% interval over seeds (Student, paired by seed)
is on the right side of its bound, fails if the whole interval is on the other side, and is
undecided in between. A claim about several comparisons shows its weakest one. Needs numpy alone.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student, 1 to 9 degrees of freedom
MIXES, WEIGHTS = ("mix-0.1", "mix-0.3", "mix-1", "mix-3"), ("adagrpo-0.3", "adagrpo-1", "adagrpo")
HALVES = ("difficulty", "discriminability")
EQUAL_DOSE = ("difficulty-1.8", "discriminability-2.7")  # weight = adagrpo's dose / own admission
OWN_BEST = ("difficulty-1", "discriminability-5")  # picked on validation of development seeds
CONTROLS = ("random", "inverted", "reweight", "centred-3")
KINDS = ("trend", "series", "niche", "all")
COLOURS = ("#8da0cb", "#66a61e", "#e6ab02", "#a6761d", "#d95f02")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95% interval."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    factor = T95[min(len(values) - 2, 8)] / len(values) ** 0.5
    return float(np.mean(values)), float(factor * np.std(values, ddof=1))


class Study:
    """The runs of one folder: figures by arm, lists over the seeds that have both arms."""

    def __init__(self, folder: Path):
        results = json.loads((folder / "results.json").read_text())
        self.runs = {(r["seed"], r["arm"], r["checkpoint"]): r for r in results["runs"]}
        self.settings = results["runs"][0]["settings"]
        self.codes = {r["code"] for r in results["runs"]}
        self.versions = results["versions"]

    def has(self, *arms: str) -> bool:
        return all(any(arm == name for _, name, _ in self.runs) for arm in arms)

    def seeds(self, *arms: str) -> list[int]:
        seeds = sorted({seed for seed, _, _ in self.runs})
        return [s for s in seeds if all((s, arm, "final") in self.runs for arm in arms)]

    def figure(self, seed: int, arm: str, metric="hr@10", group="all", which="final") -> float:
        return self.runs[seed, arm, which]["groups"][group][metric]

    def gain(self, arm: str, base: str = "nll", relative=False, **where) -> list[float]:
        """Per seed: the arm's figure less the base's; in percent of the base's if relative."""
        pairs = [
            (self.figure(s, arm, **where), self.figure(s, base, **where))
            for s in self.seeds(arm, base)
        ]
        return [100 * (a / b - 1) if relative else a - b for a, b in pairs]

    def over_picked(self, arm: str, others: tuple[str, ...]) -> list[float]:
        """Per seed: the arm's HR@10 less that of the one of `others` best on validation."""

        def validation(seed: int, other: str) -> float:
            return self.runs[seed, other, "final"]["validation"]["hr@10"]

        seeds = self.seeds(arm, *others)
        picks = [max(others, key=lambda other: validation(seed, other)) for seed in seeds]
        return [self.figure(s, arm) - self.figure(s, p) for s, p in zip(seeds, picks)]


def claims(study: Study) -> list[tuple[str, float, int, dict[str, list[float]]]]:
    """(text, bound, +1 for at least or -1 for at most, name of comparison -> figure per seed)."""
    ours, both = "adagrpo", (*WEIGHTS[:2], ours, "adagrpo-15")

    def over(arms, **where):
        return {f"over {a}": study.gain(ours, a, **where) for a in arms if study.has(ours, a)}

    def against_nll(arms, **where):
        return {a: study.gain(a, **where) for a in arms if study.has(a, "nll")}

    def metrics(names, which=("final",)):
        return (
            {f"{n}, {w}": study.gain(ours, metric=n, which=w) for n in names for w in which}
            if study.has(ours, "nll")
            else {}
        )

    def percent(which):
        return (
            {which: study.gain(ours, relative=True, which=which)} if study.has(ours, "nll") else {}
        )

    kinds = {k: study.gain(ours, group=k) for k in KINDS[1:3]} if study.has(ours, "nll") else {}
    picked = {"picked": study.over_picked(ours, MIXES)} if study.has(ours, *MIXES) else {}
    return [
        ("1 adagrpo over nll, final checkpoint, %", 5, 1, percent("final")),
        ("1 adagrpo over nll, best checkpoint, %", 5, 1, percent("best")),
        ("1 hallucination against nll", 0, -1, metrics(["hallucination"], ("final", "best"))),
        ("2 adagrpo over every fixed mixture", 0, 1, over(MIXES)),
        ("2 adagrpo over the mixture picked on validation", 0, 1, picked),
        ("3 adagrpo over each half, equal weight", 0, 1, over(HALVES)),
        ("3 adagrpo over each half, equal dose", 0, 1, over(EQUAL_DOSE)),
        ("3 adagrpo over each half, its own best weight", 0, 1, over(OWN_BEST)),
        ("4 trend: adagrpo gains", 0, 1, against_nll([ours], group="trend")),
        ("4 series, niche: adagrpo loses at most 0.5", -0.5, 1, kinds),
        (
            "4 niche: mixtures >= 0.3 and difficulty lose",
            0,
            -1,
            against_nll((*MIXES[1:], "difficulty"), group="niche"),
        ),
        (
            "4 series: discriminability loses",
            0,
            -1,
            against_nll(["discriminability"], group="series"),
        ),
        ("5 adagrpo at 0.3, 1, 5, 15 not below nll", 0, 1, against_nll(both)),
        ("6 adagrpo over the controls", 0, 1, over(CONTROLS)),
        ("8 simulated A/B: clicks, dwell", 0, 1, metrics(["ctr", "dwell"])),
    ]


def print_claims(study: Study) -> None:
    print(f"{'claim (HR@10 points against nll if no unit)':<50}{'bound':>8}  mean, 95% interval")
    for text, bound, sign, comparisons in claims(study):
        if not comparisons:
            print(f"{text:<50}{'':>8}  not run")
            continue
        slack = {
            n: sign * (interval(v)[0] - bound) - interval(v)[1] for n, v in comparisons.items()
        }
        weakest = min(slack, key=slack.get)
        mean, half = interval(comparisons[weakest])
        distance = sign * (mean - bound)
        verdict = "holds" if distance >= half else "fails" if distance < -half else "undecided"
        figures = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        print(
            f"{text:<50}{'>=' if sign > 0 else '<=':>4}{bound:>4g}  {figures:<24}{verdict:<10} {weakest}"
        )


def print_reported(studies: list[Study]) -> None:
    """What is reported and not decided: other worlds and groups, the oracle, other cuts."""
    print(f"\n{'reported, not decided':<44}{'seeds':>6}{'mean':>8}  95% interval")
    for study in studies:
        s = study.settings
        label = f"bias {s['bias']:g}, negatives {s['negatives']}, {s['decode']}"
        rows = [
            (f"{label}: {arm} - nll", study.gain(arm))
            for arm in ("mix-0.3", "mix-1", "adagrpo")
            if study.has(arm, "nll")
        ]
        if study.has("oracle-1.6"):
            rows += [("adagrpo - oracle at equal dose", study.gain("adagrpo", "oracle-1.6"))]
            rows += [
                (f"adagrpo - nll, {m}", study.gain("adagrpo", metric=m))
                for m in ("hr@5", "hr@20", "ndcg@10")
            ]
            rows += [("GRPO without NLL (mix-1000) - nll", study.gain("mix-1000"))]
        for text, values in rows:
            mean, half = interval(values)
            print(
                f"{text:<44}{len(values):>6}{mean:>+8.2f}  [{mean - half:+.2f}, {mean + half:+.2f}]"
            )


def svg(file: Path, width: int, height: int, parts: list[str]) -> None:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += 'font-family="sans-serif" font-size="13">'
    file.write_text(
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
    )
    print(f"wrote {file}")


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def bars(study: Study, file: Path) -> None:
    """HR@10 against nll by kind of shopper, whiskers: 95% interval."""
    arms = [a for a in ("mix-0.3", "mix-1", *HALVES, "adagrpo") if study.has(a, "nll")]
    gains = {(k, a): interval(study.gain(a, group=k)) for k in KINDS for a in arms}
    low = min(0, *(mean - half for mean, half in gains.values()))
    high = max(1, *(mean + half for mean, half in gains.values()))
    scale = 300 / (high - low)

    def y(value: float) -> float:
        return 40 + (high - value) * scale

    parts = [text(360, 22, "HR@10 points against nll, by kind of shopper")]
    for tick in range(5 * math.ceil(low / 5), math.floor(high) + 1, 5):
        parts.append(
            f'<path d="M50 {y(tick):.0f}H700" stroke="#ccc"/>'
            + text(44, y(tick) + 4, f"{tick:+d}", "end")
        )
    for i, kind in enumerate(KINDS):
        for j, arm in enumerate(arms):
            mean, half = gains[kind, arm]
            x = 70 + 160 * i + 26 * j
            parts.append(
                f'<rect x="{x}" y="{y(max(mean, 0)):.1f}" width="22" '
                f'height="{abs(mean) * scale:.1f}" fill="{COLOURS[j]}"/>'
            )
            parts.append(
                f'<path d="M{x + 11} {y(mean - half):.1f}V{y(mean + half):.1f}" stroke="black"/>'
            )
        parts.append(text(135 + 160 * i, 362, kind))
    for j, arm in enumerate(arms):
        parts.append(
            f'<rect x="{60 + 132 * j}" y="376" width="12" height="12" fill="{COLOURS[j]}"/>'
        )
        parts.append(text(76 + 132 * j, 387, arm, "start"))
    svg(file, 720, 400, parts)


def frontier(study: Study, file: Path) -> None:
    """HR@10 against hallucination; lines join the weights of the mixtures and of adagrpo."""
    lines = {"mixtures": ("nll", *MIXES), "adagrpo": ("nll", *WEIGHTS, "adagrpo-15")}
    others = [a for a in (*HALVES, *CONTROLS, "inverted") if study.has(a)]
    lines = {n: [a for a in arms if study.has(a)] for n, arms in lines.items()}
    at = {}
    for arm in {*others, *sum(lines.values(), [])}:
        seeds = study.seeds(arm)
        at[arm] = [
            np.mean([study.figure(s, arm, metric=m) for s in seeds])
            for m in ("hallucination", "hr@10")
        ]
    points = np.array(list(at.values()))
    (x0, y0), (x1, y1) = points.min(0), points.max(0)

    def place(arm: str) -> tuple[float, float]:
        x, y = at[arm]
        return 60 + 540 * (x - x0) / (x1 - x0 or 1), 350 - 300 * (y - y0) / (y1 - y0 or 1)

    parts = [text(360, 22, "HR@10 (up) against hallucination of the top 10 (left is better), %")]
    parts.append('<path d="M50 40V360H700" fill="none" stroke="#888"/>')
    for value, (x, y, anchor) in {x0: (60, 378, "middle"), x1: (600, 378, "middle")}.items():
        parts.append(text(x, y, f"{value:.2f}", anchor))
    for value, y in ((y0, 350), (y1, 54)):
        parts.append(text(46, y, f"{value:.1f}", "end"))
    for (name, arms), colour in zip(lines.items(), ("#66a61e", "#d95f02"), strict=True):
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in map(place, arms))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}"><title>{name}</title></polyline>'
        )
    for arm in at:
        x, y = place(arm)
        colour = (
            "#d95f02"
            if arm.startswith("adagrpo")
            else "#66a61e"
            if arm[:3] in ("mix", "nll")
            else "#888"
        )
        parts.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{colour}"/>'
            + text(x + 7, y + 4, arm, "start")
        )
    svg(file, 720, 400, parts)


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
    codes = set().union(*(study.codes for study in studies))
    print(
        f"seeds {study_seeds(studies[0])}, torch {studies[0].versions['torch']}, code {', '.join(sorted(codes))}"
    )
    if len(codes) > 1:
        print("MIXED CODE: these figures were not all made by one program")
    print_claims(studies[0])
    print_reported(studies)
    bars(studies[0], args.pictures / "kinds.svg")
    frontier(studies[0], args.pictures / "frontier.svg")


if __name__ == "__main__":
    main()
