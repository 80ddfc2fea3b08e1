"""Command lines: recipes set defaults, the command line wins, unknown words are errors."""
import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from utils.checkpoint import write_text_atomically
from utils.registry import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--data_path` for `--data-path`, names the nearest flag for an
    unknown one, and reads defaults from `--config recipe.yaml`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         **kwargs)
        self.add_argument("--config", type=Path, metavar="YAML", help="recipe of defaults")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The namespace; `args.given` holds the names that the command line itself set."""
        argv = [_dashed(word) for word in argv]
        recipe = self._config_path(argv)
        defaults = self._read_recipe(recipe) if recipe is not None else {}
        # argparse would append the command line's values to a default list: held back until after.
        lists = {name: defaults.pop(name) for name in list(defaults)
                 if any(action.dest == name and isinstance(action, argparse._AppendAction)
                        for action in self._actions)}
        self.set_defaults(**defaults)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {unknown[0]!r}."
                       f"{did_you_mean(flag, self._option_string_actions)}")
        flags = {self._option_string_actions[word.partition("=")[0]].dest for word in argv
                 if word.partition("=")[0] in self._option_string_actions}
        args.given = sorted(flags)
        for name in lists.keys() - flags:
            setattr(args, name, lists[name])
        return args

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} See {self.prog} --help.")

    def _config_path(self, argv: list[str]) -> Path | None:
        for i, word in enumerate(argv):
            flag, separator, value = word.partition("=")
            if flag == "--config":
                value = value if separator else "".join(argv[i + 1:i + 2])
                if not value or value.startswith("--"):
                    self.error("argument --config: expected a YAML file.")
                return Path(value)
        return None

    def _read_recipe(self, path: Path) -> dict[str, Any]:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise UserError(f"--config {path} cannot be read ({error.strerror}).") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"--config {path} is not readable YAML: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"--config {path} must be a mapping of flag names to values.")
        actions = {action.dest: action for action in self._actions}
        defaults = {}
        for key, value in content.items():
            dest = str(key).replace("-", "_")
            if dest not in actions or dest in ("help", "config"):
                raise UserError(f"--config {path}: unknown key {key!r}."
                                f"{did_you_mean(dest, actions)}")
            defaults[dest] = self._converted(actions[dest], value, f"--config {path}: {key}")
        return defaults

    def _converted(self, action: argparse.Action, value: Any, where: str) -> Any:
        """A YAML value as the flag would have given it: same type, same choices."""
        if value is None:
            if action.default is not None:
                wanted = {int: "a whole number", float: "a number"}.get(action.type, "a value")
                raise UserError(f"{where} takes {wanted}, got none; leave the key out for the "
                                f"default, {action.default}.")
            return None
        if isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise UserError(f"{where} must be true or false, got {value!r}.")
            return value
        if isinstance(action, argparse._AppendAction):
            lists = value if isinstance(value, list) else [value]
            return [_words(item) for item in lists]
        if action.nargs is None:
            return self._element(action, value, where)
        words = _words(value)
        if isinstance(action.nargs, int) and len(words) != action.nargs:
            raise UserError(f"{where} takes {action.nargs} values, got {value!r}.")
        return [self._element(action, word, where) for word in words]

    def _element(self, action: argparse.Action, value: Any, where: str) -> Any:
        try:
            value = self._get_value(action, str(value))
        except argparse.ArgumentError as error:
            raise UserError(f"{where}: {error}") from None
        if action.choices is not None and value not in action.choices:
            raise UserError(f"{where} must be one of {', '.join(map(str, action.choices))}; "
                            f"got {value!r}.")
        return value


def _words(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else str(value).split()


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, separator, value = word.partition("=")
    return flag.replace("_", "-") + separator + value


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The namespace as a dict of plain values, for checkpoints and args.yaml."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(vars(args).items()) if name != "given"}


def write_run_files(folder: Path, args: argparse.Namespace) -> None:
    """args.yaml with every resolved value, and command.txt with one line per start."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(yaml.safe_dump(plain(args), sort_keys=True), folder / "args.yaml")
        with open(folder / "command.txt", "a") as file:
            file.write(f"{shlex.join(sys.argv)}  # {args.world_size} process(es), "
                       f"git {args.git}\n")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error}.") from None
