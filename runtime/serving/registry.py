"""open_registry: everything that a server is told to serve, loaded."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeclip.runtime.serving.models import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What to serve; all but functions may be given as NAME=PATH.

    Attributes:
        bundles: directories of bundles; a name replaces their own.
        cuts: directories that `edgeclip cut` wrote.
        indexes: files that `edgeclip embed` wrote.
        functions: Python functions, each MODULE:FUNCTION.
        echo: also a model that computes nothing, to measure.

    Raises:
        ValueError: nothing to serve.
    """

    bundles: Sequence[str] = ()
    cuts: Sequence[str] = ()
    indexes: Sequence[str] = ()
    functions: Sequence[str] = ()
    echo: bool = False

    def __post_init__(self) -> None:
        if not (self.bundles or self.cuts or self.indexes or self.functions or self.echo):
            raise ValueError("nothing to serve: give a bundle, cuts, an index or a function")


def open_registry(sources: Sources, device: str) -> Registry:
    """Load all sources.

    Args:
        sources: what to serve.
        device: name of a device profile or its YAML file.

    Raises:
        EdgeClipError: something cannot be loaded, or two have the same name.
    """
    registry = Registry()
    if sources.echo:
        from edgeclip.runtime.serving.echo_model import EchoModel

        registry.add(EchoModel())
    for given in sources.functions:
        from edgeclip.runtime.serving.models import FunctionModel

        function = FunctionModel.load(given)
        registry.add(function, joins=function.joins)
    for given in sources.indexes:
        _add_index(registry, given)
    for given in sources.bundles:
        _add_bundle(registry, given, device)
    for given in sources.cuts:
        _add_tails(registry, given, device)
    return registry


def _add_index(registry: Registry, given: str) -> None:
    from edgeclip.runtime.bundle.index import Index
    from edgeclip.runtime.serving.search_model import SearchModel
    from edgeclip.runtime.serving.security import server_folder

    name, path = _named(given)
    model = SearchModel(Index.load(path), name or path.stem, server_folder() / "search")
    print(model.about, file=sys.stderr)
    registry.add(model)


def _add_bundle(registry: Registry, given: str, device: str) -> None:
    from edgeclip.runtime.encoder import Encoder
    from edgeclip.runtime.serving.bundle_models import bundle_models

    name, path = _named(given)
    encoder = Encoder.open(path, device=device)
    for model in bundle_models(encoder, name or encoder.bundle.manifest.name):
        registry.add(model)


def _add_tails(registry: Registry, given: str, device: str) -> None:
    from edgeclip.runtime.device.device_profile import load_device
    from edgeclip.runtime.planning.cut_set import CutSet
    from edgeclip.runtime.serving.bundle_models import tail_models

    name, path = _named(given)
    for tail in tail_models(CutSet.open(path), load_device(device), name or None):
        registry.add(tail)


def _named(given: str) -> tuple[str, Path]:
    """Cut NAME=PATH in two; the name is empty where there is none."""
    name, equals, path = given.partition("=")
    return (name, Path(path)) if equals and "/" not in name else ("", Path(given))
