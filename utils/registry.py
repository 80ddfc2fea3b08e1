"""Named builders, and the `name key=value ...` options that reach them from the command line."""
import difflib
import inspect
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

    def register(self, name: str, **defaults: Any) -> Callable:
        assert name not in self._entries, f"{self.kind} {name!r} is registered twice"

        def decorator(builder: Callable) -> Callable:
            self._entries[name] = (builder, defaults)
            return builder

        return decorator

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
        passes itself, a builder gets the values that its signature has parameters for.

        Raises UnknownName for an unregistered name, UserError for an option that is unknown, of
        another type, or the program's own.
        """
        builder, defaults = self._lookup(name)
        parameters = inspect.signature(builder).parameters
        known = [key for key in parameters if key not in given]
        for key, value in options.items():
            if key in given or key == "name":
                raise UserError(f"{key} is set by the program and cannot be an option of "
                                f"{self.kind} {name!r}. Leave it out.")
            if key not in known:
                raise UserError(f"unknown option {key!r} of {self.kind} {name!r}. "
                                f"Known: {', '.join(known) or 'none'}.{did_you_mean(key, known)}")
            _check_type(f"option {key!r} of {self.kind} {name!r}", value, parameters[key])
        wanted = {key: value for key, value in given.items() if key in parameters}
        return builder(**{**defaults, **options, **wanted})

    def _lookup(self, name: str) -> tuple[Callable, dict[str, Any]]:
        if name not in self._entries:
            raise UnknownName(f"unknown {self.kind} {name!r}. Known: {', '.join(self.names())}."
                              f"{did_you_mean(name, self.names())} "
                              f"{self.kind.capitalize()} names are registered in {self.home}.")
        return self._entries[name]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' when a known word is near, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def parse_value(text: str) -> Any:
    """'1e-3' -> float, '7' -> int, 'true' -> bool, 'none' -> None, '31,29,5' -> tuple, else str."""
    if "," in text:
        return tuple(parse_value(part) for part in text.split(",") if part)
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_spec(spec: Sequence[str], flag: str) -> tuple[str, dict[str, Any]]:
    """['slak_t', 'drop_path=0.1'] -> ('slak_t', {'drop_path': 0.1})."""
    if not spec or "=" in spec[0]:
        raise UserError(f"{flag} needs a name first, then key=value options; got {spec}.")
    name, options = spec[0], {}
    for option in spec[1:]:
        key, _, value = option.partition("=")
        if not key or not value:
            raise UserError(f"{flag} {name}: {option!r} is not an option of the form key=value.")
        options[key.replace("-", "_")] = parse_value(value)
    return name, options


def _check_type(what: str, value: Any, parameter: inspect.Parameter) -> None:
    """Numbers where the default or the annotation is a number, and so on; nothing is converted."""
    expected = {int: (int,), float: (int, float), bool: (bool,), str: (str,),
                tuple: (tuple, list)}.get(_plain_type(parameter))
    is_bool = isinstance(value, bool)
    if expected and (not isinstance(value, expected) or (is_bool and bool not in expected)):
        wanted = " or ".join(kind.__name__ for kind in expected)
        raise UserError(f"{what} must be {wanted}, got {value!r}.")


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
