"""YAML as it was meant: a key stands once, bytes are UTF-8, and nesting has an end."""

from __future__ import annotations

from collections.abc import Hashable
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 50  # lists and mappings in each other; a config has three
TOO_DEEP = f"nested more than {DEEPEST} deep"


class YamlError(ValueError):
    """What a file or text is, instead of YAML of one meaning."""


# libyaml's, where PyYAML was built with it, is ten times quicker
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """PyYAML's own takes the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, word = key.start_mark.line + 1, (key.tag, key.value)
            if word in seen:
                lines = f"line {line}" if line == seen[word] else f"lines {seen[word]} and {line}"
                raise YamlError(f"{key.value!r} stands twice, in {lines}")
            seen[word] = line
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def read(path: str | PathLike[str]) -> Any:
    """What a YAML file says.

    Raises:
        YamlError: It is no file that can be read, or not YAML of one meaning.
        FileNotFoundError: There is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise YamlError(
            f"not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    except OSError as error:
        raise YamlError(f"it cannot be read: {error.strerror}") from error
    return parse(text)


def parse(text: str) -> Any:
    """What a text says.

    Raises:
        YamlError: It is not YAML of one meaning.
    """
    try:
        depth = 0
        for event in yaml.parse(text, _SafeLoader):  # what loads it recurses as deep as a text does
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise YamlError(TOO_DEEP)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # libyaml's own bound, which it reaches by looking ahead
            raise YamlError(TOO_DEEP) from error
        raise YamlError(f"not YAML: {error}") from error
    except ValueError as error:  # of a scalar: a date such as 2026-99-99
        raise YamlError(str(error)) from error
