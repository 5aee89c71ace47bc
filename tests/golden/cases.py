"""The golden cases: a mistake and a good run of every command."""

import hashlib
import json
import shutil
from pathlib import Path

from tests.golden.session import Run
from tests.golden.small_hub import REPOSITORY

_DEVICE = "--device ../inputs/cpu.yaml"
_ON_BUNDLE = f"--bundle ../emoji {_DEVICE}"
_TEACHER = "../pretrain/teacher"
_EXPERIMENT = (
    "--seeds 2 --pairs 16 --count 16 --steps 1 --batch-size 8 --held-out 4 --workers 0"
    " --warmup-steps 1 --validations 1"
)

# One wrong command line of each command; they all end before any work begins.
MISTAKES = {
    "edgeclip": "serch",
    "ablate": "quick --out found --vary losses.affinty=0",
    "build": "../emoji --device no-such-device",
    "cache": "--count 0 --out cache",
    "cascade": "../emoji --teacher nowhere",
    "classify": "nowhere --bundle ../emoji --labels cat,dog",
    "cut": "nowhere --out cuts",
    "data-report": "--out report --max-noise -1",
    "demo": "--steps many",
    "device": "x86-avx",
    "diagnose": "--out diagnosis",
    "distill": "--out ../emoji",
    "embed": "../inputs --bundle ../emoji --out index",
    "eval": "nowhere --bundle ../emoji",
    "export": "student --out bundle --labels cat --labels dog",
    "measure-cuts": "nowhere --out times.json",
    "measure-probes": "nowhere --out costs.json",
    "plan": "nowhere --device-times a.json --server-times b.json --link wifi",
    "plan-student": "--device nowhere.json --latency-ms 5",
    "pretrain": "--out teacher --steps 0",
    "probes": "--out probes --plan big",
    "profile": "../emoji --max-regression 5%",
    "prune-vocabulary": "../emoji --texts nowhere.txt --out pruned",
    "pull": "small --out bundle",
    "push": f"nowhere {REPOSITORY} --dry-run",
    "quantize": "student --device no-such-device --out found",
    "recipes": "photograph",
    "report": "nowhere.json --out page.html",
    "scaling": "quick --out found --size image_layers",
    "scenes": "photos --count 0",
    "search": "cat --bundle ../emoji --index nowhere.npz",
    "serve": "--function json:dumps --port 99999",
    "tune": "nowhere",
    "verify": "nowhere",
}


def _own_copies(folder: Path) -> None:
    """A student's bundle to be certified; a teacher's, alike but for its fp32 image tower."""
    kept = folder.parent / "emoji"
    teacher = folder / "teacher"
    for copy in (folder / "student", teacher):
        shutil.copytree(kept, copy)
    content = (teacher / "onnx" / "vision_device_int8.onnx").read_bytes()
    (teacher / "onnx" / "vision_device.onnx").write_bytes(content)
    manifest = teacher / "edgeclip.json"
    declared = json.loads(manifest.read_text(encoding="utf-8"))
    for file in declared["files"]:
        if file["path"] == "onnx/vision_device.onnx":
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(declared), encoding="utf-8")


def _made_up_times(folder: Path) -> None:
    """Times of a cut set that are the same on every machine."""
    measured = folder.parent / "measure-cuts" / "times.json"
    times = json.loads(measured.read_text(encoding="utf-8"))
    for place, item in enumerate(times["stages"]):
        kind, cut = item["stage"]["kind"], item["stage"]["cut"] or 0
        slow = {"head": 1 + cut / 2, "tail": 6 - cut / 2, "prepare": 2, "compress": 3}
        ms = slow.get(kind, 0.1) + place / 1000
        item["ms"] = [round(ms + step / 100, 4) for step in range(len(item["ms"]))]
        item["joules"] = None
    for place, payload in enumerate(times["payloads"]):
        payload["bytes"] = [1000 + 100 * place for _ in payload["bytes"]]
        payload["cosines"] = [0.999 for _ in payload["cosines"]]
    times |= {"contended": False, "energy_sensor": None, "steal_share": 0, "waiting_share": 0}
    (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")


# In the order in which they begin; what takes longest comes first.
RUNS = {
    "probes": Run(words="probes --out probes --plan small --device ../inputs/cpu.yaml"),
    "pretrain": Run(
        words="pretrain --out teacher --image-size 32 --image-width 32 --image-layers 1"
        " --text-width 32 --text-layers 1 --head-size 16 --dim 16 --vocab-size 400"
        " --steps 2 --batch-size 8"
    ),
    "export": Run(
        words=f"export {_TEACHER} --teacher {_TEACHER} --out bundle {_DEVICE}"
        " --precisions fp32 --test-count 16 --calibration-count 8 --accept-undecided",
        needs=("pretrain",),
    ),
    "quantize": Run(
        words=f"quantize {_TEACHER} --teacher {_TEACHER} --out found {_DEVICE}"
        " --minutes 0.01 --test-count 16 --calibration-count 16",
        needs=("pretrain",),
    ),
    "cache": Run(words=f"cache --teacher {_TEACHER} --count 8 --out cache", needs=("pretrain",)),
    "data-report": Run(
        words=f"data-report --teacher {_TEACHER} --count 8 --out report"
        " --duplicate-cosine 2 --agreement-deviations 0",  # which differ between machines
        needs=("pretrain",),
    ),
    "distill": Run(
        words=f"distill --teacher {_TEACHER} --out student --count 8 --steps 2 --batch-size 4"
        " --image-heads 1 --image-layers 1 --text-heads 1 --text-layers 1 --cache ../cache/cache",
        needs=("pretrain", "cache"),
    ),
    "prune-vocabulary": Run(
        words=f"prune-vocabulary {_TEACHER} --texts ../inputs/texts.txt --out pruned"
        " --compare ../inputs/texts.txt",
        needs=("pretrain",),
    ),
    "ablate": Run(words=f"ablate quick --out found --vary affinity=0 {_EXPERIMENT}"),
    "scaling": Run(
        words=f"scaling quick --out found {_EXPERIMENT} --text-layers 1 --size image_layers=1"
        " --size image_heads=1 --size image_layers=2 --size image_layers=1,image_heads=1"
    ),
    "diagnose": Run(
        words=f"diagnose --teacher {_TEACHER} --student ../distill/student --count 48"
        " --group-by objects --out diagnosis",
        needs=("pretrain", "distill"),
        drop=r"(  |[a-z ]+, [a-z ]+: )\S.*|no fault",  # findings, which depend on the figures
    ),
    "cut": Run(words=f"cut ../emoji --out cuts --count 2 --precision fp32 {_DEVICE}"),
    "measure-cuts": Run(
        words=f"measure-cuts ../cut/cuts --out times.json --rounds 10 {_DEVICE}", needs=("cut",)
    ),
    "plan": Run(
        words="plan ../cut/cuts --device-times times.json --server-times times.json"
        " --link wifi --out plan.json --picture plan.svg",
        needs=("measure-cuts",),
        before=_made_up_times,
        keep_numbers=True,
    ),
    "cascade": Run(
        words=f"cascade student --teacher teacher {_DEVICE} --test-count 40 --share 0.5"
        " --delta 0.5 --calibration-count 40 --gallery-count 20 --workload ../inputs/least.yaml"
        " --page curve.html",
        before=_own_copies,
        drop=r"\s*[\d.]+%",  # how many thresholds there are depends on rounding
    ),
    "plan-student": Run(
        words="plan-student --device x86-avx512-vnni-epyc-2-cores --latency-ms 5 --part image",
        keep_numbers=True,
    ),
    "scenes": Run(words="scenes photos --count 4 --size 48"),
    "embed": Run(words=f"embed ../scenes/photos --out photos.npz {_ON_BUNDLE}", needs=("scenes",)),
    "embed-texts": Run(
        words=f"embed --texts ../inputs/texts.txt --out texts.npz {_ON_BUNDLE}",
    ),
    "classify": Run(
        words=f"classify ../scenes/photos --labels cat,dog {_ON_BUNDLE}", needs=("scenes",)
    ),
    "search": Run(words=f"search cat --index ../embed/photos.npz {_ON_BUNDLE}", needs=("embed",)),
    "search-json": Run(
        words="search --image ../scenes/photos/00001.png --index ../embed/photos.npz --top 1"
        f" --json {_ON_BUNDLE}",
        needs=("scenes", "embed"),
    ),
    "eval": Run(words=f"eval ../scenes/photos {_ON_BUNDLE}", needs=("scenes",)),
    "verify": Run(words=f"verify ../emoji {_DEVICE}"),
    "profile": Run(
        words=f"profile ../emoji {_DEVICE} --workload ../inputs/least.yaml --parts text --brief"
        " --out run.json --report run.html --markdown run.md --parquet run.parquet",
        drop=r"\S.*: .*\(.*\)$",  # advice, which depends on the figures
    ),
    "report": Run(
        words="report ../profile/run.json --out page.html --markdown page.md", needs=("profile",)
    ),
    "report-bundle": Run(words="report ../emoji --out page.html"),
    "measure-probes": Run(
        words=f"measure-probes ../probes/probes --out costs.json --rounds 5 {_DEVICE}",
        needs=("probes",),
    ),
    "build": Run(
        words="build ../emoji --device ../inputs/openvino.yaml --out contexts",
        status=1,  # the ONNX Runtime of the tests has no provider that compiles
    ),
    "tune": Run(
        words="tune ../emoji --tower text",
        drop=r"(onnxruntime-cpu|openvino|chosen:|left out:) .*",  # which depend on the machine
    ),
    "push": Run(words=f"push ../emoji {REPOSITORY} --dry-run --card card.md"),
    "pull": Run(words=f"pull {REPOSITORY} --out bundle", hub=True),
    "recipes": Run(words="recipes quick", keep_numbers=True),
    "device": Run(words="device x86-avx2 --out device.yaml"),
    "device-list": Run(words="device --list", keep_numbers=True),
}
SERVE = "serve ../emoji --function json:dumps --port 0 --device ../inputs/cpu.yaml"
# A good run of these takes minutes.
WITHOUT_RUN = {"demo"}
