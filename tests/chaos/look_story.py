"""The story of a request whose owner looks at it while it is drawn; what is left of its looks is swept."""

from tests.chaos.scenarios import person, picture_is_right


def tell() -> None:
    """A request with a preview after each step, and the sweep of earlier ones."""
    from jobs.garbage import garbage_sweep
    from jobs.models import BaseModel
    from jobs.submission import generation_submit

    values = {"prompt": "a picture", "seed": 7, "count": 1, "steps": 30, "preview_every_steps": 1}
    base = BaseModel.objects.get(name="base")
    generation_submit(owner=person(), base_model=base, loras=[], values=values, idempotency_key="looked at")
    garbage_sweep()


def check() -> list[str]:
    """The picture is whole, and no look outlives its job."""
    from jobs.models import JobPreview
    from jobs.previews import previews_sweep

    previews_sweep()
    return picture_is_right("looked at") + [f"a look is left: {look}" for look in JobPreview.objects.all()]
