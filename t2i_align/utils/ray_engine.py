"""`--engine ray`: the processes of a command as actors on one machine or a Ray cluster, started anew where they die.

An actor is what a process of torchrun is: it has a rank, holds the model and takes its own blocks of the work, so that
files and results are the same. Commands continue what they find in their output, and so does an actor in another's
place. All machines see the same files, under the same paths.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from t2i_align.errors import UserError
from t2i_align.plugins import load as load_plugin
from t2i_align.utils.distributed import Distributed

ATTEMPTS = 5  # of each rank


class Meeting:
    """Where the actors of a command gather values, one of each rank; one that is started anew gives its value again."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.values: defaultdict[int, dict[int, Any]] = defaultdict(dict)

    async def gather(self, number: int, rank: int, value: Any) -> list[Any]:
        """The values of all ranks at the call of this number, when all have made it."""
        values = self.values[number]
        values[rank] = value
        while len(values) < self.world:
            await asyncio.sleep(0.05)
        return [values[rank] for rank in range(self.world)]


class Process:
    """One process of a command."""

    def __init__(self, rank: int, world: int, meeting: Any, folder: str) -> None:
        import ray

        os.chdir(folder)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        Distributed.engine = lambda number, value: ray.get(meeting.gather.remote(number, rank, value))

    def run(self, function: str, options: Mapping[str, Any], plugins: Sequence[str], silent: bool) -> tuple[Any, str]:
        """The function's result and what it printed."""
        for place in plugins:
            load_plugin(place)
        module, _, name = function.partition(":")
        called = getattr(import_module(module), name)
        if silent:
            from t2i_align.utils.logging import silence_libraries

            silence_libraries()
        with redirect_stdout(io.StringIO()) as printed:
            return called(**options), printed.getvalue()


def run(
    function: str,
    options: Mapping[str, Any],
    *,
    workers: int | None = None,
    plugins: Sequence[str] = (),
    silent: bool = True,
) -> Any:
    """Run `module:name` in so many actors (None: one a GPU of the cluster, or one); returns the last one's result.

    The cluster is that of RAY_ADDRESS or one that runs on this machine, or else a new one here.

    Raises:
        UserError: Ray is not installed, or an actor died again and again; and what the function raises.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError as error:
        raise UserError("--engine ray needs ray: pip install 't2i-align[ray]'") from error
    paths = os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)
    ours = not ray.is_initialized()
    if ours:
        environment = {"env_vars": {"PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
        ray.init(include_dashboard=False, logging_level=logging.ERROR, runtime_env=environment)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    world = workers or gpus or 1
    meeting = ray.remote(num_cpus=0)(Meeting).remote(world)
    actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Process)
    running: dict[Any, tuple[int, Any]] = {}
    tries, died = Counter[int](), 0

    def begin(rank: int) -> None:
        tries[rank] += 1
        if tries[rank] > ATTEMPTS:
            raise UserError(f"process {rank} of {world} died {ATTEMPTS} times; out of memory? Run again to continue.")
        process: Any = actor.remote(rank, world, meeting, os.getcwd())
        running[process.run.remote(function, dict(options), list(plugins), silent)] = rank, process

    try:
        for rank in range(world):
            begin(rank)
        result: Any = None
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            rank, process = running.pop(ready)
            try:
                result, printed = ray.get(ready)
            except RayActorError:
                died += 1
                begin(rank)
            except RayTaskError as error:
                if tries[rank] > died:
                    raise error.cause from None
                begin(rank)  # it may have missed what one that died was to leave
            else:
                print(printed, end="")
                ray.kill(process)  # which holds a model
        return result
    finally:
        for _, process in running.values():
            ray.kill(process)
        if ours:
            ray.shutdown()
