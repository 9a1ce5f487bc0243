"""The parts of one module's update, judged by their shapes: LoRA, DoRA, LoHa, LoKr, full difference.

Called by the gate. Formulas: kohya-ss/sd-scripts `networks/lora.py`, LyCORIS `modules/`. No ML library here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import LoraFileError
from core.lora_header import TensorInfo

MAX_RANK = 1024
Shape = tuple[int, ...]

LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOHA_CORES = {"hada_t1", "hada_t2"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
DIFF = {"diff"}


@dataclass(frozen=True)
class LoraModule:
    """One module of a file.

    Attributes:
        adapter: "lora", "dora", "loha", "lokr" or "diff".
        rank: None for full differences.
        outputs: Rows of the update.
        inputs: Columns of the update; a convolution's kernel counts in.
        kernel: (height, width) of a convolution, () where the file does not tell.
        has_alpha: Whether an alpha lies beside it.
    """

    adapter: str
    rank: int | None
    outputs: int
    inputs: int
    kernel: Shape
    has_alpha: bool

    def fits(self, weight: Shape) -> bool:
        """Whether the update can be added to a weight of this shape."""
        if weight[0] != self.outputs or math.prod(weight[1:]) != self.inputs:
            return False
        return not self.kernel or (weight[2:] or (1, 1)) == self.kernel

    def described(self) -> str:
        """For people."""
        kernel = f", kernel {self.kernel[0]}x{self.kernel[1]}" if self.kernel else ""
        return f"{self.outputs} x {self.inputs}{kernel}"


def read_module(label: str, parts: Mapping[str, TensorInfo]) -> LoraModule:
    """Judge the tensors of one module.

    Args:
        label: File and module, for people.
        parts: By the names of `core.lora_keys`.

    Raises:
        LoraFileError: Something is missing, too much, or of a shape that does not belong to the rest.
    """
    shapes = {part: tensor.shape for part, tensor in parts.items()}
    alpha, magnitude = shapes.pop("alpha", None), shapes.pop("magnitude", None)
    if alpha is not None and math.prod(alpha) != 1:
        raise LoraFileError(f"{label}: alpha has shape {list(alpha)}, a single number is needed")
    adapter, rank, delta = _delta(label, shapes)
    if rank is not None and rank > MAX_RANK:
        raise LoraFileError(f"{label} has rank {rank}; ranks of 1 to {MAX_RANK} are read")
    outputs, inputs = delta[0], math.prod(delta[1:])
    if magnitude is not None:
        if math.prod(magnitude) not in (outputs, delta[1]):
            raise LoraFileError(f"{label}: the magnitude of DoRA has shape {list(magnitude)}, the update {list(delta)}")
        adapter = "dora" if adapter == "lora" else adapter
    return LoraModule(
        adapter=adapter,
        rank=rank,
        outputs=outputs,
        inputs=inputs,
        kernel=delta[2:] if len(delta) == 4 else (),
        has_alpha=alpha is not None,
    )


def _delta(label: str, shapes: dict[str, Shape]) -> tuple[str, int | None, Shape]:
    """Kind, rank and the shape of the update."""
    have = set(shapes)
    if have & {"down", "up", "mid"}:
        _need(label, have, {"down", "up"}, {"mid"})
        return "lora", *_lora(label, shapes)
    if have & (LOHA | LOHA_CORES):
        _need(label, have, LOHA, LOHA_CORES)
        return "loha", *_loha(label, shapes)
    if have & LOKR:
        _need(label, have, set(), LOKR)
        return "lokr", *_lokr(label, shapes)
    _need(label, have, {"diff"}, DIFF)
    difference = shapes["diff"]
    if len(difference) == 1:
        raise LoraFileError(f"{label} changes a norm (diff of shape {list(difference)}), which is not served")
    if len(difference) not in (2, 4):
        raise LoraFileError(f"{label}: a difference of shape {list(difference)} belongs to no weight")
    return "diff", None, difference


def _lora(label: str, shapes: dict[str, Shape]) -> tuple[int, Shape]:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    rank = down[0] if down else 0
    right = len(down) in (2, 4) and len(up) in (2, 4) and up[1] == rank and up[2:] in ((), (1, 1))
    if mid is not None:
        # delta = up @ mid @ down (CP decomposition): only the middle one has a kernel.
        right = right and len(mid) == 4 and mid[:2] == (rank, rank) and down[2:] == (1, 1)
    if not right:
        raise LoraFileError(
            f"{label}: down {list(down)} and up {list(up)}{f' and mid {list(mid)}' if mid else ''} do not belong "
            "together; expected (rank, in[, k, k]) and (out, rank[, 1, 1])"
        )
    return rank, (up[0], down[1], *(mid[2:] if mid else down[2:]))


def _loha(label: str, shapes: dict[str, Shape]) -> tuple[int, Shape]:
    """delta = (w1_a @ w1_b) * (w2_a @ w2_b), each with a core (rank, rank, k, k) between them or none."""
    deltas, ranks = set[Shape](), set[int]()
    for number in (1, 2):
        a, b, core = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"], shapes.get(f"hada_t{number}")
        if len(a) != 2 or len(b) != 2:
            raise LoraFileError(f"{label}: hada_w{number}_a {list(a)} and _b {list(b)} must be matrices")
        if core is None:
            rank, same = b[0], a[1] == b[0]
            delta: Shape = (a[0], b[1])
        else:  # w_a is (rank, out), w_b is (rank, in)
            rank = a[0]
            same, delta = len(core) == 4 and core[:2] == (rank, rank) and b[0] == rank, (a[1], b[1], *core[2:])
        if not same:
            raise LoraFileError(f"{label}: hada_w{number}_a {list(a)} and _b {list(b)} do not belong together")
        deltas.add(delta)
        ranks.add(rank)
    if len(deltas) > 1 or len(ranks) > 1:
        raise LoraFileError(f"{label}: the two products of its LoHa have different sizes ({sorted(deltas)})")
    return ranks.pop(), deltas.pop()


def _lokr(label: str, shapes: dict[str, Shape]) -> tuple[int, Shape]:
    """delta = kron(w1, w2), each whole or a product of two."""
    w1, rank1 = _lokr_factor(label, shapes, 1, None)
    w2, rank2 = _lokr_factor(label, shapes, 2, shapes.get("lokr_t2"))
    # A LoKr of two whole factors has no rank; 1 stands for "alpha over nothing".
    return rank1 or rank2 or 1, (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])


def _lokr_factor(label: str, shapes: dict[str, Shape], number: int, core: Shape | None) -> tuple[Shape, int | None]:
    whole, a, b = (shapes.get(f"lokr_w{number}{end}") for end in ("", "_a", "_b"))
    wrong = LoraFileError(f"{label}: the parts of lokr_w{number} do not belong together: {sorted(shapes)}")
    if whole is not None:
        if a or b or core or len(whole) not in (2, 4):
            raise wrong
        return whole, None
    if not a or not b or len(a) != 2 or len(b) not in (2, 4):
        raise wrong
    if core is not None:
        if len(core) != 4 or core[:2] != (a[0], b[0]) or len(b) != 2:
            raise wrong
        return (a[1], b[1], *core[2:]), a[0]
    if a[1] != b[0]:
        raise wrong
    return (a[0], *b[1:]), b[0]


def _need(label: str, have: set[str], needed: set[str], allowed: set[str]) -> None:
    missing, odd = sorted(needed - have), sorted(have - needed - allowed)
    if missing:
        raise LoraFileError(f"{label} lacks {', '.join(missing)}: the file is incomplete, export it again")
    if odd:
        raise LoraFileError(f"{label} has {', '.join(odd)} beside another kind of update: export it again")
