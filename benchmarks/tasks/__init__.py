"""What optimizers are compared on: a model, data, a schedule and a judge, a small module each."""

from benchmarks.tasks.autoencoder import AUTOENCODER
from benchmarks.tasks.base import Split, Task
from benchmarks.tasks.characters import CHARACTERS
from benchmarks.tasks.digits import DIGITS
from benchmarks.tasks.fashion import FASHION

__all__ = ["TASKS", "Split", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS, *FASHION, AUTOENCODER, *CHARACTERS)}
