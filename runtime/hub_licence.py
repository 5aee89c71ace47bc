"""Licences in the words of the Hugging Face Hub.

Its list: https://huggingface.co/docs/hub/repositories-licenses.
"""

import re

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
