"""A whole site on one machine: Valkey, web, dispatcher and two workers under one supervisor (`manage.py studio`)."""
