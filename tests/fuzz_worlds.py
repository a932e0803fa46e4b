"""Optimizers with their parameters, and what they held at a time, to be compared to the bit."""

import copy
from typing import Any

import torch
from fuzz_programs import Slope, Weight
from torch import Tensor
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.blocks.layout import AUTOMATIC
from shampoo.blocks.state_keys import parse


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides."""
    if layout == "transposed" and value.dim() >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        storage = value.new_zeros(value.numel() + 3)
        view = storage[3:].view(value.shape)
        return view.copy_(value)
    return value


def drawn(weight: Weight) -> Parameter:
    generator = torch.Generator().manual_seed(weight.seed)
    value = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    value = (value * 10.0**weight.power).to(getattr(torch, weight.dtype))
    value = value.where(value.isfinite(), 1.0)  # what is too large for its dtype
    return Parameter(laid_out(value, weight.layout))


def slope(param: Tensor, kind: Slope, seed: int) -> Tensor | None:
    if kind.kind == "none":
        return None
    if kind.kind == "zero":
        return torch.zeros_like(param)
    generator = torch.Generator().manual_seed(seed)
    if kind.layout == "expanded":
        one = torch.randn((), generator=generator, dtype=torch.float64) * 10.0**kind.power
        return one.to(param.dtype).expand(param.shape)
    value = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 10.0**kind.power
    value = laid_out(value.to(param.dtype), kind.layout)
    if kind.kind != "normal" and value.numel() > 0:
        # by as_strided, since what is laid out otherwise has no flat view
        value.as_strided((1,), (1,), value.storage_offset()).fill_(float(kind.kind))
    return value


class World:
    """An optimizer and its parameters."""

    def __init__(self, params: list[Parameter], optimizer: Shampoo) -> None:
        self.params = params
        self.optimizer = optimizer

    def state(self) -> dict[tuple[int, Any], Any]:
        """Copies of all that is under parameters."""
        return {
            (index, key): value.clone() if torch.is_tensor(value) else value
            for index, param in enumerate(self.params)
            for key, value in self.optimizer.state.get(param, {}).items()
        }

    def groups(self) -> list[dict[str, Any]]:
        return [
            copy.deepcopy({key: value for key, value in group.items() if key != "params"})
            for group in self.optimizer.param_groups
        ]

    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]


class Snapshot:
    """What a world held at a time."""

    def __init__(self, world: World) -> None:
        self.weights, self.state, self.groups = world.weights(), world.state(), world.groups()

    def assert_is(self, other: "Snapshot", what: str) -> None:
        """To the bit, groups included."""
        for index, (ours, theirs) in enumerate(zip(self.weights, other.weights, strict=True)):
            assert torch.equal(ours, theirs), f"{what}: parameter {index}"
        assert self.state.keys() == other.state.keys(), f"{what}: keys of state"
        for key, value in self.state.items():
            assert same(value, other.state[key]), f"{what}: state {key}"
        self.assert_same_groups(other, what)

    def assert_same_groups(self, other: "Snapshot", what: str) -> None:
        for ours, theirs in zip(self.groups, other.groups, strict=True):
            assert ours.keys() == theirs.keys(), f"{what}: keys of groups"
            for name, value in ours.items():
                own, other_own = value, theirs[name]
                if name == "extra":  # an optimizer alone knows whether somebody named a number
                    own, other_own = ({**each, AUTOMATIC: None} for each in (own, other_own))
                assert same(own, other_own), f"{what}: {name}"

    def assert_was_skipped(self, before: "Snapshot") -> None:
        """As it was, but for counts of what was asked for, and state that was made for later."""
        self.assert_alike(before, "a skipped step", plans={"calls", "slot"})
        assert self.state.keys() >= before.state.keys(), "a skipped step dropped state"

    def assert_alike(
        self, other: "Snapshot", what: str, plans: frozenset[str] | set[str] = frozenset()
    ) -> None:
        """The same weights and state; what is blank may as well be absent.

        State is made when it is first planned for, which a loaded optimizer does at once.

        Args:
            plans: kinds of state that may differ.
        """
        for index, (ours, theirs) in enumerate(zip(self.weights, other.weights, strict=True)):
            assert torch.equal(ours, theirs), f"{what}: parameter {index}"
        for index, key in self.state.keys() | other.state.keys():
            named = parse(key)
            if (named.kind if named else key) in plans:
                continue
            ours, theirs = self.state.get((index, key)), other.state.get((index, key))
            is_blank = all(value is None or blank(value) for value in (ours, theirs))
            assert is_blank or same(ours, theirs), f"{what}: {key} of parameter {index}"


def blank(value: Any) -> bool:
    return torch.is_tensor(value) and not bool(value.any())


def same(ours: Any, theirs: Any) -> bool:
    if torch.is_tensor(ours) and torch.is_tensor(theirs):
        is_nan = ours.is_floating_point() and bool((ours.isnan() & theirs.isnan()).any())
        return ours.dtype == theirs.dtype and (torch.equal(ours, theirs) or is_nan)
    return bool(type(ours) is type(theirs) and (ours == theirs or ours != ours))
