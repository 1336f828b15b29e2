"""`python -m tests.support.guided CORPUS -runs=N`: atheris, which looks for inputs that reach new lines of the readers."""

import sys

import atheris

with atheris.instrument_imports(
    include=["lora_fx.rules", "lora_fx.planning", "lora_fx.graphdiff.graphs", "lora_fx.sources"]
):
    from tests.support.readings import any_text

if __name__ == "__main__":
    atheris.Setup(sys.argv, any_text)
    atheris.Fuzz()
