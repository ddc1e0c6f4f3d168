"""
The residual networks for images of 32 × 32 pixels from section 4.2 of *Deep Residual Learning for
Image Recognition* (He et al., CVPR 2016, https://arxiv.org/abs/1512.03385). Trained weights in
their layout have been published by many, and a ResNet-20 is small enough to fine-tune on a CPU.

A network of :math:`6n + 2` layers begins with a convolution of 16 channels, followed by three
stages of :math:`n` blocks with 16, 32 and 64 channels. The first block of the second and of the
third stage halves the resolution. After global average pooling there are 64 features and one
linear layer. Shortcuts have no parameters (option A of the paper): where the shape changes, they
keep every second row and column, and pad channels with zeros, half of them in front.

.. code-block:: python

    model = resnet20()
    model.load_state_dict(torch.load("resnet20_cifar10.pt", weights_only=True))
    split = split_model(model.eval(), early="layer2")

No weights are downloaded. Weights fit if their keys are ``conv1``, ``bn1``,
``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}`` and ``linear``.

.. autofunction:: pood_plugins.model.resnet20

.. autofunction:: pood_plugins.model.resnet56

.. autoclass:: pood_plugins.model.resnet_cifar.CIFARResNet
    :show-inheritance:
    :exclude-members: forward, training
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CIFARResNet", "resnet20", "resnet56"]


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.stride = channels // in_channels
        self.padding = (channels - in_channels) // 2
        self.conv1 = _convolution(in_channels, channels, self.stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class CIFARResNet(nn.Module):
    """
    Maps images of shape :math:`B \\times 3 \\times 32 \\times 32` to logits of shape
    :math:`B \\times C`. Convolutions begin with He initialization.
    """

    def __init__(self, depth: int, num_classes: int = 10):
        """
        :param depth: number of layers with weights, :math:`6n + 2` for :math:`n` blocks per stage
        :param num_classes: number of classes :math:`C`
        :raises ValueError: if there is no network of this depth
        """
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if n < 1 or rest:
            raise ValueError(f"depth must be 6n + 2, as 20, 32, 44, 56 or 110, got {depth}")
        self.conv1 = _convolution(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n)
        self.layer2 = _stage(16, 32, n)
        self.layer3 = _stage(32, 64, n)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10) -> CIFARResNet:
    """
    :param num_classes: number of classes
    :return: network of 20 layers, 0.27 million parameters for ten classes
    """
    return CIFARResNet(20, num_classes)


def resnet56(num_classes: int = 10) -> CIFARResNet:
    """
    :param num_classes: number of classes
    :return: network of 56 layers, 0.85 million parameters for ten classes
    """
    return CIFARResNet(56, num_classes)


def _convolution(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def _stage(in_channels: int, channels: int, n: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(in_channels, channels), *[_Block(channels, channels) for _ in range(n - 1)]
    )
