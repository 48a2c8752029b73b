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
        dependencies=[Security(HTTPBearer(auto_error=False))],  # for the schema; the gate checks keys
    )
    app.state.service = service
    for part in (generation, embeddings, models, adapters, operation):
        app.include_router(part.router)
    add_error_handlers(app)
    app.add_middleware(Gate, service=service)
    return app
