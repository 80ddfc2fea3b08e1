"""State dicts of any program: found in a file, freed of wrappers' prefixes, renamed, compared with
a network, recognised."""
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import MODELS, VisionModel, create_model
from utils.classes import shown
from utils.content import tensor_fault
from utils.registry import UserError, one_line

# Where published files keep their weights; a file that has one of these is not asked about others.
CONTAINERS = ("model", "state_dict", "model_ema", "state_dict_ema")
# Entries that hold nothing learned: buffers, and the counter of PyTorch's average. Files older than
# torch 0.4.1 do not count BatchNorm's batches.
COMPUTED = ("relative_position_index", "attn_mask", "num_batches_tracked", "n_averaged")
MOST_NESTED = 3  # dicts within dicts
MOST_PREFIXES = 4  # of wrappers around wrappers

State = dict[str, Tensor]


# Where in a file


def find_state(content: dict[Any, Any], path: Path, key: str | None, key_flag: str
               ) -> tuple[str, State]:
    """The state dict in a file's content and its name there, '' for the whole of it. `key` names it
    where there are several; names of dicts within dicts are joined by dots. Raises UserError."""
    found = _dicts_of_tensors(content)
    known = [name for name in CONTAINERS if name in found]
    tensors = _tensors_in(content)
    if tensors and len(tensors) > len(content) / 2:
        found[""] = content
    if key is not None:
        if key not in found:
            names = ", ".join(map(shown, filter(None, found))) or "a bare state dict"
            raise UserError(f"{path} has no weights under {key!r}; it has {names}.")
    elif known:
        is_for_average = path.name.endswith("-best-ema.pth") and "model_ema" in known
        key = "model_ema" if is_for_average else known[0]
    elif "" in found or len(found) == 1:
        key = "" if "" in found else next(iter(found))
    elif found:
        raise UserError(f"{path} holds several state dicts: {', '.join(map(shown, found))}. "
                        f"Choose one with {key_flag}.")
    elif tensors:
        key, found[""] = "", content
    else:
        keys = ", ".join(shown(key) for key in list(content)[:8])
        raise UserError(f"{path} holds no weights: expected a dict of tensors by their names, or a "
                        f"dict that has one under any name; got the keys {keys}.")
    return key, _tensors_in(found[key])


def _dicts_of_tensors(content: dict[Any, Any]) -> dict[str, dict]:
    """Dicts in a dict that hold tensors by names, of the first level of nesting that has any."""
    level, seen = {"": content}, {id(content)}
    for _ in range(MOST_NESTED):
        inner = {}
        for outer_name, outer in level.items():
            for name, value in outer.items():
                if isinstance(name, str) and isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))  # a dict may hold itself
                    inner[f"{outer_name}.{name}".lstrip(".")] = value
        found = {name: value for name, value in inner.items() if _tensors_in(value)}
        if found:
            return found
        level = inner
    return {}


def _tensors_in(content: Mapping[Any, Any]) -> State:
    """Of a dict, tensors by their names; none where they are no weights: all of them single numbers
    or bytes, as a generator's state."""
    state = {name: value.detach() for name, value in content.items()  # some are Parameters
             if isinstance(name, str) and isinstance(value, Tensor)}
    is_plain = all(value.dim() == 0 or value.dtype is torch.uint8 for value in state.values())
    return {} if is_plain else state


def check_ordinary(state: State, path: Path) -> None:
    """Raises UserError for tensors that cannot be a network's weights."""
    for name, value in state.items():
        fault = tensor_fault(value)
        if fault:
            raise UserError(f"{path}: {shown(name)} is {fault}. Weights are dense tensors of real "
                            "numbers; save them as such.")


# Under which names


def unwrapped(model: VisionModel, state: State) -> State:
    """`state` without the prefixes of wrappers: as it is where its names fit `model`, else without
    those after which they fit, or fit best. Of two kinds of names side by side (backbone.* and
    head.*) both or one may have a prefix."""
    on_meta = {name: value.to("meta") for name, value in state.items()}
    wanted = without_computed(model.state_dict()).keys()
    best, fewest = None, 0.0
    for names in _shortened_names(state):
        try:
            converted = model.convert_state_dict({new: on_meta[old] for new, old in names.items()})
            number = len(without_computed(converted).keys() ^ wanted)
        except UserError:  # it knows the names, and something else is wrong
            number = 0.5
        except (RuntimeError, ValueError, LookupError, TypeError):  # other shapes altogether
            number = len(state) + len(wanted)
        if best is None or number < fewest:
            best, fewest = names, number
        if number == 0:
            break
    return {new: state[old] for new, old in best.items()}


def _shortened_names(state: State) -> Iterator[dict[str, str]]:
    """Name -> name in `state`: as they are, then shorter and shorter."""
    level = [{name: name for name in state}]
    for _ in range(MOST_PREFIXES + 1):
        yield from level
        level = [shorter for names in level for shorter in _without_first_part(names)]


def _without_first_part(names: dict[str, str]) -> Iterator[dict[str, str]]:
    firsts = sorted({name.partition(".")[0] for name in names})
    choices = {1: [firsts], 2: [firsts, firsts[:1], firsts[1:]]}.get(len(firsts), [])
    for choice in choices:
        shorter = {}
        for name, old in names.items():
            first, _, rest = name.partition(".")
            shorter[rest if first in choice else name] = old
        if "" not in shorter and len(shorter) == len(names):
            yield shorter


Rules = Sequence[tuple[str, str]]  # pattern of a whole name, replacement


def rename_keys(state: Mapping[str, Tensor], rules: Rules) -> State:
    """`state` with each name rewritten by the first rule that fits it; others stay. Raises
    UserError where two names become one."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in compiled:
            if pattern.fullmatch(name):
                new = pattern.sub(replacement, name)
                break
        if new in result:
            raise UserError(f"the file names {shown(new)} twice, as {shown(name)} and otherwise; "
                            "it mixes the checkpoints of two programs.")
        result[new] = value
    return result


def without_computed(state: Mapping[str, Tensor]) -> State:
    """`state` without what a file need not have."""
    return {name: value for name, value in state.items() if not name.endswith(COMPUTED)}


# Whether it fits


def fitted(model: VisionModel, state: State, path: str | Path) -> tuple[State, int]:
    """`state` under the names of `model`, and the number of classes that its classifiers have: 0
    where it has none. All but these classes is checked: names, shapes, kinds of numbers. Raises
    UserError with what is missing, unexpected or of another shape."""
    state = unwrapped(model, state)
    what = f"{path} does not fit {type(model).__name__}: "
    try:
        # Shapes first: they say what need not be computed.
        converted = model.convert_state_dict(
            {name: value.to("meta") for name, value in state.items()})
    except UserError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{what}{one_line(error)}. Check the model's name and options.") from None
    got, wanted = without_computed(converted), without_computed(model.state_dict())
    num_classes, heads = _classes_of(model, got)
    difference = describe_difference({**got, **heads}, wanted)
    if difference:
        raise UserError(f"{what}{difference} {describe_origin(state)}Check the model's name and "
                        "options.")
    for name in got:
        if wanted[name].is_floating_point() != got[name].is_floating_point():
            raise UserError(f"{what}{name} holds {got[name].dtype} and should hold "
                            f"{wanted[name].dtype}.")
    return model.convert_state_dict(state), num_classes


def classifier_entries(model: VisionModel) -> State:
    """Of its state dict what a row of is a class."""
    return {name: value for name, value in model.state_dict().items()
            if name.rpartition(".")[0] in model.classifiers}


def _classes_of(model: VisionModel, got: State) -> tuple[int, State]:
    """How many classes the classifiers in `got` have, and the model's own entries in their place
    where they differ in this alone; none of either where they are missing or strange."""
    own = classifier_entries(model)
    there = {name: got[name] for name in own if name in got}
    if not own:  # a network that does not say which they are takes files of its own shapes alone
        return model.num_classes, own
    if not there:
        return 0, own
    numbers = {len(value) if value.dim() else 0 for value in there.values()}
    is_same = all(value.shape[1:] == own[name].shape[1:] for name, value in there.items())
    if len(numbers) == 1 and 0 not in numbers and is_same:
        return numbers.pop(), {name: own[name] for name in there}
    return 0, {}


def describe_difference(got: State, wanted: State) -> str:
    """What separates two state dicts, in a sentence each; empty when they fit."""
    shapes = [f"{name} {tuple(got[name].shape)} instead of {tuple(wanted[name].shape)}"
              for name in wanted if name in got and got[name].shape != wanted[name].shape]
    groups = {"missing": [name for name in wanted if name not in got],
              "unexpected": [shown(name) for name in got if name not in wanted],
              "of another shape": shapes}
    sentences = []
    for what, names in groups.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            sentences.append(f"{len(names)} {what} ({', '.join(names[:4])}{more}).")
    return " ".join(sentences)


def check_finite(state: State, path: str | Path) -> None:
    """Raises UserError where weights are NaN, or infinite as float32, and for variances below zero,
    which give NaN."""
    wrong = [name for name, value in state.items()
             if value.is_floating_point() and not value.float().isfinite().all()]
    negative = [name for name, value in state.items()
                if name.endswith("running_var") and (value < 0).any()]
    if negative:
        raise UserError(f"{path} is damaged: {shown(negative[0])} holds variances below zero. Use "
                        "another copy of the file.")
    if wrong:
        raise UserError(f"{path} holds weights that are NaN or infinite, in {len(wrong)} of "
                        f"{len(state)} tensors ({', '.join(wrong[:3])}): its training failed. Take "
                        "an earlier file of that run.")


# What it is of


def describe_origin(state: Mapping[str, Tensor]) -> str:
    """'These are weights of slak_t kernel_size=31,29,27,13,5. ', or of which they are the nearest;
    empty where nothing is near. Builds every registered network, without memory for weights."""
    state = {name: value.to("meta") for name, value in state.items()}
    nearest, best_share = "", 0.5  # below a half it says nothing
    for name in MODELS.names():
        spec, share = _compare(name, state)
        if share == 1:
            return f"These are weights of {spec}. "
        if share > best_share:
            nearest, best_share = spec, share
    if not nearest:
        return ""
    return f"The nearest network is {nearest}, {best_share:.0%} of whose tensors fit. "


def _compare(name: str, state: Mapping[str, Tensor]) -> tuple[str, float]:
    """This network as one would name it, with the options that the shapes tell, and the share of
    tensors, of the file's and its own, that the two have in common."""
    # The last vector is the classifier's bias in every published file.
    vectors = [value for value in state.values() if value.dim() == 1]
    try:
        options = MODELS.builder(name).options_of(state)
        with torch.device("meta"):
            model = create_model(name, len(vectors[-1]), **options)
        theirs = without_computed(model.convert_state_dict(dict(state)))
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError):
        return name, 0.0  # something else altogether
    ours = without_computed(model.state_dict())
    common = [key for key in ours.keys() & theirs.keys() if ours[key].shape == theirs[key].shape]
    spec, defaults = [name], MODELS.defaults(name)
    for key, value in options.items():
        if value != defaults.get(key):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            spec.append(f"{key}={text}")
    return " ".join(spec), len(common) / len(ours.keys() | theirs.keys())
