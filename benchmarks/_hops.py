"""What a sidecar's cost is measured against: an upstream server of constant bytes, and a proxy that only moves bytes.

python -m benchmarks._hops upstream EMBEDDINGS.npy [--delay SECONDS]
python -m benchmarks._hops proxy HOST:PORT

Both print their address, and serve until SIGTERM on the event loop that a sidecar takes by default.
"""

import argparse
import asyncio
import itertools
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferResponse, ServerReadyResponse
from guard.protocol.tensors import add_output
from guard.sidecar.transport.loops import loop_factory

EMBEDDING, CLASSES = "embedding", 10
NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
START_SECONDS = 30
_LARGE = 2**24
Method = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


@contextmanager
def hop(kind: str, argument: str, *, delay: float = 0.0) -> Iterator[str]:
    """Start one of the two as a process of its own.

    Args:
        kind: `upstream` or `proxy`.
        argument: As on the command line.
        delay: Seconds that an upstream server takes for a reply, without using this machine's processors.

    Yields:
        Its address.
    """
    command = [sys.executable, "-m", "benchmarks._hops", kind, argument, "--delay", str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not select.select([process.stdout], [], [], START_SECONDS)[0]:
                raise SystemExit(f"the {kind} did not start within {START_SECONDS} s")
            address = process.stdout.readline().strip()
            if not address:
                raise SystemExit(f"the {kind} did not start")
            yield address
        finally:
            process.terminate()


class _Every(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc publishes no types
    """One handler of bytes for each path."""

    def __init__(self, find: Callable[[str], Method]) -> None:
        self._find = find

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._find(handler_call_details.method))


def _upstream(embeddings: Path, delay: float) -> Callable[[str], Method]:
    """Answers every inference with the next of some ready-made replies, and reads nothing."""
    replies = itertools.cycle([_reply(row) for row in np.load(embeddings)])
    ready = ServerReadyResponse(ready=True).SerializeToString()

    async def infer(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        del context
        if delay:
            await asyncio.sleep(delay)
        return next(replies)

    async def answer_ready(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        del context
        return ready

    return lambda path: answer_ready if path == f"/{SERVICE}/ServerReady" else infer


def _reply(embedding: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    response = ModelInferResponse(model_name="classifier", model_version="1")
    add_output(response, EMBEDDING, embedding[None], raw=True)
    add_output(response, "logits", np.zeros((1, CLASSES), np.float32), raw=True)
    return response.SerializeToString()


def _proxy(channel: grpc.aio.Channel) -> Callable[[str], Method]:
    """Passes bytes, metadata, deadline and trailers on: the least that a proxy in Python does."""
    methods: dict[str, Method] = {}

    def find(path: str) -> Method:
        if path not in methods:
            forward = channel.unary_unary(path)

            async def call(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
                metadata = tuple((key, value) for key, value in context.invocation_metadata() if key != "user-agent")
                upstream = forward(data, metadata=metadata, timeout=context.time_remaining())
                reply: bytes = await upstream
                context.set_trailing_metadata(tuple(await upstream.trailing_metadata()))
                return reply

            methods[path] = call
        return methods[path]

    return find


async def _serve(kind: str, argument: str, delay: float) -> None:
    # A process that never freed anything large gets fresh pages from the system for each message (glibc's mmap
    # threshold), which costs more than the hop. A sidecar has read a profile by then.
    bytes(_LARGE)
    server = grpc.aio.server(options=[*NO_LIMIT, ("grpc.so_reuseport", 0)])
    channel = grpc.aio.insecure_channel(argument, options=NO_LIMIT) if kind == "proxy" else None
    find = _upstream(Path(argument), delay) if channel is None else _proxy(channel)
    server.add_generic_rpc_handlers((_Every(find),))
    port = server.add_insecure_port("127.0.0.1:0")
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    await stopping.wait()
    await server.stop(0)
    if channel is not None:
        await channel.close()


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("upstream", "proxy"))
    parser.add_argument("argument", help="a file of embeddings, or the address to forward to")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that an upstream server takes for a reply")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory("auto")) as runner:
        runner.run(_serve(arguments.kind, arguments.argument, arguments.delay))


if __name__ == "__main__":
    main()
