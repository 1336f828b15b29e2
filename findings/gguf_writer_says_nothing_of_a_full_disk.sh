#!/usr/bin/env bash
# Who:       gguf 0.19.0 with numpy 2.4.6 (ndarray.tofile), Linux.
# What:      GGUFWriter writes each tensor by numpy's tofile, which leaves bytes in a buffer of C, and does not look
#            whether they arrived when that is closed. Of a tensor of less than 4 kB, as norms and biases are, on a disk
#            that is full (or into a file that may grow no further) nothing arrives, and nobody says so: the file ends
#            early and counts as written. Larger tensors end in an OSError, as does a plain write by Python.
# Expected:  an OSError (no space left, file too large) for tensors of every size.
# Seen:      a last tensor of 1 kB into a file that has room for 100 bytes of it: no error, and those 100 bytes; by
#            open(…).write: OSError 27 (file too large).
# Way out:   compare the size of the file with what its header needs, or read it again, before it counts as written.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import contextlib
import importlib.metadata
import os
import resource
import sys

import gguf
import numpy

NORM = numpy.ones(256, dtype=numpy.float32)


@contextlib.contextmanager
def allowed(size):
    """Let files grow to so many bytes, as on a disk that is full then."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, most)


def by_writer(path, most):
    """Write a model of one norm into a file that has room for so many bytes; return its size."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("norm", NORM)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    with allowed(most):
        writer.write_tensors_to_file()
        writer.close()
    return os.path.getsize(path)


def by_python(path, room):
    try:
        with allowed(room), open(path, "wb", buffering=0) as file:
            file.write(bytes(room))
            file.write(NORM.tobytes())
    except OSError as error:
        return error.errno


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("gguf", "numpy")))
folder = sys.argv[1]
whole = by_writer(f"{folder}/whole", 1 << 20)
cut = by_writer(f"{folder}/cut", whole - NORM.nbytes + 100)
print(f"GGUFWriter: {cut} of {whole} bytes, no error")
errno = by_python(f"{folder}/plain", 100)
print(f"Python's write: OSError {errno}")
if not (cut < whole and errno == 27):
    sys.exit("changed: the writer tells that its file was cut off")
print("as described: a file that was cut off counts as written")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
