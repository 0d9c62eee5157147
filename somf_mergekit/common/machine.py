"""What concerns the machine and not the result: its options, its memory, its devices."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any

import click

from .errors import RecipeError, first_line, raise_together
from .process_group import started_here

ENGINES = RESIDENT, SHARDED, STREAMING, FACTORED = (
    "resident",
    "sharded",
    "streaming",
    "factored",
)
BASE_PRECISIONS = FOUR_BITS, EIGHT_BITS = ("4bit", "8bit")
REPORTS = NO_REPORT, TEXT_REPORT, FULL_REPORT = ("none", "text", "full")


def _option(default: Any, click_type: click.ParamType, text: str) -> Any:
    return field(default=default, metadata={"type": click_type, "help": text})


@dataclass(frozen=True)
class MachineOptions:
    """How a mask is learned on this machine, and where things go: never in a recipe.

    Each field is an option of ``mergekit-somf`` (``--work-dir``) and an environment variable
    (``SOMF_WORK_DIR``). What is None is found out.
    """

    micro_batch_size: int | None = _option(
        None,
        click.IntRange(min=1),
        "Pairs that go through the model at once while learning; found from the free memory.",
    )
    engine: str | None = _option(
        None,
        click.Choice(ENGINES),
        "resident: all weights in memory; streaming: one layer's at a time, the rest in files "
        "beside the output or, for a GPU, in the host's memory; sharded: one layer's at a time, "
        "the rest divided among the processes that learn; factored: adapters stay factored, beside "
        "the base's weights. Found from the models and the free memory.",
    )
    precision: str | None = _option(
        None,
        click.Choice(["float32", "bfloat16"]),
        "What the model computes in while learning: bfloat16 (autocast) where the device is fast "
        "at it, else float32.",
    )
    base_precision: str | None = _option(
        None,
        click.Choice(BASE_PRECISIONS),
        "In how many bits the factored engine has the base's linear layers while it learns, by "
        "bitsandbytes; as they are where it is not set. The merge itself is exact.",
    )
    checkpoint_minutes: float = _option(
        5.0,
        click.FloatRange(min=0),
        "Minutes between two checkpoints of a mask that is being learned (5); 0 for one a step.",
    )
    work_dir: str | None = _option(
        None,
        click.Path(file_okay=False),
        "Where the learned mask and the report go instead of the output folder's `somf`.",
    )
    report: str = _option(
        FULL_REPORT,
        click.Choice(REPORTS),
        "What is reported of a merge: full: report.md, report.json, plots and a section of the "
        "model card; text: the same without plots; none: nothing, and nothing is measured. Full "
        "where it is not set.",
    )
    cache_dir: str | None = _option(
        None,
        click.Path(file_okay=False),
        "Where the checksums of model files are remembered; `somf-mergekit` in the user's cache.",
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "MachineOptions":
        """Return the options in ``values``, where None stands for what is not given."""
        names = {option.name for option in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names and v is not None})

    @classmethod
    def from_environment(cls) -> "MachineOptions":
        """Return what the environment variables say.

        Raises:
            RecipeError: values that can't be used, all of them together.
        """
        values, problems = {}, []
        for option in fields(cls):
            variable = _variable(option)
            try:
                if text := os.environ.get(variable):
                    values[option.name] = option.metadata["type"].convert(text, None, None)
            except click.UsageError as error:
                problems.append(f"environment variable {variable}: {error.message}")
        raise_together(problems, "The environment is not right")
        return cls(**values)

    @classmethod
    def click_options(cls, without: Collection[str] = ()) -> list[click.Option]:
        """Return the options of a command, except for those ``without`` a use there."""
        return [
            click.Option(
                [f"--{option.name.replace('_', '-')}"],
                type=option.metadata["type"],
                envvar=_variable(option),
                help=option.metadata["help"],
            )
            for option in fields(cls)
            if option.name not in without
        ]


def _variable(option: Field[Any]) -> str:
    return f"SOMF_{option.name.upper()}"


def device_problem(device: str) -> str | None:
    """Return what keeps torch from using ``device``, in a sentence; None for nothing."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"device {device!r} can't be used: {first_line(error)}"
    return None


def autocast_type(device: str, precision: str | None = None) -> Any:
    """Return the torch dtype of autocast while learning on ``device``, None for float32.

    Args:
        device: of torch.
        precision: ``float32`` or ``bfloat16``; where None, what the device is fast at.
    """
    import torch

    if precision is not None:
        return torch.bfloat16 if precision == "bfloat16" else None
    if torch.device(device).type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Releases of torch without this function get float32.
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        is_fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if is_fast else None


def free_memory(device: str) -> int:
    """Return the bytes that can still be had on ``device``."""
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // started_here()


@contextmanager
def memory_for(what: Callable[[], str]) -> Iterator[None]:
    """Report where memory runs out, on whatever device, for ``what`` is named when it does.

    Raises:
        RecipeError: it did.
    """
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch says so in words alone.
        in_words = "can't allocate memory" in str(error)
        if not in_words and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise RecipeError(
            f"the memory was not enough for {what()} ({first_line(error)}). Progress up to the "
            "last checkpoint is saved: the same command goes on from there, also with "
            "--micro-batch-size 1 (SOMF_MICRO_BATCH_SIZE) or --engine streaming (SOMF_ENGINE), "
            "which need less."
        ) from error
