"""``python -m somf_mergekit``: the command ``mergekit-somf``, as torchrun starts it."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="mergekit-somf")
