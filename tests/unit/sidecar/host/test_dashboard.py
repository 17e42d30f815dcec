"""The page of a sidecar: who may open it, what it tells, and that nothing in it grows without bound."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from guard.errors import UsageError
from guard.evidence.records import MAX_THUMBNAIL
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar import Settings
from guard.sidecar.host.dashboard import Access, advice, feed, serve_dashboard, serving
from guard.sidecar.host.dashboard.feed import Feed
from tests.fake_sidecar import FakeSidecar, a_flag, a_model

ROOT = Path(__file__).parents[4]
NOW = datetime(2026, 5, 9, tzinfo=UTC)
SECONDS = 30
FAR = Timestamp(seconds=2**60)
WRONG = {
    "time": a_model(loaded_at=FAR),
    "expiry": a_model(certificate=messages.Certificate(accepted=True, expires_at=FAR)),
    "length": a_model(label="x" * feed.MAX_STATE_BYTES),
}
"""Models that no sidecar of guard reports."""
TLS = {"tls_certificate": "c", "tls_key": "k"}


def loaded(address: str, **more: Any) -> Settings:
    return Settings.load(None, profile=Path("p"), model=Path("m"), dashboard=address, **more)


@contextmanager
def page(*sidecars: FakeSidecar, access: Access | None = None) -> Iterator[str]:
    with serve_dashboard("127.0.0.1:0", sidecars or (FakeSidecar(),), access or Access()) as address:
        yield address


def get(address: str, target: str, method: str = "GET", **headers: str) -> HTTPResponse:
    connection = HTTPConnection(address, timeout=SECONDS)
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    return connection.getresponse()


def answer(address: str, target: str, **headers: str) -> Any:
    return json.loads(get(address, target, **headers).read())


class Events:
    """The stream of events of a page."""

    def __init__(self, address: str, last: str | None = None) -> None:
        self.response = get(address, "/api/events", **({} if last is None else {"Last-Event-ID": last}))
        assert self.response.status == 200
        assert self.response.headers["Content-Type"] == "text/event-stream"

    def next(self, *kinds: str) -> tuple[str, Any]:
        """Id and data of the next event of one of these kinds."""
        while True:
            event = {}
            while line := self.response.readline().decode().rstrip("\n"):
                name, _, value = line.partition(": ")
                event[name] = value
            if event.get("event") in kinds:
                return event.get("id", ""), json.loads(event["data"])


def settled(address: str) -> Any:
    """The overview, once the sidecars were asked."""
    events = Events(address)
    while True:
        _, overview = events.next("overview")
        if overview and all(each["error"] != "not asked yet" for each in overview["sidecars"]):
            return overview


class TestWhereItMayBeServed:
    @pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
    def test_loopback_needs_nothing(self, address: str) -> None:
        assert loaded(address).dashboard == address

    @pytest.mark.parametrize("address", ["0.0.0.0:1", "192.168.0.1:1", "example.org:1"])
    def test_other_addresses_need_certificates_of_clients_or_a_password_over_tls(self, address: str) -> None:
        for without in ({}, TLS):
            with pytest.raises(UsageError, match="--dashboard-token with --tls-certificate"):
                loaded(address, **without)
        with pytest.raises(UsageError, match="needs --tls-client-ca"):
            loaded(address, dashboard_token=Path("t"))
        loaded(address, **TLS, tls_client_ca="a")
        loaded(address, **TLS, dashboard_token=Path("t"))

    def test_several_processes_have_another_way(self) -> None:
        with pytest.raises(UsageError, match="guard top"):
            loaded("127.0.0.1:1", processes=2)

    def test_what_belongs_to_it_needs_it(self) -> None:
        with pytest.raises(UsageError, match="need --dashboard"):
            Settings.load(None, profile=Path("p"), model=Path("m"), dashboard_hosts="a.example")

    @pytest.mark.parametrize("content", [b"", b"short", b" " * 40])
    def test_a_short_password_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(UsageError, match="16 characters"):
            Access.of(loaded("127.0.0.1:1", dashboard_token=tmp_path / "token"))

    def test_a_mark_of_an_editor_is_no_part_of_a_password(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("correct horse battery\n", encoding="utf-8-sig")
        access = Access.of(loaded("127.0.0.1:1", dashboard_token=tmp_path / "token"))
        assert access.token == b"correct horse battery"

    def test_a_taken_address_is_an_error_that_names_it(self) -> None:
        with page() as address, pytest.raises(UsageError, match=address), serve_dashboard(address, (), Access()):
            pass


class TestRequests:
    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "localhost:80",
            "LOCALHOST.",
            "127.0.0.1:8003",
            "10.1.2.3",
            "[::1]",
            "[::1]:8003",
            "guard.example",
        ],
    )
    def test_known_names_are_answered(self, host: str) -> None:
        with page(access=Access(hosts=frozenset({"guard.example"}))) as address:
            assert get(address, "/", Host=host).status == 200

    @pytest.mark.parametrize(
        "host",
        [
            "",
            "evil.example",
            "localhost.evil.example",
            "evil.example:8003",
            "127.0.0.1.evil.example",
            "guard.example@x",
            "a b",
        ],
    )
    def test_unknown_names_are_misdirected(self, host: str) -> None:
        with page(access=Access(hosts=frozenset({"guard.example"}))) as address:
            for target in ("/", "/page.js", "/api/overview", "/api/events", "/record/1"):
                assert get(address, target, Host=host).status == 421

    def test_a_request_without_or_with_two_hosts_gets_nowhere(self) -> None:
        with page() as address:
            for hosts in ((), ("localhost", "evil.example")):
                connection = HTTPConnection(address, timeout=SECONDS)
                connection.putrequest("GET", "/", skip_host=True)
                for host in hosts:
                    connection.putheader("Host", host)
                connection.endheaders()
                assert connection.getresponse().status in {400, 421}

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
    def test_nothing_can_be_changed(self, method: str) -> None:
        with page() as address:
            assert get(address, "/api/overview", method).status == 405

    def test_other_sites_may_link_here_and_get_no_data(self) -> None:
        with page() as address:
            for site in ("cross-site", "same-site"):
                assert get(address, "/", Sec_Fetch_Site=site).status == 200
                for target in ("/api/overview", "/api/events", "/page.js", "/api/trigger.png"):
                    assert get(address, target, Sec_Fetch_Site=site).status == 403

    def test_the_page_may_load_only_its_own_files_and_be_framed_by_nobody(self) -> None:
        with page() as address:
            for target in ("/", "/page.js", "/api/overview", "/nowhere", "/api/events"):
                headers = get(address, target).headers
                policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
                assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
                assert policy["script-src"] == policy["connect-src"] == "'self'"
                assert "unsafe" not in headers["Content-Security-Policy"]
                assert headers["X-Content-Type-Options"] == "nosniff"

    def test_a_password_is_asked_for_and_taken_in_both_forms(self) -> None:
        token = b"correct horse battery"
        with page(access=Access(token=token)) as address:
            basic = base64.b64encode(b"anybody:" + token).decode()
            for wrong in (
                "",
                "Basic",
                "Basic !",
                f"Basic {base64.b64encode(token).decode()}",
                "Bearer wrong",
                "Bearer \xff",
            ):
                for target in ("/", "/api/events", "/api/overview"):
                    response = get(address, target, Authorization=wrong)
                    assert response.status == 401
                    assert response.headers["WWW-Authenticate"].startswith("Basic")
            for right in (f"Basic {basic}", f"Bearer {token.decode()}"):
                assert get(address, "/api/overview", Authorization=right).status == 200

    def test_a_head_of_the_events_has_their_head_and_takes_no_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving, "MAX_STREAMS", 1)
        with page() as address:
            for _ in range(2):
                response = get(address, "/api/events", "HEAD")
                assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
            only = Events(address)
            assert get(address, "/api/events", "HEAD").status == 503
            only.response.close()

    def test_there_is_nothing_else(self) -> None:
        with page() as address:
            settled(address)
            for target in (
                "/index.html",
                "/../settings.py",
                "/%2e%2e/feed.py",
                "/api/evidence/x",
                "/api/trigger.png?sidecar=9",
                "/api/trigger.png?sidecar=-1",
            ):
                assert get(address, target).status == 404

    def test_streams_are_bounded_and_a_place_becomes_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving, "MAX_STREAMS", 2)
        monkeypatch.setattr(feed, "HEARTBEAT_SECONDS", 10 * SECONDS)  # it becomes free before anything is sent
        with page() as address:
            streams = [Events(address) for _ in range(2)]
            assert get(address, "/api/events").status == 503
            assert get(address, "/api/overview").status == 200
            streams.pop().response.close()
            before = time.monotonic()
            while get(address, "/api/events").status == 503:
                assert time.monotonic() < before + SECONDS


class TestContents:
    def test_a_flagged_image_arrives_with_its_scores_and_has_a_page(self) -> None:
        sidecar = FakeSidecar()
        with page(sidecar) as address:
            events = Events(address)
            sidecar.flag(a_flag(1, thumbnail=b"\x89PNG\r\n\x1a\n", reference_class="dog"))
            identity, found = events.next("evidence")
            assert (found["request_id"], found["predicted_class"], found["scores"]) == (
                "request-1",
                "cat",
                {"score": 7.0},
            )
            assert base64.b64decode(found["thumbnail"]).startswith(b"\x89PNG")
            shown = answer(address, f"/api/evidence/{identity}")
            assert "The reference model answers “dog”." in shown["explanation_sentences"]
            assert get(address, f"/record/{identity}").status == 200

    def test_who_comes_late_or_again_gets_what_is_missing_and_nothing_twice(self) -> None:
        sidecar = FakeSidecar()
        with page(sidecar) as address:
            sidecar.flag(*(a_flag(number) for number in range(3)))
            events = Events(address)
            seen = [events.next("reset", "evidence") for _ in range(4)]
            assert [data.get("request_id") for _, data in seen] == [None, "request-0", "request-1", "request-2"]
            again = Events(address, last=seen[2][0])
            assert again.next("reset", "evidence")[1]["request_id"] == "request-2"
            # An id of another process says nothing here.
            other = Events(address, last=f"0{seen[2][0]}")
            assert other.next("reset", "evidence")[1] == {}

    def test_records_that_several_processes_tell_are_shown_once(self) -> None:
        first, second = FakeSidecar("one"), FakeSidecar("two")
        first.sidecar = second.sidecar = "both"
        with page(first, second) as address:
            first.flag(a_flag(1), a_flag(2))
            second.flag(a_flag(2), a_flag(3))
            events = Events(address)
            assert sorted(events.next("evidence")[1]["request_id"] for _ in range(3)) == [
                f"request-{n}" for n in (1, 2, 3)
            ]

    def test_what_one_sidecar_tells_hides_nothing_of_another(self) -> None:
        first, second = FakeSidecar("one"), FakeSidecar("two")
        with page(first, second) as address:
            events = Events(address)
            first.flag(a_flag(1, predicted_class="harmless"))
            assert events.next("evidence")[1]["predicted_class"] == "harmless"
            second.flag(a_flag(1))
            assert events.next("evidence")[1]["predicted_class"] == "cat"

    @pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
    def test_a_sidecar_that_tells_nonsense_leaves_the_others_shown(
        self, wrong: messages.Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(feed, "_POLL_SECONDS", 0.01)
        bad, good = FakeSidecar("bad", wrong), FakeSidecar("good")
        with page(bad, good) as address:
            assert "cannot be shown" in settled(address)["sidecars"][0]["error"]
            events = Events(address)
            bad.flag(a_flag(1, time=FAR), a_flag(2, request_id="x" * feed.MAX_EVENT_BYTES))
            good.flag(a_flag(3))
            assert events.next("evidence")[1]["request_id"] == "request-3"
            bad.flag(a_flag(4))
            assert events.next("evidence")[1]["request_id"] == "request-4"
            good.state = messages.Status(ready=False, reason="draining")
            while not (found := events.next("overview")[1]["sidecars"][1])["conditions"]:
                pass
            assert found["status"]["reason"] == "draining"

    def test_what_a_sidecar_leaves_out_is_empty_for_the_page(self) -> None:
        with page(FakeSidecar("", messages.Model(label="pets"))) as address:
            (model,) = settled(address)["sidecars"][0]["models"]
            assert model["verdict"]["outcome"] == "OUTCOME_UNSPECIFIED"
            assert model["traffic"]["images"] == {}

    def test_pictures_that_are_too_large_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "MAX_PICTURE_BYTES", 100)
        sidecar = FakeSidecar("", a_model(triggers=[messages.Trigger(id="large", picture=bytes(101))]))
        with page(sidecar) as address:
            (trigger,) = settled(address)["sidecars"][0]["models"][0]["triggers"]
            assert trigger["picture"] == ""
            sidecar.flag(a_flag(1, thumbnail=bytes(MAX_THUMBNAIL + 1)))
            assert Events(address).next("evidence")[1]["thumbnail"] == ""

    def test_only_so_many_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "MAX_EVENTS", 5)
        sidecar = FakeSidecar()
        with page(sidecar) as address:
            events = Events(address)
            for number in range(12):
                sidecar.flag(a_flag(number))
                identity, _ = events.next("evidence")
                if number == 0:
                    first = identity
            late = Events(address)
            assert late.next("evidence")[1]["request_id"] == "request-7"
            assert get(address, f"/api/evidence/{first}").status == 404

    def test_large_pictures_make_room_earlier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "MAX_BYTES", 20_000)
        sidecar = FakeSidecar()
        with page(sidecar) as address:
            events = Events(address)
            for number in range(4):
                sidecar.flag(a_flag(number, thumbnail=bytes(9000)))
                events.next("evidence")
            assert Events(address).next("evidence")[1]["request_id"] == "request-3"

    def test_the_overview_says_what_the_sidecar_is_and_follows_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "_POLL_SECONDS", 0.01)
        sidecar = FakeSidecar("unix:/run/admin")
        with page(sidecar) as address:
            (shown,) = settled(address)["sidecars"]
            assert (shown["address"], shown["status"]["version"]) == ("unix:/run/admin", "1.2.3")
            (model,) = shown["models"]
            assert (model["label"], model["traffic"]["scores"]["bounds"][-1]) == ("pets", "Infinity")
            events = Events(address)
            sidecar.state = None
            while (found := events.next("overview")[1]["sidecars"][0])["error"] is None:
                pass
            assert found["error"] == "the sidecar does not answer"
            assert answer(address, "/api/configuration") == [{"address": "unix:/run/admin", "settings": []}]
            sidecar.state = messages.Status(ready=False, reason="draining")
            while (found := events.next("overview")[1]["sidecars"][0])["error"] is not None:
                pass
            assert found["conditions"][0]["title"] == "Requests are not served: draining"
            (settings,) = answer(address, "/api/configuration")
            assert settings["settings"] == [{"model": "", "name": "mode", "value": '"tag"', "source": "SOURCE_FILE"}]

    def test_the_picture_of_a_trigger_is_a_file_of_its_own(self) -> None:
        triggers = [messages.Trigger(id="a & b", picture=b"\x89PNG picture"), messages.Trigger(id="axis")]
        with page(FakeSidecar("", a_model(triggers=triggers))) as address:
            first, second = settled(address)["sidecars"][0]["models"][0]["triggers"]
            assert second["picture"] == ""
            response = get(address, first["picture"])
            assert (response.headers["Content-Type"], response.read()) == ("image/png", b"\x89PNG picture")

    async def test_silence_is_broken_by_comments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "HEARTBEAT_SECONDS", 0.01)
        async with running(Feed([FakeSidecar()])) as shown:
            stream = shown.stream("")
            async with asyncio.timeout(SECONDS):
                while not (await anext(stream)).startswith(b": "):
                    pass
            await stream.aclose()


@asynccontextmanager
async def running(shown: Feed) -> AsyncIterator[Feed]:
    task = asyncio.ensure_future(shown.run())
    try:
        yield shown
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


CASES: dict[str, Any] = {
    "GuardNotReady": messages.Status(ready=False, reason="x"),
    "GuardEvidenceLost": messages.Status(ready=True, evidence_trouble="disk_full"),
    "GuardAttack": a_model(alarms=[messages.Alarm(kind=messages.Alarm.KIND_ATTACK, stream="score")]),
    "GuardDrift": a_model(alarms=[messages.Alarm(kind=messages.Alarm.KIND_DRIFT, stream="score")]),
    "GuardProfileStale": a_model(stale=True),
    "GuardModelNotCertified": a_model(certificate=messages.Certificate(accepted=False, reason="expired")),
    "GuardCertificateExpires": a_model(
        certificate=messages.Certificate(accepted=True, expires_at=NOW + timedelta(days=2))
    ),
    "GuardUncheckedRequests": a_model(
        traffic=messages.Traffic(requests={"pass": 90, "unchecked": 10}, unchecked={"timeout": 10})
    ),
}


class TestAdvice:
    @pytest.mark.parametrize("runbook", CASES)
    def test_each_trouble_is_named_and_has_a_runbook(self, runbook: str) -> None:
        case = CASES[runbook]
        found = advice.of_sidecar(case) if isinstance(case, messages.Status) else advice.of_model(case, NOW)
        (condition,) = found
        assert condition.runbook == runbook
        assert (ROOT / "docs" / "runbooks" / f"{runbook}.md").is_file()

    def test_nothing_is_said_of_what_is_well_or_was_asked_for(self) -> None:
        certificate = messages.Certificate(accepted=True, expires_at=NOW + timedelta(days=60))
        traffic = messages.Traffic(requests={"pass": 1, "unchecked": 99}, unchecked={"not_sampled": 99})
        assert list(advice.of_model(a_model(certificate=certificate, traffic=traffic), NOW)) == []
        assert list(advice.of_sidecar(messages.Status(ready=True))) == []

    def test_a_backdoor_is_the_first_thing_to_know(self) -> None:
        verdict = messages.Verdict(outcome=messages.Verdict.OUTCOME_BACKDOORED, target_class="cat")
        (condition,) = advice.of_model(a_model(verdict=verdict), NOW)
        assert condition.severity == "critical"
        assert "cat" in condition.title
