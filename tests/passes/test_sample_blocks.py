"""Stochastic Backpropagation: gradients of named blocks flow through some rows alone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx import ConfigError, measure
from dropit_fx.report.rows import SAMPLED
from dropit_fx.runtime.sampled_blocks import draw_rows, kept_count

WIDTH = 16


class Mlp(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Net(nn.Module):
    """``x: (batch, tokens, 8)``."""

    def __init__(self, *blocks: nn.Module, residual: bool = True) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(blocks or [Mlp(), Mlp(), Mlp()])
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h) if self.residual else block(h)
        return self.head(h.mean(1))


def rules(share: float = 0.25, dim: int = 1, module: str = "blocks.?", **more: Any) -> Any:
    return {"preset": None, **more, "rules": [{"module": module, "backprop": share, "dim": dim}]}


def transformed(model: nn.Module, x: Tensor, **how: Any) -> fx.GraphModule:
    return dropit_fx.transform(model, rules(**how), example_args=(x,))


class Drawn(fx.Interpreter):
    """Runs a graph and notes the rows that are drawn."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[Tensor] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        self.found += [out] if target is draw_rows else []
        return out


def restricted(net: Net, x: Tensor, drawn: list[Tensor], dim: int) -> Tensor:
    """The model untouched, in which the gradients of all other rows are 0."""
    h = net.stem(x)
    for block, index in zip(net.blocks, drawn, strict=True):
        y = block(h)
        mask = torch.zeros(y.shape[dim]).index_fill(0, index.long(), 1.0)
        mask = mask.view([-1 if d == dim else 1 for d in range(y.dim())])
        # the gradient to the block's input is masked by that of its result: rows do not mix
        y = y * mask + (y * (1 - mask)).detach()
        h = h + y if net.residual else y
    return net.head(h.mean(1))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_are_those_of_dense_where_other_rows_have_none(
    dim: int, share: float, residual: bool
) -> None:
    net, x = Net(residual=residual), torch.randn(10, 12, 8)
    ours = transformed(net, x, share=share, dim=dim)
    run = Drawn(ours)
    out = run.run(x)
    assert torch.equal(out, net(x))
    count = math.ceil(share * x.shape[dim])
    assert [len(index.unique()) for index in run.found] == [count] * 3
    expected = restricted(net, x, run.found, dim)
    found = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
    exact = torch.autograd.grad(expected.square().sum(), list(ours.parameters()))
    torch.testing.assert_close(found, exact)


def test_the_gradient_of_rows_that_are_not_drawn_is_0_and_nothing_is_scaled() -> None:
    block = nn.Sequential(Mlp())
    x = torch.randn(4, 12, WIDTH, requires_grad=True)
    ours = transformed(block, x, module="0")
    run = Drawn(ours)
    out = run.run(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    (dense,) = torch.autograd.grad(block(x).sum(), x)
    (index,) = run.found
    torch.testing.assert_close(found[:, index], dense[:, index])
    others = [i for i in range(12) if i not in index.tolist()]
    assert len(others) == 9
    assert not found[:, others].any()


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_saved_bytes_are_as_predicted_and_fall_in_proportion(share: float) -> None:
    net, x = Net(), torch.randn(4, 40, 8)
    ours = transformed(net, x, share=share)
    report = dropit_fx.report(ours)
    dense = measure.saved_bytes(net, x)
    assert report.dense_bytes == dense
    assert report.kept_bytes == measure.saved_bytes(ours, x)
    assert report.kept_bytes == pytest.approx(share * dense, rel=0.02)
    assert {row.codec for row in report.rows if row.dense_bytes > 1000} == {SAMPLED}


def test_with_packing_beside_it_both_save() -> None:
    net, x = Net(), torch.randn(8, 64, 8)
    both = dropit_fx.transform(net, rules(0.5, preset="balanced"), example_args=(x,))
    packed = dropit_fx.transform(net, example_args=(x,))
    sizes = [measure.saved_bytes(m, x) for m in (both, packed)]
    assert sizes[0] == dropit_fx.report(both).kept_bytes < 0.65 * sizes[1]
    assert torch.equal(both(x), net(x))


def test_it_is_an_ordinary_module() -> None:
    net, x = Net(), torch.randn(4, 12, 8)
    ours = transformed(net, x)
    assert ours.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(ours(x), net(x))
    assert torch.equal(ours.eval()(x), net(x))
    ours.train()
    for other in (x[:2], torch.randn(3, 5, 8), torch.randn(3, 1, 8)):
        assert torch.equal(ours(other), net(other))
        ours(other).sum().backward()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.compile(ours)):
        torch.testing.assert_close(twin(x), net(x))
        twin(x).square().sum().backward()
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    ours.get_parameter("blocks.1.up.weight").requires_grad_(True)
    ours(x).sum().backward()


def test_each_row_is_drawn_as_often() -> None:
    x = torch.ones(3, 20, 2, requires_grad=True)
    counts = torch.zeros(20)
    for _ in range(1000):
        counts[draw_rows(x, (), 0.3, 1)] += 1
    assert (counts - 300).abs().max() < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_a_share_is_rounded_up() -> None:
    counts = [kept_count(rows, 0.25) for rows in (0, 1, 4, 5, 8, 9)]
    assert counts == [0, 1, 1, 2, 2, 3]


def test_frames_of_convolutions_and_attention_among_their_own_tokens() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames = nn.Sequential(nn.Conv2d(3, WIDTH, 2, 2), nn.GELU(), nn.Flatten(2))
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.frames(x.flatten(0, 1) * 2).transpose(1, 2)
            return self.attention(tokens).mean(1).view(x.shape[0], -1, WIDTH).mean(1)

    net, x = Video(), torch.randn(2, 8, 3, 8, 8)
    module = ["frames", "attention"]
    ours = transformed(net, x, dim=0, module=module)  # type: ignore[arg-type]
    assert torch.equal(ours(x), net(x))
    assert measure.saved_bytes(ours, x) < 0.3 * measure.saved_bytes(net, x)
    ours(x).sum().backward()


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() * 2


class Gated(nn.Module):
    """Attention that adds nothing as long as its gate is 0, as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = Attention(), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.attention(x)


class OverTokens(nn.Module):
    """Batch norm of ``(batch, tokens, width)``."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Attention, "mixes rows along dim 1: see 'scaled_dot_product_attention'"),
        (Gated, "mixes rows along dim 1"),
        (OverTokens, "writes into blocks.0.norm"),
        (lambda: OverTokens(track_running_stats=False), "mixes rows along dim 1: see 'batch_norm'"),
        (lambda: nn.Softmax(1), "mixes rows along dim 1: see 'softmax'"),
        (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)), "draws random numbers"),
        (Written, "writes into its input"),
        (Placed, "does not run on 3 of 12 rows along dim 1"),
    ],
)
def test_where_rows_mix_or_chance_decides_it_is_refused(
    block: Callable[[], nn.Module], said: str
) -> None:
    net, x = Net(block(), residual=False), torch.randn(4, 12, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigError, match=r"rule 1 \{module: blocks") as refused:
        transformed(net, x)
    assert "block 'blocks.0'" in str(refused.value)
    assert said in str(refused.value)
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    if not isinstance(net.blocks[0], nn.Sequential | OverTokens | Written):
        return
    net.eval()  # in which nothing of it shows: the model may be trained later
    with pytest.raises(ConfigError):
        transformed(net, x)


def test_attention_among_tokens_is_right_along_the_batch() -> None:
    net, x = Net(Attention(), Gated()), torch.randn(8, 12, 8)
    ours = transformed(net, x, dim=0)
    run = Drawn(ours)
    out = run.run(x)
    expected = restricted(net, x, run.found, 0)
    found = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
    exact = torch.autograd.grad(expected.square().sum(), list(ours.parameters()))
    torch.testing.assert_close(found, exact)


def test_what_no_block_is_is_said() -> None:
    net, x = Net(), torch.randn(4, 12, 8)
    with pytest.raises(ConfigError, match="matched no module that is called in the graph"):
        transformed(net, x, module="block")
    with pytest.raises(ConfigError, match="is given no rows of floats along dim 3"):
        transformed(net, x, dim=3)
    with pytest.raises(ConfigError, match="is given 1 row along dim 0 by the example inputs"):
        transformed(net, x[:1], dim=0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = Sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(x * 2, x * 3)

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(ConfigError, match="reads 2 values from outside"):
        transformed(Two(), x, module="add")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"module": "a", "backprop": 0}, "backprop = 0: the share of rows, a number in (0, 1)"),
        ({"module": "a", "backprop": 1.0}, "a number in (0, 1)"),
        ({"module": "a", "backprop": True}, "a number in (0, 1)"),
        ({"module": "a", "backprop": 0.5, "dim": -1}, "dim = -1: the dimension of rows"),
        ({"module": "a", "backprop": 0.5, "codec": "quant"}, "no key 'codec' for a rule with"),
        ({"backprop": 0.5}, "no 'module', which names the block"),
    ],
)
def test_rules_that_cannot_mean_anything(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        dropit_fx.load_config({"rules": [rule]})
    assert said in str(refused.value)


def test_who_sees_no_whole_model_or_compares_gradients_refuses_it() -> None:
    net, x = Net(), torch.randn(4, 12, 8)
    fast = torch.compile(net, backend="dropit_eager", options={"config": rules()})
    with pytest.raises(Exception, match="rows of a block are sampled by transform"):
        fast(x)
    with pytest.raises(ConfigError, match="it changes gradients, and check compares them"):
        dropit_fx.check(net, (x,), config=rules())
