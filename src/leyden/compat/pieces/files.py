# SPDX-License-Identifier: Apache-2.0
"""Files wherever they are, and the weights of checkpoint folders as one file."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs

from leyden import files
from leyden.errors import MisconfigurationException
from leyden.types import PathLike

CPU_DEVICE = torch.device("cpu")
_OF_DEEPSPEED = (
    "module", "optimizer", "lr_scheduler", "csr_tensor_module_names", "skipped_steps", "global_steps", "dp_world_size",
    "mp_world_size",
)  # fmt: skip


def get_filesystem(path: PathLike, **kwargs: Any) -> Any:
    """Return the file system (of fsspec) that a path or URL is on; ``kwargs`` are options of it."""
    return url_to_fs(str(path), **kwargs)[0]


def load(path_or_url: PathLike | IO[bytes], map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Read what ``torch.save`` wrote, from a path, URL or open file.

    Args:
        path_or_url: Where it is.
        map_location: As of ``torch.load``.
        weights_only: None: as torch decides (no code of the file runs).
    """
    if not isinstance(path_or_url, (str, Path)):
        return torch.load(path_or_url, map_location=map_location, weights_only=weights_only)
    filesystem, path = url_to_fs(str(path_or_url))
    with filesystem.open(path, "rb") as file:
        return torch.load(file, map_location=map_location, weights_only=weights_only)


def atomic_save(checkpoint: dict[str, Any], filepath: PathLike) -> None:
    """Write a checkpoint: the whole of it is there under its name, or nothing."""
    files.save(checkpoint, filepath)


def is_local_file_protocol(path: PathLike) -> bool:
    """Whether a path is on this machine's own file system."""
    return not files.is_remote(path)


def is_dir(fs: Any, path: PathLike, strict: bool = False) -> bool:
    """Whether ``path`` is a folder of a file system.

    Object storage has no folders: there, unless ``strict``, whatever is no file counts as one.
    """
    stores = {"s3", "gs", "gcs", "abfs", "abfss", "az"}
    protocol = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    if stores & set(protocol) and not strict:
        return not fs.isfile(str(path))
    return bool(fs.isdir(str(path)))


def ds_checkpoint_dir(checkpoint_dir: PathLike, tag: str | None = None) -> str:
    """Return the folder within a checkpoint of DeepSpeed in which its files are.

    Args:
        checkpoint_dir: The checkpoint.
        tag: The folder's name; None: what the file ``latest`` says.

    Raises:
        ValueError: without a tag where there is no file ``latest``.
        FileNotFoundError: if there is no such folder.
    """
    if tag is None:
        latest = Path(checkpoint_dir) / "latest"
        if not latest.is_file():
            raise ValueError(f"{latest} does not exist, so the tag of the checkpoint has to be given.")
        tag = latest.read_text(encoding="utf-8").strip()
    folder = Path(checkpoint_dir) / tag
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: DeepSpeed keeps the files of a checkpoint in such a folder.")
    return str(folder)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathLike, output_file: PathLike, tag: str | None = None
) -> dict[str, Any]:
    """Write the weights of a checkpoint folder of DeepSpeed as one file, in 32 bits; it opens pickles of that folder.

    Args:
        checkpoint_dir: The folder, which has ``latest`` in it.
        output_file: The file to write: ``load_from_checkpoint`` reads it.
        tag: Which of several checkpoints; None: the latest.

    Returns:
        What is in the file.

    Raises:
        ModuleNotFoundError: if DeepSpeed is not installed.
    """
    try:
        zero: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("DeepSpeed reads its checkpoints itself: pip install deepspeed.") from error
    weights = zero.get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    folder = ds_checkpoint_dir(checkpoint_dir, tag)
    optimizer = torch.load(zero.get_optim_files(folder)[0], map_location=CPU_DEVICE, weights_only=False)
    model_file = zero.get_model_state_file(folder, optimizer["optimizer_state_dict"]["zero_stage"])
    found = torch.load(model_file, map_location=CPU_DEVICE, weights_only=False)
    result = {name: value for name, value in found.items() if name not in _OF_DEEPSPEED}
    result["state_dict"] = {name.removeprefix("_forward_module."): value for name, value in weights.items()}
    files.save(result, output_file)
    return result


def consolidate(args: Sequence[str] | None = None) -> None:
    """Write a checkpoint folder of several processes as one file.

    Args:
        args: As on the command line: the folder, and ``--output_file``.

    Raises:
        MisconfigurationException: if the file exists.
    """
    parser = argparse.ArgumentParser(
        prog="consolidate_checkpoint", description=(consolidate.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("checkpoint_folder", help="the folder")
    parser.add_argument("--output_file", help="the file to write; by default FOLDER.consolidated")
    options = parser.parse_args(args)
    source = Path(options.checkpoint_folder)
    target = Path(options.output_file or f"{source}.consolidated")
    if target.exists():
        raise MisconfigurationException(f"{target} exists: give another --output_file, or remove it.")
    whole: Any = importlib.import_module("leyden.cli.ckpt")  # the command does it: `leyden ckpt consolidate`
    whole.consolidate(str(source), str(target))
    print(target)
