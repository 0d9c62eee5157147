"""Messages to token ids: the model's chat template where it has one, a plain format where not."""

from collections.abc import Sequence
from typing import Any

from .errors import RecipeError

Message = dict[str, str]

PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


def user_prompt(text: str) -> list[Message]:
    """Return ``text`` as a conversation of one user message."""
    return [{"role": "user", "content": text}]


def plain_text(messages: Sequence[Message]) -> str:
    """Return the plain format, used for tokenizers without a chat template.

    ``User: <prompt>``, ``Assistant: <answer>``, blocks parted by an empty line, ending in an
    open ``Assistant:``.
    """
    blocks = [f"{PLAIN_ROLES.get(m['role'], m['role'])}: {m['content']}" for m in messages]
    return "\n\n".join([*blocks, "Assistant:"])


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens that come before an answer, with one BOS where the model expects one."""
    if tokenizer.chat_template:
        # A template writes its own special tokens: adding them again would double the BOS.
        return _tokens(tokenizer, _rendered(tokenizer, messages, open_answer=True))
    ids = _tokens(tokenizer, plain_text(messages))
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


def answer_ids(tokenizer: Any, messages: Sequence[Message], answer: str) -> list[int]:
    """Return the tokens of ``answer`` as the reply to ``messages``, its end marker included.

    An answer of white space alone has no tokens.
    """
    if not answer.strip():
        return []
    if tokenizer.chat_template:
        opening = _rendered(tokenizer, messages, open_answer=True)
        whole = _rendered(
            tokenizer, [*messages, {"role": "assistant", "content": answer}], open_answer=False
        )
        if whole.startswith(opening):
            return _tokens(tokenizer, whole[len(opening) :].rstrip())
    return _closed(tokenizer, text_ids(tokenizer, answer))


def text_ids(tokenizer: Any, answer: str) -> list[int]:
    """Return the tokens of ``answer`` as they stand after a prompt, without an end marker.

    An answer of white space alone has no tokens.
    """
    if not answer.strip():
        return []
    return _tokens(tokenizer, answer if tokenizer.chat_template else " " + answer.strip())


def encoded(
    tokenizer: Any, messages: Sequence[Message], answers: Sequence[str], max_length: int
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt and of its answers, cut as ``cut_to_length`` says."""
    return cut_to_length(
        prompt_ids(tokenizer, messages),
        [answer_ids(tokenizer, messages, answer) for answer in answers],
        max_length,
    )


def cut_to_length(
    prompt: list[int], answers: Sequence[list[int]], max_length: int
) -> tuple[list[int], list[list[int]]]:
    """Cut so that the prompt with each answer has at most ``max_length`` tokens.

    The prompt loses tokens at its left, down to half of ``max_length``; then the answers lose
    tokens at their right.
    """
    longest = max((len(answer) for answer in answers), default=0)
    room = max(max_length - longest, max_length // 2)
    if len(prompt) > room:
        prompt = prompt[len(prompt) - room :]
    return prompt, [answer[: max_length - len(prompt)] for answer in answers]


def check_words(tokenizer: Any) -> None:
    """Check that a tokenizer knows words: without files, some transformers make an empty one.

    Raises:
        ValueError: all its tokens are special.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer knows no words")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _closed(tokenizer: Any, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _rendered(tokenizer: Any, messages: Sequence[Message], *, open_answer: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=open_answer
            )
        )
    except Exception as error:
        roles = ", ".join(m["role"] for m in messages)
        told = [m["content"] for m in messages if m["content"] in str(error)]
        # A template may put into its words what it refuses, which may be harmful.
        why = type(error).__name__ if any(told) else error
        raise RecipeError(
            f"the base model's chat template refuses a conversation of the roles {roles}: {why}. "
            "Use prompts without the refused role, or a base model with another template."
        ) from error
