# SPDX-License-Identifier: MIT
"""Tests of study.py: its rules by hand, a tiny study for real, its file, its processes.

Tests that stop a study look into /proc and are skipped where there is none.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import study
from study import Config, Gate, Split, adagrpo, toy_data

torch.set_num_threads(1)

TINY = {"pretrain": 300, "validation": 40, "feed": 600}
WORLD = {"noise_ranker": False, "season_correlation": 0.5, "slates": 500}
CONFIG = Config(users=16, epochs=1, group=8, pretrain_batch=16, pretrain_lr=0.01)


@pytest.fixture
def tiny(monkeypatch):
    """A shop and a test set that take no time."""
    monkeypatch.setattr(toy_data, "SIZES", toy_data.SIZES | TINY)
    monkeypatch.setattr(study, "TEST_USERS", 90)
    monkeypatch.setattr(study, "CLICK_STEPS", 2)


# ------------------------------------------------------------------------------- rules


def test_rules_by_hand():
    """Four samples: hard, hard and flat, hard and flat, easy. Rewards 0 and 1 spread by
    0.5; r(y) is 0.5, 0.05, 0.5, 0.5; the first and the third are trend users.
    """
    users = Split(np.arange(12).reshape(4, 3), None, np.array([0, 2, 0, 1]))
    shop = SimpleNamespace(kinds=toy_data.KINDS, posttrain=users)
    hard = torch.tensor([True, True, True, False])
    clear = torch.tensor([True, False, False, True])
    gate = Gate(hard & clear, hard, clear, None, None)
    history = torch.as_tensor(users.history)
    scored = SimpleNamespace(
        rewards=torch.tensor([[0.0, 1.0], [0.2, 0.2], [0.3, 0.39], [0.0, 1.0]]),
        target_reward=torch.tensor([0.5, 0.05, 0.5, 0.5]),
    )
    expected = {"mix": [0, 1, 2, 3], "centred": [0, 1, 2, 3]}
    expected |= {"difficulty": [0, 1, 2], "discriminability": [0, 3], "adagrpo": [0]}
    expected |= {"spread": [0], "level": [0, 2], "oracle": [0, 2]}
    for name, samples in expected.items():
        taken = study.rule_of(name, shop, [(history, scored)])(gate)
        assert taken.nonzero().flatten().tolist() == samples, name


def test_the_random_rule_takes_as_many_as_the_gate_and_others():
    """A third of them by chance: 90 of 300, within 5 standard deviations of 7."""
    admit = torch.arange(1000) < 300
    gate = Gate(admit, admit, admit, None, None)
    no_users = Split(np.zeros((0, 3)), None, np.zeros(0))
    shop = SimpleNamespace(kinds=toy_data.KINDS, posttrain=no_users)
    torch.manual_seed(0)
    taken = study.rule_of("random", shop, [])(gate)
    assert taken.sum() == 300
    assert 55 < (taken & admit).sum() < 125


def test_a_tally_counts_by_hand():
    """Of four samples three are admitted; one of these groups lacks its target, in two
    a negative outscores it.
    """
    admit = torch.tensor([True, True, True, False])
    scored = SimpleNamespace(
        hit=torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]]).bool(),
        rewards=torch.tensor([[0.5, 0.6], [0.1, 0.5], [0.6, 0.1], [0.9, 0.9]]),
        target_reward=torch.tensor([0.5, 0.5, 0.5, 0.5]),
    )
    tally = study.Tally(lambda gate: admit, [(None, scored)])
    assert torch.equal(tally(None), admit)
    expected = {"admitted": 75, "absent": 100 / 3, "outscored": 200 / 3}
    assert tally.figures() == pytest.approx(expected)


def test_an_arm_is_a_rule_a_weight_and_passes():
    config = Config(weight=5.0, epochs=3)
    assert study.parse_arm("nll", config) == ("nll", 5.0, 3)
    assert study.parse_arm("nll@6", config) == ("nll", 5.0, 6)
    assert study.parse_arm("spread-2.3", config) == ("spread", 2.3, 3)
    assert study.parse_arm("mix-1@2", config) == ("mix", 1.0, 2)


# ------------------------------------------------------------------- groups and figures


def test_groups_of_users_by_hand():
    """Nine users, ever surer. The feed showed item i i times, so the targets were shown
    seldom, medium, often; medium, medium, often; seldom, seldom, often.
    """
    target = np.array([0, 4, 8, 3, 5, 7, 1, 2, 6])
    shop = SimpleNamespace(
        kinds=("even", "odd"),
        tokens=np.zeros((9, 3)),
        shown=np.repeat(np.arange(9), np.arange(9)).reshape(9, 4),
        test=Split(None, target, np.arange(9) % 2),
    )
    hard = np.arange(9) < 4
    clear = np.arange(9) % 3 == 0
    before = {"confidence": np.arange(9.0), "hard": hard, "clear": clear}
    groups = [set() for _ in range(9)]
    for name, mask in study.groups_of(shop, before).items():
        for user in np.flatnonzero(mask):
            groups[user].add(name)
    assert groups[0] == {"all", "even", "unsure, seldom", "hard+clear"}
    assert groups[2] == {"all", "even", "unsure, often", "hard+unclear"}
    assert groups[5] == {"all", "odd", "middle, often", "easy+unclear"}
    assert groups[6] == {"all", "even", "sure, seldom", "easy+clear"}
    assert groups[8] == {"all", "even", "sure, often", "easy+unclear"}


def test_what_the_study_adds_to_the_metrics(tiny):
    """Items and confidence, user by user; more users than evaluate takes at once."""
    world = WORLD | {"noise_ranker": True}
    shop, policy, ranker = study.prepare(CONFIG, world)
    history = np.tile(shop.test.history, (2, 1))
    users = Split(history, np.tile(shop.test.target, 2), None)
    metrics = study.evaluate(policy, ranker, users, CONFIG)
    assert len(metrics["items"]) == len(metrics["confidence"]) == 180
    for user in range(0, 180, 7):
        prompt = policy.prompt(torch.as_tensor(users.history[user : user + 1]))
        tokens, logp = adagrpo.rollout(policy, prompt, 32, "beam")
        assert metrics["items"][user].tolist() == policy.items_of(tokens)[0].tolist()
        assert metrics["confidence"][user] == pytest.approx(logp[0, 0].item(), 1e-4)


def test_simulated_clicks_and_dwell_by_hand(monkeypatch):
    """Appeals 1 - 0.1, 0.5 + 0.4 and -1 + 0.4; the last place is a hallucination.

    P(click) = 1 / (1 + exp(-10 (appeal - 0.9))); a click is worth 60 s times appeal.
    """
    catalogue = SimpleNamespace(embedding=np.array([[1.0, 0], [0, 1.0], [-1.0, 0]]))
    quality = np.array([-0.1, 0.4, 0.4])
    taste = np.array([[1.0, 0.5]])
    monkeypatch.setattr(toy_data, "make_catalogue", lambda *_: catalogue)
    monkeypatch.setattr(toy_data, "make_qualities", lambda *_: (None, quality))
    monkeypatch.setattr(toy_data, "make_users", lambda *_: (None, taste))
    figures = study.simulated_clicks(CONFIG, WORLD, np.array([[0, 1, 2, -1]]))
    rare = 1 / (1 + np.exp(15))
    assert figures["ctr"] == pytest.approx([(0.5 + 0.5 + rare) / 4])
    assert figures["dwell"] == pytest.approx([(27 + 27) / 4])


def recorded(monkeypatch, name: str) -> list:
    """What a function of toy_data returns from now on."""
    returned = []
    original = getattr(toy_data, name)

    def spy(*arguments):
        returned.append(original(*arguments))
        return returned[-1]

    monkeypatch.setattr(toy_data, name, spy)
    return returned


def test_a_world_of_its_own(tiny, monkeypatch):
    """Its number of slates; with correlation 1 no quality changes; a ranker of noise is
    not trained, and its scores differ. The clicks are those of its own test users.
    """
    qualities = recorded(monkeypatch, "make_qualities")
    users = recorded(monkeypatch, "make_users")
    monkeypatch.setattr(adagrpo, "train_ranker", None)  # a call would fail
    world = {"noise_ranker": True, "season_correlation": 1.0, "slates": 123}
    shop, _, ranker = study.prepare(CONFIG, world)
    study.simulated_clicks(CONFIG, world, np.zeros((90, 10), dtype=int))
    assert len(shop.shown) == len(shop.feed_history) == 123
    assert np.allclose(*qualities[0])
    assert np.array_equal(qualities[0][1], qualities[1][1])
    assert np.array_equal(users[-1][0].history, shop.test.history)
    history = torch.as_tensor(shop.test.history)
    assert ranker.click_probability(history, history).std(1).min() > 0.01


def test_histories_of_the_feed_are_learned(tiny):
    """The likelihood of what its users bought rises; the policy at the start stays."""
    shop, start, ranker = study.prepare(CONFIG, WORLD | {"noise_ranker": True})
    history = torch.as_tensor(shop.feed_history)

    def log_likelihood(policy) -> float:
        """Of the last purchase, given those before it."""
        last = policy.item_tokens[history[:, -1]]
        prompt = policy.prompt(history[:, :-1])
        return adagrpo.log_prob(policy, prompt, last).mean().item()

    before = log_likelihood(start)
    policy, _ = study.post_trained("histories", shop, start, ranker, CONFIG)
    assert log_likelihood(policy) > before + 0.1
    assert log_likelihood(start) == before


ARMS = ["before", "nll", "adagrpo", "mix-1@2", "clicks", "histories", "oracle"]
ARMS += ["gradients"]


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_the_records_of_a_seed(tiny, tmp_path):
    """One seed for real: settings, and figures by kind, stratum and verdict."""
    file = tmp_path / "runs.json"
    study.run_seed(CONFIG, WORLD, ARMS, file)
    records = json.loads(file.read_text())
    assert [record["arm"] for record in records] == ARMS
    for record in records:
        assert {"seed": record["seed"], **record["settings"]} == vars(CONFIG) | WORLD
    by_arm = {record["arm"]: record["figures"] for record in records}
    cosines = by_arm["gradients"]["cosine"]
    assert cosines.keys() == {"beam", "sample"}
    assert all(-1 <= cosine <= 1 for cosine in cosines.values())
    levels = {by_arm[arm]["all"]["ctr"] for arm in ARMS[:-1]}
    assert len(levels) >= 4, "arms do not differ"  # so short an adagrpo may be nll

    figures = by_arm["adagrpo"]
    groups = {"all", *toy_data.KINDS, "unsure, often", "hard+clear", "validation"}
    assert groups | {"training"} < figures.keys()
    assert figures["training"]["weight"] == 5
    sizes = {"posttrain": CONFIG.users, "test": 90, "feed": WORLD["slates"]}
    kind = toy_data.make_shop(CONFIG.seed, CONFIG.bias, sizes).posttrain.kind
    trend = 100 * np.mean(kind == toy_data.KINDS.index("trend"))
    assert by_arm["oracle"]["training"]["admitted"] == trend
    everybody = figures["all"]
    shares = [everybody[x] for x in ("hr@5", "hr@10", "hr@20", "recall@32", "share")]
    assert shares == sorted(shares)
    assert 0 < shares[3] < shares[4] == 100
    kinds = [figures[kind] for kind in toy_data.KINDS]
    for name in ("hr@10", "ctr", "dwell", "hallucination"):
        mean = sum(kind["share"] * kind[name] for kind in kinds) / 100
        assert everybody[name] == pytest.approx(mean), name


# --------------------------------------------------------------------- the results file


@pytest.fixture
def fake_study(monkeypatch):
    """The study in this process. Its runs take no time; returns what was to be run."""
    ran = []

    def run_seed(config, world, arms, out):
        for arm in arms:
            ran.append((config.seed, arm))
            if ran[-1] == (1, "spread"):
                raise MemoryError("of this machine")
            settings = study.settings_of(config, world)
            study.save(out, {"seed": config.seed, "arm": arm, "settings": settings})

    monkeypatch.setattr(study, "run_seed", run_seed)
    monkeypatch.setattr(study, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(study, "start_process", lambda device: None)
    return ran


def saved_in(file: Path) -> set[tuple]:
    return {(record["seed"], record["arm"]) for record in json.loads(file.read_text())}


def study_main(file: Path, *options: str) -> int:
    return study.main(["--jobs", "1", "--out", str(file), *options])


def test_the_study_runs_what_is_missing(fake_study, tmp_path):
    file = tmp_path / "new" / "runs.json"
    assert study_main(file, "--seeds", "1", "--arms", "nll", "mix-1") == 0
    fake_study.clear()
    study_main(file, "--seeds", "1", "2", "--arms", "nll", "mix-1", "adagrpo")
    assert fake_study == [(1, "adagrpo"), (2, "nll"), (2, "mix-1"), (2, "adagrpo")]


@pytest.mark.parametrize(
    "other",
    ["weight 4", "decode sample", "noise-ranker", "season-correlation 1", "slates 999"],
)
def test_other_settings_are_other_runs_and_keep_the_first(fake_study, tmp_path, other):
    file = tmp_path / "runs.json"
    study_main(file, "--seeds", "1", "--arms", "nll")
    study_main(file, "--seeds", "1", "--arms", "nll", *f"--{other}".split())
    assert fake_study == [(1, "nll"), (1, "nll")]
    first, second = [record["settings"] for record in json.loads(file.read_text())]
    assert first == study.settings_of(Config(), WORLD | {"slates": 200_000})
    changed = [key.replace("_", "-") for key in first if first[key] != second[key]]
    assert changed == other.split()[:1]


def test_an_arm_that_fails_is_named_and_the_others_are_kept(
    fake_study, tmp_path, capsys
):
    """The fake study has no memory for the arm "spread" of seed 1."""
    file = tmp_path / "runs.json"
    assert study_main(file, "--seeds", "1", "2", "--arms", "nll", "spread") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "study.py: seed 1: MemoryError: of this machine"
    assert said[1:] == [f"study.py: finished arms are kept in {file}"]
    assert saved_in(file) == {(1, "nll"), (2, "nll"), (2, "spread")}


def test_two_studies_on_one_file_lose_nothing(tmp_path):
    """Twice 60 records, saved one by one at the same time."""
    file = tmp_path / "runs.json"

    def save_all(seed):
        for number in range(60):
            study.save(file, {"seed": seed, "arm": number, "settings": {}})

    with ThreadPoolExecutor() as pool:
        list(pool.map(save_all, (3, 4)))
    assert saved_in(file) == {(seed, number) for seed in (3, 4) for number in range(60)}


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path):
    """A record that cannot be written leaves it as it was."""
    file = tmp_path / "runs.json"
    study.save(file, {"seed": 1, "arm": "nll", "settings": {}})
    kept = file.read_bytes()
    with pytest.raises(TypeError):
        study.save(file, {"seed": 2, "arm": "nll", "settings": {}, "figures": object()})
    assert file.read_bytes() == kept


def assert_refused(capsys, name: str, *options) -> None:
    with pytest.raises(SystemExit) as end:
        study.main([*map(str, options)])
    assert end.value.code == 2
    assert f"argument {name}:" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "content", ['[{"seed": 1, "arm"', "{}", '[{"a": 1}]', "[1, 2]", "step\n1\n", "\xff"]
)
def test_a_file_that_is_not_the_studys_is_refused_unchanged(
    fake_study, tmp_path, capsys, content
):
    file = tmp_path / "runs.json"
    file.write_text(content, encoding="latin-1")
    before = file.read_bytes()
    for path in (file, file / "below.json", tmp_path):
        assert_refused(capsys, "--out", "--seeds", 1, "--out", path)
    assert file.read_bytes() == before
    assert fake_study == []


BAD_ARMS = ["magic", "mix-", "mix--1", "mix-nan", "mix-1@0"]
BAD_SETTINGS = ["decode greedy", "device abacus", "group 1", "jobs 0", "slates many"]


@pytest.mark.parametrize("bad", [*[f"arms {arm}" for arm in BAD_ARMS], *BAD_SETTINGS])
def test_a_bad_option_is_refused_by_name(fake_study, tmp_path, capsys, bad):
    name, value = f"--{bad}".split()
    file = tmp_path / "runs.json"
    assert_refused(capsys, name, "--seeds", 1, "--out", file, name, value)
    assert fake_study == []


# --------------------------------------------------------------------------- processes

# The study with an arm that takes ten minutes.
DRIVER = """
import sys, time
sys.path.insert(0, {folder!r})
import study

def run_seed(config, world, arms, out):
    study.save(out, {{"seed": config.seed, "arm": arms[0], "settings": {{}}}})
    time.sleep(600)

if __name__ == "__main__":
    study.run_seed = run_seed
    sys.exit(study.main())
"""


def living(group: int) -> list[int]:
    """The processes of a process group, by /proc. Those that only wait to be buried
    (zombies) are dead.
    """
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of_group) == group and state not in "ZX":
            found.append(int(file.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("stop", ["Ctrl-C", "kill", "no memory"])
def test_a_stopped_study_leaves_no_process_and_keeps_what_it_has(tmp_path, stop):
    """Ctrl-C in a terminal goes to the whole process group, kill to the parent; a
    system without memory kills a worker, the youngest process.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(folder=str(HERE)))
    file = tmp_path / "runs.json"
    command = [sys.executable, driver, "--seeds", "1", "--jobs", "1", "--out", file]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while not file.exists():
            assert process.poll() is None
            time.sleep(0.05)
        if stop == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif stop == "kill":
            os.kill(process.pid, signal.SIGTERM)
        else:
            os.kill(living(process.pid)[-1], signal.SIGKILL)

        started = time.monotonic()
        while living(process.pid) and time.monotonic() - started < 20:
            process.poll()
            time.sleep(0.02)
        assert living(process.pid) == []
        assert process.wait() != 0
        if stop == "no memory":
            assert b"study.py: seed 1: BrokenProcessPool" in process.stderr.read()
    finally:
        if living(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert saved_in(file) == {(1, "before")}
