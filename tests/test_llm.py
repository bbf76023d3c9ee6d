"""The chat client against a real server on loopback that speaks chat completions, and its recordings."""
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from errors import UserError
from llm import client
from llm.client import Args, Client, key_of

KEY = "sk-loopback-0123456789"
OLD_NAME = (400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
HELLO = [{"role": "user", "content": "hi"}]


class Server(ThreadingHTTPServer):
    """Answers the n-th request as `script[n]` says, the later ones with 'fine' and a number."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.headers, self.times = [], [], [], []
        self.over = threading.Event()  # what hangs hangs until then
        self.lock, self.two = threading.Lock(), threading.Barrier(2)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
        act = server.script[number] if number < len(server.script) else "fine"
        if act == "an old name, twice at a time":
            server.two.wait(30)
            act = OLD_NAME
        if isinstance(act, tuple):
            status, headers, message = act
            return self.send(status, {"error": {"message": message}}, headers)
        if act == "hang":
            server.over.wait(60)
            self.close_connection = True
        elif act == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif act == "cut in the middle":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif act == "a page":
            self.send(200, f"<html>welcome {KEY}</html>", {"Content-Type": "text/html"})
        elif act == "a page with the key at its cut":
            self.send(200, f"{'.' * 50} {KEY}", {"Content-Type": "text/html"})
        elif act == "broken JSON":
            self.send(200, '{"choices": [')
        elif act == "no choices":
            self.send(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []})
        elif act == "odd":
            self.send(200, {"choices": [{"message": None}], "usage": None})
        elif act == "no text":
            self.send(200, self.answer(None, "stop"))
        elif act == "a list":
            self.send(200, self.answer([{"type": "text", "text": "hi"}], "stop"))
        elif act == "choices by name":
            self.send(200, {"choices": {"a": 1}, "usage": 7})
        elif act == "not UTF-8":
            self.send(200, b'{"choices": [{"message": {"content": "\xff"}}]}')
        elif act == "all thought":
            self.send(200, self.answer("", "length"))
        elif act == "truncated":
            self.send(200, self.answer("```python\ndef policy(ob", "length"))
        elif act == "fine":
            self.send(200, self.answer(f"fine {number}", "stop"))
        else:
            self.send(200, self.answer(act, "stop"))

    def answer(self, text, reason):
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "model-as-served",
                "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}

    def send(self, status, body, headers=None):
        text = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def chat(server, tmp_path, mode="record", **changes) -> Client:
    made = Client(Args(mode=mode, base_url=server.url, **{"model": "m", "timeout": 20.0, **changes}),
                  tmp_path / "recordings" / "some.jsonl")
    made.first_wait = 0.002
    return made


def refused(error) -> str:
    text = str(error.value)
    assert "\n" not in text and KEY not in text and len(text) < 800
    return text


def test_keys():
    params = {"temperature": 0.5, "sample": 0}
    assert key_of("gpt-4-0613", HELLO, params) == "1d53a7671c378ffd8d6170bf88fc111e390d614aa0c6cd25cdd1d1cb95ee2527"
    assert key_of("gpt-4-0613", HELLO, {"sample": 0, "temperature": 0.5}) == key_of("gpt-4-0613", HELLO, params)
    assert key_of("gpt-4-0613", HELLO, params | {"sample": 1}).startswith("a276b69da917dbfa")


def test_record_then_replay(server, tmp_path, monkeypatch):
    recorder = chat(server, tmp_path)
    first, again, other = recorder.ask(HELLO), recorder.ask(HELLO), recorder.ask(HELLO, sample=1)
    assert (first.text, again, other.text) == ("fine 0", first, "fine 1") and recorder.calls == 2
    assert server.requests[0] == {"model": "m", "messages": HELLO, "temperature": 1.0, "max_tokens": 2048}
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    record = json.loads((tmp_path / "recordings" / "some.jsonl").read_text().splitlines()[0])
    assert record["source"] == "api" and record["model"] == "m" and record["reported_model"] == "model-as-served"
    assert record["server"] == server.url and record["usage"]["total_tokens"] == 8 and record["messages"] == HELLO

    monkeypatch.delenv("OPENAI_API_KEY")
    player = Client(Args(model="m"), tmp_path / "recordings" / "some.jsonl")
    assert player.ask(HELLO) == first and player.ask(HELLO, sample=1) == other and len(server.requests) == 2
    for missing in [(HELLO, 2), ([{"role": "user", "content": "what is\nnew?"}], 0)]:
        with pytest.raises(UserError, match="not recorded for model m") as error:
            player.ask(*missing)
        assert "--mode record" in refused(error)
    assert "what is new?" in refused(error) and len(server.requests) == 2


def test_off_keeps_nothing(server, tmp_path):
    off = chat(server, tmp_path, mode="off")
    assert [off.ask(HELLO).text, off.ask(HELLO).text] == ["fine 0", "fine 1"]
    assert not (tmp_path / "recordings").exists()


@pytest.mark.parametrize("trouble", [
    (429, {"Retry-After": "0.25"}, "slow down"), (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "slow down"),
    (500, {}, "oh"), (503, {}, "loading"), (408, {}, "late"), (409, {}, "conflict"), "no choices", "no text", "hang",
    "cut", "cut in the middle", "broken JSON", "a list", "choices by name", "not UTF-8"], ids=str)
def test_trouble_that_passes(server, tmp_path, trouble):
    server.script = [trouble, trouble, "at last"]
    asked = chat(server, tmp_path, timeout=0.3 if trouble == "hang" else 20.0)
    assert asked.ask(HELLO).text == "at last" and len(server.requests) == 3
    assert len((tmp_path / "recordings" / "some.jsonl").read_text().splitlines()) == 1
    if isinstance(trouble, tuple) and trouble[1].get("Retry-After") == "0.25":
        assert min(b - a for a, b in zip(server.times, server.times[1:])) >= 0.25


@pytest.mark.parametrize("trouble, said", [
    ((500, {}, f"oh, your key {KEY}"), "500"), ("no choices", "without text"), ("cut", "did not answer in 8 tries"),
    ("broken JSON", "did not answer in 8 tries"), ("odd", "without text"), ("a list", "without text"),
    ("not UTF-8", "did not answer in 8 tries")], ids=str)
def test_trouble_that_stays(server, tmp_path, trouble, said):
    server.script = ["before"] + [trouble] * 8 + ["after"]
    asked = chat(server, tmp_path)
    asked.ask(HELLO)
    with pytest.raises(UserError, match=said) as error:
        asked.ask(HELLO, sample=1)
    assert "run the same again" in refused(error)
    later = chat(server, tmp_path)  # the same again: the first is not asked twice
    assert later.ask(HELLO).text == "before" and later.ask(HELLO, sample=1).text == "after"


@pytest.mark.parametrize("trouble", [(401, {}, f"bad key {KEY}"), (403, {}, "no"), (404, {}, "no such model"),
                                     (400, {}, "too\nlong"), (422, {}, "what")], ids=str)
def test_refusals_are_not_repeated(server, tmp_path, trouble):
    server.script = [trouble]
    with pytest.raises(UserError, match=f"refuses model m: .*{trouble[0]}") as error:
        chat(server, tmp_path).ask(HELLO)
    assert "--base-url" in refused(error) and len(server.requests) == 1


def test_an_address_that_is_no_such_server(server, tmp_path):
    server.script = ["a page"]
    with pytest.raises(UserError, match="no chat completions server, it answers '<html>welcome") as error:
        chat(server, tmp_path).ask(HELLO)
    assert "/v1" in refused(error) and len(server.requests) == 1


def test_a_key_is_hidden_before_a_page_is_cut(server, tmp_path):
    server.script = ["a page with the key at its cut"]
    with pytest.raises(UserError, match=r"answers '\.{50} \*\*\*'; --base-url") as error:
        chat(server, tmp_path).ask(HELLO)
    assert KEY[:5] not in refused(error)


def test_a_wait_of_hours_ends_the_command(server, tmp_path):
    server.script = [(429, {"Retry-After": "7200"}, "quota")]
    with pytest.raises(UserError, match="asks to wait 7200 s") as error:
        chat(server, tmp_path).ask(HELLO)
    assert "run the same again then" in refused(error) and len(server.requests) == 1


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:word@127.0.0.1:{free.getsockname()[1]}/v1"
    asked = Client(Args(mode="record", model="m", base_url=url), tmp_path / "a.jsonl")
    asked.first_wait = 0.001
    with pytest.raises(UserError, match="did not answer in 8 tries") as error:
        asked.ask(HELLO)
    assert "word" not in refused(error)


def test_truncated_replies_are_marked(server, tmp_path):
    server.script = ["truncated"]
    reply = chat(server, tmp_path).ask(HELLO)
    assert reply.truncated and Client(Args(model="m"), tmp_path / "recordings" / "some.jsonl").ask(HELLO).truncated


def test_newer_name_of_max_tokens(server, tmp_path):
    server.script = [OLD_NAME, "a", "b"]
    asked = chat(server, tmp_path)
    assert asked.ask(HELLO).text == "a" and asked.ask(HELLO, sample=1).text == "b"
    assert [("max_tokens" in r, "max_completion_tokens" in r) for r in server.requests] == [(1, 0), (0, 1), (0, 1)]


def test_newer_name_of_max_tokens_for_many_at_a_time(server, tmp_path):
    server.script = ["an old name, twice at a time"] * 2
    questions = [[{"role": "user", "content": c}] for c in "ab"]
    assert len(list(chat(server, tmp_path, workers=2).ask_all(questions))) == 2
    assert ["max_tokens" in request for request in server.requests] == [True, True, False, False]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", " "])
def test_a_key_from_a_file_with_an_end_of_line(server, tmp_path, monkeypatch, end):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + end)
    assert chat(server, tmp_path).ask(HELLO).text == "fine 0" and len(server.requests) == 1
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", " "])
@pytest.mark.parametrize("flag", [True, False])
def test_an_address_from_a_file_with_an_end_of_line(server, tmp_path, monkeypatch, end, flag):
    monkeypatch.setenv("OPENAI_BASE_URL", end if flag else server.url + end)
    made = Client(Args(mode="off", model="m", base_url=server.url + end if flag else end), tmp_path / "a.jsonl")
    assert made.ask(HELLO).text == "fine 0" and made.server == server.url
    monkeypatch.setenv("OPENAI_BASE_URL", end)  # none at all
    assert Client(Args(mode="off", model="m"), tmp_path / "a.jsonl").server == "https://api.openai.com/v1"


@pytest.mark.parametrize("url, shown", [
    ("http://user:word@h/v1", "http://h/v1"), ("http://user:w/rd@h/v1", "http://h/v1"),
    ("http://user:w@rd@h/v1", "http://h/v1"), ("http://h?k=a@b", "http://h"), ("http://h/v1#a@b", "http://h/v1"),
    ("http://h/v1?k=a/b@c", "http://h/v1"), ("user:w/rd@h", "h"), ("http://user:w\nrd@h/v1?k=a\nb@c", "http://h/v1"),
    ("http://h\n/v1", "http://h?/v1"), ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1")])
def test_an_address_is_shown_without_what_is_secret(url, shown):
    assert client._without_password(url) == shown


@pytest.mark.parametrize("inside", ["\n", "\r", "\u00e9", "\x1b"])
def test_a_key_that_is_none(server, tmp_path, monkeypatch, inside):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}{inside}{KEY}")
    with pytest.raises(UserError, match="OPENAI_API_KEY has a character that no key has") as error:
        chat(server, tmp_path)
    refused(error)


def test_all_tokens_are_used_before_an_answer(server, tmp_path):
    """A question is asked three times, each of which counts; what was answered before is not asked again."""
    server.script = ["before", "all thought", "all thought", "at last", *["all thought"] * 3, "after"]
    asked = chat(server, tmp_path, max_calls=8)
    assert [asked.ask(HELLO, sample).text for sample in (0, 1)] == ["before", "at last"] and asked.calls == 4
    with pytest.raises(UserError, match="all --max-tokens 2048 were used before an answer, 3 times; run the same "
                                        "again, which asks this one anew; another --max-tokens asks everything anew"
                       ) as error:
        asked.ask(HELLO, sample=2)
    refused(error)
    assert len(server.requests) == asked.calls == 7
    assert [chat(server, tmp_path).ask(HELLO, sample).text for sample in (0, 1, 2)] == ["before", "at last", "after"]
    server.script += ["all thought"] * 3
    with pytest.raises(UserError, match="--max-calls 2 are used up"):
        chat(server, tmp_path, max_calls=2).ask(HELLO, sample=3)
    assert len(server.requests) == 10


@pytest.mark.parametrize("trouble", ["no text", "broken JSON"])
def test_answers_without_text_count_as_calls(server, tmp_path, trouble):
    server.script = [trouble] * 8
    with pytest.raises(UserError, match="--max-calls 3 are used up"):
        chat(server, tmp_path, max_calls=3).ask(HELLO)
    assert len(server.requests) == 3


def test_half_a_letter_is_kept_as_a_question_mark(server, tmp_path):
    server.script = ["half \ud83d", "9"]
    assert chat(server, tmp_path).ask_for(HELLO, int)[0] == 9
    assert server.requests[1]["messages"][1]["content"] == "half ?"
    assert Client(Args(model="m"), tmp_path / "recordings" / "some.jsonl").ask_for(HELLO, int)[0] == 9


@pytest.mark.parametrize("place", ["file/some.jsonl", "folder"])
def test_recordings_that_cannot_be_written_are_found_before_a_call(server, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"recordings .*{place} cannot be written") as error:
        Client(Args(mode="record", model="m", base_url=server.url), tmp_path / place).ask(HELLO)
    refused(error)
    assert server.requests == []


def test_no_empty_recordings_are_left_behind(server, tmp_path):
    server.script = [(404, {}, "no such model")] * 3
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for place in ("new/folder/some.jsonl", "folder/some.jsonl", "empty"):
        with pytest.raises(UserError, match="no such model"):
            Client(Args(mode="record", model="m", base_url=server.url), tmp_path / place).ask(HELLO)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "folder"]  # which were there before


def test_only_what_is_added_to_has_to_be_writable(server, tmp_path, monkeypatch):
    chat(server, tmp_path).ask(HELLO)

    def read_only(file):
        raise UserError("a disk that is read-only")
    monkeypatch.setattr(client, "_to_append", read_only)
    complete = chat(server, tmp_path)
    assert complete.estimate([HELLO]) == 0 and complete.ask(HELLO).text == "fine 0"
    with pytest.raises(UserError, match="read-only"):
        complete.ask(HELLO, sample=1)
    assert len(server.requests) == 1


def test_equal_questions_are_asked_once(server, tmp_path, capsys):
    questions = [HELLO, HELLO, [{"role": "user", "content": "other"}], HELLO]
    asked = chat(server, tmp_path)
    assert asked.estimate(questions, samples=[0] * 4) == 2
    texts = [reply.text for reply in asked.ask_all(questions)]
    assert len(server.requests) == asked.calls == 2 and texts[0] == texts[1] == texts[3] != texts[2]
    replayed = Client(Args(model="m"), tmp_path / "recordings" / "some.jsonl").ask_all(questions)
    assert [reply.text for reply in replayed] == texts
    assert capsys.readouterr().err.count(" calls to m at ") == 1


def test_a_line_comes_before_the_first_call(server, tmp_path, capsys):
    asked = chat(server, tmp_path)
    asked.ask(HELLO), asked.ask(HELLO, sample=1)
    assert capsys.readouterr().err.startswith("1 questions, 1 calls to m at http://127.0.0.1")


def test_repair_tells_the_model_what_was_wrong(server, tmp_path):
    server.script = ["truncated", "nine", "9"]
    value, messages = chat(server, tmp_path).ask_for(HELLO, int)
    assert value == 9 and [m["role"] for m in messages] == ["user", "assistant"] * 3
    told = server.requests[1]["messages"][-1]["content"]
    assert "invalid literal" in told and "cut after 2048 tokens" in told
    assert "cut after" not in server.requests[2]["messages"][-1]["content"]
    replayed, _ = Client(Args(model="m"), tmp_path / "recordings" / "some.jsonl").ask_for(HELLO, int)
    assert replayed == 9 and len(server.requests) == 3
    with pytest.raises(UserError, match="no usable answer in 2 tries: invalid literal"):
        chat(server, tmp_path).ask_for(HELLO, int, tries=2, sample=1)


def test_extra_is_sent_and_part_of_the_key(server, tmp_path):
    asked = chat(server, tmp_path)
    asked.ask(HELLO, extra={"grammar": "root ::= [AB]"})
    assert server.requests[0]["grammar"] == "root ::= [AB]" and asked.ask(HELLO).text == "fine 1"


def test_max_calls_stops_and_goes_on(server, tmp_path):
    questions = [[{"role": "user", "content": f"question {i}"}] for i in range(5)]
    asked = chat(server, tmp_path, max_calls=3, workers=1)
    with pytest.raises(UserError, match="--max-calls 3 are used up") as error:
        list(asked.ask_all(questions))
    assert "run the same again" in refused(error) and len(server.requests) == 3
    again = chat(server, tmp_path, max_calls=3, workers=1)
    assert len(list(again.ask_all(questions))) == 5 and len(server.requests) == 5


def test_many_at_a_time_in_order(server, tmp_path):
    questions = [[{"role": "user", "content": f"question {i}"}] for i in range(40)]
    replies = list(chat(server, tmp_path, workers=8).ask_all(questions))
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert [asked[int(reply.text.split()[1])] for reply in replies] == [q[0]["content"] for q in questions]
    assert len(client.read(tmp_path / "recordings" / "some.jsonl")) == 40


def test_one_failure_of_many_ends_it_and_keeps_the_rest(server, tmp_path):
    server.script = ["fine", (401, {}, "no more"), "fine"]
    questions = [[{"role": "user", "content": c}] for c in "abc"]
    with pytest.raises(UserError, match="no more"):
        list(chat(server, tmp_path, workers=1).ask_all(questions))
    assert len(client.read(tmp_path / "recordings" / "some.jsonl")) >= 1
    assert len(list(chat(server, tmp_path, workers=1).ask_all(questions))) == 3


def test_one_failure_of_many_stops_the_tries_of_the_others(server, tmp_path):
    server.script = [(429, {"Retry-After": "59"}, "busy"), (401, {}, "no more")]
    questions = [[{"role": "user", "content": c}] for c in "ab"]
    with pytest.raises(UserError, match="no more"):
        list(chat(server, tmp_path, workers=2).ask_all(questions))
    assert len(server.requests) == 2  # the busy one is not asked again
    again = chat(server, tmp_path, workers=1)
    assert [reply.text for reply in again.ask_all(questions)] == ["fine 2", "fine 3"]
    server.script = ["fine"] * 4 + [(500, {}, "oh")] * 3
    assert again.ask(HELLO).text == "fine 7"  # and later calls have all their tries


def test_estimate_before_the_first_call(server, tmp_path, capsys):
    asked = chat(server, tmp_path, max_calls=4)
    asked.ask(HELLO)
    long = [{"role": "system", "content": "x" * 4000}, {"role": "user", "content": "y" * 400}]
    assert asked.estimate([HELLO, HELLO, long]) == 2  # the first is recorded, the second is sample 1
    assert "3 questions, 2 calls to m at http://127.0.0.1" in (said := capsys.readouterr().err)
    assert "1,112 tokens in, 1,000 out" in said
    assert said.endswith("out\n")
    asked.estimate([HELLO, long], most=2)  # the first is recorded
    assert "1 calls to m" in (said := capsys.readouterr().err)
    assert said.endswith("500 out; at most 2 calls where answers cannot be used\n")
    asked.estimate([long], most=9)
    assert "; at most 3 calls where" in capsys.readouterr().err  # what --max-calls leaves
    with pytest.raises(UserError, match="5 calls are more than --max-calls 4"):
        asked.estimate([long] * 5)
    assert len(server.requests) == 1
    assert Client(Args(), tmp_path / "none.jsonl").estimate([long] * 500) == 0


@pytest.mark.parametrize("flags, said", [
    ({"mode": "record"}, "name its model"), ({"mode": "off", "model": "m"}, "no key: set OPENAI_API_KEY"),
    ({"mode": "record", "model": "m", "base_url": "localhost:80"}, "is no address"),
    ({"mode": "record", "model": "m", "base_url": "ftp://u:secret@x/"}, "--base-url ftp://x/ is no address"),
    *(({"mode": "record", "model": "m", "base_url": f"http://u:secret@{rest}/v1"}, "is no address")
      for rest in ("[::1", "x:port", "x:99999", "a b", "", "a\nb", "a\rb", "a\x1bb", "a/\u2028b")),
    ({"mode": "record", "model": "m", "base_url": "http://u:sec/secret@x/v1"}, "--base-url http://x/v1 is no address"),
    ({"max_calls": 0}, "--max-calls is 0"), ({"timeout": float("nan")}, "--timeout is nan"),
    ({"temperature": -1.0}, "--temperature is -1.0")])
def test_flags_that_cannot_be_used(tmp_path, monkeypatch, flags, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match=said) as error:
        Client(Args(**flags), tmp_path / "a.jsonl")
    assert "secret" not in refused(error)


def recorded(model="m", source="api", **changes) -> dict:
    record = {"source": source, "model": model, "messages": HELLO, "params": {"sample": 0}, "answer": "yes"}
    return {"key": key_of(model, record["messages"], record["params"])} | record | changes


def test_a_cut_line_is_left_out_and_replaced(tmp_path):
    file = tmp_path / "a.jsonl"
    client.append(file, recorded())
    file.write_bytes(file.read_bytes() + json.dumps(recorded("other")).encode()[:70])  # the machine stopped here
    assert [r["model"] for r in client.read(file).values()] == ["m"]
    client.append(file, recorded("third"))
    assert [r["model"] for r in client.read(file).values()] == ["m", "third"]
    file.write_text(file.read_text().rstrip("\n"))  # an editor that ends files without a newline
    client.append(file, recorded("fourth"))
    assert [r["model"] for r in client.read(file).values()] == ["m", "third", "fourth"]


@pytest.mark.parametrize("line, said", [
    ("{", "no JSON"), ("[]", "no recording"), ('{"key": 1}', "no recording"), ("7", "no recording"),
    (json.dumps(recorded(source="mock")), "source 'mock'"),
    (json.dumps(recorded(source="handwritten")), "does not fit"),
    (json.dumps(recorded("handwritten")), "does not fit"), (json.dumps(recorded(answer=None)), "was changed"),
    (json.dumps(recorded(messages=[{"role": "user", "content": "another"}])), "was changed"),
    (json.dumps(recorded(params={"sample": 1})), "was changed")])
def test_recordings_that_are_none(tmp_path, line, said):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(recorded()) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=f"line 3: .*{said}") as error:
        Client(Args(model="m"), file)
    refused(error)


def test_what_a_person_wrote_is_said_to_be_so(tmp_path):
    Client(Args(), tmp_path / "a.jsonl").write_by_hand(HELLO, "yes", sample=3)
    reply = Client(Args(), tmp_path / "a.jsonl").ask(HELLO, sample=3)
    assert (reply.text, reply.source, reply.model) == ("yes", "handwritten", "handwritten")
    with pytest.raises(UserError, match="not written by hand"):
        Client(Args(model="m"), tmp_path / "a.jsonl").write_by_hand(HELLO, "yes")


def test_prompts():
    assert "because" in client.prompt("again", reason="because")
    with pytest.raises(UserError, match="prompt nothing is not in llm/prompts; it has again"):
        client.prompt("nothing")
