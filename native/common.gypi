# Flags that every addon is compiled with. Commands in <!() run in packages/<name>/native; plain paths are relative to this file.
{
  'variables': {
    'lc_cuda': '<!(node ../../../native/detect.cjs cuda)',
    'lc_cuda_home': '<!(node ../../../native/detect.cjs home)',
    'lc_cuda_archs': '<!(node ../../../native/detect.cjs archs)',
    'lc_nvcc_key': '<!(node ../../../native/detect.cjs key)',
    'lc_version': '<!(node ../../../native/detect.cjs version)',
  },
  'target_defaults': {
    'include_dirs': ['include', '<!(node -p "require(\'node-addon-api\').include_dir")'],
    'defines': ['NAPI_VERSION=8', 'NODE_ADDON_API_CPP_EXCEPTIONS',
                # A worker that is terminated inside a native call must not abort the process.
                'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS', 'LCTX_VERSION="<(lc_version)"'],
    'cflags!': ['-fno-exceptions'],
    'cflags_cc!': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20'],
    'cflags': ['-O3', '-ffp-contract=fast', '-fvisibility=hidden', '-fno-math-errno', '-Wall', '-Wextra', '-Wno-unused-parameter', '-Wno-cast-function-type', '-Wno-restrict'],
    'cflags_cc': ['-std=c++20', '-fvisibility-inlines-hidden'],
    'conditions': [
      ['lc_cuda==1', {
        'defines': ['LCTX_WITH_CUDA', 'LCTX_CUDA_TARGETS="<(lc_cuda_archs)"'],
        'include_dirs': ['<(lc_cuda_home)/include'],
      }],
    ],
  },
}
