"""Conversations to token ids: a prompt with its answers, cut to a length."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .rendering import Message as Message
from .rendering import Opening, Rendering, after_thought, asked, finished, opening

AS_GIVEN = Rendering()
# Stands in a user's text for what was cut out of it, of which so many characters must stay.
_GAP, _LEAST = " ... ", 8


@dataclass(frozen=True)
class Cut:
    """What was changed of a prompt and its answers.

    Attributes:
        whole: tokens of the prompt with the longest answer before it was cut.
        prompt: whether the prompt was cut.
        answers: how many answers were.
        system: whether the system message was put before the first user message.
        thoughts: how many answers lost the thought that they begin with.
    """

    whole: int = 0
    prompt: bool = False
    answers: int = 0
    system: bool = False
    thoughts: int = 0


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its answers; none of either where the prompt can't be cut."""

    prompt: list[int]
    answers: list[list[int]]
    cut: Cut = field(default_factory=Cut)


def user_prompt(text: str) -> list[Message]:
    """Return ``text`` as a conversation of one user message."""
    return [{"role": "user", "content": text}]


def prompt_ids(tokenizer: Any, messages: Sequence[Message], how: Rendering = AS_GIVEN) -> list[int]:
    """Return the tokens of a prompt as a model is asked, generation prompt and all.

    There is one BOS: the template's own, or, without a template, one where the tokenizer adds it.
    """
    (ids,) = _tokens(tokenizer, [asked(tokenizer, messages, how)[0]])
    return _with_bos(tokenizer, ids)


def encoded(
    tokenizer: Any,
    messages: Sequence[Message],
    answers: Sequence[str],
    max_length: int,
    how: Rendering = AS_GIVEN,
    *,
    closed: bool = True,
) -> Encoded:
    """Return the tokens of a prompt and of its answers, at most ``max_length`` together.

    Too long a conversation first loses its oldest turns, until what stands around the last user
    message takes half of ``max_length``. That message shares the rest with the longest answer: it
    is cut in its middle, down to half of the rest, and the answers lose tokens at their right. BOS,
    chat headers and the generation prompt always stay. A thought that an answer begins with is
    left out: what models are measured by comes after it.

    Args:
        tokenizer: with or without a chat template.
        messages: the prompt.
        answers: each as the reply to it.
        max_length: tokens.
        how: the chat template is rendered.
        closed: end the answers with the template's end marker, or with EOS where it has none.

    Raises:
        RecipeError: the template refuses the conversation.
    """
    whole_answers, answers = answers, [after_thought(answer) for answer in answers]
    turn = _Turn.of(tokenizer, messages, how)
    thoughts = sum(map(str.__ne__, whole_answers, answers))
    found = turn.answers(answers, closed=closed)
    longest = max(map(len, found), default=0)
    whole = len(turn.ids) + longest
    cut = Cut(whole, system=turn.opening.how.moves_system, thoughts=thoughts)
    fitting = _fitting(turn, max_length, longest) if whole > max_length else turn
    if fitting is None:
        return Encoded([], [[] for _ in answers], replace(cut, prompt=True))
    is_cut = fitting is not turn
    if is_cut:
        turn, found = fitting, fitting.answers(answers, closed=closed)
    room = max_length - len(turn.ids)
    shorter = sum(len(answer) > room for answer in found)
    cut = replace(cut, prompt=is_cut, answers=shorter)
    return Encoded(turn.ids, [answer[:room] for answer in found], cut)


def check_words(tokenizer: Any) -> None:
    """Check that a tokenizer knows words: without files, some transformers make an empty one.

    Raises:
        ValueError: all its tokens are special.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer knows no words")


@dataclass(frozen=True)
class _Turn:
    """A prompt that waits for its answers; ``own`` are its tokens without a BOS put in front."""

    tokenizer: Any
    messages: Sequence[Message]
    opening: Opening
    own: list[int]
    ids: list[int]

    @classmethod
    def of(cls, tokenizer: Any, messages: Sequence[Message], how: Rendering) -> "_Turn":
        found = opening(tokenizer, messages, how)
        (own,) = _tokens(tokenizer, [found.text])
        return cls(tokenizer, messages, found, own, _with_bos(tokenizer, own))

    def answers(self, answers: Sequence[str], *, closed: bool = True) -> list[list[int]]:
        """Return the tokens of answers, with the end marker where ``closed``."""
        texts = [self._text(answer, closed) if answer.strip() else "" for answer in answers]
        found = self._continued(texts)
        eos = self.tokenizer.eos_token_id
        if closed and eos is not None:
            for answer, text, ids in zip(answers, texts, found, strict=True):
                if text and text.endswith(answer.strip()) and ids[-1:] != [eos]:
                    # The template writes no end marker.
                    ids.append(eos)
        return found

    def _text(self, answer: str, closed: bool) -> str:
        if closed:
            whole = finished(self.tokenizer, self.messages, answer, self.opening.how)
            return whole[self.opening.skipped :]
        return answer if self.tokenizer.chat_template else f" {answer.strip()}"

    def _continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts as they go on after the prompt's, none of an empty one."""
        before, count = self.opening.text, len(self.own)
        found = _tokens(self.tokenizer, [before + text for text in texts])
        if all(ids[:count] == self.own for ids in found):
            return [ids[count:] for ids in found]
        # A token would stand across the border. A model that is asked has the prompt's tokens
        # before it, so the text goes on after them; a line's end keeps a tokenizer from putting
        # the blank in front that it gives to a beginning.
        line, *after = _tokens(self.tokenizer, ["\n", *(f"\n{text}" for text in texts)])
        for number, (text, ids) in enumerate(zip(texts, after, strict=True)):
            if found[number][:count] == self.own:
                found[number] = found[number][count:]
            elif ids[: len(line)] == line:
                found[number] = ids[len(line) :]
            else:
                (found[number],) = _tokens(self.tokenizer, [text])
        return found


def _fitting(turn: _Turn, max_length: int, longest: int) -> _Turn | None:
    """Return a prompt cut as ``encoded`` says, itself where that cuts answers alone.

    None where next to nothing would be left of the last user message.
    """

    def of(messages: list[Message], length: int) -> _Turn:
        shorter = {**messages[last], "content": _without_middle(messages[last]["content"], length)}
        changed = [*messages[:last], shorter, *messages[last + 1 :]]
        return _Turn.of(turn.tokenizer, changed, turn.opening.how)

    messages = list(turn.messages)
    while True:
        users = [number for number, m in enumerate(messages) if m["role"] == "user"]
        last = users[-1] if users else len(messages) - 1
        around = len(of(messages, 0).ids)
        if around <= max_length // 2 or len(users) < 2:
            break
        # From a question up to the next one.
        del messages[users[0] : users[1]]
    free = max_length - around
    room = around + max(free - longest, free // 2)
    whole = len(messages[last]["content"])
    if len(messages) == len(turn.messages) and len(turn.ids) <= room:
        return turn
    fits, too_long = 0, whole + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(of(messages, middle).ids) <= room:
            fits = middle
        else:
            too_long = middle
    return of(messages, fits) if fits >= min(_LEAST, max(whole, 1)) else None


def _without_middle(text: str, length: int) -> str:
    """Return the first and the last of a text's characters, ``length`` in all, a gap between."""
    if length >= len(text):
        return text
    return text[: length - length // 2] + _GAP + text[len(text) - length // 2 :]


def _with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the tokens of a rendered text with a BOS; a chat template writes its own."""
    bos = tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or ids[:1] == [bos]:
        return ids
    return [bos, *ids] if tokenizer("a")["input_ids"][:1] == [bos] else ids


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts as they stand, without a BOS; none where all have none."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] or [[] for _ in texts]
