"""Our methods are known without an import line, and nothing of ours can break `import torch`."""

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import forked
import pytest
import tiny

import somf_mergekit

ROOT = Path(somf_mergekit.__file__).parent
PROBE = "import torch; print('torch', torch.tensor(2) + 1)"
KNOWN = """
import mergekit.merge, mergekit.merge_methods as m, mergekit.plan as p
print(m.get('somf').spec.pretty_name, m.get('nlsr').spec.pretty_name)
wrapped = [p.MergePlanner._plan, mergekit.merge.run_merge]
print(*(hasattr(function, '__wrapped__') for function in wrapped))
"""


def assert_known(result):
    # A warning of ours is as wrong as an error.
    assert (result.stdout, result.stderr) == ("SOMF NLSR\nTrue True\n", "")


@pytest.fixture
def site(tmp_path):
    """A copy of our installed files that comes first on the path, to be broken."""
    shutil.copytree(ROOT, tmp_path / "somf_mergekit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "plugin/torch_entry_point.py", tmp_path / "_somf_mergekit_autoload.py")
    installed = importlib.metadata.distribution("somf-mergekit")
    info = tmp_path / f"somf_mergekit-{installed.version}.dist-info"
    info.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (info / name).write_text(installed.read_text(name))
    return tmp_path


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    with forked.python_with_torch(tmp_path_factory.mktemp("output")) as run:
        yield run


def test_the_entry_point_is_the_module_outside_the_package():
    (entry,) = [
        e
        for e in importlib.metadata.entry_points(group="torch.backends")
        if e.name == "somf_mergekit"
    ]
    assert entry.value == "_somf_mergekit_autoload:autoload"
    import _somf_mergekit_autoload as installed

    source = ROOT / "plugin/torch_entry_point.py"
    assert Path(installed.__file__).read_text() == source.read_text()


@pytest.mark.parametrize(
    "first_import",
    [
        "import mergekit.merge_methods",
        "from mergekit.merge import run_merge; assert hasattr(run_merge, '__wrapped__')",
        "from mergekit.plan import MergePlanner; import mergekit.merge",
        "from somf_mergekit import learn; learn.__name__",
        *(
            pytest.param(line, marks=pytest.mark.slow)
            for line in (
                "import mergekit.merge_methods",
                "from mergekit.merge import run_merge",
                "import mergekit.scripts.multimerge",
                "import somf_mergekit.recipe.validate",
                "import somf_mergekit.repairs.repair_methods",
            )
        ),
    ],
)
def test_our_methods_are_known_whatever_is_imported_first(python, first_import):
    assert_known(python(f"{first_import}\n{KNOWN}"))


@pytest.mark.slow
def test_a_module_of_each_folder_can_be_imported_first(python):
    folders = [file.parent for file in sorted(ROOT.rglob("__init__.py")) if file.parent != ROOT]
    assert len(folders) > 10
    for folder in folders:
        module = max(folder.glob("*.py"), key=lambda file: file.stat().st_size)
        name = ".".join(module.relative_to(ROOT.parent).with_suffix("").parts)
        assert_known(python(f"import {name}\n{KNOWN}"))


def remove_package(site):
    shutil.rmtree(site / "somf_mergekit")
    # An editable checkout that is still there must not stand in for it.
    (site / "somf_mergekit").mkdir()
    (site / "somf_mergekit/__init__.py").write_text("raise ImportError('half removed')")


def remove_autoload(site):
    (site / "somf_mergekit/plugin/autoload.py").unlink()


def remove_all_but_autoload(site):
    for file in (site / "somf_mergekit").rglob("*.py"):
        if file.name not in ("__init__.py", "autoload.py"):
            file.unlink()
    shutil.rmtree(site / "somf_mergekit/learner")


def damage_autoload(site):
    (site / "somf_mergekit/plugin/autoload.py").write_text("def install(:\n")


def remove_wrapt(site):
    (site / "wrapt.py").write_text("raise ImportError('no wrapt')")


def remove_mergekit(site):
    (site / "mergekit.py").write_text("raise ImportError('no mergekit')")


def replace_mergekit(site):
    """Another mergekit: the module names are there, what is in them is not."""
    for name in ("mergekit", "mergekit/merge_methods"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("")
    for name in ("merge_methods/registry", "plan", "merge"):
        (site / f"mergekit/{name}.py").write_text("import torch\nVALUE = 1\n")


@pytest.mark.parametrize(
    "damage",
    [
        remove_package,
        damage_autoload,
        remove_mergekit,
        *(
            pytest.param(damage, marks=pytest.mark.slow)
            for damage in (remove_autoload, remove_wrapt)
        ),
    ],
)
def test_torch_is_imported_all_the_same(python, site, damage):
    damage(site)
    result = python(PROBE, site)
    assert (result.returncode, result.stdout) == (0, "torch tensor(3)\n"), result.stderr
    assert result.stderr == ""


def test_torch_itself_calls_the_entry_point_and_survives_it(site):
    remove_package(site)
    code = f"{PROBE}\nimport _somf_mergekit_autoload as a; print(a.failure)"
    result = tiny.run(sys.executable, "-c", code, env={"PYTHONPATH": str(site)}, cwd=site)
    assert (result.stdout, result.stderr) == ("torch tensor(3)\nhalf removed\n", "")


@pytest.mark.parametrize("damage", [remove_all_but_autoload, replace_mergekit])
def test_a_broken_package_leaves_mergekit_and_warns(python, site, damage):
    damage(site)
    result = python(
        f"{PROBE}; import sys; print('torch is imported', file=sys.stderr)\n"
        "import mergekit.merge_methods.registry, mergekit.plan, mergekit.merge; print('imported')",
        site,
    )
    assert result.stdout == "torch tensor(3)\nimported\n", result.stderr
    assert result.stderr.startswith("torch is imported\n")
    assert "somf-mergekit could not add its merge methods to mergekit" in result.stderr


def test_our_own_command_works_where_the_autoload_is_off(python, family_recipe, tmp_path):
    file = str(tiny.write_recipe(tmp_path / "recipe.yml", family_recipe(max_steps=1)))
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    arguments = ["merge", file, str(tmp_path / "out")]
    result = python(f"from somf_mergekit.cli import main; main({arguments})", **off)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/somf/masks.safetensors").exists()
    arguments = [file, str(tmp_path / "stock")]
    stock = python(f"from mergekit.scripts.run_yaml import main; main({arguments})", **off)
    assert "Unimplemented merge method somf" in stock.stderr


DOCTOR = "from somf_mergekit.cli import main; main(['doctor'])"


def test_the_doctor_finds_nothing_wrong_here():
    result = tiny.invoke("mergekit-somf", "doctor")
    assert result.exit_code == 0, result.output
    assert "mergekit: 0.1.5, supported is <0.2,>=0.1.5" in result.output
    assert result.output.endswith("run_merge: added to mergekit\nmergekit-yaml knows somf\n")


def test_the_doctor_says_that_the_autoload_is_off(python):
    result = python(DOCTOR, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 1, result.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD: 0\n  wrong: unset it" in result.stdout
    assert "merge method somf: not added to mergekit\n" in result.stdout


def test_the_doctor_shows_what_the_entry_point_swallowed(python, site):
    remove_wrapt(site)
    result = python(DOCTOR, site)
    assert result.returncode == 1, result.stderr
    assert "entry point: failed: ImportError: no wrapt\n  wrong: install" in result.stdout


def test_the_autoload_imports_nothing_heavy():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import _somf_mergekit_autoload as a; a.autoload()\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in"
        " ('mergekit', 'transformers', 'datasets', 'pydantic', 'click', 'yaml')))\n"
        "print(sorted(m for m in sys.modules if m.startswith('somf_mergekit')))"
    )
    result = tiny.run(sys.executable, "-c", code)
    loaded = ["somf_mergekit", "somf_mergekit.plugin", "somf_mergekit.plugin.autoload"]
    assert result.stdout == f"[]\n{loaded}\n", result.stderr
    assert os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"
