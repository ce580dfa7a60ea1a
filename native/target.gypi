# Included inside each target: compiles every .cc (and, with CUDA, every .cu) of packages/<name>/native.
{
  'variables': { 'lc_exports%': 'exports.map' },
  'sources': ['build_info.cc', '<!@(node ../../../native/sources.cjs cc)'],
  'ldflags': [
    '-Wl,--exclude-libs,ALL', '-Wl,--gc-sections',
    # A worker that loaded the addon would otherwise unload it on exit, with pool threads and vtables still in use.
    '-Wl,-z,nodelete',
    '-static-libstdc++',
    '-Wl,--version-script=<(module_root_dir)/../../../native/<(lc_exports)',
  ],
  'conditions': [
    ['lc_cuda==1', {
      'sources': ['<!@(node ../../../native/sources.cjs cu)'],
      'libraries': ['<(lc_cuda_home)/lib64/libcudart_static.a', '-ldl', '-lrt', '-lpthread'],
      'rules': [{
        'rule_name': 'nvcc',
        'extension': 'cu',
        # gyp gives rules no dependency file: headers are listed, and compiler, flags and targets are part of the object's name.
        'inputs': ['nvcc.cjs', '<!@(node ../../../native/sources.cjs headers)'],
        'outputs': ['<(INTERMEDIATE_DIR)/<(RULE_INPUT_ROOT).<(lc_nvcc_key).o'],
        'process_outputs_as_sources': 1,
        'message': 'nvcc <(RULE_INPUT_PATH)',
        'action': ['node', '../../../native/nvcc.cjs', '<(RULE_INPUT_PATH)', '<@(_outputs)'],
      }],
    }],
  ],
}
