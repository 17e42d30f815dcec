"""What follows a decision: evidence, alarms, a second look, a sample of the traffic."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from guard import profiles
from guard.classifiers import Classifier, ExportedClassifier
from guard.evidence import EVIDENCE_FILE, EvidenceLog, RecordFilter
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar.decisions.reservoir import Reservoir
from guard.sidecar.decisions.watch import input_digest
from tests.conftest import CLASSES, random_images
from tests.integration.sidecar.conftest import Floats, Launcher, Sidecar, connected, infer_request, refused_start

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def ask(sidecar: Sidecar, images: Floats, **more: str) -> list[str]:
    """One request for each image; the decisions."""
    with connected(sidecar.address) as client:
        return [
            client.infer(infer_request(images[row : row + 1], id=f"r{row}", **more)).decision
            for row in range(len(images))
        ]


@pytest.fixture(scope="module")
def flagged(classify: ExportedClassifier, profile: Profile, triggered: Floats) -> Floats:
    return triggered[profile.detector().score(classify.run(triggered)[0]).flags]


def test_each_flagged_image_is_noted_with_what_led_to_it(
    launch: Launcher, exported: Path, served_profile: Path, flagged: Floats, clean: Floats, tmp_path: Path
) -> None:
    with (
        launch(
            "--model", exported, "--profile", served_profile, "--state-dir", tmp_path / "state", "--thumbnails"
        ) as running,
        connected(running.address) as client,
    ):
        batch = np.concatenate([clean[:1], flagged[:2]])
        traced = (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)
        reply = client.infer(infer_request(batch, id="order-66"), metadata=traced)
        p_values = np.frombuffer(reply.response.raw_output_contents[reply.outputs.index("guard_p_value")], np.float32)
    records = list(EvidenceLog(tmp_path / "state" / EVIDENCE_FILE).records(RecordFilter(request_id="order-66")))
    assert sorted(record.image for record in records if record.image) == [1, 2]
    for record in records:
        assert (record.decision, record.mode, record.trace_id) == ("flag", "tag", TRACE)
        assert record.p_value == pytest.approx(float(p_values[record.image]), rel=1e-5)
        assert record.alpha == 0.02
        assert record.predicted in CLASSES.names
        assert record.input_digest == hashlib.sha256(batch[record.image].tobytes()).hexdigest()
        assert record.thumbnail is not None
        assert record.thumbnail.startswith(b"\xff\xd8")
        assert set(record.scores) == {"score", "k-distance", "match patch-1"}
        assert record.scores["score"] > record.thresholds["score"]
        assert (record.trigger, record.target) == ("patch-1", "dog")


def test_a_burst_of_triggered_requests_raises_an_alarm_that_outlives_a_restart(
    launch: Launcher, exported: Path, served_profile: Path, flagged: Floats, clean: Floats, tmp_path: Path
) -> None:
    arguments = (
        "--model",
        exported,
        "--profile",
        served_profile,
        "--state-dir",
        tmp_path / "state",
        "--run-length",
        10_000,
    )
    stream = {"model": "classifier", "kind": "attack", "stream": "match patch-1"}
    with launch(*map(str, arguments)) as running:
        ask(running, clean)
        assert running.metric("guard_alarms_total", model="classifier", kind="attack") == 0
        ask(running, np.concatenate([flagged] * (1 + 60 // len(flagged))))
        assert running.metric("guard_alarm", **stream) == 1
        assert running.metric("guard_alarms_total", model="classifier", kind="attack") == 1
        assert "attack in the stream 'match patch-1'" in running.stderr
        counted = running.metric("guard_p_value_bucket", model="classifier", le="1.0")
        assert counted == running.metric("guard_images_total", model="classifier", decision="flag") + running.metric(
            "guard_images_total", model="classifier", decision="pass"
        )
    with launch(*map(str, arguments)) as again:
        assert again.metric("guard_alarm", **stream) == 1


def test_a_second_look_is_counted_and_explained(
    launch: Launcher, exported: Path, served_profile: Path, flagged: Floats, tmp_path: Path
) -> None:
    more = ("--state-dir", tmp_path / "state", "--second-looks", "1000")
    with launch("--model", exported, "--profile", served_profile, *more) as running:
        ask(running, flagged[:5])
        outcomes = [
            outcome
            for outcome in ("confirmed", "withdrawn", "undecided")
            if f'outcome="{outcome}"' in "".join(_series(running, "guard_second_looks_total"))
        ]
    records = list(EvidenceLog(tmp_path / "state" / EVIDENCE_FILE).records())
    assert len(records) == 5
    assert {record.second_look for record in records} == set(outcomes)
    assert all(record.explanation for record in records)
    assert all((record.decision == "pass") == (record.second_look == "withdrawn") for record in records)


def _series(sidecar: Sidecar, name: str) -> list[str]:
    from guard.demo.traffic import scrape

    return scrape(str(sidecar.announced["metrics"]), (name,))


def test_a_sample_of_the_traffic_sets_a_new_threshold(
    launch: Launcher, exported: Path, served_profile: Path, classifier: Classifier, tmp_path: Path
) -> None:
    images = ExportedClassifier(exported).preprocessing.normalise(random_images(100, seed=9).numpy())
    more = ("--state-dir", tmp_path / "state", "--keep-embeddings", "80")
    with (
        launch("--model", exported, "--profile", served_profile, *more) as running,
        connected(running.address) as client,
    ):
        client.infer(infer_request(images))
    embeddings = profiles.read_embeddings(tmp_path / "state" / "traffic-classifier.npy", 16)
    assert embeddings.shape == (80, 16)
    known = {tuple(row) for row in classifier.embed(random_images(100, seed=9)).numpy().round(3).tolist()}
    assert {tuple(row) for row in embeddings.round(3).tolist()} <= known
    before = Profile.open(served_profile)
    after = before.recalibrate(embeddings, 0.05).document.calibration
    assert after
    assert before.document.calibration
    assert after.reference == before.document.calibration.reference
    assert after.threshold.size + after.held_out + len(after.left_out) == 80


def test_state_that_cannot_be_used_is_moved_aside_and_a_second_sidecar_is_kept_away(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    (tmp_path / EVIDENCE_FILE).write_bytes(b"no database" * 100)
    arguments = ("--model", exported, "--profile", served_profile, "--state-dir", tmp_path)
    with launch(*arguments) as sidecar:
        assert sidecar.metric("guard_state_damaged_total", kind="evidence") == 1
        code, lines = refused_start(*arguments)
        assert (code, len(lines)) == (2, 1)
        assert f"another sidecar uses the folder {tmp_path}" in lines[0]
    (aside,) = tmp_path.glob(f"{EVIDENCE_FILE}.damaged-*[0-9Z]")
    assert aside.read_bytes() == b"no database" * 100
    code, lines = refused_start("--model", exported, "--profile", served_profile, "--keep-embeddings", "10")
    assert code == 2
    assert "--state-dir" in lines[-1]


def test_a_reservoir_keeps_each_embedding_with_the_same_chance() -> None:
    stream = np.arange(100, dtype=np.float32)[:, None]
    counts = np.zeros(100)
    for seed in range(400):
        reservoir = Reservoir(20, 1, seed=seed)
        for part in np.split(stream, [3, 30, 31]):
            reservoir.add(part)
        assert len(reservoir.embeddings) == 20
        counts[reservoir.embeddings[:, 0].astype(int)] += 1
    # Binomial: 400 draws at 0.2, standard deviation 8.
    assert abs(counts - 80).max() < 4.5 * 8
    few = Reservoir(5, 1)
    few.add(stream[:3])
    assert few.embeddings[:, 0].tolist() == [0, 1, 2]


def test_the_digest_of_an_image_is_the_same_however_it_was_sent() -> None:
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    raw = infer_request(images)
    typed = infer_request(images, raw_input_contents=[])
    typed.inputs[0].contents.fp32_contents.extend(images.ravel().tolist())
    expected = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    for request in (raw, typed):
        assert [input_digest(request, row, "image") for row in (0, 1)] == expected
    files = [b"first", b"the second"]
    tensor = ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[2])
    packed = ModelInferRequest(
        inputs=[tensor], raw_input_contents=[b"".join(len(file).to_bytes(4, "little") + file for file in files)]
    )
    listed = ModelInferRequest(inputs=[tensor])
    listed.inputs[0].contents.bytes_contents.extend(files)
    for request in (packed, listed):
        assert [input_digest(request, row, "image") for row in (0, 1)] == [
            hashlib.sha256(file).hexdigest() for file in files
        ]
    # The only input is read whatever its name is, so its digest is recorded too.
    assert input_digest(raw, 0, "another") == expected[0]
    raw.inputs.add(name="more", datatype="FP32")
    assert input_digest(raw, 0, "another") == ""
