# SPDX-License-Identifier: MIT
"""AdaGRPO inside a trainer you already have: TRL's GRPOTrainer.

    pip install torch==2.13.0 trl==1.16.0 && python .github/trl_recipe.py

What you copy comes first: AdaGRPOTrainer. Its reward function gives a prompt that the
gate refuses a flat 0, from which TRL makes advantages of exactly 0; the NLL of the item
that was really bought is added for every prompt. A toy follows that trains twice, with
NLL alone and with the gate. It shows that all is connected, and no gain: its 16 prompts
are learned by heart, which NLL alone does best. What can cost you days:

- Cost. The gate saves no time. A prompt costs G drawn IDs and G + 1 rows forward and
  backward, admitted or not (the toy refuses 19 of 20); with NLL alone it is one row. In
  the toy that is seven times the processor time.
- Weight. It carries over from adagrpo.py: there both terms are sums over the L tokens
  of an ID, here both are means, 1/L of them. Adam does not see the 1/L, clipping does.
  TRL's std makes advantages smaller, by 6% with 8 draws.
- Scale. TRL divides by std + 1e-4, which takes its weight from a ranker with small
  scores. Rewards are standardised here, after the gate has seen the raw scores.
- NLL. Once a prompt, not once a rollout: in the batch that TRL shuffles and splits, one
  row of each group carries the weight G and the others 0. Over a generation batch that
  is the mean over prompts exactly; over a part of it (steps_per_generation above the
  accumulation steps) it is so in expectation.
- Columns. The ranker gets all columns of the data set but `target`, by name.
- Bought items. What stands in the optional column `bought` scores like an ID that names
  no item. To draw again would be better, but TRL draws once. Leave the column out where
  people buy the same thing twice.
- Hits. Token IDs are compared: a decoded leading space makes all texts differ. `hard`
  stuck at 1.000 means that the policy never writes a target.
- Difficulty. Draws have no order (ranked=False), so it is the share of misses. At 0.3,
  right for the beams of adagrpo.py, nearly every prompt counts as hard.
- Logging. TRL's `reward` is standardised and always near 0: see `reward_before_gate`.
- Positions. TRL trains without position IDs. With absolute positions (GPT-2) its GRPO
  is wrong for left-padded prompts, with rotary ones right. The NLL here is right.
- Length. Leave mask_truncated_completions off: an ID of fixed length has no end token.
- The gate does not reach a KL term (`beta`), an entropy bonus or a second reward.
- Scores that can be negative need a floor below them for IDs that name no item.

Run on a CPU, in one and two processes: TRL 1.16.0 (transformers 5.24.0), 0.21.0
(4.57.6). Not tried: GPU, vLLM, Liger, PEFT. HF_HUB_OFFLINE=1 keeps the libraries off
the net. The tests (test_trl_recipe.py) are skipped where TRL is not installed.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import trl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adagrpo import adagrpo_gate, group_advantages

DRAWS = 8  # G, the rollouts of a prompt
WEIGHT = 2.0  # of GRPO against NLL
MIN_DIFFICULTY = 0.9  # of 8 draws, none hits the target
MIN_DISCRIMINABILITY = 0.05  # in the ranker's unit: about a tenth of its scores' spread

# 16 of the 64 possible IDs name an item. A prompt is the one or two items bought last.
ITEMS = [f"a{i // 4} b{i % 4} c{(i // 4 + i) % 4}" for i in range(16)]
BOUGHT = [ITEMS[i - i % 2 : i + 1] for i in range(16)]
PROMPTS = [" ".join(items) for items in BOUGHT]
TARGETS = [ITEMS[(5 * i + 6) % 16] for i in range(16)]
SEGMENTS = ["known"] * 8 + ["unknown"] * 8  # the ranker is right about the known ones


def ranker(prompts: list[str], items: list[str | None], segment, **_) -> torch.Tensor:
    """Put yours here. A score per row, (rows,), on the CPU; 0 for None, no item."""
    scores = torch.zeros(len(items))
    for row, item in enumerate(items):
        liked = ITEMS[0]  # popular
        if segment[row] == "known":
            liked = TARGETS[PROMPTS.index(prompts[row])]
        if item is not None:
            shared_codes = set(item.split()) & set(liked.split())
            scores[row] = 0.1 + 0.2 * len(shared_codes)
    return scores


# --------------------------------------------------------------------- what you copy


def target_nll(model, prompt_ids, prompt_mask, target_ids) -> torch.Tensor:
    """-log policy(target | prompt), the mean over the target's L tokens; (rows,)."""
    ids = torch.cat([prompt_ids, target_ids], 1)  # (rows, T + L)
    mask = torch.cat([prompt_mask, torch.ones_like(target_ids)], 1)

    # Prompts are padded on the left: the first real token has position 0.
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    L = target_ids.shape[1]
    logits = logits[:, -L - 1 : -1].transpose(1, 2)  # (rows, V, L)
    return F.cross_entropy(logits, target_ids, reduction="none").mean(1)


class AdaGRPOTrainer(trl.GRPOTrainer):
    """A GRPOTrainer without `reward_funcs`; loss = NLL of all prompts + weight * GRPO.

    The data set has a column `target`, the item that was really bought.
    """

    def __init__(self, model, args, weight=WEIGHT, **others):
        # Any other scaling lets the zeros of refused groups change the admitted ones.
        if args.scale_rewards not in ("group", "none", True, False):
            raise ValueError("scale_rewards must be 'group' (True) or 'none' (False)")
        if getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum":
            raise ValueError("multi_objective_aggregation must be 'sum_then_normalize'")
        if others.get("processing_class") is None:
            raise ValueError("processing_class must be given: the policy's tokenizer")

        ids = others["processing_class"](ITEMS, add_special_tokens=False)["input_ids"]
        lengths = {len(codes) for codes in ids}
        if lengths != {args.max_completion_length}:
            raise ValueError(
                f"IDs must have max_completion_length = {args.max_completion_length} "
                f"tokens, got IDs of {sorted(lengths)}"
            )
        self.ids_of = dict(zip(ITEMS, ids))
        self.item_of = {tuple(codes): item for item, codes in self.ids_of.items()}
        self.weight = weight
        super().__init__(model, self.gated_ranker, args, **others)

    def group_size(self) -> int:
        G = self.num_generations
        if not self.model.training:
            G = getattr(self, "num_generations_eval", G)  # TRL 0.21 has none
        return G

    def gated_ranker(
        self, prompts, completions, completion_ids, target, log_metric=None, **columns
    ):
        """The ranker's scores, standardised; 0 for all rollouts of a refused prompt."""
        G = self.group_size()
        rows = list(zip(prompts, target))
        if rows != [row for row in rows[::G] for _ in range(G)]:
            raise ValueError(f"prompts must be whole groups of {G} equal rows")
        unknown = set(target) - set(self.ids_of)
        if unknown:
            raise ValueError(f"target must be one of ITEMS, got {sorted(unknown)}")

        # TRL adds a state and a logger to the columns of the data set, which are lists.
        context = {name: x for name, x in columns.items() if isinstance(x, list)}
        context_of_prompts = {name: column[::G] for name, column in context.items()}

        items = []
        for row, ids in enumerate(completion_ids):
            item = self.item_of.get(tuple(ids))  # None: no such item
            if "bought" in context and item in context["bought"][row]:
                item = None
            items.append(item)
        hit = [self.ids_of[y] == list(ids) for y, ids in zip(target, completion_ids)]
        valid = [item is not None for item in items]

        rewards = ranker(prompts, items, **context).view(-1, G)  # (prompts, G)
        gate = adagrpo_gate(
            target_reward=ranker(prompts[::G], target[::G], **context_of_prompts),
            rollout_rewards=rewards,
            hit=torch.tensor(hit).view(-1, G),
            valid=torch.tensor(valid).view(-1, G),
            min_difficulty=MIN_DIFFICULTY,
            min_discriminability=MIN_DISCRIMINABILITY,
            ranked=False,  # draws have no order: difficulty is the share of misses
        )
        if log_metric is not None:  # TRL 0.21 has none
            log_metric("admitted", gate.admit.float().mean().item())
            log_metric("hard", gate.hard.float().mean().item())
            log_metric("clear", gate.clear.float().mean().item())
            log_metric("reward_before_gate", rewards.mean().item())

        # TRL's std has the denominator G - 1. Make it 1, and dividing changes nothing.
        advantages = group_advantages(rewards) * ((G - 1) / G) ** 0.5
        return torch.where(gate.admit[:, None], advantages, 0.0).flatten().tolist()

    def _generate_and_score_completions(self, inputs):
        """Puts the NLL's data into the batch, which TRL shuffles and splits."""
        batch = super()._generate_and_score_completions(inputs)
        prompt_ids = batch["prompt_ids"]
        ids = [self.ids_of[row["target"]] for row in inputs]
        batch["target_ids"] = torch.tensor(ids, device=prompt_ids.device)  # (rows, L)

        G = self.group_size()
        nll_weight = torch.zeros(len(inputs), device=prompt_ids.device)
        nll_weight[::G] = G  # the mean over rows is now the mean over prompts
        batch["nll_weight"] = nll_weight  # (rows,)
        return batch

    def compute_loss(self, model, inputs, *args, **kwargs):
        grpo = super().compute_loss(model, inputs, *args, **kwargs)

        weight = inputs["nll_weight"]
        used = weight > 0
        if not used.any():  # all processes must run the model equally often
            used[0] = True
        nll = target_nll(
            model,
            inputs["prompt_ids"][used],
            inputs["prompt_mask"][used],
            inputs["target_ids"][used],
        )  # (rows used,)
        nll = (weight[used] * nll).sum() / len(weight)

        # TRL 0.21 lets the Trainer divide the loss by the accumulation steps. TRL 1.16
        # divides its GRPO itself, says so in one of these, and nobody divides the NLL.
        divided = getattr(self, "loss_is_scaled_for_ga", None) or self.compute_loss_func
        if divided and model.training:
            nll = nll / self.current_gradient_accumulation_steps
        return nll + self.weight * grpo


# ----------------------------------------------------------------------- the toy run


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


def make_trainer(folder: str, weight: float = WEIGHT, **settings) -> AdaGRPOTrainer:
    """A Llama of 80,000 weights, one purchase for every prompt, settings for a CPU."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    defaults = {
        "num_generations": DRAWS,
        "max_completion_length": 3,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "max_steps": 80,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    columns = {"prompt": PROMPTS, "target": TARGETS}
    columns |= {"bought": BOUGHT, "segment": SEGMENTS}
    trainer = AdaGRPOTrainer(
        transformers.LlamaForCausalLM(config),
        trl.GRPOConfig(output_dir=folder, **(defaults | settings)),
        weight,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(columns),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@torch.no_grad()
def nll_of_prompts(trainer: AdaGRPOTrainer) -> torch.Tensor:
    """The policy's NLL per token of what was bought after each prompt, (16,)."""
    prompt = trainer.processing_class(PROMPTS, padding=True, return_tensors="pt")
    target = torch.tensor([trainer.ids_of[item] for item in TARGETS])
    model = trainer.model.eval()
    return target_nll(model, prompt["input_ids"], prompt["attention_mask"], target)


def main() -> None:
    """Trains with NLL alone and with AdaGRPO, from the same start."""
    warnings.simplefilter("ignore", FutureWarning)  # what TRL itself still calls
    torch.set_num_threads(1)  # the model is tiny
    print(f"TRL {trl.__version__}, transformers {transformers.__version__}")

    shown = ("step", "loss", "hard", "clear", "admitted", "reward_before_gate")
    summary = []
    for name, weight in {"NLL alone": 0.0, "AdaGRPO": WEIGHT}.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(folder, weight)
            trainer.train()
        print(name)
        for entry in trainer.state.log_history[:-1]:
            figures = [f"{key} {entry[key]:.4g}" for key in shown if key in entry]
            print("  " + "  ".join(figures))

        nll = nll_of_prompts(trainer).view(2, 8)  # row 0: known to the ranker
        hit_rate = (-3 * nll).exp().mean(1)  # of one draw: the probability of 3 tokens
        for row, segment in enumerate(["known", "unknown"]):
            summary.append(
                f"{name}, {segment} to the ranker: NLL per token "
                f"{nll[row].mean():.4f}, hit rate of a draw {hit_rate[row]:.1%}"
            )
    print("\n".join(summary))


if __name__ == "__main__":
    main()
