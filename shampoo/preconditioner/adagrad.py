"""The diagonal method of ``large_dim_method="adagrad"``, and of vectors without a graft."""

from shampoo.preconditioner.base import Preconditioner


class AdaGrad(Preconditioner):
    """``v <- beta2 v + (1 - beta2) G^2``, ``P = M / (sqrt(v / c2) + eps)``, whatever the graft."""

    name = "adagrad"
    preconditions = False
    borrows = False
    stream = 2
