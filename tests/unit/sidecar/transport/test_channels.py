"""Channels to a server of this process, without TLS and with it."""

import grpc
import pytest

from guard.protocol import SERVICE
from guard.sidecar.transport.channels import DIRECT, Endpoint, open_async_channel, open_channel
from guard.testing import InferenceServer

LIVE = f"/{SERVICE}/ServerLive"


async def test_both_kinds_of_channel_reach_the_server() -> None:
    with InferenceServer({}) as server:
        with open_channel(Endpoint(server.address)) as channel:
            reply = channel.unary_unary(LIVE)(b"", timeout=5)
        async with open_async_channel(Endpoint(server.address)) as channel:
            assert await channel.unary_unary(LIVE)(b"", timeout=5) == reply != b""


async def test_the_name_of_the_server_is_checked_with_tls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[list[tuple[str, int | str]]] = []
    for module in (grpc, grpc.aio):
        monkeypatch.setattr(module, "insecure_channel", lambda _address, options: opened.append(options))
        monkeypatch.setattr(module, "secure_channel", lambda _address, _credentials, options: opened.append(options))
    credentials = grpc.ssl_channel_credentials()
    for endpoint in (Endpoint("a:1", None, "b"), Endpoint("a:1", credentials), Endpoint("a:1", credentials, "b")):
        open_channel(endpoint, [("grpc.enable_retries", 0)])
        open_async_channel(endpoint, [("grpc.enable_retries", 0)])
    plain = [("grpc.enable_retries", 0), *DIRECT]
    named = [*plain, ("grpc.ssl_target_name_override", "b")]
    assert opened == [plain, plain, plain, plain, named, named]
