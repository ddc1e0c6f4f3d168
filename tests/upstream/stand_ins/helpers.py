"""Small networks that pytorch-ood's tests score with."""

from torch import Tensor, nn


class ClassificationModel(nn.Module):
    """Maps vectors to logits; its features are what comes before the last layer."""

    def __init__(self, num_inputs: int = 10, num_outputs: int = 3, n_hidden: int = 10):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_inputs, n_hidden), nn.ReLU())
        self.classifier = nn.Linear(n_hidden, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class SegmentationModel(nn.Module):
    """Maps images to logits of each pixel."""

    def __init__(self, in_channels: int = 3, out_channels: int = 3):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
