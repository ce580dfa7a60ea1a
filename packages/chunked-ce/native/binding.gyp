{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_chunked_ce',
    'includes': ['../../../native/target.gypi'],
  }],
}
