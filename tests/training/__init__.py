# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
