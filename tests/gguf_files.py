"""Small GGUF files, written with gguf-py."""

import gguf


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that a writer has been given, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
