"""The upstream server: writes down which requests arrive, waits as long as they say, and embeds.

python -m benchmarks.soak.upstream WEIGHTS ARRIVALS ADDRESS
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from guard.errors import RequestError
from guard.testing import Fault, InferenceServer

_REPLY_SECONDS = 0.1
"""For a computed reply to leave before the connections end."""


class Model:
    """Embeds images, and echoes the number of the request.

    Args:
        weights: Shape [pixels, D].
        arrivals: File that every number is appended to before anything else, so that it survives a SIGKILL.
    """

    def __init__(self, weights: NDArray[np.float32], arrivals: Path) -> None:
        self._weights, self._lock, self.running = weights, threading.Lock(), 0
        self._file = os.open(arrivals, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Logits, embeddings (the same), and the number."""
        with self._lock:
            self.running += 1
        try:
            os.write(self._file, inputs["number"].astype("<i8").tobytes())
            time.sleep(float(inputs["wait"][0]))
            images = inputs["image"].reshape(len(inputs["image"]), -1)
            if images.shape[1] != len(self._weights):
                raise RequestError(f"an image has {images.shape[1]} values; the model takes {len(self._weights)}")
            embeddings = images @ self._weights
            return {"logits": embeddings, "embedding": embeddings, "number": inputs["number"]}
        finally:
            with self._lock:
                self.running -= 1


def main() -> None:
    """Serve until SIGTERM; then refuse what comes, let what runs end, and stop."""
    weights, arrivals, address = sys.argv[1:]
    model, stopping = Model(np.load(weights), Path(arrivals)), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with InferenceServer(model, address=address, workers=64, memory=1) as server:
        sys.stdout.write(f'{{"listen": "{server.address}"}}\n')
        sys.stdout.flush()
        stopping.wait()
        server.ready, server.fault = False, Fault(grpc.StatusCode.UNAVAILABLE, "going down")
        while model.running:
            time.sleep(0.01)
        time.sleep(_REPLY_SECONDS)


if __name__ == "__main__":
    main()
