import pytest
import torch
from torch import nn

from hf_forward_inf.curvature.second_moments import optimizer_file, read_second_moments
from tests.helpers import digits


def read(folder, network):
    return read_second_moments(optimizer_file(folder), network)


def test_moments_are_those_of_the_optimizer(tmp_path):
    network = digits.perceptron()
    optimizer = torch.optim.Adam(network.named_parameters(), lr=0.1)
    save_steps(optimizer, network, tmp_path / "optimizer.pt")
    found = read(tmp_path, network)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], optimizer.state[parameter]["exp_avg_sq"].flatten())


def test_an_optimizer_state_of_another_model_is_refused(tmp_path):
    other = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(other.named_parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="has 2 parameters, the model has 4"):
        read(tmp_path, digits.perceptron())
    perceptron = digits.perceptron()
    wider = nn.Sequential(nn.Linear(64, 25), nn.Tanh(), nn.Linear(25, 10))
    save_steps(torch.optim.Adam(wider.parameters()), wider, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"0.weight has shape \(25, 64\) there, \(\d+, 64\) here"):
        read(tmp_path, perceptron)
    with pytest.raises(FileNotFoundError, match="no optimizer state"):
        read(tmp_path / "nowhere", digits.perceptron())


def test_what_holds_no_second_moments_is_refused(tmp_path):
    network, file = digits.perceptron(), tmp_path / "optimizer.pt"
    save_steps(torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), network, file)
    with pytest.raises(ValueError, match=r"has no second moment of 0\.weight: only Adam and its variants have them"):
        read(tmp_path, network)
    torch.save(network.state_dict(), file)
    with pytest.raises(ValueError, match="is not an optimizer's state: give a Trainer's checkpoint folder"):
        read(tmp_path, network)
    file.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is not an optimizer's state"):
        read(tmp_path, network)


def save_steps(optimizer, network, file):
    """Save an optimizer's state after a step."""
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), file)
