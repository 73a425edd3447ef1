# SPDX-License-Identifier: Apache-2.0
"""Each framework, the way its own documentation trains a model: from a workload to a run that is ready to be timed.

All get the same network, loader, optimizer and loss, keep the loss of each step in their usual way, write no checkpoint,
draw no bar and validate nothing, unless a row says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harness import Contender, Prepare, Prepared
from workloads import Workload

RECORDED, BARE = "a loop with loss.item() each step", "a loop that records nothing"


def by_hand(work: Workload, folder: str, *, record: bool = True, parallel: bool = False) -> Prepared:
    """The loop that anybody writes; with ``record`` it keeps ``loss.item()`` of each step; ``parallel``: one of several."""
    network, loader = work.timed_network(), work.loader()
    optimizer = work.make_optimizer(network.parameters())
    if parallel:
        network = torch.nn.parallel.DistributedDataParallel(network)

    def run() -> None:
        losses = []
        for _ in range(work.epochs):
            for inputs, targets in loader:
                loss = work.loss(network(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if record:
                    losses.append(loss.item())

    return Prepared(run, network.parameters)


def with_fabric(work: Workload, folder: str, *, name: str = "leyden") -> Prepared:
    """The bare loop by hand through Fabric: ``"leyden"``'s or ``"lightning"``'s. Batches in memory need no set-up."""
    fabric = importlib.import_module(name).Fabric(accelerator="cpu", devices=1)
    network = work.timed_network()
    model, optimizer = fabric.setup(network, work.make_optimizer(network.parameters()))
    loader = work.loader()
    if isinstance(loader, DataLoader):
        loader = fabric.setup_dataloaders(loader)

    def run() -> None:
        for _ in range(work.epochs):
            for inputs, targets in loader:
                loss = work.loss(model(inputs), targets)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()

    return Prepared(run, network.parameters)


def with_trainer(
    work: Workload,
    folder: str,
    *,
    name: str = "leyden",
    metrics: int = 1,
    every: int = 50,
    attach: bool = False,
    callbacks: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Prepared:
    """Fit on a framework with Lightning's API: ``"leyden"`` or ``"lightning.pytorch"``.

    Args:
        work: What is trained.
        folder: Where logs and checkpoints go.
        name: What to import.
        metrics: How many values each step logs; the first is the loss.
        every: ``log_every_n_steps``.
        attach: Whether ModelCheckpoint, EarlyStopping, LearningRateMonitor and CSVLogger take part.
        callbacks: How many callbacks with an ``on_train_batch_end`` that does nothing take part.
        arguments: Further arguments of the Trainer.
    """
    L = importlib.import_module(name)
    known = importlib.import_module(f"{name}.callbacks")
    loggers = importlib.import_module(f"{name}.loggers")
    more = [f"metric_{index}" for index in range(1, metrics)]

    class Module(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = work.timed_network()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            loss = work.loss(self.net(inputs), targets)
            if metrics:
                self.log("loss", loss, batch_size=work.batch_size)
            for each in more:
                self.log(each, loss, batch_size=work.batch_size)
            return loss

        def configure_optimizers(self) -> Any:
            return work.make_optimizer(self.parameters())

    class Nothing(L.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, *args: Any) -> None:
            pass

    parts: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    if attach:
        parts["logger"], parts["enable_checkpointing"] = loggers.CSVLogger(folder), True
        parts["callbacks"] = [
            known.ModelCheckpoint(monitor="loss"),
            known.EarlyStopping("loss", check_on_train_epoch_end=True),
            known.LearningRateMonitor("step"),
        ]
    parts["callbacks"] = [*parts.get("callbacks", []), *(Nothing() for _ in range(callbacks))]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=work.epochs,
        log_every_n_steps=every,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **parts,
        **{"devices": 1, **(arguments or {})},
    )
    module, loader = Module(), work.loader()
    return Prepared(lambda: trainer.fit(module, loader), module.net.parameters)


def with_accelerate(work: Workload, folder: str) -> Prepared:
    """The loop by hand through the objects of Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network, loader = work.timed_network(), work.loader()
    network, optimizer = accelerator.prepare(network, work.make_optimizer(network.parameters()))
    if isinstance(loader, torch.utils.data.DataLoader):
        loader = accelerator.prepare(loader)

    def run() -> None:
        losses = []
        for _ in range(work.epochs):
            for inputs, targets in loader:
                loss = work.loss(network(inputs), targets)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                losses.append(loss.item())

    return Prepared(run, network.parameters)


class _Named:
    """Batches as the dicts that transformers' Trainer wants."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset = getattr(loader, "dataset", loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for inputs, targets in self.loader:
            yield {"inputs": inputs, "targets": targets}

    def __len__(self) -> int:
        return len(self.loader)


def with_transformers(work: Workload, folder: str) -> Prepared:
    """The Trainer of Hugging Face's transformers."""
    from transformers import Trainer, TrainingArguments

    network, loader = work.timed_network(), _Named(work.loader())
    optimizer = work.make_optimizer(network.parameters())

    class Mine(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return loader

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return work.loss(model(inputs["inputs"]), inputs["targets"])

    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=work.epochs,
        per_device_train_batch_size=work.batch_size,
        max_grad_norm=0.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
    )
    steady = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Mine(network, arguments, train_dataset=loader.dataset, optimizers=(optimizer, steady), callbacks=[])
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)

    def run() -> None:
        generator = torch.get_rng_state()
        # the Trainer seeds everything anew when it begins; the order of the data is to be that of the others
        begin, trainer.get_train_dataloader = trainer.get_train_dataloader, lambda: _reseeded(generator, loader)
        trainer.train()
        trainer.get_train_dataloader = begin

    return Prepared(run, network.parameters)


def _reseeded(state: Tensor, loader: Any) -> Any:
    torch.set_rng_state(state)
    return loader


def with_keras(work: Workload, folder: str) -> Prepared:
    """Keras on its torch backend, with a torch module in a wrapper; its optimizers are its own."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    network, loader = work.timed_network(), work.loader()
    inputs, targets = next(iter(loader))
    kind = targets.dtype  # Keras makes floats of the targets
    model = keras.Sequential(
        [keras.Input(inputs.shape[1:], dtype=inputs.dtype), keras.layers.TorchModuleWrapper(network)]
    )
    optimizer = getattr(keras.optimizers, work.optimizer.__name__)(learning_rate=work.lr)
    model.compile(optimizer, loss=lambda wanted, outputs: work.loss(outputs, wanted.to(kind)), jit_compile=False)

    def forever() -> Iterator[Any]:
        while True:
            yield from ((inputs, targets) for inputs, targets in loader)

    return Prepared(
        lambda: model.fit(forever(), steps_per_epoch=len(loader), epochs=work.epochs, verbose=0, shuffle=False),
        network.parameters,
    )


def with_fastai(work: Workload, folder: str) -> Prepared:
    """fastai's Learner with its Recorder, on the same loader."""
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class Both:
        """What a Learner asks of its loaders."""

        def __init__(self, loader: Any) -> None:
            self.train, self.valid, self.device = loader, [], torch.device("cpu")

        def __getitem__(self, index: int) -> Any:
            return (self.train, self.valid)[index]

    network, loader = work.timed_network(), work.loader()
    learner = Learner(
        Both(loader),
        network,
        loss_func=work.loss,
        opt_func=lambda params, lr, **options: OptimWrapper(params, work.optimizer, lr=work.lr),
        path=folder,
        train_bn=True,
    )

    def run() -> None:
        with learner.no_logging():
            learner.fit(work.epochs, lr=work.lr)

    return Prepared(run, network.parameters)


def with_ignite(work: Workload, folder: str) -> Prepared:
    """Ignite's supervised trainer."""
    from ignite.engine import create_supervised_trainer

    network, loader = work.timed_network(), work.loader()
    optimizer = work.make_optimizer(network.parameters())
    engine = create_supervised_trainer(network, optimizer, work.loss)
    return Prepared(lambda: engine.run(loader, max_epochs=work.epochs), network.parameters)


def with_skorch(work: Workload, folder: str) -> Prepared:
    """skorch's NeuralNet, without validation split and printing."""
    from skorch import NeuralNet

    class Loss(torch.nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return work.loss(outputs, targets)

    network, loader = work.timed_network(), work.loader()
    net = NeuralNet(
        network,
        Loss,
        optimizer=work.optimizer,
        lr=work.lr,
        max_epochs=work.epochs,
        batch_size=work.batch_size,
        train_split=None,
        iterator_train=lambda dataset, **options: loader,
        callbacks__print_log=None,
        device="cpu",
        verbose=0,
    ).initialize()
    data = getattr(loader, "dataset", None)
    data = [(torch.zeros(1), torch.zeros(1))] * work.batch_size if data is None else data
    return Prepared(lambda: net.partial_fit(data, None), lambda: net.module_.parameters())


def with_torchtnt(work: Workload, folder: str) -> Prepared:
    """torchtnt's AutoUnit and its train loop."""
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    class Unit(AutoUnit):  # type: ignore[type-arg, misc]
        def compute_loss(self, state: Any, data: Any) -> tuple[Tensor, Any]:
            inputs, targets = data
            outputs = self.module(inputs)
            return work.loss(outputs, targets), outputs

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> Any:
            return work.make_optimizer(module.parameters()), None

        def on_train_step_end(self, *args: Any) -> None:
            losses.append(args[-1].loss.item())

    losses: list[float] = []
    unit, loader = Unit(module=work.timed_network(), device=torch.device("cpu")), work.loader()
    return Prepared(lambda: train(unit, loader, max_epochs=work.epochs), lambda: unit.module.parameters())


PEERS: dict[str, tuple[str, Callable[[Workload, str], Prepared]]] = {
    "accelerate": ("accelerate", with_accelerate),
    "ignite": ("ignite", with_ignite),
    "skorch": ("skorch", with_skorch),
    "torchtnt": ("torchtnt", with_torchtnt),
    "lightning, self.log": ("lightning", lambda work, folder: with_trainer(work, folder, name="lightning.pytorch")),
    "fastai": ("fastai", with_fastai),
    "transformers Trainer": ("transformers", with_transformers),
    "keras (torch)": ("keras", with_keras),
}
"""From the name of a row to the package that it needs and the way to prepare it."""


def installed() -> dict[str, str]:
    """Return the versions of the peers that are installed, by package."""
    from importlib import metadata

    found = {}
    for package, _ in PEERS.values():
        if importlib.util.find_spec(package):
            for distribution in (package, f"pytorch-{package}"):
                try:
                    found[package] = metadata.version(distribution)
                    break
                except metadata.PackageNotFoundError:
                    continue
    return found


def bound(prepare: Callable[..., Prepared], work: Workload, **options: Any) -> Prepare:
    """Fix what is trained, so that only the folder is missing."""
    return lambda folder: prepare(work, folder, **options)


def loops(work: Workload) -> dict[str, Prepare]:
    """Return the two loops by hand."""
    return {RECORDED: bound(by_hand, work), BARE: bound(by_hand, work, record=False)}


def contenders(work: Workload, only: str = "", arguments: Iterable[Mapping[str, Any]] = ()) -> list[Contender]:
    """Return Leyden and every peer that is installed, each compared with the loop that keeps its losses.

    Args:
        work: What is trained.
        only: Only the rows whose name contains this.
        arguments: Further arguments of our Trainer; each mapping of them is one more row.
    """
    rows = [
        Contender("leyden, self.log", bound(with_trainer, work), RECORDED),
        Contender("leyden, nothing logged", bound(with_trainer, work, metrics=0), BARE),
    ]
    for each in arguments:
        name = ", ".join(["leyden, self.log", *(f"{argument}={value}" for argument, value in each.items())])
        rows.append(Contender(name, bound(with_trainer, work, arguments=each), RECORDED))
    there = installed()
    rows += [Contender(name, bound(way, work), RECORDED) for name, (package, way) in PEERS.items() if package in there]
    return [row for row in rows if only in row.name]
