"""The format of a mask artifact: how entries are stored, and what its header may say.

A probability p is stored as code = ceil(256 p) - 1 and read as (code + 0.5) / 256: the error is at
most 1/512, and p > 0.5 holds after reading exactly where it held before. A packed mask has a bit an
entry, 1 where p > 0.5, and eight of them in a byte.

An artifact may come from a stranger, or through a bad disk: its header is checked before anything
is allocated. Checksums find accidents; whoever makes a file can make its checksums too.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from ..common.chunks import pieces
from ..common.digests import json_digest
from ..common.errors import RecipeError, first_line

# The key of the header in the metadata of the safetensors file.
HEADER_KEY = "somf"
FORMAT = "somf-mask/3"
# Those before lack what has a default in ``MaskHeader``.
_READ = (FORMAT, "somf-mask/2")
LEVELS = 256
DIGEST_KEY = "digest"
# More than any weight has.
_MOST_AXES = 8
_MOST_REPEATED = 1 << 28


class MaskHeader(BaseModel):
    """The header of an artifact.

    Attributes:
        format: FORMAT.
        provenance: where the masks are from.
        models: those that have masks of their own, see ``stored_name``; none where one mask is of
            all models.
        aliases: further names of stored tensors.
        repeats: for tensors whose entries cover several places of an axis: the axis, and how many.
        products: for tensors whose masks are products: the shapes of the factors, whose entries are
            stored one after the other.
        packed: shapes of packed masks.
        digests: checksum of each stored tensor, see ``tensor_digest``.
        digest: checksum of the header without this key, see ``json_with_digest``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: str
    provenance: dict[str, Any]
    models: list[str] = []
    aliases: dict[str, str]
    repeats: dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]] = {}
    products: dict[str, list[list[NonNegativeInt]]] = {}
    packed: dict[str, list[NonNegativeInt]] = {}
    digests: dict[str, str]
    digest: str


def stored_name(name: str, model: int | None) -> str:
    """Return the name under which the mask of a tensor is stored.

    Args:
        name: of the tensor.
        model: the number of the model whose mask it is; None where one mask is of all models.
    """
    return name if model is None else f"{model}:{name}"


def tensor_name(stored: str) -> str:
    """Return the tensor of a ``stored_name``, of masks that each model has of its own."""
    return stored.partition(":")[2]


def encoded_probability(probability: Tensor) -> Tensor:
    """Return probabilities as uint8 codes in the same shape, on the CPU."""
    return _codes(probability).to("cpu", torch.uint8)


def stored_probability(probability: Tensor) -> Tensor:
    """Return probabilities as they are read again once they have been stored, float32."""
    return _codes(probability).add_(0.5).div_(LEVELS)


def decoded_probability(codes: Tensor) -> Tensor:
    """Return uint8 codes as float32 probabilities in the same shape."""
    found = torch.empty(codes.shape)
    flat, flat_codes = found.view(-1), codes.reshape(-1)
    for part in pieces(len(flat)):
        flat[part].copy_(flat_codes[part]).add_(0.5).div_(LEVELS)
    return found


def packed_bits(probability: Tensor) -> Tensor:
    """Return whether each probability is above 0.5, a bit each, uint8 of one axis."""
    return torch.from_numpy(np.packbits((probability > 0.5).view(-1).numpy()))


def unpacked_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bits of ``packed_bits``, uint8 in ``shape``."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits).view(tuple(shape))


def _codes(probability: Tensor) -> Tensor:
    return torch.ceil(probability.float() * LEVELS).sub_(1).clamp_(0, LEVELS - 1)


def tensor_digest(stored: Tensor) -> str:
    """Return the checksum of a stored tensor: XXH3 in 128 bits over its shape and its bytes.

    It is taken of every mask that a merge reads. On a core of an AMD EPYC it took 0.03 ns an entry,
    a SHA-256 1.1, and decoding, rescaling and fusing two bfloat16 models 6.7.
    """
    digest = xxhash.xxh3_128(str(tuple(stored.shape)).encode())
    digest.update(stored.contiguous().view(-1).numpy().data)
    return str(digest.hexdigest())


def json_with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content as JSON, with a SHA-256 of itself; numbers that JSON can't write are None."""
    plain = _parsed(json.dumps(content))
    return {**plain, DIGEST_KEY: _digest_of(plain)}


def checked_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Return the content of a JSON text that ``json_with_digest`` made.

    Args:
        text: UTF-8.
        what: it is, for errors.

    Raises:
        RecipeError: it is damaged.
    """
    content = parsed_json(text, what)
    if content.get(DIGEST_KEY) != _digest_of(content):
        raise damaged(what, "its checksum differs from the one recorded in it")
    return content


def parsed_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Return the object that a JSON text has; see ``checked_json``, but for the checksum."""
    try:
        content = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise damaged(what, first_line(error)) from error
    if not isinstance(content, dict):
        raise damaged(what, "it isn't a JSON object")
    return content


def _parsed(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=lambda _constant: None)


def _digest_of(content: Mapping[str, Any]) -> str:
    return json_digest({key: value for key, value in content.items() if key != DIGEST_KEY})


def checked_header(
    text: str | None, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], path: str
) -> MaskHeader:
    """Return the header of a masks file after comparing it with the tensors in the file.

    Args:
        text: JSON; None where the file has no header of ours.
        shapes: of the stored tensors.
        types: of their entries, as safetensors names them.
        path: of the file, for errors.

    Raises:
        RecipeError: it isn't a mask of the known format, or is damaged.
    """
    text, what = text or "{}", f"mask {path}: its header"
    found = parsed_json(text, what).get("format", "none")
    if found not in _READ:
        raise RecipeError(
            f"{path} isn't a mask of format {FORMAT} (found {found!r:.40}); give the folder that "
            "`mergekit-somf learn` or a somf merge wrote"
        )
    try:
        header = MaskHeader.model_validate(checked_json(text, what))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(what, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    problem = next(_problems(header, shapes, types), None)
    if problem:
        raise damaged(what, problem)
    return header


def _problems(
    header: MaskHeader, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]
) -> Iterator[str]:
    """Yield what is wrong with the tensors in a masks file, and where the header contradicts it."""
    names = set(shapes)
    if not names:
        yield "there is no tensor in the file"
    for name in [*shapes, *header.aliases]:
        if not name.isprintable():
            yield f"the tensor's name {name!r:.80} has characters that can't be printed"
        if "/" in name or "\\" in name or ".." in name:
            yield f"the tensor's name {name!r:.80} is a path"
    if set(header.digests) != names:
        differing = sorted(set(header.digests) ^ names)
        yield f"checksums and stored tensors differ in {', '.join(differing[:3])}"
    for name, stored in shapes.items():
        is_packed = name in header.packed
        shape = tuple(header.packed.get(name, stored))
        entries = math.prod(shape)
        if types[name] != "U8":
            yield f"{name} is stored as {types[name]}, expected U8, a byte an entry"
        if len(shape) > _MOST_AXES or not entries:
            yield f"{name} has the shape {shape}, expected one entry or more on {_MOST_AXES} axes"
        if is_packed and stored != (math.ceil(entries / 8),):
            yield f"packed: {name} has {stored} bytes for the shape {shape}"
        axis, repeat = header.repeats.get(name, (0, 1))
        if name in header.repeats and axis >= len(shape):
            yield f"repeats: {name} of the shape {shape} has no axis {axis}"
        if repeat != 1 and not 0 < repeat * entries <= _MOST_REPEATED:
            yield f"repeats: {name} of the shape {shape} can't be repeated {repeat} times"
        factors = header.products.get(name)
        if factors is not None and not _is_product(factors, shape):
            yield f"products: {name} of the shape {shape} has no factors of the shapes {factors}"
        if header.models and not _is_of_model(name, len(header.models)):
            yield f"models: {name!r:.80} is of none of the {len(header.models)} models"
    for what in ("repeats", "products", "packed"):
        for name in set(getattr(header, what)) - names:
            yield f"{what}: there is no tensor {name!r:.80} in the file"
    for alias, name in header.aliases.items():
        if alias in names or name not in names:
            yield f"aliases: {alias!r:.80} isn't a further name of {name!r:.80} in the file"


def _is_product(factors: Sequence[Sequence[int]], shape: tuple[int, ...]) -> bool:
    """Return whether factors of these shapes have a product, and entries of this shape together."""
    if not factors or any(not 0 < len(factor) <= _MOST_AXES for factor in factors):
        return False
    try:
        torch.broadcast_shapes(*map(tuple, factors))
    except RuntimeError:
        return False
    return shape == (sum(map(math.prod, factors)),)


def _is_of_model(name: str, count: int) -> bool:
    number, separator, _ = name.partition(":")
    return bool(separator) and number.isdecimal() and int(number) < count


def damaged(what: str, why: str) -> RecipeError:
    """Return the error of an artifact that can't be what was written."""
    return RecipeError(
        f"{what} is damaged ({why}). Get the artifact again from where it is from, or move it away "
        "and learn the mask again."
    )
