"""The kernels compiled for every GPU generation, without a GPU: nothing spills, and shared memory suffices."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmtok_deploy.backends import triton_plan  # noqa: E402
from mmtok_deploy.backends.triton_launch import KERNELS  # noqa: E402
from mmtok_deploy.backends.triton_plan import (  # noqa: E402
    LONE_CANDIDATES,
    BatchSize,
    FeatureTypes,
    Launch,
    Team,
    Variant,
    plan,
)

# Compute capability -> shared memory a block may use, in KiB. Source: CUDA C++ Programming Guide, compute capabilities.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
ALONE = Team(1, LONE_CANDIDATES, is_meeting=False)

# Tokens, dtype of the features, how float32 is multiplied, who picks.
LAUNCHES = {
    "2880-float32-alone": (2880, torch.float32, "tf32x3", ALONE),
    "2880-bfloat16-team-of-128": (2880, torch.bfloat16, "ieee", Team(128, 4, is_meeting=True)),
    "16384-bfloat16-team-of-16": (16384, torch.bfloat16, "ieee", Team(16, 4, is_meeting=True)),
    "576-float16-team-of-4": (576, torch.float16, "ieee", Team(4, 16, is_meeting=True)),
    "576-tf32x3-team-of-8": (576, torch.float32, "tf32x3", Team(8, 8, is_meeting=True)),
}


@pytest.fixture(autouse=True)
def tritons_own_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ptxas that comes with Triton: FlashInfer, once imported, has it take the machine's CUDA toolkit's."""
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=LAUNCHES)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of one selection."""
    num_tokens, dtype, precision, team = LAUNCHES[request.param]
    monkeypatch.setattr(triton_plan, "FLOAT32_PRODUCTS", precision)
    size = BatchSize(num_problems=1, max_tokens=num_tokens, max_words=40, max_rows=num_tokens + 64)
    types = FeatureTypes(dtype, dtype, vision_width=4096, keys_width=1024)
    return plan(size, types, "multimodal", dtype != torch.float32, 132, team).launches


# Triton compiles for seconds where its cache is empty: one generation of either size of shared memory is fast enough.
# The others are there with the smallest launches (tests/conftest.py), and with all of them in make test-all.
@pytest.mark.parametrize(
    "capability", [86, 90, *(pytest.param(each, marks=pytest.mark.slow) for each in SHARED_KIB if each not in (86, 90))]
)
def test_nothing_spills(
    launches: list[Launch],
    capability: int,
    tmp_path: Path,
    resources: list[str],
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.params["launches"]
    assert len(launches) == 5
    spilled = []
    for variant, _ in launches:
        compiled = _compile(variant, capability)
        registers, stack_bytes, local_bytes = _resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
        shared_kib = compiled.metadata.shared / 1024
        num_warps = dict(variant.options).get("num_warps", 4)
        which = f"{variant.kernel}{'-image' if dict(variant.constants).get('IS_IMAGE') else ''}"
        record_property(f"{which}-registers", registers)
        resources.append(
            f"sm_{capability:<4}{name:<26}{which:<20}{num_warps:>3} warps {registers:>4} registers"
            f" {stack_bytes:>4} B stack {shared_kib:>6.1f} KiB shared"
        )
        if stack_bytes or local_bytes or shared_kib > SHARED_KIB[capability]:
            spilled.append(resources[-1])
    assert not spilled


def test_columns_are_read_16_bytes_a_thread(launches: list[Launch]) -> None:
    ptx = _compile(launches[-1].variant, 90).asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10, ", ptx)


def _compile(variant: Variant, capability: int) -> Any:
    kernel = KERNELS[variant.kernel]
    constants = dict(variant.constants)
    signature = {name: _type_of(value) for name, value in zip(kernel.arg_names, variant.arguments, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (idx,): [["tt.divisibility", 16]] for idx, value in enumerate(variant.arguments) if _is_aligned(value)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))


def _type_of(value: torch.dtype | int | float) -> str:
    if isinstance(value, torch.dtype):
        return POINTERS[value]
    return "i32" if isinstance(value, int) else "fp32"


def _is_aligned(value: torch.dtype | int | float) -> bool:
    return isinstance(value, torch.dtype) or (isinstance(value, int) and value % 16 == 0)


def _resources(cubin: bytes, path: Path) -> tuple[int, int, int]:
    """Returns registers a thread, and bytes of its stack and local memory, which are what is spilled to."""
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output.stdout + output.stderr)
    registers, stack_bytes, local_bytes = map(int, found)
    return registers, stack_bytes, local_bytes
