import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.cli import main
from hf_forward_inf.commands import laion
from hf_forward_inf.commands.laion import laion_run
from hf_forward_inf.commands.options import LaionOptions
from hf_forward_inf.data.digits import captioned_digits
from tests.helpers.drawing import counted, rows, square, stable_diffusion
from tests.helpers.shards import encoded, write_shard, write_shards

COMMAND = "import sys\nfrom hf_forward_inf.cli import main\nsys.exit(main(['laion', *sys.argv[1:]]))\n"
ASCENT = AscentConfig(direction="cg", sample=4, iterations=2)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def options(pipeline, tmp_path):
    """Ten pictures in three shards, and one that is cut off."""
    shards = write_shards(tmp_path / "shards", 10)
    write_shard(shards / "00003.tar", [("bad", {"jpg": encoded(0)[:300], "json": {"caption": "a red square"}})])
    return LaionOptions(
        output=str(tmp_path / "run"), model=str(pipeline), candidates=str(shards), prompt=["a red square"],
        num_images=2, num_references=2, timesteps=1, chunk_size=4, top_k=3,
    )  # fmt: skip


def test_a_prompt_is_drawn_and_traced_over_shards(options):
    options.heatmaps = True
    with pytest.warns(UserWarning, match="Candidates row 10: the loss is NaN"):
        metrics = laion_run(options, ASCENT)
    folder = Path(options.output)
    assert metrics.pop("answers")[0]["best"][0]["rank"] == 1
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert (metrics["queries"], metrics["candidates"], metrics["unscored"]) == (1, 11, 1)
    found = Attribution.load_from_disk(folder / "attribution")
    assert found.scores.shape == (1, 3) and found.config["standardised"]
    assert len(found.candidates) == 3 and (np.diff(found.scores[0]) <= 0).all()
    best = found.top(0)[0]
    assert best["id"] == f"{best['stream_row']:09}" and best["caption"] == rows(10)["caption"][best["stream_row"]]
    page = (folder / "report.html").read_text()
    assert "1 query traced over 11 training examples" in page and best["id"] in page
    assert "divided by that loss" in page and "mean over all queries is subtracted" in page
    assert page.count('class="heat"') == 3
    assert sorted(path.name for path in folder.iterdir()) == ["attribution", "metrics.json", "report.html"]


def test_pictures_that_were_drawn_already_are_traced(options, tmp_path):
    for i in (1, 4):
        square(i).save(tmp_path / f"{i}.png")
    options.images, options.prompt, options.num_references = [str(tmp_path / f"{i}.png") for i in (1, 4)], [], 0
    with pytest.warns(UserWarning):
        laion_run(options, ASCENT)
    found = Attribution.load_from_disk(Path(options.output) / "attribution")
    assert found.queries["caption"][:] == [""] and not found.config["standardised"]
    assert [image.size for image in found.queries[0]["image"]] == [(16, 16)] * 2


def test_an_interrupted_run_neither_draws_nor_traces_again(options, monkeypatch):
    whole = options.output
    with pytest.warns(UserWarning):
        laion_run(options, ASCENT)
    options.output = f"{whole}-again"
    score, pieces, drawn = ForwardInf.score, [], []

    def fragile(self, queries, rows, *place):
        pieces.append(len(rows))
        drawn.append(counted(self.adapter.pipe.vae, "decode"))
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return score(self, queries, rows, *place)

    monkeypatch.setattr(ForwardInf, "score", fragile)
    with pytest.raises(KeyboardInterrupt):
        laion_run(options, ASCENT)
    with pytest.warns(UserWarning):
        laion_run(options, ASCENT)
    assert pieces == [4, 4, 4, 3] and not sum(map(sum, drawn))
    one, two = (Attribution.load_from_disk(Path(folder) / "attribution") for folder in (whole, options.output))
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-4)
    assert one.candidates["id"][:] == two.candidates["id"][:]


def test_two_processes_stream_and_explain_as_one_does(options, tmp_path):
    arguments = [
        "--model", options.model, "--candidates", options.candidates, "--prompt", "a red square", "--num_images", "1",
        "--num_references", "2", "--timesteps", "1", "--chunk_size", "7", "--top_k", "3", "--heatmaps",
        "--sample", "4", "--iterations", "2", "--direction", "cg",
    ]  # fmt: skip
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    launches = {
        "one": [sys.executable, script],
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", script],
    }
    found, said = {}, {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launch in launches.items():
        environment["HF_FORWARD_INF_CACHE"] = str(tmp_path / f"cache of {name}")
        command = [*launch, *arguments, "--output", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "metrics.json").read_text())["processes"] == 1 + (name == "two")
        found[name], said[name] = Attribution.load_from_disk(tmp_path / name / "attribution"), done.stdout.splitlines()
        assert not (tmp_path / name / "unfinished").exists()
    one, two = found.values()
    np.testing.assert_array_equal(one.scores, two.scores)
    np.testing.assert_array_equal(one.indices, two.indices)
    assert one.details.to_list() == two.details.to_list() and len(one.details) == 3
    assert len(said["one"]) == len(said["two"])  # one process speaks for both


def test_the_command_traces_the_built_in_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(laion, "Teaching", partial(laion.Teaching, training_steps=2))
    monkeypatch.setattr(laion, "captioned_digits", lambda: captioned_digits().select(range(60)))
    arguments = [
        "--timesteps",
        "1",
        "--chunk_size",
        "40",
        "--num_images",
        "1",
        "--num_references",
        "0",
        "--top_k",
        "5",
    ]
    assert main(["laion", "--output", str(tmp_path / "run"), *arguments]) == 0
    assert "60 candidates traced, 0 of them without a score" in capsys.readouterr().out
    assert len(Attribution.load_from_disk(tmp_path / "run" / "attribution")) == 3
    shutil.rmtree(tmp_path / "run" / "attribution")
    assert main(["laion", "--output", str(tmp_path / "run"), *arguments]) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "x"}, "--model and --candidates together"),
        ({"candidates": "x"}, "--model and --candidates together"),
        ({"model": "x", "candidates": "y"}, "Give --prompt, which is drawn, or --images"),
        ({"images": ["a.png"], "prompt": ["a", "b"]}, "of one prompt, not of 2"),
        ({"chunk_size": 0}, "--chunk_size must be at least 1"),
        ({"num_references": -1}, "--num_references must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LaionOptions(**options)
