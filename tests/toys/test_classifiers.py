import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn

from hf_forward_inf.data.images import load_images
from hf_forward_inf.toys.classifiers import (
    IMAGENET,
    Training,
    accuracy,
    augmented,
    load_classifier,
    normalised_over,
    train,
    untrained,
)
from hf_forward_inf.toys.networks import ResNet
from tests.helpers.images import picture, processor, vision_transformer


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_images().select(range(300))


def test_training_learns_and_is_kept(digits):
    training = Training(epochs=8)
    first, again = (untrained("conv", digits, 10) for _ in range(2))
    assert train(first, digits, training) == {8: first}
    assert accuracy(first, digits) > 0.9
    train(again, digits, training)
    images = torch.tensor(np.stack([first.array(image) for image in digits["image"][:20]]))
    assert torch.equal(first.model(images), again.model(images))
    with torch.no_grad():
        hits = first.model(images).argmax(1) == torch.tensor(digits["label"][:20])
    assert accuracy(first, digits.select(range(20))) == hits.sum().item() / 20


def test_networks_on_the_way_are_those_of_the_same_training_and_the_last_is_the_trained_one(digits):
    alone, stepwise = (untrained("conv", digits, 10) for _ in range(2))
    train(alone, digits, Training(epochs=5))
    found = train(stepwise, digits, Training(epochs=5, checkpoints=3))
    assert list(found) == [2, 4, 5] and found[5] is stepwise
    assert accuracy(found[2], digits) < accuracy(found[5], digits)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, stepwise.model.state_dict()[name])


def test_pixels_are_normalised_by_channel():
    rows = Dataset.from_list([{"image": picture(i), "label": 0} for i in range(20)])
    arrays = np.stack([normalised_over(rows)(image) for image in rows["image"]])
    np.testing.assert_allclose(arrays.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(arrays.std(axis=(0, 2, 3)), 1, atol=1e-3)


def test_weight_decay_and_the_optimizer_reach_the_training(digits):
    def weight(**options):
        adapter = untrained("conv", digits, 10, width=4)
        train(adapter, digits, Training(epochs=2, **options))
        return sum(p.square().sum().item() for p in adapter.model.parameters())

    plain, decayed, sgd = weight(), weight(weight_decay=10.0), weight(optimizer="sgd")
    assert decayed < 0.9 * plain and abs(sgd - plain) > 1e-3


def test_augmented_images_are_mirrored_and_shifted():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3, 2] = 1
    places = {tuple(one[0].nonzero()[0].tolist()) for one in augmented(image.repeat(500, 1, 1, 1), torch.Generator())}
    assert places == {(y, x) for y in (2, 3, 4) for x in (1, 2, 3, 4, 5, 6)}


def test_a_residual_network_of_one_block_is_its_formula():
    torch.manual_seed(0)
    model = ResNet(blocks=1, width=4).eval()
    x = torch.randn(2, 3, 8, 8)
    first = torch.relu(model.bn1(model.conv1(x)))
    block = model.layer1[0]
    first = torch.relu(first + block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(first))))))
    block = model.layer2[0]
    deep = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(first)))))
    shortcut = torch.zeros_like(deep)
    shortcut[:, 2:6] = first[:, :, ::2, ::2]
    torch.testing.assert_close(model.layer2(first), torch.relu(deep + shortcut))
    assert model(x).shape == (2, 10)


def test_weights_without_a_configuration_are_a_resnet(tmp_path):
    torch.manual_seed(0)
    model = ResNet(blocks=2, width=4, classes=7).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    adapter = load_classifier(str(tmp_path))
    assert torch.equal(adapter.model.linear.weight, model.linear.weight) and not adapter.model.training
    pixels = np.asarray(picture(0), dtype=np.float32).transpose(2, 0, 1) / 255
    expected = (pixels - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    np.testing.assert_allclose(adapter.array(picture(0)), expected, atol=1e-5)
    assert adapter.transform == IMAGENET


def test_transformers_models_are_loaded_with_their_processor(tmp_path):
    vision_transformer().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    adapter = load_classifier(str(tmp_path))
    assert adapter.model.config.num_labels == 3 and adapter.image_processor is not None


def test_weights_of_something_else_and_missing_ones_are_told(tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no weights of a ResNet"):
        load_classifier(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_classifier(str(tmp_path / "nothing"))


def test_the_shared_resnet_classifies_as_its_source_says(shared):
    rows = load_images(str(shared / "cifar10" / "test_2k.parquet")).select(range(300))
    assert 0.76 < accuracy(load_classifier(str(shared / "models" / "resnet20_cifar10")), rows) < 0.9
