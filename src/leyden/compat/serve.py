# SPDX-License-Identifier: Apache-2.0
"""A module that can be served, and the callback that serves it for one request before training, to see that it can."""

from __future__ import annotations

import copy
import http.client
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from torch import Tensor, nn

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info

_NAMES = ("configure_payload", "configure_serialization", "serve_step")
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy")


class ServableModule(ABC, nn.Module):
    """What a module has to say so that it can be served; inherit from it beside ``LightningModule``."""

    @abstractmethod
    def configure_payload(self) -> dict[str, Any]:
        """Return a request to try: a dict with ``"body"``, the inputs of ``serve_step`` as JSON."""

    @abstractmethod
    def configure_serialization(self) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
        """Return, by name, what makes the inputs of ``serve_step`` from JSON, and what makes JSON from its outputs."""

    @abstractmethod
    def serve_step(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Answer a request: take the inputs by name, return the outputs by name."""

    def configure_response(self) -> dict[str, Any]:
        """Return the answer that the request must get; write it to have it compared."""
        raise NotImplementedError(f"{type(self).__name__} has no configure_response().")


class Response:
    """The answer of the server: ``status_code``, ``text``, ``json()``."""

    def __init__(self, status_code: int, text: str) -> None:
        self.status_code, self.text = status_code, text

    def json(self) -> Any:
        """Read the text as JSON."""
        return json.loads(self.text)


class ServableModuleValidator(Callback):
    """Serves a copy of the module on this machine when training starts, and sends it the request of the module.

    Args:
        optimization: None; nothing else is known.
        server: ``"fastapi"``; the server is python's own, so that nothing has to be installed.
        host: Where it listens.
        port: There; 0 takes a free one.
        timeout: Seconds to wait for an answer.
        exit_on_failure: Raise if the module cannot be served.
    """

    def __init__(
        self,
        optimization: str | None = None,
        server: str = "fastapi",
        host: str = "127.0.0.1",
        port: int = 8080,
        timeout: int = 20,
        exit_on_failure: bool = True,
    ) -> None:
        super().__init__()
        if optimization is not None:
            raise NotImplementedError(f"ServableModuleValidator(optimization={optimization!r}): only None is known.")
        if server != "fastapi":
            raise NotImplementedError(f"ServableModuleValidator(server={server!r}): only 'fastapi' is known.")
        self.optimization, self.server, self.host, self.port = optimization, server, host, port
        self.timeout, self.exit_on_failure = timeout, exit_on_failure
        self.resp: Response | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Serve, ask, and compare.

        Raises:
            TypeError: if the module is no ``ServableModule``.
            MisconfigurationException: if it cannot be served, or answers otherwise than it says.
        """
        if not trainer.is_global_zero:
            return
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED:
            raise MisconfigurationException(f"ServableModuleValidator: no process of {strategy} has the whole module.")
        if not isinstance(pl_module, ServableModule):
            raise TypeError(f"{type(pl_module).__name__} is no ServableModule: inherit from it to have it served.")
        payload = pl_module.configure_payload()
        if "body" not in payload:
            raise MisconfigurationException(f"configure_payload() returned {payload!r}, which has no 'body'.")
        self.resp = self._ask(copy.deepcopy(pl_module).eval(), payload)
        if not self.successful and self.exit_on_failure:
            raise MisconfigurationException(f"The module cannot be served: {self.resp.text}")
        if type(pl_module).configure_response is not ServableModule.configure_response and self.successful:
            expected = pl_module.configure_response()
            if self.resp.json() != expected:
                raise MisconfigurationException(f"The server answered {self.resp.json()}, not {expected}.")
        if self.successful:
            rank_zero_info(f"The module can be served; it answered {self.resp.text}")

    def _ask(self, module: Any, payload: dict[str, Any]) -> Response:
        with HTTPServer((self.host, self.port), _handler(module)) as server:
            thread = threading.Thread(target=server.handle_request, daemon=True)
            server.timeout = self.timeout
            thread.start()
            connection = http.client.HTTPConnection(self.host, server.server_port, timeout=self.timeout)
            try:
                connection.request("POST", "/serve", json.dumps(payload), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                return Response(answer.status, answer.read().decode())
            finally:
                connection.close()
                thread.join()

    @property
    def successful(self) -> bool | None:
        """Whether the module was served; None before."""
        return None if self.resp is None else self.resp.status_code == 200

    def state_dict(self) -> dict[str, Any]:
        return {"successful": self.successful, "optimization": self.optimization, "server": self.server}


def _handler(module: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, answer = 200, json.dumps(_serve(module, payload["body"]))
            except Exception as error:  # it is the answer: the callback raises it
                status, answer = 500, f"{type(error).__name__}: {error}"
            content = answer.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing on stderr."""

    return Handler


def _serve(module: Any, body: dict[str, Any]) -> dict[str, Any]:
    read, write = module.configure_serialization()
    inputs = {name: read[name](value) if name in read else value for name, value in body.items()}
    with torch.no_grad():
        outputs = module.serve_step(**inputs)
    if not isinstance(outputs, dict):
        raise TypeError(f"serve_step() returned a {type(outputs).__name__}: return a dict.")
    return {name: write[name](value) if name in write else value for name, value in outputs.items()}
