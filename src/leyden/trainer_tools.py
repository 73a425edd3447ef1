# SPDX-License-Identifier: Apache-2.0
"""What a Trainer can say of a fit ahead of it: whether it can be resumed, what would make it faster, where it fits."""

from __future__ import annotations

from typing import Any

from leyden.runtime.ranks import say


class TrainerTools:
    """The tools of the Trainer, each imported when it is called."""

    _session: Any

    def rehearsal(self) -> Any:
        """Return what runs batches of the present run on trial, in a hook, and puts everything back afterwards.

        See :class:`~leyden.loops.rehearsal.Rehearsal`.

        Raises:
            MisconfigurationException: outside of a run.
        """
        from leyden.loops.rehearsal import Rehearsal  # noqa: PLC0415  # only who tries something

        return Rehearsal(self, self._session)

    def verify_resume(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        steps: int = 10,
    ) -> Any:
        """Prove that this fit can be resumed: print and return a report that is true if it can, bit for bit.

        Copies of everything run in other processes: one for ``steps`` training batches, with a checkpoint halfway, and a
        fresh one that goes on from there. Here nothing changes, nothing is logged, and no file stays behind. What cannot
        be pickled can be verified by ``leyden verify-resume script.py``.

        Args:
            model: As in ``fit``, like the other three.
            train_dataloaders: Without ``__main__`` classes, or with cloudpickle installed, or in a guarded script.
            val_dataloaders: See ``train_dataloaders``.
            datamodule: See ``train_dataloaders``.
            steps: Training batches; at least 2.

        Raises:
            MisconfigurationException: if something cannot be pickled, or the fit fails or is too short.
        """
        from leyden.loops.studies.verify import verify_objects  # noqa: PLC0415  # only who asks for a proof

        loaders = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
        report = verify_objects(self, steps, model=model, datamodule=datamodule, **loaders)
        say(str(report))
        return report

    def advise(self, model: Any, train_dataloaders: Any = None, datamodule: Any = None, seconds: float = 3.0) -> Any:
        """Measure what would make this fit faster: print a table and return it, with ``rows`` and ``arguments`` as data.

        Copies train for some seconds as the fit is, and with each of: compiled, fused optimizers, bf16, channels_last,
        more workers, TF32, CUDA graphs; then with all that gained. Nothing changes: not the module, the generators, the
        loaders, a file or a log. Callbacks are left out, and validation, but for callbacks of ours that are part of the
        training: accumulation, averaging, finetuning. One of your own that changes the model is left out too.

        Args:
            model: As in ``fit``, like the other two.
            train_dataloaders: Data of more than 64 MB are not copied but read.
            datamodule: See ``train_dataloaders``; a copy is set up once.
            seconds: For each of them, the fit as it is beside it included; a few updates at least.

        Raises:
            MisconfigurationException: for what cannot be copied, a fit too short, or several processes.
        """
        from leyden.loops.studies.advise import advise  # noqa: PLC0415  # only who asks for advice

        return advise(self, model, train_dataloaders, datamodule, seconds)

    def plan(
        self, model: Any, devices: int | None = None, nodes: int | None = None, batch: Any = None, memory: Any = None
    ) -> Any:
        """Say what each strategy would need for this model: print a table and return it, with ``rows`` as data.

        Bytes on each device for weights, gradients, optimizer state and activations, what each device sends for an update
        and by how many exchanges, whether that fits, and what to take. It is measured on a copy that has shapes and no
        memory, so the model may be larger than this machine: built under ``torch.device("meta")`` or in
        ``configure_model``. Nothing changes, no process is started, no device is used.

        Args:
            model: Usually a LightningModule; with the precision, ``fused_optimizers`` and accumulation of this Trainer.
            devices: On each node; None is as many as this Trainer uses.
            nodes: None is as many as this Trainer uses.
            batch: What one device gets for one step: its activations are measured in ``training_step``. A loader or a data
                module that is set up gives its first. None leaves activations unknown.
            memory: Of a device: ``"80GB"``, ``"79.6GiB"`` or bytes; None is that of this Trainer's GPU, else not known.

        Raises:
            MisconfigurationException: for an argument that is not valid, or a model that cannot be copied or built.
        """
        from leyden.loops.studies.plan import plan  # noqa: PLC0415  # only who asks for a plan

        return plan(self, model, devices, nodes, batch, memory)
