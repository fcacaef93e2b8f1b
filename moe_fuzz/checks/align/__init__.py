"""The checks of `align`: rules that any right answer keeps, whatever the order of slots inside an expert."""
