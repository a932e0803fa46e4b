"""The optimizer: ``step()`` reads as the algorithm, everything below it acts on whole stacks."""

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from shampoo import capture, checkpoint, ops
from shampoo.direction import direct
from shampoo.errors import NonFiniteGradientError
from shampoo.gradients import check_dense, largest_magnitudes, square_limit
from shampoo.hyperparameters import Hyperparameters, dtype_name, warn_about
from shampoo.layerwise import rescale
from shampoo.layout import FACTORED, Layout
from shampoo.plan import Member, Plan, check_parameter, parameter_name
from shampoo.precision import full_precision
from shampoo.refresh import refresh_roots_, refresh_roots_on_device_
from shampoo.scalars import Scalars
from shampoo.segments import FactorRange, Segment, Selection
from shampoo.solver import check_method

logger = logging.getLogger(__name__)

# What a group carries besides its hyper-parameters: under one key, since a flattened checkpoint
# cannot be loaded into groups that have got a new one.
_EXTRA = {"skipped_steps": 0, "refresh_period": 0}


class Shampoo(Optimizer):
    r"""Distributed Shampoo (arXiv 2309.06497): block-diagonal Kronecker-factored preconditioning.

    Every parameter is merged to a matrix, cut into blocks of at most ``max_preconditioner_dim`` a
    side, and each block W with gradient G moves by

    .. math::
        L \leftarrow \beta_2 L + (1 - \beta_2) G G^T, \quad
        R \leftarrow \beta_2 R + (1 - \beta_2) G^T G, \quad
        W \leftarrow W - \alpha\, s\, L^{-1/4} M R^{-1/4}

    with M the bias-corrected average of gradients and s the factor that gives the direction the
    norm of the grafted method's. With the defaults, the learning rate, betas and weight decay of
    AdamW carry over: the update has Adam's size and Shampoo's direction.

    Args:
        params: parameters, groups, or named parameters, as for any ``torch.optim`` optimizer.
        lr: learning rate, a float or a tensor of one element, >= 0.
        betas: ``beta1`` in [0, 1) averages the gradient before preconditioning (0: off, no
            buffer); ``beta2`` in (0, 1] averages the factors (1: plain sums, as in AdaGrad).
        eps: absolute ridge added to a bias-corrected factor. 0 is allowed together with
            ``relative_eps=0`` only, and means the pseudo-inverse.
        weight_decay: >= 0.
        relative_eps: the ridge is ``max(eps, relative_eps * s)``, s the Schatten-4 norm of the
            factor, a tight upper bound of its largest eigenvalue.
        decoupled_weight_decay: ``W <- (1 - lr weight_decay) W`` as in AdamW (with momentum: added
            to the direction) if True; added to the gradient if False.
        momentum: in [0, 1), of the search direction, without dampening.
        nesterov: use Nesterov's form of it.
        max_preconditioner_dim: the largest side of a block, and the bound up to which small
            dimensions are merged.
        precondition_frequency: steps between refreshes of the roots; factors move every step.
        start_preconditioning_step: the first step that uses Shampoo, the grafted method alone
            before it. -1 means ``precondition_frequency``; ``math.inf`` never starts.
        merge_dims: ``"matrix"`` merges small dimensions but keeps two; ``"full"`` is the paper's
            rule, down to one; ``"none"`` only drops dimensions of size 1.
        precondition_1d: give tensors with at most one dimension larger than 1 a factor too; if
            not, they follow the grafted method alone (or, with ``grafting="none"``, AdaGrad's
            formula with ``betas[1]`` and ``eps``).
        precondition: False lets a whole group follow the grafted method, e.g. for embeddings.
        exponent_override: the root p of every factor instead of twice the order of the block; an
            int, or a list indexed by order (0 or missing: the default).
        exponent_multiplier: every factor is raised to ``-exponent_multiplier / p``.
        bias_correction: of the gradient average and the factors.
        grafting: whose step length is used: ``"none"``, ``"sgd"``, ``"adagrad"``, ``"rmsprop"``,
            ``"adam"``, ``"adagrad_normalized"``, ``"rmsprop_normalized"``, ``"adam_normalized"``,
            ``"lars"`` or ``"lamb"``.
        grafting_beta2: of the grafted method, None for ``betas[1]``; AdaGrad kinds always sum.
        grafting_eps: added to the root of its second moment, > 0.
        large_dim_method: for tensors with a dimension above ``max_preconditioner_dim``:
            ``"blocking"`` cuts it, ``"adagrad"`` moves the whole tensor by a diagonal method
            without grafting, ``"diagonal"`` keeps only the diagonal of that dimension's factor.
        root_method: ``"eigh"``, ``"coupled_newton"``, ``"minimax"``, or ``"auto"`` for what
            measures fastest at equal accuracy on the device.
        preconditioner_dtype: float32 or float64, of all statistics whatever the parameters are.
        nonfinite: what a NaN or Inf in a gradient does, or a value too large to square:
            ``"skip"`` leaves everything as it was and counts the step in ``skipped_steps``,
            ``"raise"`` raises.
        refresh_schedule: ``"together"`` refreshes all roots in the same step, as the paper does;
            ``"staggered"`` spreads them over the steps of a period by cost, so that the worst step
            is close to the mean. A block then follows the grafted method until its first root, at
            most a period after ``start_preconditioning_step``.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; work is always batched over blocks.
        fused: True raises if the compiled kernels, so far those for a CPU, cannot be built; None
            and False take what there is.
        capturable: let CUDA graphs replay the step, with a refresh or without, as
            :class:`shampoo.Replay` does. Nothing waits for the device: steps are counted and
            skipped on it, ``lr`` and ``betas`` may be tensors there, unchecked, and a root that
            fails its test is not retried. Needs ``nonfinite="skip"`` and a ``root_method`` other
            than ``"eigh"``; ``"auto"`` is ``"minimax"``.
        differentiable: not supported, must be False.

    Raises:
        ValueError: for a value out of range, naming it, its bound and the remedy.
        RuntimeError: for complex or sharded parameters and ``differentiable=True``.

    ``step()`` counts from 1 for every parameter since it joined the optimizer or was first
    unfrozen, with or without a gradient; a call in which no parameter has one changes nothing. A
    first step whose gradients are all zero only allocates state, because
    torch.distributed.checkpoint makes such a step.

    State, flat under each parameter, k the row-major index in its grid of blocks and m the
    dimension: ``step``, ``block{k}.factor{m}``, ``block{k}.root{m}`` (zero before the first
    refresh), ``block{k}.failures{m}``, ``block{k}.slot{m}`` (staggered only),
    ``block{k}.exp_avg``, ``block{k}.exp_avg_sq`` (the grafted method's), ``block{k}.momentum``.
    """

    # On the class, so that an unpickled or copied optimizer, which has neither, starts without.
    _plan: Plan | None = None
    _on_device: capture.DeviceState | None = None  # of the plan, if it is capturable
    _incoming: dict[Tensor, dict[str, Any]] | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        relative_eps: float = 1e-6,
        decoupled_weight_decay: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        max_preconditioner_dim: int = 1024,
        precondition_frequency: int = 10,
        start_preconditioning_step: float = -1,
        merge_dims: str = "matrix",
        precondition_1d: bool = False,
        precondition: bool = True,
        exponent_override: int | Sequence[int] = 0,
        exponent_multiplier: float = 1.0,
        bias_correction: bool = True,
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        large_dim_method: str = "blocking",
        root_method: str = "auto",
        preconditioner_dtype: torch.dtype = torch.float32,
        nonfinite: str = "skip",
        refresh_schedule: str = "together",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in _DEFAULTS}
        defaults["preconditioner_dtype"] = dtype_name(preconditioner_dtype)
        Hyperparameters.read(defaults)
        super().__init__(params, defaults)
        ops.load_kernels(required=fused is True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; the blocks of its parameters start at step 0.

        Raises:
            ValueError: for a hyper-parameter out of range; nothing is added.
            RuntimeError: for complex parameters; nothing is added.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
            capture.is_capturable(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        group["preconditioner_dtype"] = dtype_name(group["preconditioner_dtype"])
        group["extra"] = dict(_EXTRA)
        values = Hyperparameters.read(group)
        warn_about(group)
        for position, param in enumerate(group["params"]):
            check_parameter(param, parameter_name(group, index, position))
            if param.numel() > 0:
                layout = Layout.of(param.shape, values.geometry)
                if layout.rule == FACTORED:
                    check_method(values.root_method, values.root_power(layout.order))

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because a gradient was not finite. Waits for a device that counts them."""
        self._settle_skipped()
        return max(int(group["extra"]["skipped_steps"]) for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            NonFiniteGradientError: with ``nonfinite="raise"``; nothing has changed.
            RuntimeError: for sparse gradients; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capture.check_health(self)
        values = [Hyperparameters.read(group) for group in self.param_groups]
        plan = self._current_plan()
        plan.check_methods(values)
        params = plan.params(self.param_groups)
        grads = [param.grad for param in params]
        accepted = self._accepts(plan, grads, values)
        if accepted is False:
            return loss
        plan.add_missing_moments(self.param_groups, values, self.state)
        plan.assign_slots(self.param_groups, values)
        selections = plan.select(tuple(grad is not None for grad in grads))
        if self._on_device is not None:
            self._on_device.keep(selections)
        for selection in selections:
            arena = selection.arena
            hyper, step = values[arena.group], arena.step + 1
            if not capture.is_capturing():
                arena.count_step()
            if isinstance(accepted, Tensor) and self._on_device is not None:
                scalars = self._on_device.scalars(hyper, arena, accepted)
            else:
                scalars = Scalars.of(hyper, arena.rule, step)
            with full_precision(arena.device):
                self._step_arena(
                    selection, hyper, scalars, step, params, grads, plan.is_layerwise(arena)
                )
        return loss

    def coming_refresh(self) -> tuple[int | None, ...]:
        """Names the roots that the next step refreshes: what a graph of it can be used for again.

        All None for an ordinary step. The schedule follows the steps that were asked for; the host
        does not know which of them ``capturable=True`` has skipped.
        """
        values = [Hyperparameters.read(group) for group in self.param_groups]
        plan = self._current_plan()
        plan.assign_slots(self.param_groups, values)
        return capture.coming_refresh(plan, values)

    def replayed(self) -> None:
        """Says that a graph with one step was replayed, for which ``step()`` was not called."""
        for arena in self._current_plan().arenas:
            arena.count_step()

    def _step_arena(
        self,
        selection: Selection,
        hyper: Hyperparameters,
        scalars: Scalars,
        step: int,
        params: list[Tensor],
        grads: list[Tensor | None],
        layerwise: bool,
    ) -> None:
        slot = hyper.due_slot(step)
        due = [] if slot is None else selection.factors.get(slot, [])
        if due:
            # Roots see the factors of all blocks, so these move first. Segments share a workspace:
            # their gradients are packed again, unless there is only one.
            for segment in selection.segments:
                self._gather(segment, hyper, scalars, params, grads)
                self._accumulate(segment, scalars)
            for factors in due:
                self._refresh(factors, hyper, scalars)
        for segment in selection.segments:
            if not due:
                self._gather(segment, hyper, scalars, params, grads)
                self._accumulate(segment, scalars)
            elif len(selection.segments) > 1:
                self._gather(segment, hyper, scalars, params, grads)
            direct(segment, hyper, scalars)
            if not layerwise:
                self._update(segment, hyper, scalars, params)
        if layerwise and selection.segments:
            rescale(selection.segments, params, hyper.decoupled_decay)
            scalars = replace(scalars, decay=0.0 * scalars.decay)
            for segment in selection.segments:
                self._update(segment, hyper, scalars, params)

    @staticmethod
    def _gather(
        segment: Segment,
        hyper: Hyperparameters,
        scalars: Scalars,
        params: list[Tensor],
        grads: list[Tensor | None],
    ) -> None:
        """Packs a private copy of the gradients; G <- G + weight_decay W if it is coupled."""
        sources = [grads[member] for member in segment.members]
        ops.gather_blocks_(segment.grad, sources, segment.tiles, scalars.sign, False)
        if hyper.coupled_decay != 0.0:
            weights = [params[member] for member in segment.members]
            ops.gather_blocks_(segment.grad, weights, segment.tiles, scalars.coupled_decay, True)

    @staticmethod
    def _accumulate(segment: Segment, scalars: Scalars) -> None:
        """A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T, from the raw gradient."""
        for part in segment.parts:
            for mode, factor in enumerate(part.factors):
                ops.gram_ema_(factor, part.grad, mode, scalars.beta2, scalars.factor_weight)

    @staticmethod
    def _refresh(factors: FactorRange, hyper: Hyperparameters, scalars: Scalars) -> None:
        """X_k <- (A_k / c2 + ridge I)^(-1/p)."""
        stack, rows = factors.stack, slice(factors.start, factors.stop)
        state = stack.root[rows], stack.factor[rows], stack.failures[rows], stack.rooted[rows]
        how: dict[str, Any] = {
            "p": hyper.root_power(stack.order),
            "correction": scalars.correction2,
            "eps": hyper.eps,
            "relative_eps": hyper.relative_eps,
            "method": hyper.root_method,
        }
        if scalars.accepted is None:
            refresh_roots_(*state, **how, pending=factors.pending)
        else:
            refresh_roots_on_device_(*state, scalars.accepted, **how)

    @staticmethod
    def _update(
        segment: Segment, hyper: Hyperparameters, scalars: Scalars, params: list[Tensor]
    ) -> None:
        """M <- mu M + P, W <- W - lr D, with decoupled weight decay."""
        momentum = segment.moments.get("momentum") if hyper.momentum > 0 else None
        dtype = segment.direction.dtype if momentum is None else momentum.dtype
        ops.update_blocks_(
            [params[member] for member in segment.members],
            momentum,
            segment.direction.to(dtype),  # wider only for float64 parameters
            scalars.gate(segment.scale.to(dtype)),
            segment.tiles,
            scalars.lr,
            scalars.decay,
            scalars.momentum,
            hyper.nesterov,
        )

    def _current_plan(self) -> Plan:
        """The plan, rebuilt if parameters were added, swapped, unfrozen or moved since."""
        if self._plan is None or not self._plan.is_current(self.param_groups):
            capture.check_warm(False)
            live = {param for group in self.param_groups for param in group["params"]}
            for param in [param for param in self.state if param not in live]:
                logger.warning("shampoo: a parameter was replaced; its state is dropped")
                del self.state[param]
            self._settle_skipped()
            self._plan = Plan(self.param_groups, self.state)
            self._on_device = None
            if self._plan.arenas and capture.is_capturable(self.param_groups):
                self._on_device = capture.DeviceState(self._plan)
        return self._plan

    def _accepts(
        self, plan: Plan, grads: Sequence[Tensor | None], values: Sequence[Hyperparameters]
    ) -> bool | Tensor:
        """Whether these gradients make a step: some, all finite, and not an inert first one.

        Where only the device may know, the answer is a tensor on it.
        """
        present = [
            (member, grad)
            for member, grad in zip(plan.members, grads, strict=True)
            if grad is not None
        ]
        if not present:
            return False
        for member, grad in present:
            check_dense(grad, member.name)
        if self._on_device is not None:
            return self._on_device.accept(plan, grads, values)
        magnitudes: list[float] = largest_magnitudes([grad for _, grad in present]).tolist()
        bad = [
            member
            for (member, grad), magnitude in zip(present, magnitudes, strict=True)
            if not magnitude < square_limit(grad.numel(), values[member.group].geometry.dtype)
        ]
        if bad:
            self._refuse(bad, len(present), values)
            return False
        return any(magnitudes) or not plan.is_fresh

    def _refuse(self, bad: Sequence[Member], total: int, values: Sequence[Hyperparameters]) -> None:
        """Counts a skipped step, or raises if one of the groups says so."""
        what = (
            f"the gradient of {bad[0].name} is not finite, or too large to square"
            f" ({len(bad)} of {total} gradients are)"
        )
        if any(values[member.group].nonfinite == "raise" for member in bad):
            raise NonFiniteGradientError(
                f"{what[0].upper()}{what[1:]}. Nothing was changed. Lower lr or clip gradients,"
                ' or pass nonfinite="skip" to leave such steps out.'
            )
        for group in self.param_groups:
            group["extra"]["skipped_steps"] += 1
        count = self.skipped_steps
        if count & (count - 1) == 0:  # 1, 2, 4, 8 ...: a run that skips for ever stays readable
            logger.warning("shampoo: step skipped, %s; %d skipped so far", what, count)

    def _settle_skipped(self) -> None:
        """Adds what the device has counted since to ``extra``."""
        if self._on_device is not None:
            skipped = int(self._on_device.skipped)
            self._on_device.skipped.zero_()
            for group in self.param_groups:
                group["extra"]["skipped_steps"] += skipped

    def state_dict(self) -> dict[str, Any]:
        """As every ``torch.optim`` optimizer's. Waits for a device that counts the steps."""
        self._settle_skipped()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Called by torch when it copies and pickles.

        Published state are views, each of which would be pickled with all of its arena.
        """
        self._settle_skipped()
        state = super().__getstate__()
        state["state"] = {
            param: {key: view.clone() for key, view in entries.items()}
            for param, entries in self.state.items()
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` returned; training continues bit for bit.

        Statistics keep the dtype of ``preconditioner_dtype`` whatever the parameters are. Values of
        hyper-parameters come from the checkpoint, as for every ``torch.optim`` optimizer.

        Args:
            state_dict: loaded, for example, by ``torch.load(path, weights_only=True)``.

        Raises:
            IncompleteCheckpointError: if blocks are missing.
            BlockGridMismatchError: if blocks have other shapes.
            ValueError: for other numbers of groups or parameters, or a value out of range.
                In every case the optimizer is as it was.
        """

        def keep_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            self._incoming = checkpoint.match(self.param_groups, self.defaults, incoming)
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
        ops.load_kernels()
        # A pickle of an older version has none of the arguments that came after it, not even in
        # its defaults.
        self.defaults = {**_DEFAULTS, **self.defaults}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["preconditioner_dtype"] = dtype_name(group["preconditioner_dtype"])
            group["extra"] = {**_EXTRA, **group.get("extra", {})}
        self._plan = self._on_device = None
        if self._incoming is not None:
            self.state = defaultdict(dict, self._incoming)
            if self._incoming:
                self._current_plan()


_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(Shampoo.__init__).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
