"""Capture: which tracer takes a model, what the errors say, and the inputs that are guessed."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import differing, gpt2, liven, step
from torch import Tensor, fx, nn

from dropit_fx import CaptureError, ConfigError, report, transform
from dropit_fx.capture import example_inputs
from dropit_fx.capture.fake import fake_mode_of, fakes_of, propagate
from dropit_fx.capture.input_guards import InputGuards
from dropit_fx.capture.modes import is_one_mode
from dropit_fx.capture.trace import capture
from dropit_fx.config import make_config
from dropit_fx.passes.find_saved import FakeRunError, find_saved
from dropit_fx.passes.plan import Plan


def line_of(function: Callable[..., Any], code: str) -> int:
    """The line number of the first line of ``function`` that holds ``code``."""
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if code in line)


def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


class ShapeDependent(nn.Module):
    """Asks for a size in a condition: export knows it, symbolic_trace does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = torch.relu(self.fc1(x))
        return self.fc2(x)


class ValueDependent(nn.Module):
    """Asks for a value in a condition: no tracer knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if h.sum() > 0:
            h = h + 1
        return self.fc2(h)


# --- which tracer


def test_export_takes_what_symbolic_trace_cannot() -> None:
    model, x = ShapeDependent(), torch.randn(16, 8)
    made = transform(
        copy.deepcopy(model), {"preset": "dropit", "force": True}, gamma=0.0, example_args=(x,)
    )
    assert any(isinstance(m, InputGuards) for m in made.modules())  # export's mark
    packed = [n.name for n in made.graph.nodes if "packed" in n.kwargs]
    assert packed == ["relu", "linear_1"]  # the first linear reads the model's input
    for batch in (16, 5):
        x = torch.randn(batch, 8)
        assert differing(step(model, (x,), {}).gradients, step(made, (x,), {}).gradients) == []


class PartlyWithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            shift = self.fc1(x).relu()
        return self.fc2(self.fc1(x).relu() - shift * 0.5)


def test_what_runs_without_gradients_in_the_model_does_so_in_the_graph() -> None:
    model, x = PartlyWithoutGradients(), torch.randn(16, 8)
    made = transform(copy.deepcopy(model), {"preset": "lossless"}, example_args=(x,))
    assert differing(step(model, (x,), {}).gradients, step(made, (x,), {}).gradients) == []


def test_a_size_that_export_has_fixed_is_checked() -> None:
    made = transform(ShapeDependent(), example_args=(torch.randn(16, 8),))
    with pytest.raises(ValueError, match=r"with x.size\(\)\[1\] == 8; .* inputs given: \(16, 9\)"):
        made(torch.randn(16, 9))


class TwoBranches(nn.Module):
    def __init__(self, even: bool) -> None:
        super().__init__()
        self.even = even
        self.fc1, self.fc2 = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        one = x.shape[0] % 2 == 0 if self.even else x.shape[0] > 8
        return self.fc2(self.fc1(x) if one else self.fc1(x) * 2)


@pytest.mark.parametrize("even", [True, False], ids=["parity", "threshold"])
@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, by_pickle], ids=lambda f: f.__name__
)
def test_the_branch_that_export_did_not_take_is_refused(even: bool, copied: Any) -> None:
    model = TwoBranches(even)
    made = copied(transform(model, example_args=(torch.randn(16, 8),)))
    x, other = torch.randn(12, 8), torch.randn(5, 8)
    for training in (True, False):
        made.train(training)
        assert torch.equal(made(x), model(x))
        with pytest.raises(ValueError, match=r"exported for inputs with .*x.size\(\)\[0\]"):
            made(other)


def test_each_mode_puts_its_conditions_on_the_inputs() -> None:
    class EvalOnly(TwoBranches):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                assert x.shape[0] > 8
            return super().forward(x) if x.shape[1] > 4 else x

    made = transform(EvalOnly(even=True), example_args=(torch.randn(16, 8),))
    assert made(torch.randn(12, 8)).shape == (12, 8)
    with pytest.raises(ValueError, match="exported for inputs with"):
        made.eval()(torch.randn(6, 8))


def test_a_compiled_copy_of_an_exported_graph_checks_its_inputs_too() -> None:
    model = TwoBranches(even=False)
    made = transform(model, example_args=(torch.randn(16, 8),))
    compiled = torch.compile(made, backend="eager", dynamic=True)
    x = torch.randn(12, 8)
    assert torch.equal(compiled(x), model(x))
    with pytest.raises(Exception, match="exported for inputs with"):
        compiled(torch.randn(5, 8))


class Asks(nn.Module):
    """Does something else for each kind of its second input, ``tensor`` or another."""

    def __init__(self, kinds: Any) -> None:
        super().__init__()
        self.kinds, self.fc1, self.fc2 = kinds, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Any) -> Tensor:
        first = scale[0] if isinstance(scale, (list, tuple)) else scale
        return self.fc2(self.fc1(x) * first + (1 if isinstance(scale, self.kinds) else 2))


NUMBER, SCALES = torch.tensor(2.0), torch.full((8,), 2.0)
KINDS = {"int": 2, "float": 2.0, "tensor": NUMBER, "list": [SCALES], "tuple": (SCALES,)}


@pytest.mark.parametrize(
    ("kinds", "example", "others"),
    [
        (int, "int", ("float", "tensor", "tuple")),
        (float, "float", ("int", "tensor")),
        ((int, float), "tensor", ("int", "float", "list")),
        (Tensor, "tensor", ("int", "float", "tuple")),
        (Tensor, "float", ("tensor",)),
        (tuple, "tensor", ("tuple",)),
    ],
)
def test_an_input_of_another_kind_is_refused_where_the_model_asks(
    kinds: Any, example: str, others: tuple[str, ...]
) -> None:
    model, x = Asks(kinds), torch.randn(4, 8)
    made = by_pickle(transform(model, example_args=(x, KINDS[example])))
    for training in (True, False):
        made.train(training)
        assert torch.equal(made(x, KINDS[example]), model(x, KINDS[example]))
        for other in others:
            with pytest.raises(ValueError, match=r"with .*scale.*transform the model with an"):
                made(x, KINDS[other])


def test_where_nobody_asks_any_kind_is_taken() -> None:
    class Scales(Asks):
        def forward(self, x: Tensor, scale: Any) -> Tensor:
            return self.fc2(self.fc1(x) * scale)

    model, x = Scales(int), torch.randn(4, 8)
    made = transform(model, example_args=(x, 2))
    for other in (3, 2.5, NUMBER, SCALES):
        assert torch.equal(made(x, other), model(x, other))


def test_no_tracer_the_error_names_both_lines_and_the_plug_in() -> None:
    with pytest.raises(CaptureError) as caught:
        transform(ValueDependent(), example_args=(torch.randn(16, 8),))
    text = str(caught.value)
    where = f"{__file__}:{line_of(ValueDependent.forward, 'if h.sum()')}"
    assert text.count(where) == 2
    assert "torch.fx.symbolic_trace stopped at" in text
    assert "torch.export stopped at" in text
    assert 'torch.compile(model, backend="dropit")' in text
    assert "modules=" in text


def test_the_plug_in_takes_a_model_that_no_tracer_takes() -> None:
    model, x = ValueDependent(), torch.rand(16, 8)
    options = {"config": {"preset": "dropit", "force": True}, "gamma": 0.0}
    compiled = torch.compile(copy.deepcopy(model), backend="dropit_eager", options=options)
    assert differing(step(model, (x,), {}).gradients, step(compiled, (x,), {}).gradients) == []


def test_what_is_computed_from_a_buffer_follows_the_buffer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("log_scale", torch.zeros(8))
            self.register_buffer("shift", torch.zeros(8), persistent=False)
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * self.log_scale.exp() + self.shift.view(1, 8))

    model, x = Scaled(), torch.randn(4, 8)
    made = transform(model, example_args=(x,))
    assert made.state_dict().keys() == model.state_dict().keys()
    made.load_state_dict({**model.state_dict(), "log_scale": torch.ones(8)})
    model.shift.fill_(2.0)
    assert torch.equal(made(x), model(x))
    assert torch.equal(model(x), model.fc(x * torch.ones(8).exp() + 2.0))


def test_a_constant_made_in_forward_is_no_part_of_the_state() -> None:
    class Ranged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.arange(8.0))

    model, x = Ranged(), torch.randn(4, 8)
    before = set(vars(model))
    made = transform(model, example_args=(x,))
    assert torch.equal(made(x), model(x))
    assert made.state_dict().keys() == model.state_dict().keys()
    assert set(vars(model)) == before  # nothing is left on the user's model


def test_the_model_keeps_its_mode_and_its_class() -> None:
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1)).eval()
    model.bn1.train()
    modes = {n: m.training for n, m in model.named_modules()}
    transform(model, example_args=(torch.randn(2, 3, 64, 64),))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert type(model) is timm.models.ResNet


# --- example inputs


def test_a_bare_tensor_for_example_args_is_a_type_error_that_says_how_to_write_it() -> None:
    with pytest.raises(TypeError, match=r"example_args is a tuple.*not a Tensor: write \(x,\)"):
        transform(ShapeDependent(), example_args=torch.randn(4, 8))  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused_with_the_names_of_those_that_do() -> None:
    with pytest.raises(CaptureError, match=r"does not fit the model's inputs \(input\)"):
        transform(nn.Sequential(nn.Linear(8, 8)), example_args=(torch.ones(2, 8), torch.ones(2)))


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)), (4, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()), (2, 3, 224)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (2, 3, 224, 224)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)), (2, 16)),
    # lenet for 32 x 32 images: 224 and 64 do not fit its linear
    "lenet": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4 * 28 * 28, 8)),
        (2, 3, 32, 32),
    ),
    "timm": (lambda: timm.create_model("resnet18", layers=(1, 1, 1, 1)), (2, 3, 224, 224)),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_guessed_from_the_model(kind: str) -> None:
    build, shape = SHAPES[kind]
    args, kwargs = example_inputs.guess(build())
    assert [tuple(a.shape) for a in args] == [shape]
    assert kwargs == {}


def test_hugging_face_models_tell_their_inputs() -> None:
    model = gpt2()
    made = transform(model)
    ids = torch.randint(0, 90, (2, 7))
    torch.manual_seed(1)
    expected = model(input_ids=ids).logits
    torch.manual_seed(1)
    assert torch.equal(made(input_ids=ids).logits, expected)


def test_a_guess_that_cannot_be_made_says_what_was_tried() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) + y

    with pytest.raises(CaptureError, match="could not be guessed; give example_args"):
        transform(Two())
    with pytest.raises(CaptureError, match=r"Tried:\n  \(4, 8\): "):
        transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 9)))


# --- in place


def vision_transformer() -> nn.Module:
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)
    return liven(model.train())


def test_modules_rewrites_each_match_in_place_and_nothing_else() -> None:
    model, x = vision_transformer(), torch.randn(2, 3, 64, 64)
    dense = copy.deepcopy(model)
    made = transform(
        model, {"preset": "dropit", "force": True}, modules="blocks.*", gamma=0.0, example_args=(x,)
    )
    assert made is model
    assert [isinstance(b, fx.GraphModule) for b in model.blocks] == [True, True]
    assert [n for n, m in model.named_modules() if isinstance(m, fx.GraphModule)] == [
        "blocks.0",
        "blocks.1",
    ]
    assert model.state_dict().keys() == dense.state_dict().keys()
    rows = report(model).rows
    assert {".".join(r.module.split(".")[:2]) for r in rows} == {"blocks.0", "blocks.1"}
    assert any("mink" in r.codec for r in rows)
    expected, found = step(dense, (x,), {}), step(model, (x,), {})
    assert differing(expected.output, found.output) == []
    assert differing(expected.gradients, found.gradients) == []


def test_modules_takes_the_parts_of_a_model_that_no_tracer_takes_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
            self.late = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x * 2)
            return self.late(h + 1 if bool((h != h).any()) else h)

    model, x = Outer(), torch.randn(16, 8)
    with pytest.raises(CaptureError, match="no tracer takes Outer"):
        transform(copy.deepcopy(model), example_args=(x,))
    assert "def forward(" not in capsys.readouterr().err  # as far as torch.export came
    dense = copy.deepcopy(model)
    state = torch.get_rng_state()
    transform(model, modules=["body", "la*"], example_args=(x,))
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(model.body, fx.GraphModule)
    assert isinstance(model.late, fx.GraphModule)  # seen in a real run: fake values decide nothing
    assert torch.equal(model(x), dense(x))


def test_a_real_run_leaves_no_trace_and_its_errors_are_told() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.late = nn.BatchNorm1d(8), nn.Linear(8, 8)
            self.runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            h = self.norm(x)
            if h.sum() > 1e9:
                raise ValueError("too large")
            return self.late(h)

    model = Decides()
    nn.init.constant_(model.norm.bias, 1e10)
    with pytest.raises(CaptureError, match="stopped before submodule 'late': ValueError: too larg"):
        transform(copy.deepcopy(model), modules="late", example_args=(torch.randn(16, 8),))
    model = Decides()
    transform(model, modules="late", example_args=(torch.randn(16, 8),))
    assert isinstance(model.late, fx.GraphModule)
    assert model.norm.num_batches_tracked == 0


def test_modules_that_match_nothing_are_an_error_that_lists_the_children() -> None:
    with pytest.raises(ConfigError, match=r"matches no submodule. Direct children: .*blocks"):
        transform(vision_transformer(), modules="block.*", example_args=(torch.ones(1),))


def test_no_modules_at_all_are_an_error() -> None:
    with pytest.raises(ConfigError, match="modules is an empty list"):
        transform(vision_transformer(), modules=[], example_args=(torch.ones(1),))


def test_a_rule_that_matches_in_one_submodule_is_enough() -> None:
    x = torch.randn(2, 3, 64, 64)
    rules = {"rules": [{"module": "mlp.fc2", "codec": "mink", "gamma": 0.5}]}
    model = transform(vision_transformer(), rules, modules="blocks.*", example_args=(x,))
    assert [r.codec for r in report(model).rows if r.module.endswith("mlp.fc2")]


def _fails(x: Tensor) -> Tensor:
    raise ValueError("not on fake tensors")


def test_a_run_that_fails_leaves_the_modes_that_it_has_entered() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(
        torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)
    )
    graph.call_function(torch.autograd.grad_mode._enter_inference_mode, (True,))
    failing = graph.call_function(_fails, (x,))
    for entered, leave in zip(
        list(graph.nodes)[2:0:-1],
        (
            torch.autograd.grad_mode._exit_inference_mode,
            torch.amp.autocast_mode._exit_autocast,
        ),
        strict=True,
    ):
        graph.call_function(leave, (entered,))
    graph.output(failing)
    module, inputs = fx.GraphModule({}, graph), fakes_of((torch.randn(3),))
    propagate(module, inputs)
    with pytest.raises(FakeRunError, match="not on fake tensors"):
        find_saved(Plan(module=module, inputs=inputs, config=make_config()))
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_inference_mode_enabled()


TARGETS = torch.tensor([0.5, 1.0, 2.0])


class OfTargets(nn.Module):
    """What it computes of no input is computed while it is traced, in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() * TARGETS.exp() + TARGETS.log()


def test_what_is_computed_of_no_input_serves_both_modes() -> None:
    model, x = OfTargets(), torch.randn(4, 3)
    made = transform(model, example_args=(x,), preset="lossless")
    for training in (True, False):
        assert torch.equal(made.train(training)(x), model(x))
    assert list(made.state_dict()) == list(model.state_dict())


def test_an_example_that_has_a_gradient_is_exported_as_any() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    x.grad = torch.ones(4, 8)
    made = transform(ShapeDependent(), example_args=(x,))
    made(torch.randn(4, 8))
    assert torch.equal(x.grad, torch.ones(4, 8))


def test_an_input_that_was_none_has_to_be_none() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(
            self, x: Tensor, masks: list[Any], *rest: Any, scale: Tensor | None = None
        ) -> Tensor:
            y: Tensor = self.linear(x)
            for factor in (masks[0], *rest, scale):
                y = y if factor is None else y * factor
            return y

    x = torch.randn(4, 8)
    made = transform(
        Masked(), example_args=(x, [None], None), example_kwargs={"scale": None}, preset="lossless"
    )
    made(x, [None], None, scale=None)
    for name, call in {
        r"masks\[0\]": lambda: made(x, [x], None, scale=None),
        "rest": lambda: made(x, [None], x, scale=None),
        "scale": lambda: made(x, [None], None, scale=x),
    }.items():
        with pytest.raises(ValueError, match=f"{name}.* is None"):
            call()


def test_results_come_in_the_containers_of_the_model() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> OrderedDict[str, Any]:
            y = F.gelu(self.linear(x))
            return OrderedDict(out=y, rest=deque([y * 2, (x, None)]))

    x = torch.randn(4, 8)
    made = transform(Ordered(), example_args=(x,))
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    copies = (copy.deepcopy(made), pickle.loads(pickle.dumps(made)))
    for run in (made, fx.Interpreter(made).run, *copies, compiled):
        found = run(x)
        assert type(found) is OrderedDict
        assert list(found) == ["out", "rest"]
        assert type(found["rest"]) is deque
        assert torch.equal(found["rest"][1][0], x)


def test_fake_inputs_of_one_mode_serve_one_capture_after_the_other() -> None:
    """A mode has one fake parameter for all its runs: no run sees the gradients of another."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
    with fake_mode_of(()):
        x = torch.empty(4, 8)
    for _ in range(2):
        graph = capture(model, (x,), {})
        assert not is_one_mode(graph)


def test_a_wrapper_that_hands_all_on_takes_other_sizes() -> None:
    """As PEFT's models are: their forward has ``*args`` and ``**kwargs``."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(8, 6, 4)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            x, scale = [*args, *kwargs.values()]
            out: Tensor = self.inner(x, x[:, :6]) * scale
            return out

    model, x, scale = Wrapper(), torch.randn(5, 8), torch.randn(5, 1)
    for args, kwargs in (((x, scale), {}), ((x,), {"scale": scale})):
        packed = transform(model, example_args=args, example_kwargs=kwargs)
        for rows in (5, 3):
            cut = {n: t[:rows] for n, t in kwargs.items()}
            expected = model(*(t[:rows] for t in args), **cut)
            assert torch.equal(packed(*(t[:rows] for t in args), **cut), expected)


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_moves_its_vectors_in_training_mode_alone(training: bool) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(2))
        return nn.Sequential(*layers).train(training)

    (model, dense), x = (made(), made()), torch.randn(4, 8)
    packed = transform(model, example_args=(x,))
    assert not is_one_mode(packed)
    for mode in (training, not training, training):
        packed.train(mode)
        dense.train(mode)
        assert torch.equal(packed(x), dense(x))
        pairs = zip(model.buffers(), dense.buffers(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("also", [False, True], ids=["one graph", "two graphs"])
def test_dropout_behind_a_condition_on_the_mode_is_exported(also: bool) -> None:
    """Export has ATen's dropout, of three arguments; PEFT's DoRA does more in training, too."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(x)
            if self.training and h.shape[-1] > 4:  # export knows it, symbolic_trace does not
                h = F.dropout(h, 0.1)
                h = h * 2 if also else h
            out: Tensor = self.fc2(h)
            return out

    model, x = Dropping().train(), torch.randn(4, 8)
    packed = transform(model, preset="lossless", example_args=(x,))
    for mode in (True,) if also else (True, False):
        found = []
        for run in (model.train(mode), packed.train(mode)):
            torch.manual_seed(0)
            found.append(run(x))
        assert torch.equal(*found)
    if also:
        with pytest.raises(RuntimeError, match="training"):
            packed.eval()(x)
