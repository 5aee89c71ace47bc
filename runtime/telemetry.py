"""Switch off what other packages report of their use, so that nothing leaves a machine unasked.

Importing any `edgeclip.ROOM` does so before another package is imported, because they read these
variables once, on import. What the user has set stays.
"""

import os
import sys

ORT_VARIABLE = "ORT_DISABLE_TELEMETRY"
OFF = {
    # ONNX Runtime from 1.29 on: events to its maker, and an id of the device below ~/.cache
    # (pull request 27379). Its disable_telemetry_events() comes too late for both.
    ORT_VARIABLE: "1",
    # huggingface_hub, hf_xet and transformers: versions and programs in the user agent, a list of
    # programs fetched to look for, transfer statistics.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    # datasets: tells the hub of every data set that is opened, local ones too.
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # transformers: asks a service to convert a repository that holds no safetensors.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def switch_off() -> None:
    """Set the variables that are unset or empty, for this process and those that it starts.

    Logs a warning if ONNX Runtime was imported before: it has read its variable already.
    """
    if "onnxruntime" in sys.modules and not os.environ.get(ORT_VARIABLE):
        import logging  # costs milliseconds

        logging.getLogger(__name__).warning(
            "onnxruntime was imported before edgeclip and may report its use to its maker: "
            "import edgeclip first, or set %s=1",
            ORT_VARIABLE,
        )
    for name, value in OFF.items():
        os.environ[name] = os.environ.get(name) or value
