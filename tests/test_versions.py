"""The lowest versions that are claimed are those that the tests are run with."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    return {match[1].lower(): match[2] for match in found if match}


def dependencies():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    return dict(re.findall(r'"([\w-]+)>=([\w.]+)', block))


def numbers(version):
    """A version without zeros at its end."""
    found = [int(part) for part in version.split(".")]
    while found and found[-1] == 0:
        found.pop()
    return found


def test_every_dependency_has_a_floor():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    assert len(dependencies()) == block.count('",')


@pytest.mark.parametrize("package", sorted(dependencies()))
def test_the_floor_is_what_was_run(package):
    assert numbers(pins("constraints-lowest.txt")[package]) == numbers(dependencies()[package])
    assert numbers(pins("constraints.txt")[package]) >= numbers(dependencies()[package])


def test_the_page_names_the_versions_that_were_run():
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    for package in dependencies():
        lowest, highest = (pins(f"constraints{end}.txt")[package] for end in ("-lowest", ""))
        assert f"| {package} | {lowest} | {highest} |" in page
