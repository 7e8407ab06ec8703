"""A Ray cluster, or Ray on this machine where there is none. Needs the extra `cluster`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from longspan.core.errors import RunError
from longspan.core.optional import require
from longspan.data.jobs.base import Result, Unit


class RayExecutor:
    """Runs every unit as a task of one CPU, and of one GPU where that is asked for and the cluster has any.

    The machines of the cluster need longspan installed, and see inputs, tokenizer and output under the same
    paths.

    Args:
        address: of a cluster ("auto", "ray://host:10001"). None: RAY_ADDRESS if set, else this machine.
        num_workers: tasks under way at once; on this machine also its CPUs for Ray. None: all CPUs, or GPUs.
        use_gpus: Ray hides all GPUs from a task that asks for none.
    """

    def __init__(
        self, address: str | None = None, *, num_workers: int | None = None, use_gpus: bool = False
    ) -> None:
        self._ray: Any = require("ray", extra="cluster", feature="--executor ray")
        self._address, self._wanted, self._use_gpus = address, num_workers, use_gpus
        self._started = False

    @property
    def num_workers(self) -> int:
        """Tasks under way at once."""
        return self._wanted or self._num_gpus() or int(self._ray.cluster_resources().get("CPU", 1))

    def _num_gpus(self) -> int:
        """Return the GPUs that tasks may have; 0: none, or not asked for."""
        return int(self._ray.cluster_resources().get("GPU", 0)) if self._use_gpus else 0

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            options: dict[str, Any] = {"address": self._address} if self._address else {}
            if not options and self._wanted:
                # With RAY_ADDRESS set Ray joins that cluster, and must not be told how many CPUs it has.
                import os

                options = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": self._wanted}
            self._ray.init(log_to_driver=False, include_dashboard=False, **options)
            self._started = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            self._ray.shutdown()

    def run(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """See `Executor.run`. A task whose machine died runs again elsewhere, three times."""
        ray = self._ray
        task = ray.remote(num_cpus=1, num_gpus=min(1, self._num_gpus()), max_retries=3)(_call)
        shared = ray.put(function)
        limit = 2 * self.num_workers
        waiting: deque[Any] = deque()
        try:
            for unit in units:
                waiting.append(task.remote(shared, unit))
                if len(waiting) >= limit:
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise RunError(
                "a Ray task was lost", found=str(error), fix="run the same command again to go on"
            ) from None
        finally:
            for each in waiting:
                ray.cancel(each)


def _call(function: Callable[[Unit], Result], unit: Unit) -> Result:
    return function(unit)
