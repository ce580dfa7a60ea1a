{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_attention',
    'includes': ['../../../native/target.gypi'],
  }],
}
