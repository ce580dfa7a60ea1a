{
  'includes': ['../../../native/common.gypi'],
  'targets': [{
    'target_name': 'lc_tensor',
    'includes': ['../../../native/target.gypi'],
    # A worker that is terminated inside a call cannot be thrown an error any more; without this the process aborts.
    'defines': ['NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS'],
    'variables': { 'lc_exports': 'exports-tensor.map' },
  }],
}
