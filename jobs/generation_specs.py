"""From what a request says to what a worker is told: styles, LoRAs named in the prompt, pictures to begin from.

Called by `jobs/submission.py`; writes nothing.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from django.db.models import Q

from core.config import GenerateConfig
from core.prompt_syntax import parse_prompt
from jobs.errors import InvalidInput, NotFound, NotReady
from jobs.models import BaseModel, DatasetImage, GeneratedImage, InputImage, LoraVersion, Style, User
from jobs.queries import loras_visible_to

PLACEHOLDER = "{prompt}"
NAMES_SHOWN = 20

Uses = Sequence[tuple[LoraVersion, float]]
"""LoRA versions with their weights."""


def read_prompts(
    *, owner: User, base_model: BaseModel, loras: Uses, values: dict[str, Any], styles: Sequence[str] = ()
) -> tuple[dict[str, Any], Uses]:
    """Apply styles, then take `<lora:name:weight>` out of the prompt.

    Args:
        loras: Named by id.
        values: Fields of `GenerateConfig`.
        styles: Names of the owner's styles, applied in their order.

    Returns:
        The values with the prompts as the text encoder gets them, and all LoRAs, those of the prompt last.

    Raises:
        core.errors.ConfigError: A prompt uses what is not served.
        NotFound: No such style.
        InvalidInput: No such LoRA, or several of that name; says which there are.
        NotReady: A LoRA has no version yet.
    """
    texts = {name: str(values.get(name) or "") for name in ("prompt", "negative_prompt")}
    for style in _styles(owner, styles):
        texts = {name: styled(text, getattr(style, name)) for name, text in texts.items()}
    prompt, negative = parse_prompt(texts["prompt"]), parse_prompt(texts["negative_prompt"])
    if negative.loras:
        raise InvalidInput(f"name LoRA {negative.loras[0][0]!r} in the prompt, not in the negative prompt")
    named = [(_version_named(owner, base_model, name), weight) for name, weight in prompt.loras]
    changed = {"prompt": prompt.text, "negative_prompt": negative.text}
    return {**values, **{name: text for name, text in changed.items() if name in values or text}}, [*loras, *named]


def styled(prompt: str, template: str) -> str:
    """A prompt with a style, as WebUI's `merge_prompts`: in place of `{prompt}`, else behind a comma."""
    if PLACEHOLDER in template:
        return template.replace(PLACEHOLDER, prompt)
    return ", ".join(part for part in (prompt.strip(), template.strip()) if part) if template.strip() else prompt


def picture_sha256(owner: User, picture_id: UUID) -> str:
    """The hash of a picture that this person may begin from: uploaded for it, of a dataset, or generated.

    Raises:
        NotFound: None of theirs has this id.
    """
    for model in (InputImage, GeneratedImage, DatasetImage):
        found: str | None = model.objects.owned_by(owner).filter(pk=picture_id).values_list("sha256", flat=True).first()
        if found is not None:
            return found
    raise NotFound(f"there is no picture {picture_id} among your uploaded, generated and dataset pictures")


def vae_lender(base_model: BaseModel, wanted: str | None) -> BaseModel | None:
    """The base model whose VAE is to decode instead of the model's own; None where that is not asked for.

    Args:
        base_model: Prepared.
        wanted: Name or fingerprint.

    Raises:
        InvalidInput: No base model is called so, or its VAE has latents of another kind.
        NotReady: It is not prepared.
    """
    if wanted is None:
        return None
    lender = BaseModel.objects.filter(Q(name=wanted) | (Q(fingerprint=wanted) & ~Q(fingerprint=""))).first()
    if lender is None:
        names = BaseModel.objects.ready().values_list("name", flat=True)
        raise InvalidInput(f"vae {wanted!r} is no base model whose VAE could be used; there are: {_listed(names)}")
    if not lender.fingerprint:
        raise NotReady(f"base model {lender.name!r} is not prepared yet: its VAE cannot be used")
    own, other = base_model.base_facts(), lender.base_facts()
    for fact in ("family", "latent_channels", "vae_factor"):
        if getattr(own, fact) != getattr(other, fact):
            raise InvalidInput(
                f"the VAE of {lender.name!r} does not fit base model {base_model.name!r}: {fact} is "
                f"{getattr(other, fact)}, must be {getattr(own, fact)}"
            )
    return lender


def pictures_read(config: GenerateConfig) -> list[str]:
    """Hashes of the pictures that the worker will read."""
    return [sha256 for sha256 in (config.init_image, config.mask) if sha256]


def _styles(owner: User, names: Sequence[str]) -> list[Style]:
    found = {style.name: style for style in Style.objects.owned_by(owner).filter(name__in=names)}
    for name in names:
        if name not in found:
            mine = Style.objects.owned_by(owner).values_list("name", flat=True)
            raise NotFound(f"you have no style {name!r}; yours are: {_listed(mine)}")
    return [found[name] for name in names]


def _version_named(owner: User, base_model: BaseModel, name: str) -> LoraVersion:
    """The newest version of a LoRA by name: the person's own before public ones."""
    visible = loras_visible_to(owner).filter(base_model=base_model)
    candidates = list(visible.filter(name=name))
    mine = [lora for lora in candidates if lora.owner_id == owner.pk]
    if not candidates:
        names = visible.order_by("name").values_list("name", flat=True).distinct()
        raise InvalidInput(
            f"the prompt names LoRA {name!r}, which is neither yours nor public for base model {base_model.name!r}; "
            f"there are: {_listed(names)}"
        )
    if len(mine or candidates) > 1:
        people = _listed(lora.owner.username for lora in candidates)
        raise InvalidInput(
            f"the prompt names LoRA {name!r}, and several people share one of that name ({people}): "
            "name it by its id in `loras`"
        )
    lora = (mine or candidates)[0]
    version: LoraVersion | None = lora.versions.select_related("lora__base_model").order_by("-number").first()
    if version is None:
        raise NotReady(f"LoRA {name!r} has no version yet: wait for its training to succeed")
    return version


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:NAMES_SHOWN]) or "none so far"
