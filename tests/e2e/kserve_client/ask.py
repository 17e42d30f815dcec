"""Requests of KServe's own client: ask.py ADDRESS IN.npz OUT.npz; run in KServe's environment.

IN has `images`, preprocessed, and `files`, encoded, as uint8 arrays with their `lengths`. OUT has, for each form of
request, the outputs by name and the parameters of the reply as JSON.
"""

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferInput, InferRequest  # type: ignore[import-not-found]
from kserve.inference_client import InferenceGRPCClient  # type: ignore[import-not-found]

address, asked, answered = sys.argv[1:]


def inputs() -> dict[str, Any]:
    """One input for each form."""
    sent = np.load(asked)
    images = sent["images"]
    files = np.array([part.tobytes() for part in np.split(sent["files"], np.cumsum(sent["lengths"])[:-1])], object)
    raw, encoded = InferInput("image", list(images.shape), "FP32"), InferInput("image", [len(files)], "BYTES")
    raw.set_data_from_numpy(images)
    encoded.set_data_from_numpy(files)
    return {
        "raw-fp32": raw,
        "raw-bytes": encoded,
        "typed-fp32": InferInput("image", list(images.shape), "FP32", data=images.ravel().tolist()),
        "typed-bytes": InferInput("image", [len(files)], "BYTES", data=files.tolist()),
    }


async def ask() -> dict[str, Any]:
    """What the server says to each."""
    found: dict[str, Any] = {}
    async with InferenceGRPCClient(address, retries=0) as client:
        state = [
            await client.is_server_live(),
            await client.is_server_ready(),
            await client.is_model_ready("classifier"),
        ]
        found["state"] = np.array(state)
        for form, tensor in inputs().items():
            reply = await client.infer(InferRequest("classifier", [tensor], request_id=form))
            for output in reply.outputs:
                found[f"{form}/{output.name}"] = output.as_numpy().astype("S" if output.datatype == "BYTES" else "f4")
            found[f"{form}/parameters"] = np.array(json.dumps(reply.parameters or {}, default=str))
    return found


np.savez(answered, **asyncio.run(ask()))
