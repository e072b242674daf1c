"""The code blocks of pages in Markdown, and how they are run."""

import doctest
import inspect
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import zip_longest
from pathlib import Path

from hf_forward_inf import cli
from hf_forward_inf.utils.parser import OptionParser
from tests.helpers.recipes import recipe

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (.*?) -->\n\Z", re.DOTALL)
"""Before a block that is not run, with the reason."""
ELLIPSIS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A code block.

    Args:
        page: Its page, relative to the repository.
        line: Number of its first line.
        language: What stands behind the fence.
        code: Its lines.
        reason: Why it is not run, if it is not.
        output: What it prints, as the page says, if it does.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None
    output: str | None


def blocks(page):
    """The blocks of a page, in their order; a block of text behind another is its output."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    for fence, following in zip_longest(found, found[1:]):
        mark = MARK.search(text[: fence.start()])
        printed = (
            following is not None and following[1] == "text" and not text[fence.end() : following.start()].strip()
        )
        line = text[: fence.start(2)].count("\n") + 1
        yield Block(page, line, fence[1], fence[2], mark and mark[1], following[2] if printed else None)


def run_python(block, names, exact=True):
    """Run a block with these names, and compare what it prints with what the page says.

    What a model of less training prints (`exact=False`) has as many lines.
    """
    printed = StringIO()
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
    with redirect_stdout(printed):
        exec(code, names)
    compare(block, printed.getvalue(), exact)


def compare(block, said, exact=True):
    """Check that a block prints what the page says, if it says so."""
    if block.output is None:
        return
    if exact:
        same = doctest.OutputChecker().check_output(block.output, said, ELLIPSIS)
    else:
        same = len(said.splitlines()) == len(block.output.splitlines())
    assert same, f"{block.page}, line {block.line}: prints\n{said}\nand not\n{block.output}"


def commands(block):
    """The command lines of a block, as words."""
    return [shlex.split(line, comments=True) for line in block.code.splitlines() if line.strip()]


def parse(words):
    """Check that the options of a command line are those of the program; nothing is run."""
    if words[0] == "hf-forward-inf":
        return _check(cli.kinds_of(cli.COMMANDS[words[1]]), words[2:])
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        assert words[0] in ("python3", "pip", "accelerate", "make", "."), words
    elif script.startswith("recipes/"):
        kinds = inspect.signature(recipe(Path(script).stem).main).parameters.values()
        _check([kind.annotation for kind in kinds], words[words.index(script) + 1 :])
    else:
        assert (ROOT / script).exists(), script


def _check(kinds, words):
    if "--help" not in words:
        OptionParser(*kinds).parse(words)
