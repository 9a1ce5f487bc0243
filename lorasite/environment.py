"""All settings that come from the environment, typed; a wrong one is reported with all others at once.

Read by `lorasite/settings/*`. Every variable starts with `LORASITE_`, e.g. `LORASITE_DATABASE_URL`.
"""

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

REPOSITORY = Path(__file__).resolve().parent.parent


class Environment(BaseSettings):
    """One field per variable. `manage.py check` and `deploy/env.example` show the same names."""

    model_config = SettingsConfigDict(env_prefix="LORASITE_", extra="ignore")

    data: Path = Field(
        REPOSITORY / "var", description="Folder of everything that one machine keeps: database, files, caches."
    )
    secret_key: SecretStr = Field(
        SecretStr(""), description="Django's secret. Required in production, 50 characters or more."
    )
    debug: bool = Field(False, description="Django's debug pages. Never on a machine that others reach.")
    allowed_hosts: list[str] = Field(
        ["localhost", "127.0.0.1", "[::1]"], description="Host names of the site, as a JSON list."
    )
    csrf_trusted_origins: list[str] = Field([], description="Origins behind a TLS proxy, as a JSON list.")
    database_url: str = Field("", description="postgres://user:password@host:5432/name. Empty: SQLite under `data`.")
    broker_url: SecretStr = Field(
        SecretStr(""),
        description="redis://:password@host:6379/0. For dispatcher and workers only, never for the web tier.",
    )
    storage: Literal["local", "s3"] = Field("local", description="Where artifacts live.")
    s3_bucket: str = Field("", description="Bucket of the artifacts (storage=s3).")
    s3_endpoint_url: str = Field("", description="Empty: AWS.")
    s3_region: str = Field("us-east-1", description="Region of the bucket.")
    s3_access_key: SecretStr = Field(SecretStr(""), description="Empty: the machine's own role.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Belongs to `s3_access_key`.")
    lease_seconds: float = Field(
        30.0, ge=1, le=600, description="A job whose worker is silent this long is given to another."
    )
    generate_lease_seconds: float = Field(
        12.0, ge=1, le=600, description="The same for generations, which somebody waits for; never more than the above."
    )
    heartbeat_seconds: float = Field(
        2.0, ge=0.1, le=60, description="Between two renewals; at most a third of the lease."
    )
    dispatch_seconds: float = Field(
        0.25, ge=0.05, le=10, description="Between two looks of the dispatcher at the database."
    )
    drain_seconds: float = Field(
        600.0, ge=1, le=3600, description="A doorbell's task claims work for at most this long."
    )
    step_seconds: float = Field(
        120.0, ge=1, le=3600, description="A job without any step for this long is stuck: its process is replaced."
    )
    generate_time_limit_seconds: float = Field(
        3600.0, ge=1, le=86_400, description="Longest that one generation may compute, all tries together."
    )
    train_time_limit_seconds: float = Field(
        172_800.0, ge=60, le=2_592_000, description="Longest that one training may compute, all tries together."
    )
    queue_seconds: float = Field(
        604_800.0, ge=60, le=31_536_000, description="A job that never started in this time expires."
    )
    max_queued_jobs: int = Field(10_000, ge=1, description="Jobs waiting in all; more are refused with 429.")
    max_queued_jobs_per_person: int = Field(50, ge=1, description="Jobs that one person may have waiting.")
    max_queued_seconds_per_person: float = Field(
        86_400.0, ge=60, description="Estimated worker seconds that one person may have waiting."
    )
    max_running_generations_per_person: int = Field(4, ge=1, description="Generations of one person at once.")
    max_running_trainings_per_person: int = Field(1, ge=1, description="Trainings of one person at once.")
    worker_memory_bytes: int = Field(
        0, ge=0, description="A worker process larger than this is replaced between jobs. 0: half of the machine."
    )
    garbage_after_seconds: float = Field(
        86_400.0, ge=60, le=31_536_000, description="Blobs that nothing refers to are removed after this long."
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        description="Files of a worker machine (LoRAs, bases, pictures) that are kept for reuse. 0: half of its disk.",
    )
    upload_max_bytes: int = Field(64 * 2**20, ge=2**20, description="Largest single upload.")
    lora_max_bytes: int = Field(2 * 2**30, ge=2**20, description="Largest LoRA file that people may import.")
    worker_threads: int = Field(
        1, ge=1, le=64, description="Torch threads of a CPU worker; more than 1 only on idle cores."
    )
    pool_size: int = Field(3, ge=1, le=64, description="Base models that a GPU process keeps loaded at once.")
    pool_bytes: int = Field(
        0, ge=0, description="Weights that a GPU process keeps loaded at once; warm bases stay. 0: no limit."
    )
    idle_seconds: float = Field(
        900.0, ge=1, le=604_800, description="A base that is not warm is given back when nobody asked for it so long."
    )
    attention: Literal["sdpa", "xformers", "sliced"] = Field(
        "sdpa",
        description="Attention kernel; xformers where a call proves that it works; sliced where SDPA is not frugal.",
    )
    vae_slicing: Literal["auto", "on", "off"] = Field(
        "auto", description="Decode picture by picture; auto: when memory ran out. Same pictures, to rounding."
    )
    vae_tiling: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Decode large pictures in blended tiles; auto: when memory ran out. Colours shift slightly.",
    )
    channels_last: bool = Field(False, description="Lay convolutions out for tensor cores (CUDA only).")
    torch_compile: bool = Field(False, description="Compile the UNet's blocks at first use (CUDA only; takes minutes).")
    log_format: Literal["console", "json"] = Field("console", description="console for people, json for machines.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Lowest level shown.")

    @field_validator("broker_url")
    @classmethod
    def _broker_is_guarded(cls, url: SecretStr) -> SecretStr:
        """Whoever may write into the broker may ring and read along, so one that others can reach needs a password."""
        parts = urlsplit(url.get_secret_value())
        if parts.hostname not in (None, "localhost", "127.0.0.1", "::1") and not parts.password:
            raise ValueError(
                f"the broker on {parts.hostname} has no password: use {parts.scheme}://:PASSWORD@{parts.hostname}/0"
            )
        return url
