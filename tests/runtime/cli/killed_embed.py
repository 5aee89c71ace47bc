"""`edgeclip embed`, killed when the given number of images has been read.

`python killed_embed.py READS ARGUMENT...`
"""

import os
import signal
import sys
from typing import Any

from edgeclip.runtime.cli.main import main
from edgeclip.runtime.inputs import preprocess
from edgeclip.runtime.inputs.preprocess import resize_and_crop

if __name__ == "__main__":
    left = int(sys.argv[1])

    def read_or_die(*arguments: Any) -> Any:
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return resize_and_crop(*arguments)

    vars(preprocess)["resize_and_crop"] = read_or_die
    sys.exit(main(["embed", *sys.argv[2:]]))
