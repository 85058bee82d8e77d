"""Reading small invented datasets."""

import pytest

from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.sources import dataset_files
from transfertransfo.errors import UserError


@pytest.fixture
def read(tmp_path):
    """Write contents to a file and read its training split."""

    def write_and_read(content, name="chat", **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        (dialogs,) = read_dialogs(dataset_files(path), **options).values()
        return dialogs

    return write_and_read


@pytest.fixture
def fault(read):
    def read_fault(content, name="chat", **options):
        with pytest.raises(UserError) as error:
            read(content, name, **options)
        return str(error.value).partition(f"{name}: ")[2]

    return read_fault
