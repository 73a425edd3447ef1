# SPDX-License-Identifier: Apache-2.0
"""The same ranks as actors of a Ray cluster, a real one that is started once for these tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from leyden.callbacks import ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.strategies import DDPStrategy, OnRay
from leyden.strategies.launch.ray import visible
from ranks import Broken, Judged, Net, data, make_trainer
from ray_model import Dies, Waits

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets and processes
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The weights of a fit that nobody kills, and the random numbers after it; made before Ray's threads are there."""
    module, _ = _fit(tmp_path_factory.mktemp("ray") / "whole", "ddp_fork")
    return [parameter.detach() for parameter in module.parameters()], torch.rand(3)


@pytest.fixture(scope="module", autouse=True)
def cluster(whole: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ends = signal.getsignal(signal.SIGTERM)
        ray.init(
            address="local", _node_ip_address="127.0.0.1", num_cpus=2, include_dashboard=False, log_to_driver=False,
            configure_logging=False,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, ends)  # Ray has put its own there


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: None) -> Iterator[None]:
    yield
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert ray.available_resources()["CPU"] == 2  # no actor, and no room that is kept for one


def _loader() -> Any:
    return DataLoader(data(24), 3, shuffle=True)


def _fit(folder: Path, strategy: Any) -> tuple[Judged, Any]:
    folder.mkdir()
    torch.manual_seed(0)
    module = Dies(folder)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    more: dict[str, Any] = {"default_root_dir": folder, "enable_checkpointing": True}
    trainer = make_trainer(2, strategy=strategy, max_epochs=3, callbacks=[saving], **more)
    if folder.name == "whole":
        (folder / "died").touch()
    trainer.fit(module, _loader(), DataLoader(data(7), 2))
    assert (trainer.global_step, trainer.current_epoch, trainer.state.finished) == (12, 3, True)
    assert trainer.callback_metrics["count"] == 7
    assert Path(saving.best_model_path).parent == folder
    return module, trainer


def test_a_rank_that_dies_is_started_anew_by_ray_and_the_fit_goes_on_exactly(tmp_path: Path, whole: Any) -> None:
    with pytest.warns(UserWarning, match=r"The actor of rank 1 .* is gone.* All ranks start anew \(1 of 2\)"):
        module, _ = _fit(tmp_path / "torn", DDPStrategy(start_method=OnRay(max_restarts=2)))
    assert (tmp_path / "torn" / "starts").read_text().split() == ["0", "6"]
    weights, numbers = whole
    assert torch.equal(torch.rand(3), numbers)  # the generators of the one that called have gone on as well
    for one, other in zip(module.parameters(), weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_each_entry_point_runs_in_actors() -> None:
    module, trainer = Judged(), make_trainer(strategy="ddp_ray")
    (tested,) = trainer.test(module, DataLoader(data(7), 2), verbose=False)
    (alone,) = make_trainer(1).test(module, DataLoader(data(7), 2), verbose=False)
    assert tested == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
def test_d1_the_traceback_of_the_rank_that_failed_first_is_the_error() -> None:
    with pytest.raises(Exception, match="(?s)Rank 1 ended with the following.*broken on rank 1") as caught:
        make_trainer(strategy="ddp_ray", max_epochs=1).fit(Broken(), _loader())
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.slow
def test_ctrl_c_reaches_the_ranks_and_fit_returns(tmp_path: Path) -> None:
    def press() -> None:
        while not all((tmp_path / f"waits{rank}").exists() for rank in (0, 1)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    trainer = make_trainer(strategy="ddp_ray", max_epochs=1000, default_root_dir=tmp_path)
    trainer.fit(Waits(tmp_path), _loader())
    thread.join()
    assert trainer.interrupted
    assert 0 < trainer.global_step < 4000


@pytest.mark.slow  # it waits until Ray has said often enough that there is no room
def test_more_than_the_cluster_has_is_an_error_that_says_what_it_has() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"cannot give a node with \{'CPU': 3\}: .* \{'CPU': 2.0\} in all"
    ):
        make_trainer(3, strategy="ddp_ray").fit(Net(), _loader())


@pytest.mark.slow
def test_a_rank_that_dies_without_restarts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"The actor of rank 1 .* is gone.*OnRay\(max_restarts=n\)"):
        make_trainer(strategy="ddp_ray", max_epochs=3, default_root_dir=tmp_path).fit(Dies(tmp_path), _loader())


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"OnRay\(max_restarts=-1\) is not valid"):
        OnRay(max_restarts=-1)
    with pytest.raises(MisconfigurationException, match=r"start_method='rays'\) is not valid.*'ray'\], or an OnRay"):
        DDPStrategy(start_method="rays")
    with pytest.raises(MisconfigurationException, match="devices is the number of GPUs of each node"):
        make_trainer("auto", strategy="ddp_ray", accelerator="gpu")


def test_gpus_of_the_cluster_need_not_be_here() -> None:
    trainer = make_trainer(2, strategy="ddp_ray", accelerator="gpu", num_nodes=3)
    assert trainer.world_size == 6
    assert trainer.strategy.parallel_devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert OnRay()._each("cuda") == {"CPU": 1, "GPU": 1}
    assert OnRay(num_cpus=2, num_gpus=0.5, resources={"big": 1})._each("cuda") == {"CPU": 2, "GPU": 0.5, "big": 1}
    assert visible([[2], ["0"]]) == "2,0"
    assert visible([[], []]) is None
