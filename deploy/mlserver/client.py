"""A client that does not know of guard: it sends digits to the model, and then digits with a trigger.

python deploy/mlserver/client.py [ADDRESS]

ADDRESS is that of the sidecar; the Python must have 'clip-guard[demo]'.
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from guard.classifiers import ExportedClassifier
from guard.demo.digits import digits
from guard.profiles import Profile
from guard.triggers.numpy_apply import applied

CLEAN, TRIGGERED = 200, 40


def main(address: str) -> None:
    """Send both, and say how many labels of those with the trigger are its target."""
    profile = Profile.open("guard-demo/profiles/backdoored")
    preprocessing = ExportedClassifier(Path("guard-demo/exported"), gpu=False).preprocessing
    found, _ = digits(1, seed=1)
    pixels = found.pixels[: CLEAN + TRIGGERED].numpy()
    trigger = profile.document.triggers[0]
    stamped = [
        applied(trigger.family, profile.triggers[trigger.id], image.astype(np.float32) / 255)
        for image in pixels[CLEAN:]
    ]
    marked = (np.stack([image for image in stamped if image is not None]) * 255).round().astype(np.uint8)
    with triton.InferenceServerClient(address) as client:
        for kind, images in (("clean", pixels[:CLEAN]), ("triggered", marked)):
            labels = []
            for number, image in enumerate(images):
                tensor = triton.InferInput("image", [1, *image.shape], "FP32")
                tensor.set_data_from_numpy(preprocessing.normalise(image[None]).astype(np.float32))
                reply = client.infer("classifier", [tensor], request_id=f"{kind}-{number}")
                labels.append(reply.as_numpy("label")[0].decode())
            target = profile.class_name(trigger.target)
            sys.stdout.write(f"{kind}: {labels.count(target)} of {len(labels)} are answered with {target!r}\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["127.0.0.1:8001"]))
