"""Packing without a graph: what pack_saved and pack_checkpoints keep, refuse and leave alone.

The oracle is the same run without them: the loss has its bits, and so has every gradient that reads
nothing that is packed.
"""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dropit_fx import ConfigError, measure, pack_checkpoints, pack_saved

WIDTH, ROWS = 64, 64
Grads = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, *more: Any, scale: Any = None) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))))
        for other in more:
            y = y * (other[0] if isinstance(other, tuple) else other)
        return x + self.dropout(y if scale is None else y * scale)


class Net(nn.Module):
    """Blocks that are checkpointed, one by one."""

    def __init__(self, depth: int = 3, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.options = {"use_reentrant": False} | options

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, *more, **named, **self.options)
        return F.cross_entropy(self.head(x), torch.arange(len(x)) % 10)


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).train()


def batch(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[float, Grads]:
    """The loss of one step, with its dropout, and all gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def error(found: Grads, wanted: Grads) -> float:
    assert found.keys() == wanted.keys()
    off = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
    return (off / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5


REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])


# Checkpoints --------------------------------------------------------------------------------------


@REENTRANT
def test_inputs_of_checkpoints_are_packed_and_the_forward_keeps_its_bits(
    use_reentrant: bool,
) -> None:
    model, x = net(use_reentrant=use_reentrant), batch()
    loss, grads = step(model, x)
    dense = measure.saved_bytes(model, x)
    packed = pack_checkpoints(model, bits=8)
    assert step(model, x)[0] == loss
    assert 0 < error(step(model, x)[1], grads) < 0.02
    report = packed.report()
    assert [row.op for row in report.rows] == ["checkpoint"] * 3
    assert report.dense_bytes == 3 * ROWS * WIDTH * 4
    assert report.ratio < 0.26
    assert dense - measure.saved_bytes(model, x) == report.dense_bytes - report.kept_bytes
    packed.remove()
    assert measure.saved_bytes(model, x) == dense
    again = step(model, x)
    assert again[0] == loss
    assert error(again[1], grads) == 0


def test_gradients_in_front_of_no_packed_input_are_exact() -> None:
    """Of the head, which is behind all regions, and of the last bias that a region adds."""
    model, x = net(), batch()
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=4)
    found = step(model, x)[1]
    for name in ("head.weight", "head.bias"):
        assert torch.equal(found[name], grads[name]), name
    assert not torch.equal(found["blocks.0.up.weight"], grads["blocks.0.up.weight"])


def test_the_error_falls_with_the_bits() -> None:
    model, x = net(), batch()
    grads = step(model, x)[1]
    errors = []
    for bits in (3, 4, 6, 8):
        packed = pack_checkpoints(model, bits=bits)
        errors.append(error(step(model, x)[1], grads))
        packed.remove()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@REENTRANT
def test_what_several_regions_read_is_kept_once(use_reentrant: bool) -> None:
    """A table of constants stays exact, a mask and an activation are packed once."""
    table = torch.randn(ROWS, WIDTH)
    mask = torch.rand(ROWS, WIDTH) > 0.5

    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            side = self.stem(x).tanh()
            return super().forward(x, table * 1, mask.clone(), side, side[:, :32].repeat(1, 2))

    torch.manual_seed(0)
    model, x = Shared(use_reentrant=use_reentrant), batch()
    loss, grads = step(model, x)
    packed = pack_checkpoints(model, bits=8)
    found = step(model, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02
    rows = packed.report().rows
    size = ROWS * WIDTH * 4
    kept = {row.codec: row for row in rows if row.op == "checkpoint" and row.dense_bytes != size}
    assert kept["bitmask(bits=1)"].dense_bytes == 8 * kept["bitmask(bits=1)"].kept_bytes
    (constant,) = [row for row in rows if "no gradient flows" in row.reason]
    assert constant.kept_bytes == size
    assert len([row for row in rows if row.codec == "quant(bits=8)"]) == 3 + 2


def test_keyword_arguments_and_tuples_are_handed_on() -> None:
    model, x = net(), batch()
    side = torch.randn(ROWS, WIDTH)
    loss, grads = step(model, x, (side, "a word"), 2.0, scale=0.5)
    pack_checkpoints(model, bits=8)
    found = step(model, x, (side, "a word"), 2.0, scale=0.5)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02


@pytest.mark.parametrize("inner", [False, True], ids=["plain", "reentrant"])
@REENTRANT
def test_checkpoints_in_a_checkpoint_are_left_to_it(use_reentrant: bool, inner: bool) -> None:
    class Nested(Net):
        def forward(self, x: Tensor) -> Tensor:
            def pair(x: Tensor) -> Tensor:
                for block in self.blocks[:2]:
                    x = checkpoint(block, x, use_reentrant=inner)
                return x

            x = checkpoint(pair, self.stem(x), use_reentrant=use_reentrant)
            return self.head(self.blocks[2](x)).square().mean()

    torch.manual_seed(0)
    model, x = Nested(), batch()
    loss, grads = step(model, x)
    packed = pack_checkpoints(model, bits=8)
    found = step(model, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02
    assert len(packed.report().rows) == 1


def test_a_model_without_checkpoints_is_told_how_to_turn_them_on() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    packed = pack_checkpoints(model)
    with torch.no_grad():
        model(batch())
    model.eval()(batch())
    for way in ("gradient_checkpointing_enable", "checkpoint_wrapper", "pack_saved", "backend="):
        with pytest.raises(RuntimeError, match=way):
            model.train()(batch())
    packed.remove()
    model(batch()).sum().backward()


def test_a_second_call_is_an_error_and_says_what_to_do() -> None:
    model = net()
    packed = pack_checkpoints(model)
    with pytest.raises(RuntimeError, match=r"packed already: call remove\(\)"):
        pack_checkpoints(model)
    packed.remove()
    packed.remove()
    pack_checkpoints(model, bits=4)


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "4", None])
def test_bits_that_no_value_has_are_an_error(bits: Any) -> None:
    with pytest.raises(ConfigError, match="must be 1 to 8"):
        pack_checkpoints(net(), bits=bits)
    with pytest.raises(ConfigError, match="must be 1 to 8"):
        pack_saved(bits=bits)


def test_only_the_model_that_is_packed_is_packed() -> None:
    model, other, x = net(), net(), batch()
    grads = step(other, x)[1]
    pack_checkpoints(model, bits=4)
    assert error(step(other, x)[1], grads) == 0
    assert error(step(model, x)[1], grads) > 0
    assert error(step(other, x)[1], grads) == 0


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model, x = net(), batch()
    other = net()
    grads = step(other, x)[1]
    pack_checkpoints(model, bits=4)
    for kind in (ValueError, KeyboardInterrupt):

        def fail(*args: Any, kind: type[BaseException] = kind) -> None:
            raise kind

        handle = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(kind):
            model(x)
        handle.remove()
        assert error(step(other, x)[1], grads) == 0
    assert step(model, x)[0] == step(other, x)[0]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_of_the_model_pack_as_well(how: str, tmp_path: Path) -> None:
    model, x = net(), batch()
    packed = pack_checkpoints(model, bits=4)
    found = step(model, x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert other.state_dict().keys() == net().state_dict().keys()
    assert error(step(other, x)[1], found[1]) == 0
    packed.remove()  # of the model, not of its copy
    assert error(step(other, x)[1], found[1]) == 0
    assert error(step(model, x)[1], found[1]) > 0


def test_packed_copies_are_freed_with_the_graph() -> None:
    model, x = net(), batch()
    pack_checkpoints(model)
    step(model, x)
    held: list[weakref.ref[Tensor]] = []

    def note(t: Tensor) -> Tensor:
        t = t.detach()  # a result that holds its graph would never be freed
        held.append(weakref.ref(t))
        return t

    with saved_tensors_hooks(note, lambda t: t):
        loss = model(x)

    def alive() -> int:
        tensors = [t for t in (ref() for ref in held) if t is not None]
        return len([t for t in tensors if t.dtype == torch.uint8 and t.numel()])

    assert alive() == 3
    del loss
    gc.collect()
    assert alive() == 0


def test_a_graph_goes_backward_twice() -> None:
    model, x = net(), batch()
    pack_checkpoints(model, bits=4)
    loss = model(x)
    params = list(model.parameters())
    first = torch.autograd.grad(loss, params, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, params)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, params)


def test_second_derivatives_are_refused() -> None:
    model, x = net(), batch().requires_grad_()
    pack_checkpoints(model)
    with pytest.raises(RuntimeError, match="second derivatives through packed tensors"):
        torch.autograd.grad(model(x), x, create_graph=True)


@REENTRANT
def test_autocast_and_dropout_are_made_again_as_they_were(use_reentrant: bool) -> None:
    """At a format of eight bits the gradients could not be near if masks or dtypes differed."""
    model, x = net(use_reentrant=use_reentrant), batch()
    with torch.autocast("cpu"):
        loss, grads = step(model, x)
        pack_checkpoints(model, bits=8)
        found = step(model, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.03


def test_checkpoint_wrapper_and_compiled_blocks_inside_of_checkpoints() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    wrapped = [checkpoint_wrapper(Block()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, WIDTH), *wrapped, nn.Linear(WIDTH, 1), nn.Flatten(0))
    x = batch()
    packed = pack_checkpoints(model, bits=6)
    model(x).sum().backward()
    assert len(packed.report().rows) == 2
    compiled = net()
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    loss, grads = step(compiled, x)
    packed = pack_checkpoints(compiled, bits=8)
    found = step(compiled, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02
    assert packed.report().ratio < 0.27


def test_other_hooks_around_are_handed_what_is_packed() -> None:
    model, x = net(), batch()
    pack_checkpoints(model, bits=4)
    wanted = step(model, x)
    with save_on_cpu():
        found = step(model, x)
    assert found[0] == wanted[0]
    assert error(found[1], wanted[1]) == 0


def test_threads_pack_for_themselves() -> None:
    model, other, x = net(), net(), batch()
    pack_checkpoints(model, bits=4)
    wanted = {m: step(m, x)[1]["blocks.0.up.weight"] for m in (model, other)}
    wrong: list[str] = []

    def train(m: Net) -> None:
        m = copy.deepcopy(m)
        for _ in range(5):
            m.zero_grad()
            m(x).backward()
        wrong.extend(n for n, p in m.named_parameters() if p.grad is None)

    threads = [threading.Thread(target=train, args=(m,)) for m in (model, other) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for m in (model, other):
        assert torch.equal(step(m, x)[1]["blocks.0.up.weight"], wanted[m])


# Any block of code --------------------------------------------------------------------------------


def grads_of(run: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The gradients of the sum of what ``run`` returns, under ``pack_saved`` where bits are."""
    torch.manual_seed(3)
    with pack_saved(**options) if options else contextlib.nullcontext():
        out = run(*inputs)
    return list(torch.autograd.grad(out.sum(), inputs))


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An activation: what something was made of that requires a gradient."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_() * 1


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


def test_a_model_that_is_compiled_around_its_checkpoints_is_an_error() -> None:
    model, x = net(), batch()
    packed = pack_checkpoints(model)
    with pytest.raises(RuntimeError, match=r'torch.compile\(model, backend="dropit"\)'):
        torch.compile(model, backend="aot_eager")(x)
    model(x).backward()
    assert len(packed.report().rows) == 3


def test_compiled_code_inside_of_a_block_runs_as_it_is() -> None:
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    fast, x = torch.compile(layers, backend="aot_eager"), torch.randn(ROWS, WIDTH)
    exact = torch.autograd.grad(layers(x).sum(), list(layers.parameters()))
    packed = pack_saved(bits=2)
    with packed:
        out = fast(x).sum()
    assert all(map(torch.equal, torch.autograd.grad(out, list(layers.parameters())), exact))
    assert all("no gradient flows" in row.reason for row in packed.report().rows)


# Models of other libraries ------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_twelve_layers_of_gpt2(dtype: torch.dtype, use_reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 96, "n_layer": 12, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).to(dtype).train()
    how = {"use_reentrant": use_reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    ids = torch.arange(128).view(2, 64) % 64

    def loss(**given: Tensor) -> Tensor:
        return model(input_ids=given["ids"], labels=given["ids"]).loss

    model_and_loss = nn.Module()
    model_and_loss.model, model_and_loss.forward = model, loss
    exact, grads = step(model_and_loss, ids=ids)
    dense = measure.saved_bytes(loss, ids=ids)
    packed = pack_checkpoints(model, bits=6)
    found = step(model_and_loss, ids=ids)
    assert found[0] == exact
    assert 0 < error(found[1], grads) < 0.05
    report = packed.report()
    boundary = [row for row in report.rows if row.op == "checkpoint"]
    assert sum(row.dense_bytes for row in boundary) == 12 * 2 * 64 * 96 * dtype.itemsize
    assert report.ratio <= (0.21 if dtype == torch.float32 else 0.38)
    kept = measure.saved_bytes(loss, ids=ids)
    assert dense - kept == report.dense_bytes - report.kept_bytes


def test_llama_whose_layers_share_position_tables() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).train()
    model.activation_checkpointing_enable()
    ids = torch.arange(128).view(2, 64) % 64
    exact, grads = model(input_ids=ids, labels=ids).loss, {}
    exact.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    packed = pack_checkpoints(model, bits=8)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == exact.item()
    assert error({n: p.grad for n, p in model.named_parameters()}, grads) < 0.02
    assert packed.report().ratio < 0.27


def test_timm_and_diffusers() -> None:
    timm, diffusers = pytest.importorskip("timm"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3, num_classes=4)
    vit.set_grad_checkpointing()
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.enable_gradient_checkpointing()
    noisy, steps = torch.randn(2, 3, 16, 16), torch.arange(2)
    for model, run in (
        (vit.train(), lambda: vit(torch.ones(2, 3, 64, 64).cumsum(-1) / 64).square().mean()),
        (unet.train(), lambda: unet(noisy, steps).sample.square().mean()),
    ):
        grads = dict.fromkeys(["exact", "found"])
        for name in grads:
            if name == "found":
                packed = pack_checkpoints(model, bits=8)
            model.zero_grad()
            run().backward()
            grads[name] = {n: p.grad.clone() for n, p in model.named_parameters()}
        assert error(grads["found"], grads["exact"]) < 0.05
        report = packed.report()
        assert len(report.rows) >= 3
        assert report.ratio < 0.3


def test_a_model_whose_forward_is_called_and_not_the_model() -> None:
    """As wrappers do that hand on to what they wrap: no hook of the model runs then."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.forward(x)

    model, x = Wrapper(), batch()
    grads = step(model, x)[1]
    packed = pack_checkpoints(model.inner, bits=8)
    for _ in range(2):
        assert 0 < error(step(model, x)[1], grads) < 0.02
    assert len(packed.report().rows) == 3
    packed.remove()
    assert error(step(model, x)[1], grads) == 0


def test_a_model_inside_of_peft() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    base = transformers.GPT2LMHeadModel(config).train()
    base.activation_checkpointing_enable()
    packed = pack_checkpoints(base, bits=8)
    lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, lora)
    ids = torch.arange(128).view(2, 64) % 64
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    rows = packed.report().rows
    assert [row.codec for row in rows if row.op == "checkpoint"] == ["quant(bits=8)"] * 3
