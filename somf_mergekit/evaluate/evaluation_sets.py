"""What models are measured on: prompts, safety pairs and skills, read before any model."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..common.digests import json_digest
from ..common.errors import RecipeError
from ..data.chat import Message
from ..data.pairs import Pair, read_answers, read_pairs, read_prompts
from ..data.recognition import LookAlikes, read_look_alikes
from ..data.rows import Examples
from ..recipe.schema import nearest
from .answer_text import extractor
from .public_sets import PUBLIC_SETS, public_prompts

HARMFUL, HARMLESS, PAIRS = "harmful", "harmless", "pairs"
RECOGNITION = "recognition"
# What may follow a source, as ``,split=test``.
SOURCE_OPTIONS = ("config", "split", "half")
# To choose settings on, and to report on.
HALVES = ("choose", "report")
_T = TypeVar("_T")
_Reading = Callable[[str, str, str | None], Examples[_T]]


@dataclass(frozen=True)
class Skill:
    """A skill: prompts with right answers.

    Attributes:
        name: of the skill.
        examples: prompts with their answers.
        extract: what of an answer is compared (see ``answer_text.extractor``); where given, models
            answer the prompts themselves.
    """

    name: str
    examples: Sequence[tuple[list[Message], str]]
    extract: str | None = None


@dataclass(frozen=True)
class EvaluationSets:
    """All that is measured on; what is left empty is not measured.

    Attributes:
        harmful, harmless: prompts, as messages.
        pairs: safety preference pairs.
        recognition: harmful prompts, each with a harmless one that looks like it.
        skills: each with a name of its own.
        sources: where each set is from and which rows were left out, in words, by its name.
    """

    harmful: Sequence[list[Message]] = ()
    harmless: Sequence[list[Message]] = ()
    pairs: Sequence[Pair] = ()
    recognition: Sequence[LookAlikes] = ()
    skills: Sequence[Skill] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def limited(self, limit: int | None) -> "EvaluationSets":
        """Return the first ``limit`` examples of each set, all for None."""
        return replace(
            self,
            harmful=self.harmful[:limit],
            harmless=self.harmless[:limit],
            pairs=self.pairs[:limit],
            recognition=self.recognition[:limit],
            skills=[replace(skill, examples=skill.examples[:limit]) for skill in self.skills],
        )

    @property
    def asked(self) -> dict[str, Sequence[list[Message]]]:
        """The prompts that models answer, by set; of recognition, two that look alike at a time."""
        sets = {HARMFUL: self.harmful, HARMLESS: self.harmless}
        sets[RECOGNITION] = [prompt for alike in self.recognition for prompt in alike]
        for skill in self.skills:
            if skill.extract:
                sets[skill.name] = [messages for messages, _ in skill.examples]
        return {name: prompts for name, prompts in sets.items() if prompts}

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each set has, without the empty ones."""
        sets: dict[str, Sequence[object]] = {HARMFUL: self.harmful, HARMLESS: self.harmless}
        sets |= {RECOGNITION: self.recognition, PAIRS: self.pairs}
        sets |= {skill.name: skill.examples for skill in self.skills}
        return {name: len(examples) for name, examples in sets.items() if examples}

    @property
    def digest(self) -> str:
        """A digest of all examples."""
        return json_digest(
            [
                list(self.harmful),
                list(self.harmless),
                list(self.recognition),
                [[pair.prompt, pair.chosen, pair.rejected] for pair in self.pairs],
                [[skill.name, list(skill.examples)] for skill in self.skills],
            ]
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to measure on."""
        return not (self.sizes or self.skills)

    def problems(self) -> list[str]:
        """Return what is wrong with the sets, a sentence each."""
        found = []
        names = [skill.name for skill in self.skills]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                found.append(f"skill {name}: two skills have this name")
            if name in (HARMFUL, HARMLESS, RECOGNITION, PAIRS) or not name.strip():
                found.append(f"skill {name!r}: this name is taken; choose another")
        for skill in self.skills:
            found += _extract_problems(skill)
        return found


def read_sets(
    harmful: str | None = None,
    harmless: str | None = None,
    pairs: str | None = None,
    skills: Sequence[tuple[str, str]] = (),
    extract: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    recognition: str | None = None,
) -> tuple[EvaluationSets, list[str]]:
    """Return the sets of the named sources, and why some can't be read, a sentence each.

    Args:
        harmful: a hub id, a file or a folder, as all sources, or the name of a public set;
            ``,split=...`` and ``,half=...`` may follow it, and ``,config=...`` a hub id or a
            folder.
        harmless: likewise.
        pairs: likewise.
        skills: names with sources.
        extract: the extractor of each skill that has one.
        where: what stands before the sentences about a set, by its name.
        recognition: a source with prompts that look alike.
    """
    problems: list[str] = []
    sources: dict[str, str] = {}

    def read(name: str, source: str | None, reading: _Reading[_T]) -> list[_T]:
        if source is None:
            return []
        try:
            place, half = _source(source)
            found = reading(*place)
            examples = _half(found, half, source) if half else list(found)
        except RecipeError as error:
            problems.append((where or {}).get(name, "") + error.message)
            return []
        notes = found.notes("set")
        if name == HARMFUL and _is_public(place[0]):
            notes.insert(0, PUBLIC_SETS[place[0]].package.text)
        sources[name] = f"{source} ({'; '.join(notes)})" if notes else source
        return examples

    given = dict(extract or {})
    known = [name for name, _ in skills]
    for name in given:
        if name not in known:
            named = f"the skills are {', '.join(known)}" if known else "no skill is given"
            problems.append(f"extractor for {name}: there is no such skill; {named}")
    sets = EvaluationSets(
        harmful=read(HARMFUL, harmful, _read_harmful),
        harmless=read(HARMLESS, harmless, read_prompts),
        pairs=read(PAIRS, pairs, read_pairs),
        recognition=read(RECOGNITION, recognition, read_look_alikes),
        skills=[
            Skill(name, read(name, source, read_answers), given.get(name))
            for name, source in skills
        ],
        sources=sources,
    )
    return sets, problems


def _source(source: str) -> tuple[tuple[str, str, str | None], str | None]:
    """Return what a source such as ``a/b,split=test,half=report`` names: what to read, and a half.

    What to read is a dataset, its split and its configuration.

    Raises:
        RecipeError: what stands after a comma is none of these, or the half is unknown.
    """
    if os.path.exists(os.path.expanduser(source)):
        return (source, "train", None), None
    name, *options = source.split(",")
    given = dict(option.partition("=")[::2] for option in options)
    unknown = [option for option in given if option not in SOURCE_OPTIONS]
    if unknown:
        raise RecipeError(
            f"dataset {source}: {', '.join(unknown)} unknown; after a comma may stand config=NAME, "
            "split=NAME or half=NAME"
        )
    half = given.get("half")
    if half not in (None, *HALVES):
        raise RecipeError(f"dataset {source}: half is {half!r}, expected {' or '.join(HALVES)}")
    return (name, given.get("split", "train"), given.get("config")), half


def _is_public(name: str) -> bool:
    """Return whether ``name`` is that of a public set; a file or folder of this name wins."""
    return name in PUBLIC_SETS and not os.path.exists(name)


def _read_harmful(source: str, split: str, config: str | None) -> Examples[list[Message]]:
    """Return the prompts of a public set or of another source, see ``read_prompts``."""
    if _is_public(source):
        if split != "train" or config:
            raise RecipeError(f"public set {source}: it has no config and no split")
        return public_prompts(source)
    try:
        return read_prompts(source, split, config)
    except RecipeError as error:
        hint = "" if os.path.exists(source) else nearest(source, PUBLIC_SETS)
        raise RecipeError(error.message + hint) from error


def _half(examples: Sequence[_T], half: str, source: str) -> list[_T]:
    """Return the examples whose prompts fall into ``half``.

    The words of a prompt alone decide, so that a prompt is in the same half of every set.

    Raises:
        RecipeError: there are none.
    """
    found = [example for example in examples if _half_of(_messages(example)) == half]
    if not found:
        raise RecipeError(
            f"dataset {source}: all {len(examples)} examples fall into the other half; use more "
            "prompts, or the whole set"
        )
    return found


def _half_of(messages: Sequence[Message]) -> str:
    words = [re.findall(r"\w+", message["content"].lower()) for message in messages]
    return HALVES[int(json_digest(words), 16) % 2]


def _messages(example: Any) -> list[Message]:
    """Return the prompt of an example of any set."""
    if isinstance(example, Pair):
        return example.messages
    messages: list[Message] = example[0] if isinstance(example, tuple) else example
    return messages


def _extract_problems(skill: Skill) -> list[str]:
    if not skill.extract:
        return []
    try:
        extracted = extractor(skill.extract)
    except RecipeError as error:
        return [f"skill {skill.name}: {error.message}"]
    if skill.examples and not any(extracted(answer) for _, answer in skill.examples):
        return [
            f"skill {skill.name}: {skill.extract} finds nothing in any of the "
            f"{len(skill.examples)} right answers"
        ]
    return []
