# syntax=docker/dockerfile:1
# A server of the checkpoint that comes with the package: docker build -t unihema . && docker run --read-only --tmpfs /tmp -p 8000:8000 unihema
# With CUDA: docker build --build-arg DEVICE=cuda -t unihema:cuda . && docker run --gpus all ... unihema:cuda

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# cpu, or cuda: the build of PyTorch that PyPI has for Linux.
ARG DEVICE=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/unihema
ENV PATH=/opt/unihema/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Before the sources, so that a change of them does not fetch it anew. The bounds are those of setup.py.
# hadolint ignore=DL3013
RUN if [ "$DEVICE" = cpu ]; then pip install --index-url "$TORCH_INDEX" "torch>=2.8,<3" "torchvision>=0.23,<1"; fi
COPY . .
# hadolint ignore=DL3013
RUN pip install ".[serve,slides,onnx,shapes]" && \
    python -c "from unihema.shipped import lay_down_checkpoint; lay_down_checkpoint('/opt/models/unihema')"

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt /opt
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent unihema
# What is downloaded, compiled or uploaded goes to /tmp, the only place that has to be writable. Many threads are not to keep
# freed memory each for itself.
ENV PATH=/opt/unihema/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor TRITON_CACHE_DIR=/tmp/triton \
    MALLOC_ARENA_MAX=2
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["unihema"]
CMD ["serve", "/opt/models/unihema", "--host", "0.0.0.0"]
