"""Checkpoints of one architecture that name its tensors in different ways."""
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str]]  # pattern of a whole name, replacement


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """`state` with each name rewritten by the first rule that fits it; others stay."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result = {}
    for name, value in state.items():
        rule = next(((p, r) for p, r in compiled if p.fullmatch(name)), None)
        result[rule[0].sub(rule[1], name) if rule else name] = value
    return result
