"""Models whose weights are pages of their files: a skeleton without memory, and safetensors mapped into it.

Called by `core.pipelines`. The mapping is private: a process that writes into a weight gets its own copy of the page,
the file never changes, so that files of a shared cache may be mapped, and forked processes share what nobody writes.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, PreTrainedModel

from core.errors import BaseModelError

SKELETONS_KEPT = 16
"""A few MB each; a process serves few different configurations."""

_skeletons: OrderedDict[tuple[str, str], nn.Module] = OrderedDict()


def map_model(model_class: Any, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a folder that `save_pretrained` wrote, in eval mode, no parameter asking for a gradient.

    Args:
        model_class: Of diffusers or transformers.
        folder: Holds config.json and one safetensors file, which must stay as it is while the model lives (removing
            it is fine).
        dtype: Weights that are stored in it stay pages of the file, others are converted, which takes memory.
        device: Where to put it; the CPU copies nothing.

    Raises:
        BaseModelError: The weights do not fit the configuration.
        OSError, ValueError: A file is missing or damaged.
    """
    config = (folder / "config.json").read_text(encoding="utf-8")
    model = _clone(_skeleton(model_class, config, folder), {})
    (path,) = sorted(folder.glob("*.safetensors"))[:1] or [folder / "model.safetensors"]
    weights = _map_file(path)
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _parameter(weights, f"{prefix}.{name}" if prefix else name, parameter, path)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                key = f"{prefix}.{name}" if prefix else name
                module._buffers[name] = weights.pop(key) if key in weights else buffer.clone()
    if weights:
        raise BaseModelError(f"{path} holds {min(weights)}, which its config.json has no place for")
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    if device.type == "cpu" and all(tensor.dtype == dtype for tensor in tensors):
        return model
    # `to` moves only what is of another dtype or elsewhere: what fits stays a page of the file.
    return model.to(device=device, dtype=dtype)


def _map_file(path: Path) -> dict[str, Tensor]:
    """Tensors that are pages of a safetensors file, which is a header of JSON and then their bytes."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size_bytes:
                raise ValueError(f"its header would end at byte {start} of {size_bytes}")
            header = json.loads(file.read(start - 8))
        storage: Any = torch.UntypedStorage.from_file(str(path), False, size_bytes)  # False: private, not shared
        pages = torch.empty(0, dtype=torch.uint8).set_(storage)
        tensors = {}
        for key, entry in header.items():
            if key != "__metadata__":
                first, end = entry["data_offsets"]
                flat = pages[start + first : start + end].view(_DTYPES[entry["dtype"]])
                tensors[key] = flat.view(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BaseModelError(f"{path} is not a safetensors file ({error!r})") from error


def _parameter(weights: dict[str, Tensor], key: str, wanted: Tensor, path: Path) -> nn.Parameter:
    weight = weights.pop(key, None)
    if weight is None or weight.shape != wanted.shape:
        found = "nothing" if weight is None else f"shape {tuple(weight.shape)}"
        raise BaseModelError(f"{path} has {found} for {key}, its config.json asks for {tuple(wanted.shape)}")
    return nn.Parameter(weight, requires_grad=False)


def _skeleton(model_class: Any, config: str, folder: Path) -> nn.Module:
    """The model without weights; built once per configuration, since building takes longer than mapping."""
    key = (model_class.__name__, config)
    if key not in _skeletons:
        with torch.device("meta"), _Uninitialised():
            if issubclass(model_class, PreTrainedModel):
                model = model_class(CLIPTextConfig(**json.loads(config)))
            else:
                model = model_class.from_config(model_class.load_config(folder, local_files_only=True))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = _known_buffer(name, buffer, model_class)
        _skeletons[key] = model.eval().requires_grad_(False)
        while len(_skeletons) > SKELETONS_KEPT:
            _skeletons.popitem(last=False)
    _skeletons.move_to_end(key)
    return _skeletons[key]


def _known_buffer(name: str, buffer: Tensor, model_class: Any) -> Tensor:
    """Buffers that no file holds."""
    if name != "position_ids":
        raise BaseModelError(f"{model_class.__name__} has a buffer {name!r} that is in no file: it cannot be mapped")
    return torch.arange(buffer.shape[-1], device="cpu").expand(buffer.shape)


def _clone(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A copy with its own modules, hooks and places for weights: 20 times faster than `copy.deepcopy`."""
    if id(module) in done:
        return done[id(module)]
    clone = done[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        # What is neither a container nor a module (configurations, processors) is the same for all clones.
        clone.__dict__[name] = value.__class__(value) if value.__class__ in _CONTAINERS else value
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else _clone(child, done)
    return clone


class _Uninitialised(TorchFunctionMode):
    """Leaves out the random initialisation of weights that are replaced anyway. For this thread only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_INITIALISERS: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch.nn.init, name)
    for name in ("kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_", "trunc_normal_", "xavier_uniform_")
) | frozenset((torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.fill_, torch.Tensor.zero_))
