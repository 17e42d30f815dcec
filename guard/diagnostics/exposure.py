"""Ways around the sidecar that an upstream server leaves open, as far as they can be seen from here.

A few questions are asked, and nothing is loaded, inferred or changed. What a network policy forbids, what a mesh
encrypts, REST over TLS and whether models are loaded on request cannot be seen.
"""

import ipaddress
import queue
import socket
import stat
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from guard.diagnostics.findings import Finding, Status
from guard.diagnostics.rest import speaks
from guard.errors import UsageError
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import RepositoryIndexResponse
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.transport.channels import Endpoint, open_channel

REST_PORTS = (8000, 8080, 5000)
"""Triton's; MLServer's and KServe's; and one that many containers take."""

_SECONDS = 2.0
_MOST_NAMES = 5
_OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses for documentation (RFC 5737, RFC 3849): of no machine, so the default route leads there."""


def exposures(
    upstream: Endpoint,
    *,
    known: Collection[str] = (),
    rest_ports: Sequence[int] = REST_PORTS,
    own: Collection[str] = (),
) -> tuple[Finding, ...]:
    """Look for ways around the sidecar at its upstream server; run this where the sidecar runs.

    It may take some seconds: a port that does not answer is waited for.

    Args:
        upstream: The upstream server, as the sidecar connects to it.
        known: Names of the models that the sidecar has profiles of; none if that is not known.
        rest_ports: Where REST is looked for.
        own: Where the sidecar itself listens, which is no way around it.

    Raises:
        UsageError: The address is not of that form.
    """
    try:
        place = _Place.of(upstream.address)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        return (Finding("transport", Status.WARNING, f"{upstream.address} cannot be resolved: {error.strerror}"),)
    others = _machine_addresses() if place.here else ()
    found = [_transport(place, upstream.credentials)]
    if place.path is None:
        outside = [each for each in (*place.open, *others) if not _is_own(each, place.port, own)]
        found.append(_port(place, dict.fromkeys(outside), upstream))
    found.append(_rest(place, others, rest_ports))
    with open_channel(upstream) as channel:
        if not _connects(channel):
            text = f"{upstream.address} does not answer, so its models and its shared memory were not looked at"
            return (*found, Finding("models", Status.WARNING, text))
        return (*found, _models(channel, known), _shared_memory(channel))


@dataclass(frozen=True)
class _Place:
    """Where an upstream server is, seen from here.

    Attributes:
        upstream: Its address as given.
        path: Of its Unix socket.
        host: Of its TCP address.
        port: Of that.
        open: Addresses of this machine, loopback apart, that the host stands for.
        here: Whether it is on this machine.
    """

    upstream: str
    path: Path | None = None
    host: str = ""
    port: int = 0
    open: tuple[str, ...] = ()
    here: bool = True

    @classmethod
    def of(cls, upstream: str) -> "_Place":
        """Resolve an address.

        Raises:
            ValueError: It is not of that form.
            OSError: It cannot be resolved.
        """
        path = socket_path(upstream)
        if path is not None:
            return cls(upstream, path)
        host, port = split_address(upstream)
        addresses = _resolve(host)
        here = all(_is_loopback(each) or _is_local(each) for each in addresses)
        inner = [each for each in addresses if _is_loopback(each) or ipaddress.ip_address(each).is_unspecified]
        return cls(upstream, None, host, port, tuple(set(addresses) - set(inner)) if here else (), here)


def _resolve(host: str) -> list[str]:
    """The addresses of a host, without their zones.

    Raises:
        OSError: There are none.
    """
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(0, "it is no name of a host") from error
    return list(dict.fromkeys(str(place[0]).partition("%")[0] for *_, place in entries))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_local(address: str) -> bool:
    """Whether an address is of this machine: then a socket can have it."""
    with suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _machine_addresses() -> tuple[str, ...]:
    """Addresses at which others reach this machine: those of its name, and those of its default routes.

    A machine may have more; the standard library does not list them.
    """
    found: list[str] = []
    with suppress(OSError):
        found += _resolve(socket.gethostname())
    for family, outside in _OUTSIDE.items():
        # Connecting a datagram socket chooses an address and sends nothing.
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))
            found.append(str(probe.getsockname()[0]).partition("%")[0])
    inner = (each for each in dict.fromkeys(found) if not _is_loopback(each) and _is_local(each))
    return tuple(each for each in inner if not ipaddress.ip_address(each).is_link_local)


def _is_own(address: str, port: int, own: Collection[str]) -> bool:
    """Whether the sidecar itself listens there."""
    for each in own:
        if socket_path(each) is not None or split_address(each)[1] != port:
            continue
        with suppress(OSError):
            listening = _resolve(split_address(each)[0])
            if address in listening or any(ipaddress.ip_address(every).is_unspecified for every in listening):
                return True
    return False


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listed(names: Sequence[str]) -> str:
    """The first few of some names that others chose, without what a terminal would obey."""
    shown = [name[:100] if name.isprintable() else ascii(name[:100]) for name in names[:_MOST_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _transport(place: _Place, credentials: grpc.ChannelCredentials | None) -> Finding:
    """Who can join or read the connection."""
    if place.path is not None:
        return _socket(place.path)
    if place.here:
        return Finding("transport", Status.OK, f"{place.upstream} is on this machine")
    if credentials is not None:
        return Finding("transport", Status.OK, f"TLS to {place.upstream}")
    return Finding(
        "transport",
        Status.WARNING,
        f"requests and replies go to {place.upstream} in the clear, unless a mesh encrypts them; set upstream_tls",
    )


def _socket(path: Path) -> Finding:
    try:
        path = path.resolve()
        mode = path.stat().st_mode
        # A socket is reached through its folders.
        reachable = all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)
    except (OSError, RuntimeError) as error:  # RuntimeError is a loop of links
        reason = getattr(error, "strerror", None) or "a loop of links"
        return Finding("transport", Status.WARNING, f"cannot look at the socket {path}: {reason}")
    if not stat.S_ISSOCK(mode):
        return Finding("transport", Status.WARNING, f"{path} is no socket")
    text = f"the socket {path} has the mode {stat.S_IMODE(mode):03o}"
    if mode & stat.S_IWOTH and reachable:
        return Finding(
            "transport", Status.WARNING, f"{text}: every user of this machine connects to it; take it from others"
        )
    return Finding("transport", Status.OK, text)


def _port(place: _Place, addresses: Iterable[str], upstream: Endpoint) -> Finding:
    """Whether the gRPC port is open at other addresses of this machine than the loopback interface's."""
    if not place.here:
        return Finding(
            "grpc",
            Status.OK,
            f"{place.upstream} is not of this machine: who else reaches it cannot be seen from here; a network policy "
            "must let only the sidecar through",
        )
    places = [_joined(address, place.port) for address in addresses]
    reached = []
    for each in places:
        # The certificate names the host of the upstream address; and a proxy would answer for every address.
        endpoint = replace(upstream, address=each, server_name=upstream.server_name or place.host)
        with open_channel(endpoint, [("grpc.enable_http_proxy", 0)]) as channel:
            if _connects(channel):
                reached.append(each)
    if reached:
        certificate = "" if upstream.credentials is None else ", unless it takes the sidecar's certificate only"
        return Finding(
            "grpc",
            Status.WARNING,
            f"the upstream listens on {', '.join(reached)} too: whoever reaches this machine or pod there goes around "
            f"the sidecar{certificate}; bind it to loopback (Triton: --grpc-address 127.0.0.1; MLServer: "
            "MLSERVER_HOST=127.0.0.1)",
        )
    if not places:
        return Finding("grpc", Status.OK, "no other address of this machine is known at which it could be reached")
    return Finding("grpc", Status.OK, f"nobody answers on {', '.join(places)}")


def _rest(place: _Place, others: Collection[str], ports: Sequence[int]) -> Finding:
    """Whether REST, which a sidecar does not screen, is spoken beside gRPC."""
    outside = tuple(dict.fromkeys((*place.open, *others))) if place.here else (place.host,)
    answering = [_joined(host, port) for port in ports for host in outside if speaks(host, port)]
    if answering:
        return Finding(
            "rest",
            Status.WARNING,
            f"REST of the upstream answers on {', '.join(answering)}: requests there are not screened; bind it to "
            "loopback or turn it off (Triton: --http-address 127.0.0.1 or --allow-http=false; MLServer: "
            "MLSERVER_HOST=127.0.0.1)",
        )
    tried = f"ports {', '.join(map(str, ports))}"
    inner = [_joined("127.0.0.1", port) for port in ports if place.here and speaks("127.0.0.1", port)]
    if inner:
        return Finding(
            "rest",
            Status.OK,
            f"answers on {', '.join(inner)} and, as far as is known, on the loopback interface only: other containers "
            "of this pod reach it, and others do not",
        )
    return Finding("rest", Status.OK, f"not found on {tried}, over plain HTTP; --rest-port looks at others")


def _connects(channel: grpc.Channel) -> bool:
    """Whether a gRPC server is at the other end, whatever it would answer: Triton's may keep even health to itself."""
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    end = time.monotonic() + _SECONDS
    channel.subscribe(states.put, try_to_connect=True)
    try:
        while True:
            state = states.get(timeout=max(end - time.monotonic(), 0))
            if state in {grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE}:
                return state is grpc.ChannelConnectivity.READY
    except queue.Empty:
        return False
    finally:
        channel.unsubscribe(states.put)


def _ask(channel: grpc.Channel, method: str) -> bytes | grpc.StatusCode:
    """Call a method with an empty message: the reply, or the status instead of one."""
    try:
        reply: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=_SECONDS)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return reply


def _models(channel: grpc.Channel, known: Collection[str]) -> Finding:
    """Which models are served that were never vetted."""
    reply = _ask(channel, "RepositoryIndex")
    if isinstance(reply, grpc.StatusCode):
        return Finding(
            "models", Status.OK, f"the upstream does not list them ({reply.name}), so none is compared with a profile"
        )
    try:
        models = RepositoryIndexResponse.FromString(reply).models
    except DecodeError:
        return Finding("models", Status.WARNING, "the upstream lists them in a form that cannot be read")
    # A model of several versions is listed several times.
    served = sorted({model.name for model in models if model.state.upper() == "READY"})
    idle = len({model.name for model in models} - set(served))
    rest = f"; {idle} more are not loaded" if idle else ""
    if not known:
        text = f"served upstream: {_listed(served) or 'none'}{rest}; the profiles are not known without a configuration"
        return Finding("models", Status.OK, text)
    if strangers := [name for name in served if name not in known]:
        return Finding(
            "models",
            Status.WARNING,
            f"served upstream without a profile: {_listed(strangers)}; under the failure policy closed they are "
            f"refused, under open they are served unchecked{rest}",
        )
    return Finding("models", Status.OK, f"every one that is served upstream has a profile{rest}")


def _shared_memory(channel: grpc.Channel) -> Finding:
    """Whether inputs can come, and outputs go, where the sidecar does not see them.

    Triton answers `SystemSharedMemoryStatus` even where `--allow-client-shm` is off, its default since 26.04. So then a
    registration that names nothing is asked for: no server can take it, and one that is switched off does not have it.
    """
    reply = _ask(channel, "SystemSharedMemoryStatus")
    if isinstance(reply, bytes):
        reply = _ask(channel, "SystemSharedMemoryRegister")
        # UNAVAILABLE is Triton's answer where a method is kept to those who have a key.
        off = reply in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}
    else:
        off = True
    if off:
        return Finding("memory", Status.OK, "the upstream takes no shared memory from clients")
    return Finding(
        "memory",
        Status.WARNING,
        "the upstream takes shared memory: the sidecar does not check what lies there, and refuses it under the "
        "failure policy closed, but a client that reaches the upstream around it can use it; turn it off "
        "(Triton: --allow-client-shm=false)",
    )
