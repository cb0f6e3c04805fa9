"""Model card of an export: ``README.md`` says what the model is, where it comes from, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.data.tokenizer_code import names_code
from recipes.models.export.base import Exporter, Layout
from recipes.models.export.spec import ModelSpec
from recipes.runtime.atomic import atomic_write_text

CARD = "README.md"
#: Heading behind which `graft certify` writes what it has found.
CERTIFICATES = "## Certificates"
_LOADING = {
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```""",
    "graft": """```python
from pathlib import Path

from recipes.models.export.graft_format import load_graft  # of graft-moe

model = load_graft(Path("FOLDER")).module
```""",
    "vllm": "```bash\nvllm serve FOLDER\n```",
    "llama.cpp": """```bash
python convert_hf_to_gguf.py FOLDER --outfile model.gguf
llama-server -m model.gguf
```""",
}

_CODE = (
    "Its tokenizer runs code of its own, which is beside this file: once you have read it and trust it, give "
    "`AutoTokenizer.from_pretrained` `trust_remote_code=True`, and vLLM `--trust-remote-code`."
)


@dataclass(frozen=True)
class Origin:
    """Origin of a model.

    Attributes:
        dense: Name of the checkpoint that it was made of.
        method: Upcycling method; None for a mixture that was trained on.
        training: What was trained since, as a clause.
    """

    dense: str
    method: str | None
    training: str


def dense_name(folder: Path | str | None) -> str:
    """Returns the name of a dense checkpoint: that of its folder, or of the run whose ``hf`` it is.

    Args:
        folder: The folder; None for the model that a run trains where none is given.
    """
    if folder is None:
        return "Graft's default model"
    path = Path(folder).expanduser().absolute()
    return path.parent.name if path.name == "hf" else path.name


def write_card(
    folder: Path, exporter: Exporter, spec: ModelSpec, origin: Origin, layout: Layout = "per_expert"
) -> None:
    """Writes the card of an export.

    Args:
        folder: The export.
        exporter: Its format.
        spec: The model.
        origin: Its origin.
        layout: Layout of its experts' tensors.
    """
    programs = exporter.exact_in(spec, layout)
    code = f"\n{_CODE}\n" if names_code(folder) else ""
    loading = "\n\n".join(f"{name}:\n\n{_LOADING[name]}" for name in programs)
    text = f"""---
library_name: transformers
tags: [moe, graft]
---

# {origin.dense}, {"trained on" if origin.method is None else "as a mixture of experts"}

{_description(spec, origin)}

The licence of {origin.dense} holds for what was made of it.

## Load

Its format is {exporter.title} (`{exporter.name}`), with which tests certify these programs to compute what
was trained: {", ".join(programs)}. FOLDER is the folder of this file.

{loading}
{code}
{CERTIFICATES}

None of this very model yet: `graft certify` writes them here.
"""
    atomic_write_text(folder / CARD, text)


def _description(spec: ModelSpec, origin: Origin) -> str:
    moe = spec.moe_blocks[0]
    shared = f" and a shared one {moe.shared_width} wide" if moe.shared_width else ""
    made = f"It is the mixture of experts {origin.dense} ({spec.architecture}), "
    if origin.method is not None:
        made = (
            f"Graft made it of the dense model {origin.dense} ({spec.architecture}) by the method "
            f"`{origin.method}`; it was "
        )
    lines = [
        f"{made}{origin.training}.",
        f"{len(spec.moe_blocks)} of its {spec.num_layers} layers have {moe.num_experts} experts "
        f"{moe.expert.width} wide{shared}, of which a token uses {moe.router.top_k}; the router is "
        f"`{moe.router.name}`.",
    ]
    if spec.attention:
        lines.append(f"{len(spec.attention)} layers have experts of attention.")
    return "\n".join(lines)


def replace_certificates(folder: Path, text: str) -> None:
    """Replaces the last section of a card; does nothing in a folder whose card is not of this module."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, heading, _ = card.partition(CERTIFICATES)
    if heading:
        atomic_write_text(path, f"{before}{heading}\n\n{text}\n")
