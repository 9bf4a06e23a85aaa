# Three images out of one tree; none runs as root, and each runs with a read-only root. See docs/deploying.md.
#
#   docker build --target serve     -t ensemerge:serve .        the server, on the processor; no torch
#   docker build --target serve-gpu -t ensemerge:serve-gpu .    the server, on an NVIDIA GPU; no torch
#   docker build --target workshop  -t ensemerge:workshop .     export, build: with torch
#
# Base images are arguments, so that a mirror's name or a digest can take their place.
ARG PYTHON_IMAGE=python:3.12-slim-trixie
# The CUDA major must be the one that onnxruntime-gpu was linked with. 1.31 loads libcudart.so.13 and libcublas.so.13
# and asks for cuDNN 9 (its extras `cuda` and `cudnn` say the same); up to 1.26 it was CUDA 12. Raise the two together:
# ONNX Runtime that finds no CUDA falls back to the processor.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04
ARG ONNXRUNTIME_GPU=1.31.1


# The wheel. `.dockerignore` lets through what it is made of and no more.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .


# Each environment is made where pip is, and copied without it to an image that only runs.
FROM wheel AS serve-environment
RUN python3 -m venv --without-pip /opt/ensemerge \
    && set -- /dist/*.whl \
    && python3 -m pip --python /opt/ensemerge install --no-cache-dir --constraint constraints.txt "$1[server]"

FROM wheel AS workshop-environment
# An index of smaller builds of torch, such as its builds for processors only. Without it torch brings CUDA: gigabytes.
ARG TORCH_INDEX=""
RUN python3 -m venv --without-pip /opt/ensemerge \
    && set -- /dist/*.whl \
    && python3 -m pip --python /opt/ensemerge install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$1[workshop]"

# Made on the CUDA image itself: an environment belongs to the Python that made it, and this one is Ubuntu's 3.12.
FROM ${CUDA_IMAGE} AS cuda
# DL3008: Ubuntu's archive drops a version when the next one comes, so that a pinned one breaks the build within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*

FROM cuda AS serve-gpu-environment
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY --from=wheel /dist /dist
COPY constraints.txt .
ARG ONNXRUNTIME_GPU
RUN python3 -m venv --without-pip /opt/ensemerge \
    && set -- /dist/*.whl \
    && python3 -m pip --python /opt/ensemerge install --no-cache-dir --constraint constraints.txt \
        "$1[server-gpu]" "onnxruntime-gpu==$ONNXRUNTIME_GPU"


FROM ${PYTHON_IMAGE} AS workshop
COPY --from=workshop-environment /opt/ensemerge /opt/ensemerge
# HOME is for what libraries cache: the user has no other. ONNX Runtime sends telemetry unless it is told not to (since
# 1.29 on Linux too): an identity of the machine, the names of models.
ENV PATH=/opt/ensemerge/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HOME=/tmp
USER 65532:65532
WORKDIR /models
HEALTHCHECK NONE
ENTRYPOINT ["ensemerge"]
CMD ["--help"]


FROM cuda AS serve-gpu
COPY --from=serve-gpu-environment /opt/ensemerge /opt/ensemerge
RUN install --directory --owner=65532 --group=65532 /state
# /state is all that is written: SQLite sorts in TMPDIR what memory does not hold, and telemetry, which would write into
# HOME too, is off as above. Without a GPU this image should fail, not answer slowly: ENSEMERGE_DEVICE=auto if it may.
ENV PATH=/opt/ensemerge/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    ENSEMERGE_DEVICE=cuda \
    ENSEMERGE_STATE=/state \
    HOME=/state \
    TMPDIR=/state
USER 65532:65532
VOLUME /state
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python3", "-c", "import http.client, os, sys; probe = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('ENSEMERGE_HTTP_PORT', '8000')), timeout=3); probe.request('GET', '/healthz'); reply = probe.getresponse(); reply.read(); sys.exit(reply.status != 200)"]
ENTRYPOINT ["ensemerge", "serve", "/models", "--host", "0.0.0.0"]


# Last, so that a build without --target gives it. It runs as `serve-gpu` does, but for the device: a test compares.
FROM ${PYTHON_IMAGE} AS serve
COPY --from=serve-environment /opt/ensemerge /opt/ensemerge
RUN install --directory --owner=65532 --group=65532 /state
ENV PATH=/opt/ensemerge/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    ENSEMERGE_STATE=/state \
    HOME=/state \
    TMPDIR=/state
USER 65532:65532
VOLUME /state
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python3", "-c", "import http.client, os, sys; probe = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('ENSEMERGE_HTTP_PORT', '8000')), timeout=3); probe.request('GET', '/healthz'); reply = probe.getresponse(); reply.read(); sys.exit(reply.status != 200)"]
ENTRYPOINT ["ensemerge", "serve", "/models", "--host", "0.0.0.0"]
