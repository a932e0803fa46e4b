"""A process apart: what it returns, raises and notes, and that it may be lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from shampoo.ops import apart
from shampoo.ops.apart import Apart, LostError


def told(value):
    apart.note(f"got {value}")
    return value, os.getpid()


def fails(value):
    raise ValueError(f"Invalid value={value}")


class NotToBeSentError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def fails_oddly():
    raise NotToBeSentError(1, two=lambda: None)


def dies(number):
    print("a last word", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)


def ends():
    os._exit(7)


def sleeps_after_notes(count):
    for index in range(count):
        time.sleep(0.4)
        apart.note(str(index))
    time.sleep(60.0)


def test_it_answers_and_is_started_again_when_it_was_lost():
    with Apart({"SHAMPOO_APART": "1"}) as process:
        noted = []
        value, first = process.ask(told, 3, timeout=60, on_note=noted.append)
        assert (value, noted) == (3, ["got 3"])
        assert first != os.getpid()
        assert process.ask(os.getenv, "SHAMPOO_APART", timeout=60) == "1"
        with pytest.raises(ValueError, match="Invalid value=4"):
            process.ask(fails, 4, timeout=60)
        with pytest.raises((RuntimeError, TypeError)):
            process.ask(fails_oddly, timeout=60)
        assert process.ask(told, 5, timeout=60)[1] == first, "an exception costs no process"

        with pytest.raises(LostError, match=r"died by SIGILL \(a last word\)"):
            process.ask(dies, signal.SIGILL, timeout=60)
        with pytest.raises(LostError, match="ended with status 7"):
            process.ask(ends, timeout=60)
        start = time.monotonic()
        with pytest.raises(LostError, match="did not end within 2 s"):
            process.ask(sleeps_after_notes, 6, timeout=2, on_note=noted.append)
        assert time.monotonic() - start > 4.0, "what says something has not hung"
        assert noted[-1] == "5"
    assert process._process is None


def test_the_program_of_the_user_is_not_run_again(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "print('begins', flush=True)\n"
        "from shampoo.ops.apart import Apart\n"
        "import os\n"
        "with Apart() as process:\n"
        "    assert process.ask(os.getpid, timeout=60) != os.getpid()\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "begins\n"), done.stderr
