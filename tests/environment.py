"""Environment variables of the tests and of the servers that they start; imported before PyTorch and SGLang.

Tests and servers share the machine's cores, where more threads than cores only wait for one another. The servers import
few of SGLang's 288 models, all of which would take each process 1.7 s of a core.
"""

import importlib.util
import os
from pathlib import Path

_SERVED_MODELS = {
    *("glm4v", "glm4v_moe", "internvl", "llava", "transformers"),
    *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"),
    # Draft models.
    *("llama", "llama_eagle3", "qwen3_5_mtp"),
}

os.environ.setdefault("OMP_NUM_THREADS", "1")
_sglang = importlib.util.find_spec("sglang")
if _sglang is not None and _sglang.origin is not None:
    _models = {path.stem for path in (Path(_sglang.origin).parent / "srt/models").glob("*.py")}
    os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(_models - _SERVED_MODELS)))
