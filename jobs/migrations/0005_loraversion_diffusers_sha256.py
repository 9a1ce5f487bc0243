"""The file for diffusers, beside the two formats that a version had."""

import django.core.validators
from django.db import migrations

import jobs.models.record


class Migration(migrations.Migration):
    dependencies = [("jobs", "0004_imported_loras")]

    operations = [
        migrations.AddField(
            model_name="loraversion",
            name="diffusers_sha256",
            field=jobs.models.record.Sha256Field(
                blank=True,
                help_text="pytorch_lora_weights.safetensors of diffusers.",
                max_length=64,
                null=True,
                validators=[
                    django.core.validators.RegexValidator("^[0-9a-f]{64}$", "must be 64 lowercase hex digits")
                ],
            ),
        ),
    ]
