# SPDX-License-Identifier: MIT
"""Tests of evidence.py and pictures.py, on made-up records of study.py."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evidence

METRICS = ("hr@10", "hr@10 fused", "recall@32", "ndcg@10", "hallucination", "share")
METRICS += ("ctr", "dwell", "auc in group", "hard", "clear", "admit")
GROUPS = ("all", *evidence.KINDS, *evidence.VERDICTS, *evidence.STRATA)
LEVEL = {"before": 30.0, "nll": 33.0, "mix-0.3": 34.0, "mix-1": 33.5, "adagrpo": 35.0}


def record(seed: int, arm: str, level: float, **changes) -> dict:
    """A record whose figures are all `level`, and 1 more with the ranker at serving."""
    figures = {}
    for group in GROUPS:
        figures[group] = dict.fromkeys(METRICS, level)
        figures[group]["hr@10 fused"] = level + 1
    figures["validation"] = {"hr@10": level, "w": 8}
    figures["training"] = {"admitted": 25.0, "absent": 50.0, "outscored": 90.0}
    figures["training"]["weight"] = 5.0
    settings = evidence.DEFAULTS | changes
    settings.pop("seed")
    return {"seed": seed, "arm": arm, "settings": settings, "figures": figures}


def main_records(seeds: tuple[int, ...] = (50, 51, 52)) -> list[dict]:
    records = []
    for seed in seeds:
        for arm in evidence.ARMS:
            records.append(record(seed, arm, LEVEL.get(arm, 33.2) + 0.1 * seed))
    return records


def write(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_an_interval_is_students_over_seeds():
    """1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3); t of 2 degrees is 4.30."""
    mean, half = evidence.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.30 / math.sqrt(3))
    assert evidence.interval([7.0]) == (7.0, math.inf)


def test_a_difference_is_taken_by_seed_before_the_mean(tmp_path):
    records = [record(50, "nll", 10), record(51, "nll", 20), record(52, "nll", 90)]
    records += [record(50, "adagrpo", 11), record(51, "adagrpo", 21)]
    study, _, _ = evidence.read([write(tmp_path / "runs.json", records)])
    assert study.gain("adagrpo") == [1, 1]
    assert evidence.plus_minus(study.gain("adagrpo"), "+") == "+1.00 ±0.00"


@pytest.mark.parametrize(
    ("gains", "word"),
    [([1.0, 1.1], "holds"), ([-1.0, -1.1], "fails"), ([-1.0, 1.5], "undecided")],
)
def test_a_verdict_needs_the_whole_interval(gains, word):
    assert evidence.verdict(gains) == word


def test_validation_and_not_test_users_pick_an_arm_for_every_seed(tmp_path):
    records = []
    for seed, validation in {50: (3, 4), 51: (6, 5)}.items():
        for arm, level in zip(("nll", "nll@6"), validation, strict=True):
            one = record(seed, arm, level=10 - level)  # the test users say the reverse
            one["figures"]["validation"]["hr@10"] = level
            records.append(one)
        records.append(record(seed, "adagrpo", 10))
    study, _, _ = evidence.read([write(tmp_path / "runs.json", records)])
    gains, names = study.over_picked(("nll", "nll@6"))
    assert study.picked(("nll", "nll@6")) == {50: "nll@6", 51: "nll"}
    assert gains == [10 - 6, 10 - 4]
    assert names == "nll@6 x1, nll x1"


def test_of_several_comparisons_the_weakest_decides():
    study = evidence.Study({})
    for seed in (50, 51, 52):
        for arm in evidence.ARMS:
            level = {"adagrpo": 35.0, "random": 34.9}.get(arm, 30.0)
            study.runs[seed, arm] = record(seed, arm, level + 0.01 * seed)["figures"]
    row = evidence.claims_table(study).splitlines()[-1]
    assert "weakest: random" in row
    assert "+0.10" in row


def test_a_variation_borrows_nll_only_where_its_policy_cannot_differ(tmp_path):
    records = main_records()
    records += [record(50, "adagrpo", 36, bias=0.0)]
    records += [record(50, "adagrpo", 36, max_grad_norm=50.0)]
    _, variations, _ = evidence.read([write(tmp_path / "runs.json", records)])
    assert evidence.variation(variations, bias=0.0).gain("adagrpo") == [36 - 38]
    assert evidence.variation(variations, max_grad_norm=50.0).gain("adagrpo") == []
    assert evidence.variation(variations, bias=0.7).runs == {}


def test_development_seeds_stay_out_of_the_study(tmp_path):
    records = [*main_records(), record(3, "adagrpo", 99)]
    study, _, development = evidence.read([write(tmp_path / "runs.json", records)])
    assert {seed for seed, _ in study.runs} == {50, 51, 52}
    assert [one["seed"] for one in development] == [3]
    assert "| - | - | - | 99.0 | - | - | - |" in evidence.development_table(development)


def test_variations_stand_beside_the_main_study_on_their_seeds(tmp_path):
    """Seeds 50, 51, 52 of adagrpo gain 2; in the variation seed 50 alone, 36 - 38."""
    records = [*main_records(), record(50, "adagrpo", 36, bias=0.0)]
    records += [record(50, "adagrpo", 9, decode="sample")]
    main, variations, _ = evidence.read([write(tmp_path / "runs.json", records)])
    rows = evidence.variations_table(main, variations).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:2] for row in cells] == [
        ["main study", "3"],
        ["main study", "1"],
        ["bias 0.0", "1"],
    ]
    leads = [row[-1] for row in cells]
    assert leads == ["+2.00 ±0.00", "+2.00 (one seed)", "-2.00 (one seed)"]


def test_what_the_bias_costs_is_paired(tmp_path):
    """Seed 50 alone ran without bias: mix-1 38.8 there, 38.5 with it, nll 38."""
    records = [*main_records(), record(50, "mix-1", 38.8, bias=0.0)]
    main, variations, _ = evidence.read([write(tmp_path / "runs.json", records)])
    row = evidence.bias_table(main, variations).splitlines()[3]
    assert row == (
        "| mix-1 | +0.80 (one seed) | - | +0.50 (one seed) | +0.30 (one seed) |"
    )


def test_the_share_of_what_the_ranker_adds_is_taken_by_seed():
    """It adds 4 and 2 points; adagrpo has 2 of them on both seeds: 50% and 100%."""
    study = evidence.Study({})
    for seed, added in {50: 4, 51: 2}.items():
        nll = record(seed, "nll", 30)["figures"]
        nll["all"]["hr@10 fused"] = 30 + added
        study.runs[seed, "nll"] = nll
        study.runs[seed, "adagrpo"] = record(seed, "adagrpo", 32)["figures"]
    assert "has 75.00" in evidence.ceiling_sentence(study)
    assert "adds 3.00" in evidence.ceiling_sentence(study)


def test_rankers_stand_beside_the_main_one_on_their_seeds(tmp_path):
    """Seed 50: nll 38, fused 39; adagrpo 40, and 37 with a ranker of noise."""
    records = [*main_records(), record(50, "adagrpo", 37, noise_ranker=True)]
    main, variations, _ = evidence.read([write(tmp_path / "runs.json", records)])
    _, _, best, *_, noise = evidence.rankers_table(main, variations).splitlines()
    assert "| 200,000 slates | +1.00 (one seed) |" in best
    assert "| +2.00 (one seed) | 25.00 (one seed) |" in best
    assert "| -1.00 (one seed) | 25.00 (one seed) |" in noise


def test_results_have_every_table_and_no_hole(tmp_path):
    records = [*main_records(), record(0, "nll", 30)]
    records += [record(50, "gradients", 0)]
    records[-1]["figures"] = {"cosine": {"beam": 0.7, "sample": 0.9}}
    records += [record(50, arm, 35, decode="sample") for arm in ("mix-1", "adagrpo")]
    records += [record(50, arm, 31, noise_ranker=True) for arm in ("mix-1", "adagrpo")]
    runs = write(tmp_path / "runs.json", records)
    evidence.main([str(runs), "--results", str(tmp_path / "R.md")])
    text = (tmp_path / "R.md").read_text()
    assert "{" not in text
    assert "| over nll" in text
    assert "| decode sample" not in text.split("## Drawn groups")[0]


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import pictures

    runs = write(tmp_path / "runs.json", main_records())
    study, _, _ = evidence.read([runs])
    pictures.draw(study, tmp_path)
    for name in ("strata.svg", "serving.svg"):
        assert "<svg" in (tmp_path / name).read_text()
