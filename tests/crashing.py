"""Runs a script under torchrun, and kills one of its ranks in the middle of a step, the first time.

torchrun ... crashing.py STEP SCRIPT [ARGUMENTS]
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from shampoo import Shampoo


def main() -> None:
    step, script, *arguments = sys.argv[1:]
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        left = int(step)

        def kill(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        build = Shampoo.__init__

        def build_deadly(self: Shampoo, *given: Any, **named: Any) -> None:
            build(self, *given, **named)
            self.register_step_pre_hook(kill)

        Shampoo.__init__ = build_deadly
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
