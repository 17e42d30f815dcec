"""What deploy/ ships: valid by the schemas, closed where it must be, and with options that guard has.

Nothing of it is run here: there is no cluster, and no registry to pull images from.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from guard.certificates import Policy
from guard.cli import cli
from guard.errors import CertificateError
from guard.sidecar import Settings
from tests.e2e.environments import environment

ROOT = Path(__file__).parents[2]
DEPLOY, TOOLS = ROOT / "deploy", Path(__file__).parent / "manifest_tools"
RAY = DEPLOY / "kuberay" / "rayjob.yaml"
MANIFESTS = sorted([*(DEPLOY / "kubernetes" / "base").glob("*.yaml"), *(DEPLOY / "kserve").glob("*.yaml")])
LINT = json.dumps(
    {
        "extends": "default",
        "rules": {
            "line-length": {"max": 120, "ignore": ["**/prometheus/*"]},
            "document-start": "disable",
            "braces": {"max-spaces-inside": 1},
            "truthy": {"check-keys": False},
        },
    }
)


@pytest.fixture(scope="module")
def tools() -> Path:
    return environment(TOOLS / "requirements.txt").parent


@pytest.fixture(scope="module")
def documents(tools: Path) -> list[dict[str, Any]]:
    done = run(tools / "python", TOOLS / "read.py", *MANIFESTS, RAY)
    return [json.loads(line)["document"] for line in done.stdout.splitlines()]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def containers(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        spec = document.get("spec", {})
        pods = [spec.get("template", {}).get("spec") or (spec if document["kind"] == "ServingRuntime" else {})]
        if document["kind"] == "RayJob":
            cluster = spec["rayClusterSpec"]
            pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        for pod in pods:
            for container in (*pod.get("initContainers", ()), *pod.get("containers", ())):
                yield f"{document['kind']} {document['metadata']['name']} {container['name']}", container


def test_manifests_are_valid_and_well_formed(tools: Path) -> None:
    for path in MANIFESTS:
        run(tools / "kubernetes-validate", "--strict", path)
    run(tools / "yamllint", "--strict", "-d", LINT, DEPLOY)


def test_dockerfiles_are_sound_and_run_as_nobody(tools: Path) -> None:
    for path in (DEPLOY / "docker").iterdir():
        run(tools / "hadolint", path)
        text = path.read_text(encoding="utf-8")
        assert "\nUSER 65532:65532\n" in text
    serving = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert "[vet]" not in serving


def test_guard_runs_with_no_more_rights_than_it_needs(documents: list[dict[str, Any]]) -> None:
    own = [(name, each) for name, each in containers(documents) if each["image"].startswith("clip-guard")]
    assert len(own) >= 8
    for name, container in own:
        rights = container["securityContext"]
        assert rights["runAsNonRoot"], name
        assert rights["readOnlyRootFilesystem"], name
        assert not rights["allowPrivilegeEscalation"], name
        assert rights["capabilities"] == {"drop": ["ALL"]}, name
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert {"requests", "limits"} <= container["resources"].keys(), name
        assert not container["image"].endswith(":latest"), name


def test_models_are_mounted_for_reading_where_they_are_served(documents: list[dict[str, Any]]) -> None:
    for name, container in containers(documents):
        if name.startswith("Deployment"):
            (models,) = [each for each in container["volumeMounts"] if each["name"] == "models"]
            assert models["readOnly"], name


def test_nobody_reaches_the_server_behind_guard(documents: list[dict[str, Any]]) -> None:
    for name, container in containers(documents):
        if "triton" in container["image"]:
            assert "--grpc-address=127.0.0.1" in container["args"], name
            assert "--allow-http=false" in container["args"], name
            assert "ports" not in container, name
        if "mlserver" in container["image"]:
            assert {"name": "MLSERVER_HOST", "value": "127.0.0.1"} in container["env"], name
            assert "ports" not in container, name
    (policy,) = [each for each in documents if each["kind"] == "NetworkPolicy"]
    ports = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    assert ports == ["grpc-guard", "metrics"]


def test_kserve_sends_traffic_to_guard_alone(documents: list[dict[str, Any]]) -> None:
    (runtime,) = [each for each in documents if each["kind"] == "ServingRuntime"]
    by_name = {each["name"]: each for each in runtime["spec"]["containers"]}
    assert by_name.keys() == {"transformer-container", "kserve-container"}
    assert by_name["transformer-container"]["image"].startswith("clip-guard")
    (port,) = by_name["transformer-container"]["ports"]
    assert "grpc" in port["name"]
    assert "ports" not in by_name["kserve-container"]


def test_guard_starts_before_the_server_and_after_the_check(documents: list[dict[str, Any]]) -> None:
    deployments = [each for each in documents if each["kind"] == "Deployment"]
    assert len(deployments) == 2
    for each in deployments:
        verify, guard = each["spec"]["template"]["spec"]["initContainers"]
        assert verify["args"][0] == "verify"
        assert "restartPolicy" not in verify
        assert guard["restartPolicy"] == "Always"
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= guard.keys()


@pytest.mark.parametrize(("folder", "mode", "policy"), [
    ("base", "shadow", "open"), ("tag", "tag", "closed"), ("block", "block", "closed"),
])  # fmt: skip
def test_the_settings_are_those_of_their_step(folder: str, mode: str, policy: str) -> None:
    settings = Settings.load(DEPLOY / "kubernetes" / folder / "guard.toml")
    assert settings.require_certified
    assert (settings.mode, settings.on_failure) == (mode, policy)


def test_without_a_key_of_ones_own_nothing_is_admitted() -> None:
    with pytest.raises(CertificateError, match="is not a public key"):
        Policy.read(DEPLOY / "kubernetes" / "base" / "policy.toml")


def test_every_option_is_one_of_guard(documents: list[dict[str, Any]]) -> None:
    for name, container in containers(documents):
        if not container["image"].startswith("clip-guard") or name.startswith("RayJob"):
            continue
        command, *arguments = container["args"]
        known = CliRunner().invoke(cli, [command, "--help"]).output
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.partition("=")[0] in known, (name, argument)


def test_the_ray_job_is_a_command_of_guard_on_volumes_that_all_pods_share(documents: list[dict[str, Any]]) -> None:
    (job,) = [each for each in documents if each["kind"] == "RayJob"]
    program, command, *arguments = job["spec"]["entrypoint"].split()
    known = CliRunner().invoke(cli, [command, "--help"]).output
    options = [argument for argument in arguments if argument.startswith("--")]
    assert program == "guard"
    assert "--ray" in options
    assert all(option in known for option in options)
    mounted = [each["volumeMounts"] for name, each in containers([job])]
    assert mounted[0] == mounted[1]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in constraints
