"""Do others understand EdgeCLIP's server, and EdgeCLIP's client another server?

Clients of Triton and KServe ask the server of the built-in student for embeddings, over HTTP
(binary and JSON) and gRPC; EdgeCLIP's client asks PyTriton, which serves the same image tower.
Everything is compared with what the encoder gives without any network.

What is asked or asks is installed under `--work`; `--quick` leaves all but Triton's client out.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, finish, options
from _environment import InstallError, environment
from _interop_server import REQUIREMENTS, pytriton
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.bundle.files import tower_path
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

_HERE = Path(__file__).parent
_TEXTS = ("an owl on a blue background", "café, 3 stars!", "RED Apple", "☕ über 東京")
_PICTURES = 4
_BOUND = 1e-6
_CLIENTS = ("tritonclient", "kserve")
_SECONDS = 120
_HOST = "127.0.0.1"
_PYTRITON = REQUIREMENTS["nvidia-pytriton"][0].replace("==", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to ask one model; `max_abs` is None where nothing came, and `why` says why."""

    client: str
    server: str
    how: str
    model: str
    max_abs: float | None
    why: str = ""

    def line(self) -> str:
        """As the table has it."""
        found = self.why if self.max_abs is None else f"{self.max_abs:.1e}"
        return f"{self.client:22} {self.server:26} {self.how:14} {self.model:9} {found}"


def write_inputs(folder: Path, size: int) -> NDArray[np.uint8]:
    """Write what is asked for; return the pixels, uint8 [N, size, size, 3]."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (_PICTURES, size, size, 3), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    (folder / "texts.json").write_text(json.dumps(_TEXTS), encoding="utf-8")
    return pixels


@contextmanager
def served(encoder: Encoder) -> Iterator[tuple[str, str]]:
    """Serve a bundle as B; the addresses of HTTP and gRPC."""
    registry = Registry()
    for model in bundle_models(encoder, "B"):
        registry.add(model)
    app = App(registry)
    listener = GrpcListener(app, host=_HOST, port=0)
    with in_background(app, host=_HOST, listeners=(listener,)) as url:
        yield url, listener.address


def asked_by(client: str, work: Path, addresses: tuple[str, str], folder: Path) -> dict[str, Any]:
    """What a client's process found.

    Raises:
        InstallError: it cannot be installed, or its process failed.
    """
    made = environment(work / client, REQUIREMENTS[client])
    print(f"{client}: {made}")
    out = folder / f"{client}.out"
    command = [str(made.python), "-I", str(_HERE / "_interop_ask.py"), client, *addresses]
    done = subprocess.run(
        [*command, str(folder), str(out)],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise InstallError(f"its process failed: {(done.stderr.splitlines() or ['no word'])[-1]}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def client_rows(client: str, found: Mapping[str, Any], wanted: Tensors) -> Iterator[Row]:
    """Compare what a client was given with what the encoder gives."""
    for row in found["rows"]:
        embeddings, model = row["embeddings"], row["model"]
        yield Row(
            client=f"{client} {found['version']}",
            server="edgeclip",
            how=row["how"],
            model=model,
            max_abs=None if embeddings is None else difference(embeddings, wanted[model]),
            why=row["why"],
        )


def difference(found: Any, wanted: NDArray[Any]) -> float:
    """The largest one; infinite where the shapes differ."""
    array = np.asarray(found, np.float32)
    return float(np.abs(array - wanted).max()) if array.shape == wanted.shape else float("inf")


def own_row(work: Path, tower: Path, pixels: NDArray[np.uint8], wanted: NDArray[Any]) -> Row:
    """EdgeCLIP's client asks PyTriton."""
    row = {"client": "edgeclip", "server": _PYTRITON, "how": "http, binary", "model": "B-pixels"}
    try:
        with pytriton(work, tower) as url, Server(url) as server:
            request = InferRequest(model="B-pixels", inputs={"pixels": pixels})
            found = server.infer(request, Deadline.after_ms(60_000)).outputs["image_embeds"]
    except (InstallError, EdgeClipError) as error:
        return Row(**row, max_abs=None, why=f"not run: {error}")
    return Row(**row, max_abs=difference(found, wanted))


def bars(rows: Sequence[Row], expected: Sequence[str]) -> list[Bar]:
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
        *(Bar(name=name, value=worst[name], direction="<=", bound=_BOUND) for name in worst),
        Bar(name="clients_run", value=len(asked - failed), direction=">=", bound=len(expected)),
    ]


def main() -> int:
    """Let everybody ask everybody, and compare."""
    parser = options(__doc__ or "")
    build = _HERE.parents[1] / "build" / "interop"
    parser.add_argument("--work", type=Path, default=build, help="where others are installed")
    args = parser.parse_args()
    work: Path = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    clients = _CLIENTS[:1] if args.quick else _CLIENTS
    encoder = Encoder.open(EMOJI_BUNDLE, precision="fp32")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = write_inputs(folder, encoder.spec.image.size)
        embeddings = encoder.encode_pixels(pixels)
        texts = encoder.encode_text(_TEXTS)
        wanted = {"B-pixels": embeddings, "B-image": embeddings, "B-text": texts}
        with served(encoder) as addresses:
            for client in clients:
                try:
                    found = asked_by(client, work, addresses, folder)
                    rows += client_rows(client, found, wanted)
                except InstallError as error:
                    rows.append(absent(client, str(error)))
    if not args.quick:
        tower = EMOJI_BUNDLE / tower_path("image", "fp32", "uint8-nhwc")  # as the encoder has it
        rows.append(own_row(work, tower, pixels, embeddings))
    print("\n".join(row.line() for row in rows))
    judged = bars(rows, clients if args.quick else (*clients, "edgeclip"))
    return finish(judged, args.out, rows=[asdict(row) for row in rows])


def absent(client: str, why: str) -> Row:
    """A client that did not run."""
    return Row(client=client, server="edgeclip", how="", model="", max_abs=None, why=why)


if __name__ == "__main__":
    sys.exit(main())
