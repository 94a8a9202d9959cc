"""A real HTTP server with chat completions, which answers and fails as it is told."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """`answer(number of the request, its payload)` is a reply's text, or one of the failures below."""

    def __init__(self, answer):
        self.answer, self.payloads, self.headers = answer, [], []
        self.lock, self.running, self.most_running = threading.Lock(), 0, 0


class Status:
    def __init__(self, code, headers=(), body="no"):
        self.code, self.headers, self.body = code, dict(headers), body


class Raw:
    """Bytes sent as they are, with pauses between; then the connection is closed, or left open for a while."""

    def __init__(self, *parts, pause_s=0.0, stays_open_s=0.0):
        self.parts, self.pause_s, self.stays_open_s = parts, pause_s, stays_open_s


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server.judge
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.payloads)
            server.payloads.append(payload)
            server.headers.append(dict(self.headers))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self.reply(server.answer(number, payload))
        finally:
            with server.lock:
                server.running -= 1

    def reply(self, answer):
        if isinstance(answer, Raw):
            for part in answer.parts:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(answer.pause_s)
            time.sleep(answer.stays_open_s)
            self.close_connection = True
            return
        status = answer if isinstance(answer, Status) else Status(200, body=completion(answer))
        body = status.body if isinstance(status.body, bytes) else status.body.encode()
        self.send_response(status.code)
        for name, value in status.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """A client that went away is what some tests are about."""


@contextmanager
def judge_server(answer):
    server = QuietServer(("127.0.0.1", 0), Handler)
    server.judge = JudgeServer(answer)
    server.judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
