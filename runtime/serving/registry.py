"""Load the bundles, cut sets, indexes and functions that a server serves."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeclip.runtime.serving.models import FunctionModel, Registry

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The bundles, cut sets, indexes and functions to serve; all but functions may be NAME=PATH.

    Attributes:
        bundles: directories of bundles; a name replaces their own.
        cuts: directories that `edgeclip cut` wrote.
        indexes: files that `edgeclip embed` wrote.
        functions: Python functions, each MODULE:FUNCTION.

    Raises:
        ValueError: nothing to serve.
    """

    bundles: Sequence[str] = ()
    cuts: Sequence[str] = ()
    indexes: Sequence[str] = ()
    functions: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not (self.bundles or self.cuts or self.indexes or self.functions):
            raise ValueError("nothing to serve: give a bundle, cuts, an index or a function")


def open_registry(sources: Sources, device: str | None) -> Registry:
    """Load all sources and register their models.

    Args:
        sources: what to serve.
        device: name of a device profile or its YAML file; None for what `edgeclip tune` found for
            a bundle, else "this-machine".

    Raises:
        EdgeClipError: something cannot be loaded, or two have the same name.
    """
    registry = Registry()
    for given in sources.functions:
        function = FunctionModel.load(given)
        registry.add(function, joins=function.joins)
    for given in sources.indexes:
        _add_index(registry, given)
    for given in sources.bundles:
        _add_bundle(registry, given, device)
    for given in sources.cuts:
        _add_tails(registry, given, device)
    return registry


def _add_index(registry: Registry, argument: str) -> None:
    from edgeclip.runtime.bundle.reduced_index import load_index
    from edgeclip.runtime.serving.search_model import SearchModel
    from edgeclip.runtime.serving.security import server_folder

    name, path = _split_name(argument)
    model = SearchModel(load_index(path), name or path.stem, server_folder() / "search")
    _log.info("%s", model.description)
    registry.add(model)


def _add_bundle(registry: Registry, argument: str, device: str | None) -> None:
    from edgeclip.runtime.encoder import Encoder
    from edgeclip.runtime.serving.bundle_models import bundle_models

    name, path = _split_name(argument)
    encoder = Encoder.open(path, device=device)
    for model in bundle_models(encoder, name or encoder.bundle.manifest.name):
        registry.add(model)


def _add_tails(registry: Registry, argument: str, device: str | None) -> None:
    from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
    from edgeclip.runtime.planning.cut_set import CutSet
    from edgeclip.runtime.serving.bundle_models import tail_models

    name, path = _split_name(argument)
    for tail in tail_models(CutSet.open(path), load_device(device or THIS_MACHINE), name or None):
        registry.add(tail)


def _split_name(argument: str) -> tuple[str, Path]:
    """Split NAME=PATH into name and path; the name is empty if there is none."""
    name, equals, path = argument.partition("=")
    return (name, Path(path)) if equals and "/" not in name else ("", Path(argument))
