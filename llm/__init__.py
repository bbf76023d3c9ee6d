"""Language models as a source of knowledge: ask one, keep its answers, run the code that it wrote in a sandbox."""
