"""What the page's server answers, and whom; no browser."""

import json
import signal
import socket
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest

client_of = pytest.importorskip("gradio_client", reason="the page needs gradio: pip install 'sd-hyena[ui]'")

FORM = ("a frog on the left", "", "7", 2, 7.0, 64, 64, "model")
CHIPS = (["IN01", "OUT11"], [], [], [])  # by resolution


def ask(address, path="/", method="GET", body=None, **headers):
    """Status and body of a request with exactly these headers."""
    parts = urlsplit(address)
    connection = HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"Host": parts.netloc} | headers).items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_it_answers_itself(address):
    port = urlsplit(address).port
    for headers in ({}, {"Host": f"localhost:{port}"}, {"Origin": f"http://127.0.0.1:{port}"}):
        assert ask(address, **headers)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Host": "127.0.0.1:1"}, {"Host": ""},
     {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join", "/gradio_api/upload"])
def test_nobody_else_is_answered(address, path, headers):
    assert ask(address, path, **headers) == (403, b"not here\n")
    assert ask(address, path, "POST", b"{}", **headers)[0] == 403


def test_no_other_address_of_this_machine_answers(address):
    port = urlsplit(address).port
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in [*(o for o in others if not o.startswith("127.")), "127.0.0.2"]:
        with socket.socket() as caller:
            caller.settimeout(2)
            assert caller.connect_ex((other, port)) != 0, other


@pytest.mark.parametrize("name", ["/etc/passwd", "pyproject.toml", "broken.safetensors", "../../../../etc/passwd"])
def test_files_that_are_not_the_pages_own_are_not_handed_out(address, hyena_dir, name):
    path = hyena_dir / name if name == "broken.safetensors" else name
    for form in ("/gradio_api/file=", "/file="):
        status, body = ask(address, f"{form}{path}")
        assert status in (403, 404)
        assert b"root:" not in body


def test_a_picture_of_the_pages_own_is_handed_out(address, client):
    job = client.submit(*FORM, "the bundled student", *CHIPS, api_name="/draw")
    job.result(timeout=120)
    told = json.dumps(job.outputs())
    path = told.split("/gradio_api/file=")[1].split('"')[0].rstrip("\\")
    status, body = ask(address, f"/gradio_api/file={path}")
    assert (status, body[:4]) == (200, b"\x89PNG")
    assert b"parameters" in body


@pytest.fixture(scope="module")
def client(address):
    return client_of.Client(address, verbose=False)


def test_drawing_through_the_api(client):
    job = client.submit(*FORM[:2], "8", *FORM[3:], "the bundled student", *CHIPS, api_name="/draw")
    job.result(timeout=120)
    told = [str(each) for each in job.outputs()]
    wanted = ("attention: step 1 of 2", "Hyena: step 2 of 2", "Done.")
    places = [next(i for i, each in enumerate(told) if words in each) for words in wanted]
    assert places == sorted(places)
    assert "dB PSNR" in told[places[-1]]


@pytest.mark.parametrize("name", ["/etc/passwd", "../two.safetensors", "demo"])
def test_only_listed_hyena_files_are_opened(client, name):
    with pytest.raises(client_of.exceptions.AppError):
        client.predict(*FORM, name, *CHIPS, api_name="/draw")


def test_only_what_was_dropped_is_opened(address, client, hyena_dir):
    """The page's own way to tell of a dropped file, with a path that it never had from the server."""
    config = client.config
    drop = next(each for each in config["dependencies"] if any(event == "upload" for _, event in each["targets"]))
    for path in ("/etc/passwd", str(hyena_dir / "two.safetensors")):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        call = {"data": [file], "fn_index": drop["id"], "session_hash": "nobody"}
        status, body = ask(address, "/gradio_api/queue/join", "POST", json.dumps(call).encode())
        assert status == 200, body
        _, events = ask(address, "/gradio_api/queue/data?session_hash=nobody")
        assert b'"success":false' in events
        assert b"two.safetensors" not in events.replace(path.encode(), b"")


def test_a_signal_while_it_draws_ends_it(start, tmp_path):
    served = start(tmp_path)
    client = client_of.Client(served.address, verbose=False)
    job = client.submit(*FORM[:3], 500, *FORM[4:], "the bundled student", *CHIPS, api_name="/draw")
    deadline = time.monotonic() + 60
    while "step 1 of 500" not in str(job.outputs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(tmp_path.glob("sd-hyena-ui-*"))
    status, error = served.end(signal.SIGTERM)
    assert status == 143
    assert error.endswith("sd-hyena: stopped by SIGTERM: the page is closed\n")
    assert not list(tmp_path.glob("sd-hyena-ui-*"))
