"""`python -m lora_fx` is `lora-fx`."""

from lora_fx.cli import main

if __name__ == "__main__":
    main(prog_name="lora-fx")
