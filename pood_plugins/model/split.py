"""
Detectors ask for parts of a classifier: the features before its last layer, the last layer, the
feature maps before global pooling, the output of an early stage. :func:`.split_model` cuts any
classifier that ends in an :class:`torch.nn.Linear`, or in a 1×1 convolution that does the same,
into these parts, whether it comes from torchvision, timm, pytorch-ood or your own code:

.. code-block:: python

    split = split_model(torchvision.models.resnet18(weights="DEFAULT").eval())

    split(x)  # the logits, as model(x)
    split.head(split.encoder(x))  # the same in two steps
    split.late(split.early(x))  # the features, cut after "layer3"
    split.map_head(split.feature_maps(x))  # the logits, by way of the maps before global pooling

Each part is a copy of the model's containers that shares all parameters with the model. In it, the
module where the part ends hands its output over and stops the computation, and a part that does
not begin with the inputs puts what it is given in the place of the output of the module it begins
after. The network can be cut after a module if nothing goes around that module, no skip connection
and no parallel branch, which the autograd graph of one forward pass tells.

The copies are made once: a layer that is added, removed or exchanged in the model afterwards is
not noticed. Split the model again after such a change.

.. autofunction:: pood_plugins.model.split_model

.. autoclass:: pood_plugins.model.SplitModel
    :members:
    :exclude-members: forward, train, training
    :show-inheritance:
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.conv import _ConvNd
from typing_extensions import Self

__all__ = ["SplitModel", "split_model"]

_ROWS = 2
_SIZES = (32, 224, 299, 28, 8)
_MAX_STAGES = 4


def split_model(
    model: nn.Module, early: str | None = None, *, example: Tensor | None = None
) -> SplitModel:
    """
    Split a classifier into the parts that detectors ask for.

    The model runs a few times in evaluation mode, on random numbers or on two rows of ``example``.
    Its weights, buffers, gradients, hooks and modes are afterwards what they were.

    :param model: maps inputs to logits of shape :math:`B \\times C`, of which the last step is an
        :class:`torch.nn.Linear`, or a 1×1 :class:`torch.nn.Conv2d` that at most global average
        pooling follows. From a model wrapped by ``torch.compile``, ``DataParallel`` or
        ``DistributedDataParallel`` the model inside is taken.
    :param early: name of the module after which :attr:`SplitModel.early` ends, one of
        :attr:`SplitModel.early_names`. Default is the end of the stage before the last.
    :param example: batch of inputs, needed if the model takes none of these sizes: that of its
        timm configuration, ``model.image_size``, and 32, 224, 299, 28 and 8 pixels.
    :return: the split model
    :raises ValueError: if the model can't be split, with the reason, or not after ``early``, with
        the choices
    """
    model = _unwrap(model)
    with _evaluating(model), torch.inference_mode(False), torch.no_grad():
        trace = _Trace(model, _find_inputs(model, example))
        maps, maps_reason = trace.find_maps()
        stage_names = trace.find_stages(maps)
        if early is not None:
            trace.check_cut(early)
        elif stage_names:
            early = stage_names[-2:][0]
        layer_ends = zip([None, *stage_names], stage_names)
        return SplitModel(
            model,
            head=trace.head,
            encoder=trace.encoder,
            early=trace.part(None, early) if early else None,
            late=trace.part(early, None) if early else None,
            early_name=early,
            early_names=list(trace.cuts),
            feature_maps=trace.part(None, maps) if maps else None,
            map_head=trace.part(maps, trace.head_name) if maps else None,
            layers=[trace.part(begin, end) for begin, end in layer_ends] if maps else None,
            maps_reason=maps_reason,
            stage_names=stage_names,
        )


class _InModeOf(nn.Module):
    """Base of what is made from a model: it is in training mode if and only if the model is."""

    model: nn.Module

    @property
    def training(self) -> bool:
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # nn.Module's constructor sets it

    def train(self, mode: bool = True) -> Self:
        self.model.train(mode)
        return self


class SplitModel(_InModeOf):
    """
    A classifier and its parts, made by :func:`.split_model`. Called with inputs, it returns
    ``head(encoder(x))``, the logits of the model.

    Its one sub-module is the model, so every parameter counts once. The parts share the model's
    parameters and hence its device, and also its mode: ``train()`` or ``eval()`` of a part is that
    of the model. They return contiguous tensors.
    """

    #: the classifier that was split
    model: nn.Module
    #: features to logits: the last linear layer itself. If the network ends in a 1×1 convolution,
    #: an ``nn.Linear`` that holds this convolution: ``weight`` and ``bias`` are read from it, and
    #: ``parameters()`` are the convolution's own, with gradients in the shape of a convolution
    head: nn.Linear
    #: inputs to features of shape :math:`B \times D`: everything before the head
    encoder: nn.Module
    #: inputs to the output of the module ``early_name``
    early: nn.Module | None
    #: output of ``early`` to features
    late: nn.Module | None
    #: name of the module after which ``early`` ends; None, as ``early`` and ``late`` are, if the
    #: network can't be cut anywhere before its head
    early_name: str | None
    #: names of all modules after which the network can be cut, in the order they run
    early_names: list[str]
    #: inputs to the feature maps before global pooling, :math:`B \times C \times H \times W`
    feature_maps: nn.Module | None
    #: feature maps to logits
    map_head: nn.Module | None
    #: consecutive layers from inputs to feature maps, each on the output of the one before
    layers: list[nn.Module] | None
    #: why ``feature_maps``, ``map_head`` and ``layers`` are None; None if they are not
    maps_reason: str | None
    #: names of the modules after which the last stages end; ``layers`` end there, too
    stage_names: list[str]

    def __init__(self, model: nn.Module, **parts: Any):
        """
        :param model: the classifier
        :param parts: the other attributes
        """
        super().__init__()
        self.model = model
        # Not by setattr: registered, the parts would repeat parameters in the state dict.
        self.__dict__.update(parts)

    @property
    def stages(self) -> list[nn.Module] | None:
        """
        The modules named in ``stage_names``, None if there are none. They are the model's own and
        run whenever the model or the split model does: the place for forward hooks.
        """
        return [self.model.get_submodule(name) for name in self.stage_names] or None

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: inputs
        :return: logits of shape :math:`B \\times C`
        """
        logits: Tensor = self.head(self.encoder(x))
        return logits


class _ConvolutionHead(nn.Linear):
    """A 1×1 convolution as linear layer: of its maps, after pooling, it makes what this makes."""

    def __init__(self, convolution: nn.Conv2d):
        nn.Module.__init__(self)  # nn.Linear's would make parameters
        self.convolution = convolution
        self.in_features = convolution.in_channels
        self.out_features = convolution.out_channels

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.convolution.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.convolution.bias


# What a part that begins after a module was given; a context variable, so that threads don't meet.
_GIVEN: ContextVar[Tensor] = ContextVar("_GIVEN")


class _Part(_InModeOf):
    """A part of a model: a copy of its containers in which some modules are replaced."""

    def __init__(
        self,
        model: nn.Module,
        replacements: dict[str, nn.Module],
        end: str,
        inputs: Tensor | None,
        exposed: list[str],
    ):
        """
        :param model: the model
        :param replacements: what stands in the place of its modules, by name
        :param end: name of the module after which the part ends
        :param inputs: shape of the model's inputs if the part does not begin with them
        :param exposed: modules whose running statistics placeholders may spoil in training mode
        """
        super().__init__()
        self.__dict__["model"] = model  # not registered: this part's parameters are the network's
        self.network, self._containers = _copy_with(model, replacements, end)
        self._inputs = inputs
        self._exposed = exposed

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._exposed:
            raise RuntimeError(
                "in training mode, this part of the model may spoil the running statistics of "
                f"{', '.join(self._exposed)}: call eval(), or cut the model after another module"
            )
        for copy, original in self._containers:
            copy.training = original.training
        token = _GIVEN.set(x)
        try:
            self.network(x if self._inputs is None else _placeholder(self._inputs, x))
        except _Reached as reached:
            return reached.output.contiguous()
        finally:
            _GIVEN.reset(token)
        raise RuntimeError("the forward pass did not come to the module where this part ends")


class _Reached(Exception):
    """Takes the output out of the forward pass of a part."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output


class _StandIn(nn.Module):
    """In the place of a module, which the network may ask for that module's attributes."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.__dict__["original"] = original  # not registered: its parameters may be of no use

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # copy and pickle ask for the object's own
                raise
            return getattr(self.__dict__["original"], name)


class _End(_StandIn):
    """Around the module after which a part ends, or around its replacement."""

    def __init__(self, original: nn.Module, module: nn.Module):
        super().__init__(original)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _Reached(self.module(*args, **kwargs))


class _Begin(_StandIn):
    """In the place of the module after which a part begins."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _GIVEN.get().clone()  # the next module may work in place


class _Outside(_StandIn):
    """In the place of a module that does not belong to a part."""

    def __init__(self, original: nn.Module, output: Any):
        super().__init__(original)
        self.output = _map_tensors(_shape_of, output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _GIVEN.get()
        return _map_tensors(lambda shape: _placeholder(shape, given), self.output)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_map_tensors(function, item) for item in value)
    return function(value) if isinstance(value, Tensor) else value


def _shape_of(x: Tensor) -> Tensor:
    return x.detach().to("meta")


def _placeholder(shape_of: Tensor, given: Tensor) -> Tensor:
    """
    NaN in the shape that was traced, with as many rows as are given. If it were used after all,
    the part would return NaN.
    """
    shape = list(shape_of.shape)
    if shape and shape[0] % _ROWS == 0:
        shape[0] = shape[0] // _ROWS * len(given)
    floating = shape_of.is_floating_point()
    dtype = given.dtype if floating and given.is_floating_point() else shape_of.dtype
    return given.new_full(shape, float("nan") if floating else 0, dtype=dtype)


def _copy_with(
    model: nn.Module, replacements: dict[str, nn.Module], end: str | None = None
) -> tuple[nn.Module, list[tuple[nn.Module, nn.Module]]]:
    """
    Replace modules in a copy of a model. Only the containers on the way to them are copied, and
    these share their parameters, buffers and hooks with the originals.

    :param model: the model
    :param replacements: modules by name
    :param end: name of the module to put an :class:`_End` around
    :return: the copy, and pairs of a copied container and its original
    """
    copies: dict[str, nn.Module] = {}

    def copied(path: str) -> nn.Module:
        if path not in copies:
            original = model.get_submodule(path)
            # not by copy.copy, which parametrized and traced modules redefine
            copy = copies[path] = original.__new__(type(original))
            copy.__dict__.update(original.__dict__)
            copy._modules = original._modules.copy()
            copy._compiled_call_impl = None  # it would call the original
            if path:
                put(path, copy)
        return copies[path]

    def put(path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        copied(parent)._modules[name] = module

    root = copied("")
    for path, module in replacements.items():
        put(path, module)
    if end is not None:
        put(end, _End(model.get_submodule(end), root.get_submodule(end)))
    return root, [(copy, model.get_submodule(path)) for path, copy in copies.items()]


class _Call(NamedTuple):
    """One call of a module: its time, its output and the output's node in the autograd graph."""

    begin: int
    end: int
    output: Any
    node: Any


def _record(model: nn.Module, x: Tensor) -> tuple[Any, dict[nn.Module, list[_Call]]]:
    """
    :return: output of the model, and the calls of all its modules that ran
    """
    clock = count()
    begun: dict[nn.Module, int] = {}
    calls: dict[nn.Module, list[_Call]] = {}

    def before(module: nn.Module, args: Any) -> None:
        begun[module] = next(clock)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        node = None
        if isinstance(output, Tensor) and output.requires_grad:
            if any(output is x for x in args):
                output = output.clone()  # so that an identity has a node of its own
            node = get_gradient_edge(output).node
        calls.setdefault(module, []).append(_Call(begun[module], next(clock), output, node))
        return output

    network, _ = _copy_with(model, {})
    handles = []
    try:
        for module in list(model.modules())[1:]:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        return network(x), calls
    finally:
        for handle in handles:
            handle.remove()


class _Trace:
    """What forward passes tell about a model: where its head is, and where it can be cut."""

    def __init__(self, model: nn.Module, x: Tensor):
        self.model = model
        self.x = x
        # Without gradients, attention layers have a fast path that does not run their sub-modules.
        _, calls_without_grad = _record(model, x)
        with torch.enable_grad():
            source = x.clone()
            if x.is_floating_point():
                source = source.requires_grad_().clone()  # no leaf: the model may work in place
            output, self.calls = _record(model, source)

        self.head_name = self._find_head(output)
        self.last: Any = model.get_submodule(self.head_name)
        self.head: Any = self.last
        self.pooling: list[nn.Module] = []  # of what the head gets, and of what it returns
        if isinstance(self.last, nn.Conv2d):
            self.head = _ConvolutionHead(self.last)
            self.pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.head_call = self.calls[self.last][-1]
        self.encoder = self.part(None, None)
        # one row more than was traced, to see that placeholders follow the size of the batch
        self.more_x = torch.cat([x, x[:1]])
        self.features = self._check_encoder()

        names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        cuts = {}
        for name, module in model.named_modules():
            calls = self.calls.get(module, [])
            runs_once = len(calls) == len(calls_without_grad.get(module, [])) == names[module] == 1
            if runs_once and self._is_cut(calls[0], source.grad_fn):
                cuts[name] = calls[0]
        #: calls of the modules after which the network can be cut, in the order they end
        self.cuts = dict(sorted(cuts.items(), key=lambda item: item[1].end))

    def _find_head(self, output: Tensor) -> str:
        heads: dict[str, _Call] = {
            name: self.calls[module][-1]
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module in self.calls
        }
        heads = {name: call for name, call in heads.items() if call.output.shape == output.shape}
        for name, call in sorted(heads.items(), key=lambda item: -item[1].end):
            if torch.equal(call.output, output.to(call.output.dtype)):
                return name
        if len(heads) > 1:
            raise _refusal(self.model, f"it has several heads ({', '.join(heads)})")
        if heads:
            raise _refusal(self.model, f"it returns something else than its {''.join(heads)} does")
        convolutions: dict[str, int] = {
            name: self.calls[module][-1].end
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d)
            and module in self.calls
            and module.weight.shape == (output.shape[1], module.in_channels, 1, 1)
        }
        if convolutions:
            return max(convolutions, key=convolutions.__getitem__)
        raise _refusal(
            self.model, "its output comes neither from an nn.Linear nor from a 1×1 convolution"
        )

    def _check_encoder(self) -> Tensor:
        try:
            features: Tensor = self.encoder(self.more_x)
        except RuntimeError as error:
            raise _refusal(self.model, f"its head can't be taken off: {error}") from error
        expected = self.model(self.more_x)
        # What follows the head may be something like ReLU, which leaves positive logits alone.
        handle = self.last.register_forward_hook(lambda module, args, output: -0.5 * output)
        try:
            turned = -2 * self.model(self.more_x)
        finally:
            handle.remove()
        # A subclass of nn.Linear may compute something else than its weight and bias tell.
        linear = F.linear(features, self.head.weight, self.head.bias)
        for logits in (self.head(features), linear, turned):
            if not _close(logits, expected):
                reason = f"its output is not {self.head_name} of the features"
                if self.pooling:
                    reason += ", because this convolution is followed by something not linear"
                raise _refusal(self.model, reason)
        return features

    def _is_cut(self, cut: _Call, source: Any) -> bool:
        """
        Whether all that the head gets from the inputs, and from modules that ran before, comes by
        way of one output.
        """
        if cut.node is None or cut.output.shape[:1] != (_ROWS,) or cut.end > self.head_call.begin:
            return False
        earlier = {c.node for calls in self.calls.values() for c in calls if c.end < cut.begin}
        earlier = (earlier | {source}) - {cut.node, None}
        nodes, seen = [self.head_call.node], set()
        while nodes:
            node = nodes.pop()
            if node in earlier:
                return False
            if node not in seen and node is not cut.node:
                nodes += [parent for parent, _ in node.next_functions if parent is not None]
            seen.add(node)
        return cut.node in seen

    def part(self, begin: str | None, end: str | None) -> _Part:
        """
        :param begin: name of the module after which the part begins, None for the inputs
        :param end: name of the module after which it ends, None for the features
        """
        last = end or self.head_name
        begin_time = self.cuts[begin].begin if begin else -1
        end_time = self.calls[self.model.get_submodule(last)][-1].end
        replacements: dict[str, nn.Module] = {}
        exposed = []
        for name, module in self.model.named_modules(remove_duplicate=False):
            if name.startswith(tuple(f"{outside}." for outside in replacements)):
                continue
            calls = self.calls.get(module)
            if calls and (calls[-1].end < begin_time or calls[0].begin > end_time):
                replacements[name] = _Outside(module, calls[0].output)
            elif begin and (calls is None or calls[0].begin < begin_time):
                if "running_mean" in module._buffers:
                    exposed.append(name)
        if begin:
            replacements[begin] = _Begin(self.model.get_submodule(begin))
        if end is None:
            replacements[last] = nn.Sequential(*self.pooling)
        elif end == self.head_name and self.pooling:
            replacements[last] = nn.Sequential(self.last, *self.pooling)
        inputs = _shape_of(self.x) if begin else None
        return _Part(self.model, replacements, last, inputs, exposed)

    def obstacle(self, name: str) -> str | None:
        """
        :return: why the network can't be cut after a module, None if it can
        """
        if name not in self.cuts:
            return "it has to run once, before the head and with nothing going around it"
        try:
            features = self.part(name, None)(self.part(None, name)(self.more_x))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if _close(features, self.features) else "the features would be other ones"

    def check_cut(self, early: str) -> None:
        reason = self.obstacle(early)
        if reason is None:
            return
        if early not in dict(self.model.named_modules()):
            reason = "there is no such module"
        nearest = ", ".join(difflib.get_close_matches(early, self.cuts, cutoff=0.5))
        raise ValueError(
            f"can't cut {type(self.model).__name__} after {early!r}: {reason}; "
            f"nearest choices: {nearest or 'none'}; all choices: {', '.join(self.cuts) or 'none'}"
        )

    def find_maps(self) -> tuple[str | None, str | None]:
        """
        :return: the module that returns the maps before global pooling, or why there is none
        """
        convolutions = [
            calls[-1].end
            for module, calls in self.calls.items()
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        ]
        if not convolutions:
            return None, "the network has no convolution"
        maps, shape = None, ()
        for name, call in self.cuts.items():
            kind = type(self.model.get_submodule(name)).__name__
            # Max pooling to 1×1 is an input that is small, not global pooling.
            pooling = "Pool" in kind and not kind.startswith("Max")
            if pooling and call.output.shape[2:] == (1, 1) and call.begin > max(convolutions):
                break
            if call.output.ndim > 2:
                maps, shape = name, tuple(call.output.shape[1:])
        if maps is None:
            return None, "the network can't be cut after a module that returns maps"
        if len(shape) != 3 or shape[0] != self.head.in_features == shape[-1]:
            return None, f"{maps}, before its features, returns {shape} and no C×H×W for an input"
        reason = self.obstacle(maps)
        return (None, reason) if reason else (maps, None)

    def find_stages(self, maps: str | None) -> list[str]:
        """
        :param maps: the module where the last stage ends, None for the last possible
        :return: names of the modules after which the last stages end
        """
        if not self.cuts:
            return []
        last = maps or list(self.cuts)[-1]
        begins = sorted(self.calls[stage][0].begin for stage in self._stages(self.model))
        # A stage takes the activation and the pooling after it along: it ends before the next one.
        ends = [[n for n, call in self.cuts.items() if call.end < begin][-1:] for begin in begins]
        names = [name for end in ends[1:] for name in end]
        names = [name for name in names if self.cuts[name].end < self.cuts[last].end] + [last]
        names = list(dict.fromkeys(names))[-_MAX_STAGES:]
        return [name for name in names if name == maps or self.obstacle(name) is None]

    def _stages(self, container: nn.Module) -> list[nn.Module]:
        """
        The modules that a network is a chain of. They are in the container of most of its layers:
        the blocks of layers with weights in it or, if it has none, the layers with weights.
        """
        layers = {m for m in self.calls if m is not self.last and not list(m.children())}
        for child in container.children():
            if list(child.children()) and 2 * len(layers & set(child.modules())) > len(layers):
                return self._stages(child)
        stages = [
            child
            for child in container.children()
            if child in self.calls
            and self.calls[child][0].end < self.head_call.begin
            and any(weight.ndim > 1 for weight in child.parameters())
        ]
        blocks = [b for b in stages if any(list(child.parameters()) for child in b.children())]
        return blocks if len(blocks) > 1 else stages


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, also in bfloat16. NaN is close to nothing."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-2 * b.abs().max())


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"can't split {type(model).__name__}: {reason}")


def _unwrap(model: Any) -> nn.Module:
    if isinstance(model, SplitModel):
        return model.model
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    if hasattr(model, "_orig_mod"):
        return _unwrap(model._orig_mod)
    if not isinstance(model, nn.Module):
        raise _refusal(model, "it is no nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise _refusal(model, "TorchScript hides its layers, split the model it was made from")
    if isinstance(model, nn.Linear):
        raise _refusal(model, "nothing comes before its head")
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise _refusal(model, "it has lazy layers, run it on a batch first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _refusal(model, "it has parameters on the meta device, load its weights first")
    if any(".quantized" in type(module).__module__ for module in model.modules()):
        raise _refusal(model, "it is quantized, split the model it was made from")
    return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules())
    if compiled and not hasattr(torch.compiler, "set_stance"):
        raise _refusal(model, "parts of it are compiled, which needs torch 2.6: split it first")
    try:
        # compiled sub-modules run as they are written, or hooks would be compiled, too
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _find_inputs(model: nn.Module, example: Tensor | None) -> Tensor:
    """
    :return: two rows that the model maps to two rows of finite logits
    """
    if example is None:
        generator = torch.Generator().manual_seed(0)
        shapes = _input_shapes(model)
        candidates = (torch.randn(_ROWS, *shape, generator=generator) for shape in shapes)
    elif isinstance(example, Tensor) and example.ndim > 1 and len(example):
        candidates = (rows for rows in [example.detach()[[0, -1]]])
    else:
        raise ValueError("example has to be a tensor, a batch of one input or more")

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    failure = "no convolution or linear layer tells their shape"
    for x in candidates:
        x = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
        try:
            output = model(x)
        except Exception as error:
            failure = f"{tuple(x.shape)} gives {type(error).__name__}: {error}"
            continue
        if not isinstance(output, Tensor):
            raise _refusal(model, f"it returns {type(output).__name__}, not a tensor of logits")
        if output.ndim == 2 and len(output) == _ROWS:
            if not output.isfinite().all():
                raise _refusal(model, "its logits are not finite, check its weights")
            return x
        failure = f"{tuple(x.shape)} gives {tuple(output.shape)}"
    advice = "pass a batch of inputs as example" if example is None else "check the example"
    raise _refusal(model, f"no inputs found that give B×C logits ({failure}): {advice}")


def _input_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    convolution = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    if convolution is None:
        yield from [(m.in_features,) for m in model.modules() if isinstance(m, nn.Linear)][:1]
        return
    config = getattr(model, "pretrained_cfg", None) or {}  # of timm
    sizes = [config.get("input_size", ())[1:], getattr(model, "image_size", ()), *_SIZES]
    for size in sizes:
        if isinstance(size, int):
            size = (size,) * len(convolution.kernel_size)
        if size:
            yield (convolution.in_channels, *size)
