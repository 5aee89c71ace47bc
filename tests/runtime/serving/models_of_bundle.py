"""The real models of the tiny bundle, as something that a `RawServer` answers with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.bundle_models import LabelModel, bundle_models
from edgeclip.runtime.serving.models import ServingModel
from edgeclip.runtime.serving.search_model import SearchModel
from edgeclip.runtime.split.http_client import ClientRules
from edgeclip.runtime.split.retries_and_breaker import BreakerRules
from edgeclip.runtime.wire.messages import SPACE_ID, InferRequest, InferResponse
from tests.conftest import SPACE
from tests.runtime.split.raw_server import Answer

# No breaker opens in the middle of a test that is about something else.
RULES = ClientRules(breaker=BreakerRules(fewest_calls=10), hedges=False)
AMPLE_MS = 20_000.0
COLOURS = ("red", "green", "blue")


def plan(kind: Any = "image", **changes: Any) -> SplitPlan:
    """A plan for the tiny bundle."""
    given = {"name": "test", "kind": kind, "space": SPACE, "deadline_ms": 400.0}
    if kind == "image":
        given |= {"model": "tiny-image", "codec": "file"}
    return SplitPlan(**{**given, **changes})


def models_of(encoder: Encoder, folder: Path) -> dict[str, ServingModel]:
    """The bundle's models, the labels "tiny-labels-colours" and the index "colours"."""
    found = {model.name: model for model in bundle_models(encoder, "tiny")}
    labels = encoder.bake_labels(COLOURS)
    index = Index(COLOURS, encoder.encode_text(COLOURS), encoder.space)
    more: list[ServingModel] = [
        LabelModel(encoder, "tiny-labels-colours", labels),
        SearchModel(index, "colours", folder),
    ]
    return found | {model.name: model for model in more}


def answer_by(models: Mapping[str, ServingModel]) -> Answer:
    """What answers requests by these models."""

    def answer(request: InferRequest) -> InferResponse:
        model = models[request.model]
        outputs = model.run(request.inputs, request.parameters)
        space = {SPACE_ID: str(model.space)}
        return InferResponse(model=model.name, outputs=outputs, parameters=space, id=request.id)

    return answer
