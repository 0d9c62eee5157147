"""Masks on the hub: fetched by their id, stored under one."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from ..common.errors import RecipeError, few

# A repository of an artifact, or of a merge, which has one in this folder.
_PLACES = ("", "somf/")
# Files that run code when they are loaded or called.
_UNSAFE = re.compile(
    r"\.(bin|pt|pth|ckpt|pkl|pickle|joblib|dill|npy|npz|h5|hdf5|keras|mar|py|pyc|pyd|dll|dylib|exe"
    r"|com|scr|msi|bat|cmd|ps1|sh|bash|zsh|js|jar|wasm|whl|egg)$|\.so(\.\d+)*$",
    re.IGNORECASE,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")
# How the hub's cache stores a repository; no part of an id has two dashes in a row.
_SNAPSHOT = re.compile(
    r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]somf)?$"
)
_LOG_IN = (
    "log in with a token that has access (`hf auth login`, or the environment variable HF_TOKEN)"
)


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` can be that of a repository on the hub, ORGANISATION/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def published_folder(source: str, files: Sequence[str], cache_dir: str | None = None) -> str | None:
    """Return the folder in the hub's cache with the artifact that a hub id means.

    It is fetched if it isn't there. As long as the process lives, an id means the same commit.

    Args:
        source: ``ORGANISATION/NAME``, behind which ``@REVISION`` may stand.
        files: of an artifact, that of the masks first; no others are fetched.
        cache_dir: of the hub's client, where it isn't its own.

    Returns:
        None where ``source`` isn't a hub id.

    Raises:
        RecipeError: it can't be had, or the repository isn't a mask's.
    """
    name, at, revision = source.partition("@")
    if not is_hub_id(name) or (at and not _REVISION.fullmatch(revision)):
        return None
    return _fetched(name, revision or None, tuple(files), cache_dir)


def pinned_id(path: str) -> str | None:
    """Return ``ORGANISATION/NAME@COMMIT`` of a file in the hub's cache, None of any other."""
    found = _SNAPSHOT.search(os.path.dirname(os.path.abspath(path)))
    return f"{found[1]}/{found[2]}@{found[3]}" if found else None


@cache
def _fetched(name: str, revision: str | None, files: tuple[str, ...], cache_dir: str | None) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def cached() -> str | None:
        # The masks are fetched last: where they are, all is.
        for place in _PLACES:
            path = try_to_load_from_cache(name, place + files[0], cache_dir, revision)
            if isinstance(path, str):
                return os.path.dirname(path)
        return None

    what = f"mask {name}@{revision}" if revision else f"mask {name}"
    is_commit = revision and _COMMIT.fullmatch(revision)
    folder = cached() if is_commit else None
    if folder:
        return folder
    here = f"{what} is no file or folder here; on the hub: "
    try:
        with _asking(here, revision):
            info = _info(name, revision)
    except _Unreachable:
        folder = cached()
        if folder:
            return folder
        raise
    names = [file.rfilename for file in info.siblings or []]
    place = next((place for place in _PLACES if place + files[0] in names), None)
    _check_safe(what, names)
    if place is None:
        raise RecipeError(
            f"{what}: the repository has no {files[0]}; expected one that `mergekit-somf push` made"
        )
    path = ""
    for file in reversed(files):
        if place + file in names:
            with _asking(here, revision):
                path = hf_hub_download(name, place + file, revision=revision, cache_dir=cache_dir)
            if f"@{info.sha}" not in (pinned_id(path) or ""):
                raise RecipeError(
                    f"{what}: the repository was changed meanwhile; give the same command again"
                )
    return os.path.dirname(path)


def push_problems(name: str, revision: str | None) -> list[str]:
    """Return what keeps anything from being stored under a hub id, without asking the hub."""
    from huggingface_hub import constants, get_token

    problems = []
    if not is_hub_id(name):
        problems.append(f"{name!r} can't be an id on the hub; expected ORGANISATION/NAME")
    if revision and not _REVISION.fullmatch(revision):
        problems.append(f"--revision {revision!r} can't be the name of a branch")
    if constants.HF_HUB_OFFLINE:
        problems.append("HF_HUB_OFFLINE is set: unset it to reach the hub")
    if not get_token():
        problems.append(f"there is no login for the hub: {_LOG_IN}")
    return problems


def on_hub(name: str) -> bool:
    """Return whether the hub has a model of this id.

    Raises:
        RecipeError: the hub can't be asked.
    """
    from huggingface_hub import HfApi

    with _asking(f"model {name}: "):
        return HfApi().repo_exists(name)


def push_files(
    name: str,
    files: Mapping[str, str | bytes],
    optional: str,
    *,
    private: bool,
    revision: str | None,
) -> str:
    """Store the files of an artifact on the hub, and return ``ORGANISATION/NAME@COMMIT`` of them.

    Args:
        name: of the repository, which is made if it isn't there.
        files: by name, that of the masks first: their places, or contents.
        optional: a file that goes from the repository where ``files`` has none of this name.
        private: whether a new repository is private.
        revision: the branch, made if it isn't there; the main one where None.

    Raises:
        RecipeError: they can't be stored, or the repository holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, what = HfApi(), f"{name}: "
    with suppress(_Missing):
        with _asking(what):
            info = _info(name)
        _check_pushable(name, info, next(iter(files)), private)
    with _asking(what, revision):
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = [file.rfilename for file in _info(name, revision).siblings or []]
        operations: list[Any] = [CommitOperationAdd(at, content) for at, content in files.items()]
        if optional in there and optional not in files:
            operations.append(CommitOperationDelete(optional))
        commit = api.create_commit(
            name, operations, commit_message="Upload a mask", revision=revision
        )
    return f"{name}@{commit.oid}"


def _info(name: str, revision: str | None = None) -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _check_safe(what: str, names: Sequence[str]) -> None:
    unsafe = [name for name in names if _UNSAFE.search(name)]
    if unsafe:
        raise RecipeError(
            f"{what}: the repository holds files that can run code ({few(unsafe)}), which no mask "
            "needs: nothing of it is used"
        )


def _check_pushable(name: str, info: Any, masks_file: str, private: bool) -> None:
    names = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    _check_safe(name, sorted(names))
    if names and masks_file not in names:
        raise RecipeError(
            f"{name}: the repository holds other things than a mask ({few(names)}), and its card "
            "would be overwritten: name a new one"
        )
    if private and info.private is False:
        raise RecipeError(f"{name}: --private is of new repositories, and this one is public")


class _Missing(RecipeError):
    """The repository doesn't exist, as far as the hub reports."""


class _Unreachable(RecipeError):
    """The hub can't be asked; what is in its cache may do."""


@contextmanager
def _asking(what: str, revision: str | None = None) -> Iterator[None]:
    """Say in a sentence why the hub doesn't give what is asked of it.

    What its client says is neither shown nor chained: it may quote what was sent, and so the token.

    Args:
        what: is asked for; begins the sentence.
        revision: of it.

    Raises:
        RecipeError: it doesn't.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # its client raises what its own libraries do
        raise _refusal(what, error, revision) from None


def _refusal(what: str, error: Exception, revision: str | None) -> RecipeError:
    from huggingface_hub import errors

    # A download that fails names its reason as the cause.
    reasons = (error, error.__cause__)

    def is_from(kind: type[Exception]) -> bool:
        return any(isinstance(reason, kind) for reason in reasons)

    if is_from(errors.GatedRepoError):
        return RecipeError(
            f"{what}its owner gives access on request: ask for it on its page, and {_LOG_IN}"
        )
    if is_from(errors.RevisionNotFoundError):
        return RecipeError(
            f"{what}the repository has no revision {revision}: name a branch, a tag or a commit of "
            "it, or leave it out"
        )
    if is_from(errors.RepositoryNotFoundError):
        return _Missing(
            f"{what}there is no such repository, or it is private: check the name, or {_LOG_IN}"
        )
    if is_from(errors.OfflineModeIsEnabled):
        return _Unreachable(
            f"{what}it isn't in the cache, and HF_HUB_OFFLINE forbids to ask: unset it once"
        )
    answers = (getattr(reason, "response", None) for reason in reasons)
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status in (401, 403):
        return RecipeError(f"{what}access is refused (status {status}): {_LOG_IN}")
    if status:
        return _Unreachable(f"{what}the server answered with status {status}: try again later")
    if isinstance(error, OSError) and error.strerror:
        return RecipeError(f"{what}its cache can't be written: {error.strerror}")
    return _Unreachable(
        f"{what}it can't be reached ({type(error).__name__}): check the connection, and "
        "HF_ENDPOINT where it is set"
    )
