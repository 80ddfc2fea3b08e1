"""Named builders, and the `name key=value ...` options that reach them from the command line."""
import inspect
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_CONSTANTS = {"true": True, "false": False, "none": None}


class Registry:
    """Builders by name. One class may be registered under many names with different defaults:

        @models.register("resnet18", block="basic", depths=(2, 2, 2, 2))
        @models.register("resnet34", block="basic", depths=(3, 4, 6, 3))
        class ResNet(VisionModel): ...
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, tuple[Callable, dict[str, Any]]] = {}
        self._aliases: dict[str, str] = {}
        self._find: Callable[[str], Callable | None] = lambda name: None

    def register(self, name: str, **defaults: Any) -> Callable:
        assert name not in self._entries, f"{self.kind} {name!r} is registered twice"

        def decorator(builder: Callable) -> Callable:
            self._entries[name] = (builder, defaults)
            return builder

        return decorator

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """Other programs' names, each with the registered name that it stands for. They are
        accepted, not listed."""
        for alias, name in aliases.items():
            assert name in self._entries and alias not in self._entries, f"alias {alias!r}"
            self._aliases[alias] = name

    def find_with(self, finder: Callable[[str], Callable | None]) -> None:
        """Let `finder(name)` give the builders of what is not registered, None for what it does not
        know. They are accepted, not listed."""
        self._find = finder

    def own_word(self, word: str) -> str:
        """The registered name of an alias; any other word as it is. For add_argument: the type of
        a flag that takes NAME key=value ..., so that a run has one name, however it was called."""
        return self._aliases.get(word, word)

    def resolve(self, name: str) -> str:
        """The registered name that `name` stands for. Raises UnknownName."""
        name = self.own_word(name)
        if name not in self._entries and self._find(name) is None:
            near = did_you_mean(name, [*self._entries, *self._aliases])
            raise UnknownName(f"unknown {self.kind} {short(name)}. Known: "
                              f"{', '.join(self.names())}.{near} "
                              f"{self.kind.capitalize()} names are registered in {self.home}.")
        return name

    def names(self) -> list[str]:
        return sorted(self._entries)

    def builder(self, name: str) -> Callable:
        return self._lookup(name)[0]

    def defaults(self, name: str) -> dict[str, Any]:
        """What `name` is built with where no option says otherwise."""
        builder, defaults = self._lookup(name)
        own = {key: parameter.default for key, parameter in
               inspect.signature(builder).parameters.items()
               if parameter.default is not inspect.Parameter.empty}
        return {**own, **defaults}

    def create(self, name: str, given: Mapping[str, Any], /, **options: Any) -> Any:
        """Build `name`; `options` win over its registered defaults. Of `given`, what the program
        passes itself, a builder gets the values that its signature has parameters for. One with
        `**options` takes any.

        Raises UnknownName for an unregistered name, UserError for an option that is unknown, of
        another type, missing, or the program's own.
        """
        builder, defaults = self._lookup(name)
        parameters = inspect.signature(builder).parameters
        known = {key: parameter for key, parameter in parameters.items() if key not in given
                 and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)}
        takes_any = any(value.kind is value.VAR_KEYWORD for value in parameters.values())
        for key, value in options.items():
            if key in given or key == "name":
                raise UserError(f"{key} is set by the program and cannot be an option of "
                                f"{self.kind} {name!r}. Leave it out.")
            if key in known:
                _check_type(f"option {key!r} of {self.kind} {name!r}", value, known[key])
            elif not takes_any:
                raise UserError(f"unknown option {short(key)} of {self.kind} {name!r}. "
                                f"Known: {', '.join(known) or 'none'}.{did_you_mean(key, known)}")
        wanted = {**defaults, **options,
                  **{key: value for key, value in given.items() if key in parameters}}
        missing = [key for key, parameter in known.items()
                   if parameter.default is parameter.empty and key not in wanted]
        if missing:
            raise UserError(f"{self.kind} {name!r} needs the option {missing[0]}=VALUE.")
        return builder(**wanted)

    def _lookup(self, name: str) -> tuple[Callable, dict[str, Any]]:
        name = self.resolve(name)
        return self._entries[name] if name in self._entries else (self._find(name), {})


MOST_GUESSES = 3
LONGEST_WORD = 40  # letters; nobody means a flag by a longer one


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the nearest of the known words, up to three that are equally near;
    an empty string where none is near, for a wrong guess misleads more than none."""
    if len(word) > LONGEST_WORD:
        return ""
    distances = {other: distance for other in known
                 if (distance := _distance_if_near(word, other)) is not None}
    nearest = [other for other, distance in distances.items()
               if distance == min(distances.values())]
    if not nearest or len(nearest) > MOST_GUESSES:
        return ""
    return f" Did you mean {' or '.join(map(repr, sorted(nearest)))}?"


def _distance_if_near(word: str, other: str) -> float | None:
    """How far two names are from each other; None where a slip of the fingers does not explain it.
    Each part of a name, between dashes, may have its own slip."""
    parts, others = _parts(word), _parts(other)
    joined, other_joined = "".join(parts), "".join(others)
    if not joined:
        return None
    if sorted(parts) == sorted(others) or joined == other_joined:
        return 0
    if len(joined) >= 3 and other_joined.startswith(joined):  # the beginning of a name
        return 1 + max(0, len(others) - len(parts))
    if len(parts) != len(others):
        is_end = len(joined) >= 6 and others[-len(parts):] == parts  # --workers
        is_slip = len(joined) >= 8 and _slips(joined, other_joined) == 1  # and a dash more or less
        return 1 if is_end or is_slip else None
    distances = [_distance_of_parts(*pair) for pair in zip(parts, others)]
    return None if None in distances else sum(distances)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[-_]+", name.lower()) if part]


def _distance_of_parts(part: str, other: str) -> float | None:
    if part == other:
        return 0
    if len(part) >= 3 and other.startswith(part):
        return 1
    if part in (f"{other}s", f"{other}es") or other in (f"{part}s", f"{part}es"):
        return 1
    if re.sub(r"\D", "", part) != re.sub(r"\D", "", other):  # resnet152 is no slip for resnet101
        return None
    if len(other) >= 4 and part.startswith(other) and len(part) - len(other) <= 2:  # masked, mask
        return 1
    if sorted(part) == sorted(other):  # letters that changed places
        return 1 if _slips(part, other) == 1 else None
    number, length = _slips(part, other), max(len(part), len(other))
    return number if number <= (length >= 4) + (length >= 8) else None  # rkd is no slip for nkd


def _slips(left: str, right: str) -> int:
    """Letters left out, added or changed, or swapped with the next one, to make `right` of `left`
    (Damerau 1964, each letter once)."""
    rows = [[*range(len(right) + 1)]]
    for i, letter in enumerate(left, 1):
        row = [i]
        for j, other in enumerate(right, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == right[j - 2] and left[i - 2] == other:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: object) -> str:
    """`repr(value)`, its middle left out where it is too long for a sentence."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        return f"a {type(value).__name__} too large to print"


def parse_value(text: str) -> Any:
    """'1e-3' -> float, '7' -> int, 'true' -> bool, 'none' -> None, '31,29,5' -> tuple, else str.
    Raises UserError for a number that is not finite or has more than 64 bits."""
    if "," in text:
        return tuple(parse_value(part) for part in text.split(",") if part)
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if not -2 ** 63 <= value < 2 ** 63:  # nor is NaN
            raise UserError(f"must be a finite number of at most 64 bits, got {short(text)}.")
        return value
    return text


def parse_spec(spec: Sequence[str], flag: str) -> tuple[str, dict[str, Any]]:
    """['slak_t', 'drop_path=0.1'] -> ('slak_t', {'drop_path': 0.1})."""
    if not spec or not spec[0] or "=" in spec[0]:
        raise UserError(f"{flag} needs a name first, then key=value options; got {short(spec)}.")
    name, options = spec[0], {}
    for option in spec[1:]:
        key, _, value = option.partition("=")
        key = key.replace("-", "_")
        if not key or not value:
            raise UserError(f"{flag} {name}: {short(option)} is not an option of the form "
                            "key=value.")
        if key in options:
            raise UserError(f"{flag} {name}: {key} is given twice.")
        try:
            options[key] = parse_value(value)
        except UserError as error:
            raise UserError(f"{flag} {name}: {key} {error}") from None
    return name, options


def _check_type(what: str, value: Any, parameter: inspect.Parameter) -> None:
    """Numbers where the default or the annotation is a number, and so on; nothing is converted."""
    expected = {int: (int,), float: (int, float), bool: (bool,), str: (str,),
                tuple: (tuple, list)}.get(_plain_type(parameter))
    is_bool = isinstance(value, bool)
    if expected and (not isinstance(value, expected) or (is_bool and bool not in expected)):
        wanted = " or ".join(kind.__name__ for kind in expected)
        raise UserError(f"{what} must be {wanted}, got {short(value)}.")


def _plain_type(parameter: inspect.Parameter) -> type | None:
    """`int` for `int`, `tuple` for `tuple[int, ...]` and `Sequence[int]`; None when it is open."""
    annotation = parameter.annotation
    if annotation in (int, float, bool, str, tuple):
        return annotation
    origin = getattr(annotation, "__origin__", None)
    return tuple if origin in (tuple, list) or "Sequence" in str(origin) else None


class UserError(ValueError):
    """Something the user passed or pointed at is wrong. The message says what was got, what was
    expected and what to change."""


def one_line(error: Exception) -> str:
    """Its text without line breaks, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class UnknownName(UserError, KeyError):
    """A name that is not registered. (`KeyError.__str__` would print the message in quotes.)"""

    __str__ = UserError.__str__


class NonFiniteLoss(UserError, FloatingPointError):
    """A loss term became NaN or infinite during training."""
