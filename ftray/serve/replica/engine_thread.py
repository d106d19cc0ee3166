"""An engine in a thread of its own, driven from asyncio. The engine is only ever touched by that thread."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ftray.errors import FtrayError
from ftray.infer.protocol import Engine, Request, TokenEvent

IDLE_POLL_S = 1.0
FOLLOW_UP_S = 0.001
MAX_COMMANDS_S = 0.05  # beside answers that go on: a burst of requests does not stop them

Item = TypeVar("Item")


class EngineRunner:
    def __init__(self, engine: Engine, *, failed: Callable[[BaseException], None] = lambda error: None):
        """`failed` is called in the engine's thread when a step has raised and its callers are told."""
        self.engine = engine
        self._report_failed = failed
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="ftray-engine", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs `function` in the engine's thread, between two steps."""
        future: Future = Future()
        self._commands.put((function, future))
        if self._ended:  # nobody takes commands any more, perhaps since a moment ago
            self._refuse_commands()
        return await asyncio.wrap_future(future)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """The request's tokens as they come. Leaving early frees its place at once."""
        events: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()
        self._streams[request.id] = (asyncio.get_running_loop(), events)
        unfinished = request.sampling.n
        try:
            await self.call(lambda: self.engine.add(request))
            while unfinished:
                event = await events.get()
                if isinstance(event, BaseException):
                    unfinished = 0
                    raise FtrayError(f"the engine has stopped: {event}")
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            self._streams.pop(request.id, None)
            if unfinished:
                self._commands.put((lambda: self.engine.cancel(request.id), Future()))

    @property
    def is_alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    def close(self) -> None:
        self._closing = True
        self._commands.put((lambda: None, Future()))
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended = True
            self._refuse_commands()
            for request_id in list(self._streams):
                with contextlib.suppress(RuntimeError):  # its event loop has ended too
                    self._deliver(request_id, self.failure or FtrayError("it was closed"))
            if self.failure is not None:
                self._report_failed(self.failure)

    def _work(self) -> None:
        while not self._closing:
            self._run_commands(block=not self.engine.has_work)
            if self.engine.has_work:
                try:
                    events = self.engine.step()
                except Exception as error:  # noqa: BLE001  told to every caller; the replica's health check fails
                    self.failure = error
                    return
                for event in events:
                    self._deliver(event.request_id, event)

    def _run_commands(self, *, block: bool) -> None:
        try:
            function, future = self._commands.get(block=block, timeout=IDLE_POLL_S if block else None)
        except queue.Empty:
            return
        began = time.monotonic()
        while True:  # what a finished command leads to (a load to the request that waited for it) is not a step late
            if future.set_running_or_notify_cancel():  # False: the caller has gone away
                try:
                    future.set_result(function())
                except Exception as error:  # noqa: BLE001  carried to the caller
                    future.set_exception(error)
            if self.engine.has_work and time.monotonic() - began > MAX_COMMANDS_S:
                return
            try:
                function, future = self._commands.get(timeout=FOLLOW_UP_S)
            except queue.Empty:
                return

    def _deliver(self, request_id: str, event: TokenEvent | BaseException) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            loop, events = stream
            loop.call_soon_threadsafe(events.put_nowait, event)

    def _refuse_commands(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future = self._commands.get_nowait()[1]
                if future.set_running_or_notify_cancel():
                    future.set_exception(FtrayError(f"the engine has stopped: {self.failure or 'it was closed'}"))


async def merged(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[tuple[int, Item]]:
    """The items of all streams as they come, each with its stream's number. Closing it closes them all."""
    items: asyncio.Queue[tuple[int, Item] | BaseException | None] = asyncio.Queue()

    async def read(number: int, stream: AsyncGenerator[Item]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    items.put_nowait((number, item))
            items.put_nowait(None)
        except Exception as error:  # noqa: BLE001  raised where the items are read
            items.put_nowait(error)

    readers = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        unfinished = len(readers)
        while unfinished:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
