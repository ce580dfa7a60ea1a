{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_abi_addon_b',
    'includes': ['../../../native/target.gypi'],
    'cflags_cc': ['-O1', '-fno-rtti'], # other flags than its neighbour: nothing of C++ crosses
  }],
}
