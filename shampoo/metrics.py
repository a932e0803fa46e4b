"""What a user sees of steps: ``record_metrics()``, ``metrics()`` and ``hparams()`` (metrics.md)."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.agreement import Agreeing
from shampoo.blocks.ownership import Team
from shampoo.errors import shown
from shampoo.step.explanation import group_name
from shampoo.step.measurement import COLUMNS, SUMS, Recorder

_PREFIX = "shampoo"
_STEP = COLUMNS.index("step")
_UNASKED, _EMPTY, _THERE = range(3)  # what a rank has to say
_NO_VALUES = frozenset({"params", "param_names", "extra", "name"})


class Measured(Agreeing):
    """The part of an optimizer that says what its steps are like. Nothing here moves anything."""

    def record_metrics(self, every: int = 1) -> None:
        """Measures every n-th step from now on, for :meth:`metrics`.

        No argument of the constructor, since it belongs to a run, as a logger does, and not to what
        is trained: it may change at any time, changes no bit of a step, and no checkpoint, copy or
        pickle holds it. On several ranks, call it on all of them.

        Args:
            every: n, by the steps taken: 10 measures the 10th, 20th ...; 0 for no step. A step that
                is measured takes, while it lasts, the memory of another copy of the weights.

        Raises:
            ValueError: if ``every`` is not a whole number, or below 0.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ValueError(
                f"Invalid every={shown(every)}. Must be an integer >= 0 (0: no step is measured)."
            )
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = Recorder(every) if every else None

    def metrics(self, reduce: bool = True) -> dict[str, float]:
        """What the last measured step was like, in numbers, over all groups and by group.

        The step has computed them where it was taken; here they are read, which waits for a device
        that is behind. Keys are ``"shampoo/update_rms"`` and
        ``"shampoo/<name of the group>/update_rms"``; one is there if there is something to tell:
        ``root_error``, say, once there are roots. metrics.md has all keys and formulas.

        Args:
            reduce: over all ranks that step together: all of them must call it, and get the same
                numbers, by one small all-gather. False for the numbers of this rank, which may be
                asked alone.

        Returns:
            Floats by name; nothing if no step was measured yet.

        Raises:
            RuntimeError: without :meth:`record_metrics`, on all ranks if on one; or if ranks have
                measured different steps.
        """
        ranks = self._process_groups.stepping_ranks(self._all_params())
        is_shared = reduce and not ranks.is_alone
        recorder, groups = self._recorder, self.param_groups
        table = None if recorder is None else recorder.read(len(groups), is_shared)
        if is_shared:
            table = self._reduced(table, ranks)
        elif recorder is None:
            raise RuntimeError(_unasked(""))
        if table is None:
            return {}
        *by_group, overall = table.tolist()
        found = {f"{_PREFIX}/step": overall[_STEP]}
        found[f"{_PREFIX}/skipped_steps"] = float(self.skipped_steps)
        found.update(_named(_PREFIX, overall))
        for name, line in zip(_names(groups), by_group, strict=True):
            found.update(_named(f"{_PREFIX}/{name}", line))
        return found

    def _reduced(self, table: Tensor | None, ranks: Team) -> Tensor | None:
        """What all ranks have measured, from what each has, in one collective."""
        says = _EMPTY if table is not None or self._recorder is not None else _UNASKED
        if table is None:
            shape = len(self.param_groups) + 1, len(COLUMNS)
            table = torch.zeros(shape, dtype=torch.float64, device="cpu")
        else:
            says = _THERE
        head = torch.tensor([[says]], dtype=torch.float64, device="cpu")
        device = self._all_params()[0].device
        consensus = self._process_groups.consensus(ranks, device)
        answers = consensus.gather(torch.cat((head, table.view(1, -1)), dim=1))
        heads, tables = answers[:, 0], answers[:, 1:]
        unasked = [rank for rank, said in zip(ranks.ranks, heads, strict=True) if said == _UNASKED]
        if unasked:
            raise RuntimeError(_unasked(f" on rank {unasked[0]}"))
        everyone = tables.view(-1, *table.shape)
        steps = [max(0, int(each)) for each in everyone[:, -1, _STEP].nan_to_num(neginf=0.0)]
        if len(set(steps)) > 1 or len(set(heads.tolist())) > 1:
            raise RuntimeError(
                f"Ranks {ranks.ranks} have measured steps {steps} last. Must be the same: call"
                " record_metrics() with the same number on all ranks, after the same step."
            )
        if says == _EMPTY:
            return None
        sums, maxima = everyone[..., : len(SUMS)].sum(dim=0), everyone[..., len(SUMS) :].amax(dim=0)
        return torch.cat((sums, maxima), dim=1)

    def hparams(self) -> dict[str, bool | int | float | str]:
        """The hyper-parameters of all groups, flat: what loggers take, none of which takes a group.

        For ``SummaryWriter.add_hparams``, ``wandb.config.update`` and ``mlflow.log_params``. Keys
        are ``"shampoo/<name of the group>/lr"``; of a tuple, ``.../betas.0`` and ``.../betas.1``.
        What is None is left out.
        """
        found: dict[str, bool | int | float | str] = {}
        for name, group in zip(_names(self.param_groups), self.param_groups, strict=True):
            for key, value in group.items():
                if key not in _NO_VALUES:
                    found.update(_plain(f"{_PREFIX}/{name}/{key}", value))
        return found


def _plain(key: str, value: Any) -> Iterator[tuple[str, bool | int | float | str]]:
    """A value in words that every logger takes."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, (list, tuple)):
        for place, each in enumerate(value):
            yield from _plain(f"{key}.{place}", each)
    elif value is not None:
        yield key, value if isinstance(value, (bool, int, float, str)) else str(value)


def _unasked(where: str) -> str:
    return (
        f"No step has been measured{where}: metrics() has nothing to tell. Call"
        " record_metrics(every=10) before the steps that it is to be asked of."
    )


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of every group, or its index; both where several have the same name."""
    names = [group_name(group, index) for index, group in enumerate(groups)]
    count = Counter(names)
    return [f"{name}.{i}" if count[name] > 1 else name for i, name in enumerate(names)]


def _named(prefix: str, line: Sequence[float]) -> Iterator[tuple[str, float]]:
    """The metrics of a line of sums and maxima, as far as there is something to tell."""
    of = dict(zip(COLUMNS, line, strict=True))

    def entry(name: str, value: float) -> tuple[str, float]:
        return f"{prefix}/{name}", value

    if of["elements"] > 0:
        gradient, weight, update = (
            math.sqrt(of[name] / of["elements"]) for name in ("gradient", "weight", "update")
        )
        yield entry("grad_rms", gradient)
        yield entry("weight_rms", weight)
        yield entry("update_rms", update)
        if weight > 0:
            yield entry("update_ratio", update / weight)
    if of["preconditioned"] > 0:
        yield entry("graft_scale", math.exp(of["log_scale"] / of["preconditioned"]))
    if of["blocks"] > 0:
        yield entry("preconditioned", of["preconditioned"] / of["blocks"])
    if of["roots"] > 0:
        yield entry("root_age", of["age"] / of["roots"])
        yield entry("root_age_max", of["oldest"])
    if of["factors"] > 0:
        yield entry("root_failures", of["failed"])
        yield entry("root_failures_in_a_row", of["failed_in_a_row"])
    if of["error"] >= 0:
        yield entry("root_error", of["error"])
    if of["spreads"] > 0:
        yield entry("eig_over_ridge", math.exp(of["log_spread"] / of["spreads"]))
        yield entry("eig_over_ridge_min", math.exp(-of["narrowest"]))
        yield entry("eig_over_ridge_max", math.exp(of["widest"]))
    if of["bytes"] > 0:
        yield entry("state_bytes", of["bytes"])
