{
  "targets": [{ "target_name": "tinylib", "sources": ["tinylib.c"], "defines": ["NAPI_VERSION=8"], "cflags": ["-O2", "-Wall", "-Wextra"] }]
}
