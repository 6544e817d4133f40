"""deepy: training of large language models on GPUs from YAML files. ARCHITECTURE.md is the map."""
