"""Trains for long while things go wrong, and compares the bits with a run that was left alone.

    python tools/soak.py [--steps 10000] [--save-every 500] [--kills 10] [--seed 0]

Both runs see the same bad luck, which depends on the step alone: gradients that are not finite, too
large to square, missing or dropped without a step, factors of NaN whose roots fail, values of
hyper-parameters that are refused. One run trains straight through. The other saves every so many
steps, loads what it has saved into a model and an optimizer made anew, and goes on with these; it
is killed again and again, between two steps and while it saves, and resumes from its newest
checkpoint. In the end all parameters and all state must have the same bits, and the memory of
either process must be flat.

Prints a table of what was done, as lines of ``name value``; the exit status is 1 where something
was lost. Kills come in the first half, so that the last process lives long enough for its memory to
be judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shampoo import Shampoo, checkpoint

SHAPES = {"embed": (40, 12), "conv": (10, 6, 3, 3), "head": (24, 17), "bias": (17,), "scale": ()}
HALF = ("head",)  # in bfloat16
MOST_GROWTH = 16 << 20  # bytes, of a process that has settled


class Model(nn.Module):
    """Parameters of several orders and dtypes; their gradients are drawn, not computed."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            dtype = torch.bfloat16 if name in HALF else torch.float32
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def build() -> tuple[Model, Shampoo]:
    """A model and its optimizer, as a program that starts makes them."""
    model = Model()
    optimizer = Shampoo(
        list(model.parameters()),
        lr=1e-3,
        momentum=0.9,
        weight_decay=0.01,
        max_preconditioner_dim=16,
        precondition_frequency=5,
        refresh_schedule="staggered",
    )
    return model, optimizer


class Luck:
    """What goes wrong at a step: the same in every run, whatever went wrong before."""

    def __init__(self, model: Model, optimizer: Shampoo, counts: dict[str, int]) -> None:
        self.model, self.optimizer, self.counts = model, optimizer, counts

    def step(self, step: int) -> None:
        """Draws gradients, does harm, and takes the step."""
        generator = torch.Generator().manual_seed(step)
        params = dict(self.model.named_parameters())
        for param in params.values():
            scale = 10.0 ** (2 * torch.rand((), generator=generator).item() - 2)
            param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)
        chance = random.Random(step)
        kind = chance.choice(
            (*("nothing",) * 24, "nan", "inf", "huge", "none", "dropped", "root", "lr")
        )
        victim = params[chance.choice([name for name in params if name not in HALF])]
        assert victim.grad is not None
        if kind != "nothing":
            self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind in ("nan", "inf", "huge"):
            victim.grad.view(-1)[-1] = float("1e30" if kind == "huge" else kind)
        elif kind == "none":
            victim.grad = None
        elif kind == "dropped":
            self.optimizer.zero_grad()
            return
        elif kind == "lr":
            self._be_refused()
        if kind == "root":
            self._lose_a_root(params["embed"])
        else:
            self.optimizer.step()

    def _be_refused(self) -> None:
        group = self.optimizer.param_groups[0]
        kept, group["lr"] = group["lr"], float("nan")
        try:
            self.optimizer.step()
        except ValueError:
            group["lr"] = kept
        else:
            raise AssertionError("lr=nan was taken")

    def _lose_a_root(self, param: nn.Parameter) -> None:
        """A step with a factor of NaN, which is put right afterwards."""
        factors = [v for key, v in self.optimizer.state[param].items() if "factor" in key]
        kept = [factor.clone() for factor in factors]
        for factor in factors:
            factor.fill_(float("nan"))
        self.optimizer.step()
        for factor, before in zip(factors, kept, strict=True):
            factor.copy_(before)


def digest(model: Model, optimizer: Shampoo) -> str:
    """Of all parameters and all state."""
    found = hashlib.sha256(str(optimizer.skipped_steps).encode())
    for name, param in model.named_parameters():
        entries = {name: param.detach(), **optimizer.state[param]}
        for key in sorted(entries):
            bits = entries[key].contiguous().view(-1).view(torch.uint8).numpy()
            found.update(key.encode() + bits.tobytes())
    return found.hexdigest()


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One process: trains to the end, or until it is killed."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # hundreds of skipped steps are what is asked for
    warnings.simplefilter("ignore")
    model, optimizer = build()
    counts: dict[str, int] = {}
    luck, folder, samples = Luck(model, optimizer, counts), options.folder, []
    done = checkpoint.load(folder, model, optimizer) if folder else 0
    for step in range((done or 0) + 1, options.steps + 1):
        luck.step(step)
        if step == options.die_at and step % options.save_every:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % options.save_every:
            continue
        if folder:
            if step == options.die_at:
                kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
                threading.Timer(options.delay, kill).start()
            checkpoint.save(folder, model, optimizer, step=step, keep=2)
            before = digest(model, optimizer)
            model, optimizer = build()
            assert checkpoint.load(folder, model, optimizer) == step
            assert digest(model, optimizer) == before, f"step {step}: other bits were loaded"
            luck = Luck(model, optimizer, counts)
        samples.append(memory())
    return {"digest": digest(model, optimizer), "memory": samples, "faults": counts}


def run(options: argparse.Namespace, *more: str) -> tuple[int, dict[str, Any]]:
    """A process that trains: its exit status, and what it says at its end."""
    command = [sys.executable, __file__, "--child", "--steps", str(options.steps)]
    command += ["--save-every", str(options.save_every), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else {}


def growth(samples: list[int]) -> int:
    """Bytes by which a process has grown once it had settled, in the first half of its life."""
    half = len(samples) // 2
    return max(samples[half:]) - max(samples[:half]) if half else 0


def soak(options: argparse.Namespace) -> int:
    """Both runs, compared; the exit status."""
    start, chance = time.monotonic(), random.Random(options.seed)
    status, straight = run(options)
    if status:
        raise SystemExit(f"the straight run ended with status {status}")
    first_half = max(options.steps // 2, 1)
    deaths = sorted(chance.randint(1, first_half) for _ in range(options.kills))
    # Every other one while a checkpoint is written.
    deaths[::2] = [-(-death // options.save_every) * options.save_every for death in deaths[::2]]
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        for death in sorted(deaths):
            delay = f"{chance.uniform(0.0, options.longest_delay):.4f}"
            given = ("--folder", folder, "--die-at", str(death), "--delay", delay)
            status, _ = run(options, *given)
            if status not in (0, -signal.SIGKILL):
                raise SystemExit(f"a run ended with status {status}")
            kills += status != 0
        status, soaked = run(options, "--folder", folder)
        left = sorted(each.name for each in Path(folder).iterdir() if each.name[0] != ".")
    if status:
        raise SystemExit(f"the last run ended with status {status}")
    grown = {"straight": growth(straight["memory"]), "soaked": growth(soaked["memory"])}
    is_same = straight["digest"] == soaked["digest"]
    is_flat = all(bytes_ <= MOST_GROWTH for bytes_ in grown.values())
    print(f"steps {options.steps}, saved and loaded every {options.save_every}")
    print(f"faults of steps {json.dumps(straight['faults'], sort_keys=True)}")
    print(f"kills {kills} of {options.kills}, the others ended before")
    print(f"checkpoints left {' '.join(left)}")
    print(f"digest {straight['digest']}")
    print(f"digest after kills {'the same' if is_same else soaked['digest']}")
    for name, bytes_ in grown.items():
        print(f"memory of the {name} run grew by {bytes_ / (1 << 20):.1f} MiB")
    print(f"seconds {time.monotonic() - start:.0f}")
    return 0 if is_same and is_flat else 1


def main() -> int:
    """Returns 1 if bits were lost or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of when they come")
    parser.add_argument("--longest-delay", type=float, default=0.1, help="of a kill in a save, s")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--die-at", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("steps", "save_every", "kills"):
        if getattr(options, name) < (name != "kills"):
            parser.error(
                f"Invalid {name}={getattr(options, name)}. Must be >= {name != 'kills':d}."
            )
    if not options.child:
        return soak(options)
    print(json.dumps(train(options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
