"""Fixtures by which torch, which takes seconds for it, captures a tower once in a run of the suite.

Whoever imports them into a test file or its conftest.py gets that for all tests there.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.graph import to_onnx
from edgeclip.export.graph.to_onnx import INTERCHANGE_FORM, GraphForm, capture
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.spec import Tower


@pytest.fixture(scope="session")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what torch captured, which all processes of a run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "captures"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def captured_once(captures: Path) -> Iterator[None]:
    """Take what was captured before; what follows is done anew.

    A second capture would be the same: see `test_the_same_weights_give_the_same_bytes`.
    """

    def once(dual: DualEncoder, tower: Tower, form: GraphForm) -> SimpleNamespace:
        patches = form.patch_features and tower == "image"
        plain = replace(
            form, pixels=INTERCHANGE_FORM.pixels, patch_features=patches
        )  # all that it reads
        model = dual.model
        where = [space_fingerprint(dual), str(model), model.config.to_json_string(), tower, plain]
        path = captures / hashlib.sha256(repr(where).encode()).hexdigest()
        if not path.exists():
            program = capture(dual, tower, plain)
            with atomic_file(path) as written:
                onnx.save(program.model_proto, written)
        return SimpleNamespace(model_proto=onnx.load(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "capture", once)
        yield
