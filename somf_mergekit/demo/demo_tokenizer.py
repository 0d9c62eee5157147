"""The demo's tokenizer: one token a word, made from the demo's own texts."""

from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<user>",
    "<assistant>",
)
PUNCTUATION = r"[^\w\s▁]"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Return a fast tokenizer that knows every word of ``texts``.

    A word with a blank before it and the same word without one are two tokens, so that text is
    decoded exactly as it was written; each punctuation mark is a token of its own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(PUNCTUATION), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        texts,
        trainers.WordLevelTrainer(
            special_tokens=[PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )
