"""Any network of timm or torchvision by its name there, `timm model=NAME` and `torchvision
model=NAME`; see docs/models.md.

timm is optional. Names in state dicts are the library's: what is trained here loads there.
"""
import copy
import difflib
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput, VisionModel
from utils.classes import imagenet_wnids
from utils.registry import UserError, one_line

FILTERS = ("bicubic", "bilinear")  # of resizing; timm also names others, for few networks
LAYERS = (nn.Linear, nn.Conv2d)  # that a classifier may be
SMALLEST_STRIDE = 4  # what the other networks here begin with; larger maps only cost memory


class LibraryNetwork(VisionModel):
    """`network` behind this project's contract, under its own names: the tables of its parameters,
    buffers and modules are this module's, too. So a state dict is the library's, and what is done
    to one of the two is done to the other."""

    TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.__dict__["network"] = network  # past nn.Module, which would count it as a child
        self._share_tables()

    def _share_tables(self) -> None:
        for table in self.TABLES:
            self.__dict__[table] = self.network.__dict__[table]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LibraryNetwork":
        clone = memo[id(self)] = type(self).__new__(type(self))
        for key, value in self.__dict__.items():
            if key not in self.TABLES:
                clone.__dict__[key] = copy.deepcopy(value, memo)
        clone._share_tables()
        return clone

    def train(self, mode: bool = True) -> "LibraryNetwork":
        self.network.train(mode)
        return super().train(mode)

    def _declare(self, maps: Sequence[Tensor], strides: Sequence[int]) -> list[int]:
        """Set `feature_info` to the last of these maps of an image of each stride from
        SMALLEST_STRIDE on; their places among `maps`."""
        places = {stride: place for place, stride in enumerate(strides)
                  if stride >= SMALLEST_STRIDE}
        self.feature_info = tuple(FeatureInfo(maps[place].shape[1], stride)
                                  for stride, place in places.items())
        return list(places.values())

    def _trial(self, input_size: int) -> tuple["LibraryNetwork", ModelOutput]:
        """A copy of this network, on shapes alone where it needs no values, and what it makes of
        one image."""
        shape = (1, 3, input_size, input_size)
        clone = copy.deepcopy(self).eval().requires_grad_(True)
        try:
            return clone, clone.to("meta").forward_with_features(torch.empty(shape, device="meta"))
        except (RuntimeError, NotImplementedError):
            clone = copy.deepcopy(self).eval().requires_grad_(True)
            return clone, clone.forward_with_features(torch.zeros(shape))

    @torch.no_grad()
    def _probe(self, input_size: int) -> ModelOutput:
        return self._trial(input_size)[1]

    def parameters_by_map(self) -> list[set[str]]:
        """Names of the parameters that each map is computed from, as gradients tell."""
        with torch.enable_grad():
            clone, output = self._trial(self.input_size)
            names, parameters = zip(*clone.named_parameters())
            gradients = [torch.autograd.grad(feature.sum(), parameters, retain_graph=True,
                                             allow_unused=True) for feature in output.features]
        return [{name for name, gradient in zip(names, of_map) if gradient is not None}
                for of_map in gradients]

    def blocks_of(self, names: set[str]) -> tuple[str, ...]:
        """These parameters by the largest modules that hold no others."""
        others = {place for name, _ in self.named_parameters() if name not in names
                  for place in places_of(name)}
        return tuple(dict.fromkeys(next(place for place in places_of(name) if place not in others)
                                   for name in sorted(names)))


def places_of(name: str) -> list[str]:
    """"a.b.c" -> ["a", "a.b", "a.b.c"]."""
    words = name.split(".")
    return [".".join(words[:number]) for number in range(1, len(words) + 1)]


def stride_of(input_size: int, side: int, said: int | None = None) -> int:
    """Input pixels per cell of a map that is `side` cells wide: what the library said where it
    fits; a power of two where one does, for a padded edge is no stride of its own; else the exact
    ratio, or the nearest power of two."""
    nearest = 2 ** round(math.log2(input_size / side))
    for stride in filter(None, (said, nearest)):
        if side in (input_size // stride, -(-input_size // stride)):
            return stride
    return input_size // side if input_size % side == 0 else nearest


def build_with(build: Callable[..., Any], what: str, /, *values: Any, **options: Any) -> Any:
    """`build(...)` on the CPU, for some networks cannot be built on the meta device; moved there
    where the caller builds there. Its error becomes a sentence about `what`."""
    is_meta = torch.empty(0).is_meta
    try:
        with torch.device("cpu"):
            built = build(*values, **options)
    except UserError:
        raise
    except Exception as error:  # whatever a library raises for options that do not suit it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{what}: {one_line(error).rstrip('.')} ({type(error).__name__} at "
                        f"{Path(frame.filename).name}:{frame.lineno}).") from error
    return built.to("meta") if is_meta and isinstance(built, nn.Module) else built


def named_model(library: str, options: Mapping[str, Any]) -> str:
    if "model" not in options:
        raise UserError(f"{library} needs the option model=NAME, for example {library} "
                        "model=resnet50.")
    return str(options["model"])


def unknown_name(library: str, model: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(model, list(known), n=3)
    nearest = f" The nearest: {', '.join(near)}." if near else ""
    return UserError(f"{library} has no model {model!r}.{nearest}")


def own_classifiers(network: nn.Module, names: Iterable[str], num_classes: int) -> tuple[str, ...]:
    """`names` where each is a layer with a row for every class; else none."""
    layers = [dict(network.named_modules()).get(name) for name in names]
    fit = [isinstance(layer, LAYERS) and len(layer.weight) == num_classes for layer in layers]
    return tuple(names) if all(fit) else ()


class TimmNetwork(LibraryNetwork):
    """A network of timm; `options` are those of timm.create_model.

    Its maps are the last of each stride from 4 on, of a ViT the patch tokens as one; `out_indices`
    chooses others by timm's numbers. The last is what the head pools, normed where it is.
    """

    is_of_library = True

    def __init__(self, num_classes: int, model: str,
                 out_indices: Sequence[int] | None = None, **options: Any) -> None:
        self.check_options({"model": model, **options})
        import timm
        spec = {"model_name": model, **options}
        super().__init__(build_with(timm.create_model, f"timm model={model}",
                                    num_classes=num_classes, **spec))
        self.spec, self.num_classes = spec, num_classes
        self._configure(options)
        self.indices: list[int] | None = None  # all
        maps = build_with(self._probe, f"timm model={model}", self.input_size).features
        said = [level["reduction"] for level in self.network.feature_info]
        said = said if len(said) == len(maps) else [None] * len(maps)
        strides = [stride_of(self.input_size, feature.shape[2], stride)
                   for feature, stride in zip(maps, said)]
        self.indices = self._declare(maps, strides)
        if out_indices is not None:
            chosen = [out_indices] if isinstance(out_indices, int) else list(out_indices)
            wrong = [i for i in chosen if type(i) is not int or not -len(maps) <= i < len(maps)]
            if wrong or not chosen:
                raise UserError(f"timm model={model} has the maps 0 to {len(maps) - 1}; got "
                                f"out_indices={out_indices}.")
            self.indices = sorted({i % len(maps) for i in chosen})
            self.feature_info = tuple(FeatureInfo(maps[i].shape[1], strides[i])
                                      for i in self.indices)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        try:
            import timm
        except ImportError as error:
            raise UserError(f"networks of timm need the package timm ({one_line(error)}): pip "
                            "install timm.") from None
        model = named_model("timm", options)
        ours = sorted(options.keys() & {"pretrained", "checkpoint_path", "features_only",
                                        "in_chans", "pretrained_cfg", "pretrained_cfg_overlay"})
        if ours:
            raise UserError(f"{ours[0]} is set by the program and cannot be an option of timm "
                            f"model={model}. Leave it out.")
        name, _, tag = model.partition(".")
        if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            return
        if not timm.is_model(name):
            raise unknown_name("timm", name, timm.list_models())
        tagged = timm.list_models(f"{name}.*", include_tags=True)
        if tag and model not in tagged:
            raise UserError(f"timm has no weights {tag!r} of {name}; its own are "
                            f"{', '.join(tagged) or 'none'}.")

    def _configure(self, options: Mapping[str, Any]) -> None:
        """Set what the configuration of the weights says that are published for this network."""
        import timm
        config = timm.data.resolve_model_data_config(self.network)
        published = self.network.pretrained_cfg
        self.input_mean, self.input_std = tuple(config["mean"]), tuple(config["std"])
        self.input_size = options.get("img_size") or config["input_size"][-1]
        if config["crop_mode"] == "center":
            self.input_resize = math.floor(self.input_size / config["crop_pct"])
        if config["interpolation"] in FILTERS:
            self.input_filter = config["interpolation"]
        self.fixed_size = bool(published.get("fixed_input_size")
                               and not options.get("dynamic_img_size")
                               and options.get("strict_img_size", True))
        subset = timm.data.infer_imagenet_subset(published)
        if subset is not None:
            self.published_classes = timm.data.ImageNetInfo(subset).label_names()
        elif published["num_classes"] == 0:
            self.published_classes = []
        names = published.get("classifier") or ()
        self.classifiers = own_classifiers(
            self.network, (names,) if isinstance(names, str) else tuple(names), self.num_classes)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        final, maps = self.network.forward_intermediates(images, indices=self.indices)
        maps[-1] = pooled_map(final, maps[-1])
        return ModelOutput(self.network.forward_head(final) if self.num_classes else None, maps)

    def published_state(self) -> dict[str, Tensor]:
        import timm
        known = self.network.pretrained_cfg
        if not any(known.get(key) for key in ("url", "hf_hub_id", "file")):
            raise UserError(f"timm has no published weights of {self.spec['model_name']}. Pass a "
                            "file or an address, or the word random.")
        network = build_with(timm.create_model, f"timm model={self.spec['model_name']}: its "
                             "published weights could not be had", pretrained=True, **self.spec)
        return network.state_dict()

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes what timm's own reading of the family's published files takes, and resizes tables
        of positions as timm does."""
        own = self.network.state_dict()
        family = sys.modules[type(self.network).__module__]
        strange = [name for name, value in state.items()
                   if name not in own or own[name].shape != value.shape]
        if all(name.rpartition(".")[0] in self.classifiers for name in strange):
            return state
        try:
            return family.checkpoint_filter_fn(dict(state), self.network)
        except Exception:  # no such function, or a file of something else
            return state

    def no_weight_decay(self) -> set[str]:
        names = getattr(self.network, "no_weight_decay", set)()  # not every family has it
        return {name for name, _ in self.named_parameters() if name in names}

    def layer_ids(self) -> dict[str, int]:
        from timm.models import group_parameters
        if not hasattr(self.network, "group_matcher"):  # a few families
            raise UserError(f"timm does not name the blocks of {self.spec['model_name']}, which "
                            "--layer-decay and --freeze with a number need. Leave --layer-decay at "
                            "1; --freeze backbone needs none.")
        return group_parameters(self.network, self.network.group_matcher(), reverse=True)

    def parts(self) -> list[list[tuple[str, ...]]]:
        """The stem is what timm's groups begin with; a stage, what its map is computed from and
        those before it are not."""
        depths = self.layer_ids()
        known = {name for name, depth in depths.items() if depth == 0}
        parts = [[self.blocks_of(known)]]
        for names in self.parameters_by_map():
            stage = names - known
            known |= stage
            parts.append([self.blocks_of({name for name in stage if depths[name] == depth})
                          for depth in sorted({depths[name] for name in stage})])
        return parts

    def to_half(self, dtype: torch.dtype) -> VisionModel:
        was_training = self.training
        self.train().train(was_training)  # some forget only so what they keep in the old dtype
        return super().to_half(dtype)

    def synchronise_batch_norms(self) -> None:
        from timm.layers import convert_sync_batchnorm
        convert_sync_batchnorm(self.network)  # keeps the activation that timm's BatchNorms hold


def pooled_map(final: Tensor, last: Tensor) -> Tensor:
    """What a head is handed, (N, C, H, W), (N, H, W, C) or tokens (N, T, C) that end with those of
    the map, as a map; `last`, the last stage's, where it is something else."""
    height, width = last.shape[2:]
    if isinstance(final, Tensor) and final.dim() == 4:
        if final.shape[2:] == last.shape[2:]:
            return final
        if final.shape[1:3] == last.shape[2:]:
            return final.permute(0, 3, 1, 2)
    if isinstance(final, Tensor) and final.dim() == 3 and final.shape[1] >= height * width:
        tokens = final[:, final.shape[1] - height * width:]
        return tokens.transpose(1, 2).unflatten(2, (height, width))
    return last


# Parts of torchvision's networks that hold what maps come from, one after another; and heads.
CONTAINERS = ("features", "trunk_output", "layers", "blocks")
HEADS = ("avgpool", "classifier", "dropout", "fc", "flatten", "head", "heads", "permute")
# What torchvision sets where it loads its weights, which read inputs of a scale of their own.
TORCHVISION_DEFAULTS = {name: {"aux_logits": False, "transform_input": True, "init_weights": True}
                        for name in ("googlenet", "inception_v3")}


class TorchvisionNetwork(LibraryNetwork):
    """A classifier of torchvision; `options` are those of torchvision.models.get_model.

    `weights`: which of torchvision's for this network are meant, by their name there; their
    normalisation and size are taken whatever is loaded. Its maps are the last of each stride from 4
    on, of a ViT the normed patch tokens.
    """

    is_of_library = True

    def __init__(self, num_classes: int, model: str, weights: str = "DEFAULT",
                 **options: Any) -> None:
        self.check_options({"model": model, "weights": weights, **options})
        self.kind = torchvision.models.get_model_weights(model)[weights]
        preset = self.kind.transforms()
        spec = {"name": model, **TORCHVISION_DEFAULTS.get(model, {}), **options}
        self.input_size = preset.crop_size[0]
        if model.startswith("vit_"):
            self.input_size = spec.setdefault("image_size", self.input_size)
        super().__init__(build_with(torchvision.models.get_model, f"torchvision model={model}",
                                    weights=None, num_classes=num_classes, **spec))
        self.spec, self.num_classes = spec, num_classes
        if len(self.kind.meta["categories"]) == len(imagenet_wnids()):
            self.published_classes = imagenet_wnids()
        self.input_mean, self.input_std = tuple(preset.mean), tuple(preset.std)
        self.input_resize = preset.resize_size[0]
        self.input_filter = preset.interpolation.value
        self.fixed_size = model.startswith(("vit_", "maxvit_"))
        self.is_channels_last = model.startswith("swin_")
        layers = [name for name, layer in self.named_modules() if isinstance(layer, LAYERS)]
        self.classifiers = own_classifiers(self.network, layers[-1:], num_classes)
        self.maps: list[Tensor] = []  # of the images that are on their way
        units = self._units()
        hooks = [self.get_submodule(unit).register_forward_hook(self._keep) for unit in units]
        maps = self._probe(self.input_size).features
        self.num_stem = max(1, sum(feature.shape[2] * SMALLEST_STRIDE > self.input_size
                                   for feature in maps))
        self.places = self._declare(maps, [stride_of(self.input_size, feature.shape[2])
                                           for feature in maps])
        for place, hook in enumerate(hooks):
            if place not in self.places:
                hook.remove()

    def _units(self) -> list[str]:
        """Names of the modules that images pass through one after another, up to the head."""
        units = []
        for name, module in self.named_children():
            if name in CONTAINERS:
                units += [f"{name}.{child}" for child, _ in module.named_children()]
            elif name not in HEADS:
                units.append(name)
        return units

    def parts(self) -> list[list[tuple[str, ...]]]:
        """The modules that images pass through, up to the map of each stage; a torch.nn.Sequential
        or an encoder by its blocks."""
        units = self._units()
        bounds = [0, self.num_stem, *(place + 1 for place in self.places)]
        parts = [[block for unit in units[start:end] for block in self._blocks(unit)]
                 for start, end in zip(bounds, bounds[1:])]
        parts[0][0] += (*self._parameters, "encoder.pos_embedding")
        return parts

    def _blocks(self, unit: str) -> list[tuple[str, ...]]:
        module = self.get_submodule(unit)
        if unit == "encoder":
            blocks = self._blocks("encoder.layers")
            return [*blocks[:-1], (*blocks[-1], "encoder.ln")]
        blocks = {unit: module}
        if type(module) is nn.Sequential:
            blocks = {f"{unit}.{child}": block for child, block in module.named_children()}
        return [(name,) for name, block in blocks.items() if any(True for _ in block.parameters())]

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.maps.append(output)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        self.maps = []
        logits = self.network(images)
        maps, self.maps = [self._as_map(output) for output in self.maps], []
        return ModelOutput(logits if self.num_classes else None, maps)

    def _as_map(self, output: Tensor) -> Tensor:
        if output.dim() == 3:  # (N, 1 + T, C), the class token first
            side = math.isqrt(output.shape[1])
            return output[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return output.permute(0, 3, 1, 2) if self.is_channels_last else output

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        known = torchvision.models.list_models(module=torchvision.models)
        model = named_model("torchvision", options)
        if model not in known:
            raise unknown_name("torchvision", model, known)
        kinds = [*torchvision.models.get_model_weights(model).__members__]
        if options.get("weights", "DEFAULT") not in kinds:
            raise UserError(f"torchvision has no weights {options['weights']!r} of {model}; its "
                            f"own are {', '.join(kinds)}.")

    def published_state(self) -> dict[str, Tensor]:
        network = build_with(torchvision.models.get_model, f"torchvision model={self.spec['name']}:"
                             " its published weights could not be had", weights=self.kind,
                             **self.spec)
        return network.state_dict()
