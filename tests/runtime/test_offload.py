"""Packed bytes on the host: order, memory and waits, on a device that is not there.

The fake link does nothing until it must: a copy runs when somebody waits for it, or for one behind
it, and what is not copied yet holds garbage. So a wait that is missing is a wrong number, and a
source that is let go too early is an error.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from offload_link import connect
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dropit_fx import ConfigError, load_config, report, transform
from dropit_fx.codecs import CODECS
from dropit_fx.measure import Watch, saved_bytes
from dropit_fx.runtime import offload
from dropit_fx.runtime.offload import Lane, Pool, layer_of


class Link:
    """A device whose copies run as late as they may."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.log: list[str] = []  # what was begun, in order
        self.memory: list[Tensor] = []
        self.sources: list[weakref.ref[Tensor]] = []
        self.results: list[weakref.ref[Tensor]] = []
        self._queue: list[tuple[Any, Any]] = []
        self._done = 0

    def ready(self) -> bool:
        return True

    def room(self, nbytes: int) -> Tensor:
        self.memory.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return self.memory[-1]

    def send(self, x: Tensor, host: Tensor) -> int:
        self.log.append(f"send {x.flatten()[0]:g}")
        self.sources.append(weakref.ref(x))
        return self._enqueue(weakref.ref(self._room(host)), weakref.ref(x))

    def bring(self, host: Tensor) -> tuple[Tensor, int]:
        back = torch.empty_like(host)
        back.view(torch.uint8).fill_(255)
        self.results.append(weakref.ref(back))
        return back, self._enqueue(weakref.ref(back), weakref.ref(self._room(host)))

    def wait(self, copy: int, x: Tensor) -> None:
        for into, source in self._queue[self._done : copy]:
            self._done += 1
            value, target = source(), into()
            assert value is not None, "a source was let go before its copy"
            assert target is not None, "what was copied into was let go before that"
            flat(target.data).copy_(flat(value))  # no write of a user's

    def _enqueue(self, into: Any, source: Any) -> int:
        self._queue.append((into, source))
        return len(self._queue)

    def _room(self, host: Tensor) -> Tensor:
        return next(m for m in self.memory if m.data_ptr() == host.data_ptr())


def flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def there(refs: list[weakref.ref[Tensor]]) -> list[float]:
    return [float(x.flatten()[0]) for x in (ref() for ref in refs) if x is not None]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    """The CPU as a device, with a link to the host."""
    made = Link()
    connect(monkeypatch, made)
    return made


# The pool -----------------------------------------------------------------------------------------


def test_a_room_is_used_again_when_nothing_holds_what_lay_there() -> None:
    pool = Pool(lambda n: torch.zeros(n, dtype=torch.uint8))
    first = pool.take(64)
    held = first.memory.view(torch.float32)[3:]
    assert pool.take(64) is not first, "a view of it is held"
    del held
    assert pool.take(64) is first


def test_rooms_of_other_sizes_are_let_go_when_a_new_size_comes() -> None:
    gone: list[offload.Room] = []
    pool = Pool(lambda n: torch.zeros(n, dtype=torch.uint8), gone.append)
    free, used = pool.take(32), pool.take(64)
    held = used.memory[:8]
    pool.take(128)
    assert (gone, pool.nbytes) == ([free], 64 + 128)
    del held
    assert pool.take(64) is used, "what was held is still there"


# The order ----------------------------------------------------------------------------------------


def value(number: float, size: int = 16) -> Tensor:
    return torch.full((size,), float(number))


def test_one_layer_comes_back_ahead_and_no_more() -> None:
    link = Link()
    lane = Lane(link)
    hosts = {n: lane.send(value(n), f"layer {n // 10}") for n in (10, 11, 20, 30, 31)}
    assert link.log == ["send 10", "send 11", "send 20", "send 30", "send 31"]
    assert len(link.results) == 0
    assert lane.read(hosts[31])[0] == 31
    assert len(link.results) == 3, "layer 3, and layer 2 ahead of it"
    assert lane.read(hosts[30])[0] == 30
    assert len(link.results) == 3, "it was there"
    assert lane.read(hosts[20])[0] == 20
    assert len(link.results) == 5, "layer 1 is ahead"
    assert there(link.results[:2]) == [], "layer 3 has gone"
    assert [lane.read(hosts[n])[0].item() for n in (11, 10)] == [11, 10]
    assert len(link.results) == 5


def test_sources_of_two_layers_wait_for_their_copies_at_most() -> None:
    link = Link()
    lane = Lane(link)
    hosts = []
    for n in range(8):
        hosts += [lane.send(value(n), f"layer {n}")]
        assert len(there(link.sources)) <= 2
    lane.read(hosts[-1])
    assert there(link.sources) == [], "a backward has begun"


def test_several_forwards_go_backward_the_last_first_and_another_order_is_right_too() -> None:
    for order in ((3, 2, 1, 0), (1, 0, 3, 2), (0, 1, 2, 3), (3, 3, 0, 0, 2, 1, 3)):
        link = Link()
        lane = Lane(link)
        hosts = [lane.send(value(n), f"layer {n % 2}") for n in range(4)]
        assert [lane.read(hosts[n])[0].item() for n in order] == [*order]
    link = Link()
    lane = Lane(link)
    hosts = [lane.send(value(n), f"layer {n % 2}") for n in range(4)]
    lane.read(hosts[3])
    lane.read(hosts[2])
    assert len(link.results) == 3, "the last layer of the forward before is ahead"


def test_what_nothing_holds_is_not_brought_back() -> None:
    link = Link()
    lane = Lane(link)
    hosts = [lane.send(value(n), f"layer {n}") for n in range(3)]
    hosts[1] = torch.empty(0)  # its part of the graph is gone
    lane.read(hosts[2])
    assert len(link.results) == 1
    again = lane.send(value(7), "layer 0")
    assert lane.read(again)[0] == 7
    assert len(link.memory) == 3, "the room of the dead one"
    assert lane.read(hosts[0])[0] == 0


def test_a_copy_ahead_that_nobody_reads_is_waited_for() -> None:
    link = Link()
    lane = Lane(link)
    for _ in range(3):  # each backward stops in the last layer
        hosts = [lane.send(value(n), f"layer {n}") for n in range(3)]
        assert lane.read(hosts[2])[0] == 2
    assert len(link.memory) <= 6


@pytest.mark.parametrize("names", [("a", "b"), ("b", "b"), ("b", "a")])
def test_a_new_forward_lets_go_what_the_backward_has_left(names: tuple[str, str]) -> None:
    link = Link()
    lane = Lane(link)
    hosts = [lane.send(value(n), name) for n, name in enumerate(names)]
    lane.read(hosts[1])
    assert len(there(link.results)) == 2
    hosts += [lane.send(value(2), names[0])]
    assert there(link.results) == []
    assert [lane.read(host)[0].item() for host in reversed(hosts)] == [2, 1, 0]


def test_the_layer_is_the_block() -> None:
    assert layer_of("blocks.3.mlp.fc1", "linear") == "blocks.3"
    assert layer_of("encoder.layer.10.attention.self", "matmul") == "encoder.layer.10"
    assert layer_of("stages.1.blocks.12.conv", "conv2d") == "stages.1.blocks.12"
    assert layer_of("7", "linear") == "7"
    assert layer_of("layer1.conv", "conv2d") == "layer1.conv", "a number in a name is none"
    assert layer_of("", "gelu_2") == "gelu_2"


# Models -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(F.relu(self.up(self.norm(x))), 0.1, self.training))


class Smooth(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Recomputed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x * 2, use_reentrant=False)


def blocks(kind: type[Block] = Block) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(3)))


X = torch.linspace(-2, 2, 64 * 16).sin().view(64, 16)


def gradients(model: nn.Module, times: int = 1) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(X).square().sum()
    for i in range(times):
        loss.backward(retain_graph=i + 1 < times)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def rules_of(codec: str) -> dict[str, Any]:
    """A config in which a codec keeps what it can; low ranks are small enough to pay."""
    options = {"rank": 4} if codec == "low_rank" else {}
    return {"preset": "balanced", "rules": [{"codec": codec, **options}], "derive": False}


@pytest.mark.parametrize("codec", [c.name for c in CODECS if c.name not in ("keep", "drop")])
def test_it_composes_with_every_codec(link: Link, codec: str) -> None:
    model, rules = blocks(Smooth if codec == "few_bit" else Block), rules_of(codec)
    expected = gradients(transform(model, rules, example_args=(X,)))
    assert link.log == []
    packed = transform(model, rules | {"offload": True}, example_args=(X,))
    told = report(packed)
    found = gradients(packed)
    assert all(map(torch.equal, found, expected))
    assert len(link.results) == len(link.log) > 3
    mine = [row for row in told.rows if codec in row.codecs]
    assert mine
    assert all(row.host_bytes == row.kept_bytes for row in mine)
    assert sum(m.nbytes for m in link.memory) == told.host_bytes
    assert f"{codec}" in told.summary()
    assert "on the host" in told.summary()


@pytest.mark.parametrize("kind", [Block, Smooth, Recomputed])
def test_steps_use_the_memory_of_the_step_before(link: Link, kind: type[Block]) -> None:
    model = blocks(kind)
    config = {"norm_values": 0}
    expected = gradients(transform(model, config, example_args=(X,)))
    packed = transform(model, config | {"offload": True}, example_args=(X,))
    rooms = None
    for _ in range(3):
        assert all(map(torch.equal, gradients(packed), expected))
        rooms = rooms or len(link.memory)
    assert 0 < rooms == len(link.memory)
    twice = gradients(packed, times=2)
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice, expected, strict=True))
    outputs = [packed(X) for _ in range(3)]
    del outputs[1]
    model.zero_grad()
    torch.manual_seed(1)
    sum(out.sum() for out in outputs).backward()


def test_by_channel_and_convolutions(link: Link) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(4, 3, 12, 12)

    def backward(offloaded: bool) -> list[Tensor]:
        packed = transform(model, {"offload": offloaded}, example_args=(x,))
        model.zero_grad()
        packed(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, backward(True), backward(False)))
    assert link.log


def test_under_hooks_what_is_saved_stays_theirs(link: Link) -> None:
    packed = transform(blocks(), {"offload": True}, example_args=(X,))
    with saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = packed(X).square().sum()
    loss.backward()
    assert link.log == []
    assert saved_bytes(packed, X) == report(packed).kept_bytes
    assert report(packed).host_bytes > 0


def test_each_step_is_measured_with_what_waits_on_the_host(link: Link) -> None:
    """The host's memory is there before the second step, and is not of before for that."""
    found = []
    for offloads in (False, True):
        packed = transform(blocks(), {"offload": offloads}, example_args=(X,))
        for _ in range(3):
            watch = Watch()
            loss = packed(X).square().sum()
            found.append(watch.saved_bytes(loss))
            loss.backward()
    assert link.log
    assert len({*found}) == 1


def test_rules_say_what_waits_on_the_host(link: Link) -> None:
    for offloads, expected in ((True, {"1"}), (False, {"0", "2"})):
        rules = [
            {"module": "1*", "codec": name, "offload": offloads} for name in ("quant", "bitmask")
        ]
        config = {"rules": rules, "offload": not offloads}
        packed = transform(blocks(), config, example_args=(X,))
        assert {row.module[0] for row in report(packed).rows if row.host_bytes} == expected


# Where there is no device -------------------------------------------------------------------------


def test_on_a_cpu_it_changes_nothing_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    model = blocks()
    plain = transform(model, example_args=(X,))
    packed = transform(model, {"offload": True}, example_args=(X,))
    told, before = report(packed), report(plain)
    assert (told.kept_bytes, told.host_bytes) == (before.kept_bytes, 0)
    assert all(map(torch.equal, gradients(packed), gradients(plain)))
    notes = {row.note for row in told.rows if row.kept_bytes and not row.reason}
    assert notes == {"not offloaded: no device to offload from"}
    assert "no device" not in str(before)
    assert "from cuda alone, not from xpu" in offload.obstacle("xpu")


def test_small_copies_stay_on_the_device(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 10**6)
    packed = transform(blocks(), {"offload": True}, example_args=(X,))
    gradients(packed)
    assert (link.log, report(packed).host_bytes) == ([], 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"offload": 1}, "'offload' is true or false, not 1"),
        ({"rules": [{"codec": "quant", "offload": "yes"}]}, "'offload' is true or false"),
        ({"rules": [{"codec": "keep", "offload": True}]}, "as it is, a tensor stays on its device"),
    ],
)
def test_what_it_may_not_say(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config)


@pytest.mark.parametrize(
    "config",
    [{"offload": True}, {"rules": [{"codec": "quant", "offload": True}]}],
)
def test_compiled_code_refuses_it(config: dict[str, Any]) -> None:
    options = {"config": config, "inner": "aot_eager"}
    compiled = torch.compile(nn.Linear(16, 16), backend="dropit", options=options)
    with pytest.raises(Exception, match="compiled code keeps packed tensors on the device"):
        compiled(X)


def test_a_rewritten_model_that_is_compiled_keeps_them_on_the_device(link: Link) -> None:
    packed = transform(blocks(Smooth), {"offload": True}, example_args=(X,))
    expected = gradients(packed)
    before = len(link.log)
    found = gradients(torch.compile(packed, backend="aot_eager"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(link.log) == before
