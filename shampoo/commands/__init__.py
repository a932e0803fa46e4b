"""Commands of ``python -m shampoo``, one a module: what each reads, makes and prints."""
