"""mergekit's task that builds a merge's tokenizer, made repeatable."""

import math
from functools import cached_property
from typing import Any

from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from mergekit.tokenizer.build import get_stripped_tokenizer

from ..common.errors import RecipeError


class MergedTokenizer(BuildTokenizer):
    """Builds the tokenizer once, and numbers its tokens in the same way in every process.

    mergekit numbers the tokens that the base lacks in the order of a fast tokenizer's
    ``get_vocab()`` and of a set of models, both of which change. Here they are in the order of
    their numbers in the models, whichever order the recipe names these in.
    """

    @classmethod
    def of(cls, task: BuildTokenizer) -> "MergedTokenizer":
        """Return the task that builds what ``task`` builds."""
        fields = {name: getattr(task, name) for name in BuildTokenizer.model_fields}
        # Of a token that several models have added, the first one's settings count.
        return cls(**fields | {"referenced_models": sorted(task.referenced_models, key=str)})

    def execute(self, **_: Any) -> TokenizerInfo:
        """Return the tokenizer with each model's tokens: the same object at each call."""
        return self._built

    @cached_property
    def _built(self) -> TokenizerInfo:
        info = super().execute()
        return info if self.tokenizer_source != "union" else self._numbered(info)

    def _numbered(self, info: TokenizerInfo) -> TokenizerInfo:
        base = self.base_model or self.referenced_models[0]
        tokenizer = get_stripped_tokenizer(base.model, self.trust_remote_code)
        vocabulary = info.tokenizer.get_vocab()
        if tokenizer.get_vocab().keys() == vocabulary.keys():
            return info

        def place(token: str) -> tuple[float, str]:
            own = [numbers[token] for numbers in info.original_vocabs.values() if token in numbers]
            return min(own, default=math.inf), token

        # mergekit adds every token that the base's vocabulary lacks.
        added = info.tokenizer.added_tokens_decoder.values()
        for token in sorted(added, key=lambda token: place(token.content)):
            tokenizer.add_tokens(token)
        numbers = tokenizer.get_vocab()
        if numbers.keys() != vocabulary.keys():
            raise RecipeError(
                "tokenizer: the union of these models' tokens can't be numbered in the same way "
                "each time; set `tokenizer: {source: base}`, or name a model as the source whose "
                "tokenizer has all tokens"
            )
        return TokenizerInfo(
            tokenizer=tokenizer,
            permutations={
                model: {
                    number: own[vocabulary[token]]
                    for token, number in numbers.items()
                    if vocabulary[token] in own
                }
                for model, own in info.permutations.items()
            },
            original_vocabs=info.original_vocabs,
        )
