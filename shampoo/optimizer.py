"""The optimizer: ``step()`` reads as the algorithm, everything below it acts on whole stacks."""

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from shampoo import certificates
from shampoo.blocks.layout import AUTOMATIC
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.groups import groups
from shampoo.hyperparameters import Hyperparameters, dtype_name, settle, warn_about
from shampoo.metrics import Measured
from shampoo.preconditioner.choice import kind_of, layout_of
from shampoo.state.former import FORMER_DEFAULTS, complete, translate
from shampoo.step import capture, tracing
from shampoo.step.directions import (
    accumulate,
    gradients,
    graft,
    precondition,
    refresh,
    refresh_ahead,
)
from shampoo.step.explanation import Explanation, explain
from shampoo.step.long_sides import warn_of_long_sides
from shampoo.step.parameters import check_distinct, check_parameter, parameter_name
from shampoo.step.thin import warn_of_thin

logger = logging.getLogger(__name__)

# Choices, for those who check types; tests compare them with the tables that decide.
MergeDims = Literal["matrix", "full", "none"]
PreconditionerKind = Literal["shampoo", "kl_shampoo"]
GraftingMethod = Literal[
    "none",
    "sgd",
    "adagrad",
    "rmsprop",
    "adam",
    "adagrad_normalized",
    "rmsprop_normalized",
    "adam_normalized",
    "lars",
    "lamb",
]
LargeDimMethod = Literal["auto", "blocking", "adagrad", "diagonal"]
RootMethod = Literal["auto", "eigh", "coupled_newton", "minimax"]
Nonfinite = Literal["skip", "raise"]
RefreshSchedule = Literal["together", "staggered"]
Loss = TypeVar("Loss")

# What a group carries besides its hyper-parameters, under one key: no name of an argument is taken.
_EXTRA = {"skipped_steps": 0, "refresh_period": 0, AUTOMATIC: None}


class Shampoo(Measured):
    r"""Distributed Shampoo (arXiv 2309.06497): block-diagonal Kronecker-factored preconditioning.

    Every parameter is merged to a matrix, cut into blocks of at most ``max_preconditioner_dim`` a
    side, and each block W with gradient G moves by

    .. math::
        L \leftarrow \beta_2 L + (1 - \beta_2) G G^T, \quad
        R \leftarrow \beta_2 R + (1 - \beta_2) G^T G, \quad
        W \leftarrow W - \alpha\, s\, L^{-1/2} M R^{-1/2}

    with M the bias-corrected average of gradients and s the factor that gives the direction the
    norm of the grafted method's. With the defaults, the learning rate and weight decay of AdamW
    carry over: the update has Adam's size and Shampoo's direction, from the first step on.

    Args:
        params: a model, which :func:`shampoo.groups` then divides into groups: embeddings, output
            heads and positional tables follow the grafted method. Or parameters, groups, or named
            parameters, as for any ``torch.optim`` optimizer; one warning names what has a side of
            more than 10,000 in a group that does not say ``precondition``.
        lr: learning rate, a float or a tensor of one element, >= 0.
        betas: ``beta1`` in [0, 1) averages the gradient before preconditioning (0: off, no
            buffer); ``beta2`` in (0, 1] averages the factors (1: plain sums, as in AdaGrad), which
            remember ``1 / (1 - beta2)`` steps: 20, twice the age of the oldest root.
        eps: absolute ridge added to a bias-corrected factor, which is a square of gradients. Not
            AdamW's, which is ``grafting_eps``: its 1e-8 turns preconditioning off where gradients
            are small, of which a warning tells once, at a refresh (on a GPU the next one; not with
            ``capturable=True``). 0 is allowed together with ``relative_eps=0`` only, and means the
            pseudo-inverse.
        weight_decay: >= 0.
        relative_eps: the ridge is ``max(eps, relative_eps * s)``, s the Schatten-4 norm of the
            factor, a tight upper bound of its largest eigenvalue.
        decoupled_weight_decay: ``W <- (1 - lr weight_decay) W`` as in AdamW (with momentum: added
            to the direction) if True; added to the gradient if False.
        momentum: in [0, 1), of the search direction, without dampening.
        nesterov: use Nesterov's form of it.
        nesterov_average: apply roots to the gradient's average as it will be when the same gradient
            comes again, ``beta1 M1 + (1 - beta1) G``, Nesterov's form of it; if not, to ``M1``. The
            grafted method always takes ``M1``.
        max_preconditioner_dim: the largest side of a block, and the bound up to which small
            dimensions are merged. ``"auto"`` is as long as roots cost little on the device of a
            group's first parameter: 256 on a CPU, 1024 elsewhere. The group holds the number, and
            every checkpoint that is loaded under ``"auto"`` brings its own. A number that is named
            is held to, the same one too.
        precondition_frequency: steps between refreshes of the roots, the dearest part of a step;
            factors move every step. One warning tells where a root outlives half of what its factor
            remembers, ``precondition_frequency * (1 - beta2) > 0.5``: with 50, let beta2 be 0.99.
        start_preconditioning_step: the first step that uses Shampoo, the grafted method alone
            before it; at 1, no step goes without. A start before ``precondition_frequency``
            refreshes roots whenever the steps have doubled since, until the frequency takes over
            (1, 2, 4, 8, 10, 20, ...), since early factors soon change. -1 means
            ``precondition_frequency``; ``math.inf`` never starts.
        merge_dims: ``"matrix"`` merges small dimensions but keeps two; ``"full"`` is the paper's
            rule, down to one; ``"none"`` only drops dimensions of size 1.
        precondition_1d: give tensors with at most one dimension larger than 1 a factor too; if
            not, they follow the grafted method alone (or, with ``grafting="none"``, AdaGrad's
            formula with ``betas[1]`` and ``eps``).
        precondition: False lets a whole group follow the grafted method, e.g. for embeddings; with
            a model, all of it.
        preconditioner: ``"shampoo"``, or ``"kl_shampoo"`` (arXiv 2509.03378): before a mode's
            factor takes a gradient in, the roots of all other modes whiten it. It costs one more
            product a step for every mode and other mode, and takes p = 2 alone. Cannot change
            once training has begun. Without a graft (``grafting="none"``) roots of factors that
            have seen few gradients make long steps, with either: let ``start_preconditioning_step``
            come later than 1.
        exponent: the root p of every factor: ``"covariance"``, 2 for blocks of every order;
            ``"paper"``, twice the order; a number > 0, of which fractions need ``root_method``
            ``"eigh"`` or ``"auto"``; or a list by order (0 or missing: the paper's).
        exponent_multiplier: every factor is raised to ``-exponent_multiplier / p``.
        bias_correction: of the gradient average and the factors.
        grafting: whose step length is used: ``"none"``, ``"sgd"``, ``"adagrad"``, ``"rmsprop"``,
            ``"adam"``, ``"adagrad_normalized"``, ``"rmsprop_normalized"``, ``"adam_normalized"``,
            ``"lars"`` or ``"lamb"``. The second moment of the normalized ones, alone, sees the
            gradient of every block scaled to norm 1: the step grows with the gradient, so ``lr`` is
            to be tuned as SGD's is, not as Adam's; and without a bias correction the first steps of
            ``"rmsprop_normalized"``, as of ``"rmsprop"``, are ``1 / sqrt(1 - grafting_beta2)``
            times as long as the correction would make them, 4.5 times at 0.95.
        grafting_beta2: of the grafted method, None for ``betas[1]``; AdaGrad kinds always sum. With
            0.999, only its second moment remembers as long as AdamW's.
        grafting_eps: added to the root of its second moment, > 0.
        large_dim_method: for tensors with a dimension above ``max_preconditioner_dim``:
            ``"blocking"`` cuts it, ``"adagrad"`` moves the whole tensor by a diagonal method
            without grafting, ``"diagonal"`` keeps only the diagonal of that dimension's factor.
            ``"auto"`` is ``"blocking"`` while the state of a tensor, of any shape, stays within 5
            times AdamW's two numbers an element. Otherwise the blocks are up to 8 times shorter
            along its longest dimension, as for 64 x 576; where that is not enough, as for
            8 x 4096 and any vector of more than 32 elements, that dimension stays whole and keeps
            only the diagonal of its factor, and the next is looked at. One warning names the
            tensors with a diagonal. Counted are both moments, kept or not, but no momentum, which
            AdamW has not. A checkpoint loaded under ``"auto"`` brings the method that it was saved
            with.
        root_method: ``"eigh"``, ``"coupled_newton"``, ``"minimax"``, or ``"auto"`` for what
            measures fastest on the device and is accurate enough: ``"minimax"`` for float32 (on a
            CPU up to 639 a side), whose roots are off by 3e-6 to 3e-3 relative, measured against
            eigenvalues (:func:`shampoo.inverse_root`), else ``"eigh"``, which is right to 1e-5 and,
            on a GPU, waits for the device in every refresh.
        preconditioner_dtype: float32 or float64, of all statistics whatever the parameters are.
        nonfinite: what a NaN or Inf in a gradient does, or a value too large to square, from
            2.2e15 divided by the root of its number of elements on in float32 (7e145 in float64):
            ``"skip"`` leaves everything as it was and counts the step in ``skipped_steps``,
            ``"raise"`` raises. With ``decoupled_weight_decay=False`` the weights that join the
            gradient count with it. On a GPU, ``"skip"`` is decided there and the host hears of it
            in the next step, which warns of it; until then ``step`` in the state counts it, but not
            in what is saved. With ``"raise"``, every step waits for the device.
        max_root_failures: how many refreshes in a row may leave a factor without a valid root
            before a step raises, on all ranks; None, the default, never does, and lets it keep its
            previous root. On a GPU, every step then waits for the counts.
        refresh_schedule: ``"together"`` refreshes all roots in the same step, as the paper does;
            ``"staggered"`` spreads them over the steps of a period by cost, so that the worst step
            is close to the mean. A block then follows the grafted method until its first root, at
            most a period after ``start_preconditioning_step``, and has one root a period.
        maximize: ascend instead of descend.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that steps too small
            for them are right on average. What is drawn depends on the step and on the place of a
            weight among the others, so a resumed run draws the same. Not for parameters whose
            blocks are divided among ranks.
        foreach: accepted for compatibility; work is always batched over blocks.
        fused: True raises if the compiled kernels, so far those for a CPU, cannot be built; None
            and False take what there is.
        capturable: let CUDA graphs replay the step, with a refresh or without, as
            :class:`shampoo.Replay` does. The host hears of no step: they are counted and skipped on
            the device, while refreshes follow the calls; ``lr`` and ``betas`` may be tensors there,
            unchecked, and a root that fails its test is not retried. Needs ``nonfinite="skip"``, a
            ``root_method`` other than ``"eigh"`` (``"auto"`` is ``"minimax"``), and all blocks on
            this rank.
        differentiable: not supported, must be False.
        process_group: the ranks that hold replicas of plain parameters, None for the default
            group. Parameters that are DTensors bring the ranks of their mesh. Belongs to the run,
            as the next three do: no checkpoint holds it.
        num_trainers_per_group: how many consecutive ranks divide the blocks of replicated
            parameters among them; each such group does all of the work once. -1 means the ranks of
            one node (``LOCAL_WORLD_SIZE``), fewer where there are not 4 blocks for each; 0 or 1
            turns it off. The result does not depend on it, but for the slots of
            ``refresh_schedule="staggered"`` and the rounding of ``communication_dtype``. Sharded
            parameters are always divided among the ranks of their mesh.
        communication_dtype: in which search directions travel: ``torch.float32``,
            ``torch.bfloat16`` or ``torch.float16``; None for the dtype they are computed in, which
            rounds nothing.
        overlap: send the directions of replicated parameters in parts, the first while later ones
            are computed. LARS, LAMB and a mix with sharded parameters send them in one.
        check_replicas_every: steps between comparisons of what several ranks hold of the
            parameters, bit for bit, 0 for never. A difference raises on all of them.

    Raises:
        ValueError: for a value out of range, naming it, its bound and the remedy.
        RuntimeError: for complex parameters, those with Partial placements, flat ones (FSDP1,
            ZeRO) and ``differentiable=True``.

    With an initialised process group every block has one owner, which holds its state and computes
    its direction; all ranks apply what was sent. All ranks must call ``step()`` together, with
    gradients for the same parameters; a rank that cannot go on takes the others with it, with the
    same error, instead of leaving them to wait.

    Steps are a parameter's own: bias corrections, ``start_preconditioning_step`` and the refreshes
    of its roots count those in which it has a gradient. A call in which none has one changes
    nothing. A first step whose gradients are all zero only allocates state, because
    torch.distributed.checkpoint makes such a step.

    No finite gradient leaves a parameter, or anything in the state, that is not finite: squares are
    refused before they overflow (``nonfinite``), roots and directions are checked. A block whose
    direction its dtype cannot hold, or not a momentum of it (5e30 in float32), takes no step until
    it is small enough again, while its statistics move. What remains is what an ``lr`` does that
    carries a weight beyond its own dtype, and a weight near that edge (from 1e30 in float32) that
    momentum, LARS or LAMB add to the direction.

    State, flat under each parameter, k the row-major index in its grid of blocks and m the
    dimension: ``step``, ``calls`` (capturable only: steps asked for), ``block{k}.factor{m}``,
    ``block{k}.root{m}`` (zero before the first refresh), ``block{k}.failures{m}``,
    ``block{k}.slot{m}`` (staggered only), ``block{k}.exp_avg``, ``block{k}.exp_avg_sq`` (the
    grafted method's), ``block{k}.momentum``.
    """

    _is_being_built = False  # while it is, one warning is to come for all groups
    _unasked: tuple[int, ...] = ()  # indices of groups that have not said whether to precondition

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        relative_eps: float = 1e-6,
        decoupled_weight_decay: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        nesterov_average: bool = True,
        max_preconditioner_dim: int | Literal["auto"] = "auto",
        precondition_frequency: int = 10,
        start_preconditioning_step: float = 1,
        merge_dims: MergeDims = "matrix",
        precondition_1d: bool = False,
        precondition: bool = True,
        preconditioner: PreconditionerKind = "shampoo",
        exponent: Literal["covariance", "paper"] | float | Sequence[float] = "covariance",
        exponent_multiplier: float = 1.0,
        bias_correction: bool = True,
        grafting: GraftingMethod = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        large_dim_method: LargeDimMethod = "auto",
        root_method: RootMethod = "auto",
        preconditioner_dtype: torch.dtype = torch.float32,
        nonfinite: Nonfinite = "skip",
        max_root_failures: int | None = None,
        refresh_schedule: RefreshSchedule = "together",
        maximize: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        process_group: ProcessGroup | None = None,
        num_trainers_per_group: int = -1,
        communication_dtype: torch.dtype | None = None,
        overlap: bool = False,
        check_replicas_every: int = 0,
    ) -> None:
        given = locals()
        self._process_groups = ProcessGroups(**{name: given[name] for name in _SHARING})
        defaults = {name: given[name] for name in _DEFAULTS}
        defaults["preconditioner_dtype"] = dtype_name(preconditioner_dtype)
        Hyperparameters.read(defaults)
        if isinstance(params, nn.Module):
            params = groups(params)
            for group in params:  # an argument of False is for all of the model
                group["precondition"] = group["precondition"] and precondition
        self._is_being_built = True
        super().__init__(params, defaults)
        self._is_being_built = False
        warn_of_thin(self.param_groups)
        warn_of_long_sides(self.param_groups, self._unasked)
        certificates.load_kernels(required=fused is True)
        tracing.run_eagerly(type(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; the blocks of its parameters start at step 0.

        Raises:
            ValueError: for a hyper-parameter out of range, another ``capturable`` than that of the
                other groups, or a parameter that is there already; nothing is added.
            RuntimeError: for parameters that cannot be cut into blocks; nothing is added.
        """
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if params is not None and not isinstance(params, (Tensor, set)):  # as torch takes them
            param_group["params"] = list(params)
            check_distinct([param_group], len(self.param_groups))
        is_asked = isinstance(param_group, dict) and "precondition" in param_group
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
            capture.is_capturable(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        unasked = () if is_asked else (len(self.param_groups) - 1,)
        if self._is_being_built:
            self._unasked += unasked
        else:
            warn_of_thin(self.param_groups, len(self.param_groups) - 1)
            warn_of_long_sides(self.param_groups, unasked)

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        group["extra"] = dict(_EXTRA)
        values = Hyperparameters.read(settle(group))
        warn_about(group)
        self._reader.look_at_roots(values)
        for position, param in enumerate(group["params"]):
            check_parameter(param, parameter_name(group, index, position))
            if param.numel() > 0:
                layout = layout_of(param.shape, values.geometry)
                kind_of(layout).check(values, layout.order)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            NonFiniteGradientError: with ``nonfinite="raise"``; nothing has changed.
            RootFailureError: if a factor has been without a valid root for more refreshes in a row
                than ``max_root_failures``; nothing has changed.
            PlanMismatchError: if ranks differ in parameters, gradients that are there, or
                hyper-parameters; nothing has changed.
            ReplicaMismatchError: if ``check_replicas_every`` finds a difference; nothing has
                changed.
            ShampooDistributedError: if a rank has failed. No parameter has changed, but statistics
                may have moved.
            RuntimeError: for a gradient that is sparse, not floating point, or of another shape,
                device or placement than its parameter, and for parameters on "meta"; nothing has
                changed.
            Where ranks share the work, all of them raise in the same step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._all_params()
        with tracing.answering(params):
            step = self._begin(params)  # all ranks step, or none: nothing has changed so far
            if step is None:
                return loss
            with step:
                # 0: t <- t + 1
                step.open(self.param_groups, self.state, self._reader.revision)
                for arena, kind, segments, hyper, scalars, due, distributor in step.arenas():
                    with step.deferred:  # others may wait for this rank in the next collective
                        is_ahead = refresh_ahead(kind, segments, due, hyper, scalars, distributor)
                        for segment in segments:
                            s = scalars.at(segment.param_index)
                            # 1, 2: where G = sign grad (+ weight_decay W) lies
                            G = gradients(segment, hyper, s, distributor)
                            # 5: M1 <- beta1 M1 + (1 - beta1) G, and that again without a change
                            # of M1 if it looks ahead; v of 3 and |D_g| of 6 with it
                            graft(kind, segment, G, s)
                            if not is_ahead:
                                # 3: A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T
                                accumulate(kind, segment, G.out, hyper, s)
                                # 4: X_k <- (A_k / c2 + ridge I)^(-1/p), where it is due
                                refresh(kind, due, hyper, scalars)
                            # 6: P <- M1 x_1 X_1 ... x_o X_o, |P| <- |D_g|
                            precondition(kind, segment, hyper, s)
                            # 8 to 10: P <- P + weight_decay W, M <- mu M + P, W <- W - lr M; or M
                            # on its way to those who hold W. LARS and LAMB come in arenas().
                            if not arena.is_layerwise:
                                distributor.apply_direction(arena, segment, hyper, s)
                try:
                    step.finish()  # 10: W <- W - lr D, where D is what travelled
                finally:
                    self._damage = step.damage
        return loss

    def explain(self) -> Explanation:
        """What is done with every parameter, and what that takes: print it, or read its rows.

        Before the first step as after it, on ``meta`` too. Does not communicate, and changes
        nothing: any rank may ask alone.

        Returns:
            :class:`~shampoo.step.explanation.Explanation`: a row for each tensor, one for each
            group, and totals.
        """
        return explain(self.param_groups, self.state, self._process_groups, self._owners())

    def coming_refresh(self) -> tuple[Hashable, ...]:
        """Names the roots that the next step refreshes: what a graph of it can be used for again.

        All None for an ordinary step. The schedule follows the steps that were asked for; the host
        does not know which of them ``capturable=True`` has skipped.
        """
        self._settle_late()
        values = self._reader.read(self.param_groups)
        plan = self._current_plan()
        plan.assign_phases(self.param_groups, values)
        return capture.coming_refresh(plan, values)

    def _fill_groups(self) -> None:
        # A pickle of an older version has none of the arguments that came after it, not even in
        # its defaults.
        self.defaults = {**_DEFAULTS, **FORMER_DEFAULTS, **translate(self.defaults)}
        for group in self.param_groups:
            extra = complete(group, self.defaults).get("extra", {})
            group["extra"] = {name: extra.get(name, value) for name, value in _EXTRA.items()}
        certificates.load_kernels()
        tracing.run_eagerly(type(self))


# Who shares the work belongs to a run, not to what is trained: it is in no group or checkpoint.
_SHARING = tuple(inspect.signature(ProcessGroups).parameters)

_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(Shampoo.__init__).parameters.items()
    if parameter.default is not inspect.Parameter.empty and name not in _SHARING
}
