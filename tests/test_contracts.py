"""What this package relies on in others: their versions, and what only a result would show."""

import inspect
import sys

import pytest
import tiny
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from setups import shared

from somf_mergekit.common import requirements as contracts
from somf_mergekit.fusion import fuse as fusions

SHAPE = (6, 8)


def test_another_mergekit_is_refused_in_a_sentence(monkeypatch, family_recipe, tmp_path):
    real = contracts.installed
    monkeypatch.setattr(
        contracts, "installed", lambda name: "0.2.1" if name == "mergekit" else real(name)
    )
    reported = "mergekit 0.2.1 is installed, and mergekit<0.2,>=0.1.5 is supported: pip install"
    message = tiny.refused(family_recipe(), tmp_path)
    assert message.startswith(f"The installed packages don't go with this one: {reported}")
    file = tiny.write_recipe(tmp_path / "recipe.yml", family_recipe())
    checked = tiny.invoke("mergekit-somf", "check", file)
    assert checked.exit_code == 1
    assert reported in " ".join(checked.output.split())


def test_a_checkout_that_is_not_installed_has_no_versions_of_its_own(monkeypatch):
    def gone(_name):
        raise contracts.PackageNotFoundError

    monkeypatch.setattr(contracts, "version", gone)
    monkeypatch.setattr(contracts, "requires", gone)
    monkeypatch.setattr(contracts, "installed", contracts.installed.__wrapped__)
    assert contracts.versions()["somf-mergekit"] == "(not installed)"
    contracts.check_versions()


def group(name="w", models=2, **tensors):
    draw = torch.Generator().manual_seed(1)
    made = [tensors.get(f"t{i}", torch.randn(SHAPE, generator=draw)) for i in range(models + 1)]
    entries = [TensorEntry("base", made[0], True)]
    entries += [TensorEntry(f"m{i}", t) for i, t in enumerate(made[1:])]
    return TensorGroup(tuple(entries), TensorMetadata(name=name))


def fused(fusion, given, models=2, **parameters):
    of_model = {"weight", "density", "gamma"}
    values = {
        k: {f"m{i}": v for i in range(models)} if k in of_model and not isinstance(v, dict) else v
        for k, v in parameters.items()
    }
    return fusions.fused(given, {"fusion": fusion, "seed": 0, **values})


@pytest.mark.parametrize("fusion", fusions._LINEAR_WHEN_DENSE)
def test_dense_fusions_are_linear_in_a_shared_factor(fusion):
    given, factor = group(), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) + 0.5
    values = {"weight": 0.5, "density": 1.0}
    start = fused(fusion, fusions.masked_group(given, shared(given, torch.zeros(()))), **values)
    whole = fused(fusion, given, **values) - start
    masked = fused(fusion, fusions.masked_group(given, shared(given, factor)), **values)
    assert torch.allclose(masked, start + whole * factor, atol=1e-5), (
        f"weights.py learns through {fusion} at density 1 as start + D c: a sign election is not "
        "turned by a positive factor that the models share"
    )


@pytest.mark.parametrize("fusion", ["dare_linear", "dare_ties", "della_linear"])
def test_random_fusions_draw_from_torchs_own_generator(fusion):
    given, values = group(), {"weight": 0.5, "density": 0.5}
    one, same = fused(fusion, given, **values), fused(fusion, given, **values)
    assert torch.equal(one, same), "fusions.fused seeds torch's generator for each tensor"
    other = fused(fusion, group(name="another"), **values)
    assert not torch.equal(one, other), (
        f"{fusion} draws elsewhere than from torch.default_generator: a merge and the learning of "
        "its mask would not drop the same entries"
    )


def test_ties_keeps_the_largest_entries_rounded_down():
    base, vector = torch.zeros(SHAPE), torch.arange(1.0, 49.0).view(SHAPE)
    given = group(models=1, t0=base, t1=vector)
    method = registry.get("ties")
    (found,) = method(
        (given,),
        parameters={"weight": {"m0": 1.0}, "density": {"m0": 0.2}},
        dtype=torch.float32,
    )
    assert int((found != 0).sum()) == int(0.2 * 48)
    assert float(found[found != 0].min()) == 48 - int(0.2 * 48) + 1, (
        "trimming.py stands for mergekit's trim: the int(density * n) largest entries, not rescaled"
    )


def test_the_stock_command_calls_run_merge_by_its_name():
    from mergekit.scripts import multimerge, run_yaml

    for script in (run_yaml, multimerge):
        assert hasattr(script, "run_merge"), (
            f"autoload.py gives {script.__name__} our run_merge, which checks and reports"
        )
    assert run_yaml.main.callback is not None, "cli.py calls mergekit-yaml's own function"
    assert {"config_file", "out_path"} <= {p.name for p in run_yaml.main.params}, (
        "cli.py hands on mergekit's own options"
    )
    run_merge = inspect.unwrap(sys.modules["mergekit.merge"].run_merge)
    assert list(inspect.signature(run_merge).parameters)[:4] == [
        "merge_config",
        "out_path",
        "options",
        "config_source",
    ], "planner.wrap_run_merge calls the original by place"
