"""Exports the selection as an ONNX graph, checked against the reference, and runs it by ONNX Runtime.

python examples/export_and_run.py --output selection.onnx
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("selection.onnx"), help="of the graph (default %(default)s)")
output = parser.parse_args().output

export = ["export", "selection", "--preset", "llava-1.5", "--tokens", "576", "--budget", "64", "--dtype", "float32"]
subprocess.run([sys.executable, "-m", "mmtok_deploy", *export, "--output", output], check=True)

rng = np.random.default_rng(0)
inputs = {
    "vision": rng.standard_normal((1, 576, 4096), dtype=np.float32),
    "keys": rng.standard_normal((1, 576, 1024), dtype=np.float32),
    "text": rng.standard_normal((1, 12, 4096), dtype=np.float32),
    "text_mask": np.ones((1, 12), dtype=bool),
    "excluded": np.zeros((1, 576), dtype=bool),
}
session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
kept, visual_tokens = session.run(["kept", "visual_tokens"], inputs)
print("kept:", kept[0, :8], "...")
print("tokens for the language model:", visual_tokens.shape)
