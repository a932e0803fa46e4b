"""timm: Shampoo in its factory of optimizers. ::

    import timm.optim
    from shampoo.integrations.timm import param_groups, register

    register()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="shampoo", lr=1e-3, weight_decay=0.05, param_group_fn=param_groups
    )

``opt="lookahead_shampoo"`` works too. timm gives every optimizer that is said to have a momentum
one of 0.9, and takes the ``eps`` of its command line for AdamW's. Here the first would come on top
of ``betas[0]``, and the second is another number, so timm is told that Shampoo has neither, and
drops both. Who wants a momentum registers it: ``register(momentum=0.9)``.
"""

from typing import Any

from torch import nn

from shampoo.integrations import framework, undecayed_vectors
from shampoo.optimizer import Shampoo

_optim = framework("timm.optim")
_factory = framework("timm.optim._optim_factory")


def register(name: str = "shampoo", **arguments: Any) -> None:
    """Enters Shampoo into timm's registry, for ``create_optimizer`` and ``create_optimizer_v2``.

    Args:
        name: under which; timm splits names at ``_``, so it must have none.
        arguments: of :class:`shampoo.Shampoo`, where timm is not given others.

    Raises:
        ValueError: for a name that timm would split, and for ``eps``, which it would drop.
    """
    if "_" in name:
        raise ValueError(f"Invalid name={name!r}. Must have no '_': timm takes what is before off.")
    if "eps" in arguments:
        raise ValueError(
            f"Invalid eps={arguments['eps']!r}. Must be left out: timm drops it. AdamW's is"
            " grafting_eps; for another ridge, register relative_eps or build Shampoo yourself."
        )
    _factory.default_registry.register(
        _optim.OptimInfo(
            name=name,
            opt_class=Shampoo,
            description="Distributed Shampoo, grafted on Adam",
            has_eps=False,
            has_momentum=False,
            has_betas=True,
            defaults=arguments,
        )
    )


def param_groups(model: nn.Module) -> list[Any]:
    """The ``param_group_fn`` that leaves embeddings and heads to the grafted method.

    What timm does not decay has no decay: vectors, and what ``model.no_weight_decay()`` names.
    """
    spared: Any = getattr(model, "no_weight_decay", frozenset)()
    return undecayed_vectors(model, frozenset(spared))
