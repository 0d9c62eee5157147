"""The process group that learns one mask, as torchrun or accelerate launch starts it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
# One process may read task vectors or write a large file while the others wait. A process that
# fails ends the others through the launcher, so that none waits this long for it.
_LONGEST_WAIT = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process in its process group, of ``count``.

    Each takes its share of a step's pairs, all add up their gradients, and all make the same
    updates. The first one, of ``rank`` 0, writes and speaks.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
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
        """Return the values of all processes, the first one's first. Tensors: on the CPU alone."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))

    def of_first(self, value: _T) -> _T:
        """Return the first process' value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def first_does(self, action: Callable[[], _T]) -> _T:
        """Return in all processes what an action returns in the first one, which alone runs it.

        Raises:
            RecipeError: the action raised it; in all processes, so that none waits in vain.
        """
        value, problem = None, ""
        if self.is_first:
            try:
                value = action()
            except RecipeError as error:
                if self.count == 1:
                    raise
                problem = error.message
        value, problem = self.of_first((value, problem))
        if problem:
            raise RecipeError(problem)
        return cast(_T, value)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


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

    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=_LONGEST_WAIT)
    return Processes(state.process_index, state.num_processes)


def started() -> int:
    """Return how many processes were started together, on all machines."""
    return int(_launched().world_size)


def is_first() -> bool:
    """Return whether this is the first of the processes started together: the one that speaks."""
    return int(_launched().rank) == 0


def started_here() -> int:
    """Return how many processes were started together on this machine."""
    return int(_launched().local_world_size)


def own_device(device: str | None) -> str:
    """Return the device of this process, where mergekit was given ``device``."""
    chosen = device or "cpu"
    if chosen == "cuda" and started() > 1:
        return f"cuda:{_launched().local_rank}"
    return chosen


def _launched() -> Any:
    """Return what the launcher (torchrun, accelerate, MPI) says, without connecting anything."""
    from accelerate.utils import get_cpu_distributed_information

    return get_cpu_distributed_information()
