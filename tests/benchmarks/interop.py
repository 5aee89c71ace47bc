"""Do others understand EdgeCLIP's server, and EdgeCLIP's client another server?

Clients of Triton and KServe ask the server of the built-in student for embeddings, over HTTP
(binary and JSON) and gRPC; EdgeCLIP's client asks PyTriton, which serves the same image tower.
Everything is compared with what the encoder gives without any network.

What is asked or asks is installed in build/interop; `--quick` leaves all but Triton's client out.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, Rule, finish, hold, options
from _processes import ServerProcess, UnavailableError, environment, run_to_end
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.console import columns
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import EdgeClipError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.bundle_models import bundle_models
from edgeclip.runtime.serving.grpc_server import GrpcListener
from edgeclip.runtime.serving.models import Registry
from edgeclip.runtime.serving.server import in_background
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import InferRequest

BARS: dict[str, Rule] = {
    "clients_run": (">=", None, ""),  # all that are there: 3, and 2 with --quick
    "*_to_*": ("<=", 1e-6, ""),  # of a value of an embedding, for each client, server and way
}
KEPT_MODELS = ("export/emoji_bundle",)

REQUIREMENTS = {
    "tritonclient": ("tritonclient[http,grpc]==2.73.0",),
    "kserve": ("kserve==0.21.0",),
    "nvidia-pytriton": ("nvidia-pytriton==0.7.0", f"onnxruntime=={version('onnxruntime')}"),
}
_OTHERS = str(Path(__file__).with_name("_interop_others.py"))
_TEXTS = ("an owl on a blue background", "café, 3 stars!", "RED Apple", "☕ über 東京")
_PICTURES = 4
_CLIENTS = ("tritonclient", "kserve")
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to ask one model; `max_abs` is None where nothing came, and `why` says why."""

    client: str
    server: str = "edgeclip"
    how: str = ""
    model: str = ""
    max_abs: float | None = None
    why: str = ""


def write_inputs(folder: Path, size: int) -> NDArray[np.uint8]:
    """Write what is asked for; return the pixels, uint8 [N, size, size, 3]."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (_PICTURES, size, size, 3), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    (folder / "texts.json").write_text(json.dumps(_TEXTS), encoding="utf-8")
    return pixels


def client_rows(
    client: str, addresses: tuple[str, str], folder: Path, wanted: Tensors
) -> Iterator[Row]:
    """Let a client ask, and compare what it is given with what the encoder gives."""
    out = folder / f"{client}.out"
    try:
        python = environment(f"interop/{client}", REQUIREMENTS[client])
        words = [str(python), "-I", _OTHERS, "ask", client, *addresses, str(folder), str(out)]
        run_to_end(words, seconds=120)
    except UnavailableError as error:
        yield Row(client=client, why=f"not run: {error}")
        return
    found = json.loads(out.read_text(encoding="utf-8"))
    name = f"{client} {found['version']}"
    for row in found["rows"]:
        given, how, model = row["embeddings"], row["how"], row["model"]
        largest = None if given is None else difference(given, wanted[model])
        yield Row(client=name, how=how, model=model, max_abs=largest, why=row["why"])


def difference(found: Any, wanted: NDArray[Any]) -> float:
    """The largest one; infinite where the shapes differ."""
    array = np.asarray(found, np.float32)
    return float(np.abs(array - wanted).max()) if array.shape == wanted.shape else float("inf")


def own_row(pixels: NDArray[np.uint8], wanted: NDArray[Any]) -> Row:
    """EdgeCLIP's client asks PyTriton."""
    requirements = REQUIREMENTS["nvidia-pytriton"]
    tower = EMOJI_BUNDLE / tower_path("image", "fp32", "uint8-nhwc")  # as the encoder has it
    name = requirements[0].replace("==", " ")
    row = Row(client="edgeclip", server=name, how="http, binary", model="B-pixels")
    try:
        python = str(environment("interop/nvidia-pytriton", requirements))
        # Triton takes the first interpreter's library that it finds, and that of another 3.11.x
        # does not go with this one's standard library.
        code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
        libraries = subprocess.check_output([python, "-c", code], text=True).strip()
        serve = (python, "-I", _OTHERS, "serve", str(tower))
        with (
            ServerProcess(("env", f"LD_LIBRARY_PATH={libraries}", *serve)) as process,
            Server(process.url) as server,
        ):
            request = InferRequest(model=row.model, inputs={"pixels": pixels})
            found = server.infer(request, Deadline.after_ms(60_000)).outputs["image_embeds"]
    except (UnavailableError, EdgeClipError) as error:
        return replace(row, why=f"not run: {error}")
    return replace(row, max_abs=difference(found, wanted))


def bars(rows: Sequence[Row], expected: int) -> list[Bar]:
    """The largest difference for each client and way to ask, and how many pairs ran whole."""
    worst: dict[str, float] = {}
    for row in rows:
        if row.max_abs is not None:
            pair = f"{row.client.split()[0]}_to_{row.server.split()[0]}"
            name = f"{pair}_{row.how.replace(', ', '_')}".lower()
            worst[name] = max(worst.get(name, 0.0), row.max_abs)
    asked = {row.client.split()[0] for row in rows}
    failed = {row.client.split()[0] for row in rows if row.max_abs is None}
    return [
        *(hold(BARS, name, value) for name, value in worst.items()),
        hold(BARS, "clients_run", len(asked - failed), expected),
    ]


def main() -> int:
    args = options(__doc__).parse_args()
    clients = _CLIENTS[:1] if args.quick else _CLIENTS
    encoder = Encoder.open(EMOJI_BUNDLE, precision="fp32")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        pixels = write_inputs(Path(name), encoder.spec.image.size)
        embeddings = encoder.encode_pixels(pixels)
        wanted = {"B-pixels": embeddings, "B-image": embeddings}
        wanted["B-text"] = encoder.encode_text(_TEXTS)
        registry = Registry()
        for model in bundle_models(encoder, "B"):
            registry.add(model)
        app = App(registry)
        listener = GrpcListener(app, host=_HOST, port=0)
        with in_background(app, host=_HOST, listeners=(listener,)) as url:
            for client in clients:
                rows += client_rows(client, (url, listener.address), Path(name), wanted)
    if not args.quick:
        rows.append(own_row(pixels, embeddings))
    cells = [("client", "server", "how", "model", "max abs difference")]
    for row in rows:
        found = row.why if row.max_abs is None else f"{row.max_abs:.1e}"
        cells.append((row.client, row.server, row.how, row.model, found))
    print(columns(cells, left=5))
    return finish(bars(rows, len(clients) + (not args.quick)), args.out, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
