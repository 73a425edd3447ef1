# SPDX-License-Identifier: Apache-2.0
"""A script without a main guard that changes its folder and its arguments, as hydra does, and runs again and again.

python loop_script.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from ranks import Judged, data, make_trainer

FOLDER = Path(sys.argv[1]).absolute()
with (FOLDER / "lines").open("a") as file:
    file.write(f"above {os.environ.get('RANK', '0')} {os.getcwd()}\n")
os.makedirs(FOLDER / "outputs", exist_ok=True)
os.chdir(FOLDER / "outputs")
sys.argv = ["changed", "by=hydra"]
found = []
for _turn in range(2):
    module, loader = Judged(), DataLoader(data(24), 3, shuffle=True)
    trainer = make_trainer(2, max_epochs=1)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    (tested,) = trainer.test(module, DataLoader(data(7), 2), verbose=False)
    predicted = trainer.predict(module, DataLoader(data(7), 2), gather=True)
    assert predicted is not None
    found.append(
        [trainer.global_step, tested["count"], [i for batch in predicted for i in batch.tolist()], os.getcwd()]
    )
(FOLDER / f"{trainer.global_rank}.json").write_text(json.dumps([found, module.layer[0].weight.tolist()]))
