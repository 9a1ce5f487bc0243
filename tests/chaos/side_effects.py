"""Finds every side effect on the path of a job by reading the source, and the name that it carries."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

ON_THE_PATH = ["jobs/*.py", "jobs/work/*.py", "gpu_worker/*.py"]
ON_THE_PATH += [f"core/{name}.py" for name in ("checkpoint", "durable_folder", "tensor_files")]
ON_THE_PATH += [f"core/{name}.py" for name in ("file_cache", "cache_journal", "cache_rooms")]
"""Files through which a job passes between its submission and its end."""
NOT_ON_IT = frozenset({"jobs/library.py"})
"""What people change by themselves: one transaction each, no job."""

ROWS = {"create", "bulk_create", "get_or_create", "update_or_create", "update", "bulk_update", "save", "delete"}
FILES = {"write", "writelines", "write_bytes", "write_text", "fsync", "replace", "rename", "link", "copyfile", "copy2"}
FILES |= {"unlink", "rmtree", "truncate"}
STORE = {"put_object", "upload_fileobj", "create_multipart_upload", "upload_part", "complete_multipart_upload"}
STORE |= {"abort_multipart_upload", "delete_object", "delete_objects"}
BROKER_AND_PROCESSES = {"send", "send_task", "_exit", "kill", "killpg"}
CALLS = frozenset(ROWS | FILES | STORE | BROKER_AND_PROCESSES)
HARMLESS_RECEIVERS = frozenset({"spool", "columns", "sys", "stdout", "hashlib", "headers", "dataclasses"})
HARMLESS_RECEIVERS |= {"safetensors"}  # `safetensors.torch.save` returns bytes
"""Calls of these change nothing that outlives the process."""


@dataclass(frozen=True)
class Effect:
    """One call that changes something outside of this process."""

    file: str
    line: int
    text: str
    name: str | None


def effects() -> list[Effect]:
    """Every side effect of the files on the path."""
    found: list[Effect] = []
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += _effects_of(tree, path.relative_to(REPOSITORY).as_posix())
    return found


def files() -> list[Path]:
    """The files on the path."""
    found = {path for pattern in ON_THE_PATH for path in REPOSITORY.glob(pattern)}
    return sorted(path for path in found if path.relative_to(REPOSITORY).as_posix() not in NOT_ON_IT)


def names() -> list[tuple[str, str]]:
    """(name, file) of every `side_effect("...")` in the product, in the order of the files; doubled ones twice."""
    found = []
    for folder in ("core", "gpu_worker", "jobs", "lorasite"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (name := _name_of(node)) is not None:
                    found.append((name, path.relative_to(REPOSITORY).as_posix()))
    return found


def points() -> list[str]:
    """Every point at which a test can make the process die."""
    ends = ("before",)  # Nothing comes after the end of a process.
    return [
        f"{name}:{side}"
        for name, _ in names()
        for side in (ends if name.startswith("process.end") else ("before", "after"))
    ]


def _effects_of(tree: ast.AST, file: str) -> Iterator[Effect]:
    stack: list[tuple[ast.AST, str | None]] = [(tree, None)]
    while stack:
        node, name = stack.pop()
        if isinstance(node, ast.With):
            name = next((n for item in node.items if (n := _name_of(item.context_expr))), name)
        if isinstance(node, ast.FunctionDef):
            name = next((n for decorator in node.decorator_list if (n := _name_of(decorator))), None)
        if isinstance(node, ast.Call) and _is_effect(node):
            yield Effect(file, node.lineno, ast.unparse(node)[:90], name)
        stack += [(child, name) for child in ast.iter_child_nodes(node)]


def _is_effect(call: ast.Call) -> bool:
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr not in CALLS:
        return False
    receiver = function.value
    root = receiver
    while isinstance(root, (ast.Attribute, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    last = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
    if last in HARMLESS_RECEIVERS or getattr(root, "id", "") in HARMLESS_RECEIVERS:
        return False
    if function.attr == "update" and call.args:
        return False  # Rows are updated by names only; by position, a dict, a set or a digest is.
    return not (function.attr == "replace" and _is_text_or_copy(call))


def _is_text_or_copy(call: ast.Call) -> bool:
    """`text.replace(a, b)` changes nothing; `path.replace(target)` and `os.replace(a, b)` do."""
    assert isinstance(call.func, ast.Attribute)
    is_os = isinstance(call.func.value, ast.Name) and call.func.value.id == "os"
    return not is_os and len(call.args) != 1


def _name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "side_effect":
        argument = node.args[0]
        return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else "?"
    return None
