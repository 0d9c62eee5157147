"""What CONTRIBUTING.md says of the package: folders, arrows between them, small files."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import somf_mergekit

ROOT = Path(somf_mergekit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 300

# What a folder may import beside itself, directly; what that may import, it may too.
MAY_IMPORT = {
    "common": [],
    "data": ["common"],
    "mask": ["common"],
    "fusion": ["mask"],
    "recipe": ["fusion"],
    "learner": ["fusion", "data", "recipe"],
    "prepass": ["learner", "recipe"],
    "evaluate": ["data", "prepass"],
    "report": ["evaluate", "prepass"],
    "repairs": ["recipe", "fusion"],
    "demo": ["recipe", "fusion", "data", "evaluate"],
    "plugin": ["report", "repairs", "demo"],
    "evaluate/sweep": ["plugin"],
}


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def folder_of(parts):
    """The folder that a module's path belongs to; None at the top."""
    if parts[:2] == ("evaluate", "sweep"):
        return "evaluate/sweep"
    return parts[0] if parts and parts[0] in MAY_IMPORT else None


def allowed(folder):
    found = {folder}
    for other in MAY_IMPORT[folder]:
        found |= allowed(other)
    return found


def imported(file, nodes=ast.walk):
    """The paths in the package of what a file imports, in functions too."""
    package = ("somf_mergekit", *file.relative_to(ROOT).parts[:-1])
    for node in nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            before = package[: len(package) - node.level + 1] if node.level else ()
            module = (*before, *(node.module or "").split("."))
            names = [(*filter(None, module), alias.name) for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "somf_mergekit")


def test_folders_import_what_they_may():
    found = set()
    for file in FILES:
        folder = folder_of(file.relative_to(ROOT).parts[:-1])
        if folder is None:
            continue
        others = {folder_of(parts) for parts in imported(file)} - {None}
        found |= {(name_of(file), other) for other in others - allowed(folder)}
    assert found == set(), "against the table: (file, imported folder)"


def test_any_module_can_be_imported_first():
    """What modules import when they are imported goes round in no circle."""
    modules = {file.relative_to(ROOT).with_suffix("").parts for file in FILES}
    modules |= {parts[:-1] for parts in modules if parts[-1] == "__init__"}
    graph = {}
    for file in FILES:
        found = list(imported(file, lambda tree: tree.body))
        # What is imported of a module is no module, most often.
        sources = {name if name in modules else name[:-1] for name in found}
        module = file.relative_to(ROOT).with_suffix("").parts
        graph[module[:-1] if module[-1] == "__init__" else module] = sources - {()}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()


def test_a_file_name_is_given_once():
    counts = Counter(file.name for file in FILES if file.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_files_are_small():
    long = {name_of(f) for f in FILES if len(f.read_text("utf-8").splitlines()) > MOST_LINES}
    assert long == set(), f"more than {MOST_LINES} lines"


def test_only_the_command_line_stands_at_the_top():
    entries = {e.name for e in ROOT.iterdir() if e.name != "__pycache__"}
    folders = {folder.split("/")[0] for folder in MAY_IMPORT}
    assert entries == {"__init__.py", "__main__.py", "cli.py", "py.typed", *folders}
