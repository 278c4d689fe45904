"""pack_saved: what autograd saves of any code is packed, and what must not be is not

The oracle is the same run without it: the loss has its bits, and so has every gradient that reads
nothing that is packed.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpointed import ROWS, WIDTH, activation, batch, error, net, step
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from dropit_fx import measure, pack_checkpoints, pack_saved
from dropit_fx.runtime.places import place_of, take


def grads_of(run: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The gradients of the sum of what ``run`` returns, under ``pack_saved`` where bits are."""
    torch.manual_seed(3)
    with pack_saved(**options) if options else contextlib.nullcontext():
        out = run(*inputs)
    return list(torch.autograd.grad(out.sum(), inputs))


def views(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return q * k + v * w.transpose(0, 1).sin()


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x * x.exp(),
    "softmax": lambda x: x.softmax(-1).square(),
    "log_softmax": lambda x: x.log_softmax(-1).square(),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]).exp(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
    "dropout": lambda x: F.dropout(x, 0.3).square(),
    "convolution": lambda x: F.conv1d(x, x[:4, :, :3]).square(),
    "pooling": lambda x: F.max_pool1d(x, 4).square(),
    "relu": lambda x: x.relu().square(),
    "views of one storage": lambda x: views(*x.chunk(4, -1)),
    "a transposed view": lambda x: x.transpose(-1, -2) @ x,
    "windows that overlap": lambda x: (x.unfold(-1, 4, 2) * x.unfold(-1, 4, 2).sin()).sum(-1),
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 8, -1) * x[:, :, :1].sin()[..., None],
    "in place": lambda x: x.sin().neg_().cos_().square(),
}


EVERY = [(name, torch.float32) for name in CALLS]
EVERY += [("attention", d) for d in (torch.bfloat16, torch.float16, torch.float64)]
EVERY += [(name, torch.bfloat16) for name in ("dropout", "pooling", "views of one storage")]


@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=str)
def test_any_forward_has_its_bits_and_nearly_its_gradients(name: str, dtype: torch.dtype) -> None:
    run, x = CALLS[name], activation(16, 16, 64, dtype=dtype)
    torch.manual_seed(3)
    wanted = run(x)
    torch.manual_seed(3)
    packed = pack_saved(bits=8)
    with packed:
        assert torch.equal(run(x), wanted)
    assert packed.report().rows
    (exact,), (found,) = grads_of(run, [x]), grads_of(run, [x], bits=8)
    off = (found - exact).double().norm() / exact.double().norm()
    assert off < 0.05
    again = [grads_of(run, [x], bits=8)[0] for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_reported_is_what_is_measured(name: str) -> None:
    x, run = torch.randn(16, 16, 64).requires_grad_(), CALLS[name]
    packed = pack_saved(bits=4)

    def inside() -> Tensor:
        with packed:
            return run(x * torch.ones(()))

    kept = measure.saved_bytes(inside)
    report = packed.report()
    assert report.kept_bytes == kept
    assert report.dense_bytes == measure.saved_bytes(lambda: run(x * torch.ones(())))
    assert report.kept_bytes < 0.5 * report.dense_bytes or name == "convolution"
    assert all(row.op and row.where.split(":")[0] == __file__ for row in report.rows)


def test_views_of_one_storage_are_packed_once() -> None:
    """However they overlap: the copies together are never larger than one of all."""
    x = activation(64, 64)
    size = 64 * 64 * 4
    for views in (
        [x, x.view(-1), x.t()],
        list(x.chunk(4, -1)),
        [x[i : i + 40] for i in range(24)],
        [x[:32], x, x[16:]],
    ):
        packed = pack_saved(bits=8)
        with packed:
            out = sum((view.sin().sum() for view in views), torch.zeros(()))
        (row,) = packed.report().rows
        assert row.kept_bytes <= size * 8.125 / 32 + 16
        (found,) = torch.autograd.grad(out, x, retain_graph=True)
        (exact,) = torch.autograd.grad(sum(view.sin().sum() for view in views), x)
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_a_part_that_is_small_does_not_keep_the_rest_alive() -> None:
    packed = pack_saved(bits=4)
    x = torch.randn(64, 64, requires_grad=True)

    def first_row() -> Tensor:
        with packed:
            return (x * torch.ones(()))[0].sin()

    one = 4  # the number that the product saves
    assert measure.saved_bytes(lambda: (x * torch.ones(()))[0].sin()) == 64 * 64 * 4 + one
    assert measure.saved_bytes(first_row) == 64 * 4 + one == packed.report().kept_bytes
    (found,), (exact,) = (torch.autograd.grad(first_row().sum(), x), (x.cos() * 0,))
    assert torch.equal(found[0], x[0].cos())
    assert torch.equal(found[1:], exact[1:])


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "into it": lambda x, y: x.add_(1),
    "through a view": lambda x, y: x.view(-1)[3:5].mul_(2),
    "through what is detached": lambda x, y: x.detach().zero_(),
    "into the result": lambda x, y: y[0].mul_(2),
}


@pytest.mark.parametrize("size", [8, 64], ids=["small", "large"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_into_what_is_saved_is_an_error_as_without_packing(
    write: Callable[[Tensor, Tensor], object], size: int
) -> None:
    for context in (contextlib.nullcontext(), pack_saved()):
        x = activation(size, size)
        with context:
            y = x * x.exp()
            y = y.exp()
        write(x, y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_writing_into_a_parameter_or_a_kept_constant_is_an_error() -> None:
    weight, x = nn.Parameter(torch.randn(64, 64)), activation(64, 64)
    table = torch.randn(64, 64)
    for written in (weight, table):
        with pack_saved():
            out = ((x @ weight) * table).sum()
        with torch.no_grad():
            written.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_what_is_written_and_saved_again_is_packed_again() -> None:
    x = activation(64, 64).detach()
    weight = nn.Parameter(torch.randn(64, 64))
    out, exact = [], []
    for found, context in ((out, pack_saved(bits=8)), (exact, contextlib.nullcontext())):
        y = (x * 1).requires_grad_() * 1
        with context:
            first = (y.clone() @ weight).sum()
            with torch.no_grad():
                y.mul_(3)
            second = (y @ weight).sum()
        found += torch.autograd.grad(first + second, weight)
    assert (out[0] - exact[0]).norm() < 0.02 * exact[0].norm()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_kept_as_it_is(bits: int, bad: float) -> None:
    x = activation(64, 64).detach()
    x[5, 7] = bad
    x = x.requires_grad_() * 1
    packed = pack_saved(bits=bits)
    with packed:
        y = x * torch.ones(())
        out = y.sigmoid() * y
    rows = [r for r in packed.report().rows if "NaN or infinity" in r.reason]
    assert len(rows) == (2 if bad != bad else 1)
    assert all(row.kept_bytes == row.dense_bytes == 64 * 64 * 4 for row in rows)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert found.isfinite().sum() >= 64 * 64 - 1


def test_masked_scores_have_the_gradients_of_dense() -> None:
    scores, mask = activation(32, 64), torch.rand(32, 64) > 0.5

    def masked() -> Tensor:
        kept = scores.masked_fill(mask, -float("inf")).log_softmax(-1)
        return kept.masked_fill(mask, 0).sum()

    (exact,) = torch.autograd.grad(masked(), scores)
    with pack_saved(bits=4):
        out = masked()
    assert torch.equal(torch.autograd.grad(out, scores)[0], exact)


class Tied(nn.Module):
    """The input's gradient goes through weights alone, made in many ways of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH, bias=False))
        self.down = nn.Parameter(torch.randn(WIDTH, 32) / 8)
        self.up = nn.Parameter(torch.randn(32, WIDTH) / 8)
        self.stacked = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 8)
        self.register_buffer("mask", (torch.rand(WIDTH, WIDTH) > 0.5).float())
        self.register_buffer("table", torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.plain(x))
        x = x @ (self.plain.weight + self.down @ self.up)
        for weight in self.stacked.unbind():
            x = F.linear(x, weight.t().contiguous() * 0.5)
        x = x @ (self.stacked[0] * self.mask)
        return x @ self.table @ self.plain.weight.double().float()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_weights_and_what_is_made_of_them_are_never_packed(autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(ROWS, WIDTH, requires_grad=True)
    found = []
    packed = pack_saved(bits=1)
    for context in (contextlib.nullcontext(), packed):
        with torch.autocast("cpu", enabled=autocast), context:
            out = model(x)
        found.append(torch.autograd.grad(out.float().square().sum(), (x, model.down)))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1]), "inputs of the products are packed"
    reasons = {row.reason for row in packed.report().rows if row.reason}
    assert "made of parameters alone" in reasons


def test_weights_that_are_no_parameters_stay_exact_under_autocast() -> None:
    layer, x = nn.Linear(WIDTH, WIDTH, bias=False), activation(ROWS, WIDTH)
    weights = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    found = []
    for context in (contextlib.nullcontext(), pack_saved(bits=1)):
        with torch.autocast("cpu"), context:
            out = torch.func.functional_call(layer, weights, (x * 1,))
        found.append(torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(*found)


def test_masks_and_indices_lose_nothing() -> None:
    x = activation(16, 16, 64)

    def run() -> Tensor:
        torch.manual_seed(5)
        y = F.dropout(F.max_pool1d(x, 4, return_indices=False), 0.4)
        return torch.where(y > 0, y, -y).sum()

    (exact,) = torch.autograd.grad(run(), x)
    packed = pack_saved(bits=8)
    with packed:
        out = run()
    assert torch.equal(torch.autograd.grad(out, x)[0], exact)
    assert {row.codec for row in packed.report().rows} >= {"bitmask(bits=1)"}


def test_a_backward_inside_of_the_block_and_any_number_of_blocks() -> None:
    model, x = net(), batch()
    grads = step(model, x)[1]
    packed = pack_saved()
    with packed, packed:
        inside = step(model, x)[1]
    with packed:
        again = step(model, x)[1]
    assert 0 < error(inside, grads) < 0.02
    assert error(again, inside) == 0
    assert len(packed.report().rows) == 7
    with pytest.raises(ValueError, match="nothing to report yet"):
        pack_saved().report()


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    x = torch.randn(64, 64)
    for context in (torch.no_grad(), torch.inference_mode()):
        packed = pack_saved()
        with context, packed:
            assert torch.equal((x * 1).sin(), x.sin())
        assert not packed.report().rows


def test_second_derivatives_of_a_block_are_refused_unless_nothing_is_rounded() -> None:
    x, small = (torch.randn(n, n, requires_grad=True) for n in (64, 8))
    with pack_saved():
        out, exact = (x * 1).sin().sum(), (small * 1).sin().sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(out, x, create_graph=True)
    (first,) = torch.autograd.grad(exact, small, create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), small)[0], -small.sin())


def test_transforms_of_functions() -> None:
    """vmap under autograd packs; those that differentiate refuse saved-tensor hooks themselves."""
    x = torch.randn(16, 32, 64, requires_grad=True)
    with pack_saved():
        out = torch.vmap(lambda row: (row * 1).sin())(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert (found - x.cos()).abs().max() < 0.05
    with pack_saved(), pytest.raises(RuntimeError, match="support saved tensor hooks"):
        torch.func.grad(lambda row: row.sin().sum())(x)


@pytest.mark.parametrize("outside", [False, True])
def test_with_offloading(outside: bool) -> None:
    """Around it, packed tensors are offloaded; inside of it, what they hold stays dense."""
    x = activation(64, 64)
    (exact,) = torch.autograd.grad((x.tanh() * x).sum(), x)
    contexts = (save_on_cpu(), pack_saved(bits=4)) if outside else (pack_saved(), save_on_cpu())
    with contexts[0], contexts[1]:
        out = (x.tanh() * x).sum()
    (found,) = torch.autograd.grad(out, x)
    assert torch.equal(found, exact) == (not outside)
    assert (found - exact).norm() < 0.2 * exact.norm()


def test_anomaly_mode() -> None:
    model, x = net(), batch()
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=8)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(), pack_saved():
        assert error(step(model, x)[1], grads) < 0.02


def test_subclasses_and_other_layouts_are_kept_as_they_are() -> None:
    class Own(Tensor):
        pass

    x = activation(64, 64)
    sparse = torch.eye(64).to_sparse()
    packed = pack_saved(bits=2)
    with packed:
        out = x.as_subclass(Own).sin().sum() + torch.sparse.mm(sparse, x).sum()
    (found,) = torch.autograd.grad(out, x)
    assert torch.equal(found, x.cos() + 1)
    with pack_saved(bits=2):
        out = torch.view_as_complex(x.view(-1, 2)).exp().real.sum()
    assert torch.autograd.grad(out, x)[0].isfinite().all()


def test_compiled_code_inside_of_a_block_runs_as_it_is() -> None:
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    fast, x = torch.compile(layers, backend="aot_eager"), torch.randn(ROWS, WIDTH)
    exact = torch.autograd.grad(layers(x).sum(), list(layers.parameters()))
    packed = pack_saved(bits=2)
    with packed:
        out = fast(x).sum()
    assert all(map(torch.equal, torch.autograd.grad(out, list(layers.parameters())), exact))
    assert all("no gradient flows" in row.reason for row in packed.report().rows)


@pytest.mark.parametrize("seed", range(30))
def test_no_element_of_a_place_is_there_twice(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 4, (3,), generator=generator).tolist()
    stride = torch.randint(0, 7, (3,), generator=generator).tolist()
    for x in (
        torch.arange(64).as_strided(shape, stride),
        torch.arange(64).as_strided((2, 3, 2), (5, 2, 1)),
    ):
        taken = take(x, place_of(x))
        assert taken.unique().numel() == taken.numel()
        assert set(x.flatten().tolist()) <= set(taken.tolist())
