"""Builds csrc/ with the sanitizers of addresses and undefined behaviour, and runs tests on it.

    python tools/sanitize.py [--fuzz 500] [--workers 2] [TEST ...]

The kernels are built by the package itself, by a compiler that adds flags, into a cache of their
own. gcc's runtime of the sanitizers must be there before Python is: it is preloaded. A finding ends
its process at once. Reports of addresses are written to files, since a test may not look at how a
process ends that it has started: all are printed in the end, and one is enough for an exit status
of 1. Those of undefined behaviour go to the standard error, which pytest leaves alone here. Without
names of tests, those of the ops and ``--fuzz`` generated programs run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
OPS = ("test_ops", "test_index_arithmetic", "test_op_numbers", "test_stack_ops")
OPS += ("test_place_independence", "test_graft_moments", "test_stochastic_rounding")
REPORT = "report"  # of a finding: the name of its file, to which the process id is added
FUZZ = "tests/test_fuzz.py::test_a_program_keeps_what_every_program_must"


def compiler() -> str:
    """The command of the compiler: gcc's, whose runtimes are libraries that can be preloaded."""
    return os.environ.get("CXX") or "c++"


def runtime(name: str) -> str:
    """The path of a library that comes with the compiler."""
    command = [*shlex.split(compiler()), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{compiler()} has no {name}. Install gcc's sanitizers, or set CXX.")
    return found


def environment(folder: Path) -> dict[str, str]:
    """Variables under which the package builds and runs with sanitizers."""
    wrapper = folder / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler()} {FLAGS} "$@"\n')
    wrapper.chmod(0o755)
    # Python has no libstdc++, whose exceptions the sanitizer wraps when it starts.
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    return {
        **os.environ,
        "CXX": str(wrapper),
        "SHAMPOO_CACHE_DIR": str(folder / "cache"),
        "LD_PRELOAD": preload,
        # What Python keeps to its end is no leak. The compiler that runs below is not looked at.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=1"
        f":log_path={folder / REPORT}",
        # Its log_path would set that of the other runtime, whose functions come first.
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # It reports freed memory as used where it would only be used again.
        "PYTHONMALLOC": "malloc",
    }


def build(variables: dict[str, str]) -> Path:
    """The library, in which the sanitizers are."""
    done = subprocess.run([sys.executable, "-m", "shampoo"], env=variables, cwd=ROOT, check=False)
    found = list(Path(variables["SHAMPOO_CACHE_DIR"]).rglob("shampoo_csrc.so"))
    if done.returncode or len(found) != 1:
        raise SystemExit("csrc/ could not be built with sanitizers.")
    content = found[0].read_bytes()
    if b"__asan_report" not in content or b"__ubsan_handle" not in content:
        raise SystemExit(f"{found[0]} has no sanitizers in it: the flags were not used.")
    return found[0]


def reports(folder: Path) -> int:
    """Prints what was found about addresses in any process; how many findings there are."""
    written = [path.read_text(errors="replace") for path in sorted(folder.glob(f"{REPORT}.*"))]
    print("\n".join(written))
    # Warnings of the runtime go there too: that it does not know the stack of a thread, say.
    found = sum("ERROR: AddressSanitizer" in text for text in written)
    print(f"reports {found}", flush=True)
    return found


def main() -> int:
    """The exit status of pytest, or 1 for a report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fuzz", type=int, default=500, help="generated programs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("tests", nargs="*", help="instead of those of the ops and the programs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        variables = {**environment(Path(folder)), "SHAMPOO_FUZZ": str(options.fuzz)}
        print("sanitized:", build(variables).name, flush=True)
        tests = options.tests or [*(f"tests/ops/{name}.py" for name in OPS), FUZZ]
        # Its own marks: what is slow runs here too.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider"]
        command += ["--capture=sys", "-n", str(options.workers), *tests]
        status = subprocess.run(command, env=variables, cwd=ROOT, check=False).returncode
        return int(reports(Path(folder)) > 0) or status


if __name__ == "__main__":
    raise SystemExit(main())
