"""Several models and versions in one sidecar, profiles that change while it serves, and a share that is checked."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from guard import profiles
from guard.classifiers import Classifier, ExportedClassifier, export, load, save
from guard.evidence import EVIDENCE_FILE, EvidenceLog, RecordFilter
from guard.profiles import Profile
from guard.protocol.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelStreamInferResponse,
)
from tests.conftest import CLASSES, CONFIG, random_images, tiny_model
from tests.integration.sidecar.conftest import (
    WAIT_SECONDS,
    Client,
    Floats,
    Launcher,
    Reply,
    Sidecar,
    Upstream,
    command,
    connected,
    environment,
    eventually,
    infer_request,
    refused_start,
)

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
BACKDOOR = "guard: the input looks like a backdoor trigger"


def configuration(place: Path, models: Sequence[Mapping[str, object]], **top: object) -> Path:
    """A guard.toml."""

    def lines(values: Mapping[str, object]) -> list[str]:
        # JSON's strings and numbers are TOML's too.
        return [
            f"{key} = {json.dumps(value if isinstance(value, float) else str(value))}" for key, value in values.items()
        ]

    parts = lines(top)
    for model in models:
        parts += ["", "[[models]]", *lines(model)]
    place.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def loose(profile: Profile, classifier: Classifier, images: Any) -> Profile:
    """The profile calibrated for more false alarms."""
    return profile.calibrate(classifier, images, 0.1, seed=1)


@pytest.fixture(scope="module")
def loose_profile(loose: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loose") / "profile"
    loose.save(directory)
    return directory


@dataclass(frozen=True)
class Other:
    """Another classifier with the same classes and sizes."""

    exported: Path
    profile: Profile
    directory: Path
    classify: ExportedClassifier


@pytest.fixture(scope="module")
def other(profile: Profile, images: Any, tmp_path_factory: pytest.TempPathFactory) -> Other:
    folder = tmp_path_factory.mktemp("other")
    save(folder / "model", tiny_model(seed=1), CONFIG, CLASSES)
    classifier = load(str(folder / "model"), device="cpu")
    export(classifier, folder / "exported", images)
    model = replace(profile.document.model, digest=classifier.digest.root, parts=classifier.digest.parts)
    own = replace(profile, document=replace(profile.document, model=model, calibration=None), reference=None)
    calibrated = own.calibrate(classifier, images, 0.05)
    calibrated.save(folder / "profile")
    classify = ExportedClassifier(folder / "exported", threads=1, gpu=False)
    return Other(folder / "exported", calibrated, folder / "profile", classify)


def judged(profile: Profile, classify: ExportedClassifier, images: Floats) -> NDArray[np.float64]:
    return profile.detector().score(classify.run(images)[0]).p_values


@pytest.fixture(scope="module")
def flagged(classify: ExportedClassifier, profile: Profile, loose: Profile, triggered: Floats) -> Floats:
    """Images that both calibrations flag."""
    return triggered[(judged(profile, classify, triggered) < 0.01) & (judged(loose, classify, triggered) < 0.05)]


@pytest.fixture(scope="module")
def passed(classify: ExportedClassifier, profile: Profile, loose: Profile, clean: Floats) -> Floats:
    """Images that neither flags."""
    return clean[(judged(profile, classify, clean) > 0.1) & (judged(loose, classify, clean) > 0.2)]


@pytest.fixture(scope="module")
def doubtful(classify: ExportedClassifier, profile: Profile, loose: Profile) -> Floats:
    """Images that only the loose one flags."""
    many = classify.preprocessing.normalise(random_images(400, seed=7).numpy())
    found = many[(judged(profile, classify, many) > 0.03) & (judged(loose, classify, many) < 0.09)]
    assert len(found) >= 2
    return found


def reason(reply: Reply) -> tuple[str, str]:
    return reply.decision, str(reply.parameter("guard_reason"))


def exchange(sidecar: Sidecar, *requests: ModelInferRequest) -> dict[str, ModelStreamInferResponse]:
    """The replies of one stream by id; every request has one."""
    with connected(sidecar.address) as client:
        call = client.channel.stream_stream(STREAM)
        messages = (request.SerializeToString() for request in requests)
        replies = [ModelStreamInferResponse.FromString(reply) for reply in call(messages, timeout=WAIT_SECONDS)]
    assert len(replies) == len(requests)
    return {reply.infer_response.id: reply for reply in replies}


# Two models of different rules.


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def two(
    launch: Launcher, exported: Path, served_profile: Path, loose_profile: Path, running_upstream: Upstream, state: Path
) -> Iterator[Sidecar]:
    """The model `strict` blocks, `loose` tags; the top level is `tag` and `closed`."""
    config = configuration(
        state / "guard.toml",
        [
            {"model_name": "strict", "profile": served_profile, "mode": "block"},
            {"model_name": "loose", "profile": loose_profile, "failure_policy": "open"},
        ],
        upstream=running_upstream.address,
        model=exported,
        state_dir=state / "kept",
        stream_dialect="triton",
    )
    with launch("--config", config) as running:
        yield running


def test_each_model_has_its_own_mode_policy_and_calibration(
    two: Sidecar,
    upstream: Upstream,  # noqa: ARG001 - answers of its own
    flagged: Floats,
    doubtful: Floats,
    passed: Floats,
) -> None:
    announced = {model["name"]: model for model in two.announced["models"]}
    assert [(name, model["mode"], model["failure_policy"], model["alpha"]) for name, model in announced.items()] == [
        ("strict", "block", "closed", 0.02),
        ("loose", "tag", "open", 0.1),
    ]
    before = two.metric("guard_requests_total", model="loose", decision="flag", mode="tag")
    with connected(two.address) as client:
        error = client.refused(infer_request(flagged[:1], model_name="strict"))
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, BACKDOOR)
        for images, strict, loose in ((doubtful[:1], "pass", "flag"), (passed[:1], "pass", "pass")):
            for name, decision, alpha in (("strict", strict, 0.02), ("loose", loose, 0.1)):
                reply = client.infer(infer_request(images, model_name=name))
                assert (reply.decision, reply.parameter("guard_alpha")) == (decision, alpha)
        assert client.infer(infer_request(flagged[:1], model_name="loose")).decision == "flag"
        unreadable = np.full_like(passed[:1], np.nan)
        error = client.refused(infer_request(unreadable, model_name="strict"))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        served = client.infer(infer_request(unreadable, model_name="loose"))
        assert reason(served) == ("unchecked", "input_unreadable")
    assert two.metric("guard_requests_total", model="loose", decision="flag", mode="tag") == before + 2
    assert two.metric("guard_requests_total", model="strict", decision="flag", mode="block") >= 1
    assert two.metric("guard_unchecked_total", model="strict", reason="input_unreadable") == 1
    assert two.metric("guard_unchecked_total", model="loose", reason="input_unreadable") == 1
    assert two.metric("guard_alpha_ratio", model="strict") == 0.02
    assert two.metric("guard_alpha_ratio", model="loose") == 0.1


def test_a_model_without_a_profile_follows_the_top_level_and_is_counted_under_no_name_of_its_own(
    two: Sidecar, upstream: Upstream, passed: Floats
) -> None:
    names = ("classifier", "Strict", "(unknown)")
    with connected(two.address) as client:
        for name in names:
            error = client.refused(infer_request(passed[:1], model_name=name))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "no profile" in error.details()
    assert upstream.inferences() == []
    assert two.metric("guard_unchecked_total", model="(unknown)", reason="model_unknown") == len(names)
    with pytest.raises(AssertionError, match="not exposed"):
        two.metric("guard_unchecked_total", model="Strict", reason="model_unknown")


def test_the_evidence_says_which_model_an_image_was_sent_to(two: Sidecar, state: Path, flagged: Floats) -> None:
    with connected(two.address) as client:
        client.refused(infer_request(flagged[:1], model_name="strict", id="e1"))
        client.infer(infer_request(flagged[1:2], model_name="loose", id="e2"))

    def kept(name: str) -> list[tuple[str, str, float | None]]:
        log = EvidenceLog(state / "kept" / EVIDENCE_FILE)
        return [(record.model, record.mode, record.alpha) for record in log.records(RecordFilter(request_id=name))]

    eventually(lambda: bool(kept("e1") and kept("e2")), "a record of each")
    assert (kept("e1"), kept("e2")) == ([("strict", "block", 0.02)], [("loose", "tag", 0.1)])


def test_a_stream_may_interleave_models(
    two: Sidecar, upstream: Upstream, flagged: Floats, doubtful: Floats, passed: Floats
) -> None:
    messages = [
        ("loose", flagged[:1], "flag"),
        ("strict", flagged[:1], None),
        ("loose", passed[:1], "pass"),
        ("strict", doubtful[:1], "pass"),
        ("loose", doubtful[:1], "flag"),
        ("classifier", passed[:1], None),
        ("strict", passed[:1], "pass"),
    ]
    requests = [infer_request(images, model_name=name, id=f"s{row}") for row, (name, images, _) in enumerate(messages)]
    replies = exchange(two, *requests)
    for row, (name, _, decision) in enumerate(messages):
        reply = replies[f"s{row}"]
        assert bool(reply.error_message) is (decision is None)
        assert reply.infer_response.parameters["guard_decision"].string_param == (decision or "")
        assert reply.infer_response.model_name == name
    assert replies["s1"].error_message == BACKDOOR
    # What is refused was not asked.
    names = [ModelInferRequest.FromString(call.data).id for call in upstream.received if call.method.endswith("Infer")]
    assert names == ["s0", "s2", "s3", "s4", "s6"]


def test_a_stream_says_of_a_model_without_a_profile_that_it_is_unchecked_though_the_others_are_in_shadow(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, passed: Floats, tmp_path: Path
) -> None:
    config = configuration(
        tmp_path / "guard.toml",
        [{"model_name": "a", "profile": served_profile, "mode": "shadow"}],
        upstream=upstream.address,
        model=exported,
        failure_policy="open",
        stream_dialect="triton",
    )
    with launch("--config", config) as sidecar:
        replies = exchange(
            sidecar, *(infer_request(passed[:1], model_name=name, id=name) for name in ("a", "classifier"))
        )
    assert dict(replies["a"].infer_response.parameters) == {}
    parameters = replies["classifier"].infer_response.parameters
    assert parameters["guard_decision"].string_param == "unchecked"
    assert parameters["guard_reason"].string_param == "model_unknown"


# Two versions of one model.


@pytest.fixture(scope="module")
def versions(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    loose_profile: Path,
    running_upstream: Upstream,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Sidecar]:
    """Version 1 blocks, version 2 is in shadow; once with the reply's embeddings, once with guard's."""
    sources: dict[str, dict[str, object]] = {
        "reading": {"embedding_output": "embedding"},
        "embedding": {"model": exported},
    }
    rules: dict[str, dict[str, object]] = {
        "1": {"profile": served_profile, "mode": "block", "failure_policy": "closed"},
        "2": {"profile": loose_profile},
    }
    config = configuration(
        tmp_path_factory.mktemp("versions") / "guard.toml",
        [
            {"model_name": name, "model_version": version, **own, **source}
            for name, source in sources.items()
            for version, own in rules.items()
        ]
        + [
            {"model_name": "mixed", "model": exported, **rules["2"]},
            {"model_name": "mixed", "model": exported, "model_version": "1", **rules["1"]},
        ],
        upstream=running_upstream.address,
        mode="shadow",
        failure_policy="open",
        stream_dialect="triton",
    )
    with launch("--config", config) as running:
        yield running


both = pytest.mark.parametrize("name", ["reading", "embedding"])


@pytest.fixture
def preferring(upstream: Upstream) -> Callable[[str], None]:
    """Let the upstream server answer with a version, whichever was asked for."""

    def prefer(version: str) -> None:
        def answer(data: bytes) -> bytes:
            reply = ModelInferResponse.FromString(upstream.with_embedding(data))
            reply.model_version = version
            return reply.SerializeToString()

        upstream.answer = answer

    return prefer


def checked(sidecar: Sidecar, name: str, version: str) -> float:
    """How many requests of a version were decided."""
    mode = {"1": "block", "2": "shadow"}[version]
    return sum(
        sidecar.metric("guard_requests_total", model=name, version=version, decision=decision, mode=mode)
        for decision in ("pass", "flag")
    )


@both
def test_each_version_has_its_own_rules(
    versions: Sidecar, preferring: Callable[[str], None], flagged: Floats, passed: Floats, name: str
) -> None:
    with connected(versions.address) as client:
        preferring("1")
        error = client.refused(infer_request(flagged[:1], model_name=name, model_version="1"))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        reply = client.infer(infer_request(passed[:1], model_name=name, model_version="1"))
        assert (reply.decision, reply.parameter("guard_alpha")) == ("pass", 0.02)
        preferring("2")
        before = checked(versions, name, "2")
        reply = client.infer(infer_request(flagged[:1], model_name=name, model_version="2"))
        assert dict(reply.response.parameters) == {}
        eventually(lambda: checked(versions, name, "2") == before + 1, "the check on the side")


@both
def test_without_a_version_the_reply_says_whose_rules_hold(
    versions: Sidecar, preferring: Callable[[str], None], flagged: Floats, passed: Floats, name: str
) -> None:
    before = {version: checked(versions, name, version) for version in "12"}
    with connected(versions.address) as client:
        # Version 2 is the highest and in shadow; that must not open version 1 to whoever names none.
        preferring("1")
        error = client.refused(infer_request(flagged[:1], model_name=name))
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, BACKDOOR)
        reply = client.infer(infer_request(passed[:1], model_name=name))
        assert (reply.decision, reply.parameter("guard_mode"), reply.parameter("guard_alpha")) == (
            "pass",
            "block",
            0.02,
        )
        preferring("2")
        assert dict(client.infer(infer_request(flagged[:1], model_name=name)).response.parameters) == {}
    eventually(lambda: checked(versions, name, "2") == before["2"] + 1, "the check on the side")
    assert checked(versions, name, "1") == before["1"] + 2


@pytest.mark.parametrize("name", ["reading", "embedding", "mixed"])
def test_a_stream_without_versions_is_not_a_way_around_the_rules_of_the_version_that_answers(
    versions: Sidecar, preferring: Callable[[str], None], flagged: Floats, passed: Floats, name: str
) -> None:
    preferring("1")
    requests = [
        infer_request(images, model_name=name, id=str(row)) for row, images in enumerate((flagged[:1], passed[:1]))
    ]
    replies = exchange(versions, *requests)
    assert replies["0"].error_message
    assert not replies["0"].infer_response.outputs
    # Of what guard embeds, it no longer has the image when the reply says which version it is.
    assert bool(replies["1"].error_message) is (name != "reading")


@both
def test_the_answer_of_another_version_than_the_one_asked_for_is_not_taken_for_it(
    versions: Sidecar, preferring: Callable[[str], None], passed: Floats, name: str
) -> None:
    preferring("2")
    with connected(versions.address) as client:
        error = client.refused(infer_request(passed[:1], model_name=name, model_version="1"))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "no profile" in error.details()


@both
def test_a_version_without_a_profile_is_unknown_and_follows_the_top_level(
    versions: Sidecar, upstream: Upstream, preferring: Callable[[str], None], flagged: Floats, name: str
) -> None:
    def unknown() -> float:
        return versions.metric("guard_unchecked_total", model="(unknown)", reason="model_unknown")

    preferring("3")
    before = unknown()
    request = infer_request(flagged[:1], model_name=name, model_version="3")
    with connected(versions.address) as client:
        assert dict(client.infer(request).response.parameters) == {}
    assert unknown() == before + 1
    assert [call.data for call in upstream.inferences()] == [request.SerializeToString()]


def test_a_reply_of_a_version_that_is_not_configured_is_counted_as_unchecked(
    versions: Sidecar, preferring: Callable[[str], None], passed: Floats
) -> None:
    labels = {"model": "reading", "version": "2", "reason": "model_unknown"}
    before = versions.metric("guard_unchecked_total", **labels)
    preferring("3")
    with connected(versions.address) as client:
        client.infer(infer_request(passed[:1], model_name="reading"))
    eventually(lambda: versions.metric("guard_unchecked_total", **labels) == before + 1, "the count")


# Several models that guard serves itself.


@pytest.fixture(scope="module")
def serving(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    loose_profile: Path,
    other: Other,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Sidecar]:
    config = configuration(
        tmp_path_factory.mktemp("serving") / "guard.toml",
        [
            {"model_name": "a", "model_version": "9", "profile": served_profile, "mode": "block"},
            {"model_name": "a", "model_version": "10", "profile": other.directory, "model": other.exported},
            {"model_name": "b", "profile": loose_profile, "alpha": 0.2},
        ],
        model=exported,
    )
    with launch("--config", config) as running:
        yield running


def test_each_model_answers_under_its_name_and_version(
    serving: Sidecar, classify: ExportedClassifier, other: Other, passed: Floats
) -> None:
    with connected(serving.address) as client:
        for name, version, model, answered in (
            ("a", "9", classify, "9"),
            ("a", "10", other.classify, "10"),
            ("a", "", other.classify, "10"),
            ("b", "", classify, "1"),
            ("b", "1", classify, "1"),
        ):
            reply = client.infer(infer_request(passed[:1], model_name=name, model_version=version))
            assert (reply.response.model_name, reply.response.model_version) == (name, answered)
            logits = np.frombuffer(reply.response.raw_output_contents[reply.outputs.index("logits")], np.float32)
            np.testing.assert_allclose(logits, model.run(passed[:1])[1][0], atol=1e-4)
    assert serving.metric("guard_requests_total", model="a", version="9", decision="pass", mode="block") == 1
    assert serving.metric("guard_alpha_ratio", model="b") == 0.2


@pytest.mark.parametrize(("name", "version"), [("a", "1"), ("a", "11"), ("b", "9"), ("c", ""), ("classifier", "")])
def test_other_names_and_versions_are_not_found(serving: Sidecar, passed: Floats, name: str, version: str) -> None:
    with connected(serving.address) as client:
        error = client.refused(infer_request(passed[:1], model_name=name, model_version=version))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "'a' (version 9), 'a' (version 10), 'b' (version 1)" in error.details()
        for method, message in (
            ("ModelReady", ModelReadyRequest(name=name, version=version)),
            ("ModelMetadata", ModelMetadataRequest(name=name, version=version)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                client.call(method, message.SerializeToString())
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_metadata_of_a_model_list_its_versions(serving: Sidecar) -> None:
    with connected(serving.address) as client:
        for name, version, listed in (("a", "", ["9", "10"]), ("a", "9", ["9", "10"]), ("b", "1", ["1"])):
            data = client.call("ModelMetadata", ModelMetadataRequest(name=name, version=version).SerializeToString())
            assert list(ModelMetadataResponse.FromString(data).versions) == listed


# Profiles that are replaced.


@dataclass
class Changing:
    """A sidecar whose files change: the model `a`, and the model `clock`, of which each reload is a look at the files.

    Its models are looked at in the order of the configuration, `a` first.
    """

    sidecar: Sidecar
    folder: Path
    ticks: int = 0

    @property
    def profile(self) -> Path:
        return self.folder / "profile"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    def look(self) -> None:
        """Wait until the sidecar has looked at the files as they are now."""
        self.ticks += 1
        os.utime(self.folder / "clock" / "profile.json", ns=(self.ticks, self.ticks))
        eventually(
            lambda: self.sidecar.metric("guard_profile_reloads_total", model="clock") == self.ticks, "a look at files"
        )

    def put(self, made: Path, place: Path) -> None:
        """Take the place of a folder by renaming."""
        place.rename(Path(tempfile.mkdtemp(prefix="old-", dir=self.folder)) / place.name)
        made.rename(place)

    def counts(self) -> tuple[float, float, float]:
        """Reloads that were taken, that were not, and whether the profile in use is stale."""
        names = ("guard_profile_reloads_total", "guard_profile_reload_failures_total", "guard_profile_stale")
        first, second, third = (self.sidecar.metric(name, model="a") for name in names)
        return first, second, third


@pytest.fixture
def changing(launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path) -> Iterator[Changing]:
    for name, source in (("exported", exported), ("profile", served_profile), ("clock", served_profile)):
        shutil.copytree(source, tmp_path / name)
    config = configuration(
        tmp_path / "guard.toml",
        [
            {"model_name": "a", "profile": tmp_path / "profile", "model": tmp_path / "exported"},
            {"model_name": "clock", "profile": tmp_path / "clock", "model": exported},
        ],
        state_dir=tmp_path / "state",
    )
    with launch("--config", config, "--keep-embeddings", "100000") as running:
        yield Changing(running, tmp_path)


@dataclass
class Traffic:
    """What a client got that does not stop."""

    replies: list[Reply] = field(default_factory=list)
    errors: list[grpc.RpcError] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def send(self, client: Client, images: Floats) -> None:
        while not self.ended.is_set():
            try:
                self.replies.append(client.infer(infer_request(images, model_name="a")))
            except grpc.RpcError as error:
                self.errors.append(error)

    @property
    def alphas(self) -> list[float]:
        """One after the other, without repetition."""
        found = [float(reply.parameter("guard_alpha")) for reply in self.replies]
        return [alpha for row, alpha in enumerate(found) if row == 0 or alpha != found[row - 1]]


@contextmanager
def traffic(sidecar: Sidecar, images: Floats) -> Iterator[Traffic]:
    kept = Traffic()
    with connected(sidecar.address) as client:
        sender = threading.Thread(target=kept.send, args=(client, images))
        sender.start()
        try:
            yield kept
        finally:
            kept.ended.set()
            sender.join(WAIT_SECONDS)


def broken(kind: str, profile: Profile, other: Other, folder: Path) -> Path:
    """A profile that cannot be used."""
    place = folder / kind
    if kind == "uncalibrated":
        profile = Profile(replace(profile.document, calibration=None), profile.triggers)
    (other.profile if kind == "foreign" else profile).save(place)
    if kind == "truncated":
        file = place / "reference.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    if kind == "no-json":
        (place / "profile.json").write_text("[", encoding="utf-8")
    return place


def test_a_profile_that_is_replaced_is_taken_between_two_requests_and_a_broken_one_is_not(
    changing: Changing, profile: Profile, loose: Profile, other: Other, doubtful: Floats
) -> None:
    sidecar = changing.sidecar
    changing.look()
    assert changing.counts() == (0, 0, 0)
    with traffic(sidecar, doubtful[:1]) as sent:
        eventually(lambda: len(sent.replies) > 5, "traffic")
        loose.save(changing.profile)
        eventually(lambda: sidecar.metric("guard_alpha_ratio", model="a") == 0.1, "the new profile")
        after = len(sent.replies) + 5
        eventually(lambda: len(sent.replies) > after, "more traffic")
        assert changing.counts() == (1, 0, 0)
        for number, kind in enumerate(("truncated", "uncalibrated", "foreign", "no-json"), 1):
            changing.put(broken(kind, profile, other, changing.folder), changing.profile)
            changing.look()
            assert changing.counts() == (1, number, 1), kind
            assert sidecar.metric("guard_alpha_ratio", model="a") == 0.1
        changing.look()
        # It is not tried again before it changes.
        assert changing.counts() == (1, 4, 1)
        after = len(sent.replies) + 5
        eventually(lambda: len(sent.replies) > after, "more traffic")
        profile.save(changing.profile)
        changing.look()
        assert changing.counts() == (2, 4, 0)
        after = len(sent.replies) + 5
        eventually(lambda: len(sent.replies) > after, "more traffic")
    assert sent.errors == []
    assert sent.alphas == [0.02, 0.1, 0.02]
    assert {(reply.decision, reply.parameter("guard_alpha")) for reply in sent.replies} == {
        ("pass", 0.02),
        ("flag", 0.1),
    }
    assert sidecar.stderr.count("are not used, the old ones stay") == 4
    assert sidecar.metric("guard_profile_stale", model="clock") == 0
    # What was sampled before a reload is still there after it.
    images = sum(sidecar.metric("guard_images_total", model="a", decision=decision) for decision in ("pass", "flag"))
    assert images == len(sent.replies)
    sidecar.process.terminate()
    assert sidecar.process.wait(WAIT_SECONDS) == 0
    assert len(profiles.read_embeddings(changing.folder / "state" / "traffic-a.npy", 16)) == len(sent.replies)


def test_a_bank_that_is_written_over_in_place_ends_nothing(changing: Changing, passed: Floats) -> None:
    file = changing.profile / "reference.safetensors"
    whole = file.read_bytes()
    with connected(changing.sidecar.address) as client:
        for data, counts in ((b"", (0, 1, 1)), (whole, (1, 1, 0))):
            # As `cp` does it: the same file, shortened first.
            file.write_bytes(data)
            assert client.infer(infer_request(passed[:1], model_name="a")).decision == "pass"
            changing.look()
            assert changing.counts() == counts


def test_a_profile_that_is_gone_for_a_while_stays_in_use(changing: Changing, passed: Floats) -> None:
    away = changing.folder / "away"
    changing.profile.rename(away)
    changing.look()
    with connected(changing.sidecar.address) as client:
        assert client.infer(infer_request(passed[:1], model_name="a")).decision == "pass"
        away.rename(changing.profile)
        changing.look()
        assert client.infer(infer_request(passed[:1], model_name="a")).decision == "pass"
    assert changing.counts() == (0, 0, 0)


def test_a_model_and_its_profile_are_replaced_together(
    changing: Changing, classify: ExportedClassifier, other: Other, passed: Floats
) -> None:
    def logits(client: Client) -> Floats:
        reply = client.infer(infer_request(passed[:1], model_name="a"))
        return np.frombuffer(reply.response.raw_output_contents[reply.outputs.index("logits")], np.float32)

    with connected(changing.sidecar.address) as client:
        np.testing.assert_allclose(logits(client), classify.run(passed[:1])[1][0], atol=1e-4)
        shutil.copytree(other.exported, changing.folder / "new")
        changing.put(changing.folder / "new", changing.exported)
        changing.look()
        # Half of the way: both old ones stay, as they belong together.
        assert changing.counts() == (0, 1, 1)
        np.testing.assert_allclose(logits(client), classify.run(passed[:1])[1][0], atol=1e-4)
        other.profile.save(changing.profile)
        changing.look()
        assert changing.counts() == (1, 1, 0)
        for _ in range(3):
            np.testing.assert_allclose(logits(client), other.classify.run(passed[:1])[1][0], atol=1e-4)
    sidecar = changing.sidecar
    assert sidecar.metric("guard_alpha_ratio", model="a") == 0.05
    sidecar.process.terminate()
    assert sidecar.process.wait(WAIT_SECONDS) == 0
    # Embeddings of two models do not make one sample.
    sample = profiles.read_embeddings(changing.folder / "state" / "traffic-a.npy", 16)
    np.testing.assert_allclose(sample, np.repeat(other.classify.run(passed[:1])[0], 3, axis=0), atol=1e-4)


# A share of the requests, and another alpha.


def test_a_share_is_checked_and_the_rest_is_served_and_says_so(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, flagged: Floats, passed: Floats
) -> None:
    number = 300
    sent = [infer_request((flagged if row % 3 == 0 else passed)[:1], id=str(row)) for row in range(number)]
    arguments = ("--upstream", upstream.address, "--model", exported, "--profile", served_profile)
    with launch(*arguments, "--checked-share", "0.5") as sidecar, connected(sidecar.address) as client:
        replies = [client.infer(request) for request in sent]
        unchecked = sidecar.metric("guard_unchecked_total", model="classifier", reason="not_sampled")
        seen = sidecar.metric("guard_p_value_bucket", model="classifier", le="1.0")
    assert [call.data for call in upstream.inferences()] == [request.SerializeToString() for request in sent]
    left = [reply for reply in replies if reply.decision == "unchecked"]
    assert {reason(reply) for reply in left} == {("unchecked", "not_sampled")}
    assert (unchecked, seen) == (len(left), number - len(left))
    lowest, highest = binom.ppf([1e-7, 1 - 1e-7], number, 0.5)
    assert lowest <= len(left) <= highest
    for row, reply in enumerate(replies):
        assert reply.decision in {"unchecked", "flag" if row % 3 == 0 else "pass"}
        assert reply.outputs == ["logits"]


def test_an_alpha_replaces_that_of_the_calibration(
    launch: Launcher, exported: Path, served_profile: Path, profile: Profile, classify: ExportedClassifier
) -> None:
    images = classify.preprocessing.normalise(random_images(150, seed=8).numpy())
    detector = profile.detector(alpha=0.2)
    embeddings = classify.run(images)[0]
    # Where rounding decides, a batch and a single image may differ.
    clear = abs(detector.screen.score_samples(embeddings).values - detector.threshold.value) > 0.01
    expected = detector.score(embeddings).flags[clear]
    assert expected.sum() > profile.detector().score(embeddings).flags.sum()
    with (
        launch("--model", exported, "--profile", served_profile, "--alpha", "0.2") as sidecar,
        connected(sidecar.address) as client,
    ):
        replies = [client.infer(infer_request(image[None])) for image in images[clear]]
        assert sidecar.metric("guard_alpha_ratio", model="classifier") == 0.2
        assert sidecar.metric("guard_threshold", model="classifier") == pytest.approx(detector.threshold.value)
        assert sidecar.announced["models"][0]["alpha"] == 0.2
    assert [reply.decision == "flag" for reply in replies] == expected.tolist()
    assert {reply.parameter("guard_alpha") for reply in replies} == {0.2}


def test_an_alpha_that_the_calibration_does_not_support_stops_the_start(exported: Path, served_profile: Path) -> None:
    code, lines = refused_start("--model", exported, "--profile", served_profile, "--alpha", "0.0001")
    assert (code, len(lines)) == (2, 1)
    assert "alpha" in lines[0]
    assert "0.0001" in lines[0]


def test_the_check_names_each_model_in_its_findings(
    exported: Path, served_profile: Path, other: Other, tmp_path: Path
) -> None:
    models: list[dict[str, object]] = [
        {"model_name": "a", "profile": served_profile},
        {"model_name": "a", "model_version": "2", "profile": served_profile, "model": other.exported},
        {"model_name": "c", "profile": served_profile, "alpha": 0.0001},
        {"model_name": "d", "profile": tmp_path / "absent"},
    ]
    config = configuration(tmp_path / "guard.toml", models, model=exported)
    done = subprocess.run(
        [*command("--config", config, "--check", "--json")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=WAIT_SECONDS,
        check=False,
    )
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr, document["ready"]) == (4, "", False)
    found = {finding["subject"]: finding["status"] for finding in document["findings"]}
    assert {subject for subject, status in found.items() if status == "failed"} == {
        "digest a@2",
        "calibration c",
        "profile d",
    }
    for subject in ("profile a", "calibration a", "model a", "digest a", "profile a@2", "model d", "listen"):
        assert found[subject] in {"ok", "warning"}


def test_a_model_that_is_wrong_is_named_in_the_line_that_refuses_the_start(
    exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    models: list[dict[str, object]] = [
        {"model_name": "a", "profile": served_profile},
        {"model_name": "b", "profile": tmp_path / "absent"},
    ]
    code, lines = refused_start("--config", configuration(tmp_path / "guard.toml", models, model=exported))
    assert (code, len(lines)) == (4, 1)
    assert str(tmp_path / "absent") in lines[0]
