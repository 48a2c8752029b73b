"""Loading, replacing, pinning and unloading adapters while the server runs: vLLM's two routes, and fuller ones."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..errors import ServingError
from .errors import nearest, shown
from .schemas import LoadLora, NewAdapter, OtherAdapter, Pin, UnloadLora
from .selection import AUTO
from .service import Service, service_of

router = APIRouter()
Served = Annotated[Service, Depends(service_of)]
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


@router.post("/v1/load_lora_adapter", responses=_TEXT)
async def load_lora_adapter(body: LoadLora, service: Served) -> Response:
    """Load an adapter, as with vLLM; `load_inplace` replaces one of the same name."""
    name, path = body.lora_name, body.lora_path
    is_there = any(info.name == name for info in service.store.list())
    if body.load_inplace and is_there:
        await _change(
            service, "replace", name, lambda: service.store.replace(name, path, expected_generation=_now(service, name))
        )
    else:
        await _change(service, "load", name, lambda: service.store.load(name, path))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=_TEXT)
async def unload_lora_adapter(body: UnloadLora, service: Served) -> Response:
    """Unload an adapter, as with vLLM; answers in the making are finished first."""
    await _change(service, "unload", body.lora_name, lambda: service.store.unload(body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/lora_adapters")
async def adapters(service: Served) -> Response:
    """All adapters, with their generations and where they lie."""
    return JSONResponse({"object": "list", "data": [asdict(info) for info in service.store.list()]})


@router.post("/v1/lora_adapters", status_code=201)
async def load(body: NewAdapter, service: Served) -> Response:
    """Load an adapter under a new name."""

    def work() -> Any:
        return service.store.load(
            body.name, body.source, revision=body.revision, pin=body.pin, prompts=tuple(body.prompts)
        )

    return JSONResponse(asdict(await _change(service, "load", body.name, work)), 201)


@router.get("/v1/lora_adapters/{name}")
async def adapter(name: str, service: Served) -> Response:
    """One adapter."""
    return JSONResponse(asdict(_find(service, name)))


@router.put("/v1/lora_adapters/{name}")
async def replace(name: str, body: OtherAdapter, service: Served) -> Response:
    """Put another generation in the place of an adapter; answers in the making finish on theirs."""

    def work() -> Any:
        return service.store.replace(
            name,
            body.source,
            revision=body.revision,
            expected_generation=body.expected_generation or _now(service, name),
            prompts=tuple(body.prompts),
        )

    return JSONResponse(asdict(await _change(service, "replace", name, work)))


@router.delete("/v1/lora_adapters/{name}")
async def unload(name: str, service: Served, force: Annotated[bool, Query()] = False) -> Response:
    """Unload an adapter: new requests are refused at once; without `force` this waits for those in the making."""
    await _change(service, "unload", name, lambda: service.store.unload(name, force=force))
    return JSONResponse({"name": name, "deleted": True})


@router.post("/v1/lora_adapters/{name}/pin")
async def pin(name: str, body: Pin, service: Served) -> Response:
    """Keep an adapter in memory whatever else is asked for, or no longer."""
    return JSONResponse(asdict(await service.with_changes(lambda: service.store.pin(name, body.pinned))))


def _find(service: Service, name: str) -> Any:
    listed = {info.name: info for info in service.store.list()}
    if name not in listed:
        near = nearest(name, listed)
        raise ServingError("adapter_not_found", f"no adapter {shown(name)}; {near}", 404)
    return listed[name]


def _now(service: Service, name: str) -> str:
    """The generation that a name stands for, read from disk where nobody has looked yet."""
    generation = _find(service, name).generation
    if generation is None:
        service.store.lease(name).release()
        generation = _find(service, name).generation
    return str(generation)


async def _change(service: Service, change: str, name: str, work: Callable[[], Any]) -> Any:
    """Change what is served, and count how that went."""
    if name in (AUTO, *service.base_names, *service.mixtures):
        raise ServingError("adapter_name_reserved", f"{shown(name)} is not an adapter of this server", 409)
    try:
        done = await service.with_changes(work)
    except ServingError as error:
        service.metrics.swaps.labels(change, error.code).inc()
        raise
    service.metrics.swaps.labels(change, "done").inc()
    if change == "unload":
        service.metrics.forget(name)
    return done
