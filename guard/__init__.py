"""A guard for CLIP image classifiers in production: vet the model before it is served, then screen its requests.

Somebody else trained or fine-tuned the classifier that you deploy. It may carry a backdoor: it behaves well until an
image carries the attacker's trigger, and then answers with the attacker's class. `guard` examines the model, and
reconstructs the trigger where there is one. It then screens requests for images that do what the trigger does, at a
false-alarm rate that you choose. The whole way, from a model directory and folders of images to a detector's decision:

    from pathlib import Path

    import guard

    # Before the model is served: examine it. The images need no labels.
    classifier = guard.load("my-model")
    images = classifier.read(guard.ImageFolder.scan("images"))
    vetting = guard.vet(classifier, images)
    print(vetting.verdict.outcome, vetting.verdict.reasons)

    # Choose a false-alarm rate, with other images: clean ones, like those that requests will carry.
    clean = classifier.read(guard.ImageFolder.scan("clean-images"))
    profile = guard.Profile.build(classifier, vetting).calibrate(classifier, clean, alpha=0.01)
    profile.save("my-profile")

    # For each request: is its embedding suspicious? Opening a profile and scoring work without torch.
    detector = guard.Profile.open("my-profile").detector()
    result = detector.score(classifier.embed(images).numpy())
    print(result.p_values, result.flags)

    # Or let the sidecar classify and screen: Open Inference Protocol v2 over gRPC, on ONNX Runtime.
    guard.export(classifier, "my-export", clean)
    guard.serve(guard.Settings(profile=Path("my-profile"), model=Path("my-export")))

The verdict is `backdoored`, `no evidence` (of the attack families tested, which it lists) or `inconclusive`; never
`clean`. Every error that guard raises on purpose is a `GuardError`. docs/api.md explains each step, and the command
line makes the same calls. What is not named here is in the packages below: `guard.vetting`, `guard.screening`,
`guard.profiles`, `guard.report` and so on.

Names are imported when they are first used, so that `import guard` is cheap, and only what looks into a model loads
torch.
"""

import os
from typing import TYPE_CHECKING

from guard._lazy import lazy

if TYPE_CHECKING:
    from guard.classifiers import Classifier, ImageFolder, export, load
    from guard.errors import GuardError
    from guard.profiles import Profile
    from guard.screening import Detector
    from guard.sidecar import Settings, serve
    from guard.vetting import Verdict, vet, vet_text

__all__ = [
    "Classifier",
    "Detector",
    "GuardError",
    "ImageFolder",
    "Profile",
    "Settings",
    "Verdict",
    "__version__",
    "export",
    "load",
    "serve",
    "vet",
    "vet_text",
]

__version__ = "0.2.0"

# Dependencies that would call their makers, and keep files for that in the user's home. They read these variables when
# they are imported, which is after this line wherever guard imports them; an operator's own value is left alone.
for _silence in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_silence] = os.environ.get(_silence) or "1"

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("Classifier", "ImageFolder", "export", "load"), "classifiers"),
        "GuardError": "errors",
        "Profile": "profiles",
        "Detector": "screening",
        **dict.fromkeys(("Settings", "serve"), "sidecar"),
        **dict.fromkeys(("Verdict", "vet", "vet_text"), "vetting"),
    },
)
