{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_abi_fake',
    'includes': ['../../../native/target.gypi'],
    'variables': { 'lc_exports': 'exports-tensor.map' },
  }],
}
