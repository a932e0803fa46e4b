"""What ``optimizer.state`` shows, and whether it is still what trains.

``optimizer.state`` is everybody's: it is copied, moved to the host and back, cleared, replaced and
extended. Blocks train in the memory of arenas, of which state shows views. Where a view is missing,
what stands in its place is taken in: what state shows when ``step()`` is called is what trains.
"""

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from shampoo.blocks.entries import check_value
from shampoo.blocks.state_keys import PHASE, foreign, is_own, parse

State = MutableMapping[Tensor, dict[str, Any]]
Views = dict[str, Tensor]


@dataclass(frozen=True)
class TakenIn:
    """What a look at ``state`` has changed: how many values, and what stood in which dictionary.

    A value that lay in our memory, which may have been overwritten since, is held as it was.
    """

    count: int
    entries: dict[Any, Any]
    contents: list[tuple[dict[Any, Any], dict[Any, Any]]]

    def undo(self, state: MutableMapping[Any, Any]) -> None:
        """Puts back what stood in ``state``; the next look finds it again."""
        state.clear()
        state.update(self.entries)
        for held, content in self.contents:
            held.clear()
            held.update(content)


class _DifferentError(Exception):
    """Two tensors were compared: they are not one and the same."""


class _NoneIsEqual(TorchFunctionMode):
    """Makes it an error to ask a tensor whether it equals another; the same object is not asked."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise _DifferentError


class Publication:
    """The state of the planned parameters, as ``optimizer.state`` is to show it.

    Args:
        params: the planned ones.
        names: of the parameters, for errors.
        views: of every parameter, by their keys.
    """

    def __init__(
        self, params: Sequence[Tensor], names: Sequence[str], views: Sequence[Views]
    ) -> None:
        self._published = dict(zip(params, zip(names, views, strict=True), strict=True))
        self._shown: dict[Any, Any] = {}  # what state was when all of it was known

    def is_intact(self, state: Mapping[Any, Any]) -> bool:
        """Whether ``state`` holds what it held when it was published, object by object.

        A comparison of dictionaries, which look at identities first, costs 10 ns an entry.
        """
        try:
            with _NoneIsEqual():
                return bool(state == self._shown)
        except Exception:  # of whatever was compared: it was not the same object
            return False

    def publish(self, state: State) -> None:
        """Puts the views into ``state``, beside what is not this optimizer's."""
        for param, (_, views) in self._published.items():
            state[param] = {**foreign(_entries_of(state, param)), **views}
        self._shown = _copy(state)

    def mark_shown(self, state: State) -> None:
        """Says that all of ``state`` is known."""
        self._shown = _copy(state)

    def add(self, param: Tensor, key: str, view: Tensor, state: State) -> None:
        """Publishes one more view."""
        _, views = self._published[param]
        views[key] = state[param][key] = self._shown[param][key] = view

    def take_in(self, state: State) -> TakenIn | None:
        """Copies what stands in the place of views into them, and puts them back.

        A parameter under which nothing of ours stands starts anew, but for its place in the
        schedule of refreshes, which it shares with others.

        Returns:
            What was taken in; None, with nothing changed, if other keys are there than were
            published: that calls for other memory.

        Raises:
            BlockGridMismatchError: for a value of another shape or dtype. Nothing has changed.
        """
        anew: list[Tensor] = []
        copies: list[tuple[Tensor, Tensor]] = []
        changed = self._changed(state)
        for param in changed:
            name, views = self._published[param]
            entries = _entries_of(state, param)
            own = {key: value for key, value in entries.items() if is_own(key)}
            if not own:
                anew += [view for key, view in views.items() if not _is_phase(key)]
            elif own.keys() != views.keys():
                return None
            else:
                copies += [
                    (view, check_value(name, key, own[key], view))
                    for key, view in views.items()
                    if own[key] is not view
                ]
        # Those that are views of ours may be overwritten before they are read: two that were
        # swapped, say, or an entry that has moved to another parameter.
        written = (*anew, *(view for view, _ in copies))
        ours = {view.untyped_storage().data_ptr() for view in written}
        clones: dict[int, Tensor] = {}

        def apart(value: Any) -> Any:
            is_tensor = isinstance(value, Tensor) and id(value) not in clones
            if is_tensor and value.untyped_storage().data_ptr() in ours:
                clones[id(value)] = value.clone()
            return clones.get(id(value), value)

        copies = [(view, apart(value)) for view, value in copies]
        entries, contents = dict(state), []
        for param in changed:
            if isinstance(held := state.get(param), dict):
                _, views = self._published[param]
                was = {
                    key: value if value is views.get(key) or not is_own(key) else apart(value)
                    for key, value in held.items()
                }
                contents.append((held, was))
        for view in anew:
            view.zero_()
        for view, value in copies:
            view.copy_(value)
        shared = Counter(map(id, state.values()))
        for param in changed:
            held, (_, views) = state.get(param), self._published[param]
            if isinstance(held, dict) and shared[id(held)] == 1:
                held.update(views)  # whoever holds it sees what trains
            else:
                state[param] = {**foreign(_entries_of(state, param)), **views}
        self._shown.update(_copy({param: state[param] for param in changed}))
        others = {key: entries for key, entries in state.items() if key not in self._published}
        for key in [key for key in self._shown if key not in self._published]:
            del self._shown[key]
        self._shown.update(_copy(others))
        return TakenIn(len(written), entries, contents)

    def _changed(self, state: State) -> list[Tensor]:
        """The parameters under which something else stands than was published."""

        def is_shown(param: Tensor) -> bool:
            try:
                return bool(state.get(param) == self._shown.get(param))
            except Exception:
                return False

        with _NoneIsEqual():
            return [param for param in self._published if not is_shown(param)]


def _entries_of(state: Mapping[Any, Any], param: Tensor) -> Mapping[Any, Any]:
    entries = state.get(param)
    return entries if isinstance(entries, Mapping) else {}


def _copy(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        key: dict(entries) if isinstance(entries, dict) else entries
        for key, entries in state.items()
    }


def _is_phase(key: str) -> bool:
    named = parse(key)
    return named is not None and named.kind == PHASE
