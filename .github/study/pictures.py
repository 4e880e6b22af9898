# SPDX-License-Identifier: MIT
"""The two charts of README and RESULTS.md: `evidence.py ... --pictures .github`.

Needs matplotlib (pip install matplotlib), which is not in requirements.txt. The data
flow, flow.svg, is drawn by hand.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "adagrpo"  # the same figures, the same file

import matplotlib.pyplot as plt
import numpy as np
from evidence import Study, interval, paired

CORNERS = ("unsure, often", "unsure, seldom", "sure, often", "sure, seldom")
ALONE = ("nll", "mix-0.3", "mix-1", "adagrpo")


def save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def strata(study: Study, file: Path) -> None:
    """What the ranker adds before training, and the gains over nll after it."""
    bars = {"ranker adds, before": [], "mix-1 over nll": [], "adagrpo over nll": []}
    for group in CORNERS:
        fused = study.level("before", "hr@10 fused", group)
        alone = study.level("before", "hr@10", group)
        bars["ranker adds, before"].append(interval(paired(fused, alone)))
        for arm in ("mix-1", "adagrpo"):
            bars[f"{arm} over nll"].append(interval(study.gain(arm, group=group)))

    figure, axes = plt.subplots(figsize=(7, 3.6))
    place = np.arange(len(CORNERS))
    colours = ("#bdbdbd", "#3182bd", "#d95f02")
    for shift, (name, heights), colour in zip((-0.27, 0, 0.27), bars.items(), colours):
        means = [mean for mean, _ in heights]
        halves = [half for _, half in heights]
        axes.bar(place + shift, means, 0.25, yerr=halves, label=name, color=colour)
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [group.replace(", ", "\nshown ") for group in CORNERS]
    axes.set_xticks(place, [f"policy {label}" for label in labels])
    axes.set_ylabel("points of HR@10")
    axes.legend(frameon=False)
    save(figure, file)


def serving(study: Study, file: Path) -> None:
    """HR@10 of the policy alone, and with the ranker at serving."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    place = np.arange(len(ALONE))
    for shift, metric, label, colour in (
        (-0.2, "hr@10", "policy alone", "#d95f02"),
        (0.2, "hr@10 fused", "with the ranker at serving", "#bdbdbd"),
    ):
        levels = [interval(study.levels(arm, metric)) for arm in ALONE]
        means = [mean for mean, _ in levels]
        halves = [half for _, half in levels]
        axes.bar(place + shift, means, 0.38, yerr=halves, label=label, color=colour)
    axes.set_xticks(place, ALONE)
    axes.set_ylabel("HR@10, %")
    axes.set_ylim(bottom=25)
    axes.legend(frameon=False)
    save(figure, file)


def draw(study: Study, folder: Path) -> None:
    strata(study, folder / "strata.svg")
    serving(study, folder / "serving.svg")
