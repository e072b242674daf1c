"""Networks of the paper's experiments on images."""

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """The paper's small network: two convolutions, two linear layers.

    Args:
        channels (`int`): Channels of the images.
        size (`tuple[int, int]`): Height and width of the images, at least 4 pixels.
        classes (`int`, defaults to 10): Number of classes.
        width (`int`, defaults to 16): Channels after the first convolution, twice as many after the second.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int = 10, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * (size[0] // 4) * (size[1] // 4), 64)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, `[rows, classes]`, of images `[rows, channels, height, width]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear(F.relu(self.hidden(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without weights: subsampling, and zeros for new channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The ResNet of He et al. (2016) for small images: three stages of basic blocks, each at half the size.

    Args:
        channels (`int`, defaults to 3): Channels of the images, which may have any size.
        classes (`int`, defaults to 10): Number of classes.
        blocks (`int`, defaults to 3): Blocks in a stage; 3 for the ResNet-20.
        width (`int`, defaults to 16): Channels of the first stage; doubled by the others.
    """

    def __init__(self, channels: int = 3, classes: int = 10, blocks: int = 3, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1, blocks)
        self.layer2 = _stage(width, 2 * width, 2, blocks)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, `[rows, classes]`, of images `[rows, channels, height, width]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
