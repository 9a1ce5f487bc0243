# Workers with a GPU (`-Q gpu`).
#   docker build -f deploy/gpu.Dockerfile -t lorasite-gpu .
# For machines without a GPU:
#   docker build -f deploy/gpu.Dockerfile -t lorasite-gpu --build-arg BASE=ubuntu:24.04 \
#     --build-arg REQUIREMENTS=gpu.txt --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# The torch wheels bring their own CUDA libraries; the base image only opens the way to the driver.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ghcr.io/astral-sh/uv:0.13.9 AS uv
FROM ${BASE}
ARG REQUIREMENTS=cuda.txt
# Chooses the torch build: PyPI holds the default CUDA build, https://download.pytorch.org/whl/cu... the others.
ARG TORCH_INDEX=https://pypi.org/simple

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    UV_PYTHON_INSTALL_DIR=/opt/python PATH=/opt/venv/bin:$PATH

# Python 3.11, the version that the pins were tried on; Ubuntu's own is another one.
RUN --mount=type=bind,from=uv,source=/uv,target=/usr/local/bin/uv \
    uv python install 3.11 && uv venv --seed --python 3.11 /opt/venv
RUN ["useradd", "--system", "--uid", "10001", "--create-home", "--home-dir", "/home/lorasite", "lorasite"]
RUN ["install", "--directory", "--owner=lorasite", "--group=lorasite", "/data"]

WORKDIR /app
COPY requirements requirements
RUN pip install --index-url ${TORCH_INDEX} --extra-index-url https://pypi.org/simple torch==2.13.0 \
 && pip install -r requirements/${REQUIREMENTS}

COPY manage.py ./
COPY core core
COPY gpu_worker gpu_worker
COPY jobs jobs
COPY lorasite lorasite

ENV DJANGO_SETTINGS_MODULE=lorasite.settings.production LORASITE_DATA=/data OMP_NUM_THREADS=1
USER lorasite
# SIGTERM lets a training save a checkpoint and give its job back; allow 60 s before SIGKILL.
STOPSIGNAL SIGTERM
CMD ["celery", "--quiet", "-A", "lorasite", "worker", "-Q", "gpu", "-n", "gpu@%h", "--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
