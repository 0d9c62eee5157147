"""Feed the readers of what strangers give with what a coverage-guided fuzzer thinks up.

Needs atheris (`pip install atheris`), which is no dependency of the project.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from .circumstances import circumstances

RESULT = "reliability.md"
ROOT = Path(__file__).parent
# What a file of a few kB may make a reader take, and how long it may make it work.
_LIMITS = ("-rss_limit_mb=4096", "-timeout=20", "-max_len=4096")
_NAMES = ("a", "b")


@click.command()
@click.option("--seconds", default=600, show_default=True, help="For each target.")
@click.option("--target", "targets", multiple=True, type=click.Choice(["artifact", "recipe"]))
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "work")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results")
@click.option("--child", hidden=True)
def main(seconds: int, targets: tuple[str, ...], work: Path, out: Path, child: str | None) -> None:
    """Run a fuzzer over the artifact reader and the recipe reader, and write what it found."""
    if child:
        _fuzz_here(child, work, seconds)
        return
    rows = [
        _in_a_process(target, work / f"fuzz-{target}", seconds)
        for target in targets or ("artifact", "recipe")
    ]
    out.mkdir(parents=True, exist_ok=True)
    text = _report(rows, out)
    (out / RESULT).write_text(text)
    click.echo(text)


def _in_a_process(target: str, work: Path, seconds: int) -> dict[str, Any]:
    (work / "corpus").mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(_seeds(target)):
        (work / "corpus" / f"seed-{number}").write_bytes(seed)
    findings = work / "findings.jsonl"
    findings.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz", "--child", target]
    command += ["--work", str(work), "--seconds", str(seconds)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lasted = time.monotonic() - started
    (work / "log.txt").write_text(done.stderr)
    executed = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"\bcov: (\d+)", done.stderr)
    found = findings.read_text().splitlines() if findings.exists() else []
    if done.returncode:
        found.append(json.dumps({"what": done.stderr[-500:]}))
    return {
        "target": target,
        "executions": int(executed[1]) if executed else 0,
        "covered": int(covered[-1]) if covered else 0,
        "seconds": lasted,
        "findings": [json.loads(line)["what"] for line in found],
    }


def _fuzz_here(target: str, work: Path, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["somf_mergekit", "yaml", "json"]):
        run = _artifact_target(work) if target == "artifact" else _recipe_target()
    seen: set[str] = set()

    def once(data: bytes) -> None:
        try:
            run(data)
        except Exception as error:
            # Noted, not raised: the fuzzer would end with the first one.
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} in {Path(place.filename).name}: {place.name}"
            if what not in seen:
                seen.add(what)
                with (work / "findings.jsonl").open("a") as file:
                    file.write(json.dumps({"what": what, "input": data.hex()}) + "\n")

    limits = [f"-max_total_time={seconds}", "-print_final_stats=1", *_LIMITS]
    atheris.Setup([sys.argv[0], *limits, str(work / "corpus")], once)
    atheris.Fuzz()


def _artifact_target(work: Path) -> Callable[[bytes], None]:
    """Return what reads an artifact: from damaged bytes, or with a header that has a checksum."""
    import torch
    from safetensors.torch import save_file

    from somf_mergekit import MaskSet, RecipeError
    from somf_mergekit.mask.format import json_object, json_with_digest

    folder = Path(tempfile.mkdtemp(dir=work))
    masks = _sample_artifact(folder / "sample")
    intact = Path(masks.path).read_bytes()
    values = {name: masks.probabilities(name) for name in _NAMES}

    def read(place: Path) -> dict[str, Any]:
        found = MaskSet.open(place)
        return {name: (found.layout(name), found.probabilities(name)) for name in found.names()}

    def run(data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        place = folder / "tried.safetensors"
        try:
            if kind < b"\x40":
                place.write_bytes(rest)
                read(place)
            elif kind < b"\x80":
                # Each three bytes are a place and what is written there.
                damaged = bytearray(intact)
                for start in range(0, len(rest) - 2, 3):
                    at = int.from_bytes(rest[start : start + 2], "little") % len(damaged)
                    damaged[at] ^= rest[start + 2]
                place.write_bytes(damaged)
                for name, (_, found) in read(place).items():
                    if not torch.equal(found, values[name]):
                        raise AssertionError(f"another mask for {name}, without a word")
            elif kind < b"\xc0":
                content = json_object(rest, "header")
                tensors = {name: torch.zeros(2, 3, dtype=torch.uint8) for name in _NAMES}
                text = json.dumps(json_with_digest(content))
                save_file(tensors, place, metadata={"somf": text})
                read(place)
            else:
                beside = folder / "beside"
                beside.mkdir(exist_ok=True)
                (beside / "masks.safetensors").write_bytes(intact)
                (beside / "somf.json").write_bytes(rest)
                read(beside)
        except RecipeError:
            pass

    return run


def _sample_artifact(folder: Path) -> Any:
    import torch

    from somf_mergekit.mask.writing import write_masks

    draw = torch.Generator().manual_seed(0)
    return write_masks(
        folder,
        {name: torch.rand(2, 3, generator=draw) for name in _NAMES},
        aliases={},
        provenance={"seed": 1},
        history=[],
    )


def _recipe_target() -> Callable[[bytes], None]:
    """Return what reads a recipe and says what is wrong with it; no model is looked for."""
    from somf_mergekit import RecipeError
    from somf_mergekit.recipe import settings as recipe
    from somf_mergekit.recipe.validate import OWN_METHODS, read_recipe

    def run(data: bytes) -> None:
        # A line alone would be taken for the name of a file.
        text = data.decode("utf-8", "replace") + "\n"
        try:
            config = read_recipe(text, OWN_METHODS)
            if OWN_METHODS[config.merge_method](config):
                return
            if config.merge_method == recipe.METHOD_NAME:
                recipe.join_patterns(config)
                recipe.apply_preset(config)
                recipe.recipe_settings(config)
        except RecipeError:
            pass

    return run


def _seeds(target: str) -> Iterator[bytes]:
    if target == "recipe":
        for file in sorted((ROOT.parent / "examples" / "yaml").glob("*.yml")):
            yield file.read_bytes()
        return
    with tempfile.TemporaryDirectory() as folder:
        masks = _sample_artifact(Path(folder) / "sample")
        yield b"\x00" + Path(masks.path).read_bytes()
        yield b"\x40" + bytes(range(30))
        header = masks.header.model_dump() | {"repeats": {"b": [0, 4]}}
        yield b"\x80" + json.dumps(header).encode()
        yield b"\xc0" + (Path(folder) / "sample" / "somf.json").read_bytes()


def _report(rows: list[dict[str, Any]], results: Path) -> str:
    """Return what was found as a page, with what `benchmarks.kills` has recorded in ``results``."""
    machine = circumstances()
    packages = {**machine["packages"], "atheris": _version("atheris")}
    lines = [
        "# Reliability",
        "",
        "## Readers of what strangers give, under a fuzzer",
        "",
        "`python -m benchmarks.fuzz`: atheris, guided by coverage, one process a target.",
        "A finding is anything but a right reading or this package's one-line error: another",
        "exception, a damaged mask that is read as another one, over 4 GiB, or over 20 s.",
        "",
        "| target | executions | seconds | executions a second | covered edges | findings |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["executions"] / row["seconds"]
        lines.append(
            f"| {row['target']} reader | {row['executions']:,} | {row['seconds']:.0f} | {rate:.0f} "
            f"| {row['covered']} | {len(row['findings'])} |"
        )
    findings = [f"- {row['target']}: {what}" for row in rows for what in row["findings"]]
    if findings:
        lines += ["", "Found, each a test since:", "", *findings]
    told = ", ".join(f"{name} {number}" for name, number in packages.items())
    lines += [
        "",
        f"Python {machine['python']}, {told}; {machine['system']}, {machine['processor']}, "
        f"{machine['cores']} cores, niceness {os.nice(0)}.",
        *_kills(results),
    ]
    return "\n".join(lines) + "\n"


def _kills(results: Path) -> list[str]:
    records = [json.loads(file.read_text()) for file in sorted(results.glob("kills-*.json"))]
    if not records:
        return []
    return [
        "",
        "## Learning that is killed",
        "",
        "`python -m benchmarks.kills`: SIGKILL at moments that a seed draws, the same command",
        "again each time, until learning ends. The mask, and what is told with it, is compared",
        "byte for byte with that of a run that was never stopped.",
        "",
        "| engine | steps | kills | while a checkpoint was written | the same at the end |",
        "|---|---|---|---|---|",
        *(
            f"| {record['engine']} | {record['steps']} | {record['kills']} "
            f"| {record['kills while writing']} | yes |"
            for record in records
        ),
    ]


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    main()
