"""What concerns the machine and not the result: never in a recipe.

Each setting is an option of ``mergekit-somf`` and an environment variable, found out where it is
not set.
"""

import os
from dataclasses import dataclass
from typing import Any

import click

from .errors import RecipeError, first_line, noted
from .process_group import started_here

_CHECKPOINT_MINUTES = 5
ENGINES = RESIDENT, SHARDED, STREAMING = ("resident", "sharded", "streaming")
REPORTS = NO_REPORT, TEXT_REPORT, FULL_REPORT = ("none", "text", "full")


@dataclass(frozen=True)
class MachineOption:
    """One setting: environment variable ``SOMF_<NAME>``, option ``--<name>``."""

    name: str
    help: str
    click_type: Any

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"SOMF_{self.name.upper()}"

    @property
    def flag(self) -> str:
        """The command-line option."""
        return f"--{self.name.replace('_', '-')}"


OPTIONS = (
    MachineOption(
        "micro_batch_size",
        "Pairs that go through the model at once while learning; found from the free memory.",
        click.IntRange(min=1),
    ),
    MachineOption(
        "engine",
        "resident: all weights in memory; streaming: one layer's at a time, the rest in files "
        "beside the output or, for a GPU, in the host's memory; sharded: one layer's at a time, "
        "the rest divided among the processes that learn. Found from the free memory.",
        click.Choice(ENGINES),
    ),
    MachineOption(
        "precision",
        "What the model computes in while learning: bfloat16 (autocast) where the device is fast "
        "at it, else float32.",
        click.Choice(["float32", "bfloat16"]),
    ),
    MachineOption(
        "checkpoint_minutes",
        "Minutes between two checkpoints of a mask that is being learned (5); 0 for one a step.",
        click.FloatRange(min=0),
    ),
    MachineOption(
        "work_dir",
        "Where the learned mask and the report go instead of the output folder's `somf`.",
        click.Path(file_okay=False),
    ),
    MachineOption(
        "report",
        "What is told of a merge: full: report.md, report.json, plots and a section of the model "
        "card; text: the same without plots; none: nothing, and nothing is measured. Full where it "
        "is not set.",
        click.Choice(REPORTS),
    ),
    MachineOption(
        "cache_dir",
        "Where the checksums of model files are remembered; `somf-mergekit` in the user's cache.",
        click.Path(file_okay=False),
    ),
)


def machine_setting(name: str) -> Any:
    """Return the value of a setting from the environment, None where it is not set.

    Raises:
        RecipeError: the value is no value of the setting's type.
    """
    option = next(option for option in OPTIONS if option.name == name)
    text = os.environ.get(option.variable)
    if not text:
        return None
    try:
        return option.click_type.convert(text, None, None)
    except click.UsageError as error:
        raise RecipeError(f"environment variable {option.variable}: {error.message}") from error


def setting_problems() -> list[str]:
    """Return a sentence for each setting whose value in the environment can't be used."""
    problems: list[str] = []
    for option in OPTIONS:
        with noted(problems):
            machine_setting(option.name)
    return problems


def device_problem(device: str) -> str | None:
    """Return what keeps torch from using ``device``, in a sentence; None for nothing."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"device {device!r} can't be used: {first_line(error)}"
    return None


def autocast_type(device: str) -> Any:
    """Return the torch dtype of autocast while learning on ``device``, None for float32."""
    import torch

    chosen = machine_setting("precision")
    if chosen is None:
        if torch.device(device).type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = _cpu_is_fast_at_bfloat16()
        chosen = "bfloat16" if fast else "float32"
    return torch.bfloat16 if chosen == "bfloat16" else None


def checkpoint_seconds() -> float:
    """Return the seconds between two checkpoints."""
    chosen = machine_setting("checkpoint_minutes")
    return 60 * float(_CHECKPOINT_MINUTES if chosen is None else chosen)


def free_memory(device: str) -> int:
    """Return the bytes that can still be had on ``device``."""
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // started_here()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had, on whatever device."""
    import torch

    # On the CPU torch says so in words alone.
    in_words = "can't allocate memory" in str(error)
    return in_words or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def activation_bytes(config: Any) -> int:
    """Return about what a backward pass keeps of each token.

    Args:
        config: the model's transformers configuration.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    # About twelve vectors of the model's width and four of the feed-forward's in each layer, in
    # float32.
    return int(4 * text.num_hidden_layers * (12 * hidden + 4 * inner))


def micro_batch_pairs(batch_size: int, pair_bytes: int, room: int) -> int:
    """Return how many pairs go through the model at once.

    Args:
        batch_size: pairs of an optimiser step; the answer is not larger.
        pair_bytes: that the activations of a pair take.
        room: bytes that activations may take.
    """
    chosen = machine_setting("micro_batch_size")
    return max(1, min(batch_size, int(chosen) if chosen else room // pair_bytes))


def _cpu_is_fast_at_bfloat16() -> bool:
    import torch

    # torch tells the instructions it can use; releases without this function get float32.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
