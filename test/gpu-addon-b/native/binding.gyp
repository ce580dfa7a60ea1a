{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_gpu_addon_b',
    'includes': ['../../../native/target.gypi'],
  }],
}
