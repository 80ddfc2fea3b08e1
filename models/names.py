"""Checkpoints of one architecture that name its tensors in different ways."""
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from utils.errors import UserError

Rules = Sequence[tuple[str, str]]  # pattern of a whole name, replacement


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """`state` with each name rewritten by the first rule that fits it; others stay. Raises
    UserError where two names become one."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result = {}
    for name, value in state.items():
        rule = next(((p, r) for p, r in compiled if p.fullmatch(name)), None)
        new = rule[0].sub(rule[1], name) if rule else name
        if new in result:
            raise UserError(f"the file names {new} twice, as {name} and otherwise; it mixes the "
                            "checkpoints of two programs.")
        result[new] = value
    return result
