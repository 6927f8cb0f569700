"""A small server of OpenAI's style on loopback that serves real models through transformers: completions with echoed log-likelihoods, chat.

As vLLM's and llama.cpp's servers answer, as far as lm-eval asks. Import as ``from tests.tasks.evaluation.openai_server import serving``.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


class Served:
    """One model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.net: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], asked: Mapping[str, Any]) -> list[int]:
        """Token by token without a cache, greedily at temperature 0, up to the end of sequence or ``max_tokens``."""
        generator = torch.Generator().manual_seed(int(asked.get("seed") or 0))
        ids = list(prompt)
        for _ in range(asked["max_tokens"]):
            logits = self.net(torch.tensor([ids])).logits[0, -1]
            heat = float(asked.get("temperature") or 0)
            best = torch.multinomial((logits / heat).softmax(-1), 1, generator=generator) if heat else logits.argmax()
            ids.append(int(best))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return ids[len(prompt) :]

    @torch.no_grad()
    def echoed(self, ids: Sequence[int]) -> dict[str, Any]:
        """Log-likelihood of every token given those before it, None for the first, and of the likeliest in its place."""
        logits = self.net(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [logits[i, token].item() for i, token in enumerate(ids[1:])]
        best = [{str(int(row.argmax())): row.max().item()} for row in logits[:-1]]
        return {"token_logprobs": [None, *own], "top_logprobs": [None, *best]}

    def completion(self, prompt: str | Sequence[int], asked: Mapping[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
        written = self.generate(ids, asked)
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        stops = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []
        for stop in stops:
            text = text.split(stop)[0]
        return {"text": text} | ({"logprobs": self.echoed([*ids, *written])} if asked.get("echo") else {})


@contextlib.contextmanager
def serving(models: Mapping[str, Path], *, key: str | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL of the API, the requests that came): ``models`` by the names under which they are served. ``key``: what requests must carry."""
    served = {name: Served(folder) for name, folder in models.items()}
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": [{"id": name} for name in served]} if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path} | asked)
            model = served[asked["model"]]
            if self.path == "/v1/chat/completions":
                text = model.tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
                answers = [model.completion(text, asked)]
                self._answer({"choices": [{"index": 0, "message": {"role": "assistant", "content": answers[0]["text"]}}]})
            elif self.path == "/v1/completions":
                prompts = asked["prompt"]
                several = prompts if isinstance(prompts, list) and isinstance(prompts[0], list | str) else [prompts]
                self._answer({"choices": [{"index": i} | model.completion(one, asked) for i, one in enumerate(several)]})
            else:
                self._answer(None)

        def _answer(self, body: dict[str, Any] | None) -> None:
            allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            content = json.dumps(body if allowed else {"error": "no such key"}).encode()
            self.send_response(401 if not allowed else 404 if body is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
