# SPDX-License-Identifier: MIT
"""What a training step costs, in plain NLL steps: python .github/speed.py [--threads 1].

The variants take turns, so that a slow moment of the machine hits all of them; medians count. A
step is forward, backward, gradient clipping and update, with the ranker.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adagrpo
from toy_data import make_world

TURNS, BATCH = 30, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    world, ranker = make_world(0, posttrain=BATCH, pretrain=1, feed=1), adagrpo.Ranker()
    policy, batches = (
        adagrpo.Policy(torch.as_tensor(world.tokens)),
        world.posttrain.batches(BATCH),
    )

    def nll(batch: tuple) -> torch.Tensor:
        history, target, _ = map(torch.as_tensor, batch)
        tokens = policy.tokens[torch.cat([history, target[:, None]], dim=1)].flatten(1)
        logp, _ = policy(tokens[:, :-1])
        return F.nll_loss(logp.flatten(0, 1), tokens[:, 1:].flatten())

    def ours(group: int, decode: str):
        config = adagrpo.settings(["--group", str(group), "--decode", decode])
        return lambda batch: adagrpo.training_step(
            policy, ranker, "adagrpo", config, batch
        )[0]

    losses = {"NLL": nll}
    losses |= {f"{d}, G={g}": ours(g, d) for g in (16, 32) for d in ("beam", "sample")}
    seconds = {name: [] for name in losses}
    for _ in range(TURNS):
        for name, loss_of in losses.items():
            start = time.perf_counter()
            adagrpo.fit(policy, 1e-4, batches, loss_of, name)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["NLL"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), B={BATCH}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<14}{1000 * median:7.1f} ms {median / base:6.2f} NLL steps")


if __name__ == "__main__":
    main()
