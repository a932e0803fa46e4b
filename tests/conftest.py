"""What every test shares: one thread, one seed, and uninitialised memory on request.

Where ``CI=true``, only a missing GPU excuses a test that is skipped.
"""

import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from compiled import load_compiled
from ranks import Ranks

from shampoo import ops
from shampoo.kernels.reference import ops as reference


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") != "true" or hasattr(session.config, "workerinput"):
        return  # a worker of pytest-xdist sends its reports to the process that started it
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = {report.longrepr[2] for report in reporter.stats.get("skipped", [])}
    if missing := sorted(reason for reason in reasons if "GPU" not in reason):
        reporter.write_line("\nNot allowed with CI=true:", red=True)
        reporter.write_line("\n".join(missing), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors, and reductions in one order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that play the ranks of a run; none is started before one is asked for."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "compiled"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    """The ops twice. What has no CPU kernel goes to its reference through the table."""
    if request.param == "reference":
        return reference
    load_compiled()
    return ops


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """Memory that nobody wrote is NaN (the largest integer for integers), as in torch's own tests.

    Deterministic mode fills every `empty` on every path, C++ included; `warn_only` so that an
    operation without a deterministic kernel does not fail a test about memory.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def said(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """All that was warned of so far, whether by `warnings` or by the log."""
    logged = logging.WARNING
    return lambda: "\n".join(
        [str(w.message) for w in recwarn.list]
        + [record.getMessage() for record in caplog.records if record.levelno >= logged]
    )


@pytest.fixture(scope="session")
def alone(ranks: Ranks) -> dict[str, str]:
    """What every case of :mod:`layouts` ends in on one process."""
    from layouts import CASES, digests  # imports much of torch.distributed

    [found] = ranks.returns(digests, 1, {"alone": ("replicated", {})}, CASES)
    return {case: value for (_, case), value in found.items()}
