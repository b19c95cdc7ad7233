import importlib.util

# there are no wheels of Triton for every platform
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
