"""Ways around the sidecar that an upstream server leaves open, as far as this machine can see them.

The checks ask a few questions; they load, infer and change nothing. They cannot see what a network policy forbids, what
a mesh encrypts, REST over TLS, and whether models are loaded on request.
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
from guard.diagnostics.rest import lists_repository, speaks
from guard.errors import UsageError
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import RepositoryIndexResponse
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.transport.channels import Endpoint, open_channel

REST_PORTS = (8000, 8080, 5000)
"""The default ports of Triton, of MLServer and KServe, and of many other containers."""

_SECONDS = 2.0
_MOST_NAMES = 5
_OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses for documentation (RFC 5737, RFC 3849). No machine has them, so the default route leads to them."""


def exposures(
    upstream: Endpoint,
    *,
    known: Collection[str] = (),
    rest_ports: Sequence[int] = REST_PORTS,
    own: Collection[str] = (),
) -> tuple[Finding, ...]:
    """Look for ways around the sidecar at its upstream server, from the machine or container of the sidecar.

    This may take some seconds, because a port may not answer.

    Args:
        upstream: The upstream server, as the sidecar connects to it.
        known: Names of the models that the sidecar has profiles of; empty if they are not known.
        rest_ports: Ports on which a REST interface is looked for.
        own: Addresses at which the sidecar itself listens; they are not ways around it.

    Raises:
        UsageError: The address of the upstream server has another form.
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
    found += _rest(place, others, rest_ports)
    with open_channel(upstream) as channel:
        if not _connects(channel):
            text = f"{upstream.address} does not answer, so its models and its shared memory were not checked"
            return (*found, Finding("models", Status.WARNING, text))
        return (*found, _models(channel, known), _shared_memory(channel))


@dataclass(frozen=True)
class _Place:
    """The place of an upstream server, as this machine sees it.

    Attributes:
        upstream: Address of the server, as given.
        path: Path of the Unix socket; None for a TCP address.
        host: Host of the TCP address.
        port: Port of the TCP address.
        open: Addresses that the host stands for, if they are all of this machine; without those of the loopback
            interface.
        here: Whether the server is on this machine.
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
            ValueError: The address has neither form.
            OSError: The host cannot be resolved.
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
        OSError: The host has no address.
    """
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(0, "it is not a host name") from error
    return list(dict.fromkeys(str(place[0]).partition("%")[0] for *_, place in entries))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_local(address: str) -> bool:
    """Whether an address belongs to this machine, so that a socket can be bound to it."""
    with suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _machine_addresses() -> tuple[str, ...]:
    """Addresses at which other machines reach this one: those of its name, and those of its default routes.

    A machine may have more addresses, but the standard library cannot list them.
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
    """Whether the sidecar itself listens at this address."""
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
    """List the first few names, which others chose, without control characters for a terminal."""
    shown = [name[:100] if name.isprintable() else ascii(name[:100]) for name in names[:_MOST_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _transport(place: _Place, credentials: grpc.ChannelCredentials | None) -> Finding:
    """Check who can read the connection, or connect as well."""
    if place.path is not None:
        return _socket(place.path)
    if place.here:
        return Finding("transport", Status.OK, f"{place.upstream} is on this machine")
    if credentials is not None:
        return Finding("transport", Status.OK, f"TLS to {place.upstream}")
    return Finding(
        "transport",
        Status.WARNING,
        f"requests and replies travel to {place.upstream} in the clear, unless a mesh encrypts them; set upstream_tls",
    )


def _socket(path: Path) -> Finding:
    try:
        path = path.resolve()
        mode = path.stat().st_mode
        # A socket is reached through its folders.
        reachable = all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)
    except (OSError, RuntimeError) as error:  # RuntimeError is a loop of links
        reason = getattr(error, "strerror", None) or "a loop of links"
        return Finding("transport", Status.WARNING, f"the socket {path} cannot be checked: {reason}")
    if not stat.S_ISSOCK(mode):
        return Finding("transport", Status.WARNING, f"{path} is not a socket")
    text = f"the socket {path} has the mode {stat.S_IMODE(mode):03o}"
    if mode & stat.S_IWOTH and reachable:
        return Finding(
            "transport",
            Status.WARNING,
            f"{text}: every user of this machine can connect; remove the permissions of others",
        )
    return Finding("transport", Status.OK, text)


def _port(place: _Place, addresses: Iterable[str], upstream: Endpoint) -> Finding:
    """Check whether the gRPC port is open at addresses of this machine besides the loopback interface."""
    if not place.here:
        return Finding(
            "grpc",
            Status.OK,
            f"{place.upstream} is on another machine, so it cannot be seen who else reaches it; a network policy must "
            "allow only the sidecar",
        )
    places = [_joined(address, place.port) for address in addresses]
    reached = []
    for each in places:
        # The certificate names the host of the upstream address.
        endpoint = replace(upstream, address=each, server_name=upstream.server_name or place.host)
        with open_channel(endpoint) as channel:
            if _connects(channel):
                reached.append(each)
    if reached:
        certificate = (
            "" if upstream.credentials is None else ", unless the server accepts only the sidecar's certificate"
        )
        return Finding(
            "grpc",
            Status.WARNING,
            f"the upstream server listens on {', '.join(reached)} too: clients that reach it there can "
            f"bypass the sidecar{certificate}; bind it to the loopback interface (Triton: --grpc-address 127.0.0.1; "
            "MLServer: MLSERVER_HOST=127.0.0.1)",
        )
    if not places:
        return Finding(
            "grpc", Status.OK, "this machine has no other known address at which the upstream server could be reached"
        )
    return Finding("grpc", Status.OK, f"nobody answers on {', '.join(places)}")


def _rest(place: _Place, others: Collection[str], ports: Sequence[int]) -> Iterable[Finding]:
    """Check whether the server offers REST, which a sidecar does not screen, and whether it lists its models there."""
    outside = tuple(dict.fromkeys((*place.open, *others))) if place.here else (place.host,)
    open_ = [(host, port) for port in ports for host in outside if speaks(host, port)]
    inner = [("127.0.0.1", port) for port in ports if place.here and speaks("127.0.0.1", port)]
    yield _rest_interface([_joined(*each) for each in open_], [_joined(*each) for each in inner], ports)
    listing = [_joined(*each) for each in open_ if lists_repository(*each)]
    if listing:
        yield Finding(
            "repository",
            Status.WARNING,
            f"the model repository of the upstream server answers on {', '.join(listing)}: with model control on, who "
            "reaches it loads and unloads models past guard, which refuses such calls; restrict it (Triton: "
            "--model-control-mode=none and --http-restricted-api=model-repository:KEY=VALUE)",
        )
    elif any(lists_repository(*each) for each in inner):
        yield Finding("repository", Status.OK, "the model repository is listed on the loopback interface alone")


def _rest_interface(answering: Sequence[str], inner: Sequence[str], ports: Sequence[int]) -> Finding:
    if answering:
        return Finding(
            "rest",
            Status.WARNING,
            f"the REST interface of the upstream server answers on {', '.join(answering)}: requests there are not "
            "screened; bind it to the loopback interface or turn it off (Triton: --http-address 127.0.0.1 or "
            "--allow-http=false; MLServer: MLSERVER_HOST=127.0.0.1)",
        )
    tried = f"ports {', '.join(map(str, ports))}"
    if inner:
        return Finding(
            "rest",
            Status.OK,
            f"the REST interface answers on {', '.join(inner)} and, as far as is known, only on the loopback "
            "interface: other containers of this pod reach it, but no other machines",
        )
    return Finding(
        "rest", Status.OK, f"no REST interface was found on {tried} over plain HTTP; --rest-port checks others"
    )


def _connects(channel: grpc.Channel) -> bool:
    """Whether a gRPC server is at the other end, whatever it would answer: Triton may even refuse to report health."""
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
    """Call a method with an empty message: its reply, or the status code if it fails."""
    try:
        reply: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=_SECONDS)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return reply


def _models(channel: grpc.Channel, known: Collection[str]) -> Finding:
    """Check whether models without a profile are served."""
    reply = _ask(channel, "RepositoryIndex")
    if isinstance(reply, grpc.StatusCode):
        return Finding(
            "models",
            Status.OK,
            f"the upstream server does not list its models ({reply.name}), so they cannot be compared with profiles",
        )
    try:
        models = RepositoryIndexResponse.FromString(reply).models
    except DecodeError:
        return Finding("models", Status.WARNING, "the upstream server lists its models in a form that cannot be read")
    # A model of several versions is listed several times.
    served = sorted({model.name for model in models if model.state.upper() == "READY"})
    idle = len({model.name for model in models} - set(served))
    rest = f"; {idle} more are not loaded" if idle else ""
    if not known:
        names = _listed(served) or "none"
        text = f"models of the upstream server: {names}{rest}; the profiles are not known without a configuration"
        return Finding("models", Status.OK, text)
    if strangers := [name for name in served if name not in known]:
        return Finding(
            "models",
            Status.WARNING,
            f"models of the upstream server without a profile: {_listed(strangers)}; with the failure policy closed "
            f"their requests are refused, with open they are served unchecked{rest}",
        )
    return Finding("models", Status.OK, f"every model of the upstream server has a profile{rest}")


def _shared_memory(channel: grpc.Channel) -> Finding:
    """Check whether inputs and outputs can travel through shared memory, where the sidecar does not see them.

    Triton answers `SystemSharedMemoryStatus` even where `--allow-client-shm` is off, its default since 26.04. Therefore
    an empty registration is sent as well: no server can accept it, and a server where it is off has no such method.
    """
    reply = _ask(channel, "SystemSharedMemoryStatus")
    if isinstance(reply, bytes):
        reply = _ask(channel, "SystemSharedMemoryRegister")
        # UNAVAILABLE is the answer of Triton where a method is restricted to clients with a key.
        off = reply in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}
    else:
        off = True
    if off:
        return Finding("memory", Status.OK, "the upstream server accepts no shared memory from clients")
    return Finding(
        "memory",
        Status.WARNING,
        "the upstream server accepts shared memory: the sidecar does not check its content, and refuses it with the "
        "failure policy closed, but a client that bypasses the sidecar can use it; turn it off "
        "(Triton: --allow-client-shm=false)",
    )
