# SPDX-License-Identifier: MIT
"""RESULTS.md and its picture from the records of study.py.

    python .github/study/evidence.py .github/study/records.jsonl

Records of equal world settings make a study: the one with the defaults of adagrpo.py is
the main study, the others are variations of it. Seeds 0 to 4 are development seeds: of
them only what the validation users say is read, to show how settings were chosen.

Every interval is Student's 95% interval over seeds. Differences are paired: both arms
ran on the same seed, and the difference is taken before the mean. The words are in
words.md, where {name} stands for a table. The picture needs matplotlib, which is not in
requirements.txt.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import toy_data
from adagrpo import MAX_GRAD_NORM, Config

HERE = Path(__file__).resolve().parent
DEVELOPMENT = range(5)

DEFAULTS = {
    "slates": toy_data.SIZES["feed"],
    "viewers": toy_data.SIZES["viewers"],
    "ranker": "clicks",
    "everybody": False,
    "season_correlation": toy_data.SEASON_CORRELATION,
    "max_grad_norm": MAX_GRAD_NORM,
}
for name, value in vars(Config()).items():
    if name != "seed":
        DEFAULTS[name] = value

# The arms of the main study. The weights are those that validation chose on development
# seeds, or those that give the dose of adagrpo ("at equal dose").
MIXTURE = "mix-0.3"  # the best fixed mixture
CLAIMS = {
    1: ["nll", "nll,epochs=4"],
    2: ["mix-0.3", "mix-0.3,epochs=4"],
    3: ["random", "difficulty-0.7", "difficulty-2.2", "discriminability-1.6"],
    4: ["distil-1,w=4", "gated-distil-10,w=4"],
}
SHORT = ["nll", "clicks", MIXTURE, "random", "level-3.5", "adagrpo", "adagrpo,clicks=1"]
ARMS = ["before", "nll", "nll,epochs=4", "whole", "clicks", "mix-0.1", *CLAIMS[2]]
ARMS += ["mix-1", "mix-3", *CLAIMS[4], *CLAIMS[3], "level-3.5", "spread-3.3"]
ARMS += ["oracle-1.6", "adagrpo"]
AFTER_CLICKS = ["clicks", "mix-0.3,clicks=1", "random,clicks=1", "level-3.5,clicks=1"]
AFTER_CLICKS += ["adagrpo,clicks=1"]
FIRST = ["nll", "nll,epochs=4", "clicks", MIXTURE, "gated-distil-10,w=4", "random"]
FIRST += ["level-3.5", "adagrpo", "adagrpo,clicks=1"]
GATES = ["mix-1", "difficulty-2.2", "discriminability-1.6", "spread-3.3", "oracle-1.6"]

STRATA = [
    f"{sure}, {often}"
    for sure in ("unsure", "middle", "sure")
    for often in ("often", "middle", "seldom")
]
KINDS = ("trend", "series", "niche")

# Quantiles of Student's t for 95%, 1 to 30 degrees of freedom; the last serves beyond.
T95 = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145
2.131 2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048
2.045 2.042
"""
T95 = [float(quantile) for quantile in T95.split()]


# --------------------------------------------------------------------------- statistics


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its interval; infinite for a single seed."""
    if len(values) == 1:
        return values[0], math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    quantile = T95[min(len(values) - 1, len(T95)) - 1]
    return float(np.mean(values)), quantile * error


def plus_minus(values: list[float], sign: str = "") -> str:
    """Mean and half-width; the sign + marks a difference."""
    if not values:
        return "-"
    mean, half = interval(values)
    if math.isinf(half):
        return f"{mean:{sign}.2f} (one seed)"
    return f"{mean:{sign}.2f} ±{half:.2f}"


def verdict(values: list[float], bound: float = 0.0) -> str:
    """Is it above the bound? Decided if the whole interval lies on one side."""
    mean, half = interval(values)
    if mean - half > bound:
        return "holds"
    if mean + half < bound:
        return "fails"
    return "undecided"


def median_and_range(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


class Study:
    """The records of one world."""

    def __init__(self, changes: dict):
        self.changes = changes  # settings that differ from the defaults
        self.runs: dict[tuple[int, str], dict] = {}  # (seed, arm) -> figures

    def only(self, seeds: set[int]) -> "Study":
        """The same without other seeds."""
        study = Study(self.changes)
        study.runs = {key: run for key, run in self.runs.items() if key[0] in seeds}
        return study

    def seeds(self) -> set[int]:
        return {seed for seed, _ in self.runs}

    def level(self, arm: str, metric: str, group: str = "all") -> dict[int, float]:
        """The arm's figure for every seed that has one (an empty group has none)."""
        levels = {}
        for (seed, name), figures in sorted(self.runs.items()):
            value = figures.get(group, {}).get(metric, math.nan)
            if name == arm and math.isfinite(value):
                levels[seed] = value
        return levels

    def levels(self, arm: str, metric: str, group: str = "all") -> list[float]:
        return list(self.level(arm, metric, group).values())

    def gain(
        self, arm: str, base: str = "nll", metric: str = "hr@10", group: str = "all"
    ) -> list[float]:
        """Per seed that has both arms: the arm's figure less the base's."""
        return paired(self.level(arm, metric, group), self.level(base, metric, group))

    def added(self, arm: str, group: str = "all") -> list[float]:
        """What the ranker adds at serving: fused less alone."""
        fused = self.level(arm, "hr@10 fused", group)
        return paired(fused, self.level(arm, "hr@10", group))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """One difference for each seed that stands on both sides."""
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def read(files: list[Path]) -> tuple[Study, list[Study], list[Study]]:
    """The main study, its variations, and the studies of development seeds."""
    fresh: dict[str, Study] = {}
    development: dict[str, Study] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            changes = {k: v for k, v in record["world"].items() if v != DEFAULTS[k]}
            studies = fresh
            figures = record["figures"]
            if record["seed"] in DEVELOPMENT:
                studies = development
                hr = figures["validation"]  # by w
                fused = max(value for w, value in hr.items() if w != "w")
                figures = {"validation": {"alone": hr["0"], "fused": fused}}
            study = studies.setdefault(json.dumps(changes), Study(changes))
            study.runs[record["seed"], record["arm"]] = figures

    main = fresh.pop("{}", None)
    if main is None:
        sys.exit("evidence.py: no record has the defaults of adagrpo.py")
    return main, list(fresh.values()), list(development.values())


def variation(studies: list[Study], **changes) -> Study:
    """The study with exactly these changes; an empty one if it was not run."""
    for study in studies:
        if study.changes == changes:
            return study
    return Study(changes)


# ------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_nll(study: Study, arm: str, metric="hr@10", group="all") -> str:
    """nll as a level, any other arm as a paired difference to nll."""
    if arm == "nll":
        return plus_minus(study.levels(arm, metric, group))
    return plus_minus(study.gain(arm, "nll", metric, group), "+")


def claims_table(main: Study) -> str:
    """The primary claims of claims.md, one comparison a row."""
    rows = []

    def add(number: int, words: str, gains: list[float], bound: float = 0.0) -> None:
        if gains:
            cell = plus_minus(gains, "+")
            rows.append([str(number), words, cell, verdict(gains, bound)])

    for number, arms in CLAIMS.items():
        for arm in arms:
            add(number, f"over {arm}", main.gain("adagrpo", arm))
    fused = "hr@10 fused"
    over_nll = main.gain("adagrpo", "nll", fused)
    add(5, "fused: over nll fused less 0.5", over_nll, -0.5)
    over_mix = main.gain("adagrpo", "mix-1", fused)
    add(5, "fused: over mix-1 fused plus 1.5", over_mix, 1.5)
    return table(["claim", "adagrpo", "points of HR@10", "verdict"], rows)


def arms_table(study: Study, arms: list[str]) -> str:
    rows = []
    for arm in arms:
        if not study.levels(arm, "hr@10"):
            continue
        row = [arm]
        for metric in ("hr@10", "hr@10 fused", "ndcg@10", "recall@32"):
            row.append(against_nll(study, arm, metric))
        row.append(median_and_range(study.levels(arm, "hallucination")))
        row.append(f"{np.median(study.levels(arm, 'w', 'validation')):g}")
        row.append("-")
        if arm != "adagrpo":
            row[-1] = plus_minus(study.gain("adagrpo", arm), "+")
        rows.append(row)
    head = ["arm", "HR@10 alone", "HR@10 fused", "NDCG@10", "recall@32"]
    return table([*head, "hallucination, %", "w", "adagrpo less it, alone"], rows)


def settings_table(study: Study, arms: list[str]) -> str:
    """Other settings of an arm: what they gain, and less the default on their seeds."""
    rows = []
    for arm in arms:
        row = [arm, str(len(study.level(arm, "hr@10")))]
        row.append(plus_minus(study.levels(arm, "admitted", "training")))
        row.append(plus_minus(study.gain(arm), "+"))
        row.append(plus_minus(study.gain(arm, "adagrpo"), "+"))
        row.append(plus_minus(study.gain(arm, "adagrpo", "hr@10 fused"), "+"))
        rows.append(row)
    head = ["arm", "seeds", "admitted, %", "over nll", "less adagrpo"]
    return table([*head, "less adagrpo, fused"], rows)


def leads_table(study: Study, ours: str, arms: list[str]) -> str:
    """An arm less each of the others: alone, clicks and dwell."""
    others = {}
    for arm in arms:
        if arm != ours:
            others[arm] = (arm, "")
        if arm == "nll":
            others["nll, the ranker at every request"] = (arm, " fused")
            others["nll, a table of click rates"] = (arm, " table")
    rows = []
    for name, (arm, how) in others.items():
        row = [name]
        for metric in ("hr@10", "ctr", "dwell"):
            theirs = study.level(arm, metric + how)
            row.append(plus_minus(paired(study.level(ours, metric), theirs), "+"))
        if row[1] != "-":
            rows.append(row)
    head = [f"{ours} alone less", "HR@10, points", "simulated CTR, points"]
    return table([*head, "simulated dwell, s"], rows)


def groups_table(main: Study, exposure: Study, groups: list[str]) -> str:
    """What the ranker adds before training, and what arms gain after it, by group."""
    rows = []
    for group in groups:
        row = [group, f"{np.mean(main.levels('before', 'share', group)):.0f}"]
        row.append(plus_minus(main.levels("before", "hr@10", group)))
        row.append(plus_minus(main.added("before", group), "+"))
        row.append(plus_minus(main.levels("nll", "hr@10", group)))
        for arm in (MIXTURE, "mix-1", "random", "adagrpo"):
            row.append(against_nll(main, arm, group=group))
        for arm in ("mix-1", "adagrpo"):
            row.append(against_nll(exposure, arm, group=group))
        rows.append(row)
    head = ["users", "%", "before", "ranker adds", "nll", MIXTURE, "mix-1", "random"]
    return table([*head, "adagrpo", "mix-1, exposure", "adagrpo, exposure"], rows)


def kinds_table(study: Study, arms: list[str]) -> str:
    rows = []
    for arm in arms:
        if study.levels(arm, "hr@10"):
            rows.append([arm, *[against_nll(study, arm, group=g) for g in KINDS]])
    return table(["arm", *KINDS], rows)


def rankers_table(rankers: dict[str, Study], arms: list[str]) -> str:
    """From a good ranker to none: what it adds, what arms gain, what a diagnosis says."""
    rows = []
    for name, study in rankers.items():
        if not study.runs:
            continue
        answers = []
        for (_, arm), figures in sorted(study.runs.items()):
            if arm == "diagnosis":
                answers.append(figures["diagnosis"].partition(":")[0].lower())
        counts = [
            f"{answer} x{answers.count(answer)}" for answer in sorted(set(answers))
        ]
        row = [name, str(len(study.level("nll", "hr@10")))]
        row.append(plus_minus(study.added("before"), "+"))
        row.append(plus_minus(study.added("nll"), "+"))
        row += [against_nll(study, arm) for arm in arms]
        for arm in arms[-2:]:
            admitted = study.levels(arm, "admitted", "training")
            row.append(f"{np.mean(admitted):.0f}" if admitted else "-")
        rows.append([*row, ", ".join(counts) or "-"])
    head = ["ranker", "seeds", "adds before", "adds after NLL", *arms]
    head += [f"{arm} admits, %" for arm in arms[-2:]]
    return table([*head, "diagnosis"], rows)


def variations_table(studies: dict[str, Study], arms: list[str]) -> str:
    """Gains over nll by world."""
    rows = []
    for name, study in studies.items():
        if study.levels("adagrpo", "hr@10"):
            row = [name, str(len(study.level("adagrpo", "hr@10")))]
            row.append(plus_minus(study.levels("nll", "hr@10")))
            row.append(plus_minus(study.added("nll"), "+"))
            rows.append([*row, *[against_nll(study, arm) for arm in arms]])
    return table(["world", "seeds", "nll", "ranker adds to nll", *arms], rows)


def training_table(study: Study, arms: list[str]) -> str:
    """What the rules saw in training."""
    rows = []
    for arm in arms:
        admitted = study.levels(arm, "admitted", "training")
        weight = study.levels(arm, "weight", "training")
        if admitted:
            dose = [w * share / 100 for w, share in zip(weight, admitted)]
            columns = [admitted, dose]
            for metric in ("absent", "outscored"):
                columns.append(study.levels(arm, metric, "training"))
            rows.append([arm, *[plus_minus(values) for values in columns]])
    head = ["arm", "admitted, %", "dose", "target absent, %", "target outscored, %"]
    return table(head, rows)


def split_name(arm: str) -> tuple[str, str]:
    """adagrpo-2,draws=8,lr=1e-3 -> adagrpo, drawn and 2, draws=8, lr=1e-3."""
    name, *settings = arm.split(",")
    rule, _, weight = name.rpartition("-")
    if weight.replace(".", "").isdigit():
        settings.insert(0, weight)
    else:
        rule = name
    if any(setting.startswith("draws=") for setting in settings):
        rule += ", drawn"
    return rule, ", ".join(settings) or "default"


def development_table(development: list[Study]) -> str:
    """HR@10 of validation users less nll's: a row for each rule, its settings in it."""
    study = variation(development)
    cells: dict[str, list[str]] = {}
    for arm in sorted({arm for _, arm in study.runs}, key=natural):
        rule, settings = split_name(arm)
        gains = study.gain(arm, "nll", "alone", "validation")
        if arm not in ("nll", "before") and gains:
            cell = f"{settings}: {plus_minus(gains, '+')}"
            if 1 < len(gains) < len(study.level("nll", "alone", "validation")):
                cell += f" ({len(gains)} seeds)"
            cells.setdefault(rule, []).append(cell)
    rows = [[rule, "; ".join(row)] for rule, row in sorted(cells.items())]
    return table(["arm", "settings: points over nll"], rows)


def natural(arm: str) -> list:
    """A key that sorts numbers in a name by their value."""
    parts = re.split(r"(\d+\.?\d*(?:e-?\d+)?)", arm)
    return [(i % 2, float(part) if i % 2 else part) for i, part in enumerate(parts)]


def grid_table(
    development: list[Study], arm: str, metric: str, fixed: tuple, tuned: tuple
) -> str:
    """An arm's HR@10 of validation users by settings, and less that of the defaults."""
    rows = []
    for study in development:
        levels = study.level(arm, metric, "validation")
        if levels and study.changes.keys() <= {*fixed, *tuned}:
            changes = {k: v for k, v in study.changes.items() if k in fixed}
            base = variation(development, **changes).level(arm, metric, "validation")
            settings = [study.changes.get(k, DEFAULTS[k]) for k in (*fixed, *tuned)]
            gains = paired(levels, base)
            mean = f"{np.mean(list(levels.values())):.2f}"
            rows.append([*settings, mean, plus_minus(gains, "+")])
    rows.sort(key=lambda row: row[: len(fixed) + len(tuned)])
    head = [*fixed, *tuned, f"HR@10, {arm}", "less the default's"]
    return table(head, [[str(cell) for cell in row] for row in rows])


# ------------------------------------------------------------------------------ picture


def draw(main: Study, arms: list[str], file: Path) -> None:
    """Bars of HR@10 with intervals: the policy alone, and with the ranker."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "adagrpo"  # the same figures, the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    arms = [arm for arm in arms if main.levels(arm, "hr@10")]
    place = np.arange(len(arms))
    for shift, metric, label, colour in (
        (-0.2, "hr@10", "the policy alone", "#d95f02"),
        (0.2, "hr@10 fused", "with the ranker at every request", "#bdbdbd"),
    ):
        levels = [interval(main.levels(arm, metric)) for arm in arms]
        means = [mean for mean, _ in levels]
        halves = [half for _, half in levels]
        axes.bar(place + shift, means, 0.38, yerr=halves, label=label, color=colour)
    axes.set_xticks(place, [arm.replace(",", "\n") for arm in arms])
    axes.set_ylabel("HR@10, %")
    axes.set_ylim(bottom=40)
    axes.legend(frameon=False, loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


# --------------------------------------------------------------------------------- main


def tables_of(
    main: Study, studies: list[Study], development: list[Study]
) -> dict[str, str]:
    """All tables by the name that stands in words.md."""
    four = main.only({seed for study in studies for seed in study.seeds()})
    exposure = variation(studies, ranker="exposure")
    noise = variation(studies, ranker="noise")
    rankers = {
        "200,000 slates": four,
        "60,000 slates": variation(studies, slates=60_000, ranker_epochs=6),
        "20,000 slates": variation(studies, slates=20_000, ranker_epochs=6),
        "click rates": variation(studies, ranker="rates"),
        "exposure only": exposure,
        "noise": noise,
    }
    worlds = {
        "main, the same seeds": four,
        "bias 0": variation(studies, bias=0.0),
        "bias 0.5": variation(studies, bias=0.5),
        "season correlation 0": variation(studies, season_correlation=0.0),
        "season correlation 1": variation(studies, season_correlation=1.0),
        "pre-training of 4 passes": variation(studies, pretrain_epochs=4),
        "pre-training of 24 passes": variation(studies, pretrain_epochs=24),
        "all histories pre-trained on": variation(studies, everybody=True),
        "18,000 viewers": variation(studies, viewers=18_000),
        "gradients cut at 50": variation(studies, max_grad_norm=50.0),
    }
    settings = [arm for _, arm in main.runs if arm.startswith("adagrpo")]
    drawn = [arm for _, arm in main.runs if "draws" in arm]
    settings = set(settings) - set(drawn) - set(SHORT)
    drawn = sorted(set(drawn), key=natural)
    gates = ["mix-0.3", "mix-1", "random", "level-3.5", "adagrpo"]
    return {
        "first": arms_table(main, FIRST),
        "claims": claims_table(main),
        "arms": arms_table(main, [*ARMS, *AFTER_CLICKS[1:]]),
        "leads": leads_table(main, "adagrpo", [*SHORT, *GATES]),
        "strata": groups_table(main, exposure, STRATA),
        "clicks": leads_table(main, AFTER_CLICKS[-1], AFTER_CLICKS),
        "kinds": kinds_table(main, [*SHORT, *GATES]),
        "rankers": rankers_table(rankers, gates),
        "worlds": variations_table(worlds, ["mix-0.1", *gates, "mix-3"]),
        "settings": settings_table(main, sorted(settings, key=natural)),
        "drawn": arms_table(main, ["nll", *drawn]),
        "training": training_table(main, ["adagrpo", "level-3.5", *GATES, *drawn]),
        "development": development_table(development),
        "pretraining": grid_table(
            development, "nll", "alone", (), ("pretrain_lr", "pretrain_epochs")
        ),
        "passes": grid_table(
            development, "before", "fused", ("slates",), ("ranker_epochs",)
        ),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="RESULTS.md from records of study.py.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=HERE.parent / "RESULTS.md")
    parser.add_argument("--picture", type=Path, help="SVG; needs matplotlib")
    options = parser.parse_args(argv)

    study, variations, development = read(options.files)
    tables = tables_of(study, variations, development)
    text = (HERE / "words.md").read_text(encoding="utf-8")
    for name, lines in tables.items():
        text = text.replace(f"{{{name}}}", lines)
    options.results.write_text(text, encoding="utf-8")
    print(tables["claims"])
    print(tables["arms"])
    if options.picture:
        draw(study, SHORT, options.picture)


if __name__ == "__main__":
    main()
