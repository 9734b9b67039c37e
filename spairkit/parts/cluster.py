"""Parts computed by the workers of a Dask cluster."""

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

from spairkit.errors import InputError
from spairkit.parts.plan import Part, Result
from spairkit.parts.work import Job, Worker

_TIMEOUT_SECONDS = 30
_ONE_AT_A_TIME = threading.Lock()


def on_cluster(job: Job, parts: Sequence[Part], address: str) -> Iterator[tuple[Part, Result]]:
    """Computes the parts on a Dask cluster, and yields each with its result when it is done.

    The part of a worker that is lost is computed by another one. Workers see images and checkpoint
    by the same paths as this process, and have the same version of spairkit.

    Args:
        job: what to compute.
        parts: in the order in which they are begun.
        address: of the scheduler, such as tcp://host:8786.

    Raises:
        InputError: the package distributed is missing, no scheduler answers at the address, or a
            part ends every worker that it is given to; or as `Worker`.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise InputError("--scheduler needs Dask: pip install 'spairkit[cluster]'") from None
    try:
        client = Client(address, timeout=_TIMEOUT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--scheduler {address}: no Dask scheduler answers: {reason}") from None
    with client:
        # pure=False: each has a name of its own, so that no worker answers from memory
        futures = {client.submit(_computed, job, part, pure=False): part for part in parts}
        try:
            for future in as_completed(list(futures), loop=client.loop):
                part = futures.pop(future)
                try:
                    result = future.result()
                except KilledWorker:
                    raise InputError(
                        f"{part[0].name}: every worker of the cluster that worked on it ended"
                    ) from None
                yield part, result
        finally:
            client.cancel(list(futures))


def _computed(job: Job, part: Part) -> Result:
    # a worker of Dask may have several threads
    with _ONE_AT_A_TIME:
        return _worker(job).result(part)


@lru_cache(maxsize=1)
def _worker(job: Job) -> Worker:
    return Worker(job)
