"""The local web server: who may ask, what may be asked, and the page's files.

Everything that comes in is hostile until it is checked: requests need the token of this start, a
Host of this machine and, if they change something, an Origin of the page itself.
"""

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from http.cookies import CookieError, SimpleCookie
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spairkit.app import exports
from spairkit.app.corrections import Boxes, Corrections
from spairkit.app.exports import Filter
from spairkit.app.pictures import MAX_SIDE
from spairkit.app.session import Session
from spairkit.errors import InputError

_HOSTS = ("127.0.0.1", "localhost")
_MAX_BODY = 4 << 20  # bytes; the corrections of an image with 2 x 10,000 boxes fit
_MAX_QUERY = 4096
_WAIT_SECONDS = 1.0  # for the objects of an image, before the page asks again
_THUMBNAIL_SIDE = 128  # px
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """Refuses every request without the token, from another host's name, or from another page.

    A page that is asked for with the token in the query gets it as a cookie, for the requests that
    follow.

    Args:
        app: is behind it.
        token: of this start.
        once: another token, which holds in one query only: other users of the machine can see the
            address that a browser is started with.
    """

    def __init__(self, app: Any, token: str, once: str | None = None) -> None:
        self.app, self._token, self._once = app, token, once
        # cookies are shared among the ports of a host
        self._cookie = f"spairkit-{hashlib.sha256(token.encode()).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        given = _in_query(scope["query_string"])
        refusal = self._refusal(scope, headers, given)
        if refusal:
            response = Response(f"{refusal}\n", 403, _HEADERS, "text/plain")
            await response(scope, receive, send)
            return

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                added = dict(_HEADERS)
                if b"cache-control" not in own:
                    added["Cache-Control"] = "no-store"
                if given is not None:
                    added["Set-Cookie"] = (
                        f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
                    )
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in added.items()),
                ]
            await send(message)

        await self.app(scope, receive, answer)

    def _refusal(self, scope: Scope, headers: dict[str, str], given: str | None) -> str | None:
        host = headers.get("host", "")
        if _hostname(host) not in _HOSTS:
            return "spairkit answers at 127.0.0.1 and localhost only"
        if scope["method"] not in ("GET", "HEAD"):
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
            if site != "same-origin" or (origin is not None and origin != f"http://{host}"):
                return "this request comes from another page"
        if given is None:
            given = self._in_cookie(headers.get("cookie", ""))
        elif self._once is not None and _same(given, self._once):
            self._once = None
            return None
        if not _same(given, self._token):
            return "open the address that spairkit app has printed: it holds a token"
        return None

    def _in_cookie(self, header: str) -> str:
        try:
            cookies = SimpleCookie(header[:_MAX_QUERY])
        except CookieError:
            return ""
        return cookies[self._cookie].value if self._cookie in cookies else ""


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(errors="replace"), token.encode())


def _in_query(query: bytes) -> str | None:
    """The token of a query, if there is one."""
    try:
        values = parse_qs(query[:_MAX_QUERY].decode("ascii"), errors="replace").get("token")
    except ValueError:
        return None
    return values[0] if values else None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class _Corrected:
    """The body of a change of corrections."""

    revision: Annotated[int, Field(ge=0, lt=1 << 40)]
    removed: Boxes
    added: Boxes


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class _Model:
    """The body of a choice of a model."""

    model: Annotated[int, Field(ge=0, lt=1 << 20)]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class _Crop:
    """The query of a picture."""

    side: Annotated[int, Field(ge=1, le=MAX_SIDE)] = MAX_SIDE
    region: (
        Annotated[str, Field(pattern=r"^-?\d{1,9},-?\d{1,9},[1-9]\d{0,8},[1-9]\d{0,8}$")] | None
    ) = None


_CORRECTED, _MODEL = TypeAdapter(_Corrected), TypeAdapter(_Model)
_FILTER, _CROP = TypeAdapter(Filter), TypeAdapter(_Crop)


class _TooLarge(Exception):
    """The body of a request has too many bytes."""


def build_app(session: Session | None, token: str, once: str | None = None) -> Starlette:
    """The ASGI application of a session; without one the page says how to name a folder.

    Args:
        token, once: as in `Guard`.
    """
    routes = [Route("/", _page), Route("/page/{name}", _page)]
    routes += [Route("/api/state", _no_folder)] if session is None else _routes(session)
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token, once=once)],
        exception_handlers={
            InputError: _refused,
            ValidationError: _invalid,
            _TooLarge: _too_large,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


def _routes(session: Session) -> list[Route]:
    handlers = _Handlers(session)
    return [
        Route("/api/state", handlers.state),
        Route("/api/images", handlers.images),
        Route("/api/counts", handlers.counts),
        Route("/api/images/{index:int}/thumbnail", handlers.thumbnail),
        Route("/api/images/{index:int}/picture", handlers.picture),
        Route("/api/images/{index:int}/objects", handlers.objects),
        Route("/api/images/{index:int}/corrections", handlers.correct, methods=["PUT"]),
        Route("/api/export/{form}", handlers.export),
        Route("/api/model", handlers.choose, methods=["PUT"]),
        Route("/api/training", handlers.train, methods=["POST"]),
        Route("/api/training", handlers.stop, methods=["DELETE"]),
        Route("/api/training/model", handlers.take, methods=["PUT"]),
    ]


async def _page(request: Request) -> Response:
    """A file of the page, by its name alone, so that none leads elsewhere."""
    name = request.path_params.get("name", "index.html")
    found = [item for item in files("spairkit.app").joinpath("page").iterdir() if item.name == name]
    if not found:
        return _error("there is no such file", 404)
    return Response(found[0].read_bytes(), media_type=_TYPES[name.rpartition(".")[2]])


async def _no_folder(request: Request) -> Response:
    return JSONResponse({"folder": None})


class _Handlers:
    """The answers to requests that the guard has let in."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.session.to_json))

    async def images(self, request: Request) -> Response:
        return JSONResponse({"names": self.session.names})

    async def counts(self, request: Request) -> Response:
        chosen = _filter(request)
        picked = await run_in_threadpool(self.session.picked, chosen)
        return JSONResponse(picked._asdict())

    async def thumbnail(self, request: Request) -> Response:
        return await self._drawn(request, _Crop(side=_THUMBNAIL_SIDE))

    async def picture(self, request: Request) -> Response:
        return await self._drawn(request, _CROP.validate_python(_query(request)))

    async def objects(self, request: Request) -> Response:
        index = self._index(request)
        found = await run_in_threadpool(self.session.objects, index, _WAIT_SECONDS)
        return Response(status_code=202) if found is None else JSONResponse(found)

    async def correct(self, request: Request) -> Response:
        index = self._index(request)
        body = _CORRECTED.validate_json(await _body(request))
        corrections = Corrections(removed=body.removed, added=body.added)
        result = await run_in_threadpool(self.session.correct, index, corrections, body.revision)
        if result is None:
            return _error(
                "this image was corrected in another window; its objects are read again", 409
            )
        return JSONResponse(result)

    async def export(self, request: Request) -> Response:
        form = request.path_params["form"]
        if form not in ("coco", "csv"):
            return _error("there is no such format", 404)
        session, chosen = self.session, _filter(request)
        images = await run_in_threadpool(session.exported, chosen)
        pieces: Iterator[str]
        if form == "coco":
            sizes = await run_in_threadpool(session.sizes)
            pieces, name, kind = exports.coco(images, sizes), "annotations.json", "application/json"
        else:
            pieces, name, kind = exports.table(images), "objects.csv", "text/csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(pieces, headers=headers, media_type=kind)

    async def choose(self, request: Request) -> Response:
        body = _MODEL.validate_json(await _body(request))
        await run_in_threadpool(self.session.choose, body.model)
        return await self.state(request)

    async def train(self, request: Request) -> Response:
        await run_in_threadpool(self.session.train)
        return await self.state(request)

    async def stop(self, request: Request) -> Response:
        await run_in_threadpool(self.session.stop_training)
        return await self.state(request)

    async def take(self, request: Request) -> Response:
        await run_in_threadpool(self.session.take_trained)
        return await self.state(request)

    async def _drawn(self, request: Request, crop: _Crop) -> Response:
        path = self.session.paths[self._index(request)]
        key = f"{self.session.pictures.version(path)}-{crop.side}-{crop.region}"
        headers = {"ETag": f'"{key}"', "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        region = None
        if crop.region is not None:
            x, y, width, height = map(int, crop.region.split(","))
            region = x, y, width, height
        draw = self.session.pictures.draw
        data, kind = await run_in_threadpool(draw, path, crop.side, region)
        return Response(data, media_type=kind, headers=headers)

    def _index(self, request: Request) -> int:
        index: int = request.path_params["index"]
        if index >= len(self.session.paths):
            raise InputError(f"there is no image {index}")
        return index


def _query(request: Request) -> dict[str, str]:
    if len(request.url.query) > _MAX_QUERY:
        raise InputError("the query is too long")
    return {name: value for name, value in request.query_params.items() if name != "token"}


def _filter(request: Request) -> Filter:
    """The filter of a query, in which groups to leave out are divided by commas."""
    values: dict[str, Any] = _query(request)
    if "without" in values:
        values["without"] = [word for word in values["without"].split(",") if word]
    return _FILTER.validate_python(values)


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY:
            raise _TooLarge
    return bytes(data)


def _error(message: str, status: int) -> Response:
    return Response(json.dumps({"error": message}), status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    return _error(str(error), 400)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"])
    return _error(f"{f'{where}: ' if where else ''}{first['msg'][:200]}", 422)


async def _too_large(request: Request, error: Exception) -> Response:
    return _error("the request is too large", 413)


async def _failed(request: Request, error: Exception) -> Response:
    """An error of ours, which the page shows."""
    response = _error(f"internal error: {type(error).__name__}: {error}", 500)
    response.headers.update(_HEADERS)  # it does not pass the guard
    return response


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)
