"""Trains a small vision transformer on replicas that divide the optimizer's work among them.

    torchrun --nproc-per-node 2 examples/ddp.py [--steps N] [--folder CHECKPOINTS]

Needs the extra: pip install 'shampoo[bench]'. Runs on gloo on a laptop, on NCCL where there are
GPUs. Started again with the same folder, on any number of ranks, it goes on from the newest
checkpoint; with ``torchrun --max-restarts=1`` it does so by itself.
"""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import VisionTransformer, arguments, optimizer_of, start, train


def main() -> None:
    args = arguments()
    device = start()
    model = DistributedDataParallel(VisionTransformer().to(device))
    train(model, optimizer_of(model), device, args)
    # DDP goes first. If it were the last to hold the process group, that would end under Python's
    # lock, and wait for threads of gloo that may be waiting for it.
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
