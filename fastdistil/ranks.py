"""Which rank this process is, as its launcher told it through the environment."""

from dataclasses import dataclass
from typing import Literal

Launcher = Literal["fastdistil", "torchrun", "horovodrun", "mpirun", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank among `size`, on node `cross_rank` of `cross_size`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    launcher: Launcher
    address: str | None
    """Host of rank 0, as the others reach it; None: known to the launcher's library alone (mpirun, horovodrun)."""
    port: int | None
    """On `address`, free for fastdistil: rank 0 serves the control plane there. The next one up is used by torch's own
    launcher and left alone."""
