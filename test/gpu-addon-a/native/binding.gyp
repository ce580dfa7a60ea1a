{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_gpu_addon_a',
    'includes': ['../../../native/target.gypi'],
  }],
}
