"""Write a bundle's model card, the README.md of its repository on the Hugging Face Hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import GateRecord, Manifest, TowerFile
from edgeclip.runtime.console import plain_text
from edgeclip.runtime.hub.hub_client import is_repo_name

_HUB_IDS = frozenset(
    re.findall(
        r"\S+",
        """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl
    apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 gemma unknown
    """,
    )
)
# SPDX identifiers that the Hub spells in another way.
_SPDX = {
    "c-uda-1.0": "c-uda",
    "lgpllr": "lgpl-lr",
    "odbl-1.0": "odbl",
    "odc-by-1.0": "odc-by",
    "pddl-1.0": "pddl",
}
_GNU = re.compile(r"((?:a|l)?gpl-\d\.\d)-(?:only|or-later)")


def hub_licence(licence: str) -> dict[str, str]:
    """Return the fields of the front matter that name a licence.

    Args:
        licence: SPDX identifier, or any words; empty counts as unknown.

    Returns:
        `license`, and `license_name` in lower-case letters, digits, "-" and "." where the Hub
        has no identifier of its own for it.
    """
    name = licence.strip().casefold() or "unknown"
    gnu = _GNU.fullmatch(name)
    known = gnu[1] if gnu else _SPDX.get(name, name)
    if known in _HUB_IDS:
        return {"license": known}
    slug = re.sub(r"[^a-z0-9.]+", "-", name)[:80].strip("-.")
    return {"license": "other", "license_name": slug or "see-model-card"}


CARD_NAME = "README.md"
_SPECIAL = re.compile(r"[\\`*_\[\]<|~$&#{}]")
_PLAIN_PATH = re.compile(r"[\w./+-]+", re.ASCII)
# What transformers.js opens for a model of type "clip".
_BROWSER_FILES = ("onnx/vision_model.onnx", "onnx/text_model.onnx")


def base_model(manifest: Manifest) -> str | None:
    """Return the teacher if its name could be that of a repository on the Hub, and no path here."""
    teacher = manifest.provenance.teacher.partition("@")[0]  # OWNER/NAME@REVISION
    return teacher if is_repo_name(teacher) and not Path(teacher).exists() else None


def render_card(bundle: Bundle, repo: str, *, base_model: str | None) -> str:
    """Return the text of the model card.

    Whatever comes from the manifest is escaped: it can neither end the front matter nor be
    taken for markup.

    Args:
        bundle: the opened bundle.
        repo: USER/NAME of the repository that the card is for.
        base_model: the teacher's repository on the Hub, if it has one.
    """
    from huggingface_hub import ModelCard

    manifest = bundle.manifest
    sections = [
        _front_matter(manifest, base_model),
        f"# {_text(manifest.name) or repo}",
        _what_it_is(manifest),
        _how_to_run(bundle, repo),
        _towers(manifest),
        _gates(manifest),
        _provenance(manifest),
        _licence(manifest),
        _limits(manifest),
    ]
    return str(ModelCard("\n\n".join(sections) + "\n"))


def _front_matter(manifest: Manifest, base_model: str | None) -> str:
    """Write the YAML block by which the Hub lists and finds models."""
    from huggingface_hub import ModelCardData

    licence = hub_licence(manifest.licence)
    own_text = "license_name" in licence and any(f.path == "LICENSE" for f in manifest.files)
    data = ModelCardData(
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link="LICENSE" if own_text else None,
        library_name="edgeclip",
        # With both towers, the Hub files CLIP under the first of these tasks.
        pipeline_tag="zero-shot-image-classification"
        if manifest.has("text")
        else "image-feature-extraction",
        base_model=base_model,
        tags=["edgeclip", "clip", "onnx", "edge", "feature-extraction"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _what_it_is(manifest: Manifest) -> str:
    spec, total = manifest.spec, sum(file.bytes for file in manifest.files)
    holds, texts = "an image tower and a text tower in ONNX, the tokenizer", spec.text
    if not manifest.has("text"):
        holds = "an image tower in ONNX, but no text tower"
    lines = [
        f"A CLIP dual encoder for devices, as an EdgeCLIP bundle: {holds}, a manifest with the "
        "SHA-256 of every file, and reference inputs and outputs to check a device against.",
        "",
        f"- Embeddings: {spec.dim} values, float32, of length 1",
        f"- Images: {spec.image.size} × {spec.image.size} pixels, RGB",
        f"- Texts: at most {texts.context_length} tokens"
        if manifest.has("text")
        else "- Texts: none; label sets and indexes of the same embedding space bring their own",
        f"- Size: {len(manifest.files)} files, {_megabytes(total)}",
    ]
    if manifest.reduced:
        forms = ", ".join(str(item.form) for item in manifest.reduced)
        lines.append(f"- Shorter and coarser embeddings: {forms}")
    labels = [file for file in manifest.files if file.path.startswith("labels/")]
    engines = [file for file in manifest.files if file.path.startswith("engines/")]
    for what, files in (("Label sets", labels), ("Engines", engines)):
        if files:
            lines.append(f"- {what}: {', '.join(_path(file.path) for file in files)}")
    if manifest.label_head is not None:
        lines.append(f"- Labels inside the image towers: {_text(manifest.label_head)}")
    if manifest.patch_features:
        lines.append("- The image towers also give the features of each patch")
    held = "This is the teacher's space: gates below held the towers against the teacher."
    if not manifest.held_to_teacher:
        held = "No gate held the towers against a teacher."
    lines += [
        f"- Embedding space: `{manifest.space}`. Indexes and label sets fit only if they were "
        f"made in this space. {held}",
    ]
    return "\n".join(lines)


def _how_to_run(bundle: Bundle, repo: str) -> str:
    folder = repo.split("/")[1]
    commands = [f"edgeclip pull {repo} --out {folder}", f"edgeclip verify {folder}"]
    program = ["from edgeclip.runtime import Encoder", "", f'encoder = Encoder.open("{folder}")']
    program += ['image = encoder.encode_image(["photo.jpg"])']
    if bundle.manifest.has("text"):
        commands += [f'edgeclip classify photo.jpg --bundle {folder} --labels "cat,dog,car"']
        program += ['text = encoder.encode_text(["a photo of a cat"])', "print(image @ text.T)"]
    elif bundle.label_names and _PLAIN_PATH.fullmatch(bundle.label_names[0]):
        labels = bundle.label_names[0]
        commands += [f"edgeclip classify photo.jpg --bundle {folder} --labels {labels}"]
        program += [f'labels = encoder.bundle.labels("{labels}")']
        program += ["print(encoder.classify_embeddings(image, labels))"]
    parts = [
        "## How to run it",
        _fenced("\n".join(commands), "sh"),
        _fenced("\n".join(program), "python"),
    ]
    parts += [
        "It holds ONNX graphs and no weights of PyTorch: `from_pretrained` of transformers' own "
        "classes cannot load it."
    ]
    if _runs_in_browser(bundle):
        parts += ["The graphs also have the names and inputs that transformers.js expects:"]
        parts += [_fenced(_JAVASCRIPT.format(repo=repo), "js")]
    return "\n\n".join(parts)


_JAVASCRIPT = """\
import {{ AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection,
         RawImage }} from '@huggingface/transformers';

const options = {{ dtype: 'fp32' }};
const processor = await AutoProcessor.from_pretrained('{repo}');
const tokenizer = await AutoTokenizer.from_pretrained('{repo}');
const vision = await CLIPVisionModelWithProjection.from_pretrained('{repo}', options);
const text = await CLIPTextModelWithProjection.from_pretrained('{repo}', options);

const image = await RawImage.read('photo.jpg');
const {{ image_embeds }} = await vision(await processor(image));
const texts = tokenizer(['a photo of a cat'], {{ padding: true, truncation: true }});
const {{ text_embeds }} = await text(texts);"""


def _runs_in_browser(bundle: Bundle) -> bool:
    """Tell whether transformers.js can open the bundle: its standard graphs, and a CLIP config."""
    declared = {file.path for file in bundle.manifest.files}
    if not declared.issuperset({*_BROWSER_FILES, "config.json", "preprocessor_config.json"}):
        return False
    try:
        config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "clip"


def _towers(manifest: Manifest) -> str:
    sizes = {file.path: file.bytes for file in manifest.files}
    rows = []
    for tower in manifest.towers:
        for file in tower.files:
            size = sizes[file.path] + sizes.get(file.data_path or "", 0)
            latency = "not measured" if file.latency_ms is None else f"{file.latency_ms:.4g} ms"
            chosen = "yes" if file.precision == tower.chosen else ""
            what = (tower.tower, file.precision, chosen, _path(file.path), _takes(file))
            rows.append((*what, _megabytes(size), latency))
    head = ("tower", "precision", "default", "file", "takes", "size", "latency, batch 1")
    lines = ["## Towers", _table(head, rows)]
    if any(file.latency_ms is not None for tower in manifest.towers for file in tower.files):
        lines.append(f"Median latency of one call, on: {_text(manifest.measured_on)}.")
    return "\n\n".join(lines)


def _takes(file: TowerFile) -> str:
    return (file.pixels or "token ids") + (f", batch {file.batch}" if file.batch else "")


def _interval(gate: GateRecord) -> str:
    if gate.confidence == 1:
        return "of these items"
    return f"{gate.low:.9g} to {gate.high:.9g} ({100 * gate.confidence:.3g}%)"


def _gates(manifest: Manifest) -> str:
    data = list(
        dict.fromkeys(gate.data for _, gate in manifest.all_gates() if gate.data is not None)
    )
    rows = [
        (
            *(_text(what), _text(gate.name)),
            *(f"{gate.value:.9g}", _interval(gate)),
            *(f"{gate.direction} {gate.bound:.9g}", _text(gate.unit)),
            "" if gate.data is None else f"[{data.index(gate.data) + 1}]",
            gate.outcome,
        )
        for what, gate in manifest.all_gates()
    ]
    if not rows:
        return "## Quality gates\n\nNone was measured."
    head = ("what", "gate", "value", "interval", "bound", "unit", "data", "")
    notes = [
        f"- [{number}]: {_text(item.name)}, {item.count:,} measured, of SHA-256 `{item.sha256}`"
        for number, item in enumerate(data, start=1)
    ]
    notes += [f"- {_text(str(remark))}" for remark in manifest.remarks]
    return "\n\n".join(
        [
            "## Quality gates",
            "A quality bound that had to hold before this bundle was written, and what was "
            "measured against it. Figures are rounded to nine digits; `edgeclip.json` has them in "
            'full. "passed" means that the whole interval keeps the bound, "undecided" that the '
            "measured items cannot tell; who made this bundle accepted that.",
            _table(head, rows),
            *(["\n".join(notes)] if notes else []),
        ]
    )


def _provenance(manifest: Manifest) -> str:
    origin = manifest.provenance
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in origin.versions)
    return "\n".join(
        [
            "## Where it comes from",
            "",
            f"- Teacher: {_text(origin.teacher) or 'not recorded'}",
            f"- Student: {_text(origin.student) or 'not recorded'}",
            f"- Data: {_text(origin.data) or 'not recorded'}",
            f"- Created: {_text(origin.created) or 'not recorded'}",
            f"- Made with: {versions or 'not recorded'}",
            "- Command:",
            "",
            _fenced(plain_text(origin.command) or "not recorded", "sh"),
        ]
    )


def _licence(manifest: Manifest) -> str:
    return "\n".join(
        [
            "## Licence",
            "",
            f"- Weights: {_text(manifest.licence) or 'unknown'}",
            "- Data: the manifest names no licence of its own for the data; what it says of "
            f"them is: {_text(manifest.provenance.data) or 'nothing'}",
        ]
    )


def _limits(manifest: Manifest) -> str:
    files = [(tower.tower, file) for tower in manifest.towers for file in tower.files]
    unmeasured = [f"{tower} {file.precision}" for tower, file in files if file.latency_ms is None]
    ungated = [f"{tower} {file.precision}" for tower, file in files if not file.gates]
    lines = ["## Limits", ""]
    if unmeasured:
        lines.append(f"- Latency was not measured for: {', '.join(unmeasured)}.")
    if len(unmeasured) < len(files):
        lines.append("- Latency on any other machine was not measured: `edgeclip profile` does it.")
    if ungated:
        lines.append(f"- No gate was measured for: {', '.join(ungated)}.")
    if manifest.gates or len(ungated) < len(files):
        lines.append("- The gates hold on the data named above; on other data, nothing is known.")
    if any(file.needs_vnni for _, file in files):
        lines.append(
            "- int8 is exact only on processors with 8-bit dot products (VNNI); `edgeclip verify` "
            "tells whether a device is one."
        )
    lines.append("- Bias, safety and languages: nothing was measured.")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _fenced(code: str, language: str) -> str:
    """Fence a code block with more backticks than any run inside it."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _text(value: str) -> str:
    """Escape a text for Markdown: whatever could be markup becomes an HTML entity."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", plain_text(value))


def _path(path: str) -> str:
    return f"`{path}`" if _PLAIN_PATH.fullmatch(path) else _text(path)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
