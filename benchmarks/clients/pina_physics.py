# SPDX-License-Identifier: Apache-2.0
"""pina-mathlab: a physics-informed network that solves a Poisson problem, with the library's Trainer and callbacks."""

import torch
from kept import keep, metrics
from lightning.pytorch import Callback, seed_everything
from pina import Condition, LabelTensor, Trainer
from pina.callback import MetricTracker
from pina.domain import CartesianDomain
from pina.equation import Equation, FixedValue
from pina.model import FeedForward
from pina.operator import laplacian
from pina.problem import SpatialProblem
from pina.solver import PINN

seed_everything(2)


def poisson(points, output):
    force = torch.sin(points.extract(["x"]) * torch.pi) * torch.sin(points.extract(["y"]) * torch.pi)
    return laplacian(output.extract(["u"]), points) - force


class Poisson(SpatialProblem):
    output_variables = ["u"]
    spatial_domain = CartesianDomain({"x": [0, 1], "y": [0, 1]})
    domains = {"edge": CartesianDomain({"x": [0, 1], "y": 0.0}), "inside": CartesianDomain({"x": [0, 1], "y": [0, 1]})}
    conditions = {
        "edge": Condition(domain="edge", equation=FixedValue(0.0)),
        "inside": Condition(domain="inside", equation=Equation(poisson)),
    }


problem = Poisson()
problem.discretise_domain(6, "grid", domains="inside")
problem.discretise_domain(12, "random", domains="edge")
solver = PINN(problem, FeedForward(input_dimensions=2, output_dimensions=1, layers=[12, 12]))
tracker = MetricTracker()
trainer = Trainer(
    solver, max_epochs=15, accelerator="cpu", batch_size=8, train_size=0.8, val_size=0.2, test_size=0.0,
    callbacks=[metrics(Callback), tracker], enable_model_summary=False,
)  # fmt: skip
trainer.train()
points = LabelTensor(torch.rand(5, 2), ["x", "y"])
keep(weights=solver, solution=solver(points).as_subclass(torch.Tensor), tracked=dict(tracker.metrics))
