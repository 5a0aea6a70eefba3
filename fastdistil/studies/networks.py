"""Networks as YAML files: bandwidths and latencies, each with its source; studies/networks/ has some by name."""

import math
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastdistil.errors import UserError, translated
from fastdistil.untrusted import converted, read_yaml, reason

NETWORKS = Path(__file__).parent / "networks"
Side = Literal["low", "value", "high"]
Model = TypeVar("Model", bound=BaseModel)
Magnitude = Annotated[float, Field(ge=1e-18, le=1e18, allow_inf_nan=False)]
"""Seconds, or bytes a second: a number that is no limit of floating point by itself."""


class Constant(BaseModel):
    """`low` and `high` bound what was seen; without them the value is taken as certain."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    value: Magnitude
    low: Magnitude | None = None
    high: Magnitude | None = None
    source: str

    @model_validator(mode="after")
    def _ordered(self) -> "Constant":
        if not (self.low or self.value) <= self.value <= (self.high or self.value):
            raise ValueError(f"wanted low <= value <= high, got {self.low}, {self.value}, {self.high}")
        return self

    def at(self, side: Side) -> float:
        return getattr(self, side) or self.value


class Network(BaseModel):
    """A YAML file: what is known of a network, each constant with its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: str
    ranks_per_node: Annotated[int, Field(ge=1, le=10**6)]
    link_bytes_per_s: Constant
    """Between two nodes, all rings together."""
    flow_bytes_per_s: Constant | None = None
    """Bandwidth of one ring, where that is less than the link's."""
    latency_s: Constant
    """Time of a ring's step between nodes."""
    local_bytes_per_s: Constant | None = None
    """Within a node; None: not what limits."""
    local_latency_s: Constant | None = None
    """None: as between nodes."""

    def nodes(self, ranks: int) -> int:
        """Return how many nodes so many ranks are on."""
        return -(-ranks // self.ranks_per_node)

    def bandwidth(self, rings: int, nodes: int, side: Side = "value") -> float:
        """Bytes a second of `rings` rings together."""
        local = self.local_bytes_per_s.at(side) if self.local_bytes_per_s else math.inf
        if nodes == 1:
            return local if local < math.inf else self.link_bytes_per_s.at(side)
        flows = rings * self.flow_bytes_per_s.at(side) if self.flow_bytes_per_s else math.inf
        return min(flows, self.link_bytes_per_s.at(side), local)


def load_network(name_or_path: str) -> Network:
    """Load a network by name or path. Raises UserError."""
    return load_named(name_or_path, NETWORKS, Network, "network", "wanted constants as {value: 1.0e9, source: where from}")


def load_named(name_or_path: str, folder: Path, model: type[Model], kind: str, hint: str) -> Model:
    """A YAML file by its path, or by its name in `folder`. Raises UserError, which ends with `hint`."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"no {kind} {name_or_path!r}; known names: {names}; or give a .yaml file")
    with translated(f"reading a {kind}", path):
        try:
            return converted(model, read_yaml(path))
        except ValueError as error:
            raise UserError(f"{path} is no {kind}: {reason(error)}; {hint}") from error
