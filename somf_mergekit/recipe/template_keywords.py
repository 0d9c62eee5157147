"""The variables that a recipe hands to the chat template."""

from typing import Annotated

import yaml
from pydantic import AfterValidator, WithJsonSchema

# What a rendering gives to every chat template itself.
_GIVEN_TO_TEMPLATES = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "strftime_now"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "return_dict"),
    }
)


def _keyword_text(text: str) -> str:
    """Return a mapping of a chat template's variables as it was given, in YAML.

    Raises:
        ValueError: it is none.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError("not YAML") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError("not a mapping of names")
    if not _GIVEN_TO_TEMPLATES.isdisjoint(content):
        raise ValueError("a name that is taken")
    return text


KeywordText = Annotated[
    str, AfterValidator(_keyword_text), WithJsonSchema({"const": '"{enable_thinking: false}"'})
]
