# SPDX-License-Identifier: Apache-2.0
"""The small things by subject: what each returns, and what it raises."""

from __future__ import annotations

import operator
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leyden import LightningModule
from leyden.callbacks import settings as settings_of
from leyden.compat.demos import boring_classes as boring
from leyden.compat.demos.lstm import SequenceSampler
from leyden.compat.demos.transformer import Transformer, tokenize
from leyden.compat.pieces import available, closures, environ, files, migration, parsing, samplers, settings, tensors
from leyden.compat.pieces.compiled import from_compiled, to_uncompiled
from leyden.compat.pieces.runif import runif_reasons
from leyden.compat.pieces.say import WarningCache, rank_prefixed_message
from leyden.compat.pieces.words import LightningEnum, Optimizable, Steppable
from leyden.compat.serve import ServableModule, ServableModuleValidator
from leyden.errors import LeydenWarning, MisconfigurationException, PossibleUserWarning
from leyden.runtime import memory
from leyden.runtime.ranks import rank_zero_warn


def test_flags_compare_release_numbers() -> None:
    assert available._TORCH_GREATER_EQUAL_2_5
    assert not available._TORCH_LESS_EQUAL_2_6 or torch.__version__.startswith("2.6")
    assert available._PYTHON_GREATER_EQUAL_3_10_0
    assert available.compare_version("torch", operator.lt, "99")
    assert not available.compare_version("no-such-package", operator.ge, "0")
    assert available.Requirement("torch>=2.0,<99")
    missing = available.Requirement("no-such-package>=1")
    assert not missing
    assert "pip install 'no-such-package>=1'" in str(missing)
    with pytest.raises(AttributeError):
        available._NOTHING


def test_words_compare_whatever_their_case() -> None:
    class Kind(LightningEnum):
        ONE = "first"

    assert Kind.ONE == "FIRST"
    assert Kind.from_str("one") is Kind.from_str("First", source="value") is Kind.ONE
    with pytest.raises(ValueError, match=r"expected one of \['ONE'\]"):
        Kind.from_str("two")
    with pytest.warns(UserWarning, match="expected one of"):
        assert Kind.try_from_str("two") is None
    sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert isinstance(sgd, Optimizable)
    assert isinstance(sgd, Steppable)


def test_numbers_become_tensors_and_back() -> None:
    made = tensors.convert_to_tensors({"a": True, "b": [1, 2.5], "c": "x"}, "cpu")
    assert (made["a"].dtype, made["b"][0].dtype, made["b"][1].dtype) == (torch.uint8, torch.int, torch.float)
    assert tensors.convert_tensors_to_scalars(made) == {"a": 1, "b": [1, 2.5], "c": "x"}
    with pytest.raises(ValueError, match="no single number"):
        tensors.convert_tensors_to_scalars([torch.ones(2)])


def test_shared_parameters_are_found_and_tied_again() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    assert tensors.find_shared_parameters(net) == [["a.weight", "b.weight"]]
    net["b"].weight = nn.Parameter(torch.zeros(2, 2))
    assert tensors.set_shared_parameters(net, [["a.weight", "b.weight"]])["b"].weight is net["a"].weight


def test_errors_of_memory_are_known_by_what_they_say() -> None:
    assert memory.is_oom_error(RuntimeError("CUDA error: out of memory"))
    assert memory.is_oom_error(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not memory.is_oom_error(RuntimeError("other"))
    assert not memory.is_oom_error(ValueError("CUDA out of memory"))
    tensors.check_finite_loss(torch.tensor(1.0))
    with pytest.raises(ValueError, match="not finite"):
        tensors.check_finite_loss(torch.tensor(float("nan")))


def test_batch_sizes() -> None:
    assert samplers.extract_batch_size({"a": torch.ones(3, 2), "b": [torch.ones(3)]}) == 3
    assert samplers.extract_batch_size(torch.tensor(1.0)) == 1
    with pytest.raises(MisconfigurationException, match="batch_size="):
        samplers.extract_batch_size("text")
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(RecursionError, match="batch_size="):
        samplers.extract_batch_size(nested)
    assert samplers.sized_len(iter([])) is None
    with pytest.warns(LeydenWarning, match="length 0"):
        assert samplers.has_len([])
    with pytest.raises(ValueError, match="1 or more"):
        samplers.suggested_max_num_workers(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_sampler_draws_is_shared_out(rank: int) -> None:
    drawn = [7, 1, 4, 9, 2]
    shares = samplers.UnrepeatedDistributedSamplerWrapper(drawn, num_replicas=2, rank=rank, shuffle=False)
    assert list(shares) == drawn[rank::2]
    assert len(shares) == 3 - rank
    padded = samplers.DistributedSamplerWrapper(drawn, num_replicas=2, rank=rank, shuffle=False)
    assert list(padded) == ([*drawn, drawn[0]])[rank::2]
    with pytest.raises(TypeError, match="no length"):
        samplers.DistributedSamplerWrapper(iter(drawn), num_replicas=2, rank=rank)


def test_hyperparameters_are_read_off_a_constructor() -> None:
    class Model:
        def __init__(self, a: int, *rest: int, b: int = 2, **more: int) -> None:
            import inspect

            __class__  # so that the frame knows it
            self.found = parsing.collect_init_args(inspect.currentframe(), [])

    assert parsing.parse_class_init_keys(Model) == ("self", "rest", "more")
    assert Model(1, b=3, c=4).found == [{"a": 1, "b": 3, "c": 4}]
    settings_ = {"a": 1, "f": lambda: 0}
    with pytest.warns(LeydenWarning, match="'f' is left out"):
        parsing.clean_namespace(settings_)
    assert settings_ == {"a": 1}


def test_attributes_are_looked_up_in_the_hyperparameters_too() -> None:
    class Model(LightningModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.width = 3

    model = Model(0.1)
    assert settings_of.has_setting(model, "lr")
    assert (settings_of.get_setting(model, "lr"), settings_of.get_setting(model, "width")) == (0.1, 3)
    settings_of.set_setting(model, "lr", 0.2)
    assert model.hparams.lr == 0.2
    with pytest.raises(AttributeError, match="nothing"):
        settings_of.get_setting(model, "nothing")


def test_overriding_is_seen_in_the_class_and_on_the_object() -> None:
    model = boring.BoringModel()
    assert parsing.is_overridden("training_step", model)
    assert not parsing.is_overridden("on_train_start", model)
    model.on_train_start = lambda: None
    assert parsing.is_overridden("on_train_start", model)
    assert not parsing.is_overridden("training_step", None)
    with pytest.raises(ValueError, match="parent="):
        parsing.is_overridden("x", object())
    assert parsing.is_param_in_hook_signature(model.training_step, "batch_idx")
    assert not parsing.is_param_in_hook_signature(model.training_step, "other")


def test_a_closure_keeps_its_result_once() -> None:
    did: list[str] = []
    result = closures.ClosureResult.from_training_step_output({"loss": torch.tensor(4.0), "x": 1}, normalize=2)
    closure = closures.Closure(lambda: result, lambda loss: did.append("backward"), lambda: did.append("zero"))
    assert closure() == 2.0
    assert did == ["zero", "backward"]
    assert closure.consume_result().asdict() == {"loss": 2.0, "x": 1}
    with pytest.raises(MisconfigurationException, match="not called"):
        closure.consume_result()
    with pytest.raises(MisconfigurationException, match="without the key 'loss'"):
        closures.ClosureResult.from_training_step_output({})
    assert closures.ManualResult.from_training_step_output(None).asdict() == {}


def test_a_module_comes_out_of_its_compiled_wrapper_and_back() -> None:
    model = boring.BoringModel()
    compiled = torch.compile(model, backend="eager")
    out = from_compiled(compiled)
    assert out is model
    assert "forward" in vars(model)
    assert to_uncompiled(out) is model
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="not compiled"):
        to_uncompiled(model)
    with pytest.raises(ValueError, match="torch.compile"):
        from_compiled(model)


def test_a_checkpoint_of_2021_is_brought_to_the_present_form(tmp_path: Path) -> None:
    old = {"pytorch-lightning_version": "1.5.0", "epoch": 2, "global_step": 20, "state_dict": {}}
    old["callbacks"] = {"ModelCheckpoint{'monitor': None, 'save_on_train_epoch_end': None}": {"x": 1}}
    found, taken = migration.migrate_checkpoint(dict(old))
    assert list(taken) == ["1.6.0", "1.6.5", "1.9.0", "2.0.0"]
    assert found["pytorch-lightning_version"] == "2.6.6"
    assert found["legacy_pytorch-lightning_version"] == "1.5.0"
    assert list(found["callbacks"]) == ["ModelCheckpoint{'monitor': None}"]
    assert found["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 2
    assert migration.migrate_checkpoint(found)[1] == {}
    torch.save(old, tmp_path / "a.ckpt")
    migration.main([str(tmp_path)])
    assert torch.load(tmp_path / "a.ckpt")["pytorch-lightning_version"] == "2.6.6"
    assert torch.load(tmp_path / "a.ckpt.bak") == old
    assert files.load(tmp_path / "a.ckpt")["epoch"] == 2


def test_settings_for_loggers() -> None:
    assert settings.flatten_dict({"a": {"b": [{"c": 1}]}}) == {"a/b/0/c": 1}
    assert settings.add_prefix({"a": 1}, "p", "-") == {"p-a": 1}
    assert settings.sanitize_callable_params({"a": dict, "b": lambda: 3, "c": 4}) == {"a": "dict", "b": 3, "c": 4}
    assert settings.merge_dicts([{"a": 1, "n": {"b": 2}}, {"a": 3, "n": {"b": 4}}], {"n": {"b": sum}}) == {
        "a": 2.0,
        "n": {"b": 6},
    }
    assert settings.convert_json_serializable({"a": torch.nn}) == {"a": str(torch.nn)}


def test_the_environment_stands_in_for_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing:
        @environ.defaults_from_env_vars
        def __init__(self, width: int = 1, name: str = "") -> None:
            self.width, self.name = width, name

    monkeypatch.setenv("PL_THING_WIDTH", "7")
    monkeypatch.setenv("PL_THING_NAME", "some text")
    assert (Thing().width, Thing().name, Thing(2).width) == (7, "some text", 2)


def test_messages_are_said_once_and_possible_ones_on_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WarningCache()
    with pytest.warns(LeydenWarning, match="once"):
        cache.warn("once")
    cache.warn("once")  # a second warning would be an error here
    assert rank_prefixed_message("a", 3) == "[rank: 3] a"
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        rank_zero_warn("perhaps", category=PossibleUserWarning)
        rank_zero_warn("surely")
    assert [str(one.message) for one in heard] == ["surely"]


def test_reasons_not_to_run() -> None:
    assert runif_reasons(min_torch="99", standalone=False) == (["torch>=99"], {})
    assert runif_reasons(min_cuda_gpus=99) == (["99 GPUs"], {"min_cuda_gpus": True})


def test_demos_have_the_shapes_that_tests_count_on(tmp_path: Path) -> None:
    data = boring.BoringDataModule()
    data.setup("fit")
    assert len(data.random_train) == len(data.random_val) == 64
    assert not hasattr(data, "random_test")
    assert torch.equal(data.random_val[0], data.random_full[64])
    assert boring.Net()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert list(SequenceSampler(range(7), 2)) == [[0, 3], [1, 4], [2, 5]]
    out = Transformer(vocab_size=5, ninp=4, nhid=4)(torch.zeros(2, 3).long(), torch.zeros(2, 3).long())
    assert out.shape == (6, 5)
    (tmp_path / "t.txt").write_text("a b\nb", encoding="utf-8")
    assert tokenize(tmp_path / "t.txt")[0].tolist() == [0, 1, 2, 1, 2]


class Served(boring.BoringModel, ServableModule):
    def configure_payload(self) -> dict[str, Any]:
        return {"body": {"x": list(range(32))}}

    def configure_serialization(self) -> Any:
        return {"x": lambda x: torch.tensor(x, dtype=torch.float)}, {"output": lambda x: x.tolist()}

    def serve_step(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"output": torch.tensor([0, 1])}

    def configure_response(self) -> dict[str, Any]:
        return {"output": [0, 1]}


class Place:
    is_global_zero = True
    strategy = None


def test_a_module_is_served_once_and_compared() -> None:
    check = ServableModuleValidator(port=0)
    check.on_train_start(Place(), Served())
    assert check.successful
    assert check.resp.json() == {"output": [0, 1]}
    with pytest.raises(TypeError, match="no ServableModule"):
        check.on_train_start(Place(), boring.BoringModel())
