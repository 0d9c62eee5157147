"""The most memory that this process has had, where the operating system tells."""

import sys
from pathlib import Path


def peak_memory(device: str | None) -> dict[str, int]:
    """Return the peaks since the process began, bytes: ``process``, and ``device`` on a GPU.

    That of the process counts the pages of files that it has mapped. Empty where nothing is told.
    """
    found = {}
    process = _peak_of_process()
    if process:
        found["process"] = process
    if device and device.startswith("cuda"):
        import torch

        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def _peak_of_process() -> int | None:
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage tells on Linux may be the peak of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
