"""The JSON schema of configs: the project's own are valid, what no config may say is not."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dropit_fx import ConfigError, load_config, yaml_files
from dropit_fx.cli import main
from dropit_fx.codecs import CODEC
from dropit_fx.config import named_codecs
from dropit_fx.schema import config_schema
from dropit_fx.words import fits

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = config_schema()
FILES = [*ROOT.glob("dropit_fx/presets/*.yaml"), *ROOT.glob("examples/configs/*.yaml")]


def valid(value: Any, schema: Any) -> bool:
    """By the package ``jsonschema``, where it is there, and by hand."""
    found = by_hand(value, schema)
    with contextlib.suppress(ModuleNotFoundError):
        import jsonschema

        assert jsonschema.Draft202012Validator(schema).is_valid(value) == found, (value, schema)
    return found


def by_hand(value: Any, schema: Any) -> bool:
    """The keywords that the schema uses."""
    if "anyOf" in schema:
        return any(by_hand(value, each) for each in schema["anyOf"])
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        missing = [key for key in schema.get("required", ()) if key not in value]
        parts = (k in known and by_hand(v, known[k]) for k, v in value.items())
        return "object" in kinds and not missing and all(parts)
    if isinstance(value, list):
        enough = len(value) >= schema.get("minItems", 0)
        return "array" in kinds and enough and all(by_hand(v, schema["items"]) for v in value)
    if isinstance(value, str):
        fit = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return "string" in kinds and fit and bool(re.search(schema.get("pattern", ""), value))
    if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
        return False
    return any(
        k not in ("object", "array", "string") and fits(value, {**schema, "type": k}) for k in kinds
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_of_the_project_are_valid(file: Path) -> None:
    assert valid(yaml_files.read(file), SCHEMA)


def documented() -> Iterator[Any]:
    """Configs that stand in documents."""
    for path in (ROOT / "dropit_fx/presets/README.md", ROOT / "examples/README.md"):
        for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            found = yaml_files.parse(block)
            if isinstance(found, dict) and {"preset", "rules"} & found.keys():
                yield found


def test_those_of_the_documents_are_valid() -> None:
    found = list(documented())
    assert len(found) > 2
    for config in found:
        assert valid(config, SCHEMA), config


WRONG: list[Any] = [
    [],
    {"presets": "max"},
    {"preset": "maximal"},
    {"derive": 1},
    {"norm_values": -1},
    {"loss_classes": 2**63},
    {"rules": "quant"},
    {"rules": [{"op": "linear"}]},
    {"rules": [{"codec": "quants"}]},
    {"rules": [{"codec": "quants(bits=5)"}]},
    {"rules": [{"codec": "quant()"}]},
    {"rules": [{"codec": "quant(bits=5) "}]},
    {"rules": [{"codec": "quant", "gamma": 0.5}]},
    {"rules": [{"codec": "quant", "bits": 9}]},
    {"rules": [{"codec": "quant", "bits": True}]},
    {"rules": [{"codec": "quant", "block": 12}]},
    {"rules": [{"codec": "quant", "block": 8 * 10**30}]},
    {"rules": [{"codec": "cast", "dtype": "int8"}]},
    {"rules": [{"codec": "mink", "gamma": 1}]},
    {"rules": [{"codec": "mink", "gamma": float("inf")}]},
    {"rules": [{"op": "linear", "codec": "low_rank", "rank": 2**63}]},
    {"rules": [{"codec": "quant", "module": []}]},
    {"rules": [{"codec": "quant", "module": "x" * 2000}]},
    {"rules": [{"train": "weights"}]},
    {"rules": [{"backprop": 0.5}]},
    {"rules": [{"module": "blocks.*", "backprop": 1.0}]},
]


@pytest.mark.parametrize("config", WRONG, ids=lambda config: str(config)[:40])
def test_what_the_schema_refuses_is_an_error(config: Any) -> None:
    assert not valid(config, SCHEMA)
    with pytest.raises(ConfigError):
        load_config(config)


def test_every_codec_has_its_rule_with_every_option() -> None:
    rules = SCHEMA["properties"]["rules"]["items"]["anyOf"]
    by_codec = {
        r["properties"]["codec"]["anyOf"][0]["const"]: r for r in rules if "codec" in r["required"]
    }
    assert tuple(by_codec) == named_codecs()
    for name, rule in by_codec.items():
        for option in CODEC[name].options:
            said = rule["properties"][option.name]
            assert (said["default"], said["description"]) == (option.default, option.meaning)
            assert valid(option.default, option.schema)
    assert all(s["description"] for s in SCHEMA["properties"].values())


def test_the_command_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    written = json.loads(capsys.readouterr().out)
    # Asked now: a function that was declared since the import is a word of configs too
    assert written == json.loads(json.dumps(config_schema()))
