"""Where the blocks of one page are run, one after the other, as a reader would.

    sh      bash -e; a block that ends with `datapipe serve` or `make run` starts a service, which
            runs until the page's end or the next one. `sudo systemctl start datapipe` does so, too;
            `stop` and `reload` are the reader's systemd as well
    sql     psql, once nothing waits any more; by the line that `make run` printed, if it did
    python, js    written to its file, or run where it has none
    html    written, and opened in a browser, from http://localhost:3000
    json    settings: read, event types and all
    toml, ini, yaml   parsed; dockerfile   linted
    promql   looked through for metrics that there are not
    text    what the block before it printed; `...` stands for anything, a time of psql for any

A page that starts no service is read with one running. The page's port 8080 is a free one here, and
so is 3000. A block that names a file of the repository shows what stands in it; one that names
another is written to it.
"""

from __future__ import annotations

import asyncio
import configparser
import doctest
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tomllib
import urllib.request
from pathlib import Path

import yaml
from aiohttp import web

from tests.browser.chromium import chromium
from tests.docs import metrics
from tests.docs.pages import ROOT, Block
from tests.ports import free_port
from tests.service import until

TIMEOUT_S = 60.0
_SERVES = re.compile(r"(\w+=\S+ )*((datapipe|python -m datapipe) serve( --\w+ \S+)*|make run)")
_TIMES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\+\d\d|-{5,}")  # and its rule
_SYSTEMD = re.compile(r"sudo systemctl (start|stop|reload) datapipe")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Stage:
    """A folder, a database, and what runs for the page.

    Args:
        folder: of the reader.
        database: its URL; empty: the service brings its own.
        bin: where psql is.
    """

    def __init__(self, folder: Path, database: str, bin: Path) -> None:
        self.folder = folder
        self.printed = ""
        self.said: list[str] = []  # by the service that runs
        self._ports = {"8080": str(free_port()), "3000": str(free_port())}
        self._service: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._database = database
        self._env = self._environment(bin)

    def _environment(self, bin: Path) -> dict[str, str]:
        mine = ("DATAPIPE_", "IRON_", "PYTEST", "PG")
        env = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
        for name in ("DYNO", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL"):
            env.pop(name, None)
        tools = self.folder / ".bin"
        tools.mkdir()
        # `-P`: as the script that pip installs, it does not look for modules where one is
        run = "import sys; from datapipe.cli.main import main; sys.exit(main())"
        commands = {
            "datapipe": f"{sys.executable} -P -c '{run}'",
            "python": sys.executable,
            "python3": sys.executable,
            "pytest": f"{sys.executable} -P -m pytest -p no:cacheprovider",
            "psql": f"{bin / 'psql'} -X -P pager=off",
            "pg_dump": str(bin / "pg_dump"),
            "pg_restore": str(bin / "pg_restore"),
            "make": f"{shutil.which('make')} -f {ROOT / 'Makefile'} -o .venv/.run -o .venv/.test "
            f"BIN={Path(sys.executable).parent}",
        }
        (self.folder / ".venv/bin").mkdir(parents=True)
        (self.folder / ".venv/bin/activate").touch()  # the reader's; ours is active already
        for name, command in commands.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (tools / name).chmod(0o755)
        env |= {
            "PATH": f"{tools}:{env['PATH']}", "HOME": str(self.folder), "LC_ALL": "C.UTF-8",
            "PORT": self._ports["8080"], "DATAPIPE_HOST": "127.0.0.1",
            "DATAPIPE_DATA_DIR": str(self.folder / "var"),
            "DATAPIPE_LOAD_INTERVAL": "0.2", "DATAPIPE_LOAD_MIN_INTERVAL": "0",
            # what a page installs, it has written: no network. 0 is how pip spells "true" here
            "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0",
        }  # fmt: skip
        return env | ({"DATABASE_URL": self._database} if self._database else {})

    def real(self, text: str) -> str:
        """With the ports that are there."""
        return re.sub(
            r"(\blocalhost:|\b127\.0\.0\.1:|--port )(8080|3000)\b",
            lambda found: found[1] + self._ports[found[2]],
            text,
        )

    async def run(self, block: Block) -> None:
        """Raises: AssertionError: it does not do what the page says."""
        text = self.real(block.text)
        if block.file and self._is_ours(block):
            return
        if ":8080" in block.text and self._service is None and block.kind == "sh":
            await self._serve("datapipe serve")  # the reader's, of another page
        known = {
            "sh": self._sh, "bash": self._sh, "sql": self._sql, "python": self._python,
            "js": self._js, "html": self._html, "json": self._json, "toml": self._toml,
            "ini": self._ini, "yaml": self._yaml, "promql": self._promql, "text": self._text,
            "diagram": self._diagram, "dockerfile": self._dockerfile,
        }  # fmt: skip
        how = known.get(block.kind)
        assert how is not None, f"{block.place}: nobody knows how to run a block of {block.kind!r}"
        try:
            await how(block, text)
        except AssertionError as exc:
            raise AssertionError(f"{block.place}: {exc}\n{self._last_words()}") from None

    def _is_ours(self, block: Block) -> bool:
        """Whether it shows a file of the repository, as it is there; others are written."""
        named = re.findall(r"`([^`]+)`", block.before)
        assert block.file in named, f"{block.place}: the prose before it must name `{block.file}`"
        if (ours := ROOT / block.file).is_file():
            assert block.text in ours.read_text(), f"{block.place}: {block.file} is otherwise"
            return True
        file = self.folder / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.real(block.text))
        return False

    def _last_words(self) -> str:
        return "".join(self.said[-20:])

    async def _sh(self, block: Block, text: str) -> None:
        """A file is a script; it is run, too."""
        lines = [line for line in text.splitlines() if line.strip()]
        if asked := _SYSTEMD.fullmatch(text.strip()):
            await self._systemctl(asked[1])
        elif lines and _SERVES.fullmatch(lines[-1].partition(" #")[0].strip()):
            await self._serve(text)
        else:
            await self._bash(text, block.exit)

    async def _bash(self, text: str, code: int = 0, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(words or ("bash", "-e", "-o", "pipefail", "-c", text)), cwd=self.folder,
            env=self._env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(TIMEOUT_S):
                out, err = await process.communicate(text.encode() if words else b"")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        self.printed = (out + (err if code else b"")).decode()
        assert process.returncode == code, f"exit {process.returncode}: {(out + err).decode()}"

    async def _serve(self, text: str) -> None:
        await self.stop()
        self.said = []
        self._service = await asyncio.create_subprocess_exec(
            "bash", "-e", "-c", text, cwd=self.folder, env=self._env, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read(self._service))
        service = self._service

        async def listens() -> bool:
            assert service.returncode is None, "it ended"
            return any('"listening"' in line for line in self.said)

        await until(listens, TIMEOUT_S, "a service that listens")

    async def _systemctl(self, verb: str) -> None:
        """Raises: AssertionError: there is nothing to be stopped, or to be reloaded."""
        if verb == "start":
            await self._serve("datapipe serve")
            return
        assert self._service is not None, "no service runs"
        if verb == "stop":
            await self.stop()
        else:
            await self._reload(self._service)

    async def _reload(self, service: asyncio.subprocess.Process) -> None:
        before = len(self.said)
        os.killpg(service.pid, signal.SIGHUP)

        async def reloaded() -> bool:
            return any('"settings reloaded"' in line for line in self.said[before:])

        await until(reloaded, TIMEOUT_S, "settings that are reloaded")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self.said.append(line.decode())

    async def stop(self) -> None:
        """End the service, if one runs: it must end well."""
        if self._service is None:
            return
        service, self._service = self._service, None
        if service.returncode is None:
            os.killpg(service.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await service.wait()
        finally:
            if service.returncode is None:
                os.killpg(service.pid, signal.SIGKILL)
                await service.wait()
        assert self._reader is not None
        await self._reader
        assert '"stopped"' in self._last_words(), self._last_words()

    async def loaded(self) -> None:
        """Wait until nothing waits to be loaded."""
        if self._service is None:
            return
        url = f"http://127.0.0.1:{self._ports['8080']}/status.json"

        def status() -> bool:
            with urllib.request.urlopen(url) as answer:
                return bool(json.load(answer)["books"]["waiting"] == 0)

        await until(lambda: asyncio.to_thread(status), what="an empty buffer")

    async def _sql(self, block: Block, text: str) -> None:
        await self.loaded()
        where = [self._database] if self._database else self._printed_psql()
        await self._bash(text, 0, "psql", "-v", "ON_ERROR_STOP=1", *where)

    def _printed_psql(self) -> list[str]:
        """The words of the `psql` line of `make run` that say which database."""
        (line,) = [line for line in self.said if line.startswith("  rows ")]
        words = shlex.split(line)
        return words[2 : words.index("-c")]

    async def _python(self, block: Block, text: str) -> None:
        compile(text, block.place, "exec")
        if not block.file:
            await self._bash(text, block.exit, "python", "-")

    async def _js(self, block: Block, text: str) -> None:
        if not block.file:
            await self._bash(text, block.exit, "node", "--input-type=module", "-")

    async def _html(self, block: Block, text: str) -> None:
        """Opened in a browser, and left again."""
        assert block.file, "a page needs a name"
        app = web.Application()
        app.router.add_static("/", self.folder)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "localhost", int(self._ports["3000"])).start()
        complaints: list[str] = []
        try:
            async with chromium() as browser:
                page = await browser.new_page()
                page.on("pageerror", lambda error: complaints.append(str(error)))
                page.on("console", lambda message: complaints.append(message.text))
                await page.goto(f"http://localhost:{self._ports['3000']}/{block.file}")
                await page.wait_for_load_state("networkidle")
                await page.goto("about:blank")
                self.printed = "\n".join(complaints)
        finally:
            await runner.cleanup()
        assert not complaints, complaints

    async def _json(self, block: Block, text: str) -> None:
        file = self.folder / (block.file or "settings-of-a-block.json")
        file.write_text(text)
        command = f"DATAPIPE_CNF={file} datapipe schema >/dev/null"
        await self._bash(command)

    async def _toml(self, block: Block, text: str) -> None:
        tomllib.loads(text)

    async def _ini(self, block: Block, text: str) -> None:
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.read_string(text)
        assert parser.sections()

    async def _promql(self, block: Block, text: str) -> None:
        for line in text.splitlines():
            metrics.check(line)

    async def _yaml(self, block: Block, text: str) -> None:
        assert yaml.safe_load(text)

    async def _dockerfile(self, block: Block, text: str) -> None:
        tool = f"{Path(sys.executable).parent}/hadolint"
        await self._bash(text, 0, tool, "--ignore=DL3006", "-")  # an image of the reader's own

    async def _diagram(self, block: Block, text: str) -> None:
        assert "->" in text

    async def _text(self, block: Block, text: str) -> None:
        # lines are told apart: an answer of one line has no end
        checker = doctest.OutputChecker()
        wanted, got = (
            _TIMES.sub("TIME", each.rstrip("\n")) + "\n" for each in (text, self.printed)
        )
        if not checker.check_output(wanted, got, _FLAGS):
            raise AssertionError(f"the page says:\n{wanted}\nit was:\n{got}")
