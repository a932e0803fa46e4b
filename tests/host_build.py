"""The .cu sources built for the host: tests/emulation takes the place of CUDA."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from shampoo.kernels.triton.minimax_program import residual_steps
from shampoo.ops import jit
from shampoo.roots.minimax_table import minimax_schedule

EMULATION = Path(__file__).parent / "emulation"
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
FLAGS += ["-DFP_FAST_FMA", "-DFP_FAST_FMAF"]  # a GPU fuses, whether or not this machine can


@functools.cache
def host_build(truncate: bool = False) -> ModuleType:
    """The launchers of csrc/cuda/launch.h, with raw addresses; skips where nothing can be built.

    ``truncate``: sums of the emulated tensor cores are rounded toward zero instead of to nearest.
    """
    if sys.platform != "linux":
        pytest.skip("the emulation needs the ucontext of Linux")
    if not jit.compiler_version():
        pytest.skip("no C++ compiler: the CUDA kernels are not emulated")
    kernels = sorted(jit.source_dir().glob("cuda/*.cu"))
    name = "emulated_truncating" if truncate else "emulated"
    command = [*jit.compiler(), *FLAGS, *jit.portable_flags()[len(jit.CXX_FLAGS) :]]
    command += [f"-DEMULATION_NAME={name}"] + ["-DEMULATE_TRUNCATION"] * truncate
    pybind11 = Path(torch.__file__).parent / "include"
    for folder in (jit.source_dir(), EMULATION, pybind11, sysconfig.get_paths()["include"]):
        command += ["-I", str(folder)]
    command += ["-x", "c++", *map(str, kernels), str(EMULATION / "bindings.cpp")]

    read = [*sorted(jit.source_dir().rglob("*.h")), *kernels, *sorted(EMULATION.iterdir())]
    parts = [jit.compiler_version(), torch.__version__, sys.version, *command]
    parts += [path.read_text(encoding="utf-8") for path in read if path.is_file()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = jit.cache_dir() / f"emulation-{key}" / f"{name}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            unfinished = library.with_suffix(".part")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            os.replace(unfinished, library)
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _given(scalars):
    """Numbers as floats, tensors as addresses, which are integers; flags as they are.

    The address of one number for each block is in a list.
    """

    def given(scalar):
        if isinstance(scalar, Tensor):
            return [_address(scalar)] if scalar.dim() else _address(scalar)
        return scalar if isinstance(scalar, bool) else float(scalar)

    return list(map(given, scalars))


def _memory(tensors: list[Tensor]) -> list[tuple[int, str, list[int], list[int]]]:
    return [
        (t.data_ptr(), str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride()))
        for t in tensors
    ]


class HostOps:
    """The ops of :mod:`shampoo.ops` on the emulated kernels, with what these add to them."""

    def __init__(self, truncate: bool = False, backward: bool = False) -> None:
        self.module = host_build(truncate)
        self.backward = backward

    def gather_blocks_(self, out, sources, tiles, alpha, accumulate):
        double = out.dtype == torch.float64
        self.module.gather_blocks_(
            *(_address(out), double, _memory(sources), tiles.tolist(), *_given([alpha])),
            accumulate,
        )

    def magnitudes_(self, out, tensors):
        self.module.set_order(self.backward)
        self.module.magnitudes_(_address(out), _memory(tensors))

    def graft_moments_(
        self,
        grad,
        exp_avg,
        exp_avg_sq,
        direction,
        norm,
        sources,
        tiles,
        alpha,
        accumulate,
        beta1,
        correction1,
        beta2,
        weight2,
        correction2,
        eps,
        normalized,
        ahead=None,
    ):
        self.module.set_order(self.backward)
        self.module.graft_moments_(
            *map(_address, (grad, exp_avg, exp_avg_sq, direction, norm)),
            norm.dtype == torch.float64,
            _memory(sources),
            tiles.tolist(),
            *_given([alpha]),
            accumulate,
            *_given((beta1, correction1, beta2, weight2, correction2, eps, normalized)),
            _address(ahead),
        )

    def update_blocks_(
        self,
        params,
        momentum,
        direction,
        scale,
        tiles,
        lr,
        decay,
        mu,
        nesterov,
        seed=None,
        step=0.0,
    ):
        self.module.update_blocks_(
            _memory(params),
            *map(_address, (momentum, direction, scale)),
            direction.dtype == torch.float64,
            tiles.tolist(),
            *_given((lr, decay, mu, nesterov)),
            seed is not None,
            seed or 0,
            *_given([step]),
        )

    def graft_scale_(self, scale, norm, length, is_own, correction, grafted, most, accepted=None):
        self.module.graft_scale_(
            *map(_address, (scale, norm, length, is_own)),
            scale.dtype == torch.float64,
            len(scale),
            *_given([correction]),
            grafted,
            most,
            _address(accepted),
        )

    def small_root(self, A, p, relative_eps, eps=0.0, residual=None):
        """Roots and ridges of [B, n, n] by the standard schedule (roots.md, section 2)."""
        guard = 64  # floats behind the roots that must stay as they are
        batch, n, _ = A.shape
        memory = torch.full((A.numel() + guard,), torch.nan)
        ridge = torch.full((batch,), torch.nan, dtype=torch.float64)
        if residual is None:
            residual = residual_steps(p, minimax_schedule(p, relative_eps))
        schedule = minimax_schedule(p, relative_eps)
        residual = min(residual, len(schedule) - 1)
        assert A.is_contiguous()
        self.module.set_order(self.backward)
        self.module.minimax_small_root_(
            *map(_address, (memory, ridge, A)), n, batch, p, eps, relative_eps, schedule, residual
        )
        assert memory[A.numel() :].isnan().all()
        return memory[: A.numel()].view(A.shape), ridge
