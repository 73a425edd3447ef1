# SPDX-License-Identifier: Apache-2.0
"""``leyden ckpt``: look into checkpoints, check and compare them, make one file of a folder, take the weights out.

No code of a checkpoint runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leyden import archive, files
from leyden.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from leyden.hparams import restore_hparams
from leyden.loading import PICKLED
from leyden.runtime.ranks import say

_HPARAMS = ("hyper_parameters", "hparams", "module_arguments", "datamodule_hyper_parameters")
_COUNTERS = ("epoch", "global_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``leyden ckpt``."""
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    for name, help_text in (
        ("show", "what is in a checkpoint: step, hyperparameters, callbacks, tensors by prefix"),
        ("verify", "compare checkpoints with their checksums and manifests; status 1 if one is damaged"),
        ("diff", "in which tensors, counters and settings two checkpoints differ; status 1 if they do"),
        ("consolidate", "write a checkpoint folder of several processes as one file, a tensor at a time"),
        ("export", "write the weights of a checkpoint to a safetensors file"),
    ):
        action = actions.add_parser(name, help=help_text, description=f"Tell {help_text}.")
        if name in ("show", "verify"):
            action.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint: a file, a folder or a URL")
        else:
            action.add_argument("files", nargs=2, metavar="FILE", help="two checkpoints, or from and to")
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "show":
            action.add_argument(
                "--depth", type=int, default=1, help="group tensors by so many parts of their names (1)"
            )
        if name == "diff":
            action.add_argument(
                "--tolerance", type=float, default=0.0, help="the largest difference that does not count (0)"
            )


def main(options: argparse.Namespace) -> int:
    """Do what ``options`` say; return the exit status."""
    if options.action == "show":
        shown = [describe(path, options.depth) for path in options.files]
        say(
            json.dumps(shown if len(shown) > 1 else shown[0], indent=1)
            if options.json
            else "\n\n".join(map(_page, shown))
        )
        return 0
    if options.action == "verify":
        found = [verify(path) for path in options.files]
        lines = [f"{one['file']}: {one['verdict']}" + f" ({one['detail']})" * bool(one["detail"]) for one in found]
        say(json.dumps(found, indent=1) if options.json else "\n".join(lines))
        return int(any(not one["good"] for one in found))
    if options.action == "diff":
        differences = diff(options.files[0], options.files[1], options.tolerance)
        text = "\n".join(f"{one['what']}: {one['difference']}" for one in differences) or "They are the same."
        say(json.dumps(differences, indent=1) if options.json else text)
        return int(bool(differences))
    written = consolidate(*options.files) if options.action == "consolidate" else export(*options.files)
    say(json.dumps(written, indent=1) if options.json else f"{written['file']}: {written['tensors']} tensors.")
    return 0


# --------------------------------------------------------------------------------------------- show


def describe(path: str, depth: int = 1) -> dict[str, Any]:
    """Return what is in a checkpoint, as plain data; tensors under the first ``depth`` parts of their names.

    Raises:
        CheckpointError: if it cannot be read.
    """
    content = files.look(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, which is no checkpoint.")
    ours = found if isinstance(found := content.get("leyden"), Mapping) else {}
    weights = content.get("state_dict")
    written_by = next(
        (f"{name} {version}" for name, version in (
            ("Leyden", ours.get("version")), ("Lightning", content.get("pytorch-lightning_version"))
        ) if version), None,
    )  # fmt: skip
    callbacks = content.get("callbacks")
    return {
        "file": path,
        "kind": "folder" if not files.is_remote(path) and files.local_path(path).is_dir() else "file",
        "written_by": written_by,
        "format": ours.get("format"),
        **{name: _plain(content.get(name)) for name in _COUNTERS},
        "hyper_parameters": _settings(content),
        "callbacks": sorted(map(str, callbacks)) if isinstance(callbacks, Mapping) else [],
        "weights": _groups(weights if isinstance(weights, Mapping) else _tensors_of(content), depth),
        "contents": archive.contents({str(key): value for key, value in content.items()}),
        "not_read": sorted({repr(value) for value in _leaves(content) if isinstance(value, archive.Opaque)}),
    }


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _HPARAMS:
        value = content.get(key)
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            found[key] = {str(name): _plain(item) for name, item in restore_hparams(value).items()}
    pickled = content.get(PICKLED)
    for key, value in (pickled if isinstance(pickled, Mapping) else {}).items():
        found.setdefault(str(key), {}).update({str(name): "<pickled, not opened>" for name in value.get("names", ())})
    return found


def _tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _groups(tensors: Mapping[str, Any], depth: int) -> list[dict[str, Any]]:
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            groups.setdefault(".".join(str(name).split(".")[: max(depth, 1)]), []).append((str(name), value))
    return [
        {
            "prefix": prefix,
            "tensors": len(members),
            "elements": sum(value.numel() for _, value in members),
            "bytes": sum(value.numel() * value.element_size() for _, value in members),
            "dtypes": sorted({str(value.dtype).removeprefix("torch.") for _, value in members}),
            "shapes": {name: list(value.shape) for name, value in members},
        }
        for prefix, members in groups.items()
    ]


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; what it cannot hold as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return f"<tensor {tuple(value.shape)}>"
    return str(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _page(shown: Mapping[str, Any]) -> str:
    lines = [f"{shown['file']}"]
    lines.append(
        f"  {shown['kind']}, written by {shown['written_by'] or 'an unknown hand'}"
        + (f", format {shown['format']}" if shown["format"] is not None else "")
        + "".join(f", {name} {shown[name]}" for name in _COUNTERS if shown[name] is not None)
    )
    for key, values in shown["hyper_parameters"].items():
        lines.append(f"  {key}")
        lines += [f"    {name}: {value}" for name, value in values.items()]
    if shown["callbacks"]:
        lines.append("  callbacks")
        lines += [f"    {name}" for name in shown["callbacks"]]
    lines.append("  weights")
    width = max((len(group["prefix"]) for group in shown["weights"]), default=0)
    for group in shown["weights"]:
        shapes = list(group["shapes"].values())
        shape = f"{tuple(shapes[0])}" if len(shapes) == 1 else f"{len(shapes)} tensors"
        lines.append(f"    {group['prefix']:<{width}}  {shape}  {', '.join(group['dtypes'])}  {_size(group['bytes'])}")
    lines.append("  contents")
    for key, (tensors, size) in shown["contents"].items():
        lines.append(f"    {key}" + (f": {tensors} tensors, {_size(size)}" if tensors else ""))
    if shown["not_read"]:
        lines.append(f"  not read, for they are no plain data: {', '.join(shown['not_read'])}")
    return "\n".join(lines)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


# --------------------------------------------------------------------------------------------- verify


def verify(path: str) -> dict[str, Any]:
    """Return whether a checkpoint is what was written: ``good``, a ``verdict`` in words, and a ``detail``."""
    try:
        has_checksums = files.verify(path)
        changed = archive.changes(files.look(path))
    except CheckpointError as error:
        damaged, missing = isinstance(error, CheckpointDamagedError), isinstance(error, CheckpointNotFoundError)
        verdict = "damaged" if damaged else "missing" if missing else "cannot be read"
        return {"file": path, "good": False, "verdict": verdict, "detail": str(error)}
    if changed:
        return {"file": path, "good": False, "verdict": "changed since it was written", "detail": "; ".join(changed)}
    if not has_checksums:
        return {"file": path, "good": True, "verdict": "readable", "detail": "it has no checksums to compare with"}
    return {"file": path, "good": True, "verdict": "good", "detail": ""}


# --------------------------------------------------------------------------------------------- diff and export


def diff(first: str, second: str, tolerance: float = 0.0) -> list[dict[str, Any]]:
    """Return in what two checkpoints differ: for each part its path, and the difference in words.

    Raises:
        CheckpointError: if one of them cannot be read.
    """
    return list(_differences("", files.load(first, "cpu"), files.load(second, "cpu"), tolerance))


def _differences(place: str, one: Any, other: Any, tolerance: float) -> Iterator[dict[str, Any]]:
    def differ(difference: str, **more: Any) -> dict[str, Any]:
        return {"what": place or "the checkpoint", "difference": difference, **more}

    if isinstance(one, argparse.Namespace):
        one = vars(one)
    if isinstance(other, argparse.Namespace):
        other = vars(other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            kinds = [f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in (one, other)]
            yield differ(f"{kinds[0]} in the first, {kinds[1]} in the second")
        elif not torch.equal(one, other):
            largest, count = _distance(one, other)
            if not largest <= tolerance:
                yield differ(
                    f"{count} of {one.numel()} elements, at most by {largest:g}",
                    max_abs_difference=largest,
                    elements=count,
                )
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            inner = f"{place}[{key!r}]" if place else str(key)
            if key not in other or key not in one:
                yield {"what": inner, "difference": f"only in the {'first' if key in one else 'second'}"}
            else:
                yield from _differences(inner, one[key], other[key], tolerance)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{place}[{index}]", mine, theirs, tolerance)
    elif type(one) is not type(other) or (one != other and not (one != one and other != other)):
        numbers = type(one) in (int, float) and type(other) in (int, float)
        if not (numbers and abs(one - other) <= tolerance):
            yield differ(f"{_short(one)} in the first, {_short(other)} in the second")


def _distance(one: Tensor, other: Tensor) -> tuple[float, int]:
    """Return the largest absolute difference, and the number of elements that differ; NaN equals NaN."""
    mine, theirs = (value.to_dense() if value.layout is not torch.strided else value for value in (one, other))
    unequal = (mine != theirs) & ~((mine != mine) & (theirs != theirs))
    if not unequal.any():
        return 0.0, 0
    wide = torch.complex128 if mine.is_complex() else torch.float64
    return float((mine[unequal].to(wide) - theirs[unequal].to(wide)).abs().max()), int(unequal.sum())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def consolidate(source: str, target: str) -> dict[str, Any]:
    """Write a checkpoint folder as the one file that a single process would have written; return what was written.

    Of the tensors none is held in memory: they are put together, one after the other, in files beside the target, which
    are mapped into memory while they are written to it and are gone then. So that takes their room on the disk twice.

    Raises:
        CheckpointError: for something that is no checkpoint folder, is damaged or would run code; or if the file cannot be
            written.
    """
    from leyden import folders, sharded  # noqa: PLC0415  # loads torch.distributed.checkpoint

    folder, place = files.require_file(files.local_path(source)), files.require_local(target)
    if not folder.is_dir():
        raise CheckpointError(f"{source} is one file already.")
    if folders.is_committed(folder):
        folders.check(folder)
    count = 0
    with (
        files.explained(target),
        tempfile.TemporaryDirectory(prefix=".leyden-", dir=_made(place.parent), ignore_cleanup_errors=True) as aside,
    ):

        def mapped(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return _mapped(tensor, Path(aside) / str(count))

        content = sharded.as_file(sharded.Source(folder, "cpu").whole(mapped))
        files.save(content, place)
    return {"file": target, "tensors": count}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mapped(tensor: Tensor, path: Path) -> Tensor:
    """Return a tensor like ``tensor`` whose memory is a file, which has no name any more where the system allows that."""
    if not tensor.numel():
        return torch.empty_like(tensor, device="cpu")
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full is an error here, and kills the process later
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        else:
            file.truncate(tensor.nbytes)
    found = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    with contextlib.suppress(OSError):
        path.unlink()
    return found


def export(source: str, target: str) -> dict[str, Any]:
    """Write the weights of a checkpoint to a safetensors file; return what was written.

    Raises:
        CheckpointError: if there are no weights, or the file cannot be written.
    """
    from leyden.weights import load_weights, save_weights  # noqa: PLC0415  # only who exports needs safetensors

    weights = load_weights(source)
    save_weights(weights, target, {"source": Path(source).name})
    return {"file": target, "tensors": len(weights)}
