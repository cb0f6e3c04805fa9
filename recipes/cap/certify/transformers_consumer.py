"""The export in transformers, loaded as anybody loads it."""

from __future__ import annotations

from pathlib import Path

from recipes.cap.certify.base import Consumer
from recipes.cap.certify.observation import Observation, Request
from recipes.models.hf.config_file import library_reads, trusts


class TransformersConsumer(Consumer):
    """transformers, in this environment."""

    name = "transformers"

    def observe(self, folder: Path, request: Request, scratch: Path) -> Observation:
        """See `Consumer.observe`."""
        import torch
        import transformers

        from recipes.cap.certify.observed_module import observe_module

        remedy = "Does this version of transformers have its class?"
        with library_reads("MODEL", folder, remedy, "load the export"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=trusts(folder, self.places.trust_remote_code),
            ).eval()
        return observe_module(model, request, f"transformers {transformers.__version__}")
