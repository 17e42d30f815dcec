"""Work that takes long: it leaves a thread to others, ends when nobody waits for it, and leaves nothing in memory."""

import asyncio
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from guard.classifiers import ExportedClassifier, decode
from guard.errors import RequestError
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar import Settings
from guard.sidecar.decisions import images, inputs
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.loading import Loaded
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import LargeWorkError, OverloadedError, Workers, checkpoint
from guard.sidecar.policy import Reason
from guard.sidecar.telemetry.metrics import Metrics

WAIT = 30
T = TypeVar("T")


class Thing:
    """Something that can be seen to be freed."""


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(2, 8)
    yield made
    made.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what is in no circle is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def later(work: Callable[[], T]) -> Callable[[], T]:
    """The same work, as large work."""

    def run() -> T:
        raise LargeWorkError(work)

    return run


async def test_large_work_leaves_a_thread_to_others(workers: Workers) -> None:
    release, begun = threading.Event(), threading.Semaphore(0)

    def long() -> str:
        begun.release()
        release.wait(WAIT)
        return "long"

    large = [asyncio.ensure_future(workers.run(later(long))) for _ in range(2)]
    await asyncio.to_thread(begun.acquire)
    for number in range(20):
        assert await asyncio.wait_for(workers.run(partial(int, number)), WAIT) == number
    assert not any(each.done() for each in large)
    release.set()
    assert await asyncio.gather(*large) == ["long", "long"]


async def test_large_work_takes_only_a_part_of_the_queue(workers: Workers) -> None:
    release = threading.Event()
    large = [asyncio.ensure_future(workers.run(later(lambda: release.wait(WAIT)))) for _ in range(6)]
    async with asyncio.timeout(WAIT):
        while sum(each.done() for each in large) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert await workers.run(lambda: 1) == 1
    release.set()
    results = await asyncio.gather(*large, return_exceptions=True)
    assert sum(isinstance(each, OverloadedError) for each in results) == 4
    # The places come back.
    assert await workers.run(later(lambda: 2)) == 2


async def test_work_that_nobody_waits_for_ends_at_its_next_checkpoint(workers: Workers) -> None:
    begun, parts, ended = threading.Event(), list[int](), threading.Event()

    def long() -> None:
        try:
            for part in range(10**9):
                parts.append(part)
                begun.set()
                checkpoint()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(workers.run(long))
    await asyncio.to_thread(begun.wait, WAIT)
    waiting.cancel()
    assert await asyncio.to_thread(ended.wait, WAIT)


async def test_a_thread_that_hangs_is_told_of_and_not_waited_for() -> None:
    workers, begun, release = Workers(1, 0), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        release.wait(WAIT)

    waiting = asyncio.ensure_future(workers.run(hang))
    await asyncio.to_thread(begun.wait, WAIT)
    workers.close(0.0)
    assert workers.stuck
    with pytest.raises(OverloadedError):
        await workers.run(lambda: 1)
    release.set()
    await waiting


@pytest.mark.usefixtures("no_collector")
async def test_an_error_does_not_keep_what_the_work_had_in_hand(workers: Workers) -> None:
    seen, freed = list[weakref.ref[Thing]](), threading.Semaphore(0)

    def fail() -> None:
        images = Thing()
        seen.append(weakref.ref(images, lambda _: freed.release()))
        raise RequestError("these are no images")

    for work in (fail, later(fail)):
        with pytest.raises(RequestError):
            await workers.run(work)
    del work
    await workers.run(lambda: None)
    for _ in seen:  # the thread that failed may still be on its way out of the work
        assert await asyncio.to_thread(freed.acquire, timeout=WAIT)


def jpegs(count: int, side: int) -> ModelInferRequest:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    request = ModelInferRequest()
    contents = request.inputs.add(name="image", datatype="BYTES", shape=[count]).contents
    contents.bytes_contents.extend([buffer.getvalue()] * count)
    return request


@pytest.fixture
def checker(profile: Profile, exported: Path) -> Iterator[Checker]:
    settings = Settings.load(None, profile=exported, model=exported, workers=2, max_request_pixels=100_000, timeout=60)
    metrics, workers = Metrics(), Workers(settings.workers, settings.max_queued)
    shared = Shared(settings, workers, Recorder(settings, metrics))
    own, detector = settings.served[0], profile.detector("exact", None)
    model = ExportedClassifier(exported, threads=1, gpu=False)
    yield Checker(Loaded(profile, detector, model), own, metrics.of(own), shared, None)
    workers.close()


async def test_pixels_of_a_request_are_bounded_before_any_is_decoded(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = list[int]()

    def counted(*arguments: Any, **more: Any) -> Image.Image:
        decoded.append(1)
        return decode(*arguments, **more)

    monkeypatch.setattr(images, "decode", counted)
    with pytest.raises(RequestError, match="input 'image': the images of one request have more than 100000 pixels"):
        await checker.infer(jpegs(11, 100), "")
    assert not decoded
    assert len((await checker.infer(jpegs(10, 100), "")).logits) == 10
    assert (await checker.check_request(jpegs(11, 100), "")).reason is Reason.INPUT_UNREADABLE


async def test_a_check_that_is_given_up_stops_at_its_next_image(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release, decoded = threading.Event(), threading.Event(), list[int]()

    def slow(*arguments: Any, **more: Any) -> Image.Image:
        decoded.append(1)
        begun.set()
        release.wait(WAIT)
        return decode(*arguments, **more)

    monkeypatch.setattr(images, "decode", slow)
    waiting = asyncio.ensure_future(checker.infer(jpegs(5, 20), ""))
    await asyncio.to_thread(begun.wait, WAIT)
    waiting.cancel()
    await asyncio.sleep(0.01)
    release.set()
    await asyncio.gather(waiting, return_exceptions=True)
    monkeypatch.setattr(images, "decode", decode)
    for _ in range(2):
        await checker.infer(jpegs(1, 20), "")
    assert len(decoded) == 1


async def test_large_images_are_decoded_by_turns(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LARGE_PIXELS", 1000)
    results = await asyncio.gather(*(checker.infer(jpegs(2, side), "") for side in (20, 100, 100, 20)))
    assert np.allclose(results[1].logits, results[2].logits)
    assert all(len(each.logits) == 2 for each in results)
