"""TensorDicts as safetensors files: data only, every type of tensor, structure and order of keys kept.

Order matters: a sum over the leaves of a restored state has to add them in the order of the original. safetensors files
sort their tensors, so each carries its tree in its metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

_SEPARATOR = "/"


def write_tensors(path: Path, value: TensorDictBase) -> None:
    """Write `value`, from whatever device, to `path`. Raises OSError, and ValueError for a key that contains "/"."""
    leaves: dict[str, Tensor] = {}
    tree = _take_apart(value, "", leaves)
    host = {name: leaf.detach().cpu().contiguous() for name, leaf in leaves.items()}
    # Leaves may share memory (constants of a fresh state), which the format cannot express.
    seen: set[int] = set()
    for name, leaf in host.items():
        if leaf.untyped_storage().data_ptr() in seen or leaf.untyped_storage().nbytes() != leaf.nbytes:
            host[name] = leaf = leaf.clone()
        seen.add(leaf.untyped_storage().data_ptr())
    try:
        save_file(host, path, metadata={"tree": json.dumps(tree)})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def read_tensors(path: Path) -> TensorDict:
    """What `write_tensors` wrote, on the CPU. Raises OSError, and ValueError for a file that it cannot have written."""
    try:
        with safe_open(path, framework="pt") as stream:
            tree = json.loads((stream.metadata() or {}).get("tree", "null"))
            leaves = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, RecursionError) as error:
        raise ValueError(str(error)) from error
    value = _put_together(tree, "", leaves)
    if leaves or not isinstance(value, TensorDict):
        raise ValueError(f"tensors without a place: {', '.join(leaves) or 'the file itself'}")
    return value


def layout(value: TensorDictBase) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every leaf by path, `"growth/0/key": ((4,), torch.int64)`."""
    leaves: dict[str, Tensor] = {}
    _take_apart(value, "", leaves)
    return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}


def like(value: TensorDict, template: TensorDictBase) -> TensorDict:
    """`value`, in its own order of keys, with every leaf where its counterpart in `template` is.

    Raises ValueError naming the first leaf that is missing, left over, or of another shape or type.
    """
    have, want = layout(value), layout(template)
    for name in [*want, *have]:
        if have.get(name) != want.get(name):
            raise ValueError(f"{name}: {_words(have.get(name))}; must be {_words(want.get(name))}")
    return _place(value, template)


def _place(value: TensorDict, template: TensorDictBase) -> TensorDict:
    items = {
        key: _place(item, template[key]) if isinstance(item, TensorDictBase) else item.to(template[key].device)
        for key, item in value.items()
    }
    return TensorDict(items, batch_size=template.batch_size, device=template.device)


def _words(shape: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if shape is None else f"{str(shape[1]).removeprefix('torch.')} {list(shape[0])}"


def _take_apart(value: TensorDictBase, prefix: str, leaves: dict[str, Tensor]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, item in value.items():
        if _SEPARATOR in key:
            raise ValueError(f"key: {key!r}; must not contain {_SEPARATOR!r}")
        if isinstance(item, TensorDictBase):
            items[key] = _take_apart(item, f"{prefix}{key}{_SEPARATOR}", leaves)
        else:
            leaves[prefix + key], items[key] = item, None
    return {"batch": list(value.batch_size), "items": items}


def _put_together(tree: Any, prefix: str, leaves: dict[str, Tensor]) -> TensorDict | Tensor:
    if tree is None:
        name = prefix.removesuffix(_SEPARATOR)
        if name not in leaves:
            raise ValueError(f"{name or 'tree'}: missing")
        return leaves.pop(name)
    if not isinstance(tree, dict) or tree.keys() != {"batch", "items"} or not isinstance(tree["items"], dict):
        raise ValueError(f"{prefix or 'tree'}: must be a batch and items")
    items = {key: _put_together(part, f"{prefix}{key}{_SEPARATOR}", leaves) for key, part in tree["items"].items()}
    try:
        return TensorDict(items, batch_size=tree["batch"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{prefix or 'tree'}: {error}") from error
