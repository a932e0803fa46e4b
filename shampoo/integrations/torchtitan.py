"""torchtitan: its container of optimizers, which builds Shampoo by name. ::

    from shampoo.integrations.torchtitan import ShampooContainer, shampoo_group

    config = ShampooContainer.Config(
        param_groups=[
            shampoo_group(r"tok_embeddings|output", lr=1e-3, precondition=False),
            shampoo_group(r".*", lr=1e-3, weight_decay=0.1),
        ],
        implementation="foreach",
    )
    optimizers = config.build(model_parts=[model])

The names that torchtitan knows, AdamW among them, stand beside ``"Shampoo"`` in one config. Its
checkpoints are torch.distributed.checkpoint's: every rank saves the blocks that it owns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shampoo.integrations import framework
from shampoo.optimizer import Shampoo

_optimizer = framework("torchtitan.components.optimizer")
_Container: Any = _optimizer.OptimizersContainer


class ShampooContainer(_Container):  # type: ignore[misc]
    """An ``OptimizersContainer`` that knows ``optimizer_name="Shampoo"``."""

    @dataclass(kw_only=True, slots=True)
    class Config(_Container.Config):  # type: ignore[misc]
        """That of ``OptimizersContainer``; ``build()`` makes this container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Any]:
        factory: Callable[..., Any] = _Container._resolve_optimizer_factory
        return Shampoo if name == "Shampoo" else factory(name)


def shampoo_group(pattern: str, **arguments: Any) -> Any:
    """A ``ParamGroupConfig`` of parameters that Shampoo moves.

    Args:
        pattern: a regular expression, searched for in their names.
        arguments: of :class:`shampoo.Shampoo` that may differ from group to group.
    """
    return _optimizer.ParamGroupConfig(
        pattern=pattern, optimizer_name="Shampoo", optimizer_kwargs=arguments
    )
