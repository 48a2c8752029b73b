"""Embeddings of the base: the mean of its last hidden states over a text."""

import asyncio
import base64
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response
from torch import Tensor

from ..errors import ServingError
from .errors import shown
from .prompts import prompt_ids
from .schemas import EmbeddingBody
from .service import Service, service_of

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, service: Annotated[Service, Depends(service_of)]) -> Response:
    """Embed one or several texts."""
    if body.model not in service.base_names:
        raise ServingError(
            "model_not_found", f"model {shown(body.model)}: embeddings are of the base, {service.base!r}", 404
        )
    service.admission.take(1)
    try:
        prompts = await prompt_ids(service, body.input)
        vectors = await _embedded(service, prompts)
    finally:
        service.admission.leave()
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector.float(), body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.base, "usage": used})


async def _embedded(service: Service, prompts: list[list[int]]) -> Tensor:
    limit = service.config.limits.deadline_s
    made = asyncio.wrap_future(service.engine.embed(prompts))
    try:
        done, _ = await asyncio.wait({made}, timeout=limit)
        if not done:
            raise ServingError("deadline_exceeded", f"the embeddings were not made within {limit:g} s", 504)
        return made.result()
    finally:
        made.cancel()


def _written(vector: Any, encoding: str) -> Any:
    return (
        base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
    )
