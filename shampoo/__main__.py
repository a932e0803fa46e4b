"""``python -m shampoo`` builds the kernels ahead of time and says what this machine can use."""

import argparse
import json
import platform

import torch

from shampoo import backends, jit, ops


def report(build: bool) -> dict[str, object]:
    """The facts a bug report needs: versions, compiler, kernels, cache, threads."""
    reason = ""
    try:
        if build:
            jit.load(retry=True)
        library = str(jit.library_path())
    except jit.BuildError as error:
        reason, library = str(error), ""
    kernels = {
        name: "cpp" if usable else "reference" for name, usable in ops.kernels("CPU").items()
    }
    card, backend = backends.card(), backends.chosen()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpu": torch.cuda.get_device_name() if card else "",
        "backend": backend,
        "compiler": jit.compiler_version().partition("\n")[0],
        "flags": " ".join(jit.cxx_flags()),
        "threads": torch.get_num_threads(),
        "cache": str(jit.cache_dir()),
        "library": library,
        "cpu_kernels": kernels,
        "gpu_kernels": backends.describe(backend, card, backends.table()) if card else {},
        "reason": reason,
    }


def main() -> int:
    """Returns 1 if the kernels were to be built and could not be."""
    parser = argparse.ArgumentParser(prog="python -m shampoo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-build", action="store_true", help="report only, compile nothing")
    arguments = parser.parse_args()
    facts = report(build=not arguments.no_build)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{op} {kind}" for op, kind in value.items())
            print(f"{name:<12} {value or 'none'}")
    return 1 if facts["reason"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
