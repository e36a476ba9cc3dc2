"""The kernels compiled for every GPU generation, without a GPU: nothing spills, and shared memory suffices."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok_deploy import SelectionConfig
from mmtok_deploy.problem import SelectionProblem

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmtok_deploy.backends import triton as backend  # noqa: E402
from mmtok_deploy.backends.triton import Team  # noqa: E402

Launches = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

# Compute capability -> shared memory a block may use, in KiB. Source: CUDA C++ Programming Guide, compute capabilities.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}

# Tokens, dtype of the features, how float32 is multiplied, who picks.
LAUNCHES = {
    "2880-float32-alone": (2880, torch.float32, "ieee", Team(1, backend.LONE_CANDIDATES, is_meeting=False)),
    "2880-bfloat16-team-of-64": (2880, torch.bfloat16, "ieee", Team(64, 4, is_meeting=True)),
    "576-float16-team-of-4": (576, torch.float16, "ieee", Team(4, 64, is_meeting=True)),
    "576-tf32x3-team-of-16": (576, torch.float32, "tf32x3", Team(16, 16, is_meeting=True)),
}


class Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: Launches) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@pytest.fixture(autouse=True)
def tritons_own_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ptxas that comes with Triton: FlashInfer, once imported, has it take the machine's CUDA toolkit's."""
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=LAUNCHES)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The launches of one selection, as `select` makes them."""
    num_tokens, dtype, precision, team = LAUNCHES[request.param]
    monkeypatch.setattr(backend, "FLOAT32_PRODUCTS", precision)
    found: Launches = []
    for name in ("similarity", "row_weights", "coverage_columns", "greedy_picks"):
        monkeypatch.setattr(backend, name, Recorder(getattr(backend, name), found))
    shapes = ((num_tokens, 4096), (num_tokens, 1024), (40, 4096))
    vision, keys, text = (torch.ones(1, dtype=dtype).expand(shape) for shape in shapes)
    excluded = None if dtype == torch.float32 else torch.zeros(num_tokens, dtype=torch.bool)
    backend._select_together([SelectionProblem(vision, keys, text, 160, excluded)], SelectionConfig(), team)
    return found


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_nothing_spills(
    launches: Launches,
    capability: int,
    tmp_path: Path,
    resources: list[str],
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.params["launches"]
    assert len(launches) == 5
    spilled = []
    for kernel, args, kwargs in launches:
        compiled = _compile(kernel, args, kwargs, capability)
        registers, stack_bytes, local_bytes = _resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
        shared_kib = compiled.metadata.shared / 1024
        which = f"{kernel.__name__}{'-image' if kwargs.get('IS_IMAGE') else ''}"
        record_property(f"{which}-registers", registers)
        resources.append(
            f"sm_{capability:<4}{name:<26}{which:<20}{kwargs.get('num_warps', 4):>3} warps {registers:>4} registers"
            f" {stack_bytes:>4} B stack {shared_kib:>6.1f} KiB shared"
        )
        if stack_bytes or local_bytes or shared_kib > SHARED_KIB[capability]:
            spilled.append(resources[-1])
    assert not spilled


def test_columns_are_read_16_bytes_a_thread(launches: Launches) -> None:
    kernel, args, kwargs = launches[-1]
    ptx = _compile(kernel, args, kwargs, 90).asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10, ", ptx)


def _compile(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    signature, constants, attributes = {}, {}, {}
    for idx, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name] = _type_of(value)
        if _is_aligned(value):
            attributes[(idx,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(args) :]:
        signature[name], constants[name] = "constexpr", kwargs[name]
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type_of(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _is_aligned(value: Tensor | int | float) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _resources(cubin: bytes, path: Path) -> tuple[int, int, int]:
    """Returns registers a thread, and bytes of its stack and local memory, which are what is spilled to."""
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output.stdout + output.stderr)
    registers, stack_bytes, local_bytes = map(int, found)
    return registers, stack_bytes, local_bytes
