"""Kinds of preconditioner, one a file. A new one is a file and its line in :data:`KINDS`.

What varies between kinds is :class:`~shampoo.preconditioner.base.Preconditioner`; all else is
shared. A parameter group chooses one with a direction of its own by its name; what moves tensors
that are not preconditioned are kinds too.
"""

from shampoo.blocks.declared import declare
from shampoo.preconditioner.adagrad import AdaGrad
from shampoo.preconditioner.base import Preconditioner
from shampoo.preconditioner.grafted import Grafted
from shampoo.preconditioner.kl_shampoo import KLShampoo
from shampoo.preconditioner.shampoo import Shampoo

KINDS: dict[str, Preconditioner] = {
    kind.name: kind
    for kind in (
        Shampoo(),
        KLShampoo(),
        Grafted(),
        AdaGrad(),
    )
}

for _kind in KINDS.values():
    declare(_kind)
