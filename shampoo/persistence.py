"""What an optimizer keeps between steps, and how it is saved, copied and loaded.

Nothing here communicates but :meth:`Persistent.consolidate_state_dict`: frameworks save and load on
one rank, or before there are others (distributed.md, rule 16).
"""

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from shampoo import capture
from shampoo.agreement import Attempt
from shampoo.consolidation import consolidate
from shampoo.division import Owners
from shampoo.exchanges import Exchanges
from shampoo.state_dict import match, signed
from shampoo.step_plan import Plan
from shampoo.workers import Workers

logger = logging.getLogger(__name__)


class Persistent(Optimizer):
    """The part of an optimizer that outlives a step: its plan, and the state under it."""

    # On the class, so that an unpickled or copied optimizer, which has none, starts without.
    _plan: Plan | None = None
    _kept: dict[Tensor, Owners] | None = None  # owners of blocks in a plan that is no more
    _exchanges: Exchanges | None = None  # buffers of the plan
    _on_device: capture.DeviceState | None = None  # of the plan, if it is capturable
    _incoming: dict[Tensor, dict[str, Any]] | None = None
    _damage: str = ""  # why this rank cannot go on until it has loaded a checkpoint
    _consolidated: dict[Tensor, dict[str, Tensor]] | None = None
    _workers: Workers

    def _fill_groups(self) -> None:
        """Gives groups that an older version saved what they lack."""
        raise NotImplementedError

    def _current_plan(self) -> Plan:
        """The plan, rebuilt if parameters were added, swapped, unfrozen or moved since."""
        if self._plan is None or not self._plan.is_current(self.param_groups, self._workers):
            capture.check_warm(False)
            live = {param for group in self.param_groups for param in group["params"]}
            if dead := [param for param in self.state if param not in live]:
                logger.warning(
                    "shampoo: %d parameters were replaced; their state is dropped", len(dead)
                )
            for param in dead:
                del self.state[param]
            self._settle_skipped()
            plan = Plan(self.param_groups, self.state, self._workers, kept=self._owners())
            is_capturable = bool(plan.arenas) and capture.is_capturable(self.param_groups)
            self._on_device = capture.DeviceState(plan) if is_capturable else None
            self._plan = plan  # only now: what could not be captured must not be taken for it
        return self._plan

    def _owners(self) -> dict[Tensor, Owners] | None:
        """Who owns the blocks that have state, on this rank or another."""
        return self._kept if self._plan is None else self._plan.owners()

    def _settle_skipped(self) -> None:
        """Adds what the device has counted since to ``extra``."""
        if self._on_device is not None:
            skipped = int(self._on_device.skipped)
            self._on_device.skipped.zero_()
            for group in self.param_groups:
                group["extra"]["skipped_steps"] += skipped

    def __getstate__(self) -> dict[str, Any]:
        """Called by torch when it copies and pickles.

        Published state are views, each of which would be pickled with all of its arena.
        """
        self._settle_skipped()
        state = super().__getstate__()
        state["_workers"], state["_kept"] = self._workers, self._owners()
        state["state"] = {
            param: {key: view.clone() for key, view in entries.items()}
            for param, entries in self.state.items()
        }
        return state

    def state_dict(self) -> dict[str, Any]:
        """The state of the blocks that this rank owns, or of all after a consolidation.

        Saved and loaded by every rank, by ``torch.distributed.checkpoint``, or by one rank after
        :meth:`consolidate_state_dict`. Does not communicate, but waits for a device that counts
        the steps.
        """
        self._settle_skipped()
        holders = self._workers.holders([p for group in self.param_groups for p in group["params"]])
        if self._consolidated is None:
            return signed(super().state_dict(), holders.ranks[holders.me], holders.size)
        own = self.state
        self.state = defaultdict(dict, self._consolidated)
        try:
            return signed(super().state_dict(), holders.ranks[holders.me], 1)
        finally:
            self.state = own

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the whole state in host memory of one rank, for saving from that rank only.

        All ranks that hold the parameters must call it. Until the next ``step()`` or load,
        ``state_dict()`` on rank ``to`` is that of a single process, which any number of ranks, or
        none, can load. With a state too large for one host use ``torch.distributed.checkpoint``.

        Args:
            to: the global rank that receives.

        Raises:
            ValueError: if ``to`` does not hold the parameters.
            ShampooDistributedError: on all ranks if one of them has failed; nothing was gathered.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        holders = self._workers.holders(params)
        if holders.is_alone:
            return  # the state is whole
        if to not in holders.ranks:
            raise ValueError(f"Invalid to={to!r}. Must be one of the ranks {holders.ranks}.")
        self._consolidated = None  # its memory is free before as much is asked for
        attempt = Attempt(is_shared=True)
        plan = attempt.run(self._current_plan)
        agreement = self._workers.agreement(holders, params[0].device)
        agreement.check(attempt)
        assert plan is not None
        params = plan.planned(self.param_groups)
        group = self._workers.group(holders).live()
        self._consolidated = consolidate(plan, params, self.state, group, to, agreement)

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Loads what ``state_dict()`` returned; training continues bit for bit.

        Statistics keep the dtype of ``preconditioner_dtype`` whatever the parameters are. Values of
        hyper-parameters come from the checkpoint, as for every ``torch.optim`` optimizer.

        Args:
            state_dict: loaded, for example, by ``torch.load(path, weights_only=True)``. Where ranks
                divide the blocks, each keeps its own, so that the state of a single process, or a
                consolidated one, suits any number of ranks. Does not communicate.
            strict: if False, parameters of which blocks are missing start anew at step 0, with
                grafting only, instead of raising. All ranks must then load the same state.

        Raises:
            IncompleteCheckpointError: if blocks are missing.
            BlockGridMismatchError: if blocks have other shapes.
            ValueError: for other numbers of groups or parameters, or a value out of range.
                In every case the optimizer is as it was.
        """

        def keep_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            self._incoming = match(
                *(self.param_groups, self.defaults, incoming),
                *(self._workers, self._owners(), strict),
            )
            return {**incoming, "state": {}}

        # Registered now, so that it sees what the user's own hooks make of the state.
        hook = self.register_load_state_dict_pre_hook(keep_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._incoming = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by torch when it loads, copies and unpickles; the plan is made anew."""
        super().__setstate__(state)
        self._fill_groups()
        if "_workers" not in self.__dict__:
            self._workers = Workers()  # a pickle of a version before there were any
        self._kept = self._owners()
        self._plan = self._exchanges = self._on_device = self._consolidated = None
        self._damage = ""
        if self._incoming is not None:
            self.state = defaultdict(dict, self._incoming)
            if self._incoming:
                self._current_plan()
