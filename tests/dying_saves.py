"""Jobs that save in a folder and are killed there, and what is in it afterwards.

``python dying_saves.py random FOLDER KILLS RANKS SEED`` kills at random moments of a save, and
``python dying_saves.py moments FOLDER`` in front of every operation on a file. Both fork: importing
torch for each job would take longer than all it does. Prints one line; any loss is an error.
"""

import contextlib
import hashlib
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_files import listing
from torch import nn

from shampoo import Shampoo, checkpoint

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
KEEP = 2


def build() -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    return model, Shampoo(
        model.parameters(), lr=0.1, momentum=0.9, precondition_frequency=2, max_preconditioner_dim=4
    )


def train(model: nn.Module, optimizer: Shampoo, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def digest(model: nn.Module, optimizer: Shampoo) -> str:
    """Of all bits of parameters and state, of a single process."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().numpy().tobytes())
        for key, value in sorted(optimizer.state[param].items()):
            found.update(key.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


class Straight:
    """The digests of a run that nobody interrupts."""

    def __init__(self) -> None:
        self._run = build()
        self._digests = ["nothing"]

    def at(self, step: int) -> str:
        while len(self._digests) <= step:
            train(*self._run, len(self._digests))
            self._digests.append(digest(*self._run))
        return self._digests[step]


def loaded(folder: Path, straight: Straight) -> int:
    """The step that a single process finds, with the bits of a straight run."""
    model, optimizer = build()
    step = checkpoint.load(folder, model, optimizer) or 0
    if step:
        assert digest(model, optimizer) == straight.at(step), f"other bits at step {step}"
    return step


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """What a child does: it never comes back, whatever happens in it."""
    try:
        yield
    except BaseException as error:
        print(f"ended by {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def job(rank: int, world: int, folder: Path, store: str, saves: int, say: int) -> None:
    """Goes on from what is there, and saves after each step."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, optimizer = build()
    start = checkpoint.load(folder, model, optimizer) or 0
    for step in range(start + 1, start + 1 + saves):
        train(model, optimizer, step)
        if rank == 0:
            os.write(say, f"begin {step}\n".encode())
        checkpoint.save(folder, model, optimizer, step=step, keep=KEEP)
        if rank == 0:
            os.write(say, f"end {step}\n".encode())
    os._exit(0)


def start(folder: Path, world: int, saves: int) -> tuple[list[int], Any]:
    """Process ids of all ranks, and what the first one says."""
    there, say = os.pipe()
    # A store that a dead run has left would be of no use to the next.
    store = tempfile.mktemp(prefix="store-")
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            with forked():
                os.close(there)
                job(rank, world, folder, store, saves, say)
        pids.append(pid)
    os.close(say)
    return pids, os.fdopen(there)


def kill_at_random(folder: Path, kills: int, world: int, seed: int) -> str:
    """Kills all ranks, one after the other, somewhere in a save; goes on from what is there."""
    chance, straight, took, within, partial = random.Random(seed), Straight(), 0.1, 0, 0
    for _ in range(kills):
        before = loaded(folder, straight)
        pids, lines = start(folder, world, 1000)
        said = []
        for _ in range(2 * chance.randrange(2) + 1):
            began = time.monotonic()
            said.append(lines.readline().split())
            if said[-1][:1] == ["end"]:
                took = time.monotonic() - began
        assert said[-1][:1] == ["begin"], said
        time.sleep(chance.uniform(0.0, 1.1 * took))
        for pid in chance.sample(pids, len(pids)):
            os.kill(pid, signal.SIGKILL)
            time.sleep(chance.choice([0.0, 0.0, 0.03]))
        for pid in pids:
            os.waitpid(pid, 0)
        said += [line.split() for line in lines]
        lines.close()
        ended = max([int(step) for word, step in said if word == "end"], default=before)
        begun = max(int(step) for word, step in said if word == "begin")
        found = loaded(folder, straight)
        assert ended <= found <= begun, (before, ended, found, begun)
        within += begun > ended
        partial += any("partial" in name for name in listing(folder))
    pids, lines = start(folder, world, 1)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * world
    lines.close()
    assert_clean(folder, loaded(folder, straight))
    return f"{kills} kills on {world} ranks, {within} within a save, {partial} left something"


def assert_clean(folder: Path, step: int) -> None:
    expected = [f"step-{step - back:08d}" for back in reversed(range(KEEP)) if step > back]
    assert listing(folder) == expected, listing(folder)


def kill_at_every_moment(folder: Path) -> str:
    """Ends a process in front of each operation on a file of two saves, the second of one step."""
    straight, moment = Straight(), 0
    while True:
        moment += 1
        before = loaded(folder, straight)
        pid = os.fork()
        if pid == 0:
            with forked():
                model, optimizer = build()
                checkpoint.load(folder, model, optimizer)
                sys.addaudithook(_death(folder, moment))
                train(model, optimizer, before + 1)
                for _ in range(2):
                    checkpoint.save(folder, model, optimizer, step=before + 1, keep=KEEP)
                os._exit(0)
        has_ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert loaded(folder, straight) in (before, before + 1)
        if has_ended:
            assert_clean(folder, before + 1)
            return f"killed in front of {moment - 1} operations"


def _death(folder: Path, moment: int) -> Any:
    left = moment

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        # What is removed is named within its own directory.
        if event in EVENTS and (event != "open" or str(folder) in str(arguments[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    how, folder, *numbers = sys.argv[1:]
    if how == "moments":
        print(kill_at_every_moment(Path(folder)))
    else:
        print(kill_at_random(Path(folder), *map(int, numbers)))


if __name__ == "__main__":
    main()
