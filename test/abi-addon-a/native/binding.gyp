{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_abi_addon_a',
    'includes': ['../../../native/target.gypi'],
  }],
}
