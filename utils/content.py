"""What a checkpoint holds: ordinary tensors and plain values, in the form that is expected, and the
same to the bit as when they were saved."""
import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.registry import UserError

# What ordinary weights and states are made of.
DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})
DEEPEST = 20  # dicts and lists within one another; ours have five
CHECKSUMS = "checksums"  # the entry of a file that has those of the others


def tensor_fault(value: Any) -> str | None:
    """Why `value` is no ordinary tensor, after the words 'it is'; None when it is one: dense, of
    real numbers, with each of its values in memory. Only such ones may be copied or computed with:
    others end a program in an error of PyTorch's, or without one."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, not a tensor"
    if value.is_nested or value.layout is not torch.strided:
        return "a nested or sparse tensor"
    if value.is_quantized or value.dtype not in DTYPES:
        return f"a tensor of {value.dtype}"
    if value.device.type == "meta":
        return "a tensor without values (meta)"
    if value.is_neg() or value.nbytes > value.untyped_storage().nbytes():
        return "a view of fewer values than it shows"
    return None


def is_list_of_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def entry(content: Any, *names: Any) -> Any:
    """The value under `names`, one within the other; None where there is none."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


class Named(NamedTuple):
    """The form of a dict with any names, all its values of one form."""

    form: Any


def check_form(value: Any, form: Any, name: str) -> None:
    """Raises ValueError, naming the entry, unless `value` has the form of `form`.

    A tensor: an ordinary one of the same dtype and shape. A dtype: any ordinary tensor of it. A
    dict: the same names, each of its form; a `Named`: any names. A list or tuple: as many values,
    each of its form. A type: a value of exactly that type. Any other value: one of its type. Whole
    numbers must lie in [0, 2 ** 63), and no number may be NaN.
    """
    if isinstance(form, (Tensor, torch.dtype)):
        _check_tensor(value, form, name)
    elif isinstance(form, Named):
        _check_type(value, dict, name)
        for key in value:
            _check_type(key, str, f"a name in {name}")
            check_form(value[key], form.form, f"{name}.{key}")
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {_described(value)}, expected a dict")
        _check_names(value, form, name)
        for key in form:
            check_form(value[key], form[key], f"{name}.{key}" if name else str(key))
    elif isinstance(form, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(form):
            raise ValueError(f"{name} is {_described(value)}, expected {len(form)} values")
        for i, (item, wanted) in enumerate(zip(value, form)):
            check_form(item, wanted, f"{name}[{i}]")
    else:
        _check_type(value, form if isinstance(form, type) else type(form), name)


def _check_tensor(value: Any, form: Tensor | torch.dtype, name: str) -> None:
    fault = tensor_fault(value)
    if fault:
        raise ValueError(f"{name} is {fault}")
    dtype = form if isinstance(form, torch.dtype) else form.dtype
    if value.dtype != dtype:
        raise ValueError(f"{name} is a tensor of {value.dtype}, expected {dtype}")
    if isinstance(form, Tensor) and value.shape != form.shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected "
                         f"{tuple(form.shape)}")


def _check_names(value: dict, form: dict, name: str) -> None:
    for what, names in (("lacks", [key for key in form if key not in value]),
                        ("has an unknown", [key for key in value if key not in form])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{name or 'it'} {what} {str(names[0])[:80]}{more}")


def _check_type(value: Any, wanted: type, name: str) -> None:
    is_right = type(value) is wanted
    if wanted is int and is_right:
        is_right = 0 <= value < 2 ** 63
    if wanted is float and is_right:
        is_right = value == value  # not NaN
    if not is_right:
        kind = {int: "a whole number from 0", float: "a number", type(None): "nothing"}.get(
            wanted, f"a {wanted.__name__}")
        raise ValueError(f"{name} is {_described(value)}, expected {kind}")


def _described(value: Any) -> str:
    if value is None or isinstance(value, (bool, float)) or (
            isinstance(value, int) and abs(value) < 2 ** 64):
        return repr(value)
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def checksum(value: Any) -> str:
    """sha256 of names, types, shapes and every bit of the values, wherever they lie in memory and
    in whichever layout. 300 MB take half a second on a core with instructions for sha256.

    Raises UserError for what is neither an ordinary tensor nor a plain value nor made of them."""
    result = hashlib.sha256()
    _add(result, value, "the content", 0)
    return result.hexdigest()


def _add(result: Any, value: Any, name: str, depth: int) -> None:
    if isinstance(value, Tensor):
        fault = tensor_fault(value)
        if fault:
            raise UserError(f"{name} is {fault}")
        result.update(f"{value.dtype}{tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        result.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)) and depth < DEEPEST:
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        result.update(f"{kind}{len(value)};".encode())
        pairs: Iterable = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            _add(result, key, f"a name in {name}", depth + 1)
            _add(result, item, f"{name}.{key}", depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        result.update(f"int{value:x};".encode())  # in decimals Python limits their number
    elif value is None or isinstance(value, (bool, float, str)):
        result.update(f"{type(value).__name__}{value!r};".encode())
    else:
        raise UserError(f"{name} is a {type(value).__name__}")


def checksums(content: dict[str, Any]) -> dict[str, str]:
    """One per entry, so that a copy without some of them can still be checked."""
    return {name: checksum({name: value}) for name, value in content.items()}


def check_checksums(content: dict[str, Any], path: Any) -> None:
    """Raises UserError unless the entries of a file are those that `save_atomically` wrote. Entries
    may have been removed since, or others added."""
    saved = content[CHECKSUMS]
    damaged = f"{path} is damaged: %s. Use another copy of the file, or another file."
    if not isinstance(saved, dict):
        raise UserError(damaged % "its checksums are not readable")
    names = content.keys() - {CHECKSUMS}
    if names - saved.keys() and saved.keys() - names:  # as after damage to a name
        raise UserError(damaged % f"it has {min(map(str, names - saved.keys()))!r} in place of "
                        f"{min(map(str, saved.keys() - names))!r}")
    for name in saved:
        if name in names:
            try:
                is_equal = checksum({name: content[name]}) == saved[name]
            except UserError as error:
                raise UserError(damaged % str(error)) from None
            if not is_equal:
                raise UserError(damaged % f"{name!r} is not what was saved (sha256 differs)")
