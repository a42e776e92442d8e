# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The parts of `examples/serve.py`.

| part | its idea |
|---|---|
| `options.py` | what a server is told, and what it refuses |
| `store.py` | where adapters come from: a folder or the Hub |
| `bank.py` | the adapters of one replica, which follow the store |
| `scratch.py` | a folder for one process |
| `classifier.py` | images to answers with one backbone, in ONNX Runtime or PyTorch, without Ray |
| `replica.py` | a classifier on Ray Serve: batches, health, metrics |
| `ingress.py` | HTTP: limits, statuses, requests whose replica dies, the end |
"""
