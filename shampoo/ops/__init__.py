"""Every op, declared once: one record says all that is known of it.

PyTorch's dispatcher is the only switch between kernels. An op starts out as its reference
everywhere, and :func:`load_kernels` registers faster kernels over it for one device, as
:mod:`shampoo.ops.backends` chooses. Ops write into tensors they are given and return nothing. To
add one, write its reference in ``kernels/reference/`` and its record here; then its kernels.
"""

from shampoo.kernels.reference import diagonal, keep_roots, minimax, minimax_class, root_check
from shampoo.kernels.reference import ops as reference
from shampoo.kernels.reference.ops import Number
from shampoo.ops import supports
from shampoo.ops.licence import REFERENCE
from shampoo.ops.registry import OPS, Cpp, Cuda, Op, Triton, declare, has_kernel
from shampoo.ops.routes import (
    are_loaded,
    confine_cpu,
    grant,
    kernel_at,
    kernels,
    load_kernels,
    runs_kernel_on_cpu,
)

__all__ = ["OPS", "REFERENCE", "Number", "grant", "has_kernel", "kernels", "load_kernels"]
__all__ += ["are_loaded", "confine_cpu", "kernel_at", "runs_kernel_on_cpu"]
__all__ += ["gather_blocks_", "graft_moments_", "graft_scale_", "magnitudes_"]
__all__ += ["update_blocks_"]
__all__ += ["gram_ema_", "precondition_"]
__all__ += ["minimax_class_root_", "minimax_root_", "minimax_small_root_"]
__all__ += ["diagonal_root_", "eigh_"]
__all__ += ["check_roots_", "keep_roots_"]

gather_blocks_ = declare(
    Op(
        "gather_blocks_(Tensor(a!) out, Tensor[] sources, Tensor tiles, float alpha,"
        " bool accumulate) -> ()",
        reference.gather_blocks_,
        subject=("out",),
        moving=("alpha",),
        is_elementwise=True,
        kernels=(Cpp(), Cuda()),
    )
)
magnitudes_ = declare(
    Op(
        "magnitudes_(Tensor(a!) out, Tensor[] tensors) -> ()",
        reference.magnitudes_,
        subject=("tensors",),
        is_elementwise=True,
        kernels=(Cpp(), Cuda(supports.magnitudes)),
    )
)
graft_moments_ = declare(
    Op(
        "graft_moments_(Tensor(a!)? grad, Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq,"
        " Tensor(d!)? direction, Tensor(e!) norm, Tensor[] sources, Tensor tiles, float alpha,"
        " bool accumulate, float beta1, float correction1, float beta2, float weight2,"
        " float correction2, float eps, bool normalized, Tensor(f!)? ahead=None) -> ()",
        reference.graft_moments_,
        subject=("grad", "exp_avg", "exp_avg_sq", "direction", "norm"),
        moving=("alpha", "beta1", "correction1", "beta2", "weight2", "correction2"),
        is_elementwise=True,
        kernels=(Cpp(), Cuda()),
    )
)
graft_scale_ = declare(
    Op(
        "graft_scale_(Tensor(a!) scale, Tensor norm, Tensor? length, Tensor? is_own,"
        " float correction, bool grafted, float most, Tensor? accepted=None) -> ()",
        reference.graft_scale_,
        subject=("scale",),
        moving=("correction",),
        is_elementwise=True,
        kernels=(Cpp(), Cuda()),
    )
)
gram_ema_ = declare(
    Op(
        "gram_ema_(Tensor(a!)[] factors, Tensor[] grads, int[] modes, float beta, float weight)"
        " -> ()",
        reference.gram_ema_,
        subject=("factors",),
        moving=("beta", "weight"),
        by_stack=("factors", "grads", "modes"),
        kernels=(Cpp(), Triton("gram")),
    )
)
precondition_ = declare(
    Op(
        "precondition_(Tensor(a!)[] outs, Tensor(b!)[] norms, Tensor[] grads, Tensor?[] roots)"
        " -> ()",
        reference.precondition_,
        subject=("outs",),
        by_stack=("outs", "norms", "grads"),
        by_mode=("roots",),
        kernels=(Cpp(), Triton("precondition")),
    )
)
eigh_ = declare(
    Op(
        "eigh_(Tensor(a!) values, Tensor(b!) vectors, Tensor stack) -> ()",
        reference.eigh_,
        subject=("stack",),
        kernels=(Cpp(),),
    )
)
minimax_root_ = declare(
    Op(
        "minimax_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, int p, float eps,"
        " float relative_eps, float[] schedule) -> ()",
        minimax.minimax_root_,
        subject=("root",),
        kernels=(
            Cpp(),
            Cuda(supports.minimax_small_root, op="minimax_small_root_"),
            Triton("minimax"),
        ),
    )
)
minimax_small_root_ = declare(
    Op(
        "minimax_small_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, int p, float eps,"
        " float relative_eps, float[] schedule) -> ()",
        minimax.minimax_small_root_,
        subject=("root",),
        kernels=(Cuda(supports.minimax_small_root),),
    )
)
minimax_class_root_ = declare(
    Op(
        "minimax_class_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, Tensor sizes, int p,"
        " float eps, float relative_eps, float[] schedule) -> ()",
        minimax_class.minimax_class_root_,
        subject=("root",),
        kernels=(Triton("minimax_class"),),
    )
)
diagonal_root_ = declare(
    Op(
        "diagonal_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, float p, float eps,"
        " float relative_eps) -> ()",
        diagonal.diagonal_root_,
        subject=("root",),
        kernels=(Triton("diagonal"),),
    )
)
check_roots_ = declare(
    Op(
        "check_roots_(Tensor(a!) ok, Tensor root, Tensor factor, Tensor ridge, float p,"
        " Tensor? sizes=None) -> ()",
        root_check.check_roots_,
        subject=("root",),
        kernels=(Triton("root_check"),),
    )
)
keep_roots_ = declare(
    Op(
        "keep_roots_(Tensor(a!) root, Tensor(b!) outcome, Tensor(c!) failures, Tensor(d!) ready,"
        " Tensor candidate, Tensor ok, Tensor? accepted=None) -> ()",
        keep_roots.keep_roots_,
        subject=("root",),
        kernels=(Triton("keep_roots"),),
    )
)
update_blocks_ = declare(
    Op(
        "update_blocks_(Tensor(a!)[] params, Tensor(b!)? momentum, Tensor direction, Tensor scale,"
        " Tensor tiles, float lr, float weight_decay, float mu, bool nesterov, int? seed=None,"
        " float step=0.0) -> ()",
        reference.update_blocks_,
        subject=("direction",),
        moving=("lr", "weight_decay", "mu", "step"),
        is_elementwise=True,
        kernels=(Cpp(), Cuda()),
    )
)
