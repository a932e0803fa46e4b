"""The parameter groups of a model: what each of its parameters is, by its modules and names.

Nothing here knows an optimizer. What is guessed is said in the docstring of :func:`groups`, and can
be put right by name.
"""

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from shampoo.errors import shown

LONG_SIDE = 10_000  # above which a side is that of a vocabulary, in all likelihood
TRANSFERS = ("mup",)

# Whether each group is preconditioned; in the order in which they are returned.
_PRECONDITION = {
    "embeddings": False,
    "heads": False,
    "positional": False,
    "vectors": True,
    "inputs": True,
    "matrices": True,
}
_SCALED = ("heads", "matrices")  # whose fan-in grows with the width

_PIXELS = 4  # channels that an image has at most: colours and transparency
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention, *_TABLES)
_POSITIONAL = {"pos", "posemb", "position", "positions", "positional", "wpe", "pe"}
_NO_VOCABULARY = {"type", "types", "segment", "segments", "relative"}
# What torch puts between a module and its parent, by the attribute that holds the module.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")

Selector = str | nn.Module | Tensor


@dataclass(frozen=True)
class _Use:
    """A place where a module holds a parameter: ``owner.attribute``, in the module at ``path``."""

    path: str
    owner: nn.Module
    attribute: str
    name: str


_Uses = dict[Tensor, list[_Use]]  # of every parameter, in the model's order


def groups(
    model: nn.Module,
    *,
    embeddings: Sequence[Selector] = (),
    heads: Sequence[Selector] = (),
    positional: Sequence[Selector] = (),
    vectors: Sequence[Selector] = (),
    inputs: Sequence[Selector] = (),
    matrices: Sequence[Selector] = (),
    lr: float | None = None,
    weight_decay: float | None = None,
    transfer: str | None = None,
    base_width: int | None = None,
    width: int | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups of a model, for :class:`Shampoo` or any optimizer of torch.

    Every parameter is in one group, tied ones too, whether it requires a gradient or not. Groups
    without a parameter are left out. In this order:

    ============== ============================================================== ==============
    ``"name"``     what is in it                                                  preconditioned
    ============== ============================================================== ==============
    ``embeddings`` weights of ``nn.Embedding`` and ``nn.EmbeddingBag``            no
    ``heads``      output heads: a ``nn.Linear`` with the weight of an            no
                   embedding; one with as many outputs as an embedding has rows,
                   and if that is the size of more layers than there are such
                   embeddings, or of an input of a layer, the last layers of the
                   model alone; the last one if it has more than 10,000 outputs.
                   A smaller classifier is a matrix.
    ``positional`` tables and parameters whose own name, or that of whose module, no
                   has parts such as ``pos``, ``position``, ``wpe``; class tokens
    ``vectors``    what has at most one dimension above 1: biases, norms          as arguments say
    ``inputs``     with ``transfer`` only: matrices with a fixed number of inputs yes
    ``matrices``   all others: linear layers, convolutions, attention             yes
    ============== ============================================================== ==============

    Args:
        model: on any device, ``meta`` included; wrapped by DistributedDataParallel or
            ``torch.compile``, or sharded by ``fully_shard``. Names are those of the model inside.
        embeddings: what belongs there whatever it looks like: names of parameters or modules, in
            full or the last part of them, ``fnmatch`` patterns of such, modules, or parameters. A
            module stands for its weights that are no vectors; a name in full, or a parameter, for
            any.
        heads: the same for ``heads``, and so on.
        positional: see ``embeddings``.
        vectors: see ``embeddings``.
        inputs: see ``embeddings``; with ``transfer`` only.
        matrices: see ``embeddings``.
        lr: learning rate of every group, >= 0; None leaves it to the optimizer's argument.
        weight_decay: the same.
        transfer: ``"mup"`` scales the values of a model ``base_width`` wide to one of another
            width, after maximal update parametrization for Adam (arXiv 2203.03466, table 3: for
            models that do not divide their logits by the width) and arXiv 2512.05620 (independent
            weight decay proportional to 1 / width). With s = base_width / width,

            - matrices and heads get ``s lr`` and ``weight_decay``,
            - all others keep ``lr`` and get ``s weight_decay``,

            so that what a step takes off a weight, ``lr weight_decay``, is proportional to s
            everywhere. Holds for updates of Adam's size: grafting on Adam, as by default, not
            ``grafting="sgd"`` or ``"none"``, and decoupled decay. Initial values are the model's
            own business. ``inputs`` are the first matrix, if it is that of a layer and no embedding
            stands before it, convolutions of at most 4 channels, and those of one channel a group;
            name others that have a fixed number of inputs, such as the up-projection of an adapter
            of low rank. Where the model multiplies its logits by s (table 8, which a head that
            shares its weight with an embedding asks for), heads keep ``lr``:
            ``embeddings=("lm_head",)``.
        base_width: for which ``lr`` and ``weight_decay`` were tuned, measured as ``width`` is.
        width: of this model; None for the most frequent number of inputs (features, or channels of
            a convolution) of its ``matrices``, the smallest of several.

    Returns:
        ``{"name": ..., "params": [(name, parameter), ...], "precondition": ...}`` each, with
        ``"lr"`` and ``"weight_decay"`` if given. Schedulers work on them as on any group.

    Raises:
        ValueError: for a selector that matches nothing, or what another one has claimed; values out
            of range; a width that cannot be inferred; parameters without a shape (lazy modules).
        TypeError: if ``model`` is no ``nn.Module``, or a selector is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"groups() needs a torch.nn.Module, got {type(model).__name__}.")
    _check_transfer(transfer, inputs, lr, weight_decay, base_width, width)
    modules = dict(_modules(model, "", set()))
    uses = _uses(modules)
    group_of = _guess(modules, uses)
    if transfer is not None:
        group_of |= dict.fromkeys(_inputs(uses, group_of), "inputs")
    chosen = {
        "embeddings": embeddings,
        "heads": heads,
        "positional": positional,
        "vectors": vectors,
        "inputs": inputs,
        "matrices": matrices,
    }
    group_of |= _claimed(chosen, modules, uses)
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "precondition": precondition}
        for name, precondition in _PRECONDITION.items()
    }
    for param, (use, *_) in uses.items():
        found[group_of[param]]["params"].append((use.name, param))
    scale = 1.0
    if transfer is not None and base_width is not None:
        scale = base_width / (_width(uses, group_of) if width is None else width)
    for name, group in found.items():
        if lr is not None:
            group["lr"] = lr * scale if name in _SCALED else lr
        if weight_decay is not None:
            group["weight_decay"] = weight_decay if name in _SCALED else weight_decay * scale
    return [group for group in found.values() if group["params"]]


def _check_transfer(
    transfer: str | None,
    inputs: Sequence[Selector],
    lr: float | None,
    weight_decay: float | None,
    base_width: int | None,
    width: int | None,
) -> None:
    if transfer is None:
        for name, value in (("inputs", inputs), ("base_width", base_width), ("width", width)):
            if value is not None and value != ():
                raise ValueError(
                    f'Invalid {name}={shown(value)}. Must be left out unless transfer="mup".'
                )
        return
    if transfer not in TRANSFERS:
        raise ValueError(f'Invalid transfer={shown(transfer)}. Must be None or "mup".')
    for name, rate in (("lr", lr), ("weight_decay", weight_decay)):
        is_number = isinstance(rate, Real) and not isinstance(rate, bool)
        if not is_number or not (math.isfinite(rate) and rate >= 0):  # type: ignore[arg-type, operator]
            raise ValueError(
                f"Invalid {name}={shown(rate)}. Must be a number >= 0.0 and finite, that of a"
                ' model base_width wide, with transfer="mup".'
            )
    for name, size in (("base_width", base_width), ("width", width)):
        is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if not is_size and not (name == "width" and size is None):
            raise ValueError(f"Invalid {name}={shown(size)}. Must be an integer >= 1.")


def _modules(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """All modules in torch's order, each once, without wrappers and what these add to names."""
    if module in seen:
        return
    seen.add(module)
    inner = next((module._modules[each] for each in _WRAPPED if each in module._modules), None)
    if isinstance(module, DistributedDataParallel | DataParallel):
        inner = module.module
    if inner is not None:
        yield from _modules(inner, path, seen)
        return
    yield path, module
    for name, child in module.named_children():
        yield from _modules(child, _joined(path, name), seen)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _uses(modules: dict[str, nn.Module]) -> _Uses:
    """Every parameter, and where it is held."""
    uses: _Uses = {}
    # A parametrized weight is held by a list, which stands for an attribute of the layer above it.
    stands_for: dict[nn.Module, tuple[nn.Module, str]] = {}
    for path, module in modules.items():
        for attribute, held in getattr(module, "parametrizations", {}).items():
            stands_for[held] = module, attribute
        for name, param in module._parameters.items():
            if param is None:
                continue
            full = _joined(path, name)
            if is_lazy(param):
                raise ValueError(
                    f"Invalid model: {full} has no shape yet. Must have been called once before"
                    " its parameters are grouped: lazy modules get their shapes then."
                )
            owner, attribute = stands_for.get(module, (module, name))
            uses.setdefault(param, []).append(_Use(path, owner, attribute, full))
    return uses


def _is_vector(param: Tensor) -> bool:
    return sum(size > 1 for size in param.shape) <= 1


def _parts(name: str) -> set[str]:
    """The words of a name: ``posEmbed_2 -> {"pos", "embed"}``."""
    return {part.lower() for part in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name)}


def _own_name(path: str) -> str:
    return path.rpartition(".")[2]


def _is_positional(use: _Use) -> bool:
    """Whether its own name, or that of its module if that is no layer of torch, says so."""
    parts = _parts(use.attribute)
    if isinstance(use.owner, _TABLES) or not isinstance(use.owner, _LAYERS):
        parts |= _parts(_own_name(use.path))
    if parts & _POSITIONAL:
        return True
    if isinstance(use.owner, _LAYERS):
        return False
    words = _parts(use.attribute)
    is_token = bool(words & {"token", "tokens"}) or "cls" in words
    return is_token or ("class" in words and bool(words & {"embedding", "embed"}))


def _guess(modules: dict[str, nn.Module], uses: _Uses) -> dict[Tensor, str]:
    heads = _heads(modules)
    found = {}
    for param, held in uses.items():
        is_table = any(isinstance(use.owner, _TABLES) for use in held)
        is_linear = any(isinstance(use.owner, nn.Linear) for use in held)
        is_head = any(use.owner in heads and not _is_vector(param) for use in held)
        if (is_table and is_linear) or is_head:
            found[param] = "heads"
        elif any(map(_is_positional, held)):
            found[param] = "positional"
        elif is_table:
            found[param] = "embeddings"
        else:
            found[param] = "vectors" if _is_vector(param) else "matrices"
    return found


def _heads(modules: dict[str, nn.Module]) -> set[nn.Module]:
    """The layers that are output heads by their sizes, whether their weight is tied or not."""
    layers = [module for module in modules.values() if isinstance(module, nn.Linear)]
    vocabularies = Counter(
        module.num_embeddings
        for path, module in modules.items()
        if isinstance(module, _TABLES)
        and not _parts(_own_name(path)) & (_POSITIONAL | _NO_VOCABULARY)
    )
    heads: set[nn.Module] = set()
    for rows, tables in vocabularies.items():
        alike = [layer for layer in layers if layer.out_features == rows]
        # A vocabulary may happen to be as large as something inside the model.
        is_inside = any(layer.in_features == rows for layer in layers)
        last = layers[-tables:] if is_inside or len(alike) > tables else layers
        heads.update(layer for layer in alike if layer in last)
    heads.update(layer for layer in layers[-1:] if layer.out_features > LONG_SIDE)
    return heads


def _inputs(uses: _Uses, group_of: dict[Tensor, str]) -> list[Tensor]:
    """The matrices whose number of inputs does not grow with the width, as far as can be seen."""
    found, is_first = [], True
    for param, held in uses.items():
        use = held[0]
        if group_of[param] != "positional" and any(isinstance(u.owner, _TABLES) for u in held):
            is_first = False
        if group_of[param] != "matrices":
            continue
        is_layer = isinstance(use.owner, nn.Linear | _ConvNd)
        is_small = isinstance(use.owner, _ConvNd) and (
            use.owner.in_channels <= _PIXELS or use.owner.in_channels == use.owner.groups
        )
        if is_small or (is_first and is_layer):
            found.append(param)
        is_first = False
    return found


def _width(uses: _Uses, group_of: dict[Tensor, str]) -> int:
    counts = Counter(
        features
        for param, (use, *_) in uses.items()
        if group_of[param] == "matrices" and (features := _features(param, use)) is not None
    )
    if not counts:
        raise ValueError(
            "Invalid width=None. Must be an integer >= 1: this model has no linear layer,"
            " convolution or attention among its matrices whose inputs tell how wide it is."
        )
    return min(counts, key=lambda features: (-counts[features], features))


def _features(param: Tensor, use: _Use) -> int | None:
    """How many features or channels a weight takes, None where its module does not tell."""
    if isinstance(use.owner, _ConvTransposeNd) or type(use.owner).__name__ == "Conv1D":
        return param.shape[0]  # the second is the linear layer of GPT-2 in Hugging Face's library
    if isinstance(use.owner, nn.Linear | _ConvNd | nn.MultiheadAttention):
        return param.shape[1]
    return None


def _claimed(
    chosen: dict[str, Sequence[Selector]], modules: dict[str, nn.Module], uses: _Uses
) -> dict[Tensor, str]:
    """What selectors say of parameters."""
    claimed: dict[Tensor, str] = {}
    for group, selectors in chosen.items():
        if isinstance(selectors, str | nn.Module | Tensor):
            selectors = (selectors,)
        for selector in selectors:
            matched = [param for param in uses if _matches(selector, param, uses[param], modules)]
            if not matched:
                label = selector if isinstance(selector, str) else type(selector).__name__
                example = next((held[0].name for held in uses.values()), "")
                raise ValueError(
                    f"Invalid {group}={label!r}. Must match a parameter of the model, or a module"
                    f" with a weight that is no vector: a name such as {example!r}, the last part"
                    " of one, a pattern, or the module itself."
                )
            for param in matched:
                other = claimed.setdefault(param, group)
                if other != group:
                    raise ValueError(
                        f"Invalid {group}: {uses[param][0].name} is claimed by {other} too. Must"
                        " be in one group: narrow one of the names."
                    )
    return claimed


def _matches(
    selector: Selector, param: Tensor, held: Sequence[_Use], modules: dict[str, nn.Module]
) -> bool:
    if isinstance(selector, Tensor):
        return selector is param
    is_weight = not _is_vector(param)
    if isinstance(selector, nn.Module):
        inside = set(selector.modules())
        return is_weight and any(modules[use.path] in inside for use in held)
    if not isinstance(selector, str):
        raise TypeError(
            f"groups() takes names, patterns, modules and parameters, not"
            f" {type(selector).__name__}."
        )
    for use in held:
        if fnmatch.fnmatchcase(use.name, selector):
            return True
        parts = use.path.split(".") if use.path else []
        # The modules around it, in full and by the last part of their names.
        around = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} | {*parts}
        if is_weight and any(fnmatch.fnmatchcase(each, selector) for each in around):
            return True
        if fnmatch.fnmatchcase(_own_name(use.name), selector):
            return True
    return False
