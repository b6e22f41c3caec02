"""MariaDB and MySQL as the sink."""
