"""Every launch that ships, compiled ahead of time for the GPUs that are supported: no register spills, shared memory that fits.

In a process of its own: under TRITON_INTERPRET a kernel has nothing to compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["distill_triton", "sparse_triton", "cosine_triton", "compress_triton", "top_k_triton"]
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
module, target = sys.argv[1:]
for launch in importlib.import_module(f"fastdistil.kernels.{module}").shipped_launches():
    source = ASTSource(launch.fn, launch.signature, launch.constexprs, launch.attributes)
    made = triton.compile(source, target=targets[target], options=launch.options)
    found = {"name": launch.name, "shared": made.metadata.shared}
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


@pytest.mark.parametrize("target", LIMITS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module: str, target: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    child = [sys.executable, "-c", CHILD, module, target]
    done = subprocess.run(child, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) >= 4
    for found in compiled:
        assert found["stack"] == found["local"] == 0, found
        assert found["shared"] <= LIMITS[target], found
        assert 0 < found["reg"] <= 256, found
