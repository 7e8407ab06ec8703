"""Streams, events and freed memory of a card that is not there: accesses that nothing orders, memory freed too early.

Everything is computed on the CPU at once. `Streams` lets some tensors say that they are on `cuda:0`, stands in for
`torch.cuda`'s streams and events, and keeps for every stream, and for the host, what is known to have happened before
it (vector clocks; Lamport 1978, Mattern 1989). A fault is

    an access     of what another stream (or the host) has written, or a write over what another has still to read, with
                  no event, wait or `record_stream` between the two
    a free        of memory that another stream than its own still uses: the allocator hands it on at once

Pinned host memory is the allocator's until copies that were queued are done, so it may be freed early; it must not be
read or written early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Streams"]

DEVICE = torch.device("cuda", 0)
HOST = "host"
Clock = dict[str, int]


class _Stream:
    """One queue of work, and what is known to come before its next piece."""

    def __init__(self, card: Streams, name: str) -> None:
        self.card, self.name, self.clock = card, name, Clock()

    def tick(self) -> int:
        if self.name != HOST:
            self.join(self.card.host.clock)  # queued by the host, after all that it has done
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]

    def join(self, clock: Clock) -> None:
        for name, time in clock.items():
            self.clock[name] = max(time, self.clock.get(name, 0))

    def wait_stream(self, other: _Stream) -> None:
        if "wait_stream" not in self.card.forgetting:
            self.join(other.clock)

    def wait_event(self, event: _Event) -> None:
        if "wait_event" not in self.card.forgetting:
            self.join(event.clock)

    def record_event(self) -> _Event:
        event = _Event(self.card)
        event.record(self)
        return event


class _Event:
    def __init__(self, card: Streams) -> None:
        self.card, self.clock = card, Clock()

    def record(self, stream: _Stream | None = None) -> None:
        self.clock = dict((stream or self.card.current).clock)

    def synchronize(self) -> None:
        self.card.host.join(self.clock)


class _Memory:
    """What has been done to a storage."""

    def __init__(self, tensor: torch.Tensor, owner: str, *, on_device: bool) -> None:
        self.alive = StorageWeakRef(tensor.untyped_storage())
        self.what = f"{tuple(tensor.shape)} of {owner}"
        self.owner, self.on_device = owner, on_device
        self.written: tuple[str, int] | None = None
        self.used: Clock = {}
        """Last time of each stream's accesses."""
        self.recorded: set[str] = set()


class Streams(TorchFunctionMode):
    """Watches a block of code.

    with Streams([*model.parameters()]) as card:
        step(model)
    assert not card.faults

    Args:
        on_device: tensors that are there already.
        forgetting: a call of a stream or tensor that has no effect: a planted fault.

    Attributes:
        faults: in words.
        copies: bytes that went from the device to the host, or back.
    """

    def __init__(self, on_device: Iterable[torch.Tensor] = (), *, forgetting: str = "") -> None:
        super().__init__()
        self.forgetting = forgetting
        self.faults: list[str] = []
        self.copies = 0
        self.host, self.compute = _Stream(self, HOST), _Stream(self, "compute")
        self.current, self._streams = self.compute, {"compute": self.compute}
        self._memory: dict[int, _Memory] = {}
        self._recorder = _Recorder(self)
        self._patch = pytest.MonkeyPatch()
        for tensor in on_device:
            self.note(tensor, on_device=True)

    def __enter__(self) -> Streams:
        for name, stand_in in {
            "Stream": lambda device=None: self._new_stream(),
            "Event": lambda **_: _Event(self),
            "current_stream": lambda device=None: self.current,
            "stream": self._on,
        }.items():
            self._patch.setattr(torch.cuda, name, stand_in)
        self._patch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream)
        )
        run = torch.autograd._engine_run_backward
        self._patch.setattr(torch.autograd, "_engine_run_backward", partial(self._backward, run))
        # Below Python, where checkpointing looks at what is saved, tensors say that they are on the CPU.
        checks = checkpoint._allowed_determinism_checks_to_fns
        self._patch.setitem(checks, "default", lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype})
        self._recorder.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._recorder.__exit__(*error)
        self._patch.undo()
        self.look_for_freed()

    def _backward(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        # It comes back to Python, for what was saved and is computed again: torch has taken this mode off meanwhile.
        super().__enter__()
        try:
            return run(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _new_stream(self) -> _Stream:
        name = f"stream {len(self._streams)}"
        return self._streams.setdefault(name, _Stream(self, name))

    @contextlib.contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _record(self, tensor: torch.Tensor, stream: _Stream) -> None:
        memory = self.memory(tensor)
        assert memory is not None, "memory of the host has no stream"
        if "record_stream" not in self.forgetting:
            memory.recorded.add(stream.name)

    def memory(self, tensor: torch.Tensor) -> _Memory | None:
        """Return what is known of a tensor's storage."""
        return self._memory.get(tensor.untyped_storage()._cdata)

    def note(self, tensor: torch.Tensor, *, on_device: bool) -> _Memory:
        """Take note of new memory: of the device, or pinned."""
        owner = self.current.name if on_device else HOST
        return self._memory.setdefault(
            tensor.untyped_storage()._cdata, _Memory(tensor, owner, on_device=on_device)
        )

    def look_for_freed(self) -> None:
        """Judge the memory that nobody holds any longer."""
        for key, memory in list(self._memory.items()):
            if not memory.alive.expired():
                continue
            del self._memory[key]
            if not memory.on_device:
                continue
            known = self._streams[memory.owner].clock
            for stream, time in memory.used.items():
                if stream not in (memory.owner, HOST, *memory.recorded) and known.get(stream, 0) < time:
                    self.faults.append(f"{memory.what} is freed while {stream} uses it")

    def access(self, tensor: torch.Tensor, stream: _Stream, *, write: bool) -> None:
        """Note an access by work that has just been queued on a stream, or by the host."""
        memory = self.memory(tensor)
        if memory is None:
            return
        earlier = dict(memory.used) if write else dict([memory.written] if memory.written else [])
        for name, time in earlier.items():
            if name != stream.name and stream.clock.get(name, 0) < time:
                verb = "writes" if write else "reads"
                self.faults.append(f"{stream.name} {verb} {memory.what} before {name} is done with it")
        time = stream.clock[stream.name]
        memory.used[stream.name] = time
        if write:
            memory.written = (stream.name, time)

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor says that it is on the device."""
        memory = self.memory(tensor)
        return memory is not None and memory.on_device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return DEVICE if self.is_on_device(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return self.is_on_device(args[0])
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self.note(pinned, on_device=False)
            return pinned
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.copy_):
            return self._moved(func, args, kwargs)
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.__bool__):
            self._read_by_host(args[0])
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda":
            kwargs["device"] = "cpu"
        else:
            target = None
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if target is not None or pinned:
            self.note(result, on_device=not pinned)
        return result

    def _read_by_host(self, tensor: torch.Tensor) -> None:
        if self.is_on_device(tensor):
            self.host.join(self.current.clock)  # waits for what is queued
        self.host.tick()
        self.access(tensor, self.host, write=False)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy between host and device, or as torch does otherwise."""
        if func is torch.Tensor.copy_:
            into, source = args[0], args[1]
        else:
            source, into = args[0], None
            places = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str))]
            types = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
            target = "cpu" if func is torch.Tensor.cpu else (torch.device(places[0]).type if places else None)
            if target is None or (target == "cuda") == self.is_on_device(source):
                return source.to(*types, copy=kwargs.get("copy", False)) if target else func(*args, **kwargs)
        there = self.is_on_device(source)
        if into is not None and self.is_on_device(into) == there:
            return func(*args, **kwargs)
        with self._recorder.paused():
            if into is None:
                into = source.clone() if not types else source.to(types[0], copy=True)
                self.note(into, on_device=not there)
                if there and not kwargs.get("non_blocking"):
                    del self._memory[into.untyped_storage()._cdata]  # pageable
            else:
                into.copy_(source)
        self.copies += into.nbytes
        self.current.tick()
        self.access(source, self.current, write=False)
        self.access(into, self.current, write=True)
        outside = into if there else source
        if not kwargs.get("non_blocking") or self.memory(outside) is None:
            self.host.join(self.current.clock)
        return into


class _Recorder(TorchDispatchMode):
    """Notes which memory each operation reads and writes."""

    def __init__(self, card: Streams) -> None:
        super().__init__()
        self._card, self._paused = card, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        card = self._card
        if self._paused:
            return result
        card.look_for_freed()
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(card.is_on_device(x) for x in inputs)
        stream = card.current if there else card.host
        written = {
            x.untyped_storage()._cdata
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(value)
            if isinstance(x, torch.Tensor)
        }
        if func.is_view:
            return result
        stream.tick()
        before = {x.untyped_storage()._cdata for x in inputs}
        for x in inputs:
            card.access(x, stream, write=x.untyped_storage()._cdata in written)
        for x in tree_leaves(result):
            if there and isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in before:
                card.note(x, on_device=True)
                card.access(x, stream, write=True)
        return result
