import { availableParallelism } from 'node:os';
import { type DeviceInfo, devices, memInfo, requireDevice } from '@lc/tensor';

export interface Probe {
  ram: { totalBytes: number; availableBytes: number };
  cpus: number;
  gpus: DeviceInfo[];
  /** Whether device 'cuda' can be used; if not, the code and what to do about it. */
  cuda: { available: true } | { available: false; code: string; message: string };
}

/** What this process may use: RAM within cgroup limits, CPUs, GPUs, and why CUDA is not available, if it is not. Never throws for a missing GPU. */
export function probe(): Probe {
  const ram = memInfo('cpu');
  let cuda: Probe['cuda'] = { available: true };
  try {
    requireDevice('cuda');
  } catch (error) {
    const { code = 'ERR_LC_CUDA', message } = error as { code?: string; message: string };
    cuda = { available: false, code, message };
  }
  return {
    ram: { totalBytes: ram.totalBytes, availableBytes: ram.freeBytes },
    cpus: availableParallelism(),
    gpus: devices().filter((d) => d.device.startsWith('cuda')),
    cuda,
  };
}
