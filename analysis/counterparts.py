"""The network of timm or torchvision that computes what a student computes, with its weights."""
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from models.base import MODELS, VisionModel, create_model
from models.library import build_with
from models.state_dicts import without_computed
from models.transformers import Swin, ViT
from utils.registry import UserError, parse_spec

RESNETS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101)}
# Names here -> names there. Of nano networks: a network whose sizes can be set by options.
NAMES = {
    "torchvision": {
        **RESNETS, "convnext_t": "convnext_tiny", "convnext_s": "convnext_small",
        "convnext_b": "convnext_base", "convnext_t_bn": "convnext_tiny",
        "convnext_s_bn": "convnext_small", "swin_t": "swin_t", "vit_b": "vit_b_16",
        "efficientnet_b3": "efficientnet_b3", "mobilenetv3_l": "mobilenet_v3_large"},
    "timm": {
        **RESNETS, "resnet50d": "resnet50d", "convnext_t": "convnext_tiny",
        "convnext_s": "convnext_small", "convnext_b": "convnext_base",
        "convnext_t_bn": "convnext_tiny", "convnext_s_bn": "convnext_small",
        "convnext_nano": "convnext_tiny", "convnext_bn_nano": "convnext_tiny",
        "convnextv2_t": "convnextv2_tiny", "convnextv2_s": "convnextv2_small",
        "convnextv2_nano": "convnextv2_tiny", "swin_t": "swin_tiny_patch4_window7_224",
        "swin_nano": "swin_tiny_patch4_window7_224", "deit_s": "deit_small_patch16_224",
        "vit_b": "vit_base_patch16_224", "vit_nano": "vit_tiny_patch16_224",
        "mobilenetv3_l": "mobilenetv3_large_100"}}


def build(library: str, name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    """The library's network, of random weights, in evaluation mode."""
    what = f"{library} model={name}"
    if library == "torchvision":
        return build_with(torchvision.models.get_model, what, name, weights=None,
                          num_classes=num_classes, **options).eval()
    try:
        import timm
    except ImportError:
        raise UserError("--format timm needs the package timm: pip install timm.") from None
    return build_with(timm.create_model, what, name, num_classes=num_classes, **options).eval()


def counterpart(library: str, spec: list[str], model: VisionModel, input_size: int
                ) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name and options of the library's network that is the same function as `model`, called `spec`
    here, and its state dict. Raises UserError where there is none."""
    name = MODELS.resolve(parse_spec(spec, "--model")[0])
    if name == library:  # it is the library's, under its own names
        options = dict(model.spec)
        return options.pop("model_name" if library == "timm" else "name"), options, (
            model.state_dict())
    if name not in NAMES[library]:
        raise UserError(f"{library} has no counterpart of {' '.join(spec)}; it has those of "
                        f"{', '.join(NAMES[library])}. Other networks can be written as weights, "
                        "safetensors, torch-export or onnx.")
    if library == "timm" and name == "mobilenetv3_l" and model.bn_eps != 1e-5:
        raise UserError(f"timm's {NAMES[library][name]} has BatchNorms with an eps of 1e-5, this "
                        f"network of {model.bn_eps:g}: another function. Write it for torchvision, "
                        "or as weights, safetensors, torch-export or onnx.")
    if name.startswith("convnext_") and "bn" in name:
        model = original_convnext(model)
    there, options = NAMES[library][name], {}
    if library == "timm":
        options = options_of(name, model, input_size)
    elif name == "vit_b" and model.image_size != 224:
        options = {"image_size": model.image_size}
    network = build(library, there, options, model.num_classes)
    state = renamed(model, network, f"{' '.join(spec)} differs from {library}'s {there} in ")
    return there, options, state


def options_of(name: str, model: VisionModel, input_size: int) -> dict[str, Any]:
    """Of timm's network, what its name does not say."""
    if name.startswith("convnext"):
        options: dict[str, Any] = {"depths": list(model.depths),
                                   "dims": [info.channels for info in model.feature_info]}
        if not any(key.endswith((".gamma", ".grn.beta")) for key in model.state_dict()):
            options["ls_init_value"] = None
        return options
    if isinstance(model, ViT):
        blocks = list(model.encoder.layers)
        return {"img_size": model.image_size, "embed_dim": model.hidden_dim, "depth": len(blocks),
                "num_heads": blocks[0].num_heads, "mlp_ratio": model.mlp_dim / model.hidden_dim}
    if isinstance(model, Swin):
        stages = [stage for i, stage in enumerate(model.features) if i % 2]
        return {"img_size": input_size, "window_size": model.window,
                "embed_dim": model.feature_info[0].channels,
                "depths": [len(stage) for stage in stages],
                "num_heads": [stage[0].attn.num_heads for stage in stages]}
    return {}


def original_convnext(model: VisionModel) -> VisionModel:
    """The original ConvNeXt that equals one with BatchNorm."""
    state = model.convnext_state()
    options = {} if any(key.endswith(".gamma") for key in state) else {"layer_scale_init": 0.0}
    original = create_model("convnext_t", model.num_classes, depths=model.depths,
                            dims=[info.channels for info in model.feature_info], **options)
    original.load_state_dict(state)
    return original.eval()


def renamed(model: VisionModel, network: nn.Module, what: str) -> dict[str, Tensor]:
    """The weights of `model` under the names and in the shapes of `network`.

    `model` can read files of such a network: it is given one whose tensors are numbered, and where
    it puts number i is what belongs under the i-th name. Raises UserError, beginning with `what`,
    where a tensor has no place there or is computed from theirs."""
    theirs, ours = network.state_dict(), model.state_dict()
    names = list(theirs)
    numbered = {name: torch.full(theirs[name].shape, float(i)) for i, name in enumerate(names)}
    result = {}
    for name, numbers in model.convert_state_dict(numbered).items():
        if name not in ours or name not in without_computed({name: numbers}) and (
                ours[name].shape != numbers.shape):
            continue
        there = names[int(numbers.flatten()[0])]
        if (numbers != numbers.flatten()[0]).any() or ours[name].numel() != theirs[there].numel():
            raise UserError(f"{what}{name}.")
        result[there] = ours[name].reshape(theirs[there].shape)
    missing = without_computed(theirs).keys() - result.keys()
    if missing or len(without_computed(result)) < len(without_computed(ours)):
        raise UserError(f"{what}its layers{missing and f', such as {min(missing)}' or ''}.")
    return {**theirs, **result}
