"""A sidecar that exists only for the page that shows it: what it reports is what a test says."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.host.dashboard.sources import SourceError


def a_model(**more: Any) -> messages.Model:
    traffic = messages.Traffic(
        requests={"pass": 90, "flag": 10, "unchecked": 0},
        images={"pass": 90, "flag": 10, "unchecked": 0},
        scores=messages.Histogram(bounds=[0, 1, 2, float("inf")], counts=[50, 40, 6, 4]),
        overhead_seconds=messages.Histogram(bounds=[0.01, float("inf")], counts=[100, 0]),
    )
    values: dict[str, Any] = {
        "name": "pets", "label": "pets", "digest": "d" * 64, "mode": messages.MODE_TAG,
        "failure_policy": messages.FAILURE_POLICY_OPEN, "alpha": 0.01, "threshold": 1.5,
        "verdict": messages.Verdict(outcome=messages.Verdict.OUTCOME_NO_EVIDENCE), "traffic": traffic,
        "loaded_at": datetime(2026, 5, 9, tzinfo=UTC),
    }  # fmt: skip
    return messages.Model(**(values | more))


def a_flag(number: int = 0, **more: Any) -> messages.Evidence:
    values: dict[str, Any] = {
        "time": datetime(2026, 5, 9, 12, 0, number % 60, number // 60, tzinfo=UTC), "request_id": f"request-{number}",
        "model": "pets", "decision": messages.Evidence.DECISION_FLAG, "predicted_class": "cat", "p_value": 0.001,
        "alpha": 0.01, "scores": {"score": 7.0}, "thresholds": {"score": 1.5}, "decided_by": "match patch-0",
        "trigger": "patch-0", "target_class": "cat", "input_digest": f"{number:064x}",
    }  # fmt: skip
    return messages.Evidence(**(values | more))


class FakeSidecar:
    """A `guard.sidecar.host.dashboard.Source`; `flag` may be called from any thread."""

    def __init__(self, address: str = "", *models: messages.Model) -> None:
        self.address = self.sidecar = address
        self.state: messages.Status | None = messages.Status(version="1.2.3", ready=True)
        self.served = models or (a_model(),)
        self.settings = [messages.Setting(name="mode", value='"tag"', source=messages.Setting.SOURCE_FILE)]
        self._flags: list[messages.Evidence] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._more: asyncio.Event | None = None

    def flag(self, *found: messages.Evidence) -> None:
        self._flags += found
        if self._loop is not None and self._more is not None:
            self._loop.call_soon_threadsafe(self._more.set)

    async def status(self) -> messages.Status:
        if self.state is None:
            raise SourceError("the sidecar does not answer")
        return self.state

    async def models(self, *, with_pictures: bool = False) -> messages.ListModelsResponse:
        found = messages.ListModelsResponse(models=self.served)
        if not with_pictures:
            for model in found.models:
                for trigger in model.triggers:
                    trigger.picture = b""
        return found

    async def configuration(self) -> messages.Configuration:
        return messages.Configuration(settings=self.settings)

    async def follow(self) -> AsyncIterator[messages.Evidence]:
        self._loop, self._more, position = asyncio.get_running_loop(), asyncio.Event(), 0
        while True:
            while position < len(self._flags):
                position += 1
                yield self._flags[position - 1]
            self._more.clear()
            await self._more.wait()
