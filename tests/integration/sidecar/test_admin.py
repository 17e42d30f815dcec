"""guard's own service: what it tells operators, and that it tells nobody else."""

import asyncio
import signal
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from guard import __version__
from guard.classifiers import ExportedClassifier
from guard.diagnostics import Status
from guard.diagnostics.preflight import preflight
from guard.evidence import Record
from guard.profiles import Profile
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar import Settings
from guard.sidecar.decisions.evidence import Recorder
from guard.sidecar.decisions.models import Models
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.decisions.workers import Workers
from guard.sidecar.host.admin import MAX_FOLLOWERS, SERVICE, AdminServer
from guard.sidecar.host.health import Health
from guard.sidecar.host.reporting import Reporter
from guard.sidecar.telemetry.metrics import Metrics
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Floats,
    Launcher,
    Sidecar,
    connected,
    eventually,
    free_port,
    infer_request,
    refused_start,
)
from tests.integration.sidecar.test_tls import Authority

REPLIES: Mapping[str, Any] = {
    "GetStatus": messages.Status,
    "ListModels": messages.ListModelsResponse,
    "FollowEvidence": messages.Evidence,
    "GetConfiguration": messages.Configuration,
}


class Operator:
    """A client of the service; works on channels of both kinds."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def status(self) -> Any:
        return self._unary("GetStatus")(messages.GetStatusRequest(), timeout=WAIT_SECONDS)

    def models(self) -> Any:
        return self._unary("ListModels")(messages.ListModelsRequest(), timeout=WAIT_SECONDS)

    def model(self) -> messages.Model:
        (found,) = self.models().models
        return found  # type: ignore[no-any-return]

    def follow(self, **what: Any) -> Any:
        call = self.channel.unary_stream(
            f"/{SERVICE}/FollowEvidence",
            messages.FollowEvidenceRequest.SerializeToString,
            messages.Evidence.FromString,
        )
        return call(messages.FollowEvidenceRequest(**what), timeout=WAIT_SECONDS)

    def _unary(self, name: str) -> Any:
        return self.channel.unary_unary(
            f"/{SERVICE}/{name}", lambda request: request.SerializeToString(), REPLIES[name].FromString
        )


@contextmanager
def operator(sidecar: Sidecar) -> Iterator[Operator]:
    with grpc.insecure_channel(str(sidecar.announced["admin"])) as channel:
        yield Operator(channel)


@pytest.fixture(scope="module")
def flagged(classify: ExportedClassifier, profile: Profile, triggered: Floats) -> Floats:
    return triggered[profile.detector().score(classify.run(triggered)[0]).flags]


def test_the_service_says_what_the_sidecar_is_and_what_it_screens_with(
    launch: Launcher, exported: Path, served_profile: Path, profile: Profile
) -> None:
    before = datetime.now(UTC)
    arguments = ("--model", exported, "--profile", served_profile, "--mode", "block", "--alpha", "0.05")
    with launch(*arguments, "--admin", "127.0.0.1:0") as sidecar, operator(sidecar) as admin:
        eventually(lambda: admin.status().ready, "readiness")
        status = admin.status()
        assert (status.version, status.reason, status.upstream, status.active_requests) == (__version__, "", "", 0)
        assert status.evidence_trouble == ""
        assert not status.HasField("process")
        assert before < status.started_at.ToDatetime(UTC) < datetime.now(UTC)
        model = admin.model()
        assert (model.name, model.version, model.label) == ("classifier", "1", "classifier")
        assert model.digest == profile.document.model.digest
        assert model.verdict.outcome == messages.Verdict.OUTCOME_BACKDOORED
        assert (model.verdict.target_class, model.verdict.p_value) == ("dog", 6e-5)
        assert (model.mode, model.failure_policy) == (messages.MODE_BLOCK, messages.FAILURE_POLICY_CLOSED)
        assert model.alpha == 0.05
        assert model.threshold == pytest.approx(sidecar.metric("guard_threshold", model="classifier"))
        assert [(found.id, found.family, found.target_class) for found in model.triggers] == [
            ("patch-1", "patch", "dog")
        ]
        calibration = profile.document.calibration
        assert calibration is not None
        assert model.reference_size == calibration.reference
        assert model.calibration == messages.Calibration(
            images=calibration.threshold.size,
            held_out_images=calibration.held_out,
            held_out_false_alarms=calibration.false_alarms,
        )
        assert not model.alarms
        assert not model.stale


def test_an_upstream_server_that_is_not_ready_is_the_reason(
    launch: Launcher, exported: Path, served_profile: Path
) -> None:
    upstream = f"127.0.0.1:{free_port()}"
    arguments = ("--model", exported, "--profile", served_profile, "--upstream", upstream)
    with launch(*arguments, "--admin", "127.0.0.1:0") as sidecar, operator(sidecar) as admin:
        eventually(lambda: upstream in admin.status().reason, "the reason")
        status = admin.status()
        assert not status.ready
        assert status.upstream == upstream


def test_clients_of_the_inference_port_learn_nothing(launch: Launcher, exported: Path, served_profile: Path) -> None:
    arguments = ("--model", exported, "--profile", served_profile)
    with launch(*arguments, "--admin", "127.0.0.1:0") as sidecar:
        with grpc.insecure_channel(sidecar.address) as channel:
            for call in (Operator(channel).status, Operator(channel).models, lambda: next(Operator(channel).follow())):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                refused: Any = caught.value
                assert refused.code() is grpc.StatusCode.UNIMPLEMENTED
            assert SERVICE not in ProtoReflectionDescriptorDatabase(channel).get_services()
        with grpc.insecure_channel(str(sidecar.announced["admin"])) as channel:
            listed = ProtoReflectionDescriptorDatabase(channel)
            assert {"guard.v1.Sidecar", "grpc.health.v1.Health"} <= set(listed.get_services())
            (service,) = listed.FindFileContainingSymbol("guard.v1.Sidecar").service
            assert [method.name for method in service.method] == list(REPLIES)
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_without_an_address_it_is_not_served(launch: Launcher, exported: Path, served_profile: Path) -> None:
    with launch("--model", exported, "--profile", served_profile) as sidecar:
        assert sidecar.announced["admin"] is None


def test_evidence_comes_while_requests_are_served_and_ends_with_them(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats, flagged: Floats, tmp_path: Path
) -> None:
    path = tmp_path / "admin.sock"
    arguments = ("--model", exported, "--profile", served_profile, "--admin", f"unix:{path}", "--socket-mode", "660")
    with launch(*arguments) as sidecar, operator(sidecar) as admin, connected(sidecar.address) as client:
        assert sidecar.announced["admin"] == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        following = admin.follow()
        following.initial_metadata()
        client.infer(infer_request(np.concatenate([clean[:1], flagged[:1]]), id="order-66"))
        found = next(each for each in following if each.image == 1)
        assert (found.request_id, found.model, found.lost) == ("order-66", "classifier", 0)
        assert (found.decision, found.mode) == (messages.Evidence.DECISION_FLAG, messages.MODE_TAG)
        assert (found.trigger, found.target_class) == ("patch-1", "dog")
        assert found.p_value <= found.alpha == 0.02
        assert found.scores["score"] > found.thresholds["score"]
        assert found.thumbnail == b""
        sidecar.process.send_signal(signal.SIGTERM)
        assert list(following) == []
        assert following.code() is grpc.StatusCode.OK
    assert not path.exists()


def test_alarms_are_told(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats, flagged: Floats
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--run-length", "10000", "--admin", "127.0.0.1:0")
    with launch(*arguments) as sidecar, operator(sidecar) as admin, connected(sidecar.address) as client:
        client.infer(infer_request(clean))
        for _ in range(1 + 60 // len(flagged)):
            client.infer(infer_request(flagged))
        assert messages.Alarm(kind=messages.Alarm.KIND_ATTACK, stream="match patch-1") in admin.model().alarms


def test_a_changed_profile_is_told_whether_it_was_taken_or_not(
    launch: Launcher, exported: Path, profile_directory: Path
) -> None:
    arguments = ("--model", exported, "--profile", profile_directory, "--admin", "127.0.0.1:0")
    with launch(*arguments) as sidecar, operator(sidecar) as admin:
        first, file = admin.model().loaded_at.ToDatetime(), profile_directory / "profile.json"
        good = file.read_bytes()
        file.write_bytes(b"{}")
        eventually(lambda: admin.model().stale, "the news that the profile is broken")
        assert admin.model().loaded_at.ToDatetime() == first
        file.write_bytes(good)
        eventually(lambda: not admin.model().stale, "the news that it is whole again")
        # It is the one in use, which was never let go.
        assert admin.model().loaded_at.ToDatetime() == first


def test_each_of_several_processes_has_a_socket(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--processes", "2")
    with launch(*arguments, "--admin", f"unix:{tmp_path / 'a'}"):
        for process in range(2):
            with grpc.insecure_channel(f"unix:{tmp_path}/a.{process}") as channel:
                assert Operator(channel).status().process == process


def test_an_address_that_others_can_reach_needs_certificates_of_clients(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--admin", "0.0.0.0:0")
    authority = Authority(tmp_path, "ours")
    server, mine = authority.issue("server"), authority.issue("mine")
    tls = ("--tls-certificate", server.certificate, "--tls-key", server.key)
    for without in ((), tls):
        code, lines = refused_start(*arguments, *without)
        assert (code, len(lines)) == (2, 1)
        assert "--tls-client-ca" in lines[0]
    with launch(*arguments, *tls, "--tls-client-ca", authority.certificate) as sidecar:
        address = f"localhost:{sidecar.announced['admin'].rpartition(':')[2]}"
        trusted = authority.certificate.read_bytes()
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted, *mine.as_client)) as channel:
            assert Operator(channel).status().version == __version__
        with (
            grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted)) as channel,
            pytest.raises(grpc.RpcError),
        ):
            Operator(channel).status()


def test_a_renewed_certificate_is_used_here_too(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def put(authority: Authority) -> None:
        pair = authority.issue("server")
        certificate.write_bytes(pair.certificate.read_bytes())
        key.write_bytes(pair.key.read_bytes())

    def answers(to: Authority) -> bool:
        credentials = grpc.ssl_channel_credentials(to.certificate.read_bytes())
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"localhost:{port}", credentials, options) as channel:
            try:
                return bool(Operator(channel).status().version)
            except grpc.RpcError:
                return False

    put(old)
    arguments = ("--model", exported, "--profile", served_profile, "--admin", "127.0.0.1:0")
    with launch(*arguments, "--tls-certificate", certificate, "--tls-key", key) as sidecar:
        port = sidecar.announced["admin"].rpartition(":")[2]
        assert answers(old)
        put(new)
        eventually(lambda: answers(new), "the use of the renewed certificate")
        assert not answers(old)


def test_an_address_that_is_taken_stops_the_start_and_the_check_says_so(
    launch: Launcher, exported: Path, served_profile: Path
) -> None:
    arguments = ("--model", exported, "--profile", served_profile)
    with launch(*arguments, "--admin", "127.0.0.1:0") as sidecar:
        taken = str(sidecar.announced["admin"])
        code, lines = refused_start(*arguments, "--admin", taken)
        assert (code, len(lines)) == (2, 1)
        assert taken in lines[0]
        for address, status in ((taken, Status.FAILED), ("127.0.0.1:0", Status.OK)):
            values = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "model": exported, "profile": served_profile}
            found = preflight(Settings.load(None, admin=address, **values))
            assert [each.status for each in found if each.subject == "admin"] == [status]


@asynccontextmanager
async def served(exported: Path, profile: Path, **more: Any) -> AsyncIterator[tuple[AdminServer, Operator, Recorder]]:
    """The service alone, in this process, so that a test can hand over any record."""
    settings = Settings.load(None, model=exported, profile=profile, admin="127.0.0.1:0", **more)
    metrics = Metrics()
    shared, health = Shared(settings, Workers(1, 1), Recorder(settings, metrics)), Health(metrics)
    try:
        async with (
            AdminServer(Reporter(shared, Models(shared, metrics), health, metrics), settings, None, health) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            yield server, Operator(channel), shared.evidence
    finally:
        shared.close()


def record(request_id: str, **more: Any) -> Record:
    values = {"model": "classifier", "decision": "flag", "model_digest": "0" * 64, "image": 0, "mode": "tag", **more}
    return Record(request_id, **values)


async def test_a_follower_gets_what_it_asked_for(exported: Path, served_profile: Path) -> None:
    async with served(exported, served_profile, model_version="2") as (server, admin, evidence):
        plain = admin.follow()
        whole = admin.follow(models=["classifier@2"], include_withdrawn=True, include_thumbnails=True)
        for call in (plain, whole):
            await call.initial_metadata()
        evidence.record(record("a", model="another"))
        evidence.record(record("b", model="classifier@2", decision="pass", second_look="withdrawn"))
        evidence.record(record("c", model="classifier@2", thumbnail=b"picture", time="2026-05-09T12:30:00.125Z"))
        await asyncio.sleep(0)
        ending = asyncio.ensure_future(server.__aexit__(None, None, None))
        assert [(found.request_id, found.thumbnail) async for found in plain] == [("c", b"")]
        found = [found async for found in whole]
        assert [(each.request_id, each.decision, each.thumbnail) for each in found] == [
            ("b", messages.Evidence.DECISION_PASS, b""),
            ("c", messages.Evidence.DECISION_FLAG, b"picture"),
        ]
        assert found[1].time.ToJsonString() == "2026-05-09T12:30:00.125Z"
        assert not found[1].HasField("p_value")
        await ending


async def test_a_model_that_is_not_there_cannot_be_followed(exported: Path, served_profile: Path) -> None:
    async with served(exported, served_profile) as (_, admin, evidence):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.follow(models=["classifier", "another"]).read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "'another'" in (caught.value.details() or "")
        assert not evidence.wanted


async def outcome(admin: Operator, evidence: Recorder) -> grpc.StatusCode:
    """How a call that follows fares: OK if it gets a record."""
    call = admin.follow()
    await call.initial_metadata()
    evidence.record(record("x"))
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return error.code()
    call.cancel()
    return grpc.StatusCode.OK


async def test_more_followers_than_a_few_are_refused_until_one_leaves(exported: Path, served_profile: Path) -> None:
    async with served(exported, served_profile) as (_, admin, evidence):
        calls = [admin.follow() for _ in range(MAX_FOLLOWERS)]
        for call in calls:
            await call.initial_metadata()
        assert await outcome(admin, evidence) is grpc.StatusCode.RESOURCE_EXHAUSTED
        calls.pop().cancel()
        async with asyncio.timeout(WAIT_SECONDS):
            while await outcome(admin, evidence) is not grpc.StatusCode.OK:
                pass
        for call in calls:
            call.cancel()
        async with asyncio.timeout(WAIT_SECONDS):
            while evidence.wanted:  # noqa: ASYNC110 - the server says nothing when a follower is gone
                await asyncio.sleep(0.01)
