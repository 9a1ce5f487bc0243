"""Whose LoRA file a tensor name comes from, which module it belongs to and which part of the update it is.

Called by the gate, without any ML library. The readers, which make tensors of a file, have their own maps.
"""

import re
from typing import NamedTuple

from core.errors import LoraFileError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    **{
        part: part
        for part in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            "diff",
        )
    },
}
"""What may follow a kohya module's name."""

DOTTED_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
"""What may follow a module's name in PEFT's and diffusers' files, old ones included."""

UNSERVED = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "rescale": "OFT",
    "weight": "IA3",
    "on_input": "IA3",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm1.weight", "bm2.weight"), "GLoRA"),
    "w_norm": "trained norms",
    "b_norm": "trained norms",
    "scale": "a scale of its own",
    "scalar": "a scale of its own",
    "diff_b": "a changed bias",
    "reshape_weight": "a weight of another shape",
}
"""Parts of adapters that we know by name and do not serve."""
UNSERVED_DOTTED = {
    "bundle_emb.": "a textual inversion (bundle_emb)",
    ".ia3_l": "IA3",
    ".oft_r": "OFT",
    ".oft_R.weight": "OFT",
    ".boft_R": "BOFT",
    ".boft_s": "BOFT",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
    ".lora_embedding_A": "LoRA of an embedding",
    ".lora_embedding_B": "LoRA of an embedding",
    ".lora_B.bias": "a changed bias",
    ".hada_w1_a": "LoHa under PEFT's names",
    ".hada_w1_b": "LoHa under PEFT's names",
    ".hada_w2_a": "LoHa under PEFT's names",
    ".hada_w2_b": "LoHa under PEFT's names",
    ".lokr_w1": "LoKr under PEFT's names",
    ".lokr_w1_a": "LoKr under PEFT's names",
    ".lokr_w2": "LoKr under PEFT's names",
    ".lokr_w2_a": "LoKr under PEFT's names",
}
"""Beginnings and ends of names in other tools' files that we know and do not serve."""
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Old diffusers named a text encoder's attention as the UNet's ("self_attn.to_q_lora.down.weight")."""

PEFT_PREFIX = "base_model.model."
SGM_PARTS = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
SGM_SINGLES = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
LAYERS_PER_BLOCK = 2
"""Of SD 1.x and SDXL; the sgm names count through blocks of so many layers and a change of size."""


class LoraKey(NamedTuple):
    """One tensor of a LoRA file.

    Attributes:
        naming: "kohya", "peft" or "diffusers".
        component: "unet", "text_encoder" or "text_encoder_2".
        module: Its name as diffusers' model has it, flat ("down_blocks_0_..._to_q").
        part: "down", "up", "alpha", "mid", "magnitude", or the LyCORIS name.
    """

    naming: str
    component: str
    module: str
    part: str


def read_key(key: str) -> LoraKey:
    """Understand a tensor's name.

    Raises:
        LoraFileError: It belongs to nothing that we serve; says to what, where the name tells.
    """
    for prefix, component in KOHYA_PREFIXES.items():
        if key.startswith(prefix):
            module, _, part = key.removeprefix(prefix).partition(".")
            if not module:
                raise LoraFileError(f"tensor {key} names no module")
            if part not in PARTS:
                kind = UNSERVED.get(part)
                raise LoraFileError(
                    f"tensor {key} is part of {kind}, which is not served"
                    if kind
                    else f"tensor {key} is no part of a LoRA: after the module come {', '.join(PARTS)}"
                )
            return LoraKey("kohya", component, flat_module(component, module), PARTS[part])
    return _dotted(key)


def flat_module(component: str, module: str) -> str:
    """One spelling for a module, whatever file names it: diffusers' names with underscores, without the wrappers that
    some versions of transformers put around a text model."""
    flat = module.replace(".", "_")
    if component == "unet":
        return sgm_to_diffusers(flat)
    return flat.removeprefix("0_transformer_").removeprefix("text_model_")


def sgm_to_diffusers(flat: str) -> str:
    """A flat UNet name in Stability's counting ("input_blocks_4_1_proj_in") as diffusers'; others as they are.

    The counting follows diffusers' `_maybe_map_sgm_blocks_to_diffusers` and kohya's SDXL names.
    """
    if flat in SGM_SINGLES:
        return SGM_SINGLES[flat]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        number, rest = int(match[1]), match[2]
        return f"mid_block_attentions_0_{rest}" if number == 1 else f"mid_block_resnets_{number // 2}_{_resnet(rest)}"
    if match := re.fullmatch(r"(input|output)_blocks_(\d{1,2})_(\d)_(.+)", flat):
        side, number, place, rest = match[1], int(match[2]), int(match[3]), match[4]
        if side == "input":
            block, layer = divmod(number - 1, LAYERS_PER_BLOCK + 1)
            if layer == LAYERS_PER_BLOCK:
                return f"down_blocks_{block}_downsamplers_0_conv"
            name = f"down_blocks_{block}"
        else:
            block, layer = divmod(number, LAYERS_PER_BLOCK + 1)
            name = f"up_blocks_{block}"
            if rest == "conv":
                return f"{name}_upsamplers_0_conv"
        return f"{name}_resnets_{layer}_{_resnet(rest)}" if place == 0 else f"{name}_attentions_{layer}_{rest}"
    return flat


def block_counting(key: str) -> str | None:
    """Whose counting of a UNet's blocks a tensor's name has: "stability", "diffusers", None where it names no block."""
    if any(word in key for word in ("input_blocks", "middle_block", "output_blocks")):
        return "stability"
    return "diffusers" if "_blocks" in key or "mid_block" in key else None


def _resnet(part: str) -> str:
    return SGM_PARTS.get(part, part)


def _dotted(key: str) -> LoraKey:
    end = next((end for end in DOTTED_ENDS if key.endswith(end)), None)
    if end is None:
        kind = next(
            (kind for word, kind in UNSERVED_DOTTED.items() if key.startswith(word) or key.endswith(word)), None
        )
        raise LoraFileError(
            f"tensor {key} is part of {kind}, which is not served"
            if kind
            else f"tensor {key} is no part of a LoRA that we know (kohya, PEFT, diffusers, LyCORIS)"
        )
    module, part = key.removesuffix(end), DOTTED_ENDS[end]
    if module.startswith(PEFT_PREFIX):
        naming, component, module = "peft", "unet", module.removeprefix(PEFT_PREFIX)
    else:
        naming = "diffusers"
        component, _, rest = module.partition(".")
        if component in COMPONENTS:
            module = rest
        else:
            component = "unet"  # the oldest files of diffusers name the UNet's modules alone
    # "…attn1.processor.to_q_lora" is the update of "…attn1.to_q"; the output's projection stands in a list.
    module = module.replace(".processor.", ".")
    stem, _, last = module.rpartition(".")
    if stem.endswith("self_attn") and last in OLD_TEXT_NAMES:
        module = f"{stem}.{OLD_TEXT_NAMES[last]}"
    elif last == "to_out":
        module += ".0"
    if not module:
        raise LoraFileError(f"tensor {key} names no module")
    return LoraKey(naming, component, flat_module(component, module), part)


# Names inside diffusers' and transformers' models that hold an underscore of their own.
COMPOUNDS = sorted(
    (
        *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_embedding", "add_embedding"),
        *("time_emb_proj", "conv_shortcut", "conv_norm_out", "conv_in", "conv_out", "proj_in", "proj_out"),
        *("to_q", "to_k", "to_v", "to_out", "linear_1", "linear_2", "text_model", "self_attn", "q_proj", "k_proj"),
        *("v_proj", "out_proj", "token_embedding", "position_embedding", "final_layer_norm", "layer_norm1"),
        *("layer_norm2", "text_projection"),
    ),
    key=len,
    reverse=True,
)


def dotted_module(module: str) -> str:
    """A flat module name of a diffusers model with its dots ("mid_block_attentions_0_proj_in": 3 of them)."""
    if "." in module:
        return module
    words, rest = [], sgm_to_diffusers(module)
    while rest:
        word = next((word for word in COMPOUNDS if rest == word or rest.startswith(word + "_")), rest.partition("_")[0])
        words.append(word)
        rest = rest[len(word) + 1 :]
    return ".".join(words)
