"""The server's key: who sends none or another is refused as OpenAI refuses, and it is shown nowhere."""

from collections.abc import Callable

import openai
import pytest

from sparsekv_pl.serve.serve_arguments import parsed
from tests.serve.conftest import RunningServer

Serve = Callable[..., RunningServer]
PLAIN = "sk-plain-0123456789"


def test_only_the_key_is_answered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TINY_KEY", f"{PLAIN}\n")
    server = serve("--api_key", "TINY_KEY")
    monkeypatch.delenv("TINY_KEY")  # it was read at the start
    for wrong in ("none", PLAIN[:-1], f"{PLAIN}0", PLAIN.upper()):
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client.with_options(api_key=wrong).models.list()
        assert caught.value.code == "invalid_api_key" and caught.value.type == "invalid_request_error"
        assert "is not this server's" in str(caught.value) and PLAIN not in str(caught.value)
    http, address = server.client._client, server.url
    for headers in ({}, {"Authorization": PLAIN}, {"Authorization": f"Basic {PLAIN}"}, {"Authorization": "Bearer"}):
        refused = http.post(f"{address}/chat/completions", content=b"no JSON", headers=headers)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert refused.json()["error"]["param"] is None
    assert http.get(f"{address}/nowhere").status_code == 401
    root = address.removesuffix("/v1")
    for path in ("health", "metrics"):
        assert http.get(f"{root}/{path}").status_code == 200
    assert PLAIN not in http.get(f"{root}/metrics").text
    client, message = server.client.with_options(api_key=PLAIN), {"role": "user", "content": "Who?"}
    assert client.models.list().data
    assert client.chat.completions.create(model="tiny", messages=[message], max_tokens=2)  # type: ignore[list-item]
    assert http.get(f"{address}/models", headers={"authorization": f"bearer  {PLAIN}"}).status_code == 200
    assert PLAIN not in caplog.text and PLAIN not in str(vars(server.served))
    assert 'status="401"' in server.served.metrics.text().decode()


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_that_is_not_set_is_refused_and_not_shown(
    value: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who gives the key itself does not find it in a log."""
    if value is not None:
        monkeypatch.setenv(PLAIN, value)
    with pytest.raises(SystemExit):
        parsed(["--api_key", PLAIN])
    said = capsys.readouterr().err
    assert "--api_key names an environment variable" in said and PLAIN not in said
