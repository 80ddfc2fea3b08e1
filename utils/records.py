"""Files of plain values that people edit, YAML and JSON lines: read whole or refused in a sentence.

Nothing in them runs, and nothing in them can fill the memory.
"""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.registry import UserError, one_line, short

LARGEST = 2 ** 18  # bytes of a YAML file: a recipe has 2 KiB
MOST_REFERENCES = 100


class _Loader(yaml.SafeLoader):
    """YAML without what a list of settings does not need: a key twice, and references within
    references, of which a few lines make more values than a memory holds."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.num_references = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_reference = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_reference:
            self.num_references += 1
            is_flat = isinstance(node, yaml.ScalarNode) or (
                isinstance(node, yaml.SequenceNode)
                and all(isinstance(item, yaml.ScalarNode) for item in node.value))
            if not is_flat or self.num_references > MOST_REFERENCES:
                raise yaml.YAMLError("too many references (*name), or one to nested values; write "
                                     "them out")
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"a key is there twice, from line {node.start_mark.line + 1} on")
        return mapping


def _plain_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Not YAML 1.1's, in which 010 is 8 and 1:30 is 90."""
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
        raise yaml.YAMLError(f"{short(node.value)} may mean several numbers; write it plainly, or "
                             "in quotes where it is a word")
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _plain_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping of names to values; an empty one for an empty file. Raises UserError for
    what is none, without the file's name, which the caller knows better how to call."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"it is too large for settings (over {LARGEST:,} bytes).")
        with open(path, "rb") as file:
            content = yaml.load(file.read(LARGEST), _Loader)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"it cannot be read ({error.strerror}).") from None
    except Exception as error:  # the constructors of numbers and dates raise almost anything
        raise UserError(f"it is not readable YAML: {one_line(error)[:300]}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError("it must be a mapping of names to values.")
    return content


def yaml_text(values: Mapping[str, Any]) -> str:
    """The file of which `read_yaml` gives these values, in their order. Tuples become lists."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """These values as `read_yaml` would give them."""
    return yaml.load(yaml_text(values), _Loader)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, a line each, with the whole number `epoch` in each. Raises
    UserError for a line that is none, and OSError."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            is_good = type(record["epoch"]) is int and 0 <= record["epoch"] < 2 ** 31
        except (ValueError, KeyError, TypeError, RecursionError):
            is_good = False
        if not is_good:
            raise UserError(f"line {number} of {path} is no JSON object with a whole number epoch")
        records.append(record)
    return records
