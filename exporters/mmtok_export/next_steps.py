"""Makes the next commands for an exported file from its manifest, one for each runtime."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from mmtok_deploy.manifest import Manifest, TensorInfo
from mmtok_export.graph_file import load_graph

__all__ = ["next_steps", "triton_config", "write_triton_repository"]

_TRITON_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}

# Limits of TensorRT 10.3 in JetPack 6.1 and 6.2 (Orin), whose parser uses ONNX 1.16; JetPack 7 (Thor) has a newer one.
_JETPACK_6_OPSET, _JETPACK_6_IR_VERSION = 20, 10


def next_steps(file: Path, manifest: Manifest) -> dict[str, str]:
    """Returns the next command or call for each runtime that can load the file, by the runtime's name.

    Args:
        file: The exported file.
        manifest: Its manifest.
    """
    quoted, text = shlex.quote(str(file)), str(file).replace("\\", "\\\\").replace('"', '\\"')
    steps = {}
    if manifest.kind == "selection" and not manifest.share:
        steps["SGLang"] = f"add --mmtok-engine {quoted} to the server's command"
    if manifest.format != "onnx":
        return steps | {"Python": f'open_engine(Path("{text}"), torch.device("cuda"))'}
    has_plugins = bool(_foreign_operators(manifest))
    # TensorRT needs a grid on the host, since the graph uses it as a shape.
    takes_grid = any(tensor.name == "grid_thw" for tensor in manifest.inputs)
    if not (manifest.is_told_at_run_time or takes_grid):
        steps["TensorRT"] = _trtexec("trtexec", file, manifest, has_plugins=has_plugins)
        plugin = " --plugin LIB.so" if has_plugins else ""
        steps["TensorRT-RTX"] = f"mmtok export engine {quoted} --target 8.6{plugin}"
        if _fits_jetpack_6(manifest):
            steps["Jetson"] = _trtexec("/usr/src/tensorrt/bin/trtexec", file, manifest, has_plugins=has_plugins)
    if has_plugins:  # no other runtime has these operators
        return steps
    has_bfloat16 = any(tensor.dtype == "bfloat16" for tensor in (*manifest.inputs, *manifest.outputs))
    if has_bfloat16 and manifest.kind != "selection":  # ONNX Runtime multiplies no such matrices on a CPU
        provider = '("CUDAExecutionProvider", {"use_tf32": "0"})'
        return steps | {"ONNX Runtime, Python": f'ort.InferenceSession("{text}", providers=[{provider}])'}
    steps["ONNX Runtime, Python"] = f'ort.InferenceSession("{text}", providers=["CPUExecutionProvider"])'
    steps["ONNX Runtime, C++"] = f'Ort::Session session(env, ORT_TSTR("{text}"), Ort::SessionOptions{{}});'
    steps["ONNX Runtime, JavaScript"] = f'await ort.InferenceSession.create("{text}")'
    steps["OpenVINO"] = f'ov.Core().compile_model("{text}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})'
    # Its ONNX Runtime backend reads and writes bfloat16 from this version on.
    triton = "Triton 26.03 or later" if has_bfloat16 else "Triton"
    steps[triton] = f"mmtok export triton {quoted} --repository models"
    return steps


def _foreign_operators(manifest: Manifest) -> list[str]:
    """Returns "operators of DOMAIN" for each domain that is not ONNX's own."""
    return [name for name in manifest.requires if name.startswith("operators of ")]


def _fits_jetpack_6(manifest: Manifest) -> bool:
    """Returns whether the TensorRT of JetPack 6 can read the file's opset and format version."""
    opset, ir_version = (int(manifest.requires.get(f"onnx {name}", 0)) for name in ("opset", "ir version"))
    return opset <= _JETPACK_6_OPSET and ir_version <= _JETPACK_6_IR_VERSION


def _trtexec(tool: str, file: Path, manifest: Manifest, *, has_plugins: bool) -> str:
    """Returns the command that builds an engine of the file with TensorRT's own tool."""
    command = [tool, f"--onnx={file}", "--stronglyTyped", "--noTF32"]
    if has_plugins:
        command.append("--staticPlugins=LIB.so")
    open_inputs = [tensor for tensor in manifest.inputs if any(isinstance(size, str) for size in tensor.shape)]
    if open_inputs:
        for flag, which in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum")):
            shapes = (f"{tensor.name}:{_sizes(tensor, manifest, which)}" for tensor in open_inputs)
            command.append(f"--{flag}Shapes={','.join(shapes)}")
    return shlex.join([*command, f"--saveEngine={file.with_suffix('.engine')}"])


def _sizes(tensor: TensorInfo, manifest: Manifest, which: str) -> str:
    sizes = []
    for size in tensor.shape:
        allowed = manifest.dimensions.get(str(size))
        # A dynamic dimension of the encoder for which no range was given.
        sizes.append(str(size) if allowed is None else str(getattr(allowed, which)))
    return "x".join(sizes)


def triton_config(manifest: Manifest, name: str) -> str:
    """Returns the config.pbtxt of a model for the Triton Inference Server, on the CPU.

    Args:
        manifest: The file's manifest.
        name: The model's name.
    """
    file = manifest.files[0].name
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0", f'default_model_filename: "{file}"']
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in tensor.shape)
            lines.append(
                f'{kind} {{ name: "{tensor.name}" data_type: {_TRITON_TYPES[tensor.dtype]} dims: [ {sizes} ] }}'
            )
    # Triton's default for a CPU is two instances, each with the weights of the encoder.
    return "\n".join([*lines, "instance_group { kind: KIND_CPU count: 1 }", ""])


def write_triton_repository(file: Path, repository: Path, *, force: bool) -> Path:
    """Writes a model to a Triton model repository: config.pbtxt, the file, its weights and its manifest.

    Args:
        file: An exported ONNX file.
        repository: Folder of the model repository; the model gets the file's name.
        force: Whether an existing model may be replaced.

    Returns:
        The model's folder.

    Raises:
        ArtifactError: The file has changed since its export.
        FileExistsError: The model exists and may not be replaced.
        ValueError: The file is not an ONNX file.
    """
    manifest = Manifest.load(file)
    if manifest.format != "onnx":
        raise ValueError(f"{file.name} is an engine: a model repository is made of its ONNX file")
    load_graph(file, manifest)
    if domains := _foreign_operators(manifest):
        raise ValueError(
            f"{file.name} has {', '.join(domains)}, which Triton's ONNX Runtime cannot run: build its engine (mmtok "
            "export engine) and serve that by Triton's TensorRT backend"
        )
    if repository.exists() and not repository.is_dir():
        raise FileExistsError(f"{repository} is no folder: choose another --repository")
    model = repository / file.stem
    if model.exists() and not force:
        raise FileExistsError(f"{model} is there already: choose another --repository, or --force to replace it")
    version = model / "1"
    version.mkdir(parents=True, exist_ok=True)
    for name in [each.name for each in manifest.files] + [Manifest.path_of(file).name]:
        shutil.copyfile(file.with_name(name), version / name)
    (model / "config.pbtxt").write_text(triton_config(manifest, file.stem), encoding="utf-8")
    return model
