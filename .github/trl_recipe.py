# SPDX-License-Identifier: MIT
"""AdaGRPO inside a trainer you already have: TRL's GRPOTrainer.

    pip install torch==2.13.0 trl==1.16.0 && python .github/trl_recipe.py

What you copy comes first: AdaGRPOTrainer. Its reward function gives a prompt that the
gate refuses a flat 0, from which TRL makes advantages of exactly 0; the NLL of the item
that was really bought is added for every prompt. A toy run of seconds follows, with a
ranker that is right about half of the prompts. What can cost you days:

- Hits. A decoded leading space makes every comparison of texts False: compare token
  IDs. `hard` stuck at 1.000 means that your comparison is broken.
- Difficulty. Draws have no order (ranked=False), so it is the share of misses. At 0.3,
  right for the beams of adagrpo.py, nearly every prompt counts as hard.
- Logging. TRL logs the gated reward, which falls as the gate closes and looks like a
  collapse: watch `reward_before_gate`.
- Scaling. scale_rewards="batch" takes the std over the zeros of refused groups too:
  admitted advantages were 1.4 times too large. Refused here.
- Groups. Take G from the trainer: half of it gates half-groups apart, silently. The
  rows of a prompt stand together and in one process; this is checked here.
- Positions. TRL trains without position IDs. With absolute positions (GPT-2) its GRPO
  is wrong for left-padded prompts, with rotary ones right. The NLL here is right.
- Length. Leave mask_truncated_completions off: an ID of fixed length has no end token.
- Weight. TRL's GRPO is a mean over tokens. Make the NLL one too, and not a sum.
- Accumulation. TRL 0.21 divides your NLL by the accumulation steps, TRL 1.16 does not.
- The gate does not reach a KL term (`beta`), an entropy bonus or a second reward.
- Scores that can be negative need a floor below them for IDs that name no item.

Run on a CPU, in one and two processes, torch 2.13.0: TRL 1.16.0 (transformers 5.24.0)
and 0.21.0 (4.57.6). Not tried: GPU, vLLM, Liger, PEFT. Not in the repository's tests.
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

WEIGHT = 1.0  # of GRPO against NLL, both of them means over tokens
MIN_DIFFICULTY = 0.9  # at most one draw of ten hits the target; of 8 draws, none
MIN_DISCRIMINABILITY = 0.05  # in the unit of the ranker's scores
GROUPS_BEFORE_WARNING = 200  # a pre-trained policy has hit at least once by then

# 16 of the 64 possible IDs name an item. A prompt is the one or two items bought last.
ITEMS = [f"a{i // 4} b{i % 4} c{(i // 4 + i) % 4}" for i in range(16)]
PROMPTS = [" ".join(ITEMS[i - i % 2 : i + 1]) for i in range(16)]
BOUGHT_NEXT = {prompt: ITEMS[(5 * i + 3) % 16] for i, prompt in enumerate(PROMPTS)}
TRUSTED = PROMPTS[:8]  # the prompts that the ranker is right about


def ranker(prompts: list[str], items: list[str | None]) -> torch.Tensor:
    """A score per row, (rows,); 0 where there is no item (None). Put your own here."""
    scores = torch.zeros(len(items))
    for row, (prompt, item) in enumerate(zip(prompts, items)):
        liked = ITEMS[0]  # popular
        if prompt in TRUSTED:
            liked = BOUGHT_NEXT[prompt]
        if item is not None:
            shared_codes = set(item.split()) & set(liked.split())
            scores[row] = 0.1 + 0.2 * len(shared_codes)
    return scores


# --------------------------------------------------------------------- what you copy


def token_ids(tokenizer, items: list[str]) -> list[list[int]]:
    return tokenizer(items, add_special_tokens=False)["input_ids"]


def target_nll(model, prompt_ids, prompt_mask, target_ids, **_):
    """-log policy(target | prompt), the mean over the rows and the L tokens of each."""
    ids = torch.cat([prompt_ids, target_ids], 1)  # (rows, T + L)
    mask = torch.cat([prompt_mask, torch.ones_like(target_ids)], 1)

    # Prompts are padded on the left: the first real token has position 0.
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    L = target_ids.shape[1]
    return F.cross_entropy(logits[:, -L - 1 : -1].flatten(0, 1), target_ids.flatten())


class AdaGRPOTrainer(trl.GRPOTrainer):
    """A GRPOTrainer without `reward_funcs`; loss = NLL on every row + WEIGHT * GRPO.

    The data set has a column `target`, the item that was really bought.
    """

    def __init__(self, model, args, **others):
        # Any other scaling lets the zeros of refused groups change the admitted ones.
        if args.scale_rewards not in ("group", "none", True, False):
            raise ValueError("scale_rewards must be 'group' (True) or 'none' (False)")
        if getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum":
            raise ValueError("multi_objective_aggregation must be 'sum_then_normalize'")

        ids = token_ids(others["processing_class"], ITEMS)
        self.item_of = {tuple(codes): item for codes, item in zip(ids, ITEMS)}
        self.groups_seen = 0
        self.hits_seen = 0
        super().__init__(model, self.gated_ranker, args, **others)

    def gated_ranker(self, prompts, completion_ids, target, log_metric=None, **_):
        """The ranker's scores; a flat 0 for the G completions of a refused prompt."""
        G = self.num_generations
        if not self.model.training:
            G = getattr(self, "num_generations_eval", G)  # TRL 0.21 has none
        rows = list(zip(prompts, target))
        if rows != [row for row in rows[::G] for _ in range(G)]:
            raise ValueError(f"prompts must be whole groups of {G} equal rows")

        # Token IDs are compared, not texts, and with the IDs that the NLL teaches.
        tokenizer = self.processing_class
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        written = [[i for i in ids if i not in ends] for ids in completion_ids]
        bought = token_ids(tokenizer, target)
        items = [self.item_of.get(tuple(ids)) for ids in written]  # None: no such item
        hit = torch.tensor([a == b for a, b in zip(written, bought)]).view(-1, G)
        valid = torch.tensor([item is not None for item in items]).view(-1, G)

        rewards = ranker(prompts, items).view(-1, G)  # (prompts, G)
        gate = adagrpo_gate(
            target_reward=ranker(prompts[::G], target[::G]),  # (prompts,)
            rollout_rewards=rewards,
            hit=hit,
            valid=valid,
            min_difficulty=MIN_DIFFICULTY,
            min_discriminability=MIN_DISCRIMINABILITY,
            ranked=False,  # draws have no order: difficulty is the share of misses
        )

        # Say once that the policy never writes what it should.
        is_new = self.groups_seen < GROUPS_BEFORE_WARNING
        self.groups_seen += len(hit)
        self.hits_seen += hit.sum().item()
        if is_new and self.groups_seen >= GROUPS_BEFORE_WARNING and not self.hits_seen:
            warnings.warn("nothing hits: does the policy write the target's token IDs?")

        if log_metric is not None:  # TRL 0.21 has none
            log_metric("admitted", gate.admit.float().mean().item())
            log_metric("hard", gate.hard.float().mean().item())
            log_metric("clear", gate.clear.float().mean().item())
            log_metric("reward_before_gate", rewards.mean().item())
        return torch.where(gate.admit[:, None], rewards, 0.0).flatten().tolist()

    def _generate_and_score_completions(self, inputs):
        """Puts the target's tokens into the batch, which TRL shuffles and splits."""
        batch = super()._generate_and_score_completions(inputs)
        ids = token_ids(self.processing_class, [row["target"] for row in inputs])
        batch["target_ids"] = torch.tensor(ids, device=batch["prompt_ids"].device)
        return batch

    def compute_loss(self, model, inputs, *args, **kwargs):
        grpo = super().compute_loss(model, inputs, *args, **kwargs)
        nll = target_nll(model, **inputs)

        # TRL 0.21 lets the Trainer divide the loss by the accumulation steps. TRL 1.16
        # divides its GRPO itself, says so in one of these, and nobody divides the NLL.
        divided = getattr(self, "loss_is_scaled_for_ga", None) or self.compute_loss_func
        if divided and model.training:
            nll = nll / self.current_gradient_accumulation_steps
        return nll + WEIGHT * grpo


# ----------------------------------------------------------------------- the toy run


class WatchedTrainer(AdaGRPOTrainer):
    """Keeps the rewards and advantages of all groups, for the printing in `main`."""

    def gated_ranker(self, prompts, **columns):
        rewards = super().gated_ranker(prompts, **columns)
        self.seen["prompts"] += prompts[:: self.num_generations]
        self.seen["rewards"].append(torch.tensor(rewards))
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.seen["advantages"].append(batch["advantages"])
        return batch


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word per code."""
    codes = sorted(set(" ".join(ITEMS).split()))
    number = {word: i for i, word in enumerate(["<pad>", "<eos>", *codes])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(number, "<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # Llama has no token types
    )


def make_trainer(folder: str) -> WatchedTrainer:
    """A Llama of 80,000 weights, one purchase for every prompt, settings for a CPU."""
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings = trl.GRPOConfig(
        output_dir=folder,
        num_generations=8,
        max_completion_length=3,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        max_steps=80,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    purchases = {"prompt": PROMPTS, "target": [BOUGHT_NEXT[p] for p in PROMPTS]}
    trainer = WatchedTrainer(
        transformers.LlamaForCausalLM(config),
        settings,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(purchases),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.seen = {"prompts": [], "rewards": [], "advantages": []}
    return trainer


@torch.no_grad()
def nll_of(trainer: WatchedTrainer, prompts: list[str]) -> torch.Tensor:
    """The policy's NLL per token of what was bought after these prompts."""
    tokenizer = trainer.processing_class
    prompt = tokenizer(prompts, padding=True, return_tensors="pt")
    target = torch.tensor(token_ids(tokenizer, [BOUGHT_NEXT[p] for p in prompts]))
    model = trainer.model.eval()
    return target_nll(model, prompt["input_ids"], prompt["attention_mask"], target)


def main() -> None:
    """Trains, then compares what the gate refused with the trainer's advantages."""
    warnings.simplefilter("ignore", FutureWarning)  # what TRL itself still calls
    torch.set_num_threads(1)  # the model is tiny
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        before = nll_of(trainer, PROMPTS)
        trainer.train()
    after = nll_of(trainer, PROMPTS)
    unpadded = torch.stack([nll_of(trainer, [prompt]) for prompt in PROMPTS]).mean()

    print(f"TRL {trl.__version__}, transformers {transformers.__version__}")
    shown = ("step", "loss", "hard", "clear", "admitted", "reward_before_gate")
    for entry in trainer.state.log_history[:-1]:
        names = [name for name in shown if name in entry]
        print("  ".join(f"{name} {entry[name]:.4g}" for name in names))
    print(f"NLL per token: {before:.4f} -> {after:.4f}, unpadded {unpadded:.4f}")

    # A refused group is all 0. An admitted one has a valid rollout, which scores more.
    groups = len(trainer.seen["prompts"])
    admitted = torch.cat(trainer.seen["rewards"]).view(groups, -1).any(1)
    taught = torch.cat(trainer.seen["advantages"]).view(groups, -1).any(1)
    for name, mask in {"refused": ~admitted, "admitted": admitted}.items():
        print(f"{name} {mask.sum()} groups, {taught[mask].sum()} have an advantage")

    trusted = torch.tensor([prompt in TRUSTED for prompt in trainer.seen["prompts"]])
    print(f"admitted where the ranker is right: {admitted[trusted].float().mean():.0%}")
    print(f"admitted elsewhere: {admitted[~trusted].float().mean():.0%}")


if __name__ == "__main__":
    main()
