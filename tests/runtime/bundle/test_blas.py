import subprocess
import sys

_SCRIPT = """
import numpy
from threadpoolctl import threadpool_info
from edgeclip.runtime.bundle.index import limit_blas_to_one_thread

limit_blas_to_one_thread()
blas = [item for item in threadpool_info() if item["user_api"] == "blas"]
print(len(blas), {item["num_threads"] for item in blas})
"""


def test_all_of_numpys_products_have_one_thread_afterwards() -> None:
    """In a process of its own: it holds for good."""
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    count, threads = found.stdout.split(maxsplit=1)
    assert int(count) >= 1
    assert threads.strip() == "{1}"
