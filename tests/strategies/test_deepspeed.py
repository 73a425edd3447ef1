# SPDX-License-Identifier: Apache-2.0
"""Names, arguments and configurations of DeepSpeedStrategy, all without DeepSpeed; real fits are in tests/distributed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.loops.hardware import STRATEGIES
from leyden.precision.deepspeed import DeepSpeedPrecision
from leyden.precision.double import DoublePrecision
from leyden.strategies import DeepSpeedStrategy
from leyden.strategies import deepspeed_arguments as arguments

INSTALLED = importlib.util.find_spec("deepspeed") is not None
NAMES = {
    "deepspeed": (2, None, None),
    "deepspeed_stage_1": (1, None, None),
    "deepspeed_stage_2": (2, None, None),
    "deepspeed_stage_3": (3, None, None),
    "deepspeed_stage_1_offload": (1, "cpu", None),
    "deepspeed_stage_2_offload": (2, "cpu", None),
    "deepspeed_stage_3_offload": (3, "cpu", "cpu"),
    "deepspeed_stage_3_offload_nvme": (3, "nvme", "nvme"),
}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DeepSpeed were installed: a strategy can be made, but not run."""
    monkeypatch.setattr(arguments, "require_installed", lambda stage, offload: None)


def complete(config: dict[str, Any], **given: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"precision": "32-true", "scaling": {}, "accumulate": 1, "clip": None, "world_size": 2}
    return arguments.complete(config, **{**known, **given})


@pytest.mark.parametrize(("name", "means"), NAMES.items())
def test_names(there: None, name: str, means: tuple[int, str | None, str | None]) -> None:
    strategy: Any = L.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False).strategy
    assert type(strategy) is DeepSpeedStrategy
    zero = strategy.config["zero_optimization"]
    found = (zero["stage"], *(zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")))
    assert found == means
    assert strategy.stage == means[0]


def test_all_names_are_registered() -> None:
    assert {name for name in STRATEGIES if name.startswith("deepspeed")} == set(NAMES)


@pytest.mark.skipif(INSTALLED, reason="deepspeed is installed")
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("deepspeed", "SHARD_GRAD_OP"),
        ("deepspeed_stage_1", "SHARD_GRAD_OP"),
        ("deepspeed_stage_3", "strategy='fsdp'"),
        ("deepspeed_stage_3_offload_nvme", "fsdp_cpu_offload"),
    ],
)
def test_without_deepspeed_the_error_names_the_package_and_what_does_the_same(name: str, instead: str) -> None:
    with pytest.raises(MisconfigurationException, match="pip install deepspeed") as caught:
        L.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)
    assert instead in str(caught.value)


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(MisconfigurationException, match=r"Did you mean 'deepspeed_stage_3'"):
        L.Trainer(accelerator="cpu", devices=2, strategy="deepspeed_stage3", logger=False)


def test_arguments_are_those_of_the_configuration(there: None) -> None:
    config = DeepSpeedStrategy(
        stage=3, offload_optimizer=True, offload_parameters=True, offload_params_device="nvme", nvme_path="/fast",
        params_buffer_count=7, overlap_comm=False, reduce_bucket_size=1000, partition_activations=True, thread_count=2,
        logging_batch_size_per_gpu=8,
    ).config  # fmt: skip
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (3, False, 1000)
    assert zero["offload_optimizer"] == {
        "device": "cpu", "nvme_path": "/fast", "buffer_count": 4, "pin_memory": False
    }  # fmt: skip
    assert zero["offload_param"]["device"] == "nvme"
    assert zero["offload_param"]["buffer_count"] == 7
    assert config["activation_checkpointing"]["partition_activations"] is True
    assert config["aio"]["thread_count"] == 2
    assert config["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stages": 2}, r"stages=\.\.\..*Did you mean 'stage'"),
        ({"stage": 4}, "1, 2 or 3"),
        ({"stage": 0}, "strategy='ddp'"),
        ({"zero_optimization": False}, "strategy='ddp'"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer='cpu'.*True or False"),
        ({"offload_optimizer_device": "nvm"}, "Did you mean 'nvme'"),
        ({"offload_parameters": True}, "stage=3"),
        ({"offload_optimizer": True, "offload_optimizer_device": "nvme"}, "stage=3"),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size=0.*>= 1"),
        ({"loss_scale": -1}, "loss_scale=-1"),
        ({"logging_batch_size_per_gpu": "all"}, "'auto' or an int"),
        ({"remote_device": "cuda"}, "remote_device='cuda'"),
        ({"config": 3}, "a dict, or the path"),
        ({"config": "/no/such.json"}, "cannot be read"),
        ({"config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}}, "configure_optimizers"),
        ({"config": {}}, "strategy='ddp'"),
        ({"start_method": "thread"}, "start_method='thread'"),
    ],
)
def test_each_argument_is_checked(there: None, given: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        DeepSpeedStrategy(**given)


def test_a_configuration_as_dict_as_file_and_by_variable(
    there: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "train_batch_size": "auto"}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(given))
    wanted = {"zero_optimization": {"stage": 3}}
    assert DeepSpeedStrategy(config=given).config == wanted
    assert given["train_batch_size"] == "auto"  # what is the user's is left alone
    assert DeepSpeedStrategy(config=file).config == wanted
    monkeypatch.setenv(arguments.CONFIG_VARIABLE, str(file))
    assert DeepSpeedStrategy().config == wanted
    monkeypatch.setenv(arguments.CONFIG_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(MisconfigurationException, match=arguments.CONFIG_VARIABLE):
        DeepSpeedStrategy()


ZERO = {"zero_optimization": {"stage": 2}}


def test_the_trainer_says_accumulation_clipping_and_precision() -> None:
    done = complete({**ZERO, "gradient_accumulation_steps": 4}, accumulate=4, clip=0.5, precision="bf16-mixed")
    assert done["gradient_accumulation_steps"] == 1  # losses are divided by us
    assert done["gradient_clipping"] == 0.5
    assert done["bf16"]["enabled"] is True
    assert "fp16" not in done
    assert complete(ZERO)["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    half = complete(
        {**ZERO, "fp16": {"hysteresis": 5}}, precision="16-mixed", scaling={"loss_scale": 8, "hysteresis": 2}
    )
    assert half["fp16"] == {"enabled": True, "loss_scale": 8, "hysteresis": 5}
    assert complete({**ZERO, "train_batch_size": 32}, accumulate=2)["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("config", "given", "says"),
    [
        ({"gradient_accumulation_steps": 2}, {}, "gradient_accumulation_steps=2.*accumulate_grad_batches=1"),
        ({"gradient_clipping": 1.0}, {"clip": 0.5}, "gradient_clipping=1.0.*gradient_clip_val=0.5"),
        ({"train_batch_size": 7}, {}, "do not go together"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}, {}, "do not go together"),
        ({"bf16": {"enabled": True}}, {}, r"precision='bf16-mixed'"),
        ({"fp16": {"enabled": False}}, {"precision": "16-mixed"}, r"precision='32-true'"),
    ],
)
def test_what_contradicts_the_trainer(config: dict[str, Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        complete({**ZERO, **config}, **given)


def test_precision_is_deepspeeds(there: None) -> None:
    strategy = L.Trainer(
        accelerator="cpu", devices=2, strategy="deepspeed", precision="bf16-mixed", logger=False
    ).strategy
    assert type(strategy.precision) is DeepSpeedPrecision
    assert strategy.precision.dtype == torch.bfloat16
    x = torch.ones(2)
    assert strategy.precision.convert_input(x) is x  # outside a fit the module is plain
    strategy.precision.engine = object()
    assert (
        strategy.precision.convert_input({"x": x, "n": torch.ones(2, dtype=torch.int64)})["x"].dtype == torch.bfloat16
    )
    with pytest.raises(MisconfigurationException, match="64-true"):
        strategy.precision = DoublePrecision()


def test_lightnings_signature(there: None) -> None:
    strategy = DeepSpeedStrategy(None, True, 3)  # by position, as in Lightning
    assert strategy.stage == 3
