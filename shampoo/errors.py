"""What can go wrong, by name. Bad arguments are plain ``ValueError``."""


class ShampooError(RuntimeError):
    """Base class of the errors this package raises while it trains or loads."""


class NonFiniteGradientError(ShampooError):
    """A gradient holds NaN or Inf and the group says ``nonfinite="raise"``."""


class BlockGridMismatchError(ShampooError):
    """State was cut into other blocks than the ones this optimizer uses."""


class IncompleteCheckpointError(ShampooError):
    """A checkpoint lacks blocks of a parameter that it claims to hold."""


class ForeignCheckpointError(ShampooError):
    """A checkpoint is another optimizer's."""


class PlanMismatchError(ShampooError):
    """Ranks that train one model would cut, own or move its blocks differently."""


class ShampooDistributedError(ShampooError):
    """A rank could not take its part of a step; no rank has changed a parameter in it."""


class ReplicaMismatchError(ShampooError):
    """Ranks that must hold the same bits of a parameter hold different ones."""


class RootFailureError(ShampooError):
    """A factor has had no valid root for more refreshes than ``max_root_failures`` allows."""
