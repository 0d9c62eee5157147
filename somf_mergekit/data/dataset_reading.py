"""Read the rows of a dataset: from the hub, a file or a folder."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from ..common.errors import RecipeError, first_line
from .rows import Rows, json_row, json_table, typed_rows

FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# Endings of files that datasets unpacks; a Parquet file is compressed inside.
_PACKED = (".gz", ".bz2", ".xz", ".zst")
# What datasets' save_to_disk writes beside one split, and beside several.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def dataset_rows(
    source: str,
    split: str = "train",
    config: str | None = None,
    wanted: Set[str] | None = None,
) -> Rows:
    """Return the rows of a hub dataset, a file (.jsonl, .json, .csv, .parquet) or a folder.

    Text files may be compressed (.jsonl.gz, and .bz2, .xz, .zst likewise).

    Args:
        source: a hub id, a file or a folder, as ``datasets`` or its ``save_to_disk`` wrote it.
        split: its name, or a part of it such as ``train[:10]``. A file is the split ``train``.
        config: name of a configuration (subset) of a hub dataset or a folder.
        wanted: names of the columns that are needed, all where it isn't given. What is wrong in
            others stops no reading.

    Raises:
        RecipeError: there is no such file, folder, split or hub dataset, or it can't be read.
    """
    path = os.path.expanduser(source)
    extension = _extension(path)
    saved = any(os.path.isfile(os.path.join(path, name)) for name in (_STATE, _SPLITS))
    if config and (saved or os.path.isfile(path)):
        raise RecipeError(f"dataset {source} has no configurations; leave {config} out")
    try:
        if os.path.isfile(path) and extension not in FILE_FORMATS:
            raise RecipeError(
                f"dataset file {source}: unknown kind {extension or '(no extension)'}; "
                f"known are {', '.join(FILE_FORMATS)}"
            )
        if os.path.isfile(path):
            # Else a name with brackets would be a pattern, and other files be read.
            kind, name = FILE_FORMATS[extension], glob.escape(path)
            return _built(source, kind, split, wanted, path, data_files=name)
        if saved:
            return _saved(source, split, wanted, path)
        if os.path.isdir(path):
            if glob.escape(os.path.abspath(path)) != os.path.abspath(path):
                raise RecipeError(
                    f"dataset folder {source}: one of *, ? and [ is in its name, which would be "
                    "taken for a pattern; name the folder otherwise"
                )
            return _built(source, path, split, wanted, path, name=config)
        if extension in FILE_FORMATS or source[:1] in "./~" or source.count("/") > 1:
            raise RecipeError(f"dataset {source}: no such file or folder")
        return _built(source, source, split, wanted, name=config)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"dataset {source} (split {split}) can't be read: {first_line(error)} "
            f"({_kind(error)}). Expected a hub id, a folder, or a file of "
            f"{', '.join(FILE_FORMATS)}."
        ) from error


def _extension(path: str) -> str:
    """Return the ending of a file's name, without that of its compression."""
    name, ending = os.path.splitext(path.lower())
    inner = os.path.splitext(name)[1]
    return inner if ending in _PACKED and inner in (".jsonl", ".json", ".csv") else ending


def _built(
    source: str,
    dataset: str,
    split: str,
    wanted: Set[str] | None,
    place: str | None = None,
    **given: Any,
) -> Rows:
    """Return the rows of a hub dataset, or of a file or a folder, whose README.md names its files.

    Args:
        source, split, wanted: see ``dataset_rows``.
        dataset: name of a hub dataset, a folder or a kind of file, for ``datasets``.
        place: of a file or a folder, None for a hub dataset.
        given: to ``datasets.load_dataset_builder`` with the name.

    Raises:
        RecipeError: it names files of this machine that are not its own; there is no such split; or
            a column can't be read.
    """
    import datasets
    from datasets.packaged_modules.json.json import Json
    from fsspec.compression import available_compressions

    # Before datasets 4, it would ask on the terminal whether to run code that comes with a
    # dataset, and raise an error from a timer later on where there is none to ask.
    asks = hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE")
    given |= {"trust_remote_code": False} if asks else {}
    # What datasets.load_dataset does, with a look in between.
    builder = datasets.load_dataset_builder(dataset, **given)
    parts = (builder.config.data_files or {}).items()
    files = {str(name): [str(file) for file in found] for name, found in parts}
    every = [file for found in files.values() for file in found]
    if place is None:
        here = [file for file in every if "://" not in file]
        _check_inside(source, str(datasets.config.HF_CACHE_HOME), here)
    elif os.path.isdir(place):
        _check_inside(source, place, every)

    if any(file.endswith(".zst") for file in every) and "zstd" not in available_compressions():
        raise RecipeError(
            f"dataset {source}: its files are compressed with Zstandard, and the package that "
            "unpacks them isn't installed: pip install zstandard"
        )

    def read(names: Sequence[str] = (), columns: Set[str] | None = wanted) -> Rows:
        narrow = _options(builder, names, columns)
        built = datasets.load_dataset_builder(dataset, **given, **narrow) if narrow else builder
        built.download_and_prepare()
        splits = built.as_dataset()
        return typed_rows(_part(splits, splits.__getitem__, split, source), wanted, names)

    is_json = isinstance(builder, Json) and builder.config.field is None
    if place is None:
        # As datasets does it: what it has cached of a hub dataset is found again without network.
        try:
            return read()
        except datasets.exceptions.DatasetGenerationError:
            if not is_json and not _file_columns(builder, every):
                raise
    if is_json:
        keys: dict[str, None] = {}

        def lines(name: str) -> Any:
            return json_table(files[name], name, source, keys)

        table = _part(files, lines, split, source)
        return Rows(table, list(keys), read=lambda line: json_row(line, keys))
    names = _file_columns(builder, every)
    if names and wanted is not None and not wanted & set(names):
        return Rows([], names)
    try:
        return read(names)
    except datasets.exceptions.DatasetGenerationError as error:
        for name in _options(builder, names, wanted).get("columns", ()):
            try:
                read(names, {name})
            except datasets.exceptions.DatasetGenerationError as why:
                raise RecipeError(
                    f"dataset {source}: column {name} can't be read ({_kind(why)}): it is missing "
                    "from a file, or its values are of several types"
                ) from error
        headers = [_file_columns(builder, [file]) for file in every]
        differing = {name for one in headers for name in one if any(name not in h for h in headers)}
        if differing:
            raise RecipeError(
                f"dataset {source}: {', '.join(sorted(differing))} isn't a column of each of its "
                "files; give all files the same columns"
            ) from error
        raise


def _options(builder: Any, names: Sequence[str], wanted: Set[str] | None) -> dict[str, Any]:
    """Return what a builder is given to read the columns ``names`` of CSV or Parquet files."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not names:
        return {}
    if isinstance(builder, Parquet):
        return {"columns": [name for name in names if wanted is None or name in wanted]}
    # All is text in a CSV: an answer 007 isn't a number, and one may be NA. No column is left out:
    # a line with more fields than the header would be read without an error.
    text = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": text, "keep_default_na": False}


def _file_columns(builder: Any, files: Sequence[str]) -> list[str]:
    """Return the columns of the first CSV or Parquet file; none for other kinds of files."""
    import fsspec
    import pandas
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.parquet.parquet import Parquet
    from pyarrow import parquet

    if not files or not isinstance(builder, (Csv, Parquet)):
        return []
    with fsspec.open(files[0], "rb", compression="infer") as file:
        if isinstance(builder, Parquet):
            return list(parquet.read_schema(file).names)
        options = builder.config.pd_read_csv_kwargs | {"nrows": 0, "chunksize": None}
        return [str(name) for name in pandas.read_csv(file, **options).columns]


def _saved(source: str, split: str, wanted: Set[str] | None, folder: str) -> Rows:
    """Return the rows of a dataset, or of one of several, that ``save_to_disk`` wrote."""
    import datasets

    folders = [folder]
    if not os.path.isfile(os.path.join(folder, _STATE)):
        names = _json(os.path.join(folder, _SPLITS))["splits"]
        folders = [os.path.join(folder, name) for name in names]
    for one in folders:
        state = os.path.join(one, _STATE)
        _check_inside(source, folder, [state])
        files = [os.path.join(one, part["filename"]) for part in _json(state)["_data_files"]]
        _check_inside(source, folder, files)
    loaded = datasets.load_from_disk(folder)
    if isinstance(loaded, datasets.Dataset):
        # It may remember the split that it was; it is all there is.
        loaded = {"train": loaded, str(loaded.split or "train"): loaded}
    return typed_rows(_part(loaded, loaded.__getitem__, split, source), wanted)


def _json(file: str) -> Any:
    with open(file, encoding="utf-8") as opened:
        return json.load(opened)


def _check_inside(source: str, folder: str, files: Sequence[str]) -> None:
    """Raise a RecipeError unless the files that a dataset names as its data lie in its folder."""
    # datasets names files where the folder really is, when its name is a link.
    places = [os.path.join(place(folder), "") for place in (os.path.abspath, os.path.realpath)]
    for file in files:
        if not os.path.abspath(file).startswith(tuple(places)):
            raise RecipeError(
                f"dataset {source}: it names {file} as its data, which is not in it; take that out "
                "of its README.md or state.json, or name the file itself"
            )


def _part(known: Iterable[str], table: Callable[[str], Any], split: str, source: str) -> Any:
    """Return the part of a dataset that ``split`` names, such as ``train[:10]+test``.

    Args:
        known: names of the splits.
        table: gives the rows of the split of a name.
        split: names of splits with a slice each, added up.
        source: of the dataset, for messages.

    Raises:
        RecipeError: there is no such split, or no such part of it.
    """
    import datasets

    # Splits that aren't asked for aren't read.
    asked = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    names = [str(name) for name in known]
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise RecipeError(
            f"dataset {source} has no split {', '.join(unknown)}; it has {', '.join(names)}"
        )
    tables = {name: table(name) for name in asked}
    lengths = {name: len(found) for name, found in tables.items()}
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"dataset {source}: no split {split}: {first_line(error)}") from error
    return datasets.concatenate_datasets(
        [tables[one.splitname].select(range(one.from_, one.to)) for one in slices]
    )


def _kind(error: BaseException) -> str:
    """Return the kind of what led to an error; its words may have text of the data in them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
