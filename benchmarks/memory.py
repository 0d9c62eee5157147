"""How much memory a process takes while it does something."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Watch this process' anonymous memory, in bytes: pages of mapped files do not count.

    Raises:
        click.ClickException: the system does not report it.
    """
    found, stop = {"peak": _anonymous_bytes()}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            found["peak"] = max(found["peak"], _anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found["peak"] = max(found["peak"], _anonymous_bytes())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise click.ClickException("this system does not report RssAnon in /proc/self/status")
