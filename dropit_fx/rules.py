"""What a config says: ordered rules, of which the first that matches decides, and some settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec, Options
from dropit_fx.ops.rule import INSIDE, Read, Use
from dropit_fx.words import matches

DEFAULT_PRESET = "balanced"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule: the first that matches a read decides its codec."""

    # globs on the qualified module name, `*` crosses dots; any of them may match
    module: tuple[str, ...] = ("*",)
    # globs on names of the op table; any of them may match
    op: tuple[str, ...] = ("*",)
    # name of a codec
    codec: str
    # the codec's options that differ from their defaults
    options: tuple[tuple[str, Any], ...] = ()
    # True for rules of a preset: these may match nothing
    preset: bool = False
    # whether what the rule speaks of may be made again in the place of a copy, as with a preset's
    derive: bool = False
    # whether the copy waits on the host for its backward; None: as the config says
    offload: bool | None = None

    def __str__(self) -> str:
        parts = _where(self.module, self.op)
        parts += [f"codec: {self.codec}", *(f"{k}: {v}" for k, v in self.options)]
        parts += ["derive: true"] if self.derive else []
        parts += [] if self.offload is None else [f"offload: {str(self.offload).lower()}"]
        return "{" + ", ".join(parts) + "}"

    def matches(self, module: str, op: str, read: Read) -> bool:
        """Whether the rule speaks of ``read`` of ``op`` in ``module``."""
        return (
            matches(module, self.module)
            and matches(op, self.op)
            and _speaks_of(CODEC[self.codec], read)
        )

    def full_options(self) -> Options:
        """Every option of the codec, defaults included."""
        return CODEC[self.codec].defaults() | dict(self.options)


def _where(module: tuple[str, ...], op: tuple[str, ...]) -> list[str]:
    """The globs of a rule as its file has them."""
    parts = [] if module == ("*",) else [f"module: {_joined(module)}"]
    return parts + ([] if op == ("*",) else [f"op: {_joined(op)}"])


def _joined(globs: tuple[str, ...]) -> str:
    return globs[0] if len(globs) == 1 else "[" + ", ".join(globs) + "]"


def _speaks_of(codec: Codec, read: Read) -> bool:
    """A tensor of which only the shape is read goes with the rest of its op, whatever the codec.

    Not with its codes: running an op again goes with packing its values.
    """
    if read.use is Use.SHAPE:
        return read.operand != INSIDE or not codec.codes
    return codec.can_keep(read)


@dataclass(frozen=True, kw_only=True)
class TrainRule:
    """What a rule says of parameters: the first that matches a read of one decides.

    Attributes:
        module: As in :class:`Rule`.
        op: As in :class:`Rule`.
        train: Whether they get a gradient: True, False, or ``"bias"``: biases alone.
        number: Of the rule in its config, from 1.
    """

    module: tuple[str, ...] = ("*",)
    op: tuple[str, ...] = ("*",)
    train: bool | str
    number: int

    def __str__(self) -> str:
        word = self.train if isinstance(self.train, str) else str(self.train).lower()
        return "{" + ", ".join([*_where(self.module, self.op), f"train: {word}"]) + "}"

    def matches(self, module: str, op: str) -> bool:
        """Whether the rule speaks of what ``op`` in ``module`` reads."""
        return matches(module, self.module) and matches(op, self.op)


@dataclass(frozen=True, kw_only=True)
class BackpropRule:
    """Of which rows of a block gradients flow: the first rule that names the block decides.

    Attributes:
        module: Globs on the qualified name of the block.
        share: Of its rows, in (0, 1).
        dim: Of the block's input and result, whose entries are rows.
        number: Of the rule in its config, from 1.
    """

    module: tuple[str, ...]
    share: float
    dim: int = 0
    number: int

    def __str__(self) -> str:
        return f"{{module: {_joined(self.module)}, backprop: {self.share}, dim: {self.dim}}}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """An ordered list of rules.

    Attributes:
        rules: The config's own rules, then the preset's; the first match wins.
        training: What the config's own rules say of parameters; the first match wins.
        backprop: What they say of the rows of a block that gradients flow through.
        preset: The preset that the last of them come from, or None.
        derive: Keep no copy of what is a cheap function of something packed: make it again in the
            backward.
        keep_small: Keep exactly what is small beside the rest: less than a tenth of the large
            tensors, and three in a hundred of all bytes together.
        norm_values: Keep exactly what a norm reads whose statistics come from fewer values each;
            0: pack it whatever their number.
        loss_classes: The logits of a linear layer with so many classes or more are never whole in
            memory where only losses read them; 0: they are as the model has them.
        drop_logits: That also where the model returns them: None is returned while gradients are
            on.
        offload: Packed bytes wait on the host between forward and backward, where no rule says
            otherwise; in eager mode, from a GPU.
        force: Pack also where that frees nothing or takes more room: for tests of the formulas.
    """

    rules: tuple[Rule, ...] = ()
    training: tuple[TrainRule, ...] = ()
    backprop: tuple[BackpropRule, ...] = ()
    preset: str | None = DEFAULT_PRESET
    force: bool = False
    derive: bool = False
    keep_small: bool = False
    norm_values: int = 0
    loss_classes: int = 0
    drop_logits: bool = False
    offload: bool = False

    def offloads(self, rule: Rule) -> bool:
        """Whether copies of a rule wait on the host."""
        return self.offload if rule.offload is None else rule.offload

    def rule_for(self, module: str, op: str, read: Read) -> Rule | None:
        """The first rule that speaks of ``read``."""
        return next((r for r in self.rules if r.matches(module, op, read)), None)
