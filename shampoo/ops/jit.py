"""Builds ``csrc/`` on first use. No other module runs a compiler.

A build is named by a hash of everything that shapes it, made in a private folder and published by
one atomic rename, so no reader ever sees half a library. The lock only saves ranks from compiling
the same thing twice; the operating system drops it when its holder dies. The compiler runs in a
process apart, since torch loads what it has built at once: here it is loaded when it was checked.
A library that somebody else may have written, or whose content is not the recorded one, is not
loaded at all (:mod:`shampoo.ops.trust`).
"""

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import torch

from shampoo.errors import shown
from shampoo.ops import backends
from shampoo.ops.apart import Apart, take_children_along
from shampoo.ops.registry import OPS, has_kernel
from shampoo.ops.trust import (
    is_whole,
    locked,
    make_folder,
    objection,
    private_folder,
    publish_recorded,
    write_text,
)

LIBRARY = "shampoo_csrc.so"
FAILURE = "failure.txt"

# A failed build is not repeated by the ranks that waited for it, nor for this many seconds after:
# longer would keep the references in use after a full disk was emptied.
FAILURE_LIFETIME = 3600.0

_LONGEST = 1800.0  # seconds of a build
_LONGEST_ANSWER = 20.0  # seconds until a compiler has said which one it is

# No -std: torch passes the one its own headers need, and the last one given would win. The rest
# leaves every value as IEEE 754 has it, and bits independent of where a loop was cut.
CXX_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

# Not -march=native: a cache on a shared file system may serve machines of several kinds, and these
# levels are part of the key. They are torch's own, found at run time.
CPU_LEVELS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}

# What a compiler takes from its surroundings, beside its version.
COMPILER_ENVIRONMENT = (
    *("CXX", "PATH", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_LIBRARY_PATH", "TMPDIR"),
    *("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PYTORCH_NVCC"),
)


class BuildError(RuntimeError):
    """Kernels that were asked for could not be built or loaded, or did not pass their checks."""


def source_dir() -> Path:
    """The folder of the C++ and CUDA sources, wherever the package is installed."""
    return Path(str(resources.files("shampoo.csrc")))


def sources() -> list[Path]:
    """The translation units; headers count in the key but are not compiled on their own.

    ``*.cu`` and ``*_cuda.cpp`` are compiled for a torch with CUDA, where they are wanted.
    """
    units = sorted(path for path in source_dir().rglob("*") if path.suffix in {".cpp", ".cu"})
    if needs_cuda():
        return units
    return [path for path in units if path.suffix == ".cpp" and not path.stem.endswith("_cuda")]


def needs_cuda() -> bool:
    """Whether the backend wants the kernels in CUDA C++; ``auto`` only where they can be built."""
    if not torch.version.cuda:
        return False
    backend = backends.chosen()
    if "cuda" not in backends.wanted(backend, backends.card(), backends.table()):
        return False
    return backend == "cuda" or _has_toolkit(_toolkit())


def _toolkit() -> str:
    """Where torch looks for nvcc and the CUDA headers; empty if it knows no place."""
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME or ""


def _has_toolkit(folder: str) -> bool:
    return bool(folder) and Path(folder, "include", "cuda_runtime.h").is_file()


def has_cuda_sources() -> bool:
    """Whether this torch and these sources need nvcc."""
    return any(path.suffix == ".cu" for path in sources())


def cuda_flags() -> list[str]:
    """One ``-gencode`` for each of ``SHAMPOO_CUDA_ARCH``, else for the current device.

    Raises:
        BuildError: if there is no GPU to ask and the variable is not set.
    """
    if not has_cuda_sources():
        return []
    arches = os.environ.get("SHAMPOO_CUDA_ARCH", "").replace(";", " ").split()
    if not arches:
        if not torch.cuda.is_available():
            raise BuildError("no GPU is visible: set SHAMPOO_CUDA_ARCH, for example to '9.0'")
        arches = ["{}.{}".format(*torch.cuda.get_device_capability())]
    numbers = [arch.replace(".", "") for arch in arches]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def compiler() -> list[str]:
    """The command of the C++ compiler: ``CXX``, else ``c++``, as torch chooses it.

    Raises:
        BuildError: if ``CXX`` is no command.
    """
    asked = os.environ.get("CXX", "")
    try:
        return shlex.split(asked) or ["c++"]
    except ValueError as error:
        raise BuildError(
            f"Invalid CXX={shown(asked)}: {error}. Must be a command as a shell reads it."
        ) from error


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """What a command says of itself; nothing if it does not say so in time."""
    try:
        answer = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LONGEST_ANSWER,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.decode(errors="replace").strip()


def compiler_version() -> str:
    """What the compiler says of itself; empty if there is none that answers."""
    try:
        command = compiler()
    except BuildError:
        return ""
    return _version(tuple(command)) if shutil.which(command[0]) else ""


def nvcc_version() -> str:
    """What the CUDA compiler that torch would run says of itself; empty if there is none."""
    toolkit = _toolkit()
    command = os.environ.get("PYTORCH_NVCC") or (f"{toolkit}/bin/nvcc" if toolkit else "")
    return _version((command,)) if shutil.which(command) else ""


def compiler_versions() -> list[str]:
    """What every compiler that a build needs says of itself; empty for one that is not there."""
    return [compiler_version(), nvcc_version()] if has_cuda_sources() else [compiler_version()]


def portable_flags() -> list[str]:
    """The flags of the C++ compiler that do not depend on which one it is."""
    level = CPU_LEVELS.get(torch.backends.cpu.get_cpu_capability())
    return [*CXX_FLAGS, level] if level else [*CXX_FLAGS]


def cxx_flags() -> list[str]:
    """The flags of the C++ compiler on this machine."""
    # gcc's calls resolve to the OpenMP runtime that torch has loaded, hence to its threads and
    # torch.set_num_threads. clang's need a second runtime, so there the kernels run on one thread.
    openmp = [] if "clang" in compiler_version() else ["-fopenmp"]
    return portable_flags() + openmp


def cache_dir() -> Path:
    """``SHAMPOO_CACHE_DIR``, else ``shampoo`` in the user's cache folder."""
    if path := os.environ.get("SHAMPOO_CACHE_DIR"):
        return Path(path).expanduser()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user whom the system does not know
        raise BuildError(f"{error} Set SHAMPOO_CACHE_DIR to a folder of yours.") from error
    return Path(home) / "shampoo"


def library_path() -> Path:
    """Where the library lies, built or not: ``cache/sources/compilers``, both hashes.

    ``sources`` stands for torch, CUDA, flags and files, ``compilers`` for what those say of
    themselves: a machine that lacks one can so find what another has built.
    """
    parts = [torch.__version__, str(torch.version.cuda), *portable_flags(), *cuda_flags()]
    folder = source_dir()
    parts += [str(path.relative_to(folder)) for path in sources()]
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            parts += [str(path.relative_to(folder)), path.read_text(encoding="utf-8")]
    return trusted(Path(digest(*parts), digest(*compiler_versions()), LIBRARY))


def trusted(name: Path) -> Path:
    """Where a file of the cache lies: elsewhere if others may have written it."""
    path = cache_dir() / name
    reason = objection(path, cache_dir())
    return private_folder(reason) / name if reason else path


def digest(*parts: str) -> str:
    """16 hexadecimal digits that stand for some text."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load(retry: bool = False) -> None:
    """Registers the compiled kernels with :mod:`shampoo.ops`, building them if nobody has.

    Args:
        retry: build even if the same build failed a short while ago.

    Raises:
        BuildError: with the reason and what to do about it.
    """
    library = build(retry)
    if not _loads(library):
        library = rebuild(library, retry)
        if not _loads(library):
            raise BuildError(f"{library} was built and cannot be loaded. Check CXX.")


def build(retry: bool = False) -> Path:
    """Where the library lies, which is built if nobody has. It is not loaded.

    Args:
        retry: build even if the same build failed a short while ago.

    Raises:
        BuildError: with the reason and what to do about it.
    """
    if os.environ.get("SHAMPOO_DISABLE_JIT") == "1":
        raise BuildError("SHAMPOO_DISABLE_JIT=1 forbids building csrc/. Unset it.")
    try:
        library = library_path()
        if is_whole(library):
            return library
        if not all(compiler_versions()):
            for other in sorted(library.parent.parent.glob(f"*/{LIBRARY}")):
                if not objection(other, library.parents[2]) and is_whole(other):
                    return other
        return _made(library, retry, lambda: is_whole(library))
    except OSError as error:
        raise BuildError(f"{error}. Set SHAMPOO_CACHE_DIR to a writable folder.") from error


def rebuild(library: Path, retry: bool = False) -> Path:
    """Builds a library that cannot be loaded anew, unless another process already has."""
    before = library.stat().st_ino
    try:
        return _made(library, retry, lambda: library.stat().st_ino != before and is_whole(library))
    except OSError as error:
        raise BuildError(f"{error}. Set SHAMPOO_CACHE_DIR to a writable folder.") from error


def _made(library: Path, retry: bool, is_there: Callable[[], bool]) -> Path:
    _require_compiler()
    make_folder(library.parent, library.parents[2])
    with locked(library.with_suffix(".lock")):
        if not is_there():  # no other process built it while this one waited
            _raise_known_failure(library.parent, retry)
            _build(library)
    return library


def _loads(library: Path) -> bool:
    """Loads a built library. One that does not load, or has no kernel, counts as not built."""
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return any(has_kernel(name, "CPU") for name in OPS)


def _require_compiler() -> None:
    command = compiler()[0]
    if not shutil.which(command):
        raise BuildError(
            f"no C++ compiler: {shown(command)} is not on PATH. Install g++ or set CXX."
        )
    if not compiler_version():
        raise BuildError(
            f"{shown(command)} does not answer --version within {_LONGEST_ANSWER:g} s. Set CXX to a"
            " compiler that does."
        )
    if has_cuda_sources():
        toolkit = _toolkit()
        if not _has_toolkit(toolkit):
            where = toolkit or "PATH"
            raise BuildError(f"no CUDA toolkit in {where!r}. Install it or set CUDA_HOME.")


def _surroundings() -> str:
    """One line that changes when the compiler may find other things than before."""
    return digest(*(os.environ.get(name, "") for name in COMPILER_ENVIRONMENT))


def _raise_known_failure(folder: Path, retry: bool) -> None:
    record = folder / FAILURE
    if retry or not record.exists() or time.time() - record.stat().st_mtime > FAILURE_LIFETIME:
        return
    surroundings, _, text = record.read_text().partition("\n")
    if surroundings == _surroundings():
        raise BuildError(f"{text}\n(remembered from {record}; `python -m shampoo` tries again)")


def _build(library: Path) -> None:
    """Compiles and publishes the library. The caller holds the lock."""
    folder = library.parent
    for abandoned in folder.glob("build-*"):  # by a holder that died
        shutil.rmtree(abandoned, ignore_errors=True)
    seconds = 60 if has_cuda_sources() else 15
    print(
        f"shampoo: building kernels for torch {torch.__version__}, once, "
        f"about {seconds} s ({folder})",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch, _ninja_on_path():
        try:
            with Apart() as process:
                process.ask(_compile, Path(scratch), timeout=_LONGEST)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            text = f"csrc/ could not be built with {shlex.join(compiler())}.\n{error}"
            write_text(folder / FAILURE, f"{_surroundings()}\n{text}")
            raise BuildError(text) from error
        publish_recorded(Path(scratch) / LIBRARY, library)
    (folder / FAILURE).unlink(missing_ok=True)


def _compile(scratch: Path) -> None:
    from torch.utils import cpp_extension

    take_children_along()
    cpp_extension.load(
        name=Path(LIBRARY).stem,
        sources=[str(path) for path in sources()],
        extra_cflags=cxx_flags(),
        extra_cuda_cflags=["-O3", *cuda_flags()],
        extra_include_paths=[str(source_dir())],
        build_directory=str(scratch),
        is_python_module=False,
    )


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch runs bare ``ninja``, which an environment that is not activated does not offer."""
    if shutil.which("ninja"):
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
