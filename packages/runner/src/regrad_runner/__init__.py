"""The command `regrad`: compare, train, explain. Its modules are imported one by one, when they are used."""
