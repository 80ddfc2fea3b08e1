"""Randomness as a function of counters: nothing of a generator's state need ever be saved."""
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
