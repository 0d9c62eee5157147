"""docs/errors.md lists every error and warning of the package, and none that is gone.

Collected is every text of three words or more in the source, and every shorter one that is handed
to an error class. An f-string is one text: its literal pieces with placeholders between. Left out
are documentation and what MODULES, CALLS and TEXTS name: modules that write reports, calls that
take labels, single texts. So a message is found however it is told (raised, yielded, put into a
list, kept in a variable first), and a new text that is no message has to be named here.

Not seen are a message of one or two words that is not handed to an error class, how messages are
put together of several texts (each text is looked for alone), and the words of other packages'
errors.

An entry of the page is a list item that begins with code. All of it must be one collected text,
with anything in the place of its placeholders. Of every collected text, the pieces of two words or
more must stand somewhere on the page.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "somf_mergekit"
PAGE = ROOT / "docs/errors.md"

LEAST_WORDS = 3
# Modules whose texts are read where nothing went wrong.
MODULES = {
    "demo/data.py",
    "demo/table.py",
    "demo/tokenizer.py",
    "demo/words.py",
    "evaluate/measures.py",
    "evaluate/refusals.py",
    "evaluate/steps.py",
    "evaluate/table.py",
    "frontier/plot.py",
    "frontier/writer.py",
    "learner/tensors.py",
    "recipe.py",
    "repairs/catalogue.py",
    "report/card.py",
    "report/census.py",
    "report/tables.py",
    "report/text.py",
}
# What is called with help, labels, names and patterns.
CALLS = {
    "Contract",
    "MachineOption",
    "_draw_nothing",
    "_number",
    "axes.set_xlabel",
    "axes.set_ylabel",
    "click.option",
    "desc=",
    "help=",
    "option",
    "phase",
    "re.compile",
    "say",
    "write_mask_plot",
}
# Other texts that are no messages, by how they begin.
TEXTS = (
    # In the words of torch.
    "can't allocate memory",
    ", <> of them up to rounding",
    "; <> not looked at (--all looks)",
    "(as in the recipe)",
    "<> In this folder: <>",
    "<> merges are compared with their aligned base",
    "<> of <> are what base, models and mask give",
    "<>, as their checksums say",
    "Reading task vectors",
    "a truth value",
    "a whole number",
    "module <> has no attribute <>",
    "of other shapes",
    "of something else",
    "parameters of the tensors",
    "somf, untrained mask",
    "the loss is not finite at step <>",
    "the mask was learned with these: <>",
    "'prompt', 'chosen', 'rejected' (text or",
    "(text or message lists), or",
    "; or '<>', a message list that ends",
    "; left out: <>",
    ", and <> of <> GiB beside the GPU",
    ", and <> GiB of disk",
    "<> at most (those",
    "<>: needs about <> of <> GiB free",
    "A MODEL is a folder or a hub id",
    "Parameters of a somf recipe",
    "The control: the same merge under",
    "The plain merge of both",
    "The same merge under a mask learned",
    "binary mask of <> tensors, <> bytes",
    "checking models and data",
    "loss below the aligned base's, <>",
    "mask of <> tensors in",
    "mean probability (blue",
    "norm after / before masking (blue",
    "recipe: right.",
    "refusals minus over-refusals",
    "the same merge without its mask, not kept",
    "tuple[EvaluationSets",
    "{} right, {} wrong, {} not checked",
)
ERROR_CLASS = re.compile(r"(Error|Exception|Impossible|Interrupted)$|^super\(\)\.__init__$")


def pieces_of(node):
    """A string of the source as its literal pieces; None stands for a placeholder."""
    if isinstance(node, ast.JoinedStr):
        return [v.value if isinstance(v, ast.Constant) else None for v in node.values]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        # logging puts its arguments in the place of %s.
        return [piece if piece != "%s" else None for piece in re.split("(%s)", node.value)]
    return None


def words(text):
    return [word for word in text.split() if any(sign.isalpha() for sign in word)]


def plain(text):
    return " ".join(text.split())


@dataclass(frozen=True)
class Text:
    """A string of the package's source.

    Attributes:
        module: where it stands.
        line: likewise.
        pieces: its literal ones, white space made one blank; None for a placeholder.
        call: what it is handed to, ``help=`` for an argument of that name; empty where nothing is.
    """

    module: str
    line: int
    pieces: tuple[str | None, ...]
    call: str

    @property
    def shown(self):
        return plain("".join("<>" if piece is None else piece for piece in self.pieces))

    @property
    def words(self):
        return words(" ".join(piece or "" for piece in self.pieces))

    @property
    def is_message(self):
        if self.module in MODULES or self.call in CALLS or self.shown.startswith(TEXTS):
            return False
        return len(self.words) >= (1 if ERROR_CLASS.search(self.call) else LEAST_WORDS)

    def is_shown_by(self, entry):
        """Whether an entry is this text with anything in the place of its placeholders."""
        # Else a text of next to nothing but placeholders would be every entry.
        if 2 * len(self.words) < len(words(re.sub("<[^>]*>", "", entry))):
            return False
        pieces = (".*" if piece is None else re.escape(plain(piece)) for piece in self.pieces)
        return re.fullmatch(r"\s*".join(pieces), entry) is not None


def texts_of(module, source):
    """Yield every string of a module but for its documentation."""
    for parent in ast.walk(ast.parse(source)):
        for node in ast.iter_child_nodes(parent):
            pieces = pieces_of(node)
            is_part = isinstance(parent, ast.JoinedStr)
            if pieces is None or is_part or isinstance(parent, ast.Expr):
                continue
            call = ast.unparse(parent.func) if isinstance(parent, ast.Call) else ""
            call = f"{parent.arg}=" if isinstance(parent, ast.keyword) else call
            yield Text(module, node.lineno, tuple(pieces), call)


@pytest.fixture(scope="module")
def texts():
    return [
        text
        for file in sorted(PACKAGE.rglob("*.py"))
        for text in texts_of(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
    ]


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def entries(page):
    """Return the code that list items of a page begin with."""
    found = re.findall(r"^ *- (`+)(.+?)\1(?!`)", page, re.MULTILINE | re.DOTALL)
    return [plain(code) for _, code in found]


def test_every_message_is_on_the_page(texts, page):
    whole = plain(page)
    missing = [
        f"{text.module}:{text.line}: {text.shown}"
        for text in texts
        if text.is_message
        and not all(plain(p) in whole for p in text.pieces if p and len(words(p)) > 1)
    ]
    assert not missing, "docs/errors.md lacks, or has in other words:\n" + "\n".join(missing)


def test_every_entry_of_the_page_is_a_message(texts, page):
    gone = [entry for entry in entries(page) if not any(t.is_shown_by(entry) for t in texts)]
    assert len(entries(page)) > 100
    assert not gone, "docs/errors.md lists what the package does not say:\n" + "\n".join(gone)


def test_every_entry_says_what_to_make_of_it(page):
    alone = [
        plain(entry)[:80]
        for entry in re.split(r"^(?=- `|#)", page, flags=re.MULTILINE)
        if entry.startswith("- `")
        and len(words(re.sub(r"\A- (`+).+?\1", "", entry, flags=re.DOTALL))) < 5
    ]
    assert not alone, "docs/errors.md names without cause or remedy:\n" + "\n".join(alone)


def test_what_is_left_out_is_there_to_be_left_out(texts):
    assert set(MODULES) <= {text.module for text in texts}
    assert set(CALLS) <= {text.call for text in texts}
    assert [t for t in TEXTS if not any(text.shown.startswith(t) for text in texts)] == []


@pytest.mark.parametrize(
    "told",
    [
        "raise RecipeError(f'{name}: no such thing as {that}')",
        "problems.append('no such ' 'thing as that')",
        "def f():\n    yield 'no such thing as that'",
        "why = 'no such thing as that' if broken else ''",
        "LOG.warning('no such thing as %s', that)",
        "raise click.UsageError('nothing')",
    ],
)
def test_a_message_is_found_however_it_is_told(told):
    assert any(text.is_message for text in texts_of("new.py", told))


def test_what_is_documentation_is_no_message():
    source = '"""What this module is for."""\nx = f(help="What it is for, in words.")\n'
    assert not any(text.is_message for text in texts_of("new.py", source))
