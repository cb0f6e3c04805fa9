"""Runs a model in vLLM and writes its logits and experts; it runs in vLLM's own environment, without Graft.

Usage: ``PYTHON vllm_worker.py REQUEST.json``. One process and one sequence at a time: then each row of a pass
is a token of the sequence, and the routers' choices are read where vLLM makes them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main() -> None:
    """Computes what the request asks for."""
    # vLLM reads them when it is imported.
    os.environ.update(_SETTINGS)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import numpy as np
    import vllm
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out, sequences = Path(request["out"]), request["sequences"]
    length = max(map(len, sequences)) + request["new_tokens"] + 1
    llm = LLM(
        model=request["model"],
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=length,
        max_num_batched_tokens=max(length, 2048),
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
    )
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    watch = _Watch(model)
    for number, tokens in enumerate(sequences):
        watch.begin(_pinned(request["pinned"], number), len(tokens))
        llm.generate(
            {"prompt_token_ids": tokens},
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False),
            use_tqdm=False,
        )
        arrays = {f"experts/{layer}": ids for layer, ids in watch.experts.items()}
        np.savez(out / f"sequence_{number}.npz", logits=watch.logits(len(tokens)), **arrays)
    watch.end()
    greedy = []
    if request["new_tokens"]:
        prompts = [{"prompt_token_ids": tokens[: request["prompt_length"]]} for tokens in sequences]
        params = SamplingParams(
            max_tokens=request["new_tokens"], temperature=0.0, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        greedy = [list(map(int, output.outputs[0].token_ids)) for output in outputs]
    version = {"version": f"vllm {vllm.__version__}", "greedy": greedy}
    (out / "greedy.json").write_text(json.dumps(version), encoding="utf-8")


def _pinned(folder: str | None, number: int) -> dict[int, Any]:
    import numpy as np

    if folder is None:
        return {}
    with np.load(Path(folder) / f"routing_{number}.npz") as arrays:
        layers = {int(name.partition("/")[2]) for name in arrays.files}
        return {n: (arrays[f"experts/{n}"], arrays[f"weights/{n}"]) for n in layers}


class _Watch:
    """Keeps the logits and experts of a pass over a sequence, and pins experts where it is told to."""

    def __init__(self, model: Any) -> None:
        self.experts: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._rows: list[Any] = []
        self._length = 0
        self._model, self._compute = model, model.compute_logits
        model.compute_logits = self._logits
        for name, module in model.named_modules():
            router = getattr(module, "router", None)
            if hasattr(router, "_compute_routing"):
                layer = next(int(part) for part in name.split(".") if part.isdigit())
                # A factor that it applies to the output is in the weights of a trainer.
                self._watch(layer, router, getattr(module, "routed_scaling_factor", 1.0))

    def begin(self, pinned: dict[int, Any], length: int) -> None:
        """Forgets the sequence before."""
        self._pinned, self._length = pinned, length
        self.experts.clear()
        self._rows.clear()

    def end(self) -> None:
        """Lets the model compute on its own."""
        self.begin({}, -1)

    def logits(self, length: int) -> Any:
        """Returns the ``[S, V]`` fp32 logits of the sequence."""
        import torch

        # Those of the last position come alone, those of the prompt in another call.
        parts = sorted(self._rows, key=len, reverse=True)
        found = torch.cat(parts)[:length]
        assert len(found) == length, [len(part) for part in parts]
        return found.numpy()

    def _logits(self, *args: Any, **kwargs: Any) -> Any:
        found = self._compute(*args, **kwargs)
        if self._length > 0:
            self._rows.append(found.detach().float().clone())
        return found

    def _watch(self, layer: int, router: Any, output_factor: float) -> None:
        import torch

        compute = router._compute_routing

        def routing(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            weights, ids = compute(hidden, *args, **kwargs)
            if hidden.shape[0] != self._length:
                return weights, ids
            if layer in self._pinned:
                given_ids, given_weights = self._pinned[layer]
                ids = torch.from_numpy(given_ids).to(ids)
                weights = torch.from_numpy(given_weights / output_factor).to(weights)
            self.experts[layer] = ids.long().numpy().copy()
            return weights, ids

        router._compute_routing = routing


if __name__ == "__main__":
    main()
