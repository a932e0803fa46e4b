"""Checkpoints of a model and its optimizer that any number of ranks can load.

On ``torch.distributed.checkpoint`` (DCP): every rank writes the blocks it owns, and a run on other
ranks, or sharded otherwise, reads the blocks that it owns then. One directory a step::

    folder/.lock            of the job that saves there
    folder/step-00000100/   what DCP writes
                            extra.pt        what else was to be saved, by torch.save
                            manifest.json   length and checksum of every file
                            complete        the marker, with the checksum of the manifest

A directory gets this name when all of it is on the disk. To load one runs no code of it, wherever
it is from: names in its pickles stand for tensors and plain values, or are refused.
"""

from shampoo.checkpoint.loading import load
from shampoo.checkpoint.portable import export_safetensors, import_safetensors
from shampoo.checkpoint.saving import save
from shampoo.checkpoint.stateful import Stateful

__all__ = ["Stateful", "export_safetensors", "import_safetensors", "load", "save"]
