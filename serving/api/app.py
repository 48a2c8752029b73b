"""The application: all routes over one service."""

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from ... import __version__
from . import adapters, embeddings, generation, models, operation
from .errors import ErrorBody, add_error_handlers
from .gate import Gate
from .service import Service

_ERRORS = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def build_app(service: Service) -> FastAPI:
    """Everything a server answers; Ray Serve and uvicorn run it alike."""
    app = FastAPI(
        title="loramux",
        version=__version__,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,  # type: ignore[arg-type]
    )
    app.state.service = service
    app.include_router(operation.public)
    # Only so that the schema says it: the gate checks keys, before it reads a body.
    guard = [Security(HTTPBearer(auto_error=False))] if service.keys.clients else []
    for part in (generation, embeddings, models, adapters, operation):
        app.include_router(part.router, dependencies=guard)
    add_error_handlers(app)
    app.add_middleware(Gate, service=service)
    return app
