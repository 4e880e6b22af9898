# SPDX-License-Identifier: MIT
"""Tests of trl_recipe.py against hand calculations; skipped where TRL is missing."""

import os
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from adagrpo import adagrpo_loss, grpo_loss

assert trl.GRPOTrainer, trl.GRPOConfig  # loaded late, and torch sets a variable then
environment = dict(os.environ)
import trl_recipe as recipe

environment_after_import = dict(os.environ)

torch.set_num_threads(1)
ITEMS = recipe.ITEMS
NO_ITEM = "a0 b0 c3"
ROWS = [
    {"prompt": prompt, "target": target, "bought": bought, "segment": segment}
    for prompt, target, bought, segment in zip(
        recipe.PROMPTS, recipe.TARGETS, recipe.BOUGHT, recipe.SEGMENTS
    )
]


def write(trainer, drawn: dict[str, list[str]]) -> None:
    """Lets the policy write these items, `drawn[prompt]`, in the place of drawing."""
    tokenizer = trainer.processing_class
    places = dict.fromkeys(drawn, 0)

    def generate(input_ids, **_):
        completions = []
        for prompt in tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            items = drawn[prompt]
            item = items[places[prompt] % len(items)]
            places[prompt] += 1
            completions.append(tokenizer(item, add_special_tokens=False)["input_ids"])
        return torch.cat([input_ids, torch.tensor(completions)], 1)

    trainer.model.generate = generate


def advantages_of(trainer, rows: list[dict], drawn: list[list[str]]) -> torch.Tensor:
    """TRL's own advantages of whole groups, (prompts, G)."""
    write(trainer, {row["prompt"]: items for row, items in zip(rows, drawn)})
    G = len(drawn[0])
    trainer.model.train()
    batch = trainer._generate_and_score_completions(
        [row for row in rows for _ in range(G)]
    )
    return batch["advantages"].view(-1, G)


def set_scores(monkeypatch, score: dict[str, float], threshold: float) -> None:
    def ranker(prompts, items, **_):
        return torch.tensor([score.get(item, 0.0) for item in items])

    monkeypatch.setattr(recipe, "ranker", ranker)
    monkeypatch.setattr(recipe, "MIN_DISCRIMINABILITY", threshold)


def test_import_sets_no_environment_variable():
    assert environment_after_import == environment


def test_toy_prompts_do_not_lead_to_what_was_bought():
    assert all(row["target"] not in row["bought"] for row in ROWS)


@pytest.mark.parametrize("scaling", ["group", "none"])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6])
def test_advantages_do_not_depend_on_the_unit(tmp_path, monkeypatch, scaling, factor):
    if scaling == "none" and "0.21" in trl.__version__:
        scaling = False
    trainer = recipe.make_trainer(str(tmp_path), scale_rewards=scaling)
    a, b, c, d, e, y = ITEMS[4:10]
    score = {a: 0.1, b: 0.2, c: 0.3, d: 0.4, e: 0.6, y: 0.9}
    score = {item: factor * value for item, value in score.items()}
    set_scores(monkeypatch, score, threshold=0.05 * factor)

    row = {"prompt": ITEMS[0], "target": y, "bought": [ITEMS[0]], "segment": ""}
    other = {**row, "prompt": ITEMS[2]}
    drawn = [a, b, c, d, e, NO_ITEM, a, c]
    got = advantages_of(trainer, [row, other], [drawn, drawn[:7] + [y]])

    # Rewards .1 .2 .3 .4 .6 0 .1 .3: the mean is 2 / 8, the sum of the squared
    # deviations .76 - 8 / 16 = .26. TRL's std divides it by 7.
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.0, 0.1, 0.3])
    expected = (rewards - 0.25) / (0.26 / 7) ** 0.5
    torch.testing.assert_close(got[0], expected, rtol=0.01, atol=0)
    assert (got[1] == 0).all()  # one hit of 8 draws: not hard


def test_gate_reads_the_raw_scores(tmp_path, monkeypatch):
    trainer = recipe.make_trainer(str(tmp_path))
    row = {**ROWS[0], "target": ITEMS[9]}
    drawn = [[ITEMS[4], ITEMS[5]] * 4]
    score = {ITEMS[4]: 0.5, ITEMS[5]: 0.6, ITEMS[9]: 0.7}  # discriminability 0.15
    set_scores(monkeypatch, score, threshold=0.14)
    assert (advantages_of(trainer, [row], drawn) != 0).all()
    set_scores(monkeypatch, score, threshold=0.16)
    assert (advantages_of(trainer, [row], drawn) == 0).all()


def test_difficulty_is_the_share_of_misses(tmp_path, monkeypatch):
    trainer = recipe.make_trainer(str(tmp_path))
    monkeypatch.setattr(recipe, "MIN_DIFFICULTY", 0.8)
    set_scores(monkeypatch, {ITEMS[4]: 0.5, ITEMS[9]: 0.7}, threshold=0.05)
    row = {**ROWS[0], "target": ITEMS[9]}
    once = [ITEMS[9]] + [ITEMS[4]] * 7  # 7 misses of 8, though the first draw hits
    twice = [ITEMS[9]] * 2 + [ITEMS[4]] * 6
    assert (advantages_of(trainer, [row], [once]) != 0).all()
    assert (advantages_of(trainer, [row], [twice]) == 0).all()


def test_nearly_flat_group_gets_exactly_0(tmp_path, monkeypatch):
    trainer = recipe.make_trainer(str(tmp_path))
    row = {**ROWS[0], "target": ITEMS[9]}
    score = {ITEMS[4]: 0.5, ITEMS[5]: 0.5 + 6e-8, ITEMS[9]: 0.9}
    assert len(set(torch.tensor([score[ITEMS[4]], score[ITEMS[5]]]).tolist())) == 2
    set_scores(monkeypatch, score, threshold=0.05)
    got = advantages_of(trainer, [row], [[ITEMS[4], ITEMS[5]] * 4])
    assert (got == 0).all()


def test_bought_items_score_like_no_item(tmp_path, monkeypatch):
    trainer = recipe.make_trainer(str(tmp_path))
    old, new, y = ITEMS[0], ITEMS[5], ITEMS[9]
    set_scores(monkeypatch, {old: 0.9, new: 0.1, y: 0.6}, threshold=0.3)
    row = {"prompt": old, "target": y, "bought": [old]}
    drawn = [[old, new] * 4]

    # Rewards 0, .1: mean .05, sum of squared deviations 8 / 400. As a negative the
    # bought item would close the gate: 0.6 - 0.5 is below 0.3, 0.6 - 0.1 is not.
    got = advantages_of(trainer, [row], drawn)
    high = 0.05 / (8 / 400 / 7) ** 0.5
    torch.testing.assert_close(
        got[0], torch.tensor([-high, high] * 4), rtol=0.01, atol=0
    )

    del row["bought"]  # the column is optional
    assert (advantages_of(trainer, [row], drawn) == 0).all()


def test_ranker_receives_the_columns(tmp_path, monkeypatch):
    calls = []

    def ranker(prompts, items, **context):
        calls.append((prompts, items, context))
        return torch.zeros(len(items))

    monkeypatch.setattr(recipe, "ranker", ranker)
    trainer = recipe.make_trainer(str(tmp_path))
    rows = [{**ROWS[i], "age": 30 + i} for i in (3, 12)]
    advantages_of(trainer, rows, [[ITEMS[8]] * 8] * 2)

    rollouts, targets = sorted(calls, key=lambda call: -len(call[0]))
    for (prompts, items, context), times in ((rollouts, 8), (targets, 1)):
        assert prompts == [row["prompt"] for row in rows for _ in range(times)]
        assert set(context) == {"bought", "segment", "age"}
        for name, column in context.items():
            assert column == [row[name] for row in rows for _ in range(times)]
    assert targets[1] == [row["target"] for row in rows]


def test_toy_gate_admits_where_the_ranker_is_right(tmp_path):
    trainer = recipe.make_trainer(str(tmp_path))
    rows = [ROWS[1], ROWS[9]]
    others = [[x for x in ITEMS if x not in (r["target"], *r["bought"])] for r in rows]
    got = advantages_of(trainer, rows, [items[:8] for items in others])
    assert (got[0] != 0).any()
    assert (got[1] == 0).all()


def test_padding_does_not_change_the_nll_with_absolute_positions():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    target = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 0, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1]])
    got = recipe.target_nll(model, padded, mask, target)

    logp = model(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0].log_softmax(-1)
    by_hand = -(logp[1, 5] + logp[2, 6] + logp[3, 7]) / 3
    torch.testing.assert_close(got, by_hand[None], rtol=1e-4, atol=0)


class Gradients(transformers.TrainerCallback):
    """The gradient of each optimizer step, all parameters in a row."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))


def gradient_of_training(tmp_path, drawn, weight, batch, accumulation, per_generation):
    """The mean gradient of the steps of one generation batch, which holds all prompts.

    The learning rate is 0: every step sees the same weights.
    """
    trainer = recipe.make_trainer(
        str(tmp_path),
        weight,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_steps=per_generation // accumulation,
        learning_rate=0.0,
        max_grad_norm=0.0,
        optim="sgd",
    )
    write(trainer, drawn)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    assert len(gradients.steps) == per_generation // accumulation
    return trainer, torch.stack(gradients.steps).mean(0)


def log_prob(trainer, prompt: str, item: str) -> torch.Tensor:
    """The sum over the three tokens, by a plain forward without padding."""
    tokenizer = trainer.processing_class
    prompt_ids = tokenizer(prompt)["input_ids"]
    item_ids = tokenizer(item)["input_ids"]
    logits = trainer.model(input_ids=torch.tensor([prompt_ids + item_ids])).logits[0]
    logp = logits.log_softmax(-1)
    start = len(prompt_ids) - 1
    return sum(logp[start + i, token] for i, token in enumerate(item_ids))


def gradient_by_hand(trainer, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(trainer.model.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize(
    "batch, accumulation, per_generation",
    [(128, 1, 1), (16, 8, 8), (16, 2, 8), (16, 1, 8), (4, 32, 32)],
)
def test_nll_runs_once_a_prompt(
    tmp_path, monkeypatch, batch, accumulation, per_generation
):
    rows_run = []
    target_nll = recipe.target_nll

    def counting(model, prompt_ids, *others):
        rows_run.append(len(prompt_ids))
        return target_nll(model, prompt_ids, *others)

    monkeypatch.setattr(recipe, "target_nll", counting)
    drawn = {prompt: ITEMS[:8] for prompt in recipe.PROMPTS}
    trainer, got = gradient_of_training(
        tmp_path, drawn, 0.0, batch, accumulation, per_generation
    )

    # 16 prompts; a micro-batch without any runs one row, with weight 0.
    assert len(rows_run) == per_generation
    assert 16 <= sum(rows_run) < 16 + per_generation
    logp = [log_prob(trainer, row["prompt"], row["target"]) for row in ROWS]
    nll = -torch.stack(logp).mean() / 3
    expected = gradient_by_hand(trainer, nll)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch, accumulation", [(128, 1), (16, 8)])
def test_loss_is_a_third_of_adagrpo_loss(tmp_path, batch, accumulation):
    """Means over 3 tokens here, sums there: the weight carries over."""
    drawn = {}
    for i, prompt in enumerate(recipe.PROMPTS):
        drawn[prompt] = [ITEMS[(i + 2 + k) % 16] for k in range(7)] + [NO_ITEM]
    trainer, got = gradient_of_training(
        tmp_path, drawn, 2.0, batch, accumulation, accumulation
    )

    nll, logp, advantages, admit = [], [], [], []
    for row in ROWS:
        items = drawn[row["prompt"]]
        scored = [None if x in (NO_ITEM, *row["bought"]) else x for x in items]
        segment = [row["segment"]] * 8
        rewards = recipe.ranker([row["prompt"]] * 8, scored, segment)
        own = recipe.ranker([row["prompt"]], [row["target"]], segment)
        negatives = rewards[[x not in (None, row["target"]) for x in scored]]
        is_clear = own.item() - negatives.mean().item() >= 0.05
        admit.append(row["target"] not in items and is_clear)
        advantages.append((rewards - rewards.mean()) / rewards.std())
        logp.append(torch.stack([log_prob(trainer, row["prompt"], x) for x in items]))
        nll.append(-log_prob(trainer, row["prompt"], row["target"]))
    assert 2 <= sum(admit) <= 14

    logp = torch.stack(logp)
    grpo = grpo_loss(logp, logp.detach(), torch.stack(advantages))
    loss = adagrpo_loss(torch.stack(nll), grpo, torch.tensor(admit), 2.0) / 3
    expected = gradient_by_hand(trainer, loss)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)

    # The check sees the weight: with 1.9 it is another gradient.
    loss = adagrpo_loss(torch.stack(nll), grpo, torch.tensor(admit), 1.9) / 3
    assert (gradient_by_hand(trainer, loss) - expected).abs().max() > 1e-4


def test_evaluation_gives_the_nll_of_all_prompts(tmp_path):
    settings = {"per_device_eval_batch_size": 128}
    if hasattr(trl.GRPOConfig, "num_generations_eval"):  # TRL 0.21 has none
        settings = {"per_device_eval_batch_size": 64, "num_generations_eval": 4}
    trainer = recipe.make_trainer(str(tmp_path), 0.0, **settings)
    write(trainer, {prompt: ITEMS[:8] for prompt in recipe.PROMPTS})
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    logp = [log_prob(trainer, row["prompt"], row["target"]) for row in ROWS]
    assert loss == pytest.approx(-torch.stack(logp).mean().item() / 3, rel=1e-4)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("scale_rewards", "batch", "scale_rewards must be"),
        ("multi_objective_aggregation", "normalize_then_sum", "must be 'sum_then"),
        ("max_completion_length", 4, "IDs must have max_completion_length = 4"),
    ],
)
def test_settings_that_harm_end_in_one_line(tmp_path, name, value, message):
    if not hasattr(trl.GRPOConfig, name):
        pytest.skip("this TRL has no such setting")
    with pytest.raises(ValueError, match=message) as error:
        recipe.make_trainer(str(tmp_path), **{name: value})
    assert "\n" not in str(error.value)


def test_ids_of_unequal_length_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "ITEMS", [*ITEMS[:15], "a0 b1"])
    with pytest.raises(ValueError, match=r"3 tokens, got IDs of \[2, 3\]"):
        recipe.make_trainer(str(tmp_path))


def test_missing_tokenizer_ends_in_one_line(tmp_path):
    trainer = recipe.make_trainer(str(tmp_path))
    for others in ({}, {"processing_class": None}):
        with pytest.raises(ValueError, match="processing_class must be given"):
            recipe.AdaGRPOTrainer(trainer.model, trainer.args, **others)


def test_rows_that_are_no_groups_and_unknown_targets_are_named(tmp_path):
    trainer = recipe.make_trainer(str(tmp_path))
    trainer.model.train()
    ids = [trainer.ids_of[ITEMS[0]]] * 16
    apart = [row["prompt"] for row in ROWS[:2]] * 8
    with pytest.raises(ValueError, match="whole groups of 8"):
        trainer.gated_ranker(apart, None, ids, [ITEMS[3]] * 16)
    with pytest.raises(ValueError, match="target must be one of ITEMS.* a0 b0 c0'"):
        trainer.gated_ranker([ITEMS[1]] * 16, None, ids, [" a0 b0 c0"] * 16)


def test_main_trains_both_and_prints_both(monkeypatch, capsys):
    make_trainer = recipe.make_trainer
    weights = []

    def short(folder, weight):
        weights.append(weight)
        return make_trainer(folder, weight, max_steps=10, logging_steps=5)

    monkeypatch.setattr(recipe, "make_trainer", short)
    recipe.main()
    assert weights == [0.0, recipe.WEIGHT]

    summary = [line for line in capsys.readouterr().out.splitlines() if "rate" in line]
    assert len(summary) == 4
    for line, name in zip(summary, ["NLL alone", "NLL alone", "AdaGRPO", "AdaGRPO"]):
        assert line.startswith(name)
        nll = float(line.split("token ")[1].split(",")[0])
        assert nll < 2.6  # 2.68 before; the vocabulary has 16 tokens: log 16 = 2.77
