"""The page at `/`, in a real browser, over an endpoint whose replicas are not there."""

import socket
import threading
import time

import pytest
import uvicorn
from browsing import CHROMIUM, open_browser
from fake_endpoint import LocalLedger, make_client
from playwright.sync_api import expect

from ftray.serve.http.ingress import Ingress
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.accounts import Accounts, Tenant
from ftray.serve.tenants.auth import Authenticator
from ftray.serve.tenants.rate_limits import RateLimiter

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def serve():
    """Starts an HTTP server for an ingress; returns its URL."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(ingress: Ingress) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        app = make_client(ingress).app
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        return f"http://127.0.0.1:{port}/"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(browser, serve):
    """A page that must not complain, nor load anything from elsewhere. It is closed before its server, which it asks
    once a second."""
    page = browser.new_page()
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    yield page
    page.close()
    assert [text for text in complaints if "401" not in text and "404" not in text] == []
    assert len(hosts) == 1


def choose(page, number: int, model: str) -> None:
    page.get_by_label(f"Model {number}").fill(model)
    page.get_by_label(f"Model {number}").press("Tab")


def ask(page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.get_by_label("Message").press("Enter")


def test_two_models_answer_side_by_side_while_they_write(page, serve, registry, backend):
    backend.pause_s = 1.0
    page.goto(serve(Ingress(ModelNames("base-model", registry), backend, Authenticator(None))))
    page.wait_for_selector(".replica")
    choose(page, 1, "support")
    choose(page, 2, "support@canary")
    ask(page, "hello?")
    expect(page.locator(".turn.writing .words")).to_have_text(["I am ", "I am "])
    expect(page.locator(".turn.writing")).to_have_count(0)
    expect(page.locator(".words")).to_have_text(["I am support@2", "I am support@3"])
    for reported, version in zip(page.locator(".told").all_inner_texts(), ("support@2", "support@3"), strict=True):
        assert reported.startswith(f"{version} · first token ")
        assert " · 2 tokens · " in reported
    page.wait_for_selector("#traffic td:text('support@3')")
    ask(page, "and now?")  # each side goes on with its own conversation
    expect(page.locator(".turn:not(.writing) .words")).to_have_count(4)
    for adapter in ("support@2", "support@3"):  # whose request comes first is chance
        last = [job for job in backend.jobs if job.adapter == adapter][-1]
        assert [m["content"] for m in last.prompts[0]] == ["hello?", f"I am {adapter}", "and now?"]


def test_a_flip_shows_at_once_in_name_aliases_and_card(page, serve, registry, backend):
    page.goto(serve(Ingress(ModelNames("base-model", registry), backend, Authenticator(None))))
    page.wait_for_selector(".replica")
    choose(page, 2, "support")
    page.wait_for_selector(".version:text('support@2')")
    page.get_by_role("button", name="Card").nth(1).click()
    page.wait_for_selector(".card h3:text('support@2')")
    registry.promote("support@1", "prod")
    page.wait_for_selector(".version.flipped:text('support@1')", timeout=3000)
    page.wait_for_selector("#aliases tr.flipped:has-text('support@prod')")
    page.wait_for_selector(".card h3:text('support@1')")
    ask(page, "who?")
    page.wait_for_selector(".words:text('I am support@1')")


def test_an_answer_can_be_stopped_and_an_error_is_shown(page, serve, registry, backend):
    backend.pause_s = 30.0
    page.goto(serve(Ingress(ModelNames("base-model", registry), backend, Authenticator(None))))
    page.wait_for_selector(".replica")
    choose(page, 1, "support")
    choose(page, 2, "nobody")
    ask(page, "hello?")
    page.wait_for_selector(".problem:has-text('nobody')")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".told:has-text('stopped')")
    deadline = time.monotonic() + 5
    while backend.num_open and time.monotonic() < deadline:
        time.sleep(0.05)
    assert backend.num_open == 0
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0


def test_a_tenant_enters_a_key_and_sees_what_it_may_use(page, serve, registry, backend, tmp_path):
    accounts = Accounts(str(tmp_path / "tenants.db"))
    keys = {t.name: accounts.create(t) for t in (Tenant("acme", adapters=("support",)), Tenant("bolt", adapters=()))}
    url = serve(Ingress(ModelNames("base-model", registry), backend, Authenticator(LocalLedger(RateLimiter(accounts)))))
    page.goto(url)
    page.get_by_label("API key").fill(keys["acme"])
    page.get_by_role("button", name="Use").click()
    page.wait_for_selector("#aliases td:text-is('support@prod')")
    assert page.locator(".chip").all_inner_texts() == ["support@2"]  # the replica has legal@1 too
    choose(page, 2, "support")
    ask(page, "hello?")
    page.wait_for_selector(".words:text('I am support@2')")
    assert keys["acme"] not in page.content()
    page.evaluate("sessionStorage.clear()")
    page.goto(url)
    page.get_by_label("API key").fill(keys["bolt"])
    page.get_by_role("button", name="Use").click()
    page.wait_for_selector("#base:text('base-model')")
    assert page.locator("#aliases").inner_text() == "none"


def test_the_page_shows_a_hostile_answer_as_text(page, serve, registry, backend):
    backend.text = "<img src=x onerror=document.title='broken'>"
    page.goto(serve(Ingress(ModelNames("base-model", registry), backend, Authenticator(None))))
    page.wait_for_selector(".replica")
    ask(page, "<b>hello</b>")
    page.wait_for_selector(".words:has-text('onerror')")
    assert page.locator(".words img, .turn b b").count() == 0
    assert page.title() == "ftray playground"
