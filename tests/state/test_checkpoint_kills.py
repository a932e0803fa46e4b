"""Jobs that are killed while they save: the newest whole checkpoint loads to the bit.

``SHAMPOO_KILLS`` is the number of random ones, on each number of ranks (2).
"""

import os
import subprocess
import sys
from pathlib import Path

import dying_saves
import pytest
from patience import PATIENCE

KILLS = int(os.environ.get("SHAMPOO_KILLS", "2"))


def run(*arguments: object) -> str:
    command = [sys.executable, dying_saves.__file__, *map(str, arguments)]
    # A fork of a process with threads could wait for a lock that none of its own holds.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_within_a_save_loses_nothing_and_leaves_nothing(tmp_path, world):
    said = run("random", tmp_path, KILLS, world, 1)
    assert said.startswith(f"{KILLS} kills on {world} ranks")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_in_front_of_every_operation_on_a_file_loses_nothing(tmp_path):
    said = run("moments", Path(tmp_path))
    assert int(said.split()[-2]) > 40
