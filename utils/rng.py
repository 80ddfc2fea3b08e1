"""Randomness as a function of counters: nothing of a generator's state need ever be saved."""
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Position(NamedTuple):
    """Where a process's micro-batch stands in a run's order of images: what decides which images
    it has, how they are mixed, and so what a teacher says of them."""

    epoch: int  # whose order of images and augmentation it has
    batch: int  # micro-batch of this epoch, from 0
    step: int  # update
    micro: int  # micro-batch of this update
    rank: int


def position_of(step: int, micro: int, rank: int, *, steps_per_epoch: int, accum_steps: int,
                epochs_kept: int = 0) -> Position:
    """That of micro-batch `micro` of update `step`. Of `epochs_kept` epochs the images come back in
    turn: epoch e has those of epoch e modulo `epochs_kept`; 0: each epoch has its own."""
    step %= epochs_kept * steps_per_epoch or sys.maxsize
    epoch, done = divmod(step, steps_per_epoch)
    return Position(epoch, done * accum_steps + micro, step, micro, rank)


def fold_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed that depends on all arguments and on nothing else, on any machine."""
    text = f"{seed}/{purpose}/" + "/".join(str(int(counter)) for counter in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator started from `fold_seed`."""
    return torch.Generator().manual_seed(fold_seed(seed, purpose, *counters))


@contextmanager
def seeded(seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Torch's global CPU generator started from `fold_seed` inside, untouched afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold_seed(seed, purpose, *counters))
        yield
