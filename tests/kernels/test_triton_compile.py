"""Every launch that ships, compiled ahead of time for the GPUs that are supported: no register spills, shared memory that fits.

In processes of their own: under TRITON_INTERPRET a kernel has nothing to compile. One for each target, two side by side.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["distill_triton", "sparse_distill_triton", "cosine_triton", "block_codes_triton", "top_k_triton"]
# Target -> bytes of shared memory that a program may use.
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

CHILD = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

targets = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
dump = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
target, *modules = sys.argv[1:]
for module, launch in (
    (module, launch)
    for module in modules
    for launch in importlib.import_module(f"fastdistil.kernels.{module}").shipped_launches()
):
    source = ASTSource(launch.fn, launch.signature, launch.constexprs, launch.attributes)
    made = triton.compile(source, target=targets[target], options=launch.options)
    found = {"module": module, "name": launch.name, "shared": made.metadata.shared}
    if "cubin" in made.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            text = subprocess.run([dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        found |= {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
    else:
        assembly = made.asm["amdgcn"]
        found["stack"] = int(re.search(r"\\.private_segment_fixed_size: (\\d+)", assembly)[1])
        found["local"] = int(re.search(r"\\.vgpr_spill_count: +(\\d+)", assembly)[1])
        found["reg"] = int(re.search(r"\\.vgpr_count: +(\\d+)", assembly)[1])
    print(json.dumps(found))
"""


def compile_for(target: str, cache: Path) -> list[dict[str, Any]]:
    """Compile every module's launches for a target, and return what each needs of the GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    child = [sys.executable, "-c", CHILD, target, *MODULES]
    done = subprocess.run(child, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[dict[str, Any]]]]]:
    with ThreadPoolExecutor(2) as pool:
        yield {target: pool.submit(compile_for, target, tmp_path_factory.mktemp(target)) for target in LIMITS}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("target", LIMITS)
def test_compiles_without_spills(module: str, target: str, compilations: dict[str, Future[list[dict[str, Any]]]]) -> None:
    launches = [launch for launch in compilations[target].result() if launch["module"] == module]
    assert len(launches) >= 4
    for launch in launches:
        assert launch["stack"] == launch["local"] == 0, launch
        assert launch["shared"] <= LIMITS[target], launch
        assert 0 < launch["reg"] <= 256, launch
