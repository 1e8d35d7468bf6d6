"""What memest.py is made of: a trace of real code on fake tensors, and formulas. Modules to import, no programs."""
