# SPDX-License-Identifier: Apache-2.0
"""The arguments of DeepSpeedStrategy, and the configuration that DeepSpeed gets: read, checked and completed."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leyden.errors import MisconfigurationException, did_you_mean

CONFIG_VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"
"""The environment variable that names a configuration file; it is Lightning's."""
_NAME = "DeepSpeedStrategy"
_FLAGS = (
    "zero_optimization", "offload_optimizer", "offload_parameters", "single_submit", "overlap_events", "pin_memory",
    "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter", "zero_allow_untested_optimizer",
    "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "synchronize_checkpoint_boundary",
    "load_full_weights", "exclude_frozen_parameters",
)  # fmt: skip
_COUNTS = (
    "params_buffer_count", "params_buffer_size", "max_in_cpu", "optimizer_buffer_count", "block_size", "queue_depth",
    "thread_count", "sub_group_size", "allgather_bucket_size", "reduce_bucket_size", "initial_scale_power",
    "loss_scale_window", "hysteresis", "min_loss_scale",
)  # fmt: skip
_PLACES = ("cpu", "nvme")
_SECTIONS = {"fp16": "16-mixed", "bf16": "bf16-mixed"}


def require_installed(stage: Any, offload: bool) -> None:
    """Check that DeepSpeed is there.

    Raises:
        MisconfigurationException: if it is not; names what does the same without it.
    """
    if importlib.util.find_spec("deepspeed") is not None:
        return
    same = "strategy='fsdp'" if stage == 3 else "strategy=FSDPStrategy(sharding_strategy='SHARD_GRAD_OP')"
    raise MisconfigurationException(
        f"strategy='deepspeed' needs DeepSpeed, which is not installed: pip install deepspeed. Without it,"
        f" {same if not offload else 'strategy=' + repr('fsdp_cpu_offload')} shares out the same by torch alone."
    )


def refuse_unknown(kwargs: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Check that nothing was given that is not known.

    Raises:
        MisconfigurationException: with the name that is closest.
    """
    for name in kwargs:
        raise MisconfigurationException(
            f"{_NAME}({name}=...) is not known. What has no argument goes into config=, DeepSpeed's own configuration."
            f"{did_you_mean(name, known)}"
        )


def check(given: Mapping[str, Any]) -> None:
    """Check each argument, and those that go together.

    Raises:
        MisconfigurationException: naming the argument, its value, and what is allowed.
    """
    for name in _FLAGS:
        if not isinstance(given[name], bool):
            raise _wrong(name, given[name], "it must be True or False")
    for name in _COUNTS:
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
            raise _wrong(name, value, "it must be an int >= 1")
    for name in ("offload_params_device", "offload_optimizer_device"):
        if given[name] not in _PLACES:
            raise _wrong(
                name, given[name], f"it must be one of {list(_PLACES)}", did_you_mean(str(given[name]), _PLACES)
            )
    if given["remote_device"] not in (None, "cpu", "nvme"):
        raise _wrong("remote_device", given["remote_device"], "it must be 'cpu', 'nvme' or None")
    scale = given["loss_scale"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale < 0:
        raise _wrong("loss_scale", scale, "it must be a number >= 0; 0 finds the scale itself")
    size = given["logging_batch_size_per_gpu"]
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise _wrong("logging_batch_size_per_gpu", size, "it must be 'auto' or an int >= 1")
    _check_stage(given["stage"], given["zero_optimization"], f"{_NAME}(stage={given['stage']!r})")
    if given["offload_parameters"] and given["stage"] != 3:
        raise _wrong("offload_parameters", True, f"stage={given['stage']} keeps them whole on each device; say stage=3")
    if given["offload_optimizer"] and given["offload_optimizer_device"] == "nvme" and given["stage"] != 3:
        raise _wrong("offload_optimizer_device", "nvme", f"stage={given['stage']} cannot use it; say stage=3")


def _check_stage(stage: Any, enabled: Any, shown: str) -> None:
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise MisconfigurationException(f"{shown} is not valid: the stage must be 1, 2 or 3.")
    if stage == 0 or not enabled:
        raise MisconfigurationException(
            f"{shown}, zero_optimization={enabled!r}: then nothing is shared out, which strategy='ddp' does without"
            " DeepSpeed. Use that, or stage 1, 2 or 3."
        )


def _wrong(name: str, value: Any, what: str, more: str = "") -> MisconfigurationException:
    return MisconfigurationException(f"{_NAME}({name}={value!r}) is not valid: {what}.{more}")


def read_config(given: Any) -> dict[str, Any] | None:
    """Return the configuration that was given as a dict, as a path, or by ``PL_DEEPSPEED_CONFIG_PATH``; None if none was.

    Values of ``"auto"`` are left out, since what is set here is set in their place.

    Raises:
        MisconfigurationException: for a file that cannot be read, or anything else.
    """
    source = f"{_NAME}(config={given!r})"
    if given is None:
        given = os.environ.get(CONFIG_VARIABLE)
        if given is None:
            return None
        source = f"{CONFIG_VARIABLE}={given!r}"
    if isinstance(given, (str, Path)):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MisconfigurationException(
                f"{source} cannot be read: {error}. Give a JSON file in DeepSpeed's format."
            ) from None
    if not isinstance(given, Mapping):
        raise MisconfigurationException(f"{source} is not valid: give a dict, or the path of a JSON file.")
    config: dict[str, Any] = _without_auto(copy.deepcopy(dict(given)))
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise MisconfigurationException(
                f"{source} has the key {name!r}: return that from configure_optimizers() instead (DeepSpeed's own are in"
                " deepspeed.ops and deepspeed.runtime.lr_schedules), so that it is in checkpoints and schedules count."
            )
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    _check_stage(stage, True, f"{source} with zero_optimization.stage={stage!r}")
    return config


def _without_auto(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_auto(value) for key, value in tree.items() if value != "auto"}
    return tree


def build(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that the arguments mean."""
    zero: dict[str, Any] = {
        name: given[name]
        for name in (
            "stage", "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter",
            "allgather_bucket_size", "reduce_bucket_size", "sub_group_size",
        )
    }  # fmt: skip
    config: dict[str, Any] = {
        "activation_checkpointing": {
            name: given[name]
            for name in (
                "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
                "synchronize_checkpoint_boundary",
            )
        },
        "aio": {
            name: given[name] for name in ("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count")
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": given["zero_allow_untested_optimizer"],
    }  # fmt: skip
    if given["offload_optimizer"]:
        zero["offload_optimizer"] = {
            "device": given["offload_optimizer_device"], "nvme_path": given["nvme_path"],
            "buffer_count": given["optimizer_buffer_count"], "pin_memory": given["pin_memory"],
        }  # fmt: skip
    if given["offload_parameters"]:
        zero["offload_param"] = {
            "device": given["offload_params_device"], "nvme_path": given["nvme_path"],
            "buffer_count": given["params_buffer_count"], "buffer_size": given["params_buffer_size"],
            "max_in_cpu": given["max_in_cpu"], "pin_memory": given["pin_memory"],
        }  # fmt: skip
    if given["logging_batch_size_per_gpu"] != "auto":
        config["train_micro_batch_size_per_gpu"] = given["logging_batch_size_per_gpu"]
    return config


def complete(
    given: Mapping[str, Any],
    *,
    precision: str,
    scaling: Mapping[str, Any],
    accumulate: int,
    clip: float | None,
    world_size: int,
) -> dict[str, Any]:
    """Return the configuration of a fit: what the Trainer knows is put in, and what contradicts it is an error.

    Args:
        given: As built, or as it was given.
        precision: That of the Trainer.
        scaling: The arguments about the scale of losses, for 16 bits.
        accumulate: ``accumulate_grad_batches``. DeepSpeed gets 1: losses are divided here, where it is known how long the
            last window is, and the engine is told with each batch whether it ends one.
        clip: ``gradient_clip_val``.
        world_size: Number of processes.

    Raises:
        MisconfigurationException: naming both sides.
    """
    config: dict[str, Any] = copy.deepcopy(dict(given))
    _put_precision(config, precision, scaling)
    steps = config.pop("gradient_accumulation_steps", accumulate)
    if steps != accumulate:
        raise MisconfigurationException(
            f"The config of DeepSpeed has gradient_accumulation_steps={steps!r}, and the Trainer"
            f" accumulate_grad_batches={accumulate}. Leave it out of the config."
        )
    config["gradient_accumulation_steps"] = 1
    total, micro = config.pop("train_batch_size", None), config.get("train_micro_batch_size_per_gpu")
    if total is not None:
        each, rest = divmod(total, world_size * accumulate)
        if rest or each < 1 or (micro is not None and micro != each):
            raise MisconfigurationException(
                f"The config of DeepSpeed has train_batch_size={total!r} and train_micro_batch_size_per_gpu={micro!r}, with"
                f" {world_size} processes and accumulate_grad_batches={accumulate}: these do not go together. Leave them"
                " out: the loaders say how many samples a batch has."
            )
        micro = each
    config["train_micro_batch_size_per_gpu"] = micro or 1
    own = config.get("gradient_clipping")
    if own is not None and clip is not None and own != clip:
        raise MisconfigurationException(
            f"The config of DeepSpeed has gradient_clipping={own!r}, and the Trainer gradient_clip_val={clip}. Say it once."
        )
    config["gradient_clipping"] = float(own or clip or 0.0)  # DeepSpeed clips to 1.0 where nothing is said
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 2**31)
    return config


def _put_precision(config: dict[str, Any], precision: str, scaling: Mapping[str, Any]) -> None:
    wanted = "bf16" if precision.startswith("bf16") else "fp16" if precision.startswith("16") else None
    for section, name in _SECTIONS.items():
        enabled = (config.get(section) or {}).get("enabled")
        if enabled is not None and bool(enabled) != (section == wanted):
            raise MisconfigurationException(
                f"The config of DeepSpeed has {section}.enabled={enabled!r}, and the Trainer precision={precision!r}. Leave"
                f" the section out of the config, or say Trainer(precision={name if enabled else '32-true'!r})."
            )
    if wanted == "fp16":
        config["fp16"] = {**scaling, **(config.get("fp16") or {}), "enabled": True}
    elif wanted == "bf16":
        config["bf16"] = {**(config.get("bf16") or {}), "enabled": True}
        summed = (config.get("data_types") or {}).get("grad_accum_dtype")
        if summed == "fp32" and config["zero_optimization"]["stage"] == 1:
            raise MisconfigurationException(
                "The config of DeepSpeed has data_types.grad_accum_dtype='fp32' with stage 1 and bfloat16, for which"
                " DeepSpeed has an optimizer of another kind. Use stage 2."
            )
