"""Sparse training from scratch: a network most of whose layers keep only a share of their weights,
and change which ones while they train (SLaK, Liu et al. 2023, arXiv 2207.03620, section 3; the
prune-and-grow loop is that of RigL, Evci et al. 2020, arXiv 1911.11134).

Masks hold weights at zero; nothing is skipped, so they cost a little time and save none.
"""
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import VisionModel
from utils.distributed import broadcast, broadcast_object, is_main
from utils.optim import cosine_schedule
from utils.registry import UserError
from utils.rng import fold_seed, generator

LAYERS = ("all", "large-kernel")
INITS = ("snip", "snip-mask", "erk", "uniform", "weights")
GROWTHS = ("random", "gradient", "momentum")
DENSE_FROM = 0.99  # a layer at this density or above is not masked at all, as published
FINAL_PRUNE_RATE = 0.005  # where the published cosine ends
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

    `snip`, `erk` and `uniform` give the density of each layer; which of its weights live is then
    drawn at random, the number exact. `snip-mask` keeps the weights that SNIP ranks highest.
    `weights` keeps what is not zero, to continue a network that was trained sparse.
    """
    if init not in INITS:
        raise UserError(f"--sparse-init must be one of {', '.join(INITS)}; got {init!r}.")
    if not 0 < density < 1:
        raise UserError(f"--sparsity must lie in (0, 1) to mask anything, got {1 - density:g}.")
    _check_zeros(weights, init, density)
    if init in ("snip", "snip-mask"):
        torch.manual_seed(fold_seed(seed, "snip"))
        images, labels = first_batch()
    if init == "weights":
        masks = {name: weight.detach() != 0 for name, weight in weights.items()}
    elif init == "snip-mask":
        masks = snip_masks(model, weights, images, labels, density)
    else:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        densities = dict.fromkeys(shapes, density)  # uniform
        if init == "snip":
            densities = snip_densities(model, weights, images, labels, density)
        elif init == "erk":
            densities = erk_densities(shapes, density)
        masks = draw_masks(shapes, densities, seed)
    return _without_dense_layers(masks, init, density)


def _check_zeros(weights: Mapping[str, nn.Parameter], init: str, density: float) -> None:
    """A network that was trained sparse must not be masked anew, nor a dense one be taken for
    sparse."""
    total = num_zeros = num_masked = 0
    for weight in weights.values():
        zeros = int((weight == 0).sum())
        total, num_zeros = total + weight.numel(), num_zeros + zeros
        # A layer of nothing but zeros is one that starts at zero, as the heads of Transformers do.
        if zeros < weight.numel():
            num_masked += zeros
    share, is_sparse = num_zeros / total, num_masked > 0.05 * total
    if init != "weights" and is_sparse:
        raise UserError(f"{share:.1%} of the weights are zero already, as of a network that was "
                        f"trained sparse, and --sparse-init {init} would zero others at random. "
                        "Continue it with --sparse-init weights.")
    if init == "weights" and abs(share - (1 - density)) > ZERO_TOLERANCE:
        remedy = "That network is dense; mask it with --sparse-init snip or erk."
        if is_sparse:
            remedy = f"To go on with that, pass --sparsity {share:.3f}."
        raise UserError(f"--sparse-init weights keeps the zeros of --student-weights, which are "
                        f"{share:.1%} of its weights, but --sparsity is {1 - density:g}. {remedy}")


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


def snip_densities(model: VisionModel, weights: Mapping[str, nn.Parameter], images: Tensor,
                   labels: Tensor, density: float) -> dict[str, float]:
    """Share of each layer that SNIP keeps, which is all that SLaK takes from it."""
    masks = snip_masks(model, weights, images, labels, density)
    return {name: mask.double().mean().item() for name, mask in masks.items()}


def snip_masks(model: VisionModel, weights: Mapping[str, nn.Parameter], images: Tensor,
               labels: Tensor, density: float) -> dict[str, Tensor]:
    """The weights whose score |weight * gradient of the cross-entropy| is above the one that
    int(density * all) of them reach (SNIP, Lee et al. 2019, arXiv 1810.02340).

    `images` (N, 3, H, W) and hard `labels` (N,) are one batch, not mixed. The gradient is that of a
    copy in training mode; `model` is left as it is.
    """
    copied = copy.deepcopy(model).train()
    parameters = dict(copied.named_parameters())
    chosen = [parameters[name] for name in weights]
    loss = F.cross_entropy(copied(images), labels)
    grads = torch.autograd.grad(loss, chosen, materialize_grads=True)  # zeros where none
    scores = {name: (weight.detach() * grad).abs()
              for name, weight, grad in zip(weights, chosen, grads)}
    everything = torch.cat([score.flatten() for score in scores.values()])
    rank = max(1, int(len(everything) * density))
    threshold = everything.kthvalue(len(everything) - rank + 1).values
    if not 0 < threshold < math.inf:
        raise UserError(f"SNIP cannot choose {density:.1%} of the weights: only "
                        f"{(everything > 0).double().mean():.1%} get a gradient at the start. Use "
                        "--sparse-init erk.")
    return {name: score > threshold for name, score in scores.items()}  # strictly, as published


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
        largest = max(ratios[name] for name in rest)
        if scale * largest <= 1:
            return {name: 1.0 if name in dense else scale * ratios[name] for name in sizes}
        # Only the densest at a time: it takes from what the others may have.
        dense |= {name for name in rest if ratios[name] == largest}
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


def magnitude_prune(weight: Tensor, mask: Tensor, rate: float) -> Tensor:
    """`mask` without the ceil(rate * kept) smallest |weight| of those it keeps."""
    kept = mask.bool()
    count = math.ceil(rate * int(kept.sum()))
    return (kept & ~_highest(-weight.abs(), kept, count)).to(mask.dtype)


def gradient_growth(mask: Tensor, grad: Tensor, count: int) -> Tensor:
    """`mask` with exactly the `count` largest |grad| of what it leaves out (RigL)."""
    kept = mask.bool()
    return _grow(kept, grad.abs(), count, just_pruned=torch.zeros_like(kept)).to(mask.dtype)


def _grow(kept: Tensor, score: Tensor, count: int, just_pruned: Tensor) -> Tensor:
    """`kept` and the `count` free places of the highest score; those just pruned come back only
    where nothing else is left."""
    free = ~kept
    if not 0 <= count <= int(free.sum()):
        raise UserError(f"cannot grow {count} weights: {int(free.sum())} are masked.")
    fresh = free & ~just_pruned
    num_fresh = min(count, int(fresh.sum()))
    grown = kept | _highest(score, fresh, num_fresh)
    return grown | _highest(score, free & ~fresh, count - num_fresh)


def _highest(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The mask of the `count` candidates of the highest score."""
    chosen = torch.zeros_like(candidates, memory_format=torch.contiguous_format).view(-1)
    scores = torch.where(candidates, score, -math.inf).flatten()
    chosen[scores.topk(count, sorted=False).indices] = True
    return chosen.view(candidates.shape)


class SparseMask:
    """Which weights of `model` live: those whose mask is True. `masks` holds the layers that are
    masked at all, as bool tensors by the name of their weight.

    Built beside `optimizer`, then either `start`ed or restored; `step` follows every update of the
    optimizer. Masked weights are exactly 0 at any time after it, and so are their moments (but
    under momentum growth, which ranks them). At every `prune_every`-th update (0: never) each layer
    drops a share of its kept weights, the smallest, and grows as many elsewhere, from 0 and with
    moments of 0. The share follows a cosine from `prune_rate` to 0.005 over `total_steps` updates.
    The run's last update changes nothing, as what it grew could not learn any more.

    `growth` chooses where: at random; at the largest gradient of the update (RigL); or at the
    largest momentum over root mean square (of AdamW).
    """

    def __init__(self, model: VisionModel, optimizer: torch.optim.Optimizer, *, total_steps: int,
                 layers: str = "all", growth: str = "random", prune_rate: float = 0.3,
                 prune_every: int = 100, seed: int = 0) -> None:
        if growth not in GROWTHS:
            raise UserError(f"--growth must be one of {', '.join(GROWTHS)}; got {growth!r}.")
        if not FINAL_PRUNE_RATE <= prune_rate <= 1:
            raise UserError(f"--prune-rate must lie in [{FINAL_PRUNE_RATE}, 1], got {prune_rate}; "
                            "masks that never change are --prune-every 0.")
        self.model, self.optimizer = model, optimizer
        self.weights = maskable(model, layers)
        self.num_maskable = sum(weight.numel() for weight in maskable(model).values())
        self.growth, self.prune_every, self.total_steps = growth, prune_every, total_steps
        self.prune_rate_at = cosine_schedule(prune_rate, FINAL_PRUNE_RATE, total_steps)
        self.seed = seed
        self.masks: dict[str, Tensor] = {}
        self.num_masked = 0  # weights; constant from the start on
        self.prune_rate, self.num_changes, self.changed_at = prune_rate, 0, 0

    def start(self, init: str, density: float,
              first_batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Draw the masks on the first process, give them to all, and zero what they mask.

        `init`: see `starting_masks`. `density`: share of the weights to keep. `first_batch` returns
        images (N, 3, H, W) and labels (N,); it is called on the first process, if at all.
        """
        masks = {}
        if is_main():
            masks = starting_masks(self.model, self.weights, init=init, density=density,
                                   first_batch=first_batch, seed=self.seed)
        for name in broadcast_object(list(masks)):
            mask = torch.ones_like(self.weights[name], dtype=torch.bool)
            if name in masks:
                mask.copy_(masks[name])
            broadcast(mask)
            masks[name] = mask
        self._set_masks(masks)
        self.apply_masks()

    def step(self, step: int) -> None:
        """Called after the optimizer made update `step`, counted from 1, by all processes."""
        self.prune_rate = self.prune_rate_at(step)
        self.apply_masks()
        if self._is_due(step):
            for index, name in enumerate(self.masks):
                self._prune_and_grow(name, index, step)
            self.num_changes, self.changed_at = self.num_changes + 1, step

    def apply_masks(self) -> None:
        """Zero the masked weights and what the optimizer remembers of them."""
        for name, mask in self.masks.items():
            self._zero_outside(name, mask)

    @torch.no_grad()
    def _zero_outside(self, name: str, mask: Tensor) -> None:
        weight, factor = self.weights[name], mask.view(torch.uint8)  # faster to multiply by
        weight.mul_(factor)
        if self.growth != "momentum":
            for moment in self._moments(weight):
                moment.mul_(factor)

    def _moments(self, weight: nn.Parameter) -> Iterable[Tensor]:
        """The optimizer's state of every element of `weight`."""
        state = self.optimizer.state.get(weight, {})
        return [value for value in state.values()
                if isinstance(value, Tensor) and value.shape == weight.shape]

    def _is_due(self, step: int) -> bool:
        """Whether a multiple of `prune_every` was reached since the last change. What overflowed
        ranks nothing, and the optimizer then skipped its update: the change waits for the next."""
        every = self.prune_every
        if every == 0 or step >= self.total_steps or step // every == self.changed_at // every:
            return False
        weights = [self.weights[name] for name in self.masks]
        if self.growth == "gradient":
            return all(bool(weight.grad.isfinite().all()) for weight in weights)
        if self.growth == "momentum":
            return all(self.optimizer.state.get(weight, {}).get("step", 0) > 0
                       for weight in weights)
        return True

    @torch.no_grad()
    def _prune_and_grow(self, name: str, index: int, step: int) -> None:
        """Of one layer: decided by the first process, done by all."""
        weight, mask = self.weights[name], self.masks[name]
        kept, grown = mask.clone(), mask.clone()
        if is_main():
            kept.copy_(magnitude_prune(weight, mask, self.prune_rate))
            count = int(mask.sum()) - int(kept.sum())
            rng = generator(self.seed, "mask growth", step, index)
            grown.copy_(_grow(kept, self._score(weight, rng), count, mask & ~kept))
        broadcast(kept)
        broadcast(grown)
        self._zero_outside(name, kept)
        if self.growth == "momentum":
            for moment in self._moments(weight):
                moment.masked_fill_(grown & ~kept, 0)
        mask.copy_(grown)

    def _score(self, weight: nn.Parameter, rng: torch.Generator) -> Tensor:
        """What ranks the places where weights may grow, of the shape of `weight`."""
        if self.growth == "random":
            return torch.rand(weight.shape, generator=rng).to(weight.device)
        if self.growth == "gradient":
            return weight.grad.abs()
        state = self.optimizer.state[weight]
        return (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs()

    @property
    def density(self) -> float:
        """Share of all weights of two and four dimensions, masked layers or not, that live."""
        return 1 - self.num_masked / self.num_maskable

    def metrics(self) -> dict[str, float]:
        """What the log shows."""
        if self.prune_every == 0:
            return {"density": self.density}
        return {"density": self.density, "prune_rate": self.prune_rate}

    def describe(self) -> str:
        num_live = self.num_maskable - self.num_masked
        num_changes = 0
        if self.prune_every > 0:
            num_changes = (self.total_steps - 1) // self.prune_every
        change = f"they never change in {self.total_steps:,} updates"
        if num_changes > 0:
            change = (f"they change {num_changes:,} times, every {self.prune_every} updates, by a "
                      f"share of {self.prune_rate_at(0):g} -> {FINAL_PRUNE_RATE} ({self.growth} "
                      "growth)")
        return (f"{len(self.masks)} layers masked, {num_live:,} of {self.num_maskable:,} weights "
                f"live (density {self.density:.4f}); {change}")

    def state_dict(self) -> dict[str, Any]:
        """Masks at one bit per weight, and the counters."""
        return {"masks": {name: _pack(mask) for name, mask in self.masks.items()},
                "num_masked": self.num_masked, "num_changes": self.num_changes,
                "changed_at": self.changed_at, "prune_rate": self.prune_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the masks are damaged, or those of other weights than the network
        holds by now."""
        for name, bits in state["masks"].items():
            weight = self.weights.get(name)
            if (weight is None or not isinstance(bits, Tensor) or bits.dtype is not torch.uint8
                    or bits.shape != (-(-weight.numel() // 8),)):
                raise ValueError(f"its mask of {name} does not fit this network")
        self._set_masks({name: _unpack(bits, self.weights[name].shape)
                         for name, bits in state["masks"].items()})
        if self.num_masked != state["num_masked"] or any(
                self.weights[name][~mask].any() for name, mask in self.masks.items()):
            raise ValueError("its masks are not those of its weights")
        self.prune_rate = state["prune_rate"]
        self.num_changes, self.changed_at = state["num_changes"], state["changed_at"]

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Copies, beside their weights and in the same memory layout."""
        self.masks = {name: torch.empty_like(self.weights[name], dtype=torch.bool).copy_(mask)
                      for name, mask in masks.items()}
        self.num_masked = sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())


def _pack(mask: Tensor) -> Tensor:
    """A bool tensor as ceil(n / 8) bytes, the first element in the lowest bit."""
    flat = mask.flatten().cpu()
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:shape.numel()].bool().view(shape)
