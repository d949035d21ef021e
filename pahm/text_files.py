"""Reads untrusted JSON and YAML files, with limits on size, depth and length of numbers."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

LIMIT = 1 << 24
"""Default maximum size of a JSON file in bytes. The maximum for a YAML file is a hundredth of this."""


def shown(value: object) -> str:
    """`repr` for a message, shortened if long."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40


def read_text(path: str | os.PathLike[str], limit: int = LIMIT) -> str:
    """Read the text of a UTF-8 file, without a byte order mark.

    Raises FileNotFoundError if the file does not exist, and ValueError, naming the file, if it is larger than
    `limit` bytes or is not text.
    """
    name, file = os.fspath(path), Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if not file.is_file():
        raise ValueError(f"{name} is not a file")
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{name} has more than {limit} bytes, expected a smaller file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None


def read_json(path: str | os.PathLike[str], limit: int = LIMIT) -> Any:
    """Read a JSON file's value. Raises as `read_text`, and ValueError naming the file as `parse_json`."""
    return parse_json(read_text(path, limit), os.fspath(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse a JSON text. Error messages call it `name`.

    Raises ValueError if the text is not JSON, is nested too deeply, repeats a key, or has a number that is
    not finite or has too many digits.
    """
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_number, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{name} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # ours, or from bytes that are not text or numbers with too many digits
        raise ValueError(f"{name} is not JSON that can be read: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file's value. Raises as `read_text`, and ValueError naming the file as `parse_yaml`."""
    return parse_yaml(read_text(path, LIMIT // 100), os.fspath(path))


def parse_yaml(text: str, name: str) -> Any:
    """Parse a YAML text of plain values, lists and mappings. Error messages call it `name`.

    Raises ValueError if the text is not YAML, is nested too deeply, repeats a key, or has aliases, which can
    expand a few lines to gigabytes.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{name}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())[:500]}") from error


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} is given twice")
    return values


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(f"aliases such as *{event.anchor} are not supported: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:  # YAML's own readers keep the last one
                line = node.start_mark.line + 1
                raise ValueError(f"{key.value} is given twice, again in line {line} or below")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)
