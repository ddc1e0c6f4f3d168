"""
Which classifiers ``split_model`` can split: all of torchvision's, and a list of timm's.

    python benchmarks/splitting.py

Weights are random and inputs small, since neither decides. A network counts as split if all its
parts compute what it computes itself. Writes ``benchmarks/results/splitting.json``, which tells of
each network, and ``splitting.md``, a table of their families. Takes a few minutes and 5 GB of
memory; with names of networks as arguments, these are tried and nothing is written.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from pood_plugins import split_model
from pood_plugins.evaluation.report import environment
from pood_plugins.training.checkpoint import replacing

CLASSES = 7
ROWS = 3

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
#: of most families of timm that classify images, one of the smallest, and some that are different
TIMM = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto
    convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny
    darknet17 davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224
    deit_tiny_patch16_224 densenet121 dla46_c dla60x dpn48b dpn68 eca_halonext26ts
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1
    efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_050 ghostnetv3_050
    gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t
    lcnet_050 lcnetv2_small legacy_seresnet18 legacy_xception levit_128 lowformer_b0
    mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mnasnet_050 mobilenet_edgetpu_v2_xs
    mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s1 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 pit_ti_224
    pit_ti_distilled_224 poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002
    repghostnet_050 repvgg_a0 repvit_m1 res2net50_26w_4s resmlp_12_224 resnest14d resnet18
    resnet50 resnetv2_18 resnetv2_50 resnetv2_50x1_bit rexnet_100 sam2_hiera_tiny selecsls42
    sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_nfnet test_vit tf_efficientnetv2_b0
    tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small
    visformer_tiny vit_relpos_small_patch16_224 vit_small_patch16_dinov3 vit_small_r26_s32_224
    vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p16_224
""".split()


class _NothingDrawn(TorchFunctionMode):
    """Zero for what is random: drawing the weights of the large networks takes a minute."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.__name__ in ("normal_", "uniform_"):
            tensor = args[0] if args else kwargs["tensor"]
            tensor.detach().zero_()
            return tensor
        return function(*args, **(kwargs or {}))


def build(library: str, name: str) -> tuple[nn.Module, Tensor]:
    """
    :return: a network with random weights, and three inputs of a small size that it takes
    """
    failures = []
    for network, size in _candidates(library, name):
        x = torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(2))
        try:
            randomize(network, x)
        except Exception as error:  # each network has its own way to reject a size
            failures.append(f"{size} pixels: {error}")
        else:
            return network, x
    raise RuntimeError("; ".join(failures))


def _candidates(library: str, name: str) -> Iterator[tuple[nn.Module, int]]:
    if library == "torchvision":
        small = {"image_size": 28 if name.endswith("14") else 32} if name[:3] == "vit" else {}
        if name in ("googlenet", "inception_v3"):
            small = {"init_weights": False}  # it would take longer than anything else
        network = _create(torchvision.models.get_model, name, **small)
        sizes = [small.get("image_size", 64), 96, 224]
    else:
        import timm

        try:
            yield _create(timm.create_model, name, img_size=64), 64
        except (TypeError, ValueError, AssertionError, ZeroDivisionError):
            pass  # the networks without a fixed size don't know the argument
        network = _create(timm.create_model, name)
        sizes = [64, 96, 128, network.pretrained_cfg["input_size"][1]]
    yield from ((network, size) for size in sizes)


def _create(create: Callable[..., nn.Module], name: str, **arguments: Any) -> nn.Module:
    with _NothingDrawn():
        return create(name, num_classes=CLASSES, **arguments)


@torch.no_grad()
def randomize(network: nn.Module, x: Tensor) -> None:
    """
    Random weights, of such a size that the logits depend on the input. Heads that are zero and
    layers that start as an identity would hide mistakes. BatchNorm takes the statistics of ``x``.
    """
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1_000_003, generator=generator)
    for name, parameter in network.named_parameters():
        # copies of the same values, as drawing takes long, from another place on in each: with
        # equal weights, two heads would be one
        start = int(torch.randint(len(values), (), generator=generator))
        rolled = values.roll(start)
        flat = parameter.view(-1)
        for part in flat.split(len(values)):
            part.copy_(rolled[: len(part)])
        if parameter.ndim > 1:
            flat.div_(parameter[0].numel() ** 0.5)
        else:
            flat.mul_(0.1).add_(0 if name.endswith("bias") else 1)
    network.eval()
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    network(x)
    for norm, momentum in zip(norms, momentums):
        norm.momentum = momentum
    network.eval()


@torch.no_grad()
def examine(network: nn.Module, x: Tensor) -> dict[str, Any]:
    """
    :return: what is to be told of a network: the reason why it can't be split, or its parts and
        how far their results are from its own, relative to the largest number
    """
    try:
        split = split_model(network, example=x)
    except ValueError as error:
        return {"reason": str(error).partition(": ")[2]}
    logits, features = network(x), split.encoder(x)
    pairs = [(split.head(features), logits)]
    if split.early is not None and split.late is not None:
        pairs.append((split.late(split.early(x)), features))
    if split.feature_maps is not None and split.map_head is not None:
        pairs.append((split.map_head(split.feature_maps(x)), logits))
    deviation = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if not deviation < 1e-4:
        raise AssertionError(f"parts of {type(network).__name__} deviate by {deviation}")
    return {
        "features": features.shape[1],
        "head": "nn.Linear" if split.head in list(network.modules()) else "1×1 convolution",
        "early_name": split.early_name,
        "maps": split.maps_reason or True,
        "deviation": deviation,
    }


def family(library: str, name: str) -> str:
    """
    :return: the module that the network comes from
    """
    if library == "torchvision":
        builder = torchvision.models.get_model_builder(name)
    else:
        import timm

        builder = timm.model_entrypoint(name)
    return builder.__module__.rpartition(".")[2]


def table(networks: list[dict[str, Any]]) -> str:
    """
    :return: of each family, how many were split, and below, which were not and why
    """
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    refused: dict[str, list[str]] = {}
    for network in networks:
        families.setdefault((network["library"], network["family"]), []).append(network)
        if "reason" in network:
            refused.setdefault(network["reason"], []).append(f"``{network['name']}``")
    lines = ["| Library | Family | Tried | Split | With maps | Refused |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    counts = torch.zeros(4, dtype=torch.long)
    for (library, name), members in sorted(families.items()):
        split = sum("reason" not in network for network in members)
        maps = sum(network.get("maps") is True for network in members)
        row = torch.tensor([len(members), split, maps, len(members) - split])
        counts += row
        lines.append(" | ".join(["| " + library, name, *map(str, row.tolist())]) + " |")
    lines.append(" | ".join(["| **all**", "", *(f"**{n}**" for n in counts.tolist())]) + " |")
    lines += ["", "Refused, with the reason:", ""]
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in refused.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which classifiers split_model can split")
    parser.add_argument("names", nargs="*", metavar="NAME", help="try these and write nothing")
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--output", type=Path, default=default, metavar="DIR")
    options = parser.parse_args()

    tasks = [("torchvision", name) for name in TORCHVISION] + [("timm", name) for name in TIMM]
    if options.names:
        tasks = [task for task in tasks if task[1] in options.names]
    networks = []
    for library, name in tqdm(tasks, disable=None):
        result = examine(*build(library, name))
        networks.append(
            {"library": library, "name": name, "family": family(library, name), **result}
        )
    if options.names:
        print(json.dumps(networks, indent=1, ensure_ascii=False))
        return

    import timm

    content = environment()
    content["versions"]["timm"] = timm.__version__
    content["networks"] = networks
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    for file_name, written in (("splitting.json", text), ("splitting.md", table(networks))):
        with replacing(options.output / file_name) as file:
            file.write(written.encode())
    print(f"{sum('reason' not in n for n in networks)} of {len(networks)} networks were split")


if __name__ == "__main__":
    main()
