"""Evaluation and scan on a Ray cluster of two nodes, one of which is killed in the middle: nothing is lost."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guard.distributed import Lost, Processes, Serial
from guard.distributed.ray import Ray
from guard.errors import UsageError
from guard.evaluation import EvaluationSettings, Zoo, evaluate
from guard.scan import ScanSettings
from guard.scan.scanning import scan
from tests.cluster import Cluster, Killing, large_zoo

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def test_a_zoo_is_vetted_to_the_same_results(cluster: Cluster, tmp_path: Path) -> None:
    zoo = Zoo.read(large_zoo(tmp_path / "zoo", 6))
    settings = EvaluationSettings("quick", 64, (0.05,), 0, "cpu")
    killing, found = Killing(cluster, 2), []
    for name, engine in (("here", Serial()), ("ray", killing)):
        done = evaluate(zoo, tmp_path / name, methods=("vetting-base",), settings=settings, engine=engine)
        assert not done.failures
        found.append({key: replace(result, seconds=0.0, threads=0) for key, result in done.results.items()})
    assert len(found[0]) == 5
    assert str(found[0]) == str(found[1])
    assert killing.killed


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


def test_an_address_where_nobody_answers_is_explained_at_once() -> None:
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused"):
        Ray.connect("127.0.0.1:1")


@pytest.mark.parametrize("address", ["head", "http://head", ":6379", "head:ray", "127.0.0.1:99999"])
def test_what_is_no_address_is_explained(address: str) -> None:
    with pytest.raises(UsageError, match="Ray cluster"):
        Ray.connect(address)
