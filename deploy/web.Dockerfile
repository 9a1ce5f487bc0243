# The web tier, the dispatcher and `-Q cpu` workers: no torch.
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
# Static files need no real secret; this key ends with the line. A volume over /data hides them: run collectstatic there.
RUN LORASITE_SECRET_KEY="$(python -c 'import secrets; print(secrets.token_urlsafe(64))')" \
    python manage.py collectstatic --noinput --verbosity 0
EXPOSE 8000
# LORASITE_ALLOWED_HOSTS must hold "localhost". Turn it off where this image runs something else than the web process.
HEALTHCHECK --interval=15s --timeout=6s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/healthz', timeout=5)"]
# Behind a TLS proxy only: the proxy sets X-Forwarded-Proto.
CMD ["uvicorn", "lorasite.asgi:application", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "20"]
