"""What the environment of a sidecar must not change: whom it calls, and what its dependencies do on their own."""

import ast
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import guard
from guard.diagnostics.exposure import exposures
from guard.protocol import SERVICE
from guard.testing import InferenceServer

LIVE = f"/{SERVICE}/ServerLive"
PROXIES = (
    {"http_proxy": "http://{proxy}"},
    {"https_proxy": "http://{proxy}"},
    {"grpc_proxy": "http://{proxy}"},
    {"http_proxy": "http://{proxy}", "NO_PROXY": "127.0.0.1", "no_proxy": "localhost,.svc"},
    {"GRPC_ADDRESS_HTTP_PROXY": "{proxy}", "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES": "127.0.0.0/8,::1/128"},
)
"""Every way in which an environment tells gRPC to call a proxy instead of 127.0.0.1."""


@contextmanager
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """A port that accepts connections and remembers how they begin."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(64))

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("variables", PROXIES, ids="+".join)
def test_a_channel_leads_to_its_address_whatever_proxy_is_set(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    from guard.sidecar.transport.channels import Endpoint, open_channel

    with listener() as (proxy, seen), InferenceServer({}) as server:
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(proxy=proxy))
        with open_channel(Endpoint(server.address)) as channel:
            assert channel.unary_unary(LIVE)(b"", timeout=5)
        assert seen == []


async def test_the_channel_of_the_sidecar_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.sidecar.transport.channels import Endpoint, open_async_channel

    with listener() as (proxy, seen), InferenceServer({}) as server:
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        async with open_async_channel(Endpoint(server.address)) as channel:
            assert await channel.unary_unary(LIVE)(b"", timeout=5)
        assert seen == []


def test_doctor_asks_the_server_that_the_sidecar_would_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.sidecar.transport.channels import Endpoint

    with listener() as (proxy, seen), InferenceServer({}) as server:
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        found = {each.subject: each.detail for each in exposures(Endpoint(server.address), rest_ports=())}
        assert "does not answer" not in found["models"]
        assert seen == []


def test_a_host_that_is_called_like_a_scheme_is_a_host() -> None:
    from guard.sidecar.transport.channels import _target

    assert _target("xds:9000") == "dns:///xds:9000"
    assert _target("[::1]:9000") == "dns:///[::1]:9000"
    assert _target("unix:/run/x.sock") == "unix:/run/x.sock"


def test_channels_are_opened_in_one_place_only() -> None:
    opening = {"insecure_channel", "secure_channel"}
    for file in Path(guard.__path__[0]).rglob("*.py"):
        called = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert file.name == "channels.py" or not called & opening, file


@pytest.mark.parametrize("given", [None, ""])
def test_dependencies_call_nobody_and_keep_nothing_at_home(tmp_path: Path, given: str | None) -> None:
    """A model is run in a process whose home is empty; what telemetry there would be keeps its queue there."""
    program = """
import os
from guard.classifiers import exported
from guard.screening.quantised import largest_code
largest_code()
print(os.environ["ORT_DISABLE_TELEMETRY"], os.environ["HF_HUB_DISABLE_TELEMETRY"])
"""
    names = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": str(tmp_path)}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["1", "1"]
    assert done.stderr == ""
    assert list(tmp_path.rglob("*")) == []


def test_who_wants_telemetry_can_have_it() -> None:
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    program = "import guard, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
