"""Process groups that are known here and held by torch alone.

A group ends, and the threads of its backend with it, when ``destroy_process_group()`` drops it and
nobody else holds it. An optimizer that did would carry it into the end of the interpreter, where a
thread of gloo that lets go of the last collective's tensors aborts the process.
"""

import weakref

import torch.distributed as dist

from shampoo.errors import ShampooDistributedError


class GroupHandle:
    """One process group, held weakly.

    Args:
        group: it exists; torch keeps it until it is destroyed.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._ranks = tuple(dist.get_process_group_ranks(group))
        self._group = weakref.ref(group)

    def live(self) -> dist.ProcessGroup:
        """The group, for one use: whoever keeps it keeps it alive.

        Raises:
            ShampooDistributedError: if it has been destroyed, and the default group has not.
        """
        group = self._group()
        if group is None:
            raise ShampooDistributedError(
                f"the process group of the ranks {self._ranks} has been destroyed, but a step needs"
                " it. Destroy it after the last step, or build a new optimizer with a group that"
                " exists and load the state of this one."
            )
        return group
