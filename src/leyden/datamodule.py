# SPDX-License-Identifier: Apache-2.0
"""``LightningDataModule``: data sets, splits and loaders in one object that can be shared between models."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset

from leyden.hparams import HyperparametersMixin
from leyden.loading import class_only, load_from_checkpoint
from leyden.module_hooks import DataHooks

D = TypeVar("D", bound="LightningDataModule")


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Everything about the data of an experiment.

    Write ``prepare_data`` (download), ``setup(stage)`` (split) and the ``*_dataloader`` methods you need.
    ``setup(stage)`` is called at the start of every entry point: guard a random split, or seed it.
    """

    name: str | None = None
    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # a class beside us in the bases of a user's may take some

    @property
    def trainer(self) -> Any:
        """The Trainer that runs, or last ran, with this data module; None if there is none, or it is gone."""
        found = self.__dict__.get("_trainer_ref")  # a subclass need not call our constructor
        return None if found is None else found()

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        # weak: a data module never keeps its trainer alive, so both are freed as soon as the user lets go of them
        self._trainer_ref = None if trainer is None else weakref.ref(trainer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer_ref": None}

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> LightningDataModule:
        """Build a data module from data sets, or lists or dicts of them; the training set is shuffled.

        Args:
            train_dataset: And the other three: None for those you do not need.
            batch_size: Samples in a batch, in all loaders.
            num_workers: Worker processes of each loader.
            **datamodule_kwargs: Passed to the constructor of the class.
        """

        def loader(dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            shuffle = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)

        def loaders(datasets: Any, shuffle: bool = False) -> Any:
            if isinstance(datasets, Mapping):
                return {key: loader(dataset, shuffle) for key, dataset in datasets.items()}
            if isinstance(datasets, Sequence) and not isinstance(datasets, Dataset):
                return [loader(dataset, shuffle) for dataset in datasets]
            return loader(datasets, shuffle)

        accepted = inspect.signature(cls.__init__).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        special = {"batch_size": batch_size, "num_workers": num_workers}
        given = {name: value for name, value in special.items() if takes_any or name in accepted}
        datamodule = cls(**{**given, **datamodule_kwargs}) if cls is not LightningDataModule else cls()
        for name, datasets, shuffle in (
            ("train_dataloader", train_dataset, True),
            ("val_dataloader", val_dataset, False),
            ("test_dataloader", test_dataset, False),
            ("predict_dataloader", predict_dataset, False),
        ):
            if datasets is not None:
                setattr(datamodule, name, lambda datasets=datasets, shuffle=shuffle: loaders(datasets, shuffle))
        return datamodule

    def state_dict(self) -> dict[str, Any]:
        """Return what must be in a checkpoint for this data module to resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when any exception ends a run with this data module."""

    @class_only
    def load_from_checkpoint(
        cls: type[D],
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> D:
        """Build a data module from the constructor arguments and the state in a checkpoint; see LightningModule's."""
        result: D = load_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, None, weights_only, kwargs)
        return result

    def __str__(self) -> str:
        """Name the data sets that can be found without setting anything up, with their sizes."""
        lines = []
        for stage in ("train", "val", "test", "predict"):
            found = _find_dataset(self, f"{stage}_dataloader")
            lines.append(f"{{{stage.capitalize()} dataset: {found}}}")
        return "\n".join(lines)


def _find_dataset(datamodule: LightningDataModule, method: str) -> str:
    if method not in vars(datamodule) and getattr(type(datamodule), method) is getattr(DataHooks, method):
        return "None"
    try:
        loader = getattr(datamodule, method)()
    except Exception:  # __str__ must not fail: a loader that needs setup() is simply not known yet
        return "not available yet (call setup first)"
    loaders: Iterable[Any] = (
        loader.values() if isinstance(loader, Mapping) else loader if isinstance(loader, list) else [loader]
    )
    parts = []
    for item in loaders:
        dataset = getattr(item, "dataset", item)
        try:
            parts.append(f"size={len(dataset)}")
        except TypeError:
            parts.append("size=unknown")
    return "; ".join(parts)
