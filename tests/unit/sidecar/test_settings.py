from pathlib import Path
from typing import Any

import pytest

from guard.cli.serve import serve
from guard.errors import UsageError
from guard.sidecar import FailurePolicy, Mode, Settings
from guard.sidecar.addresses import socket_path, split_address

MINIMUM: dict[str, Any] = {"profile": Path("profile"), "model": Path("model")}


def toml(directory: Path, text: str) -> Path:
    path = directory / "guard.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(config: Path | None = None, **values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        Settings.load(config, **values)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toml(tmp_path, 'profile = "file"\nmodel = "file"\nname = "file"\nmode = "block"\nworkers = 5\n')
    monkeypatch.setenv("GUARD_NAME", "environment")
    monkeypatch.setenv("GUARD_MODEL", "environment")
    settings = Settings.load(config, name="command-line", mode=None)
    assert settings.name == "command-line"
    assert settings.model == Path("environment")
    assert settings.profile == Path("file")
    assert (settings.mode, settings.workers) == (Mode.BLOCK, 5)


def test_everything_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROFILE": "p", "UPSTREAM": "h:1", "EMBEDDING_OUTPUT": "e", "SCREENING": "false"}.items():
        monkeypatch.setenv(f"GUARD_{name}", value)
    settings = Settings.load(None)
    assert (settings.upstream, settings.embedding_output, settings.screening) == ("h:1", "e", False)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_MODE", "")
    assert Settings.load(None, **MINIMUM).mode is Mode.TAG


def test_false_on_the_command_line_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_SCREENING", "true")
    assert Settings.load(None, screening=False, **MINIMUM).screening is False


def test_an_unknown_name_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    config = toml(tmp_path, 'profile = "p"\nmodel = "m"\nmodee = "tag"\n')
    assert refused(config).startswith("modee: ")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "no configuration file" in refused(tmp_path / "absent.toml", **MINIMUM)
    assert str(tmp_path) in refused(tmp_path, **MINIMUM)


@pytest.mark.parametrize("text", ["profile =", "[profile", 'name = "a"\nname = "b"', "\x00"])
def test_broken_toml_is_refused_by_file(tmp_path: Path, text: str) -> None:
    message = refused(toml(tmp_path, text), **MINIMUM)
    assert "guard.toml is not valid TOML" in message


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    config = tmp_path / "guard.toml"
    config.write_bytes(b"\xff\xfe\x00")
    assert "guard.toml is not valid TOML" in refused(config, **MINIMUM)


@pytest.mark.parametrize("name", ["listen", "metrics", "upstream"])
@pytest.mark.parametrize("value", ["", ":80", "host", "host:", "host:port", "host:-1", "host:65536", "host:²", "80"])
def test_a_wrong_address_is_refused_with_the_form_expected(name: str, value: str) -> None:
    message = refused(**{**MINIMUM, name: value})
    assert message.startswith(f"{name}: ")
    assert message.endswith("is not HOST:PORT")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_a_unix_socket_is_an_address_for_inference_and_not_for_http() -> None:
    settings = Settings.load(None, listen="unix:/run/guard.sock", upstream="unix:models.sock", **MINIMUM)
    assert socket_path(settings.listen) == Path("/run/guard.sock")
    assert socket_path(settings.metrics) is None
    assert "metrics: " in refused(**MINIMUM, metrics="unix:/run/guard.sock")
    for path in ("", 108 * "x", 54 * "é"):
        assert "107 bytes" in refused(**MINIMUM, listen=f"unix:{path}")


@pytest.mark.parametrize("mode", ["660", "0660"])
def test_the_mode_of_a_socket_is_octal(mode: str) -> None:
    assert int(Settings.load(None, socket_mode=mode, **MINIMUM).socket_mode, 8) == 0o660
    assert refused(**MINIMUM, socket_mode="rw").startswith("socket_mode: ")


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"tls_certificate": "c"}, "--tls-certificate and --tls-key go together"),
        ({"tls_key": "k"}, "--tls-certificate and --tls-key go together"),
        ({"tls_client_ca": "a"}, "--tls-client-ca needs --tls-certificate"),
        ({"upstream_tls": "system"}, "give --upstream too"),
        ({"upstream": "h:1", "upstream_server_name": "n"}, "need --upstream-tls"),
        ({"upstream": "h:1", "upstream_certificate": "c", "upstream_key": "k"}, "need --upstream-tls"),
        ({"upstream": "h:1", "upstream_tls": "a", "upstream_key": "k"}, "--upstream-key go together"),
    ],
)
def test_half_of_tls_is_refused_with_the_other_half(values: dict[str, Any], hint: str) -> None:
    assert hint in refused(**MINIMUM, **values)


def test_every_setting_is_an_option_of_the_command() -> None:
    assert set(Settings.model_fields) <= {parameter.name for parameter in serve.params}


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({}, "give --model to serve an exported classifier, or --upstream to stand before a server"),
        ({"embedding_output": "e"}, "give --model"),
        ({"model": "m", "embedding_output": "e"}, "give --upstream too"),
        ({"upstream": "h:1"}, "give one source of embeddings: --model or --embedding-output"),
        ({"upstream": "h:1", "model": "m", "embedding_output": "e"}, "give one source of embeddings"),
    ],
)
def test_a_combination_that_serves_nothing_is_refused_with_what_to_give(values: dict[str, Any], hint: str) -> None:
    assert hint in refused(profile="p", **values)


@pytest.mark.parametrize(
    "values",
    [
        {"model": "m"},
        {"upstream": "h:1", "model": "m"},
        {"upstream": "h:1", "embedding_output": "e"},
    ],
)
def test_the_three_shapes_are_accepted(values: dict[str, str]) -> None:
    assert Settings.load(None, profile="p", **values).upstream == values.get("upstream")


def test_a_missing_profile_is_refused_by_name() -> None:
    assert "--profile is required" in refused(model="m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "silent"),
        ("failure_policy", "ajar"),
        ("timeout", 0),
        ("timeout", float("nan")),
        ("timeout", 61),
        ("max_message_bytes", 10),
        ("max_message_bytes", 2**31),
        ("max_pixels", 0),
        ("max_batch", 0),
        ("max_batch", 65_537),
        ("max_concurrent", 0),
        ("workers", 0),
        ("drain", -1),
        ("drain_delay", -1),
        ("log_format", "xml"),
        ("drain", float("nan")),
        ("name", ""),
        ("input", ""),
        ("workers", "many"),
    ],
)
def test_an_impossible_value_is_refused_by_name(name: str, value: object) -> None:
    assert refused(**{**MINIMUM, name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("mode", "policy"),
    [("shadow", FailurePolicy.OPEN), ("tag", FailurePolicy.CLOSED), ("block", FailurePolicy.CLOSED)],
)
def test_the_default_failure_policy_is_open_in_shadow_mode_only(mode: str, policy: FailurePolicy) -> None:
    assert Settings.load(None, mode=mode, **MINIMUM).on_failure is policy


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("policy", list(FailurePolicy))
def test_a_failure_policy_that_is_given_holds_in_every_mode(mode: Mode, policy: FailurePolicy) -> None:
    assert Settings.load(None, mode=mode, failure_policy=policy, **MINIMUM).on_failure is policy
