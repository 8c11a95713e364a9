"""The proxy injects each fault as it says, and passes everything else as it is."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers.faults import Plan, Referee
from tests.servers.moto import s3_client
from tests.servers.proxy import Proxy, Rule, faulty_proxy
from tests.servers.static import static_server
from tests.servers.wire import Head

BODY = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("origin")
    (folder / "bucket").mkdir()
    (folder / "bucket" / "key").write_bytes(BODY)
    with static_server(folder) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def running_proxy(origin: str) -> Iterator[Proxy]:
    with faulty_proxy(origin) as proxy:
        yield proxy


@pytest.fixture
def proxy(running_proxy: Proxy) -> Proxy:
    running_proxy.use()
    running_proxy.forget()
    return running_proxy


@pytest.fixture
def s3_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        yield proxy


def connect(proxy: Proxy, timeout_s: float = 10) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=timeout_s)


def get(
    connection: http.client.HTTPConnection, method: str = "GET", **headers: str
) -> tuple[int, bytes]:
    connection.request(method, "/bucket/key", headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def once(proxy: Proxy) -> Any:
    return closing(s3_client(proxy.endpoint, retries={"total_max_attempts": 1}))


def test_passes_everything_without_rules(proxy: Proxy) -> None:
    with closing(connect(proxy)) as c:
        assert get(c) == (200, BODY)
        assert get(c, Range="bytes=10-19") == (206, BODY[10:20])
        assert get(c, method="HEAD") == (200, b"")
        assert get(c, Range="bytes=-3") == (206, BODY[-3:])
    assert proxy.methods() == {"GET": 3, "HEAD": 1}
    assert not proxy.faults()
    assert [s.range for s in proxy.seen()] == ["", "bytes=10-19", "", "bytes=-3"]
    assert proxy.peak_in_flight() == 1


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("internal_error", 500, b"InternalError"),
        ("slow_down", 503, b"SlowDown"),
        ("not_implemented", 501, b"NotImplemented"),
        ("not_allowed", 405, b"MethodNotAllowed"),
        ("bad_request", 400, b"InvalidArgument"),
        ("error_under_200", 200, b"InternalError"),
    ],
)
def test_refusals_keep_the_connection(proxy: Proxy, fault: Any, status: int, code: bytes) -> None:
    proxy.use(Rule(fault, calls=[1, 2]))
    with closing(connect(proxy)) as c:
        got, body = get(c)
        assert got == status
        assert b"<Code>" + code + b"</Code>" in body
        assert get(c, method="HEAD") == (status, b"")
        assert get(c) == (200, BODY)
    assert proxy.faults() == {fault: 2}


def test_answers_that_name_no_reason(proxy: Proxy) -> None:
    with closing(connect(proxy)) as c:
        proxy.use(Rule("not_found"))
        assert get(c) == (404, b"")
        proxy.use(Rule("babble"))
        status, body = get(c)
        assert status == 200
        assert b"<!DOCTYPE html>" in body
        proxy.use()
        assert get(c) == (200, BODY)


def test_heads_that_lack_something(proxy: Proxy) -> None:
    with closing(connect(proxy)) as c:
        proxy.use(Rule("rewrite", pattern=r"^range:.*\r\n"))
        assert get(c, Range="bytes=10-19") == (200, BODY)  # the server never heard of it
        proxy.use(
            Rule("rewrite", pattern=r"^etag:.*\r\n"),
            Rule("rewrite", pattern=r"^(content-range: bytes 10-19)/\d+", replacement=r"\1/*"),
        )
        c.request("GET", "/bucket/key", headers={"Range": "bytes=10-19"})
        response = c.getresponse()
        assert response.read() == BODY[10:20]
        assert response.headers["ETag"] is None
        assert response.headers["Content-Range"] == "bytes 10-19/*"
    assert not proxy.faults()


def test_reset(proxy: Proxy) -> None:
    proxy.use(Rule("reset", times=1))
    with closing(connect(proxy)) as c:
        with pytest.raises(ConnectionResetError):
            get(c)
        c.close()
        assert get(c) == (200, BODY)


def test_reset_in_the_body(proxy: Proxy) -> None:
    proxy.use(Rule("reset_body"))
    with closing(connect(proxy)) as c, pytest.raises(ConnectionResetError):
        get(c)


def test_close_in_the_body_is_a_short_read(proxy: Proxy) -> None:
    proxy.use(Rule("close_body"))
    with closing(connect(proxy)) as c, pytest.raises(http.client.IncompleteRead) as caught:
        get(c)
    assert caught.value.partial == BODY[: len(BODY) // 2]


def test_shortened_body_looks_whole(proxy: Proxy) -> None:
    proxy.use(Rule("shorten", match="^range:"))
    with closing(connect(proxy)) as c:
        assert get(c, Range="bytes=0-99") == (206, BODY[:50])
        assert get(c) == (200, BODY)
    assert proxy.faults() == {"shorten": 1}


def test_one_byte_of_a_response_is_flipped(proxy: Proxy) -> None:
    proxy.use(Rule("flip_response"), seed=3)
    with closing(connect(proxy)) as c:
        first, second = get(c)[1], get(c)[1]
    for got in (first, second):
        assert sum(a != b for a, b in zip(got, BODY, strict=True)) == 1
    assert first != second
    proxy.use(Rule("flip_response"), seed=3)
    with closing(connect(proxy)) as c:
        assert get(c)[1] == first


def test_freeze(proxy: Proxy) -> None:
    proxy.use(Rule("freeze"))
    with closing(connect(proxy, timeout_s=0.3)) as c, pytest.raises(TimeoutError):
        get(c)
    assert [s.status for s in proxy.seen()] == [0]


def test_delays_do_not_queue(proxy: Proxy) -> None:
    proxy.use(Rule("delay", seconds=0.3))
    num = 200

    def one(_: int) -> int:
        with closing(connect(proxy)) as c:
            return get(c, Range="bytes=0-9")[0]

    started_s = time.monotonic()
    with ThreadPoolExecutor(num) as pool:
        assert set(pool.map(one, range(num))) == {206}
    assert 0.3 <= time.monotonic() - started_s < 10
    assert proxy.peak_in_flight() > num // 2
    assert proxy.faults() == {"delay": num}


def test_bandwidth(proxy: Proxy) -> None:
    proxy.use(Rule("bandwidth", bytes_per_s=2e6))
    started_s = time.monotonic()
    with closing(connect(proxy)) as c:
        assert get(c) == (200, BODY)
    assert 0.4 <= time.monotonic() - started_s < 10


def test_a_server_that_is_gone_is_a_closed_connection() -> None:
    gone = (http.client.RemoteDisconnected, ConnectionResetError)
    with faulty_proxy("http://127.0.0.1:1") as lonely:
        c = connect(lonely)
        with closing(c), pytest.raises(gone):
            get(c)


def decisions(plan: Plan, targets: list[str]) -> dict[str, bool]:
    referee = Referee(plan)
    heads = {t: Head(f"GET {t} HTTP/1.1\r\n\r\n".encode()) for t in targets}
    return {t: referee.judge(head).fault is not None for t, head in heads.items()}


def test_chance_does_not_hang_on_the_order_of_requests() -> None:
    plan = Plan((Rule("reset", probability=0.3),), seed=1)
    targets = [f"/b/{i}" for i in range(1000)]
    forward, backward = decisions(plan, targets), decisions(plan, targets[::-1])
    assert forward == backward
    assert 240 < sum(forward.values()) < 360
    assert decisions(Plan(plan.rules, seed=2), targets) != forward


def test_rules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no fault is called 'flood'"):
        Rule("flood")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds"):
        Rule("delay")
    with pytest.raises(ValueError, match="bytes_per_s"):
        Rule("reset", bytes_per_s=1)
    with pytest.raises(ValueError, match="pattern"):
        Rule("rewrite")


@pytest.mark.s3
def test_uploads_pass(s3_proxy: Proxy, s3_bucket: str) -> None:
    with once(s3_proxy) as client:
        # boto3 sends `Expect: 100-continue` with every body.
        client.put_object(Bucket=s3_bucket, Key="whole", Body=BODY)
        assert client.get_object(Bucket=s3_bucket, Key="whole")["Body"].read() == BODY
        upload = client.create_multipart_upload(Bucket=s3_bucket, Key="parts")["UploadId"]
        where = {"Bucket": s3_bucket, "Key": "parts", "UploadId": upload}
        parts = [
            {
                "PartNumber": n,
                "ETag": client.upload_part(PartNumber=n, Body=BODY * 6, **where)["ETag"],
            }
            for n in (1, 2)
        ]
        client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **where)
        assert client.head_object(Bucket=s3_bucket, Key="parts")["ContentLength"] == len(BODY) * 12


@pytest.mark.s3
@pytest.mark.parametrize(("rules", "stored"), [((), b"hello"), ((Rule("flip_request"),), b"=ello")])
def test_chunked_uploads_pass(
    s3_proxy: Proxy, s3_bucket: str, rules: tuple[Rule, ...], stored: bytes
) -> None:
    s3_proxy.use(*rules)
    chunks = [b"5;chunk-signature=0\r\nhello\r\n", b"0;chunk-signature=0\r\n\r\n"]
    with closing(connect(s3_proxy)) as c:
        c.request(
            "PUT",
            f"/{s3_bucket}/key",
            body=iter(chunks),
            headers={
                "Transfer-Encoding": "chunked",
                "Content-Encoding": "aws-chunked",
                "X-Amz-Content-Sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
                "X-Amz-Decoded-Content-Length": "5",
            },
            encode_chunked=True,
        )
        response = c.getresponse()
        assert (response.status, response.read()) == (200, b"")
    with once(s3_proxy) as client:
        assert client.get_object(Bucket=s3_bucket, Key="key")["Body"].read() == stored


@pytest.mark.s3
def test_one_byte_of_a_request_is_flipped(s3_proxy: Proxy, s3_bucket: str) -> None:
    s3_proxy.use(Rule("flip_request", match="^PUT"))
    # moto keeps the client's checksum unchecked; boto3 by default checks it when it reads.
    unchecking = {"response_checksum_validation": "when_required"}
    with closing(s3_client(s3_proxy.endpoint, **unchecking)) as client:
        client.put_object(Bucket=s3_bucket, Key="key", Body=BODY)
        got = client.get_object(Bucket=s3_bucket, Key="key")["Body"].read()
    assert sum(a != b for a, b in zip(got, BODY, strict=True)) == 1
    assert s3_proxy.faults() == {"flip_request": 1}


@pytest.mark.s3
def test_the_lost_response_of_a_conditional_create(s3_proxy: Proxy, s3_bucket: str) -> None:
    s3_proxy.use(Rule("lost_response", match="^if-none-match: *", times=1))
    with closing(s3_client(s3_proxy.endpoint, retries={"total_max_attempts": 3})) as client:
        # The retry meets what the first attempt made: the writer believes that it lost.
        with pytest.raises(client.exceptions.ClientError) as caught:
            client.put_object(Bucket=s3_bucket, Key="key", Body=b"mine", IfNoneMatch="*")
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
        assert client.get_object(Bucket=s3_bucket, Key="key")["Body"].read() == b"mine"
    assert [s.status for s in s3_proxy.seen() if s.method == "PUT"] == [0, 412]


@pytest.mark.s3
def test_refused_upload(s3_proxy: Proxy, s3_bucket: str) -> None:
    s3_proxy.use(Rule("slow_down", match="^PUT", calls=[1]))
    with closing(s3_client(s3_proxy.endpoint, retries={"total_max_attempts": 2})) as client:
        client.put_object(Bucket=s3_bucket, Key="key", Body=BODY)
        assert client.get_object(Bucket=s3_bucket, Key="key")["Body"].read() == BODY
    assert [s.status for s in s3_proxy.seen() if s.method == "PUT"] == [503, 200]


@pytest.mark.s3
def test_s3fs_reads_the_static_server(origin: str) -> None:
    s3fs = pytest.importorskip("s3fs")
    fs = s3fs.S3FileSystem(anon=True, endpoint_url=origin)
    assert fs.ls("bucket") == ["bucket/key"]
    assert fs.info("bucket/key")["size"] == len(BODY)
    assert fs.cat_file("bucket/key", start=5, end=1000) == BODY[5:1000]
    with pytest.raises(FileNotFoundError):
        fs.info("bucket/other")


def test_commands_from_several_threads(proxy: Proxy) -> None:
    threads = [threading.Thread(target=proxy.use) for _ in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert proxy.seen() == []
