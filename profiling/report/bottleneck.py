"""What a step's time is lost to, named from the numbers of a summary.

Each cause is the share of the step that would be saved if it went away. The one that takes most is the bottleneck, if it
takes a tenth of the step or more:

    data-bound            the phase data (older runs: data_wait_share)
    transfer-bound        the phase transfer: batches on their way to the device
    communication-bound   the phases exposed and compression, less rank 0's waits for the own work of each update's slowest
                          rank, which are within exposed
    straggler             the slowest rank's own work less the mean rank's, if it was the slowest in two thirds of the log lines
    launch-bound          the time in which no kernel ran on a GPU (1 - NVML's utilisation), less its waits for data; the
                          kernels of communication run while it is waited for
    teacher-bound         the teacher's forward, if it takes more than the student's forward, losses and backward together
    memory-bound          the larger of two: the optimizer, since AdamW moves 28 bytes a parameter for some 12 FLOP; and, where
                          both peaks are known and the step's FLOP a byte of weights are below their ratio (the ridge of
                          Williams, Waterman and Patterson 2009), the time that reading the weights takes at the peak
    compute-bound         none of these, and the models' own work (teacher, student, losses, backward) is 4/5 of the step, at a
                          fifth of the device's peak or more where that is known
    unknown               none of these: the time is in `other`, in work far below the peak, or no phases were recorded

`key` is the recipe key that addresses it, or None where none does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastdistil.profiling.quantities import in_ms
from fastdistil.recipe import cacheable
from fastdistil.untrusted import at

_WORTH = 0.10
"""Share of the step from which a cause is the bottleneck."""
_PERSISTENT = 2 / 3
"""Share of the log lines in which one rank must be the slowest: else the ranks take turns, and none is the straggler."""
_COMPUTE = 0.80
_LOW_MFU = 0.20
_LITTLE_BYTES = 2**20
"""Sent in an update: less than this is latency, if it is waited for more than twice as long as it takes at _GIGABIT."""
_GIGABIT = 125e6
"""Bytes a second: what a link does at least, if nobody says otherwise. Of a slower one, bandwidth looks like latency."""
_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_ADAMW_BYTES = 28
"""A parameter, in fp32: weight, gradient and two moments read, weight and moments written."""
_MODELS = ("teacher", "student", "losses", "backward")

Summary = Mapping[str, Any]
Cause = dict[str, Any]


def _cause(name: str, share: float, why: str, key: str | None) -> Cause:
    return {"name": name, "share": share, "why": why, "key": key}


def causes_of(summary: Summary) -> list[Cause]:
    """{name, share (of the step, or an estimate of it), why, key}, the largest first."""
    causes = [*_data(summary), *_transfer(summary), *_ranks(summary), *_launch(summary), *_teacher(summary), *_memory(summary)]
    return sorted(causes, key=lambda cause: -cause["share"])


def name_bottleneck(summary: Summary, causes: list[Cause]) -> Cause:
    """Return {name, why, key}."""
    name, why, key = _bottleneck(summary, causes)
    return {"name": name, "why": why, "key": key}


def _bottleneck(summary: Summary, causes: list[Cause]) -> tuple[str, str, str | None]:
    if causes and causes[0]["share"] >= _WORTH:
        return causes[0]["name"], causes[0]["why"], causes[0]["key"]
    if summary.get("phases") is None:
        return "unknown", "the run recorded no phases, and does not wait for data", None
    shares = {name: phase["share"] for name, phase in summary["phases"].items()}
    models = sum(shares.get(name, 0.0) for name in _MODELS)
    parts = ", ".join(f"{name} {shares[name]:.0%}" for name in _MODELS if name in shares)
    waited = _waited(summary)
    if models < _COMPUTE or waited >= _WORTH:
        largest = max(shares, key=shares.__getitem__)
        why = (
            f"no cause takes {_WORTH:.0%} of the step; the models' own work is {models:.0%} ({parts}); {largest} is the largest"
        )
        if waited >= _WORTH:
            # One that is always the slowest exceeds the mean by half of that wait or more, the mean being of two ranks or more.
            one = [cause["why"] for cause in causes if cause["name"] == "straggler" and cause["share"] > waited / 3]
            why += f"; {waited:.0%} of the step waits for slower ranks{f': {one[0]}' if one else ', which take turns'}"
        return "unknown", why, None
    mfu = at(summary, "mfu", "with_teacher")
    rate = "" if mfu is None else f" at {mfu:.0%} of the device's peak"
    why = f"{models:.0%} of the step is the models' own work ({parts}){rate}"
    if mfu is not None and mfu < _LOW_MFU:
        return "unknown", f"{why}: small operations? try larger micro-batches", "data.micro_batch_tokens"
    return "compute-bound", f"{why}: nothing to gain by waiting less", None


def _share(summary: Summary, *names: str) -> float:
    phases = summary.get("phases") or {}
    return float(sum(phases[name]["share"] for name in names if name in phases))


def _data(summary: Summary) -> Iterator[Cause]:
    share, spread = _share(summary, "data"), ""
    bursts = False
    if summary.get("phases") is None:
        share = summary.get("data_wait_share") or 0.0
    elif data := summary["phases"].get("data"):
        spread = f" (data p50 {in_ms(data['p50'])}, p95 {in_ms(data['p95'])} of steps of p50 {in_ms(summary['step_s']['p50'])})"
        bursts = data["p50"] < data["mean"] / 2
    if str(at(summary, "recipe", "data", "train")).startswith("("):  # an iterable given from Python
        key, way = "data.train", "the iterable keeps the step waiting: give it workers"
    elif bursts:
        key, way = "data.prefetch", "most updates wait little, some long: make more windows ahead"
    elif at(summary, "recipe", "data", "cache_dir") is None:
        key, way = "data.cache_dir", "every update waits: read the corpus from a disk of the node's own"
    else:
        key, way = "data.prefetch", "make more windows ahead, or give the process more cores"
    yield _cause("data-bound", share, f"{share:.0%} of the step waits for data{spread}; {way}", key)


def _transfer(summary: Summary) -> Iterator[Cause]:
    share = _share(summary, "transfer")
    way, key = "look at the bus (its generation and width, other traffic)", None
    if at(summary, "recipe", "teacher", "cache") is not None:
        way, key = "fewer of the cached teacher's tokens travel with them", "teacher.top_k"
    yield _cause("transfer-bound", share, f"{share:.0%} of the step moves batches to the device; {way}", key)


def _ranks(summary: Summary) -> Iterator[Cause]:
    waited = _waited(summary)
    if straggler := summary.get("straggler"):
        worked, seconds, rank = straggler["worked_s"], straggler["seconds"], straggler["rank"]
        mean = sum(worked) / len(worked)
        share = (worked[rank] - mean) / seconds if seconds else 0.0
        if straggler["slowest_in"] >= _PERSISTENT * straggler["lines"]:
            where = f" on {straggler['host']}" if straggler.get("host") else ""
            why = (
                f"rank {rank}{where} works {straggler['share']:.0%} more than the mean rank, the slowest in "
                f"{straggler['slowest_in']} of {straggler['lines']} log lines; the others wait for it {share:.0%} of the step"
            )
            reason, key = _why_slow(straggler)
            yield _cause("straggler", share, f"{why}; {reason}", key)
    exposed, compression = _share(summary, "exposed"), _share(summary, "compression")
    share = max(0.0, exposed + compression - waited)
    step_s = at(summary, "step_s", "mean") or 0.0
    way, key = _less_traffic(summary, compression > exposed, (exposed - waited) * step_s)
    why = f"{exposed:.0%} of the step waits for other ranks, {compression:.0%} compresses gradients"
    if waited > 0.005:
        why += f"; {waited:.0%} of the step waits for slower ranks rather than for the network, and is left out"
    yield _cause("communication-bound", share, f"{why}; {way}", key)


def _waited(summary: Summary) -> float:
    """Share of the step that rank 0 waits for slower ranks: within its exposed time, and no faster network would shorten it."""
    straggler = summary.get("straggler")
    return straggler["rank_0_waited_s"] / straggler["seconds"] if straggler and straggler["seconds"] else 0.0


def _why_slow(straggler: Mapping[str, Any]) -> tuple[str, str | None]:
    rank, worked, waits, tokens = straggler["rank"], straggler["worked_s"], straggler["data_wait_s"], straggler["tokens"]
    mean = sum(worked) / len(worked)
    if waits and waits[rank] - sum(waits) / len(waits) >= (worked[rank] - mean) / 2:
        return "most of it is its wait for data", "data.cache_dir"
    if tokens and sum(tokens) and tokens[rank] / (sum(tokens) / len(tokens)) - 1 >= straggler["share"] / 2:
        return "it has that many more tokens", "data.layout"
    return "its tokens and data are as the others': look at that machine's clocks and neighbours", None


def _less_traffic(summary: Summary, compressing: bool, waited_s: float) -> tuple[str, str]:
    if summary.get("sync") == "every-micro-batch":
        return "let gradients travel once an update", "world.sync"
    sent = summary.get("gradient_bytes_per_update")
    if sent is not None and sent < _LITTLE_BYTES and not compressing and waited_s > 2 * sent / _GIGABIT:
        why = f"{sent:,.0f} bytes an update take {in_ms(sent / _GIGABIT)} at 1 Gbit/s, so it is probably latency"
        return f"{why}: more micro-batches an update share one exchange", "loop.accumulation"
    if summary.get("compression") in (None, "none") or compressing:
        return "another compression moves fewer bytes, or costs less", "compression.kind"
    return "more micro-batches an update share one exchange", "loop.accumulation"


def _launch(summary: Summary) -> Iterator[Cause]:
    utilisation = at(summary, "readings", "utilisation")
    if utilisation is None or not str(summary.get("device_type")).startswith("cuda"):
        return
    waits = _share(summary, "data")
    share = max(0.0, 1 - utilisation - waits)
    compiled = at(summary, "recipe", "loop", "compile")
    key = "data.micro_batch_tokens" if compiled else "loop.compile"
    way = "larger micro-batches have longer kernels" if compiled else "compiled, fewer kernels are started"
    why = f"no kernel runs {1 - utilisation:.0%} of the time, {waits:.0%} of it in waits for data; {way}"
    yield _cause("launch-bound", share, why, key)


def _teacher(summary: Summary) -> Iterator[Cause]:
    teacher, student = _share(summary, "teacher"), _share(summary, "student", "losses", "backward")
    if teacher > student:
        why = f"the teacher's forward is {teacher:.0%} of the step, the student's forward, losses and backward {student:.0%}"
        way, key = "no cache can stand in for it with this objective (a_cos, a_mse, divergence)", None
        if cacheable(at(summary, "recipe", "objective") or {}):
            way, key = "a cached teacher does not run", "teacher.cache"
        yield _cause("teacher-bound", teacher, f"{why}; {way}", key)


def _memory(summary: Summary) -> Iterator[Cause]:
    share = _share(summary, "optimizer")
    why = f"the optimizer is {share:.0%} of the step, and moves {_ADAMW_BYTES} bytes a parameter for some 12 FLOP"
    yield _cause("memory-bound", share, f"{why}; more micro-batches an update share one optimizer step", "loop.accumulation")
    bandwidth = max((at(summary, "environment", "peaks", "bytes") or {}).values(), default=None)
    mfu, flops = summary.get("mfu") or {}, sum((summary.get("flops") or {}).values())
    peak = None if mfu.get("refused") else mfu.get("peak_flops")  # it was not this device's
    weights_bytes = _weights_bytes(summary)
    if not (bandwidth and peak and flops and weights_bytes and at(summary, "step_s", "mean")):
        return
    intensity, ridge = flops / weights_bytes, peak / bandwidth
    if intensity < ridge:
        share = weights_bytes / bandwidth / summary["step_s"]["mean"]
        why = (
            f"at most {intensity:.0f} FLOP a byte of weights, the device needs {ridge:.0f} to be busy ({peak:.3g} FLOP/s, "
            f"{bandwidth:.3g} bytes/s): reading the weights takes {share:.0%} of the step or more"
        )
        yield _cause("memory-bound", share, f"{why}; larger micro-batches read them less often", "data.micro_batch_tokens")


def _weights_bytes(summary: Summary) -> int | None:
    """The least that one update of a rank reads and writes of weights: each micro-batch reads the teacher's once and the
    student's twice, and writes its gradient."""
    student, teacher, batches = (summary.get(name) for name in ("student_parameters", "teacher_parameters", "accumulation"))
    width = _WIDTH.get(str(summary.get("dtype")))
    return int(batches * (width * (2 * student + (teacher or 0)) + 4 * student)) if student and batches and width else None
