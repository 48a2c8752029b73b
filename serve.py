#!/usr/bin/env python
"""Serve a finished run over OpenAI's completions route: one base, every task of the mixture by name, or the router.

    python serve.py RUN [--host 127.0.0.1] [--port 8000]

`model` in a request is a task's name, `auto` (the router reads the prompt, where the method has such a router),
`routed` (methods that route by token) or `base`. Requests are answered one at a time.
"""

import argparse
import json
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pydantic
import torch
from transformers import StoppingCriteriaList

from loramux.adapters import LoramuxModel
from loramux.routing import Granularity
from loramux.support.config import config, parse
from loramux.support.console import say
from loramux.support.errors import LoramuxError
from loramux.training.run import TrainedRun, load_run

MAX_BODY_BYTES = 1 << 20
MAX_PROMPTS = 64


class RequestError(LoramuxError):
    """A request that cannot be served.

    Attributes:
        status: the HTTP status to answer with.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@config
class CompletionRequest:
    """The part of OpenAI's completion request that is honoured; other keys are refused by name."""

    model: str = "auto"
    prompt: str | list[str]
    max_tokens: int = pydantic.Field(default=64, ge=1, le=4096)
    temperature: float = pydantic.Field(default=1.0, ge=0, le=2)
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    seed: int | None = pydantic.Field(default=None, ge=0, lt=2**63)
    stop: str | list[str] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Engine:
    """Answers completion requests with the mixture of one run."""

    def __init__(self, run: TrainedRun) -> None:
        self.model, self.tokenizer = run.model, run.tokenizer
        self.tokenizer.padding_side = "left"
        self.hub: LoramuxModel = run.model.base_model  # type: ignore[assignment]
        self.names = [*self._own_choice(), *self.hub.tasks, "base"]
        self._lock = threading.Lock()

    def complete(self, request: CompletionRequest) -> dict[str, Any]:
        """OpenAI's completion object; each choice also names the `adapter` that answered.

        Raises:
            RequestError: an unknown model, no prompt, or a prompt too long for the base.
        """
        if request.model not in self.names:
            raise RequestError(404, f"model {request.model!r} is not served; there are: {', '.join(self.names)}")
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if not 1 <= len(prompts) <= MAX_PROMPTS or not all(prompts):
            raise RequestError(400, f"prompt: give 1 to {MAX_PROMPTS} texts, none of them empty")
        inputs = self._encode(prompts, request.max_tokens)
        with self._lock, torch.inference_mode(), self._routed(request.model):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            stopping = self._stopping(inputs["input_ids"].shape[1], request.stops)
            output = self.model.generate(**inputs, **self._generation(request), stopping_criteria=stopping)
            adapters = self._adapters(request.model, len(prompts))
        answers = output[:, inputs["input_ids"].shape[1] :]
        choices = [self._choice(i, ids, request, adapters[i]) for i, ids in enumerate(answers)]
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": choices,
            "usage": self._usage(inputs["attention_mask"], answers),
        }

    def models(self) -> dict[str, Any]:
        """OpenAI's list of models."""
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "loramux"} for n in self.names]}

    def _own_choice(self) -> list[str]:
        if self.hub.routes_by_prompt:
            return ["auto"]
        return ["routed"] if self.hub.granularity in (Granularity.TOKEN, Granularity.FIXED) else []

    def _routed(self, name: str) -> AbstractContextManager[Any]:
        if name == "base":
            return self.model.disable_adapter()
        return self.hub.routing(name) if name in self.hub.tasks else torch.no_grad()

    def _encode(self, prompts: list[str], max_tokens: int) -> Any:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if limit is not None and length + max_tokens > limit:
            raise RequestError(400, f"the prompt has {length} tokens; with max_tokens it must stay within {limit}")
        return inputs.to(self.model.device)

    def _generation(self, request: CompletionRequest) -> dict[str, Any]:
        sampling = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        sampled = sampling if request.temperature else {}
        common = {"max_new_tokens": request.max_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        return {**common, **sampled, "do_sample": bool(sampled)}

    def _stopping(self, prompt_length: int, stops: list[str]) -> StoppingCriteriaList:
        """Ends a row once its text holds a stop string."""

        def ended(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            texts = self.tokenizer.batch_decode(ids[:, prompt_length:])
            return torch.tensor([any(stop in text for stop in stops) for text in texts], device=ids.device)

        return StoppingCriteriaList([ended] if stops else [])

    def _adapters(self, name: str, rows: int) -> list[str]:
        if name != "auto":
            return [name] * rows
        decision = self.hub.context.decisions[self.hub.active_adapters[0], 0]
        return [self.hub.tasks[index] for index in decision.weights.argmax(-1).tolist()]

    def _choice(self, index: int, ids: torch.Tensor, request: CompletionRequest, adapter: str) -> dict[str, Any]:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        cut = min((text.find(stop) for stop in request.stops if stop in text), default=len(text))
        ended = cut < len(text) or self.tokenizer.eos_token_id in ids.tolist()
        reason = "stop" if ended else "length"
        return {"index": index, "text": text[:cut], "finish_reason": reason, "logprobs": None, "adapter": adapter}

    def _usage(self, mask: torch.Tensor, answers: torch.Tensor) -> dict[str, int]:
        prompt = int(mask.sum())
        completion = int((answers != self.tokenizer.pad_token_id).sum())
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def make_server(engine: Engine, host: str, port: int) -> ThreadingHTTPServer:
    """An HTTP server over `engine`; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            routes = {"/v1/models": engine.models, "/health": lambda: {"status": "ok"}}
            self._answer(lambda: _known(routes, self.path)())

        def do_POST(self) -> None:
            routes = {"/v1/completions": lambda: engine.complete(self._request())}
            self._answer(lambda: _known(routes, self.path)())

        def _request(self) -> CompletionRequest:
            declared = self.headers.get("Content-Length") or "0"
            if not declared.isdecimal():
                raise RequestError(400, "Content-Length is not a number")
            length = int(declared)
            if length > MAX_BODY_BYTES:
                self.rfile.read(min(length, 8 * MAX_BODY_BYTES))  # a client still sending would not read the answer
                raise RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            try:
                data = json.loads(self.rfile.read(length))
            except ValueError:
                raise RequestError(400, "the body is not JSON") from None
            if not isinstance(data, dict):
                raise RequestError(400, "the body is not a JSON object")
            return parse(CompletionRequest, data, where="request")

        def _answer(self, work: Any) -> None:
            try:
                status, body = 200, work()
            except RequestError as error:
                status, body = error.status, {"error": {"message": str(error), "type": "invalid_request_error"}}
            except LoramuxError as error:
                status, body = 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
            except Exception:
                self.log_error("%s", traceback.format_exc())
                status, body = 500, {"error": {"message": "internal error, see the log", "type": "server_error"}}
            encoded = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

    return ThreadingHTTPServer((host, port), Handler)


def _known(routes: dict[str, Any], path: str) -> Any:
    if path not in routes:
        raise RequestError(404, f"no route {path}")
    return routes[path]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    engine = Engine(load_run(options.run))
    server = make_server(engine, options.host, options.port)
    say(f"serving {', '.join(engine.names)} at http://{options.host}:{server.server_port}/v1")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
