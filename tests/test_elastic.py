"""A job that torchrun has lost is started again on another number of ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

HERE = Path(__file__).parent
SCRIPT = HERE / "elastic_run.py"
STEPS = 11
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    "MKL_CBWR": "COMPATIBLE",  # products of the model may depend on where its matrices lie
    "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
}

pytestmark = pytest.mark.slow  # importing torch in sixteen processes


def torchrun(world: int, *command: object) -> tuple[int, str]:
    """The exit status of a run, and all that it prints."""
    launch = [*(sys.executable, "-m", "torch.distributed.run", "--standalone")]
    done = subprocess.run(
        [*launch, f"--nproc-per-node={world}", *map(str, command)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


def ended(world: int, first: int, said: str) -> str:
    """The digest that a run has printed, whose ranks went on from a step."""
    [found] = re.findall(rf"{world} ranks, steps {first} to {STEPS}: ([0-9a-f]{{64}})\n", said)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nothing interrupts, on one rank."""
    status, said = torchrun(1, SCRIPT, tmp_path_factory.mktemp("alone"), STEPS, "ddp")
    assert status == 0, said
    return ended(1, 0, said)


@pytest.mark.parametrize(("layout", "before", "after"), [("ddp", 3, 2), ("fsdp2", 2, 3)])
def test_a_job_that_was_killed_goes_on_with_the_same_bits_on_another_number_of_ranks(
    undisturbed: str, tmp_path: Path, layout: str, before: int, after: int
) -> None:
    # Rank 1 is killed in its eighth step, two after a checkpoint, and torchrun ends the others.
    deadly = (HERE / "crashing.py", 8, SCRIPT)
    status, said = torchrun(before, *deadly, tmp_path, STEPS, layout)
    assert status != 0
    assert "SIGKILL" in said or "exitcode: -9" in said
    assert f"to {STEPS}: " not in said
    status, said = torchrun(after, SCRIPT, tmp_path, STEPS, layout)
    assert status == 0, said
    assert ended(after, 6, said) == undisturbed
