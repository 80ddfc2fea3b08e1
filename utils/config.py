"""Command lines: recipes set defaults, the command line wins, unknown words are errors. And the
programs that they start: how one ends."""
import argparse
import functools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from utils import distributed, faults, foreign, process
from utils.records import read_yaml
from utils.registry import UserError, did_you_mean, parse_spec, short

LONGEST_WORD = 4096  # letters of a word of a command line: a path's
LARGEST_INT = 2 ** 31 - 1  # of flags without a limit of their own: of epochs, images, pixels


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--data_path` for `--data-path`, `--flag true` for `--flag`, and
    other programs' words for its own (utils/foreign.py), names the nearest flag for an unknown one,
    and reads defaults from `--config recipe.yaml`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=functools.partial(
            HelpFormatter, width=100, max_help_position=36), **kwargs)
        self.register("type", Path, _path)  # what `type=Path` means
        # Words may be paths, too; a shell leaves the ~ of `--flag=~/x` and of a recipe as it is.
        self.register("type", None, os.path.expanduser)
        self.add_argument("--config", type=Path, metavar="YAML", help="recipe of defaults")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Every flag's value, in the parser's order: the command line's, else the recipe's, else
        its default. `args.given` names what the command line set, `args.chosen` what it or the
        recipe set, `args.defaults` holds all defaults."""
        defaults = {action.dest: action.default for action in self._actions
                    if action.dest != "help"}
        words, options = foreign.translate(argv, self._option_string_actions)
        given = self._values(words, defaults)
        recipe: dict[str, Any] = {}
        if "config" in given:
            try:
                # The command line may hold what the parser requires, and comes first, for a flag
                # with many values would take its positionals; its own values win below.
                recipe_words, recipe_options = foreign.translate(
                    self._recipe_words(given["config"]), self._option_string_actions)
                recipe = self._values([*words, *recipe_words], defaults)
            except UserError as error:
                raise UserError(f"--config {given['config']}: {error}") from None
            options = {**recipe_options, **options}
        args = argparse.Namespace(**{**defaults, **recipe, **given})
        args.given, args.chosen, args.defaults = sorted(given), sorted({*recipe, *given}), defaults
        if options:
            args.student = _with_options(args.student, options)
        return args

    def error(self, message: str) -> NoReturn:
        # "argument --lr: must be ..." reads better as "--lr must be ..."
        message = re.sub(r"^argument (--[\w-]+)\S*: (?=must )", r"\1 ", message)
        end = "" if message.endswith((".", "?")) else "."
        raise UserError(f"{message}{end} See {self.prog} --help.")

    def _values(self, words: list[str], names: dict[str, Any]) -> dict[str, Any]:
        """What these words set, by name; nothing for a flag that is not among them."""
        for word in words:
            if len(word) > LONGEST_WORD or "\0" in word:
                self.error(f"no word may have more than {LONGEST_WORD:,} letters or a null "
                           f"character; got {short(word)}")
            if word.startswith("--") and word.endswith("=--"):  # argparse would make [] of it
                self.error(f"{word.partition('=')[0]} takes a value, got '--'")
        # argparse leaves alone what the namespace already has, so None stays where no word is.
        blank = argparse.Namespace(**dict.fromkeys(names))
        args, unknown = self.parse_known_args(words, blank)
        if unknown:
            flag = unknown[0].partition("=")[0]
            for before, word in zip(words, words[1:]):
                action = self._option_string_actions.get(before)
                if word == unknown[0] and isinstance(action, argparse.BooleanOptionalAction):
                    self.error(f"{before} must be true or false, or without a value; got "
                               f"{short(word)}")
            hint = (foreign.explain(flag, words)
                    or did_you_mean(flag, self._option_string_actions))
            self.error(f"unknown argument {short(unknown[0])}.{hint}")
        return {name: value for name, value in vars(args).items() if value is not None}

    def _recipe_words(self, path: Path) -> list[str]:
        """The recipe as a command line would say it."""
        own = self._option_string_actions
        words, keys = [], {}
        for key, value in read_yaml(path).items():
            flag = foreign.renamed(foreign.dashed(f"--{key}"), own)
            if flag in ("--help", "--config") or flag.startswith("--no-"):
                flag = ""
            name = own[flag].dest if flag in own else flag
            if name in keys:
                raise UserError(f"{keys[name]} and {key} are the same; keep one.")
            keys[name] = key
            if flag in own:
                words += _flag_words(own[flag], key, value)
            elif flag in foreign.SWITCHES or flag in foreign.STUDENT_OPTIONS:
                words.append(f"{flag}={_word(value, key)}")
            else:
                names = [action.dest for action in self._actions
                         if action.dest not in ("help", "config")]
                hint = foreign.explain(flag, []) or did_you_mean(str(key), names)
                raise UserError(f"unknown key {short(key)}.{hint}")
        return words


def _with_options(student: list[str], options: dict[str, str]) -> list[str]:
    """`student`, NAME key=value ..., with options that flags of their own gave."""
    theirs = foreign.LIBRARY_OPTIONS.get(student[0], {})
    for key, value in options.items():
        key = theirs.get(key, key)
        if key in parse_spec(student, "--student")[1]:
            raise UserError(f"{key} is given twice, as an option of --student and as a flag; keep "
                            "one.")
        student = [*student, f"{key}={value}"]
    return student


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
            raise UserError(f"{key} must be true or false, got {short(value)}.")
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(action, argparse._AppendAction):  # given once for each item of a list
        items = value if isinstance(value, list) else [value]
        return [word for item in items for word in (flag, *_words(item, key))]
    if action.nargs is None:
        return [f"{flag}={_word(value, key)}"]
    return [flag, *_words(value, key)]


def _words(value: Any, key: str) -> list[str]:
    words = [_word(item, key) for item in value] if isinstance(value, list) else (
        _word(value, key).split())
    if any(word.startswith("--") for word in words):
        raise UserError(f"{key} takes values, not flags; got {short(value)}.")
    return words


def _word(value: Any, key: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{key} takes words or numbers, got {short(value)}.")
    return str(value)


def _path(text: str) -> Path:
    """A path, `~` for the home folder. For add_argument: `type=Path` calls this."""
    is_long = any(len(os.fsencode(part)) > 255 for part in text.split("/"))
    if not text.strip() or is_long:
        raise argparse.ArgumentTypeError(f"must be a path, got {short(text)}")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of a user who is not known
        raise argparse.ArgumentTypeError(f"must be a path, got {short(text)}") from None


# Types of flags, for add_argument(type=...). A limit that is an int makes a flag of whole numbers.

def at_least(limit: int | float) -> Callable[[str], int | float]:
    """Finite numbers of `limit` or more; whole ones up to LARGEST_INT."""
    convert = _number(limit, lambda value: value >= limit, f"at least {limit:g}")

    def bounded(text: str) -> int | float:
        value = convert(text)
        if isinstance(limit, int) and value > LARGEST_INT:
            raise argparse.ArgumentTypeError(f"must be at most {LARGEST_INT}, got {short(text)}")
        return value

    return bounded


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
            raise argparse.ArgumentTypeError(f"must be {noun} {words}, got {short(text)}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {short(value)}")
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {short(value)}")
        return value

    return convert


def program(name: str, build_parser: Callable[[], Parser]
            ) -> Callable[[Callable[[argparse.Namespace], int]], Callable[..., int]]:
    """Decorator that makes of `main(args)` a program `main(argv=None)`: it parses `argv` (None:
    sys.argv), runs, and returns the exit code. An error that is the user's or the machine's becomes
    one sentence on standard error and code 2. With None it is a process of its own: it ends in one
    sentence at SIGTERM and Ctrl-C, and where there are many processes it does not return."""
    def decorator(main: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
        def attempt(argv: list[str]) -> int:
            flags: dict[str, Any] = {}
            try:
                args = build_parser().parse(argv)
                flags.update(vars(args))
                return main(args)
            except KeyboardInterrupt:
                message, code = "interrupted; what was saved before is kept.", 130
            except Exception as error:
                message, code = faults.describe(error, flags), 2
                if message is None:  # a mistake of our own
                    raise
            message = re.sub(r"\s*[\r\n]+\s*", " ", message)
            if distributed.should_print(message, is_consequence=message == distributed.LOST_PEER):
                who = name
                if distributed.may_be_many():
                    who = f"{name} (process {os.environ.get('RANK', '?')})"
                sys.stdout.flush()  # what was said before comes before
                print(f"{who}: {message}", file=sys.stderr, flush=True)
            return code

        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            if argv is not None:  # called by a program, whose signals and output are its own
                code = attempt(argv)
                if code == 0:
                    distributed.shutdown()
                return code
            process.begin(functools.partial(distributed.should_print, is_consequence=True))
            try:
                code = attempt(sys.argv[1:])
            except Exception:
                traceback.print_exc()
                code = 1
            process.finish(code)
            distributed.end_process(code)
            return code
        return run
    return decorator


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The namespace as a dict of plain values, for checkpoints and args.yaml."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name not in ("given", "chosen", "defaults")}
