"""Pages of ``gpt2-pl demo``, served in this process, and requests to them without a browser."""

import contextlib
import functools
import json
import re
import threading
import urllib.error
import urllib.request
import uuid
from html import unescape

from gpt2_pl.commands.support.demo_answers import Worker
from gpt2_pl.commands.support.demo_page import build, mount
from gpt2_pl.commands.support.demo_server import Server, listen

OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy of the environment


@contextlib.contextmanager
def served(runs, given, examples=(), title="title"):
    """Serve a page on a free port of this machine, and yield its address."""
    worker, started, opened = Worker(), threading.Event(), listen("127.0.0.1", 0)
    server = Server(mount(build(runs, given, examples, title, worker)), "127.0.0.1", started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        worker.close()
        thread.join(30)
        opened.close()


def get(url, data=None, headers=None):
    """Return the status and the body of a response."""
    request = urllib.request.Request(url, data, headers or {})
    try:
        with OPEN(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@functools.cache
def function(url):
    """Return the number of the function that answers."""
    config = json.loads(get(f"{url}/config")[1])
    answers = {part["id"] for part in config["components"] if part["props"].get("elem_id") == "answer-0"}
    return next(entry["id"] for entry in config["dependencies"] if answers & {*entry["outputs"]})


def ask(url, *values):
    """Ask a page as its script does, and return the answers as HTML, and the kinds of the messages before them."""
    session, kinds = uuid.uuid4().hex[:11], []
    content = {"data": values, "fn_index": function(url), "session_hash": session}
    headers = {"Content-Type": "application/json"}
    status, body = get(f"{url}/gradio_api/queue/join", json.dumps(content).encode(), headers)
    assert status == 200, body
    with OPEN(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                kinds.append(message["msg"])
                if message["msg"] == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"], kinds
    raise AssertionError(f"no answer after {kinds}")


def plain(html):
    """Return the text of HTML."""
    return unescape(re.sub(r"<[^>]+>", "", html))
