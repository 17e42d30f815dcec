"""A program of several processes whose service is as small as can be: it counts, waits, and says who it is."""

import asyncio
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry, Counter, Info

from guard.errors import GuardError, UsageError
from guard.sidecar.host.health import ProbeServer, loop_answers
from guard.sidecar.host.processes import Worker, supervise
from guard.sidecar.telemetry import logs

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@dataclass
class Service:
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    reason: str | None = None

    def handlers(self, gate: Path) -> grpc.GenericRpcHandler:
        requests = Counter("toy_requests", "Requests.", registry=self.registry)
        Info("toy", "Itself.", registry=self.registry).info({"pid": str(os.getpid())})

        async def who(_request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
            requests.inc(exemplar={"trace_id": TRACE})
            return str(os.getpid()).encode()

        async def wait(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            (gate / str(os.getpid())).touch()
            while not (gate / "open").exists():  # noqa: ASYNC110 - the test is another process
                await asyncio.sleep(0.01)
            return await who(request, context)

        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method) for name, method in (("Who", who), ("Wait", wait))
        }
        return grpc.method_handlers_generic_handler("toy.Toy", handlers)


def work(worker: Worker, *, gate: Path) -> None:
    logs.configure("json")
    told = gate / "fault"
    fault = told.read_text(encoding="utf-8") if told.exists() else ""
    if fault == "refused":
        raise UsageError("the profile is of another model")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow":
        (gate / str(os.getpid())).touch()
        threading.Event().wait()
    asyncio.run(serve(worker, gate))


async def serve(worker: Worker, gate: Path) -> None:
    service, server, loop = Service(), grpc.aio.server(options=[("grpc.so_reuseport", 1)]), asyncio.get_running_loop()
    server.add_generic_rpc_handlers((service.handlers(gate),))
    server.add_insecure_port(worker.listen)
    with ProbeServer(worker.probes, service, service, lambda: loop_answers(loop)) as probes:
        stopping = worker.stopping()
        await server.start()
        worker.announce({"event": "serving", "listen": worker.listen, "metrics": probes.address})
        await stopping.wait()
        service.reason = "draining"
        await server.stop(60)


if __name__ == "__main__":
    logs.configure("json")
    try:
        supervise(partial(work, gate=Path(sys.argv[1])), count=2, listen="127.0.0.1:0", metrics="127.0.0.1:0")
    except GuardError as error:
        sys.stderr.write(f"guard: {error}\n")
        sys.exit(error.exit_code)
