# SPDX-License-Identifier: MIT
"""Claims, tables and pictures from finished runs of study.py.

    python .github/evidence.py FILE [FILE ...]

A FILE is a list of records {"seed", "arm", "settings", "figures"}, and figures are
{group of users: {metric: value}}. Records with equal settings make a study. The study
nearest to the defaults is the main one, the others are variations of it.

Every interval is Student's 95% interval over seeds. Differences are paired: both arms
ran on the same seed, and the difference is taken before the mean.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pictures

# The commands that made the files, printed at the top of RESULTS.md.
COMMANDS = (
    """study="python .github/study.py --out runs/study.json"
$study --seeds $(seq 40 49) --arms before nll adagrpo mix-1 mix-0.3 difficulty \\
  discriminability nll@1 nll@2 nll@4 nll@6 nll@12 mix-0.1 mix-3 adagrpo-1 adagrpo-15 \\
  difficulty-2.1 discriminability-2.6 random spread-2.6 level-3.2 oracle-2.1 centred-10
$study --seeds $(seq 40 49) --decode sample --arms adagrpo-2 adagrpo mix-0.3 mix-1
for variation in "--bias 0" "--bias 0.5" "--negatives 0"; do
  $study --seeds $(seq 40 43) $variation --arms nll mix-0.3 mix-1 adagrpo; done
$study --seeds $(seq 40 43) --min-difficulty 0.15 --arms adagrpo
$study --seeds $(seq 40 43) --min-difficulty 0.6 --arms adagrpo
$study --seeds $(seq 40 43) --arms gradients""",
)

# Settings of the main study.
DEFAULTS = {"bias": 1.0, "negatives": 2, "epochs": 3, "users": 1200, "batch": 8}
DEFAULTS |= {"group": 32, "decode": "beam", "weight": 5.0, "lr": 0.001}
DEFAULTS |= {"min_difficulty": 0.3, "min_discriminability": 0.01}

# Settings that plain NLL never looks at: a variation of these borrows the main nll.
UNSEEN_BY_NLL = {"group", "decode", "weight", "min_difficulty", "min_discriminability"}

# Arms by the part that they play in a claim. A number after a dash is a weight, a
# number after an @ is a number of passes.
OURS = "adagrpo"
OURS_SAMPLED = "adagrpo-2"  # in the study with sampled groups, weight by validation
MIXES = ("mix-0.1", "mix-0.3", "mix-1", "mix-3")
WEIGHTS = ("adagrpo-1", "adagrpo", "adagrpo-15")
EQUAL_COMPUTE = "nll@12"
PASSES = ("nll", "nll@1", "nll@2", "nll@4", "nll@6", EQUAL_COMPUTE)
EQUAL_WEIGHT = ("difficulty", "discriminability")
EQUAL_DOSE = ("difficulty-2.1", "discriminability-2.6")
RANDOM = "random"
SPREAD = "spread-2.6"
LEVEL = "level-3.2"
ORACLE = "oracle-2.1"
CENTRED = "centred-10"
UNGATED = "mix-1"  # what the stratified analysis calls ungated GRPO

# Tables show the rules in this order; within a rule, arms go by weight or passes.
RULES = ("before", "nll", "mix", "adagrpo", "difficulty", "discriminability")
RULES += ("random", "spread", "level", "oracle", "centred")
SHORT = ("mix-0.3", UNGATED, OURS)  # the arms of the smaller tables

# The arms of kinds.svg with their colours, ours last.
COLOURS = {"mix-0.3": "#9ecae1", UNGATED: "#3182bd"}
COLOURS |= dict(zip(EQUAL_DOSE, ("#bdbdbd", "#737373"), strict=True))
COLOURS |= {OURS: "#d95f02"}

KINDS = ("trend", "series", "niche")
CELLS = ("hard+clear", "hard+unclear", "easy+clear", "easy+unclear")
METRICS = ("hr@10", "hr@5", "hr@20", "ndcg@10", "hallucination", "ctr", "dwell")
PREMISE = ("share", "hr@10", "reranked", "auc", "auc in group", "hard", "clear")
PREMISE += ("admitted",)

# Quantiles of Student's t for 95%, 1 to 9 degrees of freedom; 9's value serves beyond.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

# How adagrpo stands to a mixture, by the signs of two differences: HR@10 (where more
# is better) and hallucination (where less is better).
FRONTIER = {
    ("positive", "negative"): "dominates",
    ("negative", "positive"): "is dominated",
    ("positive", "positive"): "trades validity for HR",
    ("negative", "negative"): "trades HR for validity",
    ("positive", "undecided"): "more HR, validity undecided",
    ("negative", "undecided"): "less HR, validity undecided",
    ("undecided", "negative"): "more valid, HR undecided",
    ("undecided", "positive"): "less valid, HR undecided",
}


# ---------------------------------------------------------------- studies and seeds


def rule(arm: str) -> str:
    """adagrpo-15 and adagrpo have the rule adagrpo, nll@6 and nll the rule nll."""
    return re.split("[-@]", arm)[0]


def number(arm: str, default: float) -> float:
    """adagrpo-15 carries 15, nll@6 carries 6, adagrpo the default."""
    found = re.fullmatch(r".+[-@]([0-9.]+)", arm)
    if found:
        return float(found[1])
    return default


class Study:
    """The runs of one set of settings, one per seed and arm."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.runs: dict[tuple[int, str], dict] = {}
        self.cosines: dict[int, dict[str, float]] = {}  # of gradients, by seed

    def seeds(self) -> list[int]:
        return sorted({seed for seed, _ in self.runs})

    def weight(self) -> float:
        """The weight of an arm that names none."""
        return self.settings.get("weight", DEFAULTS["weight"])

    def only(self, seeds: list[int]) -> "Study":
        """The same study, cut down to some seeds."""
        part = Study(self.settings)
        for (seed, arm), figures in self.runs.items():
            if seed in seeds:
                part.runs[seed, arm] = figures
        return part

    def arms(self) -> list[str]:
        """Every arm once, in the order of RULES; bare nll before its other passes."""
        places = {name: place for place, name in enumerate(RULES)}

        def order(arm):
            default = self.weight()
            if arm == "nll":
                default = 0.0
            return places.get(rule(arm), len(RULES)), number(arm, default), arm

        return sorted({arm for _, arm in self.runs}, key=order)

    def level(self, arm: str, metric="hr@10", group="all") -> dict[int, float]:
        """The arm's figure for every seed that has one (an empty cell has none)."""
        levels = {}
        for seed in self.seeds():
            value = self.runs.get((seed, arm), {}).get(group, {}).get(metric)
            if value is not None and math.isfinite(value):
                levels[seed] = value
        return levels

    def levels(self, arm: str, metric="hr@10", group="all") -> list[float]:
        return list(self.level(arm, metric, group).values())

    def gain(self, arm: str, base="nll", metric="hr@10", group="all") -> list[float]:
        """Per seed that has both arms: the arm's figure less the base's."""
        return paired(self.level(arm, metric, group), self.level(base, metric, group))

    def picked(self, arms: tuple[str, ...]) -> dict[int, str]:
        """Per seed that has all the arms: the best one by HR@10 on validation users."""
        validation = {arm: self.level(arm, group="validation") for arm in arms}
        picks = {}
        for seed in self.seeds():
            if all(seed in validation[arm] for arm in arms):
                picks[seed] = max(arms, key=lambda arm: validation[arm][seed])
        return picks


def paired(ours: dict[int, float], theirs: dict[int, float], percent=False):
    """One difference per seed that stands on both sides, in percent if asked."""
    gains = []
    for seed, value in ours.items():
        if seed not in theirs:
            continue
        if percent:
            gains.append(100 * (value / theirs[seed] - 1))
        else:
            gains.append(value - theirs[seed])
    return gains


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its interval; infinite for a single seed."""
    if len(values) == 1:
        return values[0], math.inf
    degrees = min(len(values) - 1, len(T95))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), T95[degrees - 1] * error


def read(files: list[Path]) -> tuple[Study, list[Study]]:
    """The main study and its variations; variations borrow what nll cannot see."""
    studies: dict[tuple, Study] = {}
    for file in files:
        try:
            records = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            sys.exit(f"FILE: cannot read {file}: {error}")
        for record in records:
            key = tuple(sorted(record["settings"].items()))
            study = studies.setdefault(key, Study(record["settings"]))
            if record["arm"] == "gradients":
                study.cosines[record["seed"]] = record["figures"]["cosine"]
                continue
            run = record["seed"], record["arm"]
            kept = study.runs.setdefault(run, record["figures"])
            if json.dumps(kept) != json.dumps(record["figures"]):
                sys.exit(f"{file}: seed {run[0]}, arm {run[1]} has two different runs")
    if not studies:
        sys.exit("FILE: no runs in it")

    def distance(study):
        settings = study.settings
        return sum(settings.get(k, v) != v for k, v in DEFAULTS.items())

    main = min(studies.values(), key=distance)
    variations = [study for study in studies.values() if study is not main]
    for study in variations:
        if set(changes(study, main)) <= UNSEEN_BY_NLL:
            for (seed, arm), figures in main.runs.items():
                if arm == "nll" and seed in study.seeds():
                    study.runs.setdefault((seed, arm), figures)
    return main, variations


def changes(study: Study, main: Study) -> dict:
    """The settings in which a variation differs from the main study."""
    settings = study.settings
    keys = sorted(settings.keys() | main.settings.keys())
    return {k: settings.get(k) for k in keys if settings.get(k) != main.settings.get(k)}


# ---------------------------------------------------------------------------- claims


class Row(NamedTuple):
    """A claim and what became of it, in words."""

    claim: str
    bound: str = ""
    mean: str = ""
    seeds: str = ""
    verdict: str = ""
    weakest: str = ""


def brackets(mean: float, half: float) -> str:
    if math.isinf(half):
        return f"{mean:+.2f} (one seed)"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def verdict(test: str, bound: float, mean: float, half: float) -> str:
    """Decided if the whole interval lies on one side of the bound."""
    low = mean - half
    high = mean + half
    if math.isinf(half):
        return "one seed"
    if test == "tie":  # the interval includes 0 and reaches no farther than the bound
        answers = {"ahead": low > 0, "behind": high < 0}
        answers["tie"] = low <= 0 <= high and max(-low, high) <= bound
    elif test == "sign":
        answers = {"positive": low > 0, "negative": high < 0}
    elif test == ">":
        answers = {"holds": low > bound, "fails": high <= bound}
    elif test == ">=":
        answers = {"holds": low >= bound, "fails": high < bound}
    elif test == "<":
        answers = {"holds": high < bound, "fails": low >= bound}
    else:
        answers = {"holds": high <= bound, "fails": low > bound}
    return next((word for word, true in answers.items() if true), "undecided")


def decide(claim: str, test: str, bound: float, comparisons: dict[str, list]) -> Row:
    """The row of the weakest of the comparisons: {name: one figure per seed}.

    The weakest is one that fails, if there is one, else the one nearest to failing.
    """
    words = f"{test} {bound:g}"
    if test == "sign":
        words = "sign"
    if test == "tie":
        words = f"+-{bound:g}"
    missing = [name for name, values in comparisons.items() if not values]
    if missing or not comparisons:
        return Row(claim, words, verdict="not run", weakest=", ".join(missing))

    def strength(name):
        mean, half = interval(comparisons[name])
        slack = mean - half - bound
        if test.startswith("<"):
            slack = bound - (mean + half)
        return verdict(test, bound, mean, half) != "fails", slack

    weakest = min(comparisons, key=strength)
    mean, half = interval(comparisons[weakest])
    seeds = str(len(comparisons[weakest]))
    answer = verdict(test, bound, mean, half)
    return Row(claim, words, brackets(mean, half), seeds, answer, weakest)


def over_picked(study: Study, arms: tuple[str, ...], percent=False) -> dict[str, list]:
    """adagrpo over the arm that validation picks, with the picks as its name."""
    picks = study.picked(arms)
    if not picks:
        return {"": []}
    theirs = {seed: study.level(arm)[seed] for seed, arm in picks.items()}
    counts = Counter(picks.values()).most_common()
    name = ", ".join(f"{arm} x{count}" for arm, count in counts)
    return {name: paired(study.level(OURS), theirs, percent)}


def frontier_rows(study: Study) -> list[Row]:
    """Two rows for every mixture: the second says what both together mean."""
    rows = []
    words = []
    for mix in MIXES:
        hits = study.gain(OURS, mix)
        invalid = study.gain(OURS, mix, "hallucination")
        first = decide(f"frontier, {mix}: HR@10", "sign", 0, {mix: hits})
        second = decide(f"frontier, {mix}: hallucination", "sign", 0, {mix: invalid})
        if hits and invalid:
            signs = first.verdict, second.verdict
            second = second._replace(verdict=FRONTIER.get(signs, second.verdict))
        words.append(second.verdict)
        rows += [first._replace(weakest=""), second._replace(weakest="")]

    answer = f"{words.count('dominates')} of {len(MIXES)}: "
    if "not run" in words:
        answer = "not run"
    elif set(words) == {"dominates"}:
        answer += "reproduced"
    elif any(word.startswith(("is", "less", "trades")) for word in words):
        answer += "not reproduced"
    else:
        answer += "undecided"
    rows.append(Row("frontier: dominates every mixture", verdict=answer))
    return rows


def claims(main: Study, sampled: Study) -> list[Row]:
    """Every claim about adagrpo; points of HR@10 where the row names nothing else."""

    def over(*arms, metric="hr@10"):
        return {arm: main.gain(OURS, arm, metric) for arm in arms}

    percent = {"nll": paired(main.level(OURS), main.level("nll"), percent=True)}
    invalid = "hallucination"
    others = [arm for arm in main.arms() if rule(arm) not in (rule(OURS), "oracle")]
    quiet = {kind: main.gain(OURS, group=kind) for kind in ("series", "niche")}
    passes = {arm: main.gain(arm) for arm in PASSES if arm != "nll"}
    nll_invalid = {kind: main.levels("nll", invalid, kind) for kind in KINDS}
    sampled_mixes = [arm for arm in sampled.arms() if rule(arm) == "mix"]
    over_sampled = {arm: sampled.gain(OURS_SAMPLED, arm) for arm in sampled_mixes}
    best_nll = over_picked(main, PASSES)
    best_nll_percent = over_picked(main, PASSES, percent=True)
    best_mix = over_picked(main, MIXES)

    rows = [
        decide("over nll, %", ">=", 8, percent),
        decide("over nll", ">", 0, over("nll")),
        decide("over nll, passes by validation, %", ">=", 6, best_nll_percent),
        decide("over nll, passes by validation", ">", 0, best_nll),
        decide("over nll at equal compute", ">", 0, over(EQUAL_COMPUTE)),
        decide("nll finished: other passes add", "<=", 0.5, passes),
        decide("over every mixture", ">", 0, over(*MIXES)),
        decide("over the mixture validation picks", ">", 0, best_mix),
        decide("over each half at equal weight", ">", 0, over(*EQUAL_WEIGHT)),
        decide("over each half at equal dose", ">", 0, over(*EQUAL_DOSE)),
        decide("over a random gate", ">", 0, over(RANDOM)),
        decide("over spread at equal dose", ">", 0, over(SPREAD)),
        decide("over centred (Dr. GRPO)", ">", 0, over(CENTRED)),
        decide("over level r(y) at equal dose", "tie", 0.5, over(LEVEL)),
        decide("each weight over nll", ">", 0, {a: main.gain(a) for a in WEIGHTS}),
        decide("trend gains", ">", 0, {"": main.gain(OURS, group="trend")}),
        decide("series, niche lose at most 0.5", ">=", -0.5, quiet),
        decide("hallucination below nll's", "<", 0, over("nll", metric=invalid)),
        decide("hallucination, %", "<", 0.22, {OURS: main.levels(OURS, invalid)}),
        decide("hallucination of nll, each kind", ">", 0, nll_invalid),
    ]
    rows += frontier_rows(main)
    for cell in CELLS:
        gain = main.gain(UNGATED, group=cell)
        rows.append(decide(f"{UNGATED} over nll, {cell}", "sign", 0, {"": gain}))
    for metric in ("ctr", "dwell"):
        name = f"simulated {metric}"
        rows.append(decide(f"{name}, over nll", ">", 0, over("nll", metric=metric)))
        every = over(*others, metric=metric)
        rows.append(decide(f"{name}, all but oracle", ">", 0, every))
    sampled_nll = {"nll": sampled.gain(OURS_SAMPLED)}
    rows.append(decide("sampled groups: over nll", ">", 0, sampled_nll))
    rows.append(decide("sampled groups: over mixtures", ">", 0, over_sampled))
    return rows


def print_claims(rows: list[Row]) -> None:
    head = Row("adagrpo", "bound", "mean [95% interval]", "n", "verdict", "weakest")
    for row in [head, *rows]:
        start = f"{row.claim:<35}{row.bound:<8}{row.mean:<25}{row.seeds:<3}"
        print(f"{start}{row.verdict:<10} {row.weakest}"[:100].rstrip())


# ---------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(values: list[float], sign="", digits=2) -> str:
    """Mean and half-width; the sign + marks a difference."""
    if not values:
        return "-"
    mean, half = interval(values)
    if math.isinf(half):
        return f"{mean:{sign}.{digits}f} (one seed)"
    return f"{mean:{sign}.{digits}f} ±{half:.{digits}f}"


def against_nll(study: Study, arm: str, metric="hr@10", group="all") -> str:
    """nll as a level, any other arm as a paired difference to nll."""
    if arm == "nll":
        return plus_minus(study.levels(arm, metric, group))
    return plus_minus(study.gain(arm, metric=metric, group=group), "+")


def named(arm: str) -> str:
    return f"{arm} (level)" if arm == "nll" else arm


def arms_table(study: Study) -> str:
    arms = study.arms()
    rows = [[named(a), *(against_nll(study, a, m) for m in METRICS)] for a in arms]
    return table(["arm", *METRICS], rows)


def kinds_table(study: Study) -> str:
    groups = (*KINDS, "all")
    rows = []
    for arm in study.arms():
        rows.append([named(arm), *(against_nll(study, arm, group=g) for g in groups)])
    return table(["arm", *groups], rows)


def seed_names(seeds) -> str:
    return " ".join(str(seed) for seed in sorted(seeds)) or "none"


def hallucination_table(study: Study) -> str:
    groups = (*KINDS, "all")
    rows = []
    for arm in study.arms():
        levels = [study.levels(arm, "hallucination", group) for group in groups]
        rows.append([arm, *(plus_minus(values) for values in levels)])
    return table(["arm", *groups], rows)


def premise_table(study: Study) -> str:
    rows = []
    for kind in (*KINDS, "all"):
        row = [kind]
        for metric in PREMISE:
            digits = 2 if metric.startswith("auc") else 1
            levels = study.levels("before", metric, f"premise {kind}")
            row.append(plus_minus(levels, digits=digits))
        rows.append(row)
    return table(["kind", *PREMISE], rows)


def training_table(study: Study) -> str:
    rows = []
    for arm in study.arms():
        admitted = study.levels(arm, "admitted", "training")
        if not admitted:
            continue
        weight = number(arm, study.weight())
        dose = [weight * share / 100 for share in admitted]
        columns = [study.levels(arm, m, "training") for m in ("absent", "outscored")]
        columns = [admitted, dose, *columns]
        rows.append([arm, f"{weight:g}", *(plus_minus(values) for values in columns)])
    head = ["arm", "weight", "admitted, %", "dose", "target absent, %"]
    return table([*head, "target outscored, %"], rows)


def market_table(study: Study) -> str:
    rows = []
    for arm in study.arms():
        row = [arm]
        for metric in ("ctr", "dwell"):
            gain = study.gain(OURS, arm, metric)
            answer = decide("", "sign", 0, {arm: gain})
            row += [answer.mean, answer.verdict]
        if arm != OURS:
            rows.append(row)
    return table(["adagrpo against", "ctr, %", "sign", "dwell, s", "sign"], rows)


def cells_table(study: Study) -> str:
    rows = []
    for cell in CELLS:
        share = plus_minus(study.levels("nll", "share", cell), digits=1)
        columns = [against_nll(study, arm, group=cell) for arm in ("nll", *SHORT)]
        rows.append([cell, share, *columns])
    return table(["cell", "share of users, %", "nll (level)", *SHORT], rows)


def ablation_table(main: Study, variations: list[Study]) -> str:
    rows = []
    for study in [main, *variations]:
        changed = changes(study, main).items()
        name = ", ".join(f"{key} {value}" for key, value in changed)
        seeds = seed_names(study.seeds())
        arms = ["nll", *SHORT]
        if study.settings.get("decode") == "sample":
            arms[-1] = OURS_SAMPLED
            name = f"{name} ({OURS_SAMPLED})"
        same = plus_minus(main.only(study.seeds()).gain(OURS), "+")
        columns = [against_nll(study, arm) for arm in arms]
        rows.append([name or "main study", seeds, *columns, same])
    head = ["variation", "seeds", "nll (level)", *SHORT]
    return table([*head, "adagrpo in the main study, same seeds"], rows)


def bias_table(main: Study, variations: list[Study]) -> str:
    studies = [study for study in variations if set(changes(study, main)) == {"bias"}]
    studies = sorted([main, *studies], key=lambda study: study.settings.get("bias", 1))
    seeds = set.intersection(*(set(study.seeds()) for study in studies))
    rows = []
    for study in studies:
        study = study.only(sorted(seeds))
        bias = f"{study.settings.get('bias', 1):g}"
        groups = (*KINDS, "all")
        clear = [study.levels("before", "clear", f"premise {g}") for g in groups]
        clear = [plus_minus(values, digits=1) for values in clear]
        rows.append([bias, "clear before, %", *clear])
        for arm in ("nll", *SHORT):
            gains = [against_nll(study, arm, group=group) for group in groups]
            rows.append([bias, named(arm), *gains])
    words = f"Seeds {seed_names(seeds)}.\n\n"
    return words + table(["bias", "arm", *KINDS, "all"], rows)


def seeds_table(study: Study) -> str:
    arms = ("nll", *SHORT)
    rows = []
    for seed in study.seeds():
        row = [str(seed)]
        for arm in arms:
            level = study.level(arm).get(seed)
            if level is None:
                row.append("-")
            else:
                row.append(f"{level:.2f}")
        rows.append(row)
    return table(["seed", *arms], rows)


def cosines_table(study: Study) -> str:
    rows = []
    for decode, words in {"beam": "beams", "sample": "draws"}.items():
        values = [cosines[decode] for cosines in study.cosines.values()]
        if values:
            group = study.settings["group"]
            rows.append([f"{group} {words}", plus_minus(values)])
    return table(["group", "cosine"], rows)


def results(main: Study, variations: list[Study], sampled: Study, rows: list) -> str:
    """The whole of RESULTS.md."""
    settings = ", ".join(f"{key} {value}" for key, value in main.settings.items())
    command = "python .github/evidence.py " + shlex.join(sys.argv[1:])
    commands = "\n".join([*COMMANDS, command])
    return f"""# Results

Written by [`evidence.py`](evidence.py); do not edit. The commands:

```sh
{commands}
```

Main study: seeds {seed_names(main.seeds())}; {settings}.

Arms: `nll` has no reward, `nll@6` makes six passes; `mix-W` is a fixed NLL-GRPO mixture
of weight W without a gate; `difficulty` and `discriminability` are halves of the gate,
`random` admits at the same rate, `spread` and `level` put another measure in the place
of discriminability, `oracle` admits trend shoppers by the truth, `centred` does not
divide by the standard deviation. A number after a dash is the weight. HR@10, NDCG@10,
hallucination and CTR are percent, dwell is seconds. CTR and dwell are *simulated*:
they come from the toy's truth.

## Claims

One row a claim: points of HR@10 by which adagrpo is ahead, where the row names nothing
else. A claim holds if all of the 95% interval (Student, paired by seed, n seeds) lies
on the right side of the bound, fails if all of it lies on the wrong side, and is
undecided otherwise. Of several comparisons the weakest decides and is named; "x5" is
the number of seeds for which validation picked that arm. It is a tie if the interval
includes 0 and stays within the bound. Where the bound says "sign", the sign of the
figure is what is asked. The frontier has two rows a mixture, adagrpo's HR@10 and its
hallucination less the mixture's, and the second one says what both together mean. The
intervals are not adjusted for the number of rows.

{table(["adagrpo", "bound", "mean [95% interval]", "n", "verdict", "weakest"], rows)}

![HR@10 against hallucination](frontier.svg)

## All arms

nll as a level, every other arm as its paired difference to nll, with 95% intervals.

{arms_table(main)}

The same for HR@10 by kind of shopper:

{kinds_table(main)}

![Gain by kind of shopper](kinds.svg)

Hallucination in the top 10 by kind, levels in percent:

{hallucination_table(main)}

The simulated A/B of adagrpo against every arm:

{market_table(main)}

## The premise

Before post-training, by kind: HR@10 of the policy; `reranked`, HR@10 after the ranker
reorders the policy's likeliest items; AUC of the ranker against random items and within
the group; shares that the gate finds hard and clear and that it admits, in percent.

{premise_table(main)}

What the gates saw in training: admitted samples; dose, which is weight times admission
rate; and, among admitted samples, groups that lack the target and groups in which some
negative outscores it.

{training_table(main)}

## The stratified analysis

Test users by what the gate says of them before post-training: nll's HR@10 in each cell,
then gains over nll there. A difficulty of 0.3 of 32 is "missed at 10", so hard cells
start at 0 and easy ones at 100 before post-training: only the comparison with nll means
something.

{cells_table(main)}

![Gain by cell of the gate](cells.svg)

## Sampled groups

The group is drawn from the policy, not found by beam search: nll as a level, the other
arms as differences to it, over the seeds {seed_names(sampled.seeds())}.

{arms_table(sampled)}

Beams are no draws: cosine of the GRPO gradient of a group with that of 600 draws for
each of the same 256 users, before post-training, mean over the seeds
{seed_names(list(main.cosines))}.

{cosines_table(main)}

## Ablations

One row a variation: gains in HR@10 over the nll of the same variation and seeds.

{ablation_table(main, variations)}

How the bias of the ranker's log matters (0: the feed showed everything alike), HR@10:

{bias_table(main, variations)}

## Seed by seed

HR@10, percent.

{seeds_table(main)}
"""


# -------------------------------------------------------------------------- pictures


def gains(study: Study, arms, groups) -> dict[tuple[str, str], tuple[float, float]]:
    """(group, arm) -> gain over nll and half-width, where there is one."""
    found = {}
    for group in groups:
        for arm in arms:
            values = study.gain(arm, group=group)
            if values:
                found[group, arm] = interval(values)
    return found


def kinds_picture(file: Path, study: Study) -> None:
    groups = {kind: [kind] for kind in (*KINDS, "all")}
    title = "Who gains: HR@10 by kind of shopper"
    pictures.bars(file, title, groups, COLOURS, gains(study, COLOURS, groups))


def cells_picture(file: Path, study: Study) -> None:
    groups = {}
    for cell in CELLS:
        policy, ranker = cell.split("+")
        share = study.levels("nll", "share", cell)
        groups[cell] = [f"policy: {policy}", f"ranker: {ranker}"]
        if share:
            groups[cell].append(f"{np.mean(share):.0f}% of users")
    colours = {arm: COLOURS[arm] for arm in (UNGATED, OURS)}
    title = "Gain over nll, by what the gate said before post-training"
    pictures.bars(file, title, groups, colours, gains(study, colours, groups))


def frontier_picture(file: Path, study: Study) -> None:
    """HR@10 is nll's mean plus the paired gain, with the interval of the gain."""
    arms = ["nll", *MIXES, *WEIGHTS, *EQUAL_DOSE]
    arms += [RANDOM, SPREAD, LEVEL, ORACLE]
    hits = {}
    invalid = {}
    for arm in arms:
        levels = study.levels(arm, "hallucination")
        if levels and study.gain(arm):
            mean, half = interval(study.gain(arm))
            hits[arm] = float(np.mean(study.levels("nll"))) + mean, half
            invalid[arm] = interval(levels)
    lines = [("nll", *MIXES), ("nll", *WEIGHTS)]
    pictures.frontier(file, hits, invalid, lines)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description="Claims, tables and pictures from finished runs of study.py."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=here / "RESULTS.md")
    parser.add_argument("--pictures", type=Path, default=here, help="folder")
    args = parser.parse_args()

    study, variations = read(args.files)
    sampled = [v for v in variations if v.settings.get("decode") == "sample"]
    sampled = min(sampled, key=lambda v: len(changes(v, study)), default=Study({}))

    rows = claims(study, sampled)
    print_claims(rows)
    args.results.write_text(results(study, variations, sampled, rows), encoding="utf-8")
    kinds_picture(args.pictures / "kinds.svg", study)
    cells_picture(args.pictures / "cells.svg", study)
    frontier_picture(args.pictures / "frontier.svg", study)


if __name__ == "__main__":
    main()
