"""Messages that somebody with write access to the broker could forge; workers must drop each without any effect."""

import base64
import json
import os
from typing import Any


def forged_messages(job_ids: list[str], doorbell: bytes | None) -> list[bytes]:
    """What somebody with write access to the broker could send: pickle, unknown tasks, foreign ids, bulk, rubbish."""

    def message(task: str, body: str, content_type: str = "application/json", encoding: str = "utf-8") -> bytes:
        properties = {
            "correlation_id": "forged",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "gpu"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": os.urandom(8).hex(),
        }
        headers = {"lang": "py", "task": task, "id": os.urandom(8).hex(), "root_id": None, "parent_id": None}
        return json.dumps(
            {
                "body": body,
                "content-encoding": encoding,
                "content-type": content_type,
                "headers": headers,
                "properties": properties,
            }
        ).encode()

    def coded(value: Any) -> str:
        return base64.b64encode(json.dumps(value).encode()).decode()

    arguments = [[[job_id], {"job_id": job_id, "token": 1}, {}] for job_id in job_ids] or [[["x"], {}, {}]]
    pickled = base64.b64encode(b"cos\nsystem\n(S'touch /tmp/forged'\ntR.").decode()
    return [
        message("jobs.tasks.train", pickled, "application/x-python-serialize", "binary"),
        message("os.system", coded([["id"], {}, {}])),
        message("jobs.tasks.nothing_like_it", coded([[], {}, {}])),
        *[message("jobs.tasks.train", coded(value)) for value in arguments],
        message("jobs.tasks.generate", coded([["x" * 300_000], {}, {}])),
        message("jobs.tasks.generate", "this is not base64 of JSON"),
        *([doorbell] if doorbell else []),
    ]
