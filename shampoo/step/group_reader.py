"""What stands in ``param_groups`` at a step.

Schedulers, frameworks and users write into the groups, and what stands there when ``step()`` is
called is what counts. Every step looks whether anything has changed; only then is a group read and
checked again.
"""

import operator
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from shampoo.blocks.layout import Geometry
from shampoo.hyperparameters import Hyperparameters, settle, warn_of_old_roots


class GroupReader:
    """The values of all groups of an optimizer, read again where a group has changed.

    Attributes:
        revision: another number whenever anything but a learning rate has changed.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._values: list[Hyperparameters] = []
        # Of every group its learning rate, and the rest; None for one that is read at every step.
        self._seen: list[tuple[Any, _Rest] | None] = []
        self._has_warned = False  # of old roots

    def read(self, groups: Sequence[dict[str, Any]]) -> list[Hyperparameters]:
        """The values of the groups; the same list as last time if none has changed.

        Raises:
            ValueError: as :meth:`Hyperparameters.read`.
            RuntimeError: likewise.
        """
        is_same, revision = len(self._seen) == len(groups), self.revision
        values, seen = list(self._values), list(self._seen[: len(groups)])
        seen += [None] * (len(groups) - len(seen))
        for index, (group, known) in enumerate(zip(groups, list(seen), strict=True)):
            lr = group["lr"]
            if known is None or not known[1].still(group) or isinstance(lr, torch.Tensor):
                settle(group)
                values[index : index + 1] = [Hyperparameters.read(group)]
                self.look_at_roots(values[index])
                rest = None if isinstance(lr, torch.Tensor) else _Rest.of(group)
                seen[index] = None if rest is None else (lr, rest)
                revision = self.revision + 1
            elif type(lr) is type(known[0]) and lr == known[0]:
                continue
            else:  # what schedulers move at every step
                values[index] = values[index].with_lr(lr)
                seen[index] = lr, known[1]
            is_same = False
        if not is_same:
            self._values, self._seen, self.revision = values[: len(groups)], seen, revision
        return self._values

    def look_at_roots(self, values: Hyperparameters) -> None:
        """Warns, once, of a group whose roots are older than what its factors remember."""
        if values.roots_outlive_factors and not self._has_warned:
            self._has_warned = True
            warn_of_old_roots(values)


# All that a group is read for but the learning rate. What can change inside stands first.
_OTHERS = {"foreach", "fused", "differentiable"}  # which are checked, and no more
_OTHERS |= {field.name for kind in (Geometry, Hyperparameters) for field in fields(kind)}
_OTHERS -= {"lr", "beta1", "beta2", "geometry", "exponent"}
_REST = ("betas", "exponent", *sorted(_OTHERS))
_rest_of = operator.itemgetter(*_REST)


class _Rest:
    """What stood in a group when it was read, but for the learning rate."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._rest = _rest_of(group)
        self._types = tuple(map(type, self._rest))
        self._inside = self._copied(self._rest)

    @classmethod
    def of(cls, group: dict[str, Any]) -> "_Rest | None":
        """None if a tensor is among the values: nobody is told what is written into one."""
        seen = cls(group)
        values = (*seen._rest, *seen._inside)
        return None if any(isinstance(value, torch.Tensor) for value in values) else seen

    def still(self, group: dict[str, Any]) -> bool:
        """Whether it is as it was."""
        rest = _rest_of(group)
        # Types first: True equals 1, and what an array is compared with has no truth.
        return (
            tuple(map(type, rest)) == self._types
            and rest == self._rest
            and self._copied(rest) == self._inside
        )

    @staticmethod
    def _copied(rest: tuple[Any, ...]) -> tuple[Any, ...]:
        """What lists hold: a list equals itself, whatever was written into it since."""
        betas, exponent = rest[:2]
        held = (*betas, *exponent) if isinstance(exponent, (list, tuple)) else tuple(betas)
        return (*map(type, held), *held)
