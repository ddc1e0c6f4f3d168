r"""
NERO propagates the softmax probabilities back through the last layer, which tells how much each
penultimate neuron contributed to the prediction (its *relevance*), and flags inputs whose
relevance pattern is far from the typical pattern of every class. Because relevance belongs to
neurons, it can also be shown why an input was flagged.

It is the method of *NERO: Explainable Out-of-Distribution Detection with Neuron-level Relevance*
by Chhetri, Korhonen, Gyawali and Bhattarai
(`MICCAI 2025 <https://arxiv.org/abs/2506.15404>`__), with
`released code <https://github.com/bhattarailab/NERO>`__.

Relevance
---------

Let :math:`z \in \mathbb{R}^D` be the features of an input, :math:`W` and :math:`b` weight and bias
of the last layer, :math:`l = W z + b` the logits of the :math:`C` classes, and :math:`p` their
softmax. Layer-wise relevance propagation (LRP) gives class :math:`c` the relevance :math:`p_c`,
and shares it among the summands of its logit in proportion to them:

.. math::
    R_d = \sum_c p_c \frac{W_{cd} z_d}{l_c}, \qquad R_0 = \sum_c p_c \frac{b_c}{l_c}

for neuron :math:`d` and the bias. Relevance is conserved, for every input with no logit of 0:

.. math::
    \sum_d R_d + R_0 = \sum_c p_c \, \frac{\sum_d W_{cd} z_d + b_c}{l_c} = \sum_c p_c = 1.

Single relevances are not bounded by 1: they grow as a logit comes close to 0, and a negative logit
turns their signs.

Score
-----

The score is a sum of two parts times a third:

=========================================================  ======================================
Part                                                       What it tells
=========================================================  ======================================
:math:`\min_c \lVert P(R) - P(\mu_c) \rVert_1`             how far the pattern is from that of
                                                           the nearest class
:math:`s \, |R_0|`                                         how much of the prediction is due to
                                                           the bias, and not to features
:math:`\sum_{d \in K} |z_d| \, / \, \sum_d |z_d|`          how much of the activity is that of
                                                           the least relevant neurons
=========================================================  ======================================

Here, :math:`\mu_c` is the mean relevance of the training samples of class :math:`c`, :math:`P` the
projection to the first :math:`m` principal components of the training relevance, :math:`s` a scale
(see :class:`.NERO`), and :math:`K` the neurons with the smallest relevance, signs included.
:meth:`.NERO.explain` returns the parts.

Paper and released code
-----------------------

The definition is that of the released code; its formulas are not all in the parts of the paper
that we know.

====================  =================================  ========================================
Step                  Released code                      Here
====================  =================================  ========================================
components            randomized solver, so that scores  exact, in float64; those without variance
                      change from run to run             are left out, as they are arbitrary
their number m        2/3 of D, which needs as many      2/3 of D, at most the rank of the
                      samples                            training relevance
neurons in K          175, of 512 (ResNet-18) and of     175/512 of D, to fit every network; an
                      384 (DeiT-S)                       ``int`` is a fixed number
class means           of all training samples, by label  as released
scale s               with the bias relevance, without   as released
                      the projection
logits near 0         divide as they are                 magnitude at least 1e-6, sign kept;
                                                         ``eps`` stabilizes more
features all 0        0 / 0                              as if all features were equal
====================  =================================  ========================================

Costs
-----

For :math:`N` training samples:

===========================  ==============================  ====================================
Step                         Time                            Memory
===========================  ==============================  ====================================
fit                          :math:`O(NCD + ND^2 + D^3)`     :math:`D^2` numbers and a chunk,
                                                             besides the features
score of :math:`B` samples   :math:`O(BCD + BDm + BCm)`      a chunk
what is kept                                                 :math:`(C + m) D + C m` numbers
===========================  ==============================  ====================================

A chunk is ``batch_size`` rows with what is computed of them. All is computed in float64, in which
many GPUs are much slower than in float32.

When not to use it
------------------

- **Networks that do not end in a linear layer.** Relevance is defined by its weights.
- **Logits that come close to 0.** They make relevance arbitrarily large. Means and covariance are
  not robust, so a single such training sample can dominate them; ``eps`` bounds it, at the price
  of conservation.
- **Few samples.** There are at most :math:`N - 1` components, and the pattern of a class is the
  mean of its samples.
- **Unclean ID data.** Every training sample counts, whether it is labeled and classified
  correctly or not.

Reference
---------

..  autoclass:: pood_plugins.detector.NERO
    :members:
    :inherited-members:
    :show-inheritance:

..  autoclass:: pood_plugins.detector.nero.Explanation

..  autofunction:: pood_plugins.detector.nero_relevance
"""

import logging
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from pytorch_ood.api import (
    DetectorInfo,
    FeaturesDetector,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from pytorch_ood.utils.utils import _check_fraction
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils.data import DataLoader
from typing_extensions import Self

log = logging.getLogger(__name__)

#: smallest magnitude of a logit that relevance is divided by
_LOGIT_FLOOR = 1e-6
#: columns of a matrix product of which only half is needed
_BLOCK = 128


def nero_relevance(
    z: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float = 0.0
) -> Tuple[Tensor, Tensor]:
    """
    Relevance of the penultimate neurons and of the bias for the prediction, by layer-wise
    relevance propagation (LRP) through the last layer, seeded with the softmax probabilities
    :math:`p_c` of all classes:

    .. math:: R_d = \\sum_c p_c \\frac{W_{cd} z_d}{l_c}, \\qquad
        R_0 = \\sum_c p_c \\frac{b_c}{l_c}, \\qquad l = W z + b

    Relevance is conserved: :math:`\\sum_d R_d + R_0 = 1`, unless a logit :math:`l_c` was
    stabilized or floored.

    :see Implementation: `NERO <https://github.com/bhattarailab/NERO>`__

    :param z: features of shape :math:`B \\times D`
    :param weight: weights :math:`W` of the last layer, of shape :math:`C \\times D`
    :param bias: biases :math:`b` of the last layer, of shape :math:`C`; ``None`` counts as 0
    :param eps: stabilizer (LRP-:math:`\\varepsilon`), added to the magnitude of the logits in the
        denominators. Their magnitude is at least 1e-6 in any case; the sign is kept, and 0 counts
        as positive.
    :return: relevance of shape :math:`B \\times D` and bias relevance of shape :math:`B`, in the
        dtype of ``z``
    """
    slope, bias_relevance = _slope(z, weight, bias, eps)
    return slope.mul_(z), bias_relevance


def _slope(z: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float) -> Tuple[Tensor, Tensor]:
    """Relevance per unit of each feature, and bias relevance."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    logits = z @ weight.T + bias
    sign = torch.where(logits < 0, -1.0, 1.0).to(logits.dtype)
    coefficient = logits.softmax(dim=1) / (sign * (logits.abs() + eps).clamp(min=_LOGIT_FLOOR))
    return coefficient @ weight, coefficient @ bias


@dataclass(frozen=True)
class Explanation:
    """
    Why :class:`NERO` gave its scores to B samples: ``score == (distance + bias) * feature_ratio``.
    """

    #: scores of shape :math:`B`, those of :meth:`NERO.predict`
    score: Tensor
    #: id of the class with the nearest mean relevance, of shape :math:`B`
    nearest_class: Tensor
    #: distances to the mean relevance of the classes in the principal components, of shape
    #: :math:`B \times C`
    distances: Tensor
    #: the smallest of them, of shape :math:`B`
    distance: Tensor
    #: scaled magnitude of the bias relevance, of shape :math:`B`
    bias: Tensor
    #: share of the neurons of lowest relevance in the features, of shape :math:`B`
    feature_ratio: Tensor
    #: relevance of each neuron, of shape :math:`B \times D`
    relevance: Tensor
    #: relevance minus the mean relevance of the nearest class, of shape :math:`B \times D`. It
    #: explains the distance, but is no summand of it, as distances are those of the components.
    deviation: Tensor
    #: neurons with the largest deviation, of whatever sign, largest first, of shape
    #: :math:`B \times n`: those that make the distance, and not those whose features would have to
    #: be changed to lower the score
    top_neurons: Tensor
    #: where in the input the relevance of the top neurons comes from, of shape
    #: :math:`B \times H \times W`; its sum is their relevance. None without feature maps.
    heat_map: Optional[Tensor]


class NERO(FeaturesDetector):
    """
    Implements *NERO: Explainable Out-of-Distribution Detection with Neuron-level Relevance*.

    Let :math:`R \\in \\mathbb{R}^D` be the relevance of the neurons and :math:`R_0` that of the
    bias (see :func:`nero_relevance`), :math:`P` the projection to the first principal components
    of the training relevance, and
    :math:`\\mu_c` the mean of the relevance of class :math:`c`. The outlier score is

    .. math:: \\Big( \\min_c \\lVert P(R) - P(\\mu_c) \\rVert_1 + s \\, |R_0| \\Big) \\cdot
        \\frac{\\sum_{d \\in K} |z_d|}{\\sum_d |z_d|}

    where :math:`K` are the neurons with the smallest (signed) relevance, and :math:`s` brings the
    bias to the scale of the distances: the mean distance of the training samples to their nearest
    class mean (in L1, with the bias relevance and without projection), divided by their mean
    :math:`|R_0|`. As in the released code, larger means more outlying.

    For a head without bias, :math:`s = 0`. Where all features are 0, the ratio is that of equal
    features, :math:`|K| / D`.

    .. note:: The encoder is used in the mode it is in. Call ``model.eval()`` first.

    .. rubric:: Examples

    .. code-block:: python

        model = WideResNet(num_classes=10).eval()
        detector = NERO(encoder=model.features, head=model.fc)
        detector.fit(train_loader)
        scores = detector(images)
    """

    #: Publication and tasks.
    info = DetectorInfo(
        paper=Paper(
            title="NERO: Explainable Out-of-Distribution Detection with Neuron-level Relevance",
            venue="MICCAI",
            year=2025,
            url="https://arxiv.org/abs/2506.15404",
            code="https://github.com/bhattarailab/NERO",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )

    requires_fit = True

    #: Default search space for :class:`pytorch_ood.utils.GridSearch`. The released code has none.
    hyperparameter_space = {
        "n_components": [1 / 3, 2 / 3, 1.0],
        "n_neurons": [0.1, 175 / 512, 0.6],
    }

    def __init__(
        self,
        encoder: Optional[Callable[[Tensor], Tensor]],
        head: Linear,
        *,
        n_components: Union[int, float] = 2 / 3,
        n_neurons: Union[int, float] = 175 / 512,
        eps: float = 0.0,
    ):
        """
        :param encoder: maps inputs to penultimate features of shape :math:`B \\times D`. Can be
            ``None`` when using ``fit_features(...)`` and ``predict_features(...)`` directly.
        :param head: last layer of the network, a linear layer with or without bias
        :param n_components: number of principal components, as a count or a fraction of :math:`D`;
            at most the rank of the training relevance. Default is that of the released code.
        :param n_neurons: number of neurons :math:`|K|` in the feature ratio, as a count or a
            fraction of :math:`D`; read when scoring. Default is that of the released code for a
            ResNet-18.
        :param eps: stabilizer of the logits, see :func:`nero_relevance`. Default is that of the
            released code.
        :raises ValueError: if the head is not linear or an argument is out of range
        """
        self.encoder = encoder
        self.head = head
        self.n_components = n_components
        self.n_neurons = n_neurons
        self.eps = eps

        #: mean relevance of each class, of shape :math:`C \times D`; like the rest, float64
        self.centroids_: Optional[Tensor] = None
        #: mean bias relevance of each class, of shape :math:`C`
        self.bias_centroids_: Optional[Tensor] = None
        #: principal components of the training relevance, in columns, of shape :math:`D \times m`
        self.components_: Optional[Tensor] = None
        #: class centroids in the principal components, of shape :math:`C \times m`
        self.projected_centroids_: Optional[Tensor] = None
        #: scale :math:`s` of the bias relevance, of shape ()
        self.bias_scale_: Optional[Tensor] = None
        #: class ids of the centroids, ascending
        self.classes_: Optional[List[int]] = None
        self._fitted_with: Optional[Tuple[Union[int, float], float]] = None

        if not isinstance(head, Linear):
            raise ValueError(
                f"NERO needs the last linear layer of the network as head, got "
                f"{type(head).__name__}. Relevance of other heads is not defined."
            )
        self._check_hyperparameters()

    def fit(self, data_loader: DataLoader[Any]) -> Self:
        """
        Extracts features and fits the detector.

        :param data_loader: loader yielding batches ``(x, y)`` of training data; OOD samples are
            ignored
        :return: the fitted detector
        :raises ModelNotSetException: if the detector has no encoder
        :raises ValueError: as in :meth:`fit_features`
        """
        if self.encoder is None:
            raise ModelNotSetException("fit() needs an encoder. Pass one, or use fit_features().")
        dimension = self.head.in_features
        features, labels = [torch.empty(0, dimension)], [torch.empty(0, dtype=torch.long)]
        for x, y in _pairs(data_loader):
            y = _check_labels(y, x).cpu()
            known = y >= 0
            if known.any():
                z = _encode(self.encoder, x[known.to(x.device)], self.device)
                _check_features(z, dimension)
                labels.append(_check_labels(y[known], z))
                features.append(z.detach().float().cpu())
        return self.fit_features(torch.cat(features), torch.cat(labels))

    @torch.no_grad()
    def fit_features(self, z: Tensor, labels: Tensor, batch_size: int = 512) -> Self:
        """
        Computes class centroids, principal components and the scale of the bias relevance from
        features.

        :param z: training features of shape :math:`N \\times D`
        :param labels: class labels of shape :math:`N`; OOD samples (label < 0) are ignored
        :param batch_size: number of samples processed at once; lower it to reduce peak memory
        :return: the fitted detector
        :raises ValueError: if the features are not finite or of the wrong shape, labels do not
            match them or exceed the head's columns, there is no ID sample, the relevance does not
            differ, or a hyper-parameter is out of range. The previous fit is kept.
        :raises TypeError: if features or labels are no dense tensors
        """
        self._check_hyperparameters()
        _check_batch_size(batch_size)
        _check_features(z, self.head.in_features)
        # labels steer shapes, so they live on the host, where loaders put them
        labels = _check_labels(labels, z).cpu()
        z = z.detach().to(self.device or z.device).float()
        known = (labels >= 0).nonzero()[:, 0]
        if len(known) == 0:
            raise ValueError("No ID samples (labels >= 0) to fit on. Pass ID training data.")
        classes, position = labels[known].unique(return_inverse=True)
        if int(classes[-1]) >= self.head.out_features:
            raise ValueError(
                f"Label {int(classes[-1])} exceeds the {self.head.out_features} columns of the "
                "head. Labels must be class indices of this head; mark outliers with a negative "
                "label."
            )

        # without OOD samples, nothing has to be picked
        z_known = z if len(known) == len(z) else z[known.to(z.device)]
        chunks = list(zip(z_known.split(batch_size), position.to(z.device).split(batch_size)))
        # two passes in float64: first the means, then covariance and distances to the means
        n, dimension = len(known), z.shape[1]
        counts = position.bincount().to(z.device)
        centroids = torch.zeros(len(classes), dimension, dtype=torch.float64, device=z.device)
        bias_centroids = centroids[:, 0].clone()
        bias_magnitude = centroids.new_zeros(())
        for part, target in chunks:
            relevance, bias_relevance = self._relevance(part)
            centroids.index_add_(0, target, relevance)
            bias_centroids.index_add_(0, target, bias_relevance)
            bias_magnitude += bias_relevance.abs().sum()
        mean = centroids.sum(dim=0) / n
        centroids /= counts[:, None]
        bias_centroids /= counts

        covariance = mean.new_zeros(dimension, dimension)
        distance = bias_magnitude.new_zeros(())
        for part, _ in chunks:
            relevance, bias_relevance = self._relevance(part)
            to_centroids = torch.cdist(relevance, centroids, p=1)
            to_centroids += (bias_relevance[:, None] - bias_centroids).abs()
            distance += to_centroids.amin(dim=1).sum()
            centered = relevance.sub_(mean)
            # of a symmetric matrix, the upper half is enough
            for i in range(0, dimension, _BLOCK):
                block = centered[:, i : i + _BLOCK]
                covariance[i : i + _BLOCK, i:].addmm_(block.T, centered[:, i:])

        covariance /= n
        # float32 features that differ at all have a larger variance than this
        varies = covariance.trace() > 1e-24 * mean.square().sum()
        # the only device-to-host read of a fit
        sound = torch.isfinite(covariance.trace() + distance)
        *finite, sound, varies = torch.cat([_finite(z), torch.stack([sound, varies])]).tolist()
        _raise_if_not_finite(finite)
        _raise_if_not_sound(sound)
        if not varies:
            raise ValueError(
                "The relevance is the same for all training samples, so there are no principal "
                "components to compare it in. Pass more, and different, ID samples."
            )

        variances, components = torch.linalg.eigh(covariance, UPLO="U")  # ascending
        components = components[:, -_count("n_components", self.n_components, dimension) :]
        variances = variances[-components.shape[1] :]
        # a direction without variance is arbitrary: leave it out
        rounding = dimension * torch.finfo(torch.float64).eps * variances[-1]
        self.components_ = components * (variances > rounding)
        self.projected_centroids_ = centroids @ self.components_
        self.centroids_ = centroids
        self.bias_centroids_ = bias_centroids
        self.bias_scale_ = torch.where(bias_magnitude > 0, distance / bias_magnitude, 0.0)
        self.classes_ = classes.tolist()
        self._fitted_with = (self.n_components, self.eps)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """
        :param x: inputs, passed through the encoder as it is (call ``model.eval()`` before)
        :return: outlier scores of shape :math:`B`, float32, on the detector's device
        :raises ModelNotSetException: if the detector has no encoder
        :raises RequiresFittingException: if the detector was not fitted
        :raises ValueError: as in :meth:`predict_features`
        """
        if self.encoder is None:
            raise ModelNotSetException(
                "predict() needs an encoder. Pass one, or use predict_features()."
            )
        self._fitted_state()
        _check_inputs(x)
        return self.predict_features(_encode(self.encoder, x, self.device))

    @torch.no_grad()
    def predict_features(self, z: Tensor, batch_size: int = 512) -> Tensor:
        """
        :param z: features of shape :math:`B \\times D`
        :param batch_size: number of samples processed at once; lower it to reduce peak memory
        :return: outlier scores of shape :math:`B`, float32, on the detector's device
        :raises RequiresFittingException: if the detector was not fitted, or if ``n_components`` or
            ``eps`` were changed since
        :raises ValueError: if the features are not finite or of the wrong shape
        """
        z = self._checked(z, batch_size)
        parts = [self._parts(part, *self._relevance(part)) for part in z.split(batch_size)]
        return _scores(z, parts)

    def explain(
        self, x: Tensor, layer: Optional[Module] = None, n_neurons: int = 10
    ) -> Explanation:
        """
        :param x: inputs, passed through the encoder as it is (call ``model.eval()`` before)
        :param layer: module of the network whose output are feature maps with one map for each
            feature, which is their mean, such as the last stage of a ResNet. With it, there is a
            heat map of the size of the inputs.
        :param n_neurons: see :meth:`explain_features`
        :return: why these inputs have their scores
        :raises ModelNotSetException: if the detector has no encoder
        :raises RequiresFittingException: if the detector was not fitted
        :raises ValueError: as in :meth:`explain_features`, or if the features are not the means of
            the maps of ``layer``
        """
        if self.encoder is None:
            raise ModelNotSetException(
                "explain() needs an encoder. Pass one, or use explain_features()."
            )
        self._fitted_state()
        _check_inputs(x)
        if layer is None:
            return self.explain_features(_encode(self.encoder, x, self.device), n_neurons)
        outputs: List[Any] = []
        handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            z = _encode(self.encoder, x, self.device)
        finally:
            handle.remove()
        _check_features(z, self.head.in_features)
        _check_maps(outputs, z)
        return self._explain(z, n_neurons, 512, outputs[0].detach(), tuple(x.shape[2:]))

    def explain_features(
        self, z: Tensor, n_neurons: int = 10, batch_size: int = 512
    ) -> Explanation:
        """
        :param z: features of shape :math:`B \\times D`
        :param n_neurons: number of top neurons, at most :math:`D`
        :param batch_size: number of samples processed at once; lower it to reduce peak memory
        :return: why these features have their scores, without a heat map
        :raises RequiresFittingException: as in :meth:`predict_features`
        :raises ValueError: likewise, or if ``n_neurons`` is below 1
        """
        return self._explain(z, n_neurons, batch_size, None, None)

    @torch.no_grad()
    def _explain(
        self,
        z: Tensor,
        n_neurons: int,
        batch_size: int,
        maps: Optional[Tensor],
        size: Optional[Tuple[int, ...]],
    ) -> Explanation:
        z = self._checked(z, batch_size)
        n = _count("n_neurons", n_neurons, z.shape[1])
        assert self.centroids_ is not None and self.classes_ is not None
        classes = torch.tensor(self.classes_, device=z.device)
        weight, bias = self._head(z.device)
        parts, chunks, heat_maps = [], [], []
        for i, part in enumerate(z.split(batch_size)):
            slope, bias_relevance = _slope(part.double(), weight, bias, self.eps)
            relevance = slope * part
            parts.append(self._parts(part, relevance, bias_relevance))
            distances, scaled_bias, ratio = parts[-1]
            distance, nearest = distances.min(dim=1)
            deviation = relevance - self.centroids_[nearest]
            top = deviation.abs().topk(n, dim=1).indices
            values = (distances, distance, scaled_bias, ratio, relevance, deviation)
            chunks.append((classes[nearest], *(value.float() for value in values), top))
            if maps is not None and size is not None:
                rows = slice(i * batch_size, (i + 1) * batch_size)
                heat_maps.append(_heat_map(maps[rows], slope, top, size))
        heat_map = torch.cat(heat_maps) if heat_maps else None
        names = ["nearest_class", "distances", "distance", "bias", "feature_ratio", "relevance"]
        names += ["deviation", "top_neurons"]
        joined = {name: torch.cat(values) for name, values in zip(names, zip(*chunks))}
        return Explanation(score=_scores(z, parts), heat_map=heat_map, **joined)

    def __repr__(self) -> str:
        return f"NERO(n_components={self.n_components:.4g}, n_neurons={self.n_neurons:.4g})"

    def _relevance(self, z: Tensor) -> Tuple[Tensor, Tensor]:
        weight, bias = self._head(z.device)
        return nero_relevance(z.double(), weight, bias, self.eps)

    def _head(self, device: torch.device) -> Tuple[Tensor, Optional[Tensor]]:
        # the network may have been moved since the fit
        bias = self.head.bias
        return (
            self.head.weight.to(device, torch.float64),
            None if bias is None else bias.to(device, torch.float64),
        )

    def _checked(self, z: Tensor, batch_size: int) -> Tensor:
        """Features that may be scored, as float32 on the device of the fit."""
        components, _, _ = self._fitted_state()
        self._check_hyperparameters()
        _check_batch_size(batch_size)
        _check_features(z, self.head.in_features)
        return z.detach().to(components.device).float()

    def _parts(
        self, z: Tensor, relevance: Tensor, bias_relevance: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Distances to the classes, scaled bias relevance and feature ratio."""
        components, projected_centroids, bias_scale = self._fitted_state()
        distances = torch.cdist(relevance @ components, projected_centroids, p=1)

        n_neurons = _count("n_neurons", self.n_neurons, z.shape[1])
        lowest = relevance.topk(n_neurons, dim=1, largest=False, sorted=False).indices
        magnitude = z.double().abs()
        ratio = magnitude.gather(1, lowest).sum(dim=1) / magnitude.sum(dim=1)
        ratio = ratio.nan_to_num(n_neurons / z.shape[1])  # 0 / 0: no neuron is active
        return distances, bias_scale * bias_relevance.abs(), ratio

    def _fitted_state(self) -> Tuple[Tensor, Tensor, Tensor]:
        components, centroids, scale = (
            self.components_,
            self.projected_centroids_,
            self.bias_scale_,
        )
        if components is None or centroids is None or scale is None:
            raise RequiresFittingException()
        if self._fitted_with != (self.n_components, self.eps):
            raise RequiresFittingException(
                "n_components or eps were changed after fitting, and the fit depends on them. "
                "Call fit() again."
            )
        return components, centroids, scale

    def _check_hyperparameters(self) -> None:
        _count("n_components", self.n_components, 1)
        _count("n_neurons", self.n_neurons, 1)
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be a finite number >= 0, got {self.eps}.")


def _count(name: str, value: Union[int, float], total: int) -> int:
    """A count, at most ``total``, from an int or from a float, a fraction of ``total``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a count (int) or a fraction (float), got {value!r}.")
    if isinstance(value, float):
        return max(1, int(_check_fraction(name, value) * total))
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return min(value, total)


def _pairs(data_loader: Iterable[Any]) -> Iterator[Tuple[Tensor, Any]]:
    """Batches of a loader. A tensor is none, although one of two rows unpacks into a pair."""
    for batch in data_loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = type(batch).__name__
            length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(
                f"The loader must yield batches (x, y) of inputs and labels, got {kind}{length}. "
                "Use a data set that returns these two."
            )
        x, y = batch
        _check_inputs(x)
        yield x, y


def _check_inputs(x: Any) -> None:
    if not hasattr(x, "to"):
        raise TypeError(
            f"Inputs must be a tensor, got {type(x).__name__}. Convert them first, e.g. with "
            "torch.as_tensor(x)."
        )


@torch.no_grad()
def _encode(encoder: Callable[[Tensor], Tensor], x: Tensor, device: Any) -> Tensor:
    """What the encoder returns, where that is a tensor with at most two axes."""
    z = encoder(x if device is None else x.to(device))
    return z.flatten(1) if isinstance(z, Tensor) and z.dim() > 2 else z


def _check_tensor(name: str, value: Any) -> None:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    if not dense:
        kind = f"a {value.layout} one" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name} must be a dense tensor, got {kind}. Convert or pick it first, e.g. "
            "with torch.as_tensor(), to_dense() or [0]."
        )


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"batch_size must be an integer of at least 1, got {batch_size!r}. Leave it out, or "
            "lower it only as far as memory asks for."
        )


def _check_features(z: Tensor, dimension: int) -> None:
    _check_tensor("Features", z)
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(
            f"Expected floating point features of shape B x D, got {z.dtype} of shape "
            f"{tuple(z.shape)}. Pool and flatten them first, e.g. with z.flatten(1)."
        )
    if z.shape[1] != dimension:
        raise ValueError(
            f"The head takes {dimension} features, got {z.shape[1]}. Use the features of the "
            "layer before the head, for fitting and scoring alike."
        )


def _check_labels(labels: Tensor, z: Tensor) -> Tensor:
    _check_tensor("Labels", labels)
    if labels.dim() != 1 or labels.shape[0] != z.shape[0]:
        raise ValueError(
            f"Expected one label per feature row ({z.shape[0]}), got labels of shape "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Labels must be integers, got {labels.dtype}. Use labels.long().")
    return labels.detach().long()


def _check_maps(outputs: List[Any], z: Tensor) -> None:
    """Whether the output of a layer are maps whose means are the features."""
    if len(outputs) != 1:
        raise ValueError(
            f"The layer for the heat map must run once, but ran {len(outputs)} times. Pass a "
            "module of the encoder's network."
        )
    (maps,) = outputs
    if not (isinstance(maps, Tensor) and maps.dim() == 4 and maps.shape[:2] == z.shape):
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(
            f"The layer for the heat map must return maps of shape B x {z.shape[1]} x H x W, one "
            f"for each feature, got {got}. Pass the module before global average pooling."
        )
    difference = (maps.mean(dim=(2, 3)) - z).abs()
    # features that are not finite are told of later
    if len(z) and bool(difference.amax() > 1e-2 * z.abs().amax()):
        raise ValueError(
            "The features are not the means of the maps of this layer, so relevance can't be "
            "shared among positions. Pass the module before global average pooling, or explain "
            "without a layer."
        )


def _heat_map(maps: Tensor, slope: Tensor, neurons: Tensor, size: Tuple[int, ...]) -> Tensor:
    """
    Relevance of some neurons for each position, of the size of the inputs.

    :param maps: feature maps of shape :math:`B \\times D \\times h \\times w`
    :param slope: relevance per unit of each feature, of shape :math:`B \\times D`
    :param neurons: which to add up, of shape :math:`B \\times n`
    :param size: height and width
    """
    height, width = maps.shape[2:]
    chosen = maps.double().flatten(2).gather(1, neurons[:, :, None].expand(-1, -1, height * width))
    heat = torch.einsum("bnp,bn->bp", chosen, slope.gather(1, neurons)) / (height * width)
    spread = [_spread(n, large, heat) for n, large in zip((height, width), size)]
    return (spread[0] @ heat.view(-1, height, width) @ spread[1].T).float()


def _spread(n: int, large: int, like: Tensor) -> Tensor:
    """
    Bilinear interpolation along one axis as a matrix, of which each column adds up to 1, so that
    what is spread keeps its sum.
    """
    eye = torch.eye(n, dtype=like.dtype, device=like.device)[None]
    matrix = F.interpolate(eye, large, mode="linear", align_corners=False)[0].T
    return matrix / matrix.sum(dim=0)


def _scores(z: Tensor, parts: List[Tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Scores from their parts, if all of them are numbers."""
    scores = torch.cat([(distances.amin(dim=1) + bias) * r for distances, bias, r in parts])
    # the only device-to-host read
    finite, sound = torch.stack([_finite(z), torch.isfinite(scores)]).tolist()
    _raise_if_not_finite(finite)
    _raise_if_not_sound(all(sound))
    return scores.clamp(max=torch.finfo(torch.float32).max).float()


def _finite(z: Tensor) -> Tensor:
    """Whether float32 features are finite, which is to say their sums in float64."""
    sums = [part.sum(dim=1, dtype=torch.float64) for part in z.split(512)]
    return torch.isfinite(torch.cat(sums))


def _raise_if_not_finite(finite: List[bool]) -> None:
    broken = finite.count(False)
    if broken:
        raise ValueError(
            f"{broken} of {len(finite)} feature rows contain NaN or infinite values. Remove or "
            "repair them first, e.g. keep z[z.isfinite().all(dim=1)]."
        )


def _raise_if_not_sound(sound: bool) -> None:
    if not sound:
        raise ValueError(
            "The head gives NaN or infinite relevance for finite features. Check its weights."
        )
