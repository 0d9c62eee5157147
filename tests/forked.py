"""Run programs as in new processes of Python, without the seconds that importing torch takes.

The processes are forked from one that has loaded torch and what mergekit needs, without calling
torch's entry points: ours is called where a program first asks for torch.
"""

import contextlib
import importlib.machinery
import json
import os
import subprocess
import sys
import traceback
from types import SimpleNamespace

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@contextlib.contextmanager
def python_with_torch(folder):
    """Give a function that runs a program; its output passes through files in ``folder``."""
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, SWITCH: "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    ) as server:

        def python(code, site=None, **env):
            path = [str(site)] if site else []
            files = [str(folder / name) for name in ("stdout", "stderr")]
            request = {"code": code, "path": path, "env": {SWITCH: "1", **env}, "files": files}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            returncode = json.loads(server.stdout.readline())
            stdout, stderr = ((folder / name).read_text() for name in ("stdout", "stderr"))
            return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)

        yield python
        server.stdin.close()


def run(request):
    """Run a program in this process, and end it."""
    for number, file in enumerate(request["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request["env"])
    sys.path[:1] = request["path"]
    code = 0
    try:
        torch_as_if_new()
        exec(compile(request["code"], "program", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def torch_as_if_new():
    """Let the next import of torch find the loaded one, and call our entry point as torch does."""
    torch = sys.modules.pop("torch")
    loaded = torch.__spec__

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, Finder) if name == "torch" else None

        @staticmethod
        def create_module(spec):
            return torch

        @staticmethod
        def exec_module(module):
            module.__spec__ = loaded
            if os.environ[SWITCH] != "0":
                import _somf_mergekit_autoload

                _somf_mergekit_autoload.autoload()

    sys.meta_path.insert(0, Finder)


def main():
    import accelerate  # noqa: F401
    import peft
    import transformers

    # Loads what is lazy of it.
    _ = peft.PeftModel, transformers.PreTrainedModel, transformers.AutoModelForCausalLM
    # To be found anew, where it may be broken.
    for name in [name for name in sys.modules if name.split(".")[0] == "wrapt"]:
        del sys.modules[name]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
