"""ResNet (He et al. 2016, arXiv 1512.03385), with the stride in the 3x3 convolution as in
torchvision and timm. Module names are torchvision's, so its weights load."""
from collections.abc import Sequence

from torch import Tensor, nn

from models.base import FeatureInfo, ModelOutput, VisionModel, register_model
from models.layers import DropPath, check_stages, drop_path_rates
from utils.errors import UserError


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_dim: int, dim: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        self.downsample = _shortcut(in_dim, dim, stride)
        self.last_bn = "bn2"

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.drop_path(self.bn2(self.conv2(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_dim: int, dim: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, 4 * dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * dim)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        self.downsample = _shortcut(in_dim, 4 * dim, stride)
        self.last_bn = "bn3"

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.drop_path(self.bn3(self.conv3(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(in_dim: int, out_dim: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_dim == out_dim:
        return None
    return nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, stride=stride, bias=False),
                         nn.BatchNorm2d(out_dim))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@register_model("resnet_nano", block="basic", depths=(1, 1, 1, 1), dims=(16, 32, 64, 128))
@register_model("resnet18", block="basic", depths=(2, 2, 2, 2))
@register_model("resnet34", block="basic", depths=(3, 4, 6, 3))
@register_model("resnet50", block="bottleneck", depths=(3, 4, 6, 3))
@register_model("resnet101", block="bottleneck", depths=(3, 4, 23, 3))
class ResNet(VisionModel):
    """`zero_init_residual` starts the last BatchNorm weight of every block at 0, as the timm
    ResNets behind the published runs did; torchvision's default is off."""

    def __init__(self, num_classes: int = 1000, block: str = "bottleneck",
                 depths: Sequence[int] = (3, 4, 6, 3), dims: Sequence[int] = (64, 128, 256, 512),
                 drop_path: float = 0.0, zero_init_residual: bool = True) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise UserError(f"ResNet block must be one of {', '.join(BLOCKS)}; got {block!r}.")
        check_stages(depths, dims, smallest_depth=1)
        self.num_classes = num_classes
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(3, dims[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(dims[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        in_dim = dims[0]
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(BLOCKS[block](in_dim, dim, stride, next(rates)))
                in_dim = dim * BLOCKS[block].expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.stage_names = [f"layer{i + 1}" for i in range(len(depths))]
        self.fc = nn.Linear(in_dim, num_classes)
        self.feature_info = tuple(FeatureInfo(dim * BLOCKS[block].expansion, 4 * 2 ** i)
                                  for i, dim in enumerate(dims))
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(getattr(module, module.last_bn).weight)

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for name in self.stage_names:
            x = getattr(self, name)(x)
            features.append(x)
        return ModelOutput(self.fc(x.mean((2, 3))), features)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, then one id per block, the classifier last."""
        blocks = [f"{stage}.{j}." for stage in self.stage_names
                  for j in range(len(getattr(self, stage)))]
        return {name: _layer_id(name, blocks) for name, _ in self.named_parameters()}


def _layer_id(name: str, blocks: list[str]) -> int:
    if name.startswith("fc."):
        return len(blocks) + 1
    return next((i + 1 for i, block in enumerate(blocks) if name.startswith(block)), 0)
