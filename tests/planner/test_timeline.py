"""A step's memory is told without running it: its peak, what stands there, what ops take."""

import pytest
import torch
from models import CASE
from planned_steps import measured, resident, state_of
from torch import Tensor, nn

from dropit_fx import measure, transform
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.step import Step
from dropit_fx.planner.timeline import BACKWARD, FORWARD, OPTIMIZER, forecast
from dropit_fx.planner.workspaces import measure_workspaces

FLOAT = 4
SHARE = 0.01  # of a measured peak: how far the told one may be from it
NUMBER = 8  # bytes of the tensor that PyTorch makes of a number
NAMES = ("resnet18", "deit_tiny_patch16_224", "convnext_tiny", "gpt2", "t5")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_that_of_a_real_step(name: str) -> None:
    model = CASE[name].model()
    args, kwargs = CASE[name].inputs(4)
    step = Step(model, args, kwargs)
    packed = transform(model, example_args=args, example_kwargs=kwargs)
    for module in (model, packed):
        told = forecast(step, module, measure_workspaces(step, module))
        # a number that a graph holds counts twice where it is read
        assert 0 <= told.peak - measured(step, module) <= NUMBER


def test_numbers_that_autograd_keeps_count() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight  # saves two tensors that are there anyway
            return 3 * (y * 0.5 + 1)  # saves two numbers, but not the third

    step = Step(Scaled(), (torch.randn(64),), loss=Tensor.sum)
    told = forecast(step, step.model, measure_workspaces(step, step.model))
    first = told.phases[1]
    assert told.alive(first)["saved tensors"] == 2 * NUMBER + FLOAT  # and the loss
    assert told.peak == measured(step, step.model)


def test_what_an_op_takes_for_itself_counts() -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 3, bias=False), nn.Conv2d(128, 256, 3, bias=False))
    step = Step(model, (torch.randn(1, 64, 6, 6),))
    real = measured(step, model)
    workspaces = measure_workspaces(step, model)
    assert forecast(step, model).peak < 0.99 * real
    assert forecast(step, model, workspaces).peak == pytest.approx(real, rel=SHARE / 10)


def test_the_timeline_of_a_small_step_counted_by_hand() -> None:
    step = Step(mlp(), (torch.randn(32, 8),), loss=Tensor.sum)
    told = forecast(step, step.model)
    parameters = FLOAT * (8 * 16 + 16 + 16 * 4 + 4)
    assert told.resident == {
        "parameters": parameters,
        "buffers": 0,
        "inputs": FLOAT * 32 * 8,
        "optimizer state": 0,
    }
    first = told.phases[1]
    assert told.phase(0) == FORWARD
    assert told.phase(first) == BACKWARD
    # saved: the input and the result of gelu; and the loss, a number
    assert told.alive(first)["saved tensors"] == FLOAT * (2 * 32 * 16 + 1)
    gradients = [life for life in told.lives if life.kind == "gradients"]
    assert sum(life.nbytes for life in gradients) == parameters
    assert {life.freed for life in gradients} == {len(told.ops)}
    assert told.used[told.peak_op] == told.peak


def test_the_optimizer_has_its_state_and_its_temporaries() -> None:
    model = nn.Linear(500, 500)
    step = Step(model, (torch.randn(2, 500),), loss=Tensor.sum)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    moved = Step(*[getattr(step, n) for n in ("model", "args", "kwargs", "loss")], optimizer)
    alone, told = forecast(step, model), forecast(moved, model)
    states = FLOAT * (2 * 500 * 501 + 2)
    assert told.resident["optimizer state"] == states
    assert told.phase(told.peak_op) == OPTIMIZER
    model(*step.args).sum().backward()
    optimizer.step()  # which makes the state

    def run() -> Tensor:
        optimizer.step()
        return torch.zeros(())

    # gradients, state and temporaries of the real thing
    real = measure.peak_memory(run) + resident(step) + states + FLOAT * 500 * 501
    assert told.peak == pytest.approx(real, rel=SHARE)
    assert told.peak > alone.peak + states


def test_an_optimizer_that_reads_values_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.Adafactor(model.parameters())
    step = Step(model, (torch.randn(4, 8),), {}, Tensor.sum, optimizer)
    with pytest.raises(PlanError, match=r"Adafactor cannot be told .*Plan without optimizer="):
        forecast(step, model)


def test_a_step_without_gradients_is_refused() -> None:
    step = Step(mlp().requires_grad_(False), (torch.randn(4, 8),))
    with pytest.raises(PlanError, match="there is no backward"):
        forecast(step, step.model)
    with pytest.raises(PlanError, match=r"a scalar tensor, not to shape \(4, 4\)"):
        forecast(Step(mlp(), step.args, loss=lambda y: y), mlp())


def test_nothing_is_left_in_the_model() -> None:
    model = CASE["resnet18"].model()
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    grad, before, chance = x.grad, state_of(model), torch.get_rng_state()
    step = Step(model, (x,))
    told = forecast(step, model, measure_workspaces(step, model))
    assert told.peak > 0
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert x.grad is grad


def test_frozen_parameters_have_no_gradient_there() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    told = forecast(Step(model, (torch.randn(32, 8),)), model)
    gradients = sum(life.nbytes for life in told.lives if life.kind == "gradients")
    assert gradients == FLOAT * (16 * 4 + 4)
