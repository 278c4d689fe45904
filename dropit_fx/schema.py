"""The JSON schema of config files, from the tables of ops and codecs: editors complete from it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from dropit_fx.codecs import CODEC
from dropit_fx.config import (
    COUNTS,
    IN_BRACKETS,
    LONGEST_GLOB,
    NUMBERS,
    OWN_KEYS,
    PRESET_KEYS,
    named_codecs,
    presets,
)
from dropit_fx.ops.table import RULES
from dropit_fx.rules import DEFAULT_PRESET, Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TRUTH = {"type": "boolean"}
_GLOB = {"type": "string", "minLength": 1, "maxLength": LONGEST_GLOB}
_TRAIN = {"enum": [True, False, "bias"], "description": "what gets a gradient; bias: biases alone"}
_DERIVE = {**_TRUTH, "description": "it may be made again in the place of a copy"}

_OFFLOAD = {**_TRUTH, "description": "the copy waits on the host for its backward"}


def config_schema() -> dict[str, Any]:
    """The schema, as plain data. What it refuses, ``load_config`` refuses.

    Not the other way round: that a codec serves an op, or that a glob names one, is not in it.
    """
    globs = _one_or_more(_GLOB)
    where = {
        "module": {**globs, "description": "globs on qualified module names; * crosses dots"},
        "op": {
            **_one_or_more({"anyOf": [{"enum": [*RULES]}, _GLOB]}),
            "description": "globs on names of the op table",
        },
    }
    codecs = [_codec_rule(name, where) for name in named_codecs()]
    train = _rule({**where, "train": _TRAIN}, "train")
    share = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    block = {"backprop": share, "dim": {"type": "integer", "minimum": 0}}
    backprop = _rule({"module": where["module"], **block}, "module", "backprop")
    about = _settings_explained()
    settings = {
        key: {**(COUNTS if key in NUMBERS else _TRUTH), "description": about.get(key, "")}
        for key in (*PRESET_KEYS, *OWN_KEYS)
    }
    preset = {"enum": [*presets(), None], "default": DEFAULT_PRESET}
    return {
        "$schema": DIALECT,
        "title": "A config of dropit_fx",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "preset": {**preset, "description": "whose rules come last; null: none"},
            "rules": {
                "description": "the first that matches wins",
                "type": ["array", "null"],
                "items": {"anyOf": [*codecs, train, backprop]},
            },
            **settings,
        },
    }


def _codec_rule(name: str, where: dict[str, Any]) -> dict[str, Any]:
    """A rule that says how tensors are kept."""
    options = {
        o.name: {**o.schema, "default": o.default, "description": o.meaning}
        for o in CODEC[name].options
    }
    reported = {"type": "string", "pattern": rf"^{name}\([{IN_BRACKETS}]+\)$"}
    own = {"codec": {"anyOf": [{"const": name}, reported]}, **options, "derive": _DERIVE}
    own |= {} if name == "keep" else {"offload": _OFFLOAD}
    return _rule({**where, **own, "train": _TRAIN}, "codec")


def _rule(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [*required],
        "properties": properties,
    }


def _one_or_more(each: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [each, {"type": "array", "minItems": 1, "items": each}]}


def _settings_explained() -> dict[str, str]:
    """What the docstring of :class:`Config` says of each setting."""
    said = inspect.getdoc(Config) or ""
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", said, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
