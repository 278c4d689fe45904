"""Strides that are not those of the trace, with gaps or several elements in one place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.config import Config, make_config
from dropit_fx.runtime.tensor_spec import (
    copied_to,
    flatten,
    has_gaps,
    is_view,
    laid_out,
    shares_all,
)

View = Callable[[Tensor], Tensor]

# Without loss, so that any difference is one of order.
EXACT: dict[str, Any] = {
    "preset": None,
    "force": True,
    "rules": [
        {"op": ["linear", "*mm", "matmul", "conv*"], "codec": "mink", "gamma": 0.0},
        {"op": "*", "codec": "quant", "bits": None},
    ],
}


def exact() -> Config:
    """Rules that may match nothing: not every model has such ops."""
    config = make_config(EXACT)
    return replace(config, rules=tuple(replace(r, preset=True) for r in config.rules))


LAYOUTS: dict[str, View] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "gaps": lambda x: torch.cat([x, x], -1)[..., :4],
    "channels last, gaps": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, :4],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "expanded inside": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    "windows": lambda x: torch.cat([x, x], -1).flatten(2).unfold(2, 4, 1)[:, :, :4],
}


class ConvolutionAndFlat(nn.Module):
    """Two readers, of which one sees a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 5)

    def forward(self, v: Tensor) -> Tensor:
        return self.conv(v).mean((1, 2, 3)) + self.linear(v.flatten(1)).sum(1)


class ProductsOfViews(nn.Module):
    """Readers of a value, of its transpose, and of reshapes."""

    def forward(self, v: Tensor) -> Tensor:
        flat = v.reshape(v.shape[0], -1)
        product = (flat @ flat.t()).sin().sum() + v.contiguous().cos().sum()
        return product + (v @ v.transpose(-1, -2)).cos().sum((1, 2, 3))


class DerivedThroughReshapes(nn.Module):
    """A value that is made again from another, and is read through a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, v: Tensor) -> Tensor:
        h = F.gelu(v)
        return self.linear(h.flatten(1)).sum(1) + (h @ h.mT).sin().sum((1, 2, 3))


class ResultOfRegion(nn.Module):
    """Readers of a region's result, which stands behind an index into what the region gives."""

    def forward(self, v: Tensor) -> Tensor:
        h = checkpoint(lambda t: t.exp() - 1, v, use_reentrant=False)
        return h.flatten(1).sin().sum(1) + h.sigmoid().sum((1, 2, 3)) * h.cos().sum((1, 2, 3))


class ResultThatIsPacked(nn.Module):
    """Ops that keep their result, which others read through a reshape: a call gives both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(2), nn.Linear(64, 5)

    def forward(self, v: Tensor) -> Tensor:
        norm = self.norm(v.exp().reshape(v.shape[0], 2, 4, -1)).cos().sum((1, 2, 3))
        return norm + self.linear(v.sigmoid().flatten(1)).sum(1) + v.tanh().mT.reshape(-1).sin()[:3]


class ViewOfGraph(nn.Module):
    """Readers of a value, and of its reshape that a graph without gradients makes."""

    def forward(self, v: Tensor) -> Tensor:
        h = v.exp()
        with torch.no_grad():  # a graph of its own, in torch.export's
            flat, turned = h.flatten(1), h.permute(0, 2, 3, 1).flatten(1)
        gated = turned * h.sigmoid().permute(0, 2, 3, 1).flatten(1)
        return (flat * h.sigmoid().flatten(1) + gated).sum(1) + h.sin().sum((1, 2, 3))


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, layout: View) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 4, 4, 4, requires_grad=True)
    model.zero_grad()
    (run(layout(x * 1)) * torch.arange(1.0, 4)).sum().backward()
    return [t.grad.clone() for t in (x, *model.parameters()) if t.grad is not None]


@pytest.mark.parametrize("made", LAYOUTS)
@pytest.mark.parametrize(
    "kind",
    [
        ConvolutionAndFlat,
        ProductsOfViews,
        DerivedThroughReshapes,
        ResultOfRegion,
        ResultThatIsPacked,
        ViewOfGraph,
    ],
)
def test_inputs_of_another_layout_than_the_examples(kind: type[nn.Module], made: str) -> None:
    model = kind()
    example = LAYOUTS[made](torch.randn(3, 4, 4, 4, requires_grad=True) * 1)
    packed = dropit_fx.transform(model, exact(), example_args=(example,))
    for name, layout in LAYOUTS.items():
        pairs = zip(gradients(model, model, layout), gradients(packed, model, layout), strict=True)
        for dense, found in pairs:
            assert (found - dense).norm() <= 1e-5 * dense.norm(), name


class Sizes(nn.Module):
    """A value, and what shows all of it at some sizes only."""

    def __init__(self, seen: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(8, 8), seen

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.linear(x))
        part = self.seen(h, x)
        return (part.sin() * part.exp()).sum() + (h @ h.mT).cos().sum() + h.cos().sum()


PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slice": lambda h, x: h[:1],
    "slice of the last": lambda h, x: h[-1:],
    "index": lambda h, x: h[0],
    "narrow": lambda h, x: h.narrow(0, 0, 1),
    "select": lambda h, x: h.select(0, -1),
    "chunk": lambda h, x: h.chunk(4)[0],
    "unbind": lambda h, x: h.unbind(0)[0],
    "some of several": lambda h, x: h.unbind(0)[:1][0],
    "the last of some": lambda h, x: h.split(1)[::-1][:2][-1],
    "split, unsafe": lambda h, x: torch.unsafe_split(h, 1)[0],
    "of several and more": lambda h, x: torch.broadcast_tensors(h[:1], x)[0],
    "expanded": lambda h, x: h[:, :1].expand(-1, x.shape[1], -1),
    "broadcast": lambda h, x: torch.broadcast_to(h[:1], x.shape),
    "transposed and reshaped": lambda h, x: h.transpose(0, 1).reshape(x.shape[1], -1, 8),
    "transposed": lambda h, x: h.transpose(0, 1),
    "flat": lambda h, x: h.flatten(0, 1),
}


@pytest.mark.parametrize("part", PARTS)
def test_inputs_of_other_sizes_than_the_examples(part: str) -> None:
    model = Sizes(PARTS[part])
    packed = dropit_fx.transform(model, exact(), example_args=(torch.randn(1, 5, 8),))
    single = dropit_fx.transform(model, exact(), example_args=(torch.randn(1, 1, 8),))
    for run, size in itertools.product((packed, single), [(1, 5), (4, 5), (2, 1), (1, 1), (3, 7)]):
        x, found = torch.randn(*size, 8), []
        for each in (model, run):
            model.zero_grad()
            each(x).backward()
            assert model.linear.weight.grad is not None
            found.append(model.linear.weight.grad.clone())
        assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm(), size


def test_compiled_by_dynamo_too() -> None:
    model = ConvolutionAndFlat()
    example = torch.randn(3, 4, 4, 4, requires_grad=True) * 1
    packed = dropit_fx.transform(model, exact(), example_args=(example,))
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    for layout in (LAYOUTS["contiguous"], LAYOUTS["channels last"], LAYOUTS["gaps"]):
        pairs = zip(
            gradients(model, model, layout), gradients(compiled, model, layout), strict=True
        )
        for dense, found in pairs:
            assert (found - dense).norm() <= 1e-5 * dense.norm()


def test_a_reader_that_sees_a_copy_keeps_it_dense_and_others_do_not() -> None:
    model = ConvolutionAndFlat()
    x = torch.randn(8, 4, 4, 4, requires_grad=True) * 1
    rules = {"rules": [{"op": ["linear", "conv2d"], "codec": "quant", "bits": 4}]}
    packed = dropit_fx.transform(model, rules, example_args=(x,))

    def kept(layout: str) -> int:
        given = LAYOUTS[layout](x * 1)
        return dropit_fx.measure.saved_bytes(lambda: packed(given))

    one = kept("contiguous")
    assert kept("channels last") == one + x.nbytes


SHOWN: dict[str, View] = {
    "a window of all": lambda v: v.unfold(0, v.shape[0], 1),
    "a window of all columns": lambda v: v.unfold(1, v.shape[1], 2),
    "a slice of all": lambda v: v[:, : v.shape[1]],
    "expanded to what it is": lambda v: v.expand(v.shape),
}


@pytest.mark.parametrize("view", SHOWN)
def test_a_view_that_shows_all_in_any_order_is_read_from_the_packed_copy(view: str) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen = SHOWN[view](F.leaky_relu(F.gelu(self.norm(x))))
            return (seen * seen).sin()

    x = torch.randn(6, 4, 8)
    made = dropit_fx.transform(Squared(), preset="balanced", example_args=(x,))
    said = dropit_fx.report(made).kept_bytes
    assert said == dropit_fx.measure.saved_bytes(lambda: made(x)) < 4 * x.nbytes


@pytest.mark.parametrize("shape", [(64, 32), (2048,), (2, 32, 32)], ids=str)
def test_a_view_that_a_graph_without_gradients_makes_is_read_from_the_packed_copy(
    shape: tuple[int, ...],
) -> None:
    """Of one of the results of an op: it is no part of what the op looked at."""

    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = torch.topk(x.sin(), 32)[0]
            with torch.no_grad():
                gate = value.reshape(shape)
            return gate * value.sigmoid().reshape(shape)

    x = torch.randn(64, 64, requires_grad=True)
    made = dropit_fx.transform(Gated(), preset="balanced", example_args=(x,))
    said = dropit_fx.report(made)
    assert said.kept_bytes == dropit_fx.measure.saved_bytes(made, x)
    assert "derived" in {row.codec for row in said.rows}


REGION_INPUTS: dict[str, View] = {
    "columns": lambda v: v[:, :4],
    "every other": lambda v: v[..., ::2],
    "columns of the transpose": lambda v: v.t()[:, :4],
    "expanded": lambda v: v[:1].expand(8, 8),
    "expanded inside": lambda v: v[:, :1].expand(8, 8),
    "windows": lambda v: v.unfold(1, 4, 1)[:, 0],
    "windows that overlap": lambda v: v.unfold(1, 4, 2),
    "transposed, gaps": lambda v: v.view(2, 4, 8).transpose(0, 1)[:, :, 1:7],
}
REGIONS: dict[str, View] = {
    "product with the transpose": lambda v: v @ v.transpose(-1, -2),
    "reshaped": lambda v: torch.sigmoid(v.reshape(-1) * 2) * v.reshape(-1),
    "reshaped and transposed": lambda v: F.gelu(v.reshape(-1, v.shape[-1])).t().reshape(2, -1) ** 2,
    "as strided": lambda v: v.as_strided((2, 3), (v.stride(0), v.stride(-1))) ** 2,
    "product of reshapes": lambda v: (
        F.silu(v.transpose(-1, -2)).reshape(v.shape[0], -1) @ v.reshape(v.shape[0], -1).t()
    ),
}


class Region(nn.Module):
    """A region that is given a view of an activation."""

    def __init__(self, view: View, body: View) -> None:
        super().__init__()
        self.weight, self.view, self.body = nn.Parameter(torch.rand(8)), view, body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, self.view(x * self.weight), use_reentrant=False)
        return out.sin()


@pytest.mark.parametrize("way", ["transform", "dropit_eager", "aot_eager"])
@pytest.mark.parametrize("view", REGION_INPUTS)
def test_a_region_is_made_again_with_the_strides_of_its_forward(view: str, way: str) -> None:
    x = torch.randn(8, 8)
    for name, body in REGIONS.items():
        model = Region(REGION_INPUTS[view], body)
        run: Any
        if way == "transform":
            run = dropit_fx.transform(model, exact(), example_args=(x,))
        else:
            torch._dynamo.reset()
            eager = way == "dropit_eager"
            options = {"config": exact()} | ({} if eager else {"inner": way})
            run = torch.compile(model, backend=way if eager else "dropit", options=options)
        found = []
        for each in (model, run):
            model.zero_grad()
            each(x).sum().backward()
            assert model.weight.grad is not None
            found.append(model.weight.grad.clone())
        assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm(), name


STRIDED = [
    *[((8, 4), (8, 2)), ((4, 3), (0, 1)), ((4, 3), (1, 0)), ((5, 3), (1, 1)), ((3,), (0,))],
    *[((), ()), ((2, 3, 4), (1, 10, 2)), ((0, 3), (3, 1)), ((1, 3), (7, 2)), ((4, 3), (0, 0))],
    *[((2, 2, 2), (0, 1, 1)), ((3, 2), (2, 3)), ((4, 6), (6, 1)), ((4, 6), (1, 4))],
]


@pytest.mark.parametrize(("shape", "stride"), STRIDED)
def test_copies_have_the_strides_they_are_asked_for(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    x = torch.randn(64).as_strided(shape, stride)
    for made in (copied_to(x, stride), laid_out(x.contiguous(), stride)):
        assert made.stride() == stride
        assert torch.equal(made, x)
    assert copied_to(x, stride).untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or (
        not x.numel()
    )


@pytest.mark.parametrize(("shape", "stride"), STRIDED)
def test_permuted_views_have_their_elements_in_one_order(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    x = torch.randn(64).as_strided(shape, stride)
    for dims in itertools.permutations(range(x.dim())):
        assert torch.equal(flatten(x.permute(dims)), flatten(x))
        assert has_gaps(x.permute(dims)) == has_gaps(x)


def test_views_are_told_from_copies() -> None:
    shapes = [(2, 3, 4), (6, 4), (24,), (2, 12), (4, 3, 2), (1, 24), (2, 3, 2, 2), (2, 1, 3, 4)]
    bases = [torch.randn(2, 3, 4), torch.randn(2, 3, 8)[..., ::2], torch.randn(2, 3, 8)[..., :4]]
    bases += [torch.randn(2, 6, 4)[:, ::2], torch.randn(2, 6, 4)[:, :3]]
    bases += [torch.randn(2, 3, 1).expand(2, 3, 4), torch.randn(2, 1, 4).expand(2, 3, 4)]
    seen = set()
    for base, shape in itertools.product(bases, shapes):
        for dims in itertools.permutations(range(3)):
            x = base.permute(dims)
            made = x.reshape(shape)
            shared = made.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert is_view(made, x) == shared, (x.shape, x.stride(), shape)
            seen.add(shared)
    assert seen == {True, False}
    x = torch.randn(2, 4, 3, 3)
    assert is_view(x.contiguous(), x)
    assert not is_view(x.contiguous(memory_format=torch.channels_last), x)


def test_what_shares_all_elements_is_told_by_its_memory() -> None:
    x = torch.randn(2, 4, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert shares_all(x.permute(0, 2, 3, 1), x)
    assert shares_all(x.flatten(1), x)
    assert shares_all(last.permute(0, 2, 3, 1).flatten(1), last)
    assert not shares_all(x.permute(0, 2, 3, 1).flatten(1), x)
    assert not shares_all(x.clone(), x)
    assert not shares_all(x[:1], x)
    assert not shares_all(x[:1].expand(2, 4, 4, 4), x)
