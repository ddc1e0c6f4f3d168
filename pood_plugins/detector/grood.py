r"""
GROOD scores an input by a gradient that needs no backward pass: the derivative of a
nearest-class-prototype loss with respect to an artificial *OOD prototype*, a point in feature
space that stands for everything unknown. Training samples pull this point in a few typical ways;
inputs that pull differently are outliers.

It is the method of *GROOD: GRadient-Aware Out-of-Distribution Detection* by ElAraby, Sahoo,
Pequignot, Novello and Paull (`TMLR 2025 <https://arxiv.org/abs/2312.14427>`__). By released code,
their implementation in `OpenOOD <https://github.com/Jingkang50/OpenOOD>`__ is meant; ``info`` has
their own repository.

The gradient in closed form
---------------------------

Let :math:`z \in \mathbb{R}^D` be the penultimate feature of an input, :math:`\mu_c` the prototype
of the ID class :math:`c = 1, \dots, C`, the mean feature of its training samples, :math:`o` the
OOD prototype, and :math:`T` a temperature, 1 in the paper. Distances become logits and
probabilities,

.. math::
    \ell_k = -\frac{\lVert z - \mu_k \rVert_2}{T}, \qquad
    p_k = \frac{e^{\ell_k}}{\sum_j e^{\ell_j}}, \qquad
    j, k \in \{1, \dots, C, o\}, \quad \mu_o = o,

and the loss :math:`L = \log \sum_k e^{\ell_k} - \ell_y` is their cross-entropy for an ID class
:math:`y`. The OOD prototype occurs in :math:`\ell_o` alone, and :math:`y \neq o`, hence

.. math::
    \frac{\partial L}{\partial o}
    = \frac{\partial L}{\partial \ell_o} \, \frac{\partial \ell_o}{\partial o}
    = p_o \cdot \frac{1}{T} \, \frac{z - o}{\lVert z - o \rVert_2}.

The class :math:`y` has dropped out. Without the constant :math:`1 / T`, which changes no ranking,
this is the gradient :math:`g`: it points from the OOD prototype to the feature, and its length is
:math:`p_o`. The bank holds the gradients :math:`g_i` of :math:`M` training samples, and the score
is the distance to the :math:`k`-th nearest of them. With :math:`\varphi_i` the angle between
:math:`g` and :math:`g_i`,

.. math::
    \lVert g - g_i \rVert_2^2 = (p_o - p_{o,i})^2 + 2 \, p_o \, p_{o,i} \, (1 - \cos \varphi_i),

so directions decide among samples of similar probability, and probabilities otherwise.

Where to take the OOD prototype from
------------------------------------

========================  ==========================  ==========================================
Source                    Needs                       Use it when
========================  ==========================  ==========================================
``"outliers"``            samples with label < 0      example outliers are at hand
``"mixup"``               ID features, two classes    only ID data are at hand; mixes at the
                                                      penultimate layer
``"mean"``                ID features                 a baseline without settings is wanted
:func:`.mixup_prototype`  ID images, a network in     the paper's synthetic samples: mix-up at an
                          two parts                   early layer
:func:`.noise_prototype`  the image shape             no data but the fitted ones may be used
any tensor of shape D     nothing                     the prototype comes from elsewhere
========================  ==========================  ==========================================

Mix-up takes the mean of :math:`\lambda z + (1 - \lambda) \mu_r` over ID samples, where :math:`r`
is the runner-up class, that of the second-largest logit. At an early layer, early features and
their class means are mixed so, and go through the rest of the network.

A prototype made of outliers has seen their kind. Do not compare its scores on that kind of data
with those of detectors that have seen none.

Paper and released code
-----------------------

==============  =======================  ==========================  ===========================
Step            Paper                    Released code               Here
==============  =======================  ==========================  ===========================
gradient        of the loss with         automatic differentiation,  closed form, the same up to
                respect to o             one call per sample         rounding
target y        not in the parts that    the classifier's            none is needed
                we know                  prediction
prototypes      mean of each class       of all training samples     as released
bank            all training samples     those that are classified   as released;
                                         correctly                   ``bank_fraction`` of them,
                                                                     ``bank_dtype``
search          nearest gradient         approximate, k = 1          exact, any ``k``
score           distance                 squared and negated         distance: the same ranking
OOD prototype   synthetic samples        mean of OOD validation      ``"auto"``: outliers if
                                         images; others are options  there are any, else mix-up
mix-up          early layer, weight λ    early layer, weight 0.5,    penultimate or early layer,
                                         100 samples                 weight 0.5, 1000 samples
noise           –                        uniform and blurred, not    the same, or normalized;
                                         normalized; 10 of each 100  a tenth of all
temperature     –                        –                           1, which is none; a number;
                                                                     ``"auto"``
==============  =======================  ==========================  ===========================

In the benchmarks of the released code, the OOD validation images are of the same data set as one
of the test sets. Its option to use only the outliers that are farthest from the class prototypes
is left out here. ``temperature`` is an addition, because a softmax over plain distances means
something else for every scale of the features: ``"auto"`` ties it to their spread, by a factor
found in experiments.

Costs
-----

For :math:`N` training samples, of which :math:`M \leq N` are in the bank:

===============================  ====================================  ==========================
Step                             Time                                  Memory
===============================  ====================================  ==========================
fit                              :math:`O(NCD)`                        bank and a chunk
score of :math:`B` samples       :math:`O(BCD + BMD)`                  bank and a chunk
what is kept                                                           :math:`(C + M) D` numbers
===============================  ====================================  ==========================

A chunk is ``batch_size`` rows with what is computed of them. For a bank in float16, or of a
fraction of the samples, a fit passes over its loader twice or three times, so that it never holds
all features. The :math:`B \times M` distances never exist at once.

When not to use it
------------------

- **Unlabeled data, or a single class.** Prototypes need classes, and mix-up two of them.
- **Classes that are no clusters.** The mean of a class with several far apart modes is typical of
  none of them.
- **Features of an extreme scale**, with a fixed temperature. Where distances are large, all
  :math:`p_o` vanish; where they are small, all are about :math:`1 / (C + 1)`. A warning tells of
  the former; ``temperature="auto"`` follows the scale.
- **Unclean ID data, with k = 1.** One outlier among the training samples, if it is classified as
  labeled, makes all that resemble it typical. A larger ``k`` needs as many of them.
- **Few samples per class.** The prototype is a mean of few, and so is all that depends on it.

Reference
---------

..  autoclass:: pood_plugins.detector.GROOD
    :members:
    :inherited-members:
    :show-inheritance:

..  autoclass:: pood_plugins.detector.grood.Explanation

..  autofunction:: pood_plugins.detector.grood_gradients

..  autofunction:: pood_plugins.detector.mixup_prototype

..  autofunction:: pood_plugins.detector.noise_prototype
"""

import logging
import math
import warnings
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

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
from torch.nn import Module
from torch.utils.data import DataLoader
from typing_extensions import Self

from ..neighbors import ScaledRows, kth_distance, nearest_rows

log = logging.getLogger(__name__)

_Batches = Callable[[bool], Iterable[Tuple[Tensor, Tensor]]]

_SOURCES = ("auto", "outliers", "mixup", "mean")
# of the mean distance of ID samples to their prototype, for temperature="auto"
_SPREAD_FRACTION = 1 / 8


def grood_gradients(
    z: Tensor,
    prototypes: Tensor,
    ood_prototype: Tensor,
    temperature: Union[float, Tensor] = 1.0,
) -> Tensor:
    """
    Gradients of the nearest-class-prototype loss with respect to the OOD prototype :math:`o`.

    The loss is the cross-entropy of the logits :math:`-d / T` against any ID class, where
    :math:`d` are the Euclidean distances of the feature :math:`z` to the class prototypes and to
    :math:`o`. Its gradient is

    .. math:: g(z) = p_o(z) \\, \\frac{z - o}{\\lVert z - o \\rVert_2}

    with the probability :math:`p_o` that the softmax assigns to the OOD prototype. The constant
    factor :math:`1 / T` is left out: it changes no ranking, and without it
    :math:`\\lVert g \\rVert = p_o` for every temperature. Where :math:`z = o`, the gradient is
    zero. All is computed in float64, so that a probability of 1e-30 is not lost.

    :see Paper: `GROOD, equation 5 <https://arxiv.org/abs/2312.14427>`__

    :param z: features of shape :math:`B \\times D`
    :param prototypes: class prototypes of shape :math:`C \\times D`
    :param ood_prototype: OOD prototype of shape :math:`D`
    :param temperature: :math:`T > 0`, a number or a tensor of no dimension, in units of the
        feature distance
    :return: gradients of shape :math:`B \\times D`, float64 if ``z`` is float64, otherwise float32
    """
    probability, distance = _probability(z, prototypes, ood_prototype, temperature)
    gradients = _gradients(z, ood_prototype, probability, distance)
    return gradients if z.dtype == torch.float64 else gradients.float()


def _probability(
    z: Tensor, prototypes: Tensor, ood_prototype: Tensor, temperature: Union[float, Tensor]
) -> Tuple[Tensor, Tensor]:
    """Softmax probability of the OOD prototype, and distance to it, of shape B, in float64."""
    origin = ood_prototype.double()
    offset = z.double() - origin
    distance = offset.norm(dim=1)
    points = torch.cat([prototypes.double() - origin, torch.zeros_like(origin)[None]])
    # Of features this far away only the direction counts, but the distances to the prototypes
    # would agree in all their digits: bring them to where float64 tells these apart.
    reach = 1e8 * points.norm(dim=1).amax()
    farthest = reach.clamp(min=torch.finfo(torch.float64).tiny)
    offset *= (reach / torch.maximum(distance, farthest))[:, None]
    # by differences: the expansion of the square would cost the digits that the softmax needs
    distances = torch.cdist(offset, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.amin(dim=1, keepdim=True)
    # relative to the nearest, so that a tiny temperature does not overflow every logit
    probabilities = ((nearest - distances) / temperature).softmax(dim=1)
    return probabilities[:, -1], distance


def _gradients(z: Tensor, ood_prototype: Tensor, probability: Tensor, distance: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    factor = probability / distance.clamp(min=tiny)
    return (z.double() - ood_prototype.double()).mul_(factor[:, None])


@dataclass(frozen=True)
class Explanation:
    """
    Why :class:`GROOD` gave its scores to B samples.
    """

    #: scores of shape :math:`B`, those of :meth:`GROOD.predict`
    score: Tensor
    #: id of the class whose prototype is nearest, of shape :math:`B`
    nearest_class: Tensor
    #: feature distances to the class prototypes, of shape :math:`B \times C`
    distances: Tensor
    #: softmax probability of the OOD prototype, which is the norm of the gradient, of shape
    #: :math:`B`
    probability: Tensor
    #: training samples with the nearest gradients, nearest first: their positions in the fitted
    #: data, of shape :math:`B \times n`
    neighbors: Tensor
    #: distances to their gradients, of shape :math:`B \times n`; the score is the ``k``-th
    neighbor_distances: Tensor


class GROOD(FeaturesDetector):
    """
    Implements *GROOD: GRadient-Aware Out-of-Distribution Detection*.

    Fitting computes the class prototypes (the mean feature of each ID class), an OOD prototype
    :math:`o`, and a bank with the gradients :math:`g` of the training samples (see
    :func:`grood_gradients`). The outlier score of a feature :math:`z` is the distance of its
    gradient to the :math:`k`-th nearest gradient of the bank:

    .. math:: \\lVert g(z) - g_{(k)} \\rVert_2 \\quad \\text{with} \\quad g(z) = p_o(z) \\,
        \\frac{z - o}{\\lVert z - o \\rVert_2}

    where :math:`p_o(z)` is the softmax probability of the OOD prototype among all prototypes, with
    the logits :math:`-\\lVert z - \\cdot \\rVert_2 / T`. Scores lie in :math:`[0, 2]`. The
    released code negates (and squares) the distance; here, larger means more outlying.

    Everything is a closed form of the penultimate features: no gradient is computed by
    automatic differentiation, neither in fitting nor in scoring.

    .. note:: Encoder and head are used in the mode they are in. Call ``model.eval()`` first.

    .. rubric:: Examples

    .. code-block:: python

        model = WideResNet(num_classes=10).eval()
        detector = GROOD(encoder=model.features, head=model.fc)
        detector.fit(train_loader)
        scores = detector(images)

    With example outliers, labeled with a negative number, in the same loader:

    .. code-block:: python

        loader = DataLoader(ConcatDataset([train_set, outliers]), batch_size=128)
        detector = GROOD(model.features, model.fc, ood_prototype="outliers").fit(loader)
    """

    #: Publication and tasks.
    info = DetectorInfo(
        paper=Paper(
            title="GROOD: GRadient-Aware Out-of-Distribution Detection",
            venue="TMLR",
            year=2025,
            url="https://arxiv.org/abs/2312.14427",
            code="https://github.com/mostafaelaraby/Gradient-Aware-OOD-Detection",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )

    requires_fit = True

    #: Default search space for :class:`pytorch_ood.utils.GridSearch`.
    hyperparameter_space = {"k": [1, 10, 50], "temperature": [0.25, 0.5, 1.0, 2.0]}

    def __init__(
        self,
        encoder: Optional[Callable[[Tensor], Tensor]],
        head: Callable[[Tensor], Tensor],
        *,
        ood_prototype: Union[str, Tensor] = "auto",
        n_synthetic: Union[int, float] = 1000,
        mixup: float = 0.5,
        k: Union[int, float] = 1,
        temperature: Union[float, str] = 1.0,
        bank_fraction: float = 1.0,
        bank_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        """
        :param encoder: maps inputs to penultimate features of shape :math:`B \\times D`. Can be
            ``None`` when using ``fit_features(...)`` and ``predict_features(...)`` directly.
        :param head: maps features to logits of shape :math:`B \\times C`. Used in fitting only, to
            find the correctly classified samples and the runner-up classes.
        :param ood_prototype: source of the OOD prototype: ``"outliers"`` (mean feature of the
            samples with label < 0), ``"mixup"`` (mean of synthetic features between a sample and
            the prototype of its runner-up class), ``"mean"`` (mean of the class prototypes), a
            tensor of shape :math:`D`, or ``"auto"``: outliers if the fitted data hold any, else
            mix-up if there are two classes, else the mean.
        :param n_synthetic: number of ID samples mixed for ``"mixup"``, as a count or a fraction;
            if there are fewer, all are used. The released code uses 100, its sweep goes up to
            1000.
        :param mixup: weight of the sample in the mix, in :math:`[0, 1]`. Default is that of the
            released code.
        :param k: which neighbor in the bank the score is taken from, as a count or a fraction of
            the bank; read when scoring. Paper and code use 1.
        :param temperature: temperature :math:`T` of the softmax, in units of the feature distance.
            The paper has none, which is 1. ``"auto"`` is an eighth of the mean distance of the ID
            samples to the prototype of their class.
        :param bank_fraction: fraction of the bank to keep, drawn at random. Memory and scoring
            time are proportional to it.
        :param bank_dtype: ``torch.float32``, or ``torch.float16`` for half the memory: directions
            are kept in half precision and the norm of each gradient beside them, so that a
            probability of 1e-30 still counts. Distances to these rows are as exact as ever, but
            the rows are off by up to :math:`2^{-11}` of their norm.
        :param seed: seed of the random draws for ``"mixup"`` and ``bank_fraction``
        :raises ValueError: if an argument is out of range
        """
        self.encoder = encoder
        self.head = head
        self.ood_prototype = ood_prototype
        self.n_synthetic = n_synthetic
        self.mixup = mixup
        self.k = k
        self.temperature = temperature
        self.bank_fraction = bank_fraction
        self.bank_dtype = bank_dtype
        self.seed = seed

        #: class prototypes, of shape :math:`C \times D`
        self.prototypes_: Optional[Tensor] = None
        #: OOD prototype, of shape :math:`D`
        self.ood_prototype_: Optional[Tensor] = None
        #: gradients of the ID samples, of shape :math:`M \times D`; directions of length about 1
        #: with ``bank_dtype=torch.float16``
        self.bank_: Optional[Tensor] = None
        #: factors of these directions, of shape :math:`M`; None with ``torch.float32``
        self.bank_lengths_: Optional[Tensor] = None
        #: position of each row of the bank in the fitted data, of shape :math:`M`
        self.bank_indices_: Optional[Tensor] = None
        #: class ids of the prototypes, ascending
        self.classes_: Optional[List[int]] = None
        #: temperature of the fit, of no dimension: what ``"auto"`` came to
        self.temperature_: Optional[Tensor] = None
        self._fitted_temperature: Union[float, str, None] = None

        if not callable(head):
            raise ValueError(
                f"GROOD needs a head that maps features to logits, got {type(head).__name__}. "
                "Pass the last layer of the network."
            )
        self._check_hyperparameters()

    def fit(self, data_loader: DataLoader[Any]) -> Self:
        """
        Extracts features and fits the detector. Unlike other detectors, samples with label < 0 are
        kept: they are the example outliers of the source ``"outliers"``.

        At no time is more held than the bank and one batch. A whole bank in float32 is as large as
        the features, which are then kept until they have become the bank. With ``bank_fraction``
        < 1 or ``torch.float16``, they are not, and there is a second pass over the loader; a third
        for ``temperature="auto"``, and for the choice of ``n_synthetic`` samples if the loader's
        data set has OOD samples, no length, or not all classes. The loader must then give the
        same samples each time: no shuffling, no random augmentation.

        :param data_loader: loader yielding batches ``(x, y)`` of training data
        :return: the fitted detector
        :raises ModelNotSetException: if the detector has no encoder
        :raises ValueError: as in :meth:`fit_features`, or if the labels change between passes
        """
        if self.encoder is None:
            raise ModelNotSetException("fit() needs an encoder. Pass one, or use fit_features().")
        self._check_hyperparameters()
        encoder, device = self.encoder, self.device
        if device is None:
            device = torch.device("cpu")
            log.warning(f"No device set. Will use '{device}'.")
        dimension = getattr(self.head, "in_features", None)

        def features() -> Iterator[Tuple[Tensor, Tensor]]:
            for x, y in _pairs(data_loader):
                z = _encode(encoder, x, device)
                _check_features(z, dimension)
                y = _check_labels(y, z).cpu()
                if len(y):
                    yield z.detach().float(), y

        if self.bank_fraction < 1.0 or self.bank_dtype != torch.float32:
            dataset: Any = getattr(data_loader, "dataset", None)
            expected = len(dataset) if hasattr(dataset, "__len__") else 0
            return self._fit(lambda last: features(), expected=expected)
        batches = list(features())
        labels = _concatenate([y for _, y in batches])

        def kept(last: bool) -> Iterator[Tuple[Tensor, Tensor]]:
            while last and batches:
                yield batches.pop(0)  # makes room for the bank
            yield from batches

        return self._fit(kept, labels)

    def fit_features(self, z: Tensor, labels: Tensor, batch_size: int = 4096) -> Self:
        """
        Computes prototypes and bank from features. Warns of head columns without ID samples (these
        classes get no prototype), of a bank without correctly classified samples, and of vanishing
        gradients.

        The features may be a memory map. Only ``batch_size`` of them are read at once.

        :param z: training features of shape :math:`N \\times D`
        :param labels: class labels of shape :math:`N`; samples with label < 0 are example outliers
        :param batch_size: number of samples processed at once; lower it to reduce peak memory
        :return: the fitted detector
        :raises ValueError: if the features are not finite or of the wrong shape, labels do not
            match them or exceed the head's columns, there is no ID sample, the source of the OOD
            prototype lacks data, the head gives no finite logits, or a hyper-parameter is out of
            range. The previous fit is kept.
        :raises TypeError: if features or labels are no dense tensors
        """
        self._check_hyperparameters()
        _check_batch_size(batch_size)
        _check_features(z, getattr(self.head, "in_features", None))
        # labels steer shapes, so they live on the host, where loaders put them
        labels = _check_labels(labels, z).cpu()
        device = self.device or z.device

        def batches(last: bool) -> Iterator[Tuple[Tensor, Tensor]]:
            for rows, y in zip(z.detach().split(batch_size), labels.split(batch_size)):
                if len(y):
                    yield rows.to(device).float(), y

        return self._fit(batches, labels)

    @torch.no_grad()
    def _fit(self, batches: _Batches, labels: Optional[Tensor] = None, expected: int = 0) -> Self:
        """
        :param batches: begins a pass over features (float32, on the device) and labels (on the
            host), told whether it is the last
        :param labels: all labels, if features are kept, so that a pass costs little. Otherwise it
            runs the network, and there are as few as possible.
        :param expected: probable number of samples, if they are not kept
        """
        kept = labels is not None
        known_classes = None
        if labels is not None:
            known_classes = labels[labels >= 0].unique()
            expected = int((labels >= 0).sum())
        tally = self._tally(batches, expected, known_classes)
        labels, known = tally.labels, tally.labels >= 0
        n_known = int(known.sum())
        if n_known == 0:
            raise ValueError("No ID samples (labels >= 0) to fit on. Pass ID training data.")

        device, (columns, dimension) = tally.sums.device, tally.sums.shape
        columns -= 1
        counts = _columns(labels, columns).bincount(minlength=columns + 1)
        means = (tally.sums / counts.clamp(min=1).to(device)[:, None]).float()
        classes = counts[:-1].nonzero()[:, 0]
        prototypes = means[classes.to(device)]

        # what could not be known before the end of the first pass
        generator = torch.Generator().manual_seed(self.seed)
        source = self._source(dimension, int(counts[-1]), len(classes))
        mix, mix_again = tally.mix, False
        if source == "mixup":
            chosen = self._choose(n_known, generator)
            mix_again = not mix.mixed(chosen, classes)
            mix = _Mix(chosen, classes) if mix_again else mix
        spread = torch.zeros((), dtype=torch.float64, device=device)
        for z, y in batches(False) if mix_again or self.temperature == "auto" else ():
            if mix_again:
                mix.add(z, y, _logits(self.head, z))
            own = means[_columns(y, columns).to(device)].double()
            spread += ((z.double() - own).norm(dim=1) * (y >= 0).to(device)).sum()

        if isinstance(self.ood_prototype, Tensor):
            ood_prototype = self.ood_prototype.detach().to(device, torch.float32, copy=True)
        elif source == "outliers":
            ood_prototype = means[-1].clone()
        elif source == "mean":
            ood_prototype = prototypes.double().mean(dim=0).float()
        else:
            ood_prototype = mix.mean(prototypes, self.mixup)
        if isinstance(self.temperature, str):
            temperature = _SPREAD_FRACTION * spread / n_known
        else:
            temperature = torch.tensor(self.temperature, dtype=torch.float64, device=device)

        def probability(z: Tensor) -> Tuple[Tensor, Tensor]:
            return _probability(z, prototypes, ood_prototype, temperature)

        # features that are kept tell before the bank is made which gradients vanish
        probabilities = [probability(z) for z, _ in batches(False)] if kept else None
        vanished = torch.empty(0, dtype=torch.bool, device=device)
        if probabilities is not None:
            norms = torch.cat([p * (d > 0) for p, d in probabilities])
            vanished = (norms / math.sqrt(dimension)).float() == 0
        flags = torch.stack([torch.isfinite(ood_prototype).all(), temperature > 0])
        # the only device-to-host read of a fit
        packed = torch.cat([flags, tally.finite, tally.sound, tally.correct, vanished]).cpu()
        flags, finite, sound, correct, vanished = packed.split(
            [2, len(labels), len(labels), len(labels), len(vanished)]
        )
        _raise_if_not_finite(finite)
        if not sound.all():
            raise ValueError(
                f"The head maps {int((~sound).sum())} of {len(sound)} finite feature rows to NaN "
                "or infinite logits. Check its weights, and use head.float() if it is in half "
                "precision."
            )
        if not bool(flags[0]):
            raise ValueError(
                "The OOD prototype contains NaN or infinite values. Compute it from finite "
                "features."
            )
        if not bool(flags[1]):
            raise ValueError(
                "temperature='auto' needs ID features that differ within their class, but all lie "
                "on the prototype of theirs. Check the features, or give a number."
            )

        rows = correct.nonzero()[:, 0]
        if len(rows) == 0:
            rows = known.nonzero()[:, 0]
            warnings.warn(
                "The head classifies no training sample correctly. The bank holds all of them "
                "instead. Check that encoder, head and labels belong together."
            )
        if self.bank_fraction < 1.0:
            size = max(1, int(self.bank_fraction * len(rows)))
            rows = rows[torch.randperm(len(rows), generator=generator)[:size]].sort().values
        bank, lengths, n_vanished = self._make_bank(
            batches(True), labels, rows, ood_prototype, probability, probabilities
        )
        share = float(vanished[rows].float().mean() if kept else n_vanished / len(rows))
        if share > 0.01:
            warnings.warn(
                f"{share:.0%} of the bank have a gradient of norm 0, so their scores tie. Use a "
                f"larger temperature than {self.temperature}, or smaller features."
            )
        if len(classes) < columns:
            missing = sorted(set(range(columns)) - set(classes.tolist()))
            warnings.warn(
                f"No ID sample for {len(missing)} of the {columns} head columns "
                f"({_shorten(missing)}). These classes get no prototype."
            )
        self.bank_, self.bank_lengths_ = bank, lengths
        self.bank_indices_ = rows.to(device)
        self.prototypes_ = prototypes
        self.ood_prototype_ = ood_prototype
        self.classes_ = classes.tolist()
        self.temperature_ = temperature
        self._fitted_temperature = self.temperature
        return self

    def _tally(self, batches: _Batches, expected: int, classes: Optional[Tensor]) -> "_Tally":
        """The first pass. Mixes features on the assumption of so many samples of these classes."""
        labels: List[Tensor] = []
        finite: List[Tensor] = []
        sound: List[Tensor] = []
        correct: List[Tensor] = []
        sums, mix = torch.zeros(1, 0), _Mix(torch.zeros(0, dtype=torch.bool), torch.arange(0))
        for z, y in batches(False):
            logits = _logits(self.head, z)
            columns = logits.shape[1]
            if not labels:
                sums = torch.zeros(columns + 1, z.shape[1], dtype=torch.float64, device=z.device)
                chosen = self._choose(expected, torch.Generator().manual_seed(self.seed))
                every = torch.arange(columns)
                # a label beyond the head is told of when its batch comes
                mix = _Mix(chosen, every if classes is None else classes[classes < columns])
            if int(y.max()) >= columns:
                raise ValueError(
                    f"Label {int(y.max())} exceeds the {columns} columns of the head. Labels must "
                    "be class indices of this head; mark outliers with a negative label."
                )
            column = _columns(y, columns).to(z.device)
            sums.index_add_(0, column, z.double())
            if isinstance(self.ood_prototype, str) and self.ood_prototype in ("auto", "mixup"):
                mix.add(z, y, logits)
            # a sum of float32 numbers in float64 is finite if, and only if, all of them are
            finite.append(torch.isfinite(z.sum(dim=1, dtype=torch.float64)))
            # a class may be ruled out by -inf
            sound.append(logits.amax(dim=1) < math.inf)
            correct.append(logits.argmax(dim=1) == column)
            labels.append(y)
        found = [_concatenate(parts) for parts in (labels, finite, sound, correct)]
        return _Tally(mix, sums, *found)

    def _make_bank(
        self,
        batches: Iterable[Tuple[Tensor, Tensor]],
        labels: Tensor,
        rows: Tensor,
        ood_prototype: Tensor,
        probability: Callable[[Tensor], Tuple[Tensor, Tensor]],
        probabilities: Optional[List[Tuple[Tensor, Tensor]]],
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        """
        The last pass, which writes each gradient where it stays.

        :param labels: those of the first pass
        :param rows: samples of the bank, ascending
        :param probabilities: of each batch, if they are known
        :return: bank, its lengths in half precision, and the number of gradients that are 0,
            counted if the probabilities are not known
        """
        in_bank = torch.zeros(len(labels), dtype=torch.bool)
        in_bank[rows] = True
        device, dimension = ood_prototype.device, len(ood_prototype)
        half = self.bank_dtype == torch.float16
        bank = torch.empty(len(rows), dimension, dtype=self.bank_dtype, device=device)
        lengths = torch.empty(len(rows), device=device) if half else None
        n_vanished = torch.zeros((), dtype=torch.long, device=device)
        passed, filled = 0, 0
        for index, (z, y) in enumerate(batches):
            if not torch.equal(y, labels[passed : passed + len(y)]):
                break
            of_batch = in_bank[passed : passed + len(y)].nonzero()[:, 0].to(device)
            passed += len(y)
            p, d = probability(z) if probabilities is None else probabilities[index]
            gradients = _gradients(z[of_batch], ood_prototype, p[of_batch], d[of_batch])
            part = slice(filled, filled + len(of_batch))
            filled += len(of_batch)
            if probabilities is None:
                n_vanished += (gradients.float() == 0).all(dim=1).sum()
            if lengths is not None:
                scaled = ScaledRows.pack(gradients)
                gradients, lengths[part] = scaled.directions, scaled.lengths
            bank[part] = gradients
        if passed != len(labels):
            raise ValueError(
                "The loader gave other labels in another pass. Turn shuffling off, or extract the "
                "features once and use fit_features()."
            )
        return bank, lengths, n_vanished

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
    def predict_features(self, z: Tensor, batch_size: int = 16384) -> Tensor:
        """
        :param z: features of shape :math:`B \\times D`
        :param batch_size: number of samples processed at once; lower it to reduce peak memory
        :return: outlier scores of shape :math:`B`, float32, on the detector's device
        :raises RequiresFittingException: if the detector was not fitted, or if ``temperature`` was
            changed since
        :raises ValueError: if the features are not finite or of the wrong shape, or ``k`` exceeds
            the bank
        """
        prototypes, ood_prototype, bank, temperature = self._fitted_state()
        self._check_hyperparameters()
        _check_features(z, bank.shape[1])
        lengths = self.bank_lengths_
        rows = bank if lengths is None else ScaledRows(bank, lengths)

        def gradients(chunk: Tensor) -> Tensor:
            return grood_gradients(chunk, prototypes, ood_prototype, temperature)

        z = z.detach().to(bank.device).float()
        k = _count("k", self.k, len(bank))
        return kth_distance(z, rows, k, batch_size, transform=gradients)

    def explain(self, x: Tensor, n_neighbors: int = 5) -> Explanation:
        """
        :param x: inputs, passed through the encoder as it is (call ``model.eval()`` before)
        :param n_neighbors: see :meth:`explain_features`
        :return: why these inputs have their scores
        :raises ModelNotSetException: if the detector has no encoder
        :raises RequiresFittingException: if the detector was not fitted
        :raises ValueError: as in :meth:`explain_features`
        """
        if self.encoder is None:
            raise ModelNotSetException(
                "explain() needs an encoder. Pass one, or use explain_features()."
            )
        self._fitted_state()
        _check_inputs(x)
        return self.explain_features(_encode(self.encoder, x, self.device), n_neighbors)

    @torch.no_grad()
    def explain_features(
        self, z: Tensor, n_neighbors: int = 5, batch_size: int = 16384
    ) -> Explanation:
        """
        :param z: features of shape :math:`B \\times D`
        :param n_neighbors: number of training samples to name, at most those of the bank
        :param batch_size: number of samples processed at once; lower it to reduce peak memory
        :return: why these features have their scores
        :raises RequiresFittingException: as in :meth:`predict_features`
        :raises ValueError: likewise, or if ``n_neighbors`` is below 1
        """
        prototypes, ood_prototype, bank, temperature = self._fitted_state()
        indices = self.bank_indices_
        if indices is None:
            raise RequiresFittingException(
                "The detector was fitted by a version that did not keep what explanations need. "
                "Call fit() again."
            )
        self._check_hyperparameters()
        _check_features(z, bank.shape[1])
        lengths = self.bank_lengths_
        rows = bank if lengths is None else ScaledRows(bank, lengths)
        k = _count("k", self.k, len(bank))
        n = min(_count("n_neighbors", n_neighbors, len(bank)), len(bank))
        z = z.detach().to(bank.device).float()

        def gradients(chunk: Tensor) -> Tensor:
            return grood_gradients(chunk, prototypes, ood_prototype, temperature)

        distances, found = nearest_rows(z, rows, max(k, n), batch_size, transform=gradients)
        probabilities, parts = [], []
        for chunk in z.split(batch_size):
            p, _ = _probability(chunk, prototypes, ood_prototype, temperature)
            probabilities.append(p.float())
            mode = "donot_use_mm_for_euclid_dist"
            parts.append(torch.cdist(chunk, prototypes, compute_mode=mode))
        to_prototypes = torch.cat(parts)
        classes = torch.tensor(self.classes_, device=z.device)
        return Explanation(
            score=distances[:, k - 1].contiguous(),
            nearest_class=classes[to_prototypes.argmin(dim=1)],
            distances=to_prototypes,
            probability=torch.cat(probabilities),
            neighbors=indices[found[:, :n]],
            neighbor_distances=distances[:, :n].contiguous(),
        )

    def __repr__(self) -> str:
        source = "tensor" if isinstance(self.ood_prototype, Tensor) else self.ood_prototype
        return f"GROOD(ood_prototype={source}, k={self.k}, temperature={self.temperature})"

    def _source(self, dimension: int, n_outliers: int, n_classes: int) -> str:
        """The source of the OOD prototype that is meant, if the data suffice for it."""
        source = self.ood_prototype
        if isinstance(source, Tensor):
            if source.shape[0] != dimension:
                raise ValueError(
                    f"The OOD prototype has {source.shape[0]} entries, the features have "
                    f"{dimension}. Compute it with the same encoder."
                )
            return "tensor"
        if source == "auto":
            source = "outliers" if n_outliers else "mixup" if n_classes > 1 else "mean"
        if source == "outliers" and n_outliers == 0:
            raise ValueError(
                "ood_prototype='outliers' needs samples with label < 0 in the fitted data. Add "
                "some, or use 'mixup' or 'mean'."
            )
        if source == "mixup":
            _check_two_classes(n_classes)
        return source

    def _choose(self, n: int, generator: torch.Generator) -> Tensor:
        """Mask of the ID samples to mix, of shape n."""
        size = min(_count("n_synthetic", self.n_synthetic, n), n)
        chosen = torch.ones(n, dtype=torch.bool)
        if size < n:
            chosen[torch.randperm(n, generator=generator)[size:]] = False
        return chosen

    def _fitted_state(self) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        prototypes, ood_prototype = self.prototypes_, self.ood_prototype_
        bank, temperature = self.bank_, self.temperature_
        if prototypes is None or ood_prototype is None or bank is None or temperature is None:
            raise RequiresFittingException()
        if self.temperature != self._fitted_temperature:
            raise RequiresFittingException(
                f"temperature was changed from {self._fitted_temperature} to {self.temperature} "
                "after fitting, and the bank depends on it. Call fit() again."
            )
        return prototypes, ood_prototype, bank, temperature

    def _check_hyperparameters(self) -> None:
        source = self.ood_prototype
        if isinstance(source, Tensor):
            if source.dim() != 1 or not source.is_floating_point():
                raise ValueError(
                    "An OOD prototype given as a tensor must be floating point and of shape D, "
                    f"got {source.dtype} of shape {tuple(source.shape)}. "
                    "Take the mean over the samples."
                )
        elif not isinstance(source, str) or source not in _SOURCES:
            raise ValueError(
                f"ood_prototype must be one of {', '.join(_SOURCES)} or a tensor, got {source!r}."
            )
        _check_fraction("mixup", self.mixup)
        _check_fraction("bank_fraction", self.bank_fraction)
        if self.bank_dtype not in (torch.float32, torch.float16):
            raise ValueError(
                f"bank_dtype must be torch.float32 or torch.float16, got {self.bank_dtype!r}."
            )
        _count("n_synthetic", self.n_synthetic, 1)
        _count("k", self.k, 1)
        number = self.temperature if isinstance(self.temperature, (int, float)) else -1
        if self.temperature != "auto" and not 0 < number < math.inf:
            raise ValueError(
                f"temperature must be a finite number > 0 or 'auto', got {self.temperature!r}. "
                "1.0 is the paper's method."
            )


@torch.no_grad()
def mixup_prototype(
    early: Callable[[Tensor], Tensor],
    late: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    data_loader: Iterable[Sequence[Tensor]],
    weight: float = 0.5,
    n: Union[int, float] = 1000,
    seed: int = 0,
) -> Tensor:
    """
    OOD prototype from synthetic samples, as in the paper: at an early layer, ID samples are mixed
    with the early prototype (mean early feature) of their runner-up class and carried on through
    the rest of the network. The prototype is the mean of the resulting penultimate features.

    Two passes are made over the loader, the first for the prototypes. With fewer samples than
    the loader has, a random subset of the positions in the loader is mixed, so ``seed`` makes
    the result repeatable only for a loader that does not shuffle.

    .. code-block:: python

        early = nn.Sequential(model.conv1, model.layer1, model.layer2, model.layer3).eval()
        late = nn.Sequential(model.layer4, model.avgpool, nn.Flatten()).eval()
        prototype = mixup_prototype(early, late, model.fc, train_loader)
        detector = GROOD(nn.Sequential(early, late), model.fc, ood_prototype=prototype)

    :see Paper: `GROOD, equations 7 and 8, section 5.2 <https://arxiv.org/abs/2312.14427>`__

    :param early: maps inputs to early features of any shape :math:`B \\times \\dots`
    :param late: maps early features to penultimate features of shape :math:`B \\times D`
    :param head: maps penultimate features to logits; its second-largest logit names the runner-up
        class, among the classes that occur in the loader
    :param data_loader: yields batches ``(x, y)``; samples with label < 0 are ignored
    :param weight: weight of the sample in the mix, in :math:`[0, 1]`; the prototype gets the rest
    :param n: number of ID samples to mix, as a count or a fraction; if there are fewer, all are
        used
    :param seed: seed of the choice among them
    :return: OOD prototype of shape :math:`D`, float32
    :raises ValueError: if there are fewer than two classes of ID samples, the passes differ in
        length, the result is not finite, or an argument is out of range
    """
    _check_fraction("weight", weight)
    _count("n", n, 1)
    device = _device_of(early, late, head)

    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums: Dict[int, Tensor] = {}
    counts: Dict[int, int] = {}
    for x, y in data_loader:
        known = y >= 0
        if not known.any():
            continue
        features, y = early(x[known].to(device)), y[known].cpu()
        for label in y.unique().tolist():
            of_class = features[(y == label).to(features.device)].double()
            sums[label] = sums.get(label, zero) + of_class.sum(dim=0)
            counts[label] = counts.get(label, 0) + len(of_class)
    _check_two_classes(len(sums))
    classes = torch.tensor(sorted(sums))
    prototypes = torch.stack([sums[c] / counts[c] for c in classes.tolist()])

    total = sum(counts.values())
    size = min(_count("n", n, total), total)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:size]] = True

    result = zero
    position = 0
    for x, y in data_loader:
        x = x[y >= 0]
        use = chosen[position : position + len(x)]
        position += len(x)
        if position > total:
            break
        if use.any():
            features = early(x[use.to(x.device)].to(device))
            runner_up = _runner_up(_logits(head, late(features)), classes)
            mixed = weight * features + (1 - weight) * prototypes[runner_up].to(features.dtype)
            result = result + late(mixed).flatten(1).double().sum(dim=0)
    if position != total:
        raise ValueError(
            f"The loader gave {total} ID samples, but not as many in the second pass. "
            "Pass a data loader, or a list of batches, that can be iterated over twice."
        )
    prototype = (result / size).float()
    if not bool(torch.isfinite(prototype).all()):
        raise ValueError("The network maps mixed samples to NaN or infinite features. Check it.")
    return prototype


@torch.no_grad()
def noise_prototype(
    encoder: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    shape: Tuple[int, int, int],
    n: int = 1000,
    keep: Union[int, float] = 0.1,
    normalize: Optional[Callable[[Tensor], Tensor]] = None,
    seed: int = 0,
) -> Tensor:
    """
    OOD prototype from noise: the mean feature of blurred images of uniform noise, restricted to
    those with the lowest log-sum-exp of the logits, to which the classifier thus responds least.

    Images are drawn uniformly from :math:`[0, 1]` and blurred with a Gaussian of 7 × 5 pixels
    whose width is drawn from :math:`[0.2, 5]` for each image. The released code calls this
    Gaussian noise, feeds the images to the network without normalization, and keeps the lowest 10
    of each 100; here, they are chosen among all ``n``.

    :see Implementation: `OpenOOD <https://github.com/Jingkang50/OpenOOD>`__

    :param encoder: maps images to features of shape :math:`B \\times D`
    :param head: maps features to logits
    :param shape: image shape :math:`(C, H, W)`, at least 4 pixels high and 3 wide
    :param n: number of images
    :param keep: how many of them to keep, as a count or a fraction
    :param normalize: applied to the images before the encoder, e.g. the dataset's normalization.
        ``None``, as in the released code, applies none.
    :param seed: seed of the noise
    :return: OOD prototype of shape :math:`D`, float32
    :raises ValueError: if an argument is out of range or the network returns no finite features
    """
    if len(shape) != 3 or shape[0] < 1 or shape[1] < 4 or shape[2] < 3:
        raise ValueError(f"shape must be (channels, height >= 4, width >= 3), got {tuple(shape)}.")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    size = min(_count("keep", keep, n), n)
    device = _device_of(encoder, head)
    generator = torch.Generator().manual_seed(seed)

    features, response = [], []
    for start in range(0, n, 100):
        count = min(100, n - start)
        # drawn on the host, so that every device sees the same images
        images = torch.rand((count, *shape), generator=generator)
        sigma = 0.2 + 4.8 * torch.rand(count, generator=generator)
        images = _blur(images, sigma).to(device)
        z = encoder(images if normalize is None else normalize(images)).flatten(1)
        features.append(z.double())
        response.append(_logits(head, z).double().logsumexp(dim=1))
    lowest = torch.cat(response).topk(size, largest=False).indices
    prototype = torch.cat(features)[lowest].mean(dim=0).float()
    if not bool(torch.isfinite(prototype).all()):
        raise ValueError("The network maps noise to NaN or infinite features. Check it.")
    return prototype


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of 7 rows and 5 columns, with one width per image and reflected borders."""
    batch, channels, height, width = images.shape
    x = images.reshape(1, batch * channels, height, width)
    for size, dim in ((7, 2), (5, 3)):
        offsets = torch.arange(size, dtype=images.dtype) - size // 2
        kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(dim=1)
        kernel = kernel.repeat_interleave(channels, dim=0)
        kernel = kernel[:, None, :, None] if dim == 2 else kernel[:, None, None, :]
        padding = (0, 0, size // 2, size // 2) if dim == 2 else (size // 2, size // 2, 0, 0)
        x = F.conv2d(F.pad(x, padding, mode="reflect"), kernel, groups=batch * channels)
    return x.view_as(images)


def _count(name: str, value: Union[int, float], total: int) -> int:
    """A count from an int, which is one already, or from a float, a fraction of ``total``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a count (int) or a fraction (float), got {value!r}.")
    if isinstance(value, float):
        return max(1, int(_check_fraction(name, value) * total))
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


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


def _check_features(z: Tensor, dimension: Optional[int] = None) -> None:
    _check_tensor("Features", z)
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(
            f"Expected floating point features of shape B x D, got {z.dtype} of shape "
            f"{tuple(z.shape)}. Pool and flatten them first, e.g. with z.flatten(1)."
        )
    if dimension is not None and z.shape[1] != dimension:
        raise ValueError(
            f"The detector works on {dimension} features, got {z.shape[1]}. Use the features of "
            "the layer before the head, for fitting and scoring alike."
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


def _raise_if_not_finite(finite: Tensor) -> None:
    broken = int((~finite).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(finite)} feature rows contain NaN or infinite values. Remove or "
            "repair them first, e.g. keep z[z.isfinite().all(dim=1)]."
        )


def _check_two_classes(n_classes: int) -> None:
    if n_classes < 2:
        raise ValueError(
            f"Mix-up needs ID samples of at least two classes, got {n_classes}. "
            "Use another OOD prototype, e.g. 'mean' or 'outliers'."
        )


def _logits(head: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Logits of features whose dtype or device may differ from that of the head."""
    weight = next(head.parameters(), None) if isinstance(head, Module) else None
    logits = head(z if weight is None else z.to(weight.device, weight.dtype))
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(z):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"The head must map features to logits of shape B x C, got {got} for {len(z)} rows. "
            "Pass the last layer of the network."
        )
    return logits.to(z.device)


def _runner_up(logits: Tensor, classes: Tensor) -> Tensor:
    """Positions in ``classes`` of the second-largest logit, other columns ignored."""
    return logits[:, classes.to(logits.device)].topk(2, dim=1).indices[:, 1]


class _Tally(NamedTuple):
    """What the first pass over the training data finds."""

    mix: "_Mix"
    sums: Tensor  # of the features of each column of the head and, in the last row, of outliers
    labels: Tensor  # on the host
    finite: Tensor  # whether the features are
    sound: Tensor  # whether the largest logit is a number
    correct: Tensor  # whether the head is


class _Mix:
    """
    Mean of mixed features. It is linear in them, so that prototypes may follow in the end.
    """

    def __init__(self, chosen: Tensor, classes: Tensor):
        """
        :param chosen: mask of the ID samples to mix
        :param classes: that may be runner-up
        """
        self.chosen, self.classes = chosen, classes
        self.passed = 0
        self.total = torch.zeros(())
        self.runners_up = torch.zeros(len(classes), dtype=torch.float64)

    def add(self, z: Tensor, y: Tensor, logits: Tensor) -> None:
        known = (y >= 0).nonzero()[:, 0]
        use = self.chosen[self.passed : self.passed + len(known)]
        self.passed += len(known)
        rows = known[: len(use)][use].to(z.device)
        if len(rows) == 0 or len(self.classes) < 2:
            return
        self.total = self.total.to(z.device) + z[rows].double().sum(dim=0)
        runner_up = _runner_up(logits[rows], self.classes)
        ones = torch.ones_like(runner_up, dtype=torch.float64)
        self.runners_up = self.runners_up.to(z.device).index_add_(0, runner_up, ones)

    def mixed(self, chosen: Tensor, classes: Tensor) -> bool:
        """Whether these were the samples."""
        same = torch.equal(self.chosen[: len(chosen)], chosen)
        return same and torch.equal(self.classes, classes)

    def mean(self, prototypes: Tensor, weight: float) -> Tensor:
        mixed = weight * self.total + (1 - weight) * (self.runners_up @ prototypes.double())
        return (mixed / int(self.chosen[: self.passed].sum())).float()


def _columns(labels: Tensor, columns: int) -> Tensor:
    """Column of the head of each label, and the one after the last for outliers."""
    return torch.where(labels < 0, columns, labels)


def _concatenate(parts: List[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def _device_of(*modules: Callable[..., Any]) -> torch.device:
    """Device of the first parameter or buffer of the modules (or their methods), else the CPU."""
    for module in (getattr(module, "__self__", module) for module in modules):
        if isinstance(module, Module):
            for tensor in [*module.parameters(), *module.buffers()]:
                return tensor.device
    return torch.device("cpu")


def _shorten(numbers: List[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:10])
    return shown if len(numbers) <= 10 else f"{shown}, ..."
