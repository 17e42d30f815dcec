"""Evaluation and scan on a Ray cluster of two nodes, one of which is killed in the middle: nothing is lost."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guard.classifiers import save
from guard.distributed import Engine, Lost, Processes, Serial
from guard.distributed.ray import Ray
from guard.errors import UsageError
from guard.evaluation import EvaluationSettings, Zoo, evaluate
from guard.scan import ScanSettings
from guard.scan.scanning import scan
from tests.conftest import CLASSES, CONFIG, tiny_model
from tests.zoo import make_zoo, write_truth

ray = pytest.importorskip("ray")
MODELS = 20
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Cluster:
    """Two nodes of one processor each; the second can be killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        self._nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
        self._second = self._nodes.add_node(num_cpus=1)
        self._nodes.wait_for_nodes()
        self.engine = Ray.connect(self._nodes.address)

    def kill(self) -> None:
        self._nodes.remove_node(self._second, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self._nodes.shutdown()  # type: ignore[no-untyped-call]


class Killing:
    """An engine that loses a node after some results."""

    def __init__(self, cluster: Cluster, after: int) -> None:
        self._cluster, self._after, self.killed = cluster, after, False

    def map(self, function: Callable[[Any], Any], items: Any) -> Iterator[tuple[int, Any]]:
        for count, result in enumerate(self._cluster.engine.map(function, items), 1):
            yield result
            if count == self._after and not self.killed:
                self.killed = True
                self._cluster.kill()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def test_a_zoo_is_vetted_to_the_same_results(cluster: Cluster, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    document = json.loads((zoo / "zoo.json").read_text())
    for seed in range(MODELS - len(document["models"])):
        name = f"more-{seed}"
        save(zoo / "models" / name, tiny_model(10 + seed), CONFIG, CLASSES)
        write_truth(zoo, name, "clean", "benign")
        document["models"][name] = {"base": "base", "images": "random"}
    (zoo / "zoo.json").write_text(json.dumps(document))
    settings = EvaluationSettings("quick", 64, (0.05,), 0, "cpu")
    found, seconds = {}, {}
    engines: dict[str, Engine] = {"here": Processes(2), "ray": Killing(cluster, 5)}
    for name, engine in engines.items():
        started = time.monotonic()
        done = evaluate(Zoo.read(zoo), tmp_path / name, methods=("vetting-base",), settings=settings, engine=engine)
        seconds[name] = time.monotonic() - started
        assert not done.failures
        found[name] = {key: replace(result, seconds=0.0, threads=0) for key, result in done.results.items()}
    assert len(found["here"]) == MODELS - 1
    assert str(found["ray"]) == str(found["here"])
    assert engines["ray"].killed  # type: ignore[attr-defined]
    print(seconds)  # noqa: T201 - shown with -s: the overhead


def test_a_set_is_scanned_to_the_same_files(cluster: Cluster, model_directory: Path, tmp_path: Path) -> None:
    import tarfile

    from tests.conftest import random_images
    from tests.unit.scan.conftest import add, png

    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(12):
        with tarfile.open(folder / f"{number:02}.tar", "w") as archive:
            for index, pixels in enumerate(random_images(64, seed=number).numpy()):
                add(archive, f"{index:03}.png", png(pixels))
    contents = []
    for name, engine in (("here", Serial()), ("processes", Processes(2)), ("ray", Killing(cluster, 4))):
        out = tmp_path / name
        scan(
            folder, out, model=str(model_directory), settings=ScanSettings(k=4, sample=64), device="cpu", engine=engine
        )
        contents.append({file: (out / file).read_bytes() for file in ("scores.parquet", "keep.txt", "report.html")})
    assert contents[0] == contents[1] == contents[2]


def _suicidal(place: str) -> str:
    import os

    if place:
        os._exit(1)
    return "fine"


def test_a_task_that_kills_every_process_is_reported_and_the_others_are_done(cluster: Cluster) -> None:
    found = dict(cluster.engine.map(_suicidal, ["", "deadly", ""]))
    assert (found[0], found[2]) == ("fine", "fine")
    assert isinstance(found[1], Lost)
    with pytest.raises(ZeroDivisionError):
        list(cluster.engine.map(_divide, [1, 0]))


def _divide(number: int) -> float:
    return 1 / number


def test_an_address_where_nobody_answers_is_explained() -> None:
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        Ray.connect("127.0.0.1:1")
