"""Configure vLLM engines that cannot be: their arguments (a JSON list) on stdin, what was said (JSON) on stdout."""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")


def said(arguments: dict) -> str:
    """The error; empty if there was none."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(**arguments).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    print(json.dumps([said(arguments) for arguments in json.load(sys.stdin)]))
