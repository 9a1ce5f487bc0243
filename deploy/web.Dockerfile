# The web tier, the dispatcher and `-Q cpu` workers: no torch, some 300 MB.
#   docker build -f deploy/web.Dockerfile -t lorasite-web .
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN ["useradd", "--system", "--uid", "10001", "--create-home", "--home-dir", "/home/lorasite", "lorasite"]
RUN ["install", "--directory", "--owner=lorasite", "--group=lorasite", "/data"]

WORKDIR /app
COPY requirements/web.txt requirements/web.txt
RUN ["pip", "install", "-r", "requirements/web.txt"]

COPY manage.py ./
COPY core core
COPY gpu_worker gpu_worker
COPY jobs jobs
COPY lorasite lorasite

ENV DJANGO_SETTINGS_MODULE=lorasite.settings.production LORASITE_DATA=/data
USER lorasite
EXPOSE 8000
# Behind a TLS proxy only: the proxy sets X-Forwarded-Proto.
CMD ["uvicorn", "lorasite.asgi:application", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "20"]
