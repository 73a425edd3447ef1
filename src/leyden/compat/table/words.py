# SPDX-License-Identifier: Apache-2.0
"""Names that rows of several of these files have in common."""

from __future__ import annotations

ENVIRONMENTS = (
    "ClusterEnvironment KubeflowEnvironment LSFEnvironment LightningEnvironment MPIEnvironment SLURMEnvironment"
    " TorchElasticEnvironment"
)

PRECISIONS = "BitsandbytesPrecision FSDPPrecision TransformerEnginePrecision XLAPrecision"

ENUMS = "leyden.compat.pieces.words"

SAY = "leyden.compat.pieces.say"

TORCHES = [
    "1_8",
    "1_9",
    "1_10",
    "1_11",
    "1_12",
    "1_13",
    "2_0",
    "2_0_1",
    "2_1",
    "2_2",
    "2_3",
    "2_4",
    "2_4_1",
    "2_5",
    "2_5_1",
    "2_6",
    "2_7",
    "2_8",
    "2_9",
]

METRICS = ["0_7", "0_8_0", "0_9_1", "0_11", "1_0_0"]

FLAGS = (
    *(f"_TORCH_GREATER_EQUAL_{version}" for version in TORCHES),
    *(f"_TORCHMETRICS_GREATER_EQUAL_{version}" for version in METRICS),
    "_TORCH_EQUAL_2_4_0 _TORCH_EQUAL_2_8 _TORCH_EQUAL_2_9 _TORCH_LESS_EQUAL_2_6 _IS_WINDOWS _IS_INTERACTIVE",
    "_PYTHON_GREATER_EQUAL_3_8_0 _PYTHON_GREATER_EQUAL_3_10_0 _PYTHON_GREATER_EQUAL_3_11_0",
    "_NUMPY_AVAILABLE _OMEGACONF_AVAILABLE _RICH_AVAILABLE _TORCHVISION_AVAILABLE _REQUESTS_AVAILABLE",
    "_JSONARGPARSE_SIGNATURES_AVAILABLE",
)

CHECKS = "package_available module_available compare_version RequirementCache=Requirement"
