"""Random small models, as the source text of a program that runs by itself.

A :class:`Program` is drawn statement by statement. Each statement is run as it is drawn, on the
values that the statements before it made, so that shapes and dtypes fit; what PyTorch refuses is
left out. All choices are drawn through Hypothesis, which can therefore shrink a program: the first
entry of each list of choices is the simplest, and operands are counted back from the newest value,
so that statements can be deleted without changing what the others read.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropit_fx.ops.table import OP_RULES

LEAST, MOST = 3, 12  # statements
LARGEST = 1024  # elements of a value
HEADER = """\
import operator
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
"""


@dataclass(frozen=True)
class Program:
    """The source of one model and of its inputs.

    ``source`` defines the class ``Program``, and ``inputs()``, which makes the positional
    arguments of its forward; each seeds nothing by itself.
    """

    source: str
    training: bool
    features: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.source}\n# in {mode} mode"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """As Hypothesis prints it: with its line breaks."""
        printer.text(repr(self))


class Rejected(Exception):
    """This statement cannot be made from the values that are there."""


@dataclass
class Draft:
    """A program while it is drawn: its text, and the values that it has made so far."""

    draw: Callable[[Any], Any]
    model: nn.Module = field(default_factory=nn.Module)
    init: list[str] = field(default_factory=list)
    inputs: list[tuple[str, str]] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)
    indent: int = 2
    count: int = 0
    in_region: bool = False

    def __post_init__(self) -> None:
        self.env |= {
            "torch": torch,
            "nn": nn,
            "F": F,
            "operator": operator,
            "checkpoint": checkpoint,
            "self": self.model,
        }

    # Choices

    def choose(self, choices: Sequence[Any]) -> Any:
        """One of them; the first is the simplest."""
        return choices[self.draw(st.integers(0, len(choices) - 1))]

    def coin(self, out_of: int = 2) -> bool:
        """True once in so many times."""
        return bool(self.draw(st.integers(0, out_of - 1)) == out_of - 1)

    def value(self, fits: Callable[[Tensor], bool] = lambda t: t.is_floating_point()) -> str:
        """The name of a live value, mostly one of the newest."""
        found = [n for n in reversed(self.live) if fits(self.env[n])]
        if not found:
            raise Rejected
        at = self.choose((0, 0, 0, 1, 0, 1, 2, 3, 5, 8))
        return found[min(at, len(found) - 1)]

    def like(self, name: str) -> str:
        """Another value that broadcasts with ``name`` without enlarging it, or a parameter."""
        shape = self.env[name].shape
        if self.coin(3):
            return self.parameter(shape[-1:] if self.coin() and shape else shape)
        return self.value(lambda t: t.is_floating_point() and _broadcasts(t.shape, shape))

    # Parts of the model

    def new(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def parameter(self, shape: Sequence[int], scale: str = "") -> str:
        """A new parameter; now and then a frozen one."""
        name = self.new("p")
        frozen = ", requires_grad=False" if self.coin(8) else ""
        self.make(f"self.{name} = nn.Parameter(torch.randn({_shape(shape)}){scale}{frozen})")
        return f"self.{name}"

    def buffer(self, made: str) -> str:
        name = self.new("b")
        self.make(f'self.register_buffer("{name}", {made})')
        self.features.add("buffer")
        return f"self.{name}"

    def module(self, made: str) -> str:
        """A new module, or one that is there already under a second name."""
        name = self.new("m")
        same = [line for line in self.init if line.endswith(f" = {made}")]
        if same and self.coin():
            made = same[0].partition(" = ")[0]
        self.make(f"self.{name} = {made}")
        return f"self.{name}"

    def make(self, line: str) -> None:
        """Adds a line to ``__init__``."""
        exec(line, self.env)
        self.init.append(line)

    def get(self, expression: str) -> Any:
        """The value of an expression of names."""
        return eval(expression, self.env)

    # Statements

    def say(self, line: str) -> None:
        """Adds a statement, and runs it."""
        exec(line, self.env)
        self.body.append("    " * self.indent + line)

    def let(self, expression: str) -> str:
        """``v = expression``."""
        name = self.new()
        self.say(f"{name} = {expression}")
        self.keep(name)
        return name

    def keep(self, name: str) -> None:
        """Makes a value one that later statements may read."""
        value = self.env[name]
        if not isinstance(value, Tensor):
            raise Rejected
        if not 0 < value.numel() <= LARGEST:
            raise Rejected
        self.live.append(name)

    def index(self, bound: int, shape: Sequence[int]) -> str:
        """Integers below ``bound``: an input, a buffer, or computed."""
        made = f"torch.randint({bound}, {_shape(shape)})"
        how = self.choose(("input", "buffer", "sorted"))
        if how == "buffer":
            return self.buffer(made)
        if how == "sorted":
            fitting = [
                n
                for n in self.live
                if self.env[n].is_floating_point()
                and self.env[n].shape == tuple(shape)
                and shape
                and shape[-1] <= bound
            ]
            if fitting:
                return f"{fitting[-1]}.argsort(-1)"
        name = self.new("i")
        value = self.get(made)
        self.inputs.append((name, made))
        self.env[name] = value
        self.features.add("integer input")
        return name


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    if len(small) > len(large):
        return False
    pairs = zip(reversed(small), reversed(large), strict=False)
    return all(a in (1, b) for a, b in pairs)


def _floats(dims: int) -> Callable[[Tensor], bool]:
    return lambda t: t.is_floating_point() and t.dim() == dims


def _at_least(dims: int) -> Callable[[Tensor], bool]:
    return lambda t: t.is_floating_point() and t.dim() >= dims


def _single(t: Tensor) -> bool:
    """Parameters are float32, and so must be what meets them in a matmul."""
    return t.dtype == torch.float32


Template = Callable[[Draft], None]
ROWS: dict[str, Template] = {}  # by name of the op table's row
OTHERS: dict[str, Template] = {}


def row(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Statements of rows; the function may ask for the row's name."""

    def note(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            takes = len(inspect.signature(function).parameters)
            ROWS[name] = function if takes == 1 else (lambda d, f=function, n=name: f(d, n))
        return function

    return note


def other(function: Template) -> Template:
    OTHERS[function.__name__] = function
    return function


# How a call is written: every spelling of the row that a user's forward can hold -----------------

_MODULES = ((F, "F"), (torch, "torch"))
_OPERATORS = {
    operator.mul: "{} * {}",
    operator.add: "{} + {}",
    operator.sub: "{} - {}",
    operator.truediv: "{} / {}",
    operator.matmul: "{} @ {}",
    operator.pow: "{} ** {}",
}


def spellings(name: str) -> tuple[str, ...]:
    """Calls with two gaps: the first operand, and everything behind it with its comma."""
    found: dict[str, None] = {}
    rule = next(r for r in OP_RULES if r.name == name)
    for target in rule.targets:
        if isinstance(target, str):
            found[f"{{}}.{target}({{}})"] = None
        elif target in _OPERATORS:
            found[_OPERATORS[target]] = None
        else:
            for home, prefix in _MODULES:
                word = getattr(target, "__name__", "")
                if getattr(home, word, None) is target:
                    found[f"{prefix}.{word}({{}}, {{}})"] = None
                    break
    return tuple(found)


_SPELLINGS = {rule.name: spellings(rule.name) for rule in OP_RULES}


def spell(d: Draft, name: str, first: str, rest: str = "") -> str:
    """A call of the row in one of its spellings; ``rest`` are its other arguments."""
    how: str = d.choose(_SPELLINGS[name])
    if how.split(".")[-1].partition("(")[0].endswith("_"):
        d.features.add("in place")
    text = how.format(first, rest)
    return text.replace(", )", ")")


# Rows ---------------------------------------------------------------------------------------------

_UNARY: dict[str, tuple[str, ...]] = {
    "relu": ("",),
    "gelu": ("", "approximate='tanh'"),
    "tanh": ("",),
    "sigmoid": ("",),
    "exp": ("",),
    "silu": ("",),
    "relu6": ("",),
    "hardtanh": ("", "-0.5, 0.75"),
    "leaky_relu": ("", "0.2"),
    "mish": ("",),
    "elu": ("", "0.7"),
    "selu": ("",),
    "celu": ("", "0.7"),
    "softplus": ("", "2.0, 1.0"),
    "hardswish": ("",),
    "hardsigmoid": ("",),
    "logsigmoid": ("",),
    "softsign": ("",),
    "sin": ("",),
    "erf": ("",),
    "cos": ("",),
    "clamp": ("-0.5, 0.5", "-0.25", "max=0.5", "-1, 1"),
    "pow": ("2", "3", "1", "0"),
    "square": ("",),
    "abs": ("",),
    "vector_norm": ("2, -1", "2, -1, True", "3, 0", "dim=-1"),
    "normalize": ("dim=-1", "dim=0", "p=3.0, dim=-1"),
    "softmax": ("-1", "0", "dim=-1"),
    "log_softmax": ("-1", "0"),
    "logsumexp": ("-1", "0, True", "dim=-1"),
}
_INPLACE_OPTION = (
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "silu", "mish"),
    *("hardswish", "hardsigmoid"),
)
_MODULE_OF = {
    "relu": "nn.ReLU",
    "gelu": "nn.GELU",
    "tanh": "nn.Tanh",
    "sigmoid": "nn.Sigmoid",
    "silu": "nn.SiLU",
    "relu6": "nn.ReLU6",
    "hardtanh": "nn.Hardtanh",
    "leaky_relu": "nn.LeakyReLU",
    "mish": "nn.Mish",
    "elu": "nn.ELU",
    "selu": "nn.SELU",
    "celu": "nn.CELU",
    "softplus": "nn.Softplus",
    "hardswish": "nn.Hardswish",
    "hardsigmoid": "nn.Hardsigmoid",
    "logsigmoid": "nn.LogSigmoid",
    "softsign": "nn.Softsign",
}


@row(*_UNARY)
def unary(d: Draft, name: str) -> None:
    x = d.value()
    how = d.choose(("function", "function", "function", "inplace", "module"))
    if how == "inplace" and name in _INPLACE_OPTION:
        d.features.add("in place")
        d.let(f"F.{name}({x}, inplace=True)")
    elif how == "module" and name in _MODULE_OF:
        inplace = "inplace=True" if name in _INPLACE_OPTION and d.coin(3) else ""
        d.features |= {"in place"} if inplace else set()
        d.let(f"{d.module(f'{_MODULE_OF[name]}({inplace})')}({x})")
    else:
        d.let(spell(d, name, x, d.choose(_UNARY[name])))


@row("linear")
def linear(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() >= 1)
    n = d.env[x].shape[-1]
    out = d.choose((8, 4, n))
    if d.coin():
        bias = d.choose(("", ", bias=False"))
        d.let(f"{d.module(f'nn.Linear({n}, {out}{bias})')}({x})")
    else:
        w = d.parameter((out, n), " * 0.5")
        b = d.parameter((out,)) if d.coin() else None
        d.let(f"F.linear({x}, {w}, {b})")


_IMAGES = {
    1: ("(2, 4, -1)", "(4, -1)"),
    2: ("(2, 4, 2, -1)", "(4, 2, -1)"),
    3: ("(1, 4, 2, 2, -1)", "(2, 2, 2, 2, -1)"),
}


def image(d: Draft, dims: int, fits: Callable[[Tensor], bool] = _single) -> str:
    """A value of shape (batch, channels, *space): a live one, or a view of one."""
    if not d.coin(3):
        with contextlib.suppress(Rejected):
            return d.value(lambda t: fits(t) and t.dim() == dims + 2)
    x = d.value(lambda t: fits(t) and t.numel() % 16 == 0)
    return d.let(f"{x}.reshape{d.choose(_IMAGES[dims][:1])}")


@row("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(d: Draft, name: str) -> None:
    dims, transposed = int(name[-2]), "transpose" in name
    x = image(d, dims)
    channels = d.env[x].shape[1]
    options = d.choose(
        ("", ", padding=1", ", stride=2", ", padding=1, bias=False", ", groups=2")
        + (() if transposed else (', padding="same"',))
    )
    kernel = d.choose((1, 3, 2))
    word = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    if d.coin():
        module = d.module(f"nn.{word}({channels}, 4, {kernel}{options})")
        d.let(f"{module}({x})")
        return
    shape = (channels, 4) if transposed else (4, channels)
    w = d.parameter((*shape, *[kernel] * dims), " * 0.3")
    options = d.choose(("", ", padding=1"))
    home = d.choose(("F", "torch"))
    d.let(f"{home}.{name}({x}, {w}{options})")


@row("matmul", "mm", "bmm")
def product(d: Draft, name: str) -> None:
    dims = {"mm": 2, "bmm": 3}.get(name)
    fits = (lambda t: _single(t) and t.dim() == dims) if dims else _single
    a = d.value(fits)
    shape = d.env[a].shape
    if not shape:
        raise Rejected
    how = d.choose(("parameter", "transposed", "value", "vector"))
    if how == "parameter" or (how == "vector" and dims):
        b = d.parameter((*shape[:-2], shape[-1], 4) if name == "bmm" else (shape[-1], 4), " * 0.5")
    elif how == "vector":
        b = d.parameter((shape[-1],))
    elif how == "transposed":
        other = d.value(lambda t: fits(t) and t.dim() >= 2 and t.shape[-1] == shape[-1])
        b = f"{other}.{d.choose(('transpose(-1, -2)', 'mT'))}"
    else:
        b = d.value(lambda t: fits(t) and t.dim() >= 2 and t.shape[-2] == shape[-1])
    d.let(spell(d, name, a, b))


@row("addmm", "baddbmm")
def add_product(d: Draft, name: str) -> None:
    dims = 2 if name == "addmm" else 3
    a = d.value(lambda t: _single(t) and t.dim() == dims)
    shape = d.env[a].shape
    b = d.parameter((*shape[:-2], shape[-1], 4), " * 0.5")
    c = d.parameter((4,)) if d.coin() else d.parameter((*shape[:-1], 4))
    options = d.choose(("", ", beta=0.5, alpha=2.0", ", beta=0", ", alpha=3"))
    d.let(spell(d, name, c, f"{a}, {b}{options}"))


@row("grouped_mm")
def grouped_product(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() == 2 and t.shape[1] % 8 == 0)
    rows, columns = d.env[x].shape
    w = d.parameter((2, columns, 8), " * 0.5")
    ends = f"torch.tensor([{rows // 2}, {rows}], dtype=torch.int32)"
    d.let(f"torch._grouped_mm({x}.bfloat16(), {w}.bfloat16(), {ends}).float()")


@row("dropout")
def dropout(d: Draft) -> None:
    x = d.value()
    how = d.choose(
        (
            "F.dropout({x}, 0.3, self.training)",
            "{m}({x})",
            "F.dropout({x}, 0.5)",
            "torch.dropout({x}, 0.3, self.training)",
            "F.dropout({x}, 0.3, self.training, inplace=True)",
            "torch.dropout_({x}, 0.3, True)",
            "F.dropout({x}, 0.0, True)",
            "F.alpha_dropout({x}, 0.3, self.training)",
        )
    )
    d.features |= {"random"} | ({"in place"} if "inplace" in how or "dropout_" in how else set())
    m = d.module(f"nn.Dropout({d.choose((0.3, 0.5))})") if "{m}" in how else ""
    d.let(how.format(x=x, m=m))


@row("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def pool(d: Draft, name: str) -> None:
    dims = int(name[-2])
    x = image(d, dims, lambda t: t.is_floating_point())
    options = d.choose(("2", "2, 1", "1, 2", "3, 2, 1", "2, ceil_mode=True"))
    d.let(spell(d, name, x, options))


@row("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_pool(d: Draft, name: str) -> None:
    x = image(d, int(name[-2]), lambda t: t.is_floating_point())
    d.let(f"F.{name}({x}, {d.choose((1, 2, 3))})")


@row("where")
def where(d: Draft) -> None:
    x = d.value()
    y = d.like(x) if d.coin() else d.choose(("0.5", "0.0"))
    mask = condition(d, x)
    d.let(d.choose((f"torch.where({mask}, {x}, {y})", f"{x}.where({mask}, {y})")))


def condition(d: Draft, x: str) -> str:
    """A mask that broadcasts with ``x``."""
    shape = d.env[x].shape
    made = d.choose(("value", "self", "buffer", "row"))
    if made == "value":
        z = d.value(lambda t: t.is_floating_point() and _broadcasts(t.shape, shape))
        return f"({z} {d.choose(('>', '<=', '!='))} {d.choose((0, 0.3))})"
    if made == "self":
        return f"({x} > {x}.mean())"
    return d.buffer(f"torch.rand({_shape(shape if made == 'buffer' else shape[-1:])}) < 0.6")


@row("masked_fill")
def masked_fill(d: Draft) -> None:
    x = d.value()
    mask = condition(d, x)
    d.let(spell(d, "masked_fill", x, f"{mask}, {d.choose((0.0, -1.0, 2))}"))


@row("maximum", "minimum")
def larger(d: Draft, name: str) -> None:
    x = d.value(lambda t: t.is_floating_point())
    d.let(spell(d, name, x, d.like(x)))


@row("amax", "amin")
def largest(d: Draft, name: str) -> None:
    x = d.value(_at_least(1))
    d.let(spell(d, name, x, d.choose(("-1", "0, True", "-1, keepdim=True"))))


@row("mul", "div")
def arithmetic(d: Draft, name: str) -> None:
    x = d.value()
    y = d.like(x) if d.coin(3) is False else d.choose(("2.0", "0.5", "3"))
    if name == "div" and not y[0].isdigit():
        y = f"({y}.abs() + 1)"
    elif y[0].isdigit() and d.coin(4):
        if name == "div":
            x = f"({x}.abs() + 1)"
        d.let(f"{y} {'/' if name == 'div' else '*'} {x}")
        return
    if d.coin(6):
        d.features.add("in place")
        d.say(f"{x} {'/' if name == 'div' else '*'}= {y}")
        d.env[d.live[-1]]
        return
    d.let(spell(d, name, x, y))


@row("layer_norm", "rms_norm")
def layer_norm(d: Draft, name: str) -> None:
    x = d.value(lambda t: _single(t) and t.dim() >= 1 and t.shape[-1] > 1)
    shape = d.env[x].shape
    over = _shape(shape[-d.choose((1, 1, min(2, len(shape)))) :])
    word = "nn.LayerNorm" if name == "layer_norm" else "nn.RMSNorm"
    if d.coin():
        options = d.choose(("", ", elementwise_affine=False", ", eps=0.1"))
        d.let(f"{d.module(f'{word}({over}{options})')}({x})")
    else:
        weight = d.parameter(d.get(over)) if d.coin() else None
        home = d.choose(("F", "torch"))
        d.let(f"{home}.{name}({x}, {over}, {weight})")


@row("group_norm")
def group_norm(d: Draft) -> None:
    x = image(d, d.choose((2, 1)))
    channels = d.env[x].shape[1]
    if channels % 2:
        raise Rejected
    affine = d.choose(("", ", affine=False"))
    d.let(f"{d.module(f'nn.GroupNorm(2, {channels}{affine})')}({x})")


@row("prelu")
def prelu(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() >= 2)
    channels = d.env[x].shape[1]
    if d.coin():
        d.let(f"{d.module(f'nn.PReLU({d.choose((1, channels))})')}({x})")
    else:
        d.let(spell(d, "prelu", x, d.parameter((d.choose((1, channels)),))))


@row("instance_norm")
def instance_norm(d: Draft) -> None:
    dims = d.choose((2, 1))
    x = image(d, dims)
    channels = d.env[x].shape[1]
    if d.env[x].shape[2:].numel() < 2:
        raise Rejected
    options = d.choose(("", ", affine=True", ", eps=0.1"))
    d.let(f"{d.module(f'nn.InstanceNorm{dims}d({channels}{options})')}({x})")


@row("grid_sample")
def grid_sample(d: Draft) -> None:
    x = image(d, 2)
    places = d.parameter((d.env[x].shape[0], 2, 3, 2), " * 0.7")
    options = d.choose(("", ", padding_mode='border'", ", mode='nearest'"))
    d.let(f"F.grid_sample({x}, {places}{options}, align_corners=False)")


@row("batch_norm")
def batch_norm(d: Draft) -> None:
    if d.in_region:  # recomputed, dense runs update the statistics twice
        raise Rejected
    dims = d.choose((2, 1, 0))
    x = image(d, dims) if dims else d.value(lambda t: _single(t) and t.dim() == 2)
    if d.env[x].numel() // d.env[x].shape[1] < 2:
        raise Rejected
    options = d.choose(
        ("", ", affine=False", ", track_running_stats=False", ", momentum=0.3", ", momentum=None")
    )
    d.features.add("buffer")
    channels = d.env[x].shape[1]
    if d.coin(4):
        mean, var = d.buffer(f"torch.zeros({channels})"), d.buffer(f"torch.ones({channels})")
        d.let(f"F.batch_norm({x}, {mean}, {var}, training={d.choose(('self.training', 'True'))})")
    else:
        d.let(f"{d.module(f'nn.BatchNorm{max(dims, 1)}d({channels}{options})')}({x})")


@row("scaled_dot_product_attention")
def attention(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() in (2, 3, 4))
    shape = d.env[x].shape
    k = d.value(lambda t: _single(t) and t.shape == shape)
    v = d.value(lambda t: _single(t) and t.shape == shape)
    options = ["", ", is_causal=True", ", scale=0.5"]
    choice = d.choose((*options, "mask"))
    if choice == "mask":
        rows = shape[-2]
        mask = d.choose(("torch.rand({0}, {0}) < 2", "torch.randn({0}, {0})")).format(rows)
        choice = f", attn_mask={d.buffer(mask)}"
    d.let(f"F.scaled_dot_product_attention({x}, {k}, {v}{choice})")


@row("cross_entropy", "nll_loss")
def class_loss(d: Draft, name: str) -> None:
    x = d.value(lambda t: t.is_floating_point() and t.dim() == 2)
    shape = d.env[x].shape
    y = d.index(shape[1], shape[:1])
    options = d.choose(("", ", reduction='sum'", ", reduction='none'", ", ignore_index=1"))
    logs = f"F.log_softmax({x}, -1)" if name == "nll_loss" and d.coin() else x
    d.let(f"F.{name}({logs}, {y}{options})")


_TWO_LOSSES: dict[str, tuple[str, str]] = {  # what it compares, and with what
    "mse_loss": ("{}", "{}"),
    "l1_loss": ("{}", "{}"),
    "smooth_l1_loss": ("{}", "{}"),
    "huber_loss": ("{}", "{}"),
    "binary_cross_entropy_with_logits": ("{}", "{}.sigmoid()"),
    "binary_cross_entropy": ("{}.sigmoid()", "{}.sigmoid()"),
    "kl_div": ("F.log_softmax({}, -1)", "{}.detach().softmax(-1)"),
}


@row(*_TWO_LOSSES)
def loss_of_two(d: Draft, name: str) -> None:
    x = d.value()
    first, second = _TWO_LOSSES[name]
    options = d.choose(("", ", reduction='sum'", ", reduction='none'"))
    d.let(f"F.{name}({first.format(x)}, {second.format(beside(d, x))}{options})")


def beside(d: Draft, x: str) -> str:
    """Another value in the shape of ``x``: a parameter, or what the program has made."""
    shape = d.env[x].shape
    if d.coin(4):
        return d.parameter(shape)
    return d.value(lambda t: t.is_floating_point() and t.shape == shape)


@row("embedding")
def embedding(d: Draft) -> None:
    index = d.index(4, d.choose(((4,), (2, 4))))
    if d.coin():
        padding = d.choose(("", ", padding_idx=1", ", scale_grad_by_freq=True"))
        d.let(f"{d.module(f'nn.Embedding(4, 8{padding})')}({index})")
    else:
        table = d.parameter((4, 8)) if d.coin() else d.value(lambda t: _single(t) and t.dim() == 2)
        bound = d.get(table).shape[0]
        d.let(f"F.embedding({index} % {bound}, {table})")


@row("index_select")
def index_select(d: Draft) -> None:
    x = d.value(_at_least(1))
    dim = d.choose((0, -1))
    index = d.index(d.env[x].shape[dim], d.choose(((4,), (3,))))
    d.let(spell(d, "index_select", x, f"{dim}, {index}"))


@row("fft_rfft", "fft_fft", "fft_rfft2", "fft_rfftn")
def fourier(d: Draft, name: str) -> None:
    x = d.value(lambda t: t.is_floating_point() and t.dim() >= 2)
    d.let(f"torch.fft.{name[4:]}({x}).{d.choose(('real', 'abs()', 'imag'))}")


@row("index_add")
def index_add(d: Draft) -> None:
    x = d.value(_at_least(1))
    index = d.index(4, (d.env[x].shape[0],))
    d.let(f"torch.zeros(4, *{x}.shape[1:], dtype={x}.dtype).index_add(0, {index}, {x})")


@row("gather")
def gather(d: Draft) -> None:
    x = d.value(_at_least(1))
    shape = d.env[x].shape
    if d.coin():
        d.let(f"{x}.gather(-1, {x}.{d.choose(('argsort(-1)', 'topk(1, -1)[1]', 'sort(-1)[1]'))})")
        return
    index = d.index(shape[-1], (*shape[:-1], d.choose((1, 2))))
    d.let(spell(d, "gather", x, f"-1, {index}"))


@row("pad")
def pad(d: Draft) -> None:
    x = d.value(_at_least(2))
    d.let(f"F.pad({x}, {d.choose(('(1, 1)', '(0, 1, 1, 0)', '(1, -1)'))})")


@row("add", "sub")
def sum_of_two(d: Draft, name: str) -> None:
    sign = {"add": "+", "sub": "-"}[name]
    x = d.value()
    y = d.like(x) if not d.coin(4) else d.choose(("1.0", "2"))
    how = d.choose(
        (
            "{x} {sign} {y}",
            "torch.{name}({x}, {y})",
            "{x}.{name}({y})",
            "{x}.{name}({y}, alpha=2)",
            "torch.{name}({x}, {y}, alpha=0.5)",
            "{x}.{name}_({y})",
        )
    )
    d.features |= {"in place"} if "_(" in how else set()
    d.let(how.format(x=x, y=y, sign=sign, name=name))


@row("to")
def cast(d: Draft) -> None:
    x = d.value()
    y = d.value()
    d.let(
        d.choose(
            (
                f"{x}.double()",
                f"{x}.float()",
                f"{x}.to(torch.bfloat16)",
                f"{x}.type_as({y})",
                f"{x}.to({y}.dtype)",
                f"{x}.half()",
                f"{x}.to({y})",
            )
        )
    )


# Everything else ----------------------------------------------------------------------------------


@other
def view(d: Draft) -> None:
    x = d.value(lambda t: t.dim() >= 1)
    shape = d.env[x].shape
    last, first, dims = shape[-1], shape[0], len(shape)
    how = [f"{x}.view(-1)", f"{x}.reshape(-1)", f"{x}.flatten()", f"{x}.unsqueeze(0)", f"{x}[0]"]
    how += [f"{x}[..., ::2]", f"{x}.unsqueeze(-1)", f"{x}[:, None]", f"{x}.view_as({x})"]
    how += [f"{x}.expand(2, {'-1, ' * dims})", f"{x}.narrow(0, 0, {max(first // 2, 1)})"]
    how += [f"{x}[: {max(first // 2, 1)}]", f"{x}[{first // 2} :]", f"{x}.select(-1, 0)"]
    how += [f"{x}.squeeze()", f"{x}.unfold(0, {min(2, first)}, 1)", f"{x}.flip(0)", f"{x}.roll(1)"]
    how += [f"{x}.as_strided(({max(first // 2, 1)},), (1,))", f"{x}.unflatten(0, (1, -1))"]
    how += [f"{x}.contiguous()", f"{x}.clone()", f"{x}.repeat(2{', 1' * (dims - 1)})"]
    if last % 2 == 0:
        how += [f"{x}.view(*{x}.shape[:-1], 2, -1)", f"{x}.reshape({x}.size(0), 2, -1)"]
        how += [f"{x}.view(-1, 2)", f"{x}.reshape(2, -1)", f"{x}[..., : {last // 2}]"]
    if dims >= 2:
        how += [f"{x}.transpose(0, 1)", f"{x}.mT", f"{x}.flatten(1)", f"{x}[:, 0]", f"{x}.T"]
        how += [f"{x}.flatten(0, 1)", f"{x}.swapaxes(-1, -2)", f"{x}.diagonal()"]
        how += [f"{x}.movedim(0, -1)", f"torch.transpose({x}, 0, -1)", f"{x}[:, 1:]"]
    if dims == 2:
        how += [f"{x}.t()", f"{x}.permute(1, 0)"]
    if dims == 3:
        how += [f"{x}.permute(2, 0, 1)", f"{x}.permute(0, 2, 1)"]
    if dims == 4:
        how += [f"{x}.permute(0, 2, 3, 1)", f"{x}.contiguous(memory_format=torch.channels_last)"]
    d.features.add("view")
    d.let(d.choose(how))


@other
def split(d: Draft) -> None:
    x = d.value(_at_least(1))
    size = d.env[x].shape[-1]
    if size % 2:
        raise Rejected
    how = d.choose(
        (
            f"{x}.chunk(2, -1)",
            f"{x}.split({size // 2}, -1)",
            f"torch.chunk({x}, 2, dim=-1)",
            f"{x}.split(({size // 2}, {size // 2}), dim=-1)",
            f"{x}.tensor_split(2, -1)",
            f"{x}.unbind(-1)[:2]",
        )
    )
    a, b = d.new(), d.new()
    d.say(f"{a}, {b} = {how}")
    d.keep(a)
    d.keep(b)
    d.features.add("view")


@other
def join(d: Draft) -> None:
    x = d.value(_at_least(1))
    shape, dtype = d.env[x].shape, d.env[x].dtype
    y = d.value(lambda t: t.shape == shape and t.dtype == dtype)
    how = ("torch.cat([{}, {}], -1)", "torch.stack([{}, {}])", "torch.cat(({}, {}))")
    d.let(d.choose((*how, "torch.stack(({}, {}), dim=-1)", "torch.hstack([{}, {}])")).format(x, y))


_IN_PLACE = (
    "{x}.mul_(2.0)",
    "{x}.add_(1.0)",
    "{x}.add_({y})",
    "{x}.mul_({y})",
    "{x} += {y}",
    "{x} *= 2.0",
    "{x} -= 0.5",
    "{x} /= 2.0",
    "{x}.sub_({y})",
    "{x}.div_(2)",
    "{x}.copy_({y})",
    "{x}.zero_()",
    "{x}.fill_(0.5)",
    "{x}.relu_()",
    "{x}.tanh_()",
    "{x}.sigmoid_()",
    "{x}.exp_()",
    "{x}.neg_()",
    "{x}.clamp_(-0.5, 0.5)",
    "{x}.masked_fill_({x} > 0.5, 0.0)",
    "{x}[0] = {z}",
    "{x}[..., 0] = 1.0",
    "{x}[{x} > 0.3] = 0.25",
    "{x}[..., ::2] *= 2",
    "{x}[0].mul_(3)",
    "{x}.view(-1).mul_(2)",
    "{x}.addcmul_({y}, {y})",
    "{x}.lerp_({y}, 0.3)",
    "{x}.pow_(2)",
    "{x}.sin_()",
    "F.relu({x}, inplace=True)",
    "torch.add({x}, {y}, out={x})",
)


@other
def write(d: Draft) -> None:
    """An in-place write into a live value, which others may share."""
    x = d.value()
    how: str = d.choose(_IN_PLACE)
    shape = d.env[x].shape
    y = d.like(x) if "{y}" in how else ""
    z = "0.5"
    if "{z}" in how:
        if not shape:
            raise Rejected
        z = d.value(lambda t: t.is_floating_point() and _broadcasts(t.shape, shape[1:]))
    d.features.add("in place")
    d.say(how.format(x=x, y=y, z=z))


@other
def write_alias(d: Draft) -> None:
    """A write through a view that has a name of its own."""
    x = d.value(_at_least(1))
    view = d.choose(
        ("{x}.view(-1)", "{x}[0]", "{x}.detach()", "{x}[..., ::2]", "{x}.transpose(0, -1)", "{x}.T")
    )
    how = d.choose(
        ("{v} *= 2.0", "{v}.add_(1.0)", "{v}.mul_(0.5)", "{v} += 1", "{v}.zero_()", "{v}.relu_()")
    )
    name = d.new()
    d.say(f"{name} = {view.format(x=x)}")
    if d.coin(3):  # a reader between the view and the write
        other = d.new()
        d.say(f"{other} = {d.choose(('torch.sigmoid', 'F.gelu', 'torch.tanh'))}({x})")
        d.keep(other)
    d.say(how.format(v=name))
    d.keep(name)
    d.features |= {"view", "in place"}


@other
def write_buffer(d: Draft) -> None:
    x = d.value()
    shape = d.env[x].shape
    held = d.buffer(f"torch.randn({_shape(shape)})" if d.coin() else "torch.zeros(())")
    if d.in_region:
        raise Rejected
    small = f"{x}.detach().mean()"
    how = d.choose(
        (
            "{b}.add_(1)",
            "{b} += 1",
            "{b}.mul_(0.9).add_({s})",
            "{b}.copy_({s})",
            "{b} = {b} * 0.9 + {s}",
            "{b}.lerp_({s}, 0.1)",
            "{b}.fill_(2)",
        )
    )
    d.features.add("buffer")
    if d.coin():
        d.let(f"{x} * {held}")
    d.say(how.format(b=held, s=small))
    d.env[held.removeprefix("self.")] = None
    if d.coin():
        d.let(f"{x} + {held}")


@other
def write_input(d: Draft) -> None:
    """Into an input, which is a leaf without a gradient."""
    x = d.value()
    shape = d.env[x].shape
    if d.in_region:
        raise Rejected
    name = d.new("w")
    made = f"torch.randn({_shape(shape)})"
    d.inputs.append((name, made))
    d.env[name] = d.get(made)
    d.features |= {"input written", "in place"}
    if d.coin():
        d.let(f"{x} * {name}")
    d.say(
        d.choose(("{n}.add_(1.0)", "{n} += 1", "{n}.copy_({x}.detach())", "{n}[0] = 2.0")).format(
            n=name, x=x
        )
    )
    d.let(f"{x} + {name}")


@other
def factory(d: Draft) -> None:
    """A tensor that the model makes itself, and may write into."""
    x = d.value(_at_least(1))
    shape = d.env[x].shape
    made = d.choose(
        (
            "torch.zeros({s})",
            "torch.ones({s})",
            "torch.zeros_like({x})",
            "{x}.new_zeros({x}.shape)",
            "torch.zeros({x}.shape)",
            "torch.full({s}, 0.5)",
            "torch.arange({n}.0)",
            "torch.arange({x}.shape[-1]).float()",
            "torch.randn({s})",
            "torch.rand({x}.shape)",
            "torch.randn_like({x})",
            "torch.eye({n})",
            "torch.empty({s}).fill_(1.5)",
            "torch.linspace(0, 1, {n})",
            "torch.tensor(0.5)",
        )
    ).format(x=x, s=_shape(shape), n=shape[-1])
    d.features |= {"random"} if "rand" in made else set()
    name = d.let(made)
    how = d.choose(
        (
            "",
            "{n} += {x}",
            "{n}.add_({x})",
            "{n}[0] = {x}[0]",
            "{n}.copy_({x})",
            "{n}.index_add_(0, torch.tensor([0]), {x}[:1])",
            "{n}[..., :1] = 1",
            "{n}.scatter_add_(-1, {x}.argsort(-1), {x})",
            "{n}.mul_({x})",
            "{n}[:] = {x} * 2",
        )
    )
    if how:
        d.features.add("in place")
        d.say(how.format(n=name, x=x))
    if d.coin():
        d.let(f"{x} * {name}")


_REDUCE = (
    "{x}.sum(-1)",
    "{x}.mean(-1, keepdim=True)",
    "{x}.mean(0)",
    "{x}.sum()",
    "{x}.amax(-1)",
    "{x}.max(-1)[0]",
    "{x}.max(-1).values",
    "{x}.min(0, keepdim=True)[0]",
    "{x}.var(-1)",
    "{x}.std(-1, keepdim=True)",
    "{x}.norm(dim=-1)",
    "{x}.cumsum(-1)",
    "{x}.cumsum(0)",
    "{x}.tanh().cumprod(-1)",
    "{x}.median(-1)[0]",
    "{x}.prod(-1)",
    "F.normalize({x}, dim=-1)",
    "torch.linalg.vector_norm({x})",
)


@other
def reduce(d: Draft) -> None:
    d.let(d.choose(_REDUCE).format(x=d.value(_at_least(1))))


@other
def order(d: Draft) -> None:
    x = d.value(_at_least(1))
    how = d.choose(
        (
            "{x}.sort(-1)[0]",
            "{x}.topk(2, -1)[0]",
            "{x}.sort(0, descending=True)[0]",
            "{x}.take_along_dim({x}.argsort(-1), -1)",
            "torch.sort({x}).values",
            "{x}.topk(1, dim=-1).values",
        )
    )
    d.let(how.format(x=x))


_NO_ROW = (
    "{x}.abs()",
    "{x}.neg()",
    "-{x}",
    "({x}.abs() + 0.5).log()",
    "({x}.abs() + 0.5).sqrt()",
    "({x}.abs() + 0.5).rsqrt()",
    "1 / ({x}.abs() + 1)",
    "({x}.abs() + 1).reciprocal()",
    "{x}.square()",
    "torch.atan({x})",
    "torch.erf({x})",
    "torch.log1p({x}.abs())",
    "torch.expm1({x}.clamp(max=2))",
    "F.tanhshrink({x})",
    "F.hardshrink({x})",
    "F.threshold({x}, 0.1, 0.0)",
    "{x}.tril()",
    "torch.triu({x}, 1)",
    "{x}.nan_to_num()",
    "{x}.sign() * {x}",
    "{x}.round()",
    "{x} - {x}.floor()",
    "1.0 - {x}",
    "{x} ** 2",
    "2 ** {x}.clamp(-2, 2)",
    "{x}.abs() ** 0.5",
    "{x}.sinh()",
    "{x}.cosh()",
    "F.glu({x}, -1)",
    "F.rrelu({x})",
    "{x}.index_fill(0, torch.tensor([0]), 0.5)",
    "{x}.relu()",
    "{x}.softmax(-1)",
    "{x} % 1.0",
)


@other
def no_row(d: Draft) -> None:
    d.let(d.choose(_NO_ROW).format(x=d.value()))


_BINARY = (
    "torch.maximum({x}, {y})",
    "torch.minimum({x}, {y})",
    "torch.lerp({x}, {y}, 0.3)",
    "torch.addcmul({x}, {y}, {y})",
    "torch.addcdiv({x}, {y}, {y}.abs() + 1)",
    "torch.atan2({x}, {y}.abs() + 1)",
    "torch.logaddexp({x}, {y})",
    "torch.hypot({x}, {y}.abs() + 1)",
    "F.smooth_l1_loss({x}, {y}, beta=0.0)",
    "F.kl_div(F.log_softmax({x}, -1), {y}.softmax(-1), reduction='sum')",
    "F.cosine_similarity({x}, {y}, dim=-1)",
    "F.prelu({x}, {y}.mean())",
    "torch.fmod({x}, {y}.abs() + 1)",
    "torch.dist({x}, {y})",
    "torch.clamp({x}, {y} - 1, {y} + 1)",
    "{x}.clamp(min={y})",
)


@other
def binary(d: Draft) -> None:
    x = d.value()
    d.let(d.choose(_BINARY).format(x=x, y=beside(d, x)))


@other
def gate(d: Draft) -> None:
    """A detached or a shared factor."""
    x = d.value()
    y = d.value(lambda t: t.is_floating_point() and _broadcasts(t.shape, d.env[x].shape))
    how = d.choose(
        (
            "{x}.detach() * torch.sigmoid({y})",
            "{x} * torch.sigmoid({y})",
            "{x} + {y}.detach()",
            "F.gelu({x}) * {y}",
            "{x} * {x}",
            "{x} - {x}.detach()",
            "({x} > 0) * {y}",
            "{x} * ({y} > 0).float()",
            "{x}.detach()",
            "F.silu({x}) * {y}.tanh()",
            "{x} * {y}.data",
        )
    )
    d.let(how.format(x=x, y=y))


@other
def stop(d: Draft) -> None:
    """A value that stops or begins to require a gradient, between two that read it."""
    x = d.value()
    made, change = d.choose(
        (
            ("{x} * 1.0", "{n}.detach_()"),
            ("F.gelu({x})", "{n}.detach_()"),
            ("{x}.detach() * 1.0", "{n}.requires_grad_()"),
            ("{x}.detach() * 1.0", "{n}.mul_({x})"),
            ("torch.zeros_like({x})", "{n}.add_({x})"),
        )
    )
    name = d.new()
    d.say(f"{name} = {made.format(x=x)}")
    if d.coin():
        d.let(f"torch.sigmoid({name}) * {x}")
    d.say(change.format(n=name, x=x))
    d.keep(name)
    d.features.add("in place")


@other
def side(d: Draft) -> None:
    """Integers and masks beside the main path, which end without a gradient."""
    x = d.value(_at_least(1))
    how = d.choose(
        (
            "{x}.argmax(-1)",
            "({x} > 0).sum(-1)",
            "{x}.long() + 1",
            "torch.arange({x}.shape[0])",
            "F.one_hot({x}.argmax(-1), {x}.shape[-1])",
            "({x} > 0) & ({x} < 1)",
            "{x}.argsort(-1)",
            "{x}.gt(0).cumsum(-1)",
        )
    )
    name = d.let(how.format(x=x))
    if d.coin():
        shape = d.env[name].shape
        y = d.value(lambda t: t.is_floating_point() and _broadcasts(shape, t.shape))
        d.let(f"{y} * {name}")


_EINSUM = {
    2: ("ij,kj->ik", "ij,kj->ijk", "ij,ij->i", "ij,kl->jl"),
    3: ("bij,bkj->bik", "bij,bkj->bikj", "bij,bij->b", "abc,abd->cd"),
    4: ("bhid,bhjd->bhij", "abcd,abcd->ad"),
}


@other
def einsum(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() in _EINSUM)
    shape = d.env[x].shape
    y = d.value(lambda t: _single(t) and t.shape == shape)
    d.let(f'torch.einsum("{d.choose(_EINSUM[len(shape)])}", {x}, {y})')


@other
def heads(d: Draft) -> None:
    """Attention as models write it."""
    x = d.value(lambda t: _single(t) and t.dim() == 3 and t.shape[-1] % 2 == 0)
    size = d.env[x].shape[-1]
    qkv = d.module(f"nn.Linear({size}, {3 * size})")
    q, k, v = d.new(), d.new(), d.new()
    heads = f"{qkv}({x}).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)"
    d.say(f"{q}, {k}, {v} = {heads}{d.choose(('', '.unbind(0)'))}")
    if d.coin():
        out = d.let(f"F.scaled_dot_product_attention({q}, {k}, {v})")
    else:
        a = d.let(f"({q} @ {k}.transpose(-2, -1) * 0.5).softmax(-1)")
        out = d.let(f"{a} @ {v}")
    d.let(f"{out}.transpose(1, 2).flatten(2)")


@other
def multihead(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() in (2, 3) and t.shape[-1] % 2 == 0)
    size = d.env[x].shape[-1]
    m = d.module(f"nn.MultiheadAttention({size}, 2{d.choose((', batch_first=True', ''))})")
    d.let(f"{m}({x}, {x}, {x}{d.choose(('', ', need_weights=False'))})[0]")


@other
def recurrent(d: Draft) -> None:
    x = d.value(lambda t: _single(t) and t.dim() in (2, 3))
    m = d.module(f"nn.{d.choose(('GRU', 'LSTM', 'RNN'))}({d.env[x].shape[-1]}, 4)")
    d.let(f"{m}({x})[0]")


@other
def other_modules(d: Draft) -> None:
    x = image(d, d.choose((2, 1)))
    how = (
        "F.interpolate({x}, scale_factor=2)",
        "nn.functional.instance_norm({x})",
        "F.unfold({x}, 2)",
        "F.pixel_shuffle({x}, 2)",
        "F.local_response_norm({x}, 2)",
        "F.max_pool2d({x}, 2, return_indices=True)[0]",
        "F.adaptive_max_pool2d({x}, 1)",
        "F.lp_pool2d({x}, 2, 2)",
        "F.pad({x}, (1, 1, 1, 1), mode='reflect')",
        "F.pad({x}, (1, 1), mode='replicate')",
    )
    d.let(d.choose(how).format(x=x))


@other
def complex_product(d: Draft) -> None:
    x = d.value(_single)
    p = d.new("p")
    shape = _shape(d.env[x].shape)
    d.make(f"self.{p} = nn.Parameter(torch.randn({shape}, dtype=torch.complex64))")
    d.let(f"torch.view_as_real({x} * {d.choose(('self.', '2 * self.'))}{p}).sum(-1)")


@other
def no_grad(d: Draft) -> None:
    with d.env["torch"].no_grad():
        block(d, "with torch.no_grad():")


@other
def autocast(d: Draft) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        block(d, 'with torch.autocast("cpu", torch.bfloat16):')


@other
def if_training(d: Draft) -> None:
    x = d.value()
    d.say(f"if self.training: {x} = {x} * {d.choose((2, 0.5))}")


def block(d: Draft, header: str) -> None:
    """A few statements under a header."""
    if d.indent > 3:
        raise Rejected
    d.body.append("    " * d.indent + header)
    d.indent += 1
    before = len(d.body)
    try:
        for _ in range(d.choose((1, 2, 3))):
            statement(d)
    finally:
        d.indent -= 1
    if len(d.body) == before:
        raise Rejected


@other
def region(d: Draft) -> None:
    """A checkpointed function of two values; sometimes it has another inside."""
    inside = d.in_region
    if d.indent > 3 or (d.indent > 2 and not (inside and d.coin(3))):
        raise Rejected
    first = d.value()
    second = d.value()
    names = list(dict.fromkeys((first, second)))
    function = d.new("f")
    outer, written = list(d.live), [d.env[n]._version for n in names]
    d.body.append("    " * d.indent + f"def {function}({', '.join(names)}):")
    d.live[:], d.in_region = names, True
    d.indent += 1
    try:
        for _ in range(d.choose((2, 1, 3))):
            statement(d)
        made = [n for n in d.live if n not in names]
        # recomputed, it would begin with other inputs
        if not made or written != [d.env[n]._version for n in names]:
            raise Rejected
        d.body.append("    " * d.indent + f"return {made[-1]}")
    finally:
        d.indent -= 1
        d.live[:], d.in_region = outer, inside
    result = d.new()
    call = f"{result} = checkpoint({function}, {', '.join(names)}, use_reentrant=False)"
    d.body.append("    " * d.indent + call)
    d.env[result] = d.env[made[-1]]
    d.keep(result)
    d.features.add("region")


# Drawing ------------------------------------------------------------------------------------------

_COMMON = (
    *("linear", "view", "mul", "sum_of_two", "write", "layer_norm", "gate", "split", "unary"),
    *("write_alias", "factory", "no_row", "reduce", "dropout", "matmul", "binary", "region"),
)


def _statements() -> tuple[Template, ...]:
    """Simple ones first; those that meet in real models twice."""
    every = ROWS | OTHERS
    often = [every[n] for n in _COMMON if n in every]
    return (*ROWS.values(), *often, *OTHERS.values())


@dataclass
class _Mark:
    """A place to which a draft can go back."""

    init: int
    inputs: int
    body: int
    live: list[str]
    features: set[str]

    @classmethod
    def of(cls, d: Draft) -> _Mark:
        sizes = len(d.init), len(d.inputs), len(d.body)
        return cls(*sizes, list(d.live), set(d.features))

    def back(self, d: Draft) -> None:
        del d.init[self.init :], d.inputs[self.inputs :], d.body[self.body :]
        d.live[:] = self.live
        d.features = self.features


def statement(d: Draft) -> None:
    """One statement more, or none where what was drawn does not fit."""
    mark = _Mark.of(d)
    template = d.choose(STATEMENTS)
    size = len(d.body)
    try:
        template(d)
        if d.indent == 2 and len(d.body) > size and d.body[-1].startswith(" " * 12):
            _replay(d)  # a statement of the block may have been taken back
        _check(d)
    except (Rejected, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        written = d.features & {"in place", "buffer", "input written"}
        mark.back(d)
        if d.indent == 2 and written:
            _replay(d)


def _check(d: Draft) -> None:
    """Values stay of ordinary size, and what was written into can still be differentiated."""
    for name in d.live:
        value = d.env[name]
        if not isinstance(value, Tensor):
            raise Rejected
        if value.is_floating_point():
            with torch.no_grad():
                if value.numel() and not float(value.abs().max()) < 1e3:
                    raise Rejected
    if "in place" in d.features and d.indent == 2:
        ends = [d.env[n] for n in d.live if d.env[n].requires_grad]
        if ends:
            total = sum(t.sum().float() for t in ends if t.is_floating_point())
            leaves = [p for p in d.model.parameters() if p.requires_grad]
            leaves += [d.env[n] for n, _ in d.inputs if d.env[n].requires_grad]
            leaves = [t for t in leaves if t.is_leaf]
            if leaves and isinstance(total, Tensor) and total.requires_grad:
                torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)


def _replay(d: Draft) -> None:
    """Runs the program up to here again: what was taken back may have written into values."""
    source = text(d, d.live)
    space: dict[str, Any] = {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        exec(source, space)
        model = space["Program"]()
        given = space["inputs"]()
        with torch.enable_grad():
            made = model(*given)
    d.model = model
    d.env["self"] = model
    d.env |= dict(zip((n for n, _ in d.inputs), given, strict=True))
    d.env |= dict(zip(d.live, made, strict=True))


def text(d: Draft, outputs: Sequence[str]) -> str:
    """The program as source text."""
    lines = [HEADER, "", "class Program(nn.Module):", "    def __init__(self):"]
    lines += ["        super().__init__()", *(f"        {line}" for line in d.init)]
    lines += ["", f"    def forward(self, {', '.join(n for n, _ in d.inputs)}):", *d.body]
    lines += [f"        return {', '.join(outputs)}{',' if len(outputs) == 1 else ''}"]
    lines += ["", "", "def inputs():"]
    lines += [f"    return ({' '.join(f'{made},' for _, made in d.inputs)})"]
    return "\n".join(lines) + "\n"


STATEMENTS = _statements()
SHAPES = ((4, 8), (2, 4, 8), (8, 8), (2, 4, 4, 4), (32,), (4, 16), (2, 2, 4, 8), (1, 8))


@st.composite
def programs(draw: Callable[[Any], Any]) -> Program:
    """Programs of some statements that run, and whose gradient exists."""
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(0)
        d = Draft(draw)
        for i in range(d.choose((1, 2, 1))):
            made = f"torch.randn({_shape(d.choose(SHAPES))})"
            made += d.choose((".requires_grad_()", "", ""))
            d.inputs.append((f"x{i}", made))
            d.env[f"x{i}"] = d.get(made)
            d.live.append(f"x{i}")
        for at in range(MOST):
            if at >= LEAST and d.coin(MOST):
                break
            statement(d)
        if not any(d.env[n].requires_grad for n in d.live):
            d.make("self.scale = nn.Parameter(torch.tensor(1.5))")
            d.let(f"{d.value()} * self.scale")
        outputs = _outputs(d)
        training = not d.coin(6)
        return Program(text(d, outputs), training, frozenset(d.features))


def _outputs(d: Draft) -> list[str]:
    """The newest value with a gradient, and sometimes others: without one, inputs, views."""
    last = [n for n in d.live if d.env[n].requires_grad][-1:] or d.live[-1:]
    for _ in range(d.choose((0, 1, 2))):
        last.append(d.live[-1 - d.choose(range(len(d.live)))])
    return list(dict.fromkeys(last))
