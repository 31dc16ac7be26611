"""Generate the protobuf stubs of loscar_wire into a folder: `python proto/generate.py FOLDER`.

Runs with the pinned tools of `make proto`; a test runs it again and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
SOURCE = "loscar/v1/parameter_server.proto"


def main(folder: str) -> int:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    # Flat output: `_generated/parameter_server_pb2.py`, importable without touching sys.path.
    root = HERE / "loscar" / "v1"
    status: int = protoc.main(["protoc", f"-I{HERE}", f"--python_out={out}", f"--pyi_out={out}", str(HERE / SOURCE)])
    if status:
        return status
    for made in (out / root.relative_to(HERE)).glob("parameter_server_pb2*"):
        made.replace(out / made.name)
    for folder_ in (out / "loscar" / "v1", out / "loscar"):
        folder_.rmdir()
    (out / "__init__.py").write_text('"""Generated from proto/loscar/v1/parameter_server.proto: `make proto`."""\n')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
