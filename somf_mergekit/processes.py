"""The processes that learn one mask together, as torchrun or accelerate launch starts them."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that learn together.

    Each takes its share of a step's pairs, all add up their gradients, and all make the same
    updates.

    Attributes:
        rank: of this one, from 0; the first writes and speaks.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, rows: list[int]) -> list[int]:
        """Return this process' share of rows."""
        return rows[self.rank :: self.count]

    def add_up(self, tensor: "Tensor") -> "Tensor":
        """Return the sum over all processes, float32."""
        if self.count == 1:
            return tensor.float()
        import torch

        total = tensor.to(torch.float32, copy=True)
        torch.distributed.all_reduce(total)
        return total

    def gathered(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes, the first one's first."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()


ALONE = Processes()


def processes(device: str) -> Processes:
    """Return this process among those started together, connected.

    Args:
        device: as mergekit names it; connects over gloo for ``cpu``.
    """
    if started() == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=torch.device(device).type == "cpu")
    return Processes(state.process_index, state.num_processes)


def started() -> int:
    """Return how many processes were started together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the first of the processes started together: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def started_here() -> int:
    """Return how many processes were started together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_device(device: str | None) -> str:
    """Return the device of this process, where mergekit was told ``device``."""
    chosen = device or "cpu"
    local = os.environ.get("LOCAL_RANK")
    return f"{chosen}:{local}" if local and chosen == "cuda" else chosen
