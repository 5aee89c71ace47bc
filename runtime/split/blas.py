"""One thread for each of numpy's matrix products, where many threads make products."""

from threadpoolctl import threadpool_limits


def one_thread_for_products() -> None:
    """Hold the BLAS of this process to one thread for each product, from here on.

    A product over some thousand entries is shared between all processors by itself, and its
    threads wait for each other by spinning. Where several threads of a busy program do that,
    hundreds of milliseconds of processor time go into what takes a tenth of one alone.
    """
    threadpool_limits(limits=1, user_api="blas")
