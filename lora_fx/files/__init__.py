"""Adapters in files, in PEFT's format.

names         keys and patterns as PEFT spells them
fingerprint   a few values of the base weights, to tell another base
site          one site, as it is written and as it is read
describe      an adapted model → what is to be written
write         a directory, whole or not at all
patterns      which entry of rank_pattern and alpha_pattern means which layer
configuration adapter_config.json, checked
noted         what lora_fx notes beside the tensors, checked
header        what it writes there, with a hash over both
read          files → a checked AdapterFile
restore       AdapterFile + model → an adapted model
"""
