"""The limit on BLAS's threads in compiled functions."""

import threading
import time

from spairkit.kernels.threads import _blas_controller, single_threaded_blas


def threads_of_blas() -> list[int]:
    return [library["num_threads"] for library in _blas_controller().info()]


def test_thread_limit_holds_inside_and_is_lifted_afterwards() -> None:
    before = threads_of_blas()
    assert before, "numpy and scipy ship a BLAS"
    with single_threaded_blas():
        assert set(threads_of_blas()) == {1}
    assert threads_of_blas() == before


def test_thread_limit_is_lifted_after_an_error() -> None:
    before = threads_of_blas()
    try:
        with single_threaded_blas():
            raise KeyError
    except KeyError:
        pass
    assert threads_of_blas() == before


def test_thread_limit_holds_for_several_python_threads() -> None:
    before, inside = threads_of_blas(), []

    def work() -> None:
        for _ in range(5):
            with single_threaded_blas():
                inside.extend(threads_of_blas())
                time.sleep(0.001)
                inside.extend(threads_of_blas())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(inside) == {1}
    assert threads_of_blas() == before
