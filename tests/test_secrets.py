"""No key, token or password in a run's files and output."""

import logging
import sys
import warnings
from pathlib import Path

import pytest

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import plain, run
from sparsekv_pl.cli.saved_config import SaveEvaluationConfig
from sparsekv_pl.reporting.redaction import HIDDEN, check_no_secret, redact_output, redacted
from tests.evaluation.scripted_server import Reply, failed, said, serving
from tests.processes import Started
from train import TrainCommandLine

CONFIGS = Path(__file__).parents[1] / "configs"
SECRETS = {
    "HF_TOKEN": "hf_FAKEfakeFAKEfakeFAKEfakeFAKEfake01",
    "OPENAI_API_KEY": "sk-fake-0b9d4e8f2a61c7d35e90",
    "GEMINI_API_KEY": "AIzaFAKE-fake_0123456789-fake_0123456789",
    "WANDB_API_KEY": "f4ke0b9d4e8f2a61c7d35e90f4ke0b9d4e8f2a61",
    "S3_SECRET": "a plain fake with spaces",
}
PASSWORD = "pa55word"
ADDRESS = f"https://me:{PASSWORD}@host.example/data"


@pytest.fixture(autouse=True)
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def leaks(folder: Path, printed: str) -> list[str]:
    """Which files, or the output, hold one of the secrets; read as bytes, so checkpoints and events too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {str(path.relative_to(folder)): path.read_bytes() for path in files} | {"output": printed.encode()}
    secrets = [secret.encode() for secret in (*SECRETS.values(), PASSWORD)]
    return [name for name, text in texts.items() if any(secret in text for secret in secrets)]


def test_a_training_writes_none(
    tiny_models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--data.context_tokens=96"]
    arguments += [f"--model.backbone.pretrained={tiny_models['llama']}", "--model.backbone.dtype=float32"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    arguments += ["--data.continuation_tokens=16", "--data.batch_size=2", "--trainer.accelerator=cpu"]
    arguments += ["--data.validation_windows=2", "--data.validation_needles=2", "--trainer.precision=32-true"]
    arguments += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]
    arguments += ["--trainer.callbacks.every_n_train_steps=1"]
    run(lambda: TrainCommandLine(args=arguments))
    printed = capfd.readouterr()
    assert leaks(tmp_path, printed.out + printed.err + caplog.text) == []
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert written >= {".ckpt", ".yaml", ".json", ".safetensors"}
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_an_evaluation_of_a_hosted_model_writes_none(
    tiny_models: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither its key nor those parts of its address's path that may be one."""
    caplog.set_level("DEBUG")
    key = SECRETS["OPENAI_API_KEY"]
    path = "v1/qzxkv/account-qzxkv/api"
    replies = [said(f"my key is {key}"), failed(400, f"no such key: {key}"), Reply(f"Bearer {key}".encode())]
    replies += [failed(400, f"cannot POST /{path}/chat/completions"), failed(400, "ask account-qzxkv")]
    with serving(*replies) as (server, url):
        arguments = ["test", "--config", str(CONFIGS / "evaluate" / "hosted.yaml")]
        arguments += [f"--model.hosted.base_url={url.removesuffix('v1')}{path}"]
        arguments += ["--model.hosted.key_variable=OPENAI_API_KEY", "--model.hosted.retries=0"]
        arguments += [f"--model.tokenizer={tiny_models['llama']}", f"--model.output={tmp_path}"]
        arguments += [f"--trainer.logger.save_dir={tmp_path}", "--data.lengths=[96]", "--data.tasks=null"]
        arguments += ["--trainer.enable_progress_bar=false"]
        run(
            lambda: EvaluateCommandLine(
                args=arguments,
                save_config_callback=SaveEvaluationConfig,
                save_config_kwargs={"save_to_log_dir": False},
            )
        )
        assert any(key in value for headers in server.headers for value in headers.values())  # it was sent
    printed = capfd.readouterr()
    assert leaks(tmp_path, printed.out + printed.err + caplog.text) == []
    reports = list(tmp_path.glob("report.*"))
    assert {"report.json", "report.md", "report.html"} <= {path.name for path in reports}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if b"qzxkv" in path.read_bytes()] == []
    assert "qzxkv" not in printed.out + printed.err + caplog.text
    saved = tmp_path / "evaluation.yaml"
    assert f"base_url: {url.removesuffix('/v1')}/v1/[hidden]/[hidden]/api" in saved.read_text()
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit, match=r"hosted\.base_url=http://.* was hidden when .* give the whole address"):
        run(lambda: EvaluateCommandLine(args=["test", "--config", str(saved)]))


REFUSED = {
    "address": "--data.text={class_path: data.text.HubText, init_args: {name: '" + ADDRESS + "'}}",
    "token": f"--data.text={{class_path: data.text.HubText, init_args: {{name: {SECRETS['HF_TOKEN']}}}}}",
    "file": "--data.text={class_path: data.text.LocalText, init_args: {paths: ['" + ADDRESS + "/a.txt']}}",
    "model": f"--model.backbone.pretrained={ADDRESS}",
    "environment's": f"--model.backbone.revision={SECRETS['S3_SECRET']}",
    "header": f"--trainer.logger.init_args.comment={{X-Api-Key: {PASSWORD}}}",
    "named": f"--trainer.logger.init_args.private_key={PASSWORD}",
    "unrecognised": f"--trainer.passphrase={PASSWORD}",
    "logger": f"--trainer.logger.init_args.prefix={SECRETS['WANDB_API_KEY']}",
    "unknown option": f"--data.api_key={SECRETS['GEMINI_API_KEY']}",
    "wrong type": f"--data.batch_size={SECRETS['OPENAI_API_KEY']}",
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_holds_one_is_refused_and_not_shown(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(lambda: TrainCommandLine(args=["fit", "--config", str(CONFIGS / "quickstart.yaml"), REFUSED[option]]))
    printed = capfd.readouterr()
    output = f"{end.value.code} {printed.out} {printed.err}"
    assert leaks(tmp_path, output) == []
    assert "(not shown)" in output or HIDDEN in output or "is not accepted" in output


def test_an_option_of_that_name_is_refused_whatever_it_holds() -> None:
    with pytest.raises(ValueError, match=r"trainer\.logger\.api_key holds a key") as raised:
        check_no_secret("trainer.logger.api_key", "quite ordinary")
    assert "ordinary" not in str(raised.value)
    for name in ("model.hosted.key_variable", "data.splits.key", "model.max_tokens", "model.hosted.max_tokens_total"):
        check_no_secret(name, "OPENAI_API_KEY")


TAIL = "FAKEfake0123FAKEfake4567FAKEfake8901"
SHAPED = {
    "GitHub": f"github_pat_11{TAIL}_{TAIL}",
    "GitHub's old": f"ghp_{TAIL}",
    "NVIDIA": f"nvapi-{TAIL}-{TAIL}",
    "Groq": f"gsk_{TAIL}",
    "GitLab": "glpat-FAKEfake0123FAKEfake",
    "Slack": "xoxb-1234567890-1234567890-FAKEfakeFAKEfake",
    "web token": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.{TAIL}",
    "AWS": "AKIAFAKEFAKE01234567",
    "Stripe": "sk_live_FAKEfake0123FAKEfake4567",
    "SendGrid": f"SG.FAKEfake0123FAKEfake45.{TAIL}FAKEfak",
    "Hugging Face": f"hf_{TAIL}",
    "OpenAI": f"sk-proj-{TAIL}",
    "PEM": f"-----BEGIN RSA PRIVATE KEY-----\\n{TAIL}\\n-----END RSA PRIVATE KEY-----",
    "Basic": "Basic bWU6cGE1NXdvcmQ=",  # me:pa55word
}
"""Known wherever they stand."""

NAMES = (
    *("X-Api-Key", "Authorization", "secret_key", "private_key", "passphrase", "api_key", "clientSecret", "hf_token"),
    *("aws_secret_access_key", "Proxy-Authorization", "password", "x-auth-token", "Cookie"),
)


@pytest.mark.parametrize("kind", SHAPED)
def test_a_key_is_known_by_its_shape(kind: str) -> None:
    secret = SHAPED[kind]
    for place in ("the server says: {}.", "{}", "https://host/v1/{}/x", "x={}", "{{'a': ['{}']}}"):
        text = place.format(secret)
        for shown in (redacted(text), plain(text)):
            assert HIDDEN in shown
            assert secret[-8:] not in shown and TAIL not in shown
        with pytest.raises(ValueError, match=r"^model\.note holds a key") as raised:
            check_no_secret("model.note", text)
        assert secret not in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_key_is_known_by_its_name(name: str) -> None:
    for text in (
        *("{0}: {1}", "{0}={1}", "{{'{0}': '{1}'}}", '{{\\"{0}\\": \\"{1}\\"}}', "a=1 --logger.{0} {1} --b 2"),
        *("--logger.{0}={1}", "https://host/v1?a=b&{0}={1}", "see: https://host/?{0}={1}", "{0}: Bearer {1}"),
    ):
        shown = redacted(text.format(name, PASSWORD))
        assert PASSWORD not in shown and HIDDEN in shown and name in shown, shown
    for key in (f"trainer.logger.{name}", f"model.hosted.options.extra_headers.{name}", f"model.{name}[0]"):
        with pytest.raises(ValueError, match="holds a key") as raised:
            check_no_secret(key, PASSWORD)
        assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    "form",
    [
        *(
            "Cookie: {0}",
            "Set-Cookie: {0}; Path=/",
            "--header.Cookie {0}",
            "headers.Cookie={0}",
            "curl -H 'Cookie: {0}'",
        ),
        *("{{'Cookie': '{0}', 'x': 'stays'}}", '{{"cookie": "{0}", "x": "stays"}}', '{{\\"cookie\\": \\"{0}\\"}}'),
        '"Cookie": "a=\\"b\\"; {0}", "x": "stays"',
    ],
)
def test_all_of_a_cookie_is_hidden(form: str) -> None:
    shown = redacted(f"{form.format(f'a={PASSWORD}; b={PASSWORD}; c={PASSWORD}')}\nanother line")
    assert PASSWORD not in shown and HIDDEN in shown
    assert ("stays" in form) == ("stays" in shown)
    assert shown.endswith("\nanother line")


@pytest.mark.parametrize(
    "message",
    [
        f"https://host/file?X-Amz-Signature={PASSWORD}&x=1",
        f"https://host/file?a=1&key={PASSWORD}",
        f"403 for {ADDRESS}?x=1",
        f"url=https://host/file?access_token={PASSWORD}",
        *(f"the server says: {secret}." for secret in SECRETS.values()),
    ],
)
def test_secrets_in_messages_are_hidden(message: str) -> None:
    for shown in (redacted(message), plain(message)):
        assert HIDDEN in shown
        assert not any(secret in shown for secret in (*SECRETS.values(), PASSWORD))


@pytest.mark.parametrize(
    "message",
    [
        *("https://host:8000/v1 is not reached", "mail me@host.example", "sk-learn and hf_hub are names", "a=b"),
        *("model.hosted.key_variable: give a NAME", "Option 'api_key' is not accepted", "pad_token: </s>, token=None"),
        *("/data/models--a/snapshots/0123456789abcdef0123456789abcdef01234567/", "a basic understanding of keys"),
        *("max_tokens_total=5", "hf_hub_download_timeout_seconds", "data.splits.key is 3: give a name"),
    ],
)
def test_other_messages_stay(message: str) -> None:
    assert redacted(message) == message


def test_warnings_are_still_shown(tmp_path: Path) -> None:
    """detect-secrets, once imported, would have all of them captured."""
    use = "from sparsekv_pl.reporting.redaction import redacted; redacted('a')"
    script = tmp_path / "warns.py"
    script.write_text(f"import warnings; {use}; warnings.warn('seen')")
    started = Started([str(script)], tmp_path / "log")
    assert started.wait() == 0
    assert "UserWarning: seen" in started.printed


def test_only_variables_that_hold_a_secret_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "OLDPWD", "HOME", "KEYBOARD"):
        monkeypatch.setenv(name, "/a/folder")
    assert redacted("/a/folder/a.txt") == "/a/folder/a.txt"
    for name in ("MY_KEY", "DB_PASSWORD", "SERVICE_AUTH", "GITLAB_TOKEN", "SSH_PASSPHRASE"):
        monkeypatch.setenv(name, f"a plain secret of {name}")
        assert redacted(f"it is a plain secret of {name}") == f"it is {HIDDEN}"


def test_secrets_in_logs_warnings_and_tracebacks_are_hidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any library: none is asked."""
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    factory = logging.getLogRecordFactory()
    try:
        redact_output()
        logging.getLogger("another.package").warning("%s of %d from http://me:pa55word@host", "a-secret-value", 3)
        logging.getLogger("another.package").warning("%s stays", "this")
        shown = warnings.formatwarning("a-secret-value", UserWarning, "file.py", 1, "")
        try:
            raise RuntimeError("a-secret-value")
        except RuntimeError as error:
            sys.excepthook(RuntimeError, error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == ["[hidden] of 3 from http://[hidden]@host", "this stays"]
    assert "[hidden]" in shown
    printed = capsys.readouterr().err
    assert "RuntimeError: [hidden]" in printed
    assert "a-secret-value" not in shown + printed
