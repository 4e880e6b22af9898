# SPDX-License-Identifier: MIT
"""AdaGRPO inside a trainer you already have: TRL's GRPOTrainer.

    pip install torch==2.13.0 trl==1.16.0 && python .github/trl_recipe.py

What you copy comes first:

  gated_ranker     the reward function. For a prompt that the gate refuses it returns a
                   flat 0, from which the trainer makes an advantage of exactly 0.
  AdaGRPOTrainer   adds the NLL of the item that was really bought, for every prompt.

A toy run follows that takes seconds and downloads nothing: a tiny GPT-2, items with
semantic IDs of three codes, and a ranker that is right about half of the prompts.

Run on a CPU, in one process and in two, with torch 2.13.0 and TRL 1.16.0 (transformers
5.24.0 and 4.57.6) or TRL 0.21.0 (transformers 4.57.6). Not tried: a GPU, vLLM, Liger,
PEFT. It is not part of the repository's tests, since TRL is no requirement.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no look-ups and no telemetry

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import trl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adagrpo import adagrpo_gate

G = 8  # rollouts per prompt, the trainer's num_generations
L = 3  # tokens of a semantic ID
WEIGHT = 1.0  # of GRPO against NLL, both of them means over tokens
MIN_DIFFICULTY = 0.3  # share of the group that missed the target
MIN_DISCRIMINABILITY = 0.05  # in the unit of the ranker's scores

# A prompt is the item bought last. 16 of the 64 possible IDs name an item.
ITEMS = [f"a{i // 4} b{i % 4} c{(i // 4 + i) % 4}" for i in range(16)]
BOUGHT_NEXT = {item: ITEMS[(5 * i + 3) % 16] for i, item in enumerate(ITEMS)}
TRUSTED = ITEMS[:8]  # the prompts that the ranker is right about
POPULAR = ITEMS[0]  # what it likes after all others


def ranker(prompts: list[str], items: list[str]) -> torch.Tensor:
    """A score per row, (rows,); 0 for an ID that names no item. Put your own here."""
    scores = torch.zeros(len(items))
    for row, (prompt, item) in enumerate(zip(prompts, items)):
        liked = POPULAR
        if prompt in TRUSTED:
            liked = BOUGHT_NEXT[prompt]
        if item in ITEMS:
            shared_codes = set(item.split()) & set(liked.split())
            scores[row] = 0.1 + 0.2 * len(shared_codes)
    return scores


# --------------------------------------------------------------------- what you copy


def gated_ranker(prompts, completions, target, log_metric=None, **_) -> list[float]:
    """The ranker's scores; a flat 0 for the G completions of a prompt that is refused.

    Lists with a text per completion, the G of a prompt in a row. `target` is a column
    of the data set: the item that was really bought.
    """
    if prompts != [prompt for prompt in prompts[::G] for _ in range(G)]:
        raise ValueError(f"prompts must be whole groups of {G} equal rows")
    rewards = ranker(prompts, completions).view(-1, G)  # (prompts, G)
    target_reward = ranker(prompts[::G], target[::G])  # (prompts,)
    hit = torch.tensor([a == b for a, b in zip(completions, target)]).view(-1, G)
    valid = torch.tensor([item in ITEMS for item in completions]).view(-1, G)

    # Draws have no order. With the misses first, difficulty is the share of misses.
    order = hit.int().argsort(1)
    columns = [values.gather(1, order) for values in (rewards, hit, valid)]
    gate = adagrpo_gate(target_reward, *columns, MIN_DIFFICULTY, MIN_DISCRIMINABILITY)
    if log_metric is not None:  # TRL 0.21 has none
        log_metric("admitted", gate.admit.float().mean().item())
        log_metric("hard", gate.hard.float().mean().item())
        log_metric("clear", gate.clear.float().mean().item())

    return torch.where(gate.admit[:, None], rewards, 0.0).flatten().tolist()


def target_nll(model, prompt_ids, prompt_mask, target_ids):
    """-log policy(target | prompt), the mean over the rows and the L tokens of each."""
    ids = torch.cat([prompt_ids, target_ids], 1)  # (rows, T + L)
    mask = torch.cat([prompt_mask, torch.ones_like(target_ids)], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -L - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), target_ids.flatten())


class AdaGRPOTrainer(trl.GRPOTrainer):
    """loss = NLL on every row + WEIGHT * GRPO, which `gated_ranker` has gated."""

    def _generate_and_score_completions(self, inputs):
        """Puts the target's tokens into the batch, which TRL shuffles and splits."""
        batch = super()._generate_and_score_completions(inputs)
        texts = [row["target"] for row in inputs]
        ids = self.processing_class(texts, add_special_tokens=False)["input_ids"]
        batch["target_ids"] = torch.tensor(ids, device=batch["prompt_ids"].device)
        return batch

    def compute_loss(self, model, inputs, *args, **kwargs):
        grpo = super().compute_loss(model, inputs, *args, **kwargs)
        prompt = inputs["prompt_ids"], inputs["prompt_mask"]
        nll = target_nll(model, *prompt, inputs["target_ids"])

        # TRL 0.21 lets the Trainer divide the loss by the accumulation steps. TRL 1.16
        # divides its GRPO itself, says so in one of these, and nobody divides the NLL.
        # `model_accepts_loss_kwargs` is False for both if transformers is below 5.19.
        divided = getattr(self, "loss_is_scaled_for_ga", None) or self.compute_loss_func
        if divided and model.training:
            nll = nll / self.current_gradient_accumulation_steps
        return nll + WEIGHT * grpo


# ----------------------------------------------------------------------- the toy run


class WatchedTrainer(AdaGRPOTrainer):
    """Keeps the rewards and advantages of all groups, for the printing in `main`."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        ids = batch["completion_ids"]
        completions = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in inputs]
        target = [row["target"] for row in inputs]
        rewards = torch.tensor(gated_ranker(prompts, completions, target))

        self.prompts += prompts[::G]
        self.rewards.append(rewards.view(-1, G))
        self.advantages.append(batch["advantages"].view(-1, G))
        return batch


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word per code, and no special token: TRL's decoding would drop it."""
    codes = sorted(set(" ".join(ITEMS).split()))
    number = {word: i for i, word in enumerate(["<pad>", "<eos>", *codes])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(number, "<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],  # GPT-2 has no token types
    )


def make_trainer(folder: str) -> WatchedTrainer:
    """A GPT-2 of 100,000 weights, one purchase for every prompt, settings for a CPU."""
    tokenizer = make_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 * L,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = trl.GRPOConfig(
        output_dir=folder,
        num_generations=G,
        max_completion_length=L,
        per_device_train_batch_size=4 * G,
        gradient_accumulation_steps=2,
        max_steps=80,
        learning_rate=3e-3,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    purchases = {"prompt": ITEMS, "target": [BOUGHT_NEXT[item] for item in ITEMS]}
    trainer = WatchedTrainer(
        model=transformers.GPT2LMHeadModel(config),
        reward_funcs=gated_ranker,
        args=settings,
        train_dataset=datasets.Dataset.from_dict(purchases),
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.prompts = []
    trainer.rewards = []
    trainer.advantages = []
    return trainer


@torch.no_grad()
def nll_of_all(trainer: WatchedTrainer) -> float:
    """The policy's NLL of all purchases, per token."""
    purchases = trainer.train_dataset
    prompt = trainer.processing_class(list(purchases["prompt"]), return_tensors="pt")
    target = trainer.processing_class(list(purchases["target"]), return_tensors="pt")
    ids = prompt["input_ids"], prompt["attention_mask"], target["input_ids"]
    return target_nll(trainer.model.eval(), *ids).item()


def main() -> None:
    """Trains, then compares what the gate refused with the trainer's advantages."""
    warnings.simplefilter("ignore", FutureWarning)  # what TRL itself still calls
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the model is tiny
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        before = nll_of_all(trainer)
        trainer.train()
    after = nll_of_all(trainer)

    print(f"TRL {trl.__version__}, transformers {transformers.__version__}")
    for entry in trainer.state.log_history[:-1]:
        names = [n for n in ("step", "loss", "admitted", "hard", "clear") if n in entry]
        print("  ".join(f"{name} {entry[name]:.4g}" for name in names))
    print(f"NLL per token: {before:.2f} before, {after:.2f} after")

    # A refused group is all 0. An admitted one has a valid rollout, which scores more.
    admitted = torch.cat(trainer.rewards).any(1)
    largest = torch.cat(trainer.advantages).abs().amax(1)  # of each group
    refused_most = largest[~admitted].max()
    admitted_least = largest[admitted].min()
    print(f"refused {(~admitted).sum()} groups: largest advantage {refused_most}")
    print(f"admitted {admitted.sum()} groups: each with {admitted_least:.2f} or more")

    trusted = torch.tensor([prompt in TRUSTED for prompt in trainer.prompts])
    print(f"admitted where the ranker is right: {admitted[trusted].float().mean():.0%}")
    print(f"admitted elsewhere: {admitted[~trusted].float().mean():.0%}")


if __name__ == "__main__":
    main()
