import { type DeviceInfo, devices, requireDevice } from '@lc/tensor';
import { cpuCount, nvidiaDriver, type RamInfo, ramInfo } from './ram.js';

/** What the machine has. */
export interface Probe {
  ram: RamInfo;
  cpus: number;
  /** What the driver shows; empty without a driver. Where `cuda.available` is false, `cuda.message` says why. */
  gpus: DeviceInfo[];
  /** Version of the NVIDIA kernel module, if one is loaded. */
  nvidiaDriver: string | null;
  /** Whether device 'cuda' can be used; if not, the code and what to do about it. */
  cuda: { available: true } | { available: false; code: string; message: string };
}

/**
 * What this process may use: RAM within cgroup limits, CPUs, GPUs, and why CUDA is not available, if it is not. Never throws for a missing GPU or binary.
 * @param options.root where /proc and /sys are, for tests
 */
export function probe(options: { root?: string } = {}): Probe {
  const { root = '/' } = options;
  let cuda: Probe['cuda'] = { available: true };
  let gpus: DeviceInfo[] = [];
  try {
    gpus = devices().filter((d) => d.device.startsWith('cuda'));
    requireDevice('cuda');
  } catch (error) {
    const { code = 'ERR_LC_CUDA', message } = error as { code?: string; message: string };
    cuda = { available: false, code, message };
  }
  return {
    ram: ramInfo(root),
    cpus: cpuCount(root),
    gpus,
    nvidiaDriver: nvidiaDriver(root),
    cuda,
  };
}
