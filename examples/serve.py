# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Serves one exported backbone with any number of adapters, on one machine or on a Ray cluster.

```bash
pip install -e ".[serve]"
python examples/serve.py exported/ --adapters adapters/ --replicas 2   # this machine; Ctrl-C drains and ends it
curl --data-binary @photo.jpg 'http://localhost:8000/predict/pets?top_k=3'
cd examples && serve run --working-dir . serve:build backbone=/data/exported adapters=/data/adapters   # a Ray cluster
```

`exported/` is what `peft_e2vpt.export.export_backbone` wrote, with the settings of the image processor beside it
(`processor.save_pretrained("exported")`). `adapters/` holds what `export_adapter` wrote, `NAME.safetensors` each, and
may change while the server runs. The pages `/docs` and `/openapi.json` describe the API; docs/serving_adapters.md, all
the rest. `adapter_server/` holds the parts.

The ingress takes requests, bounds them, and hands them to replicas of the backbone. Replicas share nothing but the
folder of adapters. Each of them decodes images, gathers them into batches whatever their adapters are, and looks at
the files of these adapters before every batch, so that an answer is that of the store when its batch began.
"""

# Annotations stay objects: `serve run` reads from them that `build` takes `Options`.
import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from adapter_server.ingress import Ingress
from adapter_server.options import Options, check_files
from adapter_server.replica import Backbone
from ray import serve


APP = "adapters"


def build(options: Options) -> serve.Application:
    """
    The application, as `serve run examples.serve:build NAME=VALUE ...` takes it.

    Raises:
        ValueError: The folder of the backbone lacks a file, or there is no folder of adapters.
    """
    check_files(options)
    waiting = 2 * options.max_batch  # in a replica: a batch that runs, and one that gathers
    room = options.replicas * waiting + options.max_queued
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    backbone = Backbone.options(
        num_replicas=options.replicas,
        max_ongoing_requests=waiting,
        max_queued_requests=options.max_queued,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.timeout_s,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": options.threads, "runtime_env": {"env_vars": threads}},
    ).bind(options)
    # It has room for more than the backbone takes, so that 503 comes from there, with `Retry-After`.
    return Ingress.options(
        num_replicas=options.ingresses,
        max_ongoing_requests=room + 256,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=2 * options.timeout_s,
        ray_actor_options={"num_cpus": 0},
    ).bind(options, backbone)


def parse(arguments: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("backbone", help=Options.model_fields["backbone"].description)
    for name, field in Options.model_fields.items():
        if name != "backbone":
            how: dict[str, Any] = {"action": "store_true"} if field.annotation is bool else {"default": field.default}
            about = field.description or ""
            parser.add_argument("--" + name.replace("_", "-"), help=f"{about}; default {field.default}", **how)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all; default 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--metrics-port", type=int, help="port of Prometheus metrics; default: any free one")
    parser.add_argument("--address", default="local", help="of a running Ray cluster; default: a Ray of its own")
    parsed = parser.parse_args(arguments)
    try:
        options = Options(**{name: getattr(parsed, name) for name in Options.model_fields})
        check_files(options)
    except ValueError as error:
        parser.error(str(error))
    return options, parsed


def drain(options: Options) -> None:
    """Waits until all requests that were accepted have their answers; new ones are refused."""
    under_way: dict[str, int] = {}
    deadline = time.monotonic() + options.timeout_s
    ingress = serve.get_app_handle(APP)
    while (len(under_way) < options.ingresses or any(under_way.values())) and time.monotonic() < deadline:
        name, number = ingress.drain.remote().result(timeout_s=10)  # of any of them
        under_way[name] = number
        time.sleep(0.05)
    time.sleep(1)  # the last answers are on their way through Serve's proxies


def main() -> None:
    options, parsed = parse(sys.argv[1:])
    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)  # a second one ends at once

    is_own = parsed.address == "local"
    if is_own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 s are few on a busy machine
        settings: dict[str, Any] = {
            "num_cpus": max(os.cpu_count() or 1, options.replicas * options.threads),
            "object_store_memory": 200 * 2**20,
            "include_dashboard": False,
            "_metrics_export_port": parsed.metrics_port,
        }
    else:
        settings = {"runtime_env": {"py_modules": [str(Path(__file__).parent / "adapter_server")]}}
    ray.init(address=parsed.address, **settings)
    try:
        free = int(ray.cluster_resources().get("CPU", 0))
        if options.replicas * options.threads > free:
            wanted = f"{options.replicas} replicas of {options.threads} threads"
            sys.exit(f"{wanted} need {options.replicas * options.threads} CPUs, but the cluster has {free}.")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        where = "HeadOnly" if is_own else "EveryNode"
        http = {"host": parsed.host, "port": parsed.port, "request_timeout_s": 2 * options.timeout_s}
        serve.start(proxy_location=where, http_options=http)
        try:
            serve.run(build(options), name=APP)
        except RuntimeError as error:
            sys.exit(f"The server does not start; the reason is the last error above. {error}")
        print(f"Ready: http://{parsed.host}:{parsed.port}/docs", flush=True)
        ended.wait()
        print("Draining: requests under way get their answers, new ones 503.", flush=True)
        drain(options)
        serve.shutdown()
    except KeyboardInterrupt:
        sys.exit("Ended at once: requests under way are lost.")
    finally:
        ray.shutdown()
    print("Ended.", flush=True)


if __name__ == "__main__":
    main()
