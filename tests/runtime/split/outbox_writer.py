"""Puts numbered requests into an outbox and replays it; made to be killed at any moment.

`python outbox_writer.py OUTBOX URL FIRST`: prints each number once its `put` has returned.
"""

import itertools
import sys

import numpy as np

from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.outbox import Outbox
from edgeclip.runtime.split.replayer import Replayer, ReplayRules
from edgeclip.runtime.split.retries_and_breaker import BreakerRules
from edgeclip.runtime.wire.messages import InferRequest


def main() -> None:
    path, url, first = sys.argv[1:]
    rules = ClientRules(breaker=BreakerRules(fewest_calls=10), hedges=False)
    replay = ReplayRules(per_second=1000, pause_s=0.01, deadline_ms=1000)
    with Outbox(path) as outbox, Server(url, rules=rules) as server:
        Replayer(outbox, server, rules=replay).start()
        for number in itertools.count(int(first)):
            values = np.full(100, number, np.float32)
            outbox.put(f"key-{number}", InferRequest(model="sink", inputs={"x": values}))
            print(number, flush=True)


if __name__ == "__main__":
    main()
