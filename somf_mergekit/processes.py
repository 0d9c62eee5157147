"""The processes that learn one mask together, as torchrun or accelerate launch starts them."""

import json
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
        """Return the values of all processes, the first one's first.

        They are what JSON knows, and tensors of float32 on one axis; lists in them come as tuples.
        """
        if self.count == 1:
            return values
        return [value for text in self._texts(_as_text(values)) for value in _from_text(text)]

    def _texts(self, text: str) -> list[str]:
        """Return the texts of all processes.

        As bytes, for what torch and accelerate have for objects unpickles what the network brings.
        """
        import torch
        from accelerate import PartialState

        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        own = own.to(PartialState().device)
        length = torch.tensor([len(own)], device=own.device)
        lengths = [torch.empty_like(length) for _ in range(self.count)]
        torch.distributed.all_gather(lengths, length)
        padded = own.new_zeros(int(max(lengths)))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(parts, padded)
        contents = zip(parts, lengths, strict=True)
        return [part[: int(count)].cpu().numpy().tobytes().decode() for part, count in contents]

    def of_first(self, value: Any) -> Any:
        """Return the first process' value, in all of them."""
        return self.gathered([value])[0]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()


ALONE = Processes()
# Where launchers tell a process about the others: torchrun and accelerate, then MPI's (which
# `accelerate launch --cpu` uses for several processes).
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT_HERE = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
_RANK_HERE = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)


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
    return int(_told(_COUNT) or 1)


def is_first() -> bool:
    """Return whether this is the first of the processes started together: the one that speaks."""
    return int(_told(_RANK) or 0) == 0


def started_here() -> int:
    """Return how many processes were started together on this machine.

    All of them are thought to be here where the launcher does not tell.
    """
    return int(_told(_COUNT_HERE) or started())


def own_device(device: str | None) -> str:
    """Return the device of this process, where mergekit was told ``device``."""
    chosen = device or "cpu"
    local = _told(_RANK_HERE)
    return f"{chosen}:{local}" if local and chosen == "cuda" else chosen


def _told(names: tuple[str, ...]) -> str | None:
    """Return the first of these environment variables that is a number from 0 up."""
    values = (os.environ.get(name, "") for name in names)
    return next((value for value in values if value.isdecimal()), None)


_TENSOR = "tensor"


def _as_text(values: list[Any]) -> str:
    """Return values as JSON, which keeps every digit of a number."""
    return json.dumps(values, default=lambda tensor: {_TENSOR: tensor.tolist()})


def _from_text(text: str) -> list[Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            import torch

            return torch.tensor(value[_TENSOR], dtype=torch.float32)
        return tuple(map(plain, value)) if isinstance(value, list) else value

    return [plain(value) for value in json.loads(text)]
