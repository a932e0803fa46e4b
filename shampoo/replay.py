"""Training iterations replayed from CUDA graphs."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from shampoo.blocks.pattern_cache import Pattern
from shampoo.optimizer import Shampoo

Recorded = tuple[Callable[[], None], Any]
Kept = tuple[Callable[[], None], Any, Pattern]  # and which gradients were there


def record_graph(iteration: Callable[[], Any], pool: Any) -> Recorded:
    """Captures what an iteration does, without doing it: how to replay it, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = iteration()
    return graph.replay, result


class Replay:
    """Runs an iteration of training from CUDA graphs, one for every set of roots to refresh.

    An iteration of a kind runs eagerly the first time, which makes its state and tables, is
    captured the second time, and replayed from then on. There are two kinds of steps, with and
    without a refresh, or with ``refresh_schedule="staggered"`` one for every slot.
    Graphs are dropped, and the kinds run eagerly again, when the optimizer's parameters change or
    a checkpoint is loaded. ::

        optimizer = Shampoo(model.parameters(), lr=torch.tensor(1e-3, device="cuda"),
                            capturable=True)
        batch = torch.empty(64, 784, device="cuda")

        def iteration():
            optimizer.zero_grad()
            loss = loss_of(model(batch))
            loss.backward()
            optimizer.step()
            return loss

        train = Replay(optimizer, iteration)
        for data in loader:
            batch.copy_(data)
            loss = train()  # the same tensor again and again: clone it to keep it
            scheduler.step()  # writes into the tensor lr

    What is a number of the host when an iteration is captured stays what it was, so ``lr`` and
    ``betas`` that move must be tensors on the device; what else of a group changes is not seen.

    Args:
        optimizer: with ``capturable=True``, its parameters on a GPU.
        iteration: takes one step of the optimizer, on memory that stays where it is.
        record: does what :func:`record_graph` does.

    Raises:
        ValueError: if the optimizer is not capturable.
    """

    def __init__(
        self,
        optimizer: Shampoo,
        iteration: Callable[[], Any],
        record: Callable[[Callable[[], Any], Any], Recorded] = record_graph,
    ) -> None:
        if not all(group["capturable"] for group in optimizer.param_groups):
            raise ValueError(
                "Invalid capturable=False. Must be True for a step to be replayed: pass it to the"
                " optimizer."
            )
        self._optimizer = optimizer
        self._iteration = iteration
        self._record = record
        self._pool: Any = None
        self._recorded: dict[Hashable, Kept | None] = {}  # None: has run eagerly
        self._plan: object = None

    def __call__(self) -> Any:
        """Runs one iteration; returns what it returned."""
        optimizer = self._optimizer
        kind = optimizer.coming_refresh()
        if self._plan is not optimizer._plan:  # other memory than the graphs know
            self._recorded.clear()
            self._plan = optimizer._plan
        if kind not in self._recorded:
            self._recorded[kind] = None
            return _on_side_stream(self._iteration)
        recorded = self._recorded[kind]
        if recorded is None:
            if self._pool is None and torch.cuda.is_available():
                self._pool = torch.cuda.graph_pool_handle()
            replay, result = self._record(self._iteration, self._pool)
            assert optimizer._plan is not None
            recorded = self._recorded[kind] = (replay, result, optimizer._plan.present)
        replay, result, present = recorded
        replay()
        optimizer.replayed(present)
        return result


def _on_side_stream(iteration: Callable[[], Any]) -> Any:
    """What a capture follows must not have run on the default stream, as torch's graphs ask."""
    if not torch.cuda.is_available():
        return iteration()
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = iteration()
    current.wait_stream(side)
    return result
