"""Unix sockets, on both sides of a sidecar."""

import socket
import stat
from pathlib import Path

import pytest

from guard.errors import UsageError
from guard.sidecar.transport.ports import check_free, remove_stale
from tests.integration.sidecar.conftest import (
    Floats,
    Launcher,
    Upstream,
    connected,
    eventually,
    infer_request,
    refused_start,
)


def test_a_sidecar_listens_at_a_socket_and_forwards_to_one(
    launch: Launcher, exported: Path, served_profile: Path, upstream: Upstream, clean: Floats, tmp_path: Path
) -> None:
    mine, theirs = tmp_path / "guard.sock", tmp_path / "models.sock"
    behind = Upstream(upstream.classify)
    behind.address = f"unix:{theirs}"
    arguments = ("--model", exported, "--profile", served_profile, "--upstream", behind.address)
    with behind:
        with launch(*arguments, "--listen", f"unix:{mine}") as sidecar, connected(sidecar.address) as client:
            assert sidecar.announced["listen"] == f"unix:{mine}"
            assert stat.S_IMODE(mine.stat().st_mode) == 0o600
            assert client.infer(infer_request(clean[:1])).outputs[0] == "logits"
            eventually(lambda: sidecar.metric("guard_ready") == 1, "readiness")
            code, lines = refused_start(*arguments, "--listen", f"unix:{mine}")
            assert (code, len(lines)) == (2, 1)
            assert "another process listens there" in lines[0]
            assert client.infer(infer_request(clean[:1])).outputs[0] == "logits"
        assert not mine.exists()
        with launch(*arguments, "--listen", f"unix:{mine}", "--socket-mode", "660"):
            assert stat.S_IMODE(mine.stat().st_mode) == 0o660


def test_a_socket_that_was_left_behind_is_replaced(
    launch: Launcher, exported: Path, served_profile: Path, tmp_path: Path
) -> None:
    path = tmp_path / "guard.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    arguments = ("--model", exported, "--profile", served_profile, "--listen", f"unix:{path}")
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        client.call("ServerLive")


def test_only_a_socket_that_nobody_listens_at_is_removed(tmp_path: Path) -> None:
    file, served = tmp_path / "file", tmp_path / "served"
    file.write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError, match="is not a socket"):
        check_free(f"unix:{file}")
    remove_stale(file)
    assert file.exists()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(served))
        listener.listen()
        with pytest.raises(UsageError, match="another process"):
            check_free(f"unix:{served}")
        remove_stale(served)
        assert served.exists()
    check_free(f"unix:{served}")
    remove_stale(served)
    assert not served.exists()
    with pytest.raises(UsageError, match="folder"):
        check_free(f"unix:{tmp_path / 'absent' / 'guard.sock'}")
