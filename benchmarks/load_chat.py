"""Load on the page's server: many clients at once, each with a dialog of its own. Are all answered, none mixed up?

python benchmarks/load_chat.py                       # 32 clients, 5 messages each, example/model
python benchmarks/load_chat.py --clients 8 --model runs/Nov21_20-57-01_host_model

Needs requirements/web.txt. Each client sends its dialog, with a seed of its own, over HTTP to `interact.py --web`. Its
replies must be those that it gets when nobody else is there. At last Ctrl-C comes while all wait for a reply. The last
line is JSON.
"""

import argparse
import contextlib
import http.client
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXTS = ["hello , how are you ?", "what do you do for a living ?", "do you have any pets ?", "where do you live ?",
         "what do you like to eat ?"]  # fmt: skip


def ask(address: str, messages: list[dict], seed: int) -> str:
    body = json.dumps({"messages": messages, "seed": seed}).encode()
    request = urllib.request.Request(f"{address}v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def dialog(address: str, client: int, messages: int, times: list[float]) -> list[str]:
    """A client's dialog; gives the replies."""
    said = [{"role": "system", "content": f"i am number {client} .\ni have {client} dogs ."}]
    for turn in range(messages):
        said.append({"role": "user", "content": TEXTS[(client + turn) % len(TEXTS)]})
        begun = time.perf_counter()
        said.append({"role": "assistant", "content": ask(address, said, 1 + client * messages + turn)})
        times.append(time.perf_counter() - begun)
    return [turn["content"] for turn in said if turn["role"] == "assistant"]


def interrupted(server: subprocess.Popen, address: str, clients: int) -> float:
    """Seconds from Ctrl-C to the end of a server whose clients all wait for a reply."""

    def left_alone(seed: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            ask(address, [{"role": "user", "content": TEXTS[0]}], seed)

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(left_alone, seed) for seed in range(clients)]
        wait(asked, return_when=FIRST_COMPLETED)
        begun = time.perf_counter()
        server.send_signal(signal.SIGINT)
        server.wait(60)
        return time.perf_counter() - begun


def resident(pid: int) -> float:
    """Memory of a process, in MB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description="Load on the server of interact.py --web.")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--messages", type=int, default=5, help="of each client")
    parser.add_argument("--rounds", type=int, default=3, help="how often all clients talk, to see the memory")
    parser.add_argument("--model", default=str(ROOT / "example" / "model"))
    args = parser.parse_args()
    flags = ["--model", args.model, "--personality", "x", "--device", "cpu", "--web", "127.0.0.1:0"]
    command = [sys.executable, str(ROOT / "interact.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        begun, alone_times = time.perf_counter(), list[float]()
        alone = [dialog(address, client, args.messages, alone_times) for client in range(args.clients)]
        alone_s, memory, together_s, times = time.perf_counter() - begun, [resident(server.pid)], [], list[float]()
        mixed_up = 0
        for _ in range(args.rounds):
            begun = time.perf_counter()
            with ThreadPoolExecutor(args.clients) as pool:
                found = list(pool.map(lambda i: dialog(address, i, args.messages, times), range(args.clients)))
            together_s.append(time.perf_counter() - begun)
            mixed_up += sum(one != other for one, other in zip(found, alone))
            memory.append(resident(server.pid))
            print(
                f"{args.clients} clients: {together_s[-1]:.1f} s, {memory[-1]:.0f} MB, {mixed_up} mixed up", flush=True
            )
        stop_s = interrupted(server, address, args.clients)
    print(json.dumps({
        "benchmark": "load_chat", "processor": processor(), "clients": args.clients, "messages": args.messages,
        "one_after_the_other_s": round(alone_s, 1), "together_s": round(statistics.median(together_s), 1),
        "latency_alone_s": round(statistics.median(alone_times), 3), "latency_s": round(statistics.median(times), 3),
        "longest_s": round(max(times), 2), "mixed_up": mixed_up, "memory_mb": [round(size) for size in memory],
        "stop_s": round(stop_s, 2),
    }))  # fmt: skip
    sys.exit(mixed_up > 0)


if __name__ == "__main__":
    main()
