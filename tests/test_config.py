"""Configs from YAML, mappings and sugar; every error, with the text that says what to do."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dropit_fx
from dropit_fx.codecs import CODEC
from dropit_fx.config import Config, ConfigError, Rule, load_config, make_config, presets
from dropit_fx.ops.table import OP_RULES, RULES
from dropit_fx.words import shortened

LINEAR = RULES["linear"].reads[0]
RELU = RULES["relu"].reads[0]


def refusal(config: Any, **sugar: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make_config(config, **sugar)
    return str(error.value)


def rule(**keys: Any) -> dict[str, Any]:
    return {"preset": None, "rules": [keys]}


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


# --- where a config comes from

YAML = """
preset: lossless
rules:
  - module: blocks.*.fc2
    op: linear
    codec: mink
    gamma: 0.95
  - module: [head, head.*]
    codec: keep
"""


def test_yaml_mapping_and_config_mean_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(YAML)
    mapping = {
        "preset": "lossless",
        "rules": [
            {"module": "blocks.*.fc2", "op": "linear", "codec": "mink", "gamma": 0.95},
            {"module": ["head", "head.*"], "codec": "keep"},
        ],
    }
    config = load_config(path)
    assert config == load_config(str(path)) == load_config(mapping) == load_config(config)
    own = [r for r in config.rules if not r.preset]
    assert [str(r) for r in own] == [
        "{module: blocks.*.fc2, op: linear, codec: mink, gamma: 0.95}",
        "{module: [head, head.*], codec: keep}",
    ]


def test_nothing_means_the_balanced_preset() -> None:
    assert load_config() == load_config({}) == make_config() == load_config({"preset": "balanced"})


def test_the_published_call_means_the_papers_preset() -> None:
    assert make_config(strategy="mink", gamma=0.9) == load_config({"preset": "dropit"})


def test_an_empty_file_means_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert load_config(path) == load_config()


def test_a_file_that_is_missing_is_said_to_be() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_config("nowhere.yaml")


def test_configs_and_rules_are_frozen() -> None:
    config = load_config()
    with pytest.raises(FrozenInstanceError):
        config.force = True  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.rules[0].codec = "keep"  # type: ignore[misc]


# --- which rule decides


def test_the_first_rule_that_matches_wins() -> None:
    config = load_config(
        {
            "rules": [
                {"module": "a.*", "codec": "keep"},
                {"module": "a.b", "codec": "mink", "gamma": 0.5},
                {"module": "*", "op": "linear", "codec": "mink", "gamma": 0.25},
            ]
        }
    )

    def chosen(module: str) -> Rule:
        found = config.rule_for(module, "linear", LINEAR)
        assert found is not None
        return found

    assert chosen("a.b").codec == "keep"
    assert chosen("z").full_options()["gamma"] == 0.25


def test_rules_of_ones_own_come_before_the_presets() -> None:
    config = load_config({"preset": "dropit", "rules": [{"module": "head", "codec": "mink"}]})
    found = config.rule_for("head", "linear", LINEAR)  # the preset keeps heads
    assert found is not None
    assert (found.codec, found.preset) == ("mink", False)
    preset = load_config({"preset": "dropit"}).rule_for("head", "linear", LINEAR)
    assert preset is not None
    assert preset.codec == "keep"


def test_a_rule_speaks_only_of_reads_that_its_codec_serves() -> None:
    config = load_config(rule(codec="mink"))
    assert config.rule_for("a", "linear", LINEAR) is not None
    assert config.rule_for("a", "relu", RELU) is None


def test_stars_cross_dots() -> None:
    config = load_config(rule(module="blocks.*.fc2", codec="mink"))
    assert config.rule_for("blocks.0.mlp.fc2", "linear", LINEAR) is not None
    assert config.rule_for("blocks.fc2", "linear", LINEAR) is None


def test_preset_null_leaves_only_ones_own_rules() -> None:
    assert load_config({"preset": None}).rules == ()
    assert len(load_config(rule(codec="mink")).rules) == 1


def test_options_that_are_not_named_have_their_defaults() -> None:
    (only,) = load_config(rule(codec="mink", gamma=0.5)).rules
    assert only.full_options() == CODEC["mink"].defaults() | {"gamma": 0.5}


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_packs_something(name: str) -> None:
    config = load_config({"preset": name})
    assert all(r.preset for r in config.rules)
    reads = [(row.name, read) for row in OP_RULES for read in row.reads]
    assert any((r := config.rule_for("m", *read)) and r.codec != "keep" for read in reads)


def test_a_preset_rule_that_matches_nothing_is_no_error() -> None:
    x = torch.randn(8, 64)
    dropit_fx.transform(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), example_args=(x,)
    )


# --- sugar


def test_sugar_changes_the_presets_contractions_and_leaves_its_exceptions() -> None:
    plain, sweet = make_config(preset="dropit"), make_config(strategy="random", gamma=0.5)
    for before, after in zip(plain.rules, sweet.rules, strict=True):
        if before.codec == "mink":
            assert after.codec == "random"
            assert after.full_options()["gamma"] == 0.5
        else:
            assert after == before
    assert any(r.codec == "random" for r in sweet.rules)


def test_sugar_leaves_rules_of_ones_own_alone() -> None:
    config = make_config({"rules": [{"module": "a", "codec": "mink", "gamma": 0.3}]}, gamma=0.7)
    assert config.rules[0].full_options()["gamma"] == 0.3
    found = config.rule_for("b", "linear", LINEAR)
    assert found is not None
    assert found.full_options()["gamma"] == 0.7


def test_bits_alone_leave_the_preset_and_change_all_its_rules_that_have_bits() -> None:
    plain, sweet = load_config(), make_config(bits=3)
    assert sweet.preset == plain.preset
    for before, after in zip(plain.rules, sweet.rules, strict=True):
        had = "bits" in {o.name for o in CODEC[before.codec].options}
        assert dict(after.options) == dict(before.options) | ({"bits": 3} if had else {})
        assert (after.op, after.module, after.codec) == (before.op, before.module, before.codec)
    assert any("bits" in dict(r.options) for r in sweet.rules)


def test_gamma_alone_leaves_the_preset_and_changes_all_its_rules_that_have_one() -> None:
    plain, sweet = load_config(), make_config(gamma=0.75)
    changed = [r for r in sweet.rules if r not in plain.rules]
    assert [(r.codec, dict(r.options)["gamma"]) for r in changed] == [("mink", 0.75)]
    assert (sweet.preset, len(sweet.rules)) == (plain.preset, len(plain.rules))


def test_sugar_by_itself_keeps_no_more_than_the_default() -> None:
    x = torch.randn(64, 64)
    layers = nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.ReLU()

    def kept(**sugar: Any) -> int:
        made = dropit_fx.transform(nn.Sequential(*layers, *model()), example_args=(x,), **sugar)
        return dropit_fx.report(made).kept_bytes

    assert kept(bits=4) < kept()
    assert kept(gamma=0.9) <= kept()


def test_a_preset_given_beside_a_config_takes_the_place_of_its_preset() -> None:
    config = make_config({"preset": "dropit", "rules": [{"codec": "mink"}]}, preset="lossless")
    assert config == load_config({"preset": "lossless", "rules": [{"codec": "mink"}]})


def test_the_call_of_the_published_code_works() -> None:
    x = torch.randn(64, 64)
    packed = dropit_fx.transform(model(), strategy="mink", gamma=0.9, example_args=(x,))
    codecs = {r.codec for r in dropit_fx.report(packed).rows}
    assert codecs == {"bitmask(bits=1)+mink(gamma=0.9)"}


@pytest.mark.parametrize("kind", ["sugar", "rule"])
@pytest.mark.slow
def test_fewer_bits_never_cost_more_bytes(kind: str) -> None:
    x, images = torch.randn(64, 64), torch.randn(4, 16, 16, 16)
    mlp = nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)
    convs = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    for layers, given in ((mlp, x), (convs, images)):
        first = nn.Linear(64, 64) if given is x else nn.Conv2d(16, 16, 3)
        body = nn.Sequential(first, *layers)
        kept = []
        for bits in range(1, 9):
            rule = {"op": ["gelu", "silu", "batch_norm"], "codec": "quant", "bits": bits}
            how: Any = {"bits": bits} if kind == "sugar" else {"config": {"rules": [rule]}}
            made = dropit_fx.transform(body, example_args=(given,), **how)
            kept.append(dropit_fx.report(made).kept_bytes)
        assert kept == sorted(kept)


# --- errors

ERRORS: list[tuple[str, Any, str]] = [
    (
        "unknown key",
        {"presets": "dropit"},
        "config: no key 'presets'. Did you mean 'preset'? Choose one of: preset, rules, derive,"
        " keep_small, norm_values, loss_classes, drop_logits, offload, force.",
    ),
    (
        "unknown key of a rule",
        rule(modul="a", codec="keep"),
        "config, rule 1: no key 'modul' for codec 'keep'. Did you mean 'module'?",
    ),
    ("option of another codec", rule(codec="random", bits=4), "no key 'bits' for codec 'random'."),
    ("option of keep", rule(codec="keep", gamma=0.5), "no key 'gamma' for codec 'keep'."),
    ("option of bitmask", rule(codec="bitmask", bits=1), "no key 'bits' for codec 'bitmask'."),
    (
        "misspelt option",
        rule(codec="mink", gama=0.5),
        "no key 'gama' for codec 'mink'. Did you mean 'gamma'?",
    ),
    (
        "unknown preset",
        {"preset": "dropout"},
        "no preset 'dropout'. Did you mean 'dropit'? Choose one of: ",
    ),
    ("preset of a strange type", {"preset": ["dropit"]}, "no preset ['dropit']."),
    (
        "unknown codec",
        rule(codec="minks"),
        "config, rule 1: no codec 'minks'. Did you mean 'mink'? Choose one of: keep, mink,",
    ),
    ("codec that only passes use", rule(codec="drop"), "config, rule 1: no codec 'drop'."),
    (
        "what reports say: made again",
        rule(codec="derived"),
        "write 'derive: true' beside the codec",
    ),
    ("what reports say: nothing is kept", rule(codec="unread"), "it needs no rule"),
    ("what reports say: two codecs", rule(codec="bitmask+mink"), "write a rule for each op"),
    ("an option that is no option", rule(codec="quant(bit=5)"), "no key 'bit' for codec 'quant'"),
    ("an option without a value", rule(codec="quant(bits)"), "write quant(option=value)"),
    ("an option twice", rule(codec="quant(bits=5)", bits=4), "'bits' is said twice"),
    ("an option's value", rule(codec="quant(bits=50)"), "bits = 50 for codec 'quant'"),
    ("one of several ops", rule(op="relu+convd2", codec="keep"), "no op 'convd2'"),
    ("codec of a strange type", rule(codec=["mink"]), "no codec ['mink']."),
    ("no codec", rule(op="linear"), "config, rule 1 {'op': 'linear'}: no 'codec'. Choose one of: "),
    (
        "unknown op",
        rule(op="lineal", codec="mink"),
        "{op: lineal, codec: mink}: no op 'lineal' in the op table. Did you mean 'linear'?",
    ),
    (
        "one unknown op of several",
        rule(op=["linear", "conv9*"], codec="mink"),
        "no op 'conv9*' in the op table.",
    ),
    (
        "codec that does not serve the op",
        rule(op="relu", codec="mink"),
        "relu.result cannot be saved as 'mink': the backward of relu uses it as 'slope'."
        " Choose one of: keep, bitmask",
    ),
    (
        "mask codec for an operand",
        rule(op="linear", codec="bitmask"),
        "linear.input cannot be saved as 'bitmask': the backward of linear uses it as 'contract'."
        " Choose one of: keep, mink, random",
    ),
    (
        "rules in a mapping",
        {"rules": {"codec": "mink"}},
        "'rules' is a list of rules, not dict",
    ),
    ("rules that are a string", {"rules": "mink"}, "'rules' is a list of rules, not str"),
    ("rule that is no mapping", {"rules": ["mink"]}, "rule 1: a rule is a mapping, not 'mink'"),
    ("force that is no bool", {"force": "yes"}, "'force' is true or false, not 'yes'"),
    ("a list", [1, 2], "config: a mapping was expected, not list"),
    (
        "the model's inputs",
        (torch.zeros(2), 3),
        "not tuple; the model's inputs are given as example_args=(x, ...)",
    ),
    ("module that is no glob", rule(module=3, codec="mink"), "'module' is a glob or a list of"),
    ("no module at all", rule(module=[], codec="mink"), "'module' is a glob or a list of globs"),
    ("an empty glob", rule(op="", codec="mink"), "'op' is a glob or a list of globs, not ''"),
    ("a block of no whole bytes", rule(codec="mink", block=100), "elements of a block, a multiple"),
    ("a block of nothing", rule(codec="mink", block=0), "block = 0 for codec 'mink'"),
    ("an unknown scope", rule(codec="mink", scope="layer"), "scope = 'layer' for codec 'mink': "),
    ("too many bits", rule(codec="mink", bits=9), "bits = 9 for codec 'mink': bits of a kept"),
    ("no bits", rule(codec="mink", bits=0), "bits = 0 for codec 'mink': bits of a kept value, 1"),
    ("bits that are a bool", rule(codec="mink", bits=True), "bits = True for codec 'mink'"),
]


@pytest.mark.parametrize(("config", "text"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_what_cannot_be_meant_is_refused(config: Any, text: str) -> None:
    assert text in refusal(config)


@pytest.mark.parametrize(
    "gamma", [1, 1.0, 1.5, -0.1, 0.99999, float("nan"), float("inf"), True, "0.9", None, [0.9]]
)
def test_gamma_outside_its_range_is_refused(gamma: Any) -> None:
    text = f"gamma = {gamma!r} for codec 'mink': the dropping rate, a number in [0, 0.9999]"
    assert text in refusal(rule(codec="mink", gamma=gamma))
    if gamma is not None:  # as sugar, None means that it is not given
        assert text in refusal(None, gamma=gamma)


@pytest.mark.parametrize("gamma", [0, 0.0, 0.5, 0.9999])
def test_gamma_inside_its_range_is_taken(gamma: float) -> None:
    assert load_config(rule(codec="mink", gamma=gamma)).rules[0].options == (("gamma", gamma),)


def test_sugar_is_checked_as_rules_are() -> None:
    assert "no strategy 'mimk'. Did you mean 'mink'?" in refusal(None, strategy="mimk")
    assert "no strategy 'bitmask'." in refusal(None, strategy="bitmask")
    assert "codec 'random' has no option 'bits'" in refusal(None, strategy="random", bits=4)
    assert "no preset 'x'" in refusal({"rules": []}, preset="x")


def test_sugar_without_anything_to_sweeten_is_refused() -> None:
    for config in ({"preset": None}, {"preset": "lossless"}):
        text = refusal(config, gamma=0.5)
        assert f"gamma = 0.5 changes rules of the preset, and preset {config['preset']!r}" in text
        assert "Presets that have: balanced, dropit, max;" in text
        assert "Presets that have: adapters, balanced, dropit, fewbit," in refusal(config, bits=4)
        text = refusal(config, strategy="random")
        assert "strategy = 'random' takes the place of the codec that drops elements" in text
    assert "bits = 6 for codec 'few_bit': bits of an interval's number, 1 to 4" in refusal(
        {"preset": "fewbit"}, bits=6
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rules: [", ": not YAML: "),
        ("preset: !!python/name:os.system", ": not YAML: could not determine a constructor"),
        ("preset: max\npreset: gact", ": 'preset' stands twice, in lines 1 and 2"),
        ('{"rules": [{"codec": "quant", "bits": 4, "bits": 8}]}', ": 'bits' stands twice, in"),
        ("rules: false", ": 'rules' is a list of rules, not bool"),
        ("rules: {}", ": 'rules' is a list of rules, not dict"),
        ("a: " + "[" * 500 + "]" * 500, ": nested more than 50 deep"),
        ("[" * 100_000, ": nested more than 50 deep"),
        (
            f"rules: [{{codec: keep, module: '{'*a' * 501}'}}]",
            ", rule 1: a glob of 'module' has more than 1000 characters",
        ),
        ("preset: 2026-99-99", ": month must be in 1..12"),
        (f"norm_values: {10**30}", ": 'norm_values' is a number of values, 0 or more: 1000"),
        ("- a\n- b\n", ": a mapping was expected, not list"),
        ("just words", ": a mapping was expected, not str"),
        ("rules:\n  - codec: minke\n", ", rule 1: no codec 'minke'."),
        ("preset: dropit\npreset2: x\n", ": no key 'preset2'."),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert f"{path}{reason}" in refusal(path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_bytes("# é\npreset: max".encode(encoding))
    assert f"{path}: not UTF-8: byte " in refusal(path)
    path.write_text("# é\npreset: max", encoding="utf-8-sig")  # as some editors do
    assert load_config(path).preset == "max"


def test_a_file_is_data_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "bad.yaml", tmp_path / "made"
    path.write_text(f"preset: !!python/object/apply:pathlib.Path.touch ['{made}']")
    assert "could not determine a constructor" in refusal(path)
    assert not made.exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}: it cannot be read: Is a directory" in refusal(tmp_path)
    with pytest.raises(FileNotFoundError, match="'max'; a preset is named by preset='max'"):
        load_config("max")


def test_long_words_stay_out_of_messages() -> None:
    for config in ({"preset": "x" * 10**6}, {"rules": [{"codec": "quant", "op": "x" * 10**6}]}):
        assert len(refusal(config)) < 2000


MANY = [f"layers.{i}.mlp" for i in range(2_000)]


@pytest.mark.parametrize(
    "config",
    [
        {"rules": [{"module": MANY, "codec": "keep"}]},
        {"rules": [{"op": MANY, "codec": "keep"}]},
        {"rules": [{"module": MANY, "op": "relu", "codec": "rows"}]},
        {"rules": [{"module": MANY, "backprop": 0.25}]},
        {"rules": [{"module": MANY, "train": False}]},
        {"rules": [{"codec": MANY}]},
        {"rules": [{"codec": "quant", "bits": MANY}]},
        {"preset": MANY},
        {"derive": MANY},
    ],
    ids=lambda config: str(config)[:40],
)
def test_long_lists_stay_out_of_messages(config: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        dropit_fx.transform(model(), config, example_args=(torch.randn(64, 64),))
    message = str(caught.value)
    assert len(message) < 2000
    assert "layers.0.mlp" in message
    assert " more), " in message


def test_a_message_of_a_megabyte_is_shortened_in_one_pass() -> None:
    words = "a " * 500_000  # minutes, where each character is a place to begin from
    assert shortened(words) == words


def test_a_long_list_stays_out_of_a_reports_reasons() -> None:
    config = {"rules": [{"module": [*MANY, "*"], "codec": "keep"}]}
    packed = dropit_fx.transform(model(), config, example_args=(torch.randn(64, 64),))
    said = {row.reason for row in dropit_fx.report(packed).rows}
    assert all("... (" in reason for reason in said)
    assert max(map(len, said)) < 2000


def test_a_rule_that_matches_nothing_is_printed_with_what_there_is() -> None:
    x = torch.randn(64, 64)
    config = {"rules": [{"module": "layer9", "op": "linear", "codec": "mink"}]}
    text = (
        "rule {module: layer9, op: linear, codec: mink} matched no saved tensor."
        " Modules with packable ones: 1 (relu), 2 (linear), 3 (relu), 4 (linear)."
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        dropit_fx.transform(model(), config, example_args=(x,))


def test_what_there_is_of_a_deep_model_is_told_as_globs() -> None:
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)))
    config = {"rules": [{"module": "layer9", "codec": "keep"}]}
    text = "packable ones: *.* (linear), *.* (relu)."
    with pytest.raises(ConfigError, match=re.escape(text)):
        dropit_fx.transform(deep, config, example_args=(torch.randn(64, 64),))


def test_a_filter_says_which_modules_are_packed() -> None:
    blocks = (nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2))
    net, x = nn.Sequential(*blocks), torch.randn(64, 64)
    asked: dict[str, nn.Module] = {}

    def kept(module: nn.Module, name: str) -> bool:
        asked[name] = module
        return not (isinstance(module, nn.Linear) or name == "1.1")

    own = {"rules": [{"op": "linear", "codec": "quant"}]}
    for config in (None, own):
        packed = dropit_fx.transform(net, config, example_args=(x,), filter_fn=kept)
        for row in dropit_fx.report(packed).rows:
            dense = isinstance(asked[row.module], nn.Linear) or row.module == "1.1"
            assert (row.codec == "keep") == dense, row
    assert asked == dict(net.named_modules())
    everything = dropit_fx.transform(net, example_args=(x,), filter_fn=lambda *_: True)
    rows = dropit_fx.report(everything).rows
    assert rows == dropit_fx.report(dropit_fx.transform(net, example_args=(x,))).rows
    with pytest.raises(ConfigError, match="modules= and filter_fn= both say what is rewritten"):
        dropit_fx.transform(net, example_args=(x,), modules="0", filter_fn=kept)


def test_a_rule_that_an_earlier_one_overshadows_still_matches() -> None:
    x = torch.randn(64, 64)
    config = {"rules": [{"codec": "keep"}, {"module": "2", "codec": "mink"}]}
    packed = dropit_fx.transform(model(), config, example_args=(x,))
    reasons = {r.reason for r in dropit_fx.report(packed).rows}
    assert reasons == {"the config says so: {codec: keep}"}


def test_a_glob_of_submodules_that_matches_nothing_is_refused() -> None:
    text = "modules='blocks.*' matches no submodule. Direct children: 0, 1, 2, 3, 4."
    with pytest.raises(ConfigError, match=re.escape(text)):
        dropit_fx.transform(model(), modules="blocks.*", example_args=(torch.randn(2, 64),))


def test_a_config_object_can_be_written_by_hand() -> None:
    x = torch.randn(64, 64)
    config = Config(rules=(Rule(codec="mink", op=("linear",)), Rule(codec="bitmask")), preset=None)
    packed = dropit_fx.transform(model(), config, example_args=(x,))
    assert not any(r.reason for r in dropit_fx.report(packed).rows)


def test_drop_logits_is_the_configs_unless_it_is_given() -> None:
    for own in (True, False):
        assert make_config({"drop_logits": own}).drop_logits is own
        for given in (True, False):
            assert make_config({"drop_logits": own}, drop_logits=given).drop_logits is given
    with pytest.raises(ConfigError, match="drop_logits is true or false, not 1"):
        make_config(drop_logits=1)  # type: ignore[arg-type]


# --- what is trained


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"train": "biases"}, "train = 'biases'. Choose one of: true, false, bias."),
        ({"train": "false"}, "train = 'false'. Choose one of: true, false, bias."),
        ({"train": 0}, "train = 0. Choose one of: true, false, bias."),
        ({"train": None}, "train = None. Choose one of: true, false, bias."),
        ({"train": [False]}, "train = [False]. Choose one of: true, false, bias."),
        ({"train": False, "op": "linaer"}, "no op 'linaer' in the op table. Did you mean 'linear'"),
        ({"train": False, "module": []}, "'module' is a glob or a list of globs"),
        ({"train": False, "gamma": 0.5}, "no key 'gamma' for a rule without 'codec'"),
        ({"train": False, "codec": "minkk"}, "no codec 'minkk'"),
        ({"module": "x"}, "no 'codec'. Choose one of: "),
    ],
)
def test_a_rule_that_trains_what_cannot_be_says_what_is_legal(
    keys: dict[str, Any], told: str
) -> None:
    assert told in refusal(rule(**keys)), refusal(rule(**keys))
    assert "rule 1" in refusal(rule(**keys))


def test_what_is_trained_is_told_beside_the_codec_or_alone(tmp_path: Path) -> None:
    path = tmp_path / "far.yaml"
    path.write_text(
        "preset: null\nrules:\n  - {op: linear, codec: quant, bits: 4, train: bias}\n"
        "  - {module: head, train: no}\n  - {module: '*', codec: keep}\n"
    )
    config = load_config(path)
    assert [str(r) for r in config.rules] == [
        "{op: linear, codec: quant, bits: 4}",
        "{codec: keep}",
    ]
    told = ["{op: linear, train: bias}", "{module: head, train: false}"]
    assert [str(r) for r in config.training] == told
    assert [r.number for r in config.training] == [1, 2]
    assert make_config(config, preset="max", bits=5).training == config.training
    assert load_config(config) is config


def test_a_preset_is_read_as_a_config_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key stands once, and is known."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "twice.yaml").write_text("derive: true\nrules: []\nderive: false\n")
    (folder / "unknown.yaml").write_text("rules: []\nderived: true\n")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="'derive' stands twice, in lines 1 and 3"):
        load_config({"preset": "twice"})
    with pytest.raises(ConfigError, match=r"preset unknown: no key 'derived'\. Did you mean"):
        load_config({"preset": "unknown"})


def test_words_of_reports_are_words_of_a_config() -> None:
    said = {"rules": [{"op": "gelu+linear", "codec": "quant(bits=6, block=128)"}]}
    meant = {"rules": [{"op": ["gelu", "linear"], "codec": "quant", "bits": 6, "block": 128}]}
    assert load_config(said) == load_config(meant)
    layers = nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.LayerNorm(256)
    model, x = nn.Sequential(*layers), torch.randn(64, 64)
    packed = dropit_fx.transform(model, preset="mesa", example_args=(x,))
    rows = [r for r in dropit_fx.report(packed).rows if r.codec.startswith("quant(")]
    assert rows
    copied = [{"module": r.module, "op": r.op, "codec": r.codec} for r in rows]  # as printed
    assert dropit_fx.transform(model, {"rules": copied}, example_args=(x,))
