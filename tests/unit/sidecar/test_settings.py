import pickle
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from guard.cli import cli
from guard.cli.serve import serve
from guard.errors import UsageError
from guard.sidecar import FailurePolicy, Mode, Settings
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.model_settings import RENAMED

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
    config = toml(tmp_path, 'profile = "file"\nmodel = "file"\nmodel_name = "file"\nmode = "block"\nworkers = 5\n')
    monkeypatch.setenv("GUARD_MODEL_NAME", "environment")
    monkeypatch.setenv("GUARD_MODEL", "environment")
    settings = Settings.load(config, model_name="command-line", mode=None)
    assert settings.model_name == "command-line"
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


@pytest.mark.parametrize("text", ["profile =", "[profile", 'model_name = "a"\nmodel_name = "b"', "\x00"])
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
        ({"tls_certificate": "c"}, "--tls-certificate and --tls-key must be given together"),
        ({"tls_key": "k"}, "--tls-certificate and --tls-key must be given together"),
        ({"tls_client_ca": "a"}, "--tls-client-ca needs --tls-certificate"),
        ({"upstream_tls": "system"}, "it needs --upstream"),
        ({"upstream": "h:1", "upstream_server_name": "n"}, "need --upstream-tls"),
        ({"upstream": "h:1", "upstream_certificate": "c", "upstream_key": "k"}, "need --upstream-tls"),
        ({"upstream": "h:1", "upstream_tls": "a", "upstream_key": "k"}, "--upstream-key must be given together"),
    ],
)
def test_half_of_tls_is_refused_with_the_other_half(values: dict[str, Any], hint: str) -> None:
    assert hint in refused(**MINIMUM, **values)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = RENAMED[old]
    assert refused(toml(tmp_path, f'{old} = "x"')) == f"{old} is now called {new}"
    model = f'model_name = "a"\nprofile = "p"\n{old} = "x"'
    assert refused(entries(tmp_path, model)) == f"models.1: {old} is now called {new}"
    option, renamed = (f"--{name.replace('_', '-')}" for name in (old, new))
    for arguments in ([option, "x"], [f"{option}=x"]):
        result = CliRunner().invoke(cli, ["serve", *arguments])
        assert isinstance(result.exception, UsageError)
        assert str(result.exception) == f"{option} is now called {renamed}"
    monkeypatch.setenv(f"GUARD_{old.upper()}", "x")
    assert refused() == f"GUARD_{old.upper()} is now called GUARD_{new.upper()}"


def test_new_names_are_settings() -> None:
    assert set(RENAMED.values()) <= set(Settings.model_fields)
    assert not set(RENAMED) & set(Settings.model_fields)


def test_every_setting_is_an_option_of_the_command() -> None:
    options = {parameter.name for parameter in serve.get_params(click.Context(serve))}
    assert set(Settings.model_fields) - {"models"} <= options


def test_an_option_has_the_type_of_its_setting_and_leaves_the_default_to_it() -> None:
    parameters = {parameter.name: parameter for parameter in serve.get_params(click.Context(serve))}
    assert all(parameters[name].default is None for name in Settings.model_fields if name != "models")
    assert isinstance(parameters["mode"].type, click.Choice)
    assert parameters["log_format"].make_metavar(click.Context(serve)) == "[json|text]"
    assert parameters["timeout"].type is click.FLOAT
    assert parameters["max_batch"].type is click.INT


def test_settings_reach_another_process_whole(tmp_path: Path) -> None:
    settings = Settings.load(toml(tmp_path, "workers = 5"), **MINIMUM)
    again = pickle.loads(pickle.dumps(settings))  # noqa: S301 - made here
    assert again == settings
    assert again.model_fields_set == settings.model_fields_set == {"workers", "profile", "model"}


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({}, "give --model to serve an exported classifier, or --upstream to proxy an inference server"),
        ({"embedding_output": "e"}, "give --model"),
        ({"model": "m", "embedding_output": "e"}, "it needs --upstream"),
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
        ("drain_timeout", -1),
        ("drain_delay", -1),
        ("log_format", "xml"),
        ("drain_timeout", float("nan")),
        ("model_name", ""),
        ("input_tensor", ""),
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


def entries(directory: Path, *models: str, top: str = "") -> Path:
    return toml(directory, top + "".join(f"\n[[models]]\n{model}" for model in models))


def test_a_model_takes_from_the_top_level_what_its_entry_does_not_say(tmp_path: Path) -> None:
    top = 'upstream = "h:1"\nmode = "shadow"\nalpha = 0.01\nembedding_output = "e"\ninput_tensor = "pixels"\n'
    config = entries(
        tmp_path,
        'model_name = "a"\nprofile = "p"',
        'model_name = "b"\nprofile = "q"\nmode = "block"\nalpha = 0.1',
        top=top,
    )
    settings = Settings.load(config, input_tensor="files")
    first, second = settings.served
    assert (first.model_name, first.profile, first.mode, first.alpha) == ("a", Path("p"), Mode.SHADOW, 0.01)
    assert (second.model_name, second.profile, second.mode, second.alpha) == ("b", Path("q"), Mode.BLOCK, 0.1)
    assert (first.embedding_output, first.input_tensor, second.input_tensor) == ("e", "files", "files")
    # The default failure policy follows the mode that the entry has.
    assert (first.on_failure, second.on_failure) == (FailurePolicy.OPEN, FailurePolicy.CLOSED)


def test_a_failure_policy_at_the_top_level_holds_for_a_model_with_a_mode_of_its_own(tmp_path: Path) -> None:
    top = 'model = "m"\nmode = "shadow"\nfailure_policy = "closed"\n'
    config = entries(
        tmp_path, 'model_name = "a"\nprofile = "p"', 'model_name = "b"\nprofile = "p"\nfailure_policy = "open"', top=top
    )
    assert [each.on_failure for each in Settings.load(config).served] == [FailurePolicy.CLOSED, FailurePolicy.OPEN]


@pytest.mark.parametrize(("top", "own"), [("model", "embedding_output"), ("embedding_output", "model")])
def test_a_models_own_source_of_embeddings_replaces_the_other(tmp_path: Path, top: str, own: str) -> None:
    models = (f'model_name = "a"\nprofile = "p"\n{own} = "own"', 'model_name = "b"\nprofile = "p"')
    first, second = Settings.load(entries(tmp_path, *models, top=f'upstream = "h:1"\n{top} = "top"\n')).served
    assert (str(getattr(first, own)), getattr(first, top)) == ("own", None)
    assert (getattr(second, own), str(getattr(second, top))) == (None, "top")


def test_without_entries_the_top_level_is_the_one_model() -> None:
    (only,) = Settings.load(None, model_version="7", alpha=0.5, **MINIMUM).served
    assert (only.model_name, only.model_version, only.label, only.alpha) == ("classifier", "7", "classifier@7", 0.5)


def test_two_versions_of_one_name_and_one_without_are_three_models_before_an_upstream_server(tmp_path: Path) -> None:
    models = [
        f'model_name = "a/b"\nprofile = "p"\n{more}' for more in ("", 'model_version = "1"', 'model_version = "2"')
    ]
    settings = Settings.load(entries(tmp_path, *models, top='upstream = "h:1"\nmodel = "m"\n'))
    assert [each.label for each in settings.served] == ["a%2Fb", "a%2Fb@1", "a%2Fb@2"]


@pytest.mark.parametrize("name", ["model_name", "model_version", "profile"])
def test_what_each_model_has_for_itself_is_refused_at_the_top_level(tmp_path: Path, name: str) -> None:
    config = entries(tmp_path, 'model_name = "a"\nprofile = "p"', top='model = "m"\n')
    assert Settings.load(config).served[0].model_name == "a"
    assert f"with [[models]], {name} must stand in each entry" in refused(config, **{name: "x"})


@pytest.mark.parametrize(
    ("models", "hint"),
    [
        (['model_name = "a"\nprofile = "p"', 'profile = "p"'], "[[models]] number 2 has no model_name"),
        (['model_name = "a"\nprofile = "p"', 'model_name = "b"'], "model b: --profile is required"),
        (['model_name = "a"\nprofile = "p"\nembedding_output = "e"'], "model a: give --model"),
        (['model_name = "a"\nprofile = "p"', 'model_name = "a"\nprofile = "q"'], "model a is listed twice"),
        (['model_name = "a"\nprofile = "p"\nmodel_version = "2"'] * 2, "model a@2 is listed twice"),
        # Guard calls the version of a model without one "1" where it serves it itself.
        (
            ['model_name = "a"\nprofile = "p"', 'model_name = "a"\nprofile = "p"\nmodel_version = "1"'],
            "model a@1 is listed twice",
        ),
        (['model_name = "a"\nprofile = "p"', 'model_name = "b"\nprofile = "p"\nmodee = "tag"'], "models.2.modee: "),
        (['model_name = "a"\nprofile = "p"\nalpha = 1.0'], "models.1.alpha: "),
        (['model_name = "a"\nprofile = "p"\nprocesses = 2'], "models.1.processes: "),
        (['model_name = ""\nprofile = "p"'], "models.1.model_name: "),
    ],
)
def test_an_entry_that_cannot_be_served_is_refused_by_its_name_or_number(
    tmp_path: Path, models: list[str], hint: str
) -> None:
    assert refused(entries(tmp_path, *models, top='model = "m"\n')).startswith(hint)


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ("", "with --upstream, give one source of embeddings"),
        ('model = "m"\nembedding_output = "e"', "with --upstream, give one source of embeddings"),
        ('embedding_output = "e"\nsecond_looks = 1', "--second-looks needs --model"),
        ('model = "m"\nmode = "block"\nchecked_share = 0.5', "--checked-share below 1 needs"),
        ('embedding_output = "e"\nchecked_share = 0.5', "--checked-share below 1 needs"),
    ],
)
def test_an_entry_that_is_half_configured_is_refused_by_its_name(tmp_path: Path, more: str, hint: str) -> None:
    whole = 'model_name = "a"\nprofile = "p"\nmodel = "m"'
    config = entries(
        tmp_path, whole, f'model_name = "b"\nmodel_version = "2"\nprofile = "p"\n{more}', top='upstream = "h:1"\n'
    )
    assert refused(config).startswith(f"model b@2: {hint}")


def test_models_may_come_from_the_environment_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = entries(tmp_path, 'model_name = "file"\nprofile = "p"', top='model = "m"\n')
    monkeypatch.setenv(
        "GUARD_MODELS", '[{"model_name": "a", "profile": "p"}, {"model_name": "b", "profile": "q", "mode": "block"}]'
    )
    assert [(each.model_name, each.mode) for each in Settings.load(config).served] == [
        ("a", Mode.TAG),
        ("b", Mode.BLOCK),
    ]


@pytest.mark.parametrize("value", ["[{", "models", '[{"model_name": "a" "profile": "p"}]'])
def test_models_from_the_environment_that_are_no_json_are_refused_by_the_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GUARD_MODELS", value)
    assert refused(model="m").startswith("GUARD_MODELS is not valid JSON: ")


@pytest.mark.parametrize("value", ['{"model_name": "a"}', '"a"', '["a"]', '[{"model_name": "a", "profil": "p"}]'])
def test_models_from_the_environment_of_another_form_are_refused_by_place(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GUARD_MODELS", value)
    assert refused(model="m").startswith("models")


@pytest.mark.parametrize(
    "values",
    [
        {"model": "m"},
        {"upstream": "h:1", "embedding_output": "e"},
        {"upstream": "h:1", "model": "m", "mode": "block"},
    ],
)
def test_a_checked_share_is_refused_where_it_saves_nothing_or_leaves_blocking_to_chance(values: dict[str, Any]) -> None:
    assert Settings.load(None, profile="p", checked_share=1.0, **values).checked_share == 1
    assert "--checked-share below 1 needs --upstream, --model" in refused(profile="p", checked_share=0.99, **values)


@pytest.mark.parametrize("mode", ["shadow", "tag"])
def test_a_checked_share_is_accepted_beside_an_upstream_server(mode: str) -> None:
    assert Settings.load(None, upstream="h:1", checked_share=0.1, mode=mode, **MINIMUM).served[0].checked_share == 0.1


@pytest.mark.parametrize("name", ["alpha", "checked_share"])
@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), "half"])
def test_a_rate_that_is_none_is_refused_by_name(name: str, value: object) -> None:
    assert refused(**{**MINIMUM, "upstream": "h:1", name: value}).startswith(f"{name}: ")


def test_alpha_is_below_one() -> None:
    assert refused(**MINIMUM, alpha=1).startswith("alpha: ")


def test_several_processes_cannot_share_a_unix_socket() -> None:
    assert Settings.load(None, processes=2, listen="0.0.0.0:8001", **MINIMUM).processes == 2
    assert "--listen needs HOST:PORT" in refused(**MINIMUM, processes=2, listen="unix:/run/guard.sock")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "all"), ("all", "all"), ("near", "near"), ("off", "off"), ("0.25", "0.25"), (0.25, "0.25"), (1, "all")],
)
def test_all_requests_get_a_second_opinion_unless_it_is_set(given: object, expected: str, tmp_path: Path) -> None:
    settings = Settings.load(None, profile=tmp_path, model=tmp_path, second_opinion=given).served[0]
    assert settings.opinions == expected


@pytest.mark.parametrize("given", ["some", "0", "1.5", "-0.1", "nan", "inf", "", "ALL", True, [1]])
def test_a_second_opinion_is_one_of_three_words_or_a_share(given: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none of all, near, off, and no share in \(0, 1\]"):
        Settings.load(None, profile=tmp_path, model=tmp_path, second_opinion=given)


def test_chance_decides_nothing_that_is_blocked(tmp_path: Path) -> None:
    given = {"profile": tmp_path, "model": tmp_path, "mode": "block"}
    with pytest.raises(UsageError, match="a share as --second-opinion needs shadow or tag mode"):
        Settings.load(None, second_opinion="0.5", **given)
    assert Settings.load(None, second_opinion="near", **given).second_opinion == "near"


def test_each_setting_says_where_its_value_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "guard.toml"
    file.write_text('profile = "p"\nmodel = "m"\nworkers = 3\ntimeout = 2.0\nmax_batch = 8\n')
    monkeypatch.setenv("guard_workers", "4")
    monkeypatch.setenv("GUARD_TIMEOUT", "3")
    effective = {
        each.name: (each.value, each.source) for each in Settings.load(file, timeout=5.0, mode="shadow").effective
    }
    assert effective["max_batch"] == ("8", "file")
    assert effective["workers"] == ("4", "environment")
    assert effective["timeout"] == ("5.0", "option")
    assert effective["mode"] == ('"shadow"', "option")
    assert effective["processes"] == ("1", "default")


def test_what_a_model_has_of_its_own_is_listed_after_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "guard.toml"
    file.write_text('alpha = 0.02\n[[models]]\nmodel_name = "a"\nprofile = "p"\nmodel = "m"\nalpha = 0.5\n')
    own = [each for each in Settings.load(file).effective if each.model]
    assert {(each.model, each.name, each.value) for each in own} == {
        ("a", "model_name", '"a"'), ("a", "profile", '"p"'), ("a", "model", '"m"'), ("a", "alpha", "0.5")
    }  # fmt: skip
    assert {each.source for each in own} == {"file"}
