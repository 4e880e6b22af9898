# SPDX-License-Identifier: MIT
"""What a post-training step costs, in steps of NLL alone: python .github/speed.py

The arms take turns, so that a slow moment of the machine hits all of them, and the
median turn counts. A step is everything that `post_train` does, with one thread.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adagrpo
from toy_data import make_shop

TURNS = 15
STEPS = 20  # in a turn


def main() -> None:
    torch.set_num_threads(1)
    config = replace(adagrpo.Config(), users=8 * STEPS, epochs=1)
    shop = make_shop(0, sizes={"posttrain": config.users, "viewers": 1, "feed": 1})
    tokens = torch.as_tensor(shop.tokens)
    policy = adagrpo.Policy(tokens, shop.test.history.shape[1])
    ranker = adagrpo.Ranker(len(tokens))
    arms = adagrpo.make_arms(config)

    seconds = {"nll": [], "adagrpo": []}
    for _ in tqdm(range(TURNS), leave=False, disable=None):
        for name, times in seconds.items():
            start = time.perf_counter()
            adagrpo.post_train(policy, ranker, shop.posttrain, *arms[name], config)
            times.append((time.perf_counter() - start) / STEPS)

    base = statistics.median(seconds["nll"])
    print(
        f"torch {torch.__version__}, 1 thread, B = {config.batch}, G = {config.group}"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<10}{1000 * median:7.1f} ms {median / base:6.2f} NLL steps")


if __name__ == "__main__":
    main()
