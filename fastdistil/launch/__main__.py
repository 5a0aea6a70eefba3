"""`python -m fastdistil.launch`: what the launcher starts on a machine; it is not meant for people.

python -m fastdistil.launch          one rank on another host; its command comes over standard input (rank_process.supervise)
python -m fastdistil.launch FOLDER   one rank of a Python call, which lies in FOLDER (remote_call)
"""

import os
import sys
from pathlib import Path

from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.launch.attempt import LOST
from fastdistil.launch.rank_process import supervise, tie_to_launcher


def _answer_call(folder: Path) -> int:
    """Make, in a rank, the call that `launch_function` asks for, and return this rank's exit code."""
    from fastdistil.launch.remote_call import answer_call

    tie_to_launcher(os.environ)
    place = find_rank_info(os.environ)
    assert place is not None
    return answer_call(folder, place.rank)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        status = _answer_call(Path(sys.argv[1]))
    else:
        status = supervise(open(0, "rb", buffering=0), os.environ)  # noqa: SIM115 - a buffer is locked at the end
    sys.stdout.flush()
    sys.stderr.flush()
    if status == LOST:
        os._exit(status)  # other threads may hang in a collective
    sys.exit(status)
