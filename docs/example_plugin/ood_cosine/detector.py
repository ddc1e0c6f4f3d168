"""An input is an outlier if its features point in another direction than those of every class."""

from collections.abc import Callable

import torch
from pytorch_ood.api import (
    DetectorInfo,
    FeaturesDetector,
    ModelNotSetException,
    RequiresFittingException,
    Task,
)
from pytorch_ood.utils import extract_features, is_known
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from typing_extensions import Self


class CosinePrototypes(FeaturesDetector):
    """
    Negative cosine similarity of the features to the most similar class mean. How long the
    features are makes no difference.

    .. code-block:: python

        detector = CosinePrototypes(model.encoder).fit(train_loader)
        scores = detector(images)  # from -1, like a class mean, to 1
    """

    #: An example, so there is no ``paper``.
    info = DetectorInfo(tasks={Task.CLASSIFICATION}, ai_coded=True)

    requires_fit = True

    #: Default search space for :class:`pytorch_ood.utils.GridSearch`.
    hyperparameter_space = {"centered": [False, True]}

    def __init__(self, encoder: Callable[[Tensor], Tensor] | None, centered: bool = False):
        """
        :param encoder: maps inputs to features of shape :math:`B \\times D`; ``None`` if only
            ``fit_features`` and ``predict_features`` are used
        :param centered: whether directions are seen from the mean of all ID features, and not
            from 0; used by the next fit
        """
        self.encoder = encoder
        self.centered = centered
        self.origin_: Tensor | None = None  #: where directions are seen from, of shape D
        self.prototypes_: Tensor | None = None  #: directions of the class means, C × D

    def fit(self, data_loader: DataLoader) -> Self:
        """
        :param data_loader: yields batches ``(x, y)``; OOD samples (label < 0) are ignored
        :return: the fitted detector
        :raises ModelNotSetException: without an ``encoder``
        :raises ValueError: see :meth:`fit_features`
        """
        if self.encoder is None:
            raise ModelNotSetException
        return self.fit_features(*extract_features(data_loader, self.encoder, self.device))

    def fit_features(self, z: Tensor, labels: Tensor) -> Self:
        """
        :param z: features of shape :math:`N \\times D`
        :param labels: labels of shape :math:`N`; OOD samples (label < 0) are ignored
        :return: the fitted detector
        :raises ValueError: if there is no ID sample, if features of ID samples are not finite, or
            if ``centered`` and there is only one class
        """
        device = self.device or z.device
        z, labels = z.detach().to(device).float(), labels.to(device)
        z, labels = z[is_known(labels)], labels[is_known(labels)]
        classes = labels.unique()
        if len(classes) == 0:
            raise ValueError("No ID samples: all labels are below 0")
        if len(classes) == 1 and self.centered:
            raise ValueError("A single class has no direction from the mean: use centered=False")
        _check_finite(z)
        origin = z.mean(dim=0) if self.centered else torch.zeros_like(z[0])
        means = torch.stack([z[labels == label].mean(dim=0) for label in classes])
        self.origin_, self.prototypes_ = origin, normalize(means - origin)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """
        :param x: inputs, passed through ``encoder``
        :return: outlier scores of shape :math:`B`
        :raises ModelNotSetException: without an ``encoder``
        :raises RequiresFittingException: before a fit
        :raises ValueError: see :meth:`predict_features`
        """
        if self.encoder is None:
            raise ModelNotSetException
        if self.device is not None:
            x = x.to(self.device)
        return self.predict_features(self.encoder(x))

    @torch.no_grad()
    def predict_features(self, z: Tensor) -> Tensor:
        """
        :param z: features of shape :math:`B \\times D`
        :return: outlier scores of shape :math:`B`, in :math:`[-1, 1]`
        :raises RequiresFittingException: before a fit
        :raises ValueError: if features are not finite
        """
        if self.prototypes_ is None:
            raise RequiresFittingException
        z = z.float()
        _check_finite(z)
        similarity = normalize(z - self.origin_) @ self.prototypes_.T
        return -similarity.amax(dim=1)


def _check_finite(z: Tensor) -> None:
    """NaN exceeds no threshold: without this check, such an input would pass as ID."""
    n_broken = int((~z.isfinite()).any(dim=1).sum())
    if n_broken:
        raise ValueError(f"{n_broken} of {len(z)} rows of features are not finite")
