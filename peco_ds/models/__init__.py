"""Networks. Each runs in a notebook on CPU: no engine, no file format of the data, no training loop is known here."""
