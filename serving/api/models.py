"""The list of what is served, as OpenAI's clients read it."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from ..errors import ServingError
from .errors import nearest, shown
from .selection import AUTO, model_names
from .service import Service, service_of

router = APIRouter()
Served = Annotated[Service, Depends(service_of)]


@router.get("/v1/models")
async def models(service: Served) -> Response:
    """The base, its adapters (with the base as their parent), hosted mixtures, and `auto`."""
    return JSONResponse({"object": "list", "data": _models(service)})


@router.get("/v1/models/{model:path}")
async def model(model: str, service: Served) -> Response:
    """One of them."""
    listed = {one["id"]: one for one in _models(service)}
    if model not in listed:
        near = nearest(model, model_names(service))
        raise ServingError("model_not_found", f"model {shown(model)} is not served; {near}", 404)
    return JSONResponse(listed[model])


def _models(service: Service) -> list[dict[str, Any]]:
    def one(name: str, kind: str, parent: str | None, **more: Any) -> dict[str, Any]:
        head = {"id": name, "object": "model", "created": service.started, "owned_by": "loramux"}
        return {**head, "root": parent or name, "parent": parent, "kind": kind, **more}

    automatic = [one(AUTO, "automatic choice", service.base)] if service.chooser is not None else []
    base = one(
        service.base, "base", None, max_model_len=service.engine.max_length, has_chat_template=service.has_chat_template
    )
    mixtures = [one(name, "mixture", service.base, tasks=list(tasks)) for name, tasks in service.mixtures.items()]
    adapters = [one(info.name, "adapter", service.base, **_facts(info)) for info in service.store.list()]
    return [base, *automatic, *mixtures, *adapters]


def _facts(info: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(info).items() if key not in ("name", "source")}
