"""A request may name a base model whose VAE decodes; what cannot work is refused when it is sent."""

import pytest

from jobs.errors import InvalidInput, NotReady
from jobs.models import BaseModel, Job, User
from jobs.submission import generation_submit
from tests.factories import make_base_model


@pytest.fixture
def base(db: None) -> BaseModel:
    return make_base_model(name="base")


@pytest.fixture
def lender(db: None) -> BaseModel:
    return make_base_model(name="lender")


def _submit(person: User, base: BaseModel, vae: str | None = None) -> Job:
    values = {"prompt": "x"} if vae is None else {"prompt": "x", "vae": vae}
    return generation_submit(owner=person, base_model=base, loras=[], values=values)


def test_a_vae_by_name_or_fingerprint_is_part_of_what_requests_must_share(
    person: User, base: BaseModel, lender: BaseModel
) -> None:
    own, named, exact = (_submit(person, base, vae).batch_key for vae in (None, "lender", lender.fingerprint))
    assert own != named == exact
    lender.fingerprint = "e" * 64  # prepared again
    lender.save()
    assert _submit(person, base, "lender").batch_key not in (own, named)


def test_an_unknown_vae_is_refused_with_those_that_there_are(person: User, base: BaseModel, lender: BaseModel) -> None:
    with pytest.raises(InvalidInput, match=r"vae 'missing' is no base model .* there are: base, lender"):
        _submit(person, base, "missing")
    assert InvalidInput.http_status == 400
    assert not Job.objects.exists()


@pytest.mark.parametrize(("fact", "value"), [("family", "sdxl"), ("latent_channels", 16), ("vae_factor", 8)])
def test_a_vae_with_other_latents_is_refused_with_the_difference(
    person: User, base: BaseModel, lender: BaseModel, fact: str, value: object
) -> None:
    lender.facts[fact] = value
    lender.save()
    with pytest.raises(InvalidInput, match=f"does not fit base model 'base': {fact} is {value}, must be"):
        _submit(person, base, "lender")


def test_the_vae_of_a_base_that_is_not_prepared_is_not_ready(person: User, base: BaseModel) -> None:
    make_base_model(ready=False, name="later")
    with pytest.raises(NotReady, match="'later' is not prepared yet: its VAE cannot be used"):
        _submit(person, base, "later")
