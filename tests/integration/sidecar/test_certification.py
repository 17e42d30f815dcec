"""A sidecar that serves only what was certified."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from guard.certificates import CERTIFICATE_FILE, PrivateKey, certify
from guard.profiles import Profile
from tests.integration.sidecar.conftest import (
    Client,
    Floats,
    Launcher,
    Sidecar,
    connected,
    eventually,
    infer_request,
    pairs,
    refused_start,
)
from tests.unit.certificates.conftest import keys, without_evidence

__all__ = ["keys"]


@pytest.fixture(scope="session")
def certified_now(
    profile: Profile, model_directory: Path, exported: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("certified-now")
    without_evidence(profile).save(folder / "profile")
    signing = [PrivateKey.read(keys / "ed.pem")]
    certify(folder / "profile", str(model_directory), signing, exported=exported)
    return folder / "profile"


@pytest.fixture
def vetted(certified_now: Path, tmp_path: Path) -> Path:
    """A certified profile, fresh for each test."""
    return Path(shutil.copytree(certified_now, tmp_path / "profile"))


def certified_state(sidecar: Sidecar) -> float:
    return sidecar.metric("guard_model_certified", model="classifier")


@contextmanager
def serving(launch: Launcher, exported: Path, profile: Path, *more: str | Path) -> Iterator[tuple[Sidecar, Client]]:
    arguments = ("--model", exported, "--profile", profile, "--require-certified", *more)
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        yield sidecar, client


def test_a_certified_model_is_served(launch: Launcher, exported: Path, vetted: Path, keys: Path, clean: Floats) -> None:
    with serving(launch, exported, vetted, "--trust", keys / "ed.pub") as (sidecar, client):
        assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}
        assert certified_state(sidecar) == 1
        assert sidecar.metric("guard_certificate_expiry_timestamp_seconds", model="classifier") > 1.7e9
        assert '"admitted":true' in sidecar.stderr.replace("\\", "")


def test_a_model_that_nobody_trusted_certified_does_not_start(exported: Path, vetted: Path, keys: Path) -> None:
    arguments = ("--model", exported, "--profile", vetted, "--require-certified")
    code, lines = refused_start(*arguments, "--trust", keys / "other.pub")
    assert code == 1
    assert "refused by the rule signature" in lines[-1]
    (vetted / CERTIFICATE_FILE).unlink()
    code, lines = refused_start(*arguments, "--trust", keys / "ed.pub")
    assert code == 1
    assert "refused by the rule certificate" in lines[-1]
    assert "was not certified" in lines[-1]
    code, lines = refused_start(*arguments)
    assert code == 2
    assert "--require-certified needs --trust or --policy" in lines[-1]


def test_under_the_policy_open_a_model_without_certificate_is_served_as_unchecked(
    launch: Launcher, exported: Path, vetted: Path, keys: Path, clean: Floats
) -> None:
    trust = ("--trust", keys / "other.pub", "--failure-policy", "open")
    with serving(launch, exported, vetted, *trust) as (sidecar, client):
        reply = client.infer(infer_request(clean[:1]))
        assert reply.decision in {"unchecked", "flag"}
        assert reply.parameter("guard_reason") == "model_not_certified"
        assert certified_state(sidecar) == 0
        assert "refused by the rule signature" in sidecar.stderr


def test_a_revoked_model_is_refused_while_it_is_served(
    launch: Launcher, exported: Path, vetted: Path, keys: Path, clean: Floats, tmp_path: Path
) -> None:
    policy, trusted = tmp_path / "policy.toml", f"[[keys]]\nname = 'vetting'\nfile = '{keys / 'ed.pub'}'\n"
    policy.write_text(trusted, encoding="utf-8")
    digest = Profile.open(vetted).document.model.digest
    watched = ("--policy", policy, "--certificate-interval", "0.1")
    with serving(launch, exported, vetted, *watched) as (sidecar, client):
        assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}
        policy.write_text(trusted + f"[[revoked]]\ndigest = '{digest}'\nreason = 'backdoored'\n", encoding="utf-8")
        eventually(lambda: certified_state(sidecar) == 0, "noticing the revocation")
        error = client.refused(infer_request(clean[:1]))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert dict(pairs(error.trailing_metadata()))["guard-reason"] == "model_not_certified"
        eventually(lambda: sidecar.metric("guard_ready") == 0, "readiness following")
        assert "was revoked: backdoored" in sidecar.stderr
        policy.write_text(trusted, encoding="utf-8")
        eventually(lambda: sidecar.metric("guard_ready") == 1, "readiness recovering")
        assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}
        policy.write_text("threshold = [", encoding="utf-8")
        eventually(lambda: certified_state(sidecar) == 0, "noticing the damaged policy")


def test_a_renewed_certificate_is_taken_up_and_one_that_runs_out_is_announced(
    launch: Launcher, exported: Path, vetted: Path, keys: Path, model_directory: Path
) -> None:
    signing = [PrivateKey.read(keys / "ed.pem")]
    certify(vetted, str(model_directory), signing, exported=exported, days=1)
    with serving(launch, exported, vetted, "--trust", keys / "ed.pub") as (sidecar, _):
        assert "the certificate of the model classifier expires at" in sidecar.stderr
        expiry = sidecar.metric("guard_certificate_expiry_timestamp_seconds", model="classifier")
        certify(vetted, str(model_directory), signing, exported=exported, days=100)
        eventually(
            lambda: (
                sidecar.metric("guard_certificate_expiry_timestamp_seconds", model="classifier") > expiry + 90 * 86400
            ),
            "taking up the new certificate",
        )


def test_a_profile_without_certificate_is_not_taken_up(
    launch: Launcher, exported: Path, vetted: Path, keys: Path, clean: Floats, profile: Profile
) -> None:
    with serving(launch, exported, vetted, "--trust", keys / "ed.pub") as (sidecar, client):
        kept = (vetted / CERTIFICATE_FILE).read_bytes()
        profile.save(vetted)
        (vetted / CERTIFICATE_FILE).write_bytes(kept)
        eventually(lambda: sidecar.metric("guard_profile_stale", model="classifier") == 1, "refusing the profile")
        assert "profile/profile.json is not the file that was certified" in sidecar.stderr
        assert certified_state(sidecar) == 1
        assert client.infer(infer_request(clean[:1])).decision in {"pass", "flag"}
