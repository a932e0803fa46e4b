"""From Meta's ``distributed_shampoo`` to this package: its arguments, and its checkpoints.

Its configuration objects are known by the names of their classes and of their values, so it need
not be installed. What has no counterpart here is refused by name: docs/from_official.md.
"""

from shampoo.migrate.arguments import from_distributed_shampoo
from shampoo.migrate.checkpoints import load_distributed_shampoo

__all__ = ["from_distributed_shampoo", "load_distributed_shampoo"]
