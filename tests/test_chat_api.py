"""Questions to an endpoint: every way to fail is tried, nothing is paid twice, and what is kept is
what was answered."""
import copy, json, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import pytest

from judge_server import always_first, judge_server, longer
from vcb_nb import chat_api
from vcb_nb.artifacts import InputError
from vcb_nb.chat_api import (Answer, AnswerCache, CeilingReached, Chat, ChatConfig, Pace,
                             estimated_tokens, question_key, wait_asked_for)
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model

ROOT = Path(__file__).parent.parent
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def client(monkeypatch):
    pytest.importorskip("openai", reason="needs the client: pip install vcb-nb[judge]")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def question(i):
    "Its two responses differ in length by one, and the longer one changes from one to the next."
    a, b = "x" * (i + i % 2), "x" * (i + 1 - i % 2)
    return [{"role": "user", "content": f"<response_a>\n{a}\n</response_a>\n"
                                        f"<response_b>\n{b}\n</response_b>"}]


QUESTIONS = [question(i) for i in range(8)]
RIGHT = ['{"choice": "B"}', '{"choice": "A"}'] * 4


def config(server, **settings):
    return ChatConfig(**{**dict(base_url=server.url, model="m", timeout=5., backoff=.01, retries=3,
                                workers=2), **settings})


def texts(answers): return [a.text for a in answers]


def test_each_question_gets_its_answer():
    with judge_server() as server:
        chat = Chat(config(server))
        answers = chat.ask(QUESTIONS)
    assert texts(answers) == RIGHT and len(server.asked) == 8
    _, body, headers = server.bodies[0]
    assert {k: body[k] for k in ("model", "temperature", "max_tokens")} == dict(
        model="m", temperature=0, max_tokens=256)
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert answers[0].model == "m-1" and answers[0].base_url == server.url
    sent = sum(len(q[0]["content"]) // 4 for q in QUESTIONS)
    assert chat.report()["tokens"] == dict(sent=sent, received=48, lost=0)


# --- failures that pass

@pytest.mark.parametrize("fault", ["429", "500", "503", "hang", "drip", "drop", "cut", "not json",
                                   "page", "no choices", "no content"])
def test_a_failure_that_passes_leaves_no_trace(fault):
    "Some first attempts fail; the answers are those of a server that never does."
    def some(number, before): return fault if number % 3 == 2 and not before else None
    with judge_server(fault=some) as server:
        chat = Chat(config(server, timeout=.7 if fault in ("hang", "drip") else 5.))
        assert texts(chat.ask(QUESTIONS)) == RIGHT
    failed = len(server.asked) - 8
    assert failed > 0 and sum(chat.failures.values()) == failed
    billed = fault not in ("429", "500", "503")
    assert bool(chat.spending.lost) == billed # an attempt without an answer may be on the bill


def test_the_endpoint_says_how_long_to_wait():
    "Retry-After holds every worker back, also those that were not told."
    with judge_server(fault=lambda number, before: "later" if number == 1 else None) as server:
        assert texts(Chat(config(server, workers=1)).ask(QUESTIONS[:3])) == RIGHT[:3]
    first, *others = [at for at, *_ in server.bodies]
    assert len(others) == 3 and min(others) - first >= .59


def test_the_pauses_grow(monkeypatch):
    waits = []
    async def sleep(self, seconds): waits.append(seconds)
    monkeypatch.setattr(chat_api.Attempts, "sleep", sleep)
    with judge_server(fault=lambda number, before: "500") as server:
        with pytest.raises(InputError): Chat(config(server, workers=1, backoff=1.)).ask(QUESTIONS)
    pauses = [w for w in waits if w]
    assert [2**k / 2 <= w <= 2**k for k, w in enumerate(pauses)] == [True] * 3


# --- failures that stay

@pytest.mark.parametrize("fault, says", [
    ("401", "Check the key in OPENAI_API_KEY"), ("404", "Check base_url and model"),
    ("quota", "fault quota"), ("much later", "asks to wait 86400")])
def test_what_no_patience_helps_against_ends_at_once(fault, says, tmp_path):
    "One request is enough to know; the key is neither in the message nor in the files."
    with judge_server(fault=lambda number, before: fault) as server:
        with pytest.raises(InputError, match=says) as error:
            Chat(config(server, workers=1, cache=str(tmp_path))).ask(QUESTIONS)
    assert len(server.asked) == 1 and KEY not in str(error.value)
    assert "0 of 8 questions were answered" in str(error.value)
    assert KEY not in "".join(p.read_text() for p in tmp_path.glob("*"))


def test_an_outage_ends_with_what_was_answered(tmp_path):
    "It is told, nothing is made up, and the next run asks the rest."
    down = lambda number, before: "503" if number > 3 else None
    with judge_server(fault=down) as server:
        with pytest.raises(InputError, match="after 3 attempts. 3 of 8 questions") as error:
            Chat(config(server, workers=1, retries=2, cache=str(tmp_path))).ask(QUESTIONS)
        assert len(server.asked) == 3 + 3 and "503" in str(error.value)
        kept = AnswerCache(tmp_path).found
        assert sorted(a.text for a in kept.values()) == sorted(RIGHT[:3])
        server.fault = lambda number, before: None
        assert texts(Chat(config(server, cache=str(tmp_path))).ask(QUESTIONS)) == RIGHT
        assert len(server.asked) == 6 + 5


def test_nobody_there():
    with judge_server() as server: gone = config(server)
    chat = Chat(gone)
    with pytest.raises(InputError, match="Connection error"): chat.ask(QUESTIONS)
    assert chat.spending.lost == 0 # nobody was there to send a bill


def test_one_question_that_is_refused_stops_no_other(tmp_path):
    "It is too long, say: an answer without a text, and asked again in the next run."
    with judge_server(fault=lambda number, before: "400" if number == 2 else None) as server:
        settings = config(server, workers=1, cache=str(tmp_path))
        answers = Chat(settings).ask(QUESTIONS)
        assert [a.finish for a in answers] == ["stop", "rejected", *["stop"] * 6]
        assert texts(Chat(settings).ask(QUESTIONS)) == RIGHT and len(server.asked) == 9


@pytest.mark.parametrize("fault, finish", [("refusal", "refusal"), ("filter", "content_filter"),
                                           ("length", "length")])
def test_an_answer_says_how_it_ended(fault, finish, tmp_path):
    "It is an answer: it was paid for, and is not asked again."
    with judge_server(fault=lambda number, before: fault if number == 1 else None) as server:
        settings = config(server, workers=1, cache=str(tmp_path))
        first = Chat(settings).ask(QUESTIONS)
        assert [a.finish for a in first] == [finish, *["stop"] * 7]
        assert Chat(settings).ask(QUESTIONS) == first and len(server.asked) == 8


def test_an_error_of_ours_is_no_outage(monkeypatch):
    "It is raised as it is: patience would only hide it."
    def broken(*_): raise KeyError("ours")
    monkeypatch.setattr(chat_api, "read_answer", broken)
    with judge_server() as server:
        with pytest.raises(KeyError, match="ours"): Chat(config(server, workers=1)).ask(QUESTIONS)
    assert len(server.asked) == 1


# --- several at a time

def test_as_many_at_a_time_as_there_are_workers():
    "The server answers only when four are there together."
    gate = threading.Barrier(4)
    with judge_server(delay=lambda number: gate.wait(10) and 0.) as server:
        assert texts(Chat(config(server, workers=4, timeout=20.)).ask(QUESTIONS)) == RIGHT
    assert server.most == 4 and len(server.asked) == 8


def test_answers_in_another_order_go_to_their_questions():
    finished = []
    def rule(a, b):
        finished.append((a, b))
        return longer(a, b)
    with judge_server(rule, delay=lambda number: .5 if number == 1 else 0.) as server:
        assert texts(Chat(config(server, workers=8)).ask(QUESTIONS)) == RIGHT
    assert len(finished) == 8


def test_the_same_question_is_asked_once():
    with judge_server() as server:
        answers = Chat(config(server, workers=4)).ask(QUESTIONS[:2] * 3)
        assert texts(answers) == RIGHT[:2] * 3 and len(server.asked) == 2


def test_requests_keep_their_pace():
    "At 600 per minute, five take no less than four tenths of a second."
    with judge_server() as server:
        Chat(config(server, workers=5, requests_per_minute=600.)).ask(QUESTIONS[:5])
    times = sorted(at for at, *_ in server.bodies)
    assert times[-1] - times[0] > .3


def test_places_in_the_row_are_as_far_apart_as_was_asked(monkeypatch):
    "By requests or by tokens; a hold moves all that come after it. The clock stands still."
    monkeypatch.setattr(time, "monotonic", lambda: 100.)
    pace = Pace(120.)
    assert [pace.wait() for _ in range(3)] == [0, .5, 1.]
    tokens = Pace(6000.)
    assert [tokens.wait(n) for n in (50, 200, 1)] == pytest.approx([0, .5, 2.5])
    free = Pace(None)
    assert [free.wait(), free.wait(9)] == [0, 0]
    free.hold(7.)
    assert free.wait() == 7 and free.wait() == 7


@pytest.mark.parametrize("headers, seconds", [
    ({}, None), ({"retry-after": "3"}, 3.), ({"retry-after": "-3"}, 0.),
    ({"retry-after": "soon"}, None), ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.)])
def test_when_to_come_back_is_read(headers, seconds, monkeypatch):
    "As seconds, milliseconds or a date; the clock stands at one minute past its beginning."
    monkeypatch.setattr(time, "time", lambda: 60.)
    error = SimpleNamespace(response=SimpleNamespace(headers=headers))
    assert wait_asked_for(error) == seconds


# --- the cache

def test_what_decides_an_answer_is_in_its_key():
    base = ChatConfig("http://a/v1", "m")
    same = [dict(base_url="https://b:1/v2"), dict(workers=9), dict(timeout=1.), dict(cache="x"),
            dict(price_in=3.), dict(api_key_env="X"), dict(requests_per_minute=5.)]
    other = [dict(model="n"), dict(temperature=.5), dict(temperature=None), dict(max_tokens=9),
             dict(extra={"seed": 1}), dict(extra={"max_completion_tokens": 256})]
    def key(messages=QUESTIONS[0], **changes):
        return question_key(ChatConfig(**{"base_url": "http://a/v1", "model": "m", **changes}),
                            messages)
    assert {key(**changes) for changes in same} == {question_key(base, QUESTIONS[0])}
    assert len({key(), key(QUESTIONS[1]), *(key(**changes) for changes in other)}) == 8


def test_another_question_is_never_answered_from_the_cache(tmp_path):
    with judge_server() as server:
        Chat(config(server, cache=str(tmp_path))).ask(QUESTIONS[:3])
        server.rule = always_first
        again = Chat(config(server, cache=str(tmp_path))).ask(QUESTIONS[:3])
        other = Chat(config(server, cache=str(tmp_path), temperature=1.)).ask(QUESTIONS[:3])
    assert texts(again) == RIGHT[:3] and set(texts(other)) == {'{"choice": "A"}'}


@pytest.mark.parametrize("broken", ['["k", {"text": "A"', '["k"]', '["k", {"word": "A"}]', "x",
                                    '["k", null]', "null", "\x00\x00"])
def test_a_broken_line_is_skipped(broken, tmp_path):
    "Whatever a killed writer or a full disk left behind; the next answer begins a line of its own."
    cache = AnswerCache(tmp_path)
    cache.keep("a", Answer("A"))
    with cache.file.open("a") as f: f.write(broken)
    AnswerCache(tmp_path).keep("b", Answer("B\n\u2028\x85"))
    assert {k: a.text for k, a in AnswerCache(tmp_path).found.items()} == {
        "a": "A", "b": "B\n\u2028\x85"}


ASK = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler) # ignored below a shell's `&`
from vcb_nb.chat_api import Chat, ChatConfig
questions, settings = json.load(open(sys.argv[1]))
Chat(ChatConfig(**settings)).ask(questions)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_run_asks_nothing_twice(how, tmp_path):
    """What had been kept is not asked again; an interrupt keeps what was under way as well.
    The server holds its fifth answer back until the process is gone, or was told."""
    told = threading.Event()
    with judge_server(delay=lambda number: told.wait(20) and 0. if number == 5 else 0.) as server:
        settings = dict(base_url=server.url, model="m", workers=1, cache=str(tmp_path/"kept"))
        (tmp_path/"asked.json").write_text(json.dumps([QUESTIONS, settings]))
        process = subprocess.Popen([sys.executable, "-c", ASK, tmp_path/"asked.json"], cwd=ROOT,
                                   stderr=subprocess.DEVNULL)
        while len(server.asked) < 5: time.sleep(.02)
        process.send_signal(getattr(signal, how))
        if how == "SIGKILL": process.wait()
        else: time.sleep(.5)
        told.set()
        assert process.wait() != 0
        kept = 4 if how == "SIGKILL" else 5
        assert len(AnswerCache(tmp_path/"kept").found) == kept and len(server.asked) == 5
        answers = Chat(ChatConfig(**settings)).ask(QUESTIONS)
        assert texts(answers) == RIGHT and len(server.asked) == 5 + 8 - kept


# --- the bill

PRICES = dict(price_in=1e4, price_out=1e5, max_tokens=6) # per million tokens


def dearest(questions): return sum(map(estimated_tokens, questions)) / 100 + len(questions) * .6


def test_a_bill_that_could_be_too_high_is_refused_before():
    most = dearest(QUESTIONS)
    with judge_server() as server:
        for settings in (dict(max_cost=most * .999),
                         dict(max_total_tokens=sum(map(estimated_tokens, QUESTIONS)) + 47)):
            with pytest.raises(CeilingReached, match="8 questions may take the bill to"):
                Chat(config(server, **PRICES, **settings)).ask(QUESTIONS)
        assert server.asked == []
        chat = Chat(config(server, **PRICES, max_cost=most * 1.001))
        chat.ask(QUESTIONS)
    sent = sum(len(q[0]["content"]) // 4 for q in QUESTIONS)
    assert chat.report()["cost"] == pytest.approx(sent / 100 + 48 / 10) and most > sent/100 + 4.8


def test_a_ceiling_holds_over_several_runs(tmp_path):
    "What earlier runs have paid for the same questions is on the bill."
    with judge_server() as server:
        settings = dict(PRICES, cache=str(tmp_path))
        paid = Chat(config(server, **settings))
        paid.ask(QUESTIONS[:6])
        left = dearest(QUESTIONS[6:])
        for extra, fits in ((.99, False), (1.01, True)):
            chat = Chat(config(server, **settings, max_cost=paid.spending.cost + left * extra))
            if fits: chat.ask(QUESTIONS)
            else:
                with pytest.raises(CeilingReached): chat.ask(QUESTIONS)
    assert len(server.asked) == 8


def test_attempts_that_may_be_billed_reach_the_ceiling(tmp_path):
    "A server that garbles every answer cannot spend more than is allowed."
    most = dearest(QUESTIONS) * 1.5
    with judge_server(fault=lambda number, before: "not json") as server:
        chat = Chat(config(server, **PRICES, retries=10**4, backoff=0., workers=3, max_cost=most))
        with pytest.raises(CeilingReached, match="max_cost"): chat.ask(QUESTIONS)
    assert 0 < chat.spending.cost <= most and chat.spending.reserved == []


def test_what_the_endpoint_does_not_count_is_estimated():
    with judge_server(fault=lambda number, before: "no usage") as server:
        chat = Chat(config(server, **PRICES))
        chat.ask(QUESTIONS)
    assert chat.report()["estimated"] == 8
    assert chat.report()["cost"] == pytest.approx(dearest(QUESTIONS))


# --- settings

@pytest.mark.parametrize("changes, says", [
    (dict(base_url="api.openai.com"), "is no address"), (dict(model=""), "model is not set"),
    (dict(base_url="http://user:key@host/v1"), "without a key"), (dict(workers=0), "workers is 0"),
    (dict(base_url="http://h/v1?key=1"), "without a key"), (dict(timeout=0.), "timeout is 0"),
    (dict(extra={"model": "x"}), "extra.model"), (dict(extra={"n": 3}), "extra.n"),
    (dict(max_cost=1.), "price_in"), (dict(requests_per_minute=0.), "requests_per_minute is 0"),
    (dict(temperature=-1.), "temperature is -1"), (dict(base_url="http://[::1"), "no address")])
def test_settings_that_cannot_be_are_told(changes, says):
    with pytest.raises(InputError, match=says):
        Chat(ChatConfig(**{"base_url": "http://127.0.0.1/v1", "model": "m", **changes}))


def test_a_key_is_needed_where_the_endpoint_is_not_here(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="no OPENAI_API_KEY"):
        Chat(ChatConfig("https://127.0.0.1.example.com/v1", "m")).ask(QUESTIONS)
    with judge_server() as server: assert texts(Chat(config(server)).ask(QUESTIONS)) == RIGHT


def test_fields_of_an_endpoint_reach_it():
    "Also those that the client does not know; a longer name of max_tokens takes its place."
    extra = {"max_completion_tokens": 50, "reasoning_effort": "low", "guided_choice": ["A"]}
    with judge_server() as server:
        Chat(config(server, extra=extra, temperature=None)).ask(QUESTIONS[:1])
    body = server.bodies[0][1]
    assert {k: body[k] for k in extra} == extra
    assert "max_tokens" not in body and "temperature" not in body


def test_without_the_client_it_is_said_which_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with judge_server() as server, pytest.raises(InputError, match=r"pip install vcb-nb\[judge\]"):
        Chat(config(server)).ask(QUESTIONS)
    assert os.environ["OPENAI_API_KEY"] == KEY and server.asked == []


# --- a real server

@pytest.fixture(scope="module")
def transformers_serve(tiny_tokenizer, tmp_path_factory):
    "`transformers serve` with a tiny model of random weights: its process and its base_url."
    python = os.environ.get("VCB_SERVE_PYTHON", sys.executable)
    needed = "import fastapi, uvicorn"
    if subprocess.run([python, "-c", needed], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("transformers serve needs fastapi and uvicorn: install them, or name a Python "
                    "that has them in VCB_SERVE_PYTHON")
    folder = tmp_path_factory.mktemp("served")/"tiny"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_model(new_policy(tokenizer, "llama", hidden_size=32, num_hidden_layers=1,
                          max_position_embeddings=512), tokenizer, folder)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    log = (folder/"log").open("w")
    process = subprocess.Popen([python, "-m", "transformers.cli.transformers", "serve", str(folder),
                                "--port", str(port), "--device", "cpu"], stdout=log, stderr=log)
    for _ in range(600):
        with socket.socket() as s:
            if process.poll() is not None or not s.connect_ex(("127.0.0.1", port)): break
        time.sleep(.1)
    yield process, f"http://127.0.0.1:{port}/v1", str(folder)
    process.kill()


@pytest.mark.slow
def test_transformers_serve_is_asked_and_then_gone(transformers_serve, tmp_path):
    "A real server of the protocol: tokens are counted, nothing is asked twice, its end is told."
    process, url, model = transformers_serve
    settings = ChatConfig(url, model, max_tokens=5, timeout=120., retries=1, backoff=.01,
                          cache=str(tmp_path))
    chat = Chat(settings)
    answers = chat.ask(QUESTIONS[:3])
    assert chat.asked == 3 and chat.failures == {} and chat.report()["estimated"] == 0
    assert all(a.sent > 10 and 0 < a.received <= 5 for a in answers)
    process.kill()
    process.wait()
    assert Chat(settings).ask(QUESTIONS[:3]) == answers
    with pytest.raises(InputError, match="Connection error.*0 of 1 questions"):
        Chat(settings).ask(QUESTIONS[:4])
