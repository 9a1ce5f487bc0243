"""The story of a LoRA file from elsewhere: uploaded, judged against a base, generated with."""

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def tell() -> None:
    """Upload a file for the real small base."""
    import numpy as np
    from safetensors.numpy import save

    from jobs.lora_imports import lora_import_submit
    from jobs.models import BaseModel
    from tests.chaos.scenarios import person
    from tests.factories import lora_file

    ones = np.ones((2, 32), dtype=np.float32)
    content = save({f"{LAYER}.lora_down.weight": ones, f"{LAYER}.lora_up.weight": np.ascontiguousarray(ones.T)})
    lora_import_submit(
        owner=person(),
        base_model=BaseModel.objects.get(name="tiny"),
        lora_name="brought",
        file=lora_file("brought.safetensors", content),
        idempotency_key="import",
    )


def check() -> list[str]:
    """One version, made once."""
    from jobs.models import LoraImport, LoraVersion

    versions = list(LoraVersion.objects.filter(lora__name="brought"))
    linked = LoraImport.objects.filter(lora_version__in=versions).count()
    if len(versions) == linked == 1 and versions[0].facts["source"] == "imported":
        return []
    return [f"{len(versions)} versions came of one import, {linked} of them linked"]
