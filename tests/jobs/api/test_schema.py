"""The OpenAPI document is complete and clean, and the documentation page loads nothing from elsewhere."""

import json
import re
from typing import Any

import pytest
from django.contrib.staticfiles import finders
from django.core.management import call_command
from django.test import Client

from jobs.api.urls import v1


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    response = Client().get("/api/schema/", {"format": "json"})
    assert response.status_code == 200
    loaded: dict[str, Any] = json.loads(response.content)
    return loaded


def test_the_schema_is_valid_and_without_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("spectacular", validate=True, fail_on_warn=True)
    assert "openapi: 3.1.0" in capsys.readouterr().out


def test_every_route_is_documented_with_its_errors(document: dict[str, Any]) -> None:
    assert len(document["paths"]) == len(v1)
    ids = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            ids.append(operation["operationId"])
            responses = operation["responses"]
            errors = {status for status in responses if status >= "400"}
            assert errors >= {"401", "500"} | ({"404"} if "{" in path else set()), (path, method)
            assert not {"400", "409"} - errors or method in ("get", "delete"), (path, method)
            for status in errors:
                schema = responses[status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}
            assert {"apiKey": []} in operation["security"]
    assert len(ids) == len(set(ids))


def test_bodies_are_described_by_the_configuration_classes(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["PreprocessConfigRequest"]["properties"]["resolution"]["maximum"] == 2048
    assert schemas["TrainConfig"]["properties"]["rank"]["description"].startswith("Rank r of the LoRA")
    assert schemas["TrainConfig"]["additionalProperties"] is False
    generation = schemas["GenerationInputRequest"]["properties"]
    assert {"base_model", "loras", "prompt", "clip_skip", "sampler", "width"} <= set(generation)
    assert set(schemas["LoraChoice"]["properties"]) == {"lora", "weight"}


def test_jobs_are_202_with_a_location_and_take_an_idempotency_key(document: dict[str, Any]) -> None:
    for path in ("/api/v1/trainings/", "/api/v1/generations/", "/api/v1/datasets/{dataset_id}/preprocess/"):
        operation = document["paths"][path]["post"]
        assert "Location" in operation["responses"]["202"]["headers"]
        assert "422" in operation["responses"]
        assert "Idempotency-Key" in [parameter["name"] for parameter in operation["parameters"]]


def test_uploads_are_multipart_and_downloads_are_binary(document: dict[str, Any]) -> None:
    upload = document["paths"]["/api/v1/datasets/{dataset_id}/images/"]["post"]
    assert list(upload["requestBody"]["content"]) == ["multipart/form-data"]
    file = document["paths"]["/api/v1/images/{image_id}/file/"]["get"]
    assert file["responses"]["200"]["content"]["image/png"]["schema"]["format"] == "binary"


def test_the_docs_page_needs_no_login_no_cdn_and_no_inline_script() -> None:
    page = Client().get("/api/docs/")
    html = page.content.decode()
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert sources and all(source.startswith("/") for source in sources), sources
    assert not re.findall(r"<script[^>]*>\s*[^<\s]", html)
    script = Client().get(next(source for source in sources if "script" in source))
    assert script["Content-Type"].startswith("application/javascript")
    assert "/api/schema/" in script.content.decode()
    for source in sources:
        if source.startswith("/static/"):
            assert finders.find(source.removeprefix("/static/")), source
