# SPDX-License-Identifier: Apache-2.0
"""All that a resume needs: gathered into one checkpoint, and put back from one.

The keys are Lightning's, so that either side opens the other's files, and one of ours, ``leyden``: format version,
counters, random generators and the position in the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from leyden.callback import Callback
from leyden.datamodule import LightningDataModule
from leyden.errors import CheckpointError, MisconfigurationException, WeightsOnlyError
from leyden.hooks import is_written
from leyden.hparams import hparams_name, pack, plain_hparams
from leyden.loading import FORMAT, PICKLED, modernized, require_checkpoint
from leyden.loggers.base import run_states
from leyden.loops.fit import FitLoop
from leyden.loops.lightning_loops import from_lightning, to_lightning
from leyden.loops.metric_state import gather_metrics, metrics_of, restore_metrics
from leyden.loops.optimize import Optimization
from leyden.module import LightningModule
from leyden.progress import Progress
from leyden.results import Results
from leyden.runtime.ranks import rank_zero_warn
from leyden.runtime.seed import rng_state
from leyden.strategies.base import Strategy
from leyden.strategies.verbs import is_own
from leyden.tree import move_to

if TYPE_CHECKING:
    from leyden.loops.position import Position

LIGHTNING_VERSION = "2.6.6"
"""The version of Lightning whose checkpoint layout this is; its own reader asks for it."""


def gather(
    *,
    trainer: Any,
    strategy: Strategy,
    progress: Progress,
    fit_loop: FitLoop,
    datamodule: LightningDataModule | None,
    callbacks: Iterable[Callback],
    optimization: Optimization | None,
    weights_only: bool,
    version: str,
    name: str,
) -> dict[str, Any]:
    """Return a complete checkpoint of plain data and tensors.

    Args:
        trainer: Passed to the hooks of callbacks.
        strategy: Owns the module, the optimizers and the precision.
        progress: The counters.
        fit_loop: Knows where the data stands.
        datamodule: The data module, or None.
        callbacks: All callbacks.
        optimization: The verbs of the fit that runs, or None.
        weights_only: Leave out optimizers, schedules, callbacks and generators.
        version: Leyden's.
        name: That of the file, by which whoever marks its files knows it again.
    """
    from leyden.loops import position  # noqa: PLC0415  # where a checkpoint is written
    from leyden.runtime import agent  # noqa: PLC0415  # as above

    module: LightningModule = strategy.module
    callbacks = list(callbacks)
    data = {} if weights_only else position.gather(fit_loop, progress, trainer.accumulate_grad_batches)
    loaders = position.lightning_states(data.get("train"), fit_loop.data.supply if fit_loop.data is not None else None)
    checkpoint: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": strategy.lightning_module_state_dict(),
        "loops": to_lightning(progress, loaders, fit_loop.last, module.automatic_optimization),
    }
    before = position.unfinished(fit_loop, progress)
    counters = progress.state_dict() if before is None else {**progress.state_dict(), **before.counters}
    ours: dict[str, Any] = {"format": FORMAT, "version": version, "progress": counters}
    ours["file"] = name
    ours["marks"] = [mark for callback in callbacks if isinstance(mark := getattr(callback, "mark", None), str)]
    if not weights_only:
        checkpoint["callbacks"] = {
            callback.state_key: state for callback in callbacks if (state := callback.state_dict())
        }
        checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in strategy.optimizers]
        checkpoint["lr_schedulers"] = [schedule.scheduler.state_dict() for schedule in strategy.lr_scheduler_configs]
        if state := strategy.precision.state_dict():
            checkpoint[type(strategy.precision).__qualname__] = state
        ours["loggers"] = run_states(trainer.loggers)
        ours["rng"] = rng_state() if before is None else before.rng
        ours["data"] = data
        ours["last"], ours["steps"] = fit_loop.last, fit_loop.steps
        metrics = metrics_of(module)
        ours["results"] = trainer.results.state_dict({id(metric): name for name, metric in metrics.items()})
        if before is not None:
            ours["results"].update(before.views)
            metrics = {name: metric for name, metric in metrics.items() if name not in before.idle}
        ours["metrics"] = gather_metrics(metrics)
        if order := strategy.exchange_order():
            ours["order"] = order
        inside = progress.batch_idx > 0 and not progress.epoch_done
        # by hand, only the module knows whether its gradients are still wanted; after the end of an epoch too
        if optimization is not None and (not optimization.automatic or (inside and not fit_loop.steps)):
            ours["window"] = optimization.state_dict()
    checkpoint["leyden"] = ours
    if strategy.world_size > 1 and not weights_only:
        ours["ranks"] = _of_all_ranks(ours, strategy, agent.name())
    if (name_here := agent.name()) is not None:
        agents = {each["agent"] for each in ours.get("ranks", ())} | {name_here}
        ours["launch"] = {"fit": agent.fit(), "agents": sorted(each for each in agents if each is not None)}
    for owner in (module, datamodule):
        if owner is not None and owner.hparams:
            _add_hparams(checkpoint, owner)
    if datamodule is not None and (state := datamodule.state_dict()):
        checkpoint[type(datamodule).__qualname__] = state
    if not weights_only:
        for callback in callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
    elif trainer.config.rule("saved_average") == "always":
        for callback in callbacks:
            if (chosen := getattr(callback, "weights_to_save", None)) is not None:
                checkpoint["state_dict"] = chosen(checkpoint["state_dict"])
    module.on_save_checkpoint(checkpoint)
    return checkpoint


_OF_EACH_RANK = ("rng", "data", "results", "metrics", "window")
"""What each rank has its own of: random generators, the place in its share of the data, what it has counted so far."""


def _of_all_ranks(ours: dict[str, Any], strategy: Strategy, agent: str | None) -> list[dict[str, Any]]:
    """Return what each rank has its own of, and which share of the data and which launcher's agent it has.

    Where checkpoints are written in shards, gradients of an open window do not travel: every rank writes what it has of
    them, and of those of the others it has empty ones.
    """
    own, mine = {key: ours[key] for key in _OF_EACH_RANK if key in ours}, {}
    if in_shards := strategy.saves_shards and "window" in own:
        from leyden.shards import is_spread  # noqa: PLC0415  # only for checkpoints of several processes

        gradients = own["window"]["gradients"]
        spread = {name: gradient for name, gradient in gradients.items() if is_spread(gradient)}
        mine = {name: gradient for name, gradient in gradients.items() if name not in spread}
        ours["window"] = {**ours["window"], "gradients": spread}
        own["window"] = {**own["window"], "gradients": {}}
    own = move_to(own, torch.device("cpu"))
    if in_shards:
        own["window"]["gradients"] = {name: torch.empty_like(each, device="meta") for name, each in mine.items()}
        own["window"]["and_spread"] = True
    if buffers := strategy.own_buffers():
        own["buffers"] = move_to(buffers, torch.device("cpu"))
    ranks: list[dict[str, Any]] = strategy.gather_objects({**own, "share": strategy.data_rank, "agent": agent})
    if in_shards:
        ranks[strategy.global_rank]["window"]["gradients"] = mine
    return ranks


def _of_this_rank(checkpoint: dict[str, Any], strategy: Strategy) -> dict[str, Any]:
    """Put in the place of what rank 0 has written about itself what this rank has written, or goes on with."""
    ours = checkpoint.get("leyden") or {}
    if "rng" not in ours:
        ours.pop("ranks", None)
        return checkpoint
    ranks = ours.pop("ranks", None) or [{key: ours[key] for key in _OF_EACH_RANK if key in ours}]
    rank, share, size = strategy.global_rank, strategy.data_rank, strategy.data_size
    former = [each.get("share", number) for number, each in enumerate(ranks)]
    if len(ranks) == strategy.world_size and former[rank] == share and len(set(former)) == size:
        shared = (ours.get("window") or {}).get("gradients", {})
        ours.update(ranks[rank])
        if (ours.get("window") or {}).get("and_spread"):
            ours["window"] = {**ours["window"], "gradients": {**shared, **ours["window"]["gradients"]}}
    else:
        from leyden.loops.several import merge  # noqa: PLC0415  # where another number of processes goes on

        ours.pop("window", None)
        ours.update(merge.of_rank(ranks, rank, share, size, checkpoint.get("state_dict") or {}))
        ours.pop("buffers", None)  # all go on with those of rank 0
        ours["metrics"] = [each.get("metrics", {}) for each in merge.one_of_each_share(ranks)]
    for name in ("share", "agent"):
        ours.pop(name, None)
    return checkpoint


def _add_hparams(checkpoint: dict[str, Any], owner: Any) -> None:
    """Plain values in the open; the rest pickled as one bytes value, which nobody opens unless asked."""
    key = owner.CHECKPOINT_HYPER_PARAMS_KEY
    plain, other = plain_hparams(owner.hparams)
    checkpoint[key] = plain
    name = hparams_name(owner)
    if name:
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = name
    if other:
        checkpoint.setdefault(PICKLED, {})[key] = {"names": sorted(other), "data": pack(other)}


def read(strategy: Strategy, path: Any, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint, compare it with its checksums, and check that this version can use it.

    Raises:
        CheckpointError: for one that is damaged, of a newer format, or no checkpoint.
    """
    checkpoint: Any = strategy.load_checkpoint(path, weights_only)
    require_checkpoint(checkpoint, str(path))
    return _of_this_rank(modernized(checkpoint), strategy)


def restore_model(
    checkpoint: dict[str, Any],
    source: str,
    *,
    trainer: Any,
    strategy: Strategy,
    datamodule: LightningDataModule | None,
    callbacks: Iterable[Callback],
    fitting: bool,
) -> None:
    """Put back the data module, the module's weights and the callbacks, with their hooks."""
    module: LightningModule = strategy.module
    module.on_load_checkpoint(checkpoint)
    if strategy.precision.precision == "64-true":
        strategy.precision.convert_module(module)  # ahead of the set-up: in float32 half of the digits would be lost
    if is_own(strategy, "load_model_state_dict"):
        strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    else:
        strategy.load_module_state_dict(checkpoint["state_dict"], module.strict_loading, source)
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    if not fitting:
        return
    callbacks = list(callbacks)
    for callback in callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
    states = checkpoint.get("callbacks") or {}
    for callback in callbacks:
        state = states.get(callback.state_key)
        if state is None:
            state = states.get(type(callback).__qualname__)
        if state is not None and is_written(callback, "load_state_dict", Callback):
            callback.load_state_dict(state)
    if states:
        known = {callback.state_key for callback in callbacks} | {type(callback).__qualname__ for callback in callbacks}
        lost = sorted(str(key) for key in states if key not in known)
        if lost:
            rank_zero_warn(
                f"{source} holds the state of callbacks that this Trainer does not have: {lost}. Add them with the same"
                " arguments if they should go on where they stopped."
            )


def restore_training(
    checkpoint: dict[str, Any],
    source: str,
    *,
    strategy: Strategy,
    progress: Progress,
    results: Results,
    max_epochs: int,
) -> Position:
    """Put back optimizers, schedules, precision, counters and metrics; return where the data stands.

    Raises:
        CheckpointError: for a file that does not hold what a resume needs, or that is of other optimizers.
        MisconfigurationException: for one that stands beyond ``max_epochs`` (-1: no bound).
    """
    from leyden.loops.position import Position  # noqa: PLC0415  # where a fit goes on from a checkpoint

    missing = [key for key in ("optimizer_states", "lr_schedulers") if key not in checkpoint]
    if missing:
        raise WeightsOnlyError(
            f"The checkpoint contains only the model: {source} holds weights only (no {', '.join(missing)}), so"
            " training cannot go on from it. Load the weights with load_from_checkpoint() and start a new fit, or save with"
            " save_weights_only=False."
        )
    if state := checkpoint.get(type(strategy.precision).__qualname__):
        strategy.precision.load_state_dict(state)
    if is_own(strategy, "load_optimizer_state_dict"):
        strategy.load_optimizer_state_dict(checkpoint)
    elif strategy.lightning_restore_optimizer:
        _restore_each(
            "optimizer_states", "optimizers", checkpoint, strategy.optimizers, source, strategy.load_optimizer_state
        )
    schedulers = [schedule.scheduler for schedule in strategy.lr_scheduler_configs]
    _restore_each(
        "lr_schedulers",
        "lr schedulers",
        checkpoint,
        schedulers,
        source,
        lambda scheduler, state: scheduler.load_state_dict(state),
    )
    ours = checkpoint.get("leyden")
    if ours is not None:
        progress.load_state_dict(ours["progress"])
        last, steps = ours.get("last", False), ours.get("steps", True)
        strategy.follow_order(ours.get("order", []))
        strategy.load_own_buffers(ours.get("buffers", {}))
        if "results" in ours:
            metrics = metrics_of(strategy.module)
            results.load_state_dict(ours["results"], metrics)
            if isinstance(ours["metrics"], list):
                from leyden.loops.several import merge  # noqa: PLC0415  # where another number of processes goes on

                merge.put_metrics(metrics, ours["metrics"], strategy.data_rank == 0, strategy.root_device)
            else:
                restore_metrics(metrics, ours["metrics"], strategy.root_device)
    else:
        last, steps = from_lightning(checkpoint, progress)
        ours = {}
        if progress.epoch_done:
            # saved while the epoch was being closed: its metrics are not in the file, so that it can only be counted
            progress.end_epoch(last)
    if 0 <= max_epochs < progress.epoch:
        raise MisconfigurationException(
            f"{source} stands at epoch {progress.epoch}, but Trainer(max_epochs={max_epochs}): raise max_epochs to go on."
        )
    loaders = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
    return Position(ours.get("rng"), ours.get("data"), loaders, last, steps, ours.get("window"))


def _restore_each(key: str, what: str, checkpoint: Mapping[str, Any], parts: list[Any], source: str, load: Any) -> None:
    states = checkpoint[key]
    if len(states) != len(parts):
        raise CheckpointError(
            f"{source} holds the state of {len(states)} {what}, but configure_optimizers() returned {len(parts)}. Resume"
            " with the same optimizers and schedulers."
        )
    for part, state in zip(parts, states, strict=True):
        try:
            load(part, state)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"The state of {type(part).__name__} in {source} does not fit: {error}. Resume with the same model and"
                " configure_optimizers()."
            ) from error
