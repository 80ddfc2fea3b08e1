"""Command lines: recipes set defaults, the command line wins, unknown words are errors. And the
programs that they start: how one ends."""
import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from utils import distributed
from utils.registry import UserError, did_you_mean


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--data_path` for `--data-path`, names the nearest flag for an
    unknown one, and reads defaults from `--config recipe.yaml`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=functools.partial(
            HelpFormatter, width=100, max_help_position=36), **kwargs)
        self.add_argument("--config", type=Path, metavar="YAML", help="recipe of defaults")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Every flag's value, in the parser's order: the command line's, else the recipe's, else
        its default. `args.given` names what the command line set, `args.defaults` all defaults."""
        defaults = {action.dest: action.default for action in self._actions
                    if action.dest != "help"}
        given = self._values([_dashed(word) for word in argv], defaults)
        recipe: dict[str, Any] = {}
        if "config" in given:
            try:
                # The command line may hold what the parser requires, and comes first, for a flag
                # with many values would take its positionals; its own values win below.
                words = self._recipe_words(given["config"])
                recipe = self._values([*map(_dashed, argv), *words], defaults)
            except UserError as error:
                raise UserError(f"--config {given['config']}: {error}") from None
        args = argparse.Namespace(**{**defaults, **recipe, **given})
        args.given, args.defaults = sorted(given), defaults
        return args

    def error(self, message: str) -> NoReturn:
        # "argument --lr: must be ..." reads better as "--lr must be ..."
        message = re.sub(r"^argument (--[\w-]+)\S*: (?=must )", r"\1 ", message)
        end = "" if message.endswith((".", "?")) else "."
        raise UserError(f"{message}{end} See {self.prog} --help.")

    def _values(self, words: list[str], names: dict[str, Any]) -> dict[str, Any]:
        """What these words set, by name; nothing for a flag that is not among them."""
        # argparse leaves alone what the namespace already has, so None stays where no word is.
        blank = argparse.Namespace(**dict.fromkeys(names))
        args, unknown = self.parse_known_args(words, blank)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {unknown[0]!r}."
                       f"{did_you_mean(flag, self._option_string_actions)}")
        return {name: value for name, value in vars(args).items() if value is not None}

    def _recipe_words(self, path: Path) -> list[str]:
        """The recipe as a command line would say it."""
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise UserError(f"it cannot be read ({error.strerror}).") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"it is not readable YAML: {error}") from None
        if not isinstance(content, dict):
            raise UserError("it must be a mapping of flag names to values.")
        actions = {action.dest: action for action in self._actions
                   if action.dest not in ("help", "config")}
        words = []
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name not in actions:
                raise UserError(f"unknown key {key!r}.{did_you_mean(name, actions)}")
            words += _flag_words(actions[name], key, value)
        return words


def _flag_words(action: argparse.Action, key: str, value: Any) -> list[str]:
    """A flag and its values as words, from a YAML value."""
    flag = "--" + action.dest.replace("_", "-")
    if value is None:
        if action.default is None:
            return []
        raise UserError(f"{key} takes a value, got none; leave the key out for the default, "
                        f"{action.default}.")
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, got {value!r}.")
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        raise UserError(f"{key} takes a value or a list of values, got {value!r}.")
    if isinstance(action, argparse._AppendAction):  # given once for each item of a list
        items = value if isinstance(value, list) else [value]
        return [word for item in items for word in (flag, *_words(item, key))]
    if action.nargs is None:
        return [f"{flag}={value}"]
    return [flag, *_words(value, key)]


def _words(value: Any, key: str) -> list[str]:
    words = [str(item) for item in value] if isinstance(value, list) else str(value).split()
    if any(word.startswith("--") for word in words):
        raise UserError(f"{key} takes values, not flags; got {value!r}.")
    return words


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, separator, value = word.partition("=")
    return flag.replace("_", "-") + separator + value


# Types of flags, for add_argument(type=...). A limit that is an int makes a flag of whole numbers.

def at_least(limit: int | float) -> Callable[[str], int | float]:
    """Finite numbers of `limit` or more."""
    return _number(limit, lambda value: value >= limit, f"at least {limit:g}")


def between(low: int | float, high: int | float) -> Callable[[str], int | float]:
    """Numbers from `low` to `high`, both included."""
    return _number(low, lambda value: low <= value <= high, f"from {low:g} to {high:g}")


def below_one(text: str) -> float:
    """A number in [0, 1)."""
    return _number(0.0, lambda value: 0 <= value < 1, "in [0, 1)")(text)


def _number(like: int | float, is_allowed: Callable[[float], bool], words: str
            ) -> Callable[[str], int | float]:
    kind, noun = (int, "a whole number") if isinstance(like, int) else (float, "a number")

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {noun} {words}, got {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    return convert


def program(name: str, build_parser: Callable[[], Parser]
            ) -> Callable[[Callable[[argparse.Namespace], int]], Callable[..., int]]:
    """Decorator that makes of `main(args)` a program `main(argv=None)`: it parses `argv` (None:
    sys.argv), runs, and returns the exit code. An error that is the user's to mend becomes one
    sentence on standard error and code 2."""
    def decorator(main: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                code = main(build_parser().parse(sys.argv[1:] if argv is None else argv))
            except UserError as error:
                message, code = f"error: {error}", 2
            except torch.OutOfMemoryError as error:
                message, code = (f"error: the GPU's memory is full ({str(error).splitlines()[0]}). "
                                 "Lower --batch-size; the effective batch can stay."), 2
            except KeyboardInterrupt:
                message, code = "interrupted; what was saved before is kept.", 130
            except RuntimeError as error:
                if not distributed.is_lost_peer(error):
                    raise
                message, code = distributed.LOST_PEER, 2
            else:
                distributed.shutdown()
                return code
            if distributed.should_print(message):
                many = int(os.environ.get("WORLD_SIZE", 1)) > 1
                who = f"{name} (process {os.environ['RANK']})" if many else name
                print(f"{who}: {message}", file=sys.stderr, flush=True)
            return code
        return run
    return decorator


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The namespace as a dict of plain values, for checkpoints and args.yaml."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name not in ("given", "defaults")}
