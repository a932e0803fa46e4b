"""Trains a small vision transformer on replicas that divide the optimizer's work among them.

    torchrun --nproc-per-node 2 examples/ddp.py [--steps N] [--folder CHECKPOINTS]

Needs pip install -e '.[bench]'. Runs on gloo on a laptop, on NCCL where there are
GPUs. Started again with the same folder, on any number of ranks, it goes on from the newest
checkpoint; with ``torchrun --max-restarts=1`` it does so by itself.
"""

import argparse

import torch
from torch.nn.parallel import DistributedDataParallel
from training import VisionTransformer, arguments, end, optimizer_of, start, train


def main() -> None:
    args = arguments()
    device = start()
    run(device, args)
    end()


def run(device: torch.device, args: argparse.Namespace) -> None:
    """A function of its own: model and optimizer end with it, before the process group does."""
    model = DistributedDataParallel(VisionTransformer().to(device))
    train(model, optimizer_of(model), device, args)


if __name__ == "__main__":
    main()
