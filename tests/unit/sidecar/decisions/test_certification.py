"""The decision about a certificate over time, and settings that can only make it stricter."""

import logging
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from guard.certificates import files_of_model, files_of_profile
from guard.errors import UsageError
from guard.sidecar import Settings
from guard.sidecar.decisions.certification import Certification
from guard.sidecar.policy import FailurePolicy
from tests.unit.certificates.conftest import NOW, certified, certified_once, keys

__all__ = ["certified", "certified_once", "keys"]


def test_a_certificate_is_announced_before_it_expires_and_refused_from_then_on(
    certified: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = Settings(profile=certified / "profile", model=certified / "exported", trust=(keys / "ed.pub",))
    files = files_of_model(certified / "exported") | files_of_profile(certified / "profile")
    now = NOW

    def clock() -> datetime:
        return now

    certification = Certification(settings, settings.served[0], files, clock)
    assert certification.admission.admitted
    assert "expires at" not in caplog.text
    for days, changed, admitted, expected in (
        (75, False, True, ""),
        (77, False, True, "expires at 2026-09-29T00:00:00Z"),
        (78, False, True, ""),
        (90, True, False, "the certificate expired at"),
        (91, False, False, ""),
    ):
        caplog.clear()
        now = NOW + timedelta(days=days)
        assert certification.renew() is changed
        assert certification.admission.admitted is admitted
        assert expected in caplog.text
        assert bool(caplog.text) is bool(expected)


def load(tmp_path: Path, text: str, **options: object) -> Settings:
    config = tmp_path / "guard.toml"
    config.write_text(f'profile = "p"\nmodel = "m"\n{text}', encoding="utf-8")
    return Settings.load(config, **options)


REQUIRED = 'require_certified = true\npolicy = ["file.toml"]\n'


def test_policies_of_all_sources_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_POLICY", "variable.toml,file.toml")
    found = load(tmp_path, REQUIRED, policy="option.toml")
    assert found.policy == (Path("option.toml"), Path("variable.toml"), Path("file.toml"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GUARD_REQUIRE_CERTIFIED", "false"),
        ("GUARD_TRUST", "attacker.pub"),
        ("guard_trust", "attacker.pub"),
        ("GUARD_FAILURE_POLICY", "open"),
        ("Guard_Failure_Policy", "open"),
        ("GUARD_MODELS", '[{"model_name": "m", "profile": "p", "failure_policy": "open"}]'),
    ],
)
def test_the_environment_cannot_weaken_what_the_file_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match="the environment must not change"):
        load(tmp_path, REQUIRED)


def test_options_cannot_weaken_what_the_file_requires(tmp_path: Path) -> None:
    for name, value in (("require_certified", False), ("trust", "a.pub"), ("failure_policy", "open")):
        with pytest.raises(UsageError, match=f"an option must not change {name}"):
            load(tmp_path, REQUIRED, **{name: value})
    assert load(tmp_path, REQUIRED, failure_policy="closed").require_certified


def test_another_mode_does_not_bring_another_failure_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_MODE", "shadow")
    assert load(tmp_path, REQUIRED).on_failure is FailurePolicy.CLOSED
    monkeypatch.delenv("GUARD_MODE")
    assert load(tmp_path, 'mode = "shadow"\n' + REQUIRED).on_failure is FailurePolicy.OPEN


def test_the_environment_can_require_what_the_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_REQUIRE_CERTIFIED", "true")
    monkeypatch.setenv("GUARD_TRUST", "ours.pub")
    found = load(tmp_path, "")
    assert found.require_certified
    assert found.trust == (Path("ours.pub"),)
