"""What the benchmarks of the dispatcher start with `celery -A tests.benchmarks._light_worker worker`: the real app,
configuration and worker life, with the bodies of `_light_tasks` and without torch.
"""

import sys
from types import ModuleType, SimpleNamespace

_runtime = ModuleType("gpu_worker.runtime")
vars(_runtime)["start"] = lambda settings, warm: SimpleNamespace(pool=SimpleNamespace(fingerprints=lambda: []))
vars(_runtime)["free_memory"] = lambda: None
# In the place of the modules that load torch, before anything imports them.
for _name in ("gpu_worker.training", "gpu_worker.generation"):
    sys.modules[_name] = ModuleType(_name)
sys.modules["gpu_worker.runtime"] = _runtime

from lorasite.celery import app as app  # noqa: E402 - the stand-ins come first

app.conf.imports = ["tests.benchmarks._light_tasks"]
