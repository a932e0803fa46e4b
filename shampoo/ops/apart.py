"""A process apart, for what may not come back: a compiler's product, a kernel that nobody has run.

It runs functions that can be imported, one at a time. One that dies by a signal or does not end
costs the process and not this one; a new one is started for the next. The program of the user is
not run in it, as it would be in a child of :mod:`multiprocessing`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

# Isolated, with the path of the parent: what is imported here is what is imported there. Meanwhile
# nothing becomes garbage, for which Python would look a hundred times.
_START = (
    "import gc; gc.disable(); import sys; sys.path[:] = {path!r}; from shampoo.ops import apart;"
    " gc.freeze(); gc.enable(); apart._serve({end})"
)
_STARTING = 120.0  # seconds until the first answer, which torch's import may take on a busy disk

Note = Callable[[str], None]


class LostError(RuntimeError):
    """The process died or did not answer; the message says how: ``died by SIGILL``."""


class Apart:
    """A process that is started when it is needed, and again when it was lost. A context manager.

    Args:
        environment: variables for it, beside those of this process.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process

    def __enter__(self) -> "Apart":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._said.close()

    def ask(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float,
        on_note: Note = lambda text: None,
    ) -> Any:
        """What a function returns there.

        Args:
            function: one that can be imported; so must be all that it takes and returns.
            arguments: of it.
            timeout: seconds until it must answer, or :func:`note` something.
            on_note: called with what it notes.

        Raises:
            LostError: if the process dies or takes longer.
            Exception: what the function raises.
        """
        connection = self._connection or self._start()
        try:
            connection.send((function, arguments))
            kind, value = self._hear(connection, timeout)
            while kind == "noted":
                on_note(value)
                kind, value = self._hear(connection, timeout)
        except (EOFError, OSError) as error:
            raise LostError(self._cause()) from error
        if kind == "raised":
            raise value
        return value

    def _hear(self, connection: Connection, timeout: float) -> tuple[str, Any]:
        if not connection.poll(timeout):
            self.stop()
            raise LostError(f"did not end within {timeout:.3g} s")
        heard: tuple[str, Any] = connection.recv()
        return heard

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        code = _START.format(path=sys.path, end=theirs.fileno())
        with theirs:
            self._said.seek(0)
            self._said.truncate()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", code],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                start_new_session=True,  # so that what it has started can be ended with it
            )
        self._connection = Connection(ours.detach())
        try:
            self._hear(self._connection, _STARTING)
        except (EOFError, OSError) as error:
            raise LostError(f"could not start: {self._cause()}") from error
        return self._connection

    def _cause(self) -> str:
        """How the process ended, which it has or is about to, with the last of what it said."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            code = 0
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        self.stop()
        how = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"{how} ({said[-1][:200]})" if said else how

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # compilers too
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


_to_parent: Connection | None = None


def note(text: str) -> None:
    """Tells the process that asked how far this one has come; nothing where nobody asked."""
    if _to_parent is not None:
        _to_parent.send(("noted", text))


def _serve(end: int) -> None:
    """Answers until the parent closes its end, or dies."""
    global _to_parent
    _die_with_the_parent()
    _to_parent = connection = Connection(end)
    connection.send(("started", None))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        try:
            answer = "returned", function(*arguments)
        except Exception as error:
            answer = "raised", error
        try:
            connection.send(answer)
        except Exception:  # of an error that cannot be sent
            connection.send(("raised", RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))
    os._exit(0)  # what is loaded here may not live through an orderly end


def take_children_along() -> None:
    """Lets the death of the parent end what this process starts, too, while it waits for that.

    A compiler would go on for minutes otherwise, in a folder that somebody else clears.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os.killpg(0, signal.SIGKILL))
    _die_with_the_parent(signal.SIGTERM)


def _die_with_the_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """A kernel that hangs must not outlive a run that was killed. No image of memory is kept."""
    with contextlib.suppress(Exception):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(Exception):  # Linux only
        import ctypes

        ctypes.CDLL(None).prctl(1, by, 0, 0, 0)  # PR_SET_PDEATHSIG
