import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Sums depend on how many threads share them: all processes of the tests have one.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# A figure takes longer than a tiny merge: only tests of reports ask for one.
os.environ.setdefault("SOMF_REPORT", "text")
# Triton's kernels run on its interpreter, without a GPU; it reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import loopback_hub
import pytest
import tiny
import torch
from setups import FIRST, SECOND, adapter

# `make test-hostile` tries thousands; the same examples every time in a run of all tests.
hypothesis.settings.register_profile(
    "fast", max_examples=20, deadline=None, database=None, derandomize=True
)
hypothesis.settings.register_profile(
    "thousands",
    max_examples=2000,
    deadline=None,
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile(os.environ.get("HOSTILE_PROFILE", "fast"))


def pytest_collection_finish():
    """Leave what the imported libraries made out of each collection of garbage from here on."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of the tests' own: the user's is left alone."""
    os.environ["SOMF_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache") / "somf")


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A base model, two fine-tuned ones, what repairs need beside them, and preference pairs."""
    root = tmp_path_factory.mktemp("family")
    tokenizer = tiny.tiny_tokenizer()
    base = tiny.tiny_llama(0, len(tokenizer))
    tiny.save_model(base, tokenizer, root / "base")
    tiny.save_model(tiny.perturbed(base, 1), tokenizer, root / "math")
    tiny.save_model(tiny.perturbed(base, 2), tokenizer, root / "code")
    tiny.save_model(tiny.perturbed(base, 5), tokenizer, root / "unaligned")
    tiny.save_model(tiny.perturbed(base, 6), tokenizer, root / "safety-tuned")
    tiny.write_jsonl(root / "pairs.jsonl", tiny.preference_rows())
    return root


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """A base whose linear layers have biases, two adapters, pairs, and where mergekit puts them."""
    root = tmp_path_factory.mktemp("adapted")
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.tiny_llama(0, len(tokenizer), attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
    tiny.save_model(model, tokenizer, root / "base")
    adapter(root / "base", root / "first", 1, **FIRST)
    adapter(root / "base", root / "second", 2, **SECOND)
    tiny.write_jsonl(root / "pairs.jsonl", tiny.preference_rows())
    return root


@pytest.fixture
def family_recipe(family):
    """A recipe over the family, as a function of further parameters."""

    def make(**parameters):
        values = {
            "safety_dataset": str(family / "pairs.jsonl"),
            "max_steps": 3,
            # In few steps much is to move.
            "learning_rate": 0.1,
            "batch_size": 4,
            "max_length": 48,
            # The finest mask is where most can go wrong.
            "granularity": "weight",
        }
        # A given mask was learned before.
        given = {"learning_rate": None, "granularity": None} if "mask" in parameters else {}
        values = values | given | parameters
        values = {key: value for key, value in values.items() if value is not None}
        return tiny.recipe(family / "base", [family / "math", family / "code"], **values)

    return make


@pytest.fixture
def hub(tmp_path):
    """A hub on loopback, with nothing on it."""
    hub = loopback_hub.Hub(tmp_path / "home")
    yield hub
    hub.stop()
