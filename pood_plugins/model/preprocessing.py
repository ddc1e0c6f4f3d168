"""
What is done to an image before a classifier sees it, in numbers and names, so that it can be
written down beside the weights.

.. autoclass:: pood_plugins.model.preprocessing.Preprocessing
    :members:

.. autofunction:: pood_plugins.model.preprocessing.complete
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchvision import transforms
from torchvision.transforms import InterpolationMode

_LARGEST = 4096


@dataclass(frozen=True)
class Preprocessing:
    """
    What is done to an image before the network sees it. The wrong one scores silently wrong.

    :raises ValueError: if the numbers make no sense
    """

    #: height and width of the input in pixels, to which the center is cropped
    size: int
    #: subtracted from each channel, of images in :math:`[0, 1]`; one number is for all
    mean: tuple[float, ...]
    #: each channel is divided by
    std: tuple[float, ...]
    #: before: length of the shorter side, or height and width. By default as OpenOOD does it: 256
    #: for 224 pixels and in proportion for other sizes, and the size itself for small ones.
    resize: int | tuple[int, int] | None = None
    #: of resizing: ``bilinear``, ``bicubic``, ... as in torchvision's ``InterpolationMode``
    interpolation: str = "bilinear"
    #: 3 for RGB, 1 for networks of grey images, to which all images are converted
    channels: int = 3

    def __post_init__(self) -> None:
        pair = isinstance(self.resize, tuple)
        resize: tuple[Any, ...] = (self.size if self.resize is None else self.resize,)
        if isinstance(self.resize, tuple):
            resize = self.resize
        for pixels in (self.size, *resize):
            if isinstance(pixels, bool) or not isinstance(pixels, int):
                raise ValueError(f"sizes are whole numbers of pixels, and not {pixels!r}")
            if not 1 <= pixels <= _LARGEST:
                raise ValueError(
                    f"images can't be {pixels} pixels high: --size must be 1 to {_LARGEST}"
                )
        if min(resize) < self.size or len(resize) != 1 + pair:
            raise ValueError(
                f"images of {' x '.join(map(str, resize))} pixels can't be cropped to "
                f"{self.size}: --resize must be at least --size"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"images have 3 channels or, if grey, 1, and not {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"--{name} must be {self.channels} numbers, or 1 for all channels, got "
                    f"{list(values)}"
                )
        if not all(abs(value) < 1e9 for value in self.mean):
            raise ValueError("--mean must be finite numbers")
        if not all(0 < value < 1e9 for value in self.std):
            raise ValueError("--std must be above 0, and finite")
        choices = [mode.value for mode in InterpolationMode]
        if self.interpolation not in choices:
            raise ValueError(
                f"there is no interpolation {self.interpolation!r}: choose {', '.join(choices)}"
            )

    @property
    def normalize(self) -> transforms.Normalize:
        """For tensors and batches of tensors in :math:`[0, 1]`, of the right size."""
        return transforms.Normalize(self.mean, self.std)

    @property
    def transform(self) -> transforms.Compose:
        """For RGB images of Pillow."""
        resize = self.resize
        if resize is None:
            resize = self.size if self.size <= 64 else round(self.size * 256 / 224)
        steps = [
            transforms.Resize(resize, InterpolationMode(self.interpolation)),
            transforms.CenterCrop(self.size),
            transforms.ToTensor(),
            self.normalize,
        ]
        return transforms.Compose(
            [transforms.Grayscale(), *steps] if self.channels == 1 else steps
        )

    @classmethod
    def of_torchvision(cls, preset: Any) -> Preprocessing:
        """
        :param preset: the transform that torchvision has with its weights
        :return: the same
        """
        ((size,), (resize,)) = preset.crop_size, preset.resize_size
        mode = preset.interpolation.value
        return cls(size, tuple(preset.mean), tuple(preset.std), resize, mode)

    @classmethod
    def of_timm(cls, config: Mapping[str, Any]) -> Preprocessing:
        """
        :param config: what ``timm.data.resolve_model_data_config`` returns
        :return: the same
        :raises ValueError: if it is none of the usual ones, cropping the center of a square image
        """
        channels, height, width = config["input_size"]
        mode = config["crop_mode"]
        if height != width or mode not in ("center", "squash"):
            raise ValueError(
                f"timm crops {height} x {width} pixels by {mode!r}, which is not supported: give "
                "--size, --mean and --std"
            )
        resize = int(height / config["crop_pct"])
        return cls(
            height,
            tuple(config["mean"]),
            tuple(config["std"]),
            (resize, resize) if mode == "squash" else resize,
            config["interpolation"],
            channels,
        )

    @classmethod
    def of_pytorch_ood(cls, preprocessing: Any) -> Preprocessing:
        """
        :param preprocessing: what pytorch-ood's model zoo has for its weights
        :return: the same
        """
        size, crop = preprocessing.size, preprocessing.crop_size or preprocessing.size
        if crop[0] != crop[1]:
            raise ValueError(
                f"pytorch-ood crops {crop[0]} x {crop[1]} pixels, which is not supported: give "
                "--size, --mean and --std"
            )
        return cls(crop[0], tuple(preprocessing.mean), tuple(preprocessing.std), tuple(size))

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Preprocessing:
        """
        :param content: what :meth:`to_json` returned, read from a file
        :return: the same
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """
        :return: all numbers and names
        """
        return asdict(self)


def complete(
    found: Preprocessing | None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    channels: int | None = None,
) -> Preprocessing:
    """
    :param found: what is known of the classifier, None if nothing is
    :param size: given in place of what is known
    :param mean: likewise
    :param std: likewise
    :param resize: likewise
    :param interpolation: likewise
    :param channels: likewise
    :return: what is known, but for what is given
    :raises ValueError: if it is not complete
    """
    given: dict[str, Any] = {"size": size, "mean": mean and tuple(mean), "std": std and tuple(std)}
    given.update(resize=resize, interpolation=interpolation, channels=channels)
    given = {name: value for name, value in given.items() if value is not None}
    known = {} if found is None else found.to_json()
    if size not in (None, known.get("size")) and resize is None:
        known.pop("resize", None)  # it was that of another size
    missing = [name for name in ("size", "mean", "std") if name not in {**known, **given}]
    if missing:
        raise ValueError(
            "the preprocessing of this classifier is not known, and a wrong one scores silently "
            f"wrong: give {', '.join('--' + name for name in missing)} of its training"
        )
    return Preprocessing(**{**known, **given})
