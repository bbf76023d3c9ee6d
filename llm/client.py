"""A chat model behind any OpenAI-compatible server, with everything it ever said kept in a file.

    args = client.Args(mode="record", model="my-model", base_url="http://127.0.0.1:8080/v1")
    chat = Client(args, "llm/recordings/policies.jsonl")    # args: client.Args, or a dataclass that inherits it
    messages = [{"role": "user", "content": client.prompt("policy", task="...")}]
    chat.estimate([messages] * 5, most=15)            # one line: calls, tokens; raises UserError above --max-calls
    reply = chat.ask(messages, sample=0)              # Reply(text, truncated, source, model, key)
    for reply in chat.ask_all(conversations): ...     # in order, --workers at a time
    chat.write_by_hand(messages, answer, sample)      # what a person wrote, for the tests and for examples
    code, messages = chat.ask_for(messages, parse)    # parse(text) -> code; its ValueError is told to the model

Modes: `replay` (default) answers from the recordings, with no key and no network, and a question that was never asked
is an error that says how to record it; `record` asks the server what is not recorded and appends each answer as it
comes, so that a command that was interrupted goes on where it stopped; `off` asks the server always and keeps nothing.

A recordings file has one JSON object per line: key, source, model, server, time, messages, params, answer,
finish_reason, usage. `key` is the SHA-256 of messages, model and params (temperature, max_tokens, sample and what else
was sent), so that equal questions are asked once; another `sample` draws another answer. `source` is `api`, said by the
model at that server, or `handwritten`, written by a person: those have the model `handwritten`, which no server is ever
asked for, and a result made with them says so.

The key comes from OPENAI_API_KEY, the server from --base-url or OPENAI_BASE_URL; neither key nor passwords in an
address reach a file or a message.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import string
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlsplit

from errors import UserError
from llm.sandbox import SandboxUnavailable

HANDWRITTEN = "handwritten"  # the model and the source of answers that a person wrote
PROMPTS = Path(__file__).resolve().parent / "prompts"
TRIES = 8  # of one call, while the server says to come again
TRIES_CUT = 3  # of one call, while all tokens are used before an answer
NO_TEXT = "an answer without text"
HOST = re.compile(r"[\w.:%-]+")
LONGEST_WAIT = 60.0  # seconds between two tries, and the longest Retry-After that is waited for
TOKENS_PER_REPLY = 500  # what an estimate takes where --max-tokens is larger

Message = dict[str, str]
T = TypeVar("T")


@dataclass
class Args:
    """Flags of every command that asks a model."""
    mode: Literal["replay", "record", "off"] = "replay"  # from recordings; ask what is missing; ask, keep nothing
    model: str = HANDWRITTEN  # name of the model, as its server has it
    base_url: str = ""  # OpenAI-compatible server, ending in /v1; empty: OPENAI_BASE_URL, else OpenAI's own
    temperature: float = 1.0  # of sampling
    max_tokens: int = 2048  # longest reply, in tokens
    max_calls: int = 100  # calls of one command; one that needs more is refused, or stops; mode record keeps answers
    timeout: float = 120.0  # seconds without a sign of the server until a call counts as failed
    workers: int = 4  # calls at a time


@dataclass(frozen=True)
class Reply:
    """An answer and where it is from."""
    text: str
    truncated: bool  # cut at max_tokens
    source: str  # api or handwritten
    model: str  # as the server calls it
    key: str  # of the recording


def prompt(name: str, **values: str) -> str:
    """The text of llm/prompts/<name>.md with `$value` filled in, all of them. Raises UserError for a missing file."""
    file = PROMPTS / f"{name}.md"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in PROMPTS.glob("*.md")))
        raise UserError(f"prompt {name} is not in llm/prompts; it has {known}")
    return string.Template(file.read_text()).substitute(values)


def key_of(model: str, messages: list[Message], params: dict[str, Any]) -> str:
    """By what a recording is found; the order of the entries does not matter."""
    question = {"messages": messages, "model": model, "params": params}
    text = json.dumps(question, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Unusable(UserError):
    """The model answered, and none of its answers has the form that was asked for."""


class Client:
    """One model, and one file of recordings."""

    def __init__(self, args: Args, recordings: str | Path):
        """Reads the recordings. Raises UserError for a file that is none, and for flags that cannot be used."""
        self.args, self.file = args, Path(recordings)
        for name in ("max_tokens", "max_calls", "timeout", "workers"):
            if not getattr(args, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be above 0")
        if not args.temperature >= 0:
            raise UserError(f"--temperature is {args.temperature}; it has to be 0 or more")
        self.recorded = read(self.file)
        self.calls = 0  # asked of the server so far
        self.first_wait = 1.0  # seconds before the second try; it doubles with every further one
        self._lock = threading.Lock()
        self._stopped = threading.Event()  # one of many calls has failed, or Ctrl-C came: the others try no more
        self._limit = "max_tokens"  # some servers call it max_completion_tokens
        self.server = ""
        self._told = False  # what the calls will cost
        if args.mode != "replay":
            self._connect()

    def _connect(self) -> None:
        """Make the connection; nothing is sent."""
        import openai  # half a second, which a replay does not need

        if self.args.model == HANDWRITTEN:
            raise UserError(f"--mode {self.args.mode} asks a server: name its model, --model NAME; '{HANDWRITTEN}' "
                            "stands for answers that a person wrote")
        url = (self.args.base_url.strip() or os.environ.get("OPENAI_BASE_URL", "").strip()  # of a file with line ends
               or "https://api.openai.com/v1")
        if not (url.isprintable() and _is_address(url)):  # urlsplit leaves out line breaks
            raise UserError(f"--base-url {_without_password(url)} is no address; an address is, for example, "
                            "http://127.0.0.1:8080/v1")
        parts = urlsplit(url)
        key = os.environ.get("OPENAI_API_KEY", "").strip()  # a file with Windows' line ends leaves a \r
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has a character that no key has, such as a line break; set it again")
        if not key and parts.hostname == "api.openai.com":
            raise UserError("no key: set OPENAI_API_KEY, or name a server of yours, for example --base-url "
                            "http://127.0.0.1:8080/v1")
        self.server = _without_password(url)
        self._secrets = [secret for secret in (key, parts.password) if secret]
        self._openai = openai
        self._connection = openai.OpenAI(base_url=url, api_key=key or "none", timeout=self.args.timeout, max_retries=0)

    def key(self, messages: list[Message], sample: int = 0, extra: dict | None = None) -> str:
        """The key of a question to this client's model."""
        return key_of(self.args.model, messages, self._params(sample, extra))

    def _params(self, sample: int, extra: dict | None) -> dict[str, Any]:
        params = {"temperature": self.args.temperature, "max_tokens": self.args.max_tokens, "sample": sample}
        return (extra or {}) | params

    def estimate(self, conversations: list[list[Message]], extra: dict | None = None, most: int = 0,
                 samples: list[int] | None = None) -> int:
        """Say on stderr what these questions will cost, one line, and return how many calls they are. `samples` are
        those of each; without them equal questions count as samples 0, 1, ... Where answers are checked and asked
        again, `most` calls can come of it. Raises UserError where the questions alone are more than --max-calls."""
        seen, missing = {}, {}  # missing: tokens by key, so that what is asked once counts once
        for i, messages in enumerate(conversations):
            text = json.dumps(messages)
            seen[text] = seen.get(text, -1) + 1
            key = self.key(messages, samples[i] if samples else seen[text], extra)
            if self.args.mode == "off" or key not in self.recorded:
                missing[key] = sum(len(message["content"]) for message in messages) // 4 + 4 * len(messages)
        if self.args.mode == "replay" or not missing:
            return 0
        if self.args.mode == "record":
            check_writable(self.file)  # before anything is paid for
        self._told = True
        replies = len(missing) * min(self.args.max_tokens, TOKENS_PER_REPLY)
        again = ""
        if most > len(missing):
            again = f"; at most {min(most, self.args.max_calls - self.calls)} calls where answers cannot be used"
        print(f"{len(conversations)} questions, {len(missing)} calls to {self.args.model} at {self.server}: about "
              f"{sum(missing.values()):,} tokens in, {replies:,} out{again}", file=sys.stderr)
        if len(missing) > self.args.max_calls - self.calls:
            raise UserError(f"{len(missing)} calls are more than --max-calls {self.args.max_calls}; raise it, or ask "
                            "less")
        return len(missing)

    def ask(self, messages: list[Message], sample: int = 0, extra: dict | None = None) -> Reply:
        """The answer to a conversation that ends with a message of the user. `sample` numbers independent answers to
        the same question; `extra` goes to the server as it is (a grammar, say). May be called from several threads.

        Raises UserError in replay where the question is not recorded, where --max-calls are used up, and where the
        server does not answer in the end; what was answered before is kept.
        """
        params = self._params(sample, extra)
        key = key_of(self.args.model, messages, params)
        if self.args.mode != "off" and key in self.recorded:
            return _reply(self.recorded[key])
        if self.args.mode == "replay":
            last = _short(messages[-1]["content"], 200)
            raise UserError(f"not recorded for model {self.args.model} in {self.file}: {key[:16]}, \"{last}\"; record "
                            "it with --mode record --model NAME --base-url URL")
        with self._lock:
            if not self._told:
                self.estimate([messages], extra, samples=[sample])
        self._count()
        record = {"key": key, "source": "api", "model": self.args.model, "server": self.server,
                  "time": _now(), "messages": messages, "params": params, **self._call(messages, extra)}
        if self.args.mode == "record":
            with self._lock:
                append(self.file, record)
                self.recorded[key] = record
        return _reply(record)

    def _count(self) -> None:
        """One call more. Raises UserError where --max-calls are used up."""
        with self._lock:
            if self.calls >= self.args.max_calls:
                kept = f"; {self.file} has what was answered" if self.args.mode == "record" else ""
                raise UserError(f"--max-calls {self.args.max_calls} are used up{kept}: raise it and run the same again")
            self.calls += 1

    def write_by_hand(self, messages: list[Message], answer: str, sample: int = 0, extra: dict | None = None) -> None:
        """Record what a person answers in the place of a model, for this client's model `handwritten`."""
        if self.args.model != HANDWRITTEN:
            raise UserError(f"an answer of {self.args.model} is not written by hand; the model has to be {HANDWRITTEN}")
        params = self._params(sample, extra)
        record = {"key": key_of(HANDWRITTEN, messages, params), "source": HANDWRITTEN, "model": HANDWRITTEN,
                  "time": _now(), "messages": messages, "params": params, "answer": answer}
        with self._lock:
            append(self.file, record)
            self.recorded[record["key"]] = record

    def ask_all(self, conversations: list[list[Message]], extra: dict | None = None) -> Iterator[Reply]:
        """The answers to many conversations (sample 0 each), in their order, `--workers` calls at a time; equal ones
        are asked once. The first that fails, or Ctrl-C, ends it; those that were under way are still kept."""
        failures = []

        def ask(messages: list[Message]) -> Reply:
            try:
                return self.ask(messages, 0, extra)
            except Exception as error:
                failures.append(error)
                self._stopped.set()
                raise

        pool = ThreadPoolExecutor(self.args.workers)
        keys = [self.key(messages, 0, extra) for messages in conversations]
        futures = {key: pool.submit(ask, messages) for key, messages in dict(zip(keys, conversations)).items()}
        try:
            for key in keys:
                yield futures[key].result()
        except Exception:
            raise failures[0] from None  # what the others say since then follows from it
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)  # waits for those under way
            self._stopped.clear()

    def ask_for(self, messages: list[Message], parse: Callable[[str], T], tries: int = 3, sample: int = 0,
                extra: dict | None = None) -> tuple[T, list[Message]]:
        """What `parse` makes of the answer, and the conversation with the answer at its end. Where it raises ValueError
        the model is told what was wrong and asked again. Raises Unusable, with the last reason, after `tries`; other
        errors, of `ask` and of a machine without sandbox, go through."""
        for attempt in range(tries):
            reply = self.ask(messages, sample, extra)
            messages = [*messages, {"role": "assistant", "content": reply.text}]
            try:
                return parse(reply.text), messages
            except SandboxUnavailable:
                raise
            except ValueError as error:
                reason = f"{error}" + (f"; it was cut after {self.args.max_tokens} tokens" if reply.truncated else "")
                messages = [*messages, {"role": "user", "content": prompt("again", reason=reason)}]
        raise Unusable(f"{self.args.model} gave no usable answer in {tries} tries: {reason}")

    def _call(self, messages: list[Message], extra: dict | None) -> dict[str, Any]:
        """Ask the server, and again while it says that it is busy; the entries of the recording that come from it."""
        openai, reason, cut = self._openai, "", 0
        for attempt in range(TRIES):
            if reason.startswith(NO_TEXT):
                self._count()  # an answer that cannot be used is paid for, too
            limit = self._limit  # which another thread may change
            wait = min(self.first_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1)
            try:
                said = self._connection.chat.completions.create(
                    model=self.args.model, messages=messages, temperature=self.args.temperature,
                    **{limit: self.args.max_tokens}, extra_body=extra)
                if isinstance(said, str):
                    raise UserError(self._hidden(f"{self.server} is no chat completions server, it answers "
                                                 f"'{_short(self._hidden(said))}'; --base-url mostly ends in /v1"))
                text, finish_reason = _said(said)
                if text:
                    usage = said.usage.model_dump(exclude_none=True) if hasattr(said.usage, "model_dump") else {}
                    return {"answer": text, "finish_reason": finish_reason, "usage": usage,
                            "reported_model": said.model or self.args.model}
                if finish_reason == "length":
                    cut += 1
                if cut == TRIES_CUT:
                    raise UserError(f"all --max-tokens {self.args.max_tokens} were used before an answer, {cut} times; "
                                    "run the same again, which asks this one anew; another --max-tokens asks "
                                    "everything anew")
                reason = NO_TEXT
            except openai.BadRequestError as error:
                if "max_completion_tokens" not in str(error) or limit == "max_completion_tokens":
                    raise self._refused(error) from None
                self._limit, wait, reason = "max_completion_tokens", 0, "another name for max_tokens"
            except openai.APIStatusError as error:
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise self._refused(error) from None
                reason = f"{error.status_code}, {error.message}"
                asked = _seconds(error.response.headers.get("retry-after"))
                if asked > LONGEST_WAIT:
                    raise UserError(self._hidden(f"{self.server} asks to wait {asked:.0f} s ({reason}); run the same "
                                                 "again then, it goes on where it stopped")) from None
                wait = max(wait, asked) if asked else wait
            except openai.APIConnectionError as error:
                reason = f"{type(error).__name__}: {error.__cause__ or error}"
            except (openai.APIResponseValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
                reason = f"{NO_TEXT} ({type(error).__name__}: {error})"
            if attempt < TRIES - 1 and self._stopped.wait(wait):
                break
        raise UserError(self._hidden(f"{self.server} did not answer in {attempt + 1} tries, at last: {reason}; look "
                                     "whether it runs, then run the same again: it goes on where it stopped"))

    def _refused(self, error: Exception) -> UserError:
        return UserError(self._hidden(f"{self.server} refuses model {self.args.model}: {error}; check --base-url, "
                                      "--model and OPENAI_API_KEY"))

    def _hidden(self, text: str) -> str:
        """One line, in which no key can be read."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _short(text, 500)


def _said(completion: Any) -> tuple[str | None, str | None]:
    """Text and finish_reason of an answer, None where it has none: not every server keeps to the form. Half a letter
    (a lone surrogate), which no file can hold, becomes a question mark."""
    try:
        text, finish_reason = completion.choices[0].message.content, completion.choices[0].finish_reason
    except (AttributeError, TypeError, LookupError):
        return None, None
    return text.encode(errors="replace").decode() if isinstance(text, str) else None, finish_reason


def _short(text: str, length: int = 60) -> str:
    return " ".join(text.split())[:length]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _reply(record: dict[str, Any]) -> Reply:
    return Reply(record["answer"], record.get("finish_reason") == "length", record["source"],
                 record.get("reported_model", record["model"]), record["key"])


def _seconds(header: str | None) -> float:
    """Of a Retry-After; 0 where it has none, or a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and parts.port != 0 and bool(HOST.fullmatch(parts.hostname or ""))
    except ValueError:  # a bracket or a port that is none
        return False


def _without_password(url: str) -> str:
    """An address as it may be shown: in one line, without user, password and query. All up to the last @ goes, because
    a password may have a slash."""
    shown = re.sub(r"^(\w+://)?.*@", r"\1", re.sub(r"[?#].*", "", url, flags=re.S), flags=re.S)
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The recordings in `file`, {key: record}; none where there is no file. A last line that was cut, as when a machine
    stops, is left out and asked again. Raises UserError for what is no recording or was changed after it was made."""
    if not file.is_file():
        return {}
    *lines, last = file.read_text(encoding="utf-8", errors="replace").split("\n")
    records = {}
    for number, line in enumerate([*lines, last], 1):
        where = f"recordings {file}, line {number}"
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            if number > len(lines):
                continue  # no newline after it: cut
            raise UserError(f"{where}: no JSON; delete the line") from None
        if record is None:
            continue
        try:
            key = key_of(record["model"], record["messages"], record["params"])
            sound = key == record["key"] and isinstance(record["answer"], str)
            honest = record["source"] in ("api", HANDWRITTEN) and (record["source"] == HANDWRITTEN) == (
                record["model"] == HANDWRITTEN)
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{where}: no recording; delete the line") from None
        if not honest:
            raise UserError(f"{where}: source '{record['source']}' does not fit model '{record['model']}'; it is api, "
                            f"or {HANDWRITTEN} with the model {HANDWRITTEN}")
        if not sound:
            raise UserError(f"{where}: the question was changed after it was recorded; delete the line and record it "
                            "again")
        records.setdefault(key, record)
    return records


def append(file: Path, record: dict[str, Any]) -> None:
    """Add one recording, as a line; what is left of a line that was cut goes."""
    before = file.read_bytes() if file.is_file() and not _ends_a_line(file) else b""
    cut = before.rpartition(b"\n")[2]
    with _to_append(file) as stream:
        if cut and _is_json(cut):
            stream.write(b"\n")
        elif cut:
            stream.truncate(len(before) - len(cut))
        stream.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")


def check_writable(file: Path) -> None:
    """Raises UserError where nothing can be added to the file. An empty one, or a folder, is not left behind."""
    made = [path for path in (file.absolute(), *file.absolute().parents) if not os.path.lexists(path)]
    _to_append(file).close()
    with contextlib.suppress(OSError):  # another command has put something there
        for path in made:
            if path.is_dir():
                path.rmdir()
            elif not path.stat().st_size:
                path.unlink()


def _to_append(file: Path) -> BinaryIO:
    """The file, open to be added to, in a folder that is made if need be. Raises UserError where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("ab")
    except OSError as error:
        raise UserError(f"--recordings {file} cannot be written ({error.strerror}); name another") from None


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        return stream.read(1) in (b"\n", b"")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def text_in(flag: str, file: str) -> str:
    """The text of the file that a flag names. Raises UserError where it has none."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag} {file} cannot be read ({type(error).__name__}); name a text file") from None


def at_least(lowest: int, args: Any, *names: str) -> None:
    """Raises UserError where one of these arguments is below `lowest`."""
    for name in names:
        if getattr(args, name) < lowest:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be at least {lowest}")


def command(main: Callable, args_type: type, doc: str) -> None:
    """Call `main` with the arguments of the command line, as a command that asks a model: one line and exit code 2 for
    what a user can put right. `doc` is the text of the module."""
    import tyro

    try:
        main(tyro.cli(args_type, description=doc.splitlines()[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of --out, mostly
        print(f"error: {error}; name a place that can be read and written", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
