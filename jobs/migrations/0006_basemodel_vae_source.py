"""A base model may take its VAE from elsewhere."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("jobs", "0005_loraversion_diffusers_sha256")]

    operations = [
        migrations.AddField(
            model_name="basemodel",
            name="vae_source",
            field=models.CharField(
                blank=True,
                db_default="",
                default="",
                help_text="Folder or hub id whose VAE takes the place of the base's own. Empty: its own.",
                max_length=500,
                verbose_name="VAE source",
            ),
        ),
        migrations.AlterField(
            model_name="basemodel",
            name="source",
            field=models.CharField(
                help_text="Folder on the worker nodes, or a hub id (owner/model or owner/model@revision).",
                max_length=500,
            ),
        ),
    ]
