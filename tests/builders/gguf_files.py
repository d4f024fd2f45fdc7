"""GGUF files as they come from the field: a good one written again without or with more of something."""

from pathlib import Path

import gguf
import numpy as np


def copy_gguf(source: Path, target: Path, drop=(), tensors=None, fields=None, architecture=None):
    """Write the file again, without the tensors and fields whose names begin so, and with these beside them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture or reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture", *drop)) or name in (fields or {}):
            continue
        kind = field.types[0]
        writer.add_key_value(
            name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    for name, value in (fields or {}).items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if not tensor.name.startswith(tuple(drop)):
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
