# SPDX-License-Identifier: MIT
"""The pictures of evidence.py as plain SVG. An interval is (mean, half-width)."""

import html
import itertools
import math
from pathlib import Path

import numpy as np

# A picture is 560 units wide: at 400 pixels its letters are still 10 pixels high.
WIDTH = 560
TOP = 74
BOTTOM = 390
LEFT = 66
RIGHT = WIDTH - 12

LINES = ("#1b7837", "#c44601")
GRID = "#e0e0e0"
BOLD = 'font-weight="bold"'
SMALL = 'font-size="13"'


def text(x: float, y: float, words: str, anchor="middle", more="") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{html.escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour="black", width=1.0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}"/>'


def upright(x: float, y: float, words: str) -> str:
    """An axis title that runs upwards."""
    return text(x, y, words, more=f'transform="rotate(-90 {x:.1f} {y:.1f})"')


def save(file: Path, height: float, title: str, parts: list[str]) -> None:
    """On a white card, so that it can be read on a dark page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
    head += ' font-family="Helvetica, Arial, sans-serif" font-size="14" role="img">'
    name = f"<title>{html.escape(title)}</title>"
    card = box(0, 0, WIDTH, height, "white")
    title = text(WIDTH / 2, 24, title, more=f'font-size="16" {BOLD}')
    file.write_text("\n".join([head, name, card, title, *parts, "</svg>\n"]))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, 8 of them at most."""
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50):
        if (high - low) / step <= 7:
            break
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [step * i for i in range(first, last + 1)]


def reach(interval: tuple[float, float]) -> tuple[float, float]:
    """Both ends of an interval; a single seed has none and reaches nowhere."""
    mean, half = interval
    if math.isinf(half):
        half = 0
    return mean - half, mean + half


def all_ends(intervals) -> list[float]:
    return [end for interval in intervals for end in reach(interval)]


# ------------------------------------------------------------------------------ bars


def bars(file: Path, title: str, groups: dict, colours: dict, gains: dict) -> None:
    """Bars of gains[group, arm], an interval each; one that was not run is left out.

    groups: {group: lines of words under it}; colours: {arm: colour}, ours last, which
    carries its figure.
    """
    arms = list(colours)
    ends = [*all_ends(gains.values()), -1, 1]
    room = 0.06 * (max(ends) - min(ends))  # for the figure above the highest whisker
    low = min(ends)
    high = max(ends) + room

    def up(value):
        return float(np.interp(value, (low, high), (BOTTOM, TOP)))

    parts = [upright(18, (TOP + BOTTOM) / 2, "HR@10, points against nll")]
    for tick in ticks(low, high):
        words = "0"
        if tick:
            words = f"{tick:+g}"
        parts.append(line(LEFT, up(tick), RIGHT, up(tick), GRID))
        parts.append(text(LEFT - 7, up(tick) + 5, words, "end"))

    # The legend: a coloured square and a name, about 7 units a letter.
    widths = [32 + 7 * len(arm) for arm in arms]
    x = (WIDTH - sum(widths)) / 2
    for arm, width in zip(arms, widths, strict=True):
        parts.append(box(x, 43, 12, 12, colours[arm]))
        parts.append(text(x + 17, 54, arm, "start"))
        x += width

    share = (RIGHT - LEFT) / len(groups)
    step = 0.84 * share / len(arms)
    for i, (group, below) in enumerate(groups.items()):
        middle = LEFT + share * (i + 0.5)
        for row, words in enumerate(below):
            parts.append(text(middle, BOTTOM + 24 + 18 * row, words))
        for j, arm in enumerate(arms):
            if (group, arm) not in gains:
                continue
            mean = gains[group, arm][0]
            bottom, top = reach(gains[group, arm])
            x = middle + step * (j + 0.5 - len(arms) / 2)
            height = abs(up(mean) - up(0))
            left = x - 0.45 * step
            parts.append(box(left, up(max(mean, 0)), 0.9 * step, height, colours[arm]))
            parts.append(line(x, up(bottom), x, up(top), width=1.5))
            if arm == arms[-1]:
                parts.append(text(x, up(max(top, 0)) - 6, f"{mean:+.1f}", more=BOLD))

    parts.append(line(LEFT, up(0), RIGHT, up(0), width=1.5))
    below = BOTTOM + 34 + 18 * max(len(words) for words in groups.values())
    note = "Above the line: better than nll. Whiskers: 95% intervals over seeds."
    parts.append(text(WIDTH / 2, below, note, more=SMALL))
    save(file, below + 14, title, parts)


# -------------------------------------------------------------------------- frontier


def free_spots(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """For the number of each point: the nearest place clear of points and numbers."""
    taken = list(points)
    spots = []
    for x, y in points:
        spot = x, y
        for distance, angle in itertools.product(range(15, 150, 5), range(15, 375, 30)):
            turn = math.radians(angle)
            tried = x + distance * math.cos(turn), y - distance * math.sin(turn)
            inside = LEFT + 12 < tried[0] < RIGHT and TOP + 8 < tried[1] < BOTTOM - 8
            if inside and all(math.dist(tried, other) > 15 for other in taken):
                spot = tried
                break
        spots.append(spot)
        taken.append(spot)
    return spots


def frontier(file: Path, hits: dict, invalid: dict, joined: list[tuple]) -> None:
    """HR@10 (up) against hallucination (across), {arm: interval}, arms numbered.

    The arms of each tuple in `joined` are joined by a line of one colour.
    """
    ends = all_ends(hits.values()) or [0]
    low = min(ends) - 0.3
    high = max(ends) + 0.3
    most = 1.05 * max(all_ends(invalid.values()), default=1) + 0.01

    def up(value):
        return float(np.interp(value, (low, high), (BOTTOM, TOP)))

    def across(value):  # the square root gives the crowd near 0 its room
        share = math.sqrt(max(value, 0) / most)
        return LEFT + 12 + share * (RIGHT - LEFT - 12)

    parts = [upright(18, (TOP + BOTTOM) / 2, "HR@10, %")]
    good = "up and to the left is better: more hits, fewer invented items"
    parts.append(text(WIDTH / 2, 48, good, more='font-style="italic"'))
    for tick in ticks(low, high):
        parts.append(line(LEFT, up(tick), RIGHT, up(tick), GRID))
        parts.append(text(LEFT - 7, up(tick) + 5, f"{tick:g}", "end"))
    last = -math.inf
    for tick in (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50):
        if tick <= most and across(tick) - last > 36:
            last = across(tick)
            parts.append(line(last, TOP, last, BOTTOM, GRID))
            parts.append(text(last, BOTTOM + 19, f"{tick:g}"))
    parts.append(line(across(0), TOP, across(0), BOTTOM, width=1.5))
    words = "hallucination in the top 10, % (square-root axis)"
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 41, words))

    points = {arm: (across(invalid[arm][0]), up(hits[arm][0])) for arm in hits}
    colours = dict.fromkeys(points, "black")
    for arms, colour in zip(joined, LINES, strict=True):
        path = [arm for arm in arms if arm in points]
        colours |= dict.fromkeys(path, colour)
        for start, end in itertools.pairwise(path):
            parts.append(line(*points[start], *points[end], colour, 1.5))
    if "nll" in colours:
        colours["nll"] = "black"  # where both lines begin

    # Whiskers first, then points and numbers, so that nothing covers a number.
    for arm, (x, y) in points.items():
        bottom, top = reach(hits[arm])
        fewest, most_of_arm = reach(invalid[arm])
        parts.append(line(x, up(bottom), x, up(top), colours[arm], 0.7))
        parts.append(line(across(fewest), y, across(most_of_arm), y, colours[arm], 0.7))
    spots = free_spots(list(points.values()))
    for spot, (x, y) in zip(spots, points.values(), strict=True):
        parts.append(line(x, y, *spot, "#888888", 0.7))
    halo = 'stroke="white" stroke-width="4" paint-order="stroke" ' + BOLD
    first_row = BOTTOM + 70
    for i, arm in enumerate(points):
        x, y = points[arm]
        fill = f'fill="{colours[arm]}"'
        number = str(i + 1)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {fill}/>')
        parts.append(text(spots[i][0], spots[i][1] + 5, number, more=f"{fill} {halo}"))

        # The legend stands below, in three columns.
        column = 72 + 170 * (i % 3)
        row = first_row + 19 * (i // 3)
        parts.append(text(column, row, number, "end", f"{fill} {BOLD}"))
        parts.append(text(column + 8, row, arm, "start", fill))

    height = first_row + 19 * math.ceil(len(points) / 3) + 6
    note = "Whiskers: 95% intervals (up: of the paired difference to nll)."
    parts.append(text(WIDTH / 2, height, note, more=SMALL))
    title = "Retrieval and validity: HR@10 against hallucination"
    save(file, height + 14, title, parts)
