import numpy as np
from datasets import Dataset

from hf_forward_inf import Attribution
from hf_forward_inf.data import as_dataset
from hf_forward_inf.explorer import labels_of, narrowed
from hf_forward_inf.report.lines import lines
from tests.helpers.images import picture


def test_pictures_and_classes_go_by_their_names_wherever_a_result_is_listed(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        picture(len(label)).save(tmp_path / label / f"{label[0]}.png")
    rows = as_dataset(tmp_path, "candidates")
    queries = rows.select([1]).remove_columns("label").add_column("label", [0])  # the model says a number
    found = Attribution(np.array([[2.0, 1.0]], dtype=np.float32), queries, rows)
    printed = str(found).splitlines()
    assert printed[1] == "0. d.png → cats"
    assert [line.split(": ")[1] for line in printed[3:]] == ["c.png → cats", "d.png → dogs"]
    assert labels_of(found) == ["1. d.png → cats"]
    assert narrowed(found, 0, "dogs").top(0)["candidate"][:] == [1]


def test_what_is_said_comes_in_its_place_or_after_an_arrow():
    masked = {"inputs_pretokenized": ["<extra_id_0> is here"], "targets_pretokenized": ["<extra_id_0> Lima"]}
    (line,) = lines(Dataset.from_dict(masked))
    assert (line.asked, line.said, line.text) == ("____ is here", "Lima", "Lima is here")
    (line,) = lines(Dataset.from_dict({"prompt": ["Peru?"], "completion": [" Lima."]}))
    assert (line.asked, line.said.strip(), line.text) == ("Peru?", "Lima.", "Peru? → Lima.")
    (line,) = lines(Dataset.from_dict({"text": ["One text."]}))
    assert (line.asked, line.said, line.text) == ("One text.", "", "One text.")
