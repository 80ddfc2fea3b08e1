"""Sparse training from scratch: a network most of whose layers keep only a share of their weights,
and change which ones while they train (SLaK, Liu et al. 2023, arXiv 2207.03620, section 3; the
prune-and-grow loop is that of RigL, Evci et al. 2020, arXiv 1911.11134).

Masks hold weights at zero; nothing is skipped, so they cost a little time and save none.
"""
import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.base import VisionModel
from models.sparse_init import (
    INITS,
    LAYERS,
    erk_densities,
    maskable,
    snip_densities,
    starting_masks,
)
from utils.distributed import broadcast, broadcast_object, is_main
from utils.errors import UserError
from utils.optim import cosine_schedule
from utils.rng import generator

__all__ = ["SparseMask", "add_sparsity_flags", "erk_densities", "gradient_growth",
           "magnitude_prune", "maskable", "snip_densities"]

FINAL_PRUNE_RATE = 0.005  # where the published cosine ends
GROWTHS = ("random", "gradient", "momentum")


def magnitude_prune(weight: Tensor, mask: Tensor, rate: float) -> Tensor:
    """`mask` without the ceil(rate * kept) smallest |weight| of those it keeps."""
    kept = mask.bool()
    count = math.ceil(rate * int(kept.sum()))
    return (kept & ~_highest(-weight.abs(), kept, count)).to(mask.dtype)


def gradient_growth(mask: Tensor, grad: Tensor, count: int) -> Tensor:
    """`mask` with exactly the `count` largest |grad| of what it leaves out (RigL)."""
    return _grown(mask.bool(), grad.abs(), count).to(mask.dtype)


def _grown(kept: Tensor, score: Tensor, count: int, just_pruned: Tensor | None = None) -> Tensor:
    """`kept` and the `count` free places of the highest score; those just pruned come back only
    where nothing else is left."""
    free = ~kept
    if not 0 <= count <= int(free.sum()):
        raise UserError(f"cannot grow {count} weights: {int(free.sum())} are masked.")
    fresh = free if just_pruned is None else free & ~just_pruned
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
        masks = starting_masks(self.model, self.weights, init=init, density=density,
                               first_batch=first_batch, seed=self.seed) if is_main() else {}
        names = broadcast_object(list(masks))
        self._set_masks({name: masks.get(name) for name in names})
        for mask in self.masks.values():
            broadcast(mask)
        self._count()
        self.hold()

    def step(self, step: int) -> None:
        """Called after the optimizer made update `step`, counted from 1, by all processes."""
        self.prune_rate = self.prune_rate_at(step)
        self.hold()
        if self._is_due(step):
            for index, name in enumerate(self.masks):
                self._change(name, index, step)
            self.num_changes, self.changed_at = self.num_changes + 1, step

    @torch.no_grad()
    def hold(self) -> None:
        """Zero the masked weights and what the optimizer remembers of them."""
        for name, mask in self.masks.items():
            self._zero_outside(name, mask, moments=self.growth != "momentum")

    def _zero_outside(self, name: str, mask: Tensor, moments: bool) -> None:
        weight, factor = self.weights[name], mask.view(torch.uint8)  # faster to multiply by
        weight.mul_(factor)
        for moment in self._moments(weight) if moments else ():
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
        if not every or step >= self.total_steps or step // every == self.changed_at // every:
            return False
        weights = [self.weights[name] for name in self.masks]
        if self.growth == "momentum":
            return all(self.optimizer.state.get(weight, {}).get("step", 0) > 0
                       for weight in weights)
        return self.growth == "random" or all(
            bool(weight.grad.isfinite().all()) for weight in weights)

    @torch.no_grad()
    def _change(self, name: str, index: int, step: int) -> None:
        """Prune and grow one layer: decided by the first process, done by all."""
        weight, mask = self.weights[name], self.masks[name]
        kept, grown = mask.clone(), mask.clone()
        if is_main():
            kept.copy_(magnitude_prune(weight, mask, self.prune_rate))
            count = int(mask.sum()) - int(kept.sum())
            rng = generator(self.seed, "mask growth", step, index)
            grown.copy_(_grown(kept, self._score(weight, rng), count, mask & ~kept))
        broadcast(kept)
        broadcast(grown)
        self._zero_outside(name, kept, moments=self.growth != "momentum")
        if self.growth == "momentum":
            for moment in self._moments(weight):
                moment.masked_fill_(grown & ~kept, 0)
        mask.copy_(grown)

    def _score(self, weight: nn.Parameter, rng: torch.Generator) -> Tensor:
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

    def figures(self) -> dict[str, float]:
        """What the log shows."""
        rate = {"prune_rate": self.prune_rate} if self.prune_every else {}
        return {"density": self.density, **rate}

    def describe(self) -> str:
        num_changes = (self.total_steps - 1) // self.prune_every if self.prune_every else 0
        change = f"they never change in {self.total_steps:,} updates"
        if num_changes:
            change = (f"they change {num_changes:,} times, every {self.prune_every} updates, by a "
                      f"share of {self.prune_rate_at(0):g} -> {FINAL_PRUNE_RATE} ({self.growth} "
                      "growth)")
        return (f"{len(self.masks)} layers masked, {self.num_maskable - self.num_masked:,} of "
                f"{self.num_maskable:,} weights live (density {self.density:.4f}); {change}")

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
        self._count()
        if self.num_masked != state["num_masked"] or any(
                self.weights[name][~mask].any() for name, mask in self.masks.items()):
            raise ValueError("its masks are not those of its weights")
        self.prune_rate = state["prune_rate"]
        self.num_changes, self.changed_at = state["num_changes"], state["changed_at"]

    def _set_masks(self, masks: dict[str, Tensor | None]) -> None:
        """Beside their weights, in the same memory layout; None is filled in later."""
        self.masks = {name: torch.ones_like(self.weights[name], dtype=torch.bool)
                      for name in masks}
        for name, mask in masks.items():
            if mask is not None:
                self.masks[name].copy_(mask)

    def _count(self) -> None:
        self.num_masked = sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())


def _pack(mask: Tensor) -> Tensor:
    """A bool tensor as ceil(n / 8) bytes, the first element in the lowest bit."""
    flat = mask.flatten().cpu()
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:shape.numel()].bool().view(shape)


def add_sparsity_flags(parser: ArgumentParser) -> None:
    """The command line's words for SparseMask."""
    group = parser.add_argument_group("sparse training of the student")
    flag = group.add_argument
    flag("--sparsity", type=float, default=0.0, help="share of the weights to mask, 0 = off")
    flag("--sparse-init", choices=INITS, default="snip",
         help="density of each layer, or the masks; erk where SNIP finds no gradient at the start")
    flag("--sparse-layers", choices=LAYERS, default="all", help="which weights may be masked")
    flag("--prune-rate", type=float, default=0.3, help="share of the live weights that moves first")
    flag("--prune-every", type=int, default=100, help="updates between moves, 0 = static masks")
    flag("--growth", choices=GROWTHS, default="random", help="where pruned weights move to")
