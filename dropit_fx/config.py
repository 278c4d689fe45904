"""YAML, mappings and sugar -> :class:`Config`; every config error is raised here, with its rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from os import PathLike
from typing import Any

from torch import Tensor

from dropit_fx import yaml_files
from dropit_fx.codecs import CODEC, DERIVED, STAND_INS
from dropit_fx.codecs.codec import Codec
from dropit_fx.ops.rule import OpRule, Use
from dropit_fx.ops.table import RULES
from dropit_fx.rules import DEFAULT_PRESET as DEFAULT_PRESET
from dropit_fx.rules import BackpropRule as BackpropRule
from dropit_fx.rules import Config as Config
from dropit_fx.rules import Rule as Rule
from dropit_fx.rules import TrainRule as TrainRule
from dropit_fx.words import did_you_mean, fits, matches, shortened

NUMBERS = {"norm_values": "values", "loss_classes": "classes"}  # settings that are numbers
COUNTS = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}  # their values
PRESET_KEYS = ("derive", "keep_small", *NUMBERS)  # that a preset sets beside its rules
OWN_KEYS = ("drop_logits", "offload", "force")  # that no preset sets
IN_BRACKETS = r"\w=.,+ -"  # what reports write behind the name of a codec: quant(bits=5)
LONGEST_GLOB = 1000  # characters; the expression that it becomes takes long to make
PAPER_PRESET = "dropit"  # of the published call, which names a strategy or a rate


class ConfigError(ValueError):
    """A config that cannot mean anything; the message prints the rule and what would be legal."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


def presets() -> tuple[str, ...]:
    """Names of the presets that come with the package."""
    folder = resources.files("dropit_fx") / "presets"
    return tuple(
        sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    )


@cache
def _preset(name: str) -> Config:
    if name not in presets():
        raise ConfigError(f"no preset {name!r}.{did_you_mean(name, presets())}")
    file = resources.files("dropit_fx") / "presets" / f"{name}.yaml"
    said = yaml_files.parse(file.read_text(encoding="utf-8"))
    return _before(Config(preset=name), said, f"preset {name}", preset=True)


def load_config(source: str | PathLike[str] | Mapping[str, Any] | Config | None = None) -> Config:
    """Reads and checks a config.

    Args:
        source: Path of a YAML file, a mapping of the same shape, a Config (returned as it is), or
            None for the default preset. Keys: ``preset`` (a name, or null for none), ``rules`` (a
            list of ``{module, op, codec, <options of the codec>, derive, offload, train}``,
            ``codec`` or ``train`` or both, or of ``{module, backprop, dim}``), ``derive``,
            ``keep_small``, ``norm_values``, ``loss_classes`` (these four as the preset says unless
            given), ``drop_logits``, ``offload``, ``force``.

    Raises:
        ConfigError: An unknown key, preset, codec, op or option, or a value out of range.
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, Config):
        return source
    origin = "config"
    if isinstance(source, (str, PathLike)):
        origin = str(source)
        try:
            source = yaml_files.read(source)
        except yaml_files.YamlError as error:
            raise ConfigError(f"{origin}: {error}") from error
        except FileNotFoundError as error:
            hint = f"; a preset is named by preset={origin!r}" if origin in presets() else ""
            raise FileNotFoundError(f"no config file {origin!r}{hint}") from error
    source = {} if source is None else source
    if not isinstance(source, Mapping):
        leaves = source if isinstance(source, list | tuple) else [source]
        given = "; the model's inputs are given as example_args=(x, ...)"
        hint = given if any(isinstance(leaf, Tensor) for leaf in leaves) else ""
        raise ConfigError(f"{origin}: a mapping was expected, not {type(source).__name__}{hint}")
    preset = source.get("preset", DEFAULT_PRESET)
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"{origin}: no preset {preset!r}.{did_you_mean(preset, presets())}")
    return _before(Config(preset=None) if preset is None else _preset(preset), source, origin)


def _before(base: Config, source: Mapping[str, Any], origin: str, preset: bool = False) -> Config:
    """What a file or a mapping says, before what ``base`` says; ``preset``: it is one."""
    _known(source, ("preset", "rules", *PRESET_KEYS, *OWN_KEYS), origin)
    rules = source.get("rules")
    rules = [] if rules is None else rules
    if not isinstance(rules, list | tuple):
        raise ConfigError(f"{origin}: 'rules' is a list of rules, not {type(rules).__name__}")
    settings = {k: source.get(k, getattr(base, k)) for k in (*PRESET_KEYS, *OWN_KEYS)}
    for key, value in settings.items():
        what = NUMBERS.get(key)
        if what is None and not isinstance(value, bool):
            raise ConfigError(f"{origin}: {key!r} is true or false, not {value!r}")
        if what and not fits(value, COUNTS):
            raise ConfigError(f"{origin}: {key!r} is a number of {what}, 0 or more: {value!r}")
    numbered = [(r, i, f"{origin}, rule {i}") for i, r in enumerate(rules, 1)]
    backprop = tuple(_backprop_rule(r, i, at) for r, i, at in numbered if _says(r, "backprop"))
    numbered = [(r, i, at) for r, i, at in numbered if not _says(r, "backprop")]
    training = tuple(_train_rule(r, i, at) for r, i, at in numbered if _says(r, "train"))
    own = tuple(
        _rule(r, at, preset) for r, _, at in numbered if _says(r, "codec") or not _says(r, "train")
    )
    return replace(base, rules=own + base.rules, training=training, backprop=backprop, **settings)


def make_config(
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    *,
    preset: str | None = None,
    strategy: str | None = None,
    gamma: float | None = None,
    bits: int | None = None,
    drop_logits: bool | None = None,
) -> Config:
    """A config with the sugar of ``transform`` and of the backend's options applied.

    ``gamma`` and ``bits`` change the preset in force, in all its rules whose codec has that option,
    and leave rules of one's own as they are. ``strategy`` names the codec of its rules that drop
    elements of matmul and convolution inputs. Where a strategy is named and neither a preset nor a
    config, the preset is ``dropit``: the call of the published code,
    ``transform(model, strategy="mink", gamma=0.9)``. ``drop_logits`` is the config's of that name,
    which None leaves as it is.

    Raises:
        ConfigError: The config cannot mean anything, or the preset has no rule with such an option.
    """
    if preset is None and config is None and strategy is not None:
        preset = PAPER_PRESET
    if preset is not None and config is not None:
        named = load_config(config)
        own = tuple(r for r in named.rules if not r.preset)
        chosen = _preset(preset)
        settings = {k: getattr(chosen, k) for k in PRESET_KEYS}
        loaded = replace(named, rules=own + chosen.rules, preset=preset, **settings)
    else:
        loaded = load_config({"preset": preset} if preset is not None else config)
    changes = {k: v for k, v in (("gamma", gamma), ("bits", bits)) if v is not None}
    if strategy is not None:
        loaded = _with_strategy(loaded, strategy, changes)
    for name, value in changes.items():
        loaded = _with_option(loaded, name, value)
    if drop_logits is None:
        return loaded
    if not isinstance(drop_logits, bool):
        raise ConfigError(f"drop_logits is true or false, not {drop_logits!r}")
    return replace(loaded, drop_logits=drop_logits)


def _with_strategy(config: Config, strategy: str, changes: Mapping[str, Any]) -> Config:
    """The preset's rules that drop elements, with another codec and the options that it has."""
    contract = tuple(n for n, c in CODEC.items() if Use.CONTRACT in c.serves and c.name != "keep")
    if strategy not in contract:
        raise ConfigError(f"no strategy {strategy!r}.{did_you_mean(strategy, contract)}")
    codec = CODEC[strategy]
    _check_options(codec, changes, "strategy")

    def swapped(rule: Rule) -> Rule:
        options = tuple((k, v) for k, v in rule.options if _has(codec, k))
        return replace(rule, codec=strategy, options=options)

    if not any(_drops(r) for r in config.rules):
        raise ConfigError(
            f"strategy = {strategy!r} takes the place of the codec that drops elements, and preset"
            f" {config.preset!r} has none.{_presets_with('gamma')}"
        )
    return replace(config, rules=tuple(swapped(r) if _drops(r) else r for r in config.rules))


def _with_option(config: Config, name: str, value: Any) -> Config:
    """The preset's rules with another value of the option, wherever their codec has it."""

    def changed(rule: Rule) -> Rule:
        codec = CODEC[rule.codec]
        if not rule.preset or not _has(codec, name):
            return rule
        _check_options(codec, {name: value}, f"preset {config.preset}")
        return replace(rule, options=tuple((dict(rule.options) | {name: value}).items()))

    if not any(r.preset and _has(CODEC[r.codec], name) for r in config.rules):
        raise ConfigError(
            f"{name} = {value!r} changes rules of the preset, and preset {config.preset!r} has none"
            f" whose codec has that option.{_presets_with(name)}"
        )
    return replace(config, rules=tuple(map(changed, config.rules)))


def _presets_with(option: str) -> str:
    able = [n for n in presets() if any(_has(CODEC[r.codec], option) for r in _preset(n).rules)]
    return f" Presets that have: {', '.join(able)}; or write a rule with {option!r} of your own."


def _has(codec: Codec, option: str) -> bool:
    return any(o.name == option for o in codec.options)


def _drops(rule: Rule) -> bool:
    return rule.preset and _has(CODEC[rule.codec], "gamma")


def _rule(source: Any, where: str, preset: bool) -> Rule:
    if not isinstance(source, Mapping):
        raise ConfigError(f"{where}: a rule is a mapping, not {source!r}")
    if "codec" not in source:
        raise ConfigError(
            f"{where} {dict(source)}: no 'codec'. Choose one of: {', '.join(named_codecs())}."
        )
    source = _with_options(source, where)
    name = source["codec"]
    if name not in named_codecs():
        why = _reported_only(name) or did_you_mean(name, named_codecs())
        raise ConfigError(f"{where}: no codec {name!r}.{why}")
    codec = CODEC[name]
    legal = tuple(o.name for o in codec.options)
    if name == "keep" and "offload" in source:
        raise ConfigError(
            f"{where}: no key 'offload' for codec 'keep': as it is, a tensor stays on its device."
            " Name a codec that packs it, or run under torch.autograd.graph.save_on_cpu."
        )
    keys = ("module", "op", "codec", *legal, "derive", "offload", "train")
    _known(source, keys, where, f" for codec {name!r}")
    derive = source.get("derive", False)
    if not isinstance(derive, bool):
        raise ConfigError(f"{where}: 'derive' is true or false, not {derive!r}")
    offload = source.get("offload")
    if "offload" in source and not isinstance(offload, bool):
        raise ConfigError(f"{where}: 'offload' is true or false, not {offload!r}")
    options = {k: v for k, v in source.items() if k in legal}
    _check_options(codec, options, where)
    rule = Rule(
        module=_globs(source.get("module", "*"), "module", where),
        op=_globs(source.get("op", "*"), "op", where),
        codec=name,
        options=tuple(options.items()),
        preset=preset,
        derive=derive,
        offload=offload,
    )
    for glob in rule.op:
        if why := _unsuited(glob, name):
            raise ConfigError(f"{where} {rule}: {why}")
    return rule


def _with_options(source: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A rule whose codec is written as reports write it: ``quant(bits=5, block=256)``."""
    form = rf"(\w+)\(([{IN_BRACKETS}]+)\)"
    found = re.fullmatch(form, source["codec"]) if isinstance(source["codec"], str) else None
    if found is None:
        return source
    name, written = found.groups()
    options: dict[str, Any] = {}
    for pair in written.split(","):
        key, _, value = map(str.strip, pair.partition("="))
        if not key or not value:
            raise ConfigError(f"{where}: codec = {source['codec']!r}: write {name}(option=value)")
        if key in source or key in options:
            raise ConfigError(f"{where}: codec = {source['codec']!r}: {key!r} is said twice")
        options[key] = yaml_files.parse(value)
    return {**source, **options, "codec": name}


def _reported_only(name: object) -> str:
    """What to write for a word that stands in the place of a codec in reports alone, or ``""``."""
    if name == DERIVED:
        return (
            f" {DERIVED!r} is what reports say of what is made again: write 'derive: true' beside"
            " the codec that keeps it where it cannot be."
        )
    if name in ("drop", *STAND_INS):
        return f" {name!r} is what reports say of what needs no copy: it needs no rule."
    if isinstance(name, str) and "+" in name:
        return " Tensors with several readers have a codec for each: write a rule for each op."
    return ""


def _train_rule(source: Mapping[str, Any], number: int, where: str) -> TrainRule:
    train = source["train"]
    if not isinstance(train, bool) and train != "bias":
        raise ConfigError(f"{where}: train = {train!r}. Choose one of: true, false, bias.")
    if "codec" not in source:
        what = " for a rule without 'codec'"
        _known(source, ("module", "op", "codec", "train"), where, what)
    op = _globs(source.get("op", "*"), "op", where)
    for glob in op:
        if not any(True for _ in _named_by(glob)):
            raise ConfigError(f"{where}: {_no_op(glob)}")
    module = _globs(source.get("module", "*"), "module", where)
    return TrainRule(module=module, op=op, train=train, number=number)


def _backprop_rule(source: Mapping[str, Any], number: int, where: str) -> BackpropRule:
    share, dim = source["backprop"], source.get("dim", 0)
    _known(source, ("module", "backprop", "dim"), where, " for a rule with 'backprop'")
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ConfigError(f"{where}: backprop = {share!r}: the share of rows, a number in (0, 1)")
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
        raise ConfigError(f"{where}: dim = {dim!r}: the dimension of rows, a whole number from 0")
    if "module" not in source:
        raise ConfigError(f"{where} {dict(source)}: no 'module', which names the block")
    module = _globs(source["module"], "module", where)
    return BackpropRule(module=module, share=float(share), dim=dim, number=number)


def refuse_backprop(config: Config, who: str) -> None:
    """Raises ConfigError where a rule says ``backprop``, which ``who`` cannot do."""
    if config.backprop:
        raise ConfigError(f"rule {config.backprop[0].number} {config.backprop[0]}: {who}")


def refuse_offload(config: Config, who: str) -> None:
    """Raises ConfigError where something is to wait on the host, for ``who`` cannot do it."""
    rule = next((r for r in config.rules if r.offload), None)
    if config.offload or rule:
        raise ConfigError(f"{f'rule {rule}' if rule else 'offload: true'}: {who}")


def _says(source: Any, key: str) -> bool:
    return isinstance(source, Mapping) and key in source


def _named_by(glob: str) -> Iterator[OpRule]:
    """The rows of the op table that a glob names."""
    if glob in RULES:
        return iter((RULES[glob],))
    return (r for r in RULES.values() if matches(r.name, (glob,)))


def _no_op(glob: str) -> str:
    return f"no op {glob!r} in the op table.{did_you_mean(glob, RULES)}"


def _unsuited(glob: str, name: str) -> str:
    """Why no op that a glob names has a tensor that a codec can keep, or ``""``."""
    codec = CODEC[name]
    reads = (r for row in _named_by(glob) for r in row.reads if r.use is not Use.SHAPE)
    if any(map(codec.can_keep, reads)):  # of "*" the first will do: a config may have many rules
        return ""
    named = list(_named_by(glob))
    if not named:
        return _no_op(glob)
    read = named[0].reads[0]
    able = [c for c in named_codecs() if CODEC[c].can_keep(read)]
    why = f"uses it as '{read.use}'"
    if codec.contract is not None and read.use in codec.serves:
        why = "is no product that sums over its rows"
    return (
        f"{named[0].name}.{read.operand} cannot be saved as {name!r}: the backward of"
        f" {named[0].name} {why}. Choose one of: {', '.join(able)}."
    )


def named_codecs() -> tuple[str, ...]:
    """The codecs that a config may name."""
    return tuple(n for n in CODEC if n != "drop")


def _globs(value: Any, key: str, where: str) -> tuple[str, ...]:
    globs = tuple(value) if isinstance(value, list | tuple) else (value,)
    if key == "op":  # relu+conv2d, as reports write what several ops read
        globs = tuple(one for g in globs for one in (g.split("+") if isinstance(g, str) else (g,)))
    if not globs or not all(isinstance(g, str) and g for g in globs):
        raise ConfigError(f"{where}: '{key}' is a glob or a list of globs, not {value!r}")
    if any(len(g) > LONGEST_GLOB for g in globs):
        raise ConfigError(f"{where}: a glob of '{key}' has more than {LONGEST_GLOB} characters")
    return globs


def _check_options(codec: Codec, options: Mapping[str, Any], where: str) -> None:
    known = {o.name: o for o in codec.options}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"{where}: codec {codec.name!r} has no option {name!r}.{did_you_mean(name, known)}"
            )
        if not known[name].legal(value):
            raise ConfigError(
                f"{where}: {name} = {value!r} for codec {codec.name!r}: {known[name].meaning}"
            )


def _known(source: Mapping[str, Any], keys: Iterable[str], where: str, what: str = "") -> None:
    for key in source:
        if key not in keys:
            raise ConfigError(f"{where}: no key {key!r}{what}.{did_you_mean(str(key), keys)}")
