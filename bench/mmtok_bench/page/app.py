"""The page's HTTP API: pictures, selections, answers and the server's state."""

from __future__ import annotations

import io
import json
import secrets
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from mmtok_bench.client import Answer, MeasurementError, ask, image_url, openai_client, stream
from mmtok_bench.page.guard import Guard
from mmtok_bench.page.patches import Patches
from mmtok_bench.page.pictures import MAX_UPLOAD_BYTES, Picture, PictureError, Pictures
from mmtok_bench.page.served import Served
from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName, is_nested

__all__ = ["PageContent", "make_app"]

_STATIC = Path(__file__).parent / "static"
# Not guessed by Python's mimetypes, which depends on the machine's configuration.
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_FILES = {
    "": (_STATIC / "index.html", "text/html; charset=utf-8"),
    "look.css": (Path(__file__).parents[1] / "look.css", _TYPES[".css"]),
    **{
        path.relative_to(_STATIC).as_posix(): (path, _TYPES[path.suffix])
        for path in _STATIC.rglob("*")
        if path.suffix in _TYPES
    },
}
_TOLD = ("model", "notes", "privacy", "methods", "no_patches", "budget")
_SHOWN_PX = 1200
_MAX_QUESTION = 4000
_MAX_ANSWER_TOKENS = 128


@dataclass(frozen=True, slots=True)
class PageContent:
    """The content of the page.

    Args:
        model: A sentence that says which model is served, and where.
        privacy: A sentence that says where pictures and questions go.
        methods: The methods that the model can run.
        pictures: The pictures.
        patches: Computes which tokens of a picture are kept; None if this process has no copy of the model.
        no_patches: A sentence that says why there are no patches.
        notes: Sentences about the model.
        budget: The budget at the start, unless the link has one.
    """

    model: str
    privacy: str
    methods: tuple[MethodName, ...]
    pictures: Pictures
    patches: Patches | None
    no_patches: str = ""
    notes: str = ""
    budget: str = "25%"


class SelectionAsked(BaseModel):
    """Body of a request to /api/selection."""

    picture: str
    question: str = Field(max_length=_MAX_QUESTION)
    method: MethodName
    budget: int | None = Field(None, ge=1)


class RunAsked(BaseModel):
    """One requested answer: a budget, and a method if the budget prunes."""

    budget: Annotated[str, AfterValidator(lambda text: str(Budget.parse(text)))]
    method: MethodName | None = None


class AnswersAsked(BaseModel):
    """Body of a request to /api/answers."""

    picture: str
    question: str = Field(max_length=_MAX_QUESTION)
    runs: list[RunAsked] = Field(min_length=1, max_length=3)


def make_app(content: PageContent, served: Served, host: str = "localhost") -> Guard:
    """Returns the page as an ASGI application.

    Args:
        content: The content of the page.
        served: The server that answers.
        host: The name or address at which the page is served.
    """
    app = FastAPI(title="mmtok demo --page", docs_url=None, redoc_url=None, openapi_url=None)
    # Only one request runs at a time, however many tabs there are: others would change the time to first token.
    asking = threading.Lock()

    @app.exception_handler(PictureError)
    def tell_picture(_: Request, error: PictureError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 404 if "gone" in str(error) else 400)

    @app.get("/api/page")
    def page() -> dict[str, Any]:
        return {
            **{name: getattr(content, name) for name in _TOLD},
            "nested": list(filter(is_nested, content.methods)),
            "pictures": [_described(*each) for each in content.pictures.built_in()],
        }

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return asdict(served.state())

    @app.post("/api/restart")
    def restart() -> Response:
        try:
            served.restart()
        except MeasurementError as error:
            return JSONResponse({"error": str(error)}, 409)
        return JSONResponse(asdict(served.state()))

    @app.post("/api/pictures")
    async def add_picture(request: Request) -> dict[str, Any]:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_UPLOAD_BYTES:
                raise PictureError(f"The file is larger than the {MAX_UPLOAD_BYTES >> 20} MB that a server takes.")
        picture_id, picture = await run_in_threadpool(content.pictures.add, bytes(data))
        return _described(picture_id, picture)

    @app.get("/api/pictures/{picture_id}")
    def picture_info(picture_id: str) -> dict[str, Any]:
        return _described(picture_id, content.pictures.get(picture_id))

    @app.get("/api/pictures/{picture_id}/{view}.jpg")
    def picture_file(picture_id: str, view: str) -> Response:
        picture = content.pictures.get(picture_id)
        image = picture.shown
        if view == "seen" and content.patches is not None:
            image = content.patches.seen(picture)
        small = image.copy()
        small.thumbnail((_SHOWN_PX if view == "seen" else 160,) * 2, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=90)
        return Response(file.getvalue(), media_type="image/jpeg")

    @app.post("/api/selection")
    def selection(asked: SelectionAsked) -> Response:
        if content.patches is None:
            return JSONResponse({"error": content.no_patches}, 409)
        picture = content.pictures.get(asked.picture)
        try:
            return JSONResponse(content.patches.select(picture, asked.question, asked.method, asked.budget))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)

    @app.post("/api/answers")
    def answers(asked: AnswersAsked) -> StreamingResponse:
        picture = content.pictures.get(asked.picture)
        return StreamingResponse(_lines(_answers(served, asking, picture, asked)), media_type="application/x-ndjson")

    @app.get("/{name:path}")
    def static(name: str) -> Response:
        if name not in _FILES:
            return JSONResponse({"error": "there is no such page"}, 404)
        path, kind = _FILES[name]
        return FileResponse(path, media_type=kind)

    return Guard(app, host)


def _described(picture_id: str, picture: Picture) -> dict[str, Any]:
    return {
        **{"id": picture_id, "name": picture.name, "note": picture.note, "questions": picture.questions},
        **{"width": picture.sent.width, "height": picture.sent.height},
    }


async def _lines(events: Generator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yields each event as a line of JSON."""
    try:
        async for event in iterate_in_threadpool(events):
            yield json.dumps(event) + "\n"
    finally:
        # Releases the lock, also if the browser disconnects in the middle of an answer.
        events.close()


def _answers(
    served: Served, asking: threading.Lock, picture: Picture, asked: AnswersAsked
) -> Generator[dict[str, Any]]:
    """Yields the events of all runs as dictionaries, each with the number of its run."""
    if not asking.acquire(blocking=False):
        yield {"waiting": True}
        asking.acquire()
    try:
        client, image = openai_client(served.url), image_url(picture.sent)
        for number, run in enumerate(asked.runs):
            kwargs = {"mmtok_budget": run.budget} | ({} if run.method is None else {"mmtok_method": run.method})
            try:
                for event in _one_answer(client, image, asked.question, kwargs):
                    yield {"run": number, **event}
            except MeasurementError as error:
                yield {"run": number, "error": _reason(error)}
    finally:
        asking.release()


def _one_answer(client: Any, image: str, question: str, kwargs: dict[str, str]) -> Iterator[dict[str, Any]]:
    # Each request has a salt of its own, so that no cache is hit. The first is not timed, since a server may have to
    # warm up for a new shape.
    first, timed = ({"cache_salt": secrets.token_hex(8), "mm_processor_kwargs": kwargs} for _ in range(2))
    for _ in stream(client, image, question, max_tokens=1, fields=first):
        pass
    for piece in stream(client, image, question, max_tokens=_MAX_ANSWER_TOKENS, fields=timed):
        if isinstance(piece, Answer):
            yield {"answer": asdict(piece)}
        else:
            yield {"piece": piece}
    # Another request of one token, since SGLang sends no account with a stream; the same salt gives the same selection.
    yield {"account": ask(client, image, question, max_tokens=1, with_account=True, fields=timed).account}


def _reason(error: Exception) -> str:
    """Returns the server's error message, if it sent one, without the request, which the page shows already."""
    cause = error.__cause__
    body = getattr(cause, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or cause or error)
