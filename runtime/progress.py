"""A progress bar on stderr for work that counts its steps."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # steps done, steps in all


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Give a function to call after each step; nothing is drawn where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield step
