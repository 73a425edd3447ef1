# SPDX-License-Identifier: Apache-2.0
"""``SaveConfigCallback``: keeps the config of a run beside its logs, so that the run can be had again."""

from __future__ import annotations

import itertools
import os
from typing import Any

from leyden.callback import Callback
from leyden.cli.parser import KEEP_UNSET, LightningArgumentParser
from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info


class SaveConfigCallback(Callback):
    """Writes the config of a command line into the folder of the run, once, when the run begins.

    A config that is there already, of a run before, is never lost and never in the way: where it differs, the new one
    is ``config-v1.yaml``, and so on. With ``semantics="lightning"`` a config that is there ends the run.

    Args:
        parser: The parser that made ``config``.
        config: The settings of the run.
        config_filename: Name of the file.
        overwrite: Write over a config that is there.
        multifile: Where the config came in several files, write as many.
        save_to_log_dir: Write the file. False is for a subclass that has ``save_config``.

    Raises:
        ValueError: for ``save_to_log_dir=False`` without a ``save_config``.
        RuntimeError: with ``semantics="lightning"``, from ``setup``, if the file is there and ``overwrite`` is False.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Any,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        self.parser = parser
        self.config = config
        self.config_filename = config_filename
        self.overwrite = overwrite
        self.multifile = multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False
        if not save_to_log_dir and type(self).save_config is SaveConfigCallback.save_config:
            raise MisconfigurationException(
                "`save_to_log_dir=False` only makes sense when subclassing SaveConfigCallback: nothing would be saved."
                " Override `save_config`, which says where else the config goes."
            )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save the config, before anything else is written."""
        if self.already_saved:
            return
        if self.save_to_log_dir:
            folder = trainer.log_dir
            if folder is None:
                raise MisconfigurationException(
                    "SaveConfigCallback: this run has no folder (trainer.log_dir is None). Give Trainer a"
                    " default_root_dir, or LightningCLI(save_config_callback=None)."
                )
            self._save(trainer, str(folder))
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
            self.already_saved = True
        self.already_saved = trainer.strategy.broadcast(self.already_saved)

    def _save(self, trainer: Any, folder: str) -> None:
        path, refused = os.path.join(folder, self.config_filename), False
        if trainer.is_global_zero and not self.overwrite:
            refused = self._exists(path) and trainer.config.rule("saved_config") == "refuse"
        if trainer.strategy.broadcast(refused):  # all ranks end together
            raise RuntimeError(
                f"SaveConfigCallback: there is a {path} already, of a run before. Aborting to avoid overwriting it. Delete"
                ' it, choose another folder, or say LightningCLI(save_config_kwargs={"overwrite": True}), or'
                " save_config_callback=None to save none."
            )
        if not trainer.is_global_zero:
            return
        if self._exists(path) and not self.overwrite:
            path = self._free(path)
        if path:
            if "://" not in folder:
                os.makedirs(folder, exist_ok=True)
            kwargs = {"overwrite": self.overwrite, "multifile": self.multifile, **KEEP_UNSET}
            self.parser.save(self.config, path, **kwargs)

    def _free(self, path: str) -> str:
        """Return the first name that nobody has, or an empty one where the config itself is there."""
        stem, suffix = os.path.splitext(path)
        wanted = self.parser.dump(self.config, **KEEP_UNSET)
        for name in itertools.chain([path], (f"{stem}-v{number}{suffix}" for number in itertools.count(1))):
            if not self._exists(name):
                rank_zero_info("%s is there already; the config of this run is %s.", path, os.path.basename(name))
                return name
            if self._read(name) == wanted:
                return ""
        raise AssertionError("unreachable")

    def _exists(self, path: str) -> bool:
        if "://" not in path:
            return os.path.isfile(path)
        import fsspec  # noqa: PLC0415  # only for remote folders

        system, name = fsspec.core.url_to_fs(path)
        return bool(system.isfile(name))

    def _read(self, path: str) -> str:
        import fsspec  # noqa: PLC0415  # only where a config is there already

        with fsspec.open(path, "r") as file:
            return str(file.read())

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Override to save the config somewhere else, too: ``self.parser.dump(self.config)`` is its text.

        Called on rank 0 only, so that no rank may be waited for here.
        """
