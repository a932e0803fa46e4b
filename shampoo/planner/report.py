"""What the planner found, as numbers and as a table to read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shampoo.errors import shown_bytes


@dataclass(frozen=True)
class StepSeconds:
    """Predicted time of a step under one refresh schedule, over the steps of a period."""

    mean: float
    worst: float


@dataclass(frozen=True)
class PlanReport:
    """Predicted memory, traffic and time of one way to shard an optimizer.

    ``owners`` ranks share the blocks: a group of ``num_trainers_per_group`` under DDP, all ranks
    under FSDP2 and HSDP. Tuples have one entry for each of them. Seconds come from
    ``cost_model`` and the bandwidths and are those of the optimizer's step alone; communication is
    counted in full, as if nothing hid it.
    """

    layout: str
    world_size: int
    owners: int
    numel: int  # trained parameters
    tensors: int
    blocks: int
    factored_blocks: int
    diagonal_blocks: int  # of these: with a side that is not cut and whose factor is diagonal
    max_preconditioner_dim: int
    precondition_frequency: int
    state_bytes: tuple[int, ...]  # of optimizer.state
    compute_seconds: tuple[float, ...]  # of a rank's blocks, roots spread over their period
    traffic_bytes: tuple[int, ...]  # received a step by a rank for the optimizer's sake
    buffer_bytes: int  # for communication, on the rank with the most
    padding: float  # AllGather: its buffer / the directions in it; 1 for all-to-alls
    locality: float | None  # sharded: share of the elements that lie on their block's owner,
    best_locality: float | None  # and if each block were owned where the most of it lies
    holders: float | None  # sharded: mean number of shards that hold a piece of a block
    update_seconds: float  # of writing parameters
    exchange_seconds: float
    together: StepSeconds
    staggered: StepSeconds  # in rank-aligned slots
    refresh_slots: int  # used in a period
    recommended_block: int
    recommended_group: int  # of DDP: num_trainers_per_group
    cost_model: str
    notes: tuple[str, ...]

    @property
    def compute_imbalance(self) -> float:
        """Largest over mean compute of a rank; 1 is perfect."""
        return _imbalance(self.compute_seconds)

    @property
    def state_imbalance(self) -> float:
        """Largest over mean state of a rank."""
        return _imbalance(self.state_bytes)

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON-like values; of the ranks, the largest and the mean."""
        values = asdict(self)
        for name in ("state_bytes", "compute_seconds", "traffic_bytes"):
            ranks = values.pop(name)
            values[f"max_{name}"], values[f"mean_{name}"] = max(ranks), sum(ranks) / len(ranks)
        return values | {
            "compute_imbalance": self.compute_imbalance,
            "state_imbalance": self.state_imbalance,
        }

    def __str__(self) -> str:
        places = {"ddp": f"groups of {self.owners} share the blocks"}
        where = places.get(self.layout, "all ranks share the blocks")
        group = f" num_trainers_per_group={self.recommended_group}," * (self.layout == "ddp")
        rows = [
            ("model", f"{self.numel:,} parameters in {self.tensors:,} tensors"),
            ("layout", f"{self.layout}, {_count(self.world_size, 'rank')}: {where}"),
            (
                "blocks",
                f"{self.blocks:,} of at most {self.max_preconditioner_dim} a side,"
                f" {self.factored_blocks:,} with factors"
                + f", {self.diagonal_blocks:,} diagonal in a side" * (self.diagonal_blocks > 0),
            ),
            ("state", _spread(self.state_bytes, shown_bytes, self.state_imbalance)),
            ("compute", _spread(self.compute_seconds, _seconds, self.compute_imbalance)),
            ("received", f"{_spread(self.traffic_bytes, shown_bytes)}, a step"),
            ("buffers", self._buffers()),
            ("other time", f"exchange {_seconds(self.exchange_seconds)},"
             f" parameter update {_seconds(self.update_seconds)}"),
            ("step", f"roots together: {_step(self.together)}"),
            ("", f"staggered:      {_step(self.staggered)}"),
            (
                "recommended",
                f"max_preconditioner_dim={self.recommended_block},{group}"
                f" {_count(self.refresh_slots, 'refresh slot')} of"
                f" {self.precondition_frequency} steps",
            ),
            ("model of cost", self.cost_model),
            *(("note", note) for note in self.notes),
        ]  # fmt: skip
        return "\n".join(f"{name:<14} {value}" for name, value in rows)

    def _buffers(self) -> str:
        if self.locality is None:
            return f"{shown_bytes(self.buffer_bytes)}, padding {self.padding:.2f}"
        return (
            f"{shown_bytes(self.buffer_bytes)}; {self.locality:.0%} of the elements lie on their"
            f" owner (at best {self.best_locality:.0%}), a block on {self.holders:.1f} shards"
        )


def _imbalance(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


def _spread(ranks: Sequence[Any], show: Any, imbalance: float | None = None) -> str:
    text = f"{show(max(ranks))} on the busiest rank, mean {show(sum(ranks) / len(ranks))}"
    return text if imbalance is None else f"{text} ({imbalance:.3f})"


def _step(seconds: StepSeconds) -> str:
    return f"mean {_seconds(seconds.mean)}, worst {_seconds(seconds.worst)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _seconds(number: float) -> str:
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if number * factor < 1000:
            return f"{number * factor:.3g} {unit}"
    return f"{number:.3g} s"
