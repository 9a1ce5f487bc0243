"""The web process: `uvicorn lorasite.asgi:application`."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorasite.settings.base")
application = get_asgi_application()
