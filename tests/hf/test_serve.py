"""`linearize serve`: the server of transformers finds the class by its name; what it cannot serve is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from linearize.errors import UserError
from linearize.hf.export import export, export_adapter
from linearize.hf.serve import expose

SCRIPT = """
import sys
import transformers as early
from linearize.hf.serve import expose
expose(sys.argv[1])
import transformers.cli.serving.model_manager as server  # what the server itself looks into
config = server.transformers.AutoConfig.from_pretrained(sys.argv[1])
print(getattr(server.transformers, config.architectures[0]).from_pretrained(sys.argv[1]).config.model_type)
"""


def test_the_server_finds_the_class(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    folder = export(converted("lolcats"), pico_tokenizer, tmp_path / "student")
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True)
    assert done.stdout == "linearized_llama\n", done.stderr


def test_an_adapter_is_not_served_without_being_applied(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    lora = get_peft_model(converted("lolcats"), LoraConfig(r=2, target_modules=["q_proj"]))
    folder = export_adapter(lora, pico_tokenizer, tmp_path / "student")
    with pytest.raises(UserError, match=r"has a LoRA in adapter/, which the server leaves out"):
        expose(str(folder))
