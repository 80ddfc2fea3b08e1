"""Where sparse training starts: how dense each layer is, and which of its weights live."""
import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import VisionModel
from utils.errors import UserError
from utils.rng import fold_seed, generator

DENSE_FROM = 0.99  # a layer at this density or above is not masked at all, as published
LAYERS = ("all", "large-kernel")
INITS = ("snip", "snip-mask", "erk", "uniform", "weights")
ZERO_TOLERANCE = 0.02  # between --sparsity and the share of zeros of a file that is continued


def maskable(model: VisionModel, layers: str = "all") -> dict[str, nn.Parameter]:
    """The weights that may be masked, by name: every trained one of two or four dimensions but for
    those that the model exempts from decay (GRN's, tables of positions); with `large-kernel`, those
    that it names as its large kernels only."""
    if layers not in LAYERS:
        raise UserError(f"--sparse-layers must be one of {', '.join(LAYERS)}; got {layers!r}.")
    exempt = model.no_weight_decay()
    weights = {name: weight for name, weight in model.named_parameters()
               if weight.dim() in (2, 4) and weight.requires_grad and name not in exempt}
    if layers == "all":
        return weights
    large = model.large_kernels()
    if not large:
        raise UserError(f"--sparse-layers large-kernel: {type(model).__name__} has no large "
                        "kernels. Use --sparse-layers all.")
    return {name: weight for name, weight in weights.items() if name in large}


def starting_masks(model: VisionModel, weights: Mapping[str, nn.Parameter], *, init: str,
                   density: float, first_batch: Callable[[], tuple[Tensor, Tensor]],
                   seed: int) -> dict[str, Tensor]:
    """Bool masks by name, of those among `weights` that are masked at all.

    `snip`, `erk` and `uniform` settle the density of each layer; which of its weights live is then
    drawn at random, the number exact. `snip-mask` keeps the weights that SNIP ranks highest.
    `weights` keeps what is not zero, to continue a network that was trained sparse.
    """
    if init not in INITS:
        raise UserError(f"--sparse-init must be one of {', '.join(INITS)}; got {init!r}.")
    if not 0 < density < 1:
        raise UserError(f"--sparsity must lie in (0, 1) to mask anything, got {1 - density:g}.")
    _check_zeros(weights, init, density)
    if init == "weights":
        masks = {name: weight.detach() != 0 for name, weight in weights.items()}
    elif init == "snip-mask":
        torch.manual_seed(fold_seed(seed, "snip"))
        scores = snip_scores(model, weights, *first_batch())
        threshold = snip_threshold(scores, density)
        masks = {name: score > threshold for name, score in scores.items()}
    else:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if init == "snip":
            torch.manual_seed(fold_seed(seed, "snip"))
            densities = snip_densities(model, *first_batch(), density, names=list(weights))
        elif init == "erk":
            densities = erk_densities(shapes, density)
        else:
            densities = dict.fromkeys(shapes, density)
        masks = draw_masks(shapes, densities, seed)
    return _without_dense_layers(masks, init, density)


def _without_dense_layers(masks: dict[str, Tensor], init: str, density: float
                          ) -> dict[str, Tensor]:
    """Those that mask enough to be kept. Raises UserError where a layer is wholly masked, or none
    is masked."""
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise UserError(f"--sparsity {1 - density:g} with --sparse-init {init} leaves {len(empty)} "
                        f"layer(s) without a weight, {empty[0]} the first, and they would stay so. "
                        "Lower --sparsity, or use --sparse-init erk.")
    masks = {name: mask for name, mask in masks.items()
             if counts[name] < DENSE_FROM * mask.numel()}
    if not masks:
        raise UserError(f"--sparsity {1 - density:g} masks nothing: no layer falls below the "
                        f"density of {DENSE_FROM} from which it stays dense. Raise --sparsity.")
    return masks


def _check_zeros(weights: Mapping[str, nn.Parameter], init: str, density: float) -> None:
    """A network that was trained sparse must not be masked anew, nor a dense one be taken for
    sparse."""
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    share = sum(zeros.values()) / total
    # A layer of nothing but zeros is one that starts at zero, as the heads of Transformers do.
    is_sparse = 0.05 * total < sum(number for name, number in zeros.items()
                                   if number < weights[name].numel())
    if init != "weights" and is_sparse:
        raise UserError(f"{share:.1%} of the weights are zero already, as of a network that was "
                        f"trained sparse, and --sparse-init {init} would zero others at random. "
                        "Continue it with --sparse-init weights.")
    if init == "weights" and abs(share - (1 - density)) > ZERO_TOLERANCE:
        raise UserError(f"--sparse-init weights keeps the zeros of --student-weights, which are "
                        f"{share:.1%} of its weights, but --sparsity is {1 - density:g}. "
                        + (f"To go on with that, pass --sparsity {share:.3f}." if is_sparse else
                           "That network is dense; mask it with --sparse-init snip or erk."))


def snip_densities(model: VisionModel, images: Tensor, labels: Tensor, density: float,
                   names: Sequence[str] | None = None) -> dict[str, float]:
    """Share of each layer's weights whose SNIP score is above the one that int(density * all) of
    them reach (Lee et al. 2019, arXiv 1810.02340; of which SLaK takes the densities only).

    `images` (N, 3, H, W) and hard `labels` (N,) are one batch, not mixed. `names`: the layers; by
    default all that may be masked. `model` is left as it is.
    """
    weights = maskable(model)
    weights = {name: weights[name] for name in names or weights}
    scores = snip_scores(model, weights, images, labels)
    threshold = snip_threshold(scores, density)
    return {name: (score > threshold).double().mean().item() for name, score in scores.items()}


def snip_scores(model: VisionModel, weights: Mapping[str, nn.Parameter], images: Tensor,
                labels: Tensor) -> dict[str, Tensor]:
    """|weight * gradient of the cross-entropy|, from a copy of `model` in training mode."""
    copied = copy.deepcopy(model).train()
    parameters = dict(copied.named_parameters())
    chosen = [parameters[name] for name in weights]
    loss = F.cross_entropy(copied(images), labels)
    grads = torch.autograd.grad(loss, chosen, materialize_grads=True)  # zeros where none
    return {name: (weight.detach() * grad).abs()
            for name, weight, grad in zip(weights, chosen, grads)}


def snip_threshold(scores: Mapping[str, Tensor], density: float) -> Tensor:
    """The int(density * all)-th largest score; what lives is strictly above it, as published."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    rank = max(1, int(len(everything) * density))
    threshold = everything.kthvalue(len(everything) - rank + 1).values
    if not 0 < threshold < float("inf"):
        raise UserError(f"SNIP cannot choose {density:.1%} of the weights: only "
                        f"{(everything > 0).double().mean():.1%} get a gradient at the start. Use "
                        "--sparse-init erk.")
    return threshold


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: in proportion to (sum of dimensions) / (their product), at most 1, scaled
    so that `density` of all weights live (Evci et al. 2020, arXiv 1911.11134)."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ratios = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(sizes):
        rest = [name for name in sizes if name not in dense]
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = wanted / sum(ratios[name] * sizes[name] for name in rest)
        over = {name for name in rest if scale * ratios[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * ratios[name] for name in sizes}
        # Only the densest at a time: it takes from what the others may have.
        dense |= {name for name in over if ratios[name] == max(ratios[name] for name in over)}
    return dict.fromkeys(sizes, 1.0)


def draw_masks(shapes: Mapping[str, Sequence[int]], densities: Mapping[str, float],
               seed: int) -> dict[str, Tensor]:
    """Per layer round(density * size) weights chosen at random."""
    masks = {}
    for index, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        order = torch.randperm(size, generator=generator(seed, "mask", index))
        mask = torch.zeros(size, dtype=torch.bool)
        mask[order[:round(densities[name] * size)]] = True
        masks[name] = mask.view(*shape)
    return masks
