"""Without uvloop all works, slower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.service import ROOT, Service
from tests.wire import crash, get, post, wire


async def test_asyncio_s_own_loop_serves_both_ways(
    tmp_path: Path, make_service: Callable[..., Service], database: str
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "uvloop.py").write_text("open(__file__ + '.asked', 'w')\nraise ImportError")
    env = {"PYTHONPATH": f"{hidden}:{ROOT}"}
    service = await make_service(env=env, database_url=database, load_interval=3600).start()
    assert (hidden / "uvloop.py.asked").exists()
    async with wire(service) as line:
        for body, status in ((b"{", 400), (b'{"event_name": "install"}', 400)):
            await line.send(post(body) * 3)
            assert [(await line.answer()).status for _ in range(3)] == [status] * 3
        await line.send(get("/healthz"))
        assert (await line.answer(method="GET")).status == 200
    assert (await service.post([crash(), crash()]))[0] == 200
    assert (await service.post(crash()))[0] == 200
    assert (await service.load())["loaded"] == {"crash_report": 3}
    assert await service.stop() == 0
