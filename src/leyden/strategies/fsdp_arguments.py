# SPDX-License-Identifier: Apache-2.0
"""The arguments of FSDPStrategy, those of Lightning's and of torch's first FSDP among them: read, and checked."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from leyden.errors import MisconfigurationException, did_you_mean

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "NO_SHARD")
STATE_DICT_TYPES = ("full", "sharded")
_ALWAYS = ("use_orig_params", "sync_module_states", "limit_all_gathers", "forward_prefetch", "backward_prefetch")
"""Arguments of torch's first FSDP about what is always so here, or what torch now decides itself."""
_OURS = (
    "cpu_offload", "mixed_precision", "auto_wrap_policy", "activation_checkpointing",
    "activation_checkpointing_policy", "sharding_strategy", "state_dict_type", "device_mesh", "timeout",
    "process_group_backend", "ignored_modules", "ignored_states", "start_method", "find_unused_parameters", "hang_timeout",
    "uneven",
)  # fmt: skip


def read_kwargs(kwargs: dict[str, Any]) -> list[Any]:
    """Return what every process keeps whole.

    Raises:
        MisconfigurationException: for an argument that is not known, or that asks for what is not there any more.
    """
    known = (*_OURS, *_ALWAYS)
    unknown = next((name for name in kwargs if name not in known), None)
    if unknown is not None:
        raise MisconfigurationException(
            f"FSDPStrategy({unknown}=...) is not known. It takes {', '.join(_OURS)}.{did_you_mean(unknown, known)}"
        )
    if kwargs.get("use_orig_params") is False:
        raise MisconfigurationException(
            "FSDPStrategy(use_orig_params=False): parameters always keep their names and shapes here. Leave it out."
        )
    return [*(kwargs.get("ignored_modules") or []), *(kwargs.get("ignored_states") or [])]


def read_mixed_precision(given: Any) -> MixedPrecisionPolicy | None:
    """Return the policy that was given, also where it is of torch's first FSDP.

    Raises:
        MisconfigurationException: for anything else.
    """
    if given is None or isinstance(given, MixedPrecisionPolicy):
        return given
    if hasattr(given, "param_dtype") and hasattr(given, "reduce_dtype"):  # of torch's first FSDP
        return MixedPrecisionPolicy(given.param_dtype, given.reduce_dtype, None, bool(given.cast_forward_inputs))
    raise MisconfigurationException(
        f"FSDPStrategy(mixed_precision={given!r}) is not valid: give torch.distributed.fsdp.MixedPrecisionPolicy(...), or"
        " say Trainer(precision='bf16-mixed')."
    )


def one_of(argument: str, given: Any, allowed: tuple[str, ...]) -> str:
    """Return what was given, if it is allowed.

    Raises:
        MisconfigurationException: if it is not, with the closest that is.
    """
    if given not in allowed:
        raise MisconfigurationException(
            f"FSDPStrategy({argument}={given!r}) is not valid: it must be one of {list(allowed)}."
            f"{did_you_mean(str(given), allowed)}"
        )
    return str(given)


def read_mesh(given: Any, sharding: str) -> tuple[int, int] | DeviceMesh | None:
    """Return the mesh that was given, or the sizes of one.

    Raises:
        MisconfigurationException: for anything else, or one that the sharding strategy has no use for.
    """
    if given is None:
        return None
    dimensions = given.ndim if isinstance(given, DeviceMesh) else len(given) if isinstance(given, tuple) else 0
    sizes = isinstance(given, DeviceMesh) or (dimensions and all(isinstance(n, int) and n > 0 for n in given))
    if not sizes or dimensions not in ((1, 2) if isinstance(given, DeviceMesh) else (2,)):
        raise MisconfigurationException(
            f"FSDPStrategy(device_mesh={given!r}) is not valid: give how many copies and over how many processes each is"
            " spread, as in (2, 4), or a DeviceMesh."
        )
    if dimensions == 2 and "HYBRID" not in sharding:
        raise MisconfigurationException(
            f"FSDPStrategy(device_mesh={given!r}, sharding_strategy={sharding!r}): a mesh of two dimensions is for"
            " 'HYBRID_SHARD'. Say that, or leave the mesh out."
        )
    return given  # type: ignore[no-any-return]
