# SPDX-License-Identifier: MIT
"""RESULTS.md and its pictures from finished runs of study.py.

    python .github/evidence.py runs/study.json runs/development.json

A file is a list of records {"seed", "arm", "settings", "figures"}. Records of equal
settings make a study: the one with the defaults of adagrpo.py is the main study, the
others are variations of it. Seeds 0 to 4 are development seeds: of them only what the
validation users say is read, to show how settings were chosen.

Every interval is Student's 95% interval over seeds. Differences are paired: both arms
ran on the same seed, and the difference is taken before the mean. The pictures need
matplotlib, which is not in requirements.txt.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_data
from adagrpo import Config

HEAD = Path(__file__).with_name("results_head.md")

DEFAULTS = vars(Config()) | {
    "noise_ranker": False,
    "season_correlation": toy_data.SEASON_CORRELATION,
    "slates": toy_data.SIZES["feed"],
}
DEVELOPMENT = range(5)

# Settings that the policy of plain NLL never sees: a variation of these, and of these
# alone, borrows the main study's nll if it has none. (But the verdicts of another ranker
# make other groups of users: the noise ranker has an nll of its own.)
UNSEEN_BY_NLL = {"group", "decode", "weight", "bias", "negatives", "noise_ranker"}
UNSEEN_BY_NLL |= {"min_difficulty", "min_discriminability", "slates"}

MIXTURES = ("mix-0.1", "mix-0.3", "mix-1", "mix-3")
EQUAL_DOSE = ("difficulty-2.1", "discriminability-2.6", "random")
ARMS = ("before", "nll", "nll@6", *MIXTURES, *EQUAL_DOSE, "adagrpo-1", "adagrpo")
ARMS += ("adagrpo-15", "level-3.2", "spread-2.6", "clicks", "histories", "oracle-2.1")
GATES = ("mix-0.3", "mix-1", "difficulty-2.1", "level-3.2", "spread-2.6", "adagrpo")
KINDS = ("trend", "series", "niche")
VERDICTS = ("hard+clear", "hard+unclear", "easy+clear", "easy+unclear")
STRATA = [
    f"{sure}, {often}"
    for sure in ("unsure", "middle", "sure")
    for often in ("seldom", "middle", "often")
]

# Quantiles of Student's t for 95%, 1 to 9 degrees of freedom.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


# --------------------------------------------------------------------------- statistics


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its interval; infinite for a single seed."""
    if len(values) == 1:
        return values[0], math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), T95[len(values) - 2] * error


def plus_minus(values: list[float], sign: str = "") -> str:
    """Mean and half-width; the sign + marks a difference."""
    if not values:
        return "-"
    mean, half = interval(values)
    if math.isinf(half):
        return f"{mean:{sign}.2f} (one seed)"
    return f"{mean:{sign}.2f} ±{half:.2f}"


def verdict(values: list[float]) -> str:
    """Is it above 0? Decided if the whole interval lies on one side."""
    mean, half = interval(values)
    if mean - half > 0:
        return "holds"
    if mean + half < 0:
        return "fails"
    return "undecided"


class Study:
    """The runs of one set of settings."""

    def __init__(self, changes: dict):
        self.changes = changes  # settings that differ from the defaults
        self.runs: dict[tuple[int, str], dict] = {}  # (seed, arm) -> figures

    def only(self, seeds: set[int]) -> "Study":
        """The same without other seeds."""
        study = Study(self.changes)
        study.runs = {key: run for key, run in self.runs.items() if key[0] in seeds}
        return study

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

    def picked(self, arms: tuple[str, ...]) -> dict[int, str]:
        """Per seed: the arm with the best HR@10 on validation users."""
        validation = {arm: self.level(arm, "hr@10", "validation") for arm in arms}
        seeds = set.intersection(*[set(levels) for levels in validation.values()])
        return {s: max(arms, key=lambda arm: validation[arm][s]) for s in sorted(seeds)}

    def over_picked(self, arms: tuple[str, ...]) -> tuple[list[float], str]:
        """adagrpo over the arm that validation picks, and what it picked how often."""
        picks = self.picked(arms)
        theirs = {seed: self.level(arm, "hr@10")[seed] for seed, arm in picks.items()}
        counts = Counter(picks.values()).most_common()
        names = ", ".join(f"{arm} x{count}" for arm, count in counts)
        return paired(self.level("adagrpo", "hr@10"), theirs), names


def paired(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """One difference for each seed that stands on both sides."""
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def read(files: list[Path]) -> tuple[Study, list[Study], list[dict]]:
    """The main study, its variations, and the records of development seeds."""
    studies: dict[tuple, Study] = {}
    development = []
    for file in files:
        for record in json.loads(file.read_text()):
            if record["seed"] in DEVELOPMENT:
                development.append(record)
                continue
            settings = record["settings"]
            changes = {k: v for k, v in settings.items() if v != DEFAULTS[k]}
            study = studies.setdefault(tuple(changes.items()), Study(changes))
            study.runs[record["seed"], record["arm"]] = record["figures"]

    main = studies.pop((), None)
    if main is None:
        sys.exit("evidence.py: no record has the defaults of adagrpo.py")
    for study in studies.values():
        if study.changes.keys() <= UNSEEN_BY_NLL:
            seeds = {seed for seed, _ in study.runs}
            for (seed, arm), figures in main.runs.items():
                if arm == "nll" and seed in seeds:
                    study.runs.setdefault((seed, arm), figures)
    return main, list(studies.values()), development


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
    """The three primary claims; of several comparisons the weakest decides."""
    over_mixture, picks = main.over_picked(MIXTURES)

    def weakest(arms: tuple[str, ...]) -> tuple[list[float], str]:
        arm = min(arms, key=lambda arm: np.mean(main.gain("adagrpo", arm)))
        return main.gain("adagrpo", arm), f"weakest: {arm}"

    claims = {
        "over nll, at three and at six passes": weakest(("nll", "nll@6")),
        "over the mixture that validation picks": (over_mixture, picks),
        "over each half and a random gate, equal dose": weakest(EQUAL_DOSE),
    }
    rows = []
    for name, (gains, words) in claims.items():
        rows.append([name, plus_minus(gains, "+"), verdict(gains), words])
    return table(["adagrpo", "points of HR@10", "verdict", ""], rows)


def arms_table(study: Study, arms: tuple[str, ...]) -> str:
    rows = []
    for arm in arms:
        if not study.levels(arm, "hr@10"):
            continue
        row = [arm]
        for metric in ("hr@10", "hr@10 fused", "recall@32", "ndcg@10"):
            row.append(against_nll(study, arm, metric))
        row.append(plus_minus(study.levels(arm, "hallucination")))
        weights = study.levels(arm, "w", "validation")
        row.append(f"{np.median(weights):g}")
        rows.append(row)
    head = ["arm", "HR@10 alone", "HR@10 fused", "recall@32", "NDCG@10"]
    return table([*head, "hallucination, %", "w, median"], rows)


def groups_table(main: Study, noise: Study, groups: tuple[str, ...]) -> str:
    """What the ranker adds before training, and what arms gain after it, by group."""
    rows = []
    for group in groups:
        ranker = paired(
            main.level("before", "hr@10 fused", group),
            main.level("before", "hr@10", group),
        )
        rows.append(
            [
                group,
                f"{np.mean(main.levels('before', 'share', group)):.0f}",
                plus_minus(main.levels("before", "hr@10", group)),
                plus_minus(ranker, "+"),
                plus_minus(main.levels("nll", "hr@10", group)),
                against_nll(main, "mix-1", group=group),
                against_nll(main, "adagrpo", group=group),
                against_nll(noise, "mix-1", group=group),
                against_nll(noise, "adagrpo", group=group),
            ]
        )
    head = ["users", "%", "before", "ranker adds", "nll", "mix-1", "adagrpo"]
    return table([*head, "mix-1, noise ranker", "adagrpo, noise ranker"], rows)


def kinds_table(study: Study) -> str:
    rows = []
    for arm in ARMS:
        if study.levels(arm, "hr@10"):
            groups = (*KINDS, "all")
            rows.append([arm, *[against_nll(study, arm, group=g) for g in groups]])
    return table(["arm", *KINDS, "all"], rows)


def premise_table(main: Study) -> str:
    rows = []
    metrics = ("share", "hr@10", "hr@10 fused", "auc in group", "hard", "clear")
    metrics += ("admit",)
    for group in (*KINDS, "all"):
        levels = [main.levels("before", metric, group) for metric in metrics]
        rows.append([group, *[plus_minus(values) for values in levels]])
    return table(["users", *metrics], rows)


def lead_rows(study: Study, ours: str, others: tuple[str, ...]) -> list[list[str]]:
    """An arm less each of the others that ran."""
    rows = []
    for arm in others:
        if arm != ours and study.gain(ours, arm):
            rows.append([arm, plus_minus(study.gain(ours, arm), "+")])
    return rows


def rivals_table(main: Study) -> str:
    """adagrpo less other things that one could do."""
    best_nll, picks = main.over_picked(("nll", "nll@6"))
    fused = paired(main.level("adagrpo", "hr@10"), main.level("nll", "hr@10 fused"))
    rows = [
        ["nll with the ranker at serving (fused)", plus_minus(fused, "+")],
        [f"nll, passes by validation ({picks})", plus_minus(best_nll, "+")],
        *lead_rows(main, "adagrpo", ARMS),
    ]
    return table(["adagrpo alone less", "points of HR@10"], rows)


def ceiling_sentence(main: Study) -> str:
    """What the ranker at serving adds to nll, and how much of it adagrpo has alone."""
    alone = main.level("nll", "hr@10")
    added = paired(main.level("nll", "hr@10 fused"), alone)
    gained = paired(main.level("adagrpo", "hr@10"), alone)
    shares = [100 * ours / whole for ours, whole in zip(gained, added, strict=True)]
    return (
        f"The ranker at serving adds {plus_minus(added)} points to nll. AdaGRPO alone "
        f"has {plus_minus(shares)} percent of that (share by seed)."
    )


def bias_table(main: Study, studies: list[Study]) -> str:
    """Gains over nll at three strengths of the exposure bias, and what it costs."""
    none = variation(studies, bias=0.0)
    half = variation(studies, bias=0.5)
    whole = main.only({seed for seed, _ in none.runs})
    rows = []
    for arm in GATES:
        gains = [study.gain(arm) for study in (none, half, whole)]
        gains.append(paired(none.level(arm, "hr@10"), whole.level(arm, "hr@10")))
        rows.append([arm, *[plus_minus(values, "+") for values in gains]])
    head = ["arm", "bias 0", "bias 0.5", "bias 1", "what the bias costs"]
    return table(head, rows)


def rankers_table(main: Study, studies: list[Study]) -> str:
    """From a good ranker to a ranker of noise: what it adds, and what arms gain."""
    worst = variation(studies, noise_ranker=True)
    rankers = {
        "200,000 slates": main.only({seed for seed, _ in worst.runs}),
        "60,000 slates": variation(studies, slates=60_000),
        "20,000 slates": variation(studies, slates=20_000),
        "20,000, 30 passes": variation(studies, slates=20_000, ranker_epochs=30),
        "noise": worst,
    }
    arms = ("mix-0.3", "mix-1", "random", "level-3.2", "adagrpo")
    rows = []
    for name, study in rankers.items():
        fused = study.level("nll", "hr@10 fused")
        added = paired(fused, study.level("nll", "hr@10"))
        row = [name, plus_minus(added, "+")]
        row += [against_nll(study, arm) for arm in arms]
        row.append(plus_minus(study.levels("adagrpo", "admitted", "training")))
        rows.append(row)
    head = ["ranker", "adds to nll (fused)", *arms, "adagrpo admits, %"]
    return table(head, rows)


def variations_table(main: Study, studies: list[Study]) -> str:
    """Gains over nll by setting; the main study again on the seeds of the variations."""
    beams = []
    for study in studies:
        is_drawn = study.changes.get("decode") == "sample"
        if not is_drawn and study.levels("adagrpo", "hr@10"):
            beams.append(study)
    seeds = {seed for study in beams for seed, _ in study.runs}
    same_seeds = main.only(seeds)

    rows = []
    for study in [main, same_seeds, *beams]:
        changed = ", ".join(f"{name} {value}" for name, value in study.changes.items())
        row = [changed or "main study"]
        row.append(str(len(study.level("adagrpo", "hr@10"))))
        row.append(plus_minus(study.levels("nll", "hr@10")))
        rows.append([*row, *[against_nll(study, arm) for arm in GATES]])
    return table(["settings", "seeds", "nll", *GATES], rows)


def training_table(studies: dict[str, Study]) -> str:
    """What the rules saw in training."""
    rows = []
    for name, study in studies.items():
        for arm in sorted({arm for _, arm in study.runs}):
            admitted = study.levels(arm, "admitted", "training")
            weight = study.levels(arm, "weight", "training")
            if admitted:
                dose = [w * share / 100 for w, share in zip(weight, admitted)]
                columns = [admitted, dose]
                for metric in ("absent", "outscored"):
                    columns.append(study.levels(arm, metric, "training"))
                rows.append([name, arm, *[plus_minus(values) for values in columns]])
    head = ["groups", "arm", "admitted, %", "dose", "target absent, %"]
    return table([*head, "target outscored, %"], rows)


def market_table(main: Study) -> str:
    rows = []
    for arm in ARMS:
        if arm != "adagrpo" and main.levels(arm, "ctr"):
            gains = [main.gain("adagrpo", arm, metric) for metric in ("ctr", "dwell")]
            rows.append([arm, *[plus_minus(values, "+") for values in gains]])
    return table(["adagrpo less", "simulated CTR, points", "simulated dwell, s"], rows)


def cosines_table(main: Study) -> str:
    rows = []
    for decode, words in {"beam": "32 beams", "sample": "32 draws"}.items():
        rows.append([words, plus_minus(main.levels("gradients", decode, "cosine"))])
    return table(["group", "cosine with 600 draws"], rows)


def development_table(records: list[dict]) -> str:
    """HR@10 of the validation users of development seeds, by setting and arm."""
    levels: dict[tuple, dict[int, float]] = {}
    for record in records:
        settings = record["settings"]
        key = settings["decode"], settings["lr"], record["arm"]
        level = record["figures"]["validation"]["hr@10"]
        levels.setdefault(key, {})[record["seed"]] = level
    rows = []
    for (decode, lr, arm), by_seed in sorted(levels.items()):
        row = [decode, f"{lr:g}", arm]
        row += [f"{by_seed.get(seed, math.nan):.1f}" for seed in DEVELOPMENT]
        for seeds in ((0, 1), DEVELOPMENT):
            mean = np.mean([by_seed.get(seed, math.nan) for seed in seeds])
            row.append(f"{mean:.2f}")
        rows.append([cell.replace("nan", "-") for cell in row])
    seeds = [f"seed {seed}" for seed in DEVELOPMENT]
    head = ["groups", "lr", "arm", *seeds, "mean of 0 and 1", "mean of all"]
    return table(head, rows)


def seeds_table(main: Study) -> str:
    arms = ("before", "nll", "mix-0.3", "mix-1", "adagrpo")
    rows = []
    for seed in main.level("nll", "hr@10"):
        levels = [main.level(arm, "hr@10").get(seed, math.nan) for arm in arms]
        fused = main.level("nll", "hr@10 fused")[seed]
        rows.append([str(seed), *[f"{x:.2f}" for x in levels], f"{fused:.2f}"])
    return table(["seed", *arms, "nll fused"], rows)


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description="RESULTS.md and its pictures from finished runs of study.py."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=here / "RESULTS.md")
    parser.add_argument("--pictures", type=Path, help="folder; needs matplotlib")
    parser.add_argument("--movielens", type=Path, help="what movielens.py printed")
    options = parser.parse_args(argv)

    study, variations, development = read(options.files)
    drawn = variation(variations, decode="sample")
    noise = variation(variations, noise_ranker=True)
    drawn_arms = tuple(sorted({arm for _, arm in drawn.runs}))
    text = HEAD.read_text(encoding="utf-8")
    tables = {
        "claims": claims_table(study),
        "arms": arms_table(study, ARMS),
        "rivals": rivals_table(study),
        "ceiling": ceiling_sentence(study),
        "rankers": rankers_table(study, variations),
        "bias": bias_table(study, variations),
        "strata": groups_table(study, noise, STRATA),
        "verdicts": groups_table(study, noise, VERDICTS),
        "kinds": kinds_table(study),
        "premise": premise_table(study),
        "variations": variations_table(study, variations),
        "drawn": arms_table(drawn, drawn_arms),
        "drawn leads": table(
            ["adagrpo-2 less", "points of HR@10"],
            lead_rows(drawn, "adagrpo-2", drawn_arms),
        ),
        "training": training_table({"beams": study, "draws": drawn}),
        "market": market_table(study),
        "cosines": cosines_table(study),
        "development": development_table(development),
        "seeds": seeds_table(study),
        "movielens": "not run",
    }
    if options.movielens:
        printed = options.movielens.read_text(encoding="utf-8")
        tables["movielens"] = f"```text\n{printed.strip()}\n```"
    for name, lines in tables.items():
        text = text.replace(f"{{{name}}}", lines)
    options.results.write_text(text, encoding="utf-8")
    print(tables["claims"])
    print(tables["arms"])

    if options.pictures:
        import pictures  # here, because it needs matplotlib

        pictures.draw(study, options.pictures)


if __name__ == "__main__":
    main()
