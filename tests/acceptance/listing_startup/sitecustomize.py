# SPDX-License-Identifier: Apache-2.0
"""What a process that runs the article's listing does ahead of it: the seed, the data; and behind it: save the weights."""

import atexit
import os
import sys
from pathlib import Path


def _save() -> None:
    torch.save(sys.modules["__main__"].model.l1.state_dict(), os.environ["LISTING_WEIGHTS"])


if "LISTING_WEIGHTS" in os.environ:
    sys.path.append(str(Path(__file__).parents[1]))
    import torch

    import listing_data

    sys.path.pop()
    real = os.environ["LISTING_DATA"] == "mnist"
    sys.modules.update(listing_data.torchvision() if real else listing_data.stand_in())
    torch.manual_seed(int(os.environ["LISTING_SEED"]))
    atexit.register(_save)
