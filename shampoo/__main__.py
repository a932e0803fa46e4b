"""Builds the kernels ahead of time and says what this machine can use.

The command tune checks and times the kernels of a device anew, and says how they did; plan says
what the optimizer would hold, send and take on many ranks, explain what it would do with every
parameter; dashboard makes a page of the metrics of a run.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any, NoReturn

import torch

from shampoo import __version__, certificates, ops
from shampoo.blocks.cost import CostModel
from shampoo.blocks.declared import choices
from shampoo.blocks.layout import AUTO, DTYPES, LARGE_DIM_METHODS
from shampoo.certificates import tune
from shampoo.commands import dashboard, explain
from shampoo.distributed.process_groups import COMMUNICATION_DTYPES
from shampoo.errors import printable, shown
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import dtype_name
from shampoo.inputs import read_json
from shampoo.ops import backends, jit
from shampoo.planner import plan
from shampoo.planner.architectures import ARCHITECTURES
from shampoo.planner.bounds import LAYOUTS

_MOST_CHARACTERS = 2000  # of an error
_PARAMETER_DTYPES = (*DTYPES, "bfloat16", "float16")


def report(build: bool) -> dict[str, object]:
    """The facts a bug report needs: versions, compiler, kernels, cache, threads."""
    reason, cache, backend = "", "", backends.chosen()
    try:
        cache = str(jit.cache_dir())
        if build:
            jit.build(retry=True)
            if backend != ops.REFERENCE:
                certificates.load_kernels()
        library = str(jit.library_path())
    except jit.BuildError as error:
        reason, library = str(error), ""
    kernels = {name: "cpp" if ops.runs_kernel_on_cpu(name) else "reference" for name in ops.OPS}
    card, table = backends.card(), backends.table()
    in_use = [torch.device("cpu")]
    in_use += [torch.device("cuda", torch.cuda.current_device())] if card else []
    licences = [certificates.licence_of(each) for each in in_use] if build and not reason else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpu": torch.cuda.get_device_name() if card else "",
        "backend": backend,
        "compiler": jit.compiler_version().partition("\n")[0],
        "flags": " ".join(jit.cxx_flags()),
        "threads": torch.get_num_threads(),
        "cache": cache,
        "library": library,
        "certificate": {
            str(device): tune.in_words(device) for device in (in_use if licences else ())
        },
        "set_aside": [
            line
            for device in (in_use if licences else ())
            for line in certificates.complaints_of(device)
        ],
        "cpu_kernels": kernels,
        "gpu_kernels": backends.describe(backend, card, table, licences[-1] if licences else None)
        if card
        else {},
        "reason": reason,
    }


def read_shapes(model: str) -> Any:
    """The shapes of a known model, or those in a JSON file, by name or in a row.

    Raises:
        ValueError: for anything else.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]().shapes
    try:
        shapes = read_json(model)
        if not isinstance(shapes, (dict, list)):
            raise ValueError(f"it is {shown(shapes)}.")
    except ValueError as error:
        names = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"Invalid model={shown(model)}: {error} Must be one of {names}, or a JSON file of"
            " shapes, by name or in a list."
        ) from error
    return shapes


class _Parser(argparse.ArgumentParser):
    """Its errors repeat what was given, whatever that is: escaped, and no more than fits a page."""

    def error(self, message: str) -> NoReturn:
        if len(message) > _MOST_CHARACTERS:
            message = f"{message[:_MOST_CHARACTERS]}..."
        super().error(printable(message))


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=f"{', '.join(ARCHITECTURES)}, or a JSON file of shapes, by name or in a list")
    add("--world-size", type=int, required=True, help="ranks")
    add("--layout", choices=LAYOUTS, default="ddp")
    add("--group", type=int, default=-1, help="num_trainers_per_group; -1 chooses")
    add("--replicas", type=int, default=1, help="copies of the shards, under hsdp")
    wires = [dtype_name(dtype) for dtype in COMMUNICATION_DTYPES]
    add("--communication-dtype", choices=wires, help="of directions; default: as computed")
    add("--devices-per-node", type=int, default=8)
    add("--cost-model", type=Path, help="JSON from python -m benchmarks.calibrate")
    _add_shared_arguments(parser)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What the optimizer is asked to do, for the commands that say what it would."""
    add = parser.add_argument
    add("--block", type=int, default=1024, help='max_preconditioner_dim; "auto" is 256 on CPUs')
    add("--frequency", type=int, default=10, help="precondition_frequency")
    add("--preconditioner", choices=choices(), default="shampoo", help="the kind of it")
    add("--grafting", choices=tuple(GRAFTING), default="adam")
    add("--momentum", type=float, default=0.0)
    add("--large-dim-method", choices=LARGE_DIM_METHODS, default=AUTO, help="of long dimensions")
    add("--grafted-only", nargs="+", default=[], metavar="PATTERN", help="names left unfactored")
    add("--dtype", choices=_PARAMETER_DTYPES, default="float32", help="of parameters and gradients")
    # Suppressed, or its default would undo the same flag before the command.
    add("--json", action="store_true", default=argparse.SUPPRESS, help="print the report as JSON")


def print_plan(options: argparse.Namespace) -> None:
    """Prints the report of ``python -m shampoo plan``."""
    wire = options.communication_dtype
    report = plan(
        read_shapes(options.model),
        options.world_size,
        layout=options.layout,
        num_trainers_per_group=options.group,
        replicas=options.replicas,
        grafted_only=options.grafted_only,
        parameter_dtype=getattr(torch, options.dtype),
        communication_dtype=getattr(torch, wire) if wire else None,
        devices_per_node=options.devices_per_node,
        cost_model=CostModel.load(options.cost_model) if options.cost_model else None,
        **_arguments_of(options),
    )
    print(json.dumps(report.to_json(), indent=2) if options.json else report)


def _arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the optimizer among the options."""
    return {
        "max_preconditioner_dim": options.block,
        "precondition_frequency": options.frequency,
        "preconditioner": options.preconditioner,
        "grafting": options.grafting,
        "momentum": options.momentum,
        "large_dim_method": options.large_dim_method,
    }


def print_explanation(options: argparse.Namespace) -> None:
    """Prints the table of ``python -m shampoo explain``."""
    dtype, arguments = getattr(torch, options.dtype), _arguments_of(options)
    given = explain.read_model(options.model) or read_shapes(options.model)
    found = explain.explanation_of(given, dtype, options.grafted_only, arguments)
    print(json.dumps(explain.to_json(found), indent=2) if options.json else found)


def main() -> int:
    """Returns 1 if the kernels were to be built and could not be."""
    parser = _Parser(prog="python -m shampoo", description=__doc__)
    parser.add_argument("--version", action="version", version=f"shampoo {__version__}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-build", action="store_true", help="report only, compile nothing")
    commands = parser.add_subparsers(dest="command", metavar="plan | explain | dashboard | tune")
    planning = commands.add_parser("plan", help="memory, balance, traffic and time on many ranks")
    _add_plan_arguments(planning)
    explaining = commands.add_parser("explain", help="what is done with every parameter, and why")
    explaining.add_argument("model", help=explain.MODEL.format(names=", ".join(ARCHITECTURES)))
    _add_shared_arguments(explaining)
    showing = commands.add_parser("dashboard", help="a page of the metrics of a run")
    dashboard.add_arguments(showing)
    tuning = commands.add_parser("tune", help="checks and times kernels, and says how")
    tune.add_arguments(tuning)
    options = parser.parse_args()
    chosen = {
        None: (parser, show_facts),
        "plan": (planning, print_plan),
        "explain": (explaining, print_explanation),
        "dashboard": (showing, dashboard.run),
        "tune": (tuning, tune.run),
    }
    command, run = chosen[options.command]
    try:
        return run(options) or 0
    except (ValueError, OSError) as error:
        command.error(str(error))


def show_facts(options: argparse.Namespace) -> int:
    """Prints what this machine can use; returns 1 if the kernels could not be built."""
    return print_facts(report(build=not options.no_build), options.json)


def print_facts(facts: dict[str, object], as_json: bool) -> int:
    """Prints what this machine can use; returns 1 if the kernels could not be built."""
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{op} {kind}" for op, kind in value.items())
            elif isinstance(value, list):
                value = "; ".join(value)
            print(printable(f"{name:<12} {value or 'none'}"))
    return 1 if facts["reason"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
