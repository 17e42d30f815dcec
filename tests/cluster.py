"""A Ray cluster of two nodes on this machine, one of which can be killed, and a zoo of any number of models."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from guard.classifiers import save
from guard.distributed import Engine
from tests.conftest import CLASSES, CONFIG, tiny_model
from tests.zoo import make_zoo, write_truth


class Cluster:
    """Two nodes of one processor each; the second can be killed."""

    def __init__(self) -> None:
        from guard.distributed.ray import Ray

        self._start()
        self.engine = Ray.connect(self._nodes.address)

    def _start(self, attempts: int = 3) -> None:
        from ray.cluster_utils import Cluster as Nodes

        self._nodes = Nodes()
        try:
            self._nodes.add_node(num_cpus=1, include_dashboard=False)
            self._second = self._nodes.add_node(num_cpus=1)
            self._nodes.wait_for_nodes()
        except Exception:
            # Ray gives a node 30 seconds, and no setting changes that: too few where other tests use all processors.
            with suppress(Exception):
                self._nodes.shutdown()  # type: ignore[no-untyped-call]
            if attempts == 1:
                raise
            self._start(attempts - 1)

    def kill(self) -> None:
        self._nodes.remove_node(self._second, allow_graceful=False)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._nodes.shutdown()  # type: ignore[no-untyped-call]


class Killing:
    """A cluster's engine that loses a node after some results."""

    def __init__(self, cluster: Cluster, after: int) -> None:
        self._cluster, self._after, self.killed = cluster, after, False

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        engine: Engine = self._cluster.engine
        for count, result in enumerate(engine.map(function, items), 1):
            yield result
            if count == self._after and not self.killed:
                self.killed = True
                self._cluster.kill()


def large_zoo(root: Path, models: int) -> Path:
    """The tiny zoo with further clean models, to this number in all."""
    zoo = make_zoo(root)
    document = json.loads((zoo / "zoo.json").read_text())
    for seed in range(models - len(document["models"])):
        name = f"more-{seed}"
        save(zoo / "models" / name, tiny_model(10 + seed), CONFIG, CLASSES)
        write_truth(zoo, name, "clean", "benign")
        document["models"][name] = {"base": "base", "images": "random"}
    (zoo / "zoo.json").write_text(json.dumps(document))
    return zoo
