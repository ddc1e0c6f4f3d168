"""
Networks of torchvision and timm: their parts compute what they compute themselves, or they are
refused for a known reason. ``benchmarks/splitting.py`` builds them, and tries the rest, too.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pood_plugins.model import split_model

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "splitting.py"
spec = importlib.util.spec_from_file_location("script_splitting", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

#: why a network is refused; all others have to be split
REFUSED = {
    ("torchvision", "squeezenet1_0"): "classifier.1 of the features.*convolution.*not linear",
    ("torchvision", "squeezenet1_1"): "classifier.1 of the features.*convolution.*not linear",
    ("timm", "crossvit_tiny_240"): r"several heads \(head.0, head.1\)",
    ("timm", "deit_tiny_distilled_patch16_224"): r"several heads \(head, head_dist\)",
    ("timm", "efficientformer_l1"): r"several heads \(head, head_dist\)",
    ("timm", "efficientformerv2_s0"): r"several heads \(head, head_dist\)",
    ("timm", "efficientvim_m1"): r"several heads \(heads.0, heads.1, heads.2, heads.3\)",
    ("timm", "levit_128"): r"several heads \(head.linear, head_dist.linear\)",
    ("timm", "pit_ti_distilled_224"): r"several heads \(head, head_dist\)",
    ("timm", "repvit_m1"): r"several heads \(head.head.l, head.head_dist.l\)",
    ("timm", "swiftformer_xs"): r"several heads \(head, head_dist\)",
    ("timm", "volo_d1_224"): "something else than its head does",
}

#: these take the longest, and smaller networks of their families are among the others. The script
#: tries them, too
SLOW = """
    convnext_base convnext_large convnext_small densenet161 densenet169 densenet201 dla60x dpn68
    eca_halonext26ts nf_resnet26 resnetv2_50x1_bit twins_pcpvt_small
    efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
    efficientnet_v2_l efficientnet_v2_m regnet_x_16gf regnet_x_32gf regnet_x_8gf regnet_y_128gf
    regnet_y_16gf regnet_y_32gf regnet_y_8gf resnet101 resnet152 resnext101_32x8d
    resnext101_64x4d swin_b swin_s swin_v2_b swin_v2_s vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn
    vgg19 vgg19_bn vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2
""".split()

NETWORKS = [("torchvision", name) for name in script.TORCHVISION]
NETWORKS += [("timm", name) for name in script.TIMM]


def relative(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def last_layer(network, x):
    """The linear layer, or else the convolution, that runs last."""
    ran = []
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in layers]
    network(x)
    for handle in handles:
        handle.remove()
    return ran[-1]


@pytest.mark.parametrize(
    "library, name", [network for network in NETWORKS if network[1] not in SLOW]
)
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # torchvision 0.19 in MaxViT
@torch.no_grad()
def test_parts_or_reason(library, name):
    if library == "timm":
        timm = pytest.importorskip("timm")
        if not timm.is_model(name):
            pytest.skip(f"timm {timm.__version__} does not have this network yet")
    network, x = script.build(library, name)
    logits = network(x)
    assert logits.shape == (3, script.CLASSES)
    # constant logits would hide everything
    assert min(relative(logits[0], logits[i]) for i in (1, 2)) > 1e-4

    if (library, name) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[library, name]):
            split_model(network, example=x)
        return
    split = split_model(network, example=x)
    features = split.encoder(x)
    layer = last_layer(network, x)
    assert (split.head is layer) or (split.head.convolution is layer)
    assert features.shape == (3, split.head.in_features) and features.is_contiguous()
    assert relative(split.head(features), logits) < 1e-5
    assert split.early_name is not None
    assert relative(split.late(split.early(x)), features) < 1e-5
    if split.maps_reason is None:
        assert split.feature_maps(x).ndim == 4
        assert relative(split.map_head(split.feature_maps(x)), logits) < 1e-5


def test_lists():
    assert set(REFUSED) <= set(NETWORKS)
    timm = pytest.importorskip("timm")
    if not all(map(timm.is_model, script.TIMM)):
        pytest.skip(f"timm {timm.__version__} does not have all of these networks yet")
    assert len({script.family("timm", name) for name in script.TIMM}) >= 60
    families = {network: (network[0], script.family(*network)) for network in NETWORKS}
    assert {families[n] for n in NETWORKS if n[1] not in SLOW} == set(families.values())
