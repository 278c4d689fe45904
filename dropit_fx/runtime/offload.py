"""Packed bytes wait on the host for their backward, and come back one layer ahead of it.

Copies run on a stream of their own, beside the work of the device. A *layer* is what a rule's name
says (:func:`layer_of`), and the unit of time: in the forward, at most two layers have bytes on
their way to the host; in the backward, the layer that is read and the one that is read next have
theirs on the device. The order of the backward is that of the forward turned round, also over
several forwards; where it is another, bytes come late, or twice, and are right.

In eager mode alone. PyTorch's own ops for compiled graphs (``ao.offload``, from 2.14) are put there
by its partitioner, for tensors of its own choice; packed tensors stay on the device there.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dropit_fx.holders import reused_memory
from dropit_fx.private import counts_storage_users, storage_users
from dropit_fx.private_hooks import hooks_in_force

OFFLOAD = "offload"  # beside the options of a codec: the layer whose backward reads the copy
SMALLEST = 2**16  # bytes of a copy: fewer are there sooner than a transfer has begun
_NUMBERED = re.compile(r"(?:.*\.)?\d+(?=\.|$)")


def layer_of(module: str, node: str) -> str:
    """The layer that a reader belongs to: ``blocks.3`` of ``blocks.3.mlp.fc1``.

    The longest part of its module's name that ends in a number, else the name; of no module, the
    node itself.
    """
    numbered = _NUMBERED.match(module)
    return numbered[0] if numbered else module or node


def obstacle(device: str) -> str:
    """Why nothing is offloaded from a type of device, or ``""``."""
    if not counts_storage_users():
        return "this PyTorch does not tell who holds memory of the host"
    if device in LINKS:
        return ""
    if device in ("cpu", "meta"):
        return "no device to offload from"
    return f"from {', '.join(LINKS)} alone, not from {device}"


class Link(Protocol):
    """What copies between one device and the host. Its copies run one behind the other."""

    def ready(self) -> bool:
        """Whether something may be sent now."""

    def room(self, nbytes: int) -> Tensor:
        """Host memory, uint8, that copies need not wait for."""

    def send(self, x: Tensor, host: Tensor) -> Any:
        """Begins to copy ``x`` as the device's work up to here leaves it; what ``wait`` takes."""

    def bring(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begins to copy back into a new tensor, behind the device's work up to here."""

    def wait(self, copy: Any, x: Tensor) -> None:
        """Lets the device's work from here on, and new users of the memory of ``x``, come later."""


class _Cuda:
    """Of a GPU: its own stream, and pinned memory. The host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def ready(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def room(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def send(self, x: Tensor, host: Tensor) -> Any:
        return self._copy(host, x)

    def bring(self, host: Tensor) -> tuple[Tensor, Any]:
        x = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        return x, self._copy(x, host)

    def _copy(self, into: Tensor, x: Tensor) -> tuple[torch.cuda.Event, torch.cuda.Stream]:
        work = torch.cuda.current_stream(self._device)
        self._side.wait_stream(work)
        with torch.cuda.stream(self._side):
            into.copy_(x, non_blocking=True)
            return self._side.record_event(), work

    def wait(self, copy: Any, x: Tensor) -> None:
        event, owner = copy  # the allocator gives the memory of `x` away behind the owner's work
        owner.wait_event(event)
        work = torch.cuda.current_stream(self._device)
        if work != owner:
            work.wait_event(event)
            x.record_stream(work)


LINKS: dict[str, Callable[[torch.device], Link]] = {"cuda": _Cuda}


@dataclass(eq=False)
class Room:
    """Some memory of the host, and how many users it has while nothing lies there."""

    memory: Tensor
    idle: int

    @property
    def held(self) -> bool:
        """Whether something holds what lies there."""
        return storage_users(self.memory) > self.idle


class Pool:
    """Host memory that is used again when nothing holds what lay there: by size, as steps repeat.

    A size that is not there lets go of what is not in use: a batch of other sizes has begun.
    """

    def __init__(
        self, memory: Callable[[int], Tensor], let_go: Callable[[Room], object] = lambda room: None
    ) -> None:
        self._memory, self._let_go = memory, let_go  # told before it is
        self._rooms: dict[int, list[Room]] = {}

    def take(self, nbytes: int) -> Room:
        """A room of so many bytes."""
        free = next((room for room in self._rooms.get(nbytes, ()) if not room.held), None)
        if free is not None:
            return free
        for size, rooms in list(self._rooms.items()):
            for room in [room for room in rooms if not room.held]:
                self._let_go(room)
                rooms.remove(room)
            if not rooms:
                del self._rooms[size]
        memory = self._memory(nbytes)
        room = Room(memory, storage_users(memory))
        self._rooms.setdefault(nbytes, []).append(room)
        return room

    @property
    def memory(self) -> list[Tensor]:
        """Of each room."""
        return [room.memory for rooms in self._rooms.values() for room in rooms]

    @property
    def nbytes(self) -> int:
        """Of all rooms."""
        return sum(memory.nbytes for memory in self.memory)


@dataclass(eq=False)
class _Layer:
    """What one layer has sent, by address, in order; and the layer before it in the forward."""

    name: str
    before: Callable[[], _Layer | None]
    sent: dict[int, None] = field(default_factory=dict)


@dataclass(eq=False)
class _Sent:
    """A tensor on the host."""

    room: Room
    shape: torch.Size
    dtype: torch.dtype
    layer: _Layer
    back: tuple[Tensor, Any] | None = None  # on the device again, and the copy that brings it

    def on_host(self) -> Tensor:
        """The tensor; who has it holds the room."""
        return self.room.memory.view(self.dtype).view(self.shape)


class Lane:
    """What goes to the host and comes back over one link."""

    def __init__(self, link: Link) -> None:
        self.pool = Pool(link.room, self._forget)
        self._link, self._lock = link, threading.RLock()
        self._sent: dict[int, _Sent] = {}  # by address
        self._leaving: list[tuple[_Layer, Tensor, Any]] = []  # sources of copies under way
        self._back: list[_Sent] = []  # what the device has again
        self._last: _Layer | None = None  # of the forward
        self._turned = True  # whether a backward has read since

    def send(self, x: Tensor, name: str) -> Tensor:
        """``x``, contiguous, for the backward of a layer: what is saved in its place."""
        with self._lock:
            last = self._last
            if last is None or self._turned or last.name != name:
                self._arrived(besides=last)
                self._leave(())
                self._last = last = _Layer(name, weakref.ref(last) if last else lambda: None)
                self._turned = False
            room = self.pool.take(x.nbytes)
            sent = _Sent(room, x.shape, x.dtype, last)
            host = sent.on_host()
            self._leaving.append((last, x, self._link.send(x, host)))
            self._sent[host.data_ptr()] = sent
            last.sent[host.data_ptr()] = None
            return host

    def ready(self) -> bool:
        """Whether something may be sent now."""
        return self._link.ready()

    def holds(self, host: Tensor) -> bool:
        """Whether a tensor of the host is what :meth:`send` returned."""
        return host.data_ptr() in self._sent and bool(host.numel())

    def read(self, host: Tensor) -> Tensor:
        """On the device again, what :meth:`send` was given for ``host``."""
        with self._lock:
            sent = self._sent[host.data_ptr()]
            self._turned = True
            self._arrived(besides=None)
            ahead = sent.layer.before()
            near = (sent.layer,) if ahead is None else (sent.layer, ahead)
            self._leave(near)
            for layer in near:
                self._bring(layer)
            assert sent.back is not None
            back, copy = sent.back
            self._link.wait(copy, back)
            return back

    def _arrived(self, besides: _Layer | None) -> None:
        """Lets sources go, of all layers but one, behind their copies."""
        for layer, x, copy in self._leaving:
            if layer is not besides:
                self._link.wait(copy, x)
        self._leaving = [one for one in self._leaving if one[0] is besides]

    def _leave(self, near: Sequence[_Layer]) -> None:
        """Lets go on the device what is of no layer that is near."""
        for sent in self._back:
            if sent.layer not in near:
                self._drop(sent)
        self._back = [sent for sent in self._back if sent.back is not None]

    def _drop(self, sent: _Sent) -> None:
        if sent.back is not None:  # behind its copy, which may have been begun for nobody
            back, copy = sent.back
            self._link.wait(copy, back)
            sent.back = None

    def _forget(self, room: Room) -> None:
        sent = self._sent.pop(room.memory.data_ptr(), None)
        if sent is not None:
            self._drop(sent)

    def _bring(self, layer: _Layer) -> None:
        """Begins to bring back what a layer has sent and something holds, the last first."""
        for address in reversed(layer.sent):
            sent = self._sent.get(address)
            if sent is None or sent.layer is not layer or sent.back is not None:
                continue
            if sent.room.held:
                sent.back = self._link.bring(sent.on_host())
                self._back.append(sent)


_lanes: dict[torch.device, Lane] = {}


def host_memory() -> list[Tensor]:
    """What the host has for packed bytes, of all devices: it is there from step to step."""
    return [memory for lane in _lanes.values() for memory in lane.pool.memory]


reused_memory.append(host_memory)


def offloaded(parts: tuple[Tensor, ...], layer: str) -> tuple[Tensor, ...]:
    """Packed tensors as the host has them, where they are of a device that offloads.

    Where saved-tensor hooks are in force, they get the tensors as they are: what they hold is no
    longer ours to bring back, and a checkpointed region saves nothing.
    """
    x = next((p for p in parts if p.device.type in LINKS), None)
    if x is None or hooks_in_force() is not None or not counts_storage_users():
        return parts
    if x.device not in _lanes:
        _lanes.setdefault(x.device, Lane(LINKS[x.device.type](x.device)))
    lane = _lanes[x.device]
    if not lane.ready():
        return parts
    return tuple(
        lane.send(p.contiguous(), layer) if p.device == x.device and p.nbytes else p for p in parts
    )


def brought_back(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Packed tensors as the device has them, whose copies were sent by :func:`offloaded`."""
    if torch.compiler.is_compiling() or not _lanes:
        return parts
    return tuple(map(_brought_back, parts))


def _brought_back(x: Tensor) -> Tensor:
    if type(x) is Tensor and x.device.type == "cpu":
        for lane in tuple(_lanes.values()):
            if lane.holds(x):
                return lane.read(x)
    return x
