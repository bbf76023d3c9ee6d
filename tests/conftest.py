"""One thread: what tests compute is too small for two, which on a busy machine wait for each other."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes take it over
