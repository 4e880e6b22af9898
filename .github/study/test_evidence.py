# SPDX-License-Identifier: MIT
"""Tests of evidence.py, on made-up records of study.py."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evidence
from evidence import Study

METRICS = ("hr@10", "hr@10 fused", "hr@10 table", "hr@10 valid", "recall@32", "share")
METRICS += ("ndcg@10", "hallucination", "hard", "clear", "admit")
METRICS += ("ctr", "ctr fused", "dwell", "dwell fused")
GROUPS = ("all", *evidence.KINDS, *evidence.STRATA)
LEVEL = {"before": 30.0, "nll": 33.0, "mix-1": 33.5, "adagrpo": 35.0}
LEVEL[evidence.MIXTURE] = 34.0
WEIGHTS = ("0", "1", "2", "4", "8", "16", "32")

# What words.md has and evidence.py does not fill: written by hand.
BY_HAND = {"movielens", "pregrid", "commands"}


def record(seed: int, arm: str, level: float, **changes) -> dict:
    """A record whose figures are all `level`, and 1 more with the ranker at serving."""
    figures = {}
    for group in GROUPS:
        figures[group] = dict.fromkeys(METRICS, level)
        figures[group]["hr@10 fused"] = level + 1
    figures["validation"] = dict.fromkeys(WEIGHTS, level) | {"w": 8}
    figures["training"] = {"admitted": 25.0, "absent": 50.0, "outscored": 90.0}
    figures["training"]["weight"] = 4.0
    if arm == "diagnosis":
        figures["diagnosis"] = "Yes: about +1.2 points."
    world = evidence.DEFAULTS | changes
    return {"seed": seed, "arm": arm, "world": world, "figures": figures}


def main_records(seeds: tuple[int, ...] = (60, 61, 62)) -> list[dict]:
    """All arms; from seed to seed every level rises by 0.1."""
    records = []
    for seed in seeds:
        for arm in dict.fromkeys(evidence.ARMS + evidence.AFTER_CLICKS):
            level = LEVEL.get(arm, 33.2) + 0.1 * (seed - 60)
            records.append(record(seed, arm, level))
    return records


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def cells(table: str) -> list[list[str]]:
    """The rows below the head. Every row has as many cells as the head."""
    rows = []
    for line in table.splitlines():
        assert line.startswith("| ") and line.endswith(" |"), line
        rows.append(line[2:-2].split(" | "))
    for row in rows:
        assert len(row) == len(rows[0]), row
    assert set(rows[1]) == {"---"}
    return rows[2:]


# --------------------------------------------------------------------------- statistics


def test_an_interval_is_students_over_seeds():
    """1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3); t of 2 degrees is 4.303."""
    mean, half = evidence.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert evidence.interval([7.0]) == (7.0, math.inf)
    assert evidence.plus_minus([7.0], "+") == "+7.00 (one seed)"
    assert evidence.plus_minus([]) == "-"


@pytest.mark.parametrize(
    ("seeds", "t"), [(2, 12.706), (10, 2.262), (30, 2.045), (31, 2.042), (100, 2.042)]
)
def test_more_seeds_than_the_table_has(seeds, t):
    """0 and 2 by turns; beyond 31 seeds the last quantile serves, which is wider."""
    values = [2.0 * (seed % 2) for seed in range(seeds)]
    mean = sum(values) / seeds
    squares = sum((value - mean) ** 2 for value in values)
    half = t * math.sqrt(squares / (seeds - 1) / seeds)
    assert evidence.interval(values) == pytest.approx((mean, half))


@pytest.mark.parametrize(
    ("gains", "bound", "word"),
    [
        ([1.0, 1.1], 0.0, "holds"),
        ([-1.0, -1.1], 0.0, "fails"),
        ([-1.0, 1.5], 0.0, "undecided"),
        ([-0.2, -0.3], -1.0, "holds"),
        ([1.0, 1.1], 1.5, "undecided"),
        ([1.0, 1.01], 1.5, "fails"),
        ([9.0], 0.0, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(gains, bound, word):
    """1 and 1.1: half-width 12.706 * 0.05 = 0.64, so 1.5 lies within."""
    assert evidence.verdict(gains, bound) == word


def test_median_and_range_by_hand():
    assert evidence.median_and_range([0.5, 0.1, 0.2]) == "0.20 (0.10 to 0.50)"
    assert evidence.median_and_range([]) == "-"


def test_a_difference_is_taken_by_seed_before_the_mean(tmp_path):
    """The seed without adagrpo counts for nothing."""
    records = [record(60, "nll", 10), record(61, "nll", 20), record(62, "nll", 90)]
    records += [record(61, "adagrpo", 21.5), record(60, "adagrpo", 11.5)]
    study, _, _ = evidence.read([write(tmp_path / "runs.jsonl", records)])
    assert study.gain("adagrpo") == [1.5, 1.5]
    assert evidence.plus_minus(study.gain("adagrpo"), "+") == "+1.50 ±0.00"
    assert evidence.against_nll(study, "nll").startswith("40.00 ±")
    assert study.added("adagrpo") == [1, 1]
    assert study.level("adagrpo", "hr@10") == {60: 11.5, 61: 21.5}


def test_a_group_that_is_empty_for_a_seed_is_left_out():
    study = Study({})
    for seed, level in ((60, math.nan), (61, 5.0)):
        study.runs[seed, "nll"] = {"trend": {"hr@10": level}}
    assert study.level("nll", "hr@10", "trend") == {61: 5.0}
    assert study.levels("nll", "hr@10", "niche") == []


# -------------------------------------------------------------------------- the studies


def tuning(seed: int, arm: str, alone: float, **changes) -> dict:
    """A development record; fused: 7 with the best w, whichever it is."""
    one = record(seed, arm, 99.0, **changes)
    one["figures"]["validation"] = {"0": alone, "4": 7.0, "8": 6.0, "w": 32}
    return one


def test_development_seeds_speak_through_validation_users_only(tmp_path):
    """Their test users say 99. Seeds 3 and 4 ran both arms: 1.5 and 2.5 more."""
    records = [tuning(3, "nll", 3.0), tuning(4, "nll", 3.0), tuning(2, "nll", 0.0)]
    records += [
        tuning(3, "adagrpo-2,lr=1e-3", 4.5),
        tuning(4, "adagrpo-2,lr=1e-3", 5.5),
    ]
    del records[-1]["figures"]["all"]  # --validation has no test users
    records += [tuning(3, "adagrpo-10", 5.0), tuning(3, "adagrpo-2,draws=8", 6.0)]
    records += [tuning(3, "whole", 2.0), tuning(3, "whole", 9.0, bias=0.5)]
    file = write(tmp_path / "a.jsonl", [*main_records(), *records])
    study, variations, development = evidence.read([file])
    assert study.seeds() == {60, 61, 62}
    assert variations == []
    half = 12.706 * 0.5
    assert cells(evidence.development_table(development)) == [
        ["adagrpo", f"2, lr=1e-3: +2.00 ±{half:.2f} (2 seeds); 10: +2.00 (one seed)"],
        ["adagrpo, drawn", "2, draws=8: +3.00 (one seed)"],
        ["whole", "default: -1.00 (one seed)"],
    ]
    everything = evidence.tables_of(study, variations, development)
    assert "99.0" not in "".join(everything.values())


def test_grids_compare_with_the_default_on_the_same_seeds(tmp_path):
    """Slates are fixed: a small feed's ranker is compared with its own three passes."""
    records = [tuning(0, "nll", 5.0), tuning(1, "nll", 7.0)]
    records += [tuning(1, "nll", 6.0, pretrain_epochs=4), tuning(1, "nll", 1.0, bias=0)]
    records += [tuning(0, "before", 1.0), tuning(0, "before", 1.0, slates=50)]
    records.append(tuning(0, "before", 1.0, slates=50, ranker_epochs=10))
    records[-1]["figures"]["validation"]["4"] = 6.5
    file = write(tmp_path / "a.jsonl", [*main_records(), *records])
    main, variations, development = evidence.read([file])
    tables = evidence.tables_of(main, variations, development)
    assert cells(tables["pretraining"]) == [
        ["0.005", "4", "6.00", "-1.00 (one seed)"],
        ["0.005", "12", "6.00", "+0.00 ±0.00"],
    ]
    assert cells(tables["passes"]) == [
        ["50", "3", "7.00", "+0.00 (one seed)"],
        ["50", "10", "6.50", "-0.50 (one seed)"],
        ["200000", "3", "7.00", "+0.00 (one seed)"],
    ]


def test_a_variation_has_its_own_records_only(tmp_path):
    records = main_records()
    records.append(record(60, "adagrpo", 36, bias=0.0))
    records += [record(60, arm, 20, slates=5) for arm in ("nll", "adagrpo")]
    _, variations, _ = evidence.read([write(tmp_path / "a.jsonl", records)])
    alone = evidence.variation(variations, bias=0.0)
    assert alone.level("adagrpo", "hr@10") == {60: 36}
    assert alone.gain("adagrpo") == []
    own = evidence.variation(variations, slates=5)
    assert own.gain("adagrpo") == [0]
    assert evidence.variation(variations, bias=0.7).runs == {}


def test_several_files_are_one_study_and_one_without_a_main_study_is_refused(tmp_path):
    files = [write(tmp_path / f"{s}.jsonl", main_records((s,))) for s in (60, 61)]
    study, _, _ = evidence.read(files)
    assert study.seeds() == {60, 61}
    other = write(tmp_path / "other.jsonl", [record(60, "nll", 30, bias=0.0)])
    with pytest.raises(SystemExit, match="defaults of adagrpo.py"):
        evidence.read([other])


# ------------------------------------------------------------------------------- tables


def test_claims_against_their_bounds(tmp_path):
    """adagrpo leads by the same on every seed."""
    records = main_records()
    study, _, _ = evidence.read([write(tmp_path / "a.jsonl", records)])
    rows = cells(evidence.claims_table(study))
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert found["1", "over nll"] == ["+2.00 ±0.00", "holds"]
    for number, arms in evidence.CLAIMS.items():
        for arm in arms:
            gain = f"{35 - LEVEL.get(arm, 33.2):+.2f} ±0.00"
            assert found[str(number), f"over {arm}"] == [gain, "holds"]
    assert {row[0] for row in rows} == {"1", "2", "3", "4", "5"}

    for (_, arm), figures in study.runs.items():
        level = {"nll": 30.4, "mix-1": 28.7}.get(arm, 30.0)
        figures["all"]["hr@10 fused"] = level
    rows = cells(evidence.claims_table(study))
    assert [row[2:] for row in rows[-2:]] == [
        ["-0.40 ±0.00", "holds"],  # no worse than by 0.5
        ["+1.30 ±0.00", "fails"],  # not ahead by 1.5
    ]


def test_an_arm_that_was_not_run_has_no_row(tmp_path):
    records = [record(60, arm, LEVEL[arm]) for arm in ("nll", "adagrpo")]
    study, _, _ = evidence.read([write(tmp_path / "a.jsonl", records)])
    arms = [row[0] for row in cells(evidence.arms_table(study, evidence.ARMS))]
    assert arms == ["nll", "adagrpo"]
    claims = [row[1] for row in cells(evidence.claims_table(study))]
    assert claims == ["over nll", "fused: over nll fused less 0.5"]


def test_rows_by_hand(tmp_path):
    """nll is a level, others are differences; the dose is weight times admitted."""
    study, _, _ = evidence.read([write(tmp_path / "a.jsonl", main_records())])
    nll, adagrpo = cells(evidence.arms_table(study, ["nll", "adagrpo"]))
    half = 4.303 * 0.1 / math.sqrt(3)
    assert nll[1:3] == [f"33.10 ±{half:.2f}", f"34.10 ±{half:.2f}"]
    assert adagrpo[1:3] == ["+2.00 ±0.00", "+2.00 ±0.00"]
    assert adagrpo[-3:] == ["35.10 (35.00 to 35.20)", "8", "-"]
    assert nll[-1] == "+2.00 ±0.00"

    rows = cells(evidence.leads_table(study, "adagrpo", ["nll", "mix-1", "adagrpo"]))
    assert [row[:2] for row in rows] == [
        ["nll", "+2.00 ±0.00"],
        ["nll, the ranker at every request", "+1.00 ±0.00"],
        ["nll, a table of click rates", "+2.00 ±0.00"],
        ["mix-1", "+1.50 ±0.00"],
    ]
    assert cells(evidence.training_table(study, ["adagrpo"])) == [
        ["adagrpo", "25.00 ±0.00", "1.00 ±0.00", "50.00 ±0.00", "90.00 ±0.00"]
    ]


def test_rankers_and_worlds_stand_beside_the_main_study_on_their_seeds(tmp_path):
    """Only seed 60 ran elsewhere: adagrpo 37 with a ranker of noise, 36 without bias."""
    records = [*main_records(), record(60, "diagnosis", 33)]
    for arm in ("before", "nll", "diagnosis"):
        records.append(record(60, arm, 33, ranker="noise"))
    records[-1]["figures"]["diagnosis"] = "No: nothing to teach."
    records += [record(60, "adagrpo", 37, ranker="noise")]
    records += [record(60, "nll", 33, bias=0.0), record(60, "adagrpo", 36, bias=0.0)]
    main, variations, _ = evidence.read([write(tmp_path / "a.jsonl", records)])
    tables = evidence.tables_of(main, variations, [])
    rankers = {row[0]: row[1:] for row in cells(tables["rankers"])}
    assert rankers["200,000 slates"][-4:] == ["+2.00 (one seed)", "25", "25", "yes x1"]
    assert rankers["noise"][-4:] == ["+4.00 (one seed)", "-", "25", "no x1"]
    assert "20,000 slates" not in rankers  # it was not run
    worlds = {row[0]: row[1:] for row in cells(tables["worlds"])}
    assert worlds.keys() == {"main, the same seeds", "bias 0"}
    assert worlds["main, the same seeds"][0] == worlds["bias 0"][0] == "1"
    assert worlds["bias 0"][-2:] == ["+3.00 (one seed)", "-"]


def test_every_arm_with_settings_or_draws_has_a_row(tmp_path):
    arms = ["adagrpo,lr=1e-3", "adagrpo-2,draws=8", "adagrpo,draws=8,epochs=2"]
    records = [*main_records(), *[record(60, arm, 36) for arm in arms]]
    main, variations, _ = evidence.read([write(tmp_path / "a.jsonl", records)])
    tables = evidence.tables_of(main, variations, [])
    (settings,) = cells(tables["settings"])
    one_seed = ["+3.00 (one seed)", "+1.00 (one seed)", "+1.00 (one seed)"]
    assert settings == ["adagrpo,lr=1e-3", "1", "25.00 (one seed)", *one_seed]
    drawn = [row[0] for row in cells(tables["drawn"])]
    assert drawn == ["nll", "adagrpo,draws=8,epochs=2", "adagrpo-2,draws=8"]
    training = [row[0] for row in cells(tables["training"])]
    assert training[-2:] == drawn[1:]


# ------------------------------------------------------------------------- RESULTS.md


def full_records() -> list[dict]:
    """Main study, variations and development."""
    records = [*main_records(), record(0, "nll", 30), record(0, "adagrpo", 31)]
    records += [record(0, "whole", 30), record(0, "nll", 29, pretrain_epochs=4)]
    records += [record(0, "before", 20), record(0, "before", 20, ranker_epochs=1)]
    records += [record(60, "diagnosis", 33), record(60, "adagrpo-2,draws=8", 34)]
    records += [record(60, "adagrpo-2", 34), record(60, "adagrpo-10", 34)]
    for changes in ({"ranker": "exposure"}, {"ranker": "noise"}, {"bias": 0.0}):
        for arm in ("before", "nll", "mix-1", "adagrpo"):
            records.append(record(60, arm, LEVEL[arm], **changes))
    return records


def test_every_table_has_all_its_cells(tmp_path):
    main, variations, development = evidence.read(
        [write(tmp_path / "a.jsonl", full_records())]
    )
    for name, table in evidence.tables_of(main, variations, development).items():
        assert len(cells(table)) > 1, name
        assert "nan" not in table, name


def test_words_and_tables_have_the_same_names(tmp_path):
    words = (evidence.HERE / "words.md").read_text(encoding="utf-8")
    names = re.findall(r"{(\w+)}", words)
    main, variations, _ = evidence.read([write(tmp_path / "a.jsonl", main_records())])
    filled = evidence.tables_of(main, variations, []).keys()
    assert len(names) == len(set(names))
    assert set(names) <= filled | BY_HAND
    assert filled <= set(names)


def test_results_are_the_words_with_the_tables(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", full_records())
    results = tmp_path / "R.md"
    evidence.main([str(file), "--results", str(results)])
    text = results.read_text(encoding="utf-8")
    assert set(re.findall(r"{(\w+)}", text)) <= BY_HAND
    assert text.startswith("# Results\n")
    main, variations, development = evidence.read([file])
    for name, table in evidence.tables_of(main, variations, development).items():
        assert f"\n{table}\n" in text, name
    assert "| over nll |" in capsys.readouterr().out


def test_the_picture_is_drawn(tmp_path):
    """Bars of every arm; the same figures give the same file."""
    pytest.importorskip("matplotlib")
    file = write(tmp_path / "a.jsonl", main_records())
    study, _, _ = evidence.read([file])
    evidence.draw(study, evidence.SHORT, tmp_path / "a.svg")
    evidence.draw(study, evidence.SHORT, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text
    for arm in evidence.SHORT:
        for line in arm.split(","):
            assert f"<!-- {line} -->" in text
    assert (tmp_path / "b.svg").read_text() == text


# ------------------------------------------------------------- README and the records

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records.jsonl"
ROWS = {
    "NLL": "nll",
    "NLL on the ranker's clicks first": "clicks",
    "best fixed mixture": evidence.MIXTURE,
    "random gate": "random",
    "level gate": "level-3.5",
    "**AdaGRPO**": "adagrpo",
    "clicks first, then AdaGRPO": "adagrpo,clicks=1",
}


def test_the_readmes_table_is_the_records():
    main, _, _ = evidence.read([RECORDS])
    readme = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if "±" in line]
    rows = [line[2:-2].split(" | ") for line in lines]
    assert [row[0] for row in rows] == list(ROWS)
    for name, *figures in rows:
        for metric, figure in zip(("hr@10", "hr@10 fused"), figures, strict=True):
            sign = "+"
            values = main.gain(ROWS[name], "nll", metric)
            if name == "NLL":
                sign = ""
                values = main.levels("nll", metric)
            mean, half = evidence.interval(values)
            assert figure.replace("*", "") == f"{mean:{sign}.1f} ±{half:.1f}", name
