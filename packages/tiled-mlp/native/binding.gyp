{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_tiled_mlp',
    'includes': ['../../../native/target.gypi'],
  }],
}
