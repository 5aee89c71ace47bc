"""Fixtures of the runtime's tests that tests of profiles start from too."""

from tests.runtime.conftest import (  # noqa: F401 (fixtures)
    ada,
    clock,
    emoji_cuts,
    emoji_times,
    encoder,
    image_source,
    raw,
    rtx,
    server,
    text_source,
)
