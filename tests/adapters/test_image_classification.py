import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch import nn
from transformers import pipeline

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import ImageClassificationAdapter, TensorAdapter, adapter_for
from hf_forward_inf.adapters.labels import cross_entropies, margins_of
from hf_forward_inf.data.images import load_images
from hf_forward_inf.toys.classifiers import Training, train, untrained
from hf_forward_inf.toys.networks import ResNet
from hf_forward_inf.utils.images import UnreadableImage
from tests.helpers.images import network, picture, processor, rows, tensors, vision_transformer
from tests.helpers.line import assert_same_state, state


def test_scores_are_those_of_the_algorithm_written_out_by_hand():
    data, model = rows(12), network().train()
    before = state(model)
    tracer = ForwardInf(
        adapter=ImageClassificationAdapter(model), ascent=AscentConfig(direction="gradient", radius=0.3)
    )
    found = tracer.trace(data.select([5]), data)
    assert_same_state(before, state(model))  # BatchNorm's running statistics among it
    images, labels = tensors(data)
    model.eval()
    with torch.no_grad():
        base = nn.functional.cross_entropy(model(images), labels, reduction="none")
    nn.functional.cross_entropy(model(images[5:6]), labels[5:6]).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.grad / norm
        risen = nn.functional.cross_entropy(model(images), labels, reduction="none") - base
    np.testing.assert_allclose(found.scores[0], risen, atol=1e-5)


def test_losses_and_slopes_are_true_where_float32_rounds_them_to_nothing():
    logits = torch.tensor([[60.0, 0.0, 1.0], [0.0, 2.0, -1.0], [-300.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 0])
    losses = cross_entropies(margins_of(logits, labels))
    others = [np.exp(-60) * (1 + np.e), np.exp(-2) + np.exp(-3), np.inf]
    expected = [np.log1p(others[0]), np.log1p(others[1]), 300 + np.log(2)]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-9)
    losses.sum().backward()
    chances = torch.softmax(logits.detach().double(), dim=1)
    np.testing.assert_allclose(logits.grad[1], chances[1] - torch.tensor([0, 1, 0]), rtol=1e-6)
    np.testing.assert_allclose(logits.grad[0, 1:], [np.exp(-60), np.exp(-59)], rtol=1e-6)


@pytest.mark.parametrize("scale", [1, 5])
def test_a_memorised_query_finds_its_copy_although_its_loss_is_nothing(scale):
    pytest.importorskip("sklearn")
    data = load_images().select(range(100))
    adapter = untrained("resnet", data, 10)
    train(adapter, data, Training(epochs=10, batch_size=32))
    with torch.no_grad():
        adapter.model.linear.weight *= 8 * scale  # surer still
        logits = adapter.model(torch.stack([adapter.array(image) for image in data["image"]]))
    losses = nn.functional.cross_entropy(logits, torch.tensor(data["label"][:]), reduction="none")
    sure = losses.argsort()[:20].tolist()
    assert losses[sure].max() < 1e-6  # log_softmax makes nothing of most
    adapter = ImageClassificationAdapter(adapter.model, transform=adapter.transform, objective="margin")
    found = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.001)).trace(
        data.select(sure), data
    )
    first = [found.ranking(i)[0] == row for i, row in enumerate(sure)]
    assert sum(first) >= 18  # another image may change as much: which networks do so depends on the machine


def test_losses_move_along_a_corrected_step_and_margins_along_the_gradient():
    losses, margins = (ImageClassificationAdapter(network(), objective=one) for one in ("cross_entropy", "margin"))
    default = ForwardInf(adapter=losses).ascent
    assert (default.direction, default.damping, default.radius, default.sample) == ("pcg", 0.01, 0.3, 1024)
    copies = ForwardInf(adapter=margins).ascent
    assert (copies.direction, copies.radius) == ("gradient", 0.01)
    plain = ForwardInf(adapter=losses, ascent=AscentConfig(direction="gradient")).ascent
    assert (plain.direction, plain.radius, plain.sample) == ("gradient", 0.3, None)
    data = rows(12)
    short = ForwardInf(adapter=losses, ascent=AscentConfig(radius=0.01)).trace(data, data)
    assert [short.ranking(i)[0] for i in range(12)] == list(range(12))


@pytest.mark.parametrize("first", [None, "3"])
def test_a_shift_is_the_length_of_what_changes_in_the_logits_but_for_their_mean(first):
    data, model = rows(12), network().eval()
    ascent = AscentConfig(direction="gradient", radius=0.3)
    tracer = ForwardInf(adapter=ImageClassificationAdapter(model, first=first), ascent=ascent, measure="shift")
    found = tracer.trace(data.select([5]), data)
    images, labels = tensors(data)
    before = model(images).detach().numpy()
    moved = [p for name, p in model.named_parameters() if first is None or name >= first]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(images[5:6]), labels[5:6]), moved)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(moved, gradients, strict=True):
            p += 0.3 * g / norm
        change = model(images).numpy() - before
    expected = np.linalg.norm(change - change.mean(1, keepdims=True), axis=1)
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-3)
    assert (expected > 0).all() and found.config["measure"] == "shift"


def test_a_shift_has_no_sign():
    data, adapter = rows(4), ImageClassificationAdapter(network())
    down = ForwardInf(
        adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.1, mode="descent"), measure="shift"
    )
    assert (down.trace(data.select([0]), data).scores > 0).all()
    with pytest.raises(ValueError, match="has no sign"):
        down.with_options(ascent=AscentConfig(direction="gradient", radius=0.1, mode="symmetric"))
    with pytest.raises(ValueError, match="measure='sum' must be one of"):
        ForwardInf(adapter=adapter, measure="sum")


def test_margins_are_log_odds_and_have_scores_of_their_own():
    data, model = rows(12), network()
    adapter = ImageClassificationAdapter(model, objective="margin")
    found = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.3)).trace(
        data.select([5]), data
    )
    images, labels = tensors(data)

    def odds():
        chances = model.eval()(images).double().softmax(1)[range(12), labels]
        return (chances / (1 - chances)).log()

    base = odds()
    step = torch.autograd.grad(-base[5], list(model.parameters()), retain_graph=True)
    norm = torch.cat([part.flatten() for part in step]).norm()
    with torch.no_grad():
        for p, part in zip(model.parameters(), step, strict=True):
            p += 0.3 * part / norm
        np.testing.assert_allclose(found.scores[0], base - odds(), atol=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "transformer"])
def test_what_is_not_perturbed_is_run_once_for_all_queries(kind, tmp_path):
    torch.manual_seed(0)
    data, runs = rows(10), []
    if kind == "resnet":
        model, options = ResNet(blocks=1, width=4, classes=3), {"first": "layer3"}
        late, early = ["layer3", "linear"], model.layer1[0].conv1
        assert ImageClassificationAdapter(model, first="layer3").default_modules() == late
    else:
        model, options = vision_transformer(), {"image_processor": processor()}
        late, early = ["vit.layers.1"], model.vit.layers[0].attention.q_proj
    early.register_forward_hook(lambda *_: runs.append(1))
    before, ascent = state(model), AscentConfig(direction="gradient", modules=late, radius=0.3)
    found = ForwardInf(adapter=ImageClassificationAdapter(model, **options), ascent=ascent).trace(data, data).scores
    assert_same_state(before, state(model))
    once = len(runs)
    adapter = ImageClassificationAdapter(model, options.get("image_processor"))
    adapter.blocks.middle = 0  # now nothing may be run before
    expected = ForwardInf(adapter=adapter, ascent=ascent, cache_dir=tmp_path).trace(data, data).scores
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert once < 18 and len(runs) - once == 1 + 10 + 10  # base losses, ascents, loss passes of the queries


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.early, self.late, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x):
        x = self.early(x)
        return self.head((x + self.late(x)).mean(dim=(2, 3)))


def test_a_module_that_does_not_run_its_children_in_a_line_is_run_whole(tmp_path):
    torch.manual_seed(0)
    model, data = Skipping(), rows(3)
    adapter = ImageClassificationAdapter(model, first="late")
    with pytest.warns(UserWarning, match="Skipping can't be run in two parts"):
        found = ForwardInf(adapter=adapter).trace(data.select([0]), data).scores
    whole, ascent = ImageClassificationAdapter(model), AscentConfig(modules=["late", "head"], radius=0.3)
    expected = ForwardInf(adapter=whole, ascent=ascent, cache_dir=tmp_path)
    np.testing.assert_allclose(found, expected.trace(data.select([0]), data).scores, rtol=1e-5)
    with pytest.raises(ValueError, match="no child 'body'; it has early, late, head"):
        ImageClassificationAdapter(model, first="body")


def test_transformers_models_and_pipelines_find_their_adapter(tmp_path):
    model, data = vision_transformer(), rows(6)
    assert isinstance(adapter_for(model, processor()), ImageClassificationAdapter)
    expected = ForwardInf(model, processor()).trace(data.select([1]), data).scores
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    pipe = pipeline("image-classification", model=str(tmp_path))
    found = ForwardInf.from_pipe(pipe).trace(data.select([1]), data).scores
    np.testing.assert_allclose(found, expected, atol=1e-6)
    values = processor()(images=data["image"][:], return_tensors="pt")["pixel_values"]
    logits = model.eval()(values).logits
    assert ForwardInf(model, processor()).adapter.answer({"image": data["image"][:]}) == logits.argmax(1).tolist()


def test_an_image_without_a_label_is_classified_and_traced():
    data = rows(6)
    tracer = ForwardInf(vision_transformer(), processor())
    found = tracer.trace_generation([picture(4)], data)
    assert found.scores.shape == (1, 6) and found.queries["label"][0] in (0, 1, 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_become_what_the_model_takes(mode):
    image = picture(0, mode)
    assert ImageClassificationAdapter(network()).array(image).shape == (3, 8, 8)
    assert ImageClassificationAdapter(network(1)).array(image).shape == (1, 8, 8)
    assert ImageClassificationAdapter(vision_transformer(), processor()).array(image).shape == (3, 8, 8)


def test_images_may_be_paths_or_arrays(tmp_path):
    adapter = ImageClassificationAdapter(network())
    picture(3).save(tmp_path / "3.png")
    expected = tensors(rows(4))[0][3]
    for value in (picture(3), str(tmp_path / "3.png"), np.asarray(picture(3)).tolist()):
        np.testing.assert_allclose(adapter.array(value), expected, atol=1e-6)


def test_arrays_of_fractions_are_read_from_0_to_1_and_others_refused():
    adapter = ImageClassificationAdapter(network())
    pixels = np.asarray(picture(3))
    expected = torch.tensor(pixels).permute(2, 0, 1) / 255
    for value in (pixels / 255, (pixels / 255).astype(np.float32), pixels.astype(np.float64), pixels.astype(np.int64)):
        np.testing.assert_allclose(adapter.array(value), expected, atol=1e-6)
    assert adapter.array(pixels > 127).unique().tolist() == [0, 1]
    for value in (pixels / 127.5 - 1, pixels + 0.5, pixels.astype(np.int64) * 257):
        with pytest.raises(UnreadableImage, match="pixels are whole numbers from 0 to 255, or fractions from 0 to 1"):
            adapter.array(value)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_several_classes_and_numbers_have_the_loss_of_transformers(problem):
    model = vision_transformer().eval()
    model.config.problem_type = problem
    labels = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    data = Dataset.from_dict({"image": [picture(i) for i in range(3)], "label": labels})
    adapter = ImageClassificationAdapter(model, processor())
    batch = adapter.collate(adapter.encode(adapter.prepare(data)[:]))
    one = [processor()(images=image, return_tensors="pt")["pixel_values"] for image in data["image"]]
    expected = [model(x, labels=torch.tensor([y])).loss.item() for x, y in zip(one, labels, strict=True)]
    np.testing.assert_allclose(adapter.loss(model, batch).detach(), expected, rtol=1e-5)
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(radius=0.01))
    assert (np.diag(tracer.trace(data, data).scores) > 0).all()
    with pytest.raises(ValueError, match="in rows 0, 1 "):
        tracer.trace(rows(2), rows(2))


def test_classes_are_matched_by_name():
    model = vision_transformer()
    model.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    features = Features({"image": Image(), "label": ClassLabel(names=["bird", "cat", "dog"])})
    named = Dataset.from_dict({"image": [picture(i) for i in range(3)], "label": [1, 2, 0]}, features=features)
    tracer = ForwardInf(model, processor())
    found, expected = (tracer.trace(data.select([1]), data).scores for data in (named, rows(3)))
    np.testing.assert_array_equal(found, expected)


def test_corrupt_images_name_their_rows():
    file = io.BytesIO()
    picture(0).save(file, format="PNG")
    good = {"bytes": file.getvalue(), "path": None}
    broken = {"bytes": file.getvalue()[:50], "path": None}
    data = Dataset.from_dict(
        {"image": [good, broken, good, broken], "label": [0, 1, 2, 0]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    tracer = ForwardInf(adapter=ImageClassificationAdapter(network()))
    with pytest.raises(ValueError, match=r"Candidates rows 1, 3 \(2 rows\) can't be read \(row 1: .+ drop them"):
        tracer.trace(rows(1), data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: rows(2).remove_columns("label"), "The candidates have no column `label`; they have image"),
        (lambda: rows(2).map(lambda row: {"label": row["label"] + 2}), r"holds 3 in row 1, .*classes 0 to 2"),
        (lambda: Dataset.from_list([*rows(1), {"image": picture(1, size=9), "label": 0}]), r"\(3, 8, 8\) and \(3, 9"),
        (lambda: Dataset.from_list([{"image": picture(1), "label": -1}]), "holds -1 in row 0; a label is an integer"),
    ],
)
def test_rows_that_cannot_be_used_are_told(data, message):
    model = vision_transformer()
    adapter = ImageClassificationAdapter(model, transform=lambda image: np.asarray(image, np.float32).T)
    with pytest.raises(ValueError, match=message):
        ForwardInf(adapter=adapter).trace(rows(1), data())


def test_images_of_a_size_that_the_model_cannot_take_are_told():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 6, 3))
    data = Dataset.from_list([{"image": picture(1, size=9), "label": 0}])
    with pytest.raises(ValueError, match=r"Sequential can't take what `image` holds, shape \(3, 9, 9\)"):
        ForwardInf(adapter=ImageClassificationAdapter(model)).trace(data, data)


def test_what_cannot_be_a_classifier_of_images_is_refused():
    with pytest.raises(TypeError, match="needs its image processor"):
        ForwardInf(vision_transformer())
    with pytest.raises(ValueError, match="either an image_processor or a transform"):
        ImageClassificationAdapter(network(), processor(), transform=np.asarray)
    with pytest.raises(ValueError, match="images of 4 channels"):
        ImageClassificationAdapter(network(4))
    with pytest.raises(ValueError, match="2 classes or more"):
        ForwardInf(adapter=TensorAdapter(nn.Linear(2, 1))).trace(
            *[Dataset.from_dict({"x": [[0.0, 1.0]], "label": [0]})] * 2
        )
