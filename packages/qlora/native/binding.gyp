{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_qlora',
    'includes': ['../../../native/target.gypi'],
  }],
}
