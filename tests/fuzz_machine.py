"""Runs a generated program and holds it, after every operation, to what must always be true.

Twins (copies, pickles, optimizers that loaded the state) live beside the original and are given the
same; they must hold the same bits. What is done to one of them alone, such as values of state
replaced by equal copies, must not be seen.
"""

import copy
import io
import pickle
import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from fuzz_programs import Program, Slope, Weight
from fuzz_worlds import Snapshot, World, drawn, slope
from torch import Tensor
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.blocks.state_keys import is_own
from shampoo.errors import NonFiniteGradientError

MOST_WORLDS = 3
MOST_PARAMS = 6
FOREIGN = "average_of_a_wrapper"
# Gradients and weights up to here are never refused for their size, whatever the arguments are.
ORDINARY = 1e4


class RefusedError(Exception):
    """The constructor has refused the arguments, in its words."""


class Machine:
    """The worlds of one program. Operations are methods; each gets the arguments of its ``Op``."""

    def __init__(self, program: Program) -> None:
        params = [drawn(weight) for weight in program.weights]
        try:
            optimizer = Shampoo(params, **program.hyper)
        except ValueError as error:
            if not re.match("Invalid .*Must be ", str(error), re.DOTALL):
                raise
            raise RefusedError(str(error)) from error
        self.hyper = program.hyper
        self.worlds = [World(params, optimizer)]
        self.counts = [0] * len(params)  # the steps that every parameter has taken
        self.largest = 0.0  # of all finite gradients so far
        self.foreign: dict[int, Tensor] = {}

    def run(self, program: Program) -> None:
        for op in program.ops:
            getattr(self, op.name)(*op.args)
            self.check()

    @property
    def first(self) -> World:
        return self.worlds[0]

    def check(self) -> None:
        """What is true after every operation."""
        for index, param in enumerate(self.first.params):
            assert param.isfinite().all(), f"parameter {index} is not finite"
        for (index, key), value in self.first.state().items():
            if torch.is_tensor(value):
                assert value.isfinite().all(), f"{key} of parameter {index} is not finite"
        expected = Snapshot(self.first)
        for number, world in enumerate(self.worlds[1:], start=1):
            found = Snapshot(world)
            found.assert_alike(expected, f"twin {number}")
            found.assert_same_groups(expected, f"twin {number}")
        for index, value in self.foreign.items():
            for world in self.worlds:
                found = world.optimizer.state[world.params[index]].get(FOREIGN)
                assert found is not None, f"an entry of a wrapper under parameter {index} is gone"
                assert torch.equal(found, value)

    # -- steps

    def step(self, seed: int, kinds: tuple[Slope, ...]) -> None:
        """Gradients for all that is not frozen, then a step."""
        for world in self.worlds:
            for index, param in enumerate(world.params):
                grad = slope(param, kinds[index % len(kinds)], 100 * seed + index)
                param.grad = grad if param.requires_grad else None
        self.again()

    def again(self) -> None:
        """A step on the gradients that are there."""
        grads = [param.grad for param in self.first.params]
        given = [grad for grad in grads if grad is not None and grad.numel() > 0]
        is_finite = all(bool(grad.isfinite().all()) for grad in given)
        if is_finite:
            sizes = [float(grad.double().abs().max()) for grad in given]
            self.largest = max([self.largest, *sizes])
        befores = [Snapshot(world) for world in self.worlds]
        skipped = [world.optimizer.skipped_steps for world in self.worlds]
        errors = [
            self.deferred(world, before) for world, before in zip(self.worlds, befores, strict=True)
        ]
        assert len({type(error) for error in errors}) == 1, f"one of the twins alone: {errors}"
        assert errors[0] is None or isinstance(errors[0], NonFiniteGradientError), errors[0]
        were_skipped = {
            world.optimizer.skipped_steps - count
            for world, count in zip(self.worlds, skipped, strict=True)
        }
        assert were_skipped <= {0} or were_skipped == {1}, f"skipped by: {were_skipped}"
        is_taken = errors[0] is None and were_skipped == {0}
        assert is_finite or not is_taken, "a gradient that is not finite was taken"
        if not is_taken:
            # Overflow of float16 parameters, which hold no more than 65504, may be refused.
            is_small = any(param.dtype == torch.float16 for param in self.first.params)
            weights = [float(w.abs().max()) for w in self.first.weights() if w.numel() > 0]
            is_extreme = max([self.largest, *weights]) > ORDINARY
            assert not is_finite or is_small or is_extreme, "a step was left out"
            for world, before in zip(self.worlds, befores, strict=True):
                Snapshot(world).assert_was_skipped(before)
            return
        self.count(grads)

    def deferred(self, world: World, before: Snapshot) -> Exception | None:
        try:
            world.optimizer.step()
        except (ValueError, RuntimeError) as error:
            Snapshot(world).assert_is(before, f"after {type(error).__name__}: {error}")
            return error
        return None

    def count(self, grads: list[Tensor | None]) -> None:
        """Every parameter counts its own steps, as in torch."""
        is_inert = not any(grad is not None and bool(grad.any()) for grad in grads)
        for index, grad in enumerate(grads):
            param = self.first.params[index]
            found = self.first.optimizer.state.get(param, {}).get("step")
            if param.numel() == 0:
                continue
            if is_inert:  # a first step on zeros only makes the state
                self.counts[index] = 0 if found is None else int(found)
                continue
            self.counts[index] += grad is not None
            number = 0 if found is None else int(found)
            assert number == self.counts[index], (
                f"parameter {index} has taken {self.counts[index]} steps; its state says {number}"
            )

    # -- values of hyper-parameters

    def set(self, name: str, value: Any) -> None:
        """A value that is good on its own; with others it may not be, which must be said."""
        self.change(name, value)

    def geometry(self, name: str, value: Any) -> None:
        """A value that decides how tensors are cut: taken, or refused with nothing changed."""
        self.change(name, value)

    def change(self, name: str, value: Any) -> None:
        for world in self.worlds:
            world.optimizer.zero_grad()
            world.optimizer.step()  # now all of them have planned
        if len({frozenset(world.state()) for world in self.worlds}) > 1:
            # A frozen parameter whose entry was cleared has one of zeros again where it was planned
            # while it was trainable, and none in a copy. Zeros train alike, but have a geometry.
            return
        old = [[group[name] for group in world.optimizer.param_groups] for world in self.worlds]
        self.write(name, value)
        befores = [Snapshot(world) for world in self.worlds]
        error = self.refused_by_all()
        if error is None:
            for world, before in zip(self.worlds, befores, strict=True):
                Snapshot(world).assert_was_skipped(before)
            return
        for world, values in zip(self.worlds, old, strict=True):
            for group, kept in zip(world.optimizer.param_groups, values, strict=True):
                group[name] = kept

    def write(self, name: str, value: Any) -> None:
        for world in self.worlds:
            for group in world.optimizer.param_groups:
                group[name] = copy.copy(value)

    def refused_by_all(self) -> Exception | None:
        """A step that may be refused, then by all worlds alike; None if it is not."""
        errors = [self.deferred(world, Snapshot(world)) for world in self.worlds]
        assert len({type(error) for error in errors}) == 1, f"one of the twins alone: {errors}"
        return errors[0]

    def bad_value(self, name: str, value: Any) -> None:
        """On the gradients that are there."""
        old = [copy.copy(group[name]) for group in self.first.optimizer.param_groups]
        self.write(name, value)
        error = self.refused_by_all()
        assert isinstance(error, ValueError), f"{name}={value!r}: {error!r}"
        assert name in str(error), error
        for world in self.worlds:
            for group, kept in zip(world.optimizer.param_groups, old, strict=True):
                group[name] = kept

    # -- gradients

    def bad_gradient(self, position: int, how: str) -> None:
        """A gradient that is not of its parameter, left by pruning or growing it, or sparse."""
        index = position % len(self.first.params)
        for world in self.worlds:  # all of them first: twins that have others would part
            for param in world.params:
                param.grad = torch.ones_like(param) if param.requires_grad else None
        for world in self.worlds:
            param = world.params[index]
            if not param.requires_grad or param.numel() == 0:
                return
            if how == "longer":
                param.grad.data = param.new_ones(param.numel() + 1)
            elif how == "turned":
                param.grad.data = param.new_ones((*reversed(param.shape), 1))
            elif param.dim() > 0:
                param.grad = torch.zeros_like(param).contiguous().to_sparse()
            else:
                return
        error = self.refused_by_all()
        assert error is not None, f"a gradient that is {how} was taken by parameter {index}"
        for world in self.worlds:
            world.optimizer.zero_grad()

    def zero_grad(self, to_none: bool) -> None:
        for world in self.worlds:
            world.optimizer.zero_grad(set_to_none=to_none)

    # -- parameters

    def freeze(self, position: int) -> None:
        for world in self.worlds:
            param = world.params[position % len(world.params)]
            param.requires_grad_(False)
            param.grad = None

    def unfreeze(self, position: int) -> None:
        for world in self.worlds:
            world.params[position % len(world.params)].requires_grad_(True)

    def join(self, weight: Weight) -> None:
        """A layer joins, unless the arguments of the constructor no longer go with the groups."""
        if len(self.first.params) >= MOST_PARAMS:
            return
        errors = []
        for world in self.worlds:
            param = drawn(weight)
            before = Snapshot(world)
            try:
                world.optimizer.add_param_group({"params": [param]})
            except ValueError as error:
                errors.append(str(error))
                Snapshot(world).assert_is(before, f"after {error}")
            else:
                world.params.append(param)
        assert len(errors) in (0, len(self.worlds)), f"one of the twins alone: {errors}"
        if not errors:
            self.counts.append(0)

    def bad_join(self, how: str) -> None:
        for world in self.worlds:
            new = Parameter(torch.ones(2, 3))
            group: dict[str, Any] = {
                "again": {"params": [world.params[0]]},
                "shared": {"params": [new, world.params[-1]]},
                "twice": {"params": [new, new]},
                "lr": {"params": [new], "lr": -1.0},
                "leaf": {"params": [new * 2]},
            }[how]
            before, count = Snapshot(world), len(world.optimizer.param_groups)
            with pytest.raises(ValueError, match=r"\w"):
                world.optimizer.add_param_group(group)
            assert len(world.optimizer.param_groups) == count
            Snapshot(world).assert_is(before, f"after a group that is bad ({how})")

    # -- copies

    def twin(self, how: str) -> None:
        """Another world, which from here on must hold the bits of the first."""
        if len(self.worlds) == MOST_WORLDS:
            del self.worlds[1]
        source = self.first
        if how == "deepcopy":
            params, optimizer = copy.deepcopy((source.params, source.optimizer))
        elif how == "pickle":
            params, optimizer = pickle.loads(pickle.dumps((source.params, source.optimizer)))
        else:
            params = [Parameter(p.detach().clone(), p.requires_grad) for p in source.params]
            place = {id(param): index for index, param in enumerate(source.params)}
            groups = [
                {
                    **{key: value for key, value in group.items() if key != "extra"},
                    "params": [params[place[id(param)]] for param in group["params"]],
                }
                for group in source.optimizer.param_groups
            ]
            optimizer = Shampoo(groups, **self.hyper)
            state = source.optimizer.state_dict()
            if how == "file":
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
            optimizer.load_state_dict(state)
        for param, origin in zip(params, source.params, strict=True):
            param.grad = None if origin.grad is None else origin.grad.clone()
        self.worlds.append(World(params, optimizer))

    def last(self) -> World:
        """A twin to which something is done that must not be seen."""
        if len(self.worlds) == 1:
            self.twin("deepcopy")
        return self.worlds[-1]

    def reload(self) -> None:
        optimizer = self.last().optimizer
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    # -- state

    def replace(self, how: str) -> None:
        """What offloading, wrappers and frameworks do: equal copies stand in the state."""
        optimizer = self.last().optimizer

        def copied(value: Any) -> Any:
            if not torch.is_tensor(value):
                return value
            is_cast = how == "dtype" and value.dtype == torch.float32
            return value.double().to(value.dtype) if is_cast else value.clone()

        if how in ("values", "dtype"):
            for entries in optimizer.state.values():
                for key, value in entries.items():
                    entries[key] = copied(value)
            return
        copies = {
            param: {key: copied(value) for key, value in entries.items()}
            for param, entries in optimizer.state.items()
        }
        if how == "inner":
            for param, entries in copies.items():
                optimizer.state[param] = entries
        else:
            optimizer.state = defaultdict(dict, copies)

    def clear(self, position: int) -> None:
        """One parameter starts anew."""
        index = position % len(self.first.params)
        for world in self.worlds:
            world.optimizer.state.pop(world.params[index], None)
        self.counts[index] = 0
        self.foreign.pop(index, None)

    def clear_all(self, how: str) -> None:
        for world in self.worlds:
            if how == "clear":
                world.optimizer.state.clear()
            else:
                world.optimizer.state = defaultdict(dict)
        self.counts = [0] * len(self.counts)
        self.foreign.clear()

    def foreign_entry(self, position: int) -> None:
        """A wrapper keeps its average under the parameter."""
        index = position % len(self.first.params)
        for world in self.worlds:
            param = world.params[index]
            value = torch.full((2,), index + 0.5, dtype=param.dtype)
            world.optimizer.state[param][FOREIGN] = value
            self.foreign[index] = value.clone()

    def bad_state(self, position: int, how: str) -> None:
        """A value that cannot be this parameter's: refused, until the right one is back."""
        index = position % len(self.first.params)
        param = self.first.params[index]
        entries = self.first.optimizer.state.get(param, {})
        keys = [key for key in entries if is_own(key) and entries[key].numel() > 1]
        if not (keys and param.requires_grad):
            return
        for world in self.worlds:
            for param in world.params:
                param.grad = torch.ones_like(param) if param.requires_grad else None
        key, kept = keys[0], []
        for world in self.worlds:
            entries = world.optimizer.state[world.params[index]]
            value = entries[key]
            kept.append(value)
            entries[key] = {
                "longer": value.new_zeros(value.numel() + 1),
                "int32": value.to(torch.int32),
                "word": "a word",
            }[how]
        error = self.refused_by_all()
        assert error is not None, f"{key} of parameter {index} was taken, though it is {how}"
        for world, value in zip(self.worlds, kept, strict=True):
            world.optimizer.state[world.params[index]][key] = value
            world.optimizer.zero_grad()
