"""Wiring: settings, the Celery app, urls, health. No rules live here."""

from lorasite.celery import app as celery_app

__all__ = ["celery_app"]
