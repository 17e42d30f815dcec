import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["guard.sidecar", "guard.sidecar.settings", "guard.sidecar.policy"])
def test_the_vocabulary_loads_neither_services_nor_screening(module: str) -> None:
    code = f"""
import sys
import {module}
heavy = {{"grpc_health.v1", "prometheus_client", "onnxruntime", "PIL", "guard.screening", "guard.sidecar.host.server"}}
sys.exit(bool(heavy & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_serve_is_there_when_it_is_asked_for() -> None:
    from guard import sidecar
    from guard.sidecar.host.server import serve

    assert sidecar.serve is serve
