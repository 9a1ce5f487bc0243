"""`manage.py base`: registering is harmless to repeat, and refuses in sentences."""

from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from jobs.models import BaseModel, Job, User
from jobs.status import JobKind, JobState


@pytest.fixture
def operator(db: None) -> User:
    return User.objects.create_superuser("first-operator")


def base(*arguments: str) -> str:
    out = StringIO()
    call_command("base", *arguments, stdout=out)
    return out.getvalue()


def test_adding_registers_the_folder_and_submits_its_preparation(operator: User, tmp_path: Path) -> None:
    said = base("add", str(tmp_path), "--name", "tiny", "--warm")
    row = BaseModel.objects.get(name="tiny")
    assert (row.source, row.keep_warm) == (str(tmp_path.resolve()), True)
    assert row.job is not None
    assert (row.job.kind, row.job.state, row.job.owner) == (JobKind.PREPARE_BASE, JobState.QUEUED, operator)
    assert str(row.job.pk) in said


def test_a_relative_folder_is_kept_as_an_absolute_one(
    operator: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    base("add", "model", "--name", "tiny")
    assert BaseModel.objects.get().source == str((tmp_path / "model").resolve())


def test_adding_again_changes_nothing_but_may_make_it_warm(operator: User, tmp_path: Path) -> None:
    base("add", str(tmp_path), "--name", "tiny")
    assert "registered already (preparation queued)" in base("add", str(tmp_path), "--name", "tiny", "--warm")
    assert Job.objects.count() == 1
    assert BaseModel.objects.get().keep_warm


def test_adding_again_after_a_failed_preparation_submits_it_again(operator: User, tmp_path: Path) -> None:
    base("add", str(tmp_path), "--name", "tiny")
    first = Job.objects.get()
    Job.objects.update(
        state=JobState.FAILED, error_code="base_model", error_message="no unet", finished_at=first.created_at
    )
    assert "preparation failed: no unet" in base("list")
    assert "submitted again" in base("add", str(tmp_path), "--name", "tiny")
    assert BaseModel.objects.get().job != first


def test_another_source_under_the_same_name_is_refused_and_leaves_no_job(operator: User, tmp_path: Path) -> None:
    base("add", str(tmp_path), "--name", "tiny")
    with pytest.raises(CommandError, match="is registered with source"):
        base("add", "someone/sd15", "--name", "tiny")
    assert Job.objects.count() == 1


def test_without_a_superuser_it_says_how_to_make_one(db: None) -> None:
    with pytest.raises(CommandError, match=r"manage\.py createsuperuser"):
        base("add", "someone/sd15", "--name", "tiny")
    assert not BaseModel.objects.exists()


def test_the_list_says_when_there_is_nothing(db: None) -> None:
    assert "no base models yet" in base("list")


def test_the_first_operator_is_made_once_and_keeps_a_changed_password(
    db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_SUPERUSER_PASSWORD", "generated-password")

    def first_operator() -> str:
        out = StringIO()
        call_command("first_operator", stdout=out)
        return out.getvalue().strip()

    assert [first_operator(), first_operator()] == ["made", "kept"]
    user = User.objects.get(username="admin")
    assert user.is_superuser
    user.set_password("chosen-password")
    user.save()
    assert first_operator() == "kept, with another password"
    assert User.objects.get(username="admin").check_password("chosen-password")


def test_the_name_is_the_last_part_of_the_source_where_none_is_given(operator: User, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()

    assert base("add", str(tmp_path / "my-model")).startswith("my-model: registered")


def test_warm_and_unwarm_change_the_row_and_an_unknown_name_is_refused(operator: User, tmp_path: Path) -> None:
    base("add", str(tmp_path), "--name", "tiny")
    assert "warm" in base("warm", "tiny")
    assert BaseModel.objects.get(name="tiny").keep_warm
    base("unwarm", "tiny")
    assert not BaseModel.objects.get(name="tiny").keep_warm
    with pytest.raises(CommandError, match="there is no base model 'other'"):
        base("warm", "other")


def test_waiting_for_a_base_that_is_ready_ends_at_once(operator: User, tmp_path: Path) -> None:
    base("add", str(tmp_path), "--name", "tiny")
    BaseModel.objects.filter(name="tiny").update(fingerprint="f" * 64)
    assert "ready ffffffffffff" in base("add", str(tmp_path), "--name", "tiny", "--wait")


def test_a_base_may_take_its_vae_from_elsewhere(operator: User, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    base("add", "owner/sd15", "--vae", str(tmp_path / "vae" / ".." / "vae"), "--name", "tiny")
    row = BaseModel.objects.get(name="tiny")
    assert row.vae_source == str((tmp_path / "vae").resolve())
    assert row.job is not None
    assert row.job.spec == {"source": "owner/sd15", "vae_source": row.vae_source}
    with pytest.raises(CommandError, match=r"is registered with .*vae: choose another --name"):
        base("add", "owner/sd15", "--name", "tiny")


def test_a_base_that_is_ready_is_prepared_again_when_asked(operator: User, tmp_path: Path) -> None:
    base("add", str(tmp_path), "--name", "tiny")
    first = Job.objects.get()
    with pytest.raises(CommandError, match="is being prepared already"):
        base("prepare", "tiny")
    Job.objects.update(state=JobState.SUCCEEDED, finished_at=first.created_at)
    BaseModel.objects.update(fingerprint="f" * 64)
    assert "tiny: submitted again, preparation is job" in base("prepare", "tiny")
    assert BaseModel.objects.get().job != first
    assert "ready ffffffffffff, preparation queued" in base("list")
    with pytest.raises(CommandError, match="there is no base model 'other'"):
        base("prepare", "other")
