"""The distributed examples, run as their users run them; a killed rank is fault row 3."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    "MKL_CBWR": "COMPATIBLE",  # products of the model may depend on where its matrices lie
}
STEPS = 30

pytestmark = pytest.mark.slow  # importing torch and scikit-learn, in ten processes


def torchrun(world: int, *command: object, restarts: int = 0) -> tuple[str, str]:
    """The digest a run ends in, and all that it prints."""
    launch = [*(sys.executable, "-m", "torch.distributed.run", "--standalone")]
    launch += [f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    done = subprocess.run(
        [*launch, *map(str, command), "--steps", str(STEPS)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    [found] = re.findall(r"SHA-256 of the parameters: ([0-9a-f]{64})\n", done.stdout)
    return found, done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """How DDP on two ranks ends, and its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found, said = torchrun(2, EXAMPLES / "ddp.py", "--folder", folder)
    assert f"2 ranks, steps 0 to {STEPS}: test accuracy" in said
    return found, folder


@pytest.mark.parametrize(("world", "name"), [(1, "ddp"), (2, "fsdp2")])
def test_examples_end_alike_replicated_or_sharded_on_one_rank_and_two(undisturbed, world, name):
    found, said = torchrun(world, EXAMPLES / f"{name}.py")
    assert f"{world} ranks, steps 0 to {STEPS}: test accuracy" in said
    assert found == undisturbed[0]


def test_an_example_goes_on_from_what_the_other_has_saved(undisturbed):
    expected, folder = undisturbed
    (folder / "step-00000030").rename(folder / "step-00000030.partial-00000000")  # never published
    found, said = torchrun(1, EXAMPLES / "fsdp2.py", "--folder", folder)
    assert "1 ranks, steps 20 to 30" in said
    assert found == expected


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_no_bits(undisturbed, tmp_path):
    deadly = [HERE / "crashing.py", 15, EXAMPLES / "fsdp2.py", "--folder", tmp_path]
    found, said = torchrun(2, *deadly, restarts=1)
    assert "SIGKILL" in said or "exitcode: -9" in said
    assert f"2 ranks, steps 10 to {STEPS}" in said
    assert found == undisturbed[0]
