"""What else a checkpoint can hold."""

from typing import Any, Protocol


class Stateful(Protocol):
    """A scheduler, a sampler, a counter: what has a state of plain values and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Takes on a state."""
