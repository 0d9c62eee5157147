"""Progress bars: ours are shown, those of the libraries beneath would only break them up."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_model_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every model that it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
