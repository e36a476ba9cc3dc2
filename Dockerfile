# SGLang with MMTok for NVIDIA GPUs: everything in the versions of constraints.txt, each file held against its hash.
#   docker build -t mmtok .
#   docker run --gpus all --ipc=host -p 30000:30000 -v /models:/models mmtok \
#     --model-path /models/Qwen2.5-VL-7B-Instruct --mmtok-budget 10%
# The CUDA of constraints.txt; "devel", since Triton and SGLang compile kernels with its tools.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ffmpeg git libnuma1 make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv

WORKDIR /opt/mmtok

# By itself: a change of the code installs none of it again.
COPY constraints.txt ./
RUN pip install --no-deps --require-hashes -r constraints.txt

# With the tests, which `make gpu-check` runs.
COPY pyproject.toml README.md LICENSE Makefile ./
COPY mmtok_deploy mmtok_deploy
COPY exporters exporters
COPY runtime runtime
COPY bench bench
COPY examples examples
COPY docs docs
COPY tests tests
RUN pip install --no-deps --no-build-isolation -e . && mmtok --help > /dev/null

EXPOSE 30000
HEALTHCHECK --start-period=10m --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:30000/health', timeout=8)"]
ENTRYPOINT ["python", "-m", "sglang.launch_server", "--host=0.0.0.0", "--port=30000"]
