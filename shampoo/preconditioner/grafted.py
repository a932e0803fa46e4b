"""The grafted method alone, for what is not preconditioned: embeddings, say, and vectors."""

from shampoo.preconditioner.base import Preconditioner


class Grafted(Preconditioner):
    """``P = D``: keeps nothing beside the moments of the group's ``grafting``."""

    name = "grafted"
    preconditions = False
    stream = 1
