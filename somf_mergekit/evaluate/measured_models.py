"""The models of an evaluation: found, identified by their content, loaded one at a time."""

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.digests import file_digests, json_digest
from ..common.errors import RecipeError, first_line
from ..common.model_classes import auto_class
from ..data.chat import check_words
from .evaluation_settings import EvaluationSettings, NamedModel

# As transformers has them.
ModelAndTokenizer = tuple[Any, Any]
# What of a model's folder decides its answers.
_WEIGHTS = "*.safetensors"
_CONTENT = (
    _WEIGHTS,
    "config.json",
    "generation_config.json",
    "*token*.json",
    "*.model",
    "chat_template*",
    "vocab*",
    "merges.txt",
)
_CODE = "*.py"


@dataclass(frozen=True)
class Subject:
    """A model that was found.

    Attributes:
        name: its label.
        source: as the user named it.
        folder: where it is on this machine.
        classifies: whether it gives labels and no answers, as only a judge may.
    """

    name: str
    source: str
    folder: Path
    classifies: bool = False


def named_model(text: str) -> NamedModel:
    """Return the model that ``text`` names: a folder or hub id, or ``NAME=`` before one."""
    label, equals, source = text.partition("=")
    if equals and label.strip() and os.sep not in label and not os.path.exists(text):
        return NamedModel(label.strip(), source)
    return NamedModel(os.path.basename(os.path.abspath(text)) if _is_path(text) else text, text)


def found_model(
    model: NamedModel, settings: EvaluationSettings, may_classify: bool = False
) -> Subject:
    """Return the model with its folder, which is fetched from the hub where it must be.

    Args:
        model: as the user names it.
        settings: of the evaluation.
        may_classify: whether a text classifier will do.

    Raises:
        RecipeError: there is no such model, or it can't be loaded; no weights are read.
    """
    from transformers import AutoConfig

    folder = _folder(model.source)
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "an adapter: merge it into its base first" if adapter else "no config.json in it"
        raise RecipeError(f"model {model.source}: {what}")
    if not any(folder.glob(_WEIGHTS)):
        raise RecipeError(f"model {model.source}: no {_WEIGHTS} in it; other formats are not read")
    options = {"trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        check_words(loaded_tokenizer(folder, settings))
    except Exception as error:
        raise RecipeError(f"model {model.source} can't be loaded: {first_line(error)}") from error
    made_for = " ".join(config.architectures or [])
    classifies = "ForSequenceClassification" in made_for
    if classifies and not may_classify:
        raise RecipeError(f"model {model.source} is a {made_for}, which gives no answers")
    return Subject(model.name, model.source, folder, classifies)


def content_digest(folder: Path, patterns: Iterable[str] = _CONTENT) -> str:
    """Return a SHA-256 over the names and contents of a folder's files, read where they are new.

    Args:
        folder: of a model.
        patterns: of the files that count, each counted once.
    """
    files = sorted({str(file) for pattern in patterns for file in folder.glob(pattern)})
    names = [os.path.relpath(file, folder) for file in files]
    return json_digest([names, file_digests(files)])


def model_digest(subject: Subject, settings: EvaluationSettings) -> str:
    """Return a SHA-256 over all of a model's files that decide its answers, its code if it runs."""
    code = [_CODE] if settings.trust_remote_code else []
    return content_digest(subject.folder, [*_CONTENT, *code])


class ModelsInMemory:
    """Loads models and holds no more than were last asked for."""

    def __init__(self, settings: EvaluationSettings):
        self._settings = settings
        self._held: dict[Path, ModelAndTokenizer] = {}

    def take(self, *subjects: Subject) -> list[ModelAndTokenizer]:
        """Return each subject's model and tokenizer, after letting go of all others.

        Raises:
            RecipeError: the weights can't be loaded.
        """
        wanted = [subject.folder for subject in subjects]
        if set(self._held) - set(wanted):
            self._held = {folder: held for folder, held in self._held.items() if folder in wanted}
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for subject in subjects:
            if subject.folder not in self._held:
                self._held[subject.folder] = self._loaded(subject)
        return [self._held[folder] for folder in wanted]

    def _loaded(self, subject: Subject) -> ModelAndTokenizer:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        settings = self._settings
        remote = {"trust_remote_code": settings.trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(subject.folder, **remote)
            kind = AutoModelForSequenceClassification if subject.classifies else auto_class(config)
            model = kind.from_pretrained(
                subject.folder, dtype=settings.dtype, use_safetensors=True, **remote
            )
        except Exception as error:
            reason = first_line(error)
            raise RecipeError(f"model {subject.source} can't be loaded: {reason}") from error
        tokenizer = loaded_tokenizer(subject.folder, settings)
        return model.to(settings.place).eval(), tokenizer


def loaded_tokenizer(folder: Path, settings: EvaluationSettings) -> Any:
    """Return the tokenizer in a model's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if _is_path(source):
        raise RecipeError(f"model {source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[*_CONTENT, "*.json", _CODE]))
    except Exception as error:
        raise RecipeError(
            f"model {source}: no such folder, and it can't be had from the hub: {first_line(error)}"
        ) from error


def _is_path(source: str) -> bool:
    return (
        os.path.exists(os.path.expanduser(source)) or source[:1] in "./~" or source.count("/") > 1
    )
