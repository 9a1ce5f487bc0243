"""Samplers and schedules under the names that AUTOMATIC1111 WebUI and its clients use, both ways.

Called by `core.config` (what people send) and `core.image_files` (what is written into pictures).
"""

from typing import Any

WEBUI_NAMES: dict[str, str] = {
    "default": "Default",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "unipc": "UniPC",
    "lcm": "LCM",
}
"""Of each sampler."""

WEBUI_SCHEDULES: dict[str, str] = {
    "default": "Default",
    "automatic": "Automatic",
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
}
"""Of each schedule."""

# Names of k-diffusion, which clients send too, and what WebUI calls the same thing.
_OTHER_SAMPLERS = {"k_euler": "euler", "k_euler_a": "euler_a", "k_heun": "heun", "k_lms": "lms", "k_dpm_2": "dpm2"}
_OTHER_SAMPLERS |= {"k_dpm_2_a": "dpm2_a", "k_dpmpp_2m": "dpmpp_2m", "k_dpmpp_sde": "dpmpp_sde"}
_SAMPLERS = {webui.lower(): name for name, webui in WEBUI_NAMES.items()} | _OTHER_SAMPLERS
_SCHEDULES = {webui.lower(): name for name, webui in WEBUI_SCHEDULES.items()} | {"normal": "uniform"}


def understand_webui_names(values: dict[str, Any]) -> dict[str, Any]:
    """A request with its `sampler` and `schedule` under their own names.

    Args:
        values: Of a request; "DPM++ 2M Karras", as WebUI before 1.9 wrote it, names both. What is not known stays as
            it is, for the field's own check to refuse.
    """
    sampler, schedule = values.get("sampler"), values.get("schedule")
    named: dict[str, Any] = {}
    if isinstance(schedule, str):
        named["schedule"] = _SCHEDULES.get(schedule.lower(), schedule)
    if isinstance(sampler, str):
        plain, _, last = sampler.lower().rpartition(" ")
        if sampler.lower() in _SAMPLERS:
            named["sampler"] = _SAMPLERS[sampler.lower()]
        elif plain in _SAMPLERS and last in ("karras", "exponential"):
            named["sampler"] = _SAMPLERS[plain]
            if schedule is None or named.get("schedule") in ("default", "automatic"):
                named["schedule"] = last
    return values | named
