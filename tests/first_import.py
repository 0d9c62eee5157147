"""Import each module of the package first, in a process of its own; print what goes wrong.

Run as a script. The processes are forked from one that has loaded torch and what mergekit needs
already, without calling torch's entry points: they are called where a child first asks for torch.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import pkgutil
import sys
import traceback

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import accelerate  # noqa: F401
import peft
import torch
import transformers

# Loads what is lazy of it.
_ = peft.PeftModel, transformers.PreTrainedModel, transformers.AutoModelForCausalLM


class TorchAsIfNew(importlib.machinery.ModuleSpec):
    """Finds torch, which is loaded, and calls our entry point as torch does at its end."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            return importlib.machinery.ModuleSpec(name, TorchAsIfNew)
        return None

    @staticmethod
    def create_module(spec):
        return torch

    @staticmethod
    def exec_module(module):
        import _somf_mergekit_autoload

        _somf_mergekit_autoload.autoload()


def imported_first(name):
    spec = torch.__spec__
    del sys.modules["torch"]
    sys.meta_path.insert(0, TorchAsIfNew)
    importlib.import_module(name)
    import torch as found

    found.__spec__ = spec
    import mergekit.merge_methods
    import mergekit.plan

    for method in ("somf", "nlsr"):
        mergekit.merge_methods.get(method)
    assert hasattr(mergekit.plan.MergePlanner._plan, "__wrapped__"), "the planner is not ours"


def modules():
    import somf_mergekit

    found = pkgutil.walk_packages(somf_mergekit.__path__, "somf_mergekit.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    # Imported where Triton is, and nowhere else.
    has_triton = importlib.util.find_spec("triton")
    return [name for name in names if has_triton or not name.endswith(".learner.kernels")]


def main():
    for name in modules():
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            # A warning of ours is as wrong as an error.
            os.dup2(1, 2)
            try:
                imported_first(name)
            except BaseException:
                print(name, traceback.format_exc(limit=-1), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    print("looked at", len(modules()))


if __name__ == "__main__":
    main()
