# SPDX-License-Identifier: Apache-2.0
"""A builder's process that logs an error, then ends itself in the middle of a line, as TensorRT may."""

import json
import os
import sys

events = int(sys.argv[2])
os.write(events, json.dumps({"kind": "error", "text": "the first error"}).encode() + b"\n")
os.write(events, json.dumps({"kind": "error", "text": "a consequence"}).encode() + b'\n{"kind": "adv')
os.abort()
